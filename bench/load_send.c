/* SPDX-License-Identifier: Apache-2.0 */
/* Which block comes next, and how requests become bytes in the socket. Requests are encoded until
 * the window or the buffer is full; a payload that does not fit is made in pieces as the buffer
 * empties. */
#include <errno.h>
#include <sys/socket.h>

#include "base/bytes.h"
#include "load_priv.h"
#include "pattern.h"

#define NO_BLOCK UINT64_MAX
#define REQUEST_MAGIC 0x25609513u
enum { REQUEST_LEN = 28 };
enum { CMD_READ = 0, CMD_WRITE = 1, CMD_FLAG_FUA = 1 };

static uint64_t next_random(struct worker *w)
{
    w->random += UINT64_C(0x9e3779b97f4a7c15);
    return pattern_mix(w->random);
}

/* A number in [0, n). The bias, n / 2^64, does not matter here. */
static uint64_t random_below(struct worker *w, uint64_t n)
{
    return (unsigned __int128)next_random(w) * n >> 64;
}

/* ---- Which block next ---- */

static bool block_usable(uint32_t entry, bool write)
{
    return write ? (entry & USE_MASK) == 0 : (entry & USE_MASK) < USE_MAX_READERS;
}

static uint64_t pick_random(struct worker *w, struct lane *lane, bool write)
{
    const struct load *l = w->l;
    uint64_t n = lane_blocks(l, lane), i = 0;
    for (unsigned try = 0; try < 4096; try++) {
        /* If luck does not help, the range is small or full of bad blocks: search in order. */
        i = try < 16 ? random_below(w, n) : (i + 1) % n;
        uint64_t block = i * l->n_lanes + lane->index;
        if (block_usable(l->table[block], write))
            return block;
    }
    return NO_BLOCK;
}

/* In order. The end of the range ends a single pass; NO_BLOCK otherwise means "not now". */
static uint64_t pick_in_order(struct worker *w, struct lane *lane, bool write)
{
    const struct load *l = w->l;
    uint64_t n = lane_blocks(l, lane);
    for (unsigned try = 0; try < 4096; try++) {
        if (lane->next == n && w->p->one_pass)
            return NO_BLOCK;
        if (lane->next == n)
            lane->next = 0;
        uint64_t block = lane->next++ * l->n_lanes + lane->index;
        uint32_t entry = l->table[block];
        if (w->p->order == ORDER_WRITTEN && entry >> USE_BITS == 0) {
            try = 0;
            continue;
        }
        if (block_usable(entry, write))
            return block;
    }
    return NO_BLOCK;
}

/* ---- Encoding ---- */

static void slot_place(struct conn *c, struct slot *s, uint64_t block)
{
    struct load *l = c->w->l;
    uint32_t *entry = &l->table[block];
    if (s->write)
        *entry = ((((*entry >> USE_BITS) + 1) & GEN_MASK) << USE_BITS) | USE_WRITER;
    else
        ++*entry;
    s->block = block;
    s->off = l->c.off + block * l->c.block;
    s->len = l->c.block;
    s->key = pattern_key(l->c.seed, *entry >> USE_BITS);
}

/* The next piece of the initial pattern. false: all given out. */
static bool slot_place_initial(struct conn *c, struct slot *s)
{
    struct load *l = c->w->l;
    uint64_t total = load_length(l);
    uint64_t off = (c->lane->next * l->n_lanes + c->lane->index) * c->w->p->block;
    if (off >= total)
        return false;
    c->lane->next++;
    s->off = l->c.off + off;
    s->len = MIN(c->w->p->block, total - off);
    s->key = pattern_key(l->c.seed, 0);
    return true;
}

static bool place_next(struct conn *c, struct slot *s)
{
    struct worker *w = c->w;
    const struct load_phase *p = w->p;
    s->write =
        p->read_percent < 100 && (p->read_percent == 0 || random_below(w, 100) >= p->read_percent);
    if (p->initial)
        return slot_place_initial(c, s);
    uint64_t block = p->order == ORDER_RANDOM ? pick_random(w, c->lane, s->write)
                                              : pick_in_order(w, c->lane, s->write);
    if (block == NO_BLOCK)
        return false;
    slot_place(c, s, block);
    return true;
}

static bool start_request(struct conn *c)
{
    struct worker *w = c->w;
    if (w->stopping || c->n_free == 0 || w->quota == 0)
        return false;
    unsigned i = c->free_slots[c->n_free - 1];
    struct slot *s = &c->slots[i];
    if (!place_next(c, s))
        return false;
    c->n_free--;
    w->quota--;
    w->n_inflight++;
    s->cookie = ++c->n_sent << 16 | i;
    s->start_ns = w->now_ns;
    s->got = 0;
    s->busy = true;
    s->failed = s->bad = false;

    uint8_t *p = c->out + c->out_tail;
    put_be32(p, REQUEST_MAGIC);
    put_be16(p + 4, s->write && w->l->c.fua ? CMD_FLAG_FUA : 0);
    put_be16(p + 6, s->write ? CMD_WRITE : CMD_READ);
    put_be64(p + 8, s->cookie);
    put_be64(p + 16, s->off);
    put_be32(p + 24, s->len);
    c->out_tail += REQUEST_LEN;
    if (s->write) {
        c->making = s;
        c->made = 0;
    }
    return true;
}

static void make_payload(struct conn *c)
{
    struct slot *s = c->making;
    uint32_t n = MIN(s->len - c->made, round_down(LOAD_BUFFER - c->out_tail, 8));
    pattern_write(c->out + c->out_tail, s->key, s->off + c->made, n);
    c->out_tail += n;
    c->made += n;
    if (c->made == s->len)
        c->making = NULL;
}

/* Encode until the window or the buffer is full. */
static void fill_out(struct conn *c)
{
    c->out_head = c->out_tail = 0;
    while (LOAD_BUFFER - c->out_tail >= REQUEST_LEN + 8) {
        if (c->making)
            make_payload(c);
        else if (!start_request(c))
            break;
    }
}

int conn_push(struct conn *c)
{
    for (;;) {
        if (c->out_head == c->out_tail)
            fill_out(c);
        if (c->out_head == c->out_tail)
            return 0;
        ssize_t n = send(c->fd, c->out + c->out_head, c->out_tail - c->out_head,
                         MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN)
            return 0;
        if (n < 0)
            return worker_fail(c->w, "sending requests", errno);
        c->out_head += n;
    }
}
