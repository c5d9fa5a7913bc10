# SPDX-License-Identifier: Apache-2.0
"""Every row of the table of what qemu-storage-daemon's NBD server offers ("NBD protocol surface"). Each
test begins with the name of its row; two rows have tests of their own: size in test_nbd_sizes.py, payload
over 32 MiB in test_nbd_wire.py."""
import contextlib
import errno
import os
import socket
import struct
import tempfile

import pytest

from backup_tools import content, fill, refused
from harness import Daemon, GiB, KiB, MiB, TiB, on_free_port
from nbd_raw import (ACK, CACHE, ERR_INVALID, ERR_POLICY, ERR_TOO_BIG, ERR_UNKNOWN, ERR_UNSUP, FAST_ZERO, FLUSH, FUA,
                     INFO, META, MODES, NO_HOLE, OPT_ABORT, OPT_EXPORT_NAME, OPT_EXTENDED, OPT_GO, OPT_INFO, OPT_LIST,
                     OPT_LIST_META, OPT_SET_META, OPT_STARTTLS, OPT_STRUCTURED, READ, REQ_ONE, SERVER, STATUS, TRIM,
                     WRITE, ZERO, Raw, ext_request, meta, option, request, string)

SIZE = 8 * MiB
ALLOCATION, DEPTH, BITMAP = 'base:allocation', 'qemu:allocation-depth', 'qemu:dirty-bitmap:'
HOLE_AND_ZERO = 3


@pytest.fixture
def d():
    with Daemon() as daemon:
        yield daemon


def disk(d, **options):
    """Data in [1M, 2M)."""
    fill(d.add_disk('disk', SIZE, discard='unmap'), MiB, offset=MiB)
    return d.export('disk', **options)


def client(d, name='disk', mode='extended', contexts=()):
    c = Raw(d.nbd_path)
    assert c.go(name, mode=mode, contexts=contexts)[-1][0] == ACK
    return c


def kinds(replies):
    return [k for k, _ in replies]


def names(replies):
    return [data[4:].decode() for kind, data in replies if kind == META]


# ---------------------------------------------------------------- handshake

def test_handshake(d):
    """handshake: fixed newstyle, NO_ZEROES, and each option."""
    disk(d, description='text')
    c = Raw(d.nbd_path)
    assert c.server_flags == 3
    assert c.option(OPT_LIST) == [(SERVER, string('disk') + b'text'), (ACK, b'')]
    assert kinds(c.option(OPT_STARTTLS)) == [ERR_POLICY]
    assert kinds(c.option(4711, b'data')) == [ERR_UNSUP]
    assert kinds(c.option(4)) == [ERR_UNSUP]
    assert kinds(c.option(OPT_INFO, string('disk') + b'\0\0')) == [INFO, INFO, INFO, ACK]
    assert kinds(c.option(OPT_INFO, string('disk') + struct.pack('>HHH', 2, 1, 99))) == [INFO, INFO, INFO, INFO, ACK]
    assert kinds(c.option(OPT_INFO, string('none') + b'\0\0')) == [ERR_UNKNOWN]
    assert kinds(c.option(OPT_SET_META, meta('disk', [ALLOCATION]))) == [ERR_INVALID]  # only after structured replies
    assert c.option(OPT_STRUCTURED) == [(ACK, b'')]
    assert kinds(c.option(OPT_LIST_META, meta('disk', []))) == [META, ACK]
    assert kinds(c.option(OPT_LIST_META, meta('none', []))) == [ERR_UNKNOWN]
    assert kinds(c.option(OPT_SET_META, meta('disk', [ALLOCATION]))) == [META, ACK]
    assert c.option(OPT_EXTENDED) == [(ACK, b'')]
    for opt in (OPT_ABORT, OPT_LIST, OPT_STARTTLS, OPT_STRUCTURED, OPT_EXTENDED):
        assert kinds(c.option(opt, b'x')) == [ERR_INVALID]  # they take no data
    assert c.option(OPT_ABORT) == [(ACK, b'')]
    assert c.at_end()
    for flags, zeroes in ((3, 0), (1, 124)):
        c = Raw(d.nbd_path, flags)
        c.send(option(OPT_EXPORT_NAME, b'disk'))
        assert struct.unpack('>Q', c.take(8))[0] == SIZE and c.take(2 + zeroes)[2:] == bytes(zeroes)
    c = Raw(d.nbd_path, 4)  # flags that nobody knows
    assert c.at_end()


def test_contexts_are_of_one_export(d):
    """handshake: contexts chosen for another export do not count after GO."""
    disk(d)
    d.export('disk', 'second')
    c = Raw(d.nbd_path)
    assert c.option(OPT_EXTENDED) == [(ACK, b'')]
    assert c.set_contexts('second', [ALLOCATION])
    assert c.option(OPT_GO, string('disk') + b'\0\0')[-1][0] == ACK
    c.mode = 'extended'
    assert c.request(STATUS, 0, SIZE).error == errno.EINVAL
    c = Raw(d.nbd_path)
    assert c.option(OPT_EXTENDED) == [(ACK, b'')]
    assert c.set_contexts('disk', [ALLOCATION])
    assert c.set_contexts('disk', ['nothing:like-this']) == {}  # each SET starts afresh
    assert c.option(OPT_GO, string('disk') + b'\0\0')[-1][0] == ACK
    c.mode = 'extended'
    assert c.request(STATUS, 0, SIZE).error == errno.EINVAL


def block_sizes(c, name, opt, asked):
    replies = c.option(opt, string(name) + (struct.pack('>HH', 1, 3) if asked else b'\0\0'))
    return next(struct.unpack('>III', data[2:]) for kind, data in replies if kind == INFO and data[:2] == b'\0\3')


def test_block_size_info(d):
    """block size info: 1 (not the alignment, which would make clients write back what others have changed),
    4096 or the alignment, 32 MiB."""
    disk(d)
    d.cmd('blockdev-add', {'driver': 'file', 'node-name': 'direct', 'filename': d.path('disk.raw'), 'read-only': True,
                           'cache': {'direct': True}, 'force-share': True, 'locking': 'off'})
    d.export('direct', writable=False)
    d.cmd('blockdev-add', {'driver': 'blkdebug', 'node-name': 'coarse', 'image': 'disk', 'align': 16384})
    d.export('coarse')
    for name, preferred in (('disk', 4096), ('direct', 4096), ('coarse', 16384)):
        for opt, asked in ((OPT_INFO, True), (OPT_INFO, False), (OPT_GO, False), (OPT_GO, True)):
            c = Raw(d.nbd_path)
            assert block_sizes(c, name, opt, asked) == (1, preferred, 32 * MiB)
        assert c.request(READ, MiB + 1, 1).data == content(d.path('disk.raw'))[MiB + 1:MiB + 2]
    assert c.request(WRITE, 3, 2, payload=b'xy').error == 0
    assert content(d.path('disk.raw'))[:8] == b'\0\0\0xy\0\0\0'


def test_flags(d):
    """flags."""
    flush_fua_cache, df, multi = 1 | 1 << 2 | 1 << 3 | 1 << 10, 1 << 7, 1 << 8
    writing = 1 << 5 | 1 << 6 | 1 << 11
    disk(d)
    d.export('disk', 'ro', writable=False)
    assert client(d, mode='simple').flags == flush_fua_cache | multi | writing
    assert client(d, mode='structured').flags == flush_fua_cache | multi | writing | df
    assert client(d, mode='extended').flags == flush_fua_cache | multi | writing | df
    assert client(d, 'ro', 'structured').flags == flush_fua_cache | multi | df | 2
    d.cmd('nbd-server-stop')
    d.cmd('nbd-server-start', {'addr': {'type': 'unix', 'data': {'path': d.nbd_path}}, 'max-connections': 1})
    d.export('disk', 'alone')
    assert not client(d, 'alone').flags & multi


def test_in_flight(d):
    """in flight: not 16 but 1024 requests of one client run at once; it may send more, which wait."""
    d.cmd('blockdev-add', {'driver': 'null-co', 'node-name': 'disk', 'size': SIZE, 'latency-ns': 200_000_000})
    d.export('disk')
    c = client(d)
    begin = os.times().elapsed
    cookies = {c.ask(FLUSH, cookie=i) for i in range(1500)}
    assert {c.reply().cookie for _ in range(1500)} == cookies
    assert os.times().elapsed - begin < 1500 / 16 * 0.2 / 1.5


# ---------------------------------------------------------------- contexts

def marked(d, *bitmaps, writes=()):
    fill(d.add_disk('disk', SIZE, discard='unmap'), MiB, offset=MiB)
    for b in bitmaps:
        d.cmd('block-dirty-bitmap-add', node='disk', name=b, granularity=64 * KiB)
    d.export('disk', **{'bitmaps': list(bitmaps), 'allocation-depth': True})
    c = client(d)
    for offset, size in writes:
        assert c.request(WRITE, offset, size, payload=b'w' * size).error == 0


def test_contexts(d):
    """contexts: base:allocation is 0, allocation-depth 1, the bitmaps 2 and on, whichever are chosen."""
    marked(d, 'a', 'b:c d')
    every = {0: ALLOCATION, 1: DEPTH, 2: BITMAP + 'a', 3: BITMAP + 'b:c d'}
    for chosen in (list(every), [3], [1, 2], [0]):
        assert client(d, contexts=[every[i] for i in chosen]).contexts == {i: every[i] for i in chosen}
    d.export('disk', 'plain')
    c = Raw(d.nbd_path)
    assert names(c.option(OPT_LIST_META, meta('plain', []))) == [ALLOCATION]
    assert c.option(OPT_STRUCTURED) and c.set_contexts('plain', [DEPTH, BITMAP + 'a']) == {}


def test_list_meta_queries(d):
    """LIST_META queries: none are all, families by their prefix; SET takes exact names only."""
    marked(d, 'a', 'b')
    a, b = BITMAP + 'a', BITMAP + 'b'
    for queries, want in (([], [ALLOCATION, DEPTH, a, b]), (['base:'], [ALLOCATION]), (['qemu:'], [DEPTH, a, b]),
                          ([BITMAP], [a, b]), ([a], [a]), ([a, 'base:'], [ALLOCATION, a]), ([b, BITMAP, b], [a, b]),
                          (['qemu:dirty-bitmap'], []), (['qemu:allocation'], []), (['x:'], []), ([''], []), (['base'], []),
                          (['base:allocation\0'], [])):
        c = Raw(d.nbd_path)
        assert names(c.option(OPT_LIST_META, meta('disk', queries))) == want, queries
        assert c.option(OPT_STRUCTURED) == [(ACK, b'')]
        exact = [n for n in (ALLOCATION, DEPTH, a, b) if n in queries]
        assert list(c.set_contexts('disk', queries).values()) == exact
    for queries in (['x' * 4096], ['x' * 5000], ['x'] * 1000):
        assert names(Raw(d.nbd_path).option(OPT_LIST_META, meta('disk', queries))) == []
    assert kinds(Raw(d.nbd_path).option(OPT_LIST_META, meta('disk', ['x'] * 1100))) == [ERR_INVALID]


def test_allocation_flags(d):
    """base:allocation flags: HOLE and ZERO where nothing is, neither where data is."""
    disk(d)
    c = client(d, contexts=[ALLOCATION])
    assert c.request(STATUS, 0, SIZE).extents[ALLOCATION] == [
        (MiB, HOLE_AND_ZERO), (MiB, 0), (6 * MiB, HOLE_AND_ZERO)]
    assert c.request(TRIM, MiB, 64 * KiB).error == 0
    assert c.request(STATUS, MiB, MiB).extents[ALLOCATION] == [(64 * KiB, HOLE_AND_ZERO), (MiB - 64 * KiB, 0)]


def test_dirty_bitmap_flag(d):
    """dirty-bitmap flag: DIRTY in whole granules, also at odd places; changes show at once."""
    marked(d, 'a', writes=[(3 * MiB + 5, 1), (5 * MiB, 64 * KiB)])
    c = client(d, contexts=[BITMAP + 'a'])
    rows = [(3 * MiB, 0), (64 * KiB, 1), (2 * MiB - 64 * KiB, 0), (64 * KiB, 1), (3 * MiB - 64 * KiB, 0)]
    assert c.request(STATUS, 0, SIZE).extents[BITMAP + 'a'] == rows
    assert c.request(STATUS, 3 * MiB + 7, 9).extents[BITMAP + 'a'] == [(9, 1)]
    assert c.request(WRITE, 0, 1, payload=b'x').error == 0
    assert c.request(STATUS, 0, SIZE, REQ_ONE).extents[BITMAP + 'a'] == [(64 * KiB, 1)]


def test_allocation_depth(d):
    """allocation-depth: a disk without others below is layer 1, its holes too."""
    marked(d)
    c = client(d, contexts=[DEPTH])
    assert c.request(STATUS, 0, SIZE).extents[DEPTH] == [(SIZE, 1)]
    assert c.request(STATUS, 0, SIZE, REQ_ONE).extents[DEPTH] == [(SIZE, 1)]


@pytest.mark.parametrize('mode', MODES[1:])
def test_extents(d, mode):
    """extents: at most 131072 in a reply, one with REQ_ONE, none past the request; what is cut goes on."""
    size = 256 * MiB
    d.cmd('blockdev-add', {'driver': 'null-co', 'node-name': 'disk', 'size': size, 'read-zeroes': True})
    d.cmd('block-dirty-bitmap-add', node='disk', name='b', granularity=512)
    d.export('disk', bitmaps=['b'])
    c = client(d, mode=mode, contexts=[BITMAP + 'b', ALLOCATION])
    make = ext_request if mode == 'extended' else request
    for start in range(0, 40 * MiB, MiB):
        c.send(b''.join(make(ZERO, start + off, 512) for off in range(0, MiB, 2048)))
        for _ in range(MiB // 2048):
            assert c.reply().error == 0
    rows, offset, replies = [], 0, 0
    while offset < size:
        part = c.request(STATUS, offset, size - offset).extents
        assert 1 < len(part[BITMAP + 'b']) <= 131072 // 2 and part[ALLOCATION] == [(size - offset, HOLE_AND_ZERO)]
        rows += part[BITMAP + 'b']
        offset += sum(n for n, _ in part[BITMAP + 'b'])
        replies += 1
    assert offset == size and replies > 1
    assert rows == [(512, 1), (1536, 0)] * (20 * KiB - 1) + [(512, 1), (size - 40 * MiB + 1536, 0)]
    assert c.request(STATUS, 1000, 100_000, REQ_ONE).extents == {BITMAP + 'b': [(1048, 0)], ALLOCATION: [(100_000, 3)]}


# ---------------------------------------------------------------- errors and limits

@pytest.mark.parametrize('mode', MODES)
def test_errors_on_wire(d, mode):
    """errors on wire: what has a number there keeps it, everything else becomes EINVAL."""
    wire = {errno.EPERM: 1, errno.EROFS: 1, errno.EIO: 5, errno.ENOMEM: 12, errno.EINVAL: 22, errno.ENOSPC: 28,
            errno.EFBIG: 28, errno.EOVERFLOW: 75, errno.EOPNOTSUPP: 95, errno.ESHUTDOWN: 108, errno.EACCES: 22,
            errno.ETIMEDOUT: 22}
    disk(d)
    for code, number in wire.items():
        name = f'bad{code}'
        d.cmd('blockdev-add', {'driver': 'blkdebug', 'node-name': name, 'image': 'disk', 'inject-error': [
            {'event': 'none', 'iotype': 'read', 'errno': code, 'once': False}]})
        d.export(name)
        r = client(d, name, mode).request(READ, 0, 512)
        assert r.error == number and (mode == 'simple' or r.text)
        d.cmd('block-export-del', id='exp-' + name, mode='hard')
        d.qmp.event('BLOCK_EXPORT_DELETED', id='exp-' + name)
        d.cmd('blockdev-del', {'node-name': name})


def test_name_limits(d):
    """name limits: 4096 bytes of export name, description and context name; an option of 256 KiB."""
    disk(d)
    long = 'n' * 4096
    for member in ('name', 'description'):
        with refused('4096'):
            d.cmd('block-export-add', {'type': 'nbd', 'id': 'e', 'node-name': 'disk', member: long + 'x'})
    d.cmd('block-export-add', {'type': 'nbd', 'id': 'e', 'node-name': 'disk', 'name': long, 'description': long})
    c = Raw(d.nbd_path)
    assert c.option(OPT_LIST)[1] == (SERVER, string(long) + long.encode())
    assert kinds(c.option(OPT_INFO, string(long + 'x') + b'\0\0')) == [ERR_INVALID]
    assert kinds(c.option(OPT_LIST_META, meta(long + 'x', []))) == [ERR_INVALID]
    assert kinds(c.option(OPT_LIST_META, meta(long, ['base:']))) == [META, ACK]
    assert kinds(c.option(OPT_INFO, bytes(256 * KiB + 1))) == [ERR_TOO_BIG]
    assert c.go(long)[-1][0] == ACK
    c = Raw(d.nbd_path)
    c.send(option(OPT_EXPORT_NAME, long.encode() + b'x'))
    assert c.at_end()


# ---------------------------------------------------------------- zeroes

@contextlib.contextmanager
def file_on(d, directory, name):
    """A written file of 1 MiB in `directory`, exported as `name`; its path."""
    with tempfile.NamedTemporaryFile(dir=directory, prefix='tidemark-test-') as f:
        f.write(b'w' * MiB)
        f.flush()
        os.fsync(f.fileno())
        d.cmd('blockdev-add', {'driver': 'file', 'node-name': name, 'filename': f.name, 'discard': 'unmap'})
        d.export(name)
        yield f.name
        d.cmd('block-export-del', id='exp-' + name, mode='hard')
        d.qmp.event('BLOCK_EXPORT_DELETED', id='exp-' + name)
        d.cmd('blockdev-del', {'node-name': name})


def first_hole(path):
    with open(path, 'rb') as f:
        return os.lseek(f.fileno(), 0, os.SEEK_HOLE)


def test_no_hole_keeps_the_space(d):
    """flags, WRITE_ZEROES with NO_HOLE: the space is there afterwards; without, it is given back."""
    for i, directory in enumerate(('/tmp', '/dev/shm')):
        with file_on(d, directory, f'f{i}') as path:
            c = client(d, f'f{i}')
            assert c.request(ZERO, 0, MiB, NO_HOLE | FUA).error == 0
            assert content(path) == bytes(MiB)
            assert os.stat(path).st_blocks * 512 >= MiB
            if directory == '/dev/shm':  # elsewhere space that is only set aside may count as a hole
                assert first_hole(path) == MiB
            assert c.request(ZERO, 0, MiB).error == 0
            assert content(path) == bytes(MiB)
            assert os.stat(path).st_blocks == 0 and first_hole(path) == 0
            assert c.request(ZERO, 0, MiB, NO_HOLE).error == 0  # and it comes back
            assert os.stat(path).st_blocks * 512 >= MiB


def test_fast_zero(d):
    """flags, FAST_ZERO: quick where the file can do it, ENOTSUP and nothing written where it cannot."""
    with file_on(d, '/dev/shm', 'slow') as path:  # tmpfs punches holes, but cannot zero in place
        c = client(d, 'slow')
        assert c.request(ZERO, 0, MiB, FAST_ZERO | NO_HOLE).error == errno.EOPNOTSUPP
        assert content(path) == b'w' * MiB
        assert c.request(ZERO, 0, MiB, FAST_ZERO).error == 0
        assert content(path) == bytes(MiB)
    d.add_disk('huge', TiB, discard='unmap')
    d.export('huge')
    c = client(d, 'huge')
    assert c.request(ZERO, 0, 8 * GiB, FAST_ZERO).error == 0  # far more than could be written meanwhile
    assert c.request(ZERO, 0, 2 * GiB).error == 0


def test_cache(d):
    """flags, CACHE: any length inside the disk, no data comes back, nothing changes."""
    disk(d)
    before = content(d.path('disk.raw'))
    for mode in MODES:
        c = client(d, mode=mode)
        for offset, length in ((0, SIZE), (MiB + 1, 5), (0, 0), (SIZE, 0)):
            r = c.request(CACHE, offset, length)
            assert (r.error, r.data) == (0, b'')
        assert c.request(CACHE, 1, SIZE).error == errno.EINVAL
    assert content(d.path('disk.raw')) == before


# ---------------------------------------------------------------- listeners

@pytest.mark.parametrize('transport', ['unix', 'ipv4', 'ipv6'])
def test_transports(d, transport):
    """handshake, over UNIX, IPv4 and IPv6."""
    disk(d)
    address = d.nbd_path
    if transport != 'unix':
        family, host = (socket.AF_INET, '127.0.0.1') if transport == 'ipv4' else (socket.AF_INET6, '::1')
        try:
            socket.create_server((host, 0), family=family).close()
        except OSError:
            pytest.skip('no IPv6 here')
        d.cmd('nbd-server-stop')

        def listen(port):
            d.cmd('nbd-server-start', addr={'type': 'inet', 'data': {'host': host, 'port': str(port)}})
            return host, port
        address = on_free_port(listen, family, host)
        d.export('disk')
    for mode in MODES:
        c = Raw(address)
        c.go('disk', mode=mode)
        assert c.request(READ, MiB, MiB).data == content(d.path('disk.raw'))[MiB:2 * MiB]
        assert c.request(WRITE, 0, 70_000, payload=b'x' * 70_000).error == 0
