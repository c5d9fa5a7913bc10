/* SPDX-License-Identifier: Apache-2.0 */
/* Commands about the daemon itself: negotiation, versions, schema, life cycle. */
#include <errno.h>
#include <string.h>

#include "qmp/dispatch.h"
#include "qmp/instance.h"
#include "qmp/version.h"
#include "schema/handlers.h"
#include "schema/schema.h"

static int no_memory(struct tide_error *err)
{
    return tide_fail(err, -ENOMEM, "no memory for the answer");
}

int qmp_qmp_capabilities(struct qmp_call *call, const struct q_qmp_capabilities *args, json_t **ret,
                         struct tide_error *err)
{
    for (size_t i = 0; i < args->n_enable; i++) {
        if (args->enable[i] == Q_QMP_CAPABILITY_OOB)
            *call->oob = true;
    }
    *call->negotiated = true;
    return 0;
}

int qmp_query_version(struct qmp_call *call, const struct q_query_version *args, json_t **ret,
                      struct tide_error *err)
{
    *ret = json_pack("{s:{s:i,s:i,s:i},s:s}", "qemu", "major", QMP_MAJOR, "minor", QMP_MINOR,
                     "micro", QMP_MICRO, "package", TIDEMARK_PACKAGE);
    return *ret ? 0 : no_memory(err);
}

int qmp_query_commands(struct qmp_call *call, const struct q_query_commands *args, json_t **ret,
                       struct tide_error *err)
{
    *ret = json_array();
    for (size_t i = 0; *ret && i < n_qmp_commands; i++) {
        if (json_array_append_new(*ret, json_pack("{s:s}", "name", qmp_commands[i].name)) < 0) {
            json_decref(*ret);
            *ret = NULL;
        }
    }
    return *ret ? 0 : no_memory(err);
}

int qmp_query_qmp_schema(struct qmp_call *call, const struct q_query_qmp_schema *args, json_t **ret,
                         struct tide_error *err)
{
    *ret = schema_introspect();
    return *ret ? 0 : no_memory(err);
}

int qmp_query_status(struct qmp_call *call, const struct q_query_status *args, json_t **ret,
                     struct tide_error *err)
{
    *ret = json_pack("{s:s,s:b,s:b}", "status", "running", "running", 1, "singlestep", 0);
    return *ret ? 0 : no_memory(err);
}

int qmp_query_name(struct qmp_call *call, const struct q_query_name *args, json_t **ret,
                   struct tide_error *err)
{
    return 0; /* {}: a daemon has no guest's name */
}

int qmp_query_tpm(struct qmp_call *call, const struct q_query_tpm *args, json_t **ret,
                  struct tide_error *err)
{
    *ret = json_array();
    return *ret ? 0 : no_memory(err);
}

int qmp_query_tidemark(struct qmp_call *call, const struct q_query_tidemark *args, json_t **ret,
                       struct tide_error *err)
{
    *ret = json_pack("{s:s,s:s,s:i,s:[o,s]}", "version", TIDEMARK_VERSION, "engine",
                     io_engine_name(call->inst->io), "loops", (int)io_n_loops(call->inst->io),
                     "libraries", json_sprintf("jansson %s", jansson_version_str()),
                     "nettle " NETTLE_VERSION);
    if (!*ret)
        return no_memory(err);
#ifdef LIBURING_VERSION
    json_array_append_new(json_object_get(*ret, "libraries"),
                          json_string("liburing " LIBURING_VERSION));
#endif
    return 0;
}

int qmp_quit(struct qmp_call *call, const struct q_quit *args, json_t **ret, struct tide_error *err)
{
    instance_quit(call->inst);
    return 0;
}
