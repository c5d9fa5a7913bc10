/* SPDX-License-Identifier: Apache-2.0 */
/* The command line of the daemon, qemu-storage-daemon's and a little more. All of it is parsed and
 * checked before anything is started; options_run() then carries it out in the order given. */
#pragma once
#include <stdbool.h>

#include "base/error.h"
#include "co/co.h"
#include "io/io.h"

struct instance;
struct options;

struct start {
    bool help, version, daemonize;
    const char *pidfile; /* NULL: none */
    enum io_kind engine;
    unsigned n_loops;
    bool stdio_monitor;
};

/* `start` is filled; *out is the list of things to do. -EINVAL with one clear line. */
int options_parse(int argc, char **argv, struct start *start, struct options **out,
                  struct tide_error *err);
void options_free(struct options *o);
co_fn int options_run(const struct options *o, struct instance *inst, struct tide_error *err);
extern const char options_help[];
