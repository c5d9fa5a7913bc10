/* SPDX-License-Identifier: Apache-2.0 */
/* Data buffers: page-aligned, in classes of 4 KiB to 2 MiB by powers of two, kept per loop.
 *
 * A buffer goes to the pool of the loop that frees it, so neither side takes a lock; a loop that
 * only frees what others get holds at most POOL_BYTES. Threads that are no loop, and sizes above
 * the largest class, go to the allocator. A free buffer holds its link in its first bytes. */
#include "base/bytes.h"
#include "base/mem.h"
#include "io/loop.h"

enum {
    PAGE_SHIFT = 12,
    LARGEST_SHIFT = 21,
    N_CLASSES = LARGEST_SHIFT - PAGE_SHIFT + 1,
    POOL_BYTES = 16 << 20, /* most that one loop keeps */
};

struct free_buf {
    struct free_buf *next;
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

void *io_buf_get(size_t len)
{
    unsigned c = class_of(len);
    struct loop *l = loop_self();
    if (c < N_CLASSES && l && l->bufs && l->bufs->classes[c]) {
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
    if (c == N_CLASSES || !l) {
        mem_free(buf);
        return;
    }
    if (!l->bufs)
        l->bufs = mem_zalloc(sizeof *l->bufs);
    if (!l->bufs || l->bufs->bytes + class_size(c) > POOL_BYTES) {
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
    if (!l->bufs)
        return;
    for (unsigned c = 0; c < N_CLASSES; c++)
        while (l->bufs->classes[c]) {
            struct free_buf *b = l->bufs->classes[c];
            l->bufs->classes[c] = b->next;
            mem_free(b);
        }
    mem_free(l->bufs);
    l->bufs = NULL;
}
