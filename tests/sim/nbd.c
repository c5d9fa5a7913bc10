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
    CHECK(get_be64(head) == NBD_OPTION_REPLY_MAGIC);
    uint32_t type = get_be32(head + 12), len = get_be32(head + 16);
    CHECK(len <= sizeof body);
    get(c, body, len);
    CHECK_SAY(!(type & 0x80000000u), "NBD option refused: %.*s", (int)len, (char *)body);
    if (type == NBD_REP_INFO && get_be16(body) == NBD_INFO_EXPORT)
        c->size = get_be64(body + 2);
    return type == NBD_REP_ACK;
}

void nbd_open(struct nbd_client *c, const char *export, bool structured)
{
    struct io_addr addr = {.type = IO_ADDR_UNIX, .path = NBD_ADDR};
    uint8_t hello[18], flags[4], go[64];
    uint32_t len = (uint32_t)strlen(export);
    *c = (struct nbd_client){.structured = structured};
    CHECK(io_connect(&addr, &c->sock) == 0);
    get(c, hello, sizeof hello);
    CHECK(get_be64(hello) == NBD_MAGIC);
    put_be32(flags, NBD_FIXED_NEWSTYLE | NBD_NO_ZEROES);
    put(c, flags, sizeof flags, NULL, 0);
    if (structured) {
        ask(c, NBD_OPT_STRUCTURED_REPLY, NULL, 0);
        CHECK(take_answer(c));
    }
    CHECK(len + 6 <= sizeof go);
    put_be32(go, len);
    memcpy(go + 4, export, len);
    put_be16(go + 4 + len, 0);
    ask(c, NBD_OPT_GO, go, len + 6);
    while (!take_answer(c))
        ;
}

void nbd_close(struct nbd_client *c)
{
    uint8_t head[NBD_REQUEST_LEN] = {0};
    for (unsigned i = 0; c->lost && i < NBD_DEPTH; i++)
        if (c->op[i].used)
            nbd_done(c, &c->op[i]);
    CHECK(c->n_used == 0);
    put_be32(head, NBD_REQUEST_MAGIC);
    put_be16(head + 6, NBD_CMD_DISC);
    put(c, head, sizeof head, NULL, 0);
    io_sock_close(c->sock);
    c->sock = NULL;
}

/* ------------------------------------------------------------------ requests */

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
    put_be32(head, NBD_REQUEST_MAGIC);
    put_be16(head + 4, (uint16_t)flags);
    put_be16(head + 6, (uint16_t)cmd);
    put_be64(head + 8, op->cookie);
    put_be64(head + 16, off);
    put_be32(head + 24, (uint32_t)len);
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

static co_fn void take_chunk(struct nbd_client *c, struct nbd_op *op, unsigned type, uint32_t len)
{
    uint8_t head[12], waste[512];
    if (type == NBD_CHUNK_OFFSET_DATA) {
        get(c, head, 8);
        uint64_t off = c->lost ? op->off : get_be64(head);
        CHECK(op->data && range_in(off - op->off, len - 8, op->len));
        get(c, op->data + (off - op->off), len - 8);
    } else if (type == NBD_CHUNK_OFFSET_HOLE) {
        get(c, head, 12);
        if (!c->lost)
            CHECK(op->data && range_in(get_be64(head) - op->off, get_be32(head + 8), op->len));
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
    return op;
}

void nbd_done(struct nbd_client *c, struct nbd_op *op)
{
    free(op->data);
    op->data = NULL;
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
