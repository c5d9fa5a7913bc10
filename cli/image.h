/* SPDX-License-Identifier: Apache-2.0 */
/* The raw files of a backup: what they hold, whether they still hold it, and putting it back. */
#pragma once
#include "base/error.h"
#include "cli/manifest.h"
#include "cli/ranges.h"

/* Told how many bytes have just been read; a value below 0 ends the work with that code. */
struct image_watch {
    int (*moved)(void *opaque, uint64_t bytes);
    void *opaque;
};

/* Tells data and zeroes of `ranges` in the file apart, and hashes the data. The holes of the file
 * are the zeroes; a hole shorter than 64 KiB counts as data. The caller frees *out with mem_free().
 */
int image_scan(int fd, const struct ranges *ranges, struct image_watch *watch, struct extent **out,
               size_t *n_out, struct tide_error *err);

/* Opens the file of a disk in a backup directory and checks its size. The descriptor, or -errno. */
int image_open(int dir_fd, const struct manifest_disk *d, struct tide_error *err);

/* Reads every data range and compares its hash: 0, or -EILSEQ, with words, at the first that
 * differs. */
int image_verify(int fd, const struct manifest_disk *d, struct image_watch *watch,
                 struct tide_error *err);

/* Writes what the file holds into `out`, verifying on the way; zeroes become holes. */
int image_apply(int fd, const struct manifest_disk *d, int out, struct image_watch *watch,
                struct tide_error *err);
