/* SPDX-License-Identifier: Apache-2.0 */
/* Commands about exports and the NBD server. */
#include <errno.h>

#include "export/export.h"
#include "qmp/address.h"
#include "qmp/commands.h"
#include "qmp/dispatch.h"
#include "qmp/instance.h"
#include "schema/handlers.h"

#define DEFAULT_MAX_CONNECTIONS 100u

/* ------------------------------------------------------------------ NBD server */

static int refuse_tls(const char *creds, const char *authz, struct tide_error *err)
{
    if (creds || authz)
        return tide_fail(err, -ENOTSUP, "TLS is not built into this daemon: leave '%s' out",
                         creds ? "tls-creds" : "tls-authz");
    return 0;
}

int qmp_nbd_server_start(struct qmp_call *call, const struct q_nbd_server_start *args, json_t **ret,
                         struct tide_error *err)
{
    struct io_addr addr;
    int r = refuse_tls(args->tls_creds, args->tls_authz, err);
    if (r == 0)
        r = address_from_legacy(args->addr, &addr, err);
    if (r == 0)
        r = nbd_server_start(
            call->inst->exports, &addr,
            args->has_max_connections ? args->max_connections : DEFAULT_MAX_CONNECTIONS, err);
    return r;
}

int start_nbd_server(struct instance *inst, const struct q_nbd_server_options *o,
                     struct tide_error *err)
{
    struct io_addr addr;
    int r = refuse_tls(o->tls_creds, o->tls_authz, err);
    if (r == 0)
        r = address_from_flat(o->addr, &addr, err);
    if (r == 0)
        r = nbd_server_start(inst->exports, &addr,
                             o->has_max_connections ? o->max_connections : DEFAULT_MAX_CONNECTIONS,
                             err);
    return r;
}

int qmp_nbd_server_stop(struct qmp_call *call, const struct q_nbd_server_stop *args, json_t **ret,
                        struct tide_error *err)
{
    return nbd_server_stop(call->inst->exports, err);
}

int qmp_nbd_server_add(struct qmp_call *call, const struct q_nbd_server_add *args, json_t **ret,
                       struct tide_error *err)
{
    const char *name = args->name ? args->name : args->device;
    struct q_block_dirty_bitmap_or_str bitmap = {.kind = Q_KIND_STRING, .string = args->bitmap};
    struct q_block_export_options o = {
        .type = Q_BLOCK_EXPORT_TYPE_NBD,
        .id = name,
        .node_name = args->device,
        .has_writable = args->has_writable,
        .writable = args->writable,
    };
    o.u.nbd.name = name;
    o.u.nbd.description = args->description;
    o.u.nbd.n_bitmaps = args->bitmap ? 1 : 0;
    o.u.nbd.bitmaps = args->bitmap ? &bitmap : NULL;
    return export_add(call->inst->exports, &o, err);
}

int qmp_nbd_server_remove(struct qmp_call *call, const struct q_nbd_server_remove *args,
                          json_t **ret, struct tide_error *err)
{
    bool hard = args->has_mode && args->mode == Q_BLOCK_EXPORT_REMOVE_MODE_HARD;
    return export_del_by_name(call->inst->exports, args->name, hard, err);
}

/* ------------------------------------------------------------------ exports */

int qmp_query_block_exports(struct qmp_call *call, const struct q_query_block_exports *args,
                            json_t **ret, struct tide_error *err)
{
    *ret = exports_query(call->inst->exports);
    return *ret ? 0 : tide_fail(err, -ENOMEM, "no memory for the answer");
}
