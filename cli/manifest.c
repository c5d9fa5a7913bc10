/* SPDX-License-Identifier: Apache-2.0 */
/* Reading and writing the manifest.
 *
 * A manifest may come from anywhere, so nothing in it is believed before it is checked: file names
 * stay inside the directory, ranges are sorted and inside the disk, a full disk is covered from its
 * first to its last byte, a parent is an older point that has the disk with the same size. What
 * passes here can be restored without further questions about its shape. */
#include "cli/manifest.h"
#include "base/bytes.h"
#include "cli/cli.h"
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#define NAME_MAX_BYTES 31 /* of a node */
#define UUID_START_MIN 4  /* so many characters at least name a point */

static int bad(struct tide_error *err, const char *what)
{
    return tide_fail(err, -EBADMSG, "the manifest is damaged: %s", what);
}

static void *take(struct manifest *m, size_t n, size_t size)
{
    size_t total;
    void *p = __builtin_mul_overflow(n, size, &total) ? NULL : arena_alloc(&m->arena, total);
    if (!p) {
        cli_error("out of memory");
        exit(CLI_FAILED);
    }
    return p;
}

static const char *take_string(struct manifest *m, const char *s)
{
    size_t size = strlen(s) + 1;
    return memcpy(take(m, size, 1), s, size);
}

/* ---- names and ids ---- */

void uuid_new(char out[UUID_SIZE])
{
    unsigned char b[16];
    if (getrandom(b, sizeof b, 0) != (ssize_t)sizeof b) { /* never short for so few bytes */
        cli_error("the system gives no random numbers");
        exit(CLI_FAILED);
    }
    b[6] = (unsigned char)((b[6] & 0x0f) | 0x40); /* version 4: random */
    b[8] = (unsigned char)((b[8] & 0x3f) | 0x80);
    char *p = out;
    for (int i = 0; i < 16; i++) {
        if (i == 4 || i == 6 || i == 8 || i == 10)
            *p++ = '-';
        p += snprintf(p, 3, "%02x", b[i]);
    }
}

bool uuid_is(const char *s)
{
    for (int i = 0; i < UUID_SIZE - 1; i++) {
        bool dash = i == 8 || i == 13 || i == 18 || i == 23;
        if (dash ? s[i] != '-' : !strchr("0123456789abcdef", s[i]) || !s[i])
            return false;
    }
    return s[UUID_SIZE - 1] == '\0';
}

static bool is_name_char(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' ||
           c == '.' || c == '_';
}

/* What may be the name of a node: a letter, then letters, digits and "-._". Such a name is also
 * harmless in a path. */
static bool is_disk_name(const char *s)
{
    size_t len = strlen(s);
    if (len == 0 || len > NAME_MAX_BYTES || !isalpha((unsigned char)s[0]))
        return false;
    for (size_t i = 0; i < len; i++)
        if (!is_name_char(s[i]))
            return false;
    return true;
}

char *manifest_file_name(const char *disk, bool full, uint64_t number)
{
    if (full && number == 1)
        return cli_printf("%s.full.raw", disk);
    return cli_printf("%s.%s-%" PRIu64 ".raw", disk, full ? "full" : "inc", number);
}

/* Takes "DISK.full.raw", "DISK.full-N.raw" and "DISK.inc-N.raw" apart: N, or 0 if it is none. */
static uint64_t file_number(const char *file)
{
    size_t len = strlen(file);
    if (len > 255 || len < 5 || strcmp(file + len - 4, ".raw") != 0)
        return 0;
    char stem[256];
    memcpy(stem, file, len - 4);
    stem[len - 4] = '\0';
    char *kind = strrchr(stem, '.');
    if (!kind)
        return 0;
    *kind++ = '\0';
    if (!is_disk_name(stem))
        return 0;
    if (strcmp(kind, "full") == 0)
        return 1;
    const char *digits = strncmp(kind, "full-", 5) == 0  ? kind + 5
                         : strncmp(kind, "inc-", 4) == 0 ? kind + 4
                                                         : "";
    size_t n = strlen(digits);
    if (n == 0 || n > 18 || strspn(digits, "0123456789") != n || digits[0] == '0')
        return 0;
    return strtoull(digits, NULL, 10);
}

bool manifest_is_file_name(const char *file, uint64_t number)
{
    uint64_t n = file_number(file);
    return n > 0 && n >= number;
}

/* ---- reading ---- */

static int read_string(json_t *o, const char *key, const char **out, struct tide_error *err)
{
    json_t *v = json_object_get(o, key);
    if (!json_is_string(v) || json_string_length(v) != strlen(json_string_value(v)))
        return tide_fail(err, -EBADMSG, "the manifest is damaged: '%s' is missing or no string",
                         key);
    *out = json_string_value(v);
    return 0;
}

static int read_number(json_t *o, const char *key, uint64_t *out, struct tide_error *err)
{
    json_t *v = json_object_get(o, key);
    if (!json_is_integer(v) || json_integer_value(v) < 0)
        return tide_fail(err, -EBADMSG, "the manifest is damaged: '%s' is missing or no size", key);
    *out = (uint64_t)json_integer_value(v);
    return 0;
}

static int read_uuid(json_t *o, const char *key, char out[UUID_SIZE], struct tide_error *err)
{
    const char *s = "";
    int r = read_string(o, key, &s, err);
    if (r < 0)
        return r;
    if (!uuid_is(s))
        return tide_fail(err, -EBADMSG, "the manifest is damaged: '%s' is no uuid", key);
    memcpy(out, s, UUID_SIZE);
    return 0;
}

static bool parse_hash(const char *s, uint64_t *hash)
{
    if (!s || strlen(s) != 16 || strspn(s, "0123456789abcdef") != 16)
        return false;
    *hash = strtoull(s, NULL, 16);
    return true;
}

/* One of "ranges": [offset, length, "zero"] or [offset, length, "data", hash]. */
static bool read_extent(json_t *v, struct extent *e)
{
    json_t *off = json_array_get(v, 0), *len = json_array_get(v, 1);
    const char *kind = json_string_value(json_array_get(v, 2));
    if (!json_is_integer(off) || !json_is_integer(len) || !kind)
        return false;
    if (json_integer_value(off) < 0 || json_integer_value(len) <= 0)
        return false;
    *e = (struct extent){.off = (uint64_t)json_integer_value(off),
                         .len = (uint64_t)json_integer_value(len)};
    e->zero = strcmp(kind, "zero") == 0;
    if (e->zero)
        return json_array_size(v) == 3;
    return strcmp(kind, "data") == 0 && json_array_size(v) == 4 &&
           parse_hash(json_string_value(json_array_get(v, 3)), &e->hash);
}

static int read_extents(json_t *list, struct manifest *m, struct manifest_disk *d,
                        struct tide_error *err)
{
    if (!json_is_array(list))
        return bad(err, "'ranges' is missing or no list");
    d->n_extents = json_array_size(list);
    d->extents = take(m, d->n_extents, sizeof *d->extents);
    uint64_t end = 0;
    for (size_t i = 0; i < d->n_extents; i++) {
        struct extent *e = &d->extents[i];
        if (!read_extent(json_array_get(list, i), e))
            return tide_fail(err, -EBADMSG,
                             "the manifest is damaged: range %zu of '%s' is malformed", i, d->file);
        if (e->off < end || !range_in(e->off, e->len, d->size))
            return tide_fail(err, -EBADMSG,
                             "the manifest is damaged: range %zu of '%s' overlaps another one or "
                             "lies outside the disk",
                             i, d->file);
        if (d->full && e->off != end)
            return tide_fail(err, -EBADMSG,
                             "the manifest is damaged: '%s' is full but has a gap before range %zu",
                             d->file, i);
        end = e->off + e->len;
    }
    if (d->full && end != d->size)
        return tide_fail(err, -EBADMSG, "the manifest is damaged: '%s' is full but ends early",
                         d->file);
    return 0;
}

static int read_disk_names(json_t *v, struct manifest *m, struct manifest_disk *d,
                           struct tide_error *err)
{
    const char *format = "", *kind = "";
    int r = read_string(v, "name", &d->name, err);
    if (r == 0)
        r = read_string(v, "file", &d->file, err);
    if (r == 0)
        r = read_string(v, "bitmap", &d->bitmap, err);
    if (r == 0)
        r = read_string(v, "format", &format, err);
    if (r == 0)
        r = read_string(v, "kind", &kind, err);
    if (r < 0)
        return r;
    if (!is_disk_name(d->name))
        return bad(err, "a disk's name has characters that no name may have");
    if (!file_number(d->file))
        return bad(err, "a file's name is not of the form DISK.full.raw or DISK.inc-N.raw");
    if (strcmp(format, "raw") != 0)
        return tide_fail(err, -EBADMSG, "'%s' has format '%s', which this version cannot read",
                         d->file, format);
    d->full = strcmp(kind, "full") == 0;
    if (!d->full && strcmp(kind, "incremental") != 0)
        return bad(err, "'kind' is neither \"full\" nor \"incremental\"");
    d->name = take_string(m, d->name);
    d->file = take_string(m, d->file);
    d->bitmap = take_string(m, d->bitmap);
    return 0;
}

static int read_disk(json_t *v, struct manifest *m, struct manifest_disk *d, struct tide_error *err)
{
    int r = read_disk_names(v, m, d, err);
    if (r == 0)
        r = read_number(v, "size", &d->size, err);
    if (r == 0)
        r = read_number(v, "granularity", &d->granularity, err);
    d->has_generation = json_object_get(v, "generation");
    if (r == 0 && d->has_generation)
        r = read_number(v, "generation", &d->generation, err);
    if (r < 0)
        return r;
    if (!is_pow2(d->granularity))
        return bad(err, "'granularity' is no power of two");
    return read_extents(json_object_get(v, "ranges"), m, d, err);
}

/* An incremental disk builds on the same disk of the parent. */
static int check_disk_parent(const struct manifest *m, const struct manifest_point *p,
                             const struct manifest_disk *d, struct tide_error *err)
{
    if (d->full)
        return 0;
    const struct manifest_point *parent = p->parent[0] ? manifest_find(m, p->parent) : NULL;
    const struct manifest_disk *below = parent ? manifest_disk(parent, d->name) : NULL;
    if (!below)
        return tide_fail(err, -EBADMSG,
                         "the manifest is damaged: '%s' builds on a point that is not there",
                         d->file);
    if (below->size != d->size)
        return tide_fail(err, -EBADMSG,
                         "the manifest is damaged: '%s' builds on a disk of another size", d->file);
    return 0;
}

static bool file_is_taken(const struct manifest *m, size_t n_points, const char *file)
{
    for (size_t i = 0; i < n_points; i++)
        for (size_t j = 0; j < m->points[i].n_disks; j++)
            if (m->points[i].disks[j].file && strcmp(m->points[i].disks[j].file, file) == 0)
                return true;
    return false;
}

static int read_disks(json_t *list, struct manifest *m, struct manifest_point *p,
                      struct tide_error *err)
{
    if (json_array_size(list) == 0)
        return bad(err, "a point without disks");
    size_t n = json_array_size(list);
    p->disks = take(m, n, sizeof *p->disks);
    for (size_t i = 0; i < n; i++) {
        struct manifest_disk d = {0};
        int r = read_disk(json_array_get(list, i), m, &d, err);
        if (r < 0)
            return r;
        if (manifest_disk(p, d.name))
            return bad(err, "a point has one disk twice");
        if (file_is_taken(m, m->n_points + 1, d.file) || file_number(d.file) != p->number)
            return bad(err, "a file that belongs to another point");
        r = check_disk_parent(m, p, &d, err);
        if (r < 0)
            return r;
        p->disks[p->n_disks++] = d;
    }
    return 0;
}

static int read_point(json_t *v, struct manifest *m, struct tide_error *err)
{
    struct manifest_point *p = &m->points[m->n_points];
    int r = read_uuid(v, "uuid", p->uuid, err);
    if (r == 0 && !json_is_null(json_object_get(v, "parent")))
        r = read_uuid(v, "parent", p->parent, err);
    if (r == 0)
        r = read_string(v, "time", &p->time, err);
    if (r == 0)
        r = read_number(v, "number", &p->number, err);
    if (r < 0)
        return r;
    p->time = take_string(m, p->time);
    if (manifest_find(m, p->uuid))
        return bad(err, "two points have one uuid");
    const struct manifest_point *last = manifest_last(m);
    if (p->number <= (last ? last->number : 0) || p->number > 999999999999)
        return bad(err, "the numbers of the points do not grow");
    if (p->parent[0] && !manifest_find(m, p->parent))
        return bad(err, "a point's parent is missing, or comes after it");
    r = read_disks(json_object_get(v, "disks"), m, p, err);
    m->n_points += r == 0;
    return r;
}

/* Of the points as JSON in the one form that everybody can make again. */
static uint64_t checksum(json_t *points)
{
    char *text = json_dumps(points, JSON_COMPACT | JSON_SORT_KEYS);
    if (!text) {
        cli_error("out of memory");
        exit(CLI_FAILED);
    }
    uint64_t sum = XXH3_64bits(text, strlen(text));
    free(text);
    return sum;
}

static int read_head(json_t *value, struct manifest *m, struct tide_error *err)
{
    uint64_t version = 0, sum;
    int r = read_number(value, "version", &version, err);
    if (r < 0)
        return r;
    if (version != MANIFEST_VERSION)
        return tide_fail(err, -EBADMSG,
                         "the manifest has format version %" PRIu64 ", this tool reads version %d",
                         version, MANIFEST_VERSION);
    r = read_uuid(value, "id", m->id, err);
    if (r < 0)
        return r;
    if (!json_is_array(json_object_get(value, "points")))
        return bad(err, "'points' is missing or no list");
    if (!parse_hash(json_string_value(json_object_get(value, "checksum")), &sum) ||
        sum != checksum(json_object_get(value, "points")))
        return bad(err, "its checksum does not fit");
    return 0;
}

int manifest_parse(json_t *value, struct manifest *m, struct tide_error *err)
{
    *m = (struct manifest){0};
    int r = read_head(value, m, err);
    json_t *points = json_object_get(value, "points");
    if (r == 0)
        m->points = take(m, json_array_size(points), sizeof *m->points);
    for (size_t i = 0; r == 0 && i < json_array_size(points); i++)
        r = read_point(json_array_get(points, i), m, err);
    if (r < 0)
        manifest_fini(m);
    return r;
}

int manifest_open_file(int dir_fd, const char *file, struct stat *st, struct tide_error *err)
{
    /* Not blocking: the open of a FIFO would wait for a writer that never comes. */
    int fd = openat(dir_fd, file, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0)
        return tide_fail(err, -errno, "cannot open '%s': %s", file, tide_strerror(errno));
    int r = fstat(fd, st) < 0
                ? tide_fail(err, -errno, "cannot look at '%s': %s", file, tide_strerror(errno))
            : !S_ISREG(st->st_mode) ? tide_fail(err, -EBADMSG, "'%s' is no regular file", file)
                                    : 0;
    if (r < 0) {
        close(fd);
        return r;
    }
    return fd;
}

int manifest_load(int dir_fd, struct manifest *m, struct tide_error *err)
{
    struct stat st;
    int fd = manifest_open_file(dir_fd, MANIFEST_FILE, &st, err);
    if (fd < 0)
        return fd;
    FILE *f = fdopen(fd, "r"); /* jansson reads a descriptor byte by byte */
    if (!f) {
        close(fd);
        return tide_fail(err, -ENOMEM, "no memory for reading '%s'", MANIFEST_FILE);
    }
    json_error_t why;
    json_t *value = json_loadf(f, JSON_REJECT_DUPLICATES, &why);
    fclose(f);
    if (!value)
        return tide_fail(err, -EBADMSG, "the manifest is damaged: line %d: %s", why.line, why.text);
    int r = manifest_parse(value, m, err);
    json_decref(value);
    return r;
}

void manifest_fini(struct manifest *m)
{
    arena_free(&m->arena);
    *m = (struct manifest){0};
}

/* ---- writing ---- */

static json_t *format_extents(const struct manifest_disk *d)
{
    json_t *list = cli_pack("[]");
    for (size_t i = 0; i < d->n_extents; i++) {
        const struct extent *e = &d->extents[i];
        char hash[17];
        snprintf(hash, sizeof hash, "%016" PRIx64, e->hash);
        json_t *v = cli_pack("[I, I, s]", (json_int_t)e->off, (json_int_t)e->len,
                             e->zero ? "zero" : "data");
        if (!e->zero)
            json_array_append_new(v, cli_pack("s", hash));
        json_array_append_new(list, v);
    }
    return list;
}

static json_t *format_point(const struct manifest_point *p)
{
    json_t *disks = cli_pack("[]");
    for (size_t i = 0; i < p->n_disks; i++) {
        const struct manifest_disk *d = &p->disks[i];
        json_t *v = cli_pack("{s:s, s:s, s:I, s:s, s:s, s:s, s:I, s:o}", "name", d->name, "kind",
                             d->full ? "full" : "incremental", "size", (json_int_t)d->size,
                             "format", "raw", "file", d->file, "bitmap", d->bitmap, "granularity",
                             (json_int_t)d->granularity, "ranges", format_extents(d));
        if (d->has_generation)
            json_object_set_new(v, "generation", cli_pack("I", (json_int_t)d->generation));
        json_array_append_new(disks, v);
    }
    return cli_pack("{s:s, s:s?, s:I, s:s, s:o}", "uuid", p->uuid, "parent",
                    p->parent[0] ? p->parent : NULL, "number", (json_int_t)p->number, "time",
                    p->time, "disks", disks);
}

json_t *manifest_format(const struct manifest *m)
{
    json_t *points = cli_pack("[]");
    for (size_t i = 0; i < m->n_points; i++)
        json_array_append_new(points, format_point(&m->points[i]));
    char sum[17];
    snprintf(sum, sizeof sum, "%016" PRIx64, checksum(points));
    return cli_pack("{s:i, s:s, s:s, s:o}", "version", MANIFEST_VERSION, "id", m->id, "checksum",
                    sum, "points", points);
}

#define MANIFEST_TMP MANIFEST_FILE ".tmp"

static int write_tmp(int dir_fd, const struct manifest *m, struct tide_error *err)
{
    unlinkat(dir_fd, MANIFEST_TMP, 0);
    int fd = openat(dir_fd, MANIFEST_TMP, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    FILE *f = fd < 0 ? NULL : fdopen(fd, "w"); /* jansson writes every token by itself */
    if (!f) {
        tide_fail(err, -errno, "cannot create '%s': %s", MANIFEST_TMP, tide_strerror(errno));
        if (fd >= 0)
            close(fd);
        return err->code;
    }
    json_t *value = manifest_format(m);
    errno = EIO;
    bool failed = json_dumpf(value, f, JSON_COMPACT) < 0 || fputc('\n', f) == EOF ||
                  fflush(f) != 0 || fsync(fd) < 0;
    int errnum = errno;
    failed |= fclose(f) != 0;
    json_decref(value);
    if (!failed)
        return 0;
    unlinkat(dir_fd, MANIFEST_TMP, 0);
    return tide_fail(err, -errnum, "cannot write '%s': %s", MANIFEST_TMP, tide_strerror(errnum));
}

int manifest_save(int dir_fd, const struct manifest *m, bool *renamed, struct tide_error *err)
{
    *renamed = false;
    int r = write_tmp(dir_fd, m, err);
    if (r < 0)
        return r;
    /* A rename that fails may still have happened on a file system that lives elsewhere. */
    *renamed = true;
    if (renameat(dir_fd, MANIFEST_TMP, dir_fd, MANIFEST_FILE) < 0)
        return tide_fail(err, -errno, "cannot rename '%s': %s", MANIFEST_TMP, tide_strerror(errno));
    if (fsync(dir_fd) < 0)
        return tide_fail(err, -errno, "cannot sync the directory: %s", tide_strerror(errno));
    return 0;
}

void manifest_add(struct manifest *m, const struct manifest_point *point)
{
    struct manifest_point *points = take(m, m->n_points + 1, sizeof *points);
    if (m->n_points)
        memcpy(points, m->points, m->n_points * sizeof *points);
    m->points = points;
    struct manifest_point *p = &points[m->n_points++];
    *p = *point;
    p->time = take_string(m, point->time);
    p->disks = take(m, p->n_disks, sizeof *p->disks);
    for (size_t i = 0; i < p->n_disks; i++) {
        struct manifest_disk *d = &p->disks[i];
        *d = point->disks[i];
        d->name = take_string(m, d->name);
        d->file = take_string(m, d->file);
        d->bitmap = take_string(m, d->bitmap);
        d->extents = take(m, d->n_extents, sizeof *d->extents);
        if (d->n_extents)
            memcpy(d->extents, point->disks[i].extents, d->n_extents * sizeof *d->extents);
    }
}

/* ---- looking up ---- */

const struct manifest_point *manifest_last(const struct manifest *m)
{
    return m->n_points ? &m->points[m->n_points - 1] : NULL;
}

const struct manifest_point *manifest_find(const struct manifest *m, const char *uuid)
{
    for (size_t i = 0; i < m->n_points; i++)
        if (strcmp(m->points[i].uuid, uuid) == 0)
            return &m->points[i];
    return NULL;
}

const struct manifest_disk *manifest_disk(const struct manifest_point *p, const char *name)
{
    for (size_t i = 0; i < p->n_disks; i++)
        if (strcmp(p->disks[i].name, name) == 0)
            return &p->disks[i];
    return NULL;
}

static const struct manifest_point *find_number(const struct manifest *m, const char *text)
{
    for (size_t i = 0; i < m->n_points; i++) {
        char number[24];
        snprintf(number, sizeof number, "%" PRIu64, m->points[i].number);
        if (strcmp(number, text) == 0)
            return &m->points[i];
    }
    return NULL;
}

int manifest_choose(const struct manifest *m, const char *text, const struct manifest_point **out,
                    struct tide_error *err)
{
    if (m->n_points == 0)
        return tide_fail(err, -ENOENT, "the directory holds no point yet");
    *out = strcmp(text, "latest") == 0 ? manifest_last(m) : find_number(m, text);
    if (*out)
        return 0;
    for (size_t i = 0; i < m->n_points && strlen(text) >= UUID_START_MIN; i++) {
        if (strncmp(m->points[i].uuid, text, strlen(text)) != 0)
            continue;
        if (*out)
            return tide_fail(err, -EINVAL, "'%s' fits more than one point", text);
        *out = &m->points[i];
    }
    return *out ? 0 : tide_fail(err, -ENOENT, "there is no point '%s'", text);
}
