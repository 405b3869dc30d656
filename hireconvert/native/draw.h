/* A row drawn of the few that sampling leaves, with the numbers of PyTorch's generator on CPUs.
 *
 * What is computed is that of transformers' TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper
 * and of torch.multinomial, up to rounding; hireconvert/runtime/hire_draw.py compares before it
 * relies on them, hireconvert/_native_token.py checks sizes. */
#ifndef HIRE_DRAW_H
#define HIRE_DRAW_H

#include "kernels.h"

enum { HIRE_GENERATOR_WORDS = 624, HIRE_MOST_LEFT = 1024 };

/* How `torch.Generator.get_state` lays out a Mersenne Twister (MT19937); what follows is left
 * alone. */
typedef struct {
    uint64_t seed;
    int32_t left; /* words until new ones are made, plus 1 */
    int32_t seeded;
    uint64_t next; /* the next word */
    uint64_t words[HIRE_GENERATOR_WORDS];
} hire_generator;

enum hire_cut_kind { HIRE_TOP_P, HIRE_MIN_P };
typedef struct {
    int64_t kind;
    double share;
} hire_cut;

/* HIRE_BEYOND: the last row that top-k leaves is not above the level. HIRE_UNSURE: rounding could
 * decide, or scores are not finite. In both cases the generator is as it was. */
enum { HIRE_BEYOND = -1, HIRE_UNSURE = -2 };

typedef struct {
    const float *score; /* [num] */
    int64_t num;
    int64_t top_k;        /* from 1 to min(num, HIRE_MOST_LEFT) */
    const hire_cut *cuts; /* [num_cuts], behind top-k in their order */
    int64_t num_cuts;
    double level; /* HIRE_BEYOND unless what top-k leaves is larger; -INFINITY: no level */
    double near;  /* shares and ratios that differ by less, relatively, are not told apart */
} hire_draw_call;

/* The row drawn; one number of the generator goes to each of all rows. */
HIRE_API int64_t hire_draw(const hire_draw_call *call, void *state);
/* The k-th largest of num >= k >= 1 numbers, k at most 2 HIRE_MOST_LEFT; NaN where one is NaN. */
HIRE_API float hire_kth_largest(const float *score, int64_t num, int64_t k);

#endif
