/* The memory of a decode step, the team's and each thread's own; part of step.c. */

/* Rows of x are this far apart: zeros up to whole pairs of vectors. */
static int64_t padded(int64_t num) { return (num + 31) / 32 * 32; }

typedef struct {
    const hire_kernels *kernels;
    const hire_step_kernels *step;
    int64_t num_threads, num_rows, most;
    const int64_t *unseen; /* as hire_step_sequences takes it; NULL: rows follow one another */
    int64_t seen;
    int64_t width, heads, head_dim, neurons; /* the largest there are, padded */
    float *projected; /* [Q, heads] queries, keys and values side by side */
    float *attended;  /* [Q, heads] */
    float *output;    /* [Q, width] of attention or the FFN */
    float *gate;      /* [Q, neurons] */
    float *up;        /* [Q, neurons] */
    char *ffn;        /* [HIRE_ROWS, ffn_bytes]: scratch memory of the largest sparse FFN */
    int64_t ffn_bytes;
    char *own;        /* own_bytes for each thread */
    int64_t own_bytes;
    int bad[HIRE_ROWS][2]; /* of each row in a sparse FFN */
    int64_t *taken;        /* [num_blocks]: candidates of sparse FFNs with a level */
} hire_job;

/* A thread's own memory. */
typedef struct {
    float *x;      /* [Q, width] the residual stream */
    float *normed; /* [Q, width] */
    char *split;   /* of the rows that a matrix of codes is multiplied with */
    float *query;  /* [HIRE_STEP_HEADS, head_dim] */
    float *out;    /* [HIRE_STEP_HEADS, head_dim] */
    float *score;  /* [HIRE_STEP_HEADS, most + 16] */
    char *ffn;     /* as much as a row's shared one, for what a single row begins with */
} hire_own;

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* The next piece of `base`, which is NULL while sizes are summed. */
static void *take(char *base, int64_t *used, int64_t bytes)
{
    char *place = base == NULL ? NULL : base + *used;
    *used += (bytes + 63) / 64 * 64;
    return place;
}

static float *floats(char *base, int64_t *used, int64_t count)
{
    return take(base, used, count * (int64_t)sizeof(float));
}

/* Rows of x, and where what `split` makes of them goes: split_bytes bytes. */
static int64_t split_bytes(int64_t stride, int64_t num_rows)
{
    return num_rows * (4 * stride + stride / 32 * (int64_t)(sizeof(float) + 4 * sizeof(int32_t)));
}

static hire_inputs inputs_at(const float *x, int64_t stride, int64_t num_rows, char *split)
{
    hire_inputs in = {x, stride, num_rows, (int8_t *)split, NULL, NULL};
    in.sum = (int32_t *)(split + 4 * stride * num_rows);
    in.scale = (float *)(in.sum + 4 * (stride / 32) * num_rows);
    return in;
}

static int64_t cut_own(const hire_job *job, char *base, hire_own *own)
{
    int64_t used = 0;
    own->x = floats(base, &used, HIRE_STEP_ROWS * job->width);
    own->normed = floats(base, &used, HIRE_STEP_ROWS * job->width);
    own->split = take(base, &used, split_bytes(larger(job->width, job->heads), HIRE_STEP_ROWS));
    own->query = floats(base, &used, HIRE_STEP_HEADS * job->head_dim);
    own->out = floats(base, &used, HIRE_STEP_HEADS * job->head_dim);
    own->score = floats(base, &used, HIRE_STEP_HEADS * (job->most + 16));
    own->ffn = take(base, &used, job->ffn_bytes);
    return used + 64; /* no cache line of two threads */
}

/* Sizes of the largest block, and `base` cut into pieces unless it is NULL; returns all bytes. */
static int64_t cut_job(const hire_block *blocks, int64_t num_blocks, int64_t most,
                       int32_t num_threads, char *base, hire_job *job)
{
    int64_t used = 0;
    memset(job, 0, sizeof *job);
    job->most = most;
    for (int64_t i = 0; i < num_blocks; i++) {
        const hire_block *b = blocks + i;
        job->width = larger(job->width, padded(b->width));
        job->heads = larger(job->heads, padded((b->heads + 2 * b->kv_heads) * b->head_dim));
        job->head_dim = larger(job->head_dim, padded(b->head_dim));
        job->neurons = larger(job->neurons, padded(b->up.outputs));
        if (b->ffn != NULL) {
            hire_run run;
            job->ffn_bytes = larger(job->ffn_bytes, hire_cut_scratch(b->ffn, NULL, &run));
        }
    }
    job->projected = floats(base, &used, HIRE_STEP_ROWS * job->heads);
    job->attended = floats(base, &used, HIRE_STEP_ROWS * job->heads);
    job->output = floats(base, &used, HIRE_STEP_ROWS * job->width);
    job->gate = floats(base, &used, HIRE_STEP_ROWS * job->neurons);
    job->up = floats(base, &used, HIRE_STEP_ROWS * job->neurons);
    job->ffn = take(base, &used, HIRE_ROWS * job->ffn_bytes);
    job->taken = take(base, &used, num_blocks * (int64_t)sizeof *job->taken);
    hire_own own;
    job->own_bytes = cut_own(job, NULL, &own);
    job->own = take(base, &used, num_threads * job->own_bytes);
    return used;
}
