/* SPDX-License-Identifier: Apache-2.0 */
/* Fuzzer for the NBD server: a client sends the bytes of the input and hangs up; whatever they are,
 * the connection ends, and nothing is leaked or touched out of bounds. The first byte says where
 * they begin: 0 at the handshake's first byte; among the options, 3 with structured replies and 5
 * with extended headers agreed on; 1 in transmission with simple replies; with all metadata
 * contexts 2 in transmission with structured replies and 4 with extended headers. scripts/fuzz.sh
 * builds it; what tests/fuzz/make_corpus.py writes is where it begins.
 *
 * Everything is in this process: one loop, a node with a bitmap, a socket pair. From 6 on the first
 * byte means the same again, but the node is a file that is partly written, not null-co. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/log.h"
#include "base/mem.h"
#include "block/node.h"
#include "block/root.h"
#include "block/tracker.h"
#include "event/event.h"
#include "export/nbd/nbd.h"
#include "io/io.h"
#include "schema/types.h"

#define DISK 16777216
#define DATA 262144 /* of which so much is written, from DATA on */
#define TEXT(x) #x
#define NUMBER(x) TEXT(x)
#define MUST(x)                                                                                    \
    do {                                                                                           \
        if (!(x)) {                                                                                \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #x);                                \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

struct input {
    struct io *io;
    const uint8_t *data;
    size_t len;
};

/* The file is the same for all inputs, and always as new: what is below it goes by its number. */
static int fresh_file(void)
{
    static char data[DATA];
    static int fd = -1;
    if (fd < 0)
        fd = memfd_create("fuzz_nbd", MFD_CLOEXEC);
    memset(data, 'd', sizeof data);
    MUST(fd >= 0 && ftruncate(fd, 0) == 0 && ftruncate(fd, DISK) == 0);
    MUST(pwrite(fd, data, sizeof data, DATA) == DATA);
    return fd;
}

static struct node *open_node(struct graph *g, bool file)
{
    char text[200];
    if (file)
        snprintf(text, sizeof text,
                 "{\"driver\":\"file\",\"node-name\":\"n\",\"filename\":\"/proc/self/fd/%d\","
                 "\"locking\":\"off\",\"discard\":\"unmap\"}",
                 fresh_file());
    else
        snprintf(text, sizeof text,
                 "{\"driver\":\"null-co\",\"node-name\":\"n\",\"size\":" NUMBER(
                     DISK) ",\"read-zeroes\":true}");
    struct arena a = {0};
    struct tide_error err;
    struct node *n;
    void *o;
    json_t *j = json_loads(text, 0, NULL);
    MUST(j && schema_parse(&q_blockdev_options_type, j, &a, 0, &o, &err) == 0);
    MUST(graph_add(g, o, &n, &err) == 0);
    json_decref(j);
    arena_free(&a);
    return n;
}

static struct dirty_bitmap *open_bitmap(struct graph *g, struct node *n)
{
    struct tide_error err;
    struct dirty_bitmap *b;
    struct quiesce *q;
    MUST(dirty_bitmap_new(n, "b", 4096, true, false, &b, &err) == 0);
    MUST(quiesce_begin(g, &n, 1, QUIESCE_WRITES, &q, &err) == 0);
    MUST(tracker_attach(b, n) == 0);
    quiesce_end(q);
    return b;
}

static void put(int fd, const void *data, size_t len)
{
    MUST(write(fd, data, len) == (ssize_t)len);
}

static void option(int fd, uint32_t opt, const void *data, uint32_t len)
{
    uint8_t head[NBD_OPTION_LEN];
    put_be64(head, NBD_OPTION_MAGIC);
    put_be32(head + 8, opt);
    put_be32(head + 12, len);
    put(fd, head, sizeof head);
    put(fd, data, len);
}

/* What the client has to say before the input begins. */
static void prelude(int fd, unsigned how)
{
    static const uint8_t meta[] = "\0\0\0\1n\0\0\0\3\0\0\0\17base:allocation\0\0\0\25"
                                  "qemu:allocation-depth\0\0\0\23qemu:dirty-bitmap:b";
    static const uint8_t go[] = "\0\0\0\1n\0"; /* and the literal's own zero */
    uint8_t flags[4];
    put_be32(flags, NBD_FIXED_NEWSTYLE | NBD_NO_ZEROES);
    if (how == 0)
        return;
    put(fd, flags, sizeof flags);
    if (how > 3)
        option(fd, NBD_OPT_EXTENDED_HEADERS, "", 0);
    else if (how > 1)
        option(fd, NBD_OPT_STRUCTURED_REPLY, "", 0);
    if (how == 2 || how == 4)
        option(fd, NBD_OPT_SET_META_CONTEXT, meta, sizeof meta - 1);
    if (how != 3 && how != 5)
        option(fd, NBD_OPT_GO, go, sizeof go);
}

/* The client: sends all, hangs up one way, reads until the server has gone. */
static void talk(struct io *io, struct nbd_server *srv, const struct input *in)
{
    static char waste[65536];
    int fd[2], room = 4 << 20;
    struct io_sock *s;
    MUST(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fd) == 0);
    setsockopt(fd[0], SOL_SOCKET, SO_SNDBUF, &room, sizeof room);
    prelude(fd[0], in->data[0] % 6);
    /* What does not fit into the socket is not said: the input is small. */
    if (send(fd[0], in->data + 1, in->len - 1, MSG_DONTWAIT) < 0)
        MUST(errno == EAGAIN || in->len == 1);
    shutdown(fd[0], SHUT_WR);
    MUST(io_sock_from_fds(io, fd[1], fd[1], &s) == 0);
    MUST(nbd_server_adopt(srv, s) == 0);
    while (srv->n_conns > 0) {
        while (recv(fd[0], waste, sizeof waste, MSG_DONTWAIT) > 0)
            continue;
        loop_pause();
    }
    close(fd[0]);
}

static void gone(struct nbd_export *e)
{
}

static void fuzz_main(void *arg)
{
    struct input *in = arg;
    struct tide_error err;
    struct io_addr addr = {.type = IO_ADDR_UNIX};
    struct nbd_export e = {.name = "n",
                           .description = "d",
                           .serial = 1,
                           .writable = true,
                           .allocation_depth = true,
                           .gone = gone};
    struct dirty_bitmap *b;
    struct nbd_server *srv;
    struct graph *g;
    snprintf(addr.path, sizeof addr.path, "@fuzz_nbd.%d", (int)getpid());
    MUST(graph_new(in->io, &g) == 0);
    struct node *n = open_node(g, in->data[0] / 6 % 2);
    b = open_bitmap(g, n);
    MUST(nbd_bitmaps_reserve(&e, 1) == 0);
    nbd_bitmaps_add(&e, b);
    MUST(root_new(n, ROOT_READ | ROOT_WRITE, "export 'n'", &e.root, &err) == 0);
    MUST(nbd_server_open(g, &addr, 0, &srv, &err) == 0);
    nbd_export_attach(srv, &e);
    talk(in->io, srv, in);
    MUST(nbd_export_shut(srv, &e));
    nbd_server_shut(srv);
    nbd_server_close(srv);
    root_free(e.root);
    nbd_bitmaps_free(&e);
    graph_close_all(g);
    graph_free(g);
    io_stop(in->io);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    struct tide_error err;
    struct input in = {.data = data, .len = len};
    if (len == 0)
        return 0;
    MUST(io_new(IO_PORTABLE, 1, &in.io, &err) == 0);
    MUST(io_run(in.io, fuzz_main, &in) == 0);
    io_free(in.io);
    return 0;
}
