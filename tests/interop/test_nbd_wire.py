# SPDX-License-Identifier: Apache-2.0
"""The three forms of the NBD protocol (simple replies, structured replies, extended headers), spoken by
a client of our own: every command and every error over all three, then what only extended headers have."""
import errno
import os
import struct
import time

import pytest

from backup_tools import content, fill, refused, until
from harness import Daemon, GiB, KiB, MiB, QmpError, TiB
from nbd_raw import (ACK, CACHE, DF, ERR_EXT_HEADER_REQD, ERR_INVALID, EXT_REQUEST, FAST_ZERO, FLUSH, FUA, INFO, MODES,
                     NO_HOLE, OPT_EXPORT_NAME, OPT_EXTENDED, OPT_GO, OPT_INFO, OPT_SET_META, OPT_STRUCTURED,
                     PAYLOAD_LEN, READ, REQ_ONE, STATUS, TRIM, WRITE, ZERO, Raw, ext_request, meta, option, request,
                     string)

SIZE = 64 * MiB
MAX = (1 << 64) - 1
ALLOCATION, DEPTH, DIRTY = 'base:allocation', 'qemu:allocation-depth', 'qemu:dirty-bitmap:b'
BLOCK_STAT_PAYLOAD = 1 << 12


@pytest.fixture
def d():
    """Data in [0, 1M) and [4M, 4M+64K), else holes; bitmap b."""
    with Daemon() as daemon:
        path = daemon.add_disk('disk', SIZE, discard='unmap')
        fill(path, MiB)
        fill(path, 64 * KiB, offset=4 * MiB)
        daemon.cmd('block-dirty-bitmap-add', node='disk', name='b')
        daemon.export('disk', **{'bitmaps': ['b'], 'allocation-depth': True})
        yield daemon


def client(d, mode='extended', name='disk', contexts=()):
    c = Raw(d.nbd_path)
    assert c.go(name, mode=mode, contexts=contexts)[-1][0] == ACK
    return c


def assert_works(c, d):
    with open(d.path('disk.raw'), 'rb') as f:
        assert c.request(READ, 0, 512).data == f.read(512)


# ---------------------------------------------------------------- all commands, all errors, all forms

@pytest.mark.parametrize('mode', MODES)
def test_every_command(d, mode):
    c = client(d, mode, contexts=() if mode == 'simple' else [ALLOCATION])
    path = d.path('disk.raw')
    before = content(path)
    assert c.size == SIZE
    assert c.request(READ, 1, 100_000).data == before[1:100_001]
    assert c.request(READ, 512 * KiB, 4 * MiB).data == before[512 * KiB:4 * MiB + 512 * KiB]
    for size in (1, 512, 64 * KiB + 1, 300_000, 32 * MiB):
        data = os.urandom(size)
        assert c.request(WRITE, 5 * MiB + 3, size, payload=data).error == 0
        r = c.request(READ, 5 * MiB + 3, size)
        assert r.error == 0 and r.data == data
    assert c.request(WRITE, 0, 512, FUA, payload=b'f' * 512).error == 0
    assert content(path)[:512] == b'f' * 512
    assert c.request(FLUSH).error == 0
    assert c.request(TRIM, 0, 128 * KiB).error == 0
    assert c.request(ZERO, 128 * KiB, 128 * KiB, NO_HOLE | FUA).error == 0
    assert c.request(READ, 0, 256 * KiB).data == bytes(256 * KiB)
    assert c.request(CACHE, 0, SIZE).error == 0
    assert c.request(READ, 0, 0).data == b''
    assert c.request(WRITE, 0, 0).error == 0
    if mode != 'simple':
        assert c.request(STATUS, 0, 64 * KiB, REQ_ONE).extents == {ALLOCATION: [(64 * KiB, 3)]}
        assert c.request(READ, 0, 256 * KiB, DF).holes == []
        assert c.request(READ, 40 * MiB, 256 * KiB).holes == [(40 * MiB, 256 * KiB)]


@pytest.mark.parametrize('mode', MODES)
def test_every_error(d, mode):
    """Each leaves the connection as it was; structured and extended replies have a sentence with it."""
    d.cmd('blockdev-add', {'driver': 'blkdebug', 'node-name': 'bad', 'image': 'disk', 'inject-error': [
        {'event': 'none', 'iotype': 'read', 'errno': 5, 'sector': 8, 'once': False},
        {'event': 'none', 'iotype': 'write', 'errno': 28, 'sector': 8, 'once': False}]})
    d.export('bad')
    d.export('disk', 'ro', writable=False)
    contexts = () if mode == 'simple' else [ALLOCATION]
    c = client(d, mode, contexts=contexts)

    def fails(c, code, cmd, offset, length, flags=0, payload=b''):
        r = c.request(cmd, offset, length, flags, payload)
        assert r.error == code and r.data == b'', (cmd, offset, length, flags, r.error)
        assert mode == 'simple' or len(r.text) > 10 and r.text.isprintable()
        assert_works(c, d)
    for cmd in (READ, TRIM, CACHE):
        fails(c, errno.EINVAL, cmd, SIZE, 1)
        fails(c, errno.EINVAL, cmd, SIZE - 1, 2)
        fails(c, errno.EINVAL, cmd, MAX, 1)
        fails(c, errno.EINVAL, cmd, 1 << 63, 512)
    fails(c, errno.ENOSPC, ZERO, SIZE - 1, 2)
    fails(c, errno.ENOSPC, WRITE, SIZE - 1, 2, payload=b'xx')
    fails(c, errno.EINVAL, READ, 0, 32 * MiB + 1)
    fails(c, errno.EINVAL, 8, 0, 0)
    fails(c, errno.EINVAL, 65535, 0, 0)
    for cmd, bad in ((READ, NO_HOLE), (READ, 1 << 15), (WRITE, DF), (FLUSH, REQ_ONE), (TRIM, NO_HOLE), (ZERO, DF),
                     (CACHE, FAST_ZERO), (STATUS, DF)):
        fails(c, errno.EINVAL, cmd, 0, 512, bad, bytes(512) if cmd == WRITE else b'')
    fails(c, errno.EINVAL, STATUS, SIZE, 1)
    fails(c, errno.EINVAL, STATUS, 0, 0)
    if mode == 'simple':
        fails(c, errno.EINVAL, READ, 0, 512, DF)
        fails(c, errno.EINVAL, READ, 0, 512, PAYLOAD_LEN)
    fails(client(d, mode), errno.EINVAL, STATUS, 0, 512)  # no context was negotiated
    ro = client(d, mode, 'ro')
    for cmd in (WRITE, TRIM, ZERO):
        fails(ro, errno.EPERM, cmd, 0, 512, payload=bytes(512) if cmd == WRITE else b'')
    bad = client(d, mode, 'bad')
    fails(bad, errno.EIO, READ, 4096, 512)
    fails(bad, errno.ENOSPC, WRITE, 4096, 512, payload=bytes(512))


@pytest.mark.parametrize('mode', MODES)
def test_a_payload_over_32_mib_ends_the_connection_only(d, mode):
    """8.3, payload over 32 MiB: EINVAL, then the end; nobody else minds."""
    c, other = client(d, mode), client(d, mode)
    if mode == 'extended':
        c.send(ext_request(WRITE, 0, 32 * MiB + 1, PAYLOAD_LEN))
    else:
        c.send(request(WRITE, 0, 32 * MiB + 1))
    assert c.reply().error == errno.EINVAL
    assert c.at_end()
    assert_works(other, d)


@pytest.mark.parametrize('mode', MODES)
def test_requests_in_flight_are_told_apart(d, mode):
    c = client(d, mode)
    data = content(d.path('disk.raw'))
    asked = {c.ask(READ, i * 4096, 4096): i for i in range(200)}
    for _ in range(len(asked)):
        r = c.reply()
        i = asked.pop(r.cookie)
        assert r.data == data[i * 4096:(i + 1) * 4096]
    assert not asked


# ---------------------------------------------------------------- negotiating extended headers

def info_flags(replies):
    return next(struct.unpack('>QH', d[2:])[1] for k, d in replies if k == INFO and d[:2] == b'\0\0')


def test_order_of_structured_and_extended(d):
    """8.3, handshake: EXTENDED_HEADERS includes structured replies and takes precedence over them."""
    c = Raw(d.nbd_path)
    assert c.option(OPT_EXTENDED, b'x')[-1][0] == ERR_INVALID
    assert c.option(OPT_EXTENDED) == [(ACK, b'')]
    assert c.option(OPT_EXTENDED)[-1][0] == ERR_INVALID
    assert c.option(OPT_STRUCTURED)[-1][0] == ERR_EXT_HEADER_REQD
    assert c.option(OPT_SET_META, meta('disk', [ALLOCATION]))[-1][0] == ACK
    assert c.option(OPT_GO, string('disk') + b'\0\0')[-1][0] == ACK
    c.mode = 'extended'
    assert_works(c, d)
    c = Raw(d.nbd_path)
    assert c.option(OPT_STRUCTURED) == [(ACK, b'')]
    assert c.go('disk', mode='extended')[-1][0] == ACK
    assert_works(c, d)
    c = Raw(d.nbd_path)
    assert c.option(OPT_SET_META, meta('disk', [ALLOCATION]))[-1][0] == ERR_INVALID  # neither is on


def test_the_flag_for_filters_is_told_where_it_holds(d):
    c = Raw(d.nbd_path)
    assert not info_flags(c.go('disk', mode='structured', opt=OPT_INFO)) & BLOCK_STAT_PAYLOAD
    assert c.option(OPT_EXTENDED) == [(ACK, b'')]
    assert info_flags(c.option(OPT_INFO, string('disk') + b'\0\0')) & BLOCK_STAT_PAYLOAD
    assert not info_flags(c.option(OPT_GO, string('disk') + b'\0\0')) & BLOCK_STAT_PAYLOAD  # no contexts
    assert client(d, contexts=[ALLOCATION]).flags & BLOCK_STAT_PAYLOAD
    assert not client(d, 'structured', contexts=[ALLOCATION]).flags & BLOCK_STAT_PAYLOAD
    assert client(d).flags & 1 << 7  # DF


def test_the_old_option_does_not_go_with_extended_headers(d):
    c = Raw(d.nbd_path)
    assert c.option(OPT_EXTENDED) == [(ACK, b'')]
    c.send(option(OPT_EXPORT_NAME, b'disk'))
    assert c.at_end()


def test_a_compact_request_after_extended_headers_ends_the_connection(d):
    for mode, wrong in (('extended', request(READ, 0, 512) + bytes(4)), ('structured', ext_request(READ, 0, 512))):
        c = client(d, mode)
        c.send(wrong)
        assert c.at_end()


# ---------------------------------------------------------------- payloads

def test_unwanted_payloads_are_read_past(d):
    """EINVAL, and the next request is understood, up to 32 MiB; beyond that the end."""
    c = client(d, contexts=[ALLOCATION])
    for cmd in (READ, FLUSH, TRIM, CACHE, ZERO, STATUS, 99):
        for n in (1, 512, 70_000, 3 * MiB):
            c.send(ext_request(cmd, 0, n, PAYLOAD_LEN, n) + b'\x21\xe4\x1c\x71' * (n // 4) + b'!' * (n % 4))
            r = c.reply()
            assert (r.error, r.cookie) == (errno.EINVAL, n)
            assert 'payload' in r.text or cmd == 99
    c.send(ext_request(TRIM, 0, 32 * MiB, PAYLOAD_LEN) + bytes(32 * MiB))
    assert c.reply().error == errno.EINVAL
    assert_works(c, d)
    for n in (32 * MiB + 1, 1 << 32, MAX):
        c = client(d)
        c.send(ext_request(TRIM, 0, n, PAYLOAD_LEN))
        assert c.reply().error == errno.EINVAL
        assert c.at_end()


def test_a_write_without_the_flag_ends_the_connection(d):
    """Whether its data follows cannot be known: nothing is written, nothing is taken for a request."""
    before = content(d.path('disk.raw'))
    c = client(d)
    c.send(ext_request(WRITE, 0, 32) + ext_request(ZERO, 0, MiB))
    r = c.reply()
    assert r.error == errno.EINVAL and 'PAYLOAD_LEN' in r.text
    assert c.at_end()
    assert content(d.path('disk.raw')) == before


def test_block_status_of_some_contexts(d):
    c = client(d, contexts=[ALLOCATION, DEPTH, DIRTY])
    ids = {name: i for i, name in c.contexts.items()}
    every = c.request(STATUS, 0, SIZE).extents
    assert set(every) == {ALLOCATION, DEPTH, DIRTY}
    for names in ([DIRTY], [ALLOCATION, DIRTY], [DIRTY, ALLOCATION], [ALLOCATION, DEPTH, DIRTY]):
        r = c.request(STATUS, 0, SIZE, ids=[ids[n] for n in names])
        assert r.extents == {n: every[n] for n in names}
        assert [flags for _, flags, _ in r.chunks] == [0] * (len(names) - 1) + [1]
    assert c.request(STATUS, MiB, 5, REQ_ONE, ids=[ids[ALLOCATION]]).extents == {ALLOCATION: [(5, 3)]}
    for bad in ([], [99], [ids[DIRTY], ids[DIRTY]], [0xffffffff], [0, 1, 2, 2]):
        r = c.request(STATUS, 0, SIZE, ids=bad)
        assert r.error == errno.EINVAL and 'payload' in r.text
    assert c.request(STATUS, 0, SIZE + 1, ids=[0]).error == errno.EINVAL
    assert c.request(STATUS, 1 << 63, 1 << 63, ids=[0]).error == errno.EINVAL
    assert c.request(STATUS, 0, 0, ids=[0]).error == errno.EINVAL
    c.send(ext_request(STATUS, 0, 11, PAYLOAD_LEN) + bytes(11))  # not a list of ids
    assert c.reply().error == errno.EINVAL
    one = client(d, contexts=[ALLOCATION])
    assert one.request(STATUS, 0, SIZE, ids=[ids[DIRTY]]).error == errno.EINVAL  # not negotiated
    assert_works(c, d)


# ---------------------------------------------------------------- 64 bits

def test_offsets_and_lengths_of_64_bits(d):
    values = [0, 1, SIZE - 1, SIZE, SIZE + 1, (1 << 32) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, MAX - 511, MAX]
    c = client(d, contexts=[ALLOCATION])
    for cmd in (READ, TRIM, CACHE, ZERO, STATUS):
        for offset in values:
            for length in values:
                if offset + length <= SIZE and (cmd == READ or length == 0):
                    continue
                r = c.request(cmd, offset, length)
                assert bool(r.error) != (offset + length <= SIZE), (cmd, offset, length, r.error)
    for offset in values:
        assert bool(c.request(WRITE, offset, 512, payload=bytes(512)).error) == (offset + 512 > SIZE)


@pytest.fixture
def huge():
    """16 TiB with data at both ends and in the middle, where the file system holds that; else 3 TiB."""
    with Daemon() as daemon:
        size = 16 * TiB - 64 * MiB
        try:
            daemon.add_disk('huge', size, discard='unmap')
        except OSError:
            size = 3 * TiB
            daemon.add_disk('huge', size, discard='unmap')
        daemon.size = size
        for offset in (0, size // 2, size - 64 * KiB):
            fill(daemon.path('huge.raw'), 64 * KiB, offset=offset)
        daemon.cmd('block-dirty-bitmap-add', node='huge', name='b', granularity=64 * KiB)
        daemon.export('huge', **{'bitmaps': ['b'], 'allocation-depth': True})
        yield daemon


def test_a_whole_huge_disk_in_one_request(huge):
    size = huge.size
    c = client(huge, name='huge', contexts=[ALLOCATION, DEPTH, DIRTY])
    assert c.request(CACHE, 0, size).error == 0
    r = c.request(STATUS, 0, size)
    gap = size // 2 - 64 * KiB
    assert r.extents == {ALLOCATION: [(64 * KiB, 0), (gap, 3), (64 * KiB, 0), (gap - 64 * KiB, 3), (64 * KiB, 0)],
                         DEPTH: [(size, 1)], DIRTY: [(size, 0)]}
    assert c.request(TRIM, 64 * KiB, 8 * GiB).error == 0
    assert c.request(ZERO, size // 2 - 8 * GiB, 16 * GiB + 5, FUA).error == 0
    r = c.request(STATUS, 0, size)
    assert r.extents[ALLOCATION] == [(64 * KiB, 0), (size - 128 * KiB, 3), (64 * KiB, 0)]
    assert [f for _, f in r.extents[DIRTY]] == [0, 1, 0, 1, 0]
    assert r.extents[DIRTY][3] == (16 * GiB + 64 * KiB, 1)


def test_a_thousand_dirty_runs_in_one_request(huge):
    """And the same by 4097 requests with lengths of 32 bits."""
    runs = [i * (huge.size // 1000) // (64 * KiB) * 64 * KiB for i in range(1000)]
    c = client(huge, name='huge')
    for offset in runs:
        c.ask(ZERO, offset + 100, 5)
    for _ in runs:
        assert c.reply().error == 0
    c = client(huge, name='huge', contexts=[DIRTY])
    rows = c.request(STATUS, 0, huge.size).extents[DIRTY]
    assert len(rows) == 2000 and sum(n for n, _ in rows) == huge.size
    edges = [sum(n for n, _ in rows[:i]) for i in range(0, 2000, 2)]
    assert edges == runs and all(rows[i][0] == 64 * KiB for i in range(0, 2000, 2))
    c = client(huge, 'structured', 'huge', [DIRTY])
    step, narrow = (1 << 32) - 64 * KiB, []
    starts = range(0, huge.size, step)
    for i in range(0, len(starts), 256):
        part = {c.ask(STATUS, o, min(step, huge.size - o)): o for o in starts[i:i + 256]}
        replies = {r.cookie: r.extents[DIRTY] for r in (c.reply() for _ in part)}
        for cookie in part:
            for n, flags in replies[cookie]:
                if narrow and narrow[-1][1] == flags:
                    n += narrow.pop()[0]
                narrow.append((n, flags))
    assert narrow == rows


def deleted(d, export):
    try:
        d.cmd('block-export-del', id=export)
        return True
    except QmpError:
        return False


def test_a_long_request_lets_others_in(huge):
    """Zeroing 10^18 bytes: another client is served, a transaction goes through, and leaving ends it."""
    huge.cmd('blockdev-add', {'driver': 'null-co', 'node-name': 'null', 'size': 1 << 60, 'read-zeroes': True})
    huge.export('null')
    huge.cmd('blockdev-add', {'driver': 'null-co', 'node-name': 'slow', 'size': 1 << 60, 'latency-ns': 100_000})
    huge.export('slow')
    for name in ('null', 'slow'):
        c = client(huge, name=name)
        c.ask(ZERO, 0, 1 << 60)
        c.ask(TRIM, 0, 1 << 60)
        crowd = client(huge, name=name)
        crowd.send(ext_request(TRIM, 0, 1 << 60) * 1000)  # many are no worse
        other = client(huge, name=name)
        for _ in range(100):
            assert other.request(READ, 0, 4096).error == 0
        assert c.request(READ, 0, 4096).cookie == 7  # on the same connection too
        begin = time.monotonic()
        huge.cmd('block-dirty-bitmap-add', node=name, name='b')  # waits for a quiesced node
        huge.cmd('transaction', actions=[
            {'type': 'block-dirty-bitmap-clear', 'data': {'node': name, 'name': 'b'}}] * 3)
        assert time.monotonic() - begin < 15
        with refused('in use'):
            huge.cmd('block-export-del', id='exp-' + name)
        huge.cmd('block-export-del', id='exp-' + name, mode='hard')
        huge.qmp.event('BLOCK_EXPORT_DELETED', id='exp-' + name)
        huge.cmd('blockdev-del', {'node-name': name})
    for how in ('gone', 'goodbye'):
        huge.cmd('blockdev-add', {'driver': 'null-co', 'node-name': how, 'size': 1 << 60})
        huge.export(how)
        c = client(huge, name=how)
        c.ask(ZERO, 0, 1 << 60)
        if how == 'goodbye':
            c.send(ext_request(2))
            huge.cmd('block-export-del', id='exp-' + how, mode='hard')
        c.close()
        if how == 'gone':
            until('the client is found gone, its request with it', lambda: deleted(huge, 'exp-' + how))
        huge.qmp.event('BLOCK_EXPORT_DELETED', id='exp-' + how)
