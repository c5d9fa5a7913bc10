/* SPDX-License-Identifier: Apache-2.0 */
#include "qmp/object.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "base/mem.h"
#include "block/node.h"
#include "block/throttle_group.h"
#include "export/export.h"
#include "qmp/instance.h"
#include "schema/schema.h"
#include "schema/types.h"

/* ------------------------------------------------------------------ iothread */

/* These steer nothing here, where loops wait in one way only; they are checked, kept and shown. */
enum { POOL_MIN, POOL_MAX, POLL_MAX_NS, POLL_GROW, POLL_SHRINK, MAX_BATCH, N_KEPT };
static const char *const kept_names[N_KEPT] = {"thread-pool-min", "thread-pool-max",
                                               "poll-max-ns",     "poll-grow",
                                               "poll-shrink",     "aio-max-batch"};
static const int64_t kept_defaults[N_KEPT] = {
    [POOL_MAX] = 64,
    [POLL_MAX_NS] = 32768,
};

static int check_kept(const int64_t *v, struct tide_error *err)
{
    for (unsigned i = 0; i < N_KEPT; i++) {
        if (v[i] < 0)
            return tide_fail(err, -EINVAL, "'%s' is %lld: it cannot be negative", kept_names[i],
                             (long long)v[i]);
    }
    if (v[POOL_MAX] < 1 || v[POOL_MAX] > INT32_MAX || v[POOL_MIN] > v[POOL_MAX])
        return tide_fail(err, -EINVAL,
                         "'thread-pool-max' is %lld and 'thread-pool-min' %lld: the first has to "
                         "be from 1 to %d and not below the second",
                         (long long)v[POOL_MAX], (long long)v[POOL_MIN], INT32_MAX);
    return 0;
}

static int thread_add(struct object *o, const struct q_object_options *opts, struct tide_error *err)
{
    const struct q_object_options_iothread *t = &opts->u.iothread;
    int64_t v[N_KEPT];
    memcpy(v, kept_defaults, sizeof v);
#define TAKE(member, index)                                                                        \
    if (t->has_##member)                                                                           \
        v[index] = t->member;
    TAKE(thread_pool_min, POOL_MIN)
    TAKE(thread_pool_max, POOL_MAX)
    TAKE(poll_max_ns, POLL_MAX_NS)
    TAKE(poll_grow, POLL_GROW)
    TAKE(poll_shrink, POLL_SHRINK)
    TAKE(aio_max_batch, MAX_BATCH)
#undef TAKE
    int r = check_kept(v, err);
    if (r < 0)
        return r;
    o->kept = mem_alloc(sizeof v);
    if (!o->kept)
        return tide_fail(err, -ENOMEM, "no memory");
    memcpy(o->kept, v, sizeof v);
    return iothread_add(o->inst->exports, o->id, err);
}

static int thread_del(struct object *o, struct tide_error *err)
{
    return iothread_del(o->inst->exports, o->id, err);
}

static void thread_property(unsigned i, struct object_property *p)
{
    snprintf(p->name, sizeof p->name, "%s", kept_names[i]);
    p->type = "int";
}

static json_t *thread_get(struct object *o, unsigned i)
{
    return json_integer(o->kept[i]);
}

static int thread_set(struct object *o, unsigned i, json_t *value, struct tide_error *err)
{
    int64_t v[N_KEPT];
    if (!json_is_integer(value))
        return tide_fail(err, -EINVAL, "'%s' has to be a whole number", kept_names[i]);
    memcpy(v, o->kept, sizeof v);
    v[i] = json_integer_value(value);
    int r = check_kept(v, err);
    if (r == 0)
        o->kept[i] = v[i];
    return r;
}

static const struct object_kind iothread_kind = {
    .name = "iothread",
    .add = thread_add,
    .del = thread_del,
    .n_properties = N_KEPT,
    .property = thread_property,
    .get = thread_get,
    .set = thread_set,
};

/* ------------------------------------------------------------------ throttle-group */

/* The members of ThrottleLimits and, with x_ before them, those of an older form. */
#define TAKE_ONE(o, member, to)                                                                    \
    if ((o)->has_##member)                                                                         \
        (to) = (o)->member;
#define TAKE_BUCKET(o, member, bucket)                                                             \
    TAKE_ONE(o, member, l->limit[bucket].avg)                                                      \
    TAKE_ONE(o, member##_max, l->limit[bucket].max)                                                \
    TAKE_ONE(o, member##_max_length, l->limit[bucket].length)
#define TAKE_ALL(o, x)                                                                             \
    TAKE_BUCKET(o, x##bps_total, THROTTLE_BPS_TOTAL)                                               \
    TAKE_BUCKET(o, x##bps_read, THROTTLE_BPS_READ)                                                 \
    TAKE_BUCKET(o, x##bps_write, THROTTLE_BPS_WRITE)                                               \
    TAKE_BUCKET(o, x##iops_total, THROTTLE_IOPS_TOTAL)                                             \
    TAKE_BUCKET(o, x##iops_read, THROTTLE_IOPS_READ)                                               \
    TAKE_BUCKET(o, x##iops_write, THROTTLE_IOPS_WRITE)                                             \
    TAKE_ONE(o, x##iops_size, l->iops_size)

static void take_limits(struct throttle_limits *l, const struct q_throttle_limits *from)
{
    TAKE_ALL(from, )
}

static void take_old_form(struct throttle_limits *l, const struct q_throttle_group_properties *from)
{
    TAKE_ALL(from, x_)
}

static int group_add(struct object *o, const struct q_object_options *opts, struct tide_error *err)
{
    struct throttle_limits l = THROTTLE_NO_LIMITS;
    take_old_form(&l, &opts->u.throttle_group);
    if (opts->u.throttle_group.limits)
        take_limits(&l, opts->u.throttle_group.limits);
    return throttle_group_new(o->inst->graph, o->id, &l, err);
}

static int group_del(struct object *o, struct tide_error *err)
{
    return throttle_group_del(o->inst->graph, o->id, err);
}

/* The old form's members, and behind them `limits`. */
#define LIMITS THROTTLE_FIELDS

static void group_property(unsigned i, struct object_property *p)
{
    if (i == LIMITS)
        snprintf(p->name, sizeof p->name, "limits");
    else
        snprintf(p->name, sizeof p->name, "x-%s", throttle_field_name(i));
    p->type = i == LIMITS ? "ThrottleLimits" : "int";
}

static json_t *group_get(struct object *o, unsigned i)
{
    struct throttle_limits l;
    throttle_group_limits(throttle_group_find(o->inst->graph, o->id), &l);
    if (i != LIMITS)
        return json_integer(*throttle_field(&l, i));
    json_t *all = json_object();
    for (unsigned k = 0; all && k < THROTTLE_FIELDS; k++) {
        if (json_object_set_new(all, throttle_field_name(k), json_integer(*throttle_field(&l, k))) <
            0) {
            json_decref(all);
            return NULL;
        }
    }
    return all;
}

static int group_set(struct object *o, unsigned i, json_t *value, struct tide_error *err)
{
    struct throttle_group *t = throttle_group_find(o->inst->graph, o->id);
    struct arena arena = {0};
    struct throttle_limits l;
    void *given;
    if (i != LIMITS)
        return tide_fail(err, -EPERM, "'x-%s' is for object-add only: set '%s' in 'limits'",
                         throttle_field_name(i), throttle_field_name(i));
    if (!json_is_object(value))
        return tide_fail(err, -EINVAL, "'limits' has to be an object");
    throttle_group_limits(t, &l);
    int r = schema_parse(&q_throttle_limits_type, value, &arena, 0, &given, err);
    if (r == 0) {
        take_limits(&l, given);
        r = throttle_group_set(t, &l, err);
    }
    arena_free(&arena);
    return r;
}

static const struct object_kind throttle_group_kind = {
    .name = "throttle-group",
    .add = group_add,
    .del = group_del,
    .n_properties = LIMITS + 1,
    .property = group_property,
    .get = group_get,
    .set = group_set,
};

/* ------------------------------------------------------------------ all of them */

const struct object_kind *const object_kinds[] = {&iothread_kind, &throttle_group_kind, NULL};

static const struct object_kind *kind_find(const char *name)
{
    unsigned i = 0;
    while (object_kinds[i] && strcmp(object_kinds[i]->name, name))
        i++;
    return object_kinds[i];
}

struct object *object_find(struct instance *inst, const char *id)
{
    struct object *o;
    TAILQ_FOREACH (o, &inst->objects, link) {
        if (!strcmp(o->id, id))
            return o;
    }
    return NULL;
}

int object_property_find(const struct object_kind *kind, const char *name)
{
    struct object_property p;
    for (unsigned i = 0; i < kind->n_properties; i++) {
        kind->property(i, &p);
        if (!strcmp(p.name, name))
            return (int)i;
    }
    return -ENOENT;
}

static bool id_is_valid(const char *id)
{
    static const char rest[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._";
    return strspn(id, rest) == strlen(id) && id[0] && !strchr("0123456789-._", id[0]);
}

static void object_free(struct object *o)
{
    if (!o)
        return;
    mem_free(o->kept);
    mem_free(o->id);
    mem_free(o);
}

int object_add(struct instance *inst, const struct q_object_options *opts, struct tide_error *err)
{
    struct shown_name id = shown_name(opts->id);
    if (!id_is_valid(opts->id))
        return tide_fail(
            err, -EINVAL,
            "'%s' is not a valid object id: a letter, then letters, digits, '-', '.', '_'",
            id.text);
    if (object_find(inst, opts->id))
        return tide_fail(err, -EEXIST, "object '%s' exists already", id.text);
    struct object *o = mem_zalloc(sizeof *o);
    if (o)
        *o = (struct object){.inst = inst, .id = mem_strdup(opts->id)};
    int r = o && o->id ? 0 : tide_fail(err, -ENOMEM, "no memory");
    if (r == 0) {
        o->kind = kind_find(q_object_type_names[opts->qom_type]);
        r = o->kind->add(o, opts, err);
    }
    if (r < 0) {
        tide_error_prefix(err, "object '%s': ", id.text);
        object_free(o);
        return r;
    }
    TAILQ_INSERT_TAIL(&inst->objects, o, link);
    return 0;
}

int object_del(struct instance *inst, const char *id, struct tide_error *err)
{
    struct object *o = object_find(inst, id);
    if (!o)
        return tide_fail(err, -ENOENT, "object '%s' not found", shown_name(id).text);
    int r = o->kind->del(o, err);
    if (r < 0)
        return r;
    TAILQ_REMOVE(&inst->objects, o, link);
    object_free(o);
    return 0;
}

void objects_free(struct instance *inst)
{
    struct object *o;
    while ((o = TAILQ_FIRST(&inst->objects))) {
        TAILQ_REMOVE(&inst->objects, o, link);
        object_free(o);
    }
}
