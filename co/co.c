/* SPDX-License-Identifier: Apache-2.0 */
/* Stackful coroutines.
 *
 * One mapping holds it all:
 *
 *     guard page | stack, growing down ........ | struct co
 *
 * so a coroutine costs one mmap when it is new and a few stores when it comes from the pool. The
 * pool is last in first out: the stack used last is the one in the cache.
 *
 * co_enter() and co_yield() are a strict pair, as call and return are: each coroutine knows who
 * entered it. The tools that watch memory accesses are told of each switch, otherwise they would
 * take a change of stack for an error. */
#include "co/co.h"
#include "base/mem.h"
#include "co/switch.h"
#include <assert.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifdef CO_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef CO_TSAN
#include <sanitizer/tsan_interface.h>
#endif
#if __has_include(<valgrind/memcheck.h>)
#include <valgrind/memcheck.h>
#endif

/* Idle stacks kept per scheduler; more than that were needed by a burst that is over. */
#define CO_POOL_MAX 256

#define CO_FILL 0xa5 /* what an untouched byte of a measured stack holds */

struct co {
    void *sp;          /* our context while we do not run */
    void *entered_sp;  /* the context of whoever entered us, while we run */
    struct co *caller; /* the coroutine that entered us; NULL: the thread itself */
    struct co_sched *sched;
    struct co *next;                   /* run queue, waiters, pool: never in two at once */
    struct co *live_next, **live_prev; /* all that have not ended */
    void (*fn)(void *arg);
    void *arg;
    bool entered, ended, measured, wants_write;
#ifdef CO_ASAN
    void *fake_stack;
    const void *entered_low;
    size_t entered_size;
#endif
#ifdef CO_TSAN
    void *fiber;
#endif
#ifdef VALGRIND_STACK_REGISTER
    unsigned valgrind_id;
#endif
};

/* A coroutine stays on its thread, so what these hold is never moved under a running function. */
static _Thread_local struct co *current;
static _Thread_local bool measuring;
static _Thread_local size_t deepest;

/* ---- The mapping ---- */

static size_t guard_size(void)
{
    return (size_t)sysconf(_SC_PAGESIZE);
}

/* `c` is the highest object of its mapping. */
static unsigned char *stack_low(struct co *c)
{
    return (unsigned char *)(c + 1) - CO_STACK_SIZE;
}

static void *stack_top(struct co *c)
{
    return (void *)((uintptr_t)c & ~(uintptr_t)15);
}

/* A frame that never reached its end (a longjmp out of it, a mapping that went) leaves poison
 * behind, which would be reported in whatever uses this memory next. */
static void stack_unpoison(struct co *c)
{
#ifdef CO_ASAN
    ASAN_UNPOISON_MEMORY_REGION(stack_low(c), (size_t)((unsigned char *)c - stack_low(c)));
#endif
}

/* ---- Telling the tools about a switch ----
 *
 * ASan wants a word before and after each switch, from the side that runs. TSan is told by the side
 * that enters alone: run() has to return to where it began before the fiber changes, or TSan's own
 * stack of calls would get out of step. */

/* From whoever enters, into `c` and back. */
CO_NO_ASAN static void switch_in(struct co *c)
{
#ifdef CO_ASAN
    void *fake_stack;
    __sanitizer_start_switch_fiber(&fake_stack, stack_low(c),
                                   (size_t)((unsigned char *)c - stack_low(c)));
#endif
#ifdef CO_TSAN
    void *entered_fiber = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(c->fiber, 0);
#endif
    co_switch(&c->entered_sp, c->sp);
#ifdef CO_TSAN
    __tsan_switch_to_fiber(entered_fiber, 0);
#endif
#ifdef CO_ASAN
    __sanitizer_finish_switch_fiber(fake_stack, NULL, NULL);
#endif
}

/* From `c` back to whoever entered it, until it is entered again. */
CO_NO_ASAN static void switch_out(struct co *c)
{
#ifdef CO_ASAN
    __sanitizer_start_switch_fiber(&c->fake_stack, c->entered_low, c->entered_size);
#endif
    co_switch(&c->sp, c->entered_sp);
#ifdef CO_ASAN
    __sanitizer_finish_switch_fiber(c->fake_stack, &c->entered_low, &c->entered_size);
#endif
}

/* The lowest frame of a coroutine, from its first switch to its last one. */
CO_NO_ASAN static void *run(void *arg)
{
    struct co *c = arg;
#ifdef CO_ASAN
    __sanitizer_finish_switch_fiber(NULL, &c->entered_low, &c->entered_size);
#endif
    c->fn(c->arg);
    c->ended = true;
#ifdef CO_ASAN
    __sanitizer_start_switch_fiber(NULL, c->entered_low, c->entered_size);
#endif
    return c->entered_sp;
}

/* ---- A coroutine's life ---- */

static struct co *co_map(struct co_sched *s)
{
    if (mem_fails())
        return NULL;
    size_t guard = guard_size();
    unsigned char *map = mmap(NULL, guard + CO_STACK_SIZE, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (map == MAP_FAILED)
        return NULL;
    if (mprotect(map, guard, PROT_NONE) < 0) {
        munmap(map, guard + CO_STACK_SIZE);
        return NULL;
    }
    struct co *c = (struct co *)(map + guard + CO_STACK_SIZE) - 1;
    c->sched = s;
    stack_unpoison(c); /* the address may have belonged to something else */
#ifdef CO_TSAN
    c->fiber = __tsan_create_fiber(0);
#endif
#ifdef VALGRIND_STACK_REGISTER
    c->valgrind_id = VALGRIND_STACK_REGISTER(stack_low(c), c);
#endif
    return c;
}

static void co_unmap(struct co *c)
{
#ifdef CO_TSAN
    __tsan_destroy_fiber(c->fiber);
#endif
#ifdef VALGRIND_STACK_REGISTER
    VALGRIND_STACK_DEREGISTER(c->valgrind_id);
#endif
    stack_unpoison(c);
    munmap(stack_low(c) - guard_size(), guard_size() + CO_STACK_SIZE);
}

void co_sched_init(struct co_sched *s, void (*ready)(struct co_sched *, struct co *))
{
    *s = (struct co_sched){.ready = ready};
}

void co_sched_fini(struct co_sched *s)
{
    assert(s->n_live == 0);
    while (s->pool) {
        struct co *c = s->pool;
        s->pool = c->next;
        s->n_pool--;
        co_unmap(c);
    }
    assert(s->n_pool == 0);
}

/* Everything below a context that has not begun is free. A margin for what the backend may keep. */
static size_t fillable(struct co *c)
{
    return (size_t)((unsigned char *)c->sp - stack_low(c)) - 1024;
}

/* For valgrind everything below a stack pointer is out of bounds, and we are about to touch it. */
static void stack_show(struct co *c)
{
#ifdef VALGRIND_MAKE_MEM_DEFINED
    VALGRIND_MAKE_MEM_DEFINED(stack_low(c), (size_t)((unsigned char *)c - stack_low(c)));
#endif
}

static void measure(struct co *c)
{
    stack_show(c);
    const unsigned char *low = stack_low(c);
    size_t untouched = 0;
    while (untouched < CO_STACK_SIZE && low[untouched] == CO_FILL)
        untouched++;
    size_t used = CO_STACK_SIZE - untouched;
    if (used > deepest)
        deepest = used;
}

struct co *co_new(struct co_sched *s, void (*fn)(void *arg), void *arg)
{
    struct co *c = s->pool;
    if (c) {
        s->pool = c->next;
        s->n_pool--;
        stack_unpoison(c);
    } else {
        c = co_map(s);
        if (!c)
            return NULL;
    }
    s->n_live++;
    c->live_next = s->live;
    c->live_prev = &s->live;
    if (s->live)
        s->live->live_prev = &c->live_next;
    s->live = c;
    c->next = NULL;
    c->fn = fn;
    c->arg = arg;
    c->ended = false;
    c->sp = co_switch_prepare(stack_low(c), stack_top(c), run, c);
    c->measured = measuring;
    if (c->measured) {
        stack_show(c);
        memset(stack_low(c), CO_FILL, fillable(c));
    }
    return c;
}

static void leave_live(struct co *c)
{
    *c->live_prev = c->live_next;
    if (c->live_next)
        c->live_next->live_prev = c->live_prev;
    c->sched->n_live--;
}

void co_abandon_all(struct co_sched *s)
{
    assert(!current);
    while (s->live) {
        struct co *c = s->live;
        leave_live(c);
        co_unmap(c);
    }
}

static void co_end(struct co *c)
{
    struct co_sched *s = c->sched;
    leave_live(c);
    stack_unpoison(c);
    if (c->measured)
        measure(c);
    if (s->n_pool == CO_POOL_MAX) {
        co_unmap(c);
        return;
    }
    c->next = s->pool;
    s->pool = c;
    s->n_pool++;
}

void co_enter(struct co *c)
{
    assert(!c->entered && !c->ended);
    c->caller = current;
    c->entered = true;
    current = c;
    switch_in(c);
    current = c->caller;
    c->entered = false;
    if (c->ended)
        co_end(c);
}

void co_yield(void)
{
    struct co *c = current;
    assert(c); /* only coroutines yield */
    switch_out(c);
}

void co_wake(struct co *c)
{
    c->sched->ready(c->sched, c);
}

struct co *co_self(void)
{
    return current;
}

struct co_sched *co_sched_of(struct co *c)
{
    return c->sched;
}

struct co *co_next(struct co *c)
{
    return c->next;
}

void co_set_next(struct co *c, struct co *next)
{
    c->next = next;
}

void co_set_wants_write(struct co *c, bool wants)
{
    c->wants_write = wants;
}

bool co_wants_write(struct co *c)
{
    return c->wants_write;
}

void co_measure_stacks(bool on)
{
    measuring = on;
}

size_t co_deepest_stack(void)
{
    return deepest;
}

const char *co_backend(void)
{
    return co_switch_name;
}
