/* SPDX-License-Identifier: Apache-2.0 */
/* Laws L6 and L7. One to three jobs made by one list, with bitmap actions of any kind around them;
 * guests write; and at any point of any job's life something happens to it: cancel (by either
 * command), pause and resume, finalize by hand, an error of its target, a record of the end that is
 * refused; or all of it goes well and memory runs out at the end. Each point: as soon as the event
 * of a status is heard, or a moment later. Every other round aims at one point of one member, and
 * over the seeds each was hit: blow, status of the job, place in the list.
 *
 * A second client looks all the time around an end: as far as it can see all jobs of a group and
 * their bitmaps are as they were, or all are as the end made them. When the first event of the end
 * leaves, every bitmap has moved.
 *
 * At the end: the jobs of a group ended in one way, each once, their ends in order of creation with
 * nothing between; every bitmap moved or folded back, exactly (a model of sets knows); what jobs
 * owned was refused to everybody until then. */
#include <errno.h>
#include <string.h>

#include "base/mem.h"
#include "block/node.h"
#include "block/tracker.h"
#include "job/job.h"
#include "local.h"
#include "qmp/instance.h"

#define MAX_MEMBERS 3u
#define ROUNDS 12u
#define SLOW (1 << 22) /* bytes a second: a disk takes a quarter of one */

enum blow { NOTHING, CANCEL, BLOCK_CANCEL, PAUSE, PAUSE_AND_CANCEL, TARGET_ERROR, N_BLOWS };

/* What shall happen to a job, and when. */
struct plan {
    enum blow blow;
    char status[16];  /* when this is heard of it */
    uint64_t later;   /* and this many ns passed */
    bool pause_first; /* at "running" */
    bool struck;
};

/* Where blows can meet a job, and what of them is accepted there. In state "created" nobody meets
 * it: a list announces its jobs and lets them go without a pause. */
static const struct point {
    enum job_status is;
    const char *heard;
    bool accepts[TARGET_ERROR]; /* of PAUSE_AND_CANCEL the first half */
} points[] = {
    {JOB_RUNNING,
     "running",
     {[CANCEL] = 1, [BLOCK_CANCEL] = 1, [PAUSE] = 1, [PAUSE_AND_CANCEL] = 1}},
    {JOB_PAUSED, "paused", {[CANCEL] = 1}}, /* by its user */
    {JOB_WAITING, "waiting", {[CANCEL] = 1, [BLOCK_CANCEL] = 1}},
    {JOB_PENDING, "pending", {[CANCEL] = 1, [BLOCK_CANCEL] = 1}},
    {JOB_ABORTING, "aborting", {0}},
};
#define N_POINTS (sizeof points / sizeof *points)

/* Over all seeds: answered as the table says; and how rounds ended. */
static unsigned n_struck[N_BLOWS][N_POINTS][MAX_MEMBERS];
static unsigned n_rounds[2][MAX_MEMBERS][2]; /* grouped, members - 1, all went well */
static unsigned n_refused, n_starved;
static unsigned n_looks; /* of the observer, at ends that were near */

struct member {
    char id[16];
    const char *node, *target, *bitmap;
    enum ref_mode mode;
    int speed;
    bool by_hand; /* auto-finalize: false */
    struct plan plan;
    unsigned n_ends, n_created, n_null;
    bool over;           /* its work is */
    uint64_t left;       /* bytes that it had not copied */
    uint64_t generation; /* of the bitmap, when the job began */
    bool well, cancelled, failed;
    struct group_state *g;
};

struct group_state {
    struct local a;
    struct ref ref;
    struct member member[MAX_MEMBERS];
    unsigned n_members, round;
    struct member *aimed; /* at this one, or NULL */
    unsigned point;
    bool grouped, refuse;
    /* An allocation of the end shall fail; it has been told to. */
    bool starve, starving;
    bool in_write;
    bool stop_writing;
    struct co_mutex writing;     /* held: no write is under way */
    json_t *list;                /* being run */
    struct io_event end_is_near; /* for the observer */
    struct co_group gone, blows;
};

/* ------------------------------------------------------------------ guests */

static void writer_main(void *arg)
{
    struct group_state *g = arg;
    struct chance *dice = &g->a.w->chance;
    while (!g->stop_writing) {
        struct ref_node *n = &g->ref.node[chance_below(dice, 3)];
        uint64_t len = 1 + chance_below(dice, 30000), off = chance_below(dice, n->size - len);
        co_mutex_lock(&g->writing);
        if (g->starving) { /* not the guest's */
            co_mutex_unlock(&g->writing);
            io_sleep(1000000);
            continue;
        }
        g->in_write = true;
        local_write(&g->a, n->name, off, len);
        ref_write(&g->ref, n->name, off, len);
        g->in_write = false;
        co_mutex_unlock(&g->writing);
        io_sleep(chance_below(dice, 3000000));
    }
    co_group_done(&g->gone);
}

/* ------------------------------------------------------------------ what an end looks like */

static struct dirty_bitmap *bitmap_of(struct group_state *g, const struct member *m)
{
    struct dirty_bitmap *b;
    struct tide_error err;
    struct node *n = graph_find(g->a.inst->graph, m->node);
    CHECK(dirty_bitmap_find(n, m->bitmap, 0, &b, &err) == 0);
    return b;
}

static bool is_frozen(struct group_state *g, const struct member *m)
{
    struct dirty_bitmap *b = bitmap_of(g, m);
    return b->successor || b->n_busy;
}

/* One that moved covers less than before, and says so; one that folded back is what it was. */
static void check_generation(struct group_state *g, const struct member *m, bool well)
{
    bool moved = !g->refuse && (m->mode == REF_ALWAYS || (well && m->mode == REF_ON_SUCCESS));
    CHECK(moved == (bitmap_of(g, m)->generation != m->generation));
}

/* As the end of a job is told. Those of a group end in one way, so all of them are known by the
 * first; when that is told the bitmaps of all have moved already. */
static void check_end(struct group_state *g, const struct member *told)
{
    for (unsigned i = 0; i < g->n_members; i++) {
        struct member *m = &g->member[i];
        if (!m->bitmap || (m != told && !g->grouped))
            continue;
        CHECK_SAY(!is_frozen(g, m), "the end of %s is told before the bitmap of %s has moved",
                  told->id, m->id);
        check_generation(g, m, told->well);
    }
}

/* What a query sees of it: is the job there, and does it hold its bitmap? */
static bool looks_there(struct group_state *g, const struct member *m)
{
    struct tide_error err;
    struct job *j;
    bool there =
        job_find(g->a.inst->jobs, m->id, false, &j, &err) == 0 && j->status < JOB_CONCLUDED;
    CHECK_SAY(!m->bitmap || there == is_frozen(g, m), "a query sees job %s %s its bitmap", m->id,
              there ? "without" : "gone, but not from");
    return there;
}

static co_fn bool look(struct group_state *g)
{
    unsigned n = 0;
    graph_query_begin(g->a.inst->graph);
    for (unsigned i = 0; i < g->n_members; i++)
        n += looks_there(g, &g->member[i]);
    CHECK_SAY(!g->grouped || !n || n == g->n_members, "a query sees %u of %u jobs of a group", n,
              g->n_members);
    graph_query_end(g->a.inst->graph);
    return n > 0;
}

static bool all_are_over(const struct group_state *g)
{
    for (unsigned i = 0; i < g->n_members; i++)
        if (!g->member[i].over)
            return false;
    return true;
}

/* The second client: from when the last job has done its work until all are gone. */
static void observer_main(void *arg)
{
    struct group_state *g = arg;
    for (;;) {
        io_event_wait(&g->end_is_near, IO_FOREVER);
        if (g->stop_writing)
            break;
        while (all_are_over(g) && look(g)) {
            n_looks++;
            io_sleep(chance_below(&g->a.w->chance, 10000)); /* while others pause time stands */
        }
    }
    co_group_done(&g->gone);
}

/* ------------------------------------------------------------------ blows */

/* False: refused, where the state is past it. */
static co_fn bool command(struct group_state *g, const char *name, const char *key, const char *id)
{
    char *e = local_command(&g->a, name, json_pack("{s:s}", key, id));
    bool accepted = !e;
    free(e);
    return accepted;
}

static co_fn bool strike(struct member *m)
{
    struct group_state *g = m->g;
    bool accepted;
    switch (m->plan.blow) {
    case CANCEL:
        return command(g, "job-cancel", "id", m->id);
    case BLOCK_CANCEL:
        return command(g, "block-job-cancel", "device", m->id);
    default:
        accepted = command(g, "job-pause", "id", m->id);
        io_sleep(chance_below(&g->a.w->chance, 2000000));
        command(g, m->plan.blow == PAUSE ? "job-resume" : "job-cancel", "id", m->id);
        return accepted;
    }
}

/* In points[]; N_POINTS: it is elsewhere, or gone. */
static unsigned point_of(struct group_state *g, const struct member *m)
{
    struct tide_error err;
    struct job *j;
    unsigned i = 0;
    if (job_find(g->a.inst->jobs, m->id, false, &j, &err) < 0)
        return N_POINTS;
    while (i < N_POINTS && points[i].is != j->status)
        i++;
    return i;
}

static void blow_main(void *arg)
{
    struct member *m = arg;
    struct group_state *g = m->g;
    if (m->plan.later)
        io_sleep(m->plan.later);
    unsigned at = point_of(g, m);
    bool accepted = strike(m);
    if (at < N_POINTS && accepted == points[at].accepts[m->plan.blow])
        n_struck[m->plan.blow][at][m - g->member]++;
    if (m->plan.pause_first)
        command(g, "job-resume", "id", m->id);
    co_group_done(&g->blows);
}

static void pause_main(void *arg)
{
    struct member *m = arg;
    command(m->g, "job-pause", "id", m->id);
    co_group_done(&m->g->blows);
}

static void finalize_main(void *arg)
{
    struct member *m = arg;
    struct group_state *g = m->g;
    io_sleep(chance_below(&g->a.w->chance, 1000000));
    command(g, chance_one_in(&g->a.w->chance, 2) ? "job-finalize" : "block-job-finalize", "id",
            m->id);
    co_group_done(&g->blows);
}

static void spawn(struct group_state *g, void (*fn)(void *), struct member *m)
{
    co_group_add(&g->blows, 1);
    CHECK(loop_spawn(io_loop(g->a.w->io, 0), fn, m) == 0);
}

static struct member *member_of(struct group_state *g, const char *id)
{
    for (unsigned i = 0; i < g->n_members; i++)
        if (!strcmp(g->member[i].id, id))
            return &g->member[i];
    return NULL;
}

static void hear_end(struct group_state *g, struct member *m, const struct local_event *e)
{
    m->n_ends++;
    m->cancelled = !strcmp(e->name, "BLOCK_JOB_CANCELLED");
    m->failed = e->error;
    m->left = e->len - e->offset;
    m->well = !m->cancelled && !m->failed;
    if (m->plan.blow == TARGET_ERROR && m->failed)
        n_struck[TARGET_ERROR][0][m - g->member]++;
    check_end(g, m);
}

static void hear_status(struct group_state *g, struct member *m, const char *status)
{
    m->n_created += !strcmp(status, "created");
    m->n_null += !strcmp(status, "null");
    if (!strcmp(status, "waiting") || !strcmp(status, "aborting")) {
        m->over = true;
        io_event_set(&g->end_is_near);
    }
    if (m->plan.pause_first && !m->plan.struck && !strcmp(status, "running"))
        spawn(g, pause_main, m);
    if (m->plan.blow && m->plan.blow != TARGET_ERROR && !m->plan.struck &&
        !strcmp(status, m->plan.status)) {
        m->plan.struck = true;
        spawn(g, blow_main, m);
    }
    if (m->by_hand && !strcmp(status, "pending"))
        spawn(g, finalize_main, m);
}

static void on_event(void *arg, const struct local_event *e)
{
    struct group_state *g = arg;
    struct member *m = member_of(g, e->id);
    if (!m)
        return;
    if (!strncmp(e->name, "BLOCK_JOB_C", 11))
        hear_end(g, m, e);
    hear_status(g, m, e->status);
    if (g->starve && g->grouped && !g->starving && !g->in_write && !strcmp(e->status, "pending")) {
        g->starving = true;
        n_starved++;
        mem_fail_after(1 + chance_below(&g->a.w->chance, 12));
    }
}

/* ------------------------------------------------------------------ making a round */

static void fail_target(struct group_state *g, unsigned most)
{
    sim_fail(g->a.w->disk, "a-te", SIM_WRITE, 1 + (unsigned)chance_below(&g->a.w->chance, most),
             EIO, true);
}

static void plan_blow(struct group_state *g, struct member *m)
{
    static const char *const at[] = {"created", "running", "running", "paused",
                                     "waiting", "pending", "aborting"};
    struct chance *dice = &g->a.w->chance;
    m->plan = (struct plan){0};
    if (chance_one_in(dice, 2))
        return;
    m->plan.blow = 1 + (enum blow)chance_below(dice, N_BLOWS - 1);
    snprintf(m->plan.status, sizeof m->plan.status, "%s", at[chance_below(dice, 7)]);
    m->plan.later = chance_one_in(dice, 2) ? chance_below(dice, 3000000) : 0;
    if (m->plan.blow == TARGET_ERROR && !strcmp(m->target, "te"))
        fail_target(g, 12);
}

/* All of a disk, slowly: there is time to meet it running. */
static void be_slow(struct member *m)
{
    m->bitmap = NULL;
    m->speed = SLOW;
}

static void plan_status(struct member *m, enum blow blow, const char *heard)
{
    m->plan.blow = blow;
    snprintf(m->plan.status, sizeof m->plan.status, "%s", heard);
}

/* The one aimed at comes to the point, and the others see to that. */
static void take_aim(struct group_state *g, enum blow blow)
{
    const struct point *p = &points[g->point];
    struct member *m = g->aimed, *other = &g->member[m == g->member];
    plan_status(m, blow, p->heard);
    if (blow == TARGET_ERROR) {
        m->bitmap = NULL;
        fail_target(g, 1);
    } else if (p->is == JOB_RUNNING || p->is == JOB_PAUSED) {
        be_slow(m);
        m->plan.pause_first = p->is == JOB_PAUSED;
    } else if (p->is == JOB_WAITING) {
        m->speed = 0;
        be_slow(other);
    } else if (p->is == JOB_ABORTING) {
        be_slow(other);
        plan_status(other, CANCEL, "running");
    }
}

/* Which disks, in which order, is the chance's, but for the one whose target is to fail; each at
 * most once, and its bitmap of its own. */
static void choose_members(struct group_state *g, unsigned first)
{
    static const char *const nodes[] = {"d", "e", "f"}, *const targets[] = {"td", "te", "tf"};
    static const char *const bitmaps[] = {"p", "q", "r", NULL};
    static const int speeds[] = {0, 0, SLOW, 1 << 25};
    struct chance *dice = &g->a.w->chance;
    for (unsigned i = 0; i < g->n_members; i++) {
        struct member *m = &g->member[i];
        unsigned k = (first + i) % 3;
        *m = (struct member){.node = nodes[k],
                             .target = targets[k],
                             .bitmap = bitmaps[chance_below(dice, 4)],
                             .mode = (enum ref_mode)chance_below(dice, 3),
                             .speed = speeds[chance_below(dice, 4)],
                             .by_hand = !g->starve && chance_one_in(dice, 3),
                             .g = g};
        snprintf(m->id, sizeof m->id, "j%u-%u", g->round % 1000, i);
        if (!g->starve && !g->aimed)
            plan_blow(g, m);
    }
}

/* Every other round is the chance's. The rest take blow, point and member in turn. */
static void choose_round(struct group_state *g)
{
    struct chance *dice = &g->a.w->chance;
    uint64_t turn = g->a.w->seed * (ROUNDS / 2) + g->round / 2;
    bool aims = g->round % 2;
    unsigned member = turn % MAX_MEMBERS, first = (unsigned)chance_below(dice, 3);
    enum blow blow = 1 + (enum blow)(turn / MAX_MEMBERS % (N_BLOWS - 1));
    g->starve = !aims && chance_one_in(dice, 3);
    g->starving = false;
    g->point = (unsigned)(turn / (MAX_MEMBERS * (N_BLOWS - 1)) % N_POINTS);
    g->aimed = aims ? &g->member[member] : NULL;
    g->n_members = 1 + (unsigned)chance_below(dice, MAX_MEMBERS);
    if (aims)
        g->n_members = MAX(g->n_members, MAX(member + 1, 2u));
    if (aims && blow == TARGET_ERROR)
        first = (4 - member) % 3; /* (first + member) % 3 is the place of "te" */
    choose_members(g, first);
    if (aims)
        take_aim(g, blow);
    /* Only what is one group ends at one point, which the one record is for. */
    g->grouped = g->n_members == 1 || aims || !chance_one_in(dice, 2);
    g->refuse = g->grouped && chance_one_in(dice, 6);
    n_refused += g->refuse;
}

static json_t *backup_of(struct group_state *g, const struct member *m)
{
    static const char *const modes[] = {"on-success", "never", "always"};
    json_t *data = json_pack("{s:s,s:s,s:s,s:s,s:b,s:i}", "job-id", m->id, "device", m->node,
                             "target", m->target, "sync", m->bitmap ? "bitmap" : "full",
                             "auto-finalize", !m->by_hand, "speed", m->speed);
    if (m->bitmap) {
        json_object_set_new(data, "bitmap", json_string(m->bitmap));
        json_object_set_new(data, "bitmap-mode", json_string(modes[m->mode]));
    }
    return json_pack("{s:s,s:o}", "type", "blockdev-backup", "data", data);
}

static json_t *bitmap_action(const char *kind, const char *node, const char *name)
{
    char type[40];
    snprintf(type, sizeof type, "block-dirty-bitmap-%s", kind);
    return json_pack("{s:s,s:{s:s,s:s}}", "type", type, "data", "node", node, "name", name);
}

/* Before the jobs and after them: actions of other kinds, on what no job owns. */
static void add_others(struct group_state *g, json_t *list, bool before)
{
    static const char *const kinds[] = {"clear", "enable", "disable"};
    struct chance *dice = &g->a.w->chance;
    for (unsigned i = 0; i < g->n_members; i++) {
        struct member *m = &g->member[i];
        if (m->bitmap && before && chance_one_in(dice, 2))
            json_array_append_new(list,
                                  bitmap_action(kinds[chance_below(dice, 2)], m->node, m->bitmap));
        if (chance_one_in(dice, 2))
            json_array_append_new(list, bitmap_action(kinds[chance_below(dice, 3)], m->node, "s"));
        if (m->bitmap && before && chance_one_in(dice, 3))
            json_array_append_new(list, json_pack("{s:s,s:{s:s,s:s,s:[s]}}", "type",
                                                  "block-dirty-bitmap-merge", "data", "node",
                                                  m->node, "target", m->bitmap, "bitmaps", "s"));
    }
}

/* ------------------------------------------------------------------ what has to be so */

/* What a job owns is refused to every other action, in the list that made it and after it. */
static void check_owned(struct group_state *g)
{
    static const char *const kinds[] = {"clear", "enable", "disable", "remove"};
    struct chance *dice = &g->a.w->chance;
    struct member *m = &g->member[chance_below(dice, g->n_members)];
    json_t *list = json_array(), *backup;
    if (!m->bitmap)
        goto out;
    backup = backup_of(g, m);
    json_object_set_new(json_object_get(backup, "data"), "job-id", json_string("other"));
    json_array_append_new(list, backup); /* [backup b, x b] and [backup b, backup b] */
    if (chance_one_in(dice, 4)) {
        json_t *second = json_deep_copy(backup);
        json_object_set_new(json_object_get(second, "data"), "job-id", json_string("second"));
        json_array_append_new(list, second);
    } else {
        json_array_append_new(list,
                              bitmap_action(kinds[chance_below(dice, 4)], m->node, m->bitmap));
    }
    struct local_outcome o = local_run(&g->a, list, &(struct local_props){.grouped = g->grouped});
    CHECK_SAY(o.failed == 1 && strstr(o.text, m->bitmap) && strstr(o.text, "in use"), "%d: %s",
              o.failed, o.text);
out:
    json_decref(list);
}

static void check_members(struct group_state *g)
{
    bool well = true;
    for (unsigned i = 0; i < g->n_members; i++) {
        struct member *m = &g->member[i];
        CHECK_SAY(m->n_created == 1 && m->n_ends == 1 && m->n_null == 1,
                  "job %s: created %u, ended %u, gone %u times", m->id, m->n_created, m->n_ends,
                  m->n_null);
        CHECK(!g->grouped || m->well == g->member[0].well);
        CHECK(!g->refuse || !m->well);
        CHECK_SAY(m->well || !g->starving || g->refuse, "job %s failed for want of memory", m->id);
        well = well && m->well;
    }
    n_rounds[g->grouped][g->n_members - 1][well]++;
}

/* The ends of a group: COMPLETED or CANCELLED, concluded, of one after the other in order of
 * creation, then null of each. */
static void check_order(struct group_state *g)
{
    unsigned n = g->n_members, at = 0, i;
    while (at < g->a.n_events && strncmp(g->a.event[at].name, "BLOCK_JOB_C", 11))
        at++;
    CHECK(at + 3 * n == g->a.n_events);
    for (i = 0; i < 2 * n; i++) {
        const struct local_event *e = &g->a.event[at + i];
        CHECK_SAY(!strcmp(e->id, g->member[i / 2].id), "the end of %s is not in order", e->id);
        CHECK(i % 2 ? !strcmp(e->status, "concluded") : !strncmp(e->name, "BLOCK_JOB_C", 11));
    }
    for (i = 0; i < n; i++) {
        const struct local_event *e = &g->a.event[at + 2 * n + i];
        CHECK(!strcmp(e->status, "null") && !strcmp(e->id, g->member[i].id));
    }
}

static bool has_bit(const uint8_t *set, uint64_t i)
{
    return set[i / 8] >> i % 8 & 1;
}

/* All that was not copied is still marked. */
static void check_rest(const struct ref_node *n, const struct dirty_bitmap *b,
                       const struct member *m)
{
    uint64_t marked = 0, off, len;
    for (uint64_t at = 0; at < n->size; at += 65536) {
        uint64_t end = MIN(at + 65536, n->size);
        marked += bitmap_next_dirty(b->bits, at, end, &off, &len) ? end - at : 0;
    }
    CHECK_SAY(marked >= m->left,
              "job %s did not copy %" PRIu64 " bytes, and %" PRIu64 " are marked", m->id, m->left,
              marked);
}

/* A bitmap with mode always after a job that did not end well: what came since the job began and
 * what was not copied, in whole granules of the copy, but no more than there was. If the record of
 * that was refused: all that there was, too. */
static void check_partly(struct group_state *g, struct member *m)
{
    struct ref_node *n = ref_node(&g->ref, m->node);
    struct ref_bitmap *r = ref_bitmap(n, m->bitmap);
    struct dirty_bitmap *b = bitmap_of(g, m);
    CHECK(!b->successor && !b->n_busy);
    for (uint64_t off = 0; off < n->size; off += UINT64_C(1) << r->shift) {
        uint64_t i = off >> r->shift, copy = MAX(UINT64_C(1) << r->shift, UINT64_C(65536));
        bool may = has_bit(r->late, i), is = bitmap_test(b->bits, off);
        bool must = may || (g->refuse && has_bit(r->bits, i));
        CHECK_SAY(is || !must, "job %s lost the mark at %" PRIu64, m->id, off);
        for (uint64_t o = off / copy * copy; !may && o < MIN(off / copy * copy + copy, n->size);
             o += UINT64_C(1) << r->shift)
            may = has_bit(r->bits, o >> r->shift);
        CHECK_SAY(!is || may || g->starving, "job %s made up a mark at %" PRIu64, m->id, off);
        if (is)
            r->late[i / 8] |= (uint8_t)(1u << i % 8); /* the model takes over which it was */
    }
    check_rest(n, b, m);
}

/* Without memory a bitmap may hold more than it should, never less. */
static void take_over_more(struct group_state *g)
{
    for (unsigned i = 0; i < 3; i++) {
        struct ref_node *n = &g->ref.node[i];
        struct dirty_bitmap *b = node_bitmaps(graph_find(g->a.inst->graph, n->name));
        for (unsigned k = 0; k < n->n; k++, b = b->next) {
            for (uint64_t at = 0; at << n->b[k].shift < n->size; at++) {
                bool is = bitmap_test(b->bits, at << n->b[k].shift);
                CHECK_SAY(is || !has_bit(n->b[k].bits, at), "%s lost a mark", b->name);
                if (is)
                    n->b[k].bits[at / 8] |= (uint8_t)(1u << at % 8);
            }
        }
    }
}

/* The model learns how it ended, and must agree with every bitmap. */
static void check_bitmaps(struct group_state *g)
{
    for (unsigned i = 0; i < g->n_members; i++) {
        struct member *m = &g->member[i];
        for (unsigned k = 0; k < REF_JOBS; k++) {
            struct ref_job *j = &g->ref.job[k];
            if (!j->used || strcmp(j->id, m->id))
                continue;
            if (m->bitmap)
                check_generation(g, m, m->well);
            if (m->bitmap && j->mode == REF_ALWAYS && !m->well)
                check_partly(g, m);
            ref_end_job(&g->ref, j, m->well);
        }
    }
    if (g->starving)
        take_over_more(g);
    g->starving = false;
    char *is = local_bitmaps(&g->a), *should = ref_text(&g->ref);
    bool same = !strcmp(is, should);
    if (!same)
        fprintf(stderr, "---- it is\n%s---- and should be\n%s", is, should);
    CHECK_SAY(same, "the bitmaps are not what the end of the jobs makes of them");
    free(is);
    free(should);
}

/* ------------------------------------------------------------------ a round */

static co_fn void wait_gone(struct group_state *g)
{
    for (unsigned i = 0; i < g->n_members; i++)
        while (!g->member[i].n_null)
            io_event_wait(&g->a.heard, IO_FOREVER);
    co_group_wait(&g->blows);
}

/* The model makes the step at the instant at which all disks are held. */
static void on_step(void *arg, enum txn_step step, unsigned done)
{
    struct group_state *g = arg;
    (void)done;
    if (step != TXN_RECORDED)
        return;
    CHECK(ref_play_list(&g->ref, g->list, g->grouped) < 0);
    for (unsigned i = 0; i < g->n_members; i++)
        if (g->member[i].bitmap)
            g->member[i].generation = bitmap_of(g, &g->member[i])->generation;
}

static co_fn void one_round(struct group_state *g)
{
    json_t *list = json_array();
    choose_round(g);
    local_forget_events(&g->a);
    check_owned(g);
    add_others(g, list, true);
    for (unsigned i = 0; i < g->n_members; i++)
        json_array_append_new(list, backup_of(g, &g->member[i]));
    add_others(g, list, false);
    unsigned refused = g->a.store.n_refused;
    g->list = list;
    struct local_outcome o =
        local_run(&g->a, list,
                  &(struct local_props){.grouped = g->grouped, .probe = on_step, .probe_arg = g});
    CHECK_SAY(o.code == 0, "action %d: %s", o.failed, o.text);
    g->a.store.fail = g->refuse;
    wait_gone(g);
    mem_fail_after(0);
    g->a.store.fail = false;
    CHECK(g->a.store.n_refused == refused + g->refuse);
    check_members(g);
    if (g->grouped)
        check_order(g);
    co_mutex_lock(&g->writing);
    check_bitmaps(g);
    co_mutex_unlock(&g->writing);
    sim_clear_faults(g->a.w->disk);
    json_decref(list);
}

/* ------------------------------------------------------------------ the scenario */

static void group_prepare(struct world *w, struct sim_config *cfg)
{
    (void)w;
    cfg->latency_ns = 200000;
}

static co_fn void set_up(struct group_state *g, struct world *w)
{
    static const char *const nodes[] = {"d", "e", "f"}, *const names[] = {"p", "q", "r", "s"};
    local_open(&g->a, w, w->inst, "a");
    ref_init(&g->ref);
    for (unsigned i = 0; i < 12; i++) {
        json_t *a = bitmap_action("add", nodes[i / 4], names[i % 4]);
        json_t *data = json_object_get(a, "data");
        json_object_set_new(data, "granularity",
                            json_integer(1 << (9 + chance_below(&w->chance, 10))));
        CHECK(!local_command(&g->a, "block-dirty-bitmap-add", json_incref(data)));
        CHECK(ref_play(&g->ref, a));
        json_decref(a);
    }
    g->writing = (struct co_mutex)CO_MUTEX_INIT;
    g->a.on_event = on_event;
    g->a.on_event_arg = g;
    g->a.store.yields = 2;
}

static co_fn void group_live(struct world *w)
{
    struct group_state *g = w->state;
    set_up(g, w);
    co_group_add(&g->gone, 2);
    CHECK(loop_spawn(io_loop(w->io, 0), writer_main, g) == 0);
    CHECK(loop_spawn(io_loop(w->io, 0), observer_main, g) == 0);
    for (; g->round < ROUNDS; g->round++)
        one_round(g);
    g->stop_writing = true;
    io_event_set(&g->end_is_near);
    co_group_wait(&g->gone);
    g->a.on_event = NULL;
    local_reset(&g->a);
    local_close(&g->a);
}

static void group_finish(struct world *w)
{
    (void)w;
}

/* Over all seeds nothing was left out. */
static void group_told(void)
{
    for (unsigned i = 0; i < MAX_MEMBERS; i++) {
        for (unsigned p = 0; p < N_POINTS; p++)
            for (enum blow b = CANCEL; b < TARGET_ERROR; b++)
                CHECK_SAY(n_struck[b][p][i], "blow %d never met member %u %s", b, i,
                          points[p].heard);
        CHECK_SAY(n_struck[TARGET_ERROR][0][i], "no target of member %u has failed", i);
        for (unsigned grouped = i == 0; grouped < 2; grouped++)
            for (unsigned well = 0; well < 2; well++)
                CHECK_SAY(n_rounds[grouped][i][well], "no round of %u jobs, %s, went %s", i + 1,
                          grouped ? "grouped" : "not grouped", well ? "well" : "wrong");
    }
    CHECK(n_refused && n_starved);
    CHECK_SAY(n_looks > 1000, "the observer looked %u times", n_looks);
}

static const struct scenario groups = {
    .name = "groups",
    .state_size = sizeof(struct group_state),
    .n_seeds = 400,
    .prepare = group_prepare,
    .live = group_live,
    .finish = group_finish,
    .told = group_told,
};

int main(void)
{
    const struct scenario *all[] = {&groups};
    return scenario_main(all, 1);
}
