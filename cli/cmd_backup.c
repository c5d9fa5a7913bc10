/* SPDX-License-Identifier: Apache-2.0 */
/* backup: the directory's half, and the order of the steps.
 *
 * Files are written under temporary names, synced, renamed, and the directory synced; the manifest
 * comes last of all. Until its rename the directory is the one of before, plus files that nothing
 * names; the next run removes those. After it, the new point exists. A lock on the directory keeps
 * two runs apart. A copy of a disk is as secret as the disk: only the owner may read what is made
 * here. */
#include "base/mem.h"
#include "cli/backup.h"
#include "cli/image.h"
#include "cli/interrupt.h"
#include "cli/progress.h"
#include "cli/size.h"
#include "cli/table.h"
#include "cli/view.h"
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define DEFAULT_STEM "tidemark-backup"
#define DEFAULT_GRANULARITY 65536
#define STEM_MAX 200

static void backup_free(struct backup *b)
{
    for (size_t i = 0; i < b->n; i++) {
        struct backup_disk *d = &b->disks[i];
        char *strings[] = {d->why, d->bitmap, d->frozen, d->node, d->job, d->file, d->tmp};
        for (size_t k = 0; k < sizeof strings / sizeof *strings; k++)
            mem_free(strings[k]);
        if (d->fd >= 0)
            close(d->fd);
        ranges_fini(&d->ranges);
        mem_free(d->extents);
    }
    mem_free(b->disks);
    mem_free(b->path);
    manifest_fini(&b->manifest);
    if (b->dir_fd >= 0)
        close(b->dir_fd);
}

/* ---- the directory ---- */

/* Only an empty directory becomes a backup directory: later runs remove files in it by their names,
 * and must not meet somebody else's. */
static int check_empty(struct backup *b, struct tide_error *err)
{
    int fd = dup(b->dir_fd);
    DIR *d = fd < 0 ? NULL : fdopendir(fd);
    if (!d) {
        int errnum = errno;
        if (fd >= 0)
            close(fd);
        return tide_fail(err, -errnum, "cannot read '%s': %s", b->dir, tide_strerror(errnum));
    }
    int r = 0;
    for (struct dirent *e; r == 0 && (e = readdir(d));)
        if (e->d_name[0] != '.' && strcmp(e->d_name, "lost+found") != 0 &&
            strcmp(e->d_name, MANIFEST_FILE ".tmp") != 0)
            r = tide_fail(err, -ENOTEMPTY,
                          "'%s' holds '%s' but no manifest: it is no backup directory", b->dir,
                          e->d_name);
    closedir(d);
    return r;
}

static int open_dir(struct backup *b, struct tide_error *err)
{
    if (mkdir(b->dir, 0700) < 0 && errno != EEXIST)
        return tide_fail(err, -errno, "cannot make '%s': %s", b->dir, tide_strerror(errno));
    b->dir_fd = open(b->dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    b->path = realpath(b->dir, NULL);
    if (b->dir_fd < 0 || !b->path)
        return tide_fail(err, -errno, "cannot open '%s': %s", b->dir, tide_strerror(errno));
    if (flock(b->dir_fd, LOCK_EX | LOCK_NB) < 0)
        return errno == EWOULDBLOCK
                   ? tide_fail(err, -EBUSY, "'%s' is in use by another run", b->dir)
                   : tide_fail(err, -errno, "cannot lock '%s': %s", b->dir, tide_strerror(errno));
    int r = manifest_load(b->dir_fd, &b->manifest, err);
    if (r != -ENOENT)
        return r;
    r = check_empty(b, err);
    if (r < 0)
        return r;
    r = cli_sync_above(b->dir_fd, b->dir, err);
    if (r < 0)
        return r;
    bool renamed;
    uuid_new(b->manifest.id);
    return manifest_save(b->dir_fd, &b->manifest, &renamed, err);
}

static bool in_manifest(const struct manifest *m, const char *file)
{
    for (size_t i = 0; i < m->n_points; i++)
        for (size_t k = 0; k < m->points[i].n_disks; k++)
            if (strcmp(m->points[i].disks[k].file, file) == 0)
                return true;
    return false;
}

/* A file that a run left which did not get to its manifest: a name such as the next point's files
 * have, with or without ".tmp". */
static bool is_litter(const struct backup *b, const char *name)
{
    const struct manifest_point *last = manifest_last(&b->manifest);
    size_t len = strlen(name);
    mem_autofree char *file = cli_strdup(name);
    if (len > 4 && strcmp(name + len - 4, ".tmp") == 0)
        file[len - 4] = '\0';
    return manifest_is_file_name(file, last ? last->number + 1 : 1) &&
           !in_manifest(&b->manifest, name);
}

static void sweep_dir(struct backup *b)
{
    int fd = dup(b->dir_fd);
    DIR *d = fd < 0 ? NULL : fdopendir(fd);
    if (!d) {
        if (fd >= 0)
            close(fd);
        return; /* litter does no harm: the next file of that name replaces it */
    }
    rewinddir(d);
    for (struct dirent *e; (e = readdir(d));)
        if (is_litter(b, e->d_name))
            unlinkat(b->dir_fd, e->d_name, 0);
    closedir(d);
}

static int create_files(struct backup *b, struct tide_error *err)
{
    for (size_t i = 0; i < b->n; i++) {
        struct backup_disk *d = &b->disks[i];
        d->fd = openat(b->dir_fd, d->tmp, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
        if (d->fd < 0 || ftruncate(d->fd, (off_t)d->size) < 0)
            return tide_fail(err, -errno, "cannot create '%s/%s': %s", b->dir, d->tmp,
                             tide_strerror(errno));
    }
    return 0;
}

/* ---- from the jobs' end to the manifest ---- */

struct scan_progress {
    struct progress p;
    struct progress_line line;
};

static int scan_moved(void *opaque, uint64_t bytes)
{
    struct scan_progress *s = opaque;
    s->line.done += bytes;
    progress_draw(&s->p, &s->line, 1, false);
    return interrupted() ? -EINTR : 0;
}

static int sync_file(const struct backup_disk *d, struct tide_error *err)
{
    if (fsync(d->fd) < 0)
        return tide_fail(err, -errno, "cannot sync '%s': %s", d->tmp, tide_strerror(errno));
    return 0;
}

/* Hashes what was copied. */
static int scan_file(struct backup_disk *d, struct image_watch *watch, struct tide_error *err)
{
    int r = sync_file(d, err); /* before reading: an error of the disk shows here, not after it */
    if (r == 0)
        r = image_scan(d->fd, &d->ranges, watch, &d->extents, &d->n_extents, err);
    if (r < 0)
        return r;
    /* A daemon may have written zeroes as allocated blocks. That the file gets small is nice, not
     * necessary: zeroes they are in any case. */
    for (size_t i = 0; i < d->n_extents; i++)
        if (d->extents[i].zero)
            fallocate(d->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)d->extents[i].off,
                      (off_t)d->extents[i].len);
    return sync_file(d, err);
}

static int scan_files(struct backup *b, struct tide_error *err)
{
    struct scan_progress s = {.line = {.label = "hashing"}};
    struct image_watch watch = {.moved = scan_moved, .opaque = &s};
    progress_start(&s.p, b->c->progress);
    for (size_t i = 0; i < b->n; i++)
        s.line.total += ranges_total(&b->disks[i].ranges);
    int r = 0;
    for (size_t i = 0; r == 0 && i < b->n; i++)
        r = scan_file(&b->disks[i], &watch, err);
    progress_end(&s.p);
    return r;
}

static void fill_point(const struct backup *b, struct manifest_disk *disks,
                       struct manifest_point *point, char time_text[32])
{
    const struct manifest_point *last = manifest_last(&b->manifest);
    bool all_full = true;
    for (size_t i = 0; i < b->n; i++) {
        const struct backup_disk *d = &b->disks[i];
        all_full &= d->full;
        disks[i] = (struct manifest_disk){.name = d->name,
                                          .file = d->file,
                                          .bitmap = d->bitmap,
                                          .size = d->size,
                                          .granularity = b->granularity,
                                          .generation = d->generation,
                                          .has_generation = d->has_generation,
                                          .full = d->full,
                                          .extents = d->extents,
                                          .n_extents = d->n_extents};
    }
    *point = (struct manifest_point){
        .time = time_text, .number = b->number, .disks = disks, .n_disks = b->n};
    memcpy(point->uuid, b->uuid, UUID_SIZE);
    if (last && !all_full)
        memcpy(point->parent, last->uuid, UUID_SIZE);
}

static void time_of_now(char out[32])
{
    time_t now = time(NULL);
    struct tm tm;
    gmtime_r(&now, &tm);
    strftime(out, 32, "%Y-%m-%dT%H:%M:%SZ", &tm);
}

static int rename_files(struct backup *b, struct tide_error *err)
{
    for (size_t i = 0; i < b->n; i++) {
        struct backup_disk *d = &b->disks[i];
        if (renameat(b->dir_fd, d->tmp, b->dir_fd, d->file) < 0)
            return tide_fail(err, -errno, "cannot rename '%s': %s", d->tmp, tide_strerror(errno));
    }
    if (fsync(b->dir_fd) < 0)
        return tide_fail(err, -errno, "cannot sync '%s': %s", b->dir, tide_strerror(errno));
    return 0;
}

/* *decided: the new manifest may be in effect, although there was an error. */
static int commit(struct backup *b, const char *time_text, bool *decided, struct tide_error *err)
{
    char text[32];
    snprintf(text, sizeof text, "%s", time_text);
    struct manifest_disk *disks = cli_alloc(b->n, sizeof *disks);
    struct manifest_point point;
    fill_point(b, disks, &point, text);
    int r = rename_files(b, err);
    if (r == 0) {
        manifest_add(&b->manifest, &point);
        r = manifest_save(b->dir_fd, &b->manifest, decided, err);
    }
    mem_free(disks);
    return r;
}

/* ---- what is printed ---- */

static uint64_t bytes_of(const struct backup_disk *d, bool zero)
{
    uint64_t n = 0;
    for (size_t i = 0; i < d->n_extents; i++)
        n += d->extents[i].zero == zero ? d->extents[i].len : 0;
    return n;
}

static int print_json(const struct backup *b)
{
    const struct manifest_point *p = manifest_last(&b->manifest);
    json_t *disks = cli_pack("[]");
    for (size_t i = 0; i < b->n; i++) {
        const struct backup_disk *d = &b->disks[i];
        json_array_append_new(
            disks, cli_pack("{s:s, s:s, s:s?, s:s, s:I, s:I, s:I, s:s}", "name", d->name, "kind",
                            d->full ? "full" : "incremental", "why-full", d->why, "file", d->file,
                            "size", (json_int_t)d->size, "data", (json_int_t)bytes_of(d, false),
                            "zero", (json_int_t)bytes_of(d, true), "bitmap", d->bitmap));
    }
    return cli_print_json(cli_pack("{s:s, s:I, s:s?, s:s, s:o}", "point", p->uuid, "number",
                                   (json_int_t)p->number, "parent", p->parent[0] ? p->parent : NULL,
                                   "time", p->time, "disks", disks));
}

static int print_result(const struct backup *b)
{
    static const char *const heads[] = {"DISK", "KIND", ">DATA", ">ZERO", "FILE"};
    if (b->c->json)
        return print_json(b);
    struct table t;
    table_init(&t, heads, sizeof heads / sizeof *heads);
    for (size_t i = 0; i < b->n; i++) {
        const struct backup_disk *d = &b->disks[i];
        table_row(&t, d->name, d->full ? "full" : "incremental", size_text(bytes_of(d, false)).s,
                  size_text(bytes_of(d, true)).s, d->file);
    }
    printf("point %" PRIu64 " of %s (%s)\n", b->number, b->dir, b->uuid);
    table_print(&t, stdout, b->c->color, "no disks");
    table_fini(&t);
    return CLI_DONE;
}

static void print_plan(const struct backup *b)
{
    for (size_t i = 0; i < b->n; i++)
        if (b->disks[i].why && !b->c->json)
            fprintf(stderr, "tidemark: disk '%s' is copied in full: %s\n", b->disks[i].name,
                    b->disks[i].why);
}

/* ---- the run ---- */

static int take_options(struct backup *b)
{
    struct cli *c = b->c;
    struct tide_error err;
    const char *granularity = cli_option(c, "granularity"), *speed = cli_option(c, "speed");
    b->dir = cli_option(c, "to");
    b->want_full = cli_option(c, "full");
    b->want_incremental = cli_option(c, "incremental");
    b->stem = cli_option(c, "bitmap") ? cli_option(c, "bitmap") : DEFAULT_STEM;
    b->granularity = DEFAULT_GRANULARITY;
    if (!b->dir || !*b->dir)
        return cli_usage(c, "where to? '--to DIR' is missing");
    if (b->want_full && b->want_incremental)
        return cli_usage(c, "'--full' and '--incremental' exclude each other");
    if (!*b->stem || strlen(b->stem) > STEM_MAX)
        return cli_usage(c, "'--bitmap' takes a name of 1 to %d characters", STEM_MAX);
    if ((granularity && size_parse(granularity, &b->granularity, &err) < 0) ||
        (speed && size_parse(speed, &b->speed, &err) < 0))
        return cli_usage(c, "%s", err.msg);
    b->disks = cli_alloc(c->n_args, sizeof *b->disks);
    for (size_t i = 0; i < c->n_args; i++) {
        for (size_t k = 0; k < i; k++)
            if (strcmp(c->args[i], c->args[k]) == 0)
                return cli_usage(c, "disk '%s' is named twice", c->args[i]);
        b->disks[b->n++] = (struct backup_disk){.name = c->args[i], .fd = -1};
    }
    return CLI_DONE;
}

static int copy(struct backup *b, char time_text[32], struct tide_error *err)
{
    int r = create_files(b, err);
    if (r == 0)
        r = backup_open_targets(b, err);
    if (r == 0)
        r = backup_begin(b, err);
    time_of_now(time_text);
    if (r == 0)
        r = backup_wait(b, err);
    if (r == 0)
        r = backup_collect(b, err);
    if (r == 0)
        r = scan_files(b, err);
    return r;
}

/* Back to where the run began. Not after `decided`: then only the manifest on disk knows which
 * bitmaps are needed, and the next run reads it. */
static void undo(struct backup *b, bool decided)
{
    struct tide_error ignored;
    if (decided)
        return;
    backup_sweep(b, &ignored); /* if the daemon is gone, so is what would be swept */
    sweep_dir(b);
}

static int run(struct backup *b)
{
    struct tide_error err;
    char time_text[32];
    bool decided = false;
    int r = open_dir(b, &err);
    if (r < 0)
        return cli_fail(&err);
    sweep_dir(b);
    interrupts_catch();
    r = backup_sweep(b, &err);
    if (r == 0)
        r = backup_plan(b, &err);
    if (r < 0) {
        int code = cli_fail(&err);
        if (b->want_incremental && r == -EINVAL)
            cli_hint("'--full' begins a new chain; without '--incremental' the tool decides");
        for (size_t i = 0; i < b->n && r == -ENOENT; i++)
            view_hint(b->c->client, b->disks[i].name, NULL);
        return code;
    }
    print_plan(b);
    r = copy(b, time_text, &err);
    size_t n_before = b->manifest.n_points;
    if (r == 0)
        r = commit(b, time_text, &decided, &err);
    if (r < 0) {
        b->manifest.n_points = n_before;
        undo(b, decided);
        return cli_fail(&err);
    }
    /* The point is made. What is left over now, the bitmap of the point before, is litter. */
    if (backup_sweep(b, &err) < 0)
        cli_error("the point is made, but old bitmaps could not be removed: %s", err.msg);
    return print_result(b);
}

int cmd_backup(struct cli *c)
{
    struct backup b = {.c = c, .dir_fd = -1};
    int code = take_options(&b);
    if (code == CLI_DONE)
        code = cli_connect(c);
    if (code == CLI_DONE)
        code = run(&b);
    backup_free(&b);
    return code;
}
