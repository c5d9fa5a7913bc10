/* SPDX-License-Identifier: Apache-2.0 */
/* The engine: lock, quiesce, prepare in order, record; or unwind in reverse.
 *
 * Order (docs/transactions.md, "One transaction step by step"): command lock; nodes of the whole
 * list quiesced in one go; effects are hidden from queries from the first one on; every action in
 * list order; the record; discards, last first; jobs announced and started in list order; gates
 * open; locks go. What an unwind gives back is given back before anything is released. */
#include "txn/txn.h"

#include <assert.h>
#include <errno.h>
#include <string.h>
#include <sys/queue.h>

#include "base/mem.h"
#include "block/node.h"
#include "job/job.h"

struct undo {
    const struct undo_ops *ops;
    SLIST_ENTRY(undo) link;
    _Alignas(16) unsigned char rec[];
};

struct gate {
    struct job *job;
    STAILQ_ENTRY(gate) link;
};

struct txn {
    const struct txn_env *env;
    SLIST_HEAD(, undo) armed;    /* last effect first */
    SLIST_HEAD(, undo) reserved; /* not armed */
    unsigned height;
    STAILQ_HEAD(gate_list, gate) gates; /* jobs to start, in list order */
    struct gate *spare;
    struct job_group *group;
};

struct footprint {
    struct graph *graph;
    struct node **node;
    size_t n, cap;
    enum quiesce_kind kind;
    bool no_memory;
};

/* ------------------------------------------------------------------ for actions */

void footprint_node(struct footprint *f, const char *name, enum quiesce_kind kind)
{
    struct node *n = graph_find(f->graph, name);
    if (!n)
        return;
    if (kind == QUIESCE_ALL)
        f->kind = QUIESCE_ALL;
    /* Neighbours in a list mostly name the same node; other repeats do no harm. */
    if (f->n && f->node[f->n - 1] == n)
        return;
    if (f->n == f->cap) {
        size_t cap = f->cap ? f->cap * 2 : 16;
        struct node **p = mem_realloc(f->node, cap, sizeof *p);
        if (!p) {
            f->no_memory = true;
            return;
        }
        f->node = p;
        f->cap = cap;
    }
    f->node[f->n++] = n;
}

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
    SLIST_INSERT_HEAD(&t->reserved, u, link);
    return u->rec;
}

void txn_arm(struct txn *t, void *rec)
{
    struct undo *u = undo_of(rec);
    assert(SLIST_FIRST(&t->reserved) ==
           u); /* records are armed in the reverse order of reserving */
    SLIST_REMOVE_HEAD(&t->reserved, link);
    SLIST_INSERT_HEAD(&t->armed, u, link);
    t->height++;
}

int txn_reserve_gate(struct txn *t, struct tide_error *err)
{
    if (!t->spare)
        t->spare = mem_zalloc(sizeof *t->spare);
    return t->spare ? 0 : tide_fail(err, -ENOMEM, "no memory for the start of a job");
}

void txn_gate_job(struct txn *t, struct job *j)
{
    struct gate *g = t->spare;
    t->spare = NULL;
    g->job = j;
    STAILQ_INSERT_TAIL(&t->gates, g, link);
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

/* ------------------------------------------------------------------ the two ways out */

static void forget_reserved(struct txn *t)
{
    while (!SLIST_EMPTY(&t->reserved)) {
        struct undo *u = SLIST_FIRST(&t->reserved);
        SLIST_REMOVE_HEAD(&t->reserved, link);
        mem_free(u);
    }
}

static co_fn void unwind_to(struct txn *t, unsigned height)
{
    forget_reserved(t);
    while (t->height > height) {
        struct undo *u = SLIST_FIRST(&t->armed);
        SLIST_REMOVE_HEAD(&t->armed, link);
        t->height--;
        u->ops->unwind(u->rec);
        mem_free(u);
    }
}

static co_fn void discard_all(struct txn *t)
{
    forget_reserved(t);
    while (!SLIST_EMPTY(&t->armed)) {
        struct undo *u = SLIST_FIRST(&t->armed);
        SLIST_REMOVE_HEAD(&t->armed, link);
        if (u->ops->discard)
            u->ops->discard(u->rec);
        mem_free(u);
    }
    t->height = 0;
}

static void open_gates(struct txn *t)
{
    struct gate *g;
    STAILQ_FOREACH (g, &t->gates, link)
        job_announce(g->job);
    STAILQ_FOREACH (g, &t->gates, link)
        job_start(g->job);
}

static void free_gates(struct txn *t)
{
    mem_free(t->spare);
    t->spare = NULL;
    while (!STAILQ_EMPTY(&t->gates)) {
        struct gate *g = STAILQ_FIRST(&t->gates);
        STAILQ_REMOVE_HEAD(&t->gates, link);
        mem_free(g);
    }
}

/* ------------------------------------------------------------------ running a list */

static int make_footprint(const struct txn_env *env, const struct action *a, size_t n,
                          struct footprint *f, struct tide_error *err)
{
    *f = (struct footprint){.graph = env->graph, .kind = QUIESCE_WRITES};
    for (size_t i = 0; i < n; i++) {
        if (a[i].entry->ops->footprint)
            a[i].entry->ops->footprint(&a[i], f);
    }
    return f->no_memory ? tide_fail(err, -ENOMEM, "no memory for a list of %zu actions", n) : 0;
}

/* The one place where an outcome becomes durable. There is no store yet: memory decides, here. */
static int write_record(struct txn *t)
{
    return 0;
}

static co_fn int prepare_all(struct txn *t, const struct action *a, size_t n,
                             struct txn_result *res, struct tide_error *err)
{
    for (size_t i = 0; i < n; i++) {
        unsigned height = t->height;
        int r = a[i].entry->ops->prepare(t, &a[i], err);
        forget_reserved(t);
        if (r < 0) {
            unwind_to(t, height);
            res->failed = (int)i;
            res->phase = "prepare";
            return r;
        }
    }
    return 0;
}

static co_fn int run_held(struct txn *t, const struct action *a, size_t n, struct txn_result *res,
                          struct tide_error *err)
{
    int r = prepare_all(t, a, n, res, err);
    if (r == 0) {
        r = write_record(t);
        if (r < 0) {
            res->failed = n ? (int)n - 1 : 0;
            res->phase = "record";
            tide_fail(err, r, "the transaction's record could not be written");
        }
    }
    if (r < 0)
        unwind_to(t, 0);
    else
        discard_all(t);
    return r;
}

static co_fn int run_locked(struct txn *t, const struct action *a, size_t n, struct txn_result *res,
                            struct tide_error *err)
{
    struct graph *g = t->env->graph;
    struct footprint f;
    struct quiesce *q = NULL;
    int r = make_footprint(t->env, a, n, &f, err);
    if (r == 0)
        r = quiesce_begin(g, f.node, (unsigned)f.n, f.kind, &q, err);
    mem_free(f.node);
    if (r < 0)
        return r;
    graph_effects_begin(g);
    r = run_held(t, a, n, res, err);
    if (r == 0)
        open_gates(t);
    free_gates(t);
    graph_effects_end(g);
    res->held_ns = quiesce_age(q);
    quiesce_end(q);
    return r;
}

int txn_run(const struct txn_env *env, const struct action *actions, size_t n,
            const struct txn_props *props, struct txn_result *res, struct tide_error *err)
{
    struct txn t = {.env = env};
    SLIST_INIT(&t.armed);
    SLIST_INIT(&t.reserved);
    STAILQ_INIT(&t.gates);
    *res = (struct txn_result){.failed = -1};
    if (props->grouped && job_group_new(env->jobs, &t.group) < 0)
        return tide_fail(err, -ENOMEM, "no memory for a group of jobs");
    graph_lock(env->graph);
    int r = run_locked(&t, actions, n, res, err);
    graph_unlock(env->graph);
    job_group_put(t.group);
    return r;
}
