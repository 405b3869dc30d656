/* llama.cpp behind a line protocol: what `hireconvert bench --rival FILE.gguf` talks to.
 *
 *   llama_rival quantize SOURCE.gguf TARGET.gguf TYPE [THREADS [IMPORTANCE]]
 *   llama_rival serve MODEL.gguf THREADS
 *
 * `serve` prints one JSON line when the model is loaded, then one for each line it reads:
 *
 *   threads N                     -> {"threads": N}
 *   decode BATCH TOKENS ID...     -> {"prefill_ms": x, "token_ms": [..]}   a prompt, then greedy tokens
 *   logits PATH ID...             -> {"rows": T, "vocabulary": V}   float32 [T, V] in PATH
 *   memory                        -> {"peak_bytes": n, "resident_bytes": n}
 *
 * Times are taken around llama_decode and llama_synchronize alone. What cannot be done gives
 * {"error": ".."}; the program ends with its input. Everything it logs itself goes to stderr.
 */
#define _GNU_SOURCE
#include <libgen.h>
#include <limits.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "ggml-backend.h"
#include "gguf.h"
#include "llama.h"

#define MOST_BATCH 64

typedef struct {
    struct llama_model *model;
    struct llama_context *context;
    int32_t threads, vocabulary;
    uint32_t tokens, batch, outputs; /* what `context` has room for */
} rival;

static double now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return 1e3 * (double)now.tv_sec + 1e-6 * (double)now.tv_nsec;
}

static void fail(const char *message) {
    printf("{\"error\": \"%s\"}\n", message);
}

static void print_text(const char *text) {
    putchar('"');
    for (; *text; text++)
        if (*text == '"' || *text == '\\')
            printf("\\%c", *text);
        else if ((unsigned char)*text >= 32)
            putchar(*text);
    putchar('"');
}

/* The kernels lie beside this program, one library a kind of processor; the best that runs is taken. */
static void load_kernels(void) {
    char path[PATH_MAX];
    ssize_t length = readlink("/proc/self/exe", path, sizeof path - 1);
    path[length < 0 ? 0 : length] = 0;
    ggml_backend_load_all_from_path(dirname(path));
    llama_backend_init();
}

/* Bytes of the weights one token reads: all tensors but the rows of tables that are looked up. */
static uint64_t bytes_per_token(const char *path) {
    struct gguf_init_params params = {.no_alloc = true, .ctx = NULL};
    struct gguf_context *file = gguf_init_from_file(path, params);
    if (file == NULL)
        return 0;
    bool untied = gguf_find_tensor(file, "output.weight") >= 0;
    uint64_t total = 0;
    for (int64_t i = 0; i < gguf_get_n_tensors(file); i++) {
        const char *name = gguf_get_tensor_name(file, i);
        bool looked_up = strcmp(name, "position_embd.weight") == 0 ||
                         (untied && strcmp(name, "token_embd.weight") == 0);
        total += looked_up ? 0 : gguf_get_tensor_size(file, i);
    }
    gguf_free(file);
    return total;
}

/* A context with room for `tokens` of each of `batch` sequences. */
static bool make_room(rival *r, uint32_t tokens, uint32_t batch, uint32_t outputs) {
    if (r->context && r->tokens >= tokens && r->batch == batch && r->outputs >= outputs) {
        llama_memory_clear(llama_get_memory(r->context), true);
        return true;
    }
    if (r->context)
        llama_free(r->context);
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = tokens * batch;
    params.n_batch = tokens > batch ? tokens : batch;
    params.n_seq_max = batch;
    params.n_outputs_max = outputs;
    params.n_threads = params.n_threads_batch = r->threads;
    params.no_perf = true;
    r->context = llama_init_from_model(r->model, params);
    r->tokens = tokens, r->batch = batch, r->outputs = outputs;
    return r->context != NULL;
}

static int32_t best_token(const float *logits, int32_t count) {
    int32_t best = 0;
    for (int32_t i = 1; i < count; i++)
        if (logits[i] > logits[best])
            best = i;
    return best;
}

static void put(struct llama_batch *batch, int32_t token, int32_t place, int32_t row, bool wanted) {
    int32_t i = batch->n_tokens++;
    batch->token[i] = token;
    batch->pos[i] = place;
    batch->n_seq_id[i] = 1;
    batch->seq_id[i][0] = row;
    batch->logits[i] = wanted;
}

static double timed_decode(struct llama_context *context, struct llama_batch batch) {
    double start = now_ms();
    if (llama_decode(context, batch) != 0)
        return -1;
    llama_synchronize(context);
    return now_ms() - start;
}

static void decode(rival *r, int32_t rows, int32_t tokens, const int32_t *ids, int32_t length) {
    uint32_t room = (uint32_t)(length + tokens);
    if (!make_room(r, (room + 255) / 256 * 256, (uint32_t)rows, (uint32_t)rows))
        return fail("no memory for this context");
    struct llama_batch batch = llama_batch_init(length > rows ? length : rows, 0, 1);
    int32_t next[MOST_BATCH];
    double prefill = 0, spent = 0;
    for (int32_t row = 0; row < rows && spent >= 0; row++) {
        batch.n_tokens = 0;
        for (int32_t i = 0; i < length; i++)
            put(&batch, ids[i], i, row, i + 1 == length);
        prefill += spent = timed_decode(r->context, batch);
        next[row] = best_token(llama_get_logits_ith(r->context, -1), r->vocabulary);
    }
    if (spent < 0) {
        llama_batch_free(batch);
        return fail("llama_decode failed on the prompt");
    }
    printf("{\"prefill_ms\": %.4f, \"token_ms\": [", prefill);
    for (int32_t t = 0; t < tokens && spent >= 0; t++) {
        batch.n_tokens = 0;
        for (int32_t row = 0; row < rows; row++)
            put(&batch, next[row], length + t, row, true);
        spent = timed_decode(r->context, batch);
        printf("%s%.4f", t ? ", " : "", spent);
        for (int32_t row = 0; row < rows && spent >= 0; row++)
            next[row] = best_token(llama_get_logits_ith(r->context, row), r->vocabulary);
    }
    printf("]}\n");
    llama_batch_free(batch);
}

static void logits(rival *r, const char *path, const int32_t *ids, int32_t length) {
    if (!make_room(r, (uint32_t)length, 1, (uint32_t)length))
        return fail("no memory for this context");
    struct llama_batch batch = llama_batch_init(length, 0, 1);
    for (int32_t i = 0; i < length; i++)
        put(&batch, ids[i], i, 0, true);
    double spent = timed_decode(r->context, batch);
    llama_batch_free(batch);
    if (spent < 0)
        return fail("llama_decode failed on the window");
    FILE *file = fopen(path, "wb");
    if (file == NULL)
        return fail("the file for the logits cannot be written");
    size_t written = 0;
    for (int32_t i = 0; i < length; i++)
        written += fwrite(llama_get_logits_ith(r->context, i), sizeof(float),
                          (size_t)r->vocabulary, file);
    if (fclose(file) != 0 || written != (size_t)length * (size_t)r->vocabulary)
        return fail("the file for the logits could not be written whole");
    printf("{\"rows\": %d, \"vocabulary\": %d}\n", length, r->vocabulary);
}

static void memory(void) {
    FILE *status = fopen("/proc/self/status", "r");
    char line[256];
    long long peak = 0, resident = 0;
    while (status && fgets(line, sizeof line, status)) {
        sscanf(line, "VmHWM: %lld", &peak);
        sscanf(line, "VmRSS: %lld", &resident);
    }
    if (status)
        fclose(status);
    printf("{\"peak_bytes\": %lld, \"resident_bytes\": %lld}\n", peak * 1024, resident * 1024);
}

/* The numbers of a line from `text` on, in `ids` (room for as many as it has letters). */
static int32_t read_numbers(const char *text, int32_t vocabulary, int32_t *ids) {
    int32_t count = 0;
    char *end;
    for (;; text = end) {
        long value = strtol(text, &end, 10);
        if (end == text)
            return count;
        if (value < 0 || value >= vocabulary)
            return -1;
        ids[count++] = (int32_t)value;
    }
}

static void answer(rival *r, char *line, int32_t *ids) {
    int32_t rows = 0, tokens = 0, threads = 0;
    int used = 0;
    char path[PATH_MAX];
    if (sscanf(line, "threads %d", &threads) == 1 && threads > 0) {
        r->threads = threads;
        if (r->context)
            llama_set_n_threads(r->context, threads, threads);
        printf("{\"threads\": %d}\n", threads);
    } else if (sscanf(line, "decode %d %d%n", &rows, &tokens, &used) == 2) {
        int32_t length = read_numbers(line + used, r->vocabulary, ids);
        if (rows < 1 || rows > MOST_BATCH || tokens < 1 || length < 1)
            return fail("decode: numbers out of range");
        decode(r, rows, tokens, ids, length);
    } else if (sscanf(line, "logits %4095s%n", path, &used) == 1) {
        int32_t length = read_numbers(line + used, r->vocabulary, ids);
        if (length < 1)
            return fail("logits: numbers out of range");
        logits(r, path, ids, length);
    } else if (strncmp(line, "memory", 6) == 0) {
        memory();
    } else {
        fail("no such command");
    }
}

static int serve(const char *path, int32_t threads) {
    load_kernels();
    double start = now_ms();
    rival r = {.threads = threads};
    r.model = llama_model_load_from_file(path, llama_model_default_params());
    if (r.model == NULL) {
        fail("llama.cpp cannot load this file");
        fflush(stdout);
        return 1;
    }
    r.vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(r.model));
    char description[256];
    llama_model_desc(r.model, description, sizeof description);
    printf("{\"version\": ");
    print_text(llama_version());
    printf(", \"system\": ");
    print_text(llama_print_system_info());
    printf(", \"description\": ");
    print_text(description);
    printf(", \"load_ms\": %.1f, \"bytes_per_token\": %llu, \"vocabulary\": %d}\n",
           now_ms() - start, (unsigned long long)bytes_per_token(path), r.vocabulary);
    fflush(stdout);
    char *line = NULL;
    size_t room = 0;
    while (getline(&line, &room, stdin) >= 0) {
        int32_t *ids = malloc((room + 1) * sizeof *ids);
        if (ids)
            answer(&r, line, ids);
        else
            fail("no memory for this line");
        free(ids);
        fflush(stdout);
    }
    free(line);
    if (r.context)
        llama_free(r.context);
    llama_model_free(r.model);
    return 0;
}

/* Entries "NAME COUNT VALUE...", ended by one without a name; NULL when the file is not such. They are
 * needed until the program ends. */
static struct llama_model_imatrix_data *read_importance(const char *path) {
    enum { most_entries = 1 << 16, most_values = 1 << 24 };
    struct llama_model_imatrix_data *entries = calloc(most_entries, sizeof *entries);
    FILE *file = fopen(path, "r");
    char name[256];
    size_t count, number = 0;
    while (file && entries && fscanf(file, "%255s %zu", name, &count) == 2) {
        float *values = count <= most_values ? malloc(count * sizeof *values) : NULL;
        if (!values || number + 1 == most_entries)
            return NULL;
        for (size_t i = 0; i < count; i++)
            if (fscanf(file, "%f", values + i) != 1)
                return NULL;
        entries[number++] = (struct llama_model_imatrix_data){strdup(name), values, count};
    }
    return file && number > 0 && feof(file) ? entries : NULL;
}

static int quantize(const char *source, const char *target, const char *type, int32_t threads,
                    const char *importance) {
    static const struct { const char *name; enum llama_ftype type; } known[] = {
        {"F32", LLAMA_FTYPE_ALL_F32},           {"BF16", LLAMA_FTYPE_MOSTLY_BF16},
        {"Q8_0", LLAMA_FTYPE_MOSTLY_Q8_0},      {"Q6_K", LLAMA_FTYPE_MOSTLY_Q6_K},
        {"Q5_0", LLAMA_FTYPE_MOSTLY_Q5_0},      {"Q5_1", LLAMA_FTYPE_MOSTLY_Q5_1},
        {"Q5_K_M", LLAMA_FTYPE_MOSTLY_Q5_K_M},  {"Q4_K_M", LLAMA_FTYPE_MOSTLY_Q4_K_M},
        {"Q4_0", LLAMA_FTYPE_MOSTLY_Q4_0},      {"Q4_1", LLAMA_FTYPE_MOSTLY_Q4_1},
        {"IQ4_NL", LLAMA_FTYPE_MOSTLY_IQ4_NL},  {"IQ4_XS", LLAMA_FTYPE_MOSTLY_IQ4_XS},
        {"Q3_K_M", LLAMA_FTYPE_MOSTLY_Q3_K_M},  {"Q2_K", LLAMA_FTYPE_MOSTLY_Q2_K},
    };
    load_kernels();
    struct llama_model_quantize_params params = llama_model_quantize_default_params();
    params.nthread = threads;
    if (importance && !(params.imatrix = read_importance(importance))) {
        fprintf(stderr, "no importance of channels in %s\n", importance);
        return 2;
    }
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (strcmp(known[i].name, type) == 0) {
            params.ftype = known[i].type;
            return llama_model_quantize(source, target, &params) == 0 ? 0 : 1;
        }
    fprintf(stderr, "no such type: %s\n", type);
    return 2;
}

int main(int count, char **arguments) {
    if (count >= 5 && strcmp(arguments[1], "quantize") == 0)
        return quantize(arguments[2], arguments[3], arguments[4],
                        count > 5 ? atoi(arguments[5]) : 0, count > 6 ? arguments[6] : NULL);
    if (count == 4 && strcmp(arguments[1], "serve") == 0 && atoi(arguments[3]) > 0)
        return serve(arguments[2], atoi(arguments[3]));
    fprintf(stderr, "llama_rival serve MODEL THREADS | quantize SOURCE TARGET TYPE [THREADS [IMPORTANCE]]\n");
    return 2;
}
