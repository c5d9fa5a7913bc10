/* SPDX-License-Identifier: Apache-2.0 */
/* The NBD protocol's numbers and the layout of what goes over the wire (fixed newstyle; the public
 * document is doc/proto.md of the NetworkBlockDevice project). All numbers are big-endian.
 *
 *   request          magic 4, flags 2, type 2, cookie 8, offset 8, length 4           = 28 bytes
 *   simple reply     magic 4, error 4, cookie 8                                       = 16 bytes
 *   structured chunk magic 4, flags 2, type 2, cookie 8, length 4, then the payload   = 20 bytes
 *
 * With extended headers all lengths are 64 bits wide, and there are no simple replies:
 *
 *   request          magic 4, flags 2, type 2, cookie 8, offset 8, length 8           = 32 bytes
 *   reply chunk      magic 4, flags 2, type 2, cookie 8, offset 8, length 8           = 32 bytes
 *
 * A compact request has a payload only if it is a write, and as long as its length says. An
 * extended one has one if its flags include PAYLOAD_LEN; its length is then the payload's. The
 * offset of a reply is that of its request. */
#pragma once
#include <errno.h>
#include <stddef.h>

#include "base/bytes.h"

#define NBD_MAGIC 0x4e42444d41474943ull        /* "NBDMAGIC" */
#define NBD_OPTION_MAGIC 0x49484156454f5054ull /* "IHAVEOPT" */
#define NBD_OPTION_REPLY_MAGIC 0x0003e889045565a9ull
#define NBD_REQUEST_MAGIC 0x25609513u
#define NBD_SIMPLE_REPLY_MAGIC 0x67446698u
#define NBD_CHUNK_MAGIC 0x668e33efu
#define NBD_EXT_REQUEST_MAGIC 0x21e41c71u
#define NBD_EXT_CHUNK_MAGIC 0x6e8a278cu

/* Handshake flags, server's and client's. */
#define NBD_FIXED_NEWSTYLE 1u
#define NBD_NO_ZEROES 2u

enum nbd_opt {
    NBD_OPT_EXPORT_NAME = 1,
    NBD_OPT_ABORT = 2,
    NBD_OPT_LIST = 3,
    NBD_OPT_STARTTLS = 5,
    NBD_OPT_INFO = 6,
    NBD_OPT_GO = 7,
    NBD_OPT_STRUCTURED_REPLY = 8,
    NBD_OPT_LIST_META_CONTEXT = 9,
    NBD_OPT_SET_META_CONTEXT = 10,
    NBD_OPT_EXTENDED_HEADERS = 11,
};

#define NBD_REP_ACK 1u
#define NBD_REP_SERVER 2u
#define NBD_REP_INFO 3u
#define NBD_REP_META_CONTEXT 4u
#define NBD_REP_ERR_UNSUP 0x80000001u
#define NBD_REP_ERR_POLICY 0x80000002u
#define NBD_REP_ERR_INVALID 0x80000003u
#define NBD_REP_ERR_UNKNOWN 0x80000006u
#define NBD_REP_ERR_TOO_BIG 0x80000009u
#define NBD_REP_ERR_EXT_HEADER_REQD 0x8000000au

#define NBD_INFO_EXPORT 0u
#define NBD_INFO_NAME 1u
#define NBD_INFO_DESCRIPTION 2u
#define NBD_INFO_BLOCK_SIZE 3u

/* Transmission flags. */
#define NBD_HAS_FLAGS (1u << 0)
#define NBD_READ_ONLY (1u << 1)
#define NBD_SEND_FLUSH (1u << 2)
#define NBD_SEND_FUA (1u << 3)
#define NBD_SEND_TRIM (1u << 5)
#define NBD_SEND_WRITE_ZEROES (1u << 6)
#define NBD_SEND_DF (1u << 7)
#define NBD_CAN_MULTI_CONN (1u << 8)
#define NBD_SEND_CACHE (1u << 10)
#define NBD_SEND_FAST_ZERO (1u << 11)
#define NBD_BLOCK_STAT_PAYLOAD (1u << 12) /* BLOCK_STATUS takes a list of contexts */

enum nbd_cmd {
    NBD_CMD_READ = 0,
    NBD_CMD_WRITE = 1,
    NBD_CMD_DISC = 2,
    NBD_CMD_FLUSH = 3,
    NBD_CMD_TRIM = 4,
    NBD_CMD_CACHE = 5,
    NBD_CMD_WRITE_ZEROES = 6,
    NBD_CMD_BLOCK_STATUS = 7,
};

#define NBD_FLAG_FUA (1u << 0)
#define NBD_FLAG_NO_HOLE (1u << 1)
#define NBD_FLAG_DF (1u << 2)
#define NBD_FLAG_REQ_ONE (1u << 3)
#define NBD_FLAG_FAST_ZERO (1u << 4)
#define NBD_FLAG_PAYLOAD_LEN (1u << 5) /* extended headers: the length is that of a payload */

#define NBD_CHUNK_DONE 1u /* flag: the last chunk of its reply */
#define NBD_CHUNK_NONE 0u
#define NBD_CHUNK_OFFSET_DATA 1u
#define NBD_CHUNK_OFFSET_HOLE 2u
#define NBD_CHUNK_BLOCK_STATUS 5u     /* context 4, then extents: length 4, flags 4 */
#define NBD_CHUNK_BLOCK_STATUS_EXT 6u /* context 4, count 4, then extents: length 8, flags 8 */
#define NBD_CHUNK_ERROR 0x8001u

/* Extent flags: of base:allocation and of qemu:dirty-bitmap:*. */
#define NBD_STATE_HOLE 1u
#define NBD_STATE_ZERO 2u
#define NBD_STATE_DIRTY 1u

#define NBD_REQUEST_LEN 28u
#define NBD_SIMPLE_LEN 16u
#define NBD_CHUNK_LEN 20u
#define NBD_EXT_REQUEST_LEN 32u
#define NBD_EXT_CHUNK_LEN 32u
#define NBD_OPTION_LEN 16u
#define NBD_OPTION_REPLY_LEN 20u

#define NBD_MAX_STRING 4096u                 /* export name, description, context name */
#define NBD_MAX_PAYLOAD ((uint64_t)32 << 20) /* data of one request or reply */

/* `payload` bytes follow the request. NBD_PAYLOAD_LOST: it is a write that does not say how many,
 * so nobody knows where the next request begins. */
#define NBD_PAYLOAD_LOST UINT64_MAX
struct nbd_request {
    uint64_t cookie, off, len, payload;
    uint16_t cmd, flags;
};

/* NBD_REQUEST_LEN bytes at `p`. -EPROTO: this is not a request. */
static inline int nbd_request_decode(const uint8_t *p, struct nbd_request *rq)
{
    if (get_be32(p) != NBD_REQUEST_MAGIC)
        return -EPROTO;
    rq->flags = get_be16(p + 4);
    rq->cmd = get_be16(p + 6);
    rq->cookie = get_be64(p + 8);
    rq->off = get_be64(p + 16);
    rq->len = get_be32(p + 24);
    rq->payload = rq->cmd == NBD_CMD_WRITE ? rq->len : 0;
    return 0;
}

/* The same with extended headers: NBD_EXT_REQUEST_LEN bytes. */
static inline int nbd_ext_request_decode(const uint8_t *p, struct nbd_request *rq)
{
    if (get_be32(p) != NBD_EXT_REQUEST_MAGIC)
        return -EPROTO;
    rq->flags = get_be16(p + 4);
    rq->cmd = get_be16(p + 6);
    rq->cookie = get_be64(p + 8);
    rq->off = get_be64(p + 16);
    rq->len = get_be64(p + 24);
    if (rq->flags & NBD_FLAG_PAYLOAD_LEN)
        rq->payload = rq->len;
    else
        rq->payload = rq->cmd == NBD_CMD_WRITE ? NBD_PAYLOAD_LOST : 0;
    return 0;
}

static inline void nbd_simple_encode(uint8_t *p, uint64_t cookie, uint32_t error)
{
    put_be32(p, NBD_SIMPLE_REPLY_MAGIC);
    put_be32(p + 4, error);
    put_be64(p + 8, cookie);
}

static inline void nbd_chunk_encode(uint8_t *p, uint64_t cookie, unsigned flags, unsigned type,
                                    uint32_t len)
{
    put_be32(p, NBD_CHUNK_MAGIC);
    put_be16(p + 4, flags);
    put_be16(p + 6, type);
    put_be64(p + 8, cookie);
    put_be32(p + 16, len);
}

static inline void nbd_ext_chunk_encode(uint8_t *p, const struct nbd_request *rq, unsigned flags,
                                        unsigned type, uint64_t len)
{
    put_be32(p, NBD_EXT_CHUNK_MAGIC);
    put_be16(p + 4, flags);
    put_be16(p + 6, type);
    put_be64(p + 8, rq->cookie);
    put_be64(p + 16, rq->off);
    put_be64(p + 24, len);
}

/* The wire's number for an errno (positive): only a few exist there, the rest is EINVAL. */
static inline uint32_t nbd_errno(int e)
{
    switch (e) {
    case 0:
        return 0;
    case EPERM:
    case EROFS:
        return 1;
    case EIO:
        return 5;
    case ENOMEM:
        return 12;
    case ENOSPC:
    case EFBIG:
    case EDQUOT:
        return 28;
    case EOVERFLOW:
        return 75;
    case EOPNOTSUPP: /* ENOTSUP is the same number on Linux */
        return 95;
    case ESHUTDOWN:
        return 108;
    default:
        return 22;
    }
}
