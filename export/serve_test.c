/* SPDX-License-Identifier: Apache-2.0 */
/* Tests of the NBD server's transmission: what is asked, and what is answered. */
#include <errno.h>

#include "base/mem.h"
#include "export/export_test.h"

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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(requests_are_checked),
        cmocka_unit_test(data_comes_back),
        cmocka_unit_test(read_only_export_refuses_writes),
        cmocka_unit_test(structured_replies_have_holes),
        cmocka_unit_test(block_status_tells_contexts),
        cmocka_unit_test(extended_headers_are_spoken),
        cmocka_unit_test(cache_leaves_turns_to_others),
    };
    return cmocka_run_group_tests_name("serve", tests, NULL, NULL);
}
