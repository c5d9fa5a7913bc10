/* SPDX-License-Identifier: Apache-2.0 */
/* What is done with whole bitmaps, on the control loop, while nobody can mark or clean them: swap,
 * clone, another size; merging, also into another granularity, is in bitmap_merge.c.
 *
 * Here and there only, pages become SHARED, in the slots of both sides at once, and reference
 * counts grow. Only equal shapes (size and granularity) share pages; others copy. Recursion is one
 * call for each level: four at most.
 *
 * Counts are exact here, so a page whose count says that it is full becomes SLOT_ONES on the way.
 */
#include "bitmap/pages.h"

#include <assert.h>
#include <errno.h>

#include "base/mem.h"

void bitmap_swap(struct bitmap *a, struct bitmap *b)
{
    assert(a->size == b->size && a->shift == b->shift);
    struct dir *d = atomic_load(&a->dir);
    atomic_store(&a->dir, atomic_load(&b->dir));
    atomic_store(&b->dir, d);
}

int bitmap_set_all(struct bitmap *b)
{
    struct dir *d = atomic_load(&b->dir);
    for (unsigned i = 0; i < d->n_root; i++) {
        uintptr_t v = atomic_load(&d->root[i]);
        atomic_store(&d->root[i], SLOT_ONES);
        dir_free_subtree(d->top, v);
    }
    return 0;
}

/* `to` refers to the page that `from` has, and neither may write to it from now on. */
static void slot_share(bitmap_slot *from, bitmap_slot *to)
{
    uintptr_t v = atomic_load(from);
    page_get(slot_page(v));
    atomic_store(from, v | SLOT_SHARED);
    atomic_store(to, v | SLOT_SHARED);
}

/* ---- another size ---- */

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

/* ---- new bitmaps out of old ones ---- */

static int clone_slots(const struct dir *d, unsigned level, uint64_t base, bitmap_slot *from,
                       bitmap_slot *to, unsigned n, struct bitmap_pace *pace)
{
    for (unsigned i = 0; i < n; i++, base += (uint64_t)1 << bitmap_span_shift(level)) {
        uintptr_t v = atomic_load(&from[i]);
        pace_add(pace, 1);
        if (!v)
            continue;
        if (v & SLOT_ONES || (!level && page_count(slot_page(v)) == dir_valid_bits(d, base))) {
            atomic_store(&to[i], SLOT_ONES);
        } else if (!level) {
            slot_share(&from[i], &to[i]);
        } else {
            struct table *t = table_new(0);
            if (!t)
                return -ENOMEM;
            atomic_store(&to[i], (uintptr_t)t);
            int r =
                clone_slots(d, level - 1, base, slot_table(v)->slot, t->slot, TABLE_SLOTS, pace);
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

int bitmap_clone(struct bitmap *b, struct bitmap_pace *pace, struct bitmap **out)
{
    struct bitmap *c;
    int r = bitmap_new(b->size, b->shift, &c);
    if (r < 0)
        return r;
    struct dir *from = atomic_load(&b->dir), *to = atomic_load(&c->dir);
    r = clone_slots(from, from->top, 0, from->root, to->root, from->n_root, pace);
    return finish(r, c, out);
}

int bitmap_convert(struct bitmap *b, unsigned shift, struct bitmap_pace *pace, struct bitmap **out)
{
    if (shift == b->shift)
        return bitmap_clone(b, pace, out);
    struct bitmap *c;
    int r = bitmap_new(b->size, shift, &c);
    return r < 0 ? r : finish(bitmap_merge(c, b, pace), c, out);
}

int bitmap_resized(struct bitmap *b, uint64_t size, struct bitmap **out)
{
    if (size == b->size)
        return bitmap_clone(b, NULL, out);
    struct bitmap *c;
    int r = bitmap_new(size, b->shift, &c);
    if (r < 0)
        return r;
    r = copy_pages(atomic_load(&c->dir), atomic_load(&b->dir));
    return finish(r, c, out);
}
