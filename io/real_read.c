/* SPDX-License-Identifier: Apache-2.0 */
/* Reads: what the page cache holds is read at once with RWF_NOWAIT; the rest goes to the backend
 * (ring or pool). Files in memory (tmpfs) refuse RWF_NOWAIT but never wait, so a plain read does.
 */
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/bytes.h"
#include "io/real_file.h"

#define INLINE_BYTES MIB /* read at once, before others of the loop have their turn */

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

co_fn ssize_t real_preadv(struct io_file *file, const struct iovec *iov, int n, uint64_t off)
{
    struct real_file *f = file_of(file);
    size_t total = iov_bytes(iov, n), done = 0;
    int err = 0;
    if (off > INT64_MAX || total > INT64_MAX - off)
        return -EINVAL;
    /* Looking into the page cache starts to read what it does not find. */
    bool inline_first =
        (!f->direct || f->memory) && !file_wants_pool(f) && !disk_is_full(f->inode->disk);
    while (inline_first) {
        size_t stop = MIN(total, done + INLINE_BYTES);
        if (!read_now(f, iov, n, off, total, stop, &done, &err))
            break;
        if (err || done < stop || done == total)
            return err ? err : (ssize_t)done;
        loop_pause();
    }
    return file_finish_rw(f, false, iov, n, off, done, 0, file_wants_pool(f));
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
    if ((f->direct && !f->memory) || f->block || file_wants_pool(f) || pages > CACHED_MAX_PAGES)
        return false;
    int64_t cached = f->may_ask ? count_cached(f->fd, start, end - start) : -EPERM;
    if (f->memory) /* a kernel without that call is too old for what this is for, too */
        return cached >= 0;
    return cached == (int64_t)pages && is_filled(f, start, end, (unsigned)pages);
}
