/* A decode step: one team of threads goes through all decoder layers together. Each thread keeps
 * the residual stream and its norms for itself (they cost less than a barrier); what is shared is
 * written by one thread each and read behind a barrier. */
#include "step.h"
#include "team.h"

#include <stddef.h>
#include <string.h>

enum { ROWS_AT_ONCE = 16 }; /* of a matrix, to a piece of work */

#include "step_job.h"

int64_t hire_step_scratch(const hire_block *blocks, int64_t num_blocks, int64_t most,
                          int32_t num_threads)
{
    hire_job job;
    return cut_job(blocks, num_blocks, most, num_threads, NULL, &job) + 64;
}

const hire_step_kernels *hire_step_kernels_of(int level)
{
#ifdef HIRE_X86
    if (level == HIRE_AVX512) return &hire_step_avx512;
    if (level == HIRE_AVX2) return &hire_step_avx2;
#elif defined(HIRE_ARM)
    if (level == HIRE_DOTPROD) return &hire_step_dotprod;
    if (level == HIRE_NEON) return &hire_step_neon;
#endif
    (void)level;
    return &hire_step_portable;
}

/* ------------------------------------------------------------------ pieces of a layer */

static void zero_behind(float *x, int64_t num)
{
    for (int64_t j = num; j < padded(num); j++) x[j] = 0.0f;
}

static void norm_rows(const hire_job *job, const float *x, int64_t num, const float *weight,
                      double eps, float *out)
{
    for (int64_t i = 0; i < job->num_rows; i++) {
        job->step->norm(x + i * job->width, weight, eps, num, out + i * job->width);
        zero_behind(out + i * job->width, num);
    }
}

static int64_t type_bytes(int64_t type) { return type == HIRE_FLOAT32 ? 4 : 2; }

/* Where a head of row i begins in the keys and values of a layer, in elements. */
static int64_t head_start(const hire_job *job, const hire_block *b, const hire_past *past,
                          int64_t i, int64_t head)
{
    const int64_t sequence = job->unseen == NULL ? 0 : i;
    return (sequence * b->kv_heads + head) * past->head_stride;
}

/* The position that row i writes. */
static int64_t position(const hire_job *job, const hire_past *past, int64_t i)
{
    return past->first + past->length + (job->unseen == NULL ? i : 0);
}

/* The first position of a layer that row i may see. */
static int64_t first_seen(const hire_job *job, const hire_past *past, int64_t i)
{
    if (job->unseen == NULL) return past->first;
    const int64_t unseen = job->unseen[i] - (job->seen - past->length);
    return past->first + (unseen > 0 ? unseen : 0);
}

/* One head of queries, keys or values: its rows, its norm, its angles; keys and values go to the
 * cache. */
static void project(const hire_job *job, const hire_block *b, const hire_past *past,
                    const float *const *angles, const hire_inputs *in, int64_t unit)
{
    const int64_t size = b->head_dim, heads = b->heads, pairs = b->kv_heads;
    const int part = unit < heads ? 0 : unit < heads + pairs ? 1 : 2;
    const int64_t head = part == 0 ? unit : (unit - heads) % pairs;
    const hire_matrix *matrix = part == 0 ? &b->q : part == 1 ? &b->k : &b->v;
    const float *norm = part == 0 ? b->q_norm : part == 1 ? b->k_norm : NULL;
    float *out = job->projected + (unit - head) * size;
    job->step->matrix(matrix, in, head * size, (head + 1) * size, out, job->heads);
    for (int64_t i = 0; i < job->num_rows; i++) {
        float *row = out + i * job->heads + head * size;
        if (norm != NULL) job->step->norm(row, norm, b->eps, size, row);
        if (part < 2)
            job->step->rotate(row, angles[0] + i * b->rotary, angles[1] + i * b->rotary,
                              b->rotary);
        const int64_t place = head_start(job, b, past, i, head) + position(job, past, i) * size;
        if (part > 0)
            job->step->store(part == 1 ? past->keys : past->values, place, row, size,
                             (int)b->cache_type);
    }
}

/* How many heads that share keys and values go together: more read less, but every thread should
 * have as much to do. No number depends on it. */
static int64_t heads_together(const hire_job *job, const hire_block *b)
{
    const int64_t group = b->heads / b->kv_heads;
    int64_t pieces = (group + HIRE_STEP_HEADS - 1) / HIRE_STEP_HEADS;
    while (pieces < group && b->kv_heads * pieces % job->num_threads != 0 &&
           b->kv_heads * pieces < 4 * job->num_threads)
        pieces++;
    return (group + pieces - 1) / pieces;
}

/* Piece `unit` of the heads: up to heads_together of those that share keys and values. */
static void attend(const hire_job *job, const hire_block *b, const hire_past *past, hire_own *own,
                   int64_t unit)
{
    const int64_t size = b->head_dim, group = b->heads / b->kv_heads;
    const int64_t most = heads_together(job, b);
    const int64_t pieces = (group + most - 1) / most, pair = unit / pieces;
    const int64_t first = unit % pieces * most;
    const int64_t heads = group - first < most ? group - first : most;
    for (int64_t i = 0; i < job->num_rows; i++) {
        const int64_t start = head_start(job, b, past, i, pair) * type_bytes(b->cache_type);
        const int64_t to = position(job, past, i) + 1;
        int64_t from = first_seen(job, past, i);
        if (b->window > 0 && to - b->window > from) from = to - b->window;
        const int64_t place = i * job->heads + (pair * group + first) * size;
        for (int64_t h = 0; h < heads; h++) {
            float *query = own->query + h * job->head_dim;
            memcpy(query, job->projected + place + h * size, (size_t)size * sizeof *query);
            zero_behind(query, size);
        }
        job->step->attend(b, heads, own->query, job->head_dim, (const char *)past->keys + start,
                          (const char *)past->values + start, from, to, own->score,
                          job->most + 16, own->out);
        for (int64_t h = 0; h < heads; h++)
            memcpy(job->attended + place + h * size, own->out + h * job->head_dim,
                   (size_t)size * sizeof(float));
    }
}

/* Rows of x for some matrices. Each thread splits them for itself, which costs less than a barrier.
 * Matrices of codes among them have the same blocks. */
static hire_inputs inputs_of(const hire_job *job, const hire_own *own, const float *x,
                             int64_t stride, const hire_matrix *matrices, int num)
{
    const hire_inputs in = inputs_at(x, stride, job->num_rows, own->split);
    for (int i = 0; i < num; i++)
        if (matrices[i].type >= HIRE_INT8) {
            job->step->split(matrices + i, &in);
            break;
        }
    return in;
}

/* Rows [at, at + ROWS_AT_ONCE) of a matrix, where it has them. */
static void piece(const hire_job *job, const hire_matrix *matrix, const hire_inputs *in,
                  int64_t at, float *y, int64_t y_stride)
{
    const int64_t to = at + ROWS_AT_ONCE < matrix->outputs ? at + ROWS_AT_ONCE : matrix->outputs;
    job->step->matrix(matrix, in, at, to, y, y_stride);
}

static void hidden_piece(const hire_job *job, const hire_block *b, const hire_inputs *in,
                         int64_t at)
{
    const int64_t left = b->up.outputs - at, num = left < ROWS_AT_ONCE ? left : ROWS_AT_ONCE;
    const int gated = b->gate.rows != NULL;
    if (gated) piece(job, &b->gate, in, at, job->gate, job->neurons);
    piece(job, &b->up, in, at, job->up, job->neurons);
    for (int64_t i = 0; i < job->num_rows; i++) {
        const int64_t place = i * job->neurons + at;
        job->step->activate((int)b->activation, gated ? job->gate + place : NULL, job->up + place,
                            num);
    }
}

/* ------------------------------------------------------------------ a layer, by a whole team */

static void attention(const hire_job *job, const hire_block *b, const hire_past *past,
                      const float *const *angles, hire_own *own)
{
    norm_rows(job, own->x, b->width, b->attention_norm, b->eps, own->normed);
    const hire_matrix of_x[3] = {b->q, b->k, b->v};
    const hire_inputs x = inputs_of(job, own, own->normed, job->width, of_x, 3);
    TEAM_FOR(unit, b->heads + 2 * b->kv_heads, 1)
        project(job, b, past, angles, &x, unit);
    const int64_t group = b->heads / b->kv_heads, most = heads_together(job, b);
    const int64_t units = b->kv_heads * ((group + most - 1) / most);
    TEAM_FOR(unit, units, 1) {
        attend(job, b, past, own, unit);
        if (unit + 1 == units)
            for (int64_t i = 0; i < job->num_rows; i++)
                zero_behind(job->attended + i * job->heads, b->heads * b->head_dim);
    }
    const hire_inputs heads = inputs_of(job, own, job->attended, job->heads, &b->o, 1);
    TEAM_FOR(at, b->o.outputs, ROWS_AT_ONCE)
        piece(job, &b->o, &heads, at, job->output, job->width);
}

static void dense_ffn(const hire_job *job, const hire_block *b, const hire_own *own)
{
    const float *hidden = b->gate.rows != NULL ? job->gate : job->up;
    const hire_inputs x = {own->normed, job->width, job->num_rows, NULL, NULL, NULL};
    const hire_inputs h = {hidden, job->neurons, job->num_rows, NULL, NULL, NULL};
    TEAM_FOR(at, b->up.outputs, ROWS_AT_ONCE) {
        hidden_piece(job, b, &x, at);
        if (at + ROWS_AT_ONCE >= b->up.outputs)
            for (int64_t i = 0; i < job->num_rows; i++)
                zero_behind((float *)hidden + i * job->neurons, b->up.outputs);
    }
    TEAM_FOR(at, b->down.outputs, ROWS_AT_ONCE)
        piece(job, &b->down, &h, at, job->output, job->width);
}

/* What rows [at, at + num) begin with: the predictor's input in its forms. A single row each thread
 * makes for itself, which costs less than a barrier; several are shared out. */
static void start_rows(const hire_job *job, const hire_layer *layer, const hire_own *own,
                       hire_run *runs, int64_t at, int64_t num)
{
    const float *x = own->normed + at * job->width;
    if (num == 1) {
        const hire_run shared = runs[0];
        hire_cut_scratch(layer, own->ffn, runs);
        runs->z = shared.z;
        runs->score = shared.score;
        runs->value = shared.value;
        runs->h = shared.h;
        runs->exact = shared.exact;
        runs->index = shared.index;
        runs->chosen = shared.chosen;
        runs->spare = shared.spare;
        runs->partial = shared.partial;
        runs->together = shared.together;
        runs->taken = shared.taken;
        runs->square = shared.square;
        job->kernels->start(layer, x, HIRE_FLOAT32, runs);
        return;
    }
    TEAM_FOR(i, num, 1)
        job->kernels->start(layer, x + i * job->width, HIRE_FLOAT32, runs + i);
}

/* 1 where every one of rows [at, at + num), at most HIRE_ROWS, was finite; their candidates are added
 * to *taken where these are as many as reach a level. */
static int sparse_rows(hire_job *job, const hire_layer *layer, const hire_own *own, int64_t at,
                       int64_t num, int64_t *taken)
{
    const int64_t pieces = layer->stride / 32;
    hire_run runs[HIRE_ROWS];
    for (int64_t i = 0; i < num; i++) {
        hire_cut_scratch(layer, job->ffn + i * job->ffn_bytes, runs + i);
        runs[i].bad = job->bad[i];
    }
    start_rows(job, layer, own, runs, at, num);
    hire_rows_of_team(layer, job->kernels, runs, num);
    for (int64_t i = 0; i < num; i++)
        if (job->bad[i][0] || job->bad[i][1]) return 0;
    if (layer->level != NULL && team_number() == 0)
        for (int64_t i = 0; i < num; i++) *taken += hire_taken(runs + i);
    TEAM_FOR(unit, num * pieces, 1) {
        const int64_t i = unit / pieces, from = unit % pieces * 32;
        job->step->sum_pieces(layer, runs + i, from, from + 32,
                              job->output + (at + i) * job->width);
    }
    return 1;
}

/* 1 where every row was finite. */
static int sparse_ffn(hire_job *job, const hire_layer *layer, const hire_own *own, int64_t *taken)
{
    for (int64_t at = 0; at < job->num_rows; at += HIRE_ROWS) {
        const int64_t left = job->num_rows - at, num = left < HIRE_ROWS ? left : HIRE_ROWS;
        if (!sparse_rows(job, layer, own, at, num, taken)) return 0;
    }
    return 1;
}

/* What a part of the layer put out goes onto the residual stream, after its norm if it has one. */
static void add_output(const hire_job *job, const hire_block *b, const float *norm, hire_own *own)
{
    const float *output = job->output;
    if (norm != NULL) {
        norm_rows(job, output, b->width, norm, b->eps, own->normed);
        output = own->normed;
    }
    for (int64_t i = 0; i < job->num_rows; i++)
        job->kernels->add(own->x + i * job->width, output + i * job->width, b->width);
}

/* Every thread of the team runs this; -1, or the block that met NaN or inf. */
static int64_t all_layers(hire_job *job, const hire_block *blocks, int64_t num_blocks,
                          const hire_past *pasts, const float *const *angles, hire_own *own)
{
    for (int64_t l = 0; l < num_blocks; l++) {
        const hire_block *b = blocks + l;
        attention(job, b, pasts + l, angles + 2 * b->rope, own);
        add_output(job, b, b->attended_norm, own);
        norm_rows(job, own->x, b->width, b->ffn_norm, b->eps, own->normed);
        if (b->ffn == NULL)
            dense_ffn(job, b, own);
        else if (!sparse_ffn(job, b->ffn, own, job->taken + l))
            return l;
        add_output(job, b, b->ffn_out_norm, own);
    }
    return -1;
}

/* ------------------------------------------------------------------ calls */

static char *aligned(void *scratch) { return (char *)(((uintptr_t)scratch + 63) / 64 * 64); }

static void count(const hire_block *blocks, int64_t num_blocks, int64_t num_rows,
                  const int64_t *taken)
{
    for (int64_t l = 0; l < num_blocks; l++) {
        const hire_block *b = blocks + l;
        if (b->counts == NULL) continue;
        b->counts[0] += 1;
        b->counts[1] += num_rows;
        if (b->ffn != NULL) {
            hire_count(b->ffn, num_rows, taken[l], b->counts);
            continue;
        }
        b->counts[2] += num_rows * b->up.outputs;
        b->counts[3] += num_rows * b->up.outputs;
    }
}

/* A call, which every thread of the team runs. */
typedef struct {
    hire_job *job;
    const hire_block *blocks;
    int64_t num_blocks;
    const hire_past *pasts;
    const float *const *angles;
    float *x;
    int64_t bad; /* -1, or the block that met NaN or inf */
} hire_call;

static void run_call(void *context)
{
    hire_call *call = context;
    hire_job *job = call->job;
    const int64_t width = call->blocks[0].width;
    hire_own own;
    cut_own(job, job->own + team_number() * job->own_bytes, &own);
    for (int64_t i = 0; i < job->num_rows; i++)
        memcpy(own.x + i * job->width, call->x + i * width, (size_t)width * sizeof(float));
    team_barrier();
    const int64_t bad =
        all_layers(job, call->blocks, call->num_blocks, call->pasts, call->angles, &own);
    if (team_number() != 0) return;
    call->bad = bad;
    for (int64_t i = 0; i < job->num_rows; i++)
        memcpy(call->x + i * width, own.x + i * job->width, (size_t)width * sizeof(float));
}

int64_t hire_step_sequences(const hire_block *blocks, int64_t num_blocks, const hire_past *pasts,
                            const float *const *angles, float *x, int64_t num_rows, void *scratch,
                            int64_t most, const float *last_norm, double eps, int32_t num_threads,
                            int32_t level, const int64_t *unseen, int64_t seen)
{
    const int64_t width = blocks[0].width;
    hire_job job;
    level = hire_level_at_most(level);
    cut_job(blocks, num_blocks, most, num_threads, aligned(scratch), &job);
    job.kernels = hire_kernels_of(level);
    job.step = hire_step_kernels_of(level);
    job.num_rows = num_rows;
    job.num_threads = num_threads;
    memset(job.taken, 0, (size_t)num_blocks * sizeof *job.taken);
    job.unseen = unseen;
    job.seen = seen;
    hire_call call = {&job, blocks, num_blocks, pasts, angles, x, -1};
    team_run(num_threads, run_call, &call);
    if (call.bad >= 0) return call.bad;
    if (!job.step->finite(x, num_rows * width)) return num_blocks - 1;
    count(blocks, num_blocks, num_rows, job.taken);
    if (last_norm != NULL)
        for (int64_t i = 0; i < num_rows; i++)
            job.step->norm(x + i * width, last_norm, eps, width, x + i * width);
    return -1;
}

int64_t hire_step(const hire_block *blocks, int64_t num_blocks, const hire_past *pasts,
                  const float *const *angles, float *x, int64_t num_rows, void *scratch,
                  int64_t most, const float *last_norm, double eps, int32_t num_threads,
                  int32_t level)
{
    return hire_step_sequences(blocks, num_blocks, pasts, angles, x, num_rows, scratch, most,
                               last_norm, eps, num_threads, level, NULL, 0);
}

typedef struct {
    hire_job job;
    const hire_matrix *matrix;
    hire_inputs in;
    float *y;
} matvec_call;

static void run_matvec(void *context)
{
    const matvec_call *call = context;
    const hire_matrix *matrix = call->matrix;
    TEAM_FOR(at, matrix->outputs, ROWS_AT_ONCE)
        piece(&call->job, matrix, &call->in, at, call->y, matrix->outputs);
}

int64_t hire_matvec_scratch(const hire_matrix *matrix, int64_t num_rows)
{
    const int64_t stride = padded(matrix->inputs);
    return 64 + num_rows * stride * (int64_t)sizeof(float) + split_bytes(stride, num_rows);
}

void hire_matvec(const hire_matrix *matrix, const float *x, float *y, int64_t num_rows,
                 void *scratch, int32_t num_threads, int32_t level)
{
    const int64_t stride = padded(matrix->inputs);
    float *rows = (float *)aligned(scratch);
    matvec_call call = {.matrix = matrix, .y = y};
    call.in = inputs_at(rows, stride, num_rows, (char *)(rows + num_rows * stride));
    call.job.step = hire_step_kernels_of(hire_level_at_most(level));
    for (int64_t i = 0; i < num_rows; i++) {
        memcpy(rows + i * stride, x + i * matrix->inputs,
               (size_t)matrix->inputs * sizeof(float));
        zero_behind(rows + i * stride, matrix->inputs);
    }
    if (matrix->type >= HIRE_INT8) call.job.step->split(matrix, &call.in);
    team_run(num_threads, run_matvec, &call);
}
