/* SPDX-License-Identifier: Apache-2.0 */
/* What the files of the engine share: load.c opens, runs and sums up, load_send.c chooses and
 * encodes requests, load_receive.c decodes and checks replies. For nobody else. */
#pragma once
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>

#include "load.h"

#define LOAD_BUFFER (256u << 10) /* of each connection and direction */

/* A table entry: the low bits say who uses the block, the rest is the generation (it may wrap). */
#define USE_BITS 12
#define USE_MASK ((1u << USE_BITS) - 1)
#define USE_WRITER USE_MASK
#define USE_UNKNOWN (USE_MASK - 1)
#define USE_MAX_READERS (USE_MASK - 2)
#define GEN_MASK (UINT32_MAX >> USE_BITS)

struct slot {
    uint64_t cookie, key, off, start_ns, block;
    uint32_t len, got; /* got: bytes of a read's data that have arrived */
    bool write, busy, failed, bad;
};

struct lane {
    uint64_t index, next; /* next block in sequential order */
};

struct conn {
    int fd;
    struct worker *w;
    struct lane *lane;
    struct slot *slots;
    uint16_t *free_slots;
    unsigned n_free;
    uint64_t n_sent; /* makes cookies unique, moves the sample */

    uint8_t *out;
    size_t out_head, out_tail;
    struct slot *making; /* its payload is not all encoded yet */
    uint32_t made;

    uint8_t *in;
    size_t in_len;
    struct slot *taking; /* its data is arriving */
    uint64_t take_off;
    uint32_t take_left;
    bool take_done; /* this data ends the reply */
};

struct worker {
    struct load *l;
    const struct load_phase *p;
    pthread_t thread;
    struct conn **conns;
    struct pollfd *polls;
    unsigned n_conns, n_inflight;
    uint64_t random, quota, deadline_ns, now_ns;
    bool stopping, sole, failed;
    struct load_result res;
};

struct load {
    struct load_config c;
    struct nbd_export e;
    uint64_t n_blocks, n_lanes;
    uint32_t *table;
    struct conn *conns;
    struct lane *lanes;
    struct worker *workers;
    atomic_bool failed;
    atomic_uint n_complaints;
};

/* How many blocks a lane has. */
static inline uint64_t lane_blocks(const struct load *l, const struct lane *lane)
{
    return (l->n_blocks - lane->index + l->n_lanes - 1) / l->n_lanes;
}

/* Ends the run: the first caller's cause is printed. Always -1. */
int worker_fail(struct worker *w, const char *what, int code);

/* Send all that may be in flight now, as far as the socket takes it. 0 or -1. */
int conn_push(struct conn *c);
/* One recv, with these flags, and everything that it brought. 0 or -1. */
int conn_pull(struct conn *c, int flags);
