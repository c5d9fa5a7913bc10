# SPDX-License-Identifier: Apache-2.0
"""The NBD server and its clients: libnbd and its tools, qemu-img and qemu-io."""
import errno
import json
import os
import random
import socket
import struct
import time

import nbd
import pytest

from backup_tools import assert_same, content, fill, refused, until
from harness import Daemon, KiB, MiB, on_free_port, qemu_io, run, which
from nbd_raw import META, OPT_LIST_META, OPT_SET_META, OPT_STRUCTURED, WRITE, Raw, meta, option, request

SIZE = 8 * MiB
HOLE, ZERO, DIRTY = 1, 2, 1
needs = {t: pytest.mark.skipif(not which(t), reason=f'{t} is not installed')
         for t in ('nbdinfo', 'nbdcopy', 'qemu-img', 'qemu-io', 'qemu-storage-daemon')}


@pytest.fixture
def d():
    with Daemon() as daemon:
        yield daemon


@pytest.fixture
def disk(d):
    """Random data in [0, 1M), a hole up to 4M, data up to 4M+64K, a hole to the end."""
    path = d.add_disk('disk', SIZE, discard='unmap')
    fill(path, MiB)
    fill(path, 64 * KiB, offset=4 * MiB)
    return d


def handle(uri, *contexts, structured=True):
    h = nbd.NBD()
    h.set_strict_mode(0)  # let us send what a careful client would not
    h.set_request_structured_replies(structured)
    for c in contexts:
        h.add_meta_context(c)
    h.connect_uri(uri)
    return h


def extents(h, offset=0, length=SIZE, flags=0):
    """{context: [(length, flags)]}"""
    out = {}

    def take(context, off, entries, err):
        assert off == offset
        out[context] = list(zip(entries[::2], entries[1::2]))
    h.block_status(length, offset, take, flags)
    return out


def fails(code, call, *args, **kw):
    """The server answers this call with this error; the connection goes on."""
    with pytest.raises(nbd.Error) as e:
        call(*args, **kw)
    assert e.value.errnum == code, e.value


# ---------------------------------------------------------------- what the server says

@needs['nbdinfo']
def test_nbdinfo(disk):
    uri = disk.export('disk', description='a disk')
    info = json.loads(run('nbdinfo', '--json', uri))
    assert info['protocol'] == 'newstyle-fixed' and info['structured'] is True
    e = info['exports'][0]
    assert (e['export-name'], e['description'], e['export-size']) == ('disk', 'a disk', SIZE)
    assert (e['block_size_minimum'], e['block_size_preferred'], e['block_size_maximum']) == (1, 4096, 32 * MiB)
    can = ['cache', 'df', 'fast_zero', 'flush', 'fua', 'multi_conn', 'trim', 'zero']
    assert [e['can_' + c] for c in can] == [True] * len(can) and not e['is_read_only']
    assert e['contexts'] == ['base:allocation']


@needs['nbdinfo']
def test_nbdinfo_read_only(disk):
    uri = disk.export('disk', writable=False)
    for question, yes in (('is read-only', 1), ('can write', 0), ('can trim', 0), ('can zero', 0),
                          ('can fast-zero', 0), ('can multi-conn', 1), ('can flush', 1), ('can fua', 1),
                          ('can df', 1), ('can cache', 1), ('can structured-reply', 1)):
        run('nbdinfo', *('--' + question).split(' ', 1), uri, code=0 if yes else 2)


@needs['nbdinfo']
def test_nbdinfo_list_and_map(disk):
    disk.add_disk('other', MiB)
    disk.export('disk')
    uri = disk.export('other', writable=False, description='more')
    rows = json.loads(run('nbdinfo', '--list', '--json', uri))['exports']
    assert {(r['export-name'], r.get('description')) for r in rows} == {('disk', None), ('other', 'more')}
    rows = json.loads(run('nbdinfo', '--map', '--json', disk.uri('disk')))
    assert [(r['offset'], r['length'], r['type']) for r in rows] == [
        (0, MiB, 0), (MiB, 3 * MiB, 3), (4 * MiB, 64 * KiB, 0), (4 * MiB + 64 * KiB, 4 * MiB - 64 * KiB, 3)]
    assert run('nbdinfo', '--size', uri).strip() == str(MiB)


def test_multi_conn_only_where_it_is_true():
    """A server for one client does not offer it."""
    with Daemon(nbd=False) as d:
        d.add_disk('disk', SIZE)
        d.cmd('nbd-server-start', {'addr': {'type': 'unix', 'data': {'path': d.nbd_path}},
                                   'max-connections': 1})
        assert not handle(d.export('disk')).can_multi_conn()


def test_flush_on_one_connection_covers_the_other(disk):
    """What multi-conn promises: a write that was answered on A is durable after a flush on B."""
    uri = disk.export('disk')
    a, b = handle(uri), handle(uri)
    a.pwrite(b'x' * 4096, 0)
    b.flush()
    assert a.pread(4096, 0) == b.pread(4096, 0) == b'x' * 4096
    assert content(disk.path('disk.raw'))[:4096] == b'x' * 4096


# ---------------------------------------------------------------- whole disks

@needs['nbdcopy']
@pytest.mark.parametrize('transport', ['unix', 'tcp'])
def test_nbdcopy_both_ways(disk, transport):
    uri = disk.export('disk')
    if transport == 'tcp':
        uri = tcp_server(disk)
    run('nbdcopy', '--connections=4', uri, disk.path('copy'))
    assert_same(disk.path('disk.raw'), disk.path('copy'))
    assert os.stat(disk.path('copy')).st_blocks * 512 < 2 * MiB  # holes were told
    fill(disk.path('copy'), SIZE - 1 * MiB, seed=7)
    run('nbdcopy', '--connections=4', '--flush', disk.path('copy'), uri)
    assert_same(disk.path('disk.raw'), disk.path('copy'))


def tcp_server(d):
    """Start the server anew on TCP with the disk on it; returns the URI."""
    d.cmd('nbd-server-stop')
    d.qmp.event('BLOCK_EXPORT_DELETED')

    def listen(port):
        d.cmd('nbd-server-start', addr={'type': 'inet', 'data': {'host': '127.0.0.1', 'port': str(port)}})
        return f'nbd://127.0.0.1:{port}/disk'
    uri = on_free_port(listen)
    d.export('disk')
    return uri


@needs['qemu-img']
def test_qemu_img(disk):
    uri = disk.export('disk')
    info = json.loads(run('qemu-img', 'info', '--output=json', uri))
    assert info['virtual-size'] == SIZE and info['format'] == 'raw'
    rows = json.loads(run('qemu-img', 'map', '--output=json', uri))
    assert [(r['start'], r['length'], r['zero'], r['data']) for r in rows] == [
        (0, MiB, False, True), (MiB, 3 * MiB, True, False), (4 * MiB, 64 * KiB, False, True),
        (4 * MiB + 64 * KiB, 4 * MiB - 64 * KiB, True, False)]
    run('qemu-img', 'convert', '-O', 'qcow2', uri, disk.path('c.qcow2'))
    run('qemu-img', 'compare', uri, disk.path('c.qcow2'))
    qemu_io(uri, 'write -P 1 6M 64k')
    run('qemu-img', 'compare', uri, disk.path('c.qcow2'), code=1)
    run('qemu-img', 'convert', '-n', '-W', '-m', '16', '-O', 'raw', disk.path('c.qcow2'), uri)
    run('qemu-img', 'compare', uri, disk.path('c.qcow2'))


@needs['qemu-io']
def test_qemu_io(disk):
    uri = disk.export('disk')
    qemu_io(uri, 'write -P 1 0 64k', 'write -f -P 2 64k 512', 'write -z 128k 64k', 'write -z -u 256k 64k',
            'discard 512k 64k', 'flush', 'read -P 1 0 64k', 'read -P 2 64k 512', 'read -P 0 128k 64k',
            'read -P 0 256k 64k', 'read -P 0 512k 64k', 'aio_write -P 3 1M 1M', 'aio_flush',
            'read -P 3 1M 1M', f'write -P 4 {SIZE - 1} 1', f'read -P 4 {SIZE - 1} 1')


# ---------------------------------------------------------------- reads and writes

def test_random_reads_and_writes_on_several_connections(disk):
    """Against a model in memory; each connection in a stripe of its own."""
    uri = disk.export('disk')
    model = bytearray(content(disk.path('disk.raw')))
    conns = [handle(uri, structured=i % 2 == 0) for i in range(4)]
    r = random.Random(3)
    for _ in range(400):
        i = r.randrange(4)
        length = r.choice([1, 511, 512, 4096, 65536, 300_000])
        offset = i * SIZE // 4 + r.randrange(SIZE // 4 - length)
        kind = r.randrange(5)
        if kind == 0:
            conns[i].zero(length, offset, r.choice([0, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FUA]))
            model[offset:offset + length] = bytes(length)
        elif kind <= 2:
            data = r.randbytes(length)
            conns[i].pwrite(data, offset, r.choice([0, nbd.CMD_FLAG_FUA]))
            model[offset:offset + length] = data
        else:
            assert conns[r.randrange(4)].pread(length, offset) == model[offset:offset + length]
    conns[0].flush()
    assert_same(bytes(model), disk.path('disk.raw'))


def test_reads_tell_holes(disk):
    h = handle(disk.export('disk'))
    chunks = []

    def chunk(data, offset, status, err):
        chunks.append((offset, len(data), status))
    got = h.pread_structured(4 * MiB, 512 * KiB, chunk)
    assert got == content(disk.path('disk.raw'))[512 * KiB:512 * KiB + 4 * MiB]
    assert sorted(chunks) == [(512 * KiB, 512 * KiB, nbd.READ_DATA), (MiB, 3 * MiB, nbd.READ_HOLE),
                              (4 * MiB, 64 * KiB, nbd.READ_DATA),
                              (4 * MiB + 64 * KiB, 448 * KiB, nbd.READ_HOLE)]
    chunks.clear()
    assert h.pread_structured(4 * MiB, 512 * KiB, chunk, nbd.CMD_FLAG_DF) == got
    assert chunks == [(512 * KiB, 4 * MiB, nbd.READ_DATA)]


@pytest.mark.parametrize('structured', [True, False])
def test_the_edges(disk, structured):
    """Both ends, 32 MiB and more, nothing at all."""
    size = 80 * MiB
    disk.add_disk('big', size)
    h = handle(disk.export('big'), structured=structured)
    block = random.Random(1).randbytes(32 * MiB)
    h.pwrite(block, size - 32 * MiB)
    assert h.pread(32 * MiB, size - 32 * MiB) == block
    h.pwrite(b'1', size - 1)
    assert h.pread(1, size - 1) == b'1'
    fails(errno.EINVAL, h.pread, 1, size)
    fails(errno.EINVAL, h.pread, 2, size - 1)
    fails(errno.EINVAL, h.pread, 512, (1 << 63) - 512)
    fails(errno.ENOSPC, h.pwrite, b'1', size)
    fails(errno.ENOSPC, h.pwrite, b'22', size - 1)
    fails(errno.ENOSPC, h.zero, 512, size)
    fails(errno.EINVAL, h.trim, 512, size - 511)
    h.zero(size, 0)
    h.trim(size, 0)
    assert h.pread(4096, size - 4096) == bytes(4096)
    h.pwrite(b'', 0)
    h.zero(0, 0)
    h.trim(0, size)
    h.cache(MiB, 0)
    assert h.pread(1, 0) == b'\0'


@pytest.mark.parametrize('structured', [True, False])
def test_a_read_beyond_32_mib_is_refused_and_the_connection_goes_on(disk, structured):
    size = 80 * MiB
    disk.add_disk('big', size)
    disk.export('big')
    c = Raw(disk.nbd_path)
    c.go('big', structured)
    reply = c.request(0, offset=0, length=32 * MiB + 1)
    assert reply.error == errno.EINVAL
    assert c.request(0, offset=0, length=512).data == bytes(512)


def test_a_write_beyond_32_mib_ends_the_connection_only(disk):
    c = Raw(disk.nbd_path)
    disk.export('disk')
    c.go('disk')
    c.send(request(WRITE, length=32 * MiB + 1))
    reply = c.reply()
    assert reply.error == errno.EINVAL
    assert c.at_end()
    assert handle(disk.uri('disk')).pread(512, 0) == content(disk.path('disk.raw'))[:512]


def test_unknown_commands_and_flags(disk):
    disk.export('disk')
    c = Raw(disk.nbd_path)
    c.go('disk')
    assert c.request(99).error == errno.EINVAL
    assert c.request(0, length=512, flags=0x8000).error == errno.EINVAL
    assert c.request(1, length=512, flags=0x0002, payload=bytes(512)).error == errno.EINVAL
    assert c.request(0, length=512).error == 0


def test_read_only(disk):
    before = content(disk.path('disk.raw'))
    h = handle(disk.export('disk', writable=False))
    fails(errno.EPERM, h.pwrite, b'x' * 512, 0)
    fails(errno.EPERM, h.pwrite, b'x' * MiB, 0)
    fails(errno.EPERM, h.zero, 512, 0)
    fails(errno.EPERM, h.trim, 512, 0)
    h.flush()
    assert h.pread(512, 0) == before[:512]
    assert_same(before, disk.path('disk.raw'))


def test_trim_and_zero_give_space_back(disk):
    path = disk.path('disk.raw')
    h = handle(disk.export('disk'), 'base:allocation')
    blocks = os.stat(path).st_blocks
    h.trim(512 * KiB, 0)
    assert os.stat(path).st_blocks * 512 <= blocks * 512 - 512 * KiB
    h.pwrite(b'x' * 65536, 0)
    h.zero(64 * KiB, 0)
    assert extents(h, 0, 64 * KiB)['base:allocation'] == [(64 * KiB, HOLE | ZERO)]
    h.pwrite(b'x' * 65536, 0)
    h.zero(64 * KiB, 0, nbd.CMD_FLAG_NO_HOLE)
    assert extents(h, 0, 64 * KiB)['base:allocation'][0][1] & HOLE == 0
    assert h.pread(64 * KiB, 0) == bytes(64 * KiB)


def test_fast_zero_is_fast_or_refused(disk):
    h = handle(disk.export('disk'))
    try:
        h.zero(64 * KiB, 0, nbd.CMD_FLAG_FAST_ZERO)
        assert h.pread(64 * KiB, 0) == bytes(64 * KiB)
    except nbd.Error as e:
        assert e.errnum == errno.ENOTSUP
        assert h.pread(512, 0) == content(disk.path('disk.raw'))[:512]


def test_errors_of_the_disk_reach_the_client(disk):
    disk.cmd('blockdev-add', {'driver': 'blkdebug', 'node-name': 'bad', 'image': 'disk', 'inject-error': [
        {'event': 'none', 'iotype': 'read', 'errno': 5, 'sector': 8, 'once': False},
        {'event': 'none', 'iotype': 'write', 'errno': 28, 'sector': 8, 'once': False},
        {'event': 'none', 'iotype': 'flush', 'errno': 5, 'once': True}]})
    for structured in (True, False):
        h = handle(disk.export('bad', f'e{structured}'), structured=structured)
        fails(errno.EIO, h.pread, 512, 4096)
        fails(errno.ENOSPC, h.pwrite, bytes(512), 4096)
        assert len(h.pread(4096, 0)) == 4096
        if structured:
            fails(errno.EIO, h.flush)
        h.flush()


# ---------------------------------------------------------------- contexts

def bitmaps(d, *names, node='disk', dirty=()):
    for n in names:
        d.cmd('block-dirty-bitmap-add', node=node, name=n)
    if dirty:
        uri = d.export(node, 'w')
        qemu_io(uri, *[f'write -P 5 {o} {n}' for o, n in dirty])
        d.cmd('block-export-del', id='exp-w', mode='hard')
        d.qmp.event('BLOCK_EXPORT_DELETED', id='exp-w')
    for n in names:
        d.cmd('block-dirty-bitmap-disable', node=node, name=n)


def test_several_contexts_at_once(disk):
    bitmaps(disk, 'b0', 'b1', dirty=[(2 * MiB, 64 * KiB)])
    contexts = ['base:allocation', 'qemu:allocation-depth', 'qemu:dirty-bitmap:b0', 'qemu:dirty-bitmap:b1']
    h = handle(disk.export('disk', writable=False, **{'bitmaps': ['b0', {'node': 'disk', 'name': 'b1'}],
                                                      'allocation-depth': True}), *contexts)
    assert all(h.can_meta_context(c) for c in contexts)
    got = extents(h)
    map_of = [(MiB, 0), (MiB, HOLE | ZERO), (64 * KiB, 0), (2 * MiB - 64 * KiB, HOLE | ZERO), (64 * KiB, 0),
              (4 * MiB - 64 * KiB, HOLE | ZERO)]
    dirty = [(2 * MiB, 0), (64 * KiB, DIRTY), (6 * MiB - 64 * KiB, 0)]
    assert got['base:allocation'] == map_of
    assert got['qemu:allocation-depth'] == [(SIZE, 1)]  # nothing below could shine through the holes
    assert got['qemu:dirty-bitmap:b0'] == got['qemu:dirty-bitmap:b1'] == dirty
    # One extent each, none past what was asked.
    one = extents(h, MiB + 512, 3 * MiB, nbd.CMD_FLAG_REQ_ONE)
    assert one['base:allocation'] == [(MiB - 512, HOLE | ZERO)]
    assert one['qemu:dirty-bitmap:b0'] == [(MiB - 512, 0)]
    one = extents(h, 0, 4096, nbd.CMD_FLAG_REQ_ONE)
    assert set(map(tuple, one.values())) == {((4096, 0),), ((4096, 1),)}
    fails(errno.EINVAL, extents, h, SIZE, 512)
    fails(errno.EINVAL, extents, h, SIZE - 512, 1024)
    fails(errno.EINVAL, extents, h, 0, 0)


def test_listing_of_contexts(disk):
    bitmaps(disk, 'b0', 'b 1')
    uri = disk.export('disk', writable=False, **{'bitmaps': ['b0', 'b 1'], 'allocation-depth': True})
    depth, b0, b1 = 'qemu:allocation-depth', 'qemu:dirty-bitmap:b0', 'qemu:dirty-bitmap:b 1'
    for queries, expected in (
            ([], ['base:allocation', depth, b0, b1]), (['base:'], ['base:allocation']),
            (['qemu:'], [depth, b0, b1]), (['qemu:dirty-bitmap:'], [b0, b1]), (['base:allocation'], ['base:allocation']),
            (['qemu:dirty-bitmap:b'], []), (['nope:'], []), (['qemu:dirty-bitmap:b0', 'base:'], ['base:allocation', b0])):
        h = nbd.NBD()
        h.set_opt_mode(True)
        h.connect_uri(uri)
        for q in queries:
            h.add_meta_context(q)
        got = []
        h.opt_list_meta_context(lambda name: got.append(name))
        assert got == expected, queries
        h.opt_abort()
    # Choosing needs the exact name.
    h = handle(uri, 'qemu:', 'qemu:dirty-bitmap:', b1)
    assert h.can_meta_context(b1) and not h.can_meta_context('qemu:') and not h.can_meta_context(b0)


def test_block_status_needs_a_context(disk):
    h = handle(disk.export('disk'))
    fails(errno.EINVAL, extents, h)
    assert h.pread(512, 0)


def test_bitmap_export_rules(disk):
    disk.add_disk('small', MiB)
    disk.cmd('block-dirty-bitmap-add', node='disk', name='on')
    disk.cmd('block-dirty-bitmap-add', node='small', name='s')
    with refused('nope'):
        disk.export('disk', bitmaps=['nope'])
    with refused('nope'):
        disk.export('disk', bitmaps=[{'node': 'disk', 'name': 'nope'}])
    with refused('zz'):
        disk.export('disk', bitmaps=[{'node': 'zz', 'name': 'on'}])
    with refused("'on'", 'read-only'):
        disk.export('disk', writable=False, bitmaps=['on'])
    with refused("'s'", str(MiB), str(SIZE)):
        disk.export('disk', bitmaps=[{'node': 'small', 'name': 's'}])
    assert not disk.bitmap('disk', 'on')['busy'] and disk.cmd('query-block-exports') == []
    disk.export('disk', writable=True, bitmaps=['on'])  # changes as one looks: allowed when writable
    assert disk.bitmap('disk', 'on')['busy']
    with refused('in use'):
        disk.export('disk', 'second', bitmaps=['on'])
    disk.cmd('block-export-del', id='exp-disk')
    assert not disk.bitmap('disk', 'on')['busy']
    disk.export('disk', writable=False, bitmaps=[{'node': 'disk', 'name': 'on'}])  # no check in this form
    assert disk.bitmap('disk', 'on')['busy']


def test_writes_show_in_an_exported_bitmap(disk):
    disk.cmd('block-dirty-bitmap-add', node='disk', name='on')
    h = handle(disk.export('disk', bitmaps=['on']), 'qemu:dirty-bitmap:on')
    assert extents(h) == {'qemu:dirty-bitmap:on': [(SIZE, 0)]}
    h.pwrite(b'x', 3 * MiB)
    h.zero(1, 5 * MiB)
    h.trim(65536, 6 * MiB)
    assert extents(h) == {'qemu:dirty-bitmap:on': [
        (3 * MiB, 0), (65536, 1), (2 * MiB - 65536, 0), (65536, 1), (MiB - 65536, 0), (65536, 1),
        (2 * MiB - 65536, 0)]}


def test_many_extents_come_in_pages(disk):
    """A reply has 131072 extents at most over all contexts (65536 here); a client that goes on where it stopped sees all."""
    size = 40 * MiB
    disk.add_disk('big', size)
    disk.cmd('block-dirty-bitmap-add', node='big', name='b', granularity=512)
    h = handle(disk.export('big', bitmaps=['b']), 'qemu:dirty-bitmap:b', 'base:allocation')
    one = nbd.Buffer.from_bytearray(bytearray(b'x'))
    for start in range(0, size, MiB):
        window = [h.aio_pwrite(one, start + off) for off in range(0, MiB, 2048)]
        while window := [c for c in window if not h.aio_command_completed(c)]:
            h.poll(-1)
    seen, offset, replies = [], 0, 0
    while offset < size:
        entries = extents(h, offset, size - offset)['qemu:dirty-bitmap:b']
        assert 0 < len(entries) <= 131072 // 2
        seen += entries
        offset += sum(n for n, _ in entries)
        replies += 1
    assert replies == 2 and len(seen) == size // 1024
    assert seen[:2] == [(512, 1), (1536, 0)] and sum(n for n, f in seen if f) == size // 4


# ---------------------------------------------------------------- the raw protocol

@pytest.mark.parametrize('flags,tail', [(3, 0), (1, 124), (0, 124)])
def test_export_name(disk, flags, tail):
    """The oldest way, with and without the zeroes, also by a client that is not *fixed*."""
    disk.export('disk', writable=False)
    c = Raw(disk.nbd_path, flags)
    c.send(b'IHAVEOPT' + struct.pack('>II', 1, 4) + b'disk')
    size, export_flags = struct.unpack('>QH', c.take(10))
    assert size == SIZE and export_flags & 3 == 3
    assert c.take(tail) == bytes(tail)
    assert c.request(0, length=512).data == content(disk.path('disk.raw'))[:512]


def test_export_name_of_nothing_ends_the_connection(disk):
    c = Raw(disk.nbd_path)
    c.send(b'IHAVEOPT' + struct.pack('>II', 1, 4) + b'nope')
    assert c.at_end()


def test_list_info_abort(disk):
    disk.export('disk', description='text')
    c = Raw(disk.nbd_path)
    assert c.option(3) == [(2, struct.pack('>I', 4) + b'disktext'), (1, b'')]
    assert c.go('nope', opt=6)[-1][0] == 0x80000006  # unknown export
    infos = {struct.unpack('>H', data[:2])[0]: data[2:] for kind, data in c.go('disk', opt=6) if kind == 3}
    assert struct.unpack('>III', infos[3]) == (1, 4096, 32 * MiB)
    assert struct.unpack('>Q', infos[0][:8]) == (SIZE,)
    assert c.option(99)[-1][0] == 0x80000001  # unsupported
    assert c.option(5)[-1][0] >> 31  # no TLS here
    assert c.option(2) == [(1, b'')]  # abort
    assert c.at_end()


def test_thousands_of_bitmaps_are_chosen_in_no_time(disk):
    n = 4000
    wanted = [f'backup-of-the-day-{i:05}' for i in range(n)]
    disk.cmd('transaction', actions=[{'type': 'block-dirty-bitmap-add', 'data': {
        'node': 'disk', 'name': b, 'disabled': True}} for b in wanted])
    disk.export('disk', writable=False, bitmaps=wanted)
    c = Raw(disk.nbd_path)
    c.option(OPT_STRUCTURED)
    queries = ['qemu:dirty-bitmap:' + b for b in wanted]
    times = []
    while not times or (min(times) >= 0.05 and len(times) < 30):  # others use this machine, too
        c.send(option(OPT_SET_META, meta('disk', queries)))
        before = time.monotonic()
        c.s.recv(1, socket.MSG_PEEK)  # the answer begins when all of it is known
        times.append(time.monotonic() - before)
        assert [data[4:].decode() for kind, data in c.replies(OPT_SET_META) if kind == META] == queries
    assert min(times) < 0.05, f'SET_META_CONTEXT with {n} queries took {min(times) * 1000:.1f} ms'
    listed = c.option(OPT_LIST_META, meta('disk', ['qemu:dirty-bitmap:', 'base:']))
    assert len([1 for kind, _ in listed if kind == META]) == n + 1


# ---------------------------------------------------------------- life of exports and server

def test_export_del_safe_and_hard(disk):
    uri = disk.export('disk')
    h = handle(uri)
    with refused('exp-disk', 'in use'):
        disk.cmd('block-export-del', id='exp-disk')
    assert h.pread(512, 0)
    disk.cmd('block-export-del', id='exp-disk', mode='hard')
    disk.qmp.event('BLOCK_EXPORT_DELETED', id='exp-disk')
    with pytest.raises(nbd.Error):
        h.pread(512, 0)
    assert disk.cmd('query-block-exports') == []
    with refused('exp-disk'):
        disk.cmd('block-export-del', id='exp-disk')
    disk.export('disk')
    disk.cmd('block-export-del', id='exp-disk')
    disk.qmp.event('BLOCK_EXPORT_DELETED', id='exp-disk')
    with pytest.raises(nbd.Error):
        handle(uri)


def test_safe_delete_after_the_client_has_left(disk):
    h = handle(disk.export('disk'))
    h.shutdown()

    def gone():
        try:
            disk.cmd('block-export-del', id='exp-disk')
            return True
        except Exception:
            return False
    until('the client has gone', gone)


def test_query_and_names(disk):
    disk.add_disk('other', MiB)
    disk.cmd('block-export-add', {'type': 'nbd', 'id': 'exp-x', 'node-name': 'disk', 'name': 'x/y z'})
    disk.export('other')
    assert disk.cmd('query-block-exports') == [
        {'id': 'exp-other', 'type': 'nbd', 'node-name': 'other', 'shutting-down': False},
        {'id': 'exp-x', 'type': 'nbd', 'node-name': 'disk', 'shutting-down': False}]
    with refused('other'):
        disk.cmd('block-export-add', {'type': 'nbd', 'id': 'e2', 'node-name': 'disk', 'name': 'other'})
    with refused('exp-other'):
        disk.cmd('block-export-add', {'type': 'nbd', 'id': 'exp-other', 'node-name': 'disk', 'name': 'n'})
    for bad in ('1x', '', 'a b'):
        with refused():
            disk.cmd('block-export-add', {'type': 'nbd', 'id': bad, 'node-name': 'disk', 'name': 'n'})
    for member in ('name', 'description'):
        with refused('4096'):
            disk.cmd('block-export-add', {'type': 'nbd', 'id': 'e3', 'node-name': 'disk', member: 'x' * 4097})
    disk.cmd('block-export-add', {'type': 'nbd', 'id': 'e4', 'node-name': 'disk', 'name': 'x' * 4096})
    assert handle(disk.uri('x' * 4096)).get_size() == SIZE
    with refused('zz'):
        disk.cmd('block-export-add', {'type': 'nbd', 'id': 'e5', 'node-name': 'zz'})
    with refused('disk'):
        disk.cmd('blockdev-del', {'node-name': 'disk'})


def test_server_start_stop(disk):
    disk.add_disk('other', MiB)
    h = handle(disk.export('disk'))
    disk.export('other')
    with refused('running'):
        disk.cmd('nbd-server-start', addr={'type': 'unix', 'data': {'path': disk.nbd_path}})
    disk.cmd('nbd-server-stop')
    for e in ('exp-disk', 'exp-other'):
        disk.qmp.event('BLOCK_EXPORT_DELETED', id=e)
    with pytest.raises(nbd.Error):
        h.pread(512, 0)
    with refused('not running'):
        disk.cmd('nbd-server-stop')
    with refused('not running'):
        disk.export('disk')
    disk.cmd('nbd-server-start', addr={'type': 'unix', 'data': {'path': disk.nbd_path}})
    assert handle(disk.export('disk')).get_size() == SIZE


def test_the_deprecated_pair(disk):
    disk.cmd('block-dirty-bitmap-add', node='disk', name='b', disabled=True)
    disk.cmd('nbd-server-add', device='disk', name='n', bitmap='b', description='text')
    assert disk.cmd('query-block-exports')[0]['id'] == 'n'
    h = handle(disk.uri('n'), 'qemu:dirty-bitmap:b')
    assert h.is_read_only() and h.can_meta_context('qemu:dirty-bitmap:b')
    with refused("'n'", 'in use'):
        disk.cmd('nbd-server-remove', name='n')
    with refused("'zz'"):
        disk.cmd('nbd-server-remove', name='zz')
    disk.cmd('nbd-server-remove', name='n', mode='hard')
    disk.qmp.event('BLOCK_EXPORT_DELETED', id='n')
    disk.cmd('nbd-server-add', device='disk', writable=True)
    assert not handle(disk.uri('disk')).is_read_only()


def test_iothreads(disk):
    disk.cmd('object-add', {'qom-type': 'iothread', 'id': 't0'})
    with refused('t1'):
        disk.export('disk', iothread='t1')
    h = handle(disk.export('disk', iothread='t0'))
    h.pwrite(b'x' * 4096, 0)
    assert h.pread(4096, 0) == b'x' * 4096
    with refused('t0', 'in use'):
        disk.cmd('object-del', id='t0')
    disk.cmd('block-export-del', id='exp-disk', mode='hard')
    disk.qmp.event('BLOCK_EXPORT_DELETED')
    disk.cmd('object-del', id='t0')
    with refused('t0'):
        disk.cmd('object-del', id='t0')


def test_writethrough(disk):
    h = handle(disk.export('disk', writethrough=True))
    h.pwrite(b'y' * 4096, 0)
    assert content(disk.path('disk.raw'))[:4096] == b'y' * 4096


def test_two_writable_exports_of_one_node(disk):
    a, b = handle(disk.export('disk', 'one')), handle(disk.export('disk', 'two'))
    a.pwrite(b'z' * 512, 0)
    assert b.pread(512, 0) == b'z' * 512


@needs['qemu-storage-daemon']
def test_same_answers_as_qsd():
    """One conversation with both: sizes, flags, extents, listings and errors are equal."""
    def talk(kind):
        with Daemon(kind=kind, quit_check=False) as d:
            path = d.add_disk('disk', SIZE, discard='unmap')
            fill(path, MiB)
            d.cmd('block-dirty-bitmap-add', node='disk', name='b')
            uri = d.export('disk', description='text', **{'bitmaps': ['b'], 'allocation-depth': True})
            qemu_io(uri, 'write -P 1 3M 64k', 'write -z 5M 64k')
            h = handle(uri, 'base:allocation', 'qemu:dirty-bitmap:b', 'qemu:allocation-depth')
            out = [h.get_size(), h.is_read_only(), h.can_fua(), h.can_flush(), h.can_trim(), h.can_zero(),
                   h.can_fast_zero(), h.can_df(), h.can_cache(), h.can_multi_conn(),
                   [h.get_block_size(i) for i in range(3)], extents(h),
                   extents(h, MiB, 4096, nbd.CMD_FLAG_REQ_ONE)]
            # Not compared: writes past the end, where the protocol asks for ENOSPC and QSD says EINVAL.
            for call, *args in ((h.pread, 512, SIZE), (h.trim, 1, SIZE), (h.cache, 1, SIZE), (h.flush,)):
                try:
                    call(*args)
                    out.append('ok')
                except nbd.Error as e:
                    out.append(e.errnum)
            c = Raw(d.nbd_path)
            out += [c.server_flags, [k for k, _ in c.go('disk', opt=6)], c.option(3), [c.option(99)[0][0]],
                    [k for k, _ in c.go('nope', opt=6)]]
            return out
    assert talk('tidemarkd') == talk('qsd')
