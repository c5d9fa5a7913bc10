/* SPDX-License-Identifier: Apache-2.0 */
/* Contents of simulated files: effects, durability and locks. See sim_disk.h for the idea; names
 * are in sim_names.c, power cuts in sim_cut.c. */
#include "io/sim_disk.h"
#include "base/bytes.h"
#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>

/* ------------------------------------------------------------------ pieces */

static struct sim_piece *push_piece(struct sim_inode *ino, struct sim_piece p)
{
    if (ino->n_pieces == ino->cap_pieces) {
        ino->cap_pieces = MAX(ino->cap_pieces * 2, 8u);
        ino->pieces = sim_grow(ino->pieces, ino->cap_pieces, sizeof p);
    }
    ino->pieces[ino->n_pieces] = p;
    return &ino->pieces[ino->n_pieces++];
}

/* What the sectors of [off, end) hold now. */
static void push_data(struct sim_inode *ino, uint64_t op, uint64_t off, uint64_t end, bool of_cut)
{
    if (off == end)
        return;
    uint64_t at = off / SIM_SECTOR, n = (end - 1) / SIM_SECTOR + 1 - at;
    unsigned char *data = sim_alloc(n * SIM_SECTOR);
    store_read(&ino->now, at * SIM_SECTOR, data, n * SIM_SECTOR);
    struct sim_piece p = {.kind = PIECE_DATA, .of_cut = of_cut, .op = op, .at = at, .n = n};
    if (sim_is_zero(data, n * SIM_SECTOR)) {
        free(data);
        p.kind = PIECE_ZERO;
    } else {
        p.data = data;
    }
    push_piece(ino, p);
}

/* [off, end) was cleared: whole sectors as `kind`, the edges as the data they are now part of. */
static void push_clear(struct sim_inode *ino, uint64_t op, int kind, uint64_t off, uint64_t end,
                       bool of_cut)
{
    uint64_t first = round_up(off, SIM_SECTOR), last = round_down(end, SIM_SECTOR);
    if (first >= last) {
        push_data(ino, op, off, end, of_cut);
        return;
    }
    push_data(ino, op, off, first, of_cut);
    push_piece(ino, (struct sim_piece){.kind = kind,
                                       .of_cut = of_cut,
                                       .op = op,
                                       .at = first / SIM_SECTOR,
                                       .n = (last - first) / SIM_SECTOR});
    push_data(ino, op, last, end, of_cut);
}

static void push_size(struct sim_inode *ino, uint64_t op, uint64_t size)
{
    ino->size = size;
    push_piece(ino, (struct sim_piece){.kind = PIECE_SIZE, .of_cut = true, .op = op, .at = size});
}

/* Without the sectors [at, at+n): up to two pieces are left of `p`, which is used up. */
static void push_rest(struct sim_inode *ino, struct sim_piece p, uint64_t at, uint64_t n)
{
    uint64_t end = p.at + p.n;
    if (p.at < at) {
        struct sim_piece left = p;
        left.n = at - p.at;
        if (p.data) {
            left.data = sim_alloc(left.n * SIM_SECTOR);
            memcpy(left.data, p.data, left.n * SIM_SECTOR);
        }
        push_piece(ino, left);
    }
    if (end > at + n) {
        struct sim_piece right = p;
        right.at = at + n;
        right.n = end - right.at;
        if (p.data) {
            right.data = sim_alloc(right.n * SIM_SECTOR);
            memcpy(right.data, p.data + (right.at - p.at) * SIM_SECTOR, right.n * SIM_SECTOR);
        }
        push_piece(ino, right);
    }
    free(p.data);
}

static bool overlaps(const struct sim_piece *p, uint64_t at, uint64_t n)
{
    return p->kind != PIECE_SIZE && p->at < at + n && at < p->at + p->n;
}

/* A newer version of these sectors is on the disk: older pending ones must never come back. */
static void forget_older(struct sim_inode *ino, uint64_t at, uint64_t n)
{
    size_t first = 0, count = ino->n_pieces;
    while (first < count && !overlaps(&ino->pieces[first], at, n))
        first++;
    if (first == count)
        return;
    struct sim_piece *old = ino->pieces;
    ino->pieces = sim_grow(NULL, ino->cap_pieces, sizeof *old);
    ino->n_pieces = 0;
    for (size_t i = 0; i < count; i++) {
        if (overlaps(&old[i], at, n))
            push_rest(ino, old[i], at, n);
        else
            push_piece(ino, old[i]);
    }
    free(old);
}

static void to_disk(struct sim_inode *ino, const struct sim_piece *p)
{
    uint64_t off = p->at * SIM_SECTOR, len = p->n * SIM_SECTOR;
    switch (p->kind) {
    case PIECE_DATA:
        store_write(&ino->disk, off, p->data, len);
        break;
    case PIECE_ZERO:
        store_zero(&ino->disk, off, len);
        break;
    case PIECE_HOLE:
        store_punch(&ino->disk, off, len);
        break;
    case PIECE_SIZE:
        if (p->at < ino->disk_size)
            store_punch(&ino->disk, p->at, ino->disk_size - p->at);
        ino->disk_size = p->at;
        return;
    }
}

enum fate { STAYS, DURABLE, LOST };

/* Sizes and cuts are kept in order by every file system's journal: whoever syncs anything syncs
 * them all. */
static bool is_meta(const struct sim_piece *p)
{
    return p->kind == PIECE_SIZE || p->of_cut;
}

static void settle(struct sim_inode *ino, const enum fate *fates)
{
    struct sim_piece *old = ino->pieces;
    size_t n = ino->n_pieces;
    ino->pieces = NULL;
    ino->n_pieces = ino->cap_pieces = 0;
    for (size_t i = 0; i < n; i++) {
        if (fates[i] == STAYS) {
            push_piece(ino, old[i]);
            continue;
        }
        if (fates[i] == DURABLE) {
            to_disk(ino, &old[i]);
            if (old[i].kind != PIECE_SIZE)
                forget_older(ino, old[i].at, old[i].n);
        }
        free(old[i].data);
    }
    free(old);
    ino->disk_mtime_ns = ino->mtime_ns;
}

void inode_sync(struct sim_inode *ino, uint64_t upto, struct sim_rng *rng)
{
    enum fate *fates = sim_alloc(ino->n_pieces * sizeof *fates);
    uint64_t chance = sim_rand(rng);
    for (size_t i = 0; i < ino->n_pieces; i++) {
        const struct sim_piece *p = &ino->pieces[i];
        struct sim_rng coin = {chance ^ p->op};
        bool must = (p->done && p->done <= upto) || is_meta(p);
        fates[i] = must || sim_percent(&coin, 50) ? DURABLE : STAYS;
    }
    settle(ino, fates);
    free(fates);
}

void inode_sync_op(struct sim_inode *ino, uint64_t op)
{
    enum fate *fates = sim_alloc(ino->n_pieces * sizeof *fates);
    for (size_t i = 0; i < ino->n_pieces; i++)
        fates[i] = ino->pieces[i].op == op || is_meta(&ino->pieces[i]) ? DURABLE : STAYS;
    settle(ino, fates);
    free(fates);
}

/* As Linux does it: pages that could not be written are marked clean, so nobody tries again.
 * Readers see them until memory gets short. */
void inode_lose(struct sim_inode *ino, uint64_t upto, struct sim_rng *rng)
{
    enum fate *fates = sim_alloc(ino->n_pieces * sizeof *fates);
    bool evict = sim_percent(rng, 50), lost_some = false;
    size_t last = 0;
    for (size_t i = 0; i < ino->n_pieces; i++) {
        const struct sim_piece *p = &ino->pieces[i];
        if (is_meta(p) || !p->done || p->done > upto) {
            fates[i] = STAYS;
            continue;
        }
        fates[i] = sim_percent(rng, 50) ? DURABLE : LOST;
        lost_some |= fates[i] == LOST;
        last = i;
    }
    if (!lost_some && ino->n_pieces && fates[last] == DURABLE)
        fates[last] = LOST;
    settle(ino, fates);
    free(fates);
    ino->lost_syncs++;
    if (!evict || ino->n_pieces)
        return;
    store_fini(&ino->now);
    store_copy(&ino->now, &ino->disk);
}

void inode_done(struct sim_world *w, struct sim_inode *ino, uint64_t op)
{
    uint64_t stamp = ++w->n_stamps;
    for (size_t i = ino->n_pieces; i-- > 0 && ino->pieces[i].op >= op;) /* sorted by op */
        if (ino->pieces[i].op == op)
            ino->pieces[i].done = stamp;
}

void inode_done_all(struct sim_world *w, struct sim_inode *ino)
{
    uint64_t stamp = ++w->n_stamps;
    for (size_t i = 0; i < ino->n_pieces; i++)
        if (!ino->pieces[i].done)
            ino->pieces[i].done = stamp;
}

/* ------------------------------------------------------------------ effects */

static uint64_t used_chunks(const struct sim_world *w)
{
    uint64_t n = 0;
    for (const struct sim_inode *i = w->inodes; i; i = i->next)
        n += i->now.n_chunks;
    return n;
}

uint64_t sim_disk_used(const struct sim_world *w)
{
    return used_chunks(w) * SIM_CHUNK;
}

void sim_disk_limit(struct sim_world *w, uint64_t bytes)
{
    w->limit = bytes;
}

static bool disk_full(const struct sim_world *w, const struct sim_inode *ino, uint64_t off,
                      uint64_t len)
{
    if (w->limit == UINT64_MAX)
        return false;
    uint64_t missing = store_missing(&ino->now, off, len);
    return missing && used_chunks(w) + missing > w->limit / SIM_CHUNK;
}

static void touched(struct sim_world *w, struct sim_inode *ino)
{
    ino->mtime_ns = w->wall_ns;
}

int64_t inode_write(struct sim_world *w, struct sim_inode *ino, const void *buf, size_t len,
                    uint64_t off)
{
    if (off > SIM_MAX_SIZE || len > SIM_MAX_SIZE - off)
        return -EFBIG;
    if (disk_full(w, ino, off, len))
        return -ENOSPC;
    uint64_t op = ++w->n_ops;
    if (len == 0)
        return (int64_t)op;
    store_write(&ino->now, off, buf, len);
    push_data(ino, op, off, off + len, false);
    if (off + len > ino->size)
        push_size(ino, op, off + len);
    touched(w, ino);
    return (int64_t)op;
}

int64_t inode_zero(struct sim_world *w, struct sim_inode *ino, uint64_t off, uint64_t len,
                   enum io_alloc how)
{
    uint64_t end = len > ino->size - MIN(off, ino->size) ? ino->size : off + len;
    if (off < end && how == IO_ZERO_KEEP && disk_full(w, ino, off, end - off))
        return -ENOSPC;
    uint64_t op = ++w->n_ops;
    if (off >= end)
        return (int64_t)op;
    if (how == IO_ZERO_KEEP)
        store_zero(&ino->now, off, end - off);
    else
        store_punch(&ino->now, off, end - off);
    push_clear(ino, op, how == IO_ZERO_KEEP ? PIECE_ZERO : PIECE_HOLE, off, end, false);
    touched(w, ino);
    return (int64_t)op;
}

int64_t inode_truncate(struct sim_world *w, struct sim_inode *ino, uint64_t size)
{
    if (size > SIM_MAX_SIZE)
        return -EFBIG;
    uint64_t op = ++w->n_ops, old = ino->size;
    if (size == old)
        return (int64_t)op;
    push_size(ino, op, size);
    if (size < old) {
        store_punch(&ino->now, size, old - size);
        push_clear(ino, op, PIECE_HOLE, size, round_up(old, SIM_SECTOR), true);
    }
    touched(w, ino);
    return (int64_t)op;
}

size_t inode_read(const struct sim_inode *ino, void *buf, size_t len, uint64_t off)
{
    if (off >= ino->size)
        return 0;
    len = MIN(len, ino->size - off);
    store_read(&ino->now, off, buf, len);
    return len;
}

/* ------------------------------------------------------------------ locks */

static void push_lock(struct sim_inode *ino, struct sim_lock l)
{
    if (ino->n_locks == ino->cap_locks) {
        ino->cap_locks = MAX(ino->cap_locks * 2, 8u);
        ino->locks = sim_grow(ino->locks, ino->cap_locks, sizeof l);
    }
    ino->locks[ino->n_locks++] = l;
}

/* A lock replaces what its owner had in the range, as fcntl() does it. */
static void unlock_range(struct sim_inode *ino, uint64_t owner, uint64_t off, uint64_t end)
{
    struct sim_lock *old = ino->locks;
    size_t n = ino->n_locks;
    ino->locks = NULL;
    ino->n_locks = ino->cap_locks = 0;
    for (size_t i = 0; i < n; i++) {
        struct sim_lock l = old[i];
        if (l.owner != owner || l.off >= end || off >= l.end) {
            push_lock(ino, l);
            continue;
        }
        if (l.off < off)
            push_lock(ino, (struct sim_lock){owner, l.off, off, l.exclusive});
        if (l.end > end)
            push_lock(ino, (struct sim_lock){owner, end, l.end, l.exclusive});
    }
    free(old);
}

int inode_lock(struct sim_inode *ino, uint64_t owner, uint64_t off, uint64_t len, enum io_lock how,
               bool test)
{
    uint64_t end = len == 0 || len > UINT64_MAX - off ? UINT64_MAX : off + len;
    for (size_t i = 0; how != IO_UNLOCK && i < ino->n_locks; i++) {
        const struct sim_lock *l = &ino->locks[i];
        if (l->owner != owner && l->off < end && off < l->end &&
            (l->exclusive || how == IO_LOCK_EXCLUSIVE))
            return -EAGAIN;
    }
    if (test)
        return 0;
    unlock_range(ino, owner, off, end);
    if (how != IO_UNLOCK)
        push_lock(ino, (struct sim_lock){owner, off, end, how == IO_LOCK_EXCLUSIVE});
    return 0;
}
