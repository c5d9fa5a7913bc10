/* SPDX-License-Identifier: Apache-2.0 */
/* file, host_device: a regular file or a block device of this machine.
 *
 * Locks. Other programs that honour QEMU's image locking see which permissions are in use here: a
 * shared OFD lock on byte 100 + p for each permission used, on byte 200 + p for each one that
 * nobody else may use (p: 0 consistent read, 1 write, 2 write unchanged, 3 resize); a conflict is
 * found by testing for an exclusive lock on the opposite byte (QEMU,
 * docs/system/qemu-block-drivers, "image locking"; bytes as seen on 7.2). What other nodes of ours
 * hold of the file needs no test: no other process is in its way, and whether two of ours are is
 * decided before (root_check()). Permissions are taken
 * when the node gets its first user, so a node without users locks nothing. A writer of ours shares
 * writing with nobody: changes that pass us by could not be tracked. */
#include <assert.h>
#include <errno.h>
#include <string.h>
#include <sys/stat.h>

#include "base/bytes.h"
#include "base/log.h"
#include "base/mem.h"
#include "block/inspect.h"
#include "block/root.h"
#include "drivers/drivers.h"
#include "io/io.h"
#include "schema/types.h"

#define LOCK_USED 100u
#define LOCK_UNSHARED 200u
enum { PERM_READ, PERM_WRITE, PERM_UNCHANGED, PERM_RESIZE, N_PERMS };

struct file {
    struct io_file *f;
    /* Where direct I/O cannot reach: the rest of a file behind its last whole block is written
     * through the page cache. NULL: there is no rest, or nobody writes. */
    struct io_file *rest;
    bool locking;
    uint64_t dev, ino, lock_dev, lock_ino; /* see struct io_stat */
    unsigned used, unshared;               /* bits 1 << PERM_x that are locked now */
    /* Queries for the allocated size; control loop only. */
    uint64_t allocated;        /* the last answer */
    struct question *question; /* that the kernel has not answered yet, or NULL */
    struct io_event answered;
};

/* ------------------------------------------------------------------ open and close */

static int check_kind(struct node *n, const struct io_stat *st, bool device, struct tide_error *err)
{
    if (device && !S_ISBLK(st->mode))
        return tide_fail(err, -ENOTBLK, "'%s' is not a block device: use driver=file", n->filename);
    if (!device && !S_ISREG(st->mode))
        return tide_fail(err, -EINVAL, "'%s' is not a regular file%s", n->filename,
                         S_ISBLK(st->mode) ? ": use driver=host_device" : "");
    if (st->size > INT64_MAX)
        return tide_fail(err, -EFBIG, "'%s' is larger than 2^63 - 1 bytes", n->filename);
    return 0;
}

static int open_path(struct node *n, struct tide_error *err)
{
    struct file *s = n->state;
    int direct = n->direct ? O_DIRECT : 0;
    int r = io_open(n->filename, (n->read_only ? O_RDONLY : O_RDWR) | direct, 0, &s->f);
    if ((r == -EACCES || r == -EROFS || r == -EPERM) && !n->read_only && n->auto_read_only) {
        n->read_only = true;
        r = io_open(n->filename, O_RDONLY | direct, 0, &s->f);
    }
    if (r == -EINVAL && n->direct)
        return tide_fail(err, r,
                         "cannot open '%s' with cache.direct=on: its file system has no direct I/O",
                         n->filename);
    if (r < 0)
        return tide_fail(err, r, "cannot open '%s'%s: %s", n->filename,
                         n->read_only ? "" : " for writing", tide_strerror(-r));
    return 0;
}

/* Opened by name a second time: it is to be the same file. */
static co_fn int check_rest(struct node *n, const struct io_stat *st, struct tide_error *err)
{
    struct file *s = n->state;
    struct io_stat again;
    int r = s->rest ? io_fstat(s->rest, &again) : 0;
    if (r == 0 && s->rest && (again.dev != st->dev || again.ino != st->ino))
        r = -ESTALE;
    return r < 0 ? tide_fail(err, r, "'%s' was replaced while it was opened: %s", n->filename,
                             tide_strerror(-r))
                 : 0;
}

struct file_options {
    const char *filename;
    bool device, locking;
};

static int file_open_with(struct node *n, const struct file_options *o, struct tide_error *err)
{
    struct file *s = n->state;
    struct io_stat st;
    s->locking = o->locking;
    n->filename = mem_strdup(o->filename);
    if (!n->filename)
        return tide_fail(err, -ENOMEM, "no memory for node '%s'", node_name(n));
    if (!o->filename[0])
        return tide_fail(err, -EINVAL, "'filename' of node '%s' is empty", node_name(n));
    /* Looked at before it is opened: opening a pipe would wait for its other end. */
    int r = io_stat(n->filename, &st);
    if (r == 0)
        r = check_kind(n, &st, o->device, err);
    else
        r = 0; /* opening says better why it cannot be had */
    if (r == 0)
        r = open_path(n, err);
    if (r < 0)
        return r;
    r = io_fstat(s->f, &st);
    if (r < 0)
        return tide_fail(err, r, "cannot read the size of '%s': %s", n->filename,
                         tide_strerror(-r));
    r = check_kind(n, &st, o->device, err);
    if (r < 0)
        return r;
    s->dev = st.dev;
    s->ino = st.ino;
    s->lock_dev = st.lock_dev;
    s->lock_ino = st.lock_ino;
    n->size = st.size;
    n->align = n->direct && st.align > 1 ? st.align : 1;
    s->allocated = st.allocated;
    if (!n->read_only && n->size % n->align)
        r = io_open(n->filename, O_RDWR, 0, &s->rest);
    return r == 0 ? check_rest(n, &st, err)
                  : tide_fail(err, r, "cannot open '%s' for writing: %s", n->filename,
                              tide_strerror(-r));
}

static int file_open(struct node *n, const struct q_blockdev_options *o, struct tide_error *err)
{
    const struct q_blockdev_options_file *f = &o->u.file;
    if (f->has_aio && f->aio == Q_BLOCKDEV_AIO_OPTIONS_NATIVE && !n->direct)
        return tide_fail(err, -EINVAL, "aio=native needs cache.direct=on");
    return file_open_with(
        n,
        &(struct file_options){f->filename, false,
                               !n->force_share &&
                                   !(f->has_locking && f->locking == Q_ON_OFF_AUTO_OFF)},
        err);
}

static int host_device_open(struct node *n, const struct q_blockdev_options *o,
                            struct tide_error *err)
{
    const struct q_blockdev_options_host_device *f = &o->u.host_device;
    if (f->has_aio && f->aio == Q_BLOCKDEV_AIO_OPTIONS_NATIVE && !n->direct)
        return tide_fail(err, -EINVAL, "aio=native needs cache.direct=on");
    return file_open_with(
        n,
        &(struct file_options){f->filename, true,
                               !n->force_share &&
                                   !(f->has_locking && f->locking == Q_ON_OFF_AUTO_OFF)},
        err);
}

static void file_close(struct node *n)
{
    struct file *s = n->state;
    while (s->question)
        io_event_wait(&s->answered, IO_FOREVER);
    io_close(s->rest);
    io_close(s->f);
}

static void file_id(const struct node *n, uint64_t *dev, uint64_t *ino)
{
    const struct file *s = n->state;
    *dev = s->dev;
    *ino = s->ino;
}

/* ------------------------------------------------------------------ locks */

static co_fn int lock_bits(struct file *s, unsigned base, unsigned bits, enum io_lock how)
{
    for (unsigned p = 0; p < N_PERMS; p++) {
        int r = bits & 1u << p ? io_file_lock(s->f, base + p, 1, how) : 0;
        if (r < 0)
            return r;
    }
    return 0;
}

/* Somebody else holds one of these bytes. */
static co_fn int test_bits(struct file *s, unsigned base, unsigned bits, unsigned *which)
{
    for (unsigned p = 0; p < N_PERMS; p++) {
        *which = p;
        int r = bits & 1u << p ? io_file_lock_test(s->f, base + p, 1, IO_LOCK_EXCLUSIVE) : 0;
        if (r < 0)
            return r;
    }
    return 0;
}

static co_fn void drop_to(struct file *s, unsigned used, unsigned unshared)
{
    lock_bits(s, LOCK_USED, s->used & ~used, IO_UNLOCK);
    lock_bits(s, LOCK_UNSHARED, s->unshared & ~unshared, IO_UNLOCK);
    s->used &= used;
    s->unshared &= unshared;
}

static bool file_same_locks(const struct node *n, const struct node *other)
{
    const struct file *a = n->state, *b = other->state;
    return other->ops->same_locks == file_same_locks && a->locking && b->locking &&
           a->dev == b->dev && a->ino == b->ino;
}

static int file_lock_test(struct node *n, uint64_t first, uint64_t len)
{
    struct file *s = n->state;
    return io_file_lock_test(s->f, first, len, IO_LOCK_EXCLUSIVE);
}

/* What other nodes have locked by the same name: there a lock of another process would stand in
 * their way, too. */
static void add_held(const struct node *n, struct node_list *list, unsigned *used,
                     unsigned *unshared)
{
    const struct file *own = n->state;
    const struct node *other;
    TAILQ_FOREACH (other, list, link) {
        const struct file *s = other->state;
        if (other == n || !n->ops->same_locks(n, other) || s->lock_dev != own->lock_dev ||
            s->lock_ino != own->lock_ino)
            continue;
        *used |= s->used;
        *unshared |= s->unshared;
    }
}

static int file_set_perm(struct node *n, unsigned perm, struct tide_error *err)
{
    static const char *const words[] = {"consistent read", "write", "write unchanged", "resize"};
    struct file *s = n->state;
    unsigned used = 0, unshared = 0, which = 0, held_used = 0, held_unshared = 0;
    if (!s->locking || !s->f)
        return 0;
    if (perm)
        unshared |= 1u << PERM_RESIZE;
    if (perm & ROOT_READ)
        used |= 1u << PERM_READ;
    if (perm & ROOT_WRITE) {
        used |= 1u << PERM_WRITE;
        unshared |= 1u << PERM_WRITE;
    }
    unsigned old_used = s->used, old_unshared = s->unshared;
    int r = lock_bits(s, LOCK_USED, used & ~s->used, IO_LOCK_SHARED);
    s->used |= used;
    if (r == 0)
        r = lock_bits(s, LOCK_UNSHARED, unshared & ~s->unshared, IO_LOCK_SHARED);
    s->unshared |= unshared;
    add_held(n, &n->graph->nodes, &held_used, &held_unshared);
    add_held(n, &n->graph->leaving, &held_used, &held_unshared);
    if (r == 0)
        r = test_bits(s, LOCK_UNSHARED, used & ~old_used & ~held_used, &which);
    if (r == 0)
        r = test_bits(s, LOCK_USED, unshared & ~old_unshared & ~held_unshared, &which);
    if (r < 0) {
        drop_to(s, old_used, old_unshared);
        if (r == -EAGAIN || r == -EACCES)
            return tide_fail(
                err, -EAGAIN,
                "cannot get the \"%s\" lock on '%s': another process (or node) uses the image",
                words[which], n->filename);
        return tide_fail(err, r, "cannot lock '%s': %s (locking=off turns locks off)", n->filename,
                         tide_strerror(-r));
    }
    drop_to(s, used, unshared);
    return 0;
}

/* ------------------------------------------------------------------ I/O */

static void zero_tail(const struct iovec *iov, int niov, uint64_t from)
{
    for (int i = 0; i < niov; i++) {
        if (from >= iov[i].iov_len) {
            from -= iov[i].iov_len;
            continue;
        }
        memset((char *)iov[i].iov_base + from, 0, iov[i].iov_len - from);
        from = 0;
    }
}

static int file_preadv(struct node *n, const struct iovec *iov, int niov, uint64_t off,
                       uint64_t len)
{
    struct file *s = n->state;
    ssize_t r = io_preadv(s->f, iov, niov, off);
    if (r >= 0 && (uint64_t)r < len)
        zero_tail(iov, niov, r); /* the file ends here, or somebody cut it */
    return r < 0 ? (int)r : 0;
}

/* A direct write that reaches behind the last whole block, up to the end of the file. It comes from
 * block/node.c in one piece, widened beyond that end or not, and while it runs no other write does.
 */
static co_fn int write_rest(struct node *n, const struct iovec *iov, uint64_t off, unsigned how)
{
    struct file *s = n->state;
    uint64_t whole = round_down(n->size, n->align);
    struct iovec blocks = {iov->iov_base, whole - off};
    struct iovec rest = {(char *)iov->iov_base + (whole - off), n->size - whole};
    ssize_t r = blocks.iov_len ? io_pwritev(s->f, &blocks, 1, off, how) : 0;
    if (r >= 0)
        r = io_pwritev(s->rest, &rest, 1, whole, how);
    return r < 0 ? (int)r : 0;
}

static int file_pwritev(struct node *n, const struct iovec *iov, int niov, uint64_t off,
                        uint64_t len, unsigned flags)
{
    struct file *s = n->state;
    unsigned how = (flags & NODE_FUA) && !n->no_flush ? IO_DSYNC : 0;
    if (s->rest && off + len > round_down(n->size, n->align)) {
        assert(niov == 1);
        return write_rest(n, iov, off, how);
    }
    ssize_t r = io_pwritev(s->f, iov, niov, off, how);
    return r < 0 ? (int)r : 0;
}

static int file_flush(struct node *n)
{
    struct file *s = n->state;
    return io_fsync(s->rest ? s->rest
                            : s->f); /* it is one file; errors of its cache are told once */
}

static int file_zero(struct node *n, uint64_t off, uint64_t len, unsigned flags)
{
    struct file *s = n->state;
    bool fast = flags & NODE_FAST_ZERO;
    enum io_alloc how = flags & NODE_UNMAP ? (fast ? IO_ZERO_PUNCH_FAST : IO_ZERO_PUNCH)
                                           : (fast ? IO_ZERO_KEEP_FAST : IO_ZERO_KEEP);
    int r = io_zero(s->f, off, len, how);
    if (r == 0 && (flags & NODE_FUA) && !n->no_flush)
        r = file_flush(n);
    return r;
}

static int file_discard(struct node *n, uint64_t off, uint64_t len)
{
    struct file *s = n->state;
    return io_zero(s->f, off, len, IO_DISCARD);
}

static int file_extent(struct node *n, uint64_t off, uint64_t len, struct extent *e)
{
    struct file *s = n->state;
    e->len = len;
    int r = io_extent(s->f, off, &e->len, &e->data);
    if (r < 0) {
        *e = (struct extent){.len = len, .data = true, .depth = 1}; /* unknown: call it data */
        return 0;
    }
    e->zero = !e->data;
    return 0;
}

static struct io_file *file_offload(struct node *n, uint64_t *base)
{
    struct file *s = n->state;
    *base = 0;
    return n->direct ? NULL : s->f;
}

/* ------------------------------------------------------------------ allocated size */

#define ASKERS 8u

/* The question for the allocated size: one at a time of a file, whoever asks meanwhile joins. A
 * mount that hangs does not answer, so they may have left; once the first has, the answer is
 * overdue, and nobody waits for it any more. */
struct question {
    struct file *file;
    unsigned n;
    struct inquiry *of[ASKERS];
};

static void join(struct question *q, struct inquiry *of)
{
    if (q->n == ASKERS || inquiry_left(q->of[0]))
        return;
    inquiry_begin(of);
    q->of[q->n++] = of;
}

static void end_question(struct question *q)
{
    q->file->question = NULL;
    io_event_set(&q->file->answered);
    for (unsigned i = 0; i < q->n; i++)
        inquiry_end(q->of[i]);
    mem_free(q);
}

static co_fn void ask_size(void *arg)
{
    struct question *q = arg;
    struct io_stat st;
    if (io_fstat(q->file->f, &st) == 0)
        q->file->allocated = st.allocated;
    end_question(q);
}

static void file_ask_allocated(struct node *n, struct inquiry *of)
{
    struct file *s = n->state;
    if (s->question) {
        join(s->question, of);
        return;
    }
    struct question *q = mem_alloc(sizeof *q);
    if (!q)
        return;
    *q = (struct question){s, 1, {of}};
    inquiry_begin(of);
    s->question = q;
    if (loop_run_now(ask_size, q) < 0)
        end_question(q);
}

static uint64_t file_allocated(const struct node *n)
{
    const struct file *s = n->state;
    return s->allocated;
}

#define FILE_OPS                                                                                   \
    .state_size = sizeof(struct file), .close = file_close, .set_perm = file_set_perm,             \
    .preadv = file_preadv, .pwritev = file_pwritev, .zero = file_zero, .discard = file_discard,    \
    .flush = file_flush, .extent = file_extent, .offload = file_offload,                           \
    .allocated = file_allocated, .ask_allocated = file_ask_allocated, .file_id = file_id,          \
    .same_locks = file_same_locks, .lock_test = file_lock_test

const struct driver_ops file_driver = {.name = "file", .open = file_open, FILE_OPS};
const struct driver_ops host_device_driver = {
    .name = "host_device", .open = host_device_open, FILE_OPS};
