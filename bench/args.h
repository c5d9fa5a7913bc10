/* SPDX-License-Identifier: Apache-2.0 */
/* Values of options. What is none ends the program with status 2 and a message that names the
 * option, `what`. */
#pragma once
#include <stdint.h>

/* A number from `min` to `max`. */
uint64_t args_number(const char *what, const char *s, uint64_t min, uint64_t max);
/* The same; it may have one of the suffixes k M G T, powers of 1024. */
uint64_t args_size(const char *what, const char *s, uint64_t min, uint64_t max);
/* Seconds, more than none; in ns. */
uint64_t args_seconds(const char *what, const char *s);
