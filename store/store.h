/* SPDX-License-Identifier: Apache-2.0 */
/* The record of a transaction: the one place where its outcome is decided.
 *
 * store_write_record() is called when every effect of a list is in memory, while guests are held.
 * If it returns 0 the list has happened, and nothing that can fail comes after it; if it fails the
 * list is undone. So all or nothing, also over a crash, is a property of this one function. The end
 * of a group of jobs is recorded in the same way: its record names the jobs, which are no more, and
 * the bitmaps that moved or folded back; if it fails, the jobs fail and the bitmaps fold back.
 *
 * There are two stores: store_new() keeps records in memory (outcomes of named transactions live
 * until the daemon ends), and the simulator has one that writes them to a simulated disk and is cut
 * off at every moment (tests/sim). A durable store of the daemon will be the third.
 *
 * Control loop only. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"
#include "co/co.h"

/* Kinds of things that have names. */
enum store_kind {
    STORE_NODE,         /* a: node-name; its existence and place in the graph */
    STORE_BITMAP,       /* a: node, b: name; its existence */
    STORE_BITMAP_BITS,  /* the same; its contents */
    STORE_BITMAP_STATE, /* the same; flags and owner */
    STORE_JOB,          /* a: id */
    STORE_EXPORT,       /* a: id */
    STORE_EXPORT_NAME,  /* a: name in the NBD server */
    STORE_FILE,         /* a: path */
};

struct store_name {
    enum store_kind kind;
    const char *a, *b;
};

#define STORE_DIGEST_SIZE 32u
#define STORE_ID_MAX 255u /* bytes of a transaction's id */
#define STORE_OUTCOMES 1024u

/* How a transaction that had an id ended; what a client that lost the answer is told. */
struct store_outcome {
    uint8_t digest[STORE_DIGEST_SIZE]; /* of the list */
    bool committed;
    int failed;        /* index of the action that failed, -1: none */
    const char *phase; /* a constant */
    bool not_undone;   /* something outside was left, as `err` says */
    struct tide_error err;
};

struct store_record {
    const char *id; /* or NULL */
    struct store_outcome outcome;
    /* What the list may have changed, by name, in list order; names may repeat. Empty for a list
     * that failed: that is only remembered. */
    const struct store_name *changed;
    size_t n_changed;
};

struct store {
    const struct store_ops *ops;
};
struct store_ops {
    co_fn int (*write_record)(struct store *s, const struct store_record *r,
                              struct tide_error *err);
    const struct store_outcome *(*find)(struct store *s, const char *id);
    void (*free)(struct store *s);
};

/* In memory. -ENOMEM. */
int store_new(struct store **out);
void store_free(struct store *s); /* NULL is fine */

/* 0: decided. -errno with a text: it has not happened, and the caller undoes it. */
co_fn int store_write_record(struct store *s, const struct store_record *r, struct tide_error *err);
/* The outcome remembered under `id`, one of the last STORE_OUTCOMES; NULL: none. Valid until the
 * next record. */
const struct store_outcome *store_find_outcome(struct store *s, const char *id);
