/* SPDX-License-Identifier: Apache-2.0 */
/* Files of the real engines.
 *
 * Reads: what the page cache holds is read at once with RWF_NOWAIT; the rest goes to the backend
 * (ring or pool). Files in memory (tmpfs) refuse RWF_NOWAIT but never wait, so a plain read does.
 *
 * Buffered writes: the kernel has one lock per inode, and threads that meet there sleep and wake
 * each other. So each inode has a *writer role*: a loop that finds it free takes it, writes its own
 * request and then those that other loops queued meanwhile (DRAIN_REQUESTS or DRAIN_BYTES), then
 * hands it to the next in the queue. Nobody waits for a lock; who queued goes on with other work.
 * A write that took over SLOW_NS sends the inode's writes to the pool for SLOW_FOR_NS, where one
 * thread writes all that has queued up: a hand-over for each would cost more than the writing.
 *
 * File systems behind a network or another process (NFS, CIFS, 9p, FUSE) know no RWF_NOWAIT, and
 * any call to them may hang for as long as the other side likes: nothing of them is done on a loop.
 *
 * Flush: a sync covers what completed before it *starts*, so a flush may join a sync only while
 * that one waits to start. One runs, one waits, the rest join the waiting one.
 *
 * Extents: looking for holes waits for the kernel's lock of the inode, which a writer (of any
 * process) may hold for seconds. So it is done in the pool, and data that was found is remembered
 * for a second, until we zero or cut something: at worst zeroes are read as data. Holes are
 * remembered for the request alone that looked, for a hole that somebody has filled meanwhile would
 * be a lie.
 *
 * Everything that changes names, sizes or allocation is done in the pool. */
#include <assert.h>
#include <errno.h>
#include <limits.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/mem.h"
#include "io/real.h"

enum { DRAIN_REQUESTS = 32 };
#define DRAIN_BYTES MIB
#define SLOW_NS 2000000u
#define SLOW_FOR_NS 1000000000u
#define COPY_MAX_BYTES (64 * MIB)
#define INLINE_BYTES MIB        /* read at once, before others of the loop have their turn */
#define DATA_FOR_NS 1000000000u /* so long is remembered where data lies */

#ifndef RWF_NOWAIT
#define RWF_NOWAIT 8
#endif
#ifndef IOV_MAX
#define IOV_MAX 1024
#endif

static struct real_file *file_of(struct io_file *f)
{
    return (struct real_file *)f;
}

/* ------------------------------------------------------------------ iovecs */

size_t iov_bytes(const struct iovec *iov, int n)
{
    size_t sum = 0;
    for (int i = 0; i < n; i++)
        sum += iov[i].iov_len;
    return sum;
}

const struct iovec *iov_after(const struct iovec *iov, int n_iov, size_t skip,
                              struct iovec tmp[N_IOV_TMP], int *n)
{
    int i = 0;
    while (i < n_iov && skip >= iov[i].iov_len)
        skip -= iov[i++].iov_len;
    if (!skip) {
        *n = MIN(n_iov - i, IOV_MAX);
        return iov + i;
    }
    int k = 0;
    for (; i < n_iov && k < N_IOV_TMP; i++, k++) {
        tmp[k].iov_base = (char *)iov[i].iov_base + skip;
        tmp[k].iov_len = iov[i].iov_len - skip;
        skip = 0;
    }
    *n = k;
    return tmp;
}

/* ------------------------------------------------------------------ inodes */

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

/* Any thread. NULL: no memory. */
static struct inode *inode_get(struct real_io *io, const struct stat *st, bool may_hang)
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

static void inode_put(struct real_io *io, struct inode *n)
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

/* ------------------------------------------------------------------ open, close, stat */

/* Bytes that direct I/O must be a multiple of, in memory and in the file. */
static uint32_t direct_align(int fd, bool block)
{
#ifdef STATX_DIOALIGN
    struct statx sx;
    if (statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &sx) == 0 && (sx.stx_mask & STATX_DIOALIGN) &&
        sx.stx_dio_mem_align && sx.stx_dio_offset_align)
        return MAX(sx.stx_dio_mem_align, sx.stx_dio_offset_align);
#endif
    int sector;
    if (block && ioctl(fd, BLKSSZGET, &sector) == 0 && sector > 0)
        return sector;
    /* Ask the file itself: does it give us 512 bytes? An empty one tells nothing. */
    char *buf = mem_aligned(4096, 4096);
    ssize_t r = buf ? pread(fd, buf, 512, 0) : -1;
    mem_free(buf);
    return r == 512 ? 512 : 4096;
}

/* A file system that knows no RWF_NOWAIT (a network or user space mount) would keep a loop in its
 * write, or a worker of the ring for each request, and when it is dead it keeps them all. Its I/O
 * is done in the pool, where it has a share. Asked beyond any end, where nothing has to be read;
 * the kernel refuses before it asks the file system. */
static bool refuses_nowait(int fd)
{
    char *buf = mem_aligned(4096, 4096);
    struct iovec iov = {buf, 4096};
    ssize_t r = buf ? preadv2(fd, &iov, 1, INT64_MAX - 8191, RWF_NOWAIT) : 0;
    bool refuses = r < 0 && errno == EOPNOTSUPP;
    mem_free(buf);
    return refuses;
}

/* It refuses, and its files lie on disks of this machine all the same. */
static bool is_overlay(int fd)
{
    struct statfs fs;
    return fstatfs(fd, &fs) == 0 && fs.f_type == OVERLAYFS_SUPER_MAGIC;
}

static bool lives_in_memory(int fd)
{
    struct statfs fs;
    return fstatfs(fd, &fs) == 0 && (fs.f_type == TMPFS_MAGIC || fs.f_type == RAMFS_MAGIC);
}

ssize_t file_do_open(struct pool_op *op)
{
    struct real_file *f = op->file;
    struct stat st;
    do
        f->fd = open(op->path, (int)op->flags | O_CLOEXEC, op->mode);
    while (f->fd < 0 && errno == EINTR);
    if (f->fd < 0 || fstat(f->fd, &st) < 0)
        return -errno;
    f->block = S_ISBLK(st.st_mode);
    f->direct = op->flags & O_DIRECT;
    /* To others the kernel does not tell what is cached, or says "all". */
    f->may_ask = (op->flags & O_ACCMODE) == O_RDWR || geteuid() == 0 || geteuid() == st.st_uid;
    f->align = f->direct ? direct_align(f->fd, f->block) : 1;
    /* A device node may lie in tmpfs; its data do not. */
    f->memory = S_ISREG(st.st_mode) && lives_in_memory(f->fd);
    if (!f->memory && refuses_nowait(f->fd)) {
        f->read_mode = NOWAIT_NEVER;
        f->may_hang = !is_overlay(f->fd);
    }
    f->inode = inode_get(op->io, &st, f->may_hang);
    return f->inode ? 0 : -ENOMEM;
}

ssize_t file_do_close(struct pool_op *op)
{
    struct real_file *f = op->file;
    if (f->fd >= 0)
        close(f->fd); /* its errors are old news: io_fsync() is where they are reported */
    if (f->inode)
        inode_put(op->io, f->inode);
    mem_free(f);
    return 0;
}

co_fn int real_open(struct io *io, const char *path, int flags, unsigned mode, struct io_file **out)
{
    struct real_io *r = real_of(io);
    struct real_file *f = mem_zalloc(sizeof *f);
    if (!f)
        return -ENOMEM;
    f->file.io = io;
    f->fd = -1;
    struct pool_op op = {
        .kind = POOL_OPEN, .io = r, .file = f, .path = path, .flags = flags, .mode = mode};
    int rc = pool_run(r->pool, &op);
    if (rc < 0) {
        real_close(&f->file);
        return rc;
    }
    *out = &f->file;
    return 0;
}

co_fn void real_close(struct io_file *file)
{
    struct real_io *r = real_of(file->io);
    struct pool_op op = {.kind = POOL_CLOSE, .io = r, .file = file_of(file)};
    pool_run(r->pool, &op);
}

static int64_t stat_ns(const struct timespec *t)
{
    return (int64_t)t->tv_sec * 1000000000 + t->tv_nsec;
}

/* fd: -1 when there is none; then the size of a block device is not known and stays 0. */
static int fill_stat(const struct stat *in, int fd, struct io_stat *out)
{
    *out = (struct io_stat){
        .size = in->st_size,
        .allocated = (uint64_t)in->st_blocks * 512,
        .dev = in->st_dev,
        .ino = in->st_ino,
        .mode = in->st_mode,
        .nlink = in->st_nlink,
        .align = 1,
        .mtime_ns = stat_ns(&in->st_mtim),
        .ctime_ns = stat_ns(&in->st_ctim),
    };
    if (S_ISBLK(in->st_mode) && fd >= 0) {
        if (ioctl(fd, BLKGETSIZE64, &out->size) < 0)
            return -errno;
        out->allocated = out->size;
    }
    return 0;
}

ssize_t file_do_fstat(struct pool_op *op)
{
    struct stat st;
    if (fstat(op->file->fd, &st) < 0)
        return -errno;
    int r = fill_stat(&st, op->file->fd, op->stat);
    op->stat->align = op->file->align;
    return r;
}

ssize_t file_do_stat(struct pool_op *op)
{
    struct stat st;
    if (stat(op->path, &st) < 0)
        return -errno;
    if (!S_ISBLK(st.st_mode))
        return fill_stat(&st, -1, op->stat);
    int fd = open(op->path, O_RDONLY | O_CLOEXEC);
    int r = fill_stat(&st, fd, op->stat);
    if (fd >= 0)
        close(fd);
    return r;
}

/* What changes or asks the file as a whole: in the pool, in the inode's share. */
static struct pool_op file_op(struct real_file *f, enum pool_kind kind)
{
    return (struct pool_op){
        .kind = kind, .class = POOL_META, .share = &f->inode->share, .io = file_io(f), .file = f};
}

co_fn int real_fstat(struct io_file *file, struct io_stat *st)
{
    struct pool_op op = file_op(file_of(file), POOL_FSTAT);
    op.stat = st;
    return pool_run(op.io->pool, &op);
}

co_fn int real_stat(struct io *io, const char *path, struct io_stat *st)
{
    struct pool_op op = {.kind = POOL_STAT, .io = real_of(io), .path = path, .stat = st};
    return pool_run(op.io->pool, &op);
}

/* ------------------------------------------------------------------ requests that may block */

ssize_t file_do_rw(struct pool_op *op)
{
    ssize_t r;
    do
        r = op->write ? pwritev2(op->file->fd, op->iov, op->n, op->off, (int)op->flags)
                      : preadv2(op->file->fd, op->iov, op->n, op->off, (int)op->flags);
    while (r < 0 && errno == EINTR);
    return r < 0 ? -errno : r;
}

ssize_t file_do_sync(struct pool_op *op)
{
    int r;
    do
        r = fdatasync(op->file->fd);
    while (r < 0 && errno == EINTR);
    return r < 0 ? -errno : 0;
}

/* When the queue of a disk is full, the kernel lets the thread wait that brings it one more
 * request, by io_uring too: as long as a disk hangs. So no more than half of what it takes is
 * brought to it at a time (the rest is for read-ahead and others); what is beyond waits here, in
 * order. A long request is several of the kernel's. */
struct disk_wait {
    struct co *co;
    unsigned places;
    struct disk_wait *next;
};

static unsigned places_of(const struct disk *d, size_t bytes)
{
    size_t n = d->max_bytes ? bytes / d->max_bytes + 1 : 1;
    return (unsigned)MIN(n, (size_t)d->max_out);
}

static co_fn void disk_enter(struct disk *d, unsigned places)
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

static void disk_leave(struct disk *d, unsigned places)
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

static bool disk_is_full(struct disk *d)
{
    return d->max_out && atomic_load_explicit(&d->n_out, memory_order_relaxed) >= d->max_out;
}

/* Go on from `done` with the backend, or in the pool, until all is there, the file ends or it
 * fails. Bytes, or -errno. */
static co_fn ssize_t finish_rw(struct real_file *f, bool write, const struct iovec *iov, int n,
                               uint64_t off, size_t done, int rwf, bool in_pool)
{
    struct real_loop *rl = loop_self()->engine;
    size_t total = iov_bytes(iov, n);
    while (done < total) {
        struct iovec tmp[N_IOV_TMP];
        int k;
        const struct iovec *rest = iov_after(iov, n, done, tmp, &k);
        ssize_t r;
        unsigned places = places_of(f->inode->disk, total - done);
        disk_enter(f->inode->disk, places);
        rl->requests++;
        if (in_pool) {
            struct pool_op op = file_op(f, POOL_RW);
            op.class = write && !f->direct ? POOL_META : POOL_DATA;
            op.write = write;
            op.iov = rest;
            op.n = k;
            op.off = off + done;
            op.flags = rwf;
            r = pool_run(op.io->pool, &op);
        } else {
            r = file_io(f)->be->rw(f, write, rest, k, off + done, rwf);
        }
        rl->requests--;
        disk_leave(f->inode->disk, places);
        if (r == -EINTR || r == -EAGAIN)
            continue;
        if (r < 0)
            return r;
        if (r == 0 && write)
            return -EIO; /* a file that takes nothing and says no reason */
        if (r == 0)
            break;
        done += r;
    }
    return done;
}

/* ------------------------------------------------------------------ reads */

/* At most `max` bytes of `iov`, which is changed. */
static int iov_limit(struct iovec *iov, int n, size_t max)
{
    for (int i = 0; i < n; i++) {
        if (iov[i].iov_len >= max) {
            iov[i].iov_len = max;
            return i + 1;
        }
        max -= iov[i].iov_len;
    }
    return n;
}

/* As iov_after(), but not beyond the first `stop` bytes of the whole. */
static const struct iovec *iov_between(const struct iovec *iov, int n_iov, size_t skip, size_t stop,
                                       size_t total, struct iovec tmp[N_IOV_TMP], int *n)
{
    const struct iovec *rest = iov_after(iov, n_iov, skip, tmp, n);
    if (stop == total)
        return rest;
    *n = MIN(*n, N_IOV_TMP);
    if (rest != tmp)
        memcpy(tmp, rest, *n * sizeof *tmp);
    *n = iov_limit(tmp, *n, stop - skip);
    return tmp;
}

/* What of the first `stop` bytes can be had without waiting, in *done. False: the rest of them may
 * take a while. */
static bool read_now(struct real_file *f, const struct iovec *iov, int n, uint64_t off,
                     size_t total, size_t stop, size_t *done, int *err)
{
    int mode = atomic_load_explicit(&f->read_mode, memory_order_relaxed);
    while (*done < stop) {
        struct iovec tmp[N_IOV_TMP];
        int k;
        const struct iovec *rest = iov_between(iov, n, *done, stop, total, tmp, &k);
        bool plain = mode == NOWAIT_PLAIN;
        ssize_t r = preadv2(f->fd, rest, k, off + *done, plain ? 0 : RWF_NOWAIT);
        if (r > 0) {
            *done += r;
            if (mode == NOWAIT_UNKNOWN)
                atomic_store_explicit(&f->read_mode, mode = NOWAIT_YES, memory_order_relaxed);
            continue;
        }
        if (r == 0)
            return true;
        if (errno == EOPNOTSUPP && !plain) {
            mode = f->memory ? NOWAIT_PLAIN : NOWAIT_NEVER;
            atomic_store_explicit(&f->read_mode, mode, memory_order_relaxed);
            if (mode == NOWAIT_NEVER)
                return false;
            continue;
        }
        if (errno == EINTR)
            continue;
        if (errno == EAGAIN)
            return false;
        *err = -errno;
        return true;
    }
    return true;
}

/* A file that knows no RWF_NOWAIT would keep a kernel worker of the ring for each request; in the
 * pool it has a share and no more. */
static bool wants_pool(struct real_file *f)
{
    return atomic_load_explicit(&f->read_mode, memory_order_relaxed) == NOWAIT_NEVER;
}

co_fn ssize_t real_preadv(struct io_file *file, const struct iovec *iov, int n, uint64_t off)
{
    struct real_file *f = file_of(file);
    size_t total = iov_bytes(iov, n), done = 0;
    int err = 0;
    if (off > INT64_MAX || total > INT64_MAX - off)
        return -EINVAL;
    /* Looking into the page cache starts to read what it does not find. */
    bool inline_first =
        (!f->direct || f->memory) && !wants_pool(f) && !disk_is_full(f->inode->disk);
    while (inline_first) {
        size_t stop = MIN(total, done + INLINE_BYTES);
        if (!read_now(f, iov, n, off, total, stop, &done, &err))
            break;
        if (err || done < stop || done == total)
            return err ? err : (ssize_t)done;
        loop_pause();
    }
    return finish_rw(f, false, iov, n, off, done, 0, wants_pool(f));
}

/* ------------------------------------------------------------------ what is cached */

/* Linux 6.5; the C library has no name for it yet. */
#ifndef SYS_cachestat
#define SYS_cachestat 451
#endif
#define CACHED_MAX_PAGES 2048u /* asked for at once */

/* How many pages of the range the page cache has; -errno: the kernel does not tell, or not us. */
static int64_t count_cached(int fd, uint64_t off, uint64_t len)
{
    struct {
        uint64_t off, len;
    } range = {off, len};
    struct {
        uint64_t cached, dirty, writeback, evicted, recently_evicted;
    } stat;
    return syscall(SYS_cachestat, fd, &range, &stat, 0) < 0 ? -errno : (int64_t)stat.cached;
}

/* Pages that are in the cache may still be on their way from the disk. mincore(2) knows; it asks
 * for a mapping, which nobody ever touches. */
static bool is_filled(struct real_file *f, uint64_t off, uint64_t end, unsigned pages)
{
    unsigned char in_core[CACHED_MAX_PAGES];
    void *map = mmap(NULL, end - off, PROT_READ, MAP_SHARED, f->fd, (off_t)off);
    if (map == MAP_FAILED)
        return false;
    bool filled = mincore(map, end - off, in_core) == 0;
    munmap(map, end - off);
    for (unsigned i = 0; i < pages && filled; i++)
        filled = in_core[i] & 1;
    return filled;
}

bool real_is_cached(struct real_file *f, uint64_t off, uint64_t len)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    uint64_t start = round_down(off, page), end = round_up(off + len, page);
    uint64_t pages = (end - start) / page;
    if ((f->direct && !f->memory) || f->block || wants_pool(f) || pages > CACHED_MAX_PAGES)
        return false;
    int64_t cached = f->may_ask ? count_cached(f->fd, start, end - start) : -EPERM;
    if (f->memory) /* a kernel without that call is too old for what this is for, too */
        return cached >= 0;
    return cached == (int64_t)pages && is_filled(f, start, end, (unsigned)pages);
}

/* ------------------------------------------------------------------ the writer role */

/* Lives on the stack of the coroutine that wants to write, or (file NULL) to know that all
 * requests before it are through. */
struct role_req {
    struct real_file *file;
    const struct iovec *iov;
    int n;
    uint64_t off;
    size_t total, done;
    int err;
    bool refused; /* would wait: do the rest elsewhere */
    bool yours;   /* not served, but made the holder of the role */
    struct co *co;
    struct role_req *next;
};

static bool is_slow(struct inode *ino, uint64_t now)
{
    return now < atomic_load_explicit(&ino->slow_until, memory_order_relaxed);
}

/* One system call. False: no more to do here. */
static bool role_write_some(struct role_req *q)
{
    struct real_file *f = q->file;
    struct iovec tmp[N_IOV_TMP];
    int k, mode = atomic_load_explicit(&f->write_mode, memory_order_relaxed);
    const struct iovec *rest = iov_after(q->iov, q->n, q->done, tmp, &k);
    ssize_t r = pwritev2(f->fd, rest, k, q->off + q->done, mode == NOWAIT_PLAIN ? 0 : RWF_NOWAIT);
    if (r > 0) {
        q->done += r;
        if (mode == NOWAIT_UNKNOWN)
            atomic_store_explicit(&f->write_mode, NOWAIT_YES, memory_order_relaxed);
        return q->done < q->total;
    }
    if (r < 0 && errno == EINTR)
        return true;
    if (r < 0 && errno == EOPNOTSUPP && mode != NOWAIT_PLAIN) {
        atomic_store_explicit(&f->write_mode, NOWAIT_PLAIN, memory_order_relaxed);
        return true;
    }
    if (r < 0 && errno == EAGAIN)
        q->refused = true;
    else
        q->err = r == 0 ? -EIO : -errno;
    return false;
}

static void role_perform(struct inode *ino, struct role_req *q)
{
    if (!q->file || !q->total)
        return;
    uint64_t start = real_now(q->file->file.io);
    if (is_slow(ino, start)) {
        q->refused = true;
        return;
    }
    while (role_write_some(q))
        ;
    uint64_t end = real_now(q->file->file.io);
    if (end - start > SLOW_NS)
        atomic_store_explicit(&ino->slow_until, end + SLOW_FOR_NS, memory_order_relaxed);
}

/* The holder is done with its own request: serve others, then pass the role on or drop it. */
static void role_drain(struct inode *ino)
{
    size_t bytes = 0;
    for (unsigned n = 0;; n++) {
        spin_lock(&ino->spin);
        struct role_req *q = ino->role_head;
        if (q) {
            ino->role_head = q->next;
            if (!ino->role_head)
                ino->role_tail = NULL;
        } else {
            ino->role_held = false;
        }
        spin_unlock(&ino->spin);
        if (!q)
            return;
        struct co *co = q->co;
        if (n >= DRAIN_REQUESTS || bytes >= DRAIN_BYTES) {
            q->yours = true;
            co_wake(co);
            return;
        }
        role_perform(ino, q);
        bytes += q->total;
        co_wake(co); /* `q` is gone */
    }
}

static co_fn void role_do(struct inode *ino, struct role_req *q)
{
    spin_lock(&ino->spin);
    if (ino->role_held) {
        q->co = co_self();
        q->next = NULL;
        if (ino->role_tail)
            ino->role_tail->next = q;
        else
            ino->role_head = q;
        ino->role_tail = q;
        spin_unlock(&ino->spin);
        co_yield();
        if (!q->yours)
            return;
    } else {
        bool wanted = q->file;
        ino->role_held = wanted;
        spin_unlock(&ino->spin);
        if (!wanted)
            return;
    }
    role_perform(ino, q);
    role_drain(ino);
}

/* ------------------------------------------------------------------ slow writes */

/* In the pool; waits for the disk. */
static void write_all(struct role_req *q)
{
    while (q->done < q->total && !q->err) {
        struct iovec tmp[N_IOV_TMP];
        int k;
        const struct iovec *rest = iov_after(q->iov, q->n, q->done, tmp, &k);
        ssize_t r = pwritev2(q->file->fd, rest, k, q->off + q->done, 0);
        if (r > 0)
            q->done += r;
        else if (r == 0 || errno != EINTR)
            q->err = r == 0 ? -EIO : -errno;
    }
}

/* The next in the queue; NULL: there is none, and the role is free. */
static struct role_req *slow_pop(struct inode *ino)
{
    spin_lock(&ino->spin);
    struct role_req *q = ino->slow_head;
    if (q) {
        ino->slow_head = q->next;
        if (!ino->slow_head)
            ino->slow_tail = NULL;
    } else {
        ino->slow_held = false;
    }
    spin_unlock(&ino->spin);
    return q;
}

/* The request of the coroutine that waits for this operation, then those behind it, for a short
 * while: that one waits until we are through. */
ssize_t file_do_drain(struct pool_op *op)
{
    struct inode *ino = op->file->inode;
    struct role_req *q = op->role;
    size_t bytes = q->total;
    uint64_t begin = real_now(q->file->file.io);
    write_all(q);
    for (unsigned n = 0; (q = slow_pop(ino)); n++) {
        struct co *co = q->co;
        q->yours = n >= DRAIN_REQUESTS || bytes >= DRAIN_BYTES ||
                   real_now(q->file->file.io) - begin > SLOW_NS;
        if (q->yours) {
            co_wake(co);
            break;
        }
        bytes += q->total;
        write_all(q);
        co_wake(co); /* `q` is gone */
    }
    return 0;
}

static co_fn void slow_do(struct real_file *f, struct role_req *q)
{
    struct inode *ino = f->inode;
    spin_lock(&ino->spin);
    bool queued = ino->slow_held;
    ino->slow_held = true;
    q->co = co_self();
    q->next = NULL;
    if (queued && ino->slow_tail)
        ino->slow_tail->next = q;
    else if (queued)
        ino->slow_head = q;
    if (queued)
        ino->slow_tail = q;
    spin_unlock(&ino->spin);
    if (queued) {
        co_yield();
        if (!q->yours)
            return;
    }
    struct pool_op op = file_op(f, POOL_DRAIN);
    op.role = q;
    pool_run(op.io->pool, &op);
}

static co_fn ssize_t write_slowly(struct real_file *f, struct role_req *q)
{
    struct real_loop *rl = loop_self()->engine;
    q->yours = false;
    rl->requests++;
    slow_do(f, q);
    rl->requests--;
    return q->err ? q->err : (ssize_t)q->done;
}

/* ------------------------------------------------------------------ writes */

/* What we write may fill a hole that this coroutine has seen. */
static void forget_look(const struct inode *ino)
{
    struct last_look *last = &((struct real_loop *)loop_self()->engine)->last_look;
    if (last->inode == ino)
        last->inode = NULL;
}

/* RWF_DSYNC is for direct files only. On a buffered one it may meet the error of another request's
 * page, which the kernel reports once: only our own syncs, whose errors stay, may take it. */
static co_fn ssize_t write_durable(struct real_file *f, const struct iovec *iov, int n,
                                   uint64_t off)
{
    bool flag = f->direct && !f->memory;
    ssize_t r = flag ? finish_rw(f, true, iov, n, off, 0, RWF_DSYNC, wants_pool(f)) : -EOPNOTSUPP;
    if (r != -EOPNOTSUPP)
        return r;
    r = real_pwritev(&f->file, iov, n, off, 0);
    int s = r < 0 ? 0 : real_fsync(&f->file);
    return s < 0 ? s : r;
}

co_fn ssize_t real_pwritev(struct io_file *file, const struct iovec *iov, int n, uint64_t off,
                           unsigned flags)
{
    struct real_file *f = file_of(file);
    struct inode *ino = f->inode;
    size_t total = iov_bytes(iov, n);
    forget_look(ino);
    if (off > INT64_MAX || total > INT64_MAX - off)
        return -EINVAL;
    if (flags & IO_DSYNC)
        return write_durable(f, iov, n, off);
    if (f->direct && !f->memory)
        return finish_rw(f, true, iov, n, off, 0, 0, wants_pool(f));
    if (f->may_hang)
        return finish_rw(f, true, iov, n, off, 0, 0, true);
    struct role_req q = {.file = f, .iov = iov, .n = n, .off = off, .total = total};
    if (is_slow(ino, real_now(file->io)))
        return write_slowly(f, &q);
    role_do(ino, &q);
    if (q.err)
        return q.err;
    return q.refused ? write_slowly(f, &q) : (ssize_t)q.done;
}

/* ------------------------------------------------------------------ flush */

/* On the stack of a flush that came while a sync ran. */
struct sync_waiter {
    struct co *co;
    int result;
    bool lead; /* do the sync for all who wait */
    struct sync_waiter *next;
};

/* A sync starts: whoever has come by now is covered. Returns its result. */
static co_fn int sync_lead(struct real_file *f)
{
    spin_lock(&f->sync_spin);
    struct sync_waiter *group = f->sync_head;
    f->sync_head = f->sync_tail = NULL;
    int r = f->sync_error;
    spin_unlock(&f->sync_spin);

    if (r == 0) {
        struct real_loop *rl = loop_self()->engine;
        rl->requests++;
        r = file_io(f)->be->sync(f);
        rl->requests--;
    }

    spin_lock(&f->sync_spin);
    if (r < 0 && !f->direct)
        f->sync_error = r;
    struct sync_waiter *lead = f->sync_head;
    if (lead) {
        f->sync_head = lead->next;
        if (!f->sync_head)
            f->sync_tail = NULL;
    } else {
        f->syncing = false;
    }
    spin_unlock(&f->sync_spin);

    while (group) {
        struct sync_waiter *w = group;
        group = w->next;
        w->result = r;
        co_wake(w->co);
    }
    if (lead) {
        lead->lead = true;
        co_wake(lead->co);
    }
    return r;
}

co_fn int real_fsync(struct io_file *file)
{
    struct real_file *f = file_of(file);
    struct role_req barrier = {0};
    role_do(f->inode, &barrier);

    spin_lock(&f->sync_spin);
    if (!f->syncing) {
        f->syncing = true;
        spin_unlock(&f->sync_spin);
        return sync_lead(f);
    }
    struct sync_waiter w = {.co = co_self()};
    if (f->sync_tail)
        f->sync_tail->next = &w;
    else
        f->sync_head = &w;
    f->sync_tail = &w;
    spin_unlock(&f->sync_spin);
    co_yield();
    return w.lead ? sync_lead(f) : w.result;
}

/* ------------------------------------------------------------------ extents */

/* Something may stop to be data. */
static void forget_data(struct inode *ino)
{
    spin_lock(&ino->look_spin);
    ino->data_off = ino->data_end = 0;
    ino->n_cuts++;
    spin_unlock(&ino->look_spin);
}

static void remember_data(struct inode *ino, uint64_t off, uint64_t end, unsigned n_cuts,
                          uint64_t now)
{
    spin_lock(&ino->look_spin);
    if (ino->n_cuts == n_cuts) {
        ino->data_off = off;
        ino->data_end = end;
        ino->data_until = now + DATA_FOR_NS;
    }
    spin_unlock(&ino->look_spin);
}

/* True: there is data at `off`, up to *end. */
static bool recall_data(struct inode *ino, uint64_t off, uint64_t *end, uint64_t now)
{
    spin_lock(&ino->look_spin);
    bool known = ino->data_off <= off && off < ino->data_end && now < ino->data_until;
    *end = ino->data_end;
    spin_unlock(&ino->look_spin);
    return known;
}

static unsigned count_cuts(struct inode *ino)
{
    spin_lock(&ino->look_spin);
    unsigned n = ino->n_cuts;
    spin_unlock(&ino->look_spin);
    return n;
}

/* The next edge at or behind `pos`, where a hole ends or data does; UINT64_MAX: there is none. */
static int next_edge(struct real_file *f, uint64_t pos, bool data, uint64_t *at)
{
    off_t r = lseek(f->fd, pos, data ? SEEK_HOLE : SEEK_DATA);
    *at = r < 0 ? UINT64_MAX : (uint64_t)r;
    return r >= 0 || errno == ENXIO ? 0 : -errno;
}

/* Fills op->look, as far as `len` reaches or there is room. */
ssize_t file_do_extent(struct pool_op *op)
{
    struct real_file *f = op->file;
    struct look *k = op->look;
    uint64_t now = real_now(f->file.io), pos = op->off, at;
    uint64_t end = pos + MIN(op->len, INT64_MAX - pos);
    unsigned n_cuts = count_cuts(f->inode);
    k->edge[0] = pos;
    k->n = 1;
    int r = next_edge(f, pos, false, &at);
    k->data = r < 0 || at == pos; /* who cannot tell has data */
    bool data = k->data;
    if (data && r == 0)
        r = next_edge(f, pos, true, &at);
    while (r == 0 && at > pos) { /* else it was cut between two calls */
        if (data)
            remember_data(f->inode, pos, at, n_cuts, now);
        k->edge[k->n++] = pos = at;
        data = !data;
        if (k->n == k->room || pos >= end)
            break;
        r = next_edge(f, pos, data, &at);
    }
    return k->n > 1 || r == -EINVAL || r == -EOPNOTSUPP ? 0 : r;
}

/* False: `off` lies outside. */
static bool look_answers(const struct look *k, uint64_t off, uint64_t *len, bool *data)
{
    for (unsigned i = 0; i + 1 < k->n; i++)
        if (k->edge[i] <= off && off < k->edge[i + 1]) {
            *data = k->data ^ (i & 1);
            *len = MIN(*len, k->edge[i + 1] - off);
            return true;
        }
    return false;
}

/* Has nobody else run on this loop since this coroutine looked? Then the request that it looked for
 * goes on, and what was so at some time of it may be answered, holes too. */
static bool still_looking(struct loop *l, const struct inode *ino)
{
    const struct last_look *last = &((struct real_loop *)l->engine)->last_look;
    return last->inode == ino && last->co == co_self() && last->turn == loop_turn_number(l) &&
           last->n_started == l->n_started;
}

co_fn int real_extent(struct io_file *file, uint64_t off, uint64_t *len, bool *data)
{
    struct real_file *f = file_of(file);
    struct loop *l = loop_self();
    struct real_loop *rl = l->engine;
    struct look k = {.room = 3}; /* who asks for a hole asks next for the data behind it */
    uint64_t end;
    if (off > INT64_MAX)
        return -EINVAL;
    *data = true;
    if (f->block)
        return 0;
    if (recall_data(f->inode, off, &end, real_now(file->io))) {
        *len = MIN(*len, end - off);
        return 0;
    }
    if (still_looking(l, f->inode)) {
        if (look_answers(&rl->last_look.look, off, len, data))
            return 0;
        k.room = MIN(2 * rl->last_look.look.room, LOOK_EDGES); /* it reads the whole map */
    }
    struct pool_op op = file_op(f, POOL_EXTENT);
    op.class = POOL_LOOK;
    op.off = off;
    op.len = *len;
    op.look = &k;
    rl->requests++;
    int r = pool_run(op.io->pool, &op);
    rl->requests--;
    if (r < 0 || !look_answers(&k, off, len, data))
        return r;
    rl->last_look = (struct last_look){k, f->inode, co_self(), loop_turn_number(l), l->n_started};
    return 0;
}

/* ------------------------------------------------------------------ allocation and size */

/* Punching a device is quick or refused. BLKZEROOUT writes zeroes where the device cannot make them
 * itself; it neither gives space back. */
static int zero_block_device(struct pool_op *op)
{
    uint64_t range[2] = {op->off, op->len};
    int punch = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, r;
    if (op->alloc == IO_DISCARD)
        return ioctl(op->file->fd, BLKDISCARD, range) < 0 ? -errno : 0;
    if (op->alloc == IO_ZERO_KEEP_FAST)
        return -EOPNOTSUPP;
    if (op->alloc != IO_ZERO_KEEP) {
        do
            r = fallocate(op->file->fd, punch, op->off, op->len);
        while (r < 0 && errno == EINTR);
        if (r == 0)
            return 0;
        if (op->alloc == IO_ZERO_PUNCH_FAST || (errno != EOPNOTSUPP && errno != EINVAL))
            return -errno;
    }
    return ioctl(op->file->fd, BLKZEROOUT, range) < 0 ? -errno : 0;
}

ssize_t file_do_zero(struct pool_op *op)
{
    if (op->file->block) {
        int r = zero_block_device(op);
        return r == -ENOTTY || r == -EINVAL ? -EOPNOTSUPP : r;
    }
    bool keep = op->alloc == IO_ZERO_KEEP || op->alloc == IO_ZERO_KEEP_FAST;
    int mode = keep ? FALLOC_FL_ZERO_RANGE : FALLOC_FL_PUNCH_HOLE;
    int r;
    do
        r = fallocate(op->file->fd, mode | FALLOC_FL_KEEP_SIZE, op->off, op->len);
    while (r < 0 && errno == EINTR);
    if (r == 0)
        return 0;
    return errno == ENOSYS || errno == ENODEV || errno == ESPIPE ? -EOPNOTSUPP : -errno;
}

/* Zeroing and cutting may turn data into holes; what a look found meanwhile does not count. */
static co_fn int run_cut(struct pool_op *op)
{
    forget_data(op->file->inode);
    int r = pool_run(op->io->pool, op);
    forget_data(op->file->inode);
    return r;
}

co_fn int real_zero(struct io_file *file, uint64_t off, uint64_t len, enum io_alloc how)
{
    struct pool_op op = file_op(file_of(file), POOL_ZERO);
    if (off > INT64_MAX || len > INT64_MAX - off)
        return -EINVAL;
    op.off = off;
    op.len = len;
    op.alloc = how;
    return run_cut(&op);
}

ssize_t file_do_truncate(struct pool_op *op)
{
    int r;
    do
        r = ftruncate(op->file->fd, op->len);
    while (r < 0 && errno == EINTR);
    return r < 0 ? -errno : 0;
}

co_fn int real_truncate(struct io_file *file, uint64_t size)
{
    struct pool_op op = file_op(file_of(file), POOL_TRUNCATE);
    if (size > INT64_MAX)
        return -EFBIG;
    op.len = size;
    return run_cut(&op);
}

/* ------------------------------------------------------------------ copy and lock */

ssize_t file_do_copy(struct pool_op *op)
{
    off64_t in = op->off, out = op->off2;
    ssize_t r;
    do
        r = copy_file_range(op->file->fd, &in, op->file2->fd, &out, op->len, 0);
    while (r < 0 && errno == EINTR);
    return r >= 0 ? r : errno == ENOSYS ? -EOPNOTSUPP : -errno;
}

co_fn ssize_t real_copy_range(struct io_file *src, uint64_t src_off, struct io_file *dst,
                              uint64_t dst_off, uint64_t len)
{
    struct pool_op op = file_op(file_of(dst), POOL_COPY);
    if (src_off > INT64_MAX || dst_off > INT64_MAX)
        return -EINVAL;
    op.file = file_of(src);
    op.file2 = file_of(dst);
    op.off = src_off;
    op.off2 = dst_off;
    op.len = MIN(len, COPY_MAX_BYTES); /* a thread is busy for it: not for ever */
    return pool_run(op.io->pool, &op);
}

ssize_t file_do_lock(struct pool_op *op)
{
    static const short type[] = {
        [IO_UNLOCK] = F_UNLCK, [IO_LOCK_SHARED] = F_RDLCK, [IO_LOCK_EXCLUSIVE] = F_WRLCK};
    struct flock fl = {
        .l_type = type[op->lock],
        .l_whence = SEEK_SET,
        .l_start = op->off,
        .l_len = op->len,
    };
    if (fcntl(op->file->fd, op->test ? F_OFD_GETLK : F_OFD_SETLK, &fl) < 0)
        return errno == EACCES ? -EAGAIN : -errno;
    return op->test && fl.l_type != F_UNLCK ? -EAGAIN : 0;
}

co_fn int real_lock(struct io_file *file, uint64_t off, uint64_t len, enum io_lock how, bool test)
{
    struct pool_op op = file_op(file_of(file), POOL_LOCK);
    if (!len) /* to fcntl() that would mean "to the end" */
        return 0;
    if (test && how == IO_UNLOCK)
        return 0;
    if (off > INT64_MAX || len > INT64_MAX - off)
        return -EINVAL;
    op.off = off;
    op.len = len;
    op.lock = how;
    op.test = test;
    return pool_run(op.io->pool, &op);
}

/* ------------------------------------------------------------------ names */

ssize_t file_do_rename(struct pool_op *op)
{
    unsigned flags = (op->flags & IO_NOREPLACE ? RENAME_NOREPLACE : 0) |
                     (op->flags & IO_EXCHANGE ? RENAME_EXCHANGE : 0);
    return renameat2(AT_FDCWD, op->path, AT_FDCWD, op->path2, flags) < 0 ? -errno : 0;
}

co_fn int real_rename(struct io *io, const char *from, const char *to, unsigned flags)
{
    struct pool_op op = {
        .kind = POOL_RENAME, .io = real_of(io), .path = from, .path2 = to, .flags = flags};
    return pool_run(op.io->pool, &op);
}

ssize_t file_do_unlink(struct pool_op *op)
{
    return unlink(op->path) < 0 ? -errno : 0;
}

co_fn int real_unlink(struct io *io, const char *path)
{
    struct pool_op op = {.kind = POOL_UNLINK, .io = real_of(io), .path = path};
    return pool_run(op.io->pool, &op);
}

ssize_t file_do_sync_dir(struct pool_op *op)
{
    int fd = open(op->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    int r = fsync(fd) < 0 ? -errno : 0;
    close(fd);
    return r;
}

co_fn int real_sync_dir(struct io *io, const char *dir)
{
    struct pool_op op = {.kind = POOL_SYNC_DIR, .io = real_of(io), .path = dir};
    return pool_run(op.io->pool, &op);
}
