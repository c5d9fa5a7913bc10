/* SPDX-License-Identifier: Apache-2.0 */
/* A ring of entries, numbered since the daemon's start. */
#include "txn/history.h"

#include <errno.h>
#include <string.h>

#include "base/bytes.h"
#include "base/log.h"
#include "base/mem.h"
#include "io/io.h"

enum outcome { COMMITTED, FAILED, REPLAYED, WOULD_COMMIT, WOULD_FAIL };
static const char *const outcome_words[] = {"committed", "failed", "replayed", "would-commit",
                                            "would-fail"};

struct history_entry {
    uint64_t number;
    int64_t wall;
    uint64_t begin, took;
    struct io *io;
    char *client, *id, *error;
    bool plain, grouped, dry_run;
    size_t n;
    unsigned n_kinds;
    const char *kind[HISTORY_KINDS];
    enum outcome outcome;
    int failed;
    uint64_t held_ns;
};

struct txn_history {
    struct history_entry *ring[HISTORY_LENGTH];
    uint64_t n; /* ever */
};

int history_new(struct txn_history **out)
{
    *out = mem_zalloc(sizeof **out);
    return *out ? 0 : -ENOMEM;
}

static void entry_free(struct history_entry *e)
{
    if (!e)
        return;
    mem_free(e->client);
    mem_free(e->id);
    mem_free(e->error);
    mem_free(e);
}

void history_free(struct txn_history *h)
{
    if (!h)
        return;
    for (unsigned i = 0; i < HISTORY_LENGTH; i++)
        entry_free(h->ring[i]);
    mem_free(h);
}

struct history_entry *history_begin(struct txn_history *h, struct io *io,
                                    const struct action *actions, size_t n,
                                    const struct txn_props *props)
{
    struct history_entry *e = mem_zalloc(sizeof *e);
    if (!e)
        return NULL;
    e->io = io;
    e->wall = io_wall(io);
    e->begin = io_now(io);
    e->client = mem_strdup(props->client ? props->client : "the daemon");
    e->id = props->id ? mem_strdup(props->id) : NULL;
    e->plain = props->plain;
    e->grouped = props->grouped;
    e->dry_run = props->dry_run;
    e->n = n;
    e->n_kinds = (unsigned)MIN(n, HISTORY_KINDS);
    for (unsigned i = 0; i < e->n_kinds; i++)
        e->kind[i] = actions[i].entry->kind;
    if (e->client && (e->id || !props->id))
        return e;
    entry_free(e);
    return NULL;
}

void history_end(struct txn_history *h, struct history_entry *e, int r,
                 const struct txn_result *res, const struct tide_error *err)
{
    uint64_t number = ++h->n;
    if (e && r < 0 && !(e->error = mem_strdup(err->msg))) {
        entry_free(e);
        e = NULL;
    }
    if (!e)
        log_warn("txn", "no memory to remember transaction %llu", (unsigned long long)number);
    struct history_entry **place = &h->ring[number % HISTORY_LENGTH];
    entry_free(*place);
    *place = e;
    if (!e)
        return;
    e->number = number;
    e->took = io_now(e->io) - e->begin;
    e->failed = r < 0 ? res->failed : -1;
    e->held_ns = res->held_ns;
    e->outcome = res->replayed ? REPLAYED
                 : e->dry_run  ? (r < 0 ? WOULD_FAIL : WOULD_COMMIT)
                               : (r < 0 ? FAILED : COMMITTED);
}

static json_t *entry_row(const struct history_entry *e)
{
    json_t *kinds = json_array();
    for (unsigned i = 0; kinds && i < e->n_kinds; i++) {
        if (json_array_append_new(kinds, json_string(e->kind[i])) < 0) {
            json_decref(kinds);
            return NULL;
        }
    }
    json_t *o = json_pack("{s:I,s:{s:I,s:I},s:s,s:b,s:b,s:I,s:o,s:s,s:I,s:I}", "number",
                          (json_int_t)e->number, "time", "seconds",
                          (json_int_t)(e->wall < 0 ? -1 : e->wall / 1000000000), "microseconds",
                          (json_int_t)(e->wall < 0 ? -1 : e->wall / 1000 % 1000000), "client",
                          e->client, "plain", e->plain, "grouped", e->grouped, "n-actions",
                          (json_int_t)e->n, "actions", kinds, "outcome", outcome_words[e->outcome],
                          "held-ns", (json_int_t)e->held_ns, "took-ns", (json_int_t)e->took);
    if (o && e->id)
        json_object_set_new(o, "id", json_string(e->id));
    if (o && e->failed >= 0)
        json_object_set_new(o, "failed-action", json_integer(e->failed));
    if (o && e->error)
        json_object_set_new(o, "error", json_string(e->error));
    return o;
}

json_t *history_query(const struct txn_history *h, unsigned limit)
{
    json_t *list = json_array();
    uint64_t n = MIN(MIN(h->n, HISTORY_LENGTH), limit);
    for (uint64_t i = 0; list && i < n; i++) {
        const struct history_entry *e = h->ring[(h->n - i) % HISTORY_LENGTH];
        if (e && json_array_append_new(list, entry_row(e)) < 0) {
            json_decref(list);
            list = NULL;
        }
    }
    return list;
}
