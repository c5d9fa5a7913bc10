/* SPDX-License-Identifier: Apache-2.0 */
/* Tests of the scanner: what is cut out of a stream, what is refused, how it goes on, how fast. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "base/bytes.h"
#include "base/mem.h"
#include "qmp/scan.h"
#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <time.h>

/* Feeds `in` in pieces of `piece` bytes and writes what comes out, "value|value|!error|". */
static void outcome(struct scan *s, const char *in, size_t len, size_t piece, char *out,
                    size_t size)
{
    size_t n = 0;

    out[0] = '\0';
    while (len) {
        const char *p = in;
        size_t left = MIN(piece, len);
        struct tide_error err;
        int r;
        in += left;
        len -= left;
        while ((r = scan_next(s, &p, &left, &err)) != 0) {
            if (r > 0)
                n += snprintf(out + n, size - n, "%.*s|", (int)s->value_len, s->value);
            else
                n += snprintf(out + n, size - n, "!%s|", err.msg);
            assert_true(n < size);
        }
        assert_int_equal(left, 0);
    }
}

static void expect_len(const char *in, size_t len, const char *want)
{
    char out[2000];

    for (size_t piece = 1; piece <= len; piece = piece < 4 ? piece + 1 : piece * 2) {
        struct scan s;
        scan_init(&s);
        outcome(&s, in, len, piece, out, sizeof out);
        assert_string_equal(out, want);
        scan_fini(&s);
    }
}
#define EXPECT(in, want) expect_len(in, sizeof in - 1, want)

static void values_are_cut(void **state)
{
    EXPECT("{}", "{}|");
    EXPECT("{\"a\": [1, 2]}\r\n", "{\"a\":[1,2]}|");
    EXPECT("{}{}[]\n {}", "{}|{}|[]|{}|");
    EXPECT("{\n\"a\"\n:\n1\n}", "{\"a\":1 }|");
    EXPECT("{\"}\":\"{\\\"\"}x ", "{\"}\":\"{\\\"\"}|x|");
    EXPECT("", "");
    EXPECT("{\"a\":", "");
}

static void scalars_end_at_the_next_byte(void **state)
{
    EXPECT("null", "");
    EXPECT("null ", "null|");
    EXPECT("12\n-3.5e1\ntrue{}", "12|-3.5e1|true|{}|");
    EXPECT("\"s\"\"t\"", "\"s\"|\"t\"|");
    EXPECT("[1 2]", "[1 2]|"); /* wrong, but not ours to mend */
}

static void single_quotes_become_double(void **state)
{
    EXPECT("{'execute':'x'}", "{\"execute\":\"x\"}|");
    EXPECT("'say \"hi\"'", "\"say \\\"hi\\\"\"|");
    EXPECT("'it\\'s'", "\"it's\"|");
    EXPECT("\"it's \\'so\\'\"", "\"it's 'so'\"|");
    EXPECT("'\\\"'", "\"\\\"\"|");
    EXPECT("'\\\\'", "\"\\\\\"|");
}

static void huge_integers_become_numbers(void **state)
{
    EXPECT("9223372036854775807 ", "9223372036854775807|");
    EXPECT("-9223372036854775808 ", "-9223372036854775808|");
    EXPECT("9223372036854775808 ", "9223372036854775808e0|");
    EXPECT("-9223372036854775809,", "-9223372036854775809e0|!',' cannot stand here in JSON|");
    EXPECT("[123456789012345678901234567890]", "[123456789012345678901234567890e0]|");
    EXPECT("{\"a\":99999999999999999999.5}", "{\"a\":99999999999999999999.5}|");
    EXPECT("'99999999999999999999'", "\"99999999999999999999\"|");
}

static void errors_skip_to_the_next_line(void **state)
{
    EXPECT("} {}\n{}", "!'}' cannot stand here in JSON|{}|");
    EXPECT("{]}\n[]", "!']' closes something that was not opened by its like|[]|");
    EXPECT("[}]\n[]", "!'}' closes something that was not opened by its like|[]|");
    EXPECT("{\"a\": /* no */ 1}\n[]", "!'/' cannot stand here in JSON|[]|");
    EXPECT("%d\n[]", "!'%' cannot stand here in JSON|[]|");
    EXPECT("\001\n[]", "!byte 0x01 cannot stand in JSON outside of a string|[]|");
    EXPECT("\0\n[]", "!byte 0x00 cannot stand in JSON outside of a string|[]|");
    EXPECT("{\"a\":\"b\n{}", "!a JSON string has no end in its line (byte 0x0a)|{}|");
    EXPECT("{\"a\":\"b\\\n{}", "!a JSON string has no end in its line (byte 0x0a)|{}|");
    EXPECT("\"\t\"\n{}", "!byte 0x09 in a JSON string has to be escaped|{}|");
    EXPECT("\"\0\"\n{}", "!byte 0x00 in a JSON string has to be escaped|{}|");
}

static void byte_ff_starts_afresh(void **state)
{
#define AFRESH "!byte 0xff starts afresh: what came before is dropped|"
    EXPECT("\xff{}", AFRESH "{}|");
    EXPECT("{\"a\":\"\xff{}", AFRESH "{}|");
    EXPECT("{\"a\":\"\\\xff{}", AFRESH "{}|");
    EXPECT("[[[\xff{}", AFRESH "{}|");
    EXPECT("12\xff{}", "12|" AFRESH "{}|");
    EXPECT("} junk \xff{}", "!'}' cannot stand here in JSON|{}|");
}

static void words_are_left_to_the_parser(void **state)
{
    EXPECT("{foo}hello\n", "{foo}|hello|");
    EXPECT("{\"a\":01,}\n", "{\"a\":01,}|");
}

/* ---- limits ---- */

static void depth_is_limited(void **state)
{
    struct scan s;
    char in[3000], out[200];

    scan_init(&s);
    memset(in, '[', 1024);
    memset(in + 1024, ']', 1024);
    const char *p = in;
    size_t len = 2048;
    struct tide_error err;
    assert_int_equal(scan_next(&s, &p, &len, &err), 1);
    assert_int_equal(s.value_len, 2048);

    memset(in, '[', 1025);
    outcome(&s, in, 1025, 1025, out, sizeof out);
    assert_string_equal(out, "!a JSON value is nested deeper than 1024 levels|");
    outcome(&s, "]]\n{}", 5, 1, out, sizeof out);
    assert_string_equal(out, "{}|");
    scan_fini(&s);
}

static void size_and_tokens_are_limited(void **state)
{
    struct scan s;
    char out[200];

    scan_init(&s);
    s.max_size = 8;
    outcome(&s, "[123456]\n[1234567]\n'123456' '1234567'\n{}", 40, 3, out, sizeof out);
    assert_string_equal(out, "[123456]|!a JSON value is longer than 8 bytes|\"123456\"|"
                             "!a JSON value is longer than 8 bytes|{}|");
    s.max_size = 100;
    s.max_tokens = 5;
    outcome(&s, "[1,2][1,2,3]\n[]", 15, 2, out, sizeof out);
    assert_string_equal(out, "[1,2]|!a JSON value has more than 5 parts|[]|");
    scan_fini(&s);
}

static void lack_of_memory_is_survived(void **state)
{
    struct scan s;
    struct tide_error err;
    const char *p = "{\"a\":1}\n{}";
    size_t len = strlen(p);

    scan_init(&s);
    mem_fail_after(1);
    assert_int_equal(scan_next(&s, &p, &len, &err), -ENOMEM);
    mem_fail_after(0);
    assert_int_equal(scan_next(&s, &p, &len, &err), 1);
    assert_string_equal(s.value, "{}");
    scan_fini(&s);
}

/* ---- speed: a bound that only a quadratic or wasteful scanner misses ---- */

static double feed_ms(const char *text, size_t len, size_t piece)
{
    struct scan s;
    struct timespec a, b;
    size_t values = 0;

    scan_init(&s);
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &a);
    for (size_t off = 0; off < len; off += piece) {
        const char *p = text + off;
        size_t left = MIN(piece, len - off);
        struct tide_error err;
        int r;
        while ((r = scan_next(&s, &p, &left, &err)) != 0) {
            assert_int_equal(r, 1);
            values++;
        }
    }
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &b);
    assert_int_equal(values, 1);
    scan_fini(&s);
    return (b.tv_sec - a.tv_sec) * 1e3 + (b.tv_nsec - a.tv_nsec) / 1e6;
}

static void a_mebibyte_is_quick(void **state)
{
    static const char item[] =
        "{\"type\":\"block-dirty-bitmap-add\",\"data\":{\"node\":\"disk0\"}},";
    size_t size = MIB, n = 0;
    char *text = mem_zalloc_or_die(size + 100);

    text[n++] = '[';
    while (n < size) {
        memcpy(text + n, item, sizeof item - 1);
        n += sizeof item - 1;
    }
    text[n - 1] = ']';
    double whole = feed_ms(text, n, n), bytes = feed_ms(text, n, 1);
    print_message("# 1 MiB: %.2f ms in one piece, %.2f ms byte by byte\n", whole, bytes);
    assert_true(whole < 500);
    assert_true(bytes < 2000);
    mem_free(text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(values_are_cut),
        cmocka_unit_test(scalars_end_at_the_next_byte),
        cmocka_unit_test(single_quotes_become_double),
        cmocka_unit_test(huge_integers_become_numbers),
        cmocka_unit_test(errors_skip_to_the_next_line),
        cmocka_unit_test(byte_ff_starts_afresh),
        cmocka_unit_test(words_are_left_to_the_parser),
        cmocka_unit_test(depth_is_limited),
        cmocka_unit_test(size_and_tokens_are_limited),
        cmocka_unit_test(lack_of_memory_is_survived),
        cmocka_unit_test(a_mebibyte_is_quick),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
