// Intrinsics of instruction sets that the machine may or may not have.
//
// PYEDITFAST_WITH_AVX512, PYEDITFAST_WITH_AVX2 and PYEDITFAST_WITH_F16C are defined where functions
// for these can be compiled: each is marked PYEDITFAST_TARGET with their name and, where
// PYEDITFAST_DISPATCH is 1, called only if PYEDITFAST_HAS of that name is true.
#pragma once

#include "vector_clones.h"

#if PYEDITFAST_DISPATCH
#define PYEDITFAST_WITH_AVX512 1
#define PYEDITFAST_WITH_AVX2 1
#if defined(__clang__) || __GNUC__ >= 11
#define PYEDITFAST_WITH_F16C 1
#endif
#define PYEDITFAST_TARGET(name) __attribute__((target(name)))
#define PYEDITFAST_HAS(name) (__builtin_cpu_init(), __builtin_cpu_supports(name) != 0)
#else
#ifdef __AVX512F__
#define PYEDITFAST_WITH_AVX512 1
#endif
#ifdef __AVX2__
#define PYEDITFAST_WITH_AVX2 1
#endif
#ifdef __F16C__
#define PYEDITFAST_WITH_F16C 1
#endif
#define PYEDITFAST_TARGET(name)
#define PYEDITFAST_HAS(name) true
#endif

#if defined(PYEDITFAST_WITH_AVX512) || defined(PYEDITFAST_WITH_AVX2) || \
    defined(PYEDITFAST_WITH_F16C)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own AVX-512 header reads the undefined values it makes (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif
