/* SPDX-License-Identifier: Apache-2.0 */
/* null-co, null-aio: a disk that forgets. Reads give zeroes (always: handing out whatever is in a
 * buffer would leak memory of the daemon), writes vanish; latency-ns makes each request wait. */
#include <errno.h>
#include <string.h>

#include "base/bytes.h"
#include "drivers/drivers.h"
#include "io/io.h"
#include "schema/types.h"

struct null {
    uint64_t latency_ns;
};

static int null_co_open(struct node *n, const struct q_blockdev_options *o, struct tide_error *err)
{
    struct null *s = n->state;
    n->size = o->u.null_co.has_size ? (uint64_t)o->u.null_co.size : GIB;
    s->latency_ns = o->u.null_co.has_latency_ns ? o->u.null_co.latency_ns : 0;
    if (n->size > INT64_MAX)
        return tide_fail(err, -EFBIG, "size of node '%s' is larger than 2^63 - 1", node_name(n));
    return 0;
}

static int null_aio_open(struct node *n, const struct q_blockdev_options *o, struct tide_error *err)
{
    struct null *s = n->state;
    n->size = o->u.null_aio.has_size ? (uint64_t)o->u.null_aio.size : GIB;
    s->latency_ns = o->u.null_aio.has_latency_ns ? o->u.null_aio.latency_ns : 0;
    if (n->size > INT64_MAX)
        return tide_fail(err, -EFBIG, "size of node '%s' is larger than 2^63 - 1", node_name(n));
    return 0;
}

static void null_close(struct node *n)
{
}

static co_fn void wait_latency(struct node *n)
{
    struct null *s = n->state;
    if (s->latency_ns)
        io_sleep(s->latency_ns);
}

static int null_preadv(struct node *n, const struct iovec *iov, int niov, uint64_t off,
                       uint64_t len)
{
    wait_latency(n);
    for (int i = 0; i < niov; i++)
        memset(iov[i].iov_base, 0, iov[i].iov_len);
    return 0;
}

static int null_pwritev(struct node *n, const struct iovec *iov, int niov, uint64_t off,
                        uint64_t len, unsigned flags)
{
    wait_latency(n);
    return 0;
}

static int null_zero(struct node *n, uint64_t off, uint64_t len, unsigned flags)
{
    wait_latency(n);
    return 0;
}

static int null_discard(struct node *n, uint64_t off, uint64_t len)
{
    wait_latency(n);
    return 0;
}

static int null_flush(struct node *n)
{
    wait_latency(n);
    return 0;
}

static int null_extent(struct node *n, uint64_t off, uint64_t len, struct extent *e)
{
    e->data = false;
    e->zero = true;
    return 0;
}

static uint64_t null_allocated(const struct node *n)
{
    return 0;
}

#define NULL_OPS                                                                                   \
    .state_size = sizeof(struct null), .close = null_close, .preadv = null_preadv,                 \
    .pwritev = null_pwritev, .zero = null_zero, .discard = null_discard, .flush = null_flush,      \
    .extent = null_extent, .allocated = null_allocated

const struct driver_ops null_co_driver = {.name = "null-co", .open = null_co_open, NULL_OPS};
const struct driver_ops null_aio_driver = {.name = "null-aio", .open = null_aio_open, NULL_OPS};
