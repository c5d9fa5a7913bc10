/* SPDX-License-Identifier: Apache-2.0 */
/* Sockets of the real engines.
 *
 * A system call is tried at once, without waiting; only when it says EAGAIN the backend is asked to
 * watch the descriptor (`arm`) and the coroutine waits for the event of its direction. An event may
 * be set once too often; then the call is simply tried in vain once more. That makes shutdown easy:
 * set the flag, shutdown(2), set both events, from any thread.
 *
 * A socket is registered with the loop that last waited for it, and moves when used on another.
 *
 * A UNIX listener remembers the inode of its file and removes only that. A file that is there
 * already is stale if connecting to it is refused; then it is replaced. The directory is locked
 * (flock) meanwhile, for between bind() and listen() a daemon's socket looks stale. */
#include <assert.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/mem.h"
#include "io/real.h"

enum {
    SEND_BUFFER = 1 << 19, /* the kernel doubles it */
    SEND_PIECE = 1 << 20,
    CONNECT_WAIT_S = 10, /* then the peer is taken for dead; a pool thread hangs on it */
    DIR_LOCK_TRIES = 100,
    DIR_LOCK_EVERY_NS = 10000000,
};

static struct real_sock *sock_of(struct io_sock *s)
{
    return (struct real_sock *)s;
}

/* ------------------------------------------------------------------ making and ending */

/* NULL: no memory; the descriptors stay the caller's. */
static struct real_sock *sock_new(struct io *io, int rfd, int wfd)
{
    struct real_sock *s = mem_zalloc(sizeof *s);
    if (!s)
        return NULL;
    s->sock.io = io;
    s->fd[SOCK_RD] = rfd;
    s->fd[SOCK_WR] = wfd;
    s->old_flags[SOCK_RD] = s->old_flags[SOCK_WR] = -1;
    s->msg.fn = real_sock_free_msg;
    return s;
}

/* A peer whose machine is gone says nothing: asked now and then, it is given up after two minutes.
 */
static void keep_alive(int fd)
{
    int on = 1, idle_s = 60, every_s = 15, times = 4;
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle_s, sizeof idle_s);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &every_s, sizeof every_s);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &times, sizeof times);
}

/* What a UNIX socket holds for a peer that is busy is 208 KiB by default, less than a batch of
 * replies: the sender would sleep in the middle of each. Privilege may go beyond the system's
 * limit. (TCP grows by itself.) */
static void widen(int fd)
{
    int bytes = SEND_BUFFER;
    if (setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &bytes, sizeof bytes) < 0)
        setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
}

/* A connection of ours. It stays a blocking descriptor: every call says MSG_DONTWAIT, and a ring
 * waits only on blocking ones. Takes `fd` in any case. */
static int sock_from_own(struct io *io, int fd, struct real_sock **out)
{
    int on = 1, domain = 0;
    socklen_t len = sizeof domain;
    struct real_sock *s = sock_new(io, fd, fd);
    if (!s) {
        close(fd);
        return -ENOMEM;
    }
    getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &len);
    s->is_socket = s->own = true;
    s->is_unix = domain == AF_UNIX;
    if (s->is_unix)
        widen(fd);
    if (domain == AF_INET || domain == AF_INET6) {
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        keep_alive(fd);
    }
    *out = s;
    return 0;
}

int real_from_fds(struct io *io, int rfd, int wfd, struct io_sock **out)
{
    struct stat st;
    if (fstat(rfd, &st) < 0 || fcntl(wfd, F_GETFD) < 0)
        return -errno;
    struct real_sock *s = sock_new(io, rfd, wfd);
    if (!s)
        return -ENOMEM;
    if (S_ISSOCK(st.st_mode) && rfd == wfd) {
        int domain = 0;
        socklen_t len = sizeof domain;
        getsockopt(rfd, SOL_SOCKET, SO_DOMAIN, &domain, &len);
        s->is_socket = true;
        s->is_unix = domain == AF_UNIX;
    }
    for (int dir = 0; dir < 2 && !s->is_socket; dir++) {
        int flags = fcntl(s->fd[dir], F_GETFL);
        if (flags < 0 || (flags & O_NONBLOCK))
            continue;
        if (fcntl(s->fd[dir], F_SETFL, flags | O_NONBLOCK) == 0)
            s->old_flags[dir] = flags;
    }
    *out = &s->sock;
    return 0;
}

void real_sock_free(struct real_sock *s)
{
    mem_free(s);
}

void real_sock_free_msg(struct loop_msg *m)
{
    real_sock_free((struct real_sock *)((char *)m - offsetof(struct real_sock, msg)));
}

static void remove_own_path(struct real_sock *s)
{
    struct stat st;
    if (s->own_path && lstat(s->path, &st) == 0 && st.st_dev == s->path_dev &&
        st.st_ino == s->path_ino)
        unlink(s->path);
}

/* Standard input, output and error stay open: another open() must not become one of them. */
static void close_fds(const int fd[2], const int old_flags[2])
{
    for (int dir = 1; dir >= 0; dir--) {
        if (old_flags[dir] >= 0)
            fcntl(fd[dir], F_SETFL, old_flags[dir]);
        if (fd[dir] > STDERR_FILENO && (dir == 0 || fd[0] != fd[1]))
            close(fd[dir]);
    }
}

void real_sock_close(struct io_sock *sock)
{
    struct real_sock *s = sock_of(sock);
    int fd[2] = {s->fd[0], s->fd[1]}, old_flags[2] = {s->old_flags[0], s->old_flags[1]};
    remove_own_path(s);
    sock_io(s)->be->detach(s); /* `s` may be gone */
    close_fds(fd, old_flags);
}

void real_shutdown(struct io_sock *sock)
{
    struct real_sock *s = sock_of(sock);
    atomic_store(&s->shut, true);
    if (s->is_socket)
        shutdown(s->fd[0], SHUT_RDWR);
    io_event_set(&s->ready[SOCK_RD]);
    io_event_set(&s->ready[SOCK_WR]);
}

/* ------------------------------------------------------------------ waiting */

void sock_ready(struct real_sock *s, int dir)
{
    s->armed &= ~(1u << dir);
    io_event_set(&s->ready[dir]);
}

static co_fn int wait_ready_until(struct real_sock *s, int dir, uint64_t deadline)
{
    struct real_loop *rl = loop_self()->engine;
    int r = sock_io(s)->be->arm(s, dir);
    if (r < 0)
        return r;
    if (r > 0) { /* always ready, yet it said EAGAIN: be fair to the others and try again */
        loop_pause();
        return 0;
    }
    rl->waits++;
    r = io_event_wait(&s->ready[dir], deadline);
    rl->waits--;
    return r;
}

static co_fn int wait_ready(struct real_sock *s, int dir)
{
    return wait_ready_until(s, dir, IO_FOREVER);
}

/* ------------------------------------------------------------------ receive and send */

static ssize_t recv_once(struct real_sock *s, void *buf, size_t len)
{
    ssize_t r;
    do
        r = s->is_socket ? recv(s->fd[SOCK_RD], buf, len, MSG_DONTWAIT)
                         : read(s->fd[SOCK_RD], buf, len);
    while (r < 0 && errno == EINTR);
    return r < 0 ? -errno : r;
}

static co_fn ssize_t recv_waiting(struct real_sock *s, void *buf, size_t len)
{
    struct real_loop *rl = loop_self()->engine;
    ssize_t r;
    rl->waits++;
    do
        r = sock_io(s)->be->recv(s, buf, len);
    while (r == -EINTR);
    rl->waits--;
    return r;
}

co_fn ssize_t real_recv(struct io_sock *sock, void *buf, size_t len, bool now)
{
    struct real_sock *s = sock_of(sock);
    const struct backend *be = sock_io(s)->be;
    for (;;) {
        if (atomic_load(&s->shut))
            return -ECANCELED;
        ssize_t r = recv_once(s, buf, len);
        if (r == -EAGAIN && !now && s->is_socket && be->recv)
            r = recv_waiting(s, buf, len);
        if (r != -EAGAIN || now)
            return r == 0 && atomic_load(&s->shut) ? -ECANCELED : r;
        r = wait_ready(s, SOCK_RD);
        if (r < 0)
            return r;
    }
}

static ssize_t send_once(struct real_sock *s, const struct iovec *iov, int n)
{
    struct msghdr msg = {.msg_iov = (struct iovec *)iov, .msg_iovlen = n};
    ssize_t r;
    do
        r = s->is_socket ? sendmsg(s->fd[SOCK_WR], &msg, MSG_NOSIGNAL | MSG_DONTWAIT)
                         : writev(s->fd[SOCK_WR], iov, n);
    while (r < 0 && errno == EINTR);
    return r < 0 ? -errno : r;
}

co_fn int real_send(struct io_sock *sock, const struct iovec *iov, int n)
{
    struct real_sock *s = sock_of(sock);
    size_t total = iov_bytes(iov, n), done = 0;
    while (done < total) {
        struct iovec tmp[N_IOV_TMP];
        int k;
        const struct iovec *rest = iov_after(iov, n, done, tmp, &k);
        if (atomic_load(&s->shut))
            return -ECANCELED;
        ssize_t r = send_once(s, rest, k);
        if (r >= 0) {
            done += r;
            continue;
        }
        if (r == -EAGAIN)
            r = wait_ready(s, SOCK_WR);
        if (r < 0)
            return atomic_load(&s->shut) ? -ECANCELED : r;
    }
    return 0;
}

/* ------------------------------------------------------------------ from a file */

/* sendfile(2) knows no MSG_DONTWAIT, so the description says it for the length of the call. Nobody
 * else uses it: requests of the ring look at it when they are handed over, which is not now. */
static ssize_t sendfile_once(struct real_sock *s, struct real_file *f, uint64_t off, uint64_t len)
{
    off64_t at = (off64_t)off;
    ssize_t r;
    if (fcntl(s->fd[SOCK_WR], F_SETFL, O_NONBLOCK) < 0)
        return -EOPNOTSUPP;
    do
        r = sendfile(s->fd[SOCK_WR], f->fd, &at, len);
    while (r < 0 && errno == EINTR);
    r = r < 0 ? -errno : r;
    fcntl(s->fd[SOCK_WR], F_SETFL, 0);
    return r == 0 || r == -EINVAL || r == -ENOSYS ? -EOPNOTSUPP : r;
}

static ssize_t send_head(struct real_sock *s, struct iovec head, size_t done)
{
    ssize_t r;
    do
        r = send(s->fd[SOCK_WR], (char *)head.iov_base + done, head.iov_len - done,
                 MSG_NOSIGNAL | MSG_DONTWAIT | MSG_MORE);
    while (r < 0 && errno == EINTR);
    return r < 0 ? -errno : r;
}

/* Piece by piece: each is looked for in the cache when its turn comes, and after each others of the
 * loop have theirs, for a quick client could keep one call going for as long as the file is. */
co_fn ssize_t real_send_file(struct io_sock *sock, struct iovec head, struct io_file *file,
                             uint64_t off, uint64_t len, uint64_t deadline)
{
    struct real_sock *s = sock_of(sock);
    struct real_file *f = (struct real_file *)file;
    uint64_t done = 0, total = head.iov_len + len, end = 0; /* of the piece, from `off` on */
    bool looked = false;
    if (!s->own || off > INT64_MAX || len > INT64_MAX - off)
        return -EOPNOTSUPP;
    while (done < total) {
        uint64_t d = done - MIN(done, head.iov_len);
        if (d == end) {
            if (done > head.iov_len)
                loop_pause();
            end += MIN(len - end, SEND_PIECE);
            looked = false;
        }
        if (!looked && !real_is_cached(f, off + d, end - d))
            return done ? (ssize_t)done : -EOPNOTSUPP;
        looked = true;
        if (atomic_load(&s->shut))
            return -ECANCELED;
        ssize_t r =
            done < head.iov_len ? send_head(s, head, done) : sendfile_once(s, f, off + d, end - d);
        if (r == -EAGAIN) {
            r = wait_ready_until(s, SOCK_WR, deadline);
            looked = false; /* it was a while ago */
        }
        if (r == -ETIME || (r == -EOPNOTSUPP && done))
            break;
        if (r < 0)
            return atomic_load(&s->shut) ? -ECANCELED : r;
        done += r;
    }
    return (ssize_t)done;
}

bool real_gone(struct io_sock *sock)
{
    struct real_sock *s = sock_of(sock);
    struct pollfd p = {.fd = s->fd[SOCK_RD], .events = POLLRDHUP};
    return poll(&p, 1, 0) == 1 && (p.revents & (POLLRDHUP | POLLHUP | POLLERR | POLLNVAL));
}

co_fn int real_accept(struct io_sock *sock, struct io_sock **out)
{
    struct real_sock *s = sock_of(sock), *conn;
    for (;;) {
        if (atomic_load(&s->shut))
            return -ECANCELED;
        int fd = accept4(s->fd[0], NULL, NULL, SOCK_CLOEXEC);
        if (fd >= 0) {
            int r = sock_from_own(sock->io, fd, &conn);
            if (r == 0)
                *out = &conn->sock;
            return r;
        }
        if (errno == EINTR || errno == ECONNABORTED)
            continue;
        if (errno != EAGAIN)
            return atomic_load(&s->shut) ? -ECANCELED : -errno;
        int r = wait_ready(s, SOCK_RD);
        if (r < 0)
            return r;
    }
}

/* ------------------------------------------------------------------ addresses */

/* 0, or why the path cannot be one. '@' stands for the zero byte of an abstract name. */
static int unix_address(const char *path, struct sockaddr_un *sun, socklen_t *len)
{
    size_t n = strnlen(path, sizeof sun->sun_path);
    bool abstract = path[0] == '@';
    if (n == 0 || (abstract && n == 1))
        return -EINVAL;
    if (n >= sizeof sun->sun_path)
        return -ENAMETOOLONG;
    *sun = (struct sockaddr_un){.sun_family = AF_UNIX};
    memcpy(sun->sun_path, path, n);
    if (abstract)
        sun->sun_path[0] = 0;
    *len = offsetof(struct sockaddr_un, sun_path) + n + !abstract;
    return 0;
}

static int unix_address_checked(const char *path, struct sockaddr_un *sun, socklen_t *len,
                                struct tide_error *err)
{
    int r = unix_address(path, sun, len);
    if (r == -ENAMETOOLONG)
        return tide_fail(err, r, "socket path '%.*s...' is too long: %zu bytes at most", 40, path,
                         sizeof sun->sun_path - 1);
    if (r < 0)
        return tide_fail(err, r, "socket path is empty");
    return 0;
}

/* getaddrinfo() with what the user asked for; its errors as errno. */
static int resolve(const struct io_addr *a, bool passive, struct addrinfo **out)
{
    struct addrinfo hints = {
        .ai_family = a->ipv4 == a->ipv6 ? AF_UNSPEC
                     : a->ipv4          ? AF_INET
                                        : AF_INET6,
        .ai_socktype = SOCK_STREAM,
        .ai_flags = passive ? AI_PASSIVE : 0,
    };
    int r = getaddrinfo(a->host[0] ? a->host : NULL, a->port, &hints, out);
    switch (r) {
    case 0:
        return 0;
    case EAI_SYSTEM:
        return -errno;
    case EAI_MEMORY:
        return -ENOMEM;
    case EAI_AGAIN:
        return -ETIMEDOUT;
    case EAI_SERVICE:
        return -EINVAL;
    default:
        return -EADDRNOTAVAIL; /* no such name, or it has no address of the family */
    }
}

/* ------------------------------------------------------------------ listening, in the pool */

/* Does somebody answer at `path`? -ECONNREFUSED: nobody, the file is stale. */
static int probe_unix(const struct sockaddr_un *sun, socklen_t len)
{
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -errno;
    int r = connect(fd, (const struct sockaddr *)sun, len) < 0 ? -errno : 0;
    close(fd);
    return r == -EAGAIN ? 0 : r; /* a full queue is somebody's */
}

/* Two daemons that want the same path must not take each other's socket, bound but not listened on
 * yet, for a stale one: the directory is locked from the look to listen(). Who holds that lock for
 * long is none of us (some programs keep a directory from being cleaned that way), and where it
 * cannot be had we go on without. A descriptor to close, or -1. */
static int lock_dir(const char *path)
{
    char dir[sizeof(struct sockaddr_un)];
    const char *slash = strrchr(path, '/');
    snprintf(dir, sizeof dir, "%.*s", slash ? (int)(slash - path) + 1 : 2, slash ? path : "./");
    int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    for (unsigned i = 0; i < DIR_LOCK_TRIES && flock(fd, LOCK_EX | LOCK_NB) < 0; i++)
        nanosleep(&(struct timespec){.tv_nsec = DIR_LOCK_EVERY_NS}, NULL);
    return fd;
}

/* Make way for a new socket file, if what is there may go. */
static int clear_stale_path(const char *path, const struct sockaddr_un *sun, socklen_t len,
                            struct tide_error *err)
{
    struct stat st, again;
    if (lstat(path, &st) < 0)
        return errno == ENOENT ? 0
                               : tide_fail(err, -errno, "cannot look at socket path '%s': %s", path,
                                           tide_strerror(errno));
    if (!S_ISSOCK(st.st_mode))
        return tide_fail(err, -EADDRINUSE, "'%s' exists and is not a socket", path);
    int r = probe_unix(sun, len);
    if (r == 0)
        return tide_fail(err, -EADDRINUSE, "another process listens on socket '%s'", path);
    if (r == -ENOENT)
        return 0;
    if (r != -ECONNREFUSED)
        return tide_fail(err, r, "cannot tell whether socket '%s' is in use: %s", path,
                         tide_strerror(-r));
    /* Another daemon may have replaced it since: then it is not the stale one any more. */
    if (lstat(path, &again) == 0 && (again.st_ino != st.st_ino || again.st_dev != st.st_dev))
        return tide_fail(err, -EADDRINUSE, "another process listens on socket '%s'", path);
    if (unlink(path) < 0 && errno != ENOENT)
        return tide_fail(err, -errno, "cannot remove stale socket '%s': %s", path,
                         tide_strerror(errno));
    return 0;
}

static void remember_path(struct real_sock *s, const char *path)
{
    struct stat st;
    if (path[0] == '@' || stat(path, &st) < 0)
        return;
    memcpy(s->path, path, strlen(path) + 1);
    s->path_dev = st.st_dev;
    s->path_ino = st.st_ino;
    s->own_path = true;
}

static int listen_path(struct pool_op *op, const struct sockaddr_un *sun, socklen_t len)
{
    struct io_addr *a = op->addr;
    struct real_sock *s = op->sock;
    int r = a->path[0] == '@' ? 0 : clear_stale_path(a->path, sun, len, op->err);
    if (r < 0)
        return r;
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return tide_fail(op->err, -errno, "cannot make a socket: %s", tide_strerror(errno));
    s->fd[0] = s->fd[1] = fd;
    s->is_unix = true;
    if (bind(fd, (const struct sockaddr *)sun, len) < 0)
        return tide_fail(op->err, -errno, "cannot listen on socket '%s': %s", a->path,
                         tide_strerror(errno));
    remember_path(s, a->path);
    if (listen(fd, (int)op->mode) < 0)
        return tide_fail(op->err, -errno, "cannot listen on socket '%s': %s", a->path,
                         tide_strerror(errno));
    return 0;
}

static int listen_unix(struct pool_op *op)
{
    struct sockaddr_un sun;
    socklen_t len = 0;
    int r = unix_address_checked(op->addr->path, &sun, &len, op->err);
    if (r < 0)
        return r;
    int lock = op->addr->path[0] == '@' ? -1 : lock_dir(op->addr->path);
    r = listen_path(op, &sun, len);
    if (lock >= 0)
        close(lock);
    return r;
}

/* A listening descriptor for one address, or -errno. */
static int listen_at(const struct addrinfo *ai, const struct io_addr *a, int backlog)
{
    int on = 1, only = a->ipv6 && !a->ipv4;
    int fd = socket(ai->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, ai->ai_protocol);
    if (fd < 0)
        return -errno;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (ai->ai_family == AF_INET6)
        setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &only, sizeof only);
    if (bind(fd, ai->ai_addr, ai->ai_addrlen) == 0 && listen(fd, backlog) == 0)
        return fd;
    int r = -errno;
    close(fd);
    return r;
}

/* The port that the kernel chose, into addr->port. */
static void report_port(int fd, struct io_addr *a)
{
    struct sockaddr_storage ss;
    socklen_t len = sizeof ss;
    if (getsockname(fd, (struct sockaddr *)&ss, &len) == 0)
        getnameinfo((struct sockaddr *)&ss, len, NULL, 0, a->port, sizeof a->port, NI_NUMERICSERV);
}

static int listen_tcp(struct pool_op *op)
{
    struct io_addr *a = op->addr;
    struct addrinfo *list;
    int r = resolve(a, true, &list);
    if (r < 0)
        return tide_fail(op->err, r, "cannot resolve '%s' port '%s': %s", a->host, a->port,
                         tide_strerror(-r));
    /* One socket, so one address. No host means every address: an IPv6 socket takes both families.
     * A name with addresses of both ("localhost"): IPv4, for who asks for the name tries both, but
     * who writes 127.0.0.1 does not. */
    int fd = -EADDRNOTAVAIL, first = a->host[0] ? AF_INET : AF_INET6;
    for (int pass = 0; fd < 0 && pass < 2; pass++)
        for (struct addrinfo *ai = list; fd < 0 && ai; ai = ai->ai_next)
            if ((ai->ai_family == first) == (pass == 0))
                fd = listen_at(ai, a, (int)op->mode);
    freeaddrinfo(list);
    if (fd < 0)
        return tide_fail(op->err, fd, "cannot listen on '%s' port '%s': %s", a->host, a->port,
                         tide_strerror(-fd));
    op->sock->fd[0] = op->sock->fd[1] = fd;
    report_port(fd, a);
    return 0;
}

static int listen_fd(struct pool_op *op)
{
    struct real_sock *s = op->sock;
    int fd = op->addr->fd, on = 0, domain = 0;
    socklen_t len = sizeof on;
    if (getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &on, &len) < 0)
        return tide_fail(op->err, -errno, "descriptor %d is no socket: %s", fd,
                         tide_strerror(errno));
    len = sizeof domain;
    getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &len);
    if (!on && listen(fd, (int)op->mode) < 0)
        return tide_fail(op->err, -errno, "cannot listen on descriptor %d: %s", fd,
                         tide_strerror(errno));
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0)
        return tide_fail(op->err, -errno, "cannot use descriptor %d: %s", fd, tide_strerror(errno));
    s->is_unix = domain == AF_UNIX;
    s->fd[0] = s->fd[1] = fd;
    if (!s->is_unix)
        report_port(fd, op->addr);
    return 0;
}

ssize_t sock_do_listen(struct pool_op *op)
{
    switch (op->addr->type) {
    case IO_ADDR_UNIX:
        return listen_unix(op);
    case IO_ADDR_TCP:
        return listen_tcp(op);
    case IO_ADDR_FD:
        return listen_fd(op);
    }
    return tide_fail(op->err, -EINVAL, "unknown kind of address");
}

co_fn int real_listen(struct io *io, struct io_addr *addr, int backlog, struct io_sock **out,
                      struct tide_error *err)
{
    struct real_io *r = real_of(io);
    struct real_sock *s = sock_new(io, -1, -1);
    if (!s)
        return tide_fail(err, -ENOMEM, "no memory for a socket");
    s->is_socket = s->listener = true;
    struct pool_op op = {
        .kind = POOL_LISTEN, .io = r, .sock = s, .addr = addr, .mode = backlog, .err = err};
    int rc = pool_run(r->pool, &op);
    if (rc < 0) {
        real_sock_close(&s->sock);
        return rc;
    }
    *out = &s->sock;
    return 0;
}

/* ------------------------------------------------------------------ connecting */

/* A connected descriptor, or -errno. Blocks; the time limit of sending holds for connect too. */
static int connect_to(int family, const struct sockaddr *addr, socklen_t len)
{
    struct timeval limit = {.tv_sec = CONNECT_WAIT_S}, none = {0};
    int r, fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -errno;
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    do
        r = connect(fd, addr, len) < 0 ? -errno : 0;
    while (r == -EINTR);
    if (r == 0) {
        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &none, sizeof none);
        return fd;
    }
    close(fd);
    return r == -EAGAIN || r == -EINPROGRESS ? -ETIMEDOUT : r;
}

static int connect_unix(const struct io_addr *a)
{
    struct sockaddr_un sun;
    socklen_t len;
    int r = unix_address(a->path, &sun, &len);
    return r < 0 ? r : connect_to(AF_UNIX, (struct sockaddr *)&sun, len);
}

/* The addresses one after the other. */
static int connect_tcp(const struct io_addr *a)
{
    struct addrinfo *list;
    int r = resolve(a, false, &list);
    if (r < 0)
        return r;
    r = -EADDRNOTAVAIL;
    for (struct addrinfo *ai = list; ai && r < 0; ai = ai->ai_next)
        r = connect_to(ai->ai_family, ai->ai_addr, ai->ai_addrlen);
    freeaddrinfo(list);
    return r;
}

/* A connected descriptor. */
ssize_t sock_do_connect(struct pool_op *op)
{
    return op->addr->type == IO_ADDR_UNIX ? connect_unix(op->addr) : connect_tcp(op->addr);
}

co_fn int real_connect(struct io *io, const struct io_addr *addr, struct io_sock **out)
{
    struct real_io *r = real_of(io);
    struct real_sock *s;
    if (addr->type == IO_ADDR_FD)
        return real_from_fds(io, addr->fd, addr->fd, out);
    struct pool_op op = {.kind = POOL_CONNECT, .io = r, .addr = (struct io_addr *)addr};
    int fd = pool_run(r->pool, &op);
    if (fd < 0)
        return fd;
    int rc = sock_from_own(io, fd, &s);
    if (rc == 0)
        *out = &s->sock;
    return rc;
}

/* ------------------------------------------------------------------ who is there */

int real_peer_pid(struct io_sock *sock)
{
    struct real_sock *s = sock_of(sock);
    struct ucred cred;
    socklen_t len = sizeof cred;
    if (!s->is_unix || s->listener ||
        getsockopt(s->fd[0], SOL_SOCKET, SO_PEERCRED, &cred, &len) < 0 || cred.pid <= 0)
        return -1;
    return cred.pid;
}

static void unix_peer(struct real_sock *s, char *buf, size_t len)
{
    struct sockaddr_un sun = {0};
    socklen_t n = sizeof sun;
    /* The end that connected has no name; the path both know is the listener's. */
    if (getsockname(s->fd[0], (struct sockaddr *)&sun, &n) < 0 ||
        n <= offsetof(struct sockaddr_un, sun_path)) {
        n = sizeof sun;
        if (getpeername(s->fd[0], (struct sockaddr *)&sun, &n) < 0)
            n = 0;
    }
    int have =
        n > offsetof(struct sockaddr_un, sun_path) ? n - offsetof(struct sockaddr_un, sun_path) : 0;
    if (have && !sun.sun_path[0])
        sun.sun_path[0] = '@';
    snprintf(buf, len, "unix:%.*s pid %d", have, sun.sun_path, real_peer_pid(&s->sock));
}

void real_peer(struct io_sock *sock, char *buf, size_t len)
{
    struct real_sock *s = sock_of(sock);
    struct sockaddr_storage ss;
    socklen_t n = sizeof ss;
    char host[64], port[16];
    if (s->is_unix) {
        unix_peer(s, buf, len);
    } else if (!s->is_socket) {
        snprintf(buf, len, "descriptors %d and %d", s->fd[0], s->fd[1]);
    } else if (getpeername(s->fd[0], (struct sockaddr *)&ss, &n) < 0 ||
               getnameinfo((struct sockaddr *)&ss, n, host, sizeof host, port, sizeof port,
                           NI_NUMERICHOST | NI_NUMERICSERV)) {
        snprintf(buf, len, "unknown peer");
    } else {
        snprintf(buf, len, ss.ss_family == AF_INET6 ? "[%s]:%s" : "%s:%s", host, port);
    }
}
