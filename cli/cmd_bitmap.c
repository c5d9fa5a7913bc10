/* SPDX-License-Identifier: Apache-2.0 */
/* bitmap ls, add, rm, clear, enable, disable, merge, map. */
#include "base/bytes.h"
#include "base/mem.h"
#include "cli/backup.h"
#include "cli/progress.h"
#include "cli/size.h"
#include "cli/table.h"
#include "cli/view.h"
#include <errno.h>
#include <inttypes.h>
#include <langinfo.h>
#include <string.h>
#include <unistd.h>

#define MAP_ROWS 8

/* Sends a command about one bitmap; on a refusal says what may have been meant. */
static int call(struct cli *c, const char *command, json_t *args)
{
    struct tide_error err;
    int code = cli_connect(c);
    if (code != CLI_DONE) {
        json_decref(args);
        return code;
    }
    if (client_call(c->client, command, args, NULL, &err) == 0)
        return CLI_DONE;
    code = cli_fail(&err);
    if (err.code == CLIENT_REFUSED)
        view_hint(c->client, c->args[0],
                  strcmp(command, "block-dirty-bitmap-add") == 0 ? NULL : c->args[1]);
    return code;
}

static json_t *node_and_name(const struct cli *c)
{
    return cli_pack("{s:s, s:s}", "node", c->args[0], "name", c->args[1]);
}

/* A bitmap that a backup directory counts on is not changed by a slip of the hand. `loss` says what
 * it would cost. */
static int guard(const struct cli *c, const char *loss)
{
    if (!backup_owns_bitmap(c->args[1]) || cli_option(c, "force"))
        return CLI_DONE;
    cli_error("bitmap '%s' belongs to a backup directory: %s", c->args[1], loss);
    cli_hint(
        "'--force' does it all the same; 'tidemark backup' removes it when it needs it no more");
    return CLI_FAILED;
}

int cmd_bitmap_rm(struct cli *c)
{
    int code = guard(c, "without it nobody knows what changed since the last point there, and the "
                        "next backup has to copy everything");
    return code ? code : call(c, "block-dirty-bitmap-remove", node_and_name(c));
}

int cmd_bitmap_clear(struct cli *c)
{
    int code = guard(c, "it would forget what changed since the last point there, and the next "
                        "backup has to copy everything");
    return code ? code : call(c, "block-dirty-bitmap-clear", node_and_name(c));
}

int cmd_bitmap_enable(struct cli *c)
{
    return call(c, "block-dirty-bitmap-enable", node_and_name(c));
}

int cmd_bitmap_disable(struct cli *c)
{
    int code = guard(c, "it would miss what changes from now on, and the next backup has to copy "
                        "everything, also after it is enabled again");
    return code ? code : call(c, "block-dirty-bitmap-disable", node_and_name(c));
}

int cmd_bitmap_add(struct cli *c)
{
    json_t *args = node_and_name(c);
    const char *granularity = cli_option(c, "granularity");
    if (granularity) {
        struct tide_error err;
        uint64_t size;
        if (size_parse(granularity, &size, &err) < 0) {
            json_decref(args);
            return cli_usage(c, "%s", err.msg);
        }
        json_object_set_new(args, "granularity", cli_pack("I", (json_int_t)size));
    }
    if (cli_option(c, "persistent"))
        json_object_set_new(args, "persistent", json_true());
    if (cli_option(c, "disabled"))
        json_object_set_new(args, "disabled", json_true());
    return call(c, "block-dirty-bitmap-add", args);
}

/* A source is NAME, or NODE/NAME. A node's name has no slash, a bitmap's may: the first one parts
 * them only if what stands before it is no bitmap's name with a slash, which nobody can tell here;
 * so "NODE/NAME" always wins, and a bitmap with a slash is written with its node. */
static json_t *source(const char *text)
{
    const char *slash = strchr(text, '/');
    if (!slash)
        return cli_pack("s", text);
    return cli_pack("{s:s%, s:s}", "node", text, (size_t)(slash - text), "name", slash + 1);
}

int cmd_bitmap_merge(struct cli *c)
{
    int code = guard(c, "it would no longer tell what changed since the last point there, and the "
                        "next backup has to copy more, or everything");
    if (code)
        return code;
    json_t *sources = cli_pack("[]");
    for (size_t i = 2; i < c->n_args; i++)
        json_array_append_new(sources, source(c->args[i]));
    return call(
        c, "block-dirty-bitmap-merge",
        cli_pack("{s:s, s:s, s:o}", "node", c->args[0], "target", c->args[1], "bitmaps", sources));
}

/* ---- ls ---- */

static void ls_row(struct table *t, json_t *list, const json_t *node, const json_t *b)
{
    const char *on = view_string(node, "node-name", "");
    uint64_t granularity = view_number(b, "granularity"), count = view_number(b, "count");
    bool persistent = view_true(b, "persistent");
    table_row(t, on, view_string(b, "name", ""), view_bitmap_state(b), size_text(granularity).s,
              size_text(count).s, persistent ? "yes" : "no");
    json_array_append_new(
        list,
        cli_pack("{s:s, s:s, s:s, s:I, s:I, s:b, s:b, s:b, s:b}", "node", on, "name",
                 view_string(b, "name", ""), "state", view_bitmap_state(b), "granularity",
                 (json_int_t)granularity, "dirty", (json_int_t)count, "persistent", (int)persistent,
                 "recording", (int)view_true(b, "recording"), "busy", (int)view_true(b, "busy"),
                 "inconsistent", (int)view_true(b, "inconsistent")));
}

static int print_bitmaps(struct cli *c, json_t *nodes)
{
    static const char *const heads[] = {"NODE",         "BITMAP", "STATE",
                                        ">GRANULARITY", ">DIRTY", "PERSISTENT"};
    struct table t;
    table_init(&t, heads, sizeof heads / sizeof *heads);
    json_t *list = cli_pack("[]");
    size_t i;
    json_t *node;
    json_array_foreach (nodes, i, node) {
        json_t *bitmaps = view_bitmaps(node);
        if (c->n_args == 1 && strcmp(view_string(node, "node-name", ""), c->args[0]) != 0)
            continue;
        for (size_t k = json_array_size(bitmaps); k-- > 0;)
            if (view_string(json_array_get(bitmaps, k), "name", NULL)) /* not a job's own one */
                ls_row(&t, list, node, json_array_get(bitmaps, k));
    }
    int code = CLI_DONE;
    if (c->json)
        code = cli_print_json(json_incref(list));
    else
        table_print(&t, stdout, c->color, "no bitmaps");
    json_decref(list);
    table_fini(&t);
    return code;
}

int cmd_bitmap_ls(struct cli *c)
{
    struct tide_error err;
    json_t *nodes;
    int code = cli_connect(c);
    if (code != CLI_DONE)
        return code;
    if (view_nodes(c->client, &nodes, &err) < 0)
        return cli_fail(&err);
    if (c->n_args == 1 && !view_node(nodes, c->args[0])) {
        cli_error("node '%s' not found", c->args[0]);
        view_hint(c->client, c->args[0], NULL);
        code = CLI_FAILED;
    } else {
        code = print_bitmaps(c, nodes);
    }
    json_decref(nodes);
    return code;
}

/* ---- map ---- */

static int map_json(struct cli *c, const struct ranges *r, uint64_t size, uint64_t granularity)
{
    json_t *list = cli_pack("[]");
    for (size_t i = 0; i < r->n; i++)
        json_array_append_new(list, cli_pack("{s:I, s:I}", "offset", (json_int_t)r->list[i].off,
                                             "length", (json_int_t)r->list[i].len));
    return cli_print_json(cli_pack("{s:s, s:s, s:I, s:I, s:I, s:o}", "node", c->args[0], "bitmap",
                                   c->args[1], "size", (json_int_t)size, "granularity",
                                   (json_int_t)granularity, "dirty", (json_int_t)ranges_total(r),
                                   "ranges", list));
}

static void map_draw(const struct ranges *r, uint64_t size, uint64_t granularity)
{
    bool ascii = strcmp(nl_langinfo(CODESET), "UTF-8") != 0;
    ranges_draw(r, size, granularity, terminal_columns(STDOUT_FILENO), MAP_ROWS, ascii, stdout);
    uint64_t dirty = ranges_total(r);
    printf("%s of %s dirty (%.1f %%) in %zu ranges, granularity %s\n", size_text(dirty).s,
           size_text(size).s, size ? (double)dirty * 100 / (double)size : 0.0, r->n,
           size_text(granularity).s);
}

/* Finds the bitmap, so that the map knows the disk's size and the bitmap's granularity. */
static int map_shape(struct cli *c, uint64_t *size, uint64_t *granularity, struct tide_error *err)
{
    json_t *nodes;
    int r = view_nodes(c->client, &nodes, err);
    if (r < 0)
        return r;
    json_t *node = view_node(nodes, c->args[0]);
    json_t *b = node ? view_bitmap(node, c->args[1]) : NULL;
    if (!node)
        r = tide_fail(err, CLIENT_REFUSED, "node '%s' not found", c->args[0]);
    else if (!b)
        r = tide_fail(err, CLIENT_REFUSED, "bitmap '%s' on node '%s' not found", c->args[1],
                      c->args[0]);
    *size = view_size(node);
    *granularity = MAX(view_number(b, "granularity"), 1);
    json_decref(nodes);
    return r;
}

int cmd_bitmap_map(struct cli *c)
{
    struct tide_error err;
    uint64_t size, granularity;
    struct ranges ranges = {0};
    int code = cli_connect(c);
    if (code != CLI_DONE)
        return code;
    int r = map_shape(c, &size, &granularity, &err);
    if (r == 0)
        r = view_dirty_ranges(c->client, c->args[0], c->args[1], &ranges, &err);
    if (r < 0) {
        code = cli_fail(&err);
        if (client_unknown_command(&err))
            cli_hint("this daemon cannot list dirty ranges; tidemarkd can");
        else if (err.code == CLIENT_REFUSED)
            view_hint(c->client, c->args[0], c->args[1]);
        ranges_fini(&ranges);
        return code;
    }
    ranges_clip(&ranges, size); /* the last granule may reach past the end of the disk */
    if (c->json)
        code = map_json(c, &ranges, size, granularity);
    else
        map_draw(&ranges, size, granularity);
    ranges_fini(&ranges);
    return code;
}
