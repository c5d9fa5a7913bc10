/* SPDX-License-Identifier: Apache-2.0 */
/* The simulator: an engine behind io/io.h in which order, disk, network, clock and power are made
 * up from one seed. The same seed gives the same run, step for step, on every machine.
 *
 * A `struct sim_world` is what stays when the power goes: the disk. A `struct io` made by sim_new()
 * is one life of the daemon in that world. A crash test is:
 *
 *     struct sim_world *w = sim_world_new();
 *     sim_new(&(struct sim_config){.seed = 7, .n_loops = 2, .world = w}, &io);
 *     sim_cut_after(io, 1000);
 *     io_run(io, workload, &model);            // SIM_POWER_CUT, or 0 if it ended before
 *     io_free(io);
 *     sim_power_cut(w, SIM_CUT_ANY, 3);        // what is on the disk now: choice 3
 *     sim_new(...), io_run(io, recover_and_check, &model), io_free(io);
 *
 * To try many choices at one moment, clone the world before the cut. After a power cut the stacks
 * of coroutines that were alive are given back by io_free(), but what they had allocated is lost
 * (what is allocated in a run with sim_cut_after() is hidden from LeakSanitizer).
 *
 * Nothing here is for more than one thread. Only io.h functions are called from coroutines; what
 * this header declares is called from anywhere. Memory that runs out in the simulator's own books
 * ends the process; what a caller of io.h could be refused for (a file, a socket) comes from mem.h
 * and is counted by mem_fail_after(). */
#pragma once
#include <stdio.h>

#include "io/io.h"

struct sim_world;

/* What io_run() returns when the power was cut; outside the range of errno. */
#define SIM_POWER_CUT (-10001)

/* ------------------------------------------------------------------ one life of the daemon */

/* "one in N": 0 = never. */
struct sim_config {
    uint64_t seed;
    unsigned n_loops;        /* 0 = 1 */
    struct sim_world *world; /* borrowed; NULL: one of its own, freed with it */
    int pid;                 /* 0 = 4242 */
    unsigned inline_percent; /* operations that complete without a yield; 0 = 30, 101 = none */
    uint64_t latency_ns;     /* an operation takes up to this long; 0 = 1 ms */
    size_t sock_buffer;      /* bytes in flight in each direction; 0 = 64 KiB */
    unsigned direct_align;   /* of O_DIRECT; 0 = 512 */
    unsigned read_error_in, write_error_in, sync_error_in; /* -EIO */
    unsigned reset_in; /* a socket operation finds its connection reset */
    unsigned stall_in; /* a file operation takes stall_ns (0 = 5 s) */
    unsigned short_in; /* a read or write of several sectors takes effect in two to four parts, at
                          steps of their own: the kernel gave a short count, the engine went on */
    uint64_t stall_ns;
    FILE *trace; /* every step as a line of text; NULL = none. Also: SIM_TRACE=1 */
};

/* 0 or -ENOMEM. The simulator is freed by io_free(). */
int sim_new(const struct sim_config *cfg, struct io **out);
struct sim_world *sim_world_of(struct io *io);

/* io_run() returns
 *   0              io_stop() was called and nothing is left to run;
 *   SIM_POWER_CUT  after the number of steps given to sim_cut_after();
 *   -EDEADLK       nothing can run, no timer is set and nothing is in flight: sim_report() says
 *                  who waits for what. (Waiting for a signal is such a wait.)
 * The last two leave coroutines alive; io_free() gives their stacks back. */
void sim_cut_after(struct io *io, uint64_t n_steps); /* counted from the start; 0 = never */
uint64_t sim_steps(struct io *io);                   /* made so far */
void sim_report(struct io *io, FILE *out);

/* Every step and operation so far in 64 bits: its kind, place, size, time, result and, for writes
 * and sends, content. Equal runs have equal hashes. */
uint64_t sim_trace_hash(struct io *io);

/* Connections made from now on come from this process (io_sock_peer_pid). 0 = the daemon's own. */
void sim_client_pid(struct io *io, int pid);
/* Others have their turns at every step of long work (struct io_turns), whatever the seed. */
void sim_short_turns(struct io *io);
/* The other end of what io_sock_from_fds(rfd, wfd) made: the person at the terminal. A listener of
 * type IO_ADDR_FD is reached by io_connect() with the same fd. */
int sim_fds_peer(struct io *io, int rfd, int wfd, struct io_sock **out);

/* ------------------------------------------------------------------ the disk */

/* An empty disk with the directories "/" and "." (where names without a slash live). */
struct sim_world *sim_world_new(void);
void sim_world_free(struct sim_world *w); /* no struct io uses it any more */
/* A second disk of equal state, pending writes included; without open files, locks and faults. */
struct sim_world *sim_world_clone(const struct sim_world *w);
/* Names, sizes and contents as a reader sees them. Equal disks have equal hashes. */
uint64_t sim_world_hash(const struct sim_world *w);

/* Set the scene: durable at once, no fault strikes. Parent directories must exist. 0 or -errno. */
int sim_mkdir(struct sim_world *w, const char *path);
int sim_file_write(struct sim_world *w, const char *path, const void *buf, size_t len,
                   uint64_t off); /* makes the file */
/* What a reader sees now. Bytes read or -errno. */
ssize_t sim_file_read(struct sim_world *w, const char *path, void *buf, size_t len, uint64_t off);
int64_t sim_file_size(struct sim_world *w, const char *path);
int sim_file_remove(struct sim_world *w, const char *path);
/* Pending (not durable) changes of contents and names. */
size_t sim_world_pending(const struct sim_world *w);

/* The disk is full at this many bytes in whole 4 KiB blocks; UINT64_MAX = never. */
void sim_disk_limit(struct sim_world *w, uint64_t bytes);
uint64_t sim_disk_used(const struct sim_world *w);

/* What of the unflushed survives. A change of a name never overtakes an earlier one of the same
 * name; a size never overtakes an earlier cut of the file; the rest knows no order. */
enum sim_cut {
    SIM_CUT_ANY,     /* one of those below, by the seed */
    SIM_CUT_NONE,    /* nothing */
    SIM_CUT_ALL,     /* everything */
    SIM_CUT_LAST,    /* only the last operation */
    SIM_CUT_PREFIX,  /* all operations up to some point */
    SIM_CUT_WRITES,  /* any set of whole operations */
    SIM_CUT_SECTORS, /* for each 512-byte sector any of its versions */
    SIM_CUT_PROCESS, /* kill -9: nothing is lost, nothing becomes durable. Not part of ANY. */
};
/* No struct io may run in this world afterwards, except new ones; the old ones may be freed.
 * Open files and locks are gone. Returns the mode that was used. */
enum sim_cut sim_power_cut(struct sim_world *w, enum sim_cut mode, uint64_t seed);

/* ------------------------------------------------------------------ faults */

enum sim_kind {
    SIM_ANY_KIND,
    SIM_OPEN,
    SIM_CLOSE, /* cannot fail: stalls only */
    SIM_STAT,
    SIM_READ,
    SIM_WRITE,
    SIM_FSYNC,
    SIM_ZERO,
    SIM_TRUNCATE,
    SIM_EXTENT,
    SIM_COPY,
    SIM_LOCK,
    SIM_RENAME,
    SIM_UNLINK,
    SIM_SYNC_DIR,
    SIM_LISTEN,
    SIM_CONNECT,
    SIM_ACCEPT,
    SIM_RECV,
    SIM_SEND,
    SIM_SIGNAL,
    SIM_N_KINDS,
};
const char *sim_kind_name(enum sim_kind kind);

/* The nth operation (1 = the next) of this kind on this name (NULL = any) gives -err; with `sticky`
 * all later ones too. A file goes by the name it was opened with, a socket by the listener's:
 * "unix:PATH", "tcp:HOST:PORT", "fd:N". A write that fails may have been made in part; a sync that
 * fails loses some of the file's unflushed writes for good, which readers may or may not notice
 * before the power goes; ECONNRESET on a socket ends the connection for both sides. */
void sim_fail(struct sim_world *w, const char *name, enum sim_kind kind, unsigned nth, int err,
              bool sticky);
/* Likewise, but it takes this long. Whether its effect comes before the wait or after, the seed
 * decides. */
void sim_stall(struct sim_world *w, const char *name, enum sim_kind kind, unsigned nth, uint64_t ns,
               bool sticky);
void sim_clear_faults(struct sim_world *w);
