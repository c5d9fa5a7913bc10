/* SPDX-License-Identifier: Apache-2.0 */
/* A launcher for tests: forbids what container runtimes forbid, io_uring (io_uring_setup answers
 * EPERM, or with --enosys ENOSYS, as a kernel built without it) and system calls younger than their
 * list (epoll_pwait2), then becomes the program named by its arguments. */
#include <errno.h>
#include <seccomp.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    scmp_filter_ctx filter = seccomp_init(SCMP_ACT_ALLOW);
    int first = argc > 1 && !strcmp(argv[1], "--enosys") ? 2 : 1;
    int answer = first == 2 ? ENOSYS : EPERM;
    if (argc <= first || !filter ||
        seccomp_rule_add(filter, SCMP_ACT_ERRNO(answer), SCMP_SYS(io_uring_setup), 0) < 0 ||
        seccomp_rule_add(filter, SCMP_ACT_ERRNO(answer), SCMP_SYS(epoll_pwait2), 0) < 0 ||
        seccomp_load(filter) < 0) {
        fprintf(stderr, "usage: nouring [--enosys] PROGRAM [ARGUMENT...] (or no seccomp here)\n");
        return 125;
    }
    seccomp_release(filter);
    execvp(argv[first], argv + first);
    perror(argv[first]);
    return 127;
}
