/* SPDX-License-Identifier: Apache-2.0 */
/* Pages by the hundred, for merges that make many.
 *
 * One by one from the heap a page costs more than filling it: memory that is used for the first
 * time takes a fault for every 4 KiB, and when pages go again the heap gives its end back to the
 * kernel, over and over. A slab is one large page of the processor's, with one fault for all of
 * it. It lives as long as one of its pages does; so that slabs do not stay for few, what becomes
 * free in one is used again before there is a new one. Some that are empty are kept for a while:
 * memory that was just used is the fastest there is. Control loop only. */
#include "bitmap/pages.h"

#include <assert.h>
#include <errno.h>
#include <stdalign.h>
#include <sys/queue.h>

#include "base/mem.h"

struct slab {
    struct bitmap_pool *pool;
    LIST_ENTRY(slab) link; /* while not full: of with_room or empty */
    unsigned n_used, n_free;
    unsigned n_touched; /* pages from here on have never been used */
    /* Those that were used and are free. A list through the pages themselves would have to read
     * from memory that has left the caches, a wait for each page. */
    uint16_t free[MEM_HUGE / sizeof(struct page)];
    alignas(64) struct page page[];
};

#define KEPT_SLABS 256u /* 512 MiB: the largest bitmap of 16 TiB at 4 KiB */
#define SLAB_PAGES ((MEM_HUGE - sizeof(struct slab)) / sizeof(struct page))

struct bitmap_pool {
    LIST_HEAD(, slab) with_room, empty;
    unsigned n_slabs, n_empty;
};

int bitmap_pool_new(struct bitmap_pool **out)
{
    *out = mem_zalloc(sizeof **out);
    return *out ? 0 : -ENOMEM;
}

bool bitmap_pool_trim(struct bitmap_pool *p)
{
    struct slab *s = LIST_FIRST(&p->empty);
    if (!s)
        return false;
    LIST_REMOVE(s, link);
    p->n_empty--;
    p->n_slabs--;
    mem_unpoison(s, MEM_HUGE);
    mem_huge_free(s);
    return p->n_empty > 0;
}

void bitmap_pool_free(struct bitmap_pool *p)
{
    if (!p)
        return;
    while (bitmap_pool_trim(p))
        ;
    assert(!p->n_slabs);
    mem_free(p);
}

/* One with room. NULL: no memory. */
static struct slab *slab_find(struct bitmap_pool *p)
{
    struct slab *s = LIST_FIRST(&p->with_room);
    if (s)
        return s;
    s = LIST_FIRST(&p->empty);
    if (s) {
        LIST_REMOVE(s, link);
        p->n_empty--;
    } else {
        s = mem_huge_alloc();
        if (!s)
            return NULL;
        s->pool = p;
        mem_poison(s->page, SLAB_PAGES * sizeof s->page[0]);
        p->n_slabs++;
    }
    s->n_free = 0;
    s->n_touched = 0;
    LIST_INSERT_HEAD(&p->with_room, s, link);
    return s;
}

struct page *pool_get(struct bitmap_pool *p)
{
    struct slab *s = slab_find(p);
    if (!s)
        return NULL;
    struct page *pg = &s->page[s->n_free ? s->free[--s->n_free] : s->n_touched++];
    mem_unpoison(pg, sizeof *pg);
    if (++s->n_used == SLAB_PAGES)
        LIST_REMOVE(s, link);
    page_init(pg, true);
    return pg;
}

void pool_put(struct page *pg)
{
    struct slab *s = mem_huge_of(pg);
    struct bitmap_pool *p = s->pool;
    s->free[s->n_free++] = (uint16_t)(pg - s->page);
    mem_poison(pg, sizeof *pg);
    if (s->n_used-- == SLAB_PAGES)
        LIST_INSERT_HEAD(&p->with_room, s, link);
    if (s->n_used)
        return;
    LIST_REMOVE(s, link);
    LIST_INSERT_HEAD(&p->empty, s, link);
    if (++p->n_empty > KEPT_SLABS)
        bitmap_pool_trim(p);
}
