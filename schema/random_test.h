/* SPDX-License-Identifier: Apache-2.0 */
/* For tests: random JSON that the schema takes, from the rows, so that a new kind of action is
 * tried as soon as it is declared. */
#pragma once
#include <jansson.h>
#include <stdint.h>
#include <stdlib.h>

#include "schema/tables.h"

/* splitmix64: the same numbers on every machine. */
static inline uint64_t random_next(uint64_t *seed)
{
    uint64_t z = *seed += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static inline unsigned random_below(uint64_t *seed, unsigned n)
{
    return (unsigned)(random_next(seed) % n);
}

/* Names that are easy to confuse with something, and plain ones. */
static inline json_t *random_string(uint64_t *seed)
{
    static const char *const texts[] = {
        "d0",         "disk-1", "b0",   "b 1", "",         "a/b",  "/",    "from",  "to",
        "<-",         "#x",     "x#",   "\"",  "\\",       "\\\"", "=",    "a=b",   "disabled",
        "persistent", "7",      "64K",  "on",  "true",     "null", "{}",   "[",     ":=",
        "k:=1",       "a,b",    ",,",   "\t",  "\n",       "\r",   "\x01", "\x7f",  "ä",
        "\xc2\x9b",   "\u2028", "日本", "-1",  "writable", "x.y",  " ",    "job=1", "😀",
        "a\"b c/d\\", "node",   "name", "add", "abort"};
    char long_text[300];
    if (random_below(seed, 8))
        return json_string(texts[random_below(seed, sizeof texts / sizeof *texts)]);
    unsigned n = random_below(seed, sizeof long_text);
    for (unsigned i = 0; i < n; i++)
        long_text[i] = (char)(1 + random_below(seed, 127));
    return json_stringn(long_text, n);
}

static inline json_t *random_value(const struct schema_type *t, uint64_t *seed, unsigned depth);

static inline void random_members(const struct schema_type *t, json_t *object, uint64_t *seed,
                                  unsigned depth)
{
    for (unsigned i = 0; t && i < t->n_members; i++) {
        const struct schema_member *m = &t->members[i];
        if (m->flags & (SCHEMA_OPTIONAL | SCHEMA_DEFAULT) &&
            (depth > 4 || random_below(seed, 3) == 0))
            continue;
        json_t *v = NULL;
        if (m->flags & SCHEMA_LIST) {
            v = json_array();
            for (unsigned n = random_below(seed, 4); n > 0; n--)
                json_array_append_new(v, random_value(m->type, seed, depth + 1));
        } else {
            v = random_value(m->type, seed, depth + 1);
        }
        json_object_set_new(object, m->name, v);
    }
}

static inline json_t *random_whole(const struct schema_type *t, uint64_t *seed)
{
    int64_t min = t->kind == SCHEMA_UINT ? 0 : t->min;
    int64_t max = t->kind == SCHEMA_INT           ? t->max
                  : t->umax > (uint64_t)INT64_MAX ? INT64_MAX
                                                  : (int64_t)t->umax;
    int64_t v = (int64_t)random_next(seed) >> random_below(seed, 64);
    if (random_below(seed, 2))
        v &= ~(int64_t)1023;
    return json_integer(v < min ? min : v > max ? max : v);
}

static inline json_t *random_object(const struct schema_type *t, uint64_t *seed, unsigned depth)
{
    json_t *object = json_object();
    random_members(t, object, seed, depth);
    if (t->kind != SCHEMA_UNION)
        return object;
    const struct schema_member *tag = &t->members[t->tag];
    unsigned word = random_below(seed, tag->type->n_names);
    const struct schema_type *branch = t->branches[word];
    json_object_set_new(object, tag->name, json_string(tag->type->names[word]));
    if (t->wrapped)
        json_object_set_new(object, "data", random_value(branch, seed, depth + 1));
    else
        random_members(branch, object, seed, depth);
    return object;
}

static inline json_t *random_value(const struct schema_type *t, uint64_t *seed, unsigned depth)
{
    switch (t->kind) {
    case SCHEMA_STR:
        return random_string(seed);
    case SCHEMA_BOOL:
        return json_boolean(random_below(seed, 2));
    case SCHEMA_INT:
    case SCHEMA_UINT:
        return random_whole(t, seed);
    case SCHEMA_NUMBER:
        return json_real((double)(int64_t)random_next(seed) / 1024);
    case SCHEMA_ANY:
        return json_null();
    case SCHEMA_ENUM:
        return json_string(t->names[random_below(seed, t->n_names)]);
    case SCHEMA_STRUCT:
    case SCHEMA_UNION:
        return random_object(t, seed, depth);
    case SCHEMA_ALTERNATE:
        if (t->has_null && random_below(seed, 4) == 0)
            return json_null();
        if (t->has_string && (depth > 3 || !t->object || random_below(seed, 2)))
            return random_string(seed);
        return random_object(t->object, seed, depth);
    }
    abort();
}
