/* SPDX-License-Identifier: Apache-2.0 */
/* The door itself: each function of io.h that an engine decides goes straight to the engine's
 * table. What is the same everywhere (argument checks, "all of it" loops) is done here once. */
#include <assert.h>
#include <errno.h>

#include "base/log.h"
#include "io/loop.h"
#include "io/real.h"

static struct io *own_io(void)
{
    struct loop *l = loop_self();
    assert(l);
    return l->io;
}

/* ------------------------------------------------------------------ engine */

int io_new(enum io_kind kind, unsigned n_loops, struct io **out, struct tide_error *err)
{
    if (n_loops < 1 || n_loops > IO_MAX_LOOPS)
        return tide_fail(err, -EINVAL, "number of loops must be 1 to %u", IO_MAX_LOOPS);
    if (kind == IO_PORTABLE)
        return io_portable_new(n_loops, out, err);
#ifdef HAVE_LIBURING
    int r = io_uring_new(n_loops, out, err);
    if (r == 0 || kind == IO_URING)
        return r;
    if (r != -EPERM && r != -ENOSYS && r != -EACCES && r != -ENOMEM)
        return r;
    log_info("io", "io_uring cannot be used here (%s), taking epoll and threads",
             tide_strerror(-r));
#else
    if (kind == IO_URING)
        return tide_fail(err, -ENOSYS, "this build has no io_uring");
#endif
    return io_portable_new(n_loops, out, err);
}

void io_free(struct io *io)
{
    if (io)
        io->ops->free(io);
}

const char *io_engine_name(struct io *io)
{
    return io->ops->name;
}

int io_run(struct io *io, void (*main_fn)(void *), void *arg)
{
    return io->ops->run(io, main_fn, arg);
}

void io_stop(struct io *io)
{
    io->ops->stop(io);
}

/* ------------------------------------------------------------------ time and chance */

uint64_t io_now(struct io *io)
{
    return io->ops->now(io);
}

int64_t io_wall(struct io *io)
{
    return io->ops->wall(io);
}

void io_random(struct io *io, void *buf, size_t len)
{
    io->ops->random(io, buf, len);
}

int io_pid(struct io *io)
{
    return io->ops->pid(io);
}

/* ------------------------------------------------------------------ files */

co_fn int io_open(const char *path, int flags, unsigned mode, struct io_file **out)
{
    struct io *io = own_io();
    return io->ops->open(io, path, flags, mode, out);
}

co_fn void io_close(struct io_file *f)
{
    if (f)
        f->io->ops->close(f);
}

co_fn int io_fstat(struct io_file *f, struct io_stat *st)
{
    return f->io->ops->fstat(f, st);
}

co_fn int io_stat(const char *path, struct io_stat *st)
{
    struct io *io = own_io();
    return io->ops->stat(io, path, st);
}

co_fn ssize_t io_preadv(struct io_file *f, const struct iovec *iov, int n, uint64_t off)
{
    return f->io->ops->preadv(f, iov, n, off);
}

co_fn ssize_t io_pwritev(struct io_file *f, const struct iovec *iov, int n, uint64_t off,
                         unsigned flags)
{
    return f->io->ops->pwritev(f, iov, n, off, flags);
}

co_fn int io_fsync(struct io_file *f)
{
    return f->io->ops->fsync(f);
}

co_fn int io_zero(struct io_file *f, uint64_t off, uint64_t len, enum io_alloc how)
{
    return len ? f->io->ops->zero(f, off, len, how) : 0;
}

co_fn int io_truncate(struct io_file *f, uint64_t size)
{
    return f->io->ops->truncate(f, size);
}

co_fn int io_extent(struct io_file *f, uint64_t off, uint64_t *len, bool *data)
{
    return f->io->ops->extent(f, off, len, data);
}

co_fn ssize_t io_copy_range(struct io_file *src, uint64_t src_off, struct io_file *dst,
                            uint64_t dst_off, uint64_t len)
{
    return src->io->ops->copy_range(src, src_off, dst, dst_off, len);
}

co_fn int io_file_lock(struct io_file *f, uint64_t off, uint64_t len, enum io_lock how)
{
    return f->io->ops->lock(f, off, len, how, false);
}

co_fn int io_file_lock_test(struct io_file *f, uint64_t off, uint64_t len, enum io_lock how)
{
    return f->io->ops->lock(f, off, len, how, true);
}

co_fn int io_rename(const char *from, const char *to, unsigned flags)
{
    struct io *io = own_io();
    return io->ops->rename(io, from, to, flags);
}

co_fn int io_unlink(const char *path)
{
    struct io *io = own_io();
    return io->ops->unlink(io, path);
}

co_fn int io_sync_dir(const char *dir)
{
    struct io *io = own_io();
    return io->ops->sync_dir(io, dir);
}

/* ------------------------------------------------------------------ sockets */

co_fn int io_listen(struct io_addr *addr, int backlog, struct io_sock **out, struct tide_error *err)
{
    struct io *io = own_io();
    return io->ops->listen(io, addr, backlog, out, err);
}

co_fn int io_connect(const struct io_addr *addr, struct io_sock **out)
{
    struct io *io = own_io();
    return io->ops->connect(io, addr, out);
}

int io_sock_from_fds(struct io *io, int rfd, int wfd, struct io_sock **out)
{
    return io->ops->from_fds(io, rfd, wfd, out);
}

co_fn int io_accept(struct io_sock *listener, struct io_sock **out)
{
    return listener->io->ops->accept(listener, out);
}

co_fn ssize_t io_recv(struct io_sock *s, void *buf, size_t len)
{
    return s->io->ops->recv(s, buf, len, false);
}

ssize_t io_recv_now(struct io_sock *s, void *buf, size_t len)
{
    return s->io->ops->recv(s, buf, len, true);
}

co_fn int io_send(struct io_sock *s, const struct iovec *iov, int n)
{
    return s->io->ops->send(s, iov, n);
}

co_fn ssize_t io_send_file(struct io_sock *s, struct iovec head, struct io_file *f, uint64_t off,
                           uint64_t len, uint64_t deadline)
{
    return s->io->ops->send_file(s, head, f, off, len, deadline);
}

co_fn int io_recv_all(struct io_sock *s, void *buf, size_t len)
{
    for (size_t done = 0; done < len;) {
        ssize_t r = io_recv(s, (char *)buf + done, len - done);
        if (r < 0)
            return r;
        if (r == 0)
            return -ECONNRESET;
        done += r;
    }
    return 0;
}

bool io_sock_gone(struct io_sock *s)
{
    return s->io->ops->gone(s);
}

void io_sock_shutdown(struct io_sock *s)
{
    s->io->ops->shutdown(s);
}

void io_sock_close(struct io_sock *s)
{
    if (s)
        s->io->ops->sock_close(s);
}

void io_sock_peer(struct io_sock *s, char *buf, size_t len)
{
    s->io->ops->peer(s, buf, len);
}

int io_sock_peer_pid(struct io_sock *s)
{
    return s->io->ops->peer_pid(s);
}

/* ------------------------------------------------------------------ signals */

co_fn int io_signal_wait(struct io *io)
{
    return io->ops->signal_wait(io);
}

int io_signals_block(struct io *io)
{
    return io->ops->signals_block(io);
}
