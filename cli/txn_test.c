/* SPDX-License-Identifier: Apache-2.0 */
/* Lists of actions as text: what each form means, what is refused and in which words, that writing
 * and reading are each other's inverse, and that no bytes do any harm. */
#include "base/mem.h"
#include "cli/txn_text.h"
#include "cli/txn_verbs.h"
#include "schema/random_test.h"
#include "schema/types.h"
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#define TEST(name) static void name(void **state)
#define B "block-dirty-bitmap-"

static json_t *read_one(const char *text)
{
    struct txn_list list;
    struct tide_error err;
    if (txn_list_parse("list", text, strlen(text), &list, &err) < 0)
        fail_msg("%s: %s", text, err.msg);
    assert_int_equal(json_array_size(list.actions), 1);
    json_t *action = json_incref(json_array_get(list.actions, 0));
    txn_list_free(&list);
    return action;
}

/* ---- forms ---- */

TEST(short_forms_mean_what_they_say)
{
    static const struct {
        const char *text, *kind, *data;
    } cases[] = {
        {"add disk0/b1 granularity=64K disabled", B "add",
         "{'node':'disk0','name':'b1','granularity':65536,'disabled':true}"},
        {"add disk0/b1 granularity=1.5K", B "add",
         "{'node':'disk0','name':'b1','granularity':1536}"},
        {"add disk0/b1 disabled=off persistent=yes", B "add",
         "{'node':'disk0','name':'b1','disabled':false,'persistent':true}"},
        {"\tremove  disk0/b1 # gone", B "remove", "{'node':'disk0','name':'b1'}"},
        {"clear disk0/b#1\r", B "clear", "{'node':'disk0','name':'b#1'}"},
        {"enable disk0/7", B "enable", "{'node':'disk0','name':'7'}"},
        {"disable \"disk 0\"/\"a/b\"", B "disable", "{'node':'disk 0','name':'a/b'}"},
        {"merge disk0/b1 <- b0 disk1/x", B "merge",
         "{'node':'disk0','target':'b1','bitmaps':['b0',{'node':'disk1','name':'x'}]}"},
        {"merge disk0/b1 from \"from\" d1/\"a/b\" \"disk1/x\"", B "merge",
         "{'node':'disk0','target':'b1','bitmaps':['from',{'node':'d1','name':'a/b'},'disk1/x']}"},
        {"merge disk0/b1 from", B "merge", "{'node':'disk0','target':'b1','bitmaps':[]}"},
        {"rename disk0/a to b", B "rename", "{'node':'disk0','name':'a','new-name':'b'}"},
        {"rename disk0/to to \"to\"", B "rename", "{'node':'disk0','name':'to','new-name':'to'}"},
        {"copy disk0/new from a disk1/b granularity=1M", B "copy",
         "{'node':'disk0','name':'new','bitmaps':['a',{'node':'disk1','name':'b'}],"
         "'granularity':1048576}"},
        {"copy disk0/new disabled from \"disabled\"", B "copy",
         "{'node':'disk0','name':'new','bitmaps':['disabled'],'disabled':true}"},
        {"backup disk0 to t0 job=j0 sync=incremental bitmap=b1", "blockdev-backup",
         "{'device':'disk0','target':'t0','job-id':'j0','sync':'incremental','bitmap':'b1'}"},
        {"backup disk0 to t0 sync=full speed=10M x-perf.max-workers=4", "blockdev-backup",
         "{'device':'disk0','target':'t0','sync':'full','speed':10485760,"
         "'x-perf':{'max-workers':4}}"},
        {"backup 7 to 8 sync=full job=9", "blockdev-backup",
         "{'device':'7','target':'8','sync':'full','job-id':'9'}"},
        {"abort", "abort", "{}"},
        {B "merge node=d target=t bitmaps.0=a bitmaps.1.node=e bitmaps.1.name=\"x,y\"", B "merge",
         "{'node':'d','target':'t','bitmaps':['a',{'node':'e','name':'x,y'}]}"},
        {B "merge node=d target=t bitmaps:=[\"a b\", {\"node\":\"e\",\"name\":\"x\"}]", B "merge",
         "{'node':'d','target':'t','bitmaps':['a b',{'node':'e','name':'x'}]}"},
        {B "clear name:=\"b\" node=\"a\\tb\\u00e4\\\"\"", B "clear",
         "{'node':'a\\tb\\u00e4\\u0022','name':'b'}"},
        {"x-" B "merge node=d dst_name=a src_name=b", "x-" B "merge",
         "{'node':'d','dst_name':'a','src_name':'b'}"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char json[400];
        snprintf(json, sizeof json, "%s", cases[i].data);
        for (char *p = json; *p; p++)
            *p = *p == '\'' ? '"' : *p;
        json_t *want = json_loads(json, 0, NULL), *got = read_one(cases[i].text);
        assert_non_null(want);
        assert_string_equal(json_string_value(json_object_get(got, "type")), cases[i].kind);
        if (!json_equal(json_object_get(got, "data"), want))
            fail_msg("%s is %s", cases[i].text, json_dumps(got, JSON_COMPACT));
        json_decref(want);
        json_decref(got);
    }
}

/* Verbs whose kind is no action yet say so; those whose kind is one are read. */
TEST(every_verb_has_its_kind_or_says_so)
{
    static const struct {
        const char *text, *kind;
    } cases[] = {
        {"export-add nbd id=e0 node=disk0 name=disk0 writable", "block-export-add"},
        {"export-del e0", "block-export-del"},
        {"export-set-node e0 to disk1", "block-export-set-node"},
        {"node-add file node=n0 filename=/x read-only", "blockdev-add"},
        {"node-del n0", "blockdev-del"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct txn_list list;
        struct tide_error err;
        int r = txn_list_parse("list", cases[i].text, strlen(cases[i].text), &list, &err);
        if (schema_branch(&q_transaction_action_type, cases[i].kind)) {
            if (r < 0)
                fail_msg("%s", err.msg);
            json_t *action = json_array_get(list.actions, 0);
            assert_string_equal(json_string_value(json_object_get(action, "type")), cases[i].kind);
            mem_autofree char *text = txn_action_text(action);
            assert_string_equal(text, cases[i].text);
            txn_list_free(&list);
        } else {
            assert_int_equal(r, -EINVAL);
            assert_non_null(strstr(err.msg, "this version has no action"));
        }
    }
    for (const struct txn_verb *v = txn_verbs; v->word; v++) {
        assert_ptr_equal(txn_verb_find(v->word), v);
        assert_ptr_equal(txn_verb_of_kind(v->kind), v);
        assert_memory_equal(v->usage, v->word, strlen(v->word));
    }
}

TEST(lines_and_comments)
{
    static const char text[] = "# first\n\n  abort\n\t# x\r\nabort # y\nclear d/b";
    struct txn_list list;
    struct tide_error err;
    assert_int_equal(txn_list_parse("list", text, sizeof text - 1, &list, &err), 0);
    assert_int_equal(json_array_size(list.actions), 3);
    assert_int_equal(list.lines[0], 3);
    assert_int_equal(list.lines[1], 5);
    assert_int_equal(list.lines[2], 6);
    assert_null(list.properties);
    txn_list_free(&list);
    assert_int_equal(txn_list_parse("list", "", 0, &list, &err), 0);
    assert_int_equal(json_array_size(list.actions), 0);
    txn_list_free(&list);
}

TEST(a_byte_order_mark_is_nothing)
{
    static const char *const texts[] = {"\xef\xbb\xbf"
                                        "abort\r\n",
                                        "\xef\xbb\xbf[{\"type\":\"abort\",\"data\":{}}]"};
    for (size_t i = 0; i < 2; i++) {
        json_t *action = read_one(texts[i]);
        assert_string_equal(json_string_value(json_object_get(action, "type")), "abort");
        json_decref(action);
    }
}

TEST(json_is_known_by_its_first_character)
{
    static const char text[] = " \n{\"actions\": [{\"type\": \"new-kind\", \"data\": {}}], "
                               "\"properties\": {\"completion-mode\": \"grouped\"}}";
    struct txn_list list;
    struct tide_error err;
    assert_int_equal(txn_list_parse("list", text, sizeof text - 1, &list, &err), 0);
    assert_int_equal(json_array_size(list.actions), 1);
    assert_non_null(json_object_get(list.properties, "completion-mode"));
    assert_null(list.lines);
    txn_list_free(&list);
    assert_int_equal(txn_list_parse("list", "[]", 2, &list, &err), 0);
    txn_list_free(&list);
}

/* ---- what is refused ---- */

TEST(errors_name_file_line_and_word)
{
    static const struct {
        const char *text, *why;
    } cases[] = {
        {"abort\nad d/b",
         "'list', line 2, word 'ad': there is no such action; did you mean 'add'?"},
        {"blockdev-backpu", "did you mean 'blockdev-backup'?"},
        {"nonsense", "'tidemark txn run --help' lists them"},
        {"\"add\" d/b", "word '\"add\"': there is no such action"},
        {"add", "line 1: 'add' needs more: add NODE/NAME"},
        {"add b", "word 'b': a bitmap is written NODE/NAME"},
        {"add \"d/b\"", "a bitmap is written NODE/NAME"},
        {"clear d/a/b", "word 'd/a/b': there is more than one '/'"},
        {"merge d/t from d/a/b", "word 'd/a/b': there is more than one '/'"},
        {"merge d/t a b", "word 'a': expected 'from' or KEY=VALUE here"},
        {"merge d/t", "needs 'from' and the bitmaps it takes"},
        {"rename d/a b", "word 'b': expected 'to'"},
        {"rename d/a \"to\" b", "word '\"to\"': expected 'to'"},
        {"rename d/a to", "'rename' needs more"},
        {"backup d to", "'backup' needs more"},
        {"backup d to sync=full", "'backup' needs more"},
        {"backup d to t", "line 1: 'backup': member 'sync' is missing"},
        {"backup d to t sync=fool", "member 'sync' cannot be 'fool'; did you mean 'full'?"},
        {"backup d to t sync=full sync=full", "'sync' is given twice"},
        {"backup d to t sync=full device=x", "'device' is given twice"},
        {"add d/b disabled disabled", "line 1: 'disabled=': 'disabled' is given twice"},
        {"add d/b disabled disabled=off", "'disabled' is given twice"},
        {"add d/b name:=\"x\"", "'name' is given twice"},
        {"add d/b granularity=64Q", "member 'granularity' must be a whole number, not '64Q'"},
        {"add d/b granularity=8G", "member 'granularity' must be between"},
        {"add d/b granularity", "member 'granularity' must be"},
        {"add d/b granulartiy=1", "did you mean 'granularity'?"},
        {"add d/b disabled=perhaps", "must be 'on' or 'off', not 'perhaps'"},
        {"copy d/n from a disabled", "word 'disabled': behind 'from' this is a bitmap: write "
                                     "\"disabled\" if it is one"},
        {"add d/b x=\"", "word 'x=\"': the quote is not closed"},
        {"add d/\"b", "the quote is not closed"},
        {"add d/\"b\\", "the quote is not closed"},
        {"add d/\"\\q\"", "what is in quotes is no JSON string"},
        {"add d/\"\\u0000\"", "zero byte"},
        {"add d/\x01", "a control character (byte 0x01) follows"},
        {"add d/\xff", "no valid UTF-8"},
        {"add d/b \xc3", "no valid UTF-8"},
        {"add d/b disabled:=tru", "what follows := is no JSON"},
        {"add d/b disabled:=true,", "there is more behind the JSON"},
        {"add d/b a.b:=1", "KEY:=JSON takes no dots"},
        {"add d/b ..=1", "the name before '=' is not valid"},
        {"add d/b =1", "the name before '=' is not valid"},
        {"add d/b \"disabled\"", "expected KEY=VALUE"},
        {"[1", "'list', line 1, column 2:"},
        {"{\"a\": 1}", "'list' has a member 'a'"},
        {"{}", "holds neither a list of actions nor an object with 'actions'"},
        {"{\"actions\": [], \"properties\": 1}", "'properties' must be an object"},
        {"[{\"type\": \"abort\", \"type\": \"abort\"}]", "duplicate"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct txn_list list;
        struct tide_error err;
        int r = txn_list_parse("list", cases[i].text, strlen(cases[i].text), &list, &err);
        if (r != -EINVAL || !strstr(err.msg, cases[i].why))
            fail_msg("%s: %d '%s', not '%s'", cases[i].text, r, r < 0 ? err.msg : "", cases[i].why);
        assert_null(list.actions);
        assert_memory_equal(err.msg, "'list'", 6);
    }
}

/* ---- writing ---- */

TEST(the_shortest_form_is_written)
{
    static const char *const lines[] = {
        "add disk0/b1 granularity=64K disabled",
        "add disk0/\"my bitmap\" disabled=off",
        "clear \"a/b\"/\"c=d\"",
        "merge disk0/b1 from b0 disk1/x \"from\"",
        "merge disk0/b1 from",
        "rename d/a to \"to\"",
        "copy disk0/new granularity=1M disabled from a \"disabled\" disk1/b",
        "backup disk0 to t0 sync=incremental bitmap=b1 job=j0 x-perf.max-workers=4",
        "abort",
        "x-" B "enable node=d name=\"\\u009b\\u007f\\u0007\"",
    };
    for (size_t i = 0; i < sizeof lines / sizeof *lines; i++) {
        json_t *action = read_one(lines[i]);
        mem_autofree char *text = txn_action_text(action);
        json_decref(action);
        assert_string_equal(text, lines[i]);
        json_t *again = read_one(text);
        action = read_one(lines[i]);
        assert_true(json_equal(again, action));
        json_decref(again);
        json_decref(action);
    }
}

static bool has_control(const char *s)
{
    for (; *s; s++) {
        unsigned char c = (unsigned char)*s, next = (unsigned char)s[1];
        if (c < 0x20 || c == 0x7f || (c == 0xc2 && next >= 0x80 && next <= 0x9f))
            return true;
    }
    return false;
}

TEST(what_the_schema_does_not_take_is_shown_as_json)
{
    static const char *const texts[] = {
        "{\"type\": \"new-kind\", \"data\": {\"a\": 1}}",
        "{\"type\": \"\xc2\x9b\x7f\\n\"}",
        "{\"type\": 1}",
        "[]",
        "7",
        "{\"type\": \"abort\", \"data\": {\"x\": null}}",
        "{\"type\": \"abort\"}",
        "{\"type\": \"block-dirty-bitmap-add\", \"data\": {\"node\": \"\\u0000\", \"name\": 1}}"};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        json_t *v = json_loads(texts[i], JSON_DECODE_ANY | JSON_ALLOW_NUL, NULL);
        mem_autofree char *text = txn_action_text(v);
        assert_false(has_control(text));
        json_t *again = json_loads(text, JSON_DECODE_ANY | JSON_ALLOW_NUL, NULL);
        assert_true(json_equal(v, again));
        json_decref(v);
        json_decref(again);
    }
}

TEST(writing_and_reading_are_inverse)
{
    uint64_t seed = 1;
    size_t n_json = 0, n = 20000;
    for (size_t i = 0; i < n; i++) {
        json_t *action = random_value(&q_transaction_action_type, &seed, 0);
        mem_autofree char *line = txn_action_text(action);
        if (has_control(line))
            fail_msg("number %zu steers a terminal: %s", i, line);
        n_json += *line == '{';
        json_t *again = *line == '{' ? json_loads(line, 0, NULL) : read_one(line);
        if (!json_equal(action, again))
            fail_msg("number %zu: %s", i, line);
        mem_autofree char *twice = txn_action_text(again);
        assert_string_equal(line, twice);
        json_decref(action);
        json_decref(again);
    }
    assert_int_equal(n_json, 0); /* there is a line for all that the schema takes */
}

/* ---- any bytes ---- */

TEST(random_bytes_do_no_harm)
{
    static const char *const pieces[] = {"add ",    "merge ",     "copy ",      "d/b",
                                         " from ",  " <- ",       "\"",         "\\",
                                         "\\u00",   "\n",         "=",          ":=",
                                         "{",       "[",          "}",          "]",
                                         "/",       "#",          ".",          "0",
                                         ",",       "\r",         "\t",         "\xc3",
                                         "\xa4",    "\x00",       "to ",        "abort ",
                                         "backup ", "sync=full ", "bitmaps.0=", "granularity=",
                                         "64K",     "disabled ",  B "merge ",   "null",
                                         "\"a\"",   "x-perf."};
    uint64_t seed = 2;
    size_t good = 0;
    for (int i = 0; i < 100000; i++) {
        char text[200];
        size_t len = 0;
        for (unsigned n = random_below(&seed, 12); n > 0; n--) {
            const char *p = pieces[random_below(&seed, sizeof pieces / sizeof *pieces)];
            size_t k = *p ? strlen(p) : 1;
            memcpy(text + len, p, k);
            len += k;
            if (random_below(&seed, 6) == 0)
                text[len++] = (char)random_next(&seed);
        }
        char *exact = mem_alloc(len + !len); /* so that the sanitizer sees the end */
        memcpy(exact, text, len);
        struct txn_list list;
        struct tide_error err = {0};
        int r = txn_list_parse("list", exact, len, &list, &err);
        if (r == 0) {
            good += json_array_size(list.actions) > 0;
            txn_list_free(&list);
        } else {
            assert_int_equal(r, -EINVAL);
            assert_int_equal(err.code, r);
            assert_true(strlen(err.msg) > 8);
        }
        mem_free(exact);
    }
    assert_true(good > 100); /* the bytes are not only nonsense */
}

TEST(long_lists_and_lines)
{
    size_t n = 100000;
    char *text = mem_alloc(n * 12), *p = text;
    for (size_t i = 0; i < n; i++)
        p += sprintf(p, "clear d/b\n");
    struct txn_list list;
    struct tide_error err;
    assert_int_equal(txn_list_parse("list", text, (size_t)(p - text), &list, &err), 0);
    assert_int_equal(json_array_size(list.actions), n);
    assert_int_equal(list.lines[n - 1], n);
    txn_list_free(&list);
    p = text + sprintf(text, "merge d/b from");
    for (size_t i = 0; i < 10000; i++)
        p += sprintf(p, " b%zu", i);
    assert_int_equal(txn_list_parse("list", text, (size_t)(p - text), &list, &err), 0);
    json_t *data = json_object_get(json_array_get(list.actions, 0), "data");
    assert_int_equal(json_array_size(json_object_get(data, "bitmaps")), 10000);
    txn_list_free(&list);
    mem_free(text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(short_forms_mean_what_they_say),
        cmocka_unit_test(every_verb_has_its_kind_or_says_so),
        cmocka_unit_test(lines_and_comments),
        cmocka_unit_test(a_byte_order_mark_is_nothing),
        cmocka_unit_test(json_is_known_by_its_first_character),
        cmocka_unit_test(errors_name_file_line_and_word),
        cmocka_unit_test(the_shortest_form_is_written),
        cmocka_unit_test(what_the_schema_does_not_take_is_shown_as_json),
        cmocka_unit_test(writing_and_reading_are_inverse),
        cmocka_unit_test(random_bytes_do_no_harm),
        cmocka_unit_test(long_lists_and_lines),
    };
    return cmocka_run_group_tests_name("txn_text", tests, NULL, NULL);
}
