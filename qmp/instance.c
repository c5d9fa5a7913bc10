/* SPDX-License-Identifier: Apache-2.0 */
/* Putting a daemon together and taking it apart. */
#include "qmp/instance.h"

#include <errno.h>

#include "base/mem.h"
#include "block/node.h"
#include "event/event.h"
#include "export/export.h"
#include "job/job.h"
#include "qmp/monitor.h"
#include "store/store.h"
#include "txn/file_ids.h"
#include "txn/history.h"

static void free_parts(struct instance *inst)
{
    monitors_free(inst->monitors);
    objects_free(inst);
    history_free(inst->history);
    file_questions_free(inst->file_questions);
    store_free(inst->store);
    exports_free(inst->exports);
    jobs_free(inst->jobs);
    graph_free(inst->graph);
    event_bus_free(inst->bus);
    mem_free(inst);
}

static int may_begin(void *arg, struct tide_error *err)
{
    struct instance *inst = arg;
    return monitors_refusing(inst->monitors)
               ? tide_fail(err, -ESHUTDOWN, "the daemon is ending: nothing was run")
               : 0;
}

int instance_new(struct io *io, struct instance **out, struct tide_error *err)
{
    struct instance *inst = mem_zalloc(sizeof *inst);
    int r = inst ? 0 : -ENOMEM;
    if (r == 0) {
        inst->io = io;
        TAILQ_INIT(&inst->objects);
        r = event_bus_new(io, &inst->bus);
    }
    if (r == 0)
        r = graph_new(io, &inst->graph);
    if (r == 0)
        r = graph_start(inst->graph);
    if (r == 0)
        r = jobs_new(inst->graph, inst->bus, &inst->jobs);
    if (r == 0)
        r = exports_new(inst->graph, inst->bus, &inst->exports);
    if (r == 0)
        r = store_new(&inst->store);
    if (r == 0)
        jobs_set_store(inst->jobs, inst->store);
    if (r == 0)
        r = history_new(&inst->history);
    if (r == 0)
        r = file_questions_new(io, &inst->file_questions);
    if (r == 0)
        r = monitors_new(inst, &inst->monitors);
    if (r < 0) {
        if (inst && inst->graph)
            graph_stop(inst->graph);
        if (inst)
            free_parts(inst);
        return tide_fail(err, r, "cannot start: %s", tide_strerror(-r));
    }
    inst->txn = (struct txn_env){.io = io,
                                 .graph = inst->graph,
                                 .jobs = inst->jobs,
                                 .exports = inst->exports,
                                 .store = inst->store,
                                 .history = inst->history,
                                 .may_begin = may_begin,
                                 .may_begin_arg = inst};
    *out = inst;
    return 0;
}

int instance_open(struct instance *inst, struct tide_error *err)
{
    exports_open(inst->exports);
    return monitors_open(inst->monitors, err);
}

void instance_quit(struct instance *inst)
{
    io_event_set(&inst->quit);
}

void instance_close(struct instance *inst)
{
    /* A list under way is finished first; after it nobody may begin another change. */
    monitors_refuse(inst->monitors);
    graph_lock(inst->graph);
    graph_unlock(inst->graph);
    exports_close_all(inst->exports);
    jobs_cancel_all(inst->jobs);
    graph_close_all(inst->graph);
    monitors_close(inst->monitors);
    graph_stop(inst->graph);
    free_parts(inst);
}
