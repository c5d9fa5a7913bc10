/* SPDX-License-Identifier: Apache-2.0 */
/* The simulated network: byte streams between coroutines of one instance. A connection is two
 * bounded pipes; end 0 is the one that connected. Addresses are only names ("unix:PATH",
 * "tcp:HOST:PORT", "fd:N"). Bytes arrive in pieces of any size, senders wait when a pipe is full.
 */
#include "base/bytes.h"
#include "base/mem.h"
#include "io/sim_engine.h"
#include <assert.h>
#include <errno.h>
#include <stdlib.h>

#define NAME_MAX_BYTES 320

/* From end 1-i to end i is pipe[i]. */
struct pipe {
    unsigned char *buf;
    size_t cap, head, used;
    bool writer_gone, reader_gone;
};

struct sim_conn {
    struct pipe pipe[2];
    bool reset[2]; /* what end i will find out */
    bool open[2];
    char name[NAME_MAX_BYTES];
    bool is_unix;
    int pid[2];
    unsigned port;         /* TCP: of end 0 */
    struct sim_conn *next; /* in a listener's queue, or in fd_conns */
};

struct sim_sock {
    struct io_sock s;      /* first */
    struct sim_conn *conn; /* NULL: a listener */
    int end;
    bool shut;
    char name[NAME_MAX_BYTES];
    bool is_unix;
    struct sim_conn *queue; /* connected, not yet accepted; oldest first */
    unsigned n_queue, backlog;
    struct sim_sock *next;
};

struct net_op {
    struct sim_op op; /* first */
    struct sim_sock *sock;
    void *buf;
    const struct iovec *iov;
    int n_iov;
    size_t done;
    unsigned backlog;
    bool is_unix;
    int pid;               /* of who connects */
    struct sim_sock *made; /* filled in beforehand, so that no effect can fail for memory */
};

static struct net_op *net_op(struct sim_op *op)
{
    return (struct net_op *)op;
}

static struct sim *sim_of(struct sim_sock *k)
{
    return (struct sim *)k->s.io;
}

/* ------------------------------------------------------------------ connections and sockets */

static void conn_free(struct sim_conn *c)
{
    free(c->pipe[0].buf);
    free(c->pipe[1].buf);
    free(c);
}

static struct sim_conn *conn_new(struct sim *s, const char *name, int client_pid)
{
    struct sim_conn *c = sim_alloc(sizeof *c);
    for (int i = 0; i < 2; i++) {
        c->pipe[i].cap = s->cfg.sock_buffer;
        c->pipe[i].buf = sim_alloc(c->pipe[i].cap);
        c->open[i] = true;
        c->pid[i] = s->cfg.pid;
    }
    c->pid[0] = client_pid;
    c->port = s->next_port++;
    snprintf(c->name, sizeof c->name, "%s", name);
    return c;
}

/* Nothing yet: neither a listener (no name) nor the end of a connection. */
static struct sim_sock *sock_new(struct sim *s)
{
    struct sim_sock *k = mem_zalloc(sizeof *k);
    if (!k)
        return NULL;
    k->s.io = &s->io;
    k->next = s->socks;
    s->socks = k;
    return k;
}

static void sock_join(struct sim_sock *k, struct sim_conn *c, int end)
{
    k->conn = c;
    k->end = end;
    k->is_unix = c->is_unix;
    memcpy(k->name, c->name, sizeof k->name);
}

static void conn_reset(struct sim_conn *c)
{
    for (int i = 0; i < 2; i++) {
        c->reset[i] = true;
        c->pipe[i].used = 0;
    }
}

static void end_writing(struct sim_conn *c, int end)
{
    c->pipe[1 - end].writer_gone = true;
    c->pipe[end].reader_gone = true;
}

static void conn_close(struct sim_conn *c, int end)
{
    end_writing(c, end);
    if (c->pipe[end].used) /* thrown away unread: the other side is told */
        c->reset[1 - end] = true;
    c->open[end] = false;
    if (!c->open[0] && !c->open[1])
        conn_free(c);
}

static void free_queue(struct sim_sock *k)
{
    while (k->queue) {
        struct sim_conn *c = k->queue;
        k->queue = c->next;
        c->reset[0] = true;
        conn_close(c, 1);
    }
}

static void sock_free(struct sim_sock *k)
{
    free_queue(k);
    if (k->conn)
        conn_close(k->conn, k->end);
    mem_free(k);
}

static void sock_drop(struct sim_sock *k)
{
    struct sim_sock **at = &sim_of(k)->socks;
    while (*at != k)
        at = &(*at)->next;
    *at = k->next;
    sock_free(k);
}

void sim_sock_close(struct io_sock *sock)
{
    struct sim_sock *k = (struct sim_sock *)sock;
    sim_trace(sim_of(k), "sock-close", (uint64_t)k->end, k->conn != NULL, 0);
    sock_drop(k);
}

/* Submit an operation that fills in o->made; if it fails, there is no socket. */
static int make_sock(struct sim *s, struct net_op *o, struct io_sock **out)
{
    o->made = sock_new(s);
    if (!o->made)
        return -ENOMEM;
    int r = (int)sim_op_run(s, &o->op);
    if (r < 0)
        sock_drop(o->made);
    else
        *out = &o->made->s;
    return r;
}

void sim_socks_free(struct sim *s)
{
    while (s->socks) {
        struct sim_sock *k = s->socks;
        s->socks = k->next;
        sock_free(k);
    }
    while (s->fd_conns) {
        struct sim_conn *c = s->fd_conns;
        s->fd_conns = c->next;
        conn_close(c, 0);
    }
}

void sim_shutdown(struct io_sock *sock)
{
    struct sim_sock *k = (struct sim_sock *)sock;
    sim_trace(sim_of(k), "shutdown", (uint64_t)k->end, k->conn != NULL, 0);
    k->shut = true;
    if (k->conn)
        end_writing(k->conn, k->end);
}

/* ------------------------------------------------------------------ names */

static bool is_any_host(const char *host)
{
    return !*host || !strcmp(host, "0.0.0.0") || !strcmp(host, "::") || !strcmp(host, "*");
}

static const char *plain_host(const char *host)
{
    if (is_any_host(host))
        return "*";
    return !strcmp(host, "localhost") || !strcmp(host, "::1") ? "127.0.0.1" : host;
}

static int addr_name(const struct io_addr *a, char out[NAME_MAX_BYTES])
{
    switch (a->type) {
    case IO_ADDR_UNIX:
        if (!a->path[0] || (a->path[0] == '@' && !a->path[1]))
            return -EINVAL;
        snprintf(out, NAME_MAX_BYTES, "unix:%.*s", (int)sizeof a->path, a->path);
        return 0;
    case IO_ADDR_TCP:
        snprintf(out, NAME_MAX_BYTES, "tcp:%s:%s", plain_host(a->host), a->port);
        return 0;
    case IO_ADDR_FD:
        snprintf(out, NAME_MAX_BYTES, "fd:%d", a->fd);
        return 0;
    }
    return -EINVAL;
}

static struct sim_sock *find_listener(struct sim *s, const char *name)
{
    for (struct sim_sock *k = s->socks; k; k = k->next)
        if (!k->conn && !k->shut && strcmp(k->name, name) == 0)
            return k;
    return NULL;
}

/* Who connects to a host also finds whoever listens on all of them. */
static struct sim_sock *find_server(struct sim *s, const char *name)
{
    struct sim_sock *k = find_listener(s, name);
    const char *port = strrchr(name, ':');
    char any[NAME_MAX_BYTES];
    if (k || strncmp(name, "tcp:", 4) != 0)
        return k;
    snprintf(any, sizeof any, "tcp:*%s", port);
    return find_listener(s, any);
}

/* ------------------------------------------------------------------ listen, connect, accept */

static bool listen_effect(struct sim_op *op)
{
    struct net_op *o = net_op(op);
    if (find_listener(op->sim, op->name)) {
        op->result = -EADDRINUSE;
        return true;
    }
    struct sim_sock *k = o->made;
    snprintf(k->name, sizeof k->name, "%s", op->name);
    k->backlog = o->backlog;
    k->is_unix = o->is_unix;
    return true;
}

int sim_listen(struct io *io, struct io_addr *addr, int backlog, struct io_sock **out,
               struct tide_error *err)
{
    struct sim *s = (struct sim *)io;
    char name[NAME_MAX_BYTES];
    if (addr->type == IO_ADDR_TCP && strcmp(addr->port, "0") == 0)
        snprintf(addr->port, sizeof addr->port, "%u", s->next_port++);
    int r = addr_name(addr, name);
    if (r < 0)
        return tide_fail(err, r, "socket path is empty");
    struct net_op o = {.op = {.kind = SIM_LISTEN, .name = name, .effect = listen_effect},
                       .backlog = backlog > 0 ? (unsigned)backlog : 1,
                       .is_unix = addr->type == IO_ADDR_UNIX};
    r = make_sock(s, &o, out);
    return r < 0 ? tide_fail(err, r, "cannot listen on '%s': %s", name, tide_strerror(-r)) : 0;
}

/* A full queue makes the caller wait; nobody there is answered at once. */
static bool connect_ready(const struct sim_op *op)
{
    struct sim_sock *k = find_server(op->sim, op->name);
    return !k || k->n_queue < k->backlog;
}

static bool connect_effect(struct sim_op *op)
{
    struct net_op *o = net_op(op);
    struct sim_sock *k = find_server(op->sim, op->name);
    if (!k) {
        op->result = o->is_unix ? -ENOENT : -ECONNREFUSED;
        return true;
    }
    struct sim_conn *c = conn_new(op->sim, op->name, o->pid), **at = &k->queue;
    c->is_unix = o->is_unix;
    while (*at)
        at = &(*at)->next;
    *at = c;
    k->n_queue++;
    sock_join(o->made, c, 0);
    return true;
}

int sim_connect(struct io *io, const struct io_addr *addr, struct io_sock **out)
{
    struct sim *s = (struct sim *)io;
    char name[NAME_MAX_BYTES];
    int r = addr_name(addr, name);
    if (r < 0)
        return r;
    struct net_op o = {
        .op = {.kind = SIM_CONNECT, .name = name, .ready = connect_ready, .effect = connect_effect},
        .is_unix = addr->type == IO_ADDR_UNIX,
        .pid = s->client_pid};
    return make_sock(s, &o, out);
}

static bool accept_ready(const struct sim_op *op)
{
    const struct sim_sock *k = ((const struct net_op *)op)->sock;
    return k->shut || k->queue;
}

static bool accept_effect(struct sim_op *op)
{
    struct net_op *o = net_op(op);
    struct sim_sock *k = o->sock;
    if (k->shut) {
        op->result = -ECANCELED;
        return true;
    }
    struct sim_conn *c = k->queue;
    k->queue = c->next;
    k->n_queue--;
    c->next = NULL;
    sock_join(o->made, c, 1);
    return true;
}

int sim_accept(struct io_sock *listener, struct io_sock **out)
{
    struct sim_sock *k = (struct sim_sock *)listener;
    if (k->conn)
        return -EINVAL;
    struct net_op o = {.op = {.kind = SIM_ACCEPT,
                              .name = k->name,
                              .may_inline = true,
                              .ready = accept_ready,
                              .effect = accept_effect},
                       .sock = k};
    return make_sock(sim_of(k), &o, out);
}

/* ------------------------------------------------------------------ pipes */

static void pipe_put(struct pipe *p, const unsigned char *from, size_t n)
{
    for (size_t i = 0; i < n;) {
        size_t at = (p->head + p->used) % p->cap, k = MIN(n - i, p->cap - at);
        memcpy(p->buf + at, from + i, k);
        p->used += k;
        i += k;
    }
}

static void pipe_take(struct pipe *p, unsigned char *to, size_t n)
{
    for (size_t i = 0; i < n;) {
        size_t k = MIN(n - i, p->cap - p->head);
        memcpy(to + i, p->buf + p->head, k);
        p->head = (p->head + k) % p->cap;
        p->used -= k;
        i += k;
    }
}

/* How much of `most` goes at once: mostly all of it, but any piece is possible. */
static size_t some_of(struct sim *s, size_t most)
{
    return sim_percent(&s->order, 60) ? most : 1 + (size_t)sim_below(&s->order, most);
}

/* ------------------------------------------------------------------ receive */

static bool recv_ready(const struct sim_op *op)
{
    const struct sim_sock *k = ((const struct net_op *)op)->sock;
    const struct pipe *p = &k->conn->pipe[k->end];
    return k->shut || p->used || p->writer_gone || k->conn->reset[k->end] || op->len == 0;
}

/* An error that a test or the dice have put on this operation. */
static bool injected(struct sim_op *op, struct sim_sock *k)
{
    if (!op->err)
        return false;
    if (op->err == -ECONNRESET)
        conn_reset(k->conn);
    op->result = op->err;
    return true;
}

static bool recv_effect(struct sim_op *op)
{
    struct net_op *o = net_op(op);
    struct sim_sock *k = o->sock;
    struct pipe *p = &k->conn->pipe[k->end];
    if (injected(op, k))
        return true;
    if (k->shut) {
        op->result = -ECANCELED;
    } else if (op->len && p->used) {
        size_t n = some_of(op->sim, MIN(op->len, p->used));
        pipe_take(p, o->buf, n);
        op->result = (int64_t)n;
        sim_trace(op->sim, "data", op->number, sim_data_hash(o->buf, n), n);
    } else if (op->len && k->conn->reset[k->end]) {
        op->result = -ECONNRESET;
    }
    return true;
}

ssize_t sim_recv(struct io_sock *sock, void *buf, size_t len, bool now)
{
    struct sim_sock *k = (struct sim_sock *)sock;
    struct sim *s = sim_of(k);
    if (!k->conn)
        return -ENOTCONN;
    struct net_op o = {.op = {.kind = SIM_RECV,
                              .name = k->name,
                              .len = len,
                              .may_inline = true,
                              .own_errors = true,
                              .ready = recv_ready,
                              .effect = recv_effect},
                       .sock = k,
                       .buf = buf};
    if (!now)
        return (ssize_t)sim_op_run(s, &o.op);
    o.op.sim = s; /* what is on its way may not have come yet */
    bool late = !k->shut && sim_percent(&s->order, 10);
    if (late || !recv_ready(&o.op))
        o.op.result = -EAGAIN;
    else
        recv_effect(&o.op);
    sim_trace(s, "recv-now", (uint64_t)o.op.result, len, 0);
    return (ssize_t)o.op.result;
}

/* ------------------------------------------------------------------ send */

static bool send_ready(const struct sim_op *op)
{
    const struct sim_sock *k = ((const struct net_op *)op)->sock;
    const struct pipe *p = &k->conn->pipe[1 - k->end];
    return k->shut || p->used < p->cap || p->reader_gone || k->conn->reset[k->end];
}

/* The next piece into the pipe, at most what is free. */
static void send_piece(struct net_op *o, struct pipe *p)
{
    size_t skip = o->done, left = some_of(o->op.sim, MIN(o->op.len - o->done, p->cap - p->used));
    uint64_t hash = 0;
    o->done += left;
    for (int i = 0; i < o->n_iov && left; i++) {
        size_t have = o->iov[i].iov_len;
        if (skip >= have) {
            skip -= have;
            continue;
        }
        const unsigned char *from = (const unsigned char *)o->iov[i].iov_base + skip;
        size_t n = MIN(have - skip, left);
        hash = hash * 31 + sim_data_hash(from, n);
        pipe_put(p, from, n);
        left -= n;
        skip = 0;
    }
    sim_trace(o->op.sim, "data", o->op.number, hash, o->done);
}

static bool send_effect(struct sim_op *op)
{
    struct net_op *o = net_op(op);
    struct sim_sock *k = o->sock;
    struct pipe *p = &k->conn->pipe[1 - k->end];
    if (injected(op, k))
        return true;
    if (k->shut)
        op->result = -ECANCELED;
    else if (k->conn->reset[k->end])
        op->result = -ECONNRESET;
    else if (p->reader_gone)
        op->result = -EPIPE;
    else if (o->done < op->len)
        send_piece(o, p);
    return op->result < 0 || o->done == op->len;
}

int sim_send(struct io_sock *sock, const struct iovec *iov, int n)
{
    struct sim_sock *k = (struct sim_sock *)sock;
    if (!k->conn)
        return -ENOTCONN;
    struct net_op o = {.op = {.kind = SIM_SEND,
                              .name = k->name,
                              .may_inline = true,
                              .own_errors = true,
                              .ready = send_ready,
                              .effect = send_effect},
                       .sock = k,
                       .iov = iov,
                       .n_iov = n};
    for (int i = 0; i < n; i++)
        o.op.len += iov[i].iov_len;
    return (int)sim_op_run(sim_of(k), &o.op);
}

bool sim_gone(struct io_sock *sock)
{
    const struct sim_sock *k = (const struct sim_sock *)sock;
    return k->conn && (k->conn->reset[k->end] || k->conn->pipe[k->end].writer_gone);
}

/* The engine may say no at any time, and what it does is what a read and a send would do, as far as
 * the pipe has room. */
ssize_t sim_send_file(struct io_sock *sock, struct iovec head, struct io_file *f, uint64_t off,
                      uint64_t len, uint64_t deadline)
{
    struct sim_sock *k = (struct sim_sock *)sock;
    struct sim *s = sim_of(k);
    if (!k->conn || sim_percent(&s->order, 20))
        return -EOPNOTSUPP;
    mem_autofree char *buf = mem_alloc(head.iov_len + len);
    if (!buf)
        return -EOPNOTSUPP;
    struct iovec data = {buf + head.iov_len, len};
    ssize_t r = sim_preadv(f, &data, 1, off);
    if (r <= 0)
        return -EOPNOTSUPP;
    memcpy(buf, head.iov_base, head.iov_len);
    const struct pipe *p = &k->conn->pipe[1 - k->end];
    if (p->used == p->cap && !k->shut) {
        io_event_wait(&(struct io_event)IO_EVENT_INIT, deadline);
        return 0;
    }
    size_t free = MAX(p->cap - p->used, (size_t)1); /* an error wants to be seen */
    struct iovec piece = {buf, some_of(s, MIN(head.iov_len + (size_t)r, free))};
    int sent = sim_send(sock, &piece, 1);
    return sent < 0 ? sent : (ssize_t)piece.iov_len;
}

/* ------------------------------------------------------------------ who is there, terminals */

void sim_peer(struct io_sock *sock, char *buf, size_t len)
{
    struct sim_sock *k = (struct sim_sock *)sock;
    if (!k->conn)
        snprintf(buf, len, "%s", k->name);
    else if (k->is_unix)
        snprintf(buf, len, "%s pid %d", k->name, k->conn->pid[1 - k->end]);
    else if (strncmp(k->name, "tcp:", 4) == 0 && k->end == 1)
        snprintf(buf, len, "127.0.0.1:%u", k->conn->port);
    else
        snprintf(buf, len, "%s", strncmp(k->name, "tcp:", 4) ? k->name : k->name + 4);
}

int sim_peer_pid(struct io_sock *sock)
{
    struct sim_sock *k = (struct sim_sock *)sock;
    return k->conn && k->is_unix ? k->conn->pid[1 - k->end] : -1;
}

int sim_from_fds(struct io *io, int rfd, int wfd, struct io_sock **out)
{
    struct sim *s = (struct sim *)io;
    struct sim_sock *k = sock_new(s);
    char name[64];
    if (!k)
        return -ENOMEM;
    snprintf(name, sizeof name, "fd:%d:%d", rfd, wfd);
    struct sim_conn *c = conn_new(s, name, s->client_pid);
    c->next = s->fd_conns;
    s->fd_conns = c;
    sock_join(k, c, 1);
    *out = &k->s;
    return 0;
}

int sim_fds_peer(struct io *io, int rfd, int wfd, struct io_sock **out)
{
    struct sim *s = (struct sim *)io;
    char name[64];
    snprintf(name, sizeof name, "fd:%d:%d", rfd, wfd);
    for (struct sim_conn **at = &s->fd_conns, *c; (c = *at); at = &c->next) {
        if (strcmp(c->name, name) != 0)
            continue;
        struct sim_sock *k = sock_new(s);
        if (!k)
            return -ENOMEM;
        *at = c->next;
        c->next = NULL;
        sock_join(k, c, 0);
        *out = &k->s;
        return 0;
    }
    return -ENOENT;
}
