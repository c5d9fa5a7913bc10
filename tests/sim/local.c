/* SPDX-License-Identifier: Apache-2.0 */
/* Driving an instance from within, and looking at all of it. */
#include "local.h"

#include <errno.h>
#include <string.h>

#include "base/mem.h"
#include "block/node.h"
#include "block/root.h"
#include "block/tracker.h"
#include "event/event.h"
#include "export/export.h"
#include "job/job.h"
#include "qmp/dispatch.h"
#include "qmp/instance.h"
#include "schema/schema.h"
#include "schema/types.h"

/* ------------------------------------------------------------------ events */

struct local_sink {
    struct event_sink sink; /* first */
    struct local *l;
};

static void copy_text(char *to, size_t size, json_t *from)
{
    const char *s = json_string_value(from);
    snprintf(to, size, "%s", s ? s : "");
}

static void hear(struct event_sink *s, json_t *event)
{
    struct local *l = ((struct local_sink *)s)->l;
    json_t *data = json_object_get(event, "data"), *id = json_object_get(data, "id");
    CHECK(l->n_events < LOCAL_EVENTS);
    struct local_event *e = &l->event[l->n_events++];
    copy_text(e->name, sizeof e->name, json_object_get(event, "event"));
    copy_text(e->id, sizeof e->id, id ? id : json_object_get(data, "device"));
    copy_text(e->status, sizeof e->status, json_object_get(data, "status"));
    e->error = json_object_get(data, "error") != NULL;
    e->len = (uint64_t)json_integer_value(json_object_get(data, "len"));
    e->offset = (uint64_t)json_integer_value(json_object_get(data, "offset"));
    io_event_set(&l->heard);
    if (l->on_event)
        l->on_event(l->on_event_arg, e);
}

void local_forget_events(struct local *l)
{
    l->n_events = 0;
}

/* ------------------------------------------------------------------ the store */

/* Takes its time, so that whoever should wait can be seen not to; fails when told. */
static co_fn int slow_write_record(struct store *s, const struct store_record *r,
                                   struct tide_error *err)
{
    struct local_store *mine = (struct local_store *)s;
    for (unsigned i = 0; i < mine->yields; i++)
        loop_pause();
    mine->n_records++;
    if (mine->fail && r->outcome.committed) {
        mine->n_refused++;
        return tide_fail(err, -EIO, "the record was refused on order");
    }
    return store_write_record(mine->below, r, err);
}

static const struct store_outcome *slow_find(struct store *s, const char *id)
{
    return store_find_outcome(((struct local_store *)s)->below, id);
}

static void slow_free(struct store *s)
{
    (void)s;
}

static const struct store_ops slow_ops = {slow_write_record, slow_find, slow_free};

/* ------------------------------------------------------------------ commands */

/* Each string "@x" becomes "WHO-x". */
static json_t *localised(const struct local *l, json_t *v)
{
    const char *s = json_string_value(v), *key;
    json_t *member, *copy;
    char path[40];
    size_t i;
    if (s && s[0] == '@') {
        snprintf(path, sizeof path, "%s-%s", l->who, s + 1);
        return json_string(path);
    }
    if (!json_is_object(v) && !json_is_array(v))
        return json_incref(v);
    copy = json_is_object(v) ? json_object() : json_array();
    json_object_foreach (v, key, member)
        json_object_set_new(copy, key, localised(l, member));
    json_array_foreach (v, i, member)
        json_array_append_new(copy, localised(l, member));
    return copy;
}

json_t *local_call(struct local *l, const char *name, json_t *given)
{
    json_t *args = localised(l, given);
    json_decref(given);
    bool negotiated = true, oob = false;
    json_t *request = json_pack("{s:s,s:o}", "execute", name, "arguments", args);
    CHECK(request);
    json_t *reply = qmp_dispatch(l->inst, request, "test", &negotiated, &oob);
    CHECK(reply);
    json_decref(request);
    return reply;
}

char *local_command(struct local *l, const char *name, json_t *args)
{
    json_t *reply = local_call(l, name, args);
    const char *e = qmp_error(reply);
    char *text = e ? strdup(e) : NULL;
    json_decref(reply);
    return text;
}

json_t *local_get(struct local *l, const char *name, json_t *args)
{
    json_t *reply = local_call(l, name, args);
    CHECK_SAY(!qmp_error(reply), "%s: %s", name, qmp_error(reply));
    json_t *ret = json_incref(json_object_get(reply, "return"));
    json_decref(reply);
    return ret;
}

static co_fn void must(struct local *l, const char *name, json_t *args)
{
    json_decref(local_get(l, name, args));
}

/* ------------------------------------------------------------------ lists */

static const struct schema_type *type_of_transaction(void)
{
    for (size_t i = 0; i < n_qmp_commands; i++)
        if (!strcmp(qmp_commands[i].name, "transaction"))
            return qmp_commands[i].args;
    CHECK(false);
    return NULL;
}

struct local_outcome local_run(struct local *l, json_t *actions, const struct local_props *p)
{
    struct txn_props props = {.grouped = p->grouped, .dry_run = p->dry_run, .id = p->id};
    struct local_outcome out = {.failed = -1};
    struct txn_env *env = &l->inst->txn;
    struct arena arena = {0};
    struct txn_result res;
    struct tide_error err = {0};
    void *parsed;
    json_t *args = json_pack("{s:o}", "actions", localised(l, actions));
    CHECK(args);
    if (getenv("SIM_QMP")) {
        json_dumpf(args, stderr, 0);
        fputc('\n', stderr);
    }
    int r = schema_parse(type_of_transaction(), args, &arena, 0, &parsed, &err);
    CHECK_SAY(r == 0, "%s", err.msg);
    const struct q_transaction *t = parsed;
    struct action *a = arena_alloc(&arena, (t->n_actions + 1) * sizeof *a);
    CHECK(a);
    for (size_t i = 0; i < t->n_actions; i++)
        a[i] = (struct action){&txn_actions[t->actions[i].type], t->actions[i].data, (unsigned)i};
    env->probe = p->probe;
    env->probe_arg = p->probe_arg;
    mem_fail_after(p->fail_alloc);
    out.code = txn_run(env, a, t->n_actions, &props, &res, &err);
    unsigned long n = mem_fail_after(0);
    if (p->n_allocs)
        *p->n_allocs = n;
    env->probe = NULL;
    if (out.code < 0) {
        out.failed = res.failed;
        snprintf(out.text, sizeof out.text, "%s", err.msg);
    }
    snprintf(out.phase, sizeof out.phase, "%s", res.phase ? res.phase : "");
    txn_result_free(&res);
    arena_free(&arena);
    json_decref(args);
    return out;
}

/* ------------------------------------------------------------------ disks and guests */

static co_fn void add_disk(struct local *l, const char *name, uint64_t size)
{
    char file[16];
    if (name[strlen(name) - 1] != 'e') {
        must(l, "blockdev-add",
             json_pack("{s:s,s:s,s:I,s:b}", "driver", "null-co", "node-name", name, "size",
                       (json_int_t)size, "read-zeroes", 1));
        return;
    }
    snprintf(file, sizeof file, "%s-%s", l->who, name);
    CHECK(sim_file_write(l->w->disk, file, "", 1, size - 1) == 0);
    must(l, "blockdev-add",
         json_pack("{s:s,s:s,s:s}", "driver", "file", "node-name", name, "filename", file));
}

static co_fn void hold(struct local *l)
{
    must(l, "block-dirty-bitmap-add",
         json_pack("{s:s,s:s,s:b}", "node", "d", "name", "held", "disabled", 1));
    must(l, "block-export-add",
         json_pack("{s:s,s:s,s:s,s:s,s:[s]}", "type", "nbd", "id", "hold", "name", "hold",
                   "node-name", "d", "bitmaps", "held"));
}

void local_open(struct local *l, struct world *w, struct instance *inst, const char *who)
{
    struct ref *r = malloc(sizeof *r);
    struct tide_error err = {0};
    char path[32];
    *l = (struct local){.w = w, .inst = inst, .who = who};
    l->sink = calloc(1, sizeof *l->sink);
    CHECK(r && l->sink);
    *l->sink = (struct local_sink){.sink = {.fn = hear}, .l = l};
    event_bus_attach(inst->bus, &l->sink->sink);
    l->store = (struct local_store){.store = {&slow_ops}, .below = inst->store};
    inst->txn.store = &l->store.store;
    jobs_set_store(inst->jobs, &l->store.store);
    ref_init(r);
    for (unsigned i = 0; i < REF_ADDED; i++)
        add_disk(l, r->node[i].name, r->node[i].size);
    for (unsigned i = 0; i < 3; i++)
        CHECK_SAY(root_new(graph_find(inst->graph, r->node[i].name), ROOT_READ | ROOT_WRITE,
                           "guest", &l->writer[i], &err) == 0,
                  "%s", err.msg);
    free(r);
    snprintf(path, sizeof path, "/%s-nbd", who);
    must(l, "nbd-server-start",
         json_pack("{s:{s:s,s:{s:s}}}", "addr", "type", "unix", "data", "path", path));
    snprintf(path, sizeof path, "%s-spare", who);
    CHECK(sim_file_write(w->disk, path, "", 1, REF_SMALL - 1) == 0);
    hold(l);
}

void local_close(struct local *l)
{
    for (unsigned i = 0; i < 3; i++)
        root_free(l->writer[i]);
    event_bus_detach(l->inst->bus, &l->sink->sink);
    l->inst->txn.store = l->inst->store;
    jobs_set_store(l->inst->jobs, l->inst->store);
    free(l->sink);
}

void local_use_store(struct local *l, struct store *below)
{
    l->store.below = below;
}

void local_write(struct local *l, const char *node, uint64_t off, uint64_t len)
{
    unsigned i = (unsigned)(node[0] - 'd');
    struct root *r = l->writer[i];
    static uint8_t data[REF_BIG];
    struct iovec iov = {data, len};
    root_enter(r);
    l->n_inside[i]++;
    CHECK(node_pwritev(root_node(r), &iov, 1, off, len, 0) == 0);
    l->n_inside[i]--;
    root_leave(r);
}

/* ------------------------------------------------------------------ jobs */

static bool all_jobs_are(struct local *l, const char *status)
{
    json_t *rows = jobs_query(l->inst->jobs), *row;
    size_t i;
    bool all = true;
    CHECK(rows);
    json_array_foreach (rows, i, row)
        all = all && !strcmp(json_string_value(json_object_get(row, "status")), status);
    json_decref(rows);
    return all;
}

void local_wait_jobs(struct local *l, const char *status)
{
    while (!all_jobs_are(l, status))
        io_event_wait(&l->heard, IO_FOREVER);
}

void local_wait_gone(struct local *l, const char *id)
{
    struct tide_error err;
    struct job *j;
    while (job_find(l->inst->jobs, id, false, &j, &err) == 0)
        io_event_wait(&l->heard, IO_FOREVER);
}

static co_fn void end_jobs(struct local *l)
{
    json_t *rows = jobs_query(l->inst->jobs), *row;
    size_t i;
    json_array_foreach (rows, i, row) {
        char *e =
            local_command(l, "job-cancel", json_pack("{s:O}", "id", json_object_get(row, "id")));
        free(e); /* of a group that has been asked to end already */
    }
    json_decref(rows);
    local_wait_jobs(l, "none is left");
}

static co_fn void end_exports(struct local *l)
{
    json_t *rows = exports_query(l->inst->exports), *row;
    size_t i;
    json_array_foreach (rows, i, row)
        must(l, "block-export-del",
             json_pack("{s:O,s:s}", "id", json_object_get(row, "id"), "mode", "hard"));
    json_decref(rows);
}

static co_fn void end_bitmaps(struct local *l)
{
    json_t *nodes = local_get(l, "query-named-block-nodes", json_object()), *node, *bm;
    size_t i, k;
    json_array_foreach (nodes, i, node) {
        json_array_foreach (json_object_get(node, "dirty-bitmaps"), k, bm)
            must(l, "block-dirty-bitmap-remove",
                 json_pack("{s:O,s:O}", "node", json_object_get(node, "node-name"), "name",
                           json_object_get(bm, "name")));
    }
    json_decref(nodes);
}

void local_reset(struct local *l)
{
    char file[24];
    end_jobs(l);
    end_exports(l);
    end_bitmaps(l);
    for (unsigned i = REF_ADDED; i < REF_NODES; i++)
        if (graph_find(l->inst->graph, ref_node_name(i)))
            must(l, "blockdev-del", json_pack("{s:s}", "node-name", ref_node_name(i)));
    for (unsigned i = 0; i < REF_FILES; i++) {
        snprintf(file, sizeof file, "%s-x%u", l->who, i);
        sim_file_remove(l->w->disk, file);
    }
    hold(l);
    local_forget_events(l);
}

/* ------------------------------------------------------------------ looking */

static void say_bits(FILE *f, const struct bitmap *b)
{
    uint64_t off = 0, len;
    for (; bitmap_next_dirty(b, off, UINT64_MAX, &off, &len); off += len)
        fprintf(f, " %" PRIu64 "-%" PRIu64, off, off + len);
}

static void say_bitmap(FILE *f, const struct dirty_bitmap *b)
{
    fprintf(f, "  bitmap %s shift %u%s%s:", b->name, bitmap_shift(b->bits),
            b->enabled ? " enabled" : "", b->n_busy ? " busy" : "");
    say_bits(f, b->bits);
    if (b->successor) {
        fprintf(f, " late:");
        say_bits(f, b->successor);
    }
    fputc('\n', f);
}

static void say_owners(struct local *l, FILE *f)
{
    json_t *jobs = jobs_query(l->inst->jobs), *exports = exports_query(l->inst->exports), *row;
    const char *id[REF_JOBS + REF_EXPORTS];
    char line[REF_EXPORTS][40];
    unsigned n = 0;
    size_t i;
    CHECK(json_array_size(jobs) <= REF_JOBS && json_array_size(exports) <= REF_EXPORTS);
    json_array_foreach (jobs, i, row)
        id[n++] = json_string_value(json_object_get(row, "id"));
    json_array_foreach (exports, i, row) {
        snprintf(line[i], sizeof line[i], "export %s of %s",
                 json_string_value(json_object_get(row, "id")),
                 json_string_value(json_object_get(row, "node-name")));
        id[n++] = line[i];
    }
    ref_say_owners(f, id, n);
    json_decref(jobs);
    json_decref(exports);
}

char *local_bitmaps(struct local *l)
{
    char *text = NULL;
    size_t len;
    FILE *f = open_memstream(&text, &len);
    CHECK(f);
    for (unsigned i = 0; i < REF_NODES; i++) {
        struct node *n = graph_find(l->inst->graph, ref_node_name(i));
        if (!n)
            continue;
        fprintf(f, "node %s%s\n", ref_node_name(i), node_written_alone_by(n) ? " is a target" : "");
        for (struct dirty_bitmap *b = node_bitmaps(n); b; b = b->next)
            say_bitmap(f, b);
    }
    say_owners(l, f);
    fclose(f);
    return text;
}

/* What the text of a bitmap leaves out: which object, its generation, who counts on it. */
static void say_node(void *arg, struct node *n)
{
    FILE *f = arg;
    struct node *c;
    const char *alone = node_written_alone_by(n);
    fprintf(f, "node %s %p size %" PRIu64 "%s alone %s\n", node_name(n), (void *)n, node_size(n),
            node_read_only(n) ? " read-only" : "", alone ? alone : "nobody");
    for (unsigned i = 0; (c = node_child(n, i)); i++)
        fprintf(f, "  child %s\n", node_name(c));
    for (struct dirty_bitmap *b = node_bitmaps(n); b; b = b->next) {
        fprintf(f, "  %p on %p generation %" PRIu64 " busy %u%s%s%s\n", (void *)b, (void *)b->node,
                b->generation, b->n_busy, b->persistent ? " persistent" : "",
                b->inconsistent ? " inconsistent" : "", b->read_only ? " read-only" : "");
        say_bitmap(f, b);
    }
}

static void say_json(FILE *f, json_t *v)
{
    CHECK(v && json_dumpf(v, f, JSON_COMPACT | JSON_SORT_KEYS) == 0);
    fputc('\n', f);
    json_decref(v);
}

static void say_memory(struct local *l, FILE *f)
{
    graph_each(l->inst->graph, say_node, f);
    say_json(f, jobs_query(l->inst->jobs));
    say_json(f, jobs_query_block(l->inst->jobs));
    say_json(f, exports_query(l->inst->exports));
}

char *local_whole_memory(struct local *l)
{
    char *text = NULL;
    size_t len;
    FILE *f = open_memstream(&text, &len);
    CHECK(f);
    say_memory(l, f);
    fclose(f);
    return text;
}

static void say_file(struct local *l, FILE *f, const char *name)
{
    static uint8_t data[REF_BIG];
    char path[24];
    uint64_t sum = 0;
    snprintf(path, sizeof path, "%s-%s", l->who, name);
    int64_t size = sim_file_size(l->w->disk, path);
    ssize_t n = size > 0 ? sim_file_read(l->w->disk, path, data, sizeof data, 0) : 0;
    for (ssize_t i = 0; i + 8 <= n; i += 8) {
        uint64_t word;
        memcpy(&word, data + i, sizeof word);
        sum = sum * 31 + word;
    }
    fprintf(f, "file %s size %" PRId64 " sum %016" PRIx64 "\n", name, size < 0 ? -1 : size, sum);
}

char *local_whole_files(struct local *l)
{
    char *text = NULL, name[16];
    size_t len;
    FILE *f = open_memstream(&text, &len);
    CHECK(f);
    say_memory(l, f);
    for (unsigned i = 0; i < REF_FILES; i++) {
        snprintf(name, sizeof name, "x%u", i);
        say_file(l, f, name);
    }
    fclose(f);
    return text;
}

char *local_whole(struct local *l)
{
    char *text = NULL;
    size_t len;
    FILE *f = open_memstream(&text, &len);
    CHECK(f);
    say_memory(l, f);
    fprintf(f, "disk %016" PRIx64 "\n", sim_world_hash(l->w->disk));
    fclose(f);
    return text;
}
