/* SPDX-License-Identifier: Apache-2.0 */
/* blockdev-backup: the arguments' own rules (contract 7.1), then job/backup.h. And drive-backup,
 * the same to a file: a node over it is opened here and given to the job. */
#include <errno.h>
#include <string.h>
#include <sys/stat.h>

#include "base/bytes.h"
#include "base/mem.h"
#include "block/node.h"
#include "block/tracker.h"
#include "io/io.h"
#include "job/backup.h"
#include "schema/types.h"
#include "txn/actions.h"
#include "txn/footprint.h"
#include "txn/new_file.h"

struct backup_rec {
    struct job *job;
};

static void backup_rec_unwind(void *p)
{
    struct backup_rec *rec = p;
    backup_unwind(rec->job);
    backup_drop(rec->job);
}

static void backup_rec_announce(void *p)
{
    struct backup_rec *rec = p;
    job_announce(rec->job);
}

static void backup_rec_open(void *p)
{
    struct backup_rec *rec = p;
    job_start(rec->job);
}

static const struct undo_ops backup_undo = {
    .unwind = backup_rec_unwind, .announce = backup_rec_announce, .open = backup_rec_open};

static enum job_on_error on_error(bool has, int value)
{
    switch (has ? value : Q_BLOCKDEV_ON_ERROR_REPORT) {
    case Q_BLOCKDEV_ON_ERROR_IGNORE:
        return JOB_ERROR_IGNORE;
    case Q_BLOCKDEV_ON_ERROR_ENOSPC:
    case Q_BLOCKDEV_ON_ERROR_AUTO:
        return JOB_ERROR_ENOSPC;
    case Q_BLOCKDEV_ON_ERROR_STOP:
        return JOB_ERROR_STOP;
    default:
        return JOB_ERROR_REPORT;
    }
}

/* Which sync mode goes with which bitmap arguments. */
static int check_bitmap_args(const struct q_blockdev_backup *args, struct tide_error *err)
{
    const char *sync = q_mirror_sync_mode_names[args->sync];
    bool incremental = args->sync == Q_MIRROR_SYNC_MODE_INCREMENTAL;
    if ((incremental || args->sync == Q_MIRROR_SYNC_MODE_BITMAP) && !args->bitmap)
        return tide_fail(err, -EINVAL, "sync=%s needs 'bitmap': the name of a bitmap on node '%s'",
                         sync, args->device);
    if (incremental && args->has_bitmap_mode && args->bitmap_mode != Q_BITMAP_SYNC_MODE_ON_SUCCESS)
        return tide_fail(err, -EINVAL,
                         "sync=incremental means bitmap-mode=on-success: leave bitmap-mode "
                         "out, or use sync=bitmap");
    if (!args->bitmap && args->has_bitmap_mode)
        return tide_fail(err, -EINVAL, "'bitmap-mode' needs 'bitmap'");
    return 0;
}

/* What can only be said once the bitmap is known to exist. */
static int check_bitmap_mode(const struct q_blockdev_backup *args, struct tide_error *err)
{
    const char *sync = q_mirror_sync_mode_names[args->sync];
    if (!args->has_bitmap_mode && args->sync != Q_MIRROR_SYNC_MODE_INCREMENTAL)
        return tide_fail(err, -EINVAL, "'bitmap-mode' is missing: sync=%s with a bitmap needs it",
                         sync);
    if (args->sync == Q_MIRROR_SYNC_MODE_NONE)
        return tide_fail(err, -EINVAL,
                         "sync=none copies nothing that a bitmap could stand for: leave "
                         "'bitmap' out");
    if (args->bitmap_mode == Q_BITMAP_SYNC_MODE_NEVER && args->has_bitmap_mode &&
        args->sync != Q_MIRROR_SYNC_MODE_BITMAP)
        return tide_fail(err, -EINVAL,
                         "bitmap-mode=never means nothing with sync=%s: leave 'bitmap' out", sync);
    return 0;
}

static int take_bitmap(const struct q_blockdev_backup *args, struct backup_options *o,
                       struct tide_error *err)
{
    if (!args->bitmap)
        return 0;
    int r = dirty_bitmap_find(o->source, args->bitmap, 0, &o->bitmap, err);
    if (r == 0)
        r = check_bitmap_mode(args, err);
    o->bitmap_mode =
        args->has_bitmap_mode ? (enum backup_bitmap_mode)args->bitmap_mode : BACKUP_ON_SUCCESS;
    unsigned needs = BITMAP_NOT_BUSY | BITMAP_CONSISTENT;
    if (o->bitmap_mode != BACKUP_NEVER)
        needs |= BITMAP_WRITABLE;
    if (r == 0)
        r = dirty_bitmap_find(o->source, args->bitmap, needs, &o->bitmap, err);
    return r;
}

static int take_perf(const struct q_blockdev_backup *args, struct backup_options *o,
                     struct tide_error *err)
{
    const struct q_backup_perf *p = args->x_perf;
    o->max_workers = 64;
    o->copy_range = true;
    if (!p)
        return 0;
    if (p->has_max_workers && (p->max_workers < 1 || p->max_workers > INT32_MAX))
        return tide_fail(err, -EINVAL, "max-workers %lld is not from 1 to 2147483647",
                         (long long)p->max_workers);
    if (p->has_max_chunk && p->max_chunk < 0)
        return tide_fail(err, -EINVAL, "max-chunk %lld is negative", (long long)p->max_chunk);
    if (p->has_max_workers)
        o->max_workers = (unsigned)p->max_workers;
    if (p->has_max_chunk)
        o->max_chunk = (uint64_t)p->max_chunk;
    if (p->has_use_copy_range)
        o->copy_range = p->use_copy_range;
    return 0;
}

static int take_sync(const struct q_blockdev_backup *args, struct backup_options *o)
{
    switch (args->sync) {
    case Q_MIRROR_SYNC_MODE_NONE:
        return o->sync = BACKUP_NONE, 0;
    case Q_MIRROR_SYNC_MODE_TOP: /* nothing here has a backing file: the top layer is all */
        return o->sync = BACKUP_TOP, 0;
    case Q_MIRROR_SYNC_MODE_FULL:
        return o->sync = BACKUP_FULL, 0;
    default:
        return o->sync = BACKUP_BITMAP, 0;
    }
}

/* Source and target are in `o`. */
static int make_options(struct txn *t, const struct q_blockdev_backup *args,
                        struct backup_options *o, struct tide_error *err)
{
    int r = check_bitmap_args(args, err);
    if (r == 0)
        r = take_bitmap(args, o, err);
    if (r == 0 && args->has_compress && args->compress)
        r = tide_fail(err, -ENOTSUP, "target '%s' cannot be compressed: leave 'compress' out",
                      args->target);
    if (r == 0 && args->filter_node_name)
        r = tide_fail(err, -ENOTSUP,
                      "'filter-node-name' is not offered: a backup here needs no filter node");
    if (r == 0 && args->has_speed && args->speed < 0)
        r = tide_fail(err, -EINVAL, "'speed' is negative: give bytes a second, or 0 for no limit");
    if (r == 0)
        r = take_perf(args, o, err);
    if (r < 0)
        return r;
    o->on_source_error = on_error(args->has_on_source_error, args->on_source_error);
    o->on_target_error = on_error(args->has_on_target_error, args->on_target_error);
    o->job = (struct job_options){
        .id = args->job_id,
        .speed = args->has_speed ? (uint64_t)args->speed : 0,
        .auto_finalize = !args->has_auto_finalize || args->auto_finalize,
        .auto_dismiss = !args->has_auto_dismiss || args->auto_dismiss,
        .group = txn_job_group(t),
    };
    return take_sync(args, o);
}

static co_fn void describe(struct txn *t, const struct q_blockdev_backup *args,
                           const struct backup_options *o, const char *target)
{
    if (!txn_is_dry(t))
        return; /* the bits need not be counted */
    if (o->bitmap)
        txn_sees(t, "bitmap '%s' on node '%s' with %llu dirty bytes", shown_name(args->bitmap).text,
                 args->device, dirty_bitmap_bytes(o->bitmap, txn_pace(t)));
    else
        txn_sees(t, "node '%s' of %llu bytes", args->device,
                 (unsigned long long)node_size(o->source));
    txn_does(t, "job '%s' copies to %s '%s' (sync=%s)", args->job_id, target,
             shown_name(args->target).text, q_mirror_sync_mode_names[args->sync]);
}

/* With the record that was reserved for it. */
static co_fn int start_backup(struct txn *t, const struct q_blockdev_backup *args,
                              struct backup_options *o, struct backup_rec *rec,
                              struct tide_error *err)
{
    struct job *j;
    int r = make_options(t, args, o, err);
    if (r == 0)
        r = backup_new(txn_jobs(t), o, txn_pace(t), &j, err);
    if (r < 0)
        return r;
    rec->job = j;
    txn_arm(t, rec);
    return 0;
}

static co_fn int backup_prepare(struct txn *t, const struct action *a, struct tide_error *err)
{
    const struct q_blockdev_backup *args = a->args;
    struct backup_options o = {0};
    int r = graph_find_err(txn_graph(t), args->device, &o.source, err);
    if (r == 0)
        r = graph_find_err(txn_graph(t), args->target, &o.target, err);
    if (r < 0)
        return r;
    struct backup_rec *rec = txn_reserve(t, &backup_undo, sizeof *rec, err);
    if (!rec)
        return -ENOMEM;
    r = start_backup(t, args, &o, rec, err);
    if (r == 0)
        describe(t, args, &o, "node");
    return r;
}

const struct action_ops blockdev_backup_ops = {.prepare = backup_prepare};

/* ------------------------------------------------------------------ the file of drive-backup */

/* Made before guests are held, where the list allows it. */
struct target {
    struct node *n;
    struct new_file *file; /* NULL: one that existed */
    char *path;            /* what the node's file is called from its effect on */
};

static co_fn void target_free(struct target *x)
{
    if (!x)
        return;
    if (x->n)
        graph_close(x->n, false);
    new_file_end(x->file);
    mem_free(x->path);
    mem_free(x);
}

static int take_path(const char *target, const char **path, struct tide_error *err)
{
    *path = backup_target_path(target);
    if (*path)
        return 0;
    return tide_fail(err, -ENOTSUP,
                     "target '%s' is no file: open it with blockdev-add and use blockdev-backup (a "
                     "file of that name is './%s')",
                     shown_name(target).text, shown_name(target).text);
}

static int check_format(const struct q_drive_backup *args, struct tide_error *err)
{
    if (!args->format || !strcmp(args->format, "raw"))
        return 0;
    return tide_fail(err, -ENOTSUP, "format '%s' is not built into this daemon: use format=raw",
                     shown_name(args->format).text);
}

/* A file whose format is not said may be an image of a format that is not ours, and would be
 * destroyed. */
static const struct magic {
    const char *format;
    unsigned off, len;
    const char *bytes;
} magics[] = {
    {"qcow2", 0, 4, "QFI\xfb"},     {"qed", 0, 4, "QED"},
    {"vmdk", 0, 4, "KDMV"},         {"vmdk", 0, 4, "COWD"},
    {"vpc", 0, 8, "conectix"},      {"vhdx", 0, 8, "vhdxfile"},
    {"luks", 0, 6, "LUKS\xba\xbe"}, {"vdi", 64, 4, "\x7f\x10\xda\xbe"},
};

static co_fn int check_magic(const char *path, struct tide_error *err)
{
    char head[512] = {0};
    struct iovec iov = {head, sizeof head};
    struct io_file *f;
    if (io_open(path, O_RDONLY, 0, &f) < 0)
        return 0; /* opening it as a node says why */
    ssize_t len = io_preadv(f, &iov, 1, 0);
    io_close(f);
    if (len < 0)
        return tide_fail(
            err, (int)len,
            "cannot read whether '%s' is an image of some format: %s; to write over it "
            "in any case, say format=raw",
            shown_name(path).text, tide_strerror((int)-len));
    for (unsigned i = 0; i < sizeof magics / sizeof *magics; i++) {
        const struct magic *m = &magics[i];
        if (!memcmp(head + m->off, m->bytes, m->len))
            return tide_fail(
                err, -ENOTSUP,
                "'%s' looks like an image of format '%s', which is not built into this "
                "daemon: to write over it, say format=raw",
                path, m->format);
    }
    return 0;
}

static co_fn int check_existing(const struct q_drive_backup *args, const char *path,
                                struct node *source, bool *device, struct tide_error *err)
{
    struct io_stat st;
    int r = io_stat(path, &st);
    if (r < 0)
        return tide_fail(err, r, "cannot open '%s': %s", shown_name(path).text, tide_strerror(-r));
    *device = S_ISBLK(st.mode);
    if (!*device && !S_ISREG(st.mode))
        return tide_fail(err, -EINVAL, "'%s' is neither a file nor a block device", path);
    if (node_stands_on_file(source, st.dev, st.ino))
        return tide_fail(err, -EINVAL, "target '%s' is the file of source '%s' itself", path,
                         args->device);
    return args->format ? 0 : check_magic(path, err);
}

/* raw over the file, as the source is opened; without a name, so that others leave it alone. */
static co_fn int open_over(struct txn *t, struct node *source, struct q_blockdev_options *file,
                           struct node **out, struct tide_error *err)
{
    struct q_blockdev_cache_options cache = {.has_direct = true,
                                             .direct = node_direct(source),
                                             .has_no_flush = true,
                                             .no_flush = node_no_flush(source)};
    struct q_blockdev_ref ref = {.kind = Q_KIND_OBJECT, .object = file};
    struct q_blockdev_options raw = {
        .driver = Q_BLOCKDEV_DRIVER_RAW,
        .cache = &cache,
        .has_discard = true,
        .discard = Q_BLOCKDEV_DISCARD_OPTIONS_UNMAP,
        .has_detect_zeroes = true,
        .detect_zeroes = Q_BLOCKDEV_DETECT_ZEROES_OPTIONS_UNMAP,
        .u.raw.file = &ref,
    };
    return graph_open(txn_graph(t), &raw, false, out, err);
}

static co_fn int open_file(struct txn *t, struct node *source, const char *path, bool device,
                           struct node **out, struct tide_error *err)
{
    struct q_blockdev_options file = {.driver = Q_BLOCKDEV_DRIVER_FILE, .u.file.filename = path};
    struct q_blockdev_options dev = {.driver = Q_BLOCKDEV_DRIVER_HOST_DEVICE,
                                     .u.host_device.filename = path};
    int r = open_over(t, source, device ? &dev : &file, out, err);
    if (r == 0 && node_size(*out) != node_size(source)) {
        r = tide_fail(err, -EINVAL, "sizes differ: source '%s' has %llu bytes, target '%s' %llu",
                      node_name(source), (unsigned long long)node_size(source), path,
                      (unsigned long long)node_size(*out));
        graph_close(*out, false);
        *out = NULL;
    }
    return r;
}

/* A dry run makes no file; all else goes on over a disk that forgets. */
static co_fn int open_dry(struct txn *t, struct node *source, struct node **out,
                          struct tide_error *err)
{
    struct q_blockdev_options null = {.driver = Q_BLOCKDEV_DRIVER_NULL_CO,
                                      .u.null_co = {.has_size = true, .size = node_size(source)}};
    return open_over(t, source, &null, out, err);
}

static co_fn int open_target(struct txn *t, const struct q_drive_backup *args, struct target *x,
                             struct tide_error *err)
{
    struct graph *g = txn_graph(t);
    struct node *source;
    const char *path;
    bool device = false;
    int r = graph_find_err(g, args->device, &source, err);
    if (r == 0)
        r = check_format(args, err);
    if (r == 0)
        r = take_path(args->target, &path, err);
    if (r < 0)
        return r;
    if (args->mode == Q_NEW_IMAGE_MODE_EXISTING) {
        r = check_existing(args, path, source, &device, err);
        return r < 0 ? r : open_file(t, source, path, device, &x->n, err);
    }
    if (txn_is_dry(t))
        return open_dry(t, source, &x->n, err);
    x->path = mem_strdup(path);
    if (!x->path)
        return tide_fail(err, -ENOMEM, "no memory for target '%s'", shown_name(path).text);
    r = new_file_make(graph_io(g), path, node_size(source), &x->file, err);
    return r < 0 ? r : open_file(t, source, new_file_temp(x->file), false, &x->n, err);
}

static co_fn int target_new(struct txn *t, const struct q_drive_backup *args, struct target **out,
                            struct tide_error *err)
{
    struct target *x = mem_zalloc(sizeof *x);
    if (!x)
        return tide_fail(err, -ENOMEM, "no memory for target '%s'", shown_name(args->target).text);
    int r = open_target(t, args, x, err);
    if (r < 0)
        target_free(x);
    else
        *out = x;
    return r;
}

/* Into its place and into sight. */
static co_fn int target_place(struct txn *t, const struct q_drive_backup *args, struct target *x,
                              struct tide_error *err)
{
    const char *path;
    int r = take_path(args->target, &path, err);
    if (r == 0 && args->mode != Q_NEW_IMAGE_MODE_EXISTING && txn_is_dry(t))
        r = new_file_check(txn_graph(t), path, err);
    else if (r == 0 && x->file) {
        struct tide_error left;
        r = new_file_place(x->file, txn_graph(t), &left, err);
        if (left.code < 0)
            txn_not_undone(t, &left);
    }
    if (r < 0)
        return r;
    if (x->file)
        x->path = node_set_filename(node_child(x->n, 0), x->path);
    graph_publish(x->n);
    return 0;
}

/* ------------------------------------------------------------------ drive-backup */

struct target_rec {
    struct txn *t;
    struct target *x;
};

static co_fn void target_rec_unwind(void *p)
{
    struct target_rec *rec = p;
    struct target *x = rec->x;
    struct tide_error why;
    graph_withdraw(x->n);
    if (x->file) {
        x->path = node_set_filename(node_child(x->n, 0), x->path);
        if (new_file_unplace(x->file, &why) < 0)
            txn_not_undone(rec->t, &why);
    }
}

/* If the list has happened the node is the job's, and the file that was there before goes. */
static co_fn void target_rec_release(void *p, bool undone)
{
    struct target *x = ((struct target_rec *)p)->x;
    if (!undone)
        x->n = NULL;
    target_free(x);
}

static const struct undo_ops target_undo = {.unwind = target_rec_unwind,
                                            .release = target_rec_release};

static struct q_blockdev_backup common_part(const struct q_drive_backup *d)
{
    return (struct q_blockdev_backup){
        .job_id = d->job_id,
        .device = d->device,
        .sync = d->sync,
        .has_speed = d->has_speed,
        .speed = d->speed,
        .bitmap = d->bitmap,
        .has_bitmap_mode = d->has_bitmap_mode,
        .bitmap_mode = d->bitmap_mode,
        .has_compress = d->has_compress,
        .compress = d->compress,
        .has_on_source_error = d->has_on_source_error,
        .on_source_error = d->on_source_error,
        .has_on_target_error = d->has_on_target_error,
        .on_target_error = d->on_target_error,
        .has_auto_finalize = d->has_auto_finalize,
        .auto_finalize = d->auto_finalize,
        .has_auto_dismiss = d->has_auto_dismiss,
        .auto_dismiss = d->auto_dismiss,
        .filter_node_name = d->filter_node_name,
        .x_perf = d->x_perf,
        .target = d->target,
    };
}

static co_fn int drive_stage(struct txn *t, const struct action *a, void **out,
                             struct tide_error *err)
{
    struct target *x = NULL;
    int r = target_new(t, a->args, &x, err);
    *out = x;
    return r;
}

static co_fn void drive_unstage(struct txn *t, void *staged)
{
    target_free(staged);
}

/* The target's record, armed: from here on the engine undoes it. */
static co_fn int arm_target(struct txn *t, const struct action *a, struct target **out,
                            struct tide_error *err)
{
    struct target *x = txn_staged(t, a);
    struct target_rec *rec = txn_reserve(t, &target_undo, sizeof *rec, err);
    int r = rec ? 0 : -ENOMEM;
    if (r == 0 && !x)
        r = target_new(t, a->args, &x, err);
    if (r == 0)
        r = target_place(t, a->args, x, err);
    if (r < 0) {
        target_free(x);
        return r;
    }
    rec->t = t;
    rec->x = *out = x;
    txn_arm(t, rec);
    return 0;
}

static co_fn int drive_prepare(struct txn *t, const struct action *a, struct tide_error *err)
{
    const struct q_drive_backup *args = a->args;
    const struct q_blockdev_backup common = common_part(args);
    struct backup_options o = {.owns_target = true};
    struct target *x = NULL;
    struct backup_rec *rec = txn_reserve(t, &backup_undo, sizeof *rec, err);
    int r = rec ? arm_target(t, a, &x, err) : -ENOMEM;
    if (r == 0)
        r = graph_find_err(txn_graph(t), args->device, &o.source, err);
    if (r < 0)
        return r;
    o.target = x->n;
    r = start_backup(t, &common, &o, rec, err);
    if (r == 0)
        describe(t, &common, &o, x->file || txn_is_dry(t) ? "new file" : "file");
    if (r == 0 && args->mode != Q_NEW_IMAGE_MODE_EXISTING && txn_is_dry(t))
        txn_only_checked(t);
    return r;
}

const struct action_ops drive_backup_ops = {
    .prepare = drive_prepare, .stage = drive_stage, .unstage = drive_unstage};
