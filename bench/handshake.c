/* SPDX-License-Identifier: Apache-2.0 */
/* The NBD negotiation, written with plain blocking calls: it happens once per connection, before
 * anything is measured. Everything the server sends is checked; a limit of time keeps a silent
 * server from hanging the program. */
#include "handshake.h"

#include <err.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/bytes.h"

#define HANDSHAKE_TIMEOUT_S 10
#define MAX_EXPORT_NAME 4096
#define MAX_OPTION_REPLY (MAX_EXPORT_NAME + 8)

#define NBD_MAGIC UINT64_C(0x4e42444d41474943)
#define OPT_MAGIC UINT64_C(0x49484156454f5054)
#define OPT_REPLY_MAGIC UINT64_C(0x0003e889045565a9)
#define REQUEST_MAGIC 0x25609513u
#define EXTENDED_REQUEST_MAGIC 0x21e41c71u

enum { SERVER_FIXED_NEWSTYLE = 1, SERVER_NO_ZEROES = 2 };
enum { OPT_GO = 7, OPT_STRUCTURED_REPLY = 8, OPT_SET_META_CONTEXT = 10, OPT_EXTENDED_HEADERS = 11 };
enum { REP_ACK = 1, REP_INFO = 3, REP_META_CONTEXT = 4 };
enum { INFO_EXPORT = 0, INFO_BLOCK_SIZE = 3 };
enum { FLAG_READ_ONLY = 1 << 1, FLAG_SEND_FUA = 1 << 3, FLAG_MULTI_CONN = 1 << 8 };
enum { CMD_DISC = 2 };

static int fail(int code, const char *what)
{
    warnx("%s%s%s", what, code == -EPROTO ? "" : ": ", code == -EPROTO ? "" : strerror(-code));
    return code;
}

static int read_all(int fd, void *buf, size_t len)
{
    for (size_t done = 0; done < len;) {
        ssize_t n = recv(fd, (char *)buf + done, len - done, 0);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return fail(errno == EAGAIN ? -ETIMEDOUT : -errno, "NBD negotiation");
        if (n == 0)
            return fail(-EPROTO, "NBD negotiation: the server hung up");
        done += n;
    }
    return 0;
}

static int write_all(int fd, const void *buf, size_t len)
{
    for (size_t done = 0; done < len;) {
        ssize_t n = send(fd, (const char *)buf + done, len - done, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return fail(-errno, "NBD negotiation");
        done += n;
    }
    return 0;
}

static int connect_unix(const char *path)
{
    struct sockaddr_un sa = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof sa.sun_path)
        return fail(-ENAMETOOLONG, path);
    memcpy(sa.sun_path, path, strlen(path));
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return fail(-errno, "socket");
    if (connect(fd, (struct sockaddr *)&sa, sizeof sa) < 0) {
        int r = fail(-errno, path);
        close(fd);
        return r;
    }
    return fd;
}

static int connect_tcp(const char *host, const char *port)
{
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *list;
    int r = getaddrinfo(host, port, &hints, &list), fd = -1, error = ENOENT;
    if (r != 0) {
        warnx("%s port %s: %s", host, port, gai_strerror(r));
        return -EHOSTUNREACH;
    }
    for (struct addrinfo *a = list; a && fd < 0; a = a->ai_next) {
        fd = socket(a->ai_family, a->ai_socktype | SOCK_CLOEXEC, a->ai_protocol);
        if (fd >= 0 && connect(fd, a->ai_addr, a->ai_addrlen) == 0)
            break;
        error = errno;
        if (fd >= 0)
            close(fd);
        fd = -1;
    }
    freeaddrinfo(list);
    if (fd < 0)
        return fail(-error, host);
    int one = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    return fd;
}

static int send_option(int fd, uint32_t option, const void *data, uint32_t len)
{
    uint8_t head[16];
    put_be64(head, OPT_MAGIC);
    put_be32(head + 8, option);
    put_be32(head + 12, len);
    int r = write_all(fd, head, sizeof head);
    return r < 0 ? r : (len ? write_all(fd, data, len) : 0);
}

/* One reply to `option`: its type; buf holds its data, *len bytes. */
static int read_option_reply(int fd, uint32_t option, uint32_t *type, uint8_t *buf, uint32_t *len)
{
    uint8_t head[20];
    int r = read_all(fd, head, sizeof head);
    if (r < 0)
        return r;
    *type = get_be32(head + 12);
    *len = get_be32(head + 16);
    if (get_be64(head) != OPT_REPLY_MAGIC || get_be32(head + 8) != option ||
        *len > MAX_OPTION_REPLY)
        return fail(-EPROTO, "NBD negotiation: malformed reply to an option");
    return read_all(fd, buf, *len);
}

static int greet(int fd)
{
    uint8_t hello[18], flags[4];
    int r = read_all(fd, hello, sizeof hello);
    if (r < 0)
        return r;
    unsigned server = get_be16(hello + 16);
    if (get_be64(hello) != NBD_MAGIC || get_be64(hello + 8) != OPT_MAGIC ||
        !(server & SERVER_FIXED_NEWSTYLE))
        return fail(-EPROTO, "NBD negotiation: not a fixed newstyle server");
    /* The client's bits have the same meaning and place as the server's. */
    put_be32(flags, server & (SERVER_FIXED_NEWSTYLE | SERVER_NO_ZEROES));
    return write_all(fd, flags, sizeof flags);
}

/* An option without data that the server may refuse. */
static int ask_plain(int fd, uint32_t option, bool *agreed)
{
    uint8_t buf[MAX_OPTION_REPLY];
    uint32_t type, len;
    int r = send_option(fd, option, NULL, 0);
    if (r == 0)
        r = read_option_reply(fd, option, &type, buf, &len);
    if (r == 0)
        *agreed = type == REP_ACK;
    return r;
}

/* Selects one context, which the server must have. */
static int ask_context(int fd, const struct nbd_target *t, struct nbd_export *e)
{
    uint8_t buf[MAX_OPTION_REPLY]; /* the request, then each reply */
    size_t n = strlen(t->export_name), m = strlen(t->context);
    if (n > MAX_EXPORT_NAME || m > MAX_EXPORT_NAME || n + m + 12 > sizeof buf)
        return fail(-ENAMETOOLONG, t->context);
    put_be32(buf, n);
    memcpy(buf + 4, t->export_name, n);
    put_be32(buf + 4 + n, 1);
    put_be32(buf + 8 + n, m);
    memcpy(buf + 12 + n, t->context, m);
    int r = send_option(fd, OPT_SET_META_CONTEXT, buf, n + m + 12);
    for (bool seen = false; r == 0;) {
        uint32_t type, len;
        r = read_option_reply(fd, OPT_SET_META_CONTEXT, &type, buf, &len);
        if (r < 0)
            return r;
        if (type == REP_ACK && seen)
            return 0;
        if (type != REP_META_CONTEXT || len < 4) {
            warnx("export '%s' does not have the context '%s' (reply %#x)", t->export_name,
                  t->context, type);
            return -ENOENT;
        }
        e->context_id = get_be32(buf);
        seen = true;
    }
    return r;
}

static int take_info(const uint8_t *buf, uint32_t len, struct nbd_export *e, bool *seen)
{
    unsigned kind = len >= 2 ? get_be16(buf) : UINT16_MAX;
    if (kind == INFO_EXPORT && len == 12) {
        unsigned flags = get_be16(buf + 10);
        e->size = get_be64(buf + 2);
        e->read_only = flags & FLAG_READ_ONLY;
        e->can_fua = flags & FLAG_SEND_FUA;
        e->multi_conn = flags & FLAG_MULTI_CONN;
        *seen = true;
    } else if (kind == INFO_BLOCK_SIZE && len == 14) {
        e->min_block = get_be32(buf + 2);
    } else if (kind == INFO_EXPORT || kind == INFO_BLOCK_SIZE || len < 2) {
        return fail(-EPROTO, "NBD negotiation: malformed information");
    }
    return 0;
}

static int ask_go(int fd, const char *name, struct nbd_export *e)
{
    uint8_t buf[MAX_OPTION_REPLY]; /* the request, then each reply */
    size_t n = strlen(name);
    if (n > MAX_EXPORT_NAME)
        return fail(-ENAMETOOLONG, name);
    put_be32(buf, n);
    memcpy(buf + 4, name, n);
    put_be16(buf + 4 + n, 1);
    put_be16(buf + 6 + n, INFO_BLOCK_SIZE);
    int r = send_option(fd, OPT_GO, buf, n + 8);
    for (bool seen = false; r == 0;) {
        uint32_t type, len;
        r = read_option_reply(fd, OPT_GO, &type, buf, &len);
        if (r < 0)
            return r;
        if (type == REP_ACK)
            return seen ? 0 : fail(-EPROTO, "NBD negotiation: the export's size is missing");
        if (type != REP_INFO) {
            warnx("export '%s': refused (reply %#x): %.*s", name, type, (int)len, (char *)buf);
            return -ENOENT;
        }
        r = take_info(buf, len, e, &seen);
    }
    return r;
}

int nbd_open(const struct nbd_target *t, struct nbd_export *e)
{
    *e = (struct nbd_export){.min_block = 1};
    int fd = t->socket_path ? connect_unix(t->socket_path) : connect_tcp(t->host, t->port);
    if (fd < 0)
        return fd;
    struct timeval limit = {.tv_sec = HANDSHAKE_TIMEOUT_S};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    int r = greet(fd);
    if (r == 0 && t->extended)
        r = ask_plain(fd, OPT_EXTENDED_HEADERS, &e->extended);
    e->structured = e->extended;
    if (r == 0 && t->structured && !e->extended)
        r = ask_plain(fd, OPT_STRUCTURED_REPLY, &e->structured);
    if (r == 0 && t->context)
        r = ask_context(fd, t, e);
    if (r == 0)
        r = ask_go(fd, t->export_name, e);
    if (r < 0) {
        close(fd);
        return r;
    }
    return fd;
}

void nbd_close(int fd, bool extended)
{
    uint8_t disc[32] = {0};
    put_be32(disc, extended ? EXTENDED_REQUEST_MAGIC : REQUEST_MAGIC);
    put_be16(disc + 6, CMD_DISC);
    /* The server may be gone: nothing depends on this. */
    (void)!send(fd, disc, extended ? 32 : 28, MSG_NOSIGNAL | MSG_DONTWAIT);
    close(fd);
}
