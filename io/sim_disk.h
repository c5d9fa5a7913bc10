/* SPDX-License-Identifier: Apache-2.0 */
/* Inside the simulator: the disk as a plain data structure. Everything here happens at once; when
 * it happens is decided in sim.c.
 *
 * Each inode has its bytes twice: `now`, what a reader sees, and `disk`, what a power cut cannot
 * take away; between them the pieces, in the order in which they took effect. A piece is a run of
 * sectors with the full contents that they had after one operation (or zeros, or a hole), or a new
 * size. So the versions of a sector are the one in `disk` and those in the pieces that cover it.
 * Names are kept the same way: `now`, `disk`, and pending changes of one or two names each. */
#pragma once
#include "io/sim.h"
#include "io/sim_store.h"

#define SIM_SECTOR ((uint64_t)512)
#define SIM_MAX_SIZE ((uint64_t)1 << 62)

struct sim_piece {
    enum { PIECE_DATA, PIECE_ZERO, PIECE_HOLE, PIECE_SIZE } kind;
    bool of_cut;         /* belongs to a truncate: lives and dies with its PIECE_SIZE */
    uint64_t op;         /* w->n_ops when it took effect */
    uint64_t done;       /* stamp of its completion; 0: still in flight */
    uint64_t at, n;      /* sectors; PIECE_SIZE: at = bytes */
    unsigned char *data; /* PIECE_DATA: n sectors */
};

struct sim_lock {
    uint64_t owner; /* sim_file.id */
    uint64_t off, end;
    bool exclusive;
};

struct sim_inode {
    struct sim_inode *next; /* in order of `ino` */
    uint64_t ino;
    uint32_t mode;
    unsigned opens;
    struct sim_store now, disk;
    uint64_t size, disk_size;
    int64_t mtime_ns, disk_mtime_ns;
    struct sim_piece *pieces;
    size_t n_pieces, cap_pieces;
    struct sim_lock *locks;
    size_t n_locks, cap_locks;
    unsigned lost_syncs;     /* how often unflushed data was lost: each open file tells it once */
    bool marked;             /* in use */
    struct sim_inode *clone; /* while cloning */
};

struct sim_name {
    char *path;
    struct sim_inode *now, *disk; /* NULL: no such name */
};

struct sim_name_change {
    struct sim_name *name;
    struct sim_inode *to;
};
struct sim_name_op {
    uint64_t op;
    unsigned n;
    struct sim_name_change change[2];
    bool synced[2]; /* the directory of change[i] was */
};

struct sim_fault {
    struct sim_fault *next;
    char *name; /* NULL: any */
    enum sim_kind kind;
    unsigned nth, seen;
    bool sticky;
    int err;
    uint64_t stall_ns;
};

struct sim_world {
    unsigned life; /* grows with each power cut */
    uint64_t n_ops, n_stamps, n_files;
    int64_t wall_ns;
    uint64_t limit;
    uint64_t next_ino;
    struct sim_inode *inodes;
    struct sim_name **names; /* sorted by path */
    size_t n_names, cap_names;
    struct sim_name_op *name_ops;
    size_t n_name_ops, cap_name_ops;
    struct sim_fault *faults;
};

/* Path without doubled or final slashes and leading "./". 0 or -errno. */
#define SIM_PATH_MAX 1024
int disk_path(const char *path, char out[SIM_PATH_MAX]);

/* Paths are in the form of disk_path(). */
int disk_open(struct sim_world *w, const char *path, int flags, unsigned mode,
              struct sim_inode **out);
void disk_close(struct sim_world *w, struct sim_inode *ino, uint64_t owner);
struct sim_inode *disk_lookup(const struct sim_world *w, const char *path);
void disk_stat(const struct sim_world *w, const struct sim_inode *ino, struct io_stat *st);
int disk_rename(struct sim_world *w, const char *from, const char *to, unsigned flags);
int disk_unlink(struct sim_world *w, const char *path);
/* Names changed up to operation `upto` become durable, later ones by chance. */
int disk_sync_dir(struct sim_world *w, const char *dir, uint64_t upto, struct sim_rng *rng);

/* Free what neither a name (now, or after a power cut) nor an open file leads to. */
void disk_reap(struct sim_world *w);
/* Power is gone: of the pending changes those that kept() names reach the disk, unless an earlier
 * one of the same name does not. */
void disk_names_cut(struct sim_world *w, bool (*kept)(void *, uint64_t op), void *arg);

/* Changes of contents. They return the operation's number (> 0) or -errno. */
int64_t inode_write(struct sim_world *w, struct sim_inode *ino, const void *buf, size_t len,
                    uint64_t off);
int64_t inode_zero(struct sim_world *w, struct sim_inode *ino, uint64_t off, uint64_t len,
                   enum io_alloc how);
int64_t inode_truncate(struct sim_world *w, struct sim_inode *ino, uint64_t size);
size_t inode_read(const struct sim_inode *ino, void *buf, size_t len, uint64_t off);
/* Operation `op` was answered: from now on a sync must cover it. */
void inode_done(struct sim_world *w, struct sim_inode *ino, uint64_t op);
/* All of them: whoever waited for the answers is dead, but the kernel has the data. */
void inode_done_all(struct sim_world *w, struct sim_inode *ino);
/* Durable: all that was answered up to the stamp `upto`, and by chance of the rest. */
void inode_sync(struct sim_inode *ino, uint64_t upto, struct sim_rng *rng);
void inode_sync_op(struct sim_inode *ino, uint64_t op); /* O_DSYNC */
/* A sync that fails: of what it should have made durable, some is lost. */
void inode_lose(struct sim_inode *ino, uint64_t upto, struct sim_rng *rng);

/* OFD locks; len 0 = to the end. 0 or -EAGAIN. */
int inode_lock(struct sim_inode *ino, uint64_t owner, uint64_t off, uint64_t len, enum io_lock how,
               bool test);

/* The first fault that strikes this operation, or NULL. Counts. */
const struct sim_fault *disk_fault(struct sim_world *w, enum sim_kind kind, const char *name);
