/* A token of a generation in one call: embedding, decoder layers, head, the best row.
 *
 * Letters as in step.h; V rows of the head. Sizes and pointers are checked by
 * hireconvert/_native_token.py. */
#ifndef HIRE_TOKEN_H
#define HIRE_TOKEN_H

#include "head.h"
#include "step.h"

/* What stays from token to token, and moves on with each. */
typedef struct {
    const hire_block *blocks;
    int64_t num_blocks;
    hire_past *pasts;         /* [num_blocks], with room for the position: moved on */
    const int64_t *most_kept; /* [num_blocks]: positions that a layer's cache keeps, 0: all */
    const float **angles;     /* cos and sin of each rope, of the next position: moved on */
    const int64_t *rotary;    /* [num_ropes]: numbers from one position to the next */
    int64_t num_ropes;
    const float *last_norm; /* [D] or NULL */
    double eps;
    void *scratch; /* hire_step_scratch(blocks, num_blocks, most, num_threads) */
    int64_t most;
    const void *embedding; /* rows [., embedding_stride] of `type` */
    int64_t embedding_stride;
    double embedding_scale; /* what a row is multiplied by, rounded to `type` behind it; 1: as is */
    int64_t type;           /* enum hire_type of the embedding and of hidden states */
    float *x;               /* [D]: the hidden state that the head gets, a number of `type` */
    void *narrow;           /* [D] of `type` */
    const hire_head *head;  /* NULL: the hidden state is all */
    const hire_head_call *call; /* of one row, x above */
    void *head_scratch;
    int64_t *head_counts; /* calls, rows, rescored, dense, uncertified, overflown rows, refined */
    int64_t num_threads;
    int64_t level;
    int64_t head_level;
} hire_token;

enum { HIRE_TOKEN_STOPPED = -1, HIRE_TOKEN_HIDDEN = -2 };

/* x [num] from row `id` of the embedding, as PyTorch's module gives it. narrow [num]. */
HIRE_API void hire_embed(const hire_token *token, int64_t num, int64_t id, float *x, void *narrow);
/* Token `id` at the next position: logits in call->y, returned is the first of the largest.
 * HIRE_TOKEN_STOPPED: a layer met NaN or inf, and nothing has moved on.
 * HIRE_TOKEN_HIDDEN: only x was made, as there is no head or as x is not finite. */
HIRE_API int64_t hire_next(const hire_token *token, int64_t id);
/* Where the first of the largest of num >= 1 numbers stands; NaN is larger than any number. */
HIRE_API int64_t hire_largest(const float *x, int64_t num);

#endif
