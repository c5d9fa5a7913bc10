/* SPDX-License-Identifier: Apache-2.0 */
/* Lists of ranges, and the map that `bitmap map` draws.
 *
 * A cell of the map stands for the same number of bytes everywhere. It shows how much of that is
 * dirty, with two promises: an empty cell has nothing dirty in it, and a full one nothing clean. */
#include "cli/ranges.h"
#include "base/bytes.h"
#include "base/mem.h"
#include "cli/cli.h"
#include "cli/size.h"
#include "cli/table.h"
#include <string.h>

bool ranges_add(struct ranges *r, uint64_t off, uint64_t len)
{
    if (len == 0 || !range_in(off, len, INT64_MAX))
        return false;
    struct range *last = r->n ? &r->list[r->n - 1] : NULL;
    if (last && off < last->off + last->len)
        return false;
    if (last && off == last->off + last->len) {
        last->len += len;
        return true;
    }
    if (r->n == r->room) {
        r->room = r->room ? r->room * 2 : 64;
        r->list = cli_grow(r->list, r->room, sizeof *r->list);
    }
    r->list[r->n++] = (struct range){off, len};
    return true;
}

void ranges_fini(struct ranges *r)
{
    mem_free(r->list);
    *r = (struct ranges){0};
}

uint64_t ranges_total(const struct ranges *r)
{
    uint64_t total = 0;
    for (size_t i = 0; i < r->n; i++)
        total += r->list[i].len;
    return total;
}

void ranges_clip(struct ranges *r, uint64_t size)
{
    while (r->n && r->list[r->n - 1].off >= size)
        r->n--;
    if (r->n == 0)
        return;
    struct range *last = &r->list[r->n - 1];
    last->len = MIN(last->len, size - last->off);
}

uint64_t ranges_in(const struct ranges *r, uint64_t off, uint64_t len, size_t *from)
{
    uint64_t total = 0, end = off + len;
    while (*from < r->n && r->list[*from].off + r->list[*from].len <= off)
        ++*from;
    for (size_t i = *from; i < r->n && r->list[i].off < end; i++) {
        uint64_t a = MAX(off, r->list[i].off);
        uint64_t b = MIN(end, r->list[i].off + r->list[i].len);
        total += b - a;
    }
    return total;
}

/* The first level means nothing, the last everything, those between a share of the rest. */
static const char *const blocks[] = {"·", "░", "▒", "▓", "█"};
static const char *const letters[] = {".", "-", "+", "*", "#"};
#define LEVELS 5

static const char *cell(uint64_t dirty, uint64_t len, bool ascii)
{
    unsigned level = 0;
    if (dirty == len)
        level = LEVELS - 1;
    else if (dirty > 0)
        level = 1 + (unsigned)((double)dirty / (double)len * (LEVELS - 2));
    if (dirty < len && level > LEVELS - 2)
        level = LEVELS - 2;
    return ascii ? letters[level] : blocks[level];
}

void ranges_draw(const struct ranges *r, uint64_t size, uint64_t granularity, unsigned columns,
                 unsigned rows, bool ascii, FILE *out)
{
    if (size == 0)
        return;
    size_t label = text_width(size_text(size).s) + 2; /* room for "1023.9 GiB" of a row's offset */
    label = label < 11 ? 11 : label;
    unsigned width = columns > label + 13 ? (unsigned)(columns - label - 3) : 10;
    uint64_t granules = (size - 1) / granularity + 1;
    uint64_t per_cell = (granules - 1) / ((uint64_t)width * rows) + 1; /* in granules */
    uint64_t step;
    if (__builtin_mul_overflow(per_cell, granularity, &step))
        step = size;
    size_t from = 0;
    uint64_t off = 0;
    while (off < size) {
        fprintf(out, "%*s %s", (int)label, size_text(off).s, ascii ? "|" : "│");
        unsigned i;
        for (i = 0; i < width && off < size; i++) {
            uint64_t len = MIN(step, size - off);
            fputs(cell(ranges_in(r, off, len, &from), len, ascii), out);
            off += len;
        }
        fprintf(out, "%*s%s\n", (int)(width - i), "", ascii ? "|" : "│");
    }
}
