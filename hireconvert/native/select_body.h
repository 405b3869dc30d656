/* The k largest scores, and those that reach a level; part of kernels_body.h.
 *
 * Floats that are not negative order like their bits, so the k-th largest is found by halving the
 * range of bits that it lies in, and soon only among the scores that lie there. */

enum { HALVINGS = 8 }; /* of all scores, before those in the range are put together */

INLINE int32_t size_bits(const void *score)
{
    int32_t bits;
    memcpy(&bits, score, sizeof bits);
    return bits & 0x7fffffff; /* -0 is 0 */
}

INLINE w16 size_words(const void *score)
{
    return w_and(w_load4(score), w_set1(0x7fffffff));
}

static int64_t count_above(const void *scores, int64_t n, int32_t bits)
{
    const float *score = scores; /* for its size alone */
    w16 count = w_set1(0);
    int64_t i = 0, tail = 0;
    for (; i + 16 <= n; i += 16) count = w_count_above(count, size_words(score + i), w_set1(bits));
    for (; i < n; i++) tail += size_bits(score + i) > bits;
    return w_total(count) + tail;
}

/* Puts the bits of the scores in [low, high] together in `to`; returns how many there are. */
static int64_t put_together(const float *score, int64_t n, int32_t low, int32_t high, int32_t *to)
{
    int32_t *end = to;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const w16 x = size_words(score + i);
        const unsigned out = w_above(x, w_set1(high)) | w_above(w_set1(low), x);
        end = w_places(end, ~out & 0xffff, (int32_t)i);
    }
    for (; i < n; i++) {
        const int32_t bits = size_bits(score + i);
        if (low <= bits && bits <= high) *end++ = (int32_t)i;
    }
    for (int32_t *at = to; at < end; at++) *at = size_bits(score + *at);
    return end - to;
}

/* Bits of the k-th largest score; *above becomes how many are larger. */
static int32_t kth_bits(const float *score, int64_t n, int64_t k, int64_t *above, int32_t *spare)
{
    const void *among = score;
    int32_t low = 0, high = 0x7f800000; /* the answer is in [low, high] */
    int64_t larger = 0;                 /* than high, and no longer looked at */
    *above = 0;
    for (int step = 0; low < high; step++) {
        if (step == HALVINGS) {
            n = put_together(score, n, low, high, spare);
            among = spare;
            larger = *above;
        }
        const int32_t middle = low + (high - low) / 2;
        const int64_t count = larger + count_above(among, n, middle);
        if (count < k) {
            high = middle;
            *above = count;
        } else {
            low = middle + 1;
        }
    }
    return high;
}

static void top_k(const float *score, int64_t n, int64_t k, int32_t *out, int32_t *spare)
{
    int64_t above = 0, i = 0;
    const int32_t kth = k < n ? kth_bits(score, n, k, &above, spare) : -1;
    int64_t ties = k < n ? k - above : 0;
    for (; i + 16 <= n; i += 16) {
        const w16 x = size_words(score + i);
        unsigned chosen = w_above(x, w_set1(kth));
        for (unsigned equal = w_equal(x, w_set1(kth)); equal && ties > 0; ties--) {
            chosen |= equal & (0u - equal); /* the lowest place that is left */
            equal &= equal - 1;
        }
        out = w_places(out, chosen, (int32_t)i);
    }
    for (; i < n; i++) {
        const int32_t bits = size_bits(score + i);
        if (bits > kth || (bits == kth && ties-- > 0)) *out++ = (int32_t)i;
    }
}

static float square(const float *value, const float *norm, int64_t from, int64_t to)
{
    v16 sum = v_set1(0.0f);
    for (int64_t i = from; i < to; i += 16) {
        const v16 output = v_mul(v_load(value + i), v_load(norm + i));
        sum = v_fma(output, output, sum);
    }
    return v_sum(sum);
}

static int64_t reaching(const float *score, int64_t from, int64_t to, float level, int32_t *out)
{
    const int32_t *start = out, below = level > 0.0f ? size_bits(&level) - 1 : -1;
    int64_t i = from;
    for (; i + 16 <= to; i += 16)
        out = w_places(out, w_above(size_words(score + i), w_set1(below)), (int32_t)i);
    for (; i < to; i++)
        if (size_bits(score + i) > below) *out++ = (int32_t)i;
    return out - start;
}
