/* SPDX-License-Identifier: Apache-2.0 */
/* What all commands use: how errors look, what was given on the command line, memory. */
#include "cli/cli.h"
#include "base/mem.h"
#include "cli/table.h"
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void print_line(const char *before, const char *fmt, va_list ap)
{
    char text[1200];
    vsnprintf(text, sizeof text, fmt, ap);
    fprintf(stderr, "%s: %s\n", before, text_clean(text));
}

void cli_error(const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    print_line("tidemark", fmt, ap);
    va_end(ap);
}

void cli_hint(const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    print_line("hint", fmt, ap);
    va_end(ap);
}

int cli_usage(const struct cli *c, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    print_line("tidemark", fmt, ap);
    va_end(ap);
    if (c->command)
        cli_hint("'tidemark %s --help' shows how it is used", c->command->words);
    else
        cli_hint("'tidemark --help' lists the commands");
    return CLI_USAGE;
}

int cli_fail(const struct tide_error *err)
{
    cli_error("%s", err->msg);
    return err->code == CLIENT_UNREACHABLE ? CLI_UNREACHABLE : CLI_FAILED;
}

int cli_connect(struct cli *c)
{
    struct tide_error err;
    if (client_open(c->socket, &c->client, &err) == 0)
        return CLI_DONE;
    int code = cli_fail(&err);
    cli_hint("'tidemark serve IMAGE' starts a daemon; --socket or TIDEMARK_SOCKET names another "
             "socket");
    return code;
}

int cli_sync_above(int dir_fd, const char *dir, struct tide_error *err)
{
    int fd = openat(dir_fd, "..", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0 && errno == EACCES)
        return 0;
    int r = fd < 0 || fsync(fd) < 0
                ? tide_fail(err, -errno, "cannot sync the directory of '%s': %s", dir,
                            tide_strerror(errno))
                : 0;
    if (fd >= 0)
        close(fd);
    return r;
}

int cli_print_json(json_t *value)
{
    int r = json_dumpf(value, stdout, JSON_INDENT(2) | JSON_ENCODE_ANY);
    json_decref(value);
    return r < 0 || putchar('\n') == EOF ? CLI_FAILED : CLI_DONE;
}

const char *cli_option_at(const struct cli *c, const char *name, size_t i)
{
    for (size_t k = 0; k < c->n_given; k++)
        if (strcmp(c->given[k].name, name) == 0 && i-- == 0)
            return c->given[k].value ? c->given[k].value : "";
    return NULL;
}

const char *cli_option(const struct cli *c, const char *name)
{
    const char *last = NULL;
    for (size_t i = 0; cli_option_at(c, name, i); i++)
        last = cli_option_at(c, name, i);
    return last;
}

/* ---- memory ---- */

static void *or_die(void *p)
{
    if (!p) {
        cli_error("out of memory");
        exit(CLI_FAILED);
    }
    return p;
}

void *cli_alloc(size_t n, size_t size)
{
    return or_die(mem_calloc(n, size));
}

void *cli_grow(void *p, size_t n, size_t size)
{
    return or_die(mem_realloc(p, n, size));
}

void *cli_reserve(void *p, size_t n, size_t *cap, size_t size)
{
    if (n <= *cap)
        return p;
    *cap = n < 16 ? 16 : n * 2;
    return cli_grow(p, *cap, size);
}

char *cli_strdup(const char *s)
{
    return or_die(mem_strdup(s));
}

char *cli_printf(const char *fmt, ...)
{
    va_list ap, again;
    va_start(ap, fmt);
    va_copy(again, ap);
    int n = vsnprintf(NULL, 0, fmt, ap);
    va_end(ap);
    char *s = or_die(n < 0 ? NULL : mem_alloc((size_t)n + 1));
    vsnprintf(s, (size_t)n + 1, fmt, again);
    va_end(again);
    return s;
}

json_t *cli_pack(const char *fmt, ...)
{
    json_error_t why;
    va_list ap;
    va_start(ap, fmt);
    json_t *v = json_vpack_ex(&why, 0, fmt, ap);
    va_end(ap);
    if (!v && json_error_code(&why) == json_error_invalid_utf8) {
        cli_error("an argument is no valid UTF-8 text");
        exit(CLI_USAGE);
    }
    return or_die(v);
}
