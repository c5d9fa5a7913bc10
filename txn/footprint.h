/* SPDX-License-Identifier: Apache-2.0 */
/* What an action names: which things it reads, which it writes, and which nodes have to be held.
 *
 * Two actions of a list depend on each other when one writes what the other reads or writes
 * (Bernstein's condition); the order of independent neighbours changes nothing. A footprint follows
 * from an action's arguments alone, so it can be had without a daemon: the tool explains a list
 * with it. What the arguments do not say (which node an export shows) is named as "any" of its
 * kind, or looked up by whoever can (struct footprint_lookup).
 *
 * The names that a list writes are also what its record is about (store/store.h). */
#pragma once
#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>

#include "store/store.h"

struct name_use {
    struct store_name name; /* name.a NULL: any of its kind */
    unsigned action;        /* index in the list */
    bool writes;
    bool makes; /* a node comes to be under the name */
};

/* A node whose users are held, by its name or by that of an export which shows it. */
struct node_hold {
    const char *node, *export;
    unsigned action;
    bool all; /* reads too */
};

/* Answers what arguments do not say. NULL: unknown. Control loop. */
struct footprint_lookup {
    const char *(*export_node)(void *arg, const char *export_id);
    /* The i-th child of a node; NULL: no more. */
    const char *(*node_child)(void *arg, const char *node, unsigned i);
    /* The name of its i-th bitmap; NULL: no more. */
    const char *(*node_bitmap)(void *arg, const char *node, unsigned i);
    void *arg;
};

/* Zeroed = empty. Names are borrowed from the arguments. */
struct footprint {
    struct name_use *use;
    size_t n_uses, cap_uses;
    struct node_hold *hold;
    size_t n_holds, cap_holds;
    const struct footprint_lookup *lookup; /* or NULL */
    unsigned action;                       /* that is being added */
    bool no_memory;                        /* it is not whole */
};

/* Add what the action at place `index` names; `kind` is an enum q_transaction_action_kind and
 * `args` its parsed struct. */
void action_footprint(int kind, const void *args, unsigned index, struct footprint *f);
void footprint_free(struct footprint *f);

/* Do the two concern the same thing? ("any" concerns all of its kind.) */
bool store_name_meets(const struct store_name *a, const struct store_name *b);

/* Which actions of a list depend on which, and why: a new JSON object {dependencies: [{action, on,
 * because: [..]}], holds: [{node | export, requests}]}, both indices from 0, `on` < `action`.
 * -E2BIG: more than `max` dependencies, or EXPLAIN_WHY times as many reasons. */
#define EXPLAIN_WHY 10u
int footprint_explain(const struct footprint *f, size_t max, json_t **out);
