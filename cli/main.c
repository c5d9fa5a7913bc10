/* SPDX-License-Identifier: Apache-2.0 */
/* The tool `tidemark`: the table of commands, and what is made from it: parsing, help, completion.
 *
 * A command line is "tidemark [global options] NOUN [VERB] [arguments and options]". Options may
 * stand anywhere behind the words of the command; "--" ends them. */
#include "base/log.h"
#include "base/mem.h"
#include "cli/cli.h"
#include "cli/table.h"
#include <errno.h>
#include <locale.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifndef TIDEMARK_VERSION
#define TIDEMARK_VERSION "unknown"
#endif

static int cmd_completion(struct cli *c);

#define ANY ((size_t)1000000)

#define FORCE_DETAIL                                                                               \
    "A bitmap that 'tidemark backup' made is refused without --force: the next backup\n"           \
    "would have to copy everything.\n"                                                             \
    "\n"

static const struct cli_option global_options[] = {
    {"socket", "PATH", "the daemon's QMP socket (also TIDEMARK_SOCKET)"},
    {"json", NULL, "print JSON: bytes and names, no progress, no colour"},
    {"no-progress", NULL, "no progress bars, also on a terminal"},
    {"help", NULL, "what the command does, with examples"},
    {"version", NULL, "the version of this tool"},
    {0},
};

static const struct cli_option serve_options[] = {
    {"dir", "DIR", "where sockets and pid file go (default: the socket's)"},
    {"listen", "ADDR", "'unix' (default) or HOST:PORT for NBD"},
    {"format", "raw|qcow2", "of the images (default raw)"},
    {"read-only", NULL, "nobody can write"},
    {0},
};
static const struct cli_option add_options[] = {
    {"granularity", "SIZE", "bytes per bit, a power of two (default: mostly 64K)"},
    {"persistent", NULL, "keep it over a restart of the daemon, where possible"},
    {"disabled", NULL, "do not record yet"},
    {0},
};
static const struct cli_option force_options[] = {
    {"force", NULL, "also a bitmap that a backup directory counts on"},
    {0},
};
static const struct cli_option backup_options[] = {
    {"to", "DIR", "the backup directory; made if it is missing"},
    {"full", NULL, "copy everything"},
    {"incremental", NULL, "copy only what changed, or fail"},
    {"bitmap", "NAME", "how the bitmaps' names begin (default tidemark-backup)"},
    {"granularity", "SIZE", "of the bitmaps, a power of two (default 64K)"},
    {"speed", "SIZE", "bytes a second for each disk (default: no limit)"},
    {0},
};
static const struct cli_option restore_options[] = {
    {"to", "OUTDIR", "write every disk of the point to OUTDIR/DISK.raw"},
    {"disk", "NAME=PATH", "write this disk to PATH; may be repeated"},
    {"force", NULL, "replace files that are there"},
    {0},
};

static const struct cli_option run_options[] = {
    {"grouped", NULL, "jobs end together: all succeed or all are undone"},
    {"id", "ID", "name for the list, so that it can be sent again"},
    {"retry", "SECONDS", "send again if the connection is lost; chooses an id"},
    {0},
};
static const struct cli_option check_options[] = {
    {"grouped", NULL, "as for 'txn run'"},
    {0},
};
static const struct cli_option explain_options[] = {
    {"dot", NULL, "a graph for Graphviz"},
    {0},
};
static const struct cli_option log_options[] = {
    {"limit", "N", "the last N only (the daemon keeps 256)"},
    {0},
};

#define TXN_LIST                                                                                   \
    "FILE ('-': standard input) has an action on each line, # begins a comment:\n"                 \
    "  add NODE/NAME [granularity=SIZE] [disabled]    remove|clear NODE/NAME\n"                    \
    "  merge NODE/TARGET from SOURCE...               enable|disable NODE/NAME\n"                  \
    "  copy NODE/NAME [disabled] from SOURCE...       rename NODE/NAME to NEW\n"                   \
    "  backup NODE to TARGET sync=MODE job=ID ...     abort\n"                                     \
    "  export-add TYPE id=ID node=NODE ...            export-del ID\n"                             \
    "  export-set-node ID to NODE                     node-add DRIVER node=NAME ...\n"             \
    "  node-del NODE                                  KIND KEY=VALUE... for any other\n"           \
    "A SOURCE is NAME or NODE/NAME; names with blanks, quotes or slashes stand in \"\".\n"         \
    "FILE may also be JSON: a list of actions, or an object with 'actions' and\n"                  \
    "'properties', as the QMP command 'transaction' takes them.\n"                                 \
    "\n"

static const struct cli_command commands[] = {
    {"serve", "IMAGE|NAME=IMAGE...", "start a daemon that serves images over NBD",
     "Starts tidemarkd in the background. Every image becomes a disk, named after its\n"
     "file or as given by NAME=, exported writable over NBD under that name, with\n"
     "discard passed on.\n"
     "\n"
     "Examples:\n"
     "  tidemark serve disk1.raw\n"
     "  tidemark serve --dir /run/vm7 root=vm7.raw data=vm7-data.raw\n"
     "  tidemark serve --read-only --listen 127.0.0.1:10809 golden.raw\n",
     serve_options, 1, ANY, cmd_serve},
    {"stop", "", "end the daemon", "Example:\n  tidemark stop\n", NULL, 0, 0, cmd_stop},
    {"status", "", "the daemon, its disks, exports and jobs",
     "Examples:\n  tidemark status\n  tidemark status --json\n", NULL, 0, 0, cmd_status},
    {"node ls", "", "list the nodes", "Example:\n  tidemark node ls\n", NULL, 0, 0, cmd_node_ls},
    {"export ls", "", "list the exports", "Example:\n  tidemark export ls\n", NULL, 0, 0,
     cmd_export_ls},
    {"bitmap ls", "[NODE]", "list dirty bitmaps",
     "Examples:\n  tidemark bitmap ls\n  tidemark bitmap ls disk1 --json\n", NULL, 0, 1,
     cmd_bitmap_ls},
    {"bitmap add", "NODE NAME", "start recording changes",
     "Examples:\n"
     "  tidemark bitmap add disk1 b0\n"
     "  tidemark bitmap add disk1 fine --granularity 4K --disabled\n",
     add_options, 2, 2, cmd_bitmap_add},
    {"bitmap rm", "NODE NAME", "remove a bitmap",
     FORCE_DETAIL "Example:\n  tidemark bitmap rm disk1 b0\n", force_options, 2, 2, cmd_bitmap_rm},
    {"bitmap clear", "NODE NAME", "forget what a bitmap recorded",
     FORCE_DETAIL "Example:\n  tidemark bitmap clear disk1 b0\n", force_options, 2, 2,
     cmd_bitmap_clear},
    {"bitmap enable", "NODE NAME", "record", "Example:\n  tidemark bitmap enable disk1 b0\n", NULL,
     2, 2, cmd_bitmap_enable},
    {"bitmap disable", "NODE NAME", "stop recording",
     FORCE_DETAIL "Example:\n  tidemark bitmap disable disk1 b0\n", force_options, 2, 2,
     cmd_bitmap_disable},
    {"bitmap merge", "NODE TARGET SOURCE...", "add what other bitmaps recorded",
     "A SOURCE is a bitmap of the same node, or NODE/NAME. All are merged or none.\n" FORCE_DETAIL
     "Examples:\n"
     "  tidemark bitmap merge disk1 week monday tuesday\n"
     "  tidemark bitmap merge overlay b0 base/b0\n",
     force_options, 3, ANY, cmd_bitmap_merge},
    {"bitmap map", "NODE NAME", "draw which parts of the disk are dirty",
     "A cell is empty only if nothing in it is dirty, and full only if everything is.\n"
     "With --json: every dirty range, in bytes.\n"
     "\n"
     "Examples:\n"
     "  tidemark bitmap map disk1 b0\n"
     "  tidemark bitmap map disk1 b0 --json | jq '.ranges | length'\n",
     NULL, 2, 2, cmd_bitmap_map},
    {"backup", "--to DIR NODE...", "back up disks at one point in time",
     "All disks are copied as they are at one moment. A disk that was backed up to DIR\n"
     "before is copied incrementally, if everything that changed since is known; else\n"
     "in full, and the reason is printed. --full and --incremental leave no choice.\n"
     "The daemon must see DIR by the same path. Only the owner may read what is made.\n"
     "\n"
     "Examples:\n"
     "  tidemark backup --to /backups/vm7 disk1 disk2\n"
     "  tidemark backup --to /backups/vm7 --incremental --speed 100M disk1 disk2\n",
     backup_options, 1, ANY, cmd_backup},
    {"restore", "DIR [POINT]", "put disks back as they were at a point",
     "POINT is 'latest' (default), a number, or a uuid or its first characters. Needs\n"
     "no daemon. Every hash is checked while reading, and no target appears before all\n"
     "are complete. A new file is for its owner only; one that replaces another gets\n"
     "its mode.\n"
     "\n"
     "Examples:\n"
     "  tidemark restore /backups/vm7 --to /tmp/restored\n"
     "  tidemark restore /backups/vm7 3 --disk disk1=/srv/disk1.raw --force\n",
     restore_options, 1, 2, cmd_restore},
    {"verify", "DIR", "check every hash of a backup directory",
     "Exit code 3 if something is damaged. Needs no daemon.\n"
     "\n"
     "Example:\n"
     "  tidemark verify /backups/vm7\n",
     NULL, 1, 1, cmd_verify},
    {"points", "DIR", "list the points of a backup directory",
     "Examples:\n  tidemark points /backups/vm7\n  tidemark points /backups/vm7 --json\n", NULL, 1,
     1, cmd_points},
    {"job ls", "", "list jobs", "Example:\n  tidemark job ls\n", NULL, 0, 0, cmd_job_ls},
    {"job wait", "ID...", "wait until jobs have ended",
     "Exit code 1 if all of them failed or were cancelled, 4 if some did, or if a job\n"
     "stands until somebody finalizes, completes or resumes it; how to is printed.\n"
     "\n"
     "Example:\n"
     "  tidemark job wait copy1 copy2\n",
     NULL, 1, ANY, cmd_job_wait},
    {"job cancel", "ID", "cancel a job", "Example:\n  tidemark job cancel copy1\n", NULL, 1, 1,
     cmd_job_cancel},
    {"txn run", "FILE", "carry out a list of actions: all or none",
     "If an action fails, all before it are undone, and where it stands is printed.\n" TXN_LIST
     "The outcome of a list that is sent with an id is remembered by the daemon, as\n"
     "long as it runs: the same list under the same id is not carried out again.\n"
     "--retry makes use of that: if the connection is lost before the answer, it\n"
     "connects again and sends the same.\n"
     "\n"
     "Examples:\n"
     "  tidemark txn run nightly.txn --grouped\n"
     "  echo 'clear disk1/b0' | tidemark txn run - --retry 30\n",
     run_options, 1, 1, cmd_txn_run},
    {"txn check", "FILE", "what a list of actions would do",
     "The daemon carries out the list and undoes it, within one pause of the guests.\n"
     "What each action found and did is printed. Exit code 1 if it would fail.\n" TXN_LIST
     "Examples:\n"
     "  tidemark txn check nightly.txn\n"
     "  tidemark txn check nightly.txn --json | jq '.actions[].sees'\n",
     check_options, 1, 1, cmd_txn_check},
    {"txn explain", "FILE", "which actions of a list depend on which",
     "Two actions depend on each other if one writes what the other reads or writes:\n"
     "they must stay in this order. Others may be swapped. Also printed: whose\n"
     "requests would wait meanwhile. Needs no daemon; with --socket it asks that one,\n"
     "which knows more, such as the node that an export shows.\n" TXN_LIST "Examples:\n"
     "  tidemark txn explain nightly.txn\n"
     "  tidemark txn explain nightly.txn --dot | dot -Tsvg > nightly.svg\n",
     explain_options, 1, 1, cmd_txn_explain},
    {"txn log", "", "the transactions of the past, newest last",
     "Plain commands that change something are transactions too: lists of one.\n"
     "HELD is for how long guests had to wait.\n"
     "\n"
     "Examples:\n  tidemark txn log --limit 10\n  tidemark txn log --json\n",
     log_options, 0, 0, cmd_txn_log},
    {"qmp", "COMMAND [ARGUMENTS]", "send any QMP command, print the answer",
     "COMMAND is a name, or a whole request as a JSON object.\n"
     "\n"
     "Examples:\n"
     "  tidemark qmp query-jobs\n"
     "  tidemark qmp blockdev-del '{\"node-name\": \"old\"}'\n"
     "  tidemark qmp '{\"execute\": \"query-version\"}'\n",
     NULL, 1, 2, cmd_qmp},
    {"completion", "bash", "print a script for completion in the shell",
     "Example:\n  source <(tidemark completion bash)\n", NULL, 1, 1, cmd_completion},
    {0},
};

/* ---- help ---- */

static void print_options(const struct cli_option *options)
{
    for (const struct cli_option *o = options; o && o->name; o++) {
        const char *value = o->value ? o->value : "";
        int fill = 20 - (int)strlen(o->name) - (int)strlen(value);
        printf("  --%s %s%*s %s\n", o->name, value, fill > 0 ? fill : 0, "", o->help);
    }
}

static int help_command(const struct cli_command *cmd)
{
    printf("usage: tidemark %s%s%s%s\n\n", cmd->words, cmd->options ? " [options]" : "",
           cmd->args[0] ? " " : "", cmd->args);
    printf("%c%s.\n\n%s", cmd->summary[0] & ~0x20, cmd->summary + 1, cmd->detail);
    if (cmd->options)
        printf("\nOptions:\n");
    print_options(cmd->options);
    printf("\nOptions of all commands:\n");
    print_options(global_options);
    return CLI_DONE;
}

/* All commands, or those of one noun. */
static int help_list(const char *noun, FILE *out)
{
    fprintf(out, "usage: tidemark %s [options] ...\n\nCommands:\n", noun ? noun : "COMMAND");
    size_t len = noun ? strlen(noun) : 0;
    for (const struct cli_command *cmd = commands; cmd->words; cmd++)
        if (!noun || (strncmp(cmd->words, noun, len) == 0 && cmd->words[len] == ' '))
            fprintf(out, "  %-16s %s\n", cmd->words, cmd->summary);
    fprintf(out, "\n'tidemark COMMAND --help' tells more, with examples.\n");
    return CLI_DONE;
}

/* ---- completion ---- */

static void print_words_of_noun(const char *noun, size_t len)
{
    printf("        %.*s) words=\"", (int)len, noun);
    for (const struct cli_command *cmd = commands; cmd->words; cmd++)
        if (strncmp(cmd->words, noun, len) == 0 && cmd->words[len] == ' ')
            printf("%s ", cmd->words + len + 1);
    printf("\" ;;\n");
}

static size_t noun_length(const struct cli_command *cmd)
{
    return strcspn(cmd->words, " ");
}

/* Arguments that the table has in small letters are words to type, not names of something. */
static bool is_literal(const char *args)
{
    return *args && args[strspn(args, "abcdefghijklmnopqrstuvwxyz")] == '\0';
}

/* Is this the first command of its noun? */
static bool first_of_noun(const struct cli_command *cmd)
{
    size_t len = noun_length(cmd);
    return cmd == commands || noun_length(cmd - 1) != len ||
           strncmp(cmd[-1].words, cmd->words, len) != 0;
}

static void print_option_words(const struct cli_option *options)
{
    for (const struct cli_option *o = options; o && o->name; o++)
        printf("--%s ", o->name);
}

static int cmd_completion(struct cli *c)
{
    if (strcmp(c->args[0], "bash") != 0)
        return cli_usage(c, "there is completion for bash, not for '%s'", c->args[0]);
    printf("# completion for tidemark, made by 'tidemark completion bash'\n"
           "_tidemark()\n{\n    local cur=${COMP_WORDS[COMP_CWORD]} words=\"\"\n"
           "    if [[ $COMP_CWORD == 1 ]]; then\n        words=\"");
    for (const struct cli_command *cmd = commands; cmd->words; cmd++)
        if (first_of_noun(cmd))
            printf("%.*s ", (int)noun_length(cmd), cmd->words);
    print_option_words(global_options);
    printf("\"\n    elif [[ $COMP_CWORD == 2 && $cur != -* ]]; then\n"
           "        case ${COMP_WORDS[1]} in\n");
    for (const struct cli_command *cmd = commands; cmd->words; cmd++)
        if (first_of_noun(cmd) && strchr(cmd->words, ' '))
            print_words_of_noun(cmd->words, noun_length(cmd));
    for (const struct cli_command *cmd = commands; cmd->words; cmd++)
        if (is_literal(cmd->args))
            printf("        %s) words=%s ;;\n", cmd->words, cmd->args);
    printf("        esac\n"
           "    elif [[ $cur == -* ]]; then\n"
           "        case \"${COMP_WORDS[1]} ${COMP_WORDS[2]}\" in\n");
    for (const struct cli_command *cmd = commands; cmd->words; cmd++) {
        printf("        \"%s\"%s) words=\"", cmd->words, strchr(cmd->words, ' ') ? "" : "*");
        print_option_words(cmd->options);
        print_option_words(global_options);
        printf("\" ;;\n");
    }
    printf("        esac\n    fi\n"
           "    COMPREPLY=($(compgen -W \"$words\" -- \"$cur\"))\n}\n"
           "complete -o default -F _tidemark tidemark\n");
    return CLI_DONE;
}

/* ---- parsing ---- */

static const struct cli_command *find_command(const char *noun, const char *verb)
{
    for (const struct cli_command *cmd = commands; cmd->words; cmd++) {
        size_t len = noun_length(cmd);
        if (strlen(noun) != len || strncmp(cmd->words, noun, len) != 0)
            continue;
        if (cmd->words[len] == '\0' || (verb && strcmp(cmd->words + len + 1, verb) == 0))
            return cmd;
    }
    return NULL;
}

static bool is_noun(const char *word)
{
    size_t len = strlen(word);
    for (const struct cli_command *cmd = commands; cmd->words; cmd++)
        if (noun_length(cmd) == len && strncmp(cmd->words, word, len) == 0)
            return true;
    return false;
}

/* `typed` is a noun, or a noun that exists and a verb that does not. */
static int unknown_command(const char *typed)
{
    bool noun = !strchr(typed, ' ');
    char best[64] = "";
    unsigned best_distance = 3;
    for (const struct cli_command *cmd = commands; cmd->words; cmd++) {
        char words[64];
        snprintf(words, sizeof words, "%.*s", noun ? (int)noun_length(cmd) : 63, cmd->words);
        unsigned d = text_distance(words, typed);
        if (d < best_distance) {
            memcpy(best, words, sizeof best);
            best_distance = d;
        }
    }
    cli_error("there is no command '%s'", typed);
    if (best[0])
        cli_hint("did you mean '%s'?", best);
    else
        cli_hint("'tidemark --help' lists the commands");
    return CLI_USAGE;
}

static const struct cli_option *find_option(const struct cli_option *options, const char *name,
                                            size_t len)
{
    for (const struct cli_option *o = options; o && o->name; o++)
        if (strlen(o->name) == len && strncmp(o->name, name, len) == 0)
            return o;
    return NULL;
}

/* Takes argv[*i], which begins with "--", and its value. */
static int take_option(struct cli *c, char **argv, int argc, int *i)
{
    const char *name = argv[*i] + 2;
    size_t len = strcspn(name, "=");
    const struct cli_option *o = c->command ? find_option(c->command->options, name, len) : NULL;
    if (!o)
        o = find_option(global_options, name, len);
    if (!o)
        return cli_usage(c, "there is no option '--%.*s'", (int)len, name);
    const char *value = name[len] == '=' ? name + len + 1 : NULL;
    if (value && !o->value)
        return cli_usage(c, "option '--%s' takes no value", o->name);
    if (!value && o->value) {
        if (*i + 1 >= argc)
            return cli_usage(c, "option '--%s' needs a value: %s", o->name, o->value);
        value = argv[++*i];
    }
    c->given[c->n_given++] = (struct cli_given){o->name, value};
    return CLI_DONE;
}

/* Finds the command in the words; the rest of them are its arguments. */
static int take_words(struct cli *c, bool help)
{
    if (c->n_args == 0)
        return help ? help_list(NULL, stdout) : (help_list(NULL, stderr), CLI_USAGE);
    const char *noun = c->args[0], *verb = c->n_args > 1 ? c->args[1] : NULL;
    c->command = find_command(noun, verb);
    if (!c->command && is_noun(noun)) {
        if (!verb)
            return help ? help_list(noun, stdout) : (help_list(noun, stderr), CLI_USAGE);
        char *words = cli_printf("%s %s", noun, verb);
        int code = unknown_command(words);
        mem_free(words);
        return code;
    }
    if (!c->command)
        return unknown_command(noun);
    size_t n_words = strchr(c->command->words, ' ') ? 2 : 1;
    c->args += n_words;
    c->n_args -= n_words;
    return CLI_DONE;
}

/* Are options allowed from here on to be the command's own? They are once its words are there. */
static void look_for_command(struct cli *c)
{
    if (!c->command && c->n_args > 0)
        c->command = find_command(c->args[0], c->n_args > 1 ? c->args[1] : NULL);
}

static int parse(struct cli *c, int argc, char **argv)
{
    bool options = true;
    for (int i = 1; i < argc; i++) {
        if (options && strcmp(argv[i], "--") == 0) {
            options = false;
        } else if (options && strcmp(argv[i], "-h") == 0) {
            c->given[c->n_given++] = (struct cli_given){"help", NULL};
        } else if (options && strncmp(argv[i], "--", 2) == 0) {
            int code = take_option(c, argv, argc, &i);
            if (code != CLI_DONE)
                return code;
        } else if (options && argv[i][0] == '-' && argv[i][1] != '\0') {
            return cli_usage(c, "there is no option '%s'", argv[i]);
        } else {
            c->args[c->n_args++] = argv[i];
            look_for_command(c);
        }
    }
    c->command = NULL;
    return CLI_DONE;
}

static const char *default_socket(char *buf, size_t size)
{
    const char *path = getenv("TIDEMARK_SOCKET");
    if (path && *path)
        return path;
    const char *dir = getenv("XDG_RUNTIME_DIR");
    snprintf(buf, size, "%s/tidemark.sock", dir && *dir ? dir : "/run");
    return buf;
}

static void settle(struct cli *c, char *buf, size_t size)
{
    const char *no_color = getenv("NO_COLOR"), *term = getenv("TERM");
    bool dumb = term && strcmp(term, "dumb") == 0;
    c->json = cli_option(c, "json");
    c->color = !c->json && !dumb && !(no_color && *no_color) && isatty(STDOUT_FILENO);
    c->progress = !c->json && !dumb && !cli_option(c, "no-progress") && isatty(STDERR_FILENO);
    c->socket = cli_option(c, "socket");
    if (!c->socket)
        c->socket = default_socket(buf, size);
}

static int run(struct cli *c)
{
    bool help = cli_option(c, "help");
    if (cli_option(c, "version")) {
        printf("tidemark %s\n", TIDEMARK_VERSION);
        return CLI_DONE;
    }
    int code = take_words(c, help);
    if (code != CLI_DONE || !c->command)
        return code;
    if (help)
        return help_command(c->command);
    if (c->n_args < c->command->min_args)
        return cli_usage(c, "'%s' needs more: %s", c->command->words, c->command->args);
    if (c->n_args > c->command->max_args)
        return cli_usage(c, "'%s' has one word too many: '%s'", c->command->words,
                         c->args[c->command->max_args]);
    return c->command->run(c);
}

int main(int argc, char **argv)
{
    setlocale(LC_CTYPE, ""); /* only to learn whether the terminal takes UTF-8 */
    log_init("tidemark", LOG_LEVEL_WARN);
    char buf[4096];
    struct cli c = {0};
    const char **words = cli_alloc((size_t)argc + 1, sizeof *words);
    c.args = words;
    c.given = cli_alloc((size_t)argc + 1, sizeof *c.given);
    int code = parse(&c, argc, argv);
    if (code == CLI_DONE) {
        settle(&c, buf, sizeof buf);
        code = run(&c);
    }
    client_close(c.client);
    mem_free(words);
    mem_free(c.given);
    if (fflush(stdout) != 0 && code == CLI_DONE) {
        cli_error("cannot write to standard output: %s", tide_strerror(errno));
        code = CLI_FAILED;
    }
    return code;
}
