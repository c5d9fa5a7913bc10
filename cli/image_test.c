/* SPDX-License-Identifier: Apache-2.0 */
/* Tests of the files of a backup. */
#include "base/bytes.h"
#include "base/mem.h"
#include "cli/cli_test.h"
#include "cli/image.h"
#include "cli/manifest.h"
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>

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
    alarm(500); /* a test that hangs dies */
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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(image_scan_verify_apply),
        cmocka_unit_test(image_open_follows_no_link),
        cmocka_unit_test(fifos_in_a_backup_directory_are_refused),
        cmocka_unit_test(image_work_can_be_interrupted),
    };
    return cmocka_run_group_tests_name("image", tests, NULL, NULL);
}
