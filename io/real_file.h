/* SPDX-License-Identifier: Apache-2.0 */
/* What the files of the real engines share among themselves: real_file.c opens and closes them,
 * real_inode.c knows what several of them have in common, real_rw.c does requests that may block,
 * real_read.c, real_write.c, real_sync.c and real_extent.c the rest. */
#pragma once
#include <sys/stat.h>

#include "io/real.h"

#ifndef RWF_NOWAIT
#define RWF_NOWAIT 8
#endif

static inline struct real_file *file_of(struct io_file *f)
{
    return (struct real_file *)f;
}

/* What changes or asks the file as a whole: in the pool, in the inode's share. */
static inline struct pool_op file_op(struct real_file *f, enum pool_kind kind)
{
    return (struct pool_op){
        .kind = kind, .class = POOL_META, .share = &f->inode->share, .io = file_io(f), .file = f};
}

/* A file that knows no RWF_NOWAIT would keep a kernel worker of the ring for each request; in the
 * pool it has a share and no more. */
static inline bool file_wants_pool(struct real_file *f)
{
    return atomic_load_explicit(&f->read_mode, memory_order_relaxed) == NOWAIT_NEVER;
}

/* Any thread. NULL: no memory. */
struct inode *inode_get(struct real_io *io, const struct stat *st, bool may_hang);
void inode_put(struct real_io *io, struct inode *n);

/* How many places in its queue a request of so many bytes takes. */
unsigned disk_places(const struct disk *d, size_t bytes);
/* Waits until there are so many. */
co_fn void disk_enter(struct disk *d, unsigned places);
void disk_leave(struct disk *d, unsigned places);
bool disk_is_full(struct disk *d);

/* Go on from `done` with the backend, or in the pool, until all is there, the file ends or it
 * fails. Bytes, or -errno. */
co_fn ssize_t file_finish_rw(struct real_file *f, bool write, const struct iovec *iov, int n,
                             uint64_t off, size_t done, int rwf, bool in_pool);

/* All writes that have come to the inode's role before are through on return. */
co_fn void role_wait(struct inode *ino);

/* What we write may fill a hole that this coroutine has seen. */
void look_forget(const struct inode *ino);
