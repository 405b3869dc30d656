/* Threads that go through the same code together: OpenMP's, a team that torch has in the process
 * already, or where the compiler knows none, threads of team.c. */
#ifndef HIRE_TEAM_H
#define HIRE_TEAM_H

#include <stdint.h>

/* Runs `work` on this thread and num_threads - 1 others (fewer where the system gives no more) and
 * returns when all are done. Not to be called from within `work`. */
void team_run(int num_threads, void (*work)(void *), void *context);

/* Within `work`: the thread's number from 0, the caller's, and how many there are. */
int team_number(void);
int team_size(void);
/* Goes on when every thread of the team is here; what they wrote before is seen behind it. */
void team_barrier(void);

/* Where this thread's run of [0, total) begins, or the next one's: all have as many whole units, the
 * first ones one more where they do not come out even. */
static inline int64_t team_cut(int64_t total, int64_t unit, int next)
{
    const int64_t units = (total + unit - 1) / unit, size = team_size(), at = team_number() + next;
    const int64_t place = units / size * at + (at < units % size ? at : units % size);
    return place * unit < total ? place * unit : total;
}

/* A loop over [0, total) in steps of `unit`, shared by the team, and a barrier behind it: a loop's
 * condition is false once. */
#define TEAM_FOR(at, total, unit)                                                    \
    for (int64_t at = team_cut(total, unit, 0), at##_end = team_cut(total, unit, 1); \
         at < at##_end || (team_barrier(), 0); at += (unit))

/* Adds to a number that threads share; returns what it was. Sets a flag that they share. */
#if defined(__GNUC__)
static inline int64_t team_add(int64_t *number, int64_t more)
{
    return __atomic_fetch_add(number, more, __ATOMIC_RELAXED);
}
static inline void team_raise(int *flag) { __atomic_store_n(flag, 1, __ATOMIC_RELAXED); }
#else /* one thread */
static inline int64_t team_add(int64_t *number, int64_t more)
{
    *number += more;
    return *number - more;
}
static inline void team_raise(int *flag) { *flag = 1; }
#endif

#endif
