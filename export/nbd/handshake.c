/* SPDX-License-Identifier: Apache-2.0 */
/* Option haggling of the fixed newstyle handshake.
 *
 *   server   "NBDMAGIC" "IHAVEOPT" flags 2
 *   client   flags 4, then options: "IHAVEOPT" option 4, length 4, data
 *   server   answers each: magic 8, option 4, type 4, length 4, data
 *
 * GO (or the older EXPORT_NAME) ends it. All this happens on the control loop, so the table of
 * exports stands still between two yields; the answer to an option is therefore put together
 * completely before any of it is sent. While a list of actions is under way whoever asks about
 * exports waits, holding nothing, until it is decided. A client may say anything: what is
 * understood is bounded, what is not is read past and refused by name, and only what breaks the
 * framing, or never comes to an end, ends the connection. After each option, and each 64 KiB of one
 * that is too long, others have their turn: this is the loop of the monitor and of every
 * transaction. */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "base/log.h"
#include "base/mem.h"
#include "block/node.h"
#include "block/root.h"
#include "export/nbd/nbd.h"

#define PREFERRED_BLOCK 4096u
#define MAX_QUERIES 1024u /* in one option, besides one for each context there is */
#define PAUSE_EVERY (64u << 10)

/* ------------------------------------------------------------------ answers */

struct answer {
    uint8_t *p;
    size_t len, cap;
    bool failed; /* no memory */
};

static void put(struct answer *a, const void *data, size_t len)
{
    if (a->failed || len == 0)
        return;
    if (len > a->cap - a->len) {
        size_t cap = MAX(2 * a->cap, a->len + len + 256);
        uint8_t *p = mem_realloc(a->p, cap, 1);
        if (!p) {
            a->failed = true;
            return;
        }
        a->p = p;
        a->cap = cap;
    }
    memcpy(a->p + a->len, data, len);
    a->len += len;
}

static void put16(struct answer *a, uint16_t v)
{
    uint8_t b[2];
    put_be16(b, v);
    put(a, b, sizeof b);
}

static void put32(struct answer *a, uint32_t v)
{
    uint8_t b[4];
    put_be32(b, v);
    put(a, b, sizeof b);
}

static void put64(struct answer *a, uint64_t v)
{
    uint8_t b[8];
    put_be64(b, v);
    put(a, b, sizeof b);
}

/* The head of one reply; `len` bytes have to follow. */
static void put_reply(struct answer *a, uint32_t opt, uint32_t type, size_t len)
{
    put64(a, NBD_OPTION_REPLY_MAGIC);
    put32(a, opt);
    put32(a, type);
    put32(a, len);
}

__attribute__((format(printf, 4, 5))) static void put_error(struct answer *a, uint32_t opt,
                                                            uint32_t type, const char *fmt, ...)
{
    char text[256];
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    size_t len = n < 0 ? 0 : MIN((size_t)n, sizeof text - 1);
    put_reply(a, opt, type, len);
    put(a, text, len);
}

static int send_answer(struct nbd_conn *c, struct answer *a)
{
    struct iovec iov = {a->p, a->len};
    if (a->failed)
        return -ENOMEM;
    return a->len ? io_send(c->sock, &iov, 1) : 0;
}

/* ------------------------------------------------------------------ questions */

/* The data of an option, taken from the front. */
struct question {
    uint32_t opt;
    const uint8_t *p;
    size_t len;
};

static bool take32(struct question *q, uint32_t *v)
{
    if (q->len < 4)
        return false;
    *v = get_be32(q->p);
    q->p += 4;
    q->len -= 4;
    return true;
}

static bool take16(struct question *q, uint16_t *v)
{
    if (q->len < 2)
        return false;
    *v = get_be16(q->p);
    q->p += 2;
    q->len -= 2;
    return true;
}

static bool take_string(struct question *q, const char **s, size_t *len)
{
    uint32_t n;
    if (!take32(q, &n) || n > q->len)
        return false;
    *s = (const char *)q->p;
    *len = n;
    q->p += n;
    q->len -= n;
    return true;
}

/* An export's name as a person can read it in an error. */
static const char *shown(const char *name, size_t len, char buf[84])
{
    size_t n = MIN(len, (size_t)80);
    for (size_t i = 0; i < n; i++)
        buf[i] = (unsigned char)name[i] < 32 || name[i] == 127 ? '?' : name[i];
    memcpy(buf + n, "...", 4);
    if (len == n)
        buf[n] = '\0';
    return buf;
}

/* ------------------------------------------------------------------ exports */

/* To the byte: what is not a whole block is served too. */
static uint64_t export_size(const struct nbd_export *e)
{
    return node_size(root_node(e->root));
}

static bool has_contexts(const struct nbd_conn *c, const struct nbd_export *e)
{
    return c->n_contexts && c->contexts_serial == e->serial;
}

static unsigned export_flags(const struct nbd_conn *c, const struct nbd_export *e, uint32_t opt)
{
    unsigned f = NBD_HAS_FLAGS | NBD_SEND_FLUSH | NBD_SEND_FUA | NBD_SEND_CACHE;
    if (c->structured)
        f |= NBD_SEND_DF;
    if (e->writable)
        f |= NBD_SEND_TRIM | NBD_SEND_WRITE_ZEROES | NBD_SEND_FAST_ZERO;
    else
        f |= NBD_READ_ONLY;
    /* A flush covers what any connection has completed: it is the node's. */
    if (c->srv->max_connections != 1)
        f |= NBD_CAN_MULTI_CONN;
    if (c->extended && (opt == NBD_OPT_INFO || has_contexts(c, e)))
        f |= NBD_BLOCK_STAT_PAYLOAD;
    return f;
}

/* The client has chosen; contexts chosen for another export do not count. */
static void choose_export(struct nbd_conn *c, struct nbd_export *e)
{
    c->exp = e;
    e->n_conns++;
    if (!has_contexts(c, e))
        c->n_contexts = 0;
}

/* The smallest block is 1, also on a node with an alignment. A client that is told 4096 reads and
 * writes back whole blocks by itself, and two of them undo each other's work; here it is exact. */
static void put_block_sizes(struct answer *a, uint32_t opt, const struct nbd_export *e)
{
    put_reply(a, opt, NBD_REP_INFO, 14);
    put16(a, NBD_INFO_BLOCK_SIZE);
    put32(a, 1);
    put32(a, MAX(PREFERRED_BLOCK, node_align(root_node(e->root))));
    put32(a, NBD_MAX_PAYLOAD);
}

static void put_info_text(struct answer *a, uint32_t opt, unsigned info, const char *text)
{
    put_reply(a, opt, NBD_REP_INFO, 2 + strlen(text));
    put16(a, info);
    put(a, text, strlen(text));
}

/* INFO and GO. */
static int answer_info(struct nbd_conn *c, struct question *q, struct answer *a)
{
    const char *name;
    size_t len;
    uint16_t n, info;
    char buf[84];
    bool want_name = false;
    if (!take_string(q, &name, &len) || !take16(q, &n) || q->len != 2 * (size_t)n) {
        put_error(a, q->opt, NBD_REP_ERR_INVALID, "the option's lengths do not add up");
        return 0;
    }
    if (len > NBD_MAX_STRING) {
        put_error(a, q->opt, NBD_REP_ERR_INVALID, "the export name is longer than %u bytes",
                  NBD_MAX_STRING);
        return 0;
    }
    while (take16(q, &info))
        want_name |= info == NBD_INFO_NAME;
    struct nbd_export *e = nbd_export_find(c->srv, name, len);
    if (!e) {
        put_error(a, q->opt, NBD_REP_ERR_UNKNOWN, "there is no export '%s'", shown(name, len, buf));
        return 0;
    }
    if (want_name)
        put_info_text(a, q->opt, NBD_INFO_NAME, e->name);
    if (e->description)
        put_info_text(a, q->opt, NBD_INFO_DESCRIPTION, e->description);
    put_block_sizes(a, q->opt, e);
    put_reply(a, q->opt, NBD_REP_INFO, 12);
    put16(a, NBD_INFO_EXPORT);
    put64(a, export_size(e));
    put16(a, export_flags(c, e, q->opt));
    put_reply(a, q->opt, NBD_REP_ACK, 0);
    if (q->opt == NBD_OPT_INFO || a->failed)
        return 0;
    choose_export(c, e);
    return 1;
}

/* The old way: no reply can say no, so a wrong name ends the connection, and so does a client that
 * asked for extended headers, which do not go with it. */
static int answer_export_name(struct nbd_conn *c, struct question *q, struct answer *a)
{
    static const uint8_t zeroes[124];
    struct nbd_export *e = nbd_export_find(c->srv, (const char *)q->p, q->len);
    if (c->extended)
        return -EPROTO;
    if (!e)
        return -ENOENT;
    put64(a, export_size(e));
    put16(a, export_flags(c, e, q->opt));
    if (!c->no_zeroes)
        put(a, zeroes, sizeof zeroes);
    if (a->failed)
        return -ENOMEM;
    choose_export(c, e);
    return 1;
}

static void answer_list(struct nbd_conn *c, struct question *q, struct answer *a)
{
    struct nbd_export *e;
    TAILQ_FOREACH (e, &c->srv->exports, link) {
        if (e->hidden)
            continue;
        const char *d = e->description ? e->description : "";
        put_reply(a, q->opt, NBD_REP_SERVER, 4 + strlen(e->name) + strlen(d));
        put32(a, strlen(e->name));
        put(a, e->name, strlen(e->name));
        put(a, d, strlen(d));
    }
    put_reply(a, q->opt, NBD_REP_ACK, 0);
}

/* ------------------------------------------------------------------ contexts */

/* Marks in `chosen` what the queries ask for. False: the data is malformed, or names so many that
 * looking for all of them would hold up the control loop. */
static bool match_queries(const struct nbd_export *e, struct question *q, bool list,
                          uint8_t *chosen)
{
    uint32_t n;
    unsigned families = 0;
    const char *query;
    size_t len;
    if (!take32(q, &n) || n > MAX_QUERIES + nbd_n_contexts(e))
        return false;
    if (n == 0 && list)
        nbd_context_all(e, chosen);
    for (uint32_t i = 0; i < n; i++) {
        if (!take_string(q, &query, &len))
            return false;
        nbd_context_match(e, query, len, list ? &families : NULL, chosen);
    }
    nbd_context_families(e, families, chosen);
    return q->len == 0;
}

static void put_contexts(struct answer *a, struct question *q, const struct nbd_export *e,
                         const uint8_t *chosen)
{
    for (unsigned i = 0; i < nbd_n_contexts(e); i++) {
        const char *prefix, *name;
        if (!chosen[i])
            continue;
        nbd_context_name(e, i, &prefix, &name);
        put_reply(a, q->opt, NBD_REP_META_CONTEXT, 4 + strlen(prefix) + strlen(name));
        put32(a, q->opt == NBD_OPT_LIST_META_CONTEXT ? 0 : i);
        put(a, prefix, strlen(prefix));
        put(a, name, strlen(name));
    }
    put_reply(a, q->opt, NBD_REP_ACK, 0);
}

static void keep_contexts(struct nbd_conn *c, const struct nbd_export *e, uint8_t *chosen)
{
    mem_free(c->contexts);
    c->contexts = chosen;
    c->n_chosen = 0;
    for (unsigned id = 0; id < nbd_n_contexts(e); id++)
        c->n_chosen += chosen[id];
    c->n_contexts = c->n_chosen ? nbd_n_contexts(e) : 0;
    c->contexts_serial = e->serial;
}

/* LIST_META_CONTEXT and SET_META_CONTEXT. */
static void answer_meta(struct nbd_conn *c, struct question *q, struct answer *a)
{
    bool list = q->opt == NBD_OPT_LIST_META_CONTEXT;
    const char *name;
    size_t len;
    char buf[84];
    if (!list)
        c->n_contexts = 0; /* each SET starts afresh, a failed one too */
    if (!list && !c->structured) {
        put_error(a, q->opt, NBD_REP_ERR_INVALID,
                  "structured replies or extended headers have to be negotiated first");
        return;
    }
    if (!take_string(q, &name, &len) || len > NBD_MAX_STRING) {
        put_error(a, q->opt, NBD_REP_ERR_INVALID, "the export name is malformed");
        return;
    }
    struct nbd_export *e = nbd_export_find(c->srv, name, len);
    if (!e) {
        put_error(a, q->opt, NBD_REP_ERR_UNKNOWN, "there is no export '%s'", shown(name, len, buf));
        return;
    }
    uint8_t *chosen = mem_zalloc(nbd_n_contexts(e));
    if (!chosen) {
        a->failed = true;
        return;
    }
    if (!match_queries(e, q, list, chosen)) {
        put_error(a, q->opt, NBD_REP_ERR_INVALID, "the queries are malformed or more than %u",
                  MAX_QUERIES);
        mem_free(chosen);
        return;
    }
    put_contexts(a, q, e, chosen);
    if (list)
        mem_free(chosen);
    else
        keep_contexts(c, e, chosen);
}

/* ------------------------------------------------------------------ the haggling */

static void answer_structured(struct nbd_conn *c, struct question *q, struct answer *a)
{
    if (c->extended) {
        put_error(a, q->opt, NBD_REP_ERR_EXT_HEADER_REQD,
                  "extended headers are on, which include structured replies");
        return;
    }
    if (c->structured) {
        put_error(a, q->opt, NBD_REP_ERR_INVALID, "structured replies are on already");
        return;
    }
    c->structured = true;
    put_reply(a, q->opt, NBD_REP_ACK, 0);
}

static void answer_extended(struct nbd_conn *c, struct question *q, struct answer *a)
{
    if (c->extended) {
        put_error(a, q->opt, NBD_REP_ERR_INVALID, "extended headers are on already");
        return;
    }
    c->extended = c->structured = true;
    put_reply(a, q->opt, NBD_REP_ACK, 0);
}

static bool takes_no_data(uint32_t opt)
{
    return opt == NBD_OPT_ABORT || opt == NBD_OPT_LIST || opt == NBD_OPT_STARTTLS ||
           opt == NBD_OPT_STRUCTURED_REPLY || opt == NBD_OPT_EXTENDED_HEADERS;
}

static bool looks_at_exports(uint32_t opt)
{
    return opt == NBD_OPT_EXPORT_NAME || opt == NBD_OPT_LIST || opt == NBD_OPT_INFO ||
           opt == NBD_OPT_GO || opt == NBD_OPT_LIST_META_CONTEXT || opt == NBD_OPT_SET_META_CONTEXT;
}

/* 1: transmission begins; 0: more options; -errno: the end. */
static int answer_option(struct nbd_conn *c, struct question *q, struct answer *a)
{
    if (takes_no_data(q->opt) && q->len > 0) {
        put_error(a, q->opt, NBD_REP_ERR_INVALID, "this option takes no data");
        return 0;
    }
    switch (q->opt) {
    case NBD_OPT_EXPORT_NAME:
        return answer_export_name(c, q, a);
    case NBD_OPT_ABORT:
        put_reply(a, q->opt, NBD_REP_ACK, 0);
        return -ECONNABORTED;
    case NBD_OPT_LIST:
        answer_list(c, q, a);
        return 0;
    case NBD_OPT_STARTTLS:
        put_error(a, q->opt, NBD_REP_ERR_POLICY, "this server has no TLS credentials");
        return 0;
    case NBD_OPT_INFO:
    case NBD_OPT_GO:
        return answer_info(c, q, a);
    case NBD_OPT_STRUCTURED_REPLY:
        answer_structured(c, q, a);
        return 0;
    case NBD_OPT_EXTENDED_HEADERS:
        answer_extended(c, q, a);
        return 0;
    case NBD_OPT_LIST_META_CONTEXT:
    case NBD_OPT_SET_META_CONTEXT:
        answer_meta(c, q, a);
        return 0;
    default:
        put_error(a, q->opt, NBD_REP_ERR_UNSUP, "option %u is not known here", (unsigned)q->opt);
        return 0;
    }
}

static int read_past(struct nbd_conn *c, uint64_t len)
{
    uint8_t waste[2048];
    for (uint64_t done = 0; done < len;) {
        size_t n = MIN(len - done, sizeof waste);
        int r = io_recv_all(c->sock, waste, n);
        if (r < 0)
            return r;
        done += n;
        if (done % PAUSE_EVERY == 0)
            loop_pause();
    }
    return 0;
}

/* Options whose data is not worth keeping. 0: refused politely; -errno: the end. */
static int refuse_long(struct nbd_conn *c, uint32_t opt, uint32_t len)
{
    struct answer a = {0};
    if (opt == NBD_OPT_EXPORT_NAME)
        return -EMSGSIZE;
    int r = read_past(c, len);
    if (r == 0) {
        put_error(&a, opt, NBD_REP_ERR_TOO_BIG, "option data is limited to %u bytes",
                  NBD_MAX_OPTION_LEN);
        r = send_answer(c, &a);
        mem_free(a.p);
    }
    return r;
}

static int one_option(struct nbd_conn *c)
{
    uint8_t head[NBD_OPTION_LEN];
    int r = io_recv_all(c->sock, head, sizeof head);
    if (r < 0)
        return r;
    if (get_be64(head) != NBD_OPTION_MAGIC)
        return -EPROTO;
    uint32_t opt = get_be32(head + 8), len = get_be32(head + 12);
    if (!c->fixed && opt != NBD_OPT_EXPORT_NAME)
        return -EPROTO; /* an old client would not understand the answer */
    c->haggled += sizeof head + len;
    if (c->haggled > NBD_MAX_HAGGLE)
        return -EMSGSIZE;
    if (len > (opt == NBD_OPT_EXPORT_NAME ? NBD_MAX_STRING : NBD_MAX_OPTION_LEN))
        return refuse_long(c, opt, len);
    mem_autofree uint8_t *data = mem_alloc(MAX(len, 1u));
    if (!data)
        return -ENOMEM;
    r = io_recv_all(c->sock, data, len);
    if (r < 0)
        return r;
    struct question q = {opt, data, len};
    struct answer a = {0};
    if (looks_at_exports(opt))
        graph_query_begin(c->srv->graph);
    r = answer_option(c, &q, &a);
    if (looks_at_exports(opt))
        graph_query_end(c->srv->graph);
    int sent = send_answer(c, &a);
    mem_free(a.p);
    return sent < 0 ? sent : r;
}

static int greet(struct nbd_conn *c)
{
    uint8_t hello[18], flags[4];
    put_be64(hello, NBD_MAGIC);
    put_be64(hello + 8, NBD_OPTION_MAGIC);
    put_be16(hello + 16, NBD_FIXED_NEWSTYLE | NBD_NO_ZEROES);
    struct iovec iov = {hello, sizeof hello};
    int r = io_send(c->sock, &iov, 1);
    if (r == 0)
        r = io_recv_all(c->sock, flags, sizeof flags);
    if (r < 0)
        return r;
    uint32_t f = get_be32(flags);
    if (f & ~(NBD_FIXED_NEWSTYLE | NBD_NO_ZEROES))
        return -EPROTO;
    c->fixed = f & NBD_FIXED_NEWSTYLE;
    c->no_zeroes = f & NBD_NO_ZEROES;
    return 0;
}

int nbd_handshake(struct nbd_conn *c)
{
    int r = greet(c);
    for (unsigned n = 0; r == 0 && n < NBD_MAX_OPTIONS; n++) {
        r = one_option(c);
        if (r == 0)
            loop_pause();
    }
    if (r == 0)
        return -EPROTO; /* it only plays with us */
    return r > 0 ? 0 : r;
}
