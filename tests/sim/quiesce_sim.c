/* SPDX-License-Identifier: Apache-2.0 */
/* A disk that hangs while a transaction wants it. Three disks with guests: `d0` will hang for
 * seconds, `d1` stands in the same lists, `d2` in none of them.
 *
 *   The list fails when the quiesce timeout is over, not later, and names d0. Nothing has changed.
 *   All gates are open again: guests of d1 go on at once, though d0 still hangs.
 *   The next try leaves the guests in peace for a second first; once d0 is back, it succeeds. One
 *   that names none of them does not wait for that second. How long guests were held is logged.
 *   A query that waits for d0 to say its size keeps no list waiting.
 *   Guests of d2 never notice anything; lists about d1 and d2 alone work while d0 hangs.
 *   Whatever the tries did, no dirty bit of d0 or d1 is lost. */
#include "scene.h"

#include <string.h>

#define N_DISKS 3u
#define TIMEOUT (3 * SECOND)
#define PEACE SECOND
#define SLACK (SECOND / 5) /* of the simulated machine: each step takes its time */

struct quiesce_state {
    struct scene scene; /* first */
    struct qmp asker;
    struct co_group asking;
    uint64_t stall;
    unsigned n_tried;
};

static struct quiesce_state *state_of(struct world *w)
{
    return w->state;
}

static void quiesce_prepare(struct world *w, struct sim_config *cfg)
{
    struct quiesce_state *t = state_of(w);
    scene_prepare(&t->scene, w, N_DISKS);
    t->scene.crowd.disk[1].limit_ns = TIMEOUT + SLACK;
    t->scene.crowd.disk[2].limit_ns = SLACK;
}

static co_fn void set_up(struct world *w)
{
    struct quiesce_state *t = state_of(w);
    world_start_nbd(w);
    for (unsigned i = 0; i < N_DISKS; i++)
        scene_open_disk(&t->scene, i, 3);
    for (unsigned i = 0; i < t->scene.crowd.n_guests; i++)
        t->scene.crowd.guest[i].think_ns = SECOND / 2;
    crowd_start(&t->scene.crowd);
}

/* Begin to hang, and wait until a request is in there. */
static co_fn void hang(struct quiesce_state *t)
{
    struct world *w = t->scene.crowd.w;
    static const enum sim_kind kinds[] = {SIM_WRITE, SIM_WRITE, SIM_READ, SIM_FSYNC};
    do
        qmp_listen(&w->qmp, SECOND / 4); /* what waited for the hang before this one */
    while (crowd_oldest_ns(&t->scene.crowd, 0) > SECOND / 4);
    t->stall = SECOND * 30 + chance_below(&w->chance, 10 * SECOND);
    sim_stall(w->disk, t->scene.crowd.disk[0].file, kinds[chance_below(&w->chance, 4)], 1, t->stall,
              true);
    while (crowd_oldest_ns(&t->scene.crowd, 0) < SECOND / 2)
        qmp_listen(&w->qmp, SECOND / 4);
}

#define CLEAR "{\"type\":\"block-dirty-bitmap-clear\",\"data\":{\"node\":\"d%u\",\"name\":\"b\"}}"
#define ADD                                                                                        \
    "{\"type\":\"block-dirty-bitmap-add\",\"data\":{\"node\":\"d1\",\"name\":\"n%u\","             \
    "\"disabled\":true}}"

/* Clears the bitmaps of d1 and of `other`, adds one; in either order. */
static co_fn json_t *try_list(struct quiesce_state *t, unsigned other, uint64_t *took)
{
    struct qmp *q = &t->scene.crowd.w->qmp;
    uint64_t began = io_now(t->scene.crowd.w->io);
    json_t *v;
    unsigned number = ++t->n_tried;
    if (chance_one_in(&t->scene.crowd.w->chance, 2))
        v = qmp_call(q, "transaction", "{\"actions\":[" CLEAR "," CLEAR "," ADD "]}", 1u, other,
                     number);
    else
        v = qmp_call(q, "transaction", "{\"actions\":[" ADD "," CLEAR "," CLEAR "]}", number, other,
                     1u);
    *took = io_now(t->scene.crowd.w->io) - began;
    if (!qmp_error(v)) {
        bits_clear(&t->scene.book.b[other], q->asked, q->told);
        bits_clear(&t->scene.book.b[1], q->asked, q->told);
    }
    return v;
}

static co_fn uint64_t held_last(struct qmp *q)
{
    json_t *log = qmp_get(q, "query-transactions", NULL);
    uint64_t ns = (uint64_t)json_integer_value(json_object_get(json_array_get(log, 0), "held-ns"));
    json_decref(log);
    return ns;
}

/* A list about d2 alone. */
static co_fn json_t *clear_calm(struct quiesce_state *t, uint64_t *took)
{
    struct world *w = t->scene.crowd.w;
    uint64_t began = io_now(w->io);
    json_t *v = qmp_call(&w->qmp, "transaction", "{\"actions\":[" CLEAR "," CLEAR "]}", 2u, 2u);
    *took = io_now(w->io) - began;
    if (!qmp_error(v))
        bits_clear(&t->scene.book.b[2], w->qmp.asked, w->qmp.told);
    return v;
}

/* One try that has to fail after the timeout; `peace`: the one before failed just now. */
static co_fn void fail_once(struct quiesce_state *t, bool peace)
{
    struct qmp *q = &t->scene.crowd.w->qmp;
    struct disk *d1 = &t->scene.crowd.disk[1];
    uint64_t took, least = TIMEOUT + (peace ? PEACE - SLACK : 0);
    json_t *before = scene_nodes(q);
    uint64_t done = d1->n_done;
    json_t *v = try_list(t, 0, &took);
    CHECK_SAY(qmp_error(v) && strstr(qmp_error(v), "'d0'"), "%s",
              qmp_error(v) ? qmp_error(v) : "no error");
    CHECK_SAY(took >= least && took <= TIMEOUT + PEACE + SLACK, "the try took %" PRIu64 " ms",
              took / 1000000);
    CHECK(!peace || d1->n_done > done); /* the second of peace was one */
    json_decref(v);
    uint64_t held = held_last(q);
    CHECK(held >= TIMEOUT && held <= TIMEOUT + SLACK);
    json_t *after = scene_nodes(q);
    CHECK(json_equal(before, after));
    json_decref(before);
    json_decref(after);
}

static void ask_main(void *arg)
{
    struct quiesce_state *t = arg;
    qmp_open(&t->asker, t->scene.crowd.w);
    json_decref(qmp_get(&t->asker, "query-named-block-nodes", NULL));
    qmp_close(&t->asker);
    co_group_done(&t->asking);
}

static co_fn void one_query(struct quiesce_state *t)
{
    struct world *w = t->scene.crowd.w;
    uint64_t took;
    sim_stall(w->disk, t->scene.crowd.disk[0].file, SIM_STAT, 1, 30 * SECOND, true);
    co_group_add(&t->asking, 1);
    CHECK(loop_spawn(io_loop(w->io, 0), ask_main, t) == 0);
    qmp_listen(&w->qmp, SECOND / 20); /* now it waits */
    json_t *v = try_list(t, 2, &took);
    CHECK_SAY(!qmp_error(v), "%s", qmp_error(v));
    json_decref(v);
    CHECK(held_last(&w->qmp) < SECOND / 50);
    co_group_wait(&t->asking);
    sim_clear_faults(w->disk);
}

static co_fn void one_hang(struct quiesce_state *t)
{
    struct world *w = t->scene.crowd.w;
    struct qmp *q = &w->qmp;
    struct disk *d = t->scene.crowd.disk;
    uint64_t took;
    hang(t);
    fail_once(t, false);
    if (chance_one_in(&w->chance, 2))
        fail_once(t, true);
    json_t *v = clear_calm(t, &took);
    CHECK(!qmp_error(v) && took <= SLACK);
    json_decref(v);
    uint64_t one = d[1].n_done;
    qmp_listen(q, 2 * SECOND); /* the gate of d1 is open, d0 hangs on */
    CHECK(d[1].n_done > one);
    CHECK(crowd_oldest_ns(&t->scene.crowd, 0) > TIMEOUT);
    v = try_list(t, 2, &took); /* without d0 it works, after the peace */
    CHECK_SAY(!qmp_error(v), "%s", qmp_error(v));
    CHECK(took <= PEACE + SLACK);
    json_decref(v);
    sim_clear_faults(w->disk);
    for (unsigned tries = 0;; tries++) { /* what hangs still does, but nothing new */
        v = try_list(t, 0, &took);
        bool good = !qmp_error(v);
        json_decref(v);
        CHECK(took <= TIMEOUT + PEACE + SLACK);
        if (good)
            break;
        CHECK(tries < 2 + t->stall / TIMEOUT);
    }
}

static co_fn void quiesce_live(struct world *w)
{
    struct quiesce_state *t = state_of(w);
    set_up(w);
    qmp_listen(&w->qmp, SECOND / 4);
    one_query(t);
    for (unsigned n = 1 + (unsigned)chance_below(&w->chance, 2); n; n--)
        one_hang(t);
    scene_check_end(&t->scene);
}

static const struct scenario quiesce = {
    .name = "hanging disks",
    .state_size = sizeof(struct quiesce_state),
    .n_seeds = 100,
    .cut_one_in = 8,
    .cut_steps = 20000,
    .prepare = quiesce_prepare,
    .live = quiesce_live,
    .after_cut = scene_after_cut,
    .finish = scene_finish,
};

int main(void)
{
    const struct scenario *all[] = {&quiesce};
    return scenario_main(all, 1);
}
