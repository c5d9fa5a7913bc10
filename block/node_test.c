/* SPDX-License-Identifier: Apache-2.0 */
/* Tests of node.c over a driver made up here: it keeps a small disk in memory, writes down what it
 * is asked for, and may hold requests until the test lets them go. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/bytes.h"
#include "base/check.h"
#include "base/mem.h"
#include "block/driver.h"
#include "block/root.h"
#include "io/io.h"
#include "schema/types.h"

#define CHECK_TRACE(want)                                                                          \
    do {                                                                                           \
        if (strcmp(fake->trace, want)) {                                                           \
            fprintf(stderr, "%s:%d: %s, not %s\n", __FILE__, __LINE__, fake->trace, want);         \
            abort();                                                                               \
        }                                                                                          \
        fake->trace[0] = 0;                                                                        \
    } while (0)

enum { DISK = 64 << 10, A = 512 };

/* ------------------------------------------------------------------ the driver */

struct fake {
    char trace[1000];
    unsigned char disk[DISK];
    struct spin lock;
    bool hold; /* requests that write wait in `held` */
    struct co_queue held;
    int read_error, zero_error;
    struct node *node;
    struct dirty_bitmap *bitmap; /* what it has to say when a request arrives */
};

/* Of the test that runs; a driver's functions have no other way to it. */
static struct fake *fake;

static void note(const char *what, uint64_t off, uint64_t len, unsigned flags)
{
    size_t n = strlen(fake->trace);
    snprintf(fake->trace + n, sizeof fake->trace - n, "%s%s %llu+%llu%s%s", n ? ", " : "", what,
             (unsigned long long)off, (unsigned long long)len, flags & NODE_FUA ? " fua" : "",
             flags & NODE_UNMAP ? " unmap" : "");
}

static co_fn void hold(void)
{
    spin_lock(&fake->lock);
    if (fake->hold)
        co_queue_wait(&fake->held, &fake->lock);
    spin_unlock(&fake->lock);
}

static void check_marked(uint64_t off, uint64_t len)
{
    uint64_t at, end;
    if (fake->bitmap)
        CHECK(bitmap_next_dirty(fake->bitmap->bits, off, off + len, &at, &end));
}

static int fake_open(struct node *n, const struct q_blockdev_options *o, struct tide_error *err)
{
    n->size = o->u.null_co.size;
    n->align = (uint32_t)o->u.null_co.latency_ns;
    fake->node = n;
    return 0;
}

static void fake_close(struct node *n)
{
}

static int fake_preadv(struct node *n, const struct iovec *iov, int niov, uint64_t off,
                       uint64_t len)
{
    note("read", off, len, 0);
    CHECK(niov == 1 && iov->iov_len == len && off + len <= DISK);
    memcpy(iov->iov_base, fake->disk + off, len);
    return fake->read_error;
}

static int fake_pwritev(struct node *n, const struct iovec *iov, int niov, uint64_t off,
                        uint64_t len, unsigned flags)
{
    note("write", off, len, flags);
    check_marked(off, len);
    hold();
    for (int i = 0; i < niov; i++) {
        CHECK(!((uintptr_t)iov[i].iov_base & (n->align - 1)));
        memcpy(fake->disk + off, iov[i].iov_base, iov[i].iov_len);
        off += iov[i].iov_len;
    }
    return 0;
}

static int fake_zero(struct node *n, uint64_t off, uint64_t len, unsigned flags)
{
    note("zero", off, len, flags);
    check_marked(off, len);
    hold();
    if (fake->zero_error == 0)
        memset(fake->disk + off, 0, len);
    return fake->zero_error;
}

static int fake_discard(struct node *n, uint64_t off, uint64_t len)
{
    note("discard", off, len, 0);
    check_marked(off, len);
    return 0;
}

static int fake_flush(struct node *n)
{
    note("flush", 0, 0, 0);
    return 0;
}

static const struct driver_ops fake_driver = {
    .name = "null-co",
    .open = fake_open,
    .close = fake_close,
    .preadv = fake_preadv,
    .pwritev = fake_pwritev,
    .zero = fake_zero,
    .discard = fake_discard,
    .flush = fake_flush,
};

static int over_open(struct node *n, const struct q_blockdev_options *o, struct tide_error *err)
{
    return node_open_child(n, "file", o->u.raw.file, err);
}

static const struct driver_ops over_driver = {
    .name = "raw", .open = over_open, .close = fake_close};
const struct driver_ops *const drivers[] = {&fake_driver, &over_driver, NULL};

/* ------------------------------------------------------------------ a graph in a loop */

struct test {
    struct io *io;
    struct graph *g;
    void (*body)(struct graph *);
};

static co_fn void test_main(void *arg)
{
    struct test *t = arg;
    CHECK(graph_start(t->g) == 0);
    t->body(t->g);
    graph_close_all(t->g);
    graph_stop(t->g);
    io_stop(t->io);
}

static void run(void (*body)(struct graph *))
{
    struct tide_error err;
    struct test t = {.body = body};
    fake = mem_zalloc(sizeof *fake);
    assert_int_equal(io_new(IO_PORTABLE, 1, &t.io, &err), 0);
    assert_int_equal(graph_new(t.io, &t.g), 0);
    assert_int_equal(io_run(t.io, test_main, &t), 0);
    graph_free(t.g);
    io_free(t.io);
    mem_free(fake);
}

static co_fn struct node *add(struct graph *g, const struct q_blockdev_options *more, uint64_t size,
                              unsigned align)
{
    struct q_blockdev_options o = *more;
    struct tide_error err;
    struct node *n;
    o.driver = Q_BLOCKDEV_DRIVER_NULL_CO;
    o.node_name = "n";
    o.u.null_co.size = size;
    o.u.null_co.latency_ns = align;
    CHECK(graph_add(g, &o, &n, &err) == 0);
    return n;
}

#define UNMAP .has_discard = true, .discard = Q_BLOCKDEV_DISCARD_OPTIONS_UNMAP

/* A request in a coroutine of its own. */
struct request {
    char kind; /* w, z, d */
    uint64_t off, len;
    char *mem;
    bool over;
    int result;
};

static co_fn void request_main(void *arg)
{
    struct request *r = arg;
    struct iovec iov = {r->mem, r->len};
    r->result = r->kind == 'w'   ? node_pwritev(fake->node, &iov, 1, r->off, r->len, 0)
                : r->kind == 'z' ? node_zero(fake->node, r->off, r->len, 0)
                                 : node_discard(fake->node, r->off, r->len);
    r->over = true;
}

static co_fn void start(struct request *r, char kind, uint64_t off, uint64_t len, unsigned odd)
{
    *r = (struct request){.kind = kind, .off = off, .len = len};
    r->mem = (char *)io_buf_get(len + odd) + odd;
    memset(r->mem, 'x', len);
    CHECK(loop_run_now(request_main, r) == 0);
}

static co_fn void finish(struct request *r, unsigned odd)
{
    while (!r->over) {
        spin_lock(&fake->lock);
        co_queue_wake_one(&fake->held);
        spin_unlock(&fake->lock);
        loop_pause();
    }
    CHECK(r->result == 0);
    io_buf_put(r->mem - odd, r->len + odd);
}

/* ------------------------------------------------------------------ tests */

static co_fn void mark_first_body(struct graph *g)
{
    struct node *n = add(g, &(struct q_blockdev_options){UNMAP}, DISK, A);
    struct tide_error err;
    struct request r;
    struct bitmap *bits;
    CHECK(dirty_bitmap_new(n, "b", 512, true, false, &fake->bitmap, &err) == 0);
    CHECK(tracker_attach(fake->bitmap, n) == 0);
    bits = fake->bitmap->bits;
    start(&r, 'w', 4096, 512, 0); /* the driver checks that it is marked */
    finish(&r, 0);
    start(&r, 'w', 8192 + 10, 600, 0);
    finish(&r, 0);
    start(&r, 'z', 16384, 4096, 0);
    finish(&r, 0);
    start(&r, 'd', 32768 - 1, 514, 0);
    finish(&r, 0);
    CHECK(bitmap_count(bits) == 1 + 2 + 8 + 3);
    CHECK(bitmap_test(bits, 32767) &&
          bitmap_test(bits, 32768 + 512)); /* ends that are not passed on */
    CHECK_TRACE("write 4096+512, read 8192+512, read 8704+512, write 8192+1024, zero 16384+4096, "
                "discard 32768+512");
}

static co_fn void refused_body(struct graph *g)
{
    struct node *n = add(g, &(struct q_blockdev_options){0}, DISK, 1);
    struct iovec iov = {fake->disk, 512};
    struct tide_error err;
    struct dirty_bitmap *b;
    CHECK(dirty_bitmap_new(n, "b", 512, true, false, &b, &err) == 0);
    CHECK(tracker_attach(b, n) == 0);
    CHECK(node_pwritev(n, &iov, 1, DISK - 511, 512, 0) == -ENOSPC);
    CHECK(node_pwritev(n, &iov, 1, UINT64_MAX - 10, 512, 0) == -ENOSPC);
    CHECK(node_pwritev(n, &iov, 1, 0, NODE_MAX_IO + 1, 0) == -ENOSPC);
    CHECK(node_zero(n, DISK, 1, 0) == -ENOSPC);
    CHECK(node_zero(n, 1, UINT64_MAX, 0) == -ENOSPC);
    CHECK(node_discard(n, DISK - 1, 2) == -ENOSPC);
    CHECK(node_discard(n, 0, 512) == 0); /* ignored */
    CHECK(node_preadv(n, &iov, 1, DISK - 1, 2) == -EINVAL);
    CHECK(node_preadv(n, &iov, 1, UINT64_MAX, 2) == -EINVAL);
    CHECK(node_pwritev(n, &iov, 0, DISK, 0, 0) == 0);
    n->read_only = true;
    CHECK(node_pwritev(n, &iov, 1, 0, 512, 0) == -EPERM);
    CHECK(node_zero(n, 0, 512, 0) == -EPERM);
    CHECK(node_discard(n, 0, 512) == -EPERM);
    CHECK(bitmap_empty(b->bits));
    CHECK_TRACE("");
}

/* Two requests on blocks of 512 bytes: does the second one wait for the first? */
static co_fn void overlap_body(struct graph *g)
{
    static const struct {
        char kind;
        unsigned off, len, odd; /* odd: how far its memory is off */
        char kind2;
        unsigned off2, len2, odd2;
        bool waits;
    } t[] = {
        {'w', 100, 10, 0, 'w', 110, 10, 0, true},  {'w', 100, 10, 0, 'w', 511, 10, 0, true},
        {'w', 100, 10, 0, 'w', 512, 10, 0, false}, {'w', 100, 10, 0, 'w', 0, 512, 0, true},
        {'w', 0, 512, 0, 'w', 100, 10, 0, true},   {'w', 0, 512, 0, 'w', 0, 512, 0, false},
        {'w', 0, 512, 3, 'w', 0, 512, 5, false},   {'w', 0, 1024, 3, 'w', 1000, 10, 0, true},
        {'z', 100, 10, 0, 'w', 110, 10, 0, true},  {'z', 0, 512, 0, 'w', 0, 512, 0, true},
        {'z', 300, 5000, 0, 'w', 10, 1, 0, true},  {'z', 300, 5000, 0, 'w', 5632, 1, 0, false},
        {'w', 10, 1, 0, 'd', 0, 5000, 0, true},    {'w', 5000, 1, 0, 'd', 0, 4608, 0, false},
    };
    struct node *n = add(g, &(struct q_blockdev_options){UNMAP}, DISK, A);
    for (unsigned i = 0; i < sizeof t / sizeof *t; i++) {
        struct request a, b;
        fake->hold = true;
        start(&a, t[i].kind, t[i].off, t[i].len, t[i].odd);
        CHECK(!a.over);
        fake->trace[0] = 0;
        start(&b, t[i].kind2, t[i].off2, t[i].len2, t[i].odd2);
        bool waits = !fake->trace[0];
        if (waits != t[i].waits)
            fprintf(stderr, "row %u\n", i);
        CHECK(waits == t[i].waits);
        finish(&a, t[i].odd);
        finish(&b, t[i].odd2);
        CHECK(TAILQ_EMPTY(&n->writes));
        fake->trace[0] = 0;
    }
}

/* Whole blocks are not read before they are overwritten, wherever they lie in memory. */
static co_fn void whole_blocks_body(struct graph *g)
{
    struct request r;
    add(g, &(struct q_blockdev_options){0}, DISK, A);
    memset(fake->disk, 'o', DISK);
    start(&r, 'w', 512, 512, 1);
    finish(&r, 1);
    start(&r, 'w', 2048, 1024, 7);
    finish(&r, 7);
    start(&r, 'w', 4096, 513, 0);
    finish(&r, 0);
    start(&r, 'w', 8191, 513, 0);
    finish(&r, 0);
    CHECK_TRACE("write 512+512, write 2048+1024, read 4608+512, write 4096+1024, read 7680+512, "
                "write 7680+1024");
    for (unsigned i = 0; i < 10000; i++) {
        bool x = (i >= 512 && i < 1024) || (i >= 2048 && i < 3072) || (i >= 4096 && i < 4609) ||
                 (i >= 8191 && i < 8704);
        CHECK(fake->disk[i] == (x ? 'x' : 'o'));
    }
}

/* What lies behind the last whole block is written alone. Writes that come later wait for it, or it
 * would wait for ever. */
static co_fn void rest_body(struct graph *g)
{
    struct request a, b, c, d;
    add(g, &(struct q_blockdev_options){0}, 8 * 4096 + 512, 4096);
    fake->hold = true;
    start(&a, 'w', 0, 4096, 0);
    start(&b, 'w', 4096, 4096, 0);
    start(&c, 'w', 8 * 4096 + 1, 10, 0);
    start(&d, 'w', 8192, 4096, 0);
    CHECK_TRACE("write 0+4096, write 4096+4096");
    finish(&a, 0);
    CHECK(!c.over && !d.over);
    finish(&b, 0);
    finish(&c, 0);
    finish(&d, 0);
    CHECK_TRACE("read 32768+4096, write 32768+4096, write 8192+4096");
}

static co_fn void read_fails_body(struct graph *g)
{
    struct node *n = add(g, &(struct q_blockdev_options){0}, DISK, A);
    char data[10] = "123456789";
    struct iovec iov = {data, 10};
    fake->read_error = -EIO;
    CHECK(node_pwritev(n, &iov, 1, 100, 10, 0) == -EIO);
    CHECK(node_zero(n, 100, 1000, 0) == -EIO);
    CHECK_TRACE("read 0+512, read 0+512");
    CHECK(TAILQ_EMPTY(&n->writes));
}

/* Zeroes are seen whatever pieces they come in, one other byte anywhere is, too; FUA stays. */
static co_fn void detect_body(struct graph *g, int mode, const char *want)
{
    struct q_blockdev_options o = {UNMAP, .has_detect_zeroes = true, .detect_zeroes = mode};
    struct node *n = add(g, &o, DISK, 1);
    char data[3000] = {0};
    struct iovec iov[] = {{data, 1}, {data + 1, 0}, {data + 1, 999}, {data + 1000, 2000}};
    CHECK(node_pwritev(n, iov, 4, 7, 3000, NODE_FUA) == 0);
    CHECK_TRACE(want);
    static const unsigned at[] = {0, 1, 999, 1000, 1001, 2999};
    for (unsigned i = 0; i < sizeof at / sizeof *at; i++) {
        data[at[i]] = 1;
        CHECK(node_pwritev(n, iov, 4, 0, 3000, 0) == 0);
        CHECK_TRACE("write 0+3000");
        data[at[i]] = 0;
    }
    CHECK(node_pwritev(n, iov, 0, 0, 0, NODE_FUA) == 0);
    CHECK_TRACE("flush 0+0");
}

static co_fn void detect_off_body(struct graph *g)
{
    detect_body(g, Q_BLOCKDEV_DETECT_ZEROES_OPTIONS_OFF, "write 7+3000 fua");
}

static co_fn void detect_on_body(struct graph *g)
{
    detect_body(g, Q_BLOCKDEV_DETECT_ZEROES_OPTIONS_ON, "zero 7+3000 fua");
}

static co_fn void detect_unmap_body(struct graph *g)
{
    detect_body(g, Q_BLOCKDEV_DETECT_ZEROES_OPTIONS_UNMAP, "zero 7+3000 fua unmap");
}

/* Odd ends of what is found to be zeroes are patched; a storage that cannot zero gets zeroes. */
static co_fn void detect_unaligned_body(struct graph *g)
{
    struct q_blockdev_options o = {.has_detect_zeroes = true,
                                   .detect_zeroes = Q_BLOCKDEV_DETECT_ZEROES_OPTIONS_ON};
    struct node *n = add(g, &o, DISK, A);
    char data[2000] = {0};
    struct iovec iov = {data, sizeof data};
    memset(fake->disk, 'o', DISK);
    CHECK(node_pwritev(n, &iov, 1, 100, 2000, NODE_FUA) == 0);
    CHECK_TRACE(
        "read 0+512, write 0+512 fua, zero 512+1536 fua, read 2048+512, write 2048+512 fua");
    for (unsigned i = 0; i < 3000; i++)
        CHECK(fake->disk[i] == (i >= 100 && i < 2100 ? 0 : 'o'));
    fake->zero_error = -EOPNOTSUPP;
    CHECK(node_pwritev(n, &iov, 1, 4096, 512, NODE_FUA) == 0);
    CHECK_TRACE("zero 4096+512 fua, write 4096+512 fua");
    CHECK(node_zero(n, 8192, 512, NODE_FAST_ZERO) == -ENOTSUP);
    CHECK(fake->disk[4096] == 0 && fake->disk[8192] == 'o');
}

/* A node that a list has taken out of sight may come back: what a claim has of it, it has of those
 * below, too, whoever uses those meanwhile. */
static co_fn void claims_outlast_sight_body(struct graph *g)
{
    const unsigned both = ROOT_READ | ROOT_WRITE;
    struct q_blockdev_ref ref = {.kind = Q_KIND_STRING, .string = "n"};
    struct q_blockdev_options o = {
        .driver = Q_BLOCKDEV_DRIVER_RAW, .node_name = "over", .u.raw.file = &ref};
    struct tide_error err;
    struct root *claim, *other;
    struct node *over, *n = add(g, &(struct q_blockdev_options){0}, DISK, 1);
    CHECK(graph_add(g, &o, &over, &err) == 0);
    CHECK(root_claim(over, both, "export 'e'", &claim, &err) == 0);
    graph_unpublish(over);
    CHECK(root_new(n, ROOT_READ, "export 'f'", &other, &err) == 0 && n->perm == both);
    root_free(other);
    CHECK(n->perm == both);
    graph_publish(over);
    CHECK(n->perm == both);
    graph_unpublish(over);
    root_free(claim);
    CHECK(n->perm == 0);
    graph_close(over, false);
}

#define TESTS(X)                                                                                   \
    X(mark_first)                                                                                  \
    X(refused)                                                                                     \
    X(overlap)                                                                                     \
    X(whole_blocks)                                                                                \
    X(claims_outlast_sight)                                                                        \
    X(rest) X(read_fails) X(detect_off) X(detect_on) X(detect_unmap) X(detect_unaligned)
#define DEFINE(name)                                                                               \
    static void name(void **state)                                                                 \
    {                                                                                              \
        run(name##_body);                                                                          \
    }
TESTS(DEFINE)
#define LIST(name) cmocka_unit_test(name),

int main(void)
{
    const struct CMUnitTest tests[] = {TESTS(LIST)};
    return cmocka_run_group_tests_name("node", tests, NULL, NULL);
}
