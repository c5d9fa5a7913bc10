/* SPDX-License-Identifier: Apache-2.0 */
/* Levels are kept in units x 10^9, so that a rate of units per second leaks exactly its own number
 * each nanosecond: nothing is rounded, and after any number of requests the rate is still exact.
 * That takes more than 64 bits: rates go up to 10^15. */
#include "block/throttle.h"

#include <errno.h>
#include <string.h>

#include "base/bytes.h"

#define NANO 1000000000u
#define RATE_MAX 1000000000000000
#define LENGTH_MAX UINT32_MAX
#define LONGEST_WAIT (UINT64_MAX / 4) /* some centuries; can be added to any time */

/* In the order of struct throttle_limits. */
static const char *const names[THROTTLE_FIELDS] = {
    "bps-total",  "bps-total-max",  "bps-total-max-length",
    "bps-read",   "bps-read-max",   "bps-read-max-length",
    "bps-write",  "bps-write-max",  "bps-write-max-length",
    "iops-total", "iops-total-max", "iops-total-max-length",
    "iops-read",  "iops-read-max",  "iops-read-max-length",
    "iops-write", "iops-write-max", "iops-write-max-length",
    "iops-size",
};

/* The buckets that a request of each side goes through. */
static const enum throttle_bucket through[THROTTLE_SIDES][4] = {
    {THROTTLE_BPS_TOTAL, THROTTLE_IOPS_TOTAL, THROTTLE_BPS_READ, THROTTLE_IOPS_READ},
    {THROTTLE_BPS_TOTAL, THROTTLE_IOPS_TOTAL, THROTTLE_BPS_WRITE, THROTTLE_IOPS_WRITE},
};

const char *throttle_field_name(unsigned i)
{
    return names[i];
}

int64_t *throttle_field(struct throttle_limits *l, unsigned i)
{
    if (i == THROTTLE_FIELDS - 1)
        return &l->iops_size;
    struct throttle_limit *b = &l->limit[i / 3];
    return i % 3 == 0 ? &b->avg : i % 3 == 1 ? &b->max : &b->length;
}

/* ------------------------------------------------------------------ checks */

static int check_range(int64_t v, unsigned field, int64_t min, int64_t max, struct tide_error *err)
{
    if (v >= min && v <= max)
        return 0;
    return tide_fail(err, -EINVAL, "'%s' is %lld: it has to be from %lld to %lld", names[field],
                     (long long)v, (long long)min, (long long)max);
}

/* Members of one bucket, the first of which is `field`. */
static int check_limit(const struct throttle_limit *b, unsigned field, struct tide_error *err)
{
    int r = check_range(b->avg, field, 0, RATE_MAX, err);
    if (r == 0)
        r = check_range(b->max, field + 1, 0, RATE_MAX, err);
    if (r == 0)
        r = check_range(b->length, field + 2, 1, LENGTH_MAX, err);
    if (r < 0)
        return r;
    if (b->max && !b->avg)
        return tide_fail(err, -EINVAL, "'%s' without '%s': a burst needs the limit that it exceeds",
                         names[field + 1], names[field]);
    if (b->max && b->max < b->avg)
        return tide_fail(err, -EINVAL, "'%s' (%lld) is lower than '%s' (%lld)", names[field + 1],
                         (long long)b->max, names[field], (long long)b->avg);
    if (b->length > 1 && !b->max)
        return tide_fail(err, -EINVAL, "'%s' without '%s': say how fast the burst is",
                         names[field + 2], names[field + 1]);
    if (b->max && b->length > RATE_MAX / b->max)
        return tide_fail(err, -EINVAL, "'%s' x '%s' is more than %lld: the burst is too long",
                         names[field + 1], names[field + 2], (long long)RATE_MAX);
    return 0;
}

/* `total` and the two buckets after it are about the same thing. */
static int check_sides(const struct throttle_limits *l, enum throttle_bucket total,
                       struct tide_error *err)
{
    const struct throttle_limit *t = &l->limit[total];
    for (unsigned side = 1; side <= THROTTLE_SIDES; side++) {
        bool avg = t[0].avg && t[side].avg, max = t[0].max && t[side].max;
        unsigned field = 3 * total + !avg;
        if (avg || max)
            return tide_fail(err, -EINVAL,
                             "'%s' and '%s' exclude each other: limit the sum or each side",
                             names[field], names[field + 3 * side]);
    }
    return 0;
}

int throttle_check(const struct throttle_limits *l, struct tide_error *err)
{
    int r = check_range(l->iops_size, THROTTLE_FIELDS - 1, 0, INT64_MAX, err);
    if (r == 0)
        r = check_sides(l, THROTTLE_BPS_TOTAL, err);
    if (r == 0)
        r = check_sides(l, THROTTLE_IOPS_TOTAL, err);
    for (unsigned i = 0; i < THROTTLE_BUCKETS && r == 0; i++)
        r = check_limit(&l->limit[i], 3 * i, err);
    if (r == 0 && l->iops_size && !l->limit[THROTTLE_IOPS_TOTAL].avg &&
        !l->limit[THROTTLE_IOPS_READ].avg && !l->limit[THROTTLE_IOPS_WRITE].avg)
        r = tide_fail(err, -EINVAL, "'iops-size' without a limit of requests per second");
    return r;
}

/* ------------------------------------------------------------------ buckets */

static throttle_level brim(const struct throttle_limit *b)
{
    return b->max ? (throttle_level)b->max * b->length * NANO
                  : (throttle_level)b->avg * (NANO / 10);
}

static throttle_level burst_brim(const struct throttle_limit *b)
{
    return (throttle_level)b->max * (NANO / 10);
}

static void leak(throttle_level *level, int64_t rate, uint64_t ns)
{
    throttle_level gone = (throttle_level)rate * ns;
    *level -= MIN(*level, gone);
}

static void leak_all(struct throttle *t, uint64_t now)
{
    if (now <= t->leaked_at)
        return;
    for (unsigned i = 0; i < THROTTLE_BUCKETS; i++) {
        leak(&t->bucket[i].level, t->limits.limit[i].avg, now - t->leaked_at);
        leak(&t->bucket[i].burst, t->limits.limit[i].max, now - t->leaked_at);
    }
    t->leaked_at = now;
}

void throttle_init(struct throttle *t, const struct throttle_limits *l, uint64_t now)
{
    memset(t, 0, sizeof *t);
    t->limits = *l;
    t->leaked_at = now;
}

/* What is in a bucket when it becomes another one: it is as full as before, by parts of the whole,
 * and what is owed beyond that stays owed, but takes no longer to be paid than it would have. */
static throttle_level carry(throttle_level level, throttle_level old_brim, int64_t old_rate,
                            throttle_level new_brim, int64_t new_rate)
{
    if (!old_rate || !new_rate || (old_brim == new_brim && old_rate == new_rate))
        return new_rate && old_rate ? level : 0;
    throttle_level in = MIN(level, old_brim), owed = level - in;
    uint64_t part = (uint64_t)(((in << 32) + old_brim - 1) / old_brim);
    throttle_level ns = MIN(owed / old_rate, LONGEST_WAIT);
    return (new_brim * part >> 32) + MIN(owed, ns * new_rate);
}

void throttle_change(struct throttle *t, const struct throttle_limits *l, uint64_t now)
{
    leak_all(t, now);
    for (unsigned i = 0; i < THROTTLE_BUCKETS; i++) {
        const struct throttle_limit *from = &t->limits.limit[i], *to = &l->limit[i];
        t->bucket[i].level = carry(t->bucket[i].level, brim(from), from->avg, brim(to), to->avg);
        t->bucket[i].burst = carry(t->bucket[i].burst, burst_brim(from), from->max, burst_brim(to),
                                   to->length > 1 ? to->max : 0);
    }
    t->limits = *l;
}

unsigned throttle_sides(const struct throttle *t)
{
    unsigned sides = 0;
    for (unsigned side = 0; side < THROTTLE_SIDES; side++) {
        for (unsigned i = 0; i < 4; i++) {
            if (t->limits.limit[through[side][i]].avg)
                sides |= 1u << side;
        }
    }
    return sides;
}

/* Until `level` has leaked down to `full`. */
static uint64_t time_to(throttle_level level, throttle_level full, int64_t rate)
{
    if (level <= full)
        return 0;
    throttle_level ns = (level - full + rate - 1) / rate;
    return ns < LONGEST_WAIT ? (uint64_t)ns : LONGEST_WAIT;
}

uint64_t throttle_wait(struct throttle *t, enum throttle_side side, uint64_t now)
{
    uint64_t longest = 0;
    leak_all(t, now);
    for (unsigned i = 0; i < 4; i++) {
        enum throttle_bucket k = through[side][i];
        const struct throttle_limit *b = &t->limits.limit[k];
        if (!b->avg)
            continue;
        uint64_t ns = time_to(t->bucket[k].level, brim(b), b->avg);
        if (b->length > 1 && ns == 0)
            ns = time_to(t->bucket[k].burst, burst_brim(b), b->max);
        longest = MAX(longest, ns);
    }
    return longest;
}

void throttle_charge(struct throttle *t, enum throttle_side side, uint64_t bytes, uint64_t now)
{
    throttle_level requests = NANO;
    if (t->limits.iops_size && bytes > (uint64_t)t->limits.iops_size)
        requests = (throttle_level)bytes * NANO / t->limits.iops_size;
    leak_all(t, now);
    for (unsigned i = 0; i < 4; i++) {
        enum throttle_bucket k = through[side][i];
        if (!t->limits.limit[k].avg)
            continue;
        throttle_level units = k < THROTTLE_IOPS_TOTAL ? (throttle_level)bytes * NANO : requests;
        t->bucket[k].level += units;
        if (t->limits.limit[k].length > 1)
            t->bucket[k].burst += units;
    }
}
