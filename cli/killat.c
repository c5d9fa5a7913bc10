/* SPDX-License-Identifier: Apache-2.0 */
/* For backup_test.sh, by LD_PRELOAD: kills the program just before its n-th call of those that
 * change a file or talk to the daemon, n being in KILL_AT. Faster than strace by a factor of fifty.
 * And lets fsync() of the directory named by FAIL_SYNC fail. */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

int openat(int dir, const char *path, int flags, ...);
int renameat(int from_dir, const char *from, int to_dir, const char *to);

static void count(void)
{
    static long left = -1;
    if (left < 0) {
        const char *n = getenv("KILL_AT");
        left = n ? atol(n) : 0;
    }
    if (left > 0 && --left == 0)
        raise(SIGKILL);
}

static int must_fail(int fd)
{
    const char *dir = getenv("FAIL_SYNC");
    struct stat named, opened;
    return dir && stat(dir, &named) == 0 && fstat(fd, &opened) == 0 &&
           named.st_dev == opened.st_dev && named.st_ino == opened.st_ino;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t send(int fd, const void *buf, size_t len, int flags)
{
    count();
    return NEXT(send)(fd, buf, len, flags);
}

ssize_t write(int fd, const void *buf, size_t len)
{
    count();
    return NEXT(write)(fd, buf, len);
}

int fsync(int fd)
{
    count();
    if (must_fail(fd)) {
        errno = EIO;
        return -1;
    }
    return NEXT(fsync)(fd);
}

int ftruncate(int fd, off_t len)
{
    count();
    return NEXT(ftruncate)(fd, len);
}

int renameat(int from_dir, const char *from, int to_dir, const char *to)
{
    count();
    return NEXT(renameat)(from_dir, from, to_dir, to);
}

int unlinkat(int dir, const char *path, int flags)
{
    count();
    return NEXT(unlinkat)(dir, path, flags);
}

int openat(int dir, const char *path, int flags, ...)
{
    va_list ap;
    va_start(ap, flags);
    int mode = flags & O_CREAT ? va_arg(ap, int) : 0;
    va_end(ap);
    count();
    return NEXT(openat)(dir, path, flags, mode);
}
