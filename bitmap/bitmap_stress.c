/* SPDX-License-Identifier: Apache-2.0 */
/* Threads that mark against a control loop that freezes, clears, clones and merges behind a gate.
 *
 * Three loops mark two bitmaps and an array of flags, the oracle, inside a gate; one of them also
 * takes and unmarks in a region of its own. A reader walks one of the bitmaps all the time. The
 * control loop closes the gate, waits for those inside, checks that no mark is lost and that counts
 * are exact, rearranges the bitmaps so that they share pages in changing ways, and opens the gate
 * again. What markers retire comes by a mailbox and is freed after a grace round. Arguments:
 * seconds (3), and "starve" to let allocations fail at random. Exit 0: nothing lost, nothing
 * miscounted. Leaks are for the leak checker to find.
 *
 * The litmus test at the end: two threads each set a bit in a bitmap of theirs and then look for
 * the other's. At least one must see it. It is what the journal relies on when it reads what
 * writers mark. */
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "base/bytes.h"
#include "base/mem.h"
#include "base/spin.h"
#include "bitmap/bitmap.h"

#define N_LOOPS 4u /* three that mark, one that reads */
#define N_MARKERS 3u
#define SHIFT 9u
#define PAGES 1030u /* three tables, the last page partial */
#define BLOCKS (PAGES * (uint64_t)32768 - 1000)
#define SIZE (BLOCKS << SHIFT)
#define HOT 40u                              /* pages, spread over the disk */
#define RUN_MAX 40000                        /* blocks: more than a page */
#define OWN_BASE ((uint64_t)700 * 32768 + 5) /* where marker 0 alone marks and cleans */
#define OWN_BLOCKS 70000u
#define LITMUS_BITS 512u

struct loop {
    unsigned index;
    atomic_long inside, ack;
    struct bitmap_retired retired;
    uint64_t seed;
    uint8_t *own; /* marker 0: its region as it should be */
    unsigned long n_marks, n_wrong;
    bool starve;
    char pad[64];
};

static struct {
    struct loop loop[N_LOOPS];
    atomic_int closed;
    atomic_long grace;
    atomic_bool stop;
    atomic_ulong spot; /* where the markers are */
    struct spin mailbox_lock;
    struct bitmap_retired mailbox;
    struct bitmap *a, *b;
    struct bitmap_pool *pool;
    _Atomic uint64_t *truth; /* blocks marked since a was cleared last */
    struct bitmap *x, *y;    /* litmus */
    atomic_uint litmus_go, litmus_done;
    bool saw[2][LITMUS_BITS];
} g = {.mailbox_lock = SPIN_INIT};

static uint64_t rnd(uint64_t *seed)
{
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    return *seed;
}

/* The linker sends mem_alloc() here (--wrap). Markers call it between copying a page and publishing
 * the copy, which is where another thread does most harm: let one run. */
void *__real_mem_alloc(size_t size);
void *__wrap_mem_alloc(size_t size);
void *__wrap_mem_alloc(size_t size)
{
    sched_yield();
    return __real_mem_alloc(size);
}

static void must(int r)
{
    if (r < 0) {
        fprintf(stderr, "bitmap_stress: error %d\n", -r);
        abort();
    }
}

/* ---- loops ---- */

static void turn_begin(struct loop *l)
{
    if (l->retired.n) {
        spin_lock(&g.mailbox_lock);
        bitmap_retired_move(&g.mailbox, &l->retired);
        spin_unlock(&g.mailbox_lock);
    }
    long round = atomic_load(&g.grace);
    if (atomic_load(&l->ack) != round) {
        atomic_store(&l->ack, round);
        sched_yield(); /* there are more threads than processors: let the others pass, too */
    }
}

static void gate_enter(struct loop *l)
{
    for (;;) {
        atomic_fetch_add(&l->inside, 1);
        if (!atomic_load(&g.closed))
            return;
        atomic_fetch_sub(&l->inside, 1);
        turn_begin(l);
        sched_yield();
    }
}

static void gate_leave(struct loop *l)
{
    atomic_fetch_sub(&l->inside, 1);
}

static bool in_own(uint64_t block, uint64_t n)
{
    return block + n > OWN_BASE && block < OWN_BASE + OWN_BLOCKS;
}

/* Mostly a block in the one or two words where all markers are at the moment; these words wander
 * from page to page, so that copying a page and writing into it meet. Now and then anywhere, and
 * long runs that cover pages. */
static void mark_somewhere(struct loop *l)
{
    uint64_t r = rnd(&l->seed), n = 1, spot = atomic_load_explicit(&g.spot, memory_order_relaxed);
    uint64_t block = spot * 5 % PAGES * 32768 + spot * 7 % 500 * 64 + r % 128;
    if (!(r >> 20 & 31))
        atomic_store_explicit(&g.spot, spot + 1, memory_order_relaxed);
    if (r >> 60 == 0)
        block = (r >> 20) % HOT * (PAGES / HOT) * 32768 + r % 32768;
    if (r >> 59 == 2)
        block = BLOCKS - 1 - r % 3000; /* the partial page */
    block = MIN(block, BLOCKS - 1);
    if (r >> 53 == 0)
        n = rnd(&l->seed) % RUN_MAX;
    n = MIN(n, BLOCKS - block);
    if (!n || in_own(block, n))
        return;
    bitmap_mark(g.a, block << SHIFT, n << SHIFT, &l->retired);
    bitmap_mark(g.b, (block << SHIFT) + 7, (n << SHIFT) - 7, &l->retired);
    for (uint64_t i = block; i < block + n; i++) {
        uint64_t m = (uint64_t)1 << i % 64;
        if (!(atomic_load_explicit(&g.truth[i / 64], memory_order_relaxed) & m))
            atomic_fetch_or(&g.truth[i / 64], m);
    }
    l->n_marks++;
}

/* Nobody else touches these blocks, but their pages: every answer is known. */
static void own_region(struct loop *l)
{
    uint64_t r = rnd(&l->seed), i = r % OWN_BLOCKS, n = (r >> 32) % 200, off;
    n = r >> 56 == 0 ? OWN_BLOCKS - i : MIN(n, OWN_BLOCKS - i);
    off = (OWN_BASE + i) << SHIFT;
    switch (r >> 52 & 3) {
    case 0: {
        bitmap_mark(g.a, off, n << SHIFT, &l->retired);
        memset(l->own + i, 1, n);
        break;
    }
    case 1:
        /* Without memory some of them stay: then both answers are right. */
        bitmap_unmark(g.a, off, n << SHIFT, &l->retired);
        memset(l->own + i, 0, n);
        break;
    default: {
        int t = bitmap_take(g.a, off, &l->retired);
        if (t >= 0) {
            /* without memory, more may have been marked */
            l->n_wrong += l->starve ? t < l->own[i] : t != l->own[i];
            l->own[i] = 0;
        }
    }
    }
}

static void *marker_main(void *arg)
{
    struct loop *l = arg;
    while (!atomic_load(&g.stop)) {
        turn_begin(l);
        for (unsigned k = 0; k < 16; k++) {
            gate_enter(l);
            mark_somewhere(l);
            if (!l->index)
                own_region(l);
            gate_leave(l);
            if (!(l->seed & 15))
                sched_yield();
            if (l->starve && !(rnd(&l->seed) & 63))
                mem_fail_after(1 + (l->seed >> 9 & 3));
        }
    }
    turn_begin(l);
    atomic_store(&l->ack, LONG_MAX);
    return NULL;
}

/* Reads without the gate: what a query or an export on another loop does. */
static void *reader_main(void *arg)
{
    struct loop *l = arg;
    while (!atomic_load(&g.stop)) {
        uint64_t off = rnd(&l->seed) % SIZE, len = 0;
        for (unsigned k = 0; k < 4; k++) {
            turn_begin(l);
            if (!bitmap_next_dirty(g.a, off, SIZE, &off, &len))
                break;
            l->n_wrong += !len || off + len > SIZE;
            off += len;
        }
        turn_begin(l);
        l->n_wrong += bitmap_next_clean(g.a, off, SIZE) > SIZE;
        turn_begin(l);
        l->n_wrong += bitmap_count(g.a) > BLOCKS + 200000; /* approximate, not absurd */
        l->n_marks++;
    }
    atomic_store(&l->ack, LONG_MAX);
    return NULL;
}

/* ---- the control loop ---- */

static void quiesce(void)
{
    atomic_store(&g.closed, 1);
    for (unsigned i = 0; i < N_MARKERS; i++)
        while (atomic_load(&g.loop[i].inside))
            sched_yield();
}

static void reopen(void)
{
    atomic_store(&g.closed, 0);
}

/* One grace round, then what was retired before it, and what readers might have seen: a bitmap, and
 * what merges have replaced. */
static void reap(struct bitmap *old, struct bitmap_undo *undo)
{
    struct bitmap_retired r = {0};
    spin_lock(&g.mailbox_lock);
    bitmap_retired_move(&r, &g.mailbox);
    spin_unlock(&g.mailbox_lock);
    long round = atomic_fetch_add(&g.grace, 1) + 1;
    for (unsigned i = 0; i < N_LOOPS; i++)
        while (atomic_load(&g.loop[i].ack) < round)
            sched_yield();
    bitmap_retired_free(&r);
    bitmap_free(old);
    while (undo && !bitmap_undo_free_some(undo, &(unsigned){20}))
        sched_yield();
}

static unsigned long n_lost, n_miscounted, n_rounds;

static uint64_t bits_by_runs(const struct bitmap *b)
{
    uint64_t off = 0, len, n = 0;
    while (bitmap_next_dirty(b, off, SIZE, &off, &len)) {
        n += len >> SHIFT;
        off += len;
    }
    return n;
}

/* How many of the marks in truth the bitmap does not have. Runs that are dirty are passed quickly.
 */
static unsigned long lost_in(const struct bitmap *b)
{
    unsigned long lost = 0;
    uint64_t good = 0; /* blocks before this are known to be dirty */
    for (uint64_t i = 0; i < BLOCKS; i += 64) {
        uint64_t w = atomic_load_explicit(&g.truth[i / 64], memory_order_relaxed);
        if (!w || i + 64 <= good)
            continue;
        for (uint64_t k = i; w; k++, w >>= 1)
            lost += w & 1 && !bitmap_test(b, k << SHIFT);
        good = bitmap_next_clean(b, i << SHIFT, SIZE) >> SHIFT;
    }
    return lost;
}

/* Quiesced. */
static void check(void)
{
    n_lost += lost_in(g.a) + lost_in(g.b);
    n_miscounted += bits_by_runs(g.a) != bitmap_count(g.a);
    n_miscounted += bits_by_runs(g.b) != bitmap_count(g.b);
    struct loop *l = &g.loop[0];
    for (uint64_t i = 0; i < OWN_BLOCKS; i++) {
        bool dirty = bitmap_test(g.a, (OWN_BASE + i) << SHIFT);
        n_lost += l->starve ? dirty < l->own[i] : dirty != l->own[i];
    }
}

static void own_taken(void)
{
    memset(g.loop[0].own, 0, OWN_BLOCKS);
}

/* b becomes what a is, by way of a bitmap that nobody reads yet. The old b is given back. */
static struct bitmap *replace_b(void)
{
    struct bitmap *c;
    must(bitmap_clone(g.a, NULL, &c));
    bitmap_swap(g.b, c);
    return c;
}

/* a |= what b had, b |= a, and now and then it is taken back; all under the eyes of the reader. */
static struct bitmap_undo *merge_both(bool back)
{
    struct bitmap_undo *u;
    must(bitmap_undo_new(g.pool, NULL, &u));
    uint8_t *own = g.loop[0].own;
    uint64_t n = bitmap_count(g.a) + bitmap_count(g.b);
    for (uint64_t i = 0; !back && i < OWN_BLOCKS; i++)
        own[i] |= bitmap_test(g.b, (OWN_BASE + i) << SHIFT);
    must(bitmap_merge_undoable(g.a, g.b, u));
    must(bitmap_merge_undoable(g.b, g.a, u));
    n_miscounted += bits_by_runs(g.a) != bits_by_runs(g.b);
    if (back) {
        bitmap_undo_unwind(u);
        n_miscounted += bitmap_count(g.a) + bitmap_count(g.b) != n;
    }
    return u;
}

/* The bits go to a job and a empty successor records; later they come back by a merge. */
static struct bitmap *clear_a(void)
{
    struct bitmap *c;
    must(bitmap_new(SIZE, SHIFT, &c));
    bitmap_swap(g.a, c);
    memset(g.truth, 0, (BLOCKS / 64 + 1) * sizeof *g.truth);
    own_taken();
    return c;
}

/* ---- litmus ---- */

/* Bits in cache lines of their own, on pages that are there. The sides start together and run
 * through all pairs; whoever is second at a pair must see the bit of the first. */
static void litmus_side(unsigned side, struct bitmap_retired *r)
{
    struct bitmap *mine = side ? g.y : g.x, *other = side ? g.x : g.y;
    for (uint64_t i = 0; i < LITMUS_BITS; i++) {
        bitmap_mark(mine, i * 512 << SHIFT, 1, r);
        g.saw[side][i] = bitmap_test(other, i * 512 << SHIFT);
    }
}

/* A few turns in the hope that the other thread is on the other processor, then give way. */
static unsigned litmus_wait(atomic_uint *word, unsigned at_least)
{
    unsigned v;
    for (unsigned n = 1; (v = atomic_load(word)) < at_least; n++)
        if (!(n & 1023))
            sched_yield();
    return v;
}

static void *litmus_main(void *arg)
{
    struct bitmap_retired r = {0};
    for (unsigned round = 1; litmus_wait(&g.litmus_go, round) != UINT_MAX; round++) {
        litmus_side(1, &r);
        atomic_store(&g.litmus_done, round);
    }
    bitmap_retired_free(&r);
    return NULL;
}

static void litmus_clean(struct bitmap *b, struct bitmap_retired *r)
{
    for (uint64_t i = 0; i < LITMUS_BITS; i++)
        bitmap_take(b, i * 512 << SHIFT, r);
}

static unsigned long litmus(double seconds)
{
    struct bitmap_retired r = {0};
    unsigned long broken = 0;
    unsigned round = 0;
    pthread_t t;
    must(bitmap_new((uint64_t)LITMUS_BITS * 512 << SHIFT, SHIFT, &g.x));
    must(bitmap_new((uint64_t)LITMUS_BITS * 512 << SHIFT, SHIFT, &g.y));
    pthread_create(&t, NULL, litmus_main, NULL);
    time_t end = time(NULL) + (time_t)seconds;
    do {
        atomic_store(&g.litmus_go, ++round);
        for (unsigned spin = 0; spin < (round & 255); spin++)
            __asm__ volatile("");
        litmus_side(0, &r);
        litmus_wait(&g.litmus_done, round);
        for (unsigned i = 0; i < LITMUS_BITS; i++)
            broken += !g.saw[0][i] && !g.saw[1][i];
        litmus_clean(g.x, &r); /* pages stay */
        litmus_clean(g.y, &r);
    } while (time(NULL) <= end);
    atomic_store(&g.litmus_go, UINT_MAX);
    pthread_join(t, NULL);
    bitmap_retired_free(&r);
    bitmap_free(g.x);
    bitmap_free(g.y);
    printf("litmus: %u rounds of %u, %lu broken\n", round, LITMUS_BITS, broken);
    return broken;
}

/* ---- all of it ---- */

static void round_once(struct bitmap **frozen, uint64_t *seed)
{
    struct bitmap *old = NULL;
    struct bitmap_undo *undo = NULL;
    quiesce();
    check();
    switch (rnd(seed) % 8) {
    case 0:
        old = clear_a();
        break;
    case 1:
    case 2:
        old = replace_b();
        break;
    case 3:
    case 4:
        undo = merge_both(rnd(seed) % 2);
        break;
    case 5:
        must(bitmap_merge(g.b, g.a, NULL)); /* in place: nobody reads b */
        break;
    default:
        if (!*frozen)
            must(bitmap_clone(g.a, NULL, frozen));
    }
    uint64_t n = *frozen ? bitmap_count(*frozen) : 0;
    reopen();
    if (*frozen && rnd(seed) % 4) { /* the last other owner goes while markers copy its pages */
        if (rnd(seed) % 2)
            n_miscounted += bits_by_runs(*frozen) != n;
        bitmap_free(*frozen);
        *frozen = NULL;
    }
    reap(old, undo); /* while the markers run */
    n_rounds++;
}

static unsigned long summary(void)
{
    unsigned long marks = 0, wrong = 0;
    for (unsigned i = 0; i < N_LOOPS; i++) {
        marks += i < N_MARKERS ? g.loop[i].n_marks : 0;
        wrong += g.loop[i].n_wrong;
    }
    printf("rounds %lu, marks %lu, reads %lu: lost %lu, miscounted %lu, wrong answers %lu\n",
           n_rounds, marks, g.loop[N_MARKERS].n_marks, n_lost, n_miscounted, wrong);
    return n_lost + n_miscounted + wrong;
}

int main(int argc, char **argv)
{
    double seconds = argc > 1 ? atof(argv[1]) : 3;
    bool starve = argc > 2 && !strcmp(argv[2], "starve");
    uint64_t seed = 20240607;
    pthread_t t[N_LOOPS];
    must(bitmap_pool_new(&g.pool));
    must(bitmap_new(SIZE, SHIFT, &g.a));
    must(bitmap_new(SIZE, SHIFT, &g.b));
    g.truth = mem_zalloc((BLOCKS / 64 + 1) * sizeof *g.truth);
    uint8_t *own = mem_zalloc(OWN_BLOCKS);
    if (!g.truth || !own)
        must(-1);
    for (unsigned i = 0; i < N_LOOPS; i++) {
        struct loop *l = &g.loop[i];
        l->index = i;
        l->seed = (i + 1) * 0x9E3779B97F4A7C15u;
        l->own = own;
        l->starve = starve;
        pthread_create(&t[i], NULL, i < N_MARKERS ? marker_main : reader_main, l);
    }
    struct bitmap *frozen = NULL;
    time_t end = time(NULL) + (time_t)(seconds * 2 / 3);
    do
        round_once(&frozen, &seed);
    while (time(NULL) <= end);
    atomic_store(&g.stop, true);
    for (unsigned i = 0; i < N_LOOPS; i++)
        pthread_join(t[i], NULL);
    check();
    reap(frozen, NULL);
    bitmap_free(g.a);
    bitmap_free(g.b);
    bitmap_pool_free(g.pool);
    mem_free(g.truth);
    mem_free(own);
    unsigned long bad = summary();
    return litmus(seconds / 3) + bad != 0;
}
