/* SPDX-License-Identifier: Apache-2.0 */
/* uringload: what a disk gives without a server. The same requests as nbdload's, by io_uring with
 * O_DIRECT straight on the file: one thread, registered file and buffers, one system call to submit
 * what is free and to fetch what is done. All that is read is checked; what was written can be read
 * back. Options and report are nbdload's, the CPU time is this program's own.
 *
 * A block that was written holds generation 1 of pattern.h, whoever wrote it last: so writes of one
 * block may overlap, and a run either only reads or only writes. */
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <liburing.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "args.h"
#include "base/bytes.h"
#include "clock.h"
#include "latency.h"
#include "pattern.h"

#define MAX_DEPTH 1024
#define MAX_BLOCK (8u << 20)
#define STATUS_CANNOT 77 /* io_uring or O_DIRECT is not to be had here */

static const char usage[] =
    "usage: uringload --file FILE (--time SECONDS | --requests N) [options]\n"
    "\n"
    "  --depth N       requests in flight (1)\n"
    "  --block BYTES   size of a request (4k); suffixes k, M, G, T\n"
    "  --sequential    in order, again from the start at the end (default: random)\n"
    "  --reads PERCENT 100 (default) or 0: reads or writes\n"
    "  --recheck       afterwards read back, in full, every block that was written\n"
    "  --seed N        of the pattern and of the random order (1)\n"
    "\n"
    "Exit status 0: all well; 1: an error or a mismatch; 2: wrong usage; 77: not possible here.\n";

enum order { ORDER_RANDOM, ORDER_SEQUENTIAL, ORDER_WRITTEN };

struct phase {
    enum order order;
    bool write, full_check;
    uint32_t gen; /* that reads expect, or writes write */
    uint64_t requests, time_ns;
};

struct slot {
    uint8_t *data;
    uint64_t block, start_ns;
};

struct result {
    uint64_t n, errors, mismatches, wall_ns, cpu_ns, max_ns;
    uint64_t latency[LATENCY_BUCKETS];
};

struct load {
    const char *path;
    unsigned depth;
    uint32_t block;
    uint64_t seed;
    struct phase main;
    bool recheck;

    int fd;
    struct io_uring ring;
    uint8_t *data;
    uint8_t *written; /* a byte for each block */
    uint64_t n_blocks, next, random;
    struct slot slots[MAX_DEPTH];
    unsigned free_slots[MAX_DEPTH], n_free;
};

/* ---- Command line ---- */

static void parse_command_line(int argc, char **argv, struct load *l)
{
    static const struct option options[] = {
        {"file", 1, NULL, 'f'},     {"depth", 1, NULL, 'd'},      {"block", 1, NULL, 'b'},
        {"reads", 1, NULL, 'r'},    {"sequential", 0, NULL, 's'}, {"time", 1, NULL, 't'},
        {"requests", 1, NULL, 'n'}, {"recheck", 0, NULL, 'c'},    {"seed", 1, NULL, 'e'},
        {"help", 0, NULL, 'h'},     {NULL, 0, NULL, 0},
    };
    uint64_t reads = 100;
    *l = (struct load){.depth = 1, .block = 4096, .seed = 1, .fd = -1};
    for (int c, i; (c = getopt_long(argc, argv, "", options, &i)) != -1;) {
        /* clang-format off */
        switch (c) {
        case 'f': l->path = optarg; break;
        case 'd': l->depth = args_number("depth", optarg, 1, MAX_DEPTH); break;
        case 'b': l->block = args_size("block", optarg, 512, MAX_BLOCK); break;
        case 'r': reads = args_number("reads", optarg, 0, 100); break;
        case 's': l->main.order = ORDER_SEQUENTIAL; break;
        case 't': l->main.time_ns = args_seconds("time", optarg); break;
        case 'n': l->main.requests = args_number("requests", optarg, 1, INT64_MAX); break;
        case 'c': l->recheck = true; break;
        case 'e': l->seed = args_number("seed", optarg, 0, INT64_MAX); break;
        case 'h': fputs(usage, stdout); exit(0);
        default: fputs(usage, stderr); exit(2);
        }
        /* clang-format on */
    }
    const char *fault = NULL;
    if (!l->path || optind < argc || !(l->main.time_ns || l->main.requests))
        fault = "give --file, and --time or --requests, and nothing but options";
    else if (reads % 100)
        fault = "--reads: 0 or 100, a run does one or the other";
    else if (l->block % 512)
        fault = "--block: a multiple of 512";
    if (fault) {
        warnx("%s (--help shows all options)", fault);
        exit(2);
    }
    l->main.write = reads == 0;
    l->main.gen = reads == 0;
}

/* ---- Requests ---- */

/* The next block to use, or UINT64_MAX at the end of a pass. */
static uint64_t choose(struct load *l, enum order order)
{
    switch (order) {
    case ORDER_RANDOM:
        l->random++;
        return (uint64_t)(((unsigned __int128)pattern_mix(l->random) * l->n_blocks) >> 64);
    case ORDER_SEQUENTIAL:
        return l->next++ % l->n_blocks;
    case ORDER_WRITTEN:
        while (l->next < l->n_blocks && !l->written[l->next])
            l->next++;
        break;
    }
    return l->next < l->n_blocks ? l->next++ : UINT64_MAX;
}

static void start(struct load *l, const struct phase *p, uint64_t block, uint64_t now_ns)
{
    unsigned i = l->free_slots[--l->n_free];
    struct slot *s = &l->slots[i];
    struct io_uring_sqe *sqe =
        io_uring_get_sqe(&l->ring); /* as many entries as slots: there is one */
    uint64_t off = block * l->block;
    s->block = block;
    s->start_ns = now_ns;
    if (p->write) {
        pattern_write(s->data, pattern_key(l->seed, p->gen), off, l->block);
        l->written[block] = 1;
        io_uring_prep_write_fixed(sqe, 0, s->data, l->block, off, 0);
    } else {
        io_uring_prep_read_fixed(sqe, 0, s->data, l->block, off, 0);
    }
    io_uring_sqe_set_flags(sqe, IOSQE_FIXED_FILE);
    io_uring_sqe_set_data64(sqe, i);
}

static void finish(struct load *l, const struct phase *p, const struct io_uring_cqe *cqe,
                   uint64_t now_ns, struct result *r)
{
    struct slot *s = &l->slots[cqe->user_data];
    uint64_t off = s->block * l->block, ns = now_ns - s->start_ns;
    size_t step = p->full_check ? 8 : PATTERN_SAMPLE;
    l->free_slots[l->n_free++] = cqe->user_data;
    r->n++;
    r->latency[latency_bucket(ns)]++;
    r->max_ns = MAX(r->max_ns, ns);
    if (cqe->res != (int)l->block) {
        if (r->errors++ == 0)
            warnx("%s at %" PRIu64 ": %s", p->write ? "write" : "read", off,
                  cqe->res < 0 ? strerror(-cqe->res) : "short");
    } else if (!p->write && pattern_check(s->data, pattern_key(l->seed, p->gen), off, l->block,
                                          step, r->n * 8 % step) != PATTERN_OK) {
        if (r->mismatches++ == 0)
            warnx("mismatch in the block at %" PRIu64, off);
    }
}

/* Runs a phase to its end. 0, or -1: the ring failed, the cause went to stderr. */
static int run(struct load *l, const struct phase *p, struct result *r)
{
    uint64_t begin = clock_ns(CLOCK_MONOTONIC), cpu = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
    uint64_t left = p->requests ? p->requests : UINT64_MAX, now = begin;
    bool ended = false;
    *r = (struct result){0};
    l->next = 0;
    for (;;) {
        ended = ended || (p->time_ns && now - begin >= p->time_ns);
        while (!ended && left > 0 && l->n_free > 0) {
            uint64_t block = choose(l, p->order);
            ended = block == UINT64_MAX;
            if (!ended) {
                start(l, p, block, now);
                left--;
            }
        }
        if (l->n_free == l->depth)
            break;
        int n = io_uring_submit_and_wait(&l->ring, 1);
        if (n < 0 && n != -EINTR) {
            warnx("io_uring: %s", strerror(-n));
            return -1;
        }
        now = clock_ns(CLOCK_MONOTONIC);
        struct io_uring_cqe *cqe;
        unsigned head, seen = 0;
        io_uring_for_each_cqe(&l->ring, head, cqe)
        {
            finish(l, p, cqe, now, r);
            seen++;
        }
        io_uring_cq_advance(&l->ring, seen);
    }
    r->wall_ns = now - begin;
    r->cpu_ns = clock_ns(CLOCK_PROCESS_CPUTIME_ID) - cpu;
    return 0;
}

/* ---- Opening ---- */

static void open_file(struct load *l)
{
    struct stat st;
    l->fd = open(l->path, (l->main.write ? O_RDWR : O_RDONLY) | O_DIRECT | O_CLOEXEC);
    if (l->fd < 0 || fstat(l->fd, &st) < 0)
        err(errno == EINVAL ? STATUS_CANNOT : 1, "%s", l->path);
    l->n_blocks = (uint64_t)st.st_size / l->block;
    if (l->n_blocks == 0)
        errx(1, "%s: shorter than a block", l->path);
}

/* Ends the program if that cannot be had. */
static void open_ring(struct load *l)
{
    size_t size = (size_t)l->depth * l->block;
    unsigned flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN;
    int r = io_uring_queue_init(l->depth, &l->ring, flags);
    if (r == -EINVAL) /* an older kernel */
        r = io_uring_queue_init(l->depth, &l->ring, 0);
    if (r < 0)
        errx(STATUS_CANNOT, "io_uring: %s", strerror(-r));
    l->data = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    l->written = calloc(l->n_blocks, 1);
    if (l->data == MAP_FAILED || !l->written)
        errx(1, "out of memory");
    struct iovec all = {.iov_base = l->data, .iov_len = size};
    r = io_uring_register_buffers(&l->ring, &all, 1);
    if (r == 0)
        r = io_uring_register_files(&l->ring, &l->fd, 1);
    if (r < 0)
        errx(STATUS_CANNOT, "registering buffers and file: %s", strerror(-r));
    for (unsigned i = 0; i < l->depth; i++) {
        l->slots[i].data = l->data + (size_t)i * l->block;
        l->free_slots[l->n_free++] = i;
    }
    l->random = pattern_mix(l->seed);
}

static void print_report(const struct load *l, const struct result *r, uint64_t rechecked,
                         uint64_t errors, uint64_t mismatches)
{
    double s = (double)r->wall_ns / 1e9, n = (double)r->n;
    printf("{\"requests\": %" PRIu64 ", \"errors\": %" PRIu64 ", \"mismatches\": %" PRIu64
           ", \"rechecked\": %" PRIu64 ", \"seconds\": %.6f, \"iops\": %.1f, \"mib_s\": %.2f",
           r->n, errors, mismatches, rechecked, s, s > 0 ? n / s : 0,
           s > 0 ? n * l->block / (1 << 20) / s : 0);
    printf(", \"p50_us\": %.2f, \"p99_us\": %.2f, \"max_us\": %.2f",
           (double)latency_percentile(r->latency, r->n, r->max_ns, 50) / 1e3,
           (double)latency_percentile(r->latency, r->n, r->max_ns, 99) / 1e3,
           (double)r->max_ns / 1e3);
    printf(", \"client_cpu_s\": 0, \"server_cpu_s\": %.6f}\n", (double)r->cpu_ns / 1e9);
}

int main(int argc, char **argv)
{
    static struct load l; /* too large for the stack */
    static struct result load, check;
    parse_command_line(argc, argv, &l);
    open_file(&l);
    open_ring(&l);
    if (run(&l, &l.main, &load) < 0)
        return 1;
    const struct phase recheck = {.order = ORDER_WRITTEN, .gen = l.main.gen, .full_check = true};
    if (l.recheck && l.main.write && run(&l, &recheck, &check) < 0)
        return 1;
    uint64_t errors = load.errors + check.errors, mismatches = load.mismatches + check.mismatches;
    print_report(&l, &load, check.n, errors, mismatches);
    if (fflush(stdout) == EOF)
        err(1, "standard output");
    io_uring_queue_exit(&l.ring);
    munmap(l.data, (size_t)l.depth * l.block);
    free(l.written);
    close(l.fd);
    return errors || mismatches ? 1 : 0;
}
