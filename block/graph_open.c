/* SPDX-License-Identifier: Apache-2.0 */
/* How nodes come and go: opened unseen, published, taken out of sight, closed unseen.
 *
 * Opening and closing may take as long as a disk likes; coming into and going out of sight is a
 * matter of pointers. So a list opens beforehand, closes afterwards, and in between does only what
 * cannot fail and has an exact inverse. A node's children know of it (`parents`) while it is in
 * sight; before and after, it still points at them.
 *
 * Children that were described inside a node's options come into sight and go with it, unless
 * others use them by then. */
#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "base/bytes.h"
#include "base/log.h"
#include "base/mem.h"
#include "block/driver.h"
#include "block/root.h"
#include "schema/types.h"

/* ------------------------------------------------------------------ edges */

/* n->child[i] in sight of it: n stands at place `at` among its parents. Needs no memory. */
static void add_edge(struct node *n, unsigned i, unsigned at)
{
    struct node *c = n->child[i];
    assert(c->n_parents < c->n_edges);
    memmove(&c->parents[at + 1], &c->parents[at], (c->n_parents - at) * sizeof *c->parents);
    c->parents[at] = n;
    c->n_parents++;
}

/* The reverse; returns the place. */
static unsigned take_edge(struct node *n, unsigned i)
{
    struct node *c = n->child[i];
    unsigned at = c->n_parents - 1;
    while (c->parents[at] != n)
        at--;
    c->n_parents--;
    memmove(&c->parents[at], &c->parents[at + 1], (c->n_parents - at) * sizeof *c->parents);
    return at;
}

/* `goes`: it was opened for n alone. Room among its parents is made here, once for each edge. */
static int link_child(struct node *n, const char *role, struct node *c, bool goes)
{
    assert(n->n_children < NODE_MAX_CHILDREN);
    if (c->depth >= NODE_MAX_DEPTH)
        return -ELOOP;
    if (c->n_edges == c->cap_parents) {
        unsigned cap = c->cap_parents ? 2 * c->cap_parents : 2;
        struct node **p = mem_realloc(c->parents, cap, sizeof *p);
        if (!p)
            return -ENOMEM;
        c->parents = p;
        c->cap_parents = cap;
    }
    c->n_edges++;
    n->depth = MAX(n->depth, c->depth + 1);
    if (goes) {
        n->goes |= 1u << n->n_children;
        n->made |= 1u << n->n_children;
    }
    n->child_role[n->n_children] = role;
    n->child[n->n_children++] = c;
    return 0;
}

/* ------------------------------------------------------------------ into sight and out of it */

/* A parent comes before its children here, as names are counted from the top. */
static void name_new(struct node *n)
{
    n->first_auto_name = n->graph->next_auto_name;
    if (n->unnamed)
        snprintf(n->name, sizeof n->name, "#block%03u", n->graph->next_auto_name++);
    for (unsigned i = 0; i < n->n_children; i++) {
        if (n->goes & 1u << i)
            name_new(n->child[i]);
    }
}

static void publish_new(struct node *n)
{
    struct graph *g = n->graph;
    for (unsigned i = 0; i < n->n_children; i++) {
        if (n->goes & 1u << i)
            publish_new(n->child[i]);
        add_edge(n, i, n->child[i]->n_parents);
    }
    n->goes = 0;
    TAILQ_REMOVE(&g->opening, n, link);
    TAILQ_INSERT_HEAD(&g->nodes, n, link);
    n->sight = NODE_PUBLISHED;
}

/* The exact reverse of graph_unpublish(), step by step. */
static void publish_again(struct node *n)
{
    struct graph *g = n->graph;
    for (unsigned i = n->n_children; i-- > 0;) {
        if (n->goes & 1u << i)
            publish_again(n->child[i]);
        add_edge(n, i, n->place[i]);
    }
    n->goes = 0;
    TAILQ_REMOVE(&g->leaving, n, link);
    if (n->older)
        TAILQ_INSERT_BEFORE(n->older, n, link);
    else
        TAILQ_INSERT_TAIL(&g->nodes, n, link);
    n->sight = NODE_PUBLISHED;
}

void graph_publish(struct node *n)
{
    assert(n->sight != NODE_PUBLISHED);
    if (n->sight == NODE_UNPUBLISHED) {
        publish_again(n);
        return;
    }
    name_new(n);
    publish_new(n);
}

/* With it go, if it `never` was there, the children that came with it; else those that nobody uses
 * any more. */
static void unpublish(struct node *n, bool never)
{
    /* A claim may have permissions of it still: it is given back before the node is closed. */
    assert(n->sight == NODE_PUBLISHED && !n->n_parents && !n->n_roots);
    n->older = TAILQ_NEXT(n, link);
    TAILQ_REMOVE(&n->graph->nodes, n, link);
    TAILQ_INSERT_HEAD(&n->graph->leaving, n, link);
    n->sight = NODE_UNPUBLISHED;
    for (unsigned i = 0; i < n->n_children; i++) {
        struct node *c = n->child[i];
        n->place[i] = take_edge(n, i);
        if (never ? n->made >> i & 1 : !c->owned && !c->n_parents && !c->n_roots) {
            n->goes |= 1u << i;
            unpublish(c, never);
        }
    }
}

void graph_unpublish(struct node *n)
{
    unpublish(n, false);
}

void graph_withdraw(struct node *n)
{
    unpublish(n, true);
    n->graph->next_auto_name = n->first_auto_name;
}

/* ------------------------------------------------------------------ opening */

static bool name_is_valid(const char *s)
{
    if (!((s[0] >= 'a' && s[0] <= 'z') || (s[0] >= 'A' && s[0] <= 'Z')))
        return false;
    return s[strspn(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._")] == 0;
}

/* Taken: in sight, or of a node that is being opened. */
static bool name_is_taken(struct graph *g, const char *name)
{
    struct node *n;
    TAILQ_FOREACH (n, &g->opening, link) {
        if (!strcmp(n->name, name))
            return true;
    }
    return graph_find(g, name) != NULL;
}

static int take_name(struct graph *g, struct node *n, const char *name, struct tide_error *err)
{
    if (!name) { /* it gets its number when it is published, so that one that fails uses up none */
        n->unnamed = true;
        snprintf(n->name, sizeof n->name, "#block");
        return 0;
    }
    if (strlen(name) > NODE_NAME_MAX)
        return tide_fail(err, -EINVAL, "node-name '%s' is longer than %u bytes",
                         shown_name(name).text, NODE_NAME_MAX);
    if (!name_is_valid(name))
        return tide_fail(
            err, -EINVAL,
            "node-name '%s' is not valid: a letter, then letters, digits, '-', '.', '_'",
            shown_name(name).text);
    if (name_is_taken(g, name))
        return tide_fail(err, -EEXIST, "node-name '%s' is in use already", name);
    strcpy(n->name, name);
    return 0;
}

static const struct driver_ops *driver_find(const char *name)
{
    for (int i = 0; drivers[i]; i++) {
        if (!strcmp(drivers[i]->name, name))
            return drivers[i];
    }
    return NULL;
}

/* A node described inside another's options (`parent`, else NULL) takes from it what it does not
 * say itself; discards it passes on, for the parent has decided about them. */
static int take_options(struct node *n, const struct q_blockdev_options *o,
                        const struct node *parent, struct tide_error *err)
{
    const struct q_blockdev_cache_options *cache = o->cache;
    n->read_only = o->has_read_only ? o->read_only : parent && parent->read_only;
    n->auto_read_only =
        o->has_auto_read_only ? o->auto_read_only : parent && parent->auto_read_only;
    n->force_share = o->has_force_share ? o->force_share : parent && parent->force_share;
    n->discard_unmap =
        o->has_discard ? o->discard == Q_BLOCKDEV_DISCARD_OPTIONS_UNMAP : parent != NULL;
    n->detect_zeroes =
        o->has_detect_zeroes ? (int)o->detect_zeroes : Q_BLOCKDEV_DETECT_ZEROES_OPTIONS_OFF;
    n->no_flush = cache && cache->has_no_flush ? cache->no_flush : parent && parent->no_flush;
    n->direct = cache && cache->has_direct ? cache->direct : parent && parent->direct;
    if (n->detect_zeroes == Q_BLOCKDEV_DETECT_ZEROES_OPTIONS_UNMAP && !n->discard_unmap)
        return tide_fail(err, -EINVAL, "node '%s': detect-zeroes=unmap needs discard=unmap",
                         n->name);
    if (n->force_share && !n->read_only)
        return tide_fail(err, -EINVAL, "node '%s': force-share=on needs read-only=on", n->name);
    return 0;
}

static struct node *node_alloc(struct graph *g, const struct driver_ops *ops)
{
    struct node *n = mem_zalloc(sizeof *n);
    if (!n)
        return NULL;
    n->state = mem_zalloc(ops->state_size ? ops->state_size : 1);
    if (!n->state) {
        mem_free(n);
        return NULL;
    }
    n->graph = g;
    n->align = 1;
    TAILQ_INIT(&n->writes);
    n->sight = NODE_OPENING;
    TAILQ_INSERT_HEAD(&g->opening, n, link);
    return n;
}

static co_fn int node_open(struct graph *g, const struct q_blockdev_options *o,
                           const struct node *parent, struct node **out, struct tide_error *err)
{
    const char *driver = q_blockdev_driver_names[o->driver];
    const struct driver_ops *ops = driver_find(driver);
    if (!ops)
        return tide_fail(err, -ENOTSUP, "driver '%s' is not built into this daemon", driver);
    struct node *n = node_alloc(g, ops);
    if (!n)
        return tide_fail(err, -ENOMEM, "no memory for node '%s'", o->node_name ? o->node_name : "");
    int r = take_name(g, n, o->node_name, err);
    if (r == 0)
        r = take_options(n, o, parent, err);
    if (r == 0) {
        n->ops = ops;
        r = ops->open(n, o, err);
    }
    if (r < 0) {
        graph_close(n, false);
        return r;
    }
    *out = n;
    return 0;
}

int node_open_child(struct node *n, const char *role, const struct q_blockdev_ref *ref,
                    struct tide_error *err)
{
    bool here = ref->kind != Q_KIND_STRING;
    struct node *c;
    int r = here ? node_open(n->graph, ref->object, n, &c, err)
                 : graph_find_err(n->graph, ref->string, &c, err);
    if (r < 0)
        return r;
    r = link_child(n, role, c, here);
    if (r < 0) {
        if (here)
            graph_close(c, false);
        if (r == -ELOOP)
            return tide_fail(err, r, "node '%s' would stand on more than %u others", n->name,
                             NODE_MAX_DEPTH);
        return tide_fail(err, r, "no memory for node '%s'", n->name);
    }
    /* A filter writes nothing of its own: who wants to write through it is refused (root.c). */
    if (c->read_only && !n->read_only && !n->ops->filter)
        return tide_fail(err, -EACCES, "node '%s' is read-only: open '%s' with read-only=on",
                         c->name, n->name);
    return 0;
}

int graph_open(struct graph *g, const struct q_blockdev_options *opts, bool owned,
               struct node **out, struct tide_error *err)
{
    if (owned && !opts->node_name)
        return tide_fail(err, -EINVAL, "'node-name' is missing: a node at the top needs one");
    int r = node_open(g, opts, NULL, out, err);
    if (r == 0)
        (*out)->owned = owned;
    return r;
}

bool graph_can_publish(const struct node *n)
{
    bool can = true;
    for (unsigned i = 0; i < n->n_children && can; i++) {
        const struct node *c = n->child[i];
        can = n->goes & 1u << i ? graph_can_publish(c) : c->sight == NODE_PUBLISHED;
    }
    return can;
}

int graph_add(struct graph *g, const struct q_blockdev_options *opts, struct node **out,
              struct tide_error *err)
{
    int r = graph_open(g, opts, true, out, err);
    if (r < 0)
        return r;
    graph_effects_begin(g);
    graph_publish(*out);
    graph_effects_end(g);
    return 0;
}

/* ------------------------------------------------------------------ closing */

static co_fn void node_close(struct node *n)
{
    assert(n->sight != NODE_PUBLISHED && !n->n_edges && !n->n_roots && !n->hooks && !n->perm);
    while (n->bitmaps) {
        struct dirty_bitmap *b = n->bitmaps;
        tracker_detach(b);
        dirty_bitmap_free(b);
    }
    if (n->ops)
        n->ops->close(n);
    TAILQ_REMOVE(n->sight == NODE_OPENING ? &n->graph->opening : &n->graph->leaving, n, link);
    for (unsigned i = 0; i < n->n_children; i++) {
        n->child[i]->n_edges--;
        if (n->goes & 1u << i)
            node_close(n->child[i]);
    }
    tracker_free(n);
    mem_free(n->parents);
    mem_free(n->filename);
    mem_free(n->state);
    mem_free(n);
}

void graph_close(struct node *n, bool flush)
{
    int r = flush && !n->read_only ? node_flush(n) : 0;
    if (r < 0)
        log_warn("block", "node '%s': flush at close: %s", n->name, tide_strerror(-r));
    node_close(n);
}

/* A bitmap in use on `n` or on a child that would go with it. */
static const struct dirty_bitmap *busy_bitmap(const struct node *n)
{
    const struct dirty_bitmap *b = n->bitmaps;
    while (b && !b->n_busy)
        b = b->next;
    for (unsigned i = 0; i < n->n_children && !b; i++) {
        const struct node *c = n->child[i];
        if (!c->owned && c->n_parents == 1 && !c->n_roots)
            b = busy_bitmap(c);
    }
    return b;
}

static int check_unused(struct node *n, struct tide_error *err)
{
    struct root *r;
    for (r = TAILQ_FIRST(&n->graph->roots); r; r = root_next(r)) {
        if (root_uses(r, n))
            return tide_fail(err, -EBUSY, "node '%s' is in use by %s", n->name, root_what(r));
    }
    if (n->n_parents)
        return tide_fail(err, -EBUSY, "node '%s' is in use by node '%s'", n->name,
                         n->parents[0]->name);
    const struct dirty_bitmap *b = busy_bitmap(n);
    if (b)
        return tide_fail(err, -EBUSY, "bitmap '%s' on node '%s' is in use",
                         shown_name(b->name).text, b->node->name);
    return 0;
}

int graph_check_del(struct graph *g, const char *name, struct node **out, struct tide_error *err)
{
    int r = graph_find_err(g, name, out, err);
    if (r == 0 && !(*out)->owned && (*out)->n_parents)
        r = tide_fail(err, -EPERM, "node '%s' was made with its parent and goes with it", name);
    return r < 0 ? r : check_unused(*out, err);
}

/* Queries may yield while they hold a node: none may hold this one when it goes. But they do not
 * wait for the disk. */
static co_fn void unpublish_and_close(struct node *n)
{
    struct graph *g = n->graph;
    graph_effects_begin(g);
    graph_unpublish(n);
    graph_effects_end(g);
    graph_close(n, true);
}

int graph_del(struct graph *g, const char *name, struct tide_error *err)
{
    struct node *n;
    int r = graph_check_del(g, name, &n, err);
    if (r == 0)
        unpublish_and_close(n);
    return r;
}

void graph_retire(struct node *n)
{
    struct tide_error why;
    if (check_unused(n, &why) < 0) {
        log_info("block", "node '%s' stays when its job ends: %s", n->name, why.msg);
        return;
    }
    graph_unpublish(n);
    graph_close(n, false);
}

void graph_close_all(struct graph *g)
{
    struct node *n = TAILQ_FIRST(&g->nodes);
    while (n) {
        if (n->n_parents) {
            n = TAILQ_NEXT(n, link);
            continue;
        }
        unpublish_and_close(n);
        n = TAILQ_FIRST(&g->nodes);
    }
}
