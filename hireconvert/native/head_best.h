/* The best of many estimates, as a heap; part of head.c. */

/* Whether a is less wanted than b: smaller, or equal and behind it. */
static int worse(float a, int32_t a_row, float b, int32_t b_row)
{
    return a < b || (a == b && a_row > b_row);
}

/* The root of a heap is its worst; it sinks to where it belongs. */
static void sink(float *value, int32_t *row, int64_t n)
{
    const float v = value[0];
    const int32_t r = row[0];
    int64_t at = 0;
    for (int64_t child = 1; child < n; child = 2 * at + 1) {
        if (child + 1 < n && worse(value[child + 1], row[child + 1], value[child], row[child]))
            child++;
        if (!worse(value[child], row[child], v, r)) break;
        value[at] = value[child];
        row[at] = row[child];
        at = child;
    }
    value[at] = v;
    row[at] = r;
}

/* Puts an entry into a heap of at most `room`, of which `n` are there; returns how many then. */
static int64_t offer(float *value, int32_t *row, int64_t n, int64_t room, float v, int32_t r)
{
    if (n == room) {
        if (worse(v, r, value[0], row[0])) return n;
        value[0] = v;
        row[0] = r;
        sink(value, row, n);
        return n;
    }
    int64_t at = n;
    for (; at > 0 && worse(v, r, value[(at - 1) / 2], row[(at - 1) / 2]); at = (at - 1) / 2) {
        value[at] = value[(at - 1) / 2];
        row[at] = row[(at - 1) / 2];
    }
    value[at] = v;
    row[at] = r;
    return n + 1;
}

/* The `room` largest estimates as a heap; NaN is the smallest. As many tiles have a largest that
 * is no smaller than the last of them, and only such tiles are looked into. */
static void find_best(const hire_head *head, hire_head_run *run, int64_t room)
{
    const int64_t tiles = hire_whole(head->num_rows, 16) / 16;
    float least = -INFINITY;
    int64_t n = 0;
    if (room <= tiles) {
        for (int64_t tile = 0; tile < tiles; tile++)
            if (n < room || run->tile_estimate[tile] > run->best_value[0])
                n = offer(run->best_value, run->best_row, n, room, run->tile_estimate[tile],
                          (int32_t)tile);
        least = run->best_value[0];
    }
    n = 0;
    for (int64_t tile = 0; tile < tiles; tile++) {
        if (run->tile_estimate[tile] < least) continue;
        for (int64_t row = tile * 16; row < tile * 16 + 16 && row < head->num_rows; row++) {
            const float z = run->estimate[row] == run->estimate[row] ? run->estimate[row]
                                                                     : -INFINITY;
            if (n < room || z > run->best_value[0])
                n = offer(run->best_value, run->best_row, n, room, z, (int32_t)row);
        }
    }
}
