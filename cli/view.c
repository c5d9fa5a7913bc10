/* SPDX-License-Identifier: Apache-2.0 */
/* What several commands ask of the daemon. Its answers are read with care: a member that is missing
 * or of another type counts as absent, never as a reason to crash. */
#include "cli/view.h"
#include "cli/cli.h"
#include "cli/table.h"
#include <errno.h>
#include <string.h>

#define PAGE_RANGES 10000

const char *view_string(const json_t *object, const char *key, const char *otherwise)
{
    const char *s = json_string_value(json_object_get(object, key));
    return s ? s : otherwise;
}

uint64_t view_number(const json_t *object, const char *key)
{
    json_int_t n = json_integer_value(json_object_get(object, key));
    return n < 0 ? 0 : (uint64_t)n;
}

bool view_true(const json_t *object, const char *key)
{
    return json_is_true(json_object_get(object, key));
}

uint64_t view_size(json_t *node)
{
    return view_number(json_object_get(node, "image"), "virtual-size");
}

const char *view_file(json_t *node)
{
    return view_string(node, "file", view_string(json_object_get(node, "image"), "filename", ""));
}

int view_nodes(struct client *c, json_t **nodes, struct tide_error *err)
{
    json_t *newest_first;
    int r =
        client_call(c, "query-named-block-nodes", cli_pack("{s:b}", "flat", 1), &newest_first, err);
    if (r < 0)
        return r;
    *nodes = cli_pack("[]");
    for (size_t i = json_array_size(newest_first); i-- > 0;)
        json_array_append(*nodes, json_array_get(newest_first, i));
    json_decref(newest_first);
    return 0;
}

static json_t *find(json_t *list, const char *key, const char *name)
{
    size_t i;
    json_t *entry;
    json_array_foreach (list, i, entry)
        if (strcmp(view_string(entry, key, ""), name) == 0)
            return entry;
    return NULL;
}

json_t *view_node(json_t *nodes, const char *name)
{
    return find(nodes, "node-name", name);
}

json_t *view_bitmaps(json_t *node)
{
    return json_object_get(node, "dirty-bitmaps");
}

json_t *view_bitmap(json_t *node, const char *name)
{
    return find(view_bitmaps(node), "name", name);
}

bool view_generation(const json_t *bitmap, uint64_t *generation)
{
    const json_t *v = json_object_get(bitmap, "generation");
    *generation = view_number(bitmap, "generation");
    return json_is_integer(v) && json_integer_value(v) >= 0;
}

const char *view_bitmap_state(const json_t *bitmap)
{
    if (view_true(bitmap, "inconsistent"))
        return "inconsistent";
    if (view_true(bitmap, "busy"))
        return "busy";
    return view_true(bitmap, "recording") ? "on" : "off";
}

/* One page into `out`; *next is where the next one begins, or 0 after the last. */
static int take_page(json_t *page, struct ranges *out, uint64_t *next, struct tide_error *err)
{
    size_t i;
    json_t *entry;
    json_array_foreach (json_object_get(page, "ranges"), i, entry)
        if (!ranges_add(out, view_number(entry, "offset"), view_number(entry, "length")))
            return tide_fail(err, -EPROTO, "the daemon lists dirty ranges out of order");
    uint64_t from = *next;
    *next = view_number(page, "next");
    if (*next && *next <= from)
        return tide_fail(err, -EPROTO, "the daemon's list of dirty ranges does not end");
    return 0;
}

int view_dirty_ranges(struct client *c, const char *node, const char *name, struct ranges *out,
                      struct tide_error *err)
{
    uint64_t next = 0;
    do {
        json_t *page;
        int r = client_call(c, "query-dirty-ranges",
                            cli_pack("{s:s, s:s, s:I, s:i}", "node", node, "name", name, "offset",
                                     (json_int_t)next, "limit", PAGE_RANGES),
                            &page, err);
        if (r < 0)
            return r;
        r = take_page(page, out, &next, err);
        json_decref(page);
        if (r < 0)
            return r;
    } while (next);
    return 0;
}

/* The name in `list` that is nearest to what was typed, if it is near enough. */
static const char *nearest(json_t *list, const char *key, const char *typed)
{
    const char *best = NULL;
    unsigned best_distance = 3;
    size_t i;
    json_t *entry;
    json_array_foreach (list, i, entry) {
        const char *name = view_string(entry, key, "");
        unsigned d = *name ? text_distance(name, typed) : best_distance;
        if (d < best_distance) {
            best = name;
            best_distance = d;
        }
    }
    return best;
}

void view_hint(struct client *c, const char *node, const char *bitmap)
{
    struct tide_error err;
    json_t *nodes;
    if (view_nodes(c, &nodes, &err) < 0)
        return;
    json_t *n = view_node(nodes, node);
    if (!n) {
        const char *near = nearest(nodes, "node-name", node);
        if (near)
            cli_hint("did you mean node '%s'?", near);
        else
            cli_hint("'tidemark node ls' lists the nodes");
    } else if (bitmap && !view_bitmap(n, bitmap)) {
        const char *near = nearest(view_bitmaps(n), "name", bitmap);
        if (near)
            cli_hint("did you mean bitmap '%s'?", near);
        else
            cli_hint("'tidemark bitmap ls %s' lists the bitmaps", node);
    }
    json_decref(nodes);
}
