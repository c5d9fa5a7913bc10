/* SPDX-License-Identifier: Apache-2.0 */
/* What the tests of the tool share: a fresh directory, and a manifest. Included once by each test
 * program. */
#pragma once
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/bytes.h"
#include "cli/manifest.h"

#define TEST(name) static void name(void **state)

struct dir {
    char path[64];
    int fd;
};

static inline void dir_new(struct dir *d)
{
    snprintf(d->path, sizeof d->path, "/tmp/tidemark-cli-test-XXXXXX");
    assert_non_null(mkdtemp(d->path));
    d->fd = open(d->path, O_RDONLY | O_DIRECTORY);
    assert_true(d->fd >= 0);
}

static inline void dir_free(struct dir *d, const char *const *files)
{
    for (; *files; files++)
        unlinkat(d->fd, *files, 0);
    close(d->fd);
    assert_int_equal(rmdir(d->path), 0);
}

#define ID "00000000-0000-4000-8000-00000000000a"
#define P1 "11111111-1111-4111-8111-111111111111"
#define P2 "22222222-2222-4222-8222-222222222222"

/* Two points of a disk of 1 MiB. */
static struct extent full_ranges[] = {{0, 65536, 0x1234, false}, {65536, 983040, 0, true}};
static struct extent inc_ranges[] = {{131072, 65536, 0xfedcba9876543210, false},
                                     {262144, 65536, 0, true}};

static inline void make_manifest(struct manifest *m)
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
