/* SPDX-License-Identifier: Apache-2.0 */
/* The real engines' common part: a thread per loop, clocks, signals.
 *
 * Before a loop sleeps it may look for completions a while without sleeping: a client that asks
 * for the next block as soon as it has this one is then answered without two context switches. How
 * long is learnt (it grows while looking pays, halves when it does not, up to SPIN_MAX_NS), apart
 * for waits on clients and waits on a disk, which take their own times. Nobody spins when the
 * machine has more runnable threads than CPUs. */
#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/signalfd.h>
#include <time.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/log.h"
#include "base/mem.h"
#include "io/real.h"

#define SPIN_MAX_NS 100000u
#define SPIN_FIRST_NS 5000u
#define LOAD_EVERY_NS 1000000000u
#define LEAVE_NS 10000000000u

/* ------------------------------------------------------------------ time and chance */

static int64_t clock_ns(clockid_t id)
{
    struct timespec t;
    if (clock_gettime(id, &t) < 0)
        return -1;
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

uint64_t real_now(struct io *io)
{
    return clock_ns(CLOCK_MONOTONIC);
}

static int64_t real_wall(struct io *io)
{
    return clock_ns(CLOCK_REALTIME);
}

static void real_random(struct io *io, void *buf, size_t len)
{
    for (size_t done = 0; done < len;) {
        ssize_t r = getrandom((char *)buf + done, len - done, 0);
        if (r > 0) {
            done += r;
        } else if (errno != EINTR) {
            /* A filter forbids it: ids still must differ between runs. */
            unsigned short seed[3];
            uint64_t t = clock_ns(CLOCK_REALTIME) ^ (uint64_t)getpid() << 32 ^ done;
            memcpy(seed, &t, sizeof seed);
            while (done < len)
                ((unsigned char *)buf)[done++] = nrand48(seed) >> 8;
        }
    }
}

static int real_pid(struct io *io)
{
    return getpid();
}

/* ------------------------------------------------------------------ the turn's end */

/* Is somebody else waiting for our CPU? The last field but one of /proc/loadavg is
 * runnable/total threads of the machine. */
static bool read_machine_busy(void)
{
    FILE *f = fopen("/proc/loadavg", "re");
    if (!f)
        return true; /* not known: do not spin */
    unsigned runnable = 0;
    int n = fscanf(f, "%*s %*s %*s %u/", &runnable);
    fclose(f);
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    return n != 1 || cpus < 1 || runnable > (unsigned long)cpus;
}

static bool may_spin(struct loop *l, uint64_t now)
{
    struct real_loop *rl = l->engine;
    if (!rl->waits)
        return false;
    if (now >= rl->load_at) {
        rl->machine_busy = read_machine_busy();
        rl->load_at = now + LOAD_EVERY_NS;
    }
    return !rl->machine_busy;
}

static void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    __asm__ volatile("" ::: "memory");
#endif
}

/* True: work came while we looked. */
static bool spin(struct loop *l, uint64_t now, uint64_t until)
{
    struct real_io *io = real_of(l->io);
    while (now < until && !atomic_load(&l->stopping)) {
        io->be->wait(l, 0);
        if (loop_has_work(l))
            return true;
        relax();
        now = real_now(l->io);
    }
    return false;
}

/* Would looking have caught what ended a wait of `ns`? Yes: begin, or look longer. No: looking was
 * for nothing. */
static void learn(uint64_t *spin_ns, uint64_t ns)
{
    if (ns < SPIN_MAX_NS)
        *spin_ns = MIN(MAX(*spin_ns * 2, (uint64_t)SPIN_FIRST_NS), (uint64_t)SPIN_MAX_NS);
    else
        *spin_ns /= 2;
}

/* Nothing is ready: sleep until something is, or the next timer is due. */
static void idle(struct loop *l)
{
    struct real_io *io = real_of(l->io);
    struct real_loop *rl = l->engine;
    uint64_t deadline = loop_next_deadline(l), start = real_now(l->io), now = start;
    uint64_t *spin_ns = &rl->spin_ns[rl->requests > 0];
    bool spinning = may_spin(l, start);
    if (spinning && *spin_ns) {
        if (spin(l, start, MIN(start + *spin_ns, deadline))) {
            *spin_ns = MIN(*spin_ns + *spin_ns / 4, (uint64_t)SPIN_MAX_NS);
            return;
        }
        now = real_now(l->io);
    }
    if (!loop_may_sleep(l)) {
        io->be->wait(l, 0);
        return;
    }
    io->be->wait(l, deadline == IO_FOREVER ? IO_FOREVER : deadline > now ? deadline - now : 0);
    loop_awake(l);
    if (spinning)
        learn(spin_ns, real_now(l->io) - start);
}

static void loop_main(struct loop *l)
{
    struct real_io *io = real_of(l->io);
    loop_enter(l);
    int r = io->be->loop_start(l);
    if (r < 0)
        log_error("io", "loop %u cannot start: %s", l->index, tide_strerror(-r));
    assert(r == 0); /* what it needs was made by io_new() */
    for (;;) {
        if (loop_turn(l))
            io->be->wait(l, 0);
        else if (atomic_load(&l->stopping))
            break;
        else
            idle(l);
    }
    loop_enter(NULL);
}

static void *loop_thread(void *arg)
{
    struct loop *l = arg;
    struct real_io *r = real_of(l->io);
    loop_main(l);
    pthread_mutex_lock(&r->left_mutex);
    r->n_left++;
    pthread_cond_signal(&r->left);
    pthread_mutex_unlock(&r->left_mutex);
    return NULL;
}

/* ------------------------------------------------------------------ run and stop */

static void real_stop(struct io *io)
{
    atomic_store(&real_of(io)->stopped_at, real_now(io));
    for (unsigned i = 0; i < io->n_loops; i++) {
        atomic_store(&io->loops[i]->stopping, true);
        loop_kick(io->loops[i]);
    }
}

static uint64_t leave_deadline(struct real_io *r)
{
    uint64_t stopped = atomic_load(&r->stopped_at);
    return (stopped ? stopped : real_now(&r->io)) + r->leave_ns;
}

/* Loops that hang in a system call are left behind. */
static void join_loops(struct real_io *r, const pthread_t *threads, unsigned n)
{
    uint64_t deadline = leave_deadline(r);
    pthread_mutex_lock(&r->left_mutex);
    while (r->n_left < n && cond_wait(&r->left, &r->left_mutex, deadline))
        ;
    r->stuck = r->n_left < n;
    pthread_mutex_unlock(&r->left_mutex);
    if (r->stuck)
        log_error("io", "%u loops hang in system calls and are left behind", n - r->n_left);
    for (unsigned i = 0; i < n && !r->stuck; i++)
        pthread_join(threads[i], NULL);
}

static int real_run(struct io *io, void (*main_fn)(void *), void *arg)
{
    /* A client that hangs up is an EPIPE, not the end of the daemon. */
    struct sigaction ignore = {.sa_handler = SIG_IGN};
    sigaction(SIGPIPE, &ignore, NULL);
    pthread_t *threads = mem_calloc(io->n_loops, sizeof *threads);
    if (!threads)
        return -ENOMEM;
    int r = loop_spawn(io->loops[0], main_fn, arg);
    unsigned n = 1;
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    while (r == 0 && n < io->n_loops) {
        r = -pthread_create(&threads[n], NULL, loop_thread, io->loops[n]);
        n += r == 0;
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (r == 0)
        loop_main(io->loops[0]);
    else
        real_stop(io);
    join_loops(real_of(io), threads + 1, n - 1);
    mem_free(threads);
    return r;
}

/* ------------------------------------------------------------------ signals */

static int real_signals_block(struct io *io)
{
    struct real_io *r = real_of(io);
    struct io_sock *s;
    if (r->signal_sock)
        return 0;
    sigemptyset(&r->signals);
    sigaddset(&r->signals, SIGTERM);
    sigaddset(&r->signals, SIGINT);
    sigaddset(&r->signals, SIGHUP);
    int fd = signalfd(-1, &r->signals, SFD_NONBLOCK | SFD_CLOEXEC);
    if (fd < 0)
        return -errno;
    int rc = real_from_fds(io, fd, fd, &s);
    if (rc < 0) {
        close(fd);
        return rc;
    }
    r->signal_sock = (struct real_sock *)s; /* owns fd */
    return -pthread_sigmask(SIG_BLOCK, &r->signals, NULL);
}

static co_fn int real_signal_wait(struct io *io)
{
    struct real_io *r = real_of(io);
    struct signalfd_siginfo si;
    if (!r->signal_sock)
        return -EINVAL; /* io_signals_block() was not called */
    ssize_t n = real_recv(&r->signal_sock->sock, &si, sizeof si, false);
    if (n < 0)
        return n;
    return n == sizeof si ? (int)si.ssi_signo : -EIO;
}

/* ------------------------------------------------------------------ making and freeing */

static const struct io_ops real_ops_table = {
    .run = real_run,
    .stop = real_stop,
    .free = real_free,
    .now = real_now,
    .wall = real_wall,
    .random = real_random,
    .pid = real_pid,
    .open = real_open,
    .close = real_close,
    .fstat = real_fstat,
    .stat = real_stat,
    .preadv = real_preadv,
    .pwritev = real_pwritev,
    .fsync = real_fsync,
    .zero = real_zero,
    .truncate = real_truncate,
    .extent = real_extent,
    .copy_range = real_copy_range,
    .lock = real_lock,
    .rename = real_rename,
    .unlink = real_unlink,
    .sync_dir = real_sync_dir,
    .listen = real_listen,
    .connect = real_connect,
    .from_fds = real_from_fds,
    .accept = real_accept,
    .recv = real_recv,
    .send = real_send,
    .send_file = real_send_file,
    .gone = real_gone,
    .shutdown = real_shutdown,
    .sock_close = real_sock_close,
    .peer = real_peer,
    .peer_pid = real_peer_pid,
    .signal_wait = real_signal_wait,
    .signals_block = real_signals_block,
};

int real_init(struct real_io *io, const struct backend *be, unsigned n_loops)
{
    io->be = be;
    io->leave_ns = LEAVE_NS;
    io->ops = real_ops_table;
    io->ops.name = be->name;
    io->ops.kick = be->kick;
    pthread_mutex_init(&io->inode_mutex, NULL);
    pthread_mutex_init(&io->left_mutex, NULL);
    cond_init(&io->left);
    int r = io_init(&io->io, &io->ops, n_loops);
    return r < 0 ? r : pool_new(&io->pool);
}

void real_free(struct io *io)
{
    struct real_io *r = real_of(io);
    if (r->stuck)
        return;
    if (!pool_free(r->pool, leave_deadline(r))) {
        log_error("io", "file operations hang in system calls and are left behind");
        return;
    }
    if (r->signal_sock)
        real_sock_close(&r->signal_sock->sock);
    for (unsigned i = 0; i < io->n_loops; i++)
        loop_run_leftovers(io->loops[i], real_sock_free_msg);
    r->be->free_loops(r);
    io_fini(io);
    pthread_mutex_destroy(&r->inode_mutex);
    pthread_mutex_destroy(&r->left_mutex);
    pthread_cond_destroy(&r->left);
    mem_free(r);
}
