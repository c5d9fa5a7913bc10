/* SPDX-License-Identifier: Apache-2.0 */
/* Lists of actions: built as JSON, sent as the command `transaction`, and what the daemon answered.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>

#include "base/mem.h"
#include "lib/txn.h"

struct tide_txn {
    json_t *actions;
    int bad; /* what the first addition that failed returned; 0: none has */
    bool grouped, dry_run;
    char *id; /* or NULL */

    /* Of the last run: */
    struct tide_error err; /* code 0: none */
    json_t *reply, *data;  /* what the daemon returned; the data of its refusal; or NULL */
};

struct tide_txn *tide_txn_new(void)
{
    struct tide_txn *txn = mem_zalloc(sizeof *txn);
    if (!txn)
        return NULL;
    txn->actions = json_array();
    if (txn->actions)
        return txn;
    mem_free(txn);
    return NULL;
}

static void forget(struct tide_txn *txn)
{
    json_decref(txn->reply);
    json_decref(txn->data);
    txn->reply = txn->data = NULL;
    txn->err = (struct tide_error){0};
}

void tide_txn_free(struct tide_txn *txn)
{
    if (!txn)
        return;
    forget(txn);
    json_decref(txn->actions);
    mem_free(txn->id);
    mem_free(txn);
}

/* ------------------------------------------------------------------ building */

/* An addition has failed: so will the run. The first error stays. */
static int bad(struct tide_txn *txn, const struct tide_error *err)
{
    if (txn->bad)
        return err->code;
    forget(txn);
    txn->err = *err;
    return txn->bad = err->code;
}

static int append(struct tide_txn *txn, json_t *action)
{
    struct tide_error err;
    if (action && json_array_append_new(txn->actions, action) == 0)
        return 0;
    tide_fail(&err, -ENOMEM, "no memory for action %zu", json_array_size(txn->actions));
    return bad(txn, &err);
}

int txn_add(struct tide_txn *txn, const char *kind, const struct schema_type *type,
            const void *args)
{
    struct tide_error err;
    json_t *data = NULL;
    if (!txn)
        return -ENOMEM;
    int r = args ? schema_unparse(type, args, &data, &err)
                 : tide_fail(&err, -EINVAL, "no arguments are given");
    if (r < 0) {
        tide_error_prefix(&err, "action %zu (%s): ", json_array_size(txn->actions), kind);
        return bad(txn, &err);
    }
    return append(txn, json_pack("{s:s, s:o}", "type", kind, "data", data));
}

int tide_txn_json(struct tide_txn *txn, const char *text)
{
    struct tide_error err;
    json_error_t why;
    json_t *action;
    size_t i;
    if (!txn)
        return -ENOMEM;
    json_t *v = text ? json_loads(text, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &why) : NULL;
    if (!v) {
        tide_fail(&err, -EINVAL, "action %zu is no JSON: %s", json_array_size(txn->actions),
                  text ? why.text : "there is no text");
        return bad(txn, &err);
    }
    if (json_is_object(v))
        return append(txn, v);
    int r = 0;
    json_array_foreach (v, i, action) {
        r = append(txn, json_incref(action));
        if (r < 0)
            break;
    }
    json_decref(v);
    return r;
}

size_t tide_txn_length(const struct tide_txn *txn)
{
    return txn ? json_array_size(txn->actions) : 0;
}

void tide_txn_set_grouped(struct tide_txn *txn, bool grouped)
{
    if (txn)
        txn->grouped = grouped;
}

void tide_txn_set_dry_run(struct tide_txn *txn, bool dry_run)
{
    if (txn)
        txn->dry_run = dry_run;
}

int tide_txn_set_id(struct tide_txn *txn, const char *id)
{
    struct tide_error err;
    if (!txn)
        return -ENOMEM;
    char *copy = NULL;
    if (id) {
        copy = mem_strdup(id);
        if (!copy) {
            tide_fail(&err, -ENOMEM, "no memory for the id");
            return bad(txn, &err);
        }
    }
    mem_free(txn->id);
    txn->id = copy;
    return 0;
}

int tide_txn_choose_id(struct tide_txn *txn)
{
    struct tide_error err;
    uint64_t n[2];
    char id[64];
    if (!txn)
        return -ENOMEM;
    if (getrandom(n, sizeof n, 0) != sizeof n) {
        tide_fail(&err, -EAGAIN, "cannot get random bytes for an id");
        return bad(txn, &err);
    }
    snprintf(id, sizeof id, "tidemark-%016" PRIx64 "%016" PRIx64, n[0], n[1]);
    return tide_txn_set_id(txn, id);
}

const char *tide_txn_id(const struct tide_txn *txn)
{
    return txn ? txn->id : NULL;
}

/* ------------------------------------------------------------------ running */

static json_t *request(struct tide_txn *txn)
{
    json_t *properties = json_pack("{s:s*, s:s*}", "completion-mode",
                                   txn->grouped ? "grouped" : NULL, "id", txn->id);
    if (properties && txn->dry_run && json_object_set_new(properties, "dry-run", json_true()) < 0) {
        json_decref(properties);
        properties = NULL;
    }
    if (!properties)
        return NULL;
    if (json_object_size(properties) > 0)
        return json_pack("{s:O, s:o}", "actions", txn->actions, "properties", properties);
    json_decref(properties); /* a daemon of others may not know any */
    return json_pack("{s:O}", "actions", txn->actions);
}

int tide_txn_run(struct tide_txn *txn, struct tide_conn *conn)
{
    if (!txn)
        return -ENOMEM;
    if (txn->bad)
        return txn->bad;
    forget(txn);
    if (!conn)
        return tide_fail(&txn->err, -ENOMEM, "no memory for a connection");
    json_t *id = txn->id ? json_string(txn->id) : json_null();
    if (!id)
        return tide_fail(&txn->err, -EINVAL, "the id is no valid UTF-8 text");
    json_decref(id);
    json_t *arguments = request(txn);
    if (!arguments)
        return tide_fail(&txn->err, -ENOMEM, "no memory for the request");
    int r = conn_send(conn, "transaction", arguments, &txn->reply, &txn->data);
    txn->err = conn->err;
    return r;
}

/* ------------------------------------------------------------------ what became of it */

const char *tide_txn_error(const struct tide_txn *txn)
{
    if (!txn)
        return "no memory";
    const char *dry = json_string_value(json_object_get(txn->reply, "error"));
    return txn->err.code ? txn->err.msg : dry ? dry : "";
}

const char *tide_txn_error_class(const struct tide_txn *txn)
{
    return txn && txn->err.code == CLIENT_REFUSED ? tide_class_name(txn->err.class) : "";
}

int tide_txn_failed_action(const struct tide_txn *txn)
{
    json_t *dry = txn ? json_object_get(txn->reply, "failed-action") : NULL;
    json_t *index = dry ? dry : txn ? json_object_get(txn->data, "action") : NULL;
    json_int_t i = json_is_integer(index) ? json_integer_value(index) : -1;
    return i >= 0 && (size_t)i < json_array_size(txn->actions) ? (int)i : -1;
}

const char *tide_txn_failed_kind(const struct tide_txn *txn)
{
    int i = tide_txn_failed_action(txn);
    json_t *action = i < 0 ? NULL : json_array_get(txn->actions, (size_t)i);
    return json_string_value(json_object_get(action, "type"));
}

const char *tide_txn_failed_phase(const struct tide_txn *txn)
{
    return txn ? json_string_value(json_object_get(txn->data, "phase")) : NULL;
}

bool tide_txn_undone(const struct tide_txn *txn)
{
    return txn && txn->err.code == CLIENT_REFUSED &&
           !json_is_false(json_object_get(txn->data, "undone"));
}

bool tide_txn_replayed(const struct tide_txn *txn)
{
    if (!txn)
        return false;
    const char *outcome = json_string_value(json_object_get(txn->reply, "outcome"));
    return json_is_true(json_object_get(txn->data, "replayed")) ||
           (outcome && strcmp(outcome, "replayed") == 0);
}

bool tide_txn_would_commit(const struct tide_txn *txn)
{
    const char *outcome = txn ? json_string_value(json_object_get(txn->reply, "outcome")) : NULL;
    return outcome && strcmp(outcome, "would-commit") == 0;
}

uint64_t tide_txn_held_ns(const struct tide_txn *txn)
{
    json_int_t n = txn ? json_integer_value(json_object_get(txn->reply, "held-ns")) : 0;
    return n > 0 ? (uint64_t)n : 0;
}

static const char *report(const struct tide_txn *txn, size_t i, const char *member)
{
    json_t *rows = txn ? json_object_get(txn->reply, "actions") : NULL;
    return json_string_value(json_object_get(json_array_get(rows, i), member));
}

const char *tide_txn_report_outcome(const struct tide_txn *txn, size_t i)
{
    return report(txn, i, "outcome");
}

const char *tide_txn_report_sees(const struct tide_txn *txn, size_t i)
{
    return report(txn, i, "sees");
}

const char *tide_txn_report_does(const struct tide_txn *txn, size_t i)
{
    return report(txn, i, "does");
}
