/* SPDX-License-Identifier: Apache-2.0 */
/* The table of section "The actions" in docs/transactions.md, as far as names go: one function for
 * each kind, in the order of the schema. */
#include "txn/footprint.h"

#include <assert.h>
#include <stdio.h>
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
    f->use[f->n_uses++] = (struct name_use){{kind, a, b}, f->action, writes, NULL};
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
    mem_free(f->disk);
    known_free(&f->known);
    *f = (struct footprint){0};
}

/* ------------------------------------------------------------------ what is known */

static void *no_memory(struct footprint *f)
{
    f->no_memory = true;
    return NULL;
}

/* Without dots and slashes that say nothing. */
static const char *plain_path(struct footprint *f, const char *path)
{
    char *copy = arena_alloc(&f->known.arena, strlen(path) + 3);
    if (!copy)
        return no_memory(f);
    char *end = stpcpy(copy, "p:"); /* not the key of a file that is known */
    while (*path) {
        size_t len = strcspn(path, "/"), slashes = strspn(path + len, "/");
        if (len != 1 || *path != '.' || !slashes) {
            end = mempcpy(end, path, len);
            end = slashes ? stpcpy(end, "/") : end;
        }
        path += len + slashes;
    }
    *end = 0;
    return copy;
}

/* NULL: it may be any. */
static const char *file_key(struct footprint *f, const char *path)
{
    const struct footprint_lookup *l = f->lookup;
    return l && l->file_key ? l->file_key(l->file_arg, path) : plain_path(f, path);
}

static void use_file(struct footprint *f, bool writes, const char *path)
{
    use(f, writes, STORE_FILE, path, NULL);
    if (!f->explains || f->no_memory)
        return;
    struct name_use *u = &f->use[f->n_uses - 1];
    u->path = path;
    u->name.a = file_key(f, path);
}

static const char *key_of_node(struct footprint *f, const char *node)
{
    const struct footprint_lookup *l = f->lookup;
    uint64_t dev, ino;
    char key[64];
    if (!f->explains || !l || !l->node_file(l->arg, node, &dev, &ino))
        return NULL;
    int len = snprintf(key, sizeof key, FOOTPRINT_FILE_KEY, (unsigned long long)dev,
                       (unsigned long long)ino);
    const char *copy = arena_strndup(&f->known.arena, key, (size_t)len);
    return copy ? copy : no_memory(f);
}

static struct place *new_place(struct footprint *f, const char *name)
{
    struct place *p = known_node_new(&f->known, name);
    return p ? p : no_memory(f);
}

/* NULL: no memory. */
static struct place *place_of(struct footprint *f, const char *node)
{
    const struct footprint_lookup *l = f->lookup;
    struct place *p = known_node(&f->known, node);
    if (p)
        return p;
    p = new_place(f, node);
    if (!p || !l)
        return p;
    const char *below = l->node_child(l->arg, node, 0);
    if (below)
        place_on(p, place_of(f, below)); /* the graph is no deeper than PLACE_MAX_DEPTH */
    else
        p->file = key_of_node(f, node);
    return p;
}

/* What stands below it is known, if anything does. */
static bool is_known(const struct footprint *f, const struct place *p)
{
    return f->lookup || p->made;
}

/* ------------------------------------------------------------------ disks */

#define TRACK (1u << DISK_TRACK)
#define WRITE (1u << DISK_WRITE)
#define ALONE (1u << DISK_ALONE | WRITE)
#define SOURCE (1u << DISK_SOURCE | TRACK)

static void disk_at(struct footprint *f, struct place *p, unsigned how, bool ends)
{
    if (!p)
        return;
    if (!grow((void **)&f->disk, f->n_disks, &f->cap_disks, sizeof *f->disk)) {
        f->no_memory = true;
        return;
    }
    f->disk[f->n_disks++] = (struct disk_use){p, f->action, how, ends};
    if (how & TRACK)
        p->watched = true;
}

static void disk(struct footprint *f, const char *node, unsigned how, bool ends)
{
    if (f->explains)
        disk_at(f, place_of(f, node), how, ends);
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
    disk(f, a->node, TRACK, false);
    writes_bitmap(f, a->node, a->name);
}

static void remove_footprint(const struct q_block_dirty_bitmap_remove *a, struct footprint *f)
{
    hold_writes(f, a->node);
    disk(f, a->node, TRACK, true);
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
    disk(f, a->node, TRACK, false);
    writes_bitmap(f, a->node, a->name);
}

/* ------------------------------------------------------------------ nodes */

static struct place *reads_ref(struct footprint *f, const struct q_blockdev_ref *ref);

static struct place *file_at(struct footprint *f, struct place *p, const char *path)
{
    use_file(f, false, path);
    if (f->explains && p && !f->no_memory) {
        p->file = f->use[f->n_uses - 1].name.a;
        p->any_file = !p->file;
    }
    return p;
}

/* What a node stands on: another node, a file, or nothing. */
struct ground {
    const struct q_blockdev_ref *ref;
    const char *path;
};

static struct ground ground_of(const struct q_blockdev_options *o)
{
    switch (o->driver) {
    case Q_BLOCKDEV_DRIVER_FILE:
        return (struct ground){.path = o->u.file.filename};
    case Q_BLOCKDEV_DRIVER_HOST_DEVICE:
        return (struct ground){.path = o->u.host_device.filename};
    case Q_BLOCKDEV_DRIVER_RAW:
        return (struct ground){.ref = o->u.raw.file};
    case Q_BLOCKDEV_DRIVER_BLKDEBUG:
        return (struct ground){.ref = o->u.blkdebug.image};
    case Q_BLOCKDEV_DRIVER_THROTTLE:
        return (struct ground){.ref = o->u.throttle.file};
    case Q_BLOCKDEV_DRIVER_NULL_CO:
    case Q_BLOCKDEV_DRIVER_NULL_AIO:
        break;
    }
    return (struct ground){0};
}

/* A node and those described inside it come to be; those that it names get a user. Their number
 * is bounded by what the parser takes. What it stands on is looked up before its name means this
 * node: one that names itself is refused, and must not be a circle here. */
static struct place *node_footprint(const struct q_blockdev_options *o, struct footprint *f)
{
    struct ground g = ground_of(o);
    if (o->node_name)
        writes(f, STORE_NODE, o->node_name, NULL);
    struct place *below = g.ref ? reads_ref(f, g.ref) : NULL;
    struct place *p = new_place(f, o->node_name);
    if (p) {
        p->made = true;
        place_on(p, below);
    }
    return g.path ? file_at(f, p, g.path) : p;
}

static struct place *reads_ref(struct footprint *f, const struct q_blockdev_ref *ref)
{
    if (ref->kind != Q_KIND_STRING)
        return node_footprint(ref->object, f);
    struct place *p = place_of(f, ref->string);
    reads(f, STORE_NODE, ref->string, NULL);
    return p;
}

/* They go with it: true if there are any. Those that the list itself adds are named by that. */
static bool writes_bitmaps_of(struct footprint *f, const struct place *p)
{
    const struct footprint_lookup *l = p->made ? NULL : f->lookup;
    bool any = l && l->node_bitmaps(l->arg, p->link.name, writes_bitmap, f);
    return any || p->watched;
}

/* Those that it stands on go with it or lose a user: any, if they cannot be told. */
static void del_footprint(const struct q_blockdev_del *a, struct footprint *f)
{
    struct place *p = place_of(f, a->node_name), *gone = NULL;
    writes(f, STORE_NODE, a->node_name, NULL);
    for (struct place *c = p; c; c = c->below) {
        if (!is_known(f, c))
            writes(f, STORE_NODE, NULL, NULL);
        if (c != p && c->link.name)
            writes(f, STORE_NODE, c->link.name, NULL);
        if (writes_bitmaps_of(f, c) && f->explains)
            disk_at(f, c, TRACK, true);
        if (f->explains && !c->below && (c->file || c->any_file))
            reads(f, STORE_FILE, c->file, NULL);
    }
    if (p && (gone = new_place(f, a->node_name)))
        gone->made = true; /* who deletes it again deletes nothing, and looks for nothing */
}

/* ------------------------------------------------------------------ jobs */

static void job_footprint(const char *device, const char *bitmap, const char *job_id,
                          struct footprint *f)
{
    reads(f, STORE_NODE, device, NULL);
    hold(f, device, NULL, true);
    disk(f, device, SOURCE, false);
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
    disk(f, a->target, ALONE, false);
    writes(f, STORE_NODE, a->target, NULL);
}

const char *backup_target_path(const char *target)
{
    size_t word = strcspn(target, ":/");
    if (target[word] != ':')
        return target;
    return word == 4 && !memcmp(target, "file", 4) ? target + word + 1 : NULL;
}

/* The node over the file is the job's own; a list cannot name it. */
static void drive_backup_footprint(const struct q_drive_backup *a, struct footprint *f)
{
    const char *path = backup_target_path(a->target);
    job_footprint(a->device, a->bitmap, a->job_id, f);
    if (!path)
        return; /* it is refused */
    if (a->mode == Q_NEW_IMAGE_MODE_EXISTING) {
        struct place *own = f->explains ? new_place(f, NULL) : NULL;
        disk_at(f, file_at(f, own, path), ALONE, false);
    }
    use_file(f, true, path);
}

/* ------------------------------------------------------------------ exports */

/* NULL: no memory. */
static struct known_export *export_of(struct footprint *f, const char *id)
{
    const struct footprint_lookup *l = f->lookup;
    struct known_export *e = known_export(&f->known, id);
    if (e)
        return e;
    e = known_export_new(&f->known, id);
    if (e && l) {
        e->node = l->export_node(l->arg, id);
        e->writable = l->export_writable(l->arg, id);
    }
    return e ? e : no_memory(f);
}

/* The node that an export shows, which is in use by it: any, if it cannot be told. */
static void reads_node_of(struct footprint *f, const struct known_export *e)
{
    if (e->node || (!f->lookup && !e->made))
        reads(f, STORE_NODE, e->node, NULL);
}

/* A bare name may be that of a bitmap of the node or of one further down: of any, if it cannot be
 * told which those are. */
static void owns_by_name(struct footprint *f, const char *node, const char *name)
{
    for (struct place *p = place_of(f, node); p; p = p->below) {
        if (p->link.name && is_known(f, p)) {
            reads(f, STORE_BITMAP, p->link.name, name);
            writes(f, STORE_BITMAP_STATE, p->link.name, name);
        } else if (p->link.name) {
            reads(f, STORE_BITMAP, NULL, NULL);
            writes(f, STORE_BITMAP_STATE, NULL, NULL);
        }
    }
}

static void export_add_footprint(const struct q_block_export_options *a, struct footprint *f)
{
    bool nbd = a->type == Q_BLOCK_EXPORT_TYPE_NBD;
    size_t first = f->n_uses;
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
    if (a->writable)
        disk(f, a->node_name, WRITE, false);
    struct known_export *e = known_export_new(&f->known, a->id);
    if (!e)
        f->no_memory = true;
    else
        *e = (struct known_export){e->link,     a->node_name, true,
                                   a->writable, first,        f->n_uses - first};
}

/* Its name and its bitmaps are free when it goes: any, if they cannot be told. */
static void frees_parts_of(struct footprint *f, const struct known_export *e)
{
    const struct footprint_lookup *l = f->lookup;
    for (size_t i = 0; e->made && i < e->n_uses && !f->no_memory; i++) {
        const struct store_name name = f->use[e->use + i].name;
        if (name.kind == STORE_EXPORT_NAME || name.kind == STORE_BITMAP_STATE)
            writes(f, name.kind, name.a, name.b);
    }
    if (e->made)
        return;
    if (!l) {
        writes(f, STORE_EXPORT_NAME, NULL, NULL);
        writes(f, STORE_BITMAP_STATE, NULL, NULL);
        return;
    }
    struct store_name b;
    const char *name = l->export_name(l->arg, e->link.name);
    if (name && !(name = arena_strndup(&f->known.arena, name, strlen(name))))
        f->no_memory = true;
    if (name)
        writes(f, STORE_EXPORT_NAME, name, NULL);
    for (unsigned i = 0; l->export_bitmap(l->arg, e->link.name, i, &b); i++)
        writes(f, STORE_BITMAP_STATE, b.a, b.b);
}

/* Its clients, if any, go on until the list has happened: they are not in its way, since what they
 * could be in the way of is held by the actions that concern it. So deleting the export of a disk
 * that hangs does not wait for the disk. */
static void export_del_footprint(const struct q_block_export_del *a, struct footprint *f)
{
    struct known_export *e = export_of(f, a->id);
    writes(f, STORE_EXPORT, a->id, NULL);
    if (!e)
        return;
    reads_node_of(f, e);
    frees_parts_of(f, e);
    if (e->node && e->writable)
        disk(f, e->node, WRITE, true);
    *e = (struct known_export){.link = e->link, .made = true}; /* again: it deletes nothing */
}

static void export_set_node_footprint(const struct q_block_export_set_node *a, struct footprint *f)
{
    struct known_export *e = export_of(f, a->id);
    writes(f, STORE_EXPORT, a->id, NULL);
    reads(f, STORE_NODE, a->node_name, NULL);
    hold(f, NULL, a->id, true);
    hold(f, a->node_name, NULL, true);
    if (!e)
        return;
    reads_node_of(f, e);
    if (e->writable && e->node)
        disk(f, e->node, WRITE, true);
    if (e->writable || !f->lookup)
        disk(f, a->node_name, WRITE, false);
    e->node = e->node || !f->lookup ? a->node_name : NULL;
}

/* ------------------------------------------------------------------ all of them */

void action_footprint(int kind, const void *args, unsigned index, struct footprint *f)
{
    const struct q_block_dirty_bitmap_enable *on = args;
    const struct q_block_dirty_bitmap_disable *off = args;
    const struct q_x_block_dirty_bitmap_enable *x_on = args;
    const struct q_x_block_dirty_bitmap_disable *x_off = args;
    f->action = index;
    if (f->no_memory)
        return;
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
        node_footprint(args, f);
        return;
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
