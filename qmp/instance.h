/* SPDX-License-Identifier: Apache-2.0 */
/* One daemon: everything that its commands work on. The simulator runs several in one process. */
#pragma once
#include <stdbool.h>

#include "base/error.h"
#include "co/co.h"
#include "io/io.h"
#include "qmp/object.h"
#include "txn/txn.h"

struct event_bus;
struct exports;
struct file_questions;
struct graph;
struct jobs;

struct instance {
    struct io *io;
    struct event_bus *bus;
    struct graph *graph;
    struct jobs *jobs;
    struct exports *exports;
    struct object_list objects;
    struct store *store;
    struct txn_history *history;
    struct file_questions *file_questions;
    struct txn_env txn;
    struct monitors *monitors;
    struct io_event quit; /* somebody asked the daemon to end */
};

/* On the control loop, in a coroutine. */
co_fn int instance_new(struct io *io, struct instance **out, struct tide_error *err);
/* Everything is set up: clients of monitors and exports are served from now on. */
int instance_open(struct instance *inst, struct tide_error *err);
/* Ask for the end; returns at once. */
void instance_quit(struct instance *inst);
/* In order: exports, jobs, nodes, monitors. Then free everything. */
co_fn void instance_close(struct instance *inst);
