/* SPDX-License-Identifier: Apache-2.0 */
/* Inside the simulator: one life of the daemon. sim.c chooses what happens next; sim_file.c and
 * sim_net.c say what each operation does.
 *
 * An operation lives on the stack of the coroutine that called io.h. It is submitted, takes effect
 * at some later step (perhaps in several parts: a send under back-pressure), and is answered at a
 * later step still. In between anything may happen, a power cut too. With some probability all
 * three happen at once, as when the page cache can serve a read. */
#pragma once
#include "io/loop.h"
#include "io/sim_disk.h"

struct sim;
struct sim_file;
struct sim_sock;
struct sim_conn;

struct sim_op {
    enum sim_kind kind;
    const char *name; /* file or listener: for faults, the trace and the report */
    uint64_t off, len;
    bool may_inline;
    bool own_errors; /* effect() looks at `err`; otherwise an injected error replaces it */
    bool (*ready)(const struct sim_op *); /* can it take effect? NULL: yes */
    bool (*effect)(struct sim_op *);      /* false: in part; the rest when it is ready again */
    void (*finish)(struct sim_op *);      /* as it is answered; may be NULL */
    int64_t result;
    int err; /* injected, negative; 0: none */

    struct sim *sim;
    struct loop *loop;
    struct co *co;
    uint64_t number, not_before, stall_after;
    bool effected;
    struct sim_op *next, *prev;
};

struct sim {
    struct io io; /* first */
    struct sim_config cfg;
    struct sim_world *world;
    bool own_world, stopping, running, verbose;
    unsigned life;                /* of the world, when we began */
    struct sim_rng order, chance; /* what happens next; io_random() */
    uint64_t now, steps, cut_at, hash, n_submitted;
    struct sim_op *ops, *last_op; /* submitted and not answered, in order of submission */
    struct sim_file *files;       /* open ones */
    struct sim_sock *socks;       /* listeners and ends of connections */
    struct sim_conn *fd_conns;    /* made by io_sock_from_fds(), not yet asked for */
    unsigned next_port;
    int client_pid;
};

/* Runs it to its answer. co_fn unless it can be answered at once. */
int64_t sim_op_run(struct sim *s, struct sim_op *op);
/* One line of the trace. `what` and the numbers go into the hash. */
void sim_trace(struct sim *s, const char *what, uint64_t a, uint64_t b, uint64_t c);
uint64_t sim_data_hash(const void *buf, size_t len);
/* Up to the longest time that one part of an operation takes. */
uint64_t sim_latency(struct sim *s);

/* sim_file.c */
void sim_files_free(struct sim *s); /* those that the core left open */
int sim_open(struct io *io, const char *path, int flags, unsigned mode, struct io_file **out);
void sim_close(struct io_file *f);
int sim_fstat(struct io_file *f, struct io_stat *st);
int sim_stat(struct io *io, const char *path, struct io_stat *st);
ssize_t sim_preadv(struct io_file *f, const struct iovec *iov, int n, uint64_t off);
ssize_t sim_pwritev(struct io_file *f, const struct iovec *iov, int n, uint64_t off,
                    unsigned flags);
int sim_fsync(struct io_file *f);
int sim_zero(struct io_file *f, uint64_t off, uint64_t len, enum io_alloc how);
int sim_truncate(struct io_file *f, uint64_t size);
int sim_extent(struct io_file *f, uint64_t off, uint64_t *len, bool *data);
ssize_t sim_copy_range(struct io_file *src, uint64_t src_off, struct io_file *dst, uint64_t dst_off,
                       uint64_t len);
int sim_lock(struct io_file *f, uint64_t off, uint64_t len, enum io_lock how, bool test);
int sim_rename(struct io *io, const char *from, const char *to, unsigned flags);
int sim_unlink(struct io *io, const char *path);
int sim_sync_dir(struct io *io, const char *dir);

/* sim_net.c */
void sim_socks_free(struct sim *s);
int sim_listen(struct io *io, struct io_addr *addr, int backlog, struct io_sock **out,
               struct tide_error *err);
int sim_connect(struct io *io, const struct io_addr *addr, struct io_sock **out);
int sim_from_fds(struct io *io, int rfd, int wfd, struct io_sock **out);
int sim_accept(struct io_sock *listener, struct io_sock **out);
ssize_t sim_recv(struct io_sock *s, void *buf, size_t len, bool now);
int sim_send(struct io_sock *s, const struct iovec *iov, int n);
bool sim_gone(struct io_sock *s);
ssize_t sim_send_file(struct io_sock *s, struct iovec head, struct io_file *f, uint64_t off,
                      uint64_t len, uint64_t deadline);
void sim_shutdown(struct io_sock *s);
void sim_sock_close(struct io_sock *s);
void sim_peer(struct io_sock *s, char *buf, size_t len);
int sim_peer_pid(struct io_sock *s);
