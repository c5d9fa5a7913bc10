/* SPDX-License-Identifier: Apache-2.0 */
/* Events: what the daemon tells every monitor. Control loop only.
 *
 * Names and members are those of the schema's event declarations. A transaction buffers the events
 * of its actions itself (txn/) and emits them here after its record. */
#pragma once
#include <jansson.h>
#include <stdint.h>

struct io;
struct event_bus;

/* Called for each event with the finished QMP object (borrowed); must not yield. */
struct event_sink {
    void (*fn)(struct event_sink *, json_t *event);
    struct event_sink *next;
};

int event_bus_new(struct io *io, struct event_bus **out);
void event_bus_free(struct event_bus *bus);
void event_bus_attach(struct event_bus *bus, struct event_sink *s);
void event_bus_detach(struct event_bus *bus, struct event_sink *s);

/* Stamps and sends. Takes over `data` (may be NULL: no member). Without memory the event is lost,
 * which is logged. */
void event_emit(struct event_bus *bus, const char *name, json_t *data);
