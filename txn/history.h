/* SPDX-License-Identifier: Apache-2.0 */
/* The last transactions, for query-transactions: who asked for what, and what became of it. Plain
 * commands that are lists of one are among them. Control loop only. */
#pragma once
#include <jansson.h>

#include "txn/txn.h"

#define HISTORY_LENGTH 256u
#define HISTORY_KINDS 32u /* of a longer list only so many kinds are kept */

struct history_entry;

int history_new(struct txn_history **out); /* -ENOMEM */
void history_free(struct txn_history *h);
/* Notes time, client and actions; NULL (no memory): it will be missing. */
struct history_entry *history_begin(struct txn_history *h, struct io *io,
                                    const struct action *actions, size_t n,
                                    const struct txn_props *props);
/* Into the ring; takes the entry over (NULL is fine). */
void history_end(struct txn_history *h, struct history_entry *e, int r,
                 const struct txn_result *res, const struct tide_error *err);
/* Newest first, at most `limit`: a new list of TransactionInfo; NULL: no memory. */
json_t *history_query(const struct txn_history *h, unsigned limit);
