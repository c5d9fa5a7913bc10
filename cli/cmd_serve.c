/* SPDX-License-Identifier: Apache-2.0 */
/* serve and stop.
 *
 * `serve` only writes the daemon's command line and starts it: everything it sets up could be typed
 * by hand, with the same options as for qemu-storage-daemon. */
#include "base/mem.h"
#include "cli/cli.h"
#include "cli/view.h"
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define NODE_NAME_MAX 31
#define STOP_TIMEOUT_MS 60000

struct served {
    char node[NODE_NAME_MAX + 1];
    char *path; /* absolute */
};

struct serve {
    struct served *disks;
    size_t n;
    const char *format;
    bool read_only;
    char *qmp, *nbd, *pidfile; /* paths; nbd NULL: TCP */
    char *host, *port;         /* NULL: UNIX */
    char **argv;
    size_t n_argv;
};

static void serve_free(struct serve *s)
{
    for (size_t i = 0; i < s->n; i++)
        mem_free(s->disks[i].path);
    for (size_t i = 0; i < s->n_argv; i++)
        mem_free(s->argv[i]);
    mem_free(s->disks);
    mem_free(s->argv);
    mem_free(s->qmp);
    mem_free(s->nbd);
    mem_free(s->pidfile);
    mem_free(s->host);
}

/* ---- names ---- */

static bool is_node_name(const char *s, size_t len)
{
    if (len == 0 || len > NODE_NAME_MAX || !isalpha((unsigned char)s[0]))
        return false;
    for (size_t i = 0; i < len; i++)
        if (!isalnum((unsigned char)s[i]) && !strchr("-._", s[i]))
            return false;
    return true;
}

static bool is_taken(const struct serve *s, const char *node)
{
    for (size_t i = 0; i < s->n; i++)
        if (strcmp(s->disks[i].node, node) == 0)
            return true;
    return false;
}

/* A name from the file's: without directory and last extension, other characters replaced by '-',
 * a number behind it if it is taken. */
static void derive_name(const struct serve *s, const char *path, char out[NODE_NAME_MAX + 1])
{
    const char *base = strrchr(path, '/') ? strrchr(path, '/') + 1 : path;
    const char *dot = strrchr(base, '.');
    size_t len = dot && dot > base ? (size_t)(dot - base) : strlen(base);
    char stem[NODE_NAME_MAX - 3]; /* room for "-999" */
    size_t n = 0;
    if (!isalpha((unsigned char)base[0]))
        n = (size_t)snprintf(stem, sizeof stem, "disk-");
    for (size_t i = 0; i < len && n + 1 < sizeof stem; i++)
        stem[n++] = isalnum((unsigned char)base[i]) || strchr("-._", base[i]) ? base[i] : '-';
    stem[n] = '\0';
    snprintf(out, NODE_NAME_MAX + 1, "%s", stem);
    for (unsigned i = 2; is_taken(s, out) && i < 1000; i++)
        snprintf(out, NODE_NAME_MAX + 1, "%s-%u", stem, i);
}

/* IMAGE or NAME=IMAGE. A file that is really called "a=b" is taken as one. */
static int name_disk(struct cli *c, struct serve *s, const char *arg, struct served *d)
{
    const char *eq = strchr(arg, '=');
    const char *path = arg;
    if (eq && access(arg, F_OK) != 0) {
        if (!is_node_name(arg, (size_t)(eq - arg)))
            return cli_usage(c,
                             "'%.*s' cannot be a name: a letter, then letters, digits and -._, "
                             "at most %d",
                             (int)(eq - arg), arg, NODE_NAME_MAX);
        memcpy(d->node, arg, (size_t)(eq - arg));
        path = eq + 1;
    } else {
        derive_name(s, path, d->node);
    }
    if (is_taken(s, d->node))
        return cli_usage(c, "two disks with the name '%s'", d->node);
    d->path = realpath(path, NULL);
    if (d->path)
        return CLI_DONE;
    cli_error("cannot open '%s': %s", path, tide_strerror(errno));
    if (errno == ENOENT)
        cli_hint("'truncate -s 10G %s' makes an empty disk", path);
    return CLI_FAILED;
}

/* Serving the container as if it were the disk would let a guest overwrite it. Guessing the format
 * from the first bytes is no way out: a guest writes those. So whoever starts it has to say. */
static int check_format(const char *path, bool format_given)
{
    char magic[4] = "";
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) {
        cli_error("cannot open '%s': %s", path, tide_strerror(errno));
        return CLI_FAILED;
    }
    ssize_t n = pread(fd, magic, sizeof magic, 0);
    close(fd);
    if (n == (ssize_t)sizeof magic && memcmp(magic, "QFI\xfb", 4) == 0 && !format_given) {
        cli_error("'%s' begins like a qcow2 image", path);
        cli_hint("--format qcow2 or --format raw says how to serve it");
        return CLI_USAGE;
    }
    return CLI_DONE;
}

static int take_disks(struct cli *c, struct serve *s)
{
    const char *format = cli_option(c, "format");
    if (format && strcmp(format, "raw") != 0 && strcmp(format, "qcow2") != 0)
        return cli_usage(c, "the format '%s' is not known", format);
    s->format = format ? format : "raw";
    s->read_only = cli_option(c, "read-only");
    s->disks = cli_alloc(c->n_args, sizeof *s->disks);
    for (size_t i = 0; i < c->n_args; i++) {
        struct served d = {0};
        int code = name_disk(c, s, c->args[i], &d);
        if (code != CLI_DONE)
            return code;
        s->disks[s->n++] = d;
        code = check_format(d.path, format != NULL);
        if (code != CLI_DONE)
            return code;
    }
    return CLI_DONE;
}

/* ---- places ---- */

static int take_places(struct cli *c, struct serve *s)
{
    const char *dir = cli_option(c, "dir"), *listen = cli_option(c, "listen");
    if (dir && mkdir(dir, 0700) < 0 && errno != EEXIST) {
        cli_error("cannot make '%s': %s", dir, tide_strerror(errno));
        return CLI_FAILED;
    }
    const char *slash = strrchr(c->socket, '/');
    char *own = dir     ? realpath(dir, NULL)
                : slash ? cli_printf("%.*s", (int)(slash - c->socket), c->socket)
                        : cli_strdup(".");
    if (!own) {
        cli_error("cannot use '%s': %s", dir, tide_strerror(errno));
        return CLI_FAILED;
    }
    s->qmp = dir && !cli_option(c, "socket") ? cli_printf("%s/tidemark.sock", own)
                                             : cli_strdup(c->socket);
    s->pidfile = cli_printf("%s/tidemark.pid", own);
    if (!listen || strcmp(listen, "unix") == 0)
        s->nbd = cli_printf("%s/tidemark-nbd.sock", own);
    mem_free(own);
    if (s->nbd)
        return CLI_DONE;
    s->host = cli_strdup(listen);
    char *colon = strrchr(s->host, ':');
    if (!colon || colon == s->host || !colon[1] ||
        strspn(colon + 1, "0123456789") != strlen(colon + 1))
        return cli_usage(c, "'--listen %s' is neither 'unix' nor HOST:PORT", listen);
    *colon = '\0';
    s->port = colon + 1;
    if (s->host[0] == '[' && colon[-1] == ']') { /* an IPv6 address */
        colon[-1] = '\0';
        memmove(s->host, s->host + 1, strlen(s->host));
    }
    return CLI_DONE;
}

/* ---- the daemon's command line ---- */

static void add_arg(struct serve *s, char *arg)
{
    s->argv = cli_grow(s->argv, s->n_argv + 2, sizeof *s->argv);
    s->argv[s->n_argv++] = arg;
    s->argv[s->n_argv] = NULL;
}

static void add_option(struct serve *s, const char *option, json_t *value)
{
    char *text = json_dumps(value, JSON_COMPACT);
    json_decref(value);
    add_arg(s, cli_strdup(option));
    add_arg(s, cli_strdup(text ? text : ""));
    free(text);
}

static void add_disk(struct serve *s, const struct served *d)
{
    json_t *file = cli_pack("{s:s, s:s, s:s, s:b}", "driver", "file", "filename", d->path,
                            "discard", "unmap", "read-only", (int)s->read_only);
    add_option(s, "--blockdev",
               cli_pack("{s:s, s:s, s:s, s:b, s:o}", "driver", s->format, "node-name", d->node,
                        "discard", "unmap", "read-only", (int)s->read_only, "file", file));
    add_option(s, "--export",
               cli_pack("{s:s, s:s, s:s, s:s, s:b}", "type", "nbd", "id", d->node, "node-name",
                        d->node, "name", d->node, "writable", (int)!s->read_only));
}

/* A comma in a value of a "key=value,..." option is written twice. */
static char *comma_twice(const char *text)
{
    char *out = cli_alloc(strlen(text) * 2 + 1, 1), *p = out;
    for (; *text; text++) {
        *p++ = *text;
        if (*text == ',')
            *p++ = ',';
    }
    return out;
}

static void build_argv(struct serve *s, const char *binary)
{
    add_arg(s, cli_strdup(binary));
    mem_autofree char *qmp = comma_twice(s->qmp);
    add_arg(s, cli_strdup("--chardev"));
    add_arg(s, cli_printf("socket,id=monitor,path=%s,server=on,wait=off", qmp));
    add_arg(s, cli_strdup("--monitor"));
    add_arg(s, cli_strdup("chardev=monitor"));
    add_arg(s, cli_strdup("--nbd-server"));
    if (s->nbd) {
        mem_autofree char *nbd = comma_twice(s->nbd);
        add_arg(s, cli_printf("addr.type=unix,addr.path=%s", nbd));
    } else {
        mem_autofree char *host = comma_twice(s->host);
        add_arg(s, cli_printf("addr.type=inet,addr.host=%s,addr.port=%s", host, s->port));
    }
    for (size_t i = 0; i < s->n; i++)
        add_disk(s, &s->disks[i]);
    add_arg(s, cli_strdup("--pidfile"));
    add_arg(s, cli_strdup(s->pidfile));
    add_arg(s, cli_strdup("--daemonize"));
}

/* tidemarkd in the directory of `program`; NULL if there is none. */
static char *daemon_beside(const char *program)
{
    const char *slash = strrchr(program, '/');
    if (!slash)
        return NULL;
    char *path = cli_printf("%.*s/tidemarkd", (int)(slash - program), program);
    if (access(path, X_OK) == 0)
        return path;
    mem_free(path);
    return NULL;
}

/* Beside this program as it was called (which may be a link), beside the file that it is, or
 * wherever PATH says. */
static char *find_daemon(void)
{
    const char *called = (const char *)getauxval(AT_EXECFN);
    char *path = called ? daemon_beside(called) : NULL;
    if (path)
        return path;
    char self[PATH_MAX];
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    self[n > 0 ? n : 0] = '\0';
    path = daemon_beside(self);
    return path ? path : cli_strdup("tidemarkd");
}

static int start(struct serve *s)
{
    pid_t pid = fork();
    if (pid < 0) {
        cli_error("cannot start a process: %s", tide_strerror(errno));
        return CLI_FAILED;
    }
    if (pid == 0) {
        execvp(s->argv[0], s->argv);
        cli_error("cannot run '%s': %s", s->argv[0], tide_strerror(errno));
        _exit(127);
    }
    int status;
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
        ;
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0)
        return CLI_DONE;
    if (WIFEXITED(status) && WEXITSTATUS(status) == 127)
        cli_hint("install tidemarkd beside this program or in a directory of PATH");
    else
        cli_error("the daemon could not start; its own words stand above");
    return CLI_FAILED;
}

/* ---- what to do next ---- */

static char *uri(const struct serve *s, const char *node)
{
    if (s->nbd)
        return cli_printf("nbd+unix:///%s?socket=%s", node, s->nbd);
    bool ipv6 = strchr(s->host, ':');
    return cli_printf("nbd://%s%s%s:%s/%s", ipv6 ? "[" : "", s->host, ipv6 ? "]" : "", s->port,
                      node);
}

static int print_json(const struct serve *s)
{
    json_t *list = cli_pack("[]");
    for (size_t i = 0; i < s->n; i++) {
        mem_autofree char *u = uri(s, s->disks[i].node);
        json_array_append_new(list, cli_pack("{s:s, s:s, s:s}", "node", s->disks[i].node, "file",
                                             s->disks[i].path, "uri", u));
    }
    return cli_print_json(
        cli_pack("{s:s, s:s, s:o}", "socket", s->qmp, "pidfile", s->pidfile, "disks", list));
}

static void print_next(struct cli *c, const struct serve *s)
{
    const char *node = s->disks[0].node;
    for (size_t i = 0; i < s->n; i++) {
        mem_autofree char *u = uri(s, s->disks[i].node);
        printf("%s%s  %s  %s\n", s->disks[i].node, s->read_only ? " (read-only)" : "", u,
               s->disks[i].path);
    }
    printf("QMP socket  %s\n\nNext:\n", s->qmp);
    if (strcmp(s->qmp, c->socket) != 0)
        printf("  export TIDEMARK_SOCKET=%s\n", s->qmp);
    printf("  tidemark status\n"
           "  tidemark bitmap add %s b0 && tidemark bitmap map %s b0\n"
           "  tidemark backup --to DIR %s\n"
           "  tidemark stop\n",
           node, node, node);
}

static bool someone_listens(const char *path)
{
    struct tide_error err;
    struct client *other;
    if (client_open(path, &other, &err) < 0)
        return false;
    client_close(other);
    return true;
}

static int serve(struct cli *c, struct serve *s)
{
    int code = take_disks(c, s);
    if (code == CLI_DONE)
        code = take_places(c, s);
    if (code != CLI_DONE)
        return code;
    if (someone_listens(s->qmp)) {
        cli_error("a daemon runs already at '%s'", s->qmp);
        cli_hint("'tidemark stop' ends it; --dir starts another one in a directory of its own");
        return CLI_FAILED;
    }
    mem_autofree char *binary = find_daemon();
    build_argv(s, binary);
    code = start(s);
    if (code == CLI_DONE && c->json)
        return print_json(s);
    if (code == CLI_DONE)
        print_next(c, s);
    return code;
}

int cmd_serve(struct cli *c)
{
    struct serve s = {0};
    int code = serve(c, &s);
    serve_free(&s);
    return code;
}

int cmd_stop(struct cli *c)
{
    struct tide_error err;
    int code = cli_connect(c);
    if (code != CLI_DONE)
        return code;
    int r = client_quit(c->client, STOP_TIMEOUT_MS, &err);
    return r < 0 ? cli_fail(&err) : CLI_DONE;
}
