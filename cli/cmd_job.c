/* SPDX-License-Identifier: Apache-2.0 */
/* job ls, wait, cancel; qmp: jobs, and the door for those who write JSON. */
#include "base/mem.h"
#include "cli/cli.h"
#include "cli/progress.h"
#include "cli/size.h"
#include "cli/table.h"
#include "cli/view.h"
#include <errno.h>
#include <string.h>
#include <time.h>

#define STANDS_MS 5000 /* longer than a drain pauses a job */

/* ---- ls and cancel ---- */

static int print_jobs(struct cli *c, json_t *jobs)
{
    static const char *const heads[] = {"JOB", "TYPE", "STATUS", ">DONE", ">OF", "ERROR"};
    struct table t;
    table_init(&t, heads, sizeof heads / sizeof *heads);
    json_t *list = cli_pack("[]");
    for (size_t i = json_array_size(jobs); i-- > 0;) {
        json_t *j = json_array_get(jobs, i);
        uint64_t done = view_number(j, "current-progress"),
                 total = view_number(j, "total-progress");
        const char *error = view_string(j, "error", NULL);
        table_row(&t, view_string(j, "id", ""), view_string(j, "type", ""),
                  view_string(j, "status", ""), size_text(done).s, size_text(total).s,
                  error ? error : "");
        json_array_append_new(list, cli_pack("{s:s, s:s, s:s, s:I, s:I, s:s?}", "job",
                                             view_string(j, "id", ""), "type",
                                             view_string(j, "type", ""), "status",
                                             view_string(j, "status", ""), "done", (json_int_t)done,
                                             "total", (json_int_t)total, "error", error));
    }
    int code = CLI_DONE;
    if (c->json)
        code = cli_print_json(json_incref(list));
    else
        table_print(&t, stdout, c->color, "no jobs");
    json_decref(list);
    table_fini(&t);
    return code;
}

int cmd_job_ls(struct cli *c)
{
    struct tide_error err;
    json_t *jobs;
    int code = cli_connect(c);
    if (code != CLI_DONE)
        return code;
    if (client_call(c->client, "query-jobs", NULL, &jobs, &err) < 0)
        return cli_fail(&err);
    code = print_jobs(c, jobs);
    json_decref(jobs);
    return code;
}

int cmd_job_cancel(struct cli *c)
{
    struct tide_error err;
    int code = cli_connect(c);
    if (code != CLI_DONE)
        return code;
    if (client_call(c->client, "job-cancel", cli_pack("{s:s}", "id", c->args[0]), NULL, &err) == 0)
        return CLI_DONE;
    code = cli_fail(&err);
    if (err.code == CLIENT_REFUSED)
        cli_hint("'tidemark job ls' lists the jobs");
    return code;
}

/* ---- wait ---- */

/* A job that somebody waits for. Its result comes in an event just before it vanishes, or stays
 * readable if it was made with auto-dismiss off.
 *
 * A job may also stand still until somebody sends it a command: waiting would never end then. One
 * that does so for STANDS_MS is reported, once, and when all that have not ended stand, the waiting
 * is over. */
struct awaited {
    const char *id;
    char status[16];
    bool ended;
    int64_t stands_since_ms; /* 0: it moves */
    bool stands;             /* for long enough, and was reported */
    char *error;             /* NULL: it went well */
    uint64_t done, total;
};

struct wait {
    struct awaited *jobs;
    size_t n, n_ended;
};

static struct awaited *find(struct wait *w, const char *id)
{
    for (size_t i = 0; i < w->n; i++)
        if (strcmp(w->jobs[i].id, id) == 0)
            return &w->jobs[i];
    return NULL;
}

static void end(struct wait *w, struct awaited *j, const char *error)
{
    if (j->ended)
        return;
    j->ended = true;
    j->error = error ? cli_strdup(error) : NULL;
    w->n_ended++;
}

static void take_event(struct wait *w, json_t *event)
{
    const char *name = view_string(event, "event", "");
    json_t *data = json_object_get(event, "data");
    struct awaited *j = find(w, view_string(data, "device", view_string(data, "id", "")));
    if (!j)
        return;
    if (strcmp(name, "BLOCK_JOB_COMPLETED") == 0)
        end(w, j, view_string(data, "error", NULL));
    else if (strcmp(name, "BLOCK_JOB_CANCELLED") == 0)
        end(w, j, "cancelled");
    else if (strcmp(name, "JOB_STATUS_CHANGE") == 0 &&
             strcmp(view_string(data, "status", ""), "null") == 0)
        end(w, j, NULL);
}

/* The command that a job of this status stands and waits for; NULL: it goes on by itself. */
static const char *needed_command(const char *status)
{
    static const struct {
        const char *status, *command;
    } needs[] = {{"pending", "job-finalize"},
                 {"ready", "job-complete"},
                 {"standby", "job-resume"},
                 {"paused", "job-resume"}};
    for (size_t i = 0; i < sizeof needs / sizeof *needs; i++)
        if (strcmp(needs[i].status, status) == 0)
            return needs[i].command;
    return NULL;
}

static bool moves(const char *status)
{
    return strcmp(status, "waiting") != 0 && strcmp(status, "concluded") != 0 &&
           !needed_command(status);
}

static int64_t now_ms(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

/* `any_moves`: some job of the daemon does; one that waits for its group may then wait for that. */
static void note_status(struct awaited *a, const char *status, bool any_moves)
{
    bool stands = needed_command(status) || (strcmp(status, "waiting") == 0 && !any_moves);
    if (!stands || strcmp(a->status, status) != 0) {
        a->stands_since_ms = 0;
        a->stands = false;
    }
    snprintf(a->status, sizeof a->status, "%s", status);
    if (stands && !a->stands_since_ms)
        a->stands_since_ms = now_ms();
}

static void report_standing(const struct awaited *a)
{
    const char *command = needed_command(a->status);
    cli_error("job '%s' is %s and does not go on by itself", a->id, a->status);
    if (command)
        cli_hint("tidemark qmp %s '{\"id\": \"%s\"}' lets it go on, job cancel %s ends it", command,
                 a->id, a->id);
    else
        cli_hint("it waits for the other jobs of its group: 'tidemark job ls' shows them");
}

/* Reports jobs that have come to stand. Do all stand that have not ended? */
static bool all_stand(struct wait *w, struct progress *p)
{
    size_t n = 0;
    for (size_t i = 0; i < w->n; i++) {
        struct awaited *a = &w->jobs[i];
        if (a->ended || !a->stands_since_ms)
            continue;
        if (!a->stands && now_ms() - a->stands_since_ms >= STANDS_MS) {
            a->stands = true;
            progress_end(p);
            report_standing(a);
        }
        n += a->stands;
    }
    return n > 0 && n + w->n_ended == w->n;
}

/* Looks at the jobs that are there. `first`: one that is not there never was. */
static int look(struct cli *c, struct wait *w, bool first, struct tide_error *err)
{
    json_t *jobs;
    int r = client_call(c->client, "query-jobs", NULL, &jobs, err);
    if (r < 0)
        return r;
    json_t *j;
    size_t k;
    bool any_moves = false;
    json_array_foreach (jobs, k, j)
        any_moves |= moves(view_string(j, "status", ""));
    for (size_t i = 0; i < w->n; i++) {
        struct awaited *a = &w->jobs[i];
        json_t *found = NULL;
        json_array_foreach (jobs, k, j)
            if (strcmp(view_string(j, "id", ""), a->id) == 0)
                found = j;
        if (!found && first)
            r = tide_fail(err, -ENOENT, "job '%s' not found", a->id);
        if (!found)
            continue;
        a->done = view_number(found, "current-progress");
        a->total = view_number(found, "total-progress");
        note_status(a, view_string(found, "status", ""), any_moves);
        if (strcmp(a->status, "concluded") == 0)
            end(w, a, view_string(found, "error", NULL));
    }
    json_decref(jobs);
    return r;
}

static int wait_all(struct cli *c, struct wait *w, struct tide_error *err)
{
    struct progress p;
    struct progress_line *lines = cli_alloc(w->n, sizeof *lines);
    progress_start(&p, c->progress);
    int r = look(c, w, true, err);
    while (r == 0 && w->n_ended < w->n && !all_stand(w, &p)) {
        for (size_t i = 0; i < w->n; i++)
            lines[i] = (struct progress_line){w->jobs[i].id, w->jobs[i].done, w->jobs[i].total};
        progress_draw(&p, lines, w->n, false);
        json_t *event;
        r = client_event(c->client, 200, &event, err);
        if (event)
            take_event(w, event);
        json_decref(event);
        if (r == 0)
            r = look(c, w, false, err);
    }
    progress_end(&p);
    mem_free(lines);
    return r;
}

static int print_results(struct cli *c, const struct wait *w)
{
    size_t n_failed = 0;
    json_t *list = cli_pack("[]");
    for (size_t i = 0; i < w->n; i++) {
        const struct awaited *j = &w->jobs[i];
        n_failed += j->error != NULL;
        json_array_append_new(list,
                              cli_pack("{s:s, s:s, s:s?}", "job", j->id, "status",
                                       j->ended ? "concluded" : j->status, "error", j->error));
        if (j->error)
            cli_error("job '%s': %s", j->id, j->error);
    }
    if (c->json)
        cli_print_json(json_incref(list));
    json_decref(list);
    if (w->n_ended < w->n)
        return CLI_PARTLY;
    return n_failed == 0 ? CLI_DONE : n_failed == w->n ? CLI_FAILED : CLI_PARTLY;
}

int cmd_job_wait(struct cli *c)
{
    struct tide_error err;
    int code = cli_connect(c);
    if (code != CLI_DONE)
        return code;
    struct wait w = {.jobs = cli_alloc(c->n_args, sizeof *w.jobs)};
    for (size_t i = 0; i < c->n_args; i++)
        if (!find(&w, c->args[i]))
            w.jobs[w.n++].id = c->args[i];
    if (wait_all(c, &w, &err) < 0)
        code = cli_fail(&err);
    else
        code = print_results(c, &w);
    for (size_t i = 0; i < w.n; i++)
        mem_free(w.jobs[i].error);
    mem_free(w.jobs);
    return code;
}

/* ---- qmp ---- */

static json_t *parse_object(const char *text, struct tide_error *err)
{
    json_error_t why;
    json_t *v = json_loads(text, JSON_REJECT_DUPLICATES, &why);
    if (!json_is_object(v)) {
        tide_fail(err, -EINVAL, "'%s' is no JSON object%s%s", text, v ? "" : ": ",
                  v ? "" : why.text);
        json_decref(v);
        return NULL;
    }
    return v;
}

int cmd_qmp(struct cli *c)
{
    struct tide_error err;
    bool whole = c->args[0][0] == '{';
    if (whole && c->n_args > 1)
        return cli_usage(c, "a whole request takes no arguments beside it");
    json_t *given = NULL, *reply;
    if (whole || c->n_args > 1) {
        given = parse_object(c->args[c->n_args - 1], &err);
        if (!given)
            return cli_usage(c, "%s", err.msg);
    }
    json_t *request =
        whole ? given : cli_pack("{s:s, s:o*}", "execute", c->args[0], "arguments", given);
    int code = cli_connect(c);
    if (code != CLI_DONE) {
        json_decref(request);
        return code;
    }
    if (client_send(c->client, request, &reply, &err) == 0)
        return cli_print_json(reply);
    code = cli_fail(&err);
    if (client_unknown_command(&err))
        cli_hint("'tidemark qmp query-commands' lists the commands");
    return code;
}
