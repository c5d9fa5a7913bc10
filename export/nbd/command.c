/* SPDX-License-Identifier: Apache-2.0 */
/* What a request does, and its reply.
 *
 * Everything is checked after admission, against the node as it is then. With structured replies an
 * error carries a sentence, and a long read says where holes are instead of sending zeroes;
 * without, each reply is a number and the data. Zeroes, trims and caching may be as long as the
 * disk: they are done in pieces, between two pieces others have their turn and whoever wants to
 * change the graph gets in, and they stop when the client has gone. */
#include <assert.h>
#include <errno.h>
#include <string.h>

#include "base/mem.h"
#include "block/node.h"
#include "block/root.h"
#include "export/nbd/nbd.h"

#define SPARSE_READ (64u << 10)   /* from here on it is worth asking for holes */
#define SEND_FILE_MIN (64u << 10) /* from here on two copies cost more than a few system calls */
#define LOOK_AHEAD (128 * MIB)    /* how far to ask whether there is data */
#define CACHE_PIECE (1u << 20)

uint64_t nbd_request_bytes(const struct nbd_request *rq)
{
    bool data = rq->cmd == NBD_CMD_READ || rq->cmd == NBD_CMD_WRITE;
    if (rq->cmd == NBD_CMD_CACHE)
        return MIN(rq->len, NBD_MAX_PAYLOAD);
    return data && rq->len <= NBD_MAX_PAYLOAD ? rq->len : 0;
}

/* CACHE holds a piece only, but costs its length, and what is zeroed or trimmed in pieces costs
 * something though it holds nothing: not many of them shall work at once for one client. */
uint64_t nbd_request_cost(const struct nbd_conn *c, const struct nbd_request *rq)
{
    if (rq->cmd == NBD_CMD_BLOCK_STATUS)
        return nbd_block_status_max(c, rq);
    if ((rq->cmd == NBD_CMD_TRIM || rq->cmd == NBD_CMD_WRITE_ZEROES) && rq->len > NODE_MAX_IO)
        return NBD_LONG_COST;
    return nbd_request_bytes(rq);
}

bool nbd_request_takes_payload(const struct nbd_conn *c, const struct nbd_request *rq)
{
    if (rq->cmd == NBD_CMD_WRITE)
        return rq->payload <= NBD_MAX_PAYLOAD;
    return rq->cmd == NBD_CMD_BLOCK_STATUS && c->n_contexts && rq->payload > NBD_FILTER_LEN &&
           (rq->payload - NBD_FILTER_LEN) % 4 == 0 &&
           (rq->payload - NBD_FILTER_LEN) / 4 <= c->n_chosen;
}

static int refuse(struct nbd_task *t, int code, const char *why)
{
    t->why = why;
    return code;
}

/* ------------------------------------------------------------------ replies */

static size_t put_chunk(struct nbd_task *t, uint8_t *p, unsigned flags, unsigned type, uint64_t len)
{
    return nbd_put_chunk(nbd_task_context(t)->conn, p, &t->rq, flags, type, len);
}

static void add_piece(struct nbd_task *t, const void *p, size_t len)
{
    t->iov[t->n_iov].iov_base = (void *)p;
    t->iov[t->n_iov++].iov_len = len;
}

static void reply_error(struct nbd_task *t, bool structured, int code)
{
    uint32_t e = nbd_errno(-code);
    t->iov = t->small;
    t->n_iov = 0;
    if (!structured) {
        nbd_simple_encode(t->head, t->rq.cookie, e);
        add_piece(t, t->head, NBD_SIMPLE_LEN);
        return;
    }
    const char *why = t->why ? t->why : tide_strerror(-code);
    size_t len = strlen(why);
    size_t n = put_chunk(t, t->head, NBD_CHUNK_DONE, NBD_CHUNK_ERROR, 6 + len);
    put_be32(t->head + n, e);
    put_be16(t->head + n + 4, len);
    add_piece(t, t->head, n + 6);
    add_piece(t, why, len);
}

/* Success without data. */
static void reply_done(struct nbd_task *t, bool structured)
{
    t->iov = t->small;
    t->n_iov = 0;
    if (structured) {
        add_piece(t, t->head, put_chunk(t, t->head, NBD_CHUNK_DONE, NBD_CHUNK_NONE, 0));
    } else {
        nbd_simple_encode(t->head, t->rq.cookie, 0);
        add_piece(t, t->head, NBD_SIMPLE_LEN);
    }
}

static void reply_data(struct nbd_task *t, bool structured)
{
    t->iov = t->small;
    t->n_iov = 0;
    if (structured) {
        size_t n = put_chunk(t, t->head, NBD_CHUNK_DONE, NBD_CHUNK_OFFSET_DATA, 8 + t->rq.len);
        put_be64(t->head + n, t->rq.off);
        add_piece(t, t->head, n + 8);
    } else {
        nbd_simple_encode(t->head, t->rq.cookie, 0);
        add_piece(t, t->head, NBD_SIMPLE_LEN);
    }
    add_piece(t, t->buf, t->rq.len);
}

/* ------------------------------------------------------------------ reads */

static int read_buf(struct nbd_task *t)
{
    t->buf = io_buf_get(t->rq.len);
    t->buf_len = t->rq.len;
    return t->buf ? 0 : -ENOMEM;
}

static int read_piece(struct nbd_task *t, struct node *n, uint64_t off, uint64_t len)
{
    struct iovec iov = {(uint8_t *)t->buf + (off - t->rq.off), len};
    return node_preadv(n, &iov, 1, off, len);
}

/* Does [off, *end) begin with a hole? *end is moved to where that changes. What was data once is
 * read as data for ever: at worst zeroes travel. */
static void look(struct nbd_context *x, struct node *n, uint64_t off, uint64_t *end, bool *hole)
{
    struct extent e;
    *hole = false;
    if (x->data_in != n) {
        x->data_in = n;
        x->data_off = x->data_end = 0;
    }
    if (x->data_off <= off && off < x->data_end) {
        *end = MIN(*end, x->data_end);
        return;
    }
    uint64_t len = MAX(*end - off, MIN(LOOK_AHEAD, node_size(n) - off));
    if (node_extent(n, off, len, &e) < 0)
        return; /* reading will tell whether something is wrong */
    *hole = e.zero;
    *end = MIN(*end, off + e.len);
    if (e.zero)
        return;
    if (off <= x->data_end && off + e.len >= x->data_off) {
        x->data_off = MIN(x->data_off, off);
        x->data_end = MAX(x->data_end, off + e.len);
    } else {
        x->data_off = off;
        x->data_end = off + e.len;
    }
}

static void add_chunk(struct nbd_task *t, unsigned i, uint64_t off, uint64_t end, bool hole)
{
    struct nbd_chunks *ch = t->mem;
    uint8_t *head = ch->head[i];
    unsigned flags = end == t->rq.off + t->rq.len ? NBD_CHUNK_DONE : 0;
    unsigned type = hole ? NBD_CHUNK_OFFSET_HOLE : NBD_CHUNK_OFFSET_DATA;
    size_t n = put_chunk(t, head, flags, type, hole ? 12 : 8 + (end - off));
    put_be64(head + n, off);
    if (hole) {
        put_be32(head + n + 8, end - off);
        add_piece(t, head, n + 12);
    } else {
        add_piece(t, head, n + 8);
        add_piece(t, (uint8_t *)t->buf + (off - t->rq.off), end - off);
    }
}

/* A read in chunks, the first of which, [rq.off, end), has been looked at. */
static int read_chunks(struct nbd_task *t, struct node *n, uint64_t end, bool hole)
{
    struct nbd_chunks *ch = t->mem = mem_alloc(sizeof *ch);
    uint64_t off = t->rq.off, stop = t->rq.off + t->rq.len;
    int r = ch ? 0 : -ENOMEM;
    for (unsigned i = 0; r == 0;) {
        if (!hole && !t->buf)
            r = read_buf(t);
        if (r == 0 && !hole)
            r = read_piece(t, n, off, end - off);
        if (r < 0)
            break;
        if (i == 0) {
            t->iov = ch->iov;
            t->n_iov = 0;
        }
        add_chunk(t, i++, off, end, hole);
        off = end;
        end = stop;
        hole = false;
        if (off == stop)
            break;
        if (i < NBD_MAX_CHUNKS - 1)
            look(nbd_task_context(t), n, off, &end, &hole);
    }
    return r;
}

/* What nbd_task_send_file() left: `sent` bytes of head and data are gone. A reply that has begun
 * cannot become an error. */
static void read_rest(struct nbd_task *t, struct node *n)
{
    uint64_t head = t->iov[0].iov_len, h = MIN(t->sent, head), d = t->sent - h;
    t->buf_len = t->rq.len - d;
    t->buf = t->buf_len ? io_buf_get(t->buf_len) : NULL;
    t->n_iov = 0;
    if (t->buf_len == 0)
        return;
    struct iovec iov = {t->buf, t->buf_len};
    if (!t->buf || node_preadv(n, &iov, 1, t->rq.off + d, t->buf_len) < 0) {
        nbd_task_abandon(t);
        return;
    }
    if (h < head)
        add_piece(t, (char *)t->iov[0].iov_base + h, head - h);
    add_piece(t, t->buf, t->buf_len);
}

/* A long read of cached data need not pass through our memory. False: it has to. */
static bool read_straight(struct nbd_task *t, struct node *n, bool structured)
{
    uint64_t at;
    struct io_file *f = node_cached_file(n, t->rq.off, t->rq.len, &at);
    if (!f)
        return false;
    reply_data(t, structured);
    if (!nbd_task_send_file(t, f, at))
        return false;
    read_rest(t, n);
    return true;
}

static int do_read(struct nbd_task *t, struct node *n, bool structured)
{
    uint64_t end = t->rq.off + t->rq.len;
    int r = 0;
    if (t->rq.flags & NBD_FLAG_FUA)
        r = node_flush(n); /* not defined for reads; the cautious reading */
    if (r < 0 || t->rq.len == 0)
        return r;
    if (structured && !(t->rq.flags & NBD_FLAG_DF) && t->rq.len >= SPARSE_READ) {
        bool hole;
        look(nbd_task_context(t), n, t->rq.off, &end, &hole);
        if (hole || end < t->rq.off + t->rq.len)
            return read_chunks(t, n, end, hole);
    }
    if (t->rq.len >= SEND_FILE_MIN && read_straight(t, n, structured))
        return 0;
    r = read_buf(t);
    if (r == 0)
        r = read_piece(t, n, t->rq.off, t->rq.len);
    if (r == 0)
        reply_data(t, structured);
    return r;
}

/* Between two pieces of a long request: others have their turn, and a closed gate closes. *n is the
 * node as it is now. */
static int between_pieces(struct nbd_task *t, struct node **n)
{
    struct nbd_context *x = nbd_task_context(t);
    loop_pause();
    nbd_task_yield_gate(t);
    *n = root_node(x->root);
    /* The reader may have its hands full and not see that nobody is there any more. */
    x->left |= !x->goodbye && io_sock_gone(x->conn->sock);
    return nbd_is_cut(x) ? -ESHUTDOWN : 0;
}

/* Reads the beginning of [off, end) into `buf`, or passes a hole, in which there is nothing to
 * cache; *done says how much of it that was. */
static int cache_piece(struct node *n, uint64_t off, uint64_t end, struct iovec *buf,
                       uint64_t *done)
{
    struct extent e;
    int r = node_extent(n, off, end - off, &e);
    if (r < 0)
        return r;
    *done = e.len;
    if (!e.data && e.zero)
        return 0;
    struct iovec iov = {buf->iov_base, MIN(buf->iov_len, e.len)};
    *done = iov.iov_len;
    return node_preadv(n, &iov, 1, off, iov.iov_len);
}

/* Bring it into the caches below, and through copy-on-read. */
static int do_cache(struct nbd_task *t, struct node *n)
{
    uint64_t off = t->rq.off, end = off + t->rq.len, done;
    size_t size = MIN((uint64_t)CACHE_PIECE, t->rq.len);
    if (size == 0)
        return 0;
    void *buf = io_buf_get(size);
    int r = buf ? 0 : -ENOMEM;
    /* Nothing would be missed if it were not done: it ends with a goodbye too. */
    while (r == 0 && off < end && !nbd_task_context(t)->goodbye) {
        r = cache_piece(n, off, end, &(struct iovec){buf, size}, &done);
        off += done;
        if (r == 0 && off < end)
            r = between_pieces(t, &n); /* a node that is smaller now refuses the next piece */
    }
    if (buf)
        io_buf_put(buf, size);
    return r;
}

/* ------------------------------------------------------------------ writes */

static bool is_fua(struct nbd_task *t)
{
    return t->rq.flags & NBD_FLAG_FUA || nbd_task_context(t)->exp->writethrough;
}

/* Direct I/O wants aligned memory, which a place in the receive buffer is not. */
static int align_payload(struct nbd_task *t)
{
    t->buf = io_buf_get(t->rq.len);
    if (!t->buf)
        return -ENOMEM;
    t->buf_len = t->rq.len;
    memcpy(t->buf, t->payload, t->rq.len);
    t->payload = t->buf;
    return 0;
}

static int do_write(struct nbd_task *t, struct node *n)
{
    int r = 0;
    if (t->rq.len == 0)
        return is_fua(t) ? node_flush(n) : 0;
    if (node_align(n) > 1 && !t->buf)
        r = align_payload(t);
    if (r < 0)
        return r;
    struct iovec iov = {(void *)t->payload, t->rq.len};
    return node_pwritev(n, &iov, 1, t->rq.off, t->rq.len, is_fua(t) ? NODE_FUA : 0);
}

static int zero_piece(struct nbd_task *t, struct node *n, uint64_t off, uint64_t len)
{
    if (t->rq.cmd == NBD_CMD_TRIM)
        return node_discard(n, off, len);
    unsigned flags = t->rq.flags & NBD_FLAG_NO_HOLE ? 0 : NODE_UNMAP;
    if (t->rq.flags & NBD_FLAG_FAST_ZERO)
        flags |= NODE_FAST_ZERO;
    return node_zero(n, off, len, flags);
}

/* TRIM and WRITE_ZEROES. Durability is asked for once, at the end. */
static int do_zero(struct nbd_task *t, struct node *n)
{
    uint64_t off = t->rq.off, end = off + t->rq.len;
    int r = 0;
    while (r == 0 && off < end) {
        /* Pieces end at round places, so that only the ends of the whole can need widening. */
        uint64_t len = MIN(end - off, NODE_MAX_IO - off % NODE_MAX_IO);
        r = zero_piece(t, n, off, len);
        off += len;
        if (r == 0 && off < end)
            r = between_pieces(t, &n);
    }
    if (r == 0 && is_fua(t))
        r = node_flush(n);
    return r;
}

/* ------------------------------------------------------------------ block status */

static int do_block_status(struct nbd_task *t, struct node *n)
{
    size_t len;
    uint8_t *body;
    if (nbd_task_context(t)->conn->n_contexts == 0)
        return refuse(t, -EINVAL, "no metadata context was negotiated");
    if (t->rq.payload && !t->payload)
        return refuse(t, -EINVAL, "the payload is not a length and ids of negotiated contexts");
    if (t->rq.len == 0)
        return refuse(t, -EINVAL, "block status of nothing: the length is 0");
    int r = nbd_block_status(t, n, &body, &len);
    if (r == -EINVAL && t->payload)
        return refuse(t, r, "the payload names a context twice or one that was not negotiated");
    if (r < 0)
        return r;
    t->mem = body;
    t->mem_len = len;
    t->iov = t->small;
    t->n_iov = 0;
    add_piece(t, body, len);
    return 0;
}

/* ------------------------------------------------------------------ checks */

static bool is_writing(unsigned cmd)
{
    return cmd == NBD_CMD_WRITE || cmd == NBD_CMD_TRIM || cmd == NBD_CMD_WRITE_ZEROES;
}

static unsigned flags_of(const struct nbd_conn *c, unsigned cmd)
{
    unsigned payload = c->extended ? NBD_FLAG_PAYLOAD_LEN : 0;
    switch (cmd) {
    case NBD_CMD_READ:
        return NBD_FLAG_FUA | (c->structured ? NBD_FLAG_DF : 0);
    case NBD_CMD_WRITE:
        return NBD_FLAG_FUA | payload;
    case NBD_CMD_WRITE_ZEROES:
        return NBD_FLAG_FUA | NBD_FLAG_NO_HOLE | NBD_FLAG_FAST_ZERO;
    case NBD_CMD_BLOCK_STATUS:
        return NBD_FLAG_FUA | NBD_FLAG_REQ_ONE | payload;
    default:
        return NBD_FLAG_FUA;
    }
}

/* What can be seen without the node. */
static int check_form(struct nbd_task *t)
{
    const struct nbd_request *rq = &t->rq;
    unsigned unknown = rq->flags & ~flags_of(nbd_task_context(t)->conn, rq->cmd);
    if (rq->cmd > NBD_CMD_BLOCK_STATUS)
        return refuse(t, -EINVAL, "this command is not known here");
    if (rq->payload == NBD_PAYLOAD_LOST && !(rq->flags & NBD_FLAG_PAYLOAD_LEN))
        return refuse(t, -EINVAL, "a write with extended headers has to set PAYLOAD_LEN");
    if (rq->payload > NBD_MAX_PAYLOAD)
        return refuse(t, -EINVAL, "the payload is longer than 32 MiB");
    if (unknown == NBD_FLAG_PAYLOAD_LEN && rq->payload)
        return refuse(t, -EINVAL, "this command takes no payload");
    if (unknown)
        return refuse(t, -EINVAL, "the request has flags that are not known for this command");
    if (rq->cmd == NBD_CMD_READ && rq->len > NBD_MAX_PAYLOAD)
        return refuse(t, -EINVAL, "the request is longer than 32 MiB");
    return 0;
}

static int check(struct nbd_task *t, struct node *n)
{
    const struct nbd_request *rq = &t->rq;
    const struct nbd_context *x = nbd_task_context(t);
    const struct nbd_export *e = x->exp;
    int r = check_form(t);
    if (r < 0)
        return r;
    /* What waited at the gate while its export was deleted comes too late. */
    if (atomic_load_explicit(&x->conn->cut, memory_order_relaxed))
        return -ESHUTDOWN;
    if (is_writing(rq->cmd) && (!e->writable || node_read_only(n)))
        return refuse(t, -EPERM, "the export is read-only");
    if (!range_in(rq->off, rq->len, node_size(n)))
        return refuse(
            t, rq->cmd == NBD_CMD_WRITE || rq->cmd == NBD_CMD_WRITE_ZEROES ? -ENOSPC : -EINVAL,
            "the request reaches past the end of the export");
    return t->error;
}

/* ------------------------------------------------------------------ the whole */

static int run(struct nbd_task *t, struct node *n, bool structured)
{
    switch (t->rq.cmd) {
    case NBD_CMD_READ:
        return do_read(t, n, structured);
    case NBD_CMD_WRITE:
        return do_write(t, n);
    case NBD_CMD_FLUSH:
        return node_flush(n);
    case NBD_CMD_CACHE:
        return do_cache(t, n);
    case NBD_CMD_TRIM:
    case NBD_CMD_WRITE_ZEROES:
        return do_zero(t, n);
    case NBD_CMD_BLOCK_STATUS:
        return do_block_status(t, n);
    default:
        return -EINVAL; /* check() has refused it */
    }
}

void nbd_task_run(struct nbd_task *t)
{
    struct nbd_context *x = nbd_task_context(t);
    struct node *n = root_node(x->root);
    bool structured = x->conn->structured;
    if (t->rq.cmd == NBD_CMD_BLOCK_STATUS && t->rq.payload)
        t->rq.len = t->payload ? get_be64(t->payload) : 0;
    int r = check(t, n);
    if (r == 0)
        r = run(t, n, structured);
    if (r < 0)
        reply_error(t, structured, r);
    else if (t->n_iov == 0 && !t->sent)
        reply_done(t, structured);
    assert(t->n_iov > 0 || t->sent);
}
