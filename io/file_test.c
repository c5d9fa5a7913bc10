/* SPDX-License-Identifier: Apache-2.0 */
/* Tests of files on the real engines: what each call does, and where holes are. */
#include <errno.h>
#include <linux/capability.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include "base/bytes.h"
#include "base/mem.h"
#include "co/sync.h"
#include "io/io_test.h"
#include "io/real.h"

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
ON_BOTH(extent)
ON_BOTH(scan)

static int remove_dir(void **state)
{
    return remove_files((const char *const[]){"plain", "pieces", "zero", "from", "to", "locked",
                                              "direct", "extent", "durable", NULL});
}

int main(int argc, char **argv)
{
    if (argc == 2)
        cmocka_set_test_filter(argv[1]);
    const struct CMUnitTest tests[] = {
        BOTH(file),        BOTH(many_pieces),   BOTH(zero),
        BOTH(copy),        BOTH(lock),          BOTH(names),
        BOTH(direct),      BOTH(direct_heavy),  BOTH(direct_heavy_limited),
        BOTH(sticky_sync), BOTH(durable_write), BOTH(extent),
        BOTH(scan),
    };
    return cmocka_run_group_tests_name("io files", tests, make_dir, remove_dir);
}
