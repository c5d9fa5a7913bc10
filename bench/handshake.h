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
    bool structured; /* ask for structured replies */
};

struct nbd_export {
    uint64_t size;
    uint32_t min_block; /* 1 if the server did not say */
    bool read_only, can_fua, multi_conn;
    bool structured; /* the server agreed */
};

/* A connected socket on which requests may be sent, or -errno; the cause went to stderr. */
int nbd_open(const struct nbd_target *t, struct nbd_export *e);
/* Say goodbye and close. */
void nbd_close(int fd);
