/* SPDX-License-Identifier: Apache-2.0 */
/* Tests of files of the real engines that many use at once, or that are slow: who waits for whom.
 */
#include <errno.h>
#include <sys/stat.h>

#include "base/bytes.h"
#include "base/mem.h"
#include "co/sync.h"
#include "io/io_test.h"
#include "io/loop.h"
#include "io/real.h"

enum { WRITERS = 12, WRITES = 200, BLOCK = 3000 };
struct writer {
    struct co_group *group;
    unsigned id;
};

/* Every writer opens the file itself: the role belongs to the inode, not to the open file. */
static void writer_main(void *arg)
{
    struct writer *w = arg;
    struct io_file *f;
    unsigned char *a = mem_alloc(BLOCK), *b = mem_alloc(BLOCK);
    CHECK_EQ(io_open(in_dir("shared"), O_RDWR, 0, &f), 0);
    for (unsigned i = 0; i < WRITES; i++) {
        uint64_t off = ((uint64_t)i * WRITERS + w->id) * BLOCK;
        fill(a, BLOCK, i * WRITERS + w->id);
        struct iovec v[2] = {{a, 1000}, {a + 1000, BLOCK - 1000}}, r = {b, BLOCK};
        CHECK_EQ(io_pwritev(f, v, 2, off, 0), BLOCK);
        if (i % 50 == w->id)
            CHECK_EQ(io_fsync(f), 0);
        CHECK_EQ(io_preadv(f, &r, 1, off), BLOCK);
        CHECK(!memcmp(a, b, BLOCK));
        if (i % 5 == 0)
            loop_pause();
    }
    io_close(f);
    mem_free(a);
    mem_free(b);
    co_group_done(w->group);
}

static void crowd_of_writers(struct io *io, bool slow)
{
    struct io_file *f = open_new("shared", 0);
    struct inode *ino = ((struct real_file *)f)->inode;
    struct co_group group = CO_GROUP_INIT;
    struct writer w[WRITERS];
    co_group_add(&group, WRITERS);
    for (unsigned i = 0; i < WRITERS; i++) {
        w[i] = (struct writer){&group, i};
        CHECK_EQ(loop_spawn(io_loop(io, i % N_LOOPS), writer_main, &w[i]), 0);
    }
    for (unsigned i = 0; slow && i < 200; i++) { /* slow, mostly */
        atomic_store(&ino->slow_until, i % 10 ? io_now(io) + 60 * (uint64_t)SECOND : 0);
        loop_pause();
    }
    co_group_wait(&group);
    CHECK(!ino->role_held && !ino->slow_held && !ino->slow_head);
    unsigned char a[BLOCK], b[BLOCK];
    for (unsigned i = 0; i < WRITERS * WRITES; i++) {
        struct iovec v = {b, BLOCK};
        fill(a, BLOCK, i);
        CHECK_EQ(io_preadv(f, &v, 1, (uint64_t)i * BLOCK), BLOCK);
        CHECK(!memcmp(a, b, BLOCK));
    }
    io_close(f);
}

static void writers_body(struct io *io)
{
    crowd_of_writers(io, false);
}

static void slow_writers_body(struct io *io)
{
    crowd_of_writers(io, true);
}

struct flusher {
    struct co_group *group;
    struct io_file *file;
};

static void flusher_main(void *arg)
{
    struct flusher *fl = arg;
    for (int i = 0; i < 10; i++)
        CHECK_EQ(io_fsync(fl->file), 0);
    co_group_done(fl->group);
}

/* One file, flushed from all loops at once: the joining and handing over of syncs. */
static void flushers_body(struct io *io)
{
    struct co_group group = CO_GROUP_INIT;
    struct flusher fl = {&group, open_new("flushed", 0)};
    struct iovec v = {"x", 1};
    co_group_add(&group, 9);
    for (int i = 0; i < 9; i++)
        CHECK_EQ(loop_spawn(io_loop(io, i % N_LOOPS), flusher_main, &fl), 0);
    for (int i = 0; i < 20; i++)
        CHECK_EQ(io_pwritev(fl.file, &v, 1, i, IO_DSYNC), 1);
    co_group_wait(&group);
    io_close(fl.file);
}

/* From here to the sockets the tests look inside: they bring about what a healthy disk does not. */

struct queued {
    struct io_file *file;
    unsigned index, *done, order;
    bool flush;
    struct co_group *group;
};

static void queued_main(void *arg)
{
    struct queued *q = arg;
    unsigned char a[100];
    struct iovec v = {a, sizeof a};
    fill(a, sizeof a, q->index);
    if (q->flush)
        CHECK_EQ(io_fsync(q->file), 0);
    else
        CHECK_EQ(io_pwritev(q->file, &v, 1, q->index * sizeof a, 0), sizeof a);
    q->order = (*q->done)++;
    co_group_done(q->group);
}

/* While somebody holds the writer role, requests queue. The next holder serves 32 of them and hands
 * the role on; a flush waits for those before it. (A disk that took 2 ms over a write has sent the
 * rest to the pool; then their order says nothing.) */
static void role_body(struct io *io)
{
    enum { N = 80, FLUSH = 50 };
    struct io_file *f = open_new("role", 0);
    struct inode *ino = ((struct real_file *)f)->inode;
    struct queued q[N];
    unsigned done = 0;
    struct co_group group = CO_GROUP_INIT;
    unsigned char a[100], b[100];
    ino->role_held = true;
    for (unsigned i = 0; i < N; i++) {
        q[i] = (struct queued){f, i, &done, 0, i == FLUSH, &group};
        co_group_add(&group, 1);
        CHECK_EQ(loop_run_now(queued_main, &q[i]), 0);
    }
    CHECK_EQ(done, 0);
    ino->role_held = false;
    struct iovec v = {a, sizeof a}, r = {b, sizeof b};
    CHECK_EQ(io_pwritev(f, &v, 1, N * sizeof a, 0), sizeof a);
    CHECK(ino->role_held || ino->slow_until); /* handed on, not dropped */
    co_group_wait(&group);
    CHECK(!ino->role_held && !ino->role_head);
    for (unsigned i = 0; i < N; i++) {
        CHECK(i >= FLUSH || q[i].order < q[FLUSH].order || ino->slow_until);
        fill(a, sizeof a, i);
        if (i == FLUSH)
            memset(a, 0, sizeof a);
        CHECK_EQ(io_preadv(f, &r, 1, i * sizeof a), sizeof b);
        CHECK(!memcmp(a, b, sizeof a));
    }
    io_close(f);
}

/* After a slow write the pool writes; requests that queued for the role before go there too. */
static void slow_body(struct io *io)
{
    struct io_file *f = open_new("slow", 0);
    struct real_file *rf = (struct real_file *)f;
    struct queued q[10];
    unsigned done = 0;
    struct co_group group = CO_GROUP_INIT;
    unsigned char a[100], b[100];
    struct iovec v = {a, sizeof a}, r = {b, sizeof b};
    rf->inode->role_held = true;
    for (unsigned i = 0; i < 10; i++) {
        q[i] = (struct queued){f, i, &done, 0, false, &group};
        co_group_add(&group, 1);
        CHECK_EQ(loop_run_now(queued_main, &q[i]), 0);
    }
    rf->inode->slow_until = io_now(io) + 60 * (uint64_t)SECOND;
    CHECK_EQ(io_pwritev(f, &v, 1, 5000, 0), sizeof a); /* does not wait for the role */
    CHECK_EQ(done, 0);
    rf->inode->role_held = false;
    struct role_req *head = rf->inode->role_head;
    rf->inode->slow_until = 0;
    CHECK(head);
    CHECK_EQ(io_pwritev(f, &v, 1, 6000, 0), sizeof a);
    co_group_wait(&group);
    rf->write_mode = NOWAIT_YES; /* if that is wrong, the file says so and is asked plainly */
    CHECK_EQ(io_pwritev(f, &v, 1, 7000, 0), sizeof a);
    rf->read_mode = NOWAIT_NEVER; /* reads go to the pool */
    for (unsigned i = 0; i < 10; i++) {
        fill(a, sizeof a, i);
        CHECK_EQ(io_preadv(f, &r, 1, i * sizeof a), sizeof b);
        CHECK(!memcmp(a, b, sizeof a));
    }
    CHECK_EQ(io_preadv(f, &r, 1, 7050), 50);
    io_close(f);
}

static void reads_main(void *arg)
{
    struct queued *q = arg;
    unsigned char *a = io_buf_get(4096), *b = io_buf_get(4096);
    struct iovec r = {b, 4096};
    fill(a, 4096, q->index);
    CHECK_EQ(io_preadv(q->file, &r, 1, q->index * 4096), 4096);
    CHECK(!memcmp(a, b, 4096));
    io_buf_put(a, 4096);
    io_buf_put(b, 4096);
    (*q->done)++;
    co_group_done(q->group);
}

/* More at once than a ring has entries, or the pool has threads. */
static void many_at_once(struct io *io, struct io_file *f)
{
    enum { N = 700, BLOCKS = 50 };
    static struct queued q[N];
    struct co_group group = CO_GROUP_INIT;
    unsigned done = 0;
    unsigned char *a = io_buf_get(4096);
    for (unsigned i = 0; i < BLOCKS; i++) {
        struct iovec v = {a, 4096};
        fill(a, 4096, i);
        CHECK_EQ(io_pwritev(f, &v, 1, i * 4096, 0), 4096);
    }
    io_buf_put(a, 4096);
    co_group_add(&group, N);
    for (unsigned i = 0; i < N; i++) {
        q[i] = (struct queued){.file = f, .index = i % BLOCKS, .done = &done, .group = &group};
        CHECK_EQ(loop_run_now(reads_main, &q[i]), 0);
    }
    co_group_wait(&group);
    CHECK_EQ(done, N);
}

static void many_at_once_body(struct io *io)
{
    struct io_file *f = open_new("plain", 0), *g;
    ((struct real_file *)f)->read_mode = NOWAIT_NEVER; /* in the pool */
    many_at_once(io, f);
    io_close(f);
    if (io_open(in_dir("direct"), O_RDWR | O_CREAT | O_DIRECT, 0600, &g) == 0) {
        many_at_once(io, g);
        io_close(g);
    }
}

/* What the page cache holds is read on the loop, but not all of it in one go. */
static void large_read_body(struct io *io)
{
    enum { LEN = 8 << 20, PIECE = 5000, N = LEN / PIECE };
    struct io_file *f = open_new("large", 0);
    unsigned char *a = mem_alloc(LEN), *b = mem_zalloc(LEN);
    static struct iovec many[N];
    struct iovec all = {a, LEN}, one = {b, LEN};
    fill(a, LEN, 3);
    CHECK_EQ(io_pwritev(f, &all, 1, 0, 0), LEN);
    uint64_t turns = 0;
    for (unsigned i = 0; i < 10 && turns < LEN / MIB - 1; i++) { /* the cache is the kernel's */
        uint64_t before = loop_turn_number(loop_self());
        CHECK_EQ(io_preadv(f, &one, 1, 0), LEN);
        turns = loop_turn_number(loop_self()) - before;
    }
    CHECK(turns >= LEN / MIB - 1);
    CHECK(!memcmp(a, b, LEN));
    memset(b, 0, LEN);
    for (unsigned i = 0; i < N; i++)
        many[i] = (struct iovec){b + i * PIECE, PIECE};
    CHECK_EQ(io_preadv(f, many, N, 0), N * PIECE);
    CHECK(!memcmp(a, b, N * PIECE));
    CHECK_EQ(io_preadv(f, many, N, LEN - 3 * MIB - 7), 3 * MIB + 7); /* to the end, and no more */
    CHECK(!memcmp(a + LEN - 3 * MIB - 7, b, 3 * MIB + 7));
    mem_free(a);
    mem_free(b);
    io_close(f);
}

/* A file system that refuses RWF_NOWAIT has its direct I/O in the pool. */
static void direct_pool_body(struct io *io)
{
    struct io_file *f;
    unsigned char *a = io_buf_get(MIB), *b = io_buf_get(MIB);
    struct iovec v = {a, MIB}, r = {b, MIB};
    fill(a, MIB, 9);
    if (io_open(in_dir("direct"), O_RDWR | O_CREAT | O_DIRECT, 0600, &f) == 0) {
        ((struct real_file *)f)->read_mode = NOWAIT_NEVER;
        CHECK_EQ(io_pwritev(f, &v, 1, 0, 0), MIB);
        CHECK_EQ(io_pwritev(f, &v, 1, MIB, IO_DSYNC), MIB);
        CHECK_EQ(io_preadv(f, &r, 1, MIB), MIB);
        CHECK(!memcmp(a, b, MIB));
        CHECK_EQ(io_fsync(f), 0);
        io_close(f);
    }
    io_buf_put(a, MIB);
    io_buf_put(b, MIB);
}

/* Nothing is written on the loop where a write may hang. */
static void may_hang_body(struct io *io)
{
    struct io_file *f = open_new("slow", 0);
    struct real_file *rf = (struct real_file *)f;
    struct co_group group = CO_GROUP_INIT;
    struct queued q[2];
    unsigned done = 0;
    for (unsigned i = 0; i < 2; i++) {
        rf->may_hang = i;
        q[i] = (struct queued){f, i, &done, 0, false, &group};
        co_group_add(&group, 1);
        CHECK_EQ(loop_run_now(queued_main, &q[i]), 0);
        CHECK(done == 1 || rf->inode->slow_until);
    }
    co_group_wait(&group);
    CHECK_EQ(done, 2);
    rf->may_hang = false;
    io_close(f);
}

struct hung {
    struct pool_op op;
    struct co_group *group;
};

static void hung_main(void *arg)
{
    struct hung *h = arg;
    CHECK_EQ(pool_run(h->op.io->pool, &h->op), 0);
    real_close(&h->op.file->file);
    co_group_done(h->group);
}

/* Mounts that hang, more and busier than the pool has threads for: each gets its share, all of them
 * together theirs, and a local disk goes on. (Opening a pipe hangs until it has another end.) */
static void dead_mounts_body(struct io *io)
{
    enum { MOUNTS = 8, INODES = 5, OPS = 9, N = MOUNTS * INODES * OPS };
    struct real_io *r = real_of(io);
    struct hung *h = mem_calloc(N, sizeof *h);
    struct pool_share *mount = mem_calloc(MOUNTS, sizeof *mount);
    struct pool_share *inode = mem_calloc(MOUNTS * INODES, sizeof *inode);
    struct pool_share all = {.level = SHARE_MOUNTS};
    struct co_group group = CO_GROUP_INIT;
    struct io_file *f = open_new("slow", 0);
    char pipe[256];
    strcpy(pipe, in_dir("pipe"));
    CHECK(mkfifo(pipe, 0600) == 0);
    for (unsigned i = 0; i < N; i++) {
        unsigned k = i / OPS;
        mount[k / INODES] = (struct pool_share){.level = SHARE_MOUNT, .up = &all};
        inode[k].up = &mount[k / INODES];
    }
    for (unsigned i = 0; i < N; i++) {
        h[i].op = (struct pool_op){.kind = POOL_OPEN,
                                   .class = POOL_DATA,
                                   .share = &inode[i / OPS],
                                   .io = r,
                                   .file = mem_zalloc(sizeof(struct real_file)),
                                   .path = pipe};
        h[i].op.file->file.io = io;
        h[i].op.file->fd = -1;
        h[i].group = &group;
        co_group_add(&group, 1);
        CHECK_EQ(loop_run_now(hung_main, &h[i]), 0);
    }
    CHECK_EQ(inode[0].busy[POOL_DATA], 8);
    CHECK_EQ(mount[0].busy[POOL_DATA], 32);
    CHECK_EQ(all.busy[POOL_DATA], 128);
    CHECK_EQ(io_zero(f, 0, 4096, IO_ZERO_PUNCH), 0); /* takes a thread of the pool */
    int other_end = open(pipe, O_RDWR | O_NONBLOCK);
    CHECK(other_end >= 0);
    co_group_wait(&group);
    CHECK_EQ(all.busy[POOL_DATA], 0);
    close(other_end);
    unlink(pipe);
    io_close(f);
    mem_free(inode);
    mem_free(mount);
    mem_free(h);
}

ON_BOTH(writers)
ON_BOTH(slow_writers)
ON_BOTH(flushers)
ON_BOTH(role)
ON_BOTH(slow)
ON_BOTH(many_at_once)
ON_BOTH(large_read)
ON_BOTH(direct_pool)
ON_BOTH(may_hang)
ON_BOTH(dead_mounts)

static int remove_dir(void **state)
{
    return remove_files((const char *const[]){"plain", "direct", "shared", "flushed", "role",
                                              "slow", "large", NULL});
}

int main(int argc, char **argv)
{
    if (argc == 2)
        cmocka_set_test_filter(argv[1]);
    const struct CMUnitTest tests[] = {
        BOTH(writers),  BOTH(slow_writers), BOTH(flushers),   BOTH(role),
        BOTH(slow),     BOTH(many_at_once), BOTH(large_read), BOTH(direct_pool),
        BOTH(may_hang), BOTH(dead_mounts),
    };
    return cmocka_run_group_tests_name("busy files", tests, make_dir, remove_dir);
}
