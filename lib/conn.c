/* SPDX-License-Identifier: Apache-2.0 */
/* Connections: the client of lib/client.h, with errors that a program can tell apart and texts for
 * JSON, so that nobody needs the JSON library of ours. */
#include <errno.h>
#include <string.h>

#include "base/mem.h"
#include "lib/txn.h"

struct tide_conn *tide_conn_new(void)
{
    struct tide_conn *conn = mem_zalloc(sizeof *conn);
    if (conn)
        conn->timeout_ms = -1;
    return conn;
}

static void close_client(struct tide_conn *conn)
{
    client_close(conn->client);
    conn->client = NULL;
}

void tide_conn_free(struct tide_conn *conn)
{
    if (!conn)
        return;
    close_client(conn);
    mem_free(conn);
}

int tide_conn_open(struct tide_conn *conn, const char *path)
{
    if (!conn)
        return -ENOMEM;
    close_client(conn);
    conn->err = (struct tide_error){0};
    if (!path)
        return tide_fail(&conn->err, -EINVAL, "no path of a socket is given");
    int r = client_open(path, &conn->client, &conn->err);
    if (r < 0)
        return r;
    client_set_timeout(conn->client, conn->timeout_ms);
    return 0;
}

bool tide_conn_is_open(const struct tide_conn *conn)
{
    return conn && conn->client;
}

void tide_conn_set_timeout(struct tide_conn *conn, int timeout_ms)
{
    if (!conn)
        return;
    conn->timeout_ms = timeout_ms < 0 ? -1 : timeout_ms;
    if (conn->client)
        client_set_timeout(conn->client, conn->timeout_ms);
}

const char *tide_conn_error(const struct tide_conn *conn)
{
    return conn && conn->err.code ? conn->err.msg : "";
}

const char *tide_conn_error_class(const struct tide_conn *conn)
{
    return conn && conn->err.code == CLIENT_REFUSED ? tide_class_name(conn->err.class) : "";
}

void tide_free(void *text)
{
    free(text); /* it comes from json_dumps() */
}

const char *tide_version(void)
{
    return TIDEMARK_VERSION;
}

/* Any error but a refusal leaves the stream where nobody knows whose answer comes next. */
static int settle(struct tide_conn *conn, int r)
{
    if (r >= 0 || r == CLIENT_REFUSED)
        return r;
    close_client(conn);
    if (r == CLIENT_UNREACHABLE)
        conn->err.code = r = -ECONNRESET;
    return r;
}

int conn_send(struct tide_conn *conn, const char *command, json_t *arguments, json_t **reply,
              json_t **data)
{
    *reply = *data = NULL;
    conn->err = (struct tide_error){0};
    if (!conn->client) {
        json_decref(arguments);
        return tide_fail(&conn->err, -ENOTCONN, "there is no connection to a daemon");
    }
    int r = client_call(conn->client, command, arguments, reply, &conn->err);
    if (r == CLIENT_REFUSED)
        *data = json_incref((json_t *)client_error_data(conn->client));
    return settle(conn, r);
}

/* JSON as text; steals `v`. */
static int to_text(struct tide_conn *conn, json_t *v, char **text)
{
    *text = json_dumps(v, JSON_COMPACT | JSON_ENCODE_ANY);
    json_decref(v);
    return *text ? 0 : tide_fail(&conn->err, -ENOMEM, "no memory for the daemon's answer");
}

static int parse_arguments(struct tide_conn *conn, const char *command, const char *text,
                           json_t **out)
{
    json_error_t why;
    json_t *name = command ? json_string(command) : NULL;
    *out = NULL;
    json_decref(name);
    if (!name)
        return tide_fail(&conn->err, -EINVAL, "the command's name is missing or no UTF-8 text");
    if (!text)
        return 0;
    *out = json_loads(text, JSON_REJECT_DUPLICATES, &why);
    if (json_is_object(*out))
        return 0;
    bool valid = *out;
    json_decref(*out);
    *out = NULL;
    return tide_fail(&conn->err, -EINVAL, "the arguments of '%.60s' are no JSON object%s%s",
                     command, valid ? "" : ": ", valid ? "" : why.text);
}

int tide_conn_call(struct tide_conn *conn, const char *command, const char *arguments, char **reply)
{
    json_t *args, *value, *data;
    if (reply)
        *reply = NULL;
    if (!conn)
        return -ENOMEM;
    int r = parse_arguments(conn, command, arguments, &args);
    if (r < 0)
        return r;
    r = conn_send(conn, command, args, &value, &data);
    json_decref(data);
    if (r == 0 && reply)
        return to_text(conn, value, reply);
    json_decref(value);
    return r;
}

int tide_conn_event(struct tide_conn *conn, int timeout_ms, char **event)
{
    json_t *value;
    if (event)
        *event = NULL;
    if (!conn)
        return -ENOMEM;
    conn->err = (struct tide_error){0};
    if (!event)
        return tide_fail(&conn->err, -EINVAL, "'event' is NULL: there is no place for the event");
    if (!conn->client)
        return tide_fail(&conn->err, -ENOTCONN, "there is no connection to a daemon");
    int r = settle(conn, client_event(conn->client, timeout_ms, &value, &conn->err));
    if (r < 0 || !value)
        return r;
    r = to_text(conn, value, event);
    return r < 0 ? r : 1;
}
