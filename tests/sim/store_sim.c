/* SPDX-License-Identifier: Apache-2.0 */
/* Law L8, and the record of law L7: random lists and ends of groups with a store that is a log on
 * the simulated disk (durable_store.h). Records fail now and then: then the list is undone, the
 * jobs fail and their bitmaps fold back. The power goes at any moment; what is found afterwards is
 * the state after one of the records, whole, and none older than the last that was answered.
 *
 * No guest writes at the moment of a record: what they wrote before is recorded by a checkpoint, as
 * a daemon's journal would. */
#include <errno.h>
#include <string.h>

#include "durable_store.h"
#include "job/job.h"
#include "local.h"
#include "qmp/instance.h"

#define LOG "log"

struct store_state {
    struct local a;
    struct ref ref, draft;
    struct durable *log;
    struct durable_story story;
    unsigned n_ids, n_refused, n_lists, n_ends;
};

static void check_model(struct store_state *s, const char *when)
{
    char *is = local_bitmaps(&s->a), *should = ref_text(&s->ref);
    bool same = !strcmp(is, should);
    if (!same)
        fprintf(stderr, "---- it is\n%s---- and should be\n%s", is, should);
    CHECK_SAY(same, "the model says otherwise %s", when);
    free(is);
    free(should);
}

/* Now and then the next record fails, and cutting it off may, too. */
static void disturb(struct store_state *s)
{
    struct chance *dice = &s->a.w->chance;
    static const enum sim_kind kinds[] = {SIM_WRITE, SIM_FSYNC, SIM_FSYNC};
    if (!chance_one_in(dice, 5))
        return;
    sim_fail(s->a.w->disk, LOG, kinds[chance_below(dice, 3)], 1,
             chance_one_in(dice, 2) ? ENOSPC : EIO, false);
    if (chance_one_in(dice, 20))
        sim_fail(s->a.w->disk, LOG, SIM_TRUNCATE, 1, EIO, false);
}

/* Was a record refused since? */
static bool refused(struct store_state *s, unsigned before)
{
    sim_clear_faults(s->a.w->disk);
    return s->story.n_refused > before || durable_is_broken(s->log);
}

static co_fn void write_some(struct store_state *s)
{
    struct chance *dice = &s->a.w->chance;
    for (uint64_t i = 1 + chance_below(dice, 3); i-- > 0;) {
        struct ref_node *n = &s->ref.node[chance_below(dice, 3)];
        uint64_t len = 1 + chance_below(dice, 100000), off = chance_below(dice, n->size - len);
        local_write(&s->a, n->name, off, len);
        ref_write(&s->ref, n->name, off, len);
    }
    durable_checkpoint(s->log);
}

static json_t *make_list(struct store_state *s)
{
    struct chance *dice = &s->a.w->chance;
    json_t *list = json_array();
    s->draft = s->ref;
    for (uint64_t n = 1 + chance_below(dice, 6); n-- > 0;) {
        struct ref_maker m = {dice, &s->draft, chance_one_in(dice, 30)};
        json_t *a = ref_make_any(&m);
        json_array_append_new(list, a);
        if (!ref_play(&s->draft, a))
            break;
    }
    s->ref.n_job_ids = s->draft.n_job_ids;
    return list;
}

static co_fn void one_list(struct store_state *s)
{
    struct chance *dice = &s->a.w->chance;
    json_t *list = make_list(s);
    bool grouped = chance_one_in(dice, 2);
    char id[24];
    struct local_props props = {.grouped = grouped};
    if (chance_one_in(dice, 2)) {
        snprintf(id, sizeof id, "list-%u", s->n_ids++);
        props.id = id;
    }
    char *before = local_whole_memory(&s->a), *after;
    unsigned n_refused = s->story.n_refused;
    s->draft = s->ref;
    int failed = ref_play_list(&s->draft, list, grouped);
    disturb(s);
    struct local_outcome o = local_run(&s->a, list, &props);
    bool no_record = refused(s, n_refused);
    if (failed < 0 && no_record)
        CHECK_SAY(o.code < 0 && !strcmp(o.phase, "record"), "%d %s", o.failed, o.text);
    else
        CHECK_SAY(o.failed == failed, "%d, not %d: %s", o.failed, failed, o.text);
    if (o.code < 0) {
        after = local_whole_memory(&s->a);
        CHECK_SAY(!strcmp(before, after), "a list that failed left a trace");
        free(after);
    } else {
        s->ref = s->draft;
        local_wait_jobs(&s->a, "pending");
    }
    s->n_lists++;
    check_model(s, "after a list");
    free(before);
    json_decref(list);
}

/* ------------------------------------------------------------------ ends */

static co_fn void end_one(struct store_state *s, unsigned of)
{
    unsigned group = s->ref.job[of].group, n_refused = s->story.n_refused;
    bool well = chance_one_in(&s->a.w->chance, 2);
    disturb(s);
    CHECK(!local_command(&s->a, well ? "job-finalize" : "job-cancel",
                         json_pack("{s:s}", "id", s->ref.job[of].id)));
    for (unsigned i = 0; i < REF_JOBS; i++)
        if (s->ref.job[i].used && (i == of || (group && s->ref.job[i].group == group)))
            local_wait_gone(&s->a, s->ref.job[i].id);
    bool no_record = refused(s, n_refused);
    for (unsigned i = 0; i < REF_JOBS; i++) {
        struct ref_job *j = &s->ref.job[i];
        if (!j->used || (i != of && (!group || j->group != group)))
            continue;
        if (no_record)
            j->mode = REF_NEVER; /* folds back, whatever was asked for */
        ref_end_job(&s->ref, j, well);
    }
    s->n_ends++;
    check_model(s, "after the end of a group");
    if (no_record) /* what a new daemon would do on finding the jobs there: say that they folded */
        durable_checkpoint(s->log);
}

static co_fn void end_some(struct store_state *s)
{
    for (unsigned i = 0; i < REF_JOBS; i++)
        if (s->ref.job[i].used && chance_one_in(&s->a.w->chance, 3))
            end_one(s, i);
}

/* ------------------------------------------------------------------ the scenario */

static void store_prepare(struct world *w, struct sim_config *cfg)
{
    (void)w;
    cfg->latency_ns = 10000;
}

static co_fn void store_live(struct world *w)
{
    struct store_state *s = w->state;
    local_open(&s->a, w, w->inst, "A");
    ref_init(&s->ref);
    durable_new(w->inst, LOG, &s->story, &s->log);
    local_use_store(&s->a, durable_store(s->log));
    unsigned rounds = 10 + (unsigned)chance_below(&w->chance, 60);
    for (unsigned i = 0; i < rounds && !durable_is_broken(s->log); i++) {
        write_some(s);
        one_list(s);
        if (chance_one_in(&w->chance, 2))
            write_some(s);
        end_some(s);
        local_forget_events(&s->a);
    }
    durable_check(LOG, &s->story);
    local_use_store(&s->a, w->inst->store);
    local_reset(&s->a);
    local_close(&s->a);
    durable_close(s->log);
}

static co_fn void store_after_cut(struct world *w)
{
    struct store_state *s = w->state;
    durable_check(LOG, &s->story);
}

static void store_finish(struct world *w)
{
    struct store_state *s = w->state;
    durable_story_free(&s->story);
}

static const struct scenario durable = {
    .name = "store",
    .state_size = sizeof(struct store_state),
    .n_seeds = 2000,
    .cut_one_in = 2,
    .cut_steps = 1500,
    .prepare = store_prepare,
    .live = store_live,
    .after_cut = store_after_cut,
    .finish = store_finish,
};

int main(void)
{
    const struct scenario *all[] = {&durable};
    return scenario_main(all, 1);
}
