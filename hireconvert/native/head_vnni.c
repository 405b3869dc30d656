/* The head's kernels for x86 with AVX-512 and VNNI. */
#include "head.h"

#ifdef HIRE_X86
#include <immintrin.h>
#include <stddef.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
#endif

#define HIRE_HEAD_LEVEL 3
#include "simd_avx512.h"
#include "head_simd.h"
#include "head_body.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const hire_head_kernels hire_head_vnni = {estimate, refine, exact};
#endif
