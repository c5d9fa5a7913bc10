/* SPDX-License-Identifier: Apache-2.0 */
/* The table of exports, newest first, and what hangs on it: names, bitmaps, iothreads, the NBD
 * server.
 *
 * An export that was asked to end stays in the table ("shutting-down") until its last connection
 * has gone; then its bitmaps are free again, its root is given back, and the event tells. All of
 * this is on the control loop, so between two yields nobody else changes the table; what was looked
 * up before a yield is looked up again after it. */
#include "export/export.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

#include "base/mem.h"
#include "block/node.h"
#include "block/root.h"
#include "block/tracker.h"
#include "co/sync.h"
#include "event/event.h"
#include "export/nbd/nbd.h"
#include "io/io.h"
#include "schema/types.h"

struct iothread {
    char *id;
    struct loop *loop;
    unsigned n_used;
    TAILQ_ENTRY(iothread) link;
};

struct export
{
    struct nbd_export nbd; /* first: gone() casts */
    struct exports *x;
    char *id, *name, *description;
    char *node_name; /* a copy: the root may be half gone when somebody asks */
    struct iothread *iothread;
    bool listed, dying;
    TAILQ_ENTRY(export) link;
};

struct exports {
    struct graph *graph;
    struct io *io;
    struct event_bus *bus;
    struct nbd_server *nbd;
    bool open; /* clients are served; until then they wait in the backlog */
    uint64_t serial;
    unsigned next_loop;
    TAILQ_HEAD(, export) list; /* newest first */
    TAILQ_HEAD(, iothread) threads;
    struct spin spin;        /* for `changed` */
    struct co_queue changed; /* an export has left the table, or the server has ended */
};

int exports_new(struct graph *g, struct event_bus *bus, struct exports **out)
{
    struct exports *x = mem_zalloc(sizeof *x);
    if (!x)
        return -ENOMEM;
    x->graph = g;
    x->io = graph_io(g);
    x->bus = bus;
    x->spin = (struct spin)SPIN_INIT;
    TAILQ_INIT(&x->list);
    TAILQ_INIT(&x->threads);
    *out = x;
    return 0;
}

static void iothread_free(struct iothread *t)
{
    mem_free(t->id);
    mem_free(t);
}

void exports_free(struct exports *x)
{
    if (!x)
        return;
    assert(TAILQ_EMPTY(&x->list) && !x->nbd);
    while (!TAILQ_EMPTY(&x->threads)) {
        struct iothread *t = TAILQ_FIRST(&x->threads);
        TAILQ_REMOVE(&x->threads, t, link);
        iothread_free(t);
    }
    mem_free(x);
}

static void tell_changed(struct exports *x)
{
    spin_lock(&x->spin);
    co_queue_wake_all(&x->changed);
    spin_unlock(&x->spin);
}

static void wait_changed(struct exports *x)
{
    spin_lock(&x->spin);
    co_queue_wait(&x->changed, &x->spin);
    spin_unlock(&x->spin);
}

/* ------------------------------------------------------------------ names */

/* A letter, then letters, digits, '-', '.', '_'. */
static bool id_is_valid(const char *id)
{
    static const char letters[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
    if (!*id || !strchr(letters, *id))
        return false;
    for (const char *p = id; *p; p++) {
        if (!strchr(letters, *p) && !strchr("0123456789-._", *p))
            return false;
    }
    return true;
}

static struct export *find(struct exports *x, const char *id)
{
    struct export *e;
    TAILQ_FOREACH (e, &x->list, link) {
        if (strcmp(e->id, id) == 0)
            return e;
    }
    return NULL;
}

static struct iothread *find_iothread(struct exports *x, const char *id)
{
    struct iothread *t;
    TAILQ_FOREACH (t, &x->threads, link) {
        if (strcmp(t->id, id) == 0)
            return t;
    }
    return NULL;
}

/* ------------------------------------------------------------------ iothreads */

int iothread_add(struct exports *x, const char *id, struct tide_error *err)
{
    unsigned n = io_n_loops(x->io);
    if (!id_is_valid(id))
        return tide_fail(
            err, -EINVAL,
            "'%s' is not a valid object id: a letter, then letters, digits, '-', '.', '_'", id);
    if (find_iothread(x, id))
        return tide_fail(err, -EEXIST, "object '%s' exists already", id);
    struct iothread *t = mem_zalloc(sizeof *t);
    char *copy = mem_strdup(id);
    if (!t || !copy) {
        mem_free(t);
        mem_free(copy);
        return tide_fail(err, -ENOMEM, "no memory for object '%s'", id);
    }
    t->id = copy;
    t->loop = io_loop(x->io, n == 1 ? 0 : 1 + x->next_loop++ % (n - 1));
    TAILQ_INSERT_TAIL(&x->threads, t, link);
    return 0;
}

int iothread_del(struct exports *x, const char *id, struct tide_error *err)
{
    struct iothread *t = find_iothread(x, id);
    if (!t)
        return tide_fail(err, -ENOENT, "object '%s' not found", id);
    if (t->n_used > 0)
        return tide_fail(err, -EBUSY, "object '%s' is in use by %u export%s; delete %s first", id,
                         t->n_used, t->n_used == 1 ? "" : "s", t->n_used == 1 ? "it" : "them");
    TAILQ_REMOVE(&x->threads, t, link);
    iothread_free(t);
    return 0;
}

/* ------------------------------------------------------------------ the end of an export */

static void drop_bitmaps(struct export *e)
{
    for (unsigned i = 0; i < e->nbd.n_bitmaps; i++)
        e->nbd.bitmaps[i]->n_busy--;
    nbd_bitmaps_free(&e->nbd);
}

/* Any stage of export_add() can hand it over. */
static void export_free(struct export *e)
{
    if (!e)
        return;
    drop_bitmaps(e);
    root_free(e->nbd.root);
    if (e->iothread)
        e->iothread->n_used--;
    if (e->listed) {
        TAILQ_REMOVE(&e->x->list, e, link);
        tell_changed(e->x);
    }
    mem_free(e->id);
    mem_free(e->name);
    mem_free(e->description);
    mem_free(e->node_name);
    mem_free(e);
}

/* It has no connection any more. */
static void export_gone(struct nbd_export *nbd)
{
    struct export *e = (struct export *)nbd;
    struct exports *x = e->x;
    json_t *data = json_pack("{s:s}", "id", e->id);
    export_free(e);
    event_emit(x->bus, "BLOCK_EXPORT_DELETED", data);
}

/* Marks it; true when the caller has to call export_gone(). */
static bool export_shut(struct export *e)
{
    assert(!e->dying);
    e->dying = true;
    bool unused = nbd_export_shut(e->x->nbd, &e->nbd);
    root_hurry(e->nbd.root); /* what its clients left in a throttle's queue does not hold it up */
    return unused;
}

static void end_all(struct exports *x)
{
    struct export *e;
again:
    TAILQ_FOREACH (e, &x->list, link) {
        if (e->dying)
            continue;
        if (export_shut(e))
            export_gone(&e->nbd); /* yields: the list may be another one now */
        goto again;
    }
    while (!TAILQ_EMPTY(&x->list))
        wait_changed(x);
}

static int del(struct export *e, bool hard, struct tide_error *err)
{
    if (e->dying)
        return tide_fail(err, -EBUSY, "export '%s' is shutting down already", e->id);
    if (!hard && e->nbd.n_conns > 0)
        return tide_fail(
            err, -EBUSY,
            "export '%s' is in use by %u connection%s; let the clients leave, or say mode "
            "'hard' to cut them off",
            e->id, e->nbd.n_conns, e->nbd.n_conns == 1 ? "" : "s");
    if (export_shut(e))
        export_gone(&e->nbd);
    return 0;
}

int export_del(struct exports *x, const char *id, bool hard, struct tide_error *err)
{
    struct export *e = find(x, id);
    if (!e)
        return tide_fail(err, -ENOENT, "export '%s' not found", id);
    return del(e, hard, err);
}

int export_del_by_name(struct exports *x, const char *name, bool hard, struct tide_error *err)
{
    struct nbd_export *e = x->nbd ? nbd_export_find(x->nbd, name, strlen(name)) : NULL;
    if (!e)
        return tide_fail(err, -ENOENT, "the NBD server has no export named '%s'", name);
    return del((struct export *)e, hard, err);
}

/* ------------------------------------------------------------------ the NBD server */

bool nbd_server_running(struct exports *x)
{
    return x->nbd && !x->nbd->stopping;
}

int nbd_server_start(struct exports *x, struct io_addr *addr, unsigned max_connections,
                     struct tide_error *err)
{
    struct nbd_server *srv;
    if (x->nbd)
        return tide_fail(err, -EEXIST, "the NBD server is running already%s",
                         x->nbd->stopping ? ", about to stop" : "; stop it first");
    int r = nbd_server_open(x->io, addr, max_connections, &srv, err);
    if (r < 0)
        return r;
    if (x->nbd) { /* somebody else was quicker while we set up the listener */
        nbd_server_shut(srv);
        nbd_server_close(srv);
        return tide_fail(err, -EEXIST, "the NBD server is running already; stop it first");
    }
    x->nbd = srv;
    if (x->open)
        nbd_server_release(srv);
    return 0;
}

void exports_open(struct exports *x)
{
    x->open = true;
    if (x->nbd)
        nbd_server_release(x->nbd);
}

int nbd_server_stop(struct exports *x, struct tide_error *err)
{
    struct nbd_server *srv = x->nbd;
    if (!nbd_server_running(x))
        return tide_fail(err, -ENOENT, "the NBD server is not running");
    nbd_server_shut(srv);
    end_all(x);
    nbd_server_close(srv);
    x->nbd = NULL;
    tell_changed(x);
    return 0;
}

void exports_close_all(struct exports *x)
{
    struct tide_error err;
    if (nbd_server_running(x))
        nbd_server_stop(x, &err);
    while (x->nbd)
        wait_changed(x);
    assert(TAILQ_EMPTY(&x->list));
}

/* ------------------------------------------------------------------ a new export */

static int check_type(const struct q_block_export_options *o, struct tide_error *err)
{
    if (o->type != Q_BLOCK_EXPORT_TYPE_NBD)
        return tide_fail(err, -EOPNOTSUPP,
                         "exports of type '%s' are not served here; use type 'nbd'",
                         q_block_export_type_names[o->type]);
    if (!id_is_valid(o->id))
        return tide_fail(
            err, -EINVAL,
            "'%s' is not a valid export id: a letter, then letters, digits, '-', '.', '_'", o->id);
    return 0;
}

/* What can change during a yield: asked before and after. */
static int check_free(struct exports *x, const struct q_block_export_options *o, const char *name,
                      struct tide_error *err)
{
    if (find(x, o->id))
        return tide_fail(err, -EEXIST, "export id '%s' is in use already", o->id);
    if (!nbd_server_running(x))
        return tide_fail(err, -ENOENT,
                         "the NBD server is not running; start it with nbd-server-start first");
    if (nbd_export_find(x->nbd, name, strlen(name)))
        return tide_fail(err, -EEXIST, "the NBD server has an export named '%s' already", name);
    return 0;
}

static int check_text(const char *what, const char *text, struct tide_error *err)
{
    if (strlen(text) > NBD_MAX_STRING)
        return tide_fail(err, -EINVAL, "%s '%.32s...' is longer than %u bytes", what, text,
                         NBD_MAX_STRING);
    return 0;
}

static int check_bitmap(const struct export *e, const struct dirty_bitmap *b, struct node *n,
                        struct tide_error *err)
{
    if (bitmap_size(b->bits) != node_size(n))
        return tide_fail(err, -EINVAL,
                         "bitmap '%s' of node '%s' is for %llu bytes, but node '%s' has %llu",
                         b->name, node_name(b->node), (unsigned long long)bitmap_size(b->bits),
                         node_name(n), (unsigned long long)node_size(n));
    if (nbd_bitmap_find(&e->nbd, b->name, strlen(b->name)) >= 0)
        return tide_fail(err, -EINVAL,
                         "two bitmaps named '%s' are listed; clients could not tell them apart",
                         b->name);
    return 0;
}

/* A bare name is looked up on the exported node, then on what it shows unchanged (a raw node's
 * file). The error speaks of the exported one. */
static int find_by_name(struct node *n, const char *name, unsigned needs, struct dirty_bitmap **out,
                        struct tide_error *err)
{
    struct tide_error ignored;
    int r = dirty_bitmap_find(n, name, needs, out, err);
    while (r == -ENOENT && (n = node_filtered(n))) {
        r = dirty_bitmap_find(n, name, needs, out, &ignored);
        if (r < 0 && r != -ENOENT)
            *err = ignored;
    }
    return r;
}

static int add_bitmap(struct export *e, struct node *n,
                      const struct q_block_dirty_bitmap_or_str *ref, struct tide_error *err)
{
    const unsigned needs = BITMAP_NOT_BUSY | BITMAP_CONSISTENT;
    bool by_name = ref->kind == Q_KIND_STRING;
    struct dirty_bitmap *b;
    struct node *owner;
    int r = by_name ? find_by_name(n, ref->string, needs, &b, err)
                    : graph_find_err(e->x->graph, ref->object->node, &owner, err);
    if (r == 0 && !by_name)
        r = dirty_bitmap_find(owner, ref->object->name, needs, &b, err);
    if (r == 0)
        r = check_bitmap(e, b, n, err);
    if (r < 0)
        return r;
    if (by_name && b->enabled && !e->nbd.writable && !node_read_only(n))
        return tide_fail(err, -EINVAL,
                         "bitmap '%s' is enabled and would change while the read-only export '%s' "
                         "shows it; disable it first, or make the export writable",
                         b->name, e->id);
    nbd_bitmaps_add(&e->nbd, b);
    return 0;
}

/* All or none become busy. */
static int add_bitmaps(struct export *e, struct node *n, const struct q_block_export_options *o,
                       struct tide_error *err)
{
    int r = 0;
    if (nbd_bitmaps_reserve(&e->nbd, o->u.nbd.n_bitmaps) < 0)
        return tide_fail(err, -ENOMEM, "no memory for export '%s'", e->id);
    for (size_t i = 0; r == 0 && i < o->u.nbd.n_bitmaps; i++)
        r = add_bitmap(e, n, &o->u.nbd.bitmaps[i], err);
    if (r < 0) {
        e->nbd.n_bitmaps = 0; /* none is busy yet */
        return r;
    }
    for (unsigned i = 0; i < e->nbd.n_bitmaps; i++)
        e->nbd.bitmaps[i]->n_busy++;
    return 0;
}

static int use_iothread(struct export *e, const char *id, struct tide_error *err)
{
    if (!id)
        return 0;
    struct iothread *t = find_iothread(e->x, id);
    if (!t)
        return tide_fail(err, -ENOENT, "iothread '%s' not found; create it with object-add first",
                         id);
    t->n_used++;
    e->iothread = t;
    e->nbd.loop = t->loop;
    return 0;
}

static struct export *export_alloc(struct exports *x, const struct q_block_export_options *o,
                                   const char *name)
{
    struct export *e = mem_zalloc(sizeof *e);
    if (!e)
        return NULL;
    e->x = x;
    e->id = mem_strdup(o->id);
    e->name = mem_strdup(name);
    e->node_name = mem_strdup(o->node_name);
    if (o->u.nbd.description)
        e->description = mem_strdup(o->u.nbd.description);
    if (!e->id || !e->name || !e->node_name || (o->u.nbd.description && !e->description)) {
        export_free(e);
        return NULL;
    }
    e->nbd.name = e->name;
    e->nbd.description = e->description;
    e->nbd.serial = ++x->serial;
    e->nbd.writable = o->writable;
    e->nbd.writethrough = o->writethrough;
    e->nbd.allocation_depth = o->u.nbd.allocation_depth;
    e->nbd.gone = export_gone;
    return e;
}

static int enter_graph(struct export *e, struct node *n, struct tide_error *err)
{
    mem_autofree char *what = mem_printf("export '%s'", e->id);
    if (!what)
        return tide_fail(err, -ENOMEM, "no memory for export '%s'", e->id);
    if (e->nbd.writable && node_read_only(n))
        return tide_fail(err, -EPERM,
                         "export '%s' cannot be writable: node '%s' is read-only; leave 'writable' "
                         "out, or open the node for writing",
                         e->id, node_name(n));
    return root_new(n, ROOT_READ | (e->nbd.writable ? ROOT_WRITE : 0), what, &e->nbd.root, err);
}

int export_add(struct exports *x, const struct q_block_export_options *o, struct tide_error *err)
{
    const char *name = o->u.nbd.name ? o->u.nbd.name : o->node_name;
    struct node *n;
    int r = check_type(o, err);
    if (r == 0)
        r = check_text("export name", name, err);
    if (r == 0 && o->u.nbd.description)
        r = check_text("description", o->u.nbd.description, err);
    if (r == 0)
        r = check_free(x, o, name, err);
    if (r == 0)
        r = graph_find_err(x->graph, o->node_name, &n, err);
    if (r < 0)
        return r;
    struct export *e = export_alloc(x, o, name);
    if (!e)
        return tide_fail(err, -ENOMEM, "no memory for export '%s'", o->id);
    r = use_iothread(e, o->iothread, err);
    if (r == 0)
        r = enter_graph(e, n, err); /* yields; afterwards the root holds the node */
    if (r == 0)
        r = check_free(x, o, name, err);
    if (r == 0)
        r = add_bitmaps(e, n, o, err);
    if (r < 0) {
        export_free(e);
        return r;
    }
    nbd_export_attach(x->nbd, &e->nbd);
    TAILQ_INSERT_HEAD(&x->list, e, link);
    e->listed = true;
    return 0;
}

/* ------------------------------------------------------------------ queries */

struct node *export_node(struct exports *x, const char *id)
{
    struct export *e = find(x, id);
    return e ? root_node(e->nbd.root) : NULL;
}

json_t *exports_query(struct exports *x)
{
    json_t *all = json_array();
    struct export *e;
    TAILQ_FOREACH (e, &x->list, link) {
        json_t *one = json_pack("{s:b,s:s,s:s,s:s}", "shutting-down", e->dying, "id", e->id, "type",
                                "nbd", "node-name", e->node_name);
        if (json_array_append_new(all, one) < 0) {
            json_decref(all);
            return NULL;
        }
    }
    return all;
}

void exports_each_writable(struct exports *x,
                           void (*fn)(void *arg, const char *id, const char *node), void *arg)
{
    struct export *e;
    TAILQ_FOREACH (e, &x->list, link) {
        if (e->nbd.writable)
            fn(arg, e->id, e->node_name);
    }
}
