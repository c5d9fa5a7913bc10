/* SPDX-License-Identifier: Apache-2.0 */
/* The model itself, and its text. The kinds are in ref_kinds.c. */
#include "ref.h"

#include <string.h>

static bool has(const uint8_t *set, uint64_t g)
{
    return set[g / 8] >> g % 8 & 1;
}

static void put(uint8_t *set, uint64_t g)
{
    set[g / 8] |= (uint8_t)(1u << g % 8);
}

/* ------------------------------------------------------------------ places */

void ref_init(struct ref *r)
{
    memset(r, 0, sizeof *r);
    for (unsigned i = 0; i < REF_NODES; i++) {
        r->node[i].name = ref_node_name(i);
        r->node[i].size = i % 3 == 2 ? REF_SMALL : REF_BIG;
        r->node[i].guests = i < 3;
        r->node[i].used = i < REF_ADDED;
    }
    r->node[0].n = r->n_objects = r->n_epochs = 1;
    r->node[0].b[0] =
        (struct ref_bitmap){.name = "held", .shift = 16, .job = REF_HELD, .object = 1, .epoch = 1};
    r->export[0] = (struct ref_export){.used = true, .id = "hold", .object = 1};
}

const char *ref_node_name(unsigned i)
{
    static const char *const names[REF_NODES] = {"d",  "e",  "f",  "td", "te", "tf",
                                                 "n0", "n1", "n2", "n3", "n4", "n5"};
    return names[i];
}

struct ref_node *ref_node(struct ref *r, const char *name)
{
    for (unsigned i = 0; name && i < REF_NODES; i++)
        if (r->node[i].used && !strcmp(r->node[i].name, name))
            return &r->node[i];
    return NULL;
}

struct ref_bitmap *ref_bitmap(struct ref_node *n, const char *name)
{
    for (unsigned i = 0; n && name && i < n->n; i++)
        if (!strcmp(n->b[i].name, name))
            return &n->b[i];
    return NULL;
}

/* ------------------------------------------------------------------ guests, ends of jobs */

void ref_write(struct ref *r, const char *node, uint64_t off, uint64_t len)
{
    struct ref_node *n = ref_node(r, node);
    for (unsigned i = 0; i < n->n; i++) {
        struct ref_bitmap *b = &n->b[i];
        for (uint64_t g = off >> b->shift; b->enabled && len && g << b->shift < off + len; g++)
            put(b->job > 0 ? b->late : b->bits, g);
    }
}

void ref_end_job(struct ref *r, struct ref_job *j, bool well)
{
    struct ref_bitmap *b = ref_bitmap(&r->node[j->node], j->bitmap);
    if (b && (j->mode == REF_ALWAYS || (well && j->mode == REF_ON_SUCCESS))) {
        memcpy(b->bits, b->late, sizeof b->bits);
        b->epoch = ++r->n_epochs;
    }
    for (unsigned i = 0; b && i < sizeof b->bits; i++)
        b->bits[i] |= b->late[i];
    if (b) {
        memset(b->late, 0, sizeof b->late);
        b->job = 0;
    }
    if (j->target >= 0)
        r->node[j->target].target_of = 0;
    *j = (struct ref_job){0};
}

/* ------------------------------------------------------------------ lists */

const struct ref_kind *ref_kind(const char *type)
{
    for (unsigned i = 0; i < n_ref_kinds; i++)
        if (!strcmp(ref_kinds[i].type, type))
            return &ref_kinds[i];
    CHECK_SAY(false, "the model does not know '%s'", type);
    return NULL;
}

json_t *ref_make(struct ref_maker *m, const struct ref_kind *k)
{
    json_t *data = k->make(m);
    return data ? json_pack("{s:s,s:o}", "type", k->type, "data", data) : NULL;
}

json_t *ref_make_any(struct ref_maker *m)
{
    unsigned all = 0, i;
    json_t *a = NULL;
    for (i = 0; i < n_ref_kinds; i++)
        all += ref_kinds[i].weight;
    while (!a) {
        uint64_t at = chance_below(m->dice, all);
        for (i = 0; at >= ref_kinds[i].weight; i++)
            at -= ref_kinds[i].weight;
        if (m->careless || strcmp(ref_kinds[i].type, "abort"))
            a = ref_make(m, &ref_kinds[i]);
    }
    return a;
}

bool ref_play(struct ref *r, json_t *action)
{
    return ref_kind(json_string_value(json_object_get(action, "type")))
        ->play(r, json_object_get(action, "data"));
}

int ref_play_list(struct ref *r, json_t *actions, bool grouped)
{
    struct ref *before = malloc(sizeof *before);
    json_t *a;
    size_t i;
    int failed = -1;
    CHECK(before);
    *before = *r;
    r->group = grouped ? ++r->n_groups : 0;
    json_array_foreach (actions, i, a) {
        if (!ref_play(r, a)) {
            failed = (int)i;
            *r = *before;
            break;
        }
    }
    r->group = 0;
    free(before);
    return failed;
}

/* ------------------------------------------------------------------ as text */

static void say_set(FILE *f, const uint8_t *set, uint64_t size, unsigned shift)
{
    uint64_t n = (size + (UINT64_C(1) << shift) - 1) >> shift;
    for (uint64_t g = 0; g < n; g++) {
        uint64_t from = g;
        while (g < n && has(set, g))
            g++;
        if (g > from)
            fprintf(f, " %" PRIu64 "-%" PRIu64, from << shift, MIN(g << shift, size));
    }
}

static int by_name(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

void ref_say_owners(FILE *f, const char **id, unsigned n)
{
    qsort(id, n, sizeof *id, by_name);
    for (unsigned i = 0; i < n; i++)
        fprintf(f, "%s\n", id[i]);
}

char *ref_text(struct ref *r)
{
    char *text = NULL;
    const char *id[REF_JOBS + REF_EXPORTS];
    unsigned n_ids = 0;
    char line[REF_EXPORTS][40];
    size_t len;
    FILE *f = open_memstream(&text, &len);
    CHECK(f);
    for (unsigned i = 0; i < REF_NODES; i++) {
        struct ref_node *n = &r->node[i];
        if (!n->used)
            continue;
        fprintf(f, "node %s%s\n", n->name, n->target_of ? " is a target" : "");
        for (unsigned k = 0; k < n->n; k++) {
            struct ref_bitmap *b = &n->b[k];
            fprintf(f, "  bitmap %s shift %u%s%s:", b->name, b->shift, b->enabled ? " enabled" : "",
                    b->job ? " busy" : "");
            say_set(f, b->bits, n->size, b->shift);
            if (b->job > 0) {
                fprintf(f, " late:");
                say_set(f, b->late, n->size, b->shift);
            }
            fputc('\n', f);
        }
    }
    for (unsigned i = 0; i < REF_JOBS; i++)
        if (r->job[i].used)
            id[n_ids++] = r->job[i].id;
    for (unsigned i = 0; i < REF_EXPORTS; i++) {
        const struct ref_export *e = &r->export[i];
        snprintf(line[i], sizeof line[i], "export %s of %s", e->id, r->node[e->node].name);
        if (e->used)
            id[n_ids++] = line[i];
    }
    ref_say_owners(f, id, n_ids);
    fclose(f);
    return text;
}
