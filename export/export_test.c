/* SPDX-License-Identifier: Apache-2.0 */
/* Tests of the NBD server: exports as a whole, and what goes wrong around them. Each of its parts
 * has tests of its own beside this file. */
#include <errno.h>

#include "base/mem.h"
#include "export/export_test.h"

/* ------------------------------------------------------------------ exports */

static void expect(struct world *w, const char *text, int code, const char *words)
{
    struct tide_error err;
    CHECK_EQ(try_export(w, text, &err), code);
    if (!strstr(err.msg, words))
        fprintf(stderr, "'%s' does not say '%s'\n", err.msg, words);
    CHECK(strstr(err.msg, words));
}

static void errors_body(struct world *w)
{
    struct tide_error err;
    CHECK_EQ(nbd_server_stop(w->x, &err), -ENOENT);
    expect(w, NBD_N "\"id\":\"e\"}", -ENOENT, "nbd-server-start");
    start_server(w, 0);
    CHECK_EQ(nbd_server_start(w->x, &w->addr, 0, &err), -EEXIST);
    add_node(w, "ro", true);
    add_bitmap(w, "n", "on", false);
    add_bitmap(w, "n", "off", true);
    expect(w, NBD_N "\"id\":\"1\"}", -EINVAL, "'1'");
    expect(w, NBD_N "\"id\":\"\"}", -EINVAL, "valid export id");
    expect(w, NBD_N "\"id\":\"a b\"}", -EINVAL, "'a b'");
    expect(w, "{\"type\":\"nbd\",\"node-name\":\"zz\",\"id\":\"e\"}", -ENOENT, "'zz'");
    expect(w, "{\"type\":\"nbd\",\"node-name\":\"ro\",\"id\":\"e\",\"writable\":true}", -EPERM,
           "'ro'");
    expect(w, NBD_N "\"id\":\"e\",\"iothread\":\"io\"}", -ENOENT, "'io'");
    expect(w, NBD_N "\"id\":\"e\",\"bitmaps\":[\"on\"]}", -EINVAL, "'on' is enabled");
    expect(w, NBD_N "\"id\":\"e\",\"bitmaps\":[\"off\",\"zz\"]}", -ENOENT, "'zz'");
    expect(w, NBD_N "\"id\":\"e\",\"bitmaps\":[\"off\",\"off\"]}", -EINVAL, "'off'");
    expect(w, NBD_N "\"id\":\"e\",\"bitmaps\":[{\"node\":\"yy\",\"name\":\"on\"}]}", -ENOENT,
           "'yy'");
    add_export(w, NBD_N "\"id\":\"e\",\"bitmaps\":[\"off\",{\"node\":\"n\",\"name\":\"on\"}]}");
    expect(w, NBD_N "\"id\":\"e\"}", -EEXIST, "'e'");
    expect(w, NBD_N "\"id\":\"f\"}", -EEXIST, "named 'n'");
    expect(w, NBD_N "\"id\":\"f\",\"name\":\"f\",\"bitmaps\":[\"off\"]}", -EBUSY, "'off'");
    CHECK_EQ(node_bitmaps(graph_find(w->graph, "n"))->n_busy, 1);
    CHECK_EQ(export_del(w->x, "zz", false, &err), -ENOENT);
    CHECK_EQ(export_del_by_name(w->x, "zz", false, &err), -ENOENT);
    CHECK_EQ(export_del_by_name(w->x, "n", false, &err), 0);
    CHECK_EQ(w->n_deleted, 1);
    CHECK_EQ(node_bitmaps(graph_find(w->graph, "n"))->n_busy, 0);
}

static void wrong_exports_are_refused(void **state)
{
    with_world(1, errors_body);
}

static void long_name_body(struct world *w)
{
    static char text[NBD_MAX_STRING + 200], name[NBD_MAX_STRING + 2];
    memset(name, 'x', sizeof name - 1);
    start_server(w, 0);
    snprintf(text, sizeof text, NBD_N "\"id\":\"e\",\"name\":\"%s\"}", name);
    expect(w, text, -EINVAL, "export name 'xxx");
    snprintf(text, sizeof text, NBD_N "\"id\":\"e\",\"description\":\"%s\"}", name);
    expect(w, text, -EINVAL, "description 'xxx");
    snprintf(text, sizeof text, NBD_N "\"id\":\"e\",\"name\":\"%s\"}", name + 1);
    add_export(w, text);
}

static void long_names_are_refused(void **state)
{
    with_world(1, long_name_body);
}

static void count_writable(void *arg, const char *id, const char *node)
{
    char *s = arg;
    strcat(strcat(strcat(strcat(s, id), "="), node), " ");
}

static void query_body(struct world *w)
{
    struct tide_error err;
    char writable[100] = "";
    start_server(w, 0);
    CHECK_EQ(iothread_add(w->x, "io", &err), 0);
    CHECK_EQ(iothread_add(w->x, "io", &err), -EEXIST);
    CHECK_EQ(iothread_add(w->x, "0io", &err), -EINVAL);
    add_export(w, NBD_N "\"id\":\"a\"}");
    add_export(w, NBD_N "\"id\":\"b\",\"name\":\"\",\"writable\":true,\"iothread\":\"io\"}");
    json_t *all = exports_query(w->x), *first = json_array_get(all, 0);
    CHECK_EQ(json_array_size(all), 2);
    CHECK(strcmp(json_string_value(json_object_get(first, "id")), "b") == 0);
    CHECK(strcmp(json_string_value(json_object_get(first, "type")), "nbd") == 0);
    CHECK(strcmp(json_string_value(json_object_get(first, "node-name")), "n") == 0);
    CHECK(json_is_false(json_object_get(first, "shutting-down")));
    json_decref(all);
    exports_each_writable(w->x, count_writable, writable);
    CHECK(strcmp(writable, "b=n ") == 0);
    struct io_sock *s = connected(w, "", false);
    CHECK_EQ(iothread_del(w->x, "io", &err), -EBUSY);
    CHECK_EQ(export_del(w->x, "b", false, &err), -EBUSY);
    CHECK_EQ(export_del(w->x, "b", true, &err), 0);
    CHECK(is_closed(s));
    wait_deleted(w, 1);
    io_sock_close(s);
    CHECK_EQ(iothread_del(w->x, "io", &err), 0);
    CHECK_EQ(iothread_del(w->x, "io", &err), -ENOENT);
    CHECK_EQ(nbd_server_stop(w->x, &err), 0);
    CHECK_EQ(w->n_deleted, 2);
}

static void exports_come_and_go(void **state)
{
    with_world(2, query_body);
}

/* Whatever allocation of export_add fails: -ENOMEM, and no trace is left. */
static void no_memory_body(struct world *w)
{
    struct arena a = {0};
    struct tide_error err;
    start_server(w, 0);
    struct dirty_bitmap *b = add_bitmap(w, "n", "b", true);
    void *o = parse(&q_block_export_options_type,
                    NBD_N "\"id\":\"e\",\"description\":\"d\",\"bitmaps\":[\"b\"]}", &a);
    int r = -ENOMEM;
    for (unsigned n = 1; r == -ENOMEM; n++) {
        CHECK(n < 100);
        mem_fail_after(n);
        r = export_add(w->x, o, &err);
        mem_fail_after(0);
        CHECK_EQ(b->n_busy, r == 0);
    }
    CHECK_EQ(r, 0);
    arena_free(&a);
}

static void export_without_memory(void **state)
{
    with_world(1, no_memory_body);
}

/* ------------------------------------------------------------------ gate, bounds */

struct gate_try {
    struct world *w;
    struct io_event done;
    bool closed;
    struct io_event go;
};

static void close_gate(void *arg)
{
    struct gate_try *g = arg;
    struct tide_error err;
    struct node *n = graph_find(g->w->graph, "n");
    struct quiesce *q;
    CHECK_EQ(quiesce_begin(g->w->graph, &n, 1, QUIESCE_ALL, &q, &err), 0);
    g->closed = true;
    for (int i = 0; i < 100; i++)
        loop_pause(); /* time for a reply that must not come */
    g->closed = false;
    quiesce_end(q);
    io_event_set(&g->done);
}

/* While the gate is closed no reply comes, afterwards all do. */
static void gate_body(struct world *w)
{
    uint8_t data[4096] = {1};
    struct gate_try g = {w, IO_EVENT_INIT, false, IO_EVENT_INIT};
    start_server(w, 0);
    add_export(w, NBD_N "\"id\":\"e\",\"writable\":true}");
    struct io_sock *s = connected(w, "n", false);
    CHECK_EQ(loop_run_now(close_gate, &g), 0);
    while (!g.closed)
        loop_pause();
    for (int i = 0; i < 100; i++)
        request(s, NBD_CMD_WRITE, 0, i * 4096, sizeof data, data, sizeof data);
    for (int i = 0; i < 100; i++) {
        CHECK_EQ(simple_reply(s, NULL, 0), 0);
        CHECK(!g.closed);
    }
    CHECK_EQ(io_event_wait(&g.done, io_now(w->io) + 20000000000u), 0);
    io_sock_close(s);
}

static void gate_holds_requests(void **state)
{
    with_world(1, gate_body);
    with_world(3, gate_body);
}

struct sleeper {
    struct io_event wake, *ended;
    unsigned *n;
};

static void sleep_main(void *arg)
{
    struct sleeper *p = arg;
    io_event_wait(&p->wake, IO_FOREVER);
    if (--*p->n == 0)
        io_event_set(p->ended);
}

static void close_gate_later(void *arg)
{
    struct gate_try *g = arg;
    io_event_wait(&g->go, IO_FOREVER);
    close_gate(g);
}

/* Without memory for a coroutine the reader does the request itself. It holds the gate then as any
 * request does: a long one still lets it be closed. */
static void no_coroutine_body(struct world *w)
{
    enum { N = 100 };
    static struct sleeper sleepers[N];
    struct io_event ended = IO_EVENT_INIT;
    unsigned n = N;
    struct gate_try g = {w, IO_EVENT_INIT, false, IO_EVENT_INIT};
    start_server(w, 0);
    add_export(w, NBD_N "\"id\":\"e\",\"writable\":true}");
    struct io_sock *s = connected(w, "n", false);
    request(s, NBD_CMD_FLUSH, 0, 0, 0, NULL, 0); /* the session has its memory */
    CHECK_EQ(simple_reply(s, NULL, 0), 0);
    CHECK_EQ(loop_run_now(close_gate_later, &g), 0);
    for (unsigned i = 0; i < N; i++) { /* no stack is left in the pool */
        sleepers[i] = (struct sleeper){IO_EVENT_INIT, &ended, &n};
        CHECK_EQ(loop_run_now(sleep_main, &sleepers[i]), 0);
    }
    mem_fail_after(1);
    request(s, NBD_CMD_CACHE, 0, 0, DISK, NULL, 0);
    while (mem_fail_after(1) == 0)
        loop_pause();
    mem_fail_after(0);
    io_event_set(&g.go);
    CHECK_EQ(io_event_wait(&g.done, io_now(w->io) + 20000000000u), 0);
    CHECK_EQ(simple_reply(s, NULL, 0), 0);
    for (unsigned i = 0; i < N; i++)
        io_event_set(&sleepers[i].wake);
    CHECK_EQ(io_event_wait(&ended, io_now(w->io) + 20000000000u), 0);
    request(s, NBD_CMD_FLUSH, 0, 0, 0, NULL, 0);
    CHECK_EQ(simple_reply(s, NULL, 0), 0);
    io_sock_close(s);
}

static void without_memory_the_reader_works(void **state)
{
    with_world(1, no_coroutine_body);
}

/* Who does not read is not read from, and holds up nobody; who writes before it reads is served. */
static void slow_body(struct world *w)
{
    static uint8_t data[1u << 20];
    start_server(w, 0);
    add_export(w, NBD_N "\"id\":\"e\",\"writable\":true}");
    struct io_sock *slow = connected(w, "n", false), *s = connected(w, "n", false);
    for (int i = 0; i < 200; i++)
        request(slow, NBD_CMD_READ, 0, 0, sizeof data, NULL, 0);
    for (int i = 0; i < 20; i++) {
        request(s, NBD_CMD_READ, 0, 0, sizeof data, NULL, 0);
        CHECK_EQ(simple_reply(s, data, sizeof data), 0);
    }
    for (int i = 0; i < 200; i++)
        CHECK_EQ(simple_reply(slow, data, sizeof data), 0);
    for (int i = 0; i < 8; i++)
        request(s, NBD_CMD_READ, 0, 0, sizeof data, NULL, 0);
    request(s, NBD_CMD_WRITE, 0, MIB, sizeof data, data, sizeof data);
    for (int i = 0; i < 9; i++) { /* in any order: the cookie of the write is 0 */
        uint8_t head[NBD_SIMPLE_LEN];
        CHECK_EQ(io_recv_all(s, head, sizeof head), 0);
        CHECK_EQ(get_be32(head), NBD_SIMPLE_REPLY_MAGIC);
        CHECK_EQ(get_be32(head + 4), 0);
        if (get_be64(head + 8) != 0)
            CHECK_EQ(io_recv_all(s, data, sizeof data), 0);
    }
    io_sock_close(slow);
    io_sock_close(s);
}

static void slow_client_holds_up_nobody(void **state)
{
    with_world(1, slow_body);
    with_world(2, slow_body);
}

/* A client whose replies fill its socket: safe deletion is refused and says why, hard deletion is
 * over at once, and the node is free again. */
static void unread_body(struct world *w)
{
    enum { P = 100 };
    struct tide_error err;
    start_server(w, 0);
    add_export(w, NBD_N "\"id\":\"e\",\"writable\":true}");
    struct io_sock *s = connected(w, "n", false);
    for (unsigned i = 0; i < P; i++)
        request(s, NBD_CMD_READ, 0, 0, 1u << 20, NULL, 0);
    io_sleep(1000000000u);
    CHECK_EQ(export_del(w->x, "e", false, &err), -EBUSY);
    CHECK(strstr(err.msg, "'e' is in use by 1 connection") && strstr(err.msg, "'hard'"));
    uint64_t before = io_now(w->io);
    CHECK_EQ(export_del(w->x, "e", true, &err), 0);
    wait_deleted(w, 1);
    CHECK(io_now(w->io) - before < 1000000000u);
    CHECK_EQ(graph_del(w->graph, "n", &err), 0);
    io_sock_close(s);
}

static void unread_replies_do_not_keep_an_export(void **state)
{
    for (uint64_t seed = 1; seed <= 10; seed++)
        with_sim_world(seed, 1 + seed % 3, unread_body);
}

/* Caching is for nobody once the client has said goodbye, even in the middle. Each look into the
 * file and each read takes 5 s here, and there are 16 of both. */
static void goodbye_body(struct world *w)
{
    const struct nbd_request rq = {.cmd = NBD_CMD_CACHE, .len = DISK}, bye = {.cmd = NBD_CMD_DISC};
    static uint8_t data[1u << 20];
    start_server(w, 0);
    add_export(w, NBD_N "\"id\":\"e\",\"writable\":true}");
    struct io_sock *s = connected(w, "n", false);
    for (unsigned i = 0; i < DISK / sizeof data; i++) {
        request(s, NBD_CMD_WRITE, 0, i * sizeof data, sizeof data, data, sizeof data);
        CHECK_EQ(simple_reply(s, NULL, 0), 0);
    }
    io_sock_close(s);
    s = dial(w);
    CHECK_EQ(option(s, NBD_OPT_EXTENDED_HEADERS, NULL, 0), NBD_REP_ACK);
    CHECK_EQ(option(s, NBD_OPT_GO, data, go_data(data, "n")), NBD_REP_ACK);
    ext_request(s, &rq, NULL);
    io_sleep(12000000000u);
    ext_request(s, &bye, NULL);
    uint64_t before = io_now(w->io);
    while (!is_closed(s))
        continue;
    CHECK(io_now(w->io) - before < 20000000000u);
    io_sock_close(s);
}

static void caching_ends_with_goodbye(void **state)
{
    with_sim(&(struct sim_config){.seed = 1, .stall_in = 1}, goodbye_body);
}

/* Zeroing 2^60 bytes: it stops when the export is deleted hard, also after the client's goodbye. */
static void endless_body(struct world *w)
{
    struct arena a = {0};
    struct tide_error err;
    struct node *n;
    CHECK_EQ(graph_add(w->graph,
                       parse(&q_blockdev_options_type,
                             "{\"driver\":\"null-co\",\"node-name\":\"z\",\"size\":"
                             "1152921504606846976,\"latency-ns\":1000000}",
                             &a),
                       &n, &err),
             0);
    arena_free(&a);
    start_server(w, 0);
    for (unsigned i = 0; i < 4; i++) {
        struct nbd_request rq = {.cmd = i % 2 ? NBD_CMD_TRIM : NBD_CMD_WRITE_ZEROES,
                                 .len = UINT64_C(1) << 60};
        struct nbd_request bye = {.cmd = NBD_CMD_DISC};
        uint8_t data[64];
        add_export(w, "{\"type\":\"nbd\",\"node-name\":\"z\",\"id\":\"e\",\"writable\":true}");
        struct io_sock *s = dial(w);
        CHECK_EQ(option(s, NBD_OPT_EXTENDED_HEADERS, NULL, 0), NBD_REP_ACK);
        CHECK_EQ(option(s, NBD_OPT_GO, data, go_data(data, "z")), NBD_REP_ACK);
        ext_request(s, &rq, NULL);
        if (i / 2)
            ext_request(s, &bye, NULL);
        io_sleep(100000000u);
        CHECK_EQ(export_del(w->x, "e", false, &err), -EBUSY);
        uint64_t before = io_now(w->io);
        CHECK_EQ(export_del(w->x, "e", true, &err), 0);
        wait_deleted(w, i + 1);
        CHECK(io_now(w->io) - before < 1000000000u);
        io_sock_close(s);
    }
}

static void long_requests_end_with_their_export(void **state)
{
    for (uint64_t seed = 1; seed <= 5; seed++)
        with_sim_world(seed, 1 + seed % 2, endless_body);
}

/* Clients that go away in the middle of anything leave nothing behind (the sanitizers look). */
static void leave_body(struct world *w)
{
    static uint8_t data[1u << 20];
    struct tide_error err;
    start_server(w, 0);
    add_export(w, NBD_N "\"id\":\"e\",\"writable\":true}");
    for (uint32_t got = 0; got < 200000; got = got * 2 + 1) {
        struct io_sock *s = connected(w, "n", got % 3 == 0);
        request(s, NBD_CMD_READ, 0, 0, sizeof data, NULL, 0);
        request(s, NBD_CMD_WRITE, 0, 0, 200000, data, got);
        io_sock_close(s);
        s = dial(w);
        send_option(s, NBD_OPT_GO, data, got % 100);
        io_sock_close(s);
    }
    CHECK_EQ(nbd_server_stop(w->x, &err), 0);
    CHECK_EQ(w->n_deleted, 1);
}

static void clients_may_leave_any_time(void **state)
{
    with_world(1, leave_body);
    with_world(3, leave_body);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(wrong_exports_are_refused),
        cmocka_unit_test(long_names_are_refused),
        cmocka_unit_test(exports_come_and_go),
        cmocka_unit_test(export_without_memory),
        cmocka_unit_test(gate_holds_requests),
        cmocka_unit_test(without_memory_the_reader_works),
        cmocka_unit_test(slow_client_holds_up_nobody),
        cmocka_unit_test(unread_replies_do_not_keep_an_export),
        cmocka_unit_test(long_requests_end_with_their_export),
        cmocka_unit_test(caching_ends_with_goodbye),
        cmocka_unit_test(clients_may_leave_any_time),
    };
    return cmocka_run_group_tests_name("exports", tests, NULL, NULL);
}
