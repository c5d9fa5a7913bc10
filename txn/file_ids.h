/* SPDX-License-Identifier: Apache-2.0 */
/* Which file a path leads to: relative paths, symbolic and hard links are other names of one. */
#pragma once
#include "co/co.h"
#include "txn/footprint.h"

struct io;
struct file_ids;
struct file_questions;

/* One for each daemon: the questions that are open. Control loop, as all of this. -ENOMEM. */
int file_questions_new(struct io *io, struct file_questions **out);
void file_questions_free(struct file_questions *q); /* some may be open still; NULL is fine */

/* Looks at every path that the list names, for a second at most: a mount that hangs does not
 * answer, and what has not answered by then may be any file. NULL: no memory. */
co_fn struct file_ids *file_ids_new(struct file_questions *q, const struct footprint *f);
/* As footprint_lookup.file_key wants it; the text is valid as long as the object. */
const char *file_ids_key(void *ids, const char *path);
void file_ids_free(struct file_ids *ids); /* NULL is fine */
