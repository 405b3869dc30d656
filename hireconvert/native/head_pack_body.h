/* A head's weight cut into the codes that it is read as (head.h). Plain loops, compiled once for each
 * level; the codes are the same everywhere. */
#include "pack_numbers.h"

#define CLIP 2.9 /* quiet weights beyond this many root mean squares saturate: less error in all */
#define LEAST_SCALE 0x1p-100f


/* bfloat16 not below a number that is not negative; inf where there is none. */
static uint16_t round_up(double value)
{
    const float near = (float)value;
    const uint32_t bits = bits_of(near);
    if (!(value <= 3.3e38)) return 0x7f80;
    return (uint16_t)((bits >> 16) + ((bits & 0xffff) != 0 || near < value));
}

/* Codes of n finite values around zero, 127.5 the middle, with a scale in bfloat16, which is
 * returned. */
static double codes_of(const double *value, int64_t n, double range, uint8_t *code, uint16_t *scale)
{
    *scale = round_up(range > 0.0 ? fmax(range / 127.5, LEAST_SCALE) : 0.0);
    const double unit = float_of((uint32_t)*scale << 16), inverse = unit > 0.0 ? 1.0 / unit : 0.0;
    for (int64_t k = 0; k < n; k++) {
        double place = value[k] * inverse + 127.5;
        place = place > 255.0 ? 255.0 : place;
        place = place < 0.0 ? 0.0 : place;
        code[k] = (uint8_t)(int)(place + 0.5);
    }
    return unit;
}

/* In an order that is the same at every level. */
static double sum_of_8(const double *part)
{
    return ((part[0] + part[4]) + (part[2] + part[6])) +
           ((part[1] + part[5]) + (part[3] + part[7]));
}

static double squares_of(const double *value, int64_t n)
{
    double part[8] = {0};
    for (int64_t k = 0; k < n / 8 * 8; k += 8)
        for (int lane = 0; lane < 8; lane++) part[lane] += value[k + lane] * value[k + lane];
    for (int64_t k = n / 8 * 8; k < n; k++) part[k % 8] += value[k] * value[k];
    return sum_of_8(part);
}

/* At least the norm of what the codes' value times `unit` leaves; `high`: of the high nibbles'. */
static double error_of(const double *value, const uint8_t *code, int64_t n, double unit, int high,
                       double squares)
{
    const int mask = high ? 0xf0 : 0xff;
    const double middle = high ? 120.0 : 127.5;
    double part[8] = {0};
    for (int64_t k = 0; k < n / 8 * 8; k += 8)
        for (int lane = 0; lane < 8; lane++) {
            const double own = (code[k + lane] & mask) - middle;
            const double error = value[k + lane] - own * unit;
            part[lane] += error * error;
        }
    for (int64_t k = n / 8 * 8; k < n; k++) {
        const double error = value[k] - ((code[k] & mask) - middle) * unit;
        part[k % 8] += error * error;
    }
    return sqrt(sum_of_8(part)) * (1 + 1e-9) + sqrt(squares) * 0x1p-50 + 1e-30;
}

/* The largest magnitude; inf or NaN where a value is. */
static double range_of(const double *value, int64_t n)
{
    uint64_t most = 0;
    for (int64_t k = 0; k < n; k++) {
        uint64_t bits;
        memcpy(&bits, value + k, sizeof bits);
        bits &= 0x7fffffffffffffff;
        most = bits > most ? bits : most;
    }
    double range;
    memcpy(&range, &most, sizeof range);
    return range;
}

static const char *head_row(const hire_head *head, int64_t row)
{
    const int64_t size = head->weight_type == HIRE_FLOAT32 ? 4 : 2;
    return (const char *)head->weight + row * head->weight_stride * size;
}

static void put_head_tile(const hire_head *head, int64_t row, const uint8_t *code)
{
    const int64_t loud = head->num_loud, quiet = head->width - loud;
    uint8_t *tile = head->tiles + row / 16 * hire_head_tile_bytes(loud, quiet) + row % 16 * 4;
    uint32_t four, next;
    for (int64_t k = 0; k < loud; k += 4, tile += 64) {
        uint8_t last[4] = {0};
        memcpy(last, code + k, (size_t)(loud - k < 4 ? loud - k : 4));
        memcpy(tile, last, sizeof last);
    }
    for (int64_t k = loud; k < head->width; k += 8, tile += 64) {
        memcpy(&four, code + k, sizeof four); /* zeros lie behind the last */
        memcpy(&next, code + k + 4, sizeof next);
        put(tile, (four >> 4 & 0x0f0f0f0f) | (next & 0xf0f0f0f0));
    }
}

static void put_head_low(const hire_head *head, int64_t row, const uint8_t *code)
{
    const int64_t quiet = head->width - head->num_loud;
    uint8_t *low = head->low + row * hire_head_low_bytes(quiet);
    for (int64_t k = 0; k < quiet; k += 128) {
        const int64_t half = quiet - k > 64 ? 64 : 32;
        for (int64_t within = 0; within < half; within++)
            *low++ = (uint8_t)((code[k + within] & 15) | (code[k + half + within] & 15) << 4);
    }
}

/* One row; its largest error of loud codes in scales. 0 where it is not finite. */
static int pack_head_row(const hire_head *head, int64_t row, float *error_ratio)
{
    float weight[HIRE_HEAD_MOST_WIDTH];
    double value[HIRE_HEAD_MOST_WIDTH];
    uint8_t code[HIRE_HEAD_MOST_WIDTH + 128];
    const int64_t width = head->width, loud = head->num_loud, quiet = width - loud;
    uint16_t *scales = head->scales + row / 16 * 48 + row % 16, narrow;
    error_ratio[row] = 0.0f;
    widen(head_row(head, row), head->weight_type, width, weight);
    for (int64_t k = 0; k < width; k++)
        value[k] = (double)weight[head->order[k]] * head->divisor[k];
    double range = range_of(value + loud, quiet);
    const double loud_range = range_of(value, loud);
    if (!(loud_range < INFINITY && range < INFINITY)) return 0;
    const double unit = codes_of(value, loud, loud_range, code, scales);
    if (unit > 0.0) {
        const double error = error_of(value, code, loud, unit, 0, squares_of(value, loud));
        error_ratio[row] = (float)(error / unit * (1 + 1e-6));
    }
    const double squares = squares_of(value + loud, quiet);
    const double clip = quiet ? CLIP * sqrt(squares / (double)quiet) : 0.0;
    range = clip < range ? clip : range;
    const double step = codes_of(value + loud, quiet, range, code + loud, &narrow);
    memset(code + width, 0, 128);
    scales[16] = step > 0.0 ? round_up(step * 16) : 0; /* exact: a power of two more */
    const double high = error_of(value + loud, code + loud, quiet, step, 1, squares);
    scales[32] = round_up(high * (1 + 1e-6));
    put_head_tile(head, row, code);
    if (head->low != NULL) {
        const double both = error_of(value + loud, code + loud, quiet, step, 0, squares);
        head->low_error[row] = round_up(both * (1 + 1e-6));
        put_head_low(head, row, code + loud);
    }
    return 1;
}

/* The rows of tiles [from, to), zeros behind the last; how many are not finite. */
static int64_t pack_head(const hire_head *head, int64_t from, int64_t to, float *error_ratio)
{
    const int64_t bytes = hire_head_tile_bytes(head->num_loud, head->width - head->num_loud);
    int64_t bad = 0;
    for (int64_t tile = from; tile < to; tile++) {
        const int64_t first = 16 * tile, left = head->num_rows - first;
        if (left < 16) {
            memset(head->tiles + tile * bytes, 0, (size_t)bytes);
            memset(head->scales + 48 * tile, 0, 48 * sizeof *head->scales);
        }
        for (int64_t row = first; row < first + (left < 16 ? left : 16); row++)
            bad += !pack_head_row(head, row, error_ratio);
    }
    return bad;
}

/* The squares of rows [from, to), by column. */
static void head_energy(const hire_head *head, int64_t from, int64_t to, double *energy)
{
    float weight[HIRE_HEAD_MOST_WIDTH];
    for (int64_t k = 0; k < head->width; k++) energy[k] = 0.0;
    for (int64_t row = from; row < to; row++) {
        widen(head_row(head, row), head->weight_type, head->width, weight);
        for (int64_t k = 0; k < head->width; k++) energy[k] += (double)weight[k] * weight[k];
    }
}
