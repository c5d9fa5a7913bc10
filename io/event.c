/* SPDX-License-Identifier: Apache-2.0 */
/* Events: one waits, others set. One atomic word decides every race:
 *
 *   CLEAR    nothing happened, nobody waits
 *   SET      set and not yet taken
 *   WAITING  `waiter` is parked
 *
 * A setter exchanges the word with SET; the one that gets WAITING back owes the waiter its wake.
 * The timer, which runs on the waiter's own loop, wins only by turning WAITING into CLEAR. So a
 * parked coroutine is woken exactly once, and after its exchange a setter touches the event only
 * while the waiter still hangs on its wake: the waiter may free the event when its wait returned.
 */
#include <assert.h>
#include <errno.h>

#include "io/loop.h"

enum { CLEAR, SET, WAITING };

static bool take_set(struct io_event *e)
{
    int want = SET;
    return atomic_compare_exchange_strong(&e->state, &want, CLEAR);
}

void io_event_set(struct io_event *e)
{
    if (atomic_exchange(&e->state, SET) == WAITING)
        co_wake(e->waiter);
}

void event_timer_due(struct io_timer *t)
{
    struct io_event *e = t->event;
    int want = WAITING;
    if (!atomic_compare_exchange_strong(&e->state, &want, CLEAR))
        return; /* a setter was first; its wake is under way */
    t->fired = true;
    co_wake(e->waiter);
}

co_fn int io_event_wait(struct io_event *e, uint64_t deadline)
{
    struct loop *l = loop_self();
    assert(l && co_inside());
    if (take_set(e))
        return 0;
    if (deadline != IO_FOREVER && deadline <= l->io->ops->now(l->io))
        return -ETIME;

    struct io_timer timer = {.deadline = deadline, .event = e};
    e->waiter = co_self();
    e->loop = l;
    e->timer = &timer;
    int want = CLEAR;
    if (!atomic_compare_exchange_strong(&e->state, &want, WAITING)) {
        assert(want == SET); /* WAITING: two wait for one event, which only we could do wrong */
        atomic_exchange(&e->state, CLEAR); /* reads: what its setter did before is ours to see */
        return 0;
    }
    if (deadline != IO_FOREVER)
        loop_timer_arm(l, &timer);
    co_yield();
    loop_timer_disarm(l, &timer);
    e->timer = NULL;
    /* Timed out, and set before we came to run: the set counts, or it would be told too late. */
    return take_set(e) ? 0 : -ETIME;
}

co_fn void io_sleep(uint64_t ns)
{
    struct loop *l = loop_self();
    if (ns == 0) {
        loop_pause();
        return;
    }
    uint64_t now = l->io->ops->now(l->io);
    struct io_event e = IO_EVENT_INIT;
    io_event_wait(&e, ns < IO_FOREVER - now ? now + ns : IO_FOREVER);
}
