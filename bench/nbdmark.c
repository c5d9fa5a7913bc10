/* SPDX-License-Identifier: Apache-2.0 */
/* nbdmark: makes parts of an NBD export dirty, or writes to it and tells when each reply came.
 *
 * With --runs it trims N runs, one in each N-th part of the disk, at places that follow from the
 * seed, with many requests in flight: what a bitmap that records holds afterwards is exactly
 * N * --run bytes. With --seconds it writes 4 KiB at random places at the given depth and puts the
 * time of each reply (CLOCK_MONOTONIC, ns, 8 bytes of this machine's order) into a file: whoever
 * stopped the writes meanwhile shows as a gap. Nothing is read back. */
#include <err.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "args.h"
#include "base/bytes.h"
#include "clock.h"
#include "exchange.h"
#include "handshake.h"
#include "pattern.h"

#define MAX_DEPTH 1024
#define MAX_RUNS (1u << 26)
#define MAX_TIMES (1u << 24)
#define WRITE_LEN 4096u
#define TRIM_LEN ((uint64_t)1 << 30) /* of one request; some servers take less than 2 GiB */

static const char usage[] =
    "usage: nbdmark --socket PATH --export NAME --runs N --run BYTES [options]\n"
    "       nbdmark --socket PATH --export NAME --seconds S --times FILE [options]\n"
    "\n"
    "  --runs N --run BYTES  trim N runs of so many bytes\n"
    "  --align BYTES         where they begin (65536)\n"
    "  --seconds S           write for so long\n"
    "  --times FILE          where the times of the replies go\n"
    "  --depth N             requests in flight (64)\n"
    "  --seed N              of the places (1)\n";

struct mark {
    const char *socket_path, *export_name, *times_path;
    uint64_t n_runs, run, align, seed, write_ns;
    unsigned depth;

    int fd;
    struct nbd_export e;
    uint64_t n_sent, n_done;
    uint64_t run_at, at; /* the next request: in which run, and where in it */
    uint8_t out[MAX_DEPTH * REQUEST_LEN + WRITE_LEN + REQUEST_LEN];
    uint8_t in[MAX_DEPTH * SIMPLE_LEN];
    size_t in_len;
    uint64_t *times;
};

static uint64_t now_ns(void)
{
    return clock_ns(CLOCK_MONOTONIC);
}

static void parse_command_line(int argc, char **argv, struct mark *m)
{
    static const struct option options[] = {
        {"socket", 1, NULL, 's'}, {"export", 1, NULL, 'e'},  {"runs", 1, NULL, 'r'},
        {"run", 1, NULL, 'l'},    {"align", 1, NULL, 'a'},   {"depth", 1, NULL, 'd'},
        {"seed", 1, NULL, 'n'},   {"seconds", 1, NULL, 't'}, {"times", 1, NULL, 'f'},
        {"help", 0, NULL, 'h'},   {NULL, 0, NULL, 0},
    };
    for (int c; (c = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        /* clang-format off */
        switch (c) {
        case 's': m->socket_path = optarg; break;
        case 'e': m->export_name = optarg; break;
        case 'r': m->n_runs = args_number("runs", optarg, 1, MAX_RUNS); break;
        case 'l': m->run = args_number("run", optarg, 512, INT64_MAX); break;
        case 'a': m->align = args_number("align", optarg, 512, 1u << 31); break;
        case 'd': m->depth = args_number("depth", optarg, 1, MAX_DEPTH); break;
        case 'n': m->seed = args_number("seed", optarg, 0, INT64_MAX); break;
        case 't': m->write_ns = args_seconds("seconds", optarg); break;
        case 'f': m->times_path = optarg; break;
        case 'h': fputs(usage, stdout); exit(0);
        default: fputs(usage, stderr); exit(2);
        }
        /* clang-format on */
    }
    bool marks = m->n_runs && m->run, times = m->write_ns && m->times_path;
    if (!m->socket_path || marks == times || optind < argc) {
        warnx("give --socket, and either --runs and --run or --seconds and --times (--help)");
        exit(2);
    }
}

/* ---- Replies ---- */

/* Wait for replies: at least one. */
static void receive(struct mark *m)
{
    m->in_len += exchange_receive(m->fd, m->in + m->in_len, sizeof m->in - m->in_len);
    uint64_t now = now_ns();
    size_t at = 0;
    for (; m->in_len - at >= SIMPLE_LEN; at += SIMPLE_LEN) {
        if (get_be32(m->in + at) != SIMPLE_MAGIC || get_be64(m->in + at + 8) >= m->n_sent)
            errx(1, "a malformed reply");
        if (get_be32(m->in + at + 4) != 0)
            errx(1, "refused: %s", strerror((int)get_be32(m->in + at + 4)));
        if (m->times && m->n_done < MAX_TIMES)
            m->times[m->n_done] = now;
        m->n_done++;
    }
    m->in_len -= at;
    memmove(m->in, m->in + at, m->in_len);
}

/* ---- Marking ---- */

/* Where run i lies: in the i-th part of the disk. */
static uint64_t run_place(const struct mark *m, uint64_t i)
{
    uint64_t part = round_down(m->e.size / m->n_runs, m->align);
    uint64_t room = (part - m->run) / m->align + 1;
    return i * part + pattern_mix(pattern_mix(m->seed) + i) % room * m->align;
}

static bool next_trim(struct mark *m, uint8_t *p)
{
    if (m->run_at == m->n_runs)
        return false;
    uint64_t len = MIN(m->run - m->at, TRIM_LEN);
    exchange_request(p, CMD_TRIM, m->n_sent++, run_place(m, m->run_at) + m->at, (uint32_t)len);
    m->at += len;
    if (m->at == m->run) {
        m->at = 0;
        m->run_at++;
    }
    return true;
}

static void trim_runs(struct mark *m)
{
    if (m->e.size / m->n_runs < m->run + m->align)
        errx(2, "so many runs of that length do not fit");
    do {
        size_t len = 0;
        while (m->n_sent - m->n_done < m->depth && next_trim(m, m->out + len))
            len += REQUEST_LEN;
        exchange_send(m->fd, m->out, len);
        if (m->n_done < m->n_sent)
            receive(m);
    } while (m->n_done < m->n_sent || m->run_at < m->n_runs);
}

/* ---- Writing ---- */

static void write_on(struct mark *m)
{
    uint64_t end = now_ns() + m->write_ns, blocks = m->e.size / WRITE_LEN;
    memset(m->out, 0x5a, sizeof m->out);
    do {
        while (m->n_sent - m->n_done < m->depth && now_ns() < end) {
            uint64_t at = pattern_mix(pattern_mix(m->seed) + m->n_sent) % blocks * WRITE_LEN;
            exchange_request(m->out, CMD_WRITE, m->n_sent++, at, WRITE_LEN);
            exchange_send(m->fd, m->out, REQUEST_LEN + WRITE_LEN);
        }
        if (m->n_done < m->n_sent)
            receive(m);
    } while (m->n_done < m->n_sent || now_ns() < end);
}

static void save_times(const struct mark *m)
{
    size_t n = MIN(m->n_done, MAX_TIMES);
    FILE *f = fopen(m->times_path, "wb");
    if (!f || fwrite(m->times, sizeof *m->times, n, f) != n || fclose(f) == EOF)
        err(1, "%s", m->times_path);
}

int main(int argc, char **argv)
{
    static struct mark m = {.export_name = "", .align = 65536, .seed = 1, .depth = 64};
    parse_command_line(argc, argv, &m);
    const struct nbd_target t = {.socket_path = m.socket_path, .export_name = m.export_name};
    m.fd = nbd_open(&t, &m.e);
    if (m.fd < 0)
        return 1;
    if (m.e.read_only)
        errx(1, "export '%s' is read-only", m.export_name);
    uint64_t begin = now_ns();
    if (m.times_path) {
        m.times = malloc(MAX_TIMES * sizeof *m.times);
        if (!m.times)
            errx(1, "no memory");
        write_on(&m);
        save_times(&m);
    } else {
        trim_runs(&m);
    }
    double s = (double)(now_ns() - begin) / 1e9;
    nbd_close(m.fd, false);
    printf("{\"requests\": %" PRIu64 ", \"seconds\": %.6f, \"iops\": %.1f}\n", m.n_done, s,
           (double)m.n_done / s);
    free(m.times);
    return fflush(stdout) == EOF;
}
