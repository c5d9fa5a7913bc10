/* SPDX-License-Identifier: Apache-2.0 */
/* The tool `tidemark`: what all its commands share.
 *
 * A command is a row of the table in main.c: its words, options, help text and function. Parsing,
 * --help and shell completion are all made from that table. A command's function returns one of the
 * exit codes below; whoever finds an error prints it, once, with cli_error() or cli_fail(). */
#pragma once
#include "base/error.h"
#include "lib/client.h"
#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum cli_exit {
    CLI_DONE = 0,
    CLI_FAILED = 1,
    CLI_USAGE = 2,
    CLI_NO = 3,          /* the answer is no, or things differ */
    CLI_PARTLY = 4,      /* some of the work is done, some is not */
    CLI_UNREACHABLE = 5, /* no daemon answers */
};

struct cli_option {
    const char *name;  /* without the two dashes */
    const char *value; /* what stands for the value in the help; NULL: a flag */
    const char *help;
};

struct cli;

struct cli_command {
    const char *words;                /* "status" or "bitmap add" */
    const char *args;                 /* as the help shows them */
    const char *summary;              /* one line */
    const char *detail;               /* paragraphs and examples */
    const struct cli_option *options; /* ended by an empty one; NULL: none */
    size_t min_args, max_args;
    int (*run)(struct cli *c);
};

struct cli_given {
    const char *name;  /* of the option */
    const char *value; /* NULL for a flag */
};

/* One run of the tool. Strings are borrowed from argv and the environment. */
struct cli {
    const struct cli_command *command;
    const char *socket;
    const char **args;
    size_t n_args;
    struct cli_given *given;
    size_t n_given;
    bool json;             /* --json: bytes and names, nothing for the eye */
    bool color;            /* standard output takes colour */
    bool progress;         /* standard error is a terminal that takes bars */
    struct client *client; /* after cli_connect(); closed by main() */
};

/* The value of an option, "" for a flag, NULL if it was not given; the last one if it was repeated.
 */
const char *cli_option(const struct cli *c, const char *name);
/* The `i`-th value of an option that may be repeated, NULL past the last. */
const char *cli_option_at(const struct cli *c, const char *name, size_t i);

/* Connects to the daemon. 0, or the exit code after printing why not. */
int cli_connect(struct cli *c);

/* "tidemark: " + text, one line on standard error. Control characters are shown as '?'. */
void cli_error(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
/* "hint: " + text. */
void cli_hint(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
/* Prints the error; the exit code that fits it. */
int cli_fail(const struct tide_error *err);
/* Wrong usage: prints the text and where help is; CLI_USAGE. */
int cli_usage(const struct cli *c, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* Syncs the directory above the open directory `dir`, so that the name of a new one lasts. One that
 * we may not read is left alone: it is not ours. */
int cli_sync_above(int dir_fd, const char *dir, struct tide_error *err);

/* Prints a JSON value and a line end on standard output; steals `value`. CLI_DONE or CLI_FAILED. */
int cli_print_json(json_t *value);

/* Memory of the tool: a run that gets none ends with exit code 1. */
char *cli_printf(const char *fmt, ...) __attribute__((format(printf, 1, 2), nonnull(1)));
char *cli_strdup(const char *s);
void *cli_alloc(size_t n, size_t size); /* zeroed */
void *cli_grow(void *p, size_t n, size_t size);
/* The same for what grows piece by piece: room for `n`, of which *cap are there. */
void *cli_reserve(void *p, size_t n, size_t *cap, size_t size);
/* json_pack() that cannot fail quietly: a string that is no UTF-8 ends the run as wrong usage. */
json_t *cli_pack(const char *fmt, ...);

/* The commands. */
int cmd_serve(struct cli *c);
int cmd_stop(struct cli *c);
int cmd_status(struct cli *c);
int cmd_node_ls(struct cli *c);
int cmd_export_ls(struct cli *c);
int cmd_bitmap_ls(struct cli *c);
int cmd_bitmap_add(struct cli *c);
int cmd_bitmap_rm(struct cli *c);
int cmd_bitmap_clear(struct cli *c);
int cmd_bitmap_enable(struct cli *c);
int cmd_bitmap_disable(struct cli *c);
int cmd_bitmap_merge(struct cli *c);
int cmd_bitmap_map(struct cli *c);
int cmd_backup(struct cli *c);
int cmd_restore(struct cli *c);
int cmd_verify(struct cli *c);
int cmd_points(struct cli *c);
int cmd_job_ls(struct cli *c);
int cmd_job_wait(struct cli *c);
int cmd_job_cancel(struct cli *c);
int cmd_txn_run(struct cli *c);
int cmd_txn_check(struct cli *c);
int cmd_txn_explain(struct cli *c);
int cmd_txn_log(struct cli *c);
int cmd_qmp(struct cli *c);
