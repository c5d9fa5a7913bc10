/* SPDX-License-Identifier: Apache-2.0 */
/* JSON that may be long (a list of 100,000 actions): others of the loop have their turns while it
 * is read and given back. Control loop only. */
#pragma once
#include <jansson.h>
#include <stddef.h>

#include "co/co.h"

struct io;

/* One value of any kind, as the monitor takes it: members only once, byte 0 allowed in strings. A
 * new reference, or NULL and `e` says why. `text` is borrowed until it returns. */
co_fn json_t *long_json_load(struct io *io, const char *text, size_t len, json_error_t *e);

/* The text of `v` as json_dumps() makes it with `flags`, not terminated; *text is freed with
 * mem_free(). -ENOMEM. */
co_fn int long_json_dump(struct io *io, const json_t *v, size_t flags, char **text, size_t *len);

/* As json_decref(); what others hold references to stays as it is. NULL is fine. */
co_fn void long_json_decref(struct io *io, json_t *v);
