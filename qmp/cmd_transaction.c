/* SPDX-License-Identifier: Apache-2.0 */
/* The command `transaction`: hands the parsed list to txn/ and says in the error which action
 * failed. */
#include <errno.h>

#include "qmp/dispatch.h"
#include "qmp/instance.h"
#include "schema/handlers.h"

static void describe_failure(struct qmp_call *call, const struct action *a,
                             const struct txn_result *res)
{
    if (res->failed >= 0)
        call->error_data = json_pack("{s:i,s:s,s:s,s:b}", "action", res->failed, "kind",
                                     a[res->failed].entry->kind, "phase", res->phase, "undone", 1);
}

int qmp_transaction(struct qmp_call *call, const struct q_transaction *args, json_t **ret,
                    struct tide_error *err)
{
    struct txn_props props = {0};
    struct txn_result res;
    struct action *a = arena_alloc(&call->arena, (args->n_actions + 1) * sizeof *a);
    if (!a)
        return tide_fail(err, -ENOMEM, "no memory for a list of %zu actions", args->n_actions);
    for (size_t i = 0; i < args->n_actions; i++) {
        const struct q_transaction_action *q = &args->actions[i];
        a[i] = (struct action){&txn_actions[q->type], q->data, (unsigned)i};
    }
    if (args->properties && args->properties->has_completion_mode)
        props.grouped = args->properties->completion_mode == Q_ACTION_COMPLETION_MODE_GROUPED;
    int r = txn_run(&call->inst->txn, a, args->n_actions, &props, &res, err);
    if (r < 0)
        describe_failure(call, a, &res);
    return r;
}
