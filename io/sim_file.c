/* SPDX-License-Identifier: Apache-2.0 */
/* File operations of io.h on the simulated disk. What is wrong with the arguments is said before
 * anything is submitted; the rest happens in effect() and finish(), at steps that sim.c chooses. */
#include "base/bytes.h"
#include "base/mem.h"
#include "io/sim_engine.h"
#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>

struct sim_file {
    struct io_file f; /* first */
    struct sim_inode *ino;
    char *path;
    int flags;
    uint64_t id;         /* owner of locks */
    unsigned seen_syncs; /* ino->lost_syncs when we opened it */
    int sync_error;      /* a sync failed once: all later ones do */
    struct sim_file *next;
};

#define MOST_PARTS 4u

/* One shape for all operations; each uses the part it needs. */
struct file_op {
    struct sim_op op; /* first */
    struct sim_file *file, *dst;
    const struct iovec *iov;
    int n_iov;
    unsigned flags;
    int open_flags;
    enum io_alloc alloc;
    enum io_lock lock;
    bool test;
    uint64_t dst_off;
    uint64_t upto; /* fsync: the stamp, sync_dir: the operation that must be covered */
    uint64_t effect[MOST_PARTS]; /* numbers of the changes that were made */
    unsigned n_effects;
    unsigned part;       /* reads and writes: which one is next */
    uint64_t done, next; /* bytes in the parts before it, and in it */
    bool *data;
    uint64_t *extent_len;
    struct io_stat *st;
    const char *to;
};

static struct sim *sim_of(struct sim_file *f)
{
    return (struct sim *)f->f.io;
}

static struct file_op *file_op(struct sim_op *op)
{
    return (struct file_op *)op;
}

static struct sim_file *file_of(struct io_file *f)
{
    return (struct sim_file *)f;
}

static bool can_read(const struct sim_file *f)
{
    return (f->flags & O_ACCMODE) != O_WRONLY;
}

static bool can_write(const struct sim_file *f)
{
    return (f->flags & O_ACCMODE) != O_RDONLY;
}

static int64_t run_on(struct sim_file *f, struct file_op *o)
{
    o->file = f;
    o->op.name = f->path;
    return sim_op_run(sim_of(f), &o->op);
}

/* ------------------------------------------------------------------ open and close */

static bool open_effect(struct sim_op *op)
{
    struct file_op *o = file_op(op);
    struct sim_file *f = o->file;
    op->result = disk_open(op->sim->world, op->name, o->open_flags, o->flags, &f->ino);
    return true;
}

static void file_free(struct sim_file *f)
{
    mem_free(f->path);
    mem_free(f);
}

static struct sim_file *file_new(struct sim *s, const char *path, int flags)
{
    struct sim_file *f = mem_zalloc(sizeof *f);
    if (!f)
        return NULL;
    f->path = mem_strdup(path);
    if (!f->path) {
        mem_free(f);
        return NULL;
    }
    f->f.io = &s->io;
    f->flags = flags;
    f->id = ++s->world->n_files;
    f->next = s->files; /* from now on: a power cut may come before it is open */
    s->files = f;
    return f;
}

static void file_drop(struct sim *s, struct sim_file *f)
{
    struct sim_file **at = &s->files;
    while (*at != f)
        at = &(*at)->next;
    *at = f->next;
    file_free(f);
}

int sim_open(struct io *io, const char *path, int flags, unsigned mode, struct io_file **out)
{
    struct sim *s = (struct sim *)io;
    char p[SIM_PATH_MAX];
    int r = disk_path(path, p);
    if (r < 0)
        return r;
    struct sim_file *f = file_new(s, p, flags);
    if (!f)
        return -ENOMEM;
    struct file_op o = {
        .op = {.kind = SIM_OPEN, .effect = open_effect}, .flags = mode, .open_flags = flags};
    r = (int)run_on(f, &o);
    if (r < 0) {
        file_drop(s, f);
        return r;
    }
    f->seen_syncs = f->ino->lost_syncs;
    *out = &f->f;
    return 0;
}

static bool close_effect(struct sim_op *op)
{
    struct sim_file *f = file_op(op)->file;
    disk_close(op->sim->world, f->ino, f->id);
    f->ino = NULL;
    return true;
}

void sim_close(struct io_file *file)
{
    struct sim_file *f = file_of(file);
    struct file_op o = {.op = {.kind = SIM_CLOSE, .effect = close_effect, .may_inline = true}};
    run_on(f, &o);
    file_drop(sim_of(f), f);
}

/* After a power cut the inodes may be gone; the world has forgotten the open files itself. */
void sim_files_free(struct sim *s)
{
    while (s->files) {
        struct sim_file *f = s->files;
        s->files = f->next;
        if (f->ino && s->life == s->world->life)
            disk_close(s->world, f->ino, f->id);
        file_free(f);
    }
}

static bool stat_effect(struct sim_op *op)
{
    struct file_op *o = file_op(op);
    struct sim_inode *ino = o->file ? o->file->ino : disk_lookup(op->sim->world, op->name);
    if (!ino) {
        op->result = -ENOENT;
        return true;
    }
    disk_stat(op->sim->world, ino, o->st);
    if (o->file && (o->file->flags & O_DIRECT))
        o->st->align = op->sim->cfg.direct_align;
    return true;
}

int sim_fstat(struct io_file *file, struct io_stat *st)
{
    struct file_op o = {.op = {.kind = SIM_STAT, .effect = stat_effect, .may_inline = true},
                        .st = st};
    return (int)run_on(file_of(file), &o);
}

int sim_stat(struct io *io, const char *path, struct io_stat *st)
{
    char p[SIM_PATH_MAX];
    int r = disk_path(path, p);
    struct file_op o = {.op = {.kind = SIM_STAT, .name = p, .effect = stat_effect}, .st = st};
    return r < 0 ? r : (int)sim_op_run((struct sim *)io, &o.op);
}

/* ------------------------------------------------------------------ read and write */

static size_t iov_total(const struct iovec *iov, int n)
{
    size_t len = 0;
    for (int i = 0; i < n; i++)
        len += iov[i].iov_len;
    return len;
}

/* What the kernel refuses at once. */
static int check_rw(struct sim_file *f, const struct iovec *iov, int n, uint64_t off)
{
    unsigned align = f->flags & O_DIRECT ? sim_of(f)->cfg.direct_align : 1;
    if (n < 0 || off > SIM_MAX_SIZE)
        return -EINVAL;
    if (S_ISDIR(f->ino->mode))
        return -EISDIR;
    if (off % align)
        return -EINVAL;
    for (int i = 0; i < n; i++)
        if (iov[i].iov_len % align || (uintptr_t)iov[i].iov_base % align)
            return -EINVAL;
    return 0;
}

/* How much of what is left is done at this step: up to some sector's end, or all. */
static void choose_part(struct file_op *o)
{
    struct sim *s = o->op.sim;
    uint64_t off = o->op.off + o->done, left = o->op.len - o->done;
    o->next = left;
    o->part++;
    if (!s->cfg.short_in || left <= SIM_SECTOR || o->part == MOST_PARTS)
        return;
    /* Whoever was short once is likely to be so again. */
    if (sim_below(&s->order, o->part == 1 ? s->cfg.short_in : 2))
        return;
    uint64_t stop = round_down(off + sim_below(&s->order, left), SIM_SECTOR);
    if (stop > off)
        o->next = stop - off;
}

/* Its bytes of the caller's buffers are filled; fewer than wanted: the file ends. */
static uint64_t read_part(struct file_op *o, uint64_t *hash)
{
    uint64_t skip = o->done, left = o->next, got = 0;
    for (int i = 0; i < o->n_iov && left; i++) {
        uint64_t len = o->iov[i].iov_len;
        if (skip >= len) {
            skip -= len;
            continue;
        }
        void *to = (char *)o->iov[i].iov_base + skip;
        uint64_t want = MIN(len - skip, left);
        size_t n = inode_read(o->file->ino, to, want, o->op.off + o->done + got);
        *hash ^= sim_data_hash(to, n);
        got += n;
        left -= n;
        skip = 0;
        if (n < want)
            break;
    }
    return got;
}

static bool read_effect(struct sim_op *op)
{
    struct file_op *o = file_op(op);
    uint64_t hash = 0;
    choose_part(o);
    uint64_t n = read_part(o, &hash);
    op->result += (int64_t)n;
    o->done += n;
    sim_trace(op->sim, "data", op->number, hash, n);
    return n < o->next || o->done == op->len;
}

ssize_t sim_preadv(struct io_file *file, const struct iovec *iov, int n, uint64_t off)
{
    struct sim_file *f = file_of(file);
    int r = can_read(f) ? check_rw(f, iov, n, off) : -EBADF;
    struct file_op o = {.op = {.kind = SIM_READ,
                               .off = off,
                               .len = iov_total(iov, n),
                               .may_inline = !(f->flags & O_DIRECT),
                               .effect = read_effect},
                        .iov = iov,
                        .n_iov = n};
    return r < 0 ? r : (ssize_t)run_on(f, &o);
}

static unsigned char *gather(const struct file_op *o)
{
    unsigned char *buf = sim_alloc(o->op.len);
    size_t done = 0;
    for (int i = 0; i < o->n_iov; i++) {
        if (o->iov[i].iov_len)
            memcpy(buf + done, o->iov[i].iov_base, o->iov[i].iov_len);
        done += o->iov[i].iov_len;
    }
    return buf;
}

/* A write that fails may have been made in part: any number of its first sectors. */
static int64_t write_beginning(struct file_op *o, const void *buf)
{
    uint64_t sectors = o->next / SIM_SECTOR;
    uint64_t len = sectors ? sim_below(&o->op.sim->order, sectors + 1) * SIM_SECTOR : 0;
    return len ? inode_write(o->op.sim->world, o->file->ino, buf, len, o->op.off + o->done) : 0;
}

static bool write_effect(struct sim_op *op)
{
    struct file_op *o = file_op(op);
    unsigned char *buf = gather(o);
    choose_part(o);
    const unsigned char *p = buf + o->done;
    sim_trace(op->sim, "data", op->number, sim_data_hash(p, o->next), o->next);
    bool last = o->done + o->next == op->len;
    int64_t r = op->err && last
                    ? op->err
                    : inode_write(op->sim->world, o->file->ino, p, o->next, op->off + o->done);
    op->result = r < 0 ? r : (int64_t)op->len;
    bool over = last || r < 0;
    if (r < 0 && r != -EFBIG)
        r = write_beginning(o, p);
    if (r > 0)
        o->effect[o->n_effects++] = (uint64_t)r;
    o->done += o->next;
    free(buf);
    return over;
}

static void write_finish(struct sim_op *op)
{
    struct file_op *o = file_op(op);
    bool sync = op->result >= 0 && ((o->flags & IO_DSYNC) || (o->file->flags & O_DSYNC));
    for (unsigned i = 0; i < o->n_effects; i++)
        inode_done(op->sim->world, o->file->ino, o->effect[i]);
    for (unsigned i = 0; i < o->n_effects && sync; i++)
        inode_sync_op(o->file->ino, o->effect[i]);
}

ssize_t sim_pwritev(struct io_file *file, const struct iovec *iov, int n, uint64_t off,
                    unsigned flags)
{
    struct sim_file *f = file_of(file);
    int r = can_write(f) ? check_rw(f, iov, n, off) : -EBADF;
    struct file_op o = {.op = {.kind = SIM_WRITE,
                               .off = off,
                               .len = iov_total(iov, n),
                               .may_inline = !(f->flags & (O_DIRECT | O_DSYNC)) && !flags,
                               .own_errors = true,
                               .effect = write_effect,
                               .finish = write_finish},
                        .iov = iov,
                        .n_iov = n,
                        .flags = flags};
    return r < 0 ? r : (ssize_t)run_on(f, &o);
}

/* ------------------------------------------------------------------ sync */

static bool at_the_answer(struct sim_op *op)
{
    return true;
}

static void fsync_finish(struct sim_op *op)
{
    struct file_op *o = file_op(op);
    struct sim_file *f = o->file;
    struct sim *s = op->sim;
    if (S_ISDIR(f->ino->mode)) {
        op->result = op->err ? op->err : disk_sync_dir(s->world, op->name, o->upto, &s->order);
        return;
    }
    if (op->err) {
        inode_lose(f->ino, o->upto, &s->order);
        f->sync_error = op->err;
    } else if (!f->sync_error && f->ino->lost_syncs != f->seen_syncs) {
        f->sync_error = -EIO; /* somebody else's sync failed: told to each open file */
    }
    if (!f->sync_error)
        inode_sync(f->ino, o->upto, &s->order);
    op->result = f->sync_error;
}

int sim_fsync(struct io_file *file)
{
    struct sim_file *f = file_of(file);
    struct sim_world *w = sim_of(f)->world;
    struct file_op o = {.op = {.kind = SIM_FSYNC,
                               .own_errors = true,
                               .effect = at_the_answer,
                               .finish = fsync_finish},
                        .upto = S_ISDIR(f->ino->mode) ? w->n_ops : w->n_stamps};
    return (int)run_on(f, &o);
}

static void sync_dir_finish(struct sim_op *op)
{
    struct sim *s = op->sim;
    op->result =
        op->err ? op->err : disk_sync_dir(s->world, op->name, file_op(op)->upto, &s->order);
}

int sim_sync_dir(struct io *io, const char *dir)
{
    struct sim *s = (struct sim *)io;
    char p[SIM_PATH_MAX];
    int r = disk_path(dir, p);
    struct file_op o = {.op = {.kind = SIM_SYNC_DIR,
                               .name = p,
                               .own_errors = true,
                               .effect = at_the_answer,
                               .finish = sync_dir_finish},
                        .upto = s->world->n_ops};
    return r < 0 ? r : (int)sim_op_run(s, &o.op);
}

/* ------------------------------------------------------------------ zero, truncate, extent, copy
 */

static void change_made(struct file_op *o, int64_t r)
{
    o->op.result = r < 0 ? r : 0;
    if (r > 0)
        o->effect[o->n_effects++] = (uint64_t)r;
}

static void change_finish(struct sim_op *op)
{
    struct file_op *o = file_op(op);
    struct sim_file *changed = o->dst ? o->dst : o->file;
    if (o->n_effects)
        inode_done(op->sim->world, changed->ino, o->effect[0]);
}

static int check_change(const struct sim_file *f)
{
    return !can_write(f) ? -EBADF : S_ISDIR(f->ino->mode) ? -EISDIR : 0;
}

static bool zero_effect(struct sim_op *op)
{
    struct file_op *o = file_op(op);
    change_made(o, inode_zero(op->sim->world, o->file->ino, op->off, op->len, o->alloc));
    return true;
}

int sim_zero(struct io_file *file, uint64_t off, uint64_t len, enum io_alloc how)
{
    struct sim_file *f = file_of(file);
    int r = off > INT64_MAX || len > INT64_MAX - off ? -EINVAL : check_change(f);
    struct file_op o = {.op = {.kind = SIM_ZERO,
                               .off = off,
                               .len = len,
                               .effect = zero_effect,
                               .finish = change_finish},
                        /* nothing is slow here */
                        .alloc = how == IO_ZERO_KEEP_FAST ? IO_ZERO_KEEP : how};
    return r < 0 ? r : (int)run_on(f, &o);
}

static bool truncate_effect(struct sim_op *op)
{
    struct file_op *o = file_op(op);
    change_made(o, inode_truncate(op->sim->world, o->file->ino, op->len));
    return true;
}

int sim_truncate(struct io_file *file, uint64_t size)
{
    struct sim_file *f = file_of(file);
    /* ftruncate() says EINVAL for what is not open for writing, and for a directory */
    int r = size > INT64_MAX ? -EFBIG : check_change(f) < 0 ? -EINVAL : 0;
    struct file_op o = {
        .op = {
            .kind = SIM_TRUNCATE, .len = size, .effect = truncate_effect, .finish = change_finish}};
    return r < 0 ? r : (int)run_on(f, &o);
}

/* As SEEK_DATA and SEEK_HOLE: behind the end is a hole without end. */
static bool extent_effect(struct sim_op *op)
{
    struct file_op *o = file_op(op);
    struct sim_inode *ino = o->file->ino;
    uint64_t len = op->len;
    *o->data = op->off < ino->size && store_extent(&ino->now, op->off, &len);
    *o->extent_len = *o->data ? MIN(len, ino->size - op->off) : len;
    return true;
}

int sim_extent(struct io_file *file, uint64_t off, uint64_t *len, bool *data)
{
    struct file_op o = {.op = {.kind = SIM_EXTENT,
                               .off = off,
                               .len = *len,
                               .may_inline = true,
                               .effect = extent_effect},
                        .data = data,
                        .extent_len = len};
    if (off > INT64_MAX)
        return -EINVAL;
    o.op.len = MIN(*len, (uint64_t)INT64_MAX);
    return (int)run_on(file_of(file), &o);
}

#define COPY_MOST ((uint64_t)1 << 20)

static bool copy_effect(struct sim_op *op)
{
    struct file_op *o = file_op(op);
    struct sim_inode *src = o->file->ino;
    uint64_t len = MIN(op->len, COPY_MOST);
    len = op->off >= src->size ? 0 : MIN(len, src->size - op->off);
    if (len > SIM_SECTOR && sim_percent(&op->sim->order, 25))
        len = 1 + sim_below(&op->sim->order, len);
    if (len == 0)
        return true;
    void *buf = sim_alloc(len);
    inode_read(src, buf, len, op->off);
    int64_t r = inode_write(op->sim->world, o->dst->ino, buf, len, o->dst_off);
    free(buf);
    change_made(o, r);
    if (r > 0)
        op->result = (int64_t)len;
    return true;
}

ssize_t sim_copy_range(struct io_file *src, uint64_t src_off, struct io_file *dst, uint64_t dst_off,
                       uint64_t len)
{
    struct sim_file *f = file_of(src), *to = file_of(dst);
    struct file_op o = {.op = {.kind = SIM_COPY,
                               .off = src_off,
                               .len = len,
                               .effect = copy_effect,
                               .finish = change_finish},
                        .dst = to,
                        .dst_off = dst_off};
    if (!can_read(f) || !can_write(to))
        return -EBADF;
    if (S_ISDIR(f->ino->mode) || S_ISDIR(to->ino->mode))
        return -EISDIR;
    if (src_off > SIM_MAX_SIZE || dst_off > SIM_MAX_SIZE)
        return -EINVAL;
    uint64_t distance = src_off > dst_off ? src_off - dst_off : dst_off - src_off;
    if (f->ino == to->ino && distance < len)
        return -EINVAL;
    return (ssize_t)run_on(f, &o);
}

/* ------------------------------------------------------------------ locks and names */

static bool lock_effect(struct sim_op *op)
{
    struct file_op *o = file_op(op);
    op->result = inode_lock(o->file->ino, o->file->id, op->off, op->len, o->lock, o->test);
    return true;
}

int sim_lock(struct io_file *file, uint64_t off, uint64_t len, enum io_lock how, bool test)
{
    struct sim_file *f = file_of(file);
    struct file_op o = {
        .op = {.kind = SIM_LOCK, .off = off, .len = len, .may_inline = true, .effect = lock_effect},
        .lock = how,
        .test = test};
    if (len == 0 || (test && how == IO_UNLOCK))
        return 0;
    if (off > INT64_MAX || len > INT64_MAX - off)
        return -EINVAL;
    if (!test &&
        ((how == IO_LOCK_EXCLUSIVE && !can_write(f)) || (how == IO_LOCK_SHARED && !can_read(f))))
        return -EBADF;
    return (int)run_on(f, &o);
}

static bool rename_effect(struct sim_op *op)
{
    struct file_op *o = file_op(op);
    op->result = disk_rename(op->sim->world, op->name, o->to, o->flags);
    return true;
}

int sim_rename(struct io *io, const char *from, const char *to, unsigned flags)
{
    char p[SIM_PATH_MAX], q[SIM_PATH_MAX];
    struct file_op o = {
        .op = {.kind = SIM_RENAME, .name = p, .effect = rename_effect}, .to = q, .flags = flags};
    int r = disk_path(from, p);
    if (r == 0)
        r = disk_path(to, q);
    return r < 0 ? r : (int)sim_op_run((struct sim *)io, &o.op);
}

static bool unlink_effect(struct sim_op *op)
{
    op->result = disk_unlink(op->sim->world, op->name);
    return true;
}

int sim_unlink(struct io *io, const char *path)
{
    char p[SIM_PATH_MAX];
    struct file_op o = {.op = {.kind = SIM_UNLINK, .name = p, .effect = unlink_effect}};
    int r = disk_path(path, p);
    return r < 0 ? r : (int)sim_op_run((struct sim *)io, &o.op);
}
