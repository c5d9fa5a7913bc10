/* SPDX-License-Identifier: Apache-2.0 */
/* A list of actions as text, one action a line: what people write and what the tool shows.
 *
 *     # everything before today, in one bitmap
 *     add disk0/week granularity=1M disabled
 *     merge disk0/week from monday disk1/tuesday
 *     backup disk0 to target0 job=j0 sync=incremental bitmap=week
 *     clear disk0/monday
 *
 * Words are separated by blanks. A word that begins with # begins a comment, up to the end of the
 * line; empty lines are nothing. A word, or any part of one, may stand in double quotes, with the
 * escapes of JSON in it: "my bitmap", disk0/"a/b", name="say \"hi\"". What is quoted is never
 * special; what is not may hold any character but blanks, quotes and control characters. A quoted
 * part ends on its line. Text is UTF-8.
 *
 * The first word says what to do. The common actions have short forms:
 *
 *     add NODE/NAME                      block-dirty-bitmap-add
 *     remove, clear, enable, disable NODE/NAME
 *     merge NODE/TARGET from SOURCE...   also written with <- for from; no source: changes nothing
 *     rename NODE/NAME to NEW
 *     copy NODE/NAME from SOURCE...
 *     backup NODE to TARGET              blockdev-backup; job=ID is its job-id
 *     export-add TYPE                    block-export-add; node=NAME is its node-name
 *     export-del ID
 *     export-set-node ID to NODE
 *     node-add DRIVER                    blockdev-add; node=NAME is its node-name
 *     node-del NODE
 *     abort
 *
 * A SOURCE is a bitmap of the same node, or NODE/NAME. The slash in NODE/NAME is the one that is
 * not quoted; there can be only one. Words like from that are names have to be quoted: merge d/b
 * from "from".
 *
 * After these words, or between the first of them and from, come options: KEY=VALUE, where dots go
 * into nested members and numbers into lists (file.driver=file, bitmaps.0=b0); KEY alone, which is
 * KEY=on; and KEY:=JSON for what has no other spelling, such as null and empty lists. Behind from,
 * a word without = is a source, so options that are one word stand before it:
 *
 *     copy disk0/new disabled from old disk1/old granularity=64K
 *
 * Any other action, and any of those above too, is written by its kind, with all members as
 * options; that is how an action looks for which there is no short form:
 *
 *     block-dirty-bitmap-merge node=disk0 target=week bitmaps.0=monday
 *
 * Which values are numbers, on or off, or text follows from the schema, so a bitmap may be called
 * 7; sizes may have the units K, M, G, T of 1024. Each line is checked against the schema. */
#pragma once
#include <jansson.h>
#include <stddef.h>

#include "base/error.h"

/* A list of actions as it was written. */
struct txn_list {
    json_t *actions;    /* array of {type, data} */
    json_t *properties; /* object, or NULL */
    unsigned *lines;    /* where each action stands, from 1; NULL: it was JSON */
};
void txn_list_free(struct txn_list *list);

/* Reads text or JSON (a list, or an object with `actions` and perhaps `properties`): what begins
 * with [ or { is JSON. JSON is not checked against the schema: the daemon may know more. `name` is
 * the file's, for messages. -EINVAL with file, line, word and what to do. */
int txn_list_parse(const char *name, const char *text, size_t len, struct txn_list *out,
                   struct tide_error *err);

/* An action as a line, without the line end, to be freed with mem_free(). What the schema takes is
 * written so that reading it gives the same JSON; what it does not is shown as JSON. */
char *txn_action_text(json_t *action);
