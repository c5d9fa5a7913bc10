/* SPDX-License-Identifier: Apache-2.0 */
/* A client is two coroutines: one reads, cuts values out of the stream and carries out one request
 * after the other; one writes what has been queued. Events are queued from wherever they happen.
 * The queue is a flat buffer; a client that lets it grow past the limit is cut off. */
#include "qmp/monitor.h"

#include <assert.h>
#include <errno.h>
#include <string.h>
#include <sys/queue.h>

#include "base/bytes.h"
#include "base/log.h"
#include "base/mem.h"
#include "event/event.h"
#include "io/io.h"
#include "qmp/dispatch.h"
#include "qmp/instance.h"
#include "qmp/long_json.h"
#include "qmp/scan.h"

#define READ_SIZE 65536u
#define NESTING_MAX 128u    /* jansson recurses, and we run on a coroutine's stack */
#define DRAIN_NS 500000000u /* how long the last answers may take to leave at the end */

struct monitor {
    struct event_sink sink; /* first */
    struct monitors *all;
    struct io_sock *sock;
    bool pretty, negotiated, oob;
    bool ending; /* nothing more is queued */
    bool reader_gone, writer_gone;
    struct scan scan;
    char *out;
    size_t out_len, out_cap;
    bool writing; /* an answer is on its way to `out` */
    bool sending; /* more is on its way than what is in `out` */
    struct io_event out_ready;
    char peer[64];
    TAILQ_ENTRY(monitor) link;
};

struct listener {
    struct monitors *all;
    struct io_sock *sock;
    bool pretty;
    TAILQ_ENTRY(listener) link;
};

struct monitors {
    struct instance *inst;
    TAILQ_HEAD(, monitor) clients;
    TAILQ_HEAD(, listener) listeners;
    unsigned n_clients, n_listeners;
    bool open; /* the daemon is up: clients that wait in the backlog are served */
    bool refuse, closing;
    struct io_event gone;
};

/* ------------------------------------------------------------------ output */

static void cut_off(struct monitor *m, const char *why)
{
    if (m->ending)
        return;
    m->ending = true;
    if (why)
        log_warn("qmp", "client %s dropped: %s", m->peer, why);
    io_sock_shutdown(m->sock);
    io_event_set(&m->out_ready);
}

static bool out_reserve(struct monitor *m, size_t more)
{
    if (m->out_len + more <= m->out_cap)
        return true;
    size_t cap = MAX(m->out_cap * 2, m->out_len + more);
    char *p = mem_realloc(m->out, 1, cap);
    if (!p)
        return false;
    m->out = p;
    m->out_cap = cap;
    return true;
}

static int append_text(const char *text, size_t len, void *arg)
{
    struct monitor *m = arg;
    if (!out_reserve(m, len))
        return -1;
    memcpy(m->out + m->out_len, text, len);
    m->out_len += len;
    return 0;
}

#define FLAGS(m) (((m)->pretty ? JSON_INDENT(4) : 0) | JSON_ENCODE_ANY)

/* What was appended since `before` is a whole message, or, failed, nothing. */
static void queued(struct monitor *m, size_t before, bool failed)
{
    if (failed || append_text("\r\n", 2, m) < 0) {
        m->out_len = before;
        cut_off(m, "out of memory for its answer");
    } else if (m->out_len > MONITOR_OUT_MAX && before) {
        cut_off(m, "it does not read its answers");
    } else {
        io_event_set(&m->out_ready);
    }
}

static void on_event(struct event_sink *s, json_t *event)
{
    struct monitor *m = (struct monitor *)s;
    size_t before = m->out_len;
    if (m->negotiated && !m->ending)
        queued(m, before, json_dump_callback(event, append_text, m, FLAGS(m)) < 0);
}

static void client_gone(struct monitor *m)
{
    struct monitors *all = m->all;
    if (!m->reader_gone || !m->writer_gone)
        return;
    event_bus_detach(all->inst->bus, &m->sink);
    TAILQ_REMOVE(&all->clients, m, link);
    all->n_clients--;
    io_sock_close(m->sock);
    scan_fini(&m->scan);
    mem_free(m->out);
    mem_free(m);
    io_event_set(&all->gone);
}

static void writer_main(void *arg)
{
    struct monitor *m = arg;
    int r = 0;
    while (r == 0 && !(m->reader_gone && !m->out_len)) {
        if (!m->out_len) {
            if (m->ending)
                break;
            io_event_wait(&m->out_ready, IO_FOREVER);
            continue;
        }
        struct iovec one = {m->out, m->out_len};
        m->out = NULL;
        m->out_len = m->out_cap = 0;
        m->sending = true;
        r = io_send(m->sock, &one, 1);
        m->sending = false;
        mem_free(one.iov_base);
    }
    m->ending = true;
    io_sock_shutdown(m->sock);
    m->writer_gone = true;
    client_gone(m);
}

/* ------------------------------------------------------------------ input */

/* Events may come in between, so it is put in the queue when it is whole. */
static co_fn void answer(struct monitor *m, json_t *reply)
{
    struct io *io = m->all->inst->io;
    char *text = NULL;
    size_t len = 0;
    m->writing = true;
    int r = reply ? long_json_dump(io, reply, FLAGS(m), &text, &len) : -ENOMEM;
    m->writing = false;
    size_t before = m->out_len;
    if (!m->ending)
        queued(m, before, r < 0 || append_text(text, len, m) < 0);
    mem_free(text);
    long_json_decref(io, reply);
}

static co_fn void handle_value(struct monitor *m)
{
    json_error_t e;
    struct io *io = m->all->inst->io;
    json_t *v = long_json_load(io, m->scan.value, m->scan.value_len, &e);
    if (!v) {
        answer(m, qmp_parse_error(e.text));
        return;
    }
    answer(m, qmp_dispatch(m->all->inst, v, m->peer, &m->negotiated, &m->oob));
    long_json_decref(io, v);
}

static co_fn void handle_bytes(struct monitor *m, const char *data, size_t len)
{
    struct tide_error err;
    int r;
    while (!m->ending && (r = scan_next(&m->scan, &data, &len, &err)) != 0) {
        if (r > 0)
            handle_value(m);
        else
            answer(m, qmp_parse_error(err.msg));
    }
}

static void reader_main(void *arg)
{
    struct monitor *m = arg;
    char *buf = mem_alloc(READ_SIZE);
    answer(m, qmp_greeting());
    while (buf && !m->ending) {
        ssize_t n = io_recv(m->sock, buf, READ_SIZE);
        if (n <= 0)
            break;
        handle_bytes(m, buf, (size_t)n);
        if (n == READ_SIZE) /* one of many pieces, it seems */
            loop_pause();
    }
    mem_free(buf);
    m->reader_gone = true;
    io_event_set(&m->out_ready);
    client_gone(m);
}

/* ------------------------------------------------------------------ clients and listeners */

int monitors_new(struct instance *inst, struct monitors **out)
{
    struct monitors *m = mem_zalloc(sizeof *m);
    if (!m)
        return -ENOMEM;
    m->inst = inst;
    TAILQ_INIT(&m->clients);
    TAILQ_INIT(&m->listeners);
    *out = m;
    return 0;
}

void monitors_free(struct monitors *m)
{
    if (!m)
        return;
    assert(TAILQ_EMPTY(&m->clients) && TAILQ_EMPTY(&m->listeners));
    mem_free(m);
}

int monitor_serve(struct monitors *all, struct io_sock *s, bool pretty, struct tide_error *err)
{
    struct loop *control = io_loop(all->inst->io, 0);
    struct monitor *m = mem_zalloc(sizeof *m);
    if (!m) {
        io_sock_close(s);
        return tide_fail(err, -ENOMEM, "no memory for a QMP client");
    }
    m->sink.fn = on_event;
    m->all = all;
    m->sock = s;
    m->pretty = pretty;
    scan_init(&m->scan);
    m->scan.max_depth = NESTING_MAX;
    io_sock_peer(s, m->peer, sizeof m->peer);
    TAILQ_INSERT_TAIL(&all->clients, m, link);
    all->n_clients++;
    event_bus_attach(all->inst->bus, &m->sink);
    int r = loop_spawn(control, writer_main, m);
    if (r < 0) {
        m->reader_gone = m->writer_gone = true;
        client_gone(m);
        return tide_fail(err, r, "no memory for a QMP client");
    }
    if (loop_spawn(control, reader_main, m) < 0) {
        m->reader_gone = true; /* the writer ends by itself */
        cut_off(m, "out of memory");
    }
    return 0;
}

static void drop_listener(struct listener *l)
{
    TAILQ_REMOVE(&l->all->listeners, l, link);
    io_sock_close(l->sock);
    mem_free(l);
}

static void listener_main(void *arg)
{
    struct listener *l = arg;
    struct monitors *all = l->all;
    struct io_sock *s;
    struct tide_error err;
    while (!all->closing) {
        int r = io_accept(l->sock, &s);
        if (r == -ECANCELED)
            break;
        if (r < 0) {
            log_warn("qmp", "accept: %s", tide_strerror(-r));
            io_sleep(100000000);
        } else if (all->n_clients >= MONITOR_CLIENTS_MAX) {
            log_warn("qmp", "a client was turned away: %u are connected", all->n_clients);
            io_sock_close(s);
        } else if (monitor_serve(all, s, l->pretty, &err) < 0) {
            log_warn("qmp", "%s", err.msg);
        }
    }
    drop_listener(l);
    io_event_set(&all->gone);
}

static int start_listener(struct listener *l)
{
    return loop_spawn(io_loop(l->all->inst->io, 0), listener_main, l);
}

int monitor_listen(struct monitors *m, struct io_addr *addr, bool pretty, struct tide_error *err)
{
    struct listener *l = mem_zalloc(sizeof *l);
    if (!l)
        return tide_fail(err, -ENOMEM, "no memory for a monitor");
    l->all = m;
    l->pretty = pretty;
    int r = io_listen(addr, 64, &l->sock, err);
    if (r < 0) {
        mem_free(l);
        return r;
    }
    TAILQ_INSERT_TAIL(&m->listeners, l, link);
    r = m->open ? start_listener(l) : 0;
    if (r < 0) {
        drop_listener(l);
        tide_fail(err, r, "no memory for a monitor");
    }
    return r;
}

int monitors_open(struct monitors *m, struct tide_error *err)
{
    struct listener *l;
    m->open = true;
    TAILQ_FOREACH (l, &m->listeners, link) {
        int r = start_listener(l);
        if (r < 0)
            return tide_fail(err, r, "no memory for a monitor");
    }
    return 0;
}

void monitors_refuse(struct monitors *m)
{
    m->refuse = true;
}

bool monitors_refusing(const struct monitors *m)
{
    return m->refuse;
}

static bool all_sent(struct monitors *m)
{
    struct monitor *c;
    TAILQ_FOREACH (c, &m->clients, link) {
        if (c->writing || c->out_len || c->sending)
            return false;
    }
    return true;
}

void monitors_close(struct monitors *m)
{
    uint64_t deadline = io_now(m->inst->io) + DRAIN_NS;
    struct listener *l;
    struct monitor *c;
    m->closing = true;
    while (!m->open && (l = TAILQ_FIRST(&m->listeners)))
        drop_listener(l); /* its coroutine was never started */
    TAILQ_FOREACH (l, &m->listeners, link)
        io_sock_shutdown(l->sock);
    while (!all_sent(m) && io_now(m->inst->io) < deadline)
        io_sleep(1000000);
    TAILQ_FOREACH (c, &m->clients, link)
        cut_off(c, NULL);
    while (!TAILQ_EMPTY(&m->clients) || !TAILQ_EMPTY(&m->listeners))
        io_event_wait(&m->gone, IO_FOREVER);
}
