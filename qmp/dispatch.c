/* SPDX-License-Identifier: Apache-2.0 */
/* Checks a request (contract 1.2), finds its command, parses the arguments, takes the right lock,
 * runs it, wraps the answer. */
#include "qmp/dispatch.h"

#include <errno.h>
#include <string.h>

#include "block/inspect.h"
#include "block/node.h"
#include "qmp/instance.h"
#include "qmp/monitor.h"
#include "qmp/version.h"
#include "schema/schema.h"
#include "txn/txn.h"

/* ------------------------------------------------------------------ answers */

static json_t *error_object(const struct tide_error *err, json_t *data)
{
    json_t *e = json_pack("{s:s,s:s}", "class", tide_class_name(err->class), "desc", err->msg);
    if (!e) /* the text is not valid UTF-8: it quotes what the client sent */
        e = json_pack("{s:s,s:s}", "class", tide_class_name(err->class), "desc",
                      "the request names something that is not valid UTF-8");
    if (e && data)
        json_object_set(e, "data", data);
    return e ? json_pack("{s:o}", "error", e) : NULL;
}

json_t *qmp_parse_error(const char *why)
{
    struct tide_error err;
    tide_fail(&err, -EINVAL, "JSON parse error: %s", why);
    return error_object(&err, NULL);
}

json_t *qmp_greeting(void)
{
    return json_pack("{s:{s:{s:{s:i,s:i,s:i},s:s},s:[s]}}", "QMP", "version", "qemu", "major",
                     QMP_MAJOR, "minor", QMP_MINOR, "micro", QMP_MICRO, "package", TIDEMARK_PACKAGE,
                     "capabilities", "oob");
}

/* ------------------------------------------------------------------ the request's shape */

struct request {
    const char *name;
    bool oob;
    json_t *arguments; /* borrowed, may be NULL */
    json_t *id;        /* borrowed, may be NULL */
};

static int read_member(struct request *rq, const char *key, json_t *v, bool oob_allowed,
                       struct tide_error *err)
{
    bool oob = !strcmp(key, "exec-oob") && oob_allowed;
    if (!strcmp(key, "execute") || oob) {
        if (!json_is_string(v))
            return tide_fail(err, -EINVAL, "member '%s' must be a string", key);
        if (rq->name)
            return tide_fail(err, -EINVAL, "members 'execute' and 'exec-oob' exclude each other");
        rq->name = json_string_value(v);
        rq->oob = oob;
        return 0;
    }
    if (!strcmp(key, "arguments")) {
        if (!json_is_object(v))
            return tide_fail(err, -EINVAL, "member 'arguments' must be an object");
        rq->arguments = v;
        return 0;
    }
    if (!strcmp(key, "id"))
        return 0;
    return tide_fail(err, -EINVAL, "member '%s' of the request is unexpected",
                     shown_name(key).text);
}

static int read_request(json_t *v, struct request *rq, bool oob_allowed, struct tide_error *err)
{
    const char *key;
    json_t *member;
    if (!json_is_object(v))
        return tide_fail(err, -EINVAL, "a QMP request must be a JSON object");
    rq->id = json_object_get(v, "id");
    json_object_foreach (v, key, member) {
        int r = read_member(rq, key, member, oob_allowed, err);
        if (r < 0)
            return r;
    }
    return rq->name ? 0 : tide_fail(err, -EINVAL, "the request lacks member 'execute'");
}

/* ------------------------------------------------------------------ the command */

static const struct qmp_command *find_command(const char *name)
{
    size_t lo = 0, hi = n_qmp_commands;
    while (lo < hi) {
        size_t mid = (lo + hi) / 2;
        int c = strcmp(name, qmp_commands[mid].name);
        if (c == 0)
            return &qmp_commands[mid];
        if (c < 0)
            hi = mid;
        else
            lo = mid + 1;
    }
    return NULL;
}

static int check_state(const struct request *rq, bool negotiated, struct tide_error *err)
{
    bool is_caps = !strcmp(rq->name, "qmp_capabilities");
    if (!negotiated && !is_caps)
        return tide_fail_class(
            err, TIDE_COMMAND_NOT_FOUND, -EPERM,
            "say 'qmp_capabilities' first: capabilities negotiation is expected");
    if (negotiated && is_caps)
        return tide_fail_class(err, TIDE_COMMAND_NOT_FOUND, -EPERM,
                               "capabilities negotiation is complete already, command ignored");
    return 0;
}

static co_fn int run_action(struct qmp_call *call, const struct qmp_command *c, void *args,
                            struct tide_error *err)
{
    struct action a = {&txn_actions[c->action_kind], args, 0};
    struct txn_props props = {.plain = true, .client = call->client};
    struct txn_result res;
    int r = txn_run(&call->inst->txn, &a, 1, &props, &res, err);
    txn_result_free(&res);
    return r;
}

/* Transactions lock for themselves; so do the few commands that say so (QMP_ANYTIME). */
static co_fn int run_command(struct qmp_call *call, const struct qmp_command *c, void *args,
                             json_t **ret, struct tide_error *err)
{
    struct graph *g = call->inst->graph;
    int r;
    if (!(c->flags & (QMP_QUERY | QMP_ANYTIME)) && monitors_refusing(call->inst->monitors))
        return tide_fail(err, -ESHUTDOWN, "the daemon is ending: '%s' was not run", c->name);
    if (c->flags & QMP_ACTION)
        return run_action(call, c, args, err);
    if (c->flags & QMP_ANYTIME)
        return c->run(call, args, ret, err);
    if (c->flags & QMP_DISKS)
        graph_ask_disks(g);
    if (c->flags & QMP_QUERY) {
        graph_query_begin(g);
        r = c->run(call, args, ret, err);
        graph_query_end(g);
        return r;
    }
    if (!strcmp(c->name, "transaction"))
        return c->run(call, args, ret, err);
    graph_lock(g);
    r = c->run(call, args, ret, err);
    graph_unlock(g);
    return r;
}

static co_fn int carry_out(struct qmp_call *call, const struct request *rq, json_t **ret,
                           struct tide_error *err)
{
    struct io_turns turns = {call->inst->io};
    struct schema_steps steps = {io_turns_step, &turns};
    void *args;
    int r = check_state(rq, *call->negotiated, err);
    if (r < 0)
        return r;
    const struct qmp_command *c = find_command(rq->name);
    if (!c)
        return tide_fail_class(err, TIDE_COMMAND_NOT_FOUND, -ENOENT, "command '%s' not found",
                               shown_name(rq->name).text);
    if (rq->oob)
        return tide_fail(err, -EPERM, "command '%s' cannot run out of band: use 'execute'",
                         rq->name);
    json_t *given = rq->arguments ? json_incref(rq->arguments) : json_object();
    call->arguments = given;
    r = given ? schema_parse_in_steps(c->args, given, &call->arena, &steps, &args, err)
              : tide_fail(err, -ENOMEM, "no memory for the request");
    if (r == 0)
        r = run_command(call, c, args, ret, err);
    json_decref(given);
    return r;
}

json_t *qmp_dispatch(struct instance *inst, json_t *value, const char *client, bool *negotiated,
                     bool *oob)
{
    struct qmp_call call = {.inst = inst, .negotiated = negotiated, .oob = oob, .client = client};
    struct request rq = {0};
    struct tide_error err = {.class = TIDE_GENERIC};
    json_t *ret = NULL, *reply;
    int r = read_request(value, &rq, *oob, &err);
    if (r == 0)
        r = carry_out(&call, &rq, &ret, &err);
    if (r == 0)
        reply = json_pack("{s:o}", "return", ret ? ret : json_object());
    else
        reply = error_object(&err, call.error_data);
    if (r < 0)
        json_decref(ret);
    if (reply && rq.id)
        json_object_set(reply, "id", rq.id);
    json_decref(call.error_data);
    arena_free(&call.arena);
    return reply;
}
