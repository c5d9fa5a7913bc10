/* SPDX-License-Identifier: Apache-2.0 */
/* Every kind of action: how to invent one, and what it does. */
#include <string.h>

#include "ref.h"

#define BITMAP_KIND "block-dirty-bitmap-"

/* ------------------------------------------------------------------ reading arguments */

static const char *text(json_t *data, const char *key)
{
    return json_string_value(json_object_get(data, key));
}

static bool flag(json_t *data, const char *key)
{
    return json_is_true(json_object_get(data, key));
}

static uint64_t granules(uint64_t size, unsigned shift)
{
    return (size + (UINT64_C(1) << shift) - 1) >> shift;
}

/* The bitmap that an operation may change or read: it is there, and nobody's. */
static struct ref_bitmap *usable(struct ref *r, const char *node, const char *name)
{
    struct ref_bitmap *b = ref_bitmap(ref_node(r, node), name);
    return b && !b->job ? b : NULL;
}

/* The i-th of `bitmaps`: its node and name. */
static void source_at(json_t *data, size_t i, const char **node, const char **name)
{
    json_t *s = json_array_get(json_object_get(data, "bitmaps"), i);
    *node = json_is_string(s) ? text(data, "node") : text(s, "node");
    *name = json_is_string(s) ? json_string_value(s) : text(s, "name");
}

/* ------------------------------------------------------------------ inventing */

static const char *const node_names[] = {"d", "e", "f"};
static const char *const names[] = {"p", "q", "r", "s", "t", "u"};

static const char *any_node(struct ref_maker *m)
{
    if (m->careless && chance_one_in(m->dice, 40))
        return "zz";
    unsigned added = REF_ADDED + (unsigned)chance_below(m->dice, REF_NODES - REF_ADDED);
    if (!m->no_added && m->r->node[added].used && chance_one_in(m->dice, 5))
        return ref_node_name(added);
    return node_names[chance_below(m->dice, 9) / 4 % 3];
}

static const char *any_name(struct ref_maker *m)
{
    static const char *const odd[] = {"held", "none", ""};
    if (m->careless && chance_one_in(m->dice, 20))
        return odd[chance_below(m->dice, 3)];
    return names[chance_below(m->dice, 6)];
}

/* A bitmap that may be used; `size`: on a disk of that size, 0: of any. NULL: none. */
static struct ref_bitmap *any_usable(struct ref_maker *m, uint64_t size, const char **node)
{
    struct ref_bitmap *found = NULL;
    unsigned seen = 0;
    for (unsigned i = 0; i < REF_NODES; i++) {
        struct ref_node *n = &m->r->node[i];
        for (unsigned k = 0; k < n->n; k++) {
            if (n->b[k].job || (size && n->size != size))
                continue;
            if (chance_below(m->dice, ++seen) == 0) {
                found = &n->b[k];
                *node = n->name;
            }
        }
    }
    return found;
}

/* {node, name} of a bitmap. */
static json_t *make_one(struct ref_maker *m)
{
    const char *node;
    struct ref_bitmap *b = NULL;
    if (m->careless && chance_one_in(m->dice, 3))
        return json_pack("{s:s,s:s}", "node", any_node(m), "name", any_name(m));
    b = any_usable(m, 0, &node);
    return b ? json_pack("{s:s,s:s}", "node", node, "name", b->name) : NULL;
}

/* A place for a new bitmap. */
static json_t *make_place(struct ref_maker *m)
{
    for (unsigned tries = 0; tries < 60; tries++) {
        const char *node = any_node(m), *name = any_name(m);
        struct ref_node *n = ref_node(m->r, node);
        if (m->careless || (n && n->n < REF_BITMAPS && !ref_bitmap(n, name)))
            return json_pack("{s:s,s:s}", "node", node, "name", name);
    }
    return NULL;
}

static void add_granularity(struct ref_maker *m, json_t *data)
{
    static const unsigned shifts[] = {9, 10, 12, 14, 16, 16, 18, 20, 31};
    static const uint64_t bad[] = {0, 1, 511, 513, 3 << 20, UINT64_C(4294967295)};
    uint64_t g = UINT64_C(1) << shifts[chance_below(m->dice, 9)];
    if (m->careless && chance_one_in(m->dice, 25))
        g = bad[chance_below(m->dice, 6)];
    json_object_set_new(data, "granularity", json_integer((json_int_t)g));
}

static void add_flags(struct ref_maker *m, json_t *data)
{
    if (chance_one_in(m->dice, 2))
        add_granularity(m, data);
    if (chance_one_in(m->dice, 3))
        json_object_set_new(data, "disabled", json_boolean(chance_one_in(m->dice, 2)));
    if (m->careless && chance_one_in(m->dice, 40))
        json_object_set_new(data, "persistent", json_true());
}

/* ------------------------------------------------------------------ add, remove */

static json_t *make_add(struct ref_maker *m)
{
    json_t *data = make_place(m);
    if (data)
        add_flags(m, data);
    return data;
}

static struct ref_bitmap *new_bitmap(struct ref *r, struct ref_node *n, json_t *data,
                                     unsigned shift)
{
    const char *name = text(data, "name");
    json_t *given = json_object_get(data, "granularity");
    uint64_t g = given ? (uint64_t)json_integer_value(given) : UINT64_C(1) << shift;
    if (!n || !*name || ref_bitmap(n, name) || flag(data, "persistent"))
        return NULL;
    if (g < 512 || g > UINT64_C(1) << 31 || (g & (g - 1)))
        return NULL;
    CHECK(n->n < REF_BITMAPS);
    memmove(&n->b[1], &n->b[0], n->n++ * sizeof n->b[0]);
    n->b[0] = (struct ref_bitmap){.shift = (unsigned)__builtin_ctzll(g),
                                  .enabled = !flag(data, "disabled"),
                                  .object = ++r->n_objects,
                                  .epoch = ++r->n_epochs};
    snprintf(n->b[0].name, sizeof n->b[0].name, "%s", name);
    return &n->b[0];
}

static bool play_add(struct ref *r, json_t *data)
{
    return new_bitmap(r, ref_node(r, text(data, "node")), data, 16) != NULL;
}

static bool play_remove(struct ref *r, json_t *data)
{
    struct ref_node *n = ref_node(r, text(data, "node"));
    struct ref_bitmap *b = usable(r, text(data, "node"), text(data, "name"));
    if (!b)
        return false;
    memmove(b, b + 1, (size_t)(&n->b[--n->n] - b) * sizeof *b);
    return true;
}

/* ------------------------------------------------------------------ contents, flags, names */

static bool play_clear(struct ref *r, json_t *data)
{
    struct ref_bitmap *b = usable(r, text(data, "node"), text(data, "name"));
    if (!b)
        return false;
    memset(b->bits, 0, sizeof b->bits);
    b->epoch = ++r->n_epochs;
    return true;
}

static bool play_switch(struct ref *r, json_t *data, bool on)
{
    struct ref_bitmap *b = usable(r, text(data, "node"), text(data, "name"));
    if (!b)
        return false;
    if (b->enabled != on)
        b->epoch = ++r->n_epochs;
    b->enabled = on;
    return true;
}

static bool play_enable(struct ref *r, json_t *data)
{
    return play_switch(r, data, true);
}

static bool play_disable(struct ref *r, json_t *data)
{
    return play_switch(r, data, false);
}

static json_t *make_rename(struct ref_maker *m)
{
    json_t *data = make_one(m);
    for (unsigned tries = 0; data && tries < 60; tries++) {
        const char *to = any_name(m);
        if (m->careless || !ref_bitmap(ref_node(m->r, text(data, "node")), to)) {
            json_object_set_new(data, "new-name", json_string(to));
            return data;
        }
    }
    json_decref(data);
    return NULL;
}

static bool play_rename(struct ref *r, json_t *data)
{
    struct ref_node *n = ref_node(r, text(data, "node"));
    struct ref_bitmap *b = usable(r, text(data, "node"), text(data, "name"));
    const char *to = text(data, "new-name");
    if (!b || !*to || ref_bitmap(n, to))
        return false;
    snprintf(b->name, sizeof b->name, "%s", to);
    return true;
}

/* ------------------------------------------------------------------ merge, copy */

static void merge_bits(const struct ref_node *n, struct ref_bitmap *to,
                       const struct ref_bitmap *from)
{
    for (uint64_t g = 0; g < granules(n->size, from->shift); g++) {
        if (!(from->bits[g / 8] >> g % 8 & 1))
            continue;
        uint64_t off = g << from->shift, end = MIN((g + 1) << from->shift, n->size);
        for (uint64_t t = off >> to->shift; t << to->shift < end; t++)
            to->bits[t / 8] |= (uint8_t)(1u << t % 8);
    }
}

/* Are all sources usable and of disks of this size? */
static bool sources_fit(struct ref *r, json_t *data, uint64_t size)
{
    for (size_t i = 0; i < json_array_size(json_object_get(data, "bitmaps")); i++) {
        const char *node, *name;
        source_at(data, i, &node, &name);
        if (!usable(r, node, name) || ref_node(r, node)->size != size)
            return false;
    }
    return true;
}

static void merge_sources(struct ref *r, json_t *data, struct ref_bitmap *to)
{
    for (size_t i = 0; i < json_array_size(json_object_get(data, "bitmaps")); i++) {
        const char *node, *name;
        source_at(data, i, &node, &name);
        merge_bits(ref_node(r, node), to, usable(r, node, name));
    }
}

static json_t *make_sources(struct ref_maker *m, const char *node, unsigned least)
{
    struct ref_node *n = ref_node(m->r, node);
    unsigned count = least + (unsigned)chance_below(m->dice, 4 - least);
    json_t *list = json_array();
    for (unsigned i = 0; i < count; i++) {
        const char *on = node, *name = NULL;
        struct ref_bitmap *b = n ? any_usable(m, n->size, &on) : NULL;
        if (b)
            name = b->name;
        if (!b || (m->careless && chance_one_in(m->dice, 15))) {
            on = any_node(m);
            name = any_name(m);
            if (!m->careless) {
                json_decref(list);
                return NULL;
            }
        }
        bool plain = !strcmp(on, node) && chance_one_in(m->dice, 2);
        json_array_append_new(list, plain ? json_string(name)
                                          : json_pack("{s:s,s:s}", "node", on, "name", name));
    }
    return list;
}

static json_t *make_merge(struct ref_maker *m)
{
    json_t *one = make_one(m), *sources = NULL, *data = NULL;
    if (one)
        sources = make_sources(m, text(one, "node"), chance_one_in(m->dice, 12) ? 0 : 1);
    if (sources)
        data = json_pack("{s:s,s:s,s:O}", "node", text(one, "node"), "target", text(one, "name"),
                         "bitmaps", sources);
    json_decref(one);
    json_decref(sources);
    return data;
}

static bool play_merge(struct ref *r, json_t *data)
{
    const char *node = text(data, "node");
    struct ref_bitmap *to = usable(r, node, text(data, "target"));
    if (!to || !sources_fit(r, data, ref_node(r, node)->size))
        return false;
    merge_sources(r, data, to);
    return true;
}

static json_t *make_x_merge(struct ref_maker *m)
{
    json_t *one = make_one(m), *data = NULL;
    struct ref_node *n = one ? ref_node(m->r, text(one, "node")) : NULL;
    const char *name = NULL;
    for (unsigned i = 0, seen = 0; n && i < n->n; i++)
        if (!n->b[i].job && chance_below(m->dice, ++seen) == 0)
            name = n->b[i].name;
    if (m->careless && chance_one_in(m->dice, 5))
        name = any_name(m);
    if (one && name)
        data = json_pack("{s:s,s:s,s:s}", "node", text(one, "node"), "dst_name", text(one, "name"),
                         "src_name", name);
    json_decref(one);
    return data;
}

static bool play_x_merge(struct ref *r, json_t *data)
{
    const char *node = text(data, "node");
    struct ref_bitmap *to = usable(r, node, text(data, "dst_name"));
    struct ref_bitmap *from = usable(r, node, text(data, "src_name"));
    if (!to || !from)
        return false;
    merge_bits(ref_node(r, node), to, from);
    return true;
}

static json_t *make_copy(struct ref_maker *m)
{
    json_t *data = make_place(m), *sources = NULL;
    if (data)
        sources =
            make_sources(m, text(data, "node"), m->careless && chance_one_in(m->dice, 20) ? 0 : 1);
    if (!sources) {
        json_decref(data);
        return NULL;
    }
    json_object_set_new(data, "bitmaps", sources);
    add_flags(m, data);
    return data;
}

static bool play_copy(struct ref *r, json_t *data)
{
    struct ref_node *n = ref_node(r, text(data, "node"));
    const char *node, *name;
    if (!n || !json_array_size(json_object_get(data, "bitmaps")))
        return false;
    source_at(data, 0, &node, &name);
    if (!sources_fit(r, data, n->size))
        return false;
    unsigned shift = usable(r, node, name)->shift;
    struct ref_bitmap *b = new_bitmap(r, n, data, shift);
    if (b) /* only now: a new one at the front moved all others */
        merge_sources(r, data, b);
    return b != NULL;
}

/* ------------------------------------------------------------------ jobs */

static bool written_by_export(const struct ref *r, int node)
{
    for (unsigned i = 0; i < REF_EXPORTS; i++)
        if (r->export[i].used && r->export[i].writable && r->export[i].node == node)
            return true;
    return false;
}

static int free_target(struct ref_maker *m, int node)
{
    for (int t = 3; t < (int)REF_NODES; t++)
        if (t < (int)REF_ADDED && m->r->node[t].size == m->r->node[node].size &&
            !m->r->node[t].target_of && !written_by_export(m->r, t))
            return t;
    return -1;
}

static bool has_free_job(const struct ref *r)
{
    for (unsigned i = 0; i < REF_JOBS; i++)
        if (!r->job[i].used)
            return true;
    return false;
}

static void add_bitmap_mode(struct ref_maker *m, int node, json_t *data)
{
    static const struct {
        const char *sync, *mode;
    } ways[] = {{"incremental", NULL}, {"incremental", "on-success"},
                {"bitmap", "never"},   {"bitmap", "on-success"},
                {"bitmap", "always"},  {"full", "on-success"},
                {"full", "always"},    {"incremental", "always"},
                {"bitmap", NULL},      {"none", "always"},
                {"full", "never"}};
    struct ref_node *n = &m->r->node[node];
    const char *name = NULL;
    for (unsigned i = 0, seen = 0; i < n->n; i++)
        if (!n->b[i].job && chance_below(m->dice, ++seen) == 0)
            name = n->b[i].name;
    if (m->careless && chance_one_in(m->dice, 8))
        name = any_name(m);
    if (!name || chance_one_in(m->dice, 6))
        return;
    unsigned way = (unsigned)chance_below(m->dice, m->careless ? 11 : 7);
    json_object_set_new(data, "bitmap", json_string(name));
    json_object_set_new(data, "sync", json_string(ways[way].sync));
    if (ways[way].mode)
        json_object_set_new(data, "bitmap-mode", json_string(ways[way].mode));
}

/* Never finished by itself: what it owns stays its own until somebody says so. */
static json_t *make_backup(struct ref_maker *m)
{
    int node = (int)chance_below(m->dice, 3), target = free_target(m, node);
    bool odd = m->careless && chance_one_in(m->dice, 6);
    char id[16];
    if (!has_free_job(m->r) || (target < 0 && !m->careless))
        return NULL;
    if (target < 0 || odd)
        target = (int)chance_below(m->dice, REF_ADDED);
    snprintf(id, sizeof id, "j%u", m->r->n_job_ids++);
    if (m->careless && chance_one_in(m->dice, 15))
        snprintf(id, sizeof id, "%s", chance_one_in(m->dice, 2) ? "0bad" : "j0");
    json_t *data = json_pack("{s:s,s:s,s:s,s:s,s:b,s:b}", "job-id", id, "device",
                             m->r->node[node].name, "target", m->r->node[target].name, "sync",
                             "full", "auto-finalize", 0, "auto-dismiss", 1);
    add_bitmap_mode(m, node, data);
    return data;
}

/* Does the mode go with the bitmap? */
static bool mode_fits(json_t *data)
{
    const char *sync = text(data, "sync"), *mode = text(data, "bitmap-mode");
    if (!text(data, "bitmap"))
        return !strcmp(sync, "full") && !mode;
    if (!strcmp(sync, "incremental"))
        return !mode || !strcmp(mode, "on-success");
    if (!mode || !strcmp(sync, "none"))
        return false;
    return !strcmp(sync, "bitmap") || strcmp(mode, "never") != 0;
}

static bool job_id_is_free(struct ref *r, const char *id)
{
    if (id[0] == '0')
        return false;
    for (unsigned i = 0; i < REF_JOBS; i++)
        if (r->job[i].used && !strcmp(r->job[i].id, id))
            return false;
    return true;
}

/* Its place in r->job. */
static unsigned new_job(struct ref *r, struct ref_node *n, struct ref_bitmap *b, json_t *data)
{
    const char *mode = text(data, "bitmap-mode");
    unsigned i = 0;
    while (r->job[i].used)
        CHECK(++i < REF_JOBS);
    struct ref_job *j = &r->job[i];
    *j = (struct ref_job){.used = true,
                          .node = (int)(n - r->node),
                          .target = -1,
                          .file = -1,
                          .mode = !mode || mode[0] == 'o' ? REF_ON_SUCCESS
                                  : mode[0] == 'n'        ? REF_NEVER
                                                          : REF_ALWAYS,
                          .group = r->group};
    snprintf(j->id, sizeof j->id, "%s", text(data, "job-id"));
    snprintf(j->bitmap, sizeof j->bitmap, "%s", b ? b->name : "");
    if (b) {
        b->job = (int)i + 1;
        memset(b->late, 0, sizeof b->late);
    }
    return i;
}

static bool play_backup(struct ref *r, json_t *data)
{
    struct ref_node *n = ref_node(r, text(data, "device")), *t = ref_node(r, text(data, "target"));
    const char *name = text(data, "bitmap");
    struct ref_bitmap *b = name && n ? usable(r, n->name, name) : NULL;
    unsigned i;
    if (!n || !t || n == t || n->size != t->size || t->guests || t->target_of || n->target_of ||
        written_by_export(r, (int)(t - r->node)))
        return false;
    if (!mode_fits(data) || (name && !b) || !job_id_is_free(r, text(data, "job-id")))
        return false;
    i = new_job(r, n, b, data);
    r->job[i].target = (int)(t - r->node);
    t->target_of = (int)i + 1;
    return true;
}

/* ------------------------------------------------------------------ jobs to files */

static bool file_is_busy(const struct ref *r, int file)
{
    for (unsigned i = 0; i < REF_JOBS; i++)
        if (r->job[i].used && r->job[i].file == file)
            return true;
    return false;
}

static json_t *make_drive_backup(struct ref_maker *m)
{
    int node = (int)chance_below(m->dice, 3), file = -1;
    uint64_t size = m->r->node[node].size;
    bool existing = chance_one_in(m->dice, 2);
    char id[16], path[16];
    unsigned seen = 0;
    for (int i = 0; i < (int)REF_FILES; i++)
        if (!file_is_busy(m->r, i) && chance_below(m->dice, ++seen) == 0)
            file = i;
    if (m->careless && chance_one_in(m->dice, 5))
        file = (int)chance_below(m->dice, REF_FILES);
    if (file < 0 || !has_free_job(m->r))
        return NULL;
    if (m->r->file[file] != size && !(m->careless && chance_one_in(m->dice, 5)))
        existing = false;
    snprintf(id, sizeof id, "j%u", m->r->n_job_ids++);
    snprintf(path, sizeof path, "@x%d", file);
    json_t *data =
        json_pack("{s:s,s:s,s:s,s:s,s:s,s:s,s:b,s:b}", "job-id", id, "device",
                  m->r->node[node].name, "target", path, "sync", "full", "format", "raw", "mode",
                  existing ? "existing" : "absolute-paths", "auto-finalize", 0, "auto-dismiss", 1);
    add_bitmap_mode(m, node, data);
    return data;
}

static bool play_drive_backup(struct ref *r, json_t *data)
{
    struct ref_node *n = ref_node(r, text(data, "device"));
    const char *name = text(data, "bitmap");
    struct ref_bitmap *b = name && n ? usable(r, n->name, name) : NULL;
    int file = text(data, "target")[2] - '0';
    bool existing = text(data, "mode")[0] == 'e';
    if (!n || n->target_of || file_is_busy(r, file) || (existing && r->file[file] != n->size))
        return false;
    if (!mode_fits(data) || (name && !b) || !job_id_is_free(r, text(data, "job-id")))
        return false;
    r->job[new_job(r, n, b, data)].file = file;
    r->file[file] = n->size;
    return true;
}

/* ------------------------------------------------------------------ exports */

static struct ref_export *find_export(struct ref *r, const char *id)
{
    for (unsigned i = 0; i < REF_EXPORTS; i++)
        if (r->export[i].used && !strcmp(r->export[i].id, id))
            return &r->export[i];
    return NULL;
}

static struct ref_export *any_export(struct ref_maker *m)
{
    struct ref_export *e = NULL;
    for (unsigned i = 0, seen = 0; i < REF_EXPORTS; i++)
        if (m->r->export[i].used && chance_below(m->dice, ++seen) == 0)
            e = &m->r->export[i];
    return e;
}

static bool can_show(const struct ref_node *n, bool writable)
{
    return n && !(writable && (n->read_only || n->target_of));
}

static json_t *make_export_add(struct ref_maker *m)
{
    const char *node = any_node(m);
    struct ref_node *n = ref_node(m->r, node);
    bool writable = chance_one_in(m->dice, 2);
    const char *bitmap = NULL;
    unsigned free_places = 0;
    char id[12];
    for (unsigned i = 0; i < REF_EXPORTS; i++)
        free_places += !m->r->export[i].used;
    if (!free_places || (!m->careless && !can_show(n, writable)))
        return NULL;
    do
        snprintf(id, sizeof id, "e%u", (unsigned)chance_below(m->dice, 20));
    while (find_export(m->r, id));
    if (m->careless && chance_one_in(m->dice, 10))
        snprintf(id, sizeof id, "hold");
    for (unsigned i = 0, seen = 0; n && i < n->n; i++)
        if (!n->b[i].job && (writable || !n->b[i].enabled) && chance_below(m->dice, ++seen) == 0)
            bitmap = n->b[i].name;
    if (m->careless && chance_one_in(m->dice, 8))
        bitmap = any_name(m);
    json_t *data = json_pack("{s:s,s:s,s:s,s:s,s:b}", "type", "nbd", "id", id, "name", id,
                             "node-name", node, "writable", writable);
    if (bitmap && chance_one_in(m->dice, 2))
        json_object_set_new(data, "bitmaps", json_pack("[s]", bitmap));
    return data;
}

static bool play_export_add(struct ref *r, json_t *data)
{
    struct ref_node *n = ref_node(r, text(data, "node-name"));
    const char *bitmap = json_string_value(json_array_get(json_object_get(data, "bitmaps"), 0));
    bool writable = flag(data, "writable");
    struct ref_bitmap *b = n && bitmap ? usable(r, n->name, bitmap) : NULL;
    unsigned i = 0;
    if (find_export(r, text(data, "id")) || !can_show(n, writable))
        return false;
    if (bitmap && (!b || (b->enabled && !writable && !n->read_only)))
        return false;
    while (r->export[i].used)
        CHECK(++i < REF_EXPORTS);
    struct ref_export *e = &r->export[i];
    *e = (struct ref_export){.used = true,
                             .writable = writable,
                             .node = (int)(n - r->node),
                             .object = b ? b->object : 0};
    snprintf(e->id, sizeof e->id, "%s", text(data, "id"));
    if (b)
        b->job = REF_HELD;
    return true;
}

static json_t *make_export_del(struct ref_maker *m)
{
    struct ref_export *e = any_export(m);
    const char *id = e ? e->id : NULL;
    if (m->careless && chance_one_in(m->dice, 10))
        id = "none";
    return id ? json_pack("{s:s,s:s}", "id", id, "mode",
                          chance_one_in(m->dice, 2) ? "hard" : "safe")
              : NULL;
}

static bool play_export_del(struct ref *r, json_t *data)
{
    struct ref_export *e = find_export(r, text(data, "id"));
    if (!e)
        return false;
    for (unsigned i = 0; i < REF_NODES; i++)
        for (unsigned k = 0; k < r->node[i].n; k++)
            if (r->node[i].b[k].object == e->object)
                r->node[i].b[k].job = 0;
    *e = (struct ref_export){0};
    return true;
}

static json_t *make_set_node(struct ref_maker *m)
{
    struct ref_export *e = any_export(m);
    struct ref_node *found = NULL;
    for (unsigned i = 0, seen = 0; e && i < REF_NODES; i++) {
        struct ref_node *n = &m->r->node[i];
        if (n->used &&
            (m->careless || (n->size == m->r->node[e->node].size && can_show(n, e->writable))) &&
            chance_below(m->dice, ++seen) == 0)
            found = n;
    }
    return found ? json_pack("{s:s,s:s}", "id", e->id, "node-name", found->name) : NULL;
}

static bool play_set_node(struct ref *r, json_t *data)
{
    struct ref_export *e = find_export(r, text(data, "id"));
    struct ref_node *n = ref_node(r, text(data, "node-name"));
    if (!e || !can_show(n, e->writable) || n->size != r->node[e->node].size)
        return false;
    e->node = (int)(n - r->node);
    return true;
}

/* ------------------------------------------------------------------ nodes */

static json_t *make_node_add(struct ref_maker *m)
{
    const char *name = NULL;
    uint64_t size = chance_one_in(m->dice, 2) ? REF_BIG : REF_SMALL;
    for (unsigned i = REF_ADDED, seen = 0; i < REF_NODES; i++)
        if (!m->r->node[i].used && chance_below(m->dice, ++seen) == 0)
            name = ref_node_name(i);
    if (m->careless && chance_one_in(m->dice, 5))
        name = any_node(m);
    if (!name || !strcmp(name, "zz"))
        return NULL;
    if (chance_one_in(m->dice, 2))
        return json_pack("{s:s,s:s,s:s,s:b}", "driver", "file", "node-name", name, "filename",
                         m->careless && chance_one_in(m->dice, 4) ? "@missing" : "@spare",
                         "read-only", 1);
    return json_pack("{s:s,s:s,s:I,s:b}", "driver", "null-co", "node-name", name, "size",
                     (json_int_t)size, "read-zeroes", 1);
}

static bool play_node_add(struct ref *r, json_t *data)
{
    const char *name = text(data, "node-name"), *file = text(data, "filename");
    if (ref_node(r, name) || (file && strcmp(file, "@spare")))
        return false;
    for (unsigned i = REF_ADDED; i < REF_NODES; i++) {
        struct ref_node *n = &r->node[i];
        if (strcmp(n->name, name))
            continue;
        n->used = true;
        n->read_only = file != NULL;
        n->size = file ? REF_SMALL : (uint64_t)json_integer_value(json_object_get(data, "size"));
    }
    return true;
}

static bool node_is_used(const struct ref *r, const struct ref_node *n)
{
    bool used = n->guests || n->target_of;
    for (unsigned i = 0; i < REF_EXPORTS; i++)
        used = used || (r->export[i].used && &r->node[r->export[i].node] == n);
    for (unsigned i = 0; i < n->n; i++)
        used = used || n->b[i].job;
    return used;
}

static json_t *make_node_del(struct ref_maker *m)
{
    const char *name = NULL;
    for (unsigned i = REF_ADDED, seen = 0; i < REF_NODES; i++) {
        const struct ref_node *n = &m->r->node[i];
        if (n->used && (m->careless || !node_is_used(m->r, n)) &&
            chance_below(m->dice, ++seen) == 0)
            name = n->name;
    }
    if (m->careless && chance_one_in(m->dice, 8))
        name = "d";
    return name ? json_pack("{s:s}", "node-name", name) : NULL;
}

static bool play_node_del(struct ref *r, json_t *data)
{
    struct ref_node *n = ref_node(r, text(data, "node-name"));
    if (!n || node_is_used(r, n))
        return false;
    *n = (struct ref_node){.name = n->name};
    return true;
}

/* ------------------------------------------------------------------ abort, the table */

static json_t *make_abort(struct ref_maker *m)
{
    (void)m;
    return json_object();
}

static bool play_abort(struct ref *r, json_t *data)
{
    (void)r, (void)data;
    return false;
}

const struct ref_kind ref_kinds[] = {
    {BITMAP_KIND "add", 8, false, false, make_add, play_add},
    {BITMAP_KIND "remove", 5, false, false, make_one, play_remove},
    {BITMAP_KIND "clear", 5, false, false, make_one, play_clear},
    {BITMAP_KIND "enable", 3, false, false, make_one, play_enable},
    {BITMAP_KIND "disable", 3, false, false, make_one, play_disable},
    {BITMAP_KIND "merge", 9, false, false, make_merge, play_merge},
    {BITMAP_KIND "rename", 4, false, false, make_rename, play_rename},
    {BITMAP_KIND "copy", 6, false, false, make_copy, play_copy},
    {"x-" BITMAP_KIND "enable", 1, false, false, make_one, play_enable},
    {"x-" BITMAP_KIND "disable", 1, false, false, make_one, play_disable},
    {"x-" BITMAP_KIND "merge", 1, false, false, make_x_merge, play_x_merge},
    {"blockdev-backup", 4, true, true, make_backup, play_backup},
    {"drive-backup", 3, true, true, make_drive_backup, play_drive_backup},
    {"block-export-add", 3, false, false, make_export_add, play_export_add},
    {"block-export-del", 2, false, false, make_export_del, play_export_del},
    {"block-export-set-node", 3, false, false, make_set_node, play_set_node},
    {"blockdev-add", 3, true, false, make_node_add, play_node_add},
    {"blockdev-del", 3, false, false, make_node_del, play_node_del},
    {"abort", 1, false, false, make_abort, play_abort},
};
const unsigned n_ref_kinds = sizeof ref_kinds / sizeof *ref_kinds;
