/* SPDX-License-Identifier: Apache-2.0 */
/* Inodes and the disks they lie on: what all open files of one have in common. */
#include <assert.h>
#include <stdio.h>
#include <string.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/mem.h"
#include "io/real_file.h"

/* ------------------------------------------------------------------ disks and inodes */

static uint64_t inode_hash(uint64_t dev, uint64_t ino)
{
    return ((ino ^ dev << 7) * 0x9e3779b97f4a7c15u) >> 58; /* 6 bits */
}

static bool read_queue(uint64_t dev, const char *what, unsigned *n)
{
    char path[80];
    snprintf(path, sizeof path, "/sys/dev/block/%u:%u/queue/%s", major(dev), minor(dev), what);
    FILE *f = fopen(path, "re");
    bool ok = f && fscanf(f, "%u", n) == 1;
    if (f)
        fclose(f);
    return ok;
}

/* A partition shares its queue with the whole device. */
static uint64_t whole_device(uint64_t dev)
{
    char path[80];
    unsigned hi, lo;
    snprintf(path, sizeof path, "/sys/dev/block/%u:%u/partition", major(dev), minor(dev));
    if (access(path, F_OK) < 0)
        return dev;
    snprintf(path, sizeof path, "/sys/dev/block/%u:%u/../dev", major(dev), minor(dev));
    FILE *f = fopen(path, "re");
    bool ok = f && fscanf(f, "%u:%u", &hi, &lo) == 2;
    if (f)
        fclose(f);
    return ok ? makedev(hi, lo) : dev;
}

/* Only a device with queues of its own makes anybody wait for a place in them: not one without
 * (device mapper), one that is none (btrfs) or is not of this machine. */
static void read_limits(struct disk *d)
{
    char path[80];
    unsigned depth, kib;
    snprintf(path, sizeof path, "/sys/dev/block/%u:%u/mq", major(d->dev), minor(d->dev));
    if (access(path, F_OK) == 0 && read_queue(d->dev, "nr_requests", &depth))
        d->max_out = (depth + 1) / 2;
    if (d->max_out && read_queue(d->dev, "max_sectors_kb", &kib))
        d->max_bytes = MIN(kib, 1u << 20) * 1024u;
}

/* Mutex held. NULL: no memory. */
static struct disk *disk_get(struct real_io *io, uint64_t dev, bool block, bool may_hang)
{
    struct disk *d = io->disks;
    dev = may_hang ? dev : whole_device(dev);
    while (d && (d->dev != dev || d->block != block))
        d = d->next;
    if (!d && (d = mem_zalloc(sizeof *d))) {
        io->mounts_share.level = SHARE_MOUNTS;
        d->dev = dev;
        d->block = block;
        d->share = (struct pool_share){.level = SHARE_MOUNT, .up = &io->mounts_share};
        if (!may_hang)
            read_limits(d);
        d->next = io->disks;
        io->disks = d;
    }
    if (d)
        d->refs++;
    return d;
}

/* Mutex held. */
static void disk_put(struct real_io *io, struct disk *d)
{
    if (--d->refs)
        return;
    struct disk **at = &io->disks;
    while (*at != d)
        at = &(*at)->next;
    *at = d->next;
    mem_free(d);
}

/* Mutex held. NULL: no memory. */
static struct inode *inode_new(struct real_io *io, uint64_t dev, uint64_t ino, bool block,
                               bool may_hang)
{
    struct inode *n = mem_zalloc(sizeof *n);
    if (n && !(n->disk = disk_get(io, dev, block, may_hang))) {
        mem_free(n);
        return NULL;
    }
    if (n) {
        n->dev = dev;
        n->ino = ino;
        n->block = block;
        n->share.up = may_hang ? &n->disk->share : NULL;
    }
    return n;
}

struct inode *inode_get(struct real_io *io, const struct stat *st, bool may_hang)
{
    bool block = S_ISBLK(st->st_mode);
    uint64_t dev = block ? st->st_rdev : st->st_dev, ino = block ? 0 : st->st_ino;
    struct inode **bucket = &io->inodes[inode_hash(dev, ino)], *n;
    pthread_mutex_lock(&io->inode_mutex);
    for (n = *bucket; n; n = n->next)
        if (n->dev == dev && n->ino == ino && n->block == block)
            break;
    if (!n && (n = inode_new(io, dev, ino, block, may_hang))) {
        n->next = *bucket;
        *bucket = n;
    }
    if (n)
        n->refs++;
    pthread_mutex_unlock(&io->inode_mutex);
    return n;
}

void inode_put(struct real_io *io, struct inode *n)
{
    pthread_mutex_lock(&io->inode_mutex);
    if (--n->refs) {
        pthread_mutex_unlock(&io->inode_mutex);
        return;
    }
    struct inode **at = &io->inodes[inode_hash(n->dev, n->ino)];
    while (*at != n)
        at = &(*at)->next;
    *at = n->next;
    disk_put(io, n->disk);
    pthread_mutex_unlock(&io->inode_mutex);
    assert(!n->role_held && !n->role_head);
    mem_free(n);
}

/* ------------------------------------------------------------------ a place in the queue of a disk
 */

/* When the queue of a disk is full, the kernel lets the thread wait that brings it one more
 * request, by io_uring too: as long as a disk hangs. So no more than half of what it takes is
 * brought to it at a time (the rest is for read-ahead and others); what is beyond waits here, in
 * order. A long request is several of the kernel's. */
struct disk_wait {
    struct co *co;
    unsigned places;
    struct disk_wait *next;
};

unsigned disk_places(const struct disk *d, size_t bytes)
{
    size_t n = d->max_bytes ? bytes / d->max_bytes + 1 : 1;
    return (unsigned)MIN(n, (size_t)d->max_out);
}

co_fn void disk_enter(struct disk *d, unsigned places)
{
    if (!d->max_out)
        return;
    spin_lock(&d->spin);
    if (!d->first && d->n_out + places <= d->max_out) {
        d->n_out += places;
        spin_unlock(&d->spin);
        return;
    }
    struct disk_wait me = {.co = co_self(), .places = places};
    *(d->first ? &d->last->next : &d->first) = &me;
    d->last = &me;
    spin_unlock(&d->spin);
    co_yield(); /* whoever wakes us has taken the places for us */
}

void disk_leave(struct disk *d, unsigned places)
{
    if (!d->max_out)
        return;
    spin_lock(&d->spin);
    d->n_out -= places;
    while (d->first && d->n_out + d->first->places <= d->max_out) {
        struct disk_wait *w = d->first;
        d->n_out += w->places;
        d->first = w->next;
        co_wake(w->co); /* `w` is gone */
    }
    spin_unlock(&d->spin);
}

bool disk_is_full(struct disk *d)
{
    return d->max_out && atomic_load_explicit(&d->n_out, memory_order_relaxed) >= d->max_out;
}
