// One build runs on every x86-64 machine and takes its widest vectors.
//
// A function marked PYEDITFAST_VECTOR_CLONES is compiled several times, and the loader picks the
// clone for the machine. PYEDITFAST_DISPATCH says whether code may also choose by itself at run
// time. A build with -DPYEDITFAST_ONE_INSTRUCTION_SET does neither: it is made for exactly the
// instructions that the compiler's options name, which is how tests compare instruction sets.
#pragma once

#if !defined(PYEDITFAST_ONE_INSTRUCTION_SET) && defined(__x86_64__) && defined(__linux__) && \
    defined(__GLIBC__) && defined(__GNUC__) && (!defined(__clang__) || __clang_major__ >= 14)
#define PYEDITFAST_DISPATCH 1
#define PYEDITFAST_VECTOR_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define PYEDITFAST_DISPATCH 0
#define PYEDITFAST_VECTOR_CLONES
#endif
