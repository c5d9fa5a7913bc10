/* SPDX-License-Identifier: Apache-2.0 */
#include "txn/known.h"

#include <string.h>
#include <xxhash.h>

static struct known_name **bucket_of(const struct known_table *t, const char *name)
{
    return &t->bucket[XXH64(name, strlen(name), 0) & t->mask];
}

/* Where the pointer to the one of that name is, or would be. */
static struct known_name **find(const struct known_table *t, const char *name)
{
    struct known_name **at = bucket_of(t, name);
    while (*at && strcmp((*at)->name, name))
        at = &(*at)->next;
    return at;
}

static void *get(const struct known_table *t, const char *name)
{
    return t->bucket ? *find(t, name) : NULL;
}

static bool grow(struct known_table *t)
{
    size_t mask = t->bucket ? t->mask * 2 + 1 : 63;
    struct known_table wide = {mem_calloc(mask + 1, sizeof(struct known_name *)), t->n, mask};
    if (!wide.bucket)
        return false;
    for (size_t i = 0; t->bucket && i <= t->mask; i++) {
        for (struct known_name *n = t->bucket[i], *next; n; n = next) {
            struct known_name **head = bucket_of(&wide, n->name);
            next = n->next;
            n->next = *head;
            *head = n;
        }
    }
    mem_free(t->bucket);
    *t = wide;
    return true;
}

/* In the place of one that had the name before, which nobody finds any more. */
static bool insert(struct known_table *t, struct known_name *n, const char *name)
{
    n->name = name;
    if (t->n >= t->mask && !grow(t))
        return false;
    struct known_name **at = find(t, name);
    n->next = *at ? (*at)->next : NULL;
    t->n += !*at;
    *at = n;
    return true;
}

struct place *known_node(const struct known *k, const char *name)
{
    return get(&k->nodes, name);
}

struct known_export *known_export(const struct known *k, const char *id)
{
    return get(&k->exports, id);
}

struct place *known_node_new(struct known *k, const char *name)
{
    struct place *p = arena_alloc(&k->arena, sizeof *p);
    if (!p || (name && !insert(&k->nodes, &p->link, name)))
        return NULL;
    p->number = k->n_places++;
    return p;
}

struct known_export *known_export_new(struct known *k, const char *id)
{
    struct known_export *e = arena_alloc(&k->arena, sizeof *e);
    return e && insert(&k->exports, &e->link, id) ? e : NULL;
}

void place_on(struct place *p, struct place *below)
{
    if (!below || below->depth >= PLACE_MAX_DEPTH)
        return;
    p->below = below;
    p->depth = below->depth + 1;
}

bool place_reaches(const struct place *from, const struct place *to)
{
    while (from && from != to)
        from = from->below;
    return from != NULL;
}

struct place *place_bottom(struct place *p)
{
    while (p->below)
        p = p->below;
    return p;
}

void known_free(struct known *k)
{
    mem_free(k->nodes.bucket);
    mem_free(k->exports.bucket);
    arena_free(&k->arena);
    *k = (struct known){0};
}
