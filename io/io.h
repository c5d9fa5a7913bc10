/* SPDX-License-Identifier: Apache-2.0 */
/* The door to the world: files, sockets, clocks, random numbers and threads.
 *
 * Everything that the daemon does outside its own memory goes through this header, so that the same
 * core runs on three engines:
 *   io_uring   Linux rings, where the kernel lets us have one;
 *   portable   epoll and a pool of threads; chosen by itself where io_uring is forbidden;
 *   simulator  one thread, one seed: order, disk, network, clock and power are made up (io/sim.h).
 *
 * A `struct io` owns `n_loops` loops. Loop 0 is the control loop. In the real engines each loop is
 * a thread (loop 0 is the thread that calls io_run); in the simulator all share one thread. Core
 * code makes no threads and blocks on no lock; it runs in coroutines on loops.
 *
 * Unless said otherwise a function here may yield (co_fn), is called from a coroutine on a loop of
 * the `struct io`, returns >= 0 or -errno, and borrows its arguments until it returns. */
#pragma once
#include <fcntl.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#include "base/error.h"
#include "base/spin.h"
#include "co/co.h"

struct io;
struct loop;
struct io_file;
struct io_sock;

/* ------------------------------------------------------------------ engine and loops */

enum io_kind { IO_AUTO, IO_URING, IO_PORTABLE };

/* A real engine. IO_AUTO takes io_uring and falls back to portable where the kernel or a filter
 * says no (EPERM, ENOSYS, EACCES, ENOMEM), logging once why. IO_URING insists. n_loops >= 1.
 * No thread is started before io_run. Not a co_fn. (The simulator has its own constructor.) */
int io_new(enum io_kind kind, unsigned n_loops, struct io **out, struct tide_error *err);
/* All loops have stopped. Frees everything. NULL is fine. System calls that still hang 10 s after
 * io_stop() (a dead mount) are left behind with all memory they may touch: the process ends now. */
void io_free(struct io *io);
/* "io_uring", "portable" or "simulator". Any thread. */
const char *io_engine_name(struct io *io);

/* Starts the loops, runs loop 0 on this thread, starts main_fn(arg) as a coroutine on loop 0, and
 * returns when io_stop() was called and every loop has left (or hangs, as in io_free). Not a co_fn.
 */
int io_run(struct io *io, void (*main_fn)(void *), void *arg);
/* Ask all loops to leave once their run queues are empty. Coroutines still parked are abandoned,
 * so whoever calls it has ended them first. Any thread. */
void io_stop(struct io *io);

unsigned io_n_loops(struct io *io);
struct loop *io_loop(struct io *io, unsigned i);
unsigned loop_index(struct loop *l);
struct io *loop_io(struct loop *l);
struct loop *loop_self(void); /* the loop that runs us; NULL on a thread that is none */
struct co_sched *loop_sched(struct loop *l);
static inline bool loop_is_control(void)
{
    return loop_self() && loop_index(loop_self()) == 0;
}
/* Connections and jobs settle on a loop for as long as they live; this picks, for one more, a data
 * loop (any but 0, if there are others) on which the fewest have settled, and counts it.
 * loop_settle() is for who has no choice. Each is left once. Any thread. Not co_fn. */
struct loop *io_settle(struct io *io);
void loop_settle(struct loop *l);
void loop_unsettle(struct loop *l);
/* The top of the loop's current turn is this many turns after its start; grows by one a turn. */
uint64_t loop_turn_number(struct loop *l);

/* Run fn(arg) in a new coroutine on loop `l`, at its next turn. Any thread. Not a co_fn.
 * -ENOMEM: nothing happened. */
int loop_spawn(struct loop *l, void (*fn)(void *), void *arg);
/* Run fn(arg) now in a pooled coroutine of this loop, entered at once: it returns when fn returned
 * or yielded for the first time. Own loop, inside or outside a coroutine. */
int loop_run_now(void (*fn)(void *), void *arg);

/* A message: fn(msg) runs outside any coroutine at the top of a turn of loop `l`; it must not
 * yield. The message belongs to the sender until fn is called. Any thread. Never fails. */
struct loop_msg {
    void (*fn)(struct loop_msg *);
    struct loop_msg *next;
};
void loop_post(struct loop *l, struct loop_msg *m);
/* Run fn(arg) on loop `l` (a short function that does not yield), wait for it. From any loop. */
co_fn void loop_call(struct loop *l, void (*fn)(void *), void *arg);
/* Returns when every loop has passed the top of a turn since the call: nobody who held a borrowed
 * pointer within a turn holds it any more. */
co_fn void io_grace(struct io *io);
/* Let others of this loop run, then go on. */
co_fn void loop_pause(void);

/* For long work: others of the loop have their turn every millisecond.
 *     struct io_turns turns = {io};
 *     for (...) { work of some microseconds; io_turns_step(&turns); }
 * The first step starts the clock. In the simulator, whose clock stands still meanwhile, they have
 * it at every step if the seed is odd. */
struct io_turns {
    struct io *io;
    uint64_t began; /* ns: since when nobody else has had a turn */
    unsigned steps;
};
co_fn void io_turns_step(void *turns); /* a struct io_turns: it is a callback, too */

/* ------------------------------------------------------------------ time and chance */

uint64_t io_now(struct io *io); /* monotonic ns; never a co_fn; any loop */
int64_t io_wall(struct io *io); /* real time, ns since 1970; -1 when it cannot be read */
void io_random(struct io *io, void *buf, size_t len); /* good enough for unique ids and salts */
int io_pid(struct io *io);

#define IO_FOREVER UINT64_MAX

/* One party waits, others tell it. A set event stays set until a wait takes it. */
struct io_event {
    _Atomic int state;
    struct co *waiter;
    struct loop *loop;
    struct io_timer *timer;
};
#define IO_EVENT_INIT                                                                              \
    {                                                                                              \
        0, NULL, NULL, NULL                                                                        \
    }
/* 0: the event was set (and is clear again); -ETIME: `deadline` (io_now ns) passed first. */
co_fn int io_event_wait(struct io_event *e, uint64_t deadline);
/* Any thread, any time while the event lives; never waits. The waiter may free `e` once its wait
 * has returned 0 for this set. */
void io_event_set(struct io_event *e);
co_fn void io_sleep(uint64_t ns);

/* ------------------------------------------------------------------ files */

struct io_stat {
    uint64_t size;      /* bytes; for block devices the device's */
    uint64_t allocated; /* bytes on disk */
    /* Which file it is. A block device is its number and inode 0: it may have many names that are
     * inodes of their own. */
    uint64_t dev, ino;
    uint64_t lock_dev, lock_ino; /* whose locks it has: those of such a name are its own */
    uint32_t mode;               /* S_IFREG, ... */
    uint32_t nlink;
    uint32_t align; /* smallest unit and alignment of direct I/O here; 1 when not direct */
    int64_t mtime_ns, ctime_ns;
};

/* flags: O_RDONLY, O_RDWR, O_CREAT, O_EXCL, O_TRUNC, O_DIRECT, O_DIRECTORY. */
co_fn int io_open(const char *path, int flags, unsigned mode, struct io_file **out);
/* Nothing is in flight. NULL is fine. Releases its locks. */
co_fn void io_close(struct io_file *f);
co_fn int io_fstat(struct io_file *f, struct io_stat *st);
co_fn int io_stat(const char *path, struct io_stat *st);

/* Read or write at `off`; may return short at the end of the file only (reads) or with -errno.
 * Inline first: what the page cache can serve at once is served without a yield; buffered writes
 * go one writer per file; O_DIRECT goes to the ring or the pool. `iov` is left unchanged.
 * Any loop, any number at once. */
#define IO_DSYNC 1u /* durable on return */
co_fn ssize_t io_preadv(struct io_file *f, const struct iovec *iov, int n, uint64_t off);
co_fn ssize_t io_pwritev(struct io_file *f, const struct iovec *iov, int n, uint64_t off,
                         unsigned flags);
/* Everything that completed before the call is durable on return 0. A flush joins only a sync that
 * starts after it arrived; a failed sync is sticky: later ones fail until the file is reopened. */
co_fn int io_fsync(struct io_file *f);

enum io_alloc { IO_ZERO_KEEP, IO_ZERO_PUNCH, IO_ZERO_KEEP_FAST, IO_ZERO_PUNCH_FAST, IO_DISCARD };
/* IO_ZERO_KEEP: reads as zero, stays allocated; IO_ZERO_PUNCH: reads as zero, space given back;
 * _FAST: the same, but -EOPNOTSUPP where it would take as long as writing the zeroes;
 * IO_DISCARD: punch, contents unspecified. -EOPNOTSUPP where the file cannot. Never grows it. */
co_fn int io_zero(struct io_file *f, uint64_t off, uint64_t len, enum io_alloc how);
co_fn int io_truncate(struct io_file *f, uint64_t size);
/* What lies at `off`: *data says data or hole, *len how far it reaches (at most `len` asked).
 * Beyond the end of the file is a hole without end. What another process punches may be called data
 * for a second more; what anybody writes is never called a hole. */
co_fn int io_extent(struct io_file *f, uint64_t off, uint64_t *len, bool *data);
/* Copy inside the kernel. Returns bytes copied (may be short), -EOPNOTSUPP/-EXDEV/-EINVAL: cannot.
 */
co_fn ssize_t io_copy_range(struct io_file *src, uint64_t src_off, struct io_file *dst,
                            uint64_t dst_off, uint64_t len);

/* Locks on byte ranges of the file that other processes (and other io_files) see: OFD locks.
 * -EAGAIN: somebody else holds a conflicting one. `test`: only look. */
enum io_lock { IO_UNLOCK, IO_LOCK_SHARED, IO_LOCK_EXCLUSIVE };
co_fn int io_file_lock(struct io_file *f, uint64_t off, uint64_t len, enum io_lock how);
co_fn int io_file_lock_test(struct io_file *f, uint64_t off, uint64_t len, enum io_lock how);

/* Names. `io_rename` replaces; with IO_NOREPLACE it fails with -EEXIST; IO_EXCHANGE swaps. */
#define IO_NOREPLACE 1u
#define IO_EXCHANGE 2u
co_fn int io_rename(const char *from, const char *to, unsigned flags);
co_fn int io_unlink(const char *path);
co_fn int io_sync_dir(const char *dir);

/* Buffers for data: page-aligned, from a pool of this loop. NULL when memory is gone. Freed on any
 * loop. Not a co_fn. */
void *io_buf_get(size_t len);
void io_buf_put(void *buf, size_t len);

/* ------------------------------------------------------------------ sockets */

struct io_addr {
    enum { IO_ADDR_UNIX, IO_ADDR_TCP, IO_ADDR_FD } type;
    char path[108];           /* UNIX; may start with '@' for the abstract name space */
    char host[256], port[32]; /* TCP: name or number; "0" = any free port */
    bool ipv4, ipv6;          /* both false: both */
    int fd;                   /* IO_ADDR_FD: an inherited descriptor */
};
/* Listen. A stale UNIX socket file (nobody answers) is replaced, a live one is -EADDRINUSE. The
 * file is removed by io_sock_close. After success addr->port holds the real port. */
co_fn int io_listen(struct io_addr *addr, int backlog, struct io_sock **out,
                    struct tide_error *err);
co_fn int io_connect(const struct io_addr *addr, struct io_sock **out);
/* Standard input and output, or any pair of inherited descriptors, as a socket. It owns them, but
 * closing it leaves 0, 1 and 2 open. */
int io_sock_from_fds(struct io *io, int rfd, int wfd, struct io_sock **out);
/* -ECANCELED after io_sock_shutdown. */
co_fn int io_accept(struct io_sock *listener, struct io_sock **out);
/* At least one byte, 0 at the end of the stream. */
co_fn ssize_t io_recv(struct io_sock *s, void *buf, size_t len);
/* Like io_recv but returns -EAGAIN instead of waiting. Not a co_fn. */
ssize_t io_recv_now(struct io_sock *s, void *buf, size_t len);
/* All of it, or -errno. */
co_fn int io_send(struct io_sock *s, const struct iovec *iov, int n);
/* Send `head` (may be empty) and then [off, off+len) of `f`, the latter without copying it through
 * our memory. Returns the bytes of both that went before all were sent or `deadline` (io_now ns)
 * passed, 0 included. -EOPNOTSUPP: what comes next cannot be had like this, since it would have to
 * wait for the disk, lies past the end of the file, or the engine cannot; the caller reads it.
 * Other -errno: as io_send. What the peer has not taken yet may still change with the file. */
co_fn ssize_t io_send_file(struct io_sock *s, struct iovec head, struct io_file *f, uint64_t off,
                           uint64_t len, uint64_t deadline);
/* Until `len` bytes came (0), the stream ended (-ECONNRESET) or an error. */
co_fn int io_recv_all(struct io_sock *s, void *buf, size_t len);
/* Has the peer hung up, or the connection broken? What it sent before may still be unread. Never
 * waits. Not a co_fn. */
bool io_sock_gone(struct io_sock *s);
/* Ends every receive, send and accept under way and to come with -ECANCELED, from any loop. Not a
 * co_fn. */
void io_sock_shutdown(struct io_sock *s);
/* Nothing is under way. NULL is fine. */
void io_sock_close(struct io_sock *s);
/* Who is there: "unix:PATH pid 12" or "127.0.0.1:4000"; for logs. */
void io_sock_peer(struct io_sock *s, char *buf, size_t len);
/* Peer's process, or -1. Wanted: SO_PEERCRED. */
int io_sock_peer_pid(struct io_sock *s);
/* A socket belongs to the loop that uses it: one receiver and one sender at a time, both on the
 * same loop. Moving it to another loop is allowed while nothing is under way: just use it there. */

/* ------------------------------------------------------------------ signals */

/* The next of the signals that io_signals_block() took, as its number. Control loop. The simulator
 * never returns. */
co_fn int io_signal_wait(struct io *io);
/* Before io_run, in main(): block SIGTERM, SIGINT, SIGHUP for all threads and remember them. */
int io_signals_block(struct io *io);
