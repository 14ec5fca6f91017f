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
#if defined(__clang__) || __GNUC__ < 12
#define PYEDITFAST_VECTOR_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
// avx512f alone has no wide vectors of 16-bit numbers, and other compilers no name for both.
#define PYEDITFAST_VECTOR_CLONES __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#endif
#else
#define PYEDITFAST_DISPATCH 0
#define PYEDITFAST_VECTOR_CLONES
#endif

// A loop is vectorized only if everything in it is inlined, however large.
#if defined(__GNUC__)
#define PYEDITFAST_INLINE inline __attribute__((always_inline))
#else
#define PYEDITFAST_INLINE inline
#endif
