/* SPDX-License-Identifier: Apache-2.0 */
/* Tests of what the tool is made of: sizes, tables, maps, manifests. */
#include "cli/cli_test.h"
#include "base/bytes.h"
#include "base/mem.h"
#include "cli/cli.h"
#include "cli/manifest.h"
#include "cli/ranges.h"
#include "cli/size.h"
#include "cli/table.h"
#include "cli/view.h"
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <xxhash.h>

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

static json_t *make_json(void)
{
    struct manifest m;
    make_manifest(&m);
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
    make_manifest(&m);
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
    make_manifest(&m);
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

TEST(manifest_is_saved_and_loaded)
{
    struct dir d;
    struct manifest m, again;
    struct tide_error err;
    bool renamed;
    dir_new(&d);
    assert_int_equal(manifest_load(d.fd, &m, &err), -ENOENT);
    make_manifest(&m);
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
    };
    return cmocka_run_group_tests_name("cli", tests, NULL, NULL);
}
