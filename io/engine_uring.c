/* SPDX-License-Identifier: Apache-2.0 */
/* The io_uring engine: one ring per loop, used by that loop's thread alone.
 *
 * What coroutines start in a turn is collected and handed over once, by the system call that also
 * waits. A file request lives on the stack of its coroutine (struct ring_op); readiness of a socket
 * is a one-shot poll whose completion names socket and direction. The low bits of user_data say
 * which of them a completion belongs to.
 *
 * A socket whose poll is still in the ring must not be freed: such sockets are `dying`, their polls
 * are removed, and the last completion frees them.
 *
 * Rings are made by io_new(), disabled, so that a refusal is known before anything runs; the loop's
 * thread enables its ring and is from then on its single issuer. */
#include <assert.h>
#include <errno.h>
#include <liburing.h>
#include <poll.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/log.h"
#include "base/mem.h"
#include "io/real.h"

enum { RING_ENTRIES = 256, CQ_ENTRIES = 4096, KERNEL_WORKERS = 64 };

enum { TAG_MASK = 3, TAG_OP = 0, TAG_KICK = 1, TAG_SOCK = 2 /* + direction */ };

struct ring_loop {
    struct real_loop real; /* first */
    struct io_uring ring;
    bool have_ring;
    unsigned direct_rw; /* direct requests so far, until the region is tried */
    bool poll_first;    /* the kernel knows receives that wait before they try */
    int kick;
    uint64_t kicks;     /* where the kernel puts what it read from `kick` */
    unsigned in_flight; /* requests and polls, without the one for kicks */
    struct real_sock *dying;
};

/* On the stack of the coroutine that waits for it. */
struct ring_op {
    struct co *co;
    int result;
};

static struct ring_loop *engine_of(struct loop *l)
{
    return l->engine;
}

static void reap(struct ring_loop *e);

/* ------------------------------------------------------------------ handing over */

/* Errors of submission that go away by themselves: the completion queue is full, the kernel is
 * short of memory, a signal, the time is up. Requests stay queued. */
static void check_submit(int r)
{
    assert(r >= 0 || r == -EBUSY || r == -EAGAIN || r == -EINTR || r == -ETIME || r == -ENOMEM);
}

static struct io_uring_sqe *get_sqe(struct ring_loop *e)
{
    struct io_uring_sqe *sqe;
    while (!(sqe = io_uring_get_sqe(&e->ring))) {
        check_submit(io_uring_submit(&e->ring));
        reap(e);
    }
    return sqe;
}

static co_fn int run_op(struct ring_loop *e, struct io_uring_sqe *sqe, struct ring_op *op)
{
    op->co = co_self();
    sqe->user_data = (uintptr_t)op | TAG_OP;
    e->in_flight++;
    co_yield();
    return op->result;
}

/* ------------------------------------------------------------------ registered buffers */

/* The kernel pins the pages of each direct request anew, those of registered buffers only once.
 * Measured (Linux 6.18, ext4, depth 64, CPU time of the issuer for a read, without and with): 4 KiB
 * 3.6 and 3.2 us, 64 KiB 5.0 and 3.2 us. But registered memory is resident, counts against
 * RLIMIT_MEMLOCK, and a slab of 1 MiB takes half a millisecond: so a loop begins with it only when
 * it does direct I/O in earnest, and where the limit or an old kernel refuses it goes on without.
 *
 * Descriptors are not registered, nor is the ring's own: the first saves 0.07 us a request, the
 * second 0.05 us a system call, 1 % of the least a request costs, and a table of descriptors would
 * have to hear of every close on every ring. */

enum { EARNEST = 256 };

static int add_slab(struct loop *l, unsigned slab, void *base, size_t len)
{
    struct iovec iov = {base, len};
    int r = io_uring_register_buffers_update_tag(&engine_of(l)->ring, slab, &iov, NULL, 1);
    return r == 1 ? 0 : r < 0 ? r : -EINVAL;
}

static void count_direct(struct loop *l, struct ring_loop *e)
{
    if (e->direct_rw > EARNEST || ++e->direct_rw <= EARNEST)
        return;
    if (io_uring_register_buffers_sparse(&e->ring, BUF_REGION_SLABS) == 0)
        buf_region_start(l, add_slab);
}

static co_fn ssize_t uring_rw(struct real_file *f, bool write, const struct iovec *iov, int n,
                              uint64_t off, int rwf)
{
    struct loop *l = loop_self();
    struct ring_loop *e = engine_of(l);
    struct io_uring_sqe *sqe = get_sqe(e);
    struct ring_op op;
    int slab = -1;
    if (f->direct) {
        count_direct(l, e);
        slab = n == 1 ? buf_region_slab(l, iov->iov_base, iov->iov_len) : -1;
    }
    if (slab >= 0) {
        io_uring_prep_rw(write ? IORING_OP_WRITE_FIXED : IORING_OP_READ_FIXED, sqe, f->fd,
                         iov->iov_base, iov->iov_len, off);
        sqe->buf_index = slab;
        sqe->rw_flags = rwf;
    } else if (write) {
        io_uring_prep_writev2(sqe, f->fd, iov, n, off, rwf);
    } else {
        io_uring_prep_readv2(sqe, f->fd, iov, n, off, rwf);
    }
    return run_op(e, sqe, &op);
}

static co_fn int uring_sync(struct real_file *f)
{
    struct ring_loop *e = engine_of(loop_self());
    struct ring_op op;
    int r;
    do {
        struct io_uring_sqe *sqe = get_sqe(e);
        io_uring_prep_fsync(sqe, f->fd, IORING_FSYNC_DATASYNC);
        r = run_op(e, sqe, &op);
    } while (r == -EINTR || r == -EAGAIN);
    return r;
}

/* ------------------------------------------------------------------ sockets */

static uint64_t sock_tag(struct real_sock *s, int dir)
{
    return (uintptr_t)s | TAG_SOCK | (unsigned)dir;
}

static int uring_arm(struct real_sock *s, int dir)
{
    struct loop *l = loop_self();
    struct ring_loop *e = engine_of(l);
    assert(!s->armed || s->loop == l); /* it moves only while nothing is under way */
    s->loop = l;
    if (s->armed & 1u << dir)
        return 0;
    s->armed |= 1u << dir;
    struct io_uring_sqe *sqe = get_sqe(e);
    io_uring_prep_poll_add(sqe, s->fd[dir], dir == SOCK_RD ? POLLIN : POLLOUT);
    sqe->user_data = sock_tag(s, dir);
    e->in_flight++;
    return 0;
}

/* shutdown(2) ends it like any receive. Nothing was there a moment ago: waiting first saves the
 * kernel a vain look. (To go without that look of ours, too, when it was in vain the last times,
 * measured 4 % worse.)
 *
 * Not multishot: what arrives must lie where the session wants it, and a multishot receive puts it
 * into buffers that the kernel picks. Measured (Linux 6.18, UNIX socket, one message and one reply
 * at a time, CPU time of the receiver, single and multishot): 28 bytes 5.5 and 5.4 us, 4 KiB 6.1
 * and 6.1 us, 64 KiB with the copy 10.1 and 12.1 us. Arming costs no system call of its own. */
static co_fn ssize_t uring_recv(struct real_sock *s, void *buf, size_t len)
{
    struct ring_loop *e = engine_of(loop_self());
    struct io_uring_sqe *sqe = get_sqe(e);
    struct ring_op op;
    io_uring_prep_recv(sqe, s->fd[SOCK_RD], buf, len, 0);
    if (e->poll_first)
        sqe->ioprio = IORING_RECVSEND_POLL_FIRST;
    return run_op(e, sqe, &op);
}

/* On the socket's loop, or when its ring is gone. */
static void detach_here(struct real_sock *s)
{
    struct ring_loop *e = s->loop ? engine_of(s->loop) : NULL;
    if (!e || !s->armed || !e->have_ring) {
        real_sock_free(s);
        return;
    }
    /* get_sqe() may take completions, and the last one frees `s`. */
    unsigned armed = s->armed;
    s->dying = true;
    s->next_dying = e->dying;
    e->dying = s;
    for (int dir = 0; dir < 2; dir++)
        if (armed & 1u << dir) {
            struct io_uring_sqe *sqe = get_sqe(e);
            io_uring_prep_poll_remove(sqe, sock_tag(s, dir));
            sqe->user_data = 0; /* an op without address: nobody waits for it */
            e->in_flight++;
        }
}

static void detach_msg(struct loop_msg *m)
{
    detach_here((struct real_sock *)((char *)m - offsetof(struct real_sock, msg)));
}

/* `armed` belongs to the socket's loop: asked there. */
static void uring_detach(struct real_sock *s)
{
    if (!s->loop || s->loop == loop_self()) {
        detach_here(s);
        return;
    }
    s->msg.fn = detach_msg;
    loop_post(s->loop, &s->msg);
}

static void poll_completed(struct ring_loop *e, struct real_sock *s, int dir)
{
    sock_ready(s, dir); /* errors too: the system call that is tried next will name them */
    if (!s->dying || s->armed)
        return;
    struct real_sock **at = &e->dying;
    while (*at != s)
        at = &(*at)->next_dying;
    *at = s->next_dying;
    real_sock_free(s);
}

/* ------------------------------------------------------------------ waiting */

static void arm_kick(struct ring_loop *e)
{
    struct io_uring_sqe *sqe = get_sqe(e);
    io_uring_prep_read(sqe, e->kick, &e->kicks, sizeof e->kicks, 0);
    sqe->user_data = TAG_KICK;
}

static void complete(struct ring_loop *e, uint64_t data, int result)
{
    void *p = (void *)(uintptr_t)(data & ~(uint64_t)TAG_MASK);
    switch (data & TAG_MASK) {
    case TAG_KICK:
        arm_kick(e);
        return;
    case TAG_OP:
        e->in_flight--;
        if (!p)
            return;
        ((struct ring_op *)p)->result = result;
        co_wake(((struct ring_op *)p)->co);
        return;
    default:
        e->in_flight--;
        poll_completed(e, p, data & 1 ? SOCK_WR : SOCK_RD);
    }
}

/* One at a time, copied and given back first: complete() may come here again through get_sqe(). */
static void reap(struct ring_loop *e)
{
    struct io_uring_cqe *cqe;
    while (io_uring_peek_cqe(&e->ring, &cqe) == 0) {
        uint64_t data = cqe->user_data;
        int result = cqe->res;
        io_uring_cqe_seen(&e->ring, cqe);
        complete(e, data, result);
    }
}

/* Have we something for the kernel, or has it work that it does only when we come? The answer lies
 * in memory that both see, so that a loop that looks again and again makes no system calls. */
static bool must_enter(struct ring_loop *e)
{
    unsigned flags = IO_URING_READ_ONCE(*e->ring.sq.kflags);
    return io_uring_sq_ready(&e->ring) || (flags & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW));
}

static void uring_wait(struct loop *l, uint64_t ns)
{
    struct ring_loop *e = engine_of(l);
    struct io_uring_cqe *cqe;
    if (ns == 0) {
        if (must_enter(e))
            check_submit(io_uring_submit_and_get_events(&e->ring));
    } else {
        struct __kernel_timespec t = {.tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000};
        check_submit(io_uring_submit_and_wait_timeout(&e->ring, &cqe, 1,
                                                      ns == IO_FOREVER ? NULL : &t, NULL));
    }
    reap(e);
}

static void uring_kick(struct loop *l)
{
    uint64_t one = 1;
    ssize_t r;
    do
        r = write(engine_of(l)->kick, &one, sizeof one);
    while (r < 0 && errno == EINTR);
    assert(r == sizeof one);
}

/* ------------------------------------------------------------------ making and freeing */

static int uring_loop_start(struct loop *l)
{
    struct ring_loop *e = engine_of(l);
    /* Debian 12's liburing declares io_uring_enable_rings() but does not export it. */
    if (syscall(SYS_io_uring_register, e->ring.ring_fd, IORING_REGISTER_ENABLE_RINGS, NULL, 0) < 0)
        return -errno;
    /* The kernel's own limit of 4 workers for each CPU is soon used up by syncs that hang. An old
     * kernel that knows no such request keeps it. */
    unsigned workers[2] = {KERNEL_WORKERS, 0};
    syscall(SYS_io_uring_register, e->ring.ring_fd, IORING_REGISTER_IOWQ_MAX_WORKERS, workers, 2);
    arm_kick(e);
    return 0;
}

/* The best ring that this kernel makes. */
static int make_ring(struct ring_loop *e)
{
    static const unsigned wishes[] = {
        IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_COOP_TASKRUN |
            IORING_SETUP_TASKRUN_FLAG | IORING_SETUP_SUBMIT_ALL,
        IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG | IORING_SETUP_SUBMIT_ALL,
        0,
    };
    struct io_uring *ring = &e->ring;
    int r = -EINVAL;
    for (size_t i = 0; r == -EINVAL && i < sizeof wishes / sizeof *wishes; i++) {
        struct io_uring_params p = {
            .flags = wishes[i] | IORING_SETUP_R_DISABLED | IORING_SETUP_CQSIZE | IORING_SETUP_CLAMP,
            .cq_entries = CQ_ENTRIES,
        };
        r = io_uring_queue_init_params(RING_ENTRIES, ring, &p);
        e->poll_first = wishes[i] & IORING_SETUP_COOP_TASKRUN; /* both are of Linux 5.19 */
    }
    if (r < 0)
        return r == -EINVAL ? -ENOSYS : r; /* too old */
    if ((ring->features & IORING_FEAT_EXT_ARG) && (ring->features & IORING_FEAT_NODROP))
        return 0;
    io_uring_queue_exit(ring);
    return -ENOSYS;
}

static int make_loop(struct loop *l)
{
    struct ring_loop *e = l->engine = mem_zalloc(sizeof *e);
    if (!e)
        return -ENOMEM;
    e->kick = eventfd(0, EFD_CLOEXEC);
    if (e->kick < 0)
        return -errno;
    int r = make_ring(e);
    e->have_ring = r == 0;
    return r;
}

static void uring_free_loops(struct real_io *io)
{
    for (unsigned i = 0; i < io->io.n_loops; i++) {
        struct ring_loop *e = io->io.loops[i]->engine;
        if (!e)
            continue;
        if (e->have_ring)
            io_uring_queue_exit(&e->ring);
        e->have_ring = false;
        loop_run_leftovers(io->io.loops[i], detach_msg);
        while (e->dying) {
            struct real_sock *s = e->dying;
            e->dying = s->next_dying;
            real_sock_free(s);
        }
        if (e->kick >= 0)
            close(e->kick);
        mem_free(e);
    }
}

static const struct backend uring_backend = {
    .name = "io_uring",
    .loop_start = uring_loop_start,
    .wait = uring_wait,
    .kick = uring_kick,
    .rw = uring_rw,
    .sync = uring_sync,
    .recv = uring_recv,
    .arm = uring_arm,
    .detach = uring_detach,
    .free_loops = uring_free_loops,
};

int io_uring_new(unsigned n_loops, struct io **out, struct tide_error *err)
{
    struct real_io *io = mem_zalloc(sizeof *io);
    if (!io)
        return tide_fail(err, -ENOMEM, "no memory for the engine");
    int r = real_init(io, &uring_backend, n_loops);
    for (unsigned i = 0; r == 0 && i < n_loops; i++)
        r = make_loop(io->io.loops[i]);
    if (r < 0) {
        real_free(&io->io);
        return tide_fail(err, r,
                         "the engine io_uring is not to be had here: %s; use 'portable' or 'auto'",
                         tide_strerror(-r));
    }
    *out = &io->io;
    return 0;
}
