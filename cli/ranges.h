/* SPDX-License-Identifier: Apache-2.0 */
/* A list of byte ranges of a disk, sorted, and a picture of it. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

struct range {
    uint64_t off, len;
};

struct ranges {
    struct range *list; /* sorted, apart from each other */
    size_t n, room;
};

/* Adds a range behind the last one; joins them if they touch. False if it lies before the end of
 * the last one, is empty or goes past 2^63 - 1: the list is then unchanged. */
bool ranges_add(struct ranges *r, uint64_t off, uint64_t len);
void ranges_fini(struct ranges *r);
/* Bytes in all ranges. */
uint64_t ranges_total(const struct ranges *r);
/* Cuts off what lies at or behind `size`. */
void ranges_clip(struct ranges *r, uint64_t size);
/* Bytes of [off, off+len) that are in the list. `from` is a place to go on from when the windows
 * only move up; start it with 0. */
uint64_t ranges_in(const struct ranges *r, uint64_t off, uint64_t len, size_t *from);

/* Draws a disk of `size` bytes as rows of cells, at most `columns` wide and `rows` high; a cell is
 * never smaller than `granularity`. `ascii`: no Unicode blocks. */
void ranges_draw(const struct ranges *r, uint64_t size, uint64_t granularity, unsigned columns,
                 unsigned rows, bool ascii, FILE *out);
