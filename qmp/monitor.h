/* SPDX-License-Identifier: Apache-2.0 */
/* Monitors: QMP clients on sockets and on standard input. Any number of clients on one socket, each
 * with its own negotiation; events go to every negotiated one. A client whose answers and events
 * pile up beyond MONITOR_OUT_MAX is dropped. Control loop only. */
#pragma once
#include <stdbool.h>

#include "base/error.h"
#include "co/co.h"

#define MONITOR_OUT_MAX ((size_t)64 << 20)
#define MONITOR_CLIENTS_MAX 1024u

struct instance;
struct io_addr;
struct io_sock;
struct monitors;

int monitors_new(struct instance *inst, struct monitors **out);
void monitors_free(struct monitors *m); /* closed */

/* Serve clients that connect to `addr`; they get `pretty` output if asked. */
co_fn int monitor_listen(struct monitors *m, struct io_addr *addr, bool pretty,
                         struct tide_error *err);
/* The daemon is up: from now on clients are served; until then they wait in the backlog. */
int monitors_open(struct monitors *m, struct tide_error *err);
/* Serve this one client; takes over the socket. */
int monitor_serve(struct monitors *m, struct io_sock *s, bool pretty, struct tide_error *err);
/* From now on commands that change something are refused: the daemon is ending. */
void monitors_refuse(struct monitors *m);
bool monitors_refusing(const struct monitors *m);
/* Sends what is queued (for a short while), ends every client and listener, waits for them. */
co_fn void monitors_close(struct monitors *m);
