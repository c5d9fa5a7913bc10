/* SPDX-License-Identifier: Apache-2.0 */
/* Plain aligned columns. The last column is never filled up, so that no line ends in blanks. */
#include "cli/table.h"
#include "base/mem.h"
#include "cli/cli.h"
#include <stdarg.h>
#include <string.h>

size_t text_width(const char *s)
{
    size_t n = 0;
    for (; *s; s++)
        n += ((unsigned char)*s & 0xc0) != 0x80;
    return n;
}

char *text_clean(char *s)
{
    for (unsigned char *p = (unsigned char *)s; *p; p++) {
        if (*p < 0x20 || *p == 0x7f)
            *p = '?';
        /* U+0080 to U+009F are control characters too: C2 80 to C2 9F */
        else if (*p == 0xc2 && p[1] >= 0x80 && p[1] <= 0x9f)
            p[0] = p[1] = '?';
    }
    return s;
}

#define DISTANCE_MAX 64 /* longer words are not compared */

unsigned text_distance(const char *a, const char *b)
{
    size_t n = strlen(a), m = strlen(b);
    if (n > DISTANCE_MAX || m > DISTANCE_MAX)
        return 99;
    unsigned row[DISTANCE_MAX + 1]; /* distances of a's first i letters to every start of b */
    for (size_t j = 0; j <= m; j++)
        row[j] = (unsigned)j;
    for (size_t i = 1; i <= n; i++) {
        unsigned diagonal = row[0];
        row[0] = (unsigned)i;
        for (size_t j = 1; j <= m; j++) {
            unsigned best = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            best = best < row[j] + 1 ? best : row[j] + 1;
            row[j] = best < row[j - 1] + 1 ? best : row[j - 1] + 1;
        }
    }
    return row[m];
}

void table_init(struct table *t, const char *const *heads, size_t n_cols)
{
    *t = (struct table){.heads = heads, .n_cols = n_cols};
}

void table_row(struct table *t, ...)
{
    t->cells = cli_grow(t->cells, (t->n_rows + 1) * t->n_cols, sizeof *t->cells);
    va_list ap;
    va_start(ap, t);
    for (size_t i = 0; i < t->n_cols; i++)
        t->cells[t->n_rows * t->n_cols + i] = text_clean(cli_strdup(va_arg(ap, const char *)));
    va_end(ap);
    t->n_rows++;
}

static bool to_the_right(const struct table *t, size_t col)
{
    return t->heads[col][0] == '>';
}

static const char *head(const struct table *t, size_t col)
{
    return t->heads[col] + (to_the_right(t, col) ? 1 : 0);
}

static size_t column_width(const struct table *t, size_t col)
{
    size_t width = text_width(head(t, col));
    for (size_t row = 0; row < t->n_rows; row++) {
        size_t w = text_width(t->cells[row * t->n_cols + col]);
        width = w > width ? w : width;
    }
    return width;
}

static void print_cell(const struct table *t, FILE *out, size_t col, size_t width, const char *text)
{
    int fill = (int)(width - text_width(text));
    if (to_the_right(t, col))
        fprintf(out, "%*s%s", fill, "", text);
    else if (col + 1 < t->n_cols)
        fprintf(out, "%s%*s", text, fill, "");
    else
        fputs(text, out);
    fputs(col + 1 < t->n_cols ? "  " : "\n", out);
}

void table_print(const struct table *t, FILE *out, bool color, const char *empty)
{
    if (t->n_rows == 0) {
        fprintf(out, "%s\n", empty);
        return;
    }
    size_t *widths = cli_alloc(t->n_cols, sizeof *widths);
    for (size_t col = 0; col < t->n_cols; col++)
        widths[col] = column_width(t, col);
    if (color)
        fputs("\033[1m", out);
    for (size_t col = 0; col < t->n_cols; col++)
        print_cell(t, out, col, widths[col], head(t, col));
    if (color)
        fputs("\033[0m", out);
    for (size_t i = 0; i < t->n_rows * t->n_cols; i++)
        print_cell(t, out, i % t->n_cols, widths[i % t->n_cols], t->cells[i]);
    mem_free(widths);
}

void table_fini(struct table *t)
{
    for (size_t i = 0; i < t->n_rows * t->n_cols; i++)
        mem_free(t->cells[i]);
    mem_free(t->cells);
    *t = (struct table){0};
}
