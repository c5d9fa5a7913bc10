/* SPDX-License-Identifier: Apache-2.0 */
#include "block/inspect.h"

#include "base/mem.h"
#include "block/driver.h"
#include "block/node.h"
#include "io/io.h"
#include "schema/types.h"

#define ANSWER_NS 100000000u /* how long a query waits for the answers of disks */
#define QUESTIONS 64u        /* at once: each may take a stack and a thread of the pool */

char *node_set_filename(struct node *n, char *name)
{
    char *old = n->filename;
    n->filename = name;
    return old;
}

static const char *filename_of(const struct node *n)
{
    if (n->filename)
        return n->filename;
    return n->n_children ? filename_of(n->child[0]) : "";
}

void node_inspect(const struct node *n, struct node_info *out)
{
    *out = (struct node_info){
        .driver = n->ops->name,
        .filename = filename_of(n),
        .detect_zeroes = q_blockdev_detect_zeroes_options_names[n->detect_zeroes],
        .size = n->size,
        .allocated = n->ops->allocated ? n->ops->allocated(n) : UINT64_MAX,
        .cluster_size = n->cluster,
        .read_only = n->read_only,
        .direct = n->direct,
        .no_flush = n->no_flush,
    };
    if (!out->filename[0])
        out->filename = n->ops->name;
}

/* ------------------------------------------------------------------ what only disks know */

struct inquiry {
    unsigned open; /* questions, and one for who waits, */
    bool left;     /* until he leaves */
    struct io_event answered;
};

void inquiry_begin(struct inquiry *q)
{
    q->open++;
}

void inquiry_end(struct inquiry *q)
{
    if (--q->open == 0)
        mem_free(q);
    else
        io_event_set(&q->answered);
}

bool inquiry_left(const struct inquiry *q)
{
    return q->left;
}

static struct node *nth_node(struct graph *g, size_t at)
{
    struct node *n = TAILQ_FIRST(&g->nodes);
    while (n && at--)
        n = TAILQ_NEXT(n, link);
    return n;
}

/* Nodes may come and go while this waits, so it may ask one twice, or miss one: that one says what
 * it said last. */
void graph_ask_disks(struct graph *g)
{
    uint64_t deadline = io_now(g->io) + ANSWER_NS;
    struct inquiry *q = mem_zalloc(sizeof *q);
    size_t asked = 0;
    if (!q)
        return;
    *q = (struct inquiry){1, false, IO_EVENT_INIT};
    for (struct node *n = nth_node(g, 0); n; asked++) {
        if (n->ops->ask_allocated)
            n->ops->ask_allocated(n, q);
        bool waited = q->open > QUESTIONS;
        while (q->open > QUESTIONS && io_event_wait(&q->answered, deadline) == 0)
            ;
        if (q->open > QUESTIONS)
            break;
        n = waited ? nth_node(g, asked + 1) : TAILQ_NEXT(n, link);
    }
    while (q->open > 1 && io_event_wait(&q->answered, deadline) == 0)
        ;
    q->left = true;
    inquiry_end(q);
}
