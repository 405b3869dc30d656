/* Numbers as the packing loops read them. Bytes are the same at every level, so products and sums
 * must not be fused. */
#ifndef HIRE_PACK_NUMBERS_H
#define HIRE_PACK_NUMBERS_H

#include "pack.h"
#include "round_numbers.h"

#include <math.h>
#include <string.h>

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#endif

#define TO_NEAREST 12582912.0f /* 1.5 * 2^23: adding it leaves no bits for a fraction */

static inline float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float half_to_float(uint16_t half)
{
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, size = (uint32_t)(half & 0x7fff) << 13;
    const uint32_t exponent = size & 0x0f800000;
    const float tiny = float_of(size + 0x38800000) - 0x1p-14f; /* without a leading one */
    const uint32_t other = size + (exponent == 0x0f800000 ? 0x70000000 : 0x38000000);
    return float_of(sign | (exponent ? other : bits_of(tiny)));
}

static void widen(const void *raw, int64_t type, int64_t n, float *out)
{
    const uint16_t *half = raw;
    if (type == HIRE_FLOAT32)
        memcpy(out, raw, (size_t)n * sizeof *out);
    else if (type == HIRE_BFLOAT16)
        for (int64_t k = 0; k < n; k++) out[k] = float_of((uint32_t)half[k] << 16);
    else
        for (int64_t k = 0; k < n; k++) out[k] = half_to_float(half[k]);
}

static inline void put(uint8_t *out, uint32_t word) { memcpy(out, &word, sizeof word); }

#endif
