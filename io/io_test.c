/* SPDX-License-Identifier: Apache-2.0 */
/* Tests of io/: the loops and how engines start, wait and stop. Every test of a table runs once on
 * each engine; a machine without io_uring skips that half. The bodies run as the main coroutine on
 * loop 0 and check with CHECK, which works on any loop. */
#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "base/bytes.h"
#include "base/mem.h"
#include "co/sync.h"
#include "io/io_test.h"
#include "io/loop.h"
#include "io/real.h"

/* ------------------------------------------------------------------ loops */

struct visit {
    struct co_group *group;
    struct loop *want;
    _Atomic unsigned *count;
};

static void visit_loop(void *arg)
{
    struct visit *v = arg;
    CHECK(loop_self() == v->want && co_inside());
    loop_pause();
    CHECK(loop_self() == v->want);
    atomic_fetch_add(v->count, 1);
    co_group_done(v->group);
}

static void spawn_body(struct io *io)
{
    struct co_group group = CO_GROUP_INIT;
    struct visit v[N_LOOPS * 10];
    _Atomic unsigned count = 0;
    for (int i = 0; i < N_LOOPS * 10; i++) {
        v[i] = (struct visit){&group, io_loop(io, i % N_LOOPS), &count};
        co_group_add(&group, 1);
        CHECK_EQ(loop_spawn(v[i].want, visit_loop, &v[i]), 0);
    }
    co_group_wait(&group);
    CHECK_EQ(count, N_LOOPS * 10);
    CHECK(loop_is_control());
    CHECK_EQ(io_n_loops(io), N_LOOPS);
}

static void note_loop(void *arg)
{
    CHECK(!co_inside());
    *(struct loop **)arg = loop_self();
}

static void spawn_no_memory_body(struct io *io)
{
    int flag = 0;
    struct io_file *f = NULL;
    struct io_sock *s = NULL;
    struct io_addr a = {.type = IO_ADDR_UNIX, .path = "@tidemark-io-test-none"};
    struct tide_error err;
    mem_fail_after(1);
    CHECK_EQ(loop_spawn(io_loop(io, 1), note_loop, &flag), -ENOMEM);
    mem_fail_after(1);
    CHECK_EQ(io_open("/dev/null", O_RDONLY, 0, &f), -ENOMEM);
    mem_fail_after(1);
    CHECK_EQ(io_listen(&a, 1, &s, &err), -ENOMEM);
    mem_fail_after(0);
    CHECK(!f && !s && !flag);
}

static void set_flag(void *arg)
{
    *(int *)arg = 1;
    loop_pause();
    *(int *)arg = 2;
}

static void call_body(struct io *io)
{
    for (int i = 1; i < N_LOOPS; i++) {
        struct loop *seen = NULL;
        loop_call(io_loop(io, i), note_loop, &seen);
        CHECK(seen == io_loop(io, i));
    }
    int flag = 0;
    CHECK_EQ(loop_run_now(set_flag, &flag), 0);
    CHECK_EQ(flag, 1); /* entered at once, has yielded */
    while (flag != 2)
        loop_pause();
    uint64_t before[N_LOOPS];
    for (int i = 0; i < N_LOOPS; i++)
        before[i] = loop_turn_number(io_loop(io, i));
    io_grace(io);
    for (int i = 0; i < N_LOOPS; i++)
        CHECK(loop_turn_number(io_loop(io, i)) > before[i]);
}

struct order {
    struct co_group group;
    uint64_t base;
    int next;
};
struct timed {
    struct order *order;
    uint64_t after_ns;
    int rank, got;
};

static void wait_turn(void *arg)
{
    struct timed *t = arg;
    struct io *io = loop_io(loop_self());
    struct io_event e = IO_EVENT_INIT;
    CHECK_EQ(io_event_wait(&e, t->order->base + t->after_ns), -ETIME);
    CHECK(io_now(io) >= t->order->base + t->after_ns);
    t->got = t->order->next++;
    co_group_done(&t->order->group);
}

/* False: the machine was so busy that the first was due before the last was armed. */
static bool timers_in_order(struct io *io)
{
    static const struct {
        int ms, rank; /* ties keep the order in which they were armed */
    } plan[] = {{9, 8}, {1, 0}, {5, 4}, {3, 2}, {5, 5}, {2, 1}, {9, 9}, {5, 6}, {4, 3}, {8, 7}};
    struct order o = {.group = CO_GROUP_INIT, .base = io_now(io) + 20000000};
    struct timed t[10];
    co_group_add(&o.group, 10);
    for (int i = 0; i < 10; i++) {
        t[i] = (struct timed){&o, plan[i].ms * 1000000u, plan[i].rank, -1};
        CHECK_EQ(loop_run_now(wait_turn, &t[i]), 0);
    }
    bool in_time = io_now(io) < o.base;
    co_group_wait(&o.group);
    for (int i = 0; i < 10 && in_time; i++)
        CHECK_EQ(t[i].got, t[i].rank);
    return in_time;
}

static void timers_body(struct io *io)
{
    uint64_t deadline = soon(io);
    while (!timers_in_order(io))
        CHECK(io_now(io) < deadline);
    uint64_t t0 = io_now(io);
    io_sleep(3000000);
    CHECK(io_now(io) - t0 >= 3000000);
    CHECK(io_wall(io) > 1600000000 * (int64_t)SECOND);
    char a[64] = {0}, b[64] = {0};
    io_random(io, a, sizeof a);
    io_random(io, b, sizeof b);
    CHECK(memcmp(a, b, sizeof a));
    CHECK_EQ(io_pid(io), getpid());
}

/* The heap alone: random arming and disarming, compared with a sorted truth. */
static void heap_is_sorted(void **state)
{
    enum { N = 400 };
    struct loop l = {0};
    static struct io_timer t[N];
    unsigned seed = 7;
    for (int i = 0; i < N; i++) {
        t[i] = (struct io_timer){.deadline = rand_r(&seed) % 50};
        loop_timer_arm(&l, &t[i]);
        if (i % 3 == 2)
            loop_timer_disarm(&l, &t[rand_r(&seed) % (i + 1)]);
    }
    uint64_t last = 0, last_order = 0;
    unsigned n = l.n_timers;
    while (l.timers) {
        struct io_timer *m = l.timers;
        assert_int_equal(loop_next_deadline(&l), m->deadline);
        assert_true(m->deadline > last || (m->deadline == last && m->order >= last_order));
        last = m->deadline;
        last_order = m->order;
        loop_timer_disarm(&l, m);
        n--;
    }
    assert_int_equal(n, 0);
    assert_int_equal(l.n_timers, 0);
    assert_true(loop_next_deadline(&l) == IO_FOREVER);
}

/* ------------------------------------------------------------------ events */

struct race {
    struct io_event *event; /* freed by the waiter as soon as it may */
    _Atomic unsigned sets;
    struct io_event go, ended;
    int rounds;
};

static void race_setter(void *arg)
{
    struct race *r = arg;
    for (int i = 0; i < r->rounds; i++) {
        CHECK_EQ(io_event_wait(&r->go, IO_FOREVER), 0);
        struct io_event *e = r->event;
        if (i % 4 == 0)
            loop_pause();
        io_event_set(e);
    }
    io_event_set(&r->ended);
}

/* The deadline lies where the set is about to come. Whoever wins, the set is seen exactly once. */
static void event_race_body(struct io *io)
{
    struct race r = {.go = IO_EVENT_INIT, .ended = IO_EVENT_INIT, .rounds = 20000};
    CHECK_EQ(loop_spawn(io_loop(io, 1), race_setter, &r), 0);
    for (int i = 0; i < r.rounds; i++) {
        r.event = mem_zalloc(sizeof *r.event);
        CHECK(r.event);
        io_event_set(&r.go);
        int rc = io_event_wait(r.event, io_now(io) + (i % 64) * 500);
        if (rc == -ETIME)
            rc = io_event_wait(r.event, soon(io));
        CHECK_EQ(rc, 0);
        mem_free(r.event);
    }
    CHECK_EQ(io_event_wait(&r.ended, soon(io)), 0);
}

static void event_sticky_body(struct io *io)
{
    struct io_event e = IO_EVENT_INIT;
    io_event_set(&e);
    io_event_set(&e);
    CHECK_EQ(io_event_wait(&e, 0), 0); /* stays set, beats a deadline that is past */
    CHECK_EQ(io_event_wait(&e, 0), -ETIME);
    CHECK_EQ(io_event_wait(&e, io_now(io) + 1000000), -ETIME);
}

/* ------------------------------------------------------------------ buffers */

static void put_far(void *buf)
{
    io_buf_put(buf, 5000);
}

static void buffers_body(struct io *io)
{
    void *a = io_buf_get(5000), *b;
    CHECK(a && ((uintptr_t)a & 4095) == 0);
    memset(a, 1, 5000);
    io_buf_put(a, 5000);
    b = io_buf_get(8192); /* same class: the one just freed */
    CHECK(a == b);
    loop_call(io_loop(io, 1), put_far, b);
    a = io_buf_get(100u << 20);
    CHECK(a);
    io_buf_put(a, 100u << 20);
    CHECK(!io_buf_get(SIZE_MAX - 5));
    mem_fail_after(1);
    CHECK(!io_buf_get(123456));
    mem_fail_after(0);
    io_buf_put(NULL, 1);
}

/* An engine that knows two slabs and no more. */
static int add_two(struct loop *l, unsigned slab, void *base, size_t len)
{
    CHECK(l == loop_self() && len == BUF_SLAB_BYTES && ((uintptr_t)base & 4095) == 0);
    return slab < 2 ? 0 : -ENOMEM;
}

static void put_far_256k(void *buf)
{
    io_buf_put(buf, 256 * KIB);
}

static void region_body(struct io *io)
{
    enum { SIZE = 256 * KIB, A_SLAB = BUF_SLAB_BYTES / SIZE, N = 3 * A_SLAB };
    struct loop *l = loop_self();
    char *buf[N];
    for (unsigned fail = 1; fail <= 2; fail++) {
        mem_fail_after(fail);
        CHECK_EQ(buf_region_start(l, add_two), -ENOMEM);
        mem_fail_after(0);
    }
    CHECK_EQ(buf_region_start(l, add_two), 0);
    for (unsigned i = 0; i < N; i++) {
        buf[i] = io_buf_get(SIZE);
        CHECK(buf[i]);
        memset(buf[i], (int)i, SIZE);
        CHECK_EQ(buf_region_slab(l, buf[i], SIZE), i < 2 * A_SLAB ? (int)i / A_SLAB : -1);
    }
    for (unsigned i = 0; i < N; i++) /* nobody got what another has */
        CHECK(buf[i][0] == (char)i && !memcmp(buf[i], buf[i] + 1, SIZE - 1));
    CHECK_EQ(buf_region_slab(l, buf[0], BUF_SLAB_BYTES), 0);
    CHECK_EQ(buf_region_slab(l, buf[0] + 1, BUF_SLAB_BYTES), -1); /* reaches into the next */
    CHECK_EQ(buf_region_slab(l, buf[0], 0), -1);
    CHECK_EQ(buf_region_slab(l, buf[A_SLAB] + SIZE, BUF_SLAB_BYTES), -1);
    CHECK_EQ(buf_region_slab(io_loop(io, 1), buf[0], SIZE), -1);
    /* Whoever puts it, a buffer comes back to its region, and to no other list. */
    for (unsigned i = 0; i < N; i++)
        loop_call(io_loop(io, i % N_LOOPS), put_far_256k, buf[i]);
    for (unsigned i = 0; i < N; i++) {
        buf[i] = io_buf_get(SIZE);
        CHECK((buf_region_slab(l, buf[i], SIZE) >= 0) == (i < 2 * A_SLAB));
    }
    void *other = io_buf_get(2 * MIB); /* larger than a slab */
    CHECK(other && buf_region_slab(l, other, 1) < 0);
    io_buf_put(other, 2 * MIB);
    for (unsigned i = 0; i < N; i++)
        io_buf_put(buf[i], SIZE);
}

static int add_any(struct loop *l, unsigned slab, void *base, size_t len)
{
    return 0;
}

/* One class leaves slabs for the others. */
static void region_share_body(struct io *io)
{
    enum { N = BUF_REGION_SLABS };
    struct loop *l = loop_self();
    void *large[N], *small[2];
    unsigned n_inside = 0;
    CHECK_EQ(buf_region_start(l, add_any), 0);
    for (unsigned i = 0; i < N; i++) {
        large[i] = io_buf_get(MIB);
        CHECK(large[i]);
        n_inside += buf_region_slab(l, large[i], MIB) >= 0;
    }
    CHECK(n_inside > 0 && n_inside < N);
    for (unsigned i = 0; i < 2; i++) {
        small[i] = io_buf_get(4 * KIB << 4 * i);
        CHECK(buf_region_slab(l, small[i], 4 * KIB << 4 * i) >= 0);
    }
    for (unsigned i = 0; i < 2; i++)
        io_buf_put(small[i], 4 * KIB << 4 * i);
    for (unsigned i = 0; i < N; i++)
        io_buf_put(large[i], MIB);
}

/* ------------------------------------------------------------------ looking before sleeping */

/* Long waits end the looking, a busy machine forbids it, and nothing makes it longer than the cap.
 */
static void spin_learns_body(struct io *io)
{
    enum { CAP_NS = 100000, ROUNDS = 20 };
    struct real_loop *rl = loop_self()->engine;
    CHECK_EQ(rl->spin_ns[0], 0);
    rl->waits++; /* as if a client were connected */
    rl->load_at = UINT64_MAX;
    rl->machine_busy = true;
    rl->spin_ns[0] = rl->spin_ns[1] = CAP_NS;
    for (unsigned i = 0; i < ROUNDS; i++)
        io_sleep(1000000);
    CHECK_EQ(rl->spin_ns[0], CAP_NS);
    rl->machine_busy = false;
    for (unsigned i = 0; i < ROUNDS; i++)
        io_sleep(1000000);
    CHECK_EQ(rl->spin_ns[0], 0);
    CHECK_EQ(rl->spin_ns[1], CAP_NS); /* no file was waited for */
    for (unsigned i = 0; i < 10 * ROUNDS; i++) {
        io_sleep(1000);
        CHECK(rl->spin_ns[0] <= CAP_NS);
    }
    rl->waits--;
}

/* ------------------------------------------------------------------ signals, start and stop */

static void signal_body(struct io *io)
{
    CHECK_EQ(io_signal_wait(io), -EINVAL); /* nothing was blocked yet */
    CHECK_EQ(io_signals_block(io), 0);
    CHECK_EQ(kill(getpid(), SIGHUP), 0);
    CHECK_EQ(io_signal_wait(io), SIGHUP);
    CHECK_EQ(kill(getpid(), SIGTERM), 0);
    CHECK_EQ(io_signal_wait(io), SIGTERM);
}

static void empty_body(struct io *io)
{
}

static void bad_arguments(void **state)
{
    struct tide_error err;
    struct io *io;
    assert_int_equal(io_new(IO_AUTO, 0, &io, &err), -EINVAL);
    assert_int_equal(io_new(IO_AUTO, 100000, &io, &err), -EINVAL);
    io_free(NULL);
    assert_null(loop_self());
}

static void no_memory(void **state)
{
    for (int kind = IO_URING; kind <= IO_PORTABLE; kind++)
        for (unsigned n = 1;; n++) {
            struct tide_error err;
            struct io *io = NULL;
            mem_fail_after(n);
            int r = io_new(kind, 2, &io, &err);
            mem_fail_after(0);
            if (r != -ENOMEM) {
                assert_true(n > 3 || kind == IO_URING);
                io_free(io);
                break;
            }
        }
}

/* With the launcher that forbids io_uring, IO_AUTO must fall back by itself. Without it in the
 * environment there is nothing to test. */
static void auto_falls_back(void **state)
{
    const char *launcher = getenv("TIDE_NOURING");
    char self[PATH_MAX];
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    if (!launcher || n < 0)
        skip();
    self[n] = 0;
    pid_t pid = fork();
    if (pid == 0) {
        execl(launcher, launcher, self, "--engine", (char *)NULL);
        _exit(99);
    }
    int status;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 42);
}

/* What the child of auto_falls_back does: 42 says "portable, and it works". */
static int check_engine(void)
{
    struct tide_error err;
    struct run r = {.body = timers_body};
    if (io_new(IO_AUTO, 2, &r.io, &err) < 0)
        return 1;
    bool portable = !strcmp(io_engine_name(r.io), "portable");
    int rc = io_run(r.io, run_main, &r);
    io_free(r.io);
    return portable && rc == 0 ? 42 : 2;
}

/* What the child of hung_threads_are_left() does: somebody opens a pipe that has no other end, and
 * the daemon is to end all the same. 42: it did, in time and not too early. */
static void open_for_ever(void *path)
{
    struct io_file *f;
    io_open(path, O_RDONLY, 0, &f);
    abort();
}

static void hang_main(void *arg)
{
    struct run *r = arg;
    static char path[PATH_MAX];
    snprintf(path, sizeof path, "%s", getenv("TIDE_FIFO"));
    CHECK_EQ(loop_run_now(open_for_ever, path), 0);
    real_of(r->io)->leave_ns = SECOND / 5;
    io_stop(r->io);
}

static int check_leaving(enum io_kind kind)
{
    struct tide_error err;
    struct run r = {0};
    if (io_new(kind, 2, &r.io, &err) < 0)
        return 77;
    uint64_t start = real_now(r.io);
    int rc = io_run(r.io, hang_main, &r);
    struct io *io = r.io;
    io_free(io);
    uint64_t ns = real_now(io) - start;
    return rc == 0 && ns >= SECOND / 5 && ns < 25 * (uint64_t)SECOND ? 42 : 2;
}

static void hung_threads_are_left(void **state)
{
    char self[PATH_MAX];
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    assert_true(n > 0);
    self[n] = 0;
    assert_int_equal(mkfifo(in_dir("fifo"), 0600), 0);
    for (int portable = 0; portable < 2; portable++) {
        int status;
        pid_t pid = fork();
        if (pid == 0) {
            setenv("TIDE_FIFO", in_dir("fifo"), 1);
            alarm(30); /* "for ever" is a failure */
            execl(self, self, portable ? "--hang-portable" : "--hang-uring", (char *)NULL);
            _exit(99);
        }
        assert_int_equal(waitpid(pid, &status, 0), pid);
        assert_true(WIFEXITED(status));
        assert_true(WEXITSTATUS(status) == 42 || (!portable && WEXITSTATUS(status) == 77));
    }
}

ON_BOTH(empty)
ON_BOTH(spawn)
ON_BOTH(call)
ON_BOTH(spawn_no_memory)
ON_BOTH(timers)
ON_BOTH(event_sticky)
ON_BOTH(event_race)
ON_BOTH(buffers)
ON_BOTH(region)
ON_BOTH(region_share)
ON_BOTH(spin_learns)
ON_BOTH(signal)

static int remove_dir(void **state)
{
    return remove_files((const char *const[]){"fifo", NULL});
}

int main(int argc, char **argv)
{
    if (argc == 2 && !strcmp(argv[1], "--engine"))
        return check_engine();
    if (argc == 2 && !strncmp(argv[1], "--hang-", 7))
        _exit(check_leaving(!strcmp(argv[1], "--hang-uring") ? IO_URING : IO_PORTABLE));
    if (argc == 2)
        cmocka_set_test_filter(argv[1]);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(heap_is_sorted),
        cmocka_unit_test(bad_arguments),
        cmocka_unit_test(no_memory),
        BOTH(empty),
        BOTH(spawn),
        BOTH(call),
        BOTH(spawn_no_memory),
        BOTH(timers),
        BOTH(event_sticky),
        BOTH(event_race),
        BOTH(buffers),
        BOTH(region),
        BOTH(region_share),
        BOTH(spin_learns),
        BOTH(signal),
        cmocka_unit_test(auto_falls_back),
        cmocka_unit_test(hung_threads_are_left),
    };
    return cmocka_run_group_tests_name("io", tests, make_dir, remove_dir);
}
