/* SPDX-License-Identifier: Apache-2.0 */
/* blockdev-backup: the arguments' own rules (contract 7.1), then job/backup.h. */
#include <errno.h>

#include "base/bytes.h"
#include "block/node.h"
#include "block/tracker.h"
#include "job/backup.h"
#include "schema/types.h"
#include "txn/actions.h"

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

static int make_options(struct txn *t, const struct q_blockdev_backup *args,
                        struct backup_options *o, struct tide_error *err)
{
    struct graph *g = txn_graph(t);
    int r = graph_find_err(g, args->device, &o->source, err);
    if (r == 0)
        r = graph_find_err(g, args->target, &o->target, err);
    if (r == 0)
        r = check_bitmap_args(args, err);
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

static void describe(struct txn *t, const struct q_blockdev_backup *args,
                     const struct backup_options *o)
{
    if (o->bitmap)
        txn_sees(t, "bitmap '%s' on node '%s' with %llu dirty bytes", shown_name(args->bitmap).text,
                 args->device, dirty_bitmap_bytes(o->bitmap));
    else
        txn_sees(t, "node '%s' of %llu bytes", args->device,
                 (unsigned long long)node_size(o->source));
    txn_does(t, "job '%s' copies to node '%s' (sync=%s)", args->job_id, args->target,
             q_mirror_sync_mode_names[args->sync]);
}

static int backup_prepare(struct txn *t, const struct action *a, struct tide_error *err)
{
    const struct q_blockdev_backup *args = a->args;
    struct backup_options o = {0};
    struct job *j;
    int r = make_options(t, args, &o, err);
    if (r < 0)
        return r;
    struct backup_rec *rec = txn_reserve(t, &backup_undo, sizeof *rec, err);
    if (!rec)
        return -ENOMEM;
    r = backup_new(txn_jobs(t), &o, &j, err);
    if (r < 0)
        return r;
    rec->job = j;
    txn_arm(t, rec);
    describe(t, args, &o);
    return 0;
}

const struct action_ops blockdev_backup_ops = {.prepare = backup_prepare};
