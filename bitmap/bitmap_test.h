/* SPDX-License-Identifier: Apache-2.0 */
/* What the tests of bitmaps share. Included once by each test program. */
#pragma once
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include <errno.h>

#include "base/bytes.h"
#include "base/mem.h"
#include "bitmap/bitmap.h"

#define PAGE ((uint64_t)32768) /* bits */

static uint64_t seed;

static inline uint64_t rnd(uint64_t below)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return below ? seed % below : 0;
}

static inline struct bitmap *make(uint64_t size, unsigned shift)
{
    struct bitmap *b;
    assert_int_equal(bitmap_new(size, shift, &b), 0);
    return b;
}

#define SIZE ((PAGE * 600 << 12) - 5000) /* two tables, the last page partial */

/* A page of its own, a shared one, ones, a table of ones, and the tail: in both, not alike. */
static inline void make_pair(struct bitmap **a, struct bitmap **b, struct bitmap **keep,
                             struct bitmap_retired *r)
{
    uint64_t page = PAGE << 12;
    *a = make(SIZE, 12);
    *b = make(SIZE, 12);
    bitmap_mark(*a, 2 * page + 4096, 8192, r);
    bitmap_mark(*a, SIZE - 1, 1, r);
    bitmap_mark(*b, 7 * page + 4096, 1, r);
    assert_int_equal(bitmap_clone(*a, NULL, keep), 0);
    assert_int_equal(bitmap_merge(*b, *a, NULL), 0);
    bitmap_mark(*b, 2 * page, 1, r);
    bitmap_mark(*a, page, 1, r);
    bitmap_mark(*a, 3 * page, 2 * page, r);
    bitmap_mark(*b, 100 * page + 1, 3 * page, r);
}

static inline void assert_contains(const struct bitmap *more, const struct bitmap *less)
{
    uint64_t off = 0, len;
    while (bitmap_next_dirty(less, off, UINT64_MAX, &off, &len)) {
        assert_true(bitmap_next_clean(more, off, UINT64_MAX) >= off + len);
        off += len;
    }
}
