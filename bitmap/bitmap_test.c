/* SPDX-License-Identifier: Apache-2.0 */
/* Tests of bitmaps: what is easier to see than to draw by lot, and each allocation failing once.
 * Random operations are in bitmap_random_test.c, merging and pools in bitmap_merge_test.c, what
 * threads do to each other in bitmap_stress.c. */
#include "bitmap/bitmap_test.h"

static void new_refuses(void **state)
{
    struct bitmap *b = NULL;
    assert_int_equal(bitmap_new(1, 8, &b), -EINVAL);
    assert_int_equal(bitmap_new(1, 32, &b), -EINVAL);
    assert_int_equal(bitmap_new((uint64_t)INT64_MAX + 1, 31, &b), -EINVAL);
    assert_int_equal(bitmap_new(INT64_MAX, 15, &b), -E2BIG);
    assert_int_equal(bitmap_new(((uint64_t)1 << 56) + 1, 9, &b), -E2BIG);
    assert_null(b);
    assert_int_equal(bitmap_min_shift(0), 9);
    assert_int_equal(bitmap_min_shift((uint64_t)1 << 56), 9);
    assert_int_equal(bitmap_min_shift(((uint64_t)1 << 56) + 1), 10);
    assert_int_equal(bitmap_min_shift(INT64_MAX), 16);
    bitmap_free(NULL);
}

static void rounding(void **state)
{
    struct bitmap_retired r = {0};
    struct bitmap *b = make(10 * KIB + 1, 10); /* 11 blocks, the last of one byte */
    assert_true(bitmap_mark(b, 1023, 2, &r));  /* outward: two blocks */
    assert_int_equal(bitmap_count(b), 2);
    assert_false(bitmap_mark(b, 0, 1, &r));
    assert_false(bitmap_mark(b, 5, 0, &r));
    assert_false(bitmap_mark(b, 10 * KIB + 1, 1, &r)); /* past the end */
    assert_false(bitmap_mark(b, UINT64_MAX, UINT64_MAX, &r));
    assert_true(bitmap_mark(b, 10 * KIB, UINT64_MAX, &r)); /* off + len wraps */
    assert_int_equal(bitmap_count(b), 3);
    assert_int_equal(bitmap_unmark(b, 1, 2047, &r), 0); /* inward: only block 1 */
    assert_true(bitmap_test(b, 1023) && !bitmap_test(b, 1024));
    assert_int_equal(bitmap_unmark(b, 0, 1023, &r), 0);
    assert_true(bitmap_test(b, 0));
    assert_int_equal(bitmap_unmark(b, 10 * KIB, 0, &r), 0);
    assert_true(bitmap_test(b, 10 * KIB));
    assert_int_equal(bitmap_unmark(b, 10 * KIB, 1, &r), 0); /* the last block ends with the disk */
    assert_false(bitmap_test(b, 10 * KIB));
    assert_int_equal(bitmap_count(b), 1);
    bitmap_free(b);
    bitmap_retired_free(&r);
}

static void runs_join_across_pages_and_ones(void **state)
{
    struct bitmap_retired r = {0};
    uint64_t off, len, page = PAGE << 16, table = page * 512;
    struct bitmap *b = make(256 * TIB, 16);
    bitmap_mark(b, page - 65536, 65536, &r);     /* the last bit of page 0 */
    bitmap_mark(b, page, table * 3, &r);         /* whole pages, whole tables */
    bitmap_mark(b, table * 3 + page, 65536, &r); /* one bit of a page */
    assert_true(bitmap_next_dirty(b, 0, UINT64_MAX, &off, &len));
    assert_int_equal(off, page - 65536);
    assert_int_equal(off + len, table * 3 + page + 65536);
    assert_int_equal(bitmap_next_clean(b, off, UINT64_MAX), off + len);
    /* A hole of one bit in the middle of a table of ones. */
    assert_int_equal(bitmap_take(b, table + 5 * page + 65536, &r), 1);
    assert_int_equal(bitmap_next_clean(b, off, UINT64_MAX), table + 5 * page + 65536);
    assert_int_equal(bitmap_take(b, table + 5 * page + 65536, &r), 0);
    assert_int_equal(bitmap_count(b), 1 + 3 * 512 * PAGE + 1 - 1);
    bitmap_free(b);
    bitmap_retired_free(&r);
}

static void memory_is_small(void **state)
{
    struct bitmap_retired r = {0};
    struct bitmap *b = make(256 * TIB, 16);
    assert_true(bitmap_memory(b) < 64 * KIB);
    bitmap_mark(b, 0, UINT64_MAX, &r); /* flat: 512 MiB */
    assert_true(bitmap_memory(b) < 512 * MIB / 20);
    bitmap_free(b);

    b = make(256 * TIB - 1, 16); /* the last page is partial */
    assert_int_equal(bitmap_set_all(b), 0);
    assert_true(bitmap_memory(b) < 64 * KIB);
    assert_int_equal(bitmap_count(b), (uint64_t)1 << 32);
    bitmap_free(b);

    b = make(INT64_MAX, 16); /* 2^47 blocks */
    assert_true(bitmap_empty(b));
    assert_int_equal(bitmap_set_all(b), 0);
    assert_int_equal(bitmap_count(b), (uint64_t)1 << 47);
    assert_int_equal(bitmap_take(b, INT64_MAX - 1, &r), 1);
    assert_int_equal(bitmap_take(b, INT64_MAX - 1, &r), 0);
    assert_int_equal(bitmap_next_clean(b, 0, UINT64_MAX), (uint64_t)INT64_MAX - 65535);
    assert_int_equal(bitmap_count(b), ((uint64_t)1 << 47) - 1);
    assert_true(bitmap_memory(b) < 64 * KIB);
    bitmap_free(b);

    b = make(TIB, 16); /* 1000 dirty clusters in ten runs */
    for (uint64_t i = 0; i < 10; i++)
        bitmap_mark(b, i * 100 * GIB, 100 * 65536, &r);
    assert_int_equal(bitmap_count(b), 1000);
    assert_true(bitmap_memory(b) <= 64 * KIB);
    bitmap_free(b);

    b = make((uint64_t)PAGE * 64 << 16, 16); /* 256 KiB flat, no page full */
    for (uint64_t i = 0; i < PAGE * 64; i += 2)
        bitmap_mark(b, i << 16, 1, &r);
    assert_true(bitmap_memory(b) < 256 * KIB * 105 / 100);
    assert_int_equal(bitmap_unmark(b, 0, UINT64_MAX, &r), 0); /* pages go with their bits */
    assert_true(bitmap_memory(b) < 4 * KIB);
    bitmap_free(b);
    bitmap_retired_free(&r);
}

static void shared_pages_are_counted_once_each_side(void **state)
{
    struct bitmap_retired r = {0}, r2 = {0};
    struct bitmap *a = make(PAGE << 16, 16), *b, *c;
    bitmap_mark(a, 0, 1, &r);
    assert_null(r.head); /* nothing was replaced */
    assert_int_equal(bitmap_clone(a, NULL, &b), 0);
    assert_int_equal(bitmap_clone(a, NULL, &c), 0);
    /* The same page is replaced in two bitmaps: two notes, in two lists. */
    bitmap_mark(a, 65536, 1, &r);
    bitmap_mark(b, 2 * 65536, 1, &r2);
    assert_int_equal(r.n, 1);
    assert_int_equal(r2.n, 1);
    bitmap_retired_move(&r, &r2);
    assert_int_equal(r.n, 2);
    assert_null(r2.head);
    bitmap_retired_move(&r, &r2); /* moving nothing */
    assert_int_equal(r.n, 2);
    bitmap_retired_free(&r);
    assert_int_equal(bitmap_count(c), 1);
    bitmap_mark(a, 3 * 65536, 1, &r); /* a page of its own again: in place */
    assert_null(r.head);
    bitmap_free(a);
    assert_int_equal(bitmap_count(b), 2);
    assert_true(bitmap_test(c, 0) && !bitmap_test(c, 65536));
    bitmap_free(b);
    bitmap_free(c);
}

static void count_sink(void *arg, const uint8_t *bytes, uint64_t len)
{
    uint64_t *n = arg;
    n[bytes ? 1 : 0] += len;
    n[2]++;
}

static void pack_of_nothing_is_one_call(void **state)
{
    struct bitmap_retired r = {0};
    uint64_t n[3] = {0};
    struct bitmap *b = make(256 * TIB, 16);
    bitmap_pack(b, count_sink, n);
    assert_int_equal(n[0], 512 * MIB);
    assert_int_equal(n[2], 1);
    bitmap_mark(b, 100 * TIB, 1, &r);
    bitmap_take(b, 100 * TIB, &r); /* an empty page is left */
    bitmap_pack(b, count_sink, memset(n, 0, sizeof n));
    assert_int_equal(n[0], 512 * MIB);
    assert_int_equal(n[2], 1);
    bitmap_free(b);
    b = make(0, 16);
    bitmap_pack(b, count_sink, memset(n, 0, sizeof n));
    assert_int_equal(n[2], 0);
    bitmap_free(b);
}

/* ---- memory that is not there ---- */

/* An operation on `a` and `b`; *out is made by it, or NULL. `want` is what it has to contain. */
struct op {
    const char *name;
    int (*run)(struct bitmap *a, struct bitmap *b, struct bitmap **out, struct bitmap_retired *r);
    bool grows; /* a may hold more than it should after an error, else it is as before or smaller */
};

static int op_mark(struct bitmap *a, struct bitmap *b, struct bitmap **out,
                   struct bitmap_retired *r)
{
    uint64_t page = PAGE << 12;
    bitmap_mark(a, 2 * page - 1, 2, r);      /* the shared page, and one that is not there */
    bitmap_mark(a, SIZE - 9000, 9000, r);    /* the tail, shared */
    bitmap_mark(a, 520 * page + 4096, 1, r); /* in the last table */
    bitmap_mark(a, 0, 3 * page, r);          /* whole pages, one of its own and one shared */
    return 0;
}

static int op_unmark(struct bitmap *a, struct bitmap *b, struct bitmap **out,
                     struct bitmap_retired *r)
{
    uint64_t page = PAGE << 12;
    int r1 = bitmap_unmark(a, 2 * page + 8192, 2 * page, r); /* shared, ones, into ones */
    int r2 = bitmap_unmark(a, page, page, r);                /* a whole page of its own */
    int r3 = bitmap_unmark(a, SIZE - 1, 1, r);
    return r1 ? r1 : r2 ? r2 : r3;
}

static int op_take(struct bitmap *a, struct bitmap *b, struct bitmap **out,
                   struct bitmap_retired *r)
{
    int n = bitmap_take(a, 2 * (PAGE << 12) + 4096, r), m;
    assert_true(n == 1 || n == -ENOMEM);
    m = bitmap_take(a, 3 * (PAGE << 12) + 4096, r);
    assert_true(m == 1 || m == -ENOMEM);
    return MIN(n, m) < 0 ? -ENOMEM : 0;
}

static int op_merge(struct bitmap *a, struct bitmap *b, struct bitmap **out,
                    struct bitmap_retired *r)
{
    return bitmap_merge(a, b, NULL);
}

static int op_merge_other(struct bitmap *a, struct bitmap *b, struct bitmap **out,
                          struct bitmap_retired *r)
{
    struct bitmap *c;
    int e = bitmap_convert(b, 13, NULL, &c);
    if (e < 0)
        return e;
    e = bitmap_merge(a, c, NULL);
    assert_contains(a, b); /* also when memory was short */
    bitmap_free(c);
    return e;
}

static int op_clone(struct bitmap *a, struct bitmap *b, struct bitmap **out,
                    struct bitmap_retired *r)
{
    return bitmap_clone(a, NULL, out);
}

static int op_convert(struct bitmap *a, struct bitmap *b, struct bitmap **out,
                      struct bitmap_retired *r)
{
    return bitmap_convert(a, 14, NULL, out);
}

static int op_resized(struct bitmap *a, struct bitmap *b, struct bitmap **out,
                      struct bitmap_retired *r)
{
    return bitmap_resized(a, SIZE + (PAGE << 12), out);
}

static int op_set_all(struct bitmap *a, struct bitmap *b, struct bitmap **out,
                      struct bitmap_retired *r)
{
    return bitmap_set_all(a);
}

static const struct op ops[] = {
    {"mark", op_mark, true},
    {"unmark", op_unmark, false},
    {"take", op_take, false},
    {"merge", op_merge, true},
    {"convert and merge", op_merge_other, true},
    {"clone", op_clone, false},
    {"convert", op_convert, false},
    {"resized", op_resized, false},
    {"set_all", op_set_all, true},
};

/* Run `op` with the n-th allocation failing; false when it made fewer. */
static bool run_starved(const struct op *op, unsigned long n, const struct bitmap *right)
{
    struct bitmap_retired r = {0};
    struct bitmap *a, *b, *keep, *out = NULL, *b_then, *a_then;
    make_pair(&a, &b, &keep, &r);
    assert_int_equal(bitmap_clone(b, NULL, &b_then), 0);
    assert_int_equal(bitmap_clone(a, NULL, &a_then), 0);
    mem_fail_after(n);
    int e = op->run(a, b, &out, &r);
    bool hit = mem_fail_after(0) >= n;
    assert_true(e == 0 || e == -ENOMEM);
    assert_true(hit || e == 0);
    assert_true(e == 0 || !out);
    if (e == 0 || op->run != op_merge_other) /* there, nothing is merged if converting fails */
        assert_contains(a, right);
    if (!hit)
        assert_int_equal(bitmap_count(a), bitmap_count(right));
    if (!op->grows)
        assert_contains(a_then, a);
    assert_contains(b, b_then); /* the source and who shares with it do not change */
    assert_int_equal(bitmap_count(b), bitmap_count(b_then));
    assert_int_equal(bitmap_count(keep), 3);
    /* Whatever it is now, it still works: pages that had to stay with an all-ones slot too. */
    uint64_t len, off;
    struct bitmap *again;
    assert_int_equal(bitmap_clone(a, NULL, &again), 0);
    assert_contains(again, a);
    bitmap_free(again);
    for (off = 4096; off < SIZE; off += PAGE << 12)
        assert_true(bitmap_take(a, off, &r) >= 0);
    for (off = 4096; off < SIZE; off += PAGE << 12)
        assert_false(bitmap_test(a, off));
    assert_int_equal(bitmap_unmark(a, 0, UINT64_MAX, &r), 0);
    assert_false(bitmap_next_dirty(a, 0, UINT64_MAX, &off, &len));
    bitmap_free(out);
    bitmap_free(a_then);
    bitmap_free(b_then);
    bitmap_free(a);
    bitmap_free(b);
    bitmap_free(keep);
    bitmap_retired_free(&r);
    return hit;
}

static void every_allocation_fails_once(void **state)
{
    for (unsigned i = 0; i < sizeof ops / sizeof *ops; i++) {
        struct bitmap_retired r = {0};
        struct bitmap *a, *b, *keep, *out = NULL;
        make_pair(&a, &b, &keep, &r);
        assert_int_equal(ops[i].run(a, b, &out, &r), 0);
        for (unsigned long n = 1; run_starved(&ops[i], n, a); n++)
            assert_true(n < 1000);
        bitmap_free(out);
        bitmap_free(a);
        bitmap_free(b);
        bitmap_free(keep);
        bitmap_retired_free(&r);
    }
    for (unsigned long n = 1; n <= 2; n++) {
        struct bitmap *b = NULL;
        mem_fail_after(n);
        assert_int_equal(bitmap_new(GIB, 16, &b), -ENOMEM);
        mem_fail_after(0);
        assert_null(b);
    }
}

/* Without memory the tail becomes all ones and no bit past the end shows. */
static void starved_tail_stays_inside_the_disk(void **state)
{
    struct bitmap_retired r = {0};
    uint64_t size = (PAGE + 3) << 16;
    struct bitmap *b = make(size, 16), *big;
    mem_fail_after(1);
    assert_true(bitmap_mark(b, size - 1, 1, &r));
    mem_fail_after(0);
    assert_int_equal(bitmap_count(b), 3);
    uint64_t n[3] = {0};
    bitmap_pack(b, count_sink, n);
    assert_int_equal(n[0], PAGE / 8);
    assert_int_equal(n[1], 8);
    assert_int_equal(bitmap_resized(b, 2 * size, &big), 0);
    assert_int_equal(bitmap_count(big), 3);
    bitmap_free(b);
    bitmap_free(big);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(new_refuses),
        cmocka_unit_test(rounding),
        cmocka_unit_test(runs_join_across_pages_and_ones),
        cmocka_unit_test(memory_is_small),
        cmocka_unit_test(shared_pages_are_counted_once_each_side),
        cmocka_unit_test(pack_of_nothing_is_one_call),
        cmocka_unit_test(every_allocation_fails_once),
        cmocka_unit_test(starved_tail_stays_inside_the_disk),
    };
    return cmocka_run_group_tests_name("bitmap", tests, NULL, NULL);
}
