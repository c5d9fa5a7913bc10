/* SPDX-License-Identifier: Apache-2.0 */
/* A store (store/store.h) that survives power cuts, for the simulator: a log of records in one
 * file. A record holds, for each name that a list or the end of a group says it changed, the state
 * of that thing at the moment; replaying all records gives the state of the daemon. So two things
 * are shown at once: that the record decides everything (law L8), and that what an action changes
 * is what its footprint names (txn/footprint.c) - else the replay differs from the memory.
 *
 * The state is a JSON object: "node d", "bitmap d/p", "bits d/p", "state d/p", "job j0", "export e"
 * with a text for each. A frozen bitmap's bits are those that are frozen and those that came later.
 *
 * A record is appended and synced. If that fails it is cut off again, synced; if that fails, too,
 * nobody knows what a power cut would leave, and the store takes no more records. */
#pragma once
#include "store/store.h"
#include "world.h"

struct instance;

/* What was tried, kept beyond the life of the daemon. */
struct durable_try {
    uint64_t seq;
    json_t *state; /* of the whole daemon when the record was written */
    char id[32];
    enum { DURABLE_TRYING, DURABLE_DONE, DURABLE_WITHDRAWN } how;
};
struct durable_story {
    struct durable_try *tries;
    size_t n, cap;
    uint64_t done; /* seq of the last that was answered well */
    unsigned n_refused;
};
void durable_story_free(struct durable_story *s);

struct durable;
/* A new log at `path`, with a first record of everything there is. */
co_fn void durable_new(struct instance *inst, const char *path, struct durable_story *story,
                       struct durable **out);
struct store *durable_store(struct durable *d);
co_fn void durable_close(struct durable *d);
/* Guests have written: their marks become durable (a daemon would keep a journal of them). False:
 * it could not be recorded. */
co_fn bool durable_checkpoint(struct durable *d);
bool durable_is_broken(const struct durable *d);
/* What somebody who starts now would find: is it the state after one of the records, none older
 * than the last answered one, with the outcomes of exactly the lists up to there? */
co_fn void durable_check(const char *path, const struct durable_story *story);
