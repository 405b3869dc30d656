/* All decoder layers of a decode step in one call: what the Python side and the C files agree on.
 *
 * Letters: D width, H heads, J key/value heads, E head size, F neurons, Q new positions of one
 * sequence (1 to HIRE_STEP_ROWS, as many as runtime/hire_native.py ever asks for). Every size and pointer is checked by hireconvert/_native_step.py.
 */
#ifndef HIRE_STEP_H
#define HIRE_STEP_H

#include "kernels.h"

#define HIRE_STEP_ROWS 32
#define HIRE_STEP_HEADS 4 /* queries that go over keys and values together */
enum { HIRE_INT8 = 3, HIRE_INT4 }; /* of a hire_matrix: codes with scales, beside enum hire_type */
#define HIRE_ZERO_CODE 128

/* A matrix that is read where it lies: rows [outputs, stride] of one of the types.
 *
 * HIRE_INT8: tiles of sixteen outputs, the last one filled up. A tile holds, block after block,
 * words of four inputs for each of its outputs, a byte each, HIRE_ZERO_CODE more than the code.
 *
 * HIRE_INT4: the same with words of eight inputs, of which the last four are the upper halves of the
 * bytes; codes mean HIRE_NORMAL_LEVELS. Before every two blocks lies a line of their scales, bfloat16
 * [2, 16], so that all of a tile is one stream. */
typedef struct {
    const void *rows;
    const float *scale; /* HIRE_INT8: [tiles, blocks of a row, 16]; else NULL */
    const float *bias;  /* [outputs] or NULL */
    int64_t outputs;
    int64_t inputs;
    int64_t stride; /* elements from row to row, >= inputs */
    int64_t type;
    int64_t block; /* of codes: inputs to a scale, `inputs` or a multiple of 32 */
} hire_matrix;

static inline int64_t hire_matrix_blocks(const hire_matrix *m)
{
    return (m->inputs + m->block - 1) / m->block;
}

/* Words of 64 bytes in a tile, with so many codes to a lane of each. */
static inline int64_t hire_matrix_words(int64_t inputs, int64_t block, int64_t codes)
{
    return inputs / block * ((block + codes - 1) / codes) + (inputs % block + codes - 1) / codes;
}

static inline int64_t hire_int4_tile(int64_t inputs, int64_t block)
{
    const int64_t blocks = (inputs + block - 1) / block;
    return HIRE_LINE * ((blocks + 1) / 2 + hire_matrix_words(inputs, block, 8));
}

/* Rows of x, zeros up to a multiple of 32. For codes they come as whole numbers as well, which share
 * a scale for each block: digits in base 256, four inputs of a digit side by side, and the sum of
 * each digit: codes are stored with their zero added, and so many times that sum is too much. */
typedef struct {
    const float *x;
    int64_t stride; /* floats from row to row, a multiple of 32 */
    int64_t num_rows;
    int8_t *digits; /* [num_rows, 4 stride] */
    float *scale;   /* [num_rows, stride / 32] of the blocks */
    int32_t *sum;   /* [num_rows, stride / 32, 4] */
} hire_inputs;

/* One decoder layer: x += norm(o(attention(norm(x)))); x += norm(ffn(norm(x))). Norms are of the
 * root mean square, their weights what x is multiplied by; the optional ones may be NULL. */
typedef struct {
    int64_t width;      /* D */
    int64_t heads;      /* H, a multiple of J */
    int64_t kv_heads;   /* J */
    int64_t head_dim;   /* E */
    int64_t rotary;     /* even, <= E: the first so many of a head are turned */
    int64_t rope;       /* which of the call's angles */
    int64_t window;     /* positions that a query sees, itself included; 0: all */
    int64_t cache_type; /* enum hire_type of keys and values */
    int64_t activation; /* enum hire_activation, of the dense FFN */
    double eps;
    double scaling; /* of queries times keys */
    double softcap; /* of the same; 0: none */
    hire_matrix q, k, v, o;    /* [H E, D], [J E, D], [J E, D], [D, H E] */
    hire_matrix gate, up, down; /* the dense FFN; gate.rows NULL: not gated */
    const float *attention_norm; /* [D] */
    const float *attended_norm;  /* [D] or NULL: after o */
    const float *ffn_norm;       /* [D] */
    const float *ffn_out_norm;   /* [D] or NULL: after the FFN */
    const float *q_norm;         /* [E] or NULL */
    const float *k_norm;         /* [E] or NULL */
    const hire_layer *ffn;       /* the sparse FFN, or NULL: gate, up and down in full */
    int64_t *counts;             /* as hire_ffn takes them, or NULL */
} hire_block;

/* Keys and values of one layer: [J, room, E] of cache_type, for every sequence in turn, and 64 bytes
 * behind the last that may be read. Positions [first, first + length) are cached, the Q behind them
 * are written. */
typedef struct {
    void *keys;
    void *values;
    int64_t head_stride; /* elements from head to head */
    int64_t first;
    int64_t length;
} hire_past;

typedef struct {
    /* Fills digits, scale and sum for a matrix of codes and those of the same blocks. */
    void (*split)(const hire_matrix *, const hire_inputs *);
    /* y[i] = rows [from, to) of the matrix times row i. */
    void (*matrix)(const hire_matrix *, const hire_inputs *, int64_t from, int64_t to, float *y,
                   int64_t y_stride);
    /* out may be x. */
    void (*norm)(const float *x, const float *weight, double eps, int64_t num, float *out);
    /* A head's first `rotary` numbers; cos and sin [rotary]. */
    void (*rotate)(float *x, const float *cos, const float *sin, int64_t rotary);
    void (*store)(void *to, int64_t place, const float *from, int64_t num, int type);
    /* out [heads, E] of up to HIRE_STEP_HEADS queries [heads, E] that share a head's keys and
     * values, over positions [from, to). Rows of q and out are `stride` apart and padded to whole
     * vectors, zeros in q; those of score have room for to - from and 16. */
    void (*attend)(const hire_block *, int64_t heads, const float *q, int64_t stride,
                   const char *keys, const char *values, int64_t from, int64_t to, float *score,
                   int64_t score_stride, float *out);
    void (*sum_pieces)(const hire_layer *, const hire_run *, int64_t from, int64_t to,
                       float *out);
    /* gate[i] = act(gate[i]) * up[i], or up[i] = act(up[i]) without gate. */
    void (*activate)(int activation, float *gate, float *up, int64_t num);
    int (*finite)(const float *x, int64_t num);
} hire_step_kernels;

extern const hire_step_kernels hire_step_portable;
#ifdef HIRE_X86
extern const hire_step_kernels hire_step_avx2;
extern const hire_step_kernels hire_step_avx512;
#elif defined(HIRE_ARM)
extern const hire_step_kernels hire_step_neon;
extern const hire_step_kernels hire_step_dotprod;
#endif

/* For token.c. */
const hire_step_kernels *hire_step_kernels_of(int level);

/* Bytes of scratch memory for up to HIRE_STEP_ROWS rows over `most` positions. */
HIRE_API int64_t hire_step_scratch(const hire_block *blocks, int64_t num_blocks, int64_t most,
                                   int32_t num_threads);
/* x [num_rows, D] in place, through all blocks and, unless NULL, the last norm [D]. angles: for
 * each rope cos and sin, [Q, rotary].
 * Returns -1, or the index of the first block that met NaN or inf: then x is undefined and
 * no count was added. Bits depend on neither threads nor the number of rows. */
HIRE_API int64_t hire_step(const hire_block *blocks, int64_t num_blocks, const hire_past *pasts,
                           const float *const *angles, float *x, int64_t num_rows, void *scratch,
                           int64_t most, const float *last_norm, double eps, int32_t num_threads,
                           int32_t level);
/* The same where every row is the next position of a sequence of its own. Row i does not see the
 * first unseen[i] of the `seen` positions that came before, some of which a layer may have dropped. */
HIRE_API int64_t hire_step_sequences(const hire_block *blocks, int64_t num_blocks,
                                     const hire_past *pasts, const float *const *angles, float *x,
                                     int64_t num_rows, void *scratch, int64_t most,
                                     const float *last_norm, double eps, int32_t num_threads,
                                     int32_t level, const int64_t *unseen, int64_t seen);
/* y [num_rows, outputs] from x [num_rows, inputs]; up to HIRE_STEP_ROWS rows. Scratch holds
 * hire_matvec_scratch bytes. */
HIRE_API int64_t hire_matvec_scratch(const hire_matrix *matrix, int64_t num_rows);
HIRE_API void hire_matvec(const hire_matrix *matrix, const float *x, float *y, int64_t num_rows,
                          void *scratch, int32_t num_threads, int32_t level);

#endif
