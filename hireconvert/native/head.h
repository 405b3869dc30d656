/* The LM head decoded from few bytes: what the Python side and the C files agree on.
 *
 * Letters: D width, V rows (the vocabulary), A loud and B = D - A quiet inputs, T tiles of
 * HIRE_LANES rows. Inputs are reordered: the A columns of the weight with the most energy are kept
 * in 8 bits a weight, the other B in two nibbles. The high nibble of every row is read for every
 * token; the low one, and the stored row itself, only where the row can still be among the best.
 *
 *     W_ij d_j = (h_ij - 7.5) s_i + error                          quiet, first reading, 4 bits
 *              = (16 h_ij + l_ij - 127.5) s_i / 16 + error'        quiet, second reading, 8 bits
 *     W_ij     = (c_ij - 127.5) S_i + error''                      loud, 8 bits
 *
 * With u_j = x_j / d_j, x is rounded to 16 bits apart for quiet and loud inputs, u = q r + delta_u
 * and v = Q R + delta_v, and integer sums of codes times q are exact. So
 *
 *     |W_i x - estimate_i| <= e_i ||u|| + S_i (k ||v|| + 128 sqrt(A) ||delta_v||)
 *                             + s_i 8 sqrt(B) ||delta_u|| + rounding
 *
 * with e_i >= ||error_i|| (of the reading in question), k >= max_i ||error''_i|| / S_i, and the
 * rounding of the float32 estimate at most 10 2^-24 (s_i r 15 sum(|q| + 128) + S_i R 255
 * sum(|Q| + 128)) + 4 2^-24 |estimate_i|. All of these are computed in float64; that W_ij d_j and
 * x_j / d_j are rounded there is at most 2^-50 ||W_i d|| ||u||, which e_i holds.
 *
 * Stored rows are multiplied in float64, which is exact, and summed in float64 by halves: the
 * products, zeros behind D up to a power of two, then p[j] + p[j + n / 2] until one is left. That
 * order is the reference's (runtime/hire_head.py), so both paths give the same bits.
 */
#ifndef HIRE_HEAD_H
#define HIRE_HEAD_H

#include "kernels.h"

enum { HIRE_HEAD_MOST_WIDTH = 16384, HIRE_HEAD_VNNI = HIRE_HIGHEST + 1 };

/* One head; hire_head_pack (pack.h) writes all but `weight`, `bias`, `order` and `divisor`. */
typedef struct {
    int64_t width;         /* D, at most HIRE_HEAD_MOST_WIDTH */
    int64_t num_rows;      /* V */
    int64_t num_loud;      /* A, a multiple of 4 or D */
    int64_t weight_type;   /* enum hire_type */
    int64_t weight_stride; /* elements from one row of the weight to the next */
    const void *weight;    /* [V, D], the live one */
    const float *bias;     /* [V] or NULL */
    const int32_t *order;  /* [D] column of each reordered input */
    const double *divisor; /* [D] d_j of each reordered input, positive; 1 where loud */
    uint8_t *tiles;        /* [T, hire_head_tile_bytes] */
    uint16_t *scales;      /* bfloat16 [T, 3, 16]: S, s, e of the first reading */
    uint8_t *low;          /* [V, hire_head_low_bytes], or NULL: no second reading */
    uint16_t *low_error;   /* bfloat16 [V]: e of the second reading, or NULL */
    double loud_ratio;     /* k */
} hire_head;

/* What is asked of a call. */
typedef struct {
    const float *x;     /* [N, D] */
    float *y;           /* [N, V] logits before soft-capping */
    uint8_t *rescored;  /* [N, V] 1 where y is the reference's, or NULL */
    uint8_t *finite;    /* [N] 0 where x held NaN, inf or numbers near the largest: y not written */
    int64_t *counts;    /* 3 numbers added to: rows of the weight read, rows of `low`, bad x */
    int64_t num_rows;   /* N */
    int64_t certify;    /* 1: the best `count` as certified; 0: `count` exact, others below them */
    int64_t count;      /* from 1 to V */
    double cap;         /* of soft-capping, 0: none */
} hire_head_call;

/* Where one row's intermediate results lie. */
typedef struct {
    float *x;               /* [D + 15]: as given, zeros behind D */
    double *u;              /* [D]: reordered, divided */
    int8_t *loud[2];        /* [A rounded up to 4]: q is 256 [0] + [1] */
    int8_t *quiet[2];       /* [B rounded up to 128] */
    float *estimate;        /* [16 T], -inf behind V */
    float *upper;           /* [16 T] */
    float *tile_estimate;   /* [T]: the largest of each tile */
    float *tile_upper;      /* [T] */
    float *best_value;      /* [spares] */
    int32_t *best_row;      /* [spares] */
    float loud_unit, quiet_unit;     /* R, r */
    float loud_middle, quiet_middle; /* 127.5 sum of Q, 7.5 sum of q */
    float quiet_norm;                /* >= ||u|| */
    float loud_slack, quiet_slack;   /* what S_i and s_i are multiplied by in the bound */
} hire_head_run;

typedef struct {
    /* Tiles [from, to): estimate, upper and their largest. */
    void (*estimate)(const hire_head *, hire_head_run *, int64_t from, int64_t to);
    /* The sum over quiet inputs of l_ij q_j. */
    int64_t (*refine)(const hire_head *, const hire_head_run *, int64_t row);
    /* The product of a stored row in float64, by halves. */
    double (*exact)(const hire_head *, const hire_head_run *, int64_t row);
} hire_head_kernels;

extern const hire_head_kernels hire_head_portable;
#ifdef HIRE_X86
extern const hire_head_kernels hire_head_avx2;
extern const hire_head_kernels hire_head_avx512;
extern const hire_head_kernels hire_head_vnni;
#elif defined(HIRE_ARM)
extern const hire_head_kernels hire_head_neon;
extern const hire_head_kernels hire_head_dotprod;
#endif

static inline int64_t hire_whole(int64_t count, int64_t unit)
{
    return (count + unit - 1) / unit * unit;
}

/* Loud codes, then the high nibbles of quiet ones: 64 bytes hold 4 or 8 inputs of 16 rows. */
static inline int64_t hire_head_tile_bytes(int64_t loud, int64_t quiet)
{
    return 16 * (hire_whole(loud, 4) + hire_whole(quiet, 8) / 2);
}

/* Low nibbles of a row: 128 inputs in 64 bytes, the first 64 in the low halves; a rest of at most
 * 64 inputs in 32 bytes, the first 32 in the low halves. */
static inline int64_t hire_head_low_bytes(int64_t quiet)
{
    const int64_t rest = quiet % 128;
    return quiet / 128 * 64 + (rest > 64 ? 64 : rest > 0 ? 32 : 0);
}

/* The highest of HIRE_PORTABLE ... HIRE_HEAD_VNNI that this machine runs and that is at most
 * `wanted`. */
HIRE_API int hire_head_level(int wanted);
HIRE_API int64_t hire_head_scratch_bytes(const hire_head *head, int64_t count, int64_t num_rows);
/* Returns how many rows of x were not finite. */
HIRE_API int64_t hire_head_logits(const hire_head *head, const hire_head_call *call, void *scratch,
                                  int32_t num_threads, int32_t level);

#endif
