/* SPDX-License-Identifier: Apache-2.0 */
/* One parser for all of QMP: walks the rows of tables.c over a JSON value and fills C structs.
 *
 * It is strict: what a row does not name is refused, so a typing error never turns into a default.
 * Where in the value we are is a chain of `struct place` on the stack; only an error turns it into
 * text. Nesting (a node inside a node inside a node) is bounded by MAX_DEPTH, so the stack is too.
 * Each object is read by asking for the members that its row names and comparing the count: linear,
 * and the search for the culprit is left to the failing case. */
#include <assert.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>

#include "base/bytes.h"
#include "schema/tables.h"
#include "schema/types.h"

#define MAX_DEPTH 64 /* objects inside objects */
#define MAX_SHOWN 60 /* bytes of the user's words that a message repeats */
#define MAX_LISTED 8 /* words of an enum that a message lists */
#define MAX_WORD 64  /* longer words get no suggestion */

const struct schema_type schema_str_type = {
    .name = "str", .kind = SCHEMA_STR, .size = sizeof(char *)};
const struct schema_type schema_bool_type = {
    .name = "bool", .kind = SCHEMA_BOOL, .size = sizeof(bool)};
const struct schema_type schema_int_type = {
    .name = "int", .kind = SCHEMA_INT, .size = 8, .min = INT64_MIN, .max = INT64_MAX};
const struct schema_type schema_int32_type = {
    .name = "int32", .kind = SCHEMA_INT, .size = 4, .min = INT32_MIN, .max = INT32_MAX};
const struct schema_type schema_uint16_type = {
    .name = "uint16", .kind = SCHEMA_UINT, .size = 2, .umax = UINT16_MAX};
const struct schema_type schema_uint32_type = {
    .name = "uint32", .kind = SCHEMA_UINT, .size = 4, .umax = UINT32_MAX};
const struct schema_type schema_uint64_type = {
    .name = "uint64", .kind = SCHEMA_UINT, .size = 8, .umax = UINT64_MAX};
const struct schema_type schema_size_type = {
    .name = "size", .kind = SCHEMA_UINT, .size = 8, .umax = UINT64_MAX};
const struct schema_type schema_number_type = {
    .name = "number", .kind = SCHEMA_NUMBER, .size = sizeof(double)};
const struct schema_type schema_any_type = {
    .name = "any", .kind = SCHEMA_ANY, .size = sizeof(json_t *)};

/* A step from the root to the value at hand: a member, or, with no name, an element. */
struct place {
    const struct place *up; /* NULL: the root */
    const char *name;
    size_t index;
    unsigned depth; /* objects around it */
};

struct walk {
    struct arena *arena;
    unsigned flags;
    const struct schema_steps *steps; /* or NULL */
    struct tide_error *err;
};

static int parse_value(struct walk *w, const struct place *at, const struct schema_type *t,
                       json_t *v, void *out);

/* ---- words for messages ---- */

struct words {
    char text[300];
};

/* "actions[0].data.node", written from the end so that a long path loses its beginning. */
static struct words path_text(const struct place *at)
{
    struct words p;
    char step[MAX_SHOWN + 32], *end = p.text + sizeof p.text - 1, *from = end;
    bool dot = false;

    *end = '\0';
    for (; at && at->up; at = at->up) {
        int n = at->name ? snprintf(step, sizeof step, "%s%s", at->name, dot ? "." : "")
                         : snprintf(step, sizeof step, "[%zu]%s", at->index, dot ? "." : "");
        n = MIN(n, (int)sizeof step - 1);
        if (from - p.text < n + 3) {
            from -= 3;
            memcpy(from, "...", 3);
            break;
        }
        from -= n;
        memcpy(from, step, n);
        dot = at->name != NULL;
    }
    memmove(p.text, from, end - from + 1);
    return p;
}

/* The user's own words, cut at a character, without control bytes. */
static struct words shown(const char *s, size_t len)
{
    struct words p;
    size_t n = MIN(len, (size_t)MAX_SHOWN);

    while (n < len && n > 0 && ((unsigned char)s[n] & 0xC0) == 0x80)
        n--;
    for (size_t i = 0; i < n; i++)
        p.text[i] = (unsigned char)s[i] < 0x20 || s[i] == 0x7F ? '?' : s[i];
    memcpy(p.text + n, n < len ? "..." : "", n < len ? 4 : 1);
    return p;
}

static const char *kind_word(const json_t *v)
{
    switch (json_typeof(v)) {
    case JSON_OBJECT:
        return "an object";
    case JSON_ARRAY:
        return "a list";
    case JSON_STRING:
        return "a string";
    case JSON_INTEGER:
        return "a whole number";
    case JSON_REAL:
        return "a fractional or very large number";
    case JSON_TRUE:
    case JSON_FALSE:
        return "a boolean";
    default:
        return "null";
    }
}

static int no_memory(struct walk *w)
{
    return tide_fail(w->err, -ENOMEM, "not enough memory for the arguments");
}

static int wrong_kind(struct walk *w, const struct place *at, const char *wanted, const json_t *v)
{
    if (!at->up)
        return tide_fail(w->err, -EINVAL, "the arguments must be %s, not %s", wanted, kind_word(v));
    return tide_fail(w->err, -EINVAL, "member '%s' must be %s, not %s", path_text(at).text, wanted,
                     kind_word(v));
}

/* ---- suggestions ---- */

/* Edits that turn a into b; anything above 2 is as good as endless. '-' and '_' are the same. */
static unsigned edit_distance(const char *a, const char *b)
{
    size_t n_a = strlen(a), n_b = strlen(b);
    unsigned row[MAX_WORD + 1];

    if (n_a > MAX_WORD || n_b > MAX_WORD)
        return UINT_MAX;
    for (size_t j = 0; j <= n_b; j++)
        row[j] = j;
    for (size_t i = 1; i <= n_a; i++) {
        unsigned diagonal = row[0];
        row[0] = i;
        for (size_t j = 1; j <= n_b; j++) {
            bool same = a[i - 1] == b[j - 1] || (strchr("-_", a[i - 1]) && strchr("-_", b[j - 1]));
            unsigned best = MIN(diagonal + !same, MIN(row[j], row[j - 1]) + 1);
            diagonal = row[j];
            row[j] = best;
        }
    }
    return row[n_b];
}

struct guess {
    const char *typed;
    const char *best;
    unsigned distance;
};

static struct guess guess_begin(const char *typed)
{
    unsigned most = strlen(typed) < 4 ? 1 : 2;
    return (struct guess){.typed = typed, .distance = most + 1};
}

static void guess_try(struct guess *g, const char *word)
{
    unsigned d = edit_distance(g->typed, word);
    if (d < g->distance) {
        g->distance = d;
        g->best = word;
    }
}

static void guess_members(struct guess *g, const struct schema_type *t)
{
    for (unsigned i = 0; t && i < t->n_members; i++)
        guess_try(g, t->members[i].name);
}

static int bad_word(struct walk *w, const struct place *at, const struct schema_type *t,
                    const char *text, size_t len)
{
    struct guess g = guess_begin(text);
    char list[256] = "";
    size_t used = 0;

    for (unsigned i = 0; i < t->n_names; i++)
        guess_try(&g, t->names[i]);
    if (g.best)
        snprintf(list, sizeof list, "; did you mean '%s'?", g.best);
    else if (t->n_names <= MAX_LISTED)
        for (unsigned i = 0; i < t->n_names && used < sizeof list; i++)
            used += snprintf(list + used, sizeof list - used, "%s%s", i ? ", " : "; it can be ",
                             t->names[i]);
    return tide_fail(w->err, -EINVAL, "member '%s' cannot be '%s'%s", path_text(at).text,
                     shown(text, len).text, list);
}

/* ---- scalars ---- */

static int parse_string(struct walk *w, const struct place *at, json_t *v, const char **out)
{
    if (!json_is_string(v))
        return wrong_kind(w, at, "a string", v);
    const char *s = json_string_value(v);
    size_t len = json_string_length(v);
    if (memchr(s, '\0', len))
        return tide_fail(w->err, -EINVAL, "member '%s' contains a zero byte (\\u0000)",
                         path_text(at).text);
    char *copy = arena_strndup(w->arena, s, len);
    if (!copy)
        return no_memory(w);
    *out = copy;
    return 0;
}

static int parse_bool(struct walk *w, const struct place *at, json_t *v, bool *out)
{
    static const char *const words[][2] = {
        {"off", "on"}, {"false", "true"}, {"no", "yes"}, {"n", "y"}};

    if (json_is_boolean(v)) {
        *out = json_is_true(v);
        return 0;
    }
    if (!(w->flags & SCHEMA_KEYVAL) || !json_is_string(v))
        return wrong_kind(w, at, "true or false", v);
    const char *s = json_string_value(v);
    for (size_t i = 0; i < sizeof words / sizeof words[0]; i++)
        for (int b = 0; b < 2; b++)
            if (!strcmp(s, words[i][b])) {
                *out = b;
                return 0;
            }
    return tide_fail(w->err, -EINVAL, "member '%s' must be 'on' or 'off', not '%s'",
                     path_text(at).text, shown(s, json_string_length(v)).text);
}

/* A whole number of any size, as sign and amount, so that one range check serves all types. */
struct whole {
    bool negative;
    uint64_t amount;
};

static int bad_number(struct walk *w, const struct place *at, const struct schema_type *t,
                      json_t *v)
{
    return tide_fail(w->err, -EINVAL, "member '%s' must be a %s, not '%s'", path_text(at).text,
                     t == &schema_size_type ? "size such as 4096, 64K or 1.5G" : "whole number",
                     shown(json_string_value(v), json_string_length(v)).text);
}

/* Digits from *s on, decimal or after 0x; moves *s behind them. False: none, or beyond 64 bit. */
static bool read_digits(const char **s, uint64_t *out)
{
    unsigned base = 10;
    const char *p = *s;
    uint64_t n = 0;

    if (p[0] == '0' && (p[1] == 'x' || p[1] == 'X')) {
        base = 16;
        p += 2;
    }
    const char *first = p;
    for (;; p++) {
        unsigned d = *p >= '0' && *p <= '9'                 ? *p - '0'
                     : base == 16 && *p >= 'a' && *p <= 'f' ? *p - 'a' + 10
                     : base == 16 && *p >= 'A' && *p <= 'F' ? *p - 'A' + 10
                                                            : 16;
        if (d >= base)
            break;
        if (__builtin_mul_overflow(n, base, &n) || __builtin_add_overflow(n, d, &n))
            return false;
    }
    *out = n;
    *s = p;
    return p > first;
}

/* ".5" before a suffix: nine digits are more than anybody types; the rest is ignored. */
static uint64_t read_fraction(const char **s, uint64_t unit)
{
    uint64_t top = 0, bottom = 1;

    for ((*s)++; **s >= '0' && **s <= '9'; (*s)++)
        if (bottom < 1000000000) {
            top = top * 10 + (**s - '0');
            bottom *= 10;
        }
    return (uint64_t)((unsigned __int128)top * unit / bottom);
}

/* "64K", "1.5G", "4096", "0x1000". */
bool schema_read_size(const char *s, uint64_t *out)
{
    static const char suffixes[] = "bkmgtpe";
    uint64_t unit = 1, whole, part = 0;
    size_t len = strlen(s);
    const char *hit = len && s[len - 1] ? strchr(suffixes, s[len - 1] | 0x20) : NULL;
    bool hex = s[0] == '0' && (s[1] | 0x20) == 'x';

    if (hit && !hex) {
        unit = (uint64_t)1 << (10 * (hit - suffixes));
        len--;
    }
    if (!read_digits(&s, &whole))
        return false;
    if (*s == '.' && unit > 1 && s[1] >= '0' && s[1] <= '9')
        part = read_fraction(&s, unit);
    if (__builtin_mul_overflow(whole, unit, &whole) || __builtin_add_overflow(whole, part, &whole))
        return false;
    *out = whole;
    return unit > 1 || (hit && !hex) ? s[0] && !s[1] : !s[0];
}

static int read_whole(struct walk *w, const struct place *at, const struct schema_type *t,
                      json_t *v, struct whole *out)
{
    if (json_is_integer(v)) {
        json_int_t i = json_integer_value(v);
        *out = (struct whole){.negative = i < 0, .amount = i < 0 ? -(uint64_t)i : (uint64_t)i};
        return 0;
    }
    if (!(w->flags & SCHEMA_KEYVAL) || !json_is_string(v))
        return wrong_kind(w, at, "a whole number in range", v);
    const char *s = json_string_value(v);
    out->negative = *s == '-';
    bool good;
    if (t == &schema_size_type)
        good = schema_read_size(s, &out->amount);
    else {
        s += out->negative;
        good = read_digits(&s, &out->amount) && !*s;
    }
    return good ? 0 : bad_number(w, at, t, v);
}

static bool whole_fits(const struct schema_type *t, struct whole n)
{
    if (t->kind == SCHEMA_UINT)
        return n.amount <= t->umax && (!n.negative || n.amount == 0);
    if (n.negative)
        return n.amount <= -(uint64_t)t->min;
    return n.amount <= (uint64_t)t->max;
}

static void store_whole(const struct schema_type *t, void *out, uint64_t v)
{
    switch (t->size) {
    case 2:
        *(uint16_t *)out = (uint16_t)v;
        break;
    case 4:
        *(uint32_t *)out = (uint32_t)v;
        break;
    default:
        *(uint64_t *)out = v;
    }
}

static int parse_whole(struct walk *w, const struct place *at, const struct schema_type *t,
                       json_t *v, void *out)
{
    struct whole n;
    int r = read_whole(w, at, t, v, &n);

    if (r < 0)
        return r;
    if (!whole_fits(t, n)) {
        if (t->kind == SCHEMA_UINT)
            return tide_fail(w->err, -EINVAL, "member '%s' must be between 0 and %llu",
                             path_text(at).text, (unsigned long long)t->umax);
        return tide_fail(w->err, -EINVAL, "member '%s' must be between %lld and %lld",
                         path_text(at).text, (long long)t->min, (long long)t->max);
    }
    store_whole(t, out, n.negative ? -n.amount : n.amount);
    return 0;
}

static int parse_number(struct walk *w, const struct place *at, json_t *v, double *out)
{
    if (json_is_number(v)) {
        *out = json_number_value(v);
        return 0;
    }
    if (!(w->flags & SCHEMA_KEYVAL) || !json_is_string(v))
        return wrong_kind(w, at, "a number", v);
    json_t *n = json_loadb(json_string_value(v), json_string_length(v), JSON_DECODE_ANY, NULL);
    bool good = json_is_number(n);
    if (good)
        *out = json_number_value(n);
    json_decref(n);
    if (good)
        return 0;
    return tide_fail(w->err, -EINVAL, "member '%s' must be a number, not '%s'", path_text(at).text,
                     shown(json_string_value(v), json_string_length(v)).text);
}

static int parse_enum(struct walk *w, const struct place *at, const struct schema_type *t,
                      json_t *v, void *out)
{
    if (!json_is_string(v))
        return wrong_kind(w, at, "a string", v);
    const char *s = json_string_value(v);
    for (unsigned i = 0; i < t->n_names; i++)
        if (!strcmp(s, t->names[i]) && strlen(s) == json_string_length(v)) {
            *(unsigned *)out = i; /* the enums are unsigned: none has a negative value */
            return 0;
        }
    return bad_word(w, at, t, s, json_string_length(v));
}

/* ---- objects ---- */

static bool is_object_type(const struct schema_type *t)
{
    return t->kind == SCHEMA_STRUCT || t->kind == SCHEMA_UNION || t->kind == SCHEMA_ALTERNATE;
}

static int parse_list(struct walk *w, const struct place *at, const struct schema_member *m,
                      json_t *v, char *base)
{
    if (!json_is_array(v))
        return wrong_kind(w, at, "a list", v);
    size_t n = json_array_size(v);
    /* One byte too many, so that an empty list is not NULL and differs from an absent one. */
    char *items = arena_alloc(w->arena, n * m->type->size + 1);
    if (!items)
        return no_memory(w);
    for (size_t i = 0; i < n; i++) {
        struct place in = {.up = at, .index = i, .depth = at->depth};
        int r = parse_value(w, &in, m->type, json_array_get(v, i), items + i * m->type->size);
        if (r < 0)
            return r;
        if (w->steps)
            w->steps->step(w->steps->arg);
    }
    *(size_t *)(base + m->aux) = n;
    *(void **)(base + m->off) = items;
    return 0;
}

static int parse_present(struct walk *w, const struct place *at, const struct schema_member *m,
                         json_t *v, char *base)
{
    struct place in = {.up = at, .name = m->name, .depth = at->depth};
    void *out = base + m->off;

    if (m->flags & SCHEMA_LIST)
        return parse_list(w, &in, m, v, base);
    if (is_object_type(m->type)) {
        void *p = arena_alloc(w->arena, m->type->size);
        if (!p)
            return no_memory(w);
        *(void **)out = p;
        out = p;
    }
    if (m->aux != SCHEMA_NO_AUX)
        *(bool *)(base + m->aux) = true;
    return parse_value(w, &in, m->type, v, out);
}

static void fill_default(const struct schema_member *m, char *base)
{
    void *out = base + m->off;

    if (m->type->kind == SCHEMA_STR)
        *(const char **)out = m->def_str;
    else if (m->type->kind == SCHEMA_BOOL)
        *(bool *)out = m->def;
    else if (m->type->kind == SCHEMA_ENUM)
        *(unsigned *)out = m->def;
    else
        store_whole(m->type, out, m->def);
}

static int parse_members(struct walk *w, const struct place *at, const struct schema_type *t,
                         json_t *v, char *base, size_t *found)
{
    for (unsigned i = 0; i < t->n_members; i++) {
        const struct schema_member *m = &t->members[i];
        json_t *value = json_object_get(v, m->name);
        int r = 0;
        if (value) {
            r = parse_present(w, at, m, value, base);
            ++*found;
        } else if (m->flags & SCHEMA_DEFAULT)
            fill_default(m, base);
        else if (!(m->flags & SCHEMA_OPTIONAL)) {
            struct place in = {.up = at, .name = m->name};
            r = tide_fail(w->err, -EINVAL, "member '%s' is missing", path_text(&in).text);
        }
        if (r < 0)
            return r;
    }
    return 0;
}

static bool names_member(const struct schema_type *t, const char *key)
{
    for (unsigned i = 0; t && i < t->n_members; i++)
        if (!strcmp(t->members[i].name, key))
            return true;
    return false;
}

/* Some key of `v` is a member of neither type: which? */
static int unknown_member(struct walk *w, const struct place *at, const struct schema_type *t,
                          const struct schema_type *branch, bool wrapped, json_t *v)
{
    const char *key;
    json_t *value;

    json_object_foreach (v, key, value) {
        if (names_member(t, key) || names_member(branch, key) || (wrapped && !strcmp(key, "data")))
            continue;
        struct guess g = guess_begin(key);
        guess_members(&g, t);
        guess_members(&g, branch);
        if (wrapped)
            guess_try(&g, "data");
        struct words path = path_text(at);
        char hint[MAX_WORD + 32] = "";
        if (g.best)
            snprintf(hint, sizeof hint, "; did you mean '%s'?", g.best);
        return tide_fail(w->err, -EINVAL, "member '%s%s%s' is not known here%s", path.text,
                         path.text[0] ? "." : "", shown(key, strlen(key)).text, hint);
    }
    assert(!"there are more members than known ones, so one is unknown");
    return -EINVAL;
}

/* What the tag selects: beside the other members, or, wrapped, inside "data". */
static int parse_branch(struct walk *w, const struct place *at, const struct schema_type *t,
                        json_t *v, char *base, const struct schema_type **branch, size_t *found)
{
    unsigned tag = *(unsigned *)(base + t->members[t->tag].off);

    *branch = t->branches[tag];
    if (!t->wrapped)
        return *branch ? parse_members(w, at, *branch, v, base + t->branch_off, found) : 0;

    struct place in = {.up = at, .name = "data", .depth = at->depth};
    json_t *data = json_object_get(v, "data");
    if (!data)
        return tide_fail(w->err, -EINVAL, "member '%s' is missing", path_text(&in).text);
    void *p = arena_alloc(w->arena, (*branch)->size);
    if (!p)
        return no_memory(w);
    *(const void **)(base + t->branch_off) = p;
    ++*found;
    int r = parse_value(w, &in, *branch, data, p);
    *branch = NULL; /* its members are not those of `v` */
    return r;
}

static int parse_object(struct walk *w, const struct place *at, const struct schema_type *t,
                        json_t *v, char *base)
{
    const struct schema_type *branch = NULL;
    struct place here = *at;
    size_t found = 0;

    if (v && !json_is_object(v))
        return wrong_kind(w, at, "an object", v);
    if (++here.depth > MAX_DEPTH)
        return tide_fail(w->err, -EINVAL, "member '%s' is nested deeper than %d objects",
                         path_text(at).text, MAX_DEPTH);
    int r = parse_members(w, &here, t, v, base, &found);
    if (r == 0 && t->kind == SCHEMA_UNION)
        r = parse_branch(w, &here, t, v, base, &branch, &found);
    if (r == 0 && found != json_object_size(v))
        r = unknown_member(w, &here, t, branch, t->wrapped, v);
    return r;
}

static int parse_alternate(struct walk *w, const struct place *at, const struct schema_type *t,
                           json_t *v, char *base)
{
    enum q_kind *kind = (enum q_kind *)base; /* the first member of every alternate */

    if (json_is_string(v) && t->has_string) {
        *kind = Q_KIND_STRING;
        return parse_string(w, at, v, (const char **)(base + t->string_off));
    }
    if (json_is_null(v) && t->has_null) {
        *kind = Q_KIND_NULL;
        return 0;
    }
    if (!json_is_object(v) || !t->object)
        return wrong_kind(w, at,
                          !t->object       ? "a string or null"
                          : !t->has_string ? "an object or null"
                          : !t->has_null   ? "a string or an object"
                                           : "a string, an object or null",
                          v);
    void *p = arena_alloc(w->arena, t->object->size);
    if (!p)
        return no_memory(w);
    *kind = Q_KIND_OBJECT;
    *(const void **)(base + t->object_off) = p;
    return parse_object(w, at, t->object, v, p);
}

static int parse_value(struct walk *w, const struct place *at, const struct schema_type *t,
                       json_t *v, void *out)
{
    switch (t->kind) {
    case SCHEMA_STR:
        return parse_string(w, at, v, out);
    case SCHEMA_BOOL:
        return parse_bool(w, at, v, out);
    case SCHEMA_INT:
    case SCHEMA_UINT:
        return parse_whole(w, at, t, v, out);
    case SCHEMA_NUMBER:
        return parse_number(w, at, v, out);
    case SCHEMA_ANY:
        *(json_t **)out = v;
        return 0;
    case SCHEMA_ENUM:
        return parse_enum(w, at, t, v, out);
    case SCHEMA_STRUCT:
    case SCHEMA_UNION:
        return parse_object(w, at, t, v, out);
    case SCHEMA_ALTERNATE:
        return parse_alternate(w, at, t, v, out);
    }
    __builtin_unreachable();
}

static int parse_root(struct walk *w, const struct schema_type *type, json_t *value, void **out)
{
    struct place root = {0};
    void *p = arena_alloc(w->arena, type->size);

    if (!p)
        return no_memory(w);
    int r = parse_value(w, &root, type, value, p);
    if (r == 0)
        *out = p;
    return r;
}

int schema_parse(const struct schema_type *type, json_t *value, struct arena *a, unsigned flags,
                 void **out, struct tide_error *err)
{
    struct walk w = {.arena = a, .flags = flags, .err = err};
    return parse_root(&w, type, value, out);
}

int schema_parse_in_steps(const struct schema_type *type, json_t *value, struct arena *a,
                          const struct schema_steps *steps, void **out, struct tide_error *err)
{
    struct walk w = {.arena = a, .steps = steps, .err = err};
    return parse_root(&w, type, value, out);
}
