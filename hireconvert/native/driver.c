/* The order of steps, the threads that share them, and the selection between them. */
#include "kernels.h"
#include "team.h"

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <string.h>

#if defined(HIRE_ARM) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(HIRE_ARM) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

int hire_abi(void) { return HIRE_ABI; }

#ifdef HIRE_ARM
/* Of x86 the compiler knows how to ask; here every system has a way of its own. */
static int has_dotprod(void)
{
#if defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#elif defined(__APPLE__)
    int found = 0;
    size_t size = sizeof found;
    return sysctlbyname("hw.optional.arm.FEAT_DotProd", &found, &size, NULL, 0) == 0 && found;
#elif defined(__ARM_FEATURE_DOTPROD)
    return 1; /* the library was compiled for such CPUs alone */
#else
    return 0;
#endif
}
#endif

int hire_level_at_most(int wanted)
{
#ifdef HIRE_X86
    __builtin_cpu_init();
    const int narrow = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                       __builtin_cpu_supports("f16c") && __builtin_cpu_supports("popcnt");
    const int wide = narrow && __builtin_cpu_supports("avx512f") &&
                     __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
    if (wanted >= HIRE_AVX512 && wide) return HIRE_AVX512;
    if (wanted >= HIRE_AVX2 && narrow) return HIRE_AVX2;
#elif defined(HIRE_ARM)
    if (wanted >= HIRE_DOTPROD && has_dotprod()) return HIRE_DOTPROD;
    if (wanted >= HIRE_NEON) return HIRE_NEON;
#else
    (void)wanted;
#endif
    return HIRE_PORTABLE;
}

const hire_kernels *hire_kernels_of(int level)
{
#ifdef HIRE_X86
    if (level == HIRE_AVX512) return &hire_kernels_avx512;
    if (level == HIRE_AVX2) return &hire_kernels_avx2;
#elif defined(HIRE_ARM)
    if (level == HIRE_DOTPROD) return &hire_kernels_dotprod;
    if (level == HIRE_NEON) return &hire_kernels_neon;
#endif
    (void)level;
    return &hire_kernels_portable;
}

void hire_top_k(const float *score, int64_t n, int64_t k, int32_t *out, int32_t *spare)
{
    hire_kernels_of(hire_level_at_most(HIRE_HIGHEST))->top_k(score, n, k, out, spare);
}

/* ------------------------------------------------------------------ scratch memory */

static int64_t whole(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

/* Cuts `scratch` (or, when it is NULL, nothing) into the arrays of a run; returns all its bytes. */
int64_t hire_cut_scratch(const hire_layer *layer, char *scratch, hire_run *run)
{
    const int64_t lanes = HIRE_LANES, padded = whole(layer->num_neurons, lanes);
    const int64_t parts = layer->gated ? 2 : 1, blocks = layer->width / layer->block + 1;
    const int64_t block = whole(layer->block, 32);
    int64_t rest_blocks = 0, groups = 0;
    if (layer->rest != NULL) rest_blocks = whole(layer->width / layer->rest_block + 1, lanes);
    memset(&run->low, 0, sizeof run->low);
    if (layer->low != NULL) {
        run->low = hire_low_rows_of(layer->width, parts, layer->block, layer->rest_block);
        groups = run->low.full + 1;
    }
    run->partial_stride = layer->stride + lanes * rest_blocks;
    const int64_t sizes[] = {layer->stride, block, blocks * block, 4 * blocks, blocks, blocks,
                             6 * lanes * run->low.vectors, lanes * groups, lanes * groups,
                             lanes, parts * padded, padded, padded,
                             padded, padded, padded + 1, padded + 1, padded,
                             layer->stride / lanes, HIRE_SEGMENTS * run->partial_stride,
                             HIRE_SEGMENTS, HIRE_SEGMENTS, HIRE_SEGMENTS};
    void *places[sizeof sizes / sizeof *sizes];
    int64_t total = 0;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        places[i] = scratch == NULL ? NULL : scratch + total;
        total += whole(sizes[i] * (int64_t)sizeof(float), 64);
    }
    run->x = places[0];
    run->u = places[1];
    run->u_digits = places[2];
    run->u_first = places[3];
    run->u_scale = places[4];
    run->u_sum = places[5];
    run->x_digits = places[6];
    run->x_scale = places[7];
    run->x_middle = places[8];
    run->x_place = places[9];
    run->z = places[10];
    run->score = places[11];
    run->value = places[12];
    run->h = places[13];
    run->exact = places[14];
    run->index = places[15];
    run->chosen = places[16];
    run->spare = places[17];
    run->rest_scale_of = places[18];
    run->partial = places[19];
    run->together = places[20];
    run->taken = places[21];
    run->square = places[22];
    run->last = layer->num_candidates;
    return total;
}

int64_t hire_low_bytes(int64_t width, int64_t parts, int64_t block, int64_t down_block)
{
    return hire_low_rows_of(width, parts, block, down_block).bytes;
}

int64_t hire_scratch_bytes(const hire_layer *layer, int64_t num_rows)
{
    hire_run run;
    const int64_t together = num_rows < HIRE_ROWS ? num_rows : HIRE_ROWS;
    return together * hire_cut_scratch(layer, NULL, &run) + 64; /* to start at a whole cache line */
}

static char *aligned(void *scratch)
{
    return (char *)(((uintptr_t)scratch + 63) / 64 * 64);
}

void hire_scratch_places(const hire_layer *layer, int64_t *place_of_4)
{
    static char nothing[64];
    hire_run run;
    char *start = aligned(nothing);
    hire_cut_scratch(layer, start, &run);
    place_of_4[0] = (char *)run.z - start;
    place_of_4[1] = (char *)run.score - start;
    place_of_4[2] = (char *)run.index - start;
    place_of_4[3] = (char *)run.chosen - start;
}

/* ------------------------------------------------------------------ rows that go together */

/* Where piece s begins, of `total` cut into HIRE_SEGMENTS pieces of whole units. */
static int64_t cut(int64_t total, int64_t unit, int64_t s)
{
    const int64_t at = (total + unit - 1) / unit * s / HIRE_SEGMENTS * unit;
    return at < total ? at : total;
}

/* How many of the candidates lie before a neuron. */
static int64_t candidates_before(const hire_layer *layer, const hire_run *run, int64_t neuron)
{
    int64_t low = 0, high = layer->num_candidates;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (run->index[middle] < neuron)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static void note_bad(const hire_run *run, int phase)
{
    team_raise(run->bad + phase);
}

/* Collects the rows that met neither NaN nor inf, up to that phase; returns how many. */
static int64_t sound_rows(hire_run *runs, int64_t num_rows, int phase, hire_run **sound)
{
    int64_t num = 0;
    for (int64_t i = 0; i < num_rows; i++)
        if (!runs[i].bad[0] && (phase == 0 || !runs[i].bad[1])) sound[num++] = runs + i;
    return num;
}

static void choose_candidates(const hire_layer *layer, const hire_kernels *kernels, hire_run *run)
{
    const int64_t candidates = layer->num_candidates;
    kernels->top_k(run->score, layer->num_neurons, candidates, run->index, run->spare);
    if (layer->num_kept < candidates || layer->rest == NULL || layer->low != NULL) return;
    /* Kept neurons are known before they are computed: none of them is in the rest. */
    for (int64_t i = 0; i < candidates; i++) run->value[run->index[i]] = 0.0f;
}

static void choose_kept(const hire_layer *layer, const hire_kernels *kernels, hire_run *run)
{
    kernels->top_k(run->exact, layer->num_candidates, layer->num_kept, run->chosen, run->spare);
    if (layer->rest == NULL) return;
    for (int64_t i = 0; i < layer->num_candidates; i++) run->value[run->index[i]] = run->h[i];
    if (layer->low != NULL) return;
    for (int64_t i = 0; i < layer->num_kept; i++) run->value[run->index[run->chosen[i]]] = 0.0f;
}

/* The kept of piece s. Where all candidates are kept they are computed here; refined ones, whose
 * copies the rest adds, are those among the piece's own neurons [from, to). */
static void sum_kept(const hire_layer *layer, const hire_kernels *kernels, hire_run *run, int64_t s,
                     int64_t from, int64_t to)
{
    float *partial = run->partial + s * run->partial_stride;
    int64_t begin = cut(layer->num_kept, 4, s), end = cut(layer->num_kept, 4, s + 1);
    memset(partial, 0, (size_t)layer->stride * sizeof *partial);
    if (layer->num_kept < layer->num_candidates) {
        kernels->kept(layer, run, begin, end, partial);
        return;
    }
    if (layer->low != NULL) {
        begin = candidates_before(layer, run, from);
        end = candidates_before(layer, run, to);
    }
    if (!kernels->exact(layer, run, begin, end, partial)) note_bad(run, 1);
    if (layer->low != NULL)
        for (int64_t i = begin; i < end; i++) run->value[run->index[i]] = run->h[i];
}

/* Where the neurons of piece s begin. */
static int64_t cut_neurons(const hire_layer *layer, int64_t s)
{
    const int by_tiles = layer->rest_bits == 4 || layer->level != NULL;
    return cut(layer->num_neurons, by_tiles ? HIRE_LANES : 4, s);
}

/* Adds up pieces [begin, end), a thread's own, as far as pairs lie among them. */
static void add_pieces(const hire_layer *layer, const hire_kernels *kernels, const hire_run *run,
                       int64_t begin, int64_t end)
{
    for (int64_t s = begin; s < end; s++) run->together[s] = 1;
    for (int64_t num = 1; num < HIRE_SEGMENTS; num *= 2)
        for (int64_t s = (begin + 2 * num - 1) / (2 * num) * 2 * num; s + 2 * num <= end;
             s += 2 * num) {
            kernels->add(run->partial + s * run->partial_stride,
                         run->partial + (s + num) * run->partial_stride, layer->stride);
            run->together[s] = (int32_t)(2 * num);
        }
}

/* What pieces add up: the kept first, rows that lie apart, and then the rest, which is one stream. A
 * thread goes twice over the same pieces. */
static void sum_segments(const hire_layer *layer, const hire_kernels *kernels,
                         hire_run *const *rows, int64_t num_rows)
{
    const int64_t begin = team_cut(HIRE_SEGMENTS, 1, 0), end = team_cut(HIRE_SEGMENTS, 1, 1);
    for (int64_t s = begin; s < end; s++)
        for (int64_t i = 0; i < num_rows; i++)
            sum_kept(layer, kernels, rows[i], s, cut_neurons(layer, s),
                     cut_neurons(layer, s + 1));
    if (layer->rest != NULL)
        for (int64_t s = begin; s < end; s++)
            kernels->rest(layer, rows, num_rows, s, cut_neurons(layer, s),
                          cut_neurons(layer, s + 1));
    for (int64_t i = 0; i < num_rows; i++) add_pieces(layer, kernels, rows[i], begin, end);
    team_barrier();
}

/* ------------------------------------------------------------------ rows by a level */

/* Estimates of pieces [begin, end). */
static void estimate_pieces(const hire_layer *layer, const hire_kernels *kernels, hire_run *runs,
                            int64_t num_rows, int64_t begin, int64_t end)
{
    const int64_t to = cut_neurons(layer, end);
    for (int64_t at = cut_neurons(layer, begin); at < to; at += HIRE_LANES)
        for (int64_t i = 0; i < num_rows; i++)
            if (!kernels->estimate(layer, runs + i, at / HIRE_LANES, at / HIRE_LANES + 1))
                note_bad(runs + i, 0);
}

/* What rows' levels are relative to: every piece's share of it, and then a barrier. */
static void share_squares(const hire_layer *layer, const hire_kernels *kernels, hire_run *runs,
                          int64_t num_rows, int64_t begin, int64_t end)
{
    for (int64_t i = 0; i < num_rows; i++)
        for (int64_t s = begin; s < end; s++)
            runs[i].square[s] = kernels->square(runs[i].value, layer->norm, cut_neurons(layer, s),
                                                cut_neurons(layer, s + 1));
    team_barrier();
}

/* The score that a neuron of the row is to reach. A level above zero stays so, whatever it is
 * relative to: neurons that add nothing need not be computed. */
static float row_level(const hire_layer *layer, const hire_run *run)
{
    float square = 0.0f;
    if (!layer->relative) return *layer->level;
    for (int64_t s = 0; s < HIRE_SEGMENTS; s++) square += run->square[s];
    const float level = *layer->level * sqrtf(square);
    return *layer->level > 0.0f && level < FLT_MIN ? FLT_MIN : level;
}

/* The candidates of pieces [begin, end); these lie at the places of the pieces' neurons, one piece's
 * behind the other's. */
static void take_reaching(const hire_layer *layer, const hire_kernels *kernels, hire_run *runs,
                          int64_t num_rows, int64_t begin, int64_t end)
{
    for (int64_t i = 0; i < num_rows; i++) {
        hire_run *run = runs + i;
        const float level = row_level(layer, run);
        run->last = cut_neurons(layer, begin);
        for (int64_t s = begin; s < end; s++) {
            run->taken[s] = (int32_t)kernels->reaching(run->score, cut_neurons(layer, s),
                                                       cut_neurons(layer, s + 1), level,
                                                       run->index + run->last);
            run->last += run->taken[s];
        }
    }
}

/* Candidates [from, to), those of piece s: their outputs, and what the rest adds for them. */
static void sum_taken(const hire_layer *layer, const hire_kernels *kernels, hire_run *run, int64_t s,
                      int64_t from, int64_t to)
{
    float *partial = run->partial + s * run->partial_stride;
    memset(partial, 0, (size_t)layer->stride * sizeof *partial);
    if (!kernels->exact(layer, run, from, to, partial)) note_bad(run, 1);
    if (layer->rest == NULL) return;
    for (int64_t i = from; i < to; i++)
        run->value[run->index[i]] = layer->low != NULL ? run->h[i] : 0.0f;
}

/* Where candidates are all that reach a level no thread needs another's scores: each estimates,
 * chooses and computes its own pieces, and there is one barrier, or two where the level is relative
 * to what all of a row's estimates come to. */
static void rows_by_level(const hire_layer *layer, const hire_kernels *kernels,
                          const hire_run *shared, int64_t num_rows)
{
    const int64_t begin = team_cut(HIRE_SEGMENTS, 1, 0), end = team_cut(HIRE_SEGMENTS, 1, 1);
    hire_run runs[HIRE_ROWS], *rows[HIRE_ROWS];
    int64_t at[HIRE_ROWS];
    for (int64_t i = 0; i < num_rows; i++) {
        runs[i] = shared[i];
        rows[i] = runs + i;
        at[i] = cut_neurons(layer, begin);
    }
    estimate_pieces(layer, kernels, runs, num_rows, begin, end);
    if (layer->relative) share_squares(layer, kernels, runs, num_rows, begin, end);
    take_reaching(layer, kernels, runs, num_rows, begin, end);
    for (int64_t s = begin; s < end; s++)
        for (int64_t i = 0; i < num_rows; i++) {
            sum_taken(layer, kernels, runs + i, s, at[i], at[i] + runs[i].taken[s]);
            at[i] += runs[i].taken[s];
        }
    if (layer->rest != NULL)
        for (int64_t s = begin; s < end; s++)
            kernels->rest(layer, rows, num_rows, s, cut_neurons(layer, s),
                          cut_neurons(layer, s + 1));
    for (int64_t i = 0; i < num_rows; i++) add_pieces(layer, kernels, runs + i, begin, end);
    team_barrier();
}

int64_t hire_taken(const hire_run *run)
{
    int64_t total = 0;
    for (int64_t s = 0; s < HIRE_SEGMENTS; s++) total += run->taken[s];
    return total;
}

/* ------------------------------------------------------------------ rows of a team */

/* Weights are the outer loop and rows the inner one, wherever rows read the same weights. */
void hire_rows_of_team(const hire_layer *layer, const hire_kernels *kernels, hire_run *runs,
                       int64_t num_rows)
{
    const int64_t tiles = whole(layer->num_neurons, HIRE_LANES) / HIRE_LANES;
    const int64_t candidates = layer->num_candidates;
    hire_run *rows[HIRE_ROWS];
    int64_t num = num_rows;
    if (layer->level != NULL) {
        rows_by_level(layer, kernels, runs, num_rows);
        return;
    }
    for (int64_t i = 0; i < num; i++) rows[i] = runs + i;
    if (hire_estimates(layer)) {
        TEAM_FOR(tile, tiles, 1)
            for (int64_t i = 0; i < num; i++)
                if (!kernels->estimate(layer, rows[i], tile, tile + 1)) note_bad(rows[i], 0);
        num = sound_rows(runs, num_rows, 0, rows);
    }
    if (candidates > 0) {
        TEAM_FOR(i, num, 1) choose_candidates(layer, kernels, rows[i]);
    }
    if (layer->num_kept < candidates) {
        TEAM_FOR(s, HIRE_SEGMENTS, 1)
            for (int64_t i = 0; i < num; i++)
                if (!kernels->exact(layer, rows[i], cut(candidates, 4, s),
                                    cut(candidates, 4, s + 1), NULL))
                    note_bad(rows[i], 1);
        num = sound_rows(runs, num_rows, 1, rows);
        TEAM_FOR(i, num, 1) choose_kept(layer, kernels, rows[i]);
    }
    sum_segments(layer, kernels, rows, num);
}

/* Up to HIRE_ROWS rows, of row_bytes each; what became of them is in their `bad`. */
typedef struct {
    const hire_layer *layer;
    const hire_kernels *kernels;
    hire_run *runs;
    const char *x;
    char *y;
    int64_t row_bytes, num_rows;
} some_rows;

static void run_rows(void *context)
{
    const some_rows *call = context;
    const hire_layer *layer = call->layer;
    const int type = (int)layer->weight_type;
    TEAM_FOR(i, call->num_rows, 1)
        call->kernels->start(layer, call->x + i * call->row_bytes, type, call->runs + i);
    hire_rows_of_team(layer, call->kernels, call->runs, call->num_rows);
    TEAM_FOR(i, call->num_rows, 1) {
        hire_run *run = call->runs + i;
        if (!run->bad[0] && !run->bad[1])
            call->kernels->finish(layer, run, call->y + i * call->row_bytes, type);
    }
}

int64_t hire_ffn(const hire_layer *layer, const void *x, void *y, uint8_t *finite, int64_t *counts,
                 void *scratch, int64_t num_rows, int32_t num_threads, int32_t level)
{
    const hire_kernels *kernels = hire_kernels_of(hire_level_at_most(level));
    const int64_t row_bytes = layer->width * (layer->weight_type == HIRE_FLOAT32 ? 4 : 2);
    hire_run runs[HIRE_ROWS];
    int64_t num_bad = 0, taken = 0;
    for (int64_t at = 0; at < num_rows; at += HIRE_ROWS) {
        const int64_t num = num_rows - at < HIRE_ROWS ? num_rows - at : HIRE_ROWS;
        int bad[HIRE_ROWS][2] = {0};
        char *place = aligned(scratch);
        for (int64_t i = 0; i < num; i++) {
            place += hire_cut_scratch(layer, place, runs + i);
            runs[i].bad = bad[i];
        }
        some_rows call = {layer, kernels, runs, (const char *)x + at * row_bytes,
                          (char *)y + at * row_bytes, row_bytes, num};
        team_run(num_threads, run_rows, &call);
        for (int64_t i = 0; i < num; i++) {
            finite[at + i] = !bad[i][0] && !bad[i][1];
            num_bad += !finite[at + i];
            if (layer->level != NULL && finite[at + i]) taken += hire_taken(runs + i);
        }
    }
    if (counts != NULL) {
        counts[0] += 1;
        counts[1] += num_rows;
        hire_count(layer, num_rows - num_bad, taken, counts);
        counts[4] += num_bad;
    }
    return num_bad;
}
