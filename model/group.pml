/* SPDX-License-Identifier: Apache-2.0 */
/* The end of a group of jobs, job/job.c: NJOBS backups that one list started with
 * completion-mode=grouped, users who cancel and finalize, guests that write, a client that looks,
 * and a crash at every instant. Law L7.
 *
 * Each job owns a bitmap: `bits` is what it copies, `succ` collects writes meanwhile. Well ended,
 * succ becomes the bitmap; else it is folded back. The end of the group is itself a transaction:
 * lock, quiesce, decision, one record, then memory, which cannot fail.
 *
 * BY_HAND: auto-finalize=false. NO_LAWS: nothing is asserted. Mutants: M_...; the runner has the list. */
#ifndef NJOBS
#define NJOBS 2
#endif

mtype = { running, waiting, pending, aborting, concluded };

mtype st[NJOBS];
bit ended[NJOBS], bad[NJOBS], cancelled[NJOBS]; /* run is over; ret < 0; asked to stop */
byte bits[NJOBS], succ[NJOBS];                  /* memory: unit 0 was dirty at the start */
bit moved[NJOBS], folded[NJOBS];                /* what the end did to the bitmap */
byte dsk[NJOBS];                                /* durable: bits|succ until the end's record */
byte seen[NJOBS];                               /* ghost: units whose data landed since the start */
byte inflight[NJOBS];                           /* 0, or the unit under way */
bit group_is_pending, finalize, finishing, decided;
bit lock, effects, drained;
bit recorded, good;                             /* the record is durable; how the group ended */
bit stopped;                                    /* its outcome is unknown: nothing more is served */

/* As in txn.pml. */
#ifdef NO_LAWS
#define LAW(nr, c) skip
#else
#define LAW(nr, c) assert((c) || nr * 10000 + __LINE__ < 0)
#endif
#define OVER(j) (st[j] == concluded)
/* Spelled out, for d_steps take no loops over what others change meanwhile. */
#if NJOBS == 3
#define EACH(p) (p(0) && p(1) && p(2))
#define SOME(p) (p(0) || p(1) || p(2))
#else
#define EACH(p) (p(0) && p(1))
#define SOME(p) (p(0) || p(1))
#endif
#define IDLE(j) (inflight[j] == 0)
#define UNWRITTEN(j) (seen[j] == 0 && inflight[j] == 0)
#define FAILED(j) (cancelled[j] || (ended[j] && bad[j]))
#define ENDED(j) (ended[j] == 1)
#define group_failed SOME(FAILED)
#define group_all_ended EACH(ENDED)

inline cancel_rest(k)
{
    k = 0;
    do
    :: k < NJOBS ->
        if
        :: !ended[k] -> cancelled[k] = 1
        :: ended[k] && !bad[k] -> bad[k] = 1; st[k] = aborting
        :: else
        fi;
        k++
    :: else -> break
    od;
    k = 0
}

inline begin_finish()
{
    finishing = 1
}

inline group_pending(k)
{
    group_is_pending = 1;
    k = 0;
    do :: k < NJOBS -> st[k] = pending; k++ :: else -> break od;
    k = 0;
#ifndef BY_HAND
    begin_finish()
#endif
}

inline group_check(k)
{
    if
    :: finishing
    :: !finishing && group_failed ->
        cancel_rest(k);
        if :: group_all_ended -> begin_finish() :: else fi
#if defined(M_PENDING_AT_FIRST) || defined(M_LATE_MEMBER_LEFT)
    :: !finishing && !group_failed && !group_is_pending -> group_pending(k)
#else
    :: !finishing && !group_failed && group_all_ended ->
        if
        :: !group_is_pending -> group_pending(k)
#ifdef BY_HAND
        :: group_is_pending && finalize -> begin_finish()
#endif
        :: else
        fi
#endif
    :: else
    fi
}

/* The end of one member; neither way can fail. */
inline job_commit(j)
{
    bits[j] = succ[j]; succ[j] = 0; moved[j] = 1
}
inline job_abort(j)
{
    bits[j] = bits[j] | succ[j]; succ[j] = 0; folded[j] = 1
}

proctype job_main(byte j)
{
    byte k;
    bit r;
    atomic {
        if :: r = 0 :: r = 1 fi; /* the work ends well, or not */
        if :: cancelled[j] -> r = 1 :: else fi;
        if :: r -> printf("@ J%d: fails or is cancelled\n", j) :: else -> printf("@ J%d: has copied all\n", j) fi;
        bad[j] = r; ended[j] = 1;
        st[j] = (r -> aborting : waiting);
#ifdef M_BITMAP_MOVES_AT_ONCE
        if :: !r -> bits[j] = succ[j]; dsk[j] = succ[j] :: else fi;
#endif
        group_check(k);
        r = 0
    }
#ifdef M_EACH_ENDS_ALONE
    ;
    atomic {
        if :: bad[j] -> job_abort(j) :: else -> job_commit(j) fi;
        dsk[j] = bits[j]; st[j] = concluded; printf("@ J%d: concluded\n", j)
    }
#endif
}

#ifndef M_EACH_ENDS_ALONE
/* A coroutine of its own. */
proctype finish()
{
    byte k, tries;
    bit ok;
    finishing;
    /* hold_nodes: when draining takes too long others get the lock in between. */
hold:
    skip;
    atomic { lock == 0 && !stopped -> lock = 1; printf("@ E: graph_lock\n") };
#ifndef M_END_NO_QUIESCE
    drained = 1;
    if
    :: EACH(IDLE) -> skip
    :: d_step { (tries == 0 && !(EACH(IDLE))) -> tries = 1; drained = 0; lock = 0 }; goto hold
    fi;
#endif
#ifndef M_END_SEEN_HALF
    effects = 1;
#endif
    d_step { /* from here on a cancel comes too late */
        ok = !group_failed; decided = 1;
        if :: !ok -> cancel_rest(k) :: else fi;
        tries = 0
    };
#ifdef M_RECORD_OF_EACH
    if :: ok -> dsk[0] = succ[0] :: else fi;
#endif
    /* One record for all bitmaps of the group. If it fails all jobs fail: both contents are still
     * there to be folded. */
    if
    :: d_step {
           printf("@ E: record, ok=%d\n", ok);
           recorded = 1; good = ok; k = 0;
           do :: k < NJOBS -> dsk[k] = (ok -> succ[k] : bits[k] | succ[k]); k++ :: else -> break od;
           k = 0 }
    :: d_step {
           printf("@ E: the record is not written\n");
#ifndef M_RECORD_FAILURE_IGNORED
           ok = 0;
#endif
           good = ok; recorded = 1; cancel_rest(k) }
    :: d_step { stopped = 1; printf("@ E: no record, and its flush fails: stopped\n") }; goto stop
    :: d_step {
           stopped = 1; good = ok; recorded = 1; k = 0;
           do :: k < NJOBS -> dsk[k] = (ok -> succ[k] : bits[k] | succ[k]); k++ :: else -> break od;
           k = 0; printf("@ E: record, but its flush fails: stopped\n") }; goto stop
    fi;
    k = NJOBS;
    do
    :: k > 0 ->
        d_step {
            k--;
            if :: ok -> job_commit(k) :: else -> job_abort(k) fi;
            printf("@ E: bitmap of J%d\n", k)
        }
    :: else -> break
    od;
    drained = 0; /* quiesce_end */
    do
#ifdef M_LATE_MEMBER_LEFT
    :: k < NJOBS && !ended[k] -> k++
    :: k < NJOBS && ended[k] -> d_step { st[k] = concluded; printf("@ E: J%d concluded\n", k); k++ }
#else
    :: k < NJOBS -> d_step { st[k] = concluded; printf("@ E: J%d concluded\n", k); k++ }
#endif
    :: else -> break
    od;
    k = 0;
    d_step { effects = 0; ok = 0 };
    lock = 0;
    goto end;
stop:
    ok = 0;
end_stopped:
    false;
end:
    skip
}
#endif

proctype guest()
{
    byte j;
    do
    :: atomic {
           (!drained && !stopped && SOME(UNWRITTEN)) ->
           if
           :: UNWRITTEN(0) -> j = 0
           :: UNWRITTEN(1) -> j = 1
#if NJOBS == 3
           :: UNWRITTEN(2) -> j = 2
#endif
           fi;
           inflight[j] = 2; dsk[j] = dsk[j] | 2;
           if
           :: (moved[j] || folded[j]) -> bits[j] = bits[j] | 2
           :: else -> succ[j] = succ[j] | 2
           fi;
           printf("@ G: write to disk %d begins\n", j) };
       d_step { seen[j] = 2; inflight[j] = 0; printf("@ G: write to disk %d lands\n", j); j = 0 }
    :: break
    od
}

/* job-cancel at any time, also at shutdown when nobody takes the lock. */
proctype user()
{
    byte k;
    if
    :: atomic {
#ifdef M_CANCEL_AFTER_DECISION
           !OVER(0) && !stopped;
#else
           !decided && !OVER(0) && !stopped;
#endif
           printf("@ U: job-cancel J0\n");
           cancelled[0] = 1;
           if
           :: ended[0] -> bad[0] = 1; st[0] = aborting; group_check(k)
           :: else
           fi }
    :: skip
    fi
}

#ifdef BY_HAND
proctype finalizer()
{
    byte k;
end_never:
    atomic {
        (lock == 0 && st[1] == pending && !stopped) ->
        printf("@ U: job-finalize J1\n");
        finalize = 1; group_check(k)
    }
}
#endif

/* query-jobs and query-block together. */
proctype query()
{
    atomic {
        (effects == 0 || stopped) ->
        printf("@ C: query\n");
#define AS_FIRST(j) ((moved[j] == moved[0] && folded[j] == folded[0] && OVER(j) == OVER(0)) || stopped)
        LAW(7, EACH(AS_FIRST)); /* L7: all have ended, in one way, or none has */
#define WHOLE(j) (OVER(j) == (moved[j] || folded[j]) || stopped)
        LAW(5, EACH(WHOLE)) }     /* L5: bitmap and job say the same */
}

#ifndef NO_WATCH
/* Asked of every state. It goes round for ever, so it hides who waits for ever: NO_WATCH. */
proctype watch()
{
end_watch:
    do
    :: d_step {
           /* L7, L8: after a crash all bitmaps have moved or none has. */
#define DURABLE(j) ((dsk[j] & 1) == (recorded && good -> 0 : 1))
           LAW(7, EACH(DURABLE));
           /* L8: no write is forgotten. */
#define KEPT(j) ((dsk[j] & seen[j]) == seen[j])
           LAW(8, EACH(KEPT));
           /* What is in memory in the end is what is durable, and what the job says of itself. */
#define AS_SAID(j) (!OVER(j) || (bits[j] == dsk[j] && moved[j] == !bad[j] && folded[j] == bad[j]))
           LAW(7, EACH(AS_SAID)) }
    od
}
#endif

init {
    byte k;
    atomic {
        do
        :: k < NJOBS -> st[k] = running; bits[k] = 1; dsk[k] = 1; run job_main(k); k++
        :: else -> break
        od;
        k = 0;
#ifndef M_EACH_ENDS_ALONE
        run finish();
#endif
        run guest(); run user(); run query();
#ifdef BY_HAND
        run finalizer();
#endif
#ifndef NO_WATCH
        run watch()
#endif
    }
}

ltl one_ends_all_end { [] (OVER(0) -> <> (EACH(OVER))) }

/* Not so, as the runner has to find: a job does end. */
ltl never_an_end { [] !OVER(0) }
