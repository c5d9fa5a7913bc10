/* SPDX-License-Identifier: Apache-2.0 */
/* Gates and quiesce (rules for memory order: a marker's counter and the control loop's closed flag
 * form a Dekker pair, so every access of both is seq_cst; weaker orders lose cuts on x86 too).
 *
 *   enter   n[loop] += 1; closed? then n[loop] -= 1, tell the waiter, park, look again
 *   leave   n[loop] -= 1; closed? then tell the waiter
 *   close   closed = 1; then every n[i], each read by itself, has to be 0 once
 *
 * Roots above a node are found by walking down from each root: a base image that many disks share
 * does not freeze its siblings. */
#include "block/root.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "base/bytes.h"
#include "base/log.h"
#include "base/mem.h"
#include "block/driver.h"
#include "io/io.h"

#define CLOSED_QUIESCE 1u
#define CLOSED_SHUT 2u
#define SLOW_LOG 100000000u

struct gate_count {
    _Alignas(64) _Atomic long n;
};

#define ROOT_MAX_NODES 2u

struct root {
    struct node *node[ROOT_MAX_NODES];
    unsigned perm[ROOT_MAX_NODES];
    unsigned n_nodes;
    struct graph *graph;
    char *what;
    _Atomic unsigned closed;
    struct spin lock; /* guards the parked */
    struct co_queue parked;
    bool quiesced; /* closed and seen empty since */
    bool aside;    /* a claim: permissions, but no user of its nodes */
    struct hurry *hurry;
    bool drained;   /* quiesce_begin() waits for it: nodes below make nobody wait */
    uint64_t peace; /* until then it is not held again: it was held in vain */
    TAILQ_ENTRY(root) link;
    struct gate_count count[]; /* of each loop */
};

struct quiesce {
    struct graph *graph;
    uint64_t since;
    enum quiesce_kind kind;
    unsigned n;
    struct root *root[];
};

/* ------------------------------------------------------------------ the gate */

static void tell_waiter(struct root *r)
{
    io_event_set(&r->graph->drained);
}

bool root_try_enter(struct root *r)
{
    unsigned i = loop_index(loop_self());
    atomic_fetch_add(&r->count[i].n, 1);
    if (!atomic_load(&r->closed))
        return true;
    root_leave(r);
    return false;
}

void root_enter(struct root *r)
{
    while (!root_try_enter(r)) {
        spin_lock(&r->lock);
        while (atomic_load(&r->closed))
            co_queue_wait(&r->parked, &r->lock);
        spin_unlock(&r->lock);
    }
}

void root_leave(struct root *r)
{
    atomic_fetch_sub(&r->count[loop_index(loop_self())].n, 1);
    if (atomic_load(&r->closed))
        tell_waiter(r);
}

bool root_is_shut(const struct root *r)
{
    return atomic_load_explicit(&r->closed, memory_order_relaxed);
}

static void gate_open(struct root *r, unsigned why)
{
    spin_lock(&r->lock);
    if (!(atomic_fetch_and(&r->closed, ~why) & ~why))
        co_queue_wake_all(&r->parked);
    spin_unlock(&r->lock);
}

void root_shut(struct root *r)
{
    atomic_fetch_or(&r->closed, CLOSED_SHUT);
}

void root_open(struct root *r)
{
    gate_open(r, CLOSED_SHUT);
}

/* Tell the drivers below that somebody waits for the requests inside. A node that is reached on two
 * ways is told twice, at the end too: nothing below a root changes while it is drained. */
static void drain_below(struct node *n, bool begin)
{
    void (*tell)(struct node *) = begin ? n->ops->drain_begin : n->ops->drain_end;
    if (tell)
        tell(n);
    for (unsigned i = 0; i < n->n_children; i++)
        drain_below(n->child[i], begin);
}

static void root_drain(struct root *r, bool *why, bool begin)
{
    if (*why == begin)
        return;
    *why = begin;
    for (unsigned i = 0; i < r->n_nodes; i++)
        drain_below(r->node[i], begin);
}

#define HURRY_FIRST_NS 10000000u
#define HURRY_LAST_NS 1000000000u

/* Requests that were on their way into a queue when the others were let go wait there: so it is
 * done again and again until the root is free, less and less often, for others go on, too. */
struct hurry {
    struct root *root; /* NULL: it has ended */
    struct io_event ended;
};

static void let_go_below(struct root *r)
{
    for (unsigned i = 0; i < r->n_nodes; i++)
        drain_below(r->node[i], true);
    for (unsigned i = 0; i < r->n_nodes; i++)
        drain_below(r->node[i], false);
}

static void hurry_main(void *arg)
{
    struct hurry *h = arg;
    struct io *io = loop_io(loop_self());
    uint64_t pause = HURRY_FIRST_NS;
    while (h->root) {
        let_go_below(h->root);
        io_event_wait(&h->ended, io_now(io) + pause);
        pause = MIN(2 * pause, HURRY_LAST_NS);
    }
    mem_free(h);
}

void root_hurry(struct root *r)
{
    struct hurry *h = r->hurry ? NULL : mem_zalloc(sizeof *h);
    if (!h) {
        let_go_below(r);
        return;
    }
    *h = (struct hurry){.root = r, .ended = IO_EVENT_INIT};
    r->hurry = h;
    if (loop_run_now(hurry_main, h) < 0) {
        r->hurry = NULL;
        mem_free(h);
        let_go_below(r);
    }
}

static void end_hurry(struct root *r)
{
    if (!r->hurry)
        return;
    r->hurry->root = NULL;
    io_event_set(&r->hurry->ended);
    r->hurry = NULL;
}

static long root_inside(struct root *r)
{
    long sum = 0;
    for (unsigned i = 0; i < io_n_loops(r->graph->io); i++)
        sum += atomic_load(&r->count[i].n);
    return sum;
}

/* ------------------------------------------------------------------ roots */

struct node *root_node(const struct root *r)
{
    return r->node[0];
}

unsigned root_perm(const struct root *r, const struct node *n)
{
    unsigned perm = 0;
    for (unsigned i = 0; i < r->n_nodes; i++) {
        if (r->node[i] == n)
            perm |= r->perm[i];
    }
    return perm;
}

bool root_uses(const struct root *r, const struct node *n)
{
    for (unsigned i = 0; i < r->n_nodes && !r->aside; i++) {
        if (r->node[i] == n)
            return true;
    }
    return false;
}

const char *root_what(const struct root *r)
{
    return r->what;
}

struct root *root_next(struct root *r)
{
    return TAILQ_NEXT(r, link);
}

/* Where in `below` the bytes of `from` begin; false: they do not lie there in one piece. */
static bool place_in(const struct node *from, const struct node *below, uint64_t *off)
{
    *off = 0;
    for (; from != below; from = from->child[0]) {
        if (from->n_children != 1 || !from->ops->filter)
            return false;
        *off += from->window;
    }
    return true;
}

/* `a` stands on `a_below` and `b` on `b_below`, which is the same node or one over the same file:
 * do they show the same bytes of it? Two partitions do not. */
static bool overlap(const struct node *a, const struct node *a_below, const struct node *b,
                    const struct node *b_below)
{
    uint64_t a_off, b_off;
    if (!place_in(a, a_below, &a_off) || !place_in(b, b_below, &b_off))
        return true;
    return a_off < b_off + b->size && b_off < a_off + a->size;
}

static bool same_file(const struct node *a, const struct node *b)
{
    uint64_t a_dev, a_ino, b_dev, b_ino;
    return node_file(a, &a_dev, &a_ino) && node_file(b, &b_dev, &b_ino) && a_dev == b_dev &&
           a_ino == b_ino;
}

/* Writes that arrive, through `writer`, at a node `own` must not slip past a tracker or a job: not
 * past one at or above `n`, which stands on `below`. */
static const struct node *watched_at(const struct node *writer, const struct node *own,
                                     const struct node *n, const struct node *below)
{
    const struct node *p = NULL;
    if ((n->bitmaps || n->hooks) && !node_reaches(writer, n) && overlap(writer, own, n, below))
        return n;
    for (unsigned i = 0; i < n->n_parents && !p; i++)
        p = watched_at(writer, own, n->parents[i], below);
    return p;
}

/* Nor past one that stands on the same file through another node. */
static const struct node *watched_in_file(const struct node *writer, const struct node *own)
{
    const struct node *other, *p = NULL;
    TAILQ_FOREACH (other, &own->graph->nodes, link) {
        if (other != own && same_file(own, other))
            p = watched_at(writer, own, other, other);
        if (p)
            break;
    }
    return p;
}

static const struct node *watched_beside(const struct node *writer, const struct node *n)
{
    const struct node *p = watched_at(writer, n, n, n);
    if (!p)
        p = watched_in_file(writer, n);
    for (unsigned i = 0; i < n->n_children && !p; i++)
        p = watched_beside(writer, n->child[i]);
    return p;
}

static const struct node *read_only_below(const struct node *n)
{
    const struct node *found = n->read_only ? n : NULL;
    for (unsigned i = 0; i < n->n_children && n->ops->filter && !found; i++)
        found = read_only_below(n->child[i]);
    return found;
}

/* Another user's root that stands against `perm`: it writes and we want to be alone, or reversed.
 */
static bool share_a_node(const struct node *a, const struct node *b);

static const struct root *rival(const struct node *n, unsigned perm, const char *what)
{
    struct root *r;
    TAILQ_FOREACH (r, &n->graph->roots, link) {
        for (unsigned i = 0; i < r->n_nodes && !r->aside && strcmp(r->what, what); i++) {
            unsigned other = r->perm[i];
            bool against = (perm & ROOT_ALONE && other & ROOT_WRITE) ||
                           (perm & ROOT_WRITE && other & ROOT_ALONE);
            if (against && share_a_node(r->node[i], n))
                return r;
        }
    }
    return NULL;
}

const char *node_written_alone_by(const struct node *n)
{
    struct root *r;
    TAILQ_FOREACH (r, &n->graph->roots, link) {
        for (unsigned i = 0; i < r->n_nodes && !r->aside; i++) {
            if (r->perm[i] & ROOT_ALONE && share_a_node(r->node[i], n))
                return r->what;
        }
    }
    return NULL;
}

/* What the users of a node do to it; claims use nothing. */
static unsigned used_perm(const struct node *n)
{
    unsigned perm = 0;
    struct root *r;
    TAILQ_FOREACH (r, &n->graph->roots, link)
        perm |= root_uses(r, n) ? root_perm(r, n) : 0;
    for (unsigned i = 0; i < n->n_parents; i++)
        perm |= used_perm(n->parents[i]);
    return perm;
}

/* A file is written through one node only, as far as it is locked. The driver's locks do not say
 * so among our own nodes, for what claims have locked is in nobody's way. */
static const struct node *written_beside(const struct node *n, const struct node **file)
{
    const struct node *other, *found = NULL;
    *file = n;
    TAILQ_FOREACH (other, &n->graph->nodes, link) {
        if (n->ops->same_locks && other != n && n->ops->same_locks(n, other) &&
            used_perm(other) & ROOT_WRITE)
            return other;
    }
    for (unsigned i = 0; i < n->n_children && !found; i++)
        found = written_beside(n->child[i], file);
    return found;
}

int root_check(struct node *n, unsigned perm, const char *what, struct tide_error *err)
{
    if (!(perm & ROOT_WRITE))
        return 0;
    const struct node *fixed = read_only_below(n);
    if (fixed)
        return tide_fail(err, -EACCES, "node '%s' is read-only: %s cannot write to it", fixed->name,
                         what);
    const struct root *r = rival(n, perm, what);
    if (r)
        return tide_fail(err, -EBUSY, "%s cannot write to node '%s': it is in use by %s", what,
                         n->name, r->what);
    const struct node *above = watched_beside(n, n);
    if (above)
        return tide_fail(
            err, -EPERM,
            "%s cannot write to node '%s': node '%s' has bitmaps or a job that would miss "
            "the changes; use '%s'",
            what, n->name, above->name, above->name);
    const struct node *file, *beside = written_beside(n, &file);
    if (beside)
        return tide_fail(err, -EAGAIN,
                         "%s: cannot get the \"write\" lock on '%s': node '%s' writes to it", what,
                         file->filename, beside->name);
    return 0;
}

/* Is there something below both `b` and `a`, at `x` or under it, of which they show the same bytes?
 */
static bool share_below(const struct node *a, const struct node *x, const struct node *b)
{
    if (node_reaches(b, x) && overlap(a, x, b, x))
        return true;
    for (unsigned i = 0; i < x->n_children; i++) {
        if (share_below(a, x->child[i], b))
            return true;
    }
    return false;
}

/* What is written to one of them may arrive at bytes of the other. */
static bool share_a_node(const struct node *a, const struct node *b)
{
    return share_below(a, a, b);
}

/* Is there a file under `a`, at `x` or below, that is under `b` too, through another node at `y` or
 * below? */
static bool share_a_file(const struct node *a, const struct node *x, const struct node *b,
                         const struct node *y)
{
    bool share = x != y && same_file(x, y) && overlap(a, x, b, y);
    for (unsigned i = 0; i < y->n_children && !share; i++)
        share = share_a_file(a, x, b, y->child[i]);
    for (unsigned i = 0; i < x->n_children && !share && y == b; i++)
        share = share_a_file(a, x->child[i], b, b);
    return share;
}

int node_check_watch(const struct node *n, struct tide_error *err)
{
    struct root *r;
    TAILQ_FOREACH (r, &n->graph->roots, link) {
        for (unsigned i = 0; i < r->n_nodes && !r->aside; i++) {
            const struct node *w = r->node[i];
            if ((r->perm[i] & ROOT_WRITE) && !node_reaches(w, n) &&
                (share_a_node(w, n) || share_a_file(w, w, n, n)))
                return tide_fail(err, -EPERM,
                                 "node '%s' cannot be tracked: %s writes to node '%s', past it",
                                 n->name, r->what, r->node[i]->name);
        }
    }
    return 0;
}

/* The node becomes the root's if its permissions can be had. */
static co_fn int take_node(struct root *r, struct node *n, unsigned perm, struct tide_error *err)
{
    r->node[r->n_nodes] = n;
    r->perm[r->n_nodes++] = perm;
    n->n_roots += !r->aside;
    int res = node_refresh_perm(n, err);
    if (res < 0) {
        tide_error_prefix(err, "%s: ", r->what);
        r->n_nodes--;
        n->n_roots -= !r->aside;
    }
    return res;
}

int root_add(struct root *r, struct node *n, unsigned perm, struct tide_error *err)
{
    assert(r->n_nodes < ROOT_MAX_NODES && !r->drained && !r->aside);
    int res = root_check(n, perm, r->what, err);
    return res < 0 ? res : take_node(r, n, perm, err);
}

/* Without a node yet. */
static int root_alloc(struct graph *g, const char *what, struct root **out, struct tide_error *err)
{
    size_t size = sizeof(struct root) + io_n_loops(g->io) * sizeof(struct gate_count);
    struct root *root = mem_aligned(64, round_up(size, 64));
    char *copy = mem_strdup(what);
    if (!root || !copy) {
        mem_free(root);
        mem_free(copy);
        return tide_fail(err, -ENOMEM, "no memory for %s", what);
    }
    memset(root, 0, size);
    *root = (struct root){.graph = g, .what = copy, .lock = SPIN_INIT};
    TAILQ_INSERT_TAIL(&g->roots, root, link);
    *out = root;
    return 0;
}

int root_new(struct node *n, unsigned perm, const char *what, struct root **out,
             struct tide_error *err)
{
    struct root *root = NULL;
    int r = root_alloc(n->graph, what, &root, err);
    if (r < 0)
        return r;
    r = root_add(root, n, perm, err);
    if (r < 0)
        root_free(root);
    else
        *out = root;
    return r;
}

/* ------------------------------------------------------------------ claims */

int root_claim(struct node *n, unsigned perm, const char *what, struct root **out,
               struct tide_error *err)
{
    struct root *root = NULL;
    int r = root_alloc(n->graph, what, &root, err);
    if (r < 0)
        return r;
    root->aside = true;
    atomic_store(&root->closed, CLOSED_SHUT);
    r = take_node(root, n, perm, err);
    if (r < 0)
        root_free(root);
    else
        *out = root;
    return r;
}

void root_step_in(struct root *r)
{
    assert(r->aside);
    r->aside = false;
    for (unsigned i = 0; i < r->n_nodes; i++)
        r->node[i]->n_roots++;
}

void root_step_aside(struct root *r)
{
    assert(!r->aside && root_inside(r) == 0);
    r->aside = true;
    for (unsigned i = 0; i < r->n_nodes; i++)
        r->node[i]->n_roots--;
}

void root_swap_node(struct root *r, struct root *claim)
{
    struct node *n = r->node[0];
    unsigned closed = atomic_load(&r->closed);
    assert(!r->aside && claim->aside && r->n_nodes == 1 && claim->n_nodes == 1);
    assert(r->perm[0] == claim->perm[0] && !r->drained);
    /* Who knocks at a closed gate is counted for a moment: quiesced says that nobody is inside. */
    assert(r->quiesced || ((closed & CLOSED_SHUT) && root_inside(r) == 0));
    r->node[0] = claim->node[0];
    claim->node[0] = n;
    n->n_roots--;
    r->node[0]->n_roots++;
}

/* A root may end while it is held (a job at its end, an unwound action). */
static void quiesce_forget_root(struct quiesce *q, struct root *r)
{
    for (unsigned i = 0; i < q->n; i++) {
        if (q->root[i] == r) {
            memmove(&q->root[i], &q->root[i + 1], (q->n - i - 1) * sizeof q->root[0]);
            q->n--;
            return;
        }
    }
}

void root_free(struct root *r)
{
    struct tide_error ignored;
    if (!r)
        return;
    assert(root_inside(r) == 0);
    end_hurry(r);
    /* Giving up cannot be refused, but it takes a while: until it is done the node stays in use,
     * and a list may begin and quiesce this root like any other. */
    for (unsigned i = 0; i < r->n_nodes; i++) {
        r->perm[i] = 0;
        node_refresh_perm(r->node[i], &ignored);
    }
    if (r->graph->quiesce)
        quiesce_forget_root(r->graph->quiesce, r);
    root_drain(r, &r->drained, false);
    for (unsigned i = 0; i < r->n_nodes; i++)
        r->node[i]->n_roots -= !r->aside;
    TAILQ_REMOVE(&r->graph->roots, r, link);
    mem_free(r->what);
    mem_free(r);
}

/* ------------------------------------------------------------------ quiesce */

static bool root_concerned(struct root *r, struct node *const *nodes, unsigned n,
                           enum quiesce_kind kind)
{
    for (unsigned k = 0; k < r->n_nodes; k++) {
        if (kind == QUIESCE_WRITES && !(r->perm[k] & ROOT_WRITE))
            continue;
        for (unsigned i = 0; i < n; i++) {
            if (node_reaches(r->node[k], nodes[i]))
                return true;
        }
    }
    return false;
}

static unsigned count_roots(struct graph *g)
{
    struct root *r;
    unsigned n = 0;
    TAILQ_FOREACH (r, &g->roots, link)
        n++;
    return n;
}

void quiesce_peace(struct graph *g, struct node *const *nodes, unsigned n, enum quiesce_kind kind)
{
    uint64_t now = io_now(g->io), until = now;
    struct root *r;
    TAILQ_FOREACH (r, &g->roots, link) {
        if (r->peace > until && root_concerned(r, nodes, n, kind))
            until = r->peace;
    }
    if (until > now)
        io_sleep(until - now);
}

/* The first root that still has somebody inside; each count has to be seen 0 once. */
static struct root *first_busy(struct quiesce *q)
{
    for (unsigned i = 0; i < q->n; i++) {
        struct root *r = q->root[i];
        for (unsigned k = 0; k < io_n_loops(q->graph->io); k++) {
            if (atomic_load(&r->count[k].n))
                return r;
        }
        r->quiesced = true;
    }
    return NULL;
}

static co_fn int wait_for_rest(struct quiesce *q, struct tide_error *err)
{
    uint64_t deadline = q->since + q->graph->quiesce_timeout;
    while (first_busy(q)) {
        if (io_event_wait(&q->graph->drained, deadline) == 0)
            continue;
        struct root *busy = first_busy(q);
        if (!busy)
            break;
        return tide_fail(
            err, -ETIMEDOUT,
            "node '%s' (driver %s) did not come to rest in %llu ms: %ld requests of %s are "
            "still in flight; nothing was changed",
            busy->node[0]->name, busy->node[0]->ops->name,
            (unsigned long long)(q->graph->quiesce_timeout / 1000000), root_inside(busy),
            busy->what);
    }
    return 0;
}

/* When all are out nobody can wait in a driver any more, and those who reach the same nodes past
 * these roots are slowed down again. */
static co_fn int drain(struct quiesce *q, struct tide_error *err)
{
    for (unsigned i = 0; i < q->n; i++)
        root_drain(q->root[i], &q->root[i]->drained, true);
    int r = wait_for_rest(q, err);
    for (unsigned i = 0; i < q->n; i++)
        root_drain(q->root[i], &q->root[i]->drained, false);
    return r;
}

int quiesce_begin(struct graph *g, struct node *const *nodes, unsigned n, enum quiesce_kind kind,
                  struct quiesce **out, struct tide_error *err)
{
    assert(loop_is_control() && !g->quiesce);
    struct quiesce *q = mem_zalloc(sizeof *q + count_roots(g) * sizeof q->root[0]);
    if (!q)
        return tide_fail(err, -ENOMEM, "no memory to hold writes");
    q->graph = g;
    q->kind = kind;
    q->since = io_now(g->io);
    g->quiesce = q;
    struct root *r;
    TAILQ_FOREACH (r, &g->roots, link) {
        if (!root_concerned(r, nodes, n, kind))
            continue;
        r->quiesced = false;
        atomic_fetch_or(&r->closed, CLOSED_QUIESCE);
        q->root[q->n++] = r;
    }
    int res = drain(q, err);
    if (res < 0) {
        for (unsigned i = 0; i < q->n; i++)
            q->root[i]->peace = io_now(g->io) + QUIESCE_PEACE_NS;
        quiesce_end(q);
        return res;
    }
    *out = q;
    return 0;
}

void quiesce_end(struct quiesce *q)
{
    if (!q)
        return;
    struct graph *g = q->graph;
    uint64_t age = quiesce_age(q);
    for (unsigned i = q->n; i-- > 0;) {
        q->root[i]->quiesced = false;
        gate_open(q->root[i], CLOSED_QUIESCE);
    }
    g->quiesce = NULL;
    mem_free(q);
    if (age > SLOW_LOG)
        log_info("block", "writes were held for %llu ms", (unsigned long long)(age / 1000000));
}

uint64_t quiesce_age(const struct quiesce *q)
{
    return io_now(q->graph->io) - q->since;
}

void graph_set_quiesce_timeout(struct graph *g, uint64_t ns)
{
    g->quiesce_timeout = ns;
}

bool node_is_quiesced(const struct node *n, enum quiesce_kind kind)
{
    struct root *r;
    struct node *one = (struct node *)n;
    TAILQ_FOREACH (r, &n->graph->roots, link) {
        if (!root_concerned(r, &one, 1, kind))
            continue;
        unsigned closed = atomic_load(&r->closed);
        if (!closed || ((closed & CLOSED_QUIESCE) && !r->quiesced && !(closed & CLOSED_SHUT)))
            return false;
    }
    return true;
}
