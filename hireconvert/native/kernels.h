/* Feed-forward layers decoded from few bytes: what the Python side and the C files agree on.
 *
 * Letters as in docs/design.md: D width, F neurons, C candidates, K kept, G blocks of a row. A tile
 * is HIRE_LANES neurons whose codes lie side by side, one neuron to a lane.
 */
#ifndef HIRE_KERNELS_H
#define HIRE_KERNELS_H

#include "low_rows.h"

#include <stddef.h>
#include <stdint.h>

#define HIRE_ABI 5
#define HIRE_LANES 16
/* Rows of weights are cut into this many pieces, a power of two, whatever the number of threads, and
 * sums of pieces are added by pairs, pairs of pairs and so on: the output's bits do not depend on how
 * many threads there are, and a thread adds most of its own before another reads them. */
#define HIRE_SEGMENTS 32
/* Rows of x that go over the weights together: each weight is read from memory once for all of
 * them. More would only be more scratch memory; where they come in, weights lie in the cache. */
#define HIRE_ROWS 8

enum hire_type { HIRE_FLOAT32 = 0, HIRE_BFLOAT16 = 1, HIRE_FLOAT16 = 2 };
enum hire_activation {
    HIRE_SILU = 0,
    HIRE_GELU_TANH = 1,
    HIRE_GELU_ERF = 2,
    HIRE_RELU = 3,
    HIRE_RELU2 = 4,
    HIRE_GELU_QUICK = 5
};
/* What 4-bit codes mean where levels are normal (docs/format.md), plus HIRE_LEVEL_BIAS: bytes as the
 * integer products take them. Their scales are bytes plus HIRE_SCALE_BIAS, in units of a row. */
#define HIRE_NORMAL_LEVELS {0, 12, 23, 32, 39, 46, 52, 58, 64, 69, 75, 81, 88, 96, 105, 118}
enum { HIRE_LEVEL_BIAS = 63, HIRE_SCALE_BIAS = 128, HIRE_LINE = 64 };

static inline int64_t hire_whole_lines(int64_t bytes)
{
    return (bytes + HIRE_LINE - 1) / HIRE_LINE * HIRE_LINE;
}

/* Every kind of machine counts its own levels (LEVELS of hireconvert/_native.py). */
enum hire_level {
    HIRE_PORTABLE = 0,
    HIRE_AVX2 = 1,
    HIRE_AVX512 = 2,
    HIRE_NEON = 1,
    HIRE_DOTPROD = 2,
    HIRE_HIGHEST = 2
};

/* One layer, read-only while it runs. Parts are gate and up, or up alone. Fp is F rounded up to
 * whole tiles. Every pointer is checked for size by the Python side (hireconvert/_native.py). */
typedef struct {
    int64_t width;          /* D */
    int64_t stride;         /* elements of one row with its padding, a multiple of 32, >= D */
    int64_t num_neurons;    /* F */
    int64_t num_candidates; /* C: neurons computed exactly; 0: none, as all count by their copies */
    int64_t num_kept;       /* K <= C: fewer, and the exact scores of the candidates choose them */
    int64_t gated;          /* 2 parts, else 1 */
    int64_t activation;     /* enum hire_activation */
    int64_t weight_type;    /* enum hire_type, of rows, x and y */
    int64_t bits;           /* of the predictor: 2, 3, 4 */
    int64_t block;          /* inputs to a scale, <= D */
    int64_t symmetric;
    int64_t normal;         /* levels as HIRE_NORMAL_LEVELS, not even ones; then symmetric */
    int64_t tile_bytes;
    int64_t rest_bits;      /* of the low-bit output vectors: 2, 3, 4, 8; 0: the rest counts 0 */
    int64_t rest_block;     /* outputs to a scale: D, or a multiple of HIRE_LANES */
    int64_t rest_symmetric;
    int64_t rest_normal;
    int64_t rest_bytes;     /* of one neuron's low-bit row; of 4 bits: of a tile of them */
    int64_t low_bytes;      /* of one neuron's refinement; 0: rows hold the weights */
    int64_t relative;       /* the level is a share of the length of the row's estimated outputs */
    const uint8_t *tiles;   /* [Fp / 16, tile_bytes]: for each block codes, scales, offsets, or,
                               with normal levels, a line of scales before the codes of its
                               blocks; NULL where C = F, with mean, inverse_scale and bias */
    const float *unit;          /* [parts, Fp] of the scales of normal levels, else NULL */
    const float *mean;          /* [D] */
    const float *inverse_scale; /* [D] */
    const float *bias;          /* [parts, Fp] of the estimates */
    const float *soft;          /* [parts, Fp] or NULL: typical errors of the estimates */
    const float *rest_error;    /* [1] or NULL: that of a copied output vector, as a share of its
                                   length; with it scores are expected errors, else sizes */
    const float *norm;          /* [Fp]; ones where scores are plain */
    const void *rows;           /* [F, parts + 1, stride]: gate, up, down of a neuron in turn;
                                   NULL where refined, or C = 0 */
    const float *row_bias;      /* [parts, F] or NULL */
    const float *down_bias;     /* [D] or NULL */
    const uint8_t *rest;        /* [F, rest_bytes] (4 bits: [Fp / 16, rest_bytes]) or NULL */
    const float *rest_unit;     /* likewise [Fp] of the rest's */
    const float *low_bias;      /* [parts, Fp] or NULL: added to estimates and refinements */
    const uint8_t *low;         /* [F, low_bytes] or NULL: what 4-bit tiles and rest left */
    const float *level;         /* [1] or NULL: every neuron whose score reaches it is computed and
                                   kept, however many these are; then C = K = F */
} hire_layer;

/* Where one row's intermediate results lie; all of it is the caller's scratch memory. */
typedef struct {
    float *x;        /* [stride], zeros behind D */
    float *u;        /* [Bp]: a block of the predictor's input; Bp is a block in whole 32s */
    int8_t *u_digits; /* [G, Bp / 4, 4, 4]: digits (the fourth is 0) of four inputs at a time */
    int32_t *u_first; /* [G, 4]: sums over a block's codes begin with these digits */
    float *u_scale;  /* [G]: of a block's digits, in units of the lowest that counts */
    float *u_sum;    /* [G]: sums of u over blocks */
    hire_low_rows low; /* how refined rows lie; for each vector of theirs */
    int8_t *x_digits;  /* [vectors, 2, digits, 16, 4]: digits of four inputs of each word, */
    float *x_scale;    /* [groups, 16]: the digits' scale, */
    float *x_middle;   /* [groups, 16]: what the codes' middle takes off, */
    int32_t *x_place;  /* [16]: and of the last group, which scale a lane has */
    float *z;        /* [parts, Fp] estimates */
    float *score;    /* [Fp] estimated */
    float *value;    /* [Fp] hidden values of the rest, or that a level is relative to: estimates,
                        exact where computed; of the kept 0, unless the rest adds the copies of
                        refined rows for them */
    float *h;        /* [F] exact hidden values of the candidates */
    float *exact;    /* [F] exact scores of the candidates */
    int32_t *index;  /* [F + 1] candidates, ascending */
    int32_t *chosen; /* [F + 1] positions of the kept among the candidates, ascending */
    int32_t *spare;  /* [F] */
    int32_t *rest_scale_of; /* [stride / 16]: block of each vector of outputs */
    float *partial;  /* [HIRE_SEGMENTS, partial_stride]: sums of outputs, then a row's scales */
    int64_t partial_stride;
    int32_t *together; /* [HIRE_SEGMENTS]: how many pieces the sum at the first of them is of */
    int32_t *taken;    /* [HIRE_SEGMENTS]: with a level, candidates in each piece */
    float *square;     /* [HIRE_SEGMENTS]: with a relative one, of each piece's estimated outputs */
    int64_t last;      /* behind the last candidate that may be asked for ahead */
    int *bad;        /* [2], zeros before: estimates, exact values met NaN or inf */
} hire_run;

/* Whether a neuron is to be chosen, or copies are to be added, so that estimates are needed. */
static inline int hire_estimates(const hire_layer *layer)
{
    return layer->num_candidates < layer->num_neurons || layer->low != NULL || layer->level != NULL;
}

/* Adds to counters, as hire_ffn takes them, what so many rows kept and computed: with a level that is
 * `taken`. */
static inline void hire_count(const hire_layer *layer, int64_t num_rows, int64_t taken,
                              int64_t *counts)
{
    const int by_copies = layer->num_candidates == 0; /* all of them */
    const int64_t kept = num_rows * (by_copies ? layer->num_neurons : layer->num_kept);
    const int64_t candidates = num_rows * (by_copies ? layer->num_neurons : layer->num_candidates);
    counts[2] += layer->level != NULL ? taken : kept;
    counts[3] += layer->level != NULL ? taken : candidates;
}

typedef struct {
    void (*start)(const hire_layer *, const void *x, int type, hire_run *);
    /* Tiles [from, to): z, score, value; 1 unless a score (a value where C = 0) is NaN or inf. */
    int (*estimate)(const hire_layer *, hire_run *, int64_t from, int64_t to);
    /* Candidates [from, to): h, exact; with `partial` also their output. 1 unless NaN or inf. */
    int (*exact)(const hire_layer *, hire_run *, int64_t from, int64_t to, float *partial);
    void (*kept)(const hire_layer *, hire_run *, int64_t from, int64_t to, float *partial);
    /* Low-bit rows of the neurons [from, to), piece s, by their values in each of several rows; of
     * 4 bits `from` starts a tile. */
    void (*rest)(const hire_layer *, hire_run *const *, int64_t num_rows, int64_t s, int64_t from,
                 int64_t to);
    void (*add)(float *to, const float *from, int64_t num);
    /* As hire_top_k. */
    void (*top_k)(const float *score, int64_t n, int64_t k, int32_t *out, int32_t *spare);
    /* The sum of (value * norm)^2 over neurons [from, to), whole vectors. */
    float (*square)(const float *value, const float *norm, int64_t from, int64_t to);
    /* Those of scores [from, to) that are at least `level`, ascending; returns how many. */
    int64_t (*reaching)(const float *score, int64_t from, int64_t to, float level, int32_t *out);
    void (*finish)(const hire_layer *, hire_run *, void *y, int type);
} hire_kernels;

extern const hire_kernels hire_kernels_portable;
#if defined(__x86_64__)
#define HIRE_X86 1
extern const hire_kernels hire_kernels_avx2;
extern const hire_kernels hire_kernels_avx512;
#elif defined(__aarch64__)
#define HIRE_ARM 1
extern const hire_kernels hire_kernels_neon;
extern const hire_kernels hire_kernels_dotprod;
#endif

/* For step.c: the level's kernels, scratch memory cut up (`bad` is the caller's), and the work
 * between start and finish of up to HIRE_ROWS rows, called by every thread of a team. What `bad`
 * points at is shared, and stays as it is once a thread returns. */
const hire_kernels *hire_kernels_of(int level);
int64_t hire_cut_scratch(const hire_layer *layer, char *scratch, hire_run *run);
void hire_rows_of_team(const hire_layer *layer, const hire_kernels *kernels, hire_run *runs,
                       int64_t num_rows);
/* How many candidates a row had, of a layer with a level. */
int64_t hire_taken(const hire_run *run);

#if defined(_WIN32)
#define HIRE_API __declspec(dllexport)
#else
#define HIRE_API __attribute__((visibility("default")))
#endif

HIRE_API int hire_abi(void);
/* Whose threads the library runs on. */
enum hire_threads { HIRE_OPENMP = 0, HIRE_OWN_THREADS = 1, HIRE_ONE_THREAD = 2 };
HIRE_API int hire_threads(void);
/* The highest level that this machine runs and that is at most `wanted`. */
HIRE_API int hire_level_at_most(int wanted);
/* Bytes of a refined row. */
HIRE_API int64_t hire_low_bytes(int64_t width, int64_t parts, int64_t block, int64_t down_block);
/* Bytes of scratch memory that `hire_ffn` needs for the layer and so many rows. */
HIRE_API int64_t hire_scratch_bytes(const hire_layer *layer, int64_t num_rows);
/* Where in the scratch memory z, score, index and chosen of a call's first row lie, for tests. */
HIRE_API void hire_scratch_places(const hire_layer *layer, int64_t *place_of_4);
/* y [num_rows, D] from x [num_rows, D]; finite[i] is 0 where a row met NaN or inf and y[i] was
 * not written. `counts` (or NULL) gets calls, rows, kept, candidates, dense rows added. Returns
 * how many rows were not finite. */
HIRE_API int64_t hire_ffn(const hire_layer *layer, const void *x, void *y, uint8_t *finite,
                          int64_t *counts, void *scratch, int64_t num_rows, int32_t num_threads,
                          int32_t level);

/* The k largest of n scores (not negative, no NaN) as ascending indices in out [k]; ties go to the
 * lowest index. spare [n]. */
HIRE_API void hire_top_k(const float *score, int64_t n, int64_t k, int32_t *out, int32_t *spare);

#endif
