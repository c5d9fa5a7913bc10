/* SPDX-License-Identifier: Apache-2.0 */
/* What the tests of coroutines share: a scheduler in one thread that is a plain run queue, and a
 * trace of what happened. Nothing but libc is needed. Included once by each test program. */
#pragma once
#include <assert.h>
#include <stdint.h>
#include <string.h>

#include "base/check.h"
#include "co/co.h"

struct sched {
    struct co_sched co;
    struct co *head, *tail;
};

static inline void sched_ready(struct co_sched *co, struct co *c)
{
    struct sched *s = (struct sched *)co;
    co_set_next(c, NULL);
    if (s->tail)
        co_set_next(s->tail, c);
    else
        s->head = c;
    s->tail = c;
}

static inline void sched_init(struct sched *s)
{
    *s = (struct sched){0};
    co_sched_init(&s->co, sched_ready);
}

static inline void sched_run(struct sched *s)
{
    while (s->head) {
        struct co *c = s->head;
        s->head = co_next(c);
        if (!s->head)
            s->tail = NULL;
        co_enter(c);
    }
}

static inline struct co *sched_spawn(struct sched *s, void (*fn)(void *), void *arg)
{
    struct co *c = co_new(&s->co, fn, arg);
    CHECK(c);
    co_wake(c);
    return c;
}

static inline void sched_fini(struct sched *s)
{
    CHECK(!s->head);
    CHECK_EQ(s->co.n_live, 0);
    co_sched_fini(&s->co);
}

/* Lets all others that are ready run once. */
static inline co_fn void pass(void)
{
    co_wake(co_self());
    co_yield();
}

/* What happened, in order. */
static char trace[256];

static inline void note(const char *what)
{
    size_t len = strlen(trace);
    assert(len + strlen(what) < sizeof trace);
    strcpy(trace + len, what);
}

static inline void assert_trace(const char *want)
{
    if (strcmp(trace, want) != 0)
        fprintf(stderr, "%s\n", trace);
    CHECK(strcmp(trace, want) == 0);
    trace[0] = '\0';
}
