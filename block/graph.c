/* SPDX-License-Identifier: Apache-2.0 */
/* The graph: which nodes there are, what they are called, what stands on what.
 *
 * Edges are plain: a node points at its children, a child at its parents (one entry for each edge).
 * Permissions follow: what a node is used for is the union of what its roots want and of what its
 * parents are used for; file drivers turn that into locks other processes see. */
#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "base/bytes.h"
#include "base/log.h"
#include "base/mem.h"
#include "block/driver.h"
#include "block/root.h"
#include "block/throttle_group.h"
#include "io/io.h"
#include "schema/types.h"

int graph_new(struct io *io, struct graph **out)
{
    struct graph *g = mem_zalloc(sizeof *g);
    if (!g)
        return -ENOMEM;
    g->io = io;
    g->quiesce_timeout = 3000000000u;
    TAILQ_INIT(&g->nodes);
    TAILQ_INIT(&g->roots);
    TAILQ_INIT(&g->throttle_groups);
    size_t size = io_n_loops(io) * sizeof *g->loop;
    g->loop = mem_aligned(64, size);
    if (g->loop)
        memset(g->loop, 0, size);
    if (!g->loop || reaper_new(g) < 0) {
        graph_free(g);
        return -ENOMEM;
    }
    *out = g;
    return 0;
}

void graph_free(struct graph *g)
{
    if (!g)
        return;
    assert(TAILQ_EMPTY(&g->nodes) && TAILQ_EMPTY(&g->roots));
    throttle_groups_free(g);
    if (g->reaper)
        reaper_free(g);
    mem_free(g->loop);
    mem_free(g);
}

void graph_lock(struct graph *g)
{
    co_mutex_lock(&g->commands);
}

void graph_unlock(struct graph *g)
{
    co_mutex_unlock(&g->commands);
}

void graph_effects_begin(struct graph *g)
{
    co_rwlock_wrlock(&g->effects);
}

void graph_query_begin(struct graph *g)
{
    co_rwlock_rdlock(&g->effects);
}

void graph_effects_end(struct graph *g)
{
    co_rwlock_unlock(&g->effects);
}

void graph_query_end(struct graph *g)
{
    co_rwlock_unlock(&g->effects);
}

struct io *graph_io(struct graph *g)
{
    return g->io;
}

static struct node *find_any(struct graph *g, const char *name)
{
    struct node *n;
    TAILQ_FOREACH (n, &g->nodes, link) {
        if (!strcmp(n->name, name))
            return n;
    }
    return NULL;
}

struct node *graph_find(struct graph *g, const char *name)
{
    struct node *n = find_any(g, name);
    return n && n->opened ? n : NULL;
}

int graph_find_err(struct graph *g, const char *name, struct node **out, struct tide_error *err)
{
    *out = graph_find(g, name);
    return *out ? 0 : tide_fail(err, -ENOENT, "node '%s' not found", shown_name(name).text);
}

void graph_each(struct graph *g, void (*fn)(void *, struct node *), void *arg)
{
    struct node *n;
    TAILQ_FOREACH (n, &g->nodes, link) {
        if (n->opened)
            fn(arg, n);
    }
}

bool node_reaches(const struct node *from, const struct node *to)
{
    if (from == to)
        return true;
    for (unsigned i = 0; i < from->n_children; i++) {
        if (node_reaches(from->child[i], to))
            return true;
    }
    return false;
}

/* ------------------------------------------------------------------ edges */

static int link_child(struct node *n, const char *role, struct node *c)
{
    assert(n->n_children < NODE_MAX_CHILDREN);
    if (c->depth >= NODE_MAX_DEPTH)
        return -ELOOP;
    n->depth = MAX(n->depth, c->depth + 1);
    struct node **p = mem_realloc(c->parents, c->n_parents + 1, sizeof *p);
    if (!p)
        return -ENOMEM;
    c->parents = p;
    c->parents[c->n_parents++] = n;
    n->child_role[n->n_children] = role;
    n->child[n->n_children++] = c;
    return 0;
}

static void unlink_child(struct node *n, unsigned i)
{
    struct node *c = n->child[i];
    unsigned p = 0;
    while (c->parents[p] != n)
        p++;
    c->parents[p] = c->parents[--c->n_parents];
    n->child[i] = n->child[--n->n_children];
    n->child_role[i] = n->child_role[n->n_children];
}

/* ------------------------------------------------------------------ permissions */

static unsigned wanted_perm(struct node *n)
{
    unsigned perm = 0;
    struct graph *g = n->graph;
    struct root *r;
    for (r = TAILQ_FIRST(&g->roots); r; r = root_next(r)) {
        perm |= root_perm(r, n) & (ROOT_READ | ROOT_WRITE);
    }
    for (unsigned i = 0; i < n->n_parents; i++)
        perm |= n->parents[i]->perm;
    return perm;
}

static co_fn int node_update_perm(struct node *n, struct tide_error *err)
{
    unsigned old = n->perm, perm = wanted_perm(n);
    if (perm == old)
        return 0;
    int r = n->ops->set_perm ? n->ops->set_perm(n, perm, err) : 0;
    if (r < 0)
        return r;
    n->perm = perm;
    for (unsigned i = 0; i < n->n_children && r == 0; i++)
        r = node_update_perm(n->child[i], err);
    if (r < 0) {
        /* Give back what was taken here; those below that changed follow from our own state. */
        struct tide_error ignored;
        n->perm = old;
        if (n->ops->set_perm)
            n->ops->set_perm(n, old, &ignored);
        for (unsigned i = 0; i < n->n_children; i++)
            node_update_perm(n->child[i], &ignored);
    }
    return r;
}

/* ------------------------------------------------------------------ opening */

int node_refresh_perm(struct node *n, struct tide_error *err)
{
    /* Two updates at a time would decide on what the other has not finished. */
    co_mutex_lock(&n->graph->perms);
    int r = node_update_perm(n, err);
    co_mutex_unlock(&n->graph->perms);
    return r;
}

static bool name_is_valid(const char *s)
{
    if (!((s[0] >= 'a' && s[0] <= 'z') || (s[0] >= 'A' && s[0] <= 'Z')))
        return false;
    return s[strspn(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._")] == 0;
}

static int take_name(struct graph *g, struct node *n, const char *name, struct tide_error *err)
{
    if (!name) {
        snprintf(n->name, sizeof n->name, "#block%03u", g->next_auto_name++);
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
    if (find_any(g, name))
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
        return tide_fail(err, -EINVAL, "detect-zeroes=unmap needs discard=unmap on the same node");
    if (n->force_share && !n->read_only)
        return tide_fail(err, -EINVAL, "force-share=on needs read-only=on");
    return 0;
}

/* Take the node out of the graph and free it; children that were described inside it go with it. */
static co_fn void node_destroy(struct node *n)
{
    struct graph *g = n->graph;
    assert(!n->n_parents && !n->n_roots && !n->hooks);
    while (n->bitmaps) {
        struct dirty_bitmap *b = n->bitmaps;
        tracker_detach(b);
        dirty_bitmap_free(b);
    }
    if (n->ops)
        n->ops->close(n);
    TAILQ_REMOVE(&g->nodes, n, link);
    while (n->n_children) {
        struct node *c = n->child[0];
        struct tide_error ignored;
        unlink_child(n, 0);
        if (!c->owned && !c->n_parents && !c->n_roots)
            node_destroy(c);
        else
            node_refresh_perm(c, &ignored); /* gives up locks: cannot be refused */
    }
    tracker_free(n);
    mem_free(n->parents);
    mem_free(n->filename);
    mem_free(n->state);
    mem_free(n);
}

/* The node and what goes with it are found no more; their names stay taken. */
static void hide(struct node *n)
{
    n->opened = false;
    for (unsigned i = 0; i < n->n_children; i++) {
        struct node *c = n->child[i];
        if (!c->owned && c->n_parents == 1 && !c->n_roots)
            hide(c);
    }
}

/* Queries walk the list of nodes and may yield at one of them: none may stand at this one when it
 * goes. But closing may take as long as a disk likes, and queries do not wait for that. */
static co_fn void destroy_unseen(struct node *n)
{
    struct graph *g = n->graph;
    graph_effects_begin(g);
    hide(n);
    graph_effects_end(g);
    node_destroy(n);
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
    TAILQ_INSERT_HEAD(&g->nodes, n, link);
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
    if (r == 0)
        r = node_refresh_perm(n, err);
    if (r < 0) {
        destroy_unseen(n);
        return r;
    }
    n->opened = true;
    TAILQ_REMOVE(&g->nodes, n,
                 link); /* its children were opened meanwhile; it is newer than they */
    TAILQ_INSERT_HEAD(&g->nodes, n, link);
    *out = n;
    return 0;
}

int node_open_child(struct node *n, const char *role, const struct q_blockdev_ref *ref,
                    struct tide_error *err)
{
    struct node *c;
    int r;
    if (ref->kind == Q_KIND_STRING)
        r = graph_find_err(n->graph, ref->string, &c, err);
    else
        r = node_open(n->graph, ref->object, n, &c, err);
    if (r < 0)
        return r;
    r = link_child(n, role, c);
    if (r < 0) {
        if (ref->kind != Q_KIND_STRING)
            destroy_unseen(c);
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

int graph_add(struct graph *g, const struct q_blockdev_options *opts, struct node **out,
              struct tide_error *err)
{
    if (!opts->node_name)
        return tide_fail(err, -EINVAL, "'node-name' is missing: a node at the top needs one");
    int r = node_open(g, opts, NULL, out, err);
    if (r == 0)
        (*out)->owned = true;
    return r;
}

/* ------------------------------------------------------------------ closing */

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

int graph_del(struct graph *g, const char *name, struct tide_error *err)
{
    struct node *n;
    int r = graph_find_err(g, name, &n, err);
    if (r == 0 && !n->owned && n->n_parents)
        r = tide_fail(err, -EPERM, "node '%s' was made with its parent and goes with it", name);
    if (r == 0)
        r = check_unused(n, err);
    if (r < 0)
        return r;
    int flushed = n->read_only ? 0 : node_flush(n);
    if (flushed < 0)
        log_warn("block", "node '%s': flush at close: %s", name, tide_strerror(-flushed));
    destroy_unseen(n);
    return 0;
}

void graph_close_all(struct graph *g)
{
    struct node *n = TAILQ_FIRST(&g->nodes);
    while (n) {
        if (n->n_parents) {
            n = TAILQ_NEXT(n, link);
            continue;
        }
        int r = n->read_only ? 0 : node_flush(n);
        if (r < 0)
            log_warn("block", "node '%s': flush at close: %s", n->name, tide_strerror(-r));
        destroy_unseen(n);
        n = TAILQ_FIRST(&g->nodes);
    }
}
