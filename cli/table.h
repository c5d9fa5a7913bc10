/* SPDX-License-Identifier: Apache-2.0 */
/* Plain aligned columns, two spaces apart. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>

struct table {
    const char *const *heads; /* borrowed; a head that starts with '>' is set to the right */
    size_t n_cols, n_rows;
    char **cells; /* row after row */
};

void table_init(struct table *t, const char *const *heads, size_t n_cols);
/* One row of n_cols `const char *`, copied. Control characters become '?': names come from images
 * and other people's commands, and must not steer a terminal. */
void table_row(struct table *t, ...);
/* The head in bold if `color`. Nothing at all but `empty` and a line end if there are no rows. */
void table_print(const struct table *t, FILE *out, bool color, const char *empty);
void table_fini(struct table *t);

/* Columns of the screen that a UTF-8 text takes (every character counts as one). */
size_t text_width(const char *s);
/* Replaces control characters by '?', in place; returns `s`. */
char *text_clean(char *s);
/* How many letters differ between two words (insert, delete, replace); 99 if one is too long. */
unsigned text_distance(const char *a, const char *b);
