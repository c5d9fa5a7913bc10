/* SPDX-License-Identifier: Apache-2.0 */
/* Law L5 by seed. Writers on every disk and loop; each granule is written once. Lists hand the
 * recording of all disks from the bitmap of one epoch to that of the next, in ways that keep every
 * write; others do everything to the recording bitmaps and fail, at `abort` or at the record; jobs
 * begin and end. Afterwards each write is in the bitmap of exactly one epoch, one that was
 * recording between the write's beginning and its end; and what began after another write was
 * answered is not in an earlier epoch, whatever the disks: a list is one point in time for all of
 * them. Nor is any write inside from a list's first action to its last: those that were let in
 * before have been waited for. */
#include <errno.h>
#include <string.h>

#include "block/node.h"
#include "block/root.h"
#include "block/tracker.h"
#include "local.h"
#include "qmp/instance.h"

#define N_DISKS 3u
#define N_WRITERS 8u
#define GRANULE 512u
#define MAX_WRITES 4096u

struct write {
    unsigned disk;
    uint64_t granule;
    unsigned first, last;  /* epochs that may have it; last 0 with `open`: not answered yet */
    uint64_t begun, ended; /* ticks */
    bool answered;
    unsigned epoch; /* in whose bitmap it was found, + 1; 0: in none yet */
};

struct iso {
    struct local a;
    struct write write[MAX_WRITES];
    unsigned n_writes;
    uint64_t next[N_DISKS]; /* granule */
    unsigned sent, done;    /* the newest epoch that may, that must have begun */
    unsigned epoch;
    bool stop;
    struct co_group gone;
    unsigned n_lists, n_failed;
    unsigned n_waited; /* lists that began while a write was inside */
};

static const char *const disks[N_DISKS] = {"d", "e", "f"};

/* ------------------------------------------------------------------ writers */

static bool disk_is_full(const struct iso *s, unsigned disk)
{
    return s->next[disk] >= (disk == 2 ? REF_SMALL : REF_BIG) / GRANULE ||
           s->n_writes == MAX_WRITES;
}

static void writer_main(void *arg)
{
    struct iso *s = arg;
    struct world *w = s->a.w;
    while (!s->stop) {
        unsigned disk = (unsigned)chance_below(&w->chance, N_DISKS);
        if (chance_one_in(&w->chance, 4))
            io_sleep(chance_below(&w->chance, 300000));
        else
            loop_pause();
        if (disk_is_full(s, disk)) {
            io_sleep(100000);
            continue;
        }
        struct write *x = &s->write[s->n_writes++];
        *x = (struct write){
            .disk = disk, .granule = s->next[disk]++, .first = s->done, .begun = ++w->tick};
        local_write(&s->a, disks[disk], x->granule * GRANULE, GRANULE);
        x->last = s->sent;
        x->ended = ++w->tick;
        x->answered = true;
    }
    co_group_done(&s->gone);
}

/* ------------------------------------------------------------------ lists */

/* All lists here name all disks. */
static void check_stillness(void *iso, enum txn_step step, unsigned done)
{
    struct iso *s = iso;
    for (unsigned i = 0; i < N_DISKS; i++)
        CHECK_SAY(!s->a.n_inside[i], "%u writes of %s are inside at step %d, %u actions done",
                  s->a.n_inside[i], disks[i], step, done);
}

static co_fn struct local_outcome run_still(struct iso *s, json_t *list)
{
    struct local_props props = {.probe = check_stillness, .probe_arg = s};
    s->n_waited += s->a.n_inside[0] + s->a.n_inside[1] + s->a.n_inside[2] > 0;
    return local_run(&s->a, list, &props);
}

static void add(json_t *list, const char *kind, const char *node, const char *name, const char *key,
                json_t *value)
{
    char type[40];
    snprintf(type, sizeof type, "block-dirty-bitmap-%s", kind);
    json_t *data = json_pack("{s:s,s:s}", "node", node, "name", name);
    if (key)
        json_object_set_new(data, key, value);
    json_array_append_new(list, json_pack("{s:s,s:o}", "type", type, "data", data));
}

static void add_new(json_t *list, const char *node, const char *name)
{
    add(list, "add", node, name, "granularity", json_integer(GRANULE));
}

/* One disk's part of the change of epochs. */
static void add_change(json_t *list, const char *node, const char *old, const char *new,
                       uint64_t way)
{
    if (way == 0) {
        add(list, "disable", node, old, NULL, NULL);
        add_new(list, node, new);
    } else if (way == 1) {
        add_new(list, node, new);
        add(list, "disable", node, old, NULL, NULL);
    } else { /* the contents go, the recording stays */
        add(list, "copy", node, "copy", "bitmaps", json_pack("[s]", old));
        add(list, "disable", node, "copy", NULL, NULL);
        add(list, "clear", node, old, NULL, NULL);
        add(list, "rename", node, old, "new-name", json_string(new));
        add(list, "rename", node, "copy", "new-name", json_string(old));
    }
}

static co_fn void change(struct iso *s)
{
    json_t *list = json_array();
    char old[12], new[12];
    snprintf(old, sizeof old, "b%u", s->epoch);
    snprintf(new, sizeof new, "b%u", s->epoch + 1);
    for (unsigned i = 0; i < N_DISKS; i++)
        add_change(list, disks[i], old, new, chance_below(&s->a.w->chance, 3));
    s->sent = s->epoch + 1;
    struct local_outcome o = run_still(s, list);
    CHECK_SAY(o.code == 0, "%s", o.text);
    s->done = ++s->epoch;
    s->n_lists++;
    json_decref(list);
}

/* A change of epochs, and more, that does not happen. */
static co_fn void fail(struct iso *s)
{
    json_t *list = json_array();
    char now[12];
    bool by_record = chance_one_in(&s->a.w->chance, 2);
    snprintf(now, sizeof now, "b%u", s->epoch);
    for (unsigned i = 0; i < N_DISKS; i++) {
        const char *n = disks[i];
        uint64_t way = chance_below(&s->a.w->chance, 3);
        if (chance_one_in(&s->a.w->chance, 2))
            add(list, "clear", n, now, NULL, NULL);
        add_change(list, n, now, "next", way);
        add(list, "clear", n, "next", NULL, NULL);
        add(list, "remove", n, now, NULL, NULL);
        add(list, "rename", n, "next", "new-name", json_string(now));
        if (chance_one_in(&s->a.w->chance, 2))
            json_array_append_new(list, json_pack("{s:s,s:{s:s,s:s,s:s,s:s,s:s}}", "type",
                                                  "blockdev-backup", "data", "job-id", disks[i],
                                                  "device", n, "target",
                                                  i == 0   ? "td"
                                                  : i == 1 ? "te"
                                                           : "tf",
                                                  "sync", "incremental", "bitmap", now));
    }
    if (!by_record)
        json_array_append_new(list, json_pack("{s:s,s:{}}", "type", "abort", "data"));
    s->a.store.fail = by_record;
    struct local_outcome o = run_still(s, list);
    s->a.store.fail = false;
    CHECK_SAY(o.failed == (int)json_array_size(list) - 1, "%d: %s", o.failed, o.text);
    s->n_failed++;
    json_decref(list);
}

/* A job that takes the recording bitmap, and gives it back without having moved it. */
static co_fn void job(struct iso *s)
{
    unsigned i = (unsigned)chance_below(&s->a.w->chance, N_DISKS);
    static const char *const targets[] = {"td", "te", "tf"};
    char now[12];
    snprintf(now, sizeof now, "b%u", s->epoch);
    CHECK(!local_command(
        &s->a, "blockdev-backup",
        json_pack("{s:s,s:s,s:s,s:s,s:s,s:s,s:b}", "job-id", "j", "device", disks[i], "target",
                  targets[i], "sync", "bitmap", "bitmap", now, "bitmap-mode",
                  chance_one_in(&s->a.w->chance, 2) ? "never" : "on-success", "auto-finalize", 0)));
    io_sleep(chance_below(&s->a.w->chance, 500000));
    CHECK(!local_command(&s->a, "job-cancel", json_pack("{s:s}", "id", "j")));
    local_wait_gone(&s->a, "j");
    local_forget_events(&s->a);
}

/* ------------------------------------------------------------------ whose bitmap has it */

static struct write *write_at(struct iso *s, unsigned disk, uint64_t granule)
{
    for (unsigned i = 0; i < s->n_writes; i++)
        if (s->write[i].disk == disk && s->write[i].granule == granule)
            return &s->write[i];
    return NULL;
}

static void harvest_disk(struct iso *s, unsigned disk, unsigned epoch)
{
    struct node *n = graph_find(s->a.inst->graph, disks[disk]);
    struct dirty_bitmap *b;
    struct tide_error err = {0};
    char name[12];
    uint64_t off = 0, len;
    snprintf(name, sizeof name, "b%u", epoch);
    CHECK_SAY(dirty_bitmap_find(n, name, 0, &b, &err) == 0, "%s", err.msg);
    for (; bitmap_next_dirty(b->bits, off, UINT64_MAX, &off, &len); off += len) {
        for (uint64_t o = off; o < off + len; o += GRANULE) {
            struct write *x = write_at(s, disk, o / GRANULE);
            CHECK_SAY(x, "%s has a bit that nobody wrote", name);
            CHECK_SAY(!x->epoch, "a write is in epochs %u and %u", x->epoch - 1, epoch);
            x->epoch = epoch + 1;
        }
    }
}

static co_fn void harvest(struct iso *s, unsigned epoch)
{
    char name[12];
    snprintf(name, sizeof name, "b%u", epoch);
    for (unsigned i = 0; i < N_DISKS; i++) {
        harvest_disk(s, i, epoch);
        CHECK(!local_command(&s->a, "block-dirty-bitmap-remove",
                             json_pack("{s:s,s:s}", "node", disks[i], "name", name)));
    }
}

static void check_writes(struct iso *s)
{
    for (unsigned i = 0; i < s->n_writes; i++) {
        const struct write *x = &s->write[i];
        CHECK(x->answered);
        CHECK_SAY(x->epoch, "a write of epochs %u to %u is in no bitmap", x->first, x->last);
        CHECK_SAY(x->first < x->epoch && x->epoch <= x->last + 1,
                  "a write of epochs %u to %u is in that of %u", x->first, x->last, x->epoch - 1);
        for (unsigned k = 0; k < s->n_writes; k++)
            CHECK_SAY(s->write[k].begun < x->ended || s->write[k].epoch >= x->epoch,
                      "a write after another one is in an epoch before it");
    }
}

/* ------------------------------------------------------------------ the scenario */

static void iso_prepare(struct world *w, struct sim_config *cfg)
{
    (void)w;
    cfg->latency_ns = 50000;
}

static co_fn void iso_live(struct world *w)
{
    struct iso *s = w->state;
    local_open(&s->a, w, w->inst, "a");
    for (unsigned i = 0; i < N_DISKS; i++)
        CHECK(!local_command(&s->a, "block-dirty-bitmap-add",
                             json_pack("{s:s,s:s,s:i}", "node", disks[i], "name", "b0",
                                       "granularity", (int)GRANULE)));
    for (unsigned i = 0; i < N_WRITERS; i++) {
        co_group_add(&s->gone, 1);
        CHECK(loop_spawn(io_loop(w->io, i % io_n_loops(w->io)), writer_main, s) == 0);
    }
    for (unsigned round = 0; round < 40; round++) {
        s->a.store.yields = (unsigned)chance_below(&w->chance, 4);
        if (chance_one_in(&w->chance, 3))
            io_sleep(chance_below(&w->chance, 300000));
        uint64_t k = chance_below(&w->chance, 5);
        if (k < 2) {
            change(s);
            harvest(s, s->epoch - 1);
        } else if (k < 4) {
            fail(s);
        } else {
            job(s);
        }
    }
    s->stop = true;
    co_group_wait(&s->gone);
    harvest(s, s->epoch);
    check_writes(s);
    CHECK(s->n_waited);
    local_reset(&s->a);
    local_close(&s->a);
}

static void iso_finish(struct world *w)
{
    (void)w;
}

/* ------------------------------------------------------------------ turns of others */

/* Lists that go through thousands of pages let others of the control loop in: between any two of
 * them in the worst case, which is what this looks at; the daemon looks at the clock. */
#define BIG (UINT64_C(16) << 40)
#define PAGES (BIG >> 31) /* at 64 KiB */
#define SMALL (BIG / 16)
#define FEW_TURNS 24u

struct turns {
    struct local a;
    unsigned n; /* of somebody else */
    bool stop;
    struct co_group gone;
    /* A guest of the disk that is held. */
    struct root *disk;
    struct io_event came, went_on;
    unsigned n_held, n_went_on; /* what n was */
};

static void others_main(void *arg)
{
    struct turns *s = arg;
    for (; !s->stop; s->n++)
        loop_pause();
    co_group_done(&s->gone);
}

static co_fn void add_big(struct turns *s, const char *node, uint64_t size)
{
    CHECK(!local_command(&s->a, "blockdev-add",
                         json_pack("{s:s,s:s,s:I,s:b}", "driver", "null-co", "node-name", node,
                                   "size", (json_int_t)size, "read-zeroes", 1)));
}

/* One block of every page at 64 KiB is dirty. */
static co_fn void add_dense(struct turns *s, const char *name, unsigned granularity, uint64_t first)
{
    struct bitmap_retired none = {0};
    struct dirty_bitmap *b;
    struct tide_error err;
    CHECK(!local_command(
        &s->a, "block-dirty-bitmap-add",
        json_pack("{s:s,s:s,s:i}", "node", "big", "name", name, "granularity", (int)granularity)));
    CHECK(dirty_bitmap_find(graph_find(s->a.inst->graph, "big"), name, 0, &b, &err) == 0);
    for (uint64_t off = first; off < BIG; off += BIG / PAGES)
        bitmap_mark(b->bits, off, 1, &none);
    bitmap_retired_free(&none);
}

/* How many turns others have while the list happens, or is undone. */
static co_fn unsigned turns_of(struct turns *s, const char *list)
{
    json_t *actions = json_loads(list, 0, NULL);
    CHECK(actions);
    bool aborts = strstr(list, "abort");
    unsigned before = s->n;
    struct local_outcome o = local_run(&s->a, actions, &(struct local_props){0});
    CHECK_SAY((o.code < 0) == aborts, "%s", o.text);
    json_decref(actions);
    return s->n - before;
}

#define MERGE(from)                                                                                \
    "{\"type\":\"block-dirty-bitmap-merge\","                                                      \
    "\"data\":{\"node\":\"big\",\"target\":\"a\",\"bitmaps\":[\"" from "\"]}}"
#define ABORT ",{\"type\":\"abort\",\"data\":{}}"

static const struct long_list {
    const char *list;
    uint64_t least; /* turns: a page that is made is one, 32 that are looked at are one */
} long_lists[] = {
    {"[" MERGE("b") "]", PAGES},
    {"[" MERGE("c") ABORT "]", PAGES + PAGES / 32},
    {"[" MERGE("coarse") ABORT "]", PAGES + PAGES / 32},
    {"[" MERGE("fine") ABORT "]", 2 * PAGES + PAGES / 32},
    {"[{\"type\":\"block-dirty-bitmap-copy\",\"data\":{\"node\":\"big\",\"name\":\"copy\","
     "\"bitmaps\":[\"a\",\"fine\"]}}]",
     2 * PAGES},
    {"[{\"type\":\"blockdev-backup\",\"data\":{\"job-id\":\"j\",\"device\":\"big\",\"target\":"
     "\"bigt\",\"sync\":\"incremental\",\"bitmap\":\"a\"}}" ABORT "]",
     3 * PAGES / 32},
};

/* ------------------------------------------------------------------ no turn for what costs none */

/* It comes when the disk is held. */
static void waiting_guest_main(void *arg)
{
    struct turns *s = arg;
    for (;;) {
        io_event_wait(&s->came, IO_FOREVER);
        if (s->stop)
            break;
        root_enter(s->disk);
        s->n_went_on = s->n;
        root_leave(s->disk);
        io_event_set(&s->went_on);
    }
    co_group_done(&s->gone);
}

static void when_held(void *turns, enum txn_step step, unsigned done)
{
    struct turns *s = turns;
    (void)done;
    if (step != TXN_HELD)
        return;
    s->n_held = s->n;
    io_event_set(&s->came);
}

static struct dirty_bitmap *random_bitmap(struct turns *s, const char *node, uint64_t size)
{
    struct bitmap_retired none = {0};
    struct dirty_bitmap *b;
    struct tide_error err;
    CHECK(!local_command(
        &s->a, "block-dirty-bitmap-add",
        json_pack("{s:s,s:s,s:i}", "node", node, "name", "r", "granularity", 65536)));
    CHECK(dirty_bitmap_find(graph_find(s->a.inst->graph, node), "r", 0, &b, &err) == 0);
    for (uint64_t n = (size >> 31) * 8; n; n--)
        bitmap_mark(b->bits, chance_below(&s->a.w->chance, size), 1, &none);
    bitmap_retired_free(&none);
    return b;
}

/* Turns of others from when the guest is held until it goes on; allocations of the whole list. */
static co_fn unsigned turns_held(struct turns *s, const char *node, bool aborts,
                                 unsigned long *n_allocs)
{
    struct local_props props = {.probe = when_held, .probe_arg = s, .n_allocs = n_allocs};
    json_t *list = json_array();
    add(list, "clear", node, "r", NULL, NULL);
    if (aborts)
        json_array_append_new(list, json_pack("{s:s,s:{}}", "type", "abort", "data"));
    struct local_outcome o = local_run(&s->a, list, &props);
    CHECK_SAY((o.code < 0) == aborts, "%s", o.text);
    io_event_wait(&s->went_on, IO_FOREVER);
    json_decref(list);
    return s->n_went_on - s->n_held;
}

/* A clear, and taking it back, costs the same whatever the size. */
static co_fn void check_clear(struct turns *s, const char *node, uint64_t size,
                              unsigned long allocs[2])
{
    struct dirty_bitmap *b = random_bitmap(s, node, size);
    struct tide_error err;
    uint64_t n = bitmap_count(b->bits);
    CHECK(root_new(graph_find(s->a.inst->graph, node), ROOT_READ | ROOT_WRITE, "guest", &s->disk,
                   &err) == 0);
    for (int clears = 0; clears < 2; clears++) {
        unsigned turns = turns_held(s, node, !clears, &allocs[clears]);
        CHECK_SAY(turns < FEW_TURNS, "%u turns of others in a clear on %s%s", turns, node,
                  clears ? "" : " that is undone");
        CHECK(bitmap_count(b->bits) == (clears ? 0 : n));
    }
    root_free(s->disk);
}

static co_fn void check_clears(struct turns *s)
{
    unsigned long big[2], small[2];
    co_group_add(&s->gone, 1);
    CHECK(loop_spawn(io_loop(s->a.w->io, 0), waiting_guest_main, s) == 0);
    check_clear(s, "big", BIG, big);
    check_clear(s, "small", SMALL, small);
    CHECK_SAY(big[0] == small[0] && big[1] == small[1],
              "undone and done: %lu and %lu allocations on big, %lu and %lu on small", big[0],
              big[1], small[0], small[1]);
}

static co_fn void turns_live(struct world *w)
{
    struct turns *s = w->state;
    sim_short_turns(w->io);
    local_open(&s->a, w, w->inst, "a");
    add_big(s, "big", BIG);
    add_big(s, "small", SMALL);
    add_big(s, "bigt", BIG);
    add_dense(s, "a", 65536, 0);
    add_dense(s, "b", 65536, 65536);
    add_dense(s, "c", 65536, 2 * 65536);
    add_dense(s, "coarse", 131072, 4 * 65536);
    add_dense(s, "fine", 32768, 5 * 65536);
    co_group_add(&s->gone, 1);
    CHECK(loop_spawn(io_loop(w->io, 0), others_main, s) == 0);
    for (unsigned i = 0; i < sizeof long_lists / sizeof *long_lists; i++) {
        unsigned n = turns_of(s, long_lists[i].list);
        CHECK_SAY(n >= long_lists[i].least, "%u turns of others in %s", n, long_lists[i].list);
    }
    check_clears(s);
    s->stop = true;
    io_event_set(&s->came);
    co_group_wait(&s->gone);
    local_reset(&s->a);
    local_close(&s->a);
}

static const struct scenario turns = {
    .name = "turns",
    .state_size = sizeof(struct turns),
    .n_seeds = 4,
    .weight = 100,
    .prepare = iso_prepare,
    .live = turns_live,
    .finish = iso_finish,
};

static const struct scenario isolation = {
    .name = "isolation",
    .state_size = sizeof(struct iso),
    .n_seeds = 400,
    .prepare = iso_prepare,
    .live = iso_live,
    .finish = iso_finish,
};

int main(void)
{
    const struct scenario *all[] = {&isolation, &turns};
    return scenario_main(all, 2);
}
