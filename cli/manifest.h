/* SPDX-License-Identifier: Apache-2.0 */
/* The manifest of a backup directory: which points it holds, and for each disk of a point the file
 * and what is in it. docs/backup-format.md is the specification. */
#pragma once
#include "base/error.h"
#include "base/mem.h"
#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>

#define MANIFEST_FILE "manifest.json"
#define MANIFEST_VERSION 1
#define UUID_SIZE 37 /* 36 characters and the end */

struct extent {
    uint64_t off, len;
    uint64_t hash; /* XXH3-64 of the bytes; 0 for zeroes */
    bool zero;
};

struct manifest_disk {
    const char *name;   /* of the node */
    const char *file;   /* in the directory */
    const char *bitmap; /* records what changes after this point; "" if there is none */
    uint64_t size, granularity;
    uint64_t generation;    /* of the bitmap; another one later: it may lack changes */
    bool has_generation;    /* not every daemon tells */
    bool full;              /* all of the disk, not only what changed since the parent */
    struct extent *extents; /* sorted, apart */
    size_t n_extents;
};

struct manifest_point {
    char uuid[UUID_SIZE];
    char parent[UUID_SIZE]; /* "" if every disk is full */
    const char *time;       /* UTC, "2026-01-31T12:00:00Z" */
    uint64_t number;        /* grows from point to point */
    struct manifest_disk *disks;
    size_t n_disks;
};

/* Owns all strings and arrays in it. A zeroed one is empty; `id` is then to be set. */
struct manifest {
    char id[UUID_SIZE];
    struct manifest_point *points; /* oldest first */
    size_t n_points;
    struct arena arena;
};

/* Reads DIR/manifest.json. -ENOENT, with words, if there is none; -EBADMSG for every other text
 * than one that manifest_save() could have written. */
int manifest_load(int dir_fd, struct manifest *m, struct tide_error *err);
/* The same from a parsed value, which stays the caller's. */
int manifest_parse(json_t *value, struct manifest *m, struct tide_error *err);
void manifest_fini(struct manifest *m);

/* Opens a file of a backup directory for reading: the descriptor, or -errno. The directory may be
 * anybody's work, so links are not followed, and what is no regular file is refused at once. */
int manifest_open_file(int dir_fd, const char *file, struct stat *st, struct tide_error *err);

/* The value to write; the caller owns it. */
json_t *manifest_format(const struct manifest *m);
/* Replaces DIR/manifest.json: new file, fsync, rename, fsync of the directory. *renamed tells,
 * after an error, whether the new text may have come into effect. */
int manifest_save(int dir_fd, const struct manifest *m, bool *renamed, struct tide_error *err);

/* Appends a point, whose strings and arrays are copied. */
void manifest_add(struct manifest *m, const struct manifest_point *point);

const struct manifest_point *manifest_last(const struct manifest *m); /* NULL: no points */
const struct manifest_point *manifest_find(const struct manifest *m, const char *uuid);
const struct manifest_disk *manifest_disk(const struct manifest_point *p, const char *name);
/* What a person calls a point: "latest", its number, its uuid or the start of it (4 characters). */
int manifest_choose(const struct manifest *m, const char *text, const struct manifest_point **out,
                    struct tide_error *err);

/* The name of a disk's file in point `number`. The caller owns it. */
char *manifest_file_name(const char *disk, bool full, uint64_t number);
/* Is it such a name, of a point that is not older than `number`? */
bool manifest_is_file_name(const char *file, uint64_t number);

void uuid_new(char out[UUID_SIZE]);
bool uuid_is(const char *s);
