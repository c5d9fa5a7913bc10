/* SPDX-License-Identifier: Apache-2.0 */
/* One request on one node.
 *
 * The order of a write is fixed (crash-safety: a change may only become visible on disk after it is
 * marked): range and permission; wait for overlapping read-modify-writes; copy-before-write hooks;
 * mark; submit. What is refused or ignored before *mark* marks nothing; what fails later stays
 * marked.
 *
 * Requests that do not fit the node's alignment are widened here. A widened write holds its blocks
 * against every other write of the node while it reads, patches and writes (tracked_write); nodes
 * with align 1, the common case, know no such list. */
#include "block/node.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

#include "base/bytes.h"
#include "block/driver.h"
#include "io/io.h"
#include "schema/types.h"

#define ZERO_CHUNK (1 * MIB)

/* ------------------------------------------------------------------ iovec pieces */

static void iov_copy_out(const struct iovec *iov, int niov, uint64_t skip, void *to, uint64_t len)
{
    char *p = to;
    for (int i = 0; i < niov && len; i++) {
        if (skip >= iov[i].iov_len) {
            skip -= iov[i].iov_len;
            continue;
        }
        size_t n = MIN(iov[i].iov_len - skip, len);
        memcpy(p, (char *)iov[i].iov_base + skip, n);
        p += n;
        len -= n;
        skip = 0;
    }
}

static void iov_copy_in(const struct iovec *iov, int niov, const void *from, uint64_t len)
{
    const char *p = from;
    for (int i = 0; i < niov && len; i++) {
        size_t n = MIN(iov[i].iov_len, len);
        memcpy(iov[i].iov_base, p, n);
        p += n;
        len -= n;
    }
}

static bool iov_is_zero(const struct iovec *iov, int niov)
{
    for (int i = 0; i < niov; i++) {
        const char *p = iov[i].iov_base;
        size_t n = iov[i].iov_len;
        if (n && (p[0] || memcmp(p, p + 1, n - 1)))
            return false;
    }
    return true;
}

/* ------------------------------------------------------------------ overlapping writes */

/* Only those that came before `w`: who waits is passed by nobody that it would have to wait for. */
static bool overlaps_tracked(struct node *n, const struct tracked_write *w)
{
    struct tracked_write *o;
    for (o = TAILQ_FIRST(&n->writes); o != w; o = TAILQ_NEXT(o, link)) {
        if (o->off < w->end && w->off < o->end && (o->serialising || w->serialising))
            return true;
    }
    return false;
}

/* What lies behind the last whole block cannot be written directly. A driver writes it by way of a
 * cache, which may hold old contents of what lies before it: so that is done alone. */
static co_fn void write_begin(struct node *n, struct tracked_write *w, uint64_t off, uint64_t len,
                              bool serialising)
{
    bool rest = off + len > round_down(n->size, n->align);
    w->serialising = serialising || rest;
    w->off = rest ? 0 : round_down(off, n->align);
    w->end = round_up(off + len, n->align);
    spin_lock(&n->writes_lock);
    TAILQ_INSERT_TAIL(&n->writes, w, link);
    while (overlaps_tracked(n, w))
        co_queue_wait(&n->writes_wait, &n->writes_lock);
    spin_unlock(&n->writes_lock);
}

static void write_end(struct node *n, struct tracked_write *w)
{
    spin_lock(&n->writes_lock);
    TAILQ_REMOVE(&n->writes, w, link);
    co_queue_wake_all(&n->writes_wait);
    spin_unlock(&n->writes_lock);
}

/* ------------------------------------------------------------------ marks and hooks */

static co_fn void before_change(struct node *n, uint64_t off, uint64_t len)
{
    for (struct node_hook *h = n->hooks; h; h = h->next)
        h->before_write(h, off, len);
    tracker_mark(n, off, len);
}

void node_hook_add(struct node *n, struct node_hook *h)
{
    h->next = n->hooks;
    n->hooks = h;
}

void node_hook_remove(struct node *n, struct node_hook *h)
{
    struct node_hook **p = &n->hooks;
    while (*p != h)
        p = &(*p)->next;
    *p = h->next;
}

/* ------------------------------------------------------------------ read */

static bool whole_blocks(const struct node *n, uint64_t off, uint64_t len)
{
    return !((off | len) & (n->align - 1));
}

static bool aligned_for(const struct node *n, const struct iovec *iov, int niov, uint64_t off,
                        uint64_t len)
{
    uintptr_t bits = 0;
    for (int i = 0; i < niov && n->align > 1; i++)
        bits |= (uintptr_t)iov[i].iov_base | iov[i].iov_len;
    return whole_blocks(n, off, len) && !(bits & (n->align - 1));
}

static co_fn int read_widened(struct node *n, const struct iovec *iov, int niov, uint64_t off,
                              uint64_t len)
{
    uint64_t start = round_down(off, n->align), end = round_up(off + len, n->align);
    char *buf = io_buf_get(end - start);
    if (!buf)
        return -ENOMEM;
    struct iovec one = {buf, end - start};
    int r = n->ops->preadv(n, &one, 1, start, end - start);
    if (r == 0)
        iov_copy_in(iov, niov, buf + (off - start), len);
    io_buf_put(buf, end - start);
    return r;
}

int node_preadv(struct node *n, const struct iovec *iov, int niov, uint64_t off, uint64_t len)
{
    if (!range_in(off, len, n->size) || len > NODE_MAX_IO)
        return -EINVAL;
    if (!len)
        return 0;
    if (aligned_for(n, iov, niov, off, len))
        return n->ops->preadv(n, iov, niov, off, len);
    return read_widened(n, iov, niov, off, len);
}

/* ------------------------------------------------------------------ write */

/* Patch `len` bytes into whole blocks. The caller holds the blocks that are not written as a whole.
 * `iov` NULL writes zeroes. */
static co_fn int write_patched(struct node *n, const struct iovec *iov, int niov, uint64_t off,
                               uint64_t len, unsigned flags)
{
    uint64_t start = round_down(off, n->align), end = round_up(off + len, n->align);
    char *buf = io_buf_get(end - start);
    if (!buf)
        return -ENOMEM;
    struct iovec head = {buf, n->align}, tail = {buf + (end - start) - n->align, n->align};
    struct iovec one = {buf, end - start};
    bool one_block = end - start == n->align, odd_end = end != off + len;
    int r = 0;
    if (start != off || (odd_end && one_block))
        r = n->ops->preadv(n, &head, 1, start, n->align);
    if (r == 0 && odd_end && !one_block)
        r = n->ops->preadv(n, &tail, 1, end - n->align, n->align);
    if (r == 0) {
        if (iov)
            iov_copy_out(iov, niov, 0, buf + (off - start), len);
        else
            memset(buf + (off - start), 0, len);
        r = n->ops->pwritev(n, &one, 1, start, end - start, flags);
    }
    io_buf_put(buf, end - start);
    return r;
}

static int write_allowed(struct node *n, uint64_t off, uint64_t len)
{
    if (n->read_only)
        return -EPERM;
    return range_in(off, len, n->size) ? 0 : -ENOSPC;
}

int node_pwritev(struct node *n, const struct iovec *iov, int niov, uint64_t off, uint64_t len,
                 unsigned flags)
{
    int r = write_allowed(n, off, len);
    if (r < 0 || len > NODE_MAX_IO)
        return r < 0 ? r : -EINVAL;
    if (!len)
        return flags & NODE_FUA ? node_flush(n) : 0;
    if (n->detect_zeroes != Q_BLOCKDEV_DETECT_ZEROES_OPTIONS_OFF && iov_is_zero(iov, niov)) {
        bool unmap = n->detect_zeroes == Q_BLOCKDEV_DETECT_ZEROES_OPTIONS_UNMAP;
        return node_zero(n, off, len, (flags & NODE_FUA) | (unmap ? NODE_UNMAP : 0));
    }
    if (n->align == 1) {
        before_change(n, off, len);
        return n->ops->pwritev(n, iov, niov, off, len, flags);
    }
    /* Whole blocks from memory that does not fit are copied all the same, but wait for nobody. */
    struct tracked_write w;
    write_begin(n, &w, off, len, !whole_blocks(n, off, len));
    before_change(n, off, len);
    r = aligned_for(n, iov, niov, off, len) ? n->ops->pwritev(n, iov, niov, off, len, flags)
                                            : write_patched(n, iov, niov, off, len, flags);
    write_end(n, &w);
    return r;
}

/* ------------------------------------------------------------------ zeroes and discard */

static co_fn int zero_by_writing(struct node *n, uint64_t off, uint64_t len, unsigned flags)
{
    size_t size = MIN(len, ZERO_CHUNK);
    char *buf = io_buf_get(size);
    if (!buf)
        return -ENOMEM;
    memset(buf, 0, size);
    int r = 0;
    while (len && r == 0) {
        struct iovec one = {buf, MIN(len, size)};
        r = n->ops->pwritev(n, &one, 1, off, one.iov_len, flags & NODE_FUA);
        off += one.iov_len;
        len -= one.iov_len;
    }
    io_buf_put(buf, size);
    return r;
}

static co_fn int zero_whole_blocks(struct node *n, uint64_t off, uint64_t len, unsigned flags)
{
    int r = n->ops->zero ? n->ops->zero(n, off, len, flags) : -EOPNOTSUPP;
    if (r != -EOPNOTSUPP)
        return r;
    return flags & NODE_FAST_ZERO ? -ENOTSUP : zero_by_writing(n, off, len, flags);
}

/* [off, off+len) with odd ends: the blocks at the ends are patched, the middle is zeroed. */
static co_fn int zero_held(struct node *n, uint64_t off, uint64_t len, unsigned flags)
{
    uint64_t end = off + len, a = n->align;
    uint64_t mid = round_up(off, a), mid_end = end == n->size ? end : round_down(end, a);
    int r = 0;
    if (mid >= mid_end)
        return write_patched(n, NULL, 0, off, len, flags & NODE_FUA);
    if (mid != off)
        r = write_patched(n, NULL, 0, off, mid - off, flags & NODE_FUA);
    if (r == 0)
        r = zero_whole_blocks(n, mid, mid_end - mid, flags);
    if (r == 0 && end != mid_end)
        r = write_patched(n, NULL, 0, mid_end, end - mid_end, flags & NODE_FUA);
    return r;
}

int node_zero(struct node *n, uint64_t off, uint64_t len, unsigned flags)
{
    int r = write_allowed(n, off, len);
    if (r < 0)
        return r;
    if (!len)
        return flags & NODE_FUA ? node_flush(n) : 0;
    if (flags & NODE_FAST_ZERO && !node_can_zero_fast(n))
        return -ENOTSUP;
    if (!n->discard_unmap)
        flags &= ~NODE_UNMAP;
    if (n->align == 1) {
        before_change(n, off, len);
        return zero_whole_blocks(n, off, len, flags);
    }
    struct tracked_write w;
    write_begin(n, &w, off, len, true);
    before_change(n, off, len);
    r = zero_held(n, off, len, flags);
    write_end(n, &w);
    return r;
}

int node_discard(struct node *n, uint64_t off, uint64_t len)
{
    int r = write_allowed(n, off, len);
    if (r < 0 || !len || !n->discard_unmap || !n->ops->discard)
        return r;
    /* Only whole blocks are passed on; the rest of the range is marked all the same. */
    uint64_t start = round_up(off, n->align);
    uint64_t end = off + len == n->size ? n->size : round_down(off + len, n->align);
    struct tracked_write w;
    if (n->align > 1)
        write_begin(n, &w, off, len, true);
    before_change(n, off, len);
    r = start < end ? n->ops->discard(n, start, end - start) : 0;
    if (n->align > 1)
        write_end(n, &w);
    return r == -EOPNOTSUPP ? 0 : r;
}

int node_flush(struct node *n)
{
    return n->no_flush || !n->ops->flush ? 0 : n->ops->flush(n);
}

/* ------------------------------------------------------------------ extents and copies */

int node_extent(struct node *n, uint64_t off, uint64_t len, struct extent *e)
{
    if (!len || !range_in(off, len, n->size))
        return -EINVAL;
    *e = (struct extent){.len = len, .data = true, .depth = 1};
    int r = n->ops->extent ? n->ops->extent(n, off, len, e) : 0;
    if (r == 0 && (e->len == 0 || e->len > len))
        e->len = len;
    return r;
}

/* Copying below `n` would go unseen by a tracker or a job further down. */
static bool watched_below(const struct node *n)
{
    for (; n->n_children; n = n->child[0]) {
        if (n->child[0]->bitmaps || n->child[0]->hooks)
            return true;
    }
    return false;
}

int node_copy_range(struct node *src, uint64_t src_off, struct node *dst, uint64_t dst_off,
                    uint64_t len)
{
    uint64_t sbase, dbase;
    struct io_file *sf = src->ops->offload ? src->ops->offload(src, &sbase) : NULL;
    struct io_file *df = dst->ops->offload ? dst->ops->offload(dst, &dbase) : NULL;
    if (!sf || !df || dst->align > 1 || dst->detect_zeroes || watched_below(dst))
        return -EOPNOTSUPP;
    if (!range_in(src_off, len, src->size))
        return -EINVAL;
    int r = write_allowed(dst, dst_off, len);
    if (r < 0)
        return r;
    before_change(dst, dst_off, len);
    while (len) {
        ssize_t n = io_copy_range(sf, sbase + src_off, df, dbase + dst_off, len);
        if (n <= 0)
            return n < 0 ? (int)n : -EOPNOTSUPP; /* 0: the source file ends before its node does */
        src_off += n;
        dst_off += n;
        len -= n;
    }
    return 0;
}

struct io_file *node_cached_file(struct node *n, uint64_t off, uint64_t len, uint64_t *file_off)
{
    uint64_t base;
    struct io_file *f = n->ops->offload ? n->ops->offload(n, &base) : NULL;
    if (!f || n->align > 1 || !range_in(off, len, n->size))
        return NULL;
    *file_off = base + off;
    return f;
}

/* ------------------------------------------------------------------ properties */

const char *node_name(const struct node *n)
{
    return n->name;
}

struct shown_name shown_name(const char *name)
{
    struct shown_name s;
    size_t n = strnlen(name, sizeof s.text);
    bool whole = n < sizeof s.text;
    if (!whole) {
        n -= sizeof "...";
        while (n && ((unsigned char)name[n] & 0xC0) == 0x80) /* not within a character */
            n--;
    }
    memcpy(s.text, name, n);
    memcpy(s.text + n, whole ? "" : "...", whole ? 1 : 4);
    return s;
}

uint64_t node_size(const struct node *n)
{
    return n->size;
}

const char *node_driver(const struct node *n)
{
    return n->ops->name;
}

bool node_direct(const struct node *n)
{
    return n->direct;
}

bool node_no_flush(const struct node *n)
{
    return n->no_flush;
}

bool node_read_only(const struct node *n)
{
    return n->read_only;
}

uint32_t node_align(const struct node *n)
{
    return n->align;
}

uint32_t node_cluster_size(const struct node *n)
{
    return n->cluster;
}

bool node_can_zero_fast(const struct node *n)
{
    if (n->ops->filter && n->n_children)
        return node_can_zero_fast(n->child[0]);
    return n->ops->zero != NULL;
}

struct node *node_filtered(const struct node *n)
{
    return n->ops->filter && n->n_children ? n->child[0] : NULL;
}

struct node *node_child(const struct node *n, unsigned i)
{
    return i < n->n_children ? n->child[i] : NULL;
}

struct graph *node_graph(const struct node *n)
{
    return n->graph;
}
