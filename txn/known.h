/* SPDX-License-Identifier: Apache-2.0 */
/* What a list itself says of nodes and exports, up to the action that is being looked at: those
 * that it makes, changes and deletes, and what was found out about others. Part of a footprint. */
#pragma once
#include <stdbool.h>
#include <stddef.h>

#include "base/mem.h"

struct known_name {
    const char *name;
    struct known_name *next;
};

struct known_table {
    struct known_name **bucket;
    size_t n, mask;
};

#define PLACE_MAX_DEPTH 64u /* as deep as nodes stand (NODE_MAX_DEPTH) */

/* A node, and what it stands on. No driver stands on more than one. */
struct place {
    struct known_name link; /* its name, NULL: none that a list could know */
    struct place *below;    /* NULL: it is at the bottom, or nobody knows */
    unsigned depth;         /* how many are known to be below */
    bool made;              /* the list has made it, or taken it away: nobody need be asked */
    bool watched;           /* the list has added bitmaps to it, or a job that reads it */
    const char *file;       /* at the bottom: which file it is, see footprint_lookup; or NULL */
    bool any_file;          /* it is one, but nobody knows which */
    unsigned number;        /* counted from 0 */
};

struct known_export {
    struct known_name link; /* its id */
    const char *node;       /* that it shows now; NULL: there is no such export, or nobody knows */
    bool made;              /* the list has made it, or taken it away */
    bool writable;
    size_t use,
        n_uses; /* if it has made it: what making it used (struct name_use), one after another
                 */
};

/* Zeroed = nothing is known. All functions but the last give NULL when memory is gone. */
struct known {
    struct arena arena;
    struct known_table nodes, exports;
    unsigned n_places;
};

/* NULL, too: it is not known. */
struct place *known_node(const struct known *k, const char *name);
struct known_export *known_export(const struct known *k, const char *id);
/* The name means this new one from now on. Names are borrowed; NULL: it has none. */
struct place *known_node_new(struct known *k, const char *name);
struct known_export *known_export_new(struct known *k, const char *id);
/* A new one stands on `below`, which may be NULL. Not where no node can stand, being too deep:
 * there the list ends, and however many of those it names, nobody has to walk further than that. */
void place_on(struct place *p, struct place *below);
/* Is `to` what `from` stands on, or the same? */
bool place_reaches(const struct place *from, const struct place *to);
struct place *place_bottom(struct place *p);
void known_free(struct known *k);
