/* SPDX-License-Identifier: Apache-2.0 */
/* Parts of vectors, and requests that go to the backend or to the pool because they may block. */
#include <errno.h>
#include <limits.h>
#include <sys/uio.h>

#include "base/bytes.h"
#include "io/real_file.h"

#ifndef IOV_MAX
#define IOV_MAX 1024
#endif

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

co_fn ssize_t file_finish_rw(struct real_file *f, bool write, const struct iovec *iov, int n,
                             uint64_t off, size_t done, int rwf, bool in_pool)
{
    struct real_loop *rl = loop_self()->engine;
    size_t total = iov_bytes(iov, n);
    while (done < total) {
        struct iovec tmp[N_IOV_TMP];
        int k;
        const struct iovec *rest = iov_after(iov, n, done, tmp, &k);
        ssize_t r;
        unsigned places = disk_places(f->inode->disk, total - done);
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
