/* SPDX-License-Identifier: Apache-2.0 */
/* Tests of the NBD server's negotiation. */
#include <errno.h>

#include "export/export_test.h"

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
    with_sim_world(1, 2, haggle_limit_body); /* on a busy machine 8 MiB may take longer */
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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(options_are_answered),
        cmocka_unit_test(broken_framing_ends_the_connection),
        cmocka_unit_test(haggling_leaves_turns_to_others),
        cmocka_unit_test(haggling_has_an_end),
        cmocka_unit_test(handshakes_have_a_time_limit),
        cmocka_unit_test(who_is_too_much_waits),
    };
    return cmocka_run_group_tests_name("handshake", tests, NULL, NULL);
}
