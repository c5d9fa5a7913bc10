/* SPDX-License-Identifier: Apache-2.0 */
/* Inside libtidemark: what its files share. The contract is in lib/tidemark/tidemark.h. */
#pragma once
#include <jansson.h>
#include <tidemark/tidemark.h>

#include "base/error.h"
#include "lib/client.h"
#include "schema/schema.h"

struct tide_conn {
    struct client *client; /* NULL: not open */
    int timeout_ms;
    struct tide_error err; /* code 0: none */
};

/* A command with arguments, which are stolen. What tide_conn_call() does, on JSON; and *data is
 * that of a refusal, a new reference, or NULL. */
int conn_send(struct tide_conn *conn, const char *command, json_t *arguments, json_t **reply,
              json_t **data);

/* Adds an action of `kind` whose arguments are the struct `args` of `type`, laid out as the
 * schema's; NULL: it has none. */
int txn_add(struct tide_txn *txn, const char *kind, const struct schema_type *type,
            const void *args);
