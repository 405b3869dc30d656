/* Output rows of 2, 3 and 8 bits, in floats; part of kernels_body.h. */

/* Codes of one lane lie in 32-bit words, as many whole codes as fit; what is left over takes the
 * narrowest of 8, 16 and 32 bits (pack_lanes in hireconvert/_packing.py writes them). */
INLINE int64_t lane_bytes(int64_t codes, const int bits)
{
    if (codes == 0) return 0;
    return codes <= 8 / bits ? 1 : codes <= 16 / bits ? 2 : 4;
}

INLINE int64_t code_bytes(int64_t codes, const int bits)
{
    const int per_word = 32 / bits;
    return HIRE_LANES * (codes / per_word * 4 + lane_bytes(codes % per_word, bits));
}

INLINE w16 load_lanes(const uint8_t *p, int64_t bytes)
{
    return bytes == 4 ? w_load4(p) : bytes == 2 ? w_load2(p) : w_load1(p);
}

/* Value times scale for each block of `num` rows; what the offsets add is summed by block. */
INLINE void rest_scales(const hire_layer *layer, const uint8_t *const *row, const float *value,
                        const int num, const int bits, const int symmetric, float *scale,
                        float *offset)
{
    const int64_t blocks = (layer->width + layer->rest_block - 1) / layer->rest_block;
    const int64_t padded = (blocks + 15) / 16 * 16, codes = code_bytes(layer->stride / 16, bits);
    for (int64_t b = 0; b < padded; b += 16) {
        v16 sum = symmetric ? v_set1(0.0f) : v_load(offset + b);
        for (int i = 0; i < num; i++) {
            const uint8_t *own = row[i] + codes + 2 * b;
            const v16 v = v_set1(value[i]), s = v_load_f16(own);
            v_store(scale + i * padded + b, v_mul(v, s));
            if (!symmetric)
                sum = v_fma(v, middle_value(s, own + 2 * blocks, bits), sum);
        }
        if (!symmetric) v_store(offset + b, sum);
    }
}

INLINE void rest_vector(float *sum, const w16 *word, const float *scale, int64_t padded,
                        const int num, const int shift, const int bits)
{
    v16 a = v_load(sum);
HIRE_UNROLL
    for (int i = 0; i < num; i++)
        a = v_fma(v_code(word[i], shift, bits), v_set1(scale[i * padded]), a);
    v_store(sum, a);
}

INLINE void rest_rows(const hire_layer *layer, const hire_run *run, const uint8_t *const *row,
                      const float *value, const int num, const int bits, const int symmetric,
                      float *partial)
{
    const int64_t blocks = (layer->width + layer->rest_block - 1) / layer->rest_block;
    const int64_t padded = (blocks + 15) / 16 * 16;
    float *offset = partial + layer->stride, *scale = offset + padded;
    rest_scales(layer, row, value, num, bits, symmetric, scale, offset);
    const int per_word = 32 / bits;
    const int32_t *block = run->rest_scale_of;
    int64_t left = layer->stride / 16, at = 0;
    for (; left >= per_word; left -= per_word, at += 4 * HIRE_LANES) {
        w16 word[4];
HIRE_UNROLL
        for (int i = 0; i < num; i++) word[i] = w_load4(row[i] + at);
HIRE_UNROLL
        for (int k = 0; k < per_word; k++) {
            rest_vector(partial, word, scale + *block++, padded, num, k * bits, bits);
            partial += 16;
        }
    }
    if (left > 0) {
        w16 word[4];
        const int64_t bytes = lane_bytes(left, bits);
HIRE_UNROLL
        for (int i = 0; i < num; i++) word[i] = load_lanes(row[i] + at, bytes);
        for (int k = 0; k < left; k++, partial += 16)
            rest_vector(partial, word, scale + *block++, padded, num, k * bits, bits);
    }
}

INLINE void rest_in_floats(const hire_layer *layer, hire_run *run, int64_t from, int64_t to,
                    float *partial, const int bits)
{
    const uint8_t *row[4];
    float value[4];
    int held = 0;
    const int64_t blocks = (layer->width + layer->rest_block - 1) / layer->rest_block;
    float *offset = partial + layer->stride;
    memset(offset, 0, (size_t)((blocks + 15) / 16 * 16) * sizeof *offset);
    for (int64_t i = from; i < to; i++) {
        if (run->value[i] == 0.0f) continue;
        row[held] = layer->rest + i * layer->rest_bytes;
        value[held++] = run->value[i];
        for (int64_t at = 0; at < layer->rest_bytes; at += 64) prefetch(row[held - 1] + at);
        if (held == 4) {
            rest_rows(layer, run, row, value, 4, bits, (int)layer->rest_symmetric, partial);
            held = 0;
        }
    }
    for (int i = 0; i < held; i++)
        rest_rows(layer, run, row + i, value + i, 1, bits, (int)layer->rest_symmetric, partial);
    for (int64_t j = 0; j < layer->stride; j += 16)
        v_store(partial + j,
                v_add(v_load(partial + j), v_set1(offset[run->rest_scale_of[j / 16]])));
}
