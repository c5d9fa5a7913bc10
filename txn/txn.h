/* SPDX-License-Identifier: Apache-2.0 */
/* Transactions: an ordered list of actions, all or none.
 *
 * Each action takes effect when its turn comes and arms undo records for what it did; the next one
 * sees the new state. A failure unwinds, last effect first. After the last action one record
 * decides (store/store.h); what follows only forgets (discard), opens gates and tells. There is no
 * hook in which an action could have an effect at commit. A plain command is a list of one.
 * docs/transactions.md has the laws, txn/footprint.h what each action names.
 *
 * Control loop only. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"
#include "co/co.h"
#include "store/store.h"

struct action_entry;
struct bitmap_pace;
struct exports;
struct graph;
struct io;
struct job_group;
struct jobs;
struct schema_type;
struct txn;
struct txn_history;

struct action {
    const struct action_entry *entry;
    const void *args; /* the parsed struct of this kind */
    unsigned index;
};

struct action_ops {
    /* Check, take effect, arm. If it fails after arming parts, the engine unwinds those. May yield.
     */
    co_fn int (*prepare)(struct txn *t, const struct action *a, struct tide_error *err);
    /* Optional: slow work that nobody can see and that can be thrown away, done before guests are
     * held. Only called when no earlier action of the list writes a node or a file that this one
     * names, so what it finds is what prepare would find; its failure is that of the action, told
     * when its turn comes. prepare gets *out by txn_staged() and owns it then. */
    co_fn int (*stage)(struct txn *t, const struct action *a, void **out, struct tide_error *err);
    co_fn void (*unstage)(struct txn *t, void *staged);
};

struct action_entry {
    const char *kind;
    const struct schema_type *args;
    const struct action_ops *ops;
};
/* Generated from the schema, indexed by enum q_transaction_action_kind. */
extern const struct action_entry txn_actions[];

/* ------------------------------------------------------------------ for actions */

/* Undo records. Reserve before the effect, so that arming cannot fail; a record that was not armed
 * is forgotten. No hook may fail, wait for a guest or need memory. All but unwind may be NULL.
 * (What lies outside the daemon can be kept from being undone by others: txn_not_undone.) */
struct undo_ops {
    co_fn void (*unwind)(void *rec); /* back to the state before the effect; guests are held */
    /* The list has happened; guests are held until `open` was called for all: */
    co_fn void (*discard)(void *rec); /* last to first; nothing observable */
    void (*announce)(void *rec);      /* first to last: events of its beginning */
    void (*open)(void *rec);          /* first to last: what the list made may begin to act */
    /* Either way, after guests go on, the command lock still held: give back what takes its time
     * (files to close). In list order if the list has happened, else (`undone`) last to first. */
    co_fn void (*release)(void *rec, bool undone);
};
void *txn_reserve(struct txn *t, const struct undo_ops *ops, size_t size, struct tide_error *err);
void txn_arm(struct txn *t, void *rec);
/* For unwind, where somebody outside stands in the way (of a file): what is left, for the answer.
 * The rest is undone all the same. */
void txn_not_undone(struct txn *t, const struct tide_error *why);

void *txn_staged(struct txn *t, const struct action *a); /* NULL: nothing was staged */
struct job_group *txn_job_group(struct txn *t);          /* NULL unless completion-mode=grouped */
struct graph *txn_graph(struct txn *t);
struct jobs *txn_jobs(struct txn *t);
struct exports *txn_exports(struct txn *t);
/* For work on large bitmaps, in prepare and unwind, which then yields: others have their turn. */
struct bitmap_pace *txn_pace(struct txn *t);
/* A dry run: traces outside memory (files) are checked for, not made. An action that stops short of
 * its effect for that reason says so. */
bool txn_is_dry(const struct txn *t);
void txn_only_checked(struct txn *t);
/* What the action found and what it changes, for the report of a dry run; nothing otherwise. Once
 * each. */
void txn_sees(struct txn *t, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
void txn_does(struct txn *t, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* ------------------------------------------------------------------ running a list */

/* Where a list stands, for tests that look at the whole state (L2 to L4). `done`: how many actions
 * are in effect. */
enum txn_step { TXN_HELD, TXN_PREPARED, TXN_UNWOUND, TXN_RECORDED, TXN_DISCARDED };

struct txn_env {
    struct io *io;
    struct graph *graph;
    struct jobs *jobs;
    struct exports *exports;
    struct store *store;
    struct txn_history *history;
    /* Asked under the command lock: may a list begin, or is the daemon ending? NULL: it may. */
    int (*may_begin)(void *arg, struct tide_error *err);
    void *may_begin_arg;
    void (*probe)(void *arg, enum txn_step step, unsigned done); /* or NULL; must not yield */
    void *probe_arg;
};

struct txn_props {
    bool grouped;
    bool dry_run;       /* run, undo, report */
    bool plain;         /* a plain command */
    const char *client; /* for the log; or NULL */
    /* Not NULL: a list that ended before under this id is not run again; its outcome is the answer
     * if the digest is the same, else an error. */
    const char *id;
    uint8_t digest[STORE_DIGEST_SIZE];
};

struct action_report {
    enum action_outcome { ACTION_NOT_RUN, ACTION_EXERCISED, ACTION_CHECKED, ACTION_FAILED } outcome;
    char *sees, *does; /* or NULL */
};

struct txn_result {
    int failed;        /* index of the action that failed, -1: none in particular */
    const char *phase; /* "stage", "prepare", "record" when failed >= 0 */
    bool not_undone;   /* when failed >= 0: something is left, as the error says, and, */
    char **left;       /* if not replayed and memory allows, each of these */
    size_t n_left;
    bool replayed;    /* nothing was run: this is the outcome remembered under the id */
    uint64_t held_ns; /* how long guests were held */
    size_t n_reports; /* dry run: one for each action; given back with txn_result_free */
    struct action_report *report;
};

/* Run the list. 0, or what the first failure says, everything undone. A dry run leaves nothing
 * behind either way. */
co_fn int txn_run(const struct txn_env *env, const struct action *actions, size_t n,
                  const struct txn_props *props, struct txn_result *res, struct tide_error *err);
/* For footprints of lists of this daemon. */
struct footprint_lookup;
struct footprint_lookup txn_lookup(const struct txn_env *env);
void txn_result_free(struct txn_result *res);
