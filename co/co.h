/* SPDX-License-Identifier: Apache-2.0 */
/* Stackful coroutines. Knows no I/O and no thread: whoever embeds a `struct co_sched` (a loop, a
 * test) decides when a ready coroutine runs.
 *
 * A coroutine lives and dies on one scheduler; nothing on its stack is touched by another thread
 * unless handed over. Functions that may yield are marked `co_fn` in their declaration and are
 * called from coroutines only. Stacks are CO_STACK_SIZE bytes with a guard page below, pooled last
 * in first out per scheduler. */
#pragma once
#include <stdbool.h>
#include <stddef.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define CO_STACK_SIZE (512 * 1024) /* instrumented frames are several times as large */
#else
#define CO_STACK_SIZE (128 * 1024)
#endif
#define co_fn /* this function may yield */

struct co;

struct co_sched {
    /* `c` may run now: put it where its own thread finds it. Any thread; called by co_wake(). */
    void (*ready)(struct co_sched *, struct co *);
    struct co *pool; /* finished coroutines, kept for reuse; own thread only */
    struct co *live; /* all that have not ended */
    unsigned n_pool, n_live;
};

void co_sched_init(struct co_sched *s, void (*ready)(struct co_sched *, struct co *));
/* Free coroutines that will never be entered again: what their stacks own is lost with them. For
 * the end of a process and for simulated power cuts. Outside coroutines. */
void co_abandon_all(struct co_sched *s);
/* All coroutines have ended or were abandoned. Frees the pool. */
void co_sched_fini(struct co_sched *s);

/* A new coroutine that will run fn(arg); it does not run yet. Freed (pooled) when fn returns.
 * NULL: no memory. Own thread of `s` only. */
struct co *co_new(struct co_sched *s, void (*fn)(void *arg), void *arg);

/* Switch to `c` until it yields or ends, then return. From the thread of its scheduler, from
 * outside any coroutine or from inside another one (which continues when `c` yields or ends):
 * that is how a request that never waits costs no trip through the run queue. */
void co_enter(struct co *c);

/* Back to whoever entered us. Returns when somebody enters us again. */
co_fn void co_yield(void);

/* Exactly one wake for each yield: tells the scheduler that `c` may be entered again. Any thread.
 */
void co_wake(struct co *c);

struct co *co_self(void); /* NULL outside coroutines */
struct co_sched *co_sched_of(struct co *c);
static inline bool co_inside(void)
{
    return co_self() != NULL;
}

/* Intrusive link for whoever holds a parked or ready coroutine in a queue (run queue, waiters). */
struct co *co_next(struct co *c);
void co_set_next(struct co *c, struct co *next);

/* Bytes of stack used at the deepest point so far of any coroutine of this thread that ended;
 * measured only when this thread called co_measure_stacks(true) before it made the coroutine. */
void co_measure_stacks(bool on);
size_t co_deepest_stack(void);
/* "x86_64", "aarch64" or "ucontext". */
const char *co_backend(void);
