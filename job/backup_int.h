/* SPDX-License-Identifier: Apache-2.0 */
/* Inside the backup job: backup.c (life), copy.c (workers), cbw.c (what guest writes do).
 *
 * The disk is seen in *granules*. Each is in one of these states:
 *   todo      in `todo` and `undone`: still to be copied
 *   claimed   in a claim and `undone`: somebody is at it
 *   kept      in `spill` and `undone`: its old data lies in our memory
 *   done      in neither bitmap: on the target
 * A guest write that meets a granule that is not done first saves the old data in memory and goes
 * on; it never waits for the target. A claim of a worker does not stop it: it reads the old data
 * itself (the guest's write has not happened yet), and its kept copy is written after the worker's,
 * whatever that one read. A claim of another guest write is waited for: it only reads the source.
 */
#pragma once
#include "bitmap/bitmap.h"
#include "block/driver.h"
#include "block/root.h"
#include "co/sync.h"
#include "job/backup.h"

#define BACKUP_GRANULE_MIN 65536u
#define BACKUP_UNIT_MAX ((uint64_t)1 << 20)   /* one admission */
#define BACKUP_HOLE_MAX ((uint64_t)64 << 20)  /* what is known to be a hole, in one claim */
#define BACKUP_SPILL_MAX ((uint64_t)64 << 20) /* memory for old data */
#define BACKUP_SPILL_WAIT 5000000000u         /* how long a guest write may wait for some of it */
#define BACKUP_MAX_WORKERS 64u

/* Old data of one granule, waiting to be written to the target. */
struct kept {
    uint64_t off, len;
    void *buf;
    bool over; /* a worker may have written something else there */
    TAILQ_ENTRY(kept) link;
};
TAILQ_HEAD(kept_list, kept);

struct claim {
    uint64_t off, end;
    bool by_guest;
    bool hole;   /* a worker's: known to read as zero, may be longer than a unit */
    bool ending; /* a worker's, about to end: its outcome is being noted, guests wait that long */
    struct kept_list kept; /* a worker's: what was kept meanwhile, and follows when it has ended */
    TAILQ_ENTRY(claim) link;
};

/* A guest write that waits for memory. */
struct starving {
    struct io_event event;
    bool granted; /* the memory is there and counted; no longer in the list */
    TAILQ_ENTRY(starving) link;
};

struct worker {
    struct backup *backup;
    struct io_event kick;
    bool parked;
};

struct backup {
    struct job job; /* first */
    struct backup_options opts;
    struct graph *graph;
    struct root *unit_root;  /* source and target: a worker's unit */
    struct root *spill_root; /* target: writing kept data */
    struct node_hook hook;
    bool hooked;
    uint64_t size, granule, chunk;
    struct bitmap *todo, *undone;
    struct frozen_bits was; /* at the end: what the bitmap gave up, until that is recorded */
    /* All granules but those that are known to read as zero, as far as they are still in `todo`:
     * whoever writes to one takes it out first, so what the scout has seen once stays true of the
     * others. This way round, for without memory a bitmap says more than it was told. NULL: nobody
     * looks. */
    struct bitmap *maybe_data;
    _Atomic bool target_is_zero; /* blank: nothing was written there before the job */
    _Atomic bool no_offload;

    struct spin lock;
    TAILQ_HEAD(, claim) claims;
    struct kept_list spill; /* oldest first */
    TAILQ_HEAD(, starving) starving;
    struct co_queue claim_ended;
    _Atomic unsigned n_claims;
    uint64_t cursor; /* where workers look next */
    /* The source reads as zero here, as far as granules are still in `todo`: whoever writes to one
     * takes it out first, so what was learnt once stays true of the others. */
    uint64_t hole_off, hole_end;
    uint64_t spill_bytes;  /* in memory now, in whole granules */
    uint64_t n_waits;      /* guest writes that had to wait for memory */
    uint64_t budget_at;    /* rate limit: when the next byte may go */
    uint64_t budget_speed; /* the speed for which that was reckoned */

    _Atomic bool failed; /* stop: an error was reported */
    _Atomic int failure; /* -errno */
    unsigned n_workers;
    struct worker *worker; /* n_workers copiers, the spiller and the scout */
    _Atomic unsigned n_running, n_parked;
};

/* copy.c */
co_fn void backup_worker(void *worker);
co_fn void backup_spiller(void *worker);
co_fn void backup_scout(void *worker);
static inline struct worker *backup_spiller_of(struct backup *b)
{
    return &b->worker[b->n_workers];
}
/* The block is on the target, or need not go there. */
void backup_note_copied(struct backup *b, uint64_t off, uint64_t len);
bool backup_stopping(struct backup *b);
void backup_kick_all(struct backup *b);
void backup_kick_main(struct backup *b);
/* cbw.c */
void backup_before_write(struct node_hook *h, uint64_t off, uint64_t len);
/* An error that no policy can help: the job fails, guests go on. Any loop. */
void backup_break(struct backup *b, int error, const char *why);
void backup_claim_end(struct backup *b, struct claim *c);
void backup_wake_starving(struct backup *b);
/* The memory of one granule is free again. */
void backup_give_room(struct backup *b);
