/* SPDX-License-Identifier: Apache-2.0 */
/* Writing actions as lines. The shortest form is tried first; a form is taken if reading it gives
 * the same action, so nothing here has to know what the schema makes of a word. */
#include "base/mem.h"
#include "cli/cli.h"
#include "cli/txn_text.h"
#include "cli/txn_verbs.h"
#include "schema/types.h"
#include <stdio.h>
#include <string.h>

/* ---- words ---- */

static bool is_c1(const unsigned char *p)
{
    return p[0] == 0xc2 && p[1] >= 0x80 && p[1] <= 0x9f;
}

static bool is_plain(const char *s, const char *also)
{
    static const char plain[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
                                "_.:+@%~,-";
    if (!*s || strcmp(s, "to") == 0 || strcmp(s, "from") == 0)
        return false;
    for (const unsigned char *p = (const unsigned char *)s; *p; p++) {
        if (*p < 0x80 ? !strchr(plain, *p) && !strchr(also, *p) : is_c1(p))
            return false;
    }
    return true;
}

/* In quotes, or as it is. */
static void write_word(FILE *out, const char *s, const char *also)
{
    if (is_plain(s, also)) {
        fputs(s, out);
        return;
    }
    putc('"', out);
    for (const unsigned char *p = (const unsigned char *)s; *p; p++) {
        if (*p == '"' || *p == '\\')
            fprintf(out, "\\%c", *p);
        else if (*p < 0x20 || *p == 0x7f)
            fprintf(out, "\\u%04x", *p);
        else if (is_c1(p))
            fprintf(out, "\\u%04x", *++p);
        else
            putc(*p, out);
    }
    putc('"', out);
}

/* Control characters that JSON leaves alone would steer a terminal; they are in strings only. */
static void write_json(FILE *out, const json_t *v)
{
    char *json = json_dumps(v, JSON_COMPACT | JSON_ENCODE_ANY);
    for (const unsigned char *p = (const unsigned char *)json; p && *p; p++) {
        if (*p == 0x7f)
            fputs("\\u007f", out);
        else if (is_c1(p))
            fprintf(out, "\\u%04x", *++p);
        else
            putc(*p, out);
    }
    free(json);
}

/* 65536 as 64K. */
static void write_whole(FILE *out, json_int_t n)
{
    size_t unit = 0;
    while (n != 0 && n % 1024 == 0 && unit < 4) {
        n /= 1024;
        unit++;
    }
    fprintf(out, "%" JSON_INTEGER_FORMAT "%.*s", n, unit ? 1 : 0, &"_KMGT"[unit]);
}

/* ---- options ---- */

/* Can key=value say it? */
static bool has_words(const json_t *v)
{
    const char *key;
    json_t *member;
    size_t i;
    if (json_is_object(v) || json_is_array(v)) {
        json_object_foreach ((json_t *)v, key, member) {
            if (!has_words(member))
                return false;
        }
        json_array_foreach (v, i, member) {
            if (!has_words(member))
                return false;
        }
        return json_object_size(v) + json_array_size(v) > 0;
    }
    return json_is_string(v) || json_is_integer(v) || json_is_boolean(v);
}

static void write_pairs(FILE *out, const char *key, const json_t *v)
{
    const char *name;
    json_t *member;
    size_t i;
    json_object_foreach ((json_t *)v, name, member) {
        mem_autofree char *below = cli_printf("%s.%s", key, name);
        write_pairs(out, below, member);
    }
    json_array_foreach (v, i, member) {
        mem_autofree char *below = cli_printf("%s.%zu", key, i);
        write_pairs(out, below, member);
    }
    if (json_is_object(v) || json_is_array(v))
        return;
    fprintf(out, " %s=", key);
    if (json_is_string(v))
        write_word(out, json_string_value(v), "/");
    else if (json_is_integer(v))
        write_whole(out, json_integer_value(v));
    else
        fputs(json_is_true(v) ? "on" : "off", out);
}

static void write_option(FILE *out, const struct txn_verb *verb, const char *key, const json_t *v,
                         bool as_json)
{
    if (verb && verb->alias && strcmp(verb->alias_of, key) == 0)
        key = verb->alias;
    if (as_json || !has_words(v)) {
        fprintf(out, " %s:=", key);
        write_json(out, v);
    } else if (json_is_true(v)) {
        fprintf(out, " %s", key);
    } else {
        write_pairs(out, key, v);
    }
}

/* Is member `key` one of the words with a place, or the sources? */
static bool has_place(const struct txn_verb *verb, const char *key)
{
    if (!verb)
        return false;
    if (verb->sources && strcmp(key, "bitmaps") == 0)
        return true;
    size_t len = strlen(key);
    for (const char *p = verb->places; *p; p += strcspn(p, "/ "), p += *p != '\0') {
        if (strcspn(p, "/ ") == len && strncmp(p, key, len) == 0 && strcmp(key, "to") != 0)
            return true;
    }
    return false;
}

static void write_options(FILE *out, const struct txn_verb *verb, json_t *data, bool as_json)
{
    const char *key;
    json_t *v;
    json_object_foreach (data, key, v) {
        if (!has_place(verb, key))
            write_option(out, verb, key, v, as_json);
    }
}

/* ---- short forms ---- */

static bool write_placed(FILE *out, const struct txn_verb *verb, const json_t *data)
{
    char places[64], *save;
    snprintf(places, sizeof places, "%s", verb->places);
    for (char *p = strtok_r(places, " ", &save); p; p = strtok_r(NULL, " ", &save)) {
        putc(' ', out);
        if (strcmp(p, "to") == 0) {
            fputs("to", out);
            continue;
        }
        char *slash = strchr(p, '/');
        if (slash)
            *slash = '\0';
        const char *first = json_string_value(json_object_get(data, p));
        const char *second = slash ? json_string_value(json_object_get(data, slash + 1)) : "";
        if (!first || !second)
            return false;
        write_word(out, first, "");
        if (slash) {
            putc('/', out);
            write_word(out, second, "");
        }
    }
    return true;
}

static bool write_sources(FILE *out, const struct schema_type *type, json_t *data)
{
    json_t *list = json_object_get(data, "bitmaps"), *v;
    size_t i;
    fputs(" from", out);
    json_array_foreach (list, i, v) {
        const char *node = json_string_value(json_object_get(v, "node"));
        const char *name = json_string_value(json_is_string(v) ? v : json_object_get(v, "name"));
        if (!name || (json_is_object(v) && !node))
            return false;
        putc(' ', out);
        if (node) {
            write_word(out, node, "");
            putc('/', out);
        }
        if (!node && schema_is_bool(type, data, name))
            fprintf(out, "\"%s\"", name);
        else
            write_word(out, name, "");
    }
    return json_is_array(list);
}

/* FORM_SHORT, or by the kind with options as words or as JSON. */
enum form { FORM_SHORT, FORM_WORDS, FORM_JSON };

static bool write_form(FILE *out, enum form form, const char *kind, json_t *data)
{
    const struct schema_type *type = schema_branch(&q_transaction_action_type, kind);
    const struct txn_verb *verb = form == FORM_SHORT ? txn_verb_of_kind(kind) : NULL;
    if (!type)
        return false;
    fputs(verb ? verb->word : kind, out);
    if (verb && !write_placed(out, verb, data))
        return false;
    write_options(out, verb, data, form == FORM_JSON);
    return !verb || !verb->sources || write_sources(out, type, data);
}

static bool reads_as(const char *line, const json_t *action)
{
    struct txn_list list;
    struct tide_error err;
    if (txn_list_parse("", line, strlen(line), &list, &err) < 0)
        return false;
    bool same =
        json_array_size(list.actions) == 1 && json_equal(json_array_get(list.actions, 0), action);
    txn_list_free(&list);
    return same;
}

static char *try_form(enum form form, json_t *action)
{
    const char *kind = json_string_value(json_object_get(action, "type"));
    json_t *data = json_object_get(action, "data");
    char *text = NULL, *line = NULL;
    size_t len;
    FILE *out = kind && json_is_object(data) ? open_memstream(&text, &len) : NULL;
    if (!out)
        return NULL;
    bool written = write_form(out, form, kind, data);
    if (fclose(out) == 0 && written && reads_as(text, action))
        line = cli_strdup(text);
    free(text);
    return line;
}

char *txn_action_text(json_t *action)
{
    char *line = NULL;
    for (enum form form = FORM_SHORT; form <= FORM_JSON && !line; form++)
        line = try_form(form, action);
    if (line)
        return line;
    char *text = NULL;
    size_t len;
    FILE *out = open_memstream(&text, &len);
    if (out)
        write_json(out, action);
    line = cli_strdup(out && fclose(out) == 0 ? text : "(out of memory)");
    free(text);
    return line;
}
