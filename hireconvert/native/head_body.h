/* The head's kernels, written once over the vectors of simd_*.h and head_simd.h; each head_*.c
 * compiles them for its level. Sums of integers are exact and everything in floats is done lane by
 * lane without fused products, so all levels give the same bits. */
#include <stddef.h>
#include <string.h>

#if defined(__GNUC__) && HIRE_SPECIALISED
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

enum { AHEAD = 4096 }; /* bytes that codes are asked for before they are used */

INLINE w16 word_at(const int8_t *x)
{
    int32_t word;
    memcpy(&word, x, sizeof word);
    return h_word(word);
}

/* The sums of codes times q, rounded to float32, less those of the middle code. */
INLINE v16 centred(w16 high, w16 low, float middle)
{
    const v16 sum = v_add(v_mul(h_float(high), v_set1(256.0f)), h_float(low));
    return v_sub(sum, v_set1(middle));
}

INLINE v16 loud_sums(const hire_head *head, const hire_head_run *run, const uint8_t *codes)
{
    w16 high = h_zero(), low = h_zero();
    for (int64_t k = 0; k < head->num_loud; k += 4, codes += 64) {
        prefetch(codes + AHEAD);
        const w16 code = w_load4(codes);
        high = h_dot(high, code, word_at(run->loud[0] + k));
        low = h_dot(low, code, word_at(run->loud[1] + k));
    }
    return centred(high, low, run->loud_middle);
}

INLINE v16 quiet_sums(const hire_head *head, const hire_head_run *run, const uint8_t *codes)
{
    const int64_t quiet = head->width - head->num_loud;
    /* Two sums each: one product after the other would wait for the one before. */
    w16 high = h_zero(), low = h_zero(), high_odd = h_zero(), low_odd = h_zero();
    const int8_t *high_x = run->quiet[0], *low_x = run->quiet[1];
    for (int64_t k = 0; k < quiet; k += 8, codes += 64) {
        prefetch(codes + AHEAD);
        const w16 both = w_load4(codes), even = h_low(both), odd = h_high(both);
        high = h_dot_nibbles(high, even, word_at(high_x + k));
        low = h_dot_nibbles(low, even, word_at(low_x + k));
        high_odd = h_dot_nibbles(high_odd, odd, word_at(high_x + k + 4));
        low_odd = h_dot_nibbles(low_odd, odd, word_at(low_x + k + 4));
    }
    return centred(h_add(high, high_odd), h_add(low, low_odd), run->quiet_middle);
}

INLINE v16 biases(const hire_head *head, int64_t tile)
{
    float lane[16] = {0};
    const int64_t left = head->num_rows - tile * 16;
    memcpy(lane, head->bias + tile * 16, (size_t)(left < 16 ? left : 16) * sizeof(float));
    return v_load(lane);
}

/* -inf in the lanes of a tile that are no rows. */
INLINE v16 nothing_behind(const hire_head *head, int64_t tile, v16 value)
{
    float lane[16];
    v_store(lane, value);
    for (int64_t row = head->num_rows; row < tile * 16 + 16; row++)
        lane[row % 16] = -__builtin_inff();
    return v_load(lane);
}

static void estimate(const hire_head *head, hire_head_run *run, int64_t from, int64_t to)
{
    const int64_t loud = head->num_loud, bytes = hire_head_tile_bytes(loud, head->width - loud);
    const v16 loud_unit = v_set1(run->loud_unit), quiet_unit = v_set1(run->quiet_unit);
    const v16 norm = v_set1(run->quiet_norm), infinity = v_set1(__builtin_inff());
    for (int64_t tile = from; tile < to; tile++) {
        const uint8_t *codes = head->tiles + tile * bytes;
        const uint16_t *scales = head->scales + tile * 48;
        const v16 loud_scale = v_load_bf16(scales), quiet_scale = v_load_bf16(scales + 16);
        const v16 loud_part =
            v_mul(loud_sums(head, run, codes), v_mul(loud_scale, loud_unit));
        const v16 quiet_part = v_mul(quiet_sums(head, run, codes + 16 * hire_whole(loud, 4)),
                                     v_mul(quiet_scale, quiet_unit));
        v16 z = v_add(loud_part, quiet_part), slack = v_mul(v_load_bf16(scales + 32), norm);
        slack = v_add(slack, v_mul(loud_scale, v_set1(run->loud_slack)));
        slack = v_add(slack, v_mul(quiet_scale, v_set1(run->quiet_slack)));
        if (head->bias != NULL) z = v_add(z, biases(head, tile));
        slack = v_add(v_mul(slack, v_set1(1.0f + 0x1p-16f)), v_set1(1e-30f));
        v16 upper = v_add(v_add(z, slack), v_mul(v_abs(z), v_set1(0x1p-21f)));
        upper = v_min(upper, infinity); /* NaN becomes inf: such a row is not ruled out */
        if (tile * 16 + 16 > head->num_rows) {
            z = nothing_behind(head, tile, z);
            upper = nothing_behind(head, tile, upper);
        }
        v_store(run->estimate + tile * 16, z);
        v_store(run->upper + tile * 16, upper);
        run->tile_upper[tile] = h_max(upper);
        run->tile_estimate[tile] = h_max(v_max(z, v_set1(-__builtin_inff())));
    }
}

INLINE int64_t nibble_sum(w16 codes, const int8_t *const x_of_2[2], int64_t at, int64_t half)
{
    const w16 even = h_low(codes), odd = h_high(codes);
    int64_t sum_of_2[2];
    for (int part = 0; part < 2; part++) {
        const uint8_t *x = (const uint8_t *)x_of_2[part] + at;
        const w16 first = half == 64 ? w_load4(x) : h_load_half(x);
        const w16 second = half == 64 ? w_load4(x + half) : h_load_half(x + half);
        sum_of_2[part] = h_sum(h_dot_nibbles(h_dot_nibbles(h_zero(), even, first), odd, second));
    }
    return sum_of_2[0] * 256 + sum_of_2[1];
}

static int64_t refine(const hire_head *head, const hire_head_run *run, int64_t row)
{
    const int64_t quiet = head->width - head->num_loud, bytes = hire_head_low_bytes(quiet);
    const uint8_t *low = head->low + row * bytes;
    const int8_t *const x_of_2[2] = {run->quiet[0], run->quiet[1]};
    int64_t sum = 0, at = 0;
    for (; at + 64 <= bytes; at += 64)
        sum += nibble_sum(w_load4(low + at), x_of_2, 2 * at, 64);
    if (at < bytes) sum += nibble_sum(h_load_half(low + at), x_of_2, 2 * at, 32);
    return sum;
}

INLINE v16 weights_at(const hire_head *head, const char *row, int64_t place)
{
    const int64_t type = head->weight_type, size = type == HIRE_FLOAT32 ? 4 : 2;
    const int64_t left = head->width - place;
    unsigned char tail[64] = {0};
    const void *from = row + place * size;
    if (left < 16) from = memcpy(tail, from, (size_t)(left * size));
    if (type == HIRE_FLOAT32) return v_load(from);
    return type == HIRE_BFLOAT16 ? v_load_bf16(from) : v_load_f16(from);
}

static double exact(const hire_head *head, const hire_head_run *run, int64_t row)
{
    const int64_t size = head->weight_type == HIRE_FLOAT32 ? 4 : 2, width = head->width;
    const char *weight = (const char *)head->weight + row * head->weight_stride * size;
    double sum[HIRE_HEAD_MOST_WIDTH / 2];
    int64_t half = 16;
    while (2 * half < width) half *= 2;
    for (int64_t j = 0; j < half; j += 16) {
        if (j >= width) {
            d_store(sum + j, d_times(v_set1(0.0f), v_set1(0.0f)));
            continue;
        }
        d16 product = d_times(weights_at(head, weight, j), v_load(run->x + j));
        if (j + half < width)
            product = d_add(product, d_times(weights_at(head, weight, j + half),
                                             v_load(run->x + j + half)));
        d_store(sum + j, product);
    }
    for (half /= 2; half >= 16; half /= 2)
        for (int64_t j = 0; j < half; j += 16)
            d_store(sum + j, d_add(d_load(sum + j), d_load(sum + j + half)));
    for (half = 8; half > 0; half /= 2)
        for (int64_t j = 0; j < half; j++) sum[j] += sum[j + half];
    return sum[0];
}
