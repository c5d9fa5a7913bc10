/* SPDX-License-Identifier: Apache-2.0 */
/* The listener, and the life of a connection: accepted, handshake, handed to a data loop, closed.
 *
 * Two coroutines of the control loop work for the server: the acceptor, which stops taking clients
 * while `max_connections` are here (the kernel's queue holds the rest), and the watchdog, which
 * cuts off whoever has not finished the handshake in time. All deadlines are equally far away, so
 * the list of connections is in their order, and one coroutine watches them all. */
#include <errno.h>
#include <string.h>

#include "base/log.h"
#include "base/mem.h"
#include "block/node.h"
#include "export/nbd/nbd.h"

#define BACKLOG 256
#define ACCEPT_RETRY_NS 100000000u /* no descriptor or memory left: try again after this */
#define WARN_EVERY_NS 10000000000u

/* ------------------------------------------------------------------ exports */

struct nbd_export *nbd_export_find(struct nbd_server *srv, const char *name, size_t len)
{
    struct nbd_export *e;
    TAILQ_FOREACH (e, &srv->exports, link) {
        if (!e->hidden && strlen(e->name) == len && memcmp(e->name, name, len) == 0)
            return e;
    }
    return NULL;
}

void nbd_export_attach(struct nbd_server *srv, struct nbd_export *e)
{
    e->shut = e->hidden = false;
    e->n_conns = 0;
    TAILQ_INSERT_TAIL(&srv->exports, e, link);
}

/* Wakes whoever waits for its socket, and ends what would go on for long without it. */
static void cut(struct nbd_conn *c)
{
    atomic_store_explicit(&c->cut, true, memory_order_relaxed);
    io_sock_shutdown(c->sock);
}

bool nbd_export_shut(struct nbd_server *srv, struct nbd_export *e)
{
    struct nbd_conn *c;
    e->shut = true;
    TAILQ_REMOVE(&srv->exports, e, link);
    TAILQ_FOREACH (c, &srv->conns, link) {
        if (c->exp == e)
            cut(c);
    }
    return e->n_conns == 0;
}

/* ------------------------------------------------------------------ connections */

/* The caller has to leave it. */
static struct loop *loop_for(struct nbd_server *srv, struct nbd_export *e)
{
    if (!e->loop)
        return io_settle(srv->io);
    loop_settle(e->loop);
    return e->loop;
}

/* Until the client has gone. */
static co_fn int serve(struct nbd_conn *c)
{
    struct loop *l = loop_for(c->srv, c->exp);
    int r = loop_spawn(l, nbd_serve, c);
    if (r == 0)
        io_event_wait(&c->served, IO_FOREVER);
    loop_unsettle(l);
    return r;
}

static void conn_end(struct nbd_conn *c)
{
    struct nbd_server *srv = c->srv;
    struct nbd_export *e = c->exp;
    TAILQ_REMOVE(&srv->conns, c, link);
    io_sock_close(c->sock);
    mem_free(c->contexts);
    mem_free(c);
    if (e && --e->n_conns == 0 && e->shut)
        e->gone(e);
    srv->n_conns--;
    io_event_set(&srv->room);
    io_event_set(&srv->ended);
}

static void conn_main(void *arg)
{
    struct nbd_conn *c = arg;
    char peer[128];
    io_sock_peer(c->sock, peer, sizeof peer);
    int r = nbd_handshake(c);
    c->deadline = 0;
    if (r == 0 && !c->exp->shut)
        r = serve(c);
    else if (r == 0)
        r = -ESHUTDOWN;
    if (r < 0)
        log_debug("nbd", "client %s left before transmission: %s", peer, tide_strerror(-r));
    conn_end(c);
}

int nbd_server_adopt(struct nbd_server *srv, struct io_sock *sock)
{
    struct nbd_conn *c = mem_zalloc(sizeof *c);
    if (!c)
        return -ENOMEM;
    c->srv = srv;
    c->sock = sock;
    c->served = (struct io_event)IO_EVENT_INIT;
    c->deadline = io_now(srv->io) + NBD_HANDSHAKE_NS;
    int r = loop_spawn(io_loop(srv->io, 0), conn_main, c);
    if (r < 0) {
        mem_free(c);
        return r;
    }
    srv->n_conns++;
    TAILQ_INSERT_TAIL(&srv->conns, c, link);
    io_event_set(&srv->watch);
    return 0;
}

/* ------------------------------------------------------------------ acceptor and watchdog */

/* Whoever uses up our descriptors must not fill the log too. */
static void warn_now_and_then(struct nbd_server *srv, int r)
{
    uint64_t now = io_now(srv->io);
    if (now < srv->warn_at)
        return;
    srv->warn_at = now + WARN_EVERY_NS;
    log_warn("nbd", "cannot accept a connection: %s", tide_strerror(-r));
}

static void accept_one(struct nbd_server *srv)
{
    struct io_sock *sock;
    int r = io_accept(srv->listener, &sock);
    if (r == 0) {
        r = srv->stopping ? -ECANCELED : nbd_server_adopt(srv, sock);
        if (r < 0)
            io_sock_close(sock);
    }
    if (r < 0 && !srv->stopping) {
        warn_now_and_then(srv, r);
        io_event_wait(&srv->room, io_now(srv->io) + ACCEPT_RETRY_NS);
    }
}

static void acceptor(void *arg)
{
    struct nbd_server *srv = arg;
    while (!srv->stopping) {
        if (srv->held || (srv->max_connections && srv->n_conns >= srv->max_connections))
            io_event_wait(&srv->room, IO_FOREVER);
        else
            accept_one(srv);
        loop_pause(); /* a crowd at the door leaves the others their turns */
    }
    srv->n_running--;
    io_event_set(&srv->ended);
}

/* Cuts off what is over its time; returns the next deadline. */
static uint64_t watch_deadlines(struct nbd_server *srv)
{
    uint64_t now = io_now(srv->io);
    struct nbd_conn *c;
    TAILQ_FOREACH (c, &srv->conns, link) {
        if (!c->deadline)
            continue;
        if (c->deadline > now)
            return c->deadline;
        c->deadline = 0;
        io_sock_shutdown(c->sock);
    }
    return IO_FOREVER;
}

static void watchdog(void *arg)
{
    struct nbd_server *srv = arg;
    while (!srv->stopping)
        io_event_wait(&srv->watch, watch_deadlines(srv));
    srv->n_running--;
    io_event_set(&srv->ended);
}

/* ------------------------------------------------------------------ open and close */

static int start_coroutines(struct nbd_server *srv)
{
    struct loop *l = io_loop(srv->io, 0);
    int r = loop_spawn(l, watchdog, srv);
    if (r < 0)
        return r;
    srv->n_running++;
    r = loop_spawn(l, acceptor, srv);
    if (r < 0)
        return r;
    srv->n_running++;
    return 0;
}

int nbd_server_open(struct graph *g, struct io_addr *addr, unsigned max_connections,
                    struct nbd_server **out, struct tide_error *err)
{
    struct nbd_server *srv = mem_zalloc(sizeof *srv);
    if (!srv)
        return tide_fail(err, -ENOMEM, "no memory for the NBD server");
    srv->io = graph_io(g);
    srv->graph = g;
    srv->held = true;
    srv->max_connections = max_connections;
    srv->room = srv->watch = srv->ended = (struct io_event)IO_EVENT_INIT;
    TAILQ_INIT(&srv->conns);
    TAILQ_INIT(&srv->exports);
    int r = io_listen(addr, BACKLOG, &srv->listener, err);
    if (r == 0) {
        r = start_coroutines(srv);
        if (r < 0)
            tide_fail(err, r, "cannot start the NBD server: %s", tide_strerror(-r));
    }
    if (r < 0) {
        nbd_server_shut(srv);
        nbd_server_close(srv);
        return r;
    }
    *out = srv;
    return 0;
}

void nbd_server_release(struct nbd_server *srv)
{
    srv->held = false;
    io_event_set(&srv->room);
}

void nbd_server_shut(struct nbd_server *srv)
{
    struct nbd_conn *c;
    srv->stopping = true;
    if (srv->listener)
        io_sock_shutdown(srv->listener);
    TAILQ_FOREACH (c, &srv->conns, link)
        cut(c);
    io_event_set(&srv->room);
    io_event_set(&srv->watch);
}

void nbd_server_close(struct nbd_server *srv)
{
    while (srv->n_running > 0 || srv->n_conns > 0)
        io_event_wait(&srv->ended, IO_FOREVER);
    io_sock_close(srv->listener);
    mem_free(srv);
}
