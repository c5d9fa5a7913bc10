/* SPDX-License-Identifier: Apache-2.0 */
/* What an action names: which things it reads, which it writes, and which nodes have to be held.
 *
 * Two actions of a list depend on each other when one writes what the other reads or writes
 * (Bernstein's condition); the order of independent neighbours changes nothing. A footprint follows
 * from an action's arguments alone, so it can be had without a daemon: the tool explains a list
 * with it. What the arguments do not say (which node an export shows) is named as "any" of its
 * kind, or looked up by whoever can (struct footprint_lookup), or known from earlier actions
 * (txn/known.h).
 *
 * The names that a list writes are also what its record is about (store/store.h). Who stands beside
 * whom on one disk (struct disk_use), and which file a path leads to, is of use for an explanation
 * only, and found out for it alone: it is in no record and holds nobody. */
#pragma once
#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "store/store.h"
#include "txn/known.h"

struct name_use {
    struct store_name name; /* name.a NULL: any of its kind */
    unsigned action;        /* index in the list */
    bool writes;
    const char *path; /* explaining: what the list calls the file, name.a says which one it is */
};

/* What an action does to the disk under a node: who keeps track of what is written to a node does
 * not bear others that write to the disk past it, who writes alone bears no writers, and a file is
 * written, or written and tracked, through one node at its bottom only (block/root.h, root_check).
 */
struct disk_use {
    struct place *place;
    unsigned action;
    unsigned how; /* bits 1 << DISK_x */
    bool ends;    /* it does so no more: it is in nobody's way, and nobody in its */
};
enum { DISK_TRACK, DISK_WRITE, DISK_ALONE /* and writes */, DISK_SOURCE /* of a job */, DISK_HOWS };

/* A node whose users are held, by its name or by that of an export which shows it. */
struct node_hold {
    const char *node, *export;
    unsigned action;
    bool all; /* reads too */
};

struct footprint;
typedef void footprint_bitmap(struct footprint *f, const char *node, const char *name);

/* Answers what arguments do not say, about things as they are before the list. NULL, false: there
 * is none. What is returned stays until the footprint is freed. Control loop. */
struct footprint_lookup {
    const char *(*export_node)(void *arg, const char *export_id);
    const char *(*export_name)(void *arg, const char *export_id); /* in the NBD server; copied */
    bool (*export_writable)(void *arg, const char *export_id);
    /* Its i-th bitmap: a node and a name. */
    bool (*export_bitmap)(void *arg, const char *export_id, unsigned i, struct store_name *out);
    /* The i-th child of a node; NULL: no more. */
    const char *(*node_child)(void *arg, const char *node, unsigned i);
    /* Calls each(f, node, name) for each of its bitmaps; false: there is none. */
    bool (*node_bitmaps)(void *arg, const char *node, footprint_bitmap *each, struct footprint *f);
    /* The file that it has open. */
    bool (*node_file)(void *arg, const char *node, uint64_t *dev, uint64_t *ino);
    void *arg;
    /* Explaining: a text that is the same for paths that lead to the same file, for one that exists
     * FOOTPRINT_FILE_KEY; NULL: it may be any. Without this function each path is a file of its
     * own, but for superfluous dots and slashes. */
    const char *(*file_key)(void *file_arg, const char *path);
    void *file_arg;
};
#define FOOTPRINT_FILE_KEY "i:%llx:%llx" /* device number, inode */

/* Zeroed = empty. Names are borrowed from the arguments. */
struct footprint {
    struct name_use *use;
    size_t n_uses, cap_uses;
    struct node_hold *hold;
    size_t n_holds, cap_holds;
    struct disk_use *disk; /* explaining */
    size_t n_disks, cap_disks;
    struct known known;
    const struct footprint_lookup *lookup; /* or NULL */
    bool explains;   /* set before the first action: it is for footprint_explain() */
    unsigned action; /* that is being added */
    bool no_memory;  /* it is not whole */
    /* footprint_explain() calls it now and then, so that long work can be done in turns; or NULL.
     */
    void (*step)(void *arg);
    void *step_arg;
};

/* Add what the action at place `index` names; `kind` is an enum q_transaction_action_kind and
 * `args` its parsed struct. */
void action_footprint(int kind, const void *args, unsigned index, struct footprint *f);
void footprint_free(struct footprint *f);

/* The path in the target of drive-backup ("file:" may stand before it); NULL: it is of another
 * protocol. */
const char *backup_target_path(const char *target);

/* Do the two concern the same thing? ("any" concerns all of its kind.) */
bool store_name_meets(const struct store_name *a, const struct store_name *b);

/* Which actions of a list depend on which, and why: a new JSON object {dependencies: [{action, on,
 * because: [..]}], holds: [{node | export, requests}]}, both indices from 0, `on` < `action`.
 * -E2BIG: more than `max` dependencies, or EXPLAIN_WHY times as many reasons. */
#define EXPLAIN_WHY 10u
int footprint_explain(const struct footprint *f, size_t max, json_t **out);
