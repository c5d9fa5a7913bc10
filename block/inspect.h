/* SPDX-License-Identifier: Apache-2.0 */
/* What queries tell about a node. Control loop, under the query lock. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "co/co.h"

struct node;

struct node_info {
    const char *driver;
    const char *filename; /* never NULL; borrowed from the node */
    const char *detect_zeroes;
    uint64_t size;
    uint64_t allocated; /* bytes on disk; UINT64_MAX: unknown */
    uint32_t cluster_size;
    bool read_only, direct, no_flush;
};
co_fn void node_inspect(struct node *n, struct node_info *out);
