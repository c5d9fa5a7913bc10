/* SPDX-License-Identifier: Apache-2.0 */
/* What guests do, and what a sector may show. */
#include "guest.h"

#include <string.h>

/* ------------------------------------------------------------------ disks */

static void fill_sector(uint8_t *p, uint64_t stamp)
{
    for (unsigned i = 0; i < SECTOR; i += 8)
        memcpy(p + i, &stamp, 8);
}

static void fill(uint8_t *p, uint64_t len, uint64_t stamp)
{
    for (uint64_t i = 0; i < len; i += SECTOR)
        fill_sector(p + i, stamp);
}

static bool read_stamp(const uint8_t *p, uint64_t *stamp)
{
    memcpy(stamp, p, 8);
    return !memcmp(p, p + 8, SECTOR - 8);
}

static struct wr *new_wr(struct crowd *c)
{
    if (c->n_wr == c->cap_wr) {
        c->cap_wr = c->cap_wr * 2 + 256;
        c->wr = realloc(c->wr, c->cap_wr * sizeof *c->wr);
        CHECK(c->wr);
    }
    return &c->wr[c->n_wr++];
}

struct disk *crowd_add_disk(struct crowd *c, const char *node, const char *file, uint64_t size)
{
    static uint8_t buf[65536];
    struct chance *dice = &c->w->chance;
    CHECK(c->n_disks < MAX_DISKS);
    unsigned k = c->n_disks++;
    struct disk *d = &c->disk[k];
    snprintf(d->node, sizeof d->node, "%s", node);
    snprintf(d->file, sizeof d->file, "%s", file);
    d->size = size;
    d->now = calloc(size / SECTOR, sizeof *d->now);
    d->vague = calloc(size / SECTOR, sizeof *d->vague);
    CHECK(d->now && d->vague);
    CHECK(sim_file_write(c->w->disk, file, "", 1, size - 1) == 0);
    /* What is there before the first tick counts as writes that were answered at tick 0. */
    for (uint64_t off = 0; off < size;) {
        uint64_t len = SECTOR * (1 + chance_below(dice, sizeof buf / SECTOR)); /* MIN looks twice */
        len = MIN(len, size - off);
        if (!chance_one_in(dice, 3)) {
            uint64_t stamp = (uint64_t)(k + 1) << 56 | off;
            fill(buf, len, stamp);
            CHECK(sim_file_write(c->w->disk, file, buf, len, off) == 0);
            *new_wr(c) =
                (struct wr){.disk = k, .off = off, .len = len, .stamp = stamp, .fua = true};
            for (uint64_t s = off / SECTOR; s < (off + len) / SECTOR; s++)
                d->now[s] = stamp;
        }
        off += len;
    }
    return d;
}

void crowd_open_disk(struct crowd *c, unsigned disk, unsigned n_guests)
{
    struct disk *d = &c->disk[disk];
    struct chance *dice = &c->w->chance;
    struct qmp *q = &c->w->qmp;
    char more[120];
    snprintf(more, sizeof more, "%s%s", d->unmap ? ",\"discard\":\"unmap\"" : "",
             d->direct ? ",\"cache\":{\"direct\":true}" : "");
    world_add_file(c->w, d->node, d->file, more);
    for (unsigned i = 0; i < n_guests; i++) {
        CHECK(c->n_guests < MAX_GUESTS);
        struct guest *g = &c->guest[c->n_guests++];
        *g = (struct guest){.crowd = c,
                            .disk = disk,
                            .number = i,
                            .n_on_disk = n_guests,
                            .depth = 1 + (unsigned)chance_below(dice, NBD_DEPTH),
                            .left = FOREVER,
                            .think_ns = chance_one_in(dice, 3) ? 20000000 : 2000000,
                            .structured = chance_one_in(dice, 2)};
        qmp_do(q, "object-add", "{\"qom-type\":\"iothread\",\"id\":\"io-%s-%u\"}", d->node, i);
        qmp_do(q, "block-export-add",
               "{\"type\":\"nbd\",\"id\":\"e-%s-%u\",\"node-name\":\"%s\",\"name\":\"%s-%u\","
               "\"writable\":true,\"iothread\":\"io-%s-%u\"}",
               d->node, i, d->node, d->node, i, d->node, i);
    }
}

/* ------------------------------------------------------------------ one guest */

static bool busy_there(const struct guest *g, uint64_t off, uint64_t len)
{
    for (unsigned i = 0; i < NBD_DEPTH; i++) {
        const struct nbd_op *op = &g->nbd.op[i];
        if (op->used && op->off < off + len && off < op->off + op->len)
            return true;
    }
    return false;
}

/* A random range inside one of our stripes. False: none this time. */
static bool pick(struct guest *g, uint64_t *off, uint64_t *len)
{
    struct disk *d = &g->crowd->disk[g->disk];
    struct chance *dice = &g->crowd->w->chance;
    uint64_t sectors = d->size / SECTOR, stripes = (sectors + d->stripe - 1) / d->stripe;
    uint64_t k = chance_below(dice, stripes);
    k = k - k % g->n_on_disk + g->number;
    if (k >= stripes)
        return false;
    uint64_t begin = k * d->stripe, n = MIN(sectors - begin, d->stripe);
    uint64_t first = chance_below(dice, n), most = n - first;
    if (!chance_one_in(dice, 8))
        most = MIN(most, 8);
    *off = (begin + first) * SECTOR;
    *len = (1 + chance_below(dice, most)) * SECTOR;
    return !busy_there(g, *off, *len);
}

static co_fn void send_flush(struct guest *g)
{
    uint64_t sent = ++g->crowd->w->tick;
    struct nbd_op *op = nbd_send(&g->nbd, NBD_CMD_FLUSH, 0, 0, 0, NULL);
    g->entry[op - g->nbd.op] = sent;
}

static enum nbd_cmd pick_command(struct chance *dice)
{
    switch (chance_below(dice, 16)) {
    case 0:
    case 1:
        return NBD_CMD_WRITE_ZEROES;
    case 2:
        return NBD_CMD_TRIM;
    case 3:
    case 4:
        return NBD_CMD_READ;
    case 5:
        return NBD_CMD_FLUSH;
    default:
        return NBD_CMD_WRITE;
    }
}

static void note_write(struct guest *g, size_t entry, enum nbd_cmd cmd, unsigned flags,
                       uint64_t off, uint64_t len)
{
    struct crowd *c = g->crowd;
    struct disk *d = &c->disk[g->disk];
    bool trim = cmd == NBD_CMD_TRIM;
    c->wr[entry] = (struct wr){.disk = g->disk,
                               .guest = g->number,
                               .off = off,
                               .len = len,
                               .stamp = cmd == NBD_CMD_WRITE ? entry + 1 : 0,
                               .sent = ++c->w->tick,
                               .acked = FOREVER,
                               .marks = !trim || d->unmap,
                               .fua = flags & NBD_FLAG_FUA,
                               .trim = trim};
}

static co_fn bool send_one(struct guest *g)
{
    struct crowd *c = g->crowd;
    struct chance *dice = &c->w->chance;
    enum nbd_cmd cmd = pick_command(dice);
    unsigned flags = 0;
    uint64_t off, len;
    size_t entry = 0;
    if (cmd == NBD_CMD_FLUSH) {
        send_flush(g);
        return true;
    }
    if (!pick(g, &off, &len))
        return false;
    if (cmd != NBD_CMD_READ) {
        flags = chance_one_in(dice, 12) ? NBD_FLAG_FUA : 0;
        if (cmd == NBD_CMD_WRITE_ZEROES && chance_one_in(dice, 2))
            flags |= NBD_FLAG_NO_HOLE;
        entry = (size_t)(new_wr(c) - c->wr);
        note_write(g, entry, cmd, flags, off, len);
    }
    uint8_t *data = NULL;
    if (cmd == NBD_CMD_WRITE) {
        data = malloc(len);
        CHECK(data);
        fill(data, len, entry + 1);
    }
    struct nbd_op *op = nbd_send(&g->nbd, cmd, flags, off, len, data);
    g->entry[op - g->nbd.op] = entry;
    free(data);
    return true;
}

static void check_read(struct guest *g, const struct nbd_op *op)
{
    const struct disk *d = &g->crowd->disk[g->disk];
    for (uint64_t i = 0; i < op->len; i += SECTOR) {
        uint64_t s = (op->off + i) / SECTOR, stamp;
        bool whole = read_stamp(op->data + i, &stamp);
        CHECK_SAY(whole, "%s: sector %" PRIu64 " is torn", d->node, s);
        CHECK_SAY(d->vague[s] || stamp == d->now[s],
                  "%s: sector %" PRIu64 " reads as %" PRIx64 " and should be %" PRIx64, d->node, s,
                  stamp, d->now[s]);
    }
}

static void end_write(struct guest *g, const struct nbd_op *op, size_t entry)
{
    struct crowd *c = g->crowd;
    struct disk *d = &c->disk[g->disk];
    struct wr *wr = &c->wr[entry];
    wr->acked = ++c->w->tick;
    wr->failed = op->error != 0;
    for (uint64_t s = op->off / SECTOR; s < (op->off + op->len) / SECTOR; s++) {
        if (wr->failed)
            d->vague[s] = true;
        if (!wr->failed && (!wr->trim || d->unmap)) {
            d->now[s] = wr->stamp;
            d->vague[s] = wr->trim; /* what a discard leaves is not specified */
        }
    }
}

static co_fn void recv_one(struct guest *g)
{
    struct crowd *c = g->crowd;
    struct disk *d = &c->disk[g->disk];
    struct nbd_op *op = nbd_recv(&g->nbd);
    if (!op)
        return;
    size_t entry = g->entry[op - g->nbd.op];
    uint64_t ns = io_now(c->w->io) - op->began;
    CHECK_SAY(!op->error || d->may_fail, "%s: command %d got error %d", d->node, op->cmd,
              op->error);
    CHECK_SAY(!d->limit_ns || ns <= d->limit_ns, "%s: command %d took %" PRIu64 " ms", d->node,
              op->cmd, ns / 1000000);
    d->worst_ns = MAX(d->worst_ns, ns);
    d->n_done++;
    if (op->cmd == NBD_CMD_FLUSH) {
        d->flushed = op->error ? d->flushed : MAX(d->flushed, entry);
    } else if (op->cmd != NBD_CMD_READ) {
        end_write(g, op, entry);
    } else if (!op->error) {
        check_read(g, op);
    }
    nbd_done(&g->nbd, op);
}

static co_fn void rest(struct crowd *c)
{
    spin_lock(&c->lock);
    c->n_idle++;
    co_queue_wake_all(&c->idle);
    while (c->held && !c->stop)
        co_queue_wait(&c->resume, &c->lock);
    c->n_idle--;
    spin_unlock(&c->lock);
}

static co_fn void guest_turn(struct guest *g)
{
    struct crowd *c = g->crowd;
    struct chance *dice = &c->w->chance;
    bool may = !c->held && !c->stop && g->left && g->nbd.n_used < g->depth;
    if (may && (!g->nbd.n_used || chance_one_in(dice, 2))) {
        if (!g->nbd.n_used && chance_one_in(dice, 3)) /* else our sleep would count as waiting */
            io_sleep(chance_below(dice, g->think_ns));
        /* The world may have changed while we thought. */
        if (!c->held && !c->stop && send_one(g) && g->left != FOREVER)
            g->left--;
    }
    if (g->nbd.n_used && (!may || chance_one_in(dice, 2)))
        recv_one(g);
    else if (!g->nbd.n_used)
        loop_pause();
}

static void guest_main(void *arg)
{
    struct guest *g = arg;
    struct crowd *c = g->crowd;
    char name[32];
    snprintf(name, sizeof name, "%s-%u", c->disk[g->disk].node, g->number);
    nbd_open(&g->nbd, name, g->structured);
    while (!g->nbd.lost && (g->nbd.n_used || (!c->stop && g->left))) {
        if (c->held && !g->nbd.n_used && !c->stop)
            rest(c);
        else
            guest_turn(g);
    }
    nbd_close(&g->nbd);
    spin_lock(&c->lock);
    c->n_gone++;
    co_queue_wake_all(&c->idle);
    spin_unlock(&c->lock);
}

/* ------------------------------------------------------------------ all guests */

void crowd_start(struct crowd *c)
{
    unsigned n = io_n_loops(c->w->io);
    for (unsigned i = 0; i < c->n_guests; i++) {
        uint64_t l = chance_below(&c->w->chance, n);
        CHECK(loop_spawn(io_loop(c->w->io, (unsigned)l), guest_main, &c->guest[i]) == 0);
    }
}

void crowd_hold(struct crowd *c)
{
    spin_lock(&c->lock);
    CHECK(!c->held);
    c->held = true;
    while (c->n_idle + c->n_gone < c->n_guests)
        co_queue_wait(&c->idle, &c->lock);
    spin_unlock(&c->lock);
}

void crowd_release(struct crowd *c)
{
    spin_lock(&c->lock);
    c->held = false;
    co_queue_wake_all(&c->resume);
    spin_unlock(&c->lock);
}

void crowd_end(struct crowd *c)
{
    spin_lock(&c->lock);
    c->stop = true;
    co_queue_wake_all(&c->resume);
    while (c->n_gone < c->n_guests)
        co_queue_wait(&c->idle, &c->lock);
    spin_unlock(&c->lock);
}

void crowd_may_lose(struct crowd *c)
{
    crowd_hold(c); /* so all are past their handshake */
    for (unsigned i = 0; i < c->n_guests; i++)
        c->guest[i].nbd.may_lose = true;
    crowd_release(c);
}

void crowd_free(struct crowd *c)
{
    for (unsigned i = 0; i < c->n_disks; i++) {
        free(c->disk[i].now);
        free(c->disk[i].vague);
    }
    free(c->wr);
}

uint64_t crowd_oldest_ns(const struct crowd *c, unsigned disk)
{
    uint64_t oldest = 0, now = io_now(c->w->io);
    for (unsigned i = 0; i < c->n_guests; i++) {
        const struct guest *g = &c->guest[i];
        for (unsigned k = 0; k < NBD_DEPTH && g->disk == disk; k++)
            if (g->nbd.op[k].used)
                oldest = MAX(oldest, now - g->nbd.op[k].began);
    }
    return oldest;
}

/* ------------------------------------------------------------------ what a sector may show */

static bool covers(const struct wr *w, unsigned disk, uint64_t s)
{
    return w->disk == disk && w->off <= s * SECTOR && s * SECTOR < w->off + w->len;
}

static bool changes(const struct crowd *c, const struct wr *w)
{
    return !w->trim || c->disk[w->disk].unmap;
}

/* May sector `s` show `stamp`, when write number `base` (SIZE_MAX: none, zeroes) is certainly there
 * and those sent before tick `r` may be? A discard leaves anything behind. */
static bool explained(const struct crowd *c, unsigned disk, uint64_t s, uint64_t stamp, size_t base,
                      uint64_t r)
{
    if (base == SIZE_MAX ? stamp == 0 : c->wr[base].stamp == stamp || c->wr[base].trim)
        return true;
    for (size_t i = base == SIZE_MAX ? 0 : base + 1; i < c->n_wr; i++) {
        const struct wr *w = &c->wr[i];
        if (w->sent < r && covers(w, disk, s) && changes(c, w) && (w->stamp == stamp || w->trim))
            return true;
    }
    return false;
}

typedef bool settled_fn(const struct crowd *c, const struct wr *w, uint64_t arg);

/* For each sector the last write that `settled` says is certainly there. */
static size_t *last_settled(const struct crowd *c, unsigned disk, settled_fn *settled, uint64_t arg)
{
    uint64_t n = c->disk[disk].size / SECTOR;
    size_t *base = malloc(n * sizeof *base);
    CHECK(base);
    memset(base, 0xff, n * sizeof *base);
    for (size_t i = 0; i < c->n_wr; i++) {
        const struct wr *w = &c->wr[i];
        if (w->disk != disk || w->failed || !changes(c, w) || !settled(c, w, arg))
            continue;
        for (uint64_t s = w->off / SECTOR; s < (w->off + w->len) / SECTOR; s++)
            base[s] = i;
    }
    return base;
}

static void check_sectors(struct crowd *c, struct sim_world *world, unsigned disk, const char *file,
                          const size_t *base, uint64_t r, const char *who)
{
    struct disk *d = &c->disk[disk];
    uint8_t *buf = malloc(d->size);
    CHECK(buf);
    ssize_t n = sim_file_read(world, file, buf, d->size, 0);
    CHECK_SAY(n == (ssize_t)d->size, "%s: '%s' is cut: %zd", who, file, n);
    for (uint64_t s = 0; s < d->size / SECTOR; s++) {
        uint64_t stamp;
        bool whole = read_stamp(buf + s * SECTOR, &stamp);
        CHECK_SAY(whole, "%s: sector %" PRIu64 " of '%s' is torn", who, s, file);
        if (base[s] != SIZE_MAX && c->wr[base[s]].stamp == stamp)
            continue;
        CHECK_SAY(
            explained(c, disk, s, stamp, base[s], r),
            "%s: sector %" PRIu64 " of '%s' shows %" PRIx64 "; the last settled write is number %zd"
            " (%" PRIu64 "..%" PRIu64 ", stamp %" PRIx64 ")",
            who, s, file, stamp, (ssize_t)base[s], base[s] == SIZE_MAX ? 0 : c->wr[base[s]].sent,
            base[s] == SIZE_MAX ? 0 : c->wr[base[s]].acked,
            base[s] == SIZE_MAX ? 0 : c->wr[base[s]].stamp);
    }
    free(buf);
}

static bool answered_before(const struct crowd *c, const struct wr *w, uint64_t q)
{
    return w->acked < q;
}

void crowd_check_file(struct crowd *c, struct sim_world *world, unsigned disk, const char *file,
                      uint64_t q, uint64_t r, const char *who)
{
    size_t *base = last_settled(c, disk, answered_before, q);
    check_sectors(c, world, disk, file, base, r, who);
    free(base);
}

static bool is_durable(const struct crowd *c, const struct wr *w, uint64_t nothing_lost)
{
    return w->acked != FOREVER && (w->fua || nothing_lost || w->acked < c->disk[w->disk].flushed);
}

void crowd_check_survivors(struct crowd *c, struct sim_world *world, unsigned disk,
                           bool nothing_lost)
{
    size_t *base = last_settled(c, disk, is_durable, nothing_lost);
    check_sectors(c, world, disk, c->disk[disk].file, base, FOREVER, "after the cut");
    free(base);
}

struct sim_world *crowd_cut_copy(struct crowd *c)
{
    struct sim_world *copy = sim_world_clone(c->w->disk);
    sim_power_cut(copy, SIM_CUT_ANY, chance_next(&c->w->chance));
    return copy;
}

void crowd_check_cut_now(struct crowd *c)
{
    struct sim_world *copy = crowd_cut_copy(c);
    for (unsigned i = 0; i < c->n_disks; i++)
        crowd_check_survivors(c, copy, i, false);
    sim_world_free(copy);
}

/* Serves the disk, reads all of it through NBD, compares with the file. */
static co_fn void check_served(struct crowd *c, unsigned disk)
{
    struct disk *d = &c->disk[disk];
    struct nbd_client n;
    world_add_file(c->w, d->node, d->file, "");
    qmp_do(&c->w->qmp, "block-export-add",
           "{\"type\":\"nbd\",\"id\":\"again-%u\",\"node-name\":\"%s\",\"name\":\"again-%u\"}",
           disk, d->node, disk);
    char name[32];
    snprintf(name, sizeof name, "again-%u", disk);
    uint8_t *got = malloc(d->size), *is = malloc(d->size);
    CHECK(got && is);
    nbd_open(&n, name, true);
    CHECK_SAY(n.size == d->size, "%" PRIu64 " bytes are served of %" PRIu64, n.size, d->size);
    CHECK(nbd_call(&n, NBD_CMD_READ, 0, 0, d->size, got) == 0);
    nbd_close(&n);
    CHECK(sim_file_read(c->w->disk, d->file, is, d->size, 0) == (ssize_t)d->size);
    CHECK(!memcmp(got, is, d->size));
    free(got);
    free(is);
}

co_fn void crowd_check_after_cut(struct crowd *c)
{
    for (unsigned i = 0; i < c->n_disks; i++) {
        crowd_check_survivors(c, c->w->disk, i, c->w->how == SIM_CUT_PROCESS);
        check_served(c, i);
    }
}
