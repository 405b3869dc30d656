/* The Mersenne Twister MT19937 (Matsumoto and Nishimura 1998), skipping to the words asked for. */
#include "draw.h"

#include <string.h>

enum { WORDS = HIRE_GENERATOR_WORDS, SHIFT = 397 };

/* Words as they are made: `block` counts how often all were made anew. */
typedef struct {
    uint32_t words[WORDS];
    int64_t block;
} twister;

static inline uint32_t twisted(uint32_t one, uint32_t next, uint32_t far)
{
    const uint32_t joined = (one & 0x80000000u) | (next & 0x7fffffffu);
    return far ^ (joined >> 1) ^ (-(joined & 1u) & 0x9908b0dfu);
}

/* All words anew. The three loops read what lies far enough ahead to be made several at a time. */
static void twist(twister *made)
{
    uint32_t *restrict w = made->words;
    int j = 0;
    for (; j < WORDS - SHIFT; j++) w[j] = twisted(w[j], w[j + 1], w[j + SHIFT]);
    for (; j < WORDS - 1; j++) w[j] = twisted(w[j], w[j + 1], w[j + SHIFT - WORDS]);
    w[j] = twisted(w[j], w[0], w[j + SHIFT - WORDS]);
    made->block++;
}

static uint32_t tempered(uint32_t y)
{
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680u;
    y ^= (y << 15) & 0xefc60000u;
    return y ^ (y >> 18);
}

/* Make words until those of `block`. */
static void reach(twister *made, int64_t block)
{
    while (made->block < block) twist(made);
}

/* The word `index` words behind the start of block 0. */
static uint64_t word(twister *made, int64_t index)
{
    reach(made, index / WORDS);
    return tempered(made->words[index % WORDS]);
}

void hire_uniforms(void *state, const int64_t *places, int64_t num, int64_t total, double *found)
{
    hire_generator now;
    memcpy(&now, state, sizeof now);
    twister made = {.block = 0};
    for (int j = 0; j < WORDS; j++) made.words[j] = (uint32_t)now.words[j];
    /* A seeded generator has words of which none is left: the next one is the first of block 1. */
    const int64_t start = now.left > 1 ? (int64_t)now.next : WORDS;
    for (int64_t i = 0; i < num; i++) {
        const int64_t index = start + 2 * places[i];
        const uint64_t high = word(&made, index), low = word(&made, index + 1);
        found[i] = (double)((high << 32 | low) & 0x1fffffffffffffu) * 0x1p-53;
    }
    /* PyTorch makes new words when one is asked for, so a block may stand used to its end. */
    const int64_t end = start + 2 * total;
    if (total > 0) {
        reach(&made, (end - 1) / WORDS);
        now.next = (uint64_t)((end - 1) % WORDS + 1);
        now.left = WORDS - (int32_t)now.next + 1;
    }
    for (int j = 0; j < WORDS; j++) now.words[j] = made.words[j];
    memcpy(state, &now, sizeof now);
}
