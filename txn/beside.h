/* SPDX-License-Identifier: Apache-2.0 */
/* Which uses of disks (struct disk_use) are in each other's way, though they name different nodes.
 * Part of an explanation. */
#pragma once
#include <stddef.h>

#include "txn/footprint.h"

struct beside;

enum beside_why { BESIDE_DISK /* one node at the bottom */, BESIDE_FILE /* one file under two */ };
/* 0, or -errno, which ends the search. */
typedef int beside_found(void *arg, const struct disk_use *earlier, const struct disk_use *later,
                         enum beside_why why);

/* -ENOMEM. */
int beside_new(const struct footprint *f, struct beside **out);
void beside_free(struct beside *b); /* NULL is fine */
/* The next of f->disk, in their order: calls `found` for every earlier one that meets it, for some
 * twice. */
int beside_next(struct beside *b, beside_found *found, void *arg);
