/* SPDX-License-Identifier: Apache-2.0 */
/* Inside the block layer: what a node is made of, and what a driver implements. Only block/ and
 * drivers/ include this. A driver never calls up; it does I/O on its children through node_* and on
 * files through io/. */
#pragma once
#include <stdatomic.h>
#include <sys/queue.h>

#include "block/node.h"
#include "block/tracker.h"
#include "co/sync.h"
#include "io/io.h"

#define NODE_MAX_CHILDREN 4u
#define NODE_MAX_DEPTH 64u /* nodes above each other: I/O and the graph's walks recurse */

struct inquiry;
struct io_file;
struct q_blockdev_options;
struct q_blockdev_ref;

struct driver_ops {
    const char *name;  /* as in blockdev-add */
    size_t state_size; /* node->state: zeroed, freed with the node */
    bool filter;       /* shows its child's contents unchanged */
    /* Opens children with node_open_child(); sets n->size and, where it matters, n->align, cluster,
     * filename. On failure close() is called and has to cope with every stage. May yield, as all.
     */
    int (*open)(struct node *n, const struct q_blockdev_options *opts, struct tide_error *err);
    void (*close)(struct node *n);
    /* The permissions in use (ROOT_READ | ROOT_WRITE) become `perm`: take or drop file locks. */
    int (*set_perm)(struct node *n, unsigned perm, struct tide_error *err);
    /* Ranges are checked and, in multiples of n->align; reads past the driver's own end give
     * zeroes. */
    int (*preadv)(struct node *n, const struct iovec *iov, int niov, uint64_t off, uint64_t len);
    int (*pwritev)(struct node *n, const struct iovec *iov, int niov, uint64_t off, uint64_t len,
                   unsigned flags);
    int (*zero)(struct node *n, uint64_t off, uint64_t len,
                unsigned flags); /* -EOPNOTSUPP: cannot */
    int (*discard)(struct node *n, uint64_t off, uint64_t len);
    int (*flush)(struct node *n);
    int (*extent)(struct node *n, uint64_t off, uint64_t len, struct extent *e);
    /* The file that holds our bytes one to one and the offset of byte 0 in it; NULL: there is none.
     */
    struct io_file *(*offload)(struct node *n, uint64_t *base);
    /* Bytes on disk as far as is known, UINT64_MAX: unknown. Does not yield. */
    uint64_t (*allocated)(const struct node *n);
    /* Ask the disk for them; inquiry_begin() and inquiry_end() around each question. Does not wait
     * for the answer. NULL: allocated() always knows. Control loop. */
    void (*ask_allocated)(struct node *n, struct inquiry *q);
    /* Which file it has open (device number, inode). NULL: it has none. */
    void (*file_id)(const struct node *n, uint64_t *dev, uint64_t *ino);
    /* Do both keep others from the same file by locks? NULL: it locks nothing. */
    bool (*same_locks)(const struct node *n, const struct node *other);
    /* Has another process, or another node, locked one of these bytes? -EAGAIN. */
    co_fn int (*lock_test)(struct node *n, uint64_t first, uint64_t len);
    /* Somebody waits for the requests inside this node to end (quiesce; the end of an export or of
     * a job). From drain_begin to drain_end no request may wait here of the driver's own accord,
     * for a rate or a time: those that do go on at once, those that come go through. It says
     * nothing of waiting for children. Nested; the last end restores. Control loop, while I/O goes
     * on; neither yields nor fails. NULL: the driver never makes anybody wait. */
    void (*drain_begin)(struct node *n);
    void (*drain_end)(struct node *n);
};

/* All drivers, ended by NULL (drivers/drivers.c). */
extern const struct driver_ops *const drivers[];

/* Called before a write, zeroes or discard changes the node, on the writer's loop, while it is
 * admitted. Never fails a guest. The list changes while the node is quiesced for everything. */
struct node_hook {
    co_fn void (*before_write)(struct node_hook *h, uint64_t off, uint64_t len);
    struct node_hook *next;
};
void node_hook_add(struct node *n, struct node_hook *h);
void node_hook_remove(struct node *n, struct node_hook *h);

/* A write that others must not overlap (read-modify-write), or that waits for such a one. */
struct tracked_write {
    uint64_t off, end;
    bool serialising;
    TAILQ_ENTRY(tracked_write) link;
};

/* Which bitmaps a write marks; replaced as a whole, read without a lock. */
struct mark_set {
    unsigned n, cap;
    struct dirty_bitmap **owner; /* of each of bits; control loop only */
    struct bitmap *bits[];
};

struct node {
    char name[NODE_NAME_MAX + 1];
    bool owned; /* made by blockdev-add itself: the monitor owns it, it outlives its parents */
    /* Only a published node is in the list of its graph, found by its name and known to its
     * children. While it is being opened its name is taken all the same. */
    enum { NODE_OPENING, NODE_PUBLISHED, NODE_UNPUBLISHED } sight;
    bool unnamed; /* its name is generated when it is published first */
    const struct driver_ops *ops;
    void *state;
    struct graph *graph;
    uint64_t size;
    uint64_t window; /* of a filter: where in its child its byte 0 lies */
    uint32_t align, cluster;
    unsigned depth; /* nodes below it on the longest way down */
    bool read_only, auto_read_only, discard_unmap, no_flush, direct, force_share;
    int detect_zeroes; /* enum q_blockdev_detect_zeroes_options */
    char *filename;    /* for people and queries; NULL: none */

    struct node *child[NODE_MAX_CHILDREN];
    const char *child_role[NODE_MAX_CHILDREN];
    unsigned n_children;
    unsigned goes; /* not published: children 1 << i that come into sight or are closed with it */
    unsigned made; /* children 1 << i that were described inside its options */
    /* One entry for each edge from a published node; room for all edges, which are n_edges. Never
     * gets smaller. */
    struct node **parents;
    unsigned n_parents, n_edges, cap_parents;
    unsigned n_roots, perm;

    struct dirty_bitmap *bitmaps, *last_bitmap;
    struct dirty_bitmap **by_name; /* a table of lists, n_buckets of them: a power of two, or 0 */
    unsigned n_buckets;
    unsigned n_bitmaps;
    struct mark_set *marks; /* changes while the node is quiesced for writes */
    struct node_hook *hooks;

    struct spin writes_lock;
    TAILQ_HEAD(, tracked_write) writes; /* only where align > 1 */
    struct co_queue writes_wait;

    /* Where it was, for coming back: its place among the parents of each child, its neighbour in
     * the list; and the next number for a generated name before it was published first. */
    unsigned place[NODE_MAX_CHILDREN];
    struct node *older;
    unsigned first_auto_name;
    TAILQ_ENTRY(node) link; /* graph, newest first */
};

/* Open the child that `ref` names or describes and make it child `role` of `n`. */
co_fn int node_open_child(struct node *n, const char *role, const struct q_blockdev_ref *ref,
                          struct tide_error *err);
/* Does `from` reach `to` through children (or are they the same)? */
bool node_reaches(const struct node *from, const struct node *to);

struct root;
TAILQ_HEAD(root_list, root);
TAILQ_HEAD(node_list, node);
struct throttle_group;
TAILQ_HEAD(throttle_group_list, throttle_group);

struct graph {
    struct io *io;
    struct co_mutex commands; /* the command lock */
    struct co_mutex perms;    /* permission updates, which take and drop file locks */
    struct co_rwlock effects; /* a list's effects are not seen before it is over */
    struct node_list nodes;   /* published */
    struct node_list opening; /* not yet */
    struct node_list leaving; /* not any more; what claims hold of them they still hold of others */
    struct root_list roots;
    struct throttle_group_list throttle_groups; /* oldest first */
    unsigned next_auto_name;
    uint64_t next_generation; /* of bitmaps */
    struct quiesce *quiesce;  /* the one under way */
    struct io_event drained;  /* somebody left a closed root */
    uint64_t quiesce_timeout;
    struct graph_loop { /* of each loop: pages its markers replaced */
        _Alignas(64) struct bitmap_retired retired;
    } * loop;
    struct reaper *reaper;
};
/* Permissions: recompute what `n` and everything below is used for; -EAGAIN etc. with text. */
co_fn int node_refresh_perm(struct node *n, struct tide_error *err);
int reaper_new(struct graph *g);
void reaper_free(struct graph *g);
/* Before a node gets a bitmap or a hook: -EPERM when a root below it could write past it. */
int node_check_watch(const struct node *n, struct tide_error *err);
