/* SPDX-License-Identifier: Apache-2.0 */
/* What the two real engines share. real.c runs the loops and their threads, real_file.c and
 * its neighbours (io/real_file.h) do files, real_sock.c sockets, pool.c runs what would block. An
 * engine (`struct backend`) only says how a loop waits, how a file request that may block is
 * started, and how readiness of a descriptor is awaited. Only files of io/ include this. */
#pragma once
#include <pthread.h>
#include <signal.h>

#include "co/sync.h"
#include "io/loop.h"

#define IO_MAX_LOOPS 256u

/* Constructors of the engines. */
int io_portable_new(unsigned n_loops, struct io **out, struct tide_error *err);
int io_uring_new(unsigned n_loops, struct io **out, struct tide_error *err);

struct real_file;
struct real_sock;
struct pool_op;

/* Where data and holes lie, from edge[0] on: what lies between two edges is the other of what lies
 * between the next two. */
enum { LOOK_EDGES = 32 };
struct look {
    unsigned n, room; /* edges: how many, at most */
    bool data;        /* behind the first */
    uint64_t edge[LOOK_EDGES];
};
/* The last one on this loop, and who looked, in which turn. */
struct last_look {
    struct look look;
    struct inode *inode;
    struct co *co;
    uint64_t turn, n_started;
};

/* First member of an engine's state of one loop (loop->engine). Own thread only. */
struct real_loop {
    unsigned waits;      /* directions of sockets that somebody waits for */
    unsigned requests;   /* requests of files that may take a while, under way */
    uint64_t spin_ns[2]; /* how long to look before sleeping: without and with such requests */
    uint64_t load_at;    /* when the machine's load is read next */
    bool machine_busy;   /* more runnable threads than CPUs */
    struct last_look last_look;
};

struct real_io;

struct backend {
    const char *name;
    /* On the loop's own thread, before its first turn. */
    int (*loop_start)(struct loop *);
    /* Hand over what was started, and collect completions: at once (0), within `ns`, or whenever
     * they come (IO_FOREVER). Wakes coroutines, enters none. */
    void (*wait)(struct loop *, uint64_t ns);
    void (*kick)(struct loop *);
    /* One attempt, may be short; rwf: RWF_ flags. */
    co_fn ssize_t (*rw)(struct real_file *, bool write, const struct iovec *, int, uint64_t,
                        int rwf);
    co_fn int (*sync)(struct real_file *);
    /* Wait for data of a socket and take them in one go; NULL: arm, then recv(2) again. */
    co_fn ssize_t (*recv)(struct real_sock *, void *, size_t);
    /* See that sock_ready() will be called for the direction; 1: it is always ready. */
    int (*arm)(struct real_sock *, int dir);
    /* Forget the socket; then, at once or later, real_sock_free() is called. */
    void (*detach)(struct real_sock *);
    void (*free_loops)(struct real_io *);
};

/* How much of the pool one inode may take, one mount that may hang, and all of those, so that a
 * dead mount leaves threads for the others. */
enum pool_class { POOL_META, POOL_DATA, POOL_LOOK, N_POOL_CLASSES };
enum share_level { SHARE_INODE, SHARE_MOUNT, SHARE_MOUNTS, N_SHARE_LEVELS };

struct pool_queue {
    struct pool_op *head, *tail;
};
/* Guarded by the pool's mutex, but for the first two. */
struct pool_share {
    enum share_level level;
    struct pool_share *up; /* a place here takes one there, too; NULL: the last */
    unsigned busy[N_POOL_CLASSES];
    struct pool_queue waiting[N_POOL_CLASSES];
};

#define N_INODE_BUCKETS 64u

struct real_io {
    struct io io;      /* first */
    struct io_ops ops; /* with name and kick of the backend */
    const struct backend *be;
    struct pool *pool;
    pthread_mutex_t inode_mutex; /* guards both tables and the reference counts in them */
    struct inode *inodes[N_INODE_BUCKETS];
    struct disk *disks;
    struct pool_share mounts_share;
    sigset_t signals;
    /* Threads that hang in a system call (a dead mount) are left behind so long after io_stop(),
     * and with them all they may still touch. */
    uint64_t leave_ns;
    _Atomic uint64_t stopped_at;
    pthread_mutex_t left_mutex;
    pthread_cond_t left;
    unsigned n_left; /* loops' threads that have ended */
    bool stuck;      /* not all have */
    struct real_sock *signal_sock;
};
static inline struct real_io *real_of(struct io *io)
{
    return (struct real_io *)io;
}

/* For constructors: `io` zeroed, be set. On failure real_free() takes every stage. */
int real_init(struct real_io *io, const struct backend *be, unsigned n_loops);
void real_free(struct io *io);
uint64_t real_now(struct io *io);

/* A condition whose waits end at a time of real_now(): then false. */
void cond_init(pthread_cond_t *c);
bool cond_wait(pthread_cond_t *c, pthread_mutex_t *mutex, uint64_t deadline);

/* ------------------------------------------------------------------ pool */

/* An operation that may block, by name. It lives on the stack of the coroutine that waits. */
enum pool_kind {
    POOL_OPEN,
    POOL_CLOSE,
    POOL_FSTAT,
    POOL_STAT,
    POOL_RW,
    POOL_DRAIN,
    POOL_SYNC,
    POOL_ZERO,
    POOL_TRUNCATE,
    POOL_EXTENT,
    POOL_COPY,
    POOL_LOCK,
    POOL_RENAME,
    POOL_UNLINK,
    POOL_SYNC_DIR,
    POOL_LISTEN,
    POOL_CONNECT,
    N_POOL_KINDS,
};
struct pool_op {
    enum pool_kind kind;
    enum pool_class class;
    struct pool_share *share; /* NULL: not limited */
    ssize_t result;
    struct co *co;
    struct pool_op *next;

    struct real_io *io;
    struct real_file *file, *file2;
    struct real_sock *sock;
    const char *path, *path2;
    unsigned flags, mode;
    const struct iovec *iov;
    int n;
    bool write, test;
    uint64_t off, off2, len;
    enum io_alloc alloc;
    enum io_lock lock;
    struct io_stat *stat;
    struct look *look;
    struct role_req *role;
    struct io_addr *addr;
    struct tide_error *err;
};

int pool_new(struct pool **out);
/* Nothing is waited for any more; NULL is fine. False: at `deadline` (real_now) threads still hung
 * in system calls, and nothing is freed. */
bool pool_free(struct pool *p, uint64_t deadline);
/* Runs `op` on a thread of the pool, waits for it, returns its result. */
co_fn ssize_t pool_run(struct pool *p, struct pool_op *op);

/* What the names stand for; they block and return >= 0 or -errno. */
ssize_t file_do_open(struct pool_op *op);
ssize_t file_do_close(struct pool_op *op);
ssize_t file_do_fstat(struct pool_op *op);
ssize_t file_do_stat(struct pool_op *op);
ssize_t file_do_rw(struct pool_op *op);
ssize_t file_do_drain(struct pool_op *op);
ssize_t file_do_sync(struct pool_op *op);
ssize_t file_do_zero(struct pool_op *op);
ssize_t file_do_truncate(struct pool_op *op);
ssize_t file_do_extent(struct pool_op *op);
ssize_t file_do_copy(struct pool_op *op);
ssize_t file_do_lock(struct pool_op *op);
ssize_t file_do_rename(struct pool_op *op);
ssize_t file_do_unlink(struct pool_op *op);
ssize_t file_do_sync_dir(struct pool_op *op);
ssize_t sock_do_listen(struct pool_op *op);
ssize_t sock_do_connect(struct pool_op *op);

/* ------------------------------------------------------------------ files */

struct role_req;

/* One for all open files of a file system, or of a block device. */
struct disk_wait;
struct disk {
    uint64_t dev; /* of the whole device, not of a partition */
    bool block;
    unsigned refs; /* inodes */
    struct disk *next;
    struct pool_share share; /* where it may hang */
    /* Requests that may be with the disk at a time; 0: any number. */
    unsigned max_out;
    unsigned max_bytes;     /* that the kernel puts into one of them; 0: any number */
    _Atomic unsigned n_out; /* changes under `spin` */
    struct spin spin;
    struct disk_wait *first, *last; /* first come, first served */
};

/* One for all open files of an inode: who may write, where data was seen, its share of the pool. */
struct inode {
    uint64_t dev, ino;
    bool block;
    unsigned refs;
    struct inode *next;
    struct disk *disk;
    struct spin spin; /* guards the writer role */
    bool role_held;
    struct role_req *role_head, *role_tail;
    bool slow_held; /* the same for a thread of the pool, while writes are slow */
    struct role_req *slow_head, *slow_tail;
    _Atomic uint64_t slow_until; /* writes go to the pool until then */
    struct spin look_spin;       /* guards what follows */
    uint64_t data_off, data_end; /* data is there, at least until data_until */
    uint64_t data_until;
    unsigned n_cuts; /* zeroes, punches, truncates that have begun or ended */
    struct pool_share share;
};

/* How a file answers a request that must not wait. */
enum nowait { NOWAIT_UNKNOWN, NOWAIT_YES, NOWAIT_PLAIN, NOWAIT_NEVER };

struct sync_waiter;

struct real_file {
    struct io_file file; /* first */
    int fd;
    bool direct, block, memory;
    bool may_ask;  /* the kernel says what of it is cached */
    bool may_hang; /* behind a network or another process: no write on a loop */
    uint32_t align;
    struct inode *inode;
    _Atomic int read_mode, write_mode; /* enum nowait */
    struct spin sync_spin;             /* guards what follows */
    bool syncing;
    int sync_error; /* sticky */
    struct sync_waiter *sync_head, *sync_tail;
};
static inline struct real_io *file_io(struct real_file *f)
{
    return real_of(f->file.io);
}

/* The part of `iov` after `skip` bytes, for one system call: either a piece of `iov` itself or a
 * copy in `tmp`. At most IOV_MAX or N_IOV_TMP entries, *n of them. */
#define N_IOV_TMP 64
const struct iovec *iov_after(const struct iovec *iov, int n_iov, size_t skip,
                              struct iovec tmp[N_IOV_TMP], int *n);
size_t iov_bytes(const struct iovec *iov, int n);

/* Can all of [off, off+len) be had from memory, without waiting for a disk? Where the kernel does
 * not tell: no. Own loop, never waits. */
bool real_is_cached(struct real_file *f, uint64_t off, uint64_t len);

int real_open(struct io *, const char *, int, unsigned, struct io_file **);
void real_close(struct io_file *);
int real_fstat(struct io_file *, struct io_stat *);
int real_stat(struct io *, const char *, struct io_stat *);
ssize_t real_preadv(struct io_file *, const struct iovec *, int, uint64_t);
ssize_t real_pwritev(struct io_file *, const struct iovec *, int, uint64_t, unsigned);
int real_fsync(struct io_file *);
int real_zero(struct io_file *, uint64_t, uint64_t, enum io_alloc);
int real_truncate(struct io_file *, uint64_t);
int real_extent(struct io_file *, uint64_t, uint64_t *, bool *);
ssize_t real_copy_range(struct io_file *, uint64_t, struct io_file *, uint64_t, uint64_t);
int real_lock(struct io_file *, uint64_t, uint64_t, enum io_lock, bool test);
int real_rename(struct io *, const char *, const char *, unsigned);
int real_unlink(struct io *, const char *);
int real_sync_dir(struct io *, const char *);

/* ------------------------------------------------------------------ sockets */

enum { SOCK_RD, SOCK_WR };

struct real_sock {
    struct io_sock sock; /* first */
    int fd[2];           /* to read, to write; the same for a socket */
    int old_flags[2];    /* of inherited descriptors: O_NONBLOCK is taken back at the end; or -1 */
    bool is_socket, is_unix, listener;
    bool own;      /* made by us: nobody else uses its description */
    bool own_path; /* remove `path` if it is still this inode */
    uint64_t path_dev, path_ino;
    char path[108];
    _Atomic bool shut;
    struct io_event ready[2];
    /* For the backend. */
    struct loop *loop; /* where the descriptor is registered, or NULL */
    unsigned armed;    /* bit per direction; on `loop` only */
    bool added[2];     /* portable: the descriptor is in the epoll set */
    bool dying;        /* io_uring: free when no direction is armed */
    struct real_sock *next_dying;
    struct loop_msg msg;
};
static inline struct real_io *sock_io(struct real_sock *s)
{
    return real_of(s->sock.io);
}
/* The direction may be tried again. Clears its bit in `armed`; on s->loop. */
void sock_ready(struct real_sock *s, int dir);
void real_sock_free(struct real_sock *s);
void real_sock_free_msg(struct loop_msg *m); /* s->msg: frees its socket */

int real_listen(struct io *, struct io_addr *, int, struct io_sock **, struct tide_error *);
int real_connect(struct io *, const struct io_addr *, struct io_sock **);
int real_from_fds(struct io *, int, int, struct io_sock **);
int real_accept(struct io_sock *, struct io_sock **);
ssize_t real_recv(struct io_sock *, void *, size_t, bool now);
int real_send(struct io_sock *, const struct iovec *, int);
ssize_t real_send_file(struct io_sock *, struct iovec, struct io_file *, uint64_t, uint64_t,
                       uint64_t);
bool real_gone(struct io_sock *);
void real_shutdown(struct io_sock *);
void real_sock_close(struct io_sock *);
void real_peer(struct io_sock *, char *, size_t);
int real_peer_pid(struct io_sock *);
