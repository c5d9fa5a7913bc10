/* SPDX-License-Identifier: Apache-2.0 */
/* The kit of the whole-daemon tests: one daemon (qmp/instance.h) and its clients inside the
 * simulator, driven by one seed.
 *
 * A `struct scenario` is a story: make the files, live with the daemon, perhaps lose power and look
 * at what a second daemon finds. scenario_main() tells it for SIM_SEEDS seeds from SIM_SEED (0) on,
 * for one if only SIM_SEED is given, and now and then twice, to see that equal seeds make equal
 * runs. SIM_QMP=1 shows the control clients' commands, SIM_TRACE=1 every step, SIM_ONLY=NAME tells
 * one scenario only. Everything random comes from the seed.
 *
 * *Ticks* order what clients saw: the tick grows by one whenever a client sends a request or gets
 * an answer. What was sent at tick s and answered at tick a took effect somewhere in between. */
#pragma once
#include <inttypes.h>
#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/bytes.h"
#include "co/sync.h"
#include "io/sim.h"

#define SECOND UINT64_C(1000000000)
#define SECTOR 512u
#define QMP_ADDR "/qmp"
#define NBD_ADDR "/nbd"
#define FOREVER UINT64_MAX

struct world;
extern struct world *current_world; /* for the message of a failure */
_Noreturn void world_failed(const char *file, int line, const char *what);
#define CHECK(cond)                                                                                \
    do {                                                                                           \
        if (!(cond))                                                                               \
            world_failed(__FILE__, __LINE__, #cond);                                               \
    } while (0)
/* With words, printed before the failure. */
#define CHECK_SAY(cond, ...)                                                                       \
    do {                                                                                           \
        if (!(cond)) {                                                                             \
            fprintf(stderr, __VA_ARGS__);                                                          \
            fputc('\n', stderr);                                                                   \
            world_failed(__FILE__, __LINE__, #cond);                                               \
        }                                                                                          \
    } while (0)

/* ------------------------------------------------------------------ chance */

struct chance {
    uint64_t state;
};
uint64_t chance_next(struct chance *c);
uint64_t chance_below(struct chance *c, uint64_t n); /* n >= 1 */
bool chance_one_in(struct chance *c, uint64_t n);

/* ------------------------------------------------------------------ QMP clients */

/* What a client has heard of a job. */
struct job_news {
    char id[24], status[16];
    bool completed, cancelled; /* BLOCK_JOB_COMPLETED, BLOCK_JOB_CANCELLED came */
    char error[200];           /* what COMPLETED said */
    unsigned n_errors;         /* BLOCK_JOB_ERROR */
    uint64_t ended;            /* tick of the end */
};
#define QMP_MAX_JOBS 64u

struct qmp {
    struct world *w;
    struct io_sock *sock;
    char *buf; /* what came and is not a whole line yet */
    size_t fill, cap;
    uint64_t id;
    uint64_t asked, told; /* ticks of the last call */
    struct job_news job[QMP_MAX_JOBS];
    unsigned n_jobs;
};
co_fn void qmp_open(struct qmp *q, struct world *w);
void qmp_close(struct qmp *q);
/* The whole reply, owned. `args` is JSON with printf marks, or NULL. One call at a time. */
co_fn json_t *qmp_call(struct qmp *q, const char *command, const char *args, ...)
    __attribute__((format(printf, 3, 4)));
/* It has to succeed. qmp_get returns what it returned, owned. */
co_fn json_t *qmp_get(struct qmp *q, const char *command, const char *args, ...)
    __attribute__((format(printf, 3, 4)));
co_fn void qmp_do(struct qmp *q, const char *command, const char *args, ...)
    __attribute__((format(printf, 3, 4)));
/* NULL: it succeeded; else its text. Borrowed from `reply`. */
const char *qmp_error(json_t *reply);
/* Read until the job is in this state ("null": gone). */
co_fn struct job_news *qmp_wait_job(struct qmp *q, const char *id, const char *status);
struct job_news *qmp_job(struct qmp *q, const char *id);
/* Read what has come without waiting longer than `ns`. */
co_fn void qmp_listen(struct qmp *q, uint64_t ns);
/* The bits of a bitmap: one byte for each of its granules, `n` of them. */
co_fn void qmp_bits(struct qmp *q, const char *node, const char *name, unsigned shift,
                    uint8_t *bits, size_t n);

/* ------------------------------------------------------------------ worlds and scenarios */

struct scenario {
    const char *name;
    size_t state_size;
    unsigned n_seeds;    /* when SIM_SEEDS says nothing */
    unsigned weight;     /* a seed is as long as so many others: more than n_seeds are divided */
    unsigned cut_one_in; /* how many lives end in a power cut; 0 = none */
    uint64_t cut_steps;  /* at most after so many steps */
    void (*prepare)(struct world *w, struct sim_config *cfg);
    co_fn void (*live)(struct world *w);
    co_fn void (*closed)(
        struct world *w); /* the daemon has ended, what it served may be looked at */
    co_fn void (*after_cut)(struct world *w);
    void (*finish)(struct world *w); /* frees what state holds */
    /* After so many seeds as ./check tells, or more: did they meet all that they are there for? */
    void (*told)(void);
};

struct world {
    const struct scenario *story;
    uint64_t seed;
    struct chance chance;
    struct sim_world *disk;
    struct io *io;
    struct instance *inst;
    struct qmp qmp; /* the control client */
    uint64_t tick;
    bool cut;         /* the life before this one ended in a power cut */
    enum sim_cut how; /* which kind */
    void *state;
};

/* A node `name` on file `file`, opened as usual for this test or with more members (", ..."). */
co_fn void world_add_file(struct world *w, const char *node, const char *file, const char *more);
co_fn void world_start_nbd(struct world *w);
/* Tells all scenarios and prints TAP; the exit status. */
int scenario_main(const struct scenario *const *stories, unsigned n);
