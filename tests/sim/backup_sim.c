/* SPDX-License-Identifier: Apache-2.0 */
/* Backups under load, with faults. Guests write to one or two disks all the time; round after round
 * their backups are begun in one transaction, alone or as a group, full or by bitmap, with every
 * error policy; the control client pauses, resumes, slows and cancels them; reads of the source and
 * anything of the target fail or hang.
 *
 * Whatever happens: a backup that ends well is the disk as it was when the transaction took effect,
 * and is durable when the client hears of it; a bitmap holds afterwards what the contract's table
 * of outcomes says, so that the next incremental backup is whole again, however many failed before
 * it; and no guest notices a target that fails or hangs. */
#include "list.h"

#include <errno.h>
#include <string.h>

#define MAX_SETS 2u
#define UNIT 65536u /* what backups copy at a time */
#define GUEST_LIMIT SECOND

struct way {
    const char *sync;
    enum mode mode;
};

/* A disk with its bitmap and its target. */
struct set {
    unsigned disk;
    struct bits *b;
    char target[16], bitmap[16];
    bool synced;         /* target and bitmap stand for a backup: an incremental one may follow */
    bool sure;           /* the target is the disk between ticks q and r, durably */
    bool flush_fails;    /* a fault that is planned for this round */
    bool target_is_lost; /* a flush may have failed: it has to be opened again */
    struct way way;
    uint64_t q, r;
    char id[16];
    uint8_t *may; /* what the bitmap could hold when the job took it */
    bool active, paused, good;
};

struct backup_state {
    struct crowd crowd;
    struct book book;
    struct set set[MAX_SETS];
    unsigned n_sets, n_disks, n_jobs;
    bool grouped, source_faults, all_must_end_well;
    unsigned n_good, n_failed, n_cancelled;
};

static struct backup_state *state_of(struct world *w)
{
    return w->state;
}

/* ------------------------------------------------------------------ setting up */

static void backup_prepare(struct world *w, struct sim_config *cfg)
{
    struct backup_state *t = state_of(w);
    struct chance *dice = &w->chance;
    static const unsigned stripes[] = {1, 3, 8, 40, 300};
    t->crowd.w = w;
    t->book.crowd = &t->crowd;
    t->n_sets = 1 + (unsigned)chance_below(dice, MAX_SETS);
    t->source_faults = chance_one_in(dice, 4);
    cfg->direct_align = chance_one_in(dice, 2) ? 4096 : 512;
    t->n_disks = chance_one_in(dice, 3) ? 1 : t->n_sets; /* else both are of one disk */
    for (unsigned i = 0; i < t->n_disks; i++) {
        char node[16], file[16];
        uint64_t size = SECTOR * (400 + chance_below(dice, 5000));
        snprintf(node, sizeof node, "d%u", i);
        snprintf(file, sizeof file, "f%u", i);
        struct disk *d = crowd_add_disk(&t->crowd, node, file, size);
        d->stripe = stripes[chance_below(dice, 5)];
        d->unmap = chance_one_in(dice, 2);
        d->direct = chance_one_in(dice, 4);
        d->may_fail = t->source_faults; /* guests read it too */
        d->limit_ns = t->source_faults ? 0 : GUEST_LIMIT;
    }
    for (unsigned i = 0; i < t->n_sets; i++) {
        struct set *s = &t->set[i];
        s->disk = i % t->n_disks;
        snprintf(s->target, sizeof s->target, "t%u", i);
        snprintf(s->bitmap, sizeof s->bitmap, "b%u", i);
        CHECK(sim_file_write(w->disk, s->target, "", 1, t->crowd.disk[s->disk].size - 1) == 0);
    }
}

static co_fn void open_target(struct backup_state *t, struct set *s)
{
    struct chance *dice = &t->crowd.w->chance;
    world_add_file(t->crowd.w, s->target, s->target,
                   chance_one_in(dice, 4) ? ",\"discard\":\"unmap\",\"cache\":{\"direct\":true}"
                                          : "");
}

static co_fn void set_up(struct world *w)
{
    struct backup_state *t = state_of(w);
    world_start_nbd(w);
    for (unsigned i = 0; i < t->n_disks; i++)
        crowd_open_disk(&t->crowd, i, 1 + (unsigned)chance_below(&w->chance, 4));
    for (unsigned i = 0; i < t->n_sets; i++) {
        struct set *s = &t->set[i];
        open_target(t, s);
        s->b = book_place(&t->book, s->disk, s->bitmap);
        s->may = calloc(1, t->crowd.disk[s->disk].size / SECTOR + 1);
        CHECK(s->may);
    }
    for (unsigned i = 0; i < t->crowd.n_guests; i++) /* whose time is long here */
        t->crowd.guest[i].think_ns *= 1 + chance_below(&w->chance, 50);
    crowd_start(&t->crowd);
}

/* ------------------------------------------------------------------ faults */

static void plan_target_fault(struct backup_state *t, struct set *s)
{
    struct chance *dice = &t->crowd.w->chance;
    static const enum sim_kind kinds[] = {SIM_WRITE, SIM_WRITE, SIM_COPY,
                                          SIM_ZERO,  SIM_FSYNC, SIM_FSYNC};
    enum sim_kind kind = kinds[chance_below(dice, 6)];
    unsigned nth = 1 + (unsigned)chance_below(dice, 6);
    uint64_t what = chance_below(dice, 5);
    if (kind == SIM_FSYNC)
        nth = 1;
    if (what < 2)
        sim_stall(t->crowd.w->disk, s->target, kind, nth, SECOND * (1 + chance_below(dice, 20)),
                  chance_one_in(dice, 8));
    else
        sim_fail(t->crowd.w->disk, s->target, kind, nth, what == 2 ? ENOSPC : EIO,
                 chance_one_in(dice, 2));
    s->flush_fails = kind == SIM_FSYNC && what >= 2;
}

static void plan_source_fault(struct backup_state *t, struct set *s)
{
    struct chance *dice = &t->crowd.w->chance;
    const char *file = t->crowd.disk[s->disk].file;
    unsigned nth = 1 + (unsigned)chance_below(dice, 8);
    if (chance_one_in(dice, 3))
        sim_stall(t->crowd.w->disk, file, SIM_READ, nth, SECOND * (1 + chance_below(dice, 10)),
                  false);
    else
        sim_fail(t->crowd.w->disk, file, SIM_READ, nth, EIO, chance_one_in(dice, 2));
}

static void plan_faults(struct backup_state *t)
{
    struct chance *dice = &t->crowd.w->chance;
    for (unsigned i = 0; i < t->n_sets; i++) {
        if (chance_one_in(dice, 2))
            plan_target_fault(t, &t->set[i]);
        if (t->source_faults && chance_one_in(dice, 2))
            plan_source_fault(t, &t->set[i]);
    }
}

/* ------------------------------------------------------------------ beginning */

static struct way pick_way(struct backup_state *t, const struct set *s)
{
    static const struct way ways[] = {{"incremental", ON_SUCCESS}, {"bitmap", ON_SUCCESS},
                                      {"bitmap", ALWAYS},          {"bitmap", NEVER},
                                      {"full", ON_SUCCESS},        {"full", ALWAYS},
                                      {"top", ON_SUCCESS},         {"full", NO_BITMAP}};
    struct chance *dice = &t->crowd.w->chance;
    if (!s->synced)
        return ways[4 + chance_below(dice, 3)]; /* everything, and the bitmap begins to count */
    return ways[chance_below(dice, 3) ? chance_below(dice, 4) : chance_below(dice, 8)];
}

static int say_backup(struct backup_state *t, const struct set *s, char *p, size_t len)
{
    static const char *const modes[] = {"", "on-success", "never", "always"};
    static const char *const policies[] = {"report", "ignore", "enospc", "stop", "auto"};
    struct chance *dice = &t->crowd.w->chance;
    int n = snprintf(
        p, len,
        "{\"type\":\"blockdev-backup\",\"data\":{\"job-id\":\"%s\",\"device\":\"d%u\",\"target\":"
        "\"%s\",\"sync\":\"%s\",\"on-source-error\":\"%s\",\"on-target-error\":\"%s\"",
        s->id, s->disk, s->target, s->way.sync, policies[chance_below(dice, 5)],
        policies[chance_below(dice, 5)]);
    if (s->way.mode)
        n += snprintf(p + n, len - (size_t)n, ",\"bitmap\":\"%s\"", s->bitmap);
    if (s->way.mode && strcmp(s->way.sync, "incremental"))
        n += snprintf(p + n, len - (size_t)n, ",\"bitmap-mode\":\"%s\"", modes[s->way.mode]);
    if (chance_one_in(dice, 2))
        n += snprintf(p + n, len - (size_t)n, ",\"speed\":%u", 1u << (17 + chance_below(dice, 5)));
    n += snprintf(p + n, len - (size_t)n,
                  ",\"x-perf\":{\"max-workers\":%u,\"max-chunk\":%u,\"use-copy-range\":%s}}}",
                  1 + (unsigned)chance_below(dice, 8), UNIT << chance_below(dice, 4),
                  chance_one_in(dice, 3) ? "true" : "false");
    return n;
}

static int say_add(const struct set *s, unsigned shift, char *p, size_t len)
{
    return snprintf(
        p, len,
        "{\"type\":\"block-dirty-bitmap-add\",\"data\":{\"node\":\"d%u\",\"name\":\"%s\","
        "\"granularity\":%u}},",
        s->disk, s->bitmap, 1u << shift);
}

/* Now the job has the bitmap: remember what it may hold. */
static void begun(struct backup_state *t, struct set *s, unsigned shift, uint64_t q, uint64_t r)
{
    uint8_t *must, *may;
    if (!s->b->exists)
        bits_add(&t->book, s->b, shift, true, q, r);
    bits_look(&t->book, s->b, q, r, &must, &may);
    memcpy(s->may, may, s->b->n);
    free(must);
    free(may);
    s->q = q;
    s->r = r;
    s->active = true;
    s->paused = false;
    s->b->job = s->way.mode ? 1 : 0;
}

/* False: a read of a guest hangs, and the transaction did not wait for it. */
static co_fn bool try_begin(struct backup_state *t)
{
    struct qmp *q = &t->crowd.w->qmp;
    struct chance *dice = &t->crowd.w->chance;
    char text[2400];
    unsigned shift = 9 + (unsigned)chance_below(dice, 10);
    bool hold = chance_one_in(dice, 3);
    int n = snprintf(text, sizeof text, "{\"actions\":[");
    t->grouped = chance_one_in(dice, 2);
    for (unsigned i = 0; i < t->n_sets; i++) {
        struct set *s = &t->set[i];
        s->way = pick_way(t, s);
        s->sure = false;
        snprintf(s->id, sizeof s->id, "j%u", t->n_jobs++ % QMP_MAX_JOBS);
        if (!s->b->exists)
            n += say_add(s, shift, text + n, sizeof text - (size_t)n);
        n += say_backup(t, s, text + n, sizeof text - (size_t)n);
        text[n++] = i + 1 < t->n_sets ? ',' : ']';
    }
    snprintf(text + n, sizeof text - (size_t)n, "%s}",
             t->grouped ? ",\"properties\":{\"completion-mode\":\"grouped\"}" : "");
    if (hold)
        crowd_hold(&t->crowd);
    json_t *v = qmp_call(q, "transaction", "%s", text);
    bool late = qmp_error(v) && strstr(qmp_error(v), "did not come to rest");
    CHECK_SAY(late ? t->source_faults : !qmp_error(v), "%s", qmp_error(v));
    json_decref(v);
    if (hold)
        crowd_release(&t->crowd);
    if (late)
        return false;
    for (unsigned i = 0; i < t->n_sets; i++)
        begun(t, &t->set[i], shift, q->asked, q->told);
    return true;
}

/* ------------------------------------------------------------------ the end of a job */

/* Failure with bitmap-mode always: what was not copied stays, in whole copy units. */
static void keep_old(struct backup_state *t, struct set *s)
{
    uint64_t size = t->crowd.disk[s->disk].size;
    unsigned shift = s->b->shift;
    if (strcmp(s->way.sync, "bitmap") || s->flush_fails) { /* nothing is known to be there */
        bits_blur(s->b);
        return;
    }
    for (size_t g = 0; g < s->b->n; g++) {
        uint64_t off = (uint64_t)g << shift, end = MIN(off + (UINT64_C(1) << shift), size);
        if (!s->may[g])
            continue;
        end = MIN(round_up(end, UNIT), round_up(size, UINT64_C(1) << shift));
        for (uint64_t k = round_down(off, UNIT) >> shift; k << shift < end; k++)
            s->b->may[k] = 1;
    }
}

/* It is the disk as it was; and would be, were the power to go now. */
static void check_target(struct backup_state *t, struct set *s)
{
    crowd_check_file(&t->crowd, t->crowd.w->disk, s->disk, s->target, s->q, s->r, s->id);
    struct sim_world *copy = crowd_cut_copy(&t->crowd);
    crowd_check_file(&t->crowd, copy, s->disk, s->target, s->q, s->r, "a good backup after a cut");
    sim_world_free(copy);
}

static void note_outcome(struct backup_state *t, struct set *s, const struct job_news *news)
{
    s->active = false;
    s->good = news->completed && !news->error[0];
    s->b->job = 0;
    CHECK(news->completed != news->cancelled);
    s->good ? t->n_good++ : news->cancelled ? t->n_cancelled++ : t->n_failed++;
    s->target_is_lost = s->flush_fails && !s->good;
    CHECK(s->flush_fails || !strstr(news->error, "flushing"));
    if (s->good) {
        check_target(t, s);
        s->sure = true;
        s->synced |= s->way.mode != NO_BITMAP;
    }
    if (s->way.mode == NO_BITMAP || s->way.mode == NEVER)
        return;
    if (!s->good && s->way.mode != ALWAYS)
        return; /* folded back */
    bits_clear(s->b, s->q, s->r);
    if (!s->good)
        keep_old(t, s);
    if (!strcmp(s->way.sync, "full"))
        s->synced = true; /* what was not copied is in the bitmap now */
}

static void settle_ended(struct backup_state *t)
{
    for (unsigned i = 0; i < t->n_sets; i++) {
        struct set *s = &t->set[i];
        struct job_news *news = qmp_job(&t->crowd.w->qmp, s->id);
        if (s->active && news && !strcmp(news->status, "null"))
            note_outcome(t, s, news);
    }
}

static bool any_active(const struct backup_state *t)
{
    bool any = false;
    for (unsigned i = 0; i < t->n_sets; i++)
        any |= t->set[i].active;
    return any;
}

/* ------------------------------------------------------------------ while jobs run */

static co_fn void verb(struct backup_state *t, struct set *s, const char *name, const char *args)
{
    struct qmp *q = &t->crowd.w->qmp;
    json_t *v = qmp_call(q, name, "%s", args);
    if (!qmp_error(v) && !strcmp(name, "job-pause"))
        s->paused = true;
    if (!qmp_error(v) && !strcmp(name, "job-resume"))
        s->paused = false;
    json_decref(v);
}

static co_fn void random_verb(struct backup_state *t, struct set *s)
{
    struct chance *dice = &t->crowd.w->chance;
    char by_id[40], speed[80];
    snprintf(by_id, sizeof by_id, "{\"id\":\"%s\"}", s->id);
    snprintf(speed, sizeof speed, "{\"device\":\"%s\",\"speed\":%u}", s->id,
             chance_one_in(dice, 2) ? 0 : 1u << (16 + chance_below(dice, 6)));
    switch (chance_below(dice, 8)) {
    case 0:
        if (!t->all_must_end_well)
            verb(t, s, "job-cancel", by_id);
        break;
    case 1:
    case 2:
        verb(t, s, "job-pause", by_id);
        break;
    case 3:
    case 4:
    case 5:
        verb(t, s, "job-resume", by_id);
        break;
    default:
        verb(t, s, "block-job-set-speed", speed);
        break;
    }
}

/* No fault from now on, and nothing that holds a job up. */
static co_fn void let_go(struct backup_state *t)
{
    char args[80];
    sim_clear_faults(t->crowd.w->disk);
    for (unsigned i = 0; i < t->n_sets; i++) {
        struct set *s = &t->set[i];
        if (!s->active)
            continue;
        snprintf(args, sizeof args, "{\"device\":\"%s\",\"speed\":0}", s->id);
        verb(t, s, "block-job-set-speed", args);
        snprintf(args, sizeof args, "{\"id\":\"%s\"}", s->id);
        verb(t, s, "job-resume", args);
    }
}

static co_fn void see_through(struct backup_state *t)
{
    struct chance *dice = &t->crowd.w->chance;
    struct qmp *q = &t->crowd.w->qmp;
    for (unsigned n = (unsigned)chance_below(dice, 30); n && any_active(t); n--) {
        qmp_listen(q, chance_one_in(dice, 10) ? chance_below(dice, 8 * SECOND)
                                              : chance_below(dice, SECOND / 4));
        settle_ended(t);
        struct set *s = &t->set[chance_below(dice, t->n_sets)];
        if (s->active && chance_one_in(dice, 3))
            random_verb(t, s);
    }
    while (any_active(t)) { /* an error may pause a job at any time */
        let_go(t);
        qmp_listen(q, SECOND);
        settle_ended(t);
    }
    sim_clear_faults(t->crowd.w->disk);
}

static co_fn void check_outcomes(struct backup_state *t)
{
    bool same = true;
    for (unsigned i = 0; i < t->n_sets; i++) {
        struct set *s = &t->set[i];
        same &= s->good == t->set[0].good;
        CHECK(!t->all_must_end_well || s->good);
        if (s->target_is_lost) {
            qmp_do(&t->crowd.w->qmp, "blockdev-del", "{\"node-name\":\"%s\"}", s->target);
            open_target(t, s);
            s->target_is_lost = false;
        }
        s->flush_fails = false;
    }
    CHECK(same || !t->grouped); /* L7 */
    for (unsigned i = 0; i < t->n_sets; i++)
        bits_check(&t->book, t->set[i].b, &t->crowd.w->qmp,
                   t->set[i].good ? "after success" : "after failure");
}

static co_fn void one_round(struct backup_state *t)
{
    if (chance_one_in(&t->crowd.w->chance, 2))
        qmp_listen(&t->crowd.w->qmp, chance_below(&t->crowd.w->chance, SECOND / 10));
    if (!t->all_must_end_well)
        plan_faults(t);
    while (!try_begin(t))
        ;
    see_through(t);
    check_outcomes(t);
    crowd_check_cut_now(&t->crowd);
}

static co_fn void backup_live(struct world *w)
{
    struct backup_state *t = state_of(w);
    set_up(w);
    unsigned rounds = 1 + (unsigned)chance_below(&w->chance, 6);
    for (unsigned i = 0; i < rounds; i++)
        one_round(t);
    t->all_must_end_well = true; /* twice: a whole one may still be owed, then by bitmap */
    one_round(t);
    one_round(t);
    crowd_end(&t->crowd);
    if (getenv("SIM_QMP"))
        fprintf(stderr, "%u good, %u failed, %u cancelled; worst wait %" PRIu64 " ms\n", t->n_good,
                t->n_failed, t->n_cancelled, t->crowd.disk[0].worst_ns / 1000000);
    for (unsigned i = 0; i < t->n_disks; i++)
        crowd_check_file(&t->crowd, t->crowd.w->disk, i, t->crowd.disk[i].file, w->tick + 1,
                         FOREVER, "at the end");
}

/* What was flushed is there; and so is each target whose backup the client had heard to be good. */
static co_fn void backup_after_cut(struct world *w)
{
    struct backup_state *t = state_of(w);
    world_start_nbd(w);
    for (unsigned i = 0; i < t->n_sets; i++) {
        struct set *s = &t->set[i];
        if (s->sure)
            crowd_check_file(&t->crowd, w->disk, s->disk, s->target, s->q, s->r, "after the cut");
    }
    crowd_check_after_cut(&t->crowd);
}

static void backup_finish(struct world *w)
{
    struct backup_state *t = state_of(w);
    for (unsigned i = 0; i < t->n_sets; i++)
        free(t->set[i].may);
    book_free(&t->book);
    crowd_free(&t->crowd);
}

static const struct scenario backup = {
    .name = "backups",
    .state_size = sizeof(struct backup_state),
    .n_seeds = 120,
    .cut_one_in = 5,
    .cut_steps = 20000,
    .prepare = backup_prepare,
    .live = backup_live,
    .after_cut = backup_after_cut,
    .finish = backup_finish,
};

int main(void)
{
    const struct scenario *all[] = {&backup};
    return scenario_main(all, 1);
}
