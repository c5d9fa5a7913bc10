/* SPDX-License-Identifier: Apache-2.0 */
/* How replies are taken apart and judged. The stream is decoded where recv put it; only the
 * beginning of a header that has not arrived in full is kept. Data is checked piece by piece as it
 * comes. A server that breaks the protocol ends the run, since nothing after that can be trusted;
 * one that returns errors or wrong data is counted. */
#include <assert.h>
#include <err.h>
#include <errno.h>
#include <inttypes.h>
#include <sys/socket.h>

#include "base/bytes.h"
#include "clock.h"
#include "load_priv.h"
#include "pattern.h"

#define MAX_COMPLAINTS 10
enum { SIMPLE_LEN = 16, CHUNK_LEN = 20, MAX_ERROR_CHUNK = 4096 + 16 };
#define SIMPLE_MAGIC 0x67446698u
#define CHUNK_MAGIC 0x668e33efu
enum { CHUNK_NONE = 0, CHUNK_DATA = 1, CHUNK_HOLE = 2, CHUNK_ERROR = 0x8001, CHUNK_DONE = 1 };

static bool may_complain(struct load *l)
{
    return atomic_fetch_add(&l->n_complaints, 1) < MAX_COMPLAINTS;
}

static void slot_complete(struct conn *c, struct slot *s)
{
    struct worker *w = c->w;
    struct load_result *r = &w->res;
    uint64_t ns = w->now_ns - s->start_ns;
    s->busy = false;
    c->free_slots[c->n_free++] = s - c->slots;
    w->n_inflight--;
    *(s->write ? &r->writes : &r->reads) += 1;
    r->bytes += s->len;
    r->errors += s->failed;
    r->mismatches += s->bad;
    r->latency[latency_bucket(ns)]++;
    r->max_ns = MAX(r->max_ns, ns);
    if (w->p->initial)
        return;
    uint32_t *entry = &w->l->table[s->block];
    if (!s->write)
        --*entry;
    else
        *entry = (*entry & ~USE_MASK) | (s->failed ? USE_UNKNOWN : 0);
}

static void server_error(struct conn *c, struct slot *s, uint32_t error)
{
    if (may_complain(c->w->l))
        warnx("%s of %u bytes at offset %" PRIu64 ": error %u (%s)", s->write ? "write" : "read",
              s->len, s->off, error, strerror(error));
    s->failed = true;
}

/* Say what the wrong word is, which names the fault most of the time. */
static void explain_mismatch(struct conn *c, uint64_t off, uint64_t got)
{
    static const uint64_t zero;
    struct load *l = c->w->l;
    uint64_t step_inverse = PATTERN_STEP; /* Newton: each round doubles the number of right bits */
    for (int i = 0; i < 5; i++)
        step_inverse *= 2 - PATTERN_STEP * step_inverse;
    if (got == zero) {
        warnx("mismatch at offset %" PRIu64 ": zeroes", off);
        return;
    }
    for (uint32_t gen = 0; gen < 4096; gen++) {
        uint64_t place = (got - pattern_key(l->c.seed, gen)) * step_inverse;
        if (place < (l->e.size + 7) / 8) {
            warnx("mismatch at offset %" PRIu64 ": holds generation %u of offset %" PRIu64, off,
                  gen, place * 8);
            return;
        }
    }
    warnx("mismatch at offset %" PRIu64 ": holds %#018" PRIx64 ", never written here", off, got);
}

static void mismatch(struct conn *c, struct slot *s, uint64_t off, const uint8_t *word)
{
    uint64_t got = 0;
    if (word)
        memcpy(&got, word, 8);
    if (!s->bad && may_complain(c->w->l))
        explain_mismatch(c, off, le64toh(got));
    s->bad = true;
}

static void check_data(struct conn *c, const uint8_t *p, size_t len)
{
    struct slot *s = c->taking;
    enum load_verify verify = c->w->p->verify;
    if (verify == VERIFY_NONE)
        return;
    size_t step = verify == VERIFY_FULL ? 8 : PATTERN_SAMPLE;
    size_t start = s->cookie >> 16 << 3 & (step - 1);
    size_t at = pattern_check(p, s->key, c->take_off, len, step, start);
    if (at == PATTERN_OK)
        return;
    /* Part of a word names no fault: show the whole one after it, if that is wrong as well. */
    size_t skip = -(c->take_off + at) & 7;
    if (skip && len - at >= skip + 8 &&
        !pattern_word_ok(p + at + skip, s->key, c->take_off + at + skip))
        at += skip;
    uint8_t word[8] = {0};
    memcpy(word, p + at, MIN(len - at, 8));
    mismatch(c, s, c->take_off + at, word);
}

static struct slot *find_slot(struct conn *c, uint64_t cookie)
{
    unsigned i = cookie & 0xffff;
    if (i >= c->w->l->c.depth || !c->slots[i].busy || c->slots[i].cookie != cookie)
        return NULL;
    return &c->slots[i];
}

/* Data follows in the stream: the next `len` bytes belong to `off`. */
static void expect_data(struct conn *c, struct slot *s, uint64_t off, uint32_t len, bool done)
{
    c->taking = s;
    c->take_off = off;
    c->take_left = len;
    c->take_done = done;
    s->got += len;
}

/* The last chunk of a reply is complete. */
static int reply_done(struct conn *c, struct slot *s)
{
    if (!s->write && !s->failed && s->got != s->len)
        return worker_fail(c->w, "a reply does not cover its request", 0);
    slot_complete(c, s);
    return 0;
}

/* Each parser below returns how many bytes it took, 0 if it needs more, -1 after a failure. */

static ssize_t parse_data(struct conn *c, const uint8_t *p, size_t avail)
{
    size_t n = MIN(avail, c->take_left);
    struct slot *s = c->taking;
    check_data(c, p, n);
    c->take_off += n;
    c->take_left -= n;
    if (c->take_left > 0)
        return n;
    c->taking = NULL;
    if (c->take_done && reply_done(c, s) < 0)
        return -1;
    return n;
}

static ssize_t parse_simple(struct conn *c, const uint8_t *p, size_t avail)
{
    if (avail < SIMPLE_LEN)
        return 0;
    struct slot *s = find_slot(c, get_be64(p + 8));
    uint32_t error = get_be32(p + 4);
    if (!s)
        return worker_fail(c->w, "a reply to a request that is not in flight", 0);
    if (!s->write && c->w->l->e.structured)
        return worker_fail(c->w, "a simple reply to a read after structured replies were agreed on",
                           0);
    if (error)
        server_error(c, s, error);
    if (s->write || error)
        slot_complete(c, s);
    else
        expect_data(c, s, s->off, s->len, true);
    return SIMPLE_LEN;
}

/* Ranges inside the request whose lengths add up: enough to say that nothing is missing, since
 * chunks that overlap are forbidden and would have to hide a gap of exactly their size. */
static bool chunk_fits(const struct slot *s, uint64_t off, uint32_t len)
{
    return !s->write && off >= s->off && range_in(off - s->off, len, s->len) &&
           len <= s->len - s->got;
}

static ssize_t parse_data_chunk(struct conn *c, struct slot *s, const uint8_t *p, size_t avail,
                                bool done)
{
    uint32_t len = get_be32(p + 16);
    if (avail < CHUNK_LEN + 8)
        return 0;
    uint64_t off = get_be64(p + CHUNK_LEN);
    if (len <= 8 || !chunk_fits(s, off, len - 8))
        return worker_fail(c->w, "a chunk of data outside its request", 0);
    expect_data(c, s, off, len - 8, done);
    return CHUNK_LEN + 8;
}

static ssize_t parse_hole_chunk(struct conn *c, struct slot *s, const uint8_t *p, size_t avail)
{
    if (get_be32(p + 16) != 12)
        return worker_fail(c->w, "a malformed hole chunk", 0);
    if (avail < CHUNK_LEN + 12)
        return 0;
    uint64_t off = get_be64(p + CHUNK_LEN);
    uint32_t hole = get_be32(p + CHUNK_LEN + 8);
    if (hole == 0 || !chunk_fits(s, off, hole))
        return worker_fail(c->w, "a hole outside its request", 0);
    s->got += hole;
    if (c->w->p->verify != VERIFY_NONE)
        mismatch(c, s, off, NULL);
    return CHUNK_LEN + 12;
}

static ssize_t parse_error_chunk(struct conn *c, struct slot *s, const uint8_t *p, size_t avail)
{
    uint32_t len = get_be32(p + 16);
    if (len < 6 || len > MAX_ERROR_CHUNK)
        return worker_fail(c->w, "a malformed error chunk", 0);
    if (avail < CHUNK_LEN + len)
        return 0;
    server_error(c, s, get_be32(p + CHUNK_LEN));
    return CHUNK_LEN + len;
}

static ssize_t parse_chunk(struct conn *c, const uint8_t *p, size_t avail)
{
    if (avail < CHUNK_LEN)
        return 0;
    unsigned flags = get_be16(p + 4), type = get_be16(p + 6);
    struct slot *s = find_slot(c, get_be64(p + 8));
    bool done = flags & CHUNK_DONE;
    ssize_t n;
    if (!c->w->l->e.structured)
        return worker_fail(c->w, "a structured reply that was not asked for", 0);
    if (!s)
        return worker_fail(c->w, "a reply to a request that is not in flight", 0);
    if (type == CHUNK_DATA)
        return parse_data_chunk(c, s, p, avail, done);
    if (type == CHUNK_HOLE)
        n = parse_hole_chunk(c, s, p, avail);
    else if (type >= CHUNK_ERROR)
        n = parse_error_chunk(c, s, p, avail);
    else if (type == CHUNK_NONE && done && get_be32(p + 16) == 0)
        n = CHUNK_LEN;
    else
        return worker_fail(c->w, "a malformed or unknown chunk", 0);
    if (n > 0 && done && reply_done(c, s) < 0)
        return -1;
    return n;
}

static ssize_t parse_one(struct conn *c, const uint8_t *p, size_t avail)
{
    if (c->taking)
        return parse_data(c, p, avail);
    if (avail < 4)
        return 0;
    if (get_be32(p) == SIMPLE_MAGIC)
        return parse_simple(c, p, avail);
    if (get_be32(p) == CHUNK_MAGIC)
        return parse_chunk(c, p, avail);
    return worker_fail(c->w, "a reply with a wrong magic number", 0);
}

static int parse_in(struct conn *c)
{
    size_t at = 0;
    while (at < c->in_len) {
        ssize_t n = parse_one(c, c->in + at, c->in_len - at);
        if (n < 0)
            return -1;
        if (n == 0)
            break;
        at += n;
    }
    /* What stays is a part of one header: a few bytes. */
    c->in_len -= at;
    memmove(c->in, c->in + at, c->in_len);
    return 0;
}

int conn_pull(struct conn *c, int flags)
{
    struct worker *w = c->w;
    ssize_t n;
    do {
        n = recv(c->fd, c->in + c->in_len, LOAD_BUFFER - c->in_len, flags);
    } while (n < 0 && errno == EINTR);
    if (n == 0)
        return worker_fail(w, "the server hung up", 0);
    if (n < 0 && errno == EAGAIN)
        return flags ? 0 : worker_fail(w, "the server does not answer", 0);
    if (n < 0)
        return worker_fail(w, "receiving replies", errno);
    c->in_len += n;
    w->now_ns = clock_ns(CLOCK_MONOTONIC);
    return parse_in(c);
}
