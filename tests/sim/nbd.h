/* SPDX-License-Identifier: Apache-2.0 */
/* A tiny NBD client: one export, several requests in flight, simple or structured replies. It
 * belongs to one coroutine. */
#pragma once
#include "export/nbd/proto.h"
#include "world.h"

#define NBD_DEPTH 8u

struct nbd_op {
    bool used;
    uint64_t cookie, off, len;
    uint64_t began; /* io_now() */
    enum nbd_cmd cmd;
    unsigned flags;
    int error;     /* errno of the wire */
    uint8_t *data; /* reads: what came; owned by the op */
};

struct nbd_client {
    struct io_sock *sock;
    bool structured;
    bool may_lose, lost; /* the server may go away, is gone: nothing more is sent or received */
    uint64_t size, cookie;
    unsigned n_used;
    struct nbd_op op[NBD_DEPTH];
};

/* Handshake with GO. */
co_fn void nbd_open(struct nbd_client *c, const char *export, bool structured);
co_fn void nbd_close(struct nbd_client *c); /* nothing is in flight, or lost */
/* Send a request; n_used < NBD_DEPTH. `data` for writes, borrowed. */
co_fn struct nbd_op *nbd_send(struct nbd_client *c, enum nbd_cmd cmd, unsigned flags, uint64_t off,
                              uint64_t len, const void *data);
/* The next request that is answered; still used until nbd_done(). NULL: lost. */
co_fn struct nbd_op *nbd_recv(struct nbd_client *c);
void nbd_done(struct nbd_client *c, struct nbd_op *op);
/* Send and wait; nothing else is in flight. 0 or the wire's errno; `data` is filled or written. */
co_fn int nbd_call(struct nbd_client *c, enum nbd_cmd cmd, unsigned flags, uint64_t off,
                   uint64_t len, void *data);
