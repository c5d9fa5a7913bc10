/* SPDX-License-Identifier: Apache-2.0 */
/* Guests beside backups that end badly.
 *
 *   starving   A target hangs until the memory for old data is used up and guest writes wait for
 *              some of it; then it fails. They go on at once, not when their patience ends.
 *   owing      A job is cancelled while its target hangs, and its source has a limit. Others who
 *              read there keep to the limit all the while, no more and no less, and owe little when
 *              the job is gone at last.
 *   forgetful  One allocation after another fails while a backup runs over data and holes to which
 *              guests write. A backup that ends well is the disk as it was. */
#include <errno.h>
#include <string.h>

#include "base/mem.h"
#include "block/node.h"
#include "block/root.h"
#include "job/job.h"
#include "local.h"
#include "qmp/instance.h"

#define UNIT UINT64_C(65536) /* what backups copy at a time */
#define N_GUESTS 16u

struct story {
    struct local a;
    struct root *root; /* of the guests */
    uint64_t next, n;  /* unit to write, and how many there are */
    uint64_t delay_ns; /* before the first */
    uint64_t n_done;
    bool stop;
    struct co_group gone;
};

/* ------------------------------------------------------------------ the kit */

static co_fn void must(struct story *s, const char *command, json_t *args)
{
    json_decref(local_get(&s->a, command, args));
}

/* Nothing of it is allocated. */
static co_fn void make_file(const char *path, uint64_t size)
{
    struct io_file *f;
    CHECK(io_open(path, O_RDWR | O_CREAT, 0600, &f) == 0);
    CHECK(io_truncate(f, size) == 0);
    io_close(f);
}

static co_fn void add_file(struct story *s, const char *name, const char *path)
{
    must(s, "blockdev-add",
         json_pack("{s:s,s:s,s:s}", "driver", "file", "node-name", name, "filename", path));
}

/* A target that is not blank, so that zeroes are written to it. */
static co_fn void add_target(struct story *s, uint64_t size)
{
    CHECK(sim_file_write(s->a.w->disk, "target", "x", 1, size - 1) == 0);
    add_file(s, "target", "target");
}

/* speed: bytes a second, 0: as fast as it can. */
static co_fn void start_job(struct story *s, const char *sync, int speed)
{
    local_forget_events(&s->a);
    must(s, "blockdev-backup",
         json_pack("{s:s,s:s,s:s,s:s,s:i}", "job-id", "j", "device", "source", "target", "target",
                   "sync", sync, "speed", speed));
}

static bool has_failed(const struct story *s)
{
    for (unsigned i = 0; i < s->a.n_events; i++) {
        if (!strcmp(s->a.event[i].name, "BLOCK_JOB_COMPLETED"))
            return s->a.event[i].error;
    }
    return true;
}

static co_fn void open_root(struct story *s, const char *node, unsigned perm)
{
    struct tide_error err;
    CHECK_SAY(root_new(graph_find(s->a.inst->graph, node), perm, "guest", &s->root, &err) == 0,
              "%s", err.msg);
}

static void start_guests(struct story *s, unsigned n, void (*guest)(void *))
{
    struct io *io = s->a.w->io;
    for (unsigned i = 0; i < n; i++) {
        co_group_add(&s->gone, 1);
        CHECK(loop_spawn(io_loop(io, i % io_n_loops(io)), guest, s) == 0);
    }
}

/* The first sector of every unit, once. */
static void writer(void *arg)
{
    struct story *s = arg;
    static uint8_t ones[SECTOR];
    memset(ones, 1, sizeof ones);
    struct iovec iov = {ones, sizeof ones};
    io_sleep(s->delay_ns);
    while (s->next < s->n) {
        uint64_t off = s->next++ * UNIT;
        root_enter(s->root);
        int r = node_pwritev(root_node(s->root), &iov, 1, off, SECTOR, 0);
        root_leave(s->root);
        CHECK(r == 0 || r == -ENOMEM);
    }
    co_group_done(&s->gone);
}

static void reader(void *arg)
{
    struct story *s = arg;
    uint8_t sector[SECTOR];
    struct iovec iov = {sector, sizeof sector};
    while (!s->stop) {
        root_enter(s->root);
        CHECK(node_preadv(root_node(s->root), &iov, 1, 0, SECTOR) == 0);
        root_leave(s->root);
        s->n_done++;
    }
    co_group_done(&s->gone);
}

static co_fn void end(struct story *s)
{
    root_free(s->root);
    local_reset(&s->a);
    local_close(&s->a);
}

/* ------------------------------------------------------------------ starving */

#define ROOM (UINT64_C(64) << 20) /* BACKUP_SPILL_MAX */
#define HANG (3 * SECOND)         /* less than BACKUP_SPILL_WAIT */

static co_fn void starving_live(struct world *w)
{
    struct story *s = w->state;
    local_open(&s->a, w, w->inst, "a");
    s->n = ROOM / UNIT + N_GUESTS;
    make_file("source", s->n * UNIT);
    add_file(s, "source", "source");
    add_target(s, s->n * UNIT);
    open_root(s, "source", ROOT_READ | ROOT_WRITE);
    sim_stall(w->disk, "target", SIM_ZERO, 1, HANG, false);
    sim_fail(w->disk, "target", SIM_ZERO, 2, EIO, false);
    start_job(s, "none", 0);
    uint64_t began = io_now(w->io);
    start_guests(s, 1 + (unsigned)chance_below(&w->chance, N_GUESTS - 1), writer);
    co_group_wait(&s->gone);
    uint64_t took = io_now(w->io) - began;
    CHECK_SAY(took >= HANG, "nobody waited: %" PRIu64 " ms", took / 1000000);
    CHECK_SAY(took < HANG + SECOND, "guests waited %" PRIu64 " ms", took / 1000000);
    local_wait_gone(&s->a, "j");
    CHECK(has_failed(s));
    end(s);
}

/* ------------------------------------------------------------------ owing */

#define RATE 100u
#define SIZE (64 * UNIT)
#define SLACK (3 * N_GUESTS) /* of a count: what is under way, a tenth of a second's burst */
#define OWED (8 * N_GUESTS)  /* each worker that ends has others let go */

/* How many requests of guests end in so many seconds: as many as may, but for `less`. */
static co_fn void check_rate(struct story *s, uint64_t seconds, uint64_t less, const char *when)
{
    uint64_t before = s->n_done, want = seconds * RATE;
    io_sleep(seconds * SECOND);
    uint64_t n = s->n_done - before;
    CHECK_SAY(n + SLACK + less >= want && n <= want + SLACK,
              "%s: %" PRIu64 " requests, not %" PRIu64, when, n, want);
}

static co_fn void owing_live(struct world *w)
{
    struct story *s = w->state;
    local_open(&s->a, w, w->inst, "a");
    make_file("source", SIZE);
    add_file(s, "file", "source");
    must(s, "object-add",
         json_pack("{s:s,s:s,s:{s:i}}", "qom-type", "throttle-group", "id", "tg", "limits",
                   "iops-total", (int)RATE));
    must(s, "blockdev-add",
         json_pack("{s:s,s:s,s:s,s:s}", "driver", "throttle", "node-name", "source",
                   "throttle-group", "tg", "file", "file"));
    add_target(s, SIZE);
    open_root(s, "source", ROOT_READ);
    start_guests(s, N_GUESTS, reader);
    sim_stall(w->disk, "target", SIM_ZERO, 1, 30 * SECOND, true);
    start_job(s, "full", 0);
    check_rate(s, 2, 0, "before the cancel");
    must(s, "job-cancel", json_pack("{s:s}", "id", "j"));
    check_rate(s, 20, 0, "while the job hangs");
    struct tide_error err;
    struct job *j;
    CHECK(job_find(w->inst->jobs, "j", false, &j, &err) == 0);
    local_wait_gone(&s->a, "j");
    check_rate(s, 10, OWED, "after its end");
    s->stop = true;
    co_group_wait(&s->gone);
    end(s);
}

/* ------------------------------------------------------------------ forgetful */

#define UNITS 24u

/* Random units of data, holes between them; what the file holds, in `image`. */
static co_fn void make_source(struct story *s, uint8_t *image)
{
    struct chance *dice = &s->a.w->chance;
    memset(image, 0, UNITS * UNIT);
    make_file("source", UNITS * UNIT);
    for (unsigned i = 0; i < UNITS; i++) {
        uint8_t *p = image + i * UNIT;
        if (chance_one_in(dice, 2))
            continue;
        memset(p, 2 + (int)i, UNIT);
        CHECK(sim_file_write(s->a.w->disk, "source", p, UNIT, i * UNIT) == 0);
    }
    make_file("target", UNITS * UNIT);
}

static co_fn void remove_file(struct story *s, const char *name)
{
    must(s, "blockdev-del", json_pack("{s:s}", "node-name", name));
    CHECK(sim_file_remove(s->a.w->disk, name) == 0);
}

/* The n-th allocation fails. Did it end well? */
static co_fn bool back_up_once(struct story *s, unsigned long n)
{
    static uint8_t image[UNITS * UNIT], copy[UNITS * UNIT];
    struct world *w = s->a.w;
    bool slow = chance_one_in(&w->chance, 2); /* guests are everywhere before it */
    make_source(s, image);
    add_file(s, "source", "source");
    add_file(s, "target", "target");
    open_root(s, "source", ROOT_READ | ROOT_WRITE);
    s->next = 0;
    s->n = UNITS;
    s->delay_ns = chance_below(&w->chance, SECOND / 50);
    start_job(s, "full", slow);
    start_guests(s, 2, writer);
    mem_fail_after(n);
    co_group_wait(&s->gone);
    mem_fail_after(0);
    free(local_command(&s->a, "block-job-set-speed", /* if it is still there */
                       json_pack("{s:s,s:i}", "device", "j", "speed", 0)));
    local_wait_gone(&s->a, "j");
    bool good = !has_failed(s);
    CHECK(sim_file_read(w->disk, "target", copy, sizeof copy, 0) == sizeof copy);
    for (unsigned i = 0; i < UNITS && good; i++)
        CHECK_SAY(!memcmp(image + i * UNIT, copy + i * UNIT, UNIT),
                  "allocation %lu: unit %u was not copied", n, i);
    root_free(s->root);
    s->root = NULL;
    remove_file(s, "source");
    remove_file(s, "target");
    return good;
}

static co_fn void forgetful_live(struct world *w)
{
    struct story *s = w->state;
    unsigned n_good = 0;
    local_open(&s->a, w, w->inst, "a");
    for (unsigned long n = 1; n <= 30; n++)
        n_good += back_up_once(s, n);
    CHECK(n_good > 0 && n_good < 30);
    end(s);
}

/* ------------------------------------------------------------------ late */

#define LOOK (SECOND / 5) /* how long each look takes when all are slow */

static co_fn uint64_t ns_to_end(struct story *s)
{
    uint64_t began = io_now(s->a.w->io);
    local_wait_gone(&s->a, "j");
    return io_now(s->a.w->io) - began;
}

/* Every look takes its time, but guests have written everywhere meanwhile: nothing is left of it
 * when the job is cancelled, or let go. */
static co_fn void end_early(struct story *s)
{
    struct world *w = s->a.w;
    bool cancel = chance_one_in(&w->chance, 2);
    sim_stall(w->disk, "source", SIM_EXTENT, 1, LOOK, true);
    s->next = 0;
    s->n = cancel ? 0 : UNITS;
    start_job(s, "full", 1);
    start_guests(s, 2, writer);
    co_group_wait(&s->gone);
    io_sleep(2 * LOOK);
    if (cancel)
        must(s, "job-cancel", json_pack("{s:s}", "id", "j"));
    else
        must(s, "block-job-set-speed", json_pack("{s:s,s:i}", "device", "j", "speed", 0));
    uint64_t took = ns_to_end(s);
    CHECK_SAY(took < 2 * LOOK, "%" PRIu64 " ms after the %s", took / 1000000,
              cancel ? "cancel" : "last unit");
}

static co_fn void late_live(struct world *w)
{
    struct story *s = w->state;
    static uint8_t image[UNITS * UNIT];
    local_open(&s->a, w, w->inst, "a");
    make_source(s, image);
    add_file(s, "source", "source");
    add_file(s, "target", "target");
    open_root(s, "source", ROOT_READ | ROOT_WRITE);
    sim_stall(w->disk, "source", SIM_EXTENT, 1, HANG, false);
    start_job(s, "full", 0);
    uint64_t took = ns_to_end(s);
    CHECK(!has_failed(s));
    CHECK_SAY(took >= HANG && took < HANG + SECOND, "%" PRIu64 " ms", took / 1000000);
    sim_clear_faults(w->disk);
    end_early(s);
    end(s);
}

/* ------------------------------------------------------------------ all of them */

static void prepare(struct world *w, struct sim_config *cfg)
{
    (void)w;
    (void)cfg;
}

static void finish(struct world *w)
{
    (void)w;
}

#define STORY(the_name, the_live, seeds)                                                           \
    {                                                                                              \
        .name = the_name, .state_size = sizeof(struct story), .n_seeds = seeds,                    \
        .prepare = prepare, .live = the_live, .finish = finish                                     \
    }

int main(void)
{
    static const struct scenario all[] = {
        STORY("starving", starving_live, 40),
        STORY("owing", owing_live, 40),
        STORY("forgetful", forgetful_live, 40),
        STORY("late", late_live, 100),
    };
    const struct scenario *const list[] = {&all[0], &all[1], &all[2], &all[3]};
    return scenario_main(list, 4);
}
