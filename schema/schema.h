/* SPDX-License-Identifier: Apache-2.0 */
/* The QMP schema at run time: from JSON to typed structs, strictly, and back to introspection.
 *
 * Types, commands, actions and events are declared in schema/ *.toml; gen/gen.py makes of them
 *   schema/types.h      structs and enums (names: see below)
 *   schema/tables.c     descriptors that the one parser here walks
 *   qmp/commands.c      the table of commands and their handlers
 *   txn/actions.c       the table of transaction actions
 *   introspection, the manual and completion words.
 *
 * How a declaration looks in C (Type BlockdevRef -> q_blockdev_ref; member node-name -> node_name):
 *   struct   struct q_NAME; a member of struct, union or alternate type is a pointer;
 *   command  its arguments are struct q_COMMAND (with a dummy member if there are none);
 *   enum     enum q_NAME { Q_NAME_VALUE, ... } in declared order; q_NAME_names[] are the words;
 *   str      const char *; int -> int64_t, size/uint64 -> uint64_t, uint32 -> uint32_t, bool,
 * number
 *            -> double; any -> json_t * (borrowed from the request);
 *   optional strings, lists (n_X == 0 and X == NULL) and pointers are NULL when absent; a scalar X
 * has a bool has_X; a declared default is filled in, with has_X false; list     size_t n_X; T *X
 * (values of scalars, strings; structs by value); union    struct with the base members, the tag,
 * and `union { struct q_UNION_BRANCH BRANCH; } u` (only the branch's own members); a *wrapped*
 * union has const void *data instead, the branch's struct, parsed from member "data"; alternate
 * struct with `enum q_kind kind` (Q_KIND_STRING, Q_KIND_OBJECT, Q_KIND_NULL, ...) and `const char
 * *string`, `const struct q_X *object`.
 *
 * Everything parsed lives in the arena given; strings borrow from nothing. No globals change. */
#pragma once
#include <jansson.h>
#include <stdbool.h>

#include "base/error.h"
#include "base/mem.h"

struct schema_type; /* one row of the generated tables */

/* Values may be strings where the type wants a number or a bool ("on"/"off"/"true"/...; sizes with
 * K, M, G, T): what came from a command line. */
#define SCHEMA_KEYVAL 1u

/* Parse and check all of `value`; *out is the struct in the arena. Unknown, missing, ill-typed and
 * out-of-range members are refused with their path: "actions[0].data.node". -EINVAL, -ENOMEM. */
int schema_parse(const struct schema_type *type, json_t *value, struct arena *a, unsigned flags,
                 void **out, struct tide_error *err);

/* The same for values that may be long: step(arg) is called after each element of each list. What
 * it does is its own business: nothing of this thread's is in use meanwhile but the arguments. */
struct schema_steps {
    void (*step)(void *arg);
    void *arg;
};
int schema_parse_in_steps(const struct schema_type *type, json_t *value, struct arena *a,
                          const struct schema_steps *steps, void **out, struct tide_error *err);

/* The way back: the JSON of a struct, a new reference. Absent is what schema_parse() leaves NULL;
 * an optional scalar is there if its has_X is true or it is not 0, so that a designated initializer
 * does without has_X; an alternate of kind Q_KIND_NULL with a string or an object is that. -EINVAL:
 * a member is missing, no UTF-8, or no word of its enum. -ENOMEM. */
int schema_unparse(const struct schema_type *type, const void *in, json_t **out,
                   struct tide_error *err);

/* What a person typed, in the types that `type` wants: a new value in which strings that spell a
 * number, a size such as 64K, or a bool, where one is wanted, are one. All else is as it was, for
 * schema_parse() to judge. NULL: no memory. */
json_t *schema_typed(const struct schema_type *type, json_t *typed);

/* What a union has besides, or in "data", if its tag is `word`; NULL: that is no value of the tag.
 */
const struct schema_type *schema_branch(const struct schema_type *type, const char *word);

/* Is member `name` of `object` true or false? The object's tags say what members it has. */
bool schema_is_bool(const struct schema_type *type, json_t *object, const char *name);

/* What query-qmp-schema returns (a new reference), in the shape QEMU documents: opaque type names,
 * features, default: null for optional members. NULL: no memory. */
json_t *schema_introspect(void);

/* "driver=file,node-name=a,cache.direct=on" or a JSON object in text -> JSON object (new
 * reference). `implied` is the key of a first word without '=' ("type" in "nbd,id=e"), or NULL.
 * ",," is a comma. Lists are spelled "a.0=x,a.1=y". */
int keyval_parse(const char *text, const char *implied, json_t **out, struct tide_error *err);
