/* Threads that share the packing. */
#include "pack.h"
#include "team.h"

static const hire_packers *packers_of(int level)
{
#ifdef HIRE_X86
    if (level == HIRE_AVX512) return &hire_packers_avx512;
    if (level == HIRE_AVX2) return &hire_packers_avx2;
#endif
    (void)level;
    return &hire_packers_portable;
}

int64_t hire_pack_scratch(const hire_packing *packing)
{
    /* Raw weights, three rows of floats, codes of a tile and of a row. */
    const int64_t row = hire_pack_row(packing->width);
    return 4 * row * (HIRE_PACK_UNIT + 3) + (HIRE_LANES + 1) * packing->stride + 64;
}

typedef struct {
    const hire_packers *packers;
    const void *given; /* hire_packing, hire_coding or hire_head */
    char *scratch;
    float *error_ratio;
    double *energy;
    int off_grid;
    int64_t bad;
} pack_call;

static void pack_layer(void *context)
{
    pack_call *call = context;
    const hire_packing *packing = call->given;
    char *own = call->scratch + team_number() * hire_pack_scratch(packing);
    const int64_t from = team_cut(packing->num_neurons, HIRE_PACK_UNIT, 0);
    const int64_t to = team_cut(packing->num_neurons, HIRE_PACK_UNIT, 1);
    if (from < to && !call->packers->neurons(packing, own, from, to)) team_raise(&call->off_grid);
}

int hire_pack(const hire_packing *packing, void *scratch, int32_t num_threads, int32_t level)
{
    pack_call call = {.packers = packers_of(level), .given = packing, .scratch = scratch};
    team_run(num_threads, pack_layer, &call);
    return !call.off_grid;
}

static void pack_codes(void *context)
{
    pack_call *call = context;
    const hire_coding *coding = call->given;
    char *own = call->scratch + team_number() * 8 * coding->inputs;
    const int64_t from = team_cut(coding->outputs, HIRE_LANES, 0);
    const int64_t to = team_cut(coding->outputs, HIRE_LANES, 1);
    if (from < to && !call->packers->codes(coding, own, from, to)) team_raise(&call->off_grid);
}

int hire_pack_codes(const hire_coding *coding, void *scratch, int32_t num_threads, int32_t level)
{
    pack_call call = {.packers = packers_of(level), .given = coding, .scratch = scratch};
    team_run(num_threads, pack_codes, &call);
    return !call.off_grid;
}

static void add_energy(void *context)
{
    pack_call *call = context;
    const hire_head *head = call->given;
    TEAM_FOR(segment, HIRE_SEGMENTS, 1) {
        const int64_t from = head->num_rows * segment / HIRE_SEGMENTS;
        const int64_t to = head->num_rows * (segment + 1) / HIRE_SEGMENTS;
        call->packers->energy(head, from, to, call->energy + segment * head->width);
    }
}

void hire_head_energy(const hire_head *head, double *energy, int32_t num_threads, int32_t level)
{
    pack_call call = {.packers = packers_of(level), .given = head, .energy = energy};
    team_run(num_threads, add_energy, &call);
}

static void pack_head_tiles(void *context)
{
    pack_call *call = context;
    const hire_head *head = call->given;
    const int64_t tiles = (head->num_rows + HIRE_LANES - 1) / HIRE_LANES;
    TEAM_FOR(tile, tiles, 1) {
        team_add(&call->bad, call->packers->head(head, tile, tile + 1, call->error_ratio));
    }
}

int64_t hire_head_pack(const hire_head *head, float *error_ratio, int32_t num_threads,
                       int32_t level)
{
    pack_call call = {.packers = packers_of(level), .given = head, .error_ratio = error_ratio};
    team_run(num_threads, pack_head_tiles, &call);
    return call.bad;
}
