/* SPDX-License-Identifier: Apache-2.0 */
/* Errors that a person reads.
 *
 * A message lives in a fixed buffer, so that reporting "no memory" needs none. What does not fit is
 * cut, and always between two characters: half of one would make the JSON of the reply invalid. */
#include "base/error.h"
#include <assert.h>
#include <stdio.h>
#include <string.h>

/* `s` holds `len` bytes of UTF-8 whose end was cut off: remove the last character if it is only
 * there in part. Bytes that are no UTF-8 are left alone; the writer of JSON deals with them. */
static void drop_partial_character(char *s, size_t len)
{
    size_t tail = 0; /* continuation bytes at the end */
    while (tail < 3 && tail < len && ((unsigned char)s[len - 1 - tail] & 0xc0) == 0x80)
        tail++;
    if (tail == len)
        return;
    size_t first = len - 1 - tail;
    unsigned char lead = (unsigned char)s[first];
    size_t need = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : lead >= 0xc0 ? 2 : 1;
    if (tail + 1 < need)
        s[first] = '\0';
}

/* Appends to the text of `used` bytes in buf[size]; returns the new length, always below size. */
static size_t append(char *buf, size_t size, size_t used, const char *fmt, va_list ap)
{
    int n = vsnprintf(buf + used, size - used, fmt, ap);
    if (n < 0) /* arguments that cannot be printed: the format itself still says something */
        n = snprintf(buf + used, size - used, "%s", fmt);
    if ((size_t)n >= size - used)
        drop_partial_character(buf, size - 1);
    return strlen(buf);
}

/* For the analyzer these are macros. */
#undef tide_fail
#undef tide_fail_class

static int fill(struct tide_error *err, enum tide_class class, int code, const char *fmt,
                va_list ap)
{
    assert(code < 0);
    char text[sizeof err->msg]; /* the old message may be among the arguments */
    size_t len = append(text, sizeof text, 0, fmt, ap);
    memcpy(err->msg, text, len + 1);
    err->code = code;
    err->class = class;
    return code;
}

int tide_fail(struct tide_error *err, int code, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    fill(err, TIDE_GENERIC, code, fmt, ap);
    va_end(ap);
    return code;
}

int tide_fail_class(struct tide_error *err, enum tide_class class, int code, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    fill(err, class, code, fmt, ap);
    va_end(ap);
    return code;
}

void tide_error_prefix(struct tide_error *err, const char *fmt, ...)
{
    char text[sizeof err->msg];
    va_list ap;
    va_start(ap, fmt);
    size_t len = append(text, sizeof text, 0, fmt, ap);
    va_end(ap);
    size_t room = sizeof text - len;
    size_t rest = strlen(err->msg);
    if (rest < room) {
        memcpy(text + len, err->msg, rest + 1);
    } else {
        memcpy(text + len, err->msg, room - 1);
        text[sizeof text - 1] = '\0';
        drop_partial_character(text, sizeof text - 1);
    }
    memcpy(err->msg, text, strlen(text) + 1);
}

void tide_error_suffix(struct tide_error *err, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    append(err->msg, sizeof err->msg, strlen(err->msg), fmt, ap);
    va_end(ap);
}

const char *tide_class_name(enum tide_class class)
{
    switch (class) {
    case TIDE_GENERIC:
        return "GenericError";
    case TIDE_COMMAND_NOT_FOUND:
        return "CommandNotFound";
    case TIDE_DEVICE_NOT_FOUND:
        return "DeviceNotFound";
    case TIDE_DEVICE_NOT_ACTIVE:
        return "DeviceNotActive";
    }
    return "GenericError";
}

/* Not strerror(): its buffer is shared and its words change with the locale. */
const char *tide_strerror(int errnum)
{
    const char *text = strerrordesc_np(errnum);
    return text ? text : "Unknown error";
}
