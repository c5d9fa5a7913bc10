/* SPDX-License-Identifier: Apache-2.0 */
/* The life of a backup job.
 *
 * backup_new() runs inside a transaction with source and target quiesced: what it freezes and hooks
 * then *is* the point in time. run() copies while guests go on, and flushes the target; only then
 * may the end (commit) let the bitmap forget (crash-safety R7). What the end does to the bitmap is
 * the table in section 7.2 of the QMP contract. */
#include "job/backup.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "base/bytes.h"
#include "base/log.h"
#include "base/mem.h"
#include "block/tracker.h"
#include "job/backup_int.h"

/* ------------------------------------------------------------------ making one */

static int check_nodes(const struct backup_options *o, struct tide_error *err)
{
    const char *src = node_name(o->source), *dst = node_name(o->target);
    if (o->source == o->target)
        return tide_fail(err, -EINVAL, "source and target are both node '%s'", src);
    if (node_reaches(o->source, o->target) || node_reaches(o->target, o->source))
        return tide_fail(err, -EINVAL, "nodes '%s' and '%s' stand on each other", src, dst);
    if (node_size(o->source) != node_size(o->target))
        return tide_fail(err, -EINVAL, "sizes differ: source '%s' has %llu bytes, target '%s' %llu",
                         src, (unsigned long long)node_size(o->source), dst,
                         (unsigned long long)node_size(o->target));
    const char *writer = node_written_alone_by(o->source);
    if (writer)
        return tide_fail(err, -EBUSY, "node '%s' is being written by %s", src, writer);
    return 0;
}

static int make_roots(struct backup *b, struct tide_error *err)
{
    const struct backup_options *o = &b->opts;
    mem_autofree char *what = mem_printf("block job '%s'", o->job.id);
    if (!what)
        return tide_fail(err, -ENOMEM, "no memory for job '%s'", o->job.id);
    int r = root_new(o->target, ROOT_READ | ROOT_WRITE | ROOT_ALONE, what, &b->spill_root, err);
    if (r < 0)
        return r;
    root_shut(b->spill_root);
    r = root_new(o->source, ROOT_READ, what, &b->unit_root, err);
    if (r < 0)
        return r;
    root_shut(b->unit_root);
    return root_add(b->unit_root, o->target, ROOT_READ | ROOT_WRITE, err);
}

/* What has to be copied, in granules. */
static co_fn int make_work(struct backup *b, struct bitmap_pace *pace)
{
    unsigned shift = (unsigned)__builtin_ctzll(b->granule);
    int r;
    if (b->opts.sync == BACKUP_BITMAP) {
        r = bitmap_convert(b->opts.bitmap->bits, shift, pace, &b->todo);
    } else {
        r = bitmap_new(b->size, shift, &b->todo);
        if (r == 0)
            r = bitmap_set_all(b->todo);
    }
    if (r == 0)
        r = bitmap_clone(b->todo, pace, &b->undone);
    if (r == 0 && b->opts.sync != BACKUP_BITMAP)
        r = bitmap_clone(b->todo, pace, &b->maybe_data);
    return r;
}

static co_fn uint64_t dirty_bytes(const struct bitmap *bm, struct bitmap_pace *pace)
{
    uint64_t g = (uint64_t)1 << bitmap_shift(bm), size = bitmap_size(bm);
    uint64_t n = bitmap_count_at(bm, pace), tail = size & (g - 1);
    bool cut = tail && bitmap_test(bm, size - 1);
    return n * g - (cut ? g - tail : 0);
}

static unsigned count_workers(const struct backup *b, uint64_t dirty)
{
    uint64_t units = dirty / b->chunk + 1;
    uint64_t most = MIN(b->opts.max_workers, BACKUP_MAX_WORKERS);
    return b->opts.sync == BACKUP_NONE ? 0 : (unsigned)MIN(units, MIN(most, 8u));
}

static int make_workers(struct backup *b, uint64_t dirty)
{
    b->n_workers = count_workers(b, dirty);
    b->worker = mem_calloc(b->n_workers + 2, sizeof *b->worker);
    if (!b->worker)
        return -ENOMEM;
    for (unsigned i = 0; i < b->n_workers + 2; i++)
        b->worker[i].backup = b;
    return 0;
}

static void take_geometry(struct backup *b)
{
    const struct backup_options *o = &b->opts;
    b->size = node_size(o->source);
    b->granule = MAX(BACKUP_GRANULE_MIN, node_cluster_size(o->target));
    b->granule = MAX(b->granule, MAX(node_align(o->source), node_align(o->target)));
    b->chunk = MAX(b->granule, BACKUP_UNIT_MAX);
    if (o->max_chunk)
        b->chunk = MIN(b->chunk, round_down(o->max_chunk, b->granule));
}

static void free_parts(struct backup *b)
{
    mem_free(b->worker);
    graph_bitmap_free_later(b->graph, b->todo);
    graph_bitmap_free_later(b->graph, b->undone);
    graph_bitmap_free_later(b->graph, b->maybe_data);
    graph_bitmap_free_later(b->graph, b->was.bits);
    root_free(b->unit_root);
    root_free(b->spill_root);
    b->worker = NULL;
    b->todo = b->undone = b->maybe_data = b->was.bits = NULL;
    b->unit_root = b->spill_root = NULL;
}

static const struct job_ops backup_ops;

static co_fn int prepare(struct backup *b, struct bitmap_pace *pace, struct tide_error *err)
{
    const struct backup_options *o = &b->opts;
    uint64_t dirty = 0;
    int r = check_nodes(o, err);
    if (r == 0)
        r = make_roots(b, err);
    if (r == 0) /* after our own roots: target and source may meet in a node further down */
        r = node_check_watch(o->source, err);
    if (r < 0)
        return r;
    take_geometry(b);
    if (o->max_chunk && o->max_chunk < b->granule)
        return tide_fail(err, -EINVAL, "max-chunk %llu is less than the copy unit of %llu bytes",
                         (unsigned long long)o->max_chunk, (unsigned long long)b->granule);
    r = make_work(b, pace);
    if (r == 0)
        r = make_workers(b, dirty = dirty_bytes(b->todo, pace));
    if (r == 0 && o->bitmap)
        r = dirty_bitmap_freeze(o->bitmap);
    if (r < 0)
        return tide_fail(err, r, "no memory for job '%s'", o->job.id);
    atomic_store(&b->job.total, o->sync == BACKUP_NONE ? 0 : dirty);
    b->hook.before_write = backup_before_write;
    node_hook_add(o->source, &b->hook);
    b->hooked = true;
    return 0;
}

int backup_new(struct jobs *js, const struct backup_options *o, struct bitmap_pace *pace,
               struct job **out, struct tide_error *err)
{
    struct backup *b = mem_zalloc(sizeof *b);
    if (!b)
        return tide_fail(err, -ENOMEM, "no memory for job '%s'", o->job.id ? o->job.id : "");
    b->opts = *o;
    b->graph = jobs_graph(js);
    TAILQ_INIT(&b->claims);
    TAILQ_INIT(&b->spill);
    TAILQ_INIT(&b->starving);
    int r = job_register(&b->job, js, &backup_ops, &o->job, err);
    if (r < 0) {
        mem_free(b);
        return r;
    }
    b->opts.job.id = b->job.id;
    r = prepare(b, pace, err);
    if (r < 0) {
        free_parts(b);
        job_drop(&b->job);
        mem_free(b);
        return r;
    }
    *out = &b->job;
    return 0;
}

static void unhook(struct backup *b)
{
    assert(node_is_quiesced(b->opts.source, QUIESCE_WRITES));
    node_hook_remove(b->opts.source, &b->hook);
    b->hooked = false;
}

void backup_unwind(struct job *j)
{
    struct backup *b = (struct backup *)j;
    unhook(b);
    if (b->opts.bitmap)
        dirty_bitmap_reclaim(b->opts.bitmap, NULL); /* the successor is empty */
    b->opts.bitmap = NULL;
}

void backup_drop(struct job *j)
{
    struct backup *b = (struct backup *)j;
    free_parts(b);
    job_drop(j);
    mem_free(b);
}

/* ------------------------------------------------------------------ running */

/* A target without a single allocated byte need not be told about zeroes. */
static co_fn void look_at_target(struct backup *b)
{
    struct extent e;
    uint64_t off = 0;
    root_enter(b->spill_root);
    while (off < b->size && node_extent(b->opts.target, off, b->size - off, &e) == 0 && e.zero)
        off += e.len;
    root_leave(b->spill_root);
    b->target_is_zero = off >= b->size;
}

/* Its end does not wait for requests that a throttle holds back. */
static void hurry(struct backup *b)
{
    if (b->unit_root)
        root_hurry(b->unit_root);
    if (b->spill_root)
        root_hurry(b->spill_root);
}

static void wait_for_workers(struct backup *b)
{
    while (atomic_load(&b->n_running)) {
        io_event_wait(&b->job.kick, IO_FOREVER);
        if (backup_stopping(b))
            hurry(b);
        unsigned parked = atomic_load(&b->n_parked), running = atomic_load(&b->n_running);
        bool still = job_wants_pause(&b->job) && parked + 1 >= running;
        job_set_parked(&b->job, still);
    }
}

/* n_running counts all of them before the first one starts: a spiller that runs ahead on its loop
 * and sees no worker would take the work for done, and what guest writes keep would never be
 * written. */
static int start_workers(struct backup *b, struct loop *l)
{
    atomic_store(&b->n_running, b->n_workers + 1 + (b->maybe_data != NULL));
    int r = loop_spawn(l, backup_spiller, backup_spiller_of(b));
    if (r < 0)
        return r;
    if (b->maybe_data && loop_spawn(l, backup_scout, &b->worker[b->n_workers + 1]) < 0)
        atomic_fetch_sub(&b->n_running, 1); /* holes are read then */
    for (unsigned i = 0; i < b->n_workers; i++) {
        r = loop_spawn(l, backup_worker, &b->worker[i]);
        if (r < 0) {
            atomic_fetch_sub(&b->n_running, b->n_workers - i);
            backup_break(b, r, "starting workers");
            break;
        }
    }
    return 0;
}

static co_fn int flush_target(struct backup *b)
{
    root_enter(b->spill_root);
    int r = node_flush(b->opts.target);
    root_leave(b->spill_root);
    if (r < 0)
        job_fail(&b->job, "flushing target '%s': %s", node_name(b->opts.target), tide_strerror(-r));
    return r;
}

static co_fn int backup_run(struct job *j)
{
    struct backup *b = (struct backup *)j;
    root_open(b->spill_root);
    root_open(b->unit_root);
    look_at_target(b);
    struct loop *l = io_settle(graph_io(b->graph));
    int r = start_workers(b, l);
    if (r == 0)
        wait_for_workers(b);
    loop_unsettle(l);
    if (r < 0)
        return r;
    r = atomic_load(&b->failure);
    if (r == 0 && job_cancelled(j))
        r = -ECANCELED;
    assert(r < 0 || TAILQ_EMPTY(&b->spill));
    bool keeps_part = b->opts.bitmap && b->opts.bitmap_mode == BACKUP_ALWAYS;
    if (r == 0 || keeps_part) {
        int flushed = flush_target(b);
        /* Nothing is known to be there. Guests may be inside the hook still: marked, not replaced.
         */
        if (flushed < 0)
            bitmap_mark(b->undone, 0, UINT64_MAX, graph_retired(b->graph));
        r = r < 0 ? r : flushed;
    }
    spin_lock(&b->lock);
    uint64_t n_waits = b->n_waits;
    spin_unlock(&b->lock);
    if (n_waits)
        log_info("backup", "job '%s': %llu guest writes waited for memory", j->id,
                 (unsigned long long)n_waits);
    return r;
}

static void backup_kick(struct job *j)
{
    struct backup *b = (struct backup *)j;
    if (job_cancelled(j))
        hurry(b);
    if (b->worker)
        backup_kick_all(b);
    backup_wake_starving(b);
    backup_kick_main(b);
}

/* ------------------------------------------------------------------ the end */

static co_fn void backup_commit(struct job *j, struct bitmap_pace *pace)
{
    struct backup *b = (struct backup *)j;
    unhook(b);
    if (!b->opts.bitmap)
        return;
    if (b->opts.bitmap_mode == BACKUP_NEVER)
        dirty_bitmap_reclaim(b->opts.bitmap, pace);
    else
        dirty_bitmap_abdicate(b->opts.bitmap, &b->was);
}

static co_fn void backup_abort(struct job *j, struct bitmap_pace *pace)
{
    struct backup *b = (struct backup *)j;
    struct dirty_bitmap *bm = b->opts.bitmap;
    unhook(b);
    if (!bm)
        return;
    if (b->opts.bitmap_mode != BACKUP_ALWAYS) {
        dirty_bitmap_reclaim(bm, pace);
        return;
    }
    dirty_bitmap_abdicate(bm, &b->was);
    if (bitmap_merge(bm->bits, b->undone, pace) < 0)
        bitmap_mark(bm->bits, 0, UINT64_MAX, graph_retired(b->graph));
}

/* After an abort with mode always the bits that fold back hold `undone`, too, rounded to the copy's
 * granules: more than there was, never less. */
static co_fn void backup_fold_back(struct job *j, struct bitmap_pace *pace)
{
    struct backup *b = (struct backup *)j;
    if (!b->was.bits)
        return;
    dirty_bitmap_freeze_again(b->opts.bitmap, &b->was);
    dirty_bitmap_reclaim(b->opts.bitmap, pace);
}

static unsigned backup_names(struct job *j, struct store_name *names)
{
    struct backup *b = (struct backup *)j;
    if (!b->opts.bitmap)
        return 0;
    const char *node = node_name(b->opts.source), *name = b->opts.bitmap->name;
    names[0] = (struct store_name){STORE_BITMAP_BITS, node, name};
    names[1] = (struct store_name){STORE_BITMAP_STATE, node, name};
    return 2;
}

static co_fn void backup_clean(struct job *j)
{
    struct backup *b = (struct backup *)j;
    io_grace(graph_io(b->graph)); /* a worker's last act was to tell us */
    while (!TAILQ_EMPTY(&b->spill)) {
        struct kept *k = TAILQ_FIRST(&b->spill);
        TAILQ_REMOVE(&b->spill, k, link);
        io_buf_put(k->buf, k->len);
        mem_free(k);
    }
    free_parts(b);
    if (b->opts.owns_target)
        graph_retire(b->opts.target);
}

static unsigned backup_nodes(struct job *j, struct node **nodes)
{
    struct backup *b = (struct backup *)j;
    nodes[0] = b->opts.source;
    nodes[1] = b->opts.target;
    return 2;
}

static const struct job_ops backup_ops = {
    .type = "backup",
    .run = backup_run,
    .kick = backup_kick,
    .commit = backup_commit,
    .abort = backup_abort,
    .fold_back = backup_fold_back,
    .names = backup_names,
    .clean = backup_clean,
    .nodes = backup_nodes,
};
