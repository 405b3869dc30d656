/* Sampling among few rows, with a Mersenne Twister MT19937 (Matsumoto and Nishimura 1998) that
 * skips to the words asked for. */
#include "draw.h"

#include <math.h>
#include <stdlib.h>
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

/* found [num]: the numbers in [0, 1), 53 bits each of two words, at `places` [num], ascending and
 * below `total`, of the `total` that come next. Returns the generator behind all of them. */
static hire_generator uniforms(const void *state, const int64_t *places, int64_t num,
                               int64_t total, double *found)
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
    return now;
}

/* ---------------------------------------------------------------------- the largest scores */

enum { TOGETHER = 16, MOST_SOUGHT = 2 * HIRE_MOST_LEFT };

/* Whether one of the next TOGETHER numbers is larger than `level`, or NaN. */
static inline int any_above(const float *x, float level)
{
    int above = 0;
    for (int l = 0; l < TOGETHER; l++) above |= !(x[l] <= level);
    return above;
}

/* A heap whose least number is in front: put `value` in its place. */
static void replace_least(float *heap, int64_t size, float value)
{
    int64_t at = 0;
    for (;;) {
        int64_t child = 2 * at + 1;
        if (child >= size) break;
        if (child + 1 < size && heap[child + 1] < heap[child]) child++;
        if (value <= heap[child]) break;
        heap[at] = heap[child];
        at = child;
    }
    heap[at] = value;
}

float hire_kth_largest(const float *score, int64_t num, int64_t k)
{
    float heap[MOST_SOUGHT];
    for (int64_t i = 0; i < k; i++) heap[i] = -INFINITY;
    for (int64_t j = 0; j < num; j += TOGETHER) {
        const int64_t end = j + TOGETHER < num ? j + TOGETHER : num;
        if (end - j == TOGETHER && !any_above(score + j, heap[0])) continue;
        for (int64_t i = j; i < end; i++) {
            if (score[i] != score[i]) return NAN;
            if (score[i] > heap[0]) replace_least(heap, k, score[i]);
        }
    }
    return heap[0];
}

/* ---------------------------------------------------------------------- a row drawn */

typedef struct {
    double score;
    int64_t row;
} candidate;

static int by_score(const void *one, const void *other)
{
    const candidate *a = one, *b = other;
    return (a->score > b->score) - (a->score < b->score);
}

static int by_row(const void *one, const void *other)
{
    const candidate *a = one, *b = other;
    return (a->row > b->row) - (a->row < b->row);
}

/* All rows that reach `least`, in their order: how many, HIRE_UNSURE where they are too many. */
static int64_t reaching(const hire_draw_call *call, float least, candidate *found)
{
    const float below = nextafterf(least, -INFINITY);
    int64_t count = 0;
    for (int64_t j = 0; j < call->num; j += TOGETHER) {
        const int64_t end = j + TOGETHER < call->num ? j + TOGETHER : call->num;
        if (end - j == TOGETHER && !any_above(call->score + j, below)) continue;
        for (int64_t i = j; i < end; i++) {
            if (!(call->score[i] >= least)) continue;
            if (count == HIRE_MOST_LEFT) return HIRE_UNSURE;
            found[count++] = (candidate){call->score[i], i};
        }
    }
    return count;
}

/* How many of the worst a cut removes; HIRE_UNSURE where rounding could decide. */
static int64_t removed_by(const hire_cut *cut, const candidate *left, int64_t count, double near)
{
    const double best = left[count - 1].score;
    const double limit = cut->kind == HIRE_TOP_P ? 1 - cut->share : cut->share;
    double whole = 1, sum = 0;
    int64_t removed = 0;
    if (cut->kind == HIRE_TOP_P) {
        whole = 0;
        for (int64_t i = 0; i < count; i++) whole += exp(left[i].score - best);
    }
    for (int64_t i = 0; i < count; i++) {
        const double share = exp(left[i].score - best) / whole;
        sum = cut->kind == HIRE_TOP_P ? sum + share : share;
        if (i == count - 1 && cut->kind == HIRE_TOP_P) break; /* the best is always kept */
        if (fabs(sum - limit) <= near * limit) return HIRE_UNSURE;
        removed += cut->kind == HIRE_TOP_P ? sum <= limit : sum < limit;
    }
    /* Which of equal scores are removed is a matter of how they were sorted. */
    const int tied = removed > 0 && left[removed - 1].score == left[removed].score;
    return tied ? HIRE_UNSURE : removed;
}

/* The row with the largest chance over its exponential number, as torch.multinomial has it. */
static int64_t drawn(const hire_draw_call *call, candidate *left, int64_t count, void *state)
{
    int64_t places[HIRE_MOST_LEFT] = {0}, best = 0;
    double number[HIRE_MOST_LEFT], most = -1, second = -1;
    const double highest = left[count - 1].score;
    qsort(left, (size_t)count, sizeof *left, by_row);
    for (int64_t i = 0; i < count; i++) places[i] = left[i].row;
    const hire_generator after = uniforms(state, places, count, call->num, number);
    for (int64_t i = 0; i < count; i++) {
        const double ratio = exp(left[i].score - highest) / -log1p(-number[i]);
        if (ratio > most) {
            second = most;
            most = ratio;
            best = places[i];
        } else if (ratio > second) {
            second = ratio;
        }
    }
    if (!(most * (1 - call->near) > second)) return HIRE_UNSURE;
    memcpy(state, &after, sizeof after);
    return best;
}

int64_t hire_draw(const hire_draw_call *call, void *state)
{
    candidate all[HIRE_MOST_LEFT], *left = all;
    const float least = hire_kth_largest(call->score, call->num, call->top_k);
    if (!(least > call->level) && call->level > -INFINITY) return HIRE_BEYOND;
    if (!isfinite(least)) return HIRE_UNSURE;
    int64_t count = reaching(call, least, all);
    if (count == HIRE_UNSURE) return HIRE_UNSURE;
    qsort(all, (size_t)count, sizeof *all, by_score);
    if (!isfinite(all[count - 1].score)) return HIRE_UNSURE;
    for (int64_t i = 0; i < call->num_cuts; i++) {
        const int64_t removed = removed_by(call->cuts + i, left, count, call->near);
        if (removed == HIRE_UNSURE) return HIRE_UNSURE;
        left += removed;
        count -= removed;
    }
    return drawn(call, left, count, state);
}
