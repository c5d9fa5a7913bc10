/* SPDX-License-Identifier: Apache-2.0 */
/* Lives of a daemon, its QMP clients, and the loop over the seeds. */
#include "world.h"

#include <errno.h>
#include <stdarg.h>
#include <string.h>
#include <time.h>

#include "base/log.h"
#include "qmp/instance.h"
#include "qmp/monitor.h"

struct world *current_world;

_Noreturn void world_failed(const char *file, int line, const char *what)
{
    struct world *w = current_world;
    fprintf(stderr, "%s:%d: %s\n", file, line, what);
    if (w)
        fprintf(stderr,
                "scenario %s, tick %" PRIu64 ", step %" PRIu64 "; again with: SIM_SEED=%" PRIu64
                "\n",
                w->story->name, w->tick, w->io ? sim_steps(w->io) : 0, w->seed);
    abort();
}

/* ------------------------------------------------------------------ chance */

uint64_t chance_next(struct chance *c)
{
    uint64_t z = c->state += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

uint64_t chance_below(struct chance *c, uint64_t n)
{
    return chance_next(c) % n;
}

bool chance_one_in(struct chance *c, uint64_t n)
{
    return chance_below(c, n) == 0;
}

/* ------------------------------------------------------------------ QMP: lines */

static co_fn void receive(struct qmp *q)
{
    if (q->cap - q->fill < 4096) {
        q->cap = q->cap * 2 + 8192;
        q->buf = realloc(q->buf, q->cap);
        CHECK(q->buf);
    }
    ssize_t n = io_recv(q->sock, q->buf + q->fill, q->cap - q->fill);
    CHECK_SAY(n > 0, "QMP connection ended: %zd", n);
    q->fill += (size_t)n;
}

/* The next line that is here already, parsed; NULL: none is whole. */
static json_t *take_line(struct qmp *q)
{
    char *end = q->fill ? memchr(q->buf, '\n', q->fill) : NULL;
    json_error_t e;
    if (!end)
        return NULL;
    size_t len = (size_t)(end - q->buf) + 1;
    json_t *v = json_loadb(q->buf, len, 0, &e);
    CHECK_SAY(v, "not JSON: %.*s", (int)len, q->buf);
    memmove(q->buf, q->buf + len, q->fill - len);
    q->fill -= len;
    return v;
}

/* ------------------------------------------------------------------ QMP: jobs */

struct job_news *qmp_job(struct qmp *q, const char *id)
{
    for (unsigned i = 0; i < q->n_jobs; i++)
        if (!strcmp(q->job[i].id, id))
            return &q->job[i];
    return NULL;
}

static struct job_news *job_or_new(struct qmp *q, const char *id)
{
    struct job_news *j = qmp_job(q, id);
    if (j)
        return j;
    CHECK(q->n_jobs < QMP_MAX_JOBS);
    j = &q->job[q->n_jobs++];
    snprintf(j->id, sizeof j->id, "%s", id);
    return j;
}

static void note_status(struct qmp *q, const char *id, const char *status)
{
    struct job_news *j = job_or_new(q, id);
    CHECK(id && status);
    if (!strcmp(status, "created")) {
        *j = (struct job_news){0};
        snprintf(j->id, sizeof j->id, "%s", id);
    }
    snprintf(j->status, sizeof j->status, "%s", status);
    if (!strcmp(status, "null"))
        j->ended = ++q->w->tick;
}

static void note_event(struct qmp *q, json_t *v, const char *name)
{
    json_t *d = json_object_get(v, "data");
    const char *device = json_string_value(json_object_get(d, "device"));
    const char *error = json_string_value(json_object_get(d, "error"));
    if (!strcmp(name, "JOB_STATUS_CHANGE"))
        note_status(q, json_string_value(json_object_get(d, "id")),
                    json_string_value(json_object_get(d, "status")));
    if (!strcmp(name, "BLOCK_JOB_COMPLETED")) {
        struct job_news *j = job_or_new(q, device);
        j->completed = true;
        snprintf(j->error, sizeof j->error, "%s", error ? error : "");
    }
    if (!strcmp(name, "BLOCK_JOB_CANCELLED"))
        job_or_new(q, device)->cancelled = true;
    if (!strcmp(name, "BLOCK_JOB_ERROR"))
        job_or_new(q, device)->n_errors++;
}

/* The next line that is no event. */
static co_fn json_t *next_answer(struct qmp *q)
{
    for (;;) {
        json_t *v = take_line(q);
        const char *event = json_string_value(json_object_get(v, "event"));
        if (!v) {
            receive(q);
        } else if (event) {
            note_event(q, v, event);
            json_decref(v);
        } else {
            return v;
        }
    }
}

struct job_news *qmp_wait_job(struct qmp *q, const char *id, const char *status)
{
    struct job_news *j;
    while (!(j = qmp_job(q, id)) || strcmp(j->status, status)) {
        json_t *v = take_line(q);
        const char *event = json_string_value(json_object_get(v, "event"));
        if (!v) {
            receive(q);
            continue;
        }
        CHECK(event);
        note_event(q, v, event);
        json_decref(v);
    }
    return j;
}

void qmp_listen(struct qmp *q, uint64_t ns)
{
    io_sleep(ns);
    for (;;) {
        if (q->cap - q->fill < 4096) {
            q->cap = q->cap * 2 + 8192;
            q->buf = realloc(q->buf, q->cap);
            CHECK(q->buf);
        }
        ssize_t n = io_recv_now(q->sock, q->buf + q->fill, q->cap - q->fill);
        if (n <= 0)
            break;
        q->fill += (size_t)n;
    }
    for (json_t *v; (v = take_line(q)); json_decref(v)) {
        const char *event = json_string_value(json_object_get(v, "event"));
        CHECK(event);
        note_event(q, v, event);
    }
}

/* ------------------------------------------------------------------ QMP: calls */

static co_fn json_t *call(struct qmp *q, const char *command, const char *args, va_list ap)
{
    char *given = NULL, *line = NULL;
    CHECK(!args || vasprintf(&given, args, ap) >= 0);
    uint64_t id = ++q->id;
    int n = asprintf(&line, "{\"execute\":\"%s\"%s%s,\"id\":%" PRIu64 "}\n", command,
                     given ? ",\"arguments\":" : "", given ? given : "", id);
    CHECK(n > 0);
    struct iovec one = {line, (size_t)n};
    q->asked = ++q->w->tick;
    int r = io_send(q->sock, &one, 1);
    CHECK_SAY(r == 0, "QMP send: %d", r);
    json_t *v = next_answer(q);
    q->told = ++q->w->tick;
    if (json_integer_value(json_object_get(v, "id")) != (json_int_t)id || getenv("SIM_QMP"))
        fprintf(stderr, "[%" PRIu64 "..%" PRIu64 "] %s%s\n", q->asked, q->told, line,
                qmp_error(v) ? qmp_error(v) : "");
    CHECK(json_integer_value(json_object_get(v, "id")) == (json_int_t)id);
    free(line);
    free(given);
    return v;
}

json_t *qmp_call(struct qmp *q, const char *command, const char *args, ...)
{
    va_list ap;
    va_start(ap, args);
    json_t *v = call(q, command, args, ap);
    va_end(ap);
    return v;
}

const char *qmp_error(json_t *reply)
{
    return json_string_value(json_object_get(json_object_get(reply, "error"), "desc"));
}

static json_t *take_return(json_t *v, const char *command)
{
    CHECK_SAY(!qmp_error(v), "%s: %s", command, qmp_error(v));
    json_t *ret = json_incref(json_object_get(v, "return"));
    json_decref(v);
    return ret;
}

json_t *qmp_get(struct qmp *q, const char *command, const char *args, ...)
{
    va_list ap;
    va_start(ap, args);
    json_t *v = call(q, command, args, ap);
    va_end(ap);
    return take_return(v, command);
}

void qmp_do(struct qmp *q, const char *command, const char *args, ...)
{
    va_list ap;
    va_start(ap, args);
    json_t *v = call(q, command, args, ap);
    va_end(ap);
    json_decref(take_return(v, command));
}

void qmp_open(struct qmp *q, struct world *w)
{
    struct io_addr addr = {.type = IO_ADDR_UNIX, .path = QMP_ADDR};
    *q = (struct qmp){.w = w};
    CHECK(io_connect(&addr, &q->sock) == 0);
    json_t *hello = next_answer(q);
    CHECK(json_object_get(hello, "QMP"));
    json_decref(hello);
    qmp_do(q, "qmp_capabilities", NULL);
}

void qmp_close(struct qmp *q)
{
    io_sock_close(q->sock);
    free(q->buf);
    q->buf = NULL;
    q->sock = NULL;
}

void qmp_bits(struct qmp *q, const char *node, const char *name, unsigned shift, uint8_t *bits,
              size_t n)
{
    uint64_t next = 0;
    memset(bits, 0, n);
    do {
        json_t *row, *v = qmp_get(q, "query-dirty-ranges",
                                  "{\"node\":\"%s\",\"name\":\"%s\",\"offset\":%" PRIu64 "}", node,
                                  name, next);
        size_t i;
        json_array_foreach (json_object_get(v, "ranges"), i, row) {
            uint64_t off = (uint64_t)json_integer_value(json_object_get(row, "offset"));
            uint64_t len = (uint64_t)json_integer_value(json_object_get(row, "length"));
            for (uint64_t g = off >> shift; g << shift < off + len; g++) {
                CHECK(g < n);
                bits[g] = 1;
            }
        }
        next = (uint64_t)json_integer_value(json_object_get(v, "next"));
        json_decref(v);
    } while (next);
}

/* ------------------------------------------------------------------ lives */

void world_add_file(struct world *w, const char *node, const char *file, const char *more)
{
    qmp_do(&w->qmp, "blockdev-add",
           "{\"driver\":\"file\",\"node-name\":\"%s\",\"filename\":\"%s\"%s}", node, file, more);
}

void world_start_nbd(struct world *w)
{
    qmp_do(&w->qmp, "nbd-server-start",
           "{\"addr\":{\"type\":\"unix\",\"data\":{\"path\":\"" NBD_ADDR "\"}}}");
}

static void life_main(void *arg)
{
    struct world *w = arg;
    struct io_addr addr = {.type = IO_ADDR_UNIX, .path = QMP_ADDR};
    struct tide_error err = {0};
    CHECK_SAY(instance_new(w->io, &w->inst, &err) == 0, "%s", err.msg);
    CHECK_SAY(monitor_listen(w->inst->monitors, &addr, false, &err) == 0, "%s", err.msg);
    CHECK_SAY(instance_open(w->inst, &err) == 0, "%s", err.msg);
    sim_client_pid(w->io, 777);
    qmp_open(&w->qmp, w);
    if (w->cut)
        w->story->after_cut(w);
    else
        w->story->live(w);
    qmp_close(&w->qmp);
    instance_close(w->inst);
    w->inst = NULL;
    if (w->story->closed && !w->cut)
        w->story->closed(w);
    io_stop(w->io);
}

static int live(struct world *w, struct sim_config *cfg, uint64_t cut, uint64_t *hash)
{
    cfg->world = w->disk;
    CHECK(sim_new(cfg, &w->io) == 0);
    if (cut)
        sim_cut_after(w->io, cut);
    int r = io_run(w->io, life_main, w);
    if (r != 0 && r != SIM_POWER_CUT) {
        sim_report(w->io, stderr);
        CHECK_SAY(false, "io_run: %s", r == -EDEADLK ? "deadlock" : strerror(-r));
    }
    *hash = *hash * 31 + sim_trace_hash(w->io);
    io_free(w->io);
    w->io = NULL;
    return r;
}

static uint64_t tell(const struct scenario *story, uint64_t seed, bool *was_cut)
{
    static struct world w;
    w = (struct world){.story = story, .seed = seed, .chance = {seed * 2 + 1}};
    struct sim_config cfg = {.seed = seed};
    uint64_t hash = 0, cut = 0;
    current_world = &w;
    w.disk = sim_world_new();
    w.state = calloc(1, story->state_size);
    CHECK(w.state);
    cfg.n_loops = 2 + (unsigned)chance_below(&w.chance, 3);
    if (story->cut_one_in && chance_one_in(&w.chance, story->cut_one_in))
        cut = 1 + chance_below(&w.chance, story->cut_steps);
    story->prepare(&w, &cfg);
    *was_cut = live(&w, &cfg, cut, &hash) == SIM_POWER_CUT;
    if (*was_cut) {
        sim_clear_faults(w.disk);
        enum sim_cut mode = chance_one_in(&w.chance, 4) ? SIM_CUT_PROCESS : SIM_CUT_ANY;
        w.how = sim_power_cut(w.disk, mode, chance_next(&w.chance));
        w.cut = true;
        struct sim_config again = {.seed = seed + 1, .n_loops = cfg.n_loops};
        CHECK(live(&w, &again, 0, &hash) == 0);
    }
    hash = hash * 31 + sim_world_hash(w.disk);
    story->finish(&w);
    free(w.state);
    sim_world_free(w.disk);
    current_world = NULL;
    return hash;
}

/* ------------------------------------------------------------------ seeds */

#define TWICE_EACH 16u /* every so many seeds one is told twice */

static bool number_from_env(const char *name, uint64_t *v)
{
    const char *s = getenv(name);
    if (!s || !*s)
        return false;
    *v = strtoull(s, NULL, 0);
    return true;
}

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SHARE 4u /* a run takes ten times as long */
#else
#define SHARE 1u
#endif

static void tell_all(const struct scenario *story, unsigned number)
{
    uint64_t seed = 0, usual = story->n_seeds / SHARE, n = usual, n_cut = 0;
    struct timespec a, b;
    bool cut;
    if (number_from_env("SIM_SEED", &seed))
        n = 1;
    uint64_t least = n;
    if (number_from_env("SIM_SEEDS", &n) && story->weight)
        n = MAX(n / story->weight, MIN(n, least));
    clock_gettime(CLOCK_MONOTONIC, &a);
    for (uint64_t i = 0; i < n; i++, seed++) {
        uint64_t hash = tell(story, seed, &cut);
        n_cut += cut;
        if (n == 1)
            printf("# seed %" PRIu64 ": hash %016" PRIx64 "%s\n", seed, hash,
                   cut ? ", power cut" : "");
        if (i % TWICE_EACH == 0 && tell(story, seed, &cut) != hash) {
            fprintf(stderr, "%s: two runs of SIM_SEED=%" PRIu64 " differ\n", story->name, seed);
            abort();
        }
    }
    clock_gettime(CLOCK_MONOTONIC, &b);
    if (story->told && n >= usual)
        story->told();
    double s = (double)(b.tv_sec - a.tv_sec) + (double)(b.tv_nsec - a.tv_nsec) / 1e9;
    printf("ok %u - %s\n# %s: %" PRIu64 " seeds, %" PRIu64 " of them cut, %.1f a second\n", number,
           story->name, story->name, n, n_cut, (double)n / s);
    fflush(stdout);
}

int scenario_main(const struct scenario *const *stories, unsigned n)
{
    const char *only = getenv("SIM_ONLY");
    log_init("sim", getenv("SIM_LOG") ? LOG_LEVEL_DEBUG : LOG_LEVEL_ERROR);
    json_object_seed(1);
    printf("1..%u\n", n);
    for (unsigned i = 0; i < n; i++) {
        if (only && strcmp(only, stories[i]->name))
            printf("ok %u - %s # SKIP SIM_ONLY\n", i + 1, stories[i]->name);
        else
            tell_all(stories[i], i + 1);
    }
    return 0;
}
