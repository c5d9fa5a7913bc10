/* SPDX-License-Identifier: Apache-2.0 */
/* Laws L2, L3, L4 and the inner half of L5.
 *
 * `undo`: every kind of action, every ordered pair and every ordered triple of kinds, with
 * arguments that succeed. Each list is run four ways: followed by `abort`; with a record that
 * cannot be written; as a dry run; and for good. A probe looks at the whole state (local_whole:
 * objects, bits, flags, owners, generations, nodes, exports, jobs, files) at every height of the
 * undo stack on the way up, and again on the way down: unwinding an action gives back exactly what
 * was there before it. What is there after the last action is there after the record and after the
 * discard. Meanwhile a second client looks all the time: it sees the state before or after, nothing
 * between, and hears no event.
 *
 * `faults`: every kind and pair again, with each allocation of the list failing in turn, and with
 * each operation on a file failing in turn. */
#include <errno.h>
#include <string.h>

#include "block/node.h"
#include "local.h"
#include "qmp/instance.h"

#define PARTS 16u /* as many seeds as tell all pairs; 16 times as many tell all triples */
#define LONGEST 4u
#define SEEN 32u

struct watch {
    struct local *l;
    char *height[LONGEST + 1]; /* the state with so many actions in effect */
    unsigned n, n_unwound, n_events, n_recorded;
};

/* The second client. */
struct observer {
    struct local *l;
    bool stop;
    struct co_group gone;
    char *seen[SEEN]; /* since the last list began; one after the other differ */
    unsigned n_seen;
};

struct undo_state {
    struct local a;
    struct ref ref, draft;
    struct watch watch;
    struct observer observer;
    unsigned n_lists;
};

/* ------------------------------------------------------------------ the probe */

static void check_same(const char *a, const char *b, const char *what, unsigned height)
{
    bool same = !strcmp(a, b);
    if (!same)
        fprintf(stderr, "---- it was\n%s---- and is\n%s", a, b);
    CHECK_SAY(same, "%s, with %u actions in effect", what, height);
}

static void on_step(void *arg, enum txn_step step, unsigned done)
{
    struct watch *v = arg;
    char *now = local_whole_files(v->l);
    CHECK(done <= LONGEST);
    CHECK_SAY(v->l->n_events == v->n_events, "an event left in the middle of a list");
    if (step == TXN_HELD || step == TXN_PREPARED) {
        CHECK(!v->height[done]);
        v->height[done] = now;
        return;
    }
    CHECK(v->height[done]);
    if (step == TXN_UNWOUND)
        check_same(v->height[done], now, "unwinding left a trace", done);
    else
        check_same(v->height[done], now, "commit changed something", done);
    v->n_unwound += step == TXN_UNWOUND;
    v->n_recorded += step == TXN_RECORDED || step == TXN_DISCARDED;
    free(now);
}

static void watch_begin(struct watch *v, struct local *l)
{
    *v = (struct watch){.l = l, .n_events = l->n_events};
}

static void watch_end(struct watch *v)
{
    for (unsigned i = 0; i <= LONGEST; i++)
        free(v->height[i]);
}

/* ------------------------------------------------------------------ the second client */

static void observer_main(void *arg)
{
    struct observer *o = arg;
    struct graph *g = o->l->inst->graph;
    while (!o->stop) {
        io_sleep(chance_below(&o->l->w->chance, 20000));
        graph_query_begin(g);
        char *now = local_whole_memory(o->l);
        graph_query_end(g);
        if (o->n_seen < SEEN && (!o->n_seen || strcmp(o->seen[o->n_seen - 1], now)))
            o->seen[o->n_seen++] = now;
        else
            free(now);
    }
    co_group_done(&o->gone);
}

static void observer_forget(struct observer *o)
{
    while (o->n_seen)
        free(o->seen[--o->n_seen]);
}

/* `after`: NULL if the list failed. */
static void observer_check(struct observer *o, const char *before, const char *after)
{
    for (unsigned i = 0; i < o->n_seen; i++)
        if (!after || strcmp(o->seen[i], after))
            check_same(before, o->seen[i], "a query saw the middle of a list", i);
    observer_forget(o);
}

/* ------------------------------------------------------------------ making lists */

static unsigned n_kinds(void)
{
    return n_ref_kinds - 1; /* the last is abort */
}

/* Actions that arm an undo record: a merge of nothing does not. */
static unsigned n_armed(json_t *list)
{
    json_t *a, *sources;
    unsigned n = 0;
    size_t i;
    json_array_foreach (list, i, a) {
        sources = json_object_get(json_object_get(a, "data"), "bitmaps");
        n += !sources || json_array_size(sources);
    }
    return n;
}

static bool has_kind(json_t *list, bool job)
{
    json_t *a;
    size_t i;
    json_array_foreach (list, i, a) {
        const char *type = json_string_value(json_object_get(a, "type"));
        for (unsigned k = 0; k < n_kinds(); k++)
            if (!strcmp(type, ref_kinds[k].type) && (job ? ref_kinds[k].job : ref_kinds[k].files))
                return true;
    }
    return false;
}

/* ------------------------------------------------------------------ a base to stand on */

static co_fn void write_some(struct undo_state *u)
{
    struct chance *dice = &u->a.w->chance;
    for (unsigned i = 0; i < 2; i++) {
        struct ref_node *n = &u->ref.node[chance_below(dice, 3)];
        uint64_t len = 1 + chance_below(dice, 70000), off = chance_below(dice, n->size - len);
        local_write(&u->a, n->name, off, len);
        ref_write(&u->ref, n->name, off, len);
    }
}

static co_fn void do_plain(struct undo_state *u, const char *type)
{
    struct ref_maker m = {.dice = &u->a.w->chance, .r = &u->ref, .no_added = true};
    json_t *a = ref_make(&m, ref_kind(type));
    if (!a)
        return;
    char *e = local_command(&u->a, type, json_incref(json_object_get(a, "data")));
    CHECK_SAY(!e, "%s", e);
    CHECK(ref_play(&u->ref, a));
    json_decref(a);
}

static unsigned count(const struct undo_state *u, bool exports)
{
    unsigned n = 0;
    for (unsigned i = 0; exports && i < REF_EXPORTS; i++)
        n += u->ref.export[i].used;
    for (unsigned i = REF_ADDED; !exports && i < REF_NODES; i++)
        n += u->ref.node[i].used;
    return n;
}

/* `of` kinds, as the digits of `number`; arguments that succeed, or NULL: none were found. */
static json_t *try_combination(struct undo_state *u, unsigned number, unsigned of)
{
    struct ref_maker m = {&u->a.w->chance, &u->draft, false};
    for (unsigned tries = 0; tries < 500; tries++) {
        json_t *list = json_array();
        unsigned digits = number, i;
        u->draft = u->ref;
        for (i = 0; i < of; i++, digits /= n_kinds()) {
            json_t *a = ref_make(&m, &ref_kinds[digits % n_kinds()]);
            if (!a)
                break;
            json_array_append_new(list, a);
            if (!ref_play(&u->draft, a))
                break;
        }
        if (i == of) {
            u->ref.n_job_ids = u->draft.n_job_ids;
            return list;
        }
        json_decref(list);
    }
    return NULL;
}

/* Exports may hold all that a combination could use: then they go. */
static co_fn json_t *make_combination(struct undo_state *u, unsigned number, unsigned of)
{
    json_t *list = try_combination(u, number, of);
    while (!list && count(u, true)) {
        do_plain(u, "block-export-del");
        list = try_combination(u, number, of);
    }
    char names[200] = "";
    for (unsigned i = 0, digits = number; i < of; i++, digits /= n_kinds()) {
        strncat(names, ref_kinds[digits % n_kinds()].type, 60);
        strncat(names, " ", 2);
    }
    CHECK_SAY(list, "no arguments for %s", names);
    return list;
}

static bool added_nodes_are_shown(const struct undo_state *u)
{
    for (unsigned i = 0; i < REF_EXPORTS; i++)
        if (u->ref.export[i].used && u->ref.export[i].node >= (int)REF_ADDED)
            return true;
    return false;
}

/* Three to delete, room for three more. */
static co_fn void keep_half(struct undo_state *u, const char *add, const char *del)
{
    bool exports = !strcmp(add, "block-export-add");
    while (count(u, exports) != 3)
        do_plain(u, count(u, exports) < 3 ? add : del);
}

/* Enough bitmaps to remove three, room enough to add three. */
static co_fn void top_up(struct undo_state *u)
{
    for (unsigned i = 0; i < 3; i++) {
        struct ref_node *n = &u->ref.node[i];
        while (n->n < 3) {
            struct ref_maker m = {&u->a.w->chance, &u->ref, false};
            json_t *a = ref_make(&m, &ref_kinds[0]);
            if (!a) /* it was out of luck with names */
                continue;
            json_t *data = json_object_get(a, "data");
            CHECK(!local_command(&u->a, "block-dirty-bitmap-add", json_incref(data)));
            CHECK(ref_play(&u->ref, a));
            json_decref(a);
        }
        while (n->n > 5) {
            unsigned k = n->b[0].job ? 1 : 0;
            json_t *a = json_pack("{s:s,s:{s:s,s:s}}", "type", "block-dirty-bitmap-remove", "data",
                                  "node", n->name, "name", n->b[k].name);
            json_t *data = json_object_get(a, "data");
            CHECK(!local_command(&u->a, "block-dirty-bitmap-remove", json_incref(data)));
            CHECK(ref_play(&u->ref, a));
            json_decref(a);
        }
    }
    while (added_nodes_are_shown(u))
        do_plain(u, "block-export-del");
    keep_half(u, "blockdev-add", "blockdev-del");
    keep_half(u, "block-export-add", "block-export-del");
    write_some(u);
}

static void check_model(struct undo_state *u)
{
    char *is = local_bitmaps(&u->a), *should = ref_text(&u->ref);
    check_same(should, is, "the model says otherwise", 0);
    free(is);
    free(should);
}

static co_fn void end_jobs(struct undo_state *u)
{
    local_wait_jobs(&u->a, "pending");
    for (unsigned i = 0; i < REF_JOBS; i++) {
        struct ref_job *j = &u->ref.job[i];
        if (!j->used)
            continue;
        char *e = local_command(&u->a, "job-cancel", json_pack("{s:s}", "id", j->id));
        free(e); /* of a group that is ending already */
        local_wait_gone(&u->a, j->id);
        ref_end_job(&u->ref, j, false);
    }
    check_model(u);
    local_forget_events(&u->a);
}

/* ------------------------------------------------------------------ the four ways */

enum way { BY_ABORT, BY_RECORD, DRY, FOR_GOOD, N_WAYS };

static co_fn struct local_outcome run(struct undo_state *u, json_t *list, enum way way,
                                      bool grouped, struct local_props props)
{
    json_t *given = json_deep_copy(list);
    if (way == BY_ABORT)
        json_array_append_new(given, json_pack("{s:s,s:{}}", "type", "abort", "data"));
    props.grouped = grouped;
    props.dry_run = way == DRY;
    u->a.store.fail = way == BY_RECORD;
    struct local_outcome o = local_run(&u->a, given, &props);
    u->a.store.fail = false;
    u->n_lists++;
    json_decref(given);
    return o;
}

static void check_outcome(const struct local_outcome *o, enum way way, unsigned n)
{
    if (way == BY_ABORT)
        CHECK_SAY(o->failed == (int)n && !strcmp(o->phase, "prepare"), "%d %s: %s", o->failed,
                  o->phase, o->text);
    else if (way == BY_RECORD)
        CHECK_SAY(o->failed == (int)n - 1 && !strcmp(o->phase, "record"), "%d %s: %s", o->failed,
                  o->phase, o->text);
    else
        CHECK_SAY(o->code == 0, "%d %s: %s", o->failed, o->phase, o->text);
}

/* With every step looked at. */
static co_fn void run_watched(struct undo_state *u, json_t *list, enum way way, bool grouped)
{
    struct watch *v = &u->watch;
    unsigned n = (unsigned)json_array_size(list);
    char *before = local_whole_memory(&u->a), *before_all = local_whole(&u->a);
    observer_forget(&u->observer);
    watch_begin(v, &u->a);
    struct local_outcome o =
        run(u, list, way, grouped, (struct local_props){.probe = on_step, .probe_arg = v});
    check_outcome(&o, way, n);
    CHECK(v->n_unwound == (way == FOR_GOOD ? 0 : n_armed(list)));
    CHECK(v->n_recorded == (way == FOR_GOOD ? 2 : 0));
    if (way != FOR_GOOD) {
        char *after = local_whole(&u->a);
        check_same(before_all, after, "a list that did not happen left a trace", 0);
        CHECK(u->a.n_events == v->n_events);
        free(after);
        io_sleep(50000); /* the second client looks again */
        observer_check(&u->observer, before, NULL);
    } else if (!has_kind(list, true)) {
        char *after = local_whole_memory(&u->a);
        observer_check(&u->observer, before, after);
        free(after);
    }
    free(before);
    free(before_all);
    watch_end(v);
}

/* What a client is told of a list whose record could not be written: its last action is to blame,
 * for want of another, and nothing has happened. */
static co_fn void check_refused(struct undo_state *u, json_t *list, bool grouped)
{
    size_t n = json_array_size(list);
    json_t *last = json_object_get(json_array_get(list, n - 1), "type");
    char *before = local_whole(&u->a), *after;
    u->a.store.fail = true;
    json_t *reply = local_call(&u->a, "transaction",
                               json_pack("{s:O,s:{s:s}}", "actions", list, "properties",
                                         "completion-mode", grouped ? "grouped" : "individual"));
    u->a.store.fail = false;
    json_t *data = json_object_get(json_object_get(reply, "error"), "data");
    json_t *should = json_pack("{s:i,s:O,s:s,s:b}", "action", (int)n - 1, "kind", last, "phase",
                               "record", "undone", 1);
    char *text = json_dumps(reply, 0);
    CHECK_SAY(json_equal(data, should), "%s", text);
    CHECK_SAY(strstr(qmp_error(reply), "refused on order"), "%s", text);
    after = local_whole(&u->a);
    check_same(before, after, "a list without a record left a trace", 0);
    json_decref(reply);
    json_decref(should);
    free(text);
    free(before);
    free(after);
}

static co_fn void one_combination(struct undo_state *u, unsigned number, unsigned of)
{
    top_up(u);
    bool grouped = chance_one_in(&u->a.w->chance, 2);
    json_t *list = make_combination(u, number, of);
    if (of < 3)
        check_refused(u, list, grouped);
    for (enum way way = 0; way < N_WAYS; way++)
        run_watched(u, list, way, grouped);
    CHECK(ref_play_list(&u->ref, list, grouped) < 0);
    check_model(u);
    write_some(u); /* what records, records */
    check_model(u);
    end_jobs(u);
    json_decref(list);
}

/* ------------------------------------------------------------------ faults */

/* Every allocation in turn, until none is left to fail. */
static co_fn void fail_allocations(struct undo_state *u, json_t *list, enum way way, bool grouped)
{
    for (unsigned long n = 1, made = n; made >= n; n++) {
        char *before = local_whole(&u->a);
        struct local_outcome o =
            run(u, list, way, grouped, (struct local_props){.fail_alloc = n, .n_allocs = &made});
        if (o.code != -ENOMEM)
            check_outcome(&o, way, (unsigned)json_array_size(list));
        if (o.code < 0 || way == DRY) {
            char *after = local_whole(&u->a);
            check_same(before, after, "an allocation failed and left a trace", (unsigned)n);
            free(after);
        }
        free(before);
        if (o.code == 0 && way == FOR_GOOD)
            return; /* it has happened; the rest is for another list */
    }
}

/* Files that are put in place by a rename. */
static unsigned n_files_made(json_t *list)
{
    unsigned n = 0;
    json_t *a;
    size_t i;
    json_array_foreach (list, i, a) {
        const char *mode = json_string_value(json_object_get(json_object_get(a, "data"), "mode"));
        n += !strcmp(json_string_value(json_object_get(a, "type")), "drive-backup") &&
             !(mode && !strcmp(mode, "existing"));
    }
    return n;
}

/* Kinds of operations on files that fail here, and whether a list fails of it in some seed. No list
 * reads a file (all formats are said), writes or zeroes one, asks for extents or copies. Not of
 * unlink, and not of the rename that undoes one: what was made cannot go then, which the log says.
 */
static const struct file_fault {
    enum sim_kind kind;
    bool fails;
} file_faults[] = {
    {SIM_OPEN, true},     {SIM_STAT, true},     {SIM_LOCK, true},    {SIM_RENAME, true},
    {SIM_TRUNCATE, true}, {SIM_SYNC_DIR, true}, {SIM_READ, false},   {SIM_WRITE, false},
    {SIM_FSYNC, true},    {SIM_ZERO, false},    {SIM_EXTENT, false},
};
#define N_FILE_FAULTS (sizeof file_faults / sizeof *file_faults)
static unsigned n_struck[N_FILE_FAULTS]; /* over all seeds */

static co_fn void fail_files(struct undo_state *u, json_t *list, bool grouped)
{
    unsigned n_made = n_files_made(list);
    for (unsigned k = 0; k < N_FILE_FAULTS; k++) {
        enum sim_kind kind = file_faults[k].kind;
        for (unsigned nth = 1; nth <= (kind == SIM_RENAME ? n_made : 8); nth++) {
            char *before = local_whole(&u->a);
            sim_fail(u->a.w->disk, NULL, kind, nth, EIO, false);
            struct local_outcome o = run(u, list, BY_ABORT, grouped, (struct local_props){0});
            bool struck = o.code == -EIO || strstr(o.text, tide_strerror(EIO));
            sim_clear_faults(u->a.w->disk);
            n_struck[k] += struck;
            if (!struck)
                check_outcome(&o, BY_ABORT, (unsigned)json_array_size(list));
            char *after = local_whole(&u->a);
            check_same(before, after, "a file's operation failed and left a trace", nth);
            free(before);
            free(after);
        }
    }
}

static co_fn void one_faulty(struct undo_state *u, unsigned number, unsigned of)
{
    top_up(u);
    bool grouped = chance_one_in(&u->a.w->chance, 2);
    json_t *list = make_combination(u, number, of);
    fail_allocations(u, list, BY_ABORT, grouped);
    fail_allocations(u, list, BY_RECORD, grouped);
    fail_allocations(u, list, DRY, grouped);
    if (has_kind(list, false))
        fail_files(u, list, grouped);
    check_model(u);
    fail_allocations(u, list, FOR_GOOD, grouped);
    CHECK(ref_play_list(&u->ref, list, grouped) < 0);
    check_model(u);
    write_some(u);
    check_model(u);
    end_jobs(u);
    json_decref(list);
}

/* ------------------------------------------------------------------ the scenarios */

static void undo_prepare(struct world *w, struct sim_config *cfg)
{
    (void)w;
    cfg->latency_ns = 10000;
}

static co_fn void begin(struct undo_state *u, struct world *w)
{
    local_open(&u->a, w, w->inst, "A");
    ref_init(&u->ref);
    local_forget_events(&u->a);
    u->a.store.yields = 3;
    u->observer.l = &u->a;
    co_group_add(&u->observer.gone, 1);
    CHECK(loop_spawn(io_loop(w->io, 0), observer_main, &u->observer) == 0);
}

static co_fn void end(struct undo_state *u)
{
    u->observer.stop = true;
    co_group_wait(&u->observer.gone);
    observer_forget(&u->observer);
    local_reset(&u->a);
    local_close(&u->a);
}

/* All combinations of up to `most` kinds; this seed's share. */
static co_fn void each_combination(struct undo_state *u, unsigned most,
                                   co_fn void (*fn)(struct undo_state *, unsigned, unsigned))
{
    unsigned n = 1, at = 0;
    for (unsigned of = 1; of <= most; of++) {
        n *= n_kinds();
        unsigned parts = of == 3 ? PARTS * 16 : PARTS;
        for (unsigned i = 0; i < n; i++, at++)
            if (at % parts == u->a.w->seed % parts)
                fn(u, i, of);
    }
}

static co_fn void undo_live(struct world *w)
{
    struct undo_state *u = w->state;
    begin(u, w);
    each_combination(u, 3, one_combination);
    end(u);
}

static co_fn void faults_live(struct world *w)
{
    struct undo_state *u = w->state;
    begin(u, w);
    each_combination(u, 2, one_faulty);
    end(u);
}

static void undo_finish(struct world *w)
{
    (void)w;
}

static void faults_told(void)
{
    for (unsigned k = 0; k < N_FILE_FAULTS; k++)
        CHECK_SAY((n_struck[k] > 0) == file_faults[k].fails, "%u lists failed of %s", n_struck[k],
                  sim_kind_name(file_faults[k].kind));
}

static const struct scenario undo = {
    .name = "undo",
    .state_size = sizeof(struct undo_state),
    .n_seeds = 64,
    .weight = 50,
    .prepare = undo_prepare,
    .live = undo_live,
    .finish = undo_finish,
};

static const struct scenario faults = {
    .name = "faults",
    .state_size = sizeof(struct undo_state),
    .n_seeds = 64,
    .weight = 50,
    .prepare = undo_prepare,
    .live = faults_live,
    .finish = undo_finish,
    .told = faults_told,
};

int main(void)
{
    const struct scenario *all[] = {&undo, &faults};
    return scenario_main(all, 2);
}
