/* SPDX-License-Identifier: Apache-2.0 */
/* What is done with whole bitmaps, on the control loop, while nobody can mark or clean them: swap,
 * merge, clone, another granularity or size.
 *
 * This is the only place where pages become SHARED, in the slots of both sides at once, and where
 * reference counts grow. Only equal shapes (size and granularity) share pages; others copy. Two
 * trees are walked side by side, and what is empty in the source costs one look, so the work is in
 * proportion to the pages that are there. Recursion is one call for each level: four at most.
 *
 * Counts are exact here, so a page whose count says that it is full becomes SLOT_ONES on the way.
 */
#include "bitmap/pages.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

#include "base/mem.h"
#include "bitmap/kernels.h"

void bitmap_swap(struct bitmap *a, struct bitmap *b)
{
    assert(a->size == b->size && a->shift == b->shift);
    struct dir *d = atomic_load(&a->dir);
    atomic_store(&a->dir, atomic_load(&b->dir));
    atomic_store(&b->dir, d);
}

/* All of the slot set. The subtree goes at once: nobody reads it. */
static void slot_fill(bitmap_slot *s, unsigned level)
{
    uintptr_t v = atomic_load(s);
    atomic_store(s, SLOT_ONES);
    if (v)
        dir_free_subtree(level, v);
}

int bitmap_set_all(struct bitmap *b)
{
    struct dir *d = atomic_load(&b->dir);
    for (unsigned i = 0; i < d->n_root; i++)
        slot_fill(&d->root[i], d->top);
    return 0;
}

static unsigned valid_bits(const struct dir *d, uint64_t base)
{
    return (unsigned)MIN(PAGE_BITS, d->n_bits - base);
}

static bool page_is_full(const struct dir *d, uint64_t base, const struct page *pg)
{
    return atomic_load_explicit(&pg->n_set, memory_order_relaxed) == (int)valid_bits(d, base);
}

/* `to` refers to the page that `from` has, and neither may write to it from now on. */
static void slot_share(bitmap_slot *from, bitmap_slot *to)
{
    uintptr_t v = atomic_load(from);
    page_get(slot_page(v));
    atomic_store(from, v | SLOT_SHARED);
    atomic_store(to, v | SLOT_SHARED);
}

/* ---- merge, equal shapes ---- */

static bool same_words(const struct page *a, const struct page *b)
{
    return atomic_load_explicit(&a->n_set, memory_order_relaxed) ==
               atomic_load_explicit(&b->n_set, memory_order_relaxed) &&
           !memcmp(a->word, b->word, sizeof a->word);
}

/* The target's page is SHARED, so it is replaced: by itself, if there was nothing new, by the
 * source's, if that has it all, or else by a new one. */
static int merge_shared_page(struct dir *d, uint64_t base, bitmap_slot *ds, bitmap_slot *ss)
{
    struct page *dst = slot_page(atomic_load(ds)), *src = slot_page(atomic_load(ss));
    struct page *both = page_new_or(dst, src);
    if (!both) {
        slot_fill(ds, 0);
        return -ENOMEM;
    }
    if (page_is_full(d, base, both)) {
        slot_fill(ds, 0);
        mem_free(both);
    } else if (same_words(both, dst)) {
        mem_free(both);
    } else if (same_words(both, src)) {
        slot_share(ss, ds);
        page_put(dst);
        mem_free(both);
    } else {
        atomic_store(ds, (uintptr_t)both);
        page_put(dst);
    }
    return 0;
}

static int merge_page(struct dir *d, uint64_t base, bitmap_slot *ds, bitmap_slot *ss)
{
    uintptr_t dv = atomic_load(ds), sv = atomic_load(ss);
    struct page *dst = slot_page(dv), *src = slot_page(sv);
    if (dst == src)
        return 0;
    if (page_is_full(d, base, src)) {
        slot_fill(ds, 0);
    } else if (!dst) {
        slot_share(ss, ds);
    } else if (dv & SLOT_SHARED) {
        return merge_shared_page(d, base, ds, ss);
    } else {
        uint64_t n = bitmap_kernels()->or_count(dst->word, dst->word, src->word, PAGE_WORDS);
        atomic_store_explicit(&dst->n_set, (int)n, memory_order_relaxed);
        if (page_is_full(d, base, dst))
            slot_fill(ds, 0);
    }
    return 0;
}

static int merge_slots(struct dir *d, unsigned level, uint64_t base, bitmap_slot *ds,
                       bitmap_slot *ss, unsigned n)
{
    int result = 0;
    for (unsigned i = 0; i < n; i++, base += (uint64_t)1 << bitmap_span_shift(level)) {
        uintptr_t sv = atomic_load(&ss[i]), dv = atomic_load(&ds[i]);
        int r = 0;
        if (!sv || dv & SLOT_ONES)
            continue;
        if (sv & SLOT_ONES) {
            slot_fill(&ds[i], level);
        } else if (!level) {
            r = merge_page(d, base, &ds[i], &ss[i]);
        } else {
            if (!dv) {
                dv = (uintptr_t)table_new(0);
                atomic_store(&ds[i], dv ? dv : SLOT_ONES);
            }
            r = dv ? merge_slots(d, level - 1, base, slot_table(dv)->slot, slot_table(sv)->slot,
                                 TABLE_SLOTS)
                   : -ENOMEM;
        }
        result =
            r < 0 ? r : result; /* what could not be copied is all set: go on, nothing is lost */
    }
    return result;
}

/* ---- unequal shapes ---- */

/* dst |= src, run by run, rounded outward, cut at the end of dst. */
static int copy_runs(struct dir *dst, unsigned dst_shift, const struct dir *src, unsigned src_shift,
                     struct bitmap_retired *r)
{
    struct change c = {.retired = r};
    uint64_t bit = 0, stop;
    while ((bit = dir_next(src, bit, src->n_bits, true)) < src->n_bits) {
        stop = dir_next(src, bit, src->n_bits, false);
        uint64_t from = bit << src_shift >> dst_shift;
        uint64_t to = bitmap_bits(stop << src_shift, dst_shift);
        if (from >= dst->n_bits)
            break;
        dir_mark(dst, from, MIN(to, dst->n_bits), &c);
        bit = MAX(stop, to << dst_shift >> src_shift); /* what falls into the same block is done */
    }
    return c.starved ? -ENOMEM : 0;
}

/* dst, which is new and empty, becomes src as far as both reach. */
static int copy_pages(struct dir *dst, const struct dir *src)
{
    struct bitmap_retired none = {0};
    struct change c = {.retired = &none};
    uint64_t end = MIN(src->n_bits, dst->n_bits);
    struct place p;
    int r = 0;
    for (uint64_t bit = 0; !r && bitmap_find_other(src, bit, end, 0, &p); bit = p.end) {
        if (p.v & SLOT_ONES) {
            dir_mark(dst, p.base, MIN(p.end, end), &c);
            continue;
        }
        struct page *pg = page_new_copy(slot_page(p.v));
        if (pg && end - p.base < PAGE_BITS)
            page_clear(pg, (unsigned)(end - p.base), PAGE_BITS);
        r = pg ? dir_adopt(dst, p.base, pg) : -ENOMEM;
    }
    assert(!none.head);
    return c.starved ? -ENOMEM : r;
}

int bitmap_merge(struct bitmap *dst, struct bitmap *src)
{
    assert(dst->size == src->size);
    if (dst == src)
        return 0;
    struct dir *d = atomic_load(&dst->dir), *s = atomic_load(&src->dir);
    if (dst->shift == src->shift)
        return merge_slots(d, d->top, 0, d->root, s->root, d->n_root);
    struct bitmap_retired replaced = {0};
    int r = copy_runs(d, dst->shift, s, src->shift, &replaced);
    bitmap_retired_free(&replaced); /* at once: nobody reads dst */
    return r;
}

/* ---- new bitmaps out of old ones ---- */

static int clone_slots(const struct dir *d, unsigned level, uint64_t base, bitmap_slot *from,
                       bitmap_slot *to, unsigned n)
{
    for (unsigned i = 0; i < n; i++, base += (uint64_t)1 << bitmap_span_shift(level)) {
        uintptr_t v = atomic_load(&from[i]);
        if (!v)
            continue;
        if (v & SLOT_ONES || (!level && page_is_full(d, base, slot_page(v)))) {
            atomic_store(&to[i], SLOT_ONES);
        } else if (!level) {
            slot_share(&from[i], &to[i]);
        } else {
            struct table *t = table_new(0);
            if (!t)
                return -ENOMEM;
            atomic_store(&to[i], (uintptr_t)t);
            int r = clone_slots(d, level - 1, base, slot_table(v)->slot, t->slot, TABLE_SLOTS);
            if (r < 0)
                return r;
        }
    }
    return 0;
}

/* The end of all constructors: what is half built goes. */
static int finish(int r, struct bitmap *made, struct bitmap **out)
{
    if (r < 0)
        bitmap_free(made);
    else
        *out = made;
    return r;
}

int bitmap_clone(struct bitmap *b, struct bitmap **out)
{
    struct bitmap *c;
    int r = bitmap_new(b->size, b->shift, &c);
    if (r < 0)
        return r;
    struct dir *from = atomic_load(&b->dir), *to = atomic_load(&c->dir);
    r = clone_slots(from, from->top, 0, from->root, to->root, from->n_root);
    return finish(r, c, out);
}

int bitmap_convert(struct bitmap *b, unsigned shift, struct bitmap **out)
{
    if (shift == b->shift)
        return bitmap_clone(b, out);
    struct bitmap *c;
    int r = bitmap_new(b->size, shift, &c);
    if (r < 0)
        return r;
    struct bitmap_retired none = {0};
    r = copy_runs(atomic_load(&c->dir), shift, atomic_load(&b->dir), b->shift, &none);
    bitmap_retired_free(&none); /* a page that became full run by run */
    return finish(r, c, out);
}

int bitmap_resized(struct bitmap *b, uint64_t size, struct bitmap **out)
{
    if (size == b->size)
        return bitmap_clone(b, out);
    struct bitmap *c;
    int r = bitmap_new(size, b->shift, &c);
    if (r < 0)
        return r;
    r = copy_pages(atomic_load(&c->dir), atomic_load(&b->dir));
    return finish(r, c, out);
}
