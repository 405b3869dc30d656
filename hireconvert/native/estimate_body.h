/* Estimates of gate and up for all neurons, in tiles of sixteen; part of kernels_body.h. */

enum { PREFETCH = 8192 }; /* bytes ahead in a tile's codes */

/* Codes come in units: one word a lane of 4-bit or 2-bit codes, three words of 3-bit ones (two of
 * their low bits, one of their high bits). A quad is four neighbouring inputs, a byte each. Units of
 * gate and up take turns, so that memory is read in the order in which it lies. */
INLINE int unit_codes(const int bits) { return bits == 4 ? 8 : bits == 2 ? 16 : 32; }
INLINE int unit_bytes(const int bits) { return bits == 3 ? 3 * 64 : 64; }

static const uint8_t NORMAL_LEVELS[16] = HIRE_NORMAL_LEVELS;

INLINE w16 quad_codes(const w16 *word, const int quad, const int bits, const int normal)
{
    if (normal)
        return w_table(NORMAL_LEVELS, w_and(w_right(word[0], 4 * quad), w_set1(0x0f0f0f0f)));
    if (bits == 4) return w_and(w_right(word[0], 4 * quad), w_set1(0x0f0f0f0f));
    if (bits == 2) return w_and(w_right(word[0], 2 * quad), w_set1(0x03030303));
    const w16 high = quad < 2 ? w_left(word[2], 2 - quad) : w_right(word[2], quad - 2);
    const w16 low = w_right(word[quad / 4], 2 * (quad % 4));
    return w_or(w_and(low, w_set1(0x03030303)), w_and(high, w_set1(0x04040404)));
}

/* Adds a unit of `parts` matrices, one behind the other: the sums over a block of code times each
 * digit of u, which is read once for both. */
INLINE void add_unit(const uint8_t *codes, const int8_t *digits, const int bits, const int normal,
                     const int parts, const int lowest, w16 (*sum)[DIGITS])
{
    w16 word[2][3];
HIRE_UNROLL
    for (int part = 0; part < parts; part++)
        for (int i = 0; i < unit_bytes(bits) / 64; i++) {
            const uint8_t *place = codes + part * unit_bytes(bits) + 64 * i;
            word[part][i] = w_load4(place);
            prefetch(place + PREFETCH);
        }
HIRE_UNROLL
    for (int quad = 0; quad < unit_codes(bits) / 4; quad++) {
        w16 code[2];
HIRE_UNROLL
        for (int part = 0; part < parts; part++)
            code[part] = quad_codes(word[part], quad, bits, normal);
HIRE_UNROLL
        for (int d = lowest; d < DIGITS; d++)
HIRE_UNROLL
            for (int part = 0; part < parts; part++)
                sum[part][d] = w_dot(sum[part][d], code[part], digits + 16 * quad + 4 * d);
    }
}

/* What the middle code means where code 0 means the offset. */
INLINE v16 middle_value(v16 scale, const void *offset, const int bits)
{
    return v_fma(scale, v_set1((float)((1 << bits) - 1) / 2), v_load_f16(offset));
}

INLINE void estimate_tile(const hire_layer *layer, const hire_run *run, int64_t tile,
                          const int bits, const int gated, const int lowest, v16 *gate_z,
                          v16 *up_z)
{
    const int64_t padded = (layer->num_neurons + 15) / 16 * 16, width = layer->width;
    const int64_t block = layer->block, digit_bytes = (block + 31) / 32 * 32 * 4;
    const uint8_t *p = layer->tiles + tile * layer->tile_bytes;
    const float *bias = layer->bias + tile * 16;
    const int8_t *digits = run->u_digits;
    v16 gate = v_load(bias), up = gated ? v_load(bias + padded) : gate;
    for (int64_t begin = 0, b = 0; begin < width; begin += block, b++, digits += digit_bytes) {
        const int64_t left = width - begin, n = left < block ? left : block;
        const int64_t units = (n + unit_codes(bits) - 1) / unit_codes(bits);
        w16 sum[2][DIGITS]; /* of gate and up, or of up */
HIRE_UNROLL
        for (int d = lowest; d < DIGITS; d++)
            sum[0][d] = sum[1][d] = w_set1(run->u_first[4 * b + d]);
        for (int64_t i = 0; i < units; i++, p += (1 + gated) * unit_bytes(bits))
            add_unit(p, digits + i * 4 * unit_codes(bits), bits, 0, 1 + gated,
                     lowest, sum);
        const v16 total = v_set1(run->u_sum[b]), scale = v_set1(run->u_scale[b]);
        const uint8_t *offsets = p + 32 * (1 + gated);
        const v16 up_scale = v_load_f16(p + 32 * gated);
        up = v_fma(up_scale, v_mul(from_digits(sum[gated], lowest), scale), up);
        if (!layer->symmetric)
            up = v_fma(middle_value(up_scale, offsets + 32 * gated, bits), total, up);
        if (gated) {
            const v16 gate_scale = v_load_f16(p);
            gate = v_fma(gate_scale, v_mul(from_digits(sum[0], lowest), scale), gate);
            if (!layer->symmetric)
                gate = v_fma(middle_value(gate_scale, offsets, bits), total, gate);
        }
        p = layer->symmetric ? offsets : offsets + 32 * (1 + gated);
    }
    *gate_z = gate;
    *up_z = up;
}

/* Scales of normal levels, in units of their rows. */
INLINE v16 scale_codes(const uint8_t *scales)
{
    return v_sub(v_from_w(w_load1(scales)), v_set1((float)HIRE_SCALE_BIAS));
}

/* The same where levels are normal: a line of scales comes before the codes of its blocks. */
INLINE void normal_tile(const hire_layer *layer, const hire_run *run, int64_t tile,
                        const int gated, const int lowest, v16 *gate_z, v16 *up_z)
{
    const int64_t padded = (layer->num_neurons + 15) / 16 * 16, width = layer->width;
    const int64_t block = layer->block, digit_bytes = (block + 31) / 32 * 32 * 4;
    const int64_t blocks = (width + block - 1) / block, bytes = (1 + gated) * HIRE_LANES;
    const uint8_t *p = layer->tiles + tile * layer->tile_bytes, *scales = p;
    const int8_t *digits = run->u_digits;
    v16 gate = v_set1(0.0f), up = gate;
    for (int64_t b = 0; b < blocks; b++, digits += digit_bytes, scales += bytes) {
        if (b % (HIRE_LINE / bytes) == 0) {
            scales = p;
            prefetch(p + PREFETCH);
            p += HIRE_LINE;
        }
        const int64_t left = width - b * block, n = left < block ? left : block;
        w16 sum[2][DIGITS];
HIRE_UNROLL
        for (int d = lowest; d < DIGITS; d++)
            sum[0][d] = sum[1][d] = w_set1(run->u_first[4 * b + d]);
        for (int64_t i = 0; i < n; i += unit_codes(4), p += (1 + gated) * unit_bytes(4))
            add_unit(p, digits + 4 * i, 4, 1, 1 + gated, lowest, sum);
        const v16 scale = v_set1(run->u_scale[b]);
        const v16 up_scale = scale_codes(scales + HIRE_LANES * gated);
        up = v_fma(up_scale, v_mul(from_digits(sum[gated], lowest), scale), up);
        if (gated)
            gate = v_fma(scale_codes(scales), v_mul(from_digits(sum[0], lowest), scale), gate);
    }
    const float *unit = layer->unit + tile * 16, *bias = layer->bias + tile * 16;
    *gate_z = v_fma(gate, v_load(unit), v_load(bias));
    *up_z = v_fma(up, v_load(unit + gated * padded), v_load(bias + gated * padded));
}

/* Root mean square of the values one typical error above and below. */
INLINE v16 two_points(v16 above, v16 below)
{
    const v16 sum = v_fma(above, above, v_mul(below, below));
    return v_sqrt(v_mul(sum, v_set1(0.5f)));
}

/* Typical error of an estimated value with its copied output vector (docs/format.md, `error`): by
 * the gate's error, times up; by up's error, times the gate; by that of the output vector. */
INLINE v16 expected_error(const hire_layer *layer, int64_t at, const int gated, v16 first, v16 up,
                          v16 active)
{
    const int64_t padded = (layer->num_neurons + 15) / 16 * 16;
    const v16 above = activate(v_add(first, v_load(layer->soft + at)), (int)layer->activation);
    v16 part = v_sub(above, active), value = active;
    if (gated) part = v_mul(part, up);
    v16 sum = v_mul(part, part);
    if (gated) {
        part = v_mul(active, v_load(layer->soft + padded + at));
        sum = v_fma(part, part, sum);
        value = v_mul(value, up);
    }
    part = v_mul(value, v_set1(*layer->rest_error));
    return v_sqrt(v_fma(part, part, sum));
}

INLINE int finish_tile(const hire_layer *layer, hire_run *run, int64_t tile, const int gated,
                       v16 gate, v16 up)
{
    const int64_t padded = (layer->num_neurons + 15) / 16 * 16, at = tile * 16;
    const int act = (int)layer->activation;
    v_store(run->z + at, gated ? gate : up);
    if (gated) v_store(run->z + padded + at, up);
    const v16 first = gated ? gate : up;
    const v16 active = activate(first, act), value = gated ? v_mul(active, up) : active;
    if (layer->num_candidates == 0) { /* nothing is selected */
        v_store(run->value + at, value);
        return v_finite(value);
    }
    v16 size;
    if (layer->soft == NULL) {
        size = v_abs(value);
    } else if (layer->rest_error != NULL) {
        size = expected_error(layer, at, gated, first, up, active);
    } else {
        const v16 s = v_load(layer->soft + at);
        size = two_points(activate(v_add(first, s), act), activate(v_sub(first, s), act));
        if (gated) {
            const v16 t = v_load(layer->soft + padded + at);
            size = v_mul(size, two_points(v_add(up, t), v_sub(up, t)));
        }
    }
    const v16 score = v_mul(size, v_load(layer->norm + at));
    v_store(run->score + at, score);
    if (layer->rest != NULL || layer->relative) v_store(run->value + at, value);
    return v_finite(score);
}

INLINE int estimate_as(const hire_layer *layer, hire_run *run, int64_t from, int64_t to,
                       const int bits, const int normal, const int gated, const int lowest)
{
    int finite = 1;
    for (int64_t tile = from; tile < to; tile++) {
        v16 gate, up;
        if (normal)
            normal_tile(layer, run, tile, gated, lowest, &gate, &up);
        else
            estimate_tile(layer, run, tile, bits, gated, lowest, &gate, &up);
        finite &= finish_tile(layer, run, tile, gated, gate, up);
    }
    return finite;
}

INLINE int estimate_from(const hire_layer *layer, hire_run *run, int64_t from, int64_t to,
                         const int lowest)
{
    if (layer->normal)
        return layer->gated ? estimate_as(layer, run, from, to, 4, 1, 1, lowest)
                            : estimate_as(layer, run, from, to, 4, 1, 0, lowest);
    switch (layer->bits * 2 + (layer->gated != 0)) {
    case 4: return estimate_as(layer, run, from, to, 2, 0, 0, lowest);
    case 5: return estimate_as(layer, run, from, to, 2, 0, 1, lowest);
    case 6: return estimate_as(layer, run, from, to, 3, 0, 0, lowest);
    case 7: return estimate_as(layer, run, from, to, 3, 0, 1, lowest);
    case 8: return estimate_as(layer, run, from, to, 4, 0, 0, lowest);
    default: return estimate_as(layer, run, from, to, 4, 0, 1, lowest);
    }
}

static int estimate(const hire_layer *layer, hire_run *run, int64_t from, int64_t to)
{
    return lowest_digit(layer) ? estimate_from(layer, run, from, to, 1)
                               : estimate_from(layer, run, from, to, 0);
}
