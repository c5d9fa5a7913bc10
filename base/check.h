/* SPDX-License-Identifier: Apache-2.0 */
/* Checks of tests that run in a coroutine or on a thread of their own. cmocka's own asserts jump,
 * which neither may: these print what failed, and end the process. Any thread. */
#pragma once
#include <stdio.h>
#include <stdlib.h>

#define CHECK(x)                                                                                   \
    do {                                                                                           \
        if (!(x)) {                                                                                \
            fprintf(stderr, "%s:%d: check failed: %s\n", __FILE__, __LINE__, #x);                  \
            abort();                                                                               \
        }                                                                                          \
    } while (0)
/* Whole numbers, each evaluated once. */
#define CHECK_EQ(a, b)                                                                             \
    do {                                                                                           \
        long long a_ = (long long)(a), b_ = (long long)(b);                                        \
        if (a_ != b_) {                                                                            \
            fprintf(stderr, "%s:%d: %s is %lld, not %s (%lld)\n", __FILE__, __LINE__, #a, a_, #b,  \
                    b_);                                                                           \
            abort();                                                                               \
        }                                                                                          \
    } while (0)
#define CHECK_IN(v, lo, hi)                                                                        \
    do {                                                                                           \
        long long v_ = (long long)(v), lo_ = (long long)(lo), hi_ = (long long)(hi);               \
        if (v_ < lo_ || v_ > hi_) {                                                                \
            fprintf(stderr, "%s:%d: %s is %lld, not from %lld to %lld\n", __FILE__, __LINE__, #v,  \
                    v_, lo_, hi_);                                                                 \
            abort();                                                                               \
        }                                                                                          \
    } while (0)
