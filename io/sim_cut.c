/* SPDX-License-Identifier: Apache-2.0 */
/* Power cuts: what of the pending changes is on the disk when the machine comes back. Also the
 * faults that a test has ordered. */
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "base/bytes.h"
#include "io/sim_disk.h"
#include <assert.h>
#include <stdlib.h>

/* Per operation one decision, taken from its number, so that it is the same for all its parts. */
struct cut {
    enum sim_cut mode;
    uint64_t seed;
    uint64_t last; /* LAST: the operation; PREFIX: the first one lost */
    struct sim_rng rng;
};

static uint64_t dice(const struct cut *c, uint64_t op)
{
    struct sim_rng r = {c->seed ^ (op * 0x9e3779b97f4a7c15u)};
    return sim_rand(&r);
}

static bool op_kept(void *arg, uint64_t op)
{
    const struct cut *c = arg;
    switch (c->mode) {
    case SIM_CUT_NONE:
        return false;
    case SIM_CUT_LAST:
        return op == c->last;
    case SIM_CUT_PREFIX:
        return op < c->last;
    case SIM_CUT_WRITES:
    case SIM_CUT_SECTORS:
        return dice(c, op) & 1;
    default:
        return true;
    }
}

/* In SECTORS half of the operations are torn, so that all-or-nothing still meets torn. */
static bool op_torn(const struct cut *c, uint64_t op)
{
    return c->mode == SIM_CUT_SECTORS && (dice(c, op) & 2);
}

static void to_disk(struct sim_inode *ino, const struct sim_piece *p, uint64_t skip, uint64_t n)
{
    uint64_t off = (p->at + skip) * SIM_SECTOR, len = n * SIM_SECTOR;
    if (p->kind == PIECE_DATA)
        store_write(&ino->disk, off, p->data + skip * SIM_SECTOR, len);
    else if (p->kind == PIECE_ZERO)
        store_zero(&ino->disk, off, len);
    else
        store_punch(&ino->disk, off, len);
}

/* Each sector by its own coin; of very long clears, each of some 64 parts. */
static void to_disk_torn(struct cut *c, struct sim_inode *ino, const struct sim_piece *p)
{
    uint64_t part = p->kind == PIECE_DATA ? 1 : MAX(p->n / 64, (uint64_t)1);
    for (uint64_t skip = 0; skip < p->n; skip += part)
        if (sim_percent(&c->rng, 50))
            to_disk(ino, p, skip, MIN(part, p->n - skip));
}

/* Which sizes reached the disk. A size takes all earlier cuts along: a file system never shows
 * again what was cut off. */
static bool *choose_sizes(struct cut *c, const struct sim_inode *ino)
{
    bool *keep = sim_alloc(ino->n_pieces);
    bool later = false;
    for (size_t i = ino->n_pieces; i-- > 0;) {
        const struct sim_piece *p = &ino->pieces[i];
        if (p->kind != PIECE_SIZE)
            continue;
        uint64_t before = ino->disk_size;
        for (size_t j = i; j-- > 0;)
            if (ino->pieces[j].kind == PIECE_SIZE) {
                before = ino->pieces[j].at;
                break;
            }
        keep[i] = op_kept(c, p->op) || (later && p->at < before);
        later |= keep[i];
    }
    return keep;
}

static void cut_inode(struct cut *c, struct sim_inode *ino)
{
    bool *keep = choose_sizes(c, ino);
    uint64_t cut_op = 0; /* the truncate whose pieces are being walked, if it is kept */
    if (ino->n_pieces && sim_percent(&c->rng, 50))
        ino->disk_mtime_ns = ino->mtime_ns;
    for (size_t i = 0; i < ino->n_pieces; i++) {
        struct sim_piece *p = &ino->pieces[i];
        if (p->kind == PIECE_SIZE) {
            if (!keep[i])
                continue;
            if (p->at < ino->disk_size)
                store_punch(&ino->disk, p->at, ino->disk_size - p->at);
            ino->disk_size = p->at;
            cut_op = p->op;
        } else if (p->of_cut) {
            if (cut_op == p->op)
                to_disk(ino, p, 0, p->n);
        } else if (op_torn(c, p->op)) {
            to_disk_torn(c, ino, p);
        } else if (op_kept(c, p->op)) {
            to_disk(ino, p, 0, p->n);
        }
    }
    free(keep);
}

/* Only what lies on the disk is left of the inode. */
static void forget_pending(struct sim_inode *ino)
{
    for (size_t i = 0; i < ino->n_pieces; i++)
        free(ino->pieces[i].data);
    ino->n_pieces = 0;
    store_punch(&ino->disk, ino->disk_size, SIM_MAX_SIZE - ino->disk_size);
    store_fini(&ino->now);
    store_copy(&ino->now, &ino->disk);
    ino->size = ino->disk_size;
    ino->mtime_ns = ino->disk_mtime_ns;
    ino->lost_syncs = 0;
}

static void choose_last(struct sim_world *w, struct cut *c)
{
    uint64_t first = w->n_ops + 1, last = 0;
    for (const struct sim_inode *ino = w->inodes; ino; ino = ino->next)
        for (size_t i = 0; i < ino->n_pieces; i++) {
            first = MIN(first, ino->pieces[i].op);
            last = MAX(last, ino->pieces[i].op);
        }
    for (size_t i = 0; i < w->n_name_ops; i++) {
        first = MIN(first, w->name_ops[i].op);
        last = MAX(last, w->name_ops[i].op);
    }
    if (c->mode == SIM_CUT_PREFIX && first <= last)
        c->last = first + sim_below(&c->rng, last - first + 2);
    else
        c->last = last;
}

enum sim_cut sim_power_cut(struct sim_world *w, enum sim_cut mode, uint64_t seed)
{
    struct cut c = {.mode = mode, .rng = {seed}};
    c.seed = sim_rand(&c.rng);
    if (mode == SIM_CUT_ANY) {
        uint64_t k = SIM_CUT_NONE + sim_below(&c.rng, 7);
        c.mode = MIN(k, (uint64_t)SIM_CUT_SECTORS); /* twice as often: there is most to choose */
    }
    choose_last(w, &c);
    w->life++;
    w->wall_ns += 1000000000 + (int64_t)sim_below(&c.rng, 60000000000);
    for (struct sim_inode *ino = w->inodes; ino; ino = ino->next) {
        ino->opens = 0;
        ino->n_locks = 0;
        if (c.mode == SIM_CUT_PROCESS) {
            inode_done_all(w, ino);
            continue;
        }
        cut_inode(&c, ino);
        forget_pending(ino);
    }
    if (c.mode != SIM_CUT_PROCESS)
        disk_names_cut(w, op_kept, &c);
    disk_reap(w);
    return c.mode;
}

size_t sim_world_pending(const struct sim_world *w)
{
    size_t n = w->n_name_ops;
    for (const struct sim_inode *ino = w->inodes; ino; ino = ino->next)
        n += ino->n_pieces;
    return n;
}

uint64_t sim_world_hash(const struct sim_world *w)
{
    uint64_t h = 0;
    for (size_t i = 0; i < w->n_names; i++) {
        const struct sim_name *name = w->names[i];
        if (!name->now)
            continue;
        h = XXH3_64bits_withSeed(name->path, strlen(name->path), h);
        h = XXH3_64bits_withSeed(&name->now->mode, sizeof name->now->mode, h);
        h = store_hash(&name->now->now, name->now->size, h);
    }
    return h;
}

/* ------------------------------------------------------------------ faults */

static void add_fault(struct sim_world *w, const char *name, struct sim_fault f)
{
    assert(f.nth >= 1);
    struct sim_fault *p = sim_alloc(sizeof *p), **at = &w->faults;
    *p = f;
    if (name) {
        p->name = sim_alloc(strlen(name) + 1);
        strcpy(p->name, name);
    }
    while (*at)
        at = &(*at)->next;
    *at = p;
}

void sim_fail(struct sim_world *w, const char *name, enum sim_kind kind, unsigned nth, int err,
              bool sticky)
{
    assert(err > 0);
    add_fault(w, name, (struct sim_fault){.kind = kind, .nth = nth, .err = err, .sticky = sticky});
}

void sim_stall(struct sim_world *w, const char *name, enum sim_kind kind, unsigned nth, uint64_t ns,
               bool sticky)
{
    add_fault(w, name,
              (struct sim_fault){.kind = kind, .nth = nth, .stall_ns = ns, .sticky = sticky});
}

void sim_clear_faults(struct sim_world *w)
{
    while (w->faults) {
        struct sim_fault *f = w->faults;
        w->faults = f->next;
        free(f->name);
        free(f);
    }
}

const struct sim_fault *disk_fault(struct sim_world *w, enum sim_kind kind, const char *name)
{
    const struct sim_fault *hit = NULL;
    for (struct sim_fault *f = w->faults; f; f = f->next) {
        if ((f->kind != SIM_ANY_KIND && f->kind != kind) || (f->name && strcmp(f->name, name) != 0))
            continue;
        f->seen++;
        if (!hit && (f->seen == f->nth || (f->sticky && f->seen > f->nth)))
            hit = f;
    }
    return hit;
}
