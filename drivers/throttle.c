/* SPDX-License-Identifier: Apache-2.0 */
/* throttle: a filter whose requests wait until the limits of a throttle-group let them go; then
 * they go on unchanged. Zeroes and discards count as writes of their length, flushes and questions
 * for allocation are free. There is no way around it inside the kernel (offload): copies are
 * counted as the reads and writes that they are. */
#include <errno.h>

#include "block/throttle_group.h"
#include "drivers/drivers.h"
#include "schema/types.h"

struct throttle_node {
    struct throttle_member member;
};

static int throttle_open(struct node *n, const struct q_blockdev_options *o, struct tide_error *err)
{
    const struct q_blockdev_options_throttle *t = &o->u.throttle;
    struct throttle_node *s = n->state;
    int r = node_open_child(n, "file", t->file, err);
    if (r < 0)
        return r;
    n->size = node_size(n->child[0]);
    /* Looked up when nothing yields any more: it cannot be deleted before we are in it. */
    struct throttle_group *g = throttle_group_find(n->graph, t->throttle_group);
    if (!g)
        return tide_fail(err, -ENOENT, "throttle-group '%s' not found; create it with object-add",
                         shown_name(t->throttle_group).text);
    throttle_join(&s->member, g, n);
    return 0;
}

static void throttle_close(struct node *n)
{
    struct throttle_node *s = n->state;
    throttle_leave(&s->member);
}

static co_fn void admit(struct node *n, enum throttle_side side, uint64_t len)
{
    struct throttle_node *s = n->state;
    throttle_admit(&s->member, side, len);
}

static int throttle_preadv(struct node *n, const struct iovec *iov, int niov, uint64_t off,
                           uint64_t len)
{
    admit(n, THROTTLE_READ, len);
    return node_preadv(n->child[0], iov, niov, off, len);
}

static int throttle_pwritev(struct node *n, const struct iovec *iov, int niov, uint64_t off,
                            uint64_t len, unsigned flags)
{
    admit(n, THROTTLE_WRITE, len);
    return node_pwritev(n->child[0], iov, niov, off, len, flags);
}

static int throttle_zero(struct node *n, uint64_t off, uint64_t len, unsigned flags)
{
    admit(n, THROTTLE_WRITE, len);
    return node_zero(n->child[0], off, len, flags);
}

static int throttle_discard(struct node *n, uint64_t off, uint64_t len)
{
    admit(n, THROTTLE_WRITE, len);
    return node_discard(n->child[0], off, len);
}

static int throttle_flush(struct node *n)
{
    return node_flush(n->child[0]);
}

static int throttle_extent(struct node *n, uint64_t off, uint64_t len, struct extent *e)
{
    return node_extent(n->child[0], off, len, e);
}

static uint64_t throttle_allocated(const struct node *n)
{
    struct node *c = n->child[0];
    return c->ops->allocated ? c->ops->allocated(c) : UINT64_MAX;
}

static void throttle_node_drain_begin(struct node *n)
{
    struct throttle_node *s = n->state;
    throttle_drain_begin(&s->member);
}

static void throttle_node_drain_end(struct node *n)
{
    struct throttle_node *s = n->state;
    throttle_drain_end(&s->member);
}

const struct driver_ops throttle_driver = {
    .name = "throttle",
    .state_size = sizeof(struct throttle_node),
    .filter = true,
    .open = throttle_open,
    .close = throttle_close,
    .preadv = throttle_preadv,
    .pwritev = throttle_pwritev,
    .zero = throttle_zero,
    .discard = throttle_discard,
    .flush = throttle_flush,
    .extent = throttle_extent,
    .allocated = throttle_allocated,
    .drain_begin = throttle_node_drain_begin,
    .drain_end = throttle_node_drain_end,
};
