/* SPDX-License-Identifier: Apache-2.0 */
/* The workers of a backup: copiers take units off `todo`, the spiller writes kept data (states:
 * backup_int.h). All on one data loop, in coroutines. */
#include <assert.h>
#include <errno.h>
#include <string.h>

#include "base/bytes.h"
#include "base/log.h"
#include "base/mem.h"
#include "job/backup_int.h"

#define HOLE_LOOK (8 * GIB) /* how far ahead a hole is asked for */
#define SMALL_UNIT (256 * KIB)
#define SCOUT_TURN 64u          /* extents that the scout looks at before others have their turn */
#define IGNORE_PAUSE 100000000u /* between two tries of what on-error=ignore repeats */

bool backup_stopping(struct backup *b)
{
    return job_cancelled(&b->job) || atomic_load(&b->failed);
}

void backup_kick_all(struct backup *b)
{
    for (unsigned i = 0; i < b->n_workers + 2; i++)
        io_event_set(&b->worker[i].kick);
}

void backup_kick_main(struct backup *b)
{
    io_event_set(&b->job.kick);
}

/* ------------------------------------------------------------------ errors */

struct error_call {
    struct backup *b;
    bool read;
    int error;
    enum job_on_error action;
};

static void ask_policy(void *arg)
{
    struct error_call *c = arg;
    struct backup *b = c->b;
    enum job_on_error policy = c->read ? b->opts.on_source_error : b->opts.on_target_error;
    c->action = job_io_error(&b->job, policy, c->read, c->error);
    if (c->action == JOB_ERROR_REPORT)
        job_fail(&b->job, "%s", tide_strerror(c->error));
}

/* Tell the control loop; do as it says. */
static co_fn void io_failed(struct worker *w, bool read, int error)
{
    struct backup *b = w->backup;
    struct error_call c = {b, read, -error, JOB_ERROR_REPORT};
    if (backup_stopping(b))
        return;
    loop_call(io_loop(graph_io(b->graph), 0), ask_policy, &c);
    if (c.action == JOB_ERROR_REPORT) {
        int none = 0;
        atomic_compare_exchange_strong(&b->failure, &none, error);
        atomic_store(&b->failed, true);
        backup_wake_starving(b);
        backup_kick_all(b);
        backup_kick_main(b);
    } else if (c.action == JOB_ERROR_IGNORE) {
        io_event_wait(&w->kick, io_now(graph_io(b->graph)) + IGNORE_PAUSE);
    }
}

/* ------------------------------------------------------------------ pausing and speed */

static co_fn void park_while_paused(struct worker *w)
{
    struct backup *b = w->backup;
    if (!job_wants_pause(&b->job) || backup_stopping(b))
        return;
    atomic_fetch_add(&b->n_parked, 1);
    backup_kick_main(b);
    while (job_wants_pause(&b->job) && !backup_stopping(b))
        io_event_wait(&w->kick, IO_FOREVER);
    atomic_fetch_sub(&b->n_parked, 1);
    backup_kick_main(b);
}

/* Wait until the rate limit lets the next unit go. */
static co_fn void wait_for_budget(struct worker *w)
{
    struct backup *b = w->backup;
    while (atomic_load(&b->job.speed) && !backup_stopping(b) && !job_wants_pause(&b->job)) {
        spin_lock(&b->lock);
        if (b->budget_speed != atomic_load(&b->job.speed)) { /* a new speed owes nothing */
            b->budget_speed = atomic_load(&b->job.speed);
            b->budget_at = 0;
        }
        uint64_t at = b->budget_at;
        spin_unlock(&b->lock);
        if (at <= io_now(graph_io(b->graph)))
            return;
        io_event_wait(&w->kick, at);
    }
}

/* Caller holds the lock. */
static void spend_budget(struct backup *b, uint64_t len)
{
    uint64_t speed = atomic_load(&b->job.speed), now = io_now(graph_io(b->graph));
    if (speed)
        b->budget_at = MAX(b->budget_at, now) + (uint64_t)((double)len * 1e9 / (double)speed);
}

/* ------------------------------------------------------------------ claims */

/* A unit is at most what an eighth of a second may copy. */
static uint64_t unit_size(struct backup *b)
{
    uint64_t speed = atomic_load(&b->job.speed);
    uint64_t most = speed ? MAX(round_down(speed / 8, b->granule), b->granule) : b->chunk;
    return MIN(most, b->chunk);
}

/* The first run of `todo` in [from, end) that no guest write is just taking away: a guest claims
 * first and clears the bit afterwards. Caller holds the lock. */
static bool free_run(struct backup *b, uint64_t from, uint64_t end, uint64_t *off, uint64_t *len)
{
    struct claim *c;
    while (bitmap_next_dirty(b->todo, from, end, off, len)) {
        from = *off;
        TAILQ_FOREACH (c, &b->claims, link) {
            if (c->off <= *off && *off < c->end)
                from = c->end;
            else if (*off < c->off && c->off < *off + *len)
                *len = c->off - *off;
        }
        if (from == *off)
            return true;
    }
    return false;
}

/* How many bytes from `off` are known to be zero, in whole granules. Caller holds the lock. */
static uint64_t known_hole(const struct backup *b, uint64_t off)
{
    if (off < b->hole_off || off >= b->hole_end || atomic_load(&b->job.speed))
        return 0;
    return MIN(round_down(b->hole_end - off, b->granule), BACKUP_HOLE_MAX);
}

static void note_hole(struct backup *b, uint64_t off, uint64_t end)
{
    spin_lock(&b->lock);
    b->hole_off = off;
    b->hole_end = end;
    spin_unlock(&b->lock);
}

enum take { TAKE_ONE, TAKE_LATER, TAKE_NONE };

/* The next unit of work. LATER: another worker has used up the budget. */
static enum take take_unit(struct backup *b, struct claim *c)
{
    uint64_t off, len;
    spin_lock(&b->lock);
    if (atomic_load(&b->job.speed) && b->budget_at > io_now(graph_io(b->graph))) {
        spin_unlock(&b->lock);
        return TAKE_LATER;
    }
    bool found =
        free_run(b, b->cursor, b->size, &off, &len) || free_run(b, 0, b->cursor, &off, &len);
    if (found) {
        uint64_t hole = known_hole(b, off);
        *c = (struct claim){.off = off, .hole = hole > 0};
        c->end = off + MIN(len, hole ? hole : unit_size(b));
        TAILQ_INIT(&c->kept);
        b->cursor = c->end;
        atomic_fetch_add(&b->n_claims, 1);
        TAILQ_INSERT_TAIL(&b->claims, c, link);
        spend_budget(b, c->end - c->off);
    }
    spin_unlock(&b->lock);
    if (!found)
        return TAKE_NONE;
    if (bitmap_unmark(b->todo, c->off, c->end - c->off, graph_retired(b->graph)) < 0)
        backup_break(b, -ENOMEM, "taking a block to copy");
    return TAKE_ONE;
}

/* Which granules of the unit has a guest write kept, or is one just keeping? Caller holds the lock.
 */
static void note_kept(struct backup *b, const struct claim *c, bool *kept)
{
    struct claim *g;
    struct kept *k;
    TAILQ_FOREACH (g, &b->claims, link) {
        if (g->by_guest && c->off <= g->off && g->off < c->end)
            kept[(g->off - c->off) / b->granule] = true;
    }
    TAILQ_FOREACH (k, &c->kept, link)
        kept[(k->off - c->off) / b->granule] = true;
}

static void progress(struct backup *b, uint64_t len)
{
    atomic_fetch_add(&b->job.current, len);
}

void backup_note_copied(struct backup *b, uint64_t off, uint64_t len)
{
    if (bitmap_unmark(b->undone, off, len, graph_retired(b->graph)) < 0)
        log_debug("backup", "no memory to note a copied block: it counts as not copied");
    progress(b, len);
}

/* The unit is on the target. Granules whose old data a guest write has kept meanwhile are not ours
 * any more: the kept copy follows. From `ending` on guests that meet the claim wait, so that none
 * keeps a granule between our look and our note. */
static void end_unit(struct backup *b, struct claim *c)
{
    bool kept[BACKUP_HOLE_MAX / BACKUP_GRANULE_MIN] = {0};
    unsigned n = 0;
    spin_lock(&b->lock);
    c->ending = true;
    note_kept(b, c, kept);
    spin_unlock(&b->lock);
    for (uint64_t off = c->off; off < c->end; off += b->granule) {
        if (!kept[n++])
            backup_note_copied(b, off, MIN(b->granule, c->end - off));
    }
    backup_claim_end(b, c);
}

/* ------------------------------------------------------------------ copying */

static bool all_zero(const char *p, uint64_t len)
{
    return !p[0] && !memcmp(p, p + 1, len - 1);
}

/* `blank`: nobody has written there since the job began. */
static co_fn int write_target(struct backup *b, void *buf, uint64_t off, uint64_t len, bool blank)
{
    struct iovec one = {buf, len};
    if (!all_zero(buf, len))
        return node_pwritev(b->opts.target, &one, 1, off, len, 0);
    if (b->target_is_zero && blank)
        return 0;
    return node_zero(b->opts.target, off, len, NODE_UNMAP);
}

/* *read tells which side failed. */
/* Scattered dirty blocks are read and written here and now: asking where data lies and offloading
 * go to the pool, which costs more than copying so little. Zeroes are seen in the buffer. */
static bool is_small(const struct backup *b, const struct claim *c)
{
    return b->opts.sync == BACKUP_BITMAP && c->end - c->off <= SMALL_UNIT;
}

static co_fn int copy_data(struct backup *b, uint64_t off, uint64_t len, bool offload, bool *read)
{
    *read = false;
    if (offload && b->opts.copy_range && !atomic_load(&b->no_offload)) {
        if (node_copy_range(b->opts.source, off, b->opts.target, off, len) == 0)
            return 0;
        atomic_store(&b->no_offload, true); /* cannot, or failed: the plain way tells which side */
    }
    void *buf = io_buf_get(len);
    if (!buf)
        return -ENOMEM;
    struct iovec one = {buf, len};
    int r = node_preadv(b->opts.source, &one, 1, off, len);
    *read = r < 0;
    if (r == 0)
        r = write_target(b, buf, off, len, true);
    io_buf_put(buf, len);
    return r;
}

static co_fn int copy_hole(struct backup *b, uint64_t off, uint64_t len)
{
    return b->target_is_zero ? 0 : node_zero(b->opts.target, off, len, NODE_UNMAP);
}

static co_fn int copy_unit(struct backup *b, const struct claim *c, bool *read)
{
    *read = false;
    if (c->hole)
        return copy_hole(b, c->off, c->end - c->off);
    if (is_small(b, c))
        return copy_data(b, c->off, c->end - c->off, false, read);
    for (uint64_t off = c->off; off < c->end;) {
        struct extent e;
        int r = node_extent(b->opts.source, off, MIN(b->size - off, HOLE_LOOK), &e);
        *read = true;
        if (r < 0)
            return r;
        uint64_t len = MIN(e.len, c->end - off);
        if (e.zero) {
            *read = false;
            if (e.len > len)
                note_hole(b, off, off + e.len);
            r = copy_hole(b, off, len);
        } else {
            r = copy_data(b, off, len, true, read);
        }
        if (r < 0)
            return r;
        off += len;
    }
    return 0;
}

/* Copy a unit, again and again while the error policy says so. It stays claimed all the while: a
 * granule that went back to `todo` could be kept by a guest write and copied, newer, after that.
 * Admitted on call and on return. */
static co_fn void do_unit(struct worker *w, struct claim *c)
{
    struct backup *b = w->backup;
    bool read = false;
    int r;
    while ((r = copy_unit(b, c, &read)) < 0) {
        root_leave(b->unit_root);
        io_failed(w, read, r);
        park_while_paused(w);
        root_enter(b->unit_root);
        if (backup_stopping(b)) {
            backup_claim_end(b, c);
            return;
        }
    }
    end_unit(b, c);
}

static void worker_ends(struct backup *b)
{
    atomic_fetch_sub(&b->n_running, 1);
    io_event_set(&backup_spiller_of(b)->kick);
    backup_kick_main(b);
}

void backup_worker(void *arg)
{
    struct worker *w = arg;
    struct backup *b = w->backup;
    while (!backup_stopping(b)) {
        struct claim c;
        park_while_paused(w);
        wait_for_budget(w);
        if (backup_stopping(b) || job_wants_pause(&b->job))
            continue;
        root_enter(b->unit_root);
        enum take t = take_unit(b, &c);
        if (t == TAKE_ONE)
            do_unit(w, &c);
        root_leave(b->unit_root);
        if (t == TAKE_NONE)
            break;
        loop_pause();
    }
    worker_ends(b);
}

/* ------------------------------------------------------------------ the scout */

/* Takes the whole granules of [off, end) out. */
static void note_holes(struct backup *b, uint64_t off, uint64_t end)
{
    uint64_t from = round_up(off, b->granule);
    uint64_t to = end == b->size ? end : round_down(end, b->granule);
    if (from < to && bitmap_unmark(b->maybe_data, from, to - from, graph_retired(b->graph)) < 0)
        log_debug("backup", "no memory to note a hole: it is read as data");
}

/* Looks where the source has holes, ahead of the workers: a guest write that is the first to a hole
 * need not read it, nor keep anything, if the target is blank. Errors are the workers' business. */
void backup_scout(void *arg)
{
    struct worker *w = arg;
    struct backup *b = w->backup;
    uint64_t off = 0, len;
    int r = 0;
    /* What is no longer to be done is passed over: guests that write at random make a thousand
     * small holes of one. Files are looked at many extents at a time while nobody else has run
     * between. */
    for (unsigned n = 1; r == 0 && bitmap_next_dirty(b->todo, off, b->size, &off, &len); n++) {
        struct extent e;
        park_while_paused(w);
        if (backup_stopping(b))
            break;
        root_enter(b->unit_root);
        r = node_extent(b->opts.source, off, b->size - off, &e);
        root_leave(b->unit_root);
        if (r == 0 && e.zero)
            note_holes(b, off, off + e.len);
        off += e.len;
        if (n % SCOUT_TURN == 0)
            loop_pause();
    }
    worker_ends(b);
}

/* ------------------------------------------------------------------ kept data */

static struct kept *take_kept(struct backup *b)
{
    spin_lock(&b->lock);
    struct kept *k = TAILQ_FIRST(&b->spill);
    spin_unlock(&b->lock);
    return k; /* stays in the list: until it is written it is the only copy */
}

static void drop_kept(struct backup *b, struct kept *k)
{
    spin_lock(&b->lock);
    TAILQ_REMOVE(&b->spill, k, link);
    spin_unlock(&b->lock);
    io_buf_put(k->buf, k->len);
    mem_free(k);
    backup_give_room(b);
}

static co_fn void spill_one(struct worker *w, struct kept *k)
{
    struct backup *b = w->backup;
    root_enter(b->spill_root);
    int r = write_target(b, k->buf, k->off, k->len, !k->over);
    if (r == 0 && bitmap_unmark(b->undone, k->off, k->len, graph_retired(b->graph)) < 0)
        log_debug("backup", "no memory to note a copied block: it counts as not copied");
    root_leave(b->spill_root);
    if (r == 0) {
        progress(b, k->len);
        drop_kept(b, k);
        return;
    }
    io_failed(w, false, r);
    while (job_wants_pause(&b->job) && !backup_stopping(b))
        io_event_wait(&w->kick, IO_FOREVER);
}

static bool spiller_is_done(struct backup *b)
{
    if (backup_stopping(b))
        return true;
    if (b->opts.sync == BACKUP_NONE || atomic_load(&b->n_running) > 1)
        return false;
    spin_lock(&b->lock);
    bool done = TAILQ_EMPTY(&b->spill) && TAILQ_EMPTY(&b->claims);
    spin_unlock(&b->lock);
    return done;
}

void backup_spiller(void *arg)
{
    struct worker *w = arg;
    struct backup *b = w->backup;
    while (!spiller_is_done(b)) {
        struct kept *k = take_kept(b);
        if (k)
            spill_one(w, k);
        else
            io_event_wait(&w->kick, IO_FOREVER);
    }
    atomic_fetch_sub(&b->n_running, 1);
    backup_kick_main(b);
}
