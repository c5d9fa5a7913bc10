/* SPDX-License-Identifier: Apache-2.0 */
/* Metadata contexts.
 *
 *   id 0      base:allocation          HOLE: nothing is allocated; ZERO: reads as zero
 *   id 1      qemu:allocation-depth    the layer that decides, 1 being the node itself; if offered
 *   id 2 + i  qemu:dirty-bitmap:NAME   DIRTY, from the export's i-th bitmap
 *
 * A client lists by exact name or by family ("base:", "qemu:", "qemu:dirty-bitmap:") and chooses by
 * exact name only. Exported bitmaps are busy, so they stay; their bits are read within one turn,
 * or, when there are many, over several turns of one admission, which keeps them from being
 * exchanged. */
#include <assert.h>
#include <errno.h>
#include <string.h>

#include "base/mem.h"
#include "block/node.h"
#include "block/root.h"
#include "block/tracker.h"
#include "export/nbd/nbd.h"

#define ALLOCATION "base:allocation"
#define DEPTH "qemu:allocation-depth"
#define BITMAP "qemu:dirty-bitmap:"

#define LOOKS_PER_TURN 512u /* extents looked up before others get a chance */
#define FIRST_BODY 128u     /* room for a few extents */
#define TRIM_FROM 1024u
#define MAX_LOOKS (64u << 10) /* for one context; then the reply is shorter than what was asked */

/* ------------------------------------------------------------------ names */

static bool offered(const struct nbd_export *e, unsigned id)
{
    return id != NBD_CONTEXT_DEPTH || e->allocation_depth;
}

void nbd_context_name(const struct nbd_export *e, unsigned id, const char **prefix,
                      const char **name)
{
    *name = "";
    if (id == NBD_CONTEXT_ALLOCATION) {
        *prefix = ALLOCATION;
    } else if (id == NBD_CONTEXT_DEPTH) {
        *prefix = DEPTH;
    } else {
        *prefix = BITMAP;
        *name = e->bitmaps[id - NBD_CONTEXT_BITMAP]->name;
    }
}

#define FAMILY_BASE 1u
#define FAMILY_QEMU 2u
#define FAMILY_BITMAP 4u

static bool is_text(const char *query, size_t len, const char *text)
{
    return strlen(text) == len && memcmp(text, query, len) == 0;
}

static unsigned family_of(const char *query, size_t len)
{
    return (is_text(query, len, "base:") ? FAMILY_BASE : 0) |
           (is_text(query, len, "qemu:") ? FAMILY_QEMU : 0) |
           (is_text(query, len, BITMAP) ? FAMILY_BITMAP : 0);
}

void nbd_context_match(const struct nbd_export *e, const char *query, size_t len,
                       unsigned *families, uint8_t *chosen)
{
    const size_t prefix = strlen(BITMAP);
    if (families)
        *families |= family_of(query, len);
    if (is_text(query, len, ALLOCATION))
        chosen[NBD_CONTEXT_ALLOCATION] = 1;
    if (e->allocation_depth && is_text(query, len, DEPTH))
        chosen[NBD_CONTEXT_DEPTH] = 1;
    if (len < prefix || memcmp(query, BITMAP, prefix) != 0)
        return;
    int i = nbd_bitmap_find(e, query + prefix, len - prefix);
    if (i >= 0)
        chosen[NBD_CONTEXT_BITMAP + i] = 1;
}

void nbd_context_families(const struct nbd_export *e, unsigned families, uint8_t *chosen)
{
    if (families & FAMILY_BASE)
        chosen[NBD_CONTEXT_ALLOCATION] = 1;
    if (families & FAMILY_QEMU)
        chosen[NBD_CONTEXT_DEPTH] = e->allocation_depth;
    if (families & (FAMILY_QEMU | FAMILY_BITMAP))
        memset(chosen + NBD_CONTEXT_BITMAP, 1, e->n_bitmaps);
}

void nbd_context_all(const struct nbd_export *e, uint8_t *chosen)
{
    for (unsigned id = 0; id < nbd_n_contexts(e); id++)
        chosen[id] = offered(e, id);
}

/* ------------------------------------------------------------------ bitmaps by name */

/* Exported bitmaps are busy, so their names stay. */
static unsigned first_bucket(const struct nbd_export *e, const char *name, size_t len)
{
    uint32_t h = 2166136261u; /* FNV-1a */
    for (size_t i = 0; i < len; i++)
        h = (h ^ (unsigned char)name[i]) * 16777619u;
    return (h ^ h >> 16) & (e->n_buckets - 1);
}

int nbd_bitmaps_reserve(struct nbd_export *e, unsigned n)
{
    unsigned buckets = 1;
    if (n == 0)
        return 0;
    while (buckets < 2 * n)
        buckets *= 2;
    e->bitmaps = mem_calloc(n, sizeof *e->bitmaps);
    e->by_name = mem_calloc(buckets, sizeof *e->by_name);
    e->n_buckets = buckets;
    return e->bitmaps && e->by_name ? 0 : -ENOMEM;
}

void nbd_bitmaps_add(struct nbd_export *e, struct dirty_bitmap *b)
{
    unsigned at = first_bucket(e, b->name, strlen(b->name));
    while (e->by_name[at])
        at = (at + 1) & (e->n_buckets - 1);
    e->bitmaps[e->n_bitmaps++] = b;
    e->by_name[at] = e->n_bitmaps;
}

void nbd_bitmaps_free(struct nbd_export *e)
{
    mem_free(e->bitmaps);
    mem_free(e->by_name);
    e->bitmaps = NULL;
    e->by_name = NULL;
    e->n_bitmaps = 0;
}

int nbd_bitmap_find(const struct nbd_export *e, const char *name, size_t len)
{
    if (e->n_bitmaps == 0)
        return -1;
    unsigned at = first_bucket(e, name, len), i;
    for (; (i = e->by_name[at]); at = (at + 1) & (e->n_buckets - 1)) {
        if (is_text(name, len, e->bitmaps[i - 1]->name))
            return (int)i - 1;
    }
    return -1;
}

/* ------------------------------------------------------------------ extents */

/* The body of the reply while it grows. */
struct status {
    struct nbd_task *task;
    struct node *node;
    uint8_t *p;
    size_t len, cap;
    size_t max;   /* that it can become */
    uint64_t end; /* of what was asked */
    unsigned max_extents;
    bool wide; /* extended headers: extents of 64 bits */
    /* of the chunk under way */
    size_t chunk; /* where it begins */
    unsigned n_extents;
    uint64_t last_len;
    uint32_t last_flags;
    unsigned looks;
};

/* Of a chunk before its extents; of an extent. */
static size_t chunk_len(bool wide)
{
    return wide ? NBD_EXT_CHUNK_LEN + 8 : NBD_CHUNK_LEN + 4;
}

static size_t extent_len(bool wide)
{
    return wide ? 16 : 8;
}

static int reserve(struct status *st, size_t len)
{
    if (len <= st->cap - st->len)
        return 0;
    assert(len <= st->max - st->len);
    size_t cap = MIN(MAX(2 * st->cap, st->len + len + FIRST_BODY), st->max);
    uint8_t *p = mem_realloc(st->p, cap, 1);
    if (!p)
        return -ENOMEM;
    st->p = p;
    st->cap = cap;
    return 0;
}

static int begin_chunk(struct status *st)
{
    int r = reserve(st, chunk_len(st->wide));
    if (r < 0)
        return r;
    st->chunk = st->len;
    st->len += chunk_len(st->wide);
    st->n_extents = 0;
    st->looks = 0;
    return 0;
}

static void end_chunk(struct status *st, unsigned id, bool last)
{
    const struct nbd_task *t = st->task;
    const struct nbd_conn *c = nbd_task_context(st->task)->conn;
    uint8_t *p = st->p + st->chunk;
    size_t n = st->wide ? NBD_EXT_CHUNK_LEN : NBD_CHUNK_LEN;
    nbd_put_chunk(c, p, &t->rq, last ? NBD_CHUNK_DONE : 0,
                  st->wide ? NBD_CHUNK_BLOCK_STATUS_EXT : NBD_CHUNK_BLOCK_STATUS,
                  st->len - st->chunk - n);
    put_be32(p + n, id);
    if (st->wide)
        put_be32(p + n + 4, st->n_extents);
}

static void put_extent(const struct status *st, uint8_t *p)
{
    if (st->wide) {
        put_be64(p, st->last_len);
        put_be64(p + 8, st->last_flags);
    } else {
        put_be32(p, (uint32_t)st->last_len);
        put_be32(p + 4, st->last_flags);
    }
}

/* 1: go on; 0: no more fit; -ENOMEM. len >= 1; with what is there it fits the extent's field,
 * because it lies inside what was asked for in a field as wide. */
static int add_extent(struct status *st, uint64_t len, uint32_t flags)
{
    size_t n = extent_len(st->wide);
    if (st->n_extents && st->last_flags == flags) {
        st->last_len += len;
        put_extent(st, st->p + st->len - n);
        return 1;
    }
    if (st->n_extents >= st->max_extents)
        return 0;
    int r = reserve(st, n);
    if (r < 0)
        return r;
    st->last_len = len;
    st->last_flags = flags;
    put_extent(st, st->p + st->len);
    st->len += n;
    st->n_extents++;
    return 1;
}

/* Others get their turn now and then. True: be brief, for somebody waits for the gate, or nobody
 * for the reply, or this goes on for too long. */
static bool rest(struct status *st)
{
    const struct nbd_context *x = nbd_task_context(st->task);
    if (++st->looks % LOOKS_PER_TURN == 0)
        loop_pause();
    return st->n_extents && (root_is_shut(x->root) || nbd_is_cut(x) || st->looks >= MAX_LOOKS);
}

static uint32_t extent_flags(const struct extent *e, unsigned id)
{
    if (id == NBD_CONTEXT_DEPTH)
        return e->depth;
    return (e->data ? 0 : NBD_STATE_HOLE) | (e->zero ? NBD_STATE_ZERO : 0);
}

static int add_allocation(struct status *st, unsigned id, uint64_t off)
{
    int r = 1;
    while (r > 0 && off < st->end && !rest(st)) {
        struct extent e;
        r = node_extent(st->node, off, st->end - off, &e);
        if (r < 0)
            return r;
        r = add_extent(st, e.len, extent_flags(&e, id));
        off += e.len;
    }
    return r < 0 ? r : 0;
}

static int add_dirty(struct status *st, const struct dirty_bitmap *b, uint64_t off)
{
    int r = 1;
    while (r > 0 && off < st->end && !rest(st)) {
        uint64_t run, len;
        if (!bitmap_next_dirty(b->bits, off, st->end, &run, &len)) {
            run = st->end;
            len = 0;
        }
        if (run > off)
            r = add_extent(st, run - off, 0);
        if (r > 0 && len > 0)
            r = add_extent(st, len, NBD_STATE_DIRTY);
        off = run + len;
    }
    return r < 0 ? r : 0;
}

/* In each of the chunks of `n` contexts. */
static unsigned max_extents(const struct nbd_request *rq, uint64_t len, unsigned n)
{
    if (rq->flags & NBD_FLAG_REQ_ONE)
        return 1;
    return MIN((uint64_t)MAX(256u, NBD_MAX_EXTENTS / MAX(n, 1u)), len);
}

static uint64_t body_max(bool wide, unsigned extents, unsigned n)
{
    return n * (chunk_len(wide) + (uint64_t)extent_len(wide) * extents);
}

uint64_t nbd_block_status_max(const struct nbd_conn *c, const struct nbd_request *rq)
{
    /* Before the payload is here, one does not know how long. */
    uint64_t len = rq->payload ? UINT64_MAX : rq->len;
    return c->n_contexts ? body_max(c->extended, max_extents(rq, len, c->n_chosen), c->n_chosen)
                         : 0;
}

/* ------------------------------------------------------------------ the reply */

/* Marks in `asked`, one byte for each context, what the payload names; returns how many. */
static int take_filter(const struct nbd_task *t, const struct nbd_conn *c, uint8_t *asked)
{
    unsigned n = (unsigned)((t->rq.payload - NBD_FILTER_LEN) / 4);
    for (unsigned i = 0; i < n; i++) {
        uint32_t id = get_be32(t->payload + NBD_FILTER_LEN + (size_t)4 * i);
        if (id >= c->n_contexts || !c->contexts[id] || asked[id])
            return -EINVAL;
        asked[id] = 1;
    }
    return (int)n;
}

/* The reply may wait for a slow client: it is not to hold much more than it needs. A short one, as
 * for a stretch in which nothing is marked, is left alone: that is most of them on a big disk. */
static void trim_body(struct status *st)
{
    if (st->cap <= TRIM_FROM)
        return;
    uint8_t *p = mem_realloc(st->p, st->len, 1);
    if (p)
        st->p = p;
}

/* Chunks for the `n_asked` contexts that are marked in `asked`. */
static co_fn int add_chunks(struct status *st, const uint8_t *asked, unsigned n_asked)
{
    const struct nbd_task *t = st->task;
    const struct nbd_export *e = nbd_task_context(st->task)->exp;
    int r = 0;
    st->max_extents = max_extents(&t->rq, t->rq.len, n_asked);
    st->max = body_max(st->wide, st->max_extents, n_asked);
    for (unsigned id = 0; r == 0 && n_asked > 0; id++) {
        if (!asked[id])
            continue;
        r = begin_chunk(st);
        if (r == 0 && id < NBD_CONTEXT_BITMAP)
            r = add_allocation(st, id, t->rq.off);
        else if (r == 0)
            r = add_dirty(st, e->bitmaps[id - NBD_CONTEXT_BITMAP], t->rq.off);
        if (r == 0)
            end_chunk(st, id, --n_asked == 0);
    }
    return r;
}

int nbd_block_status(struct nbd_task *t, struct node *n, uint8_t **out, size_t *out_len)
{
    const struct nbd_conn *c = nbd_task_context(t)->conn;
    struct status st = {.task = t, .node = n, .end = t->rq.off + t->rq.len, .wide = c->extended};
    mem_autofree uint8_t *filter = NULL;
    int r = (int)c->n_chosen;
    if (t->payload) {
        filter = mem_zalloc(c->n_contexts);
        r = filter ? take_filter(t, c, filter) : -ENOMEM;
    }
    if (r > 0)
        r = add_chunks(&st, filter ? filter : c->contexts, (unsigned)r);
    if (r < 0) {
        mem_free(st.p);
        return r;
    }
    trim_body(&st);
    *out = st.p;
    *out_len = st.len;
    return 0;
}
