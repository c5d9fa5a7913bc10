/* SPDX-License-Identifier: Apache-2.0 */
/* Files of the real engines: names, open files, copies and locks. Everything that changes names,
 * sizes or allocation is done in the pool.
 *
 * File systems behind a network or another process (NFS, CIFS, 9p, FUSE) know no RWF_NOWAIT, and
 * any call to them may hang for as long as the other side likes: nothing of them is done on a loop.
 */
#include <errno.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/mem.h"
#include "io/real_file.h"

#define COPY_MAX_BYTES (64 * MIB)

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
        .dev = S_ISBLK(in->st_mode) ? in->st_rdev : in->st_dev,
        .ino = S_ISBLK(in->st_mode) ? 0 : in->st_ino,
        .lock_dev = in->st_dev,
        .lock_ino = in->st_ino,
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
