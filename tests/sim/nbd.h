/* SPDX-License-Identifier: Apache-2.0 */
/* A tiny NBD client: one export, several requests in flight, simple or structured replies. It
 * belongs to one coroutine. */
#pragma once
#include "export/nbd/proto.h"
#include "world.h"

#define NBD_DEPTH 8u

#define NBD_CONTEXTS 2u

/* A piece of a block status. */
struct nbd_extent {
    unsigned context; /* its place among those that were asked for */
    uint64_t off, len;
    uint32_t flags;
};

struct nbd_op {
    bool used;
    uint64_t cookie, off, len;
    uint64_t began; /* io_now() */
    enum nbd_cmd cmd;
    unsigned flags;
    int error;                 /* errno of the wire */
    uint8_t *data;             /* reads: what came; owned by the op */
    uint64_t came;             /* reads: how much of it has */
    struct nbd_extent *extent; /* block status; owned by the op */
    unsigned n_extents;
};

struct nbd_client {
    struct io_sock *sock;
    bool structured;
    bool may_lose, lost; /* the server may go away, is gone: nothing more is sent or received */
    bool refused;        /* an option was */
    unsigned flags;      /* of the transmission */
    uint64_t size, cookie;
    unsigned n_contexts; /* that were granted */
    uint32_t context_id[NBD_CONTEXTS];
    unsigned n_used;
    struct nbd_op op[NBD_DEPTH];
};

/* Handshake with GO. */
co_fn void nbd_open(struct nbd_client *c, const char *export, bool structured);
/* The same, but the server may refuse, or go away now or later. False: it is gone, and all is
 * closed. `contexts`: names of metadata contexts, NULL: none; `n` of them, needs `structured`. */
co_fn bool nbd_try_open(struct nbd_client *c, const char *export, bool structured,
                        const char *const *contexts, unsigned n);
co_fn void nbd_close(struct nbd_client *c); /* nothing is in flight, or lost */
/* Says goodbye while requests are in flight: they are received as ever, then the client is lost. */
co_fn void nbd_goodbye(struct nbd_client *c);
/* Hangs up, whatever is in flight: what became of that nobody will know. */
void nbd_hang_up(struct nbd_client *c);
/* A write of which only the header and the first bytes are sent. */
co_fn void nbd_send_cut_off(struct nbd_client *c, uint64_t off, uint64_t len, const void *data,
                            uint64_t sent);
/* Send a request; n_used < NBD_DEPTH. `data` for writes, borrowed. */
co_fn struct nbd_op *nbd_send(struct nbd_client *c, enum nbd_cmd cmd, unsigned flags, uint64_t off,
                              uint64_t len, const void *data);
/* The next request that is answered; still used until nbd_done(). NULL: lost. */
co_fn struct nbd_op *nbd_recv(struct nbd_client *c);
void nbd_done(struct nbd_client *c, struct nbd_op *op);
/* Send and wait; nothing else is in flight. 0 or the wire's errno; `data` is filled or written. */
co_fn int nbd_call(struct nbd_client *c, enum nbd_cmd cmd, unsigned flags, uint64_t off,
                   uint64_t len, void *data);
