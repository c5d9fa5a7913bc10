/* SPDX-License-Identifier: Apache-2.0 */
/* A file that a list makes: whole under a temporary name first, then put in its place by a rename
 * that has an exact inverse.
 *
 *   new_file_make     NAME.<id>.tmp exists, nobody's path leads to it   (staged; slow work)
 *   new_file_place    it stands at NAME; what stood there before stands at NAME.<id>.tmp   (effect)
 *   new_file_unplace  the other way round   (undo)
 *   new_file_end      what stands at NAME.<id>.tmp goes   (released, or thrown away)
 *
 * So nothing is ever overwritten, an undone list leaves the directory as it was, with every file's
 * bytes and inode, and nothing that can fail follows the record. What cannot be had like this is
 * refused: a name that leads elsewhere (symbolic link), files with several names, devices.
 *
 * Where the daemon is killed in between, NAME.<id>.tmp stays behind; the intent that tells a
 * durable store of it belongs before new_file_make() creates it, with its id, and is closed by the
 * record or by new_file_end(). Control loop. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"
#include "co/co.h"

struct graph;
struct io;
struct new_file;

/* `path` of `size` bytes, all zero. */
co_fn int new_file_make(struct io *io, const char *path, uint64_t size, struct new_file **out,
                        struct tide_error *err);
const char *new_file_temp(const struct new_file *f); /* where its bytes are until it is placed */
/* Durable on return. Refused where something stands at `path` that must not be replaced: open in a
 * node of this graph, locked by another process, not writable. On failure it is where it was, or
 * left->code is that of new_file_unplace() and its text says so; else 0. */
co_fn int new_file_place(struct new_file *f, struct graph *g, struct tide_error *left,
                         struct tide_error *err);
/* Durable on return. 0; or, if somebody else has replaced it meanwhile or the file system fails,
 * -errno and where the file is that was there before: theirs is left alone, and there is nothing
 * more to try. */
co_fn int new_file_unplace(struct new_file *f, struct tide_error *err);
/* Nobody has the file at the temporary name open. Frees `f`; NULL is fine. */
co_fn void new_file_end(struct new_file *f);

/* What make and place would refuse, as far as it can be told without a trace in the directory. */
co_fn int new_file_check(struct graph *g, const char *path, struct tide_error *err);
