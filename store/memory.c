/* SPDX-License-Identifier: Apache-2.0 */
/* The store that forgets everything when the daemon ends: a ring of outcomes by id.
 *
 * All memory that a record needs is taken before anything is changed, so a record either fails
 * without a trace or is there. */
#include <errno.h>
#include <string.h>

#include "base/mem.h"
#include "store/store.h"

struct kept {
    char *id;
    struct store_outcome outcome;
};

struct memory_store {
    struct store store; /* first */
    struct kept *kept[STORE_OUTCOMES];
    unsigned next;
};

static struct kept *find_kept(struct memory_store *m, const char *id)
{
    for (unsigned i = 0; i < STORE_OUTCOMES; i++) {
        if (m->kept[i] && !strcmp(m->kept[i]->id, id))
            return m->kept[i];
    }
    return NULL;
}

static void kept_free(struct kept *k)
{
    if (k)
        mem_free(k->id);
    mem_free(k);
}

static int memory_write_record(struct store *s, const struct store_record *r,
                               struct tide_error *err)
{
    struct memory_store *m = (struct memory_store *)s;
    if (!r->id)
        return 0;
    struct kept *k = mem_zalloc(sizeof *k);
    if (!k || !(k->id = mem_strdup(r->id))) {
        kept_free(k);
        return tide_fail(err, -ENOMEM, "no memory for the record of transaction '%s'", r->id);
    }
    k->outcome = r->outcome;
    kept_free(m->kept[m->next]);
    m->kept[m->next] = k;
    m->next = (m->next + 1) % STORE_OUTCOMES;
    return 0;
}

static const struct store_outcome *memory_find(struct store *s, const char *id)
{
    struct kept *k = find_kept((struct memory_store *)s, id);
    return k ? &k->outcome : NULL;
}

static void memory_free(struct store *s)
{
    struct memory_store *m = (struct memory_store *)s;
    for (unsigned i = 0; i < STORE_OUTCOMES; i++)
        kept_free(m->kept[i]);
    mem_free(m);
}

static const struct store_ops memory_ops = {memory_write_record, memory_find, memory_free};

int store_new(struct store **out)
{
    struct memory_store *m = mem_zalloc(sizeof *m);
    if (!m)
        return -ENOMEM;
    m->store.ops = &memory_ops;
    *out = &m->store;
    return 0;
}

void store_free(struct store *s)
{
    if (s)
        s->ops->free(s);
}

int store_write_record(struct store *s, const struct store_record *r, struct tide_error *err)
{
    return s->ops->write_record(s, r, err);
}

const struct store_outcome *store_find_outcome(struct store *s, const char *id)
{
    return s->ops->find(s, id);
}
