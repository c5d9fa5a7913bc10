/* SPDX-License-Identifier: Apache-2.0 */
/* Tests of export/: the pure parts by themselves, and the server as its clients see it. For the
 * latter the test's body is the client as well (export_test.h). */
#include <errno.h>

#include "base/mem.h"
#include "export/export_test.h"

/* ------------------------------------------------------------------ pure parts */

static void request_is_decoded(void **state)
{
    uint8_t p[NBD_REQUEST_LEN] = {0x25, 0x60, 0x95, 0x13, 0x00, 0x11, 0x00, 0x06, 1, 2,
                                  3,    4,    5,    6,    7,    8,    0,    0,    0, 1,
                                  0,    0,    0,    0,    0xff, 0xff, 0xff, 0xff};
    struct nbd_request rq;
    assert_int_equal(nbd_request_decode(p, &rq), 0);
    assert_int_equal(rq.flags, NBD_FLAG_FUA | NBD_FLAG_FAST_ZERO);
    assert_int_equal(rq.cmd, NBD_CMD_WRITE_ZEROES);
    assert_true(rq.cookie == 0x0102030405060708ull);
    assert_true(rq.off == 1ull << 32);
    assert_true(rq.len == UINT32_MAX && rq.payload == 0);
    p[7] = NBD_CMD_WRITE;
    assert_int_equal(nbd_request_decode(p, &rq), 0);
    assert_true(rq.payload == UINT32_MAX);
    p[3] ^= 1;
    assert_int_equal(nbd_request_decode(p, &rq), -EPROTO);
}

static void extended_request_is_decoded(void **state)
{
    static const struct {
        unsigned cmd, flags;
        uint64_t payload;
    } t[] = {
        {NBD_CMD_READ, 0, 0},
        {NBD_CMD_WRITE, NBD_FLAG_PAYLOAD_LEN, 0x8000000000000002ull},
        {NBD_CMD_WRITE, NBD_FLAG_FUA, NBD_PAYLOAD_LOST},
        {NBD_CMD_BLOCK_STATUS, NBD_FLAG_PAYLOAD_LEN, 0x8000000000000002ull},
        {NBD_CMD_BLOCK_STATUS, NBD_FLAG_REQ_ONE, 0},
    };
    for (unsigned i = 0; i < sizeof t / sizeof *t; i++) {
        uint8_t p[NBD_EXT_REQUEST_LEN] = {
            0x21, 0xe4, 0x1c, 0x71, 0, t[i].flags, 0, t[i].cmd, 1,    2, 3, 4, 5, 6, 7, 8,
            0xff, 0,    0,    0,    0, 0,          0, 1,        0x80, 0, 0, 0, 0, 0, 0, 2};
        struct nbd_request rq;
        assert_int_equal(nbd_ext_request_decode(p, &rq), 0);
        assert_int_equal(rq.flags, t[i].flags);
        assert_int_equal(rq.cmd, t[i].cmd);
        assert_true(rq.cookie == 0x0102030405060708ull && rq.off == 0xff00000000000001ull);
        assert_true(rq.len == 0x8000000000000002ull && rq.payload == t[i].payload);
        p[0] ^= 1;
        assert_int_equal(nbd_ext_request_decode(p, &rq), -EPROTO);
    }
}

static void errno_goes_over_the_wire(void **state)
{
    static const int map[][2] = {
        {0, 0},        {EPERM, 1},       {EROFS, 1},       {EIO, 5},     {ENOMEM, 12},
        {EINVAL, 22},  {ENOSPC, 28},     {EFBIG, 28},      {EDQUOT, 28}, {EOVERFLOW, 75},
        {ENOTSUP, 95}, {EOPNOTSUPP, 95}, {ESHUTDOWN, 108}, {EACCES, 22}, {ETIMEDOUT, 22}};
    for (unsigned i = 0; i < sizeof map / sizeof *map; i++)
        assert_int_equal(nbd_errno(map[i][0]), map[i][1]);
}

static void contexts_match_queries(void **state)
{
    struct dirty_bitmap a = {.name = "b"}, b = {.name = "a:b c"};
    struct nbd_export e = {.allocation_depth = true};
    assert_int_equal(nbd_bitmaps_reserve(&e, 2), 0);
    nbd_bitmaps_add(&e, &a);
    nbd_bitmaps_add(&e, &b);
    /* Chosen contexts as bits: when listing, when setting. */
    static const struct {
        const char *query;
        unsigned list, set;
    } t[] = {
        {"base:", 1, 0},
        {"qemu:", 2 | 4 | 8, 0},
        {"qemu:dirty-bitmap:", 4 | 8, 0},
        {"base:allocation", 1, 1},
        {"qemu:allocation-depth", 2, 2},
        {"qemu:dirty-bitmap:b", 4, 4},
        {"qemu:dirty-bitmap:a:b c", 8, 8},
        {"qemu:dirty-bitmap:a", 0, 0},
        {"qemu:dirty", 0, 0},
        {"base:allocationx", 0, 0},
        {"base", 0, 0},
        {"", 0, 0},
        {"other:", 0, 0},
    };
    for (unsigned depth = 0; depth < 2; depth++) {
        e.allocation_depth = depth;
        for (unsigned i = 0; i < 2 * sizeof t / sizeof *t; i++) {
            bool list = i % 2;
            uint8_t chosen[4] = {0};
            unsigned want = list ? t[i / 2].list : t[i / 2].set, families = 0;
            nbd_context_match(&e, t[i / 2].query, strlen(t[i / 2].query), list ? &families : NULL,
                              chosen);
            nbd_context_families(&e, families, chosen);
            for (unsigned id = 0; id < 4; id++)
                assert_int_equal(chosen[id], want >> id & 1 && (id != 1 || depth));
        }
    }
    uint8_t all[4] = {0};
    nbd_context_all(&e, all);
    assert_memory_equal(all, "\1\1\1\1", 4);
    nbd_bitmaps_free(&e);
}

/* What a request is charged for before it runs. */
static void requests_have_a_cost(void **state)
{
    struct nbd_conn c = {.n_contexts = 3, .n_chosen = 1}, none = {0};
    struct nbd_request rq = {.cmd = NBD_CMD_BLOCK_STATUS, .len = UINT32_MAX};
    const uint64_t head = NBD_CHUNK_LEN + 4;
    assert_true(nbd_request_cost(&none, &rq) == 0);
    assert_true(nbd_request_cost(&c, &rq) == head + 8 * NBD_MAX_EXTENTS);
    c.n_chosen = 2;
    assert_true(nbd_request_cost(&c, &rq) == 2 * head + 8 * NBD_MAX_EXTENTS);
    c.n_chosen = 1000;
    assert_true(nbd_request_cost(&c, &rq) == 1000 * (head + 8 * 256));
    rq.flags = NBD_FLAG_REQ_ONE;
    assert_true(nbd_request_cost(&c, &rq) == 1000 * (head + 8));
    rq = (struct nbd_request){.cmd = NBD_CMD_BLOCK_STATUS, .len = 5};
    assert_true(nbd_request_cost(&c, &rq) == 1000 * (head + 8 * 5));
    c = (struct nbd_conn){.n_contexts = 3, .n_chosen = 2, .structured = true, .extended = true};
    rq = (struct nbd_request){.cmd = NBD_CMD_BLOCK_STATUS, .len = UINT64_MAX};
    const uint64_t wide = NBD_EXT_CHUNK_LEN + 8;
    assert_true(nbd_request_cost(&c, &rq) == 2 * wide + 16 * NBD_MAX_EXTENTS);
    rq.payload = rq.len = 12; /* the length asked for comes with the payload */
    assert_true(nbd_request_cost(&c, &rq) == 2 * wide + 16 * NBD_MAX_EXTENTS);
    c.extended = false;
    static const struct {
        unsigned cmd;
        uint64_t len, cost;
    } t[] = {
        {NBD_CMD_READ, 512, 512},
        {NBD_CMD_READ, NBD_MAX_PAYLOAD, NBD_MAX_PAYLOAD},
        {NBD_CMD_READ, NBD_MAX_PAYLOAD + 1, 0},
        {NBD_CMD_WRITE, 4096, 4096},
        {NBD_CMD_CACHE, MIB, MIB},
        {NBD_CMD_CACHE, UINT32_MAX, NBD_MAX_PAYLOAD},
        {NBD_CMD_CACHE, UINT64_MAX, NBD_MAX_PAYLOAD},
        {NBD_CMD_TRIM, NBD_MAX_PAYLOAD, 0},
        {NBD_CMD_WRITE_ZEROES, MIB, 0},
        {NBD_CMD_FLUSH, 0, 0},
        {99, MIB, 0},
    };
    for (unsigned i = 0; i < sizeof t / sizeof *t; i++) {
        rq = (struct nbd_request){.cmd = t[i].cmd, .len = t[i].len};
        assert_true(nbd_request_cost(&c, &rq) == t[i].cost);
        assert_true(nbd_request_bytes(&rq) == t[i].cost);
    }
    for (unsigned i = 0; i < 2; i++) { /* in pieces */
        rq =
            (struct nbd_request){.cmd = i ? NBD_CMD_TRIM : NBD_CMD_WRITE_ZEROES, .len = UINT64_MAX};
        assert_true(nbd_request_cost(&c, &rq) == NBD_LONG_COST && nbd_request_bytes(&rq) == 0);
    }
}

/* Which payloads are kept for the request; all others are read past. */
static void payloads_are_taken_or_not(void **state)
{
    struct nbd_conn c = {.n_contexts = 5, .n_chosen = 2}, none = {0};
    static const struct {
        unsigned cmd;
        uint64_t payload;
        bool with, without;
    } t[] = {
        {NBD_CMD_WRITE, 1, true, true},
        {NBD_CMD_WRITE, NBD_MAX_PAYLOAD, true, true},
        {NBD_CMD_WRITE, NBD_MAX_PAYLOAD + 1, false, false},
        {NBD_CMD_WRITE, NBD_PAYLOAD_LOST, false, false},
        {NBD_CMD_BLOCK_STATUS, 8, false, false},
        {NBD_CMD_BLOCK_STATUS, 11, false, false},
        {NBD_CMD_BLOCK_STATUS, 12, true, false},
        {NBD_CMD_BLOCK_STATUS, 16, true, false},
        {NBD_CMD_BLOCK_STATUS, 20, false, false},
        {NBD_CMD_BLOCK_STATUS, UINT64_MAX - 3, false, false},
        {NBD_CMD_READ, 12, false, false},
        {99, 12, false, false},
    };
    for (unsigned i = 0; i < sizeof t / sizeof *t; i++) {
        struct nbd_request rq = {.cmd = t[i].cmd, .len = t[i].payload, .payload = t[i].payload};
        assert_int_equal(nbd_request_takes_payload(&c, &rq), t[i].with);
        assert_int_equal(nbd_request_takes_payload(&none, &rq), t[i].without);
    }
}

/* ------------------------------------------------------------------ exports */

static void expect(struct world *w, const char *text, int code, const char *words)
{
    struct tide_error err;
    CHECK_EQ(try_export(w, text, &err), code);
    if (!strstr(err.msg, words))
        fprintf(stderr, "'%s' does not say '%s'\n", err.msg, words);
    CHECK(strstr(err.msg, words));
}

#define NBD_N "{\"type\":\"nbd\",\"node-name\":\"n\","

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

/* ------------------------------------------------------------------ the handshake */

static void options_body(struct world *w)
{
    uint8_t data[256], zero[2] = {0};
    static uint8_t big[NBD_MAX_OPTION_LEN + 1];
    start_server(w, 1);
    add_export(w, NBD_N "\"id\":\"e\",\"description\":\"d\"}");
    struct io_sock *s = dial(w);
    CHECK_EQ(option(s, NBD_OPT_LIST, NULL, 0), NBD_REP_ACK);
    CHECK_EQ(option(s, NBD_OPT_LIST, zero, 1), NBD_REP_ERR_INVALID);
    CHECK_EQ(option(s, NBD_OPT_STARTTLS, NULL, 0), NBD_REP_ERR_POLICY);
    CHECK_EQ(option(s, NBD_OPT_EXTENDED_HEADERS, zero, 1), NBD_REP_ERR_INVALID);
    CHECK_EQ(option(s, 4711, big, 100), NBD_REP_ERR_UNSUP);
    CHECK_EQ(option(s, NBD_OPT_INFO, big, sizeof big), NBD_REP_ERR_TOO_BIG);
    CHECK_EQ(option(s, NBD_OPT_INFO, data, go_data(data, "zz")), NBD_REP_ERR_UNKNOWN);
    CHECK_EQ(option(s, NBD_OPT_INFO, data, go_data(data, "n") - 1), NBD_REP_ERR_INVALID);
    CHECK_EQ(option(s, NBD_OPT_INFO, zero, 2), NBD_REP_ERR_INVALID);
    CHECK_EQ(option(s, NBD_OPT_INFO, data, go_data(data, "n")), NBD_REP_ACK);
    uint32_t len = meta_data(data, "n", "base:allocation");
    CHECK_EQ(option(s, NBD_OPT_SET_META_CONTEXT, data, len), NBD_REP_ERR_INVALID);
    CHECK_EQ(option(s, NBD_OPT_LIST_META_CONTEXT, data, len), NBD_REP_ACK);
    CHECK_EQ(option(s, NBD_OPT_STRUCTURED_REPLY, NULL, 0), NBD_REP_ACK);
    CHECK_EQ(option(s, NBD_OPT_STRUCTURED_REPLY, NULL, 0), NBD_REP_ERR_INVALID);
    CHECK_EQ(option(s, NBD_OPT_SET_META_CONTEXT, data, len - 1), NBD_REP_ERR_INVALID);
    CHECK_EQ(option(s, NBD_OPT_SET_META_CONTEXT, data, len), NBD_REP_ACK);
    CHECK_EQ(option(s, NBD_OPT_EXTENDED_HEADERS, NULL, 0), NBD_REP_ACK);
    CHECK_EQ(option(s, NBD_OPT_EXTENDED_HEADERS, NULL, 0), NBD_REP_ERR_INVALID);
    CHECK_EQ(option(s, NBD_OPT_STRUCTURED_REPLY, NULL, 0), NBD_REP_ERR_EXT_HEADER_REQD);
    CHECK_EQ(option(s, NBD_OPT_ABORT, NULL, 0), NBD_REP_ACK);
    CHECK(is_closed(s));
    io_sock_close(s);
    s = dial(w); /* max_connections is 1: the server has noticed that the first is gone */
    send_option(s, NBD_OPT_EXPORT_NAME, "n", 1);
    CHECK_EQ(io_recv_all(s, data, 10), 0);
    CHECK(get_be64(data) == DISK);
    CHECK_EQ(get_be16(data + 8),
             NBD_HAS_FLAGS | NBD_READ_ONLY | NBD_SEND_FLUSH | NBD_SEND_FUA | NBD_SEND_CACHE);
    io_sock_close(s);
}

static void options_are_answered(void **state)
{
    with_world(1, options_body);
}

static void framing_body(struct world *w)
{
    uint8_t junk[64];
    memset(junk, 'x', sizeof junk);
    start_server(w, 0);
    add_export(w, NBD_N "\"id\":\"e\"}");
    struct io_sock *s = dial(w);
    CHECK_EQ(io_send(s, &(struct iovec){junk, sizeof junk}, 1), 0);
    CHECK(is_closed(s));
    io_sock_close(s);
    s = dial(w);
    send_option(s, NBD_OPT_EXPORT_NAME, "zz", 2);
    CHECK(is_closed(s));
    io_sock_close(s);
    s = connected(w, "n", false);
    CHECK_EQ(io_send(s, &(struct iovec){junk, sizeof junk}, 1), 0);
    CHECK(is_closed(s));
    io_sock_close(s);
    s = connected(w, "n", false);
    request(s, NBD_CMD_DISC, 0, 0, 0, NULL, 0);
    CHECK(is_closed(s));
    io_sock_close(s);
}

static void broken_framing_ends_the_connection(void **state)
{
    with_world(2, framing_body);
}

/* Options that came together are not answered together: others of the loop have their turns. */
static void haggling_body(struct world *w)
{
    enum { N = 300 };
    static uint8_t many[N * NBD_OPTION_LEN];
    start_server(w, 0);
    add_export(w, NBD_N "\"id\":\"e\"}");
    struct io_sock *s = dial(w);
    for (unsigned i = 0; i < N; i++) {
        uint8_t *p = many + i * NBD_OPTION_LEN;
        put_be64(p, NBD_OPTION_MAGIC);
        put_be32(p + 8, NBD_OPT_STARTTLS);
    }
    CHECK_EQ(option(s, NBD_OPT_STARTTLS, NULL, 0), NBD_REP_ERR_POLICY);
    uint64_t turn = loop_turn_number(loop_self());
    CHECK_EQ(io_send(s, &(struct iovec){many, sizeof many}, 1), 0);
    for (unsigned i = 0; i < N; i++)
        CHECK_EQ(option_reply(s), NBD_REP_ERR_POLICY);
    CHECK(loop_turn_number(loop_self()) - turn >= N);
    io_sock_close(s);
}

static void haggling_leaves_turns_to_others(void **state)
{
    with_world(1, haggling_body);
}

/* What is too long is read past; but not for ever. */
static void haggle_limit_body(struct world *w)
{
    static uint8_t big[1u << 20];
    start_server(w, 0);
    add_export(w, NBD_N "\"id\":\"e\"}");
    struct io_sock *s = dial(w);
    for (unsigned i = 0; i < NBD_MAX_HAGGLE / sizeof big - 1; i++)
        CHECK_EQ(option(s, NBD_OPT_INFO, big, sizeof big), NBD_REP_ERR_TOO_BIG);
    CHECK_EQ(option(s, NBD_OPT_STRUCTURED_REPLY, NULL, 0), NBD_REP_ACK);
    uint8_t head[NBD_OPTION_LEN];
    put_be64(head, NBD_OPTION_MAGIC);
    put_be32(head + 8, NBD_OPT_INFO);
    put_be32(head + 12, sizeof big);
    CHECK_EQ(io_send(s, &(struct iovec){head, sizeof head}, 1), 0);
    uint64_t before = io_now(w->io);
    CHECK(is_closed(s));
    CHECK(io_now(w->io) - before < NBD_HANDSHAKE_NS / 2); /* not by the watchdog */
    io_sock_close(s);
}

static void haggling_has_an_end(void **state)
{
    with_world(2, haggle_limit_body);
}

static struct io_sock *silent_one(struct world *w, unsigned how)
{
    uint8_t data[256];
    struct io_sock *s;
    if (how == 0) { /* not even its flags */
        CHECK_EQ(io_connect(&w->addr, &s), 0);
        return s;
    }
    s = dial(w);
    if (how == 2)
        send_option(s, NBD_OPT_GO, data, 3); /* a piece of an option */
    if (how == 3)
        CHECK_EQ(option(s, NBD_OPT_LIST, NULL, 0), NBD_REP_ACK);
    return s;
}

/* 10 s for the handshake, whatever the client does in it; no limit once it is over. */
static void time_limit_body(struct world *w)
{
    struct io_sock *silent[8];
    uint64_t began[8];
    char c;
    start_server(w, 0);
    add_export(w, NBD_N "\"id\":\"e\"}");
    struct io_sock *idle = connected(w, "n", false);
    for (unsigned i = 0; i < 8; i++) {
        began[i] = io_now(w->io);
        silent[i] = silent_one(w, i % 4);
        io_sleep(NBD_HANDSHAKE_NS / 16);
    }
    for (unsigned i = 0; i < 8; i++) {
        ssize_t n;
        do {
            n = io_recv(silent[i], &c, 1);
        } while (n > 0);
        uint64_t took = io_now(w->io) - began[i];
        CHECK(took >= NBD_HANDSHAKE_NS && took < NBD_HANDSHAKE_NS + NBD_HANDSHAKE_NS / 16);
        io_sock_close(silent[i]);
    }
    request(idle, NBD_CMD_FLUSH, 0, 0, 0, NULL, 0);
    CHECK_EQ(simple_reply(idle, NULL, 0), 0);
    io_sock_close(idle);
}

static void handshakes_have_a_time_limit(void **state)
{
    for (uint64_t seed = 1; seed <= 20; seed++)
        with_sim_world(seed, 1 + seed % 3, time_limit_body);
}

struct greeted {
    struct world *w;
    struct io_sock *s;
    uint64_t when; /* 0: not yet */
    struct io_event done;
};

static void wait_greeting(void *arg)
{
    struct greeted *g = arg;
    uint8_t hello[18];
    CHECK_EQ(io_recv_all(g->s, hello, sizeof hello), 0);
    g->when = io_now(g->w->io);
    io_event_set(&g->done);
}

/* The n+1st is not even greeted before one of the n has left. */
static void limit_body(struct world *w)
{
    enum { N = 3 };
    struct io_sock *s[N];
    struct greeted g = {.w = w, .done = IO_EVENT_INIT};
    start_server(w, N);
    add_export(w, NBD_N "\"id\":\"e\"}");
    for (unsigned i = 0; i < N; i++)
        s[i] = connected(w, "n", false);
    CHECK_EQ(io_connect(&w->addr, &g.s), 0);
    CHECK_EQ(loop_run_now(wait_greeting, &g), 0);
    for (unsigned i = 0; i < N; i++) {
        io_sleep(1000000000u);
        request(s[i], NBD_CMD_FLUSH, 0, 0, 0, NULL, 0);
        CHECK_EQ(simple_reply(s[i], NULL, 0), 0);
    }
    CHECK_EQ(g.when, 0);
    uint64_t left = io_now(w->io);
    io_sock_close(s[1]);
    CHECK_EQ(io_event_wait(&g.done, left + 1000000000u), 0);
    CHECK(g.when >= left);
    io_sock_close(s[0]);
    io_sock_close(s[2]);
    io_sock_close(g.s);
}

static void who_is_too_much_waits(void **state)
{
    for (uint64_t seed = 1; seed <= 20; seed++)
        with_sim_world(seed, 1 + seed % 3, limit_body);
}

/* ------------------------------------------------------------------ transmission */

static void requests_body(struct world *w)
{
    static const struct {
        unsigned cmd, flags;
        uint64_t off;
        uint32_t len, want;
    } t[] = {
        {NBD_CMD_READ, 0, 0, 0, 0},
        {NBD_CMD_READ, 0, DISK, 1, 22},
        {NBD_CMD_READ, 0, UINT64_MAX, UINT32_MAX, 22},
        {NBD_CMD_READ, NBD_FLAG_DF, 0, 512, 22}, /* no structured replies here */
        {NBD_CMD_READ, 0x8000, 0, 512, 22},
        {NBD_CMD_READ, 0, 0, NBD_MAX_PAYLOAD + 1, 22},
        {NBD_CMD_FLUSH, 0, 0, 0, 0},
        {NBD_CMD_TRIM, NBD_FLAG_FUA, 0, DISK, 0},
        {NBD_CMD_TRIM, 0, 1, DISK, 22},
        {NBD_CMD_WRITE_ZEROES, 0, 0, DISK, 0},
        {NBD_CMD_WRITE_ZEROES, NBD_FLAG_NO_HOLE | NBD_FLAG_FUA, 100, 1000, 0},
        {NBD_CMD_WRITE_ZEROES, 0, DISK, 1, 28},
        {NBD_CMD_WRITE_ZEROES, NBD_FLAG_REQ_ONE, 0, 512, 22},
        {NBD_CMD_WRITE_ZEROES, 0, DISK, 0, 0},
        {NBD_CMD_CACHE, 0, 0, DISK, 0},
        {NBD_CMD_CACHE, 0, 0, DISK + 1, 22},
        {NBD_CMD_CACHE, 0, UINT64_MAX - 100, 200, 22},
        {NBD_CMD_TRIM, NBD_FLAG_PAYLOAD_LEN, 0, 1, 22}, /* no extended headers here */
        {NBD_CMD_BLOCK_STATUS, 0, 0, 512, 22},          /* no context was chosen */
        {99, 0, 0, 0, 22},
    };
    start_server(w, 0);
    add_export(w, NBD_N "\"id\":\"e\",\"writable\":true}");
    struct io_sock *s = connected(w, "n", false);
    for (unsigned i = 0; i < sizeof t / sizeof *t; i++)
        request(s, t[i].cmd, t[i].flags, t[i].off, t[i].len, NULL, 0);
    for (unsigned n = sizeof t / sizeof *t; n > 0; n--) {
        /* Replies come in any order: the cookie tells. */
        uint8_t head[NBD_SIMPLE_LEN];
        bool found = false;
        CHECK_EQ(io_recv_all(s, head, sizeof head), 0);
        for (unsigned i = 0; i < sizeof t / sizeof *t; i++)
            found |= (t[i].off ^ t[i].len) == get_be64(head + 8) && t[i].want == get_be32(head + 4);
        CHECK(found);
    }
    request(s, NBD_CMD_WRITE, 0, DISK - 1, 2, "ab", 2);
    CHECK_EQ(simple_reply(s, NULL, 0), 28);
    request(s, NBD_CMD_WRITE, 0, 0, NBD_MAX_PAYLOAD + 1, NULL, 0);
    CHECK_EQ(simple_reply(s, NULL, 0), 22);
    CHECK(is_closed(s));
    io_sock_close(s);
}

static void requests_are_checked(void **state)
{
    with_world(2, requests_body);
}

/* Small and big writes, whole and in pieces, come back as they were; the last ones overlap none. */
static void data_body(struct world *w)
{
    static const uint32_t sizes[] = {1, 511, 4096, 65535, 65536, 65537, 262144, 262145, 1u << 20};
    enum { N = sizeof sizes / sizeof *sizes };
    static uint8_t out[1u << 20], in[1u << 20];
    start_server(w, 0);
    add_export(w, NBD_N "\"id\":\"e\",\"writable\":true,\"writethrough\":true}");
    struct io_sock *s = connected(w, "n", false);
    for (unsigned i = 0; i < N; i++) {
        memset(out, 'a' + i, sizes[i]);
        request(s, NBD_CMD_WRITE, NBD_FLAG_FUA, i * MIB + i, sizes[i], out, sizes[i]);
    }
    for (unsigned i = 0; i < N; i++)
        CHECK_EQ(simple_reply(s, NULL, 0), 0);
    for (unsigned i = 0; i < N; i++) {
        request(s, NBD_CMD_READ, 0, i * MIB + i, sizes[i], NULL, 0);
        CHECK_EQ(simple_reply(s, in, sizes[i]), 0);
        memset(out, 'a' + i, sizes[i]);
        CHECK(memcmp(in, out, sizes[i]) == 0);
    }
    io_sock_close(s);
}

static void data_comes_back(void **state)
{
    with_world(2, data_body);
}

/* A read-only export takes the data of a write and goes on. */
static void read_only_body(struct world *w)
{
    static uint8_t data[100000];
    start_server(w, 0);
    add_export(w, NBD_N "\"id\":\"e\"}");
    struct io_sock *s = connected(w, "n", false);
    request(s, NBD_CMD_WRITE, 0, 0, 512, data, 512);
    request(s, NBD_CMD_WRITE, 0, 0, sizeof data, data, sizeof data);
    request(s, NBD_CMD_TRIM, 0, 0, 512, NULL, 0);
    request(s, NBD_CMD_WRITE_ZEROES, 0, 0, 512, NULL, 0);
    for (int i = 0; i < 4; i++)
        CHECK_EQ(simple_reply(s, NULL, 0), 1);
    request(s, NBD_CMD_READ, 0, 0, 512, NULL, 0);
    CHECK_EQ(simple_reply(s, data, 512), 0);
    io_sock_close(s);
}

static void read_only_export_refuses_writes(void **state)
{
    with_world(1, read_only_body);
}

static void structured_body(struct world *w)
{
    static struct chunk c;
    static uint8_t data[65536];
    start_server(w, 0);
    add_export(w, NBD_N "\"id\":\"e\",\"writable\":true}");
    struct io_sock *s = connected(w, "n", true);
    request(s, NBD_CMD_READ, 0, 0, 0, NULL, 0);
    next_chunk(s, &c);
    CHECK(c.flags == NBD_CHUNK_DONE && c.type == NBD_CHUNK_NONE && c.len == 0);
    request(s, NBD_CMD_READ, 0, DISK, 1, NULL, 0);
    next_chunk(s, &c);
    CHECK(c.flags == NBD_CHUNK_DONE && c.type == NBD_CHUNK_ERROR && get_be32(c.data) == 22);
    CHECK_EQ(c.len, 6 + get_be16(c.data + 4));
    memset(data, 'x', sizeof data);
    request(s, NBD_CMD_WRITE, 0, MIB, sizeof data, data, sizeof data);
    next_chunk(s, &c);
    CHECK(c.flags == NBD_CHUNK_DONE && c.type == NBD_CHUNK_NONE);
    request(s, NBD_CMD_READ, 0, MIB - 65536, 3 * 65536, NULL, 0);
    next_chunk(s, &c);
    CHECK(c.flags == 0 && c.type == NBD_CHUNK_OFFSET_HOLE && c.len == 12);
    CHECK(get_be64(c.data) == MIB - 65536 && get_be32(c.data + 8) == 65536);
    next_chunk(s, &c);
    CHECK(c.flags == 0 && c.type == NBD_CHUNK_OFFSET_DATA && c.len == 8 + 65536);
    CHECK(get_be64(c.data) == MIB && memcmp(c.data + 8, data, 65536) == 0);
    next_chunk(s, &c);
    CHECK(c.flags == NBD_CHUNK_DONE && c.type == NBD_CHUNK_OFFSET_HOLE);
    request(s, NBD_CMD_READ, NBD_FLAG_DF, MIB - 65536, 3 * 65536, NULL, 0);
    next_chunk(s, &c);
    CHECK(c.flags == NBD_CHUNK_DONE && c.type == NBD_CHUNK_OFFSET_DATA && c.len == 8 + 3 * 65536);
    io_sock_close(s);
}

static void structured_replies_have_holes(void **state)
{
    with_world(2, structured_body);
}

static struct io_sock *with_context(struct world *w, const char *context)
{
    uint8_t data[256];
    struct io_sock *s = dial(w);
    CHECK_EQ(option(s, NBD_OPT_STRUCTURED_REPLY, NULL, 0), NBD_REP_ACK);
    send_option(s, NBD_OPT_SET_META_CONTEXT, data, meta_data(data, "n", context));
    CHECK_EQ(option_reply(s), NBD_REP_META_CONTEXT);
    CHECK_EQ(option_reply(s), NBD_REP_ACK);
    CHECK_EQ(option(s, NBD_OPT_GO, data, go_data(data, "n")), NBD_REP_ACK);
    return s;
}

/* One chunk of block status, with exactly these (length, flags). */
static void expect_status(struct io_sock *s, unsigned id, unsigned n, const uint32_t (*want)[2])
{
    static struct chunk c;
    next_chunk(s, &c);
    CHECK(c.type == NBD_CHUNK_BLOCK_STATUS && c.flags == NBD_CHUNK_DONE);
    CHECK_EQ(get_be32(c.data), id);
    CHECK_EQ(c.len, 4 + 8 * n);
    for (unsigned i = 0; i < n; i++) {
        CHECK_EQ(get_be32(c.data + 4 + 8 * i), want[i][0]);
        CHECK_EQ(get_be32(c.data + 8 + 8 * i), want[i][1]);
    }
}

static void status_body(struct world *w)
{
    static const uint32_t holes[][2] = {{MIB, 3}, {65536, 0}, {DISK - MIB - 65536, 3}};
    static const uint32_t depths[][2] = {{DISK, 1}}; /* holes of a raw disk are its own */
    static const uint32_t dirty[][2] = {{MIB, 0}, {131072, 1}, {DISK - MIB - 131072, 0}};
    static const uint32_t short_one[][2] = {{10, 1}};
    static uint8_t data[65536];
    start_server(w, 0);
    add_bitmap(w, "n", "b", false);
    add_export(w, NBD_N
               "\"id\":\"e\",\"writable\":true,\"allocation-depth\":true,\"bitmaps\":[\"b\"]}");
    struct io_sock *s = with_context(w, "base:allocation");
    request(s, NBD_CMD_WRITE, 0, MIB, sizeof data, data, sizeof data);
    static struct chunk c;
    next_chunk(s, &c);
    request(s, NBD_CMD_TRIM, 0, MIB + 65536, 1, NULL, 0);
    next_chunk(s, &c);
    request(s, NBD_CMD_BLOCK_STATUS, 0, 0, DISK, NULL, 0);
    expect_status(s, 0, 3, holes);
    request(s, NBD_CMD_BLOCK_STATUS, NBD_FLAG_REQ_ONE, 0, DISK, NULL, 0);
    expect_status(s, 0, 1, holes);
    request(s, NBD_CMD_BLOCK_STATUS, 0, 0, 0, NULL, 0);
    next_chunk(s, &c);
    CHECK(c.type == NBD_CHUNK_ERROR && get_be32(c.data) == 22);
    io_sock_close(s);
    s = with_context(w, "qemu:allocation-depth");
    request(s, NBD_CMD_BLOCK_STATUS, 0, 0, DISK, NULL, 0);
    expect_status(s, 1, 1, depths);
    io_sock_close(s);
    s = with_context(w, "qemu:dirty-bitmap:b");
    request(s, NBD_CMD_BLOCK_STATUS, 0, 0, DISK, NULL, 0);
    expect_status(s, 2, 3, dirty);
    request(s, NBD_CMD_BLOCK_STATUS, 0, MIB + 65530, 10, NULL, 0);
    expect_status(s, 2, 1, short_one);
    io_sock_close(s);
}

static void block_status_tells_contexts(void **state)
{
    with_world(2, status_body);
}

/* A long CACHE is done piece by piece, even when everything is there already. */
static void cache_body(struct world *w)
{
    static uint8_t data[1u << 20];
    start_server(w, 0);
    add_export(w, NBD_N "\"id\":\"e\",\"writable\":true}");
    struct io_sock *s = connected(w, "n", false);
    for (unsigned i = 0; i < DISK / sizeof data; i++) {
        request(s, NBD_CMD_WRITE, 0, i * sizeof data, sizeof data, data, sizeof data);
        CHECK_EQ(simple_reply(s, NULL, 0), 0);
    }
    uint64_t turn = loop_turn_number(loop_self());
    request(s, NBD_CMD_CACHE, 0, 0, DISK, NULL, 0);
    CHECK_EQ(simple_reply(s, NULL, 0), 0);
    CHECK(loop_turn_number(loop_self()) - turn >= DISK / MIB);
    io_sock_close(s);
}

static void cache_leaves_turns_to_others(void **state)
{
    with_world(1, cache_body);
}

static void ext_request(struct io_sock *s, const struct nbd_request *rq, const void *payload)
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

/* The reply to an extended request, in one chunk; 0 or the error. */
static uint32_t ext_reply(struct io_sock *s, const struct nbd_request *rq, struct chunk *c)
{
    uint8_t head[NBD_EXT_CHUNK_LEN];
    CHECK_EQ(io_recv_all(s, head, sizeof head), 0);
    CHECK_EQ(get_be32(head), NBD_EXT_CHUNK_MAGIC);
    CHECK(get_be64(head + 8) == 42 && get_be64(head + 16) == rq->off);
    CHECK_EQ(get_be16(head + 4), NBD_CHUNK_DONE);
    c->type = get_be16(head + 6);
    CHECK(get_be64(head + 24) <= sizeof c->data);
    c->len = (uint32_t)get_be64(head + 24);
    if (c->len)
        CHECK_EQ(io_recv_all(s, c->data, c->len), 0);
    return c->type == NBD_CHUNK_ERROR ? get_be32(c->data) : 0;
}

static void extended_body(struct world *w)
{
    static struct chunk c;
    static uint8_t data[70000];
    enum { P = NBD_FLAG_PAYLOAD_LEN };
    const uint64_t max = UINT64_MAX, big = NBD_MAX_PAYLOAD + 1;
    const struct {
        struct nbd_request rq;
        uint32_t want, len;
    } t[] = {
        {{.cmd = NBD_CMD_READ, .off = 5, .len = 1000}, 0, 1008},
        {{.cmd = NBD_CMD_READ, .len = big}, 22, 0},
        {{.cmd = NBD_CMD_READ, .off = max, .len = 1}, 22, 0},
        {{.cmd = NBD_CMD_READ, .len = 8, .payload = 8, .flags = P}, 22, 0},
        {{.cmd = NBD_CMD_WRITE, .off = 9, .len = 70000, .payload = 70000, .flags = P}, 0, 0},
        {{.cmd = NBD_CMD_WRITE, .off = DISK, .len = 1, .payload = 1, .flags = P}, 28, 0},
        {{.cmd = NBD_CMD_TRIM, .len = DISK}, 0, 0},
        {{.cmd = NBD_CMD_TRIM, .len = 70000, .payload = 70000, .flags = P}, 22, 0},
        {{.cmd = NBD_CMD_TRIM, .len = max}, 22, 0},
        {{.cmd = NBD_CMD_WRITE_ZEROES, .off = 1, .len = max}, 28, 0},
        {{.cmd = NBD_CMD_CACHE, .len = DISK}, 0, 0},
        {{.cmd = NBD_CMD_BLOCK_STATUS, .off = MIB, .len = MIB}, 0, 24},
        {{.cmd = NBD_CMD_BLOCK_STATUS, .len = 12, .payload = 12, .flags = P},
         22,
         0}, /* of 0 bytes */
        {{.cmd = NBD_CMD_BLOCK_STATUS, .len = 9, .payload = 9, .flags = P}, 22, 0},
        {{.cmd = 4711, .len = 3, .payload = 3, .flags = P}, 22, 0},
        {{.cmd = NBD_CMD_FLUSH}, 0, 0},
    };
    uint8_t text[256];
    start_server(w, 0);
    add_export(w, NBD_N "\"id\":\"e\",\"writable\":true}");
    struct io_sock *s = dial(w);
    CHECK_EQ(option(s, NBD_OPT_EXTENDED_HEADERS, NULL, 0), NBD_REP_ACK);
    CHECK_EQ(option(s, NBD_OPT_SET_META_CONTEXT, text, meta_data(text, "n", "base:allocation")),
             NBD_REP_ACK);
    CHECK_EQ(option(s, NBD_OPT_GO, text, go_data(text, "n")), NBD_REP_ACK);
    for (unsigned i = 0; i < sizeof t / sizeof *t; i++) {
        ext_request(s, &t[i].rq, data);
        CHECK_EQ(ext_reply(s, &t[i].rq, &c), t[i].want);
        CHECK(t[i].want ? c.len > 6 : c.len == t[i].len);
    }
    uint8_t filter[12] = {0};
    put_be64(filter, DISK); /* the effect length, then the id of base:allocation: 0 */
    struct nbd_request rq = {
        .cmd = NBD_CMD_BLOCK_STATUS, .len = 12, .payload = 12, .flags = NBD_FLAG_PAYLOAD_LEN};
    ext_request(s, &rq, filter);
    CHECK_EQ(ext_reply(s, &rq, &c), 0);
    CHECK(c.type == NBD_CHUNK_BLOCK_STATUS_EXT && c.len == 24 && get_be32(c.data + 4) == 1);
    CHECK(get_be64(c.data + 8) == DISK && get_be64(c.data + 16) == 3);
    rq = (struct nbd_request){.cmd = NBD_CMD_WRITE, .len = 512};
    ext_request(s, &rq, NULL);
    CHECK_EQ(ext_reply(s, &rq, &c), 22);
    CHECK(is_closed(s));
    io_sock_close(s);
}

static void extended_headers_are_spoken(void **state)
{
    with_world(2, extended_body);
    for (uint64_t seed = 1; seed <= 10; seed++)
        with_sim_world(seed, 2, extended_body);
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
        cmocka_unit_test(request_is_decoded),
        cmocka_unit_test(extended_request_is_decoded),
        cmocka_unit_test(errno_goes_over_the_wire),
        cmocka_unit_test(contexts_match_queries),
        cmocka_unit_test(requests_have_a_cost),
        cmocka_unit_test(payloads_are_taken_or_not),
        cmocka_unit_test(wrong_exports_are_refused),
        cmocka_unit_test(long_names_are_refused),
        cmocka_unit_test(exports_come_and_go),
        cmocka_unit_test(export_without_memory),
        cmocka_unit_test(options_are_answered),
        cmocka_unit_test(broken_framing_ends_the_connection),
        cmocka_unit_test(haggling_leaves_turns_to_others),
        cmocka_unit_test(haggling_has_an_end),
        cmocka_unit_test(handshakes_have_a_time_limit),
        cmocka_unit_test(who_is_too_much_waits),
        cmocka_unit_test(requests_are_checked),
        cmocka_unit_test(data_comes_back),
        cmocka_unit_test(read_only_export_refuses_writes),
        cmocka_unit_test(structured_replies_have_holes),
        cmocka_unit_test(block_status_tells_contexts),
        cmocka_unit_test(extended_headers_are_spoken),
        cmocka_unit_test(cache_leaves_turns_to_others),
        cmocka_unit_test(gate_holds_requests),
        cmocka_unit_test(without_memory_the_reader_works),
        cmocka_unit_test(slow_client_holds_up_nobody),
        cmocka_unit_test(unread_replies_do_not_keep_an_export),
        cmocka_unit_test(long_requests_end_with_their_export),
        cmocka_unit_test(caching_ends_with_goodbye),
        cmocka_unit_test(clients_may_leave_any_time),
    };
    return cmocka_run_group_tests_name("export", tests, NULL, NULL);
}
