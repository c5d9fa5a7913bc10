/* SPDX-License-Identifier: Apache-2.0 */
/* Merging one bitmap into another, and taking that back.
 *
 * Equal shapes (size and granularity) are walked side by side: what is empty in the source, or the
 * same page already, costs one look, so the work is in proportion to what differs. Recursion is one
 * call for each level: four at most. Unequal shapes: the source is converted first, and its pages
 * move into the target.
 *
 * A merge that can be undone writes to no page of the target. It puts another value into a slot and
 * notes the slot and the old value; unwinding exchanges the two, last first, which needs no memory
 * and cannot fail. Either way what is left in the notes belongs to nobody else. The room for a note
 * is there before the slot changes. A note stays right while later changes come and go, because
 * they are undone first: a page that was shared in between keeps its tag and count by itself, and a
 * directory that was exchanged or removed is kept by whoever undoes that.
 *
 * Counts are exact here, so a page whose count says that it is full becomes SLOT_ONES on the way,
 * and two sets of which one contains the other are equal when their counts are. */
#include "bitmap/pages.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

#include "base/mem.h"
#include "bitmap/kernels.h"

/* ---- the notes ---- */

/* Most merges of a long list change a page or two; a chunk of the third size takes 4 KiB. */
#define CHUNK_FIRST 6u
#define CHUNK_GROWTH 6u
#define CHUNK_LARGEST 254u
#define LEVEL_MASK ((uintptr_t)7)

/* What a slot does not hold any more: its old value, or, once unwound, the new one. */
struct note {
    uintptr_t place; /* the slot's address | its level */
    bitmap_slot value;
};

struct chunk {
    struct chunk *older;
    unsigned n, cap;
    struct note note[];
};

struct bitmap_undo {
    struct chunk *newest;
    struct bitmap *used_up;   /* converted sources, by bitmap_link */
    struct bitmap_undo *link; /* bitmap_undo_link() */
    struct bitmap_pool *pool; /* or NULL */
    unsigned n_made;          /* pages */
    bool unwound;
};

int bitmap_undo_new(struct bitmap_pool *pool, struct bitmap_undo **out)
{
    struct bitmap_undo *u = mem_zalloc(sizeof *u);
    if (!u)
        return -ENOMEM;
    u->pool = pool;
    *out = u;
    return 0;
}

struct bitmap_undo **bitmap_undo_link(struct bitmap_undo *u)
{
    return &u->link;
}

static int undo_reserve(struct bitmap_undo *u)
{
    struct chunk *last = u->newest;
    if (last && last->n < last->cap)
        return 0;
    unsigned cap = last ? MIN(last->cap * CHUNK_GROWTH, CHUNK_LARGEST) : CHUNK_FIRST;
    struct chunk *c = mem_alloc(sizeof *c + cap * sizeof c->note[0]);
    if (!c)
        return -ENOMEM;
    c->older = last;
    c->n = 0;
    c->cap = cap;
    u->newest = c;
    return 0;
}

/* There is room. */
static void undo_note(struct bitmap_undo *u, bitmap_slot *s, unsigned level, uintptr_t old)
{
    struct note *n = &u->newest->note[u->newest->n++];
    n->place = (uintptr_t)s | level;
    atomic_init(&n->value, old);
}

void bitmap_undo_unwind(struct bitmap_undo *u)
{
    assert(!u->unwound);
    u->unwound = true;
    for (struct chunk *c = u->newest; c; c = c->older)
        for (unsigned i = c->n; i-- > 0;) {
            bitmap_slot *s = (bitmap_slot *)(c->note[i].place & ~LEVEL_MASK);
            uintptr_t v = atomic_load(s);
            atomic_store(s, atomic_load_explicit(&c->note[i].value, memory_order_relaxed));
            atomic_init(&c->note[i].value, v);
        }
}

static bool chunk_free_some(struct chunk *c, unsigned *budget)
{
    for (; c->n; c->n--) {
        struct note *n = &c->note[c->n - 1];
        if (!slot_free_some(&n->value, n->place & LEVEL_MASK, budget))
            return false;
    }
    return true;
}

bool bitmap_undo_free_some(struct bitmap_undo *u, unsigned *budget)
{
    while (u->newest) {
        struct chunk *c = u->newest;
        if (!chunk_free_some(c, budget))
            return false;
        u->newest = c->older;
        mem_free(c);
    }
    while (u->used_up) {
        struct bitmap *next = *bitmap_link(u->used_up);
        if (!bitmap_free_some(u->used_up, budget))
            return false;
        u->used_up = next;
    }
    if (!budget_take(budget))
        return false;
    mem_free(u);
    return true;
}

/* ---- merge, equal shapes ---- */

#define PREFETCH_WORDS 64u
#define SINGLE_PAGES 64u /* so many come one by one; who needs more gets them from the pool */

struct merge {
    struct dir *dir; /* the target's */
    /* NULL: what is replaced goes at once, pages may be written in place, and what there is no
     * memory for becomes all ones. */
    struct bitmap_undo *undo;
    bool unpublished;    /* these slots are in a table that is not in the target yet */
    bool private_source; /* nobody else uses the source: its pages may move */
    struct page *spare;  /* not needed, for next time */
};

static int merge_reserve(struct merge *m)
{
    return m->undo && !m->unpublished ? undo_reserve(m->undo) : 0;
}

/* The slot of the target gets another value; there is room for the note. */
static void merge_set(struct merge *m, bitmap_slot *s, unsigned level, uintptr_t v)
{
    uintptr_t old = atomic_load(s);
    atomic_store(s, v);
    if (m->undo && !m->unpublished)
        undo_note(m->undo, s, level, old);
    else if (old)
        dir_free_subtree(level, old);
}

/* The slot of the target gets what the source's has. */
static void merge_give(struct merge *m, bitmap_slot *ds, bitmap_slot *ss, unsigned level)
{
    uintptr_t v = atomic_load(ss);
    if (m->private_source) {
        atomic_store(ss, 0);
    } else {
        v |= SLOT_SHARED;
        page_get(slot_page(v));
        atomic_store(ss, v);
    }
    merge_set(m, ds, level, v);
}

static struct page *merge_make_page(struct merge *m)
{
    struct page *pg = m->spare;
    m->spare = NULL;
    if (pg)
        return pg;
    if (m->undo && m->undo->pool && m->undo->n_made++ >= SINGLE_PAGES)
        return pool_get(m->undo->pool);
    return page_new();
}

/* Never less than there should be, in case nobody takes it back. */
static int merge_no_memory(struct merge *m, bitmap_slot *s, unsigned level)
{
    merge_set(m, s, level, SLOT_ONES);
    return -ENOMEM;
}

/* Neither page is written: the target's stays, if there was nothing new, or is replaced by the
 * source's, if that has it all, or else by a new one. */
static int merge_new_page(struct merge *m, uint64_t base, bitmap_slot *ds, bitmap_slot *ss)
{
    struct page *dst = slot_page(atomic_load(ds)), *src = slot_page(atomic_load(ss));
    struct page *both = merge_make_page(m);
    if (!both)
        return merge_no_memory(m, ds, 0);
    unsigned n = page_or(both, dst, src);
    if (n == dir_valid_bits(m->dir, base)) {
        merge_set(m, ds, 0, SLOT_ONES);
    } else if (n == page_count(dst)) {
        /* Nothing new. */
    } else if (n == page_count(src)) {
        merge_give(m, ds, ss, 0);
    } else {
        merge_set(m, ds, 0, (uintptr_t)both);
        return 0;
    }
    m->spare = both;
    return 0;
}

static int merge_page(struct merge *m, uint64_t base, bitmap_slot *ds, bitmap_slot *ss)
{
    uintptr_t dv = atomic_load(ds), sv = atomic_load(ss);
    struct page *dst = slot_page(dv), *src = slot_page(sv);
    unsigned n = page_count(src), full = dir_valid_bits(m->dir, base);
    if (dst == src || n == 0)
        return 0;
    if (merge_reserve(m) < 0)
        return -ENOMEM;
    if (n == full)
        merge_set(m, ds, 0, SLOT_ONES);
    else if (!dst)
        merge_give(m, ds, ss, 0);
    else if (m->undo || dv & SLOT_SHARED)
        return merge_new_page(m, base, ds, ss);
    else if (page_or(dst, dst, src) == full)
        merge_set(m, ds, 0, SLOT_ONES);
    return 0;
}

static int merge_slots(struct merge *m, unsigned level, uint64_t base, bitmap_slot *ds,
                       bitmap_slot *ss, unsigned n);

/* The source has a table where the target has nothing. The new table is put in place when it is
 * full, so that one note is enough for all that is in it. */
static int merge_new_table(struct merge *m, unsigned level, uint64_t base, bitmap_slot *ds,
                           struct table *src)
{
    if (merge_reserve(m) < 0)
        return -ENOMEM;
    struct table *t = table_new(0);
    if (!t)
        return merge_no_memory(m, ds, level);
    bool outer = m->unpublished;
    m->unpublished = true;
    int r = merge_slots(m, level - 1, base, t->slot, src->slot, TABLE_SLOTS);
    m->unpublished = outer;
    merge_set(m, ds, level, (uintptr_t)t);
    return r;
}

static int merge_slot(struct merge *m, unsigned level, uint64_t base, bitmap_slot *ds,
                      bitmap_slot *ss)
{
    uintptr_t sv = atomic_load(ss), dv = atomic_load(ds);
    if (!sv || dv & SLOT_ONES)
        return 0;
    if (sv & SLOT_ONES) {
        int r = merge_reserve(m);
        if (r == 0)
            merge_set(m, ds, level, SLOT_ONES);
        return r;
    }
    if (!level)
        return merge_page(m, base, ds, ss);
    if (!dv && m->private_source) {
        int r = merge_reserve(m);
        if (r == 0)
            merge_give(m, ds, ss, level);
        return r;
    }
    if (!dv)
        return merge_new_table(m, level, base, ds, slot_table(sv));
    return merge_slots(m, level - 1, base, slot_table(dv)->slot, slot_table(sv)->slot, TABLE_SLOTS);
}

/* The heads of pages that come soon decide what happens to them, and each is a wait for memory; the
 * words of the next one. */
static void merge_prefetch(const bitmap_slot *s, unsigned i, unsigned n)
{
    if (i + 4 < n)
        __builtin_prefetch(slot_page(atomic_load_explicit(&s[i + 4], memory_order_relaxed)));
    if (i + 1 == n)
        return;
    const struct page *pg = slot_page(atomic_load_explicit(&s[i + 1], memory_order_relaxed));
    for (unsigned k = 0; pg && k < PREFETCH_WORDS; k += 8)
        __builtin_prefetch(&pg->word[k]);
}

static int merge_slots(struct merge *m, unsigned level, uint64_t base, bitmap_slot *ds,
                       bitmap_slot *ss, unsigned n)
{
    int result = 0;
    for (unsigned i = 0; i < n; i++, base += (uint64_t)1 << bitmap_span_shift(level)) {
        if (!level) {
            merge_prefetch(ss, i, n);
            merge_prefetch(ds, i, n);
        }
        int r = merge_slot(m, level, base, &ds[i], &ss[i]);
        if (r < 0 && m->undo)
            return r; /* all of it will be taken back */
        /* What could not be copied is all set: go on, nothing is lost. */
        result = r < 0 ? r : result;
    }
    return result;
}

static int merge_dirs(struct merge *m, struct dir *src)
{
    struct dir *d = m->dir;
    int r = merge_slots(m, d->top, 0, d->root, src->root, d->n_root);
    page_put(m->spare);
    return r;
}

/* ---- the two kinds ---- */

int bitmap_merge(struct bitmap *dst, struct bitmap *src)
{
    assert(dst->size == src->size);
    if (dst == src)
        return 0;
    struct dir *d = atomic_load(&dst->dir), *s = atomic_load(&src->dir);
    if (dst->shift == src->shift)
        return merge_dirs(&(struct merge){.dir = d}, s);
    struct bitmap_retired replaced = {0};
    int r = dir_copy_runs(d, dst->shift, s, src->shift, &replaced);
    bitmap_retired_free(&replaced); /* at once: nobody reads dst */
    return r;
}

static int merge_converted(struct bitmap *dst, struct bitmap *src, struct bitmap_undo *u)
{
    struct bitmap *c;
    int r = bitmap_convert(src, dst->shift, &c);
    if (r < 0)
        return r;
    *bitmap_link(c) = u->used_up;
    u->used_up = c;
    struct merge m = {.dir = atomic_load(&dst->dir), .undo = u, .private_source = true};
    return merge_dirs(&m, atomic_load(&c->dir));
}

int bitmap_merge_undoable(struct bitmap *dst, struct bitmap *src, struct bitmap_undo *u)
{
    assert(dst->size == src->size && !u->unwound);
    if (dst == src)
        return 0;
    if (dst->shift != src->shift)
        return merge_converted(dst, src, u);
    struct merge m = {.dir = atomic_load(&dst->dir), .undo = u};
    return merge_dirs(&m, atomic_load(&src->dir));
}
