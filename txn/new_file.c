/* SPDX-License-Identifier: Apache-2.0 */
#include "txn/new_file.h"

#include <errno.h>
#include <string.h>
#include <sys/stat.h>

#include "base/bytes.h"
#include "base/log.h"
#include "base/mem.h"
#include "block/node.h"
#include "io/io.h"

#define FILE_NAME_MAX 255u /* NAME_MAX of every file system of ours */
#define ADVICE "give a file that exists and mode=existing"

/* Bytes of the file that programs which honour QEMU's image locking lock (drivers/file.c). */
#define LOCK_FIRST 100u
#define LOCK_END 204u

struct new_file {
    char *path, *temp, *dir;
    uint64_t dev, ino; /* of the new one */
    bool placed;
    bool exchanged;            /* something stood there: */
    uint64_t old_dev, old_ino; /* that is now at `temp` */
    bool unsure;               /* it was taken back unseen */
    bool lost;                 /* it was not: what stands at `temp` is not ours to remove */
};

/* ------------------------------------------------------------------ names */

static const char *base_of(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

static int check_name(const char *path, struct tide_error *err)
{
    const char *base = base_of(path);
    if (!*base || !strcmp(base, ".") || !strcmp(base, ".."))
        return tide_fail(err, -EISDIR, "'%s' does not name a file", shown_name(path).text);
    if (strlen(base) > FILE_NAME_MAX)
        return tide_fail(err, -ENAMETOOLONG, "the name of file '%s' is longer than %u bytes",
                         shown_name(path).text, FILE_NAME_MAX);
    return 0;
}

static char *dir_of(const char *path)
{
    size_t len = (size_t)(base_of(path) - path);
    if (!len)
        return mem_strdup(".");
    return mem_printf("%.*s", (int)(len > 1 ? len - 1 : 1), path);
}

/* Beside it, since only there a rename reaches it. A long name is cut, not in the midst of a
 * character. */
static char *temp_of(struct io *io, const char *path)
{
    const char *base = base_of(path);
    size_t keep = MIN(strlen(base), FILE_NAME_MAX - strlen(".0123456789abcdef.tmp"));
    uint64_t id;
    while (base[keep] && keep && (base[keep] & 0xc0) == 0x80)
        keep--;
    io_random(io, &id, sizeof id);
    return mem_printf("%.*s.%016llx.tmp", (int)(base - path) + (int)keep, path,
                      (unsigned long long)id);
}

static void new_file_free(struct new_file *f)
{
    if (!f)
        return;
    mem_free(f->path);
    mem_free(f->temp);
    mem_free(f->dir);
    mem_free(f);
}

static struct new_file *new_file_alloc(struct io *io, const char *path)
{
    struct new_file *f = mem_zalloc(sizeof *f);
    if (!f)
        return NULL;
    f->path = mem_strdup(path);
    f->temp = temp_of(io, path);
    f->dir = dir_of(path);
    if (f->path && f->temp && f->dir)
        return f;
    new_file_free(f);
    return NULL;
}

/* ------------------------------------------------------------------ what stands there */

struct found {
    bool there;
    struct io_stat st;
};

/* `left`: a node of ours that the list has taken out of sight may still have locked it, or NULL. */
static co_fn int check_unlocked(struct io_file *f, struct node *left, const char *path,
                                struct tide_error *err)
{
    const uint64_t len = LOCK_END - LOCK_FIRST;
    int r = left ? node_lock_test(left, LOCK_FIRST, len)
                 : io_file_lock_test(f, LOCK_FIRST, len, IO_LOCK_EXCLUSIVE);
    if (r == -EAGAIN || r == -EACCES)
        return tide_fail(err, -EBUSY, "file '%s' is in use by another process", path);
    return 0; /* a file system without locks has no users to tell */
}

static int is_a_link(const char *path, struct tide_error *err)
{
    return tide_fail(err, -ELOOP, "'%s' is a symbolic link: name what it leads to, or " ADVICE,
                     path);
}

/* The name itself, not what a symbolic link leads to. */
static co_fn int look_closer(const char *path, struct graph *g, struct found *at,
                             struct tide_error *err)
{
    struct io_file *f;
    int r = io_open(path, O_RDWR | O_NOFOLLOW, 0, &f);
    if (r == -ELOOP)
        return is_a_link(path, err);
    if (r < 0)
        return tide_fail(err, r, "file '%s' cannot be replaced, for it cannot be opened: %s", path,
                         tide_strerror(-r));
    r = io_fstat(f, &at->st);
    if (r < 0)
        tide_fail(err, r, "cannot look at file '%s': %s", path, tide_strerror(-r));
    struct node *n = r == 0 ? graph_find_file(g, at->st.dev, at->st.ino) : NULL;
    if (n)
        r = tide_fail(err, -EBUSY, "file '%s' is in use by node '%s'", path, node_name(n));
    else if (r == 0 && !S_ISREG(at->st.mode))
        r = tide_fail(err, -EINVAL, "'%s' was replaced while it was looked at", path);
    else if (r == 0 && at->st.nlink != 1)
        r = tide_fail(err, -EMLINK,
                      "file '%s' has %u names (hard links), which would part: remove it first, or "
                      "use it with mode=existing",
                      path, at->st.nlink);
    if (r == 0)
        r = check_unlocked(f, graph_find_left_file(g, at->st.dev, at->st.ino), path, err);
    io_close(f);
    return r;
}

/* Nothing is there, but perhaps a link that leads nowhere. */
static co_fn int look_at_nothing(const char *path, struct tide_error *err)
{
    struct io_file *f;
    int r = io_open(path, O_RDONLY | O_NOFOLLOW, 0, &f);
    if (r == 0)
        io_close(f);
    return r == -ELOOP ? is_a_link(path, err) : 0;
}

static co_fn int look(const char *path, struct graph *g, struct found *at, struct tide_error *err)
{
    *at = (struct found){0};
    int r = io_stat(path, &at->st); /* opening a pipe would wait for its other end */
    if (r == -ENOENT)
        return look_at_nothing(path, err);
    if (r < 0)
        return tide_fail(err, r, "cannot look at '%s': %s", shown_name(path).text,
                         tide_strerror(-r));
    at->there = true;
    if (S_ISDIR(at->st.mode))
        return tide_fail(err, -EISDIR, "'%s' is a directory", path);
    if (!S_ISREG(at->st.mode))
        return tide_fail(err, -EINVAL, "'%s' is not a regular file, so it cannot be replaced: %s",
                         path,
                         S_ISBLK(at->st.mode) ? "use it with mode=existing" : "give another name");
    return look_closer(path, g, at, err);
}

/* ------------------------------------------------------------------ make */

static int cannot_make(int r, const char *path, struct tide_error *err)
{
    return tide_fail(
        err, r, "cannot make a file in the directory of '%s': %s; where none can be made, " ADVICE,
        shown_name(path).text, tide_strerror(-r));
}

static int cannot_sync(int r, const char *path, struct tide_error *err)
{
    return tide_fail(err, r, "cannot make file '%s': its directory cannot be synced: %s",
                     shown_name(path).text, tide_strerror(-r));
}

/* The directory is synced, too, since one for which that is refused is better known before guests
 * are held. */
static co_fn int create(struct new_file *f, uint64_t size, struct tide_error *err)
{
    struct io_stat st;
    struct io_file *file;
    bool replaces = io_stat(f->path, &st) == 0 && S_ISREG(st.mode);
    int r = io_open(f->temp, O_RDWR | O_CREAT | O_EXCL, replaces ? st.mode & 0777 : 0644, &file);
    if (r < 0)
        return cannot_make(r, f->path, err);
    r = io_fstat(file, &st);
    if (r == 0)
        r = io_truncate(file, size);
    if (r == 0)
        r = io_fsync(file); /* a name that is durable must not lead to half of it */
    if (r < 0)
        tide_fail(err, r, "cannot make file '%s' of %llu bytes: %s", f->path,
                  (unsigned long long)size, tide_strerror(-r));
    else if ((r = io_sync_dir(f->dir)) < 0)
        cannot_sync(r, f->path, err);
    f->dev = st.dev;
    f->ino = st.ino;
    io_close(file);
    if (r < 0)
        io_unlink(f->temp);
    return r;
}

int new_file_make(struct io *io, const char *path, uint64_t size, struct new_file **out,
                  struct tide_error *err)
{
    int r = check_name(path, err);
    if (r < 0)
        return r;
    struct new_file *f = new_file_alloc(io, path);
    if (!f)
        return tide_fail(err, -ENOMEM, "no memory to make file '%s'", shown_name(path).text);
    r = create(f, size, err);
    if (r < 0)
        new_file_free(f);
    else
        *out = f;
    return r;
}

const char *new_file_temp(const struct new_file *f)
{
    return f->temp;
}

/* A file without a name shows whether one could be made, and leaves no trace. */
int new_file_check(struct graph *g, const char *path, struct tide_error *err)
{
    struct found at;
    int r = check_name(path, err);
    if (r < 0)
        return r;
    mem_autofree char *dir = dir_of(path);
    struct io_file *nameless;
    if (!dir)
        return tide_fail(err, -ENOMEM, "no memory to look at '%s'", shown_name(path).text);
    r = io_open(dir, O_RDWR | O_TMPFILE, 0600, &nameless);
    if (r == 0)
        io_close(nameless);
    else if (r != -EISDIR && r != -EOPNOTSUPP && r != -EINVAL) /* not every file system has them */
        return cannot_make(r, path, err);
    r = io_sync_dir(dir);
    return r < 0 ? cannot_sync(r, path, err) : look(path, g, &at, err);
}

/* ------------------------------------------------------------------ in place and back */

/* 1: that inode stands there, 0: another or nothing does, -errno: not known. */
static co_fn int stands_at(const char *path, uint64_t dev, uint64_t ino)
{
    struct io_stat st;
    int r = io_stat(path, &st);
    if (r < 0)
        return r == -ENOENT ? 0 : r;
    return st.dev == dev && st.ino == ino;
}

static co_fn int put(struct new_file *f, const struct found *at, struct tide_error *err)
{
    int r = io_rename(f->temp, f->path, at->there ? IO_EXCHANGE : IO_NOREPLACE);
    if (r == -EINVAL || r == -ENOSYS || r == -EOPNOTSUPP)
        return tide_fail(
            err, r, "the file system of '%s' cannot put a file in place safely: " ADVICE, f->path);
    if (r == -EEXIST || r == -ENOENT)
        return tide_fail(err, r, "'%s' came or went while the list was carried out: try again",
                         f->path);
    if (r < 0)
        return tide_fail(err, r, "cannot put file '%s' in place: %s", f->path, tide_strerror(-r));
    f->placed = true;
    f->exchanged = at->there;
    f->old_dev = at->st.dev;
    f->old_ino = at->st.ino;
    return 0;
}

int new_file_place(struct new_file *f, struct graph *g, struct tide_error *left,
                   struct tide_error *err)
{
    struct found at;
    left->code = 0;
    int r = look(f->path, g, &at, err);
    if (r == 0)
        r = put(f, &at, err);
    if (r < 0)
        return r;
    if (f->exchanged && stands_at(f->temp, f->old_dev, f->old_ino) == 0)
        r = tide_fail(err, -ESTALE, "'%s' was replaced while it was looked at", f->path);
    if (r == 0 && (r = io_sync_dir(f->dir)) < 0)
        tide_fail(err, r, "cannot put file '%s' in place: its directory cannot be synced: %s",
                  f->path, tide_strerror(-r));
    if (r < 0)
        new_file_unplace(f, left);
    return r;
}

/* The answer will say that it is undone. */
static co_fn int sync_undone(struct new_file *f, struct tide_error *err)
{
    int r = io_sync_dir(f->dir);
    if (r == 0)
        return 0;
    log_error("txn", "cannot sync directory '%s': %s", f->dir, tide_strerror(-r));
    return tide_fail(err, r,
                     "the new file '%s' was taken back, but its directory cannot be synced: %s; "
                     "when power fails it may be there again%s%s%s",
                     f->path, tide_strerror(-r), f->exchanged ? ", and the old one at '" : "",
                     f->exchanged ? f->temp : "", f->exchanged ? "'" : "");
}

int new_file_unplace(struct new_file *f, struct tide_error *err)
{
    if (!f->placed)
        return 0;
    f->placed = false;
    int r = stands_at(f->path, f->dev, f->ino);
    f->unsure = r < 0; /* nearly always it is ours; what it was is looked at before it is removed */
    if (r == 0)
        r = -ESTALE;
    else
        r = io_rename(f->exchanged ? f->temp : f->path, f->exchanged ? f->path : f->temp,
                      f->exchanged ? IO_EXCHANGE : IO_NOREPLACE);
    if (r == 0)
        return sync_undone(f, err);
    f->lost = true;
    if (f->exchanged)
        tide_fail(err, r, "file '%s' cannot be put back: %s; it is at '%s'", f->path,
                  tide_strerror(-r), f->temp);
    else
        tide_fail(err, r, "new file '%s' cannot be taken back: %s", f->path, tide_strerror(-r));
    log_error("txn", "%s", err->msg);
    return r;
}

/* Ours if it is not in its place, else what was there before. */
static co_fn void remove_temp(struct new_file *f)
{
    int r =
        f->placed ? stands_at(f->temp, f->old_dev, f->old_ino) : stands_at(f->temp, f->dev, f->ino);
    if (r == 1 || (r < 0 && !f->unsure))
        r = io_unlink(f->temp);
    else if (r == 0)
        r = -ESTALE;
    if (r < 0)
        log_warn("txn", "cannot remove '%s': %s", f->temp, tide_strerror(-r));
}

void new_file_end(struct new_file *f)
{
    if (!f)
        return;
    if (!f->lost && (!f->placed || f->exchanged))
        remove_temp(f);
    new_file_free(f);
}
