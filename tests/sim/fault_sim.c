/* SPDX-License-Identifier: Apache-2.0 */
/* Lists that make files and open and close nodes, on disks that fail and on slow ones. Law L2 when
 * things go wrong: a long list of actions that make files, open and close nodes and start jobs,
 * with one allocation, or one call to the disk, failing at each place in turn. Whatever fails,
 * afterwards all is as before: what queries tell, and every name and byte on the disk. */
#include <errno.h>
#include <string.h>

#include "base/mem.h"
#include "block/node.h"
#include "qmp/instance.h"
#include "schema/schema.h"
#include "schema/types.h"
#include "world.h"

#define SIZE 65536u
#define MAX_ACTIONS 16u

struct faults {
    struct arena arena;
    struct action a[MAX_ACTIONS];
    size_t n;
    char *before;      /* what queries told */
    uint64_t disk;     /* hash of the disk */
    unsigned n_struck; /* how often the fault was what the list failed of */
};

static const struct {
    unsigned n_renames; /* that do something */
    const char *actions;
} lists[] = {
    /* Comings and goings on the same names; a job's own nodes; files new, replaced and existing. */
    {2,
     "["
     "{\"type\":\"blockdev-del\",\"data\":{\"node-name\":\"top\"}},"
     "{\"type\":\"blockdev-del\",\"data\":{\"node-name\":\"base\"}},"
     "{\"type\":\"blockdev-add\",\"data\":{\"driver\":\"raw\",\"node-name\":\"top\",\"file\":{"
     "\"driver\":\"file\",\"filename\":\"/base\",\"node-name\":\"base\"}}},"
     "{\"type\":\"block-dirty-bitmap-add\",\"data\":{\"node\":\"top\",\"name\":\"b\"}},"
     "{\"type\":\"blockdev-add\",\"data\":{\"driver\":\"raw\",\"node-name\":\"x\",\"file\":{"
     "\"driver\":\"file\",\"filename\":\"/x\"}}},"
     "{\"type\":\"drive-backup\",\"data\":{\"job-id\":\"j0\",\"device\":\"d0\",\"sync\":\"full\","
     "\"target\":\"/new\"}},"
     "{\"type\":\"drive-backup\",\"data\":{\"job-id\":\"j1\",\"device\":\"d1\",\"sync\":\"full\","
     "\"target\":\"/old\",\"format\":\"raw\"}},"
     "{\"type\":\"drive-backup\",\"data\":{\"job-id\":\"j2\",\"device\":\"x\",\"sync\":\"full\","
     "\"target\":\"/there\",\"mode\":\"existing\"}},"
     "{\"type\":\"abort\",\"data\":{}}]"},
    /* The same node away, there and away again; one list's file in the way of its next action. */
    {1,
     "["
     "{\"type\":\"drive-backup\",\"data\":{\"job-id\":\"j2\",\"device\":\"d0\",\"sync\":\"full\","
     "\"target\":\"/there\",\"mode\":\"existing\"}},"
     "{\"type\":\"blockdev-add\",\"data\":{\"driver\":\"file\",\"node-name\":\"y\","
     "\"filename\":\"/x\"}},"
     "{\"type\":\"blockdev-del\",\"data\":{\"node-name\":\"y\"}},"
     "{\"type\":\"blockdev-add\",\"data\":{\"driver\":\"raw\",\"node-name\":\"y\",\"file\":"
     "\"base\"}},"
     "{\"type\":\"drive-backup\",\"data\":{\"job-id\":\"j0\",\"device\":\"y\",\"sync\":\"top\","
     "\"target\":\"/new\"}},"
     "{\"type\":\"drive-backup\",\"data\":{\"job-id\":\"j1\",\"device\":\"d1\",\"sync\":\"full\","
     "\"target\":\"//new\"}},"
     "{\"type\":\"abort\",\"data\":{}}]"},
};

/* ------------------------------------------------------------------ the state */

static co_fn void add_reply(struct world *w, const char *command, char **text)
{
    json_t *v = qmp_get(&w->qmp, command, NULL);
    char *more = json_dumps(v, JSON_COMPACT | JSON_SORT_KEYS), *both;
    CHECK(more && asprintf(&both, "%s%s\n", *text ? *text : "", more) > 0);
    json_decref(v);
    free(more);
    free(*text);
    *text = both;
}

static co_fn char *state_text(struct world *w)
{
    char *text = NULL;
    add_reply(w, "query-named-block-nodes", &text);
    add_reply(w, "query-jobs", &text);
    add_reply(w, "query-block-exports", &text);
    return text;
}

static co_fn void check_state(struct world *w, const char *what, unsigned nth)
{
    struct faults *f = w->state;
    char *now = state_text(w);
    CHECK_SAY(!strcmp(now, f->before), "%s %u: was %s, is %s", what, nth, f->before, now);
    CHECK_SAY(sim_world_hash(w->disk) == f->disk, "%s %u: the disk is not as before", what, nth);
    free(now);
}

/* ------------------------------------------------------------------ the list */

static void parse(struct faults *f, const char *actions)
{
    struct tide_error err;
    char *text = NULL;
    void *args;
    CHECK(asprintf(&text, "{\"actions\":%s}", actions) > 0);
    json_t *v = json_loads(text, 0, NULL);
    CHECK(v && schema_parse(&q_transaction_type, v, &f->arena, 0, &args, &err) == 0);
    const struct q_transaction *t = args;
    CHECK(t->n_actions <= MAX_ACTIONS);
    f->n = t->n_actions;
    for (unsigned i = 0; i < f->n; i++)
        f->a[i] = (struct action){&txn_actions[t->actions[i].type], t->actions[i].data, i};
    json_decref(v);
    free(text);
}

/* It fails always; a dry run, which makes no files, gets further. */
static co_fn void run(struct world *w, bool dry, int error)
{
    struct faults *f = w->state;
    struct txn_props props = {.dry_run = dry};
    struct txn_result res;
    struct tide_error err;
    int r = txn_run(&w->inst->txn, f->a, f->n, &props, &res, &err);
    CHECK(r < 0);
    f->n_struck += r == -error || strstr(err.msg, tide_strerror(error));
    txn_result_free(&res);
}

/* Until the list is through before the n-th allocation. */
static co_fn void fail_memory(struct world *w, bool dry)
{
    struct faults *f = w->state;
    unsigned long n = 0, made;
    f->n_struck = 0;
    do {
        mem_fail_after(++n);
        run(w, dry, ENOMEM);
        made = mem_fail_after(0);
        check_state(w, "allocation", (unsigned)n);
    } while (made >= n);
    CHECK_SAY(f->n_struck > 20, "only %u of %lu allocations", f->n_struck, n);
}

/* At most so many calls of a kind there are in a list (of renames: as many as it says), and whether
 * a list, and a dry run, fails of one. A read is of the head of a file whose format is not said. No
 * list writes, zeroes, copies or asks for extents. Unlinks, and renames that take
 * something back, are left alone: no undo helps where it fails itself. */
static const struct call {
    enum sim_kind kind;
    unsigned max;
    bool fails[2]; /* by `dry` */
} calls[] = {
    {SIM_OPEN, 40, {true, true}}, {SIM_STAT, 60, {true, true}},    {SIM_LOCK, 120, {true, true}},
    {SIM_TRUNCATE, 4, {true}},    {SIM_SYNC_DIR, 6, {true, true}}, {SIM_RENAME, 0, {true}},
    {SIM_FSYNC, 4, {true}},       {SIM_READ, 4, {true, true}},
};

static co_fn void fail_call(struct world *w, const struct call *c, unsigned max, bool dry)
{
    struct faults *f = w->state;
    f->n_struck = 0;
    for (unsigned nth = 1; nth <= max; nth++) {
        sim_fail(w->disk, NULL, c->kind, nth, EIO, false);
        run(w, dry, EIO);
        sim_clear_faults(w->disk);
        check_state(w, sim_kind_name(c->kind), nth);
    }
    CHECK_SAY((f->n_struck > 0) == c->fails[dry], "a list failed of %u calls of %s", f->n_struck,
              sim_kind_name(c->kind));
}

static co_fn void fail_disk(struct world *w, unsigned n_renames, bool dry)
{
    for (unsigned i = 0; i < sizeof calls / sizeof *calls; i++)
        fail_call(w, &calls[i], calls[i].kind == SIM_RENAME ? n_renames : calls[i].max, dry);
}

/* ------------------------------------------------------------------ the story */

static void prepare(struct world *w, struct sim_config *cfg)
{
    static const char *const files[] = {"/d0", "/d1", "/base", "/x", "/old", "/there"};
    static char data[SIZE];
    for (unsigned i = 0; i < sizeof files / sizeof *files; i++) {
        memset(data, 'a' + (int)i, sizeof data);
        CHECK(sim_file_write(w->disk, files[i], data, i == 4 ? 1000 : SIZE, 0) == 0);
    }
}

static co_fn void live(struct world *w)
{
    struct faults *f = w->state;
    world_add_file(w, "d0", "/d0", "");
    world_add_file(w, "base", "/base", "");
    qmp_do(&w->qmp, "blockdev-add", "{\"driver\":\"raw\",\"node-name\":\"top\",\"file\":\"base\"}");
    qmp_do(&w->qmp, "block-dirty-bitmap-add", "{\"node\":\"top\",\"name\":\"b0\"}");
    world_add_file(w, "d1", "/d1", "");
    f->before = state_text(w);
    f->disk = sim_world_hash(w->disk);
    for (unsigned i = 0; i < sizeof lists / sizeof *lists; i++) {
        parse(f, lists[i].actions);
        for (int dry = 0; dry < 2; dry++) {
            fail_memory(w, dry);
            fail_disk(w, lists[i].n_renames, dry);
        }
    }
}

/* ------------------------------------------------------------------ a slow disk */

static co_fn uint64_t last_held(struct world *w, uint64_t *took)
{
    json_t *v = qmp_get(&w->qmp, "query-transactions", "{\"limit\":1}");
    json_t *row = json_array_get(v, 0);
    uint64_t held = (uint64_t)json_integer_value(json_object_get(row, "held-ns"));
    *took = (uint64_t)json_integer_value(json_object_get(row, "took-ns"));
    json_decref(v);
    return held;
}

/* A disk that takes ten seconds to open a file holds guests up only where the list says so: when
 * the file is to be opened after something that comes before it in the list. */
static co_fn void live_slow(struct world *w)
{
    uint64_t took;
    world_add_file(w, "d0", "/d0", "");
    sim_stall(w->disk, "/x", SIM_OPEN, 1, 10 * SECOND, false);
    qmp_do(&w->qmp, "transaction",
           "{\"actions\":[{\"type\":\"block-dirty-bitmap-add\",\"data\":{\"node\":\"d0\",\"name\":"
           "\"b\"}},{\"type\":\"blockdev-add\",\"data\":{\"driver\":\"file\",\"node-name\":\"x\","
           "\"filename\":\"/x\"}}]}");
    uint64_t held = last_held(w, &took);
    CHECK_SAY(took >= 10 * SECOND && held < SECOND, "held for %" PRIu64 " of %" PRIu64, held, took);
    sim_stall(w->disk, "/x", SIM_OPEN, 1, 10 * SECOND, false);
    qmp_do(
        &w->qmp, "transaction",
        "{\"actions\":[{\"type\":\"blockdev-del\",\"data\":{\"node-name\":\"x\"}},{\"type\":"
        "\"blockdev-add\",\"data\":{\"driver\":\"file\",\"node-name\":\"x\",\"filename\":\"/x\"}}"
        "]}");
    held = last_held(w, &took);
    CHECK_SAY(held >= 10 * SECOND, "held for %" PRIu64 " of %" PRIu64, held, took);
}

static void finish(struct world *w)
{
    struct faults *f = w->state;
    arena_free(&f->arena);
    free(f->before);
}

int main(void)
{
    static const struct scenario faults = {.name = "faults_in_lists",
                                           .state_size = sizeof(struct faults),
                                           .n_seeds = 8,
                                           .weight = 100,
                                           .prepare = prepare,
                                           .live = live,
                                           .finish = finish};
    static const struct scenario slow = {.name = "slow_open",
                                         .state_size = sizeof(struct faults),
                                         .n_seeds = 50,
                                         .prepare = prepare,
                                         .live = live_slow,
                                         .finish = finish};
    static const struct scenario *const all[] = {&faults, &slow};
    return scenario_main(all, 2);
}
