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
    TAILQ_INIT(&g->opening);
    TAILQ_INIT(&g->leaving);
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
    assert(TAILQ_EMPTY(&g->nodes) && TAILQ_EMPTY(&g->roots) && TAILQ_EMPTY(&g->opening) &&
           TAILQ_EMPTY(&g->leaving));
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

struct node *graph_find(struct graph *g, const char *name)
{
    struct node *n;
    TAILQ_FOREACH (n, &g->nodes, link) {
        if (!strcmp(n->name, name))
            return n;
    }
    return NULL;
}

int graph_find_err(struct graph *g, const char *name, struct node **out, struct tide_error *err)
{
    *out = graph_find(g, name);
    return *out ? 0 : tide_fail(err, -ENOENT, "node '%s' not found", shown_name(name).text);
}

void graph_each(struct graph *g, void (*fn)(void *, struct node *), void *arg)
{
    struct node *n;
    TAILQ_FOREACH (n, &g->nodes, link)
        fn(arg, n);
}

bool node_file(const struct node *n, uint64_t *dev, uint64_t *ino)
{
    if (n->ops->file_id)
        n->ops->file_id(n, dev, ino);
    return n->ops->file_id != NULL;
}

static bool is_file(const struct node *n, uint64_t dev, uint64_t ino)
{
    uint64_t own_dev, own_ino;
    return node_file(n, &own_dev, &own_ino) && own_dev == dev && own_ino == ino;
}

struct node *graph_find_file(struct graph *g, uint64_t dev, uint64_t ino)
{
    struct node *n;
    TAILQ_FOREACH (n, &g->nodes, link) {
        if (is_file(n, dev, ino))
            return n;
    }
    return NULL;
}

struct node *graph_find_left_file(struct graph *g, uint64_t dev, uint64_t ino)
{
    struct node *n;
    TAILQ_FOREACH (n, &g->leaving, link) {
        if (n->perm && is_file(n, dev, ino))
            return n;
    }
    return NULL;
}

int node_lock_test(struct node *n, uint64_t first, uint64_t len)
{
    return n->ops->lock_test(n, first, len);
}

bool node_stands_on_file(const struct node *n, uint64_t dev, uint64_t ino)
{
    bool found = is_file(n, dev, ino);
    for (unsigned i = 0; i < n->n_children && !found; i++)
        found = node_stands_on_file(n->child[i], dev, ino);
    return found;
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

/* ------------------------------------------------------------------ permissions */

/* What a list has taken out of sight may come back: until it is closed it keeps what claims hold of
 * it, and so has what it needs of those that it stands on. */
static unsigned perm_of_leaving_parents(const struct node *n)
{
    unsigned perm = 0;
    struct node *p;
    TAILQ_FOREACH (p, &n->graph->leaving, link) {
        for (unsigned i = 0; i < p->n_children; i++)
            perm |= p->child[i] == n ? p->perm : 0;
    }
    return perm;
}

static unsigned wanted_perm(struct node *n)
{
    unsigned perm = perm_of_leaving_parents(n);
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

int node_refresh_perm(struct node *n, struct tide_error *err)
{
    /* Two updates at a time would decide on what the other has not finished. */
    co_mutex_lock(&n->graph->perms);
    int r = node_update_perm(n, err);
    co_mutex_unlock(&n->graph->perms);
    return r;
}
