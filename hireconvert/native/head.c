/* The head's steps: round x, estimate every row, learn what the best must reach, read the rest of
 * those that may reach it. What is chosen depends on neither threads nor level. */
#include "head.h"
#include "team.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

enum {
    MOST_Q = 32639, /* 127 * 256 + 127 */
    TILES_AT_ONCE = 32,
    ROWS_AHEAD = 8 /* asked for before they are read */
};
#define FLOAT32_UNIT 0x1p-24
#define MARGIN (16 * 0x1p-23) /* as in runtime/hire_head.py */

#include "head_best.h"

int hire_head_level(int wanted)
{
    const int level = hire_level_at_most(wanted < HIRE_HEAD_VNNI ? wanted : HIRE_HIGHEST);
#ifdef HIRE_X86
    if (wanted >= HIRE_HEAD_VNNI && level == HIRE_AVX512 && __builtin_cpu_supports("avx512vnni"))
        return HIRE_HEAD_VNNI;
#endif
    return level;
}

static const hire_head_kernels *kernels_of(int level)
{
#ifdef HIRE_X86
    if (level == HIRE_HEAD_VNNI) return &hire_head_vnni;
    if (level == HIRE_AVX512) return &hire_head_avx512;
    if (level == HIRE_AVX2) return &hire_head_avx2;
#elif defined(HIRE_ARM)
    if (level == HIRE_DOTPROD) return &hire_head_dotprod;
    if (level == HIRE_NEON) return &hire_head_neon;
#endif
    (void)level;
    return &hire_head_portable;
}

/* ------------------------------------------------------------------ scratch memory */

/* More rows than asked for, by estimate, are read a second time before the best are taken. */
static int64_t spares_of(const hire_head *head, int64_t count)
{
    return 2 * count < head->num_rows ? 2 * count : head->num_rows;
}

static int64_t cut_scratch(const hire_head *head, int64_t count, char *scratch, hire_head_run *run)
{
    const int64_t tiles = hire_whole(head->num_rows, 16) / 16, spares = spares_of(head, count);
    const int64_t loud = hire_whole(head->num_loud, 4);
    const int64_t quiet = hire_whole(head->width - head->num_loud, 128);
    const int64_t size_of_11[] = {4 * (head->width + 15), 8 * head->width, loud, loud, quiet,
                                  quiet, 64 * tiles, 64 * tiles, 4 * tiles, 4 * tiles,
                                  8 * spares};
    char *place_of_11[11];
    int64_t total = 0;
    for (int i = 0; i < 11; i++) {
        place_of_11[i] = scratch == NULL ? NULL : scratch + total;
        total += hire_whole(size_of_11[i], 64);
    }
    if (scratch == NULL) return total;
    run->x = (float *)place_of_11[0];
    run->u = (double *)place_of_11[1];
    for (int part = 0; part < 2; part++) {
        run->loud[part] = (int8_t *)place_of_11[2 + part];
        run->quiet[part] = (int8_t *)place_of_11[4 + part];
    }
    run->estimate = (float *)place_of_11[6];
    run->upper = (float *)place_of_11[7];
    run->tile_estimate = (float *)place_of_11[8];
    run->tile_upper = (float *)place_of_11[9];
    run->best_value = (float *)place_of_11[10];
    run->best_row = (int32_t *)(run->best_value + spares);
    return total;
}

int64_t hire_head_scratch_bytes(const hire_head *head, int64_t count, int64_t num_rows)
{
    const int64_t together = num_rows < HIRE_ROWS ? num_rows : HIRE_ROWS;
    return together * cut_scratch(head, count, NULL, NULL) + 64; /* to start at a cache line */
}

/* ------------------------------------------------------------------ the row that comes in */

typedef struct {
    float unit;    /* of q */
    double middle; /* sum of q */
    double sizes;  /* sum of |q| + 128 */
    double norm;   /* of the input */
    double delta;  /* norm of what rounding took */
} rounded;

/* q = 256 high + low from n inputs, zeros up to `room`. */
static rounded round_inputs(const double *u, int64_t n, int64_t room, int8_t *high, int8_t *low)
{
    rounded r = {0};
    double most = 0.0, squares = 0.0, lost = 0.0;
    for (int64_t k = 0; k < n; k++) most = fabs(u[k]) > most ? fabs(u[k]) : most;
    if (most > 1e-30) r.unit = (float)(most / MOST_Q);
    const double inverse = r.unit > 0.0f ? 1.0 / r.unit : 0.0;
    for (int64_t k = 0; k < n; k++) {
        const double scaled = u[k] * inverse + (u[k] < 0.0 ? -0.5 : 0.5);
        int32_t q = (int32_t)scaled;
        q = q > MOST_Q ? MOST_Q : q < -MOST_Q ? -MOST_Q : q;
        const int32_t upper = (q + 128 + 65536) / 256 - 256; /* rounded down */
        const double delta = u[k] - (double)q * r.unit;
        high[k] = (int8_t)upper;
        low[k] = (int8_t)(q - 256 * upper);
        r.middle += q;
        r.sizes += (q < 0 ? -q : q) + 128;
        squares += u[k] * u[k];
        lost += delta * delta;
    }
    for (int64_t k = n; k < room; k++) high[k] = low[k] = 0;
    r.norm = sqrt(squares) * (1 + 1e-9);
    r.delta = sqrt(lost) * (1 + 1e-9) + 1e-30;
    return r;
}

static float above(double value) { return (float)(value * (1 + 1e-6)); }

/* 0 where x is not finite or too large to be reordered. */
static int start(const hire_head *head, const float *x, hire_head_run *run)
{
    const int64_t loud = head->num_loud, quiet = head->width - loud;
    for (int64_t j = 0; j < head->width; j++) run->x[j] = x[j];
    for (int64_t j = head->width; j < head->width + 15; j++) run->x[j] = 0.0f;
    for (int64_t k = 0; k < head->width; k++) {
        run->u[k] = x[head->order[k]] / head->divisor[k];
        if (!(fabs(run->u[k]) < 1e30)) return 0;
    }
    const rounded v =
        round_inputs(run->u, loud, hire_whole(loud, 4), run->loud[0], run->loud[1]);
    const rounded u = round_inputs(run->u + loud, quiet, hire_whole(quiet, 128), run->quiet[0],
                                   run->quiet[1]);
    run->loud_unit = v.unit;
    run->quiet_unit = u.unit;
    run->loud_middle = (float)(127.5 * v.middle);
    run->quiet_middle = (float)(7.5 * u.middle);
    run->quiet_norm = above(u.norm);
    run->loud_slack = above(head->loud_ratio * v.norm + 128 * sqrt((double)loud) * v.delta +
                            10 * FLOAT32_UNIT * 255 * v.unit * v.sizes);
    run->quiet_slack = above(8 * sqrt((double)quiet) * u.delta +
                             10 * FLOAT32_UNIT * 15 * u.unit * u.sizes);
    return 1;
}

/* ------------------------------------------------------------------ rows that go together */

/* The reference's logit: the product in float64, rounded once. */
static float reference(const hire_head *head, const hire_head_kernels *kernels,
                       const hire_head_run *run, int64_t row)
{
    const double z = kernels->exact(head, run, row);
    return (float)(head->bias == NULL ? z : z + head->bias[row]);
}

static float wide(uint16_t bfloat16)
{
    const uint32_t bits = (uint32_t)bfloat16 << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* The estimate of the second reading; *upper gets what the reference is at most. */
static float refined(const hire_head *head, const hire_head_kernels *kernels,
                     const hire_head_run *run, int64_t row, double *upper)
{
    const uint16_t *scales = head->scales + row / 16 * 48 + row % 16;
    const double sum = (double)kernels->refine(head, run, row) - run->quiet_middle;
    const double narrow = (double)wide(scales[16]);
    const float z = (float)(run->estimate[row] + narrow / 16 * run->quiet_unit * sum);
    const double slack = (double)wide(head->low_error[row]) * run->quiet_norm +
                         (double)wide(scales[0]) * run->loud_slack + narrow * run->quiet_slack;
    /* The first estimate's own rounding was relative to itself. */
    const double sizes = fabs(run->estimate[row]) + fabsf(z);
    *upper = z + slack * (1 + 0x1p-16) + sizes * 0x1p-21 + 1e-30;
    return z;
}

static double capped(double z, double cap) { return cap > 0 ? tanh(z / cap) * cap : z; }

/* A row whose reference is below this stays, capped, below `value` capped by more than rounding. */
static double least_of(double value, double cap)
{
    const double threshold = capped(value, cap);
    const double wanted = threshold - MARGIN * (fabs(threshold) + 1e-30);
    if (!(cap > 0)) return wanted;
    if (!(wanted > -cap)) return -INFINITY;
    const double z = cap * atanh(wanted / cap);
    return z - 1e-9 * fabs(z);
}

/* The best `count` of the spares after the second reading, in front. */
static void order_spares(hire_head_run *run, int64_t spares, int64_t count)
{
    int64_t n = 0;
    for (int64_t i = 0; i < spares; i++) {
        const float v = run->best_value[i];
        n = offer(run->best_value, run->best_row, n, count, v == v ? v : -INFINITY,
                  run->best_row[i]);
    }
}

/* Rows of tiles [from, to) that may reach `least`; returns how many. */
static int64_t may_reach(const hire_head *head, const hire_head_run *run, int64_t from, int64_t to,
                         float least, int32_t *row)
{
    int64_t n = 0;
    for (int64_t tile = from; tile < to; tile++) {
        if (run->tile_upper[tile] < least) continue;
        const int64_t end = tile * 16 + 16 < head->num_rows ? tile * 16 + 16 : head->num_rows;
        for (int64_t i = tile * 16; i < end; i++)
            if (!(run->upper[i] < least)) row[n++] = (int32_t)i;
    }
    return n;
}

/* Asks for what the second reading of a row reads: rows lie apart, and each would be waited for. A
 * macro: GCC drops calls of a function that only prefetches. */
#if defined(__GNUC__)
#define ASK_FOR(head, row) \
    do { \
        const int64_t bytes = hire_head_low_bytes((head)->width - (head)->num_loud); \
        for (int64_t at = 0; at < bytes; at += 64) \
            __builtin_prefetch((head)->low + (row) * bytes + at, 0, 2); \
        __builtin_prefetch((head)->low_error + (row), 0, 2); \
    } while (0)
#else
#define ASK_FOR(head, row) ((void)(row))
#endif

/* Reads on where a row may reach `least`; returns how many stored rows were read. */
static int64_t read_tiles(const hire_head *head, const hire_head_kernels *kernels,
                          const hire_head_run *run, int64_t from, float least, float *y,
                          uint8_t *rescored, int64_t *num_refined)
{
    const int64_t tiles = hire_whole(head->num_rows, 16) / 16;
    const int64_t to = from + TILES_AT_ONCE < tiles ? from + TILES_AT_ONCE : tiles;
    const int64_t end = to * 16 < head->num_rows ? to * 16 : head->num_rows;
    int32_t reading[16 * TILES_AT_ONCE];
    const int64_t n = may_reach(head, run, from, to, least, reading);
    int64_t num_exact = 0;
    memcpy(y + from * 16, run->estimate + from * 16, (size_t)(end - from * 16) * sizeof *y);
    for (int64_t i = 0; head->low != NULL && i < n && i < ROWS_AHEAD; i++)
        ASK_FOR(head, reading[i]);
    for (int64_t i = 0; i < n; i++) {
        const int64_t row = reading[i];
        if (head->low != NULL) {
            double upper;
            if (i + ROWS_AHEAD < n) ASK_FOR(head, reading[i + ROWS_AHEAD]);
            y[row] = refined(head, kernels, run, row, &upper);
            ++*num_refined;
            if (upper < least) continue;
        }
        y[row] = reference(head, kernels, run, row);
        if (rescored != NULL) rescored[row] = 1;
        num_exact++;
    }
    return num_exact;
}

/* Estimates, `count` of them exact and all others below those. */
static void write_estimates(const hire_head *head, const hire_head_run *run, int64_t count,
                            float *y, uint8_t *rescored)
{
    float least = INFINITY;
    for (int64_t i = 0; i < count; i++)
        least = run->best_value[i] < least ? run->best_value[i] : least;
    const float below = nextafterf(least, -INFINITY);
    for (int64_t row = 0; row < head->num_rows; row++)
        y[row] = run->estimate[row] < below ? run->estimate[row] : below;
    for (int64_t i = 0; i < count; i++) {
        y[run->best_row[i]] = run->best_value[i];
        if (rescored != NULL) rescored[run->best_row[i]] = 1;
    }
}

/* What the first row of the best must reach, -inf behind a NaN. */
static float threshold_of(const hire_head_run *run, int64_t count, double cap)
{
    float least = INFINITY;
    for (int64_t i = 0; i < count; i++)
        least = run->best_value[i] < least ? run->best_value[i] : least;
    const double wanted = least_of(least, cap);
    const float near = (float)wanted;
    return wanted == wanted ? (near > wanted ? nextafterf(near, -INFINITY) : near) : -INFINITY;
}

/* A row of x among those that go together: what it is to write, and what its best must reach. */
typedef struct {
    hire_head_run run;
    float *y;
    uint8_t *rescored; /* or NULL */
    float least;
} head_row;

/* The best `count` of a row, exact, by all threads; then each row's `least`. Where several rows read
 * the same weights, the weights are the outer loop. */
static void find_least(const hire_head *head, const hire_head_call *call,
                       const hire_head_kernels *kernels, head_row *const *rows, int64_t num_rows)
{
    const int64_t tiles = hire_whole(head->num_rows, 16) / 16, count = call->count;
    const int64_t spares = head->low != NULL ? spares_of(head, count) : count;
    TEAM_FOR(tile, tiles, 1)
        for (int64_t i = 0; i < num_rows; i++)
            kernels->estimate(head, &rows[i]->run, tile, tile + 1);
    TEAM_FOR(i, num_rows, 1) find_best(head, &rows[i]->run, spares);
    if (spares > count) {
        TEAM_FOR(unit, num_rows * spares, 1) {
            hire_head_run *run = &rows[unit / spares]->run;
            double upper;
            run->best_value[unit % spares] =
                refined(head, kernels, run, run->best_row[unit % spares], &upper);
        }
        TEAM_FOR(i, num_rows, 1) order_spares(&rows[i]->run, spares, count);
    }
    TEAM_FOR(unit, num_rows * count, 1) {
        hire_head_run *run = &rows[unit / count]->run;
        run->best_value[unit % count] =
            reference(head, kernels, run, run->best_row[unit % count]);
    }
    TEAM_FOR(i, num_rows, 1) {
        rows[i]->least = threshold_of(&rows[i]->run, count, call->cap);
        if (!call->certify)
            write_estimates(head, &rows[i]->run, count, rows[i]->y, rows[i]->rescored);
    }
}

/* Rows that are finite, all there are of a group, and what threads share beside them. */
typedef struct {
    const hire_head *head;
    const hire_head_call *call;
    const hire_head_kernels *kernels;
    head_row *const *rows;
    int64_t num_rows;
    int64_t taken; /* pieces of work that somebody does or has done */
    int64_t num_exact, num_refined;
} some_rows;

static void run_rows(void *context)
{
    some_rows *all = context;
    const int64_t tiles = hire_whole(all->head->num_rows, 16) / 16, num_rows = all->num_rows;
    const int64_t units = (tiles + TILES_AT_ONCE - 1) / TILES_AT_ONCE * num_rows;
    int64_t num_exact = 0, num_refined = 0, unit;
    find_least(all->head, all->call, all->kernels, all->rows, num_rows);
    if (!all->call->certify) return;
    while ((unit = team_add(&all->taken, 1)) < units) {
        const head_row *row = all->rows[unit % num_rows];
        num_exact += read_tiles(all->head, all->kernels, &row->run,
                                unit / num_rows * TILES_AT_ONCE, row->least, row->y,
                                row->rescored, &num_refined);
    }
    team_add(&all->num_exact, num_exact);
    team_add(&all->num_refined, num_refined);
}

static void count(const some_rows *all)
{
    const hire_head_call *call = all->call;
    const int64_t rows = all->num_rows, spares = spares_of(all->head, call->count);
    const int again = all->head->low != NULL && spares > call->count;
    call->counts[0] += call->certify ? all->num_exact : rows * call->count;
    call->counts[1] += all->num_refined + (again ? rows * spares : 0);
}

int64_t hire_head_logits(const hire_head *head, const hire_head_call *call, void *scratch,
                         int32_t num_threads, int32_t level)
{
    const hire_head_kernels *kernels = kernels_of(hire_head_level(level));
    head_row own[HIRE_ROWS], *rows[HIRE_ROWS];
    int64_t bad = 0;
    for (int64_t at = 0; at < call->num_rows;) {
        char *place = (char *)(((uintptr_t)scratch + 63) / 64 * 64);
        int64_t num = 0;
        for (; at < call->num_rows && num < HIRE_ROWS; at++) {
            head_row *row = own + num;
            row->y = call->y + at * head->num_rows;
            row->rescored = call->rescored == NULL ? NULL : call->rescored + at * head->num_rows;
            const int64_t bytes = cut_scratch(head, call->count, place, &row->run);
            call->finite[at] = (uint8_t)start(head, call->x + at * head->width, &row->run);
            bad += !call->finite[at];
            if (!call->finite[at]) continue; /* its place is the next one's */
            rows[num++] = row;
            place += bytes;
        }
        if (num == 0) continue;
        some_rows all = {head, call, kernels, rows, num, 0, 0, 0};
        team_run(num_threads, run_rows, &all);
        count(&all);
    }
    call->counts[2] += bad;
    return bad;
}
