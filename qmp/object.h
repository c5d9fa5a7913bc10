/* SPDX-License-Identifier: Apache-2.0 */
/* Objects that others refer to by id: one name space for all kinds, and their properties as qom-*
 * commands show them. A new kind is a `struct object_kind` and a line in the table in object.c (and
 * its members in schema/object.toml). Control loop only. */
#pragma once
#include <jansson.h>
#include <stdbool.h>
#include <sys/queue.h>

#include "base/error.h"

struct instance;
struct q_object_options;
struct object;
TAILQ_HEAD(object_list, object); /* oldest first */

struct object_property {
    char name[40];
    const char *type; /* as in ObjectPropertyInfo */
};

struct object_kind {
    const char *name;
    /* What the id stands for; `o` has its id. Not added: an error. */
    int (*add)(struct object *o, const struct q_object_options *opts, struct tide_error *err);
    int (*del)(struct object *o, struct tide_error *err); /* -EBUSY: somebody uses it */
    unsigned n_properties;
    void (*property)(unsigned i, struct object_property *p);
    json_t *(*get)(struct object *o, unsigned i); /* a new reference; NULL: no memory */
    /* `value` is any JSON. The text need not name the object. */
    int (*set)(struct object *o, unsigned i, json_t *value, struct tide_error *err);
};
/* In order of name, ended by NULL. */
extern const struct object_kind *const object_kinds[];

struct object {
    struct instance *inst;
    const struct object_kind *kind;
    char *id;
    int64_t *kept; /* values that a kind only keeps and shows; owned, or NULL */
    TAILQ_ENTRY(object) link;
};

int object_add(struct instance *inst, const struct q_object_options *opts, struct tide_error *err);
int object_del(struct instance *inst, const char *id, struct tide_error *err);
/* NULL: none of that id. */
struct object *object_find(struct instance *inst, const char *id);
/* Index of a property; -ENOENT: the kind has none of that name. */
int object_property_find(const struct object_kind *kind, const char *name);
/* At the end: forgets them all, used or not. */
void objects_free(struct instance *inst);
