/* The kernels for x86 with AVX-512 (F, BW, DQ, VL, VNNI); called only where the CPU says it has them. */
#include "step.h"

#ifdef HIRE_X86
#include <immintrin.h>
#include <math.h>
#include <stddef.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,popcnt")
#endif

#include "simd_avx512.h"
#include "kernels_body.h"
#include "step_body.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const hire_kernels hire_kernels_avx512 = {
    start, estimate, exact, kept, rest, add_to, top_k, square, reaching, finish};
const hire_step_kernels hire_step_avx512 = {
    split_rows, matrix, norm, rotate, store_at, attend, sum_pieces, activate_all, all_finite};
#endif
