/* Teams of threads under stress: `team_check MODE`; exits 0 where nothing went wrong.
 *
 * sizes: calls of every size, one after the other. callers: many threads that call at the same time.
 * fork: calls in children, also of a parent whose other thread is within a call. sleep: prints the
 * seconds of CPU that idle and waiting threads used in half a second each. */
#define _GNU_SOURCE
#include "team.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

typedef struct {
    int64_t *cell, total, unit, rounds, errors, visits;
    int size;
} job;

static void work(void *context)
{
    job *j = context;
    if (team_number() == 0) j->size = team_size();
    for (int64_t round = 0; round < j->rounds; round++) {
        int64_t visits = 0;
        TEAM_FOR(at, j->total, j->unit) {
            const int64_t end = at + j->unit < j->total ? at + j->unit : j->total;
            for (int64_t i = at; i < end; i++, visits++) j->cell[i] = round + i;
        }
        team_add(&j->visits, visits);
        for (int64_t i = 0; i < j->total; i++)
            if (j->cell[i] != round + i) team_add(&j->errors, 1);
        team_barrier();
    }
}

/* How much went wrong in a call of so many threads. */
static int64_t call(int threads, int64_t total, int64_t unit, int64_t rounds)
{
    job j = {calloc((size_t)total + 1, sizeof(int64_t)), total, unit, rounds, 0, 0, 0};
    team_run(threads, work, &j);
    free(j.cell);
    return j.errors + (j.size != threads) + (j.visits != rounds * total) + (team_size() != 1);
}

static int sizes(void)
{
    static const int threads[] = {2, 5, 1, 3, 8, 2, 1, 7};
    int64_t errors = 0;
    for (int i = 0; i < 160; i++) errors += call(threads[i % 8], i % 41, 1 + i % 3 * 7, 1 + i % 5);
    return errors != 0;
}

static void *caller(void *argument)
{
    int64_t errors = 0;
    for (int i = 0; i < 30; i++) errors += call(2 + i % 2, 33, 4, 3);
    *(int64_t *)argument = errors;
    return NULL;
}

static int callers(void)
{
    pthread_t thread[6];
    int64_t errors[6], all = 0;
    for (int i = 0; i < 6; i++) pthread_create(thread + i, NULL, caller, errors + i);
    for (int i = 0; i < 6; i++) {
        pthread_join(thread[i], NULL);
        all += errors[i];
    }
    return all != 0;
}

static int children(void)
{
    int failed = 0;
    for (int i = 0; i < 8; i++) {
        const pid_t child = fork();
        if (child == 0) {
            alarm(20); /* a child that hangs dies */
            _exit(call(3, 50, 4, 3) + call(2, 50, 4, 3) != 0);
        }
        int status = 1;
        waitpid(child, &status, 0);
        failed += status != 0;
    }
    return failed;
}

static int forks(void)
{
    pthread_t thread;
    int64_t errors = call(3, 50, 4, 3);
    int failed = children();
    pthread_create(&thread, NULL, caller, &errors);
    failed += children();
    pthread_join(thread, NULL);
    return failed || errors || call(3, 50, 4, 3);
}

static double cpu(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void late(void *context)
{
    (void)context;
    if (team_number() == 0) usleep(500000);
    team_barrier();
}

static int sleeps(void)
{
    call(4, 50, 4, 3);
    const double start = cpu();
    usleep(500000);
    const double idle = cpu() - start;
    team_run(4, late, NULL);
    printf("%.4f %.4f\n", idle, cpu() - start - idle);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc != 2) return 2;
    if (strcmp(argv[1], "sizes") == 0) return sizes();
    if (strcmp(argv[1], "callers") == 0) return callers();
    if (strcmp(argv[1], "fork") == 0) return forks();
    return sleeps();
}
