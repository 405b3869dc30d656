/* The head's kernels for any machine. */
#include "head.h"

#define HIRE_HEAD_LEVEL 0
#include "simd_portable.h"
#include "head_simd.h"
#include "head_body.h"

const hire_head_kernels hire_head_portable = {estimate, refine, exact};
