/* SPDX-License-Identifier: Apache-2.0 */
/* A daemon in the simulator that a test talks to without a socket: lists are handed to txn_run()
 * itself, plain commands to qmp_dispatch(), guests' writes to a root. What a probe or a failing
 * allocation is to see is then only what the daemon does, and thousands of lists take a second.
 *
 * Its disks are those of tests/sim/ref.h: d, f, td, tf keep nothing, e and te are files. */
#pragma once
#include "ref.h"
#include "txn/txn.h"

struct instance;
struct root;

struct local_event {
    char name[24], id[16], status[16];
    bool error;
    uint64_t len, offset; /* of a job's end: bytes to copy, and copied */
};
#define LOCAL_EVENTS 1024u

/* Stands in front of the instance's store. */
struct local_store {
    struct store store; /* first */
    struct store *below;
    unsigned yields; /* before it answers */
    bool fail;       /* refuse records of what happened */
    unsigned n_records, n_refused;
};

struct local {
    struct world *w;
    const char *who; /* prefix of its files and sockets */
    struct instance *inst;
    struct root *writer[3]; /* of d, e, f */
    unsigned n_inside[3];   /* writes of these that are admitted and not done */
    struct local_store store;
    struct local_sink *sink;
    struct local_event event[LOCAL_EVENTS]; /* since local_forget_events() */
    unsigned n_events;
    struct io_event heard;
    void (*on_event)(void *arg, const struct local_event *e); /* or NULL; must not yield */
    void *on_event_arg;
};

/* Opens the disks, the held bitmap on d and its export. `inst` is not yet told. */
co_fn void local_open(struct local *l, struct world *w, struct instance *inst, const char *who);
co_fn void local_close(struct local *l); /* the instance can be closed then */
/* Lists and ends of jobs are recorded there from now on, by way of l->store. */
void local_use_store(struct local *l, struct store *below);
void local_forget_events(struct local *l);

/* What became of a list. */
struct local_outcome {
    int failed; /* -1: it has happened, or no action is to blame (then code < 0) */
    int code;
    char phase[12], text[400];
};
struct local_props {
    bool grouped, dry_run;
    const char *id;
    void (*probe)(void *arg, enum txn_step step, unsigned done);
    void *probe_arg;
    unsigned long fail_alloc; /* the n-th allocation of txn_run() fails; 0: none */
    unsigned long *n_allocs;  /* or NULL: how many it made */
};
co_fn struct local_outcome local_run(struct local *l, json_t *actions,
                                     const struct local_props *props);
/* Any command as a client sends it; the whole reply. Owned; takes `args`. */
co_fn json_t *local_call(struct local *l, const char *name, json_t *args);
/* An action as the plain command, or any other command. NULL: it succeeded; else the text. Owned
 * (free). */
co_fn char *local_command(struct local *l, const char *name, json_t *args);
/* Has to succeed; what it returned, owned. */
co_fn json_t *local_get(struct local *l, const char *name, json_t *args);
co_fn void local_write(struct local *l, const char *node, uint64_t off, uint64_t len);
/* All jobs are in this state (or later in it than none). */
co_fn void local_wait_jobs(struct local *l, const char *status);
co_fn void local_wait_gone(struct local *l, const char *id);
/* Cancels all jobs and waits until they are gone, then removes every bitmap but the held one. */
co_fn void local_reset(struct local *l);

/* In the form of ref_text(). Owned (free). */
char *local_bitmaps(struct local *l);
/* Everything there is: which objects, bits, flags, owners, generations, nodes, exports, jobs, and
 * what is on the disk. Equal texts, equal states. Not a co_fn, takes nothing from base/mem.h.
 * Owned (free). */
char *local_whole(struct local *l);
/* The same, but of the disk only the files that lists name: what stands there for a time under a
 * name of its own is left out. */
char *local_whole_files(struct local *l);
/* The same without the disk, for when others write there. */
char *local_whole_memory(struct local *l);
