/* SPDX-License-Identifier: Apache-2.0 */
/* The tracker: the named dirty bitmaps of a node.
 *
 * Everything here is control loop only unless said otherwise. What changes what a write marks
 * (attach, detach, swap, enable, freeze) needs the node quiesced for writes; so the functions below
 * that are marked [q] assert node_is_quiesced(). None of them yields, but where it is given a pace.
 *
 * A bitmap owned by a backup job is *frozen*: its bits stand still and a *successor* (same shape,
 * empty, same enabled state) takes new marks. At the end the successor either replaces the bits
 * (abdicate) or is merged back into them (reclaim). */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"
#include "bitmap/bitmap.h"

#define DIRTY_BITMAP_NAME_MAX 1023u

struct node;
struct graph;

struct dirty_bitmap {
    char *name;
    struct node *node;        /* NULL while detached (kept by an undo record) */
    struct bitmap *bits;      /* what queries, merges and exports see */
    struct bitmap *successor; /* takes marks while frozen, else NULL */
    bool enabled;             /* new writes are recorded (by the successor while frozen) */
    bool persistent, inconsistent, read_only;
    unsigned n_busy; /* jobs and exports that use it */
    /* Changes whenever the bits may have stopped covering every change since it was made: clear, a
     * backup that consumed it, enable and disable. No other bitmap of this daemon ever has the same
     * one. What is undone gives the old one back. */
    uint64_t generation;
    struct dirty_bitmap *next, *prev; /* of the node, newest first */
    uint32_t hash;                    /* of the name */
    struct dirty_bitmap *same_bucket; /* in the node's table of names */
    unsigned mark_at;                 /* its place in the node's marks, while it has one */
};

/* What an operation needs of a bitmap. Checked in the contract's order: busy, read-only,
 * inconsistent (section 5.3). */
#define BITMAP_NOT_BUSY 1u
#define BITMAP_WRITABLE 2u
#define BITMAP_CONSISTENT 4u

/* -ENOENT / -EBUSY / -EROFS / -EINVAL with a text. */
int dirty_bitmap_find(struct node *n, const char *name, unsigned needs, struct dirty_bitmap **out,
                      struct tide_error *err);
struct dirty_bitmap *node_bitmaps(const struct node *n); /* newest first */

/* Not attached yet. granularity 0 = the node's default. Names and granularities are checked here.
 */
int dirty_bitmap_new(struct node *n, const char *name, uint64_t granularity, bool has_granularity,
                     bool disabled, struct dirty_bitmap **out, struct tide_error *err);
/* -EPERM when something writes to a node below, past this tracker. */
int dirty_bitmap_check_watch(const struct dirty_bitmap *b, struct tide_error *err);
void dirty_bitmap_free(struct dirty_bitmap *b); /* detached; contents freed after a grace round */

/* [q] Into the table of its node, at the front; or back at the place where detach took it out.
 * attach reserves before it changes anything: -ENOMEM. reattach cannot fail. */
int tracker_attach(struct dirty_bitmap *b, struct node *n);
void tracker_detach(struct dirty_bitmap *b);
void tracker_reattach(struct dirty_bitmap *b, struct node *n, struct dirty_bitmap *before);
/* Give an attached bitmap another name; `name` is the caller's before and the bitmap's after, and
 * the old one is returned. Cannot fail: whether the new name may be used is asked beforehand
 * (-EINVAL, -EEXIST with a text). */
int dirty_bitmap_check_name(struct node *n, const char *name, struct tide_error *err);
char *dirty_bitmap_rename(struct dirty_bitmap *b, char *name);
/* [q] Marks go / do not go to it from now on. Cannot fail. */
void dirty_bitmap_set_enabled(struct dirty_bitmap *b, bool enabled);
/* [q] Make a successor and take ownership (n_busy). -ENOMEM. */
int dirty_bitmap_freeze(struct dirty_bitmap *b);
/* [q] Put the frozen bits aside, the successor's are the bitmap's; or merge the successor back.
 * reclaim cannot fail: without memory it marks more. Both end the ownership. While the node stays
 * quiesced, freeze_again turns abdicate back, without memory; else what is in `was` goes to
 * graph_bitmap_free_later(). */
struct frozen_bits {
    struct bitmap *bits; /* NULL: nothing was put aside */
    uint64_t generation;
};
void dirty_bitmap_abdicate(struct dirty_bitmap *b, struct frozen_bits *was);
void dirty_bitmap_freeze_again(struct dirty_bitmap *b, struct frozen_bits *was);
void dirty_bitmap_reclaim(struct dirty_bitmap *b, struct bitmap_pace *pace);
/* Dirty bytes, in whole granules: what queries call its count. Looks at each page, at that pace;
 * NULL: at a stretch. */
unsigned long long dirty_bitmap_bytes(const struct dirty_bitmap *b, struct bitmap_pace *pace);
/* The node goes, its bitmaps are gone. */
void tracker_free(struct node *n);
/* Give it a new generation. */
void dirty_bitmap_renew(struct dirty_bitmap *b);
/* Free contents, or what a log of merges holds, once every loop has passed a turn; in pieces, with
 * other work of the control loop in between. Never fails, never waits. NULL is fine. */
void graph_bitmap_free_later(struct graph *g, struct bitmap *bits);
void graph_undo_free_later(struct graph *g, struct bitmap_undo *u);

struct bitmap_pool *graph_bitmap_pool(struct graph *g);

/* Any loop, admitted write: mark the range in every enabled bitmap. Never waits, never fails. */
void tracker_mark(struct node *n, uint64_t off, uint64_t len);
/* This loop's list for pages that bitmap functions replace (any loop, no yield in between). */
struct bitmap_retired *graph_retired(struct graph *g);
