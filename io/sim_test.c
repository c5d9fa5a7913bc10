/* SPDX-License-Identifier: Apache-2.0 */
/* Tests of the simulator as an engine behind io.h: files, faults, time, loops, network. Each runs
 * under some dozens of seeds. */
#include "io/sim_test.h"
#include "base/mem.h"
#include "co/sync.h"
#include <sys/stat.h>

/* ------------------------------------------------------------------ files through the door */

static void use_files(void *arg)
{
    struct io_file *f = must_open("d/f", O_RDWR | O_CREAT), *ro = must_open("d/f", O_RDONLY), *no;
    char buf[16] = "";
    struct iovec iov[3] = {{"ab", 2}, {NULL, 0}, {"cde", 3}};
    CHECK(io_pwritev(f, iov, 3, 4094, 0) == 5);
    CHECK(read_at(ro, buf, 10, 4093) == 6 && memcmp(buf, "\0abcde", 6) == 0);
    CHECK(read_at(ro, buf, 10, 4099) == 0);
    CHECK(write_at(ro, "x", 1, 0, 0) == -EBADF);
    CHECK(io_truncate(ro, 0) == -EINVAL);
    CHECK(io_zero(ro, 0, 1, IO_DISCARD) == -EBADF);
    struct io_stat st;
    CHECK(io_fstat(f, &st) == 0 && st.size == 4099 && st.align == 1 && st.nlink == 1);
    CHECK(st.allocated == 2 * 4096 && S_ISREG(st.mode));
    uint64_t ino = st.ino;
    CHECK(io_stat("./d//f", &st) == 0 && st.ino == ino);
    CHECK(io_stat("d/none", &st) == -ENOENT);
    CHECK(io_truncate(f, 16 * TIB) == 0);
    CHECK(io_zero(f, 0, 4096, IO_ZERO_PUNCH) == 0);
    uint64_t len = TIB;
    bool data;
    CHECK(io_extent(f, 0, &len, &data) == 0 && !data && len == 4096);
    len = TIB;
    CHECK(io_extent(f, 4096, &len, &data) == 0 && data && len == 4096);
    len = 5;
    CHECK(io_extent(f, 32 * TIB, &len, &data) == 0 && !data && len == 5);
    struct io_file *g = must_open("d/g", O_RDWR | O_CREAT | O_EXCL);
    ssize_t n = io_copy_range(f, 4096, g, 0, 3);
    CHECK(n == 3 && read_at(g, buf, 10, 0) == 3 && memcmp(buf, "cde", 3) == 0);
    CHECK(io_copy_range(f, 0, f, 10, 20) == -EINVAL);
    CHECK(io_copy_range(g, 3, f, 0, 20) == 0);
    CHECK(io_copy_range(f, 0, ro, 0, 20) == -EBADF);
    CHECK(io_copy_range(f, UINT64_MAX, g, 0, 20) == -EINVAL);
    CHECK(read_at(f, buf, 1, UINT64_MAX) == -EINVAL);
    CHECK(io_extent(f, UINT64_MAX, &len, &data) == -EINVAL);
    CHECK(io_file_lock(f, UINT64_MAX, 2, IO_LOCK_SHARED) == -EINVAL);
    CHECK(io_truncate(f, UINT64_MAX) == -EFBIG);
    CHECK(io_rename("d/g", "d/g", 0) == 0 && write_at(g, buf, 0, 0, 0) == 0);
    CHECK(io_open("", O_RDONLY, 0, &no) == -ENOENT && io_unlink("") == -ENOENT);
    n = io_copy_range(f, 8 * TIB, g, 4096, 100000); /* a hole; may be short */
    CHECK(n > 0 && n <= 100000 && io_truncate(g, 3) == 0);
    CHECK(io_rename("d/g", "d/f", IO_EXCHANGE) == 0);
    CHECK(io_stat("d/g", &st) == 0 && st.ino == ino);
    CHECK(io_rename("d/g", "d/f", IO_NOREPLACE) == -EEXIST);
    CHECK(io_unlink("d/f") == 0 && io_unlink("d/f") == -ENOENT);
    CHECK(io_sync_dir("d") == 0 && io_sync_dir("none") == -ENOENT);
    struct io_file *dir = must_open("d", O_RDONLY | O_DIRECTORY);
    CHECK(io_fsync(dir) == 0 && read_at(dir, buf, 1, 0) == -EISDIR);
    CHECK(io_copy_range(dir, 0, g, 0, 1) == -EISDIR);
    CHECK(write_at(g, "x", 1, 0, 0) == 1);
    io_close(must_open("d/g", O_RDWR | O_TRUNC));
    CHECK(io_stat("d/g", &st) == 0 && st.size == 0);
    CHECK(io_file_lock(f, 0, 10, IO_LOCK_EXCLUSIVE) == 0);
    CHECK(io_file_lock_test(ro, 9, 1, IO_LOCK_SHARED) == -EAGAIN);
    CHECK(io_file_lock(ro, 20, 1, IO_LOCK_EXCLUSIVE) == -EBADF);
    CHECK(io_file_lock(ro, 9, 0, IO_LOCK_SHARED) == 0); /* an empty range */
    io_close(f);
    CHECK(io_file_lock(ro, 9, 1, IO_LOCK_SHARED) == 0);
    io_close(ro);
    io_close(g);
    io_close(dir);
    io_close(NULL);
    io_stop(self());
}

static void files_work(void **state)
{
    for (uint64_t seed = 0; seed < 50; seed++) {
        struct sim_world *w = sim_world_new();
        sim_mkdir(w, "d");
        live_well((struct sim_config){.seed = seed, .world = w}, use_files, NULL);
        sim_world_free(w);
    }
}

static void use_direct(void *arg)
{
    struct io_file *f = must_open("f", O_RDWR | O_CREAT | O_DIRECT);
    struct io_stat st;
    char *buf = io_buf_get(4096);
    CHECK(io_fstat(f, &st) == 0 && st.align == 4096);
    memset(buf, 'x', 4096);
    CHECK(write_at(f, buf, 4096, 0, 0) == 4096);
    CHECK(write_at(f, buf, 4096, 512, 0) == -EINVAL);
    CHECK(write_at(f, buf, 512, 0, 0) == -EINVAL);
    CHECK(read_at(f, buf + 8, 4096, 0) == -EINVAL);
    CHECK(read_at(f, buf, 4096, 0) == 4096);
    io_buf_put(buf, 4096);
    io_close(f);
    io_stop(self());
}

static void direct_needs_alignment(void **state)
{
    live_well((struct sim_config){.seed = 1, .direct_align = 4096}, use_direct, NULL);
}

static void open_without_memory(void *arg)
{
    struct io_file *f;
    for (unsigned n = 1; n <= 2; n++) {
        mem_fail_after(n);
        CHECK(io_open("f", O_RDWR | O_CREAT, 0644, &f) == -ENOMEM);
    }
    CHECK(io_open("f", O_RDONLY, 0, &f) == -ENOENT); /* nothing was made */
    io_stop(self());
}

static void memory_can_run_out(void **state)
{
    live_well((struct sim_config){.seed = 1}, open_without_memory, NULL);
}

static void a_loop_may_be_refused_memory(void **state)
{
    struct io *io;
    for (unsigned long n = 1; n <= 3; n++) {
        mem_fail_after(n);
        assert_int_equal(sim_new(&(struct sim_config){.n_loops = 2}, &io), -ENOMEM);
    }
    mem_fail_after(0);
    sim_new(&(struct sim_config){.n_loops = 1}, &io);
    mem_fail_after(1);
    assert_int_equal(io_run(io, open_without_memory, NULL), -ENOMEM);
    io_free(io);
    io_free(NULL);
}

/* ------------------------------------------------------------------ faults */

static void meet_faults(void *arg)
{
    struct sim_world *w = arg;
    struct io_file *f = must_open("f", O_RDWR | O_CREAT), *other = must_open("f", O_RDWR);
    char buf[4096] = {0};
    sim_fail(w, "f", SIM_READ, 2, EIO, false);
    CHECK(read_at(f, buf, 1, 0) == 0 && read_at(f, buf, 1, 0) == -EIO &&
          read_at(f, buf, 1, 0) == 0);
    sim_fail(w, NULL, SIM_WRITE, 1, ENOSPC, true);
    CHECK(write_at(f, buf, 4096, 0, 0) == -ENOSPC && write_at(f, buf, 1, 0, 0) == -ENOSPC);
    sim_clear_faults(w);
    CHECK(write_at(f, buf, 4096, 0, 0) == 4096);

    sim_fail(w, "f", SIM_FSYNC, 1, EIO, false);
    CHECK(io_fsync(f) == -EIO);
    CHECK(io_fsync(f) == -EIO); /* for ever */
    CHECK(io_fsync(other) == -EIO);
    io_close(f);
    f = must_open("f", O_RDWR);
    CHECK(io_fsync(f) == 0); /* reopened */
    CHECK(io_fsync(other) == -EIO);

    sim_stall(w, "f", SIM_FSYNC, 1, 7 * SECOND, false);
    uint64_t begin = io_now(self());
    CHECK(io_fsync(f) == 0);
    CHECK(io_now(self()) - begin >= 7 * SECOND && io_now(self()) - begin < 8 * SECOND);

    sim_disk_limit(w, 8192);
    CHECK(write_at(f, buf, 4096, 4096, 0) == 4096);
    CHECK(write_at(f, buf, 4096, 8192, 0) == -ENOSPC);
    sim_disk_limit(w, UINT64_MAX);
    sim_fail(w, "f", SIM_RENAME, 1, EXDEV, false);
    CHECK(io_rename("f", "g", 0) == -EXDEV);
    sim_fail(w, "f", SIM_OPEN, 1, EACCES, false);
    struct io_file *no;
    CHECK(io_open("f", O_RDONLY, 0, &no) == -EACCES);
    sim_fail(w, ".", SIM_SYNC_DIR, 1, EIO, false);
    CHECK(io_sync_dir(".") == -EIO && io_sync_dir(".") == 0);
    io_close(f);
    io_close(other);
    io_stop(self());
}

static void faults_strike_where_ordered(void **state)
{
    for (uint64_t seed = 0; seed < 50; seed++) {
        struct sim_world *w = sim_world_new();
        live_well((struct sim_config){.seed = seed, .world = w}, meet_faults, w);
        sim_world_free(w);
    }
}

static void count_errors(void *arg)
{
    unsigned *n = arg;
    struct io_file *f = must_open("f", O_RDWR | O_CREAT);
    for (unsigned i = 0; i < 400; i++) {
        char c = 0;
        n[0] += write_at(f, "x", 1, 0, 0) == -EIO;
        n[1] += read_at(f, &c, 1, 0) == -EIO;
    }
    uint64_t begin = io_now(self());
    n[2] = 0;
    for (unsigned i = 0; i < 400; i++) {
        io_close(f);
        f = must_open("f", O_RDWR);
        n[2] += io_fsync(f) == -EIO;
    }
    n[3] = (unsigned)((io_now(self()) - begin) / SECOND);
    io_close(f);
    io_stop(self());
}

static void meet_a_reset(void *arg)
{
    struct io_sock *a, *b;
    unsigned *n = arg;
    for (int fd = 0; fd < 100; fd++) {
        CHECK(io_sock_from_fds(self(), fd, fd, &a) == 0);
        CHECK(sim_fds_peer(self(), fd, fd, &b) == 0);
        int r = send_all(a, "x", 1);
        CHECK(r == 0 || r == -ECONNRESET);
        n[0] += r < 0;
        io_sock_close(a);
        io_sock_close(b);
    }
    io_stop(self());
}

static void resets_come_by_chance(void **state)
{
    unsigned n = 0;
    live_well((struct sim_config){.seed = 3, .reset_in = 10}, meet_a_reset, &n);
    assert_in_range(n, 2, 50);
}

static void trace_says_what_happens(void **state)
{
    struct sim_world *w = sim_world_new();
    char *text = NULL;
    size_t len;
    FILE *f = open_memstream(&text, &len);
    live_well((struct sim_config){.seed = 1, .world = w, .trace = f}, open_without_memory, NULL);
    fclose(f);
    assert_non_null(strstr(text, " turn 0 0 0\n"));
    assert_non_null(strstr(text, " open 1 0 0\n"));
    free(text);
    sim_world_free(w);
}

static void faults_come_by_chance(void **state)
{
    unsigned n[4] = {0};
    live_well((struct sim_config){.seed = 3,
                                  .read_error_in = 10,
                                  .write_error_in = 10,
                                  .sync_error_in = 10,
                                  .stall_in = 100},
              count_errors, n);
    for (unsigned i = 0; i < 3; i++)
        assert_in_range(n[i], 10, 100);
    assert_in_range(n[3], 5, 200);
}

/* ------------------------------------------------------------------ short counts */

#define SHORT_LEN (8 * 512u)

struct short_io {
    struct io_file *f;
    struct co_group group;
    unsigned *torn;
};

static void write_bs(void *arg)
{
    struct short_io *t = arg;
    unsigned char buf[SHORT_LEN];
    memset(buf, 'b', sizeof buf);
    CHECK(write_at(t->f, buf, sizeof buf, 256, IO_DSYNC) == sizeof buf);
    co_group_done(&t->group);
}

/* Readers see the file before and after, and at times in the middle of it; in the end all is there,
 * and durable. */
static void do_short_io(void *arg)
{
    struct short_io t = {.f = must_open("f", O_RDWR), .group = CO_GROUP_INIT, .torn = arg};
    unsigned char buf[SHORT_LEN];
    co_group_add(&t.group, 1);
    CHECK(loop_spawn(io_loop(self(), 1), write_bs, &t) == 0);
    do {
        CHECK(read_at(t.f, buf, sizeof buf, 256) == sizeof buf);
        for (unsigned i = 0; i < SHORT_LEN; i++)
            CHECK(buf[i] == 'a' || buf[i] == 'b');
        *t.torn += buf[0] != buf[SHORT_LEN - 1];
    } while (buf[0] == 'a' || buf[SHORT_LEN - 1] == 'a');
    co_group_wait(&t.group);
    CHECK(read_at(t.f, buf, sizeof buf, 1024) == sizeof buf); /* short where the file ends */
    io_close(t.f);
    io_stop(self());
}

static void io_in_parts_is_complete(void **state)
{
    unsigned torn = 0, whole = 0;
    for (uint64_t seed = 0; seed < 200; seed++) {
        struct sim_world *w = sim_world_new();
        static unsigned char buf[2 * SHORT_LEN];
        memset(buf, 'a', sizeof buf);
        assert_int_equal(sim_file_write(w, "f", buf, 1024 + SHORT_LEN, 0), 0);
        bool parts = seed % 2;
        live_well((struct sim_config){.seed = seed, .n_loops = 2, .world = w, .short_in = parts},
                  do_short_io, parts ? &torn : &whole);
        sim_power_cut(w, SIM_CUT_NONE, seed);
        assert_int_equal(sim_file_read(w, "f", buf, SHORT_LEN, 256), SHORT_LEN);
        for (unsigned i = 0; i < SHORT_LEN; i++)
            assert_int_equal(buf[i], 'b');
        sim_world_free(w);
    }
    assert_int_equal(whole, 0);
    assert_in_range(torn, 10, 100000);
}

/* ------------------------------------------------------------------ time, events, loops */

struct waiter {
    struct io_file *f;
    struct io_event done;
    struct co_group *group;
};

static void sync_and_tell(void *arg)
{
    struct waiter *w = arg;
    CHECK(io_fsync(w->f) == 0);
    io_event_set(&w->done);
}

static void wait_with_deadline(void *arg)
{
    struct waiter w = {must_open("f", O_RDWR | O_CREAT), IO_EVENT_INIT, NULL};
    struct io *io = self();
    sim_stall(arg, "f", SIM_FSYNC, 1, 10 * SECOND, false);
    uint64_t begin = io_now(io);
    int64_t wall = io_wall(io);
    CHECK(begin >= SECOND && begin < 2 * SECOND);
    CHECK(loop_spawn(io_loop(io, 1), sync_and_tell, &w) == 0);
    CHECK(io_event_wait(&w.done, begin + 3 * SECOND) == -ETIME);
    CHECK(io_now(io) >= begin + 3 * SECOND && io_now(io) < begin + 4 * SECOND);
    CHECK(io_event_wait(&w.done, begin + 20 * SECOND) == 0);
    CHECK(io_now(io) >= begin + 10 * SECOND && io_now(io) < begin + 11 * SECOND);
    CHECK((uint64_t)(io_wall(io) - wall) == io_now(io) - begin);
    io_sleep(SECOND);
    CHECK(io_now(io) >= begin + 11 * SECOND);
    io_close(w.f);
    io_stop(io);
}

static void a_stall_meets_a_deadline(void **state)
{
    for (uint64_t seed = 0; seed < 50; seed++) {
        struct sim_world *w = sim_world_new();
        live_well((struct sim_config){.seed = seed, .n_loops = 2, .world = w}, wait_with_deadline,
                  w);
        sim_world_free(w);
    }
}

struct counter {
    struct co_mutex mutex;
    struct co_group group;
    unsigned value, inside, overlaps_seen;
    uint64_t grace_flags;
};

static void add_many(void *arg)
{
    struct counter *c = arg;
    for (unsigned i = 0; i < 20; i++) {
        co_mutex_lock(&c->mutex);
        CHECK(c->inside++ == 0);
        unsigned v = c->value;
        loop_pause();
        c->value = v + 1;
        c->inside--;
        co_mutex_unlock(&c->mutex);
        if (i % 5 == 0)
            io_sleep(1000);
    }
    co_group_done(&c->group);
}

static void race_without_mutex(void *arg)
{
    struct counter *c = arg;
    for (unsigned i = 0; i < 20; i++) {
        unsigned v = c->overlaps_seen;
        loop_pause();
        c->overlaps_seen = v + 1;
    }
    co_group_done(&c->group);
}

static void share_a_counter(void *arg)
{
    struct counter *c = arg;
    struct io *io = self();
    for (unsigned i = 0; i < io_n_loops(io); i++) {
        co_group_add(&c->group, 2);
        CHECK(loop_spawn(io_loop(io, i), add_many, c) == 0);
        CHECK(loop_spawn(io_loop(io, i), race_without_mutex, c) == 0);
    }
    co_group_wait(&c->group);
    CHECK(c->value == 20 * io_n_loops(io));
    io_stop(io);
}

static void a_mutex_works_between_loops(void **state)
{
    unsigned raced = 0;
    for (uint64_t seed = 0; seed < 50; seed++) {
        struct counter c = {.mutex = CO_MUTEX_INIT, .group = CO_GROUP_INIT};
        live_well((struct sim_config){.seed = seed, .n_loops = 3}, share_a_counter, &c);
        raced += c.overlaps_seen < 60;
    }
    assert_true(raced > 0); /* without it updates are lost: the loops really interleave */
}

static void note_loop(void *arg)
{
    struct counter *c = arg;
    c->grace_flags |= UINT64_C(1) << loop_index(loop_self());
}

static void wait_for_grace(void *arg)
{
    struct counter *c = arg;
    struct io *io = self();
    uint64_t before[3];
    for (unsigned i = 0; i < 3; i++)
        before[i] = loop_turn_number(io_loop(io, i));
    io_grace(io);
    for (unsigned i = 1; i < 3; i++)
        CHECK(loop_turn_number(io_loop(io, i)) > before[i]);
    for (unsigned i = 0; i < 3; i++)
        loop_call(io_loop(io, i), note_loop, c);
    CHECK(c->grace_flags == 7);
    io_stop(io);
}

static void grace_passes_all_loops(void **state)
{
    for (uint64_t seed = 0; seed < 50; seed++) {
        struct counter c = {0};
        live_well((struct sim_config){.seed = seed, .n_loops = 3}, wait_for_grace, &c);
    }
}

static void lock_twice(void *arg)
{
    struct co_mutex m = CO_MUTEX_INIT;
    co_mutex_lock(&m);
    co_mutex_lock(&m);
}

static void wait_for_a_signal(void *arg)
{
    io_signal_wait(self());
}

static void a_deadlock_is_found_and_reported(void **state)
{
    struct io *io;
    char text[600] = "";
    sim_new(&(struct sim_config){.seed = 1}, &io);
    assert_string_equal(io_engine_name(io), "simulator");
    assert_int_equal(io_run(io, lock_twice, NULL), -EDEADLK);
    io_free(io);
    sim_new(&(struct sim_config){.seed = 1, .n_loops = 2, .pid = 77}, &io);
    assert_int_equal(io_pid(io), 77);
    assert_int_equal(io_run(io, wait_for_a_signal, NULL), -EDEADLK);
    FILE *f = fmemopen(text, sizeof text, "w");
    sim_report(io, f);
    fclose(f);
    assert_non_null(strstr(text, "loop 0: 1 coroutines alive, 1 of them in operations"));
    assert_non_null(strstr(text, "loop 0: signal"));
    io_free(io);
}

/* ------------------------------------------------------------------ network */

#define ECHO_BYTES (300 * 1024)

struct echo {
    struct io_addr addr;
    struct io_event served;
    struct io_sock *conn;
};

static unsigned char pattern(size_t i)
{
    return (unsigned char)(i * 7 + i / 251);
}

static void send_pattern(void *arg)
{
    struct echo *e = arg;
    static unsigned char buf[ECHO_BYTES];
    for (size_t i = 0; i < sizeof buf; i++)
        buf[i] = pattern(i);
    struct iovec iov[3] = {{buf, 1}, {buf + 1, 100000}, {buf + 100001, ECHO_BYTES - 100001}};
    CHECK(io_send(e->conn, iov, 3) == 0);
    io_event_set(&e->served);
}

static void serve_echo(void *arg)
{
    struct echo *e = arg;
    struct io_sock *listener, *s;
    struct tide_error err;
    char buf[5000], peer[200];
    CHECK(io_listen(&e->addr, 1, &listener, &err) == 0);
    io_event_set(&e->served);
    CHECK(io_accept(listener, &s) == 0);
    io_sock_peer(s, peer, sizeof peer);
    CHECK(io_sock_peer_pid(s) == (e->addr.type == IO_ADDR_UNIX ? 99 : -1));
    CHECK(strstr(peer, e->addr.type == IO_ADDR_UNIX ? "unix:/s pid 99" : "127.0.0.1:"));
    ssize_t n;
    while ((n = io_recv(s, buf, sizeof buf)) > 0) {
        CHECK(send_all(s, buf, (size_t)n) == 0);
        if (n % 3 == 0)
            io_sleep(100000); /* the sender runs into a full pipe */
    }
    CHECK(n == 0);
    io_sock_close(s);
    io_sock_close(listener);
}

static void call_echo(void *arg)
{
    struct echo *e = arg;
    struct io *io = self();
    static unsigned char back[ECHO_BYTES];
    sim_client_pid(io, 99);
    CHECK(io_connect(&e->addr, &e->conn) ==
          (e->addr.type == IO_ADDR_UNIX ? -ENOENT : -ECONNREFUSED));
    CHECK(loop_spawn(io_loop(io, 1), serve_echo, e) == 0);
    CHECK(io_event_wait(&e->served, IO_FOREVER) == 0);
    CHECK(io_connect(&e->addr, &e->conn) == 0);
    CHECK(io_recv_now(e->conn, back, 1) == -EAGAIN);
    CHECK(loop_run_now(send_pattern, e) == 0);
    CHECK(io_recv_all(e->conn, back, ECHO_BYTES) == 0);
    for (size_t i = 0; i < ECHO_BYTES; i++)
        CHECK(back[i] == pattern(i));
    CHECK(io_event_wait(&e->served, IO_FOREVER) == 0);
    io_sock_close(e->conn);
    io_stop(io);
}

static void echo_comes_back_whole(void **state)
{
    for (uint64_t seed = 0; seed < 40; seed++) {
        struct echo e = {.addr = unix_addr("/s"), .served = IO_EVENT_INIT};
        if (seed % 2)
            e.addr = (struct io_addr){.type = IO_ADDR_TCP, .host = "localhost", .port = "10809"};
        live_well((struct sim_config){.seed = seed, .n_loops = 2, .sock_buffer = 1000 + seed * 700},
                  call_echo, &e);
    }
}

struct pair {
    struct io_addr addr;
    struct io_sock *listener, *client, *server;
    struct io_event event;
    int result;
};

static co_fn void make_pair(struct pair *p)
{
    CHECK(io_connect(&p->addr, &p->client) == 0);
    CHECK(io_accept(p->listener, &p->server) == 0);
}

static void close_pair(struct pair *p)
{
    io_sock_close(p->client);
    io_sock_close(p->server);
    p->client = p->server = NULL;
}

static void receive_one(void *arg)
{
    struct pair *p = arg;
    char c;
    p->result = (int)io_recv(p->server, &c, 1);
    io_event_set(&p->event);
}

static void accept_one(void *arg)
{
    struct pair *p = arg;
    struct io_sock *s;
    p->result = io_accept(p->listener, &s);
    io_event_set(&p->event);
}

static co_fn void ends_of_streams(struct pair *p)
{
    char buf[8];
    make_pair(p); /* a clean end, after the data */
    CHECK(send_all(p->client, "abc", 3) == 0);
    io_sock_close(p->client);
    p->client = NULL;
    CHECK(io_recv_all(p->server, buf, 3) == 0 && memcmp(buf, "abc", 3) == 0);
    CHECK(io_recv(p->server, buf, 1) == 0 && io_recv_all(p->server, buf, 1) == -ECONNRESET);
    CHECK(send_all(p->server, "x", 1) == -EPIPE);
    close_pair(p);

    make_pair(p); /* closed with unread data */
    CHECK(send_all(p->client, "abc", 3) == 0);
    io_sock_close(p->server);
    p->server = NULL;
    CHECK(io_recv(p->client, buf, 1) == -ECONNRESET);
    CHECK(send_all(p->client, "x", 1) == -ECONNRESET);
    close_pair(p);

    make_pair(p); /* shutdown ends a receive that waits on another loop */
    CHECK(loop_spawn(io_loop(self(), 1), receive_one, p) == 0);
    io_sleep(SECOND);
    io_sock_shutdown(p->server);
    CHECK(io_event_wait(&p->event, IO_FOREVER) == 0 && p->result == -ECANCELED);
    CHECK(send_all(p->server, "x", 1) == -ECANCELED);
    CHECK(io_recv_now(p->server, buf, 1) == -ECANCELED);
    CHECK(io_recv(p->client, buf, 1) == 0);
    close_pair(p);

    make_pair(p); /* an injected reset strikes both */
    sim_fail(sim_world_of(self()), "unix:@s", SIM_SEND, 1, ECONNRESET, false);
    CHECK(send_all(p->client, "x", 1) == -ECONNRESET);
    CHECK(io_recv(p->server, buf, 1) == -ECONNRESET);
    close_pair(p);
}

static void use_sockets(void *arg)
{
    struct pair p = {.addr = unix_addr("@s"), .event = IO_EVENT_INIT};
    struct io_sock *other;
    struct tide_error err = {0};
    struct io *io = self();
    CHECK(io_listen(&p.addr, 4, &p.listener, &err) == 0);
    CHECK(io_listen(&p.addr, 4, &other, &err) == -EADDRINUSE && strstr(err.msg, "unix:@s"));
    ends_of_streams(&p);
    char text[200];
    CHECK(io_sock_peer_pid(p.listener) == -1);
    io_sock_peer(p.listener, text, sizeof text);
    CHECK(strcmp(text, "unix:@s") == 0);
    CHECK(io_recv(p.listener, text, 1) == -ENOTCONN && send_all(p.listener, "x", 1) == -ENOTCONN);
    struct io_addr nothing = {.type = IO_ADDR_UNIX};
    CHECK(io_listen(&nothing, 1, &other, &err) == -EINVAL && strstr(err.msg, "empty"));
    CHECK(io_connect(&nothing, &other) == -EINVAL);
    mem_fail_after(1);
    CHECK(io_connect(&p.addr, &other) == -ENOMEM);
    mem_fail_after(1);
    CHECK(io_sock_from_fds(io, 5, 6, &other) == -ENOMEM);

    struct io_addr any = {.type = IO_ADDR_TCP, .host = "0.0.0.0", .port = "0"};
    struct io_sock *tcp;
    CHECK(io_listen(&any, 1, &tcp, &err) == 0 && strcmp(any.port, "0") != 0);
    snprintf(any.host, sizeof any.host, "127.0.0.1");
    CHECK(io_connect(&any, &p.client) == 0);
    CHECK(io_accept(p.client, &other) == -EINVAL);
    io_sock_peer(p.client, text, sizeof text);
    CHECK(strncmp(text, "127.0.0.1:", 10) == 0);
    io_sock_close(tcp); /* before it was accepted */
    char c;
    CHECK(io_recv(p.client, &c, 1) == -ECONNRESET);
    io_sock_close(p.client);

    CHECK(io_sock_from_fds(io, 0, 1, &p.server) == 0);
    struct io_sock *unasked;
    CHECK(io_sock_from_fds(io, 7, 8, &unasked) == 0);
    CHECK(sim_fds_peer(io, 0, 1, &p.client) == 0);
    CHECK(sim_fds_peer(io, 0, 1, &other) == -ENOENT);
    CHECK(send_all(p.client, "q", 1) == 0 && io_recv(p.server, &c, 1) == 1 && c == 'q');
    close_pair(&p);

    CHECK(loop_spawn(io_loop(io, 1), accept_one, &p) == 0);
    io_sleep(SECOND);
    io_sock_shutdown(p.listener);
    CHECK(io_event_wait(&p.event, IO_FOREVER) == 0 && p.result == -ECANCELED);
    io_sock_close(p.listener);
    io_stop(io);
}

static void sockets_end_as_on_linux(void **state)
{
    for (uint64_t seed = 0; seed < 50; seed++)
        live_well((struct sim_config){.seed = seed, .n_loops = 2}, use_sockets, NULL);
}

static void connect_one(void *arg)
{
    struct pair *p = arg;
    p->result = io_connect(&p->addr, &p->client);
    io_event_set(&p->event);
}

static void fill_the_queue(void *arg)
{
    struct pair p = {.addr = {.type = IO_ADDR_FD, .fd = 3}, .event = IO_EVENT_INIT, .result = 1};
    struct io *io = self();
    struct io_sock *first, *s;
    struct tide_error err;
    CHECK(io_listen(&p.addr, 1, &p.listener, &err) == 0);
    CHECK(io_connect(&p.addr, &first) == 0);
    CHECK(loop_spawn(io_loop(io, 1), connect_one, &p) == 0);
    io_sleep(SECOND);
    CHECK(p.result == 1); /* waits for a place in the queue */
    CHECK(io_accept(p.listener, &s) == 0);
    CHECK(io_event_wait(&p.event, IO_FOREVER) == 0 && p.result == 0);
    io_sock_close(s);
    io_sock_close(first);
    io_sock_close(p.client);
    io_sock_close(p.listener);
    io_stop(io);
}

static void a_full_queue_makes_callers_wait(void **state)
{
    for (uint64_t seed = 0; seed < 20; seed++)
        live_well((struct sim_config){.seed = seed, .n_loops = 2}, fill_the_queue, NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(files_work),
        cmocka_unit_test(direct_needs_alignment),
        cmocka_unit_test(memory_can_run_out),
        cmocka_unit_test(faults_strike_where_ordered),
        cmocka_unit_test(faults_come_by_chance),
        cmocka_unit_test(resets_come_by_chance),
        cmocka_unit_test(trace_says_what_happens),
        cmocka_unit_test(a_loop_may_be_refused_memory),
        cmocka_unit_test(io_in_parts_is_complete),
        cmocka_unit_test(a_stall_meets_a_deadline),
        cmocka_unit_test(a_mutex_works_between_loops),
        cmocka_unit_test(grace_passes_all_loops),
        cmocka_unit_test(a_deadlock_is_found_and_reported),
        cmocka_unit_test(echo_comes_back_whole),
        cmocka_unit_test(sockets_end_as_on_linux),
        cmocka_unit_test(a_full_queue_makes_callers_wait),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
