/* SPDX-License-Identifier: Apache-2.0 */
/* Cuts a monitor's byte stream into JSON values. It finds where a value ends, no more: whether the
 * value is right is jansson's business, which gets each one whole.
 *
 *     while ((r = scan_next(&s, &data, &len, &err)) != 0)
 *         if (r > 0) ... s.value, s.value_len ...
 *         else       ... answer with err; the stream goes on ...
 *
 * Values may touch, span lines and come in any pieces. What QMP clients may write and JSON does not
 * know is rewritten on the way: 'single quotes' and \' become plain strings, and integers beyond 64
 * bit get "e0" so that they turn into numbers instead of failing the whole request.
 *
 * A byte that cannot stand where it is makes one error; then everything up to the next newline or
 * byte 0xFF is dropped. 0xFF is never part of a value: it always starts afresh, with an error. */
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"

#define SCAN_MAX_DEPTH 1024
#define SCAN_MAX_SIZE ((size_t)64 << 20)
#define SCAN_MAX_TOKENS 2097152u

struct scan {
    /* The value found last; borrowed, valid until the next call; a zero byte follows it. */
    const char *value;
    size_t value_len;

    /* Limits; scan_init() sets the ones above. depth: at most SCAN_MAX_DEPTH. */
    unsigned max_depth;
    size_t max_size;     /* bytes of one value */
    unsigned max_tokens; /* brackets, strings, words, ',' and ':' of one value */

    /* Private. */
    char *buf;
    size_t len, size;
    int state;
    char quote;
    size_t word; /* where in buf the word at hand begins */
    unsigned depth, n_tokens;
    uint8_t is_list[SCAN_MAX_DEPTH / 8]; /* a bit for each level: '[' rather than '{' */
};

void scan_init(struct scan *s);
void scan_fini(struct scan *s);

/* Takes bytes from *data, moving *data and *len. 1: a value is in s->value. 0: everything is taken,
 * bring more. -EINVAL, -ENOMEM: `err` says what is wrong; call again for the rest. */
int scan_next(struct scan *s, const char **data, size_t *len, struct tide_error *err);
