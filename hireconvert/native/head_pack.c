/* A weight cut into the codes that the head reads. One plain C text for every level: the codes are
 * the same everywhere. */
#include "head.h"
#include "team.h"

#include <math.h>
#include <string.h>

#define CLIP 2.9 /* quiet weights beyond this many root mean squares saturate: less error in all */
#define LEAST_SCALE 0x1p-100f

static float bf16_to_float(uint16_t half)
{
    const uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static float f16_to_float(uint16_t half)
{
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    float size;
    if (exponent == 31)
        size = fraction ? NAN : INFINITY;
    else
        size = exponent ? ldexpf((float)(fraction | 1024), exponent - 25)
                        : ldexpf((float)fraction, -24);
    return half >> 15 ? -size : size;
}

static float weight_at(const void *weight, int64_t place, int64_t type)
{
    if (type == HIRE_FLOAT32) return ((const float *)weight)[place];
    const uint16_t half = ((const uint16_t *)weight)[place];
    return type == HIRE_BFLOAT16 ? bf16_to_float(half) : f16_to_float(half);
}

/* bfloat16 not below a number that is not negative; inf where there is none. */
static uint16_t round_up(double value)
{
    const float near = (float)value;
    uint32_t bits;
    if (!(value <= 3.3e38)) return 0x7f80;
    memcpy(&bits, &near, sizeof bits);
    return (uint16_t)((bits >> 16) + ((bits & 0xffff) != 0 || near < value));
}

static int clamp_code(double value)
{
    const double most = value > 255.0 ? 255.0 : value; /* never NaN: rows are finite */
    return most < 0.0 ? 0 : (int)(most + 0.5);
}

/* Codes of n values around zero, 127.5 the middle, with a scale in bfloat16; returns the scale. */
static double codes_of(const double *value, int64_t n, double range, uint8_t *code, uint16_t *scale)
{
    *scale = round_up(range > 0.0 ? fmax(range / 127.5, LEAST_SCALE) : 0.0);
    const double unit = bf16_to_float(*scale), inverse = unit > 0.0 ? 1.0 / unit : 0.0;
    for (int64_t k = 0; k < n; k++) code[k] = (uint8_t)clamp_code(value[k] * inverse + 127.5);
    return unit;
}

static double error_of(const double *value, const uint8_t *code, int64_t n, double unit, int high)
{
    double sum = 0.0, squares = 0.0;
    for (int64_t k = 0; k < n; k++) {
        const double middle = high ? (code[k] >> 4) * 16 - 120.0 : code[k] - 127.5;
        const double error = value[k] - middle * unit;
        sum += error * error;
        squares += value[k] * value[k];
    }
    return sqrt(sum) * (1 + 1e-9) + sqrt(squares) * 0x1p-50 + 1e-30;
}

/* The reordered row times its divisors; its largest absolute values; 0 when it is not finite. */
static int row_values(const hire_head *head, int64_t row, double *value, double range_of_2[2])
{
    double squares = 0.0;
    range_of_2[0] = range_of_2[1] = 0.0;
    for (int64_t k = 0; k < head->width; k++) {
        const int64_t place = row * head->weight_stride + head->order[k];
        value[k] = (double)weight_at(head->weight, place, head->weight_type) * head->divisor[k];
        if (!(fabs(value[k]) < INFINITY)) return 0;
        double *range = range_of_2 + (k >= head->num_loud);
        if (fabs(value[k]) > *range) *range = fabs(value[k]);
        if (k >= head->num_loud) squares += value[k] * value[k];
    }
    const int64_t quiet = head->width - head->num_loud;
    const double clip = quiet ? CLIP * sqrt(squares / (double)quiet) : 0.0;
    if (clip < range_of_2[1]) range_of_2[1] = clip;
    return 1;
}

static void store_tile_codes(const hire_head *head, int64_t row, const uint8_t *code)
{
    const int64_t loud = head->num_loud, quiet = head->width - loud;
    uint8_t *tile = head->tiles + row / 16 * hire_head_tile_bytes(loud, quiet) + row % 16 * 4;
    for (int64_t k = 0; k < loud; k++) tile[k / 4 * 64 + k % 4] = code[k];
    tile += 16 * hire_whole(loud, 4);
    for (int64_t k = 0; k < quiet; k++)
        tile[k / 8 * 64 + k % 4] |= (uint8_t)(code[loud + k] >> 4 << k % 8 / 4 * 4);
}

static void store_low_codes(const hire_head *head, int64_t row, const uint8_t *code)
{
    const int64_t quiet = head->width - head->num_loud, whole = quiet / 128 * 128;
    uint8_t *low = head->low + row * hire_head_low_bytes(quiet);
    for (int64_t k = 0; k < quiet; k++) {
        const int64_t half = k < whole || quiet - whole > 64 ? 64 : 32, within = k % 128;
        low[k / 128 * 64 + within % half] |= (uint8_t)((code[k] & 15) << within / half * 4);
    }
}

static int pack_row(const hire_head *head, int64_t row, float *error_ratio)
{
    double value[HIRE_HEAD_MOST_WIDTH], range_of_2[2];
    uint8_t code[HIRE_HEAD_MOST_WIDTH];
    const int64_t loud = head->num_loud, quiet = head->width - loud;
    uint16_t *scales = head->scales + row / 16 * 48 + row % 16;
    error_ratio[row] = 0.0f;
    if (!row_values(head, row, value, range_of_2)) return 0;
    const double unit = codes_of(value, loud, range_of_2[0], code, scales);
    if (unit > 0.0)
        error_ratio[row] = (float)(error_of(value, code, loud, unit, 0) / unit * (1 + 1e-6));
    uint16_t narrow;
    const double step = codes_of(value + loud, quiet, range_of_2[1], code + loud, &narrow);
    scales[16] = step > 0.0 ? round_up(step * 16) : 0; /* exact: a power of two more */
    scales[32] = round_up(error_of(value + loud, code + loud, quiet, step, 1) * (1 + 1e-6));
    store_tile_codes(head, row, code);
    if (head->low != NULL) {
        head->low_error[row] =
            round_up(error_of(value + loud, code + loud, quiet, step, 0) * (1 + 1e-6));
        store_low_codes(head, row, code + loud);
    }
    return 1;
}

typedef struct {
    const hire_head *head;
    float *error_ratio;
    int64_t bad;
} pack_call;

static void pack_rows(void *context)
{
    pack_call *call = context;
    TEAM_FOR(row, call->head->num_rows, 1)
        if (!pack_row(call->head, row, call->error_ratio)) team_add(&call->bad, 1);
}

int64_t hire_head_pack(const hire_head *head, float *error_ratio, int32_t num_threads)
{
    pack_call call = {head, error_ratio, 0};
    team_run(num_threads, pack_rows, &call);
    return call.bad;
}
