/* SPDX-License-Identifier: Apache-2.0 */
/* What clients do, and what they hold against the model. */
#include "client.h"

#include <string.h>

#define PAD 0xA5
#define LONG_READ 65536u
#define NBD_EIO 5
#define NBD_ENOSPC 28
#define NBD_ENOTSUP 95

static void tell(struct clients *c)
{
    spin_lock(&c->lock);
    co_queue_wake_all(&c->changed);
    spin_unlock(&c->lock);
}

#define MODEL_CHECK(d, e)                                                                          \
    do {                                                                                           \
        const char *e_ = (e);                                                                      \
        CHECK_SAY(!e_, "%s: %s", (d)->node, e_);                                                   \
    } while (0)

/* ------------------------------------------------------------------ disks */

/* Some of it is there before the first tick: durable and answered. */
static void fill_file(struct shared *d)
{
    struct world *w = d->all->w;
    struct chance *dice = &w->chance;
    uint8_t *buf = malloc(d->file_size);
    uint64_t end = d->base + d->size;
    CHECK(buf);
    memset(buf, PAD, d->file_size);
    CHECK(sim_file_write(w->disk, d->file, "", 1, end - 1) == 0);
    if (d->base)
        CHECK(sim_file_write(w->disk, d->file, buf, d->base, 0) == 0);
    if (d->file_size > end)
        CHECK(sim_file_write(w->disk, d->file, buf, d->file_size - end, end) == 0);
    for (uint64_t off = 0; off < d->size;) {
        uint64_t len = SECTOR * (1 + chance_below(dice, 40));
        len = MIN(len, d->size - off);
        if (d->sparse ? chance_one_in(dice, 8) : !chance_one_in(dice, 4)) {
            uint32_t n = model_send(d->model, MODEL_WRITE, true, off, len, ++w->tick);
            model_data(d->model, n, buf);
            model_done(d->model, n, ++w->tick);
            CHECK(sim_file_write(w->disk, d->file, buf, len, d->base + off) == 0);
        }
        off += len;
    }
    free(buf);
}

struct shared *shared_add(struct clients *c)
{
    static const unsigned grains[] = {MODEL_UNIT, SECTOR, SECTOR, 4096};
    struct chance *dice = &c->w->chance;
    CHECK(c->n_disks < SHARED_MAX);
    struct shared *d = &c->disk[c->n_disks];
    *d = (struct shared){.all = c, .number = c->n_disks++};
    snprintf(d->node, sizeof d->node, "d%u", d->number);
    snprintf(d->file, sizeof d->file, "f%u", d->number);
    d->size = SECTOR * (8 + chance_below(dice, 300));
    d->grain = grains[chance_below(dice, 4)];
    d->raw = chance_one_in(dice, 2);
    d->direct = chance_one_in(dice, 2);
    d->unmap = chance_one_in(dice, 2);
    d->writethrough = chance_one_in(dice, 8);
    d->detect = chance_one_in(dice, 4);
    d->sparse = chance_one_in(dice, 2);
    d->base = d->raw && chance_one_in(dice, 2) ? MODEL_UNIT * chance_below(dice, 200) : 0;
    d->file_size = d->base + d->size + (chance_one_in(dice, 2) ? chance_below(dice, SECTOR) : 0);
    if (d->raw && chance_one_in(dice, 2))
        d->file_size += chance_below(dice, 10000);
    d->hot = MAX(d->grain * (uint64_t)16, d->size / 8);
    d->hot = MIN(d->hot, d->size);
    d->n_exports = 1 + chance_one_in(dice, 4);
    d->model = model_new(d->size);
    fill_file(d);
    for (unsigned n = 2 + (unsigned)chance_below(dice, CLIENTS_MAX - 1); n; n--)
        c->client[c->n_clients++] =
            (struct client){.d = d,
                            .number = d->n_clients++,
                            .depth = 1 + (unsigned)chance_below(dice, NBD_DEPTH),
                            .think_ns = chance_one_in(dice, 2) ? 20000000 : 2000000,
                            .structured = !chance_one_in(dice, 4)};
    return d;
}

void shared_open_node(struct shared *d)
{
    char file[200];
    struct qmp *q = &d->all->w->qmp;
    const char *unmap = d->unmap ? ",\"discard\":\"unmap\"" : "";
    const char *detect = !d->detect ? ""
                         : d->unmap ? ",\"detect-zeroes\":\"unmap\""
                                    : ",\"detect-zeroes\":\"on\"";
    snprintf(file, sizeof file, "\"driver\":\"file\",\"filename\":\"%s\"%s%s", d->file, unmap,
             d->direct ? ",\"cache\":{\"direct\":true}" : "");
    if (d->raw)
        qmp_do(q, "blockdev-add",
               "{\"driver\":\"raw\",\"node-name\":\"%s\",\"offset\":%" PRIu64 ",\"size\":%" PRIu64
               "%s%s,\"file\":{%s}}",
               d->node, d->base, d->size, unmap, detect, file);
    else
        qmp_do(q, "blockdev-add", "{\"node-name\":\"%s\"%s,%s}", d->node, detect, file);
    d->cleared.on = d->shown.on = false;
}

void shared_close_node(struct shared *d)
{
    qmp_do(&d->all->w->qmp, "blockdev-del", "{\"node-name\":\"%s\"}", d->node);
}

/* ------------------------------------------------------------------ exports */

void shared_export(struct shared *d)
{
    struct world *w = d->all->w;
    struct chance *dice = &w->chance;
    if (!d->shown.on && chance_one_in(dice, 2)) {
        d->shown.shift = 9 + (unsigned)chance_below(dice, 6);
        qmp_do(&w->qmp, "block-dirty-bitmap-add",
               "{\"node\":\"%s\",\"name\":\"x\",\"granularity\":%u}", d->node,
               1u << d->shown.shift);
        d->shown.q = w->qmp.asked;
        d->shown.r = w->qmp.told;
        d->shown.on = true;
    }
    d->closing = false;
    for (unsigned i = 0; i < d->n_exports; i++)
        qmp_do(&w->qmp, "block-export-add",
               "{\"type\":\"nbd\",\"id\":\"e%u-%u\",\"node-name\":\"%s\",\"name\":\"%s-%u\","
               "\"writable\":true,\"writethrough\":%s%s%s}",
               d->number, i, d->node, d->node, i, d->writethrough ? "true" : "false",
               d->shown.on && i == 0 ? ",\"bitmaps\":[\"x\"]" : "",
               chance_one_in(dice, 3) ? ",\"iothread\":\"io\"" : "");
}

static co_fn bool exported(struct shared *d)
{
    json_t *row, *v = qmp_get(&d->all->w->qmp, "query-block-exports", NULL);
    bool found = false;
    size_t i;
    json_array_foreach (v, i, row)
        found |= !strcmp(json_string_value(json_object_get(row, "node-name")), d->node);
    json_decref(v);
    return found;
}

void shared_unexport(struct shared *d)
{
    struct clients *c = d->all;
    d->closing = true;
    d->generation++;
    for (unsigned i = 0; i < d->n_exports; i++)
        qmp_do(&c->w->qmp, "block-export-del", "{\"id\":\"e%u-%u\",\"mode\":\"hard\"}", d->number,
               i);
    while (exported(d))
        io_sleep(SECOND / 100);
    spin_lock(&c->lock);
    while (d->n_connected)
        co_queue_wait(&c->changed, &c->lock);
    spin_unlock(&c->lock);
    /* BLOCK_EXPORT_DELETED: nobody can say any more that a request of its clients is under way. */
    for (size_t i = 0; i < d->n_orphans; i++)
        model_gone(d->model, d->orphan[i], ++c->w->tick);
    d->n_orphans = 0;
}

/* ------------------------------------------------------------------ connections */

static co_fn bool connect_to(struct client *c)
{
    static const char *const contexts[] = {"base:allocation", "qemu:dirty-bitmap:x"};
    struct shared *d = c->d;
    char name[24];
    snprintf(name, sizeof name, "%s-%u", d->node, c->number % d->n_exports);
    c->generation = d->generation;
    bool shown = d->shown.on && c->number % d->n_exports == 0;
    unsigned n = c->structured ? 1 + shown : 0;
    if (d->closing || !nbd_try_open(&c->nbd, name, c->structured, contexts, n))
        return false;
    unsigned need = NBD_HAS_FLAGS | NBD_SEND_FLUSH | NBD_SEND_FUA | NBD_SEND_TRIM |
                    NBD_SEND_WRITE_ZEROES | NBD_SEND_FAST_ZERO | NBD_SEND_CACHE |
                    NBD_CAN_MULTI_CONN;
    CHECK((c->nbd.flags & need) == need);
    CHECK(c->nbd.size == (d->raw ? d->size : d->file_size - d->base)); /* with the odd end */
    if (c->generation != d->generation)
        c->nbd.n_contexts = 0; /* chosen for an export that is gone */
    c->leaving = false;
    d->n_connected++;
    return true;
}

/* A reply whose beginning is sent cannot turn into an error: reading the rest may fail, though. */
static bool read_may_break_off(const struct client *c)
{
    bool yes = false;
    for (unsigned i = 0; i < NBD_DEPTH; i++)
        yes |= c->nbd.op[i].used && c->nbd.op[i].cmd == NBD_CMD_READ && c->nbd.op[i].len > 4096;
    return yes && c->d->faulty;
}

/* Nobody cuts us off but those who said so. */
static bool may_be_lost(const struct client *c)
{
    return c->d->closing || c->generation != c->d->generation || c->d->all->resets ||
           read_may_break_off(c);
}

/* What was under way may still be done, or not. */
static void make_orphans(struct client *c)
{
    struct shared *d = c->d;
    for (unsigned i = 0; i < NBD_DEPTH; i++) {
        if (!c->nbd.op[i].used || !c->rq[i].write)
            continue;
        if (d->n_orphans == d->cap_orphans) {
            d->cap_orphans = 2 * d->cap_orphans + 16;
            d->orphan = realloc(d->orphan, d->cap_orphans * sizeof *d->orphan);
            CHECK(d->orphan);
        }
        d->orphan[d->n_orphans++] = c->rq[i].write;
    }
}

static void disconnect(struct client *c)
{
    make_orphans(c);
    nbd_hang_up(&c->nbd);
    c->d->n_connected--;
    tell(c->d->all);
}

/* ------------------------------------------------------------------ requests */

static void note_recent(struct shared *d, uint64_t off, uint64_t len)
{
    unsigned i = d->n_recent++ % 4;
    d->recent[i].off = off;
    d->recent[i].len = len;
}

static bool pick_recent(struct client *c, uint64_t *off, uint64_t *len)
{
    struct shared *d = c->d;
    struct chance *dice = &d->all->w->chance;
    if (!d->n_recent || !chance_one_in(dice, 4))
        return false;
    uint64_t i = chance_below(dice, MIN(d->n_recent, 4u)), n = d->recent[i].len / MODEL_UNIT;
    uint64_t first = chance_one_in(dice, 2) ? chance_below(dice, n) : 0;
    *off = d->recent[i].off + MODEL_UNIT * first;
    *len = MODEL_UNIT * (1 + chance_below(dice, MIN(n - first, (uint64_t)64)));
    return true;
}

/* Whole blocks of the file system, so that holes come and go. */
static void pick_blocks(struct client *c, uint64_t *off, uint64_t *len)
{
    struct shared *d = c->d;
    struct chance *dice = &d->all->w->chance;
    uint64_t skew = (4096 - d->base % 4096) % 4096, n = (d->size - MIN(skew, d->size)) / 4096;
    uint64_t first = n ? chance_below(dice, n) : 0;
    *off = n ? skew + 4096 * first : 0;
    *len = n ? 4096 * (1 + chance_below(dice, n - first)) : d->size;
}

/* Long enough that the reply may come in pieces with holes, or straight from the file. */
static bool pick_long(struct client *c, uint64_t *off, uint64_t *len)
{
    struct shared *d = c->d;
    struct chance *dice = &d->all->w->chance;
    if (d->size <= LONG_READ || !chance_one_in(dice, 5))
        return false;
    *len = LONG_READ + MODEL_UNIT * chance_below(dice, (d->size - LONG_READ) / MODEL_UNIT);
    *off = MODEL_UNIT * chance_below(dice, (d->size - *len) / MODEL_UNIT);
    return true;
}

static void pick_range(struct client *c, uint64_t *off, uint64_t *len)
{
    struct shared *d = c->d;
    struct chance *dice = &d->all->w->chance;
    uint64_t area = chance_one_in(dice, 4) ? d->size : d->hot;
    uint64_t grain = chance_one_in(dice, 8) ? MODEL_UNIT : d->grain;
    uint64_t n = MAX(area / grain, (uint64_t)1), first = chance_below(dice, n);
    *off = first * grain;
    uint64_t most = (d->size - *off) / grain;
    if (!chance_one_in(dice, 10))
        most = MIN(most, 6);
    *len = most ? grain * (1 + chance_below(dice, most)) : 0;
    if (chance_one_in(dice, 12)) { /* the end, where a block may be cut */
        *len = MIN(*len ? *len : d->grain, d->size);
        *off = d->size - *len;
    }
    if (!*len) { /* smaller than a grain */
        *off = 0;
        *len = MIN((uint64_t)SECTOR, d->size);
    }
}

static enum nbd_cmd pick_command(struct client *c)
{
    static const enum nbd_cmd few[] = {NBD_CMD_WRITE_ZEROES, NBD_CMD_WRITE_ZEROES, NBD_CMD_TRIM,
                                       NBD_CMD_CACHE,        NBD_CMD_FLUSH,        NBD_CMD_FLUSH};
    struct chance *dice = &c->d->all->w->chance;
    switch (chance_below(dice, 8)) {
    case 0:
    case 1:
    case 2:
        return NBD_CMD_WRITE;
    case 3:
    case 4:
        return NBD_CMD_READ;
    case 5:
        if (c->nbd.n_contexts)
            return NBD_CMD_BLOCK_STATUS;
        return NBD_CMD_READ;
    default:
        return few[chance_below(dice, 6)];
    }
}

static unsigned pick_flags(struct client *c, enum nbd_cmd cmd)
{
    struct chance *dice = &c->d->all->w->chance;
    unsigned flags = chance_one_in(dice, 6) ? NBD_FLAG_FUA : 0;
    if (cmd == NBD_CMD_WRITE_ZEROES)
        flags |= (chance_one_in(dice, 2) ? NBD_FLAG_NO_HOLE : 0) |
                 (chance_one_in(dice, 3) ? NBD_FLAG_FAST_ZERO : 0);
    if (cmd == NBD_CMD_BLOCK_STATUS && chance_one_in(dice, 3))
        flags |= NBD_FLAG_REQ_ONE;
    if (cmd == NBD_CMD_READ && c->structured && chance_one_in(dice, 6))
        flags |= NBD_FLAG_DF;
    return cmd == NBD_CMD_FLUSH ? 0 : flags;
}

static enum model_kind kind_of(enum nbd_cmd cmd, bool zeroes)
{
    return cmd == NBD_CMD_TRIM                     ? MODEL_TRIM
           : cmd == NBD_CMD_WRITE_ZEROES || zeroes ? MODEL_ZERO
                                                   : MODEL_WRITE;
}

/* Also discards that the node ignores: there nothing may change, so the model never hears of them.
 */
static bool is_write(const struct shared *d, enum nbd_cmd cmd)
{
    return cmd == NBD_CMD_WRITE || cmd == NBD_CMD_WRITE_ZEROES || (cmd == NBD_CMD_TRIM && d->unmap);
}

static co_fn void send_one(struct client *c)
{
    struct shared *d = c->d;
    struct world *w = d->all->w;
    enum nbd_cmd cmd = pick_command(c);
    unsigned flags = pick_flags(c, cmd), i = 0;
    uint64_t off = 0, len = 0;
    uint8_t *data = NULL;
    uint32_t write = 0;
    bool blocks = cmd != NBD_CMD_WRITE && cmd != NBD_CMD_CACHE;
    if ((cmd == NBD_CMD_READ && pick_long(c, &off, &len)) || pick_recent(c, &off, &len))
        ;
    else if (blocks && chance_one_in(&w->chance, d->sparse ? 2 : 8))
        pick_blocks(c, &off, &len);
    else
        pick_range(c, &off, &len);
    if (cmd == NBD_CMD_FLUSH)
        off = len = 0;
    bool zeroes = cmd == NBD_CMD_WRITE && chance_one_in(&w->chance, 10);
    bool fua = flags & NBD_FLAG_FUA || d->writethrough;
    uint64_t sent = ++w->tick;
    if (is_write(d, cmd))
        write = model_send(d->model, kind_of(cmd, zeroes), fua, off, len, sent);
    if (cmd == NBD_CMD_WRITE) {
        data = calloc(1, len);
        CHECK(data);
        if (!zeroes)
            model_data(d->model, write, data);
    }
    while (c->nbd.op[i].used) /* nbd_send() takes the first free place, and may wait */
        i++;
    c->rq[i].write = write;
    c->rq[i].sent = sent;
    c->rq[i].fua = fua;
    struct nbd_op *op = nbd_send(&c->nbd, cmd, flags, off, len, data);
    CHECK(op == &c->nbd.op[i]);
    free(data);
}

/* ------------------------------------------------------------------ answers */

static void check_blocks(struct shared *d, const struct nbd_extent *e, uint64_t sent)
{
    uint64_t grain = UINT64_C(1) << d->shown.shift;
    if (!(e->flags & NBD_STATE_DIRTY)) {
        MODEL_CHECK(d, model_clean(d->model, e->off, e->len, d->shown.r, sent));
        return;
    }
    for (uint64_t off = round_down(e->off, grain); off < e->off + e->len; off += grain)
        MODEL_CHECK(d, model_dirty(d->model, off, MIN(grain, d->size - off), d->shown.q));
}

static void check_status(struct client *c, const struct nbd_op *op, uint64_t sent, uint64_t told)
{
    struct shared *d = c->d;
    unsigned seen = 0;
    for (unsigned i = 0; i < op->n_extents; i++) {
        const struct nbd_extent *e = &op->extent[i];
        CHECK(e->off + e->len <= op->off + op->len);
        seen |= 1u << e->context;
        if (e->context == 1)
            check_blocks(d, e, sent);
        else if (e->flags & NBD_STATE_ZERO) {
            MODEL_CHECK(d, model_zero(d->model, e->off, e->len, sent, told));
            note_recent(d, e->off, e->len);
        }
    }
    CHECK(seen == (1u << c->nbd.n_contexts) - 1);
}

/* Only a disk with faults may refuse; it says why. */
static void note_error(struct client *c, const struct nbd_op *op, bool fua)
{
    struct shared *d = c->d;
    bool slow = op->error == NBD_ENOTSUP && op->flags & NBD_FLAG_FAST_ZERO;
    CHECK_SAY(slow || (d->faulty && (op->error == NBD_EIO || op->error == NBD_ENOSPC)),
              "%s: command %d got error %d", d->node, op->cmd, op->error);
    if (d->sync_fault && (op->cmd == NBD_CMD_FLUSH || fua))
        model_sync_failed(d->model);
}

static void check_answer(struct client *c, const struct nbd_op *op, uint32_t write, uint64_t sent,
                         uint64_t told)
{
    struct shared *d = c->d;
    if (write) {
        model_done(d->model, write, told);
        note_recent(d, op->off, op->len);
    } else if (op->cmd == NBD_CMD_FLUSH) {
        model_flush(d->model, sent);
    } else if (op->cmd == NBD_CMD_READ) {
        MODEL_CHECK(d, model_read(d->model, op->off, op->len, op->data, sent, told));
    } else if (op->cmd == NBD_CMD_BLOCK_STATUS) {
        check_status(c, op, sent, told);
    }
}

/* The model need not remember what no request that is under way can see. */
static void forget_old(struct shared *d)
{
    uint64_t oldest = d->all->w->tick + 1;
    for (unsigned i = 0; i < d->all->n_clients; i++) {
        const struct client *c = &d->all->client[i];
        for (unsigned k = 0; k < NBD_DEPTH && c->d == d; k++)
            if (c->nbd.op[k].used)
                oldest = MIN(oldest, c->rq[k].sent);
    }
    model_horizon(d->model, oldest);
}

static void take_answer(struct client *c, struct nbd_op *op)
{
    struct shared *d = c->d;
    struct world *w = d->all->w;
    uint64_t ns = io_now(w->io) - op->began, told = ++w->tick;
    uint64_t sent = c->rq[op - c->nbd.op].sent;
    uint32_t write = c->rq[op - c->nbd.op].write;
    CHECK_SAY(d->stalls || ns <= LATENCY, "%s: command %d took %" PRIu64 " ms", d->node, op->cmd,
              ns / 1000000);
    if (++d->n_done % 16 == 0)
        forget_old(d);
    if (op->error)
        note_error(c, op, c->rq[op - c->nbd.op].fua);
    if (op->error && write)
        model_gone(d->model, write, told);
    if (!op->error)
        check_answer(c, op, write, sent, told);
    nbd_done(&c->nbd, op);
}

static co_fn void recv_one(struct client *c)
{
    struct nbd_op *op = nbd_recv(&c->nbd);
    if (op)
        take_answer(c, op);
    else
        CHECK(may_be_lost(c));
}

/* ------------------------------------------------------------------ a client's life */

/* "Terminating the transmission phase": after a goodbye all that is under way is still answered. */
static co_fn void leave_politely(struct client *c)
{
    nbd_goodbye(&c->nbd);
    while (c->nbd.n_used && !c->nbd.lost)
        recv_one(c);
}

/* The end of a write never comes: it is not begun. */
static co_fn void leave_within_a_write(struct client *c)
{
    struct chance *dice = &c->d->all->w->chance;
    uint64_t off, len;
    pick_range(c, &off, &len);
    uint8_t *junk = malloc(len);
    CHECK(junk);
    memset(junk, 0xEE, len);
    nbd_send_cut_off(&c->nbd, off, len, junk, chance_below(dice, len));
    free(junk);
}

static co_fn void leave(struct client *c)
{
    struct chance *dice = &c->d->all->w->chance;
    uint64_t how = chance_below(dice, 4);
    if (c->d->all->stop || how < 2)
        leave_politely(c);
    else if (how == 2)
        leave_within_a_write(c);
    disconnect(c);
}

static co_fn void client_turn(struct client *c)
{
    struct clients *all = c->d->all;
    struct chance *dice = &all->w->chance;
    if (c->nbd.n_used < c->depth && (!c->nbd.n_used || chance_one_in(dice, 2))) {
        if (!c->nbd.n_used && chance_one_in(dice, 3)) /* else our sleep would count as waiting */
            io_sleep(chance_below(dice, c->think_ns));
        if (!all->stop)
            send_one(c);
    }
    if (c->nbd.n_used && !c->nbd.lost && chance_one_in(dice, 2))
        recv_one(c);
    c->leaving = chance_one_in(dice, 150);
}

static void client_main(void *arg)
{
    struct client *c = arg;
    struct clients *all = c->d->all;
    while (!all->stop) {
        if (!connect_to(c)) {
            io_sleep(1 + chance_below(&all->w->chance, 5000000));
            continue;
        }
        while (!all->stop && !c->leaving && !c->nbd.lost)
            client_turn(c);
        CHECK(!c->nbd.lost || may_be_lost(c));
        if (c->nbd.lost)
            disconnect(c);
        else
            leave(c);
    }
    all->n_running--;
    tell(all);
}

void clients_start(struct clients *c)
{
    unsigned n = io_n_loops(c->w->io);
    c->stop = false;
    for (unsigned i = 0; i < c->n_clients; i++) {
        uint64_t l = chance_below(&c->w->chance, n);
        c->n_running++;
        CHECK(loop_spawn(io_loop(c->w->io, (unsigned)l), client_main, &c->client[i]) == 0);
    }
}

void clients_end(struct clients *c)
{
    c->stop = true;
    spin_lock(&c->lock);
    while (c->n_running)
        co_queue_wait(&c->changed, &c->lock);
    spin_unlock(&c->lock);
}

void clients_forget(struct clients *c)
{
    c->n_running = 0;
    c->lock = (struct spin)SPIN_INIT;
    c->changed = (struct co_queue){0};
    for (unsigned i = 0; i < c->n_clients; i++)
        c->client[i].nbd = (struct nbd_client){0};
    for (unsigned i = 0; i < c->n_disks; i++) {
        c->disk[i].n_connected = 0;
        c->disk[i].n_orphans = 0; /* they ended with the daemon */
        if (c->disk[i].sync_fault)
            model_sync_failed(c->disk[i].model);
        c->disk[i].sync_fault = false;
    }
}

void clients_free(struct clients *c)
{
    for (unsigned i = 0; i < c->n_disks; i++) {
        model_free(c->disk[i].model);
        free(c->disk[i].orphan);
    }
}

static void check_pad(struct shared *d, const uint8_t *buf, uint64_t off, uint64_t end)
{
    for (; off < end; off++)
        CHECK_SAY(buf[off] == PAD, "%s: byte %" PRIu64 " of '%s', outside the window, has changed",
                  d->node, off, d->file);
}

void shared_check_disk(struct shared *d, struct sim_world *world, bool killed)
{
    uint64_t end = d->base + d->size;
    uint8_t *buf = malloc(d->file_size);
    CHECK(buf);
    ssize_t n = sim_file_read(world, d->file, buf, d->file_size, 0);
    CHECK_SAY(n == (ssize_t)d->file_size, "'%s' is cut: %zd", d->file, n);
    MODEL_CHECK(d, model_survivor(d->model, 0, d->size, buf + d->base, killed));
    check_pad(d, buf, 0, d->base);
    check_pad(d, buf, end, d->file_size);
    free(buf);
}

void shared_flush(struct shared *d)
{
    struct world *w = d->all->w;
    struct nbd_client n;
    char name[24];
    snprintf(name, sizeof name, "%s-0", d->node);
    nbd_open(&n, name, true);
    uint64_t sent = ++w->tick;
    CHECK(nbd_call(&n, NBD_CMD_FLUSH, 0, 0, 0, NULL) == 0);
    model_flush(d->model, sent);
    nbd_close(&n);
}

uint8_t *shared_read_all(struct shared *d, uint64_t *sent, uint64_t *told)
{
    struct world *w = d->all->w;
    struct nbd_client n;
    char name[24];
    uint8_t *buf = malloc(d->size);
    CHECK(buf);
    snprintf(name, sizeof name, "%s-0", d->node);
    nbd_open(&n, name, chance_one_in(&w->chance, 2));
    *sent = ++w->tick;
    CHECK(nbd_call(&n, NBD_CMD_READ, 0, 0, d->size, buf) == 0);
    *told = ++w->tick;
    nbd_close(&n);
    return buf;
}
