/* SPDX-License-Identifier: Apache-2.0 */
/* Reading lists of actions. A line is cut into words; those with a place in the short form of their
 * verb become members by that place, all others are options. What has no JSON of its own goes as
 * key=value through keyval_parse(), which knows dots and lists; then the schema says what is a
 * number. The schema's parser has the last word, so that what a line may hold is written there
 * only. */
#include "cli/txn_text.h"
#include "base/mem.h"
#include "cli/cli.h"
#include "cli/table.h"
#include "cli/txn_verbs.h"
#include "schema/types.h"
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#define NOWHERE SIZE_MAX
#define SHOWN 60
#define N_KINDS (sizeof q_transaction_action_kind_names / sizeof *q_transaction_action_kind_names)

/* ---- words ---- */

struct word {
    char *text; /* without quotes and escapes */
    size_t len, cap;
    size_t slash, eq; /* the first that is not quoted, or NOWHERE */
    bool quoted;      /* some of it is */
    bool two_slashes;
    json_t *json; /* of KEY:=JSON; then text is KEY */
    const char *raw;
    size_t raw_len; /* as it was typed */
};

struct line {
    const char *file;
    unsigned number;
    const char *p, *end;
    struct word *words;
    size_t n, cap;
    struct tide_error *err;
};

static int shown(const char *raw, size_t len)
{
    size_t n = len < SHOWN ? len : SHOWN;
    while (n < len && n > 0 && ((unsigned char)raw[n] & 0xc0) == 0x80)
        n--;
    return (int)n;
}

/* "'list', line 3, word 'x/y/z': " + what is wrong. */
static int bad_word(const struct line *l, const struct word *w, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
static int bad_word(const struct line *l, const struct word *w, const char *fmt, ...)
{
    char why[300];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(why, sizeof why, fmt, ap);
    va_end(ap);
    return tide_fail(l->err, -EINVAL, "'%s', line %u, word '%.*s': %s", l->file, l->number,
                     shown(w->raw, w->raw_len), w->raw, why);
}

static int bad_line(const struct line *l, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));
static int bad_line(const struct line *l, const char *fmt, ...)
{
    char why[400];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(why, sizeof why, fmt, ap);
    va_end(ap);
    return tide_fail(l->err, -EINVAL, "'%s', line %u: %s", l->file, l->number, why);
}

static bool is_blank(char c)
{
    return c == ' ' || c == '\t' || c == '\r';
}

static void add_text(struct word *w, const char *text, size_t len)
{
    w->text = cli_reserve(w->text, w->len + len + 1, &w->cap, 1);
    memcpy(w->text + w->len, text, len);
    w->len += len;
    w->text[w->len] = '\0';
}

/* A part in quotes is a JSON string. */
static int take_quoted(struct line *l, struct word *w)
{
    const char *p = l->p + 1;
    while (p < l->end && *p != '"')
        p += *p == '\\' && p + 1 < l->end ? 2 : 1;
    w->raw_len = (size_t)(p - w->raw);
    if (p >= l->end)
        return bad_word(l, w, "the quote is not closed: put \" behind its last character");
    json_error_t why;
    json_t *s = json_loadb(l->p, (size_t)(p + 1 - l->p), JSON_DECODE_ANY | JSON_ALLOW_NUL, &why);
    if (!s)
        return bad_word(l, w,
                        "what is in quotes is no JSON string (%s): write \\\" and \\\\ for "
                        "quote and backslash",
                        why.text);
    add_text(w, json_string_value(s), json_string_length(s));
    json_decref(s);
    w->quoted = true;
    l->p = p + 1;
    return 0;
}

static int take_json(struct line *l, struct word *w)
{
    json_error_t why;
    w->json = json_loadb(l->p, (size_t)(l->end - l->p),
                         JSON_DECODE_ANY | JSON_DISABLE_EOF_CHECK | JSON_REJECT_DUPLICATES, &why);
    if (w->json)
        l->p += why.position;
    const char *end = l->p;
    while (end < l->end && !is_blank(*end))
        end++;
    w->raw_len = (size_t)(end - w->raw);
    if (!w->json)
        return bad_word(l, w, "what follows := is no JSON: %s", why.text);
    if (end > l->p)
        return bad_word(l, w, "there is more behind the JSON: put a blank before it");
    w->text[--w->len] = '\0'; /* the colon */
    w->eq = NOWHERE;
    return 0;
}

static int take_plain(struct line *l, struct word *w)
{
    unsigned char c = (unsigned char)*l->p;
    if (c < 0x20 || c == 0x7f) {
        w->raw_len = (size_t)(l->p - w->raw);
        return bad_word(l, w,
                        "a control character (byte 0x%02x) follows: write it in quotes as "
                        "\\u%04x",
                        c, c);
    }
    if (c == '=' && w->eq == NOWHERE) {
        w->eq = w->len;
        if (w->len > 1 && l->p[-1] == ':') {
            l->p++;
            return take_json(l, w);
        }
    }
    if (c == '/' && w->slash != NOWHERE)
        w->two_slashes = true;
    if (c == '/' && w->slash == NOWHERE)
        w->slash = w->len;
    add_text(w, l->p++, 1);
    return 0;
}

static int take_word(struct line *l)
{
    l->words = cli_reserve(l->words, l->n + 1, &l->cap, sizeof *l->words);
    struct word *w = &l->words[l->n++];
    *w = (struct word){.slash = NOWHERE, .eq = NOWHERE, .raw = l->p};
    add_text(w, "", 0);
    int r = 0;
    while (r == 0 && l->p < l->end && !is_blank(*l->p) && !w->json)
        r = *l->p == '"' ? take_quoted(l, w) : take_plain(l, w);
    if (r < 0)
        return r;
    w->raw_len = (size_t)(l->p - w->raw);
    if (memchr(w->text, '\0', w->len))
        return bad_word(l, w, "no name or value can hold a zero byte (\\u0000)");
    json_t *utf8 = json_stringn(w->text, w->len);
    if (!utf8)
        return bad_word(l, w, "this is no valid UTF-8 text");
    json_decref(utf8);
    return 0;
}

static int take_words(struct line *l)
{
    int r = 0;
    while (r == 0) {
        while (l->p < l->end && is_blank(*l->p))
            l->p++;
        if (l->p == l->end || *l->p == '#')
            return 0;
        r = take_word(l);
    }
    return r;
}

static void free_words(struct line *l)
{
    for (size_t i = 0; i < l->n; i++) {
        mem_free(l->words[i].text);
        json_decref(l->words[i].json);
    }
    mem_free(l->words);
}

static bool is_keyword(const struct word *w, const char *keyword)
{
    return !w->quoted && !w->json &&
           (strcmp(w->text, keyword) == 0 ||
            (strcmp(keyword, "from") == 0 && strcmp(w->text, "<-") == 0));
}

/* ---- members ---- */

/* What a line says, before the schema has seen it. */
struct form {
    const struct line *l;
    const struct txn_verb *verb; /* NULL: by its kind */
    const char *kind;
    const struct schema_type *type;
    char *keyval; /* "a=b,c.d=e", a comma in a value doubled */
    size_t used, cap;
    json_t *json;     /* members that are JSON already */
    json_t *data;     /* all of them */
    size_t n_sources; /* behind from */
    bool has_from;
};

static void put_keyval(struct form *f, const char *key, const char *value, size_t len)
{
    char *text = cli_alloc(len * 2 + 1, 1);
    size_t n = 0;
    for (size_t i = 0; i < len; i++) {
        text[n++] = value[i];
        if (value[i] == ',')
            text[n++] = ',';
    }
    size_t more = strlen(key) + n + 2;
    f->keyval = cli_reserve(f->keyval, f->used + more + 1, &f->cap, 1);
    f->used +=
        (size_t)snprintf(f->keyval + f->used, more + 1, "%s%s=%s", f->used ? "," : "", key, text);
    mem_free(text);
}

/* A value that is JSON already: it takes the place that keyval_parse() keeps for it. */
static int put_json(struct form *f, const char *key, json_t *value)
{
    put_keyval(f, key, "", 0);
    return json_object_set(f->json, key, value) < 0 ? tide_fail(f->l->err, -ENOMEM, "out of memory")
                                                    : 0;
}

/* "NODE/NAME" into two members; `node` may be left out if there is a default. */
static int split(struct form *f, const struct word *w, const char *what)
{
    if (w->two_slashes)
        return bad_word(f->l, w,
                        "there is more than one '/': put a name that has one in quotes, "
                        "as in NODE/\"a/b\"");
    if (w->slash == NOWHERE)
        return bad_word(f->l, w, "%s is written NODE/NAME, with a '/' between", what);
    return 0;
}

static int put_source(struct form *f, const struct word *w)
{
    char key[40];
    if (w->two_slashes)
        return split(f, w, "");
    if (w->slash == NOWHERE) {
        if (!w->quoted && schema_is_bool(f->type, f->json, w->text))
            return bad_word(f->l, w,
                            "behind 'from' this is a bitmap: write \"%s\" if it is one, "
                            "or '%s' before 'from'",
                            w->text, w->text);
        snprintf(key, sizeof key, "bitmaps.%zu", f->n_sources++);
        put_keyval(f, key, w->text, w->len);
        return 0;
    }
    snprintf(key, sizeof key, "bitmaps.%zu.node", f->n_sources);
    put_keyval(f, key, w->text, w->slash);
    snprintf(key, sizeof key, "bitmaps.%zu.name", f->n_sources++);
    put_keyval(f, key, w->text + w->slash + 1, w->len - w->slash - 1);
    return 0;
}

static const char *real_key(const struct form *f, const char *key)
{
    const struct txn_verb *v = f->verb;
    return v && v->alias && strcmp(v->alias, key) == 0 ? v->alias_of : key;
}

static int put_option(struct form *f, const struct word *w)
{
    static const char key_chars[] = "abcdefghijklmnopqrstuvwxyz0123456789-_";
    if (w->json) {
        if (strchr(w->text, '.'))
            return bad_word(f->l, w, "KEY:=JSON takes no dots: give the outer member whole");
        return put_json(f, real_key(f, w->text), w->json);
    }
    if (w->eq != NOWHERE) {
        char *key = cli_strdup(w->text);
        key[w->eq] = '\0';
        put_keyval(f, real_key(f, key), w->text + w->eq + 1, w->len - w->eq - 1);
        mem_free(key);
        return 0;
    }
    if (f->verb && f->verb->sources && !schema_is_bool(f->type, f->json, w->text))
        return bad_word(f->l, w, "expected 'from' or KEY=VALUE here: %s", f->verb->usage);
    if (w->quoted || !*w->text || strspn(w->text, key_chars) != w->len)
        return bad_word(f->l, w, "expected KEY=VALUE here");
    return put_json(f, w->text, json_true());
}

/* The words with a place: "node/name to new-name", "device to target", "type". *i moves on. */
static int put_placed(struct form *f, size_t *i)
{
    const struct line *l = f->l;
    char places[64];
    snprintf(places, sizeof places, "%s", f->verb->places);
    char *save, *place = strtok_r(places, " ", &save);
    for (; place; place = strtok_r(NULL, " ", &save), ++*i) {
        const struct word *w = *i < l->n ? &l->words[*i] : NULL;
        char *slash = strchr(place, '/');
        if (!w || (!slash && (w->eq != NOWHERE || w->json) && strcmp(place, "to") != 0))
            return bad_line(l, "'%s' needs more: %s", f->verb->word, f->verb->usage);
        if (strcmp(place, "to") == 0) {
            if (!is_keyword(w, "to"))
                return bad_word(l, w, "expected 'to': %s", f->verb->usage);
            continue;
        }
        if (!slash) {
            put_keyval(f, place, w->text, w->len);
            continue;
        }
        int r = split(f, w, "a bitmap");
        if (r < 0)
            return r;
        *slash = '\0';
        put_keyval(f, place, w->text, w->slash);
        put_keyval(f, slash + 1, w->text + w->slash + 1, w->len - w->slash - 1);
    }
    return 0;
}

static int put_words(struct form *f)
{
    const struct line *l = f->l;
    size_t i = 1;
    int r = f->verb ? put_placed(f, &i) : 0;
    for (; i < l->n && r == 0; i++) {
        const struct word *w = &l->words[i];
        if (f->verb && f->verb->sources && !f->has_from && is_keyword(w, "from"))
            f->has_from = true;
        else if (f->has_from && w->eq == NOWHERE && !w->json)
            r = put_source(f, w);
        else
            r = put_option(f, w);
    }
    if (r == 0 && f->verb && f->verb->sources && !f->has_from)
        r = bad_line(l, "'%s' needs 'from' and the bitmaps it takes: %s", f->verb->word,
                     f->verb->usage);
    if (r == 0 && f->has_from && f->n_sources == 0) {
        json_t *none = cli_pack("[]");
        r = put_json(f, "bitmaps", none);
        json_decref(none);
    }
    return r;
}

/* ---- lines ---- */

static int unknown_kind(const struct line *l)
{
    const struct schema_type *t = &q_transaction_action_type;
    const char *typed = l->words[0].text, *best = NULL;
    unsigned least = 3;
    for (const struct txn_verb *v = txn_verbs; v->word; v++) {
        unsigned d = text_distance(typed, v->word);
        if (d < least && schema_branch(t, v->kind)) {
            best = v->word;
            least = d;
        }
    }
    for (size_t i = 0; i < N_KINDS; i++) {
        unsigned d = text_distance(typed, q_transaction_action_kind_names[i]);
        if (d < least) {
            best = q_transaction_action_kind_names[i];
            least = d;
        }
    }
    if (best)
        return bad_word(l, &l->words[0], "there is no such action; did you mean '%s'?", best);
    return bad_word(l, &l->words[0],
                    "there is no such action; 'tidemark txn run --help' lists them");
}

static int find_kind(struct form *f)
{
    const struct word *w = &f->l->words[0];
    f->verb = w->quoted ? NULL : txn_verb_find(w->text);
    f->kind = f->verb ? f->verb->kind : w->text;
    f->type = schema_branch(&q_transaction_action_type, f->kind);
    if (f->type)
        return 0;
    if (f->verb)
        return bad_word(f->l, w, "this version has no action '%s'", f->kind);
    return unknown_kind(f->l);
}

/* What keyval_parse() made, with the values that were JSON before, in the schema's types. */
static int type_members(struct form *f, json_t *pairs)
{
    const char *key;
    json_t *v;
    int r = 0;
    json_object_foreach (f->json, key, v)
        r |= json_object_set(pairs, key, v);
    f->data = r < 0 ? NULL : schema_typed(f->type, pairs);
    return f->data ? 0 : tide_fail(f->l->err, -ENOMEM, "out of memory");
}

/* The error of the schema's parser. What is still a word has no better spelling: then the reading
 * that takes words says what it wants. */
static int check_members(struct form *f)
{
    struct arena a = {0};
    struct tide_error why, words;
    void *parsed;
    int r = schema_parse(f->type, f->data, &a, 0, &parsed, &why);
    if (r < 0 && schema_parse(f->type, f->data, &a, SCHEMA_KEYVAL, &parsed, &words) < 0)
        why = words;
    arena_free(&a);
    return r < 0 ? bad_line(f->l, "'%s': %s", f->l->words[0].text, why.msg) : 0;
}

static int parse_words(const struct line *l, json_t **action)
{
    struct form f = {.l = l, .json = cli_pack("{}")};
    struct tide_error why;
    json_t *pairs = NULL;
    int r = find_kind(&f);
    if (r == 0)
        r = put_words(&f);
    if (r == 0 && keyval_parse(f.keyval ? f.keyval : "", NULL, &pairs, &why) < 0)
        r = bad_line(l, "%s", why.msg);
    if (r == 0)
        r = type_members(&f, pairs);
    if (r == 0)
        r = check_members(&f);
    if (r == 0)
        *action = cli_pack("{s:s, s:O}", "type", f.kind, "data", f.data);
    json_decref(pairs);
    json_decref(f.json);
    json_decref(f.data);
    mem_free(f.keyval);
    return r;
}

static int parse_line(struct line *l, size_t *cap, struct txn_list *out)
{
    json_t *action = NULL;
    int r = take_words(l);
    if (r < 0 || l->n == 0)
        return r;
    r = parse_words(l, &action);
    if (r < 0)
        return r;
    size_t n = json_array_size(out->actions);
    out->lines = cli_reserve(out->lines, n + 1, cap, sizeof *out->lines);
    out->lines[n] = l->number;
    return json_array_append_new(out->actions, action) < 0
               ? tide_fail(l->err, -ENOMEM, "out of memory")
               : 0;
}

static int parse_text(const char *name, const char *text, size_t len, struct txn_list *out,
                      struct tide_error *err)
{
    const char *p = text, *end = text + len;
    int r = 0;
    out->actions = cli_pack("[]");
    size_t cap = 1;
    out->lines = cli_alloc(cap, sizeof *out->lines);
    for (unsigned number = 1; p < end && r == 0; number++) {
        const char *stop = memchr(p, '\n', (size_t)(end - p));
        stop = stop ? stop : end;
        struct line l = {.file = name, .number = number, .p = p, .end = stop, .err = err};
        r = parse_line(&l, &cap, out);
        free_words(&l);
        p = stop + 1;
    }
    return r;
}

/* ---- JSON ---- */

static int parse_json(const char *name, const char *text, size_t len, struct txn_list *out,
                      struct tide_error *err)
{
    json_error_t why;
    json_t *v = json_loadb(text, len, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &why);
    if (!v)
        return tide_fail(err, -EINVAL, "'%s', line %d, column %d: %s", name, why.line, why.column,
                         why.text);
    if (json_is_array(v)) {
        out->actions = v;
        return 0;
    }
    const char *key;
    json_t *member;
    int r = 0;
    json_object_foreach (v, key, member) {
        if (r == 0 && strcmp(key, "actions") != 0 && strcmp(key, "properties") != 0)
            r = tide_fail(err, -EINVAL,
                          "'%s' has a member '%.60s': it takes 'actions' and 'properties'", name,
                          key);
    }
    out->actions = json_incref(json_object_get(v, "actions"));
    out->properties = json_incref(json_object_get(v, "properties"));
    json_decref(v);
    if (r == 0 && !json_is_array(out->actions))
        r = tide_fail(err, -EINVAL,
                      "'%s' holds neither a list of actions nor an object with 'actions'", name);
    if (r == 0 && out->properties && !json_is_object(out->properties))
        r = tide_fail(err, -EINVAL, "'%s': 'properties' must be an object", name);
    return r;
}

int txn_list_parse(const char *name, const char *text, size_t len, struct txn_list *out,
                   struct tide_error *err)
{
    *out = (struct txn_list){0};
    size_t i = 0;
    if (len >= 3 && memcmp(text, "\xef\xbb\xbf", 3) == 0) { /* the mark of some editors */
        text += 3;
        len -= 3;
    }
    while (i < len && (is_blank(text[i]) || text[i] == '\n'))
        i++;
    int r = i < len && (text[i] == '[' || text[i] == '{') ? parse_json(name, text, len, out, err)
                                                          : parse_text(name, text, len, out, err);
    if (r < 0)
        txn_list_free(out);
    return r;
}

void txn_list_free(struct txn_list *list)
{
    json_decref(list->actions);
    json_decref(list->properties);
    mem_free(list->lines);
    *list = (struct txn_list){0};
}
