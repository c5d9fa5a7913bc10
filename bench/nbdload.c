/* SPDX-License-Identifier: Apache-2.0 */
/* nbdload: load an NBD export, check all that is read, print one line of JSON.
 *
 * This file holds the command line and the report; load.c is the engine, pattern.h says what the
 * disk must hold, handshake.c opens connections. The program uses none of tidemark's own I/O code,
 * so that it measures, and judges, from outside. */
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "args.h"
#include "base/bytes.h"
#include "load.h"
#include "pattern.h"

#define FILL_BLOCK (1u << 20)

static const char usage[] =
    "usage: nbdload (--socket PATH | --tcp HOST:PORT) [options]\n"
    "       nbdload --image FILE --length BYTES [--seed N]\n"
    "\n"
    "  --export NAME      export to open (default: the empty name)\n"
    "  --structured       ask for structured replies\n"
    "  --connections N    number of connections (1)\n"
    "  --threads N        threads that serve them (1)\n"
    "  --depth N          requests in flight per connection (1)\n"
    "  --block BYTES      size of a request (4k); suffixes k, M, G, T\n"
    "  --offset BYTES     start of the range (0)\n"
    "  --length BYTES     length of the range (to the end of the export)\n"
    "  --sequential       in order, again from the start at the end (default: random)\n"
    "  --reads PERCENT    share of reads (100)\n"
    "  --fua              every write with FUA\n"
    "  --time SECONDS     stop after so long, and/or\n"
    "  --requests N       stop after so many requests\n"
    "  --fill             first write the initial pattern to the whole range\n"
    "  --recheck          afterwards read back, in full, every block that was written\n"
    "  --verify HOW       none, sample (default) or full\n"
    "  --seed N           of the pattern and of the random order (1)\n"
    "  --stall SECONDS    give up when no reply comes for so long (30)\n"
    "  --server-pid PID   report this process's CPU time as well\n"
    "  --image FILE       write the initial pattern to a local file instead\n"
    "\n"
    "Reads expect the initial pattern of --seed, or what this run has written since.\n"
    "Exit status 0: all well; 1: an error or a mismatch; 2: wrong usage.\n";

struct options {
    struct load_config load;
    struct load_phase phase;
    const char *image;
    bool fill, recheck;
    char *tcp; /* HOST, a NUL in place of the colon, PORT */
};

enum {
    OPT_SOCKET = 256,
    OPT_TCP,
    OPT_EXPORT,
    OPT_STRUCTURED,
    OPT_CONNECTIONS,
    OPT_THREADS,
    OPT_DEPTH,
    OPT_BLOCK,
    OPT_OFFSET,
    OPT_LENGTH,
    OPT_SEQUENTIAL,
    OPT_READS,
    OPT_FUA,
    OPT_TIME,
    OPT_REQUESTS,
    OPT_FILL,
    OPT_RECHECK,
    OPT_VERIFY,
    OPT_SEED,
    OPT_STALL,
    OPT_SERVER_PID,
    OPT_IMAGE,
    OPT_HELP
};

static const struct option long_options[] = {
    {"socket", 1, NULL, OPT_SOCKET},
    {"tcp", 1, NULL, OPT_TCP},
    {"export", 1, NULL, OPT_EXPORT},
    {"structured", 0, NULL, OPT_STRUCTURED},
    {"connections", 1, NULL, OPT_CONNECTIONS},
    {"threads", 1, NULL, OPT_THREADS},
    {"depth", 1, NULL, OPT_DEPTH},
    {"block", 1, NULL, OPT_BLOCK},
    {"offset", 1, NULL, OPT_OFFSET},
    {"length", 1, NULL, OPT_LENGTH},
    {"sequential", 0, NULL, OPT_SEQUENTIAL},
    {"reads", 1, NULL, OPT_READS},
    {"fua", 0, NULL, OPT_FUA},
    {"time", 1, NULL, OPT_TIME},
    {"requests", 1, NULL, OPT_REQUESTS},
    {"fill", 0, NULL, OPT_FILL},
    {"recheck", 0, NULL, OPT_RECHECK},
    {"verify", 1, NULL, OPT_VERIFY},
    {"seed", 1, NULL, OPT_SEED},
    {"stall", 1, NULL, OPT_STALL},
    {"server-pid", 1, NULL, OPT_SERVER_PID},
    {"image", 1, NULL, OPT_IMAGE},
    {"help", 0, NULL, OPT_HELP},
    {NULL, 0, NULL, 0},
};

static enum load_verify parse_verify(const char *s)
{
    static const char *const names[] = {"none", "sample", "full"};
    for (unsigned i = 0; i < 3; i++)
        if (strcmp(s, names[i]) == 0)
            return (enum load_verify)i;
    warnx("--verify: none, sample or full");
    exit(2);
}

static void parse_tcp(struct options *o, const char *s)
{
    o->tcp = strdup(s);
    char *colon = o->tcp ? strrchr(o->tcp, ':') : NULL;
    if (!colon || colon == o->tcp || !colon[1]) {
        warnx("--tcp: HOST:PORT");
        exit(2);
    }
    *colon = '\0';
    o->load.target.host = o->tcp;
    o->load.target.port = colon + 1;
}

static void parse_option(struct options *o, int c, const char *arg, const char *name)
{
    struct load_config *l = &o->load;
    struct load_phase *p = &o->phase;
    /* clang-format off */
    switch (c) {
    case OPT_SOCKET: l->target.socket_path = arg; break;
    case OPT_TCP: parse_tcp(o, arg); break;
    case OPT_EXPORT: l->target.export_name = arg; break;
    case OPT_STRUCTURED: l->target.structured = true; break;
    case OPT_CONNECTIONS: l->n_conns = args_number(name, arg, 1, LOAD_MAX_CONNECTIONS); break;
    case OPT_THREADS: l->n_threads = args_number(name, arg, 1, LOAD_MAX_CONNECTIONS); break;
    case OPT_DEPTH: l->depth = args_number(name, arg, 1, LOAD_MAX_DEPTH); break;
    case OPT_BLOCK: l->block = args_size(name, arg, 512, LOAD_MAX_BLOCK); break;
    case OPT_OFFSET: l->off = args_size(name, arg, 0, INT64_MAX); break;
    case OPT_LENGTH: l->len = args_size(name, arg, 512, INT64_MAX); break;
    case OPT_SEQUENTIAL: p->order = ORDER_SEQUENTIAL; break;
    case OPT_READS: p->read_percent = args_number(name, arg, 0, 100); break;
    case OPT_FUA: l->fua = true; break;
    case OPT_TIME: p->time_ns = args_seconds(name, arg); break;
    case OPT_REQUESTS: p->requests = args_size(name, arg, 1, INT64_MAX); break;
    case OPT_FILL: o->fill = true; break;
    case OPT_RECHECK: o->recheck = true; break;
    case OPT_VERIFY: l->verify = parse_verify(arg); break;
    case OPT_SEED: l->seed = args_number(name, arg, 0, INT64_MAX); break;
    case OPT_STALL: l->stall_s = args_number(name, arg, 1, 3600); break;
    case OPT_SERVER_PID: l->server_pid = args_number(name, arg, 1, INT32_MAX); break;
    case OPT_IMAGE: o->image = arg; break;
    case OPT_HELP: fputs(usage, stdout); exit(0);
    default: fputs(usage, stderr); exit(2);
    }
    /* clang-format on */
}

static void check_options(struct options *o)
{
    struct load_config *l = &o->load;
    bool loads = o->phase.time_ns || o->phase.requests;
    const char *fault = NULL;
    if (!o->image + !l->target.socket_path + !l->target.host != 2)
        fault = "give one of --socket, --tcp and --image";
    else if (o->image && !l->len)
        fault = "--image needs --length";
    else if (o->image && l->len % 8)
        fault = "--length is not a multiple of 8";
    else if (!o->image && !loads && !o->fill)
        fault = "give --time, --requests or --fill";
    else if (l->block % 512 || l->off % 512)
        fault = "--block and --offset are multiples of 512";
    else if (l->n_threads > l->n_conns)
        fault = "more threads than connections";
    if (fault) {
        warnx("%s (--help shows all options)", fault);
        exit(2);
    }
    l->writes = o->fill || (loads && o->phase.read_percent < 100);
    l->no_table = !loads;
}

static void parse_command_line(int argc, char **argv, struct options *o)
{
    int c, index = 0;
    *o = (struct options){
        .load = {.target.export_name = "",
                 .seed = 1,
                 .block = 4096,
                 .depth = 1,
                 .n_conns = 1,
                 .n_threads = 1,
                 .stall_s = 30,
                 .verify = VERIFY_SAMPLE},
        .phase = {.order = ORDER_RANDOM, .read_percent = 100},
    };
    while ((c = getopt_long(argc, argv, "", long_options, &index)) != -1)
        parse_option(o, c, optarg, c >= OPT_SOCKET ? long_options[index].name : "");
    if (optind < argc) {
        warnx("'%s' is too much", argv[optind]);
        exit(2);
    }
    check_options(o);
    o->phase.block = o->load.block;
    o->phase.verify = o->load.verify;
}

/* The initial pattern, offset 0 up to `len`, as a local file. */
static int fill_image(const char *path, uint64_t len, uint64_t seed)
{
    static uint8_t buf[FILL_BLOCK];
    uint64_t key = pattern_key(seed, 0);
    int r = 0, fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    for (uint64_t off = 0; fd >= 0 && r == 0 && off < len;) {
        size_t n = MIN(sizeof buf, len - off);
        pattern_write(buf, key, off, n);
        for (size_t done = 0; r == 0 && done < n;) {
            ssize_t w = pwrite(fd, buf + done, n - done, off + done);
            if (w > 0)
                done += w;
            else if (w == 0 || errno != EINTR)
                r = -1;
        }
        off += n;
    }
    if (fd < 0 || r < 0)
        warn("%s", path);
    if (fd >= 0 && close(fd) < 0 && r == 0) {
        warn("%s", path);
        r = -1;
    }
    return fd < 0 ? -1 : r;
}

static int print_result(const struct options *o, const struct load_result *r, uint64_t errors,
                        uint64_t mismatches, uint64_t rechecked)
{
    double s = (double)r->wall_ns / 1e9;
    uint64_t n = r->reads + r->writes;
    printf("{\"requests\": %" PRIu64 ", \"reads\": %" PRIu64 ", \"writes\": %" PRIu64
           ", \"errors\": %" PRIu64 ", \"mismatches\": %" PRIu64 ", \"rechecked\": %" PRIu64,
           n, r->reads, r->writes, errors, mismatches, rechecked);
    printf(", \"seconds\": %.6f, \"iops\": %.1f, \"mib_s\": %.2f", s, s > 0 ? (double)n / s : 0,
           s > 0 ? (double)r->bytes / (1 << 20) / s : 0);
    printf(", \"p50_us\": %.2f, \"p90_us\": %.2f, \"p99_us\": %.2f, \"max_us\": %.2f",
           (double)load_percentile(r, 50) / 1e3, (double)load_percentile(r, 90) / 1e3,
           (double)load_percentile(r, 99) / 1e3, (double)r->max_ns / 1e3);
    printf(", \"client_cpu_s\": %.6f", (double)r->client_cpu_ns / 1e9);
    if (o->load.server_pid)
        printf(", \"server_cpu_s\": %.6f", (double)r->server_cpu_ns / 1e9);
    puts("}");
    if (fflush(stdout) == EOF) {
        warn("standard output");
        return -1;
    }
    return 0;
}

/* All phases asked for; the report is about the load, or about the fill if that is all. */
static int run_phases(struct load *l, const struct options *o)
{
    const struct load_phase fill = {
        .order = ORDER_SEQUENTIAL, .block = FILL_BLOCK, .one_pass = true, .initial = true};
    const struct load_phase recheck = {.order = ORDER_WRITTEN,
                                       .read_percent = 100,
                                       .block = o->load.block,
                                       .verify = VERIFY_FULL,
                                       .one_pass = true};
    static struct load_result main_result, other; /* too large for the stack */
    uint64_t errors = 0, mismatches = 0, rechecked = 0;
    int r = 0;
    if (o->fill) {
        r = load_run(l, &fill, &main_result);
        errors += main_result.errors;
    }
    if (r == 0 && !o->load.no_table) {
        r = load_run(l, &o->phase, &main_result);
        errors += main_result.errors;
        mismatches += main_result.mismatches;
    }
    if (r == 0 && !o->load.no_table && o->recheck) {
        r = load_run(l, &recheck, &other);
        errors += other.errors;
        mismatches += other.mismatches;
        rechecked = other.reads;
    }
    if (r < 0)
        errors++;
    if (print_result(o, &main_result, errors, mismatches, rechecked) < 0)
        errors++;
    return errors || mismatches ? -1 : 0;
}

int main(int argc, char **argv)
{
    struct options o;
    int r = -1;
    parse_command_line(argc, argv, &o);
    if (o.image) {
        r = fill_image(o.image, o.load.len, o.load.seed);
    } else {
        struct load *l = load_open(&o.load);
        if (l)
            r = run_phases(l, &o);
        load_close(l);
    }
    free(o.tcp);
    return r < 0 ? 1 : 0;
}
