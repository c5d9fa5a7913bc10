/* SPDX-License-Identifier: Apache-2.0 */
/* The log, the state of an instance by names, and the replay. */
#include "durable_store.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>

#include "block/node.h"
#include "block/tracker.h"
#include "export/export.h"
#include "job/job.h"
#include "qmp/instance.h"

struct head {
    char magic[8];
    uint64_t seq, len, sum;
};
static const char magic[8] = "TXRECORD";

struct durable {
    struct store store; /* first */
    struct instance *inst;
    struct durable_story *story;
    struct io_file *file;
    uint64_t end, seq;
    json_t *state;    /* all records so far */
    json_t *outcomes; /* which ids are known */
    struct store_outcome found;
    bool broken;
};

/* ------------------------------------------------------------------ the state of an instance */

static const char *const words[] = {
    [STORE_NODE] = "node",          [STORE_BITMAP] = "bitmap", [STORE_BITMAP_BITS] = "bits",
    [STORE_BITMAP_STATE] = "state", [STORE_JOB] = "job",       [STORE_EXPORT] = "export",
    [STORE_EXPORT_NAME] = "served", [STORE_FILE] = "file",
};

static void key_of(char *key, size_t size, enum store_kind kind, const char *a, const char *b)
{
    snprintf(key, size, "%s %s%s%s", words[kind], a, b ? "/" : "", b ? b : "");
}

static void say_ranges(FILE *f, const struct bitmap *b)
{
    uint64_t off = 0, len;
    for (; bitmap_next_dirty(b, off, UINT64_MAX, &off, &len); off += len)
        fprintf(f, " %" PRIu64 "-%" PRIu64, off, off + len);
}

static void say_node(FILE *f, const struct node *n)
{
    struct node *c;
    fprintf(f, "size %" PRIu64 "%s", node_size(n), node_read_only(n) ? " read-only" : "");
    for (unsigned i = 0; (c = node_child(n, i)); i++)
        fprintf(f, " on %s", node_name(c));
}

static void say_bitmap(FILE *f, enum store_kind kind, const struct dirty_bitmap *b)
{
    if (kind == STORE_BITMAP)
        fprintf(f, "shift %u", bitmap_shift(b->bits));
    if (kind == STORE_BITMAP_STATE)
        fprintf(f, "%s%s%s", b->enabled ? "enabled" : "disabled", b->successor ? " frozen" : "",
                b->inconsistent ? " inconsistent" : "");
    if (kind == STORE_BITMAP_BITS) {
        say_ranges(f, b->bits);
        fprintf(f, " |");
        if (b->successor)
            say_ranges(f, b->successor);
    }
}

/* The thing of that name now, as text; NULL: there is none. Owned (json). */
static json_t *look_up(struct instance *inst, enum store_kind kind, const char *a, const char *b)
{
    char *text = NULL;
    size_t len;
    struct node *n;
    struct dirty_bitmap *bm;
    struct job *j;
    struct tide_error ignored;
    FILE *f = open_memstream(&text, &len);
    bool there = false;
    CHECK(f);
    if (kind == STORE_NODE && (n = graph_find(inst->graph, a))) {
        there = true;
        say_node(f, n);
    }
    if (kind <= STORE_BITMAP_STATE && kind >= STORE_BITMAP && (n = graph_find(inst->graph, a)) &&
        dirty_bitmap_find(n, b, 0, &bm, &ignored) == 0) {
        there = true;
        say_bitmap(f, kind, bm);
    }
    if (kind == STORE_JOB && job_find(inst->jobs, a, false, &j, &ignored) == 0)
        there = !j->group->decided; /* what has ended is only remembered for its client */
    if (kind == STORE_EXPORT && (n = export_node(inst->exports, a))) {
        there = true;
        fprintf(f, "shows %s", node_name(n));
    }
    fclose(f);
    json_t *v = there ? json_string(text) : NULL;
    free(text);
    return v;
}

struct looking {
    struct instance *inst;
    json_t *all;
};

static void put(struct looking *l, enum store_kind kind, const char *a, const char *b)
{
    char key[80];
    json_t *v = look_up(l->inst, kind, a, b);
    key_of(key, sizeof key, kind, a, b);
    if (v)
        json_object_set_new(l->all, key, v);
}

static void put_node(void *arg, struct node *n)
{
    struct looking *l = arg;
    if (node_name(n)[0] == '#' || !node_name(n)[0])
        return; /* part of a job or of the node above it */
    put(l, STORE_NODE, node_name(n), NULL);
    for (struct dirty_bitmap *b = node_bitmaps(n); b; b = b->next)
        for (enum store_kind k = STORE_BITMAP; k <= STORE_BITMAP_STATE; k++)
            put(l, k, node_name(n), b->name);
}

static json_t *whole_state(struct instance *inst)
{
    struct looking l = {inst, json_object()};
    json_t *rows, *row;
    size_t i;
    graph_each(inst->graph, put_node, &l);
    rows = jobs_query(inst->jobs);
    json_array_foreach (rows, i, row)
        put(&l, STORE_JOB, json_string_value(json_object_get(row, "id")), NULL);
    json_decref(rows);
    rows = exports_query(inst->exports);
    json_array_foreach (rows, i, row)
        put(&l, STORE_EXPORT, json_string_value(json_object_get(row, "id")), NULL);
    json_decref(rows);
    return l.all;
}

/* ------------------------------------------------------------------ records */

static uint64_t checksum(uint64_t seq, const char *p, size_t len)
{
    uint64_t h = UINT64_C(14695981039346656037) ^ seq;
    for (size_t i = 0; i < len; i++)
        h = (h ^ (unsigned char)p[i]) * UINT64_C(1099511628211);
    return h;
}

/* What a name of no particular thing stands for: all of its kind, also those that are gone. */
static void add_all(struct durable *d, json_t *set, json_t *now, enum store_kind kind)
{
    const char *key;
    json_t *v;
    size_t n = strlen(words[kind]);
    json_object_foreach (d->state, key, v)
        if (!strncmp(key, words[kind], n) && key[n] == ' ')
            json_object_set_new(set, key, json_null());
    json_object_foreach (now, key, v)
        if (!strncmp(key, words[kind], n) && key[n] == ' ')
            json_object_set(set, key, v);
}

static json_t *make_set(struct durable *d, const struct store_record *r, json_t *now)
{
    json_t *set = json_object();
    for (size_t i = 0; i < r->n_changed; i++) {
        const struct store_name *name = &r->changed[i];
        char key[80];
        if (!name->a ||
            (name->kind >= STORE_BITMAP && name->kind <= STORE_BITMAP_STATE && !name->b)) {
            add_all(d, set, now, name->kind);
            continue;
        }
        key_of(key, sizeof key, name->kind, name->a, name->b);
        json_t *v = look_up(d->inst, name->kind, name->a, name->b);
        json_object_set_new(set, key, v ? v : json_null());
    }
    return set;
}

static void apply(json_t *state, json_t *set)
{
    const char *key;
    json_t *v;
    json_object_foreach (set, key, v) {
        if (json_is_null(v))
            json_object_del(state, key);
        else
            json_object_set(state, key, v);
    }
}

static co_fn int append(struct durable *d, json_t *record)
{
    char *text = json_dumps(record, JSON_COMPACT | JSON_SORT_KEYS);
    size_t len = strlen(text);
    struct head h = {.seq = d->seq + 1, .len = len, .sum = checksum(d->seq + 1, text, len)};
    struct iovec iov[2] = {{&h, sizeof h}, {text, len}};
    memcpy(h.magic, magic, sizeof magic);
    ssize_t n = io_pwritev(d->file, iov, 2, d->end, 0);
    int r = n < 0 ? (int)n : (size_t)n == sizeof h + len ? io_fsync(d->file) : -EIO;
    free(text);
    if (r == 0) {
        d->end += sizeof h + len;
        return 0;
    }
    int undo = io_truncate(d->file, d->end);
    if (undo == 0)
        undo = io_fsync(d->file);
    d->broken = undo < 0;
    return r;
}

static struct durable_try *new_try(struct durable_story *s)
{
    if (s->n == s->cap) {
        s->cap = s->cap * 2 + 64;
        s->tries = realloc(s->tries, s->cap * sizeof *s->tries);
        CHECK(s->tries);
    }
    struct durable_try *t = &s->tries[s->n++];
    *t = (struct durable_try){0};
    return t;
}

static void check_complete(struct durable *d, json_t *now)
{
    if (json_equal(d->state, now))
        return;
    json_dumpf(d->state, stderr, JSON_SORT_KEYS | JSON_INDENT(1));
    fputs("\n---- and in memory\n", stderr);
    json_dumpf(now, stderr, JSON_SORT_KEYS | JSON_INDENT(1));
    CHECK_SAY(false, "\nwhat is recorded is not what there is: a footprint is not whole");
}

/* `set`: taken over. */
static co_fn int write_set(struct durable *d, const char *id, json_t *set, json_t *now)
{
    size_t at = d->story->n;
    struct durable_try *t = new_try(d->story);
    t->seq = d->seq + 1;
    t->state = now;
    snprintf(t->id, sizeof t->id, "%s", id ? id : "");
    json_t *record = json_pack("{s:s,s:o}", "id", id ? id : "", "set", set);
    int r = append(d, record);
    t = &d->story->tries[at];
    if (r < 0) {
        if (!d->broken)
            t->how = DURABLE_WITHDRAWN;
        d->story->n_refused++;
    } else {
        t->how = DURABLE_DONE;
        d->story->done = ++d->seq;
        apply(d->state, set);
        check_complete(d, now);
        if (id)
            json_object_set_new(d->outcomes, id, json_true());
    }
    json_decref(record);
    return r;
}

static co_fn int durable_write_record(struct store *s, const struct store_record *r,
                                      struct tide_error *err)
{
    struct durable *d = (struct durable *)s;
    if (d->broken)
        return tide_fail(err, -EIO, "the store takes no more records");
    json_t *now = whole_state(d->inst);
    int n = write_set(d, r->id, make_set(d, r, now), now);
    return n < 0 ? tide_fail(err, n, "the store: %s", tide_strerror(-n)) : 0;
}

static const struct store_outcome *durable_find(struct store *s, const char *id)
{
    struct durable *d = (struct durable *)s;
    return json_object_get(d->outcomes, id) ? &d->found : NULL;
}

static void durable_free(struct store *s)
{
    (void)s;
}

static const struct store_ops durable_ops = {durable_write_record, durable_find, durable_free};

/* ------------------------------------------------------------------ its life */

void durable_new(struct instance *inst, const char *path, struct durable_story *story,
                 struct durable **out)
{
    struct durable *d = calloc(1, sizeof *d);
    CHECK(d);
    *d = (struct durable){.store = {&durable_ops},
                          .inst = inst,
                          .story = story,
                          .state = json_object(),
                          .outcomes = json_object()};
    CHECK(io_open(path, O_RDWR | O_CREAT, 0600, &d->file) == 0);
    CHECK(io_sync_dir(".") == 0);
    CHECK(durable_checkpoint(d));
    *out = d;
}

struct store *durable_store(struct durable *d)
{
    return &d->store;
}

void durable_close(struct durable *d)
{
    io_close(d->file);
    json_decref(d->state);
    json_decref(d->outcomes);
    free(d);
}

bool durable_checkpoint(struct durable *d)
{
    json_t *now, *set = json_object();
    if (d->broken) {
        json_decref(set);
        return false;
    }
    now = whole_state(d->inst);
    for (enum store_kind k = STORE_NODE; k <= STORE_FILE; k++)
        add_all(d, set, now, k);
    return write_set(d, NULL, set, now) == 0;
}

bool durable_is_broken(const struct durable *d)
{
    return d->broken;
}

void durable_story_free(struct durable_story *s)
{
    for (size_t i = 0; i < s->n; i++)
        json_decref(s->tries[i].state);
    free(s->tries);
}

/* ------------------------------------------------------------------ after a cut */

/* The next whole record; NULL: there is none. */
static co_fn json_t *read_record(struct io_file *f, uint64_t *at, uint64_t seq)
{
    struct head h;
    struct iovec iov = {&h, sizeof h};
    ssize_t n = io_preadv(f, &iov, 1, *at);
    if (n != (ssize_t)sizeof h || memcmp(h.magic, magic, sizeof magic) || h.seq != seq ||
        h.len > 16u << 20)
        return NULL;
    char *text = malloc(h.len + 1);
    CHECK(text);
    iov = (struct iovec){text, h.len};
    n = io_preadv(f, &iov, 1, *at + sizeof h);
    json_t *v = NULL;
    if (n == (ssize_t)h.len && checksum(seq, text, h.len) == h.sum)
        v = json_loadb(text, h.len, 0, NULL);
    free(text);
    *at += sizeof h + h.len;
    return v;
}

static void check_found(const struct durable_story *s, uint64_t seq, json_t *state, json_t *ids)
{
    const struct durable_try *t = NULL;
    for (size_t i = 0; i < s->n; i++) {
        const struct durable_try *c = &s->tries[i];
        if (c->how == DURABLE_WITHDRAWN)
            continue;
        if (c->seq <= seq && c->id[0] && c->how == DURABLE_DONE)
            CHECK_SAY(json_object_get(ids, c->id), "list '%s' is forgotten", c->id);
        if (c->seq == seq)
            t = c;
    }
    CHECK_SAY(seq >= s->done, "record %" PRIu64 " was answered, %" PRIu64 " is the last there",
              s->done, seq);
    CHECK_SAY(t || !seq, "record %" PRIu64 " was never written", seq);
    if (t && !json_equal(t->state, state)) {
        json_dumpf(t->state, stderr, JSON_SORT_KEYS | JSON_INDENT(1));
        json_dumpf(state, stderr, JSON_SORT_KEYS | JSON_INDENT(1));
        CHECK_SAY(false, "\nrecord %" PRIu64 " gives another state", seq);
    }
}

void durable_check(const char *path, const struct durable_story *story)
{
    struct io_file *f;
    uint64_t at = 0, seq = 0;
    json_t *state = json_object(), *ids = json_object(), *v;
    if (io_open(path, O_RDONLY, 0, &f) == 0) {
        while ((v = read_record(f, &at, seq + 1))) {
            const char *id = json_string_value(json_object_get(v, "id"));
            if (*id)
                json_object_set_new(ids, id, json_true());
            apply(state, json_object_get(v, "set"));
            json_decref(v);
            seq++;
        }
        io_close(f);
    }
    check_found(story, seq, state, ids);
    json_decref(state);
    json_decref(ids);
}
