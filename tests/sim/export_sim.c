/* SPDX-License-Identifier: Apache-2.0 */
/* The node under the exports of busy guests changes all the time: from the disk's own node to a raw
 * node over it and back, in lists that also add, delete and clear, and of which many are undone.
 *
 *   Guests notice nothing: they read what they wrote, and no flushed write is lost when the power
 *   goes. No dirty bit is lost, and none is there of a write before a clear.
 *   A list that is undone leaves what queries tell as it was.
 *   A file lock that hangs while a list takes it keeps no guest and no query waiting. */
#include "scene.h"

#include <string.h>

#define N_DISKS 2u

static struct scene *state_of(struct world *w)
{
    return w->state;
}

static void export_prepare(struct world *w, struct sim_config *cfg)
{
    scene_prepare(state_of(w), w, N_DISKS);
    CHECK(sim_file_write(w->disk, "slow", "", 1, 65535) == 0);
    CHECK(sim_file_write(w->disk, "slow0", "", 1, 65535) == 0);
}

static co_fn void set_up(struct world *w)
{
    struct scene *t = state_of(w);
    world_start_nbd(w);
    for (unsigned i = 0; i < N_DISKS; i++) {
        scene_open_disk(t, i, 2);
        qmp_do(&w->qmp, "blockdev-add",
               "{\"driver\":\"raw\",\"node-name\":\"r%u\",\"file\":\"d%u\",\"discard\":\"%s\"}", i,
               i, t->crowd.disk[i].unmap ? "unmap" : "ignore");
    }
    crowd_start(&t->crowd);
}

/* What a list might have changed, without what guests change. */
static co_fn json_t *snapshot(struct qmp *q)
{
    json_t *nodes = scene_nodes(q);
    return json_pack("[o,o]", nodes, qmp_get(q, "query-block-exports", NULL));
}

#define SET_NODE                                                                                   \
    "{\"type\":\"block-export-set-node\",\"data\":{\"id\":\"e-d%u-0\",\"node-name\":\"%s%u\"}},"
#define ADD                                                                                        \
    "{\"type\":\"block-export-add\",\"data\":{\"type\":\"nbd\",\"id\":\"x\",\"name\":\"x\","       \
    "\"node-name\":\"r0\",\"bitmaps\":[{\"node\":\"d0\",\"name\":\"b\"}],\"writable\":true}},"     \
    "{\"type\":\"block-export-set-node\",\"data\":{\"id\":\"x\",\"node-name\":\"d0\"}},"           \
    "{\"type\":\"block-export-del\",\"data\":{\"id\":\"x\"}},"
#define CLEAR "{\"type\":\"block-dirty-bitmap-clear\",\"data\":{\"node\":\"d%u\",\"name\":\"b\"}}"
#define ABORT ",{\"type\":\"abort\",\"data\":{}}"
#define HARD "{\"type\":\"block-export-del\",\"data\":{\"id\":\"e-d1-0\",\"mode\":\"hard\"}},"

/* Both first guests move, and the bitmaps are cleared, at one instant or not at all. */
static co_fn void one_list(struct scene *t)
{
    struct world *w = t->crowd.w;
    struct qmp *q = &w->qmp;
    bool undo = chance_one_in(&w->chance, 2);
    const char *to[2] = {chance_one_in(&w->chance, 2) ? "d" : "r",
                         chance_one_in(&w->chance, 2) ? "d" : "r"};
    json_t *before = undo ? snapshot(q) : NULL;
    json_t *v = qmp_call(
        q, "transaction", "{\"actions\":[" SET_NODE "%s" SET_NODE "%s" CLEAR "," CLEAR "%s]}", 0u,
        to[0], 0u, chance_one_in(&w->chance, 2) ? ADD : "", 1u, to[1], 1u,
        undo && chance_one_in(&w->chance, 2) ? HARD : "", 0u, 1u, undo ? ABORT : "");
    CHECK_SAY(!qmp_error(v) == !undo, "%s", qmp_error(v) ? qmp_error(v) : "it succeeded");
    CHECK(!undo || strstr(qmp_error(v), "abort"));
    json_decref(v);
    if (undo) {
        json_t *after = snapshot(q);
        CHECK(json_equal(before, after));
        json_decref(after);
    } else {
        for (unsigned i = 0; i < N_DISKS; i++)
            bits_clear(&t->book.b[i], q->asked, q->told);
    }
    json_decref(before);
}

/* A list by a client of its own. */
struct slow_list {
    struct world *w;
    const char *first; /* its first action */
    bool done;
};

static void slow_main(void *arg)
{
    struct slow_list *l = arg;
    struct qmp *q = calloc(1, sizeof *q);
    CHECK(q);
    qmp_open(q, l->w);
    qmp_do(q, "transaction", "{\"actions\":[%s," CLEAR "]}", l->first, 0u);
    bits_clear(&state_of(l->w)->book.b[0], q->asked, q->told);
    qmp_close(q);
    free(q);
    l->done = true;
}

/* An export is made of a disk whose locks take their time, or moves there. */
static co_fn void slow_lock(struct scene *t)
{
    static const char *const kinds[] = {
        "{\"type\":\"block-export-add\",\"data\":{\"type\":\"nbd\",\"id\":\"s\",\"node-name\":"
        "\"slow\",\"writable\":true}}",
        "{\"type\":\"block-export-set-node\",\"data\":{\"id\":\"s0\",\"node-name\":\"slow\"}}"};
    struct world *w = t->crowd.w;
    struct qmp *q = &w->qmp;
    struct slow_list l = {.w = w, .first = kinds[chance_below(&w->chance, 2)]};
    uint64_t worst = 0;
    world_add_file(w, "slow", "slow", "");
    world_add_file(w, "slow0", "slow0", "");
    qmp_do(q, "block-export-add",
           "{\"type\":\"nbd\",\"id\":\"s0\",\"node-name\":\"slow0\",\"writable\":true}");
    sim_stall(w->disk, "slow", SIM_LOCK, 1, 8 * SECOND, false);
    t->crowd.disk[0].worst_ns = 0;
    uint64_t began = io_now(w->io);
    CHECK(loop_run_now(slow_main, &l) == 0);
    while (!l.done) {
        uint64_t asked = io_now(w->io);
        json_decref(qmp_get(q, "query-block-exports", NULL));
        worst = MAX(worst, io_now(w->io) - asked);
        qmp_listen(q, SECOND / 10);
    }
    CHECK(io_now(w->io) - began >= 8 * SECOND);
    CHECK_SAY(worst < SECOND, "a query took %" PRIu64 " ms", worst / 1000000);
    CHECK_SAY(t->crowd.disk[0].worst_ns < SECOND, "a guest waited for %" PRIu64 " ms",
              t->crowd.disk[0].worst_ns / 1000000);
}

static co_fn void export_live(struct world *w)
{
    struct scene *t = state_of(w);
    set_up(w);
    bool slow = chance_one_in(&w->chance, 3);
    for (unsigned n = 10 + (unsigned)chance_below(&w->chance, 30); n; n--) {
        qmp_listen(&w->qmp, chance_below(&w->chance, SECOND / 20));
        one_list(t);
    }
    if (slow)
        slow_lock(t);
    scene_check_end(t);
}

static const struct scenario swaps = {
    .name = "nodes are swapped under guests",
    .state_size = sizeof(struct scene),
    .n_seeds = 100,
    .cut_one_in = 4,
    .cut_steps = 20000,
    .prepare = export_prepare,
    .live = export_live,
    .after_cut = scene_after_cut,
    .finish = scene_finish,
};

int main(void)
{
    const struct scenario *all[] = {&swaps};
    return scenario_main(all, 1);
}
