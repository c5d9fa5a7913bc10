/* SPDX-License-Identifier: Apache-2.0 */
/* Exports: nodes served by a protocol, the NBD server that most of them hang on, and iothread
 * objects, which name the loop that serves an export. Control loop only. */
#pragma once
#include <jansson.h>
#include <stdbool.h>

#include "base/error.h"
#include "co/co.h"

struct dirty_bitmap;
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

/* As block-export-add, at once and for good. The id, the NBD name and the bitmaps are checked;
 * bitmaps become busy. */
co_fn int export_add(struct exports *x, const struct q_block_export_options *opts,
                     struct tide_error *err);
/* As block-export-del, at once and for good: safe refuses while a client is connected (-EBUSY). The
 * event comes when the export is really gone, maybe later than the return. */
co_fn int export_del(struct exports *x, const char *id, bool hard, struct tide_error *err);
/* nbd-server-remove: by NBD export name. */
co_fn int export_del_by_name(struct exports *x, const char *name, bool hard,
                             struct tide_error *err);
/* What an export shows; NULL: there is no such export. */
struct node *export_node(struct exports *x, const char *id);
/* Its name in the NBD server; NULL: there is no such export. */
const char *export_name_of(struct exports *x, const char *id);
/* Its i-th bitmap; NULL: no more. */
struct dirty_bitmap *export_bitmap(struct exports *x, const char *id, unsigned i);
json_t *exports_query(struct exports *x); /* query-block-exports: newest first */
/* Writable exports, newest first: fn(arg, id, node name). For query-block. */
void exports_each_writable(struct exports *x,
                           void (*fn)(void *arg, const char *id, const char *node), void *arg);
/* Shutdown: hard for every export, waits until they are gone; listener closed. */
co_fn void exports_close_all(struct exports *x);

/* ---- in parts, for lists of actions
 *
 * Each part takes effect at once, and what undoes it cannot fail, needs no memory and does not
 * yield. Until the list is over (graph_effects_end) queries and NBD handshakes wait, so nobody sees
 * an export in between, and nobody connects to it. A claim (block/root.h) that is handed over is
 * used up in any case; NULL: it is made on the spot, which takes as long as the file locks do. */

struct export;
struct root;

/* The claim that an export of this kind to that node would need, before guests are held; no claim
 * where it could not be had as things are: making the export will say why. */
co_fn int export_claim(struct exports *x, const char *id, bool writable, const char *node,
                       struct root **out);
bool export_is_writable(struct exports *x, const char *id); /* false, too: there is none */

/* block-export-add. It is listed, its gate is shut until export_open(). unmake: undone, and to be
 * freed by the caller once guests go on. */
co_fn int export_make(struct exports *x, const struct q_block_export_options *opts,
                      struct root *claim, struct export **out, struct tide_error *err);
void export_unmake(struct export *e);
void export_open(struct export *e);
co_fn void export_free(struct export *e);

/* block-export-del: may it be deleted? hide: nobody finds it, its id and name are free; so are its
 * bitmaps and its node if no client is connected. unhide: undone. end: it is deleted for good and
 * its clients are cut off; true: there are none, and the caller retires it (frees it and tells)
 * once guests go on; false: it must not be touched any more. */
int export_find_del(struct exports *x, const char *id, bool hard, struct export **out,
                    struct tide_error *err);
void export_hide(struct export *e);
void export_unhide(struct export *e);
bool export_end(struct export *e);
co_fn void export_retire(struct export *e);

/* block-export-set-node: the export goes on over another node of the same size, for clients that
 * are connected too; it is quiesced or its gate is shut. Afterwards *claim keeps what the export
 * had of the old node. swap: undone, *claim keeps what it had of the new one. The caller gives the
 * claim back (root_free) once guests go on; before that the old node counts as unused already. */
co_fn int export_set_node(struct exports *x, const char *id, const char *node, struct root **claim,
                          struct export **out, struct tide_error *err);
void export_swap_node(struct export *e, struct root *claim);

struct node *export_shows(const struct export *e);
const char *export_name(const struct export *e); /* in the NBD server */
unsigned export_n_connections(const struct export *e);

/* ---- iothreads */

/* object-add/-del qom-type=iothread: a name for one of the loops (dealt out in turn over the data
 * loops). -EBUSY while an export uses it. */
int iothread_add(struct exports *x, const char *id, struct tide_error *err);
int iothread_del(struct exports *x, const char *id, struct tide_error *err);
