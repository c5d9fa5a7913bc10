/* SPDX-License-Identifier: Apache-2.0 */
/* The short forms of actions, for the reader and the writer of lists. */
#pragma once
#include <stdbool.h>
#include <stddef.h>

struct txn_verb {
    const char *word, *kind;
    /* The members that the words behind it are, in order: "node/name to new-name". */
    const char *places;
    bool sources; /* `from` and bitmaps follow */
    const char *usage;
    const char *alias, *alias_of; /* a shorter name of one member, or NULL */
};
extern const struct txn_verb txn_verbs[]; /* ended by one without word */

/* NULL: none. */
const struct txn_verb *txn_verb_find(const char *word);
const struct txn_verb *txn_verb_of_kind(const char *kind);
