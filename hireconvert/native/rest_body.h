/* Low-bit output rows of the neurons that are not kept; part of kernels_body.h.
 *
 * Rows of 4 bits run in whole numbers: a row is pieces of 64 bytes for 128 outputs, and four rows
 * at a time are laid side by side, byte by byte, so that one instruction adds four neurons to
 * sixteen outputs. Values times scales become whole numbers that share a scale for up to BATCH
 * neurons and a block of outputs. Rows of other widths run in floats (rest_float_body.h). */

#include "rest_float_body.h"

enum {
    BATCH = 16, /* neurons */
    PIECE = 8,  /* vectors of sixteen outputs in 64 bytes of a row */
    SPAN = 64   /* vectors that a table serves, of as many blocks at most */
};

/* Some rows, and what their codes are multiplied with in a span of outputs. */
typedef struct {
    const uint8_t *row[BATCH], *ahead[BATCH]; /* rows to ask for meanwhile */
    float value[BATCH];
    int64_t quads;                           /* of rows; those that fill the last have value 0 */
    int32_t digits[BATCH / 4][DIGITS][SPAN]; /* by block: a digit of four neurons */
    float scale[SPAN], offset[SPAN];         /* by block */
} rest_batch;

/* A digit of four numbers side by side in each lane, for every digit. */
INLINE void store_digits(const w16 *q, int32_t (*to)[SPAN], int64_t at)
{
    const w16 low = w_set1(0xff), middle = w_set1(0xff00), high = w_set1(0xff0000);
    w_store(to[0] + at, w_or(w_or(w_and(q[0], low), w_left(w_and(q[1], low), 8)),
                             w_or(w_left(w_and(q[2], low), 16), w_left(q[3], 24))));
    w_store(to[1] + at, w_or(w_or(w_right(w_and(q[0], middle), 8), w_and(q[1], middle)),
                             w_or(w_left(w_and(q[2], middle), 8), w_left(w_and(q[3], middle), 16))));
    w_store(to[2] + at, w_or(w_or(w_right(q[0], 16), w_left(w_right(q[1], 16), 8)),
                             w_or(w_and(q[2], high), w_left(w_and(q[3], high), 8))));
}

/* Places [at, at + 16) of the table; `scales` is where in a row the first of them has its scale. */
INLINE void fill_table(const hire_layer *layer, rest_batch *batch, int64_t scales, int64_t at)
{
    const int64_t blocks = (layer->width + layer->rest_block - 1) / layer->rest_block;
    const int64_t offsets = scales + 2 * blocks;
    v16 most = v_set1(HIRE_SMALLEST), offset = v_set1(0.0f), factor[BATCH];
    for (int64_t i = 0; i < 4 * batch->quads; i++) {
        const v16 v = v_set1(batch->value[i]), s = v_load_f16(batch->row[i] + scales);
        const v16 least = layer->rest_symmetric ? v_mul(s, v_set1(-7.5f))
                                                : v_load_f16(batch->row[i] + offsets);
        prefetch(batch->ahead[i] + scales);
        prefetch(batch->ahead[i] + offsets);
        factor[i] = v_mul(v, s);
        most = v_max(v_abs(factor[i]), most);
        offset = v_fma(v, least, offset);
    }
    const v16 inverse = v_div(v_set1(HIRE_LARGEST), most);
    v_store(batch->scale + at, v_mul(most, v_set1(1.0f / HIRE_LARGEST)));
    v_store(batch->offset + at, offset);
    for (int64_t quad = 0; quad < batch->quads; quad++) {
        w16 q[4];
        for (int i = 0; i < 4; i++)
            q[i] = digits_of(w_round(v_mul(factor[4 * quad + i], inverse)));
        store_digits(q, batch->digits[quad], at);
    }
}

/* Bytes [at, at + 64) of the rows, four rows to a lane. */
INLINE void lay_side_by_side(const rest_batch *batch, int64_t at, w16 (*byte)[PIECE / 2])
{
    for (int64_t quad = 0; quad < batch->quads; quad++) {
        const uint8_t *row[4];
HIRE_UNROLL
        for (int i = 0; i < 4; i++) {
            row[i] = batch->row[4 * quad + i] + at;
            prefetch(batch->ahead[4 * quad + i] + at);
        }
        w_interleave(row, byte[quad]);
    }
}

/* Adds the rows' bytes [at, at + 64) to PIECE vectors of outputs, of which `num` are there. The
 * block of vector v lies at place[v] of the table. */
INLINE void add_piece(const rest_batch *batch, int64_t at, const int32_t *place, float *partial,
                      int num)
{
    const w16 mask = w_set1(0x0f0f0f0f);
    w16 byte[BATCH / 4][PIECE / 2];
    lay_side_by_side(batch, at, byte);
HIRE_UNROLL
    for (int v = 0; v < PIECE; v++) {
        if (v == num) break;
        const int shift = v < PIECE / 2 ? 0 : 4;
        const int32_t *digit = batch->digits[0][0] + place[v];
        w16 sum[DIGITS] = {w_set1(0), w_set1(0), w_set1(0)};
        for (int64_t quad = 0; quad < batch->quads; quad++, digit += DIGITS * SPAN) {
            const w16 code = w_and(w_right(byte[quad][v % (PIECE / 2)], shift), mask);
HIRE_UNROLL
            for (int d = 0; d < DIGITS; d++)
                sum[d] = w_dot(sum[d], code, (const int8_t *)(digit + d * SPAN));
        }
        const v16 scale = v_set1(batch->scale[place[v]]);
        const v16 before = v_add(v_load(partial + 16 * v), v_set1(batch->offset[place[v]]));
        v_store(partial + 16 * v, v_fma(from_digits(sum), scale, before));
    }
}

INLINE void add_batch(const hire_layer *layer, const hire_run *run, rest_batch *batch,
                      float *partial)
{
    const int64_t vectors = layer->stride / 16, pieces = (vectors + PIECE - 1) / PIECE;
    for (int64_t begin = 0; begin < vectors; begin += SPAN) {
        const int64_t end = begin + SPAN < vectors ? begin + SPAN : vectors;
        const int32_t first = run->rest_scale_of[begin], last = run->rest_scale_of[end - 1];
        for (int64_t at = 0; first + at <= last; at += 16)
            fill_table(layer, batch, 64 * pieces + 2 * (first + at), at);
        for (int64_t from = begin; from < end; from += PIECE) {
            const int num = (int)(end - from < PIECE ? end - from : PIECE);
            int32_t place[PIECE] = {0};
            for (int v = 0; v < num; v++) place[v] = run->rest_scale_of[from + v] - first;
            add_piece(batch, from / PIECE * 64, place, partial + 16 * from, num);
        }
    }
}

/* Up to `most` neurons from *at on that are in the rest; *at becomes where to go on. */
INLINE int64_t collect(const hire_run *run, int64_t *at, int64_t to, int64_t most, int32_t *out)
{
    int64_t num = 0;
    for (; *at < to && num < most; (*at)++)
        if (run->value[*at] != 0.0f) out[num++] = (int32_t)*at;
    return num;
}

static void rest_in_fours(const hire_layer *layer, hire_run *run, int64_t from, int64_t to,
                          float *partial)
{
    int32_t now[BATCH], next[BATCH];
    rest_batch batch;
    int64_t num = collect(run, &from, to, BATCH, now);
    while (num > 0) {
        const int64_t own = collect(run, &from, to, BATCH, next);
        int64_t beyond = from; /* what comes after the segment is likely this thread's as well */
        int64_t known = own;
        if (own < num)
            known += collect(run, &beyond, layer->num_neurons, num - own, next + own);
        batch.quads = (num + 3) / 4;
        for (int64_t i = 0; i < 4 * batch.quads; i++) {
            batch.row[i] = layer->rest + now[i < num ? i : 0] * layer->rest_bytes;
            batch.ahead[i] = i < known ? layer->rest + next[i] * layer->rest_bytes : batch.row[i];
            batch.value[i] = i < num ? run->value[now[i]] : 0.0f;
        }
        add_batch(layer, run, &batch, partial);
        memcpy(now, next, sizeof now);
        num = own;
    }
}

static void rest(const hire_layer *layer, hire_run *run, int64_t from, int64_t to, float *partial)
{
    switch (layer->rest_bits) {
    case 2: rest_in_floats(layer, run, from, to, partial, 2); break;
    case 3: rest_in_floats(layer, run, from, to, partial, 3); break;
    case 4: rest_in_fours(layer, run, from, to, partial); break;
    default: rest_in_floats(layer, run, from, to, partial, 8); break;
    }
}
