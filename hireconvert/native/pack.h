/* Layers laid out for the kernels: what the Python side and the C files agree on.
 *
 * Letters as in docs/design.md: D width, F neurons, M predictor outputs (gate rows, then up rows, or
 * up alone), G blocks of a row. Copies and scales come as checkpoints hold them (docs/format.md),
 * weights from wherever they lie, each read once; what is written is described in kernels.h and in
 * docs/design.md (Native kernels).
 */
#ifndef HIRE_PACK_H
#define HIRE_PACK_H

#include "head.h"
#include "step.h"

/* A low-bit copy. */
typedef struct {
    const uint8_t *planes;  /* [bits, rows, ceil(D / 8)] or NULL: none */
    const uint16_t *scale;  /* float16 [rows, G] */
    const int8_t *codes;    /* instead of scale: of normal levels, [rows, G], in units of the row */
    const float *unit;      /* [rows], with codes */
    const uint16_t *offset; /* float16 [rows, G], or NULL where symmetric */
    const uint16_t *low;    /* float16 [rows, G], scales of what it left, or NULL */
    int64_t rows;
    int64_t bits;
    int64_t block; /* <= D */
} hire_copy;

/* A matrix [F, D] where it lies; strides in elements. */
typedef struct {
    const void *weight;
    int64_t row_stride;
    int64_t column_stride;
} hire_dense;

/* One layer; what is NULL of tiles, rest, low and rows is left out. With `factor` but without low and
 * rows the weights are to be what the copies stand for. */
typedef struct {
    int64_t width;       /* D */
    int64_t stride;      /* as in hire_layer, like the fields of these names below */
    int64_t num_neurons; /* F */
    int64_t parts;       /* 2 with a gate, else 1 */
    int64_t weight_type;
    int64_t tile_bytes;
    int64_t rest_bytes;
    int64_t low_bytes;
    hire_copy first;     /* of gate and up, M rows */
    hire_copy down;      /* F rows */
    hire_dense dense[3]; /* (gate,) up, down */
    const float *factor; /* [D] what columns are multiplied by in the copy `first`, or NULL */
    const float *mean;   /* [D]; for `low` */
    uint8_t *tiles;
    uint8_t *rest;
    uint8_t *low;
    void *rows;
    double *low_sum;     /* [M] with `low`: products of the values of gate and up with the mean */
} hire_packing;

/* A matrix whose rows may be codes of 8 or 4 bits (docs/format.md, `attention`). */
typedef struct {
    const void *weight;
    int64_t row_stride; /* elements */
    int64_t outputs;
    int64_t inputs;
    int64_t block; /* <= inputs */
    int64_t bits;
    int64_t weight_type;
    uint8_t *codes; /* tiles, all HIRE_ZERO_CODE before; of 4 bits zeros */
    float *scales;  /* [tiles, G, 16], zeros before; of 4 bits NULL */
} hire_coding;

/* What a level packs; bytes are the same at all of them. */
typedef struct {
    /* Neurons [from, to), `from` at the start of a tile. 0 once a weight does not lie on the grid of
     * `low`, or is not its copy; what was written is then of no use. */
    int (*neurons)(const hire_packing *, char *scratch, int64_t from, int64_t to);
    /* Rows [from, to); 0 once a weight does not lie on its grid. */
    int (*codes)(const hire_coding *, char *scratch, int64_t from, int64_t to);
    /* Tiles [from, to); how many of their rows are not finite. */
    int64_t (*head)(const hire_head *, int64_t from, int64_t to, float *error_ratio);
    /* Squares of rows [from, to) by column, in energy [D]. */
    void (*energy)(const hire_head *, int64_t from, int64_t to, double *energy);
} hire_packers;

extern const hire_packers hire_packers_portable;
#ifdef HIRE_X86
extern const hire_packers hire_packers_avx2;
extern const hire_packers hire_packers_avx512;
#endif

enum { HIRE_PACK_UNIT = 2 * HIRE_LANES }; /* neurons read together: lines of a transposed matrix */

static inline int64_t hire_pack_row(int64_t width) { return width + 64; }

/* Bytes that `hire_pack` needs for each thread. */
HIRE_API int64_t hire_pack_scratch(const hire_packing *packing);
/* Returns whether every weight lies on the grid of `low`, or is its copy (1 where neither is asked). */
HIRE_API int hire_pack(const hire_packing *packing, void *scratch, int32_t num_threads,
                       int32_t level);
/* Returns whether every weight lies on its grid; scratch holds 8 * inputs bytes for each thread. */
HIRE_API int hire_pack_codes(const hire_coding *coding, void *scratch, int32_t num_threads,
                             int32_t level);
/* The squares of the weight by column: rows of energy [HIRE_SEGMENTS, D] to be added in order. */
HIRE_API void hire_head_energy(const hire_head *head, double *energy, int32_t num_threads,
                               int32_t level);
/* Writes tiles, scales, low and low_error; error_ratio [V] gets ||error''_i|| / S_i. Returns how
 * many rows hold NaN or inf. */
HIRE_API int64_t hire_head_pack(const hire_head *head, float *error_ratio, int32_t num_threads,
                                int32_t level);

#endif
