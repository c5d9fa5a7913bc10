/* SPDX-License-Identifier: Apache-2.0 */
/* From one QMP request to the code behind it. Control loop only.
 *
 * A newcomer's two guesses: the command's name stands in schema/ *.toml; its code is the function
 * qmp_NAME in qmp/cmd_*.c, or, for an action, NAME_ops in txn/action_*.c. */
#pragma once
#include <jansson.h>
#include <stdbool.h>

#include "base/error.h"
#include "base/mem.h"
#include "co/co.h"

struct instance;
struct schema_type;

/* One request being carried out. */
struct qmp_call {
    struct instance *inst;
    bool *negotiated; /* of this monitor; qmp_capabilities sets it */
    bool *oob;
    const char *client; /* who asks; for the log of transactions */
    json_t *arguments;  /* as they came; borrowed */
    struct arena arena; /* parsed arguments; freed after the answer */
    json_t *error_data; /* goes into the error object; owned */
};

enum qmp_flag {
    QMP_ACTION = 1,  /* run as a transaction of one */
    QMP_QUERY = 2,   /* changes nothing; waits while effects of a list are not decided */
    QMP_ANYTIME = 4, /* neither waits for nor disturbs a transaction */
    QMP_DEPRECATED = 8,
    QMP_DISKS = 16, /* a query that tells what only disks know: they are asked before it */
};

struct qmp_command {
    const char *name;
    const struct schema_type *args;
    unsigned flags;
    int (*run)(struct qmp_call *call, const void *args, json_t **ret, struct tide_error *err);
    int action_kind; /* of an action: index into txn_actions */
};
/* Generated, sorted by name. */
extern const struct qmp_command qmp_commands[];
extern const size_t n_qmp_commands;

/* The answer (a new reference) to one request; NULL: no memory. `request` is any JSON value,
 * `client` says who asks. */
co_fn json_t *qmp_dispatch(struct instance *inst, json_t *request, const char *client,
                           bool *negotiated, bool *oob);
/* The answer to bytes that are no JSON. */
json_t *qmp_parse_error(const char *why);
json_t *qmp_greeting(void);
