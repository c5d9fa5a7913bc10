/* SPDX-License-Identifier: Apache-2.0 */
/* Exports: nodes served by a protocol, the NBD server that most of them hang on, and iothread
 * objects, which name the loop that serves an export. Control loop only. */
#pragma once
#include <jansson.h>
#include <stdbool.h>

#include "base/error.h"
#include "co/co.h"

struct event_bus;
struct exports;
struct graph;
struct io_addr;
struct node;
struct q_block_export_options;

int exports_new(struct graph *g, struct event_bus *bus, struct exports **out);
void exports_free(struct exports *x); /* closed */
/* The daemon is up: from now on NBD clients are served; until then they wait in the backlog, so
 * that none misses an export that the command line is about to add. */
void exports_open(struct exports *x);

/* nbd-server-start: listen on `addr` (its port is filled in). max_connections 0 = no limit. One at
 * a time: -EEXIST. */
co_fn int nbd_server_start(struct exports *x, struct io_addr *addr, unsigned max_connections,
                           struct tide_error *err);
/* Closes the listener and every NBD export, hard: BLOCK_EXPORT_DELETED for each. -ENOENT: none
 * runs. */
co_fn int nbd_server_stop(struct exports *x, struct tide_error *err);
bool nbd_server_running(struct exports *x);

/* block-export-add. The id, the NBD name and the bitmaps are checked; bitmaps become busy. */
co_fn int export_add(struct exports *x, const struct q_block_export_options *opts,
                     struct tide_error *err);
/* block-export-del: safe refuses while a client is connected (-EBUSY). The event comes when the
 * export is really gone, maybe later than the return. */
co_fn int export_del(struct exports *x, const char *id, bool hard, struct tide_error *err);
/* nbd-server-remove: by NBD export name. */
co_fn int export_del_by_name(struct exports *x, const char *name, bool hard,
                             struct tide_error *err);
/* What an export shows; NULL: there is no such export. */
struct node *export_node(struct exports *x, const char *id);
json_t *exports_query(struct exports *x); /* query-block-exports: newest first */
/* Writable exports, newest first: fn(arg, id, node name). For query-block. */
void exports_each_writable(struct exports *x,
                           void (*fn)(void *arg, const char *id, const char *node), void *arg);
/* Shutdown: hard for every export, waits until they are gone; listener closed. */
co_fn void exports_close_all(struct exports *x);

/* object-add/-del qom-type=iothread: a name for one of the loops (dealt out in turn over the data
 * loops). -EBUSY while an export uses it. */
int iothread_add(struct exports *x, const char *id, struct tide_error *err);
int iothread_del(struct exports *x, const char *id, struct tide_error *err);
