/* SPDX-License-Identifier: Apache-2.0 */
/* The simulator's heart: what happens next. Each step takes one of all things that can happen now,
 * by the seed: a loop takes a turn, with some of its ready coroutines; an operation takes effect,
 * or is answered. When nothing can happen, the clock jumps to the next thing that will. Nothing
 * depends on an address, on the machine or on real time. */
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "base/bytes.h"
#include "base/mem.h"
#include "io/sim_engine.h"
#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

#define SECOND UINT64_C(1000000000)

static struct sim *sim_of(struct io *io)
{
    return (struct sim *)io;
}

/* ------------------------------------------------------------------ trace */

void sim_trace(struct sim *s, const char *what, uint64_t a, uint64_t b, uint64_t c)
{
    uint64_t record[] = {XXH3_64bits(what, strlen(what)), s->now, a, b, c};
    s->hash = XXH3_64bits_withSeed(record, sizeof record, s->hash);
    FILE *f = s->cfg.trace ? s->cfg.trace : s->verbose ? stderr : NULL;
    if (f)
        fprintf(f, "%" PRIu64 " %" PRIu64 ".%09" PRIu64 " %s %" PRIu64 " %" PRIu64 " %" PRIu64 "\n",
                s->steps, s->now / SECOND, s->now % SECOND, what, a, b, c);
}

uint64_t sim_data_hash(const void *buf, size_t len)
{
    return XXH3_64bits(buf, len);
}

uint64_t sim_trace_hash(struct io *io)
{
    return sim_of(io)->hash;
}

const char *sim_kind_name(enum sim_kind kind)
{
    static const char *const names[SIM_N_KINDS] = {
        "any",      "open",     "close",   "stat",   "read", "write",  "fsync",
        "zero",     "truncate", "extent",  "copy",   "lock", "rename", "unlink",
        "sync-dir", "listen",   "connect", "accept", "recv", "send",   "signal"};
    return kind < SIM_N_KINDS ? names[kind] : "?";
}

/* ------------------------------------------------------------------ clock and chance */

static void clock_add(struct sim *s, uint64_t ns)
{
    s->now += ns;
    s->world->wall_ns += (int64_t)ns;
}

static uint64_t engine_now(struct io *io)
{
    return sim_of(io)->now;
}

static int64_t engine_wall(struct io *io)
{
    return sim_of(io)->world->wall_ns;
}

static void engine_random(struct io *io, void *buf, size_t len)
{
    unsigned char *p = buf;
    for (size_t i = 0; i < len; i += 8) {
        uint64_t v = htole64(sim_rand(&sim_of(io)->chance));
        memcpy(p + i, &v, MIN(len - i, (size_t)8));
    }
}

static int engine_pid(struct io *io)
{
    return sim_of(io)->cfg.pid;
}

/* Mostly short, sometimes long: so operations overtake each other. */
uint64_t sim_latency(struct sim *s)
{
    uint64_t max = s->cfg.latency_ns;
    return sim_percent(&s->order, 70) ? sim_below(&s->order, max / 16 + 1)
                                      : sim_below(&s->order, max + 1);
}

/* ------------------------------------------------------------------ operations */

static void list_add(struct sim *s, struct sim_op *op)
{
    op->prev = s->last_op;
    op->next = NULL;
    if (s->last_op)
        s->last_op->next = op;
    else
        s->ops = op;
    s->last_op = op;
}

static void list_remove(struct sim *s, struct sim_op *op)
{
    if (op->prev)
        op->prev->next = op->next;
    else
        s->ops = op->next;
    if (op->next)
        op->next->prev = op->prev;
    else
        s->last_op = op->prev;
}

static bool one_in(struct sim *s, unsigned n)
{
    return n && sim_below(&s->order, n) == 0;
}

static bool on_file(enum sim_kind kind)
{
    return kind >= SIM_OPEN && kind <= SIM_SYNC_DIR;
}

/* The test's own faults first, then those of the dice. Returns how long the operation hangs. */
static uint64_t plan_faults(struct sim *s, struct sim_op *op)
{
    const struct sim_fault *f = disk_fault(s->world, op->kind, op->name);
    if (f) {
        if (op->kind != SIM_CLOSE)
            op->err = -f->err;
        return f->stall_ns;
    }
    const struct sim_config *c = &s->cfg;
    if ((op->kind == SIM_READ && one_in(s, c->read_error_in)) ||
        (op->kind == SIM_WRITE && one_in(s, c->write_error_in)) ||
        (op->kind == SIM_FSYNC && one_in(s, c->sync_error_in)))
        op->err = -EIO;
    if ((op->kind == SIM_RECV || op->kind == SIM_SEND) && one_in(s, c->reset_in))
        op->err = -ECONNRESET;
    return on_file(op->kind) && one_in(s, c->stall_in) ? c->stall_ns : 0;
}

static bool can_take_effect(const struct sim_op *op)
{
    return op->err || !op->ready || op->ready(op);
}

/* True: nothing is left but to answer. */
static bool take_effect(struct sim_op *op)
{
    if (op->err && !op->own_errors) {
        op->result = op->err;
        op->finish = NULL;
        return true;
    }
    return op->effect(op);
}

static void answer(struct sim_op *op)
{
    if (op->finish)
        op->finish(op);
    sim_trace(op->sim, "answer", op->number, (uint64_t)op->result, 0);
}

static bool runs_inline(struct sim *s, struct sim_op *op, uint64_t stall)
{
    if (!co_inside())
        return true; /* setting up or clearing away */
    return op->may_inline && !stall && can_take_effect(op) &&
           sim_percent(&s->order, s->cfg.inline_percent);
}

int64_t sim_op_run(struct sim *s, struct sim_op *op)
{
    op->sim = s;
    op->number = ++s->n_submitted;
    uint64_t stall = plan_faults(s, op);
    sim_trace(s, sim_kind_name(op->kind), op->number, op->off, op->len);
    sim_trace(s, op->name, op->number, (uint64_t)op->err, stall);
    if (runs_inline(s, op, stall)) {
        assert(can_take_effect(op)); /* outside coroutines nobody can wait */
        if (take_effect(op)) {
            answer(op);
            return op->result;
        }
        assert(co_inside());
    }
    op->co = co_self();
    op->loop = loop_self();
    op->not_before = s->now + sim_latency(s);
    if (stall && sim_percent(&s->order, 50))
        op->stall_after = stall;
    else
        op->not_before += stall;
    list_add(s, op);
    co_yield();
    return op->result;
}

static bool op_eligible(const struct sim *s, const struct sim_op *op)
{
    return op->not_before <= s->now && (op->effected || can_take_effect(op));
}

static void op_step(struct sim *s, struct sim_op *op)
{
    if (!op->effected) {
        sim_trace(s, "effect", op->number, 0, 0);
        op->effected = take_effect(op);
        uint64_t stall = op->stall_after;
        op->stall_after = 0; /* an operation in parts hangs once */
        op->not_before = s->now + sim_latency(s) / 4 + stall;
        if (!op->effected || stall || sim_percent(&s->order, 50))
            return;
    }
    list_remove(s, op);
    answer(op);
    loop_enter(op->loop); /* its own thread reaps it: straight into the run queue */
    co_wake(op->co);
    loop_enter(NULL);
}

/* ------------------------------------------------------------------ steps */

static bool loop_can_run(const struct sim *s, struct loop *l)
{
    return loop_has_work(l) || loop_next_deadline(l) <= s->now;
}

/* Keep back all but the first few of the ready coroutines: others get a step in between. */
static struct co *hold_back(struct sim *s, struct loop *l, struct co **tail)
{
    uint64_t n = 0;
    for (struct co *c = l->run_head; c; c = co_next(c))
        n++;
    if (n < 2)
        return NULL;
    struct co *last = l->run_head;
    for (uint64_t keep = 1 + sim_below(&s->order, n); keep > 1; keep--)
        last = co_next(last);
    struct co *rest = co_next(last);
    if (!rest)
        return NULL;
    *tail = l->run_tail;
    l->run_tail = last;
    co_set_next(last, NULL);
    return rest;
}

static void loop_step(struct sim *s, struct loop *l)
{
    sim_trace(s, "turn", l->index, 0, 0);
    loop_enter(l);
    struct co *tail = NULL, *rest = hold_back(s, l, &tail);
    loop_turn(l);
    if (rest) {
        co_set_next(tail, l->run_head);
        if (!l->run_head)
            l->run_tail = tail;
        l->run_head = rest;
    }
    loop_enter(NULL);
}

/* When something that cannot happen yet will; IO_FOREVER: never by itself. */
static uint64_t next_event(struct sim *s)
{
    uint64_t at = IO_FOREVER;
    for (unsigned i = 0; i < s->io.n_loops; i++)
        at = MIN(at, loop_next_deadline(s->io.loops[i]));
    for (const struct sim_op *op = s->ops; op; op = op->next)
        if (op->effected || can_take_effect(op))
            at = MIN(at, op->not_before);
    return at;
}

/* Time passes while programs run: a little always, sometimes enough for a timer to be due before
 * what was ready is done. */
static void drift(struct sim *s)
{
    uint64_t r = sim_below(&s->order, 64);
    if (r < 8) {
        clock_add(s, sim_below(&s->order, 20000));
    } else if (r == 8) {
        uint64_t at = next_event(s);
        if (at != IO_FOREVER && at > s->now)
            clock_add(s, MIN(at - s->now, SECOND / 1000));
    }
}

static unsigned count_runnable(struct sim *s)
{
    unsigned n = 0;
    for (unsigned i = 0; i < s->io.n_loops; i++)
        n += loop_can_run(s, s->io.loops[i]);
    return n;
}

static void run_loop_number(struct sim *s, uint64_t k)
{
    for (unsigned i = 0; i < s->io.n_loops; i++)
        if (loop_can_run(s, s->io.loops[i]) && k-- == 0) {
            loop_step(s, s->io.loops[i]);
            return;
        }
}

static void run_op_number(struct sim *s, uint64_t k)
{
    for (struct sim_op *op = s->ops; op; op = op->next)
        if (op_eligible(s, op) && k-- == 0) {
            op_step(s, op);
            return;
        }
}

/* 1: go on; 0: all is done; or what io_run() returns. */
static int step(struct sim *s)
{
    unsigned n_loops = count_runnable(s), n_ops = 0;
    if (s->stopping && n_loops == 0)
        return 0;
    if (s->cut_at && s->steps >= s->cut_at)
        return SIM_POWER_CUT;
    s->steps++;
    for (const struct sim_op *op = s->ops; op; op = op->next)
        n_ops += op_eligible(s, op);
    if (n_loops + n_ops == 0) {
        uint64_t at = next_event(s);
        if (at == IO_FOREVER)
            return -EDEADLK;
        assert(at > s->now);
        clock_add(s, at - s->now); /* timers are late at times */
        if (sim_percent(&s->order, 25))
            clock_add(s, sim_below(&s->order, SECOND / 1000));
        return 1;
    }
    uint64_t k = sim_below(&s->order, n_loops + n_ops);
    if (k < n_loops)
        run_loop_number(s, k);
    else
        run_op_number(s, k - n_loops);
    drift(s);
    return 1;
}

/* What the core holds when the power goes is lost on purpose: no leak to report. */
void __lsan_disable(void) __attribute__((weak));
void __lsan_enable(void) __attribute__((weak));

static int run_to_the_end(struct sim *s)
{
    bool hide_leaks = s->cut_at && __lsan_disable && __lsan_enable;
    int r;
    if (hide_leaks)
        __lsan_disable();
    do
        r = step(s);
    while (r == 1);
    if (hide_leaks)
        __lsan_enable();
    return r;
}

static int engine_run(struct io *io, void (*main_fn)(void *), void *arg)
{
    struct sim *s = sim_of(io);
    assert(!s->running);
    s->running = true;
    int r = loop_spawn(io->loops[0], main_fn, arg);
    if (r < 0)
        return r;
    r = run_to_the_end(s);
    sim_trace(s, "end", (uint64_t)r, s->steps, 0);
    return r;
}

static void engine_stop(struct io *io)
{
    sim_of(io)->stopping = true;
}

static void engine_kick(struct loop *l)
{
    /* Nobody sleeps: each step looks at all loops. */
}

/* ------------------------------------------------------------------ signals */

static bool never(const struct sim_op *op)
{
    return false;
}

static bool no_effect(struct sim_op *op)
{
    return true;
}

static int engine_signal_wait(struct io *io)
{
    struct sim_op op = {.kind = SIM_SIGNAL, .name = "", .ready = never, .effect = no_effect};
    return (int)sim_op_run(sim_of(io), &op);
}

static int engine_signals_block(struct io *io)
{
    return 0;
}

/* ------------------------------------------------------------------ life and death */

/* Messages and timers may lie on stacks that are about to go: forget them first. */
static void abandon(struct sim *s)
{
    for (unsigned i = 0; i < s->io.n_loops; i++) {
        struct loop *l = s->io.loops[i];
        atomic_store(&l->mailbox, NULL);
        atomic_store(&l->remote_ready, NULL);
        l->run_head = l->run_tail = NULL;
        l->timers = NULL;
    }
    for (unsigned i = 0; i < s->io.n_loops; i++)
        co_abandon_all(&s->io.loops[i]->sched);
}

static void engine_free(struct io *io)
{
    struct sim *s = sim_of(io);
    bool alive = false;
    for (unsigned i = 0; i < io->n_loops; i++)
        alive |= io->loops[i]->sched.n_live > 0;
    if (alive)
        abandon(s);
    io_fini(io);
    sim_files_free(s);
    sim_socks_free(s);
    if (s->own_world)
        sim_world_free(s->world);
    free(s);
}

static const struct io_ops sim_ops = {
    .name = "simulator",
    .run = engine_run,
    .stop = engine_stop,
    .free = engine_free,
    .kick = engine_kick,
    .now = engine_now,
    .wall = engine_wall,
    .random = engine_random,
    .pid = engine_pid,
    .open = sim_open,
    .close = sim_close,
    .fstat = sim_fstat,
    .stat = sim_stat,
    .preadv = sim_preadv,
    .pwritev = sim_pwritev,
    .fsync = sim_fsync,
    .zero = sim_zero,
    .truncate = sim_truncate,
    .extent = sim_extent,
    .copy_range = sim_copy_range,
    .lock = sim_lock,
    .rename = sim_rename,
    .unlink = sim_unlink,
    .sync_dir = sim_sync_dir,
    .listen = sim_listen,
    .connect = sim_connect,
    .from_fds = sim_from_fds,
    .accept = sim_accept,
    .recv = sim_recv,
    .send = sim_send,
    .send_file = sim_send_file,
    .gone = sim_gone,
    .shutdown = sim_shutdown,
    .sock_close = sim_sock_close,
    .peer = sim_peer,
    .peer_pid = sim_peer_pid,
    .signal_wait = engine_signal_wait,
    .signals_block = engine_signals_block,
};

static void set_defaults(struct sim_config *c)
{
    c->n_loops = c->n_loops ? c->n_loops : 1;
    c->pid = c->pid ? c->pid : 4242;
    c->inline_percent = c->inline_percent == 0    ? 30
                        : c->inline_percent > 100 ? 0
                                                  : c->inline_percent;
    c->latency_ns = c->latency_ns ? c->latency_ns : SECOND / 1000;
    c->sock_buffer = c->sock_buffer ? c->sock_buffer : 64 * KIB;
    c->direct_align = c->direct_align ? c->direct_align : 512;
    c->stall_ns = c->stall_ns ? c->stall_ns : 5 * SECOND;
}

int sim_new(const struct sim_config *cfg, struct io **out)
{
    struct sim *s = sim_alloc(sizeof *s);
    const char *verbose = getenv("SIM_TRACE");
    s->cfg = *cfg;
    set_defaults(&s->cfg);
    s->verbose = verbose && *verbose == '1';
    s->order.state = cfg->seed;
    s->chance.state = sim_rand(&s->order);
    s->now = SECOND;
    s->next_port = 40000;
    s->client_pid = s->cfg.pid;
    int r = io_init(&s->io, &sim_ops, s->cfg.n_loops);
    if (r < 0) {
        io_fini(&s->io);
        free(s);
        return r;
    }
    if (cfg->seed % 2)
        s->io.turn_ns = 0;
    s->own_world = !cfg->world;
    s->world = cfg->world ? cfg->world : sim_world_new();
    s->life = s->world->life;
    *out = &s->io;
    return 0;
}

struct sim_world *sim_world_of(struct io *io)
{
    return sim_of(io)->world;
}

void sim_cut_after(struct io *io, uint64_t n_steps)
{
    sim_of(io)->cut_at = n_steps;
}

uint64_t sim_steps(struct io *io)
{
    return sim_of(io)->steps;
}

void sim_short_turns(struct io *io)
{
    io->turn_ns = 0;
}

void sim_client_pid(struct io *io, int pid)
{
    struct sim *s = sim_of(io);
    s->client_pid = pid ? pid : s->cfg.pid;
}

void sim_report(struct io *io, FILE *out)
{
    struct sim *s = sim_of(io);
    fprintf(out, "simulator: seed %" PRIu64 ", step %" PRIu64 ", time %" PRIu64 " ns\n",
            s->cfg.seed, s->steps, s->now);
    for (unsigned i = 0; i < io->n_loops; i++) {
        struct loop *l = io->loops[i];
        unsigned in_ops = 0;
        for (const struct sim_op *op = s->ops; op; op = op->next)
            in_ops += op->loop == l;
        fprintf(out,
                "  loop %u: %u coroutines alive, %u of them in operations, %u with a timer%s\n", i,
                l->sched.n_live, in_ops, l->n_timers, loop_has_work(l) ? ", some ready" : "");
    }
    for (const struct sim_op *op = s->ops; op; op = op->next)
        fprintf(out,
                "  loop %u: %s '%s' offset %" PRIu64 " length %" PRIu64 ", operation %" PRIu64
                "%s\n",
                op->loop->index, sim_kind_name(op->kind), op->name, op->off, op->len, op->number,
                op->effected          ? ", answer under way"
                : can_take_effect(op) ? ""
                                      : ", waits for the other side");
}
