/* SPDX-License-Identifier: Apache-2.0 */
/* Commands about objects. To a client they are a small tree: "/" with "objects" in it, and in that
 * an object for each id. A path may begin anywhere: "/objects/ID", "objects/ID" and "ID" are the
 * same. */
#include <errno.h>
#include <string.h>

#include "block/node.h"
#include "qmp/commands.h"
#include "qmp/dispatch.h"
#include "qmp/instance.h"
#include "qmp/object.h"
#include "schema/handlers.h"

#define CONTAINER "container"

static int no_memory(struct tide_error *err)
{
    return tide_fail(err, -ENOMEM, "no memory for the answer");
}

int qmp_object_add(struct qmp_call *call, const struct q_object_add *args, json_t **ret,
                   struct tide_error *err)
{
    return object_add(call->inst, args, err);
}

int qmp_object_del(struct qmp_call *call, const struct q_object_del *args, json_t **ret,
                   struct tide_error *err)
{
    return object_del(call->inst, args->id, err);
}

int add_object(struct instance *inst, const struct q_object_options *o, struct tide_error *err)
{
    return object_add(inst, o, err);
}

/* ------------------------------------------------------------------ paths */

struct place {
    bool root;
    struct object *object; /* NULL: "/" or "/objects" */
};

/* The next word of a path, or NULL at its end. */
static const char *next_word(const char **path, size_t *len)
{
    const char *word = *path + strspn(*path, "/");
    *len = strcspn(word, "/");
    *path = word + *len;
    return *len ? word : NULL;
}

static bool is_word(const char *word, size_t len, const char *text)
{
    return strlen(text) == len && !memcmp(word, text, len);
}

static struct object *find_word(struct instance *inst, const char *word, size_t len)
{
    struct object *o;
    TAILQ_FOREACH (o, &inst->objects, link) {
        if (is_word(word, len, o->id))
            return o;
    }
    return NULL;
}

static int find_place(struct instance *inst, const char *path, struct place *p,
                      struct tide_error *err)
{
    const char *rest = path;
    size_t len;
    bool absolute = path[0] == '/', found;
    const char *word = next_word(&rest, &len);
    *p = (struct place){.root = !word};
    if (!path[0])
        return tide_fail(err, -EINVAL, "'path' is empty: a path is /objects/ID");
    if (!word)
        found = absolute;
    else if (is_word(word, len, "objects")) {
        word = next_word(&rest, &len);
        p->object = word ? find_word(inst, word, len) : NULL;
        found = !word || p->object;
    } else {
        p->object = absolute ? NULL : find_word(inst, word, len);
        found = p->object;
    }
    if (found && !next_word(&rest, &len))
        return 0;
    return tide_fail_class(err, TIDE_DEVICE_NOT_FOUND, -ENOENT,
                           "object '%s' not found: a path is /objects/ID", shown_name(path).text);
}

static const char *kind_name(const struct place *p)
{
    return p->object ? p->object->kind->name : CONTAINER;
}

static int no_property(const struct place *p, const char *name, struct tide_error *err)
{
    return tide_fail(err, -ENOENT, "object '%s' of kind '%s' has no property '%s'",
                     p->object ? shown_name(p->object->id).text
                     : p->root ? "/"
                               : "/objects",
                     kind_name(p), shown_name(name).text);
}

/* ------------------------------------------------------------------ lists */

static int add_row(json_t *list, const char *name, const char *type)
{
    return json_array_append_new(list, json_pack("{s:s,s:s}", "name", name, "type", type));
}

static int add_child(json_t *list, const char *name, const char *kind)
{
    return json_array_append_new(
        list, json_pack("{s:s,s:o}", "name", name, "type", json_sprintf("child<%s>", kind)));
}

/* NULL: no memory. `kind` NULL: a container. */
static json_t *list_properties(const struct object_kind *kind)
{
    struct object_property p;
    json_t *list = json_array();
    int r = list ? add_row(list, "type", "string") : -1;
    for (unsigned i = 0; kind && i < kind->n_properties && r == 0; i++) {
        kind->property(i, &p);
        r = add_row(list, p.name, p.type);
    }
    if (r == 0)
        return list;
    json_decref(list);
    return NULL;
}

int qmp_qom_list(struct qmp_call *call, const struct q_qom_list *args, json_t **ret,
                 struct tide_error *err)
{
    struct object *o;
    struct place p;
    int r = find_place(call->inst, args->path, &p, err);
    if (r < 0)
        return r;
    *ret = list_properties(p.object ? p.object->kind : NULL);
    r = *ret ? 0 : -1;
    if (r == 0 && p.root)
        r = add_child(*ret, "objects", CONTAINER);
    if (!p.root && !p.object) {
        TAILQ_FOREACH (o, &call->inst->objects, link)
            r = r < 0 ? r : add_child(*ret, o->id, o->kind->name);
    }
    return r == 0 ? 0 : no_memory(err);
}

int qmp_qom_list_properties(struct qmp_call *call, const struct q_qom_list_properties *args,
                            json_t **ret, struct tide_error *err)
{
    unsigned i = 0;
    while (object_kinds[i] && strcmp(object_kinds[i]->name, args->typename))
        i++;
    if (!object_kinds[i] && strcmp(args->typename, CONTAINER) && strcmp(args->typename, "object"))
        return tide_fail_class(err, TIDE_DEVICE_NOT_FOUND, -ENOENT,
                               "there is no kind of object '%s'", shown_name(args->typename).text);
    *ret = list_properties(object_kinds[i]);
    return *ret ? 0 : no_memory(err);
}

/* Every kind is one of "object", and that is all there is of a hierarchy. */
int qmp_qom_list_types(struct qmp_call *call, const struct q_qom_list_types *args, json_t **ret,
                       struct tide_error *err)
{
    const char *of = args->implements ? args->implements : "object";
    bool all = !strcmp(of, "object"), users = all || !strcmp(of, "user-creatable");
    *ret = json_array();
    int r = *ret ? 0 : -1;
    for (unsigned i = 0; object_kinds[i] && r == 0; i++) {
        if (users || !strcmp(of, object_kinds[i]->name))
            r = json_array_append_new(
                *ret, json_pack("{s:s,s:s}", "name", object_kinds[i]->name, "parent", "object"));
    }
    if (r == 0 && (all || !strcmp(of, CONTAINER)))
        r = json_array_append_new(*ret,
                                  json_pack("{s:s,s:s}", "name", CONTAINER, "parent", "object"));
    return r == 0 ? 0 : no_memory(err);
}

/* ------------------------------------------------------------------ values */

int qmp_qom_get(struct qmp_call *call, const struct q_qom_get *args, json_t **ret,
                struct tide_error *err)
{
    struct object *o;
    struct place p;
    int r = find_place(call->inst, args->path, &p, err), i;
    if (r < 0)
        return r;
    if (!strcmp(args->property, "type"))
        *ret = json_string(kind_name(&p));
    else if (p.object && (i = object_property_find(p.object->kind, args->property)) >= 0)
        *ret = p.object->kind->get(p.object, (unsigned)i);
    else if (p.root && !strcmp(args->property, "objects"))
        *ret = json_string("/objects");
    else if (!p.root && !p.object && (o = object_find(call->inst, args->property)))
        *ret = json_sprintf("/objects/%s", o->id);
    else
        return no_property(&p, args->property, err);
    return *ret ? 0 : no_memory(err);
}

int qmp_qom_set(struct qmp_call *call, const struct q_qom_set *args, json_t **ret,
                struct tide_error *err)
{
    struct place p;
    int r = find_place(call->inst, args->path, &p, err), i;
    if (r < 0)
        return r;
    if (!strcmp(args->property, "type"))
        return tide_fail(err, -EPERM, "property 'type' of '%s' cannot be changed",
                         shown_name(args->path).text);
    if (!p.object || (i = object_property_find(p.object->kind, args->property)) < 0)
        return no_property(&p, args->property, err);
    r = p.object->kind->set(p.object, (unsigned)i, args->value, err);
    if (r < 0)
        tide_error_prefix(err, "object '%s': ", shown_name(p.object->id).text);
    return r;
}
