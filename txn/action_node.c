/* SPDX-License-Identifier: Apache-2.0 */
/* blockdev-add and blockdev-del. A node is opened before it comes into sight, and closed after it
 * has gone out of it: beforehand (stage) and afterwards (release), where the list allows it. What
 * is left in between is a few pointers (block/graph_open.c). */
#include <errno.h>

#include "block/node.h"
#include "schema/types.h"
#include "txn/actions.h"

struct node_rec {
    struct node *n;
};

/* ------------------------------------------------------------------ add */

static void add_unwind(void *p)
{
    struct node_rec *rec = p;
    graph_withdraw(rec->n);
}

static co_fn void add_release(void *p, bool undone)
{
    struct node_rec *rec = p;
    if (undone)
        graph_close(rec->n, false);
}

static const struct undo_ops add_undo = {.unwind = add_unwind, .release = add_release};

static co_fn int add_stage(struct txn *t, const struct action *a, void **out,
                           struct tide_error *err)
{
    struct node *n;
    int r = graph_open(txn_graph(t), a->args, true, &n, err);
    if (r == 0)
        *out = n;
    return r;
}

static co_fn void add_unstage(struct txn *t, void *staged)
{
    graph_close(staged, false);
}

static co_fn int add_prepare(struct txn *t, const struct action *a, struct tide_error *err)
{
    struct node *n = txn_staged(t, a);
    struct node_rec *rec = txn_reserve(t, &add_undo, sizeof *rec, err);
    int r = rec ? 0 : -ENOMEM;
    if (n && (r < 0 || !graph_can_publish(n))) {
        graph_close(n, false);
        n = NULL;
    }
    if (r == 0 && !n)
        r = graph_open(txn_graph(t), a->args, true, &n, err);
    if (r < 0)
        return r;
    txn_does(t, "node '%s' of %llu bytes, driver %s%s", node_name(n),
             (unsigned long long)node_size(n), node_driver(n),
             node_read_only(n) ? ", read-only" : "");
    rec->n = n;
    graph_publish(n);
    txn_arm(t, rec);
    return 0;
}

/* ------------------------------------------------------------------ del */

static void del_unwind(void *p)
{
    struct node_rec *rec = p;
    graph_publish(rec->n);
}

static co_fn void del_release(void *p, bool undone)
{
    struct node_rec *rec = p;
    if (!undone)
        graph_close(rec->n, true);
}

static const struct undo_ops del_undo = {.unwind = del_unwind, .release = del_release};

static int del_prepare(struct txn *t, const struct action *a, struct tide_error *err)
{
    const struct q_blockdev_del *args = a->args;
    struct node *n;
    int r = graph_check_del(txn_graph(t), args->node_name, &n, err);
    if (r < 0)
        return r;
    struct node_rec *rec = txn_reserve(t, &del_undo, sizeof *rec, err);
    if (!rec)
        return -ENOMEM;
    txn_sees(t, "node '%s' of %llu bytes, driver %s", node_name(n),
             (unsigned long long)node_size(n), node_driver(n));
    txn_does(t, "closes it; its name is free");
    rec->n = n;
    graph_unpublish(n);
    txn_arm(t, rec);
    return 0;
}

const struct action_ops blockdev_add_ops = {
    .prepare = add_prepare, .stage = add_stage, .unstage = add_unstage};
const struct action_ops blockdev_del_ops = {.prepare = del_prepare};
