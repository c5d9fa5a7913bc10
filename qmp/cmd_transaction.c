/* SPDX-License-Identifier: Apache-2.0 */
/* The command `transaction`: hands the parsed list to txn/, and makes an answer of what it says.
 * And query-transactions. */
#include <errno.h>
#include <nettle/sha2.h>
#include <string.h>

#include "base/mem.h"
#include "block/node.h"
#include "qmp/dispatch.h"
#include "qmp/instance.h"
#include "schema/handlers.h"
#include "txn/file_ids.h"
#include "txn/footprint.h"
#include "txn/history.h"

#define EXPLAIN_MAX 10000u /* dependencies in one answer */

static int no_memory(struct tide_error *err)
{
    return tide_fail(err, -ENOMEM, "no memory for the answer");
}

/* ------------------------------------------------------------------ properties */

struct hash {
    struct sha256_ctx ctx;
    struct io_turns turns;
};

static co_fn int hash_text(const char *text, size_t len, void *arg)
{
    struct hash *h = arg;
    sha256_update(&h->ctx, len, (const uint8_t *)text);
    io_turns_step(&h->turns);
    return 0;
}

/* Two lists are the same when they are the same JSON, whatever the order of members. */
static co_fn int make_digest(struct qmp_call *call, bool grouped, uint8_t *digest)
{
    struct hash h = {.turns = {call->inst->io}};
    sha256_init(&h.ctx);
    int r = json_dump_callback(json_object_get(call->arguments, "actions"), hash_text, &h,
                               JSON_COMPACT | JSON_SORT_KEYS | JSON_ENCODE_ANY);
    sha256_update(&h.ctx, 1, (const uint8_t *)(grouped ? "g" : "i"));
    sha256_digest(&h.ctx, STORE_DIGEST_SIZE, digest);
    return r;
}

static int check_properties(const struct q_transaction_properties *p, struct tide_error *err)
{
    if (p->id && (p->dry_run || p->explain))
        return tide_fail(err, -EINVAL,
                         "'%s' changes nothing that an 'id' could stand for: leave one of them out",
                         p->dry_run ? "dry-run" : "explain");
    if (p->dry_run && p->explain)
        return tide_fail(err, -EINVAL, "'dry-run' and 'explain' exclude each other");
    if (p->id && !*p->id)
        return tide_fail(err, -EINVAL, "'id' is empty: give it 1 to %u bytes", STORE_ID_MAX);
    if (p->id && strlen(p->id) > STORE_ID_MAX)
        return tide_fail(err, -EINVAL, "'id' '%s' is longer than %u bytes", shown_name(p->id).text,
                         STORE_ID_MAX);
    return 0;
}

static co_fn int take_properties(struct qmp_call *call, const struct q_transaction_properties *p,
                                 struct txn_props *props, struct tide_error *err)
{
    props->client = call->client;
    if (!p)
        return 0;
    props->grouped =
        p->has_completion_mode && p->completion_mode == Q_ACTION_COMPLETION_MODE_GROUPED;
    props->dry_run = p->has_dry_run && p->dry_run;
    props->id = p->id;
    int r = check_properties(p, err);
    if (r == 0 && p->id && make_digest(call, props->grouped, props->digest) < 0)
        r = tide_fail(err, -ENOMEM, "no memory for the request");
    return r;
}

/* ------------------------------------------------------------------ answers */

static json_t *left_row(const struct txn_result *res)
{
    json_t *row = json_array();
    for (size_t i = 0; i < res->n_left; i++)
        json_array_append_new(row, json_string(res->left[i]));
    return row;
}

static void describe_failure(struct qmp_call *call, const struct action *a,
                             const struct txn_result *res)
{
    if (res->failed < 0)
        return;
    call->error_data =
        json_pack("{s:i,s:s,s:s,s:b}", "action", res->failed, "kind", a[res->failed].entry->kind,
                  "phase", res->phase, "undone", !res->not_undone);
    if (res->not_undone && !res->replayed && call->error_data)
        json_object_set_new(call->error_data, "pending", left_row(res));
    if (res->replayed && call->error_data)
        json_object_set_new(call->error_data, "replayed", json_true());
}

static json_t *report_row(const struct action *a, const struct action_report *r,
                          const struct tide_error *err)
{
    static const char *const words[] = {"not-run", "exercised", "checked", "failed"};
    json_t *o = json_pack("{s:i,s:s,s:s}", "action", (int)a->index, "kind", a->entry->kind,
                          "outcome", words[r->outcome]);
    if (o && r->sees)
        json_object_set_new(o, "sees", json_string(r->sees));
    if (o && r->does)
        json_object_set_new(o, "does", json_string(r->does));
    if (o && r->outcome == ACTION_FAILED)
        json_object_set_new(o, "error", json_string(err->msg));
    return o;
}

/* A dry run has done its work also when the list would fail; that is what it tells. */
static co_fn int dry_answer(struct qmp_call *call, const struct action *a,
                            const struct txn_result *res, int r, json_t **ret,
                            struct tide_error *err)
{
    struct io_turns turns = {call->inst->io};
    json_t *rows = json_array();
    for (size_t i = 0; rows && i < res->n_reports; i++) {
        if (json_array_append_new(rows, report_row(&a[i], &res->report[i], err)) < 0) {
            json_decref(rows);
            return no_memory(err);
        }
        io_turns_step(&turns);
    }
    *ret = json_pack("{s:s,s:I,s:o}", "outcome", r < 0 ? "would-fail" : "would-commit", "held-ns",
                     (json_int_t)res->held_ns, "actions", rows);
    if (*ret && r < 0) {
        json_object_set_new(*ret, "error", json_string(err->msg));
        json_object_set_new(*ret, "failed-action", json_integer(res->failed));
    }
    return *ret ? 0 : no_memory(err);
}

static int run(struct qmp_call *call, const struct action *a, size_t n,
               const struct txn_props *props, json_t **ret, struct tide_error *err)
{
    struct txn_result res;
    int r = txn_run(&call->inst->txn, a, n, props, &res, err);
    if (props->dry_run && (r == 0 || res.failed >= 0)) {
        r = dry_answer(call, a, &res, r, ret, err);
    } else if (r < 0) {
        describe_failure(call, a, &res);
    } else if (props->id) {
        *ret = json_pack("{s:s,s:s}", "id", props->id, "outcome",
                         res.replayed ? "replayed" : "committed");
        /* It has happened: without memory for the rest, the answer is that it succeeded. */
    }
    txn_result_free(&res);
    return r;
}

static co_fn void add_all(struct footprint *f, const struct action *a, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        action_footprint((int)(a[i].entry - txn_actions), a[i].args, (unsigned)i, f);
        if (f->step)
            f->step(f->step_arg);
    }
}

/* Which files the list names is found out beforehand, since it takes its time. */
static co_fn int find_files(struct qmp_call *call, const struct action *a, size_t n,
                            struct footprint_lookup *l)
{
    struct io_turns turns = {call->inst->io};
    struct footprint f = {.step = io_turns_step, .step_arg = &turns};
    add_all(&f, a, n);
    l->file_key = file_ids_key;
    l->file_arg = f.no_memory ? NULL : file_ids_new(call->inst->file_questions, &f);
    footprint_free(&f);
    return l->file_arg ? 0 : -ENOMEM;
}

#define AT_ONE_GO 1000u /* actions: about a millisecond */

/* Nothing that is looked up may go meanwhile. A query keeps effects out, and whose effects are kept
 * out may hold guests already: so a long list, which is explained in turns, takes the lock that
 * others wait for before they hold anybody. */
static co_fn int explain_names(struct qmp_call *call, struct footprint *f, const struct action *a,
                               size_t n, json_t **ret)
{
    struct graph *g = call->inst->graph;
    struct io_turns turns = {call->inst->io};
    bool is_long = n > AT_ONE_GO;
    if (is_long) {
        f->step = io_turns_step;
        f->step_arg = &turns;
        graph_lock(g);
    } else {
        graph_query_begin(g);
    }
    add_all(f, a, n);
    int r = footprint_explain(f, EXPLAIN_MAX, ret);
    if (is_long)
        graph_unlock(g);
    else
        graph_query_end(g);
    return r;
}

static co_fn int explain(struct qmp_call *call, const struct action *a, size_t n, json_t **ret,
                         struct tide_error *err)
{
    struct footprint_lookup lookup = txn_lookup(&call->inst->txn);
    int r = find_files(call, a, n, &lookup);
    if (r < 0)
        return no_memory(err);
    struct footprint f = {.lookup = &lookup, .explains = true};
    r = explain_names(call, &f, a, n, ret);
    footprint_free(&f);
    file_ids_free(lookup.file_arg);
    if (r == -E2BIG)
        return tide_fail(err, r,
                         "more than %u pairs of actions depend on each other, or for more than %u "
                         "reasons: explain a part of the list",
                         EXPLAIN_MAX, EXPLAIN_MAX * EXPLAIN_WHY);
    return r < 0 ? no_memory(err) : 0;
}

int qmp_transaction(struct qmp_call *call, const struct q_transaction *args, json_t **ret,
                    struct tide_error *err)
{
    const struct q_transaction_properties *p = args->properties;
    struct txn_props props = {0};
    struct action *a = arena_alloc(&call->arena, (args->n_actions + 1) * sizeof *a);
    if (!a)
        return tide_fail(err, -ENOMEM, "no memory for a list of %zu actions", args->n_actions);
    for (size_t i = 0; i < args->n_actions; i++) {
        const struct q_transaction_action *q = &args->actions[i];
        a[i] = (struct action){&txn_actions[q->type], q->data, (unsigned)i};
    }
    int r = take_properties(call, p, &props, err);
    if (r < 0)
        return r;
    if (p && p->explain)
        return explain(call, a, args->n_actions, ret, err);
    return run(call, a, args->n_actions, &props, ret, err);
}

int qmp_query_transactions(struct qmp_call *call, const struct q_query_transactions *args,
                           json_t **ret, struct tide_error *err)
{
    *ret = history_query(call->inst->history, args->limit);
    return *ret ? 0 : no_memory(err);
}
