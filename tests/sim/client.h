/* SPDX-License-Identifier: Apache-2.0 */
/* Clients that share disks: several connections to one export, on several loops, that write over
 * each other, and one model (model.h) for each disk that knows what each of them may see.
 *
 * Unlike the guests of guest.h nobody owns a sector here: that is the point. */
#pragma once
#include "model.h"
#include "nbd.h"

#define SHARED_MAX 3u
#define CLIENTS_MAX 6u /* of one disk */

/* A bitmap that records: it was made empty between two ticks. */
struct recording {
    bool on;
    unsigned shift;
    uint64_t q, r;
};

struct shared {
    struct clients *all;
    unsigned number;
    char node[8], file[8];
    uint64_t size;            /* of the export */
    uint64_t base, file_size; /* raw: a window of the file; the rest of it stays as it is */
    bool raw, direct, unmap, writethrough, detect;
    bool sparse;    /* mostly holes, and requests that make more of them */
    unsigned grain; /* requests are multiples of this */
    uint64_t hot;   /* most of them are at the beginning, where they meet */
    /* Where something has changed, or was said to be a hole: look there, write there. */
    struct {
        uint64_t off, len;
    } recent[4];
    unsigned n_recent;
    bool faulty;     /* requests may fail */
    bool stalls;     /* and take long; else LATENCY is the bound */
    bool sync_fault; /* armed: flushes fail until the node is opened again */
    struct model *model;
    struct recording shown, cleared; /* "x", in the export; "b", which lists clear */
    unsigned n_exports, n_clients, n_connected;
    bool closing; /* the exports go away under the clients */
    unsigned generation;
    uint32_t *orphan;
    size_t n_orphans, cap_orphans;
    uint64_t n_done;
};

struct client {
    struct shared *d;
    unsigned number, depth, generation; /* of the exports that it began to connect to */
    uint64_t think_ns;
    bool structured, leaving;
    struct nbd_client nbd;
    struct {
        uint32_t write; /* its number in the model, 0: not one */
        uint64_t sent;
        bool fua;
    } rq[NBD_DEPTH];
};

struct clients {
    struct world *w;
    struct shared disk[SHARED_MAX];
    unsigned n_disks;
    struct client client[SHARED_MAX * CLIENTS_MAX];
    unsigned n_clients;
    bool stop, resets; /* connections may break by themselves */
    unsigned n_running;
    struct spin lock;
    struct co_queue changed; /* a client has connected, disconnected or ended */
};

/* Every request to a disk that does not hang is answered within this time, whatever others do. */
#define LATENCY (SECOND / 4)

/* Before the life. */
struct shared *shared_add(struct clients *c);
/* Node and exports come and go; a hard end, with clients or without. */
co_fn void shared_open_node(struct shared *d);
co_fn void shared_close_node(struct shared *d);
co_fn void shared_export(struct shared *d);
/* On return nothing of a client is under way in the daemon any more. */
co_fn void shared_unexport(struct shared *d);
void clients_start(struct clients *c);
/* All have their answers and have left. */
co_fn void clients_end(struct clients *c);
/* After a power cut: those of the life before are dead. */
void clients_forget(struct clients *c);
void clients_free(struct clients *c);
/* The file in this world (after a cut, or a copy of the world in which the power went now) against
 * the model. */
void shared_check_disk(struct shared *d, struct sim_world *world, bool killed);
/* Through a connection of our own. All of the disk, with the ticks; owned by the caller. */
co_fn void shared_flush(struct shared *d);
co_fn uint8_t *shared_read_all(struct shared *d, uint64_t *sent, uint64_t *told);
