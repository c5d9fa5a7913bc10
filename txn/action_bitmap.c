/* SPDX-License-Identifier: Apache-2.0 */
/* The bitmap actions (table in docs/transactions.md): add, remove, clear, enable, disable, merge,
 * and the names of 2018, x-block-dirty-bitmap-*, which do the same with other words.
 *
 * Clear swaps the contents for empty ones; the old ones are the undo record. Merge exchanges the
 * pages that change; the record of it is a log of them. Flags remember the old flag. What
 * goes through the pages of bitmaps may yield (txn_pace). */
#include <assert.h>
#include <errno.h>

#include "base/bytes.h"
#include "base/mem.h"
#include "block/node.h"
#include "block/tracker.h"
#include "schema/types.h"
#include "txn/actions.h"

static int find(struct txn *t, const char *node, const char *name, unsigned needs,
                struct dirty_bitmap **out, struct tide_error *err)
{
    struct node *n;
    int r = graph_find_err(txn_graph(t), node, &n, err);
    return r < 0 ? r : dirty_bitmap_find(n, name, needs, out, err);
}

/* ------------------------------------------------------------------ what a dry run tells */

static co_fn void sees(struct txn *t, const struct dirty_bitmap *b)
{
    if (txn_is_dry(t))
        txn_sees(t, "bitmap '%s' on node '%s': %llu dirty bytes, granularity %llu, %s",
                 shown_name(b->name).text, node_name(b->node), dirty_bitmap_bytes(b, txn_pace(t)),
                 1ull << bitmap_shift(b->bits), b->enabled ? "recording" : "not recording");
}

/* ------------------------------------------------------------------ records */

/* At a discard, which goes last to first, a later `remove` may have freed `b` already. */
struct bitmap_rec {
    struct graph *graph;
    struct dirty_bitmap *b;
    struct dirty_bitmap *before; /* remove: what followed it in the list */
    struct bitmap *old;          /* clear: the contents before */
    struct bitmap_undo *merged;  /* merge */
    char *name;                  /* rename: the one before */
    bool was_enabled;            /* enable, disable */
    uint64_t generation;         /* clear, enable, disable: the one before */
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

static co_fn void merge_unwind(void *p)
{
    struct bitmap_rec *rec = p;
    bitmap_undo_unwind(rec->merged);
    graph_undo_free_later(rec->graph, rec->merged);
}

static void merge_discard(void *p)
{
    struct bitmap_rec *rec = p;
    graph_undo_free_later(rec->graph, rec->merged);
}

static void enabled_unwind(void *p)
{
    struct bitmap_rec *rec = p;
    dirty_bitmap_set_enabled(rec->b, rec->was_enabled);
    rec->b->generation = rec->generation;
}

static void rename_unwind(void *p)
{
    struct bitmap_rec *rec = p;
    mem_free(dirty_bitmap_rename(rec->b, rec->name));
}

static void rename_discard(void *p)
{
    struct bitmap_rec *rec = p;
    mem_free(rec->name);
}

static const struct undo_ops rename_undo = {.unwind = rename_unwind, .discard = rename_discard};
static const struct undo_ops add_undo = {.unwind = add_unwind};
static const struct undo_ops remove_undo = {.unwind = remove_unwind, .discard = remove_discard};
static const struct undo_ops contents_undo = {.unwind = contents_unwind,
                                              .discard = contents_discard};
static const struct undo_ops merge_undo = {.unwind = merge_unwind, .discard = merge_discard};
static const struct undo_ops enabled_undo = {.unwind = enabled_unwind};

/* ------------------------------------------------------------------ add */

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
    txn_does(t, "bitmap '%s' on node '%s', granularity %llu, %s", shown_name(args->name).text,
             args->node, 1ull << bitmap_shift(b->bits), b->enabled ? "recording" : "not recording");
    txn_arm(t, rec);
    return 0;
}

/* ------------------------------------------------------------------ one bitmap, no other argument
 */

static co_fn int remove_prepare(struct txn *t, const struct action *a, struct tide_error *err)
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
    sees(t, b);
    txn_does(t, "removes it; its name is free");
    tracker_detach(b);
    txn_arm(t, rec);
    return 0;
}

static co_fn int clear_prepare(struct txn *t, const struct action *a, struct tide_error *err)
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
    sees(t, b);
    txn_does(t, "0 dirty bytes");
    bitmap_swap(b->bits, rec->old);
    dirty_bitmap_renew(b);
    txn_arm(t, rec);
    return 0;
}

static co_fn int set_enabled(struct txn *t, const char *node, const char *name, bool on,
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
    sees(t, b);
    txn_does(t, on ? "recording" : "not recording");
    dirty_bitmap_set_enabled(b, on);
    if (on != rec->was_enabled)
        dirty_bitmap_renew(b);
    txn_arm(t, rec);
    return 0;
}

static co_fn int enable_prepare(struct txn *t, const struct action *a, struct tide_error *err)
{
    const struct q_block_dirty_bitmap_enable *args = a->args;
    return set_enabled(t, args->node, args->name, true, err);
}

static co_fn int disable_prepare(struct txn *t, const struct action *a, struct tide_error *err)
{
    const struct q_block_dirty_bitmap_disable *args = a->args;
    return set_enabled(t, args->node, args->name, false, err);
}

static co_fn int x_enable_prepare(struct txn *t, const struct action *a, struct tide_error *err)
{
    const struct q_x_block_dirty_bitmap_enable *args = a->args;
    return set_enabled(t, args->node, args->name, true, err);
}

static co_fn int x_disable_prepare(struct txn *t, const struct action *a, struct tide_error *err)
{
    const struct q_x_block_dirty_bitmap_disable *args = a->args;
    return set_enabled(t, args->node, args->name, false, err);
}

/* ------------------------------------------------------------------ merge */

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

/* All sources are checked before the first bit is merged. */
static co_fn int merge(struct txn *t, const char *node, const char *name,
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
    struct bitmap_rec *rec = txn_reserve(t, &merge_undo, sizeof *rec, err);
    if (!rec)
        return -ENOMEM;
    sees(t, target);
    r = bitmap_undo_new(graph_bitmap_pool(txn_graph(t)), txn_pace(t), &rec->merged);
    for (size_t i = 0; r == 0 && i < n; i++) {
        struct source s = at(args, i);
        struct tide_error ignored;
        r = find(t, s.node, s.name, 0, &source, &ignored);
        if (r == 0)
            r = bitmap_merge_undoable(target->bits, source->bits, rec->merged);
    }
    rec->graph = txn_graph(t);
    if (r < 0) {
        if (rec->merged)
            merge_unwind(rec);
        return tide_fail(err, r, "no memory to merge into bitmap '%s' on node '%s'",
                         shown_name(name).text, node);
    }
    if (txn_is_dry(t))
        txn_does(t, "%llu dirty bytes", dirty_bitmap_bytes(target, txn_pace(t)));
    txn_arm(t, rec);
    return 0;
}

static struct source merge_source(const void *args, size_t i)
{
    return source_at(args, i);
}

static co_fn int merge_prepare(struct txn *t, const struct action *a, struct tide_error *err)
{
    const struct q_block_dirty_bitmap_merge *args = a->args;
    return merge(t, args->node, args->target, merge_source, args, args->n_bitmaps, err);
}

static struct source x_merge_source(const void *p, size_t i)
{
    const struct q_x_block_dirty_bitmap_merge *args = p;
    return (struct source){args->node, args->src_name};
}

static co_fn int x_merge_prepare(struct txn *t, const struct action *a, struct tide_error *err)
{
    const struct q_x_block_dirty_bitmap_merge *args = a->args;
    return merge(t, args->node, args->dst_name, x_merge_source, args, 1, err);
}

/* ------------------------------------------------------------------ rename */

static co_fn int rename_prepare(struct txn *t, const struct action *a, struct tide_error *err)
{
    const struct q_block_dirty_bitmap_rename *args = a->args;
    struct dirty_bitmap *b;
    int r = find(t, args->node, args->name, BITMAP_NOT_BUSY | BITMAP_WRITABLE | BITMAP_CONSISTENT,
                 &b, err);
    if (r == 0)
        r = dirty_bitmap_check_name(b->node, args->new_name, err);
    if (r < 0)
        return r;
    struct bitmap_rec *rec = txn_reserve(t, &rename_undo, sizeof *rec, err);
    char *name = mem_strdup(args->new_name);
    if (!rec || !name) {
        mem_free(name);
        return tide_fail(err, -ENOMEM, "no memory to rename bitmap '%s' on node '%s'",
                         shown_name(args->name).text, args->node);
    }
    rec->b = b;
    sees(t, b);
    txn_does(t, "its name is '%s'", shown_name(args->new_name).text);
    rec->name = dirty_bitmap_rename(b, name);
    txn_arm(t, rec);
    return 0;
}

/* ------------------------------------------------------------------ copy */

static struct source copy_source(const void *p, size_t i)
{
    const struct q_block_dirty_bitmap_copy *args = p;
    const struct q_block_dirty_bitmap_or_str *s = &args->bitmaps[i];
    if (s->kind == Q_KIND_STRING)
        return (struct source){args->node, s->string};
    return (struct source){s->object->node, s->object->name};
}

/* A bitmap that nobody can see yet, with the contents of all sources. */
static co_fn int fill_copy(struct txn *t, const struct q_block_dirty_bitmap_copy *args,
                           struct dirty_bitmap *b, struct tide_error *err)
{
    int r = 0;
    for (size_t i = 0; r == 0 && i < args->n_bitmaps; i++) {
        struct source s = copy_source(args, i);
        struct dirty_bitmap *source;
        r = check_source(t, b, &s, &source, err);
        if (r == 0 && bitmap_merge(b->bits, source->bits, txn_pace(t)) < 0)
            r = tide_fail(err, -ENOMEM, "no memory to copy into bitmap '%s' on node '%s'",
                          shown_name(args->name).text, args->node);
    }
    return r;
}

static int copy_granularity(struct txn *t, const struct q_block_dirty_bitmap_copy *args,
                            uint64_t *granularity, struct tide_error *err)
{
    struct dirty_bitmap *first;
    *granularity = args->granularity;
    if (args->n_bitmaps == 0)
        return tide_fail(err, -EINVAL,
                         "'bitmaps' is empty: name at least one bitmap to copy, or use "
                         "block-dirty-bitmap-add");
    if (args->has_granularity)
        return 0;
    struct source s = copy_source(args, 0);
    int r = find(t, s.node, s.name, BITMAP_NOT_BUSY | BITMAP_CONSISTENT, &first, err);
    if (r == 0)
        *granularity = 1ull << bitmap_shift(first->bits);
    return r;
}

static co_fn int copy_prepare(struct txn *t, const struct action *a, struct tide_error *err)
{
    const struct q_block_dirty_bitmap_copy *args = a->args;
    struct dirty_bitmap *b = NULL;
    uint64_t granularity = 0;
    struct node *n;
    int r = graph_find_err(txn_graph(t), args->node, &n, err);
    if (r == 0)
        r = copy_granularity(t, args, &granularity, err);
    if (r < 0)
        return r;
    struct bitmap_rec *rec = txn_reserve(t, &add_undo, sizeof *rec, err);
    if (!rec)
        return -ENOMEM;
    r = dirty_bitmap_new(n, args->name, granularity, true, args->has_disabled && args->disabled, &b,
                         err);
    if (r == 0 && args->has_persistent && args->persistent)
        r = refuse_persistent(n, args->name, err);
    if (r == 0)
        r = dirty_bitmap_check_watch(b, err);
    if (r == 0)
        r = fill_copy(t, args, b, err);
    if (r == 0 && (r = tracker_attach(b, n)) < 0)
        tide_fail(err, r, "no memory for bitmap '%s' on node '%s'", shown_name(args->name).text,
                  args->node);
    if (r < 0) {
        dirty_bitmap_free(b);
        return r;
    }
    rec->b = b;
    if (txn_is_dry(t))
        txn_does(t, "bitmap '%s' on node '%s', %llu dirty bytes, granularity %llu, %s",
                 shown_name(args->name).text, args->node, dirty_bitmap_bytes(b, txn_pace(t)),
                 1ull << bitmap_shift(b->bits), b->enabled ? "recording" : "not recording");
    txn_arm(t, rec);
    return 0;
}

/* ------------------------------------------------------------------ tables */

const struct action_ops block_dirty_bitmap_rename_ops = {.prepare = rename_prepare};
const struct action_ops block_dirty_bitmap_copy_ops = {.prepare = copy_prepare};

const struct action_ops block_dirty_bitmap_add_ops = {.prepare = add_prepare};
const struct action_ops block_dirty_bitmap_remove_ops = {.prepare = remove_prepare};
const struct action_ops block_dirty_bitmap_clear_ops = {.prepare = clear_prepare};
const struct action_ops block_dirty_bitmap_enable_ops = {.prepare = enable_prepare};
const struct action_ops block_dirty_bitmap_disable_ops = {.prepare = disable_prepare};
const struct action_ops block_dirty_bitmap_merge_ops = {.prepare = merge_prepare};
const struct action_ops x_block_dirty_bitmap_enable_ops = {.prepare = x_enable_prepare};
const struct action_ops x_block_dirty_bitmap_disable_ops = {.prepare = x_disable_prepare};
const struct action_ops x_block_dirty_bitmap_merge_ops = {.prepare = x_merge_prepare};
