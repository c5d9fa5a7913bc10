# SPDX-License-Identifier: Apache-2.0
"""Nodes: opening, naming, deleting; drivers; injected errors; who may write, also against qemu's tools."""
import contextlib
import os
import subprocess

import nbd
import pytest

from harness import DEADLINE, Daemon, GiB, KiB, MiB, QmpError, qemu_io, which

SIZE = 4 * MiB


def refused(d, command, arguments=None, /, **args):
    with pytest.raises(QmpError) as e:
        d.cmd(command, arguments, **args)
    assert e.value.cls == 'GenericError'
    return e.value.desc


def names(d):
    return [n['node-name'] for n in d.cmd('query-named-block-nodes')]


@contextlib.contextmanager
def connect(d, name):
    h = nbd.NBD()
    h.set_strict_mode(0)
    h.connect_uri(d.uri(name))
    yield h
    h.shutdown()


def error_number(call):
    with pytest.raises(nbd.Error) as e:
        call()
    return e.value.errno


def unexport(d, name):
    d.cmd('block-export-del', id='exp-' + name)
    d.qmp.event('BLOCK_EXPORT_DELETED', id='exp-' + name)


def tool(name, *args):
    return subprocess.run([which(name), *args], capture_output=True, text=True, timeout=DEADLINE)


# ---------------------------------------------------------------- opening

BAD_OPTIONS = [
    ({'driver': 'null-co'}, ['node-name']),
    ({'driver': 'null-co', 'node-name': ''}, ["''"]),
    ({'driver': 'null-co', 'node-name': '1x'}, ['1x']),
    ({'driver': 'null-co', 'node-name': '#block1'}, ['#block1']),
    ({'driver': 'null-co', 'node-name': 'a b'}, ['a b']),
    ({'driver': 'null-co', 'node-name': 'ä'}, ['ä']),
    ({'driver': 'null-co', 'node-name': 'x' * 32}, ['31']),
    ({'driver': 'null-co', 'node-name': 'x' * 100000}, ['31']),
    ({'driver': 'null-co', 'node-name': 'base'}, ["'base'", 'in use']),
    ({'driver': 'zz', 'node-name': 'a'}, ['zz']),
    ({'driver': 'null-co', 'node-name': 'a', 'foo': 1}, ['foo']),
    ({'driver': 'null-co', 'node-name': 'a', 'filename': 'x'}, ['filename']),
    ({'driver': 'null-co', 'node-name': 'a', 'size': 2 ** 63}, ['size']),
    ({'driver': 'null-co', 'node-name': 'a', 'detect-zeroes': 'unmap'}, ['discard=unmap']),
    ({'driver': 'null-co', 'node-name': 'a', 'force-share': True}, ['read-only']),
    ({'driver': 'file', 'node-name': 'a', 'filename': 'missing'}, ["'missing'", 'No such file']),
    ({'driver': 'file', 'node-name': 'a', 'filename': '.'}, ["'.'"]),
    ({'driver': 'file', 'node-name': 'a', 'filename': '/dev/null'}, ['/dev/null']),
    ({'driver': 'file', 'node-name': 'a', 'filename': 'x' * 300}, ['long']),
    ({'driver': 'file', 'node-name': 'a', 'filename': 'base.raw', 'aio': 'native'}, ['cache.direct']),
    ({'driver': 'host_device', 'node-name': 'a', 'filename': 'base.raw'}, ['driver=file']),
    ({'driver': 'raw', 'node-name': 'a', 'file': 'zz'}, ["'zz'"]),
    ({'driver': 'raw', 'node-name': 'a', 'file': 'a'}, ["'a'"]),
    ({'driver': 'raw', 'node-name': 'a', 'file': None}, ['file']),
    ({'driver': 'raw', 'node-name': 'a', 'file': {'driver': 'null-co', 'node-name': 'a'}}, ["'a'"]),
    ({'driver': 'raw', 'node-name': 'a', 'file': {'driver': 'raw', 'node-name': 'b', 'file': 'a'}}, ["'a'"]),
    ({'driver': 'raw', 'node-name': 'a', 'file': 'base', 'offset': SIZE + 512}, ['offset']),
    ({'driver': 'raw', 'node-name': 'a', 'file': 'base', 'offset': 512, 'size': SIZE}, ['size']),
    ({'driver': 'raw', 'node-name': 'a', 'file': {'driver': 'file', 'node-name': 'b', 'filename': 'base.raw'},
      'offset': 2 * SIZE}, ['offset']),
    ({'driver': 'blkdebug', 'node-name': 'a', 'image': 'zz'}, ["'zz'"]),
    ({'driver': 'blkdebug', 'node-name': 'a', 'image': 'base', 'align': 3}, ['align']),
    ({'driver': 'blkdebug', 'node-name': 'a', 'image': 'base', 'inject-error': [{'event': 'x'}]}, ['inject-error[0].event']),
    ({'driver': 'blkdebug', 'node-name': 'a', 'image': 'base', 'inject-error': [{'event': 'none', 'errno': 0}]}, ['errno']),
]


@pytest.mark.parametrize('options,words', BAD_OPTIONS, ids=[str(b[0])[:80] for b in BAD_OPTIONS])
def test_what_cannot_be_opened_leaves_nothing(tide, options, words):
    tide.add_file('base', SIZE)
    desc = refused(tide, 'blockdev-add', options)
    for w in words:
        assert w in desc
    assert names(tide) == ['base']
    tide.cmd('blockdev-add', driver='raw', node_name='a', file='base')
    tide.cmd('blockdev-del', node_name='a')
    tide.cmd('blockdev-del', node_name='base')


@pytest.mark.parametrize('name', ['a', 'x' * 31, 'A-1.b_c', 'a#'[:1]])
def test_good_names(tide, name):
    tide.cmd('blockdev-add', driver='null-co', node_name=name)
    assert names(tide) == [name]


def test_depth_of_nested_options(tide):
    def nested(depth):
        o = {'driver': 'null-co', 'size': MiB}
        for _ in range(depth):
            o = {'driver': 'raw', 'file': o}
        return {**o, 'node-name': 'top'}
    tide.cmd('blockdev-add', nested(40))
    tide.export('top')
    qemu_io(tide.uri('top'), 'write 0 1M')
    assert len(names(tide)) == 41
    unexport(tide, 'top')
    tide.cmd('blockdev-del', node_name='top')
    assert names(tide) == []
    assert 'nested' in refused(tide, 'blockdev-add', nested(100))
    assert names(tide) == []


def test_children_described_inside_go_with_their_parent(tide):
    path = tide.add_file('own', SIZE)
    for _ in range(2):
        tide.cmd('blockdev-add', {'driver': 'raw', 'node-name': 'r', 'file': {
            'driver': 'raw', 'node-name': 'in', 'file': {'driver': 'file', 'filename': path, 'read-only': True},
            'read-only': True}, 'read-only': True})
        assert names(tide)[:2] == ['r', 'in'] and names(tide)[2].startswith('#block')
        assert "'in'" in refused(tide, 'blockdev-del', node_name='in')
        assert '#block' in refused(tide, 'blockdev-del', node_name=names(tide)[2])
        tide.cmd('blockdev-del', node_name='r')
        assert names(tide) == ['own']


def test_options_that_children_take_from_their_parent(tide):
    """As in the reference: read-only, cache; and discards are passed on below who lets them through."""
    path = tide.path('x')
    with open(path, 'wb') as f:
        f.write(b'\1' * SIZE)
    file = {'driver': 'file', 'filename': path, 'node-name': 'f'}
    tide.cmd('blockdev-add', {'driver': 'raw', 'node-name': 'r', 'read-only': True, 'file': file,
                              'cache': {'no-flush': True}})
    assert tide.node('f')['ro'] is True and tide.node('f')['cache']['no-flush'] is True
    tide.cmd('blockdev-del', node_name='r')
    tide.cmd('blockdev-add', {'driver': 'raw', 'node-name': 'r', 'discard': 'unmap', 'file': file})
    tide.export('r')
    with connect(tide, 'r') as h:
        h.trim(SIZE, 0)
    assert os.stat(path).st_blocks == 0, 'discard=unmap above is enough'


def test_nodes_in_use_are_not_deleted(tide):
    tide.add_disk('d', SIZE)
    tide.cmd('blockdev-add', driver='raw', node_name='two', file='d')
    tide.export('two', writable=False)
    for node, by in [('two', 'exp-two'), ('d', "'two'"), ('d-file', "'d-file'"), ('zz', "'zz'")]:
        assert by in refused(tide, 'blockdev-del', node_name=node)
    unexport(tide, 'two')
    tide.cmd('blockdev-del', node_name='two')
    tide.cmd('blockdev-del', node_name='d')
    assert names(tide) == []


def test_rows_of_a_query(tide):
    path = tide.add_disk('d', 1000 * 512, discard='unmap')
    row = tide.node('d')
    assert row.pop('image').items() >= {'filename': path, 'format': 'raw', 'virtual-size': 512000}.items()
    zero = {k: 0 for k in ('bps', 'bps_rd', 'bps_wr', 'iops', 'iops_rd', 'iops_wr', 'write_threshold',
                           'backing_file_depth')}
    assert row == {**zero, 'file': path, 'node-name': 'd', 'ro': False, 'drv': 'raw', 'encrypted': False,
                   'detect_zeroes': 'off', 'cache': {'writeback': True, 'direct': False, 'no-flush': False}}
    tide.cmd('blockdev-add', {'driver': 'file', 'node-name': 'ro', 'filename': path, 'read-only': True, 'cache': {
        'no-flush': True}, 'detect-zeroes': 'unmap', 'discard': 'unmap'})
    row = tide.node('ro')
    assert row['ro'] is True and row['cache']['no-flush'] is True and row['detect_zeroes'] == 'unmap'
    assert tide.node('ro')['image']['actual-size'] == 0
    assert tide.cmd('query-named-block-nodes', flat=True) == tide.cmd('query-named-block-nodes')


def test_query_block_shows_writable_exports(tide):
    tide.add_file('f', SIZE)
    tide.export('f', 'ro', writable=False)
    assert tide.cmd('query-block') == []
    tide.export('f')
    row = tide.cmd('query-block')[0]
    assert row['device'] == '' and row['qdev'] == '/tidemark/export/exp-f' and row['type'] == 'unknown'
    assert row['inserted'] == tide.node('f')


# ---------------------------------------------------------------- drivers

def test_raw_window(tide):
    path = tide.add_file('f', SIZE)
    tide.cmd('blockdev-add', driver='raw', node_name='w', file='f', offset=1000, size=5000)
    tide.export('w')
    with connect(tide, 'w') as h:
        size = h.get_size()
        assert size == 5000
        h.pwrite(b'\7' * size, 0)
        h.zero(100, 50)
        assert error_number(lambda: h.pwrite(b'x' * 10, size - 5)) is not None
        assert error_number(lambda: h.pread(10, size - 5)) is not None
    with open(path, 'rb') as f:
        data = f.read()
    assert data == bytes(1000) + b'\7' * 50 + bytes(100) + b'\7' * (size - 150) + bytes(SIZE - 1000 - size)


def test_windows_beside_each_other(tide):
    tide.add_file('f', SIZE)
    for i in range(2):
        tide.cmd('blockdev-add', driver='raw', node_name=f'w{i}', file='f', offset=i * MiB, size=MiB)
        tide.export(f'w{i}')
    qemu_io(tide.uri('w0'), 'write -P 1 0 1M')
    qemu_io(tide.uri('w1'), 'write -P 2 0 1M')
    qemu_io(tide.uri('w0'), 'read -P 1 0 1M')
    qemu_io(tide.uri('w1'), 'read -P 2 0 1M')


@pytest.mark.parametrize('driver', ['null-co', 'null-aio'])
def test_null(tide, driver):
    tide.cmd('blockdev-add', driver=driver, node_name='n')
    tide.export('n')
    with connect(tide, 'n') as h:
        assert h.get_size() == GiB
        h.pwrite(b'x' * 4096, 0)
        assert h.pread(4096, 0) == bytes(4096)
        h.trim(MiB, 0)
        h.zero(MiB, 0)
        h.flush()


@pytest.mark.parametrize('length', [0, 1, 511, 512, 1000])
def test_files_of_odd_length(tide, length):
    path = tide.add_file('f', length)
    tide.export('f')
    with connect(tide, 'f') as h:
        assert h.get_size() == length
        assert h.pread(length, 0) == bytes(length)
    assert os.stat(path).st_size == length


def test_detect_zeroes(tide):
    for mode in ('off', 'on', 'unmap'):
        path = tide.path(mode)
        with open(path, 'wb') as f:
            f.write(b'\1' * MiB)
        tide.cmd('blockdev-add', {'driver': 'file', 'node-name': mode, 'filename': path, 'discard': 'unmap',
                                  'detect-zeroes': mode})
        tide.export(mode)
        tide.cmd('block-dirty-bitmap-add', node=mode, name='b')
        with connect(tide, mode) as h:
            h.pwrite(bytes(MiB), 0)
            assert h.pread(MiB, 0) == bytes(MiB)
        assert (os.stat(path).st_blocks == 0) == (mode == 'unmap')
        assert tide.ranges(mode, 'b') == [(0, MiB)]


def test_discard_ignored_or_passed_on(tide):
    for mode in ('ignore', 'unmap'):
        path = tide.path(mode)
        with open(path, 'wb') as f:
            f.write(b'\1' * MiB)
        tide.cmd('blockdev-add', driver='file', node_name=mode, filename=path, discard=mode)
        tide.export(mode)
        with connect(tide, mode) as h:
            h.trim(MiB, 0)
            assert h.pread(1, 0) == (b'\1' if mode == 'ignore' else b'\0')


def test_direct_io(tide):
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', '..', 'build', f'direct-{os.getpid()}')
    path = tide.path('direct') if not os.path.isdir(os.path.dirname(path)) else os.path.abspath(path)
    try:
        with open(path, 'wb') as f:
            f.truncate(SIZE + 100)
        try:
            tide.cmd('blockdev-add', {'driver': 'file', 'node-name': 'f', 'filename': path, 'cache': {'direct': True}})
        except QmpError as e:
            assert 'direct' in e.desc
            pytest.skip('no direct I/O here')
        tide.export('f')
        with connect(tide, 'f') as h:
            h.pwrite(b'\1' * 10, 5)
            h.pwrite(b'\2' * 3000, 511)
            h.zero(1000, 1000)
            want = bytearray(4096)
            want[5:15], want[511:3511] = b'\1' * 10, b'\2' * 3000
            want[1000:2000] = bytes(1000)
            assert h.pread(4096, 0) == bytes(want)
            h.pwrite(b'\3' * 7, h.get_size() - 7)
        assert os.stat(path).st_size == SIZE + 100
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


# ---------------------------------------------------------------- injected errors

def blkdebug(d, *rules, states=(), **more):
    d.add_file('f', SIZE)
    d.cmd('blockdev-add', {'driver': 'blkdebug', 'node-name': 'b', 'image': 'f', 'inject-error': list(rules),
                           'set-state': list(states), 'discard': 'unmap', **more})
    d.export('b')


@pytest.mark.parametrize('iotype', ['read', 'write', 'write-zeroes', 'discard', 'flush'])
def test_error_by_kind_of_request(tide, iotype):
    blkdebug(tide, {'event': 'none', 'iotype': iotype, 'errno': 28})
    with connect(tide, 'b') as h:
        calls = {'read': lambda: h.pread(512, 0), 'write': lambda: h.pwrite(b'x' * 512, 0), 'flush': h.flush,
                 'write-zeroes': lambda: h.zero(512, 0), 'discard': lambda: h.trim(512, 0)}
        for kind, call in calls.items():
            if kind == iotype:
                assert error_number(call) == 'ENOSPC'
            else:
                call()


@pytest.mark.parametrize('number,wire', [(1, 'EPERM'), (5, 'EIO'), (12, 'ENOMEM'), (22, 'EINVAL'), (27, 'ENOSPC'),
                                         (28, 'ENOSPC'), (30, 'EPERM'), (95, 'ENOTSUP'), (108, 'ESHUTDOWN')])
def test_errors_on_the_wire(tide, number, wire):
    blkdebug(tide, {'event': 'write_aio', 'errno': number})
    with connect(tide, 'b') as h:
        assert error_number(lambda: h.pwrite(b'x', 0)) == wire


def test_error_once_and_by_sector(tide):
    blkdebug(tide, {'event': 'write_aio', 'once': True, 'sector': 8}, {'event': 'read_aio', 'sector': 16})
    with connect(tide, 'b') as h:
        h.pwrite(b'x' * 4096, 0)
        h.pwrite(b'x' * 512, 9 * 512)
        assert error_number(lambda: h.pwrite(b'x' * 2, 8 * 512 - 1)) == 'EIO'
        h.pwrite(b'x' * 8192, 0)
        for _ in range(2):
            assert error_number(lambda: h.pread(1, 17 * 512 - 1)) == 'EIO'
        h.pread(512, 15 * 512)
        h.pread(512, 17 * 512)


def test_error_after_a_state(tide):
    blkdebug(tide, {'event': 'write_aio', 'state': 2},
             states=[{'event': 'flush_to_disk', 'state': 1, 'new_state': 2},
                     {'event': 'flush_to_disk', 'state': 2, 'new_state': 3}])
    with connect(tide, 'b') as h:
        h.pwrite(b'x', 0)
        h.flush()
        assert error_number(lambda: h.pwrite(b'x', 0)) == 'EIO'


def test_failed_write_changes_nothing_below(tide):
    blkdebug(tide, {'event': 'write_aio', 'iotype': 'write'}, align=4096)
    with connect(tide, 'b') as h:
        error_number(lambda: h.pwrite(b'x' * 100, 50))
        assert h.pread(4096, 0) == bytes(4096)


@pytest.mark.parametrize('align', [512, 4096, 65536])
def test_alignment_keeps_neighbours(tide, align):
    blkdebug(tide, align=align)
    want = bytearray(SIZE)
    with connect(tide, 'b') as h:
        for offset, length in [(1, 1), (align - 1, 2), (3 * align - 7, align + 9), (SIZE - 3, 3), (10, 100000)]:
            h.pwrite(b'\5' * length, offset)
            want[offset:offset + length] = b'\5' * length
        for offset, length in [(77, 3 * align), (SIZE - align - 1, align)]:
            h.zero(length, offset)
            want[offset:offset + length] = bytes(length)
        assert h.pread(SIZE, 0) == bytes(want)


# ---------------------------------------------------------------- who may write

def test_read_only_nodes(tide):
    path = tide.add_file('f', SIZE)
    tide.cmd('blockdev-del', node_name='f')
    tide.cmd('blockdev-add', driver='file', node_name='f', filename=path, read_only=True)
    tide.cmd('blockdev-add', driver='raw', node_name='r', file='f')  # as the reference: refused when somebody writes
    for node in ('f', 'r'):
        with pytest.raises(QmpError, match="'f' is read-only"):
            tide.export(node)
        tide.export(node, writable=False)
        with connect(tide, node) as h:
            assert h.is_read_only()
            for call in (lambda: h.pwrite(b'x', 0), lambda: h.zero(1, 0), lambda: h.trim(1, 0)):
                assert error_number(call) == 'EPERM'
            h.pread(512, 0)
    tide.add_file('s', SIZE)
    assert 'read-only' in refused(tide, 'blockdev-backup', job_id='j', device='s', target='r', sync='full')


def test_read_only_export_of_a_writable_node(tide):
    tide.add_file('f', SIZE)
    tide.export('f', 'w')
    tide.export('f', 'r', writable=False)
    with connect(tide, 'r') as h, connect(tide, 'w') as w:
        assert error_number(lambda: h.pwrite(b'x', 0)) == 'EPERM'
        w.pwrite(b'\1', 0)
        assert h.pread(1, 0) == b'\1'


def test_two_writable_exports_of_one_node(tide):
    tide.add_file('f', SIZE)
    for name in ('a', 'b'):
        tide.export('f', name)
    qemu_io(tide.uri('a'), 'write -P 1 0 64k')
    qemu_io(tide.uri('b'), 'read -P 1 0 64k', 'write -P 2 0 64k')
    qemu_io(tide.uri('a'), 'read -P 2 0 64k')


def test_locks_against_other_programs(tide):
    """A node without users holds nothing; a reader shares; a writer lets others read, not write."""
    path = tide.add_file('f', SIZE)

    def can(*commands, read_only=False):
        r = tool('qemu-io', *(['-r'] if read_only else []), '-f', 'raw', *[x for c in commands for x in ('-c', c)], path)
        assert r.returncode == 0 or 'lock' in r.stderr, r.stderr
        return r.returncode == 0
    assert can('write 0 64k')
    tide.export('f', 'r', writable=False)
    assert can('read 0 64k', read_only=True)
    assert can('write 0 64k'), 'as beside the reference: see the next test'
    tide.export('f', 'w')
    assert not can('write 0 64k')
    assert can('read 0 64k', read_only=True)
    assert tool('qemu-img', 'info', '-U', path).returncode == 0
    unexport(tide, 'w')
    assert can('read 0 64k', read_only=True)
    unexport(tide, 'r')
    assert can('write 0 64k')


@pytest.mark.parametrize('ours', [None, False, True], ids=['unused', 'reader', 'writer'])
@pytest.mark.parametrize('command', ['read', 'write', 'info', 'share'])
def test_locks_are_those_of_the_reference(ours, command):
    """What a tool may do beside an export is the same beside qemu-storage-daemon."""
    results = []
    for kind in ('tidemarkd', 'qsd'):
        with Daemon(kind=kind) as d:
            path = d.add_disk('d', SIZE)
            if ours is not None:
                d.export('d', writable=ours)
            args = {'read': ('qemu-io', '-r', '-f', 'raw', '-c', 'read 0 64k', path),
                    'write': ('qemu-io', '-f', 'raw', '-c', 'write 0 64k', path),
                    'info': ('qemu-img', 'info', path), 'share': ('qemu-img', 'info', '-U', path)}[command]
            results.append(tool(*args).returncode)
    if (ours, command) == (True, 'write'):  # on purpose: what others write here, no bitmap would show
        assert results[0] != 0
    else:
        assert results[0] == results[1]


def test_locks_of_others_are_respected(tide):
    """What another daemon writes is not written here; nothing of the attempt stays."""
    with Daemon(kind='qsd') as other:
        path = other.add_disk('d', SIZE)
        other.export('d')
        tide.cmd('blockdev-add', driver='file', node_name='f', filename=path)
        with pytest.raises(QmpError) as e:
            tide.export('f')
        assert path in e.value.desc and 'lock' in e.value.desc
        assert tide.cmd('query-block-exports') == []
        tide.cmd('blockdev-add', driver='file', node_name='s', filename=path, read_only=True, force_share=True)
        tide.export('s', writable=False)
        unexport(other, 'd')
        other.cmd('blockdev-del', node_name='d')
        tide.export('f')
        with pytest.raises(QmpError):
            other.add_disk('d', SIZE)
            other.export('d')
    qemu_io(tide.uri('f'), 'write 0 64k')


def test_two_nodes_on_one_file(tide):
    """Bare nodes may be there twice; two writers may not, unless told not to lock."""
    path = tide.add_file('a', SIZE)
    tide.cmd('blockdev-add', driver='file', node_name='b', filename=path)
    tide.export('a')
    with pytest.raises(QmpError, match='lock'):
        tide.export('b')
    unexport(tide, 'a')
    tide.export('b')
    tide.cmd('blockdev-add', driver='file', node_name='c', filename=path, locking='off')
    tide.export('c')


def test_backup_job_keeps_new_writers_off_what_it_reads(tide):
    """Below the node that is copied nobody may begin to write: the job would miss it."""
    tide.cmd('blockdev-add', driver='null-co', node_name='f', size=SIZE, latency_ns=1000000)
    tide.cmd('blockdev-add', driver='raw', node_name='d', file='f')
    tide.add_file('t', SIZE)
    tide.cmd('blockdev-backup', job_id='j', device='d', target='t', sync='none')
    with pytest.raises(QmpError):
        tide.export('f')
    for node in ('d', 'f', 't'):
        refused(tide, 'blockdev-del', node_name=node)
    tide.cmd('job-cancel', id='j')
    tide.qmp.job_end('j')
    tide.export('f')


def test_failed_export_gives_its_locks_back(tide):
    path = tide.add_file('f', SIZE)
    tide.cmd('block-dirty-bitmap-add', node='f', name='b')
    with pytest.raises(QmpError):
        tide.export('f', bitmaps=['b', 'zz'])
    assert tool('qemu-io', '-f', 'raw', '-c', 'write 0 64k', path).returncode == 0
    assert tide.bitmap('f', 'b')['busy'] is False
