/* SPDX-License-Identifier: Apache-2.0 */
/* Reading a bitmap: test, runs, counts, bytes.
 *
 * Any thread may do this while others mark. A slot is read once and its page stays alive until the
 * reader's loop has passed the top of its turn. Nothing is decided by a page's n_set: it is added
 * after the bit is set, and a second marker that finds the bit set may have returned by then. */
#include "bitmap/pages.h"

#include <endian.h>
#include <string.h>

#include "bitmap/kernels.h"

bool bitmap_find_other(const struct dir *d, uint64_t bit, uint64_t end, uintptr_t skip,
                       struct place *p)
{
    while (bit < end) {
        bitmap_find(d, bit, p);
        if (p->v != skip)
            return true;
        /* Neighbours in the same table need no way down from the root. */
        unsigned shift = bitmap_span_shift(p->level);
        unsigned i = (unsigned)(bit >> shift) % TABLE_SLOTS;
        unsigned n = p->level == d->top ? d->n_root : TABLE_SLOTS;
        const bitmap_slot *s = p->slot;
        bit = p->base;
        do {
            bit += (uint64_t)1 << shift;
            i++;
            s++;
        } while (i < n && bit < end && atomic_load(s) == skip);
    }
    return false;
}

bool bitmap_test(const struct bitmap *b, uint64_t off)
{
    if (off >= b->size)
        return false;
    struct place p;
    uint64_t bit = off >> b->shift;
    bitmap_find(atomic_load(&b->dir), bit, &p);
    if (!p.v || p.v & SLOT_ONES)
        return p.v != 0;
    unsigned i = (unsigned)(bit - p.base);
    return word_load(&slot_page(p.v)->word[i / 64]) >> i % 64 & 1;
}

/* The first bit of [from, to) of the page that is set (or clear), or something >= to. */
static unsigned page_next(const struct page *pg, bool shared, unsigned from, unsigned to, bool set)
{
    uint64_t keep = ~(uint64_t)0 << from % 64;
    for (unsigned i = from / 64; i * 64 < to; i++) {
        uint64_t w = word_load(&pg->word[i]);
        w = (set ? w : ~w) & keep;
        if (w)
            return i * 64 + (unsigned)__builtin_ctzll(w);
        keep = ~(uint64_t)0;
        if (shared && set) /* nobody writes to it: wide loads */
            i += (unsigned)bitmap_kernels()->first_set(pg->word + i + 1, PAGE_WORDS - i - 1);
    }
    return to;
}

uint64_t dir_next(const struct dir *d, uint64_t from, uint64_t to, bool set)
{
    struct place p;
    while (bitmap_find_other(d, from, to, set ? 0 : SLOT_ONES, &p)) {
        from = MAX(from, p.base);
        if (!p.v || p.v & SLOT_ONES) {
            if (set == (p.v != 0))
                return from;
            from = p.end; /* a full slot that still has a page is not skipped above */
            continue;
        }
        uint64_t end = MIN(to, p.end);
        uint64_t found =
            p.base + page_next(slot_page(p.v), p.v & SLOT_SHARED, (unsigned)(from - p.base),
                               (unsigned)(end - p.base), set);
        if (found < end)
            return found;
        from = end;
    }
    return to;
}

bool bitmap_next_dirty(const struct bitmap *b, uint64_t off, uint64_t end, uint64_t *run_off,
                       uint64_t *run_len)
{
    end = MIN(end, b->size);
    if (off >= end)
        return false;
    const struct dir *d = atomic_load(&b->dir);
    uint64_t from = off >> b->shift, to = bitmap_bits(end, b->shift), stop;
    do {
        from = dir_next(d, from, to, true);
        if (from >= to)
            return false;
        stop = dir_next(d, from, to, false);
    } while (stop == from); /* cleaned between the two looks */
    *run_off = MAX(off, from << b->shift);
    *run_len = MIN(end, stop << b->shift) - *run_off;
    return true;
}

uint64_t bitmap_next_clean(const struct bitmap *b, uint64_t off, uint64_t end)
{
    end = MIN(end, b->size);
    if (off >= end)
        return end;
    uint64_t to = bitmap_bits(end, b->shift);
    uint64_t bit = dir_next(atomic_load(&b->dir), off >> b->shift, to, false);
    return MIN(end, MAX(off, bit << b->shift));
}

uint64_t bitmap_count(const struct bitmap *b)
{
    return bitmap_count_at(b, NULL);
}

uint64_t bitmap_count_at(const struct bitmap *b, struct bitmap_pace *pace)
{
    const struct dir *d = atomic_load(&b->dir);
    uint64_t sum = 0;
    struct place p;
    for (uint64_t bit = 0; bitmap_find_other(d, bit, d->n_bits, 0, &p); bit = p.end) {
        pace_add(pace, 1);
        if (p.v & SLOT_ONES) {
            sum += p.end - p.base;
        } else {
            int n = atomic_load_explicit(&slot_page(p.v)->n_set, memory_order_relaxed);
            sum += n > 0 ? (unsigned)n : 0; /* a cleaner may be ahead of the marker */
        }
    }
    return sum;
}

bool bitmap_empty(const struct bitmap *b)
{
    const struct dir *d = atomic_load(&b->dir);
    return dir_next(d, 0, d->n_bits, true) == d->n_bits;
}

static size_t subtree_memory(unsigned level, uintptr_t v)
{
    if (!slot_is_table(level, v))
        return slot_page(v) ? sizeof(struct page) : 0;
    size_t sum = sizeof(struct table);
    for (unsigned i = 0; i < TABLE_SLOTS; i++)
        sum += subtree_memory(level - 1, atomic_load(&slot_table(v)->slot[i]));
    return sum;
}

size_t bitmap_memory(const struct bitmap *b)
{
    const struct dir *d = atomic_load(&b->dir);
    size_t sum = sizeof *b + sizeof *d + d->n_root * sizeof d->root[0];
    for (unsigned i = 0; i < d->n_root; i++)
        sum += subtree_memory(d->top, atomic_load(&d->root[i]));
    return sum;
}

/* ---- bytes ---- */

#define PACK_WORDS 256u /* of the buffer, on the stack; divides PAGE_WORDS */

struct packer {
    void (*sink)(void *arg, const uint8_t *bytes, uint64_t len);
    void *arg;
    uint64_t n_zero; /* bytes that are due */
};

static void pack_zeroes_end(struct packer *k)
{
    if (k->n_zero)
        k->sink(k->arg, NULL, k->n_zero);
    k->n_zero = 0;
}

/* The words of one page, or of any number of ones (pg NULL), that hold `n_bits` bits. */
static void pack_words(struct packer *k, const struct page *pg, uint64_t n_bits)
{
    uint64_t buf[PACK_WORDS];
    for (uint64_t done = 0; done < n_bits; done += PACK_WORDS * 64) {
        unsigned bits = (unsigned)MIN(n_bits - done, PACK_WORDS * 64), n = (bits + 63) / 64;
        uint64_t any = 0;
        for (unsigned i = 0; i < n; i++) {
            uint64_t w = pg ? word_load(&pg->word[done / 64 + i]) : word_mask(i, 0, bits);
            any |= w;
            buf[i] = htole64(w);
        }
        if (any) {
            pack_zeroes_end(k);
            k->sink(k->arg, (const uint8_t *)buf, n * 8);
        } else {
            k->n_zero += n * 8;
        }
    }
}

void bitmap_pack(const struct bitmap *b,
                 void (*sink)(void *arg, const uint8_t *bytes, uint64_t len), void *arg)
{
    const struct dir *d = atomic_load(&b->dir);
    struct packer k = {sink, arg, 0};
    struct place p;
    uint64_t bit = 0;
    while (bitmap_find_other(d, bit, d->n_bits, 0, &p)) {
        k.n_zero += (p.base - bit) / 8;
        pack_words(&k, p.v & SLOT_ONES ? NULL : slot_page(p.v), p.end - p.base);
        bit = p.end;
    }
    k.n_zero += (d->n_bits - bit + 63) / 64 * 8;
    pack_zeroes_end(&k);
}

struct bitmap **bitmap_link(struct bitmap *b)
{
    return &b->link;
}
