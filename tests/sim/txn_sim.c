/* SPDX-License-Identifier: Apache-2.0 */
/* Transactions under load. Guests write to two disks all the time; the control client runs random
 * lists of actions, good ones and failing ones, plain commands and job verbs; a second client asks
 * and sends commands of its own in between. A model played one list after the other says which
 * action has to fail and what every bitmap must and may contain.
 *
 * Bitmaps of a disk: `all` records from the beginning and is never touched. `ra`, `rb` and `acc`
 * are a relay: lists move the recording from one of the two to the other and pour into acc, so that
 * at any time one of ra and rb records and no write is in none of the three (law L5). x0..x2 are
 * anybody's. `y` is the second client's. */
#include "list.h"

#include <string.h>

#define N_DISKS 2u
#define N_X 3u
#define MAX_JOBS 40u

struct tjob {
    char id[16];
    unsigned disk;
    struct bits *b; /* or NULL */
    enum mode mode;
    bool full, active, paused;
    unsigned list; /* number of the list that made it, for groups; 0 = alone */
    bool good;
    uint64_t q, r;
};

struct side { /* the second client */
    struct world *w;
    struct qmp qmp;
    struct co_mutex turn;
    bool stop;
    struct co_group gone;
    bool has_y[N_DISKS];
    unsigned n_asked;
};

struct txn_state {
    struct crowd crowd;
    struct book book, copy;
    struct tjob job[MAX_JOBS];
    unsigned n_jobs, n_lists;
    struct side side;
    bool stalls;
    unsigned n_good, n_bad, n_late;
};

static struct txn_state *state_of(struct world *w)
{
    return w->state;
}

/* ------------------------------------------------------------------ setting up */

static void txn_prepare(struct world *w, struct sim_config *cfg)
{
    struct txn_state *t = state_of(w);
    struct chance *dice = &w->chance;
    static const unsigned stripes[] = {1, 3, 8, 40, 300};
    uint64_t size = SECTOR * (200 + chance_below(dice, 3000));
    t->crowd.w = w;
    t->book.crowd = t->copy.crowd = &t->crowd;
    t->stalls = chance_one_in(dice, 5);
    cfg->stall_in = t->stalls ? 300 : 0;
    cfg->stall_ns = SECOND * (1 + chance_below(dice, 6));
    cfg->write_error_in = chance_one_in(dice, 4) ? 100 : 0;
    cfg->direct_align = chance_one_in(dice, 2) ? 4096 : 512;
    for (unsigned i = 0; i < N_DISKS; i++) {
        char node[8], file[8], target[8];
        snprintf(node, sizeof node, "d%u", i);
        snprintf(file, sizeof file, "f%u", i);
        snprintf(target, sizeof target, "t%u", i);
        if (i && chance_one_in(dice, 2))
            size = SECTOR * (200 + chance_below(dice, 3000));
        struct disk *d = crowd_add_disk(&t->crowd, node, file, size);
        CHECK(sim_file_write(w->disk, target, "", 1, size - 1) == 0);
        d->stripe = stripes[chance_below(dice, 5)];
        d->unmap = chance_one_in(dice, 2);
        d->direct = chance_one_in(dice, 3);
        d->may_fail = cfg->write_error_in;
    }
}

static void send_add(struct qmp *q, struct book *k, struct bits *b, unsigned shift, bool disabled)
{
    qmp_do(q, "block-dirty-bitmap-add",
           "{\"node\":\"%s\",\"name\":\"%s\",\"granularity\":%u,\"disabled\":%s}", b->node, b->name,
           1u << shift, disabled ? "true" : "false");
    bits_add(k, b, shift, !disabled, q->asked, q->told);
}

static co_fn void set_up(struct world *w)
{
    struct txn_state *t = state_of(w);
    char name[8];
    world_start_nbd(w);
    for (unsigned i = 0; i < N_DISKS; i++) {
        crowd_open_disk(&t->crowd, i, 1 + (unsigned)chance_below(&w->chance, 3));
        snprintf(name, sizeof name, "t%u", i);
        world_add_file(w, name, name, "");
        send_add(&w->qmp, &t->book, book_place(&t->book, i, "all"), 9, false);
        send_add(&w->qmp, &t->book, book_place(&t->book, i, "ra"), 12, false);
        send_add(&w->qmp, &t->book, book_place(&t->book, i, "rb"), 12, true);
        send_add(&w->qmp, &t->book, book_place(&t->book, i, "acc"), 12, true);
        for (unsigned x = 0; x < N_X; x++) {
            snprintf(name, sizeof name, "x%u", x);
            book_place(&t->book, i, name);
        }
    }
    crowd_start(&t->crowd);
}

/* ------------------------------------------------------------------ jobs */

static struct verdict play(struct txn_state *t, const struct list *l, uint64_t q, uint64_t r)
{
    struct play p = {.copy = &t->copy, .book = &t->book, .q = q, .r = r};
    for (unsigned i = 0; i < t->n_jobs; i++)
        if (t->job[i].active)
            p.target_job[t->job[i].disk] = (int)i + 1;
    return list_play(l, &p);
}

static void begin_jobs(struct txn_state *t, const struct list *l, uint64_t q, uint64_t r)
{
    t->n_lists++;
    for (unsigned i = 0; i < l->n; i++) {
        const struct op *o = &l->op[i];
        if (o->kind != BACKUP)
            continue;
        CHECK(o->job < MAX_JOBS);
        struct tjob *j = &t->job[o->job];
        *j = (struct tjob){.disk = o->disk,
                           .b = o->b,
                           .mode = o->mode,
                           .full = !strcmp(o->sync, "full"),
                           .active = true,
                           .list = l->grouped ? t->n_lists : 0,
                           .q = q,
                           .r = r};
        snprintf(j->id, sizeof j->id, "j%u", o->job);
        if (o->b)
            o->b->job = (int)o->job + 1;
    }
}

/* The job is gone: contract 7.2. */
static void settle(struct txn_state *t, struct tjob *j, const struct job_news *news)
{
    struct bits *b = j->b;
    j->active = false;
    j->good = news->completed && !news->error[0];
    CHECK(news->completed != news->cancelled);
    if (j->good && j->full)
        crowd_check_file(&t->crowd, t->crowd.w->disk, j->disk, j->disk ? "t1" : "t0", j->q, j->r,
                         j->id);
    for (unsigned i = 0; i < t->n_jobs; i++) { /* L7 */
        struct tjob *o = &t->job[i];
        CHECK(!j->list || o->list != j->list || o->active || o->good == j->good);
    }
    if (!b)
        return;
    b->job = 0;
    if (j->mode == NEVER || (!j->good && j->mode != ALWAYS))
        return; /* folded back: as if nothing had been */
    bits_clear(b, j->q, j->r);
    if (!j->good)
        bits_blur(b); /* and what was not copied */
}

static void settle_ended(struct txn_state *t)
{
    struct qmp *q = &t->crowd.w->qmp;
    for (unsigned i = 0; i < t->n_jobs; i++) {
        struct job_news *news = qmp_job(q, t->job[i].id);
        if (t->job[i].active && news && !strcmp(news->status, "null"))
            settle(t, &t->job[i], news);
    }
}

static co_fn void settle_all(struct txn_state *t)
{
    struct qmp *q = &t->crowd.w->qmp;
    for (unsigned i = 0; i < t->n_jobs; i++) { /* a group ends together: first let all of them go */
        struct tjob *j = &t->job[i];
        if (!j->active)
            continue;
        json_decref(qmp_call(q, "block-job-set-speed", "{\"device\":\"%s\",\"speed\":0}", j->id));
        if (j->paused)
            json_decref(qmp_call(q, "job-resume", "{\"id\":\"%s\"}", j->id));
    }
    for (unsigned i = 0; i < t->n_jobs; i++) {
        if (t->job[i].active) {
            qmp_wait_job(q, t->job[i].id, "null");
            settle_ended(t);
        }
    }
}

static co_fn void job_verb(struct txn_state *t)
{
    struct qmp *q = &t->crowd.w->qmp;
    struct chance *dice = &t->crowd.w->chance;
    if (!t->n_jobs)
        return;
    struct tjob *j = &t->job[t->n_jobs - 1 - chance_below(dice, MIN(t->n_jobs, 3u))];
    static const char *const verbs[] = {"job-cancel", "job-pause", "job-resume"};
    const char *verb = verbs[chance_below(dice, 3)];
    if (!j->active)
        return;
    json_t *v = qmp_call(q, verb, "{\"id\":\"%s\"}", j->id);
    if (!qmp_error(v) && !strcmp(verb, "job-pause"))
        j->paused = true;
    if (!qmp_error(v) && !strcmp(verb, "job-resume"))
        j->paused = false;
    json_decref(v);
    settle_ended(t);
}

/* ------------------------------------------------------------------ running a list */

static int failed_index(json_t *v)
{
    json_t *data = json_object_get(json_object_get(v, "error"), "data");
    if (!qmp_error(v))
        return -1;
    CHECK_SAY(data, "a list failed without saying where: %s", qmp_error(v));
    CHECK(json_is_true(json_object_get(data, "undone")));
    return (int)json_integer_value(json_object_get(data, "action"));
}

/* True: it took effect. */
static co_fn bool run_list(struct txn_state *t, const struct list *l)
{
    struct qmp *q = &t->crowd.w->qmp;
    char *text = list_text(l);
    json_t *v = qmp_call(q, "transaction", "%s", text);
    uint64_t asked = q->asked, told = q->told;
    if (qmp_error(v) && t->stalls && strstr(qmp_error(v), "did not come to rest")) {
        t->n_late++;
        json_decref(v);
        free(text);
        return false;
    }
    int got = failed_index(v);
    for (;;) {
        struct verdict say = play(t, l, asked, told);
        if (say.failed == got)
            break;
        CHECK_SAY(say.because_of >= 0, "action %d should fail, and %d did: %s\n%s", say.failed, got,
                  qmp_error(v) ? qmp_error(v) : "none", text);
        struct tjob *j = &t->job[say.because_of];
        qmp_wait_job(q, j->id, "null"); /* it had ended before */
        settle_ended(t);
        CHECK(!j->active);
    }
    if (got < 0) {
        book_copy(&t->book, &t->copy);
        begin_jobs(t, l, asked, told);
    }
    got < 0 ? t->n_good++ : t->n_bad++;
    json_decref(v);
    free(text);
    return got < 0;
}

/* ------------------------------------------------------------------ random lists */

static struct bits *any_x(struct txn_state *t, unsigned disk)
{
    char name[8];
    snprintf(name, sizeof name, "x%u", (unsigned)chance_below(&t->crowd.w->chance, N_X));
    return book_find(&t->book, disk ? "d1" : "d0", name);
}

static void random_backup(struct txn_state *t, struct op *o)
{
    struct chance *dice = &t->crowd.w->chance;
    static const struct {
        const char *sync;
        enum mode mode;
    } ways[] = {{"full", NO_BITMAP}, {"incremental", ON_SUCCESS}, {"bitmap", NEVER},
                {"bitmap", ALWAYS},  {"full", ON_SUCCESS},        {"bitmap", ON_SUCCESS}};
    unsigned way = (unsigned)chance_below(dice, 6);
    o->sync = ways[way].sync;
    o->mode = ways[way].mode;
    o->b = o->mode ? any_x(t, o->disk) : NULL;
    o->job = t->n_jobs++;
    o->shift = chance_one_in(dice, 2) ? 16 + (unsigned)chance_below(dice, 6) : 0;
}

static void random_op(struct txn_state *t, struct op *o)
{
    struct chance *dice = &t->crowd.w->chance;
    unsigned disk = (unsigned)chance_below(dice, N_DISKS);
    *o = (struct op){.disk = disk, .b = any_x(t, disk)};
    uint64_t k = chance_below(dice, 30);
    o->kind = k < 6    ? ADD
              : k < 8  ? REMOVE
              : k < 12 ? CLEAR
              : k < 16 ? ENABLE
              : k < 19 ? DISABLE
              : k < 26 ? MERGE
              : k < 29 ? BACKUP
                       : ABORT;
    o->shift = 9 + (unsigned)chance_below(dice, 10);
    o->disabled = chance_one_in(dice, 3);
    if (o->kind == BACKUP && t->n_jobs == MAX_JOBS)
        o->kind = ABORT;
    if (o->kind == BACKUP)
        random_backup(t, o);
    if (o->kind == MERGE) {
        o->n_sources = (unsigned)chance_below(dice, MAX_SOURCES + 1);
        for (unsigned i = 0; i < o->n_sources; i++)
            o->source[i] =
                chance_one_in(dice, 2)
                    ? any_x(t, chance_one_in(dice, 4) ? 1 - disk : disk)
                    : book_find(&t->book, o->b->node, chance_one_in(dice, 2) ? "all" : "ra");
    }
}

/* A list of random actions mostly fails early; so try each action on the model and keep most of the
 * bad ones out. */
static void random_list(struct txn_state *t, struct list *l)
{
    struct chance *dice = &t->crowd.w->chance;
    unsigned want = 1 + (unsigned)chance_below(dice, 8);
    *l = (struct list){.grouped = chance_one_in(dice, 3)};
    for (unsigned tries = 0; l->n < want && tries < 40; tries++) {
        unsigned jobs = t->n_jobs;
        random_op(t, &l->op[l->n++]);
        if (!chance_one_in(dice, 30) && play(t, l, FOREVER - 1, FOREVER - 1).failed >= 0) {
            l->n--;
            t->n_jobs = jobs;
        }
    }
}

/* Hand the recording over, pour what was recorded into acc; in the ways the laws allow. */
static void relay_list(struct txn_state *t, struct list *l)
{
    struct chance *dice = &t->crowd.w->chance;
    const char *node = chance_one_in(dice, 2) ? "d0" : "d1";
    struct bits *a = book_find(&t->book, node, "ra"), *b = book_find(&t->book, node, "rb");
    struct bits *acc = book_find(&t->book, node, "acc");
    struct bits *on = a->enabled ? a : b, *off = a->enabled ? b : a;
    bool first = chance_one_in(dice, 2), pour = chance_one_in(dice, 2),
         fresh = chance_one_in(dice, 3);
    *l = (struct list){0};
    if (fresh) {
        list_insert(l, l->n, (struct op){.kind = MERGE, .b = acc, .source = {off}, .n_sources = 1});
        list_insert(l, l->n, (struct op){.kind = REMOVE, .b = off});
        list_insert(
            l, l->n,
            (struct op){.kind = ADD, .b = off, .shift = 12, .disabled = chance_one_in(dice, 2)});
    }
    if (first)
        list_insert(l, l->n, (struct op){.kind = DISABLE, .b = on});
    list_insert(l, l->n, (struct op){.kind = ENABLE, .b = off});
    if (!first)
        list_insert(l, l->n, (struct op){.kind = DISABLE, .b = on});
    if (pour) {
        list_insert(l, l->n, (struct op){.kind = MERGE, .b = acc, .source = {on}, .n_sources = 1});
        list_insert(l, l->n, (struct op){.kind = CLEAR, .b = on});
    }
    if (chance_one_in(dice, 3))
        list_insert(l, (unsigned)chance_below(dice, l->n + 1), (struct op){.kind = ABORT});
}

static co_fn void plain_command(struct txn_state *t)
{
    static const char *const words[] = {"add", "remove", "clear", "enable", "disable"};
    struct list l = {.n = 1};
    struct qmp *q = &t->crowd.w->qmp;
    do
        random_op(t, &l.op[0]);
    while (l.op[0].kind > DISABLE && l.op[0].kind != ABORT);
    struct op *o = &l.op[0];
    if (o->kind == ABORT || o->b->job)
        return;
    char command[48], more[64] = "";
    snprintf(command, sizeof command, "block-dirty-bitmap-%s", words[o->kind]);
    if (o->kind == ADD)
        snprintf(more, sizeof more, ",\"granularity\":%u,\"disabled\":%s", 1u << o->shift,
                 o->disabled ? "true" : "false");
    json_t *v =
        qmp_call(q, command, "{\"node\":\"%s\",\"name\":\"%s\"%s}", o->b->node, o->b->name, more);
    if (qmp_error(v) && t->stalls && strstr(qmp_error(v), "did not come to rest")) {
        json_decref(v);
        return;
    }
    struct verdict say = play(t, &l, q->asked, q->told);
    CHECK((say.failed < 0) == !qmp_error(v));
    if (say.failed < 0)
        book_copy(&t->book, &t->copy);
    json_decref(v);
}

/* ------------------------------------------------------------------ L2, L3: an aborted list leaves
 * no trace */

static co_fn json_t *whole_state(struct txn_state *t)
{
    struct qmp *q = &t->crowd.w->qmp;
    json_t *all = json_array(), *nodes = qmp_get(q, "query-named-block-nodes", NULL), *node, *bm;
    size_t i, k;
    json_array_append_new(all, qmp_get(q, "query-jobs", NULL));
    json_array_append_new(all, qmp_get(q, "query-block-jobs", NULL));
    json_array_append_new(all, qmp_get(q, "query-block-exports", NULL));
    json_array_foreach (nodes, i, node) {
        const char *name = json_string_value(json_object_get(node, "node-name"));
        json_array_foreach (json_object_get(node, "dirty-bitmaps"), k, bm)
            json_array_append_new(all, qmp_get(q, "x-debug-block-dirty-bitmap-sha256",
                                               "{\"node\":\"%s\",\"name\":\"%s\"}", name,
                                               json_string_value(json_object_get(bm, "name"))));
    }
    json_array_append_new(all, nodes);
    return all;
}

/* Nothing else moves: guests are held, jobs have ended, the second client waits. */
static co_fn void abort_in_silence(struct txn_state *t)
{
    struct list l;
    settle_all(t);
    random_list(t, &l);
    if (l.n == MAX_OPS)
        l.n--;
    list_insert(&l, (unsigned)chance_below(&t->crowd.w->chance, l.n + 1),
                (struct op){.kind = ABORT});
    crowd_hold(&t->crowd);
    co_mutex_lock(&t->side.turn);
    json_t *before = whole_state(t);
    CHECK(!run_list(t, &l));
    json_t *after = whole_state(t);
    if (!json_equal(before, after)) {
        json_dumpf(before, stderr, 0);
        fputs("\n", stderr);
        json_dumpf(after, stderr, 0);
        CHECK_SAY(false, "\nan aborted list left traces");
    }
    json_decref(before);
    json_decref(after);
    co_mutex_unlock(&t->side.turn);
    crowd_release(&t->crowd);
}

/* ------------------------------------------------------------------ the second client */

/* At any instant exactly one of ra and rb records: no query sees the middle of a list. */
static void check_relay_row(json_t *node)
{
    json_t *bm;
    size_t i;
    unsigned n = 0, relay = 0;
    json_array_foreach (json_object_get(node, "dirty-bitmaps"), i, bm) {
        const char *name = json_string_value(json_object_get(bm, "name"));
        if (!strcmp(name, "ra") || !strcmp(name, "rb")) {
            relay++;
            n += json_is_true(json_object_get(bm, "recording"));
        }
    }
    CHECK_SAY(n == (relay > 0), "a query saw %u of ra and rb recording", n);
}

static co_fn void side_asks(struct side *s)
{
    json_t *v = qmp_get(&s->qmp, "query-named-block-nodes", NULL), *node;
    size_t i;
    json_array_foreach (v, i, node)
        check_relay_row(node);
    json_decref(v);
    json_decref(qmp_get(&s->qmp,
                        chance_one_in(&s->w->chance, 2) ? "query-jobs" : "query-block-jobs", NULL));
}

static co_fn void side_orders(struct side *s)
{
    struct txn_state *t = state_of(s->w);
    unsigned d = (unsigned)chance_below(&s->w->chance, N_DISKS);
    static const char *const words[] = {"clear", "enable", "disable"};
    char command[48];
    snprintf(command, sizeof command, "block-dirty-bitmap-%s",
             !s->has_y[d] ? "add" : words[chance_below(&s->w->chance, 3)]);
    json_t *v = qmp_call(&s->qmp, command, "{\"node\":\"d%u\",\"name\":\"y\"}", d);
    if (qmp_error(v))
        CHECK_SAY(t->stalls && strstr(qmp_error(v), "did not come to rest"), "%s: %s", command,
                  qmp_error(v));
    else
        s->has_y[d] = true;
    json_decref(v);
}

static void side_main(void *arg)
{
    struct side *s = arg;
    qmp_open(&s->qmp, s->w);
    while (!s->stop) {
        io_sleep(chance_below(&s->w->chance, 10000000));
        co_mutex_lock(&s->turn);
        if (chance_one_in(&s->w->chance, 4))
            side_orders(s);
        else
            side_asks(s);
        s->n_asked++;
        co_mutex_unlock(&s->turn);
    }
    qmp_close(&s->qmp);
    co_group_done(&s->gone);
}

/* ------------------------------------------------------------------ the end */

/* Each write that was answered is in one of ra, rb and acc. */
static co_fn void check_relay(struct txn_state *t, unsigned disk)
{
    struct crowd *c = &t->crowd;
    static const char *const names[] = {"ra", "rb", "acc"};
    const char *node = c->disk[disk].node;
    size_t n = book_find(&t->book, node, "ra")->n;
    uint8_t *sum = calloc(1, n), *one = malloc(n);
    CHECK(sum && one);
    for (unsigned i = 0; i < 3; i++) {
        qmp_bits(&c->w->qmp, node, names[i], 12, one, n);
        for (size_t g = 0; g < n; g++)
            sum[g] |= one[g];
    }
    for (size_t i = 0; i < c->n_wr; i++) {
        const struct wr *w = &c->wr[i];
        if (w->disk != disk || !w->marks || w->failed || w->acked == FOREVER)
            continue;
        for (uint64_t g = w->off >> 12; g << 12 < w->off + w->len; g++)
            CHECK_SAY(sum[g],
                      "the write of ticks %" PRIu64 "..%" PRIu64 " at %" PRIu64
                      " of %s is in none of "
                      "ra, rb, acc",
                      w->sent, w->acked, w->off, node);
    }
    free(sum);
    free(one);
}

static co_fn void check_free_bitmaps(struct txn_state *t, const char *when)
{
    for (unsigned i = 0; i < t->book.n; i++)
        if (t->book.b[i].exists && !t->book.b[i].job)
            bits_check(&t->book, &t->book.b[i], &t->crowd.w->qmp, when);
}

static co_fn void one_round(struct txn_state *t)
{
    struct chance *dice = &t->crowd.w->chance;
    struct list l;
    if (chance_one_in(dice, 2))
        qmp_listen(&t->crowd.w->qmp, chance_below(dice, 20000000));
    settle_ended(t);
    uint64_t k = chance_below(dice, 16);
    if (k < 6) {
        random_list(t, &l);
        run_list(t, &l);
    } else if (k < 10) {
        relay_list(t, &l);
        run_list(t, &l);
    } else if (k < 12) {
        plain_command(t);
    } else if (k < 14) {
        job_verb(t);
    } else if (k < 15) {
        check_free_bitmaps(t, "under way");
        crowd_check_cut_now(&t->crowd);
    } else {
        abort_in_silence(t);
    }
}

static co_fn void txn_live(struct world *w)
{
    struct txn_state *t = state_of(w);
    struct side *s = &t->side;
    set_up(w);
    s->w = w;
    s->turn = (struct co_mutex)CO_MUTEX_INIT;
    co_group_add(&s->gone, 1);
    CHECK(loop_spawn(io_loop(w->io, 0), side_main, s) == 0);
    unsigned rounds = 6 + (unsigned)chance_below(&w->chance, 20);
    for (unsigned i = 0; i < rounds; i++)
        one_round(t);
    s->stop = true;
    co_group_wait(&s->gone);
    if (chance_one_in(&w->chance, 2))
        settle_all(t);
    if (chance_one_in(&w->chance, 4)) { /* the daemon ends below guests and jobs */
        crowd_may_lose(&t->crowd);
        io_sleep(chance_below(&w->chance, 20000000));
        return;
    }
    crowd_end(&t->crowd);
    if (!chance_one_in(&w->chance, 3)) /* else it ends with jobs that run or are paused */
        settle_all(t);
    check_free_bitmaps(t, "at the end");
    for (unsigned i = 0; i < N_DISKS; i++)
        check_relay(t, i);
}

static co_fn void txn_closed(struct world *w)
{
    struct txn_state *t = state_of(w);
    crowd_end(&t->crowd);
    for (unsigned i = 0; i < N_DISKS; i++)
        crowd_check_file(&t->crowd, w->disk, i, t->crowd.disk[i].file, w->tick + 1, FOREVER,
                         "at the end");
}

static co_fn void txn_after_cut(struct world *w)
{
    struct txn_state *t = state_of(w);
    world_start_nbd(w);
    crowd_check_after_cut(&t->crowd);
}

static void txn_finish(struct world *w)
{
    struct txn_state *t = state_of(w);
    book_free(&t->book);
    book_free(&t->copy);
    crowd_free(&t->crowd);
}

static const struct scenario txn = {
    .name = "transactions",
    .state_size = sizeof(struct txn_state),
    .n_seeds = 300,
    .cut_one_in = 6,
    .cut_steps = 6000,
    .prepare = txn_prepare,
    .live = txn_live,
    .closed = txn_closed,
    .after_cut = txn_after_cut,
    .finish = txn_finish,
};

int main(void)
{
    const struct scenario *all[] = {&txn};
    return scenario_main(all, 1);
}
