/* SPDX-License-Identifier: Apache-2.0 */
/* Scanning, verifying and applying the raw files of a backup.
 *
 * All three walk ranges of a file in pieces of 1 MiB and hash what they read; they differ in what
 * they do with a piece. A piece is written to the target before its range's hash is known, which is
 * why restore works on a temporary file that is thrown away when a hash does not fit. */
#include "cli/image.h"
#include "base/bytes.h"
#include "base/mem.h"
#include "cli/cli.h"
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#define PIECE MIB
#define HOLE_MIN (64 * KIB) /* shorter ones would only make the manifest long */
#define ZERO_STEP (64 * KIB)

/* ---- pieces ---- */

static int read_piece(int fd, void *buf, uint64_t len, uint64_t off)
{
    for (uint64_t done = 0; done < len;) {
        ssize_t n = pread(fd, (char *)buf + done, len - done, (off_t)(off + done));
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        if (n == 0)
            return -ENODATA;
        done += (uint64_t)n;
    }
    return 0;
}

static int write_piece(int fd, const void *buf, uint64_t len, uint64_t off)
{
    for (uint64_t done = 0; done < len;) {
        ssize_t n = pwrite(fd, (const char *)buf + done, len - done, (off_t)(off + done));
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        done += (uint64_t)n;
    }
    return 0;
}

static bool is_zero(const char *buf, uint64_t len)
{
    return len == 0 || (buf[0] == 0 && memcmp(buf, buf + 1, len - 1) == 0);
}

/* Writes a piece into a file that still reads as zeroes there: blocks of zeroes stay holes. */
static int write_sparse(int fd, const char *buf, uint64_t len, uint64_t off)
{
    for (uint64_t at = 0; at < len; at += ZERO_STEP) {
        uint64_t n = MIN(ZERO_STEP, len - at);
        int r = is_zero(buf + at, n) ? 0 : write_piece(fd, buf + at, n, off + at);
        if (r < 0)
            return r;
    }
    return 0;
}

/* Where the pieces of a range go besides the hash. out_fd < 0: nowhere. */
struct sink {
    int out_fd;
    bool fresh; /* the target still reads as zeroes */
};

static int drain(const struct sink *sink, const char *buf, uint64_t len, uint64_t off)
{
    if (sink->out_fd < 0)
        return 0;
    return sink->fresh ? write_sparse(sink->out_fd, buf, len, off)
                       : write_piece(sink->out_fd, buf, len, off);
}

/* Reads [off, off+len) piece by piece; its hash in *hash. Errors have words without a file name. */
static int walk(int fd, uint64_t off, uint64_t len, const struct sink *sink,
                struct image_watch *watch, uint64_t *hash, struct tide_error *err)
{
    char *buf = mem_aligned(4096, PIECE);
    XXH3_state_t *state = XXH3_createState();
    int r = buf && state ? 0 : tide_fail(err, -ENOMEM, "no memory for a buffer");
    if (r == 0)
        XXH3_64bits_reset(state);
    for (uint64_t at = 0; r == 0 && at < len;) {
        uint64_t n = MIN(PIECE, len - at);
        r = read_piece(fd, buf, n, off + at);
        if (r < 0) {
            if (r == -ENODATA)
                r = tide_fail(err, -EILSEQ, "the file became shorter while it was read");
            else
                tide_fail(err, r, "cannot read at %" PRIu64 ": %s", off + at, tide_strerror(-r));
            break;
        }
        XXH3_64bits_update(state, buf, n);
        r = drain(sink, buf, n, off + at);
        if (r < 0) {
            tide_fail(err, r, "cannot write at %" PRIu64 ": %s", off + at, tide_strerror(-r));
            break;
        }
        at += n;
        if (watch->moved && (r = watch->moved(watch->opaque, n)) < 0)
            tide_fail(err, r, "interrupted");
    }
    if (r == 0)
        *hash = XXH3_64bits_digest(state);
    XXH3_freeState(state);
    mem_free(buf);
    return r;
}

/* ---- scanning ---- */

struct scan {
    int fd;
    struct image_watch *watch;
    struct extent *list;
    size_t n, room;
};

static int scan_add(struct scan *s, uint64_t off, uint64_t len, bool zero, struct tide_error *err)
{
    if (s->n == s->room) {
        s->room = s->room ? s->room * 2 : 64;
        s->list = cli_grow(s->list, s->room, sizeof *s->list);
    }
    struct extent *e = &s->list[s->n];
    *e = (struct extent){.off = off, .len = len, .zero = zero};
    if (!zero) {
        struct sink none = {.out_fd = -1};
        int r = walk(s->fd, off, len, &none, s->watch, &e->hash, err);
        if (r < 0)
            return r;
    }
    s->n++;
    return 0;
}

/* Where the first hole of [off, end) that is long enough begins, `end` if there is none; its end in
 * *hole_end. A file system that knows no holes says: all data. */
static uint64_t find_hole(int fd, uint64_t off, uint64_t end, uint64_t *hole_end)
{
    uint64_t at = off;
    while (at < end) {
        off_t hole = lseek(fd, (off_t)at, SEEK_HOLE);
        if (hole < 0 || (uint64_t)hole >= end)
            break;
        off_t data = lseek(fd, hole, SEEK_DATA);
        uint64_t until = data < 0 ? end : MIN((uint64_t)data, end);
        if (data < 0 && errno != ENXIO)
            break;
        if (until - (uint64_t)hole >= HOLE_MIN || ((uint64_t)hole <= off && until == end)) {
            *hole_end = until;
            return (uint64_t)hole;
        }
        at = until;
    }
    *hole_end = end;
    return end;
}

static int scan_range(struct scan *s, uint64_t off, uint64_t end, struct tide_error *err)
{
    while (off < end) {
        uint64_t hole_end;
        uint64_t hole = find_hole(s->fd, off, end, &hole_end);
        int r = hole > off ? scan_add(s, off, hole - off, false, err) : 0;
        if (r == 0 && hole_end > hole)
            r = scan_add(s, hole, hole_end - hole, true, err);
        if (r < 0)
            return r;
        off = hole_end;
    }
    return 0;
}

int image_scan(int fd, const struct ranges *ranges, struct image_watch *watch, struct extent **out,
               size_t *n_out, struct tide_error *err)
{
    struct scan s = {.fd = fd, .watch = watch};
    int r = 0;
    for (size_t i = 0; r == 0 && i < ranges->n; i++)
        r = scan_range(&s, ranges->list[i].off, ranges->list[i].off + ranges->list[i].len, err);
    if (r < 0) {
        mem_free(s.list);
        return r;
    }
    *out = s.list;
    *n_out = s.n;
    return 0;
}

/* ---- verifying and applying ---- */

int image_open(int dir_fd, const struct manifest_disk *d, struct tide_error *err)
{
    struct stat st;
    int fd = manifest_open_file(dir_fd, d->file, &st, err);
    if (fd < 0 || (uint64_t)st.st_size == d->size)
        return fd;
    close(fd);
    return tide_fail(err, -EILSEQ, "'%s' has %" PRIu64 " bytes, the manifest says %" PRIu64,
                     d->file, (uint64_t)st.st_size, d->size);
}

static int check_extent(int fd, const struct manifest_disk *d, const struct extent *e,
                        const struct sink *sink, struct image_watch *watch, struct tide_error *err)
{
    uint64_t hash;
    int r = walk(fd, e->off, e->len, sink, watch, &hash, err);
    if (r < 0) {
        tide_error_prefix(err, "'%s': ", d->file);
        return r;
    }
    if (hash == e->hash)
        return 0;
    return tide_fail(err, -EILSEQ,
                     "'%s' is damaged: its %" PRIu64 " bytes at %" PRIu64 " do not fit their hash",
                     d->file, e->len, e->off);
}

int image_verify(int fd, const struct manifest_disk *d, struct image_watch *watch,
                 struct tide_error *err)
{
    struct sink none = {.out_fd = -1};
    for (size_t i = 0; i < d->n_extents; i++) {
        if (d->extents[i].zero)
            continue;
        int r = check_extent(fd, d, &d->extents[i], &none, watch, err);
        if (r < 0)
            return r;
    }
    return 0;
}

/* Makes [off, off+len) read as zeroes: a hole where the file system can, else written. */
static int write_zeroes(int fd, uint64_t off, uint64_t len)
{
    if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)off, (off_t)len) == 0)
        return 0;
    if (errno != EOPNOTSUPP && errno != ENOSYS)
        return -errno;
    char *zeroes = cli_alloc(1, PIECE);
    int r = 0;
    for (uint64_t at = 0; r == 0 && at < len; at += PIECE)
        r = write_piece(fd, zeroes, MIN(PIECE, len - at), off + at);
    mem_free(zeroes);
    return r;
}

int image_apply(int fd, const struct manifest_disk *d, int out, struct image_watch *watch,
                struct tide_error *err)
{
    struct sink sink = {.out_fd = out, .fresh = d->full};
    for (size_t i = 0; i < d->n_extents; i++) {
        const struct extent *e = &d->extents[i];
        int r = 0;
        if (!e->zero)
            r = check_extent(fd, d, e, &sink, watch, err);
        else if (!sink.fresh && (r = write_zeroes(out, e->off, e->len)) < 0)
            tide_fail(err, r, "cannot write zeroes at %" PRIu64 ": %s", e->off, tide_strerror(-r));
        if (r < 0)
            return r;
    }
    return 0;
}
