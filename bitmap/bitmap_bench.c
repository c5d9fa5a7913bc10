/* SPDX-License-Identifier: Apache-2.0 */
/* What bitmaps cost: nanoseconds a mark, bandwidth of a merge beside that of memcpy, time to count
 * and to iterate. Prints a table; run it by hand on a quiet machine. Figures are the best of
 * several rounds, which is what says most about the code on a machine that others use too. */
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "base/bytes.h"
#include "base/mem.h"
#include "bitmap/bitmap.h"
#include "bitmap/kernels.h"

#define ROUNDS 7

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static uint64_t rnd(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static void must(int r)
{
    if (r < 0) {
        fprintf(stderr, "bitmap_bench: error %d\n", -r);
        exit(1);
    }
}

static struct bitmap *make(uint64_t size)
{
    struct bitmap *b;
    must(bitmap_new(size, 16, &b));
    return b;
}

static void mark_at(struct bitmap *b, uint64_t off)
{
    struct bitmap_retired r = {0};
    bitmap_mark(b, off, 1, &r);
    bitmap_retired_free(&r);
}

/* Every second block from `first`: pages in every slot, none of them full. */
static struct bitmap *make_dense(uint64_t size, uint64_t first)
{
    struct bitmap *b = make(size);
    for (uint64_t i = first; i < size >> 16; i += 2)
        mark_at(b, i << 16);
    return b;
}

static void bench_mark(void)
{
    enum { N = 1 << 20 };
    uint64_t size = TIB, seed = 88172645463325252u;
    static uint64_t offs[N];
    double miss = 1e9, hit = 1e9, seq = 1e9;
    for (unsigned k = 0; k < ROUNDS; k++) {
        struct bitmap *b = make_dense(size, 1);
        struct bitmap_retired r = {0};
        for (unsigned i = 0; i < N; i++)
            offs[i] = (rnd(&seed) % (size >> 17)) << 17;
        double t0 = now();
        for (unsigned i = 0; i < N; i++)
            bitmap_mark(b, offs[i], 4096, &r);
        double t1 = now();
        for (unsigned i = 0; i < N; i++)
            bitmap_mark(b, offs[i], 4096, &r);
        double t2 = now();
        for (unsigned i = 0; i < N; i++)
            bitmap_mark(b, (uint64_t)i << 12, 4096, &r);
        double t3 = now();
        miss = MIN(miss, (t1 - t0) / N);
        hit = MIN(hit, (t2 - t1) / N);
        seq = MIN(seq, (t3 - t2) / N);
        bitmap_retired_free(&r);
        bitmap_free(b);
    }
    printf("mark, 1 TiB at 64 KiB: random, mostly a new bit %.1f ns; random hit %.1f ns; "
           "4 KiB in sequence %.1f ns\n",
           miss * 1e9, hit * 1e9, seq * 1e9);
}

static double memcpy_time(size_t len)
{
    char *a = mem_alloc(len), *b = mem_alloc(len);
    if (!a || !b)
        must(-1);
    memset(a, 1, len);
    memset(b, 2, len);
    double best = 1e9;
    for (unsigned k = 0; k < 3 * ROUNDS; k++) {
        double t = now();
        memcpy(a, b, len);
        __asm__ volatile("" ::: "memory");
        best = MIN(best, now() - t);
    }
    mem_free(a);
    mem_free(b);
    return best;
}

/* Even blocks but for one in each page, so that a merge of the odd ones makes no page full. */
static struct bitmap *make_target(uint64_t size)
{
    struct bitmap *b = make_dense(size, 0);
    struct bitmap_retired r = {0};
    for (uint64_t i = 0; i < size >> 16; i += 32768)
        bitmap_unmark(b, i << 16, 1 << 16, &r);
    bitmap_retired_free(&r);
    return b;
}

/* Merge into a live bitmap in place, and as a transaction does: all pages of the result are new
 * memory, the log is unwound, and what was made is freed. The first round gets its memory from the
 * kernel, later ones from the pool. Both read two bytes and write one for each of the result, where
 * memcpy reads one: the second percentage compares with as many bytes moved by memcpy. */
static void bench_merge(uint64_t size)
{
    size_t flat = size >> 19;
    double copy = memcpy_time(flat), in_place = 1e9, cold = 0, warm = 1e9, unwind = 1e9, gone = 1e9;
    struct bitmap *src = make_dense(size, 1), *dst = make_target(size);
    struct bitmap_pool *pool;
    must(bitmap_pool_new(&pool));
    for (unsigned k = 0; k < 3 * ROUNDS; k++) {
        struct bitmap_undo *u;
        must(bitmap_undo_new(pool, NULL, &u));
        double t0 = now();
        must(bitmap_merge_undoable(dst, src, u));
        double t1 = now();
        bitmap_undo_unwind(u);
        double t2 = now();
        bitmap_undo_free_some(u, &(unsigned){UINT_MAX});
        gone = MIN(gone, now() - t2);
        unwind = MIN(unwind, t2 - t1);
        warm = MIN(warm, t1 - t0);
        cold = k ? cold : t1 - t0;
    }
    for (unsigned k = 0; k < 3 * ROUNDS; k++) {
        double t0 = now();
        must(bitmap_merge(dst, src, NULL));
        in_place = MIN(in_place, now() - t0);
    }
    printf("dense, %zu MiB flat: memcpy %.3f ms (%.1f GB/s); merge in place %.3f ms (%.0f %%, %.0f "
           "%%); undoable, new memory %.3f ms, used memory %.3f ms (%.0f %%, %.0f %%), unwound in "
           "%.3f ms, freed in %.3f ms\n",
           flat >> 20, copy * 1e3, (double)flat / copy / 1e9, in_place * 1e3, copy / in_place * 100,
           copy / in_place * 150, cold * 1e3, warm * 1e3, copy / warm * 100, copy / warm * 150,
           unwind * 1e3, gone * 1e3);
    bitmap_free(src);
    bitmap_free(dst);
    bitmap_pool_free(pool);
}

/* 0.01 % dirty in 64 runs. */
static struct bitmap *make_sparse(uint64_t size, uint64_t seed)
{
    struct bitmap *b = make(size);
    struct bitmap_retired r = {0};
    uint64_t run = size / 10000 / 64;
    for (unsigned i = 0; i < 64; i++)
        bitmap_mark(b, rnd(&seed) % (size - run), run, &r);
    bitmap_retired_free(&r);
    return b;
}

static uint64_t runs(const struct bitmap *b)
{
    uint64_t n = 0, off = 0, len;
    while (bitmap_next_dirty(b, off, UINT64_MAX, &off, &len)) {
        off += len;
        n++;
    }
    return n;
}

static void bench_sparse(uint64_t size)
{
    struct bitmap *src = make_sparse(size, 1234567), *dst = make_sparse(size, 7654321), *c;
    double merge = 1e9, empty = 1e9, unwind = 1e9, iterate = 1e9, count = 1e9;
    uint64_t n_runs = 0, n_bits = 0;
    for (unsigned k = 0; k < ROUNDS; k++) {
        struct bitmap_undo *u;
        must(bitmap_undo_new(NULL, NULL, &u));
        c = make(size);
        double t0 = now();
        must(bitmap_merge_undoable(c, dst, u));
        double t1 = now();
        must(bitmap_merge_undoable(c, src, u));
        double t2 = now();
        n_runs = runs(c);
        double t3 = now();
        n_bits = bitmap_count(c);
        double t4 = now();
        bitmap_undo_unwind(u);
        unwind = MIN(unwind, now() - t4);
        empty = MIN(empty, t1 - t0);
        merge = MIN(merge, t2 - t1);
        iterate = MIN(iterate, t3 - t2);
        count = MIN(count, t4 - t3);
        bitmap_undo_free_some(u, &(unsigned){UINT_MAX});
        bitmap_free(c);
    }
    printf("sparse, %3llu TiB at 64 KiB, 0.01 %% in 64 runs: merged into an empty one in %.1f us, "
           "another in %.1f us, both unwound in %.1f us; %llu runs found in %.1f us, %llu bits "
           "counted in %.1f us\n",
           (unsigned long long)(size >> 40), empty * 1e6, merge * 1e6, unwind * 1e6,
           (unsigned long long)n_runs, iterate * 1e6, (unsigned long long)n_bits, count * 1e6);
    bitmap_free(src);
    bitmap_free(dst);
}

static void bench_walk(uint64_t size)
{
    struct bitmap *b = make_dense(size, 0), *c;
    double t0 = now();
    uint64_t n = runs(b);
    double t1 = now();
    uint64_t bits = bitmap_count(b);
    double t2 = now();
    must(bitmap_convert(b, 17, NULL, &c));
    double t3 = now();
    printf("every second bit, %llu TiB: %llu runs in %.2f ms (%.1f ns each), %llu bits counted in "
           "%.1f us, "
           "converted to 128 KiB in %.2f ms\n",
           (unsigned long long)(size >> 40), (unsigned long long)n, (t1 - t0) * 1e3,
           (t1 - t0) * 1e9 / (double)n, (unsigned long long)bits, (t2 - t1) * 1e6, (t3 - t2) * 1e3);
    bitmap_free(b);
    bitmap_free(c);
}

static void bench_kernels(void)
{
    enum { LEN = 2 << 20, WORDS = LEN / 8 };
    uint64_t *a = mem_aligned(64, LEN), *b = mem_aligned(64, LEN), *c = mem_aligned(64, LEN);
    if (!a || !b || !c)
        must(-1);
    memset(c, 0, LEN);
    memset(a, 0x55, LEN);
    memset(b, 0x33, LEN);
    const struct bitmap_kernels *k;
    for (unsigned i = 0; (k = bitmap_kernels_nth(i)); i++) {
        double or_time = 1e9, new_time = 1e9, count_time = 1e9;
        uint64_t sum = 0;
        for (unsigned j = 0; j < 3 * ROUNDS; j++) {
            double t0 = now();
            sum += k->or_count(a, a, b, WORDS);
            double t1 = now();
            sum += k->count(a, WORDS);
            double t2 = now();
            sum += k->or_count_new(c, a, b, WORDS);
            or_time = MIN(or_time, t1 - t0);
            count_time = MIN(count_time, t2 - t1);
            new_time = MIN(new_time, now() - t2);
            __asm__ volatile("" : : "r"(sum));
        }
        printf(
            "kernels %-6s 2 MiB: or+count %.1f GB/s, into new memory %.1f GB/s, count %.1f GB/s\n",
            k->name, LEN / or_time / 1e9, LEN / new_time / 1e9, LEN / count_time / 1e9);
    }
    mem_free(a);
    mem_free(b);
    mem_free(c);
}

int main(void)
{
    bench_kernels();
    bench_mark();
    bench_merge(TIB);
    bench_merge(16 * TIB);
    bench_sparse(TIB);
    bench_sparse(256 * TIB);
    bench_walk(TIB);
    return 0;
}
