/* SPDX-License-Identifier: Apache-2.0 */
/* What clients of shared disks may observe. One to three disks (windows of files, direct and
 * buffered, with discards and without), each with up to six connections on several loops, write
 * over each other, read, flush, ask for block status, hang up and come back. Meanwhile the control
 * client makes and clears bitmaps, takes exports away and opens disks again; disks hang, give short
 * counts and fail; connections break.
 *
 * The model (model.h) knows at any tick what each unit of a disk may show, and what must survive if
 * the power goes now: that is asked many times in a life, of copies of the simulated disk. Some
 * lives end in a power cut or a kill; the next daemon serves what is left, and life goes on. */
#include "client.h"

#include <errno.h>
#include <string.h>

struct client_state {
    struct clients all;
};

static struct client_state *state_of(struct world *w)
{
    return w->state;
}

/* ------------------------------------------------------------------ setting up */

static void client_prepare(struct world *w, struct sim_config *cfg)
{
    struct client_state *t = state_of(w);
    struct chance *dice = &w->chance;
    t->all.w = w;
    cfg->direct_align = chance_one_in(dice, 2) ? 4096 : 512;
    cfg->short_in = chance_one_in(dice, 2) ? 3 : 0;
    t->all.resets = chance_one_in(dice, 4);
    unsigned n = 1 + (unsigned)chance_below(dice, SHARED_MAX);
    bool hang = chance_one_in(dice, 3);
    for (unsigned i = 0; i < n; i++) {
        struct shared *d = shared_add(&t->all);
        d->faulty = chance_one_in(dice, 4);
        d->stalls = hang && i == 0; /* the others keep the bound */
    }
}

static co_fn void set_up(struct client_state *t)
{
    struct world *w = t->all.w;
    world_start_nbd(w);
    qmp_do(&w->qmp, "object-add", "{\"qom-type\":\"iothread\",\"id\":\"io\"}");
    for (unsigned i = 0; i < t->all.n_disks; i++) {
        shared_open_node(&t->all.disk[i]);
        shared_export(&t->all.disk[i]);
    }
}

/* ------------------------------------------------------------------ what is asked in between */

/* If the power went now. */
static void check_cut_now(struct client_state *t)
{
    struct world *w = t->all.w;
    struct sim_world *copy = sim_world_clone(w->disk);
    sim_power_cut(copy, SIM_CUT_ANY, chance_next(&w->chance));
    for (unsigned i = 0; i < t->all.n_disks; i++)
        shared_check_disk(&t->all.disk[i], copy, false);
    sim_world_free(copy);
}

static co_fn void check_bitmap(struct shared *d)
{
    struct world *w = d->all->w;
    const struct recording *b = &d->cleared;
    uint64_t sent = w->tick + 1, grain = UINT64_C(1) << b->shift;
    size_t n = (d->size + grain - 1) / grain;
    uint8_t *bits = malloc(n);
    CHECK(bits);
    qmp_bits(&w->qmp, d->node, "b", b->shift, bits, n);
    for (size_t i = 0; i < n; i++) {
        uint64_t off = i * grain, len = MIN(grain, d->size - off);
        const char *e = bits[i] ? model_dirty(d->model, off, len, b->q)
                                : model_clean(d->model, off, len, b->r, sent);
        CHECK_SAY(!e, "%s: %s", d->node, e);
    }
    free(bits);
}

/* A list that begins a recording anew: whatever is under way waits for it or is waited for. */
static co_fn void start_recording(struct shared *d)
{
    struct qmp *q = &d->all->w->qmp;
    struct chance *dice = &d->all->w->chance;
    struct recording *b = &d->cleared, old = *b;
    json_t *v;
    if (b->on && chance_one_in(dice, 2)) {
        v = qmp_call(q, "block-dirty-bitmap-clear", "{\"node\":\"%s\",\"name\":\"b\"}", d->node);
    } else {
        b->shift = 9 + (unsigned)chance_below(dice, 6);
        v = qmp_call(q, "transaction",
                     "{\"actions\":[%s%s%s{\"type\":\"block-dirty-bitmap-add\",\"data\":"
                     "{\"node\":\"%s\",\"name\":\"b\",\"granularity\":%u}}]}",
                     b->on ? "{\"type\":\"block-dirty-bitmap-remove\",\"data\":{\"node\":\"" : "",
                     b->on ? d->node : "", b->on ? "\",\"name\":\"b\"}}," : "", d->node,
                     1u << b->shift);
    }
    bool late = qmp_error(v) && strstr(qmp_error(v), "did not come to rest");
    CHECK_SAY(!qmp_error(v) || (late && d->stalls), "%s", qmp_error(v));
    json_decref(v);
    if (late) {
        *b = old;
        return;
    }
    b->on = true;
    b->q = q->asked;
    b->r = q->told;
}

/* ------------------------------------------------------------------ faults */

static void arm_fault(struct shared *d)
{
    static const enum sim_kind kinds[] = {SIM_READ, SIM_WRITE, SIM_WRITE, SIM_ZERO, SIM_FSYNC};
    struct world *w = d->all->w;
    struct chance *dice = &w->chance;
    enum sim_kind kind = kinds[chance_below(dice, 5)];
    bool full = kind != SIM_READ && kind != SIM_FSYNC && chance_one_in(dice, 2);
    if (kind == SIM_FSYNC) {
        d->sync_fault = true;
        model_may_lose(d->model);
    }
    sim_fail(w->disk, d->file, kind, 1 + (unsigned)chance_below(dice, 4), full ? ENOSPC : EIO,
             kind != SIM_FSYNC && chance_one_in(dice, 4));
}

static void arm_stall(struct shared *d)
{
    static const enum sim_kind kinds[] = {SIM_READ, SIM_WRITE, SIM_FSYNC, SIM_ZERO, SIM_EXTENT};
    struct world *w = d->all->w;
    struct chance *dice = &w->chance;
    sim_stall(w->disk, d->file, kinds[chance_below(dice, 5)], 1 + (unsigned)chance_below(dice, 4),
              SECOND * (1 + chance_below(dice, 3)), chance_one_in(dice, 6));
}

/* Nothing is under way. A widened write may pass the end; only a cut can come before the file is
 * cut back. */
static void check_size(struct shared *d)
{
    struct world *w = d->all->w;
    CHECK(sim_file_size(w->disk, d->file) == (int64_t)d->file_size || (w->cut && d->direct));
}

/* After a sync that failed the daemon refuses to flush until the file is opened again. */
static co_fn void reopen(struct shared *d)
{
    struct world *w = d->all->w;
    sim_clear_faults(w->disk);
    shared_unexport(d);
    check_size(d);
    if (d->sync_fault || chance_one_in(&w->chance, 3)) {
        shared_close_node(d);
        shared_open_node(d);
        if (d->sync_fault) /* whoever heard of it may have hung up before */
            model_sync_failed(d->model);
        model_no_more_loss(d->model);
        d->sync_fault = false;
    }
    shared_export(d);
}

/* ------------------------------------------------------------------ the story */

static co_fn void one_step(struct client_state *t)
{
    struct world *w = t->all.w;
    struct chance *dice = &w->chance;
    struct shared *d = &t->all.disk[chance_below(dice, t->all.n_disks)];
    switch (chance_below(dice, 10)) {
    case 0:
    case 1:
        start_recording(d);
        break;
    case 2:
    case 3:
        if (d->cleared.on)
            check_bitmap(d);
        break;
    case 4:
        reopen(d);
        break;
    case 5:
        if (d->faulty)
            arm_fault(d);
        break;
    case 6:
        if (d->stalls)
            arm_stall(d);
        break;
    case 7:
        if (t->all.resets)
            sim_fail(w->disk, "unix:" NBD_ADDR, chance_one_in(dice, 2) ? SIM_RECV : SIM_SEND,
                     1 + (unsigned)chance_below(dice, 20), ECONNRESET, false);
        break;
    default:
        break;
    }
    check_cut_now(t);
}

/* Nothing is under way: reader, file and model agree; and after a flush nothing can be lost. */
static co_fn void check_at_rest(struct client_state *t)
{
    for (unsigned i = 0; i < t->all.n_disks; i++) {
        struct shared *d = &t->all.disk[i];
        uint64_t sent, told;
        uint8_t *seen = shared_read_all(d, &sent, &told);
        const char *e = model_read(d->model, 0, d->size, seen, sent, told);
        CHECK_SAY(!e, "%s at rest: %s", d->node, e);
        free(seen);
        if (d->cleared.on)
            check_bitmap(d);
        shared_flush(d);
        check_size(d);
    }
    check_cut_now(t);
}

static co_fn void live_on(struct client_state *t, unsigned n_steps)
{
    struct world *w = t->all.w;
    clients_start(&t->all);
    for (unsigned i = 0; i < n_steps; i++) {
        io_sleep(1 + chance_below(&w->chance, SECOND / 100));
        one_step(t);
    }
    sim_clear_faults(w->disk);
    clients_end(&t->all);
    for (unsigned i = 0; i < t->all.n_disks; i++)
        if (t->all.disk[i].sync_fault)
            reopen(&t->all.disk[i]);
    check_at_rest(t);
}

static co_fn void client_live(struct world *w)
{
    set_up(state_of(w));
    live_on(state_of(w), 6 + (unsigned)chance_below(&w->chance, 20));
}

static co_fn void client_after_cut(struct world *w)
{
    struct client_state *t = state_of(w);
    bool killed = w->how == SIM_CUT_PROCESS;
    clients_forget(&t->all);
    set_up(t);
    for (unsigned i = 0; i < t->all.n_disks; i++) {
        struct shared *d = &t->all.disk[i];
        uint64_t sent, told;
        shared_check_disk(d, w->disk, killed);
        uint8_t *seen = shared_read_all(d, &sent, &told);
        const char *e = model_survivor(d->model, 0, d->size, seen, killed);
        CHECK_SAY(!e, "%s after the cut: %s", d->node, e);
        model_restart(d->model, seen, ++w->tick, killed);
        free(seen);
    }
    check_cut_now(t);
    live_on(t, (unsigned)chance_below(&w->chance, 10));
}

static void client_finish(struct world *w)
{
    clients_free(&state_of(w)->all);
}

static const struct scenario shared_disks = {
    .name = "shared disks",
    .state_size = sizeof(struct client_state),
    .n_seeds = 600,
    .cut_one_in = 2,
    .cut_steps = 12000,
    .prepare = client_prepare,
    .live = client_live,
    .after_cut = client_after_cut,
    .finish = client_finish,
};

/* ------------------------------------------------------------------ the odd end of a file */

/* Direct writes to the last block of a file that ends within it, some of which fail half-way: the
 * file keeps its length, and what lies behind the write its bytes. */
static void odd_prepare(struct world *w, struct sim_config *cfg)
{
    uint64_t *size = w->state;
    *size = SECTOR + 1 + chance_below(&w->chance, 12000);
    cfg->direct_align = 4096;
    for (uint64_t i = 0; i < *size; i++)
        CHECK(sim_file_write(w->disk, "odd", "o", 1, i) == 0);
}

static co_fn void odd_live(struct world *w)
{
    const uint64_t size = *(uint64_t *)w->state, end = round_down(size, SECTOR);
    struct nbd_client n;
    uint8_t buf[SECTOR], tail[SECTOR];
    world_start_nbd(w);
    world_add_file(w, "odd", "odd", ",\"cache\":{\"direct\":true}");
    qmp_do(&w->qmp, "block-export-add",
           "{\"type\":\"nbd\",\"id\":\"odd\",\"node-name\":\"odd\",\"writable\":true}");
    nbd_open(&n, "odd", chance_one_in(&w->chance, 2));
    CHECK(n.size == size);
    for (unsigned i = 0; i < 8; i++) {
        uint64_t off = end - 1 - chance_below(&w->chance, SECTOR);
        bool fails = chance_one_in(&w->chance, 2);
        if (fails)
            sim_fail(w->disk, "odd", SIM_WRITE, 1, chance_one_in(&w->chance, 2) ? EIO : ENOSPC,
                     false);
        memset(buf, 'a' + (int)i, sizeof buf);
        CHECK(!nbd_call(&n, NBD_CMD_WRITE, 0, off, end - off, buf) == !fails);
        CHECK(sim_file_size(w->disk, "odd") == (int64_t)size);
        CHECK(sim_file_read(w->disk, "odd", tail, size - end, end) == (ssize_t)(size - end));
        for (uint64_t k = 0; k < size - end; k++)
            CHECK(tail[k] == 'o');
    }
    nbd_close(&n);
}

static void odd_finish(struct world *w)
{
}

static const struct scenario odd_end = {
    .name = "odd ends",
    .state_size = sizeof(uint64_t),
    .n_seeds = 200,
    .prepare = odd_prepare,
    .live = odd_live,
    .finish = odd_finish,
};

int main(void)
{
    const struct scenario *all[] = {&shared_disks, &odd_end};
    return scenario_main(all, 2);
}
