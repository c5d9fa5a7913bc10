/* SPDX-License-Identifier: Apache-2.0 */
/* The log: one line on standard error (or where log_to() says), "tidemarkd: warn: nbd: text". */
#pragma once

enum log_level { LOG_LEVEL_ERROR, LOG_LEVEL_WARN, LOG_LEVEL_INFO, LOG_LEVEL_DEBUG };

/* `area` is the folder's or protocol's short name. Any thread; one write(2) a line. */
void log_line(enum log_level level, const char *area, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
#define log_error(area, ...) log_line(LOG_LEVEL_ERROR, area, __VA_ARGS__)
#define log_warn(area, ...) log_line(LOG_LEVEL_WARN, area, __VA_ARGS__)
#define log_info(area, ...) log_line(LOG_LEVEL_INFO, area, __VA_ARGS__)
#define log_debug(area, ...) log_line(LOG_LEVEL_DEBUG, area, __VA_ARGS__)

/* Before the first thread: program name (borrowed for ever) and the least urgent level printed. */
void log_init(const char *program, enum log_level most);
