/* SPDX-License-Identifier: Apache-2.0 */
/* Command line options to JSON: "driver=raw,node-name=r,file.driver=file,file.filename=/d,,x".
 *
 *   text   = "" | piece ("," piece)*        a comma inside a value is doubled
 *   piece  = key "=" value                   or, as the first one, a value for the implied key
 *   key    = name ("." name)*                a dot goes one object down
 *
 * All values are strings: types come later, from the schema (SCHEMA_KEYVAL). An object whose keys
 * are 0, 1, 2... is a list. A text that begins with { is JSON and is taken as it is. */
#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "base/bytes.h"
#include "schema/schema.h"

#define MAX_KEY 127  /* bytes of one name */
#define MAX_DEPTH 64 /* names in a key; also the recursion of make_lists() */
#define MAX_SHOWN 60

static int no_memory(struct tide_error *err)
{
    return tide_fail(err, -ENOMEM, "not enough memory for the options");
}

/* Shows a piece by its beginning, up to a whole character. */
static int shown(const char *s, size_t len)
{
    size_t n = MIN(len, (size_t)MAX_SHOWN);
    while (n < len && n > 0 && ((unsigned char)s[n] & 0xC0) == 0x80)
        n--;
    return (int)n;
}

static int parse_json(const char *text, json_t **out, struct tide_error *err)
{
    json_error_t e;
    *out = json_loads(text, JSON_REJECT_DUPLICATES, &e);
    if (*out)
        return 0;
    if (json_error_code(&e) == json_error_out_of_memory)
        return no_memory(err);
    return tide_fail(err, -EINVAL, "options in JSON: %s (line %d, column %d)", e.text, e.line,
                     e.column);
}

/* Length of the value at `s` up to a single comma or the end. */
static size_t value_length(const char *s)
{
    size_t n = 0;
    for (; s[n]; n++) {
        if (s[n] != ',')
            continue;
        if (s[n + 1] != ',')
            break;
        n++;
    }
    return n;
}

/* The value of a piece, a new reference, with each ",," made one comma. */
static int value_string(const char *s, size_t len, const char *name, json_t **out,
                        struct tide_error *err)
{
    mem_autofree char *copy = mem_alloc(len + 1);
    size_t n = 0;

    if (!copy)
        return no_memory(err);
    for (size_t i = 0; i < len; i++) {
        copy[n++] = s[i];
        if (s[i] == ',')
            i++;
    }
    *out = json_stringn(copy, n);
    return *out ? 0 : tide_fail(err, -EINVAL, "the value of '%s' is not valid UTF-8", name);
}

static bool name_char(char c)
{
    return isalnum((unsigned char)c) || c == '-' || c == '_';
}

/* Next name of the key at *s into `name`; *s moves to the '.' or '=' behind it. */
static int next_name(const char **s, char name[MAX_KEY + 1], const char *piece, size_t len,
                     struct tide_error *err)
{
    size_t n = 0;

    while (name_char((*s)[n]))
        n++;
    if (n == 0 || ((*s)[n] != '.' && (*s)[n] != '='))
        return tide_fail(err, -EINVAL, "'%.*s': the name before '=' is not valid",
                         shown(piece, len), piece);
    if (n > MAX_KEY)
        return tide_fail(err, -EINVAL, "'%.*s': a name is longer than %d characters",
                         shown(piece, len), piece, MAX_KEY);
    memcpy(name, *s, n);
    name[n] = '\0';
    *s += n;
    return 0;
}

/* The object one step down, made if it is not there. Borrowed. */
static int step_down(json_t **obj, const char *name, const char *piece, size_t len,
                     struct tide_error *err)
{
    json_t *next = json_object_get(*obj, name);

    if (!next) {
        next = json_object();
        if (!next || json_object_set_new(*obj, name, next) < 0)
            return no_memory(err);
    }
    if (!json_is_object(next))
        return tide_fail(err, -EINVAL, "'%.*s': '%s' has a value already, it cannot have members",
                         shown(piece, len), piece, name);
    *obj = next;
    return 0;
}

static int put(json_t *obj, const char *name, const char *value, size_t value_len,
               const char *piece, size_t len, struct tide_error *err)
{
    const json_t *old = json_object_get(obj, name);
    json_t *v;

    if (json_is_object(old))
        return tide_fail(err, -EINVAL, "'%.*s': '%s' has members already, it cannot have a value",
                         shown(piece, len), piece, name);
    if (old)
        return tide_fail(err, -EINVAL, "'%.*s': '%s' is given twice", shown(piece, len), piece,
                         name);
    int r = value_string(value, value_len, name, &v, err);
    if (r < 0)
        return r;
    return json_object_set_new(obj, name, v) < 0 ? no_memory(err) : 0;
}

/* One "a.b=c" of `len` bytes. */
static int parse_piece(json_t *obj, const char *piece, size_t len, struct tide_error *err)
{
    const char *s = piece;
    char name[MAX_KEY + 1];

    for (int depth = 0;; depth++, s++) {
        int r = next_name(&s, name, piece, len, err);
        if (r == 0 && depth == MAX_DEPTH)
            r = tide_fail(err, -EINVAL, "'%.*s': more than %d names in a row", shown(piece, len),
                          piece, MAX_DEPTH);
        if (r < 0)
            return r;
        if (*s == '=')
            break;
        r = step_down(&obj, name, piece, len, err);
        if (r < 0)
            return r;
    }
    s++;
    return put(obj, name, s, piece + len - s, piece, len, err);
}

/* Is this the spelling of element i? */
static bool is_index(const char *key, size_t *index)
{
    size_t n = 0;

    if (!*key || (key[0] == '0' && key[1]))
        return false;
    for (; *key; key++) {
        if (*key < '0' || *key > '9' || n > 1000000)
            return false;
        n = n * 10 + (*key - '0');
    }
    *index = n;
    return true;
}

static int make_lists(json_t **value, const char *name, struct tide_error *err);

static int convert_members(json_t *obj, size_t *n_indexes, struct tide_error *err)
{
    const char *key;
    json_t *member;
    void *tmp;

    json_object_foreach_safe(obj, tmp, key, member)
    {
        size_t i;
        *n_indexes += is_index(key, &i);
        if (!json_is_object(member))
            continue;
        json_t *list = member;
        int r = make_lists(&list, key, err);
        if (r < 0)
            return r;
        if (list != member && json_object_set_new(obj, key, list) < 0)
            return no_memory(err);
    }
    return 0;
}

/* Objects with the keys 0..n-1 become lists, from the inside out. *value is replaced by a new
 * reference then, and left alone else. */
static int make_lists(json_t **value, const char *name, struct tide_error *err)
{
    size_t n = json_object_size(*value), n_indexes = 0;
    int r = convert_members(*value, &n_indexes, err);

    if (r < 0 || n_indexes == 0)
        return r;
    if (n_indexes < n)
        return tide_fail(err, -EINVAL, "'%s' has both numbered elements and named members", name);
    json_t *list = json_array();
    for (size_t i = 0; list && i < n; i++) {
        char key[24];
        snprintf(key, sizeof key, "%zu", i);
        json_t *item = json_object_get(*value, key);
        if (!item) {
            json_decref(list);
            return tide_fail(err, -EINVAL, "'%s.%zu' is missing: elements are numbered from 0",
                             name, i);
        }
        if (json_array_append(list, item) < 0) {
            json_decref(list);
            list = NULL;
        }
    }
    if (!list)
        return no_memory(err);
    *value = list;
    return 0;
}

static int parse_pieces(const char *text, const char *implied, json_t *obj, struct tide_error *err)
{
    for (const char *s = text; *s;) {
        size_t len = value_length(s);
        const char *eq = memchr(s, '=', len);
        int r;
        if (eq)
            r = parse_piece(obj, s, len, err);
        else if (s == text && implied && len > 0)
            r = put(obj, implied, s, len, s, len, err);
        else
            r = tide_fail(err, -EINVAL, "'%.*s': expected NAME=VALUE", shown(s, len), s);
        if (r < 0)
            return r;
        s += len;
        if (*s == ',' && !*++s)
            return tide_fail(err, -EINVAL, "nothing after the last comma");
    }
    return 0;
}

int keyval_parse(const char *text, const char *implied, json_t **out, struct tide_error *err)
{
    if (*text == '{')
        return parse_json(text, out, err);

    json_t *obj = json_object();
    if (!obj)
        return no_memory(err);
    json_t *whole = obj;
    int r = parse_pieces(text, implied, obj, err);
    if (r == 0)
        r = make_lists(&whole, "options", err);
    if (r == 0 && whole != obj) {
        json_decref(whole);
        r = tide_fail(err, -EINVAL, "options need names, not numbers");
    }
    if (r < 0) {
        json_decref(obj);
        return r;
    }
    *out = obj;
    return 0;
}
