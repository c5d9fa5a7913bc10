/* SPDX-License-Identifier: Apache-2.0 */
/* Threads for operations that may block. They are started when needed, up to MAX_THREADS, and
 * stay. A share of them is all that one inode gets at a time, one mount that may hang, and all such
 * mounts together; what is beyond waits with the share, not in the pool's queue, so that a mount
 * that hangs holds up nobody else. */
#include <assert.h>
#include <errno.h>

#include "base/log.h"
#include "base/mem.h"
#include "io/real.h"

enum { MAX_THREADS = 256 };

/* An inode: two for what changes the file (they would only fight for the inode lock), more for
 * reads and direct I/O, where depth is what makes a disk fast; two for looking for holes, which
 * waits for the inode lock and must not keep reads from their threads. A mount: so that four dead
 * ones leave something for the fifth. All mounts: so that local disks always find a thread. */
static const unsigned share_limit[N_SHARE_LEVELS][N_POOL_CLASSES] = {
    [SHARE_INODE] = {[POOL_META] = 2, [POOL_DATA] = 8, [POOL_LOOK] = 2},
    [SHARE_MOUNT] = {[POOL_META] = 10, [POOL_DATA] = 32, [POOL_LOOK] = 4},
    [SHARE_MOUNTS] = {[POOL_META] = 48, [POOL_DATA] = 128, [POOL_LOOK] = 16},
};

struct pool {
    pthread_mutex_t mutex;
    pthread_cond_t work;
    pthread_cond_t left; /* a thread has ended; by CLOCK_MONOTONIC */
    struct pool_queue queue;
    unsigned n_queued, n_idle, n_threads, n_left;
    bool ending, warned;
    pthread_t threads[MAX_THREADS];
};

static ssize_t (*const run_op[N_POOL_KINDS])(struct pool_op *) = {
    [POOL_OPEN] = file_do_open,
    [POOL_CLOSE] = file_do_close,
    [POOL_FSTAT] = file_do_fstat,
    [POOL_STAT] = file_do_stat,
    [POOL_RW] = file_do_rw,
    [POOL_SYNC] = file_do_sync,
    [POOL_DRAIN] = file_do_drain,
    [POOL_ZERO] = file_do_zero,
    [POOL_TRUNCATE] = file_do_truncate,
    [POOL_EXTENT] = file_do_extent,
    [POOL_COPY] = file_do_copy,
    [POOL_LOCK] = file_do_lock,
    [POOL_RENAME] = file_do_rename,
    [POOL_UNLINK] = file_do_unlink,
    [POOL_SYNC_DIR] = file_do_sync_dir,
    [POOL_LISTEN] = sock_do_listen,
    [POOL_CONNECT] = sock_do_connect,
};

static void queue_push(struct pool_queue *q, struct pool_op *op)
{
    op->next = NULL;
    if (q->tail)
        q->tail->next = op;
    else
        q->head = op;
    q->tail = op;
}

static struct pool_op *queue_pop(struct pool_queue *q)
{
    struct pool_op *op = q->head;
    if (op) {
        q->head = op->next;
        if (!q->head)
            q->tail = NULL;
    }
    return op;
}

/* The op takes its place in share `s` and those above it, or waits for one. Mutex held. */
static void admit(struct pool *p, struct pool_op *op, struct pool_share *s)
{
    for (; s; s = s->up) {
        if (s->busy[op->class] >= share_limit[s->level][op->class]) {
            queue_push(&s->waiting[op->class], op);
            return;
        }
        s->busy[op->class]++;
    }
    queue_push(&p->queue, op);
    p->n_queued++;
    pthread_cond_signal(&p->work);
}

/* The op gives its places back, each to the first who waits for it. Mutex held. */
static void dismiss(struct pool *p, struct pool_op *op)
{
    for (struct pool_share *s = op->share; s; s = s->up) {
        s->busy[op->class]--;
        struct pool_op *next = queue_pop(&s->waiting[op->class]);
        if (next)
            admit(p, next, s);
    }
}

static void *worker(void *arg)
{
    struct pool *p = arg;
    pthread_mutex_lock(&p->mutex);
    for (;;) {
        struct pool_op *op = queue_pop(&p->queue);
        if (!op) {
            if (p->ending)
                break;
            p->n_idle++;
            pthread_cond_wait(&p->work, &p->mutex);
            p->n_idle--;
            continue;
        }
        p->n_queued--;
        pthread_mutex_unlock(&p->mutex);
        op->result = run_op[op->kind](op);
        pthread_mutex_lock(&p->mutex);
        dismiss(p, op);
        /* The last word about `op`: its memory, and soon its inode's, is the waiter's again. */
        co_wake(op->co);
    }
    p->n_left++;
    pthread_cond_signal(&p->left);
    pthread_mutex_unlock(&p->mutex);
    return NULL;
}

/* Mutex held. Signals stay with the control loop's descriptor: threads take none. */
static void start_thread(struct pool *p)
{
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int r = pthread_create(&p->threads[p->n_threads], NULL, worker, p);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (r == 0)
        p->n_threads++;
    else if (!p->warned) {
        p->warned = true;
        log_warn("io", "cannot start a thread for file operations: %s", tide_strerror(r));
    }
}

co_fn ssize_t pool_run(struct pool *p, struct pool_op *op)
{
    op->co = co_self();
    pthread_mutex_lock(&p->mutex);
    if (p->n_idle <= p->n_queued && p->n_threads < MAX_THREADS)
        start_thread(p);
    if (!p->n_threads) {
        /* Not one thread to be had: slow is better than never. */
        pthread_mutex_unlock(&p->mutex);
        return run_op[op->kind](op);
    }
    admit(p, op, op->share);
    pthread_mutex_unlock(&p->mutex);
    co_yield();
    return op->result;
}

void cond_init(pthread_cond_t *c)
{
    pthread_condattr_t by_clock;
    pthread_condattr_init(&by_clock);
    pthread_condattr_setclock(&by_clock, CLOCK_MONOTONIC);
    pthread_cond_init(c, &by_clock);
    pthread_condattr_destroy(&by_clock);
}

bool cond_wait(pthread_cond_t *c, pthread_mutex_t *mutex, uint64_t deadline)
{
    struct timespec until = {.tv_sec = deadline / 1000000000, .tv_nsec = deadline % 1000000000};
    return pthread_cond_timedwait(c, mutex, &until) != ETIMEDOUT;
}

int pool_new(struct pool **out)
{
    struct pool *p = mem_zalloc(sizeof *p);
    if (!p)
        return -ENOMEM;
    pthread_mutex_init(&p->mutex, NULL);
    pthread_cond_init(&p->work, NULL);
    cond_init(&p->left);
    *out = p;
    return 0;
}

bool pool_free(struct pool *p, uint64_t deadline)
{
    if (!p)
        return true;
    pthread_mutex_lock(&p->mutex);
    p->ending = true;
    pthread_cond_broadcast(&p->work);
    while (p->n_left < p->n_threads && cond_wait(&p->left, &p->mutex, deadline))
        ;
    bool all = p->n_left == p->n_threads;
    pthread_mutex_unlock(&p->mutex);
    if (!all)
        return false;
    for (unsigned i = 0; i < p->n_threads; i++)
        pthread_join(p->threads[i], NULL);
    pthread_cond_destroy(&p->work);
    pthread_cond_destroy(&p->left);
    pthread_mutex_destroy(&p->mutex);
    mem_free(p);
    return true;
}
