/* SPDX-License-Identifier: Apache-2.0 */
/* raw: the bytes of `file`, or of a window of it (offset, size). Requests go on unchanged. */
#include <errno.h>

#include "base/bytes.h"
#include "drivers/drivers.h"
#include "schema/types.h"

struct raw {
    uint64_t base;
};

static int raw_open(struct node *n, const struct q_blockdev_options *o, struct tide_error *err)
{
    const struct q_blockdev_options_raw *raw = &o->u.raw;
    struct raw *s = n->state;
    int r = node_open_child(n, "file", raw->file, err);
    if (r < 0)
        return r;
    uint64_t whole = node_size(n->child[0]);
    s->base = n->window = raw->has_offset ? raw->offset : 0;
    if (s->base > whole)
        return tide_fail(err, -EINVAL,
                         "node '%s': offset %llu lies past the end of its file (%llu bytes)",
                         n->name, (unsigned long long)s->base, (unsigned long long)whole);
    n->size = whole - s->base;
    if (raw->has_size && !range_in(s->base, raw->size, whole))
        return tide_fail(err, -EINVAL,
                         "node '%s': size %llu from offset %llu does not fit its file (%llu bytes)",
                         n->name, (unsigned long long)raw->size, (unsigned long long)s->base,
                         (unsigned long long)whole);
    if (raw->has_size)
        n->size = raw->size;
    return 0;
}

static void raw_close(struct node *n)
{
}

static int raw_preadv(struct node *n, const struct iovec *iov, int niov, uint64_t off, uint64_t len)
{
    struct raw *s = n->state;
    return node_preadv(n->child[0], iov, niov, s->base + off, len);
}

static int raw_pwritev(struct node *n, const struct iovec *iov, int niov, uint64_t off,
                       uint64_t len, unsigned flags)
{
    struct raw *s = n->state;
    return node_pwritev(n->child[0], iov, niov, s->base + off, len, flags);
}

static int raw_zero(struct node *n, uint64_t off, uint64_t len, unsigned flags)
{
    struct raw *s = n->state;
    return node_zero(n->child[0], s->base + off, len, flags);
}

static int raw_discard(struct node *n, uint64_t off, uint64_t len)
{
    struct raw *s = n->state;
    return node_discard(n->child[0], s->base + off, len);
}

static int raw_flush(struct node *n)
{
    return node_flush(n->child[0]);
}

static int raw_extent(struct node *n, uint64_t off, uint64_t len, struct extent *e)
{
    struct raw *s = n->state;
    return node_extent(n->child[0], s->base + off, len, e);
}

static struct io_file *raw_offload(struct node *n, uint64_t *base)
{
    struct raw *s = n->state;
    struct node *c = n->child[0];
    struct io_file *f = c->ops->offload ? c->ops->offload(c, base) : NULL;
    if (f)
        *base += s->base;
    return f;
}

static uint64_t raw_allocated(const struct node *n)
{
    struct node *c = n->child[0];
    return c->ops->allocated ? c->ops->allocated(c) : UINT64_MAX;
}

const struct driver_ops raw_driver = {
    .name = "raw",
    .state_size = sizeof(struct raw),
    .filter = true,
    .open = raw_open,
    .close = raw_close,
    .preadv = raw_preadv,
    .pwritev = raw_pwritev,
    .zero = raw_zero,
    .discard = raw_discard,
    .flush = raw_flush,
    .extent = raw_extent,
    .offload = raw_offload,
    .allocated = raw_allocated,
};
