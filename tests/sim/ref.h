/* SPDX-License-Identifier: Apache-2.0 */
/* The reference model of lists: what the actions of docs/transactions.md do, once more, on plain
 * sets of granules, and a maker of random actions. Nothing here knows the daemon's code.
 *
 * An action is its JSON. A kind is one entry of ref_kinds[]: `make` invents arguments that fit the
 * state (or, if asked to, careless ones), `play` carries it out on the model. Undoing is having
 * kept a copy. Guests write between lists only, so every set is exact. */
#pragma once
#include "world.h"

#define REF_NODES 12u
#define REF_ADDED 6u /* the first that lists may add and delete */
#define REF_EXPORTS 7u
#define REF_FILES 4u    /* that drive-backup may make */
#define REF_BITMAPS 12u /* of a node */
#define REF_JOBS 12u
#define REF_BIG (1048576u + 512u) /* bytes of the big disks; not a multiple of most granules */
#define REF_SMALL 262144u
#define REF_SET_BYTES 264u
#define REF_HELD (-1)

/* A bitmap. `job`: index + 1 of the one that owns it, REF_HELD: an export does, 0: nobody. */
struct ref_bitmap {
    char name[16];
    unsigned shift;
    bool enabled;
    int job;
    uint8_t bits[REF_SET_BYTES], late[REF_SET_BYTES]; /* late: written while a job owns it */
    unsigned object; /* which one it is, whatever its name and contents become */
    unsigned epoch;  /* of its contents: two times have one generation iff they have one epoch */
};

struct ref_node {
    const char *name;
    uint64_t size;
    bool used, read_only;
    bool guests; /* they may write to it: it can be no target */
    unsigned n;
    struct ref_bitmap b[REF_BITMAPS]; /* newest first */
    int target_of;                    /* job's index + 1 */
};

struct ref_job {
    bool used;
    char id[16];
    int node, target; /* target -1: a file */
    int file;         /* -1: none */
    char bitmap[16];  /* or empty */
    enum ref_mode { REF_ON_SUCCESS, REF_NEVER, REF_ALWAYS } mode;
    unsigned group; /* 0: alone */
};

struct ref_export {
    bool used, writable;
    char id[12];
    int node;
    unsigned object; /* the bitmap that it holds, 0: none */
};

struct ref {
    struct ref_node node[REF_NODES];
    struct ref_export export[REF_EXPORTS];
    uint64_t file[REF_FILES]; /* size, 0: not there */
    struct ref_job job[REF_JOBS];
    unsigned n_objects, n_epochs, n_groups, n_job_ids;
    unsigned group; /* of the list being played; 0: not grouped */
};

/* The nodes: d, e (big) and f (small) are written by guests; td, te, tf are their targets; n0 to n5
 * come and go. Bitmap `held` on d is held by export `hold`. A string that begins with '@' is the
 * name of a file, to which each daemon gives a beginning of its own. */
void ref_init(struct ref *r);
const char *ref_node_name(unsigned i);
struct ref_node *ref_node(struct ref *r, const char *name);
struct ref_bitmap *ref_bitmap(struct ref_node *n, const char *name);
/* A guest writes. */
void ref_write(struct ref *r, const char *node, uint64_t off, uint64_t len);
/* A job has ended with all its work done: well, or cancelled. */
void ref_end_job(struct ref *r, struct ref_job *j, bool well);

struct ref_maker {
    struct chance *dice;
    struct ref *r;
    bool careless; /* what fails is welcome */
    bool no_added; /* leave nodes alone that lists added */
};
struct ref_kind {
    const char *type;
    unsigned weight;
    bool files;                           /* makes the daemon touch files */
    bool job;                             /* starts one */
    json_t *(*make)(struct ref_maker *m); /* arguments; NULL: there are none that can succeed now */
    bool (*play)(struct ref *r, json_t *data);
};
extern const struct ref_kind ref_kinds[];
extern const unsigned n_ref_kinds;

const struct ref_kind *ref_kind(const char *type);
/* {type, data}. NULL as make. */
json_t *ref_make(struct ref_maker *m, const struct ref_kind *k);
json_t *ref_make_any(struct ref_maker *m); /* by weight; of careless ones also abort */
/* Carry it out; false: it is refused, and nothing has changed. */
bool ref_play(struct ref *r, json_t *action);
/* Plays a list: -1, or the action that fails, and then r is what it was. */
int ref_play_list(struct ref *r, json_t *actions, bool grouped);
/* All that a client may see of the bitmaps and who owns what, as text in the form of
 * local_bitmaps(). Owned (free). */
char *ref_text(struct ref *r);
/* The lines about jobs and exports, sorted. */
void ref_say_owners(FILE *f, const char **id, unsigned n);
