/* SPDX-License-Identifier: Apache-2.0 */
/* Reading: getopt_long splits, keyval_parse turns key=value text into JSON, the schema checks it.
 * What has no schema of its own (--chardev, --monitor) is read member by member here. */
#include "tidemarkd/options.h"

#include <errno.h>
#include <getopt.h>
#include <jansson.h>
#include <stdio.h>
#include <string.h>
#include <sys/queue.h>
#include <unistd.h>

#include "base/mem.h"
#include "block/node.h"
#include "export/export.h"
#include "qmp/commands.h"
#include "qmp/instance.h"
#include "qmp/monitor.h"
#include "qmp/scan.h"
#include "schema/schema.h"
#include "schema/types.h"

#define JSON_DEPTH 128u /* of options given as JSON: what reads them recurses */

#define SHOWN_MAX 100u

const char options_help[] =
    "Usage: tidemarkd [OPTION]...\n"
    "Serve disk images over NBD, track what changes, back them up; controlled over QMP.\n"
    "\n"
    "Options are carried out in the order given; lists of keys may also be JSON objects.\n"
    "\n"
    "  --blockdev driver=DRIVER,node-name=NAME[,KEY=VALUE...]\n"
    "                          open a block node (blockdev-add)\n"
    "  --chardev socket,id=ID,path=PATH | host=HOST,port=PORT[,server=on]\n"
    "  --chardev stdio,id=ID   where a monitor listens\n"
    "  --monitor chardev=ID[,pretty=on]\n"
    "                          QMP for any number of clients on that chardev\n"
    "  --nbd-server addr.type=unix,addr.path=PATH[,max-connections=N]\n"
    "  --nbd-server addr.type=inet,addr.host=HOST,addr.port=PORT[,max-connections=N]\n"
    "                          listen for NBD clients\n"
    "  --export nbd,id=ID,node-name=NODE[,name=NAME][,writable=on][,bitmaps.0=BITMAP]\n"
    "                          export a node (block-export-add)\n"
    "  --object iothread,id=ID give one of the loops a name, for exports\n"
    "  --object throttle-group,id=ID,limits.iops-total=N[,limits.KEY=N...]\n"
    "                          limits that nodes of driver throttle share\n"
    "  --daemonize             go to the background once everything is up\n"
    "  --pidfile FILE          write the process id there\n"
    "  --engine auto|io_uring|portable\n"
    "                          how to do I/O (default: io_uring where it is allowed)\n"
    "  --loops N               number of threads that serve exports (default: one a CPU, at most "
    "8)\n"
    "  -h, --help              this text\n"
    "  -V, --version           version\n"
    "\n"
    "Example:\n"
    "  tidemarkd --blockdev driver=file,node-name=f0,filename=disk.raw \\\n"
    "    --blockdev driver=raw,node-name=disk0,file=f0 \\\n"
    "    --nbd-server addr.type=unix,addr.path=nbd.sock \\\n"
    "    --export nbd,id=e0,node-name=disk0,writable=on \\\n"
    "    --chardev socket,id=qmp,path=qmp.sock,server=on,wait=off --monitor chardev=qmp\n";

enum step_kind { STEP_BLOCKDEV, STEP_NBD_SERVER, STEP_EXPORT, STEP_OBJECT, STEP_MONITOR };

struct chardev {
    char id[64];
    bool stdio, server, used;
    struct io_addr addr;
    struct chardev *next;
};

struct step {
    enum step_kind kind;
    const char *option; /* as typed, for messages */
    void *args;
    struct chardev *chardev;
    bool pretty;
    STAILQ_ENTRY(step) link;
};

struct options {
    struct arena arena;
    STAILQ_HEAD(, step) steps;
    struct chardev *chardevs;
};

/* ------------------------------------------------------------------ chardev and monitor */

static int take_string(json_t *o, const char *key, char *to, size_t size, bool needed,
                       struct tide_error *err)
{
    json_t *v = json_object_get(o, key);
    if (!v)
        return needed ? tide_fail(err, -EINVAL, "'%s' is missing", key) : 0;
    if (!json_is_string(v) || strlen(json_string_value(v)) >= size)
        return tide_fail(err, -EINVAL, "'%s' is not a text of at most %zu bytes", key, size - 1);
    strcpy(to, json_string_value(v));
    json_object_del(o, key);
    return 1;
}

static int take_bool(json_t *o, const char *key, bool *to, struct tide_error *err)
{
    char word[8] = "";
    json_t *v = json_object_get(o, key);
    if (json_is_boolean(v)) {
        *to = json_boolean_value(v);
        json_object_del(o, key);
        return 0;
    }
    int r = take_string(o, key, word, sizeof word, false, err);
    if (r <= 0)
        return r;
    *to = !strcmp(word, "on") || !strcmp(word, "yes") || !strcmp(word, "true");
    if (!*to && strcmp(word, "off") && strcmp(word, "no") && strcmp(word, "false"))
        return tide_fail(err, -EINVAL, "'%s' is '%s': say on or off", key, word);
    return 0;
}

static int check_rest(json_t *o, struct tide_error *err)
{
    const char *key = json_object_iter_key(json_object_iter(o));
    return key ? tide_fail(err, -EINVAL, "'%s' is unexpected", key) : 0;
}

static int read_socket(json_t *o, struct chardev *c, struct tide_error *err)
{
    bool wait = false, abstract = false;
    char path[sizeof c->addr.path - 1] = "";
    int r = take_string(o, "path", path, sizeof path, false, err);
    if (r > 0) {
        c->addr.type = IO_ADDR_UNIX;
        r = take_bool(o, "abstract", &abstract, err);
        snprintf(c->addr.path, sizeof c->addr.path, "%s%s", abstract ? "@" : "", path);
    } else if (r == 0) {
        c->addr.type = IO_ADDR_TCP;
        r = take_string(o, "port", c->addr.port, sizeof c->addr.port, false, err);
        if (r == 0)
            return tide_fail(err, -EINVAL, "a socket needs 'path' or 'port'");
        if (r > 0)
            r = take_string(o, "host", c->addr.host, sizeof c->addr.host, false, err);
        if (r >= 0)
            r = take_bool(o, "ipv4", &c->addr.ipv4, err);
        if (r >= 0)
            r = take_bool(o, "ipv6", &c->addr.ipv6, err);
    }
    if (r >= 0)
        r = take_bool(o, "server", &c->server, err);
    if (r >= 0) /* we never wait for a client: accepted for QSD's sake */
        r = take_bool(o, "wait", &wait, err);
    return r < 0 ? r : 0;
}

static int read_chardev(struct options *opts, json_t *o, struct tide_error *err)
{
    char backend[32];
    struct chardev *c = arena_alloc(&opts->arena, sizeof *c);
    if (!c)
        return tide_fail(err, -ENOMEM, "no memory");
    int r = take_string(o, "backend", backend, sizeof backend, true, err);
    if (r > 0)
        r = take_string(o, "id", c->id, sizeof c->id, true, err);
    if (r < 0)
        return r;
    for (struct chardev *d = opts->chardevs; d; d = d->next) {
        if (!strcmp(d->id, c->id))
            return tide_fail(err, -EEXIST, "a chardev with id '%s' was given already", c->id);
    }
    if (!strcmp(backend, "stdio")) {
        bool signal;
        c->stdio = true;
        r = take_bool(o, "signal", &signal, err);
    } else if (!strcmp(backend, "socket")) {
        r = read_socket(o, c, err);
    } else {
        r = tide_fail(err, -ENOTSUP, "chardev '%s' is not offered: use socket or stdio", backend);
    }
    if (r == 0)
        r = check_rest(o, err);
    c->next = opts->chardevs;
    opts->chardevs = c;
    return r;
}

static int read_monitor(struct options *opts, struct step *s, json_t *o, struct tide_error *err)
{
    char id[64], mode[16] = "control", name[64];
    int r = take_string(o, "chardev", id, sizeof id, true, err);
    if (r > 0)
        r = take_string(o, "mode", mode, sizeof mode, false, err);
    if (r >= 0)
        r = take_string(o, "id", name, sizeof name, false, err);
    if (r >= 0)
        r = take_bool(o, "pretty", &s->pretty, err);
    if (r >= 0)
        r = check_rest(o, err);
    if (r < 0)
        return r;
    if (strcmp(mode, "control"))
        return tide_fail(err, -ENOTSUP, "monitor mode '%s' is not offered: use control (QMP)",
                         mode);
    for (s->chardev = opts->chardevs; s->chardev; s->chardev = s->chardev->next) {
        if (!strcmp(s->chardev->id, id))
            break;
    }
    if (!s->chardev)
        return tide_fail(err, -ENOENT, "chardev '%s' not found: give --chardev before --monitor",
                         id);
    if (s->chardev->used)
        return tide_fail(err, -EBUSY, "chardev '%s' has a monitor already", id);
    s->chardev->used = true;
    return 0;
}

/* ------------------------------------------------------------------ one option */

static const struct option long_options[] = {
    {"blockdev", required_argument, NULL, 'b'},
    {"chardev", required_argument, NULL, 'c'},
    {"daemonize", no_argument, NULL, 'd'},
    {"engine", required_argument, NULL, 'E'},
    {"export", required_argument, NULL, 'e'},
    {"help", no_argument, NULL, 'h'},
    {"loops", required_argument, NULL, 'l'},
    {"monitor", required_argument, NULL, 'm'},
    {"nbd-server", required_argument, NULL, 'n'},
    {"object", required_argument, NULL, 'o'},
    {"pidfile", required_argument, NULL, 'p'},
    {"version", no_argument, NULL, 'V'},
    {NULL, 0, NULL, 0},
};

static const char *option_name(int c)
{
    for (int i = 0; long_options[i].name; i++) {
        if (long_options[i].val == c)
            return long_options[i].name;
    }
    return "?";
}

struct option_kind {
    int c;
    enum step_kind kind;
    const char *implied;
    const struct schema_type *type; /* NULL: read by hand */
};

static const struct option_kind kinds[] = {
    {'b', STEP_BLOCKDEV, "driver", &q_blockdev_options_type},
    {'e', STEP_EXPORT, "type", &q_block_export_options_type},
    {'n', STEP_NBD_SERVER, NULL, &q_nbd_server_options_type},
    {'o', STEP_OBJECT, "qom-type", &q_object_options_type},
    {'m', STEP_MONITOR, "chardev", NULL},
    {'c', STEP_MONITOR, "backend", NULL},
};

/* JSON on the command line may have single quotes, as on a monitor: the same scanner reads it. */
static int scan_json(struct options *opts, const char *text, const char **out,
                     struct tide_error *err)
{
    size_t len = strlen(text);
    struct scan s;
    scan_init(&s);
    s.max_depth = JSON_DEPTH;
    int r = scan_next(&s, &text, &len, err);
    if (r == 0 || (r > 0 && text[strspn(text, " \t\r\n")]))
        r = tide_fail(err, -EINVAL, "options in JSON: %s",
                      r == 0 ? "a bracket or quote is not closed"
                             : "there is something behind the object");
    else if (r > 0)
        r = (*out = arena_strndup(&opts->arena, s.value, s.value_len))
                ? 0
                : tide_fail(err, -ENOMEM, "no memory");
    scan_fini(&s);
    return r;
}

/* Old scripts write `server,nowait` for `server=on,wait=off`. */
static int spell_out_flags(struct options *opts, const char *text, const char **out,
                           struct tide_error *err)
{
    char *p = arena_alloc(&opts->arena, strlen(text) * 5 + 1); /* at most ",=off" for each flag */
    if (!p)
        return tide_fail(err, -ENOMEM, "no memory");
    *out = p;
    for (const char *s = text; *s;) {
        size_t n = strcspn(s, ",");
        while (s[n] == ',' && s[n + 1] == ',') /* a comma inside a value is doubled */
            n += 2 + strcspn(s + n + 2, ",");
        bool flag = n && s != text && !memchr(s, '=', n),
             off = flag && n > 2 && !strncmp(s, "no", 2);
        const char *value = off ? "=off" : flag ? "=on" : "";
        p = mempcpy(p, off ? s + 2 : s, off ? n - 2 : n);
        p = mempcpy(p, value, strlen(value));
        s += n;
        if (*s == ',')
            *p++ = *s++;
    }
    *p = '\0';
    return 0;
}

static int read_text(struct options *opts, const struct option_kind *k, const char *text,
                     json_t **out, struct tide_error *err)
{
    int r = 0;
    if (text[0] == '{')
        r = scan_json(opts, text, &text, err);
    else if (!k->type)
        r = spell_out_flags(opts, text, &text, err);
    return r < 0 ? r : keyval_parse(text, k->implied, out, err);
}

/* How much of an option's text a message repeats: its beginning, up to a whole character. */
static int shown(const char *text)
{
    size_t n = strnlen(text, SHOWN_MAX);
    while (n && ((unsigned char)text[n] & 0xC0) == 0x80)
        n--;
    return (int)n;
}

static int read_keyval(struct options *opts, const struct option_kind *k, const char *text,
                       struct tide_error *err)
{
    json_t *o = NULL;
    struct step *s = arena_alloc(&opts->arena, sizeof *s);
    int r = s ? read_text(opts, k, text, &o, err) : tide_fail(err, -ENOMEM, "no memory");
    if (r == 0) {
        s->kind = k->kind;
        s->option = option_name(k->c);
        if (k->c == 'c')
            r = read_chardev(opts, o, err);
        else if (k->c == 'm')
            r = read_monitor(opts, s, o, err);
        else
            r = schema_parse(k->type, o, &opts->arena, text[0] == '{' ? 0 : SCHEMA_KEYVAL, &s->args,
                             err);
    }
    if (r < 0)
        tide_error_prefix(err, "--%s %.*s%s: ", option_name(k->c), shown(text), text,
                          text[shown(text)] ? "..." : "");
    else if (k->c != 'c')
        STAILQ_INSERT_TAIL(&opts->steps, s, link);
    json_decref(o);
    return r;
}

static int read_engine(const char *word, struct start *start, struct tide_error *err)
{
    static const char *const words[] = {
        [IO_AUTO] = "auto", [IO_URING] = "io_uring", [IO_PORTABLE] = "portable"};
    for (unsigned i = 0; i < 3; i++) {
        if (!strcmp(word, words[i])) {
            start->engine = (enum io_kind)i;
            return 0;
        }
    }
    return tide_fail(err, -EINVAL, "--engine '%s' is not known: use auto, io_uring or portable",
                     word);
}

static int read_loops(const char *word, struct start *start, struct tide_error *err)
{
    char *end;
    errno = 0;
    unsigned long n = strtoul(word, &end, 10);
    if (errno || *end || end == word || n < 1 || n > 64)
        return tide_fail(err, -EINVAL, "--loops '%s' is not a number from 1 to 64", word);
    start->n_loops = (unsigned)n;
    return 0;
}

static int read_option(struct options *opts, int c, const char *arg, struct start *start,
                       struct tide_error *err)
{
    switch (c) {
    case 'h':
        start->help = true;
        return 0;
    case 'V':
        start->version = true;
        return 0;
    case 'd':
        start->daemonize = true;
        return 0;
    case 'p':
        start->pidfile = arg;
        return 0;
    case 'E':
        return read_engine(arg, start, err);
    case 'l':
        return read_loops(arg, start, err);
    default:
        for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++) {
            if (kinds[i].c == c)
                return read_keyval(opts, &kinds[i], arg, err);
        }
        return tide_fail(err, -EINVAL, "unknown option");
    }
}

static int bad_option(int argc, char **argv, int c, struct tide_error *err)
{
    const char *word = optind > 0 && optind <= argc ? argv[optind - 1] : "?";
    if (c == ':')
        return tide_fail(err, -EINVAL, "option '%s' needs a value; see --help", word);
    return tide_fail(err, -EINVAL, "option '%s' is not known; see --help", word);
}

/* A daemon in the background leaves this directory, and at its end has to find its sockets again.
 * One whose full path is too long for a socket's address stays as it was typed. */
static const char *full_path(struct options *opts, const char *path)
{
    char cwd[sizeof(struct io_addr)];
    size_t max = sizeof(((struct io_addr *)0)->path);
    if (!path[0] || path[0] == '/' || path[0] == '@' || !getcwd(cwd, sizeof cwd) ||
        strlen(cwd) + strlen(path) + 2 > max)
        return path;
    char *full = arena_alloc(&opts->arena, max);
    if (full)
        snprintf(full, max, "%s/%s", cwd, path);
    return full ? full : path;
}

static void make_paths_full(struct options *opts)
{
    struct step *s;
    for (struct chardev *c = opts->chardevs; c; c = c->next) {
        const char *full =
            c->addr.type == IO_ADDR_UNIX ? full_path(opts, c->addr.path) : c->addr.path;
        if (full != c->addr.path)
            snprintf(c->addr.path, sizeof c->addr.path, "%s", full);
    }
    STAILQ_FOREACH (s, &opts->steps, link) {
        if (s->kind != STEP_NBD_SERVER)
            continue;
        struct q_socket_address *a = ((struct q_nbd_server_options *)s->args)->addr;
        if (a->type == Q_SOCKET_ADDRESS_TYPE_UNIX &&
            !(a->u.unix_.has_abstract && a->u.unix_.abstract))
            a->u.unix_.path = full_path(opts, a->u.unix_.path);
    }
}

int options_parse(int argc, char **argv, struct start *start, struct options **out,
                  struct tide_error *err)
{
    struct options *o = mem_zalloc(sizeof *o);
    int c, r = 0;
    if (!o)
        return tide_fail(err, -ENOMEM, "no memory");
    STAILQ_INIT(&o->steps);
    opterr = 0;
    while (r == 0 && (c = getopt_long(argc, argv, ":hV", long_options, NULL)) != -1) {
        if (c == '?' || c == ':')
            r = bad_option(argc, argv, c, err);
        else
            r = read_option(o, c, optarg, start, err);
    }
    if (r == 0 && optind < argc)
        r = tide_fail(err, -EINVAL, "'%s' is not an option; see --help", argv[optind]);
    for (struct chardev *d = o->chardevs; d; d = d->next)
        start->stdio_monitor |= d->stdio && d->used;
    if (r == 0 && start->daemonize && start->stdio_monitor)
        r = tide_fail(err, -EINVAL, "--daemonize and a monitor on stdio exclude each other");
    if (r < 0) {
        options_free(o);
        return r;
    }
    if (start->daemonize)
        make_paths_full(o);
    *out = o;
    return 0;
}

void options_free(struct options *o)
{
    if (!o)
        return;
    arena_free(&o->arena);
    mem_free(o);
}

/* ------------------------------------------------------------------ carrying out */

static co_fn int start_monitor(const struct step *s, struct instance *inst, struct tide_error *err)
{
    struct chardev *c = s->chardev;
    struct io_sock *sock;
    int r;
    if (!c->stdio && c->server)
        return monitor_listen(inst->monitors, &c->addr, s->pretty, err);
    if (c->stdio)
        r = io_sock_from_fds(inst->io, STDIN_FILENO, STDOUT_FILENO, &sock);
    else
        r = io_connect(&c->addr, &sock);
    if (r < 0)
        return tide_fail(err, r, "chardev '%s': %s", c->id, tide_strerror(-r));
    return monitor_serve(inst->monitors, sock, s->pretty, err);
}

static co_fn int run_step(const struct step *s, struct instance *inst, struct tide_error *err)
{
    struct node *n;
    switch (s->kind) {
    case STEP_BLOCKDEV:
        return graph_add(inst->graph, s->args, &n, err);
    case STEP_NBD_SERVER:
        return start_nbd_server(inst, s->args, err);
    case STEP_EXPORT:
        return export_add(inst->exports, s->args, err);
    case STEP_OBJECT:
        return add_object(inst, s->args, err);
    case STEP_MONITOR:
        return start_monitor(s, inst, err);
    }
    return 0;
}

int options_run(const struct options *o, struct instance *inst, struct tide_error *err)
{
    struct step *s;
    STAILQ_FOREACH (s, &o->steps, link) {
        graph_lock(inst->graph);
        int r = run_step(s, inst, err);
        graph_unlock(inst->graph);
        if (r < 0) {
            tide_error_prefix(err, "--%s: ", s->option);
            return r;
        }
    }
    return 0;
}
