/* The kernels for any machine. */
#include "kernels.h"
#include "simd_portable.h"
#include "kernels_body.h"

const hire_kernels hire_kernels_portable = {start, estimate, exact, kept, rest, finish};
