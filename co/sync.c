/* SPDX-License-Identifier: Apache-2.0 */
/* Waiting for each other.
 *
 * Every wait has three steps: put ourselves into a queue while the spinlock is held, release the
 * spinlock, yield. A wake may come from another thread between the second step and the third. This
 * is safe: co_wake() only hands us to the scheduler of our own thread, and that thread is busy
 * running us until we have yielded. For the same reason one link per coroutine is enough: who waits
 * in a queue cannot be in a run queue, and leaves the one before it enters the other.
 *
 * Locks are handed over: whoever releases makes the first waiter the holder and wakes it, so nobody
 * can jump the queue and a woken waiter has nothing to check. The object may be gone as soon as the
 * spinlock is released (a group lives on the stack of the one who waits for it): those who release
 * take the waiters off under the spinlock, and touch only the waiters afterwards. That also keeps
 * ready(), which may cost a system call, out of the spinlock. */
#include "co/sync.h"
#include "co/switch.h"
#include <assert.h>

static void waiters_push(struct co_waiters *w, struct co *c)
{
    co_set_next(c, NULL);
    if (w->tail)
        co_set_next(w->tail, c);
    else
        w->head = c;
    w->tail = c;
}

static struct co *waiters_pop(struct co_waiters *w)
{
    struct co *c = w->head;
    if (c) {
        w->head = co_next(c);
        if (!w->head)
            w->tail = NULL;
    }
    return c;
}

/* Oldest first. Popped before woken: the woken one may use its link at once. */
static void waiters_wake_all(struct co_waiters *w)
{
    struct co *c;
    while ((c = waiters_pop(w)))
        co_wake(c);
}

/* ---- Mutex ---- */

co_fn void co_mutex_lock(struct co_mutex *m)
{
    spin_lock(&m->spin);
    if (!m->held) {
        m->held = true;
        spin_unlock(&m->spin);
        return;
    }
    assert(co_inside());
    waiters_push(&m->waiters, co_self());
    spin_unlock(&m->spin);
    co_yield();
    /* The one who unlocked left `held` true for us. */
}

bool co_mutex_trylock(struct co_mutex *m)
{
    spin_lock(&m->spin);
    bool got = !m->held;
    m->held = true;
    spin_unlock(&m->spin);
    return got;
}

void co_mutex_unlock(struct co_mutex *m)
{
    spin_lock(&m->spin);
    assert(m->held);
    struct co *heir = waiters_pop(&m->waiters);
    if (!heir)
        m->held = false;
    spin_unlock(&m->spin);
    if (heir)
        co_wake(heir);
}

/* ---- Queue ---- */

co_fn void co_queue_wait(struct co_queue *q, struct spin *guard)
{
    assert(co_inside());
    waiters_push(&q->waiters, co_self());
    spin_unlock(guard);
    co_yield();
    spin_lock(guard);
}

bool co_queue_wake_one(struct co_queue *q)
{
    struct co *c = waiters_pop(&q->waiters);
    if (c)
        co_wake(c);
    return c != NULL;
}

void co_queue_wake_all(struct co_queue *q)
{
    waiters_wake_all(&q->waiters);
}

/* ---- Readers and writers ----
 *
 * One queue for both kinds. The head of a queue that is not empty cannot be admitted now:
 * rw_admit() runs after each release and takes off everyone who can. */

static void rw_wait(struct co_rwlock *l, bool write)
{
    assert(co_inside());
    co_set_wants_write(co_self(), write);
    waiters_push(&l->queue.waiters, co_self());
    spin_unlock(&l->spin);
    co_yield();
    /* The one who released has counted us in. */
}

co_fn void co_rwlock_rdlock(struct co_rwlock *l)
{
    spin_lock(&l->spin);
    if (l->writing || l->writers_waiting) {
        rw_wait(l, false);
        return;
    }
    l->readers++;
    spin_unlock(&l->spin);
}

co_fn void co_rwlock_wrlock(struct co_rwlock *l)
{
    spin_lock(&l->spin);
    if (l->writing || l->readers) {
        l->writers_waiting++;
        rw_wait(l, true);
        return;
    }
    assert(!l->queue.waiters.head);
    l->writing = true;
    spin_unlock(&l->spin);
}

/* Makes holders of those at the head who may be: one writer, or all readers before the next writer.
 * Returns them, still to be woken. */
static struct co_waiters rw_admit(struct co_rwlock *l)
{
    struct co_waiters admitted = {NULL, NULL};
    struct co *c;
    while (!l->writing && (c = l->queue.waiters.head)) {
        if (co_wants_write(c)) {
            if (l->readers)
                break;
            l->writing = true;
            l->writers_waiting--;
        } else {
            l->readers++;
        }
        waiters_push(&admitted, waiters_pop(&l->queue.waiters));
    }
    return admitted;
}

void co_rwlock_unlock(struct co_rwlock *l)
{
    spin_lock(&l->spin);
    if (l->writing) {
        l->writing = false;
    } else {
        assert(l->readers);
        l->readers--;
    }
    struct co_waiters admitted = rw_admit(l);
    spin_unlock(&l->spin);
    waiters_wake_all(&admitted);
}

/* ---- Group ---- */

void co_group_add(struct co_group *g, unsigned n)
{
    spin_lock(&g->spin);
    g->n += n;
    spin_unlock(&g->spin);
}

void co_group_done(struct co_group *g)
{
    struct co_waiters woken = {NULL, NULL};
    spin_lock(&g->spin);
    assert(g->n);
    if (--g->n == 0) {
        woken = g->queue.waiters;
        g->queue.waiters = (struct co_waiters){NULL, NULL};
    }
    spin_unlock(&g->spin);
    waiters_wake_all(&woken);
}

co_fn void co_group_wait(struct co_group *g)
{
    spin_lock(&g->spin);
    while (g->n)
        co_queue_wait(&g->queue, &g->spin);
    spin_unlock(&g->spin);
}
