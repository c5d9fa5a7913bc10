/* SPDX-License-Identifier: Apache-2.0 */
/* Transactions: an ordered list of actions, all or none.
 *
 * Each action takes effect when its turn comes and arms undo records for what it did; the next one
 * sees the new state. A failure unwinds, last effect first. After the last action one record
 * decides; what follows only forgets (discard), opens gates and tells. There is no hook in which an
 * action could have an effect at commit. A plain command is a list of one. docs/transactions.md has
 * the laws.
 *
 * Control loop only. */
#pragma once
#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>

#include "base/error.h"
#include "block/root.h"
#include "co/co.h"

struct action_entry;
struct graph;
struct job;
struct job_group;
struct jobs;
struct node;
struct schema_type;
struct txn;

struct action {
    const struct action_entry *entry;
    const void *args; /* the parsed struct of this kind */
    unsigned index;
};

/* Which nodes an action touches; from its arguments alone. Nodes that do not exist (yet) are left
 * to prepare, which says so. */
struct footprint;
void footprint_node(struct footprint *f, const char *name, enum quiesce_kind kind);

struct action_ops {
    void (*footprint)(const struct action *a, struct footprint *f);
    /* Check, take effect, arm. If it fails after arming parts, the engine unwinds those. May yield.
     */
    co_fn int (*prepare)(struct txn *t, const struct action *a, struct tide_error *err);
};

struct action_entry {
    const char *kind;
    const struct schema_type *args;
    const struct action_ops *ops;
};
/* Generated from the schema, indexed by enum q_transaction_action_kind. */
extern const struct action_entry txn_actions[];

/* Undo records. Reserve before the effect, so that arming cannot fail; a record that was not armed
 * is forgotten. Neither function may fail, wait for a guest or send events. */
struct undo_ops {
    co_fn void (*unwind)(void *rec);  /* back to the state before the effect */
    co_fn void (*discard)(void *rec); /* nothing observable; NULL: nothing to free */
};
void *txn_reserve(struct txn *t, const struct undo_ops *ops, size_t size, struct tide_error *err);
void txn_arm(struct txn *t, void *rec);

/* A job made by an action: started after the record, in list order. Reserve before it is made. */
int txn_reserve_gate(struct txn *t, struct tide_error *err);
void txn_gate_job(struct txn *t, struct job *j);
struct job_group *txn_job_group(struct txn *t); /* NULL unless completion-mode=grouped */
struct graph *txn_graph(struct txn *t);
struct jobs *txn_jobs(struct txn *t);

struct txn_env {
    struct graph *graph;
    struct jobs *jobs;
};

struct txn_props {
    bool grouped;
};

struct txn_result {
    int failed;        /* index of the action that failed, -1: none */
    const char *phase; /* "stage", "prepare", "record" when failed >= 0 */
    uint64_t held_ns;  /* how long guests were held */
};

/* Run the list. 0, or what the first failure says, everything undone. */
co_fn int txn_run(const struct txn_env *env, const struct action *actions, size_t n,
                  const struct txn_props *props, struct txn_result *res, struct tide_error *err);
