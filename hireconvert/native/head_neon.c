/* The head's kernels for 64-bit ARM. */
#include "head.h"

#ifdef HIRE_ARM
#define HIRE_DOTPROD 0
#include "simd_neon.h"
#include "head_simd_neon.h"
#include "head_body.h"

const hire_head_kernels hire_head_neon = {estimate, refine, exact};
#endif
