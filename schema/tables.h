/* SPDX-License-Identifier: Apache-2.0 */
/* The rows that gen/gen.py writes and schema/parse.c walks. Nobody else needs this header. */
#pragma once
#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "schema/schema.h"

enum schema_kind {
    SCHEMA_STR,
    SCHEMA_BOOL,
    SCHEMA_INT,  /* signed, min..max */
    SCHEMA_UINT, /* unsigned, 0..umax */
    SCHEMA_NUMBER,
    SCHEMA_ANY,
    SCHEMA_ENUM,
    SCHEMA_STRUCT,
    SCHEMA_UNION,
    SCHEMA_ALTERNATE,
};

enum schema_member_flag {
    SCHEMA_OPTIONAL = 1,
    SCHEMA_LIST = 2,
    SCHEMA_DEFAULT = 4, /* `def` or `def_str` is filled in when the member is absent */
};

#define SCHEMA_NO_AUX UINT32_MAX

struct schema_member {
    const char *name;
    const struct schema_type *type;
    uint32_t off; /* of the value, the pointer, or the list */
    uint32_t aux; /* of has_X or n_X, or SCHEMA_NO_AUX */
    unsigned flags;
    int64_t def;
    const char *def_str;
};

struct schema_type {
    const char *name; /* as declared; shown in messages for want of a better word */
    enum schema_kind kind;
    uint32_t size; /* of the C value; a list is an array of them */

    /* structs and unions */
    const struct schema_member *members;
    unsigned n_members;

    /* integers */
    int64_t min, max;
    uint64_t umax;

    /* enums */
    const char *const *names;
    unsigned n_names;

    /* unions: the tag is members[tag]; branches[] is indexed by its value, NULL: nothing besides */
    unsigned tag;
    bool wrapped; /* the branch is in member "data" and branch_off is that of a pointer to it */
    const struct schema_type *const *branches;
    uint32_t branch_off;

    /* alternates: what they may be */
    bool has_string, has_null;
    const struct schema_type *object; /* or NULL */
    uint32_t string_off, object_off;
};

extern const struct schema_type schema_str_type, schema_bool_type, schema_int_type,
    schema_int32_type, schema_uint16_type, schema_uint32_type, schema_uint64_type, schema_size_type,
    schema_number_type, schema_any_type;

/* "64K", "1.5G", "4096", "0x1000": parse.c. */
bool schema_read_size(const char *s, uint64_t *out);
