/* The head's kernels for 64-bit ARM with FEAT_DotProd. */
#include "head.h"

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
#include "head_simd_neon.h"
#include "head_body.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const hire_head_kernels hire_head_dotprod = {estimate, refine, exact};
#endif
