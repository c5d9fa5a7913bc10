/* SPDX-License-Identifier: Apache-2.0 */
/* Sizes as people write and read them: "64K", "1.5 GiB". Binary units throughout. */
#pragma once
#include "base/error.h"
#include <stdint.h>

/* A whole number, alone or with K, M, G, T, P or E (also "KiB" and lower case). -EINVAL for what is
 * no size, -ERANGE for more than 2^63 - 1, with words. */
int size_parse(const char *text, uint64_t *size, struct tide_error *err);

struct size_text {
    char s[40];
};
/* "0 B", "512 B", "64 KiB", "1.5 GiB": at most one digit behind the point, never rounded up to the
 * next unit. Use: size_text(n).s */
struct size_text size_text(uint64_t size);
