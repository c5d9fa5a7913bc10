/* SPDX-License-Identifier: Apache-2.0 */
/* Nodes: the block devices of the graph, and the only door to the drivers.
 *
 * The graph (names, children, parents, roots) changes on the control loop only. I/O runs on any
 * loop and enters through a root (block/root.h), whose gate is what a transaction closes; what I/O
 * reads of a node (driver, children, size, tracker, hooks) changes only while the roots that reach
 * the node are quiesced.
 *
 * `off` and `len` are bytes. Ranges are checked here against the node's size: a request that does
 * not fit is -EINVAL (reads) or -ENOSPC (writes). All I/O functions are co_fn, return 0 or -errno.
 */
#pragma once
#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "base/error.h"
#include "co/co.h"

#define NODE_NAME_MAX 31u
/* The longest request a node takes in one call; exports and jobs cut longer ones. */
#define NODE_MAX_IO ((uint64_t)32 << 20)

struct graph;
struct node;
struct io;

/* What lies at an offset, as far as it is the same. */
struct extent {
    uint64_t len;
    bool data;      /* false: nothing is allocated here at any layer of this chain */
    bool zero;      /* reads as zero */
    uint32_t depth; /* which layer of the chain decides it: 1 the node's own, 0 none */
};

#define NODE_FUA 1u       /* durable on return */
#define NODE_UNMAP 2u     /* node_zero: may give the space back */
#define NODE_FAST_ZERO 4u /* node_zero: -ENOTSUP rather than writing zeroes slowly */
#define NODE_UNCHANGED                                                                             \
    8u /* a job's write that leaves guest-visible data as it is: marks nothing                     \
        */

co_fn int node_preadv(struct node *n, const struct iovec *iov, int niov, uint64_t off,
                      uint64_t len);
co_fn int node_pwritev(struct node *n, const struct iovec *iov, int niov, uint64_t off,
                       uint64_t len, unsigned flags);
co_fn int node_zero(struct node *n, uint64_t off, uint64_t len, unsigned flags);
/* Succeeds without doing (or marking) anything on a node that ignores discards. */
co_fn int node_discard(struct node *n, uint64_t off, uint64_t len);
/* What completed before the call is durable on return. Nothing to do on a cache.no-flush node. */
co_fn int node_flush(struct node *n);
/* len asked >= 1; e->len is in [1, len]. */
co_fn int node_extent(struct node *n, uint64_t off, uint64_t len, struct extent *e);
/* Copy inside the storage if both ends can, without moving the data through us. Marks and hooks of
 * `dst` see it as a write. -EOPNOTSUPP: they cannot (some of the range may be marked already). */
co_fn int node_copy_range(struct node *src, uint64_t src_off, struct node *dst, uint64_t dst_off,
                          uint64_t len);

/* The file whose page cache holds [off, off+len) one to one, and where in it; NULL: there is none.
 * What it says holds while the caller is admitted. Not a co_fn. */
struct io_file;
struct io_file *node_cached_file(struct node *n, uint64_t off, uint64_t len, uint64_t *file_off);

const char *node_name(const struct node *n);
/* A name that somebody typed, for a message: a long one by its beginning, so that the rest of the
 * message fits. Use it as an argument: shown_name(s).text. */
struct shown_name {
    char text[72];
};
struct shown_name shown_name(const char *name);
uint64_t node_size(const struct node *n);
bool node_read_only(const struct node *n);
const char *node_driver(const struct node *n);
bool node_direct(const struct node *n);   /* cache.direct */
bool node_no_flush(const struct node *n); /* cache.no-flush */
/* Offsets and lengths of requests that go to the driver unchanged are multiples of this; other
 * requests are widened here (read-modify-write), so callers need not care. */
uint32_t node_align(const struct node *n);
/* Preferred copy unit: the cluster size of a format, else 0. */
uint32_t node_cluster_size(const struct node *n);
/* The node whose contents this one shows unchanged; NULL: it has its own. */
struct node *node_filtered(const struct node *n);
/* The i-th node it stands on; NULL: no more. Control loop. */
struct node *node_child(const struct node *n, unsigned i);
bool node_can_zero_fast(const struct node *n); /* node_zero is cheaper than writing zeroes */
struct graph *node_graph(const struct node *n);
struct io *graph_io(struct graph *g);

/* ------------------------------------------------------------------ graph: control loop only */

int graph_new(struct io *io, struct graph **out);
void graph_free(struct graph *g); /* no node is left */
/* Start and end the background work (freeing what readers may still look at). */
int graph_start(struct graph *g);
co_fn void graph_stop(struct graph *g);
/* The command lock: commands, transactions and ends of jobs change the graph one at a time. Never
 * taken by somebody who is admitted through a root. */
co_fn void graph_lock(struct graph *g);
void graph_unlock(struct graph *g);
/* Queries run at any time except between the first effect of a transaction and its release. */
co_fn void graph_effects_begin(struct graph *g);
void graph_effects_end(struct graph *g);
co_fn void graph_query_begin(struct graph *g);
void graph_query_end(struct graph *g);
/* NULL: none of that name. */
struct node *graph_find(struct graph *g, const char *name);
/* -ENOENT with the text that names it. */
int graph_find_err(struct graph *g, const char *name, struct node **out, struct tide_error *err);
/* Newest first: calls fn(arg, node) for every node, those without a name of their own included. */
void graph_each(struct graph *g, void (*fn)(void *arg, struct node *n), void *arg);

/* The file (device number, inode) that this very node is over; false: it is over none. */
bool node_file(const struct node *n, uint64_t *dev, uint64_t *ino);
/* A node over that file; NULL: none. */
struct node *graph_find_file(struct graph *g, uint64_t dev, uint64_t ino);
/* One that the list under way has taken out of sight, and for which it is still locked. */
struct node *graph_find_left_file(struct graph *g, uint64_t dev, uint64_t ino);
/* -EAGAIN: somebody else than this node, which is over a file, has locked one of these bytes. */
co_fn int node_lock_test(struct node *n, uint64_t first, uint64_t len);
bool node_stands_on_file(const struct node *n, uint64_t dev, uint64_t ino);
/* Its file goes by another name now, for people. `name` is the caller's before and the node's
 * after, and the old one is returned. */
char *node_set_filename(struct node *n, char *name);

/* Open a node and its children from a parsed BlockdevOptions (schema), unseen: no query, no name
 * leads to it, no other node of its name can be opened. `owned`: it stays until somebody deletes
 * it, and needs a name; else it is somebody's who publishes and retires it, and gets a name when it
 * is published. On failure nothing is left. */
struct q_blockdev_options;
co_fn int graph_open(struct graph *g, const struct q_blockdev_options *opts, bool owned,
                     struct node **out, struct tide_error *err);
/* Into sight: a new node as the newest, its children before it; one that was unpublished at the
 * place where it was, if what happened since was undone, last first. Like the next two neither
 * yields nor fails, and the caller keeps queries out (graph_effects_begin). */
void graph_publish(struct node *n);
/* A node that was opened some time ago: are the nodes that it stands on still there? */
bool graph_can_publish(const struct node *n);
/* Out of sight, its name free: for a node that nothing uses. It is whole and can be published again
 * or closed. Children made with it that nobody else uses go with it. */
void graph_unpublish(struct node *n);
/* The same as the reverse of its first graph_publish(): generated names are as before, and only the
 * children that it brought go with it. */
void graph_withdraw(struct node *n);
/* Close a node that is not in sight; if `flush`, flushed before, and a failure is logged. */
co_fn void graph_close(struct node *n, bool flush);
/* May it be deleted? Refused while anything uses it or a bitmap of it. */
int graph_check_del(struct graph *g, const char *name, struct node **out, struct tide_error *err);
/* Whoever it was opened for is through with it and has flushed it: unpublished and closed, if
 * nobody else uses it by now. Under graph_effects_begin(). */
co_fn void graph_retire(struct node *n);

/* Open and publish; check, unpublish, flush and close: what nobody has to undo. Bitmaps go with the
 * node. */
co_fn int graph_add(struct graph *g, const struct q_blockdev_options *opts, struct node **out,
                    struct tide_error *err);
co_fn int graph_del(struct graph *g, const char *name, struct tide_error *err);
/* Shutdown: flush and close every node, parents first. Jobs and exports are gone. */
co_fn void graph_close_all(struct graph *g);
