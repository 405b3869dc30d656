/* The head's kernels for x86 with AVX2. */
#include "head.h"

#ifdef HIRE_X86
#include <immintrin.h>
#include <stddef.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define HIRE_HEAD_LEVEL 1
#include "simd_avx2.h"
#include "head_simd.h"
#include "head_body.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const hire_head_kernels hire_head_avx2 = {estimate, refine, exact};
#endif
