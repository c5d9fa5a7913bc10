/* SPDX-License-Identifier: Apache-2.0 */
/* Tests of coroutines, on a scheduler that is a plain run queue. Locks: sync_test.c. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "base/mem.h"
#include "co/co_test.h"
#include "co/switch.h"
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

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
    };
    return cmocka_run_group_tests_name("co", tests, NULL, NULL);
}
