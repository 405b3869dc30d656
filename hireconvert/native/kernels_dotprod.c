/* The kernels for 64-bit ARM with FEAT_DotProd; called only where the CPU says it has it. */
#include "step.h"

#ifdef HIRE_ARM
#include <arm_neon.h>
#include <math.h>
#include <stddef.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("+dotprod")
#endif

#define HIRE_DOTPROD 1
#include "simd_neon.h"
#include "kernels_body.h"
#include "step_body.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const hire_kernels hire_kernels_dotprod = {
    start, estimate, exact, kept, rest, add_to, top_k, square, reaching, finish};
const hire_step_kernels hire_step_dotprod = {
    split_rows, matrix, norm, rotate, store_at, attend, sum_pieces, activate_all, all_finite};
#endif
