/* SPDX-License-Identifier: Apache-2.0 */
/* What queries tell about a node. Control loop; under the query lock but for what is asked of disks
 * beforehand. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "co/co.h"

struct graph;
struct node;

struct node_info {
    const char *driver;
    const char *filename; /* never NULL; borrowed from the node */
    const char *detect_zeroes;
    uint64_t size;
    uint64_t allocated; /* bytes on disk, as the disk said last; UINT64_MAX: unknown */
    uint32_t cluster_size;
    bool read_only, direct, no_flush;
};
void node_inspect(const struct node *n, struct node_info *out);

/* Ask all disks how much of them is allocated; node_inspect() tells it. A disk that hangs is waited
 * for no longer than a tenth of a second, all of them together: queries go on, with what it said
 * last. Control loop, not under the query lock: a list that holds guests may be waiting for that
 * one, and no guest waits for a disk that is not his. */
co_fn void graph_ask_disks(struct graph *g);

/* Questions that somebody waits for, until he leaves; the last of them frees it. */
struct inquiry;
void inquiry_begin(struct inquiry *q);
void inquiry_end(struct inquiry *q);
/* He has left: what is open is overdue. */
bool inquiry_left(const struct inquiry *q);
