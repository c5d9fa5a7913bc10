/* SPDX-License-Identifier: Apache-2.0 */
/* A histogram of times in ns, in buckets a 32nd of a power of two wide: within 3 % of the truth. */
#pragma once
#include <stdint.h>

#define LATENCY_BUCKETS (60 * 32)

static inline unsigned latency_bucket(uint64_t ns)
{
    if (ns < 32)
        return ns;
    unsigned shift = 63 - __builtin_clzll(ns) - 5;
    unsigned b = (shift + 1) * 32 + ((ns >> shift) & 31);
    return b < LATENCY_BUCKETS ? b : LATENCY_BUCKETS - 1;
}

/* The longest time that falls into a bucket. */
static inline uint64_t latency_bucket_top(unsigned b)
{
    if (b < 32)
        return b;
    unsigned shift = b / 32 - 1;
    return ((UINT64_C(33) + b % 32) << shift) - 1;
}

/* The time below which `percent` of `total` times stayed, of which none was longer than max_ns. */
static inline uint64_t latency_percentile(const uint64_t *buckets, uint64_t total, uint64_t max_ns,
                                          double percent)
{
    uint64_t seen = 0, want = (uint64_t)(percent / 100 * (double)total);
    if (total == 0)
        return 0;
    for (unsigned b = 0; b < LATENCY_BUCKETS; b++) {
        seen += buckets[b];
        if (seen > want || seen == total)
            return latency_bucket_top(b) < max_ns ? latency_bucket_top(b) : max_ns;
    }
    return max_ns;
}
