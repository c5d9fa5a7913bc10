/* SPDX-License-Identifier: Apache-2.0 */
/* The engine: lock, stage, quiesce, prepare in order, record; or unwind in reverse.
 *
 * Order (docs/transactions.md, "One transaction step by step"): command lock; slow work that nobody
 * sees; nodes of the whole list quiesced in one go; effects are hidden from queries from the first
 * one on; every action in list order; the record; discards, last first; announcements and gates in
 * list order; locks go; releases. What an unwind gives back is given back before anything is
 * released. */
#include "txn/txn.h"

#include <assert.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/queue.h>

#include "base/mem.h"
#include "block/node.h"
#include "block/root.h"
#include "block/tracker.h"
#include "export/export.h"
#include "io/io.h"
#include "job/job.h"
#include "txn/footprint.h"
#include "txn/history.h"

struct undo {
    const struct undo_ops *ops;
    unsigned action;
    TAILQ_ENTRY(undo) link;
    _Alignas(16) unsigned char rec[];
};
TAILQ_HEAD(undo_list, undo);

struct txn {
    const struct txn_env *env;
    const struct txn_props *props;
    const struct action *actions;
    size_t n;
    unsigned current;        /* the action whose turn it is */
    struct undo_list armed;  /* in list order */
    struct undo_list undone; /* in the order of unwinding */
    struct undo_list reserved;
    struct footprint footprint;
    struct job_group *group;
    /* What was staged, by action; NULL when nothing was. */
    void **staged;
    int stage_failed; /* index of the action, -1: none */
    struct tide_error stage_err;
    struct action_report *report;
    struct txn_result *res;
    /* A long list is long work: disks that it does not name go on meanwhile. */
    struct io_turns turns;
    struct bitmap_pace pace; /* has the same turns */
};

/* ------------------------------------------------------------------ for actions */

static struct undo *undo_of(void *rec)
{
    return (struct undo *)((char *)rec - offsetof(struct undo, rec));
}

void *txn_reserve(struct txn *t, const struct undo_ops *ops, size_t size, struct tide_error *err)
{
    struct undo *u = mem_zalloc(sizeof *u + size);
    if (!u) {
        tide_fail(err, -ENOMEM, "no memory for the undo record");
        return NULL;
    }
    u->ops = ops;
    u->action = t->current;
    TAILQ_INSERT_HEAD(&t->reserved, u, link);
    return u->rec;
}

void txn_arm(struct txn *t, void *rec)
{
    struct undo *u = undo_of(rec);
    /* Records are armed in the reverse order of reserving. */
    assert(TAILQ_FIRST(&t->reserved) == u);
    TAILQ_REMOVE(&t->reserved, u, link);
    TAILQ_INSERT_TAIL(&t->armed, u, link);
}

void txn_not_undone(struct txn *t, const struct tide_error *why)
{
    struct txn_result *res = t->res;
    res->not_undone = true;
    char **more = mem_realloc(res->left, res->n_left + 1, sizeof *more);
    if (!more)
        return;
    res->left = more;
    if ((more[res->n_left] = mem_strdup(why->msg)))
        res->n_left++;
}

void *txn_staged(struct txn *t, const struct action *a)
{
    void *staged = t->staged ? t->staged[a->index] : NULL;
    if (staged)
        t->staged[a->index] = NULL;
    return staged;
}

struct job_group *txn_job_group(struct txn *t)
{
    return t->group;
}

struct graph *txn_graph(struct txn *t)
{
    return t->env->graph;
}

struct jobs *txn_jobs(struct txn *t)
{
    return t->env->jobs;
}

struct exports *txn_exports(struct txn *t)
{
    return t->env->exports;
}

struct bitmap_pace *txn_pace(struct txn *t)
{
    return &t->pace;
}

bool txn_is_dry(const struct txn *t)
{
    return t->props->dry_run;
}

void txn_only_checked(struct txn *t)
{
    if (t->report)
        t->report[t->current].outcome = ACTION_CHECKED;
}

static void note(char **where, const char *fmt, va_list ap)
{
    char text[400];
    vsnprintf(text, sizeof text, fmt, ap);
    mem_free(*where);
    *where = mem_strdup(text);
}

void txn_sees(struct txn *t, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    if (t->report)
        note(&t->report[t->current].sees, fmt, ap);
    va_end(ap);
}

void txn_does(struct txn *t, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    if (t->report)
        note(&t->report[t->current].does, fmt, ap);
    va_end(ap);
}

/* ------------------------------------------------------------------ the two ways out */

static void probe(struct txn *t, enum txn_step step, unsigned done)
{
    if (t->env->probe)
        t->env->probe(t->env->probe_arg, step, done);
}

static void forget_reserved(struct txn *t)
{
    while (!TAILQ_EMPTY(&t->reserved)) {
        struct undo *u = TAILQ_FIRST(&t->reserved);
        TAILQ_REMOVE(&t->reserved, u, link);
        mem_free(u);
    }
}

/* Until only what actions 0 .. done-1 did is left. */
static co_fn void unwind_to(struct txn *t, unsigned done)
{
    struct undo *u;
    forget_reserved(t);
    while ((u = TAILQ_LAST(&t->armed, undo_list)) && u->action >= done) {
        unsigned action = u->action;
        u->ops->unwind(u->rec);
        TAILQ_REMOVE(&t->armed, u, link);
        TAILQ_INSERT_TAIL(&t->undone, u, link);
        u = TAILQ_LAST(&t->armed, undo_list);
        if (!u || u->action != action)
            probe(t, TXN_UNWOUND, action);
        io_turns_step(&t->turns);
    }
}

/* Nothing here can fail: the list has happened. */
static co_fn void succeed(struct txn *t)
{
    struct undo *u;
    probe(t, TXN_RECORDED, (unsigned)t->n);
    TAILQ_FOREACH_REVERSE(u, &t->armed, undo_list, link)
    {
        if (u->ops->discard)
            u->ops->discard(u->rec);
        io_turns_step(&t->turns);
    }
    probe(t, TXN_DISCARDED, (unsigned)t->n);
    TAILQ_FOREACH (u, &t->armed, link) {
        if (u->ops->announce)
            u->ops->announce(u->rec);
    }
    TAILQ_FOREACH (u, &t->armed, link) {
        if (u->ops->open)
            u->ops->open(u->rec);
    }
}

static co_fn void release(struct txn *t, struct undo_list *list, bool undone)
{
    while (!TAILQ_EMPTY(list)) {
        struct undo *u = TAILQ_FIRST(list);
        if (u->ops->release)
            u->ops->release(u->rec, undone);
        io_turns_step(&t->turns);
        TAILQ_REMOVE(list, u, link);
        mem_free(u);
    }
}

/* ------------------------------------------------------------------ before guests are held */

static const char *node_of_export(void *arg, const char *id)
{
    const struct txn_env *env = arg;
    struct node *n = export_node(env->exports, id);
    return n ? node_name(n) : NULL;
}

static const char *child_of_node(void *arg, const char *name, unsigned i)
{
    const struct txn_env *env = arg;
    struct node *n = graph_find(env->graph, name);
    struct node *c = n ? node_child(n, i) : NULL;
    return c ? node_name(c) : NULL;
}

static bool bitmaps_of_node(void *arg, const char *name, footprint_bitmap *each,
                            struct footprint *f)
{
    const struct txn_env *env = arg;
    struct node *n = graph_find(env->graph, name);
    struct dirty_bitmap *first = n ? node_bitmaps(n) : NULL;
    for (struct dirty_bitmap *b = first; b; b = b->next)
        each(f, name, b->name);
    return first != NULL;
}

static const char *name_of_export(void *arg, const char *id)
{
    const struct txn_env *env = arg;
    return export_name_of(env->exports, id);
}

static bool is_export_writable(void *arg, const char *id)
{
    const struct txn_env *env = arg;
    return export_is_writable(env->exports, id);
}

static bool bitmap_of_export(void *arg, const char *id, unsigned i, struct store_name *out)
{
    const struct txn_env *env = arg;
    const struct dirty_bitmap *b = export_bitmap(env->exports, id, i);
    if (b)
        *out = (struct store_name){STORE_BITMAP, node_name(b->node), b->name};
    return b != NULL;
}

static bool file_of_node(void *arg, const char *name, uint64_t *dev, uint64_t *ino)
{
    const struct txn_env *env = arg;
    struct node *n = graph_find(env->graph, name);
    return n && node_file(n, dev, ino);
}

struct footprint_lookup txn_lookup(const struct txn_env *env)
{
    return (struct footprint_lookup){.export_node = node_of_export,
                                     .export_name = name_of_export,
                                     .export_writable = is_export_writable,
                                     .export_bitmap = bitmap_of_export,
                                     .node_child = child_of_node,
                                     .node_bitmaps = bitmaps_of_node,
                                     .node_file = file_of_node,
                                     .arg = (void *)env};
}

/* What the list names, all of it before anything happens. */
static co_fn int make_footprint(struct txn *t, const struct footprint_lookup *lookup,
                                struct tide_error *err)
{
    struct footprint *f = &t->footprint;
    f->lookup = lookup;
    for (size_t i = 0; i < t->n; i++) {
        action_footprint((int)(t->actions[i].entry - txn_actions), t->actions[i].args, (unsigned)i,
                         f);
        io_turns_step(&t->turns);
    }
    f->lookup = NULL;
    return f->no_memory ? tide_fail(err, -ENOMEM, "no memory for a list of %zu actions", t->n) : 0;
}

#define STAGE_USES_MAX 4096u /* finding out what may be staged is quadratic */

static bool is_staged_kind(const struct name_use *u)
{
    return u->name.kind == STORE_NODE || u->name.kind == STORE_FILE;
}

/* A file has many paths: one that is read may be any that was written. Who makes one looks at its
 * own path only when its turn comes. */
static bool may_be_same(const struct name_use *earlier, const struct name_use *own)
{
    if (own->name.kind == STORE_FILE && earlier->name.kind == STORE_FILE && !own->writes)
        return true;
    return store_name_meets(&earlier->name, &own->name);
}

/* Does an earlier action change a node or a file that action i names? */
static bool stands_alone(const struct footprint *f, unsigned i)
{
    for (size_t k = 0; k < f->n_uses && f->use[k].action <= i; k++) {
        const struct name_use *own = &f->use[k];
        if (own->action != i || !is_staged_kind(own))
            continue;
        for (size_t e = 0; e < k && f->use[e].action < i; e++) {
            if (f->use[e].writes && is_staged_kind(&f->use[e]) && may_be_same(&f->use[e], own))
                return false;
        }
    }
    return true;
}

/* Ends at the first failure: the list gets no further than there. */
static co_fn int stage(struct txn *t, struct tide_error *err)
{
    for (unsigned i = 0; i < t->n && t->footprint.n_uses <= STAGE_USES_MAX; i++) {
        const struct action_ops *ops = t->actions[i].entry->ops;
        if (!ops->stage || !stands_alone(&t->footprint, i))
            continue;
        if (!t->staged && !(t->staged = mem_calloc(t->n, sizeof *t->staged)))
            return tide_fail(err, -ENOMEM, "no memory for a list of %zu actions", t->n);
        t->current = i;
        if (ops->stage(t, &t->actions[i], &t->staged[i], &t->stage_err) < 0) {
            t->stage_failed = (int)i;
            break;
        }
    }
    return 0;
}

static co_fn void unstage(struct txn *t)
{
    for (size_t i = t->staged ? t->n : 0; i-- > 0;) {
        if (t->staged[i])
            t->actions[i].entry->ops->unstage(t, t->staged[i]);
    }
    mem_free(t->staged);
}

static co_fn int hold(struct txn *t, struct quiesce **q, struct txn_result *res,
                      struct tide_error *err)
{
    const struct footprint *f = &t->footprint;
    struct graph *g = t->env->graph;
    struct node **nodes = mem_calloc(f->n_holds + 1, sizeof *nodes), *last = NULL;
    enum quiesce_kind kind = QUIESCE_WRITES;
    unsigned n = 0;
    if (!nodes)
        return tide_fail(err, -ENOMEM, "no memory for a list of %zu actions", t->n);
    for (size_t i = 0; i < f->n_holds; i++) {
        const struct node_hold *h = &f->hold[i];
        struct node *found =
            h->node ? graph_find(g, h->node) : export_node(t->env->exports, h->export);
        if (h->all)
            kind = QUIESCE_ALL;
        /* What does not exist (yet) is left to prepare, which says so. */
        if (found && found != last)
            nodes[n++] = last = found;
    }
    quiesce_peace(g, nodes, n, kind);
    uint64_t since = io_now(t->env->io);
    int r = quiesce_begin(g, nodes, n, kind, q, err);
    if (r < 0) /* in vain */
        res->held_ns = io_now(t->env->io) - since;
    mem_free(nodes);
    return r;
}

/* ------------------------------------------------------------------ running a list */

static co_fn int prepare_one(struct txn *t, const struct action *a, struct txn_result *res,
                             struct tide_error *err)
{
    t->current = a->index;
    if (t->report)
        t->report[a->index].outcome = ACTION_EXERCISED;
    res->phase = (int)a->index == t->stage_failed ? "stage" : "prepare";
    if ((int)a->index == t->stage_failed) {
        *err = t->stage_err;
        return err->code;
    }
    int r = a->entry->ops->prepare(t, a, err);
    forget_reserved(t);
    return r;
}

static co_fn int prepare_all(struct txn *t, struct txn_result *res, struct tide_error *err)
{
    probe(t, TXN_HELD, 0);
    for (unsigned i = 0; i < t->n; i++) {
        int r = prepare_one(t, &t->actions[i], res, err);
        if (r < 0) {
            unwind_to(t, i);
            res->failed = (int)i;
            if (t->report)
                t->report[i].outcome = ACTION_FAILED;
            return r;
        }
        probe(t, TXN_PREPARED, i + 1);
        io_turns_step(&t->turns);
    }
    return 0;
}

/* The one place where an outcome is decided. */
static co_fn int write_record(struct txn *t, struct tide_error *err)
{
    const struct footprint *f = &t->footprint;
    struct store_name *changed = mem_calloc(f->n_uses + 1, sizeof *changed);
    struct store_record rec = {.id = t->props->id, .changed = changed};
    if (!changed)
        return tide_fail(err, -ENOMEM, "no memory for the record of the transaction");
    for (size_t i = 0; i < f->n_uses; i++) {
        if (f->use[i].writes)
            changed[rec.n_changed++] = f->use[i].name;
    }
    rec.outcome = (struct store_outcome){.committed = true, .failed = -1};
    memcpy(rec.outcome.digest, t->props->digest, sizeof rec.outcome.digest);
    int r = store_write_record(t->env->store, &rec, err);
    mem_free(changed);
    return r;
}

/* So that a client which asks again under the same id hears the same. If it cannot be remembered,
 * the list is run again then, which is right, too: it changed nothing. */
static co_fn void remember_failure(struct txn *t, const struct txn_result *res,
                                   const struct tide_error *why)
{
    struct tide_error ignored;
    struct store_record rec = {.id = t->props->id};
    if (!rec.id || res->failed < 0)
        return;
    rec.outcome = (struct store_outcome){
        .failed = res->failed, .phase = res->phase, .not_undone = res->not_undone, .err = *why};
    memcpy(rec.outcome.digest, t->props->digest, sizeof rec.outcome.digest);
    store_write_record(t->env->store, &rec, &ignored);
}

static co_fn int run_held(struct txn *t, struct txn_result *res, struct tide_error *err)
{
    int r = prepare_all(t, res, err);
    if (r == 0 && !t->props->dry_run) {
        r = write_record(t, err);
        if (r < 0) {
            res->failed = t->n ? (int)t->n - 1 : -1;
            res->phase = "record";
        }
    }
    if (r < 0 || t->props->dry_run)
        unwind_to(t, 0);
    else
        succeed(t);
    return r;
}

static void say_what_is_left(const struct txn_result *res, struct tide_error *err)
{
    if (res->n_left > 1)
        tide_error_suffix(err, "; not undone: %s; and %zu more", res->left[0], res->n_left - 1);
    else
        tide_error_suffix(err, "; not undone: %s", res->n_left ? res->left[0] : "see the log");
}

static co_fn int run_locked(struct txn *t, struct txn_result *res, struct tide_error *err)
{
    struct graph *g = t->env->graph;
    struct quiesce *q = NULL;
    struct footprint_lookup lookup = txn_lookup(t->env);
    int r = make_footprint(t, &lookup, err);
    if (r == 0)
        r = stage(t, err);
    if (r == 0)
        r = hold(t, &q, res, err);
    if (r == 0) {
        graph_effects_begin(g);
        r = run_held(t, res, err);
        graph_effects_end(g);
        res->held_ns = quiesce_age(q);
        quiesce_end(q);
    }
    if (r < 0 && res->not_undone)
        say_what_is_left(res, err);
    release(t, &t->undone, true);
    release(t, &t->armed, false);
    footprint_free(&t->footprint);
    if (r < 0 && !t->props->dry_run)
        remember_failure(t, res, err); /* the lock is enough: guests need not wait for this */
    return r;
}

/* What is known under the id already: 1 and the outcome in res and err, 0: nothing. */
static int replay(const struct txn_env *env, const struct txn_props *p, struct txn_result *res,
                  struct tide_error *err)
{
    const struct store_outcome *o = p->id ? store_find_outcome(env->store, p->id) : NULL;
    if (!o)
        return 0;
    if (memcmp(o->digest, p->digest, sizeof o->digest))
        return tide_fail(err, -EEXIST,
                         "transaction '%s' was another list: an id stands for one list; give this "
                         "one an id of its own",
                         p->id);
    res->replayed = true;
    res->failed = o->failed;
    res->phase = o->phase;
    res->not_undone = o->not_undone;
    if (!o->committed)
        *err = o->err;
    return o->committed ? 1 : err->code;
}

static int begin(struct txn *t, struct txn_result *res, struct tide_error *err)
{
    const struct txn_env *env = t->env;
    int r = env->may_begin ? env->may_begin(env->may_begin_arg, err) : 0;
    if (r < 0)
        return r;
    if (t->props->dry_run) {
        t->report = mem_calloc(t->n + 1, sizeof *t->report);
        if (!t->report)
            return tide_fail(err, -ENOMEM, "no memory for a list of %zu actions", t->n);
        res->report = t->report;
        res->n_reports = t->n;
    }
    if (t->props->grouped && job_group_new(t->env->jobs, &t->group) < 0)
        return tide_fail(err, -ENOMEM, "no memory for a group of jobs");
    return 0;
}

int txn_run(const struct txn_env *env, const struct action *actions, size_t n,
            const struct txn_props *props, struct txn_result *res, struct tide_error *err)
{
    struct txn t = {.env = env,
                    .props = props,
                    .actions = actions,
                    .n = n,
                    .stage_failed = -1,
                    .turns = {env->io},
                    .pace = {.rest = io_turns_step, .arg = &t.turns}};
    struct history_entry *h = history_begin(env->history, env->io, actions, n, props);
    TAILQ_INIT(&t.armed);
    TAILQ_INIT(&t.undone);
    TAILQ_INIT(&t.reserved);
    *res = (struct txn_result){.failed = -1};
    t.res = res;
    graph_lock(env->graph);
    int r = replay(env, props, res, err);
    if (r == 0)
        r = begin(&t, res, err);
    if (r == 0)
        r = run_locked(&t, res, err);
    unstage(&t);
    graph_unlock(env->graph);
    if (res->replayed && r > 0)
        r = 0;
    job_group_put(t.group);
    history_end(env->history, h, r, res, err);
    return r;
}

void txn_result_free(struct txn_result *res)
{
    for (size_t i = 0; i < res->n_reports; i++) {
        mem_free(res->report[i].sees);
        mem_free(res->report[i].does);
    }
    for (size_t i = 0; i < res->n_left; i++)
        mem_free(res->left[i]);
    mem_free(res->left);
    res->left = NULL;
    res->n_left = 0;
    mem_free(res->report);
    res->report = NULL;
    res->n_reports = 0;
}
