/* SPDX-License-Identifier: Apache-2.0 */
/* Slow writes, which a thread of the pool does for all that have queued up: the one that waits for
 * that thread is answered as soon as the work for others takes its time, not after them all. The
 * kernel's write is ours here (linked with --wrap) and takes as long as the test likes. */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>

#include "base/bytes.h"
#include "io/io_test.h"
#include "io/loop.h"
#include "io/real.h"

enum { WRITERS = 5, BLOCK = 4096 };
#define LONG_NS 3000000u /* longer than a quick write may take: 2 ms */

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static unsigned n_free; /* writes behind so many blocks hang */
static struct io_event begun;

ssize_t __real_pwritev64v2(int fd, const struct iovec *iov, int n, off64_t off, int flags);
ssize_t __wrap_pwritev64v2(int fd, const struct iovec *iov, int n, off64_t off, int flags);

ssize_t __wrap_pwritev64v2(int fd, const struct iovec *iov, int n, off64_t off, int flags)
{
    io_event_set(&begun);
    pthread_mutex_lock(&mutex);
    while (off >= (off64_t)n_free * BLOCK)
        pthread_cond_wait(&changed, &mutex);
    pthread_mutex_unlock(&mutex);
    return __real_pwritev64v2(fd, iov, n, off, flags);
}

static void let_go(unsigned n)
{
    pthread_mutex_lock(&mutex);
    n_free = n;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&mutex);
}

struct writer {
    struct io_file *file;
    unsigned i;
    struct io_event done;
};

static void writer_main(void *arg)
{
    struct writer *w = arg;
    char block[BLOCK];
    struct iovec iov = {block, sizeof block};
    memset(block, 'a' + (int)w->i, sizeof block);
    CHECK_EQ(io_pwritev(w->file, &iov, 1, (uint64_t)w->i * BLOCK, 0), BLOCK);
    io_event_set(&w->done);
}

static void first_is_answered_body(struct io *io)
{
    struct io_event never = IO_EVENT_INIT;
    struct writer w[WRITERS] = {0};
    struct io_file *f;
    char back[BLOCK];
    struct iovec iov = {back, sizeof back};
    begun = (struct io_event)IO_EVENT_INIT;
    let_go(0);
    CHECK_EQ(io_open(in_dir("slow"), O_RDWR | O_CREAT | O_TRUNC, 0600, &f), 0);
    ((struct real_file *)f)->inode->slow_until = io_now(io) + 60 * (uint64_t)SECOND;
    for (unsigned i = 0; i < WRITERS; i++) {
        w[i] = (struct writer){.file = f, .i = i};
        CHECK_EQ(loop_run_now(writer_main, &w[i]), 0); /* until it waits */
        if (i == 0)
            CHECK_EQ(io_event_wait(&begun, soon(io)), 0);
    }
    for (unsigned i = 0; i < WRITERS;
         i++) { /* it has begun, and takes long; then the next one hangs */
        CHECK_EQ(io_event_wait(&never, io_now(io) + LONG_NS), -ETIME);
        let_go(i + 1);
        CHECK_EQ(io_event_wait(&w[i].done, soon(io)), 0);
        CHECK_EQ(i + 1 < WRITERS ? io_event_wait(&begun, soon(io)) : 0, 0);
    }
    for (unsigned i = 0; i < WRITERS; i++) {
        CHECK_EQ(io_preadv(f, &iov, 1, (uint64_t)i * BLOCK), BLOCK);
        CHECK(back[0] == 'a' + (int)i && !memcmp(back, back + 1, BLOCK - 1));
    }
    io_close(f);
    CHECK_EQ(io_unlink(in_dir("slow")), 0);
}

ON_BOTH(first_is_answered)

static int remove_dir(void **state)
{
    return rmdir(test_dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {BOTH(first_is_answered)};
    return cmocka_run_group_tests(tests, make_dir, remove_dir);
}
