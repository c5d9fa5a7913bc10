/* SPDX-License-Identifier: Apache-2.0 */
/* A blocking QMP client over a UNIX socket: one command at a time, events kept for who asks. The
 * tool and the public library are made of it. Any thread, one at a time. */
#pragma once
#include "base/error.h"
#include <errno.h>
#include <jansson.h>
#include <stdbool.h>

struct client;

/* What a failed call carries in err->code. */
#define CLIENT_REFUSED (-EREMOTEIO)    /* the daemon answered with an error; its words and class */
#define CLIENT_UNREACHABLE (-ENOTCONN) /* nobody listens, or the connection is gone */
/* And -ETIMEDOUT, -ENOMEM: after any error but CLIENT_REFUSED the connection is of no use. */

/* Connects, reads the greeting and negotiates. -ENOTCONN, with words, if that does not work. */
int client_open(const char *path, struct client **out, struct tide_error *err);
void client_close(struct client *c); /* NULL is fine */

/* Sends a command and waits for its answer. Steals `args` (NULL: none). On success *reply is the
 * returned value, which the caller owns; `reply` may be NULL. */
int client_call(struct client *c, const char *command, json_t *args, json_t **reply,
                struct tide_error *err);

/* The most that a command may take from now on; at first, and with -1, for ever. */
void client_set_timeout(struct client *c, int timeout_ms);

/* The member "data" of the error that the last command was refused with; NULL: none. Borrowed until
 * the next command. */
const json_t *client_error_data(const struct client *c);

/* The same for a whole request object that somebody wrote by hand. Steals `request`. */
int client_send(struct client *c, json_t *request, json_t **reply, struct tide_error *err);

/* Is the error "there is no such command"? */
bool client_unknown_command(const struct tide_error *err);

/* The next event that has come or comes within `timeout_ms` (-1: for ever) in *event, which the
 * caller owns; NULL there if none came in that time or before a signal. */
int client_event(struct client *c, int timeout_ms, json_t **event, struct tide_error *err);

/* Ends the daemon, and waits until it has closed the connection and, as far as its process can be
 * told, is gone; at most `timeout_ms`. -ETIMEDOUT with words. */
int client_quit(struct client *c, int timeout_ms, struct tide_error *err);
