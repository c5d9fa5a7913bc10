/* SPDX-License-Identifier: Apache-2.0 */
/* The QMP client.
 *
 * The daemon sends a stream of JSON objects: answers, and events between them at any time, even
 * before the answer of the command that caused them. The stream promises no line ends, so a small
 * scanner finds where an object ends (it counts brackets outside strings, and never looks at a byte
 * twice); the parser then sees whole objects only. */
#include "lib/client.h"
#include "base/mem.h"
#include <errno.h>
#include <poll.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define GREETING_TIMEOUT_MS 5000
#define READ_SIZE ((size_t)64 * 1024)
#define MESSAGE_MAX ((size_t)1 << 30) /* a peer that sends more without an end is no QMP server */

struct client {
    int fd;
    char *buf; /* `used` bytes of `size`; the first `scanned` of them have been looked at */
    size_t used, size, scanned;
    unsigned depth; /* open brackets at `scanned` */
    bool in_string, escaped;
    json_t *events;     /* array, oldest first; null for those that were taken */
    size_t taken;       /* how many of them, at its beginning */
    json_t *error_data; /* of the last refusal, or NULL */
    int timeout_ms;     /* for one command; -1: none */
    bool broken;        /* an answer may still come that nobody waits for: of no use any more */
};

static int64_t now_ms(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

/* How much of a timeout is left; -1 stays -1. */
static int left_ms(int64_t deadline)
{
    if (deadline < 0)
        return -1;
    int64_t left = deadline - now_ms();
    return left < 0 ? 0 : (int)left;
}

static int no_memory(struct tide_error *err)
{
    return tide_fail(err, -ENOMEM, "no memory for the daemon's answer");
}

static int lost(struct client *c, struct tide_error *err, int errnum)
{
    c->broken = true;
    if (errnum == 0)
        return tide_fail(err, CLIENT_UNREACHABLE, "the daemon closed the connection");
    return tide_fail(err, CLIENT_UNREACHABLE, "the connection to the daemon broke: %s",
                     tide_strerror(errnum));
}

/* Length of the first whole object in the buffer, 0 if there is none yet. */
static size_t scan(struct client *c)
{
    while (c->scanned < c->used) {
        char ch = c->buf[c->scanned++];
        if (c->in_string) {
            if (c->escaped)
                c->escaped = false;
            else if (ch == '\\')
                c->escaped = true;
            else if (ch == '"')
                c->in_string = false;
        } else if (ch == '"') {
            c->in_string = true;
        } else if (ch == '{' || ch == '[') {
            c->depth++;
        } else if ((ch == '}' || ch == ']') && c->depth > 0 && --c->depth == 0) {
            return c->scanned;
        }
    }
    return 0;
}

static void consume(struct client *c, size_t len)
{
    memmove(c->buf, c->buf + len, c->used - len);
    c->used -= len;
    c->scanned = 0;
}

/* Reads what is there, at least one byte. */
static int fill(struct client *c, struct tide_error *err)
{
    if (c->size - c->used < READ_SIZE) {
        size_t size = c->size * 2 < READ_SIZE ? READ_SIZE * 2 : c->size * 2;
        char *buf = size > MESSAGE_MAX ? NULL : mem_realloc(c->buf, size, 1);
        if (!buf)
            return no_memory(err);
        c->buf = buf;
        c->size = size;
    }
    ssize_t n = recv(c->fd, c->buf + c->used, c->size - c->used, 0);
    if (n < 0)
        return errno == EINTR ? 0 : lost(c, err, errno);
    if (n == 0)
        return lost(c, err, 0);
    c->used += (size_t)n;
    return 0;
}

/* The next object of the stream. *out NULL: none within the time, or (if `interruptible`) before a
 * signal came. */
static int next_object(struct client *c, int64_t deadline, bool interruptible, json_t **out,
                       struct tide_error *err)
{
    *out = NULL;
    size_t len;
    while ((len = scan(c)) == 0) {
        struct pollfd p = {.fd = c->fd, .events = POLLIN};
        int r = poll(&p, 1, left_ms(deadline));
        if (r == 0 || (r < 0 && errno == EINTR && interruptible))
            return 0;
        if (r < 0 && errno != EINTR)
            return lost(c, err, errno);
        r = r < 0 ? 0 : fill(c, err);
        if (r < 0)
            return r;
    }
    json_error_t why;
    *out = json_loadb(c->buf, len, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &why);
    consume(c, len);
    if (!json_is_object(*out)) {
        json_decref(*out);
        *out = NULL;
        return tide_fail(err, CLIENT_UNREACHABLE, "what answers there does not speak QMP");
    }
    return 0;
}

static int keep_event(struct client *c, json_t *event, struct tide_error *err)
{
    return json_array_append_new(c->events, event) < 0 ? no_memory(err) : 0;
}

static int too_late(struct client *c, struct tide_error *err)
{
    c->broken = true;
    return tide_fail(err, -ETIMEDOUT, "the daemon did not answer within %d ms", c->timeout_ms);
}

/* Waits until the socket takes more. */
static int await_room(struct client *c, int64_t deadline, struct tide_error *err)
{
    struct pollfd p = {.fd = c->fd, .events = POLLOUT};
    int r = poll(&p, 1, left_ms(deadline));
    if (r == 0)
        return too_late(c, err);
    return r < 0 && errno != EINTR ? lost(c, err, errno) : 0;
}

static int send_all(struct client *c, const char *text, size_t len, int64_t deadline,
                    struct tide_error *err)
{
    while (len > 0) {
        ssize_t n = send(c->fd, text, len, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 && errno == EAGAIN) {
            int r = await_room(c, deadline, err);
            if (r < 0)
                return r;
            continue;
        }
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return lost(c, err, errno);
        text += n;
        len -= (size_t)n;
    }
    return 0;
}

/* The oldest event that is kept, a new reference, or NULL. Those taken leave the array together,
 * when they are half of it: one at a time, each would move all that are left. */
static json_t *take_event(struct client *c)
{
    if (c->taken == json_array_size(c->events))
        return NULL;
    json_t *event = json_incref(json_array_get(c->events, c->taken));
    json_array_set_new(c->events, c->taken++, json_null());
    size_t left = json_array_size(c->events) - c->taken;
    if (left > c->taken)
        return event;
    for (size_t i = 0; i < left; i++)
        json_array_set(c->events, i, json_array_get(c->events, c->taken + i));
    while (json_array_size(c->events) > left)
        json_array_remove(c->events, json_array_size(c->events) - 1);
    c->taken = 0;
    return event;
}

/* An answer: the value, or the daemon's error in ours. Steals `message`. */
static int take_answer(struct client *c, json_t *message, json_t **reply, struct tide_error *err)
{
    int r = 0;
    json_t *value = json_object_get(message, "return");
    if (value) {
        if (reply)
            *reply = json_incref(value);
    } else if (!json_is_object(json_object_get(message, "error"))) {
        /* Nobody may take it for a refusal, after which nothing has happened. */
        r = tide_fail(err, CLIENT_UNREACHABLE, "the answer is neither a result nor an error");
    } else {
        const char *class = NULL, *desc = NULL;
        json_unpack(message, "{s:{s?s, s?s}}", "error", "class", &class, "desc", &desc);
        enum tide_class k = TIDE_GENERIC;
        for (int i = TIDE_COMMAND_NOT_FOUND; class && i <= TIDE_DEVICE_NOT_ACTIVE; i++)
            if (strcmp(class, tide_class_name((enum tide_class)i)) == 0)
                k = (enum tide_class)i;
        c->error_data = json_incref(json_object_get(json_object_get(message, "error"), "data"));
        r = tide_fail_class(err, k, CLIENT_REFUSED, "%s", desc ? desc : "error without words");
    }
    json_decref(message);
    return r;
}

static int await_answer(struct client *c, int64_t deadline, json_t **reply, struct tide_error *err)
{
    for (;;) {
        json_t *message;
        int r = next_object(c, deadline, false, &message, err);
        if (r < 0)
            return r;
        if (!message)
            return too_late(c, err);
        if (!json_object_get(message, "event"))
            return take_answer(c, message, reply, err);
        r = keep_event(c, message, err);
        if (r < 0)
            return r;
    }
}

int client_send(struct client *c, json_t *request, json_t **reply, struct tide_error *err)
{
    if (reply)
        *reply = NULL;
    json_decref(c->error_data);
    c->error_data = NULL;
    if (c->broken) {
        json_decref(request);
        return tide_fail(err, CLIENT_UNREACHABLE, "the connection to the daemon was lost before");
    }
    char *json = json_dumps(request, JSON_COMPACT);
    char *text = json ? mem_printf("%s\n", json) : NULL;
    json_decref(request);
    free(json);
    if (!text)
        return no_memory(err);
    int64_t deadline = c->timeout_ms < 0 ? -1 : now_ms() + c->timeout_ms;
    int r = send_all(c, text, strlen(text), deadline, err);
    mem_free(text);
    if (r == 0)
        r = await_answer(c, deadline, reply, err);
    if (r < 0 && r != CLIENT_REFUSED)
        c->broken = true;
    return r;
}

void client_set_timeout(struct client *c, int timeout_ms)
{
    c->timeout_ms = timeout_ms;
}

const json_t *client_error_data(const struct client *c)
{
    return c->error_data;
}

int client_call(struct client *c, const char *command, json_t *args, json_t **reply,
                struct tide_error *err)
{
    /* "o*" leaves the member out when there are no arguments. */
    json_t *request = json_pack("{s:s, s:o*}", "execute", command, "arguments", args);
    if (!request) {
        if (reply)
            *reply = NULL;
        return no_memory(err);
    }
    return client_send(c, request, reply, err);
}

bool client_unknown_command(const struct tide_error *err)
{
    return err->code == CLIENT_REFUSED && err->class == TIDE_COMMAND_NOT_FOUND;
}

int client_event(struct client *c, int timeout_ms, json_t **event, struct tide_error *err)
{
    *event = take_event(c);
    if (*event)
        return 0;
    return next_object(c, timeout_ms < 0 ? -1 : now_ms() + timeout_ms, true, event, err);
}

static int wait_close(struct client *c, int64_t deadline, struct tide_error *err)
{
    for (;;) {
        json_t *message;
        int r = next_object(c, deadline, false, &message, err);
        if (r == CLIENT_UNREACHABLE)
            return 0;
        if (r < 0)
            return r;
        if (!message)
            return tide_fail(err, -ETIMEDOUT, "the daemon still runs");
        json_decref(message);
    }
}

/* A pidfd. -1: it cannot be told which process it is, as from another container, or it is our own.
 */
static int daemon_of(int fd)
{
    struct ucred peer;
    socklen_t len = sizeof peer;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &len) < 0 || peer.pid <= 0 ||
        peer.pid == getpid())
        return -1;
    return (int)syscall(SYS_pidfd_open, peer.pid, 0);
}

static int wait_process(int daemon, int64_t deadline, struct tide_error *err)
{
    struct pollfd p = {.fd = daemon, .events = POLLIN};
    int r;
    while ((r = poll(&p, 1, left_ms(deadline))) <= 0) {
        if (r == 0 || errno != EINTR)
            return tide_fail(err, -ETIMEDOUT, "the daemon still runs");
    }
    return 0;
}

int client_quit(struct client *c, int timeout_ms, struct tide_error *err)
{
    int64_t deadline = now_ms() + timeout_ms;
    int daemon = daemon_of(c->fd); /* while it is sure to be that one */
    int r = client_call(c, "quit", NULL, NULL, err);
    if (r == 0)
        r = wait_close(c, deadline, err);
    if (r == 0 && daemon >= 0)
        r = wait_process(daemon, deadline, err);
    if (daemon >= 0)
        close(daemon);
    return r;
}

/* Without room among the waiting clients connect() waits, and a signal ends that, with SA_RESTART
 * too since there is a time limit. Nothing goes on by itself then, as it would with TCP: poll()
 * calls such a UNIX socket writable and SO_ERROR has no error, but nobody is connected. So it is
 * called again, for what is left of the time. -errno; -EAGAIN: the time is over. */
static int connect_in_time(int fd, const struct sockaddr_un *sa)
{
    int64_t deadline = now_ms() + GREETING_TIMEOUT_MS;
    for (int left; (left = left_ms(deadline)) > 0;) {
        struct timeval most = {.tv_sec = left / 1000, .tv_usec = left % 1000 * 1000};
        if (setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &most, sizeof most) < 0)
            return -errno;
        if (connect(fd, (const struct sockaddr *)sa, sizeof *sa) == 0)
            return 0;
        if (errno != EINTR)
            return -errno;
    }
    return -EAGAIN;
}

static int connect_to(const char *path, int *fd, struct tide_error *err)
{
    struct sockaddr_un sa = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof sa.sun_path)
        return tide_fail(err, -ENAMETOOLONG, "'%s' is too long for the path of a socket", path);
    memcpy(sa.sun_path, path, strlen(path) + 1);
    *fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (*fd < 0)
        return tide_fail(err, -errno, "cannot make a socket: %s", tide_strerror(errno));
    int r = connect_in_time(*fd, &sa);
    if (r < 0) {
        close(*fd);
        return tide_fail(err, CLIENT_UNREACHABLE, "no daemon at '%s': %s", path, tide_strerror(-r));
    }
    return 0;
}

static int negotiate(struct client *c, const char *path, struct tide_error *err)
{
    json_t *greeting;
    int r = next_object(c, now_ms() + GREETING_TIMEOUT_MS, false, &greeting, err);
    if (r < 0)
        return r;
    bool qmp = json_object_get(greeting, "QMP");
    json_decref(greeting);
    if (!greeting)
        return tide_fail(
            err, CLIENT_UNREACHABLE,
            "'%s' takes the connection but does not greet; it may serve another client", path);
    if (!qmp)
        return tide_fail(err, CLIENT_UNREACHABLE, "what listens at '%s' does not speak QMP", path);
    r = client_call(c, "qmp_capabilities", NULL, NULL, err);
    return r == -ETIMEDOUT ? tide_fail(err, CLIENT_UNREACHABLE, "%s", err->msg) : r;
}

int client_open(const char *path, struct client **out, struct tide_error *err)
{
    int fd = -1;
    int r = connect_to(path, &fd, err);
    if (r < 0)
        return r;
    struct client *c = mem_zalloc(sizeof *c);
    if (!c) {
        close(fd);
        return no_memory(err);
    }
    c->fd = fd;
    c->timeout_ms = GREETING_TIMEOUT_MS;
    c->events = json_array();
    r = c->events ? negotiate(c, path, err) : no_memory(err);
    if (r < 0) {
        client_close(c);
        return r;
    }
    c->timeout_ms = -1;
    *out = c;
    return 0;
}

void client_close(struct client *c)
{
    if (!c)
        return;
    close(c->fd);
    json_decref(c->events);
    json_decref(c->error_data);
    mem_free(c->buf);
    mem_free(c);
}
