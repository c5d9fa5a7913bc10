/* SPDX-License-Identifier: Apache-2.0 */
/* Tests of locks between coroutines: of one scheduler, then of two in two threads. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "co/co_test.h"
#include "co/sync.h"
#include <pthread.h>
#include <stdio.h>
#include <string.h>

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
        cmocka_unit_test(mutex_is_first_in_first_out), cmocka_unit_test(mutex_is_fair),
        cmocka_unit_test(mutex_is_handed_over),        cmocka_unit_test(queue_wakes_one_or_all),
        cmocka_unit_test(rwlock_shares_and_excludes),  cmocka_unit_test(rwlock_serves_in_order),
        cmocka_unit_test(group_waits_for_all),         cmocka_unit_test(mutex_between_threads),
        cmocka_unit_test(rwlock_between_threads),      cmocka_unit_test(queue_between_threads),
        cmocka_unit_test(group_between_threads),
    };
    return cmocka_run_group_tests_name("sync", tests, NULL, NULL);
}
