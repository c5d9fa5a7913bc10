/* SPDX-License-Identifier: Apache-2.0 */
/* The model of what a client may observe: it allows what NBD allows, and refutes the rest. */
#include "model.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

#define U MODEL_UNIT
#define SIZE (8 * U)

static uint64_t tick;

static struct model *fresh(void)
{
    tick = 0;
    return model_new(SIZE);
}

static uint32_t send_at(struct model *m, enum model_kind kind, bool fua, uint64_t off, uint64_t len)
{
    return model_send(m, kind, fua, off, len, ++tick);
}

/* A write over everything, sent and answered. */
static uint32_t put(struct model *m, enum model_kind kind, bool fua)
{
    uint32_t w = send_at(m, kind, fua, 0, SIZE);
    model_done(m, w, ++tick);
    return w;
}

static void flush(struct model *m)
{
    uint64_t sent = ++tick;
    ++tick;
    model_flush(m, sent);
}

/* What all of the disk holds after write `w` alone; 0: zeroes. */
static void bytes_of(const struct model *m, uint32_t w, uint8_t *buf)
{
    memset(buf, 0, SIZE);
    if (w)
        model_data(m, w, buf);
}

static bool reads_from(struct model *m, uint32_t w, uint64_t sent)
{
    uint8_t buf[SIZE];
    bytes_of(m, w, buf);
    return !model_read(m, 0, SIZE, buf, sent, ++tick);
}

static bool reads(struct model *m, uint32_t w)
{
    uint64_t sent = ++tick;
    return reads_from(m, w, sent);
}

static bool survives(struct model *m, uint32_t w)
{
    uint8_t buf[SIZE];
    bytes_of(m, w, buf);
    return !model_survivor(m, 0, SIZE, buf, false);
}

static bool survives_kill(struct model *m, uint32_t w)
{
    uint8_t buf[SIZE];
    bytes_of(m, w, buf);
    return !model_survivor(m, 0, SIZE, buf, true);
}

/* ------------------------------------------------------------------ reads */

static void a_stale_read_is_refuted(void **state)
{
    struct model *m = fresh();
    assert_true(reads(m, 0));
    uint32_t a = put(m, MODEL_WRITE, false);
    assert_false(reads(m, 0));
    assert_true(reads(m, a));
    uint32_t b = put(m, MODEL_WRITE, false);
    assert_false(reads(m, a));
    assert_true(reads(m, b));
    put(m, MODEL_ZERO, false);
    assert_false(reads(m, b));
    assert_true(reads(m, 0));
    model_free(m);
}

static void until_the_answer_both_may_be_read(void **state)
{
    struct model *m = fresh();
    uint64_t early = ++tick;
    uint32_t a = send_at(m, MODEL_WRITE, false, 0, SIZE);
    assert_true(reads(m, 0));
    assert_true(reads(m, a));
    assert_true(reads(m, 0)); /* nothing forbids going back while it is under way */
    uint64_t before = ++tick;
    model_done(m, a, ++tick);
    assert_true(reads_from(m, 0, before)); /* sent before the answer */
    assert_true(reads_from(m, 0, early));
    assert_false(reads(m, 0));
    model_free(m);
}

/* A read that was under way when its version was replaced, durably. */
static void a_slow_read_may_be_old(void **state)
{
    struct model *m = fresh();
    uint64_t sent = ++tick;
    put(m, MODEL_WRITE, true);
    uint32_t b = put(m, MODEL_WRITE, false);
    flush(m);
    assert_true(reads_from(m, 0, sent));
    assert_false(survives(m, 0));
    assert_false(reads(m, 0));
    model_horizon(m, ++tick);
    assert_true(reads(m, b));
    model_free(m);
}

static void what_is_sent_later_is_not_read_yet(void **state)
{
    struct model *m = fresh();
    uint8_t buf[SIZE];
    uint64_t sent = ++tick, told = ++tick;
    uint32_t a = put(m, MODEL_WRITE, false);
    bytes_of(m, a, buf);
    assert_non_null(model_read(m, 0, SIZE, buf, sent, told));
    model_free(m);
}

static void concurrent_writes_end_either_way_and_a_read_decides(void **state)
{
    struct model *m = fresh();
    uint32_t a = send_at(m, MODEL_WRITE, false, 0, SIZE);
    uint32_t b = send_at(m, MODEL_WRITE, false, 0, SIZE);
    model_done(m, b, ++tick);
    model_done(m, a, ++tick);
    assert_false(reads(m, 0));
    assert_true(survives(m, a) && survives(m, b) && survives(m, 0));
    assert_true(reads(m, b)); /* from now on a is below b */
    assert_false(reads(m, a));
    assert_true(reads(m, b));
    assert_true(survives(m, a)); /* which nobody made durable */
    flush(m);
    assert_false(survives(m, a));
    assert_true(survives(m, b));
    model_free(m);
}

static void each_unit_decides_for_itself(void **state)
{
    struct model *m = fresh();
    uint8_t x[SIZE], y[SIZE];
    uint32_t a = send_at(m, MODEL_WRITE, false, 0, SIZE);
    uint32_t b = send_at(m, MODEL_WRITE, false, 0, SIZE);
    model_done(m, a, ++tick);
    model_done(m, b, ++tick);
    bytes_of(m, a, x);
    bytes_of(m, b, y);
    memcpy(x + 2 * U, y + 2 * U, U);
    uint64_t sent = ++tick;
    assert_null(model_read(m, 0, SIZE, x, sent, ++tick));
    assert_null(model_survivor(m, 0, SIZE, x, false));
    sent = ++tick;
    assert_non_null(model_read(m, 2 * U, U, x, sent, ++tick)); /* in the wrong place */
    x[5] ^= 1;
    assert_non_null(model_read(m, 0, U, x, sent, ++tick)); /* neither of the two */
    model_free(m);
}

/* A read that meets a write may see the beginning of one and the end of the other; not so when the
 * write was answered before, and never after a power cut. */
static void a_unit_is_torn_only_while_it_is_written(void **state)
{
    struct model *m = fresh();
    uint8_t x[SIZE], y[SIZE];
    uint32_t a = put(m, MODEL_WRITE, false);
    uint32_t b = send_at(m, MODEL_WRITE, false, 0, SIZE);
    bytes_of(m, a, x);
    bytes_of(m, b, y);
    memcpy(x, y, U / 2 + 3);
    uint64_t sent = ++tick;
    assert_null(model_read(m, 0, SIZE, x, sent, ++tick));
    assert_non_null(model_survivor(m, 0, SIZE, x, false));
    model_done(m, b, ++tick);
    assert_null(model_read(m, 0, SIZE, x, sent, ++tick));
    sent = ++tick;
    assert_non_null(model_read(m, 0, SIZE, x, sent, ++tick));
    model_free(m);
}

static void a_failed_write_may_be_there_or_not(void **state)
{
    struct model *m = fresh();
    uint32_t a = put(m, MODEL_WRITE, false);
    uint32_t b = send_at(m, MODEL_WRITE, false, 0, SIZE);
    model_gone(m, b, ++tick);
    assert_true(reads(m, a));
    assert_true(reads(m, b));
    assert_true(reads(m, a));
    assert_false(reads(m, 0));
    uint32_t c = put(m, MODEL_WRITE, false); /* the next that succeeds ends it */
    assert_false(reads(m, a) || reads(m, b));
    assert_true(reads(m, c));
    model_free(m);
}

static void an_orphan_may_come_late_but_not_after_the_server_let_go(void **state)
{
    struct model *m = fresh();
    uint32_t a = send_at(m, MODEL_WRITE, false, 0, SIZE); /* its client hangs up */
    uint32_t b = put(m, MODEL_WRITE, false);
    flush(m);
    assert_true(reads(m, b));
    assert_true(reads(m, a));
    assert_true(survives(m, a));
    model_gone(m, a, ++tick);
    assert_true(reads(m, a)); /* it was later than b perhaps */
    uint32_t c = put(m, MODEL_WRITE, false);
    assert_true(reads(m, c));
    assert_false(reads(m, a) || reads(m, b));
    model_free(m);
}

static void a_trim_leaves_anything_that_was_there(void **state)
{
    struct model *m = fresh();
    uint8_t junk[SIZE];
    uint32_t a = put(m, MODEL_WRITE, false);
    uint32_t b = put(m, MODEL_WRITE, true);
    put(m, MODEL_TRIM, true);
    assert_true(reads(m, 0) && reads(m, a) && reads(m, b) && reads(m, 0));
    assert_true(survives(m, a) && survives(m, 0));
    memset(junk, 7, sizeof junk);
    assert_non_null(model_read(m, 0, SIZE, junk, 100, 101));
    uint32_t c = put(m, MODEL_WRITE, false);
    assert_false(reads(m, 0) || reads(m, a) || reads(m, b));
    assert_true(reads(m, c));
    model_free(m);
}

/* ------------------------------------------------------------------ durability */

static void a_lost_flushed_write_is_refuted(void **state)
{
    struct model *m = fresh();
    uint32_t a = put(m, MODEL_WRITE, false);
    assert_true(survives(m, 0) && survives(m, a));
    flush(m);
    assert_false(survives(m, 0));
    uint32_t b = put(m, MODEL_WRITE, false);
    assert_true(survives(m, a) && survives(m, b));
    assert_false(survives(m, 0));
    model_free(m);
}

/* The flush covers what was answered before it was sent, and only that: what moves a later write in
 * front of it, or counts an answer that came too late, is told apart. */
static void a_flush_divides(void **state)
{
    struct model *m = fresh();
    uint32_t a = send_at(m, MODEL_WRITE, false, 0, SIZE);
    uint64_t sent = ++tick;
    model_done(m, a, ++tick);
    ++tick;
    model_flush(m, sent);
    assert_true(survives(m, 0)); /* it was under way */
    assert_true(survives(m, a));
    uint32_t b = put(m, MODEL_WRITE, false);
    flush(m);
    assert_false(survives(m, a) || survives(m, 0));
    assert_true(survives(m, b));
    model_free(m);
}

static void a_lost_fua_write_is_refuted(void **state)
{
    struct model *m = fresh();
    uint8_t buf[SIZE];
    uint32_t a = put(m, MODEL_WRITE, true);
    assert_true(survives(m, a));
    assert_false(survives(m, 0));
    bytes_of(m, a, buf);
    memset(buf + 3 * U, 0, U); /* one piece of it is missing */
    assert_non_null(model_survivor(m, 0, SIZE, buf, false));
    model_free(m);
}

static void fua_is_for_its_own_data(void **state)
{
    struct model *m = fresh();
    uint8_t buf[SIZE];
    uint32_t a = put(m, MODEL_WRITE, false);
    uint32_t b = send_at(m, MODEL_WRITE, true, 2 * U, U);
    model_done(m, b, ++tick);
    memset(buf, 0, sizeof buf); /* a is lost, b is not */
    model_data(m, b, buf + 2 * U);
    assert_null(model_survivor(m, 0, SIZE, buf, false));
    bytes_of(m, a, buf);
    assert_non_null(model_survivor(m, 0, SIZE, buf, false));
    model_data(m, b, buf + 2 * U);
    assert_null(model_survivor(m, 0, SIZE, buf, false));
    model_free(m);
}

static void a_kill_loses_nothing(void **state)
{
    struct model *m = fresh();
    uint32_t a = put(m, MODEL_WRITE, false);
    assert_false(survives_kill(m, 0));
    assert_true(survives_kill(m, a));
    uint32_t b = send_at(m, MODEL_WRITE, false, 0, SIZE);
    assert_true(survives_kill(m, a) && survives_kill(m, b));
    model_free(m);
}

static void after_a_failed_sync_the_answered_may_be_gone(void **state)
{
    struct model *m = fresh();
    uint32_t a = put(m, MODEL_WRITE, false);
    flush(m);
    uint32_t b = put(m, MODEL_WRITE, false);
    model_may_lose(m);
    assert_true(reads(m, a) && reads(m, b) && reads(m, a)); /* it fails just now */
    model_sync_failed(m);
    model_no_more_loss(m);
    assert_true(reads(m, b) && reads(m, a) && reads(m, b));
    flush(m); /* of the file, opened again: it does not bring b back */
    assert_true(survives(m, a) && survives(m, b));
    assert_false(survives(m, 0)); /* what had been flushed stays */
    uint32_t c = put(m, MODEL_WRITE, false);
    assert_false(reads(m, a));
    flush(m);
    assert_false(survives(m, a) || survives(m, b));
    assert_true(survives(m, c));
    model_free(m);
}

static void a_restart_begins_with_what_is_left(void **state)
{
    for (int killed = 0; killed < 2; killed++) {
        struct model *m = fresh();
        uint8_t buf[SIZE];
        uint32_t a = put(m, MODEL_WRITE, false);
        uint32_t b = send_at(m, MODEL_WRITE, false, 0, SIZE);
        bytes_of(m, b, buf);
        assert_null(model_survivor(m, 0, SIZE, buf, killed));
        model_restart(m, buf, ++tick, killed);
        assert_true(reads(m, b));
        assert_false(reads(m, a));
        assert_int_equal(survives(m, a), killed); /* the power did not go, it still can */
        assert_int_equal(survives(m, 0), killed);
        flush(m);
        assert_false(survives(m, a) || survives(m, 0));
        assert_true(survives(m, b));
        model_free(m);
    }
}

/* ------------------------------------------------------------------ block status and bitmaps */

static void a_lying_block_status_is_refuted(void **state)
{
    struct model *m = fresh();
    assert_null(model_zero(m, 0, SIZE, 1, 2));
    tick = 2;
    uint32_t a = send_at(m, MODEL_WRITE, false, 2 * U, U);
    uint64_t sent = ++tick;
    assert_null(model_zero(m, 0, SIZE, sent, ++tick));
    model_done(m, a, ++tick);
    uint64_t later = ++tick;
    assert_non_null(model_zero(m, 0, SIZE, later, ++tick));
    assert_null(model_zero(m, 0, 2 * U, later, ++tick));
    assert_null(model_zero(m, 0, SIZE, sent, ++tick));
    model_free(m);
}

static void a_bitmap_that_forgets_or_invents_is_refuted(void **state)
{
    struct model *m = fresh();
    uint32_t old = send_at(m, MODEL_WRITE, false, 0, U);
    model_done(m, old, ++tick);
    uint64_t since = ++tick;
    uint32_t a = send_at(m, MODEL_WRITE, false, 4 * U, U);
    uint64_t early = ++tick;
    model_done(m, a, ++tick);
    uint64_t now = ++tick;
    assert_null(model_clean(m, 0, 4 * U, since, now));
    assert_non_null(model_clean(m, 4 * U, 2 * U, since, now));
    assert_null(model_clean(m, 4 * U, 2 * U, since, early)); /* asked before the answer */
    assert_null(model_clean(m, 4 * U, 2 * U, early, now));   /* cleared while it was under way */
    assert_null(model_dirty(m, 4 * U, 2 * U, since));
    assert_non_null(model_dirty(m, 0, 2 * U, since));
    model_free(m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_stale_read_is_refuted),
        cmocka_unit_test(until_the_answer_both_may_be_read),
        cmocka_unit_test(a_slow_read_may_be_old),
        cmocka_unit_test(what_is_sent_later_is_not_read_yet),
        cmocka_unit_test(concurrent_writes_end_either_way_and_a_read_decides),
        cmocka_unit_test(each_unit_decides_for_itself),
        cmocka_unit_test(a_unit_is_torn_only_while_it_is_written),
        cmocka_unit_test(a_failed_write_may_be_there_or_not),
        cmocka_unit_test(an_orphan_may_come_late_but_not_after_the_server_let_go),
        cmocka_unit_test(a_trim_leaves_anything_that_was_there),
        cmocka_unit_test(a_lost_flushed_write_is_refuted),
        cmocka_unit_test(a_flush_divides),
        cmocka_unit_test(a_lost_fua_write_is_refuted),
        cmocka_unit_test(fua_is_for_its_own_data),
        cmocka_unit_test(a_kill_loses_nothing),
        cmocka_unit_test(after_a_failed_sync_the_answered_may_be_gone),
        cmocka_unit_test(a_restart_begins_with_what_is_left),
        cmocka_unit_test(a_lying_block_status_is_refuted),
        cmocka_unit_test(a_bitmap_that_forgets_or_invents_is_refuted),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
