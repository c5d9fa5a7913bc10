/* SPDX-License-Identifier: Apache-2.0 */
/* Random tests of bitmaps: operations on several bitmaps that share pages, each beside a model
 * which is a plain list of dirty intervals, with shapes and ranges at every edge; and lists of
 * changes that are taken back. */
#include "bitmap/bitmap_test.h"

typedef unsigned __int128 wide;

/* ---- the model: dirty blocks as sorted intervals that do not touch ---- */

#define RUNS_MAX 3000

struct run {
    uint64_t from, to;
};
struct model {
    uint64_t size;
    unsigned shift, n;
    struct run run[RUNS_MAX];
};

static uint64_t model_blocks(const struct model *m)
{
    return (uint64_t)(((wide)m->size + ((wide)1 << m->shift) - 1) >> m->shift);
}

/* Set or clear blocks [from, to). */
static void model_put(struct model *m, uint64_t from, uint64_t to, bool set)
{
    static struct run out[RUNS_MAX + 2];
    unsigned n = 0;
    bool placed = !set;
    if (from >= to)
        return;
    for (unsigned i = 0; i < m->n; i++) {
        struct run r = m->run[i];
        if (set && r.to >= from && r.from <= to) {
            from = MIN(from, r.from);
            to = MAX(to, r.to);
            continue;
        }
        if (set && !placed && r.from > to) {
            out[n++] = (struct run){from, to};
            placed = true;
        }
        if (set || r.to <= from || r.from >= to) {
            out[n++] = r;
            continue;
        }
        if (r.from < from)
            out[n++] = (struct run){r.from, from};
        if (r.to > to)
            out[n++] = (struct run){to, r.to};
    }
    if (!placed)
        out[n++] = (struct run){from, to};
    assert_true(n <= RUNS_MAX);
    memcpy(m->run, out, n * sizeof *out);
    m->n = n;
}

static bool model_has(const struct model *m, uint64_t block)
{
    for (unsigned i = 0; i < m->n; i++)
        if (m->run[i].from <= block && block < m->run[i].to)
            return true;
    return false;
}

static void model_mark(struct model *m, uint64_t off, uint64_t len)
{
    wide end = MIN((wide)off + len, (wide)m->size);
    if (len && off < end)
        model_put(m, off >> m->shift, (uint64_t)((end - 1) >> m->shift) + 1, true);
}

static void model_unmark(struct model *m, uint64_t off, uint64_t len)
{
    wide g = (wide)1 << m->shift, end = (wide)off + len;
    if (!len || off >= m->size)
        return;
    uint64_t to = end >= m->size ? model_blocks(m) : (uint64_t)(end / g);
    model_put(m, (uint64_t)((off + g - 1) / g), to, false);
}

static void model_merge(struct model *m, const struct model *src)
{
    for (unsigned i = 0; i < src->n; i++) {
        uint64_t off = src->run[i].from << src->shift;
        model_mark(m, off, (src->run[i].to << src->shift) - off);
    }
}

/* ---- comparing ---- */

struct unpacked {
    struct model *m;
    uint64_t bit;
};

static void unpack(void *arg, const uint8_t *bytes, uint64_t len)
{
    struct unpacked *u = arg;
    assert_true(len && len % 8 == 0);
    for (uint64_t i = 0; bytes && i < len; i++)
        for (unsigned k = 0; bytes[i] && k < 8; k++)
            if (bytes[i] >> k & 1)
                model_put(u->m, u->bit + i * 8 + k, u->bit + i * 8 + k + 1, true);
    u->bit += len * 8;
}

static void check_pack(const struct bitmap *b, const struct model *m)
{
    static struct model got;
    got.n = 0;
    struct unpacked u = {&got, 0};
    bitmap_pack(b, unpack, &u);
    assert_int_equal(u.bit, (model_blocks(m) + 63) / 64 * 64);
    assert_int_equal(got.n, m->n);
    assert_memory_equal(got.run, m->run, m->n * sizeof m->run[0]);
}

static void check(const struct bitmap *b, const struct model *m)
{
    uint64_t off = 0, len, at = 0, bits = 0;
    assert_int_equal(bitmap_size(b), m->size);
    assert_int_equal(bitmap_shift(b), m->shift);
    for (unsigned i = 0; i < m->n; i++) {
        uint64_t from = m->run[i].from << m->shift, to = MIN(m->run[i].to << m->shift, m->size);
        assert_true(bitmap_next_dirty(b, at, UINT64_MAX, &off, &len));
        assert_int_equal(off, from);
        assert_int_equal(off + len, to);
        assert_int_equal(bitmap_next_clean(b, from, UINT64_MAX), to);
        assert_int_equal(bitmap_next_clean(b, at, UINT64_MAX), at < from ? at : to);
        assert_true(bitmap_test(b, from) && bitmap_test(b, to - 1));
        assert_true(!from || !bitmap_test(b, from - 1));
        assert_false(bitmap_test(b, to));
        bits += m->run[i].to - m->run[i].from;
        at = to;
    }
    assert_false(bitmap_next_dirty(b, at, UINT64_MAX, &off, &len));
    assert_int_equal(bitmap_next_clean(b, at, UINT64_MAX), at);
    assert_int_equal(bitmap_count(b), bits);
    assert_int_equal(bitmap_empty(b), m->n == 0);
    if (bits < 200000 && m->n < 1000)
        check_pack(b, m);
}

/* A window anywhere: what next_dirty and next_clean cut off it. */
static void check_window(const struct bitmap *b, const struct model *m, uint64_t off, uint64_t end)
{
    uint64_t got_off = 7, got_len = 7, lim = MIN(end, m->size), clean = off;
    bool found = false;
    for (unsigned i = 0; i < m->n && off < lim; i++) {
        uint64_t from = m->run[i].from << m->shift, to = MIN(m->run[i].to << m->shift, lim);
        if (from <= off && off < to)
            clean = to;
        if (from >= lim || to <= off || found)
            continue;
        found = true;
        assert_true(bitmap_next_dirty(b, off, end, &got_off, &got_len));
        assert_int_equal(got_off, MAX(off, from));
        assert_int_equal(got_off + got_len, to);
    }
    if (!found)
        assert_false(bitmap_next_dirty(b, off, end, &got_off, &got_len));
    assert_int_equal(bitmap_next_clean(b, off, end), MIN(clean, lim));
}

/* ---- shapes ---- */

struct shape {
    uint64_t size;
    unsigned shift;
};

static const struct shape shapes[] = {
    {0, 9},
    {1, 9},
    {1, 16},
    {1, 31},
    {511, 9},
    {512, 9},
    {513, 9},
    {MIB + 7, 12},
    {(PAGE << 9) - 1, 9},
    {PAGE << 9, 9},
    {(PAGE << 9) + 1, 9},
    {(PAGE << 16) - 1, 16},
    {PAGE << 16, 16},
    {(PAGE << 16) + 1, 16},
    {(5 * PAGE + 70) << 10, 10},
    {(PAGE << 31) - 1, 31},
    {(PAGE << 31) + 1, 31},
    {(PAGE * 512 << 16) - 1, 16}, /* one table's worth of pages */
    {(PAGE * 512 << 16) + 1, 16},
    {(PAGE * 512 * 3 << 12) + 12345, 12},
    {256 * TIB, 16},
    {(PAGE * 512 * 512 << 9) + 513, 9},
    {(uint64_t)1 << 56, 9},
    {((uint64_t)1 << 56) - 3, 9},
    {INT64_MAX, 16},
    {INT64_MAX, 31},
    {((uint64_t)1 << 62) + 99, 17},
};

/* An offset which likes the places where pages, tables and the disk begin and end. */
static uint64_t some_offset(const struct shape *s)
{
    static const unsigned steps[] = {0, 0, 6, 15, 15, 24, 33, 42};
    unsigned step = steps[rnd(8)];
    uint64_t unit = step + s->shift < 63 ? (uint64_t)1 << (step + s->shift) : (uint64_t)1 << 62;
    uint64_t off = rnd(4) ? rnd(MIN(s->size / unit + 2, 6)) * unit : s->size / unit * unit;
    if (!rnd(4))
        off = rnd(s->size + 2);
    if (rnd(3))
        off += rnd(3) << s->shift;
    if (!rnd(3))
        off -= MIN(off, 1 + rnd((uint64_t)2 << s->shift));
    return !rnd(20) ? s->size - MIN(s->size, rnd(3)) : off;
}

static uint64_t some_length(const struct shape *s, uint64_t off)
{
    switch (rnd(6)) {
    case 0:
        return rnd(3);
    case 1:
        return rnd((uint64_t)300 << s->shift);
    case 2:
        return UINT64_MAX - rnd(3);
    case 3:
        return s->size - MIN(s->size, off) + rnd(2);
    default: {
        uint64_t to = some_offset(s);
        return to > off ? to - off : (uint64_t)1 << s->shift;
    }
    }
}

#define N 3 /* bitmaps of one shape that share pages, and one of another granularity */

struct world {
    struct shape shape;
    struct bitmap *b[N];
    struct model *m[N];
    struct bitmap_retired retired;
};

static void world_init(struct world *w, const struct shape *s)
{
    *w = (struct world){.shape = *s};
    for (unsigned i = 0; i < N; i++) {
        assert_int_equal(bitmap_new(s->size, s->shift, &w->b[i]), 0);
        w->m[i] = mem_new(struct model);
        w->m[i]->size = s->size;
        w->m[i]->shift = s->shift;
    }
}

static void world_fini(struct world *w)
{
    for (unsigned i = 0; i < N; i++) {
        bitmap_free(w->b[i]);
        mem_free(w->m[i]);
    }
    bitmap_retired_free(&w->retired);
    assert_null(w->retired.head);
    assert_int_equal(w->retired.n, 0);
}

static void step_mark(struct world *w, unsigned i)
{
    uint64_t off = some_offset(&w->shape), len = some_length(&w->shape, off);
    static struct model before;
    before = *w->m[i];
    model_mark(w->m[i], off, len);
    bool turned = before.n != w->m[i]->n ||
                  memcmp(before.run, w->m[i]->run, before.n * sizeof before.run[0]) != 0;
    assert_int_equal(bitmap_mark(w->b[i], off, len, &w->retired), turned);
}

static void step_take(struct world *w, unsigned i)
{
    uint64_t off = some_offset(&w->shape);
    bool there = off < w->shape.size && model_has(w->m[i], off >> w->shape.shift);
    assert_int_equal(bitmap_test(w->b[i], off), there);
    assert_int_equal(bitmap_take(w->b[i], off, &w->retired), there);
    assert_false(bitmap_test(w->b[i], off));
    if (there)
        model_put(w->m[i], off >> w->shape.shift, (off >> w->shape.shift) + 1, false);
}

/* Through another granularity, and the same way back: only ever more. */
static void step_convert(struct world *w, unsigned i)
{
    unsigned shift = BITMAP_SHIFT_MIN + (unsigned)rnd(BITMAP_SHIFT_MAX - BITMAP_SHIFT_MIN + 1);
    shift = MAX(shift, bitmap_min_shift(w->shape.size));
    static struct model m;
    m = (struct model){.size = w->shape.size, .shift = shift};
    model_merge(&m, w->m[i]);
    struct bitmap *c;
    assert_int_equal(bitmap_convert(w->b[i], shift, NULL, &c), 0);
    check(c, &m);
    unsigned j = (unsigned)rnd(N);
    assert_int_equal(bitmap_merge(w->b[j], c, NULL), 0);
    model_merge(w->m[j], &m);
    bitmap_free(c);
}

static void step_resized(struct world *w, unsigned i)
{
    static struct model m;
    m = *w->m[i];
    m.size = rnd(3) ? some_offset(&w->shape) : w->shape.size + rnd(3);
    m.size = MIN(m.size, INT64_MAX);
    if (bitmap_min_shift(m.size) > m.shift)
        return;
    model_put(&m, model_blocks(&m), UINT64_MAX, false);
    struct bitmap *c, *d;
    assert_int_equal(bitmap_resized(w->b[i], m.size, &c), 0);
    check(c, &m);
    bitmap_mark(c, 0, UINT64_MAX, &w->retired); /* a change of the copy does not show */
    assert_int_equal(bitmap_resized(c, w->shape.size, &d), 0);
    assert_int_equal(bitmap_count(d), MIN(model_blocks(&m), model_blocks(w->m[i])));
    bitmap_free(c);
    bitmap_free(d);
}

static void step_whole(struct world *w, unsigned i)
{
    unsigned j = (unsigned)rnd(N);
    switch (rnd(4)) {
    case 0:
        if (i != j) {
            bitmap_free(w->b[j]);
            assert_int_equal(bitmap_clone(w->b[i], NULL, &w->b[j]), 0);
            *w->m[j] = *w->m[i];
        }
        break;
    case 1: {
        bitmap_swap(w->b[i], w->b[j]);
        struct model *m = w->m[i];
        w->m[i] = w->m[j];
        w->m[j] = m;
        break;
    }
    case 2:
        if (!rnd(4)) {
            assert_int_equal(bitmap_set_all(w->b[i]), 0);
            model_mark(w->m[i], 0, UINT64_MAX);
            break;
        } /* fall through */
    default:
        assert_int_equal(bitmap_merge(w->b[i], w->b[j], NULL), 0);
        model_merge(w->m[i], w->m[j]);
    }
}

static void step(struct world *w)
{
    unsigned i = (unsigned)rnd(N);
    uint64_t off = some_offset(&w->shape), len = some_length(&w->shape, off);
    switch (rnd(12)) {
    case 0:
    case 1:
    case 2:
        step_mark(w, i);
        break;
    case 3:
    case 4:
    case 5:
        assert_int_equal(bitmap_unmark(w->b[i], off, len, &w->retired), 0);
        model_unmark(w->m[i], off, len);
        break;
    case 6:
        step_take(w, i);
        break;
    case 7:
        step_convert(w, i);
        break;
    case 8:
        step_resized(w, i);
        break;
    case 9:
        bitmap_retired_free(&w->retired);
        break;
    default:
        step_whole(w, i);
    }
    check_window(w->b[i], w->m[i], off, off + MIN(len, UINT64_MAX - off));
}

/* One thread has no races: few are enough where they take long. */
#ifdef __SANITIZE_THREAD__
#define N_STEPS 50u
#define N_LISTS 2u
#else
#define N_STEPS 250u
#define N_LISTS 10u
#endif

static void random_against_model(void **state)
{
    for (unsigned s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        struct world w;
        seed = 1000003 * (s + 1);
        world_init(&w, &shapes[s]);
        for (unsigned k = 0; k < N_STEPS; k++) {
            step(&w);
            for (unsigned i = 0; i < N; i++)
                check(w.b[i], w.m[i]);
        }
        world_fini(&w);
    }
}

/* ---- lists of changes, taken back or kept ---- */

/* What an action of a list has done to bitmap i, and how to take it back. */
struct change {
    struct bitmap_undo *undo; /* a merge */
    struct bitmap *old;       /* a clear; or the other side of a swap */
    unsigned i, j;
    enum { MERGED, CLEARED, SWAPPED } kind;
    struct model before[2]; /* of i, and of j for a swap */
};

#define LIST 12u

static void change_undo(struct world *w, struct change *c)
{
    if (c->kind == MERGED)
        bitmap_undo_unwind(c->undo);
    else if (c->kind == CLEARED)
        bitmap_swap(w->b[c->i], c->old);
    else
        bitmap_swap(w->b[c->i], w->b[c->j]);
    *w->m[c->i] = c->before[0];
    *w->m[c->j] = c->before[1];
}

/* In pieces of a random size. */
static void change_free(struct change *c)
{
    if (c->undo)
        while (!bitmap_undo_free_some(c->undo, &(unsigned){1 + (unsigned)rnd(5)}))
            ;
    if (c->old)
        while (!bitmap_free_some(c->old, &(unsigned){1 + (unsigned)rnd(5)}))
            ;
}

/* Up to three sources, now and then the target itself, now and then one of another granularity. */
static void change_merge(struct world *w, struct change *c)
{
    static struct model m;
    c->kind = MERGED;
    assert_int_equal(bitmap_undo_new(NULL, NULL, &c->undo), 0);
    for (uint64_t n = 1 + rnd(3); n; n--) {
        unsigned j = (unsigned)rnd(N), shift = w->shape.shift;
        struct bitmap *b = w->b[j];
        if (!rnd(3)) {
            shift = BITMAP_SHIFT_MIN + (unsigned)rnd(BITMAP_SHIFT_MAX - BITMAP_SHIFT_MIN + 1);
            shift = MAX(shift, bitmap_min_shift(w->shape.size));
            assert_int_equal(bitmap_convert(w->b[j], shift, NULL, &b), 0);
        }
        m = (struct model){.size = w->shape.size, .shift = shift};
        model_merge(&m, w->m[j]);
        assert_int_equal(bitmap_merge_undoable(w->b[c->i], b, c->undo), 0);
        model_merge(w->m[c->i], &m);
        if (b != w->b[j]) {
            check(b, &m); /* the source stays */
            bitmap_free(b);
        }
    }
}

static void change_do(struct world *w, struct change *c)
{
    memset(c, 0, offsetof(struct change, before));
    c->i = c->j = (unsigned)rnd(N);
    c->before[0] = *w->m[c->i];
    switch (rnd(5)) {
    case 0:
        c->kind = CLEARED;
        assert_int_equal(bitmap_new(w->shape.size, w->shape.shift, &c->old), 0);
        bitmap_swap(w->b[c->i], c->old);
        w->m[c->i]->n = 0;
        break;
    case 1:
        c->kind = SWAPPED;
        c->j = (unsigned)rnd(N);
        bitmap_swap(w->b[c->i], w->b[c->j]);
        *w->m[c->i] = *w->m[c->j];
        if (c->i != c->j) {
            c->before[1] = *w->m[c->j];
            *w->m[c->j] = c->before[0];
            return;
        }
        break;
    default:
        change_merge(w, c);
    }
    c->before[1] = c->before[0];
}

/* Taken back as a whole or from somewhere on; then everything is marked and cleaned as if nothing
 * had been, and what the list has replaced goes before, after, or while that happens. */
static void list_once(struct world *w)
{
    static struct change list[LIST];
    unsigned n = 1 + (unsigned)rnd(LIST), kept = rnd(3) ? 0 : (unsigned)rnd(n + 1);
    for (unsigned k = 0; k < n; k++) {
        change_do(w, &list[k]);
        for (unsigned i = 0; i < N; i++)
            check(w->b[i], w->m[i]);
    }
    for (unsigned k = n; k-- > kept;) {
        change_undo(w, &list[k]);
        for (unsigned i = 0; i < N; i++)
            check(w->b[i], w->m[i]);
    }
    for (unsigned k = n; k-- > 0;) { /* discards go last to first */
        if (rnd(2))
            step(w);
        change_free(&list[k]);
        for (unsigned i = 0; i < N; i++)
            check(w->b[i], w->m[i]);
    }
}

static void random_lists_taken_back(void **state)
{
    for (unsigned s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        struct world w;
        seed = 2000003 * (s + 1);
        world_init(&w, &shapes[s]);
        for (unsigned k = 0; k < N_LISTS; k++) {
            for (unsigned j = 0; j < 8; j++)
                step(&w);
            list_once(&w);
        }
        world_fini(&w);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(random_against_model),
        cmocka_unit_test(random_lists_taken_back),
    };
    return cmocka_run_group_tests_name("bitmap_random", tests, NULL, NULL);
}
