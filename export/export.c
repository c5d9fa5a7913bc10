/* SPDX-License-Identifier: Apache-2.0 */
/* The table of exports, newest first, and what hangs on it: names, bitmaps, iothreads, the NBD
 * server.
 *
 * An export that was deleted while clients are connected stays in the table ("shutting-down") until
 * its last connection has gone; then its bitmaps are free again, its root is given back, and the
 * event tells. Its id and its name are free before that: an id means the export that is not
 * shutting down, if there is one. All of this is on the control loop, so between two yields nobody
 * else changes the table; what was looked up before a yield is looked up again after it.
 *
 * One that a list has deleted and may still bring back is *hidden*: it keeps its places in the
 * tables, for others may come and go beside it, but nobody finds it. */
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
    struct iothread *iothread;
    bool listed;
    bool hidden; /* deleted by a list that is not over yet */
    bool dying;  /* deleted */
    bool busy;   /* its bitmaps are, on its account */
    bool aside;  /* hidden, and its node is not in use by it */
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

static struct export *find_any(struct exports *x, const char *id, bool dying)
{
    struct export *e;
    TAILQ_FOREACH (e, &x->list, link) {
        if (!e->hidden && e->dying == dying && strcmp(e->id, id) == 0)
            return e;
    }
    return NULL;
}

static struct export *find(struct exports *x, const char *id)
{
    return find_any(x, id, false);
}

static int find_err(struct exports *x, const char *id, struct export **out, struct tide_error *err)
{
    *out = find(x, id);
    if (*out)
        return 0;
    if (find_any(x, id, true))
        return tide_fail(err, -EBUSY, "export '%s' is shutting down already", id);
    return tide_fail(err, -ENOENT, "export '%s' not found", shown_name(id).text);
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

static void set_busy(struct export *e, bool busy)
{
    if (e->busy == busy)
        return;
    e->busy = busy;
    for (unsigned i = 0; i < e->nbd.n_bitmaps; i++)
        e->nbd.bitmaps[i]->n_busy += busy ? 1 : -1;
}

static void unlist(struct export *e)
{
    if (!e->listed)
        return;
    e->listed = false;
    TAILQ_REMOVE(&e->x->list, e, link);
    tell_changed(e->x);
}

/* Any stage of export_make() can hand it over. */
void export_free(struct export *e)
{
    if (!e)
        return;
    set_busy(e, false);
    nbd_bitmaps_free(&e->nbd);
    root_free(e->nbd.root);
    if (e->iothread)
        e->iothread->n_used--;
    unlist(e);
    mem_free(e->id);
    mem_free(e->name);
    mem_free(e->description);
    mem_free(e);
}

void export_retire(struct export *e)
{
    struct exports *x = e->x;
    json_t *data = json_pack("{s:s}", "id", e->id);
    export_free(e);
    event_emit(x->bus, "BLOCK_EXPORT_DELETED", data);
}

/* It has no connection any more. A list that is under way sees no bitmap become free. */
static void export_gone(struct nbd_export *nbd)
{
    struct export *e = (struct export *)nbd;
    struct graph *g = e->x->graph;
    graph_query_begin(g);
    set_busy(e, false);
    graph_query_end(g);
    export_retire(e);
}

void export_hide(struct export *e)
{
    assert(!e->hidden && !e->dying);
    e->hidden = e->nbd.hidden = true;
    if (e->nbd.n_conns > 0)
        return;
    e->aside = true;
    set_busy(e, false);
    root_step_aside(e->nbd.root);
}

void export_unhide(struct export *e)
{
    assert(e->hidden && !e->dying);
    e->hidden = e->nbd.hidden = false;
    if (!e->aside)
        return;
    e->aside = false;
    set_busy(e, true);
    root_step_in(e->nbd.root);
}

bool export_end(struct export *e)
{
    assert(e->hidden && !e->dying);
    e->hidden = false;
    e->dying = true;
    bool unused = nbd_export_shut(e->x->nbd, &e->nbd);
    if (unused) {
        set_busy(e, false);
        unlist(e);
    } else { /* what its clients left in a throttle's queue does not hold it up */
        root_hurry(e->nbd.root);
    }
    return unused;
}

static co_fn void end_now(struct export *e)
{
    export_hide(e);
    if (export_end(e))
        export_retire(e);
}

static void end_all(struct exports *x)
{
    struct export *e;
again:
    TAILQ_FOREACH (e, &x->list, link) {
        if (e->dying)
            continue;
        end_now(e); /* yields: the list may be another one now */
        goto again;
    }
    while (!TAILQ_EMPTY(&x->list))
        wait_changed(x);
}

static int check_del(const struct export *e, bool hard, struct tide_error *err)
{
    if (!hard && e->nbd.n_conns > 0)
        return tide_fail(
            err, -EBUSY,
            "export '%s' is in use by %u connection%s; let the clients leave, or say mode "
            "'hard' to cut them off",
            e->id, e->nbd.n_conns, e->nbd.n_conns == 1 ? "" : "s");
    return 0;
}

int export_find_del(struct exports *x, const char *id, bool hard, struct export **out,
                    struct tide_error *err)
{
    int r = find_err(x, id, out, err);
    return r < 0 ? r : check_del(*out, hard, err);
}

int export_del(struct exports *x, const char *id, bool hard, struct tide_error *err)
{
    struct export *e;
    int r = export_find_del(x, id, hard, &e, err);
    if (r == 0)
        end_now(e);
    return r;
}

int export_del_by_name(struct exports *x, const char *name, bool hard, struct tide_error *err)
{
    struct nbd_export *e = x->nbd ? nbd_export_find(x->nbd, name, strlen(name)) : NULL;
    if (!e)
        return tide_fail(err, -ENOENT, "the NBD server has no export named '%s'", name);
    int r = check_del((struct export *)e, hard, err);
    if (r == 0)
        end_now((struct export *)e);
    return r;
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
    int r = nbd_server_open(x->graph, addr, max_connections, &srv, err);
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
        return tide_fail(err, -EINVAL, "%s '%s' is longer than %u bytes", what,
                         shown_name(text).text, NBD_MAX_STRING);
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

/* None is busy yet. */
static int add_bitmaps(struct export *e, struct node *n, const struct q_block_export_options *o,
                       struct tide_error *err)
{
    int r = 0;
    if (nbd_bitmaps_reserve(&e->nbd, o->u.nbd.n_bitmaps) < 0)
        return tide_fail(err, -ENOMEM, "no memory for export '%s'", e->id);
    for (size_t i = 0; r == 0 && i < o->u.nbd.n_bitmaps; i++)
        r = add_bitmap(e, n, &o->u.nbd.bitmaps[i], err);
    return r;
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
    if (o->u.nbd.description)
        e->description = mem_strdup(o->u.nbd.description);
    if (!e->id || !e->name || (o->u.nbd.description && !e->description)) {
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

/* ------------------------------------------------------------------ the node of an export */

static unsigned perm_of(bool writable)
{
    return ROOT_READ | (writable ? ROOT_WRITE : 0);
}

static int check_node(const char *id, bool writable, const char *what, struct node *n,
                      struct tide_error *err)
{
    if (writable && node_read_only(n))
        return tide_fail(err, -EPERM,
                         "export '%s' cannot be writable: node '%s' is read-only; leave 'writable' "
                         "out, or open the node for writing",
                         id, node_name(n));
    return root_check(n, perm_of(writable), what, err);
}

/* A claim to the node for this export: the one that the caller has, if it is that, else a new one.
 * The caller's is used up. */
static co_fn int get_claim(struct node *n, unsigned perm, const char *what, struct root *have,
                           struct root **out, struct tide_error *err)
{
    if (have && root_node(have) == n && root_perm(have, n) == perm) {
        *out = have;
        return 0;
    }
    root_free(have);
    *out = NULL;
    return root_claim(n, perm, what, out, err);
}

int export_claim(struct exports *x, const char *id, bool writable, const char *node,
                 struct root **out)
{
    struct tide_error ignored;
    struct node *n = graph_find(x->graph, node);
    mem_autofree char *what = mem_printf("export '%s'", id);
    if (!what)
        return -ENOMEM;
    if (!n || check_node(id, writable, what, n, &ignored) < 0)
        return -ENOENT;
    return root_claim(n, perm_of(writable), what, out, &ignored);
}

bool export_is_writable(struct exports *x, const char *id)
{
    const struct export *e = find(x, id);
    return e && e->nbd.writable;
}

static int check_swap(const struct export *e, struct node *n, struct tide_error *err)
{
    const struct node *old = export_shows(e);
    if (node_size(n) != node_size(old))
        return tide_fail(
            err, -EINVAL,
            "export '%s' cannot change to node '%s' of %llu bytes: node '%s', which it "
            "shows, has %llu",
            e->id, node_name(n), (unsigned long long)node_size(n), node_name(old),
            (unsigned long long)node_size(old));
    return check_node(e->id, e->nbd.writable, root_what(e->nbd.root), n, err);
}

int export_set_node(struct exports *x, const char *id, const char *node, struct root **claim,
                    struct export **out, struct tide_error *err)
{
    struct export *e;
    struct node *n;
    struct root *have = *claim, *got;
    *claim = NULL;
    int r = find_err(x, id, &e, err);
    if (r == 0)
        r = graph_find_err(x->graph, node, &n, err);
    if (r == 0)
        r = check_swap(e, n, err);
    if (r < 0) {
        root_free(have);
        return r;
    }
    r = get_claim(n, perm_of(e->nbd.writable), root_what(e->nbd.root), have, &got, err);
    if (r < 0)
        return r;
    root_swap_node(e->nbd.root, got);
    *claim = got;
    *out = e;
    return 0;
}

void export_swap_node(struct export *e, struct root *claim)
{
    root_swap_node(e->nbd.root, claim);
}

/* ------------------------------------------------------------------ a new export */

/* From now on the root, whose gate is shut, uses the node. */
static co_fn int enter_graph(struct export *e, struct node *n, struct root **claim,
                             struct tide_error *err)
{
    struct root *have = *claim;
    mem_autofree char *what = mem_printf("export '%s'", e->id);
    if (!what)
        return tide_fail(err, -ENOMEM, "no memory for export '%s'", e->id);
    int r = check_node(e->id, e->nbd.writable, what, n, err);
    if (r < 0)
        return r;
    *claim = NULL;
    return get_claim(n, perm_of(e->nbd.writable), what, have, &e->nbd.root, err);
}

static co_fn int fill(struct export *e, const struct q_block_export_options *o, struct node *n,
                      struct root **claim, struct tide_error *err)
{
    int r = use_iothread(e, o->iothread, err);
    if (r == 0)
        r = enter_graph(e, n, claim, err); /* yields */
    if (r == 0)
        r = check_free(e->x, o, e->name, err);
    if (r == 0)
        r = add_bitmaps(e, n, o, err);
    return r;
}

static int check_add(struct exports *x, const struct q_block_export_options *o, const char *name,
                     struct node **n, struct tide_error *err)
{
    int r = check_type(o, err);
    if (r == 0)
        r = check_text("export name", name, err);
    if (r == 0 && o->u.nbd.description)
        r = check_text("description", o->u.nbd.description, err);
    if (r == 0)
        r = check_free(x, o, name, err);
    if (r == 0)
        r = graph_find_err(x->graph, o->node_name, n, err);
    return r;
}

int export_make(struct exports *x, const struct q_block_export_options *o, struct root *claim,
                struct export **out, struct tide_error *err)
{
    const char *name = o->u.nbd.name ? o->u.nbd.name : o->node_name;
    struct export *e = NULL;
    struct node *n;
    int r = check_add(x, o, name, &n, err);
    if (r == 0 && !(e = export_alloc(x, o, name)))
        r = tide_fail(err, -ENOMEM, "no memory for export '%s'", o->id);
    if (r == 0)
        r = fill(e, o, n, &claim, err);
    if (r < 0) {
        root_free(claim);
        export_free(e);
        return r;
    }
    set_busy(e, true);
    root_step_in(e->nbd.root);
    nbd_export_attach(x->nbd, &e->nbd);
    TAILQ_INSERT_HEAD(&x->list, e, link);
    e->listed = true;
    *out = e;
    return 0;
}

void export_unmake(struct export *e)
{
    bool unused = nbd_export_shut(e->x->nbd, &e->nbd);
    assert(unused && !e->hidden);
    (void)unused;
    set_busy(e, false);
    root_step_aside(e->nbd.root);
    unlist(e);
}

void export_open(struct export *e)
{
    root_open(e->nbd.root);
}

int export_add(struct exports *x, const struct q_block_export_options *o, struct tide_error *err)
{
    struct export *e;
    int r = export_make(x, o, NULL, &e, err);
    if (r == 0)
        export_open(e);
    return r;
}

/* ------------------------------------------------------------------ queries */

struct node *export_shows(const struct export *e)
{
    return root_node(e->nbd.root);
}

const char *export_name(const struct export *e)
{
    return e->name;
}

unsigned export_n_connections(const struct export *e)
{
    return e->nbd.n_conns;
}

struct node *export_node(struct exports *x, const char *id)
{
    struct export *e = find(x, id);
    return e ? export_shows(e) : NULL;
}

const char *export_name_of(struct exports *x, const char *id)
{
    struct export *e = find(x, id);
    return e ? e->name : NULL;
}

struct dirty_bitmap *export_bitmap(struct exports *x, const char *id, unsigned i)
{
    struct export *e = find(x, id);
    return e && i < e->nbd.n_bitmaps ? e->nbd.bitmaps[i] : NULL;
}

json_t *exports_query(struct exports *x)
{
    json_t *all = json_array();
    struct export *e;
    TAILQ_FOREACH (e, &x->list, link) {
        if (e->hidden)
            continue;
        json_t *one = json_pack("{s:b,s:s,s:s,s:s}", "shutting-down", e->dying, "id", e->id, "type",
                                "nbd", "node-name", node_name(export_shows(e)));
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
        if (e->nbd.writable && !e->hidden)
            fn(arg, e->id, node_name(export_shows(e)));
    }
}
