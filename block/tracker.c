/* SPDX-License-Identifier: Apache-2.0 */
/* The tracker of a node.
 *
 * A write reads one thing: node->marks, the array of bitmaps it has to mark. The array is changed
 * whenever a bitmap comes, goes, is switched or frozen, always while the node is quiesced, so a
 * marker never meets a change. Its room is reserved when a bitmap is attached and never given back
 * while the node lives: what an undo does (reattach, enable) must not need memory.
 *
 * Contents that are done with (the old bits after a clear, a successor) go to the reaper, which
 * frees them after a grace round: an NBD block-status on another loop may just be reading. */
#include "block/tracker.h"

#include <assert.h>
#include <errno.h>
#include <limits.h>
#include <string.h>

#include "base/bytes.h"
#include "base/log.h"
#include "base/mem.h"
#include "block/driver.h"
#include "block/root.h"
#include "io/io.h"

#define RETIRED_KICK 64u
/* At a stretch: half a millisecond or so where the heap gives each page back to the kernel. */
#define REAP_PAGES 256u
#define POOL_IDLE_NS 10000000000u /* after so long without anything to reap the pool is emptied */

/* ------------------------------------------------------------------ the reaper */

struct reaper {
    struct graph *graph;
    struct bitmap *pending; /* linked by bitmap_link */
    struct bitmap_undo *pending_undo;
    struct bitmap_pool *pool; /* of the bitmaps of this graph */
    struct io_event kick;
    bool running, stop;
    struct io_event stopped;
};

struct collect {
    struct graph *graph;
    struct bitmap_retired batch;
};

static void collect_here(void *arg)
{
    struct collect *c = arg;
    bitmap_retired_move(&c->batch, &c->graph->loop[loop_index(loop_self())].retired);
}

static co_fn void reap_pause(unsigned *budget)
{
    loop_pause();
    *budget = REAP_PAGES;
}

/* A dense bitmap of a large disk takes milliseconds to free: others get their turn in between. */
static co_fn void reap(struct bitmap *bits, struct bitmap_undo *undo)
{
    unsigned budget = REAP_PAGES;
    while (bits) {
        struct bitmap *next = *bitmap_link(bits);
        while (!bitmap_free_some(bits, &budget))
            reap_pause(&budget);
        bits = next;
    }
    while (undo) {
        struct bitmap_undo *next = *bitmap_undo_link(undo);
        while (!bitmap_undo_free_some(undo, &budget))
            reap_pause(&budget);
        undo = next;
    }
}

/* Collect what every loop replaced, wait until nobody can look at it any more, free it. */
static co_fn void reap_round(struct reaper *rp)
{
    struct graph *g = rp->graph;
    struct collect c = {.graph = g};
    struct bitmap *list = rp->pending;
    struct bitmap_undo *undo = rp->pending_undo;
    rp->pending = NULL;
    rp->pending_undo = NULL;
    for (unsigned i = 0; i < io_n_loops(g->io); i++)
        loop_call(io_loop(g->io, i), collect_here, &c);
    io_grace(g->io);
    bitmap_retired_free(&c.batch);
    reap(list, undo);
}

static void reaper_main(void *arg)
{
    struct reaper *rp = arg;
    bool idle = true;
    while (!rp->stop) {
        uint64_t until = idle ? IO_FOREVER : io_now(rp->graph->io) + POOL_IDLE_NS;
        idle = io_event_wait(&rp->kick, until) == -ETIME;
        if (!idle)
            reap_round(rp);
        else
            while (bitmap_pool_trim(rp->pool))
                loop_pause();
    }
    reap_round(rp);
    io_event_set(&rp->stopped);
}

int reaper_new(struct graph *g)
{
    g->reaper = mem_zalloc(sizeof *g->reaper);
    if (!g->reaper)
        return -ENOMEM;
    g->reaper->graph = g;
    return bitmap_pool_new(&g->reaper->pool);
}

/* Everything is quiet: the loops have ended or run nothing of ours. */
void reaper_free(struct graph *g)
{
    struct reaper *rp = g->reaper;
    for (unsigned i = 0; i < io_n_loops(g->io); i++)
        bitmap_retired_free(&g->loop[i].retired);
    while (rp->pending) {
        struct bitmap *next = *bitmap_link(rp->pending);
        bitmap_free(rp->pending);
        rp->pending = next;
    }
    while (rp->pending_undo) {
        struct bitmap_undo *next = *bitmap_undo_link(rp->pending_undo);
        bitmap_undo_free_some(rp->pending_undo, &(unsigned){UINT_MAX});
        rp->pending_undo = next;
    }
    bitmap_pool_free(rp->pool);
    mem_free(rp);
}

void graph_stop(struct graph *g)
{
    if (!g->reaper->running)
        return;
    g->reaper->stop = true;
    io_event_set(&g->reaper->kick);
    io_event_wait(&g->reaper->stopped, IO_FOREVER);
    g->reaper->running = false;
}

int graph_start(struct graph *g)
{
    int r = loop_spawn(io_loop(g->io, 0), reaper_main, g->reaper);
    g->reaper->running = r == 0;
    return r;
}

void graph_bitmap_free_later(struct graph *g, struct bitmap *bits)
{
    if (!bits)
        return;
    *bitmap_link(bits) = g->reaper->pending;
    g->reaper->pending = bits;
    io_event_set(&g->reaper->kick);
}

void graph_undo_free_later(struct graph *g, struct bitmap_undo *u)
{
    if (!u)
        return;
    *bitmap_undo_link(u) = g->reaper->pending_undo;
    g->reaper->pending_undo = u;
    io_event_set(&g->reaper->kick);
}

struct bitmap_pool *graph_bitmap_pool(struct graph *g)
{
    return g->reaper->pool;
}

struct bitmap_retired *graph_retired(struct graph *g)
{
    struct bitmap_retired *r = &g->loop[loop_index(loop_self())].retired;
    if (r->n >= RETIRED_KICK)
        io_event_set(&g->reaper->kick);
    return r;
}

/* ------------------------------------------------------------------ marking */

void tracker_mark(struct node *n, uint64_t off, uint64_t len)
{
    struct mark_set *s = n->marks;
    if (!s || !s->n)
        return;
    struct bitmap_retired *r = graph_retired(n->graph);
    for (unsigned i = 0; i < s->n; i++)
        bitmap_mark(s->bits[i], off, len, r);
}

static int marks_reserve(struct node *n, unsigned cap)
{
    if (n->marks && n->marks->cap >= cap)
        return 0;
    cap = MAX(4u, cap * 2);
    bool first = !n->marks;
    struct mark_set *s = mem_realloc(n->marks, 1, sizeof *s + cap * sizeof s->bits[0]);
    if (!s)
        return -ENOMEM;
    if (first)
        *s = (struct mark_set){0};
    n->marks = s;
    struct dirty_bitmap **owner = mem_realloc(s->owner, cap, sizeof *owner);
    if (!owner)
        return -ENOMEM;
    s->owner = owner;
    s->cap = cap;
    return 0;
}

void tracker_free(struct node *n)
{
    if (n->marks)
        mem_free(n->marks->owner);
    mem_free(n->marks);
    mem_free(n->by_name);
}

/* What takes the marks of `b`, or NULL. */
static struct bitmap *marked(const struct dirty_bitmap *b)
{
    if (!b->enabled || b->inconsistent)
        return NULL;
    return b->successor ? b->successor : b->bits;
}

/* `b` is about to change, or has changed, in what it marks. Lists of a thousand actions do this a
 * thousand times, so only its own entry is touched. */
static void marks_remove(struct dirty_bitmap *b)
{
    struct mark_set *s = b->node->marks;
    struct bitmap *bits = marked(b);
    assert(node_is_quiesced(b->node, QUIESCE_WRITES));
    if (!bits)
        return;
    unsigned i = b->mark_at;
    assert(s->bits[i] == bits && s->owner[i] == b);
    s->bits[i] = s->bits[--s->n];
    s->owner[i] = s->owner[s->n];
    s->owner[i]->mark_at = i;
}

static void marks_add(struct dirty_bitmap *b)
{
    struct mark_set *s = b->node->marks;
    struct bitmap *bits = marked(b);
    assert(node_is_quiesced(b->node, QUIESCE_WRITES));
    if (!bits)
        return;
    assert(s->n < s->cap);
    b->mark_at = s->n;
    s->owner[s->n] = b;
    s->bits[s->n++] = bits;
}

/* ------------------------------------------------------------------ finding and making */

struct dirty_bitmap *node_bitmaps(const struct node *n)
{
    return n->bitmaps;
}

/* FNV-1a, 32 bits. */
static uint32_t hash_name(const char *name)
{
    uint32_t h = 2166136261u;
    for (; *name; name++)
        h = (h ^ (unsigned char)*name) * 16777619u;
    return h;
}

static struct dirty_bitmap **bucket(struct node *n, uint32_t hash)
{
    return &n->by_name[(hash ^ hash >> 16) & (n->n_buckets - 1)];
}

#define BUCKETS_FIRST 16u

/* Clients have had thousands on a node. Without memory to grow it, the table gets slower. */
static int names_reserve(struct node *n)
{
    unsigned more = n->n_buckets ? n->n_buckets * 2 : BUCKETS_FIRST;
    if (n->n_bitmaps < n->n_buckets)
        return 0;
    struct dirty_bitmap **table = mem_calloc(more, sizeof *table);
    if (!table)
        return n->n_buckets ? 0 : -ENOMEM;
    mem_free(n->by_name);
    n->by_name = table;
    n->n_buckets = more;
    for (struct dirty_bitmap *b = n->bitmaps; b; b = b->next) {
        struct dirty_bitmap **at = bucket(n, b->hash);
        b->same_bucket = *at;
        *at = b;
    }
    return 0;
}

static struct dirty_bitmap *find(struct node *n, const char *name)
{
    uint32_t hash = hash_name(name);
    struct dirty_bitmap *b = n->n_buckets ? *bucket(n, hash) : NULL;
    while (b && (b->hash != hash || strcmp(b->name, name)))
        b = b->same_bucket;
    return b;
}

int dirty_bitmap_find(struct node *n, const char *name, unsigned needs, struct dirty_bitmap **out,
                      struct tide_error *err)
{
    struct dirty_bitmap *b = find(n, name);
    if (!b)
        return tide_fail(err, -ENOENT, "bitmap '%s' on node '%s' not found", shown_name(name).text,
                         n->name);
    if ((needs & BITMAP_NOT_BUSY) && b->n_busy)
        return tide_fail(err, -EBUSY, "bitmap '%s' on node '%s' is in use by a job or an export",
                         shown_name(name).text, n->name);
    if ((needs & BITMAP_WRITABLE) && b->read_only)
        return tide_fail(err, -EROFS, "bitmap '%s' on node '%s' is read-only",
                         shown_name(name).text, n->name);
    if ((needs & BITMAP_CONSISTENT) && b->inconsistent)
        return tide_fail(err, -EINVAL,
                         "bitmap '%s' on node '%s' is inconsistent: it can only be removed",
                         shown_name(name).text, n->name);
    *out = b;
    return 0;
}

int dirty_bitmap_check_name(struct node *n, const char *name, struct tide_error *err)
{
    if (!name[0])
        return tide_fail(err, -EINVAL, "a bitmap on node '%s' needs a name that is not empty",
                         n->name);
    if (strlen(name) > DIRTY_BITMAP_NAME_MAX)
        return tide_fail(err, -EINVAL, "bitmap name '%s' is longer than %u bytes",
                         shown_name(name).text, DIRTY_BITMAP_NAME_MAX);
    if (find(n, name))
        return tide_fail(err, -EEXIST, "bitmap '%s' on node '%s' exists already",
                         shown_name(name).text, n->name);
    return 0;
}

static int pick_granularity(struct node *n, const char *name, bool given, uint64_t granularity,
                            unsigned *shift, struct tide_error *err)
{
    if (!given)
        granularity = n->cluster ? MIN(MAX(n->cluster, 4096u), 65536u) : 65536;
    if (!is_pow2(granularity) || granularity < 512 || granularity > 2 * GIB)
        return tide_fail(err, -EINVAL,
                         "granularity %llu of bitmap '%s' is not a power of two from 512 to "
                         "2147483648",
                         (unsigned long long)granularity, name);
    *shift = (unsigned)__builtin_ctzll(granularity);
    return 0;
}

int dirty_bitmap_new(struct node *n, const char *name, uint64_t granularity, bool has_granularity,
                     bool disabled, struct dirty_bitmap **out, struct tide_error *err)
{
    unsigned shift = 0;
    int r = dirty_bitmap_check_name(n, name, err);
    if (r == 0)
        r = pick_granularity(n, name, has_granularity, granularity, &shift, err);
    if (r < 0)
        return r;
    struct dirty_bitmap *b = mem_zalloc(sizeof *b);
    r = b && (b->name = mem_strdup(name)) ? bitmap_new(n->size, shift, &b->bits) : -ENOMEM;
    if (r < 0) {
        if (b)
            mem_free(b->name);
        mem_free(b);
        if (r == -E2BIG)
            return tide_fail(
                err, r,
                "bitmap '%s': granularity %llu is too fine for the size of node '%s'; the "
                "finest that works is %llu",
                shown_name(name).text, 1ull << shift, n->name, 1ull << bitmap_min_shift(n->size));
        return tide_fail(err, r, "no memory for bitmap '%s' on node '%s'", shown_name(name).text,
                         n->name);
    }
    b->enabled = !disabled;
    b->node = n;
    b->hash = hash_name(name);
    dirty_bitmap_renew(b);
    *out = b;
    return 0;
}

unsigned long long dirty_bitmap_bytes(const struct dirty_bitmap *b, struct bitmap_pace *pace)
{
    return (unsigned long long)bitmap_count_at(b->bits, pace) << bitmap_shift(b->bits);
}

void dirty_bitmap_renew(struct dirty_bitmap *b)
{
    b->generation = ++b->node->graph->next_generation;
}

int dirty_bitmap_check_watch(const struct dirty_bitmap *b, struct tide_error *err)
{
    return node_check_watch(b->node, err);
}

void dirty_bitmap_free(struct dirty_bitmap *b)
{
    if (!b)
        return;
    assert(!b->n_busy);
    graph_bitmap_free_later(b->node->graph, b->bits);
    graph_bitmap_free_later(b->node->graph, b->successor);
    mem_free(b->name);
    mem_free(b);
}

/* ------------------------------------------------------------------ changes */

static void join_bucket(struct dirty_bitmap *b)
{
    struct dirty_bitmap **at = bucket(b->node, b->hash);
    b->same_bucket = *at;
    *at = b;
}

static void leave_bucket(struct dirty_bitmap *b)
{
    struct dirty_bitmap **at = bucket(b->node, b->hash);
    while (*at != b)
        at = &(*at)->same_bucket;
    *at = b->same_bucket;
}

char *dirty_bitmap_rename(struct dirty_bitmap *b, char *name)
{
    char *old = b->name;
    leave_bucket(b);
    b->name = name;
    b->hash = hash_name(name);
    join_bucket(b);
    return old;
}

/* Into the list, in front of `before` (NULL: at the end), and into the table of names. */
static void link_in(struct dirty_bitmap *b, struct node *n, struct dirty_bitmap *before)
{
    b->next = before;
    b->prev = before ? before->prev : n->last_bitmap;
    *(b->prev ? &b->prev->next : &n->bitmaps) = b;
    *(before ? &before->prev : &n->last_bitmap) = b;
    join_bucket(b);
    n->n_bitmaps++;
    marks_add(b);
}

int tracker_attach(struct dirty_bitmap *b, struct node *n)
{
    int r = marks_reserve(n, n->n_bitmaps + 1);
    if (r == 0)
        r = names_reserve(n);
    if (r == 0)
        link_in(b, n, n->bitmaps);
    return r;
}

void tracker_detach(struct dirty_bitmap *b)
{
    struct node *n = b->node;
    marks_remove(b);
    leave_bucket(b);
    *(b->prev ? &b->prev->next : &n->bitmaps) = b->next;
    *(b->next ? &b->next->prev : &n->last_bitmap) = b->prev;
    n->n_bitmaps--;
}

void tracker_reattach(struct dirty_bitmap *b, struct node *n, struct dirty_bitmap *before)
{
    link_in(b, n, before);
}

void dirty_bitmap_set_enabled(struct dirty_bitmap *b, bool enabled)
{
    marks_remove(b);
    b->enabled = enabled;
    marks_add(b);
}

int dirty_bitmap_freeze(struct dirty_bitmap *b)
{
    assert(!b->successor && node_is_quiesced(b->node, QUIESCE_WRITES));
    struct bitmap *successor;
    int r = bitmap_new(bitmap_size(b->bits), bitmap_shift(b->bits), &successor);
    if (r < 0)
        return r;
    marks_remove(b);
    b->successor = successor;
    b->n_busy++;
    marks_add(b);
    return 0;
}

/* Returns what the successor holds now. */
static struct bitmap *end_freeze(struct dirty_bitmap *b)
{
    struct bitmap *done = b->successor;
    marks_remove(b);
    b->successor = NULL;
    b->n_busy--;
    marks_add(b);
    return done;
}

void dirty_bitmap_abdicate(struct dirty_bitmap *b, struct frozen_bits *was)
{
    assert(b->successor && node_is_quiesced(b->node, QUIESCE_WRITES));
    bitmap_swap(b->bits, b->successor);
    was->generation = b->generation;
    dirty_bitmap_renew(b);
    was->bits = end_freeze(b);
}

void dirty_bitmap_freeze_again(struct dirty_bitmap *b, struct frozen_bits *was)
{
    assert(!b->successor && node_is_quiesced(b->node, QUIESCE_WRITES));
    marks_remove(b);
    bitmap_swap(b->bits, was->bits);
    b->successor = was->bits;
    b->generation = was->generation;
    b->n_busy++;
    marks_add(b);
    was->bits = NULL;
}

void dirty_bitmap_reclaim(struct dirty_bitmap *b, struct bitmap_pace *pace)
{
    assert(b->successor && node_is_quiesced(b->node, QUIESCE_WRITES));
    if (bitmap_merge(b->bits, b->successor, pace) < 0) {
        log_warn("block", "no memory to fold back bitmap '%s': all of node '%s' is marked dirty",
                 b->name, b->node->name);
        bitmap_mark(b->bits, 0, UINT64_MAX, graph_retired(b->node->graph));
    }
    graph_bitmap_free_later(b->node->graph, end_freeze(b));
}
