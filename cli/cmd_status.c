/* SPDX-License-Identifier: Apache-2.0 */
/* status, node ls, export ls: what the daemon has. */
#include "base/mem.h"
#include "cli/cli.h"
#include "cli/size.h"
#include "cli/table.h"
#include "cli/view.h"
#include <inttypes.h>
#include <string.h>

#define N_COLS(heads) (sizeof(heads) / sizeof *(heads))

/* ---- nodes ---- */

static json_t *nodes_json(json_t *nodes)
{
    json_t *list = cli_pack("[]");
    size_t i;
    json_t *n;
    json_array_foreach (nodes, i, n)
        json_array_append_new(
            list, cli_pack("{s:s, s:s, s:I, s:b, s:s, s:i}", "node",
                           view_string(n, "node-name", ""), "driver", view_string(n, "drv", ""),
                           "size", (json_int_t)view_size(n), "read-only", (int)view_true(n, "ro"),
                           "file", view_file(n), "bitmaps", (int)json_array_size(view_bitmaps(n))));
    return list;
}

static void nodes_table(json_t *nodes, bool color)
{
    static const char *const heads[] = {"NODE", "DRIVER", ">SIZE", "MODE", ">BITMAPS", "FILE"};
    struct table t;
    table_init(&t, heads, N_COLS(heads));
    size_t i;
    json_t *n;
    json_array_foreach (nodes, i, n) {
        char bitmaps[24];
        snprintf(bitmaps, sizeof bitmaps, "%zu", json_array_size(view_bitmaps(n)));
        table_row(&t, view_string(n, "node-name", ""), view_string(n, "drv", ""),
                  size_text(view_size(n)).s, view_true(n, "ro") ? "read-only" : "writable", bitmaps,
                  view_file(n));
    }
    table_print(&t, stdout, color, "no nodes");
    table_fini(&t);
}

int cmd_node_ls(struct cli *c)
{
    struct tide_error err;
    json_t *nodes;
    int code = cli_connect(c);
    if (code != CLI_DONE)
        return code;
    if (view_nodes(c->client, &nodes, &err) < 0)
        return cli_fail(&err);
    if (c->json)
        code = cli_print_json(nodes_json(nodes));
    else
        nodes_table(nodes, c->color);
    json_decref(nodes);
    return code;
}

/* ---- exports ---- */

static json_t *exports_json(json_t *exports)
{
    json_t *list = cli_pack("[]");
    for (size_t i = json_array_size(exports); i-- > 0;) {
        json_t *e = json_array_get(exports, i);
        json_array_append_new(
            list, cli_pack("{s:s, s:s, s:s, s:b}", "export", view_string(e, "id", ""), "type",
                           view_string(e, "type", ""), "node", view_string(e, "node-name", ""),
                           "shutting-down", (int)view_true(e, "shutting-down")));
    }
    return list;
}

static void exports_table(json_t *exports, bool color)
{
    static const char *const heads[] = {"EXPORT", "TYPE", "NODE", "STATE"};
    struct table t;
    table_init(&t, heads, N_COLS(heads));
    for (size_t i = json_array_size(exports); i-- > 0;) {
        json_t *e = json_array_get(exports, i);
        table_row(&t, view_string(e, "id", ""), view_string(e, "type", ""),
                  view_string(e, "node-name", ""),
                  view_true(e, "shutting-down") ? "closing" : "open");
    }
    table_print(&t, stdout, color, "no exports");
    table_fini(&t);
}

int cmd_export_ls(struct cli *c)
{
    struct tide_error err;
    json_t *exports;
    int code = cli_connect(c);
    if (code != CLI_DONE)
        return code;
    if (client_call(c->client, "query-block-exports", NULL, &exports, &err) < 0)
        return cli_fail(&err);
    if (c->json)
        code = cli_print_json(exports_json(exports));
    else
        exports_table(exports, c->color);
    json_decref(exports);
    return code;
}

/* ---- status ---- */

struct status {
    json_t *daemon; /* what query-tidemark says; NULL from another daemon */
    json_t *version, *nodes, *exports, *jobs;
};

static int ask(struct client *c, struct status *s, struct tide_error *err)
{
    int r = client_call(c, "query-tidemark", NULL, &s->daemon, err);
    if (r < 0 && !client_unknown_command(err))
        return r;
    r = client_call(c, "query-version", NULL, &s->version, err);
    if (r == 0)
        r = view_nodes(c, &s->nodes, err);
    if (r == 0)
        r = client_call(c, "query-block-exports", NULL, &s->exports, err);
    if (r == 0)
        r = client_call(c, "query-jobs", NULL, &s->jobs, err);
    return r;
}

/* One line of what the daemon says about itself; what is neither a scalar nor a list of words is
 * left to --json. */
static void print_fact(const char *key, json_t *v)
{
    mem_autofree char *text = NULL;
    if (json_is_string(v))
        text = cli_strdup(json_string_value(v));
    else if (json_is_integer(v))
        text = cli_printf("%" JSON_INTEGER_FORMAT, json_integer_value(v));
    else if (json_is_boolean(v))
        text = cli_strdup(json_is_true(v) ? "yes" : "no");
    for (size_t i = 0; i < json_array_size(v); i++) {
        const char *word = json_string_value(json_array_get(v, i));
        char *longer = cli_printf("%s%s%s", text ? text : "", text ? ", " : "", word ? word : "?");
        mem_free(text);
        text = longer;
    }
    if (!text)
        return;
    mem_autofree char *name = cli_printf("%s:", key);
    printf("%-12s %s\n", text_clean(name), text_clean(text));
}

static void print_daemon(const struct status *s)
{
    const char *key;
    json_t *v;
    json_object_foreach (s->daemon, key, v) {
        print_fact(key, v);
    }
    if (s->daemon)
        return;
    json_t *q = json_object_get(s->version, "qemu");
    printf("%-12s a QEMU daemon, version %" PRIu64 ".%" PRIu64 ".%" PRIu64 "\n",
           "daemon:", view_number(q, "major"), view_number(q, "minor"), view_number(q, "micro"));
}

static void print_status(const struct status *s, bool color)
{
    print_daemon(s);
    printf("\n");
    nodes_table(s->nodes, color);
    printf("\n");
    exports_table(s->exports, color);
    printf("\n");
    if (json_array_size(s->jobs) == 0)
        printf("no jobs\n");
    else
        printf("%zu jobs, see 'tidemark job ls'\n", json_array_size(s->jobs));
}

int cmd_status(struct cli *c)
{
    struct tide_error err;
    struct status s = {0};
    int code = cli_connect(c);
    if (code != CLI_DONE)
        return code;
    if (ask(c->client, &s, &err) < 0)
        code = cli_fail(&err);
    else if (c->json)
        code = cli_print_json(cli_pack("{s:O?, s:O, s:o, s:o, s:O}", "daemon", s.daemon, "version",
                                       s.version, "nodes", nodes_json(s.nodes), "exports",
                                       exports_json(s.exports), "jobs", s.jobs));
    else
        print_status(&s, c->color);
    json_decref(s.daemon);
    json_decref(s.version);
    json_decref(s.nodes);
    json_decref(s.exports);
    json_decref(s.jobs);
    return code;
}
