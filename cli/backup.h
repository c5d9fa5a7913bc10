/* SPDX-License-Identifier: Apache-2.0 */
/* One run of `tidemark backup`, in the two halves that its code lies in: what happens in the daemon
 * (backup_daemon.c) and what happens in the directory (cmd_backup.c). */
#pragma once
#include "cli/cli.h"
#include "cli/manifest.h"
#include "cli/ranges.h"

struct backup_disk {
    const char *name; /* of the node; borrowed from the command line */
    uint64_t size;
    bool full, read_only;
    char *why; /* full although an increment was possible to ask for; NULL if not */
    const struct manifest_disk *below; /* the same disk in the last point, NULL if it has none */
    uint64_t below_granularity;        /* of the bitmap that counts since then */
    char *bitmap;                      /* new: records what changes after this point */
    uint64_t generation;               /* of the new bitmap since before the point */
    bool has_generation;
    char *frozen;     /* incremental: what changed before it, for the job and for the manifest */
    char *node, *job; /* the target's node, the copying job */
    char *file, *tmp; /* names in the directory */
    int fd;           /* of the temporary file; -1 */
    bool concluded;
    uint64_t done, total;
    struct ranges ranges; /* that were copied */
    struct extent *extents;
    size_t n_extents;
};

struct backup {
    struct cli *c;
    const char *dir; /* as typed */
    char *path;      /* absolute */
    int dir_fd;
    const char *stem; /* of the bitmaps' names */
    uint64_t granularity, speed;
    bool grouped; /* the daemon groups jobs with any other action */
    bool want_full, want_incremental;
    struct manifest manifest;
    char uuid[UUID_SIZE]; /* of the new point */
    uint64_t number;
    struct backup_disk *disks;
    size_t n;
};

/* ---- in the daemon ---- */

/* Does a bitmap have a name that only this tool gives, for a point of some directory? */
bool backup_owns_bitmap(const char *name);

/* Removes what earlier or failed runs into this directory left in the daemon: jobs, target nodes,
 * and every bitmap of this directory that does not belong to its last point. What cannot be removed
 * is left for the next time. */
int backup_sweep(struct backup *b, struct tide_error *err);
/* Looks at the disks and decides which are copied in full, and why. -EINVAL with words if an
 * increment was demanded and is not possible. */
int backup_plan(struct backup *b, struct tide_error *err);
/* Opens the temporary files as nodes. */
int backup_open_targets(struct backup *b, struct tide_error *err);
/* The new bitmaps, then the transaction: everything begins at one moment. Then a look at all
 * bitmaps: an error if one may have lost sight of changes meanwhile. */
int backup_begin(struct backup *b, struct tide_error *err);
/* Until all jobs have ended. -EINTR with words: a signal came. */
int backup_wait(struct backup *b, struct tide_error *err);
/* Closes the target nodes and learns which ranges the jobs copied. */
int backup_collect(struct backup *b, struct tide_error *err);
