/* SPDX-License-Identifier: Apache-2.0 */
/* Nodes over files: how disks are asked for what only they know, some of which hang. In the
 * simulator, where time is made up. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>

#include <cmocka.h>

#include "base/bytes.h"
#include "base/check.h"
#include "base/mem.h"
#include "block/inspect.h"
#include "block/node.h"
#include "io/sim.h"
#include "schema/types.h"

#define SECOND UINT64_C(1000000000)
#define MS UINT64_C(1000000)
#define ANSWER (100 * MS) /* so long a query waits for disks */
#define STEPS (5 * MS)    /* the simulator's own time */
#define N_NODES 150u      /* more than are asked at once */

struct world {
    struct io *io;
    struct graph *graph;
    struct node *node[N_NODES];
    unsigned n_deleting, n_deleted, n_asking, n_slow;
    void (*body)(struct world *);
};

static void file_name(char name[16], unsigned i)
{
    snprintf(name, 16, "f%u", i);
}

/* `blocks` of 4 KiB are allocated. */
static void write_file(struct world *w, unsigned i, unsigned blocks)
{
    static const char data[64 * KIB] = "x";
    char name[16];
    file_name(name, i);
    CHECK_EQ(sim_file_write(sim_world_of(w->io), name, data, blocks * 4096, 0), 0);
}

static struct node *add_file(struct world *w, unsigned i)
{
    struct q_blockdev_options *o;
    struct arena a = {0};
    struct tide_error err;
    struct node *n;
    char text[100], name[16];
    file_name(name, i);
    snprintf(text, sizeof text, "{\"driver\":\"file\",\"node-name\":\"%s\",\"filename\":\"%s\"}",
             name, name);
    json_t *j = json_loads(text, 0, NULL);
    CHECK(j);
    CHECK_EQ(schema_parse(&q_blockdev_options_type, j, &a, 0, (void **)&o, &err), 0);
    CHECK_EQ(graph_add(w->graph, o, &n, &err), 0);
    json_decref(j);
    arena_free(&a);
    return n;
}

static struct node *add_file_of(struct world *w, unsigned i, unsigned blocks)
{
    write_file(w, i, blocks);
    return add_file(w, i);
}

static uint64_t allocated(const struct node *n)
{
    struct node_info i;
    node_inspect(n, &i);
    return i.allocated;
}

/* How long it takes to ask all disks. */
static co_fn uint64_t ask(struct world *w)
{
    uint64_t begin = io_now(w->io);
    graph_ask_disks(w->graph);
    return io_now(w->io) - begin;
}

/* All have two blocks more than they had when they were opened, and know it not yet. */
static co_fn void grow(struct world *w)
{
    for (unsigned i = 0; i < N_NODES; i++) {
        w->node[i] = add_file_of(w, i, 1);
        CHECK_EQ(allocated(w->node[i]), 4096);
        write_file(w, i, 3);
        CHECK_EQ(allocated(w->node[i]), 4096);
    }
}

static co_fn void stall(struct world *w, unsigned i, uint64_t ns)
{
    char name[16];
    file_name(name, i);
    sim_stall(sim_world_of(w->io), name, SIM_STAT, 1, ns, true);
}

static co_fn void slow_body(struct world *w)
{
    grow(w);
    for (unsigned i = 0; i < N_NODES; i++)
        stall(w, i, 20 * MS);
    uint64_t took = ask(w);
    CHECK(took >= 3 * 20 * MS && took < ANSWER); /* three times so many at once */
    for (unsigned i = 0; i < N_NODES; i++)
        CHECK_EQ(allocated(w->node[i]), 3 * 4096);
}

static co_fn void some_hang_body(struct world *w)
{
    grow(w);
    stall(w, 3, 2 * SECOND);
    stall(w, N_NODES - 1, 2 * SECOND);
    uint64_t took = ask(w);
    CHECK(took >= ANSWER && took < ANSWER + STEPS); /* for both together */
    for (unsigned i = 0; i < N_NODES; i++)
        CHECK_EQ(allocated(w->node[i]), (i == 3 || i == N_NODES - 1 ? 1 : 3) * 4096);
    write_file(w, 5, 4);
    CHECK(ask(w) < STEPS); /* those that owe an answer are asked nothing more */
    CHECK_EQ(allocated(w->node[5]), 4 * 4096);
    io_sleep(3 * SECOND);
    CHECK_EQ(allocated(w->node[3]), 3 * 4096); /* late, but it came */
    sim_clear_faults(sim_world_of(w->io));
    write_file(w, 3, 5);
    CHECK(ask(w) < STEPS);
    CHECK_EQ(allocated(w->node[3]), 5 * 4096); /* and is asked again */
}

static co_fn void all_hang_body(struct world *w)
{
    grow(w);
    for (unsigned i = 0; i < N_NODES; i++)
        stall(w, i, 2 * SECOND);
    uint64_t took = ask(w);
    CHECK(took >= ANSWER && took < ANSWER + STEPS);
}

static void delete_next(void *arg)
{
    struct world *w = arg;
    struct tide_error err;
    char name[16];
    file_name(name, w->n_deleting++);
    CHECK_EQ(graph_del(w->graph, name, &err), 0);
    w->n_deleted++;
}

/* Nodes go while they are asked: nobody waits for what is not there, a question keeps its file. */
static co_fn void deleted_body(struct world *w)
{
    grow(w);
    for (unsigned i = 0; i < N_NODES; i += 2)
        stall(w, i, SECOND / 2);
    for (unsigned i = 0; i < N_NODES; i++)
        CHECK_EQ(loop_spawn(io_loop(w->io, 0), delete_next, w), 0);
    CHECK(ask(w) < ANSWER + STEPS);
    while (w->n_deleted < N_NODES)
        io_sleep(MS);
    CHECK(ask(w) < STEPS);
}

static void ask_again_and_again(void *arg)
{
    struct world *w = arg;
    w->n_asking++;
    for (unsigned i = 0; i < 40; i++)
        w->n_slow += ask(w) >= ANSWER;
    w->n_asking--;
}

/* One is always waiting while another leaves: a disk that hangs is asked once all the same. */
static co_fn void staggered_body(struct world *w)
{
    w->node[0] = add_file_of(w, 0, 1);
    stall(w, 0, 60 * SECOND);
    for (unsigned i = 0; i < 3; i++) {
        CHECK_EQ(loop_spawn(io_loop(w->io, 0), ask_again_and_again, w), 0);
        io_sleep(ANSWER / 3);
    }
    while (w->n_asking)
        io_sleep(MS);
    CHECK(w->n_slow <= 3); /* the first time of each */
}

static co_fn void no_memory_body(struct world *w)
{
    struct node *n = add_file_of(w, 0, 1);
    write_file(w, 0, 2);
    for (unsigned long k = 0; k < 4; k++) {
        mem_fail_after(k + 1);
        CHECK(ask(w) < STEPS);
        mem_fail_after(0);
    }
    CHECK(ask(w) < STEPS);
    CHECK_EQ(allocated(n), 2 * 4096);
}

static void world_main(void *arg)
{
    struct world *w = arg;
    CHECK_EQ(graph_new(w->io, &w->graph), 0);
    w->body(w);
    graph_close_all(w->graph);
    graph_free(w->graph);
    io_stop(w->io);
}

static void simulated(void (*body)(struct world *))
{
    for (uint64_t seed = 1; seed <= 5; seed++) {
        struct world w = {.body = body};
        assert_int_equal(sim_new(&(struct sim_config){.seed = seed, .latency_ns = 10000}, &w.io),
                         0);
        assert_int_equal(io_run(w.io, world_main, &w), 0);
        io_free(w.io);
    }
}

static void slow_disks_are_asked_at_once(void **state)
{
    simulated(slow_body);
}

static void who_hangs_is_waited_for_once(void **state)
{
    simulated(some_hang_body);
}

static void all_that_hang_are_waited_for_together(void **state)
{
    simulated(all_hang_body);
}

static void nodes_may_go_meanwhile(void **state)
{
    simulated(deleted_body);
}

static void many_who_ask_wait_once(void **state)
{
    simulated(staggered_body);
}

static void without_memory_the_last_answer_does(void **state)
{
    simulated(no_memory_body);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(slow_disks_are_asked_at_once),
        cmocka_unit_test(who_hangs_is_waited_for_once),
        cmocka_unit_test(all_that_hang_are_waited_for_together),
        cmocka_unit_test(nodes_may_go_meanwhile),
        cmocka_unit_test(many_who_ask_wait_once),
        cmocka_unit_test(without_memory_the_last_answer_does),
    };
    return cmocka_run_group_tests_name("file", tests, NULL, NULL);
}
