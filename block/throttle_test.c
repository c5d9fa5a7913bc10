/* SPDX-License-Identifier: Apache-2.0 */
/* The arithmetic of throttling, with a clock that the test turns by hand. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

#include "block/throttle.h"

#define SECOND UINT64_C(1000000000)
#define START (77 * SECOND) /* clocks do not begin at 0 */
#define RATE_MAX INT64_C(1000000000000000)

/* No limits but for these members: "name", value, ..., NULL. */
static void limits(struct throttle_limits *l, const char *name, ...)
{
    va_list ap;
    *l = (struct throttle_limits)THROTTLE_NO_LIMITS;
    va_start(ap, name);
    for (; name; name = va_arg(ap, const char *)) {
        unsigned i = 0;
        while (strcmp(throttle_field_name(i), name))
            i++;
        *throttle_field(l, i) = va_arg(ap, int64_t);
    }
    va_end(ap);
}
#define N(x) ((int64_t)(x))

static void begin(struct throttle *t, const struct throttle_limits *l)
{
    struct tide_error err;
    assert_int_equal(throttle_check(l, &err), 0);
    throttle_init(t, l, START);
}

/* Requests of a client that always has one ready, up to and at `until` after the start. */
static unsigned run(struct throttle *t, enum throttle_side side, uint64_t bytes, uint64_t *now,
                    uint64_t until)
{
    unsigned n = 0;
    for (;;) {
        uint64_t wait = throttle_wait(t, side, *now);
        if (wait > until - *now) {
            *now = until;
            return n;
        }
        *now += wait;
        assert_true(throttle_wait(t, side, *now) == 0); /* it said how long, and that was it */
        throttle_charge(t, side, bytes, *now);
        n++;
    }
}

static unsigned count(const struct throttle_limits *l, enum throttle_side side, uint64_t bytes,
                      uint64_t seconds)
{
    struct throttle t;
    uint64_t now = START;
    begin(&t, l);
    return run(&t, side, bytes, &now, START + seconds * SECOND);
}

/* A tenth of a second's worth at once, one more that fills up, then the rate, for ever. */
static void rates_are_exact(void **state)
{
    struct throttle_limits l;
    limits(&l, "iops-total", N(100), NULL);
    assert_int_equal(count(&l, THROTTLE_READ, 4096, 0), 11);
    assert_int_equal(count(&l, THROTTLE_READ, 4096, 10), 1011);
    assert_int_equal(count(&l, THROTTLE_WRITE, 1, 10), 1011);
    assert_int_equal(count(&l, THROTTLE_WRITE, 4096, 3600), 360011);
    limits(&l, "iops-write", N(7), NULL); /* 0.7 go at once: the first, which fills up */
    assert_int_equal(count(&l, THROTTLE_WRITE, 4096, 100), 701);
    limits(&l, "bps-read", N(1048576), NULL);
    assert_int_equal(count(&l, THROTTLE_READ, 4096, 0), 26);
    assert_int_equal(count(&l, THROTTLE_READ, 4096, 10), 2586);
    assert_int_equal(count(&l, THROTTLE_READ, 33554432, 320),
                     11); /* 32 s each, the first at once */
}

/* Whoever measures in between gets no more and no less. */
static void looking_does_not_round(void **state)
{
    struct throttle t;
    struct throttle_limits l;
    uint64_t now = START;
    limits(&l, "iops-total", N(3), NULL);
    begin(&t, &l);
    unsigned n = run(&t, THROTTLE_READ, 1, &now, START);
    for (uint64_t i = 1; i <= 1000000; i++)
        n += run(&t, THROTTLE_READ, 1, &now, START + i * 10007); /* 10.007 s */
    assert_int_equal(n, 1 + 30);
}

static void sides_are_limited_by_themselves(void **state)
{
    struct throttle t;
    struct throttle_limits l;
    uint64_t a = START, b = START;
    limits(&l, "iops-read", N(10), NULL);
    begin(&t, &l);
    assert_int_equal(throttle_sides(&t), 1u << THROTTLE_READ);
    assert_int_equal(run(&t, THROTTLE_READ, 1, &a, START + SECOND), 12);
    assert_true(throttle_wait(&t, THROTTLE_WRITE, START + SECOND) == 0);
    limits(&l, "bps-write", N(10), NULL);
    begin(&t, &l);
    assert_int_equal(throttle_sides(&t), 1u << THROTTLE_WRITE);
    limits(&l, "iops-total", N(10), NULL);
    begin(&t, &l);
    assert_int_equal(throttle_sides(&t), 3);
    unsigned reads = run(&t, THROTTLE_READ, 1, &b, START + SECOND);
    assert_int_equal(reads, 12);
    assert_true(throttle_wait(&t, THROTTLE_WRITE, b) > 0); /* the reads have taken it */
    limits(&l, NULL);
    begin(&t, &l);
    assert_int_equal(throttle_sides(&t), 0);
}

static void the_narrowest_bucket_counts(void **state)
{
    struct throttle_limits l;
    limits(&l, "iops-total", N(100), "bps-total", N(40960), NULL);
    assert_int_equal(count(&l, THROTTLE_READ, 4096, 10), 102);
    assert_int_equal(count(&l, THROTTLE_READ, 1, 10), 1011);
}

static void bursts_last_as_long_as_said(void **state)
{
    /* 500 at once, then the rate. */
    struct throttle_limits l;
    limits(&l, "iops-total", N(10), "iops-total-max", N(500), NULL);
    assert_int_equal(count(&l, THROTTLE_READ, 1, 0), 501);
    assert_int_equal(count(&l, THROTTLE_READ, 1, 10), 601);
    /* 200 a second, until 5 seconds' worth of that is in the bucket, which leaks meanwhile. */
    limits(&l, "iops-total", N(100), "iops-total-max", N(200), "iops-total-max-length", N(5), NULL);
    assert_int_equal(count(&l, THROTTLE_READ, 1, 0), 21);
    assert_int_equal(count(&l, THROTTLE_READ, 1, 5), 1021);
    assert_int_equal(count(&l, THROTTLE_READ, 1, 20), 3001);
    limits(&l, "bps-write", N(1000), "bps-write-max", N(10000), "bps-write-max-length", N(60),
           NULL);
    assert_int_equal(count(&l, THROTTLE_WRITE, 100, 30), 3011);
    assert_int_equal(count(&l, THROTTLE_WRITE, 100, 100), 7001);
}

/* Who has been quiet may burst again. */
static void a_burst_comes_back(void **state)
{
    struct throttle t;
    struct throttle_limits l;
    uint64_t now = START;
    limits(&l, "iops-total", N(10), "iops-total-max", N(500), NULL);
    begin(&t, &l);
    assert_int_equal(run(&t, THROTTLE_READ, 1, &now, START), 501);
    now = START + 20 * SECOND;
    assert_int_equal(run(&t, THROTTLE_READ, 1, &now, now), 200);
    now += 1000 * SECOND;
    assert_int_equal(run(&t, THROTTLE_READ, 1, &now, now), 501);
}

static void long_requests_count_as_many(void **state)
{
    struct throttle_limits l;
    limits(&l, "iops-total", N(10), "iops-size", N(4096), NULL);
    assert_int_equal(count(&l, THROTTLE_READ, 4096, 100), 1002);
    assert_int_equal(count(&l, THROTTLE_READ, 1, 100), 1002);
    assert_int_equal(count(&l, THROTTLE_READ, 8192, 100), 501);
    assert_int_equal(count(&l, THROTTLE_READ, 10240, 100), 401); /* two and a half */
}

static void debts_are_paid(void **state)
{
    struct throttle t;
    struct throttle_limits l;
    limits(&l, "iops-total", N(100), NULL);
    begin(&t, &l);
    for (unsigned i = 0; i < 1000; i++)
        throttle_charge(&t, THROTTLE_WRITE, 512, START + 5 * SECOND);
    assert_true(throttle_wait(&t, THROTTLE_READ, START + 5 * SECOND) == 9900000000);
    assert_true(throttle_wait(&t, THROTTLE_READ, START + 14 * SECOND) == 900000000);
    assert_true(throttle_wait(&t, THROTTLE_READ, START + 15 * SECOND) == 0);
}

static void change(struct throttle *t, const char *name, int64_t value, uint64_t now)
{
    struct throttle_limits l;
    limits(&l, name, value, NULL);
    throttle_change(t, &l, now);
}

static void a_change_is_no_fresh_burst(void **state)
{
    struct throttle t;
    struct throttle_limits l;
    uint64_t now = START;
    limits(&l, "iops-total", N(100), NULL);
    begin(&t, &l);
    run(&t, THROTTLE_READ, 1, &now, START + SECOND);
    unsigned n = 0;
    for (unsigned i = 1; i <= 1000; i++) { /* the same again */
        throttle_change(&t, &l, now);
        n += run(&t, THROTTLE_READ, 1, &now, START + SECOND + i * SECOND / 1000);
    }
    assert_int_equal(n, 100);
    n = 0;
    for (unsigned i = 0; i < 1000; i++) { /* up and down, without a moment between */
        change(&t, "iops-total", N(100000), now);
        n += run(&t, THROTTLE_READ, 1, &now, now);
        change(&t, "iops-total", N(100), now);
        n += run(&t, THROTTLE_READ, 1, &now, now);
    }
    assert_in_range(n, 0,
                    1000); /* what one of them owed may be forgotten, not a tenth of a second */
    change(&t, "iops-total", N(1000), now);
    n = run(&t, THROTTLE_READ, 1, &now, now + SECOND);
    assert_in_range(n, 999, 1001);
    change(&t, "iops-total", N(0), now);
    assert_int_equal(throttle_sides(&t), 0);
    change(&t, "iops-total", N(10), now);
    assert_int_equal(run(&t, THROTTLE_READ, 1, &now, now), 2); /* as a new one */
}

static void a_change_makes_no_wait_longer(void **state)
{
    struct throttle t;
    struct throttle_limits l;
    limits(&l, "iops-total", N(1000), NULL);
    begin(&t, &l);
    for (unsigned i = 0; i < 5101; i++)
        throttle_charge(&t, THROTTLE_READ, 1, START);
    assert_true(throttle_wait(&t, THROTTLE_READ, START) == 5001 * (SECOND / 1000));
    change(&t, "iops-total", N(1), START); /* not 5001 s */
    assert_true(throttle_wait(&t, THROTTLE_READ, START) == 5001 * (SECOND / 1000));
    change(&t, "iops-total", N(10), START);
    assert_in_range(throttle_wait(&t, THROTTLE_READ, START), SECOND / 2, SECOND / 2 + SECOND / 9);
    change(&t, "iops-total", N(RATE_MAX), START);
    assert_true(throttle_wait(&t, THROTTLE_READ, START) < 1000);
}

static void nothing_overflows(void **state)
{
    struct throttle t;
    struct throttle_limits l;
    limits(&l, "bps-total", N(1), "iops-total", N(1), "iops-size", N(1), NULL);
    begin(&t, &l);
    for (unsigned i = 0; i < 1000; i++)
        throttle_charge(&t, THROTTLE_WRITE, UINT64_MAX, START);
    uint64_t wait = throttle_wait(&t, THROTTLE_READ, START);
    assert_true(wait >= UINT64_MAX / 4 && START + wait > START);
    assert_true(throttle_wait(&t, THROTTLE_READ, UINT64_MAX - 1) > 0);
    limits(&l, "bps-total", RATE_MAX, "iops-total", N(1), "bps-total-max", RATE_MAX, NULL);
    throttle_change(&t, &l, START);
    assert_true(throttle_wait(&t, THROTTLE_READ, START) > 0);
    limits(&l, "bps-total", N(1), "bps-total-max", N(1), NULL);
    throttle_change(&t, &l, START);
    assert_true(throttle_wait(&t, THROTTLE_READ, START) > 0);
    limits(&l, "bps-total", RATE_MAX, "bps-total-max", RATE_MAX, NULL);
    begin(&t, &l);
    throttle_charge(&t, THROTTLE_READ, 3 * (uint64_t)RATE_MAX, START);
    assert_true(throttle_wait(&t, THROTTLE_READ, START) == 2 * SECOND);
    assert_true(throttle_wait(&t, THROTTLE_READ, UINT64_MAX) == 0);
}

/* Loops read the clock a little before they get the lock. */
static void a_lagging_clock_does_no_harm(void **state)
{
    struct throttle t;
    struct throttle_limits l;
    limits(&l, "iops-total", N(10), NULL);
    begin(&t, &l);
    throttle_charge(&t, THROTTLE_READ, 1, START + SECOND);
    throttle_charge(&t, THROTTLE_READ, 1, START);
    assert_true(throttle_wait(&t, THROTTLE_READ, START) == 100000000);
    assert_true(throttle_wait(&t, THROTTLE_READ, START + SECOND) == 100000000);
    assert_true(throttle_wait(&t, THROTTLE_READ, START + SECOND + 100000000) == 0);
}

static void wrong_limits_are_refused(void **state)
{
    static const struct {
        const char *name;
        int64_t value;
        const char *name2;
        int64_t value2;
        const char *name3;
        int64_t value3;
        const char *fault; /* NULL: fine */
    } t[] = {
        {"iops-total", 0, "bps-total", 0, "iops-size", 0, NULL},
        {"iops-total", RATE_MAX, "bps-total", RATE_MAX, "iops-size", INT64_MAX, NULL},
        {"iops-read", 1, "iops-write", 2, "bps-total", 3, NULL},
        {"iops-read", 10, "iops-read-max", 10, "iops-read-max-length", 1, NULL},
        {"iops-read", 10, "iops-read-max", 20, "iops-read-max-length", UINT32_MAX, NULL},
        {"iops-read", 10, "iops-read-max", 1000000, "iops-read-max-length", 1000000000, NULL},
        {"iops-total", RATE_MAX + 1, "bps-total", 0, "iops-size", 0, "'iops-total'"},
        {"bps-write", -1, "bps-total", 0, "iops-size", 0, "'bps-write' is -1"},
        {"bps-write", INT64_MIN, "bps-total", 0, "iops-size", 0, "'bps-write'"},
        {"bps-write", 1, "bps-write-max", RATE_MAX + 1, "iops-size", 0, "'bps-write-max'"},
        {"iops-total", 1, "iops-size", -1, "bps-total", 0, "'iops-size'"},
        {"iops-size", 4096, "bps-total", 1, "iops-total", 0, "'iops-size'"},
        {"iops-total", 1, "iops-read", 1, "iops-size", 0, "'iops-total' and 'iops-read'"},
        {"bps-total", 1, "bps-write", 1, "iops-size", 0, "'bps-total' and 'bps-write'"},
        {"iops-read", 1, "iops-read-max", 2, "iops-total-max", 2,
         "'iops-total-max' and 'iops-read-max'"},
        {"iops-total-max", 5, "bps-total", 5, "iops-size", 0, "'iops-total-max' without"},
        {"iops-total", 10, "iops-total-max", 9, "bps-total", 0, "lower than 'iops-total'"},
        {"iops-total", 10, "iops-total-max-length", 2, "bps-total", 0, "'iops-total-max-length'"},
        {"iops-total", 10, "iops-total-max-length", 0, "bps-total", 0, "'iops-total-max-length'"},
        {"iops-total", 10, "iops-total-max", 20, "iops-total-max-length", (int64_t)UINT32_MAX + 1,
         "'iops-total-max-length'"},
        {"iops-total", 10, "iops-total-max", 1000000, "iops-total-max-length", 1000000001,
         "too long"},
    };
    for (unsigned i = 0; i < sizeof t / sizeof *t; i++) {
        struct tide_error err = {0};
        struct throttle_limits l;
        limits(&l, t[i].name, t[i].value, t[i].name2, t[i].value2, t[i].name3, t[i].value3, NULL);
        int r = throttle_check(&l, &err);
        if (!t[i].fault) {
            assert_int_equal(r, 0);
            continue;
        }
        assert_int_equal(r, -EINVAL);
        if (!strstr(err.msg, t[i].fault))
            fail_msg("row %u: '%s' does not say '%s'", i, err.msg, t[i].fault);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rates_are_exact),
        cmocka_unit_test(looking_does_not_round),
        cmocka_unit_test(sides_are_limited_by_themselves),
        cmocka_unit_test(the_narrowest_bucket_counts),
        cmocka_unit_test(bursts_last_as_long_as_said),
        cmocka_unit_test(a_burst_comes_back),
        cmocka_unit_test(long_requests_count_as_many),
        cmocka_unit_test(debts_are_paid),
        cmocka_unit_test(a_change_is_no_fresh_burst),
        cmocka_unit_test(a_change_makes_no_wait_longer),
        cmocka_unit_test(nothing_overflows),
        cmocka_unit_test(a_lagging_clock_does_no_harm),
        cmocka_unit_test(wrong_limits_are_refused),
    };
    return cmocka_run_group_tests_name("block", tests, NULL, NULL);
}
