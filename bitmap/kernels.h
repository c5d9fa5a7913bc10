/* SPDX-License-Identifier: Apache-2.0 */
/* The loops over words that merging, copying and scanning spend their time in, in the widest form
 * that this processor has. They read and write plain memory: only for pages that nobody writes
 * meanwhile. All forms give the same result (bitmap_merge_test.c compares them). */
#pragma once
#include <stddef.h>
#include <stdint.h>

struct bitmap_kernels {
    const char *name;
    /* dst = a | b, which may be the same memory; the number of bits set in it. n % 8 == 0. */
    uint64_t (*or_count)(uint64_t *dst, const uint64_t *a, const uint64_t *b, size_t n);
    /* The same into memory that is read later only: past the caches, where the processor can.
     * dst is aligned to 64 bytes and neither a nor b. */
    uint64_t (*or_count_new)(uint64_t *dst, const uint64_t *a, const uint64_t *b, size_t n);
    /* dst = a; the number of bits set. n % 8 == 0. */
    uint64_t (*copy_count)(uint64_t *dst, const uint64_t *a, size_t n);
    uint64_t (*count)(const uint64_t *a, size_t n); /* n % 8 == 0 */
    size_t (*first_set)(const uint64_t *a,
                        size_t n); /* of words that are not zero; n: none. Any n */
    /* Half as many bits: each is set where either of two is. n words of `to`, 2n of `from`. */
    void (*halve)(uint64_t *to, const uint64_t *from, size_t n);
    /* Twice as many bits: each stands there twice. n words of `from`, 2n of `to`. */
    void (*twice)(uint64_t *to, const uint64_t *from, size_t n);
};

/* The best form; a few instructions, so nothing is remembered in a global. */
const struct bitmap_kernels *bitmap_kernels(void);
/* Every form that this machine can run, best last; NULL behind the end. For tests and benchmarks.
 */
const struct bitmap_kernels *bitmap_kernels_nth(unsigned i);
