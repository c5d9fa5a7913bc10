/* SPDX-License-Identifier: Apache-2.0 */
/* Exports in lists of actions, by their parts: what is undone, what clients see meanwhile, and the
 * change of the node under a client. Mostly in the simulator, where a second of waiting is free. */
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>

#include "base/mem.h"
#include "export/export_test.h"

#define SECOND 1000000000u

/* Node "o": another file of the same size. */
static void add_other(struct world *w)
{
    struct world other = *w;
    snprintf(other.path, sizeof other.path, "%.100s.o", w->path);
    make_disk(&other);
    add_node(&other, "o", false);
}

static struct export *make(struct world *w, const char *text)
{
    struct arena a = {0};
    struct tide_error err;
    struct export *e;
    CHECK_EQ(export_make(w->x, parse(&q_block_export_options_type, text, &a), NULL, &e, &err), 0);
    arena_free(&a);
    return e;
}

static bool is_silent(struct io_sock *s)
{
    char c;
    io_sleep(SECOND / 10);
    return io_recv_now(s, &c, 1) == -EAGAIN;
}

static bool is_in_use(struct world *w, const char *node)
{
    struct tide_error err;
    return root_check(graph_find(w->graph, node), ROOT_WRITE | ROOT_ALONE, "a job", &err) < 0;
}

/* ------------------------------------------------------------------ claims */

static void claim_body(struct world *w)
{
    struct tide_error err;
    struct root *c, *job;
    struct quiesce *q;
    struct node *n = graph_find(w->graph, "n");
    CHECK_EQ(root_claim(n, ROOT_READ | ROOT_WRITE, "export 'e'", &c, &err), 0);
    CHECK(!is_in_use(w, "n") && !root_uses(c, n));
    CHECK_EQ(root_new(n, ROOT_WRITE | ROOT_ALONE, "job 'j'", &job, &err), 0);
    CHECK_EQ(root_check(n, ROOT_READ | ROOT_WRITE, "export 'e'", &err), -EBUSY);
    root_free(job);
    CHECK(!root_try_enter(c));
    root_step_in(c);
    CHECK(is_in_use(w, "n") && root_uses(c, n) && !root_try_enter(c));
    CHECK(node_is_quiesced(n, QUIESCE_ALL)); /* its gate is shut */
    CHECK_EQ(quiesce_begin(w->graph, &n, 1, QUIESCE_ALL, &q, &err), 0);
    root_open(c);
    CHECK(!root_try_enter(c));
    quiesce_end(q);
    CHECK(root_try_enter(c));
    root_leave(c);
    root_step_aside(c);
    CHECK(!is_in_use(w, "n"));
    root_free(c);
}

static void claims_are_in_nobodys_way(void **state)
{
    with_sim_world(1, 2, claim_body);
}

struct hammer {
    struct root *root;
    _Atomic bool over;
    _Atomic unsigned n_tries;
    struct io_event ended;
};

static void hammer_main(void *arg)
{
    struct hammer *h = arg;
    while (!atomic_load(&h->over)) {
        CHECK(!root_try_enter(h->root));
        atomic_fetch_add(&h->n_tries, 1);
    }
    io_event_set(&h->ended);
}

static struct node *add_null(struct world *w, const char *name)
{
    struct arena a = {0};
    struct tide_error err;
    struct node *n;
    char text[200];
    snprintf(text, sizeof text, "{\"driver\":\"null-co\",\"node-name\":\"%s\",\"size\":512}", name);
    CHECK_EQ(graph_add(w->graph, parse(&q_blockdev_options_type, text, &a), &n, &err), 0);
    arena_free(&a);
    return n;
}

/* Guests on other loops knock at the gate all the time: they are counted for a moment, not inside.
 */
static void knocking_body(struct world *w)
{
    struct tide_error err;
    struct quiesce *q;
    struct root *claim;
    struct node *p = add_null(w, "p"), *o = add_null(w, "o");
    struct hammer h = {.ended = IO_EVENT_INIT};
    CHECK_EQ(root_new(p, ROOT_READ, "export 'e'", &h.root, &err), 0);
    CHECK_EQ(root_claim(o, ROOT_READ, "export 'e'", &claim, &err), 0);
    CHECK_EQ(quiesce_begin(w->graph, &p, 1, QUIESCE_ALL, &q, &err), 0);
    CHECK_EQ(loop_spawn(io_loop(w->io, 1), hammer_main, &h), 0);
    while (atomic_load(&h.n_tries) < 1000000)
        root_swap_node(h.root, claim);
    atomic_store(&h.over, true);
    CHECK_EQ(io_event_wait(&h.ended, io_now(w->io) + 20ull * SECOND), 0);
    quiesce_end(q);
    root_free(claim);
    root_free(h.root);
}

static void nodes_are_swapped_while_guests_knock(void **state)
{
    with_world(2, knocking_body);
}

static void check_one_node(struct world *w, const char *used, const char *unused)
{
    struct tide_error err;
    CHECK(strcmp(node_name(export_node(w->x, "e")), used) == 0);
    CHECK(is_in_use(w, used) && !is_in_use(w, unused));
    CHECK_EQ(graph_del(w->graph, used, &err), -EBUSY);
}

static void swap_body(struct world *w)
{
    struct tide_error err;
    struct node *both[2];
    struct root *claim = NULL;
    struct export *e;
    struct quiesce *q;
    start_server(w, 0);
    add_other(w);
    both[0] = graph_find(w->graph, "n");
    both[1] = graph_find(w->graph, "o");
    add_export(w, NBD_N "\"id\":\"e\",\"writable\":true}");
    CHECK_EQ(quiesce_begin(w->graph, both, 2, QUIESCE_ALL, &q, &err), 0);
    CHECK_EQ(export_set_node(w->x, "e", "o", &claim, &e, &err), 0);
    check_one_node(w, "o", "n");
    CHECK(node_is_quiesced(both[0], QUIESCE_ALL) && node_is_quiesced(both[1], QUIESCE_ALL));
    export_swap_node(e, claim);
    check_one_node(w, "n", "o");
    export_swap_node(e, claim);
    quiesce_end(q);
    check_one_node(w, "o", "n");
    root_free(claim);
    check_one_node(w, "o", "n");
    CHECK_EQ(graph_del(w->graph, "n", &err), 0);
    add_node(w, "n", false);
}

static void the_node_left_is_unused(void **state)
{
    with_sim_world(1, 2, swap_body);
}

/* Whatever allocation fails, nothing has changed: neither node has one user more. */
static void no_memory_body(struct world *w)
{
    struct tide_error err;
    struct export *e;
    struct root *claim = NULL;
    struct quiesce *q;
    int r = -ENOMEM;
    start_server(w, 0);
    add_other(w);
    add_export(w, NBD_N "\"id\":\"e\"}");
    struct node *n = graph_find(w->graph, "n");
    CHECK_EQ(quiesce_begin(w->graph, &n, 1, QUIESCE_ALL, &q, &err), 0);
    for (unsigned i = 1; r == -ENOMEM; i++) {
        CHECK(i < 100);
        mem_fail_after(i);
        r = export_set_node(w->x, "e", "o", &claim, &e, &err);
        mem_fail_after(0);
        CHECK(r == 0 || (r == -ENOMEM && !claim && i < 10));
        CHECK_EQ(graph_del(w->graph, r ? "n" : "o", &err), -EBUSY);
        if (r == 0)
            break;
        CHECK_EQ(graph_del(w->graph, "o", &err), 0);
        add_other(w);
    }
    CHECK_EQ(r, 0);
    quiesce_end(q);
    root_free(claim);
}

static void without_memory_nothing_is_swapped(void **state)
{
    with_sim_world(1, 1, no_memory_body);
}

/* ------------------------------------------------------------------ the gate is shut */

/* What a client may ask about exports while a list is under way. */
static void send_questions(struct io_sock **s, const char *name)
{
    uint8_t data[100];
    send_option(s[0], NBD_OPT_LIST, NULL, 0);
    send_option(s[1], NBD_OPT_INFO, data, go_data(data, name));
    send_option(s[2], NBD_OPT_GO, data, go_data(data, name));
    send_option(s[3], NBD_OPT_LIST_META_CONTEXT, data, meta_data(data, name, "base:allocation"));
    send_option(s[4], NBD_OPT_SET_META_CONTEXT, data, meta_data(data, name, "base:allocation"));
    send_option(s[5], NBD_OPT_EXPORT_NAME, name, strlen(name));
}

/* `there`: they find it, or they are told that there is none. */
static void take_answers(struct io_sock **s, bool there, unsigned n_listed)
{
    uint8_t info[10];
    uint32_t type;
    for (unsigned n = 0; (type = option_reply(s[0])) != NBD_REP_ACK; n_listed--)
        CHECK(type == NBD_REP_SERVER && ++n < 10);
    CHECK_EQ(n_listed, 0);
    for (unsigned i = 1; i < 5; i++) {
        while ((type = option_reply(s[i])) != NBD_REP_ACK && !(type & 0x80000000u))
            continue;
        CHECK_EQ(type, there ? NBD_REP_ACK : NBD_REP_ERR_UNKNOWN);
    }
    if (there)
        CHECK_EQ(io_recv_all(s[5], info, sizeof info), 0);
    else
        CHECK(is_closed(s[5]));
    if (there) {
        request(s[2], NBD_CMD_READ, 0, 0, 0, NULL, 0);
        CHECK_EQ(simple_reply(s[2], NULL, 0), 0);
    }
}

static void dial_all(struct world *w, struct io_sock **s)
{
    for (unsigned i = 0; i < 6; i++)
        s[i] = dial(w);
    CHECK_EQ(option(s[4], NBD_OPT_STRUCTURED_REPLY, NULL, 0), NBD_REP_ACK);
}

static void check_silence(struct io_sock **s)
{
    for (unsigned i = 0; i < 6; i++)
        CHECK(is_silent(s[i]));
}

static void close_all(struct io_sock **s)
{
    for (unsigned i = 0; i < 6; i++)
        io_sock_close(s[i]);
}

static void new_export_body(struct world *w)
{
    struct io_sock *s[6], *other;
    add_export(w, NBD_N "\"id\":\"e\"}");
    for (unsigned undo = 0; undo < 2; undo++) {
        dial_all(w, s);
        other = dial(w);
        graph_effects_begin(w->graph);
        struct export *f = make(w, NBD_N "\"id\":\"f\",\"name\":\"f\"}");
        send_questions(s, "f");
        check_silence(s);
        CHECK_EQ(option(other, 4711, NULL, 0), NBD_REP_ERR_UNSUP); /* others are answered */
        if (undo)
            export_unmake(f);
        else
            export_open(f);
        graph_effects_end(w->graph);
        if (undo)
            export_free(f);
        take_answers(s, !undo, undo ? 1 : 2);
        close_all(s);
        struct tide_error err;
        CHECK_EQ(export_del(w->x, "f", true, &err), undo ? -ENOENT : 0);
        wait_deleted(w, 1);
        io_sock_close(other);
    }
}

static void with_server(struct world *w, void (*body)(struct world *))
{
    start_server(w, 0);
    body(w);
}

static void new_export_main(struct world *w)
{
    with_server(w, new_export_body);
}

static void nobody_sees_an_export_before_its_list_is_decided(void **state)
{
    for (uint64_t seed = 1; seed <= 10; seed++)
        with_sim_world(seed, 1 + seed % 3, new_export_main);
}

static void deleted_body(struct world *w)
{
    struct tide_error err;
    struct io_sock *s[6];
    add_export(w, NBD_N "\"id\":\"e\"}");
    add_export(w, NBD_N "\"id\":\"g\",\"name\":\"g\"}");
    for (unsigned undo = 2; undo-- > 0;) {
        struct export *e, *none;
        dial_all(w, s);
        graph_effects_begin(w->graph);
        CHECK_EQ(export_find_del(w->x, "e", false, &e, &err), 0);
        export_hide(e);
        CHECK_EQ(export_find_del(w->x, "e", false, &none, &err), -ENOENT);
        CHECK(!export_node(w->x, "e") && !is_in_use(w, "n"));
        send_questions(s, "n");
        check_silence(s);
        CHECK_EQ(w->n_deleted, 0);
        if (undo)
            export_unhide(e);
        else
            CHECK(export_end(e));
        graph_effects_end(w->graph);
        if (!undo)
            export_retire(e);
        take_answers(s, undo, undo ? 2 : 1);
        close_all(s);
        io_sleep(SECOND);
    }
    CHECK_EQ(w->n_deleted, 1);
}

static void deleted_main(struct world *w)
{
    with_server(w, deleted_body);
}

static void nobody_misses_an_export_before_its_list_is_decided(void **state)
{
    for (uint64_t seed = 1; seed <= 10; seed++)
        with_sim_world(seed, 1 + seed % 3, deleted_main);
}

/* ------------------------------------------------------------------ clients of what is deleted */

/* The last client leaves while it is open whether the export stays. */
static void leaving_body(struct world *w)
{
    struct tide_error err;
    struct export *e;
    start_server(w, 0);
    struct dirty_bitmap *b = add_bitmap(w, "n", "b", true);
    for (unsigned undo = 2; undo-- > 0;) {
        if (undo)
            add_export(w, NBD_N "\"id\":\"e\",\"bitmaps\":[\"b\"]}");
        struct io_sock *s = connected(w, "n", false);
        graph_effects_begin(w->graph);
        CHECK_EQ(export_find_del(w->x, "e", true, &e, &err), 0);
        export_hide(e);
        CHECK_EQ(b->n_busy, 1); /* somebody reads it */
        io_sock_close(s);
        io_sleep(SECOND);
        CHECK_EQ(export_n_connections(e), 0);
        CHECK_EQ(w->n_deleted, 0);
        if (undo)
            export_unhide(e);
        else
            CHECK(export_end(e));
        CHECK_EQ(b->n_busy, undo);
        graph_effects_end(w->graph);
        if (!undo)
            export_retire(e);
        CHECK_EQ(w->n_deleted, !undo);
    }
}

static void the_last_client_leaves_meanwhile(void **state)
{
    for (uint64_t seed = 1; seed <= 10; seed++)
        with_sim_world(seed, 1 + seed % 3, leaving_body);
}

/* A list that is under way does not see a bitmap become free, however it comes about. */
static void gone_body(struct world *w)
{
    struct tide_error err;
    struct export *e, *none;
    start_server(w, 0);
    struct dirty_bitmap *b = add_bitmap(w, "n", "b", true);
    add_export(w, NBD_N "\"id\":\"e\",\"bitmaps\":[\"b\"]}");
    struct io_sock *s = connected(w, "n", false);
    graph_effects_begin(w->graph);
    CHECK_EQ(export_find_del(w->x, "e", false, &none, &err), -EBUSY);
    CHECK_EQ(export_find_del(w->x, "e", true, &e, &err), 0);
    export_hide(e);
    CHECK(!export_end(e));
    CHECK(is_closed(s));
    io_sleep(SECOND);
    CHECK_EQ(b->n_busy, 1);
    CHECK_EQ(export_find_del(w->x, "e", true, &none, &err), -EBUSY);
    CHECK(strstr(err.msg, "'e' is shutting down already"));
    add_export(w, NBD_N "\"id\":\"e\"}"); /* both names are free */
    json_t *all = exports_query(w->x);
    CHECK_EQ(json_array_size(all), 2);
    CHECK(json_is_false(json_object_get(json_array_get(all, 0), "shutting-down")));
    CHECK(json_is_true(json_object_get(json_array_get(all, 1), "shutting-down")));
    json_decref(all);
    graph_effects_end(w->graph);
    wait_deleted(w, 1);
    CHECK_EQ(b->n_busy, 0);
    CHECK(export_node(w->x, "e"));
    io_sock_close(s);
}

static void bitmaps_become_free_between_lists(void **state)
{
    for (uint64_t seed = 1; seed <= 10; seed++)
        with_sim_world(seed, 1 + seed % 3, gone_body);
}

/* A write that waits at the gate while its export is deleted does not happen any more. */
static void late_body(struct world *w)
{
    struct tide_error err;
    struct export *e;
    struct quiesce *q;
    uint8_t data[512] = {1};
    struct node *n = graph_find(w->graph, "n");
    struct dirty_bitmap *b = add_bitmap(w, "n", "b", false);
    start_server(w, 0);
    add_export(w, NBD_N "\"id\":\"e\",\"writable\":true}");
    struct io_sock *s = connected(w, "n", false);
    CHECK_EQ(quiesce_begin(w->graph, &n, 1, QUIESCE_WRITES, &q, &err), 0);
    graph_effects_begin(w->graph);
    request(s, NBD_CMD_WRITE, 0, 0, sizeof data, data, sizeof data);
    CHECK(is_silent(s));
    CHECK_EQ(export_find_del(w->x, "e", true, &e, &err), 0);
    export_hide(e);
    CHECK(!export_end(e));
    graph_effects_end(w->graph);
    quiesce_end(q);
    wait_deleted(w, 1);
    CHECK_EQ(dirty_bitmap_bytes(b, NULL), 0);
    CHECK_EQ(node_preadv(n, &(struct iovec){data, 1}, 1, 0, 1), 0);
    CHECK_EQ(data[0], 0);
    io_sock_close(s);
}

static void what_waits_at_the_gate_comes_too_late(void **state)
{
    for (uint64_t seed = 1; seed <= 10; seed++)
        with_sim_world(seed, 1 + seed % 3, late_body);
}

/* ------------------------------------------------------------------ writes through the swap */

#define BLOCK 65536u /* what one bit of a bitmap stands for */
#define N_BLOCKS 240u
#define DEPTH 8u

/* Writes each block once, in order, DEPTH at a time. */
struct writer {
    struct world *w;
    unsigned asked, answered;
    bool done;
};

static void writer_main(void *arg)
{
    struct writer *wr = arg;
    static uint8_t data[BLOCK];
    struct io_sock *s = connected(wr->w, "n", false);
    while (wr->answered < N_BLOCKS) {
        for (; wr->asked < N_BLOCKS && wr->asked < wr->answered + DEPTH; wr->asked++) {
            memset(data, 1 + wr->asked % 255, sizeof data);
            request(s, NBD_CMD_WRITE, 0, wr->asked * BLOCK, BLOCK, data, BLOCK);
        }
        CHECK_EQ(simple_reply(s, NULL, 0), 0);
        wr->answered++;
    }
    io_sock_close(s);
    wr->done = true;
}

static void swap(struct world *w, const char *node, bool undo)
{
    struct tide_error err;
    struct root *claim = NULL;
    struct export *e;
    struct quiesce *q;
    struct node *both[] = {graph_find(w->graph, "n"), graph_find(w->graph, "o")};
    graph_lock(w->graph);
    CHECK_EQ(quiesce_begin(w->graph, both, 2, QUIESCE_ALL, &q, &err), 0);
    graph_effects_begin(w->graph);
    CHECK_EQ(export_set_node(w->x, "e", node, &claim, &e, &err), 0);
    loop_pause(); /* nobody gets in here, however long it takes */
    if (undo)
        export_swap_node(e, claim);
    graph_effects_end(w->graph);
    quiesce_end(q);
    root_free(claim);
    graph_unlock(w->graph);
}

/* Which of the two files has the block; it is whole there, and nothing of it on the other. */
static unsigned side_of(struct world *w, unsigned block)
{
    static uint8_t got[BLOCK], want[BLOCK];
    static const uint8_t zero[BLOCK];
    unsigned side = 2;
    memset(want, 1 + block % 255, sizeof want);
    for (unsigned i = 0; i < 2; i++) {
        struct node *n = graph_find(w->graph, i ? "o" : "n");
        struct iovec iov = {got, BLOCK};
        CHECK_EQ(node_preadv(n, &iov, 1, block * BLOCK, BLOCK), 0);
        if (memcmp(got, want, BLOCK) == 0) {
            CHECK_EQ(side, 2);
            side = i;
        } else {
            CHECK(memcmp(got, zero, BLOCK) == 0);
        }
    }
    CHECK(side < 2);
    return side;
}

struct span {
    unsigned from, to, side; /* blocks asked for since `from` and answered before `to` */
};

static void writes_body(struct world *w)
{
    static struct span span[2 * N_BLOCKS];
    static struct writer wr;
    unsigned n = 0, side = 0, from = 0;
    wr = (struct writer){.w = w};
    start_server(w, 0);
    add_other(w);
    struct dirty_bitmap *b[2] = {add_bitmap(w, "n", "b", false), add_bitmap(w, "o", "b", false)};
    add_export(w, NBD_N "\"id\":\"e\",\"writable\":true}");
    CHECK_EQ(loop_run_now(writer_main, &wr), 0);
    while (!wr.done) {
        for (unsigned at = wr.answered; !wr.done && wr.answered < at + 1 + n % 7;)
            io_sleep(1000);
        span[n++] = (struct span){from, wr.answered, side};
        bool undo = n % 3 == 0;
        swap(w, side ? "n" : "o", undo);
        side ^= !undo;
        from = wr.asked;
    }
    CHECK(n > 10);
    for (unsigned i = 0; i < n; i++) {
        for (unsigned k = span[i].from; k < span[i].to; k++)
            CHECK_EQ(side_of(w, k), span[i].side);
    }
    for (unsigned k = 0; k < N_BLOCKS; k++) {
        uint64_t at, len;
        unsigned s = side_of(w, k);
        CHECK(bitmap_next_dirty(b[s]->bits, k * BLOCK, (k + 1) * BLOCK, &at, &len));
        CHECK_EQ(len, BLOCK);
        CHECK(!bitmap_next_dirty(b[!s]->bits, k * BLOCK, (k + 1) * BLOCK, &at, &len));
    }
}

static void every_write_is_on_one_side(void **state)
{
    for (uint64_t seed = 1; seed <= 20; seed++)
        with_sim_world(seed, 1 + seed % 3, writes_body);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(claims_are_in_nobodys_way),
        cmocka_unit_test(nodes_are_swapped_while_guests_knock),
        cmocka_unit_test(the_node_left_is_unused),
        cmocka_unit_test(without_memory_nothing_is_swapped),
        cmocka_unit_test(nobody_sees_an_export_before_its_list_is_decided),
        cmocka_unit_test(nobody_misses_an_export_before_its_list_is_decided),
        cmocka_unit_test(the_last_client_leaves_meanwhile),
        cmocka_unit_test(bitmaps_become_free_between_lists),
        cmocka_unit_test(what_waits_at_the_gate_comes_too_late),
        cmocka_unit_test(every_write_is_on_one_side),
    };
    return cmocka_run_group_tests_name("export-swap", tests, NULL, NULL);
}
