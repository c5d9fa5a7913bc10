/* SPDX-License-Identifier: Apache-2.0 */
#include "qmp/long_json.h"

#include <errno.h>
#include <string.h>

#include "base/bytes.h"
#include "base/mem.h"
#include "io/io.h"

struct source {
    struct io_turns turns;
    const char *text;
    size_t len;
};

/* jansson asks for the next piece, from wherever it is: its stack is ours, so we may yield there.
 */
static co_fn size_t next_piece(void *buffer, size_t size, void *arg)
{
    struct source *s = arg;
    size_t n = MIN(size, s->len);
    io_turns_step(&s->turns);
    memcpy(buffer, s->text, n);
    s->text += n;
    s->len -= n;
    return n;
}

json_t *long_json_load(struct io *io, const char *text, size_t len, json_error_t *e)
{
    struct source s = {{io}, text, len};
    return json_load_callback(next_piece, &s,
                              JSON_DECODE_ANY | JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, e);
}

struct sink {
    struct io_turns turns;
    char *text;
    size_t len, cap;
};

static co_fn int take_piece(const char *text, size_t len, void *arg)
{
    struct sink *s = arg;
    if (s->cap - s->len < len) {
        size_t cap = MAX(s->cap * 2, s->len + MAX(len, 256u));
        char *more = mem_realloc(s->text, 1, cap);
        if (!more)
            return -1;
        s->text = more;
        s->cap = cap;
    }
    memcpy(s->text + s->len, text, len);
    s->len += len;
    io_turns_step(&s->turns);
    return 0;
}

int long_json_dump(struct io *io, const json_t *v, size_t flags, char **text, size_t *len)
{
    struct sink s = {{io}};
    if (json_dump_callback(v, take_piece, &s, flags) < 0) {
        mem_free(s.text);
        return -ENOMEM;
    }
    *text = s.text;
    *len = s.len;
    return 0;
}

/* Lists inside objects are emptied one by one; what is inside an element is taken to be small. */
static co_fn void empty_lists(json_t *v, struct io_turns *turns)
{
    const char *key;
    json_t *member;
    if (!v || v->refcount != 1)
        return;
    for (size_t n = json_array_size(v); n-- > 0;) {
        json_array_remove(v, n);
        io_turns_step(turns);
    }
    json_object_foreach (v, key, member)
        empty_lists(member, turns);
}

void long_json_decref(struct io *io, json_t *v)
{
    struct io_turns turns = {io};
    empty_lists(v, &turns);
    json_decref(v);
}
