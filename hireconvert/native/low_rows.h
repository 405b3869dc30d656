/* How a refined row lies in memory: one neuron's codes beyond those of its copies.
 *
 * First come the codes of gate and up, in vectors of sixteen words of eight neighbouring inputs: byte
 * i of a word has inputs i (low half) and 4 + i (high half). A lane is a block, so that its words add up
 * in whole numbers before its scale comes in: the lower lanes are blocks of gate and the upper ones
 * the same blocks of up, or all sixteen are those of up alone. Where fewer blocks are left than a part
 * has lanes, each takes as many as there is room for. Then the codes of down: byte 16 q + 4 r + i of a
 * line of 128 outputs has outputs 16 r + 4 q + i (low half) and 64 more (high half), which four rows'
 * bytes side by side bring to lane 4 q + i. Scales follow, float16: those of a vector's lanes, of fewer
 * blocks side by side, then those of down. Rows are whole lines. */
#ifndef HIRE_LOW_ROWS_H
#define HIRE_LOW_ROWS_H

#include <stdint.h>

#define HIRE_LOW_MIDDLE 7.5f /* of the codes */

typedef struct {
    int64_t lanes;       /* of a part */
    int64_t words;       /* of a block */
    int64_t full;        /* groups of as many blocks as lanes, in `words` vectors each */
    int64_t left;        /* blocks of a last group, in `depth` vectors, */
    int64_t each;        /* with so many lanes to a block */
    int64_t depth;
    int64_t vectors;     /* of all groups */
    int64_t down;        /* bytes before the codes of down, */
    int64_t scales;      /* before the scales of gate and up, */
    int64_t down_scales; /* and of down */
    int64_t bytes;
} hire_low_rows;

static inline int64_t hire_ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Whether the blocks of the last group have their scales side by side, at most eight of them. */
static inline int hire_low_short(const hire_low_rows *rows) { return 2 * rows->left <= rows->lanes; }

static inline hire_low_rows hire_low_rows_of(int64_t width, int64_t parts, int64_t block,
                                             int64_t down_block)
{
    const int64_t blocks = hire_ceil(width, block);
    hire_low_rows rows = {.lanes = 16 / parts, .words = hire_ceil(block, 8)};
    rows.full = blocks / rows.lanes;
    rows.left = blocks % rows.lanes;
    if (rows.left > 0) {
        const int64_t room = rows.lanes / rows.left;
        rows.each = room < rows.words ? room : rows.words;
        rows.depth = hire_ceil(rows.words, rows.each);
    }
    rows.vectors = rows.full * rows.words + rows.depth;
    rows.down = 64 * rows.vectors;
    rows.scales = rows.down + 64 * hire_ceil(width, 128);
    rows.down_scales = rows.scales + 32 * rows.full;
    rows.down_scales += hire_low_short(&rows) ? 2 * parts * rows.left : 32;
    rows.bytes = 64 * hire_ceil(rows.down_scales + 2 * hire_ceil(width, down_block), 64);
    return rows;
}

/* Vector and lane of a word of a block. */
static inline int64_t hire_low_vector(const hire_low_rows *rows, int64_t block, int64_t word)
{
    const int64_t group = block / rows->lanes;
    return group * rows->words + (group < rows->full ? word : word / rows->each);
}

static inline int64_t hire_low_lane(const hire_low_rows *rows, int64_t part, int64_t block,
                                    int64_t word)
{
    const int64_t at = block % rows->lanes, last = block / rows->lanes == rows->full;
    return part * rows->lanes + (last ? at * rows->each + word % rows->each : at);
}

/* Bytes before a block's scale. */
static inline int64_t hire_low_scale(const hire_low_rows *rows, int64_t part, int64_t block)
{
    const int64_t group = block / rows->lanes, at = block % rows->lanes;
    const int64_t apart = group == rows->full && hire_low_short(rows) ? rows->left : rows->lanes;
    return rows->scales + 32 * group + 2 * (part * apart + at);
}

#endif
