/* The kernels for any machine. */
#include "step.h"

/* Sixteen lanes are loops here, which GCC makes vectors of at this level only. */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("O3")
#endif

#include "simd_portable.h"
#include "kernels_body.h"
#include "step_body.h"

const hire_kernels hire_kernels_portable = {
    start, estimate, exact, kept, rest, add_to, top_k, square, reaching, finish};
const hire_step_kernels hire_step_portable = {
    split_rows, matrix, norm, rotate, store_at, attend, sum_pieces, activate_all, all_finite};
