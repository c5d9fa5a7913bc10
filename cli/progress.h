/* SPDX-License-Identifier: Apache-2.0 */
/* Bars on standard error, one line for each thing that moves. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct progress_line {
    const char *label;    /* borrowed */
    uint64_t done, total; /* bytes; total may change */
};

struct progress {
    bool on;
    size_t lines_up; /* drawn last time: the cursor stands below them */
    int64_t start_ms, drawn_ms;
};

/* `on` false: every call does nothing. */
void progress_start(struct progress *p, bool on);
/* Draws, at most ten times a second unless `now`. */
void progress_draw(struct progress *p, const struct progress_line *lines, size_t n, bool now);
/* Wipes the bars away; what is printed next stands in their place. */
void progress_end(struct progress *p);

/* Columns of the terminal at `fd`; 80 if it has none. */
unsigned terminal_columns(int fd);
