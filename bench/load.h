/* SPDX-License-Identifier: Apache-2.0 */
/* The engine of nbdload: keeps N connections busy with requests and checks every reply.
 *
 * A run is a list of phases over one range of the export: fill it, load it, read back what was
 * written. All phases share the connections and the table of generations (see pattern.h). */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "handshake.h"
#include "latency.h"

#define LOAD_MAX_DEPTH 4096
#define LOAD_MAX_CONNECTIONS 256
#define LOAD_MAX_BLOCK (32u << 20)

enum load_verify { VERIFY_NONE, VERIFY_SAMPLE, VERIFY_FULL };

struct load_config {
    struct nbd_target target;
    uint64_t seed;
    uint64_t off, len; /* len 0: to the end of the export */
    uint32_t block;    /* what the table counts; phases that follow the table use this size */
    unsigned depth;    /* requests in flight on each connection */
    unsigned n_conns, n_threads;
    unsigned stall_s; /* give up after so long without a reply */
    enum load_verify verify;
    bool fua;
    bool writes;    /* some phase writes */
    bool no_table;  /* no phase follows the table */
    int server_pid; /* 0, or the process whose CPU time is wanted */
};

enum load_order {
    ORDER_RANDOM,
    ORDER_SEQUENTIAL,
    ORDER_WRITTEN, /* in order, only blocks that were written since the fill */
};

struct load_phase {
    enum load_order order;
    unsigned read_percent;
    uint32_t block;
    enum load_verify verify;
    bool one_pass;     /* stop at the end of the range, else begin again */
    bool initial;      /* write generation 0 and leave the table alone; one pass, sequential */
    uint64_t requests; /* stop after so many, 0: no limit */
    uint64_t time_ns;  /* stop after so long, 0: no limit */
};

struct load_result {
    uint64_t reads, writes, bytes, errors, mismatches;
    uint64_t wall_ns, client_cpu_ns, server_cpu_ns, max_ns;
    uint64_t latency[LATENCY_BUCKETS]; /* of each request, from its sending to its reply */
};

struct load;

/* Connects. NULL: failed, the cause went to stderr. The configuration is copied, its strings
 * borrowed until load_close(). */
struct load *load_open(const struct load_config *c);
void load_close(struct load *l);
/* Bytes that the phases cover: whole blocks only. */
uint64_t load_length(const struct load *l);
/* 0, or -1: the connection cannot be used any more, the cause went to stderr. Errors that the
 * server returned and mismatches are counted in *out (valid in both cases), not a failure of this
 * call. */
int load_run(struct load *l, const struct load_phase *p, struct load_result *out);
/* The time below which `percent` of the requests stayed, in ns. */
uint64_t load_percentile(const struct load_result *r, double percent);
