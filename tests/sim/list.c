/* SPDX-License-Identifier: Apache-2.0 */
/* The rules of docs/transactions.md and section 5.3 of the contract, once more and simpler. */
#include "list.h"

#include <string.h>

/* ------------------------------------------------------------------ the text of a list */

static void say_bits(char *s, size_t len, const struct op *o)
{
    static const char *const words[] = {"add", "remove", "clear", "enable", "disable"};
    int n = snprintf(
        s, len, "{\"type\":\"block-dirty-bitmap-%s\",\"data\":{\"node\":\"%s\",\"name\":\"%s\"",
        words[o->kind], o->b->node, o->b->name);
    if (o->kind == ADD)
        n += snprintf(s + n, len - (size_t)n, ",\"granularity\":%u,\"disabled\":%s", 1u << o->shift,
                      o->disabled ? "true" : "false");
    snprintf(s + n, len - (size_t)n, "}}");
}

static void say_merge(char *s, size_t len, const struct op *o)
{
    int n = snprintf(
        s, len,
        "{\"type\":\"block-dirty-bitmap-merge\",\"data\":{\"node\":\"%s\",\"target\":\"%s\","
        "\"bitmaps\":[",
        o->b->node, o->b->name);
    for (unsigned i = 0; i < o->n_sources; i++)
        n += snprintf(s + n, len - (size_t)n, "%s{\"node\":\"%s\",\"name\":\"%s\"}", i ? "," : "",
                      o->source[i]->node, o->source[i]->name);
    snprintf(s + n, len - (size_t)n, "]}}");
}

static void say_backup(char *s, size_t len, const struct op *o)
{
    static const char *const modes[] = {"", "on-success", "never", "always"};
    int n = snprintf(
        s, len,
        "{\"type\":\"blockdev-backup\",\"data\":{\"job-id\":\"j%u\",\"device\":\"d%u\",\"target\":"
        "\"t%u\",\"sync\":\"%s\"",
        o->job, o->disk, o->disk, o->sync);
    if (o->b)
        n += snprintf(s + n, len - (size_t)n, ",\"bitmap\":\"%s\"", o->b->name);
    if (o->b && strcmp(o->sync, "incremental"))
        n += snprintf(s + n, len - (size_t)n, ",\"bitmap-mode\":\"%s\"", modes[o->mode]);
    if (o->shift)
        n += snprintf(s + n, len - (size_t)n, ",\"speed\":%u", 1u << o->shift);
    snprintf(s + n, len - (size_t)n, "}}");
}

char *list_text(const struct list *l)
{
    size_t cap = 200 + l->n * 500, n = 0;
    char *s = malloc(cap);
    CHECK(s);
    n += (size_t)snprintf(s, cap, "{\"actions\":[");
    for (unsigned i = 0; i < l->n; i++) {
        const struct op *o = &l->op[i];
        if (i)
            s[n++] = ',';
        if (o->kind == ABORT)
            snprintf(s + n, cap - n, "{\"type\":\"abort\",\"data\":{}}");
        else if (o->kind == BACKUP)
            say_backup(s + n, cap - n, o);
        else if (o->kind == MERGE)
            say_merge(s + n, cap - n, o);
        else
            say_bits(s + n, cap - n, o);
        n += strlen(s + n);
    }
    snprintf(s + n, cap - n, "]%s}",
             l->grouped ? ",\"properties\":{\"completion-mode\":\"grouped\"}" : "");
    return s;
}

void list_insert(struct list *l, unsigned at, struct op o)
{
    memmove(&l->op[at + 1], &l->op[at], (l->n - at) * sizeof o);
    l->op[at] = o;
    l->n++;
}

/* ------------------------------------------------------------------ the model */

static struct bits *in_copy(struct play *p, const struct bits *b)
{
    return &p->copy->b[b - p->book->b];
}

/* A bitmap that is there and in nobody's hands. */
static bool usable(struct play *p, const struct bits *b)
{
    if (!b->exists)
        return false;
    if (b->job > 0)
        p->because_of = b->job - 1;
    return b->job == 0;
}

static bool play_merge(struct play *p, const struct op *o, struct bits *b)
{
    const struct crowd *c = p->book->crowd;
    if (!usable(p, b))
        return false;
    for (unsigned i = 0; i < o->n_sources; i++) {
        struct bits *s = in_copy(p, o->source[i]);
        if (!usable(p, s) || c->disk[s->disk].size != c->disk[b->disk].size)
            return false;
    }
    for (unsigned i = 0; i < o->n_sources; i++)
        bits_merge(p->copy, b, in_copy(p, o->source[i]), p->q, p->r);
    return true;
}

static bool play_backup(struct play *p, const struct op *o, struct bits *b)
{
    if (b && !usable(p, b))
        return false;
    int owner = p->target_job[o->disk];
    if (owner) {
        p->because_of = owner > 0 ? owner - 1 : -1;
        return false;
    }
    p->target_job[o->disk] = -1;
    if (b)
        b->job = -1;
    return true;
}

static bool play_op(struct play *p, const struct op *o)
{
    struct book *k = p->copy;
    struct bits *b = o->b ? in_copy(p, o->b) : NULL;
    if (o->kind == ABORT)
        return false;
    if (o->kind == MERGE)
        return play_merge(p, o, b);
    if (o->kind == BACKUP)
        return play_backup(p, o, b);
    if (o->kind == ADD) {
        if (b->exists)
            return false;
        bits_add(k, b, o->shift, !o->disabled, p->q, p->r);
        return true;
    }
    if (!usable(p, b))
        return false;
    if (o->kind == REMOVE)
        bits_remove(b);
    else if (o->kind == CLEAR)
        bits_clear(b, p->q, p->r);
    else if (o->kind == ENABLE)
        bits_enable(b, p->q, p->r);
    else
        bits_disable(k, b, p->q, p->r);
    return true;
}

struct verdict list_play(const struct list *l, struct play *p)
{
    book_copy(p->copy, p->book);
    for (unsigned i = 0; i < l->n; i++) {
        p->because_of = -1;
        if (!play_op(p, &l->op[i]))
            return (struct verdict){(int)i, p->because_of};
    }
    return (struct verdict){-1, -1};
}
