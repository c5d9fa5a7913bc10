/* SPDX-License-Identifier: Apache-2.0 */
/* From C structs to JSON, by the rows that parse.c walks: for who builds requests. */
#include <errno.h>
#include <string.h>

#include "schema/tables.h"
#include "schema/types.h"

#define MAX_DEPTH 64 /* as in parse.c: a peer would refuse more */

struct unwalk {
    struct tide_error *err;
    unsigned depth;
};

static int unparse_value(struct unwalk *w, const char *name, const struct schema_type *t,
                         const char *in, json_t **out);
static int unparse_members(struct unwalk *w, const struct schema_type *t, const char *base,
                           json_t *object);

static int no_memory(struct unwalk *w)
{
    return tide_fail(w->err, -ENOMEM, "not enough memory for the arguments");
}

static int missing(struct unwalk *w, const char *name)
{
    return tide_fail(w->err, -EINVAL, "member '%s' is missing", name);
}

static bool is_pointed_to(const struct schema_type *t)
{
    return t->kind == SCHEMA_STRUCT || t->kind == SCHEMA_UNION || t->kind == SCHEMA_ALTERNATE;
}

/* ---- scalars ---- */

/* Zero: also "not given" where a scalar is optional. */
static bool is_zero(const struct schema_type *t, const char *in)
{
    static const char zeros[16];
    return memcmp(in, zeros, t->size) == 0;
}

static int unparse_string(struct unwalk *w, const char *name, const char *s, json_t **out)
{
    if (!s)
        return missing(w, name);
    *out = json_string(s);
    if (*out)
        return 0;
    *out = json_string_nocheck(s);
    bool memory = *out;
    json_decref(*out);
    *out = NULL;
    return memory ? tide_fail(w->err, -EINVAL, "member '%s' is no valid UTF-8 text", name)
                  : no_memory(w);
}

static int unparse_whole(struct unwalk *w, const char *name, const struct schema_type *t,
                         const char *in, json_t **out)
{
    bool sign = t->kind == SCHEMA_INT;
    uint64_t v = t->size == 2           ? *(const uint16_t *)in
                 : t->size == 4 && sign ? (uint64_t) * (const int32_t *)in
                 : t->size == 4         ? *(const uint32_t *)in
                                        : *(const uint64_t *)in;
    if (!sign && v > (uint64_t)INT64_MAX)
        return tide_fail(w->err, -EINVAL, "member '%s' is more than %lld, the most that JSON takes",
                         name, (long long)INT64_MAX);
    *out = json_integer((json_int_t)v);
    return *out ? 0 : no_memory(w);
}

static int unparse_enum(struct unwalk *w, const char *name, const struct schema_type *t,
                        const char *in, json_t **out)
{
    unsigned i = *(const unsigned *)in;
    if (i >= t->n_names)
        return tide_fail(w->err, -EINVAL, "member '%s' cannot be number %u of its words", name, i);
    *out = json_string(t->names[i]);
    return *out ? 0 : no_memory(w);
}

/* ---- objects ---- */

static int unparse_object(struct unwalk *w, const struct schema_type *t, const char *base,
                          json_t **out)
{
    json_t *object = json_object();
    if (!object)
        return no_memory(w);
    if (++w->depth > MAX_DEPTH) {
        json_decref(object);
        return tide_fail(w->err, -EINVAL, "the arguments are nested deeper than %d objects",
                         MAX_DEPTH);
    }
    int r = unparse_members(w, t, base, object);
    w->depth--;
    if (r == 0 && t->kind == SCHEMA_UNION) {
        /* The tag is in range, or its name would not be there. */
        unsigned tag = *(const unsigned *)(base + t->members[t->tag].off);
        const struct schema_type *branch =
            tag < t->members[t->tag].type->n_names ? t->branches[tag] : NULL;
        json_t *data = NULL;
        if (t->wrapped && !*(const char *const *)(base + t->branch_off))
            r = missing(w, "data");
        else if (t->wrapped)
            r = unparse_object(w, branch, *(const char *const *)(base + t->branch_off), &data);
        else if (branch)
            r = unparse_members(w, branch, base + t->branch_off, object);
        if (r == 0 && t->wrapped && json_object_set_new(object, "data", data) < 0)
            r = no_memory(w);
    }
    if (r < 0) {
        json_decref(object);
        return r;
    }
    *out = object;
    return 0;
}

static int unparse_alternate(struct unwalk *w, const char *name, const struct schema_type *t,
                             const char *base, json_t **out)
{
    enum q_kind kind = *(const enum q_kind *)base; /* the first member of every alternate */
    const char *s = t->has_string ? *(const char *const *)(base + t->string_off) : NULL;
    const char *object = t->object ? *(const char *const *)(base + t->object_off) : NULL;
    if (kind == Q_KIND_STRING || (kind == Q_KIND_NULL && s))
        return unparse_string(w, name, s, out);
    if (object)
        return unparse_object(w, t->object, object, out);
    if (kind != Q_KIND_NULL || !t->has_null)
        return missing(w, name);
    *out = json_null();
    return 0;
}

static int unparse_list(struct unwalk *w, const struct schema_member *m, const char *base,
                        json_t **out)
{
    size_t n = *(const size_t *)(base + m->aux);
    const char *items = *(const char *const *)(base + m->off);
    json_t *list = json_array();
    int r = list ? 0 : no_memory(w);
    if (r == 0 && n > 0 && !items)
        r = missing(w, m->name);
    for (size_t i = 0; i < n && r == 0; i++) {
        json_t *item = NULL;
        r = unparse_value(w, m->name, m->type, items + i * m->type->size, &item);
        if (r == 0 && json_array_append_new(list, item) < 0)
            r = no_memory(w);
    }
    if (r < 0) {
        json_decref(list);
        return r;
    }
    *out = list;
    return 0;
}

/* Is there nothing to say about an optional member? */
static bool is_absent(const struct schema_member *m, const char *base)
{
    const char *in = base + m->off;
    if (m->flags & SCHEMA_LIST || m->aux == SCHEMA_NO_AUX)
        return !*(const void *const *)in &&
               !(m->flags & SCHEMA_LIST && *(const size_t *)(base + m->aux));
    return !*(const bool *)(base + m->aux) && is_zero(m->type, in);
}

static int unparse_member(struct unwalk *w, const struct schema_member *m, const char *base,
                          json_t **out)
{
    const char *in = base + m->off;
    if (m->flags & SCHEMA_LIST)
        return unparse_list(w, m, base, out);
    if (is_pointed_to(m->type)) {
        in = *(const char *const *)in;
        if (!in)
            return missing(w, m->name);
    }
    return unparse_value(w, m->name, m->type, in, out);
}

static int unparse_members(struct unwalk *w, const struct schema_type *t, const char *base,
                           json_t *object)
{
    for (unsigned i = 0; i < t->n_members; i++) {
        const struct schema_member *m = &t->members[i];
        json_t *v = NULL;
        if (m->flags & (SCHEMA_OPTIONAL | SCHEMA_DEFAULT) && is_absent(m, base))
            continue;
        int r = unparse_member(w, m, base, &v);
        if (r == 0 && json_object_set_new(object, m->name, v) < 0)
            r = no_memory(w);
        if (r < 0)
            return r;
    }
    return 0;
}

static int unparse_value(struct unwalk *w, const char *name, const struct schema_type *t,
                         const char *in, json_t **out)
{
    switch (t->kind) {
    case SCHEMA_STR:
        return unparse_string(w, name, *(const char *const *)in, out);
    case SCHEMA_BOOL:
        *out = json_boolean(*(const bool *)in);
        return 0;
    case SCHEMA_INT:
    case SCHEMA_UINT:
        return unparse_whole(w, name, t, in, out);
    case SCHEMA_NUMBER:
        *out = json_real(*(const double *)in);
        return *out ? 0 : tide_fail(w->err, -EINVAL, "member '%s' is no finite number", name);
    case SCHEMA_ANY:
        *out = json_incref(*(json_t *const *)in);
        return *out ? 0 : missing(w, name);
    case SCHEMA_ENUM:
        return unparse_enum(w, name, t, in, out);
    case SCHEMA_STRUCT:
    case SCHEMA_UNION:
        return unparse_object(w, t, in, out);
    case SCHEMA_ALTERNATE:
        return unparse_alternate(w, name, t, in, out);
    }
    __builtin_unreachable();
}

int schema_unparse(const struct schema_type *type, const void *in, json_t **out,
                   struct tide_error *err)
{
    struct unwalk w = {.err = err};
    *out = NULL;
    return unparse_value(&w, "arguments", type, in, out);
}
