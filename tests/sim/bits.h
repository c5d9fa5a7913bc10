/* SPDX-License-Identifier: Apache-2.0 */
/* What dirty bitmaps must contain, told by the log of the guests and the story of the commands.
 *
 * A model bitmap has two sets of granules: `must` (every one of them is dirty) and `may` (no other
 * one is). While it records, what guests write is added when somebody looks: a write that was sent
 * after the answer to the command that began the recording, and answered before the look, must be
 * there; one that overlaps either instant may be there. The *window* is that recording: it began
 * between ticks `from_q` and `from_r`.
 *
 * A list of actions is played on a copy of the book: all its actions have the list's own ticks. */
#pragma once
#include "guest.h"

#define BITS_MAX 16u

struct bits {
    char node[16], name[16];
    unsigned disk, shift;
    size_t n; /* granules */
    bool exists, enabled;
    int job; /* 1 + index of the job that owns it; 0 = none */
    uint8_t *must, *may;
    bool window;
    uint64_t from_q, from_r;
    uint64_t folded_at; /* q of the list whose disable closed the window; 0 = none */
};

struct book {
    struct crowd *crowd;
    struct bits b[BITS_MAX];
    unsigned n;
};

void book_free(struct book *k);
/* A place for a bitmap of that name on that disk; it does not exist yet. */
struct bits *book_place(struct book *k, unsigned disk, const char *name);
struct bits *book_find(struct book *k, const char *node, const char *name);
/* `to` becomes equal to `from`; both books have the same places. */
void book_copy(struct book *to, const struct book *from);

/* Effects of a command asked at tick q, told at r. */
void bits_add(struct book *k, struct bits *b, unsigned shift, bool enabled, uint64_t q, uint64_t r);
void bits_remove(struct bits *b);
void bits_clear(struct bits *b, uint64_t q, uint64_t r);
void bits_enable(struct bits *b, uint64_t q, uint64_t r);
/* The window is closed: what it held is folded into the sets. An enable in the same list opens it
 * again at its old beginning, since no write falls between two actions (L5). */
void bits_disable(struct book *k, struct bits *b, uint64_t q, uint64_t r);
void bits_merge(struct book *k, struct bits *to, const struct bits *from, uint64_t q, uint64_t r);
/* It may have any bit, or none that it had to have. */
void bits_blur(struct bits *b);

/* Both sets as they are for somebody who looks between ticks q and r. Owned by the caller. */
void bits_look(struct book *k, const struct bits *b, uint64_t q, uint64_t r, uint8_t **must,
               uint8_t **may);
/* Ask the daemon and compare. The bitmap has no job. */
co_fn void bits_check(struct book *k, const struct bits *b, struct qmp *q, const char *when);
