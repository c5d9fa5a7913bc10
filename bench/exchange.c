/* SPDX-License-Identifier: Apache-2.0 */
#include "exchange.h"

#include <err.h>
#include <errno.h>
#include <sys/socket.h>

#include "base/bytes.h"

void exchange_request(uint8_t *p, unsigned command, uint64_t cookie, uint64_t off, uint32_t len)
{
    put_be32(p, REQUEST_MAGIC);
    put_be16(p + 4, 0);
    put_be16(p + 6, command);
    put_be64(p + 8, cookie);
    put_be64(p + 16, off);
    put_be32(p + 24, len);
}

void exchange_send(int fd, const uint8_t *p, size_t len)
{
    for (size_t done = 0; done < len;) {
        ssize_t n = send(fd, p + done, len - done, MSG_NOSIGNAL);
        if (n < 0 && (errno == EPIPE || errno == ECONNRESET))
            errx(1, "the server hung up");
        if (n < 0 && errno != EINTR)
            err(1, "sending requests");
        done += n > 0 ? (size_t)n : 0;
    }
}

size_t exchange_receive(int fd, uint8_t *p, size_t room)
{
    ssize_t n;
    do {
        n = recv(fd, p, room, 0);
    } while (n < 0 && errno == EINTR);
    if (n < 0 && errno == EAGAIN)
        errx(1, "the server does not answer");
    if (n < 0 && errno != ECONNRESET)
        err(1, "receiving replies");
    if (n <= 0)
        errx(1, "the server hung up");
    return (size_t)n;
}
