/* SPDX-License-Identifier: Apache-2.0 */
/* Tests of merging: what it shares and makes, with and without a log; from one granularity into
 * another, beside a reference that goes bit by bit; the kernels; how often others get a turn. And
 * of the pool that its pages come from. Random lists of changes that are taken back are in
 * bitmap_random_test.c. */
#include "bitmap/bitmap_test.h"
#include "bitmap/kernels.h"

/* One thread has no races: few are enough where they take long. */
#ifdef __SANITIZE_THREAD__
#define ALLOCATION_STEP 5u /* of the allocations that fail */
#define PAIR_STEP 7u       /* of the pairs of granularities */
#else
#define ALLOCATION_STEP 1u
#ifdef __SANITIZE_ADDRESS__
#define PAIR_STEP 2u
#else
#define PAIR_STEP 1u
#endif
#endif

static void merge_shares_and_collapses(void **state)
{
    struct bitmap_retired r = {0};
    uint64_t page = PAGE << 16;
    struct bitmap *a = make(4 * page, 16), *b = make(4 * page, 16), *c;
    size_t bare = bitmap_memory(a);
    for (uint64_t i = 0; i < PAGE; i++) /* page 0: a even, b odd; page 1: only b */
        bitmap_mark(i % 2 ? b : a, i << 16, 1, &r);
    bitmap_mark(b, page, 1, &r);
    assert_int_equal(bitmap_clone(a, NULL, &c), 0);
    assert_int_equal(bitmap_merge(c, b, NULL), 0);
    assert_int_equal(bitmap_count(c), PAGE + 1);
    assert_int_equal(bitmap_count(a), PAGE / 2);
    assert_true(bitmap_memory(c) < bare + 5000);   /* page 0 is ones, page 1 is b's */
    assert_int_equal(bitmap_merge(a, b, NULL), 0); /* in place, the same */
    assert_int_equal(bitmap_count(a), PAGE + 1);
    assert_true(bitmap_memory(a) < bare + 5000);
    bitmap_mark(b, page + 65536, 1, &r); /* b may not write to what it has given */
    assert_int_equal(r.n, 1);
    assert_int_equal(bitmap_count(a), PAGE + 1);
    assert_int_equal(bitmap_merge(a, a, NULL), 0);
    bitmap_free(a);
    bitmap_free(b);
    bitmap_free(c);
    bitmap_retired_free(&r);
}

static void undo_free(struct bitmap_undo *u)
{
    assert_true(bitmap_undo_free_some(u, &(unsigned){1000000}));
}

/* A table, a page of its own, a shared page, ones in the place of a table and of a page: each is
 * there again, and what was its own may be written in place again. */
static void an_undone_merge_leaves_nothing_behind(void **state)
{
    struct bitmap_retired r = {0};
    uint64_t page = PAGE << 16, table = page * 512;
    struct bitmap *a = make(8 * table, 16), *b = make(8 * table, 16), *keep;
    bitmap_mark(a, 3 * page, 1, &r);
    assert_int_equal(bitmap_clone(a, NULL, &keep), 0); /* that page is shared */
    bitmap_mark(a, 5 * page, 1, &r);                   /* its own */
    bitmap_mark(a, 2 * table + page, 1, &r);
    size_t before = bitmap_memory(a);
    bitmap_mark(b, 3 * page + 65536, 1, &r);
    bitmap_mark(b, 5 * page + 65536, 1, &r);
    bitmap_mark(b, table, 1, &r);         /* a table that a has not */
    bitmap_mark(b, 2 * table, table, &r); /* ones in the place of a table */
    bitmap_mark(b, 7 * page, page, &r);
    struct bitmap_undo *u;
    assert_int_equal(bitmap_undo_new(NULL, NULL, &u), 0);
    assert_int_equal(bitmap_merge_undoable(a, b, u), 0);
    assert_int_equal(bitmap_count(a), 4 + 1 + 512 * PAGE + PAGE);
    unsigned long n = mem_fail_after(1); /* unwinding asks for no memory */
    bitmap_undo_unwind(u);
    n = mem_fail_after(0);
    assert_int_equal(n, 0);
    assert_int_equal(bitmap_memory(a), before);
    assert_int_equal(bitmap_count(a), 3);
    undo_free(u);
    bitmap_mark(a, 5 * page + 2 * 65536, 1, &r);
    assert_int_equal(r.n, 0); /* in place */
    bitmap_mark(a, 3 * page + 2 * 65536, 1, &r);
    assert_int_equal(r.n, 1); /* in a copy */
    assert_int_equal(bitmap_count(keep), 1);
    bitmap_free(a);
    bitmap_free(b);
    bitmap_free(keep);
    bitmap_retired_free(&r);
}

static struct bitmap_undo *merge_from_pool(struct bitmap_pool *p, struct bitmap *a,
                                           struct bitmap *b)
{
    struct bitmap_undo *u;
    assert_int_equal(bitmap_undo_new(p, NULL, &u), 0);
    assert_int_equal(bitmap_merge_undoable(a, b, u), 0);
    return u;
}

/* Pages from slabs: more than two slabs full; taken back; kept and changed; each slab goes, and
 * what is free in one is used before there is another. */
static void pages_from_a_pool(void **state)
{
    struct bitmap_retired r = {0};
    uint64_t n = 1500, page = PAGE << 16;
    struct bitmap *a = make(256 * TIB, 16), *b = make(256 * TIB, 16), *keep;
    struct bitmap_pool *p;
    struct bitmap_undo *u;
    for (uint64_t i = 0; i < n; i++) {
        bitmap_mark(a, i * page, 1, &r);
        bitmap_mark(b, i * page + 65536, 1, &r);
    }
    assert_int_equal(bitmap_pool_new(&p), 0);
    for (unsigned long k = 1; k < 90; k += ALLOCATION_STEP) { /* the first slab is among them */
        assert_int_equal(bitmap_undo_new(p, NULL, &u), 0);
        mem_fail_after(k);
        int e = bitmap_merge_undoable(a, b, u);
        if (mem_fail_after(0) >= k)
            assert_int_equal(e, -ENOMEM);
        bitmap_undo_unwind(u);
        assert_int_equal(bitmap_count(a), n);
        undo_free(u);
    }
    u = merge_from_pool(p, a, b);
    bitmap_undo_unwind(u);
    assert_int_equal(bitmap_count(a), n);
    undo_free(u);
    mem_fail_after(0);
    u = merge_from_pool(p, a, b); /* the slabs are there still */
    assert_true(mem_fail_after(0) < 64 + 20);
    assert_int_equal(bitmap_count(a), 2 * n);
    undo_free(u);
    assert_false(bitmap_pool_trim(p)); /* none is empty */
    assert_int_equal(bitmap_clone(a, NULL, &keep), 0);
    for (uint64_t i = 1; i < n; i += 2)
        bitmap_mark(a, i * page + 2 * 65536, 1, &r); /* copies: half of each slab is free then */
    assert_int_equal(r.n, n / 2);
    bitmap_free(keep);
    bitmap_retired_free(&r);
    for (uint64_t i = 0; i < n; i += 2)
        bitmap_mark(b, i * page + 3 * 65536, 1, &r);
    mem_fail_after(0);
    u = merge_from_pool(p, a, b);
    assert_true(mem_fail_after(0) < 64 + 20);
    assert_int_equal(bitmap_count(a), 3 * n);
    undo_free(u);
    bitmap_free(a);
    bitmap_free(b);
    bitmap_retired_free(&r);
    unsigned trims = 1;
    while (bitmap_pool_trim(p))
        trims++;
    assert_int_equal(trims, 3);
    bitmap_pool_free(p); /* asserts that nothing is left */
}

/* What a merge costs is in what it allocates: nothing for what the target has already. */
static void merge_makes_only_what_differs(void **state)
{
    struct bitmap_retired r = {0};
    uint64_t page = PAGE << 16;
    struct bitmap *a = make(256 * TIB, 16), *b = make(256 * TIB, 16);
    for (uint64_t i = 0; i < 4096; i++) {
        bitmap_mark(a, i * page, 2 * 65536, &r);
        bitmap_mark(b, i * page, i == 77 || i == 99 ? 3 * 65536 : 65536, &r);
    }
    struct bitmap_undo *u;
    assert_int_equal(bitmap_undo_new(NULL, NULL, &u), 0);
    mem_fail_after(0);
    assert_int_equal(bitmap_merge_undoable(a, b, u), 0);
    /* A note for each, in one chunk; a page to try in. Both pages are the source's. */
    assert_true(mem_fail_after(0) <= 2);
    assert_int_equal(bitmap_count(a), 4096 * 2 + 2);
    assert_int_equal(bitmap_merge_undoable(a, b, u), 0);
    assert_true(mem_fail_after(0) <= 2);
    undo_free(u);
    bitmap_free(a);
    bitmap_free(b);
    bitmap_retired_free(&r);
}

static void big_ones_are_freed_in_pieces(void **state)
{
    struct bitmap_retired r = {0};
    uint64_t page = PAGE << 16;
    struct bitmap *a = make(256 * TIB, 16), *b = make(256 * TIB, 16);
    for (uint64_t i = 0; i < 3000; i++) {
        bitmap_mark(a, i * page, 1, &r);
        bitmap_mark(b, i * page + 65536, 1, &r);
    }
    struct bitmap_undo *u;
    assert_int_equal(bitmap_undo_new(NULL, NULL, &u), 0);
    assert_int_equal(bitmap_merge_undoable(a, b, u), 0);
    unsigned n = 1;
    while (!bitmap_undo_free_some(u, &(unsigned){100}))
        n++;
    assert_in_range(n, 30, 32);
    for (n = 1; !bitmap_free_some(a, &(unsigned){100});)
        n++;
    assert_in_range(n, 30, 32); /* the pages, and six tables */
    bitmap_free(b);
    bitmap_retired_free(&r);
}

/* Two merges, one of another granularity, into a log that has one already; the n-th allocation
 * fails. True: it did. */
static bool undoable_starved(unsigned long n)
{
    struct bitmap_retired r = {0};
    struct bitmap *a, *b, *keep, *other, *first, *then;
    struct bitmap_undo *u;
    make_pair(&a, &b, &keep, &r);
    bitmap_mark(b, 520 * (PAGE << 12), 1, &r); /* a table that a has not */
    assert_int_equal(bitmap_convert(b, 13, NULL, &other), 0);
    bitmap_mark(other, 400 * (PAGE << 12), 1, &r);
    first = make(SIZE, 12);
    bitmap_mark(first, 2 * (PAGE << 12) + 5 * 4096, 1, &r);
    assert_int_equal(bitmap_clone(a, NULL, &then), 0);
    assert_int_equal(bitmap_undo_new(NULL, NULL, &u), 0);
    assert_int_equal(bitmap_merge_undoable(a, first, u), 0);
    mem_fail_after(n);
    int e = bitmap_merge_undoable(a, b, u);
    if (e == 0)
        e = bitmap_merge_undoable(a, other, u);
    bool hit = mem_fail_after(0) >= n;
    assert_int_equal(e, hit ? -ENOMEM : 0);
    if (!hit) {
        assert_contains(a, b);
        assert_contains(a, other);
    }
    bitmap_undo_unwind(u);
    assert_contains(a, then);
    assert_contains(then, a);
    assert_int_equal(bitmap_count(a), bitmap_count(then));
    assert_int_equal(bitmap_memory(a), bitmap_memory(then));
    undo_free(u);
    assert_int_equal(bitmap_count(keep), 3);
    for (uint64_t off = 4096; off < SIZE; off += PAGE << 12)
        assert_true(bitmap_take(a, off, &r) >= 0 && bitmap_take(b, off, &r) >= 0);
    struct bitmap *all[] = {a, b, keep, other, first, then};
    for (unsigned i = 0; i < 6; i++)
        bitmap_free(all[i]);
    bitmap_retired_free(&r);
    return hit;
}

static void undoable_merge_without_memory(void **state)
{
    unsigned long n = 1;
    while (undoable_starved(n))
        n++;
    assert_true(n > 5 && n < 1000);
    struct bitmap_undo *u;
    mem_fail_after(1);
    assert_int_equal(bitmap_undo_new(NULL, NULL, &u), -ENOMEM);
    mem_fail_after(0);
}

/* ---- another granularity, bit by bit ---- */

/* Runs of every length; now and then all but some, or pages that are full, or empty again, without
 * their slots' saying so. */
static void scatter(struct bitmap *b, struct bitmap_retired *r)
{
    uint64_t size = bitmap_size(b), g = (uint64_t)1 << bitmap_shift(b), blocks = (size - 1) / g + 1;
    if (!rnd(5))
        bitmap_mark(b, 0, UINT64_MAX, r);
    for (uint64_t n = rnd(60); n; n--) {
        uint64_t off = rnd(blocks) * g;
        uint64_t len = rnd(3) ? (1 + rnd(70)) * g : MIN(1 + rnd(blocks), 3 * PAGE) * g;
        if (rnd(4))
            bitmap_mark(b, off, len, r);
        else
            bitmap_unmark(b, off, len, r);
    }
    bool fill = rnd(2);
    for (uint64_t i = 0; !rnd(3) && i < MIN(blocks, 2 * PAGE); i++) {
        if (fill)
            bitmap_mark(b, i * g, 1, r);
        else
            bitmap_take(b, i * g, r);
    }
}

/* One byte for each block of b, 1: dirty. Any granularity of it that is finer or coarser. */
static uint8_t *blocks_of(const struct bitmap *b, unsigned shift)
{
    unsigned fine = MIN(shift, bitmap_shift(b));
    uint64_t size = bitmap_size(b);
    uint8_t *byte = mem_zalloc((size >> shift) + 1);
    assert_non_null(byte);
    for (uint64_t off = 0; off < size; off += (uint64_t)1 << fine)
        byte[off >> shift] |= bitmap_test(b, off);
    return byte;
}

static void assert_blocks(const struct bitmap *b, const uint8_t *one, const uint8_t *other)
{
    uint64_t n = 0;
    for (uint64_t i = 0; i << bitmap_shift(b) < bitmap_size(b); i++) {
        bool want = one[i] | other[i];
        n += want;
        if (bitmap_test(b, i << bitmap_shift(b)) != want)
            fail_msg("shift %u, block %llu is not %d", bitmap_shift(b), (unsigned long long)i,
                     want);
    }
    assert_int_equal(bitmap_count(b), n);
}

/* Merged in place, merged into a log and taken back, converted. */
static void merge_pair(unsigned to, unsigned from)
{
    unsigned fine = MIN(to, from), coarse = MAX(to, from);
    /* Some pages of the finer one, some blocks of the coarser one, and a ragged end. */
    uint64_t blocks = MAX(3 + rnd(4 * PAGE), (3 + rnd(2)) << (coarse - fine));
    uint64_t size = (blocks << fine) - rnd((uint64_t)1 << (rnd(2) ? fine : 0));
    struct bitmap_retired r = {0};
    struct bitmap *src = make(size, from), *dst = make(size, to), *keep, *c;
    struct bitmap_undo *u;
    scatter(src, &r);
    scatter(dst, &r);
    assert_int_equal(bitmap_clone(dst, NULL, &keep), 0);
    scatter(dst, &r); /* some of its pages are shared now */
    uint8_t *add = blocks_of(src, to), *had = blocks_of(dst, to), *kept = blocks_of(keep, to);

    assert_int_equal(bitmap_convert(src, to, NULL, &c), 0);
    assert_blocks(c, add, add);
    size_t memory = bitmap_memory(dst);
    assert_int_equal(bitmap_undo_new(NULL, NULL, &u), 0);
    assert_int_equal(bitmap_merge_undoable(dst, src, u), 0);
    assert_blocks(dst, had, add);
    bitmap_undo_unwind(u);
    assert_blocks(dst, had, had);
    assert_int_equal(bitmap_memory(dst), memory);
    undo_free(u);
    assert_int_equal(bitmap_merge(dst, src, NULL), 0);
    assert_blocks(dst, had, add);
    assert_int_equal(bitmap_merge(dst, c, NULL), 0); /* nothing new */
    assert_blocks(dst, had, add);
    assert_blocks(keep, kept, kept);
    struct bitmap *all[] = {src, dst, keep, c};
    for (unsigned i = 0; i < 4; i++)
        bitmap_free(all[i]);
    mem_free(add);
    mem_free(had);
    mem_free(kept);
    bitmap_retired_free(&r);
}

static void other_granularities_bit_by_bit(void **state)
{
    unsigned n = BITMAP_SHIFT_MAX - BITMAP_SHIFT_MIN + 1;
    seed = 77;
    for (unsigned i = 0; i < n * n; i += PAIR_STEP) {
        unsigned to = BITMAP_SHIFT_MIN + i / n, from = BITMAP_SHIFT_MIN + i % n;
        if (to != from)
            merge_pair(to, from);
    }
}

/* What is far away from everything else: more levels of tables, in all of which there is one run.
 */
static void other_granularities_of_huge_disks(void **state)
{
    static const unsigned pairs[][2] = {{16, 31}, {31, 16}, {17, 18}, {18, 17}, {16, 24}, {24, 16}};
    uint64_t size = INT64_MAX - 12345, off, len, mid = (uint64_t)3 << 61;
    for (unsigned i = 0; i < sizeof pairs / sizeof *pairs; i++) {
        struct bitmap_retired r = {0};
        unsigned to = pairs[i][0], from = pairs[i][1];
        uint64_t g = (uint64_t)1 << MAX(to, from), whole = PAGE << (24 + 9);
        struct bitmap *src = make(size, from), *c;
        bitmap_mark(src, mid / 2 + 5 * g, 3 * g, &r);
        bitmap_mark(src, mid / 4, whole, &r);
        bitmap_mark(src, size - 1, 1, &r);
        assert_int_equal(bitmap_convert(src, to, NULL, &c), 0);
        assert_true(bitmap_next_dirty(c, 0, UINT64_MAX, &off, &len));
        assert_int_equal(off, mid / 4);
        assert_int_equal(len, whole);
        assert_true(bitmap_next_dirty(c, off + len, UINT64_MAX, &off, &len));
        assert_int_equal(off, mid / 2 + 5 * g);
        assert_int_equal(len, 3 * g);
        assert_true(bitmap_next_dirty(c, off + len, UINT64_MAX, &off, &len));
        assert_int_equal(off, (size - 1) >> MAX(to, from) << MAX(to, from));
        assert_int_equal(off + len, size);
        assert_true(bitmap_memory(c) < 64 * KIB); /* the long run is in few slots */
        bitmap_free(src);
        bitmap_free(c);
        bitmap_retired_free(&r);
    }
}

/* ---- how often others get a turn ---- */

struct turns {
    unsigned n;
    unsigned long most; /* pages and tables made between two of them */
};

static void count_turn(void *arg)
{
    struct turns *t = arg;
    unsigned long n = mem_fail_after(0);
    t->n++;
    t->most = MAX(t->most, n);
}

#define MANY 2000u

/* Every page of a disk has a bit of its own, and more than one in `b`. */
static struct bitmap *one_in_each_page(unsigned shift, unsigned bit, struct bitmap_retired *r)
{
    struct bitmap *b = make((PAGE * MANY << 16) - 1, shift);
    for (uint64_t off = bit * GIB / 4; off < bitmap_size(b); off += PAGE << shift)
        bitmap_mark(b, off, 1, r);
    return b;
}

static void check_turns(const char *what, struct turns *t, unsigned pages)
{
    count_turn(t); /* since the last one */
    if (t->n < pages || t->most > 4)
        fail_msg("%s: %u turns, once %lu pages at a stretch", what, t->n, t->most);
    *t = (struct turns){0};
}

static void long_work_lets_others_in(void **state)
{
    struct bitmap_retired r = {0};
    struct turns t = {0};
    struct bitmap_pace pace = {.rest = count_turn, .arg = &t};
    struct bitmap *a = one_in_each_page(16, 0, &r), *b = one_in_each_page(16, 1, &r), *c;
    struct bitmap *coarse = one_in_each_page(17, 2, &r), *fine = one_in_each_page(15, 2, &r);
    struct bitmap_undo *u;
    mem_fail_after(0);
    assert_int_equal(bitmap_undo_new(NULL, &pace, &u), 0);
    assert_int_equal(bitmap_merge_undoable(a, b, u), 0);
    check_turns("merge", &t, MANY);
    assert_int_equal(bitmap_merge_undoable(a, coarse, u), 0);
    check_turns("merge of a coarser one", &t, MANY / 2);
    assert_int_equal(bitmap_merge_undoable(a, fine, u), 0);
    check_turns("merge of a finer one", &t, 2 * MANY);
    bitmap_undo_unwind(u);
    check_turns("unwinding", &t, MANY / 32);
    undo_free(u);
    assert_int_equal(bitmap_clone(a, &pace, &c), 0);
    check_turns("copy", &t, MANY / 32);
    assert_int_equal(bitmap_merge(c, b, &pace), 0);
    check_turns("merge in place", &t, MANY);
    assert_int_equal(bitmap_count_at(c, &pace), 2 * MANY);
    check_turns("count", &t, MANY / 32);
    struct bitmap *ones = make(bitmap_size(a), 16);
    bitmap_mark(ones, 0, UINT64_MAX, &r);
    mem_fail_after(0);
    assert_int_equal(bitmap_merge(c, ones, &pace), 0);
    check_turns("giving back what ones replace", &t, MANY / 32);
    bitmap_free(c);
    mem_fail_after(0);
    assert_int_equal(bitmap_convert(a, 15, &pace, &c), 0);
    check_turns("conversion", &t, MANY);
    struct bitmap *all[] = {a, b, c, coarse, fine, ones};
    for (unsigned i = 0; i < 6; i++)
        bitmap_free(all[i]);
    bitmap_retired_free(&r);
}

/* ---- kernels ---- */

static void kernels_agree(void **state)
{
    static _Alignas(64) uint64_t a[520], b[520], want[520], got[520];
    const struct bitmap_kernels *one = bitmap_kernels_nth(0), *k;
    assert_non_null(bitmap_kernels()->name);
    seed = 42;
    for (unsigned i = 1; (k = bitmap_kernels_nth(i)); i++) {
        for (unsigned round = 0; round < 200; round++) {
            size_t n = rnd(65) * 8, at = rnd(8), bt = rnd(8);
            for (unsigned j = 0; j < 520; j++) {
                a[j] = rnd(3) ? 0 : rnd(0) | (seed & (seed >> 7));
                b[j] = rnd(5) ? seed : UINT64_MAX;
            }
            assert_int_equal(k->or_count(got + at, a + at, b, n),
                             one->or_count(want + at, a + at, b, n));
            assert_memory_equal(got + at, want + at, n * 8);
            memset(got, 0xaa, sizeof got);
            assert_int_equal(k->or_count_new(got, a + at, b + bt, n),
                             one->or_count(want, a + at, b + bt, n));
            assert_memory_equal(got, want, n * 8);
            assert_true(n == 512 || got[n] == 0xaaaaaaaaaaaaaaaa);
            assert_int_equal(k->copy_count(got, b + at, n), one->copy_count(want, b + at, n));
            assert_memory_equal(got, want, n * 8);
            assert_int_equal(k->count(b + at, n), one->count(b + at, n));
            n = rnd(200);
            memset(got, 0xaa, sizeof got);
            k->halve(got, a + at, n);
            one->halve(want, a + at, n);
            assert_memory_equal(got, want, n * 8);
            assert_true(got[n] == 0xaaaaaaaaaaaaaaaa);
            k->twice(got, b + at, n);
            one->twice(want, b + at, n);
            assert_memory_equal(got, want, 2 * n * 8);
            assert_true(got[2 * n] == 0xaaaaaaaaaaaaaaaa);
            memset(a, 0, rnd(521) * 8);
            n = rnd(513);
            assert_int_equal(k->first_set(a + at, n), one->first_set(a + at, n));
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(merge_shares_and_collapses),
        cmocka_unit_test(an_undone_merge_leaves_nothing_behind),
        cmocka_unit_test(pages_from_a_pool),
        cmocka_unit_test(merge_makes_only_what_differs),
        cmocka_unit_test(big_ones_are_freed_in_pieces),
        cmocka_unit_test(undoable_merge_without_memory),
        cmocka_unit_test(other_granularities_bit_by_bit),
        cmocka_unit_test(other_granularities_of_huge_disks),
        cmocka_unit_test(long_work_lets_others_in),
        cmocka_unit_test(kernels_agree),
    };
    return cmocka_run_group_tests_name("bitmap_merge", tests, NULL, NULL);
}
