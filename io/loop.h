/* SPDX-License-Identifier: Apache-2.0 */
/* Inside of io/: what a loop is made of, and what an engine has to give it. Only files of io/
 * include this.
 *
 * A turn of a loop: take the mailbox; run its messages; enter every coroutine that was ready when
 * the turn began; fire timers that are due; then let the engine wait for completions (not at all
 * when something is ready). The engine decides *when* turns happen: a thread per loop that does
 * nothing else, or the simulator, which takes one step of one loop at a time in seeded order. */
#pragma once
#include "io/io.h"

/* Lives on the stack of the coroutine that waits; linked into the loop's pairing heap while armed,
 * so that arming a timer needs no memory and cannot fail. */
struct io_timer {
    uint64_t deadline;
    uint64_t order; /* ties fire in order of arming */
    struct io_event *event;
    struct io_timer *child, *next, *prev; /* prev: left sibling, or the parent of a first child */
    bool armed, fired;
};

struct loop {
    struct co_sched sched; /* first: the scheduler's address is the loop's */
    struct io *io;
    unsigned index;
    _Atomic(struct loop_msg *)
        mailbox;                       /* stack of messages from any thread; the loop reverses it */
    _Atomic(struct co *) remote_ready; /* likewise: coroutines that other threads have woken */
    struct co *run_head, *run_tail;    /* ready coroutines, own thread */
    struct io_timer *timers;           /* root of the pairing heap */
    unsigned n_timers;
    uint64_t timer_order;
    _Atomic uint64_t turn;
    uint64_t n_started; /* coroutines made, own thread */
    _Atomic unsigned n_settled;
    _Atomic bool sleeping; /* about to wait: a sender must kick */
    _Atomic bool stopping;
    void *engine; /* engine's state of this loop */
    struct io_buf_pool *bufs;
    _Atomic(struct buf_region *) region; /* of buffers that the engine knows; or NULL */
};

/* What an engine implements. The file, socket and name functions of io.h with the same suffix go
 * straight to these; see io.h for their contracts. */
struct io_ops {
    const char *name;
    int (*run)(struct io *, void (*main_fn)(void *), void *arg);
    void (*stop)(struct io *);
    void (*free)(struct io *);
    void (*kick)(struct loop *); /* any thread: end the loop's wait */
    uint64_t (*now)(struct io *);
    int64_t (*wall)(struct io *);
    void (*random)(struct io *, void *, size_t);
    int (*pid)(struct io *);

    int (*open)(struct io *, const char *, int, unsigned, struct io_file **);
    void (*close)(struct io_file *);
    int (*fstat)(struct io_file *, struct io_stat *);
    int (*stat)(struct io *, const char *, struct io_stat *);
    ssize_t (*preadv)(struct io_file *, const struct iovec *, int, uint64_t);
    ssize_t (*pwritev)(struct io_file *, const struct iovec *, int, uint64_t, unsigned);
    int (*fsync)(struct io_file *);
    int (*zero)(struct io_file *, uint64_t, uint64_t, enum io_alloc);
    int (*truncate)(struct io_file *, uint64_t);
    int (*extent)(struct io_file *, uint64_t, uint64_t *, bool *);
    ssize_t (*copy_range)(struct io_file *, uint64_t, struct io_file *, uint64_t, uint64_t);
    int (*lock)(struct io_file *, uint64_t, uint64_t, enum io_lock, bool test);
    int (*rename)(struct io *, const char *, const char *, unsigned);
    int (*unlink)(struct io *, const char *);
    int (*sync_dir)(struct io *, const char *);

    int (*listen)(struct io *, struct io_addr *, int, struct io_sock **, struct tide_error *);
    int (*connect)(struct io *, const struct io_addr *, struct io_sock **);
    int (*from_fds)(struct io *, int, int, struct io_sock **);
    int (*accept)(struct io_sock *, struct io_sock **);
    ssize_t (*recv)(struct io_sock *, void *, size_t, bool now);
    int (*send)(struct io_sock *, const struct iovec *, int);
    ssize_t (*send_file)(struct io_sock *, struct iovec, struct io_file *, uint64_t, uint64_t,
                         uint64_t);
    bool (*gone)(struct io_sock *);
    void (*shutdown)(struct io_sock *);
    void (*sock_close)(struct io_sock *);
    void (*peer)(struct io_sock *, char *, size_t);
    int (*peer_pid)(struct io_sock *);
    int (*signal_wait)(struct io *);
    int (*signals_block)(struct io *);
};

/* First member of every engine's own struct. */
struct io {
    const struct io_ops *ops;
    uint64_t turn_ns; /* of struct io_turns; 0: as short as it can be */
    unsigned n_loops;
    struct loop **loops;
};
/* First members of every engine's file and socket. */
struct io_file {
    struct io *io;
};
struct io_sock {
    struct io *io;
};

/* For engines. */
int io_init(struct io *io, const struct io_ops *ops, unsigned n_loops); /* makes the loops */
void io_fini(struct io *io); /* every stage of io_init; frees what is left in mailboxes */
/* One turn without the wait; returns true when something is ready to run again at once. */
bool loop_turn(struct loop *l);
/* Is a message or a coroutine waiting to be run? Own thread. */
bool loop_has_work(struct loop *l);
/* Around the engine's wait: false says "do not wait, work has come". From true until loop_awake()
 * whoever brings work from another thread calls ops->kick, at most once. */
bool loop_may_sleep(struct loop *l);
void loop_awake(struct loop *l);
/* End the wait of `l` if it sleeps. Any thread. */
void loop_kick(struct loop *l);
/* After the loops have left: call the messages whose function is `fn`, leave the others. */
void loop_run_leftovers(struct loop *l, void (*fn)(struct loop_msg *));
/* When the next timer is due: io_now ns, IO_FOREVER when there is none. */
uint64_t loop_next_deadline(struct loop *l);
/* The thread (or the simulator) is now loop `l`, or none (NULL): what loop_self() says. */
void loop_enter(struct loop *l);

/* Between loop.c and event.c; own thread of `l`. A timer that is due is taken off the heap and
 * given to event_timer_due(). */
void loop_timer_arm(struct loop *l, struct io_timer *t);
void loop_timer_disarm(struct loop *l, struct io_timer *t); /* not armed: nothing */
void event_timer_due(struct io_timer *t);

/* buf.c: the pool of the loop `l`, and its region, end. */
void buf_pool_free(struct loop *l);
/* From now on io_buf_get() on loop `l` prefers memory of a region of its own. add() tells the
 * engine about each slab before it is used; when it fails the region stays as large as it is. Own
 * thread, once. 0 or -errno. */
enum { BUF_REGION_SLABS = 16, BUF_SLAB_BYTES = 1 << 20 };
int buf_region_start(struct loop *l,
                     int (*add)(struct loop *, unsigned slab, void *base, size_t len));
/* The slab of `l`'s region in which all of [p, p+len) lies, or -1. Own thread. */
int buf_region_slab(struct loop *l, const void *p, size_t len);
