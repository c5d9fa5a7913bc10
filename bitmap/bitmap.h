/* SPDX-License-Identifier: Apache-2.0 */
/* Which blocks of a disk have changed. Pure memory: no I/O, no names, no policy.
 *
 * A bitmap has a size in bytes and a granularity 2^shift; bit i covers bytes [i << shift,
 * (i + 1) << shift). Its bits hang on a *directory*: a tree of tables of slots, each slot empty
 * (all zero), all ones, or a pointer to a table or a page of 32768 bits. A slot may be tagged
 * SHARED: its page is owned by several directories and is copied before it is written. bitmap.c has
 * the protocol that makes marking lock-free, pages.h a picture of the tree.
 *
 * Who may do what:
 *   any thread      mark, unmark, take, test, next, count (approximate while others mark);
 *   control loop    new, free, and, *only while nobody can mark, unmark or take in either bitmap*
 *                   (their nodes are quiesced), the functions of the last block.
 * A caller on any thread holds nothing of a bitmap across a yield; pages that marking replaced go
 * on the caller's `struct bitmap_retired`, and are given back, on the control loop, one grace round
 * (every loop passed the top of a turn) after the round in which they were collected. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define BITMAP_SHIFT_MIN 9u  /* 512 bytes */
#define BITMAP_SHIFT_MAX 31u /* 2 GiB */
#define BITMAP_BITS_MAX ((uint64_t)1 << 47)

struct bitmap;
struct bitmap_pace;

/* Where merges get pages when they need many; may be shared by all bitmaps. Control loop. */
struct bitmap_pool;
int bitmap_pool_new(struct bitmap_pool **out); /* -ENOMEM */
void bitmap_pool_free(struct bitmap_pool *p);  /* its pages are all gone; NULL is fine */
/* A pool keeps up to 64 MiB that were just in use. Give back 2 MiB of it; true: there is more. */
bool bitmap_pool_trim(struct bitmap_pool *p);

/* Replaced pages that a late reader may still look at. Zeroed = empty. One thread at a time. */
struct bitmap_retired {
    void *head;
    unsigned n;
};
void bitmap_retired_move(struct bitmap_retired *to, struct bitmap_retired *from); /* to += from */
void bitmap_retired_free(struct bitmap_retired *r); /* control loop, after the grace round */

/* All-clean bitmap of `size` bytes (any number up to 2^63 - 1, also 0). *out is the caller's.
 * -ENOMEM; -E2BIG: more than BITMAP_BITS_MAX bits (bitmap_min_shift says what works); -EINVAL: size
 * or shift out of range. */
int bitmap_new(uint64_t size, unsigned shift, struct bitmap **out);
/* Nobody reads it any more. NULL is fine. Takes long for a dense one, for it visits every page. */
void bitmap_free(struct bitmap *b);
/* The same in pieces: every page, every table, and the bitmap itself take one from *budget. True:
 * it is gone. False: the budget is; until it is called again with more, nothing else may be done.
 */
bool bitmap_free_some(struct bitmap *b, unsigned *budget);
unsigned bitmap_min_shift(uint64_t size);

uint64_t bitmap_size(const struct bitmap *b);
unsigned bitmap_shift(const struct bitmap *b);
/* A word for whoever holds the bitmap in a list. */
struct bitmap **bitmap_link(struct bitmap *b);

/* Mark every block that [off, off+len) touches; what lies past the end is ignored. Cannot fail:
 * without memory more is marked than was asked for, never less. Returns true when a bit turned. */
bool bitmap_mark(struct bitmap *b, uint64_t off, uint64_t len, struct bitmap_retired *r);
/* Clean every block that lies wholly inside [off, off+len), where the last block of the disk ends
 * at the disk's end. -ENOMEM: some of them stay dirty. */
int bitmap_unmark(struct bitmap *b, uint64_t off, uint64_t len, struct bitmap_retired *r);
/* Atomically find out whether block `off` is dirty and clean it: 1 it was (this caller alone is
 * told so), 0 it was not, -ENOMEM. */
int bitmap_take(struct bitmap *b, uint64_t off, struct bitmap_retired *r);

bool bitmap_test(const struct bitmap *b, uint64_t off);
/* The first dirty run that ends after `off` and begins before `end`: *run_off >= off, cut to
 * [off, end) and to the disk. False: none. Cost is in proportion to what is not empty. */
bool bitmap_next_dirty(const struct bitmap *b, uint64_t off, uint64_t end, uint64_t *run_off,
                       uint64_t *run_len);
/* The first clean byte at or after `off`, at most `end` (or the disk's end). */
uint64_t bitmap_next_clean(const struct bitmap *b, uint64_t off, uint64_t end);
/* Number of set bits. It looks at each page; `pace`, or NULL, is that of the work on whole bitmaps
 * (below), for the control loop. */
uint64_t bitmap_count(const struct bitmap *b);
uint64_t bitmap_count_at(const struct bitmap *b, struct bitmap_pace *pace);
bool bitmap_empty(const struct bitmap *b);
/* Bytes of memory that this bitmap's directory and the pages it refers to take (shared ones in
 * full). */
size_t bitmap_memory(const struct bitmap *b);

/* The bits as bytes: bit i is bit (i mod 8) of byte i/8, zero-padded to a multiple of 8 bytes;
 * calls sink(arg, bytes, len) in order, len a multiple of 8; a NULL `bytes` stands for len zero
 * bytes. */
void bitmap_pack(const struct bitmap *b,
                 void (*sink)(void *arg, const uint8_t *bytes, uint64_t len), void *arg);

/* ---- control loop, nobody can mark the bitmaps involved (sources included) ----
 * bitmap_set_all and bitmap_merge give replaced pages back at once, so nobody on another thread may
 * *read* their target either. The others, the undoable merge among them, leave the pages of their
 * arguments where readers find them. */

/* Who gives one to work on large bitmaps is called by it now and then and may let others run, which
 * must not mark, change or free these bitmaps. NULL is fine everywhere: nobody gets a turn. */
struct bitmap_pace {
    void (*rest)(void *arg); /* after every page or so, a microsecond's work: often */
    void *arg;
    unsigned done; /* since the last call; begins with 0 */
};

/* Exchange contents. Both have the same size and granularity. O(1), cannot fail: clear, freeze and
 * undo are this. */
void bitmap_swap(struct bitmap *a, struct bitmap *b);
/* Every block dirty. Takes no memory and gives back what the bitmap had. Always 0. */
int bitmap_set_all(struct bitmap *b);
/* dst |= src, rounded outward when granularities differ; same size in bytes. Not undoable. -ENOMEM:
 * as with mark, dst holds all of src and more than that. Shares pages when shapes are equal. */
int bitmap_merge(struct bitmap *dst, struct bitmap *src, struct bitmap_pace *pace);

/* The same, in a way that can be taken back: pages of dst are replaced, never written, and the undo
 * log remembers which. Several merges, into the same or other targets, may go to one log. Work and
 * memory are in proportion to the pages that change; where granularities differ, work is to what
 * the source has. -ENOMEM: dst holds something in between; unwind the log.
 *
 * After merging, bitmaps that are in a log may be changed by everything that is undone before the
 * log is unwound; marking is not. Once nobody will unwind it, nothing binds them, and they may even
 * be freed before the log. Pages in the log are given back by bitmap_undo_free_some(), after the
 * grace round if somebody may have been reading. */
struct bitmap_undo;
/* Large merges take their pages from a pool, where there is one. The pace, where there is one, is
 * that of merges and of unwinding. Both are borrowed. -ENOMEM. */
int bitmap_undo_new(struct bitmap_pool *pool, struct bitmap_pace *pace, struct bitmap_undo **out);
int bitmap_merge_undoable(struct bitmap *dst, struct bitmap *src, struct bitmap_undo *u);
/* The targets are what they were before the first merge. Once. Cannot fail, takes no memory. */
void bitmap_undo_unwind(struct bitmap_undo *u);
/* Unwound or not: as bitmap_free_some. */
bool bitmap_undo_free_some(struct bitmap_undo *u, unsigned *budget);
/* A word for whoever holds it in a list. */
struct bitmap_undo **bitmap_undo_link(struct bitmap_undo *u);
/* A second bitmap with the same bits, sharing every page. O(tables + pages). */
int bitmap_clone(struct bitmap *b, struct bitmap_pace *pace, struct bitmap **out);
/* Another granularity, rounded outward. -ENOMEM, -E2BIG, -EINVAL as in bitmap_new. */
int bitmap_convert(struct bitmap *b, unsigned shift, struct bitmap_pace *pace, struct bitmap **out);
/* Same disk with a new size: grown area clean, cut area gone. Errors as in bitmap_new. */
int bitmap_resized(struct bitmap *b, uint64_t size, struct bitmap **out);
