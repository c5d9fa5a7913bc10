/* SPDX-License-Identifier: Apache-2.0 */
/* Lists of actions: as text for the daemon, and played on the model. */
#pragma once
#include "bits.h"

#define MAX_OPS 12u
#define MAX_SOURCES 3u

enum op_kind { ADD, REMOVE, CLEAR, ENABLE, DISABLE, MERGE, BACKUP, ABORT, N_KINDS };
enum mode { NO_BITMAP, ON_SUCCESS, NEVER, ALWAYS };

struct op {
    enum op_kind kind;
    struct bits *b; /* of the real book */
    struct bits *source[MAX_SOURCES];
    unsigned n_sources, shift;
    bool disabled;
    unsigned disk, job; /* backup: of disk dN to target tN by job jN */
    const char *sync;
    enum mode mode;
};

struct list {
    struct op op[MAX_OPS];
    unsigned n;
    bool grouped;
};

/* The arguments of `transaction`. Owned. */
char *list_text(const struct list *l);
void list_insert(struct list *l, unsigned at, struct op o);

/* What playing a list says: which action fails (-1: none), and whether that is because of a job
 * that may have ended meanwhile without our knowing (its index; -1: no). */
struct verdict {
    int failed, because_of;
};
struct play {
    struct book *copy;       /* the outcome; all of the list up to the action that fails */
    const struct book *book; /* the state before; what ops point to */
    uint64_t q, r;
    int target_job[MAX_DISKS]; /* 1 + index of the job that writes to tN; 0: none; -1: one of this
                                  list */
    int because_of;
};
struct verdict list_play(const struct list *l, struct play *p);
