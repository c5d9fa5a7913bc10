/* SPDX-License-Identifier: Apache-2.0 */
/* Guests on disks whose bitmaps record from the first write on: what lists are let loose on. Disk i
 * is node "d<i>" over the file "f<i>", with the bitmap "b" of 4 KiB granules at place i of the
 * book. A scenario's state begins with a `struct scene`; then the last functions serve as its own.
 */
#pragma once
#include "bits.h"

struct scene {
    struct crowd crowd;
    struct book book;
};

/* Before the life: the disks. */
void scene_prepare(struct scene *s, struct world *w, unsigned n_disks);
/* In the life: the disk's node, 1 to `most_guests` guests of it, who do not write yet, its bitmap.
 */
co_fn void scene_open_disk(struct scene *s, unsigned disk, unsigned most_guests);
/* What queries tell of nodes, without what guests change. A new reference. */
co_fn json_t *scene_nodes(struct qmp *q);
/* Ends the guests; then each bitmap and each file has to be as the log says. */
co_fn void scene_check_end(struct scene *s);

/* For .after_cut: what was durable is there, and is served. */
co_fn void scene_after_cut(struct world *w);
/* For .finish. */
void scene_finish(struct world *w);
