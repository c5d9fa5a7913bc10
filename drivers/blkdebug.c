/* SPDX-License-Identifier: Apache-2.0 */
/* blkdebug: a filter that fails requests on order.
 *
 * An *event* happens at fixed points of a request (read_aio, write_aio, pwritev, pwritev_zero,
 * pwritev_done, flush_to_disk; "none" happened before the first). It moves the state (set-state
 * rules) and arms the inject-error rules of that event and state. An armed rule fails the next
 * request of its iotype that touches its sector, once or for ever. State 0 in a rule stands for any
 * state. */
#include <errno.h>
#include <string.h>

#include "base/bytes.h"
#include "base/mem.h"
#include "drivers/drivers.h"
#include "io/io.h"
#include "schema/types.h"

struct rule {
    int event;
    int64_t state; /* 0: any */
    bool is_set;
    int64_t new_state;
    int iotype; /* -1: any of read, write, write-zeroes, discard, flush */
    int errno_;
    int64_t sector; /* -1: any */
    bool once, armed, spent;
};

struct blkdebug {
    struct spin lock;
    int64_t state;
    unsigned n;
    struct rule *rule;
};

/* ------------------------------------------------------------------ rules */

static void happen(struct blkdebug *s, int event)
{
    spin_lock(&s->lock);
    int64_t state = s->state, next = state;
    for (unsigned i = 0; i < s->n; i++) {
        struct rule *r = &s->rule[i];
        if (r->event != event || (r->state && r->state != state))
            continue;
        if (r->is_set)
            next = r->new_state;
        else if (!r->spent)
            r->armed = true;
    }
    s->state = next;
    spin_unlock(&s->lock);
}

static int check(struct blkdebug *s, int iotype, uint64_t off, uint64_t len)
{
    int res = 0;
    spin_lock(&s->lock);
    for (unsigned i = 0; i < s->n && !res; i++) {
        struct rule *r = &s->rule[i];
        if (!r->armed || (r->iotype >= 0 && r->iotype != iotype))
            continue;
        uint64_t at = (uint64_t)r->sector * 512;
        if (r->sector >= 0 && !(off < at + 512 && at < off + len))
            continue;
        res = -r->errno_;
        if (r->once) {
            r->armed = false;
            r->spent = true;
        }
    }
    spin_unlock(&s->lock);
    return res;
}

static int load_inject(struct rule *r, const struct q_blkdebug_inject_error_options *o,
                       struct tide_error *err)
{
    *r = (struct rule){
        .event = o->event,
        .state = o->has_state ? o->state : 0,
        .iotype = o->has_iotype ? (int)o->iotype : -1,
        .errno_ = o->has_errno_ ? (int)o->errno_ : EIO,
        .sector = o->has_sector ? o->sector : -1,
        .once = o->has_once && o->once,
        .armed = o->event == Q_BLKDEBUG_EVENT_NONE,
    };
    if (r->errno_ <= 0 || r->errno_ > 4095)
        return tide_fail(err, -EINVAL, "errno %d of inject-error is not an error number",
                         r->errno_);
    if (r->sector < -1 || r->sector > INT64_MAX / 512 - 1)
        return tide_fail(err, -EINVAL, "sector %lld of inject-error is out of range",
                         (long long)r->sector);
    return 0;
}

static int load_rules(struct blkdebug *s, const struct q_blockdev_options_blkdebug *o,
                      struct tide_error *err)
{
    s->rule = mem_calloc(o->n_inject_error + o->n_set_state + 1, sizeof *s->rule);
    if (!s->rule)
        return tide_fail(err, -ENOMEM, "no memory for the rules");
    for (size_t i = 0; i < o->n_inject_error; i++) {
        int r = load_inject(&s->rule[s->n++], &o->inject_error[i], err);
        if (r < 0)
            return r;
    }
    for (size_t i = 0; i < o->n_set_state; i++) {
        const struct q_blkdebug_set_state_options *x = &o->set_state[i];
        s->rule[s->n++] = (struct rule){.event = x->event,
                                        .state = x->has_state ? x->state : 0,
                                        .is_set = true,
                                        .new_state = x->new_state};
    }
    return 0;
}

/* ------------------------------------------------------------------ node */

static int blkdebug_open(struct node *n, const struct q_blockdev_options *o, struct tide_error *err)
{
    const struct q_blockdev_options_blkdebug *b = &o->u.blkdebug;
    struct blkdebug *s = n->state;
    s->lock = (struct spin)SPIN_INIT;
    s->state = 1;
    if (b->config)
        return tide_fail(
            err, -ENOTSUP,
            "'config' files are not read: give the rules as inject-error and set-state");
    if (b->has_max_transfer || b->has_opt_write_zero || b->has_max_write_zero ||
        b->has_opt_discard || b->has_max_discard)
        return tide_fail(err, -ENOTSUP,
                         "blkdebug sets no limits but 'align': leave the others out");
    int r = node_open_child(n, "image", b->image, err);
    if (r < 0)
        return r;
    n->size = node_size(n->child[0]);
    if (b->has_align && b->align) {
        if (!is_pow2(b->align) || b->align > 65536 || n->size % b->align)
            return tide_fail(err, -EINVAL,
                             "align %llu is not a power of two up to 65536 that divides the size",
                             (unsigned long long)b->align);
        n->align = (uint32_t)b->align;
    }
    return load_rules(s, b, err);
}

static void blkdebug_close(struct node *n)
{
    struct blkdebug *s = n->state;
    mem_free(s->rule);
}

static int blkdebug_preadv(struct node *n, const struct iovec *iov, int niov, uint64_t off,
                           uint64_t len)
{
    happen(n->state, Q_BLKDEBUG_EVENT_READ_AIO);
    int r = check(n->state, Q_BLKDEBUG_IOTYPE_READ, off, len);
    return r < 0 ? r : node_preadv(n->child[0], iov, niov, off, len);
}

static int blkdebug_pwritev(struct node *n, const struct iovec *iov, int niov, uint64_t off,
                            uint64_t len, unsigned flags)
{
    happen(n->state, Q_BLKDEBUG_EVENT_PWRITEV);
    happen(n->state, Q_BLKDEBUG_EVENT_WRITE_AIO);
    int r = check(n->state, Q_BLKDEBUG_IOTYPE_WRITE, off, len);
    if (r == 0)
        r = node_pwritev(n->child[0], iov, niov, off, len, flags);
    happen(n->state, Q_BLKDEBUG_EVENT_PWRITEV_DONE);
    return r;
}

static int blkdebug_zero(struct node *n, uint64_t off, uint64_t len, unsigned flags)
{
    happen(n->state, Q_BLKDEBUG_EVENT_PWRITEV_ZERO);
    int r = check(n->state, Q_BLKDEBUG_IOTYPE_WRITE_ZEROES, off, len);
    return r < 0 ? r : node_zero(n->child[0], off, len, flags);
}

static int blkdebug_discard(struct node *n, uint64_t off, uint64_t len)
{
    int r = check(n->state, Q_BLKDEBUG_IOTYPE_DISCARD, off, len);
    return r < 0 ? r : node_discard(n->child[0], off, len);
}

static int blkdebug_flush(struct node *n)
{
    happen(n->state, Q_BLKDEBUG_EVENT_FLUSH_TO_DISK);
    int r = check(n->state, Q_BLKDEBUG_IOTYPE_FLUSH, 0, n->size);
    return r < 0 ? r : node_flush(n->child[0]);
}

static int blkdebug_extent(struct node *n, uint64_t off, uint64_t len, struct extent *e)
{
    int r = check(n->state, Q_BLKDEBUG_IOTYPE_BLOCK_STATUS, off, len);
    return r < 0 ? r : node_extent(n->child[0], off, len, e);
}

const struct driver_ops blkdebug_driver = {
    .name = "blkdebug",
    .state_size = sizeof(struct blkdebug),
    .filter = true,
    .open = blkdebug_open,
    .close = blkdebug_close,
    .preadv = blkdebug_preadv,
    .pwritev = blkdebug_pwritev,
    .zero = blkdebug_zero,
    .discard = blkdebug_discard,
    .flush = blkdebug_flush,
    .extent = blkdebug_extent,
};
