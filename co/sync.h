/* SPDX-License-Identifier: Apache-2.0 */
/* Waiting for each other. Everything here works between coroutines of different schedulers: a
 * waiter is woken through its own scheduler. State is guarded by a spinlock of a few instructions.
 * Waiters are served first in, first out. A zeroed object with SPIN_INIT is valid: use the _INIT.
 */
#pragma once
#include "base/spin.h"
#include "co/co.h"

struct co_waiters { /* a FIFO of parked coroutines linked by co_next */
    struct co *head, *tail;
};

/* Mutual exclusion across yields. Handed over directly to the first waiter. */
struct co_mutex {
    struct spin spin;
    bool held;
    struct co_waiters waiters;
};
#define CO_MUTEX_INIT                                                                              \
    {                                                                                              \
        SPIN_INIT, false,                                                                          \
        {                                                                                          \
            NULL, NULL                                                                             \
        }                                                                                          \
    }
co_fn void co_mutex_lock(struct co_mutex *m);
bool co_mutex_trylock(struct co_mutex *m);
void co_mutex_unlock(struct co_mutex *m);

/* A queue of coroutines that wait for something; the caller re-checks its condition in a loop.
 * `guard` is the spinlock under which the condition is read and changed: held on call, released
 * while parked, held again on return. */
struct co_queue {
    struct co_waiters waiters;
};
co_fn void co_queue_wait(struct co_queue *q, struct spin *guard);
/* Wake one / all; the guard is held by the caller. */
bool co_queue_wake_one(struct co_queue *q);
void co_queue_wake_all(struct co_queue *q);

/* Readers share, a writer is alone; a waiting writer holds up new readers. */
struct co_rwlock {
    struct spin spin;
    unsigned readers;
    bool writing;
    unsigned writers_waiting;
    struct co_queue queue;
};
#define CO_RWLOCK_INIT                                                                             \
    {                                                                                              \
        SPIN_INIT, 0, false, 0,                                                                    \
        {                                                                                          \
            {                                                                                      \
                NULL, NULL                                                                         \
            }                                                                                      \
        }                                                                                          \
    }
co_fn void co_rwlock_rdlock(struct co_rwlock *l);
co_fn void co_rwlock_wrlock(struct co_rwlock *l);
void co_rwlock_unlock(struct co_rwlock *l); /* either kind */

/* Count of running tasks; co_group_wait returns when it is 0. add/done from any thread. */
struct co_group {
    struct spin spin;
    unsigned n;
    struct co_queue queue;
};
#define CO_GROUP_INIT                                                                              \
    {                                                                                              \
        SPIN_INIT, 0,                                                                              \
        {                                                                                          \
            {                                                                                      \
                NULL, NULL                                                                         \
            }                                                                                      \
        }                                                                                          \
    }
void co_group_add(struct co_group *g, unsigned n);
void co_group_done(struct co_group *g);
co_fn void co_group_wait(struct co_group *g);
