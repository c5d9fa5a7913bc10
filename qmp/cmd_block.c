/* SPDX-License-Identifier: Apache-2.0 */
/* Queries about nodes and their bitmaps. */
#include <errno.h>
#include <nettle/sha2.h>
#include <string.h>

#include "base/bytes.h"
#include "block/inspect.h"
#include "block/node.h"
#include "block/tracker.h"
#include "export/export.h"
#include "qmp/dispatch.h"
#include "qmp/instance.h"
#include "schema/handlers.h"

#define RANGES_MAX 65536u /* in one page, whatever was asked for: nothing yields in here */
/* As long as a debug command may hold up the control loop. */
#define SHA256_MAX_BYTES (GIB / 2)

static int no_memory(struct tide_error *err)
{
    return tide_fail(err, -ENOMEM, "no memory for the answer");
}

/* ------------------------------------------------------------------ queries about nodes */

static json_t *bitmap_row(const struct dirty_bitmap *b)
{
    json_int_t granularity = (json_int_t)1 << bitmap_shift(b->bits);
    json_t *o = json_pack("{s:s,s:I,s:I,s:b,s:b,s:b,s:I}", "name", b->name, "count",
                          (json_int_t)bitmap_count(b->bits) * granularity, "granularity",
                          granularity, "recording", b->enabled, "busy", b->n_busy > 0, "persistent",
                          b->persistent, "generation", (json_int_t)b->generation);
    if (o && b->inconsistent)
        json_object_set_new(o, "inconsistent", json_true());
    return o;
}

static json_t *bitmap_rows(const struct node *n)
{
    json_t *list = json_array();
    for (const struct dirty_bitmap *b = node_bitmaps(n); b && list; b = b->next) {
        if (json_array_append_new(list, bitmap_row(b)) < 0) {
            json_decref(list);
            list = NULL;
        }
    }
    return list;
}

static json_t *image_row(const struct node_info *i)
{
    json_t *o = json_pack("{s:s,s:s,s:I}", "filename", i->filename, "format", i->driver,
                          "virtual-size", (json_int_t)i->size);
    if (o && i->allocated != UINT64_MAX)
        json_object_set_new(o, "actual-size", json_integer((json_int_t)i->allocated));
    if (o && i->cluster_size)
        json_object_set_new(o, "cluster-size", json_integer(i->cluster_size));
    return o;
}

static json_t *node_row(struct node *n)
{
    struct node_info i;
    node_inspect(n, &i);
    json_t *image = image_row(&i);
    json_t *o =
        json_pack("{s:s,s:b,s:s,s:i,s:b,s:s,s:i,s:i,s:i,s:i,s:i,s:i,s:{s:b,s:b,s:b},s:i,s:o}",
                  "file", i.filename, "ro", i.read_only, "drv", i.driver, "backing_file_depth", 0,
                  "encrypted", 0, "detect_zeroes", i.detect_zeroes, "bps", 0, "bps_rd", 0, "bps_wr",
                  0, "iops", 0, "iops_rd", 0, "iops_wr", 0, "cache", "writeback", 1, "direct",
                  i.direct, "no-flush", i.no_flush, "write_threshold", 0, "image", image);
    if (o)
        json_object_set_new(o, "node-name", json_string(node_name(n)));
    if (o && node_bitmaps(n))
        json_object_set_new(o, "dirty-bitmaps", bitmap_rows(n));
    return o;
}

struct rows {
    struct graph *graph;
    json_t *list;
    bool failed;
};

static int finish_rows(struct rows *rows, json_t **ret, struct tide_error *err)
{
    if (!rows->failed) {
        *ret = rows->list;
        return 0;
    }
    json_decref(rows->list);
    return no_memory(err);
}

static void add_node_row(void *arg, struct node *n)
{
    struct rows *rows = arg;
    if (json_array_append_new(rows->list, node_row(n)) < 0)
        rows->failed = true;
}

int qmp_query_named_block_nodes(struct qmp_call *call, const struct q_query_named_block_nodes *args,
                                json_t **ret, struct tide_error *err)
{
    struct rows rows = {call->inst->graph, json_array(), false};
    rows.failed = !rows.list;
    graph_each(rows.graph, add_node_row, &rows);
    return finish_rows(&rows, ret, err);
}

static void add_device_row(void *arg, const char *id, const char *node)
{
    struct rows *rows = arg;
    struct node *n = graph_find(rows->graph, node);
    if (!n)
        return;
    json_t *o = json_pack("{s:s,s:s,s:b,s:b,s:o}", "device", "", "type", "unknown", "removable", 0,
                          "locked", 0, "inserted", node_row(n));
    if (json_object_set_new(o, "qdev", json_sprintf("/tidemark/export/%s", id)) < 0 ||
        json_array_append(rows->list, o) < 0)
        rows->failed = true;
    json_decref(o);
}

int qmp_query_block(struct qmp_call *call, const struct q_query_block *args, json_t **ret,
                    struct tide_error *err)
{
    struct rows rows = {call->inst->graph, json_array(), false};
    rows.failed = !rows.list;
    exports_each_writable(call->inst->exports, add_device_row, &rows);
    return finish_rows(&rows, ret, err);
}

int qmp_query_blockstats(struct qmp_call *call, const struct q_query_blockstats *args, json_t **ret,
                         struct tide_error *err)
{
    if (args->has_query_nodes && args->query_nodes)
        return tide_fail(err, -ENOTSUP,
                         "statistics of nodes are not kept: leave 'query-nodes' out");
    *ret = json_array(); /* as QSD: there are no devices with a name */
    return *ret ? 0 : no_memory(err);
}

/* ------------------------------------------------------------------ looking into a bitmap */

static int find_bitmap(struct qmp_call *call, const char *node, const char *name,
                       struct dirty_bitmap **out, struct tide_error *err)
{
    struct node *n;
    int r = graph_find_err(call->inst->graph, node, &n, err);
    return r < 0 ? r : dirty_bitmap_find(n, name, 0, out, err);
}

static void hash_bytes(void *arg, const uint8_t *bytes, uint64_t len)
{
    static const uint8_t zeroes[4096];
    while (len) {
        uint64_t n = bytes ? len : MIN(len, sizeof zeroes);
        sha256_update(arg, n, bytes ? bytes : zeroes);
        len -= n;
    }
}

int qmp_x_debug_block_dirty_bitmap_sha256(struct qmp_call *call,
                                          const struct q_x_debug_block_dirty_bitmap_sha256 *args,
                                          json_t **ret, struct tide_error *err)
{
    struct sha256_ctx ctx;
    uint8_t digest[SHA256_DIGEST_SIZE];
    char hex[2 * SHA256_DIGEST_SIZE + 1];
    struct dirty_bitmap *b;
    int r = find_bitmap(call, args->node, args->name, &b, err);
    if (r < 0)
        return r;
    if (bitmap_size(b->bits) >> bitmap_shift(b->bits) >> 3 > SHA256_MAX_BYTES)
        return tide_fail(err, -EFBIG,
                         "bitmap '%s' on node '%s' is too large to be hashed at a stroke",
                         shown_name(args->name).text, args->node);
    sha256_init(&ctx);
    bitmap_pack(b->bits, hash_bytes, &ctx);
    sha256_digest(&ctx, sizeof digest, digest);
    for (unsigned i = 0; i < sizeof digest; i++)
        snprintf(hex + 2 * i, 3, "%02x", digest[i]);
    *ret = json_pack("{s:s}", "sha256", hex);
    return *ret ? 0 : no_memory(err);
}

/* One page of ranges; `next` is where the following one begins. Nothing here yields, so the page
 * shows one instant. */
int qmp_query_dirty_ranges(struct qmp_call *call, const struct q_query_dirty_ranges *args,
                           json_t **ret, struct tide_error *err)
{
    struct dirty_bitmap *b;
    int r = find_bitmap(call, args->node, args->name, &b, err);
    if (r < 0)
        return r;
    if (b->inconsistent)
        return tide_fail(err, -EINVAL,
                         "bitmap '%s' on node '%s' is inconsistent: it can only be removed",
                         shown_name(args->name).text, args->node);
    if (args->has_limit && args->limit == 0)
        return tide_fail(err, -EINVAL, "'limit' is 0: ask for at least one range");
    uint32_t limit = MIN(args->limit, RANGES_MAX);
    uint64_t size = bitmap_size(b->bits), off = args->offset, run, len;
    json_t *ranges = json_array();
    json_t *reply = json_pack("{s:o}", "ranges", ranges);
    if (!reply)
        return no_memory(err);
    for (uint32_t i = 0; bitmap_next_dirty(b->bits, off, size, &run, &len); i++) {
        if (i == limit) {
            r = json_object_set_new(reply, "next", json_integer((json_int_t)run));
            break;
        }
        json_t *row = json_pack("{s:I,s:I}", "offset", (json_int_t)run, "length", (json_int_t)len);
        r = json_array_append_new(ranges, row);
        if (r < 0)
            break;
        off = run + len;
    }
    if (r < 0) { /* a range that is left out would be missing in a backup */
        json_decref(reply);
        return no_memory(err);
    }
    *ret = reply;
    return 0;
}
