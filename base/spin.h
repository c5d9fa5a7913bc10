/* SPDX-License-Identifier: Apache-2.0 */
/* A spinlock for a handful of instructions between loops. Never held across a yield, a system call
 * or an allocation. The core has no other lock that blocks a thread (rules: the simulator runs all
 * loops in one thread, where this lock is always free). */
#pragma once
#include <stdatomic.h>

struct spin {
    atomic_flag held;
};
#define SPIN_INIT                                                                                  \
    {                                                                                              \
        ATOMIC_FLAG_INIT                                                                           \
    }

static inline void spin_lock(struct spin *s)
{
    while (atomic_flag_test_and_set_explicit(&s->held, memory_order_acquire))
#if defined(__x86_64__)
        __builtin_ia32_pause();
#else
        __asm__ volatile("" ::: "memory");
#endif
}

static inline void spin_unlock(struct spin *s)
{
    atomic_flag_clear_explicit(&s->held, memory_order_release);
}
