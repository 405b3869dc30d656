/* The kernels for 64-bit ARM, whose every CPU has NEON. */
#include "step.h"

#ifdef HIRE_ARM
#define HIRE_DOTPROD 0
#include "simd_neon.h"
#include "kernels_body.h"
#include "step_body.h"

const hire_kernels hire_kernels_neon = {
    start, estimate, exact, kept, rest, add_to, top_k, square, reaching, finish};
const hire_step_kernels hire_step_neon = {
    split_rows, matrix, norm, rotate, store_at, attend, sum_pieces, activate_all, all_finite};
#endif
