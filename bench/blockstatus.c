/* SPDX-License-Identifier: Apache-2.0 */
/* blockstatus: how long it takes to learn from an NBD server what is dirty on a disk.
 *
 * With --mark it writes a few bytes at N places that follow from the size of the disk and the seed,
 * far enough from each other that each is a run of its own in a bitmap. Without, it walks the disk
 * with BLOCK_STATUS requests and insists on finding exactly these runs. A reply may say less than
 * it was asked for: then the rest is asked for again. */
#include <err.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "args.h"
#include "base/bytes.h"
#include "clock.h"
#include "exchange.h"
#include "handshake.h"
#include "pattern.h"

#define MAX_DEPTH 256
#define MAX_RUNS (1u << 20)
#define MAX_WALKS 1000
#define IN_SIZE (4u << 20) /* also the longest chunk that is taken */
#define MARK_LEN 4096
#define STALL_S 30
#define STATUS_CANNOT 77 /* the server does not know extended headers */

#define EXTENDED_REQUEST_MAGIC 0x21e41c71u
#define CHUNK_MAGIC 0x668e33efu
#define EXTENDED_REPLY_MAGIC 0x6e8a278cu
enum { EXTENDED_LEN = 32, CHUNK_LEN = 20 };
enum { CHUNK_NONE = 0, CHUNK_BLOCK_STATUS = 5, CHUNK_BLOCK_STATUS_EXT = 6, CHUNK_DONE = 1 };

static const char usage[] =
    "usage: blockstatus --socket PATH --export NAME --runs N --mark\n"
    "       blockstatus --socket PATH --export NAME --runs N --context NAME [options]\n"
    "\n"
    "  --runs N             how many places are, or have been, marked\n"
    "  --mark               write there, one after the other\n"
    "  --context NAME       such as qemu:dirty-bitmap:b0\n"
    "  --granularity BYTES  of the bitmap (65536)\n"
    "  --extended           with extended headers; exit status 77 if the server does not know "
    "them\n"
    "  --depth N            requests in flight (1)\n"
    "  --piece BYTES        what one request asks for (4 GiB less 64 KiB; --extended: all)\n"
    "  --walks N            so many times; the report says the median (1)\n"
    "  --seed N             of the places (1)\n"
    "  --server-pid PID     report this process's CPU time as well\n";

struct run {
    uint64_t off, len;
};

struct slot {
    uint64_t off, left; /* what its replies have yet to describe */
    uint64_t got;       /* bytes that the current reply has described */
    bool busy;
};

struct walk {
    const char *socket_path, *export_name, *context;
    uint64_t granularity, piece, seed;
    unsigned depth, n_runs, n_walks;
    bool mark, extended;
    int server_pid;

    int fd;
    struct nbd_export e;
    struct slot slots[MAX_DEPTH];
    uint64_t next, n_requests;
    unsigned n_busy;
    uint8_t out[MAX_DEPTH * EXTENDED_LEN];
    size_t out_len;
    uint8_t *in;
    size_t in_len;
    struct run *found;
    unsigned n_found;
};

static void parse_command_line(int argc, char **argv, struct walk *w)
{
    static const struct option options[] = {
        {"socket", 1, NULL, 's'},     {"export", 1, NULL, 'e'}, {"context", 1, NULL, 'c'},
        {"runs", 1, NULL, 'r'},       {"mark", 0, NULL, 'm'},   {"granularity", 1, NULL, 'g'},
        {"extended", 0, NULL, 'x'},   {"depth", 1, NULL, 'd'},  {"piece", 1, NULL, 'p'},
        {"walks", 1, NULL, 'w'},      {"seed", 1, NULL, 'n'},   {"help", 0, NULL, 'h'},
        {"server-pid", 1, NULL, 'i'}, {NULL, 0, NULL, 0},
    };
    *w =
        (struct walk){.export_name = "", .granularity = 65536, .seed = 1, .depth = 1, .n_walks = 1};
    for (int c; (c = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        /* clang-format off */
        switch (c) {
        case 's': w->socket_path = optarg; break;
        case 'e': w->export_name = optarg; break;
        case 'c': w->context = optarg; break;
        case 'r': w->n_runs = args_number("runs", optarg, 1, MAX_RUNS); break;
        case 'm': w->mark = true; break;
        case 'g': w->granularity = args_number("granularity", optarg, MARK_LEN, 1u << 31); break;
        case 'x': w->extended = true; break;
        case 'd': w->depth = args_number("depth", optarg, 1, MAX_DEPTH); break;
        case 'p': w->piece = args_number("piece", optarg, MARK_LEN, INT64_MAX); break;
        case 'w': w->n_walks = args_number("walks", optarg, 1, MAX_WALKS); break;
        case 'n': w->seed = args_number("seed", optarg, 0, INT64_MAX); break;
        case 'i': w->server_pid = args_number("server-pid", optarg, 1, INT32_MAX); break;
        case 'h': fputs(usage, stdout); exit(0);
        default: fputs(usage, stderr); exit(2);
        }
        /* clang-format on */
    }
    if (!w->piece)
        w->piece = w->extended ? INT64_MAX : UINT32_MAX - 65535;
    const char *fault = NULL;
    if (!w->socket_path || !w->n_runs || w->mark == !!w->context || optind < argc)
        fault = "give --socket, --runs, and either --mark or --context";
    else if (!is_pow2(w->granularity))
        fault = "--granularity: a power of two";
    else if (!w->extended && w->piece > UINT32_MAX)
        fault = "--piece: less than 4 GiB without --extended";
    if (fault) {
        warnx("%s (--help shows all options)", fault);
        exit(2);
    }
}

/* Where mark i lies: in the i-th part of the disk, and clean blocks lie between it and the next. */
static uint64_t mark_place(const struct walk *w, unsigned i)
{
    uint64_t part = w->e.size / w->n_runs, room = part - 2 * w->granularity;
    uint64_t off = i * part + pattern_mix(pattern_mix(w->seed) + i) % room;
    return round_down(off, w->granularity);
}

/* ---- Replies ---- */

/* At least one byte more. */
static void receive(struct walk *w)
{
    if (w->in_len == IN_SIZE)
        errx(1, "a chunk of more than %u bytes", IN_SIZE);
    w->in_len += exchange_receive(w->fd, w->in + w->in_len, IN_SIZE - w->in_len);
}

static void consume(struct walk *w, size_t len)
{
    w->in_len -= len;
    memmove(w->in, w->in + len, w->in_len);
}

/* ---- Marking ---- */

static void mark(struct walk *w)
{
    uint8_t request[REQUEST_LEN + MARK_LEN];
    for (unsigned i = 0; i < w->n_runs; i++) {
        uint64_t off = mark_place(w, i);
        exchange_request(request, CMD_WRITE, i, off, MARK_LEN);
        pattern_write(request + REQUEST_LEN, pattern_key(w->seed, 1), off, MARK_LEN);
        exchange_send(w->fd, request, sizeof request);
        while (w->in_len < SIMPLE_LEN)
            receive(w);
        if (get_be32(w->in) != SIMPLE_MAGIC || get_be64(w->in + 8) != i)
            errx(1, "a malformed reply to a write");
        if (get_be32(w->in + 4) != 0)
            errx(1, "write at %" PRIu64 ": %s", off, strerror((int)get_be32(w->in + 4)));
        consume(w, SIMPLE_LEN);
    }
}

/* ---- Walking ---- */

static void ask(struct walk *w, unsigned i)
{
    const struct slot *s = &w->slots[i];
    uint8_t *p = w->out + w->out_len;
    exchange_request(p, CMD_BLOCK_STATUS, i, s->off, (uint32_t)s->left);
    if (w->extended) { /* the same, but for both ends */
        put_be32(p, EXTENDED_REQUEST_MAGIC);
        put_be64(p + 24, s->left);
    }
    w->out_len += w->extended ? EXTENDED_LEN : REQUEST_LEN;
    w->n_requests++;
}

static void fill_window(struct walk *w)
{
    for (unsigned i = 0; i < w->depth && w->next < w->e.size; i++) {
        struct slot *s = &w->slots[i];
        if (s->busy)
            continue;
        *s =
            (struct slot){.off = w->next, .left = MIN(w->piece, w->e.size - w->next), .busy = true};
        w->next += s->left;
        w->n_busy++;
        ask(w, i);
    }
}

/* The next extent of a reply; the last may be longer than what was asked for. */
static void take_extent(struct walk *w, struct slot *s, uint64_t len, uint64_t flags)
{
    if (len == 0 || s->got >= s->left)
        errx(1, "an empty extent, or one too many, after %" PRIu64, s->off + s->got);
    len = MIN(len, s->left - s->got);
    if (flags & 1) {
        if (w->n_found == MAX_RUNS)
            errx(1, "more than %u dirty extents", MAX_RUNS);
        w->found[w->n_found++] = (struct run){s->off + s->got, len};
    }
    s->got += len;
}

static void take_extents(struct walk *w, struct slot *s, const uint8_t *p, uint64_t len, bool wide)
{
    size_t head = wide ? 8 : 4, each = wide ? 16 : 8;
    if (len < head + each || (len - head) % each || get_be32(p) != w->e.context_id || s->got ||
        (wide && get_be32(p + 4) != (len - head) / each))
        errx(1, "a malformed chunk of block status");
    for (const uint8_t *end = p + len, *q = p + head; q < end; q += each) {
        if (wide)
            take_extent(w, s, get_be64(q), get_be64(q + 8));
        else
            take_extent(w, s, get_be32(q), get_be32(q + 4));
    }
}

/* The reply is complete: what it left out is asked for again. */
static void reply_done(struct walk *w, unsigned i)
{
    struct slot *s = &w->slots[i];
    if (s->got == 0)
        errx(1, "a reply without block status");
    s->off += s->got;
    s->left -= s->got;
    s->got = 0;
    s->busy = s->left > 0;
    if (s->busy)
        ask(w, i);
    else
        w->n_busy--;
}

/* One chunk, if it has arrived in full: its length, else 0. */
static size_t take_chunk(struct walk *w, const uint8_t *p, size_t avail)
{
    size_t head = w->extended ? EXTENDED_LEN : CHUNK_LEN;
    if (avail < head)
        return 0;
    if (get_be32(p) != (w->extended ? EXTENDED_REPLY_MAGIC : CHUNK_MAGIC))
        errx(1, "a reply with a wrong magic number");
    unsigned flags = get_be16(p + 4), type = get_be16(p + 6);
    uint64_t i = get_be64(p + 8), len = w->extended ? get_be64(p + 24) : get_be32(p + 16);
    if (i >= w->depth || !w->slots[i].busy)
        errx(1, "a reply to a request that is not in flight");
    if (len > IN_SIZE - head)
        errx(1, "a chunk of %" PRIu64 " bytes", len);
    if (avail < head + len)
        return 0;
    if (type == CHUNK_BLOCK_STATUS || type == CHUNK_BLOCK_STATUS_EXT)
        take_extents(w, &w->slots[i], p + head, len, type == CHUNK_BLOCK_STATUS_EXT);
    else if (type != CHUNK_NONE || len)
        errx(1, "block status at %" PRIu64 ": refused (chunk %#x)", w->slots[i].off, type);
    if (flags & CHUNK_DONE)
        reply_done(w, i);
    return head + len;
}

static void walk(struct walk *w)
{
    w->next = w->n_found = 0;
    w->n_requests = 0;
    for (;;) {
        fill_window(w);
        if (w->n_busy == 0)
            return;
        exchange_send(w->fd, w->out, w->out_len);
        w->out_len = 0;
        receive(w);
        size_t at = 0;
        for (size_t n; (n = take_chunk(w, w->in + at, w->in_len - at)) > 0;)
            at += n;
        consume(w, at);
    }
}

static int compare_runs(const void *a, const void *b)
{
    const struct run *x = a, *y = b;
    return (x->off > y->off) - (x->off < y->off);
}

/* Exactly the marks, no more and no less. A run may come in pieces, where a request ended. */
static void check_runs(struct walk *w)
{
    unsigned n = 0;
    qsort(w->found, w->n_found, sizeof *w->found, compare_runs);
    for (unsigned i = 0; i < w->n_found; i++) {
        if (n > 0 && w->found[n - 1].off + w->found[n - 1].len == w->found[i].off)
            w->found[n - 1].len += w->found[i].len;
        else
            w->found[n++] = w->found[i];
    }
    if (n != w->n_runs)
        errx(1, "%u dirty runs found, there are %u", n, w->n_runs);
    for (unsigned i = 0; i < n; i++)
        if (w->found[i].off != mark_place(w, i) || w->found[i].len != w->granularity)
            errx(1, "run %u is at %" PRIu64 ", %" PRIu64 " bytes; it ought to be at %" PRIu64, i,
                 w->found[i].off, w->found[i].len, mark_place(w, i));
}

static int compare_times(const void *a, const void *b)
{
    const uint64_t *x = a, *y = b;
    return (*x > *y) - (*x < *y);
}

static void measure(struct walk *w)
{
    static uint64_t times[MAX_WALKS];
    uint64_t cpu = clock_cpu_of(w->server_pid);
    for (unsigned i = 0; i < w->n_walks; i++) {
        uint64_t begin = clock_ns(CLOCK_MONOTONIC);
        walk(w);
        times[i] = clock_ns(CLOCK_MONOTONIC) - begin;
        check_runs(w);
    }
    cpu = clock_cpu_of(w->server_pid) - cpu;
    qsort(times, w->n_walks, sizeof *times, compare_times);
    printf("{\"walks\": %u, \"runs\": %u, \"requests\": %" PRIu64 ", \"median_ms\": %.4f"
           ", \"best_ms\": %.4f, \"server_cpu_ms\": %.4f}\n",
           w->n_walks, w->n_runs, w->n_requests, (double)times[w->n_walks / 2] / 1e6,
           (double)times[0] / 1e6, (double)cpu / 1e6 / w->n_walks);
}

int main(int argc, char **argv)
{
    static struct walk w; /* too large for the stack */
    parse_command_line(argc, argv, &w);
    /* Structured replies too: without them a server that does not know extended headers would be
     * asked for a context in vain, and the reason be lost. */
    const struct nbd_target target = {.socket_path = w.socket_path,
                                      .export_name = w.export_name,
                                      .structured = !w.mark,
                                      .extended = w.extended,
                                      .context = w.context};
    w.fd = nbd_open(&target, &w.e);
    if (w.fd < 0)
        return 1;
    if (w.extended && !w.e.extended)
        errx(STATUS_CANNOT, "the server does not know extended headers");
    if (!w.mark && !w.e.structured)
        errx(STATUS_CANNOT, "the server does not know structured replies");
    struct timeval limit = {.tv_sec = STALL_S};
    setsockopt(w.fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    w.in = malloc(IN_SIZE);
    w.found = calloc(MAX_RUNS, sizeof *w.found);
    if (!w.in || !w.found)
        errx(1, "out of memory");
    if (w.e.size / w.n_runs < 4 * w.granularity)
        errx(2, "the disk is too small for %u runs", w.n_runs);
    if (w.mark)
        mark(&w);
    else
        measure(&w);
    nbd_close(w.fd, w.e.extended);
    free(w.in);
    free(w.found);
    return fflush(stdout) == EOF ? 1 : 0;
}
