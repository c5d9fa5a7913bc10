/* SPDX-License-Identifier: Apache-2.0 */
/* The portable engine: a loop waits in epoll, whatever may block in a file goes to the pool.
 *
 * A descriptor is watched with EPOLLONESHOT, so nothing fires that nobody waits for. `armed` in the
 * socket says who waits; when one direction fired and the other still waits it is armed again. */
#include <assert.h>
#include <errno.h>
#include <limits.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/mem.h"
#include "io/real.h"

enum { EVENTS_PER_WAIT = 64 };

struct epoll_loop {
    struct real_loop real; /* first */
    int epoll, kick;
    bool milliseconds; /* epoll_pwait2() is not to be had */
};

static struct epoll_loop *engine_of(struct loop *l)
{
    return l->engine;
}

/* ------------------------------------------------------------------ sockets */

/* The socket and which of its descriptors, in one pointer-sized word. */
static uint64_t watch_tag(struct real_sock *s, int which)
{
    return (uint64_t)(uintptr_t)s | (unsigned)which;
}

/* Which descriptor serves the direction: 0, or 1 when there are two. */
static int watched(struct real_sock *s, int dir)
{
    return s->fd[SOCK_RD] == s->fd[SOCK_WR] ? 0 : dir;
}

static int watch(struct real_sock *s, int which)
{
    struct epoll_loop *e = engine_of(s->loop);
    struct epoll_event ev = {.events = EPOLLONESHOT, .data.u64 = watch_tag(s, which)};
    for (int dir = 0; dir < 2; dir++)
        if (s->armed & 1u << dir && watched(s, dir) == which)
            ev.events |= dir == SOCK_RD ? EPOLLIN : EPOLLOUT;
    int how = s->added[which] ? EPOLL_CTL_MOD : EPOLL_CTL_ADD;
    if (epoll_ctl(e->epoll, how, s->fd[which], &ev) < 0)
        return -errno;
    s->added[which] = true;
    return 0;
}

static void unwatch(struct real_sock *s)
{
    for (int i = 0; i < 2; i++)
        if (s->added[i])
            epoll_ctl(engine_of(s->loop)->epoll, EPOLL_CTL_DEL, s->fd[i], NULL);
    s->added[0] = s->added[1] = false;
    s->armed = 0;
    s->loop = NULL;
}

static int portable_arm(struct real_sock *s, int dir)
{
    struct loop *l = loop_self();
    if (s->loop && s->loop != l)
        unwatch(s);
    s->loop = l;
    s->armed |= 1u << dir;
    int r = watch(s, watched(s, dir));
    if (r == 0)
        return 0;
    s->armed &= ~(1u << dir);
    return r == -EPERM ? 1 : r; /* a regular file: never waits */
}

/* The other loop may just now handle an event of the socket (left over from a wait that shutdown
 * ended): only what never changes is touched here. It is through with it when it runs a message. */
static void portable_detach(struct real_sock *s)
{
    struct loop *l = s->loop;
    if (!l || l == loop_self()) {
        if (l)
            unwatch(s);
        real_sock_free(s);
        return;
    }
    for (int i = 0; i < 2; i++)
        epoll_ctl(engine_of(l)->epoll, EPOLL_CTL_DEL, s->fd[i], NULL);
    loop_post(l, &s->msg);
}

static void handle_event(const struct epoll_event *ev)
{
    struct real_sock *s = (struct real_sock *)(uintptr_t)(ev->data.u64 & ~(uint64_t)1);
    int which = ev->data.u64 & 1;
    unsigned hup = EPOLLHUP | EPOLLERR;
    bool again = false;
    for (int dir = 0; dir < 2; dir++) {
        if (!(s->armed & 1u << dir) || watched(s, dir) != which)
            continue;
        if (ev->events & (hup | (dir == SOCK_RD ? EPOLLIN : EPOLLOUT)))
            sock_ready(s, dir);
        else
            again = true;
    }
    if (again)
        watch(s, which);
}

/* ------------------------------------------------------------------ waiting */

static int wait_events(struct epoll_loop *e, struct epoll_event *ev, uint64_t ns)
{
    if (!e->milliseconds && ns) {
        struct timespec t = {.tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000};
        int n = epoll_pwait2(e->epoll, ev, EVENTS_PER_WAIT, ns == IO_FOREVER ? NULL : &t, NULL);
        if (n >= 0 || (errno != ENOSYS && errno != EPERM))
            return n;
        e->milliseconds = true;
    }
    /* Round up: waking early would only mean to wait again. */
    int ms = ns == IO_FOREVER ? -1 : (int)MIN((ns + 999999) / 1000000, (uint64_t)INT_MAX);
    return epoll_wait(e->epoll, ev, EVENTS_PER_WAIT, ms);
}

static void portable_wait(struct loop *l, uint64_t ns)
{
    struct epoll_loop *e = engine_of(l);
    struct epoll_event ev[EVENTS_PER_WAIT];
    if (!ns && !e->real.waits)
        return; /* busy, and no socket could have anything for us */
    int n = wait_events(e, ev, ns);
    assert(n >= 0 || errno == EINTR);
    for (int i = 0; i < n; i++) {
        uint64_t count;
        if (ev[i].data.u64)
            handle_event(&ev[i]);
        else if (read(e->kick, &count, sizeof count) < 0)
            assert(errno == EAGAIN || errno == EINTR);
    }
}

static void portable_kick(struct loop *l)
{
    uint64_t one = 1;
    ssize_t r;
    do
        r = write(engine_of(l)->kick, &one, sizeof one);
    while (r < 0 && errno == EINTR);
    assert(r == sizeof one || errno == EAGAIN); /* EAGAIN: full of kicks, which is a kick */
}

/* ------------------------------------------------------------------ files */

static co_fn ssize_t portable_rw(struct real_file *f, bool write, const struct iovec *iov, int n,
                                 uint64_t off, int rwf)
{
    struct pool_op op = {
        .kind = POOL_RW,
        .class = write && !f->direct ? POOL_META : POOL_DATA,
        .share = &f->inode->share,
        .io = file_io(f),
        .file = f,
        .write = write,
        .iov = iov,
        .n = n,
        .off = off,
        .flags = rwf,
    };
    return pool_run(op.io->pool, &op);
}

static co_fn int portable_sync(struct real_file *f)
{
    struct pool_op op = {.kind = POOL_SYNC,
                         .class = POOL_META,
                         .share = &f->inode->share,
                         .io = file_io(f),
                         .file = f};
    return pool_run(op.io->pool, &op);
}

/* ------------------------------------------------------------------ making and freeing */

static int portable_loop_start(struct loop *l)
{
    return 0;
}

static int make_loop(struct loop *l)
{
    struct epoll_event ev = {.events = EPOLLIN, .data.u64 = 0};
    struct epoll_loop *e = l->engine = mem_zalloc(sizeof *e);
    if (!e)
        return -ENOMEM;
    e->epoll = epoll_create1(EPOLL_CLOEXEC);
    e->kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (e->epoll < 0 || e->kick < 0 || epoll_ctl(e->epoll, EPOLL_CTL_ADD, e->kick, &ev) < 0)
        return -errno;
    return 0;
}

static void portable_free_loops(struct real_io *io)
{
    for (unsigned i = 0; i < io->io.n_loops; i++) {
        struct epoll_loop *e = io->io.loops[i]->engine;
        if (!e)
            continue;
        if (e->epoll >= 0)
            close(e->epoll);
        if (e->kick >= 0)
            close(e->kick);
        mem_free(e);
    }
}

static const struct backend portable_backend = {
    .name = "portable",
    .loop_start = portable_loop_start,
    .wait = portable_wait,
    .kick = portable_kick,
    .rw = portable_rw,
    .sync = portable_sync,
    .arm = portable_arm,
    .detach = portable_detach,
    .free_loops = portable_free_loops,
};

int io_portable_new(unsigned n_loops, struct io **out, struct tide_error *err)
{
    struct real_io *io = mem_zalloc(sizeof *io);
    if (!io)
        return tide_fail(err, -ENOMEM, "no memory for the engine");
    int r = real_init(io, &portable_backend, n_loops);
    for (unsigned i = 0; r == 0 && i < n_loops; i++)
        r = make_loop(io->io.loops[i]);
    if (r < 0) {
        real_free(&io->io);
        return tide_fail(err, r, "cannot start the epoll engine: %s", tide_strerror(-r));
    }
    *out = &io->io;
    return 0;
}
