/* SPDX-License-Identifier: Apache-2.0 */
/* What the tests of exports share: a daemon of one or more loops in this process, whose node "n" is
 * a file in a fresh directory or in the simulator, and a client made of bytes. The body of a test
 * is a coroutine of its control loop. Included once by each test program. */
#pragma once
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/bytes.h"
#include "base/check.h"
#include "block/node.h"
#include "block/root.h"
#include "block/tracker.h"
#include "event/event.h"
#include "export/export.h"
#include "export/nbd/nbd.h"
#include "io/sim.h"
#include "schema/types.h"

#define DISK (16 * MIB)
#define NBD_N "{\"type\":\"nbd\",\"node-name\":\"n\","

/* ------------------------------------------------------------------ a daemon */

struct world {
    struct io *io;
    struct graph *graph;
    struct event_bus *bus;
    struct event_sink sink;
    struct exports *x;
    struct io_addr addr;
    char dir[64], path[128];
    unsigned n_deleted;
    void (*body)(struct world *);
};

static inline void on_event(struct event_sink *sink, json_t *event)
{
    struct world *w = (struct world *)((char *)sink - offsetof(struct world, sink));
    CHECK(strcmp(json_string_value(json_object_get(event, "event")), "BLOCK_EXPORT_DELETED") == 0);
    w->n_deleted++;
}

static inline void *parse(const struct schema_type *type, const char *text, struct arena *a)
{
    struct tide_error err;
    void *out;
    json_t *j = json_loads(text, 0, NULL);
    CHECK(j);
    int r = schema_parse(type, j, a, 0, &out, &err);
    json_decref(j);
    if (r < 0)
        fprintf(stderr, "%s\n", err.msg);
    CHECK_EQ(r, 0);
    return out;
}

static inline void add_node(struct world *w, const char *name, bool read_only)
{
    struct arena a = {0};
    struct tide_error err;
    struct node *n;
    char text[400];
    snprintf(text, sizeof text,
             "{\"driver\":\"file\",\"node-name\":\"%s\",\"filename\":\"%s\",\"read-only\":%s,"
             "\"discard\":\"unmap\",\"locking\":\"off\"}",
             name, w->path, read_only ? "true" : "false");
    int r = graph_add(w->graph, parse(&q_blockdev_options_type, text, &a), &n, &err);
    if (r < 0)
        fprintf(stderr, "%s\n", err.msg);
    CHECK_EQ(r, 0);
    arena_free(&a);
}

static inline int try_export(struct world *w, const char *text, struct tide_error *err)
{
    struct arena a = {0};
    int r = export_add(w->x, parse(&q_block_export_options_type, text, &a), err);
    arena_free(&a);
    return r;
}

static inline void add_export(struct world *w, const char *text)
{
    struct tide_error err;
    int r = try_export(w, text, &err);
    if (r < 0)
        fprintf(stderr, "%s\n", err.msg);
    CHECK_EQ(r, 0);
}

static inline struct dirty_bitmap *add_bitmap(struct world *w, const char *node, const char *name,
                                              bool disabled)
{
    struct tide_error err;
    struct node *n = graph_find(w->graph, node);
    struct dirty_bitmap *b;
    struct quiesce *q;
    CHECK_EQ(dirty_bitmap_new(n, name, 65536, true, disabled, &b, &err), 0);
    CHECK_EQ(quiesce_begin(w->graph, &n, 1, QUIESCE_WRITES, &q, &err), 0);
    CHECK_EQ(tracker_attach(b, n), 0);
    quiesce_end(q);
    return b;
}

static inline void start_server(struct world *w, unsigned max_connections)
{
    struct tide_error err;
    CHECK_EQ(nbd_server_start(w->x, &w->addr, max_connections, &err), 0);
}

static inline void make_disk(struct world *w)
{
    struct io_file *f;
    CHECK_EQ(io_open(w->path, O_RDWR | O_CREAT, 0600, &f), 0);
    CHECK_EQ(io_truncate(f, DISK), 0);
    io_close(f);
}

static inline void world_main(void *arg)
{
    struct world *w = arg;
    w->sink.fn = on_event;
    CHECK_EQ(graph_new(w->io, &w->graph), 0);
    CHECK_EQ(event_bus_new(w->io, &w->bus), 0);
    event_bus_attach(w->bus, &w->sink);
    CHECK_EQ(exports_new(w->graph, w->bus, &w->x), 0);
    exports_open(w->x);
    make_disk(w);
    add_node(w, "n", false);
    w->body(w);
    exports_close_all(w->x);
    exports_free(w->x);
    graph_close_all(w->graph);
    graph_free(w->graph);
    event_bus_detach(w->bus, &w->sink);
    event_bus_free(w->bus);
    io_stop(w->io);
}

static inline void with_world(unsigned n_loops, void (*body)(struct world *))
{
    struct tide_error err;
    struct world w = {.body = body, .dir = "/tmp/export_test.XXXXXX"};
    assert_non_null(mkdtemp(w.dir));
    snprintf(w.path, sizeof w.path, "%s/disk", w.dir);
    w.addr.type = IO_ADDR_UNIX;
    snprintf(w.addr.path, sizeof w.addr.path, "%s/sock", w.dir);
    assert_int_equal(io_new(IO_PORTABLE, n_loops, &w.io, &err), 0);
    assert_int_equal(io_run(w.io, world_main, &w), 0);
    io_free(w.io);
    unlink(w.path);
    assert_int_equal(rmdir(w.dir), 0);
}

/* The same in the simulator, where time is made up and nothing is waited for. */
static inline void with_sim(const struct sim_config *cfg, void (*body)(struct world *))
{
    struct world w = {.body = body, .path = "disk", .addr = {.type = IO_ADDR_UNIX, .path = "sock"}};
    assert_int_equal(sim_new(cfg, &w.io), 0);
    assert_int_equal(io_run(w.io, world_main, &w), 0);
    io_free(w.io);
}

static inline void with_sim_world(uint64_t seed, unsigned n_loops, void (*body)(struct world *))
{
    with_sim(&(struct sim_config){.seed = seed, .n_loops = n_loops}, body);
}

/* ------------------------------------------------------------------ a client */

#define REPLY_MAX (256u << 10)

static inline struct io_sock *dial(struct world *w)
{
    struct io_sock *s;
    uint8_t hello[18], flags[4];
    CHECK_EQ(io_connect(&w->addr, &s), 0);
    CHECK_EQ(io_recv_all(s, hello, sizeof hello), 0);
    CHECK(get_be64(hello) == NBD_MAGIC && get_be64(hello + 8) == NBD_OPTION_MAGIC);
    put_be32(flags, NBD_FIXED_NEWSTYLE | NBD_NO_ZEROES);
    CHECK_EQ(io_send(s, &(struct iovec){flags, 4}, 1), 0);
    return s;
}

static inline void send_option(struct io_sock *s, uint32_t opt, const void *data, uint32_t len)
{
    uint8_t head[NBD_OPTION_LEN];
    put_be64(head, NBD_OPTION_MAGIC);
    put_be32(head + 8, opt);
    put_be32(head + 12, len);
    struct iovec iov[2] = {{head, sizeof head}, {(void *)data, len}};
    CHECK_EQ(io_send(s, iov, len ? 2 : 1), 0);
}

/* The type of the next reply; its data is thrown away. */
static inline uint32_t option_reply(struct io_sock *s)
{
    uint8_t head[NBD_OPTION_REPLY_LEN], data[2048];
    CHECK_EQ(io_recv_all(s, head, sizeof head), 0);
    CHECK(get_be64(head) == NBD_OPTION_REPLY_MAGIC);
    CHECK(get_be32(head + 16) <= sizeof data);
    CHECK_EQ(io_recv_all(s, data, get_be32(head + 16)), 0);
    return get_be32(head + 12);
}

/* The last of the replies to an option. */
static inline uint32_t option(struct io_sock *s, uint32_t opt, const void *data, uint32_t len)
{
    uint32_t type;
    send_option(s, opt, data, len);
    do {
        type = option_reply(s);
    } while (type != NBD_REP_ACK && !(type & 0x80000000u));
    return type;
}

/* Data of GO and INFO without requests for more. */
static inline uint32_t go_data(uint8_t *p, const char *name)
{
    uint32_t len = strlen(name);
    put_be32(p, len);
    memcpy(p + 4, name, len);
    put_be16(p + 4 + len, 0);
    return len + 6;
}

/* Data of LIST_META_CONTEXT and SET_META_CONTEXT with one query. */
static inline uint32_t meta_data(uint8_t *p, const char *name, const char *query)
{
    uint32_t len = strlen(name), qlen = strlen(query);
    put_be32(p, len);
    memcpy(p + 4, name, len);
    put_be32(p + 4 + len, 1);
    put_be32(p + 8 + len, qlen);
    memcpy(p + 12 + len, query, qlen);
    return 12 + len + qlen;
}

static inline struct io_sock *connected(struct world *w, const char *name, bool structured)
{
    uint8_t data[256];
    struct io_sock *s = dial(w);
    if (structured)
        CHECK_EQ(option(s, NBD_OPT_STRUCTURED_REPLY, NULL, 0), NBD_REP_ACK);
    CHECK_EQ(option(s, NBD_OPT_GO, data, go_data(data, name)), NBD_REP_ACK);
    return s;
}

static inline void request(struct io_sock *s, unsigned cmd, unsigned flags, uint64_t off,
                           uint32_t len, const void *payload, size_t payload_len)
{
    uint8_t head[NBD_REQUEST_LEN];
    put_be32(head, NBD_REQUEST_MAGIC);
    put_be16(head + 4, flags);
    put_be16(head + 6, cmd);
    put_be64(head + 8, off ^ len);
    put_be64(head + 16, off);
    put_be32(head + 24, len);
    struct iovec iov[2] = {{head, sizeof head}, {(void *)payload, payload_len}};
    CHECK_EQ(io_send(s, iov, payload_len ? 2 : 1), 0);
}

/* The same with an extended header, of cookie 42. */
static inline void ext_request(struct io_sock *s, const struct nbd_request *rq, const void *payload)
{
    uint8_t head[NBD_EXT_REQUEST_LEN];
    put_be32(head, NBD_EXT_REQUEST_MAGIC);
    put_be16(head + 4, rq->flags);
    put_be16(head + 6, rq->cmd);
    put_be64(head + 8, 42);
    put_be64(head + 16, rq->off);
    put_be64(head + 24, rq->len);
    struct iovec iov[2] = {{head, sizeof head}, {(void *)payload, rq->payload}};
    CHECK_EQ(io_send(s, iov, rq->payload ? 2 : 1), 0);
}

static inline uint32_t simple_reply(struct io_sock *s, void *data, size_t len)
{
    uint8_t head[NBD_SIMPLE_LEN];
    CHECK_EQ(io_recv_all(s, head, sizeof head), 0);
    CHECK_EQ(get_be32(head), NBD_SIMPLE_REPLY_MAGIC);
    if (get_be32(head + 4) == 0 && len)
        CHECK_EQ(io_recv_all(s, data, len), 0);
    return get_be32(head + 4);
}

struct chunk {
    unsigned flags, type;
    uint32_t len;
    uint8_t data[REPLY_MAX];
};

static inline void next_chunk(struct io_sock *s, struct chunk *c)
{
    uint8_t head[NBD_CHUNK_LEN];
    CHECK_EQ(io_recv_all(s, head, sizeof head), 0);
    CHECK_EQ(get_be32(head), NBD_CHUNK_MAGIC);
    c->flags = get_be16(head + 4);
    c->type = get_be16(head + 6);
    c->len = get_be32(head + 16);
    CHECK(c->len <= sizeof c->data);
    if (c->len)
        CHECK_EQ(io_recv_all(s, c->data, c->len), 0);
}

static inline bool is_closed(struct io_sock *s)
{
    char c;
    return io_recv(s, &c, 1) <= 0;
}

static inline void wait_deleted(struct world *w, unsigned n)
{
    uint64_t deadline = io_now(w->io) + 20000000000u;
    while (w->n_deleted < n) {
        CHECK(io_now(w->io) < deadline);
        loop_pause();
    }
    CHECK_EQ(w->n_deleted, n);
}
