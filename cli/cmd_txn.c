/* SPDX-License-Identifier: Apache-2.0 */
/* txn run, check, explain, log: lists of actions of which all happen or none. */
#include "base/mem.h"
#include "cli/cli.h"
#include "cli/size.h"
#include "cli/table.h"
#include "cli/txn_text.h"
#include "cli/txn_verbs.h"
#include "cli/view.h"
#include "schema/types.h"
#include "txn/footprint.h"
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#define EXPLAIN_MAX 1000000u /* dependencies */
#define RECONNECT_MS 100

/* ---- the list ---- */

#define LIST_MAX ((size_t)64 << 20) /* of one QMP message, so of the list in it */

static int read_all(const char *path, char **text, size_t *len, struct tide_error *err)
{
    int fd = strcmp(path, "-") == 0 ? STDIN_FILENO : open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return tide_fail(err, -errno, "cannot open '%s': %s", path, tide_strerror(errno));
    ssize_t n = 1;
    *text = NULL;
    *len = 0;
    for (size_t size = 0; n > 0 && *len <= LIST_MAX;) {
        if (size - *len < 65536) {
            size = size ? size * 2 : 131072;
            *text = cli_grow(*text, size, 1);
        }
        n = read(fd, *text + *len, size - *len);
        if (n < 0 && errno == EINTR)
            n = 1;
        else if (n > 0)
            *len += (size_t)n;
    }
    int r = n < 0 ? tide_fail(err, -errno, "cannot read '%s': %s", path, tide_strerror(errno)) : 0;
    if (r == 0 && *len > LIST_MAX)
        r = tide_fail(err, -EFBIG, "'%s' is longer than %zu MiB: no daemon takes such a list", path,
                      LIST_MAX >> 20);
    if (fd != STDIN_FILENO)
        close(fd);
    return r;
}

static int read_list(const struct cli *c, struct txn_list *list)
{
    struct tide_error err;
    char *text = NULL;
    size_t len = 0;
    int r = read_all(c->args[0], &text, &len, &err);
    if (r == 0)
        r = txn_list_parse(c->args[0], text, len, list, &err);
    mem_free(text);
    return r < 0 ? cli_fail(&err) : CLI_DONE;
}

/* Sets a property; those given as options win over the file's. */
static void set_property(struct txn_list *list, const char *name, json_t *value)
{
    if (!list->properties)
        list->properties = cli_pack("{}");
    json_object_set_new(list->properties, name, value);
}

static json_t *request_of(const struct txn_list *list)
{
    return cli_pack("{s:O, s:O*}", "actions", list->actions, "properties", list->properties);
}

/* "'list', line 4, action 1 (clear disk1/b0)": where an action stands; actions count from 0. */
static char *place_of(const struct cli *c, const struct txn_list *list, size_t i)
{
    mem_autofree char *text = txn_action_text(json_array_get(list->actions, i));
    if (list->lines)
        return cli_printf("'%s', line %u, action %zu (%.200s)", c->args[0], list->lines[i], i,
                          text);
    return cli_printf("'%s', action %zu (%.200s)", c->args[0], i, text);
}

/* Prints why the daemon refused a list: which action it was, and what is left of the others. */
static int refused(struct cli *c, const struct txn_list *list, const struct tide_error *err)
{
    const json_t *data = client_error_data(c->client);
    json_t *index = json_object_get(data, "action");
    size_t i = (size_t)json_integer_value(index);
    if (err->code != CLIENT_REFUSED)
        return cli_fail(err);
    if (!json_is_integer(index) || i >= json_array_size(list->actions)) {
        cli_error("%s", err->msg);
    } else {
        mem_autofree char *place = place_of(c, list, i);
        cli_error("%s: %s", place, err->msg);
    }
    if (json_is_false(json_object_get(data, "undone")))
        cli_hint("somebody else stood in the way of undoing all of it; what is left is said above, "
                 "everything else is as it was");
    else if (json_is_true(json_object_get(data, "replayed")))
        cli_hint("this is what became of the list when its id was first sent: nothing was changed "
                 "then, and nothing was run now");
    else
        cli_hint("nothing was changed: what the actions before it did was undone");
    return CLI_FAILED;
}

/* ---- run ---- */

static int64_t now_ms(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

/* An id that nobody else has. */
static char *new_id(void)
{
    uint64_t n[2];
    if (getrandom(n, sizeof n, 0) != sizeof n)
        return NULL;
    return cli_printf("tidemark-%016" PRIx64 "%016" PRIx64, n[0], n[1]);
}

/* Connects again until the time is over. */
static int reconnect(struct cli *c, int64_t deadline, struct tide_error *err)
{
    client_close(c->client);
    c->client = NULL;
    int r;
    while ((r = client_open(c->socket, &c->client, err)) == CLIENT_UNREACHABLE &&
           now_ms() < deadline)
        poll(NULL, 0, RECONNECT_MS); /* nothing tells when a daemon comes back */
    return r;
}

/* Sends the list; with an id, again and again if the connection is lost before the answer: the
 * daemon runs what it has not run, and tells the outcome of what it has. */
static int send_list(struct cli *c, const struct txn_list *list, int64_t retry_ms, json_t **reply,
                     struct tide_error *err)
{
    int64_t deadline = now_ms() + retry_ms;
    for (;;) {
        int r = client_call(c->client, "transaction", request_of(list), reply, err);
        if (r != CLIENT_UNREACHABLE || retry_ms == 0 || now_ms() >= deadline)
            return r;
        struct tide_error again;
        if (reconnect(c, deadline, &again) < 0)
            return r;
    }
}

static int parse_seconds(const struct cli *c, const char *text, int64_t *ms)
{
    char *end;
    errno = 0;
    long n = strtol(text, &end, 10);
    if (end == text || *end || errno || n < 1 || n > 86400)
        return cli_usage(c, "--retry takes seconds from 1 to 86400, not '%s'", text);
    *ms = n * 1000;
    return CLI_DONE;
}

static int take_run_options(const struct cli *c, struct txn_list *list, int64_t *retry_ms)
{
    const char *retry = cli_option(c, "retry"), *id = cli_option(c, "id");
    *retry_ms = 0;
    if (retry && parse_seconds(c, retry, retry_ms) != CLI_DONE)
        return CLI_USAGE;
    if (cli_option(c, "grouped"))
        set_property(list, "completion-mode", cli_pack("s", "grouped"));
    if (id)
        set_property(list, "id", cli_pack("s", id));
    if (retry && !json_object_get(list->properties, "id")) {
        mem_autofree char *chosen = new_id();
        if (!chosen) {
            cli_error("cannot get random bytes: %s", tide_strerror(errno));
            return CLI_FAILED;
        }
        set_property(list, "id", cli_pack("s", chosen));
    }
    return CLI_DONE;
}

static void hint_lost(const struct cli *c, const struct txn_list *list)
{
    const char *id = view_string(list->properties, "id", NULL);
    if (id)
        cli_hint(
            "whether it was carried out is not known: run it again with --id '%s', it is never "
            "carried out twice while the daemon lives",
            id);
    else
        cli_hint(
            "whether it was carried out is not known: 'tidemark txn log' may tell; with --retry "
            "it is sent again, and never carried out twice");
}

static int print_done(struct cli *c, const struct txn_list *list, const json_t *reply)
{
    size_t n = json_array_size(list->actions);
    const char *id = view_string(list->properties, "id", NULL);
    const char *outcome = json_string_value(json_object_get(reply, "outcome"));
    if (c->json)
        return cli_print_json(
            cli_pack("{s:i, s:s*, s:s*}", "actions", (int)n, "id", id, "outcome", outcome));
    if (outcome && strcmp(outcome, "replayed") == 0)
        printf("%zu action%s done before, under the same id\n", n, n == 1 ? "" : "s");
    else
        printf("%zu action%s done\n", n, n == 1 ? "" : "s");
    return CLI_DONE;
}

static int run_list(struct cli *c, const struct txn_list *list, int64_t retry_ms)
{
    struct tide_error err;
    json_t *reply;
    int code = cli_connect(c);
    if (code != CLI_DONE)
        return code;
    int r = send_list(c, list, retry_ms, &reply, &err);
    if (r == 0)
        code = print_done(c, list, reply);
    else if (r == CLIENT_REFUSED)
        return refused(c, list, &err);
    else
        code = cli_fail(&err);
    if (r < 0)
        hint_lost(c, list);
    json_decref(reply);
    return code;
}

int cmd_txn_run(struct cli *c)
{
    struct txn_list list;
    int64_t retry_ms;
    int code = read_list(c, &list);
    if (code != CLI_DONE)
        return code;
    code = take_run_options(c, &list, &retry_ms);
    if (code == CLI_DONE)
        code = run_list(c, &list, retry_ms);
    txn_list_free(&list);
    return code;
}

/* ---- check ---- */

static void print_report(struct cli *c, const struct txn_list *list, json_t *reply)
{
    static const char *const heads[] = {">#", "ACTION", "OUTCOME", "SEES", "DOES"};
    struct table t;
    json_t *row;
    size_t i;
    table_init(&t, heads, sizeof heads / sizeof *heads);
    json_array_foreach (json_object_get(reply, "actions"), i, row) {
        size_t at = view_number(row, "action");
        char number[24];
        snprintf(number, sizeof number, "%zu", at);
        mem_autofree char *text = txn_action_text(json_array_get(list->actions, at));
        table_row(&t, number, text, view_string(row, "outcome", ""), view_string(row, "sees", ""),
                  view_string(row, "does", ""));
    }
    table_print(&t, stdout, c->color, "no actions");
    table_fini(&t);
}

static int print_check(struct cli *c, const struct txn_list *list, json_t *reply)
{
    bool good = strcmp(view_string(reply, "outcome", ""), "would-commit") == 0;
    if (c->json)
        return cli_print_json(json_incref(reply)) == CLI_DONE && good ? CLI_DONE : CLI_FAILED;
    print_report(c, list, reply);
    if (good) {
        printf("\nit would be carried out; guests were held for %.3f ms\n",
               (double)view_number(reply, "held-ns") / 1e6);
        return CLI_DONE;
    }
    json_t *index = json_object_get(reply, "failed-action");
    size_t i = (size_t)json_integer_value(index);
    mem_autofree char *place = json_is_integer(index) && i < json_array_size(list->actions)
                                   ? place_of(c, list, i)
                                   : cli_printf("'%s'", c->args[0]);
    fflush(stdout);
    cli_error("%s would fail: %s", place, view_string(reply, "error", "without words"));
    return CLI_FAILED;
}

static int check_list(struct cli *c, struct txn_list *list)
{
    struct tide_error err;
    json_t *reply;
    int code = cli_connect(c);
    if (code != CLI_DONE)
        return code;
    if (cli_option(c, "grouped"))
        set_property(list, "completion-mode", cli_pack("s", "grouped"));
    set_property(list, "dry-run", json_true());
    json_object_del(list->properties, "id"); /* nothing happens that it could stand for */
    if (client_call(c->client, "transaction", request_of(list), &reply, &err) < 0)
        return refused(c, list, &err);
    code = print_check(c, list, reply);
    json_decref(reply);
    return code;
}

int cmd_txn_check(struct cli *c)
{
    struct txn_list list;
    int code = read_list(c, &list);
    if (code != CLI_DONE)
        return code;
    code = check_list(c, &list);
    txn_list_free(&list);
    return code;
}

/* ---- explain ---- */

/* Without a daemon: by the arguments alone. */
static int explain_here(struct cli *c, const struct txn_list *list, json_t **out)
{
    struct arena arena = {0};
    struct footprint f = {.explains = true};
    struct tide_error err;
    json_t *action;
    size_t i;
    int r = 0;
    json_array_foreach (list->actions, i, action) {
        void *parsed;
        r = schema_parse(&q_transaction_action_type, action, &arena, 0, &parsed, &err);
        if (r < 0) {
            mem_autofree char *place = place_of(c, list, i);
            cli_error("%s: %s", place, err.msg);
            break;
        }
        const struct q_transaction_action *a = parsed;
        action_footprint((int)a->type, a->data, (unsigned)i, &f);
    }
    if (r == 0) {
        r = footprint_explain(&f, EXPLAIN_MAX, out);
        if (r == -E2BIG)
            cli_error("more than %u pairs of actions depend on each other, or for more than %u "
                      "reasons: explain a part of the list",
                      EXPLAIN_MAX, EXPLAIN_MAX * EXPLAIN_WHY);
        else if (r < 0)
            cli_error("out of memory");
    }
    footprint_free(&f);
    arena_free(&arena);
    return r < 0 ? CLI_FAILED : CLI_DONE;
}

static int explain_there(struct cli *c, struct txn_list *list, json_t **out)
{
    struct tide_error err;
    int code = cli_connect(c);
    if (code != CLI_DONE)
        return code;
    set_property(list, "explain", json_true());
    json_object_del(list->properties, "id");
    if (client_call(c->client, "transaction", request_of(list), out, &err) < 0)
        return refused(c, list, &err);
    return CLI_DONE;
}

/* "7 reads it" */
static void print_cause(const json_t *edge, const json_t *cause)
{
    int on = (int)view_number((json_t *)edge, "on"),
        me = (int)view_number((json_t *)edge, "action");
    mem_autofree char *name = text_clean(cli_strdup(view_string((json_t *)cause, "name", "?")));
    printf("     after %d: %s: %d %s, %d %s\n", on, name, on,
           view_string((json_t *)cause, "before", "?"), me,
           view_string((json_t *)cause, "after", "?"));
}

/* Neighbours without an edge between them. */
static void print_swaps(const struct txn_list *list, json_t *edges)
{
    size_t n = json_array_size(list->actions), i, found = 0;
    bool *tied = cli_alloc(n + 1, sizeof *tied);
    json_t *edge;
    json_array_foreach (edges, i, edge) {
        size_t me = view_number(edge, "action");
        if (me < n && view_number(edge, "on") + 1 == me)
            tied[me] = true;
    }
    printf("\nneighbours that may be swapped:");
    for (i = 1; i < n; i++) {
        if (!tied[i])
            printf("%s %zu and %zu", found++ ? "," : "", i - 1, i);
    }
    printf("%s\n", found ? "" : " none");
    mem_free(tied);
}

static void print_holds(json_t *holds)
{
    json_t *h;
    size_t i;
    printf("held meanwhile:");
    json_array_foreach (holds, i, h) {
        const char *node = view_string(h, "node", NULL);
        mem_autofree char *name =
            text_clean(cli_strdup(node ? node : view_string(h, "export", "?")));
        bool all = strcmp(view_string(h, "requests", ""), "all") == 0;
        printf("%s %s'%s' (%s)", i ? "," : "", node ? "node " : "the node of export ", name,
               all ? "all requests" : "writes");
    }
    printf("%s\n", json_array_size(holds) ? "" : " nothing");
}

static void print_graph(const struct txn_list *list, json_t *graph)
{
    json_t *edges = json_object_get(graph, "dependencies"), *action, *cause;
    size_t i, k, next = 0;
    json_array_foreach (list->actions, i, action) {
        mem_autofree char *text = text_clean(txn_action_text(action));
        printf("%3zu  %s\n", i, text);
        /* Edges come in order of the later action. */
        for (; next < json_array_size(edges); next++) {
            json_t *edge = json_array_get(edges, next);
            if (view_number(edge, "action") != i)
                break;
            json_array_foreach (json_object_get(edge, "because"), k, cause)
                print_cause(edge, cause);
        }
    }
    print_swaps(list, edges);
    print_holds(json_object_get(graph, "holds"));
}

/* ---- explain --dot ---- */

static void print_dot_text(const char *text)
{
    mem_autofree char *clean = text_clean(cli_strdup(text));
    for (const char *p = clean; *p; p++) {
        if (*p == '"' || *p == '\\')
            putchar('\\');
        putchar(*p);
    }
}

static void print_dot(const struct txn_list *list, json_t *graph)
{
    json_t *edge, *action, *cause;
    size_t i, k;
    printf("digraph transaction {\n    node [shape=box];\n");
    json_array_foreach (list->actions, i, action) {
        mem_autofree char *text = txn_action_text(action);
        printf("    a%zu [label=\"%zu: ", i, i);
        print_dot_text(text);
        printf("\"];\n");
    }
    json_array_foreach (json_object_get(graph, "dependencies"), i, edge) {
        printf("    a%" PRIu64 " -> a%" PRIu64 " [label=\"", view_number(edge, "on"),
               view_number(edge, "action"));
        json_array_foreach (json_object_get(edge, "because"), k, cause) {
            printf("%s", k ? "\\n" : "");
            print_dot_text(view_string(cause, "name", "?"));
        }
        printf("\"];\n");
    }
    printf("}\n");
}

static int explain_list(struct cli *c, struct txn_list *list)
{
    json_t *graph = NULL;
    bool dot = cli_option(c, "dot");
    if (dot && c->json)
        return cli_usage(c, "--dot and --json exclude each other");
    int code =
        cli_option(c, "socket") ? explain_there(c, list, &graph) : explain_here(c, list, &graph);
    if (code != CLI_DONE)
        return code;
    if (c->json)
        code = cli_print_json(json_incref(graph));
    else if (dot)
        print_dot(list, graph);
    else
        print_graph(list, graph);
    json_decref(graph);
    return code;
}

int cmd_txn_explain(struct cli *c)
{
    struct txn_list list;
    int code = read_list(c, &list);
    if (code != CLI_DONE)
        return code;
    code = explain_list(c, &list);
    txn_list_free(&list);
    return code;
}

/* ---- log ---- */

static char *time_text(json_t *t)
{
    json_t *at = json_object_get(t, "time");
    time_t seconds = (time_t)json_integer_value(json_object_get(at, "seconds"));
    struct tm tm;
    char text[40];
    if (seconds < 0 || !localtime_r(&seconds, &tm) ||
        !strftime(text, sizeof text, "%Y-%m-%d %H:%M:%S", &tm))
        return cli_strdup("unknown");
    return cli_printf("%s.%03d", text, (int)(view_number(at, "microseconds") / 1000));
}

/* "3: add, merge, clear" */
static char *actions_text(json_t *t)
{
    json_t *kinds = json_object_get(t, "actions"), *v;
    size_t i, n = view_number(t, "n-actions");
    char *text =
        cli_printf("%s%zu", json_is_true(json_object_get(t, "plain")) ? "command, " : "", n);
    json_array_foreach (kinds, i, v) {
        const char *kind = json_string_value(v) ? json_string_value(v) : "?";
        const struct txn_verb *verb = txn_verb_of_kind(kind);
        bool cut = i == 6 && n > 6;
        char *longer = cli_printf("%s%s%s", text, i ? ", " : ": ",
                                  cut    ? "..."
                                  : verb ? verb->word
                                         : kind);
        mem_free(text);
        text = longer;
        if (cut)
            break;
    }
    return text;
}

static char *outcome_text(json_t *t)
{
    const char *outcome = view_string(t, "outcome", "?"), *error = view_string(t, "error", NULL);
    json_t *failed = json_object_get(t, "failed-action");
    if (!error)
        return cli_strdup(outcome);
    if (!json_is_integer(failed))
        return cli_printf("%s: %s", outcome, error);
    return cli_printf("%s, action %" JSON_INTEGER_FORMAT ": %s", outcome,
                      json_integer_value(failed), error);
}

static void log_row(struct table *t, json_t *row)
{
    char number[24], held[32];
    snprintf(number, sizeof number, "%" PRIu64, view_number(row, "number"));
    snprintf(held, sizeof held, "%.3f ms", (double)view_number(row, "held-ns") / 1e6);
    mem_autofree char *when = time_text(row), *actions = actions_text(row),
                      *outcome = outcome_text(row);
    table_row(t, number, when, view_string(row, "client", ""), view_string(row, "id", ""), held,
              actions, outcome);
}

/* The daemon answers newest first; a log ends with what is new. */
static int print_log(struct cli *c, json_t *list)
{
    static const char *const heads[] = {">#",    "TIME",    "CLIENT", "ID",
                                        ">HELD", "ACTIONS", "OUTCOME"};
    struct table t;
    json_t *turned = cli_pack("[]");
    table_init(&t, heads, sizeof heads / sizeof *heads);
    for (size_t i = json_array_size(list); i-- > 0;) {
        json_array_append(turned, json_array_get(list, i));
        log_row(&t, json_array_get(list, i));
    }
    int code = CLI_DONE;
    if (c->json)
        code = cli_print_json(json_incref(turned));
    else
        table_print(&t, stdout, c->color, "no transactions yet");
    table_fini(&t);
    json_decref(turned);
    return code;
}

int cmd_txn_log(struct cli *c)
{
    struct tide_error err;
    json_t *list, *args = NULL;
    const char *limit = cli_option(c, "limit");
    if (limit) {
        uint64_t n;
        if (size_parse(limit, &n, &err) < 0 || n < 1 || n > UINT32_MAX)
            return cli_usage(c, "--limit takes a number from 1 on, not '%s'", limit);
        args = cli_pack("{s:I}", "limit", (json_int_t)n);
    }
    int code = cli_connect(c);
    if (code != CLI_DONE) {
        json_decref(args);
        return code;
    }
    if (client_call(c->client, "query-transactions", args, &list, &err) < 0) {
        code = cli_fail(&err);
        if (client_unknown_command(&err))
            cli_hint("only tidemarkd keeps a log of transactions");
        return code;
    }
    code = print_log(c, list);
    json_decref(list);
    return code;
}
