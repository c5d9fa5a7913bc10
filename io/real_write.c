/* SPDX-License-Identifier: Apache-2.0 */
/* Buffered writes: the kernel has one lock per inode, and threads that meet there sleep and wake
 * each other. So each inode has a *writer role*: a loop that finds it free takes it, writes its own
 * request and then those that other loops queued meanwhile (DRAIN_REQUESTS or DRAIN_BYTES), then
 * hands it to the next in the queue. Nobody waits for a lock; who queued goes on with other work.
 * A write that took over SLOW_NS sends the inode's writes to the pool for SLOW_FOR_NS, where one
 * thread writes all that has queued up: a hand-over for each would cost more than the writing. */
#include <errno.h>

#include "base/bytes.h"
#include "io/real_file.h"

enum { DRAIN_REQUESTS = 32 };
#define DRAIN_BYTES MIB
#define SLOW_NS 2000000u
#define SLOW_FOR_NS 1000000000u

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

co_fn void role_wait(struct inode *ino)
{
    struct role_req barrier = {0};
    role_do(ino, &barrier);
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

/* RWF_DSYNC is for direct files only. On a buffered one it may meet the error of another request's
 * page, which the kernel reports once: only our own syncs, whose errors stay, may take it. */
static co_fn ssize_t write_durable(struct real_file *f, const struct iovec *iov, int n,
                                   uint64_t off)
{
    bool flag = f->direct && !f->memory;
    ssize_t r =
        flag ? file_finish_rw(f, true, iov, n, off, 0, RWF_DSYNC, file_wants_pool(f)) : -EOPNOTSUPP;
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
    look_forget(ino);
    if (off > INT64_MAX || total > INT64_MAX - off)
        return -EINVAL;
    if (flags & IO_DSYNC)
        return write_durable(f, iov, n, off);
    if (f->direct && !f->memory)
        return file_finish_rw(f, true, iov, n, off, 0, 0, file_wants_pool(f));
    if (f->may_hang)
        return file_finish_rw(f, true, iov, n, off, 0, 0, true);
    struct role_req q = {.file = f, .iov = iov, .n = n, .off = off, .total = total};
    if (is_slow(ino, real_now(file->io)))
        return write_slowly(f, &q);
    role_do(ino, &q);
    if (q.err)
        return q.err;
    return q.refused ? write_slowly(f, &q) : (ssize_t)q.done;
}
