/* SPDX-License-Identifier: Apache-2.0 */
/* What every byte of a disk must hold, so that a load generator can tell right data from wrong.
 *
 * The 8 bytes at offset `off` (a multiple of 8) are the little-endian number
 *
 *     key(seed, generation) + off / 8 * PATTERN_STEP
 *
 * One multiplication and one addition give any word of any block, so a check may look at a few
 * words only. The step is odd: no two places of one generation hold the same word, which shows data
 * that was served from, or written to, the wrong place. A new generation is a new random key, which
 * shows a lost or an old write. Nothing here depends on the block size: a disk filled in 1 MiB
 * pieces can be read in pieces of 4 KiB. */
#pragma once
#include <endian.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define PATTERN_STEP UINT64_C(0x9e3779b97f4a7c15)
/* A check that samples looks at one word in this many bytes, besides the first and the last. */
#define PATTERN_SAMPLE 1024

/* The splitmix64 generator's output function: neighbouring inputs give unrelated outputs. */
static inline uint64_t pattern_mix(uint64_t v)
{
    v = (v ^ (v >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    v = (v ^ (v >> 27)) * UINT64_C(0x94d049bb133111eb);
    return v ^ (v >> 31);
}

static inline uint64_t pattern_key(uint64_t seed, uint32_t gen)
{
    return pattern_mix(pattern_mix(seed + 1) + gen * UINT64_C(0xd1342543de82ef95));
}

/* The word that holds offset `off`, as a number. */
static inline uint64_t pattern_word(uint64_t key, uint64_t off)
{
    return key + (off >> 3) * PATTERN_STEP;
}

/* off and len are multiples of 8; dst need not be aligned. */
static inline void pattern_write(uint8_t *dst, uint64_t key, uint64_t off, size_t len)
{
    uint64_t v = pattern_word(key, off);
    for (size_t i = 0; i < len / 8; i++) {
        uint64_t w = htole64(v + i * PATTERN_STEP);
        memcpy(dst + i * 8, &w, 8);
    }
}

/* Do n <= 8 bytes at `off`, inside one word, hold what they must? */
static inline bool pattern_bytes_ok(const uint8_t *p, uint64_t key, uint64_t off, size_t n)
{
    uint64_t w = htole64(pattern_word(key, off));
    return memcmp(p, (const uint8_t *)&w + (off & 7), n) == 0;
}

static inline bool pattern_word_ok(const uint8_t *p, uint64_t key, uint64_t off)
{
    uint64_t got;
    memcpy(&got, p, 8);
    return le64toh(got) == pattern_word(key, off);
}

#define PATTERN_OK SIZE_MAX

/* Index of a wrong byte, or of the word with a wrong byte, or PATTERN_OK. Any off and len: a reply
 * may arrive in pieces that end anywhere. `step` is 8 to look at every word, or PATTERN_SAMPLE;
 * `start` (below step) moves the sample, so that one place read often is seen whole in the end. */
static inline size_t pattern_check(const uint8_t *p, uint64_t key, uint64_t off, size_t len,
                                   size_t step, size_t start)
{
    size_t head = (8 - (off & 7)) & 7;
    if (head > len)
        head = len;
    if (head && !pattern_bytes_ok(p, key, off, head))
        return 0;
    size_t tail = (len - head) & 7, end = len - tail;
    if (tail && !pattern_bytes_ok(p + end, key, off + end, tail))
        return end;
    if (head == end)
        return PATTERN_OK;
    if (!pattern_word_ok(p + head, key, off + head))
        return head;
    if (!pattern_word_ok(p + end - 8, key, off + end - 8))
        return end - 8;
    for (size_t i = head + (start & ~(size_t)7); i < end; i += step)
        if (!pattern_word_ok(p + i, key, off + i))
            return i;
    return PATTERN_OK;
}
