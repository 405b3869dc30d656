/* The packing for x86 with AVX-512 (F, BW, DQ, VL). */
#include "pack.h"

#ifdef HIRE_X86
#include <math.h>
#include <stddef.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC optimize("O3")
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,popcnt")
#endif

#include "pack_body.h"
#include "code_pack_body.h"
#include "head_pack_body.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const hire_packers hire_packers_avx512 = {pack_neurons, code_rows, pack_head, head_energy};
#endif
