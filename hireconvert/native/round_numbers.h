/* Numbers of 32 bits rounded to 16. */
#ifndef HIRE_ROUND_NUMBERS_H
#define HIRE_ROUND_NUMBERS_H

#include <stdint.h>
#include <string.h>

/* To the nearest, ties to even, as PyTorch rounds. */
static inline uint16_t to_bfloat16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline uint16_t to_float16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (size >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* rounds to infinity */
    if (size < 0x38800000) { /* subnormal: adding 0.5 rounds at 2^-24 */
        float small;
        uint32_t rounded;
        memcpy(&small, &size, sizeof small);
        small += 0.5f;
        memcpy(&rounded, &small, sizeof rounded);
        return (uint16_t)(sign | (rounded - 0x3f000000));
    }
    const uint32_t odd = size >> 13 & 1;
    return (uint16_t)(sign | (size - 0x38000000 + 0xfff + odd) >> 13);
}

#endif
