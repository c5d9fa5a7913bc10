/* SPDX-License-Identifier: Apache-2.0 */
/* The engine of transactions: one list of actions, beside a guest that writes, a second client, a
 * client that connects to an export, a job, failures in any step, and a crash at every instant.
 *
 * Inlines and states have the names of the code; README.md has the table, and the runner checks it.
 * The laws are those of docs/transactions.md. LAW(n, ...) is an assertion of law n;
 * its number and line stand in the text of the assertion, where the runner finds them.
 *
 * Bounds: MAXACT actions, NWRITES guest writes, KINDS (state.pml), TWO_DISKS (b0 on one disk, b1 on
 * another; a list quiesces those that it names).
 * What is looked at: STEPWISE (L1 after every prepare, L2 after every unwind), L4CHECK (nothing
 * observable changes after the record), CRASH (L8).
 * More to look at: RETRY (the list has an id, its answer is lost, and it is sent again), TWO_LISTS (two
 * clients with a list each, instead of a list and a plain command), NO_CLIENT2 (no plain command).
 * Variants that are right too: COMMIT_FIFO (discard first to last), DRAIN_2PL (quiesce a disk at the
 * first action that names it), JOB_ANYTIME (a job may end inside another's list).
 * NO_LAWS: nothing is asserted; for a mutant that is to be refuted by a formula alone.
 * Mutants: M_...; the runner has the list. */
#ifndef MAXACT
#define MAXACT 3
#endif
#ifndef NWRITES
#define NWRITES 1
#endif
#define JOURNAL (MAXACT + 1)
#include "state.pml"

bit lock, intxn;             /* graph_lock(); whose lock it is: a list's */
bit effects;                 /* graph_effects_begin(): queries wait */
byte drained, fp;            /* disks that are quiesced; the list's footprint */
byte inflight, at;           /* 0, or 1 + w of the guest write under way; the node it goes to */
mtype seq[MAXACT]; byte und[MAXACT], n; /* undo records armed: action, what it needs to go back */
bit staged, used;            /* drive-backup's new file was made in the stage; an action took it */
bit committed, acked, mine;  /* the record decided; the client was told; the job is of this list */
bit told;                    /* events of this list have left */
bit runs;                    /* the list with this id has taken effect */
bit stopped;                 /* outcome unknown: the store is not served any more */

/* Who broke the rule that a later comparison finds broken, told apart with -DWHY. In the engine as it
 * is nobody does, and this stays 0. */
byte why; /* 5: a write or a command came between; 9: a plain command did not quiesce */
#ifdef NO_LAWS
#define LAW(nr, c) skip
#elif defined(WHY)
#define LAW(nr, c)                                                                                 \
    assert((c) || why != 0 || nr * 10000 + __LINE__ < 0);                                          \
    assert((c) || why != 5 || 5 * 10000 + __LINE__ < 0);                                           \
    assert((c) || why != 9 || 9 * 10000 + __LINE__ < 0)
#else
#define LAW(nr, c) assert((c) || nr * 10000 + __LINE__ < 0)
#endif

#define QUIET (inflight == 0)
#define TOUCHED(w) ((DISK_OF(w) & fp) != 0)
#define IN_FILE(a) ((a) == SINT || (a) == SEXT)

/* Kinds that a mutant lets take effect at commit. */
#define DEFERRED(a) 0
#ifdef M_CLEAR_AT_COMMIT
#undef DEFERRED
#define DEFERRED(a) ((a) == CLR0)
#endif
#ifdef M_MERGE_AT_COMMIT
#undef DEFERRED
#define DEFERRED(a) ((a) == MRG01 || (a) == MRG10)
#endif
#ifdef M_REMOVE_AT_COMMIT
#undef DEFERRED
#define DEFERRED(a) ((a) == REM1)
#endif
#ifdef M_DISABLE_AT_COMMIT
#undef DEFERRED
#define DEFERRED(a) ((a) == DIS0)
#endif
#ifdef M_COPY_AT_COMMIT
#undef DEFERRED
#define DEFERRED(a) ((a) == COPYC)
#endif
#ifdef M_RENAME_AT_COMMIT
#undef DEFERRED
#define DEFERRED(a) ((a) == REN1C)
#endif

/* ------------------------------------------------------------------ undo records */

/* Taken before the effect: the old contents change hands. */
inline txn_reserve(i, a)
{
    if
    :: a == CLR0 || a == MRG01 -> und[i] = bt0[M]
    :: a == MRG10 -> und[i] = bt1[M]
    :: a == REM1 -> und[i] = bt1[M] | (en1[M] << 2)
    :: a == ENA0 || a == DIS0 -> und[i] = en0[M]
    :: a == SINT -> und[i] = top[M]
    :: a == SETA || a == SETB -> und[i] = eo[M]
    :: a == DRV0 -> und[i] = fl[M]
    :: a == XDEL -> und[i] = cn[M]
    :: else -> und[i] = 0
    fi
}

inline drop_job()
{
    bt0[M] = bt0[M] | sc0[M]; sc0[M] = 0; bz0[M] = 0; jb[M] = 0; wk[M] = 0
}

/* F and the temporary name change places, or F comes from there, or goes back. */
inline exchange(k)
{
    k = tmp; tmp = fl[M]; fl[M] = k; k = 0
}

inline unwind(i, a, k)
{
    if
    :: a == ADD1 -> ex1[M] = 0; en1[M] = 0; bt1[M] = 0
    :: a == REM1 -> ex1[M] = 1; bt1[M] = und[i] & 3; en1[M] = und[i] >> 2
    :: a == CLR0 || a == MRG01 -> bt0[M] = und[i]
    :: a == MRG10 -> bt1[M] = und[i]
    :: a == ENA0 || a == DIS0 -> en0[M] = und[i]
    :: a == REN1C ->
        ex1[M] = exc[M]; en1[M] = enc[M]; bt1[M] = btc[M];
        exc[M] = 0; enc[M] = 0; btc[M] = 0
    :: a == COPYC -> exc[M] = 0; enc[M] = 0; btc[M] = 0
    :: a == BKP0 -> drop_job()
    :: a == DRV0 -> drop_job();
#ifdef M_FILE_OVERWRITTEN
        fl[M] = 0 /* what was in it is gone; all that can be done is to delete it */
#elif defined(M_OLD_FILE_GONE_EARLY)
        fl[M] = 0; tmp = 2
#else
        exchange(k)
#endif
    :: a == SEXT -> top[M] = 0; ovl = 0
    :: a == SINT -> si[M] = si[M] & (255 - (1 << und[i]))
    :: a == NADD -> nd[M] = 0
    :: a == NDEL -> nd[M] = 1
    :: a == XADD -> xp[M] = 0; cn[M] = 0
    :: a == XDEL -> xp[M] = 1; cn[M] = (und[i] && sock -> 1 : 0)
    :: a == SETA || a == SETB -> eo[M] = und[i]
    fi
}

/* Nothing observable. Nothing has its effect here but in mutants. */
inline discard(a)
{
    if
    :: DEFERRED(a) -> apply(M, a, ok)
#ifdef M_JOB_OWNS_LATE
    :: a == BKP0 -> apply(M, a, ok)
#endif
    :: else
    fi
}

/* After guests go on: what was kept for an unwind, or what an unwind took away. The file of a
 * drive-backup: unstage. */
inline release_one(a, u, undone)
{
    if
    :: a == NADD && undone -> opn--
#ifndef M_DEL_CLOSES_NODE_EARLY
    :: a == NDEL && !undone -> opn--
#endif
#ifndef M_DEL_CLOSES_CLIENTS_EARLY
    :: a == XDEL && !undone -> if :: u -> sock = 0 :: else fi
#endif
    :: else
    fi
}

/* The specification of the first `cnt` actions, from G, into X. */
inline spec(cnt, res)
{
    copy_space(X, G); k = 0; res = 1;
    do
    :: (k < cnt && res) -> cur = seq[k]; apply(X, cur, res); k++
    :: else -> break
    od;
    k = 0; cur = 0
}

/* ------------------------------------------------------------------ steps of the engine */

inline graph_lock()
{
#ifdef M_NO_LOCK
    intxn = 1;
#elif defined(TWO_LISTS)
    if
    :: atomic { lock == 0 -> lock = 1; intxn = 1; printf("@ T: graph_lock\n") }
    :: stopped -> goto stop
    fi;
#else
    atomic { lock == 0 -> lock = 1; intxn = 1; printf("@ T: graph_lock\n") };
#endif
}

/* Slow work that nobody sees: the new file of a drive-backup is made under a temporary name. The
 * intent goes first and names what this list, and nobody else, will make. If it cannot be made, the
 * action fails when its turn comes. */
inline stage()
{
#if KINDS & K_FILE
    if
    :: skip
    :: d_step {
#ifndef M_STAGE_NO_INTENT
           jrn[jlen] = DRV0; jlen++;
#endif
           staged = 1; printf("@ T: stage: intent for F.tmp\n") };
        if
        :: d_step { tmp = 2; printf("@ T: stage: F.tmp made\n") }
        :: d_step { tmp = 0; printf("@ T: stage: F.tmp cannot be made\n") }
        fi
    fi
#else
    skip
#endif
}

/* What lies under the temporary name goes, be it the new file of a list that was undone or the old
 * one of a list that has happened; then its place in the journal. */
inline unstage()
{
    if
    :: staged ->
#ifdef M_FILE_LEFT
        if :: committed -> tmp = 0 :: else fi;
#else
        d_step { tmp = 0; printf("@ T: F.tmp removed\n") };
#endif
        d_step {
            if :: jlen > 0 -> jlen--; jrn[jlen] = 0 :: else fi;
            staged = 0; used = 0 }
    :: else
    fi
}

/* Gates of all disks of the list are closed in one go; those inside are waited for, not for ever. */
inline hold()
{
#ifdef TWO_DISKS
    atomic { if :: fp = 1 :: fp = 2 :: fp = 3 fi };
#else
    fp = 1;
#endif
#if !defined(M_NO_QUIESCE) && !defined(M_SET_NODE_NO_QUIESCE) && !defined(M_EARLY_RELEASE) && !defined(DRAIN_2PL)
    drained = fp;
#ifndef M_SET_NODE_NO_DRAIN
    if
    :: (inflight == 0 || !TOUCHED(inflight - 1)) -> skip
#ifndef M_DRAIN_FOR_EVER
    :: atomic { (inflight != 0 && TOUCHED(inflight - 1)) -> fail = 1; printf("@ T: quiesce times out\n") }
#endif
    fi
#else
    skip
#endif
#endif
}

/* With two disks, the actions that the footprint covers; a list of drive-backup alone has one. */
#ifdef TWO_DISKS
#define CAN(a) ((DISKS_OF(a) & ~fp) == 0)
#else
#define CAN(a) true
#endif
#define CAN_PICK (KINDS != K_FILE || (staged && !used))

inline pick(a)
{
    if
#if KINDS & (K_BITMAP | K_FEW)
    :: CAN(ADD1) -> a = ADD1
    :: CAN(REM1) -> a = REM1
    :: CAN(CLR0) -> a = CLR0
#endif
#if KINDS & K_BITMAP
    :: CAN(ENA0) -> a = ENA0
    :: CAN(DIS0) -> a = DIS0
    :: CAN(MRG01) -> a = MRG01
    :: CAN(MRG10) -> a = MRG10
#endif
#if KINDS & K_NAME
    :: CAN(REN1C) -> a = REN1C
    :: CAN(COPYC) -> a = COPYC
#endif
#if KINDS & K_JOB
    :: CAN(BKP0) -> a = BKP0
#endif
#if KINDS & K_FILE
    :: staged && !used -> a = DRV0
#endif
#if KINDS & K_SNAP
    :: CAN(SEXT) -> a = SEXT
    :: CAN(SINT) -> a = SINT
#endif
#if KINDS & K_NODE
    :: CAN(NADD) -> a = NADD
    :: CAN(NDEL) -> a = NDEL
    :: CAN(XADD) -> a = XADD
    :: CAN(XDEL) -> a = XDEL
    :: CAN(SETB) -> a = SETB
    :: CAN(SETA) -> a = SETA
#endif
    fi
}

/* Refused here if and only if refused one by one, with the same predecessors. */
inline check(a)
{
    copy_space(X, M);
#ifdef M_JOB_OWNS_LATE
    if :: a == BKP0 -> ok = (!bz0[M] && !jb[M]) :: else -> apply(X, a, ok) fi;
#else
    apply(X, a, ok);
#endif
    spec(n, ok2); apply(X, a, ok2);
    if
    :: ok && !ok2 -> printf("@ T: %e accepted; one by one it is refused\n", a)
    :: !ok && ok2 -> printf("@ T: %e refused; one by one it succeeds\n", a)
    :: else
    fi;
    LAW(6, ok2 || !ok || !bz0[X]); /* L6: owned from its action on: later ones are refused */
    LAW(10, ok == ok2);            /* L10: same outcome, same failing action */
    zero_space(X); ok2 = 0
}

/* What is in memory alone, at once, and the undo record armed with it. */
inline effect(a)
{
    if
    :: DEFERRED(a) -> skip
#ifdef M_JOB_OWNS_LATE
    :: a == BKP0 -> skip
#endif
    :: a == DRV0 -> k = fl[M]; apply(M, a, ok); fl[M] = k; k = 0; mine = 1; used = 1
    :: a == BKP0 -> apply(M, a, ok); mine = 1
    :: a == NADD -> apply(M, a, ok); opn++
#ifdef M_DEL_CLOSES_NODE_EARLY
    :: a == NDEL -> apply(M, a, ok); opn--
#endif
#ifdef M_DEL_CLOSES_CLIENTS_EARLY
    :: a == XDEL -> apply(M, a, ok); sock = 0
#endif
    :: else -> apply(M, a, ok)
    fi;
#ifdef M_JOB_IN_PREPARE
    if :: a == BKP0 -> jb[M] = 2 :: else fi;
#endif
    printf("@ T: %e\n", a)
}

/* Effects on disk: the intent first, after the check; naming what this action makes. */
inline effect_in_file(a)
{
#ifndef M_NO_INTENT
    d_step { jrn[jlen] = a; jval[jlen] = und[n]; jlen++; printf("@ T: intent of %e\n", a) };
#endif
    if
    :: fail = 1 /* I/O error */
    :: d_step {
           apply(M, a, ok);
           if :: (ok && a == SEXT) -> ovl = 1 :: (!ok) -> fail = 1 :: else fi;
           if :: ok -> printf("@ T: %e\n", a) :: else -> printf("@ T: %e refused\n", a) fi }
    fi;
#ifndef M_NO_INTENT
    if :: fail -> d_step { jlen--; jrn[jlen] = 0; jval[jlen] = 0 } :: else fi
#endif
}

/* The second part of drive-backup. If it fails, the engine unwinds the first, back to the height at
 * which the action began. */
inline effect_rename()
{
    if
    :: d_step {
#ifdef M_PARTS_LEFT
           fail = 1;
#else
           drop_job(); mine = 0; used = 0; fail = 1;
#endif
           printf("@ T: renaming F fails\n") }
    :: d_step {
#ifdef M_FILE_OVERWRITTEN
           fl[M] = 2; tmp = 0;
#else
           exchange(k);
#endif
#ifdef M_OLD_FILE_GONE_EARLY
           tmp = 0;
#endif
           printf("@ T: F exchanged with F.tmp\n") }
    fi
}

inline prepare_one()
{
#if defined(DRAIN_2PL) || defined(M_EARLY_RELEASE)
    atomic { pick(a); drained = drained | DISKS_OF(a) };
    (inflight == 0 || !(drained & DISK_OF(inflight - 1)));
#endif
    atomic {
#if !defined(DRAIN_2PL) && !defined(M_EARLY_RELEASE)
        pick(a);
#endif
        seq[n] = a;
        d_step {
            txn_reserve(n, a); check(a);
#ifdef M_INTENT_BEFORE_CHECK
            if :: !ok && !IN_FILE(a) -> fail = 1 :: else fi;
#else
            if :: !ok -> fail = 1 :: else fi;
#endif
            if :: fail -> printf("@ T: %e refused\n", a) :: else fi
        };
        if
        :: fail || IN_FILE(a)
        :: else ->
            if
            :: d_step { fail = 1; printf("@ T: %e fails by itself\n", a) } /* memory, space, I/O */
            :: (ok && (a != DRV0 || tmp == 2)) -> d_step { effect(a) }
            fi
        fi
    };
    if
    :: !fail && IN_FILE(a) -> effect_in_file(a)
#if KINDS & K_FILE
    :: !fail && a == DRV0 -> effect_rename()
#endif
    :: else
    fi
}

inline prepare_all()
{
    do
    :: (n < MAXACT && !fail && CAN_PICK) ->
        prepare_one();
        d_step {
            k = 0;
#ifdef M_EARLY_RELEASE
            drained = 0;
#endif
            if
#ifdef M_UNWINDS_WHAT_FAILED
            :: (fail && a == ENA0) -> und[n] = 0; n++ /* its record was never filled */
            :: (fail && a != ENA0) -> und[n] = 0; seq[n] = 0
#else
            :: fail -> und[n] = 0; seq[n] = 0
#endif
            :: else -> n++
            fi;
#ifdef STEPWISE
            if
            :: (!fail) ->
                spec(n, ok);
                LAW(1, !QUIET || (ok && SAME(X, M))); zero_space(X) /* L1: acts on s(i-1), at once */
#ifdef M_UNWINDS_WHAT_FAILED
            :: else
#else
            :: else ->
                spec(n, ok);
                LAW(2, !QUIET || (ok && SAME(X, M))); zero_space(X) /* L2: what fails leaves no trace */
#endif
            fi;
#endif
            a = 0; ok = 0
        }
    :: (n < MAXACT && !fail && (!staged || used)) -> break /* the list is not longer */
    :: else -> break
    od;
    if :: (staged && !used && !fail) -> fail = 1 :: else fi /* a list with a stage has its action */
}

/* Last effect first. */
inline unwind_to()
{
    LAW(5, !told); /* L5: no event of a list that is undone has left */
#ifdef M_UNWIND_FIFO
    i = 0;
    do
    :: i < n -> d_step { printf("@ T: unwind %e\n", seq[i]); unwind(i, seq[i], k); i++ }
    :: else -> break
    od;
    i = 0;
    d_step {
        do :: jlen > staged -> jlen--; jrn[jlen] = 0; jval[jlen] = 0 :: else -> break od
    };
#else
#ifdef M_UNWIND_NAMES_FIRST
    d_step {
        i = 0;
        do
        :: i < n ->
            if :: seq[i] == REN1C -> printf("@ T: unwind %e\n", seq[i]); unwind(i, seq[i], k) :: else fi;
            i++
        :: else -> break
        od
    };
#define UNDONE(a) (DEFERRED(a) || (a) == REN1C)
#else
#define UNDONE(a) DEFERRED(a)
#endif
    i = n;
    do
    :: i > 0 ->
#ifdef M_INTENT_WITHDRAWN_EARLY
        d_step { if :: IN_FILE(seq[i - 1]) -> jlen--; jrn[jlen] = 0; jval[jlen] = 0 :: else fi };
#endif
        d_step {
            i--;
            if
            :: !UNDONE(seq[i]) -> printf("@ T: unwind %e\n", seq[i]); unwind(i, seq[i], k)
            :: else
            fi
        };
        d_step { /* the intent is withdrawn when the undo is durable */
            ok = 0;
#if !defined(M_NO_INTENT) && !defined(M_INTENT_WITHDRAWN_EARLY)
            if :: IN_FILE(seq[i]) -> jlen--; jrn[jlen] = 0; jval[jlen] = 0 :: else fi;
#endif
#ifdef STEPWISE
            spec(i, ok);
            LAW(2, !QUIET || (ok && SAME(X, M))); zero_space(X); ok = 0 /* L2: unwind gives s(i-1) */
#endif
        }
    :: else -> break
    od;
#endif
    i = 0;
    d_step {
        LAW(3, !QUIET || SAME(M, G)); /* L3: the whole stack gives s0 */
        mine = 0
    }
}

/* The one step in which a list takes effect: durably, and for everybody. */
inline decide()
{
    persist();
    LAW(8, !runs); /* L8: a list with an id takes effect once */
#ifdef M_RELEASE_FORGOTTEN
    k = 0;
#else
    k = (jlen > 0 && jrn[0] == DRV0 -> 1 : 0); /* what is let go after the record is in the record */
#endif
    do :: jlen > k -> jlen--; jrn[jlen] = 0; jval[jlen] = 0 :: else -> break od;
    if :: k -> jrn[0] = release_F :: else fi;
#ifdef RETRY
    runs = 1;
#endif
#if !defined(M_ID_IN_SECOND_RECORD) && !defined(M_ID_FORGOTTEN) && defined(RETRY)
    idd = 1; idm = 1; /* the outcome of the id is in the record */
#endif
    k = 0; ok = 1;
    do
    :: k < n -> cur = seq[k]; apply(G, cur, ok); assert(ok); k++
    :: else -> break
    od;
    if :: jb[G] == 1 -> jb[G] = 2 :: else fi;
    k = 0; cur = 0; ok = 0
}

/* Written; not written; or nobody knows, for the flush failed: then nothing more is served and only
 * recovery says what became of it. */
inline write_record()
{
#ifdef M_ANSWER_BEFORE_RECORD
    acked = 1;
#endif
#ifdef M_TWO_RECORDS
    d_step { en0[D] = en0[M]; bt0[D] = bt0[M] | sc0[M] };
#endif
    if
    :: d_step { decide(); committed = 1; printf("@ T: record\n") }
    :: d_step { fail = 1; printf("@ T: the record is not written\n") }
#ifdef M_UNKNOWN_IS_FAILURE
    :: d_step { persist(); fail = 1; printf("@ T: record, but its flush fails\n") }
#else
    :: d_step { decide(); stopped = 1; printf("@ T: record, but its flush fails: stopped\n") }
    :: d_step { stopped = 1; printf("@ T: no record, and its flush fails: stopped\n") }
#endif
    fi
}

inline l4()
{
#ifdef L4CHECK
    LAW(4, !QUIET || SAME(M, G)) /* L4: nothing observable after the record */
#else
    skip
#endif
}

/* Nothing here can fail. Discards last first; then events, then gates, in list order. */
inline succeed()
{
#ifdef COMMIT_FIFO
    i = 0;
    do
    :: i < n -> d_step { cur = seq[i]; discard(cur); cur = 0; ok = 0; i++; l4() }
    :: else -> break
    od;
    i = 0;
#else
    i = n;
    do
    :: i > 0 -> d_step { i--; cur = seq[i]; discard(cur); cur = 0; ok = 0; l4() }
    :: else -> break
    od;
#endif
#ifdef M_ID_IN_SECOND_RECORD
    idd = 1;
#endif
    announce();
    atomic { open_gates() }
}

inline announce()
{
    told = 1
}

inline open_gates()
{
    if :: jb[M] == 1 -> jb[M] = 2 :: else fi
}

/* What was told about a list that failed is told again under the same id; if that cannot be
 * remembered the list is run again, which is right, too. */
inline remember_failure()
{
#ifdef RETRY
    if :: idm = 2 :: skip fi
#else
    skip
#endif
}

inline release()
{
    d_step {
        i = 0;
        do
        :: i < n -> release_one(seq[i], und[i], fail); seq[i] = 0; und[i] = 0; i++
        :: else -> break
        od;
        i = 0; n = 0
    };
    unstage();
    d_step {
        /* L2, L4: files, nodes, connections are as memory says; nothing is kept for an unwind. */
        if
        :: fail -> LAW(2, REAL && tmp == 0 && ovl == top[M])
        :: else -> LAW(4, REAL && tmp == 0 && ovl == top[M])
        fi
    }
}

inline graph_unlock()
{
    atomic { mine = 0; intxn = 0; lock = 0; fail = 0; committed = 0; acked = 0; told = 0 }
}

/* Known under this id? Then what became of it is the answer, and nothing is run. */
inline replay()
{
    LAW(8, (idm == 1) == runs); /* L8: it is known if and only if it has happened */
    if :: idm -> printf("@ T: this id is known: answered\n") :: else fi
}

proctype txn_run()
{
    mtype a, cur;
    byte k, i;
    bit ok, ok2, fail, again;
try:
    graph_lock();
#ifdef RETRY
    d_step { replay() };
    if :: idm -> goto unlock :: else fi;
#endif
    stage();
    hold();
    if
    :: fail
    :: else ->
        d_step {
            effects = 1;
            if :: (inflight && TOUCHED(inflight - 1)) -> why = 5 :: else fi };
        prepare_all();
#ifdef M_GATES_BEFORE_RECORD
        if :: !fail -> open_gates() :: else fi;
#endif
#ifdef M_EVENTS_BEFORE_RECORD
        if :: !fail -> announce() :: else fi;
#endif
        if :: !fail -> write_record() :: else fi;
        if
        :: stopped -> goto stop
        :: !stopped && fail -> unwind_to(); remember_failure()
        :: else -> succeed(); acked = 1
        fi;
        d_step { effects = 0; a = 0; k = 0; ok = 0 }
    fi;
    d_step { drained = 0; fp = 0 }; /* quiesce_end */
    release();
unlock:
    graph_unlock();
#ifdef RETRY
    if
    :: !again && (idm || runs) -> d_step { again = 1; printf("@ T: answer lost; the same list, the same id\n") }; goto try
    :: again -> again = 0; goto end
    :: !again -> goto end
    fi;
#else
    goto end;
#endif
stop:
    again = 0;
end_stopped:
    false;
end:
    skip
}

/* ------------------------------------------------------------------ the others */

/* Marks, then the data lands. Whoever is not admitted at the root waits. */
proctype guest()
{
    byte w, c;
    do
    :: atomic {
            (c < NWRITES && !stopped && (!(drained & DISK_OF(0)) || !(drained & DISK_OF(1)))) ->
            if :: !(drained & DISK_OF(0)) -> w = 0 :: !(drained & DISK_OF(1)) -> w = 1 fi;
            inflight = 1 + w; c++; at = eo[M];
            if :: (effects && TOUCHED(w)) -> why = 5 :: else fi;
            mark(M, w);
            /* The mark is durable before the data. */
            if :: !intxn -> persist() :: else -> mark(D, w) fi;
            printf("@ G: write of unit %d begins\n", w)
        };
#ifdef M_DRAIN_FOR_EVER
        lock == 0; /* it needs something that the lock guards */
#endif
        d_step {
            LAW(5, at == eo[G]); /* L5: no write lands in the old node after the cut */
            if :: (effects && TOUCHED(w)) -> why = 5 :: else fi;
            mark(G, w); printf("@ G: write of unit %d lands\n", w); inflight = 0; at = 0; w = 0
        }
    :: break
    od
}

/* One plain command, which is a list of one, and one query. */
proctype client2()
{
    mtype a;
    bit ok, ok2;
#if !defined(TWO_LISTS) && !defined(NO_CLIENT2)
    if
    :: atomic {
#ifdef M_NO_LOCK
           QUIET && !stopped;
#elif defined(M_PLAIN_NO_QUIESCE)
           lock == 0 && !stopped;
#else
           lock == 0 && QUIET && !stopped;
#endif
           if
#if KINDS & (K_BITMAP | K_FEW)
           :: a = ADD1
           :: a = REM1
           :: a = CLR0
#endif
#if KINDS & K_BITMAP
           :: a = DIS0
#endif
#if KINDS & K_NAME
           :: a = REN1C
#endif
#if KINDS & K_JOB
           :: a = BKP0
#endif
#if KINDS & (K_SNAP | K_FILE)
           :: a = SINT
#endif
#if KINDS & K_NODE
           :: a = NDEL
           :: a = XDEL
           :: a = SETB
#endif
           fi;
           if :: intxn -> why = 5 :: else fi;
           if :: (!QUIET && why == 0) -> why = 9 :: else fi;
           printf("@ C: plain %e\n", a);
           apply(M, a, ok); apply(G, a, ok2);
           LAW(9, ok == ok2); /* L9: the plain command goes by the same rules */
           if :: (ok && a == NDEL) -> opn-- :: (ok && a == XDEL) -> sock = 0 :: else fi;
           if :: (a == BKP0 && ok2) -> jb[G] = 2 :: else fi;
           if :: (a == BKP0 && ok) -> jb[M] = 2 :: else fi;
           if :: !intxn -> persist() :: else fi;
           a = 0; ok = 0; ok2 = 0 }
    :: skip
    fi;
#endif
    if
    :: atomic {
#ifdef M_NO_LOCK
           QUIET;
#else
           effects == 0 && QUIET;
#endif
           printf("@ C: query\n");
           LAW(5, !intxn || SAME(M, G));  /* L5: no half-done state is seen */
           LAW(10, intxn || SAME(M, G));  /* L10: the result is that of the plain commands */
           LAW(5, intxn || (REAL && tmp == 0)) }
    :: stopped -> skip
    fi
}

#if KINDS & K_NODE
/* A client of export x: its gate is shut until the record of the list that made x. */
proctype connects()
{
end_outside:
    atomic {
#ifdef M_EXPORT_GATE_OPEN
        (xp[M] && !sock);
#else
        (xp[M] && !sock && effects == 0 && !stopped);
#endif
        printf("@ N: connects to x\n");
        LAW(5, xp[G]); /* L5: nobody gets in where there may be nothing in the end */
        sock = 1; cn[M] = 1; cn[G] = 1 }
}
#endif

#if KINDS & (K_JOB | K_FILE)
/* The work and the end of the one job. group.pml has the end in full. */
proctype job()
{
end_idle:
    do
    :: atomic {
           (jb[M] == 2 && !stopped) ->
           printf("@ J: copies\n");
           LAW(6, !mine || committed);  /* L6: not before the record */
           LAW(1, wk[M] == wk[G]);      /* L1: it copies the contents as its action saw them */
           jb[M] = 3; jb[G] = 3 }
#ifdef JOB_ANYTIME
    :: d_step { (jb[M] == 3 && !stopped) ->
#else
    :: d_step { (jb[M] == 3 && lock == 0 && QUIET && !stopped) ->
#endif
           bt0[M] = sc0[M]; sc0[M] = 0; bz0[M] = 0; jb[M] = 0; wk[M] = 0;
           bt0[G] = sc0[G]; sc0[G] = 0; bz0[G] = 0; jb[G] = 0; wk[G] = 0; bt0[D] = bt0[M];
           printf("@ J: ends well\n") }
#ifdef JOB_ANYTIME
    :: d_step { (jb[M] == 3 && !stopped) ->
#else
    :: d_step { (jb[M] == 3 && lock == 0 && QUIET && !stopped) ->
#endif
           bt0[M] = bt0[M] | sc0[M]; sc0[M] = 0; bz0[M] = 0; jb[M] = 0; wk[M] = 0;
           bt0[G] = bt0[G] | sc0[G]; sc0[G] = 0; bz0[G] = 0; jb[G] = 0; wk[G] = 0; bt0[D] = bt0[M];
           printf("@ J: fails\n") }
    od
}
#endif

#ifdef CRASH
/* Asked of every state: were the power cut now, what would recovery make of it? It undoes intents
 * that have no record, last first, and does what records left to be let go. Every step is done
 * twice, as if recovery itself had been cut after it. */
inline recover_one(kind, v)
{
    if
    :: kind == SEXT -> ov = 0
    :: kind == SINT -> sm = sm & (255 - (1 << v))
    :: kind == DRV0 -> /* if F is what this list made, what was there goes back */
        if :: f == 2 -> f = t; t = 2 :: else fi;
        t = 0
    :: kind == release_F -> t = 0
    fi
}

proctype crash()
{
    byte r, m, sm, ov, f, t, b0;
end_watch:
    do
    :: d_step {
           LAW(8, !acked || committed); /* L8: success is answered after the record only */
           sm = si[M]; ov = ovl; f = fl[M]; t = tmp; r = jlen;
           do
           :: r > 0 -> r--; recover_one(jrn[r], jval[r]); recover_one(jrn[r], jval[r])
           :: else -> break
           od;
           m = (inflight -> BITS_OF(inflight - 1) : 0);
           b0 = bt0[G] | sc0[G]; /* to the specification a crash is the end of the job */
           /* L8: all or nothing, in the store and outside it; nothing of others is touched. */
           LAW(8, en0[D] == en0[G] && ex1[D] == ex1[G] && en1[D] == en1[G]);
           LAW(8, exc[D] == exc[G] && enc[D] == enc[G]);
           LAW(8, top[D] == top[G] && nd[D] == nd[G] && xp[D] == xp[G]);
           LAW(8, sm == si[G] && ov == top[D]);
           LAW(8, f == fl[G] && t == 0);
           LAW(8, idd == runs);
           /* L8: marks may run ahead of the data by the write under way, never behind. */
           LAW(8, (bt0[D] | m) == (b0 | m) && (bt1[D] | m) == (bt1[G] | m) && (btc[D] | m) == (btc[G] | m));
           LAW(8, (b0 & (255 - bt0[D])) == 0 && (bt1[G] & (255 - bt1[D])) == 0 && (btc[G] & (255 - btc[D])) == 0);
           LAW(8, eo[D] == eo[G]);
           r = 0; m = 0; sm = 0; ov = 0; f = 0; t = 0; b0 = 0 }
    od
}
#endif

init {
    atomic {
        en0[M] = 1; en0[G] = 1; en0[D] = 1;
        bt0[M] = 1; bt0[G] = 1; bt0[D] = 1;
        if
        :: skip
        :: ex1[M] = 1; ex1[G] = 1; ex1[D] = 1; bt1[M] = 2; bt1[G] = 2; bt1[D] = 2
        fi;
#if KINDS & K_FILE
        if :: skip :: fl[M] = 1; fl[G] = 1 fi; /* the user has something there already */
#endif
#if KINDS & K_NODE
        if
        :: skip
        :: nd[M] = 1; nd[G] = 1; nd[D] = 1; opn = 1; xp[M] = 1; xp[G] = 1; xp[D] = 1
        fi;
#endif
        run txn_run();
#ifdef TWO_LISTS
        run txn_run();
#endif
        run guest(); run client2();
#if KINDS & (K_JOB | K_FILE)
        run job();
#endif
#if KINDS & K_NODE
        run connects();
#endif
#ifdef CRASH
        run crash()
#endif
    }
}

/* L8 again, L5, L6, and that every list comes to an end. */
#define STARTED (jb[M] >= 2 && mine)
ltl answered_after_record { [] (acked -> committed) }
ltl effects_under_lock { [] (effects -> lock) }
ltl started_after_record { [] (STARTED -> committed) }
ltl every_list_ends { <> [] (!intxn || stopped) }

/* Not so, as the runner has to find: what the formulas speak of does come about. */
ltl never_answered { [] !acked }
ltl never_effects { [] !effects }
ltl never_started { [] !STARTED }
ltl never_a_list { [] !intxn }
