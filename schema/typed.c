/* SPDX-License-Identifier: Apache-2.0 */
/* From words to typed JSON: who writes key=value means a number where the schema wants a number,
 * and a name where it wants a name, also if the name is 123. Nothing is refused here: a word that
 * spells nothing of the kind stays a word, and schema_parse() has the better message. */
#include <string.h>

#include "schema/tables.h"

#define MAX_DEPTH 64 /* deeper is refused by the parser */

static json_t *typed_value(const struct schema_type *t, json_t *v, unsigned depth);

/* ---- members of an object ---- */

static const struct schema_member *member_in(const struct schema_type *t, const char *name)
{
    for (unsigned i = 0; t && i < t->n_members; i++) {
        if (!strcmp(t->members[i].name, name))
            return &t->members[i];
    }
    return NULL;
}

const struct schema_type *schema_branch(const struct schema_type *type, const char *word)
{
    const struct schema_type *tag = type->members[type->tag].type;
    for (unsigned i = 0; i < tag->n_names; i++) {
        if (!strcmp(tag->names[i], word))
            return type->branches[i];
    }
    return NULL;
}

/* The branch that the object's tag names; NULL: none, or no union. */
static const struct schema_type *branch_of(const struct schema_type *t, json_t *object)
{
    if (t->kind != SCHEMA_UNION)
        return NULL;
    const struct schema_member *tag = &t->members[t->tag];
    const char *word = json_string_value(json_object_get(object, tag->name));
    if (!word && tag->flags & SCHEMA_DEFAULT)
        word = tag->type->names[tag->def];
    return word ? schema_branch(t, word) : NULL;
}

static const struct schema_member *find_member(const struct schema_type *t, json_t *object,
                                               const char *name)
{
    const struct schema_member *m = member_in(t, name);
    if (m || t->wrapped)
        return m;
    return member_in(branch_of(t, object), name);
}

bool schema_is_bool(const struct schema_type *type, json_t *object, const char *name)
{
    const struct schema_member *m = find_member(type, object, name);
    return m && m->type->kind == SCHEMA_BOOL && !(m->flags & SCHEMA_LIST);
}

/* ---- values ---- */

static json_t *typed_bool(json_t *v)
{
    static const char *const yes[] = {"on", "true", "yes", "y"}, *const no[] = {"off", "false",
                                                                                "no", "n"};
    for (size_t i = 0; i < sizeof yes / sizeof *yes; i++) {
        if (!strcmp(json_string_value(v), yes[i]))
            return json_true();
        if (!strcmp(json_string_value(v), no[i]))
            return json_false();
    }
    return json_incref(v);
}

/* Also sizes where the schema says no more than "whole number": granularities and speeds. */
static json_t *typed_whole(json_t *v)
{
    const char *s = json_string_value(v);
    bool negative = *s == '-';
    uint64_t n;
    if (!schema_read_size(s + negative, &n) || n > (uint64_t)INT64_MAX)
        return json_incref(v);
    return json_integer(negative ? -(json_int_t)n : (json_int_t)n);
}

static json_t *typed_number(json_t *v)
{
    json_t *n = json_loadb(json_string_value(v), json_string_length(v), JSON_DECODE_ANY, NULL);
    if (json_is_number(n))
        return n;
    json_decref(n);
    return json_incref(v);
}

static json_t *typed_list(const struct schema_type *t, json_t *v, unsigned depth)
{
    json_t *list = json_array(), *item;
    size_t i;
    json_array_foreach (v, i, item) {
        if (json_array_append_new(list, typed_value(t, item, depth)) < 0) {
            json_decref(list);
            return NULL;
        }
    }
    return list;
}

static json_t *typed_member(const struct schema_type *t, json_t *object, const char *name,
                            json_t *v, unsigned depth)
{
    const struct schema_member *m = find_member(t, object, name);
    const struct schema_type *branch = branch_of(t, object);
    if (!m && t->wrapped && branch && !strcmp(name, "data"))
        return typed_value(branch, v, depth);
    if (!m)
        return json_incref(v);
    if (m->flags & SCHEMA_LIST)
        return json_is_array(v) ? typed_list(m->type, v, depth) : json_incref(v);
    return typed_value(m->type, v, depth);
}

static json_t *typed_object(const struct schema_type *t, json_t *v, unsigned depth)
{
    json_t *object = json_object(), *value;
    const char *name;
    json_object_foreach (v, name, value) {
        if (json_object_set_new(object, name, typed_member(t, v, name, value, depth)) < 0) {
            json_decref(object);
            return NULL;
        }
    }
    return object;
}

static json_t *typed_value(const struct schema_type *t, json_t *v, unsigned depth)
{
    if (t->kind == SCHEMA_ALTERNATE && t->object)
        t = t->object;
    if (json_is_object(v) && (t->kind == SCHEMA_STRUCT || t->kind == SCHEMA_UNION) &&
        depth < MAX_DEPTH)
        return typed_object(t, v, depth + 1);
    if (!json_is_string(v) || strlen(json_string_value(v)) != json_string_length(v))
        return json_incref(v);
    switch (t->kind) {
    case SCHEMA_BOOL:
        return typed_bool(v);
    case SCHEMA_INT:
    case SCHEMA_UINT:
        return typed_whole(v);
    case SCHEMA_NUMBER:
        return typed_number(v);
    default:
        return json_incref(v);
    }
}

json_t *schema_typed(const struct schema_type *type, json_t *typed)
{
    return typed_value(type, typed, 0);
}
