/* SPDX-License-Identifier: Apache-2.0 */
/* Inside the simulator: random numbers, and the bytes of a sparse file. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* splitmix64: every seed is a good one, and the state is one word. */
struct sim_rng {
    uint64_t state;
};
uint64_t sim_rand(struct sim_rng *r);
uint64_t sim_below(struct sim_rng *r, uint64_t n); /* 0 .. n-1; n > 0 */
bool sim_percent(struct sim_rng *r, unsigned percent);

/* For the simulator's own books: zeroed, or the process ends. Plain malloc, so that
 * mem_fail_after() counts only what the code under test asks for. Released by free(). */
void *sim_alloc(size_t size);
void *sim_grow(void *p, size_t n, size_t size); /* realloc */

/* A file's bytes: a sorted list of spans of 4 KiB chunks. A span is one chunk with data, or any
 * number of allocated chunks that are all zero; what is in no span is a hole. Data is shared
 * between copies of a store until one of them writes. No size: that is the inode's. */
#define SIM_CHUNK ((uint64_t)4096)
struct sim_chunk;
struct sim_span {
    uint64_t at, n;         /* in chunks */
    struct sim_chunk *data; /* n == 1; NULL: zeros */
};
struct sim_store {
    struct sim_span *spans;
    size_t n, cap;
    uint64_t n_chunks; /* allocated */
};
void store_fini(struct sim_store *s);
void store_copy(struct sim_store *to, const struct sim_store *from); /* `to` was empty */
void store_read(const struct sim_store *s, uint64_t off, void *buf, size_t len);
void store_write(struct sim_store *s, uint64_t off, const void *buf, size_t len);
void store_zero(struct sim_store *s, uint64_t off, uint64_t len);  /* stays or gets allocated */
void store_punch(struct sim_store *s, uint64_t off, uint64_t len); /* whole chunks become holes */
/* Is there data at `off`, and how far (at most *len) is it the same? */
bool store_extent(const struct sim_store *s, uint64_t off, uint64_t *len);
/* Chunks that a write to this range would have to allocate. */
uint64_t store_missing(const struct sim_store *s, uint64_t off, uint64_t len);
uint64_t store_hash(const struct sim_store *s, uint64_t size, uint64_t seed);
bool sim_is_zero(const void *buf, size_t len);
