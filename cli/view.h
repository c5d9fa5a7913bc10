/* SPDX-License-Identifier: Apache-2.0 */
/* What several commands ask of the daemon: nodes, their bitmaps, a bitmap's dirty ranges. */
#pragma once
#include "cli/ranges.h"
#include "lib/client.h"

/* All nodes, oldest first: an array that the caller owns. */
int view_nodes(struct client *c, json_t **nodes, struct tide_error *err);
/* Borrowed from `nodes`; NULL if there is none of that name. */
json_t *view_node(json_t *nodes, const char *name);
json_t *view_bitmap(json_t *node, const char *name);
/* The bitmaps of a node, an array that may be NULL; borrowed. */
json_t *view_bitmaps(json_t *node);

/* Members of a reply's object, with a value for one that is not there. */
const char *view_string(const json_t *object, const char *key, const char *otherwise);
uint64_t view_number(const json_t *object, const char *key);
bool view_true(const json_t *object, const char *key);
uint64_t view_size(json_t *node); /* of the disk, bytes */
const char *view_file(json_t *node);

/* Changes whenever a bitmap may have lost sight of changes (cleared, disabled, made anew). False:
 * the daemon does not tell. */
bool view_generation(const json_t *bitmap, uint64_t *generation);

/* "on", "off", "busy", "inconsistent". */
const char *view_bitmap_state(const json_t *bitmap);

/* Every dirty range of a bitmap, page by page. The caller owns `out`, also after an error. */
int view_dirty_ranges(struct client *c, const char *node, const char *name, struct ranges *out,
                      struct tide_error *err);

/* Says which node or bitmap the user may have meant, after a command about it was refused. */
void view_hint(struct client *c, const char *node, const char *bitmap);
