/* SPDX-License-Identifier: Apache-2.0 */
#include "block/inspect.h"

#include "block/driver.h"
#include "block/node.h"
#include "schema/types.h"

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

void node_inspect(struct node *n, struct node_info *out)
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
