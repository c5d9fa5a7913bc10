/* SPDX-License-Identifier: Apache-2.0 */
/* Which actions of a list depend on which: for every two of them the names that one writes and the
 * other reads or writes; and disks that are used through different nodes (txn/beside.h). Names are
 * found by a table of chains, one for each name, and those that stand for "any" of a kind by one
 * for each kind. What is looked at becomes an edge, or a reason for one, so the work is in
 * proportion to the list and the answer. */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <xxhash.h>

#include "base/mem.h"
#include "txn/beside.h"
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

/* What two uses that meet are of. A file is one whatever each calls it. */
static json_t *describe(const struct name_use *earlier, const struct name_use *later)
{
    const struct store_name *n = earlier->name.a ? &earlier->name : &later->name;
    const char *path = earlier->path ? earlier->path : later->path;
    if (earlier->path && later->path && strcmp(earlier->path, later->path))
        return json_sprintf(earlier->name.a && later->name.a
                                ? "file '%s', which is file '%s'"
                                : "files '%s' and '%s', which may be one: a disk does not answer",
                            earlier->path, later->path);
    if (path)
        return json_sprintf("file '%s'", path);
    if (!n->a)
        return json_sprintf("any %s (the list does not say which)", kind_words[n->kind]);
    if (n->b)
        return json_sprintf("%s '%s' on node '%s'", kind_words[n->kind], n->b, n->a);
    return json_sprintf("%s '%s'", kind_words[n->kind], n->a);
}

/* ------------------------------------------------------------------ who meets whom */

/* Uses that a later one may meet, newest first: indices + 1 into `older`. Who only reads meets
 * writers only, so that a thousand readers of one name are not looked at by each of them. */
struct chain {
    size_t all, writers;
};

struct links {
    size_t all, writer;
};

#define KINDS (STORE_FILE + 1)

/* The edge between the action that is looked at and an earlier one. */
struct edge_slot {
    json_t *edge;
    unsigned action; /* stale, if not that one */
};

struct explain {
    const struct footprint *f;
    struct chain *named; /* by name */
    size_t mask;
    struct links *by_name;     /* of a use: the one before it with its name, or its hash */
    struct links *by_kind;     /* of a use: the one before it of its kind, or "any" of it */
    struct chain any[KINDS];   /* uses that stand for all of a kind */
    struct chain known[KINDS]; /* the others */
    json_t *list;
    size_t n, max, n_why;
    struct edge_slot *of_action;
    struct beside *beside;
};

static size_t hash_name(const struct store_name *n)
{
    uint64_t h = XXH64(n->a, strlen(n->a), (uint64_t)n->kind);
    return (size_t)(n->b ? XXH64(n->b, strlen(n->b), h) : h);
}

static int edge_to(struct explain *x, unsigned action, unsigned on, json_t **out)
{
    struct edge_slot *slot = &x->of_action[on];
    *out = slot->edge;
    if (*out && slot->action == action)
        return 0;
    if (x->n++ == x->max)
        return -E2BIG;
    json_t *because = json_array();
    json_t *edge =
        json_pack("{s:i,s:i,s:o}", "action", (int)action, "on", (int)on, "because", because);
    if (!edge || json_array_append_new(x->list, edge) < 0)
        return -ENOMEM;
    *slot = (struct edge_slot){edge, action};
    *out = edge;
    return 0;
}

#define REASONS_COMPARED 32u /* the first ones; who reads more will not miss a repetition */

/* An action may use a name and "any" of its kind. */
static bool has_reason(const json_t *because, const json_t *why)
{
    for (size_t i = 0; i < json_array_size(because) && i < REASONS_COMPARED; i++) {
        if (json_equal(json_array_get(because, i), why))
            return true;
    }
    return false;
}

static const char *verb(bool writes)
{
    return writes ? "writes" : "reads";
}

/* `name`: taken over; NULL: no memory. */
static int add_reason(struct explain *x, unsigned action, unsigned on, json_t *name, bool before,
                      bool after)
{
    json_t *edge = NULL;
    json_t *why =
        json_pack("{s:o,s:s,s:s}", "name", name, "before", verb(before), "after", verb(after));
    int r = why ? edge_to(x, action, on, &edge) : -ENOMEM;
    json_t *because = json_object_get(edge, "because");
    if (r < 0 || has_reason(because, why)) {
        json_decref(why);
        return r;
    }
    r = json_array_append_new(because, why);
    return r < 0 ? -ENOMEM : x->n_why++ == x->max * EXPLAIN_WHY ? -E2BIG : 0;
}

/* `later` and an earlier use of what may be the same name. */
static int meet(struct explain *x, const struct name_use *later, const struct name_use *earlier)
{
    if (earlier->action == later->action || !store_name_meets(&earlier->name, &later->name))
        return 0;
    return add_reason(x, later->action, earlier->action, describe(earlier, later), earlier->writes,
                      later->writes);
}

static bool disk_writes(const struct disk_use *u)
{
    return u->how & 1u << DISK_WRITE;
}

/* The two name other nodes and meet all the same. */
static int meet_beside(void *arg, const struct disk_use *earlier, const struct disk_use *later,
                       enum beside_why why)
{
    const char *what = why == BESIDE_FILE ? "file" : "disk";
    const char *one = earlier->place->link.name, *two = later->place->link.name;
    json_t *name = one && two ? json_sprintf("the %s under nodes '%s' and '%s'", what, one, two)
                              : json_sprintf("the %s under %s%s%s and a job's target", what,
                                             one || two ? "node '" : "another",
                                             one   ? one
                                             : two ? two
                                                   : "",
                                             one || two ? "'" : "");
    return add_reason(arg, later->action, earlier->action, name, disk_writes(earlier),
                      disk_writes(later));
}

static int meet_chain(struct explain *x, const struct name_use *u, const struct chain *c,
                      const struct links *older)
{
    int r = 0;
    for (size_t k = u->writes ? c->all : c->writers; k && r == 0;
         k = u->writes ? older[k - 1].all : older[k - 1].writer)
        r = meet(x, u, &x->f->use[k - 1]);
    return r;
}

static void join_chain(struct explain *x, size_t i, struct chain *c, struct links *older)
{
    older[i] = (struct links){c->all, c->writers};
    c->all = i + 1;
    if (x->f->use[i].writes)
        c->writers = i + 1;
}

static bool same_name(const struct store_name *a, const struct store_name *b)
{
    return a->kind == b->kind && !a->a == !b->a && !a->b == !b->b && same_text(a->a, b->a) &&
           same_text(a->b, b->b);
}

/* Has its action used that name in that way before? Those of one action stand together. */
static bool is_repeated(const struct explain *x, size_t i, const struct chain *c,
                        const struct links *older)
{
    const struct name_use *u = &x->f->use[i];
    for (size_t k = c->all; k && x->f->use[k - 1].action == u->action; k = older[k - 1].all) {
        if (x->f->use[k - 1].writes == u->writes && same_name(&x->f->use[k - 1].name, &u->name))
            return true;
    }
    return false;
}

static int meet_named(struct explain *x, size_t i)
{
    const struct name_use *u = &x->f->use[i];
    struct chain *c = &x->named[hash_name(&u->name) & x->mask];
    if (is_repeated(x, i, c, x->by_name))
        return 0;
    int r = meet_chain(x, u, &x->any[u->name.kind], x->by_kind);
    if (r == 0)
        r = meet_chain(x, u, c, x->by_name);
    join_chain(x, i, c, x->by_name);
    join_chain(x, i, &x->known[u->name.kind], x->by_kind);
    return r;
}

/* "Any" meets all that came before it; all that come after meet it. */
static int meet_any(struct explain *x, size_t i)
{
    const struct name_use *u = &x->f->use[i];
    struct chain *c = &x->any[u->name.kind];
    if (is_repeated(x, i, c, x->by_kind))
        return 0;
    int r = meet_chain(x, u, c, x->by_kind);
    if (r == 0)
        r = meet_chain(x, u, &x->known[u->name.kind], x->by_kind);
    join_chain(x, i, c, x->by_kind);
    return r;
}

/* Those of one action after those of the one before it. */
static int find_edges(struct explain *x)
{
    const struct footprint *f = x->f;
    size_t i = 0, k = 0;
    int r = 0;
    while ((i < f->n_uses || k < f->n_disks) && r == 0) {
        if (f->step)
            f->step(f->step_arg);
        if (k == f->n_disks || (i < f->n_uses && f->use[i].action <= f->disk[k].action)) {
            r = f->use[i].name.a ? meet_named(x, i) : meet_any(x, i);
            i++;
        } else {
            r = beside_next(x->beside, meet_beside, x);
            k++;
        }
    }
    return r;
}

/* ------------------------------------------------------------------ what is held */

struct held {
    size_t *bucket, mask; /* index of the newest + 1 */
    size_t *older;
    bool all;
};

static const char *held_name(const struct node_hold *h)
{
    return h->node ? h->node : h->export;
}

/* One that needs the reads of its node held has those of all nodes held, since there is one pause
 * for the list (txn/txn.c, hold). */
static bool holds_all(const struct footprint *f)
{
    bool all = false;
    for (size_t i = 0; i < f->n_holds && !all; i++)
        all = f->hold[i].all;
    return all;
}

static int add_hold(struct held *x, json_t *list, const struct node_hold *hold, size_t i)
{
    const struct node_hold *h = &hold[i];
    const char *name = held_name(h);
    size_t *head = &x->bucket[XXH64(name, strlen(name), !h->node) & x->mask];
    for (size_t k = *head; k; k = x->older[k - 1]) {
        if (!hold[k - 1].node == !h->node && !strcmp(held_name(&hold[k - 1]), name))
            return 0;
    }
    x->older[i] = *head;
    *head = i + 1;
    json_t *row = json_pack("{s:s,s:s}", h->node ? "node" : "export", name, "requests",
                            x->all ? "all" : "writes");
    return json_array_append_new(list, row) < 0 ? -ENOMEM : 0;
}

static size_t mask_for(size_t n)
{
    size_t mask = 15;
    while (mask < n)
        mask = mask * 2 + 1;
    return mask;
}

static int holds(const struct footprint *f, json_t *list)
{
    struct held x = {.mask = mask_for(f->n_holds), .all = holds_all(f)};
    x.bucket = mem_calloc(x.mask + 1, sizeof *x.bucket);
    x.older = mem_calloc(f->n_holds + 1, sizeof *x.older);
    int r = list && x.bucket && x.older ? 0 : -ENOMEM;
    for (size_t i = 0; i < f->n_holds && r == 0; i++)
        r = add_hold(&x, list, f->hold, i);
    mem_free(x.bucket);
    mem_free(x.older);
    return r;
}

static int explain_alloc(struct explain *x)
{
    const struct footprint *f = x->f;
    unsigned n = f->n_uses ? f->use[f->n_uses - 1].action + 1 : 1;
    x->mask = mask_for(f->n_uses);
    x->named = mem_calloc(x->mask + 1, sizeof *x->named);
    x->by_name = mem_calloc(f->n_uses + 1, sizeof *x->by_name);
    x->by_kind = mem_calloc(f->n_uses + 1, sizeof *x->by_kind);
    x->of_action = mem_calloc(n, sizeof *x->of_action);
    x->list = json_array();
    if (!x->named || !x->by_name || !x->by_kind || !x->of_action || !x->list)
        return -ENOMEM;
    return beside_new(f, &x->beside);
}

int footprint_explain(const struct footprint *f, size_t max, json_t **out)
{
    struct explain x = {.f = f, .max = max};
    json_t *held = json_array();
    int r = f->no_memory ? -ENOMEM : explain_alloc(&x);
    if (r == 0)
        r = find_edges(&x);
    if (r == 0)
        r = holds(f, held);
    mem_free(x.named);
    mem_free(x.by_name);
    mem_free(x.by_kind);
    mem_free(x.of_action);
    beside_free(x.beside);
    if (r == 0) {
        *out = json_pack("{s:O,s:O}", "dependencies", x.list, "holds", held);
        r = *out ? 0 : -ENOMEM;
    }
    json_decref(x.list);
    json_decref(held);
    return r;
}
