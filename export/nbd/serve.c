/* SPDX-License-Identifier: Apache-2.0 */
/* Transmission: the way of requests from the socket to command.c and of replies back.
 *
 * Batching is what makes it quick. The *reader*, one coroutine a connection, receives as much as
 * there is, and runs each whole request of it in a pooled coroutine that usually ends without
 * having waited; the replies of the batch leave in one send. A request that had to wait finishes
 * later by itself, and whoever finds no *sender* at work becomes it, until no reply is left.
 *
 * The gate: the session enters its root once a batch (`in_batch`), each running request counts too,
 * and the last one out leaves. Nobody is inside while the session waits for the socket, in either
 * direction: a write is not admitted before all its data is here, and a reply is sent after its
 * request has left.
 *
 * Bounds: NBD_MAX_TASKS requests and NBD_MAX_BYTES of data and replies in flight; beyond, the
 * reader waits, and so a client that does not read its replies is not read from either. A request
 * is charged the most that it may hold until its reply is made, then what it does hold. A turn of
 * one connection ends after TURN_TASKS requests, TURN_BYTES or TURN_NS.
 *
 * Long reads of cached data do not pass through our memory (nbd_task_send_file): they are sent from
 * the file while their requests are admitted, as long as the client takes them.
 *
 * Received data stays where it arrived: a small write is done from the receive buffer, which is
 * replaced, not reused, while somebody writes from it. The data of a big write is received straight
 * into a buffer of its own. */
#include <assert.h>
#include <errno.h>
#include <string.h>

#include "base/mem.h"
#include "block/root.h"
#include "export/nbd/nbd.h"

#define NBD_MAX_TASKS 1024u
#define NBD_MAX_BYTES (64 * MIB)
#define TURN_TASKS 64u
#define TURN_BYTES MIB
#define TURN_NS 200000u
#define CLOCK_EVERY 8u           /* requests between two looks at the clock */
#define CLOCK_BYTES (128u << 10) /* a request of so many is worth a look by itself */

#define RBUF_LEN (256u << 10)
#define SMALL_PAYLOAD (64u << 10) /* up to here a write's data is received among the requests */
#define HINT_LEN 4096u            /* received at once when big writes come */
#define SEND_IOV 512u
#define SLAB_TASKS 32u
#define PATIENCE_NS 20000000u  /* with a client that takes nothing while a request is admitted */
#define LOOK_EVERY_NS 1000000u /* whether somebody wants to shut the gate meanwhile */

/* A receive buffer. `refs`: the session while it receives into it, and every write done from it. */
struct nbd_rbuf {
    uint8_t *data;
    unsigned refs;
    bool retired; /* counted in session.bytes until it is free */
};

struct slab {
    struct slab *next;
    struct nbd_task task[SLAB_TASKS];
};

struct nbd_session {
    struct nbd_context x; /* first: what command.c sees */
    struct io *io;
    struct loop *loop;
    struct io_sock *sock;

    struct nbd_rbuf *rbuf;
    size_t pos, fill; /* what of it is not read yet */
    size_t hint;      /* most to receive at once */

    struct slab *slabs;
    struct nbd_task *free;
    unsigned n_tasks;
    uint64_t bytes;

    bool in_batch;     /* the reader is at work, admitted, and will send */
    unsigned n_inside; /* requests that are admitted, and one for in_batch */
    struct co *reader; /* parked until something changes, else NULL */

    uint64_t turn, turn_began;
    unsigned turn_tasks;
    uint64_t turn_bytes;

    struct nbd_task *out, **out_end; /* replies to be sent */
    bool sending, broken;
    bool direct;                      /* who sends does so from a file */
    struct in_line *line, **line_end; /* others who want to */
    struct iovec iov[SEND_IOV];
};

struct nbd_context *nbd_task_context(struct nbd_task *t)
{
    return &t->s->x;
}

/* ------------------------------------------------------------------ the reader's waiting */

/* Returns when something has changed; the caller looks whether it is what it waits for. */
static void park(struct nbd_session *s)
{
    assert(!s->in_batch && !s->reader);
    s->reader = co_self();
    co_yield();
}

static void wake_reader(struct nbd_session *s)
{
    struct co *c = s->reader;
    if (c) {
        s->reader = NULL;
        co_wake(c);
    }
}

/* ------------------------------------------------------------------ receive buffers */

static struct nbd_rbuf *rbuf_new(void)
{
    struct nbd_rbuf *b = mem_zalloc(sizeof *b);
    if (!b)
        return NULL;
    b->refs = 1;
    b->data = io_buf_get(RBUF_LEN);
    if (!b->data) {
        mem_free(b);
        return NULL;
    }
    return b;
}

static void rbuf_put(struct nbd_session *s, struct nbd_rbuf *b)
{
    if (!b || --b->refs > 0)
        return;
    if (b->retired) {
        s->bytes -= RBUF_LEN;
        wake_reader(s);
    }
    io_buf_put(b->data, RBUF_LEN);
    mem_free(b);
}

/* Room for `need` bytes from pos on, and for a useful piece more. */
static int rbuf_room(struct nbd_session *s, size_t need)
{
    struct nbd_rbuf *b = s->rbuf;
    if (s->pos == s->fill && b->refs == 1)
        s->pos = s->fill = 0;
    if (s->pos + need <= RBUF_LEN && s->fill + HINT_LEN <= RBUF_LEN)
        return 0;
    if (b->refs > 1) {
        b = rbuf_new();
        if (!b)
            return -ENOMEM;
        s->rbuf->retired = true;
        s->bytes += RBUF_LEN;
    }
    memmove(b->data, s->rbuf->data + s->pos, s->fill - s->pos);
    s->fill -= s->pos;
    s->pos = 0;
    if (b != s->rbuf) {
        rbuf_put(s, s->rbuf);
        s->rbuf = b;
    }
    return 0;
}

/* ------------------------------------------------------------------ tasks */

static int slab_grow(struct nbd_session *s)
{
    struct slab *slab = mem_alloc(sizeof *slab);
    if (!slab)
        return -ENOMEM;
    slab->next = s->slabs;
    s->slabs = slab;
    for (unsigned i = 0; i < SLAB_TASKS; i++) {
        slab->task[i].next = s->free;
        s->free = &slab->task[i];
    }
    return 0;
}

static struct nbd_task *task_new(struct nbd_session *s)
{
    if (!s->free && slab_grow(s) < 0)
        return NULL;
    struct nbd_task *t = s->free;
    s->free = t->next;
    s->n_tasks++;
    *t = (struct nbd_task){.s = s};
    return t;
}

static void set_charge(struct nbd_task *t, uint64_t bytes)
{
    t->s->bytes += bytes - t->charge;
    t->charge = bytes;
}

static void task_free(struct nbd_task *t)
{
    struct nbd_session *s = t->s;
    rbuf_put(s, t->pin);
    if (t->buf)
        io_buf_put(t->buf, t->buf_len);
    mem_free(t->mem);
    set_charge(t, 0);
    s->n_tasks--;
    t->next = s->free;
    s->free = t;
    wake_reader(s);
}

/* ------------------------------------------------------------------ sending */

/* Takes replies from s->out as long as their pieces fit; returns the number of pieces. */
static unsigned gather(struct nbd_session *s, struct nbd_task **batch)
{
    unsigned n = 0;
    *batch = s->out;
    struct nbd_task **p = &s->out;
    while (*p && n + (*p)->n_iov <= SEND_IOV) {
        memcpy(&s->iov[n], (*p)->iov, (*p)->n_iov * sizeof *s->iov);
        n += (*p)->n_iov;
        p = &(*p)->next;
    }
    s->out = *p;
    *p = NULL;
    if (!s->out)
        s->out_end = &s->out;
    return n;
}

static void break_off(struct nbd_session *s)
{
    s->broken = true;
    s->x.left |= !s->x.goodbye;
    io_sock_shutdown(s->sock);
}

static void send_all(struct nbd_session *s)
{
    while (s->out) {
        struct nbd_task *batch;
        unsigned n = gather(s, &batch);
        if (!s->broken && io_send(s->sock, s->iov, n) < 0)
            break_off(s);
        while (batch) {
            struct nbd_task *t = batch;
            batch = t->next;
            task_free(t);
        }
    }
    s->sending = false;
    wake_reader(s);
}

static void sender(void *session)
{
    send_all(session);
}

/* ------------------------------------------------------------------ sending from files */

/* The wire is one: who sends from a file holds it as a sender does, and others of that kind wait in
 * line. They are admitted, for the file is the node's. So the one in front gives up when the gate
 * is shut or the client takes nothing, and nobody waits behind a plain sender, who waits for a slow
 * client as long as it takes: then all of them go the plain way, too. */
struct in_line {
    struct co *co;
    bool granted;
    struct in_line *next;
};

static struct in_line *line_pop(struct nbd_session *s)
{
    struct in_line *first = s->line;
    if (first) {
        s->line = first->next;
        if (!s->line)
            s->line_end = &s->line;
    }
    return first;
}

static co_fn bool take_wire(struct nbd_session *s)
{
    if (s->broken || (s->sending && !s->direct))
        return false;
    if (!s->sending) {
        s->sending = s->direct = true;
        return true;
    }
    struct in_line me = {.co = co_self()};
    *s->line_end = &me;
    s->line_end = &me.next;
    co_yield();
    return me.granted;
}

/* The holder of the wire is a plain sender from now on: whoever waits in line is sent away. */
static void turn_plain(struct nbd_session *s)
{
    struct in_line *l;
    s->direct = false;
    while ((l = line_pop(s)))
        co_wake(l->co);
}

/* The holder has sent from a file and is done: the next in line, if no plain reply waits. False:
 * there is no memory for somebody who sends the plain ones, so the holder has to, when it has left
 * the gate. */
static bool pass_wire(struct nbd_session *s)
{
    struct in_line *next = s->out || s->broken ? NULL : line_pop(s);
    if (next) {
        next->granted = true;
        co_wake(next->co);
        return true;
    }
    turn_plain(s);
    if (!s->in_batch && s->out)
        return loop_run_now(sender, s) == 0;
    s->sending = false; /* a batch is sent when it ends */
    wake_reader(s);
    return true;
}

uint64_t nbd_task_send_file(struct nbd_task *t, struct io_file *f, uint64_t off)
{
    struct nbd_session *s = t->s;
    uint64_t head = t->iov[0].iov_len, len = t->rq.len, now;
    if (!take_wire(s))
        return 0;
    uint64_t give_up = io_now(s->io) + PATIENCE_NS;
    ssize_t r;
    do {
        uint64_t h = MIN(t->sent, head), d = t->sent - h;
        struct iovec rest = {(char *)t->iov[0].iov_base + h, head - h};
        now = io_now(s->io);
        r = io_send_file(s->sock, rest, f, off + d, len - d, MIN(give_up, now + LOOK_EVERY_NS));
        if (r > 0) {
            t->sent += r;
            give_up = now + PATIENCE_NS;
        }
    } while (r >= 0 && t->sent < head + len && now < give_up && !root_is_shut(s->x.root));
    if (r < 0 && r != -EOPNOTSUPP) {
        break_off(s);
        t->sent = head + len;
    }
    t->on_wire = t->sent > 0 || !pass_wire(s);
    return t->sent;
}

void nbd_task_abandon(struct nbd_task *t)
{
    break_off(t->s);
    t->n_iov = 0;
}

/* ------------------------------------------------------------------ the batch */

static void leave(struct nbd_session *s)
{
    assert(s->n_inside > 0);
    if (--s->n_inside == 0) {
        root_leave(s->x.root);
        wake_reader(s);
    }
}

/* The reader is about to wait: leave the gate, send what the batch brought. The sending may go on
 * behind our back when the socket is full: a client that writes before it reads must be heard. */
static void end_batch(struct nbd_session *s)
{
    if (!s->in_batch)
        return;
    s->in_batch = false;
    leave(s);
    if (!s->out || s->sending)
        return;
    s->sending = true;
    if (loop_run_now(sender, s) < 0)
        send_all(s);
}

/* ------------------------------------------------------------------ running */

void nbd_task_yield_gate(struct nbd_task *t)
{
    struct nbd_session *s = t->s;
    if (!root_is_shut(s->x.root))
        return;
    if (t->own_entry)
        root_leave(s->x.root);
    else
        leave(s);
    root_enter(s->x.root);
    t->own_entry = true;
}

static void queue_reply(struct nbd_task *t)
{
    struct nbd_session *s = t->s;
    if (t->n_iov == 0) { /* all of it is on its way */
        task_free(t);
    } else if (t->sent) { /* the rest of what the client is reading now */
        t->next = s->out;
        s->out = t;
        if (!t->next)
            s->out_end = &t->next;
    } else {
        t->next = NULL;
        *s->out_end = t;
        s->out_end = &t->next;
    }
}

/* The work is done and the reply is made: give back what the reply does not need, queue it. */
static void task_done(struct nbd_task *t)
{
    struct nbd_session *s = t->s;
    if (t->own_entry)
        root_leave(s->x.root);
    else
        leave(s);
    rbuf_put(s, t->pin);
    t->pin = NULL;
    if (t->payload && t->buf) {
        io_buf_put(t->buf, t->buf_len);
        t->buf = NULL;
    }
    uint64_t held = (t->buf ? t->buf_len : 0) + t->mem_len;
    if (held < t->charge) {
        set_charge(t, held);
        wake_reader(s);
    }
    queue_reply(t);
}

static void task_main(void *task)
{
    struct nbd_task *t = task;
    struct nbd_session *s = t->s;
    nbd_task_run(t);
    bool on_wire = t->on_wire, rest = t->n_iov > 0;
    task_done(t);
    if (on_wire && !rest) {
        if (!pass_wire(s))
            send_all(s);
        return;
    }
    if (on_wire) {
        turn_plain(s);
        send_all(s);
        return;
    }
    if (s->in_batch || s->sending)
        return;
    s->sending = true;
    if (s->n_tasks > 1)
        loop_pause(); /* those who end in this turn too come along */
    send_all(s);
}

/* Into the gate, once for a batch. */
static void begin_batch(struct nbd_session *s)
{
    if (s->in_batch && !root_is_shut(s->x.root))
        return;
    end_batch(s);
    /* Not by our own count: whoever waits for our requests may give up and open the gate again. */
    while (s->n_inside > 0 && root_is_shut(s->x.root)) {
        root_enter(s->x.root);
        root_leave(s->x.root);
    }
    if (s->n_inside == 0)
        root_enter(s->x.root);
    s->n_inside++;
    s->in_batch = true;
}

static void task_start(struct nbd_task *t)
{
    struct nbd_session *s = t->s;
    begin_batch(s);
    s->n_inside++;
    if (loop_run_now(task_main, t) == 0)
        return;
    /* No memory for a coroutine: the reader does it, and others wait. It is no batch then, for a
     * batch is only left by the reader, who may be held up now. */
    leave(s);
    end_batch(s);
    root_enter(s->x.root);
    t->own_entry = true;
    task_main(t);
}

/* ------------------------------------------------------------------ receiving */

/* More bytes behind `fill`; the session waits outside the gate. */
static int receive(struct nbd_session *s, size_t need)
{
    end_batch(s);
    int r = rbuf_room(s, need);
    if (r < 0)
        return r;
    size_t room = MIN((size_t)RBUF_LEN - s->fill, MAX(s->hint, need));
    ssize_t n = io_recv(s->sock, s->rbuf->data + s->fill, room);
    if (n <= 0)
        return n < 0 ? (int)n : -ECONNRESET;
    s->fill += n;
    return 0;
}

/* At least `need` unread bytes lie at pos. */
static int have(struct nbd_session *s, size_t need)
{
    int r = 0;
    while (r == 0 && s->fill - s->pos < need)
        r = receive(s, need);
    return r;
}

/* The data of a big write: what is here is copied, the rest comes straight into place. */
static int receive_apart(struct nbd_session *s, struct nbd_task *t)
{
    size_t len = t->rq.payload, here = MIN(s->fill - s->pos, len);
    memcpy(t->buf, s->rbuf->data + s->pos, here);
    s->pos += here;
    s->hint = HINT_LEN;
    end_batch(s);
    int r = 0;
    for (size_t done = here; r == 0 && done < len; done += MIN(TURN_BYTES, len - done)) {
        if (done > here)
            loop_pause(); /* a quick client leaves the others their turns */
        r = io_recv_all(s->sock, (uint8_t *)t->buf + done, MIN(TURN_BYTES, len - done));
    }
    return r;
}

/* Without memory or use for it: read past it. */
static int receive_past(struct nbd_session *s, uint64_t len)
{
    for (uint64_t past = 0; len > 0;) {
        if (past >= TURN_BYTES) {
            past = 0;
            end_batch(s);
            loop_pause();
        }
        int r = have(s, 1);
        if (r < 0)
            return r;
        size_t n = MIN(s->fill - s->pos, len);
        s->pos += n;
        past += n;
        len -= n;
    }
    return 0;
}

/* pos is behind the header. */
static int receive_payload(struct nbd_session *s, struct nbd_task *t)
{
    uint64_t len = t->rq.payload;
    if (len <= SMALL_PAYLOAD || len <= s->fill - s->pos) {
        int r = have(s, len);
        if (r < 0)
            return r;
        t->payload = s->rbuf->data + s->pos;
        t->pin = s->rbuf;
        t->pin->refs++;
        s->pos += len;
        return 0;
    }
    t->buf = io_buf_get(len);
    t->buf_len = len;
    t->payload = t->buf;
    if (t->buf)
        return receive_apart(s, t);
    t->error = -ENOMEM;
    return receive_past(s, len);
}

/* Wait until another request of this cost may be in flight. */
static void wait_for_room(struct nbd_session *s, uint64_t cost)
{
    while (s->n_tasks > 0 && (s->n_tasks >= NBD_MAX_TASKS || s->bytes + cost > NBD_MAX_BYTES)) {
        end_batch(s);
        if (s->n_tasks > 0 && (s->n_tasks >= NBD_MAX_TASKS || s->bytes + cost > NBD_MAX_BYTES))
            park(s);
    }
}

static int next_header(struct nbd_session *s, struct nbd_request *rq)
{
    bool extended = s->x.conn->extended;
    size_t len = extended ? NBD_EXT_REQUEST_LEN : NBD_REQUEST_LEN;
    int r = have(s, len);
    if (r < 0)
        return r;
    const uint8_t *p = s->rbuf->data + s->pos;
    r = extended ? nbd_ext_request_decode(p, rq) : nbd_request_decode(p, rq);
    s->pos += len;
    return r;
}

/* The next request with all its data. 0: *out is it; 1: the client says goodbye; -errno. */
static int next_request(struct nbd_session *s, struct nbd_task **out)
{
    struct nbd_request rq;
    int r = next_header(s, &rq);
    if (r < 0)
        return r;
    if (rq.cmd == NBD_CMD_DISC)
        return 1;
    uint64_t cost = nbd_request_cost(s->x.conn, &rq);
    wait_for_room(s, cost);
    struct nbd_task *t = task_new(s);
    if (!t)
        return -ENOMEM;
    t->rq = rq;
    t->charge = cost;
    s->bytes += cost;
    if (rq.payload <= SMALL_PAYLOAD)
        s->hint = RBUF_LEN;
    if (rq.payload && nbd_request_takes_payload(s->x.conn, &rq))
        r = receive_payload(s, t);
    else if (rq.payload && rq.payload <= NBD_MAX_PAYLOAD)
        r = receive_past(s, rq.payload);
    if (r < 0) {
        task_free(t);
        return r;
    }
    if (t->pin && rq.cmd == NBD_CMD_WRITE)
        set_charge(t, 0); /* the receive buffer is counted instead */
    *out = t;
    return 0;
}

/* ------------------------------------------------------------------ turns */

/* Others of this loop get their chance when we have had ours. */
static void count_turn(struct nbd_session *s, uint64_t bytes)
{
    uint64_t turn = loop_turn_number(s->loop);
    if (turn != s->turn) {
        s->turn = turn;
        s->turn_began = io_now(s->io);
        s->turn_tasks = 0;
        s->turn_bytes = 0;
    }
    s->turn_tasks++;
    s->turn_bytes += bytes;
    if (s->turn_tasks < TURN_TASKS && s->turn_bytes < TURN_BYTES &&
        ((s->turn_tasks % CLOCK_EVERY && bytes <= CLOCK_BYTES) ||
         io_now(s->io) - s->turn_began < TURN_NS))
        return;
    end_batch(s);
    loop_pause();
}

static void serve_requests(struct nbd_session *s)
{
    struct nbd_task *t;
    int r = 0;
    /* Once a reply could not be sent, nobody waits for the requests that are here already. */
    while (!s->broken && !nbd_is_cut(&s->x) && (r = next_request(s, &t)) == 0) {
        /* Data that we refuse to take cannot be told from the next request. */
        bool last = t->rq.payload > NBD_MAX_PAYLOAD;
        uint64_t bytes = nbd_request_bytes(&t->rq);
        task_start(t);
        if (last) {
            r = -EPROTO;
            break;
        }
        count_turn(s, bytes);
    }
    s->x.left |= r < 0;
    s->x.goodbye = r > 0;
    end_batch(s);
    while (s->n_tasks > 0 || s->sending)
        park(s);
}

/* ------------------------------------------------------------------ the session */

static void session_free(struct nbd_session *s)
{
    if (!s)
        return;
    rbuf_put(s, s->rbuf);
    while (s->slabs) {
        struct slab *next = s->slabs->next;
        mem_free(s->slabs);
        s->slabs = next;
    }
    mem_free(s);
}

static struct nbd_session *session_new(struct nbd_conn *c)
{
    struct nbd_session *s = mem_zalloc(sizeof *s);
    if (!s)
        return NULL;
    s->x.conn = c;
    s->x.exp = c->exp;
    s->x.root = c->exp->root;
    s->loop = loop_self();
    s->io = loop_io(s->loop);
    s->sock = c->sock;
    s->hint = RBUF_LEN;
    s->turn = UINT64_MAX;
    s->out_end = &s->out;
    s->line_end = &s->line;
    s->rbuf = rbuf_new();
    if (!s->rbuf) {
        session_free(s);
        return NULL;
    }
    return s;
}

void nbd_serve(void *conn)
{
    struct nbd_conn *c = conn;
    struct nbd_session *s = session_new(c);
    if (s) {
        serve_requests(s);
        session_free(s);
    }
    io_event_set(&c->served);
}
