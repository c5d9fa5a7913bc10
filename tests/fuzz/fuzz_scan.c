/* SPDX-License-Identifier: Apache-2.0 */
/* Fuzzer for qmp/scan: whatever the bytes and however they are cut into pieces, the values and
 * errors are the same, every value ends in a zero byte, and nothing is read or written out of
 * bounds.
 *
 *     clang -g -O1 -fsanitize=fuzzer,address,undefined -D_GNU_SOURCE -std=gnu17 -I. \
 *         tests/fuzz/fuzz_scan.c qmp/scan.c base/mem.c base/error.c base/log.c -o fuzz_scan
 *
 * The first byte of the input says how to cut the rest; limits are small so that they are met. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/bytes.h"
#include "base/mem.h"
#include "qmp/scan.h"

/* What came out, as one text: "V" value zero, or "E" message zero. */
struct record {
    char *text;
    size_t len;
};

static void note(struct record *rec, char kind, const char *text, size_t len)
{
    char *grown = realloc(rec->text, rec->len + len + 2);
    if (!grown)
        abort();
    rec->text = grown;
    rec->text[rec->len] = kind;
    memcpy(rec->text + rec->len + 1, text, len);
    rec->text[rec->len + 1 + len] = '\0';
    rec->len += len + 2;
}

static void feed(struct scan *s, const char *data, size_t len, struct record *rec)
{
    struct tide_error err;
    int r;

    while ((r = scan_next(s, &data, &len, &err)) != 0) {
        if (r > 0 && s->value[s->value_len] != '\0')
            abort();
        if (r > 0)
            note(rec, 'V', s->value, s->value_len);
        else
            note(rec, 'E', err.msg, strlen(err.msg));
    }
    if (len)
        abort();
}

static struct record run(const char *data, size_t len, size_t piece)
{
    struct record rec = {0};
    struct scan s;

    scan_init(&s);
    s.max_depth = 20;
    s.max_size = 300;
    s.max_tokens = 100;
    while (len) {
        size_t n = MIN(piece, len);
        /* A copy of its own lets the sanitizer see reads behind the piece. */
        char *copy = malloc(n);
        if (!copy)
            abort();
        memcpy(copy, data, n);
        feed(&s, copy, n, &rec);
        free(copy);
        data += n;
        len -= n;
    }
    scan_fini(&s);
    return rec;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    if (len < 1)
        return 0;
    const char *text = (const char *)data + 1;
    struct record whole = run(text, len - 1, len), cut = run(text, len - 1, 1 + data[0] % 16);
    if (whole.len != cut.len || (whole.len && memcmp(whole.text, cut.text, whole.len)))
        abort();
    free(whole.text);
    free(cut.text);
    return 0;
}
