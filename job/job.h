/* SPDX-License-Identifier: Apache-2.0 */
/* Jobs: long work with progress, control and an end that is itself a transaction.
 *
 * States and verbs are QEMU's (qapi/job.json; contract sections 6.1 to 6.6). Every job is in a
 * group: alone, or with the others of a transaction that asked for completion-mode=grouped. The
 * members of a group end in one way at one instant (law L7): under the command lock and one quiesce
 * over all their nodes, every member commits or every member aborts, one record decides
 * (store/store.h), then events leave in order of creation. If the record is refused, every member
 * fails and what it changed folds back. Memory for the end is taken when a job is made.
 *
 * Everything here is control loop only. A job is made inside a transaction's prepare (job_init,
 * job_register), is *created* but silent until job_start(), and vanishes without a trace with
 * job_drop(). */
#pragma once
#include <jansson.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/queue.h>

#include "base/error.h"
#include "co/co.h"
#include "io/io.h"
#include "store/store.h"

struct bitmap_pace;
struct event_bus;
struct graph;
struct job;
struct node;

enum job_status {
    JOB_CREATED,
    JOB_RUNNING,
    JOB_PAUSED,
    JOB_READY,
    JOB_STANDBY,
    JOB_WAITING,
    JOB_PENDING,
    JOB_ABORTING,
    JOB_CONCLUDED,
    JOB_NULL,
};

enum job_verb {
    JOB_CANCEL,
    JOB_PAUSE,
    JOB_RESUME,
    JOB_SET_SPEED,
    JOB_COMPLETE,
    JOB_FINALIZE,
    JOB_DISMISS,
};

/* What to do about an I/O error; AUTO is ENOSPC. */
enum job_on_error { JOB_ERROR_REPORT, JOB_ERROR_IGNORE, JOB_ERROR_ENOSPC, JOB_ERROR_STOP };

struct job_ops {
    const char *type; /* "backup" */
    /* The work, in a coroutine of its own. Returns 0, or -errno with job_fail() told why; returns
     * soon after job_cancelled() became true. */
    co_fn int (*run)(struct job *j);
    /* pause, resume, cancel or speed changed: wake the workers. */
    void (*kick)(struct job *j);
    /* The end: sources are quiesced for writes. Exactly one of the two; neither can fail or needs
     * memory. The record follows. Work on bitmaps goes at that pace. */
    co_fn void (*commit)(struct job *j, struct bitmap_pace *pace);
    co_fn void (*abort)(struct job *j, struct bitmap_pace *pace);
    /* The record was refused: after commit or abort, what they made of bitmaps becomes what it is
     * after a job that failed. Neither fails nor needs memory, nor any record to be right: it is
     * what becomes of a job that the daemon did not live to end. */
    co_fn void (*fold_back)(struct job *j, struct bitmap_pace *pace);
    /* What the end changes besides the job: adds at most JOB_NAMES to `names`, returns how many. */
    unsigned (*names)(struct job *j, struct store_name *names);
    /* After the end, nodes released: free everything but the job itself. */
    co_fn void (*clean)(struct job *j);
    /* Nodes to hold for the end: adds at most 2 to `nodes`, returns how many. */
    unsigned (*nodes)(struct job *j, struct node **nodes);
};
#define JOB_NODES 2u
#define JOB_NAMES 2u

struct job_group {
    struct jobs *jobs;
    unsigned n, refs;
    bool pending, finalize, finishing, decided;
    struct node **nodes;                    /* room for those of all members */
    struct store_name *names;               /* likewise, and for the members themselves */
    struct loop_msg again;                  /* begin_finish() could not get memory */
    TAILQ_HEAD(job_list_head, job) members; /* in order of creation */
};

struct job {
    const struct job_ops *ops;
    struct jobs *jobs;
    char *id;
    enum job_status status;
    struct job_group *group;
    bool auto_finalize, auto_dismiss;
    bool user_paused, ended, started;
    _Atomic bool cancelled, paused;  /* what workers on other loops look at */
    _Atomic uint64_t speed;          /* bytes a second, 0 = unlimited */
    _Atomic uint64_t current, total; /* progress, bytes */
    enum { JOB_IO_OK, JOB_IO_FAILED, JOB_IO_NOSPACE } io_status;
    int ret;
    char error[400];
    struct io_event kick;  /* of the run coroutine */
    struct loop_msg again; /* job_begin() could not get memory */
    TAILQ_ENTRY(job) link, in_group;
};

struct jobs;
int jobs_new(struct graph *g, struct event_bus *bus, struct jobs **out);
void jobs_free(struct jobs *js); /* none is left */
struct graph *jobs_graph(struct jobs *js);
/* Ends are recorded there; NULL (the beginning): nowhere. */
void jobs_set_store(struct jobs *js, struct store *s);

int job_group_new(struct jobs *js, struct job_group **out); /* one reference, for the transaction */
void job_group_put(struct job_group *g);

struct job_options {
    const char *id;
    uint64_t speed;
    bool auto_finalize, auto_dismiss;
    struct job_group *group; /* NULL: a group of one */
};
/* Fill and register `j` (zeroed, heap, first member of the caller's object: a job that started is
 * freed with mem_free(j) when it is dismissed). Checks the id. -EINVAL, -EEXIST,
 * -ENOMEM: nothing happened. */
int job_register(struct job *j, struct jobs *js, const struct job_ops *ops,
                 const struct job_options *o, struct tide_error *err);
/* Never started: leaves no trace. The embedding object is the caller's to free. */
void job_drop(struct job *j);
/* Open the gate. Two steps, so that the jobs of one list are all created before one runs. */
void job_announce(struct job *j);
void job_start(struct job *j);

/* For the work itself. */
static inline bool job_cancelled(const struct job *j)
{
    return atomic_load(&j->cancelled);
}
static inline bool job_wants_pause(const struct job *j)
{
    return atomic_load(&j->paused);
}
void job_fail(struct job *j, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* All workers stand still / go on: the status follows. Control loop. */
void job_set_parked(struct job *j, bool parked);
/* An I/O error happened: emits BLOCK_JOB_ERROR and answers REPORT, IGNORE or STOP (then the job is
 * paused until a user resumes it). */
enum job_on_error job_io_error(struct job *j, enum job_on_error policy, bool read, int error);

/* For commands. `block_class`: unknown jobs are DeviceNotActive, as block-job-* says. */
int job_find(struct jobs *js, const char *id, bool block_class, struct job **out,
             struct tide_error *err);
int job_apply(struct job *j, enum job_verb verb, bool force, bool block_class,
              struct tide_error *err);
int job_set_speed(struct job *j, int64_t speed, struct tide_error *err);
/* Returns when the group has ended. */
co_fn int job_finalize(struct job *j, struct tide_error *err);
json_t *jobs_query(struct jobs *js);       /* query-jobs: newest first; NULL: no memory */
json_t *jobs_query_block(struct jobs *js); /* query-block-jobs */
/* Shutdown: force-cancel all, wait until they are gone, dismiss. */
co_fn void jobs_cancel_all(struct jobs *js);
