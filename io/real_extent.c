/* SPDX-License-Identifier: Apache-2.0 */
/* Extents: looking for holes waits for the kernel's lock of the inode, which a writer (of any
 * process) may hold for seconds. So it is done in the pool, and data that was found is remembered
 * for a second, until we zero or cut something: at worst zeroes are read as data. Holes are
 * remembered for the request alone that looked, for a hole that somebody has filled meanwhile would
 * be a lie. */
#include <errno.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "base/bytes.h"
#include "io/real_file.h"

#define DATA_FOR_NS 1000000000u /* so long is remembered where data lies */

/* ------------------------------------------------------------------ extents */

void look_forget(const struct inode *ino)
{
    struct last_look *last = &((struct real_loop *)loop_self()->engine)->last_look;
    if (last->inode == ino)
        last->inode = NULL;
}

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
