/* The team of threads behind team.h, three times: OpenMP's, our own, and none. */
#if !defined(_OPENMP) && defined(__GNUC__) && !defined(_WIN32)
#define OWN_THREADS
#define _POSIX_C_SOURCE 200809L
#endif

#include "kernels.h"
#include "team.h"

#if defined(_OPENMP)
#include <omp.h>

int hire_threads(void) { return HIRE_OPENMP; }
int team_number(void) { return omp_get_thread_num(); }
int team_size(void) { return omp_get_num_threads(); }

void team_barrier(void)
{
#pragma omp barrier
}

void team_run(int num_threads, void (*work)(void *), void *context)
{
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    work(context);
}

#elif defined(OWN_THREADS)
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    /* How long a waiting thread looks before it sleeps. At a barrier longer than it takes to wake
     * one: while a sleeper wakes, the others must not fall asleep behind the next barrier. */
    BARRIER_NS = 200000,
    CALL_NS = 50000,
    STACK_BYTES = 1 << 20, /* some systems' own choice is too small for the head's arrays */
    SIZES = 4096
};

/* A number that threads wait for to change. */
typedef struct {
    _Alignas(64) _Atomic uint64_t word;
    _Alignas(64) atomic_int sleepers;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
} gate;

typedef struct team {
    struct team *next; /* of the idle ones */
    void (*work)(void *);
    void *context;
    int size;        /* threads of the present call, the caller included */
    int num_workers; /* threads that there are beside it; those beyond `size` sleep on */
    gate calls;      /* SIZES times the calls so far, and the size of the last */
    gate phases;     /* barriers so far */
    _Alignas(64) atomic_int arrived;
} team;

/* Callers at the same time have a team each; after its call a team waits here for the next. */
static struct {
    pthread_mutex_t mutex;
    team *idle;
} pool = {PTHREAD_MUTEX_INITIALIZER, NULL};
static pthread_once_t once = PTHREAD_ONCE_INIT;

static _Thread_local team *own_team; /* NULL: alone */
static _Thread_local int own_number;

int hire_threads(void) { return HIRE_OWN_THREADS; }
int team_number(void) { return own_team == NULL ? 0 : own_number; }
int team_size(void) { return own_team == NULL ? 1 : own_team->size; }

/* ------------------------------------------------------------------ waiting */

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static inline void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb" ::: "memory"); /* `yield` takes no time on most */
#endif
}

/* The word as soon as it is not `old`. */
static uint64_t wait_for(gate *g, uint64_t old, int64_t spin_ns)
{
    uint64_t word;
    const int64_t until = now() + spin_ns;
    do {
        for (int i = 0; i < 32; i++) {
            word = atomic_load_explicit(&g->word, memory_order_acquire);
            if (word != old) return word;
            relax();
        }
    } while (now() < until);
    pthread_mutex_lock(&g->mutex);
    atomic_fetch_add(&g->sleepers, 1);
    while ((word = atomic_load(&g->word)) == old) pthread_cond_wait(&g->changed, &g->mutex);
    atomic_fetch_sub(&g->sleepers, 1);
    pthread_mutex_unlock(&g->mutex);
    return word;
}

/* Either the sleeper's count is seen here, or the sleeper sees the word before it sleeps: all four
 * accesses are in one order. The mutex is free only once the sleeper listens. */
static void change(gate *g, uint64_t word)
{
    atomic_store(&g->word, word);
    if (atomic_load(&g->sleepers) == 0) return;
    pthread_mutex_lock(&g->mutex);
    pthread_cond_broadcast(&g->changed);
    pthread_mutex_unlock(&g->mutex);
}

void team_barrier(void)
{
    team *t = own_team;
    if (t == NULL || t->size == 1) return;
    const uint64_t phase = atomic_load_explicit(&t->phases.word, memory_order_relaxed);
    const int size = t->size; /* once this thread has arrived, the next call may set another */
    if (atomic_fetch_add(&t->arrived, 1) + 1 < size) {
        wait_for(&t->phases, phase, BARRIER_NS);
        return;
    }
    atomic_store_explicit(&t->arrived, 0, memory_order_relaxed);
    change(&t->phases, phase + 1);
}

/* ------------------------------------------------------------------ threads */

typedef struct {
    team *team;
    int number;
    uint64_t seen; /* the calls before its first */
} member;

static void *live(void *argument)
{
    const member me = *(member *)argument;
    uint64_t call = me.seen;
    free(argument);
    own_team = me.team;
    own_number = me.number;
    for (;;) {
        call = wait_for(&me.team->calls, call, CALL_NS);
        if (me.number >= (int)(call % SIZES)) continue; /* what else the team says may be newer */
        me.team->work(me.team->context);
        team_barrier();
    }
    return NULL;
}

static int add_worker(team *t)
{
    pthread_t thread;
    pthread_attr_t how;
    member *m = malloc(sizeof *m);
    if (m == NULL) return 0;
    *m = (member){t, t->num_workers + 1, atomic_load(&t->calls.word)};
    pthread_attr_init(&how);
    pthread_attr_setdetachstate(&how, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&how, STACK_BYTES);
    const int made = pthread_create(&thread, &how, live, m) == 0;
    pthread_attr_destroy(&how);
    if (!made) free(m);
    t->num_workers += made;
    return made;
}

/* Signals are for the threads that the program knows: workers begin with all of them blocked. */
static void grow(team *t, int num_threads)
{
    sigset_t all, before;
    if (t->num_workers + 1 >= num_threads) return;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (t->num_workers + 1 < num_threads && add_worker(t)) continue;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void prepare(gate *g)
{
    pthread_mutex_init(&g->mutex, NULL);
    pthread_cond_init(&g->changed, NULL);
}

/* A child has none of the threads, and the mutex as another thread may have held it. */
static void forget(void)
{
    pthread_mutex_init(&pool.mutex, NULL);
    pool.idle = NULL;
}

static void watch_forks(void) { pthread_atfork(NULL, NULL, forget); }

static team *take_team(void)
{
    void *memory = NULL;
    pthread_once(&once, watch_forks);
    pthread_mutex_lock(&pool.mutex);
    team *t = pool.idle;
    if (t != NULL) pool.idle = t->next;
    pthread_mutex_unlock(&pool.mutex);
    if (t != NULL || posix_memalign(&memory, 64, sizeof *t) != 0) return t;
    t = memset(memory, 0, sizeof *t);
    prepare(&t->calls);
    prepare(&t->phases);
    return t;
}

static void give_back(team *t)
{
    pthread_mutex_lock(&pool.mutex);
    t->next = pool.idle;
    pool.idle = t;
    pthread_mutex_unlock(&pool.mutex);
}

void team_run(int num_threads, void (*work)(void *), void *context)
{
    team *t = num_threads > 1 ? take_team() : NULL;
    if (t == NULL) {
        work(context);
        return;
    }
    grow(t, num_threads < SIZES ? num_threads : SIZES - 1);
    t->work = work;
    t->context = context;
    t->size = t->num_workers + 1 < num_threads ? t->num_workers + 1 : num_threads;
    own_team = t;
    own_number = 0;
    change(&t->calls, (atomic_load(&t->calls.word) / SIZES + 1) * SIZES + (uint64_t)t->size);
    work(context);
    team_barrier();
    own_team = NULL;
    give_back(t);
}

#else

int hire_threads(void) { return HIRE_ONE_THREAD; }
int team_number(void) { return 0; }
int team_size(void) { return 1; }
void team_barrier(void) {}
void team_run(int num_threads, void (*work)(void *), void *context)
{
    (void)num_threads;
    work(context);
}

#endif
