/* SPDX-License-Identifier: Apache-2.0 */
/* What the tests of the real engines share: a body that runs as the main coroutine on loop 0 of
 * each engine, and checks that work on any loop. Included once by each test program. */
#pragma once
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/check.h"
#include "io/io.h"

#define N_LOOPS 3
#define SECOND 1000000000u

struct run {
    struct io *io;
    void (*body)(struct io *);
};

static void run_main(void *arg)
{
    struct run *r = arg;
    r->body(r->io);
    io_stop(r->io);
}

static void run_on(enum io_kind kind, void (*body)(struct io *))
{
    struct tide_error err;
    struct run r = {.body = body};
    int rc = io_new(kind, N_LOOPS, &r.io, &err);
    if (rc < 0 && kind == IO_URING) {
        fprintf(stderr, "io_uring is not to be had: %s\n", err.msg);
        skip();
    }
    assert_int_equal(rc, 0);
    assert_string_equal(io_engine_name(r.io), kind == IO_URING ? "io_uring" : "portable");
    assert_int_equal(io_run(r.io, run_main, &r), 0);
    io_free(r.io);
}

static inline uint64_t soon(struct io *io)
{
    return io_now(io) + 20 * (uint64_t)SECOND; /* a deadline no healthy run meets */
}

/* A name in the test's directory. Valid until the fourth call after. */
static char test_dir[200];
static const char *in_dir(const char *name)
{
    static _Thread_local char names[4][256];
    static _Thread_local unsigned next;
    char *s = names[next++ % 4];
    snprintf(s, sizeof names[0], "%s/%s", test_dir, name);
    return s;
}

/* In $TMPDIR, else in `where`. */
static inline int make_dir_in(const char *where)
{
    const char *tmp = getenv("TMPDIR");
    snprintf(test_dir, sizeof test_dir, "%s/io_test.XXXXXX", tmp ? tmp : where);
    return mkdtemp(test_dir) ? 0 : -1;
}

static inline int make_dir(void **state)
{
    return make_dir_in("/tmp");
}

/* What tests may leave, up to NULL. */
static inline int remove_files(const char *const *names)
{
    while (*names)
        unlink(in_dir(*names++));
    return rmdir(test_dir); /* fails when a test left something else */
}

static inline void fill(unsigned char *p, size_t n, unsigned seed)
{
    for (size_t i = 0; i < n; i++)
        p[i] = (i * 131 + seed * 29 + (i >> 8)) & 0xff;
}

static inline struct io_file *open_new(const char *name, int flags)
{
    struct io_file *f = NULL;
    CHECK_EQ(io_open(in_dir(name), O_RDWR | O_CREAT | O_TRUNC | flags, 0600, &f), 0);
    return f;
}

#define ON_BOTH(name)                                                                              \
    static void name##_portable(void **state)                                                      \
    {                                                                                              \
        run_on(IO_PORTABLE, name##_body);                                                          \
    }                                                                                              \
    static void name##_uring(void **state)                                                         \
    {                                                                                              \
        run_on(IO_URING, name##_body);                                                             \
    }
#define BOTH(name) cmocka_unit_test(name##_portable), cmocka_unit_test(name##_uring)
