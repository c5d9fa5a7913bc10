/* SPDX-License-Identifier: Apache-2.0 */
/* Data buffers: page-aligned, in classes of 4 KiB to 2 MiB by powers of two, kept per loop.
 *
 * A buffer goes to the pool of the loop that frees it, so neither side takes a lock; a loop that
 * only frees what others get holds at most POOL_BYTES, its region included. Sizes above the largest
 * class go to the allocator. A free buffer holds its link in its first bytes. Threads that are no
 * loops get and put none: they could not tell whose region a buffer belongs to.
 *
 * A loop may have a *region* (buf_region_start), whose memory its engine knows in advance: I/O with
 * it costs less. It is a range of addresses, cut into slabs. A slab is given to one class when that
 * class runs out of buffers, and only then told to the engine and filled with memory. A buffer of a
 * region always goes back to it, through a lock-free stack when another loop frees it. */
#include <assert.h>
#include <errno.h>
#include <sys/mman.h>

#include "base/bytes.h"
#include "base/mem.h"
#include "io/loop.h"

enum {
    PAGE_SHIFT = 12,
    LARGEST_SHIFT = 21,
    N_CLASSES = LARGEST_SHIFT - PAGE_SHIFT + 1,
    POOL_BYTES = 16 << 20, /* most that one loop keeps */
    /* One class must not take the whole region: connections hold buffers that no file sees. */
    CLASS_SLABS = BUF_REGION_SLABS * 3 / 8,
};

static_assert((size_t)BUF_REGION_SLABS * BUF_SLAB_BYTES <= POOL_BYTES,
              "the pool's limit includes the region");
static_assert(BUF_SLAB_BYTES >= 1 << PAGE_SHIFT && !(BUF_SLAB_BYTES & (BUF_SLAB_BYTES - 1)),
              "a slab is cut into whole buffers of any class up to its own size");
static_assert(N_CLASSES <= UINT8_MAX, "slab_class[] holds a class in a byte");

struct free_buf {
    struct free_buf *next;
};

/* Own loop only, but for `remote` and what never changes. */
struct buf_region {
    char *base;
    int (*add)(struct loop *, unsigned slab, void *base, size_t len);
    unsigned n_slabs, max_slabs;
    unsigned char slab_class[BUF_REGION_SLABS];
    unsigned class_slabs[N_CLASSES];
    struct free_buf *free[N_CLASSES];
    _Atomic(struct free_buf *) remote; /* freed by other loops */
};

struct io_buf_pool {
    struct free_buf *classes[N_CLASSES];
    size_t bytes;
};

/* N_CLASSES: too large for any. */
static unsigned class_of(size_t len)
{
    unsigned c = 0;
    while (c < N_CLASSES && ((size_t)1 << (PAGE_SHIFT + c)) < len)
        c++;
    return c;
}

static size_t class_size(unsigned c)
{
    return (size_t)1 << (PAGE_SHIFT + c);
}

/* ------------------------------------------------------------------ regions */

static bool in_region(const struct buf_region *r, const void *p)
{
    return (uintptr_t)p - (uintptr_t)r->base < (size_t)BUF_REGION_SLABS * BUF_SLAB_BYTES;
}

static unsigned slab_of(const struct buf_region *r, const void *p)
{
    return ((uintptr_t)p - (uintptr_t)r->base) / BUF_SLAB_BYTES;
}

int buf_region_slab(struct loop *l, const void *p, size_t len)
{
    struct buf_region *r = atomic_load_explicit(&l->region, memory_order_relaxed);
    if (!r || !in_region(r, p) || len > BUF_SLAB_BYTES)
        return -1;
    unsigned slab = slab_of(r, p);
    bool inside = len && slab < r->n_slabs && slab_of(r, (const char *)p + len - 1) == slab;
    return inside ? (int)slab : -1;
}

/* What the pool of `l` keeps. */
static void drop_free(struct loop *l)
{
    if (!l->bufs)
        return;
    for (unsigned c = 0; c < N_CLASSES; c++)
        while (l->bufs->classes[c]) {
            struct free_buf *b = l->bufs->classes[c];
            l->bufs->classes[c] = b->next;
            mem_free(b);
        }
    l->bufs->bytes = 0;
}

int buf_region_start(struct loop *l,
                     int (*add)(struct loop *, unsigned slab, void *base, size_t len))
{
    assert(l == loop_self() && !l->region);
    struct buf_region *r = mem_zalloc(sizeof *r);
    if (!r)
        return -ENOMEM;
    /* Only addresses: memory comes with add(). */
    r->base = mem_fails()
                  ? MAP_FAILED
                  : mmap(NULL, (size_t)BUF_REGION_SLABS * BUF_SLAB_BYTES, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (r->base == MAP_FAILED) {
        mem_free(r);
        return -ENOMEM;
    }
    drop_free(l); /* they would lie there unused for ever */
    r->add = add;
    r->max_slabs = BUF_REGION_SLABS;
    atomic_store_explicit(&l->region, r, memory_order_release);
    return 0;
}

static void region_push(struct buf_region *r, void *buf)
{
    struct free_buf *b = buf;
    unsigned c = r->slab_class[slab_of(r, buf)];
    b->next = r->free[c];
    r->free[c] = b;
}

/* One more slab, for class `c`. */
static void region_grow(struct loop *l, struct buf_region *r, unsigned c)
{
    if (r->n_slabs >= r->max_slabs || r->class_slabs[c] >= CLASS_SLABS)
        return;
    char *slab = r->base + (size_t)r->n_slabs * BUF_SLAB_BYTES;
    if (r->add(l, r->n_slabs, slab, BUF_SLAB_BYTES) < 0) {
        r->max_slabs = r->n_slabs; /* no more memory may be pinned: go on with what we have */
        return;
    }
    r->slab_class[r->n_slabs++] = c;
    r->class_slabs[c]++;
    for (size_t at = BUF_SLAB_BYTES; at; at -= class_size(c))
        region_push(r, slab + at - class_size(c));
}

static void *region_get(struct loop *l, struct buf_region *r, unsigned c)
{
    if (class_size(c) > BUF_SLAB_BYTES)
        return NULL;
    if (!r->free[c] && atomic_load_explicit(&r->remote, memory_order_relaxed)) {
        struct free_buf *b = atomic_exchange_explicit(&r->remote, NULL, memory_order_acquire);
        while (b) {
            struct free_buf *next = b->next;
            region_push(r, b);
            b = next;
        }
    }
    if (!r->free[c])
        region_grow(l, r, c);
    struct free_buf *b = r->free[c];
    if (b)
        r->free[c] = b->next;
    return b;
}

static size_t region_bytes(struct loop *l)
{
    struct buf_region *r = atomic_load_explicit(&l->region, memory_order_relaxed);
    return r ? (size_t)r->n_slabs * BUF_SLAB_BYTES : 0;
}

/* False: it is of no region. */
static bool region_put(struct loop *l, void *buf)
{
    struct buf_region *r = atomic_load_explicit(&l->region, memory_order_relaxed);
    if (r && in_region(r, buf)) {
        region_push(r, buf);
        return true;
    }
    for (unsigned i = 0; i < l->io->n_loops; i++) {
        r = atomic_load_explicit(&l->io->loops[i]->region, memory_order_acquire);
        if (!r || !in_region(r, buf))
            continue;
        struct free_buf *b = buf, *head = atomic_load_explicit(&r->remote, memory_order_relaxed);
        do
            b->next = head;
        while (!atomic_compare_exchange_weak_explicit(&r->remote, &head, b, memory_order_release,
                                                      memory_order_relaxed));
        return true;
    }
    return false;
}

static void region_free(struct loop *l)
{
    struct buf_region *r = l->region;
    if (!r)
        return;
    munmap(r->base, (size_t)BUF_REGION_SLABS * BUF_SLAB_BYTES);
    mem_free(r);
    l->region = NULL;
}

/* ------------------------------------------------------------------ getting and putting */

void *io_buf_get(size_t len)
{
    unsigned c = class_of(len);
    struct loop *l = loop_self();
    assert(l);
    struct buf_region *r = atomic_load_explicit(&l->region, memory_order_relaxed);
    if (r && c < N_CLASSES) {
        void *buf = region_get(l, r, c);
        if (buf)
            return buf;
    }
    if (c < N_CLASSES && l->bufs && l->bufs->classes[c]) {
        struct free_buf *b = l->bufs->classes[c];
        l->bufs->classes[c] = b->next;
        l->bufs->bytes -= class_size(c);
        return b;
    }
    size_t size = c < N_CLASSES ? class_size(c) : round_up(len, 1 << PAGE_SHIFT);
    return size < len ? NULL : mem_aligned((size_t)1 << PAGE_SHIFT, size);
}

void io_buf_put(void *buf, size_t len)
{
    unsigned c = class_of(len);
    struct loop *l = loop_self();
    if (!buf)
        return;
    assert(l);
    if (c == N_CLASSES) {
        mem_free(buf);
        return;
    }
    if (region_put(l, buf))
        return;
    if (!l->bufs)
        l->bufs = mem_zalloc(sizeof *l->bufs);
    if (!l->bufs || l->bufs->bytes + class_size(c) > POOL_BYTES - region_bytes(l)) {
        mem_free(buf);
        return;
    }
    struct free_buf *b = buf;
    b->next = l->bufs->classes[c];
    l->bufs->classes[c] = b;
    l->bufs->bytes += class_size(c);
}

void buf_pool_free(struct loop *l)
{
    region_free(l);
    drop_free(l);
    mem_free(l->bufs);
    l->bufs = NULL;
}
