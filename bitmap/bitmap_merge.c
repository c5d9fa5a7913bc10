/* SPDX-License-Identifier: Apache-2.0 */
/* Merging one bitmap into another, and taking that back.
 *
 * Equal shapes (size and granularity) are walked side by side: what is empty in the source, or the
 * same page already, costs one look, so the work is in proportion to what differs. Recursion is one
 * call for each level: four at most. Another granularity: the target is walked where the source has
 * bits, and what the source says about a page is made as a page first (bitmap_convert.c); if there
 * is something new in it, it is the target's next one.
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
    struct bitmap_undo *link; /* bitmap_undo_link() */
    struct bitmap_pool *pool; /* or NULL */
    struct bitmap_pace *pace; /* or NULL */
    unsigned n_made;          /* pages */
    bool unwound;
};

int bitmap_undo_new(struct bitmap_pool *pool, struct bitmap_pace *pace, struct bitmap_undo **out)
{
    struct bitmap_undo *u = mem_zalloc(sizeof *u);
    if (!u)
        return -ENOMEM;
    u->pool = pool;
    u->pace = pace;
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
            pace_add(u->pace, 1);
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
    if (!budget_take(budget))
        return false;
    mem_free(u);
    return true;
}

/* ---- changing the target ---- */

#define PREFETCH_WORDS 64u
#define FREE_PAGES 8u    /* between two rests */
#define SINGLE_PAGES 64u /* so many come one by one; who needs more gets them from the pool */

struct merge {
    struct dir *dir; /* the target's */
    /* NULL: what is replaced goes at once, pages may be written in place, and what there is no
     * memory for becomes all ones. */
    struct bitmap_undo *undo;
    struct bitmap_pace *pace;
    bool unpublished;   /* these slots are in a table that is not in the target yet */
    struct page *spare; /* not needed, for next time */
    /* A source of another granularity, else NULL. */
    const struct dir *other;
    unsigned shift, other_shift; /* the target's, and that one's */
};

static int merge_reserve(struct merge *m)
{
    return m->undo && !m->unpublished ? undo_reserve(m->undo) : 0;
}

/* What the target has no more, and nobody looks at. */
static void merge_free(struct merge *m, unsigned level, uintptr_t v)
{
    bitmap_slot s;
    unsigned budget = FREE_PAGES;
    atomic_init(&s, v);
    for (; !slot_free_some(&s, level, &budget); budget = FREE_PAGES)
        pace_add(m->pace, PACE_PAGE);
}

/* The slot of the target gets another value; there is room for the note. */
static void merge_set(struct merge *m, bitmap_slot *s, unsigned level, uintptr_t v)
{
    uintptr_t old = atomic_load(s);
    atomic_store(s, v);
    if (m->undo && !m->unpublished)
        undo_note(m->undo, s, level, old);
    else if (old)
        merge_free(m, level, old);
}

/* The slot of the target gets the source's page, too. */
static void merge_give(struct merge *m, bitmap_slot *ds, bitmap_slot *ss)
{
    uintptr_t v = atomic_load(ss) | SLOT_SHARED;
    page_get(slot_page(v));
    atomic_store(ss, v);
    merge_set(m, ds, 0, v);
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
    pace_add(m->pace, PACE_PAGE);
    unsigned n = page_or(both, dst, src);
    if (n == dir_valid_bits(m->dir, base)) {
        merge_set(m, ds, 0, SLOT_ONES);
    } else if (n == page_count(dst)) {
        /* Nothing new. */
    } else if (n == page_count(src)) {
        merge_give(m, ds, ss);
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
        merge_give(m, ds, ss);
    else if (m->undo || dv & SLOT_SHARED)
        return merge_new_page(m, base, ds, ss);
    else if (page_or(dst, dst, src) == full)
        merge_set(m, ds, 0, SLOT_ONES);
    return 0;
}

static int merge_ones(struct merge *m, unsigned level, bitmap_slot *ds)
{
    int r = merge_reserve(m);
    if (r == 0)
        merge_set(m, ds, level, SLOT_ONES);
    return r;
}

static int merge_slots(struct merge *m, unsigned level, uint64_t base, bitmap_slot *ds,
                       bitmap_slot *ss, unsigned n);
static int convert_slots(struct merge *m, unsigned level, uint64_t base, bitmap_slot *ds,
                         unsigned n);

/* The source (`src`: its table, where shapes are equal) has bits where the target has nothing. The
 * new table is put in place when it is full, so that one note is enough for all that is in it. */
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
    int r = src ? merge_slots(m, level - 1, base, t->slot, src->slot, TABLE_SLOTS)
                : convert_slots(m, level - 1, base, t->slot, TABLE_SLOTS);
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
    if (sv & SLOT_ONES)
        return merge_ones(m, level, ds);
    if (!level)
        return merge_page(m, base, ds, ss);
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
        pace_add(m->pace, 1);
        int r = merge_slot(m, level, base, &ds[i], &ss[i]);
        if (r < 0 && m->undo)
            return r; /* all of it will be taken back */
        /* What could not be copied is all set: go on, nothing is lost. */
        result = r < 0 ? r : result;
    }
    return result;
}

/* ---- a source of another granularity ---- */

/* The bits of the source that stand for those of the target from `bit` on; up to `end`. */
static uint64_t source_bit(const struct merge *m, uint64_t bit)
{
    return bit << m->shift >> m->other_shift;
}

static uint64_t source_end(const struct merge *m, uint64_t end)
{
    return MIN(bitmap_bits(end << m->shift, m->other_shift), m->other->n_bits);
}

/* The first bit of [at, end) that the source sets, or `end`. */
static uint64_t next_to_convert(const struct merge *m, uint64_t at, uint64_t end)
{
    uint64_t to = source_end(m, end), bit = dir_next(m->other, source_bit(m, at), to, true);
    return bit < to ? MAX(at, bit << m->other_shift >> m->shift) : end;
}

/* Does it set all of them? Counts are exact here. */
static bool all_to_convert(const struct merge *m, uint64_t at, uint64_t end)
{
    uint64_t bit = source_bit(m, at), to = source_end(m, end);
    struct place p;
    for (; bitmap_find_other(m->other, bit, to, SLOT_ONES, &p); bit = p.end) {
        pace_add(m->pace, 1);
        if (!p.v)
            return false;
        if (p.v & SLOT_ONES)
            continue;
        bool whole = p.base >= bit && p.end <= to;
        if (whole ? page_count(slot_page(p.v)) < p.end - p.base
                  : dir_next(m->other, MAX(bit, p.base), MIN(to, p.end), false) < MIN(to, p.end))
            return false;
    }
    return true;
}

static int convert_page(struct merge *m, uint64_t base, bitmap_slot *ds)
{
    uintptr_t dv = atomic_load(ds);
    struct page *dst = slot_page(dv);
    unsigned full = dir_valid_bits(m->dir, base);
    if (merge_reserve(m) < 0)
        return -ENOMEM;
    struct page *pg = merge_make_page(m);
    if (!pg)
        return merge_no_memory(m, ds, 0);
    unsigned n = page_convert(pg, base, full, m->shift, m->other, m->other_shift, m->pace);
    assert(n); /* the walk goes where the source has bits */
    pace_add(m->pace, PACE_PAGE);
    if (dst && n < full) {
        bool in_place = !m->undo && !(dv & SLOT_SHARED);
        n = page_or(in_place ? dst : pg, dst, pg);
    }
    if (n == full) {
        merge_set(m, ds, 0, SLOT_ONES);
    } else if (!dst || n > page_count(dst)) {
        merge_set(m, ds, 0, (uintptr_t)pg);
        return 0;
    }
    m->spare = pg;
    return 0;
}

static int convert_slot(struct merge *m, unsigned level, uint64_t base, bitmap_slot *ds)
{
    uint64_t end = MIN(base + ((uint64_t)1 << bitmap_span_shift(level)), m->dir->n_bits);
    uintptr_t dv = atomic_load(ds);
    if (dv & SLOT_ONES)
        return 0;
    if (all_to_convert(m, base, end))
        return merge_ones(m, level, ds);
    if (!level)
        return convert_page(m, base, ds);
    if (!dv)
        return merge_new_table(m, level, base, ds, NULL);
    return convert_slots(m, level - 1, base, slot_table(dv)->slot, TABLE_SLOTS);
}

static int convert_slots(struct merge *m, unsigned level, uint64_t base, bitmap_slot *ds,
                         unsigned n)
{
    unsigned shift = bitmap_span_shift(level);
    uint64_t end = MIN(base + ((uint64_t)n << shift), m->dir->n_bits), at = base;
    int result = 0;
    while (at < end && (at = next_to_convert(m, at, end)) < end) {
        uint64_t i = (at - base) >> shift;
        pace_add(m->pace, 1);
        int r = convert_slot(m, level, base + (i << shift), &ds[i]);
        if (r < 0 && m->undo)
            return r; /* as in merge_slots */
        result = r < 0 ? r : result;
        at = base + ((i + 1) << shift);
    }
    return result;
}

/* ---- the two kinds ---- */

static int merge_dirs(struct bitmap *dst, struct bitmap *src, struct bitmap_undo *undo,
                      struct bitmap_pace *pace)
{
    assert(dst->size == src->size);
    if (dst == src)
        return 0;
    struct dir *d = atomic_load(&dst->dir), *s = atomic_load(&src->dir);
    struct merge m = {.dir = d, .undo = undo, .pace = pace};
    int r;
    if (dst->shift == src->shift) {
        r = merge_slots(&m, d->top, 0, d->root, s->root, d->n_root);
    } else {
        m.other = s;
        m.other_shift = src->shift;
        m.shift = dst->shift;
        r = convert_slots(&m, d->top, 0, d->root, d->n_root);
    }
    page_put(m.spare);
    return r;
}

int bitmap_merge(struct bitmap *dst, struct bitmap *src, struct bitmap_pace *pace)
{
    return merge_dirs(dst, src, NULL, pace);
}

int bitmap_merge_undoable(struct bitmap *dst, struct bitmap *src, struct bitmap_undo *u)
{
    assert(!u->unwound);
    return merge_dirs(dst, src, u, u->pace);
}
