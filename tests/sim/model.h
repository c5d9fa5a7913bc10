/* SPDX-License-Identifier: Apache-2.0 */
/* What the clients of one NBD export may observe. Pure memory: knows ticks (world.h), no I/O.
 *
 * The disk is cut into units of MODEL_UNIT bytes. Each write has a number and fills its units with
 * stamps made of that number and the unit's place, so a unit that is read tells who wrote it. A
 * unit keeps its *versions*: the writes that it may still show, now or after a power cut. A version
 * is *hidden* from tick h on when every read that is sent later must show something newer; and it
 * is *lost* for good when that newer thing is durable.
 *
 * What is promised (doc/proto.md of the NetworkBlockDevice project; the section is named):
 *
 *   "Ordering of messages and writes": requests that are under way at the same time may be carried
 *     out in any order, and nothing says that one of them is indivisible. So two writes know an
 *     order only if one was answered before the other was sent, on whatever connections; until the
 *     answer a byte shows either, and neighbours decide each for itself. (What a power cut leaves
 *     is never torn within a unit: disks write sectors whole.)
 *   same section, flush: what was answered before the flush was sent is durable when the flush is
 *     answered. "Transmission flags", CAN_MULTI_CONN: whichever connections the two were on.
 *   same section, FUA: what the request itself wrote is durable when it is answered, and nothing
 *     else is.
 *   "Request types", TRIM: what a reader finds in the range is anything, until it is written again.
 *     Here: zeroes or whatever was ever written there, also when it is read twice.
 *   "Request types", WRITE_ZEROES: reads as zeroes, whether or not it may become a hole.
 *   "Error values": a request that fails may have had its effect, none, or some of it.
 *   "Metadata querying", base:allocation: ZERO says that it reads as zeroes (HOLE says nothing
 *     about the contents); qemu:dirty-bitmap: what is not dirty was not written since.
 *
 * Who disconnects before the answer never learns: such a write may take effect at any later time,
 * until model_gone() says that the server has let go of it.
 *
 * Checks return NULL, or a sentence about what cannot be; it lives until the next call. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MODEL_UNIT 64u
#define MODEL_NEVER UINT64_MAX

enum model_kind { MODEL_WRITE, MODEL_ZERO, MODEL_TRIM };

struct model;
/* All zeroes, durable. `size` and all ranges below are multiples of MODEL_UNIT. */
struct model *model_new(uint64_t size);
void model_free(struct model *m);

/* A write is about to be sent; its number (>= 1). Ticks never go back and are >= 1. */
uint32_t model_send(struct model *m, enum model_kind kind, bool fua, uint64_t off, uint64_t len,
                    uint64_t tick);
/* The bytes that write number `w`, a MODEL_WRITE, carries. */
void model_data(const struct model *m, uint32_t w, uint8_t *buf);
/* It was answered. */
void model_done(struct model *m, uint32_t w, uint64_t tick);
/* It was answered with an error, or it never will be and the server has let go of it. */
void model_gone(struct model *m, uint32_t w, uint64_t tick);
/* A flush that was sent at tick `sent` has succeeded. */
void model_flush(struct model *m, uint64_t sent);
/* Nothing that is under way was sent before this tick. Only saves memory. */
void model_horizon(struct model *m, uint64_t sent);

/* From now on a sync of the disk may fail: what was answered and is not durable may then be taken
 * back, before anybody hears of it. */
void model_may_lose(struct model *m);
/* A sync did fail: what was answered and is not durable may be lost for good, or may not. */
void model_sync_failed(struct model *m);
/* The syncs that could fail are over (and those that did were told). */
void model_no_more_loss(struct model *m);

/* A read that was sent at tick `sent` and answered at tick `told` with these bytes. What it saw
 * narrows down what others may see. */
const char *model_read(struct model *m, uint64_t off, uint64_t len, const uint8_t *data,
                       uint64_t sent, uint64_t told);
/* A block status said that the range reads as zeroes. */
const char *model_zero(struct model *m, uint64_t off, uint64_t len, uint64_t sent, uint64_t told);
/* A bitmap that began to record at tick `since` at the latest called the range clean. */
const char *model_clean(struct model *m, uint64_t off, uint64_t len, uint64_t since, uint64_t sent);
/* A bitmap that began, empty, to record at tick `since` or later called the range dirty. Bytes
 * [off, off+len) are all that its blocks there cover. */
const char *model_dirty(struct model *m, uint64_t off, uint64_t len, uint64_t since);

/* The power went: the bytes that are left. Changes nothing, so it can be asked of any copy of the
 * disk at any time. `killed`: only the daemon went, the machine did not. */
const char *model_survivor(struct model *m, uint64_t off, uint64_t len, const uint8_t *data,
                           bool killed);
/* And life goes on with these bytes, all of the disk, at tick `tick`; they passed the check. */
void model_restart(struct model *m, const uint8_t *data, uint64_t tick, bool killed);
