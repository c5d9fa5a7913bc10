/* SPDX-License-Identifier: Apache-2.0 */
/* What transactions act on, four times over, and what each action does to it.
 *
 * Space G is the specification. It knows neither prepare nor undo: a list that succeeds hits it as
 * one step, in which the plain commands run one after the other. Space M is what the daemon holds,
 * worked on by the engine through undo records. Space D is what the store holds durably. X is
 * scratch, to see what the specification would say.
 *
 * The world: a node A that exists, with bitmap b0, and with b1 and c, which come and go; a node B
 * that comes and goes; export e, connected, on A or moved to B; export x on B, which comes and goes;
 * one job; a file F in a directory; an overlay above A; internal snapshots of A and of the overlay. */

mtype = {
    block_dirty_bitmap_add_b1, block_dirty_bitmap_remove_b1, block_dirty_bitmap_clear_b0,
    block_dirty_bitmap_enable_b0, block_dirty_bitmap_disable_b0, block_dirty_bitmap_merge_b0_from_b1,
    block_dirty_bitmap_merge_b1_from_b0, block_dirty_bitmap_rename_b1_to_c,
    block_dirty_bitmap_copy_c_from_b0, blockdev_backup_b0, drive_backup_b0_to_F, blockdev_snapshot,
    blockdev_snapshot_internal, blockdev_add_B, blockdev_del_B, block_export_add_x,
    block_export_del_x, block_export_set_node_e_to_B, block_export_set_node_e_to_A,
    release_F /* no action: what the record leaves of the intent of a drive-backup */
};
#define ADD1 block_dirty_bitmap_add_b1
#define REM1 block_dirty_bitmap_remove_b1
#define CLR0 block_dirty_bitmap_clear_b0
#define ENA0 block_dirty_bitmap_enable_b0
#define DIS0 block_dirty_bitmap_disable_b0
#define MRG01 block_dirty_bitmap_merge_b0_from_b1
#define MRG10 block_dirty_bitmap_merge_b1_from_b0
#define REN1C block_dirty_bitmap_rename_b1_to_c
#define COPYC block_dirty_bitmap_copy_c_from_b0
#define BKP0 blockdev_backup_b0
#define DRV0 drive_backup_b0_to_F
#define SEXT blockdev_snapshot
#define SINT blockdev_snapshot_internal
#define NADD blockdev_add_B
#define NDEL blockdev_del_B
#define XADD block_export_add_x
#define XDEL block_export_del_x
#define SETB block_export_set_node_e_to_B
#define SETA block_export_set_node_e_to_A

/* Groups of kinds; a search takes those it is told (-DKINDS=...), or all. */
#define K_BITMAP 1 /* add, remove, clear, enable, disable, merge both ways */
#define K_NAME 2   /* rename, copy */
#define K_JOB 4    /* blockdev-backup */
#define K_FILE 8   /* drive-backup */
#define K_SNAP 16  /* snapshots, external and internal */
#define K_NODE 32  /* blockdev-add, -del, block-export-add, -del, -set-node */
#define K_FEW 64   /* of the bitmap kinds: add, remove, clear only */
#ifndef KINDS
#define KINDS 63
#endif

#define M 0
#define G 1
#define D 2
#define X 3

byte en0[4], bt0[4], sc0[4], bz0[4]; /* b0: recording, bits, successor's bits, busy */
byte ex1[4], en1[4], bt1[4];         /* b1: exists, recording, bits */
byte exc[4], enc[4], btc[4];         /* c */
byte jb[4], wk[4];                   /* job: 0 none, 1 created, 2 started, 3 has copied; its work set */
byte top[4];                         /* 1: the overlay is active */
byte si[4];                          /* internal snapshots; si[M] lies in the image files */
byte nd[4], xp[4], cn[4], eo[4];     /* B exists; x exists; clients of x; e is on 0 A, 1 B */
byte fl[4];                          /* F: 0 none, 1 the user's, 2 the backup's; fl[M] is the directory */

/* Outside memory, once. */
bit ovl;   /* the overlay's file exists */
byte tmp;  /* the temporary name beside F: 0 none, 1 the user's old file, 2 the backup's new one */
byte opn;  /* how many times B's file is open */
bit sock;  /* a client's connection to x is open */
byte jrn[JOURNAL], jval[JOURNAL], jlen; /* intents, durable: kind, value */
byte idm; bit idd; /* this id is known: 1 it happened, 2 it failed; durably: it happened */

#define SAME_B0(s, t) (en0[s] == en0[t] && bt0[s] == bt0[t] && sc0[s] == sc0[t] && bz0[s] == bz0[t])
#define SAME_B1(s, t) (ex1[s] == ex1[t] && en1[s] == en1[t] && bt1[s] == bt1[t])
#define SAME_C(s, t) (exc[s] == exc[t] && enc[s] == enc[t] && btc[s] == btc[t])
#define SAME_GRAPH(s, t)                                                                           \
    (top[s] == top[t] && si[s] == si[t] && nd[s] == nd[t] && xp[s] == xp[t] && cn[s] == cn[t] &&   \
     eo[s] == eo[t] && fl[s] == fl[t])
#define SAME(s, t)                                                                                 \
    (SAME_B0(s, t) && SAME_B1(s, t) && SAME_C(s, t) && SAME_GRAPH(s, t) && wk[s] == wk[t])
/* What memory says and what is really there: every listed node is open once, every client that an
 * export counts is connected. */
#define REAL (opn == nd[M] && sock == cn[M])

/* The plain command `a` on space `s`; ok = 0: refused, nothing happened. */
inline apply(s, a, ok)
{
    ok = 1;
    if
    :: a == ADD1 -> if :: ex1[s] -> ok = 0 :: else -> ex1[s] = 1; en1[s] = 1; bt1[s] = 0 fi
    :: a == REM1 -> if :: !ex1[s] -> ok = 0 :: else -> ex1[s] = 0; en1[s] = 0; bt1[s] = 0 fi
    :: a == CLR0 -> if :: bz0[s] -> ok = 0 :: else -> bt0[s] = 0 fi
    :: a == ENA0 -> if :: bz0[s] -> ok = 0 :: else -> en0[s] = 1 fi
    :: a == DIS0 -> if :: bz0[s] -> ok = 0 :: else -> en0[s] = 0 fi
    :: a == MRG01 -> if :: (bz0[s] || !ex1[s]) -> ok = 0 :: else -> bt0[s] = bt0[s] | bt1[s] fi
    :: a == MRG10 -> if :: (bz0[s] || !ex1[s]) -> ok = 0 :: else -> bt1[s] = bt1[s] | bt0[s] fi
    :: a == REN1C ->
        if
        :: (!ex1[s] || exc[s]) -> ok = 0
        :: else -> exc[s] = 1; enc[s] = en1[s]; btc[s] = bt1[s]; ex1[s] = 0; en1[s] = 0; bt1[s] = 0
        fi
    :: a == COPYC ->
        if
        :: (exc[s] || bz0[s]) -> ok = 0
        :: else -> exc[s] = 1; enc[s] = 1; btc[s] = bt0[s]
        fi
    :: a == BKP0 ->
        if
        :: (bz0[s] || jb[s]) -> ok = 0
        :: else -> bz0[s] = 1; sc0[s] = 0; jb[s] = 1; wk[s] = bt0[s]
        fi
    :: a == DRV0 ->
        if
        :: (bz0[s] || jb[s]) -> ok = 0
        :: else -> bz0[s] = 1; sc0[s] = 0; jb[s] = 1; wk[s] = bt0[s]; fl[s] = 2
        fi
    :: a == SEXT -> if :: top[s] -> ok = 0 :: else -> top[s] = 1 fi
    :: a == SINT ->
        if
        :: (si[s] & (1 << top[s])) -> ok = 0
        :: else -> si[s] = si[s] | (1 << top[s])
        fi
    :: a == NADD -> if :: nd[s] -> ok = 0 :: else -> nd[s] = 1 fi
    :: a == NDEL -> if :: (!nd[s] || xp[s] || eo[s]) -> ok = 0 :: else -> nd[s] = 0 fi
    :: a == XADD -> if :: (!nd[s] || xp[s]) -> ok = 0 :: else -> xp[s] = 1; cn[s] = 0 fi
    :: a == XDEL -> if :: !xp[s] -> ok = 0 :: else -> xp[s] = 0; cn[s] = 0 fi
    :: a == SETB -> if :: !nd[s] -> ok = 0 :: else -> eo[s] = 1 fi
    :: a == SETA -> eo[s] = 0
    fi
}

inline copy_space(t, s)
{
    en0[t] = en0[s]; bt0[t] = bt0[s]; sc0[t] = sc0[s]; bz0[t] = bz0[s];
    ex1[t] = ex1[s]; en1[t] = en1[s]; bt1[t] = bt1[s];
    exc[t] = exc[s]; enc[t] = enc[s]; btc[t] = btc[s];
    jb[t] = jb[s]; wk[t] = wk[s]; top[t] = top[s]; si[t] = si[s];
    nd[t] = nd[s]; xp[t] = xp[s]; cn[t] = cn[s]; eo[t] = eo[s]; fl[t] = fl[s]
}

inline zero_space(t)
{
    en0[t] = 0; bt0[t] = 0; sc0[t] = 0; bz0[t] = 0;
    ex1[t] = 0; en1[t] = 0; bt1[t] = 0; exc[t] = 0; enc[t] = 0; btc[t] = 0;
    jb[t] = 0; wk[t] = 0; top[t] = 0; si[t] = 0;
    nd[t] = 0; xp[t] = 0; cn[t] = 0; eo[t] = 0; fl[t] = 0
}

/* The durable form of memory: no job, its successor folded back; no connection. */
inline persist()
{
    en0[D] = en0[M]; bt0[D] = bt0[M] | sc0[M];
    ex1[D] = ex1[M]; en1[D] = en1[M]; bt1[D] = bt1[M];
    exc[D] = exc[M]; enc[D] = enc[M]; btc[D] = btc[M];
    top[D] = top[M]; nd[D] = nd[M]; xp[D] = xp[M]; eo[D] = eo[M]
}

/* A write of unit w through export e reaches the bitmaps of space s. With two disks unit 0 is
 * written to the one with b0, unit 1 to the one with b1. */
#ifdef TWO_DISKS
#define DISK_OF(w) (1 << (w))
#define DISKS_OF(a) ((a) == ADD1 || (a) == REM1 -> 2 : ((a) == MRG01 || (a) == MRG10 -> 3 : 1))
#define ALL_DISKS 3
#define BITS_OF(w) 1
inline mark(s, w)
{
    if
    :: (w == 0 && en0[s] && top[s] == 0) ->
        if :: bz0[s] -> sc0[s] = sc0[s] | 1 :: else -> bt0[s] = bt0[s] | 1 fi
    :: (w == 1 && ex1[s] && en1[s]) -> bt1[s] = bt1[s] | 1
    :: else
    fi
}
#else
#define DISK_OF(w) 1
#define DISKS_OF(a) 1
#define ALL_DISKS 1
#define BITS_OF(w) (1 << (w))
#define RECORDS(s) (top[s] == 0 && eo[s] == 0)
inline mark(s, w)
{
    if
    :: (en0[s] && RECORDS(s)) ->
        if :: bz0[s] -> sc0[s] = sc0[s] | (1 << w) :: else -> bt0[s] = bt0[s] | (1 << w) fi
    :: else
    fi;
    if :: (ex1[s] && en1[s] && RECORDS(s)) -> bt1[s] = bt1[s] | (1 << w) :: else fi;
    if :: (exc[s] && enc[s] && RECORDS(s)) -> btc[s] = btc[s] | (1 << w) :: else fi
}
#endif
