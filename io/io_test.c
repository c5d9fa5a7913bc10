/* SPDX-License-Identifier: Apache-2.0 */
/* Tests of io/: the loops and the two real engines. Every test of a table runs once on each engine;
 * a machine without io_uring skips that half. The bodies run as the main coroutine on loop 0 and
 * check with CHECK, which works on any loop. */
#include <errno.h>
#include <limits.h>
#include <linux/capability.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/bytes.h"
#include "base/mem.h"
#include "co/sync.h"
#include "io/io.h"
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

/* ------------------------------------------------------------------ files */

static void fill(unsigned char *p, size_t n, unsigned seed)
{
    for (size_t i = 0; i < n; i++)
        p[i] = (i * 131 + seed * 29 + (i >> 8)) & 0xff;
}

static struct io_file *open_new(const char *name, int flags)
{
    struct io_file *f = NULL;
    CHECK_EQ(io_open(in_dir(name), O_RDWR | O_CREAT | O_TRUNC | flags, 0600, &f), 0);
    return f;
}

static void file_body(struct io *io)
{
    enum { N = 100000 };
    struct io_file *f = open_new("plain", 0), *none = NULL;
    unsigned char *a = mem_alloc(N), *b = mem_alloc(N);
    fill(a, N, 1);
    struct iovec w[3] = {{a, 10}, {a + 10, 0}, {a + 10, N - 10}};
    CHECK_EQ(io_pwritev(f, w, 3, 5, 0), N);
    struct iovec r[2] = {{b, 70000}, {b + 70000, N - 70000}};
    CHECK_EQ(io_preadv(f, r, 2, 5), N);
    CHECK(!memcmp(a, b, N));
    CHECK_EQ(w[0].iov_len, 10);
    CHECK_EQ(io_preadv(f, r, 2, 105), N - 100); /* short at the end */
    CHECK_EQ(io_preadv(f, r, 2, N + 5), 0);
    CHECK_EQ(io_preadv(f, r, 2, INT64_MAX - 5), -EINVAL);
    CHECK_EQ(io_pwritev(f, w, 3, INT64_MAX - 5, 0), -EINVAL);
    CHECK_EQ(io_pwritev(f, w, 1, 0, IO_DSYNC), 10);
    CHECK_EQ(io_preadv(f, r, 1, 0), 70000);
    CHECK(!memcmp(a, b, 10));
    CHECK_EQ(io_fsync(f), 0);
    struct io_stat st, st2;
    CHECK_EQ(io_fstat(f, &st), 0);
    CHECK_EQ(st.size, N + 5);
    CHECK_EQ(st.align, 1);
    CHECK(S_ISREG(st.mode) && st.nlink == 1 && st.allocated >= N && st.mtime_ns > 0);
    CHECK_EQ(io_stat(in_dir("plain"), &st2), 0);
    CHECK(st.ino == st2.ino && st.dev == st2.dev);
    CHECK_EQ(io_truncate(f, 1000), 0);
    CHECK_EQ(io_preadv(f, r, 2, 0), 1000);
    CHECK_EQ(io_truncate(f, UINT64_MAX), -EFBIG);
    io_close(f);
    io_close(NULL);
    CHECK_EQ(io_open(in_dir("plain"), O_RDWR | O_CREAT | O_EXCL, 0600, &none), -EEXIST);
    CHECK_EQ(io_open(in_dir("absent"), O_RDONLY, 0, &none), -ENOENT);
    CHECK_EQ(io_stat(in_dir("absent"), &st), -ENOENT);
    CHECK_EQ(io_open(in_dir("plain"), O_RDONLY, 0, &f), 0);
    CHECK_EQ(io_pwritev(f, w, 1, 0, 0), -EBADF);
    CHECK_EQ(io_pwritev(f, w, 1, 0, IO_DSYNC), -EBADF);
    io_close(f);
    mem_free(a);
    mem_free(b);
}

/* More pieces than one system call takes. */
static void many_pieces_body(struct io *io)
{
    enum { N = 3000 };
    struct io_file *f = open_new("pieces", 0);
    unsigned char *a = mem_alloc(N * 7), *b = mem_zalloc(N * 7);
    struct iovec *w = mem_calloc(N, sizeof *w), *r = mem_calloc(N, sizeof *r);
    fill(a, N * 7, 2);
    for (int i = 0; i < N; i++) {
        w[i] = (struct iovec){a + i * 7, 7};
        r[i] = (struct iovec){b + i * 7, 7};
    }
    CHECK_EQ(io_pwritev(f, w, N, 3, 0), N * 7);
    CHECK_EQ(io_preadv(f, r, N, 3), N * 7);
    CHECK(!memcmp(a, b, N * 7));
    memset(b, 0, N * 7);
    CHECK_EQ(io_pwritev(f, w, N, 100003, IO_DSYNC), N * 7);
    CHECK_EQ(io_preadv(f, r, N, 100003), N * 7);
    CHECK(!memcmp(a, b, N * 7));
    io_close(f);
    mem_free(a);
    mem_free(b);
    mem_free(w);
    mem_free(r);
}

static void zero_body(struct io *io)
{
    enum { N = 1 << 20 };
    struct io_file *f = open_new("zero", 0);
    unsigned char *a = mem_alloc(N);
    memset(a, 0xaa, N);
    struct iovec v = {a, N};
    CHECK_EQ(io_pwritev(f, &v, 1, 0, 0), N);
    CHECK_EQ(io_zero(f, 65536, 131072, IO_ZERO_PUNCH), 0);
    uint64_t len = N;
    bool data;
    CHECK_EQ(io_extent(f, 0, &len, &data), 0);
    CHECK(data && len == 65536);
    len = N;
    CHECK_EQ(io_extent(f, 65536, &len, &data), 0);
    CHECK(!data && len == 131072);
    len = 1000;
    CHECK_EQ(io_extent(f, 65536, &len, &data), 0);
    CHECK(!data && len == 1000);
    len = 77;
    CHECK_EQ(io_extent(f, N + 1000, &len, &data), 0);
    CHECK(!data && len == 77);
    int keep = io_zero(f, 524288, 4096, IO_ZERO_KEEP);
    CHECK(keep == 0 || keep == -EOPNOTSUPP);
    CHECK_EQ(io_zero(f, N - 4096, 65536, IO_DISCARD), 0);
    struct io_stat st;
    CHECK_EQ(io_fstat(f, &st), 0);
    CHECK_EQ(st.size, N); /* never grows it */
    CHECK_EQ(io_preadv(f, &v, 1, 0), N);
    for (int i = 0; i < N; i++) {
        bool zero = (i >= 65536 && i < 65536 + 131072) || i >= N - 4096 ||
                    (keep == 0 && i >= 524288 && i < 524288 + 4096);
        CHECK_EQ(a[i], zero ? 0 : 0xaa);
    }
    CHECK_EQ(io_zero(f, 0, 0, IO_DISCARD), 0);
    CHECK_EQ(io_zero(f, UINT64_MAX - 5, 10, IO_ZERO_PUNCH), -EINVAL);
    io_close(f);
    mem_free(a);
}

static void copy_body(struct io *io)
{
    enum { N = 200000 };
    struct io_file *f = open_new("from", 0), *g = open_new("to", 0);
    unsigned char *a = mem_alloc(N), *b = mem_zalloc(N);
    fill(a, N, 3);
    struct iovec v = {a, N}, r = {b, N};
    CHECK_EQ(io_pwritev(f, &v, 1, 0, 0), N);
    for (uint64_t done = 0; done < N - 1000;) {
        ssize_t n = io_copy_range(f, 1000 + done, g, done, N - 1000 - done);
        CHECK(n > 0);
        done += n;
    }
    CHECK_EQ(io_copy_range(f, N, g, 0, 10), 0); /* at the end there is nothing */
    CHECK_EQ(io_preadv(g, &r, 1, 0), N - 1000);
    CHECK(!memcmp(a + 1000, b, N - 1000));
    io_close(f);
    io_close(g);
    mem_free(a);
    mem_free(b);
}

static void lock_body(struct io *io)
{
    struct io_file *f = open_new("locked", 0), *g;
    CHECK_EQ(io_open(in_dir("locked"), O_RDWR, 0, &g), 0);
    CHECK_EQ(io_file_lock(f, 100, 10, IO_LOCK_SHARED), 0);
    CHECK_EQ(io_file_lock(g, 100, 10, IO_LOCK_SHARED), 0);
    CHECK_EQ(io_file_lock(g, 105, 1, IO_LOCK_EXCLUSIVE), -EAGAIN);
    CHECK_EQ(io_file_lock_test(g, 105, 1, IO_LOCK_EXCLUSIVE), -EAGAIN);
    CHECK_EQ(io_file_lock_test(g, 105, 1, IO_LOCK_SHARED), 0);
    CHECK_EQ(io_file_lock_test(g, 110, 1, IO_LOCK_EXCLUSIVE), 0);
    CHECK_EQ(io_file_lock(f, 100, 10, IO_UNLOCK), 0);
    CHECK_EQ(io_file_lock(g, 105, 1, IO_LOCK_EXCLUSIVE), 0);
    CHECK_EQ(io_file_lock(f, 105, 0, IO_LOCK_EXCLUSIVE), 0); /* nothing is locked */
    CHECK_EQ(io_file_lock(f, 105, 1, IO_LOCK_SHARED), -EAGAIN);
    io_close(g); /* releases */
    CHECK_EQ(io_file_lock(f, 105, 1, IO_LOCK_SHARED), 0);
    io_close(f);
}

static void names_body(struct io *io)
{
    struct io_stat a, b, st;
    io_close(open_new("a", 0));
    io_close(open_new("b", 0));
    CHECK_EQ(io_stat(in_dir("a"), &a), 0);
    CHECK_EQ(io_stat(in_dir("b"), &b), 0);
    CHECK_EQ(io_rename(in_dir("a"), in_dir("b"), IO_NOREPLACE), -EEXIST);
    CHECK_EQ(io_rename(in_dir("a"), in_dir("b"), IO_EXCHANGE), 0);
    CHECK_EQ(io_stat(in_dir("a"), &st), 0);
    CHECK(st.ino == b.ino);
    CHECK_EQ(io_rename(in_dir("a"), in_dir("b"), 0), 0);
    CHECK_EQ(io_stat(in_dir("a"), &st), -ENOENT);
    CHECK_EQ(io_stat(in_dir("b"), &st), 0);
    CHECK(st.ino == b.ino);
    CHECK_EQ(io_sync_dir(test_dir), 0);
    CHECK_EQ(io_sync_dir(in_dir("b")), -ENOTDIR);
    CHECK_EQ(io_unlink(in_dir("b")), 0);
    CHECK_EQ(io_unlink(in_dir("b")), -ENOENT);
}

static void direct_body(struct io *io)
{
    enum { N = 256 * 1024 };
    struct io_file *f = NULL;
    int r = io_open(in_dir("direct"), O_RDWR | O_CREAT | O_TRUNC | O_DIRECT, 0600, &f);
    if (r == -EINVAL) {
        fprintf(stderr, "no O_DIRECT in %s\n", test_dir);
        return;
    }
    CHECK_EQ(r, 0);
    unsigned char *a = io_buf_get(N), *b = io_buf_get(N);
    fill(a, N, 4);
    struct iovec w[2] = {{a, 4096}, {a + 4096, N - 4096}}, v = {b, N};
    CHECK_EQ(io_pwritev(f, w, 2, 4096, 0), N);
    CHECK_EQ(io_preadv(f, &v, 1, 4096), N);
    CHECK(!memcmp(a, b, N));
    CHECK_EQ(io_pwritev(f, w, 2, 0, IO_DSYNC), N);
    CHECK_EQ(io_preadv(f, &v, 1, 8192), N - 4096); /* short at the end */
    struct io_stat st;
    CHECK_EQ(io_fstat(f, &st), 0);
    CHECK(is_pow2(st.align) && st.align > 1 && st.align <= 65536);
    CHECK_EQ(io_fsync(f), 0);
    io_close(f);
    io_buf_put(a, N);
    io_buf_put(b, N);
}

/* Enough direct I/O that loops register buffers: what is read is what was written, and a buffer
 * that another loop has freed is as good as any. */
enum { DIRECT_USERS = 6, DIRECT_ROUNDS = 150, DIRECT_MAX = 256 * KIB };
struct direct_user {
    struct co_group *group;
    struct io_file *file;
    struct io *io;
    unsigned id;
};
struct far_put {
    void *buf;
    size_t len;
};

static void put_far_len(void *arg)
{
    struct far_put *p = arg;
    io_buf_put(p->buf, p->len);
}

static void direct_round(struct direct_user *u, unsigned round)
{
    size_t len = 4096u << (round + u->id) % 7;
    uint64_t off = (uint64_t)u->id * DIRECT_MAX;
    unsigned char *a = io_buf_get(len), *b = io_buf_get(len);
    CHECK(a && b);
    fill(a, len, u->id + round);
    struct iovec w = {a, len}, r = {b, len};
    CHECK_EQ(io_pwritev(u->file, &w, 1, off, round % 32 == 0 ? IO_DSYNC : 0), len);
    CHECK_EQ(io_preadv(u->file, &r, 1, off), len);
    CHECK(!memcmp(a, b, len));
    io_buf_put(a, len);
    struct far_put far = {b, len};
    loop_call(io_loop(u->io, round % N_LOOPS), put_far_len, &far);
}

static void direct_user_main(void *arg)
{
    struct direct_user *u = arg;
    for (unsigned round = 0; round < DIRECT_ROUNDS; round++)
        direct_round(u, round);
    co_group_done(u->group);
}

static void direct_heavy_body(struct io *io)
{
    struct co_group group = CO_GROUP_INIT;
    struct direct_user users[DIRECT_USERS];
    struct io_file *f = NULL;
    int r = io_open(in_dir("direct"), O_RDWR | O_CREAT | O_TRUNC | O_DIRECT, 0600, &f);
    if (r == -EINVAL) {
        fprintf(stderr, "no O_DIRECT in %s\n", test_dir);
        return;
    }
    CHECK_EQ(r, 0);
    CHECK_EQ(io_truncate(f, DIRECT_USERS * (uint64_t)DIRECT_MAX), 0);
    co_group_add(&group, DIRECT_USERS);
    for (unsigned i = 0; i < DIRECT_USERS; i++) {
        users[i] = (struct direct_user){.group = &group, .file = f, .io = io, .id = i};
        CHECK_EQ(loop_spawn(io_loop(io, i % N_LOOPS), direct_user_main, &users[i]), 0);
    }
    co_group_wait(&group);
    /* Errors come through the same way. */
    unsigned char *buf = io_buf_get(4096);
    struct iovec v = {buf + 1, 512};
    CHECK_EQ(io_preadv(f, &v, 1, 1), -EINVAL);
    v = (struct iovec){buf, 4096};
    CHECK_EQ(io_preadv(f, &v, 1, DIRECT_USERS * (uint64_t)DIRECT_MAX), 0);
    io_close(f);
    CHECK_EQ(io_open(in_dir("direct"), O_RDONLY | O_DIRECT, 0, &f), 0);
    CHECK_EQ(io_pwritev(f, &v, 1, 0, 0), -EBADF);
    io_close(f);
    io_buf_put(buf, 4096);
}

/* The right to pin memory without limit, taken from this thread and given back. */
static void limit_pinning(bool on)
{
    static rlim_t soft;
    struct __user_cap_header_struct head = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct cap[2];
    struct rlimit lim;
    unsigned bit = 1u << CAP_IPC_LOCK;
    assert_int_equal(syscall(SYS_capget, &head, cap), 0);
    cap[0].effective = on ? cap[0].effective & ~bit : cap[0].effective | (cap[0].permitted & bit);
    assert_int_equal(syscall(SYS_capset, &head, cap), 0);
    assert_int_equal(getrlimit(RLIMIT_MEMLOCK, &lim), 0);
    if (on)
        soft = lim.rlim_cur;
    lim.rlim_cur = on ? MIN(soft, (rlim_t)MIB + MIB / 2) : soft;
    assert_int_equal(setrlimit(RLIMIT_MEMLOCK, &lim), 0);
}

static void direct_heavy_limited_portable(void **state)
{
    limit_pinning(true);
    run_on(IO_PORTABLE, direct_heavy_body);
    limit_pinning(false);
}

static void direct_heavy_limited_uring(void **state)
{
    limit_pinning(true);
    run_on(IO_URING, direct_heavy_body);
    limit_pinning(false);
}

/* A sync that fails, fails for good. /dev/full cannot be synced. */
static void sticky_sync_body(struct io *io)
{
    struct io_file *f = NULL;
    if (io_open("/dev/full", O_RDWR, 0, &f) < 0)
        return;
    int r = io_fsync(f);
    CHECK(r < 0);
    CHECK_EQ(io_fsync(f), r);
    struct iovec v = {"x", 1};
    CHECK_EQ(io_pwritev(f, &v, 1, 0, 0), -ENOSPC);
    io_close(f);
}

/* The error of a lost page reaches a durable write too, whoever met it first, and stays. */
static void durable_write_body(struct io *io)
{
    struct io_file *f = open_new("durable", 0);
    struct real_file *rf = (struct real_file *)f;
    struct iovec v = {"x", 1};
    CHECK_EQ(io_pwritev(f, &v, 1, 0, IO_DSYNC), 1);
    rf->sync_error = -EIO; /* as a failed sync leaves it */
    CHECK_EQ(io_pwritev(f, &v, 1, 0, 0), 1);
    CHECK_EQ(io_pwritev(f, &v, 1, 0, IO_DSYNC), -EIO);
    CHECK_EQ(io_fsync(f), -EIO);
    io_close(f);
}

enum { WRITERS = 12, WRITES = 200, BLOCK = 3000 };
struct writer {
    struct co_group *group;
    unsigned id;
};

/* Every writer opens the file itself: the role belongs to the inode, not to the open file. */
static void writer_main(void *arg)
{
    struct writer *w = arg;
    struct io_file *f;
    unsigned char *a = mem_alloc(BLOCK), *b = mem_alloc(BLOCK);
    CHECK_EQ(io_open(in_dir("shared"), O_RDWR, 0, &f), 0);
    for (unsigned i = 0; i < WRITES; i++) {
        uint64_t off = ((uint64_t)i * WRITERS + w->id) * BLOCK;
        fill(a, BLOCK, i * WRITERS + w->id);
        struct iovec v[2] = {{a, 1000}, {a + 1000, BLOCK - 1000}}, r = {b, BLOCK};
        CHECK_EQ(io_pwritev(f, v, 2, off, 0), BLOCK);
        if (i % 50 == w->id)
            CHECK_EQ(io_fsync(f), 0);
        CHECK_EQ(io_preadv(f, &r, 1, off), BLOCK);
        CHECK(!memcmp(a, b, BLOCK));
        if (i % 5 == 0)
            loop_pause();
    }
    io_close(f);
    mem_free(a);
    mem_free(b);
    co_group_done(w->group);
}

static void crowd_of_writers(struct io *io, bool slow)
{
    struct io_file *f = open_new("shared", 0);
    struct inode *ino = ((struct real_file *)f)->inode;
    struct co_group group = CO_GROUP_INIT;
    struct writer w[WRITERS];
    co_group_add(&group, WRITERS);
    for (unsigned i = 0; i < WRITERS; i++) {
        w[i] = (struct writer){&group, i};
        CHECK_EQ(loop_spawn(io_loop(io, i % N_LOOPS), writer_main, &w[i]), 0);
    }
    for (unsigned i = 0; slow && i < 200; i++) { /* slow, mostly */
        atomic_store(&ino->slow_until, i % 10 ? io_now(io) + 60 * (uint64_t)SECOND : 0);
        loop_pause();
    }
    co_group_wait(&group);
    CHECK(!ino->role_held && !ino->slow_held && !ino->slow_head);
    unsigned char a[BLOCK], b[BLOCK];
    for (unsigned i = 0; i < WRITERS * WRITES; i++) {
        struct iovec v = {b, BLOCK};
        fill(a, BLOCK, i);
        CHECK_EQ(io_preadv(f, &v, 1, (uint64_t)i * BLOCK), BLOCK);
        CHECK(!memcmp(a, b, BLOCK));
    }
    io_close(f);
}

static void writers_body(struct io *io)
{
    crowd_of_writers(io, false);
}

static void slow_writers_body(struct io *io)
{
    crowd_of_writers(io, true);
}

struct flusher {
    struct co_group *group;
    struct io_file *file;
};

static void flusher_main(void *arg)
{
    struct flusher *fl = arg;
    for (int i = 0; i < 10; i++)
        CHECK_EQ(io_fsync(fl->file), 0);
    co_group_done(fl->group);
}

/* One file, flushed from all loops at once: the joining and handing over of syncs. */
static void flushers_body(struct io *io)
{
    struct co_group group = CO_GROUP_INIT;
    struct flusher fl = {&group, open_new("flushed", 0)};
    struct iovec v = {"x", 1};
    co_group_add(&group, 9);
    for (int i = 0; i < 9; i++)
        CHECK_EQ(loop_spawn(io_loop(io, i % N_LOOPS), flusher_main, &fl), 0);
    for (int i = 0; i < 20; i++)
        CHECK_EQ(io_pwritev(fl.file, &v, 1, i, IO_DSYNC), 1);
    co_group_wait(&group);
    io_close(fl.file);
}

/* From here to the sockets the tests look inside: they bring about what a healthy disk does not. */

struct queued {
    struct io_file *file;
    unsigned index, *done, order;
    bool flush;
    struct co_group *group;
};

static void queued_main(void *arg)
{
    struct queued *q = arg;
    unsigned char a[100];
    struct iovec v = {a, sizeof a};
    fill(a, sizeof a, q->index);
    if (q->flush)
        CHECK_EQ(io_fsync(q->file), 0);
    else
        CHECK_EQ(io_pwritev(q->file, &v, 1, q->index * sizeof a, 0), sizeof a);
    q->order = (*q->done)++;
    co_group_done(q->group);
}

/* While somebody holds the writer role, requests queue. The next holder serves 32 of them and hands
 * the role on; a flush waits for those before it. (A disk that took 2 ms over a write has sent the
 * rest to the pool; then their order says nothing.) */
static void role_body(struct io *io)
{
    enum { N = 80, FLUSH = 50 };
    struct io_file *f = open_new("role", 0);
    struct inode *ino = ((struct real_file *)f)->inode;
    struct queued q[N];
    unsigned done = 0;
    struct co_group group = CO_GROUP_INIT;
    unsigned char a[100], b[100];
    ino->role_held = true;
    for (unsigned i = 0; i < N; i++) {
        q[i] = (struct queued){f, i, &done, 0, i == FLUSH, &group};
        co_group_add(&group, 1);
        CHECK_EQ(loop_run_now(queued_main, &q[i]), 0);
    }
    CHECK_EQ(done, 0);
    ino->role_held = false;
    struct iovec v = {a, sizeof a}, r = {b, sizeof b};
    CHECK_EQ(io_pwritev(f, &v, 1, N * sizeof a, 0), sizeof a);
    CHECK(ino->role_held || ino->slow_until); /* handed on, not dropped */
    co_group_wait(&group);
    CHECK(!ino->role_held && !ino->role_head);
    for (unsigned i = 0; i < N; i++) {
        CHECK(i >= FLUSH || q[i].order < q[FLUSH].order || ino->slow_until);
        fill(a, sizeof a, i);
        if (i == FLUSH)
            memset(a, 0, sizeof a);
        CHECK_EQ(io_preadv(f, &r, 1, i * sizeof a), sizeof b);
        CHECK(!memcmp(a, b, sizeof a));
    }
    io_close(f);
}

/* After a slow write the pool writes; requests that queued for the role before go there too. */
static void slow_body(struct io *io)
{
    struct io_file *f = open_new("slow", 0);
    struct real_file *rf = (struct real_file *)f;
    struct queued q[10];
    unsigned done = 0;
    struct co_group group = CO_GROUP_INIT;
    unsigned char a[100], b[100];
    struct iovec v = {a, sizeof a}, r = {b, sizeof b};
    rf->inode->role_held = true;
    for (unsigned i = 0; i < 10; i++) {
        q[i] = (struct queued){f, i, &done, 0, false, &group};
        co_group_add(&group, 1);
        CHECK_EQ(loop_run_now(queued_main, &q[i]), 0);
    }
    rf->inode->slow_until = io_now(io) + 60 * (uint64_t)SECOND;
    CHECK_EQ(io_pwritev(f, &v, 1, 5000, 0), sizeof a); /* does not wait for the role */
    CHECK_EQ(done, 0);
    rf->inode->role_held = false;
    struct role_req *head = rf->inode->role_head;
    rf->inode->slow_until = 0;
    CHECK(head);
    CHECK_EQ(io_pwritev(f, &v, 1, 6000, 0), sizeof a);
    co_group_wait(&group);
    rf->write_mode = NOWAIT_YES; /* if that is wrong, the file says so and is asked plainly */
    CHECK_EQ(io_pwritev(f, &v, 1, 7000, 0), sizeof a);
    rf->read_mode = NOWAIT_NEVER; /* reads go to the pool */
    for (unsigned i = 0; i < 10; i++) {
        fill(a, sizeof a, i);
        CHECK_EQ(io_preadv(f, &r, 1, i * sizeof a), sizeof b);
        CHECK(!memcmp(a, b, sizeof a));
    }
    CHECK_EQ(io_preadv(f, &r, 1, 7050), 50);
    io_close(f);
}

static void reads_main(void *arg)
{
    struct queued *q = arg;
    unsigned char *a = io_buf_get(4096), *b = io_buf_get(4096);
    struct iovec r = {b, 4096};
    fill(a, 4096, q->index);
    CHECK_EQ(io_preadv(q->file, &r, 1, q->index * 4096), 4096);
    CHECK(!memcmp(a, b, 4096));
    io_buf_put(a, 4096);
    io_buf_put(b, 4096);
    (*q->done)++;
    co_group_done(q->group);
}

/* More at once than a ring has entries, or the pool has threads. */
static void many_at_once(struct io *io, struct io_file *f)
{
    enum { N = 700, BLOCKS = 50 };
    static struct queued q[N];
    struct co_group group = CO_GROUP_INIT;
    unsigned done = 0;
    unsigned char *a = io_buf_get(4096);
    for (unsigned i = 0; i < BLOCKS; i++) {
        struct iovec v = {a, 4096};
        fill(a, 4096, i);
        CHECK_EQ(io_pwritev(f, &v, 1, i * 4096, 0), 4096);
    }
    io_buf_put(a, 4096);
    co_group_add(&group, N);
    for (unsigned i = 0; i < N; i++) {
        q[i] = (struct queued){.file = f, .index = i % BLOCKS, .done = &done, .group = &group};
        CHECK_EQ(loop_run_now(reads_main, &q[i]), 0);
    }
    co_group_wait(&group);
    CHECK_EQ(done, N);
}

static void many_at_once_body(struct io *io)
{
    struct io_file *f = open_new("plain", 0), *g;
    ((struct real_file *)f)->read_mode = NOWAIT_NEVER; /* in the pool */
    many_at_once(io, f);
    io_close(f);
    if (io_open(in_dir("direct"), O_RDWR | O_CREAT | O_DIRECT, 0600, &g) == 0) {
        many_at_once(io, g);
        io_close(g);
    }
}

/* What the page cache holds is read on the loop, but not all of it in one go. */
static void large_read_body(struct io *io)
{
    enum { LEN = 8 << 20, PIECE = 5000, N = LEN / PIECE };
    struct io_file *f = open_new("large", 0);
    unsigned char *a = mem_alloc(LEN), *b = mem_zalloc(LEN);
    static struct iovec many[N];
    struct iovec all = {a, LEN}, one = {b, LEN};
    fill(a, LEN, 3);
    CHECK_EQ(io_pwritev(f, &all, 1, 0, 0), LEN);
    uint64_t turn = loop_turn_number(loop_self());
    CHECK_EQ(io_preadv(f, &one, 1, 0), LEN);
    CHECK(loop_turn_number(loop_self()) - turn >= LEN / MIB - 1);
    CHECK(!memcmp(a, b, LEN));
    memset(b, 0, LEN);
    for (unsigned i = 0; i < N; i++)
        many[i] = (struct iovec){b + i * PIECE, PIECE};
    CHECK_EQ(io_preadv(f, many, N, 0), N * PIECE);
    CHECK(!memcmp(a, b, N * PIECE));
    CHECK_EQ(io_preadv(f, many, N, LEN - 3 * MIB - 7), 3 * MIB + 7); /* to the end, and no more */
    CHECK(!memcmp(a + LEN - 3 * MIB - 7, b, 3 * MIB + 7));
    mem_free(a);
    mem_free(b);
    io_close(f);
}

/* A file system that refuses RWF_NOWAIT has its direct I/O in the pool. */
static void direct_pool_body(struct io *io)
{
    struct io_file *f;
    unsigned char *a = io_buf_get(MIB), *b = io_buf_get(MIB);
    struct iovec v = {a, MIB}, r = {b, MIB};
    fill(a, MIB, 9);
    if (io_open(in_dir("direct"), O_RDWR | O_CREAT | O_DIRECT, 0600, &f) == 0) {
        ((struct real_file *)f)->read_mode = NOWAIT_NEVER;
        CHECK_EQ(io_pwritev(f, &v, 1, 0, 0), MIB);
        CHECK_EQ(io_pwritev(f, &v, 1, MIB, IO_DSYNC), MIB);
        CHECK_EQ(io_preadv(f, &r, 1, MIB), MIB);
        CHECK(!memcmp(a, b, MIB));
        CHECK_EQ(io_fsync(f), 0);
        io_close(f);
    }
    io_buf_put(a, MIB);
    io_buf_put(b, MIB);
}

/* Nothing is written on the loop where a write may hang. */
static void may_hang_body(struct io *io)
{
    struct io_file *f = open_new("slow", 0);
    struct real_file *rf = (struct real_file *)f;
    struct co_group group = CO_GROUP_INIT;
    struct queued q[2];
    unsigned done = 0;
    for (unsigned i = 0; i < 2; i++) {
        rf->may_hang = i;
        q[i] = (struct queued){f, i, &done, 0, false, &group};
        co_group_add(&group, 1);
        CHECK_EQ(loop_run_now(queued_main, &q[i]), 0);
        CHECK(done == 1 || rf->inode->slow_until);
    }
    co_group_wait(&group);
    CHECK_EQ(done, 2);
    rf->may_hang = false;
    io_close(f);
}

struct hung {
    struct pool_op op;
    struct co_group *group;
};

static void hung_main(void *arg)
{
    struct hung *h = arg;
    CHECK_EQ(pool_run(h->op.io->pool, &h->op), 0);
    real_close(&h->op.file->file);
    co_group_done(h->group);
}

/* Mounts that hang, more and busier than the pool has threads for: each gets its share, all of them
 * together theirs, and a local disk goes on. (Opening a pipe hangs until it has another end.) */
static void dead_mounts_body(struct io *io)
{
    enum { MOUNTS = 8, INODES = 5, OPS = 9, N = MOUNTS * INODES * OPS };
    struct real_io *r = real_of(io);
    struct hung *h = mem_calloc(N, sizeof *h);
    struct pool_share *mount = mem_calloc(MOUNTS, sizeof *mount);
    struct pool_share *inode = mem_calloc(MOUNTS * INODES, sizeof *inode);
    struct pool_share all = {.level = SHARE_MOUNTS};
    struct co_group group = CO_GROUP_INIT;
    struct io_file *f = open_new("slow", 0);
    char pipe[256];
    strcpy(pipe, in_dir("pipe"));
    CHECK(mkfifo(pipe, 0600) == 0);
    for (unsigned i = 0; i < N; i++) {
        unsigned k = i / OPS;
        mount[k / INODES] = (struct pool_share){.level = SHARE_MOUNT, .up = &all};
        inode[k].up = &mount[k / INODES];
    }
    for (unsigned i = 0; i < N; i++) {
        h[i].op = (struct pool_op){.kind = POOL_OPEN,
                                   .class = POOL_DATA,
                                   .share = &inode[i / OPS],
                                   .io = r,
                                   .file = mem_zalloc(sizeof(struct real_file)),
                                   .path = pipe};
        h[i].op.file->file.io = io;
        h[i].op.file->fd = -1;
        h[i].group = &group;
        co_group_add(&group, 1);
        CHECK_EQ(loop_run_now(hung_main, &h[i]), 0);
    }
    CHECK_EQ(inode[0].busy[POOL_DATA], 8);
    CHECK_EQ(mount[0].busy[POOL_DATA], 32);
    CHECK_EQ(all.busy[POOL_DATA], 128);
    CHECK_EQ(io_zero(f, 0, 4096, IO_ZERO_PUNCH), 0); /* takes a thread of the pool */
    int other_end = open(pipe, O_RDWR | O_NONBLOCK);
    CHECK(other_end >= 0);
    co_group_wait(&group);
    CHECK_EQ(all.busy[POOL_DATA], 0);
    close(other_end);
    unlink(pipe);
    io_close(f);
    mem_free(inode);
    mem_free(mount);
    mem_free(h);
}

/* ------------------------------------------------------------------ looking for holes */

struct look_try {
    struct io_file *file;
    uint64_t off, len;
    bool data, ended;
    struct io_event done;
};

static void look_main(void *arg)
{
    struct look_try *k = arg;
    CHECK_EQ(io_extent(k->file, k->off, &k->len, &k->data), 0);
    k->ended = true;
    io_event_set(&k->done);
}

/* Looks; returns whether it was answered without leaving the loop. */
static bool look_at(struct look_try *k, struct io_file *f, uint64_t off, uint64_t len)
{
    *k = (struct look_try){.file = f, .off = off, .len = len, .done = IO_EVENT_INIT};
    CHECK_EQ(loop_run_now(look_main, k), 0);
    bool at_once = k->ended;
    CHECK_EQ(io_event_wait(&k->done, soon(loop_io(loop_self()))), 0);
    return at_once;
}

static void scan_main(void *arg)
{
    enum { BLOCK_LEN = 65536 };
    struct look_try *k = arg;
    struct loop *l = loop_self();
    uint64_t turns = 0, len;
    bool data;
    for (uint64_t off = 0; off < k->len; off += len) {
        uint64_t turn = loop_turn_number(l);
        len = k->len - off;
        CHECK_EQ(io_extent(k->file, off, &len, &data), 0);
        CHECK_EQ(len, off + BLOCK_LEN == k->len && !data ? k->len - off : BLOCK_LEN);
        CHECK(data == (off / BLOCK_LEN % 2 == 0));
        turns += loop_turn_number(l) != turn;
    }
    CHECK(turns < k->len / BLOCK_LEN / 8); /* one look told of many */
    /* What we write ourselves is no hole any more. */
    char c = 'x';
    struct iovec v = {&c, 1};
    len = BLOCK_LEN;
    CHECK_EQ(io_extent(k->file, BLOCK_LEN, &len, &data), 0);
    CHECK(!data);
    CHECK_EQ(io_pwritev(k->file, &v, 1, 3 * BLOCK_LEN, 0), 1);
    CHECK_EQ(io_extent(k->file, 3 * BLOCK_LEN, &len, &data), 0);
    CHECK(data);
    io_event_set(&k->done);
}

/* A map of many pieces costs a look for many of them, as long as it is one request's. */
static void scan_body(struct io *io)
{
    enum { N = 100, BLOCK_LEN = 65536 };
    struct io_file *f = open_new("extent", 0);
    static char block[BLOCK_LEN] = "x";
    struct iovec v = {block, sizeof block};
    struct look_try k = {.file = f, .len = 2ull * N * BLOCK_LEN, .done = IO_EVENT_INIT};
    uint64_t len = BLOCK_LEN;
    bool data;
    CHECK_EQ(io_truncate(f, 0), 0);
    CHECK_EQ(io_truncate(f, k.len), 0);
    for (unsigned i = 0; i < N; i++)
        CHECK_EQ(io_pwritev(f, &v, 1, 2ull * i * BLOCK_LEN, 0), BLOCK_LEN);
    CHECK_EQ(io_extent(f, BLOCK_LEN, &len, &data), 0);
    if (!data) { /* else a file system that knows no holes */
        CHECK_EQ(loop_run_now(scan_main, &k), 0);
        CHECK_EQ(io_event_wait(&k.done, soon(io)), 0);
    }
    io_close(f);
}

/* The kernel's lock of the inode may be held by a writer, so nobody waits for it on a loop. Data is
 * remembered, until it is cut away through any open file; holes never are, for others write too. */
static void extent_body(struct io *io)
{
    struct io_file *f = open_new("extent", 0), *g;
    static char block[65536] = "x";
    struct iovec v = {block, sizeof block};
    struct look_try k;
    CHECK_EQ(io_open(in_dir("extent"), O_RDWR, 0, &g), 0);
    CHECK_EQ(io_truncate(f, 8 * MIB), 0);
    CHECK_EQ(io_pwritev(f, &v, 1, MIB, 0), sizeof block);
    CHECK(!look_at(&k, f, 0, 8 * MIB));
    if (k.data) { /* a file system that knows no holes */
        io_close(g);
        io_close(f);
        return;
    }
    CHECK_EQ(k.len, MIB);
    CHECK(look_at(&k, f, MIB, 8 * MIB)); /* found on the way */
    CHECK(k.data && k.len == sizeof block);
    CHECK(look_at(&k, g, MIB + 100, 50));
    CHECK(k.data && k.len == 50);
    CHECK(!look_at(&k, f, MIB + sizeof block, 100));
    CHECK(!k.data && k.len == 100);
    int fd = open(in_dir("extent"), O_WRONLY); /* another process */
    CHECK_EQ(pwrite(fd, block, sizeof block, 4 * MIB), sizeof block);
    CHECK(!look_at(&k, f, 4 * MIB, MIB));
    CHECK(k.data && k.len == sizeof block);
    close(fd);
    CHECK_EQ(io_zero(g, 4 * MIB, sizeof block, IO_ZERO_PUNCH_FAST), 0);
    CHECK(!look_at(&k, f, 4 * MIB, MIB));
    CHECK(!k.data && k.len == MIB);
    CHECK(!look_at(&k, f, MIB, MIB)); /* data that lasts a second */
    CHECK(k.data);
    ((struct real_file *)f)->inode->data_until = io_now(io);
    CHECK(!look_at(&k, f, MIB, MIB));
    CHECK(k.data);
    CHECK_EQ(io_truncate(g, MIB), 0);
    look_at(&k, f, MIB, 100);
    CHECK(!k.data && k.len == 100);
    io_close(g);
    io_close(f);
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

/* ------------------------------------------------------------------ sockets */

struct server {
    struct io_sock *listener;
    struct io_event ended;
};

static void echo_main(void *arg)
{
    struct server *sv = arg;
    struct io_sock *s;
    char buf[5000];
    CHECK_EQ(io_accept(sv->listener, &s), 0);
    for (;;) {
        ssize_t n = io_recv(s, buf, sizeof buf);
        CHECK(n >= 0);
        if (n == 0)
            break;
        struct iovec v = {buf, n};
        CHECK_EQ(io_send(s, &v, 1), 0);
    }
    io_sock_close(s);
    io_event_set(&sv->ended);
}

static void echo_over(struct io *io, struct io_addr *addr, const char *peer_prefix)
{
    struct server sv = {.ended = IO_EVENT_INIT};
    struct tide_error err;
    struct io_sock *c;
    CHECK_EQ(io_listen(addr, 5, &sv.listener, &err), 0);
    CHECK_EQ(loop_spawn(io_loop(io, 1), echo_main, &sv), 0);
    CHECK_EQ(io_connect(addr, &c), 0);
    char peer[300], out[3000], in[3000];
    io_sock_peer(c, peer, sizeof peer);
    CHECK(!strncmp(peer, peer_prefix, strlen(peer_prefix)));
    CHECK_EQ(io_sock_peer_pid(c), addr->type == IO_ADDR_UNIX ? getpid() : -1);
    CHECK_EQ(io_recv_now(c, in, 1), -EAGAIN);
    for (int i = 1; i < 100; i++) {
        fill((unsigned char *)out, i * 30, i);
        struct iovec v[2] = {{out, i}, {out + i, i * 29}};
        CHECK_EQ(io_send(c, v, 2), 0);
        CHECK_EQ(io_recv_all(c, in, i * 30), 0);
        CHECK(!memcmp(in, out, i * 30));
    }
    io_sock_close(c);
    CHECK_EQ(io_event_wait(&sv.ended, soon(io)), 0);
    io_sock_close(sv.listener);
}

static struct io_addr unix_addr(const char *path)
{
    struct io_addr a = {.type = IO_ADDR_UNIX};
    snprintf(a.path, sizeof a.path, "%s", path);
    return a;
}

static void echo_unix_body(struct io *io)
{
    char prefix[300];
    struct io_addr a = unix_addr(in_dir("echo.sock"));
    snprintf(prefix, sizeof prefix, "unix:%s pid %d", a.path, getpid());
    echo_over(io, &a, prefix);
    CHECK(access(a.path, F_OK) < 0); /* the listener took its file away */
    snprintf(a.path, sizeof a.path, "@tidemark-io-test-%d", getpid());
    echo_over(io, &a, "unix:@tidemark-io-test-");
}

static void echo_tcp_body(struct io *io)
{
    struct io_addr a = {.type = IO_ADDR_TCP, .host = "127.0.0.1", .port = "0"};
    echo_over(io, &a, "127.0.0.1:");
    CHECK(atoi(a.port) > 0);
    struct io_addr local = {.type = IO_ADDR_TCP, .host = "localhost", .port = "0"};
    echo_over(io, &local, "127.0.0.1:");
    struct io_addr any = {.type = IO_ADDR_TCP, .host = "", .port = "0", .ipv4 = true};
    struct io_addr six = {.type = IO_ADDR_TCP, .host = "127.0.0.1", .port = "0", .ipv6 = true};
    struct tide_error err;
    struct io_sock *s;
    CHECK_EQ(io_listen(&any, 5, &s, &err), 0);
    io_sock_close(s);
    CHECK(io_listen(&six, 5, &s, &err) < 0); /* that name has no IPv6 address */
    CHECK(strstr(err.msg, "127.0.0.1"));
    CHECK_EQ(io_connect(&a, &s), -ECONNREFUSED);
}

struct listen_try {
    struct io_addr addr;
    int result;
    struct io_event done;
};

static void listen_main(void *arg)
{
    struct listen_try *t = arg;
    struct tide_error err;
    struct io_sock *s = NULL;
    t->result = io_listen(&t->addr, 1, &s, &err);
    io_sock_close(s);
    io_event_set(&t->done);
}

/* Between bind() and listen() the socket of another daemon looks stale, but it holds the lock of
 * the directory. */
static void listen_race_body(struct io *io)
{
    struct listen_try t = {.addr = unix_addr(in_dir("race.sock")), .done = IO_EVENT_INIT};
    struct sockaddr_un sun = {.sun_family = AF_UNIX};
    int dir = open(test_dir, O_RDONLY | O_DIRECTORY), fd = socket(AF_UNIX, SOCK_STREAM, 0);
    CHECK_EQ(flock(dir, LOCK_EX), 0);
    snprintf(sun.sun_path, sizeof sun.sun_path, "%s", t.addr.path);
    CHECK_EQ(bind(fd, (struct sockaddr *)&sun, sizeof sun), 0);
    CHECK_EQ(loop_run_now(listen_main, &t), 0);
    CHECK_EQ(io_event_wait(&t.done, io_now(io) + SECOND / 5), -ETIME);
    CHECK_EQ(listen(fd, 1), 0);
    close(dir);
    CHECK_EQ(io_event_wait(&t.done, soon(io)), 0);
    CHECK_EQ(t.result, -EADDRINUSE);
    close(fd);
    unlink(sun.sun_path);
}

static int tcp_option(struct io_sock *s, int level, int option)
{
    int v = -1;
    socklen_t len = sizeof v;
    CHECK_EQ(getsockopt(((struct real_sock *)s)->fd[0], level, option, &v, &len), 0);
    return v;
}

/* Both ends notice when the machine of the other is gone. */
static void keepalive_body(struct io *io)
{
    struct io_addr addr = {.type = IO_ADDR_TCP, .host = "127.0.0.1", .port = "0"};
    struct tide_error err;
    struct io_sock *l, *s[2];
    CHECK_EQ(io_listen(&addr, 1, &l, &err), 0);
    CHECK_EQ(io_connect(&addr, &s[0]), 0);
    CHECK_EQ(io_accept(l, &s[1]), 0);
    for (int i = 0; i < 2; i++) {
        CHECK_EQ(tcp_option(s[i], SOL_SOCKET, SO_KEEPALIVE), 1);
        CHECK_EQ(tcp_option(s[i], IPPROTO_TCP, TCP_KEEPIDLE), 60);
        io_sock_close(s[i]);
    }
    io_sock_close(l);
}

static void listen_errors_body(struct io *io)
{
    struct tide_error err;
    struct io_sock *s, *t;
    struct io_addr a = unix_addr(in_dir("l.sock")), far = {.type = IO_ADDR_UNIX};
    CHECK_EQ(io_listen(&a, 5, &s, &err), 0);
    CHECK_EQ(io_listen(&a, 5, &t, &err), -EADDRINUSE);
    CHECK(strstr(err.msg, a.path));
    /* Stale: a socket file whose owner is gone without removing it. */
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct io_addr stale = unix_addr(in_dir("stale.sock"));
    struct sockaddr_un sun = {.sun_family = AF_UNIX};
    memcpy(sun.sun_path, stale.path, sizeof sun.sun_path);
    CHECK_EQ(bind(fd, (struct sockaddr *)&sun, sizeof sun), 0);
    CHECK_EQ(listen(fd, 1), 0);
    close(fd);
    CHECK_EQ(io_connect(&stale, &t), -ECONNREFUSED);
    CHECK_EQ(io_listen(&stale, 5, &t, &err), 0);
    /* Somebody put another file there: not ours to remove. */
    CHECK_EQ(io_unlink(stale.path), 0);
    io_close(open_new("stale.sock", 0));
    io_sock_close(t);
    CHECK_EQ(io_unlink(stale.path), 0);
    /* No socket at all. */
    io_close(open_new("file.sock", 0));
    struct io_addr file = unix_addr(in_dir("file.sock"));
    CHECK_EQ(io_listen(&file, 5, &t, &err), -EADDRINUSE);
    CHECK(strstr(err.msg, "not a socket"));
    memset(far.path, 'x', sizeof far.path);
    CHECK_EQ(io_listen(&far, 5, &t, &err), -ENAMETOOLONG);
    CHECK_EQ(io_connect(&far, &t), -ENAMETOOLONG);
    far.path[0] = 0;
    CHECK_EQ(io_listen(&far, 5, &t, &err), -EINVAL);
    io_sock_close(s);
    CHECK_EQ(io_connect(&a, &t), -ENOENT);
}

struct blocked {
    struct io_sock *sock;
    struct io_event started, ended;
    ssize_t result;
    enum { DO_ACCEPT, DO_RECV, DO_SEND } what;
};

static void blocked_main(void *arg)
{
    struct blocked *b = arg;
    struct io_sock *s;
    char buf[10];
    io_event_set(&b->started);
    if (b->what == DO_ACCEPT) {
        b->result = io_accept(b->sock, &s);
    } else if (b->what == DO_RECV) {
        b->result = io_recv(b->sock, buf, sizeof buf);
    } else {
        size_t n = 8 << 20;
        struct iovec v = {mem_zalloc(n), n};
        b->result = io_send(b->sock, &v, 1);
        mem_free(v.iov_base);
    }
    io_event_set(&b->ended);
}

static void shut_blocked(struct io *io, struct io_sock *s, int what, bool let_it_block)
{
    struct blocked b = {.sock = s, .what = what, .started = IO_EVENT_INIT, .ended = IO_EVENT_INIT};
    CHECK_EQ(loop_spawn(io_loop(io, 2), blocked_main, &b), 0);
    CHECK_EQ(io_event_wait(&b.started, soon(io)), 0);
    if (let_it_block)
        for (int i = 0; i < 3; i++)
            io_grace(io);
    io_sock_shutdown(s);
    CHECK_EQ(io_event_wait(&b.ended, soon(io)), 0);
    CHECK_EQ(b.result, -ECANCELED);
}

static void socket_pair(struct io *io, struct io_sock *s[2])
{
    int fd[2];
    CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fd), 0);
    for (int i = 0; i < 2; i++)
        CHECK_EQ(io_sock_from_fds(io, fd[i], fd[i], &s[i]), 0);
}

static void shutdown_body(struct io *io)
{
    struct tide_error err;
    struct io_sock *s[2];
    for (int round = 0; round < 40; round++) {
        bool late = round % 2;
        struct io_addr a = unix_addr(in_dir("shut.sock"));
        struct io_addr t = {.type = IO_ADDR_TCP, .host = "127.0.0.1", .port = "0"};
        CHECK_EQ(io_listen(round % 4 < 2 ? &a : &t, 5, &s[0], &err), 0);
        shut_blocked(io, s[0], DO_ACCEPT, late);
        CHECK_EQ(io_accept(s[0], &s[1]), -ECANCELED);
        io_sock_close(s[0]);
        for (int what = DO_RECV; what <= DO_SEND; what++) {
            socket_pair(io, s);
            shut_blocked(io, s[0], what, late);
            io_sock_close(s[0]);
            io_sock_close(s[1]);
        }
        /* No socket, nothing that shutdown(2) could do: a pipe that stays silent. */
        int fd[2];
        CHECK_EQ(pipe2(fd, O_CLOEXEC), 0);
        CHECK_EQ(io_sock_from_fds(io, fd[0], fd[1], &s[0]), 0);
        shut_blocked(io, s[0], DO_RECV, late);
        io_sock_close(s[0]);
    }
}

static void pipe_body(struct io *io)
{
    int fd[2];
    char buf[8];
    struct io_sock *s;
    struct iovec v = {"hello", 5};
    CHECK_EQ(pipe2(fd, O_CLOEXEC), 0);
    CHECK_EQ(io_sock_from_fds(io, fd[0], fd[1], &s), 0);
    CHECK_EQ(io_recv_now(s, buf, 8), -EAGAIN);
    CHECK_EQ(io_send(s, &v, 1), 0);
    CHECK_EQ(io_recv(s, buf, 8), 5);
    CHECK_EQ(io_sock_peer_pid(s), -1);
    io_sock_close(s);
    CHECK_EQ(io_sock_from_fds(io, 9999, 9999, &s), -EBADF);
    io_sock_close(NULL);
}

struct reader {
    struct io_sock *sock;
    size_t total;
    struct io_event ended;
};

/* Reads in small bites with pauses, so that the sender's buffer is full most of the time. */
static void slow_reader(void *arg)
{
    struct reader *r = arg;
    unsigned char buf[7777];
    size_t at = 0;
    while (at < r->total) {
        ssize_t n = io_recv(r->sock, buf, sizeof buf);
        CHECK(n > 0);
        for (ssize_t i = 0; i < n; i++, at++)
            if (buf[i] != (unsigned char)(at * 7 + (at >> 12)))
                CHECK(!"wrong byte");
        if (at % 5 == 0)
            loop_pause();
    }
    io_event_set(&r->ended);
}

static void large_send_body(struct io *io)
{
    enum { N = 8 << 20, PIECES = 2500 };
    struct io_sock *s[2];
    socket_pair(io, s);
    struct reader r = {.sock = s[1], .total = N, .ended = IO_EVENT_INIT};
    unsigned char *a = mem_alloc(N);
    struct iovec *v = mem_calloc(PIECES, sizeof *v);
    for (size_t i = 0; i < N; i++)
        a[i] = i * 7 + (i >> 12);
    for (size_t i = 0; i < PIECES; i++) {
        size_t from = N / PIECES * i, to = i + 1 == PIECES ? N : N / PIECES * (i + 1);
        v[i] = (struct iovec){a + from, to - from};
    }
    CHECK_EQ(loop_spawn(io_loop(io, 1), slow_reader, &r), 0);
    CHECK_EQ(io_send(s[0], v, PIECES), 0);
    CHECK_EQ(io_event_wait(&r.ended, soon(io)), 0);
    io_sock_close(s[0]);
    io_sock_close(s[1]);
    mem_free(a);
    mem_free(v);
}

/* Receives one byte and says so. */
static void move_step(void *arg)
{
    struct reader *r = arg;
    char c;
    CHECK_EQ(io_recv(r->sock, &c, 1), 1);
    CHECK_EQ(c, (char)r->total);
    io_event_set(&r->ended);
}

static void move_body(struct io *io)
{
    struct io_sock *s[2];
    socket_pair(io, s);
    for (int i = 0; i < 300; i++) {
        struct reader r = {.sock = s[1], .total = i, .ended = IO_EVENT_INIT};
        CHECK_EQ(loop_spawn(io_loop(io, i % N_LOOPS), move_step, &r), 0);
        if (i % 3)
            io_grace(io);
        char c = i;
        struct iovec v = {&c, 1};
        CHECK_EQ(io_send(s[0], &v, 1), 0);
        CHECK_EQ(io_event_wait(&r.ended, soon(io)), 0);
    }
    io_sock_close(s[0]);
    char c;
    CHECK_EQ(io_recv_all(s[1], &c, 1), -ECONNRESET);
    io_sock_close(s[1]);
}

/* Both directions wait on one socket at the same time. */
static void both_ways_body(struct io *io)
{
    struct io_sock *s[2];
    socket_pair(io, s);
    struct blocked send = {
        .sock = s[0], .what = DO_SEND, .started = IO_EVENT_INIT, .ended = IO_EVENT_INIT};
    struct blocked recv = send;
    recv.what = DO_RECV;
    CHECK_EQ(loop_spawn(io_loop(io, 2), blocked_main, &send), 0);
    CHECK_EQ(loop_spawn(io_loop(io, 2), blocked_main, &recv), 0);
    for (int i = 0; i < 3; i++)
        io_grace(io);
    struct iovec v = {"0123456789", 10};
    CHECK_EQ(io_send(s[1], &v, 1), 0); /* wakes the receiver alone */
    CHECK_EQ(io_event_wait(&recv.ended, soon(io)), 0);
    CHECK_EQ(recv.result, 10);
    char *buf = mem_alloc(8 << 20);
    CHECK_EQ(io_recv_all(s[1], buf, 8 << 20), 0);
    CHECK_EQ(io_event_wait(&send.ended, soon(io)), 0);
    CHECK_EQ(send.result, 0);
    mem_free(buf);
    io_sock_close(s[0]);
    io_sock_close(s[1]);
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
    return rc == 0 && ns >= SECOND / 5 && ns < 10 * (uint64_t)SECOND ? 42 : 2;
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
ON_BOTH(file)
ON_BOTH(many_pieces)
ON_BOTH(zero)
ON_BOTH(copy)
ON_BOTH(lock)
ON_BOTH(names)
ON_BOTH(direct)
ON_BOTH(direct_heavy)
ON_BOTH(sticky_sync)
ON_BOTH(durable_write)
ON_BOTH(writers)
ON_BOTH(slow_writers)
ON_BOTH(flushers)
ON_BOTH(role)
ON_BOTH(slow)
ON_BOTH(many_at_once)
ON_BOTH(large_read)
ON_BOTH(direct_pool)
ON_BOTH(may_hang)
ON_BOTH(dead_mounts)
ON_BOTH(extent)
ON_BOTH(scan)
ON_BOTH(spin_learns)
ON_BOTH(echo_unix)
ON_BOTH(echo_tcp)
ON_BOTH(listen_errors)
ON_BOTH(listen_race)
ON_BOTH(keepalive)
ON_BOTH(shutdown)
ON_BOTH(pipe)
ON_BOTH(large_send)
ON_BOTH(move)
ON_BOTH(both_ways)
ON_BOTH(signal)

static int make_dir(void **state)
{
    const char *tmp = getenv("TMPDIR");
    snprintf(test_dir, sizeof test_dir, "%s/io_test.XXXXXX", tmp ? tmp : "/tmp");
    return mkdtemp(test_dir) ? 0 : -1;
}

static int remove_dir(void **state)
{
    static const char *const names[] = {
        "plain",   "pieces", "zero", "from", "to",    "locked", "direct",    "shared",
        "flushed", "role",   "slow", "fifo", "large", "extent", "file.sock", "durable",
    };
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        unlink(in_dir(names[i]));
    return rmdir(test_dir); /* fails when a test left something */
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
        BOTH(file),
        BOTH(many_pieces),
        BOTH(zero),
        BOTH(copy),
        BOTH(lock),
        BOTH(names),
        BOTH(direct),
        BOTH(direct_heavy),
        BOTH(direct_heavy_limited),
        BOTH(sticky_sync),
        BOTH(durable_write),
        BOTH(writers),
        BOTH(slow_writers),
        BOTH(flushers),
        BOTH(role),
        BOTH(slow),
        BOTH(many_at_once),
        BOTH(large_read),
        BOTH(direct_pool),
        BOTH(may_hang),
        BOTH(dead_mounts),
        BOTH(extent),
        BOTH(scan),
        BOTH(spin_learns),
        BOTH(echo_unix),
        BOTH(echo_tcp),
        BOTH(listen_errors),
        BOTH(listen_race),
        BOTH(keepalive),
        BOTH(shutdown),
        BOTH(pipe),
        BOTH(large_send),
        BOTH(move),
        BOTH(both_ways),
        BOTH(signal),
        cmocka_unit_test(auto_falls_back),
        cmocka_unit_test(hung_threads_are_left),
    };
    return cmocka_run_group_tests_name("io", tests, make_dir, remove_dir);
}
