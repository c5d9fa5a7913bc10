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
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t); /* others use the machine, too */
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

struct copy {
    char *from, *to;
    size_t len;
};

static struct copy copy_new(size_t len)
{
    struct copy c = {mem_alloc(len), mem_alloc(len), len};
    if (!c.from || !c.to)
        must(-1);
    memset(c.from, 1, len);
    memset(c.to, 2, len);
    return c;
}

static double copy_time(struct copy *c)
{
    double t = now();
    memcpy(c->to, c->from, c->len);
    __asm__ volatile("" ::: "memory");
    return now() - t;
}

static void copy_free(struct copy *c)
{
    mem_free(c->from);
    mem_free(c->to);
}

static int compare_doubles(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double median(double *v, unsigned n)
{
    qsort(v, n, sizeof *v, compare_doubles);
    return v[n / 2];
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

struct merge_times {
    double merge, unwind, gone;
};

/* As a transaction does: all pages of the result are new memory, the log is unwound, and what was
 * made is freed. */
static struct merge_times merge_undoable(struct bitmap *dst, struct bitmap *src,
                                         struct bitmap_pool *pool)
{
    struct bitmap_undo *u;
    must(bitmap_undo_new(pool, NULL, &u));
    double t0 = now();
    must(bitmap_merge_undoable(dst, src, u));
    double t1 = now();
    bitmap_undo_unwind(u);
    double t2 = now();
    bitmap_undo_free_some(u, &(unsigned){UINT_MAX});
    return (struct merge_times){t1 - t0, t2 - t1, now() - t2};
}

#define PAIRS (6 * ROUNDS)

/* Each round measures memcpy of as many bytes as the result has and a merge, one right after the
 * other, and the percentage is the median of those of the rounds: what others do to the caches
 * comes and goes with both. The first merge gets its memory from the kernel, later ones from the
 * pool. A merge reads two bytes and writes one for each of the result, where memcpy reads one: the
 * second percentage compares with as many bytes moved by memcpy. */
static void bench_merge(uint64_t size)
{
    struct copy copy = copy_new(size >> 19);
    struct bitmap *src = make_dense(size, 1), *dst = make_target(size);
    struct bitmap_pool *pool;
    static double ratio[PAIRS], in_place[PAIRS];
    must(bitmap_pool_new(&pool));
    struct merge_times first = merge_undoable(dst, src, pool), best = first;
    double best_copy = 1e9, best_in_place = 1e9;
    for (unsigned k = 0; k < PAIRS; k++) {
        double c = copy_time(&copy);
        struct merge_times t = merge_undoable(dst, src, pool);
        ratio[k] = c / t.merge * 100;
        best.merge = MIN(best.merge, t.merge);
        best.unwind = MIN(best.unwind, t.unwind);
        best.gone = MIN(best.gone, t.gone);
        best_copy = MIN(best_copy, c);
    }
    for (unsigned k = 0; k < PAIRS; k++) {
        double c = copy_time(&copy), t0 = now();
        must(bitmap_merge(dst, src, NULL));
        double t = now() - t0;
        in_place[k] = c / t * 100;
        best_in_place = MIN(best_in_place, t);
    }
    double r = median(ratio, PAIRS), p = median(in_place, PAIRS);
    printf("dense, %zu MiB flat: memcpy %.3f ms; merge in place %.3f ms (%.0f %%, %.0f %%); "
           "undoable %.3f ms (%.0f %%, %.0f %%), into memory from the kernel %.3f ms; unwound in "
           "%.3f ms, freed in %.3f ms\n",
           copy.len >> 20, best_copy * 1e3, best_in_place * 1e3, p, p * 1.5, best.merge * 1e3, r,
           r * 1.5, first.merge * 1e3, best.unwind * 1e3, best.gone * 1e3);
    copy_free(&copy);
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
