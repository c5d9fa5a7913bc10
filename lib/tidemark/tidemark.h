/* SPDX-License-Identifier: Apache-2.0 */
/* libtidemark: transactions on a running tidemarkd, for programs in C.
 *
 * A program connects to a daemon's QMP socket (struct tide_conn), builds a list of actions (struct
 * tide_txn) and runs it: all of them happen, at one point in time for all disks, or none. If one
 * fails, the list says which, and why. docs/library.md shows how; docs/transactions.md says what a
 * list means.
 *
 * Threads: any, also several; but a connection, and a list, are used by one caller at a time. There
 * are no callbacks, no threads and no signal handlers inside, and no writable globals. Calls that
 * talk to the daemon block until it has answered, or for the time that tide_conn_set_timeout() set.
 *
 * Errors: functions that can fail return 0 or a negative errno, and never print. Words for a person
 * are kept in the object: tide_conn_error(), tide_txn_error(). What all calls that talk return:
 *   -EREMOTEIO   the daemon refused, and is ready for the next command;
 *   -EINVAL      an argument makes no sense; nothing was sent;
 *   -ENOTCONN    there is no connection; nothing was sent;
 *   -ECONNRESET  the connection was lost before the answer: what came of the command is unknown;
 *   -ETIMEDOUT   there was no answer in time: the same;
 *   -ENOMEM      no memory: the same, if the connection was open.
 * After the last three the connection is closed; tide_conn_open() opens another.
 *
 * Ownership: what a _new() function returns belongs to the caller, who frees it with the _free() of
 * the same name. Functions accept the NULL that _new() returns without memory: they return -ENOMEM,
 * or 0 or NULL where they return no error; _free(NULL) does nothing. Strings given to a function
 * are copied; those it returns as `const char *` belong to the object and stay until the next call
 * that changes it: asking for another one of them does not. Text is UTF-8. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <tidemark/actions.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ------------------------------------------------------------------ connections */

struct tide_conn;

/* A connection that is not open yet. NULL: no memory. */
struct tide_conn *tide_conn_new(void);
void tide_conn_free(struct tide_conn *conn);

/* Connects to the UNIX socket at `path` and agrees on QMP, within five seconds for each of both; a
 * connection that is open is closed first. Other clients of the socket go on beside it.
 * -ENOTCONN: nobody listens there, or does not speak QMP; -ENAMETOOLONG. */
int tide_conn_open(struct tide_conn *conn, const char *path);
bool tide_conn_is_open(const struct tide_conn *conn);

/* The most that one command may take from now on, in milliseconds; -1, as at first: for ever. */
void tide_conn_set_timeout(struct tide_conn *conn, int timeout_ms);

/* Any QMP command. `arguments` is a JSON object as text, or NULL. On success *reply is what the
 * daemon returned, as JSON text, to be freed with tide_free(); `reply` may be NULL. On an error it
 * is NULL. */
int tide_conn_call(struct tide_conn *conn, const char *command, const char *arguments,
                   char **reply);

/* The next event that has come, or comes within `timeout_ms` (-1: for ever): 1, and the whole event
 * as JSON text in *event, to be freed with tide_free(); or 0 and NULL if none came, or a signal
 * did. Or an error as above. Events that come while a command waits for its answer are kept for
 * this. */
int tide_conn_event(struct tide_conn *conn, int timeout_ms, char **event);

/* Words for the last error, without a final dot; "" if there was none. */
const char *tide_conn_error(const struct tide_conn *conn);
/* The class of the last -EREMOTEIO in QMP's words, such as "GenericError"; "" for other errors. */
const char *tide_conn_error_class(const struct tide_conn *conn);

/* Frees the texts above. NULL is fine. */
void tide_free(void *text);

/* Of the library, such as "0.1.0". */
const char *tide_version(void);

/* ------------------------------------------------------------------ lists of actions */

struct tide_txn;

/* An empty list. NULL: no memory. */
struct tide_txn *tide_txn_new(void);
void tide_txn_free(struct tide_txn *txn);

/* Actions are added by the functions of tidemark/actions.h, one for each kind; or as JSON text: an
 * object {"type": kind, "data": arguments}, or a list of such objects. Kinds that this library does
 * not know are left to the daemon. 0, -EINVAL, -ENOMEM; a failure is remembered: tide_txn_run()
 * returns it too, and runs nothing. */
int tide_txn_json(struct tide_txn *txn, const char *text);

/* How many actions it has. */
size_t tide_txn_length(const struct tide_txn *txn);

/* The jobs that the list starts end together: all succeed, or all are undone. At first: false. */
void tide_txn_set_grouped(struct tide_txn *txn, bool grouped);

/* A dry run: the daemon carries the list out and undoes it, and tells what each action found and
 * did. At first: false. Excludes an id. */
void tide_txn_set_dry_run(struct tide_txn *txn, bool dry_run);

/* A name for the list, 1 to 255 bytes; NULL, as at first: none. The daemon remembers the outcome
 * under it: the same list sent again under the same id, on whatever connection, is not carried out
 * again but has the outcome that it had; another list under the id is refused. So after -ECONNRESET
 * or -ETIMEDOUT: tide_conn_open() and tide_txn_run() again. The last 1024 are remembered, as long
 * as the daemon runs: one that was started anew carries the list out, on a state that is new too.
 */
int tide_txn_set_id(struct tide_txn *txn, const char *id);
/* An id that nobody else has, from random bytes. */
int tide_txn_choose_id(struct tide_txn *txn);
const char *tide_txn_id(const struct tide_txn *txn); /* NULL: none */

/* Sends the list and waits for what becomes of it. 0: all of it has happened (dry run: the report
 * is there, see tide_txn_would_commit()). -EREMOTEIO: nothing of it has; see below. Or an error as
 * at the head of this file. The list stays as it is, and may be run again or freed. */
int tide_txn_run(struct tide_txn *txn, struct tide_conn *conn);

/* ------------------------------------------------------------------ what became of it */

/* Of the last tide_txn_run() or failed addition. */

/* Why it failed, or in a dry run would fail; "" if it did not. */
const char *tide_txn_error(const struct tide_txn *txn);
/* The class in QMP's words if the daemon refused it, else "". */
const char *tide_txn_error_class(const struct tide_txn *txn);
/* The action that failed, or in a dry run would fail, from 0; of two that exclude each other the
 * later one. -1: none, or none in particular. */
int tide_txn_failed_action(const struct tide_txn *txn);
/* Its kind, and the phase in which it failed ("stage", "prepare", "record"); NULL where not known.
 */
const char *tide_txn_failed_kind(const struct tide_txn *txn);
const char *tide_txn_failed_phase(const struct tide_txn *txn);
/* It failed, and all that was done is undone. False after a failure only if somebody outside the
 * daemon, or a file system, stood in the way: tide_txn_error() says of what. */
bool tide_txn_undone(const struct tide_txn *txn);
/* The outcome, good or bad, is that of an earlier run under the same id; nothing was run now. */
bool tide_txn_replayed(const struct tide_txn *txn);

/* Dry runs: would it be carried out? For how many nanoseconds were guests held? */
bool tide_txn_would_commit(const struct tide_txn *txn);
uint64_t tide_txn_held_ns(const struct tide_txn *txn);
/* What action `i` found and changed, in words; NULL: not said. Its outcome: "not-run", "exercised"
 * (it took effect and was undone), "checked" (only what can be checked without making files),
 * "failed". */
const char *tide_txn_report_outcome(const struct tide_txn *txn, size_t i);
const char *tide_txn_report_sees(const struct tide_txn *txn, size_t i);
const char *tide_txn_report_does(const struct tide_txn *txn, size_t i);

#ifdef __cplusplus
}
#endif
