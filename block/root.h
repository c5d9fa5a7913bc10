/* SPDX-License-Identifier: Apache-2.0 */
/* Roots: where I/O enters the graph (an export, one side of a job), each with a gate.
 *
 *   if (root_enter(r)) ...          admitted: the node behind r stands still until root_leave
 *   node_pwritev(root_node(r), ...)
 *   root_leave(r)
 *
 * Enter once per batch of requests (rules: admission before locks: whoever is not admitted holds
 * nothing that an admitted request can wait for). Leave on the loop that entered. A parked caller
 * has to look up node, size and permissions again after root_enter returned.
 *
 * quiesce_begin() closes the gates of all roots that reach a node of a set and waits until nobody
 * is inside; it is the only way to change what I/O reads. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"
#include "co/co.h"

struct graph;
struct node;
struct root;

#define ROOT_READ 1u
#define ROOT_WRITE 2u
#define ROOT_ALONE 4u /* nobody else writes to the node while this root lives */

/* `what` ("export 'e0'", "job 'j0' target") names it in errors; copied. Checks permissions both
 * ways and takes file locks: -EPERM, -EBUSY, -EAGAIN with a text. The node gets a reference.
 * Control. */
co_fn int root_new(struct node *n, unsigned perm, const char *what, struct root **out,
                   struct tide_error *err);
/* Nobody is inside and nobody will enter. NULL is fine. Control loop. */
co_fn void root_free(struct root *r);
/* A root over two nodes with one gate: a job's unit is admitted once for source and target. */
co_fn int root_add(struct root *r, struct node *n, unsigned perm, struct tide_error *err);
struct node *root_node(const struct root *r); /* admitted, or control loop */
/* What it takes of the node; a claim does too, but uses none. */
unsigned root_perm(const struct root *r, const struct node *n);
bool root_uses(const struct root *r, const struct node *n);
const char *root_what(const struct root *r);

/* A *claim*: the permissions (with their file locks) that a root of `what` would take of the node,
 * and nothing else. It is in nobody's way: the node counts as unused, for others too. So a list can
 * take before its first effect what it will use, and keep until its end what an undo would need.
 * Its gate is shut. -EAGAIN etc. with a text; root_free() gives it back. */
co_fn int root_claim(struct node *n, unsigned perm, const char *what, struct root **out,
                     struct tide_error *err);
/* May a root of `what` use the node like this? -EACCES, -EBUSY, -EPERM with a text. */
int root_check(struct node *n, unsigned perm, const char *what, struct tide_error *err);
/* A claim becomes a root of its node (root_check() comes first; open its gate with root_open), a
 * root into which nobody is admitted becomes a claim. No memory, no yield. */
void root_step_in(struct root *r);
void root_step_aside(struct root *r);
/* The root goes on over the claim's node, the claim keeps the root's; once more: it is undone. The
 * permissions are the same, and the root is quiesced or shut. No memory, no yield. */
void root_swap_node(struct root *r, struct root *claim);
/* Who writes there and wants to be alone (a job, to its target), or NULL. */
const char *node_written_alone_by(const struct node *n);
struct root *root_next(struct root *r); /* of the graph; NULL at the end */

/* Any loop. Yields while the gate is closed. */
co_fn void root_enter(struct root *r);
/* As root_enter, but false instead of waiting. Not a co_fn. */
bool root_try_enter(struct root *r);
void root_leave(struct root *r);

/* The end of this root has begun and somebody waits for those inside: requests that drivers below
 * hold back for a rate now go on, those of others who use the same nodes too (and are charged).
 * Repeated now and then until root_free(). Control loop. */
void root_hurry(struct root *r);

enum quiesce_kind { QUIESCE_WRITES, QUIESCE_ALL };
struct quiesce;
#define QUIESCE_PEACE_NS 1000000000u
/* Who was held in vain gets a second of peace: waits until it is over for everybody whom the same
 * quiesce_begin() would hold. Control loop, command lock. */
co_fn void quiesce_peace(struct graph *g, struct node *const *nodes, unsigned n,
                         enum quiesce_kind kind);
/* Close and drain everything that reaches one of the nodes; fails, with every gate open again and
 * nothing changed, when draining takes longer than the limit. Control loop. */
co_fn int quiesce_begin(struct graph *g, struct node *const *nodes, unsigned n,
                        enum quiesce_kind kind, struct quiesce **out, struct tide_error *err);
/* Opens the gates, last closed first. NULL is fine. */
void quiesce_end(struct quiesce *q);
/* Nanoseconds since the first gate was closed. */
uint64_t quiesce_age(const struct quiesce *q);
void graph_set_quiesce_timeout(struct graph *g, uint64_t ns);
/* True while every root that reaches `n` (with write permission, for QUIESCE_WRITES) is drained. */
bool node_is_quiesced(const struct node *n, enum quiesce_kind kind);

/* A root whose gate is shut from the start (a job before its transaction's record). */
void root_shut(struct root *r);
void root_open(struct root *r);
/* Is somebody waiting to change the graph below (or was it shut)? One load; any loop. A connection
 * that stays admitted over several requests looks here before each and leaves when it is true. */
bool root_is_shut(const struct root *r);
