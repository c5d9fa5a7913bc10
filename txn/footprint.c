/* SPDX-License-Identifier: Apache-2.0 */
/* The table of section "The actions" in docs/transactions.md, as far as names go: one function for
 * each kind, in the order of the schema. */
#include "txn/footprint.h"

#include <assert.h>
#include <string.h>

#include "base/mem.h"
#include "schema/types.h"

/* ------------------------------------------------------------------ adding */

static bool grow(void **list, size_t n, size_t *cap, size_t size)
{
    if (n < *cap)
        return true;
    size_t more = *cap ? *cap * 2 : 32;
    void *p = mem_realloc(*list, more, size);
    if (!p)
        return false;
    *list = p;
    *cap = more;
    return true;
}

static void use(struct footprint *f, bool writes, enum store_kind kind, const char *a,
                const char *b)
{
    if (!grow((void **)&f->use, f->n_uses, &f->cap_uses, sizeof *f->use)) {
        f->no_memory = true;
        return;
    }
    f->use[f->n_uses++] = (struct name_use){{kind, a, b}, f->action, writes, false};
}

static void reads(struct footprint *f, enum store_kind kind, const char *a, const char *b)
{
    use(f, false, kind, a, b);
}

static void writes(struct footprint *f, enum store_kind kind, const char *a, const char *b)
{
    use(f, true, kind, a, b);
}

static void hold(struct footprint *f, const char *node, const char *export, bool all)
{
    /* Neighbours in a list mostly name the same node; other repeats do no harm. */
    struct node_hold *last = f->n_holds ? &f->hold[f->n_holds - 1] : NULL;
    if (last && node && last->node == node && last->all == all)
        return;
    if (!grow((void **)&f->hold, f->n_holds, &f->cap_holds, sizeof *f->hold)) {
        f->no_memory = true;
        return;
    }
    f->hold[f->n_holds++] = (struct node_hold){node, export, f->action, all};
}

static void hold_writes(struct footprint *f, const char *node)
{
    reads(f, STORE_NODE, node, NULL);
    hold(f, node, NULL, false);
}

void footprint_free(struct footprint *f)
{
    mem_free(f->use);
    mem_free(f->hold);
    *f = (struct footprint){0};
}

/* ------------------------------------------------------------------ bitmaps */

/* It comes, goes, or changes its name. */
static void writes_bitmap(struct footprint *f, const char *node, const char *name)
{
    writes(f, STORE_BITMAP, node, name);
    writes(f, STORE_BITMAP_BITS, node, name);
    writes(f, STORE_BITMAP_STATE, node, name);
}

/* What an operation looks at before it touches a bitmap. */
static void reads_bitmap(struct footprint *f, const char *node, const char *name)
{
    reads(f, STORE_BITMAP, node, name);
    reads(f, STORE_BITMAP_STATE, node, name);
}

static void reads_source(struct footprint *f, const char *node,
                         const struct q_block_dirty_bitmap_or_str *s)
{
    const char *on = s->kind == Q_KIND_STRING ? node : s->object->node;
    const char *name = s->kind == Q_KIND_STRING ? s->string : s->object->name;
    hold_writes(f, on);
    reads_bitmap(f, on, name);
    reads(f, STORE_BITMAP_BITS, on, name);
}

static void add_footprint(const struct q_block_dirty_bitmap_add *a, struct footprint *f)
{
    hold_writes(f, a->node);
    writes_bitmap(f, a->node, a->name);
}

static void remove_footprint(const struct q_block_dirty_bitmap_remove *a, struct footprint *f)
{
    hold_writes(f, a->node);
    writes_bitmap(f, a->node, a->name);
}

static void clear_footprint(const struct q_block_dirty_bitmap_clear *a, struct footprint *f)
{
    hold_writes(f, a->node);
    reads_bitmap(f, a->node, a->name);
    writes(f, STORE_BITMAP_BITS, a->node, a->name);
}

static void switch_footprint(const char *node, const char *name, struct footprint *f)
{
    hold_writes(f, node);
    reads(f, STORE_BITMAP, node, name);
    writes(f, STORE_BITMAP_STATE, node, name);
}

static void merge_target(const char *node, const char *name, struct footprint *f)
{
    hold_writes(f, node);
    reads_bitmap(f, node, name);
    writes(f, STORE_BITMAP_BITS, node, name);
}

static void merge_footprint(const struct q_block_dirty_bitmap_merge *a, struct footprint *f)
{
    merge_target(a->node, a->target, f);
    for (size_t i = 0; i < a->n_bitmaps; i++)
        reads_source(f, a->node, &a->bitmaps[i]);
}

static void x_merge_footprint(const struct q_x_block_dirty_bitmap_merge *a, struct footprint *f)
{
    merge_target(a->node, a->dst_name, f);
    reads_bitmap(f, a->node, a->src_name);
    reads(f, STORE_BITMAP_BITS, a->node, a->src_name);
}

static void rename_footprint(const struct q_block_dirty_bitmap_rename *a, struct footprint *f)
{
    hold_writes(f, a->node);
    writes_bitmap(f, a->node, a->name);
    writes_bitmap(f, a->node, a->new_name);
}

static void copy_footprint(const struct q_block_dirty_bitmap_copy *a, struct footprint *f)
{
    hold_writes(f, a->node);
    for (size_t i = 0; i < a->n_bitmaps; i++)
        reads_source(f, a->node, &a->bitmaps[i]);
    writes_bitmap(f, a->node, a->name);
}

/* ------------------------------------------------------------------ what is known */

#define LOOK_BACK 4096u /* uses; a list that names more is not searched */

/* Does an earlier action of the list make or change an export that may be this one? */
static bool changed_before(const struct footprint *f, const char *id)
{
    const struct store_name name = {STORE_EXPORT, id, NULL};
    if (f->n_uses > LOOK_BACK)
        return true;
    for (size_t i = 0; i < f->n_uses; i++) {
        if (f->use[i].writes && f->use[i].action != f->action &&
            store_name_meets(&f->use[i].name, &name))
            return true;
    }
    return false;
}

/* Does an earlier action make a node of that name? Then nobody can look at its children yet. */
static bool made_before(const struct footprint *f, const char *node)
{
    if (f->n_uses > LOOK_BACK)
        return true;
    for (size_t i = 0; i < f->n_uses; i++) {
        if (f->use[i].makes && f->use[i].action != f->action && !strcmp(f->use[i].name.a, node))
            return true;
    }
    return false;
}

/* ------------------------------------------------------------------ nodes */

static void reads_ref(struct footprint *f, const struct q_blockdev_ref *ref);

/* A node and those described inside it come to be; those that it names get a user. Their number
 * is bounded by what the parser takes. */
static void node_footprint(const struct q_blockdev_options *o, struct footprint *f)
{
    if (o->node_name) {
        writes(f, STORE_NODE, o->node_name, NULL);
        if (!f->no_memory)
            f->use[f->n_uses - 1].makes = true;
    }
    switch (o->driver) {
    case Q_BLOCKDEV_DRIVER_FILE:
        return reads(f, STORE_FILE, o->u.file.filename, NULL);
    case Q_BLOCKDEV_DRIVER_HOST_DEVICE:
        return reads(f, STORE_FILE, o->u.host_device.filename, NULL);
    case Q_BLOCKDEV_DRIVER_RAW:
        return reads_ref(f, o->u.raw.file);
    case Q_BLOCKDEV_DRIVER_BLKDEBUG:
        return reads_ref(f, o->u.blkdebug.image);
    case Q_BLOCKDEV_DRIVER_THROTTLE:
        return reads_ref(f, o->u.throttle.file);
    case Q_BLOCKDEV_DRIVER_NULL_CO:
    case Q_BLOCKDEV_DRIVER_NULL_AIO:
        return;
    }
}

static void reads_ref(struct footprint *f, const struct q_blockdev_ref *ref)
{
    if (ref->kind == Q_KIND_STRING)
        reads(f, STORE_NODE, ref->string, NULL);
    else
        node_footprint(ref->object, f);
}

#define CHILDREN_DEPTH 64u /* nodes stand no deeper on each other */

/* They go with it or lose a user: any, if they cannot be told. */
static void writes_children(struct footprint *f, const char *node, unsigned depth)
{
    const struct footprint_lookup *l = f->lookup;
    const char *child;
    if (!l || made_before(f, node)) {
        writes(f, STORE_NODE, NULL, NULL);
        return;
    }
    for (unsigned i = 0; depth && (child = l->node_child(l->arg, node, i)); i++) {
        writes(f, STORE_NODE, child, NULL);
        writes_children(f, child, depth - 1);
    }
}

/* They go with it. (Those that the list itself adds are named by that.) */
static void writes_bitmaps_of(struct footprint *f, const char *node)
{
    const struct footprint_lookup *l = f->lookup;
    const char *name;
    for (unsigned i = 0; l && (name = l->node_bitmap(l->arg, node, i)); i++)
        writes_bitmap(f, node, name);
}

static void del_footprint(const struct q_blockdev_del *a, struct footprint *f)
{
    writes(f, STORE_NODE, a->node_name, NULL);
    writes_bitmaps_of(f, a->node_name);
    writes_children(f, a->node_name, CHILDREN_DEPTH);
}

/* ------------------------------------------------------------------ jobs */

static void job_footprint(const char *device, const char *bitmap, const char *job_id,
                          struct footprint *f)
{
    reads(f, STORE_NODE, device, NULL);
    hold(f, device, NULL, true);
    if (bitmap) {
        reads(f, STORE_BITMAP, device, bitmap);
        reads(f, STORE_BITMAP_BITS, device, bitmap);
        writes(f, STORE_BITMAP_STATE, device, bitmap);
    }
    writes(f, STORE_JOB, job_id, NULL);
    writes(f, STORE_NODE, device, NULL); /* who uses it */
}

static void backup_footprint(const struct q_blockdev_backup *a, struct footprint *f)
{
    job_footprint(a->device, a->bitmap, a->job_id, f);
    reads(f, STORE_NODE, a->target, NULL);
    hold(f, a->target, NULL, true);
    writes(f, STORE_NODE, a->target, NULL);
}

/* The node over the file is the job's own; a list cannot name it. */
static void drive_backup_footprint(const struct q_drive_backup *a, struct footprint *f)
{
    job_footprint(a->device, a->bitmap, a->job_id, f);
    if (a->mode == Q_NEW_IMAGE_MODE_EXISTING)
        reads(f, STORE_FILE, a->target, NULL);
    writes(f, STORE_FILE, a->target, NULL);
}

/* ------------------------------------------------------------------ exports */

/* The node that an export shows, which is in use by it: any, if it cannot be told. */
static void reads_node_of(struct footprint *f, const char *id)
{
    const struct footprint_lookup *l = f->lookup;
    const char *node = l && !changed_before(f, id) ? l->export_node(l->arg, id) : NULL;
    reads(f, STORE_NODE, node, NULL);
}

/* A bare name may be that of a bitmap of the node or of one further down: of any, if it cannot be
 * told which those are. */
static void owns_by_name(struct footprint *f, const char *node, const char *name)
{
    const struct footprint_lookup *l = f->lookup;
    for (; node; node = l->node_child(l->arg, node, 0)) {
        if (!l || made_before(f, node))
            node = name = NULL;
        reads(f, STORE_BITMAP, node, name);
        writes(f, STORE_BITMAP_STATE, node, name);
        if (!node)
            return;
    }
}

static void export_add_footprint(const struct q_block_export_options *a, struct footprint *f)
{
    bool nbd = a->type == Q_BLOCK_EXPORT_TYPE_NBD;
    reads(f, STORE_NODE, a->node_name, NULL);
    writes(f, STORE_EXPORT, a->id, NULL);
    writes(f, STORE_EXPORT_NAME, nbd && a->u.nbd.name ? a->u.nbd.name : a->node_name, NULL);
    for (size_t i = 0; nbd && i < a->u.nbd.n_bitmaps; i++) {
        const struct q_block_dirty_bitmap_or_str *b = &a->u.nbd.bitmaps[i];
        if (b->kind == Q_KIND_STRING) {
            owns_by_name(f, a->node_name, b->string);
            continue;
        }
        reads(f, STORE_NODE, b->object->node, NULL);
        reads(f, STORE_BITMAP, b->object->node, b->object->name);
        writes(f, STORE_BITMAP_STATE, b->object->node, b->object->name);
    }
}

/* Its clients, if any, go on until the list has happened: they are not in its way, since what they
 * could be in the way of is held by the actions that concern it. So deleting the export of a disk
 * that hangs does not wait for the disk. */
static void export_del_footprint(const struct q_block_export_del *a, struct footprint *f)
{
    reads_node_of(f, a->id);
    writes(f, STORE_EXPORT, a->id, NULL);
    writes(f, STORE_EXPORT_NAME, NULL, NULL);
    writes(f, STORE_BITMAP_STATE, NULL, NULL); /* who uses them */
}

static void export_set_node_footprint(const struct q_block_export_set_node *a, struct footprint *f)
{
    reads_node_of(f, a->id);
    reads(f, STORE_NODE, a->node_name, NULL);
    writes(f, STORE_EXPORT, a->id, NULL);
    hold(f, NULL, a->id, true);
    hold(f, a->node_name, NULL, true);
}

/* ------------------------------------------------------------------ all of them */

void action_footprint(int kind, const void *args, unsigned index, struct footprint *f)
{
    const struct q_block_dirty_bitmap_enable *on = args;
    const struct q_block_dirty_bitmap_disable *off = args;
    const struct q_x_block_dirty_bitmap_enable *x_on = args;
    const struct q_x_block_dirty_bitmap_disable *x_off = args;
    f->action = index;
    switch ((enum q_transaction_action_kind)kind) {
    case Q_TRANSACTION_ACTION_KIND_ABORT:
        return;
    case Q_TRANSACTION_ACTION_KIND_BLOCK_DIRTY_BITMAP_ADD:
        return add_footprint(args, f);
    case Q_TRANSACTION_ACTION_KIND_BLOCK_DIRTY_BITMAP_REMOVE:
        return remove_footprint(args, f);
    case Q_TRANSACTION_ACTION_KIND_BLOCK_DIRTY_BITMAP_CLEAR:
        return clear_footprint(args, f);
    case Q_TRANSACTION_ACTION_KIND_BLOCK_DIRTY_BITMAP_ENABLE:
        return switch_footprint(on->node, on->name, f);
    case Q_TRANSACTION_ACTION_KIND_BLOCK_DIRTY_BITMAP_DISABLE:
        return switch_footprint(off->node, off->name, f);
    case Q_TRANSACTION_ACTION_KIND_BLOCK_DIRTY_BITMAP_MERGE:
        return merge_footprint(args, f);
    case Q_TRANSACTION_ACTION_KIND_BLOCK_DIRTY_BITMAP_RENAME:
        return rename_footprint(args, f);
    case Q_TRANSACTION_ACTION_KIND_BLOCK_DIRTY_BITMAP_COPY:
        return copy_footprint(args, f);
    case Q_TRANSACTION_ACTION_KIND_X_BLOCK_DIRTY_BITMAP_ENABLE:
        return switch_footprint(x_on->node, x_on->name, f);
    case Q_TRANSACTION_ACTION_KIND_X_BLOCK_DIRTY_BITMAP_DISABLE:
        return switch_footprint(x_off->node, x_off->name, f);
    case Q_TRANSACTION_ACTION_KIND_X_BLOCK_DIRTY_BITMAP_MERGE:
        return x_merge_footprint(args, f);
    case Q_TRANSACTION_ACTION_KIND_BLOCKDEV_BACKUP:
        return backup_footprint(args, f);
    case Q_TRANSACTION_ACTION_KIND_DRIVE_BACKUP:
        return drive_backup_footprint(args, f);
    case Q_TRANSACTION_ACTION_KIND_BLOCKDEV_ADD:
        return node_footprint(args, f);
    case Q_TRANSACTION_ACTION_KIND_BLOCKDEV_DEL:
        return del_footprint(args, f);
    case Q_TRANSACTION_ACTION_KIND_BLOCK_EXPORT_ADD:
        return export_add_footprint(args, f);
    case Q_TRANSACTION_ACTION_KIND_BLOCK_EXPORT_DEL:
        return export_del_footprint(args, f);
    case Q_TRANSACTION_ACTION_KIND_BLOCK_EXPORT_SET_NODE:
        return export_set_node_footprint(args, f);
    }
    assert(false);
}
