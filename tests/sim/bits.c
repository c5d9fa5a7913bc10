/* SPDX-License-Identifier: Apache-2.0 */
/* Sets of granules. */
#include "bits.h"

#include <string.h>

void book_free(struct book *k)
{
    for (unsigned i = 0; i < k->n; i++) {
        free(k->b[i].must);
        free(k->b[i].may);
    }
}

static size_t most_granules(const struct book *k, unsigned disk)
{
    return k->crowd->disk[disk].size / SECTOR + 1;
}

struct bits *book_place(struct book *k, unsigned disk, const char *name)
{
    CHECK(k->n < BITS_MAX);
    struct bits *b = &k->b[k->n++];
    *b = (struct bits){.disk = disk};
    snprintf(b->node, sizeof b->node, "%s", k->crowd->disk[disk].node);
    snprintf(b->name, sizeof b->name, "%s", name);
    b->must = calloc(1, most_granules(k, disk));
    b->may = calloc(1, most_granules(k, disk));
    CHECK(b->must && b->may);
    return b;
}

struct bits *book_find(struct book *k, const char *node, const char *name)
{
    for (unsigned i = 0; i < k->n; i++)
        if (!strcmp(k->b[i].node, node) && !strcmp(k->b[i].name, name))
            return &k->b[i];
    CHECK(false);
    return NULL;
}

void book_copy(struct book *to, const struct book *from)
{
    to->crowd = from->crowd;
    while (to->n < from->n)
        book_place(to, from->b[to->n].disk, from->b[to->n].name);
    for (unsigned i = 0; i < from->n; i++) {
        uint8_t *must = to->b[i].must, *may = to->b[i].may;
        size_t n = most_granules(from, from->b[i].disk);
        memcpy(must, from->b[i].must, n);
        memcpy(may, from->b[i].may, n);
        to->b[i] = from->b[i];
        to->b[i].must = must;
        to->b[i].may = may;
    }
}

/* ------------------------------------------------------------------ the window */

static void mark(uint8_t *set, unsigned shift, uint64_t off, uint64_t len)
{
    for (uint64_t g = off >> shift; g << shift < off + len; g++)
        set[g] = 1;
}

static void add_window(struct book *k, const struct bits *b, uint64_t q, uint64_t r, uint8_t *must,
                       uint8_t *may)
{
    const struct crowd *c = k->crowd;
    if (!b->window)
        return;
    for (size_t i = 0; i < c->n_wr; i++) {
        const struct wr *w = &c->wr[i];
        if (w->disk != b->disk || !w->marks)
            continue;
        if (w->acked > b->from_q && w->sent < r)
            mark(may, b->shift, w->off, w->len);
        if (!w->failed && w->sent > b->from_r && w->acked < q)
            mark(must, b->shift, w->off, w->len);
    }
}

void bits_look(struct book *k, const struct bits *b, uint64_t q, uint64_t r, uint8_t **must,
               uint8_t **may)
{
    *must = malloc(b->n);
    *may = malloc(b->n);
    CHECK(*must && *may);
    memcpy(*must, b->must, b->n);
    memcpy(*may, b->may, b->n);
    add_window(k, b, q, r, *must, *may);
}

/* ------------------------------------------------------------------ commands */

static void open_window(struct bits *b, uint64_t q, uint64_t r)
{
    b->window = true;
    b->from_q = q;
    b->from_r = r;
}

void bits_add(struct book *k, struct bits *b, unsigned shift, bool enabled, uint64_t q, uint64_t r)
{
    b->shift = shift;
    b->n = (k->crowd->disk[b->disk].size + (UINT64_C(1) << shift) - 1) >> shift;
    b->exists = true;
    b->enabled = enabled;
    b->job = 0;
    b->window = false;
    b->folded_at = 0;
    memset(b->must, 0, b->n);
    memset(b->may, 0, b->n);
    if (enabled)
        open_window(b, q, r);
}

void bits_remove(struct bits *b)
{
    b->exists = b->enabled = b->window = false;
}

void bits_clear(struct bits *b, uint64_t q, uint64_t r)
{
    memset(b->must, 0, b->n);
    memset(b->may, 0, b->n);
    b->window = false;
    b->folded_at = 0;
    if (b->enabled)
        open_window(b, q, r);
}

void bits_enable(struct bits *b, uint64_t q, uint64_t r)
{
    if (b->enabled)
        return;
    b->enabled = true;
    if (b->folded_at == q)
        b->window = true;
    else
        open_window(b, q, r);
}

void bits_disable(struct book *k, struct bits *b, uint64_t q, uint64_t r)
{
    if (!b->enabled)
        return;
    b->folded_at = b->window ? q : 0;
    add_window(k, b, q, r, b->must, b->may);
    b->enabled = b->window = false;
}

void bits_merge(struct book *k, struct bits *to, const struct bits *from, uint64_t q, uint64_t r)
{
    uint8_t *must, *may;
    if (to == from)
        return;
    bits_look(k, from, q, r, &must, &may);
    for (size_t g = 0; g < from->n; g++) {
        uint64_t off = (uint64_t)g << from->shift, size = k->crowd->disk[to->disk].size;
        uint64_t len = MIN(UINT64_C(1) << from->shift, size - off);
        if (must[g])
            mark(to->must, to->shift, off, len);
        if (may[g])
            mark(to->may, to->shift, off, len);
    }
    free(must);
    free(may);
}

void bits_blur(struct bits *b)
{
    memset(b->may, 1, b->n);
}

/* ------------------------------------------------------------------ comparing */

void bits_check(struct book *k, const struct bits *b, struct qmp *q, const char *when)
{
    uint8_t *must, *may, *is = malloc(b->n);
    CHECK(is);
    uint64_t asked = k->crowd->w->tick + 1;
    qmp_bits(q, b->node, b->name, b->shift, is, b->n);
    bits_look(k, b, asked, k->crowd->w->tick, &must, &may);
    for (size_t g = 0; g < b->n; g++) {
        CHECK_SAY(is[g] || !must[g], "%s: bitmap %s of %s lost granule %zu of %zu (shift %u)", when,
                  b->name, b->node, g, b->n, b->shift);
        CHECK_SAY(!is[g] || may[g], "%s: bitmap %s of %s has granule %zu, which nothing explains",
                  when, b->name, b->node, g);
    }
    free(must);
    free(may);
    free(is);
}
