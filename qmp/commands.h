/* SPDX-License-Identifier: Apache-2.0 */
/* The commands that also exist as options of the daemon's command line. Control loop. */
#pragma once
#include "base/error.h"
#include "co/co.h"

struct instance;
struct q_nbd_server_options;
struct q_object_options;

co_fn int start_nbd_server(struct instance *inst, const struct q_nbd_server_options *o,
                           struct tide_error *err);
co_fn int add_object(struct instance *inst, const struct q_object_options *o,
                     struct tide_error *err);
