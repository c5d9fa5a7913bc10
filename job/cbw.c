/* SPDX-License-Identifier: Apache-2.0 */
/* Copy before write: what happens to a guest write while a backup runs (states: backup_int.h).
 *
 * The quick answer for a write that concerns nothing any more reads `todo` and then n_claims; who
 * claims raises n_claims first and clears `todo` after (both seq_cst), so one of the two shows it.
 * No bit of `todo` is ever set again. */
#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "base/bytes.h"
#include "base/log.h"
#include "base/mem.h"
#include "job/backup_int.h"

static struct claim *claim_at(struct backup *b, uint64_t off, uint64_t end)
{
    struct claim *c;
    TAILQ_FOREACH (c, &b->claims, link) {
        if (c->off < end && off < c->end)
            return c;
    }
    return NULL;
}

/* Has the old data of this granule of a worker's unit been kept? */
static bool is_kept(const struct claim *c, uint64_t off)
{
    struct kept *k;
    TAILQ_FOREACH (k, &c->kept, link) {
        if (k->off == off)
            return true;
    }
    return false;
}

void backup_claim_end(struct backup *b, struct claim *c)
{
    spin_lock(&b->lock);
    bool waited = !c->by_guest && !TAILQ_EMPTY(&c->kept);
    TAILQ_REMOVE(&b->claims, c, link);
    if (waited)
        TAILQ_CONCAT(&b->spill, &c->kept, link);
    co_queue_wake_all(&b->claim_ended);
    atomic_fetch_sub(&b->n_claims, 1);
    spin_unlock(&b->lock);
    if (waited || c->by_guest || backup_stopping(b))
        io_event_set(&backup_spiller_of(b)->kick);
}

void backup_break(struct backup *b, int error, const char *why)
{
    int none = 0;
    if (atomic_compare_exchange_strong(&b->failure, &none, error ? error : -EIO)) {
        log_warn("backup", "job '%s': %s: %s; guests go on", b->job.id, why, tide_strerror(-error));
        atomic_store(&b->failed, true);
        backup_kick_all(b);
        backup_wake_starving(b);
        backup_kick_main(b);
    }
}

void backup_wake_starving(struct backup *b)
{
    struct starving *s;
    spin_lock(&b->lock);
    TAILQ_FOREACH (s, &b->starving, link)
        io_event_set(&s->event);
    spin_unlock(&b->lock);
}

/* Room for one granule of old data, first come, first served. `deadline` is that of the whole guest
 * write, 0 until it waits for the first time. False: none in time, or the job is about to end. */
static co_fn bool get_room(struct backup *b, uint64_t *deadline)
{
    struct starving me = {.event = IO_EVENT_INIT};
    spin_lock(&b->lock);
    if (TAILQ_EMPTY(&b->starving) && b->spill_bytes + b->granule <= BACKUP_SPILL_MAX) {
        b->spill_bytes += b->granule;
        spin_unlock(&b->lock);
        return true;
    }
    if (!*deadline) {
        *deadline = io_now(graph_io(b->graph)) + BACKUP_SPILL_WAIT;
        b->n_waits++;
    }
    TAILQ_INSERT_TAIL(&b->starving, &me, link);
    int r = 0;
    while (!me.granted && r == 0 && !backup_stopping(b)) {
        spin_unlock(&b->lock);
        r = io_event_wait(&me.event, *deadline);
        spin_lock(&b->lock);
    }
    if (!me.granted)
        TAILQ_REMOVE(&b->starving, &me, link);
    spin_unlock(&b->lock);
    return me.granted;
}

/* Who has waited longest gets it: nobody who comes now may take it away. */
void backup_give_room(struct backup *b)
{
    struct starving *s;
    spin_lock(&b->lock);
    b->spill_bytes -= b->granule;
    while ((s = TAILQ_FIRST(&b->starving)) && b->spill_bytes + b->granule <= BACKUP_SPILL_MAX) {
        TAILQ_REMOVE(&b->starving, s, link);
        b->spill_bytes += b->granule;
        s->granted = true;
        io_event_set(&s->event);
    }
    spin_unlock(&b->lock);
}

/* Read the old data of [off, end) into memory; the claim `mine` keeps other guest writes away. */
static co_fn void keep(struct backup *b, struct claim *mine, struct claim *after,
                       uint64_t *deadline)
{
    uint64_t off = mine->off, len = mine->end - mine->off;
    struct kept *k = NULL;
    int r = -EAGAIN;
    if (get_room(b, deadline)) {
        k = mem_zalloc(sizeof *k);
        if (k)
            k->buf = io_buf_get(len);
        r = k && k->buf ? 0 : -ENOMEM;
        if (r == 0) {
            struct iovec one = {k->buf, len};
            r = node_preadv(b->opts.source, &one, 1, off, len);
        }
        if (r < 0)
            backup_give_room(b);
    }
    if (r == 0) {
        *k = (struct kept){.off = off, .len = len, .buf = k->buf, .over = after != NULL};
        spin_lock(&b->lock);
        /* The worker may have ended while we read; then nothing has to be waited for. Its claim is
         * known by what it covers: at its address there may be another one by now. */
        struct claim *c;
        TAILQ_FOREACH (c, &b->claims, link) {
            if (!c->by_guest && c->off <= off && off < c->end)
                break;
        }
        TAILQ_INSERT_TAIL(c ? &c->kept : &b->spill, k, link);
        spin_unlock(&b->lock);
        io_event_set(&backup_spiller_of(b)->kick);
        return;
    }
    if (k && k->buf)
        io_buf_put(k->buf, len);
    mem_free(k);
    if (backup_stopping(b))
        return;
    backup_break(b, r == -EAGAIN ? -ENOSPC : r,
                 r == -EAGAIN ? "no memory left for old data"
                              : "reading old data for a guest write");
}

/* One granule, before a guest write touches it. */
static co_fn void save_granule(struct backup *b, uint64_t off, uint64_t end, uint64_t *deadline)
{
    struct claim mine = {.off = off, .end = end, .by_guest = true};
    struct claim *c;
    spin_lock(&b->lock);
    while ((c = claim_at(b, off, end)) && (c->by_guest || c->ending))
        co_queue_wait(&b->claim_ended, &b->lock);
    bool mine_to_do = c ? !is_kept(c, off) : bitmap_test(b->todo, off);
    if (mine_to_do) {
        atomic_fetch_add(&b->n_claims, 1);
        TAILQ_INSERT_HEAD(&b->claims, &mine,
                          link); /* before a worker's: claim_at() finds it first */
    }
    spin_unlock(&b->lock);
    if (!mine_to_do)
        return;
    /* The claim keeps others away, so the bit may be cleared outside the lock. */
    bool hole = !c && b->target_is_zero && b->maybe_data && !bitmap_test(b->maybe_data, off);
    if (!c && bitmap_unmark(b->todo, off, end - off, graph_retired(b->graph)) < 0)
        backup_break(b, -ENOMEM, "taking a block for a guest write");
    else if (hole)
        backup_note_copied(b, off, end - off);
    else
        keep(b, &mine, c, deadline);
    backup_claim_end(b, &mine);
}

void backup_before_write(struct node_hook *h, uint64_t off, uint64_t len)
{
    struct backup *b = (struct backup *)((char *)h - offsetof(struct backup, hook));
    uint64_t end = MIN(round_up(off + len, b->granule), b->size), deadline = 0;
    off = round_down(off, b->granule);
    while (off < end && !backup_stopping(b)) {
        uint64_t run, n;
        bool dirty = bitmap_next_dirty(b->todo, off, end, &run, &n);
        if (!atomic_load(&b->n_claims)) {
            if (!dirty)
                return;
            off = round_down(run, b->granule);
        }
        save_granule(b, off, MIN(off + b->granule, b->size), &deadline);
        off += b->granule;
    }
}
