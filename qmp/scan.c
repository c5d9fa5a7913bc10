/* SPDX-License-Identifier: Apache-2.0 */
/* The scanner: a state machine over bytes. It looks at each byte once and keeps what it needs
 * between calls, so pieces of one byte cost no more than one large piece. Runs of bytes that are
 * copied unchanged go into the buffer in one go: `from` is where the run began, copy_run() ends it.
 */
#include "qmp/scan.h"

#include <errno.h>
#include <stdbool.h>
#include <string.h>

#include "base/bytes.h"
#include "base/mem.h"

#define KEEP_SIZE ((size_t)1 << 20) /* a larger buffer is given back after its value */

enum state {
    IDLE,   /* between values */
    INSIDE, /* in an object or list, outside of strings and words */
    WORD,   /* in a number or a word such as true */
    STRING,
    ESCAPE, /* behind a backslash, which is not in the buffer yet */
    SKIP,   /* after an error, up to the next newline or 0xFF */
    DONE,   /* s->value is with the caller */
};

enum class { STRAY, SPACE, PUNCT, OPEN, CLOSE, QUOTE, LETTER };

static const uint8_t classes[256] = {
    [' '] = SPACE,          ['\t'] = SPACE,         ['\r'] = SPACE,         ['\n'] = SPACE,
    [','] = PUNCT,          [':'] = PUNCT,          ['{'] = OPEN,           ['['] = OPEN,
    ['}'] = CLOSE,          [']'] = CLOSE,          ['"'] = QUOTE,          ['\''] = QUOTE,
    ['0' ... '9'] = LETTER, ['a' ... 'z'] = LETTER, ['A' ... 'Z'] = LETTER, ['+'] = LETTER,
    ['-'] = LETTER,         ['.'] = LETTER,         ['_'] = LETTER,
};

/* Bytes that a string holds as they are: all but quotes, the backslash, control bytes and 0xFF. */
static const uint8_t plain[256] = {
    [0x20 ... 0x21] = 1,
    [0x23 ... 0x26] = 1,
    [0x28 ... 0x5B] = 1,
    [0x5D ... 0xFE] = 1,
};

void scan_init(struct scan *s)
{
    *s = (struct scan){.max_depth = SCAN_MAX_DEPTH,
                       .max_size = SCAN_MAX_SIZE,
                       .max_tokens = SCAN_MAX_TOKENS,
                       .state = IDLE};
}

void scan_fini(struct scan *s)
{
    mem_free(s->buf);
    s->buf = NULL;
}

/* ---- the buffer ---- */

static void forget(struct scan *s, int state)
{
    if (s->size > KEEP_SIZE) {
        mem_free(s->buf);
        s->buf = NULL;
        s->size = 0;
    }
    s->len = s->depth = s->n_tokens = 0;
    s->value = NULL;
    s->value_len = 0;
    s->state = state;
}

static int fail(struct scan *s, int next_state, int code, struct tide_error *err, const char *fmt,
                unsigned detail)
{
    forget(s, next_state);
    return tide_fail(err, code, fmt, detail);
}

/* Makes room for n bytes and the zero byte at the end. */
static int grow(struct scan *s, size_t n, struct tide_error *err)
{
    if (n > s->max_size - s->len)
        return fail(s, SKIP, -EINVAL, err, "a JSON value is longer than %u bytes",
                    (unsigned)s->max_size);
    if (s->len + n + 1 > s->size) {
        size_t size = MAX(s->size * 2, MAX(s->len + n + 1, (size_t)512));
        char *buf = mem_realloc(s->buf, size, 1);
        if (!buf)
            return fail(s, SKIP, -ENOMEM, err, "not enough memory for a JSON value of %u bytes",
                        (unsigned)size);
        s->buf = buf;
        s->size = size;
    }
    return 0;
}

static inline int append(struct scan *s, const char *p, size_t n, struct tide_error *err)
{
    if (s->len + n + 1 > s->size || n > s->max_size - s->len) {
        int r = grow(s, n, err);
        if (r < 0)
            return r;
    }
    memcpy(s->buf + s->len, p, n);
    s->len += n;
    return 0;
}

/* ---- errors that a byte causes ---- */

/* `c` cannot stand here. A newline or 0xFF is where the next value may begin; else skip to one. */
static int bad_byte(struct scan *s, unsigned char c, struct tide_error *err)
{
    bool in_string = s->state == STRING || s->state == ESCAPE;
    int next = c == '\n' || c == 0xFF ? IDLE : SKIP;

    if (c == 0xFF)
        return fail(s, next, -EINVAL, err, "byte 0x%02x starts afresh: what came before is dropped",
                    c);
    if (in_string && c == '\n')
        return fail(s, next, -EINVAL, err, "a JSON string has no end in its line (byte 0x%02x)", c);
    if (in_string)
        return fail(s, next, -EINVAL, err, "byte 0x%02x in a JSON string has to be escaped", c);
    if (c > 0x20 && c < 0x7F)
        return fail(s, next, -EINVAL, err, "'%c' cannot stand here in JSON", c);
    return fail(s, next, -EINVAL, err, "byte 0x%02x cannot stand in JSON outside of a string", c);
}

static int count_token(struct scan *s, struct tide_error *err)
{
    if (++s->n_tokens > s->max_tokens)
        return fail(s, SKIP, -EINVAL, err, "a JSON value has more than %u parts", s->max_tokens);
    return 0;
}

static int open_level(struct scan *s, char c, struct tide_error *err)
{
    if (s->depth == s->max_depth)
        return fail(s, SKIP, -EINVAL, err, "a JSON value is nested deeper than %u levels",
                    s->max_depth);
    uint8_t bit = 1 << s->depth % 8, *byte = &s->is_list[s->depth / 8];
    *byte = c == '[' ? *byte | bit : *byte & ~bit;
    s->depth++;
    return 0;
}

static int close_level(struct scan *s, char c, struct tide_error *err)
{
    if (s->depth == 0)
        return bad_byte(s, c, err);
    unsigned level = s->depth - 1;
    bool list = s->is_list[level / 8] >> level % 8 & 1;
    if (list != (c == ']'))
        return fail(s, SKIP, -EINVAL, err, "'%c' closes something that was not opened by its like",
                    c);
    s->depth--;
    return 0;
}

/* ---- words ---- */

/* Is this an integer, rightly spelled or not, that 64 bits cannot hold? */
static bool is_huge_integer(const char *p, size_t n)
{
    bool negative = n > 0 && p[0] == '-';
    p += negative;
    n -= negative;
    if (n < 19)
        return false;
    for (size_t i = 0; i < n; i++)
        if (p[i] < '0' || p[i] > '9')
            return false;
    return n > 19 || memcmp(p, negative ? "9223372036854775808" : "9223372036854775807", 19) > 0;
}

static int end_word(struct scan *s, struct tide_error *err)
{
    s->state = INSIDE;
    if (is_huge_integer(s->buf + s->word, s->len - s->word))
        return append(s, "e0", 2, err);
    return 0;
}

static int value_found(struct scan *s)
{
    s->buf[s->len] = '\0';
    s->value = s->buf;
    s->value_len = s->len;
    s->state = DONE;
    return 1;
}

/* ---- the machine: each step takes bytes from *p and returns like scan_next(), 0: go on ---- */

static int skip(struct scan *s, const char **p, const char *end)
{
    while (*p < end) {
        unsigned char c = *(*p)++;
        if (c == '\n' || c == 0xFF) {
            s->state = IDLE;
            break;
        }
    }
    return 0;
}

static int in_word(struct scan *s, const char **p, const char *end, struct tide_error *err)
{
    const char *from = *p;

    while (*p < end && classes[(unsigned char)**p] == LETTER)
        ++*p;
    int r = append(s, from, *p - from, err);
    if (r == 0 && *p < end) {
        r = end_word(s, err);
        if (r == 0 && s->depth == 0)
            r = value_found(s);
    }
    return r;
}

static int end_string(struct scan *s, struct tide_error *err)
{
    int r = append(s, "\"", 1, err);
    s->state = r < 0 ? s->state : INSIDE;
    return r == 0 && s->depth == 0 ? value_found(s) : r;
}

static int in_string(struct scan *s, const char **p, const char *end, struct tide_error *err)
{
    const char *from = *p;

    while (*p < end && plain[(unsigned char)**p])
        ++*p;
    int r = append(s, from, *p - from, err);
    if (r < 0 || *p == end)
        return r;
    unsigned char c = *(*p)++;
    if (c == (unsigned char)s->quote)
        return end_string(s, err);
    if (c == '"')
        return append(s, "\\\"", 2, err); /* in single quotes */
    if (c == '\'')
        return append(s, "'", 1, err);
    if (c != '\\')
        return bad_byte(s, c, err);
    s->state = ESCAPE;
    return 0;
}

static int in_escape(struct scan *s, const char **p, struct tide_error *err)
{
    unsigned char c = *(*p)++;
    char pair[2] = {'\\', c};

    if (c < 0x20 || c == 0xFF)
        return bad_byte(s, c, err);
    s->state = STRING;
    return c == '\'' ? append(s, "'", 1, err) : append(s, pair, 2, err);
}

static int begin_string(struct scan *s, char c, struct tide_error *err)
{
    int r = count_token(s, err);
    if (r == 0)
        r = append(s, "\"", 1, err);
    if (r == 0) {
        s->quote = c;
        s->state = STRING;
    }
    return r;
}

static int begin_word(struct scan *s, struct tide_error *err)
{
    int r = count_token(s, err);
    if (r == 0) {
        s->word = s->len;
        s->state = WORD;
    }
    return r;
}

/* One byte outside of strings and words, inside or between values. */
static int one_byte(struct scan *s, unsigned char c, struct tide_error *err)
{
    int r;

    switch (classes[c]) {
    case OPEN:
        r = count_token(s, err);
        if (r == 0)
            r = open_level(s, c, err);
        break;
    case CLOSE:
        r = count_token(s, err);
        if (r == 0)
            r = close_level(s, c, err);
        break;
    case PUNCT:
        r = s->depth ? count_token(s, err) : bad_byte(s, c, err);
        break;
    default:
        r = bad_byte(s, c, err);
    }
    if (r < 0)
        return r;
    char byte = c;
    r = append(s, &byte, 1, err);
    if (r < 0)
        return r;
    s->state = INSIDE;
    return s->depth == 0 ? value_found(s) : 0;
}

static int between(struct scan *s, const char **p, const char *end, struct tide_error *err)
{
    const char *from = *p;

    while (*p < end && classes[(unsigned char)**p] == SPACE)
        ++*p;
    /* White space is needed only to keep `1 2` from becoming 12. */
    if (s->state == INSIDE && *p > from && classes[(unsigned char)s->buf[s->len - 1]] == LETTER) {
        int r = append(s, " ", 1, err);
        if (r < 0)
            return r;
    }
    if (*p == end)
        return 0;
    unsigned char c = **p;
    if (classes[c] == LETTER)
        return begin_word(s, err);
    ++*p;
    return classes[c] == QUOTE ? begin_string(s, c, err) : one_byte(s, c, err);
}

int scan_next(struct scan *s, const char **data, size_t *len, struct tide_error *err)
{
    const char *p = *data, *end = p + *len;
    int r = 0;

    if (s->state == DONE)
        forget(s, IDLE);
    while (p < end && r == 0) {
        switch (s->state) {
        case SKIP:
            r = skip(s, &p, end);
            break;
        case WORD:
            r = in_word(s, &p, end, err);
            break;
        case STRING:
            r = in_string(s, &p, end, err);
            break;
        case ESCAPE:
            r = in_escape(s, &p, err);
            break;
        default:
            r = between(s, &p, end, err);
        }
    }
    *data = p;
    *len = end - p;
    return r;
}
