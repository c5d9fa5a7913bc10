/* SPDX-License-Identifier: Apache-2.0 */
/* Laws L1, L9 and L10: a list does what its actions do as plain commands one by one, all or none.
 *
 * Two daemons get the same random lists: `a` as one transaction, `b` as plain commands up to the
 * first that fails. A model of sets (ref.h) says beforehand which action fails and what every
 * bitmap holds afterwards. All three have to agree: outcome, failing action, words, bits, flags,
 * order of bitmaps, owners, jobs; also after guests wrote more (what records, records), and after
 * jobs ended. A list that fails leaves `a` as it was, to the last object.
 *
 * Jobs wait for job-finalize, so that in `b`, too, they own their bitmaps until the end of the
 * list (law L10 with jobs: gates stay shut until the last one). */
#include <string.h>

#include "block/node.h"
#include "block/tracker.h"
#include "local.h"
#include "qmp/instance.h"

#define LISTS 50u
#define LONGEST 14u
#define EPOCHS 4096u

struct fuzz {
    struct local a, b;
    struct ref ref, draft;
    uint64_t generation[EPOCHS]; /* by epoch, 0: not seen yet */
    unsigned n_lists, n_failed, n_jobs;
    bool fresh; /* both daemons have to begin anew */
};

/* ------------------------------------------------------------------ comparing */

static void say_difference(const char *a, const char *b)
{
    fprintf(stderr, "---- one\n%s---- other\n%s", a, b);
}

static void check_equal(char *a, char *b, const char *when)
{
    bool same = !strcmp(a, b);
    if (!same)
        say_difference(a, b);
    CHECK_SAY(same, "they differ %s", when);
    free(a);
    free(b);
}

/* Two times in the life of a bitmap have one generation iff the model says one epoch. */
static void check_generations(struct fuzz *z)
{
    for (unsigned i = 0; i < REF_NODES; i++) {
        struct ref_node *rn = &z->ref.node[i];
        if (!rn->used)
            continue;
        struct dirty_bitmap *b = node_bitmaps(graph_find(z->a.inst->graph, rn->name));
        for (unsigned k = 0; k < rn->n; k++, b = b->next) {
            unsigned epoch = rn->b[k].epoch;
            CHECK(b && epoch < EPOCHS);
            for (unsigned e = 0; e < EPOCHS && e <= z->ref.n_epochs; e++)
                CHECK_SAY(e == epoch || z->generation[e] != b->generation,
                          "bitmap %s of %s has a generation of another time", b->name, rn->name);
            CHECK_SAY(!z->generation[epoch] || z->generation[epoch] == b->generation,
                      "bitmap %s of %s has another generation", b->name, rn->name);
            z->generation[epoch] = b->generation;
        }
    }
}

static void check_all(struct fuzz *z, const char *when)
{
    check_equal(local_bitmaps(&z->a), local_bitmaps(&z->b), when);
    check_equal(local_bitmaps(&z->a), ref_text(&z->ref), when);
    check_generations(z);
}

/* ------------------------------------------------------------------ making */

static struct ref_maker maker(struct fuzz *z, struct ref *r, bool careless)
{
    return (struct ref_maker){&z->a.w->chance, r, careless};
}

/* Each action fits what the ones before it made of the state; now and then one does not. */
static json_t *make_list(struct fuzz *z)
{
    struct chance *dice = &z->a.w->chance;
    unsigned n = 1 + (unsigned)chance_below(dice, LONGEST);
    bool careless = chance_one_in(dice, 2), playing = true;
    json_t *list = json_array();
    z->draft = z->ref;
    for (unsigned i = 0; i < n; i++) {
        struct ref_maker m = maker(z, &z->draft, careless && chance_one_in(dice, 3));
        json_t *a = ref_make_any(&m);
        json_array_append_new(list, a);
        playing = playing && ref_play(&z->draft, a);
    }
    z->ref.n_job_ids = z->draft.n_job_ids;
    return list;
}

static void write_some(struct fuzz *z)
{
    static const uint64_t lengths[] = {1, 512, 5000, 70000};
    struct chance *dice = &z->a.w->chance;
    for (uint64_t i = chance_below(dice, 4); i-- > 0;) {
        struct ref_node *n = &z->ref.node[chance_below(dice, 3)];
        uint64_t len = lengths[chance_below(dice, 4)], off = chance_below(dice, n->size - len);
        local_write(&z->a, n->name, off, len);
        local_write(&z->b, n->name, off, len);
        ref_write(&z->ref, n->name, off, len);
    }
}

static co_fn void begin_anew(struct fuzz *z)
{
    local_reset(&z->a);
    local_reset(&z->b);
    ref_init(&z->ref);
    memset(z->generation, 0, sizeof z->generation);
    z->fresh = false;
    for (uint64_t i = 2 + chance_below(&z->a.w->chance, 6); i-- > 0;) {
        struct ref_maker m = maker(z, &z->ref, false);
        json_t *a = ref_make(&m, &ref_kinds[0]), *data = json_object_get(a, "data");
        const char *type = json_string_value(json_object_get(a, "type"));
        if (a) {
            CHECK(!local_command(&z->a, type, json_incref(data)));
            CHECK(!local_command(&z->b, type, json_incref(data)));
            CHECK(ref_play(&z->ref, a));
        }
        json_decref(a);
        write_some(z);
    }
    check_all(z, "at the beginning");
}

/* ------------------------------------------------------------------ running */

/* The index of the command that fails, -1: none. */
static co_fn int one_by_one(struct local *l, json_t *list, char **text)
{
    json_t *a;
    size_t i;
    json_array_foreach (list, i, a) {
        const char *type = json_string_value(json_object_get(a, "type"));
        *text = NULL;
        if (!strcmp(type, "abort"))
            return (int)i;
        *text = local_command(l, type, json_incref(json_object_get(a, "data")));
        if (*text)
            return (int)i;
    }
    return -1;
}

/* But for the names of files and the numbers of nodes without a name, which are each daemon's own.
 */
static bool same_words(const char *a, const char *b)
{
    for (; *a && *b; a++, b++) {
        if (*a != *b && !(*a == 'A' && *b == 'B' && a[1] == '-'))
            return false;
        if (!strncmp(a, "#block", 6)) {
            a += 5 + strspn(a + 6, "0123456789");
            b += 5 + strspn(b + 6, "0123456789");
        }
    }
    return *a == *b;
}

static bool makes_files(json_t *list)
{
    json_t *a;
    size_t i;
    json_array_foreach (list, i, a)
        if (!strcmp(json_string_value(json_object_get(a, "type")), "drive-backup"))
            return true;
    return false;
}

static void check_dry(struct fuzz *z, json_t *list, bool grouped, int failed)
{
    char *before = local_whole(&z->a);
    struct local_props props = {.grouped = grouped, .dry_run = true};
    struct local_outcome o = local_run(&z->a, list, &props);
    /* A dry run does not make files, so it cannot see that it would. */
    CHECK(makes_files(list) || (o.failed == failed && (o.code < 0) == (failed >= 0)));
    check_equal(before, local_whole(&z->a), "before and after a dry run");
}

static bool is_in_group(const struct ref *r, unsigned i, unsigned of)
{
    return i == of || (r->job[of].group && r->job[i].used && r->job[i].group == r->job[of].group);
}

/* One job is finalized or cancelled, and so is its whole group; in `b` each by itself. */
static co_fn void end_one(struct fuzz *z, unsigned of)
{
    bool well = chance_one_in(&z->a.w->chance, 2);
    const char *verb = well ? "job-finalize" : "job-cancel";
    CHECK(!local_command(&z->a, verb, json_pack("{s:s}", "id", z->ref.job[of].id)));
    for (unsigned i = REF_JOBS; i-- > 0;) {
        if (i == of || !is_in_group(&z->ref, i, of))
            continue;
        local_wait_gone(&z->a, z->ref.job[i].id);
        CHECK(!local_command(&z->b, verb, json_pack("{s:s}", "id", z->ref.job[i].id)));
        local_wait_gone(&z->b, z->ref.job[i].id);
        ref_end_job(&z->ref, &z->ref.job[i], well);
    }
    local_wait_gone(&z->a, z->ref.job[of].id);
    CHECK(!local_command(&z->b, verb, json_pack("{s:s}", "id", z->ref.job[of].id)));
    local_wait_gone(&z->b, z->ref.job[of].id);
    ref_end_job(&z->ref, &z->ref.job[of], well);
}

static co_fn void end_some(struct fuzz *z)
{
    for (unsigned i = 0; i < REF_JOBS; i++) {
        if (!z->ref.job[i].used || chance_one_in(&z->a.w->chance, 3))
            continue;
        end_one(z, i);
        z->n_jobs++;
        check_all(z, "after the end of a job");
    }
}

static co_fn void after_success(struct fuzz *z)
{
    local_wait_jobs(&z->a, "pending");
    local_wait_jobs(&z->b, "pending");
    check_all(z, "after a list");
    write_some(z);
    check_all(z, "after a list and writes");
    end_some(z);
    z->fresh = z->ref.n_epochs > EPOCHS - 200 || chance_one_in(&z->a.w->chance, 4);
}

static co_fn void one_list(struct fuzz *z)
{
    struct chance *dice = &z->a.w->chance;
    if (z->fresh)
        begin_anew(z);
    write_some(z);
    json_t *list = make_list(z);
    bool grouped = chance_one_in(dice, 3);
    int failed = ref_play_list(&z->ref, list, grouped);
    if (chance_one_in(dice, 4))
        check_dry(z, list, grouped, failed);
    char *before = local_whole(&z->a), *text = NULL;
    struct local_outcome o = local_run(&z->a, list, &(struct local_props){.grouped = grouped});
    char *after = local_whole(&z->a);
    int plain = one_by_one(&z->b, list, &text);
    if (o.failed != failed || plain != failed)
        json_dumpf(list, stderr, 0);
    CHECK_SAY(o.failed == failed && (o.code < 0) == (failed >= 0) && plain == failed,
              "the model says %d, the list %d (%s), one by one %d (%s)", failed, o.failed, o.text,
              plain, text ? text : "");
    z->n_lists++;
    if (failed >= 0) {
        CHECK_SAY(!text || same_words(o.text, text), "'%s' but '%s'", o.text, text);
        check_equal(before, after, "before and after a list that failed");
        check_generations(z);
        z->fresh = true;
        z->n_failed++;
    } else {
        free(before);
        free(after);
        after_success(z);
    }
    free(text);
    json_decref(list);
}

/* ------------------------------------------------------------------ the scenario */

static void fuzz_prepare(struct world *w, struct sim_config *cfg)
{
    (void)w;
    cfg->latency_ns = 10000;
}

static co_fn void fuzz_live(struct world *w)
{
    struct fuzz *z = w->state;
    struct instance *other;
    struct tide_error err = {0};
    CHECK_SAY(instance_new(w->io, &other, &err) == 0, "%s", err.msg);
    CHECK(instance_open(other, &err) == 0);
    local_open(&z->a, w, w->inst, "A");
    local_open(&z->b, w, other, "B");
    z->fresh = true;
    for (unsigned i = 0; i < LISTS; i++)
        one_list(z);
    CHECK(z->n_failed > LISTS / 20 && z->n_failed < LISTS * 19 / 20);
    local_reset(&z->a);
    local_reset(&z->b);
    local_close(&z->a);
    local_close(&z->b);
    instance_close(other);
}

static void fuzz_finish(struct world *w)
{
    (void)w;
}

static const struct scenario fuzz = {
    .name = "lists and one by one",
    .state_size = sizeof(struct fuzz),
    .n_seeds = 400, /* of 50 lists each; a quarter of them under a sanitizer */
    .prepare = fuzz_prepare,
    .live = fuzz_live,
    .finish = fuzz_finish,
};

int main(void)
{
    const struct scenario *all[] = {&fuzz};
    return scenario_main(all, 1);
}
