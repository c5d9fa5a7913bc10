/* SPDX-License-Identifier: Apache-2.0 */
/* Tests of whole runs in the simulator: equal seeds, power cuts, and a model of readers and writers
 * that is checked at any time and after any cut. SIM_SEEDS sets how many seeds the model runs under
 * (1000), SIM_SEED=n runs only that one. A failure prints its seed. */
#include "co/sync.h"
#include "io/sim_test.h"
#include <sys/mman.h>

/* ------------------------------------------------------------------ the same seed, the same run */

struct crowd {
    struct co_group group;
    struct co_mutex mutex;
    struct io_addr addr;
    unsigned next;
};

static void one_of_many(void *arg)
{
    struct crowd *c = arg;
    char path[32], buf[3000];
    uint64_t id;
    struct io_sock *s;
    io_random(self(), &id, sizeof id);
    co_mutex_lock(&c->mutex);
    snprintf(path, sizeof path, "f%u", c->next++ % 3);
    io_sleep(id % 50000);
    co_mutex_unlock(&c->mutex);
    memset(buf, (int)id, sizeof buf);
    struct io_file *f = must_open(path, O_RDWR | O_CREAT);
    for (unsigned i = 0; i < 10; i++) {
        write_at(f, buf, 1 + (id >> i) % sizeof buf, (id >> (2 * i)) % 10000, i % 4 == 3);
        read_at(f, buf, sizeof buf, i * 1000);
        if (i % 3 == 0)
            io_fsync(f);
    }
    if (io_connect(&c->addr, &s) == 0) {
        send_all(s, buf, 2000);
        io_sock_close(s);
    }
    io_rename(path, "r", id % 2 ? IO_EXCHANGE : IO_NOREPLACE);
    io_close(f);
    co_group_done(&c->group);
}

static void crowd(void *arg)
{
    struct crowd c = {.group = CO_GROUP_INIT, .mutex = CO_MUTEX_INIT, .addr = unix_addr("/c")};
    struct io *io = self();
    struct io_sock *listener, *s;
    struct tide_error err;
    char buf[2000];
    CHECK(io_listen(&c.addr, 20, &listener, &err) == 0);
    for (unsigned i = 0; i < 12; i++) {
        co_group_add(&c.group, 1);
        CHECK(loop_spawn(io_loop(io, i % io_n_loops(io)), one_of_many, &c) == 0);
    }
    for (unsigned i = 0; i < 5; i++)
        if (io_accept(listener, &s) == 0) {
            io_recv_all(s, buf, sizeof buf);
            io_sock_close(s);
        }
    co_group_wait(&c.group);
    io_sock_close(listener);
    io_stop(io);
}

static void equal_seeds_make_equal_runs(void **state)
{
    uint64_t hash[20], again;
    for (uint64_t seed = 0; seed < 20; seed++) {
        struct sim_config cfg = {
            .seed = seed, .n_loops = 1 + seed % 3, .write_error_in = 20, .stall_in = 50};
        assert_int_equal(live(cfg, crowd, NULL, &hash[seed]), 0);
        /* Other addresses: take what the first run has given back. */
        size_t len = (1 + seed) * 64 * KIB;
        void *heap = malloc(1 + seed * 1000);
        void *stacks = mmap(NULL, len, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        assert_int_equal(live(cfg, crowd, NULL, &again), 0);
        munmap(stacks, len);
        free(heap);
        assert_true(hash[seed] == again);
        for (uint64_t i = 0; i < seed; i++)
            assert_true(hash[i] != hash[seed]);
    }
}

/* ------------------------------------------------------------------ power cuts */

/* A file replaced by the book: new content, sync, rename, sync of the directory. After a cut at
 * any step it is one of the two, whole; once the answer was given, the new one. */
struct replace {
    bool with_sync, answered;
};
#define CONTENT (3 * 512)

static void replace_file(void *arg)
{
    struct replace *p = arg;
    char buf[CONTENT];
    memset(buf, 'n', sizeof buf);
    struct io_file *f = must_open("f.tmp", O_RDWR | O_CREAT | O_TRUNC);
    CHECK(write_at(f, buf, sizeof buf, 0, 0) == CONTENT);
    if (p->with_sync)
        CHECK(io_fsync(f) == 0);
    io_close(f);
    CHECK(io_rename("f.tmp", "f", 0) == 0);
    CHECK(io_sync_dir(".") == 0);
    p->answered = true;
    io_stop(self());
}

/* True: what is on the disk is allowed. */
static bool replaced_well(struct sim_world *w, const struct replace *p)
{
    char buf[CONTENT + 1];
    ssize_t n = sim_file_read(w, "f", buf, sizeof buf, 0);
    if (n != CONTENT || memcmp(buf, buf + 1, CONTENT - 1) != 0)
        return false;
    return buf[0] == 'n' || (buf[0] == 'o' && !p->answered);
}

static unsigned replace_with_cuts(bool with_sync, bool *ended)
{
    unsigned bad = 0;
    char old[CONTENT];
    memset(old, 'o', sizeof old);
    *ended = false;
    for (uint64_t n = 1; !*ended; n++) {
        struct replace p = {.with_sync = with_sync};
        struct sim_world *w = sim_world_new();
        struct io *io;
        current_seed = n;
        CHECK(sim_file_write(w, "f", old, sizeof old, 0) == 0);
        CHECK(sim_new(&(struct sim_config){.seed = n, .world = w}, &io) == 0);
        sim_cut_after(io, n);
        int r = io_run(io, replace_file, &p);
        CHECK(r == SIM_POWER_CUT || r == 0);
        CHECK(r == 0 || sim_steps(io) == n);
        io_free(io);
        *ended = n > 200;
        for (uint64_t choice = 0; choice < 20; choice++) {
            struct sim_world *c = sim_world_clone(w);
            sim_power_cut(c, SIM_CUT_ANY, choice);
            bad += !replaced_well(c, &p);
            sim_world_free(c);
        }
        sim_world_free(w);
    }
    return bad;
}

static void a_replaced_file_is_old_or_new(void **state)
{
    bool ended;
    assert_int_equal(replace_with_cuts(true, &ended), 0);
    assert_true(replace_with_cuts(false, &ended) > 0); /* the missing sync is found */
}

/* Everything at once, cut anywhere, and again in what is left. */
static void lives_can_be_cut_short(void **state)
{
    for (uint64_t seed = 0; seed < 60; seed++) {
        struct sim_world *w = sim_world_new();
        current_seed = seed;
        for (unsigned life = 0; life < 3; life++) {
            struct io *io;
            CHECK(sim_new(&(struct sim_config){.seed = seed, .n_loops = 3, .world = w}, &io) == 0);
            sim_cut_after(io, 1 + seed * 17 + life * 100);
            int r = io_run(io, crowd, NULL);
            assert_true(r == SIM_POWER_CUT || r == 0);
            if (seed % 2) { /* either order will do */
                sim_power_cut(w, SIM_CUT_ANY, life);
                io_free(io);
            } else {
                io_free(io);
                sim_power_cut(w, SIM_CUT_ANY, life);
            }
            assert_int_equal(sim_world_pending(w), 0);
        }
        sim_world_free(w);
    }
}

static void kill_dash_nine(void *arg)
{
    struct io_file *f = must_open("f", O_RDWR | O_CREAT);
    CHECK(write_at(f, "data", 4, 0, 0) == 4);
    CHECK(io_file_lock(f, 0, 1, IO_LOCK_EXCLUSIVE) == 0);
    io_signal_wait(self());
}

static void look_after_kill(void *arg)
{
    struct io_file *f = must_open("f", O_RDWR);
    char buf[4];
    CHECK(read_at(f, buf, 4, 0) == 4 && memcmp(buf, "data", 4) == 0);
    CHECK(io_file_lock(f, 0, 1, IO_LOCK_EXCLUSIVE) == 0);
    CHECK(io_fsync(f) == 0);
    io_close(f);
    CHECK(io_sync_dir(".") == 0);
    io_stop(self());
}

static void a_killed_process_loses_nothing(void **state)
{
    for (uint64_t seed = 0; seed < 20; seed++) {
        struct sim_world *w = sim_world_new();
        char buf[4];
        assert_int_equal(
            live((struct sim_config){.seed = seed, .world = w}, kill_dash_nine, NULL, NULL),
            -EDEADLK);
        sim_power_cut(w, SIM_CUT_PROCESS, seed);
        live_well((struct sim_config){.seed = seed, .world = w}, look_after_kill, NULL);
        sim_power_cut(w, SIM_CUT_NONE, seed);
        assert_int_equal(sim_file_read(w, "f", buf, 4, 0), 4);
        sim_world_free(w);
    }
}

/* ------------------------------------------------------------------ the model */

/* Writers own some sectors each and fill them with growing numbers; readers look at any. At any
 * time a reader sees, of each sector, a number between the last answered and the last submitted
 * when it asked and got its answer. After a power cut it is one between the last durable and the
 * last submitted. A sector is never mixed. */
#define SECTORS 24
#define WRITERS 3
#define WORDS (512 / sizeof(uint64_t))

struct model {
    struct co_group group;
    uint64_t submitted[SECTORS], answered[SECTORS], durable[SECTORS];
    unsigned next_writer;
    bool drop_sync; /* the defect that the model must find */
    struct io_file *f;
};

static uint64_t random_below(uint64_t n)
{
    uint64_t v;
    io_random(self(), &v, sizeof v);
    return v % n;
}

static co_fn void write_some(struct model *m, unsigned first, unsigned n_own)
{
    uint64_t buf[4 * WORDS];
    unsigned at = first + (unsigned)random_below(n_own), n = 1 + (unsigned)random_below(4);
    n = MIN(n, first + n_own - at);
    unsigned flags = random_below(4) == 0 ? IO_DSYNC : 0;
    for (unsigned i = 0; i < n; i++) {
        m->submitted[at + i]++;
        for (unsigned k = 0; k < WORDS; k++)
            buf[i * WORDS + k] = m->submitted[at + i];
    }
    ssize_t r = write_at(m->f, buf, n * 512, at * 512, flags);
    for (unsigned i = 0; i < n && r >= 0; i++) {
        CHECK(r == (ssize_t)(n * 512));
        m->answered[at + i] = m->submitted[at + i];
        if (flags)
            m->durable[at + i] = m->answered[at + i];
    }
}

static co_fn void sync_some(struct model *m)
{
    uint64_t before[SECTORS];
    memcpy(before, m->answered, sizeof before);
    int r = m->drop_sync ? 0 : io_fsync(m->f);
    for (unsigned i = 0; i < SECTORS && r == 0; i++)
        m->durable[i] = MAX(m->durable[i], before[i]);
}

static co_fn void read_some(struct model *m)
{
    uint64_t buf[4 * WORDS], before[SECTORS];
    unsigned at = (unsigned)random_below(SECTORS), n = 1 + (unsigned)random_below(4);
    n = MIN(n, SECTORS - at);
    memcpy(before, m->answered, sizeof before);
    CHECK(read_at(m->f, buf, n * 512, at * 512) == (ssize_t)(n * 512));
    for (unsigned i = 0; i < n; i++) {
        const uint64_t *s = buf + i * WORDS;
        CHECK(memcmp(s, s + 1, 512 - sizeof *s) == 0);
        CHECK(s[0] >= before[at + i] && s[0] <= m->submitted[at + i]);
    }
}

static void model_writer(void *arg)
{
    struct model *m = arg;
    unsigned own = SECTORS / WRITERS, first = own * m->next_writer++;
    for (unsigned i = 0; i < 20; i++) {
        write_some(m, first, own);
        if (random_below(5) == 0)
            sync_some(m);
        if (random_below(10) == 0)
            io_sleep(random_below(2000000));
    }
    co_group_done(&m->group);
}

static void model_reader(void *arg)
{
    struct model *m = arg;
    for (unsigned i = 0; i < 30; i++)
        read_some(m);
    co_group_done(&m->group);
}

static void model_main(void *arg)
{
    struct model *m = arg;
    struct io *io = self();
    m->f = must_open("f", O_RDWR);
    for (unsigned i = 0; i < WRITERS; i++) {
        co_group_add(&m->group, 2);
        CHECK(loop_spawn(io_loop(io, i % io_n_loops(io)), model_writer, m) == 0);
        CHECK(loop_spawn(io_loop(io, (i + 1) % io_n_loops(io)), model_reader, m) == 0);
    }
    co_group_wait(&m->group);
    sync_some(m);
    io_close(m->f);
    io_stop(io);
}

static bool model_holds(const struct model *m, struct sim_world *w)
{
    for (unsigned i = 0; i < SECTORS; i++) {
        uint64_t s[WORDS];
        if (sim_file_read(w, "f", s, sizeof s, i * 512) != sizeof s ||
            memcmp(s, s + 1, sizeof s - sizeof *s) != 0 || s[0] < m->durable[i] ||
            s[0] > m->submitted[i])
            return false;
    }
    return true;
}

/* One seed: a run, cut somewhere or ended, and some choices of what is left. */
static bool model_run(uint64_t seed, bool drop_sync)
{
    static const unsigned char zeros[SECTORS * 512];
    struct model m = {.group = CO_GROUP_INIT, .drop_sync = drop_sync};
    struct sim_world *w = sim_world_new();
    struct io *io;
    bool good = true;
    current_seed = seed;
    CHECK(sim_file_write(w, "f", zeros, sizeof zeros, 0) == 0);
    CHECK(sim_new(&(struct sim_config){.seed = seed,
                                       .n_loops = 1 + seed % 3,
                                       .world = w,
                                       .write_error_in = seed % 4 ? 0 : 30,
                                       .short_in = seed % 3 ? 0 : 2,
                                       .inline_percent = seed % 5 ? 0 : 101},
                  &io) == 0);
    sim_cut_after(io, seed % 7 ? 1 + seed * 37 % 700 : 0);
    int r = io_run(io, model_main, &m);
    CHECK(r == 0 || r == SIM_POWER_CUT);
    io_free(io);
    for (uint64_t choice = 0; choice < 8 && good; choice++) {
        struct sim_world *c = sim_world_clone(w);
        sim_power_cut(c, SIM_CUT_ANY, seed * 8 + choice);
        good = model_holds(&m, c);
        sim_world_free(c);
    }
    sim_world_free(w);
    return good;
}

static uint64_t number_from_env(const char *name, uint64_t otherwise)
{
    const char *s = getenv(name);
    return s && *s ? strtoull(s, NULL, 0) : otherwise;
}

static void the_model_holds(void **state)
{
    uint64_t one = number_from_env("SIM_SEED", UINT64_MAX), n = number_from_env("SIM_SEEDS", 1000);
    for (uint64_t seed = 0; seed < n && one == UINT64_MAX; seed++) {
        bool good = model_run(seed, false);
        if (!good)
            fprintf(stderr, "SIM_SEED=%" PRIu64 " breaks the model\n", seed);
        assert_true(good);
    }
    if (one != UINT64_MAX)
        assert_true(model_run(one, false));
}

static void the_model_finds_a_missing_sync(void **state)
{
    unsigned found = 0;
    for (uint64_t seed = 0; seed < 50; seed++)
        found += !model_run(seed, true);
    assert_true(found > 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(equal_seeds_make_equal_runs),
        cmocka_unit_test(a_replaced_file_is_old_or_new),
        cmocka_unit_test(lives_can_be_cut_short),
        cmocka_unit_test(a_killed_process_loses_nothing),
        cmocka_unit_test(the_model_holds),
        cmocka_unit_test(the_model_finds_a_missing_sync),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
