/* SPDX-License-Identifier: Apache-2.0 */
/* Time, and CPU time of processes, in ns. */
#pragma once
#include <stdint.h>
#include <sys/types.h>
#include <time.h>

/* 0: there is no such clock, or no more. */
static inline uint64_t clock_ns(clockid_t id)
{
    struct timespec ts;
    if (clock_gettime(id, &ts) < 0)
        return 0;
    return (uint64_t)ts.tv_sec * 1000000000 + ts.tv_nsec;
}

/* What a process has used; 0: `pid` is 0, or it is gone. */
static inline uint64_t clock_cpu_of(pid_t pid)
{
    clockid_t id;
    return pid && clock_getcpuclockid(pid, &id) == 0 ? clock_ns(id) : 0;
}
