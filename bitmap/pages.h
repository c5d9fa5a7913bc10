/* SPDX-License-Identifier: Apache-2.0 */
/* Inside of a bitmap, for the files of this folder only: the directory, its slots and its pages.
 *
 * A directory is a tree whose leaves are pages of 32768 bits and whose inner nodes are tables of
 * 512 slots; the root is as long as the disk needs, and there are as many levels as keep it at 512
 * slots or fewer. A slot of level 0 stands for one page of bits, one of level n for 512^n pages:
 *
 *   0                all these bits are clear
 *   SLOT_ONES        all these bits are set, at any level. What the slot covers past the end of the
 *                    disk does not exist: whoever reads cuts at place.end, so the marker needs no
 *                    page and also serves the last page and the last tables, which are partial
 *   table            level > 0. Put in by compare-and-swap, never shared, freed with the directory
 *   page             level 0. Its owner is this slot: bits are set and cleared in place, atomically
 *   page | SHARED    level 0. Slots of several directories own it, nobody writes to it
 *   page | SHARED | SLOT_ONES
 *                    all set; the page is not looked at, its reference is the slot's still (memory
 *                    was so short that not even the note could be made that gives it back) */
#pragma once
#include <stdalign.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/bytes.h"
#include "bitmap/bitmap.h"

#define PAGE_SHIFT 15u
#define PAGE_BITS ((uint64_t)1 << PAGE_SHIFT)
#define PAGE_WORDS (PAGE_BITS / 64)
#define TABLE_SHIFT 9u
#define TABLE_SLOTS (1u << TABLE_SHIFT)

#define SLOT_SHARED ((uintptr_t)1)
#define SLOT_ONES ((uintptr_t)2)

typedef _Atomic(uintptr_t) bitmap_slot;

struct page {
    /* Slots and notes of struct bitmap_retired that own it. Changes on the control loop only. */
    atomic_uint n_refs;
    /* Bits set. Each change of a word is followed by its sum, so it is exact when nobody marks. */
    atomic_int n_set;
    bool pooled; /* part of a slab (pool.c), else a block of its own */
    /* Bits past the end of the disk are 0. Read and written by __atomic operations, except in a
     * page that is SHARED (nobody writes), that is not published yet, or while all are quiesced. */
    alignas(64) uint64_t word[PAGE_WORDS];
};

struct table {
    bitmap_slot slot[TABLE_SLOTS];
};

struct dir {
    uint64_t n_bits;
    unsigned top;       /* level of the root's slots */
    unsigned n_root;    /* 0 for an empty disk */
    atomic_bool warned; /* it was logged that memory was short */
    bitmap_slot root[];
};

struct bitmap {
    uint64_t size;
    unsigned shift;
    struct dir *_Atomic dir;
    struct bitmap *link; /* bitmap_link() */
};

/* One slot as it was found. */
struct place {
    bitmap_slot *slot;
    uintptr_t v; /* what was in it */
    unsigned level;
    uint64_t base, end; /* the bits it stands for, cut at the end of the disk */
};

static inline unsigned bitmap_span_shift(unsigned level)
{
    return PAGE_SHIFT + TABLE_SHIFT * level;
}

static inline bool slot_is_table(unsigned level, uintptr_t v)
{
    return level && v && !(v & SLOT_ONES);
}

static inline struct table *slot_table(uintptr_t v)
{
    return (struct table *)v;
}

/* The page a slot of any level refers to, or NULL; not for a table. */
static inline struct page *slot_page(uintptr_t v)
{
    return (struct page *)(v & ~(SLOT_SHARED | SLOT_ONES));
}

/* The slot that decides about a bit: a page's, or one further up that is empty or all ones. */
static inline void bitmap_find(const struct dir *d, uint64_t bit, struct place *p)
{
    unsigned level = d->top, shift = bitmap_span_shift(level);
    const bitmap_slot *s = &d->root[bit >> shift];
    uintptr_t v = atomic_load(s);
    while (slot_is_table(level, v)) {
        level--;
        shift -= TABLE_SHIFT;
        s = &slot_table(v)->slot[(bit >> shift) % TABLE_SLOTS];
        v = atomic_load(s);
    }
    p->slot = (bitmap_slot *)s;
    p->v = v;
    p->level = level;
    p->base = bit >> shift << shift;
    p->end = MIN(p->base + ((uint64_t)1 << shift), d->n_bits);
}

/* The first place at or after `bit` whose slot is not `skip` (0 or SLOT_ONES), if it begins before
 * `end`. Passes a skipped slot of any level in one step. */
bool bitmap_find_other(const struct dir *d, uint64_t bit, uint64_t end, uintptr_t skip,
                       struct place *p);

static inline uint64_t word_load(const uint64_t *w)
{
    return __atomic_load_n(w, __ATOMIC_SEQ_CST);
}

/* The bits of word i that are in [from, to), positions within the page. */
static inline uint64_t word_mask(unsigned i, unsigned from, unsigned to)
{
    uint64_t m = ~(uint64_t)0;
    if (i == from / 64)
        m <<= from % 64;
    if (i == (to - 1) / 64)
        m &= ~(uint64_t)0 >> (63 - (to - 1) % 64);
    return m;
}

/* New pages, with one reference and not published. NULL: no memory. */
struct page *page_new_zero(void);
struct page *page_new_ones(unsigned n_bits);
struct page *page_new_copy(const struct page *from); /* SHARED, or nobody writes to it */
struct page *page_new(void);                         /* the words hold anything: for page_or */
struct page *pool_get(struct bitmap_pool *p); /* the same from a pool; gone with page_put() */
void pool_put(struct page *pg);               /* for page_put() */
/* to = a | b, either of which may be `to`; nobody writes to any of them. How many bits that is. */
unsigned page_or(struct page *to, const struct page *a, const struct page *b);
/* Set or clear [from, to) of a page; how many bits turned. Any thread, also in pages in use. */
unsigned page_set(struct page *pg, unsigned from, unsigned to);
unsigned page_clear(struct page *pg, unsigned from, unsigned to);
void page_get(struct page *pg);
void page_put(struct page *pg); /* NULL is fine */

static inline void page_init(struct page *pg, bool pooled)
{
    atomic_init(&pg->n_refs, 1);
    atomic_init(&pg->n_set, 0);
    pg->pooled = pooled;
}

/* Exact only while nobody marks or cleans. */
static inline unsigned page_count(const struct page *pg)
{
    return (unsigned)atomic_load_explicit(&pg->n_set, memory_order_relaxed);
}

/* How many bits of the page that begins with bit `base` are on the disk. */
static inline unsigned dir_valid_bits(const struct dir *d, uint64_t base)
{
    return (unsigned)MIN(PAGE_BITS, d->n_bits - base);
}

/* `fill` is what all slots hold: 0 or SLOT_ONES. NULL: no memory. */
struct table *table_new(uintptr_t fill);
struct dir *dir_new(uint64_t n_bits);
/* Give back what hangs on a slot; the slot itself stays as it is. */
void dir_free_subtree(unsigned level, uintptr_t v);
/* The same piece by piece, and the slot is empty then. False: no budget is left; call again. A page
 * or a table takes one. */
bool slot_free_some(bitmap_slot *s, unsigned level, unsigned *budget);
bool budget_take(unsigned *budget); /* one; false: there was none */
/* Hang a page, which is the directory's then, in the empty place that begins with bit `base`;
 * nobody else uses the directory. An empty page is not kept. -ENOMEM: the page is freed. */
int dir_adopt(struct dir *d, uint64_t base, struct page *pg);
uint64_t bitmap_bits(uint64_t size, unsigned shift); /* how many blocks, the last maybe partial */

/* What a marker or cleaner has come to. */
struct change {
    struct bitmap_retired *retired;
    bool turned;  /* at least one bit */
    bool starved; /* memory was short: too much is set, or not all is cleared */
};
void dir_mark(struct dir *d, uint64_t from, uint64_t to, struct change *c); /* bits [from, to) */

/* The words of `to`, which begin with bit `base` and of which `n_valid` are on the disk, become
 * what a source of another granularity says; nobody writes to either. How many bits are set. */
unsigned page_convert(struct page *to, uint64_t base, unsigned n_valid, unsigned shift,
                      const struct dir *src, unsigned src_shift, struct bitmap_pace *pace);

/* Work that was done; one is a slot that was looked at. May yield where `rest` does. */
#define PACE_PAGE 32u /* a page that was read or written, the time between two calls */
static inline void pace_add(struct bitmap_pace *p, unsigned n)
{
    if (!p || (p->done += n) < PACE_PAGE)
        return;
    p->done = 0;
    p->rest(p->arg);
}

/* The first bit in [from, to) that is set (or clear), or `to`. */
uint64_t dir_next(const struct dir *d, uint64_t from, uint64_t to, bool set);
