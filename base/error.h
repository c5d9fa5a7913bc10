/* SPDX-License-Identifier: Apache-2.0 */
/* Errors that a person reads: a number for the code, a class for QMP, a sentence for the person.
 *
 * A function that can fail returns 0 (or a count) or -errno. If a person's words can be the cause,
 * its last argument is `struct tide_error *err`, never NULL, filled exactly once, where the cause
 * is known. Nothing is printed on the way up. */
#pragma once
#include <stdarg.h>

/* The error classes of QMP that tidemark uses (QEMU, qapi/error.json). */
enum tide_class {
    TIDE_GENERIC,
    TIDE_COMMAND_NOT_FOUND,
    TIDE_DEVICE_NOT_FOUND,
    TIDE_DEVICE_NOT_ACTIVE,
};

/* Lives on the caller's stack; owns nothing. */
struct tide_error {
    int code; /* -errno */
    enum tide_class class;
    char msg[400]; /* no final dot, names what the user typed; cut, at a character, if longer */
};

/* Fill `err` and return `code` (a negative errno). Any thread. */
int tide_fail(struct tide_error *err, int code, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
int tide_fail_class(struct tide_error *err, enum tide_class class, int code, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));

/* clang's analyzer reads one file at a time: let it see that what is returned is `code`. */
#ifdef __clang_analyzer__
#define tide_fail(err, code, ...) (tide_fail(err, code, __VA_ARGS__), (code))
#define tide_fail_class(err, class, code, ...)                                                     \
    (tide_fail_class(err, class, code, __VA_ARGS__), (code))
#endif

/* Put words in front of the message that is there: "node 'disk0': " + msg. */
void tide_error_prefix(struct tide_error *err, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));

/* Put words behind it: msg + "; not undone: ...". */
void tide_error_suffix(struct tide_error *err, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));

/* The QMP spelling of a class, such as "GenericError". */
const char *tide_class_name(enum tide_class class);

/* Text for a positive errno, without a number; never NULL. Any thread. */
const char *tide_strerror(int errnum);
