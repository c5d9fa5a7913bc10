/* SPDX-License-Identifier: Apache-2.0 */
/* abort: the action that fails. Tests and cautious clients end a list with it. */
#include <errno.h>

#include "txn/actions.h"

static int abort_prepare(struct txn *t, const struct action *a, struct tide_error *err)
{
    return tide_fail(err, -ECANCELED, "the list was aborted by its action 'abort'");
}

const struct action_ops abort_ops = {.prepare = abort_prepare};
