/* SPDX-License-Identifier: Apache-2.0 */
/* One page of a bitmap out of a source of another granularity, rounded outward.
 *
 * Granularities are powers of two, so a page of one is made of whole pages of the other, or is a
 * part of one. Finer to coarser *folds*: words are halved (a bit is set where either of two was) as
 * often as needed. Coarser to finer *spreads*: each bit is written twice, as often as needed.
 * Either way the last step is as long as all the others together, so a ratio of 2^10 costs hardly
 * more than one of 2. */
#include "bitmap/pages.h"

#include <string.h>

#include "bitmap/kernels.h"

static void words_set(uint64_t *word, unsigned from, unsigned to)
{
    for (unsigned i = from / 64; i * 64 < to; i++)
        word[i] |= word_mask(i, from, to);
}

/* ---- coarser to finer ---- */

/* `n` bits, a power of two below PAGE_BITS, beginning with bit `at` of `from`, become a page. `at`
 * is a multiple of n. */
static void spread(uint64_t *to, const uint64_t *from, unsigned at, unsigned n)
{
    const struct bitmap_kernels *k = bitmap_kernels();
    uint64_t tmp[PAGE_WORDS / 2], few[2] = {0};
    from += at / 64;
    if (n < 64) {
        few[0] = *from >> at % 64 & (((uint64_t)1 << n) - 1);
        for (; n < 64; n *= 2) {
            uint64_t w = few[0];
            k->twice(few, &w, 1);
        }
        from = few;
    }
    /* To and fro, so that the last step ends in `to`. */
    unsigned steps = PAGE_SHIFT - (unsigned)__builtin_ctz(n);
    for (; steps; steps--, n *= 2) {
        uint64_t *next = steps % 2 ? to : tmp;
        k->twice(next, from, n / 64);
        from = next;
    }
}

static void spread_page(uint64_t *to, const struct dir *src, uint64_t first, unsigned shift)
{
    struct place p;
    bitmap_find(src, first, &p);
    unsigned at = (unsigned)(first - p.base);
    bool is_page = p.v && !(p.v & SLOT_ONES);
    const uint64_t *word = is_page ? slot_page(p.v)->word : NULL;
    if (is_page && shift < PAGE_SHIFT)
        spread(to, word, at, (unsigned)(PAGE_BITS >> shift));
    else
        memset(to, (is_page ? word[at / 64] >> at % 64 & 1 : p.v != 0) ? 0xff : 0,
               PAGE_WORDS * sizeof *to);
}

/* ---- finer to coarser ---- */

/* A whole page becomes PAGE_BITS >> shift bits, which begin with bit `at` of `to` and are clear. */
static void fold(uint64_t *to, unsigned at, const uint64_t *from, unsigned shift)
{
    const struct bitmap_kernels *k = bitmap_kernels();
    uint64_t one[PAGE_WORDS / 2], other[PAGE_WORDS / 4], *next = one;
    unsigned n = PAGE_WORDS;
    for (; shift && n > 1; shift--) {
        n /= 2;
        k->halve(next, from, n);
        from = next;
        next = next == one ? other : one;
    }
    uint64_t few[2] = {from[0], 0};
    for (; shift; shift--) {
        uint64_t w;
        k->halve(&w, few, 1);
        few[0] = w;
    }
    to[at / 64] |= few[0] << at % 64;
    memcpy(&to[at / 64] + 1, from + 1, (n - 1) * sizeof *to);
}

/* From source bit `from` on, as many as there are. */
static void fold_pages(uint64_t *to, const struct dir *src, uint64_t from, unsigned shift,
                       struct bitmap_pace *pace)
{
    uint64_t end = MIN(from + (PAGE_BITS << shift), src->n_bits), next;
    struct place p;
    memset(to, 0, PAGE_WORDS * sizeof *to);
    for (uint64_t bit = from; bitmap_find_other(src, bit, end, 0, &p); bit = next) {
        const struct page *pg = slot_page(p.v);
        uint64_t base = MAX(bit, p.base);
        unsigned at = (unsigned)((base - from) >> shift);
        next = MIN(p.end, end);
        pace_add(pace, PACE_PAGE);
        if (p.v & SLOT_ONES) {
            words_set(to, at, (unsigned)((next - 1 - from) >> shift) + 1);
        } else if (!page_count(pg)) {
            continue;
        } else if (shift <= PAGE_SHIFT) {
            fold(to, at, pg->word, shift);
        } else { /* the rest of these bits decides nothing any more */
            words_set(to, at, at + 1);
            next = from + ((uint64_t)(at + 1) << shift);
        }
    }
}

unsigned page_convert(struct page *to, uint64_t base, unsigned n_valid, unsigned shift,
                      const struct dir *src, unsigned src_shift, struct bitmap_pace *pace)
{
    if (shift < src_shift)
        spread_page(to->word, src, base >> (src_shift - shift), src_shift - shift);
    else
        fold_pages(to->word, src, base << (shift - src_shift), shift - src_shift, pace);
    if (n_valid < PAGE_BITS) { /* the last block of the source may reach past the end */
        to->word[n_valid / 64] &= ((uint64_t)1 << n_valid % 64) - 1;
        memset(&to->word[n_valid / 64] + 1, 0, (PAGE_WORDS - 1 - n_valid / 64) * sizeof *to->word);
    }
    unsigned n = (unsigned)bitmap_kernels()->count(to->word, PAGE_WORDS);
    atomic_store_explicit(&to->n_set, (int)n, memory_order_relaxed);
    return n;
}
