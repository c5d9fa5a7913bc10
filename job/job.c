/* SPDX-License-Identifier: Apache-2.0 */
/* The state machine of jobs and of their groups.
 *
 * job_main runs the work. When it is over, group_check() looks at the whole group:
 *   one failed or was cancelled   cancel the others; when all have ended, finish(abort)
 *   all have ended well           all are *pending*; unless one wants finalize by hand,
 * finish(commit) finish() is the transaction at the end: command lock, one quiesce, commit or abort
 * of each member, one record, then nodes are released, then events leave. */
#include "job/job.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "base/bytes.h"
#include "base/log.h"
#include "base/mem.h"
#include "block/node.h"
#include "block/root.h"
#include "block/tracker.h"
#include "co/sync.h"
#include "event/event.h"

struct jobs {
    struct graph *graph;
    struct event_bus *bus;
    struct store *store;       /* or NULL */
    struct job_list_head list; /* newest first */
    struct co_queue changed;   /* somebody waits for the end of a group */
    struct spin changed_lock;
};

static const char *const status_names[] = {
    [JOB_CREATED] = "created", [JOB_RUNNING] = "running",   [JOB_PAUSED] = "paused",
    [JOB_READY] = "ready",     [JOB_STANDBY] = "standby",   [JOB_WAITING] = "waiting",
    [JOB_PENDING] = "pending", [JOB_ABORTING] = "aborting", [JOB_CONCLUDED] = "concluded",
    [JOB_NULL] = "null",
};

static const char *const verb_names[] = {
    [JOB_CANCEL] = "cancel",       [JOB_PAUSE] = "pause",       [JOB_RESUME] = "resume",
    [JOB_SET_SPEED] = "set-speed", [JOB_COMPLETE] = "complete", [JOB_FINALIZE] = "finalize",
    [JOB_DISMISS] = "dismiss",
};

/* Which verb is accepted in which state: bits 1 << status (contract 6.2). */
#define IN(s) (1u << JOB_##s)
static const unsigned verb_states[] = {
    [JOB_CANCEL] = IN(CREATED) | IN(RUNNING) | IN(PAUSED) | IN(READY) | IN(STANDBY) | IN(WAITING) |
                   IN(PENDING),
    [JOB_PAUSE] = IN(CREATED) | IN(RUNNING) | IN(PAUSED) | IN(READY) | IN(STANDBY),
    [JOB_RESUME] = IN(CREATED) | IN(RUNNING) | IN(PAUSED) | IN(READY) | IN(STANDBY),
    [JOB_SET_SPEED] = IN(CREATED) | IN(RUNNING) | IN(PAUSED) | IN(READY) | IN(STANDBY),
    [JOB_COMPLETE] = IN(READY) | IN(STANDBY),
    [JOB_FINALIZE] = IN(PENDING),
    [JOB_DISMISS] = IN(CONCLUDED),
};

static const char *const io_status_names[] = {"ok", "failed", "nospace"};

/* ------------------------------------------------------------------ tables */

int jobs_new(struct graph *g, struct event_bus *bus, struct jobs **out)
{
    struct jobs *js = mem_zalloc(sizeof *js);
    if (!js)
        return -ENOMEM;
    js->graph = g;
    js->bus = bus;
    TAILQ_INIT(&js->list);
    *out = js;
    return 0;
}

void jobs_free(struct jobs *js)
{
    if (!js)
        return;
    assert(TAILQ_EMPTY(&js->list));
    mem_free(js);
}

struct graph *jobs_graph(struct jobs *js)
{
    return js->graph;
}

void jobs_set_store(struct jobs *js, struct store *s)
{
    js->store = s;
}

int job_group_new(struct jobs *js, struct job_group **out)
{
    struct job_group *g = mem_zalloc(sizeof *g);
    if (!g)
        return -ENOMEM;
    g->jobs = js;
    g->refs = 1;
    TAILQ_INIT(&g->members);
    *out = g;
    return 0;
}

void job_group_put(struct job_group *g)
{
    if (!g || --g->refs)
        return;
    mem_free(g->nodes);
    mem_free(g->names);
    mem_free(g);
}

/* Room for one more member at the end, so that the end needs none. */
static int reserve_end(struct job_group *g)
{
    struct node **nodes = mem_realloc(g->nodes, (g->n + 1) * JOB_NODES, sizeof *nodes);
    if (nodes)
        g->nodes = nodes;
    struct store_name *names = mem_realloc(g->names, (g->n + 1) * (JOB_NAMES + 1), sizeof *names);
    if (names)
        g->names = names;
    return nodes && names ? 0 : -ENOMEM;
}

static struct job *lookup(struct jobs *js, const char *id)
{
    struct job *j;
    TAILQ_FOREACH (j, &js->list, link) {
        if (!strcmp(j->id, id))
            return j;
    }
    return NULL;
}

static int check_id(struct jobs *js, const char *id, struct tide_error *err)
{
    static const char rest[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._";
    if (!id || !id[0])
        return tide_fail(err, -EINVAL, "'job-id' is missing: a job needs one here");
    if (!strchr("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", id[0]) ||
        id[strspn(id, rest)])
        return tide_fail(err, -EINVAL,
                         "job id '%s' is not valid: a letter, then letters, digits, '-', '.', '_'",
                         id);
    if (lookup(js, id))
        return tide_fail(err, -EEXIST, "job id '%s' is in use already", id);
    return 0;
}

int job_register(struct job *j, struct jobs *js, const struct job_ops *ops,
                 const struct job_options *o, struct tide_error *err)
{
    int r = check_id(js, o->id, err);
    if (r < 0)
        return r;
    struct job_group *g = o->group;
    if (g)
        g->refs++;
    else if (job_group_new(js, &g) < 0)
        return tide_fail(err, -ENOMEM, "no memory for job '%s'", o->id);
    j->id = reserve_end(g) == 0 ? mem_strdup(o->id) : NULL;
    if (!j->id) {
        job_group_put(g);
        return tide_fail(err, -ENOMEM, "no memory for job '%s'", o->id);
    }
    j->ops = ops;
    j->jobs = js;
    j->group = g;
    j->status = JOB_CREATED;
    j->auto_finalize = o->auto_finalize;
    j->auto_dismiss = o->auto_dismiss;
    atomic_store(&j->speed, o->speed);
    TAILQ_INSERT_HEAD(&js->list, j, link);
    TAILQ_INSERT_TAIL(&g->members, j, in_group);
    g->n++;
    return 0;
}

static void unregister(struct job *j)
{
    TAILQ_REMOVE(&j->jobs->list, j, link);
    TAILQ_REMOVE(&j->group->members, j, in_group);
    j->group->n--;
    job_group_put(j->group);
    mem_free(j->id);
}

void job_drop(struct job *j)
{
    assert(!j->started);
    unregister(j);
}

/* ------------------------------------------------------------------ events */

static void set_status(struct job *j, enum job_status s)
{
    if (j->status == s)
        return;
    j->status = s;
    event_emit(j->jobs->bus, "JOB_STATUS_CHANGE",
               json_pack("{s:s,s:s}", "id", j->id, "status", status_names[s]));
}

static void emit_block_event(struct job *j, const char *name, bool with_error)
{
    json_t *d = json_pack("{s:s,s:s,s:I,s:I,s:I}", "type", j->ops->type, "device", j->id, "len",
                          (json_int_t)atomic_load(&j->total), "offset",
                          (json_int_t)atomic_load(&j->current), "speed",
                          (json_int_t)atomic_load(&j->speed));
    if (d && with_error)
        json_object_set_new(d, "error", json_string(j->error));
    event_emit(j->jobs->bus, name, d);
}

/* ------------------------------------------------------------------ the end of a group */

static void wake_waiters(struct jobs *js)
{
    spin_lock(&js->changed_lock);
    co_queue_wake_all(&js->changed);
    spin_unlock(&js->changed_lock);
}

static bool group_failed(struct job_group *g)
{
    struct job *j;
    TAILQ_FOREACH (j, &g->members, in_group) {
        if (job_cancelled(j) || (j->ended && j->ret < 0))
            return true;
    }
    return false;
}

static bool group_all_ended(struct job_group *g)
{
    struct job *j;
    TAILQ_FOREACH (j, &g->members, in_group) {
        if (!j->ended)
            return false;
    }
    return true;
}

static void cancel_rest(struct job_group *g)
{
    struct job *j;
    TAILQ_FOREACH (j, &g->members, in_group) {
        if (!j->ended) {
            atomic_store(&j->cancelled, true);
            atomic_store(&j->paused, false);
            j->ops->kick(j);
        } else if (j->ret == 0) {
            j->ret = -ECANCELED;
            snprintf(j->error, sizeof j->error, "Operation canceled");
            set_status(j, JOB_ABORTING);
        }
    }
}

static co_fn struct quiesce *try_to_hold(struct job_group *g)
{
    struct quiesce *q = NULL;
    struct tide_error err;
    struct job *j;
    unsigned n = 0;
    TAILQ_FOREACH (j, &g->members, in_group)
        n += j->ops->nodes(j, g->nodes + n);
    quiesce_peace(g->jobs->graph, g->nodes, n, QUIESCE_WRITES);
    if (quiesce_begin(g->jobs->graph, g->nodes, n, QUIESCE_WRITES, &q, &err) < 0)
        log_warn("job", "end of job '%s': %s; trying again", TAILQ_FIRST(&g->members)->id, err.msg);
    return q;
}

/* Take the command lock and hold the nodes of all members. A job has to end, so this is tried again
 * when draining takes too long; others get the lock in between. */
static co_fn struct quiesce *hold_nodes(struct job_group *g)
{
    struct quiesce *q;
    graph_lock(g->jobs->graph);
    while (!(q = try_to_hold(g))) {
        graph_unlock(g->jobs->graph);
        io_sleep(QUIESCE_PEACE_NS); /* without the lock */
        graph_lock(g->jobs->graph);
    }
    return q;
}

static void conclude(struct job *j)
{
    bool cancelled = j->ret == -ECANCELED;
    if (j->started)
        emit_block_event(j, cancelled ? "BLOCK_JOB_CANCELLED" : "BLOCK_JOB_COMPLETED",
                         j->ret < 0 && !cancelled);
    set_status(j, JOB_CONCLUDED);
}

static void dismiss(struct job *j)
{
    set_status(j, JOB_NULL);
    unregister(j);
    mem_free(j);
}

/* What happened to each member and its bitmaps, in one. */
static co_fn int record_end(struct job_group *g, struct tide_error *err)
{
    struct store_record rec = {.outcome = {.committed = true, .failed = -1}, .changed = g->names};
    struct job *j;
    if (!g->jobs->store)
        return 0;
    TAILQ_FOREACH (j, &g->members, in_group) {
        g->names[rec.n_changed++] = (struct store_name){STORE_JOB, j->id, NULL};
        rec.n_changed += j->ops->names(j, g->names + rec.n_changed);
    }
    return store_write_record(g->jobs->store, &rec, err);
}

/* Nothing was recorded, so nothing of it may stay. */
static co_fn void fold_back(struct job_group *g, struct bitmap_pace *pace,
                            const struct tide_error *why)
{
    struct job *j;
    TAILQ_FOREACH_REVERSE(j, &g->members, job_list_head, in_group)
    {
        j->ops->fold_back(j, pace);
        if (j->ret < 0)
            continue;
        j->ret = why->code;
        job_fail(j, "its end could not be recorded: %s", why->msg);
        set_status(j, JOB_ABORTING);
    }
}

/* Commit or abort every member, and record it. Nothing that can fail comes after. */
static co_fn void decide(struct job_group *g)
{
    struct tide_error err;
    struct job *j;
    bool ok = !group_failed(g); /* from here on a cancel comes too late */
    struct io_turns turns = {graph_io(g->jobs->graph)};
    struct bitmap_pace pace = {.rest = io_turns_step, .arg = &turns};
    g->decided = true;
    if (!ok)
        cancel_rest(g);
    TAILQ_FOREACH_REVERSE(j, &g->members, job_list_head, in_group)
    {
        if (ok)
            j->ops->commit(j, &pace);
        else
            j->ops->abort(j, &pace);
    }
    if (record_end(g, &err) < 0) {
        log_warn("job", "end of job '%s': %s", TAILQ_FIRST(&g->members)->id, err.msg);
        fold_back(g, &pace, &err);
    }
}

static co_fn void finish(struct job_group *g)
{
    struct graph *graph = g->jobs->graph;
    struct jobs *js = g->jobs;
    struct job *j, *next;
    g->refs++;
    struct quiesce *q = hold_nodes(g);
    graph_effects_begin(graph);
    decide(g);
    quiesce_end(q);
    TAILQ_FOREACH (j, &g->members, in_group)
        j->ops->clean(j);
    TAILQ_FOREACH (j, &g->members, in_group)
        conclude(j);
    for (j = TAILQ_FIRST(&g->members); j; j = next) {
        next = TAILQ_NEXT(j, in_group);
        if (j->auto_dismiss)
            dismiss(j);
    }
    graph_effects_end(graph); /* queries see the end whole: bitmaps moved and jobs concluded */
    graph_unlock(graph);
    job_group_put(g);
    wake_waiters(js);
}

static void finish_entry(void *arg)
{
    finish(arg);
}

static void begin_finish(struct job_group *g);

static void finish_again(struct loop_msg *m)
{
    begin_finish((struct job_group *)((char *)m - offsetof(struct job_group, again)));
}

static void begin_finish(struct job_group *g)
{
    g->finishing = true;
    /* Its own coroutine: whoever noticed may hold the command lock. */
    if (loop_spawn(io_loop(graph_io(g->jobs->graph), 0), finish_entry, g) < 0) {
        g->again.fn = finish_again; /* no memory just now: others may give some back */
        loop_post(io_loop(graph_io(g->jobs->graph), 0), &g->again);
    }
}

static void group_pending(struct job_group *g)
{
    struct job *j;
    bool by_hand = false;
    g->pending = true;
    TAILQ_FOREACH_REVERSE(j, &g->members, job_list_head, in_group)
    set_status(j, JOB_PENDING);
    TAILQ_FOREACH (j, &g->members, in_group) {
        if (!j->auto_finalize) {
            by_hand = true;
            event_emit(g->jobs->bus, "BLOCK_JOB_PENDING",
                       json_pack("{s:s,s:s}", "type", j->ops->type, "id", j->id));
        }
    }
    if (!by_hand)
        begin_finish(g);
}

static void group_check(struct job_group *g)
{
    if (g->finishing)
        return;
    if (group_failed(g)) {
        cancel_rest(g);
        if (group_all_ended(g))
            begin_finish(g);
    } else if (group_all_ended(g)) {
        if (!g->pending)
            group_pending(g);
        else if (g->finalize)
            begin_finish(g);
    }
}

/* ------------------------------------------------------------------ running */

static void job_main(void *arg)
{
    struct job *j = arg;
    int r = j->ops->run(j);
    if (job_cancelled(j))
        r = -ECANCELED;
    if (r == -ECANCELED)
        snprintf(j->error, sizeof j->error, "Operation canceled");
    else if (r < 0 && !j->error[0])
        snprintf(j->error, sizeof j->error, "%s", tide_strerror(-r));
    if (j->status == JOB_PAUSED)
        set_status(j, JOB_RUNNING);
    j->ret = r;
    j->ended = true;
    set_status(j, r < 0 ? JOB_ABORTING : JOB_WAITING);
    group_check(j->group);
}

static void job_begin(struct job *j);

static void begin_again(struct loop_msg *m)
{
    job_begin((struct job *)((char *)m - offsetof(struct job, again)));
}

static void job_begin(struct job *j)
{
    struct loop *control = io_loop(graph_io(j->jobs->graph), 0);
    if (loop_spawn(control, job_main, j) < 0) {
        j->again.fn = begin_again; /* no memory just now: others may give some back */
        loop_post(control, &j->again);
    }
}

void job_announce(struct job *j)
{
    j->started = true;
    event_emit(j->jobs->bus, "JOB_STATUS_CHANGE",
               json_pack("{s:s,s:s}", "id", j->id, "status", "created"));
}

void job_start(struct job *j)
{
    assert(j->started);
    set_status(j, JOB_RUNNING);
    job_begin(j);
}

void job_fail(struct job *j, const char *fmt, ...)
{
    va_list ap;
    if (j->error[0])
        return; /* the first cause counts */
    va_start(ap, fmt);
    vsnprintf(j->error, sizeof j->error, fmt, ap);
    va_end(ap);
}

void job_set_parked(struct job *j, bool parked)
{
    if (parked && j->status == JOB_RUNNING)
        set_status(j, JOB_PAUSED);
    else if (!parked && j->status == JOB_PAUSED)
        set_status(j, JOB_RUNNING);
}

enum job_on_error job_io_error(struct job *j, enum job_on_error policy, bool read, int error)
{
    static const char *const words[] = {"report", "ignore", "report", "stop"};
    if (policy == JOB_ERROR_ENOSPC)
        policy = error == ENOSPC ? JOB_ERROR_STOP : JOB_ERROR_REPORT;
    event_emit(j->jobs->bus, "BLOCK_JOB_ERROR",
               json_pack("{s:s,s:s,s:s}", "device", j->id, "operation", read ? "read" : "write",
                         "action", words[policy]));
    if (policy == JOB_ERROR_STOP) {
        j->user_paused = true;
        j->io_status = error == ENOSPC ? JOB_IO_NOSPACE : JOB_IO_FAILED;
        atomic_store(&j->paused, true);
        j->ops->kick(j);
    }
    return policy;
}

/* ------------------------------------------------------------------ verbs */

int job_find(struct jobs *js, const char *id, bool block_class, struct job **out,
             struct tide_error *err)
{
    *out = lookup(js, id);
    if (*out)
        return 0;
    return block_class ? tide_fail_class(err, TIDE_DEVICE_NOT_ACTIVE, -ENOENT,
                                         "block job '%s' not found", id)
                       : tide_fail(err, -ENOENT, "job '%s' not found", id);
}

static int check_verb(struct job *j, enum job_verb v, struct tide_error *err)
{
    if (verb_states[v] & 1u << j->status)
        return 0;
    return tide_fail(err, -EPERM, "job '%s' in state '%s' cannot accept the verb '%s'", j->id,
                     status_names[j->status], verb_names[v]);
}

static void do_cancel(struct job *j)
{
    if (j->group->decided)
        return; /* its end is under way and cannot be changed */
    atomic_store(&j->cancelled, true);
    atomic_store(&j->paused, false);
    if (!j->ended) {
        j->ops->kick(j);
    } else {
        j->ret = -ECANCELED;
        snprintf(j->error, sizeof j->error, "Operation canceled");
        set_status(j, JOB_ABORTING);
        group_check(j->group);
    }
}

static int do_pause(struct job *j, struct tide_error *err)
{
    if (j->user_paused)
        return tide_fail(err, -EPERM, "job '%s' is paused already", j->id);
    j->user_paused = true;
    atomic_store(&j->paused, true);
    j->ops->kick(j);
    return 0;
}

static void do_resume(struct job *j)
{
    j->user_paused = false;
    j->io_status = JOB_IO_OK;
    atomic_store(&j->paused, false);
    j->ops->kick(j);
}

int job_apply(struct job *j, enum job_verb verb, bool force, bool block_class,
              struct tide_error *err)
{
    if (verb == JOB_RESUME && !j->user_paused)
        return tide_fail(err, -EPERM, "job '%s' was not paused", j->id);
    int r = check_verb(j, verb, err);
    if (r < 0)
        return r;
    switch (verb) {
    case JOB_CANCEL:
        if (block_class && !force && j->user_paused)
            return tide_fail(err, -EPERM, "job '%s' is paused: resume it or cancel with force",
                             j->id);
        do_cancel(j);
        return 0;
    case JOB_PAUSE:
        return do_pause(j, err);
    case JOB_RESUME:
        do_resume(j);
        return 0;
    case JOB_COMPLETE:
        return tide_fail(err, -ENOTSUP, "job '%s' of type %s cannot be completed by hand", j->id,
                         j->ops->type);
    case JOB_DISMISS:
        dismiss(j);
        return 0;
    default:
        return tide_fail(err, -EINVAL, "verb '%s' is no plain verb", verb_names[verb]);
    }
}

int job_set_speed(struct job *j, int64_t speed, struct tide_error *err)
{
    if (speed < 0)
        return tide_fail(err, -EINVAL,
                         "'speed' is negative: give bytes a second, or 0 for no limit");
    int r = check_verb(j, JOB_SET_SPEED, err);
    if (r == 0) {
        atomic_store(&j->speed, (uint64_t)speed);
        j->ops->kick(j);
    }
    return r;
}

/* The caller holds the command lock, which the end of the group needs. */
int job_finalize(struct job *j, struct tide_error *err)
{
    int r = check_verb(j, JOB_FINALIZE, err);
    if (r < 0)
        return r;
    struct jobs *js = j->jobs;
    struct job_group *g = j->group;
    g->refs++;
    g->finalize = true;
    group_check(g);
    graph_unlock(js->graph);
    spin_lock(&js->changed_lock);
    while (g->n && TAILQ_FIRST(&g->members)->status < JOB_CONCLUDED)
        co_queue_wait(&js->changed, &js->changed_lock);
    spin_unlock(&js->changed_lock);
    graph_lock(js->graph);
    job_group_put(g);
    return 0;
}

void jobs_cancel_all(struct jobs *js)
{
    struct job *j, *next;
    TAILQ_FOREACH (j, &js->list, link) {
        j->auto_dismiss = true;
        if (verb_states[JOB_CANCEL] & 1u << j->status)
            do_cancel(j);
    }
    for (j = TAILQ_FIRST(&js->list); j; j = next) {
        next = TAILQ_NEXT(j, link);
        if (j->status == JOB_CONCLUDED)
            dismiss(j);
    }
    spin_lock(&js->changed_lock);
    while (!TAILQ_EMPTY(&js->list))
        co_queue_wait(&js->changed, &js->changed_lock);
    spin_unlock(&js->changed_lock);
}

/* ------------------------------------------------------------------ queries */

static json_t *job_row(struct job *j)
{
    json_t *o =
        json_pack("{s:s,s:s,s:s,s:I,s:I}", "id", j->id, "type", j->ops->type, "status",
                  status_names[j->status], "current-progress", (json_int_t)atomic_load(&j->current),
                  "total-progress", (json_int_t)atomic_load(&j->total));
    if (o && j->ended && j->ret < 0)
        json_object_set_new(o, "error", json_string(j->error));
    return o;
}

static json_t *block_job_row(struct job *j)
{
    bool paused = j->user_paused || j->status == JOB_PAUSED;
    json_t *o = json_pack("{s:s,s:s,s:I,s:I,s:b,s:b,s:I,s:s,s:b,s:s,s:b,s:b}", "type", j->ops->type,
                          "device", j->id, "len", (json_int_t)atomic_load(&j->total), "offset",
                          (json_int_t)atomic_load(&j->current), "busy", j->status == JOB_RUNNING,
                          "paused", paused, "speed", (json_int_t)atomic_load(&j->speed),
                          "io-status", io_status_names[j->io_status], "ready",
                          j->status == JOB_READY, "status", status_names[j->status],
                          "auto-finalize", j->auto_finalize, "auto-dismiss", j->auto_dismiss);
    if (o && j->ended && j->ret < 0)
        json_object_set_new(o, "error", json_string(j->error));
    return o;
}

static json_t *rows(struct jobs *js, json_t *(*row)(struct job *))
{
    json_t *list = json_array();
    struct job *j;
    TAILQ_FOREACH (j, &js->list, link) {
        if (!list || json_array_append_new(list, row(j)) < 0) {
            json_decref(list);
            return NULL;
        }
    }
    return list;
}

json_t *jobs_query(struct jobs *js)
{
    return rows(js, job_row);
}

json_t *jobs_query_block(struct jobs *js)
{
    return rows(js, block_job_row);
}
