/* SPDX-License-Identifier: Apache-2.0 */
/* The log: one line, one write(2), so that lines of several threads never mix.
 *
 * Texts may hold words of a stranger (an export name, a path). Control characters become '?', so
 * that nobody can forge a second line or drive a terminal. */
#include "base/log.h"
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define LOG_LINE_MAX 1024

/* Set once before the first thread, read by all afterwards. Only words and a threshold: a run of
 * the simulator does not depend on them. */
static const char *log_program = "tidemark";
static enum log_level log_most = LOG_LEVEL_INFO;

void log_init(const char *program, enum log_level most)
{
    log_program = program;
    log_most = most;
}

static const char *level_name(enum log_level level)
{
    switch (level) {
    case LOG_LEVEL_ERROR:
        return "error";
    case LOG_LEVEL_WARN:
        return "warn";
    case LOG_LEVEL_INFO:
        return "info";
    case LOG_LEVEL_DEBUG:
        return "debug";
    }
    return "log";
}

/* What snprintf would have written, less what did not fit into `room` bytes. */
static size_t written(int n, size_t room)
{
    if (n < 0)
        return 0;
    return (size_t)n < room ? (size_t)n : room - 1;
}

void log_line(enum log_level level, const char *area, const char *fmt, ...)
{
    if (level > log_most)
        return;
    int saved = errno; /* callers log between a failure and their use of errno */
    char line[LOG_LINE_MAX];
    size_t room = sizeof line - 1; /* one byte for the newline */
    size_t len =
        written(snprintf(line, room, "%s: %s: %s: ", log_program, level_name(level), area), room);
    va_list ap;
    va_start(ap, fmt);
    len += written(vsnprintf(line + len, room - len, fmt, ap), room - len);
    va_end(ap);
    for (size_t i = 0; i < len; i++) {
        if ((unsigned char)line[i] < 0x20 || line[i] == 0x7f)
            line[i] = '?';
    }
    line[len++] = '\n';
    ssize_t n;
    do
        n = write(STDERR_FILENO, line, len);
    while (n < 0 && errno == EINTR);
    /* Any other failure is dropped: there is no other place to report it. */
    errno = saved;
}
