/* Numbers of PyTorch's generator on CPUs without making those that nobody asks for.
 *
 * Where the numbers go in PyTorch and what they become there is written in
 * hireconvert/runtime/hire_draw.py, which compares both before it relies on them. */
#ifndef HIRE_DRAW_H
#define HIRE_DRAW_H

#include "kernels.h"

enum { HIRE_GENERATOR_WORDS = 624 };

/* How `torch.Generator.get_state` lays out a Mersenne Twister (MT19937); what follows is left
 * alone. */
typedef struct {
    uint64_t seed;
    int32_t left; /* words until new ones are made, plus 1 */
    int32_t seeded;
    uint64_t next; /* the next word */
    uint64_t words[HIRE_GENERATOR_WORDS];
} hire_generator;

/* found [num]: the numbers in [0, 1), 53 bits each of two words, at `places` [num], ascending and
 * below `total`, of the `total` that come next; the state moves on by all of them. */
HIRE_API void hire_uniforms(void *state, const int64_t *places, int64_t num, int64_t total,
                            double *found);

#endif
