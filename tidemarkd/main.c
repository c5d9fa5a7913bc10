/* SPDX-License-Identifier: Apache-2.0 */
/* tidemarkd: parse, perhaps go to the background, start the loops, do what the options say, wait
 * for the end. Forking comes before the first ring, thread or lock. */
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <jansson.h>

#include "base/log.h"
#include "base/mem.h"
#include "qmp/instance.h"
#include "tidemarkd/options.h"

#define MAX_DATA_LOOPS 8u

struct daemon {
    struct io *io;
    struct options *options;
    struct start start;
    struct instance *inst;
    int ready_fd;  /* tells the parent of a --daemonize that we are up; -1: none */
    char *pidfile; /* full path, once it is ours */
    int status;
};

/* One line, whatever the words that the message repeats hold. */
static void complain(char *msg)
{
    for (char *p = msg; *p; p++) {
        if ((unsigned char)*p < 0x20 || *p == 0x7F)
            *p = '?';
    }
    fprintf(stderr, "tidemarkd: %s\n", msg);
}

/* ------------------------------------------------------------------ background */

/* The parent waits until the child says it is up, and passes its exit status on. */
static int go_to_background(struct tide_error *err)
{
    int fds[2];
    if (pipe2(fds, O_CLOEXEC) < 0)
        return tide_fail(err, -errno, "cannot make a pipe: %s", tide_strerror(errno));
    pid_t pid = fork();
    if (pid < 0)
        return tide_fail(err, -errno, "cannot fork: %s", tide_strerror(errno));
    if (pid > 0) {
        char ok = 0;
        ssize_t n;
        close(fds[1]);
        do
            n = read(fds[0], &ok, 1);
        while (n < 0 && errno == EINTR);
        if (n != 1)
            waitpid(pid, NULL, 0); /* it has said why on standard error */
        _exit(n == 1 ? 0 : 1);
    }
    close(fds[0]);
    setsid();
    return fds[1];
}

static void tell_parent(struct daemon *d)
{
    if (d->ready_fd < 0)
        return;
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (null >= 0) {
        dup2(null, STDIN_FILENO);
        dup2(null, STDOUT_FILENO);
        dup2(null, STDERR_FILENO);
        close(null);
    }
    if (chdir("/") < 0 || write(d->ready_fd, "k", 1) != 1)
        log_warn("main", "the starting process is gone");
    close(d->ready_fd);
    d->ready_fd = -1;
}

/* The file stays open and locked while we live: the lock, not the file, says that a daemon runs. */
static int open_pidfile(const char *path, struct tide_error *err)
{
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
    if (fd < 0)
        return tide_fail(err, -errno, "cannot write the pidfile '%s': %s", path,
                         tide_strerror(errno));
    if (fcntl(fd, F_OFD_SETLK, &lock) == 0)
        return fd;
    int e = errno;
    close(fd);
    if (e == EAGAIN || e == EACCES)
        return tide_fail(err, -e, "the pidfile '%s' is that of another daemon, which runs", path);
    return tide_fail(err, -e, "cannot lock the pidfile '%s': %s", path, tide_strerror(e));
}

static int write_pidfile(struct daemon *d, struct tide_error *err)
{
    const char *path = d->start.pidfile;
    char text[32];
    if (!path)
        return 0;
    int fd = open_pidfile(path, err);
    if (fd < 0)
        return fd;
    int n = snprintf(text, sizeof text, "%ld\n", (long)getpid());
    d->pidfile = realpath(path, NULL); /* a daemon in the background leaves this directory */
    if (!d->pidfile || ftruncate(fd, 0) < 0 || write(fd, text, (size_t)n) != n) {
        int e = errno;
        close(fd);
        return tide_fail(err, -e, "cannot write the pidfile '%s': %s", path, tide_strerror(e));
    }
    return 0; /* fd stays open to the end */
}

/* ------------------------------------------------------------------ life */

static void wait_for_signal(void *arg)
{
    struct daemon *d = arg;
    int sig = io_signal_wait(d->io);
    if (sig > 0)
        instance_quit(d->inst);
}

static void daemon_main(void *arg)
{
    struct daemon *d = arg;
    struct tide_error err;
    int r = instance_new(d->io, &d->inst, &err);
    if (r == 0) {
        /* First of all, so that a signal during the start is not lost: it ends us right after. */
        r = loop_spawn(io_loop(d->io, 0), wait_for_signal, d);
        if (r < 0)
            tide_fail(&err, r, "no memory to start");
        if (r == 0)
            r = options_run(d->options, d->inst, &err);
        if (r == 0)
            r = write_pidfile(d, &err);
        if (r == 0)
            r = instance_open(d->inst, &err);
        if (r == 0) {
            tell_parent(d);
            io_event_wait(&d->inst->quit, IO_FOREVER);
        }
    }
    if (r < 0) {
        complain(err.msg);
        d->status = 1;
    }
    if (d->inst)
        instance_close(d->inst);
    io_stop(d->io);
}

/* Every connection is a descriptor: take as many as we may. */
static void raise_limits(void)
{
    struct rlimit l;
    if (getrlimit(RLIMIT_NOFILE, &l) == 0 && l.rlim_cur < l.rlim_max) {
        l.rlim_cur = l.rlim_max;
        setrlimit(RLIMIT_NOFILE, &l);
    }
}

static unsigned count_cpus(void)
{
    cpu_set_t set;
    int n = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
    return n > (int)MAX_DATA_LOOPS ? MAX_DATA_LOOPS : (unsigned)n;
}

static int run(struct daemon *d, struct tide_error *err)
{
    if (d->start.daemonize) {
        d->ready_fd = go_to_background(err);
        if (d->ready_fd < 0)
            return d->ready_fd;
    }
    raise_limits();
    /* Loop 0 is for control; the others serve. */
    unsigned n = d->start.n_loops ? d->start.n_loops : count_cpus();
    int r = io_new(d->start.engine, n + 1, &d->io, err);
    if (r < 0)
        return r;
    r = io_signals_block(d->io);
    if (r == 0)
        r = io_run(d->io, daemon_main, d);
    if (r < 0)
        tide_fail(err, r, "cannot run the loops: %s", tide_strerror(-r));
    if (d->pidfile)
        unlink(d->pidfile);
    free(d->pidfile);
    io_free(d->io);
    return r;
}

int main(int argc, char **argv)
{
    struct daemon d = {.ready_fd = -1};
    struct tide_error err;
    log_init("tidemarkd", LOG_LEVEL_INFO);
    json_object_seed(1); /* order of members does not depend on the process */
    json_set_alloc_funcs(mem_alloc, mem_free);
    signal(SIGPIPE, SIG_IGN);
    int r = options_parse(argc, argv, &d.start, &d.options, &err);
    if (r == 0 && d.start.help) {
        fputs(options_help, stdout);
    } else if (r == 0 && d.start.version) {
        printf("tidemarkd %s\n", TIDEMARK_VERSION);
    } else if (r == 0) {
        r = run(&d, &err);
    }
    options_free(d.options);
    if (r < 0) {
        complain(err.msg);
        return 1;
    }
    return d.status;
}
