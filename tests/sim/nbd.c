/* SPDX-License-Identifier: Apache-2.0 */
/* The client side of export/nbd/proto.h. */
#include "nbd.h"

#include <string.h>

static void note(struct nbd_client *c, int r)
{
    c->lost |= r < 0 && c->may_lose;
    CHECK_SAY(r == 0 || c->lost, "NBD: %d", r);
}

static co_fn void get(struct nbd_client *c, void *buf, size_t len)
{
    if (len && !c->lost)
        note(c, io_recv_all(c->sock, buf, len));
    if (c->lost)
        memset(buf, 0, len);
}

static co_fn void put(struct nbd_client *c, const void *head, size_t n, const void *data,
                      size_t len)
{
    struct iovec iov[2] = {{(void *)head, n}, {(void *)data, len}};
    if (!c->lost)
        note(c, io_send(c->sock, iov, len ? 2 : 1));
}

/* ------------------------------------------------------------------ handshake */

static co_fn void ask(struct nbd_client *c, uint32_t opt, const void *data, uint32_t len)
{
    uint8_t head[NBD_OPTION_LEN];
    put_be64(head, NBD_OPTION_MAGIC);
    put_be32(head + 8, opt);
    put_be32(head + 12, len);
    put(c, head, sizeof head, data, len);
}

/* True: that was the last answer to the option. */
static co_fn bool take_answer(struct nbd_client *c)
{
    uint8_t head[NBD_OPTION_REPLY_LEN], body[1024];
    get(c, head, sizeof head);
    uint32_t type = get_be32(head + 12), len = get_be32(head + 16);
    CHECK(c->lost || (get_be64(head) == NBD_OPTION_REPLY_MAGIC && len <= sizeof body));
    get(c, body, c->lost ? 0 : len);
    if (c->lost)
        return true;
    c->refused |= type & 0x80000000u;
    CHECK_SAY(!c->refused || c->may_lose, "NBD option refused: %.*s", (int)len, (char *)body);
    if (type == NBD_REP_INFO && get_be16(body) == NBD_INFO_EXPORT) {
        c->size = get_be64(body + 2);
        c->flags = get_be16(body + 10);
    }
    if (type == NBD_REP_META_CONTEXT) { /* they come in the server's order: ids tell them apart */
        CHECK(c->n_contexts < NBD_CONTEXTS);
        c->context_id[c->n_contexts++] = get_be32(body);
    }
    return type == NBD_REP_ACK || c->refused;
}

static uint32_t put_string(uint8_t *p, const char *s)
{
    uint32_t len = (uint32_t)strlen(s);
    put_be32(p, len);
    memcpy(p + 4, s, len);
    return len + 4;
}

/* One at a time, so that it is known which id belongs to which. Each SET starts afresh: the last
 * one asks for all of them, and has to give the same ids. */
static co_fn void ask_contexts(struct nbd_client *c, const char *export,
                               const char *const *contexts, unsigned n)
{
    uint32_t id[NBD_CONTEXTS] = {0};
    uint8_t data[256];
    CHECK(n <= NBD_CONTEXTS);
    for (unsigned k = 0; k <= n && !c->lost && !c->refused; k++) {
        unsigned first = k < n ? k : 0, stop = k < n ? k + 1 : n;
        uint32_t len = put_string(data, export);
        put_be32(data + len, stop - first);
        len += 4;
        for (unsigned i = first; i < stop; i++)
            len += put_string(data + len, contexts[i]);
        CHECK(len <= sizeof data);
        c->n_contexts = 0;
        ask(c, NBD_OPT_SET_META_CONTEXT, data, len);
        while (!take_answer(c))
            ;
        c->refused |= c->n_contexts != stop - first;
        if (k < n)
            id[k] = c->context_id[0];
    }
    memcpy(c->context_id, id, sizeof id);
}

static co_fn void shake_hands(struct nbd_client *c, const char *export, const char *const *contexts,
                              unsigned n)
{
    uint8_t hello[18], flags[4], go[64];
    get(c, hello, sizeof hello);
    CHECK(c->lost || get_be64(hello) == NBD_MAGIC);
    put_be32(flags, NBD_FIXED_NEWSTYLE | NBD_NO_ZEROES);
    put(c, flags, sizeof flags, NULL, 0);
    if (c->structured) {
        ask(c, NBD_OPT_STRUCTURED_REPLY, NULL, 0);
        CHECK(take_answer(c));
    }
    if (n)
        ask_contexts(c, export, contexts, n);
    CHECK(strlen(export) + 6 <= sizeof go);
    uint32_t len = put_string(go, export);
    put_be16(go + len, 0);
    if (!c->refused)
        ask(c, NBD_OPT_GO, go, len + 2);
    while (!c->refused && !take_answer(c))
        ;
}

void nbd_open(struct nbd_client *c, const char *export, bool structured)
{
    struct io_addr addr = {.type = IO_ADDR_UNIX, .path = NBD_ADDR};
    *c = (struct nbd_client){.structured = structured};
    CHECK(io_connect(&addr, &c->sock) == 0);
    shake_hands(c, export, NULL, 0);
}

bool nbd_try_open(struct nbd_client *c, const char *export, bool structured,
                  const char *const *contexts, unsigned n)
{
    struct io_addr addr = {.type = IO_ADDR_UNIX, .path = NBD_ADDR};
    *c = (struct nbd_client){.structured = structured, .may_lose = true};
    if (io_connect(&addr, &c->sock) < 0)
        return false;
    shake_hands(c, export, contexts, n);
    if (!c->lost && !c->refused)
        return true;
    nbd_hang_up(c);
    return false;
}

void nbd_close(struct nbd_client *c)
{
    for (unsigned i = 0; c->lost && i < NBD_DEPTH; i++)
        if (c->op[i].used)
            nbd_done(c, &c->op[i]);
    CHECK(c->n_used == 0);
    nbd_goodbye(c);
    io_sock_close(c->sock);
    c->sock = NULL;
}

void nbd_goodbye(struct nbd_client *c)
{
    uint8_t head[NBD_REQUEST_LEN] = {0};
    put_be32(head, NBD_REQUEST_MAGIC);
    put_be16(head + 6, NBD_CMD_DISC);
    put(c, head, sizeof head, NULL, 0);
}

void nbd_hang_up(struct nbd_client *c)
{
    for (unsigned i = 0; i < NBD_DEPTH; i++)
        if (c->op[i].used)
            nbd_done(c, &c->op[i]);
    io_sock_close(c->sock);
    c->sock = NULL;
    c->lost = true;
}

/* ------------------------------------------------------------------ requests */

static void encode(uint8_t head[NBD_REQUEST_LEN], enum nbd_cmd cmd, unsigned flags, uint64_t cookie,
                   uint64_t off, uint64_t len)
{
    put_be32(head, NBD_REQUEST_MAGIC);
    put_be16(head + 4, (uint16_t)flags);
    put_be16(head + 6, (uint16_t)cmd);
    put_be64(head + 8, cookie);
    put_be64(head + 16, off);
    put_be32(head + 24, (uint32_t)len);
}

void nbd_send_cut_off(struct nbd_client *c, uint64_t off, uint64_t len, const void *data,
                      uint64_t sent)
{
    uint8_t head[NBD_REQUEST_LEN];
    CHECK(sent < len);
    encode(head, NBD_CMD_WRITE, 0, ++c->cookie, off, len);
    put(c, head, sizeof head, data, sent);
}

struct nbd_op *nbd_send(struct nbd_client *c, enum nbd_cmd cmd, unsigned flags, uint64_t off,
                        uint64_t len, const void *data)
{
    uint8_t head[NBD_REQUEST_LEN];
    struct nbd_op *op = c->op;
    CHECK(c->n_used < NBD_DEPTH);
    while (op->used)
        op++;
    *op = (struct nbd_op){.used = true,
                          .cookie = ++c->cookie,
                          .off = off,
                          .len = len,
                          .cmd = cmd,
                          .flags = flags,
                          .began = io_now(loop_io(loop_self()))};
    c->n_used++;
    if (cmd == NBD_CMD_READ) {
        op->data = calloc(1, len);
        CHECK(op->data);
    }
    encode(head, cmd, flags, op->cookie, off, len);
    put(c, head, sizeof head, data, cmd == NBD_CMD_WRITE ? len : 0);
    return op;
}

static struct nbd_op *find(struct nbd_client *c, uint64_t cookie)
{
    for (unsigned i = 0; i < NBD_DEPTH; i++)
        if (c->op[i].used && c->op[i].cookie == cookie)
            return &c->op[i];
    CHECK_SAY(false, "NBD: an answer to no request");
    return NULL;
}

static co_fn void take_status(struct nbd_client *c, struct nbd_op *op, uint32_t len)
{
    uint8_t piece[8];
    unsigned k = 0, n = (len - 4) / 8;
    uint64_t off = op->off;
    CHECK(op->cmd == NBD_CMD_BLOCK_STATUS && len % 8 == 4 && n > 0);
    get(c, piece, 4);
    while (k < c->n_contexts && c->context_id[k] != get_be32(piece))
        k++;
    CHECK(c->lost || k < c->n_contexts);
    op->extent = realloc(op->extent, (op->n_extents + n) * sizeof *op->extent);
    CHECK(op->extent);
    for (; n && !c->lost; n--) {
        get(c, piece, sizeof piece);
        struct nbd_extent e = {k, off, get_be32(piece), get_be32(piece + 4)};
        op->extent[op->n_extents++] = e;
        off += e.len;
        CHECK(c->lost || (e.len && range_in(off - op->off, 0, op->len)));
    }
}

static co_fn void take_chunk(struct nbd_client *c, struct nbd_op *op, unsigned type, uint32_t len)
{
    uint8_t head[12], waste[512];
    if (type == NBD_CHUNK_OFFSET_DATA) {
        get(c, head, 8);
        uint64_t off = c->lost ? op->off : get_be64(head);
        CHECK(op->data && range_in(off - op->off, len - 8, op->len));
        get(c, op->data + (off - op->off), len - 8);
        op->came += len - 8;
    } else if (type == NBD_CHUNK_OFFSET_HOLE) {
        get(c, head, 12);
        if (!c->lost)
            CHECK(op->data && range_in(get_be64(head) - op->off, get_be32(head + 8), op->len));
        op->came += get_be32(head + 8);
    } else if (type == NBD_CHUNK_BLOCK_STATUS) {
        take_status(c, op, len);
    } else if (type != NBD_CHUNK_NONE) {
        CHECK((type & 0x8000) && len >= 6 && len <= sizeof waste);
        get(c, waste, len);
        op->error = (int)get_be32(waste);
    }
}

struct nbd_op *nbd_recv(struct nbd_client *c)
{
    uint8_t head[NBD_CHUNK_LEN];
    struct nbd_op *op;
    unsigned flags;
    CHECK(c->n_used);
    do {
        get(c, head, NBD_SIMPLE_LEN);
        if (c->lost)
            return NULL;
        op = find(c, get_be64(head + 8));
        if (get_be32(head) == NBD_SIMPLE_REPLY_MAGIC) {
            op->error = (int)get_be32(head + 4);
            if (op->data && !op->error)
                get(c, op->data, op->len);
            op->came = op->len;
            return c->lost ? NULL : op;
        }
        CHECK(c->structured && get_be32(head) == NBD_CHUNK_MAGIC);
        flags = get_be16(head + 4);
        get(c, head + NBD_SIMPLE_LEN, 4);
        if (!c->lost)
            take_chunk(c, op, get_be16(head + 6), get_be32(head + 16));
        if (c->lost)
            return NULL;
    } while (!(flags & NBD_CHUNK_DONE));
    CHECK(!op->data || op->error || op->came == op->len);
    return op;
}

void nbd_done(struct nbd_client *c, struct nbd_op *op)
{
    free(op->data);
    free(op->extent);
    op->data = NULL;
    op->extent = NULL;
    op->used = false;
    c->n_used--;
}

int nbd_call(struct nbd_client *c, enum nbd_cmd cmd, unsigned flags, uint64_t off, uint64_t len,
             void *data)
{
    struct nbd_op *sent = nbd_send(c, cmd, flags, off, len, data);
    struct nbd_op *op = nbd_recv(c);
    CHECK(op == sent);
    int error = op->error;
    if (cmd == NBD_CMD_READ && !error)
        memcpy(data, op->data, len);
    nbd_done(c, op);
    return error;
}
