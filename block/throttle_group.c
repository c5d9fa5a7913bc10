/* SPDX-License-Identifier: Apache-2.0 */
/* Who may go next, and who watches the clock for the rest.
 *
 * A waiting request is a struct on the stack of its coroutine, in the queue of its node and side.
 * Whoever has a reason to think that somebody may go runs a *round* (grant): as long as the buckets
 * allow, the first request of the node whose turn it is goes. No coroutine of our own does this,
 * but the waiting ones themselves: one of them is the *keeper* and waits with a timer, on its own
 * loop, until the next may go; all others wait without. The rules:
 *
 *   a request that finds its side empty runs a round and, if it has to stay, becomes the keeper;
 *   a keeper whose time has come runs a round; so does whoever is *poked*. If it has to stay it is
 *   the keeper now; a timer that somebody else has taken over from means nothing;
 *   whoever goes in a round of its own leaves the clock to the keeper, and pokes it if it would
 * come too late; if the keeper itself goes, one of those that stay is the keeper and is poked.
 *
 * So for every side on which requests wait, somebody comes in time: a round sees the wait of both
 * sides but for those whose first request has been poked and is about to look. What happens later
 * (charges) makes waits longer; where they become shorter (other limits), the keeper is poked.
 *
 * Letting go and poking are telling by event. A told request may run at once and end; so each is
 * told once at most before it has run (`told`), and it leaves only when the telling is over: one
 * whose timer was first waits for the event too. Events are set outside of the lock. */
#include "block/throttle_group.h"

#include <assert.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include "base/bytes.h"
#include "base/mem.h"
#include "block/driver.h"
#include "block/node.h"
#include "io/io.h"

#define ROUND_MAX 16u /* requests let go under one hold of the lock */

struct throttle_request {
    struct throttle_member *member;
    enum throttle_side side;
    uint64_t bytes;
    struct io_event event;
    bool granted, told;
    struct throttle_request *next_told;
    TAILQ_ENTRY(throttle_request) link;
};

struct throttle_group {
    char *id;
    struct io *io;
    _Atomic unsigned limited; /* bit 1 << side: requests of it have to look at the buckets */
    struct spin lock;         /* guards all below */
    struct throttle budget;
    TAILQ_HEAD(, throttle_member) turns[THROTTLE_SIDES]; /* members with requests waiting */
    enum throttle_side next_side;
    struct throttle_request *keeper;       /* NULL: nobody waits */
    uint64_t keeper_when;                  /* until then its timer runs */
    TAILQ_HEAD(, throttle_member) members; /* control loop */
    TAILQ_ENTRY(throttle_group) link;
};

/* Those to be told when the lock is free again, oldest first. */
struct told {
    struct throttle_request *first, **end;
};

static void told_init(struct told *t)
{
    t->first = NULL;
    t->end = &t->first;
}

static void told_add(struct told *t, struct throttle_request *rq)
{
    assert(!rq->told);
    rq->told = true;
    rq->next_told = NULL;
    *t->end = rq;
    t->end = &rq->next_told;
}

/* The lock is free: this may cost a system call. A request may be gone once it has been told. */
static void tell(const struct told *t)
{
    struct throttle_request *rq = t->first;
    while (rq) {
        struct throttle_request *next = rq->next_told;
        io_event_set(&rq->event);
        rq = next;
    }
}

/* ------------------------------------------------------------------ a round; under the lock */

static void enqueue(struct throttle_group *t, struct throttle_request *rq)
{
    struct throttle_member *m = rq->member;
    if (TAILQ_EMPTY(&m->queue[rq->side]))
        TAILQ_INSERT_TAIL(&t->turns[rq->side], m, turn[rq->side]);
    TAILQ_INSERT_TAIL(&m->queue[rq->side], rq, link);
}

/* The request goes; its node's next turn is after everybody else's. */
static void let_go(struct throttle_group *t, struct throttle_request *rq, uint64_t now)
{
    struct throttle_member *m = rq->member;
    TAILQ_REMOVE(&m->queue[rq->side], rq, link);
    TAILQ_REMOVE(&t->turns[rq->side], m, turn[rq->side]);
    if (!TAILQ_EMPTY(&m->queue[rq->side]))
        TAILQ_INSERT_TAIL(&t->turns[rq->side], m, turn[rq->side]);
    throttle_charge(&t->budget, rq->side, rq->bytes, now);
    rq->granted = true;
    if (t->keeper == rq)
        t->keeper = NULL;
}

/* The request that may go now, or NULL and when that will change. One that has been poked is left
 * to itself: it is about to look, and takes care of its side. */
static struct throttle_request *next_to_go(struct throttle_group *t, uint64_t now, uint64_t *when)
{
    *when = IO_FOREVER;
    for (unsigned i = 0; i < THROTTLE_SIDES; i++) {
        enum throttle_side side = i ? !t->next_side : t->next_side;
        struct throttle_member *m = TAILQ_FIRST(&t->turns[side]);
        struct throttle_request *rq = m ? TAILQ_FIRST(&m->queue[side]) : NULL;
        if (!rq || rq->told)
            continue;
        uint64_t wait = throttle_wait(&t->budget, side, now);
        if (!wait) {
            t->next_side = !side;
            return rq;
        }
        *when = MIN(*when, now + wait);
    }
    return NULL;
}

/* Somebody has to be there at `when`: `self`, if it runs this round and stays; else the keeper, who
 * is poked if it would come later. */
static void choose_keeper(struct throttle_group *t, struct throttle_request *self, uint64_t when,
                          struct told *told)
{
    if (self && !self->granted) {
        t->keeper = self;
        t->keeper_when = when;
        return;
    }
    for (unsigned side = 0; side < THROTTLE_SIDES && !t->keeper; side++) {
        struct throttle_member *m = TAILQ_FIRST(&t->turns[side]);
        t->keeper = m ? TAILQ_FIRST(&m->queue[side]) : NULL;
        t->keeper_when = IO_FOREVER;
    }
    if (t->keeper && !t->keeper->told && when < t->keeper_when)
        told_add(told, t->keeper);
}

/* Lets go of those who may, `self` perhaps among them (NULL: we are none of them). Returns until
 * when self, if it stays, has to wait before it runs the next round. */
static uint64_t grant(struct throttle_group *t, struct throttle_request *self, uint64_t now,
                      struct told *told)
{
    struct throttle_request *rq;
    uint64_t when = IO_FOREVER;
    unsigned n = 0;
    if (self && self->member->drained)
        let_go(t, self, now);
    while (n < ROUND_MAX && (rq = next_to_go(t, now, &when))) {
        let_go(t, rq, now);
        if (rq != self)
            told_add(told, rq);
        n++;
    }
    if (n == ROUND_MAX)
        when = now; /* there may be more */
    choose_keeper(t, self, when, told);
    return when;
}

/* ------------------------------------------------------------------ waiting */

/* In the queue, with the lock held, which is given back. `look`: run a round first. */
static co_fn void wait_for_turn(struct throttle_group *t, struct throttle_request *rq, bool look,
                                uint64_t now)
{
    uint64_t when = IO_FOREVER;
    while (!rq->granted) {
        struct told told;
        told_init(&told);
        if (look)
            when = grant(t, rq, now, &told);
        bool granted = rq->granted;
        spin_unlock(&t->lock);
        tell(&told);
        if (granted)
            return;
        int r = io_event_wait(&rq->event, when);
        now = io_now(t->io);
        spin_lock(&t->lock);
        if (r < 0 && rq->told) { /* somebody is about to set the event */
            spin_unlock(&t->lock);
            io_event_wait(&rq->event, IO_FOREVER);
            now = io_now(t->io);
            spin_lock(&t->lock);
        }
        look = rq->told || t->keeper == rq;
        when = IO_FOREVER;
        rq->told = false;
    }
    spin_unlock(&t->lock);
}

void throttle_admit(struct throttle_member *m, enum throttle_side side, uint64_t bytes)
{
    struct throttle_group *t = m->group;
    if (!(atomic_load_explicit(&t->limited, memory_order_relaxed) & 1u << side))
        return;
    struct throttle_request rq = {
        .member = m, .side = side, .bytes = bytes, .event = IO_EVENT_INIT};
    uint64_t now = io_now(t->io);
    spin_lock(&t->lock);
    bool alone = TAILQ_EMPTY(&t->turns[THROTTLE_READ]) && TAILQ_EMPTY(&t->turns[THROTTLE_WRITE]);
    if (m->drained || (alone && !throttle_wait(&t->budget, side, now))) {
        throttle_charge(&t->budget, side, bytes, now);
        spin_unlock(&t->lock);
        return;
    }
    bool first = TAILQ_EMPTY(&t->turns[side]);
    enqueue(t, &rq);
    wait_for_turn(t, &rq, first, now);
}

/* ------------------------------------------------------------------ from outside */

/* Up to ROUND_MAX requests of the member go; returns whether there are more. */
static bool release(struct throttle_member *m, struct told *told, uint64_t now)
{
    unsigned n = 0;
    for (unsigned side = 0; side < THROTTLE_SIDES; side++) {
        struct throttle_request *rq, *next;
        for (rq = TAILQ_FIRST(&m->queue[side]); rq && n < ROUND_MAX; rq = next) {
            next = TAILQ_NEXT(rq, link);
            let_go(m->group, rq, now);
            if (!rq->told) /* else it is about to look */
                told_add(told, rq);
            n++;
        }
    }
    choose_keeper(m->group, NULL, now, told);
    return n == ROUND_MAX;
}

void throttle_drain_begin(struct throttle_member *m)
{
    struct throttle_group *t = m->group;
    bool more = true;
    spin_lock(&t->lock);
    m->drained++;
    spin_unlock(&t->lock);
    while (more) {
        struct told told;
        told_init(&told);
        uint64_t now = io_now(t->io);
        spin_lock(&t->lock);
        more = release(m, &told, now);
        spin_unlock(&t->lock);
        tell(&told);
    }
}

void throttle_drain_end(struct throttle_member *m)
{
    spin_lock(&m->group->lock);
    assert(m->drained);
    m->drained--;
    spin_unlock(&m->group->lock);
}

/* ------------------------------------------------------------------ groups */

static void group_free(struct throttle_group *t)
{
    assert(TAILQ_EMPTY(&t->members));
    mem_free(t->id);
    mem_free(t);
}

int throttle_group_new(struct graph *g, const char *id, const struct throttle_limits *l,
                       struct tide_error *err)
{
    int r = throttle_check(l, err);
    if (r < 0)
        return r;
    struct throttle_group *t = mem_zalloc(sizeof *t);
    char *copy = mem_strdup(id);
    if (!t || !copy) {
        mem_free(t);
        mem_free(copy);
        return tide_fail(err, -ENOMEM, "no memory for object '%s'", id);
    }
    t->id = copy;
    t->io = g->io;
    t->lock = (struct spin)SPIN_INIT;
    throttle_init(&t->budget, l, io_now(t->io));
    atomic_store(&t->limited, throttle_sides(&t->budget));
    for (unsigned side = 0; side < THROTTLE_SIDES; side++)
        TAILQ_INIT(&t->turns[side]);
    TAILQ_INIT(&t->members);
    TAILQ_INSERT_TAIL(&g->throttle_groups, t, link);
    return 0;
}

struct throttle_group *throttle_group_find(struct graph *g, const char *id)
{
    struct throttle_group *t;
    TAILQ_FOREACH (t, &g->throttle_groups, link) {
        if (!strcmp(t->id, id))
            return t;
    }
    return NULL;
}

/* "'t0', 't1' and 3 others" */
static void name_members(const struct throttle_group *t, char *text, size_t size)
{
    const struct throttle_member *m;
    unsigned n = 0, named = 0;
    size_t used = 0;
    TAILQ_FOREACH (m, &t->members, link) {
        if (n++ < 4) {
            used += (size_t)snprintf(text + used, size - used, "%s'%s'", named ? ", " : "",
                                     node_name(m->node));
            named++;
        }
    }
    if (n > named)
        snprintf(text + used, size - used, " and %u other%s", n - named, n - named > 1 ? "s" : "");
}

int throttle_group_del(struct graph *g, const char *id, struct tide_error *err)
{
    struct throttle_group *t = throttle_group_find(g, id);
    char users[4 * (NODE_NAME_MAX + 4) + 32];
    if (!t)
        return tide_fail(err, -ENOENT, "throttle-group '%s' not found", shown_name(id).text);
    if (!TAILQ_EMPTY(&t->members)) {
        name_members(t, users, sizeof users);
        return tide_fail(err, -EBUSY, "throttle-group '%s' is in use by node %s",
                         shown_name(id).text, users);
    }
    TAILQ_REMOVE(&g->throttle_groups, t, link);
    group_free(t);
    return 0;
}

void throttle_groups_free(struct graph *g)
{
    struct throttle_group *t;
    while ((t = TAILQ_FIRST(&g->throttle_groups))) {
        TAILQ_REMOVE(&g->throttle_groups, t, link);
        group_free(t);
    }
}

/* Limits change on the control loop only, where this is asked: no lock. */
void throttle_group_limits(const struct throttle_group *t, struct throttle_limits *out)
{
    *out = t->budget.limits;
}

int throttle_group_set(struct throttle_group *t, const struct throttle_limits *l,
                       struct tide_error *err)
{
    struct told told;
    int r = throttle_check(l, err);
    if (r < 0)
        return r;
    uint64_t now = io_now(t->io);
    told_init(&told);
    spin_lock(&t->lock);
    throttle_change(&t->budget, l, now);
    atomic_store(&t->limited, throttle_sides(&t->budget));
    if (t->keeper && !t->keeper->told) /* its timer knows the old limits */
        told_add(&told, t->keeper);
    spin_unlock(&t->lock);
    tell(&told);
    return 0;
}

void throttle_join(struct throttle_member *m, struct throttle_group *t, const struct node *n)
{
    m->group = t;
    m->node = n;
    for (unsigned side = 0; side < THROTTLE_SIDES; side++)
        TAILQ_INIT(&m->queue[side]);
    TAILQ_INSERT_TAIL(&t->members, m, link);
}

void throttle_leave(struct throttle_member *m)
{
    if (!m->group)
        return;
    for (unsigned side = 0; side < THROTTLE_SIDES; side++)
        assert(TAILQ_EMPTY(&m->queue[side]));
    TAILQ_REMOVE(&m->group->members, m, link);
    m->group = NULL;
}
