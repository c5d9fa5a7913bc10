/* SPDX-License-Identifier: Apache-2.0 */
/* Tests of schema/: the parser over every kind of type and each thing it refuses, command line
 * options, the introspected schema. The rows are the real ones; kinds that no command uses yet are
 * tried with rows written here. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "base/mem.h"
#include "schema/random_test.h"
#include "schema/tables.h"
#include "schema/types.h"
#include <errno.h>
#include <stdio.h>
#include <string.h>

#define JSON_FLAGS (JSON_DECODE_ANY | JSON_ALLOW_NUL)

struct fixture {
    struct arena arena;
    struct tide_error err;
    json_t *value;
};

static void *parse_flags(struct fixture *f, const struct schema_type *t, const char *text,
                         unsigned flags)
{
    json_error_t e;
    void *out = NULL;

    json_decref(f->value);
    f->value = json_loads(text, JSON_FLAGS, &e);
    if (!f->value)
        fail_msg("%s: %s", text, e.text);
    int r = schema_parse(t, f->value, &f->arena, flags, &out, &f->err);
    assert_int_equal(r, out ? 0 : f->err.code);
    return out;
}

static void *parse(struct fixture *f, const struct schema_type *t, const char *text)
{
    void *out = parse_flags(f, t, text, 0);
    if (!out)
        fail_msg("%s: %s", text, f->err.msg);
    return out;
}

/* `text` is refused with exactly this message. */
static void refuse(struct fixture *f, const struct schema_type *t, const char *text,
                   const char *want)
{
    f->err = (struct tide_error){0};
    assert_null(parse_flags(f, t, text, 0));
    assert_int_equal(f->err.code, -EINVAL);
    assert_int_equal(f->err.class, TIDE_GENERIC);
    assert_string_equal(f->err.msg, want);
}

static int setup(void **state)
{
    *state = mem_new(struct fixture);
    return 0;
}

static int teardown(void **state)
{
    struct fixture *f = *state;
    json_decref(f->value);
    arena_free(&f->arena);
    mem_free(f);
    return 0;
}

/* ---- kinds ---- */

static void a_struct_is_filled(void **state)
{
    struct fixture *f = *state;
    const struct q_block_dirty_bitmap_add *a =
        parse(f, &q_block_dirty_bitmap_add_type,
              "{\"node\":\"n\\u00e9\",\"name\":\"b\",\"granularity\":65536,\"persistent\":true}");
    assert_string_equal(a->node, "n\xc3\xa9");
    assert_string_equal(a->name, "b");
    assert_true(a->has_granularity && a->granularity == 65536);
    assert_true(a->has_persistent && a->persistent);
    assert_false(a->has_disabled || a->disabled);
}

static void defaults_are_filled_in(void **state)
{
    struct fixture *f = *state;
    const struct q_blockdev_backup *b =
        parse(f, &q_blockdev_backup_type,
              "{\"device\":\"d\",\"target\":\"t\",\"sync\":\"full\",\"x-perf\":{}}");
    assert_true(b->auto_finalize && !b->has_auto_finalize);
    assert_int_equal(b->on_source_error, Q_BLOCKDEV_ON_ERROR_REPORT);
    assert_int_equal(b->sync, Q_MIRROR_SYNC_MODE_FULL);
    assert_null(b->job_id);
    assert_null(b->bitmap);
    assert_false(b->has_bitmap_mode);
    assert_int_equal(b->x_perf->max_workers, 64);
    assert_false(b->x_perf->has_max_workers);
}

static void no_arguments_are_an_empty_object(void **state)
{
    struct fixture *f = *state;
    void *out;
    assert_int_equal(schema_parse(&q_quit_type, NULL, &f->arena, 0, &out, &f->err), 0);
    assert_non_null(out);
    assert_int_equal(schema_parse(&q_job_pause_type, NULL, &f->arena, 0, &out, &f->err), -EINVAL);
    assert_string_equal(f->err.msg, "member 'id' is missing");
}

static void a_union_takes_its_branch(void **state)
{
    struct fixture *f = *state;
    const struct q_blockdev_options *o =
        parse(f, &q_blockdev_options_type,
              "{\"driver\":\"raw\",\"node-name\":\"r\",\"offset\":512,\"cache\":{\"direct\":true},"
              "\"file\":{\"driver\":\"host_device\",\"filename\":\"/dev/x\",\"aio\":\"native\"}}");
    assert_int_equal(o->driver, Q_BLOCKDEV_DRIVER_RAW);
    assert_true(o->cache->direct && !o->cache->no_flush);
    assert_true(o->u.raw.has_offset && o->u.raw.offset == 512 && !o->u.raw.has_size);
    assert_int_equal(o->u.raw.file->kind, Q_KIND_OBJECT);
    const struct q_blockdev_options *d = o->u.raw.file->object;
    assert_int_equal(d->driver, Q_BLOCKDEV_DRIVER_HOST_DEVICE);
    assert_string_equal(d->u.host_device.filename, "/dev/x");
    assert_int_equal(d->u.host_device.aio, Q_BLOCKDEV_AIO_OPTIONS_NATIVE);
    assert_int_equal(d->u.host_device.locking, Q_ON_OFF_AUTO_AUTO);

    o = parse(f, &q_blockdev_add_type, "{\"driver\":\"raw\",\"file\":\"other\"}");
    assert_int_equal(o->u.raw.file->kind, Q_KIND_STRING);
    assert_string_equal(o->u.raw.file->string, "other");
}

static void a_branch_may_have_no_members(void **state)
{
    struct fixture *f = *state;
    const struct q_block_export_options *e = parse(
        f, &q_block_export_options_type, "{\"type\":\"fuse\",\"id\":\"e\",\"node-name\":\"n\"}");
    assert_int_equal(e->type, Q_BLOCK_EXPORT_TYPE_FUSE);
    refuse(f, &q_block_export_options_type,
           "{\"type\":\"fuse\",\"id\":\"e\",\"node-name\":\"n\",\"mountpoint\":\"/x\"}",
           "member 'mountpoint' is not known here");
}

static void lists_know_empty_from_absent(void **state)
{
    struct fixture *f = *state;
    const struct q_block_export_options *e = parse(
        f, &q_block_export_options_type, "{\"type\":\"nbd\",\"id\":\"e\",\"node-name\":\"n\"}");
    assert_true(e->u.nbd.n_bitmaps == 0 && !e->u.nbd.bitmaps);

    const struct q_block_dirty_bitmap_merge *m = parse(
        f, &q_block_dirty_bitmap_merge_type, "{\"node\":\"n\",\"target\":\"t\",\"bitmaps\":[]}");
    assert_true(m->n_bitmaps == 0 && m->bitmaps);

    m = parse(f, &q_block_dirty_bitmap_merge_type,
              "{\"node\":\"n\",\"target\":\"t\","
              "\"bitmaps\":[\"a\",{\"node\":\"o\",\"name\":\"b\"}]}");
    assert_int_equal(m->n_bitmaps, 2);
    assert_string_equal(m->bitmaps[0].string, "a");
    assert_int_equal(m->bitmaps[1].kind, Q_KIND_OBJECT);
    assert_string_equal(m->bitmaps[1].object->name, "b");
}

static void a_wrapped_union_keeps_its_data(void **state)
{
    struct fixture *f = *state;
    const struct q_transaction *t =
        parse(f, &q_transaction_type,
              "{\"actions\":[{\"type\":\"abort\",\"data\":{}},"
              "{\"type\":\"x-block-dirty-bitmap-merge\",\"data\":"
              "{\"node\":\"n\",\"dst_name\":\"d\",\"src_name\":\"s\"}}],"
              "\"properties\":{\"completion-mode\":\"grouped\"}}");
    assert_int_equal(t->n_actions, 2);
    assert_int_equal(t->actions[0].type, Q_TRANSACTION_ACTION_KIND_ABORT);
    const struct q_x_block_dirty_bitmap_merge *m = t->actions[1].data;
    assert_string_equal(m->src_name, "s");
    assert_int_equal(t->properties->completion_mode, Q_ACTION_COMPLETION_MODE_GROUPED);

    const struct q_nbd_server_start *s = parse(
        f, &q_nbd_server_start_type, "{\"addr\":{\"type\":\"unix\",\"data\":{\"path\":\"/s\"}}}");
    const struct q_unix_socket_address *u = s->addr->data;
    assert_string_equal(u->path, "/s");
    assert_int_equal(s->max_connections, 100);

    const struct q_nbd_server_options *o =
        parse(f, &q_nbd_server_options_type, "{\"addr\":{\"type\":\"unix\",\"path\":\"/s\"}}");
    assert_string_equal(o->addr->u.unix_.path, "/s");
}

/* ---- rows of kinds that no command uses yet ---- */

struct own {
    double number;
    json_t *any;
    const char *str;
    struct own_alt {
        enum q_kind kind;
        const char *string;
    } * alt;
    size_t n_numbers;
    double *numbers;
    size_t n_words;
    const char **words;
};
static const struct schema_type own_alt_type = {.name = "StrOrNull",
                                                .kind = SCHEMA_ALTERNATE,
                                                .size = sizeof(struct own_alt),
                                                .has_string = true,
                                                .has_null = true,
                                                .string_off = offsetof(struct own_alt, string)};
static const struct schema_member own_members[] = {
    {"number", &schema_number_type, offsetof(struct own, number), SCHEMA_NO_AUX, 0, 0, NULL},
    {"any", &schema_any_type, offsetof(struct own, any), SCHEMA_NO_AUX, SCHEMA_OPTIONAL, 0, NULL},
    {"str", &schema_str_type, offsetof(struct own, str), SCHEMA_NO_AUX,
     SCHEMA_OPTIONAL | SCHEMA_DEFAULT, 0, "word"},
    {"alt", &own_alt_type, offsetof(struct own, alt), SCHEMA_NO_AUX, SCHEMA_OPTIONAL, 0, NULL},
    {"numbers", &schema_number_type, offsetof(struct own, numbers), offsetof(struct own, n_numbers),
     SCHEMA_OPTIONAL | SCHEMA_LIST, 0, NULL},
    {"words", &schema_str_type, offsetof(struct own, words), offsetof(struct own, n_words),
     SCHEMA_OPTIONAL | SCHEMA_LIST, 0, NULL},
};
static const struct schema_type own_type = {.name = "Own",
                                            .kind = SCHEMA_STRUCT,
                                            .size = sizeof(struct own),
                                            .members = own_members,
                                            .n_members = 6};

static void numbers_any_null_and_lists(void **state)
{
    struct fixture *f = *state;
    const struct own *o = parse(f, &own_type,
                                "{\"number\":2,\"any\":[null],\"alt\":null,"
                                "\"numbers\":[1,2.5],\"words\":[\"a\",\"b\"]}");
    assert_true(o->number == 2.0 && o->n_numbers == 2 && o->numbers[1] == 2.5);
    assert_true(json_is_array(o->any));
    assert_string_equal(o->str, "word");
    assert_int_equal(o->alt->kind, Q_KIND_NULL);
    assert_string_equal(o->words[1], "b");
    o = parse_flags(f, &own_type, "{\"number\":\"1.5\",\"alt\":\"s\"}", SCHEMA_KEYVAL);
    assert_true(o->number == 1.5);
    assert_string_equal(o->alt->string, "s");
    refuse(f, &own_type, "{\"number\":1,\"alt\":2}",
           "member 'alt' must be a string or null, not a whole number");
    refuse(f, &own_type, "{\"number\":\"1\"}", "member 'number' must be a number, not a string");
    assert_null(parse_flags(f, &own_type, "{\"number\":\"x\"}", SCHEMA_KEYVAL));
    assert_string_equal(f->err.msg, "member 'number' must be a number, not 'x'");
}

/* ---- refusals ---- */

static void members_are_checked(void **state)
{
    struct fixture *f = *state;
    const struct schema_type *add = &q_block_dirty_bitmap_add_type;

    refuse(f, add, "{\"node\":\"n\"}", "member 'name' is missing");
    refuse(f, add, "{\"node\":\"n\",\"name\":\"b\",\"zz\":1}", "member 'zz' is not known here");
    refuse(f, add, "{\"node\":\"n\",\"name\":\"b\",\"granularty\":1}",
           "member 'granularty' is not known here; did you mean 'granularity'?");
    refuse(f, &q_blockdev_add_type, "{\"driver\":\"null-co\",\"node_name\":\"b\"}",
           "member 'node_name' is not known here; did you mean 'node-name'?");
    refuse(f, add, "{\"node\":1,\"name\":\"b\"}",
           "member 'node' must be a string, not a whole number");
    refuse(f, add, "{\"node\":null,\"name\":\"b\"}", "member 'node' must be a string, not null");
    refuse(f, add, "{\"node\":\"a\\u0000b\",\"name\":\"b\"}",
           "member 'node' contains a zero byte (\\u0000)");
    refuse(f, add, "{\"node\":\"n\",\"name\":\"b\",\"persistent\":\"on\"}",
           "member 'persistent' must be true or false, not a string");
    refuse(f, add, "[]", "the arguments must be an object, not a list");
    refuse(f, add, "null", "the arguments must be an object, not null");
    refuse(f, &q_qmp_capabilities_type, "{\"enable\":[\"oob\",\"obb\"]}",
           "member 'enable[1]' cannot be 'obb'; did you mean 'oob'?");
    refuse(f, &q_qmp_capabilities_type, "{\"enable\":true}",
           "member 'enable' must be a list, not a boolean");
}

static void words_are_checked(void **state)
{
    struct fixture *f = *state;

    refuse(
        f, &q_blockdev_add_type, "{\"driver\":\"qcow9\"}",
        "member 'driver' cannot be 'qcow9'; it can be file, host_device, raw, null-co, null-aio, "
        "blkdebug, throttle");
    refuse(f, &q_blockdev_add_type, "{\"driver\":\"fil\"}",
           "member 'driver' cannot be 'fil'; did you mean 'file'?");
    refuse(f, &q_blockdev_add_type, "{\"driver\":{}}",
           "member 'driver' must be a string, not an object");
    refuse(f, &q_blockdev_add_type, "{\"driver\":\"file\\u0000\"}",
           "member 'driver' cannot be 'file?'; did you mean 'file'?");
    refuse(f, &q_transaction_type, "{\"actions\":[{\"type\":\"zzzzz\",\"data\":{}}]}",
           "member 'actions[0].type' cannot be 'zzzzz'");
}

static void paths_name_the_place(void **state)
{
    struct fixture *f = *state;
    const struct schema_type *t = &q_transaction_type;

    refuse(f, t, "{\"actions\":[{\"type\":\"block-dirty-bitmap-add\",\"data\":{\"name\":\"b\"}}]}",
           "member 'actions[0].data.node' is missing");
    refuse(f, t, "{\"actions\":[{\"type\":\"abort\"}]}", "member 'actions[0].data' is missing");
    refuse(f, t, "{\"actions\":[{\"type\":\"abort\",\"data\":{},\"dat\":1}]}",
           "member 'actions[0].dat' is not known here; did you mean 'data'?");
    refuse(f, t, "{\"actions\":[{\"type\":\"abort\",\"data\":{\"a\":1}}]}",
           "member 'actions[0].data.a' is not known here");
    refuse(f, t, "{\"actions\":[1]}", "member 'actions[0]' must be an object, not a whole number");
    refuse(f, t, "{\"actions\":[{}]}", "member 'actions[0].type' is missing");
    refuse(f, &q_block_dirty_bitmap_merge_type,
           "{\"node\":\"n\",\"target\":\"t\",\"bitmaps\":[\"a\",5]}",
           "member 'bitmaps[1]' must be a string or an object, not a whole number");
    refuse(f, &q_block_dirty_bitmap_merge_type,
           "{\"node\":\"n\",\"target\":\"t\",\"bitmaps\":[{\"node\":\"n\"}]}",
           "member 'bitmaps[0].name' is missing");
    refuse(f, &q_nbd_server_start_type, "{\"addr\":{\"type\":\"unix\",\"path\":\"/s\"}}",
           "member 'addr.data' is missing");
    refuse(f, &q_blockdev_add_type,
           "{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"f\",\"fild\":1}}",
           "member 'file.fild' is not known here");
}

static void ranges_are_checked(void **state)
{
    struct fixture *f = *state;
    char text[200];
    static const struct {
        const char *value, *want;
    } cases[] = {
        {"4294967295", NULL},
        {"4294967296", "member 'granularity' must be between 0 and 4294967295"},
        {"-1", "member 'granularity' must be between 0 and 4294967295"},
        {"1.0", "member 'granularity' must be a whole number in range, not a fractional or very "
                "large number"},
        {"12345678901234567890e0", "member 'granularity' must be a whole number in range, not a "
                                   "fractional or very large number"},
        {"\"1\"", "member 'granularity' must be a whole number in range, not a string"},
    };

    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        snprintf(text, sizeof text, "{\"node\":\"n\",\"name\":\"b\",\"granularity\":%s}",
                 cases[i].value);
        if (cases[i].want)
            refuse(f, &q_block_dirty_bitmap_add_type, text, cases[i].want);
        else
            parse(f, &q_block_dirty_bitmap_add_type, text);
    }
    const struct q_block_job_set_speed *s =
        parse(f, &q_block_job_set_speed_type, "{\"device\":\"j\",\"speed\":-9223372036854775808}");
    assert_true(s->speed == INT64_MIN);
    s = parse(f, &q_block_job_set_speed_type, "{\"device\":\"j\",\"speed\":9223372036854775807}");
    assert_true(s->speed == INT64_MAX);
    refuse(f, &q_blockdev_add_type,
           "{\"driver\":\"blkdebug\",\"image\":\"n\",\"max-transfer\":-2147483649}",
           "member 'max-transfer' must be between -2147483648 and 2147483647");
    const struct q_blockdev_options *o = parse(
        f, &q_blockdev_add_type, "{\"driver\":\"blkdebug\",\"image\":\"n\",\"max-transfer\":-5}");
    assert_int_equal(o->u.blkdebug.max_transfer, -5);
    const struct q_inet_socket_address *a =
        parse(f, &q_inet_socket_address_type, "{\"host\":\"h\",\"port\":\"1\",\"to\":65535}");
    assert_int_equal(a->to, 65535);
    refuse(f, &q_inet_socket_address_type, "{\"host\":\"h\",\"port\":\"1\",\"to\":65536}",
           "member 'to' must be between 0 and 65535");
}

static char *nested_raw(unsigned levels)
{
    char *text = mem_zalloc_or_die(levels * 40 + 100);
    size_t n = 0;
    for (unsigned i = 1; i < levels; i++)
        n += sprintf(text + n, "{\"driver\":\"raw\",\"file\":");
    n += sprintf(text + n, "{\"driver\":\"null-co\"}");
    for (unsigned i = 1; i < levels; i++)
        text[n++] = '}';
    return text;
}

static void nesting_is_bounded(void **state)
{
    struct fixture *f = *state;
    char *fits = nested_raw(64), *deep = nested_raw(65), *deeper = nested_raw(500);

    parse(f, &q_blockdev_add_type, fits);
    assert_null(parse_flags(f, &q_blockdev_add_type, deep, 0));
    assert_non_null(strstr(f->err.msg, "file.file.file' is nested deeper than 64 objects"));
    assert_null(parse_flags(f, &q_blockdev_add_type, deeper, 0));
    mem_free(fits);
    mem_free(deep);
    mem_free(deeper);
}

static void long_words_are_cut_at_a_character(void **state)
{
    struct fixture *f = *state;
    char text[400] = "{\"driver\":\"a";
    for (int i = 0; i < 100; i++)
        strcat(text, "\xc3\xa9");
    strcat(text, "\"}");
    assert_null(parse_flags(f, &q_blockdev_add_type, text, 0));
    json_t *back = json_string(f->err.msg); /* NULL if it is not UTF-8 */
    assert_non_null(back);
    json_decref(back);
    assert_non_null(strstr(f->err.msg, "\xc3\xa9...'"));
}

static void many_actions_are_quick_and_memory_may_fail(void **state)
{
    struct fixture *f = *state;
    json_t *list = json_array();
    for (int i = 0; i < 100000; i++)
        json_array_append_new(list, json_pack("{s:s,s:{s:s,s:s}}", "type", "block-dirty-bitmap-add",
                                              "data", "node", "n", "name", "b"));
    f->value = json_pack("{s:o}", "actions", list);
    void *out = NULL;
    assert_int_equal(schema_parse(&q_transaction_type, f->value, &f->arena, 0, &out, &f->err), 0);
    const struct q_transaction *t = out;
    assert_int_equal(t->n_actions, 100000);
    const struct q_block_dirty_bitmap_add *a = t->actions[99999].data;
    assert_string_equal(a->name, "b");
    arena_free(&f->arena);

    static const char small[] = "{\"actions\":[{\"type\":\"abort\",\"data\":{}}]}";
    json_decref(f->value);
    f->value = json_loads(small, 0, NULL);
    mem_fail_after(1);
    assert_int_equal(schema_parse(&q_transaction_type, f->value, &f->arena, 0, &out, &f->err),
                     -ENOMEM);
    mem_fail_after(0);
    assert_string_equal(f->err.msg, "not enough memory for the arguments");
}

/* ---- command line ---- */

static char *keyval_text(const char *text, const char *implied, struct tide_error *err)
{
    json_t *v = NULL;
    int r = keyval_parse(text, implied, &v, err);
    assert_int_equal(r, v ? 0 : err->code);
    char *out = v ? json_dumps(v, JSON_COMPACT) : NULL;
    json_decref(v);
    return out;
}

static void keyval_becomes_json(void **state)
{
    static const char *const cases[][3] = {
        {"driver=file,node-name=a,cache.direct=on", NULL,
         "{\"driver\":\"file\",\"node-name\":\"a\",\"cache\":{\"direct\":\"on\"}}"},
        {"nbd,id=e", "type", "{\"type\":\"nbd\",\"id\":\"e\"}"},
        {"type=nbd", "type", "{\"type\":\"nbd\"}"},
        {"a=x,,y,b=,c=p=q", NULL, "{\"a\":\"x,y\",\"b\":\"\",\"c\":\"p=q\"}"},
        {"l.0=x,l.1=y", NULL, "{\"l\":[\"x\",\"y\"]}"},
        {"l.1.n=b,l.0.n=a,l.0.m=c", NULL, "{\"l\":[{\"n\":\"a\",\"m\":\"c\"},{\"n\":\"b\"}]}"},
        {"", NULL, "{}"},
        {"{\"driver\":\"null-co\",\"size\":5}", NULL, "{\"driver\":\"null-co\",\"size\":5}"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct tide_error err = {0};
        char *out = keyval_text(cases[i][0], cases[i][1], &err);
        if (!out)
            fail_msg("%s: %s", cases[i][0], err.msg);
        assert_string_equal(out, cases[i][2]);
        free(out);
    }
}

static void keyval_refuses(void **state)
{
    static const char *const cases[][2] = {
        {"a", "'a': expected NAME=VALUE"},
        {"a=1,b", "'b': expected NAME=VALUE"},
        {"a=1,", "nothing after the last comma"},
        {"=1", "'=1': the name before '=' is not valid"},
        {"a..b=1", "'a..b=1': the name before '=' is not valid"},
        {"a b=1", "'a b=1': the name before '=' is not valid"},
        {"a=1,a=2", "'a=2': 'a' is given twice"},
        {"a=1,a.b=2", "'a.b=2': 'a' has a value already, it cannot have members"},
        {"a.b=2,a=1", "'a=1': 'a' has members already, it cannot have a value"},
        {"l.0=x,l.2=y", "'l.1' is missing: elements are numbered from 0"},
        {"l.0=x,l.y=y", "'l' has both numbered elements and named members"},
        {"0=x", "options need names, not numbers"},
        {"a=\xff", "the value of 'a' is not valid UTF-8"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct tide_error err = {0};
        assert_null(keyval_text(cases[i][0], NULL, &err));
        assert_string_equal(err.msg, cases[i][1]);
        assert_int_equal(err.code, -EINVAL);
    }
    struct tide_error err = {0};
    char text[1000] = "";
    for (int i = 0; i < 70; i++)
        strcat(text, "a.");
    strcat(text, "b=1");
    assert_null(keyval_text(text, NULL, &err));
    assert_non_null(strstr(err.msg, "more than 64 names in a row"));
    memset(text, 'n', 128);
    strcpy(text + 128, "=1");
    assert_null(keyval_text(text, NULL, &err));
    assert_non_null(strstr(err.msg, "a name is longer than 127 characters"));
    assert_null(keyval_text("{\"a\":1,\"a\":2}", NULL, &err));
    assert_non_null(strstr(err.msg, "options in JSON: duplicate"));
}

static void keyval_values_get_types(void **state)
{
    struct fixture *f = *state;
    static const struct {
        const char *text;
        uint64_t want;
    } sizes[] = {
        {"0", 0},
        {"4096", 4096},
        {"64k", 65536},
        {"64K", 65536},
        {"1.5G", 3ULL << 29},
        {"2T", 2ULL << 40},
        {"0x1000", 4096},
        {"512b", 512},
        {"0x1e", 30},
        {"1E", 1ULL << 60},
        {"18446744073709551615", UINT64_MAX},
    };
    static const char *const bad[] = {
        "", "x", "-1", "1.5", "1KK", "K", "16E", "1 K", "0x", "1.K", "18446744073709551616"};
    char text[200];

    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        snprintf(text, sizeof text, "{\"driver\":\"null-co\",\"size\":\"%s\"}", sizes[i].text);
        const struct q_blockdev_options *o =
            parse_flags(f, &q_blockdev_add_type, text, SCHEMA_KEYVAL);
        assert_non_null(o);
        assert_true(o->u.null_co.size == sizes[i].want);
    }
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        snprintf(text, sizeof text, "{\"driver\":\"null-co\",\"size\":\"%s\"}", bad[i]);
        assert_null(parse_flags(f, &q_blockdev_add_type, text, SCHEMA_KEYVAL));
        assert_non_null(strstr(f->err.msg, "member 'size' must be a size such as"));
    }
    const struct q_blockdev_options *o =
        parse_flags(f, &q_blockdev_add_type,
                    "{\"driver\":\"null-co\",\"read-only\":\"yes\",\"force-share\":\"off\","
                    "\"latency-ns\":\"10\",\"read-zeroes\":true}",
                    SCHEMA_KEYVAL);
    assert_true(o->read_only && o->has_force_share && !o->force_share && o->u.null_co.read_zeroes);
    assert_int_equal(o->u.null_co.latency_ns, 10);
    assert_null(parse_flags(f, &q_blockdev_add_type,
                            "{\"driver\":\"null-co\",\"read-only\":\"maybe\"}", SCHEMA_KEYVAL));
    assert_string_equal(f->err.msg, "member 'read-only' must be 'on' or 'off', not 'maybe'");
    assert_null(parse_flags(f, &q_blockdev_add_type,
                            "{\"driver\":\"null-co\",\"latency-ns\":\"10K\"}", SCHEMA_KEYVAL));
    assert_string_equal(f->err.msg, "member 'latency-ns' must be a whole number, not '10K'");
}

/* ---- the way back ---- */

/* All that is in `part` is in `whole` too; what is in `whole` besides are defaults. */
static bool contains(json_t *whole, json_t *part)
{
    const char *key;
    json_t *v;
    size_t i;

    if (json_is_object(part)) {
        json_object_foreach (part, key, v)
            if (!contains(json_object_get(whole, key), v))
                return false;
        return true;
    }
    if (json_is_array(part)) {
        json_array_foreach (part, i, v)
            if (!contains(json_array_get(whole, i), v))
                return false;
        return json_array_size(part) == json_array_size(whole);
    }
    return json_equal(whole, part);
}

static void structs_become_json_again(void **state)
{
    struct fixture *f = *state;
    static const struct schema_type *const types[] = {
        &q_transaction_action_type, &q_blockdev_options_type, &q_nbd_server_start_type};
    uint64_t seed = 3;
    for (int i = 0; i < 6000; i++) {
        const struct schema_type *t = types[i % 3];
        json_t *v = random_value(t, &seed, 0), *back, *again;
        void *parsed;
        if (schema_parse(t, v, &f->arena, 0, &parsed, &f->err) < 0)
            fail_msg("%s", f->err.msg);
        if (schema_unparse(t, parsed, &back, &f->err) < 0)
            fail_msg("%s", f->err.msg);
        if (!contains(back, v))
            fail_msg("number %d: %s became %s", i, json_dumps(v, 0), json_dumps(back, 0));
        assert_int_equal(schema_parse(t, back, &f->arena, 0, &parsed, &f->err), 0);
        assert_int_equal(schema_unparse(t, parsed, &again, &f->err), 0);
        assert_true(json_equal(back, again));
        json_decref(v);
        json_decref(back);
        json_decref(again);
        arena_free(&f->arena);
    }
}

static void words_get_the_types_of_the_schema(void **state)
{
    json_t *typed =
        json_loads("{\"driver\": \"raw\", \"node-name\": \"7\", \"read-only\": \"on\", "
                   "\"offset\": \"64K\", \"x\": \"1\", \"file\": {\"driver\": \"file\", "
                   "\"filename\": \"1\", \"read-only\": \"perhaps\", "
                   "\"auto-read-only\": \"off\"}}",
                   0, NULL);
    json_t *want = json_loads("{\"driver\": \"raw\", \"node-name\": \"7\", \"read-only\": true, "
                              "\"offset\": 65536, \"x\": \"1\", \"file\": {\"driver\": \"file\", "
                              "\"filename\": \"1\", \"read-only\": \"perhaps\", "
                              "\"auto-read-only\": false}}",
                              0, NULL);
    json_t *got = schema_typed(&q_blockdev_options_type, typed);
    if (!json_equal(got, want))
        fail_msg("%s", json_dumps(got, 0));
    assert_true(schema_is_bool(&q_blockdev_options_type, typed, "read-only"));
    assert_false(schema_is_bool(&q_blockdev_options_type, typed, "offset"));
    assert_null(schema_branch(&q_transaction_action_type, "no-such"));
    assert_ptr_equal(schema_branch(&q_transaction_action_type, "abort"), &q_abort_type);
    json_decref(typed);
    json_decref(want);
    json_decref(got);
}

static void structs_written_by_hand(void **state)
{
    struct fixture *f = *state;
    struct q_block_dirty_bitmap_or_str list[] = {
        {.string = "a"}, {.object = &(struct q_block_dirty_bitmap){"d", "b"}}};
    struct q_block_dirty_bitmap_merge merge = {"n", "t", 2, list};
    struct q_block_dirty_bitmap_add add = {.node = "n", .name = "b", .disabled = true};
    json_t *v;
    assert_int_equal(schema_unparse(&q_block_dirty_bitmap_merge_type, &merge, &v, &f->err), 0);
    json_t *want = json_loads("{\"node\": \"n\", \"target\": \"t\", \"bitmaps\": [\"a\", "
                              "{\"node\": \"d\", \"name\": \"b\"}]}",
                              0, NULL);
    assert_true(json_equal(v, want));
    json_decref(v);
    json_decref(want);
    assert_int_equal(schema_unparse(&q_block_dirty_bitmap_add_type, &add, &v, &f->err), 0);
    assert_int_equal(json_object_size(v), 3); /* no granularity, no persistent */
    assert_true(json_is_true(json_object_get(v, "disabled")));
    json_decref(v);
    add.has_persistent = true;
    assert_int_equal(schema_unparse(&q_block_dirty_bitmap_add_type, &add, &v, &f->err), 0);
    assert_true(json_is_false(json_object_get(v, "persistent")));
    json_decref(v);
    add.name = NULL;
    assert_int_equal(schema_unparse(&q_block_dirty_bitmap_add_type, &add, &v, &f->err), -EINVAL);
    assert_string_equal(f->err.msg, "member 'name' is missing");
    assert_null(v);
    add.name = "\xff";
    assert_int_equal(schema_unparse(&q_block_dirty_bitmap_add_type, &add, &v, &f->err), -EINVAL);
    assert_string_equal(f->err.msg, "member 'name' is no valid UTF-8 text");
    merge.bitmaps = NULL;
    assert_int_equal(schema_unparse(&q_block_dirty_bitmap_merge_type, &merge, &v, &f->err),
                     -EINVAL);
    struct q_blockdev_backup backup = {.device = "d", .target = "t", .sync = 99};
    assert_int_equal(schema_unparse(&q_blockdev_backup_type, &backup, &v, &f->err), -EINVAL);
    assert_non_null(strstr(f->err.msg, "'sync'"));
    struct q_transaction_action unknown = {.type = 99, .data = &add};
    assert_int_equal(schema_unparse(&q_transaction_action_type, &unknown, &v, &f->err), -EINVAL);
}

/* ---- introspection ---- */

static void introspection_is_closed(void **state)
{
    json_t *schema = schema_introspect(), *names = json_object(), *e, *m;
    size_t i, j, n_commands = 0;

    assert_non_null(schema);
    json_array_foreach (schema, i, e) {
        const char *name = json_string_value(json_object_get(e, "name"));
        assert_null(json_object_get(names, name)); /* unique */
        json_object_set(names, name, e);
        n_commands += !strcmp(json_string_value(json_object_get(e, "meta-type")), "command");
    }
    json_array_foreach (schema, i, e) {
        static const char *const refs[] = {"arg-type", "ret-type", "element-type"};
        for (j = 0; j < 3; j++) {
            json_t *ref = json_object_get(e, refs[j]);
            assert_true(!ref || json_object_get(names, json_string_value(ref)));
        }
        json_array_foreach (json_object_get(e, "variants"), j, m)
            assert_non_null(json_object_get(names, json_string_value(json_object_get(m, "type"))));
        if (!strcmp(json_string_value(json_object_get(e, "meta-type")), "enum"))
            continue;
        json_array_foreach (json_object_get(e, "members"), j, m)
            assert_non_null(json_object_get(names, json_string_value(json_object_get(m, "type"))));
    }
    assert_true(n_commands > 40);
    json_t *transaction = json_object_get(names, "transaction");
    assert_string_equal(json_string_value(json_object_get(transaction, "meta-type")), "command");
    json_decref(names);
    json_decref(schema);
}

int main(void)
{
#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
    const struct CMUnitTest tests[] = {
        T(a_struct_is_filled),
        T(defaults_are_filled_in),
        T(no_arguments_are_an_empty_object),
        T(a_union_takes_its_branch),
        T(a_branch_may_have_no_members),
        T(lists_know_empty_from_absent),
        T(a_wrapped_union_keeps_its_data),
        T(numbers_any_null_and_lists),
        T(members_are_checked),
        T(words_are_checked),
        T(paths_name_the_place),
        T(ranges_are_checked),
        T(nesting_is_bounded),
        T(long_words_are_cut_at_a_character),
        T(many_actions_are_quick_and_memory_may_fail),
        T(keyval_becomes_json),
        T(keyval_refuses),
        T(keyval_values_get_types),
        T(structs_become_json_again),
        T(words_get_the_types_of_the_schema),
        T(structs_written_by_hand),
        T(introspection_is_closed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
