/* SPDX-License-Identifier: Apache-2.0 */
/* Private interface of the NBD server.
 *
 *   server.c     listens, counts connections, ends handshakes that take too long
 *   handshake.c  option haggling, on the control loop, where the table of exports is
 *   serve.c      transmission: reads requests, admits them, sends replies, on a data loop
 *   command.c    what one request does and what its reply looks like
 *   meta.c       metadata contexts: which exist, and what BLOCK_STATUS says
 *
 * A connection is one coroutine on the control loop from accept to close. While the client is
 * served, that coroutine waits for the one on the data loop, so connections and exports are taken
 * apart in one place only. */
#pragma once
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/queue.h>

#include "base/error.h"
#include "export/nbd/proto.h"
#include "io/io.h"

struct dirty_bitmap;
struct graph;
struct node;
struct root;

#define NBD_HANDSHAKE_NS (UINT64_C(10) * 1000000000) /* from accept to the end of the handshake */
#define NBD_MAX_OPTIONS 4096u                        /* one client may send */
#define NBD_MAX_OPTION_LEN (256u << 10)              /* longer ones are read past and refused */
#define NBD_MAX_HAGGLE (8u << 20)                    /* bytes of options from one client */

/* One export, as connections see it. Embedded in export.c's struct, which owns what it points to;
 * everything above the line is fixed before the export is attached. */
struct nbd_export {
    const char *name;
    const char *description; /* NULL: none */
    uint64_t serial;         /* never used again: tells an export from a later one of its name */
    struct root *root;
    struct loop *loop; /* where its connections are served; NULL: dealt out */
    bool writable, writethrough, allocation_depth;
    unsigned n_bitmaps;
    struct dirty_bitmap **bitmaps;
    unsigned *by_name, n_buckets; /* index + 1, by a hash of the name; 0: free */
    /* A shut export has lost its last connection. Control loop, in a coroutine; may free `e`. */
    void (*gone)(struct nbd_export *e);
    /* ---- control loop only ---- */
    bool shut;   /* its connections are cut off, gone() follows the last one */
    bool hidden; /* nobody finds it */
    unsigned n_conns;
    TAILQ_ENTRY(nbd_export) link;
};

struct nbd_conn {
    struct nbd_server *srv;
    struct io_sock *sock;
    TAILQ_ENTRY(nbd_conn) link;
    uint64_t deadline;      /* of the handshake; 0 once it is over */
    struct nbd_export *exp; /* counted in exp->n_conns */
    uint64_t haggled;       /* bytes of options so far */
    bool fixed, no_zeroes;
    bool structured; /* replies come in chunks, that is, also: */
    bool extended;   /* with extended headers */
    atomic_bool cut; /* by the server or the end of the export: long requests stop */
    /* Contexts chosen by SET_META_CONTEXT: one byte each, by context id; n_contexts 0: none. */
    uint8_t *contexts;
    unsigned n_contexts, n_chosen;
    uint64_t contexts_serial; /* the export they were chosen for */
    struct io_event served;   /* the data loop is done with us */
};

TAILQ_HEAD(nbd_exports, nbd_export);
TAILQ_HEAD(nbd_conns, nbd_conn);

struct nbd_server {
    struct io *io;
    struct graph *graph;
    struct io_sock *listener;
    unsigned max_connections; /* 0: no limit */
    unsigned n_conns;
    unsigned n_running; /* coroutines that are not connections: acceptor, watchdog */
    uint64_t warn_at;   /* a client that cannot be taken is worth a line again */
    bool held;          /* clients wait in the backlog until nbd_server_release() */
    bool stopping;
    struct nbd_conns conns;     /* in the order of their deadlines */
    struct nbd_exports exports; /* oldest first */
    struct io_event room;       /* for the acceptor: a connection has ended, or stop */
    struct io_event watch;      /* for the watchdog: there is a handshake, or stop */
    struct io_event ended;      /* for nbd_server_close(): something has ended */
};

/* ---- server.c; control loop only ---- */

/* Handshakes look at the exports as queries do: not in the middle of a list (graph_query_begin). */
co_fn int nbd_server_open(struct graph *g, struct io_addr *addr, unsigned max_connections,
                          struct nbd_server **out, struct tide_error *err);
/* Serve the clients: a new server lets them wait. */
void nbd_server_release(struct nbd_server *srv);
/* No more clients from now on; those who are here are cut off. Does not wait. */
void nbd_server_shut(struct nbd_server *srv);
/* Shut before, its exports are gone: waits for what still runs and frees. */
co_fn void nbd_server_close(struct nbd_server *srv);

/* Serve a client that is connected already; the server owns the socket then. -ENOMEM. */
int nbd_server_adopt(struct nbd_server *srv, struct io_sock *sock);

/* NULL: none of that name (which is not terminated). */
struct nbd_export *nbd_export_find(struct nbd_server *srv, const char *name, size_t len);
void nbd_export_attach(struct nbd_server *srv, struct nbd_export *e);
/* Nobody finds it any more, and its connections are cut off. True: it has none, and the caller
 * calls gone(); false: the last connection will. */
bool nbd_export_shut(struct nbd_server *srv, struct nbd_export *e);

/* ---- handshake.c ---- */

/* 0: c->exp is counted and the client expects transmission; else the connection has to end. */
co_fn int nbd_handshake(struct nbd_conn *c);

/* ---- serve.c ---- */

/* Serve until the client leaves, then set c->served. On the data loop, as a coroutine's function.
 */
co_fn void nbd_serve(void *conn);

struct nbd_task;
/* Long tasks call this between pieces: lets a closed gate close, and returns when it is open. The
 * node may be another one afterwards. */
co_fn void nbd_task_yield_gate(struct nbd_task *t);

/* Send the reply straight from a file: the head that t->iov[0] holds, then rq.len bytes of `f` from
 * `off` on. Only for replies that the client is ready to take: returns how many bytes are on their
 * way, 0 if none. What is missing has to be the task's reply then; nothing is when the connection
 * is lost. The task is admitted, and stays so. */
co_fn uint64_t nbd_task_send_file(struct nbd_task *t, struct io_file *f, uint64_t off);
/* A reply that has begun cannot be finished: the connection ends. */
void nbd_task_abandon(struct nbd_task *t);

/* ---- command.c ---- */

struct nbd_rbuf;
struct nbd_session;

#define NBD_MAX_CHUNKS 16u /* of one reply to a read */
struct nbd_chunks {
    struct iovec iov[2 * NBD_MAX_CHUNKS];
    uint8_t head[NBD_MAX_CHUNKS][NBD_EXT_CHUNK_LEN + 12];
};

/* One request from its header to the last byte of its reply. */
struct nbd_task {
    struct nbd_session *s;
    struct nbd_task *next; /* free, or waiting to be sent */
    struct nbd_request rq;
    const uint8_t *payload; /* rq.payload bytes, in `pin` or in `buf`; NULL: not wanted */
    struct nbd_rbuf *pin;   /* the receive buffer that has to stay */
    void *buf;              /* io_buf_get(buf_len): the payload or a read's data */
    size_t buf_len;
    void *mem;       /* mem_alloc(): the body of a reply to BLOCK_STATUS, or struct nbd_chunks */
    size_t mem_len;  /* of such a body */
    uint64_t charge; /* bytes counted as in flight */
    int error;       /* known before it ran: -errno */
    const char *why; /* error text for the client; NULL: none */
    bool own_entry;  /* holds the gate by itself, not through its session */
    bool on_wire;    /* has sent from a file, and holds the wire until its rest is queued */
    uint64_t sent;   /* bytes of the reply that are on their way already */
    struct iovec small[2];
    struct iovec *iov; /* the reply */
    unsigned n_iov;
    uint8_t head[NBD_EXT_CHUNK_LEN + 8];
};

/* What a task may use of its session. */
struct nbd_context {
    struct nbd_conn *conn;
    struct nbd_export *exp;
    struct root *root;
    /* The last extent found that is not a hole, in this node: stays true enough. */
    uint64_t data_off, data_end;
    const struct node *data_in;
    bool left;    /* the client has gone without goodbye */
    bool goodbye; /* or with it: what it asked for is done, replies are not needed */
};
struct nbd_context *nbd_task_context(struct nbd_task *t);

/* Nobody waits for the reply any more: long tasks ask between pieces, and stop. */
static inline bool nbd_is_cut(const struct nbd_context *x)
{
    return x->left || atomic_load_explicit(&x->conn->cut, memory_order_relaxed);
}

/* Do it (admitted) and make the reply. Errors end up in the reply. */
co_fn void nbd_task_run(struct nbd_task *t);
/* Bytes that `rq` counts for while in flight, and those that it moves. */
#define NBD_LONG_COST (4 * MIB) /* of zeroing or trimming in pieces: 16 at once for a client */
uint64_t nbd_request_cost(const struct nbd_conn *c, const struct nbd_request *rq);
uint64_t nbd_request_bytes(const struct nbd_request *rq);
/* Is its payload (there is one) to be kept for the task? Any other is read past, up to
 * NBD_MAX_PAYLOAD; a longer one ends the connection after the reply. */
bool nbd_request_takes_payload(const struct nbd_conn *c, const struct nbd_request *rq);
/* The head of a reply chunk in the client's form, at most NBD_EXT_CHUNK_LEN bytes; returns its
 * length. */
static inline size_t nbd_put_chunk(const struct nbd_conn *c, uint8_t *p,
                                   const struct nbd_request *rq, unsigned flags, unsigned type,
                                   uint64_t len)
{
    if (c->extended) {
        nbd_ext_chunk_encode(p, rq, flags, type, len);
        return NBD_EXT_CHUNK_LEN;
    }
    nbd_chunk_encode(p, rq->cookie, flags, type, (uint32_t)len);
    return NBD_CHUNK_LEN;
}

/* ---- meta.c ---- */

#define NBD_CONTEXT_ALLOCATION 0u
#define NBD_CONTEXT_DEPTH 1u
#define NBD_CONTEXT_BITMAP 2u  /* + index */
#define NBD_MAX_EXTENTS 65536u /* of a reply, over all its contexts, but at least 256 each */

static inline unsigned nbd_n_contexts(const struct nbd_export *e)
{
    return NBD_CONTEXT_BITMAP + e->n_bitmaps;
}
/* Mark in `chosen` (nbd_n_contexts bytes) the context that the query names. If it may name a family
 * ("qemu:") instead, it is added to *families, for nbd_context_families() to mark in the end, once
 * for all queries. Takes the same time however many contexts there are. */
void nbd_context_match(const struct nbd_export *e, const char *query, size_t len,
                       unsigned *families, uint8_t *chosen);
void nbd_context_families(const struct nbd_export *e, unsigned families, uint8_t *chosen);
void nbd_context_all(const struct nbd_export *e, uint8_t *chosen);
/* Its name in two parts (the second may be ""). */
void nbd_context_name(const struct nbd_export *e, unsigned id, const char **prefix,
                      const char **name);

/* Room for the bitmaps of an export that is being made: -ENOMEM. No two of one name. */
int nbd_bitmaps_reserve(struct nbd_export *e, unsigned n);
void nbd_bitmaps_add(struct nbd_export *e, struct dirty_bitmap *b);
void nbd_bitmaps_free(struct nbd_export *e);
/* Its index; -1: there is none of that name (which is not terminated). */
int nbd_bitmap_find(const struct nbd_export *e, const char *name, size_t len);

/* The longest body of a reply to BLOCK_STATUS. */
uint64_t nbd_block_status_max(const struct nbd_conn *c, const struct nbd_request *rq);
/* A request that names contexts has a payload: effect length 8, then 4 bytes for each id. */
#define NBD_FILTER_LEN 8u
/* A reply to BLOCK_STATUS: chunks for every context chosen in the handshake, or of those the ones
 * that the payload names, the last one flagged DONE. *out is the caller's (mem_free). -errno;
 * -EINVAL: the payload names contexts that were not chosen, or one twice. */
co_fn int nbd_block_status(struct nbd_task *t, struct node *n, uint8_t **out, size_t *out_len);
