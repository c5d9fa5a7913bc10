/* SPDX-License-Identifier: Apache-2.0 */
/* What the tests of the simulator share.
 *
 * Assertions inside coroutines do not jump (cmocka would leave the coroutine's stack): CHECK()
 * prints the seed and ends the process. */
#pragma once
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "base/bytes.h"
#include "io/sim.h"
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

#define SECOND UINT64_C(1000000000)

/* Of the run that is under way: for the message of a failure. */
static uint64_t current_seed;

#define CHECK(cond)                                                                                \
    do {                                                                                           \
        if (!(cond)) {                                                                             \
            fprintf(stderr, "%s:%d: SIM_SEED=%" PRIu64 ": %s\n", __FILE__, __LINE__, current_seed, \
                    #cond);                                                                        \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

/* One life: fn(arg) on loop 0, to the end. Returns what io_run() said. */
static inline int live(struct sim_config cfg, void (*fn)(void *), void *arg, uint64_t *hash)
{
    struct io *io;
    current_seed = cfg.seed;
    CHECK(sim_new(&cfg, &io) == 0);
    int r = io_run(io, fn, arg);
    if (hash)
        *hash = sim_trace_hash(io);
    io_free(io);
    return r;
}

static inline void live_well(struct sim_config cfg, void (*fn)(void *), void *arg)
{
    int r = live(cfg, fn, arg, NULL);
    if (r != 0)
        fprintf(stderr, "SIM_SEED=%" PRIu64 ": io_run: %d\n", cfg.seed, r);
    assert_int_equal(r, 0);
}

static inline struct io *self(void)
{
    return loop_io(loop_self());
}

static inline co_fn ssize_t write_at(struct io_file *f, const void *buf, size_t len, uint64_t off,
                                     unsigned flags)
{
    struct iovec iov = {(void *)buf, len};
    return io_pwritev(f, &iov, 1, off, flags);
}

static inline co_fn ssize_t read_at(struct io_file *f, void *buf, size_t len, uint64_t off)
{
    struct iovec iov = {buf, len};
    return io_preadv(f, &iov, 1, off);
}

static inline co_fn struct io_file *must_open(const char *path, int flags)
{
    struct io_file *f;
    int r = io_open(path, flags, 0644, &f);
    CHECK(r == 0);
    return f;
}

static inline co_fn int send_all(struct io_sock *s, const void *buf, size_t len)
{
    struct iovec iov = {(void *)buf, len};
    return io_send(s, &iov, 1);
}

static inline struct io_addr unix_addr(const char *path)
{
    struct io_addr a = {.type = IO_ADDR_UNIX};
    snprintf(a.path, sizeof a.path, "%s", path);
    return a;
}
