/* SPDX-License-Identifier: Apache-2.0 */
/* Versions of units. A unit has mostly one version: then the unit itself holds it. */
#include "model.h"

#include <assert.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct write {
    uint64_t off, len, sent, ended; /* ended: MODEL_NEVER while it may still be carried out */
    enum model_kind kind;
    bool fua, ok;
};

struct version {
    uint32_t write;
    uint64_t hidden; /* reads sent later do not show it; MODEL_NEVER: they may */
    bool lost;       /* what hides it is durable */
};

struct unit {
    struct version *v;
    uint32_t n, cap, tidied; /* m->epoch of then */
    bool unsure; /* a sync failed: what a reader sees here says nothing about what is durable */
};

struct model {
    uint64_t n_units;
    struct unit *unit;
    struct write *write; /* by number; 0 is what was there at first */
    uint32_t n_writes, cap_writes;
    uint64_t flushed; /* when the newest flush that succeeded had been sent */
    uint32_t epoch;   /* grows when tidy() can do more than before */
    uint64_t horizon; /* no read that is under way was sent before */
    bool may_lose;
    char text[300];
};

/* ------------------------------------------------------------------ units and writes */

static void *or_die(void *p)
{
    if (!p)
        abort();
    return p;
}

static void add_version(struct unit *u, uint32_t w)
{
    if (u->n == u->cap) {
        u->cap = u->cap ? 2 * u->cap : 2;
        u->v = or_die(realloc(u->v, u->cap * sizeof *u->v));
    }
    u->v[u->n++] = (struct version){w, MODEL_NEVER, false};
}

/* What the flushes so far have decided; what nobody can see any more is forgotten. */
static void tidy(const struct model *m, struct unit *u)
{
    uint32_t n = 0, alive = 0;
    for (uint32_t i = 0; i < u->n; i++) {
        struct version *v = &u->v[i];
        v->lost |= v->hidden < m->flushed;
        alive += !v->lost;
        if (!v->lost || v->hidden >= m->horizon)
            u->v[n++] = *v;
    }
    assert(alive > 0);
    u->n = n;
    u->unsure &= alive > 1;
    u->tidied = m->epoch;
}

static struct unit *unit_at(struct model *m, uint64_t off)
{
    struct unit *u = &m->unit[off / MODEL_UNIT];
    if (u->n > 1 && u->tidied != m->epoch)
        tidy(m, u);
    return u;
}

static void check_range(const struct model *m, uint64_t off, uint64_t len)
{
    assert(off % MODEL_UNIT == 0 && len % MODEL_UNIT == 0);
    assert(off / MODEL_UNIT <= m->n_units && len / MODEL_UNIT <= m->n_units - off / MODEL_UNIT);
}

static uint32_t add_write(struct model *m, struct write w)
{
    if (m->n_writes == m->cap_writes) {
        m->cap_writes = 2 * m->cap_writes + 64;
        m->write = or_die(realloc(m->write, m->cap_writes * sizeof *m->write));
    }
    m->write[m->n_writes] = w;
    return m->n_writes++;
}

struct model *model_new(uint64_t size)
{
    struct model *m = or_die(calloc(1, sizeof *m));
    m->n_units = size / MODEL_UNIT;
    m->unit = or_die(calloc(m->n_units, sizeof *m->unit));
    check_range(m, 0, size);
    uint32_t w = add_write(m, (struct write){.len = size, .kind = MODEL_ZERO, .ok = true});
    for (uint64_t i = 0; i < m->n_units; i++)
        add_version(&m->unit[i], w);
    return m;
}

void model_free(struct model *m)
{
    if (!m)
        return;
    for (uint64_t i = 0; i < m->n_units; i++)
        free(m->unit[i].v);
    free(m->unit);
    free(m->write);
    free(m);
}

/* ------------------------------------------------------------------ contents */

static uint64_t stamp(uint32_t w, uint64_t off)
{
    return (uint64_t)w << 32 | off / MODEL_UNIT;
}

void model_data(const struct model *m, uint32_t w, uint8_t *buf)
{
    const struct write *x = &m->write[w];
    assert(x->kind == MODEL_WRITE);
    for (uint64_t i = 0; i < x->len; i += 8) {
        uint64_t word = stamp(w, x->off + i);
        memcpy(buf + i, &word, sizeof word);
    }
}

static bool covers(const struct write *x, uint64_t off)
{
    return x->off <= off && off < x->off + x->len;
}

/* Who wrote these bytes: 0 for zeroes. False: nobody, or two. */
static bool author(const struct model *m, uint64_t off, const uint8_t *data, uint32_t *w)
{
    uint64_t word;
    memcpy(&word, data, sizeof word);
    *w = (uint32_t)(word >> 32);
    if (memcmp(data, data + 8, MODEL_UNIT - 8))
        return false;
    if (word == 0)
        return true;
    return word == stamp(*w, off) && *w < m->n_writes && m->write[*w].kind == MODEL_WRITE &&
           covers(&m->write[*w], off);
}

/* Can what version `v` left read as what `w` wrote (0: zeroes)? */
static bool shows(const struct model *m, uint32_t v, uint32_t w)
{
    enum model_kind kind = m->write[v].kind;
    return kind == MODEL_TRIM || (kind == MODEL_ZERO ? w == 0 : v == w);
}

/* ------------------------------------------------------------------ writes */

uint32_t model_send(struct model *m, enum model_kind kind, bool fua, uint64_t off, uint64_t len,
                    uint64_t tick)
{
    check_range(m, off, len);
    uint32_t w = add_write(
        m,
        (struct write){
            .off = off, .len = len, .sent = tick, .ended = MODEL_NEVER, .kind = kind, .fua = fua});
    for (uint64_t o = off; o < off + len; o += MODEL_UNIT)
        add_version(unit_at(m, o), w);
    return w;
}

/* This version came before one that is there, and answered, since `tick`. */
static void supersede(struct version *v, uint64_t tick, bool durable)
{
    if (v->hidden == MODEL_NEVER)
        v->hidden = tick;
    v->lost |= durable;
}

void model_done(struct model *m, uint32_t w, uint64_t tick)
{
    struct write *x = &m->write[w];
    assert(x->ended == MODEL_NEVER);
    x->ended = tick;
    x->ok = true;
    for (uint64_t o = x->off; o < x->off + x->len; o += MODEL_UNIT) {
        struct unit *u = unit_at(m, o);
        for (uint32_t i = 0; i < u->n; i++)
            if (m->write[u->v[i].write].ended < x->sent)
                supersede(&u->v[i], tick, x->fua);
    }
}

void model_gone(struct model *m, uint32_t w, uint64_t tick)
{
    assert(m->write[w].ended == MODEL_NEVER);
    m->write[w].ended = tick;
}

void model_flush(struct model *m, uint64_t sent)
{
    if (sent <= m->flushed)
        return;
    m->flushed = sent;
    m->epoch++;
}

void model_horizon(struct model *m, uint64_t sent)
{
    m->horizon = sent;
    m->epoch++;
}

/* ------------------------------------------------------------------ failing syncs */

void model_may_lose(struct model *m)
{
    m->may_lose = true;
}

void model_sync_failed(struct model *m)
{
    for (uint64_t i = 0; i < m->n_units; i++) {
        struct unit *u = unit_at(m, i * MODEL_UNIT);
        uint32_t alive = 0;
        for (uint32_t k = 0; k < u->n; k++) {
            if (u->v[k].lost)
                continue;
            u->v[k].hidden = MODEL_NEVER;
            alive++;
        }
        u->unsure = alive > 1;
    }
}

void model_no_more_loss(struct model *m)
{
    m->may_lose = false;
}

/* ------------------------------------------------------------------ reads */

static bool visible(const struct model *m, const struct version *v, uint64_t sent, uint64_t told)
{
    return m->write[v->write].sent < told && (v->hidden >= sent || (m->may_lose && !v->lost));
}

static const char *say(struct model *m, const char *what, uint64_t off, const uint8_t *data)
{
    struct unit *u = unit_at(m, off);
    uint64_t word = 0;
    if (data)
        memcpy(&word, data, sizeof word);
    int n = snprintf(m->text, sizeof m->text, "%s at %" PRIu64 ": found %" PRIu64 "; versions are",
                     what, off, word >> 32);
    for (uint32_t i = 0; i < u->n && n < (int)sizeof m->text; i++) {
        const struct write *x = &m->write[u->v[i].write];
        n += snprintf(m->text + n, sizeof m->text - (size_t)n,
                      " %u%s (%" PRIu64 "..%" PRId64 "%s%s)", u->v[i].write,
                      x->kind == MODEL_ZERO   ? " zero"
                      : x->kind == MODEL_TRIM ? " trim"
                                              : "",
                      x->sent, (int64_t)x->ended, x->ok ? "" : " not done",
                      u->v[i].lost                    ? " lost"
                      : u->v[i].hidden == MODEL_NEVER ? ""
                                                      : " hidden");
    }
    return m->text;
}

/* Version number `i` was on top at some instant between `sent` and `told`, and is answered. What
 * had been answered before `sent` lies below it. (A write that failed promises nothing until it is
 * written over, not even to read the same twice.) */
static void narrow(struct model *m, struct unit *u, uint32_t i, uint64_t sent, uint64_t told)
{
    const struct write *top = &m->write[u->v[i].write];
    uint32_t seen = u->v[i].write;
    if (!top->ok || top->kind == MODEL_TRIM || u->unsure || m->may_lose)
        return;
    for (uint32_t k = 0; k < u->n; k++) {
        const struct write *x = &m->write[u->v[k].write];
        if (u->v[k].write != seen && x->ok && x->ended < sent)
            supersede(&u->v[k], told, top->fua);
    }
}

/* Has write `w` left this byte at `off + at`? */
static bool has_byte(const struct model *m, uint32_t w, uint64_t off, unsigned at, uint8_t byte)
{
    uint64_t word = m->write[w].kind == MODEL_WRITE ? stamp(w, off) : 0;
    uint8_t bytes[sizeof word];
    memcpy(bytes, &word, sizeof word);
    return covers(&m->write[w], off) && bytes[at % sizeof word] == byte;
}

/* Could this byte of a unit be of a version that the read may show? */
static bool byte_may_be(const struct model *m, const struct unit *u, uint64_t off, unsigned at,
                        uint8_t byte, uint64_t sent, uint64_t told)
{
    bool may = false, trimmed = false;
    for (uint32_t i = 0; i < u->n && !may; i++) {
        bool sees = visible(m, &u->v[i], sent, told);
        trimmed |= sees && m->write[u->v[i].write].kind == MODEL_TRIM;
        may = sees && has_byte(m, u->v[i].write, off, at, byte);
    }
    for (uint32_t w = 0; w < m->n_writes && trimmed && !may; w++)
        may = has_byte(m, w, off, at, byte);
    return may;
}

/* Nobody wrote this unit as it is: the read met a write in the middle, or several. */
static const char *read_torn(struct model *m, uint64_t off, const uint8_t *data, uint64_t sent,
                             uint64_t told)
{
    struct unit *u = unit_at(m, off);
    for (unsigned i = 0; i < MODEL_UNIT; i++)
        if (!byte_may_be(m, u, off, i, data[i], sent, told))
            return say(m, "bytes that nobody wrote", off, data);
    return NULL;
}

static const char *read_unit(struct model *m, uint64_t off, const uint8_t *data, uint64_t sent,
                             uint64_t told)
{
    struct unit *u = unit_at(m, off);
    uint32_t w, n = 0, which = 0;
    if (!author(m, off, data, &w))
        return read_torn(m, off, data, sent, told);
    for (uint32_t i = 0; i < u->n; i++)
        if (visible(m, &u->v[i], sent, told) && shows(m, u->v[i].write, w)) {
            n++;
            which = i;
        }
    if (n == 0)
        return say(m, "a read shows what it cannot", off, data);
    if (n == 1)
        narrow(m, u, which, sent, told);
    return NULL;
}

const char *model_read(struct model *m, uint64_t off, uint64_t len, const uint8_t *data,
                       uint64_t sent, uint64_t told)
{
    const char *e = NULL;
    check_range(m, off, len);
    for (uint64_t o = 0; o < len && !e; o += MODEL_UNIT)
        e = read_unit(m, off + o, data + o, sent, told);
    return e;
}

const char *model_zero(struct model *m, uint64_t off, uint64_t len, uint64_t sent, uint64_t told)
{
    check_range(m, off, len);
    for (uint64_t o = off; o < off + len; o += MODEL_UNIT) {
        struct unit *u = unit_at(m, o);
        bool may = false;
        for (uint32_t i = 0; i < u->n && !may; i++)
            may = visible(m, &u->v[i], sent, told) && shows(m, u->v[i].write, 0);
        if (!may)
            return say(m, "data is called zeroes", o, NULL);
    }
    return NULL;
}

/* ------------------------------------------------------------------ bitmaps */

static bool meets(const struct write *x, uint64_t off, uint64_t len)
{
    return x->off < off + len && off < x->off + x->len;
}

const char *model_clean(struct model *m, uint64_t off, uint64_t len, uint64_t since, uint64_t sent)
{
    for (uint32_t w = 1; w < m->n_writes; w++) {
        const struct write *x = &m->write[w];
        if (x->ok && x->sent > since && x->ended < sent && meets(x, off, len)) {
            snprintf(m->text, sizeof m->text,
                     "a bitmap calls %" PRIu64 "..%" PRIu64 " clean, where write %u was (%" PRIu64
                     "..%" PRIu64 ", from %" PRIu64 ", %" PRIu64 " bytes)",
                     off, off + len, w, x->sent, x->ended, x->off, x->len);
            return m->text;
        }
    }
    return NULL;
}

const char *model_dirty(struct model *m, uint64_t off, uint64_t len, uint64_t since)
{
    for (uint32_t w = 1; w < m->n_writes; w++)
        if (m->write[w].ended > since && meets(&m->write[w], off, len))
            return NULL;
    snprintf(m->text, sizeof m->text,
             "a bitmap calls %" PRIu64 "..%" PRIu64 " dirty, where nobody wrote since %" PRIu64,
             off, off + len, since);
    return m->text;
}

/* ------------------------------------------------------------------ power cuts */

static bool survives(const struct model *m, const struct version *v, bool killed)
{
    return !v->lost && (!killed || v->hidden == MODEL_NEVER || m->may_lose);
}

const char *model_survivor(struct model *m, uint64_t off, uint64_t len, const uint8_t *data,
                           bool killed)
{
    check_range(m, off, len);
    for (uint64_t o = 0; o < len; o += MODEL_UNIT) {
        struct unit *u = unit_at(m, off + o);
        uint32_t w;
        bool may = false;
        if (!author(m, off + o, data + o, &w))
            return say(m, "bytes that nobody wrote survived", off + o, data + o);
        for (uint32_t i = 0; i < u->n && !may; i++)
            may = survives(m, &u->v[i], killed) && shows(m, u->v[i].write, w);
        if (!may)
            return say(m, "what was durable is lost", off + o, data + o);
    }
    return NULL;
}

/* After a cut what is there is durable. After a kill it is what readers see, no more: those
 * versions that it replaced may come back when the power goes. */
static void restart_unit(struct model *m, uint64_t off, uint32_t w, uint64_t tick, bool killed)
{
    struct unit *u = unit_at(m, off);
    uint32_t n = 0;
    for (uint32_t i = 0; i < u->n; i++) {
        if (!killed || u->v[i].lost || u->v[i].write == w)
            continue;
        if (u->v[i].hidden == MODEL_NEVER && !u->unsure)
            u->v[i].hidden = tick;
        u->v[n++] = u->v[i];
    }
    u->n = n;
    add_version(u, w);
    u->unsure &= n > 0;
}

void model_restart(struct model *m, const uint8_t *data, uint64_t tick, bool killed)
{
    for (uint32_t w = 1; w < m->n_writes; w++)
        if (m->write[w].ended == MODEL_NEVER)
            m->write[w].ended = tick;
    for (uint64_t i = 0; i < m->n_units; i++) {
        uint32_t w;
        bool known = author(m, i * MODEL_UNIT, data + i * MODEL_UNIT, &w);
        assert(known);
        restart_unit(m, i * MODEL_UNIT, w, tick, killed);
    }
    m->may_lose = false;
}
