/* SPDX-License-Identifier: Apache-2.0 */
/* Limits that several nodes share, and the requests that wait for them.
 *
 * Requests of one node and one side (reads; writes, zeroes, discards) go in the order in which they
 * came. Nodes with requests waiting take turns, and so do the two sides where both may go. While a
 * node is drained its requests go at once and are charged all the same: what comes after pays.
 *
 * A group belongs to a graph and has an id. It is made, changed and deleted on the control loop;
 * requests come from any loop. */
#pragma once
#include <stdbool.h>
#include <sys/queue.h>

#include "base/error.h"
#include "block/throttle.h"
#include "co/co.h"

struct graph;
struct node;
struct throttle_group;
struct throttle_request;

/* A node's place in its group; part of the driver's state. */
struct throttle_member {
    struct throttle_group *group; /* NULL: in none */
    const struct node *node;
    unsigned drained; /* this and all below is guarded by the group */
    TAILQ_HEAD(, throttle_request) queue[THROTTLE_SIDES];
    TAILQ_ENTRY(throttle_member) turn[THROTTLE_SIDES]; /* while its queue is not empty */
    TAILQ_ENTRY(throttle_member) link;
};

/* The id is nobody else's. -EINVAL with a text where throttle_check() refuses; -ENOMEM. */
int throttle_group_new(struct graph *g, const char *id, const struct throttle_limits *l,
                       struct tide_error *err);
/* -EBUSY, with a text that names them, while nodes are in it. */
int throttle_group_del(struct graph *g, const char *id, struct tide_error *err);
/* NULL: none of that id. */
struct throttle_group *throttle_group_find(struct graph *g, const char *id);
/* At the end of the graph: groups that nobody deleted. */
void throttle_groups_free(struct graph *g);

void throttle_group_limits(const struct throttle_group *t, struct throttle_limits *out);
/* Takes effect at once, for waiting requests too. Checked as above; refused, nothing changes. */
int throttle_group_set(struct throttle_group *t, const struct throttle_limits *l,
                       struct tide_error *err);

/* Control loop. Whoever leaves has no request waiting; NULL group is fine. */
void throttle_join(struct throttle_member *m, struct throttle_group *t, const struct node *n);
void throttle_leave(struct throttle_member *m);
/* Returns when a request of `bytes` may go. Any loop; costs one load where nothing is limited. */
co_fn void throttle_admit(struct throttle_member *m, enum throttle_side side, uint64_t bytes);
/* As drain_begin and drain_end of block/driver.h. */
void throttle_drain_begin(struct throttle_member *m);
void throttle_drain_end(struct throttle_member *m);
