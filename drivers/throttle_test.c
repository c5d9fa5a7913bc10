/* SPDX-License-Identifier: Apache-2.0 */
/* Nodes that are throttled, with a clock that the simulator makes up: whoever waits an hour here
 * takes no time. Clients are coroutines that keep some requests in flight; the node below answers
 * at once, so that what is counted is the throttle's doing alone. The last tests do the same on
 * real loops, where threads meet at a group's lock. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/bytes.h"
#include "base/check.h"
#include "base/mem.h"
#include "block/node.h"
#include "block/root.h"
#include "block/throttle_group.h"
#include "io/sim.h"
#include "schema/types.h"

#define SECOND UINT64_C(1000000000)
#define MS UINT64_C(1000000)
#define N_LOOPS 3u
#define MAX_CLIENTS 8u

struct world;

/* Keeps `depth` requests of `len` bytes in flight at its root, on one loop. */
struct client {
    struct world *w;
    struct root *root;
    unsigned loop, depth;
    enum { READ, WRITE, ZERO, DISCARD, FLUSH } kind;
    uint64_t len, think_ns;
    _Atomic bool stop;
    _Atomic unsigned n_done, n_running;
    _Atomic uint64_t last; /* when a request was done */
    struct io_event ended;
};

struct world {
    struct io *io;
    struct graph *graph;
    struct client client[MAX_CLIENTS];
    unsigned n_clients;
    uint64_t began;
    void (*body)(struct world *);
};

/* ------------------------------------------------------------------ a graph */

static struct node *add_node(struct world *w, const char *text)
{
    struct arena a = {0};
    struct tide_error err;
    struct node *n = NULL;
    void *o;
    json_t *j = json_loads(text, 0, NULL);
    CHECK(j);
    CHECK_EQ(schema_parse(&q_blockdev_options_type, j, &a, 0, &o, &err), 0);
    int r = graph_add(w->graph, o, &n, &err);
    if (r < 0)
        fprintf(stderr, "%s\n", err.msg);
    CHECK_EQ(r, 0);
    json_decref(j);
    arena_free(&a);
    return n;
}

/* A disk that takes no time, and a throttle of that name over it. */
static struct node *add_throttled(struct world *w, const char *name, const char *group)
{
    char text[300];
    snprintf(text, sizeof text,
             "{\"driver\":\"throttle\",\"node-name\":\"%s\",\"throttle-group\":\"%s\","
             "\"discard\":\"unmap\",\"file\":{\"driver\":\"null-co\",\"size\":1073741824}}",
             name, group);
    return add_node(w, text);
}

/* "name", value, ..., NULL on top of what is in `l`. */
static void set_limits(struct throttle_limits *l, va_list ap)
{
    const char *name;
    while ((name = va_arg(ap, const char *))) {
        unsigned i = 0;
        while (strcmp(throttle_field_name(i), name))
            i++;
        *throttle_field(l, i) = va_arg(ap, int);
    }
}

static void add_group(struct world *w, const char *id, ...)
{
    struct throttle_limits l = THROTTLE_NO_LIMITS;
    struct tide_error err;
    va_list ap;
    va_start(ap, id);
    set_limits(&l, ap);
    va_end(ap);
    CHECK_EQ(throttle_group_new(w->graph, id, &l, &err), 0);
}

static void change_group(struct world *w, const char *id, ...)
{
    struct throttle_group *t = throttle_group_find(w->graph, id);
    struct throttle_limits l;
    struct tide_error err;
    va_list ap;
    throttle_group_limits(t, &l);
    va_start(ap, id);
    set_limits(&l, ap);
    va_end(ap);
    CHECK_EQ(throttle_group_set(t, &l, &err), 0);
}

/* ------------------------------------------------------------------ clients */

static co_fn int one_request(struct client *c, struct node *n)
{
    static char data[4 * MIB];
    char *p = c->kind == READ ? io_buf_get(c->len) : data;
    struct iovec iov = {p, c->len};
    int r = 0;
    CHECK(p && c->len <= sizeof data);
    switch (c->kind) {
    case READ:
        r = node_preadv(n, &iov, 1, 0, c->len);
        io_buf_put(p, c->len);
        break;
    case WRITE:
        r = node_pwritev(n, &iov, 1, 0, c->len, 0);
        break;
    case ZERO:
        r = node_zero(n, 0, c->len, 0);
        break;
    case DISCARD:
        r = node_discard(n, 0, c->len);
        break;
    case FLUSH:
        r = node_flush(n);
        break;
    }
    return r;
}

static void client_main(void *arg)
{
    struct client *c = arg;
    unsigned n = 0;
    while (!atomic_load(&c->stop)) {
        root_enter(c->root);
        bool stop = atomic_load(&c->stop); /* while it was parked */
        if (!stop)
            CHECK_EQ(one_request(c, root_node(c->root)), 0);
        root_leave(c->root);
        if (stop)
            break;
        atomic_store(&c->last, io_now(c->w->io));
        atomic_fetch_add(&c->n_done, 1);
        if (c->think_ns)
            io_sleep(c->think_ns);
        else if (++n % 16 == 0)
            loop_pause(); /* where nothing waits for anything */
    }
    if (atomic_fetch_sub(&c->n_running, 1) == 1)
        io_event_set(&c->ended);
}

static co_fn struct client *add_client(struct world *w, const char *node, int kind, uint64_t len,
                                       unsigned depth)
{
    struct client *c = &w->client[w->n_clients];
    struct tide_error err;
    unsigned n = io_n_loops(w->io);
    *c = (struct client){.w = w, .depth = depth, .kind = kind, .len = len, .ended = IO_EVENT_INIT};
    c->loop = w->n_clients++ % n;
    CHECK_EQ(root_new(graph_find(w->graph, node), kind == READ ? ROOT_READ : ROOT_READ | ROOT_WRITE,
                      node, &c->root, &err),
             0);
    atomic_store(&c->n_running, depth);
    for (unsigned i = 0; i < depth; i++)
        CHECK_EQ(loop_spawn(io_loop(w->io, c->loop), client_main, c), 0);
    return c;
}

/* Its requests end, at once or at the throttle's pace. */
static co_fn void end_client(struct client *c, bool hurry)
{
    atomic_store(&c->stop, true);
    if (hurry)
        root_hurry(c->root);
    if (atomic_load(&c->n_running))
        io_event_wait(&c->ended, IO_FOREVER);
    root_free(c->root);
    c->root = NULL;
}

/* Until that long after the beginning. */
static co_fn void wait_until(struct world *w, uint64_t ns)
{
    uint64_t now = io_now(w->io) - w->began;
    CHECK(now <= ns);
    io_sleep(ns - now);
}

static void world_main(void *arg)
{
    struct world *w = arg;
    CHECK_EQ(graph_new(w->io, &w->graph), 0);
    CHECK_EQ(graph_start(w->graph), 0);
    w->began = io_now(w->io);
    w->body(w);
    for (unsigned i = 0; i < w->n_clients; i++) {
        if (w->client[i].root)
            end_client(&w->client[i], true);
    }
    graph_close_all(w->graph);
    graph_stop(w->graph);
    graph_free(w->graph);
    io_stop(w->io);
}

/* Steps of the simulated machine take time too, a little. */
static void simulated(void (*body)(struct world *))
{
    for (uint64_t seed = 1; seed <= 3; seed++) {
        struct world w = {.body = body};
        assert_int_equal(sim_new(&(struct sim_config){.seed = seed, .n_loops = N_LOOPS}, &w.io), 0);
        assert_int_equal(io_run(w.io, world_main, &w), 0);
        io_free(w.io);
    }
}

static void real(void (*body)(struct world *), unsigned n_loops)
{
    struct world w = {.body = body};
    struct tide_error err;
    assert_int_equal(io_new(IO_PORTABLE, n_loops, &w.io, &err), 0);
    assert_int_equal(io_run(w.io, world_main, &w), 0);
    io_free(w.io);
}

/* ------------------------------------------------------------------ rates */

static void iops_body(struct world *w)
{
    add_group(w, "g", "iops-total", 100, NULL);
    add_throttled(w, "t", "g");
    struct client *c = add_client(w, "t", READ, 4096, 4);
    wait_until(w, 10 * SECOND + 5 * MS);
    CHECK_EQ(c->n_done, 1011);
    wait_until(w, 300 * SECOND + 5 * MS);
    CHECK_EQ(c->n_done, 30011);
}

static void requests_per_second(void **state)
{
    simulated(iops_body);
}

static void bps_body(struct world *w)
{
    add_group(w, "g", "bps-write", 1048576, NULL);
    add_throttled(w, "t", "g");
    struct client *wr = add_client(w, "t", WRITE, 4096, 16);
    struct client *rd = add_client(w, "t", READ, 4096, 1);
    rd->think_ns = MS;
    wait_until(w, 10 * SECOND);
    CHECK_EQ(wr->n_done, 2586);
    CHECK(rd->n_done > 8000); /* reads are free here */
}

static void bytes_per_second_of_one_side(void **state)
{
    simulated(bps_body);
}

/* Zeroes and discards are writes of their length; flushes are free. */
static void kinds_body(struct world *w)
{
    add_group(w, "gz", "bps-write", 1048576, NULL);
    add_group(w, "gd", "iops-write", 10, NULL);
    add_throttled(w, "z", "gz");
    add_throttled(w, "d", "gd");
    struct client *zero = add_client(w, "z", ZERO, 2 * MIB, 1);
    struct client *discard = add_client(w, "d", DISCARD, MIB, 2);
    struct client *flush = add_client(w, "d", FLUSH, 0, 1);
    flush->think_ns = MS;
    wait_until(w, 20 * SECOND + 5 * MS);
    CHECK_EQ(zero->n_done, 11);
    CHECK_EQ(discard->n_done, 202);
    CHECK(flush->n_done > 16000);
}

static void zeroes_and_discards_are_writes(void **state)
{
    simulated(kinds_body);
}

static void burst_body(struct world *w)
{
    add_group(w, "g", "iops-total", 100, "iops-total-max", 200, "iops-total-max-length", 5, NULL);
    add_throttled(w, "t", "g");
    struct client *c = add_client(w, "t", WRITE, 512, 8);
    wait_until(w, 2 * SECOND + MS);
    CHECK_EQ(c->n_done, 421);
    wait_until(w, 5 * SECOND + MS);
    CHECK_EQ(c->n_done, 1021);
    wait_until(w, 20 * SECOND + MS);
    CHECK_EQ(c->n_done, 3001);
}

static void bursts(void **state)
{
    simulated(burst_body);
}

/* ------------------------------------------------------------------ sharing */

static void fair_body(struct world *w)
{
    add_group(w, "g", "iops-total", 100, NULL);
    add_throttled(w, "t0", "g");
    add_throttled(w, "t1", "g");
    add_throttled(w, "t2", "g");
    struct client *greedy = add_client(w, "t0", READ, 4096, 64);
    struct client *modest = add_client(w, "t1", READ, 4096, 1);
    struct client *third = add_client(w, "t2", READ, 65536, 2);
    wait_until(w, SECOND + 5 * MS);
    unsigned n[] = {greedy->n_done, modest->n_done, third->n_done};
    CHECK_EQ(n[0] + n[1] + n[2], 111);
    wait_until(w, 31 * SECOND + 5 * MS);
    CHECK_IN(greedy->n_done - n[0], 999, 1001);
    CHECK_IN(modest->n_done - n[1], 999, 1001);
    CHECK_IN(third->n_done - n[2], 999, 1001);
    CHECK_EQ(greedy->n_done + modest->n_done + third->n_done, 3111);
    end_client(third, true); /* what it leaves is for the others */
    n[1] = modest->n_done;
    wait_until(w, 61 * SECOND + 5 * MS);
    CHECK_IN(modest->n_done - n[1], 1498, 1501);
}

static void nodes_of_a_group_share_fairly(void **state)
{
    simulated(fair_body);
}

static void sides_body(struct world *w)
{
    add_group(w, "g", "iops-total", 100, NULL);
    add_throttled(w, "t", "g");
    struct client *rd = add_client(w, "t", READ, 4096, 32);
    struct client *wr = add_client(w, "t", WRITE, 4096, 1);
    wait_until(w, SECOND + 5 * MS);
    unsigned before = wr->n_done;
    wait_until(w, 21 * SECOND + 5 * MS);
    CHECK_EQ(rd->n_done + wr->n_done, 2111);
    CHECK_IN(wr->n_done - before, 999, 1001);
}

static void reads_and_writes_take_turns(void **state)
{
    simulated(sides_body);
}

/* A read limit with its queue full does not hold up writes, and both rates are kept. */
static void two_limits_body(struct world *w)
{
    add_group(w, "g", "iops-read", 10, "iops-write", 50, NULL);
    add_throttled(w, "t", "g");
    struct client *rd = add_client(w, "t", READ, 4096, 8);
    struct client *wr = add_client(w, "t", WRITE, 4096, 8);
    wait_until(w, 100 * SECOND + 5 * MS);
    CHECK_EQ(rd->n_done, 1002);
    CHECK_EQ(wr->n_done, 5006);
}

static void sides_do_not_hold_up_each_other(void **state)
{
    simulated(two_limits_body);
}

struct order {
    struct world *w;
    struct root *root;
    unsigned number, *next;
    struct io_event *done;
};

static void ordered_request(void *arg)
{
    struct order *o = arg;
    char buf[512];
    struct iovec iov = {buf, sizeof buf};
    root_enter(o->root);
    CHECK_EQ(node_preadv(root_node(o->root), &iov, 1, 0, sizeof buf), 0);
    root_leave(o->root);
    unsigned turn = (*o->next)++;
    CHECK_EQ(o->number, turn);
    if (o->number == 39)
        io_event_set(o->done);
}

static void fifo_body(struct world *w)
{
    struct order order[40];
    struct io_event done = IO_EVENT_INIT;
    struct tide_error err;
    struct root *root;
    unsigned next = 0;
    add_group(w, "g", "iops-total", 10, NULL);
    CHECK_EQ(root_new(add_throttled(w, "t", "g"), ROOT_READ, "test", &root, &err), 0);
    for (unsigned i = 0; i < 40; i++) {
        order[i] = (struct order){w, root, i, &next, &done};
        CHECK_EQ(loop_run_now(ordered_request, &order[i]), 0);
    }
    io_event_wait(&done, IO_FOREVER);
    root_free(root);
}

static void requests_of_a_node_keep_their_order(void **state)
{
    simulated(fifo_body);
}

/* ------------------------------------------------------------------ changes */

static void change_body(struct world *w)
{
    add_group(w, "g", "iops-total", 1, NULL);
    add_throttled(w, "t", "g");
    struct client *c = add_client(w, "t", READ, 4096, 50);
    wait_until(w, 10 * SECOND + 500 * MS);
    CHECK_EQ(c->n_done, 11);
    change_group(w, "g", "iops-total", 1000, NULL); /* takes effect for those who wait, at once */
    wait_until(w, 10 * SECOND + 510 * MS);
    CHECK_IN(c->n_done - 11, 5, 15);
    wait_until(w, 20 * SECOND + 500 * MS);
    CHECK_IN(c->n_done - 11, 9990, 10001);
    change_group(w, "g", "iops-total", 1, NULL);
    unsigned before = c->n_done;
    wait_until(w, 50 * SECOND + 500 * MS);
    CHECK_IN(c->n_done - before, 30, 31);
    change_group(w, "g", "iops-total", 0, NULL); /* no limit: everybody goes */
    before = c->n_done;
    c->think_ns = 10 * MS;
    wait_until(w, 51 * SECOND);
    CHECK(c->n_done - before > 2000);
    change_group(w, "g", "bps-read", 4096, NULL);
    before = c->n_done;
    wait_until(w, 61 * SECOND + 5 * MS);
    CHECK_IN(c->n_done - before, 10, 11);
}

static void changes_take_effect_at_once(void **state)
{
    simulated(change_body);
}

/* Limits that are set again and again, the same ones, neither stop nor speed up anything. */
static void same_again_body(struct world *w)
{
    add_group(w, "g", "iops-total", 100, NULL);
    add_throttled(w, "t", "g");
    struct client *c = add_client(w, "t", READ, 4096, 4);
    while (io_now(w->io) - w->began < 10 * SECOND - 20 * MS) {
        io_sleep(3 * MS);
        change_group(w, "g", NULL);
    }
    wait_until(w, 10 * SECOND + 5 * MS);
    CHECK_EQ(c->n_done, 1011);
}

static void setting_the_same_limits_changes_nothing(void **state)
{
    simulated(same_again_body);
}

/* ------------------------------------------------------------------ quiesce */

static void quiesce_body(struct world *w)
{
    struct tide_error err;
    struct quiesce *q;
    add_group(w, "g", "iops-total", 1, NULL);
    struct node *n = add_throttled(w, "t", "g");
    add_throttled(w, "other", "g");
    struct client *c = add_client(w, "t", WRITE, 4096, 20);
    struct client *o = add_client(w, "other", WRITE, 4096, 5);
    wait_until(w, 10 * SECOND + 500 * MS);
    CHECK_EQ(c->n_done + o->n_done, 11);
    unsigned before = c->n_done, others = o->n_done;
    uint64_t began = io_now(w->io);
    CHECK_EQ(quiesce_begin(w->graph, &n, 1, QUIESCE_WRITES, &q, &err), 0);
    CHECK(io_now(w->io) - began < 50 * MS);
    CHECK(node_is_quiesced(n, QUIESCE_WRITES));
    CHECK_EQ(c->n_done - before, 20); /* the queue went */
    CHECK_EQ(o->n_done - others, 0);  /* nobody else did */
    wait_until(w, 12 * SECOND);
    quiesce_end(q);
    /* 20 too many have gone: nobody goes until they are paid, 20 s after the last that was due. */
    wait_until(w, 30 * SECOND - 10 * MS);
    CHECK_EQ(c->n_done - before, 20);
    CHECK_EQ(o->n_done - others, 0);
    wait_until(w, 40 * SECOND + 500 * MS);
    CHECK_EQ(c->n_done - before + o->n_done - others, 30);
    CHECK(c->n_done - before > 20 && o->n_done > others);
}

static void quiesce_lets_the_queue_go_and_charges_it(void **state)
{
    simulated(quiesce_body);
}

/* Many lists in a row: each finishes at once, and on the whole the rate is kept. */
static void many_lists_body(struct world *w)
{
    struct tide_error err;
    struct quiesce *q;
    add_group(w, "g", "iops-total", 100, "iops-total-max", 1000, NULL);
    struct node *n = add_throttled(w, "t", "g");
    struct client *c = add_client(w, "t", WRITE, 4096, 3);
    struct client *r = add_client(w, "t", READ, 4096, 3);
    for (unsigned i = 1; i <= 50; i++) {
        wait_until(w, i * SECOND);
        CHECK_EQ(quiesce_begin(w->graph, &n, 1, i % 2 ? QUIESCE_WRITES : QUIESCE_ALL, &q, &err), 0);
        quiesce_end(q);
        CHECK(io_now(w->io) - w->began < i * SECOND + 50 * MS);
    }
    wait_until(w, 60 * SECOND + 5 * MS);
    CHECK_IN(c->n_done + r->n_done, 7001, 7001);
}

static void lists_in_a_row_keep_the_rate(void **state)
{
    simulated(many_lists_body);
}

/* A root that ends takes what it has in the queue with it, now; others are slowed down again. */
static void hurry_body(struct world *w)
{
    add_group(w, "g", "bps-total", 1, NULL);
    add_throttled(w, "t", "g");
    struct client *a = add_client(w, "t", WRITE, 65536, 10);
    struct client *b = add_client(w, "t", READ, 65536, 10);
    wait_until(w, 5 * SECOND);
    CHECK_EQ(a->n_done + b->n_done, 1);
    uint64_t began = io_now(w->io);
    end_client(a, true);
    CHECK(io_now(w->io) - began < 50 * MS);
    unsigned before = b->n_done;
    wait_until(w, 10 * SECOND);
    CHECK_IN(b->n_done - before, 0, 1);
}

static void the_end_of_a_root_does_not_wait(void **state)
{
    simulated(hurry_body);
}

/* ------------------------------------------------------------------ several threads */

/* Three loops, four nodes, limits that change and lists that run, all at once: nothing hangs, and
 * no more goes than the limits and what was let go allow. */
static void threads_body(struct world *w)
{
    struct tide_error err;
    struct quiesce *q;
    char name[8];
    struct node *n[4];
    uint64_t total = 0;
    graph_set_quiesce_timeout(w->graph, 60 * SECOND); /* its thread may get no processor */
    add_group(w, "g", "iops-total", 20000, NULL);
    for (unsigned i = 0; i < 4; i++) {
        snprintf(name, sizeof name, "t%u", i);
        n[i] = add_throttled(w, name, "g");
        add_client(w, name, i % 2 ? WRITE : READ, 512, 3 + i);
        add_client(w, name, i % 2 ? READ : WRITE, 512, 1);
    }
    uint64_t began = io_now(w->io);
    for (unsigned i = 0; i < 400; i++) {
        io_sleep(MS);
        if (i % 3 == 0) {
            CHECK_EQ(quiesce_begin(w->graph, &n[i % 4], 1, QUIESCE_ALL, &q, &err), 0);
            quiesce_end(q);
        }
        if (i % 16 == 7)
            change_group(w, "g", "iops-total", i % 32 == 7 ? 5000 : 20000, NULL);
    }
    uint64_t took = io_now(w->io) - began;
    for (unsigned i = 0; i < w->n_clients; i++)
        total += w->client[i].n_done;
    CHECK(total > 1000);
    CHECK_IN(total, 1000, 2001 + 20000 * took / SECOND + 134 * 8 + 26);
    change_group(w, "g", "iops-total", 1, "bps-total", 1, NULL); /* the queue would take hours */
    io_sleep(5 * MS);
    began = io_now(w->io);
    for (unsigned i = 0; i < w->n_clients; i++)
        end_client(&w->client[i], true);
    CHECK(io_now(w->io) - began < 60 * SECOND);
}

static void threads_meet_in_a_group(void **state)
{
    real(threads_body, N_LOOPS);
}

/* Without limits and with ones that are far away: every request goes, and none is lost. */
static void no_limit_body(struct world *w)
{
    add_group(w, "g", NULL);
    add_throttled(w, "t", "g");
    for (unsigned i = 0; i < 6; i++)
        add_client(w, "t", i % 2 ? WRITE : READ, 512, 4);
    for (unsigned i = 0; i < 60; i++) {
        io_sleep(MS);
        change_group(w, "g", "iops-total", i % 2 ? 0 : 500000, "bps-read", i % 3 ? 0 : 1000000,
                     NULL);
    }
    for (unsigned i = 0; i < w->n_clients; i++) {
        while (atomic_load(&w->client[i].n_done) <= 10) /* its thread may get no processor */
            io_sleep(MS);
    }
    for (unsigned i = 0; i < w->n_clients; i++)
        end_client(&w->client[i], false);
}

static void limits_come_and_go_under_load(void **state)
{
    real(no_limit_body, N_LOOPS);
    real(no_limit_body, 1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(requests_per_second),
        cmocka_unit_test(bytes_per_second_of_one_side),
        cmocka_unit_test(zeroes_and_discards_are_writes),
        cmocka_unit_test(bursts),
        cmocka_unit_test(nodes_of_a_group_share_fairly),
        cmocka_unit_test(reads_and_writes_take_turns),
        cmocka_unit_test(sides_do_not_hold_up_each_other),
        cmocka_unit_test(requests_of_a_node_keep_their_order),
        cmocka_unit_test(changes_take_effect_at_once),
        cmocka_unit_test(setting_the_same_limits_changes_nothing),
        cmocka_unit_test(quiesce_lets_the_queue_go_and_charges_it),
        cmocka_unit_test(lists_in_a_row_keep_the_rate),
        cmocka_unit_test(the_end_of_a_root_does_not_wait),
        cmocka_unit_test(threads_meet_in_a_group),
        cmocka_unit_test(limits_come_and_go_under_load),
    };
    return cmocka_run_group_tests_name("drivers", tests, NULL, NULL);
}
