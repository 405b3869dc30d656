/* One token, from its id to the best row of the head: nothing in between needs Python. */
#include "token.h"

#include <string.h>

#include "simd_portable.h"

enum { NUMBERS_AT_ONCE = 1024 }; /* of which the largest is sought, to a piece of work */

/* Numbers of `type` as floats. */
static void widen(const void *from, int64_t num, int64_t type, float *to)
{
    if (type == HIRE_FLOAT32) {
        memcpy(to, from, (size_t)num * sizeof *to);
        return;
    }
    const uint16_t *half = from;
    for (int64_t j = 0; j < num; j++) {
        const uint32_t bits = (uint32_t)half[j] << 16;
        if (type == HIRE_BFLOAT16)
            memcpy(to + j, &bits, sizeof bits);
        else
            to[j] = half_to_float(half[j]);
    }
}

/* x [num] as if it had been stored as `type`. */
static void round_to(const hire_token *token, int64_t num, float *x, void *narrow)
{
    if (token->type == HIRE_FLOAT32) return;
    hire_step_kernels_of((int)token->level)->store(narrow, 0, x, num, (int)token->type);
    widen(narrow, num, token->type, x);
}

void hire_embed(const hire_token *token, int64_t num, int64_t id, float *x, void *narrow)
{
    const int64_t bytes = token->type == HIRE_FLOAT32 ? 4 : 2;
    const char *row = (const char *)token->embedding + id * token->embedding_stride * bytes;
    widen(row, num, token->type, x);
    if (token->embedding_scale == 1.0) return;
    for (int64_t j = 0; j < num; j++) x[j] *= (float)token->embedding_scale;
    round_to(token, num, x, narrow);
}

/* The cache and the angles of the position behind the one that was written. */
static void move_on(const hire_token *token)
{
    for (int64_t l = 0; l < token->num_blocks; l++) {
        hire_past *past = token->pasts + l;
        const int64_t kept = token->most_kept[l];
        past->length++;
        if (kept > 0 && past->length > kept) {
            past->first += past->length - kept;
            past->length = kept;
        }
    }
    for (int64_t i = 0; i < 2 * token->num_ropes; i++) token->angles[i] += token->rotary[i / 2];
}

/* The largest of some numbers; NaN where one is NaN. */
static float largest_of(const float *x, int64_t num)
{
    float most[16];
    int32_t strange[16] = {0};
    int64_t j = 0;
    for (int l = 0; l < 16; l++) most[l] = -INFINITY;
    for (; j + 16 <= num; j += 16)
        for (int l = 0; l < 16; l++) {
            most[l] = x[j + l] > most[l] ? x[j + l] : most[l];
            strange[l] |= x[j + l] != x[j + l];
        }
    for (; j < num; j++) {
        most[0] = x[j] > most[0] ? x[j] : most[0];
        strange[0] |= x[j] != x[j];
    }
    for (int l = 1; l < 16; l++) {
        most[0] = most[l] > most[0] ? most[l] : most[0];
        strange[0] |= strange[l];
    }
    return strange[0] ? NAN : most[0];
}

int64_t hire_largest(const float *x, int64_t num)
{
    float most = -INFINITY;
    int64_t start = 0;
    for (int64_t j = 0; j < num; j += NUMBERS_AT_ONCE) {
        const int64_t left = num - j < NUMBERS_AT_ONCE ? num - j : NUMBERS_AT_ONCE;
        const float here = largest_of(x + j, left);
        if (here > most || here != here) {
            most = here;
            start = j;
        }
        if (here != here) break;
    }
    for (int64_t j = start; j < num; j++)
        if (x[j] == most || (most != most && x[j] != x[j])) return j;
    return 0;
}

int64_t hire_next(const hire_token *token, int64_t id)
{
    const int64_t width = token->blocks[0].width;
    hire_embed(token, width, id, token->x, token->narrow);
    const int64_t bad = hire_step(token->blocks, token->num_blocks, token->pasts, token->angles,
                                  token->x, 1, token->scratch, token->most, token->last_norm,
                                  token->eps, (int32_t)token->num_threads, (int32_t)token->level);
    if (bad >= 0) return HIRE_TOKEN_STOPPED;
    round_to(token, width, token->x, token->narrow);
    move_on(token);
    if (token->head == NULL) return HIRE_TOKEN_HIDDEN;
    const hire_head_call *call = token->call;
    memset(call->counts, 0, 3 * sizeof *call->counts);
    if (hire_head_logits(token->head, call, token->head_scratch, (int32_t)token->num_threads,
                         (int32_t)token->head_level) > 0)
        return HIRE_TOKEN_HIDDEN;
    token->head_counts[0] += 1;
    token->head_counts[1] += 1;
    token->head_counts[2] += call->counts[0];
    token->head_counts[4] += !call->certify;
    token->head_counts[6] += call->counts[1];
    return hire_largest(call->y, token->head->num_rows);
}
