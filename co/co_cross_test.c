/* SPDX-License-Identifier: Apache-2.0 */
/* A test of the switch that needs nothing but libc, so that it can be built for another machine and
 * run under an emulator (scripts/cross-co.sh). The contract in full is tested by co_test.c; here is
 * what can differ between machines: registers, alignment, floating point, stack growth, the guard.
 */
#include "co/co_test.h"
#include "co/switch.h"
#include "co/sync.h"
#include <inttypes.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static uint64_t scramble(uint64_t x)
{
    x ^= x >> 33;
    x *= UINT64_C(0xff51afd7ed558ccd);
    x ^= x >> 29;
    return x;
}

/* More live integers and doubles than there are callee-saved registers, all kept over each switch.
 */
struct keep {
    struct co *self;
    unsigned seed, rounds;
    bool ok;
};

static void keep_registers(void *arg)
{
    struct keep *k = arg;
    uint64_t i[14];
    double d[14];
    for (unsigned n = 0; n < 14; n++) {
        i[n] = scramble(k->seed * 100 + n);
        d[n] = (double)(k->seed * 100 + n) / 7;
    }
    uint64_t a = i[0], b = i[1], c = i[2], e = i[3], f = i[4], g = i[5], h = i[6], j = i[7];
    uint64_t l = i[8], m = i[9], o = i[10], p = i[11];
    double q = d[0], r = d[1], s = d[2], t = d[3], u = d[4], v = d[5], w = d[6], x = d[7];
    k->ok = true;
    for (unsigned n = 0; n < k->rounds; n++) {
        co_wake(k->self);
        co_yield();
        k->ok = k->ok && co_self() == k->self && a == i[0] && b == i[1] && c == i[2] && e == i[3] &&
                f == i[4] && g == i[5] && h == i[6] && j == i[7] && l == i[8] && m == i[9] &&
                o == i[10] && p == i[11] && q == d[0] && r == d[1] && s == d[2] && t == d[3] &&
                u == d[4] && v == d[5] && w == d[6] && x == d[7];
        a++, b--, c += 3, e ^= a, f += e, g -= b, h ^= c, j += f, l += g, m ^= h, o += j, p -= l;
        q += 1, r -= 1, s *= 2, t /= 2, u += q, v -= r, w += s, x -= t;
        uint64_t ni[] = {a, b, c, e, f, g, h, j, l, m, o, p};
        double nd[] = {q, r, s, t, u, v, w, x};
        memcpy(i, ni, sizeof ni);
        memcpy(d, nd, sizeof nd);
    }
}

static void test_registers(void)
{
    struct sched s;
    sched_init(&s);
    struct keep k[5];
    for (unsigned n = 0; n < 5; n++) {
        k[n] = (struct keep){.seed = n + 1, .rounds = 200};
        k[n].self = co_new(&s.co, keep_registers, &k[n]);
        CHECK(k[n].self);
        co_wake(k[n].self);
    }
    sched_run(&s);
    for (unsigned n = 0; n < 5; n++)
        CHECK(k[n].ok);
    CHECK(s.co.n_live == 0 && s.co.n_pool == 5);
    co_sched_fini(&s.co);
}

/* Variable arguments and floating point break first when the stack is not aligned. */
static void print_on_stack(void *arg)
{
    char text[128];
    long double wide = 1.25L;
    snprintf(text, sizeof text, "%d %.2f %" PRIu64 " %.2Lf", 7, 2.5, UINT64_C(1) << 40, wide);
    CHECK(strcmp(text, "7 2.50 1099511627776 1.25") == 0);
    struct {
        _Alignas(16) char bytes[16];
    } aligned;
    CHECK(((uintptr_t)&aligned & 15) == 0);
    *(bool *)arg = true;
}

static void test_alignment(void)
{
    struct sched s;
    sched_init(&s);
    for (int round = 0; round < 3; round++) { /* fresh, then twice from the pool */
        bool ran = false;
        struct co *c = co_new(&s.co, print_on_stack, &ran);
        CHECK(c);
        co_enter(c);
        CHECK(ran);
    }
    CHECK(s.co.n_pool == 1);
    co_sched_fini(&s.co);
}

struct nested {
    struct sched *s;
    unsigned level, sum;
    struct co *child;
};

static void enter_next_level(void *arg)
{
    struct nested *me = arg;
    struct nested child = {.s = me->s, .level = me->level - 1};
    me->sum = me->level;
    if (me->level) {
        child.child = co_new(&me->s->co, enter_next_level, &child);
        CHECK(child.child);
        co_enter(child.child); /* yields once, deep inside */
        co_enter(child.child);
        me->sum += child.sum;
    }
    co_yield();
}

static void test_nested(void)
{
    struct sched s;
    sched_init(&s);
    struct nested top = {.s = &s, .level = 10};
    top.child = co_new(&s.co, enter_next_level, &top);
    CHECK(top.child);
    co_enter(top.child);
    CHECK(!co_inside());
    co_enter(top.child);
    CHECK(top.sum == 55 && s.co.n_live == 0);
    co_sched_fini(&s.co);
}

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

static void enter_new(struct sched *s, unsigned levels)
{
    struct co *c = co_new(&s->co, go_deep, &levels);
    CHECK(c);
    co_enter(c);
}

/* Access to a page that is there and forbidden, not to an address where nothing is. */
static void on_fault(int sig, siginfo_t *info, void *context)
{
    (void)context;
    _exit(sig == SIGSEGV && info->si_code == SEGV_ACCERR ? 42 : 1);
}

static void catch_faults(void)
{
    static char stack[64 * 1024];
    stack_t ss = {.ss_sp = stack, .ss_size = sizeof stack};
    struct sigaction sa = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    CHECK(sigaltstack(&ss, NULL) == 0 && sigaction(SIGSEGV, &sa, NULL) == 0);
}

static void test_stack_measured(void)
{
    struct sched s;
    sched_init(&s);
    co_measure_stacks(true);
    enter_new(&s, 100);
    co_measure_stacks(false);
    CHECK(co_deepest_stack() > 100 * 512 && co_deepest_stack() < CO_STACK_SIZE);
    co_sched_fini(&s.co);
}

static void test_guard(void)
{
#ifdef CO_TSAN /* is half off in the child of a fork, and reports races that are none */
    return;
#endif
    fflush(NULL);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        struct sched s;
        sched_init(&s);
        catch_faults();
        enter_new(&s, 1000); /* 512 KB: through the guard */
        _exit(0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 42);
}

struct locker {
    struct co_mutex *m;
    unsigned *inside;
    unsigned rounds;
};

static void lock_often(void *arg)
{
    struct locker *k = arg;
    for (; k->rounds; k->rounds--) {
        co_mutex_lock(k->m);
        CHECK(++*k->inside == 1);
        co_wake(co_self());
        co_yield();
        --*k->inside;
        co_mutex_unlock(k->m);
    }
}

static void test_mutex(void)
{
    struct sched s;
    sched_init(&s);
    struct co_mutex m = CO_MUTEX_INIT;
    unsigned inside = 0;
    struct locker k[4];
    for (int n = 0; n < 4; n++) {
        k[n] = (struct locker){&m, &inside, 50};
        struct co *c = co_new(&s.co, lock_often, &k[n]);
        CHECK(c);
        co_wake(c);
    }
    sched_run(&s);
    for (int n = 0; n < 4; n++)
        CHECK(k[n].rounds == 0);
    CHECK(s.co.n_live == 0 && co_mutex_trylock(&m));
    co_sched_fini(&s.co);
}

int main(void)
{
    test_registers();
    test_alignment();
    test_nested();
    test_stack_measured();
    test_guard();
    test_mutex();
    printf("ok: coroutines, backend %s\n", co_backend());
    return 0;
}
