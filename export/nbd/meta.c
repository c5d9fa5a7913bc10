/* SPDX-License-Identifier: Apache-2.0 */
/* Metadata contexts.
 *
 *   id 0      base:allocation             HOLE where nothing is allocated, ZERO where it reads as
 * zero id 1      qemu:allocation-depth       the layer that decides (1: the node itself); if the
 * export offers it id 2 + i  qemu:dirty-bitmap:NAME      DIRTY, from the export's i-th bitmap
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
#define EXTENT_LEN 8u

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

static bool is_family(const char *query, size_t len)
{
    static const char *const families[] = {"base:", "qemu:", BITMAP};
    for (unsigned i = 0; i < sizeof families / sizeof *families; i++) {
        if (strlen(families[i]) == len && memcmp(families[i], query, len) == 0)
            return true;
    }
    return false;
}

void nbd_context_match(const struct nbd_export *e, const char *query, size_t len, bool list,
                       uint8_t *chosen)
{
    bool family = list && is_family(query, len);
    for (unsigned id = 0; id < nbd_n_contexts(e); id++) {
        const char *prefix, *name;
        if (!offered(e, id))
            continue;
        nbd_context_name(e, id, &prefix, &name);
        size_t n_prefix = strlen(prefix), n_name = strlen(name);
        if (family && len <= n_prefix && memcmp(prefix, query, len) == 0)
            chosen[id] = 1;
        else if (len == n_prefix + n_name && memcmp(query, prefix, n_prefix) == 0 &&
                 memcmp(query + n_prefix, name, n_name) == 0)
            chosen[id] = 1;
    }
}

void nbd_context_all(const struct nbd_export *e, uint8_t *chosen)
{
    for (unsigned id = 0; id < nbd_n_contexts(e); id++)
        chosen[id] = offered(e, id);
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
    /* of the chunk under way */
    size_t chunk; /* where it begins */
    unsigned n_extents;
    uint32_t last_flags;
    unsigned looks;
};

static int reserve(struct status *st, size_t len)
{
    if (len <= st->cap - st->len)
        return 0;
    assert(len <= st->max - st->len);
    size_t cap = MIN(MAX(2 * st->cap, st->len + len + 512), st->max);
    uint8_t *p = mem_realloc(st->p, cap, 1);
    if (!p)
        return -ENOMEM;
    st->p = p;
    st->cap = cap;
    return 0;
}

static int begin_chunk(struct status *st)
{
    int r = reserve(st, NBD_CHUNK_LEN + 4);
    if (r < 0)
        return r;
    st->chunk = st->len;
    st->len += NBD_CHUNK_LEN + 4;
    st->n_extents = 0;
    return 0;
}

static void end_chunk(struct status *st, uint64_t cookie, unsigned id)
{
    uint8_t *p = st->p + st->chunk;
    nbd_chunk_encode(p, cookie, 0, NBD_CHUNK_BLOCK_STATUS, st->len - st->chunk - NBD_CHUNK_LEN);
    put_be32(p + NBD_CHUNK_LEN, id);
}

/* 1: go on; 0: no more fit; -ENOMEM. len >= 1 and, with what is there, less than 2^32. */
static int add_extent(struct status *st, uint64_t len, uint32_t flags)
{
    if (st->n_extents && st->last_flags == flags) {
        uint8_t *last = st->p + st->len - EXTENT_LEN;
        put_be32(last, get_be32(last) + len);
        return 1;
    }
    if (st->n_extents >= st->max_extents)
        return 0;
    int r = reserve(st, EXTENT_LEN);
    if (r < 0)
        return r;
    put_be32(st->p + st->len, len);
    put_be32(st->p + st->len + 4, flags);
    st->len += EXTENT_LEN;
    st->n_extents++;
    st->last_flags = flags;
    return 1;
}

/* Others get their turn now and then. True: somebody waits for the gate, so be brief. */
static bool rest(struct status *st)
{
    if (++st->looks % LOOKS_PER_TURN == 0)
        loop_pause();
    return st->n_extents && root_is_shut(nbd_task_context(st->task)->root);
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

static unsigned max_extents(const struct nbd_conn *c, const struct nbd_request *rq)
{
    if (rq->flags & NBD_FLAG_REQ_ONE)
        return 1;
    return MIN((uint64_t)MAX(256u, NBD_MAX_EXTENTS / MAX(c->n_chosen, 1u)), rq->len);
}

uint64_t nbd_block_status_max(const struct nbd_conn *c, const struct nbd_request *rq)
{
    uint64_t chunk = NBD_CHUNK_LEN + 4 + (uint64_t)EXTENT_LEN * max_extents(c, rq);
    return c->n_contexts ? c->n_chosen * chunk : 0;
}

/* The reply may wait for a slow client: it is not to hold more than it needs. */
static void trim_body(struct status *st)
{
    uint8_t *p = mem_realloc(st->p, st->len, 1);
    if (p)
        st->p = p;
}

int nbd_block_status(struct nbd_task *t, struct node *n, uint8_t **out, size_t *out_len)
{
    struct nbd_context *x = nbd_task_context(t);
    const struct nbd_conn *c = x->conn;
    struct status st = {
        .task = t,
        .node = n,
        .max = nbd_block_status_max(c, &t->rq),
        .end = t->rq.off + t->rq.len,
        .max_extents = max_extents(c, &t->rq),
    };
    int r = 0;
    for (unsigned id = 0; r == 0 && id < c->n_contexts; id++) {
        if (!c->contexts[id])
            continue;
        r = begin_chunk(&st);
        if (r == 0 && id < NBD_CONTEXT_BITMAP)
            r = add_allocation(&st, id, t->rq.off);
        else if (r == 0)
            r = add_dirty(&st, x->exp->bitmaps[id - NBD_CONTEXT_BITMAP], t->rq.off);
        if (r == 0)
            end_chunk(&st, t->rq.cookie, id);
    }
    if (r < 0) {
        mem_free(st.p);
        return r;
    }
    trim_body(&st);
    put_be16(st.p + st.chunk + 4, NBD_CHUNK_DONE);
    *out = st.p;
    *out_len = st.len;
    return 0;
}
