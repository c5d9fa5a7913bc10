/* SPDX-License-Identifier: Apache-2.0 */
/* One list of sinks, one stamp (QMP specification, section "Asynchronous events"). */
#include "event/event.h"

#include <errno.h>

#include "base/log.h"
#include "base/mem.h"
#include "io/io.h"

struct event_bus {
    struct io *io;
    struct event_sink *sinks;
};

int event_bus_new(struct io *io, struct event_bus **out)
{
    struct event_bus *bus = mem_zalloc(sizeof *bus);
    if (!bus)
        return -ENOMEM;
    bus->io = io;
    *out = bus;
    return 0;
}

void event_bus_free(struct event_bus *bus)
{
    mem_free(bus);
}

void event_bus_attach(struct event_bus *bus, struct event_sink *s)
{
    s->next = bus->sinks;
    bus->sinks = s;
}

void event_bus_detach(struct event_bus *bus, struct event_sink *s)
{
    for (struct event_sink **p = &bus->sinks; *p; p = &(*p)->next) {
        if (*p == s) {
            *p = s->next;
            return;
        }
    }
}

void event_emit(struct event_bus *bus, const char *name, json_t *data)
{
    int64_t wall = io_wall(bus->io);
    json_int_t s = wall < 0 ? -1 : wall / 1000000000;
    json_int_t us = wall < 0 ? -1 : wall % 1000000000 / 1000;
    json_t *e = json_pack("{s:{s:I,s:I},s:s}", "timestamp", "seconds", s, "microseconds", us,
                          "event", name);
    if (!e || (data && json_object_set(e, "data", data) < 0)) {
        log_error("event", "%s lost: out of memory", name);
    } else {
        for (struct event_sink *k = bus->sinks, *next; k; k = next) {
            next = k->next;
            k->fn(k, e);
        }
    }
    json_decref(e);
    json_decref(data);
}
