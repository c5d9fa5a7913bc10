/* SPDX-License-Identifier: Apache-2.0 */
/* Tests of sockets and pipes on the real engines. */
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "base/bytes.h"
#include "base/mem.h"
#include "co/sync.h"
#include "io/io_test.h"
#include "io/real.h"

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

static int remove_dir(void **state)
{
    return remove_files((const char *const[]){"file.sock", NULL});
}

int main(int argc, char **argv)
{
    if (argc == 2)
        cmocka_set_test_filter(argv[1]);
    const struct CMUnitTest tests[] = {
        BOTH(echo_unix), BOTH(echo_tcp), BOTH(listen_errors), BOTH(listen_race), BOTH(keepalive),
        BOTH(shutdown),  BOTH(pipe),     BOTH(large_send),    BOTH(move),        BOTH(both_ways),
    };
    return cmocka_run_group_tests_name("io sockets", tests, make_dir, remove_dir);
}
