/* SPDX-License-Identifier: Apache-2.0 */
/* Names of the simulated disk. The tree is flat: a name is a whole path, and a directory is an
 * inode that some path leads to. A change of names (create, rename, exchange, unlink) is one
 * operation, atomic at a power cut, and durable once the directories of all its names were synced.
 */
#include "base/bytes.h"
#include "io/sim_disk.h"
#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>

int disk_path(const char *path, char out[SIM_PATH_MAX])
{
    size_t n = 0;
    if (!*path)
        return -ENOENT;
    while (path[0] == '.' && path[1] == '/')
        for (path += 2; *path == '/';)
            path++;
    for (; *path; path++) {
        if (*path == '/' && n && out[n - 1] == '/')
            continue;
        if (n + 1 == SIM_PATH_MAX)
            return -ENAMETOOLONG;
        out[n++] = *path;
    }
    if (n > 1 && out[n - 1] == '/')
        n--;
    if (n == 0)
        out[n++] = '.';
    out[n] = 0;
    return 0;
}

/* ------------------------------------------------------------------ the table of names */

static size_t name_index(const struct sim_world *w, const char *path, size_t len, bool *found)
{
    size_t lo = 0, hi = w->n_names;
    *found = false;
    while (lo < hi) {
        size_t mid = lo + (hi - lo) / 2;
        const char *name = w->names[mid]->path;
        int order = strncmp(name, path, len);
        if (order == 0 && name[len])
            order = 1;
        if (order == 0) {
            *found = true;
            return mid;
        }
        if (order < 0)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

static struct sim_inode *lookup(const struct sim_world *w, const char *path, size_t len)
{
    bool found;
    size_t i = name_index(w, path, len, &found);
    return found ? w->names[i]->now : NULL;
}

struct sim_inode *disk_lookup(const struct sim_world *w, const char *path)
{
    return lookup(w, path, strlen(path));
}

static struct sim_name *name_get(struct sim_world *w, const char *path)
{
    bool found;
    size_t i = name_index(w, path, strlen(path), &found);
    if (found)
        return w->names[i];
    if (w->n_names == w->cap_names) {
        w->cap_names = MAX(w->cap_names * 2, 16u);
        w->names = sim_grow(w->names, w->cap_names, sizeof *w->names);
    }
    memmove(w->names + i + 1, w->names + i, (w->n_names - i) * sizeof *w->names);
    w->n_names++;
    struct sim_name *name = w->names[i] = sim_alloc(sizeof *name);
    name->path = sim_alloc(strlen(path) + 1);
    strcpy(name->path, path);
    return name;
}

/* "a/b" is in "a", "/a" in "/", "a" in ".". */
static size_t dir_of(const char *path, const char **dir)
{
    const char *slash = strrchr(path, '/');
    *dir = slash ? path : ".";
    return slash == path || !slash ? 1 : (size_t)(slash - path);
}

static int check_dir(const struct sim_world *w, const char *path)
{
    const char *dir;
    size_t len = dir_of(path, &dir);
    struct sim_inode *ino = lookup(w, dir, len);
    if (!ino)
        return -ENOENT;
    return S_ISDIR(ino->mode) ? 0 : -ENOTDIR;
}

/* ------------------------------------------------------------------ inodes */

static struct sim_inode *inode_new(struct sim_world *w, uint32_t mode)
{
    struct sim_inode *ino = sim_alloc(sizeof *ino), **at = &w->inodes;
    ino->ino = w->next_ino++;
    ino->mode = mode;
    ino->mtime_ns = ino->disk_mtime_ns = w->wall_ns;
    while (*at)
        at = &(*at)->next;
    *at = ino;
    return ino;
}

static void inode_free(struct sim_inode *ino)
{
    store_fini(&ino->now);
    store_fini(&ino->disk);
    for (size_t i = 0; i < ino->n_pieces; i++)
        free(ino->pieces[i].data);
    free(ino->pieces);
    free(ino->locks);
    free(ino);
}

static void mark(struct sim_inode *ino)
{
    if (ino)
        ino->marked = true;
}

void disk_reap(struct sim_world *w)
{
    for (size_t i = 0; i < w->n_names; i++) {
        mark(w->names[i]->now);
        mark(w->names[i]->disk);
    }
    for (size_t i = 0; i < w->n_name_ops; i++)
        for (unsigned k = 0; k < w->name_ops[i].n; k++)
            mark(w->name_ops[i].change[k].to);
    for (struct sim_inode **at = &w->inodes; *at;) {
        struct sim_inode *ino = *at;
        if (ino->marked || ino->opens) {
            ino->marked = false;
            at = &ino->next;
            continue;
        }
        *at = ino->next;
        inode_free(ino);
    }
}

/* ------------------------------------------------------------------ changes */

static void push_name_op(struct sim_world *w, struct sim_name_op op)
{
    if (w->n_name_ops == w->cap_name_ops) {
        w->cap_name_ops = MAX(w->cap_name_ops * 2, 8u);
        w->name_ops = sim_grow(w->name_ops, w->cap_name_ops, sizeof op);
    }
    w->name_ops[w->n_name_ops++] = op;
}

static void change_names(struct sim_world *w, const char *a, struct sim_inode *to_a, const char *b,
                         struct sim_inode *to_b)
{
    struct sim_name_op op = {.op = ++w->n_ops, .n = b ? 2 : 1};
    op.change[0] = (struct sim_name_change){name_get(w, a), to_a};
    if (b)
        op.change[1] = (struct sim_name_change){name_get(w, b), to_b};
    for (unsigned i = 0; i < op.n; i++)
        op.change[i].name->now = op.change[i].to;
    push_name_op(w, op);
}

static bool share_a_name(const struct sim_name_op *a, const struct sim_name_op *b)
{
    for (unsigned i = 0; i < a->n; i++)
        for (unsigned k = 0; k < b->n; k++)
            if (a->change[i].name == b->change[k].name)
                return true;
    return false;
}

/* Those with keep[i] reach the disk, in order. The others stay pending, or are dropped. */
static void settle_names(struct sim_world *w, const bool *keep, bool drop_rest)
{
    size_t left = 0;
    for (size_t i = 0; i < w->n_name_ops; i++) {
        struct sim_name_op op = w->name_ops[i];
        for (unsigned k = 0; k < op.n && keep[i]; k++)
            op.change[k].name->disk = op.change[k].to;
        if (!keep[i] && !drop_rest)
            w->name_ops[left++] = op;
    }
    w->n_name_ops = left;
}

static bool in_dir(const struct sim_name *name, const char *dir)
{
    const char *own;
    size_t len = dir_of(name->path, &own);
    return strlen(dir) == len && memcmp(own, dir, len) == 0;
}

int disk_sync_dir(struct sim_world *w, const char *dir, uint64_t upto, struct sim_rng *rng)
{
    struct sim_inode *ino = disk_lookup(w, dir);
    if (!ino)
        return -ENOENT;
    if (!S_ISDIR(ino->mode))
        return -ENOTDIR;
    bool *keep = sim_alloc(w->n_name_ops);
    for (size_t i = w->n_name_ops; i-- > 0;) {
        struct sim_name_op *op = &w->name_ops[i];
        bool all = true;
        for (unsigned k = 0; k < op->n; k++) {
            if (in_dir(op->change[k].name, dir) && (op->op <= upto || sim_percent(rng, 50)))
                op->synced[k] = true;
            all &= op->synced[k];
        }
        keep[i] |= all;
        /* What is kept takes along what came before it on the same names. */
        for (size_t j = 0; keep[i] && j < i; j++)
            keep[j] |= share_a_name(&w->name_ops[j], op);
    }
    settle_names(w, keep, false);
    free(keep);
    disk_reap(w);
    return 0;
}

void disk_names_cut(struct sim_world *w, bool (*kept)(void *, uint64_t op), void *arg)
{
    bool *keep = sim_alloc(w->n_name_ops);
    for (size_t i = 0; i < w->n_name_ops; i++) {
        keep[i] = kept(arg, w->name_ops[i].op);
        for (size_t j = 0; j < i; j++)
            if (!keep[j] && share_a_name(&w->name_ops[j], &w->name_ops[i]))
                keep[i] = false;
    }
    settle_names(w, keep, true);
    free(keep);
    for (size_t i = 0; i < w->n_names; i++)
        w->names[i]->now = w->names[i]->disk;
}

/* ------------------------------------------------------------------ calls */

int disk_open(struct sim_world *w, const char *path, int flags, unsigned mode,
              struct sim_inode **out)
{
    struct sim_inode *ino = disk_lookup(w, path);
    bool writes = (flags & O_ACCMODE) != O_RDONLY;
    int r = check_dir(w, path);
    if (r < 0)
        return r;
    if (!ino && !(flags & O_CREAT))
        return -ENOENT;
    if (ino && (flags & O_CREAT) && (flags & O_EXCL))
        return -EEXIST;
    if (ino && S_ISDIR(ino->mode) && (writes || (flags & O_CREAT)))
        return -EISDIR;
    if (ino && !S_ISDIR(ino->mode) && (flags & O_DIRECTORY))
        return -ENOTDIR;
    if (!ino) {
        ino = inode_new(w, S_IFREG | (mode & 07777));
        change_names(w, path, ino, NULL, NULL);
    } else if ((flags & O_TRUNC) && writes) {
        inode_done(w, ino, (uint64_t)inode_truncate(w, ino, 0));
    }
    ino->opens++;
    *out = ino;
    return 0;
}

void disk_close(struct sim_world *w, struct sim_inode *ino, uint64_t owner)
{
    inode_lock(ino, owner, 0, 0, IO_UNLOCK, false);
    if (--ino->opens == 0)
        disk_reap(w);
}

void disk_stat(const struct sim_world *w, const struct sim_inode *ino, struct io_stat *st)
{
    *st = (struct io_stat){.size = ino->size,
                           .allocated = ino->now.n_chunks * SIM_CHUNK,
                           .dev = 42,
                           .ino = ino->ino,
                           .mode = ino->mode,
                           .align = 1,
                           .mtime_ns = ino->mtime_ns,
                           .ctime_ns = ino->mtime_ns};
    for (size_t i = 0; i < w->n_names; i++)
        st->nlink += w->names[i]->now == ino;
}

int disk_rename(struct sim_world *w, const char *from, const char *to, unsigned flags)
{
    struct sim_inode *a = disk_lookup(w, from), *b = disk_lookup(w, to);
    int r = check_dir(w, to);
    if ((flags & IO_NOREPLACE) && (flags & IO_EXCHANGE))
        return -EINVAL;
    if (!a || ((flags & IO_EXCHANGE) && !b))
        return -ENOENT;
    if (r < 0)
        return r;
    if (b && (flags & IO_NOREPLACE))
        return -EEXIST;
    if (S_ISDIR(a->mode) || (b && S_ISDIR(b->mode)))
        return -EISDIR; /* files only: nobody here moves directories */
    if (a == b)
        return 0;
    if (flags & IO_EXCHANGE)
        change_names(w, from, b, to, a);
    else
        change_names(w, from, NULL, to, a);
    disk_reap(w);
    return 0;
}

int disk_unlink(struct sim_world *w, const char *path)
{
    struct sim_inode *ino = disk_lookup(w, path);
    if (!ino)
        return -ENOENT;
    if (S_ISDIR(ino->mode))
        return -EISDIR;
    change_names(w, path, NULL, NULL, NULL);
    disk_reap(w);
    return 0;
}

/* ------------------------------------------------------------------ worlds */

static struct sim_inode *new_dir(struct sim_world *w, const char *path)
{
    struct sim_name *name = name_get(w, path);
    name->now = name->disk = inode_new(w, S_IFDIR | 0755);
    return name->now;
}

struct sim_world *sim_world_new(void)
{
    struct sim_world *w = sim_alloc(sizeof *w);
    w->wall_ns = INT64_C(1700000000) * 1000000000;
    w->limit = UINT64_MAX;
    w->next_ino = 2;
    new_dir(w, "/");
    new_dir(w, ".");
    return w;
}

void sim_world_free(struct sim_world *w)
{
    if (!w)
        return;
    sim_clear_faults(w);
    while (w->inodes) {
        struct sim_inode *ino = w->inodes;
        w->inodes = ino->next;
        inode_free(ino);
    }
    for (size_t i = 0; i < w->n_names; i++) {
        free(w->names[i]->path);
        free(w->names[i]);
    }
    free(w->names);
    free(w->name_ops);
    free(w);
}

static struct sim_inode *inode_clone(const struct sim_inode *old)
{
    struct sim_inode *ino = sim_alloc(sizeof *ino);
    *ino = *old;
    ino->next = ino->clone = NULL;
    ino->opens = 0;
    ino->locks = NULL;
    ino->n_locks = ino->cap_locks = 0;
    store_copy(&ino->now, &old->now);
    store_copy(&ino->disk, &old->disk);
    ino->cap_pieces = ino->n_pieces;
    ino->pieces = sim_grow(NULL, ino->n_pieces, sizeof *ino->pieces);
    for (size_t i = 0; i < ino->n_pieces; i++) {
        struct sim_piece *p = &ino->pieces[i];
        *p = old->pieces[i];
        if (!p->data)
            continue;
        p->data = sim_alloc(p->n * SIM_SECTOR);
        memcpy(p->data, old->pieces[i].data, p->n * SIM_SECTOR);
    }
    return ino;
}

static struct sim_inode *clone_of(const struct sim_inode *ino)
{
    return ino ? ino->clone : NULL;
}

struct sim_world *sim_world_clone(const struct sim_world *w)
{
    struct sim_world *c = sim_alloc(sizeof *c);
    *c = *w;
    c->faults = NULL;
    c->inodes = NULL;
    struct sim_inode **at = &c->inodes;
    for (struct sim_inode *ino = w->inodes; ino; ino = ino->next) {
        ino->clone = *at = inode_clone(ino);
        at = &(*at)->next;
    }
    c->names = NULL;
    c->n_names = c->cap_names = 0;
    for (size_t i = 0; i < w->n_names; i++) {
        struct sim_name *name = name_get(c, w->names[i]->path);
        name->now = clone_of(w->names[i]->now);
        name->disk = clone_of(w->names[i]->disk);
    }
    c->cap_name_ops = w->n_name_ops;
    c->name_ops = sim_grow(NULL, w->n_name_ops, sizeof *c->name_ops);
    for (size_t i = 0; i < w->n_name_ops; i++) {
        c->name_ops[i] = w->name_ops[i];
        for (unsigned k = 0; k < c->name_ops[i].n; k++) {
            struct sim_name_change *change = &c->name_ops[i].change[k];
            change->name = name_get(c, change->name->path);
            change->to = clone_of(change->to);
        }
    }
    disk_reap(c); /* what only open files led to */
    return c;
}

/* ------------------------------------------------------------------ setting the scene */

int sim_mkdir(struct sim_world *w, const char *path)
{
    char p[SIM_PATH_MAX];
    int r = disk_path(path, p);
    if (r < 0 || (r = check_dir(w, p)) < 0)
        return r;
    if (disk_lookup(w, p))
        return -EEXIST;
    new_dir(w, p);
    return 0;
}

int sim_file_write(struct sim_world *w, const char *path, const void *buf, size_t len, uint64_t off)
{
    char p[SIM_PATH_MAX];
    struct sim_inode *ino;
    struct sim_rng rng = {0};
    const char *dir;
    int r = disk_path(path, p);
    if (r < 0 || (r = disk_open(w, p, O_RDWR | O_CREAT, 0644, &ino)) < 0)
        return r;
    int64_t op = inode_write(w, ino, buf, len, off);
    if (op > 0)
        inode_sync_op(ino, (uint64_t)op);
    disk_close(w, ino, 0);
    size_t n = dir_of(p, &dir);
    char d[SIM_PATH_MAX];
    memcpy(d, dir, n);
    d[n] = 0;
    disk_sync_dir(w, d, w->n_ops, &rng);
    return op < 0 ? (int)op : 0;
}

static struct sim_inode *file_at(struct sim_world *w, const char *path)
{
    char p[SIM_PATH_MAX];
    return disk_path(path, p) < 0 ? NULL : disk_lookup(w, p);
}

ssize_t sim_file_read(struct sim_world *w, const char *path, void *buf, size_t len, uint64_t off)
{
    struct sim_inode *ino = file_at(w, path);
    return ino ? (ssize_t)inode_read(ino, buf, len, off) : -ENOENT;
}

int64_t sim_file_size(struct sim_world *w, const char *path)
{
    struct sim_inode *ino = file_at(w, path);
    return ino ? (int64_t)ino->size : -ENOENT;
}

int sim_file_remove(struct sim_world *w, const char *path)
{
    char p[SIM_PATH_MAX];
    int r = disk_path(path, p);
    if (r < 0 || (r = disk_unlink(w, p)) < 0)
        return r;
    struct sim_name_op *last = &w->name_ops[w->n_name_ops - 1];
    bool *keep = sim_alloc(w->n_name_ops);
    for (size_t i = 0; i < w->n_name_ops; i++)
        keep[i] = share_a_name(&w->name_ops[i], last);
    settle_names(w, keep, false);
    free(keep);
    disk_reap(w);
    return 0;
}
