/* SPDX-License-Identifier: Apache-2.0 */
/* Marking and cleaning without locks, and what directories are made of (pages.h has a picture).
 *
 * The protocol, in which each line closes a hole:
 * - Whether a page may be written is said by the SHARED tag of the slot it was reached through,
 * never by the page's reference count. Were it the count, a marker could copy a page of two owners,
 * the other owner drop it, a second marker write into the page of now one owner, and the first
 * publish its older copy: the second mark would be lost.
 * - A tag is set while all who mark or clean are quiesced (bitmap_whole.c). They remove it in one
 * way only: publish another value for the slot by compare-and-swap. Who loses looks again.
 * - A replaced page may be in use by a reader on another thread. It goes on the caller's retired
 * list by a note of its own (the same page may be retired by several directories at once, so it
 * cannot carry the link itself) and loses its reference on the control loop a grace round later.
 * - An untagged page may also be replaced as a whole, by ones or by nothing, when the range covers
 * it. A late fetch_or or fetch_and into the page that is gone is as if it had come just before.
 * - Marking cannot fail. Without memory a slot becomes SLOT_ONES, which needs none: more is marked
 *   than was asked for. Cleaning then fails and leaves bits set.
 * - All accesses to slots and words that decide something are sequentially consistent: writers mark
 *   here and then look at another bitmap, while the journal does the reverse. */
#include "bitmap/pages.h"

#include <assert.h>
#include <errno.h>
#include <limits.h>
#include <string.h>

#include "base/log.h"
#include "base/mem.h"
#include "bitmap/kernels.h"

/* ---- pages ---- */

struct page *page_new(void)
{
    struct page *pg = mem_aligned(alignof(struct page), sizeof *pg);
    if (pg)
        page_init(pg, false);
    return pg;
}

struct page *page_new_zero(void)
{
    struct page *pg = page_new();
    if (pg)
        memset(pg->word, 0, sizeof pg->word);
    return pg;
}

struct page *page_new_ones(unsigned n_bits)
{
    struct page *pg = page_new_zero();
    if (!pg)
        return NULL;
    for (unsigned i = 0; i * 64 < n_bits; i++)
        pg->word[i] = word_mask(i, 0, n_bits);
    atomic_init(&pg->n_set, (int)n_bits);
    return pg;
}

struct page *page_new_copy(const struct page *from)
{
    struct page *pg = page_new();
    if (pg)
        atomic_init(&pg->n_set,
                    (int)bitmap_kernels()->copy_count(pg->word, from->word, PAGE_WORDS));
    return pg;
}

unsigned page_or(struct page *to, const struct page *a, const struct page *b)
{
    const struct bitmap_kernels *k = bitmap_kernels();
    uint64_t n = to == a || to == b ? k->or_count(to->word, a->word, b->word, PAGE_WORDS)
                                    : k->or_count_new(to->word, a->word, b->word, PAGE_WORDS);
    atomic_store_explicit(&to->n_set, (int)n, memory_order_relaxed);
    return (unsigned)n;
}

void page_get(struct page *pg)
{
    atomic_fetch_add_explicit(&pg->n_refs, 1, memory_order_relaxed);
}

void page_put(struct page *pg)
{
    if (!pg || atomic_fetch_sub(&pg->n_refs, 1) != 1)
        return;
    if (pg->pooled)
        pool_put(pg);
    else
        mem_free(pg);
}

unsigned page_set(struct page *pg, unsigned from, unsigned to)
{
    unsigned n = 0;
    for (unsigned i = from / 64; i * 64 < to; i++) {
        uint64_t m = word_mask(i, from, to);
        uint64_t old = word_load(&pg->word[i]);
        if ((old & m) == m) /* the usual case, and it leaves the cache line shared */
            continue;
        old = __atomic_fetch_or(&pg->word[i], m, __ATOMIC_SEQ_CST);
        n += (unsigned)__builtin_popcountll(m & ~old);
    }
    if (n)
        atomic_fetch_add_explicit(&pg->n_set, (int)n, memory_order_relaxed);
    return n;
}

unsigned page_clear(struct page *pg, unsigned from, unsigned to)
{
    unsigned n = 0;
    for (unsigned i = from / 64; i * 64 < to; i++) {
        uint64_t m = word_mask(i, from, to);
        uint64_t old = word_load(&pg->word[i]);
        if (!(old & m))
            continue;
        old = __atomic_fetch_and(&pg->word[i], ~m, __ATOMIC_SEQ_CST);
        n += (unsigned)__builtin_popcountll(m & old);
    }
    if (n)
        atomic_fetch_sub_explicit(&pg->n_set, (int)n, memory_order_relaxed);
    return n;
}

/* Are all bits of [from, to) of the page equal to `set`? */
static bool page_all(const struct page *pg, unsigned from, unsigned to, bool set)
{
    for (unsigned i = from / 64; i * 64 < to; i++) {
        uint64_t w = word_load(&pg->word[i]);
        if ((set ? ~w : w) & word_mask(i, from, to))
            return false;
    }
    return true;
}

/* ---- directories ---- */

struct table *table_new(uintptr_t fill)
{
    struct table *t = mem_zalloc(sizeof *t);
    if (t && fill)
        for (unsigned i = 0; i < TABLE_SLOTS; i++)
            atomic_init(&t->slot[i], fill);
    return t;
}

struct dir *dir_new(uint64_t n_bits)
{
    unsigned top = 0;
    while (n_bits > (uint64_t)TABLE_SLOTS << bitmap_span_shift(top))
        top++;
    uint64_t span = (uint64_t)1 << bitmap_span_shift(top);
    unsigned n_root = (unsigned)((n_bits + span - 1) / span);
    struct dir *d = mem_zalloc(sizeof *d + n_root * sizeof d->root[0]);
    if (!d)
        return NULL;
    d->n_bits = n_bits;
    d->top = top;
    d->n_root = n_root;
    return d;
}

bool budget_take(unsigned *budget)
{
    if (!*budget)
        return false;
    --*budget;
    return true;
}

/* Recursion: at most one call for each level, of which there are four. */
bool slot_free_some(bitmap_slot *s, unsigned level, unsigned *budget)
{
    uintptr_t v = atomic_load_explicit(s, memory_order_relaxed);
    if (slot_is_table(level, v)) {
        struct table *t = slot_table(v);
        for (unsigned i = 0; i < TABLE_SLOTS; i++)
            if (!slot_free_some(&t->slot[i], level - 1, budget))
                return false;
        if (!budget_take(budget))
            return false;
        mem_free(t);
    } else if (slot_page(v)) {
        if (!budget_take(budget))
            return false;
        page_put(slot_page(v));
    }
    atomic_store_explicit(s, 0, memory_order_relaxed);
    return true;
}

void dir_free_subtree(unsigned level, uintptr_t v)
{
    bitmap_slot s;
    unsigned all = UINT_MAX;
    atomic_init(&s, v);
    slot_free_some(&s, level, &all);
}

uint64_t bitmap_bits(uint64_t size, unsigned shift)
{
    return (size >> shift) + !!(size & (((uint64_t)1 << shift) - 1));
}

unsigned bitmap_min_shift(uint64_t size)
{
    unsigned shift = BITMAP_SHIFT_MIN;
    while (bitmap_bits(size, shift) > BITMAP_BITS_MAX)
        shift++;
    return shift;
}

int bitmap_new(uint64_t size, unsigned shift, struct bitmap **out)
{
    if (shift < BITMAP_SHIFT_MIN || shift > BITMAP_SHIFT_MAX || size > INT64_MAX)
        return -EINVAL;
    if (bitmap_bits(size, shift) > BITMAP_BITS_MAX)
        return -E2BIG;
    struct bitmap *b = mem_zalloc(sizeof *b);
    struct dir *d = dir_new(bitmap_bits(size, shift));
    if (!b || !d) {
        mem_free(b);
        mem_free(d);
        return -ENOMEM;
    }
    b->size = size;
    b->shift = shift;
    atomic_init(&b->dir, d);
    *out = b;
    return 0;
}

bool bitmap_free_some(struct bitmap *b, unsigned *budget)
{
    struct dir *d = atomic_load(&b->dir);
    for (unsigned i = 0; i < d->n_root; i++)
        if (!slot_free_some(&d->root[i], d->top, budget))
            return false;
    if (!budget_take(budget))
        return false;
    mem_free(d);
    mem_free(b);
    return true;
}

void bitmap_free(struct bitmap *b)
{
    unsigned all = UINT_MAX;
    if (b)
        bitmap_free_some(b, &all);
}

uint64_t bitmap_size(const struct bitmap *b)
{
    return b->size;
}

unsigned bitmap_shift(const struct bitmap *b)
{
    return b->shift;
}

/* ---- retired pages ---- */

struct retired_note {
    struct retired_note *next;
    struct page *page;
};

void bitmap_retired_move(struct bitmap_retired *to, struct bitmap_retired *from)
{
    struct retired_note *n = from->head, *last = n;
    if (!n)
        return;
    while (last->next)
        last = last->next;
    last->next = to->head;
    to->head = n;
    to->n += from->n;
    *from = (struct bitmap_retired){0};
}

void bitmap_retired_free(struct bitmap_retired *r)
{
    struct retired_note *n = r->head;
    while (n) {
        struct retired_note *next = n->next;
        page_put(n->page);
        mem_free(n);
        n = next;
    }
    *r = (struct bitmap_retired){0};
}

/* ---- changing a slot ---- */

enum outcome {
    DONE,
    AGAIN,     /* somebody else changed the slot, or it leads further down now: find it again */
    NO_MEMORY, /* nothing has changed */
};

/* Put `v` where p was found, and retire the page that was there. */
static enum outcome place_replace(const struct place *p, uintptr_t v, struct change *c)
{
    struct page *old = slot_page(p->v);
    struct retired_note *note = NULL;
    if (old) {
        note = mem_alloc(sizeof *note);
        if (!note)
            return NO_MEMORY;
    }
    uintptr_t expected = p->v;
    if (!atomic_compare_exchange_strong(p->slot, &expected, v)) {
        mem_free(note);
        return AGAIN;
    }
    if (old) {
        *note = (struct retired_note){c->retired->head, old};
        c->retired->head = note;
        c->retired->n++;
    }
    return DONE;
}

/* The same with a page that is not published yet: it is freed if that does not come about. */
static enum outcome place_replace_page(const struct place *p, struct page *pg, struct change *c)
{
    enum outcome o = place_replace(p, (uintptr_t)pg, c);
    if (o != DONE)
        mem_free(pg);
    return o;
}

/* A table in the place of a slot above the pages that is empty or all ones. */
static enum outcome place_expand(const struct place *p)
{
    struct table *t = table_new(p->v);
    if (!t)
        return NO_MEMORY;
    uintptr_t expected = p->v;
    if (!atomic_compare_exchange_strong(p->slot, &expected, (uintptr_t)t))
        mem_free(t);
    return AGAIN;
}

int dir_adopt(struct dir *d, uint64_t base, struct page *pg)
{
    struct place p;
    enum outcome o = atomic_load(&pg->n_set) ? AGAIN : DONE;
    while (o == AGAIN) {
        bitmap_find(d, base, &p);
        assert(!p.v);
        if (!p.level) {
            atomic_store(p.slot, (uintptr_t)pg);
            return 0;
        }
        o = place_expand(&p);
    }
    mem_free(pg);
    return o == NO_MEMORY ? -ENOMEM : 0;
}

/* Without memory: all ones, and a page that was there stays with the slot. p is not a page of which
 * this slot is the owner. */
static enum outcome place_overmark(const struct place *p)
{
    uintptr_t expected = p->v;
    return atomic_compare_exchange_strong(p->slot, &expected, p->v | SLOT_ONES) ? DONE : AGAIN;
}

/* ---- marking ---- */

static enum outcome mark_subtree(const struct place *p, bool whole, struct change *c)
{
    if (!whole) {
        enum outcome o = place_expand(p);
        if (o != NO_MEMORY)
            return o;
        c->starved = true;
    }
    enum outcome o = place_overmark(p);
    c->turned |= o == DONE;
    return o;
}

static enum outcome mark_own_page(const struct place *p, unsigned from, unsigned to, bool whole,
                                  struct change *c)
{
    struct page *pg = slot_page(p->v);
    if (whole && !page_all(pg, from, to, true)) {
        enum outcome o = place_replace(p, SLOT_ONES, c);
        c->turned |= o == DONE;
        if (o != NO_MEMORY)
            return o;
    }
    c->turned |= page_set(pg, from, to) > 0;
    return DONE;
}

/* The page is SHARED, or there is none. */
static enum outcome mark_new_page(const struct place *p, unsigned from, unsigned to, bool whole,
                                  struct change *c)
{
    struct page *old = slot_page(p->v);
    if (old && page_all(old, from, to, true))
        return DONE;
    enum outcome o = NO_MEMORY;
    if (whole) {
        o = place_replace(p, SLOT_ONES, c);
    } else {
        struct page *pg = old ? page_new_copy(old) : page_new_zero();
        if (pg) {
            page_set(pg, from, to);
            o = place_replace_page(p, pg, c);
        }
    }
    if (o == NO_MEMORY) {
        c->starved |= !whole;
        o = place_overmark(p);
    }
    c->turned |= o == DONE;
    return o;
}

static enum outcome mark_place(const struct place *p, uint64_t from, uint64_t to, struct change *c)
{
    bool whole = from == p->base && to == p->end;
    if (p->v & SLOT_ONES)
        return DONE;
    if (p->level)
        return mark_subtree(p, whole, c);
    unsigned f = (unsigned)(from - p->base), t = (unsigned)(to - p->base);
    if (p->v && !(p->v & SLOT_SHARED))
        return mark_own_page(p, f, t, whole, c);
    return mark_new_page(p, f, t, whole, c);
}

void dir_mark(struct dir *d, uint64_t from, uint64_t to, struct change *c)
{
    while (from < to) {
        struct place p;
        bitmap_find(d, from, &p);
        uint64_t end = MIN(to, p.end);
        if (mark_place(&p, from, end, c) == DONE)
            from = end;
    }
}

bool bitmap_mark(struct bitmap *b, uint64_t off, uint64_t len, struct bitmap_retired *r)
{
    if (!len || off >= b->size)
        return false;
    uint64_t last = len - 1 < b->size - 1 - off ? off + len - 1 : b->size - 1;
    struct change c = {.retired = r};
    struct dir *d = atomic_load(&b->dir);
    dir_mark(d, off >> b->shift, (last >> b->shift) + 1, &c);
    if (c.starved && !atomic_exchange(&d->warned, true))
        log_warn("bitmap", "out of memory: more is marked as dirty than was written");
    return c.turned;
}

/* ---- cleaning ---- */

static enum outcome clear_subtree(const struct place *p, bool whole, struct change *c)
{
    if (!whole)
        return place_expand(p);
    enum outcome o = place_replace(p, 0, c);
    c->turned |= o == DONE;
    return o;
}

static enum outcome clear_own_page(const struct place *p, unsigned from, unsigned to, bool whole,
                                   struct change *c)
{
    if (whole) {
        enum outcome o = place_replace(p, 0, c);
        if (o != NO_MEMORY)
            return o;
    }
    c->turned |= page_clear(slot_page(p->v), from, to) > 0;
    return DONE;
}

/* The page is SHARED, or the slot is all ones. */
static enum outcome clear_new_page(const struct place *p, unsigned from, unsigned to, bool whole,
                                   struct change *c)
{
    struct page *old = p->v & SLOT_ONES ? NULL : slot_page(p->v), *pg = NULL;
    if (old && page_all(old, from, to, false))
        return DONE;
    if (!whole) {
        pg = old ? page_new_copy(old) : page_new_ones((unsigned)(p->end - p->base));
        if (!pg)
            return NO_MEMORY;
        page_clear(pg, from, to);
    }
    enum outcome o = place_replace_page(p, pg, c);
    c->turned |= o == DONE;
    return o;
}

/* `whole` says that all of the place may go at once; else it is done bit by bit, and c->turned
 * tells exactly whether *this* caller has cleared something. */
static enum outcome clear_place(const struct place *p, uint64_t from, uint64_t to, bool whole,
                                struct change *c)
{
    if (!p->v)
        return DONE;
    if (p->level)
        return clear_subtree(p, whole, c);
    unsigned f = (unsigned)(from - p->base), t = (unsigned)(to - p->base);
    if (p->v & (SLOT_SHARED | SLOT_ONES))
        return clear_new_page(p, f, t, whole, c);
    return clear_own_page(p, f, t, whole, c);
}

int bitmap_unmark(struct bitmap *b, uint64_t off, uint64_t len, struct bitmap_retired *r)
{
    struct dir *d = atomic_load(&b->dir);
    if (!len || off >= b->size)
        return 0;
    uint64_t from = bitmap_bits(off, b->shift);
    uint64_t to = len < b->size - off ? (off + len) >> b->shift : d->n_bits;
    struct change c = {.retired = r};
    while (from < to) {
        struct place p;
        bitmap_find(d, from, &p);
        uint64_t end = MIN(to, p.end);
        enum outcome o = clear_place(&p, from, end, from == p.base && end == p.end, &c);
        c.starved |= o == NO_MEMORY;
        if (o != AGAIN)
            from = end;
    }
    return c.starved ? -ENOMEM : 0;
}

int bitmap_take(struct bitmap *b, uint64_t off, struct bitmap_retired *r)
{
    if (off >= b->size)
        return 0;
    uint64_t bit = off >> b->shift;
    struct dir *d = atomic_load(&b->dir);
    struct change c = {.retired = r};
    enum outcome o;
    do {
        struct place p;
        bitmap_find(d, bit, &p);
        /* Never "whole", even if the page has one bit only: two takers could both be told. */
        o = clear_place(&p, bit, bit + 1, false, &c);
    } while (o == AGAIN);
    return o == NO_MEMORY ? -ENOMEM : c.turned;
}
