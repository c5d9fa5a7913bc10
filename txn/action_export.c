/* SPDX-License-Identifier: Apache-2.0 */
/* The actions about exports: add, del, set-node. What they do is in export/export.h, "in parts".
 *
 * What an export takes of a node, file locks included, is taken before the first effect where the
 * list allows it (stage), and given back when guests go on: so an undo cannot be refused, and no
 * guest and no query waits for it. */
#include <errno.h>

#include "block/node.h"
#include "block/root.h"
#include "export/export.h"
#include "schema/types.h"
#include "txn/actions.h"

static void unstage_claim(struct txn *t, void *claim)
{
    root_free(claim);
}

static const char *plural(unsigned n)
{
    return n == 1 ? "" : "s";
}

/* ------------------------------------------------------------------ add */

struct export_rec {
    struct export *e; /* NULL: not ours any more */
};

static void add_unwind(void *p)
{
    struct export_rec *rec = p;
    export_unmake(rec->e);
}

static void add_open(void *p)
{
    struct export_rec *rec = p;
    export_open(rec->e);
}

static void add_release(void *p, bool undone)
{
    struct export_rec *rec = p;
    if (undone)
        export_free(rec->e);
}

static const struct undo_ops add_undo = {
    .unwind = add_unwind, .open = add_open, .release = add_release};

static int add_stage(struct txn *t, const struct action *a, void **out, struct tide_error *err)
{
    const struct q_block_export_options *args = a->args;
    struct root *claim;
    if (export_claim(txn_exports(t), args->id, args->writable, args->node_name, &claim) == 0)
        *out = claim;
    return 0;
}

static int add_prepare(struct txn *t, const struct action *a, struct tide_error *err)
{
    const struct q_block_export_options *args = a->args;
    struct export *e;
    struct export_rec *rec = txn_reserve(t, &add_undo, sizeof *rec, err);
    if (!rec)
        return -ENOMEM;
    int r = export_make(txn_exports(t), args, txn_staged(t, a), &e, err);
    if (r < 0)
        return r;
    rec->e = e;
    txn_arm(t, rec);
    txn_sees(t, "node '%s' of %llu bytes", args->node_name,
             (unsigned long long)node_size(export_shows(e)));
    txn_does(t, "export '%s' serves it %s as '%s'", args->id,
             args->writable ? "for writing" : "read-only", shown_name(export_name(e)).text);
    return 0;
}

const struct action_ops block_export_add_ops = {
    .prepare = add_prepare, .stage = add_stage, .unstage = unstage_claim};

/* ------------------------------------------------------------------ del */

static void del_unwind(void *p)
{
    struct export_rec *rec = p;
    export_unhide(rec->e);
}

static void del_open(void *p)
{
    struct export_rec *rec = p;
    if (!export_end(rec->e))
        rec->e = NULL;
}

static void del_release(void *p, bool undone)
{
    struct export_rec *rec = p;
    if (!undone && rec->e)
        export_retire(rec->e);
}

static const struct undo_ops del_undo = {
    .unwind = del_unwind, .open = del_open, .release = del_release};

static int del_prepare(struct txn *t, const struct action *a, struct tide_error *err)
{
    const struct q_block_export_del *args = a->args;
    bool hard = args->has_mode && args->mode == Q_BLOCK_EXPORT_REMOVE_MODE_HARD;
    struct export *e;
    int r = export_find_del(txn_exports(t), args->id, hard, &e, err);
    if (r < 0)
        return r;
    struct export_rec *rec = txn_reserve(t, &del_undo, sizeof *rec, err);
    if (!rec)
        return -ENOMEM;
    unsigned n = export_n_connections(e);
    rec->e = e;
    export_hide(e);
    txn_arm(t, rec);
    txn_sees(t, "export '%s' of node '%s' with %u connection%s", args->id,
             node_name(export_shows(e)), n, plural(n));
    txn_does(t, "the export ends%s", n ? ", and its clients are cut off" : "");
    return 0;
}

const struct action_ops block_export_del_ops = {.prepare = del_prepare};

/* ------------------------------------------------------------------ set-node */

struct set_node_rec {
    struct export *e;   /* not looked at any more once the list has happened */
    struct root *claim; /* to the old node; undone: to the new one */
};

static void set_node_unwind(void *p)
{
    struct set_node_rec *rec = p;
    export_swap_node(rec->e, rec->claim);
}

static void set_node_release(void *p, bool undone)
{
    struct set_node_rec *rec = p;
    root_free(rec->claim);
}

static const struct undo_ops set_node_undo = {.unwind = set_node_unwind,
                                              .release = set_node_release};

static int set_node_stage(struct txn *t, const struct action *a, void **out, struct tide_error *err)
{
    const struct q_block_export_set_node *args = a->args;
    bool writable = export_is_writable(txn_exports(t), args->id);
    struct root *claim;
    if (export_claim(txn_exports(t), args->id, writable, args->node_name, &claim) == 0)
        *out = claim;
    return 0;
}

static int set_node_prepare(struct txn *t, const struct action *a, struct tide_error *err)
{
    const struct q_block_export_set_node *args = a->args;
    struct set_node_rec *rec = txn_reserve(t, &set_node_undo, sizeof *rec, err);
    if (!rec)
        return -ENOMEM;
    rec->claim = txn_staged(t, a);
    int r = export_set_node(txn_exports(t), args->id, args->node_name, &rec->claim, &rec->e, err);
    if (r < 0)
        return r;
    txn_arm(t, rec);
    unsigned n = export_n_connections(rec->e);
    txn_sees(t, "export '%s' shows node '%s' to %u connection%s", args->id,
             node_name(root_node(rec->claim)), n, plural(n));
    txn_does(t, "it shows node '%s'", args->node_name);
    return 0;
}

const struct action_ops block_export_set_node_ops = {
    .prepare = set_node_prepare, .stage = set_node_stage, .unstage = unstage_claim};
