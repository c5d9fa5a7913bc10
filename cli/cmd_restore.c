/* SPDX-License-Identifier: Apache-2.0 */
/* restore, verify, points: what needs the directory and no daemon.
 *
 * Restoring writes all disks to temporary files, the full copy first and every increment over it,
 * with every hash checked on the way. Only when all are complete and on disk do they get their
 * names, so a damaged backup never leaves something that looks restored. */
#include "base/mem.h"
#include "cli/cli.h"
#include "cli/image.h"
#include "cli/interrupt.h"
#include "cli/manifest.h"
#include "cli/progress.h"
#include "cli/size.h"
#include "cli/table.h"
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- the directory ---- */

/* Keeps backups from changing the directory until it is closed. A file system that knows no such
 * locks gives none: that must not keep anybody from a restore. */
static int lock_backup(int dir_fd, struct tide_error *err)
{
    if (flock(dir_fd, LOCK_SH | LOCK_NB) == 0 || errno != EWOULDBLOCK)
        return 0;
    return tide_fail(err, -EBUSY, "a backup into it is running");
}

/* Opens and reads it. What reads more than the manifest, which is replaced in one step, asks for
 * the shared lock. */
static int open_backup(const char *dir, bool lock, int *dir_fd, struct manifest *m,
                       struct tide_error *err)
{
    *dir_fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (*dir_fd < 0)
        return tide_fail(err, -errno, "cannot open '%s': %s", dir, tide_strerror(errno));
    int r = lock ? lock_backup(*dir_fd, err) : 0;
    if (r == 0)
        r = manifest_load(*dir_fd, m, err);
    if (r < 0) {
        tide_error_prefix(err, "'%s': ", dir);
        close(*dir_fd);
    }
    return r;
}

/* Bytes of data in all files that a disk of a point is made of, or in this one only. */
static uint64_t data_bytes(const struct manifest_disk *d)
{
    uint64_t n = 0;
    for (size_t i = 0; i < d->n_extents; i++)
        n += d->extents[i].zero ? 0 : d->extents[i].len;
    return n;
}

/* The disk in the point that this one builds on; NULL for a full one. The manifest was checked:
 * a parent is there and is an older point. */
static const struct manifest_disk *below(const struct manifest *m, const struct manifest_point **p,
                                         const struct manifest_disk *d)
{
    if (d->full)
        return NULL;
    *p = manifest_find(m, (*p)->parent);
    return manifest_disk(*p, d->name);
}

struct work {
    struct progress p;
    struct progress_line line;
};

static int moved(void *opaque, uint64_t bytes)
{
    struct work *w = opaque;
    w->line.done += bytes;
    progress_draw(&w->p, &w->line, 1, false);
    return interrupted() ? -EINTR : 0;
}

/* ---- points ---- */

static json_t *point_json(const struct manifest_point *p)
{
    json_t *disks = cli_pack("[]");
    for (size_t i = 0; i < p->n_disks; i++) {
        const struct manifest_disk *d = &p->disks[i];
        json_array_append_new(
            disks, cli_pack("{s:s, s:s, s:I, s:I, s:s, s:s}", "name", d->name, "kind",
                            d->full ? "full" : "incremental", "size", (json_int_t)d->size, "data",
                            (json_int_t)data_bytes(d), "file", d->file, "bitmap", d->bitmap));
    }
    return cli_pack("{s:s, s:s?, s:I, s:s, s:o}", "uuid", p->uuid, "parent",
                    p->parent[0] ? p->parent : NULL, "number", (json_int_t)p->number, "time",
                    p->time, "disks", disks);
}

static void points_table(const struct manifest *m, bool color)
{
    static const char *const heads[] = {">POINT", "UUID",  "TIME",  "DISK",
                                        "KIND",   ">SIZE", ">DATA", "FILE"};
    struct table t;
    table_init(&t, heads, sizeof heads / sizeof *heads);
    for (size_t i = 0; i < m->n_points; i++) {
        const struct manifest_point *p = &m->points[i];
        char number[24], uuid[9];
        snprintf(number, sizeof number, "%" PRIu64, p->number);
        snprintf(uuid, sizeof uuid, "%.8s", p->uuid);
        for (size_t k = 0; k < p->n_disks; k++) {
            const struct manifest_disk *d = &p->disks[k];
            table_row(&t, k ? "" : number, k ? "" : uuid, k ? "" : p->time, d->name,
                      d->full ? "full" : "incremental", size_text(d->size).s,
                      size_text(data_bytes(d)).s, d->file);
        }
    }
    table_print(&t, stdout, color, "no points yet");
    table_fini(&t);
}

int cmd_points(struct cli *c)
{
    struct tide_error err;
    struct manifest m;
    int dir_fd, code = CLI_DONE;
    if (open_backup(c->args[0], false, &dir_fd, &m, &err) < 0)
        return cli_fail(&err);
    if (c->json) {
        json_t *list = cli_pack("[]");
        for (size_t i = 0; i < m.n_points; i++)
            json_array_append_new(list, point_json(&m.points[i]));
        code = cli_print_json(cli_pack("{s:s, s:o}", "id", m.id, "points", list));
    } else {
        points_table(&m, c->color);
    }
    manifest_fini(&m);
    close(dir_fd);
    return code;
}

/* ---- verify ---- */

struct verify {
    uint64_t n_files, n_bad, n_bytes;
    json_t *list;
};

static int verify_disk(struct cli *c, int dir_fd, const struct manifest_disk *d, struct verify *v,
                       struct image_watch *watch)
{
    struct work *w = watch->opaque;
    struct tide_error err;
    int fd = image_open(dir_fd, d, &err);
    int r = fd < 0 ? fd : image_verify(fd, d, watch, &err);
    if (fd >= 0)
        close(fd);
    v->n_files++;
    v->n_bytes += data_bytes(d);
    v->n_bad += r < 0;
    json_array_append_new(v->list, cli_pack("{s:s, s:b, s:s?}", "file", d->file, "good", r == 0,
                                            "error", r < 0 ? err.msg : NULL));
    if (r < 0) {
        progress_end(&w->p);
        cli_error("%s", err.msg);
    }
    return r == -EINTR ? r : 0;
}

static int verify_all(struct cli *c, int dir_fd, const struct manifest *m, struct verify *v)
{
    struct work w = {.line = {.label = "verifying"}};
    struct image_watch watch = {.moved = moved, .opaque = &w};
    progress_start(&w.p, c->progress);
    for (size_t i = 0; i < m->n_points; i++)
        for (size_t k = 0; k < m->points[i].n_disks; k++)
            w.line.total += data_bytes(&m->points[i].disks[k]);
    int r = 0;
    for (size_t i = 0; r == 0 && i < m->n_points; i++)
        for (size_t k = 0; r == 0 && k < m->points[i].n_disks; k++)
            r = verify_disk(c, dir_fd, &m->points[i].disks[k], v, &watch);
    progress_end(&w.p);
    return r;
}

int cmd_verify(struct cli *c)
{
    struct tide_error err;
    struct manifest m;
    int dir_fd;
    int r = open_backup(c->args[0], true, &dir_fd, &m, &err);
    if (r < 0) {
        cli_fail(&err);
        return r == -EBADMSG ? CLI_NO : CLI_FAILED;
    }
    struct verify v = {.list = cli_pack("[]")};
    interrupts_catch();
    r = verify_all(c, dir_fd, &m, &v);
    int code = r < 0 ? CLI_FAILED : v.n_bad ? CLI_NO : CLI_DONE;
    if (c->json)
        cli_print_json(cli_pack("{s:b, s:O}", "good", code == CLI_DONE, "files", v.list));
    else if (r == 0)
        printf("%" PRIu64 " points, %" PRIu64 " files, %s of data: %s\n", (uint64_t)m.n_points,
               v.n_files, size_text(v.n_bytes).s, v.n_bad ? "DAMAGED" : "all good");
    json_decref(v.list);
    manifest_fini(&m);
    close(dir_fd);
    return code;
}

/* ---- restore ---- */

struct target {
    const struct manifest_disk *disk;
    char *path, *tmp;
    int fd; /* of the temporary file; -1 */
    bool renamed;
    bool replaces; /* the file described by `old` */
    struct stat old;
};

struct restore {
    struct cli *c;
    int dir_fd;
    struct manifest manifest;
    const struct manifest_point *point;
    struct target *targets;
    size_t n;
    bool force;
    bool made_dir; /* of --to */
};

static void restore_free(struct restore *r)
{
    for (size_t i = 0; i < r->n; i++) {
        struct target *t = &r->targets[i];
        if (t->fd >= 0)
            close(t->fd);
        if (t->tmp && !t->renamed)
            unlink(t->tmp);
        mem_free(t->tmp);
        mem_free(t->path);
    }
    mem_free(r->targets);
    manifest_fini(&r->manifest);
    close(r->dir_fd);
}

static int add_target(struct restore *r, const struct manifest_disk *d, char *path,
                      struct tide_error *err)
{
    r->targets = cli_grow(r->targets, r->n + 1, sizeof *r->targets);
    r->targets[r->n++] = (struct target){.disk = d, .path = path, .fd = -1};
    for (size_t i = 0; i + 1 < r->n; i++)
        if (strcmp(r->targets[i].path, path) == 0)
            return tide_fail(err, -EINVAL, "two disks cannot both go to '%s'", path);
    struct target *t = &r->targets[r->n - 1];
    if (lstat(path, &t->old) < 0)
        return errno == ENOENT
                   ? 0
                   : tide_fail(err, -errno, "cannot use '%s': %s", path, tide_strerror(errno));
    t->replaces = true;
    if (!S_ISREG(t->old.st_mode))
        return tide_fail(err, -EEXIST, "'%s' is there and no regular file", path);
    if (!r->force)
        return tide_fail(err, -EEXIST, "'%s' is there already", path);
    return 0;
}

/* --disk NAME=PATH */
static int add_named(struct restore *r, const char *text, struct tide_error *err)
{
    const char *eq = strchr(text, '=');
    if (!eq || eq == text || !eq[1])
        return tide_fail(err, -EINVAL, "'--disk %s' is not of the form NAME=PATH", text);
    mem_autofree char *name = cli_printf("%.*s", (int)(eq - text), text);
    const struct manifest_disk *d = manifest_disk(r->point, name);
    if (!d)
        return tide_fail(err, -ENOENT, "point %" PRIu64 " has no disk '%s'", r->point->number,
                         name);
    return add_target(r, d, cli_strdup(eq + 1), err);
}

static int take_targets(struct restore *r, struct tide_error *err)
{
    const char *dir = cli_option(r->c, "to"), *disk;
    for (size_t i = 0; (disk = cli_option_at(r->c, "disk", i)); i++) {
        int e = add_named(r, disk, err);
        if (e < 0)
            return e;
    }
    if (!dir)
        return 0;
    r->made_dir = mkdir(dir, 0700) == 0;
    if (!r->made_dir && errno != EEXIST)
        return tide_fail(err, -errno, "cannot make '%s': %s", dir, tide_strerror(errno));
    for (size_t i = 0; i < r->point->n_disks; i++) {
        const struct manifest_disk *d = &r->point->disks[i];
        int e = add_target(r, d, cli_printf("%s/%s.raw", dir, d->name), err);
        if (e < 0)
            return e;
    }
    return 0;
}

static int create_target(struct target *t, struct tide_error *err)
{
    char *tmp = cli_printf("%s.tmp-XXXXXX", t->path);
    t->fd = mkostemp(tmp, O_CLOEXEC);
    if (t->fd < 0) {
        mem_free(tmp);
        return tide_fail(err, -errno, "cannot create '%s': %s", t->path, tide_strerror(errno));
    }
    t->tmp = tmp;
    if (ftruncate(t->fd, (off_t)t->disk->size) < 0)
        return tide_fail(err, -errno, "cannot make '%s' %" PRIu64 " bytes long: %s", t->tmp,
                         t->disk->size, tide_strerror(errno));
    return 0;
}

/* A new file is for its owner only, as mkostemp() made it. One that replaces another takes over who
 * may use it; if its owner or group cannot be kept, the group's rights would be another group's. */
static int give_mode(const struct target *t, struct tide_error *err)
{
    mode_t mode = t->old.st_mode & 0777;
    if (!t->replaces)
        return 0;
    if (fchown(t->fd, t->old.st_uid, t->old.st_gid) < 0)
        mode &= ~(mode_t)070;
    if (fchmod(t->fd, mode) < 0)
        return tide_fail(err, -errno, "cannot set the mode of '%s': %s", t->tmp,
                         tide_strerror(errno));
    return 0;
}

/* The files of a disk from its full copy to the point. The caller frees the list. */
static const struct manifest_disk **chain_of(const struct restore *r, const struct manifest_disk *d,
                                             size_t *n)
{
    const struct manifest_disk **chain = cli_alloc(r->manifest.n_points, sizeof *chain);
    const struct manifest_point *p = r->point;
    size_t len = 0;
    for (; d; d = below(&r->manifest, &p, d))
        chain[len++] = d;
    for (size_t i = 0; i < len / 2; i++) {
        const struct manifest_disk *swap = chain[i];
        chain[i] = chain[len - 1 - i];
        chain[len - 1 - i] = swap;
    }
    *n = len;
    return chain;
}

static int fill_target(struct restore *r, struct target *t, struct tide_error *err)
{
    size_t n;
    const struct manifest_disk **chain = chain_of(r, t->disk, &n);
    struct work w = {.line = {.label = t->disk->name}};
    struct image_watch watch = {.moved = moved, .opaque = &w};
    progress_start(&w.p, r->c->progress);
    for (size_t i = 0; i < n; i++)
        w.line.total += data_bytes(chain[i]);
    int e = create_target(t, err);
    for (size_t i = 0; e == 0 && i < n; i++) {
        int fd = image_open(r->dir_fd, chain[i], err);
        e = fd < 0 ? fd : image_apply(fd, chain[i], t->fd, &watch, err);
        if (fd >= 0)
            close(fd);
    }
    if (e == 0)
        e = give_mode(t, err);
    if (e == 0 && fsync(t->fd) < 0)
        e = tide_fail(err, -errno, "cannot sync '%s': %s", t->tmp, tide_strerror(errno));
    progress_end(&w.p);
    mem_free(chain);
    return e;
}

static int sync_dir_of(const char *path, struct tide_error *err)
{
    const char *slash = strrchr(path, '/');
    mem_autofree char *dir =
        slash ? cli_printf("%.*s", (int)(slash - path + 1), path) : cli_strdup(".");
    int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int r = fd < 0 || fsync(fd) < 0
                ? tide_fail(err, -errno, "cannot sync '%s': %s", dir, tide_strerror(errno))
                : 0;
    if (fd >= 0)
        close(fd);
    return r;
}

/* Without --force nothing may be replaced, also nothing that appeared since the check. */
static int give_name(const struct restore *r, struct target *t, struct tide_error *err)
{
    unsigned flags = r->force ? 0 : RENAME_NOREPLACE;
    int e = renameat2(AT_FDCWD, t->tmp, AT_FDCWD, t->path, flags);
    if (e < 0 && errno == EINVAL && flags && access(t->path, F_OK) < 0) /* NFS has no such flag */
        e = rename(t->tmp, t->path);
    if (e < 0)
        return tide_fail(err, -errno, "cannot rename '%s' to '%s': %s", t->tmp, t->path,
                         tide_strerror(errno));
    t->renamed = true;
    return 0;
}

/* What was renamed is there now, but may be gone again after a power cut before its name and the
 * names above it are on disk. */
static int sync_names(const struct restore *r)
{
    struct tide_error err;
    int code = CLI_DONE;
    for (size_t i = 0; i < r->n; i++) {
        const struct target *t = &r->targets[i];
        if (!t->renamed || sync_dir_of(t->path, &err) == 0)
            continue;
        cli_error("'%s' is restored and in place, but its name may not outlast a power cut: %s",
                  t->path, err.msg);
        code = CLI_PARTLY;
    }
    const char *dir = cli_option(r->c, "to");
    int fd = r->made_dir ? open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1;
    if (r->made_dir &&
        (fd < 0 ? tide_fail(&err, -errno, "cannot open '%s': %s", dir, tide_strerror(errno))
                : cli_sync_above(fd, dir, &err)) < 0) {
        cli_error("all is restored and in place, but '%s' itself may not outlast a power cut: %s",
                  dir, err.msg);
        code = CLI_PARTLY;
    }
    if (fd >= 0)
        close(fd);
    return code;
}

/* All files get their names. An error on the way leaves those before it in place, and says so. */
static int give_names(struct restore *r)
{
    struct tide_error err;
    size_t n = 0;
    while (n < r->n && give_name(r, &r->targets[n], &err) == 0)
        n++;
    if (n == r->n)
        return sync_names(r);
    cli_fail(&err);
    for (size_t i = 0; i < n; i++)
        cli_error("'%s' is restored and in place already", r->targets[i].path);
    if (n == 0)
        return CLI_FAILED;
    sync_names(r);
    return CLI_PARTLY;
}

static int print_restored(const struct restore *r)
{
    static const char *const heads[] = {"DISK", ">SIZE", "FILE"};
    struct table t;
    json_t *list = cli_pack("[]");
    table_init(&t, heads, sizeof heads / sizeof *heads);
    for (size_t i = 0; i < r->n; i++) {
        const struct target *x = &r->targets[i];
        table_row(&t, x->disk->name, size_text(x->disk->size).s, x->path);
        json_array_append_new(list, cli_pack("{s:s, s:I, s:s}", "name", x->disk->name, "size",
                                             (json_int_t)x->disk->size, "file", x->path));
    }
    int code = CLI_DONE;
    if (r->c->json) {
        code = cli_print_json(cli_pack("{s:s, s:I, s:O}", "point", r->point->uuid, "number",
                                       (json_int_t)r->point->number, "disks", list));
    } else {
        printf("point %" PRIu64 " of %s, every hash checked\n", r->point->number, r->c->args[0]);
        table_print(&t, stdout, r->c->color, "no disks");
    }
    json_decref(list);
    table_fini(&t);
    return code;
}

static int restore(struct restore *r)
{
    struct tide_error err;
    const char *point = r->c->n_args > 1 ? r->c->args[1] : "latest";
    if (manifest_choose(&r->manifest, point, &r->point, &err) < 0) {
        int code = cli_fail(&err);
        cli_hint("'tidemark points %s' lists the points", r->c->args[0]);
        return code;
    }
    int e = take_targets(r, &err);
    if (e < 0) {
        int code = e == -EINVAL ? cli_usage(r->c, "%s", err.msg) : cli_fail(&err);
        if (e == -EEXIST && !r->force)
            cli_hint("'--force' replaces files");
        return code;
    }
    for (size_t i = 0; e == 0 && i < r->n; i++)
        e = fill_target(r, &r->targets[i], &err);
    if (e < 0)
        return cli_fail(&err);
    int code = give_names(r);
    for (size_t i = 0; i < r->n; i++)
        if (!r->targets[i].renamed)
            return code;
    int printed = print_restored(r);
    return code == CLI_DONE ? printed : code;
}

int cmd_restore(struct cli *c)
{
    struct tide_error err;
    struct restore r = {.c = c, .force = cli_option(c, "force")};
    if (!cli_option(c, "to") && !cli_option(c, "disk"))
        return cli_usage(c, "where to? '--to OUTDIR' or '--disk NAME=PATH' is missing");
    if (cli_option(c, "to") && cli_option(c, "disk"))
        return cli_usage(c, "'--to' and '--disk' exclude each other");
    if (open_backup(c->args[0], true, &r.dir_fd, &r.manifest, &err) < 0)
        return cli_fail(&err);
    interrupts_catch();
    int code = restore(&r);
    restore_free(&r);
    return code;
}
