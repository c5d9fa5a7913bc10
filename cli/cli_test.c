/* SPDX-License-Identifier: Apache-2.0 */
/* Tests of what the tool is made of: sizes, tables, maps, manifests, the files of a backup, and the
 * QMP client against a server in the same process. */
#include "base/bytes.h"
#include "base/mem.h"
#include "cli/backup.h"
#include "cli/cli.h"
#include "cli/image.h"
#include "cli/manifest.h"
#include "cli/ranges.h"
#include "cli/size.h"
#include "cli/table.h"
#include "cli/view.h"
#include "lib/client.h"
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>
#include <xxhash.h>

#include <cmocka.h>

#define TEST(name) static void name(void **state)

/* ---- sizes ---- */

TEST(size_reads_units)
{
    static const struct {
        const char *text;
        uint64_t size;
    } good[] = {{"0", 0},         {"4096", 4096},
                {"64K", 65536},   {"64k", 65536},
                {"64KiB", 65536}, {"64KB", 65536},
                {"3M", 3 * MIB},  {"10G", 10 * GIB},
                {"2T", 2 * TIB},  {"7E", (uint64_t)7 << 60},
                {"512B", 512},    {"9223372036854775807", INT64_MAX}};
    struct tide_error err;
    uint64_t size;
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        assert_int_equal(size_parse(good[i].text, &size, &err), 0);
        assert_true(size == good[i].size);
    }
}

TEST(size_refuses)
{
    static const char *const bad[] = {"",     "K",   "-1",   " 1",   "1 K",
                                      "1.5G", "64Q", "64KK", "0x10", "1Ki"};
    static const char *const large[] = {"8E", "9223372036854775808", "99999999999999999999999",
                                        "99999999999999E", "18446744073709551616"};
    struct tide_error err;
    uint64_t size;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_int_equal(size_parse(bad[i], &size, &err), -EINVAL);
    for (size_t i = 0; i < sizeof large / sizeof *large; i++)
        assert_int_equal(size_parse(large[i], &size, &err), -ERANGE);
}

TEST(size_is_written)
{
    assert_string_equal(size_text(0).s, "0 B");
    assert_string_equal(size_text(1023).s, "1023 B");
    assert_string_equal(size_text(1024).s, "1 KiB");
    assert_string_equal(size_text(1536).s, "1.5 KiB");
    assert_string_equal(size_text(GIB - 1).s, "1023.9 MiB");
    assert_string_equal(size_text(UINT64_MAX).s, "15.9 EiB");
}

/* ---- tables and words ---- */

/* What `draw` writes, in a string that the caller frees with free(). */
#define CAPTURE(text, draw)                                                                        \
    do {                                                                                           \
        size_t len_;                                                                               \
        FILE *out = open_memstream(&(text), &len_);                                                \
        assert_non_null(out);                                                                      \
        draw;                                                                                      \
        fclose(out);                                                                               \
    } while (0)

TEST(table_aligns)
{
    static const char *const heads[] = {"NAME", ">SIZE", "FILE"};
    struct table t;
    char *text;
    table_init(&t, heads, 3);
    table_row(&t, "disk1", "1 KiB", "a");
    table_row(&t, "ä", "100 KiB", "longer");
    CAPTURE(text, table_print(&t, out, false, "none"));
    assert_string_equal(text, "NAME      SIZE  FILE\n"
                              "disk1    1 KiB  a\n"
                              "ä      100 KiB  longer\n");
    free(text);
    CAPTURE(text, table_print(&t, out, true, "none"));
    assert_memory_equal(text, "\033[1mNAME", 8);
    free(text);
    table_fini(&t);
}

TEST(table_without_rows)
{
    static const char *const heads[] = {"NAME"};
    struct table t;
    char *text;
    table_init(&t, heads, 1);
    CAPTURE(text, table_print(&t, out, false, "no bitmaps"));
    assert_string_equal(text, "no bitmaps\n");
    free(text);
    table_fini(&t);
}

TEST(names_cannot_steer_a_terminal)
{
    char text[] = "a\033[2J\n\x7f\xc2\x9b"
                  "ä";
    assert_string_equal(text_clean(text), "a?[2J????ä");
}

TEST(distance_counts_letters)
{
    assert_int_equal(text_distance("", ""), 0);
    assert_int_equal(text_distance("bitmap", "bitmpa"), 2);
    assert_int_equal(text_distance("disk1", "disk"), 1);
    assert_int_equal(text_distance("abc", "xyz"), 3);
    char longer[100];
    memset(longer, 'a', sizeof longer - 1);
    longer[sizeof longer - 1] = '\0';
    assert_int_equal(text_distance("a", longer), 99);
}

/* ---- ranges and their map ---- */

TEST(ranges_join_and_refuse)
{
    struct ranges r = {0};
    assert_true(ranges_add(&r, 10, 10));
    assert_true(ranges_add(&r, 20, 5)); /* touches: joined */
    assert_true(ranges_add(&r, 30, 1));
    assert_int_equal(r.n, 2);
    assert_int_equal(ranges_total(&r), 16);
    assert_false(ranges_add(&r, 30, 1)); /* overlaps */
    assert_false(ranges_add(&r, 0, 1));  /* goes back */
    assert_false(ranges_add(&r, 40, 0));
    assert_false(ranges_add(&r, UINT64_MAX - 1, 5));
    assert_false(ranges_add(&r, 40, INT64_MAX));
    size_t from = 0;
    assert_int_equal(ranges_in(&r, 0, 12, &from), 2);
    assert_int_equal(ranges_in(&r, 12, 19, &from), 14);
    assert_int_equal(ranges_in(&r, 31, 100, &from), 0);
    ranges_clip(&r, 30);
    assert_int_equal(ranges_total(&r), 15);
    ranges_clip(&r, 12);
    assert_int_equal(ranges_total(&r), 2);
    ranges_clip(&r, 0);
    assert_int_equal(r.n, 0);
    ranges_fini(&r);
}

TEST(map_draws)
{
    struct ranges r = {0};
    char *text;
    ranges_add(&r, 0, 10 * KIB);       /* one cell full */
    ranges_add(&r, 20 * KIB, 1 * KIB); /* a tenth of a cell */
    ranges_add(&r, 99 * KIB, 1 * KIB);
    CAPTURE(text, ranges_draw(&r, 100 * KIB, 1 * KIB, 20, 1, true, out));
    assert_string_equal(text, "        0 B |#.-......-|\n");
    free(text);
    CAPTURE(text, ranges_draw(&r, 100 * KIB, 1 * KIB, 20, 1, false, out));
    assert_string_equal(text, "        0 B │█·░······░│\n");
    free(text);
    ranges_fini(&r);
}

/* One dirty granule of a huge disk still shows; one clean granule never looks full. */
TEST(map_keeps_its_promises)
{
    struct ranges r = {0};
    char *text;
    ranges_add(&r, INT64_MAX / 2, 512);
    CAPTURE(text, ranges_draw(&r, INT64_MAX, 512, 80, 8, true, out));
    assert_non_null(strchr(text, '-'));
    assert_null(strchr(text, '#'));
    free(text);
    ranges_fini(&r);
    ranges_add(&r, 0, TIB - 512);
    CAPTURE(text, ranges_draw(&r, TIB, 512, 80, 1, true, out));
    assert_string_equal(strchr(text, '*'), "*|\n");
    free(text);
    ranges_fini(&r);
}

TEST(map_of_small_disks)
{
    struct ranges r = {0};
    char *text;
    CAPTURE(text, ranges_draw(&r, 0, 512, 80, 8, true, out));
    assert_string_equal(text, "");
    free(text);
    ranges_add(&r, 0, 100);
    CAPTURE(text, ranges_draw(&r, 100, 65536, 20, 8, true, out)); /* less than one granule */
    assert_string_equal(text, "        0 B |#         |\n");
    free(text);
    ranges_fini(&r);
}

/* ---- manifests ---- */

#define ID "00000000-0000-4000-8000-00000000000a"
#define P1 "11111111-1111-4111-8111-111111111111"
#define P2 "22222222-2222-4222-8222-222222222222"

/* Two points of a disk of 1 MiB. */
static struct extent full_ranges[] = {{0, 65536, 0x1234, false}, {65536, 983040, 0, true}};
static struct extent inc_ranges[] = {{131072, 65536, 0xfedcba9876543210, false},
                                     {262144, 65536, 0, true}};

static void make(struct manifest *m)
{
    struct manifest_disk full = {.name = "disk1",
                                 .file = "disk1.full.raw",
                                 .bitmap = "b-1",
                                 .size = MIB,
                                 .granularity = 65536,
                                 .full = true,
                                 .extents = full_ranges,
                                 .n_extents = 2};
    struct manifest_disk inc = full;
    inc.file = "disk1.inc-2.raw";
    inc.bitmap = "b-2";
    inc.full = false;
    inc.extents = inc_ranges;
    struct manifest_point p = {
        .time = "2026-01-31T12:00:00Z", .number = 1, .disks = &full, .n_disks = 1};
    *m = (struct manifest){0};
    memcpy(m->id, ID, UUID_SIZE);
    memcpy(p.uuid, P1, UUID_SIZE);
    manifest_add(m, &p);
    memcpy(p.uuid, P2, UUID_SIZE);
    memcpy(p.parent, P1, UUID_SIZE);
    p.number = 2;
    p.disks = &inc;
    manifest_add(m, &p);
}

static json_t *make_json(void)
{
    struct manifest m;
    make(&m);
    json_t *v = manifest_format(&m);
    manifest_fini(&m);
    return v;
}

TEST(manifest_round_trip)
{
    struct manifest m;
    struct tide_error err;
    json_t *v = make_json();
    assert_int_equal(manifest_parse(v, &m, &err), 0);
    assert_string_equal(m.id, ID);
    assert_int_equal(m.n_points, 2);
    assert_string_equal(m.points[1].parent, P1);
    assert_string_equal(m.points[0].parent, "");
    const struct manifest_disk *d = manifest_disk(&m.points[1], "disk1");
    assert_non_null(d);
    assert_false(d->full);
    assert_int_equal(d->n_extents, 2);
    assert_true(d->extents[0].hash == 0xfedcba9876543210);
    assert_true(d->extents[1].zero);
    json_t *again = manifest_format(&m);
    assert_true(json_equal(v, again));
    json_decref(again);
    json_decref(v);
    manifest_fini(&m);
}

static uint64_t sum_of(json_t *points)
{
    char *text = json_dumps(points, JSON_COMPACT | JSON_SORT_KEYS);
    uint64_t sum = XXH3_64bits(text, strlen(text));
    free(text);
    return sum;
}

/* Puts `value` at a place of a good manifest and gives it a checksum that fits: the reader shall
 * refuse it for what it says, and name the reason. */
static void refuse(const char *path, json_t *value, const char *reason)
{
    struct manifest m;
    struct tide_error err;
    json_t *v = make_json(), *at = v;
    char copy[100];
    snprintf(copy, sizeof copy, "%s", path);
    char *save, *word = strtok_r(copy, ".", &save), *next;
    for (; (next = strtok_r(NULL, ".", &save)); word = next)
        at = json_is_array(at) ? json_array_get(at, (size_t)atoi(word)) : json_object_get(at, word);
    if (!value)
        json_object_del(at, word);
    else if (json_is_array(at))
        json_array_set_new(at, (size_t)atoi(word), value);
    else
        json_object_set_new(at, word, value);
    char sum[17];
    snprintf(sum, sizeof sum, "%016llx", (unsigned long long)sum_of(json_object_get(v, "points")));
    if (strcmp(path, "checksum") != 0)
        json_object_set_new(v, "checksum", json_string(sum));
    assert_int_equal(manifest_parse(v, &m, &err), -EBADMSG);
    if (!strstr(err.msg, reason))
        fail_msg("%s: '%s' does not say '%s'", path, err.msg, reason);
    json_decref(v);
}

TEST(manifest_refuses_hostile_names)
{
    static const char *const names[] = {"../x.inc-2.raw",
                                        "/etc/x.inc-2.raw",
                                        "a/b.inc-2.raw",
                                        ".hidden.inc-2.raw",
                                        "..",
                                        "disk1.inc-2.qcow2",
                                        "disk1.inc-02.raw",
                                        "disk1.inc-.raw",
                                        ".raw",
                                        "",
                                        "disk1.inc-2.raw\nx",
                                        "disk1.inc-9999999999999999999.raw"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        refuse("points.1.disks.0.file", json_string(names[i]), "file's name");
    refuse("points.1.disks.0.file", json_string("disk1.inc-3.raw"), "another point");
    refuse("points.1.disks.0.file", json_string("disk1.full.raw"), "another point");
    refuse("points.1.disks.0.name", json_string("../disk1"), "disk's name");
    refuse("points.1.disks.0.name", json_string(""), "disk's name");
    refuse("points.1.disks.0.name", json_integer(1), "'name'");
    refuse("points.1.disks.0.name", json_stringn("a\0b", 3), "'name'");
}

TEST(manifest_refuses_hostile_ranges)
{
    const char *where = "points.1.disks.0.ranges";
    refuse(where, NULL, "'ranges'");
    refuse(where, json_pack("[[i,i,s],[i,i,s]]", 0, 65536, "zero", 65535, 1, "zero"), "overlaps");
    refuse(where, json_pack("[[i,i,s],[i,i,s]]", 65536, 1, "zero", 0, 1, "zero"), "overlaps");
    refuse(where, json_pack("[[i,i,s]]", 1048576, 1, "zero"), "outside");
    refuse(where, json_pack("[[i,I,s]]", 1, (json_int_t)INT64_MAX, "zero"), "outside");
    refuse(where, json_pack("[[I,I,s]]", (json_int_t)INT64_MAX, (json_int_t)INT64_MAX, "zero"),
           "outside");
    refuse(where, json_pack("[[i,i,s]]", -1, 1, "zero"), "malformed");
    refuse(where, json_pack("[[i,i,s]]", 0, 0, "zero"), "malformed");
    refuse(where, json_pack("[[i,i,s]]", 0, 1, "data"), "malformed"); /* no hash */
    refuse(where, json_pack("[[i,i,s,s]]", 0, 1, "data", "123"), "malformed");
    refuse(where, json_pack("[[i,i,s,s]]", 0, 1, "data", "123456789ABCDEF0"), "malformed");
    refuse(where, json_pack("[[i,i,s,s]]", 0, 1, "zero", "123456789abcdef0"), "malformed");
    refuse(where, json_pack("[[i,i,s]]", 0, 1, "other"), "malformed");
    refuse(where, json_pack("[{}, i]", 3), "malformed");
    where = "points.0.disks.0.ranges"; /* a full disk has no gaps */
    refuse(where, json_pack("[]"), "ends early");
    refuse(where, json_pack("[[i,i,s]]", 0, 65536, "zero"), "ends early");
    refuse(where, json_pack("[[i,i,s]]", 512, 1048064, "zero"), "gap");
}

TEST(manifest_refuses_wrong_chains)
{
    refuse("points.1.parent", json_null(), "not there");
    refuse("points.1.parent", json_string(P2), "parent");
    refuse("points.1.parent", json_string(ID), "parent");
    refuse("points.1.parent", json_string("x"), "'parent'");
    refuse("points.1.parent", NULL, "'parent'");
    refuse("points.0.parent", json_string(P2), "parent"); /* a loop */
    refuse("points.1.uuid", json_string(P1), "one uuid");
    refuse("points.1.number", json_integer(1), "grow");
    refuse("points.0.number", json_integer(0), "grow");
    refuse("points.1.disks.0.size", json_integer(2097152), "another size");
    refuse("points.0.disks.0.kind", json_string("incremental"), "not there");
    refuse("points.1.disks", json_array(), "without disks");
    refuse("points.1.disks", NULL, "without disks");
}

/* Manifests of older tools, and of daemons that do not tell, have no generation. */
TEST(manifest_keeps_generations)
{
    struct manifest m, again;
    struct tide_error err;
    make(&m);
    m.points[1].disks[0].generation = 7;
    m.points[1].disks[0].has_generation = true;
    json_t *v = manifest_format(&m);
    assert_int_equal(manifest_parse(v, &again, &err), 0);
    assert_false(again.points[0].disks[0].has_generation);
    assert_true(again.points[1].disks[0].has_generation);
    assert_int_equal(again.points[1].disks[0].generation, 7);
    json_decref(v);
    manifest_fini(&m);
    manifest_fini(&again);
    refuse("points.1.disks.0.generation", json_integer(-1), "'generation'");
    refuse("points.1.disks.0.generation", json_string("7"), "'generation'");
    refuse("points.1.disks.0.generation", json_null(), "'generation'");
}

TEST(manifest_refuses_other_damage)
{
    refuse("version", json_integer(2), "version 2");
    refuse("version", json_string("1"), "'version'");
    refuse("id", json_string("no-uuid"), "'id'");
    refuse("points", json_object(), "'points'");
    refuse("checksum", json_string("0000000000000000"), "checksum");
    refuse("checksum", NULL, "checksum");
    refuse("points.0.disks.0.format", json_string("qcow2"), "qcow2");
    refuse("points.0.disks.0.kind", json_string("partial"), "'kind'");
    refuse("points.0.disks.0.size", json_integer(-1), "'size'");
    refuse("points.0.disks.0.granularity", json_integer(3), "'granularity'");
    refuse("points.0", json_integer(3), "'uuid'");
}

TEST(manifest_file_names)
{
    char *first = manifest_file_name("disk1", true, 1), *full = manifest_file_name("a.b", true, 7),
         *inc = manifest_file_name("disk1", false, 12);
    assert_string_equal(first, "disk1.full.raw");
    assert_string_equal(full, "a.b.full-7.raw");
    assert_string_equal(inc, "disk1.inc-12.raw");
    assert_true(manifest_is_file_name(inc, 12));
    assert_true(manifest_is_file_name(inc, 1));
    assert_false(manifest_is_file_name(inc, 13));
    assert_true(manifest_is_file_name(first, 1));
    assert_false(manifest_is_file_name(first, 2));
    assert_false(manifest_is_file_name("holiday.raw", 1));
    assert_false(manifest_is_file_name("manifest.json", 1));
    mem_free(first);
    mem_free(full);
    mem_free(inc);
}

TEST(points_are_chosen)
{
    struct manifest m;
    struct tide_error err;
    const struct manifest_point *p;
    make(&m);
    assert_int_equal(manifest_choose(&m, "latest", &p, &err), 0);
    assert_int_equal(p->number, 2);
    assert_int_equal(manifest_choose(&m, "1", &p, &err), 0);
    assert_string_equal(p->uuid, P1);
    assert_int_equal(manifest_choose(&m, "2222", &p, &err), 0);
    assert_string_equal(p->uuid, P2);
    assert_int_equal(manifest_choose(&m, P1, &p, &err), 0);
    assert_int_equal(manifest_choose(&m, "222", &p, &err), -ENOENT); /* too short to mean a uuid */
    assert_int_equal(manifest_choose(&m, "3", &p, &err), -ENOENT);
    memcpy(m.points[0].uuid, P2, UUID_SIZE - 2);
    assert_int_equal(manifest_choose(&m, "2222", &p, &err), -EINVAL);
    manifest_fini(&m);
    struct manifest empty = {0};
    assert_int_equal(manifest_choose(&empty, "latest", &p, &err), -ENOENT);
}

TEST(uuids_are_random_and_well_formed)
{
    char a[UUID_SIZE], b[UUID_SIZE];
    uuid_new(a);
    uuid_new(b);
    assert_string_not_equal(a, b);
    assert_int_equal(strlen(a), UUID_SIZE - 1);
    assert_int_equal(a[14], '4');
    assert_non_null(strchr("89ab", a[19]));
}

/* ---- files ---- */

struct dir {
    char path[64];
    int fd;
};

static void dir_new(struct dir *d)
{
    snprintf(d->path, sizeof d->path, "/tmp/tidemark-cli-test-XXXXXX");
    assert_non_null(mkdtemp(d->path));
    d->fd = open(d->path, O_RDONLY | O_DIRECTORY);
    assert_true(d->fd >= 0);
}

static void dir_free(struct dir *d, const char *const *files)
{
    for (; *files; files++)
        unlinkat(d->fd, *files, 0);
    close(d->fd);
    assert_int_equal(rmdir(d->path), 0);
}

TEST(manifest_is_saved_and_loaded)
{
    struct dir d;
    struct manifest m, again;
    struct tide_error err;
    bool renamed;
    dir_new(&d);
    assert_int_equal(manifest_load(d.fd, &m, &err), -ENOENT);
    make(&m);
    mode_t mask = umask(0);
    assert_int_equal(manifest_save(d.fd, &m, &renamed, &err), 0);
    umask(mask);
    struct stat st;
    assert_int_equal(fstatat(d.fd, "manifest.json", &st, 0), 0);
    assert_int_equal(st.st_mode & 0777, 0600);
    assert_int_equal(manifest_load(d.fd, &again, &err), 0);
    assert_int_equal(again.n_points, 2);
    manifest_fini(&again);
    int fd = openat(d.fd, "manifest.json", O_WRONLY);
    assert_int_equal(ftruncate(fd, 100), 0); /* torn */
    close(fd);
    assert_int_equal(manifest_load(d.fd, &again, &err), -EBADMSG);
    assert_int_equal(unlinkat(d.fd, "manifest.json", 0), 0);
    assert_int_equal(symlinkat("/etc/passwd", d.fd, "manifest.json"), 0);
    assert_int_equal(manifest_load(d.fd, &again, &err), -ELOOP);
    manifest_fini(&m);
    dir_free(&d, (const char *const[]){"manifest.json", NULL});
}

/* A file of 1 MiB with data in [256K, 320K) and four bytes at 600K. */
static int make_image(struct dir *d, const char *name)
{
    int fd = openat(d->fd, name, O_RDWR | O_CREAT | O_EXCL, 0600);
    assert_true(fd >= 0);
    assert_int_equal(ftruncate(fd, (off_t)MIB), 0);
    char block[4096];
    memset(block, 7, sizeof block);
    for (off_t off = 256 * KIB; off < (off_t)(320 * KIB); off += (off_t)sizeof block)
        assert_int_equal(pwrite(fd, block, sizeof block, off), sizeof block);
    assert_int_equal(pwrite(fd, "tide", 4, 600 * KIB), 4);
    return fd;
}

static uint64_t covered(const struct extent *list, size_t n, bool zero)
{
    uint64_t total = 0;
    for (size_t i = 0; i < n; i++)
        total += list[i].zero == zero ? list[i].len : 0;
    return total;
}

TEST(image_scan_verify_apply)
{
    struct dir d;
    struct tide_error err;
    struct ranges all = {0};
    struct image_watch watch = {0};
    dir_new(&d);
    int fd = make_image(&d, "disk1.full.raw");
    struct manifest_disk disk = {
        .name = "disk1", .file = "disk1.full.raw", .size = MIB, .full = true};
    ranges_add(&all, 0, MIB);
    assert_int_equal(image_scan(fd, &all, &watch, &disk.extents, &disk.n_extents, &err), 0);
    assert_true(covered(disk.extents, disk.n_extents, false) +
                    covered(disk.extents, disk.n_extents, true) ==
                MIB);
    assert_true(covered(disk.extents, disk.n_extents, false) >= 64 * KIB + 4);
    int in = image_open(d.fd, &disk, &err);
    assert_true(in >= 0);
    assert_int_equal(image_verify(in, &disk, &watch, &err), 0);

    int out = openat(d.fd, "out", O_RDWR | O_CREAT, 0600);
    assert_int_equal(ftruncate(out, (off_t)MIB), 0);
    assert_int_equal(image_apply(in, &disk, out, &watch, &err), 0);
    char got[8] = "";
    assert_int_equal(pread(out, got, 4, 600 * KIB), 4);
    assert_string_equal(got, "tide");

    /* an increment that says: [256K, 320K) became zero */
    struct extent zero = {256 * KIB, 64 * KIB, 0, true};
    struct manifest_disk inc = {
        .name = "disk1", .file = "disk1.inc-2.raw", .size = MIB, .extents = &zero, .n_extents = 1};
    assert_int_equal(image_apply(in, &inc, out, &watch, &err), 0);
    assert_int_equal(pread(out, got, 1, 256 * KIB), 1);
    assert_int_equal(got[0], 0);

    assert_int_equal(pwrite(fd, "T", 1, 600 * KIB), 1); /* one byte rots */
    assert_int_equal(image_verify(in, &disk, &watch, &err), -EILSEQ);
    assert_int_equal(image_apply(in, &disk, out, &watch, &err), -EILSEQ);
    assert_non_null(strstr(err.msg, "disk1.full.raw"));
    assert_int_equal(ftruncate(fd, 300 * KIB), 0); /* shorter while it is read */
    assert_int_equal(image_verify(in, &disk, &watch, &err), -EILSEQ);
    close(in);
    assert_int_equal(image_open(d.fd, &disk, &err), -EILSEQ); /* the size does not fit */
    mem_free(disk.extents);
    ranges_fini(&all);
    close(fd);
    close(out);
    dir_free(&d, (const char *const[]){"disk1.full.raw", "out", NULL});
}

TEST(image_open_follows_no_link)
{
    struct dir d;
    struct tide_error err;
    struct manifest_disk disk = {.name = "disk1", .file = "disk1.full.raw", .size = 0};
    dir_new(&d);
    assert_int_equal(image_open(d.fd, &disk, &err), -ENOENT);
    assert_int_equal(symlinkat("/dev/null", d.fd, "disk1.full.raw"), 0);
    assert_int_equal(image_open(d.fd, &disk, &err), -ELOOP);
    unlinkat(d.fd, "disk1.full.raw", 0);
    assert_int_equal(mkdirat(d.fd, "disk1.full.raw", 0700), 0);
    assert_int_equal(image_open(d.fd, &disk, &err), -EBADMSG);
    assert_int_equal(unlinkat(d.fd, "disk1.full.raw", AT_REMOVEDIR), 0);
    dir_free(&d, (const char *const[]){NULL});
}

/* Opening a FIFO to read it waits for somebody who writes: here nobody ever does. */
TEST(fifos_in_a_backup_directory_are_refused)
{
    struct dir d;
    struct tide_error err;
    struct manifest m;
    struct manifest_disk disk = {.name = "disk1", .file = "disk1.full.raw", .size = 0};
    dir_new(&d);
    assert_int_equal(mkfifoat(d.fd, "manifest.json", 0600), 0);
    assert_int_equal(mkfifoat(d.fd, "disk1.full.raw", 0600), 0);
    alarm(20); /* a test that hangs dies */
    assert_int_equal(manifest_load(d.fd, &m, &err), -EBADMSG);
    assert_non_null(strstr(err.msg, "'manifest.json' is no regular file"));
    assert_int_equal(image_open(d.fd, &disk, &err), -EBADMSG);
    assert_non_null(strstr(err.msg, "'disk1.full.raw' is no regular file"));
    alarm(0);
    dir_free(&d, (const char *const[]){"manifest.json", "disk1.full.raw", NULL});
}

static int give_up(void *opaque, uint64_t bytes)
{
    return -EINTR;
}

TEST(image_work_can_be_interrupted)
{
    struct dir d;
    struct tide_error err;
    struct ranges all = {0};
    struct extent *list;
    size_t n;
    struct image_watch watch = {.moved = give_up};
    dir_new(&d);
    int fd = make_image(&d, "x");
    ranges_add(&all, 0, MIB);
    assert_int_equal(image_scan(fd, &all, &watch, &list, &n, &err), -EINTR);
    ranges_fini(&all);
    close(fd);
    dir_free(&d, (const char *const[]){"x", NULL});
}

/* ---- the client ---- */

/* A daemon that says what it is told, whatever it is asked: `script` has one text for the greeting
 * and one for every request; NULL closes the connection. */
static pid_t play(struct dir *d, const char *const *script)
{
    struct sockaddr_un sa = {.sun_family = AF_UNIX};
    snprintf(sa.sun_path, sizeof sa.sun_path, "%s/s", d->path);
    int listener = socket(AF_UNIX, SOCK_STREAM, 0);
    assert_int_equal(bind(listener, (struct sockaddr *)&sa, sizeof sa), 0);
    assert_int_equal(listen(listener, 1), 0);
    pid_t pid = fork();
    if (pid == 0) {
        char buf[4096];
        int fd = accept(listener, NULL, NULL);
        for (; *script; script++) {
            if (write(fd, *script, strlen(*script)) < 0)
                break;
            if (script[1] && read(fd, buf, sizeof buf) <= 0)
                break;
        }
        _exit(0);
    }
    close(listener);
    return pid;
}

#define GREETING "{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n"
#define EMPTY "{\"return\": {}}\r\n"

static int open_player(struct dir *d, const char *const *script, struct client **c, pid_t *pid,
                       struct tide_error *err)
{
    char path[80];
    dir_new(d);
    *pid = play(d, script);
    snprintf(path, sizeof path, "%s/s", d->path);
    return client_open(path, c, err);
}

static void close_player(struct dir *d, struct client *c, pid_t pid)
{
    client_close(c);
    waitpid(pid, NULL, 0);
    dir_free(d, (const char *const[]){"s", NULL});
}

TEST(client_talks)
{
    struct dir d;
    struct client *c;
    struct tide_error err;
    json_t *reply, *event;
    pid_t pid;
    static const char *const script[] = {
        GREETING, EMPTY,
        /* events before the answer, no line ends, brackets and quotes in strings */
        "{\"event\": \"A\"}{\"event\":\"B\",\"data\":{\"x\":\"}]\\\"\"}} {\"return\": [1, {}]}",
        "{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"no such thing\"}}",
        "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}, \"id\": 1}", NULL};
    assert_int_equal(open_player(&d, script, &c, &pid, &err), 0);
    assert_int_equal(client_call(c, "x", NULL, &reply, &err), 0);
    assert_int_equal(json_array_size(reply), 2);
    json_decref(reply);
    assert_int_equal(client_event(c, 0, &event, &err), 0);
    assert_string_equal(view_string(event, "event", ""), "A");
    json_decref(event);
    assert_int_equal(client_event(c, 0, &event, &err), 0);
    assert_string_equal(view_string(event, "event", ""), "B");
    json_decref(event);
    assert_int_equal(client_event(c, 0, &event, &err), 0);
    assert_null(event);
    assert_int_equal(client_call(c, "x", json_pack("{s:i}", "a", 1), &reply, &err), CLIENT_REFUSED);
    assert_true(client_unknown_command(&err));
    assert_string_equal(err.msg, "no such thing");
    assert_int_equal(client_call(c, "x", NULL, NULL, &err), CLIENT_REFUSED);
    assert_false(client_unknown_command(&err));
    assert_int_equal(client_wait_close(c, 5000, &err), 0);
    close_player(&d, c, pid);
}

TEST(client_survives_bad_peers)
{
    static const char *const scripts[][4] = {
        {"hello\n[1]", NULL},          /* no object */
        {"{\"no\": \"QMP\"}", NULL},   /* another protocol */
        {"{\"QMP\": nonsense}", NULL}, /* no JSON */
        {"{\"QMP\": {", NULL},         /* torn */
        {GREETING, NULL},              /* closes before the answer */
        {GREETING, "{\"return\": {}", NULL},
    };
    for (size_t i = 0; i < sizeof scripts / sizeof *scripts; i++) {
        struct dir d;
        struct client *c = NULL;
        struct tide_error err;
        pid_t pid;
        assert_int_equal(open_player(&d, scripts[i], &c, &pid, &err), CLIENT_UNREACHABLE);
        close_player(&d, NULL, pid);
    }
}

TEST(client_without_a_daemon)
{
    struct client *c;
    struct tide_error err;
    char path[200];
    assert_int_equal(client_open("/tmp/tidemark-no-such-socket", &c, &err), CLIENT_UNREACHABLE);
    memset(path, 'a', sizeof path - 1);
    path[sizeof path - 1] = '\0';
    assert_int_equal(client_open(path, &c, &err), -ENAMETOOLONG);
}

TEST(dirty_ranges_come_in_pages)
{
    struct dir d;
    struct client *c;
    struct tide_error err;
    struct ranges r = {0};
    pid_t pid;
    static const char *const script[] = {
        GREETING,
        EMPTY,
        "{\"return\": {\"ranges\": [{\"offset\": 0, \"length\": 10}], \"next\": 20}}",
        "{\"return\": {\"ranges\": [{\"offset\": 20, \"length\": 5}]}}",
        "{\"return\": {\"ranges\": [{\"offset\": 9, \"length\": 5}]}}", /* goes back */
        "{\"return\": {\"ranges\": [], \"next\": 20}}",
        "{\"return\": {\"ranges\": [], \"next\": 20}}", /* for ever */
        NULL};
    assert_int_equal(open_player(&d, script, &c, &pid, &err), 0);
    assert_int_equal(view_dirty_ranges(c, "disk1", "b", &r, &err), 0);
    assert_int_equal(r.n, 2);
    assert_int_equal(ranges_total(&r), 15);
    assert_int_equal(view_dirty_ranges(c, "disk1", "b", &r, &err), -EPROTO);
    assert_int_equal(view_dirty_ranges(c, "disk1", "b", &r, &err), -EPROTO);
    ranges_fini(&r);
    close_player(&d, c, pid);
}

/* ---- bitmaps of points ---- */

TEST(own_bitmaps_are_known_by_name)
{
    static const char *const own[] = {"tidemark-backup-0123abcd-disk1-" P1,
                                      "tidemark-backup-0123abcd-disk1-" P1 ".frozen",
                                      "x-00000000-a-b-c-" P1};
    static const char *const others[] = {"",
                                         "b0",
                                         P1,
                                         "-" P1,
                                         "week-" P1,
                                         "tidemark-backup-0123abcd-disk1",
                                         "tidemark-backup-0123ABCD-disk1-" P1,
                                         "tidemark-backup-0123abcd-" P1,
                                         "-0123abcd-disk1-" P1,
                                         "tidemark-backup-0123abcd-disk1-" P1 ".x",
                                         "tidemark-backup-0123abcd-disk1_" P1};
    for (size_t i = 0; i < sizeof own / sizeof *own; i++)
        assert_true(backup_owns_bitmap(own[i]));
    for (size_t i = 0; i < sizeof others / sizeof *others; i++)
        assert_false(backup_owns_bitmap(others[i]));
}

#define COMMANDS "{\"return\": [{\"name\": \"query-dirty-ranges\"}]}"
/* A node with the bitmap of the last point, with more members. */
#define NODE(members)                                                                              \
    "{\"return\": [{\"node-name\": \"disk1\", \"ro\": true, \"image\": {\"virtual-size\": "        \
    "1048576}, "                                                                                   \
    "\"dirty-bitmaps\": [{\"name\": \"b-2\", \"granularity\": 65536, \"recording\": true" members  \
    "}]}]}"

struct run {
    struct cli cli;
    struct backup b;
    struct backup_disk disk;
};

/* A run over the disk of make(), whose last point was made with `generation` (-1: without one). */
static void run_new(struct run *r, int generation)
{
    *r = (struct run){.disk = {.name = "disk1", .fd = -1, .size = MIB},
                      .b = {.stem = "b", .granularity = 65536, .path = "/none", .n = 1}};
    make(&r->b.manifest);
    struct manifest_disk *d = &r->b.manifest.points[1].disks[0];
    d->has_generation = generation >= 0;
    d->generation = generation >= 0 ? (uint64_t)generation : 0;
    r->b.c = &r->cli;
    r->b.disks = &r->disk;
}

static void run_free(struct run *r)
{
    struct backup_disk *d = &r->disk;
    char *strings[] = {d->why, d->bitmap, d->frozen, d->node, d->job, d->file, d->tmp};
    for (size_t i = 0; i < sizeof strings / sizeof *strings; i++)
        mem_free(strings[i]);
    manifest_fini(&r->b.manifest);
}

/* A bitmap that was cleared, or stopped for a while, looks as before: only its generation tells. */
TEST(lost_sight_makes_a_full_backup)
{
    static const struct {
        int generation; /* of the last point */
        const char *node, *why;
    } cases[] = {
        {7, NODE(", \"generation\": 7"), NULL},
        {7, NODE(", \"generation\": 8"), "was cleared"},
        {7, NODE(", \"generation\": 6"), "was cleared"},
        {7, NODE(""), "this daemon does not tell"},
        {7, NODE(", \"generation\": \"7\""), "this daemon does not tell"},
        {7, NODE(", \"generation\": -7"), "this daemon does not tell"},
        {0, NODE(", \"generation\": 0"), NULL},
        {0, NODE(""), "this daemon does not tell"},
        {-1, NODE(""), NULL}, /* as older tools made it, and a daemon that does not tell */
        {-1, NODE(", \"generation\": 0"), "last point does not tell"},
        {-1, NODE(", \"busy\": true"), "in use"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *const script[] = {GREETING, EMPTY, COMMANDS, COMMANDS, cases[i].node, NULL};
        struct run r;
        struct dir d;
        struct tide_error err;
        pid_t pid;
        run_new(&r, cases[i].generation);
        assert_int_equal(open_player(&d, script, &r.cli.client, &pid, &err), 0);
        assert_int_equal(backup_plan(&r.b, &err), 0);
        assert_int_equal(r.disk.full, cases[i].why != NULL);
        if (cases[i].why && !strstr(r.disk.why, cases[i].why))
            fail_msg("case %zu: '%s'", i, r.disk.why);
        close_player(&d, r.cli.client, pid);
        run_free(&r);
    }
}

#define NEW_NODE(members, members_below)                                                           \
    "{\"return\": [{\"node-name\": \"disk1\", \"dirty-bitmaps\": ["                                \
    "{\"name\": \"b-new\"" members "}, {\"name\": \"b-2\"" members_below "}]}]}"
#define ON ", \"recording\": true"
#define GEN(n) ON ", \"generation\": " #n

/* Somebody clears the old or the new bitmap while the run is between its first look and its
 * transaction: no point comes of it. */
TEST(lost_sight_while_a_backup_begins)
{
    static const struct {
        const char *before, *after;
        int result;
    } cases[] = {
        {NEW_NODE(GEN(9), GEN(7)), NEW_NODE(GEN(9), GEN(7)), 0},
        {NEW_NODE(GEN(9), GEN(7)), NEW_NODE(GEN(10), GEN(7)), -EBUSY},
        {NEW_NODE(GEN(9), GEN(7)), NEW_NODE(GEN(9), GEN(10)), -EBUSY},
        {NEW_NODE(GEN(9), GEN(7)), NEW_NODE(", \"generation\": 9", GEN(7)), -EBUSY},
        {NEW_NODE(GEN(9), GEN(7)), "{\"return\": [{\"node-name\": \"disk1\"}]}", -EBUSY},
        {NEW_NODE(", \"generation\": 9", GEN(7)), NULL, -EBUSY},
        {NEW_NODE(GEN(9), GEN(7)), NULL, CLIENT_UNREACHABLE},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        /* the bitmap, refused as a persistent one; the look; the transaction; the look */
        const char *const script[] = {GREETING,        EMPTY, "{\"error\": {}}", EMPTY,
                                      cases[i].before, EMPTY, cases[i].after,    NULL};
        struct run r;
        struct dir d;
        struct tide_error err;
        pid_t pid;
        run_new(&r, 7);
        r.disk.below = &r.b.manifest.points[1].disks[0];
        r.disk.bitmap = cli_strdup("b-new");
        r.disk.frozen = cli_strdup("b-new.frozen");
        r.disk.job = cli_strdup("job");
        r.disk.node = cli_strdup("target");
        assert_int_equal(open_player(&d, script, &r.cli.client, &pid, &err), 0);
        assert_int_equal(backup_begin(&r.b, &err), cases[i].result);
        if (cases[i].result == 0)
            assert_true(r.disk.has_generation && r.disk.generation == 9);
        close_player(&d, r.cli.client, pid);
        run_free(&r);
    }
}

/* ---- waiting for jobs ---- */

/* One that waits for its group, none of which moves, and three that wait for a command. */
#define STANDING                                                                                   \
    "{\"return\": [{\"id\": \"a\", \"status\": \"waiting\"}, {\"id\": \"b\", \"status\": "         \
    "\"pending\"}, {\"id\": \"c\", \"status\": \"ready\"}, {\"id\": \"d\", \"status\": "           \
    "\"paused\"}]}"

/* A daemon that answers every request by `answer`. */
static pid_t play_on(struct dir *d, const char *answer, const char *path)
{
    struct sockaddr_un sa = {.sun_family = AF_UNIX};
    snprintf(sa.sun_path, sizeof sa.sun_path, "%s", path);
    int listener = socket(AF_UNIX, SOCK_STREAM, 0);
    assert_int_equal(bind(listener, (struct sockaddr *)&sa, sizeof sa), 0);
    assert_int_equal(listen(listener, 1), 0);
    pid_t pid = fork();
    if (pid == 0) {
        char buf[4096];
        int fd = accept(listener, NULL, NULL);
        const char *text = GREETING;
        while (write(fd, text, strlen(text)) > 0 && read(fd, buf, sizeof buf) > 0)
            text = strstr(buf, "qmp_capabilities") ? EMPTY : answer;
        _exit(0);
    }
    close(listener);
    return pid;
}

TEST(waiting_for_jobs_that_stand_ends)
{
    const char *words[] = {"a", "b", "c", "d"};
    struct dir d;
    char path[80];
    dir_new(&d);
    snprintf(path, sizeof path, "%s/s", d.path);
    pid_t pid = play_on(&d, STANDING, path);
    struct cli c = {.socket = path, .args = words, .n_args = 4};
    alarm(60); /* a test that hangs dies */
    assert_int_equal(cmd_job_wait(&c), CLI_PARTLY);
    alarm(0);
    close_player(&d, c.client, pid);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(size_reads_units),
        cmocka_unit_test(size_refuses),
        cmocka_unit_test(size_is_written),
        cmocka_unit_test(table_aligns),
        cmocka_unit_test(table_without_rows),
        cmocka_unit_test(names_cannot_steer_a_terminal),
        cmocka_unit_test(distance_counts_letters),
        cmocka_unit_test(ranges_join_and_refuse),
        cmocka_unit_test(map_draws),
        cmocka_unit_test(map_keeps_its_promises),
        cmocka_unit_test(map_of_small_disks),
        cmocka_unit_test(manifest_round_trip),
        cmocka_unit_test(manifest_refuses_hostile_names),
        cmocka_unit_test(manifest_refuses_hostile_ranges),
        cmocka_unit_test(manifest_refuses_wrong_chains),
        cmocka_unit_test(manifest_keeps_generations),
        cmocka_unit_test(manifest_refuses_other_damage),
        cmocka_unit_test(manifest_file_names),
        cmocka_unit_test(points_are_chosen),
        cmocka_unit_test(uuids_are_random_and_well_formed),
        cmocka_unit_test(manifest_is_saved_and_loaded),
        cmocka_unit_test(image_scan_verify_apply),
        cmocka_unit_test(image_open_follows_no_link),
        cmocka_unit_test(fifos_in_a_backup_directory_are_refused),
        cmocka_unit_test(image_work_can_be_interrupted),
        cmocka_unit_test(client_talks),
        cmocka_unit_test(client_survives_bad_peers),
        cmocka_unit_test(client_without_a_daemon),
        cmocka_unit_test(dirty_ranges_come_in_pages),
        cmocka_unit_test(own_bitmaps_are_known_by_name),
        cmocka_unit_test(lost_sight_makes_a_full_backup),
        cmocka_unit_test(lost_sight_while_a_backup_begins),
        cmocka_unit_test(waiting_for_jobs_that_stand_ends),
    };
    return cmocka_run_group_tests_name("cli", tests, NULL, NULL);
}
