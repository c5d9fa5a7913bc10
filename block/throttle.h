/* SPDX-License-Identifier: Apache-2.0 */
/* How fast requests may go: leaky buckets. Pure arithmetic; it knows no time but what it is told,
 * no lock and no waiting (those are in block/throttle_group.h).
 *
 * There is a bucket for bytes and one for requests, of reads, of writes and of both. Each request
 * is poured into those of its side, and each leaks at its rate `avg`. A request may go while none
 * of them is over full; it is charged as a whole when it goes, so one long request may fill a
 * bucket far beyond its brim and the next one waits for that. What a bucket holds:
 *   without max         a tenth of a second of avg
 *   with max            max x length: so much may go at once (length 1), or at a rate of max, which
 *                       a second bucket of a tenth of a second of max sees to (length > 1). */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "base/error.h"

enum throttle_side { THROTTLE_READ, THROTTLE_WRITE }; /* zeroes and discards are writes */
#define THROTTLE_SIDES 2u

enum throttle_bucket {
    THROTTLE_BPS_TOTAL,
    THROTTLE_BPS_READ,
    THROTTLE_BPS_WRITE,
    THROTTLE_IOPS_TOTAL,
    THROTTLE_IOPS_READ,
    THROTTLE_IOPS_WRITE,
    THROTTLE_BUCKETS,
};

/* Everything as a person gives it; bytes or requests per second, seconds. */
struct throttle_limit {
    int64_t avg;    /* 0: no limit */
    int64_t max;    /* rate of a burst; 0: none */
    int64_t length; /* how long a burst lasts at most */
};
struct throttle_limits {
    struct throttle_limit limit[THROTTLE_BUCKETS];
    int64_t iops_size; /* a longer request counts as length / iops_size of them; 0: as one */
};
#define THROTTLE_NO_LIMITS                                                                         \
    {                                                                                              \
        {{0, 0, 1}, {0, 0, 1}, {0, 0, 1}, {0, 0, 1}, {0, 0, 1}, {0, 0, 1}}, 0                      \
    }
/* The members of throttle_limits by the names that people use, "bps-total" to "iops-size". */
#define THROTTLE_FIELDS (3u * THROTTLE_BUCKETS + 1)
const char *throttle_field_name(unsigned i);
int64_t *throttle_field(struct throttle_limits *l, unsigned i);

/* -EINVAL with a text that names the member at fault: values out of range, a total beside one of
 * its sides, a burst without a limit or below it. Only limits that pass may be used below. */
int throttle_check(const struct throttle_limits *l, struct tide_error *err);

typedef unsigned __int128 throttle_level; /* units x 10^9: what `avg` leaks in a nanosecond is 1 */
struct throttle {
    struct throttle_limits limits;
    struct {
        throttle_level level, burst;
    } bucket[THROTTLE_BUCKETS];
    uint64_t leaked_at;
};

/* `now` is nanoseconds of a clock that does not jump; one that lags behind an earlier one is that
 * earlier one. */
void throttle_init(struct throttle *t, const struct throttle_limits *l, uint64_t now);
/* Other limits from now on. Buckets stay as full as they are, by parts of the whole: a change is no
 * fresh burst. What is owed stays owed, but the next request waits no longer than it would have
 * without the change. */
void throttle_change(struct throttle *t, const struct throttle_limits *l, uint64_t now);
/* Bit 1 << side for each side that is limited. */
unsigned throttle_sides(const struct throttle *t);
/* 0: the next request of this side may go now; else the nanoseconds until it may. */
uint64_t throttle_wait(struct throttle *t, enum throttle_side side, uint64_t now);
/* A request of `bytes` goes, allowed or not. */
void throttle_charge(struct throttle *t, enum throttle_side side, uint64_t bytes, uint64_t now);
