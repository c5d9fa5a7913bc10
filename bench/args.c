/* SPDX-License-Identifier: Apache-2.0 */
#include "args.h"

#include <err.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* `suffixes`: those that are allowed, each 1024 times the one before. */
static uint64_t number(const char *what, const char *s, uint64_t min, uint64_t max,
                       const char *suffixes)
{
    char *end;
    errno = 0;
    unsigned long long v = strtoull(s, &end, 0);
    uint64_t factor = 1;
    const char *suffix = *end ? strchr(suffixes, *end == 'K' ? 'k' : *end) : NULL;
    if (suffix) {
        factor <<= 10 * (suffix - suffixes + 1);
        end++;
    }
    if (errno || end == s || *end || *s == '-' || v > max / factor || v * factor < min) {
        warnx("--%s: '%s' is not a number from %" PRIu64 " to %" PRIu64, what, s, min, max);
        exit(2);
    }
    return v * factor;
}

uint64_t args_number(const char *what, const char *s, uint64_t min, uint64_t max)
{
    return number(what, s, min, max, "");
}

uint64_t args_size(const char *what, const char *s, uint64_t min, uint64_t max)
{
    return number(what, s, min, max, "kMGT");
}

uint64_t args_seconds(const char *what, const char *s)
{
    char *end;
    double v = strtod(s, &end);
    if (end == s || *end || !(v > 0 && v < 1e6)) {
        warnx("--%s: '%s' is not a number of seconds", what, s);
        exit(2);
    }
    return (uint64_t)(v * 1e9);
}
