/* SPDX-License-Identifier: Apache-2.0 */
/* Guests: NBD clients on random loops that write all the time, and the log of all they did.
 *
 * Each 512-byte sector of a disk belongs to one guest (`stripe` sectors in turn), which has at most
 * one request under way there. So the writes of a sector have an order, and what a reader may see
 * at any tick is known: every write fills its sectors with its own stamp, zero writes with 0.
 * Sectors of one copy unit, bitmap granule or O_DIRECT block still belong to different guests. */
#pragma once
#include "nbd.h"

struct wr {
    unsigned disk, guest;
    uint64_t off, len;
    uint64_t stamp;       /* 0: zeroes */
    uint64_t sent, acked; /* ticks; acked FOREVER: no answer yet */
    bool marks;           /* sets dirty bits */
    bool fua, failed, trim;
};
struct disk {
    char node[16], file[16];
    uint64_t size;
    unsigned stripe; /* sectors */
    bool unmap;      /* discard=unmap */
    bool direct;
    bool may_fail;     /* errors of guests are allowed */
    uint64_t *now;     /* for each sector the stamp a reader sees when nothing is under way */
    bool *vague;       /* a write here failed: unknown */
    uint64_t worst_ns; /* longest wait of a guest since it was last set to 0 */
    uint64_t limit_ns; /* CHECKed; 0 = none */
    uint64_t n_done;   /* requests answered */
    uint64_t flushed;  /* when the newest flush that was answered had been sent */
};
#define MAX_DISKS 4u

struct guest {
    struct crowd *crowd;
    unsigned disk, number, n_on_disk; /* number: of this disk */
    unsigned depth;
    uint64_t think_ns;
    uint64_t left; /* requests to make; FOREVER: until the crowd stops */
    bool structured;
    struct nbd_client nbd;
    size_t entry[NBD_DEPTH]; /* for each request its place in the log; of flushes the tick they were
                                sent */
};
#define MAX_GUESTS 12u

struct crowd {
    struct world *w;
    struct disk disk[MAX_DISKS];
    unsigned n_disks;
    struct guest guest[MAX_GUESTS];
    unsigned n_guests;
    struct wr *wr;
    size_t n_wr, cap_wr;
    bool held, stop;
    unsigned n_idle, n_gone;
    struct spin lock;
    struct co_queue resume, idle;
};

/* Before the life: makes the file, filled with stamps of its own in places. */
struct disk *crowd_add_disk(struct crowd *c, const char *node, const char *file, uint64_t size);
/* In the life: the node, and a writable export of it for each guest, each on an iothread of its
 * own. */
co_fn void crowd_open_disk(struct crowd *c, unsigned disk, unsigned n_guests);
void crowd_start(struct crowd *c);
/* Returns when no guest has a request under way; until release none makes one. */
co_fn void crowd_hold(struct crowd *c);
void crowd_release(struct crowd *c);
/* Ends all guests: nothing of them is under way on return. */
co_fn void crowd_end(struct crowd *c);
/* From now on the daemon may end below the guests; crowd_end() is still to be called. */
co_fn void crowd_may_lose(struct crowd *c);
void crowd_free(struct crowd *c);
/* How long the oldest request that is under way on the disk has been waiting; 0: none is. */
uint64_t crowd_oldest_ns(const struct crowd *c, unsigned disk);

/* A file of `world` (the disk of this world, or a copy of it) against the log: each sector shows
 * what `disk` showed at some instant between tick `q` and tick `r`, whole. `who` is for the
 * message. */
void crowd_check_file(struct crowd *c, struct sim_world *world, unsigned disk, const char *file,
                      uint64_t q, uint64_t r, const char *who);
/* After a power cut: each sector of the disk shows its last durable write or a later one.
 * `nothing_lost`: every answered write counts as durable. */
void crowd_check_survivors(struct crowd *c, struct sim_world *world, unsigned disk,
                           bool nothing_lost);
/* What if the power went now? A copy of the world in which it did. Owned by the caller. */
struct sim_world *crowd_cut_copy(struct crowd *c);
/* Would all disks survive that? */
void crowd_check_cut_now(struct crowd *c);
/* For after_cut(): all disks survived this world's cut, and are served as they are. */
co_fn void crowd_check_after_cut(struct crowd *c);
