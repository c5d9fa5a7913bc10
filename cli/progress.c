/* SPDX-License-Identifier: Apache-2.0 */
/* Progress bars. They are redrawn in place: up as many lines as were drawn, each line overwritten
 * and cleared to its end. */
#include "cli/progress.h"
#include "cli/size.h"
#include "cli/table.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#define DRAW_EVERY_MS 100
#define BAR_MAX 40
#define LABEL_MAX 24

static int64_t now_ms(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

unsigned terminal_columns(int fd)
{
    struct winsize w;
    if (ioctl(fd, TIOCGWINSZ, &w) == 0 && w.ws_col > 0)
        return w.ws_col;
    const char *columns = getenv("COLUMNS");
    unsigned long n = columns ? strtoul(columns, NULL, 10) : 0;
    return n >= 20 && n <= 1000 ? (unsigned)n : 80;
}

void progress_start(struct progress *p, bool on)
{
    *p = (struct progress){.on = on, .start_ms = now_ms()};
}

static void draw_bar(unsigned width, uint64_t done, uint64_t total)
{
    unsigned full = total ? (unsigned)((double)done / (double)total * width) : width;
    full = full > width ? width : full;
    fputc('[', stderr);
    for (unsigned i = 0; i < width; i++)
        fputc(i < full ? '#' : '-', stderr);
    fputc(']', stderr);
}

static int label_width(const struct progress_line *lines, size_t n)
{
    size_t width = 0;
    for (size_t i = 0; i < n; i++)
        width = text_width(lines[i].label) > width ? text_width(lines[i].label) : width;
    return (int)(width > LABEL_MAX ? LABEL_MAX : width);
}

static void draw_line(const struct progress *p, const struct progress_line *l, int label,
                      unsigned columns)
{
    unsigned width = columns > 90 ? BAR_MAX : columns > 70 ? 20 : 0;
    unsigned percent = l->total ? (unsigned)((double)l->done * 100 / (double)l->total) : 100;
    percent = percent > 100 ? 100 : percent;
    fprintf(stderr, "\033[2K%-*.*s ", label, label, l->label);
    if (width)
        draw_bar(width, l->done, l->total);
    fprintf(stderr, " %3u%% %9s", percent, size_text(l->done).s);
    int64_t ms = now_ms() - p->start_ms;
    if (ms > 500 && l->done > 0 && columns > 60)
        fprintf(stderr, " %9s/s", size_text((uint64_t)((double)l->done * 1000 / (double)ms)).s);
    fputc('\n', stderr);
}

static void go_up(struct progress *p)
{
    if (p->lines_up)
        fprintf(stderr, "\033[%zuA\r", p->lines_up);
}

void progress_draw(struct progress *p, const struct progress_line *lines, size_t n, bool now)
{
    if (!p->on || (!now && p->drawn_ms && now_ms() - p->drawn_ms < DRAW_EVERY_MS))
        return;
    unsigned columns = terminal_columns(STDERR_FILENO);
    go_up(p);
    for (size_t i = 0; i < n; i++)
        draw_line(p, &lines[i], label_width(lines, n), columns);
    p->lines_up = n;
    p->drawn_ms = now_ms();
    fflush(stderr);
}

void progress_end(struct progress *p)
{
    if (!p->on || !p->lines_up)
        return;
    go_up(p);
    fputs("\033[J", stderr);
    fflush(stderr);
    p->lines_up = 0;
}
