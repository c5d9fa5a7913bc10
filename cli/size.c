/* SPDX-License-Identifier: Apache-2.0 */
/* Sizes as people write and read them. */
#include "cli/size.h"
#include <errno.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>

static const char units[] = "KMGTPE";

/* The power of 1024 that a suffix stands for; -1 if it is none. */
static int suffix_power(const char *suffix)
{
    if (*suffix == '\0' || strcasecmp(suffix, "B") == 0)
        return 0;
    const char *unit = strchr(units, *suffix & ~0x20);
    if (!unit || !*unit)
        return -1;
    const char *rest = suffix + 1;
    if (*rest != '\0' && strcasecmp(rest, "B") != 0 && strcasecmp(rest, "iB") != 0)
        return -1;
    return (int)(unit - units) + 1;
}

int size_parse(const char *text, uint64_t *size, struct tide_error *err)
{
    uint64_t n = 0;
    const char *p = text;
    bool over = false;
    for (; *p >= '0' && *p <= '9'; p++)
        if (__builtin_mul_overflow(n, 10u, &n) || __builtin_add_overflow(n, *p - '0', &n))
            over = true;
    int power = p == text ? -1 : suffix_power(p);
    if (power < 0)
        return tide_fail(err, -EINVAL, "'%s' is not a size; write it like 4096, 64K or 10G", text);
    uint64_t unit = (uint64_t)1 << (10 * power);
    if (over || __builtin_mul_overflow(n, unit, &n) || n > INT64_MAX)
        return tide_fail(err, -ERANGE, "'%s' is too large", text);
    *size = n;
    return 0;
}

struct size_text size_text(uint64_t size)
{
    struct size_text t;
    int power = 0;
    while (power < 6 && size >> (10 * (power + 1)))
        power++;
    if (power == 0) {
        snprintf(t.s, sizeof t.s, "%" PRIu64 " B", size);
        return t;
    }
    uint64_t whole = size >> (10 * power);
    uint64_t part = size - (whole << (10 * power));
    unsigned tenth = (unsigned)((part >> (10 * (power - 1))) * 10 / 1024);
    if (tenth)
        snprintf(t.s, sizeof t.s, "%" PRIu64 ".%u %ciB", whole, tenth, units[power - 1]);
    else
        snprintf(t.s, sizeof t.s, "%" PRIu64 " %ciB", whole, units[power - 1]);
    return t;
}
