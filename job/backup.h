/* SPDX-License-Identifier: Apache-2.0 */
/* The backup job: copies a node to another one as it was at one instant. */
#pragma once
#include "job/job.h"

struct bitmap_pace;
struct dirty_bitmap;

enum backup_sync { BACKUP_TOP, BACKUP_FULL, BACKUP_NONE, BACKUP_INCREMENTAL, BACKUP_BITMAP };
enum backup_bitmap_mode { BACKUP_ON_SUCCESS, BACKUP_NEVER, BACKUP_ALWAYS };

struct backup_options {
    struct job_options job;
    struct node *source, *target;
    bool owns_target;            /* once it has started: the target is retired at its end */
    enum backup_sync sync;       /* never BACKUP_INCREMENTAL: that is BITMAP with ON_SUCCESS */
    struct dirty_bitmap *bitmap; /* of the source, or NULL */
    enum backup_bitmap_mode bitmap_mode;
    enum job_on_error on_source_error, on_target_error;
    unsigned max_workers;
    uint64_t max_chunk; /* 0: chosen here */
    bool copy_range;    /* try copy offload */
};

/* In prepare of a transaction, source and target quiesced: checks what concerns both, freezes the
 * bitmap, puts the copy-before-write hook in place. The job is created and silent. On failure
 * nothing is left. The bitmap is copied at that pace. */
co_fn int backup_new(struct jobs *js, const struct backup_options *o, struct bitmap_pace *pace,
                     struct job **out, struct tide_error *err);
/* Undo of backup_new, still quiesced: hook out, bitmap folded back. */
void backup_unwind(struct job *j);
/* After backup_unwind, nodes may run: frees it. */
co_fn void backup_drop(struct job *j);
