/* SPDX-License-Identifier: Apache-2.0 */
/* The bitmap actions (table in docs/transactions.md): add, remove, clear, enable, disable, merge,
 * and the names of 2018, x-block-dirty-bitmap-*, which do the same with other words.
 *
 * Contents are changed by building the new contents aside and swapping; the old ones are the undo
 * record. Flags remember the old flag. Nothing here yields. */
#include <assert.h>
#include <errno.h>

#include "base/bytes.h"
#include "block/node.h"
#include "block/tracker.h"
#include "schema/types.h"
#include "txn/txn.h"

static int find(struct txn *t, const char *node, const char *name, unsigned needs,
                struct dirty_bitmap **out, struct tide_error *err)
{
    struct node *n;
    int r = graph_find_err(txn_graph(t), node, &n, err);
    return r < 0 ? r : dirty_bitmap_find(n, name, needs, out, err);
}

/* ------------------------------------------------------------------ records */

/* At a discard, which goes last to first, a later `remove` may have freed `b` already. */
struct bitmap_rec {
    struct graph *graph;
    struct dirty_bitmap *b;
    struct dirty_bitmap *before; /* remove: what followed it in the list */
    struct bitmap *old;          /* clear, merge: the contents before */
    bool was_enabled;            /* enable, disable */
    uint64_t generation;         /* clear, merge, enable, disable: the one before */
};

static void add_unwind(void *p)
{
    struct bitmap_rec *rec = p;
    tracker_detach(rec->b);
    dirty_bitmap_free(rec->b);
}

static void remove_unwind(void *p)
{
    struct bitmap_rec *rec = p;
    tracker_reattach(rec->b, rec->b->node, rec->before);
}

static void remove_discard(void *p)
{
    struct bitmap_rec *rec = p;
    dirty_bitmap_free(rec->b);
}

static void contents_unwind(void *p)
{
    struct bitmap_rec *rec = p;
    bitmap_swap(rec->b->bits, rec->old);
    rec->b->generation = rec->generation;
    graph_bitmap_free_later(rec->graph, rec->old);
}

static void contents_discard(void *p)
{
    struct bitmap_rec *rec = p;
    graph_bitmap_free_later(rec->graph, rec->old);
}

static void enabled_unwind(void *p)
{
    struct bitmap_rec *rec = p;
    dirty_bitmap_set_enabled(rec->b, rec->was_enabled);
    rec->b->generation = rec->generation;
}

static const struct undo_ops add_undo = {add_unwind, NULL};
static const struct undo_ops remove_undo = {remove_unwind, remove_discard};
static const struct undo_ops contents_undo = {contents_unwind, contents_discard};
static const struct undo_ops enabled_undo = {enabled_unwind, NULL};

/* ------------------------------------------------------------------ add */

static void add_footprint(const struct action *a, struct footprint *f)
{
    const struct q_block_dirty_bitmap_add *args = a->args;
    footprint_node(f, args->node, QUIESCE_WRITES);
}

static int refuse_persistent(struct node *n, const char *name, struct tide_error *err)
{
    return tide_fail(
        err, -ENOTSUP,
        "bitmap '%s' on node '%s' cannot be persistent: this daemon has no store; add it "
        "without 'persistent'",
        shown_name(name).text, node_name(n));
}

static int add_prepare(struct txn *t, const struct action *a, struct tide_error *err)
{
    const struct q_block_dirty_bitmap_add *args = a->args;
    struct dirty_bitmap *b;
    struct node *n;
    int r = graph_find_err(txn_graph(t), args->node, &n, err);
    if (r < 0)
        return r;
    struct bitmap_rec *rec = txn_reserve(t, &add_undo, sizeof *rec, err);
    if (!rec)
        return -ENOMEM;
    r = dirty_bitmap_new(n, args->name, args->granularity, args->has_granularity,
                         args->has_disabled && args->disabled, &b, err);
    if (r < 0)
        return r;
    if (args->has_persistent && args->persistent)
        r = refuse_persistent(n, args->name, err);
    if (r == 0)
        r = dirty_bitmap_check_watch(b, err);
    if (r == 0 && (r = tracker_attach(b, n)) < 0)
        tide_fail(err, r, "no memory for bitmap '%s' on node '%s'", shown_name(args->name).text,
                  args->node);
    if (r < 0) {
        dirty_bitmap_free(b);
        return r;
    }
    rec->b = b;
    txn_arm(t, rec);
    return 0;
}

/* ------------------------------------------------------------------ one bitmap, no other argument
 */

/* remove, clear, enable and disable take the same struct members. */
static void one_footprint(const struct action *a, struct footprint *f)
{
    const struct q_block_dirty_bitmap_remove *args = a->args;
    footprint_node(f, args->node, QUIESCE_WRITES);
}

static int remove_prepare(struct txn *t, const struct action *a, struct tide_error *err)
{
    const struct q_block_dirty_bitmap_remove *args = a->args;
    struct dirty_bitmap *b;
    int r = find(t, args->node, args->name, BITMAP_NOT_BUSY | BITMAP_WRITABLE, &b, err);
    if (r < 0)
        return r;
    struct bitmap_rec *rec = txn_reserve(t, &remove_undo, sizeof *rec, err);
    if (!rec)
        return -ENOMEM;
    rec->b = b;
    rec->before = b->next;
    tracker_detach(b);
    txn_arm(t, rec);
    return 0;
}

static int clear_prepare(struct txn *t, const struct action *a, struct tide_error *err)
{
    const struct q_block_dirty_bitmap_clear *args = a->args;
    struct dirty_bitmap *b;
    int r = find(t, args->node, args->name, BITMAP_NOT_BUSY | BITMAP_WRITABLE | BITMAP_CONSISTENT,
                 &b, err);
    if (r < 0)
        return r;
    struct bitmap_rec *rec = txn_reserve(t, &contents_undo, sizeof *rec, err);
    if (!rec)
        return -ENOMEM;
    r = bitmap_new(bitmap_size(b->bits), bitmap_shift(b->bits), &rec->old);
    if (r < 0)
        return tide_fail(err, r, "no memory to clear bitmap '%s' on node '%s'",
                         shown_name(args->name).text, args->node);
    rec->b = b;
    rec->graph = txn_graph(t);
    rec->generation = b->generation;
    bitmap_swap(b->bits, rec->old);
    dirty_bitmap_renew(b);
    txn_arm(t, rec);
    return 0;
}

static int set_enabled(struct txn *t, const char *node, const char *name, bool on,
                       struct tide_error *err)
{
    struct dirty_bitmap *b;
    int r = find(t, node, name, BITMAP_NOT_BUSY | BITMAP_CONSISTENT, &b, err);
    if (r < 0)
        return r;
    struct bitmap_rec *rec = txn_reserve(t, &enabled_undo, sizeof *rec, err);
    if (!rec)
        return -ENOMEM;
    rec->b = b;
    rec->was_enabled = b->enabled;
    rec->generation = b->generation;
    dirty_bitmap_set_enabled(b, on);
    if (on != rec->was_enabled)
        dirty_bitmap_renew(b);
    txn_arm(t, rec);
    return 0;
}

static int enable_prepare(struct txn *t, const struct action *a, struct tide_error *err)
{
    const struct q_block_dirty_bitmap_enable *args = a->args;
    return set_enabled(t, args->node, args->name, true, err);
}

static int disable_prepare(struct txn *t, const struct action *a, struct tide_error *err)
{
    const struct q_block_dirty_bitmap_disable *args = a->args;
    return set_enabled(t, args->node, args->name, false, err);
}

static int x_enable_prepare(struct txn *t, const struct action *a, struct tide_error *err)
{
    const struct q_x_block_dirty_bitmap_enable *args = a->args;
    return set_enabled(t, args->node, args->name, true, err);
}

static int x_disable_prepare(struct txn *t, const struct action *a, struct tide_error *err)
{
    const struct q_x_block_dirty_bitmap_disable *args = a->args;
    return set_enabled(t, args->node, args->name, false, err);
}

/* ------------------------------------------------------------------ merge */

/* The members of remove, clear, enable, disable and their x- forms lie at the same place. */
#define SAME_PLACE(other)                                                                          \
    static_assert(                                                                                 \
        offsetof(struct q_block_dirty_bitmap_remove, node) == offsetof(struct other, node) &&      \
            offsetof(struct q_block_dirty_bitmap_remove, name) == offsetof(struct other, name),    \
        "one_footprint() reads it")
SAME_PLACE(q_block_dirty_bitmap_clear);
SAME_PLACE(q_block_dirty_bitmap_enable);
SAME_PLACE(q_block_dirty_bitmap_disable);
SAME_PLACE(q_x_block_dirty_bitmap_enable);
SAME_PLACE(q_x_block_dirty_bitmap_disable);

/* A source is a name on the target's node, or {node, name}. */
struct source {
    const char *node, *name;
};

static struct source source_at(const struct q_block_dirty_bitmap_merge *args, size_t i)
{
    const struct q_block_dirty_bitmap_or_str *s = &args->bitmaps[i];
    if (s->kind == Q_KIND_STRING)
        return (struct source){args->node, s->string};
    return (struct source){s->object->node, s->object->name};
}

static void merge_footprint(const struct action *a, struct footprint *f)
{
    const struct q_block_dirty_bitmap_merge *args = a->args;
    footprint_node(f, args->node, QUIESCE_WRITES);
    for (size_t i = 0; i < args->n_bitmaps; i++)
        footprint_node(f, source_at(args, i).node, QUIESCE_WRITES);
}

static int check_source(struct txn *t, struct dirty_bitmap *target, const struct source *s,
                        struct dirty_bitmap **out, struct tide_error *err)
{
    int r = find(t, s->node, s->name, BITMAP_NOT_BUSY | BITMAP_CONSISTENT, out, err);
    if (r == 0 && bitmap_size((*out)->bits) != bitmap_size(target->bits))
        r = tide_fail(
            err, -EINVAL,
            "bitmap '%s' on node '%s' (disk of %llu bytes) does not fit bitmap '%s' on node "
            "'%s' (disk of %llu bytes)",
            shown_name(s->name).text, s->node, (unsigned long long)bitmap_size((*out)->bits),
            shown_name(target->name).text, node_name(target->node),
            (unsigned long long)bitmap_size(target->bits));
    return r;
}

/* All sources are checked before the first bit is merged. The merge goes into a clone that shares
 * the target's pages; the target's old directory is the undo record. */
static int merge(struct txn *t, const char *node, const char *name,
                 struct source (*at)(const void *args, size_t i), const void *args, size_t n,
                 struct tide_error *err)
{
    struct dirty_bitmap *target, *source;
    int r =
        find(t, node, name, BITMAP_NOT_BUSY | BITMAP_WRITABLE | BITMAP_CONSISTENT, &target, err);
    for (size_t i = 0; r == 0 && i < n; i++) {
        struct source s = at(args, i);
        r = check_source(t, target, &s, &source, err);
    }
    if (r < 0 || n == 0)
        return r;
    struct bitmap_rec *rec = txn_reserve(t, &contents_undo, sizeof *rec, err);
    if (!rec)
        return -ENOMEM;
    r = bitmap_clone(target->bits, &rec->old);
    for (size_t i = 0; r == 0 && i < n; i++) {
        struct source s = at(args, i);
        struct tide_error ignored;
        r = find(t, s.node, s.name, 0, &source, &ignored);
        if (r == 0 && source != target)
            r = bitmap_merge(rec->old, source->bits);
    }
    if (r < 0) {
        graph_bitmap_free_later(txn_graph(t), rec->old);
        return tide_fail(err, r, "no memory to merge into bitmap '%s' on node '%s'",
                         shown_name(name).text, node);
    }
    rec->b = target;
    rec->graph = txn_graph(t);
    rec->generation = target->generation;
    bitmap_swap(target->bits, rec->old);
    txn_arm(t, rec);
    return 0;
}

static struct source merge_source(const void *args, size_t i)
{
    return source_at(args, i);
}

static int merge_prepare(struct txn *t, const struct action *a, struct tide_error *err)
{
    const struct q_block_dirty_bitmap_merge *args = a->args;
    return merge(t, args->node, args->target, merge_source, args, args->n_bitmaps, err);
}

static void x_merge_footprint(const struct action *a, struct footprint *f)
{
    const struct q_x_block_dirty_bitmap_merge *args = a->args;
    footprint_node(f, args->node, QUIESCE_WRITES);
}

static struct source x_merge_source(const void *p, size_t i)
{
    const struct q_x_block_dirty_bitmap_merge *args = p;
    return (struct source){args->node, args->src_name};
}

static int x_merge_prepare(struct txn *t, const struct action *a, struct tide_error *err)
{
    const struct q_x_block_dirty_bitmap_merge *args = a->args;
    return merge(t, args->node, args->dst_name, x_merge_source, args, 1, err);
}

/* ------------------------------------------------------------------ tables */

const struct action_ops block_dirty_bitmap_add_ops = {add_footprint, add_prepare};
const struct action_ops block_dirty_bitmap_remove_ops = {one_footprint, remove_prepare};
const struct action_ops block_dirty_bitmap_clear_ops = {one_footprint, clear_prepare};
const struct action_ops block_dirty_bitmap_enable_ops = {one_footprint, enable_prepare};
const struct action_ops block_dirty_bitmap_disable_ops = {one_footprint, disable_prepare};
const struct action_ops block_dirty_bitmap_merge_ops = {merge_footprint, merge_prepare};
const struct action_ops x_block_dirty_bitmap_enable_ops = {one_footprint, x_enable_prepare};
const struct action_ops x_block_dirty_bitmap_disable_ops = {one_footprint, x_disable_prepare};
const struct action_ops x_block_dirty_bitmap_merge_ops = {x_merge_footprint, x_merge_prepare};
