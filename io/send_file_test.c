/* SPDX-License-Identifier: Apache-2.0 */
/* Tests of io_send_file() on the real engines: a reply out of the page cache. The peer checks each
 * byte; what the function says it has sent is what arrives. */
#include <errno.h>
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/mem.h"
#include "io/io_test.h"
#include "io/real.h"

#define FILE_BYTES (8u << 20)
#define HEAD "a head of some bytes"
#define HEAD_LEN (sizeof HEAD - 1)

static unsigned char byte_at(uint64_t i)
{
    return (unsigned char)(i * 7 + (i >> 12));
}

/* A client and a server end, both of the engine's own making, and a file. */
struct bench {
    struct io *io;
    struct io_sock *listener, *client, *server;
    struct io_file *file;
    bool cached; /* this machine tells what is cached */
};

static void make_file(const char *path)
{
    unsigned char *data = mem_alloc(FILE_BYTES);
    for (uint64_t i = 0; i < FILE_BYTES; i++)
        data[i] = byte_at(i);
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    CHECK(fd >= 0);
    CHECK_EQ(write(fd, data, FILE_BYTES), FILE_BYTES);
    CHECK_EQ(fsync(fd), 0);
    close(fd);
    mem_free(data);
}

static void read_it(struct bench *b)
{
    char *buf = mem_aligned(4096, FILE_BYTES);
    struct iovec iov = {buf, FILE_BYTES};
    CHECK_EQ(io_preadv(b->file, &iov, 1, 0), FILE_BYTES); /* now it is cached, unless direct */
    mem_free(buf);
}

static void open_bench(struct bench *b, struct io *io, int flags)
{
    struct tide_error err;
    struct io_addr addr = {.type = IO_ADDR_UNIX};
    *b = (struct bench){.io = io};
    snprintf(addr.path, sizeof addr.path, "%s", in_dir("s.sock"));
    make_file(in_dir("sent"));
    CHECK_EQ(io_listen(&addr, 4, &b->listener, &err), 0);
    CHECK_EQ(io_connect(&addr, &b->client), 0);
    CHECK_EQ(io_accept(b->listener, &b->server), 0);
    CHECK_EQ(io_open(in_dir("sent"), O_RDWR | flags, 0, &b->file), 0);
    read_it(b);
    b->cached = real_is_cached((struct real_file *)b->file, 0, FILE_BYTES);
}

/* What went within `ns`; out of memory in any case. */
static ssize_t send_for(struct bench *b, struct iovec first, uint64_t off, uint64_t len,
                        uint64_t ns)
{
    ssize_t n = -EOPNOTSUPP;
    for (int tries = 0; n == -EOPNOTSUPP && tries < 1000; tries++) {
        read_it(b);
        n = io_send_file(b->server, first, b->file, off, len, io_now(b->io) + ns);
    }
    return n;
}

/* All that is asked for. The machine may want the memory of the cache at any time: what it takes
 * away is read again, and the rest sent from there on. */
static uint64_t send_it(struct bench *b, struct iovec first, uint64_t off, uint64_t len)
{
    const struct iovec none = {NULL, 0};
    uint64_t done = 0, total = first.iov_len + len;
    for (int tries = 0; done < total && tries < 1000; tries++) {
        uint64_t sent = done - MIN(done, first.iov_len);
        ssize_t n = io_send_file(b->server, done ? none : first, b->file, off + sent, len - sent,
                                 soon(b->io));
        CHECK(n == -EOPNOTSUPP || n > 0);
        CHECK(done || n < 0 || n >= (ssize_t)first.iov_len);
        if (n == -EOPNOTSUPP)
            read_it(b);
        else
            done += n;
    }
    return done;
}

static void close_bench(struct bench *b)
{
    io_sock_close(b->client);
    io_sock_close(b->server);
    io_sock_close(b->listener);
    io_close(b->file);
    unlink(in_dir("sent"));
}

static const struct iovec head = {HEAD, HEAD_LEN};

struct taker {
    struct io_sock *sock;
    uint64_t off, len; /* of the file, behind a head */
    bool slowly;
    struct io_event ended;
};

static void take(void *arg)
{
    struct taker *t = arg;
    unsigned char buf[5000];
    CHECK_EQ(io_recv_all(t->sock, buf, HEAD_LEN), 0);
    CHECK(!memcmp(buf, HEAD, HEAD_LEN));
    for (uint64_t done = 0; done < t->len;) {
        ssize_t n = io_recv(t->sock, buf, MIN(t->slowly ? 777 : sizeof buf, t->len - done));
        CHECK(n > 0);
        for (ssize_t i = 0; i < n; i++, done++)
            CHECK(buf[i] == byte_at(t->off + done));
        if (t->slowly)
            loop_pause();
    }
    io_event_set(&t->ended);
}

/* Any offset and length arrives, the sender's buffer being full most of the time. */
static void all_of_it_body(struct io *io)
{
    static const struct {
        uint64_t off, len;
    } range[] = {{0, 65536}, {1, 65535}, {4095, 4098}, {123457, 5000001}, {FILE_BYTES - 1, 1}};
    struct bench b;
    open_bench(&b, io, 0);
    for (size_t i = 0; b.cached && i < sizeof range / sizeof *range; i++) {
        struct taker t = {b.client, range[i].off, range[i].len, i % 2, IO_EVENT_INIT};
        CHECK_EQ(loop_spawn(io_loop(io, 1), take, &t), 0);
        CHECK_EQ(send_it(&b, head, t.off, t.len), HEAD_LEN + t.len);
        CHECK_EQ(io_event_wait(&t.ended, soon(io)), 0);
    }
    close_bench(&b);
}

/* A peer that takes nothing: the deadline ends it, and the rest can be sent from there on. */
static void deadline_body(struct io *io)
{
    struct bench b;
    open_bench(&b, io, 0);
    if (b.cached) {
        struct taker t = {b.client, 5, FILE_BYTES - 5, false, IO_EVENT_INIT};
        const struct iovec none = {NULL, 0};
        uint64_t sent = 0;
        ssize_t n = send_for(&b, head, t.off, t.len, 5000000);
        CHECK(n > (ssize_t)HEAD_LEN && n < FILE_BYTES - 5);
        for (sent = n - HEAD_LEN; n > 0; sent += n) /* until it takes nothing more */
            CHECK((n = send_for(&b, none, t.off + sent, t.len - sent, 1000000)) >= 0);
        CHECK_EQ(loop_spawn(io_loop(io, 1), take, &t), 0);
        CHECK_EQ(send_it(&b, none, t.off + sent, t.len - sent), t.len - sent);
        CHECK_EQ(io_event_wait(&t.ended, soon(io)), 0);
    }
    close_bench(&b);
}

/* Pages that somebody else holds for a moment stay; those of a memory file system always. */
static bool drop_cached(struct io_file *f)
{
    bool cached = true;
    int fd = open(in_dir("sent"), O_RDONLY);
    CHECK(fd >= 0);
    for (int tries = 0; cached && tries < 1000; tries++) {
        CHECK_EQ(posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED), 0);
        cached = real_is_cached((struct real_file *)f, 0, 1 << 20);
    }
    close(fd);
    return !cached;
}

/* What is not to be had from memory, or not at all, is refused before anything is sent. */
static void refused_body(struct io *io)
{
    struct bench b;
    char c;
    int fd[2];
    struct io_sock *foreign;
    open_bench(&b, io, 0);
    CHECK_EQ(io_send_file(b.server, head, b.file, FILE_BYTES - 100, 101, soon(io)), -EOPNOTSUPP);
    CHECK_EQ(io_send_file(b.server, head, b.file, INT64_MAX - 5, 100, soon(io)), -EOPNOTSUPP);
    CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fd), 0);
    CHECK_EQ(io_sock_from_fds(io, fd[0], fd[0], &foreign), 0); /* not ours to make non-blocking */
    CHECK_EQ(io_send_file(foreign, head, b.file, 0, 4096, soon(io)), -EOPNOTSUPP);
    io_sock_close(foreign);
    close(fd[1]);
    if (b.cached && drop_cached(b.file))
        CHECK_EQ(io_send_file(b.server, head, b.file, 0, 1 << 20, soon(io)), -EOPNOTSUPP);
    CHECK_EQ(io_recv_now(b.client, &c, 1), -EAGAIN); /* nothing has come */
    close_bench(&b);

    open_bench(&b, io, O_DIRECT);
    struct io_stat st;
    CHECK_EQ(io_fstat(b.file, &st), 0);
    CHECK(!b.cached || st.align == 1);
    close_bench(&b);
}

/* The socket is left as it was: a receive that waits is not disturbed. */
static void both_ways_body(struct io *io)
{
    struct bench b;
    open_bench(&b, io, 0);
    for (int i = 0; b.cached && i < 50; i++) {
        struct taker t = {b.client, i * 1000u, 70000, false, IO_EVENT_INIT};
        struct iovec v = {"x", 1};
        char c = 0;
        CHECK_EQ(loop_spawn(io_loop(io, 1), take, &t), 0);
        CHECK_EQ(send_it(&b, head, t.off, t.len), HEAD_LEN + t.len);
        CHECK_EQ(io_event_wait(&t.ended, soon(io)), 0);
        CHECK_EQ(io_send(b.client, &v, 1), 0);
        CHECK_EQ(io_recv_all(b.server, &c, 1), 0);
        CHECK_EQ(c, 'x');
        CHECK_EQ(fcntl(((struct real_sock *)b.server)->fd[SOCK_WR], F_GETFL) & O_NONBLOCK, 0);
    }
    close_bench(&b);
}

static void end_of_peer_body(struct io *io)
{
    struct bench b;
    open_bench(&b, io, 0);
    if (b.cached) {
        io_sock_close(b.client);
        b.client = NULL;
        ssize_t r = send_for(&b, head, 0, 65536, 20 * (uint64_t)SECOND);
        CHECK(r == -EPIPE || r == -ECONNRESET);
        io_sock_shutdown(b.server);
        CHECK_EQ(io_send_file(b.server, head, b.file, 0, 65536, soon(io)), -ECANCELED);
    }
    close_bench(&b);
}

ON_BOTH(all_of_it)
ON_BOTH(deadline)
ON_BOTH(refused)
ON_BOTH(both_ways)
ON_BOTH(end_of_peer)

/* Not in /tmp, which may be a memory file system, where all is cached always. */
static int make_disk_dir(void **state)
{
    return make_dir_in("/var/tmp");
}

static int remove_dir(void **state)
{
    return rmdir(test_dir); /* fails when a test left something */
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        BOTH(all_of_it), BOTH(deadline), BOTH(refused), BOTH(both_ways), BOTH(end_of_peer),
    };
    return cmocka_run_group_tests(tests, make_disk_dir, remove_dir);
}
