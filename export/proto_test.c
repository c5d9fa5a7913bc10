/* SPDX-License-Identifier: Apache-2.0 */
/* Tests of what the NBD server has of pure functions. */
#include <errno.h>

#include "export/export_test.h"

static void request_is_decoded(void **state)
{
    uint8_t p[NBD_REQUEST_LEN] = {0x25, 0x60, 0x95, 0x13, 0x00, 0x11, 0x00, 0x06, 1, 2,
                                  3,    4,    5,    6,    7,    8,    0,    0,    0, 1,
                                  0,    0,    0,    0,    0xff, 0xff, 0xff, 0xff};
    struct nbd_request rq;
    assert_int_equal(nbd_request_decode(p, &rq), 0);
    assert_int_equal(rq.flags, NBD_FLAG_FUA | NBD_FLAG_FAST_ZERO);
    assert_int_equal(rq.cmd, NBD_CMD_WRITE_ZEROES);
    assert_true(rq.cookie == 0x0102030405060708ull);
    assert_true(rq.off == 1ull << 32);
    assert_true(rq.len == UINT32_MAX && rq.payload == 0);
    p[7] = NBD_CMD_WRITE;
    assert_int_equal(nbd_request_decode(p, &rq), 0);
    assert_true(rq.payload == UINT32_MAX);
    p[3] ^= 1;
    assert_int_equal(nbd_request_decode(p, &rq), -EPROTO);
}

static void extended_request_is_decoded(void **state)
{
    static const struct {
        unsigned cmd, flags;
        uint64_t payload;
    } t[] = {
        {NBD_CMD_READ, 0, 0},
        {NBD_CMD_WRITE, NBD_FLAG_PAYLOAD_LEN, 0x8000000000000002ull},
        {NBD_CMD_WRITE, NBD_FLAG_FUA, NBD_PAYLOAD_LOST},
        {NBD_CMD_BLOCK_STATUS, NBD_FLAG_PAYLOAD_LEN, 0x8000000000000002ull},
        {NBD_CMD_BLOCK_STATUS, NBD_FLAG_REQ_ONE, 0},
    };
    for (unsigned i = 0; i < sizeof t / sizeof *t; i++) {
        uint8_t p[NBD_EXT_REQUEST_LEN] = {
            0x21, 0xe4, 0x1c, 0x71, 0, t[i].flags, 0, t[i].cmd, 1,    2, 3, 4, 5, 6, 7, 8,
            0xff, 0,    0,    0,    0, 0,          0, 1,        0x80, 0, 0, 0, 0, 0, 0, 2};
        struct nbd_request rq;
        assert_int_equal(nbd_ext_request_decode(p, &rq), 0);
        assert_int_equal(rq.flags, t[i].flags);
        assert_int_equal(rq.cmd, t[i].cmd);
        assert_true(rq.cookie == 0x0102030405060708ull && rq.off == 0xff00000000000001ull);
        assert_true(rq.len == 0x8000000000000002ull && rq.payload == t[i].payload);
        p[0] ^= 1;
        assert_int_equal(nbd_ext_request_decode(p, &rq), -EPROTO);
    }
}

static void errno_goes_over_the_wire(void **state)
{
    static const int map[][2] = {
        {0, 0},        {EPERM, 1},       {EROFS, 1},       {EIO, 5},     {ENOMEM, 12},
        {EINVAL, 22},  {ENOSPC, 28},     {EFBIG, 28},      {EDQUOT, 28}, {EOVERFLOW, 75},
        {ENOTSUP, 95}, {EOPNOTSUPP, 95}, {ESHUTDOWN, 108}, {EACCES, 22}, {ETIMEDOUT, 22}};
    for (unsigned i = 0; i < sizeof map / sizeof *map; i++)
        assert_int_equal(nbd_errno(map[i][0]), map[i][1]);
}

static void contexts_match_queries(void **state)
{
    struct dirty_bitmap a = {.name = "b"}, b = {.name = "a:b c"};
    struct nbd_export e = {.allocation_depth = true};
    assert_int_equal(nbd_bitmaps_reserve(&e, 2), 0);
    nbd_bitmaps_add(&e, &a);
    nbd_bitmaps_add(&e, &b);
    /* Chosen contexts as bits: when listing, when setting. */
    static const struct {
        const char *query;
        unsigned list, set;
    } t[] = {
        {"base:", 1, 0},
        {"qemu:", 2 | 4 | 8, 0},
        {"qemu:dirty-bitmap:", 4 | 8, 0},
        {"base:allocation", 1, 1},
        {"qemu:allocation-depth", 2, 2},
        {"qemu:dirty-bitmap:b", 4, 4},
        {"qemu:dirty-bitmap:a:b c", 8, 8},
        {"qemu:dirty-bitmap:a", 0, 0},
        {"qemu:dirty", 0, 0},
        {"base:allocationx", 0, 0},
        {"base", 0, 0},
        {"", 0, 0},
        {"other:", 0, 0},
    };
    for (unsigned depth = 0; depth < 2; depth++) {
        e.allocation_depth = depth;
        for (unsigned i = 0; i < 2 * sizeof t / sizeof *t; i++) {
            bool list = i % 2;
            uint8_t chosen[4] = {0};
            unsigned want = list ? t[i / 2].list : t[i / 2].set, families = 0;
            nbd_context_match(&e, t[i / 2].query, strlen(t[i / 2].query), list ? &families : NULL,
                              chosen);
            nbd_context_families(&e, families, chosen);
            for (unsigned id = 0; id < 4; id++)
                assert_int_equal(chosen[id], want >> id & 1 && (id != 1 || depth));
        }
    }
    uint8_t all[4] = {0};
    nbd_context_all(&e, all);
    assert_memory_equal(all, "\1\1\1\1", 4);
    nbd_bitmaps_free(&e);
}

/* What a request is charged for before it runs. */
static void requests_have_a_cost(void **state)
{
    struct nbd_conn c = {.n_contexts = 3, .n_chosen = 1}, none = {0};
    struct nbd_request rq = {.cmd = NBD_CMD_BLOCK_STATUS, .len = UINT32_MAX};
    const uint64_t head = NBD_CHUNK_LEN + 4;
    assert_true(nbd_request_cost(&none, &rq) == 0);
    assert_true(nbd_request_cost(&c, &rq) == head + 8 * NBD_MAX_EXTENTS);
    c.n_chosen = 2;
    assert_true(nbd_request_cost(&c, &rq) == 2 * head + 8 * NBD_MAX_EXTENTS);
    c.n_chosen = 1000;
    assert_true(nbd_request_cost(&c, &rq) == 1000 * (head + 8 * 256));
    rq.flags = NBD_FLAG_REQ_ONE;
    assert_true(nbd_request_cost(&c, &rq) == 1000 * (head + 8));
    rq = (struct nbd_request){.cmd = NBD_CMD_BLOCK_STATUS, .len = 5};
    assert_true(nbd_request_cost(&c, &rq) == 1000 * (head + 8 * 5));
    c = (struct nbd_conn){.n_contexts = 3, .n_chosen = 2, .structured = true, .extended = true};
    rq = (struct nbd_request){.cmd = NBD_CMD_BLOCK_STATUS, .len = UINT64_MAX};
    const uint64_t wide = NBD_EXT_CHUNK_LEN + 8;
    assert_true(nbd_request_cost(&c, &rq) == 2 * wide + 16 * NBD_MAX_EXTENTS);
    rq.payload = rq.len = 12; /* the length asked for comes with the payload */
    assert_true(nbd_request_cost(&c, &rq) == 2 * wide + 16 * NBD_MAX_EXTENTS);
    c.extended = false;
    static const struct {
        unsigned cmd;
        uint64_t len, cost;
    } t[] = {
        {NBD_CMD_READ, 512, 512},
        {NBD_CMD_READ, NBD_MAX_PAYLOAD, NBD_MAX_PAYLOAD},
        {NBD_CMD_READ, NBD_MAX_PAYLOAD + 1, 0},
        {NBD_CMD_WRITE, 4096, 4096},
        {NBD_CMD_CACHE, MIB, MIB},
        {NBD_CMD_CACHE, UINT32_MAX, NBD_MAX_PAYLOAD},
        {NBD_CMD_CACHE, UINT64_MAX, NBD_MAX_PAYLOAD},
        {NBD_CMD_TRIM, NBD_MAX_PAYLOAD, 0},
        {NBD_CMD_WRITE_ZEROES, MIB, 0},
        {NBD_CMD_FLUSH, 0, 0},
        {99, MIB, 0},
    };
    for (unsigned i = 0; i < sizeof t / sizeof *t; i++) {
        rq = (struct nbd_request){.cmd = t[i].cmd, .len = t[i].len};
        assert_true(nbd_request_cost(&c, &rq) == t[i].cost);
        assert_true(nbd_request_bytes(&rq) == t[i].cost);
    }
    for (unsigned i = 0; i < 2; i++) { /* in pieces */
        rq =
            (struct nbd_request){.cmd = i ? NBD_CMD_TRIM : NBD_CMD_WRITE_ZEROES, .len = UINT64_MAX};
        assert_true(nbd_request_cost(&c, &rq) == NBD_LONG_COST && nbd_request_bytes(&rq) == 0);
    }
}

/* Which payloads are kept for the request; all others are read past. */
static void payloads_are_taken_or_not(void **state)
{
    struct nbd_conn c = {.n_contexts = 5, .n_chosen = 2}, none = {0};
    static const struct {
        unsigned cmd;
        uint64_t payload;
        bool with, without;
    } t[] = {
        {NBD_CMD_WRITE, 1, true, true},
        {NBD_CMD_WRITE, NBD_MAX_PAYLOAD, true, true},
        {NBD_CMD_WRITE, NBD_MAX_PAYLOAD + 1, false, false},
        {NBD_CMD_WRITE, NBD_PAYLOAD_LOST, false, false},
        {NBD_CMD_BLOCK_STATUS, 8, false, false},
        {NBD_CMD_BLOCK_STATUS, 11, false, false},
        {NBD_CMD_BLOCK_STATUS, 12, true, false},
        {NBD_CMD_BLOCK_STATUS, 16, true, false},
        {NBD_CMD_BLOCK_STATUS, 20, false, false},
        {NBD_CMD_BLOCK_STATUS, UINT64_MAX - 3, false, false},
        {NBD_CMD_READ, 12, false, false},
        {99, 12, false, false},
    };
    for (unsigned i = 0; i < sizeof t / sizeof *t; i++) {
        struct nbd_request rq = {.cmd = t[i].cmd, .len = t[i].payload, .payload = t[i].payload};
        assert_int_equal(nbd_request_takes_payload(&c, &rq), t[i].with);
        assert_int_equal(nbd_request_takes_payload(&none, &rq), t[i].without);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(request_is_decoded),       cmocka_unit_test(extended_request_is_decoded),
        cmocka_unit_test(errno_goes_over_the_wire), cmocka_unit_test(contexts_match_queries),
        cmocka_unit_test(requests_have_a_cost),     cmocka_unit_test(payloads_are_taken_or_not),
    };
    return cmocka_run_group_tests_name("proto", tests, NULL, NULL);
}
