/* SPDX-License-Identifier: Apache-2.0 */
/* What scenarios about lists have in common: see scene.h. */
#include "scene.h"

void scene_prepare(struct scene *s, struct world *w, unsigned n_disks)
{
    struct chance *dice = &w->chance;
    s->crowd.w = w;
    s->book.crowd = &s->crowd;
    for (unsigned i = 0; i < n_disks; i++) {
        char node[16], file[16];
        snprintf(node, sizeof node, "d%u", i);
        snprintf(file, sizeof file, "f%u", i);
        struct disk *d =
            crowd_add_disk(&s->crowd, node, file, SECTOR * (400 + chance_below(dice, 2000)));
        d->stripe = 16;
        d->direct = chance_one_in(dice, 3);
        d->unmap = chance_one_in(dice, 2);
    }
}

co_fn void scene_open_disk(struct scene *s, unsigned disk, unsigned most_guests)
{
    struct world *w = s->crowd.w;
    crowd_open_disk(&s->crowd, disk, 1 + (unsigned)chance_below(&w->chance, most_guests));
    struct bits *b = book_place(&s->book, disk, "b");
    qmp_do(&w->qmp, "block-dirty-bitmap-add",
           "{\"node\":\"%s\",\"name\":\"b\",\"granularity\":4096}", b->node);
    bits_add(&s->book, b, 12, true, w->qmp.asked, w->qmp.told);
}

co_fn json_t *scene_nodes(struct qmp *q)
{
    json_t *nodes = qmp_get(q, "query-named-block-nodes", NULL), *node, *bm;
    size_t i, k;
    json_array_foreach (nodes, i, node) {
        json_object_del(json_object_get(node, "image"), "actual-size");
        json_array_foreach (json_object_get(node, "dirty-bitmaps"), k, bm)
            json_object_del(bm, "count");
    }
    return nodes;
}

co_fn void scene_check_end(struct scene *s)
{
    struct crowd *c = &s->crowd;
    crowd_end(c);
    for (unsigned i = 0; i < c->n_disks; i++) {
        bits_check(&s->book, &s->book.b[i], &c->w->qmp, "at the end");
        crowd_check_file(c, c->w->disk, i, c->disk[i].file, c->w->tick + 1, FOREVER, "at the end");
    }
}

co_fn void scene_after_cut(struct world *w)
{
    struct scene *s = w->state;
    world_start_nbd(w);
    crowd_check_after_cut(&s->crowd);
}

void scene_finish(struct world *w)
{
    struct scene *s = w->state;
    book_free(&s->book);
    crowd_free(&s->crowd);
}
