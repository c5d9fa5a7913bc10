/* SPDX-License-Identifier: Apache-2.0 */
/* How the client stays cheaper than any server it measures:
 *
 *   - Requests are encoded into one buffer until the window or the buffer is full, then leave in
 *     one send. Payload is made right there, in pieces if it is larger than the buffer: it is
 *     still in the CPU's cache when the kernel copies it.
 *   - One recv takes whatever has arrived. Replies are decoded and checked where they lie; the
 *     data of a reply may come in any number of pieces and is never put together.
 *   - A thread with one connection just blocks in recv: two system calls for a whole window.
 *   - The clock is read twice per turn, not per request.
 *
 * The table holds one number per block: its generation, and who is using it. A block that is being
 * written is neither read nor written by anyone else, a block that is being read is not written: so
 * every read has exactly one right answer. A block whose write failed holds nobody knows what and
 * is never touched again. Blocks are dealt out to lanes (lane = block modulo number of lanes) and a
 * lane belongs to one thread, so the table needs no locks. Connections of one thread share a lane
 * if the server promises that they see each other's writes, else each connection has its own. */
#include "load.h"

#include <assert.h>
#include <err.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/bytes.h"
#include "clock.h"
#include "load_priv.h"
#include "pattern.h"

int worker_fail(struct worker *w, const char *what, int code)
{
    if (!atomic_exchange(&w->l->failed, true))
        warnx("%s%s%s", what, code ? ": " : "", code ? strerror(code) : "");
    w->failed = true;
    return -1;
}

/* ---- Latency ---- */

uint64_t load_percentile(const struct load_result *r, double percent)
{
    return latency_percentile(r->latency, r->reads + r->writes, r->max_ns, percent);
}

/* ---- One thread ---- */

static int pull_ready(struct worker *w)
{
    for (unsigned i = 0; i < w->n_conns; i++) {
        const struct conn *c = w->conns[i];
        w->polls[i].events = POLLIN | (c->out_head < c->out_tail ? POLLOUT : 0);
    }
    int n = poll(w->polls, w->n_conns, w->l->c.stall_s * 1000);
    if (n < 0 && errno != EINTR)
        return worker_fail(w, "poll", errno);
    if (n == 0)
        return worker_fail(w, "the server does not answer", 0);
    for (unsigned i = 0; n > 0 && i < w->n_conns; i++)
        if (w->polls[i].revents & ~POLLOUT && conn_pull(w->conns[i], MSG_DONTWAIT) < 0)
            return -1;
    return 0;
}

static int pull(struct worker *w)
{
    /* Blocking is right only if there is one thing to wait for. */
    if (w->sole && w->conns[0]->out_head == w->conns[0]->out_tail)
        return conn_pull(w->conns[0], 0);
    return pull_ready(w);
}

static bool range_done(const struct worker *w)
{
    const struct load *l = w->l;
    for (unsigned i = 0; i < w->n_conns; i++) {
        const struct lane *lane = w->conns[i]->lane;
        if (!w->p->one_pass)
            return false;
        if (!w->p->initial && lane->next < lane_blocks(l, lane))
            return false;
    }
    return true;
}

static void *worker_main(void *arg)
{
    struct worker *w = arg;
    while (!atomic_load_explicit(&w->l->failed, memory_order_relaxed)) {
        w->now_ns = clock_ns(CLOCK_MONOTONIC);
        w->stopping = w->now_ns >= w->deadline_ns;
        for (unsigned i = 0; i < w->n_conns; i++)
            if (conn_push(w->conns[i]) < 0)
                return NULL;
        if (w->n_inflight == 0 && (w->stopping || w->quota == 0 || range_done(w)))
            break;
        if (w->n_inflight == 0) {
            worker_fail(w, "no block is left that may be used", 0);
            break;
        }
        if (pull(w) < 0)
            break;
    }
    return NULL;
}

/* ---- A run ---- */

static void worker_prepare(struct load *l, unsigned i, const struct load_phase *p,
                           uint64_t start_ns)
{
    struct worker *w = &l->workers[i];
    unsigned n = l->c.n_threads;
    w->p = p;
    w->res = (struct load_result){0};
    w->random = pattern_mix(pattern_mix(l->c.seed) + i);
    w->quota = p->requests ? p->requests / n + (i < p->requests % n) : UINT64_MAX;
    w->deadline_ns = p->time_ns ? start_ns + p->time_ns : UINT64_MAX;
    w->stopping = false;
}

static void result_add(struct load_result *sum, const struct load_result *r)
{
    sum->reads += r->reads;
    sum->writes += r->writes;
    sum->bytes += r->bytes;
    sum->errors += r->errors;
    sum->mismatches += r->mismatches;
    sum->max_ns = MAX(sum->max_ns, r->max_ns);
    for (unsigned i = 0; i < LATENCY_BUCKETS; i++)
        sum->latency[i] += r->latency[i];
}

static void run_workers(struct load *l)
{
    unsigned started = 1;
    for (; started < l->c.n_threads; started++) {
        struct worker *w = &l->workers[started];
        int r = pthread_create(&w->thread, NULL, worker_main, w);
        if (r != 0) {
            worker_fail(w, "cannot start a thread", r);
            break;
        }
    }
    worker_main(&l->workers[0]);
    for (unsigned i = 1; i < started; i++)
        pthread_join(l->workers[i].thread, NULL);
}

int load_run(struct load *l, const struct load_phase *p, struct load_result *out)
{
    uint64_t start_ns = clock_ns(CLOCK_MONOTONIC);
    uint64_t client_ns = clock_ns(CLOCK_PROCESS_CPUTIME_ID),
             server_ns = clock_cpu_of(l->c.server_pid);
    assert(p->initial ? p->one_pass : l->table != NULL);
    for (uint64_t i = 0; i < l->n_lanes; i++)
        l->lanes[i].next = 0;
    for (unsigned i = 0; i < l->c.n_threads; i++)
        worker_prepare(l, i, p, start_ns);
    run_workers(l);
    *out = (struct load_result){0};
    for (unsigned i = 0; i < l->c.n_threads; i++)
        result_add(out, &l->workers[i].res);
    out->wall_ns = clock_ns(CLOCK_MONOTONIC) - start_ns;
    out->client_cpu_ns = clock_ns(CLOCK_PROCESS_CPUTIME_ID) - client_ns;
    out->server_cpu_ns = clock_cpu_of(l->c.server_pid) - server_ns;
    return atomic_load(&l->failed) ? -1 : 0;
}

/* ---- Opening ---- */

static void *try_alloc(size_t n, size_t size)
{
    void *p = calloc(n, size);
    if (!p)
        warnx("out of memory");
    return p;
}

static int conn_open(struct load *l, unsigned i, struct nbd_export *e)
{
    struct conn *c = &l->conns[i];
    c->fd = nbd_open(&l->c.target, e);
    if (c->fd < 0)
        return -1;
    struct timeval limit = {.tv_sec = l->c.stall_s};
    setsockopt(c->fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    c->out = try_alloc(1, LOAD_BUFFER);
    c->in = try_alloc(1, LOAD_BUFFER);
    c->slots = try_alloc(l->c.depth, sizeof *c->slots);
    c->free_slots = try_alloc(l->c.depth, sizeof *c->free_slots);
    if (!c->out || !c->in || !c->slots || !c->free_slots)
        return -1;
    for (unsigned s = 0; s < l->c.depth; s++)
        c->free_slots[c->n_free++] = s;
    return 0;
}

static int check_export(struct load *l)
{
    struct load_config *c = &l->c;
    const struct nbd_export *e = &l->e;
    if (c->off > e->size || c->len > e->size - c->off) {
        warnx("the range is not inside the export (%" PRIu64 " bytes)", e->size);
        return -1;
    }
    if (c->len == 0)
        c->len = e->size - c->off;
    l->n_blocks = c->len / c->block;
    if (e->min_block > c->block || c->off % e->min_block || c->block % e->min_block)
        warnx("the export takes only multiples of %u bytes", e->min_block);
    else if (e->read_only && c->writes)
        warnx("the export is read-only");
    else if (c->fua && !e->can_fua)
        warnx("the export does not support FUA");
    else if (l->n_blocks < c->n_conns)
        warnx("the range has only %" PRIu64 " blocks", l->n_blocks);
    else
        return 0;
    return -1;
}

/* Lanes, table and threads, once the export is known. */
static int load_divide(struct load *l)
{
    const struct load_config *c = &l->c;
    l->n_lanes = l->e.multi_conn ? c->n_threads : c->n_conns;
    l->lanes = try_alloc(l->n_lanes, sizeof *l->lanes);
    l->workers = try_alloc(c->n_threads, sizeof *l->workers);
    if (!l->lanes || !l->workers)
        return -1;
    for (unsigned i = 0; i < c->n_threads; i++) {
        struct worker *w = &l->workers[i];
        w->l = l;
        w->conns = try_alloc(c->n_conns, sizeof *w->conns);
        w->polls = try_alloc(c->n_conns, sizeof *w->polls);
        if (!w->conns || !w->polls)
            return -1;
    }
    for (uint64_t i = 0; i < l->n_lanes; i++)
        l->lanes[i].index = i;
    for (unsigned i = 0; i < c->n_conns; i++) {
        struct conn *conn = &l->conns[i];
        struct worker *w = &l->workers[i % c->n_threads];
        conn->w = w;
        conn->lane = &l->lanes[i % l->n_lanes];
        w->polls[w->n_conns].fd = conn->fd;
        w->conns[w->n_conns++] = conn;
        w->sole = w->n_conns == 1;
    }
    if (c->no_table)
        return 0;
    /* Pages of a huge, thinly used range are never touched: do not reserve them. */
    l->table = mmap(NULL, l->n_blocks * sizeof *l->table, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (l->table == MAP_FAILED) {
        l->table = NULL;
        warn("the table of generations");
        return -1;
    }
    return 0;
}

struct load *load_open(const struct load_config *c)
{
    struct load *l = try_alloc(1, sizeof *l);
    if (!l)
        return NULL;
    l->c = *c;
    l->conns = try_alloc(c->n_conns, sizeof *l->conns);
    if (!l->conns)
        goto fail;
    for (unsigned i = 0; i < c->n_conns; i++)
        l->conns[i].fd = -1;
    for (unsigned i = 0; i < c->n_conns; i++) {
        struct nbd_export e;
        if (conn_open(l, i, &e) < 0)
            goto fail;
        if (i > 0 && (e.size != l->e.size || e.structured != l->e.structured)) {
            warnx("two connections see different exports");
            goto fail;
        }
        l->e = e;
    }
    if (check_export(l) < 0 || load_divide(l) < 0)
        goto fail;
    return l;
fail:
    load_close(l);
    return NULL;
}

void load_close(struct load *l)
{
    if (!l)
        return;
    for (unsigned i = 0; l->conns && i < l->c.n_conns; i++) {
        struct conn *c = &l->conns[i];
        if (c->fd >= 0)
            nbd_close(c->fd, l->e.extended);
        free(c->out);
        free(c->in);
        free(c->slots);
        free(c->free_slots);
    }
    for (unsigned i = 0; l->workers && i < l->c.n_threads; i++) {
        free(l->workers[i].conns);
        free(l->workers[i].polls);
    }
    if (l->table)
        munmap(l->table, l->n_blocks * sizeof *l->table);
    free(l->workers);
    free(l->lanes);
    free(l->conns);
    free(l);
}

uint64_t load_length(const struct load *l)
{
    return l->n_blocks * l->c.block;
}
