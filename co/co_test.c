/* SPDX-License-Identifier: Apache-2.0 */
/* Tests of co/: coroutines on a scheduler that is a plain run queue, then locks between coroutines
 * of two schedulers in two threads. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "base/mem.h"
#include "co/co.h"
#include "co/switch.h"
#include "co/sync.h"
#include <assert.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* ---- A scheduler in one thread ---- */

struct sched {
    struct co_sched co;
    struct co *head, *tail;
};

static void sched_ready(struct co_sched *co, struct co *c)
{
    struct sched *s = (struct sched *)co;
    co_set_next(c, NULL);
    if (s->tail)
        co_set_next(s->tail, c);
    else
        s->head = c;
    s->tail = c;
}

static void sched_init(struct sched *s)
{
    *s = (struct sched){0};
    co_sched_init(&s->co, sched_ready);
}

static void sched_run(struct sched *s)
{
    while (s->head) {
        struct co *c = s->head;
        s->head = co_next(c);
        if (!s->head)
            s->tail = NULL;
        co_enter(c);
    }
}

static struct co *sched_spawn(struct sched *s, void (*fn)(void *), void *arg)
{
    struct co *c = co_new(&s->co, fn, arg);
    assert_non_null(c);
    co_wake(c);
    return c;
}

static void sched_fini(struct sched *s)
{
    assert_null(s->head);
    assert_int_equal(s->co.n_live, 0);
    co_sched_fini(&s->co);
}

/* Lets all others that are ready run once. */
static co_fn void pass(void)
{
    co_wake(co_self());
    co_yield();
}

/* What happened, in order. */
static char trace[256];

static void note(const char *what)
{
    size_t len = strlen(trace);
    assert(len + strlen(what) < sizeof trace);
    strcpy(trace + len, what);
}

static void assert_trace(const char *want)
{
    assert_string_equal(trace, want);
    trace[0] = '\0';
}

/* ---- Coroutines ---- */

static void yield_twice(void *arg)
{
    note(arg);
    co_yield();
    note(arg);
    co_yield();
    note(arg);
}

static void enter_and_yield(void **state)
{
    struct sched s;
    sched_init(&s);
    struct co *a = co_new(&s.co, yield_twice, (char[]){"a"});
    struct co *b = co_new(&s.co, yield_twice, (char[]){"b"});
    assert_non_null(a);
    assert_non_null(b);
    assert_int_equal(s.co.n_live, 2);
    assert_ptr_equal(co_sched_of(a), &s.co);
    assert_trace(""); /* new ones do not run */
    co_enter(a);
    co_enter(b);
    co_enter(b);
    assert_trace("abb");
    assert_null(co_self());
    assert_false(co_inside());
    co_enter(b);
    assert_int_equal(s.co.n_live, 1);
    assert_int_equal(s.co.n_pool, 1);
    co_enter(a);
    co_enter(a);
    assert_trace("baa");
    assert_int_equal(s.co.n_pool, 2);
    sched_fini(&s);
}

struct nest {
    struct sched *s;
    struct co *self, *inner;
};

static void inner_fn(void *arg)
{
    struct nest *n = arg;
    assert_ptr_equal(co_self(), n->inner);
    note("[");
    co_yield();
    assert_ptr_equal(co_self(), n->inner);
    note("]");
}

static void outer_fn(void *arg)
{
    struct nest *n = arg;
    assert_ptr_equal(co_self(), n->self);
    n->inner = co_new(&n->s->co, inner_fn, n);
    assert_non_null(n->inner);
    note("(");
    co_enter(n->inner); /* comes back when the inner one yields */
    assert_ptr_equal(co_self(), n->self);
    note("-");
    co_yield(); /* to the test, not to the inner one */
    note(")");
}

static void nested_enter(void **state)
{
    struct sched s;
    sched_init(&s);
    struct nest n = {.s = &s};
    n.self = co_new(&s.co, outer_fn, &n);
    assert_non_null(n.self);
    co_enter(n.self);
    assert_trace("([-");
    co_enter(n.inner); /* now by somebody else */
    assert_trace("]");
    assert_null(co_self());
    co_enter(n.self);
    assert_trace(")");
    sched_fini(&s);
}

static void enter_one(void *arg)
{
    struct co **inner = arg;
    co_enter(*inner);
    note("x");
}

/* The outer one ends while the inner one, which it entered, is parked. */
static void inner_outlives_outer(void **state)
{
    struct sched s;
    sched_init(&s);
    struct co *inner = co_new(&s.co, yield_twice, (char[]){"i"});
    struct co *outer = co_new(&s.co, enter_one, &inner);
    co_enter(outer);
    assert_trace("ix");
    assert_int_equal(s.co.n_live, 1);
    co_enter(inner);
    co_enter(inner);
    assert_trace("ii");
    sched_fini(&s);
}

static void do_nothing(void *arg)
{
}

static void pool_is_last_in_first_out(void **state)
{
    struct sched s;
    sched_init(&s);
    struct co *c[3];
    for (int i = 0; i < 3; i++)
        c[i] = co_new(&s.co, do_nothing, NULL);
    co_enter(c[1]);
    co_enter(c[0]);
    co_enter(c[2]);
    assert_int_equal(s.co.n_pool, 3);
    mem_fail_after(1); /* the pool needs no memory */
    assert_ptr_equal(co_new(&s.co, do_nothing, NULL), c[2]);
    assert_ptr_equal(co_new(&s.co, do_nothing, NULL), c[0]);
    assert_ptr_equal(co_new(&s.co, do_nothing, NULL), c[1]);
    assert_int_equal(mem_fail_after(0), 0);
    assert_int_equal(s.co.n_pool, 0);
    assert_int_equal(s.co.n_live, 3);
    for (int i = 0; i < 3; i++)
        co_enter(c[i]);
    sched_fini(&s);
}

static void pool_is_bounded(void **state)
{
    enum { N = 300 };
    struct sched s;
    sched_init(&s);
    static struct co *c[N];
    for (int round = 0; round < 2; round++) {
        for (int i = 0; i < N; i++) {
            c[i] = co_new(&s.co, do_nothing, NULL);
            assert_non_null(c[i]);
        }
        assert_int_equal(s.co.n_live, N);
        for (int i = 0; i < N; i++)
            co_enter(c[i]);
        assert_int_equal(s.co.n_live, 0);
        assert_int_equal(s.co.n_pool, 256);
    }
    sched_fini(&s);
}

/* Runs fn(arg) in a child process; returns its status. Nothing of the child is printed. */
static int in_child(void (*fn)(void *), void *arg)
{
    fflush(NULL);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        struct rlimit none = {0, 0};
        setrlimit(RLIMIT_CORE, &none);
        close(STDERR_FILENO);
        signal(SIGABRT, SIG_DFL);
        fn(arg);
        _exit(0);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    return status;
}

/* TSan is half off in the child of a fork, and reports races that are none. */
#ifdef CO_TSAN
static const bool can_fork = false;
#else
static const bool can_fork = true;
#endif

static void map_without_address_space(void *arg)
{
    struct sched s;
    sched_init(&s);
    struct rlimit little = {1, 1};
    if (setrlimit(RLIMIT_AS, &little) < 0)
        _exit(1);
    if (co_new(&s.co, do_nothing, NULL))
        _exit(2);
    _exit(s.co.n_live == 0 ? 42 : 3);
}

static void new_without_memory(void **state)
{
    struct sched s;
    sched_init(&s);
    mem_fail_after(1);
    assert_null(co_new(&s.co, do_nothing, NULL));
    assert_int_equal(s.co.n_live, 0);
    struct co *c = co_new(&s.co, do_nothing, NULL);
    assert_non_null(c);
    co_enter(c);
    assert_int_equal(mem_fail_after(0), 2);
    sched_fini(&s);
    if (!can_fork)
        return;
    int status = in_child(map_without_address_space, NULL);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 42);
}

/* ---- Stacks ---- */

/* Not watched by ASan, which may keep the frames elsewhere. */
CO_NO_ASAN static unsigned __attribute__((noinline)) descend(unsigned levels)
{
    volatile unsigned char frame[512];
    memset((void *)frame, (int)levels, sizeof frame);
    return levels ? descend(levels - 1) + frame[levels % sizeof frame] : frame[0];
}

static void go_deep(void *arg)
{
    (void)descend(*(unsigned *)arg);
}

static void enter_deep(struct sched *s, unsigned levels)
{
    struct co *c = co_new(&s->co, go_deep, &levels);
    assert_non_null(c);
    co_enter(c);
}

static void stack_use_is_measured(void **state)
{
    struct sched s;
    sched_init(&s);
    enter_deep(&s, 150);
    assert_int_equal(co_deepest_stack(), 0); /* not asked for */
    co_measure_stacks(true);
    enter_deep(&s, 0); /* on the stack that was used deeply */
    size_t shallow = co_deepest_stack();
    assert_true(shallow > 512 && shallow < 16 * 1024);
    enter_deep(&s, 100);
    size_t deep = co_deepest_stack();
    assert_true(deep >= shallow + 100 * 512 && deep < CO_STACK_SIZE);
    enter_deep(&s, 10);
    assert_int_equal(co_deepest_stack(), deep);
    co_measure_stacks(false);
    enter_deep(&s, 150);
    assert_int_equal(co_deepest_stack(), deep);
    sched_fini(&s);
}

/* 42: the page was there and forbidden, so it was the guard. */
static void on_fault(int sig, siginfo_t *info, void *context)
{
    _exit(sig == SIGSEGV && info->si_code == SEGV_ACCERR ? 42 : 1);
}

static void overflow_stack(void *arg)
{
    static char stack[64 * 1024];
    stack_t ss = {.ss_sp = stack, .ss_size = sizeof stack};
    struct sigaction sa = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    if (sigaltstack(&ss, NULL) < 0 || sigaction(SIGSEGV, &sa, NULL) < 0)
        _exit(2);
    struct sched s;
    sched_init(&s);
    enter_deep(&s, 150); /* fits */
    enter_deep(&s, 1000);
}

static void overflow_hits_the_guard(void **state)
{
    if (!can_fork)
        return;
    int status = in_child(overflow_stack, NULL);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 42);
}

static void yield_outside(void *arg)
{
    co_yield();
}

static void fini_too_early(void *arg)
{
    struct sched s;
    sched_init(&s);
    (void)co_new(&s.co, do_nothing, NULL);
    co_sched_fini(&s.co);
}

static void enter_self(void *arg)
{
    co_enter(co_self());
}

static void run_enter_self(void *arg)
{
    struct sched s;
    sched_init(&s);
    sched_spawn(&s, enter_self, NULL);
    sched_run(&s);
}

static void misuse_is_asserted(void **state)
{
    if (!can_fork)
        return;
    void (*const wrong[])(void *) = {yield_outside, fini_too_early, run_enter_self};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        int status = in_child(wrong[i], NULL);
        assert_true(WIFSIGNALED(status));
        assert_int_equal(WTERMSIG(status), SIGABRT);
    }
}

/* ---- Many switches ---- */

struct counter {
    unsigned n, want;
    double sum;
};

static void count_switches(void *arg)
{
    struct counter *k = arg;
    double d = 0.5;
    for (unsigned i = 0; i < k->want; i++) {
        k->n++;
        d += 1;
        co_yield();
    }
    k->sum = d;
}

static void many_switches(void **state)
{
    struct sched s;
    sched_init(&s);
    struct counter k[2] = {{.want = 100000}, {.want = 100000}};
    struct co *c[2];
    for (int i = 0; i < 2; i++) {
        c[i] = co_new(&s.co, count_switches, &k[i]);
        assert_non_null(c[i]);
    }
    for (unsigned i = 0; i <= 100000; i++) {
        co_enter(c[0]);
        co_enter(c[1]);
    }
    for (int i = 0; i < 2; i++) {
        assert_int_equal(k[i].n, 100000);
        assert_true(k[i].sum == 100000.5);
    }
    assert_int_equal(s.co.n_live, 0);
    sched_fini(&s);
}

static void many_lives(void **state)
{
    struct sched s;
    sched_init(&s);
    struct counter k = {.want = 1};
    for (unsigned i = 0; i < 20000; i++) {
        struct co *c = co_new(&s.co, count_switches, &k);
        co_enter(c);
        co_enter(c);
    }
    assert_int_equal(k.n, 20000);
    assert_int_equal(s.co.n_pool, 1);
    sched_fini(&s);
}

/* ---- Mutex ---- */

struct actor {
    const char *name;
    void *object;
    unsigned rounds;
};

static void lock_note_unlock(void *arg)
{
    struct actor *a = arg;
    co_mutex_lock(a->object);
    note(a->name);
    pass();
    note(a->name);
    co_mutex_unlock(a->object);
}

static void mutex_is_first_in_first_out(void **state)
{
    struct sched s;
    sched_init(&s);
    struct co_mutex m = CO_MUTEX_INIT;
    struct actor a[] = {{"a", &m, 0}, {"b", &m, 0}, {"c", &m, 0}, {"d", &m, 0}};
    for (int i = 0; i < 4; i++)
        sched_spawn(&s, lock_note_unlock, &a[i]);
    sched_run(&s);
    assert_trace("aabbccdd");
    assert_true(co_mutex_trylock(&m));
    co_mutex_unlock(&m);
    sched_fini(&s);
}

/* Unlock and lock at once: the waiter must have it, not the fast one. */
static void lock_greedily(void *arg)
{
    struct actor *a = arg;
    for (unsigned i = 0; i < a->rounds; i++) {
        co_mutex_lock(a->object);
        note(a->name);
        pass();
        co_mutex_unlock(a->object);
    }
}

static void mutex_is_fair(void **state)
{
    struct sched s;
    sched_init(&s);
    struct co_mutex m = CO_MUTEX_INIT;
    struct actor a[] = {{"a", &m, 4}, {"b", &m, 4}, {"c", &m, 2}};
    for (int i = 0; i < 3; i++)
        sched_spawn(&s, lock_greedily, &a[i]);
    sched_run(&s);
    assert_trace("abcabcabab");
    sched_fini(&s);
}

static void mutex_is_handed_over(void **state)
{
    struct sched s;
    sched_init(&s);
    struct co_mutex m = CO_MUTEX_INIT;
    assert_true(co_mutex_trylock(&m)); /* outside coroutines too */
    assert_false(co_mutex_trylock(&m));
    struct actor a = {"a", &m, 0};
    sched_spawn(&s, lock_note_unlock, &a);
    sched_run(&s);
    assert_trace("");
    co_mutex_unlock(&m);
    assert_false(co_mutex_trylock(&m)); /* its heir has it, even before it runs */
    sched_run(&s);
    assert_trace("aa");
    assert_true(co_mutex_trylock(&m));
    sched_fini(&s);
}

/* ---- Queue ---- */

struct gate {
    struct spin guard;
    struct co_queue queue;
    unsigned tickets;
};

static void take_ticket(void *arg)
{
    struct actor *a = arg;
    struct gate *g = a->object;
    spin_lock(&g->guard);
    while (!g->tickets)
        co_queue_wait(&g->queue, &g->guard);
    assert_true(atomic_flag_test_and_set(&g->guard.held)); /* held again */
    g->tickets--;
    spin_unlock(&g->guard);
    note(a->name);
}

static void queue_wakes_one_or_all(void **state)
{
    struct sched s;
    sched_init(&s);
    struct gate g = {.guard = SPIN_INIT};
    assert_false(co_queue_wake_one(&g.queue));
    co_queue_wake_all(&g.queue);
    struct actor a[] = {{"a", &g, 0}, {"b", &g, 0}, {"c", &g, 0}, {"d", &g, 0}};
    for (int i = 0; i < 4; i++)
        sched_spawn(&s, take_ticket, &a[i]);
    sched_run(&s);
    assert_trace("");
    spin_lock(&g.guard);
    g.tickets = 1;
    assert_true(co_queue_wake_one(&g.queue));
    spin_unlock(&g.guard);
    sched_run(&s);
    assert_trace("a");
    spin_lock(&g.guard); /* all are woken, only one finds a ticket */
    g.tickets = 1;
    co_queue_wake_all(&g.queue);
    spin_unlock(&g.guard);
    sched_run(&s);
    assert_trace("b");
    spin_lock(&g.guard);
    g.tickets = 2;
    co_queue_wake_all(&g.queue);
    assert_false(co_queue_wake_one(&g.queue));
    spin_unlock(&g.guard);
    sched_run(&s);
    assert_trace("cd");
    sched_fini(&s);
}

/* ---- Readers and writers ---- */

static void read_once(void *arg)
{
    struct actor *a = arg;
    co_rwlock_rdlock(a->object);
    note("<");
    note(a->name);
    for (unsigned i = 0; i < a->rounds; i++)
        pass();
    note(">");
    co_rwlock_unlock(a->object);
}

static void write_once(void *arg)
{
    struct actor *a = arg;
    co_rwlock_wrlock(a->object);
    note("{");
    note(a->name);
    for (unsigned i = 0; i < a->rounds; i++)
        pass();
    note("}");
    co_rwlock_unlock(a->object);
}

static void rwlock_shares_and_excludes(void **state)
{
    struct sched s;
    sched_init(&s);
    struct co_rwlock l = CO_RWLOCK_INIT;
    struct actor r = {"r", &l, 2}, w = {"w", &l, 2};
    sched_spawn(&s, read_once, &r);
    sched_spawn(&s, read_once, &r);
    sched_run(&s);
    assert_trace("<r<r>>");
    sched_spawn(&s, write_once, &w);
    sched_spawn(&s, write_once, &w);
    sched_run(&s);
    assert_trace("{w}{w}");
    sched_spawn(&s, write_once, &w);
    sched_spawn(&s, read_once, &r);
    sched_spawn(&s, read_once, &r);
    sched_run(&s);
    assert_trace("{w}<r<r>>");
    sched_fini(&s);
}

/* A reader that comes after a waiting writer waits, and readers between two writers go together. */
static void rwlock_serves_in_order(void **state)
{
    struct sched s;
    sched_init(&s);
    struct co_rwlock l = CO_RWLOCK_INIT;
    struct actor r = {"r", &l, 3}, w = {"w", &l, 1}, x = {"x", &l, 1};
    sched_spawn(&s, read_once, &r);
    sched_spawn(&s, write_once, &w);
    sched_spawn(&s, read_once, &r);
    sched_spawn(&s, read_once, &r);
    sched_spawn(&s, write_once, &x);
    sched_spawn(&s, read_once, &r);
    sched_run(&s);
    assert_trace("<r>{w}<r<r>>{x}<r>");
    assert_int_equal(l.readers, 0);
    assert_false(l.writing);
    assert_int_equal(l.writers_waiting, 0);
    sched_fini(&s);
}

/* ---- Group ---- */

static void finish_one(void *arg)
{
    struct actor *a = arg;
    pass();
    note(a->name);
    co_group_done(a->object);
}

static void wait_for_group(void *arg)
{
    struct actor *a = arg;
    co_group_wait(a->object);
    note(a->name);
}

static void group_waits_for_all(void **state)
{
    struct sched s;
    sched_init(&s);
    struct co_group g = CO_GROUP_INIT;
    struct actor w = {"w", &g, 0}, t = {"t", &g, 0};
    sched_spawn(&s, wait_for_group, &w); /* nothing to wait for */
    sched_run(&s);
    assert_trace("w");
    co_group_add(&g, 3);
    sched_spawn(&s, wait_for_group, &w);
    sched_spawn(&s, wait_for_group, &w);
    for (int i = 0; i < 3; i++)
        sched_spawn(&s, finish_one, &t);
    sched_run(&s);
    assert_trace("tttww");
    sched_fini(&s);
}

/* ---- Two threads ----
 *
 * A scheduler with a mailbox, as a loop has. Failures in these threads are asserts: cmocka's own
 * can only be used in the first one. */

struct thread_sched {
    struct co_sched co;
    pthread_mutex_t lock;
    pthread_cond_t bell;
    struct co *head, *tail;
    void (*start)(struct thread_sched *);
    struct shared *shared;
    pthread_t thread;
};

static void mailbox_ready(struct co_sched *co, struct co *c)
{
    struct thread_sched *t = (struct thread_sched *)co;
    pthread_mutex_lock(&t->lock);
    co_set_next(c, NULL);
    if (t->tail)
        co_set_next(t->tail, c);
    else
        t->head = c;
    t->tail = c;
    pthread_cond_signal(&t->bell);
    pthread_mutex_unlock(&t->lock);
}

static struct co *mailbox_take(struct thread_sched *t)
{
    struct timespec deadline;
    clock_gettime(CLOCK_REALTIME, &deadline);
    deadline.tv_sec += 60;
    pthread_mutex_lock(&t->lock);
    while (!t->head) {
        int r = pthread_cond_timedwait(&t->bell, &t->lock, &deadline);
        assert(r == 0); /* a wake-up was lost */
    }
    struct co *c = t->head;
    t->head = co_next(c);
    if (!t->head)
        t->tail = NULL;
    pthread_mutex_unlock(&t->lock);
    return c;
}

static void *thread_main(void *arg)
{
    struct thread_sched *t = arg;
    t->start(t);
    while (t->co.n_live)
        co_enter(mailbox_take(t));
    co_sched_fini(&t->co);
    return NULL;
}

static void thread_spawn(struct thread_sched *t, void (*fn)(void *), void *arg)
{
    struct co *c = co_new(&t->co, fn, arg);
    assert(c);
    co_wake(c);
}

/* `start` runs in each of two threads; then they run until their coroutines have ended. */
static void run_two_threads(void (*start)(struct thread_sched *), struct shared *shared)
{
    static struct thread_sched t[2];
    for (int i = 0; i < 2; i++) {
        t[i] = (struct thread_sched){.start = start, .shared = shared};
        pthread_mutex_init(&t[i].lock, NULL);
        pthread_cond_init(&t[i].bell, NULL);
        co_sched_init(&t[i].co, mailbox_ready);
    }
    for (int i = 0; i < 2; i++)
        assert_int_equal(pthread_create(&t[i].thread, NULL, thread_main, &t[i]), 0);
    for (int i = 0; i < 2; i++) {
        assert_int_equal(pthread_join(t[i].thread, NULL), 0);
        pthread_cond_destroy(&t[i].bell);
        pthread_mutex_destroy(&t[i].lock);
    }
}

#define WORKERS 4 /* coroutines per thread */
#define ROUNDS 2000

struct shared {
    struct co_mutex mutex;
    struct co_rwlock rwlock;
    unsigned long
        plain; /* guarded by the lock under test: a race is a lost count, and TSan's prey */
    unsigned long reads;
    struct gate gate;
    struct co_group *group;
    struct spin group_guard;
    struct co_queue group_queue;
};

static void count_under_mutex(void *arg)
{
    struct shared *s = arg;
    for (int i = 0; i < ROUNDS; i++) {
        co_mutex_lock(&s->mutex);
        unsigned long seen = s->plain;
        if (i % 8 == 0)
            pass(); /* held across a yield */
        s->plain = seen + 1;
        co_mutex_unlock(&s->mutex);
    }
}

static void start_mutex(struct thread_sched *t)
{
    for (int i = 0; i < WORKERS; i++)
        thread_spawn(t, count_under_mutex, t->shared);
}

static void mutex_between_threads(void **state)
{
    struct shared s = {.mutex = CO_MUTEX_INIT};
    run_two_threads(start_mutex, &s);
    assert_int_equal(s.plain, 2 * WORKERS * ROUNDS);
    assert_true(co_mutex_trylock(&s.mutex));
}

static void read_and_write(void *arg)
{
    struct shared *s = arg;
    unsigned long last = 0;
    for (int i = 0; i < ROUNDS; i++) {
        if (i % 4 == 0) {
            co_rwlock_wrlock(&s->rwlock);
            unsigned long seen = s->plain;
            if (i % 16 == 0)
                pass();
            s->plain = seen + 1;
        } else {
            co_rwlock_rdlock(&s->rwlock);
            unsigned long seen = s->plain;
            assert(seen >= last);
            last = seen;
            if (i % 16 == 1)
                pass();
            assert(s->plain == seen);
        }
        co_rwlock_unlock(&s->rwlock);
    }
}

static void start_rwlock(struct thread_sched *t)
{
    for (int i = 0; i < WORKERS; i++)
        thread_spawn(t, read_and_write, t->shared);
}

static void rwlock_between_threads(void **state)
{
    struct shared s = {.rwlock = CO_RWLOCK_INIT};
    run_two_threads(start_rwlock, &s);
    assert_int_equal(s.plain, 2 * WORKERS * ROUNDS / 4);
    assert_int_equal(s.rwlock.readers + s.rwlock.writers_waiting, 0);
    assert_false(s.rwlock.writing);
}

/* A bounded buffer of 3 tickets: half of the coroutines make them, half take them. */
static void make_tickets(void *arg)
{
    struct gate *g = &((struct shared *)arg)->gate;
    for (int i = 0; i < ROUNDS; i++) {
        spin_lock(&g->guard);
        while (g->tickets == 3)
            co_queue_wait(&g->queue, &g->guard);
        g->tickets++;
        co_queue_wake_all(&g->queue);
        spin_unlock(&g->guard);
    }
}

static void take_tickets(void *arg)
{
    struct shared *s = arg;
    struct gate *g = &s->gate;
    for (int i = 0; i < ROUNDS; i++) {
        spin_lock(&g->guard);
        while (g->tickets == 0)
            co_queue_wait(&g->queue, &g->guard);
        g->tickets--;
        s->plain++;
        co_queue_wake_all(&g->queue);
        spin_unlock(&g->guard);
    }
}

static void start_tickets(struct thread_sched *t)
{
    for (int i = 0; i < WORKERS / 2; i++) {
        thread_spawn(t, make_tickets, t->shared);
        thread_spawn(t, take_tickets, t->shared);
    }
}

static void queue_between_threads(void **state)
{
    struct shared s = {.gate.guard = SPIN_INIT};
    run_two_threads(start_tickets, &s);
    assert_int_equal(s.plain, WORKERS * ROUNDS);
    assert_int_equal(s.gate.tickets, 0);
}

/* One thread puts a group on its stack, the other finishes it; the group is gone at once after
 * co_group_wait(), so a late touch by co_group_done() is a use of dead stack. */
static void offer_groups(void *arg)
{
    struct shared *s = arg;
    for (int i = 0; i < ROUNDS; i++) {
        struct co_group g = CO_GROUP_INIT;
        co_group_add(&g, 1);
        spin_lock(&s->group_guard);
        s->group = &g;
        co_queue_wake_one(&s->group_queue);
        spin_unlock(&s->group_guard);
        co_group_wait(&g);
        memset(&g, 0xff, sizeof g);
        s->plain++; /* handed on by the group alone */
    }
}

static void finish_groups(void *arg)
{
    struct shared *s = arg;
    for (int i = 0; i < ROUNDS; i++) {
        spin_lock(&s->group_guard);
        while (!s->group)
            co_queue_wait(&s->group_queue, &s->group_guard);
        struct co_group *g = s->group;
        s->group = NULL;
        spin_unlock(&s->group_guard);
        assert(s->plain == (unsigned long)i);
        co_group_done(g);
    }
}

static void start_groups(struct thread_sched *t)
{
    struct shared *s = t->shared;
    spin_lock(&s->group_guard);
    bool first = s->reads++ == 0;
    spin_unlock(&s->group_guard);
    thread_spawn(t, first ? offer_groups : finish_groups, s);
}

static void group_between_threads(void **state)
{
    struct shared s = {.group_guard = SPIN_INIT};
    run_two_threads(start_groups, &s);
    assert_int_equal(s.plain, ROUNDS);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(enter_and_yield),
        cmocka_unit_test(nested_enter),
        cmocka_unit_test(inner_outlives_outer),
        cmocka_unit_test(pool_is_last_in_first_out),
        cmocka_unit_test(pool_is_bounded),
        cmocka_unit_test(new_without_memory),
        cmocka_unit_test(stack_use_is_measured),
        cmocka_unit_test(overflow_hits_the_guard),
        cmocka_unit_test(misuse_is_asserted),
        cmocka_unit_test(many_switches),
        cmocka_unit_test(many_lives),
        cmocka_unit_test(mutex_is_first_in_first_out),
        cmocka_unit_test(mutex_is_fair),
        cmocka_unit_test(mutex_is_handed_over),
        cmocka_unit_test(queue_wakes_one_or_all),
        cmocka_unit_test(rwlock_shares_and_excludes),
        cmocka_unit_test(rwlock_serves_in_order),
        cmocka_unit_test(group_waits_for_all),
        cmocka_unit_test(mutex_between_threads),
        cmocka_unit_test(rwlock_between_threads),
        cmocka_unit_test(queue_between_threads),
        cmocka_unit_test(group_between_threads),
    };
    return cmocka_run_group_tests_name("co", tests, NULL, NULL);
}
