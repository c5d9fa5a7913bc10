/* SPDX-License-Identifier: Apache-2.0 */
/* Loops: the part that all engines share.
 *
 * Work reaches a loop on two lock-free stacks that any thread may push to, the mailbox (functions
 * to call) and remote_ready (coroutines to enter). The loop takes a whole stack with one exchange
 * and reverses it, so there is no ABA problem and order is kept. What the loop's own thread makes
 * ready goes to a plain list.
 *
 * Sleeping: the loop stores `sleeping`, then looks at both stacks again; a sender pushes, then
 * looks at `sleeping`. All four are seq_cst, so at least one of the two sees the other. The sender
 * that finds `sleeping` set clears it, so one wait costs one kick however many send.
 *
 * Timers are an intrusive pairing heap: no memory, no failure, O(log n). */
#include <assert.h>
#include <errno.h>

#include "base/mem.h"
#include "io/loop.h"

static _Thread_local struct loop *current_loop;

struct loop *loop_self(void)
{
    return current_loop;
}

void loop_enter(struct loop *l)
{
    current_loop = l;
}

unsigned io_n_loops(struct io *io)
{
    return io->n_loops;
}

/* Two that settle at once may pick the same: no harm. */
struct loop *io_settle(struct io *io)
{
    struct loop *best = io->loops[io->n_loops > 1];
    for (unsigned i = 2; i < io->n_loops; i++) {
        if (atomic_load(&io->loops[i]->n_settled) < atomic_load(&best->n_settled))
            best = io->loops[i];
    }
    loop_settle(best);
    return best;
}

void loop_settle(struct loop *l)
{
    atomic_fetch_add(&l->n_settled, 1);
}

void loop_unsettle(struct loop *l)
{
    atomic_fetch_sub(&l->n_settled, 1);
}

struct loop *io_loop(struct io *io, unsigned i)
{
    assert(i < io->n_loops);
    return io->loops[i];
}

unsigned loop_index(struct loop *l)
{
    return l->index;
}

struct io *loop_io(struct loop *l)
{
    return l->io;
}

struct co_sched *loop_sched(struct loop *l)
{
    return &l->sched;
}

uint64_t loop_turn_number(struct loop *l)
{
    return atomic_load_explicit(&l->turn, memory_order_relaxed);
}

/* ------------------------------------------------------------------ sleeping and waking */

void loop_kick(struct loop *l)
{
    if (atomic_load(&l->sleeping) && atomic_exchange(&l->sleeping, false))
        l->io->ops->kick(l);
}

bool loop_has_work(struct loop *l)
{
    return l->run_head || atomic_load(&l->mailbox) || atomic_load(&l->remote_ready);
}

bool loop_may_sleep(struct loop *l)
{
    atomic_store(&l->sleeping, true);
    if (!loop_has_work(l) && !atomic_load(&l->stopping))
        return true;
    atomic_store(&l->sleeping, false);
    return false;
}

void loop_awake(struct loop *l)
{
    atomic_store(&l->sleeping, false);
}

/* ------------------------------------------------------------------ run queue and mailbox */

static void run_queue_push(struct loop *l, struct co *c)
{
    co_set_next(c, NULL);
    if (l->run_tail)
        co_set_next(l->run_tail, c);
    else
        l->run_head = c;
    l->run_tail = c;
}

/* co_wake() ends here. */
static void loop_ready(struct co_sched *s, struct co *c)
{
    struct loop *l = (struct loop *)s;
    if (l == current_loop) {
        run_queue_push(l, c);
        return;
    }
    struct co *head = atomic_load_explicit(&l->remote_ready, memory_order_relaxed);
    do
        co_set_next(c, head);
    while (!atomic_compare_exchange_weak(&l->remote_ready, &head, c));
    loop_kick(l);
}

void loop_post(struct loop *l, struct loop_msg *m)
{
    struct loop_msg *head = atomic_load_explicit(&l->mailbox, memory_order_relaxed);
    do
        m->next = head;
    while (!atomic_compare_exchange_weak(&l->mailbox, &head, m));
    if (l != current_loop)
        loop_kick(l);
}

/* Oldest first. */
static struct loop_msg *mailbox_take(struct loop *l)
{
    struct loop_msg *m = atomic_exchange(&l->mailbox, NULL), *out = NULL;
    while (m) {
        struct loop_msg *next = m->next;
        m->next = out;
        out = m;
        m = next;
    }
    return out;
}

static void take_remote_ready(struct loop *l)
{
    if (!atomic_load_explicit(&l->remote_ready, memory_order_relaxed))
        return;
    struct co *c = atomic_exchange(&l->remote_ready, NULL), *out = NULL;
    while (c) {
        struct co *next = co_next(c);
        co_set_next(c, out);
        out = c;
        c = next;
    }
    while (out) {
        struct co *next = co_next(out);
        run_queue_push(l, out);
        out = next;
    }
}

static void run_messages(struct loop *l)
{
    struct loop_msg *m = mailbox_take(l);
    while (m) {
        struct loop_msg *next = m->next; /* m is its sender's again once fn has begun */
        m->fn(m);
        m = next;
    }
}

void loop_run_leftovers(struct loop *l, void (*fn)(struct loop_msg *))
{
    struct loop_msg *m = mailbox_take(l);
    while (m) {
        struct loop_msg *next = m->next;
        if (m->fn == fn)
            fn(m);
        else
            loop_post(l, m);
        m = next;
    }
}

/* Enter those that are ready now. What they make ready runs in the next turn, after the engine
 * had a look at the world: a coroutine that only pauses cannot starve the rest. */
static void run_ready(struct loop *l)
{
    struct co *c = l->run_head, *last = l->run_tail;
    l->run_head = l->run_tail = NULL;
    while (c) {
        struct co *next = c == last ? NULL : co_next(c);
        co_enter(c);
        c = next;
    }
}

static void run_timers(struct loop *l)
{
    if (!l->timers)
        return;
    uint64_t now = l->io->ops->now(l->io);
    while (l->timers && l->timers->deadline <= now) {
        struct io_timer *t = l->timers;
        loop_timer_disarm(l, t);
        event_timer_due(t);
    }
}

bool loop_turn(struct loop *l)
{
    assert(l == current_loop);
    atomic_fetch_add_explicit(&l->turn, 1, memory_order_relaxed);
    run_messages(l);
    take_remote_ready(l);
    run_ready(l);
    run_timers(l);
    return loop_has_work(l);
}

/* ------------------------------------------------------------------ starting things */

/* A new coroutine of this loop; NULL: no memory. */
static struct co *start(void (*fn)(void *), void *arg)
{
    current_loop->n_started++;
    return co_new(&current_loop->sched, fn, arg);
}

struct spawn {
    struct loop_msg msg; /* first */
    void (*fn)(void *);
    void *arg;
};

static void spawn_here(struct loop_msg *m)
{
    struct spawn *s = (struct spawn *)m;
    struct co *c = start(s->fn, s->arg);
    if (!c) {
        /* The sender was told that it will run. Memory for a stack comes back when another
         * coroutine ends; try in every turn until then. */
        loop_post(current_loop, m);
        return;
    }
    run_queue_push(current_loop, c);
    mem_free(s);
}

int loop_spawn(struct loop *l, void (*fn)(void *), void *arg)
{
    if (l == current_loop) {
        struct co *c = start(fn, arg);
        if (!c)
            return -ENOMEM;
        run_queue_push(l, c);
        return 0;
    }
    struct spawn *s = mem_zalloc(sizeof *s);
    if (!s)
        return -ENOMEM;
    *s = (struct spawn){.msg.fn = spawn_here, .fn = fn, .arg = arg};
    loop_post(l, &s->msg);
    return 0;
}

int loop_run_now(void (*fn)(void *), void *arg)
{
    assert(current_loop);
    struct co *c = start(fn, arg);
    if (!c)
        return -ENOMEM;
    co_enter(c);
    return 0;
}

struct call {
    struct loop_msg msg; /* first */
    void (*fn)(void *);
    void *arg;
    struct co *caller;
};

static void call_here(struct loop_msg *m)
{
    struct call *c = (struct call *)m;
    c->fn(c->arg);
    co_wake(c->caller); /* `c` is on the caller's stack: gone from here on */
}

co_fn void loop_call(struct loop *l, void (*fn)(void *), void *arg)
{
    if (l == current_loop) {
        fn(arg);
        return;
    }
    struct call c = {.msg.fn = call_here, .fn = fn, .arg = arg, .caller = co_self()};
    loop_post(l, &c.msg);
    co_yield();
}

/* One message visits all loops in turn: no memory is needed, so a grace round cannot fail. */
struct grace {
    struct loop_msg msg; /* first */
    struct io *io;
    unsigned next;
    struct co *caller;
};

static void grace_hop(struct loop_msg *m)
{
    struct grace *g = (struct grace *)m;
    if (++g->next < g->io->n_loops)
        loop_post(g->io->loops[g->next], m);
    else
        co_wake(g->caller);
}

co_fn void io_grace(struct io *io)
{
    struct grace g = {.msg.fn = grace_hop, .io = io, .next = 0, .caller = co_self()};
    loop_post(io->loops[0], &g.msg);
    co_yield();
}

co_fn void loop_pause(void)
{
    co_wake(co_self());
    co_yield();
}

#define TURN_NS 1000000u
#define STEPS_PER_LOOK 8u /* at the clock */

co_fn void io_turns_step(void *turns)
{
    struct io_turns *t = turns;
    bool hasty = !t->io->turn_ns;
    if (!hasty && t->steps++ % STEPS_PER_LOOK)
        return;
    uint64_t now = io_now(t->io);
    if (!t->began)
        t->began = now;
    if (now - t->began < t->io->turn_ns)
        return;
    loop_pause();
    t->began = io_now(t->io);
}

/* ------------------------------------------------------------------ timers */

static bool timer_before(const struct io_timer *a, const struct io_timer *b)
{
    return a->deadline != b->deadline ? a->deadline < b->deadline : a->order < b->order;
}

/* Two roots become one. */
static struct io_timer *heap_meld(struct io_timer *a, struct io_timer *b)
{
    if (!a || !b)
        return a ? a : b;
    if (timer_before(b, a)) {
        struct io_timer *t = a;
        a = b;
        b = t;
    }
    b->next = a->child;
    if (b->next)
        b->next->prev = b;
    b->prev = a;
    a->child = b;
    return a;
}

/* Siblings become one heap: meld in pairs left to right, then the pairs right to left. Without
 * recursion, for a heap may be one long row. */
static struct io_timer *heap_meld_row(struct io_timer *t)
{
    struct io_timer *pairs = NULL, *root = NULL;
    while (t) {
        struct io_timer *a = t, *b = t->next;
        t = b ? b->next : NULL;
        a->next = a->prev = NULL;
        if (b)
            b->next = b->prev = NULL;
        a = heap_meld(a, b);
        a->next = pairs;
        pairs = a;
    }
    while (pairs) {
        struct io_timer *next = pairs->next;
        pairs->next = NULL;
        root = heap_meld(root, pairs);
        pairs = next;
    }
    return root;
}

void loop_timer_arm(struct loop *l, struct io_timer *t)
{
    assert(!t->armed);
    t->order = l->timer_order++;
    t->child = t->next = t->prev = NULL;
    t->armed = true;
    t->fired = false;
    l->n_timers++;
    l->timers = heap_meld(l->timers, t);
}

void loop_timer_disarm(struct loop *l, struct io_timer *t)
{
    if (!t->armed)
        return;
    t->armed = false;
    l->n_timers--;
    if (t == l->timers) {
        l->timers = heap_meld_row(t->child);
        return;
    }
    if (t->prev->child == t)
        t->prev->child = t->next;
    else
        t->prev->next = t->next;
    if (t->next)
        t->next->prev = t->prev;
    l->timers = heap_meld(l->timers, heap_meld_row(t->child));
}

uint64_t loop_next_deadline(struct loop *l)
{
    return l->timers ? l->timers->deadline : IO_FOREVER;
}

/* ------------------------------------------------------------------ making and freeing loops */

int io_init(struct io *io, const struct io_ops *ops, unsigned n_loops)
{
    assert(n_loops >= 1);
    io->ops = ops;
    io->turn_ns = TURN_NS;
    io->loops = mem_calloc(n_loops, sizeof *io->loops);
    if (!io->loops)
        return -ENOMEM;
    for (; io->n_loops < n_loops; io->n_loops++) {
        struct loop *l = mem_zalloc(sizeof *l);
        if (!l)
            return -ENOMEM; /* io_fini() frees those that are there */
        co_sched_init(&l->sched, loop_ready);
        l->io = io;
        l->index = io->n_loops;
        io->loops[io->n_loops] = l;
    }
    return 0;
}

void io_fini(struct io *io)
{
    for (unsigned i = 0; i < io->n_loops; i++) {
        struct loop *l = io->loops[i];
        /* Sent to a loop that had left. All other messages lie in their senders' memory. */
        for (struct loop_msg *m = mailbox_take(l); m;) {
            struct loop_msg *next = m->next;
            if (m->fn == spawn_here)
                mem_free(m);
            m = next;
        }
        buf_pool_free(l);
        co_abandon_all(&l->sched);
        co_sched_fini(&l->sched);
        mem_free(l);
    }
    mem_free(io->loops);
    io->loops = NULL;
    io->n_loops = 0;
}
