/* SPDX-License-Identifier: Apache-2.0 */
/* Sparse bytes for the simulated disk; see sim_store.h for the shape. Every change goes through
 * remove_chunks() and insert_span(), which keep the list sorted, free of overlaps and with
 * neighbouring zero spans joined: prewriting 64 MiB of zeros costs one span. */
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "base/bytes.h"
#include "io/sim_store.h"
#include <assert.h>
#include <stdio.h>
#include <stdlib.h>

struct sim_chunk {
    unsigned refs;
    unsigned char data[SIM_CHUNK];
};

/* ------------------------------------------------------------------ chance and memory */

uint64_t sim_rand(struct sim_rng *r)
{
    uint64_t z = (r->state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

uint64_t sim_below(struct sim_rng *r, uint64_t n)
{
    assert(n > 0);
    return sim_rand(r) % n; /* the bias is no matter here */
}

bool sim_percent(struct sim_rng *r, unsigned percent)
{
    return sim_below(r, 100) < percent;
}

static void *or_die(void *p)
{
    if (!p) {
        fputs("simulator: out of memory\n", stderr);
        abort();
    }
    return p;
}

void *sim_alloc(size_t size)
{
    return or_die(calloc(1, size ? size : 1));
}

void *sim_grow(void *p, size_t n, size_t size)
{
    return or_die(reallocarray(p, n ? n : 1, size));
}

bool sim_is_zero(const void *buf, size_t len)
{
    const unsigned char *p = buf;
    return len == 0 || (p[0] == 0 && memcmp(p, p + 1, len - 1) == 0);
}

/* ------------------------------------------------------------------ chunks */

static struct sim_chunk *chunk_new(void)
{
    struct sim_chunk *c = sim_alloc(sizeof *c);
    c->refs = 1;
    return c;
}

static void chunk_put(struct sim_chunk *c)
{
    if (c && --c->refs == 0)
        free(c);
}

static struct sim_chunk *chunk_get(struct sim_chunk *c)
{
    if (c)
        c->refs++;
    return c;
}

/* ------------------------------------------------------------------ spans */

static uint64_t span_end(const struct sim_span *s)
{
    return s->at + s->n;
}

/* Index of the first span that ends after chunk `at`. */
static size_t find(const struct sim_store *s, uint64_t at)
{
    size_t lo = 0, hi = s->n;
    if (hi && span_end(&s->spans[hi - 1]) <= at)
        return hi; /* appending is the common case */
    while (lo < hi) {
        size_t mid = lo + (hi - lo) / 2;
        if (span_end(&s->spans[mid]) <= at)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

static void make_room(struct sim_store *s, size_t i, size_t n)
{
    if (s->n + n > s->cap) {
        s->cap = MAX(s->cap * 2, s->n + n + 8);
        s->spans = sim_grow(s->spans, s->cap, sizeof *s->spans);
    }
    memmove(s->spans + i + n, s->spans + i, (s->n - i) * sizeof *s->spans);
    s->n += n;
}

static void drop(struct sim_store *s, size_t i, size_t n)
{
    if (n == 0)
        return;
    memmove(s->spans + i, s->spans + i + n, (s->n - i - n) * sizeof *s->spans);
    s->n -= n;
}

/* No span crosses the chunk `at` afterwards. Index of the first span at or behind it. */
static size_t split(struct sim_store *s, uint64_t at)
{
    size_t i = find(s, at);
    if (i == s->n || s->spans[i].at >= at)
        return i;
    make_room(s, i + 1, 1);
    s->spans[i + 1] = (struct sim_span){at, span_end(&s->spans[i]) - at, NULL};
    s->spans[i].n = at - s->spans[i].at;
    return i + 1;
}

/* Make [at, at+n) a hole. Index where a span for it would be inserted. */
static size_t remove_chunks(struct sim_store *s, uint64_t at, uint64_t n)
{
    split(s, at + n);
    size_t first = split(s, at), last = find(s, at + n);
    for (size_t i = first; i < last; i++) {
        s->n_chunks -= s->spans[i].n;
        chunk_put(s->spans[i].data);
    }
    drop(s, first, last - first);
    return first;
}

static bool joins(const struct sim_span *a, const struct sim_span *b)
{
    return !a->data && !b->data && span_end(a) == b->at;
}

/* [at, at+n) is a hole; `i` is where it belongs. Owns `data`. */
static void insert_span(struct sim_store *s, size_t i, struct sim_span span)
{
    s->n_chunks += span.n;
    if (i > 0 && joins(&s->spans[i - 1], &span)) {
        i--;
        s->spans[i].n += span.n;
    } else {
        make_room(s, i, 1);
        s->spans[i] = span;
    }
    if (i + 1 < s->n && joins(&s->spans[i], &s->spans[i + 1])) {
        s->spans[i].n += s->spans[i + 1].n;
        drop(s, i + 1, 1);
    }
}

/* The data of chunk `at`, ours alone, zeroed if it was none. */
static unsigned char *chunk_for_write(struct sim_store *s, uint64_t at)
{
    size_t i = find(s, at);
    if (i < s->n && s->spans[i].at <= at && s->spans[i].data) {
        struct sim_chunk *old = s->spans[i].data;
        if (old->refs > 1) {
            struct sim_chunk *own = chunk_new();
            memcpy(own->data, old->data, SIM_CHUNK);
            chunk_put(old);
            s->spans[i].data = own;
        }
        return s->spans[i].data->data;
    }
    i = remove_chunks(s, at, 1);
    struct sim_chunk *c = chunk_new();
    insert_span(s, i, (struct sim_span){at, 1, c});
    return c->data;
}

/* ------------------------------------------------------------------ the store */

void store_fini(struct sim_store *s)
{
    for (size_t i = 0; i < s->n; i++)
        chunk_put(s->spans[i].data);
    free(s->spans);
    *s = (struct sim_store){0};
}

void store_copy(struct sim_store *to, const struct sim_store *from)
{
    *to = *from;
    to->cap = from->n;
    to->spans = sim_grow(NULL, from->n, sizeof *to->spans);
    for (size_t i = 0; i < from->n; i++) {
        to->spans[i] = from->spans[i];
        chunk_get(to->spans[i].data);
    }
}

void store_read(const struct sim_store *s, uint64_t off, void *buf, size_t len)
{
    unsigned char *p = buf;
    uint64_t end = off + len;
    memset(p, 0, len);
    for (size_t i = find(s, off / SIM_CHUNK); i < s->n; i++) {
        const struct sim_span *span = &s->spans[i];
        uint64_t base = span->at * SIM_CHUNK;
        if (base >= end)
            break;
        if (!span->data)
            continue;
        uint64_t from = MAX(base, off), to = MIN(base + SIM_CHUNK, end);
        memcpy(p + (from - off), span->data->data + (from - base), to - from);
    }
}

void store_write(struct sim_store *s, uint64_t off, const void *buf, size_t len)
{
    const unsigned char *p = buf;
    while (len) {
        uint64_t at = off / SIM_CHUNK, skip = off % SIM_CHUNK;
        size_t n = MIN(len, SIM_CHUNK - skip);
        if (n == SIM_CHUNK && sim_is_zero(p, n))
            insert_span(s, remove_chunks(s, at, 1), (struct sim_span){at, 1, NULL});
        else
            memcpy(chunk_for_write(s, at) + skip, p, n);
        p += n;
        off += n;
        len -= n;
    }
}

/* Part of one chunk. Where nothing is allocated, `allocate` makes a whole chunk of zeros. */
static void zero_part(struct sim_store *s, uint64_t off, uint64_t len, bool allocate)
{
    uint64_t at = off / SIM_CHUNK;
    size_t i = find(s, at);
    bool there = i < s->n && s->spans[i].at <= at;
    if (len == 0)
        return;
    if (there && s->spans[i].data)
        memset(chunk_for_write(s, at) + off % SIM_CHUNK, 0, len);
    else if (!there && allocate)
        insert_span(s, i, (struct sim_span){at, 1, NULL});
}

static void clear(struct sim_store *s, uint64_t off, uint64_t len, bool allocate)
{
    uint64_t first = round_up(off, SIM_CHUNK), end = off + len, last = round_down(end, SIM_CHUNK);
    if (first > last) { /* inside one chunk */
        zero_part(s, off, len, allocate);
        return;
    }
    zero_part(s, off, first - off, allocate);
    zero_part(s, last, end - last, allocate);
    if (first == last)
        return;
    uint64_t at = first / SIM_CHUNK, n = (last - first) / SIM_CHUNK;
    size_t i = remove_chunks(s, at, n);
    if (allocate)
        insert_span(s, i, (struct sim_span){at, n, NULL});
}

void store_zero(struct sim_store *s, uint64_t off, uint64_t len)
{
    clear(s, off, len, true);
}

void store_punch(struct sim_store *s, uint64_t off, uint64_t len)
{
    clear(s, off, len, false);
}

bool store_extent(const struct sim_store *s, uint64_t off, uint64_t *len)
{
    uint64_t at = off / SIM_CHUNK, end = off + *len;
    size_t i = find(s, at);
    bool data = i < s->n && s->spans[i].at <= at;
    uint64_t until = UINT64_MAX / SIM_CHUNK;
    if (data)
        for (until = span_end(&s->spans[i]); ++i < s->n && s->spans[i].at == until;)
            until = span_end(&s->spans[i]);
    else if (i < s->n)
        until = s->spans[i].at;
    if (until < end / SIM_CHUNK + 1)
        *len = MIN(end, until * SIM_CHUNK) - off;
    return data;
}

uint64_t store_missing(const struct sim_store *s, uint64_t off, uint64_t len)
{
    if (len == 0)
        return 0;
    uint64_t first = off / SIM_CHUNK, end = (off + len - 1) / SIM_CHUNK + 1, there = 0;
    for (size_t i = find(s, first); i < s->n && s->spans[i].at < end; i++)
        there += MIN(span_end(&s->spans[i]), end) - MAX(s->spans[i].at, first);
    return end - first - there;
}

uint64_t store_hash(const struct sim_store *s, uint64_t size, uint64_t seed)
{
    uint64_t h = XXH3_64bits_withSeed(&size, sizeof size, seed);
    for (size_t i = 0; i < s->n; i++) {
        const struct sim_span *span = &s->spans[i];
        if (!span->data || sim_is_zero(span->data->data, SIM_CHUNK))
            continue; /* holes and zeros read the same */
        h = XXH3_64bits_withSeed(&span->at, sizeof span->at, h);
        h = XXH3_64bits_withSeed(span->data->data, SIM_CHUNK, h);
    }
    return h;
}
