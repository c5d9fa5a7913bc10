/* SPDX-License-Identifier: Apache-2.0 */
/* Opening an NBD export as a client: connect, fixed newstyle negotiation, NBD_OPT_GO. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

/* Where the export is. Borrowed strings. */
struct nbd_target {
    const char *socket_path; /* UNIX socket, or NULL */
    const char *host, *port; /* TCP, if there is no socket_path */
    const char *export_name;
    bool structured;     /* ask for structured replies */
    bool extended;       /* ask for extended headers, which include structured replies */
    const char *context; /* a metadata context to select, or NULL; needs one of the two above */
};

struct nbd_export {
    uint64_t size;
    uint32_t min_block; /* 1 if the server did not say */
    bool read_only, can_fua, multi_conn;
    bool structured, extended; /* the server agreed */
    uint32_t context_id;       /* of the context asked for */
};

/* A connected socket on which requests may be sent, or -errno; the cause went to stderr. Structured
 * replies and extended headers may be refused, which is no failure; a context may not. */
int nbd_open(const struct nbd_target *t, struct nbd_export *e);
/* Say goodbye and close. `extended`: of nbd_export. */
void nbd_close(int fd, bool extended);
