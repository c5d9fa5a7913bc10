/* SPDX-License-Identifier: Apache-2.0 */
/* Which actions of a list depend on which: for every two of them the names that one writes and the
 * other reads or writes. Names are found by a table of lists, one for each name; those that stand
 * for "any" of a kind are compared with all of that kind. */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <xxhash.h>

#include "base/mem.h"
#include "txn/footprint.h"

static const char *const kind_words[] = {
    [STORE_NODE] = "node",
    [STORE_BITMAP] = "bitmap",
    [STORE_BITMAP_BITS] = "contents of bitmap",
    [STORE_BITMAP_STATE] = "state of bitmap",
    [STORE_JOB] = "job",
    [STORE_EXPORT] = "export",
    [STORE_EXPORT_NAME] = "NBD export name",
    [STORE_FILE] = "file",
};

static bool same_text(const char *a, const char *b)
{
    return !a || !b || !strcmp(a, b);
}

bool store_name_meets(const struct store_name *a, const struct store_name *b)
{
    return a->kind == b->kind && same_text(a->a, b->a) && (!a->a || !b->a || same_text(a->b, b->b));
}

static json_t *describe(const struct store_name *n)
{
    if (!n->a)
        return json_sprintf("any %s (the list does not say which)", kind_words[n->kind]);
    if (n->b)
        return json_sprintf("%s '%s' on node '%s'", kind_words[n->kind], n->b, n->a);
    return json_sprintf("%s '%s'", kind_words[n->kind], n->a);
}

/* ------------------------------------------------------------------ who meets whom */

struct explain {
    const struct footprint *f;
    /* Index + 1 of the newest: of the named uses that write, and that read, by the hash of the
     * name; of those of any name. Looking and looking do not meet, so readers walk the writers
     * alone. */
    size_t *writers, *readers, mask, any;
    size_t *next; /* of a use: the one before it in its list */
    json_t *list;
    size_t n, max;
    json_t **of_action; /* while one action is looked at: the edge to each earlier one, or NULL */
};

static size_t hash_name(const struct store_name *n)
{
    uint64_t h = XXH64(n->a, strlen(n->a), (uint64_t)n->kind);
    return (size_t)(n->b ? XXH64(n->b, strlen(n->b), h) : h);
}

static int edge_to(struct explain *x, unsigned action, unsigned on, json_t **out)
{
    *out = x->of_action[on];
    if (*out)
        return 0;
    if (x->n++ == x->max)
        return -E2BIG;
    json_t *because = json_array();
    json_t *edge =
        json_pack("{s:i,s:i,s:o}", "action", (int)action, "on", (int)on, "because", because);
    if (!edge || json_array_append_new(x->list, edge) < 0)
        return -ENOMEM;
    *out = x->of_action[on] = edge;
    return 0;
}

/* `later` and an earlier use of what may be the same name. */
static int meet(struct explain *x, const struct name_use *later, const struct name_use *earlier)
{
    json_t *edge;
    if (earlier->action == later->action || !(earlier->writes || later->writes) ||
        !store_name_meets(&earlier->name, &later->name))
        return 0;
    int r = edge_to(x, later->action, earlier->action, &edge);
    if (r < 0)
        return r;
    json_t *why = json_pack("{s:o,s:s,s:s}", "name",
                            describe(earlier->name.a ? &earlier->name : &later->name), "before",
                            earlier->writes ? "writes" : "reads", "after",
                            later->writes ? "writes" : "reads");
    json_t *because = json_object_get(edge, "because"), *have;
    size_t i;
    json_array_foreach (because, i, have) {
        if (why && json_equal(have, why)) {
            json_decref(why);
            return 0;
        }
    }
    return json_array_append_new(because, why) < 0 ? -ENOMEM : 0;
}

/* Newest first, of both lists. */
static int meet_lists(struct explain *x, size_t i, size_t w, size_t r)
{
    const struct name_use *u = x->f->use;
    int err = 0;
    while ((w || r) && err == 0) {
        size_t *k = w > r ? &w : &r;
        err = meet(x, &u[i], &u[*k - 1]);
        *k = x->next[*k - 1];
    }
    return err;
}

/* The same use again, by the same action: a merge reads its node once for each source. */
static bool repeats(const struct explain *x, size_t i, size_t head)
{
    const struct name_use *u = &x->f->use[i], *have = head ? &x->f->use[head - 1] : NULL;
    return have && have->action == u->action && have->writes == u->writes && have->name.a &&
           u->name.a && store_name_meets(&have->name, &u->name);
}

static int meet_named(struct explain *x, size_t i)
{
    const struct name_use *u = &x->f->use[i];
    size_t slot = hash_name(&u->name) & x->mask;
    size_t *head = u->writes ? &x->writers[slot] : &x->readers[slot];
    if (repeats(x, i, *head))
        return 0;
    int r = meet_lists(x, i, x->writers[slot], u->writes ? x->readers[slot] : 0);
    x->next[i] = *head;
    *head = i + 1;
    return r;
}

/* "Any" meets all that came before it. */
static int meet_all(struct explain *x, size_t i)
{
    int r = 0;
    for (size_t k = 0; k < i && r == 0; k++)
        r = meet(x, &x->f->use[i], &x->f->use[k]);
    x->next[i] = x->any;
    x->any = i + 1;
    return r;
}

static int find_edges(struct explain *x)
{
    const struct footprint *f = x->f;
    unsigned action = 0;
    int r = 0;
    for (size_t i = 0; i < f->n_uses && r == 0; i++) {
        if (f->use[i].action != action) {
            memset(x->of_action, 0, f->use[i].action * sizeof *x->of_action);
            action = f->use[i].action;
        }
        if (!f->use[i].name.a) {
            r = meet_all(x, i);
            continue;
        }
        r = meet_lists(x, i, x->any, 0);
        if (r == 0)
            r = meet_named(x, i);
    }
    return r;
}

/* ------------------------------------------------------------------ what is held */

static int add_hold(json_t *list, const struct node_hold *h)
{
    const char *key = h->node ? "node" : "export", *name = h->node ? h->node : h->export;
    json_t *row;
    size_t i;
    json_array_foreach (list, i, row) {
        const char *have = json_string_value(json_object_get(row, key));
        if (!have || strcmp(have, name))
            continue;
        if (h->all)
            json_object_set_new(row, "requests", json_string("all"));
        return 0;
    }
    row = json_pack("{s:s,s:s}", key, name, "requests", h->all ? "all" : "writes");
    return json_array_append_new(list, row) < 0 ? -ENOMEM : 0;
}

static int holds(const struct footprint *f, json_t *list)
{
    int r = list ? 0 : -ENOMEM;
    for (size_t i = 0; i < f->n_holds && r == 0; i++)
        r = add_hold(list, &f->hold[i]);
    return r;
}

int footprint_explain(const struct footprint *f, size_t max, json_t **out)
{
    struct explain x = {.f = f, .max = max, .mask = 15};
    while (x.mask < f->n_uses)
        x.mask = x.mask * 2 + 1;
    unsigned n = f->n_uses ? f->use[f->n_uses - 1].action + 1 : 1;
    x.writers = mem_calloc(x.mask + 1, sizeof *x.writers);
    x.readers = mem_calloc(x.mask + 1, sizeof *x.readers);
    x.next = mem_calloc(f->n_uses + 1, sizeof *x.next);
    x.of_action = mem_calloc(n, sizeof *x.of_action);
    x.list = json_array();
    json_t *held = json_array();
    int r =
        x.writers && x.readers && x.next && x.of_action && x.list && !f->no_memory ? 0 : -ENOMEM;
    if (r == 0)
        r = find_edges(&x);
    if (r == 0)
        r = holds(f, held);
    mem_free(x.writers);
    mem_free(x.readers);
    mem_free(x.next);
    mem_free(x.of_action);
    if (r == 0) {
        *out = json_pack("{s:O,s:O}", "dependencies", x.list, "holds", held);
        r = *out ? 0 : -ENOMEM;
    }
    json_decref(x.list);
    json_decref(held);
    return r;
}
