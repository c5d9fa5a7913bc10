/* SPDX-License-Identifier: Apache-2.0 */
/* Lengths are checked here; whether an address works shows when it is used. */
#include "qmp/address.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "block/node.h"
#include "io/io.h"
#include "schema/types.h"

static int copy(char *to, size_t size, const char *from, const char *what, struct tide_error *err)
{
    if (strlen(from) >= size)
        return tide_fail(err, -ENAMETOOLONG, "%s '%s' is longer than %zu bytes", what,
                         shown_name(from).text, size - 1);
    strcpy(to, from);
    return 0;
}

static int from_unix(const struct q_unix_socket_address *u, struct io_addr *out,
                     struct tide_error *err)
{
    bool abstract = u->has_abstract && u->abstract;
    out->type = IO_ADDR_UNIX;
    if (!u->path[0])
        return tide_fail(err, -EINVAL, "the path of the UNIX socket is empty");
    out->path[0] = '@';
    return copy(out->path + abstract, sizeof out->path - abstract, u->path, "socket path", err);
}

static int from_inet(const struct q_inet_socket_address *i, struct io_addr *out,
                     struct tide_error *err)
{
    out->type = IO_ADDR_TCP;
    out->ipv4 = i->has_ipv4 && i->ipv4;
    out->ipv6 = i->has_ipv6 && i->ipv6;
    if (i->has_mptcp && i->mptcp)
        return tide_fail(err, -ENOTSUP, "'mptcp' is not offered: leave it out");
    int r = copy(out->host, sizeof out->host, i->host, "host", err);
    return r < 0 ? r : copy(out->port, sizeof out->port, i->port, "port", err);
}

static int from_fd(const struct q_fd_socket_address *f, struct io_addr *out, struct tide_error *err)
{
    char *end;
    errno = 0;
    long fd = strtol(f->str, &end, 10);
    if (errno || end == f->str || *end || fd < 0 || fd > INT32_MAX)
        return tide_fail(err, -EINVAL, "'%s' is not the number of an open descriptor", f->str);
    out->type = IO_ADDR_FD;
    out->fd = (int)fd;
    return 0;
}

static int from_parts(int type, const void *part, struct io_addr *out, struct tide_error *err)
{
    memset(out, 0, sizeof *out);
    switch (type) {
    case Q_SOCKET_ADDRESS_TYPE_UNIX:
        return from_unix(part, out, err);
    case Q_SOCKET_ADDRESS_TYPE_INET:
        return from_inet(part, out, err);
    case Q_SOCKET_ADDRESS_TYPE_FD:
        return from_fd(part, out, err);
    default:
        return tide_fail(err, -ENOTSUP, "address type '%s' is not offered: use unix, inet or fd",
                         q_socket_address_type_names[type]);
    }
}

int address_from_flat(const struct q_socket_address *q, struct io_addr *out, struct tide_error *err)
{
    return from_parts(q->type, &q->u, out, err);
}

int address_from_legacy(const struct q_socket_address_legacy *q, struct io_addr *out,
                        struct tide_error *err)
{
    return from_parts(q->type, q->data, out, err);
}
