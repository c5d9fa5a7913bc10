# SPDX-License-Identifier: Apache-2.0
"""Dirty bitmaps by plain commands: names, granularities, what sets bits, states, merge, hashes, ranges."""
import hashlib
import itertools
import os

import nbd
import pytest

from harness import Daemon, GiB, KiB, MiB, QmpError, TiB, qemu_io

SIZE = 16 * MiB
G = 64 * KiB
ADD, REMOVE, CLEAR, ENABLE, DISABLE, MERGE = (
    'block-dirty-bitmap-' + k for k in ('add', 'remove', 'clear', 'enable', 'disable', 'merge'))
SHA = 'x-debug-block-dirty-bitmap-sha256'


@pytest.fixture
def disk(tide):
    """The daemon with node `d` of 16 MiB, exported writable, discard=unmap."""
    tide.add_disk('d', SIZE, discard='unmap')
    tide.export('d')
    return tide


def refused(d, command, /, **args):
    with pytest.raises(QmpError) as e:
        d.cmd(command, **args)
    assert e.value.cls == 'GenericError'
    return e.value.desc


def connect(d, name='d'):
    h = nbd.NBD()
    h.connect_uri(d.uri(name))
    return h


def write(d, *ranges, name='d'):
    h = connect(d, name)
    for offset, length in ranges:
        h.pwrite(b'\x5a' * length, offset)
    h.shutdown()


def packed(n_bits, dirty):
    """The bytes that the hash is made of."""
    out = bytearray((n_bits + 63) // 64 * 8)
    for i in dirty:
        out[i // 8] |= 1 << i % 8
    return bytes(out)


def sha(n_bits, dirty=()):
    return hashlib.sha256(packed(n_bits, dirty)).hexdigest()


def make_busy(d, name, node='d'):
    d.export(node, 'busy-' + name, writable=False, bitmaps=[{'node': node, 'name': name}])


def make_idle(d, name):
    d.cmd('block-export-del', id='exp-busy-' + name)
    d.qmp.event('BLOCK_EXPORT_DELETED', id='exp-busy-' + name)


# ---------------------------------------------------------------- names and granularities

NAMES = ['b', 'a b', '/', ':', '..', 'ä€\U0001f600', 'line\nbreak', '\t', '"\\', '%s%n', '#block1', '-', "'", '\x7f',
         '\x01', 'x' * 1023, '\u20ac' * 341]


@pytest.mark.parametrize('name', NAMES, ids=[repr(n[:12]) for n in NAMES])
def test_names(tide, name):
    tide.add_file('f', MiB)
    tide.cmd(ADD, node='f', name=name)
    assert tide.bitmap('f', name)['name'] == name
    assert 'exists' in refused(tide, ADD, node='f', name=name)
    for command in (DISABLE, ENABLE, CLEAR):
        tide.cmd(command, node='f', name=name)
    tide.cmd(MERGE, node='f', target=name, bitmaps=[name, {'node': 'f', 'name': name}])
    assert tide.sha256('f', name) == sha(16) and tide.ranges('f', name) == []
    tide.cmd(REMOVE, node='f', name=name)
    assert 'dirty-bitmaps' not in tide.node('f')


BAD_NAMES = ['', 'x' * 1024, '\u20ac' * 341 + 'x', 'x' * 1023 + '\u20ac', 'x' * MiB, 'a\0b', '\0']


@pytest.mark.parametrize('name', BAD_NAMES, ids=[repr(n[-8:]) + str(len(n)) for n in BAD_NAMES])
def test_bad_names(tide, name):
    tide.add_file('f', MiB)
    assert 'UTF-8' not in refused(tide, ADD, node='f', name=name)
    assert 'dirty-bitmaps' not in tide.node('f')


@pytest.mark.parametrize('name', ['x' * 5000, '\u20ac' * 3000, 'a' + '\u20ac' * 3000, 'ab' + '\u20ac' * 3000])
def test_errors_cut_long_names_at_a_character(tide, name):
    """The quoted name is cut; what is left is what the client sent."""
    tide.add_file('f', MiB)
    for command in (REMOVE, CLEAR, ENABLE, SHA):
        desc = refused(tide, command, node='f', name=name)
        assert name[:20] in desc and len(desc.encode()) < 1000
    assert name[:20] in refused(tide, ADD, node=name, name='b')


@pytest.mark.parametrize('granularity', [512 << i for i in range(23)])
def test_granularities(tide, granularity):
    tide.add_file('f', 3 * MiB + 512)
    tide.cmd(ADD, node='f', name='b', granularity=granularity)
    row = tide.bitmap('f', 'b')
    assert isinstance(row.pop('generation'), int)
    assert row == {'name': 'b', 'count': 0, 'granularity': granularity, 'recording': True,
                   'busy': False, 'persistent': False}
    assert tide.sha256('f', 'b') == sha(-(-(3 * MiB + 512) // granularity))


@pytest.mark.parametrize('granularity', [0, 1, 256, 511, 513, 1000, 65537, 2 ** 31 + 1, 3 * 2 ** 30])
def test_bad_granularities(tide, granularity):
    tide.add_file('f', MiB)
    assert str(granularity) in refused(tide, ADD, node='f', name='b', granularity=granularity)


@pytest.mark.parametrize('granularity', [2 ** 32, -1, -512, 2 ** 63, 0.5, '65536', None, True])
def test_granularities_that_are_no_uint32(tide, granularity):
    tide.add_file('f', MiB)
    assert 'granularity' in refused(tide, ADD, node='f', name='b', granularity=granularity)
    assert 'dirty-bitmaps' not in tide.node('f')


def test_default_granularity(tide):
    tide.add_disk('d', MiB)
    for node in ('d', 'd-file'):
        tide.cmd(ADD, node=node, name='b')
        assert tide.bitmap(node, 'b')['granularity'] == 65536


def test_wrong_node_or_bitmap(tide):
    tide.add_file('f', MiB)
    for command, args in [(ADD, {'name': 'b'}), (REMOVE, {'name': 'b'}), (CLEAR, {'name': 'b'}), (ENABLE, {'name': 'b'}),
                          (DISABLE, {'name': 'b'}), (SHA, {'name': 'b'}), ('query-dirty-ranges', {'name': 'b'}),
                          (MERGE, {'target': 'b', 'bitmaps': []})]:
        for node in ('zz', '', '/'):
            assert f"'{node}'" in refused(tide, command, node=node, **args)
        if command != ADD:
            desc = refused(tide, command, node='f', **args)
            assert "'b'" in desc and "'f'" in desc


def test_persistent_needs_a_store(tide):
    """Never silently kept in memory only."""
    tide.add_file('f', MiB)
    assert 'persistent' in refused(tide, ADD, node='f', name='b', persistent=True)
    assert tide.bitmap('f', 'b') is None
    tide.cmd(ADD, node='f', name='b', persistent=False)


def test_newest_first(tide):
    tide.add_file('f', MiB)
    for name in ('one', 'two', 'three'):
        tide.cmd(ADD, node='f', name=name, disabled=name == 'two')
    rows = tide.node('f')['dirty-bitmaps']
    assert [(r['name'], r['recording']) for r in rows] == [('three', True), ('two', False), ('one', True)]
    tide.cmd(REMOVE, node='f', name='two')
    assert [r['name'] for r in tide.node('f')['dirty-bitmaps']] == ['three', 'one']


def test_bitmaps_of_nodes_are_apart(tide):
    tide.add_disk('d', MiB)
    tide.add_file('f', MiB)
    for node in ('d', 'd-file', 'f'):
        tide.cmd(ADD, node=node, name='b')
    tide.cmd(REMOVE, node='d-file', name='b')
    assert tide.bitmap('d', 'b') and tide.bitmap('f', 'b')


def test_bitmap_goes_with_its_node(tide):
    path = tide.add_file('f', MiB)
    tide.cmd(ADD, node='f', name='b')
    tide.cmd('blockdev-del', node_name='f')
    tide.cmd('blockdev-add', driver='file', node_name='f', filename=path)
    assert tide.bitmap('f', 'b') is None


# ---------------------------------------------------------------- what sets bits

def test_writes_set_bits(disk):
    disk.cmd(ADD, node='d', name='b')
    disk.cmd(ADD, node='d', name='fine', granularity=512)
    write(disk, (0, 1), (G - 1, 2), (SIZE - 1, 1), (5 * G + 100, 3000))
    assert disk.ranges('d', 'b') == [(0, 2 * G), (5 * G, G), (SIZE - G, G)]
    assert disk.ranges('d', 'fine') == [(0, 512), (G - 512, 1024), (5 * G, 3584), (SIZE - 512, 512)]
    assert disk.bitmap('d', 'b')['count'] == 4 * G
    assert disk.sha256('d', 'b') == sha(256, [0, 1, 5, 255])


def test_reads_flush_and_status_set_none(disk):
    disk.cmd(ADD, node='d', name='b')
    qemu_io(disk.uri('d'), 'read 0 1M', 'flush', 'map', 'read 8M 64k')
    h = connect(disk)
    h.cache(MiB, 0)
    h.shutdown()
    assert disk.ranges('d', 'b') == []


@pytest.mark.parametrize('unmap', [True, False])
def test_zeroes_always_discard_only_when_passed_on(tide, unmap):
    tide.add_disk('d', SIZE, **({'discard': 'unmap'} if unmap else {}))
    tide.export('d')
    tide.cmd(ADD, node='d', name='b')
    h = connect(tide)
    h.zero(G, 2 * G)
    h.zero(1, 5 * G, nbd.CMD_FLAG_NO_HOLE)
    assert tide.ranges('d', 'b') == [(2 * G, G), (5 * G, G)]
    tide.cmd(CLEAR, node='d', name='b')
    h.trim(2 * G, 7 * G)
    h.trim(1000, SIZE - 1000)
    assert tide.ranges('d', 'b') == ([(7 * G, 2 * G), (SIZE - G, G)] if unmap else [])
    h.shutdown()


def test_fast_zero_that_is_refused_and_bad_requests_set_none(disk):
    disk.cmd(ADD, node='d', name='b')
    disk.export('d', 'ro', writable=False)
    h = connect(disk)
    h.set_strict_mode(0)
    ro = connect(disk, 'ro')
    ro.set_strict_mode(0)
    for call in (lambda: h.pwrite(b'x' * 512, SIZE), lambda: h.zero(G, SIZE - 1), lambda: h.trim(G, SIZE),
                 lambda: ro.pwrite(b'x' * 512, 0), lambda: ro.zero(512, 0), lambda: ro.trim(512, 0)):
        with pytest.raises(nbd.Error):
            call()
    assert disk.ranges('d', 'b') == []
    h.shutdown()
    ro.shutdown()


def test_failed_write_is_marked(tide):
    """Marked before it is tried: after a failure nobody knows what the disk holds."""
    tide.add_file('f', MiB)
    tide.cmd('blockdev-add', {'driver': 'blkdebug', 'node-name': 'd', 'image': 'f',
                              'inject-error': [{'event': 'write_aio', 'sector': 0}]})
    tide.export('d')
    tide.cmd(ADD, node='d', name='b')
    h = connect(tide)
    with pytest.raises(nbd.Error):
        h.pwrite(b'x' * 512, 0)
    h.shutdown()
    assert tide.ranges('d', 'b') == [(0, G)]


def test_disabled_bitmap_records_nothing(disk):
    disk.cmd(ADD, node='d', name='on')
    disk.cmd(ADD, node='d', name='off', disabled=True)
    write(disk, (0, G))
    disk.cmd(DISABLE, node='d', name='on')
    disk.cmd(ENABLE, node='d', name='off')
    write(disk, (2 * G, G))
    assert disk.ranges('d', 'on') == [(0, G)] and disk.ranges('d', 'off') == [(2 * G, G)]
    for _ in range(2):  # the second time changes nothing
        disk.cmd(ENABLE, node='d', name='on')
        disk.cmd(DISABLE, node='d', name='off')
    write(disk, (4 * G, G))
    assert disk.ranges('d', 'on') == [(0, G), (4 * G, G)] and disk.ranges('d', 'off') == [(2 * G, G)]


def test_write_through_the_upper_node_marks_the_lower_one(tide):
    tide.add_disk('d', MiB)
    tide.cmd(ADD, node='d-file', name='b')
    tide.export('d')
    write(tide, (0, 1))
    assert tide.ranges('d-file', 'b') == [(0, G)]


def test_no_write_slips_past_a_bitmap(tide):
    """Two nodes on one file node: what one writes, the other's bitmap would miss. Refused both ways."""
    tide.add_file('f', MiB)
    for n in ('left', 'right'):
        tide.cmd('blockdev-add', driver='raw', node_name=n, file='f')
    tide.cmd(ADD, node='left', name='b')
    for node in ('right', 'f'):
        with pytest.raises(QmpError, match="'left'"):
            tide.export(node)
    tide.export('left')
    tide.export('right', writable=False)
    tide.cmd('block-export-del', id='exp-left')
    tide.qmp.event('BLOCK_EXPORT_DELETED')
    tide.cmd(REMOVE, node='left', name='b')
    tide.export('right', 'r2')
    for node in ('left',):
        assert "'right'" in refused(tide, ADD, node=node, name='b')
    for node in ('right', 'f'):
        tide.cmd(ADD, node=node, name='b')
    write(tide, (0, 1), name='r2')
    assert tide.ranges('right', 'b') == tide.ranges('f', 'b') == [(0, G)]


@pytest.mark.parametrize('path', ['f.raw', 'hard', 'soft'])
@pytest.mark.parametrize('over', [False, True], ids=['file', 'raw'])
@pytest.mark.parametrize('locking', ['auto', 'off'])
def test_no_write_slips_past_a_bitmap_through_another_node_of_the_file(tide, path, over, locking):
    """The reference lets it happen, and the bitmap, or the copy of a running job, lacks what was written."""
    tide.add_file('f', 4 * MiB, locking=locking)
    if path != 'f.raw':
        (os.link if path == 'hard' else os.symlink)(tide.path('f.raw'), tide.path(path))
    tide.cmd('blockdev-add', driver='file', node_name='other', filename=tide.path(path), locking=locking)
    for name, below in (('top', 'f'), ('beside', 'other')):
        tide.cmd('blockdev-add', driver='raw', node_name=name, file=below)
    tracked, written = ('top', 'beside') if over else ('f', 'other')
    tide.cmd(ADD, node=tracked, name='b')
    with pytest.raises(QmpError, match=f"cannot write to node '{written}': node '{tracked}' has bitmaps"):
        tide.export(written)
    tide.export(written, 'looks', writable=False)
    tide.cmd('block-export-del', id='exp-looks')
    tide.qmp.event('BLOCK_EXPORT_DELETED')
    tide.cmd(REMOVE, node=tracked, name='b')
    tide.add_file('target', 4 * MiB)  # a job that copies
    tide.cmd('blockdev-backup', job_id='j', device=tracked, target='target', sync='full', speed=1)
    with pytest.raises(QmpError, match=f"node '{tracked}' has bitmaps or a job that would miss"):
        tide.export(written)
    tide.cmd('job-cancel', id='j')
    tide.qmp.job_end('j')
    tide.export(written)  # and the other way round
    assert refused(tide, ADD, node=tracked, name='b') == \
        f"node '{tracked}' cannot be tracked: export 'exp-{written}' writes to node '{written}', past it"
    assert 'past it' in refused(tide, 'blockdev-backup', job_id='j', device=tracked, target='target', sync='full')
    tide.cmd(ADD, node=written, name='b')
    if over:
        tide.cmd(ADD, node='other', name='b')


def test_partitions_of_one_file_are_told_apart_through_two_nodes_too(tide):
    tide.add_file('f', 4 * MiB, locking='off')
    tide.cmd('blockdev-add', driver='file', node_name='g', filename=tide.path('f.raw'), locking='off')
    for name, below, offset in (('a', 'f', 0), ('b', 'g', MiB), ('c', 'g', MiB - 512)):
        tide.cmd('blockdev-add', driver='raw', node_name=name, file=below, offset=offset, size=MiB)
    tide.cmd(ADD, node='a', name='b')
    tide.export('b')
    with pytest.raises(QmpError, match="node 'a' has bitmaps"):
        tide.export('c')
    tide.cmd(ADD, node='b', name='b')


def test_partitions_of_one_disk_have_bitmaps_of_their_own(tide):
    """Windows that do not overlap keep out of each other's way; one that overlaps is refused."""
    tide.add_file('f', 4 * MiB)
    for i in range(2):
        tide.cmd('blockdev-add', driver='raw', node_name=f'p{i}', file='f', offset=i * MiB, size=MiB)
        tide.cmd(ADD, node=f'p{i}', name='b')
        tide.export(f'p{i}')
        write(tide, (i * G, 1), name=f'p{i}')
    tide.cmd('blockdev-add', driver='raw', node_name='o', file='f', offset=2 * MiB - 512, size=MiB)
    with pytest.raises(QmpError, match="'p1'"):
        tide.export('o')
    assert "'p1'" in refused(tide, ADD, node='o', name='b')
    tide.cmd('blockdev-add', driver='raw', node_name='after', file='f', offset=2 * MiB)
    tide.export('after')
    tide.cmd(ADD, node='after', name='b')
    assert [tide.ranges(n, 'b') for n in ('p0', 'p1', 'after')] == [[(0, G)], [(G, G)], []]


def test_odd_disk_counts_whole_granules(tide):
    tide.add_disk('d', 100352)
    tide.cmd(ADD, node='d', name='b')
    tide.export('d')
    write(tide, (0, 100352))
    assert tide.bitmap('d', 'b')['count'] == 131072
    assert tide.ranges('d', 'b') == [(0, 100352)]
    assert tide.sha256('d', 'b') == sha(2, [0, 1])


def test_same_bits_as_the_oracle():
    """The same writes at the same granularities: the same hashes in the reference daemon."""
    results = []
    for kind in ('tidemarkd', 'qsd'):
        with Daemon(kind=kind) as d:
            d.add_disk('d', 5 * MiB + 512, discard='unmap')
            d.export('d')
            for g in (512, 4096, 65536, MiB, 16 * MiB):
                d.cmd(ADD, node='d', name=f'b{g}', granularity=g)
            qemu_io(d.uri('d'), 'write 0 512', 'write 1000k 100k', 'write -z 2M 4k', 'discard 3M 65k',
                    f'write {5 * MiB} 512', 'write 123 456')
            results.append({b['name']: (b['count'], d.sha256('d', b['name'])) for b in d.node('d')['dirty-bitmaps']})
    assert results[0] == results[1]


# ---------------------------------------------------------------- states

def test_operations_on_a_busy_bitmap(disk):
    disk.cmd(ADD, node='d', name='b')
    disk.cmd(ADD, node='d', name='other')
    write(disk, (0, G))
    disk.cmd(DISABLE, node='d', name='b')
    make_busy(disk, 'b')
    before = disk.bitmap('d', 'b')
    assert before['busy'] is True
    for command, args in [(CLEAR, {'name': 'b'}), (ENABLE, {'name': 'b'}), (DISABLE, {'name': 'b'}),
                          (REMOVE, {'name': 'b'}), (MERGE, {'target': 'b', 'bitmaps': ['other']}),
                          (MERGE, {'target': 'other', 'bitmaps': ['b']}), (MERGE, {'target': 'b', 'bitmaps': []}),
                          (MERGE, {'target': 'other', 'bitmaps': [{'node': 'd', 'name': 'b'}]})]:
        desc = refused(disk, command, node='d', **args)
        assert "'b'" in desc and 'in use' in desc
    assert 'exists' in refused(disk, ADD, node='d', name='b')
    assert disk.sha256('d', 'b') == sha(256, [0])
    assert disk.ranges('d', 'b') == [(0, G)]
    assert disk.bitmap('d', 'b') == before
    assert disk.ranges('d', 'other') == [(0, G)]
    make_idle(disk, 'b')
    assert disk.bitmap('d', 'b') == {**before, 'busy': False}
    disk.cmd(CLEAR, node='d', name='b')


def test_one_user_at_a_time(disk):
    disk.cmd(ADD, node='d', name='b', disabled=True)
    make_busy(disk, 'b')
    for form in ('b', {'node': 'd', 'name': 'b'}):
        with pytest.raises(QmpError, match='in use'):
            disk.export('d', 'again', writable=False, bitmaps=[form])
    assert disk.bitmap('d', 'b')['busy'] is True
    make_idle(disk, 'b')
    assert disk.bitmap('d', 'b')['busy'] is False


def test_bitmap_of_a_pending_job(disk):
    """The job has copied and waits: it owns the bitmap, a successor records, queries say so."""
    disk.add_disk('t', SIZE)
    disk.cmd(ADD, node='d', name='b')
    write(disk, (0, G))
    disk.cmd('blockdev-backup', job_id='j', device='d', target='t', sync='incremental', bitmap='b', auto_finalize=False)
    disk.qmp.event('JOB_STATUS_CHANGE', status='pending')
    write(disk, (4 * G, G))
    row = disk.bitmap('d', 'b')
    assert row['busy'] is True and row['recording'] is True
    assert 'in use' in refused(disk, CLEAR, node='d', name='b')
    assert 'in use' in refused(disk, 'blockdev-backup', job_id='k', device='d', target='t', sync='incremental',
                               bitmap='b')
    disk.cmd('job-finalize', id='j')
    disk.qmp.job_end('j')
    assert disk.ranges('d', 'b') == [(4 * G, G)] and disk.bitmap('d', 'b')['busy'] is False


def test_enabled_bitmap_and_read_only_export(disk):
    disk.cmd(ADD, node='d', name='b')
    with pytest.raises(QmpError, match="'b'"):
        disk.export('d', 'x', writable=False, bitmaps=['b'])
    assert disk.bitmap('d', 'b')['busy'] is False
    disk.export('d', 'x', writable=True, bitmaps=['b'])


def test_busy_bitmap_holds_its_node(tide):
    tide.add_file('f', MiB)
    tide.cmd(ADD, node='f', name='b', disabled=True)
    make_busy(tide, 'b', 'f')
    assert "'f'" in refused(tide, 'blockdev-del', node_name='f')
    make_idle(tide, 'b')
    tide.cmd('blockdev-del', node_name='f')


# ---------------------------------------------------------------- merge

@pytest.fixture
def pair(tide):
    """Nodes d and e of 16 MiB, a third one of another size; bitmaps with bits."""
    for node in ('d', 'e'):
        tide.add_disk(node, SIZE)
        tide.export(node)
    tide.add_disk('small', SIZE // 2)
    for node, name, ranges in [('d', 'a', [(0, 1)]), ('d', 'b', [(G, 1)]), ('e', 'c', [(2 * G, 1)])]:
        tide.cmd(ADD, node=node, name=name)
        write(tide, *ranges, name=node)
        tide.cmd(DISABLE, node=node, name=name)
    tide.cmd(ADD, node='small', name='s')
    tide.cmd(ADD, node='d', name='t')
    return tide


def test_merge_of_strings_and_objects(pair):
    pair.cmd(MERGE, node='d', target='t', bitmaps=['a', {'node': 'd', 'name': 'b'}, {'node': 'e', 'name': 'c'}])
    assert pair.ranges('d', 't') == [(0, 3 * G)]
    assert pair.ranges('d', 'a') == [(0, G)] and pair.ranges('e', 'c') == [(2 * G, G)]
    pair.cmd(MERGE, node='d', target='t', bitmaps=['a', 'a', 't', 'a'])
    assert pair.ranges('d', 't') == [(0, 3 * G)]


def test_merged_target_and_source_live_apart(pair):
    """Contents are shared inside; writes after a merge show in one only."""
    pair.cmd(MERGE, node='d', target='t', bitmaps=['a'])
    pair.cmd(ENABLE, node='d', name='a')
    pair.cmd(DISABLE, node='d', name='t')
    write(pair, (9 * G, 1))
    assert pair.ranges('d', 'a') == [(0, G), (9 * G, G)] and pair.ranges('d', 't') == [(0, G)]
    pair.cmd(CLEAR, node='d', name='a')
    assert pair.ranges('d', 't') == [(0, G)]


def test_merge_into_itself_and_from_nothing(pair):
    for sources in ([], ['a'], [{'node': 'd', 'name': 'a'}], ['a', 'a']):
        pair.cmd(MERGE, node='d', target='a', bitmaps=sources)
        assert pair.ranges('d', 'a') == [(0, G)]


def test_merge_from_nothing_checks_the_target(pair):
    assert "'zz'" in refused(pair, MERGE, node='d', target='zz', bitmaps=[])
    make_busy(pair, 'a')
    assert 'in use' in refused(pair, MERGE, node='d', target='a', bitmaps=[])


@pytest.mark.parametrize('bad,words', [
    (['nope'], ["'nope'", "'d'"]), ([{'node': 'e', 'name': 'nope'}], ["'nope'", "'e'"]), (['c'], ["'c'"]),
    ([{'node': 'zz', 'name': 'c'}], ["'zz'"]), ([''], ["''"]),
    ([{'node': 'small', 'name': 's'}], ['16777216', '8388608'])])
@pytest.mark.parametrize('place', [0, 1, 2])
def test_merge_is_all_or_nothing(pair, bad, words, place):
    sources = ['a', 'b']
    sources[place:place] = bad
    for target in ('t', 'a'):
        before = pair.sha256('d', target)
        desc = refused(pair, MERGE, node='d', target=target, bitmaps=sources)
        for w in words:
            assert w in desc
        assert pair.sha256('d', target) == before


@pytest.mark.parametrize('element', [5, None, [], True, {}, {'name': 'a'}, {'node': 'd'}, {'node': 'd', 'bitmap': 'a'},
                                     {'node': 'd', 'name': 'a', 'x': 1}, {'node': 1, 'name': 'a'}])
def test_merge_sources_of_a_wrong_kind(pair, element):
    assert 'bitmaps[1]' in refused(pair, MERGE, node='d', target='t', bitmaps=['a', element])
    assert pair.ranges('d', 't') == []


@pytest.mark.parametrize('source,target', itertools.product([512, 4 * KiB, 64 * KiB, MiB, 4 * GiB // 2], repeat=2))
def test_merge_across_granularities(tide, source, target):
    """A set bit of the source sets every bit of the target that it touches."""
    size = 3 * MiB + 512
    tide.add_disk('d', size)
    tide.export('d')
    tide.cmd(ADD, node='d', name='s', granularity=source)
    tide.cmd(ADD, node='d', name='t', granularity=target, disabled=True)
    write(tide, (700 * KiB, 100), (size - 1, 1))
    tide.cmd(MERGE, node='d', target='t', bitmaps=['s'])
    bits = {i for o, n in tide.ranges('d', 's') for i in range(o // target, (o + n - 1) // target + 1)}
    assert tide.sha256('d', 't') == sha(-(-size // target), bits)


def test_names_of_2018(pair):
    pair.cmd('x-block-dirty-bitmap-merge', {'node': 'd', 'dst_name': 't', 'src_name': 'a'})
    assert pair.ranges('d', 't') == [(0, G)]
    for args in ({'dst_name': 't', 'src_name': 'nope'}, {'dst_name': 'nope', 'src_name': 'a'}):
        with pytest.raises(QmpError, match="'nope'"):
            pair.cmd('x-block-dirty-bitmap-merge', {'node': 'd', **args})
    pair.cmd('x-block-dirty-bitmap-disable', node='d', name='t')
    assert pair.bitmap('d', 't')['recording'] is False
    pair.cmd('x-block-dirty-bitmap-enable', node='d', name='t')
    assert pair.bitmap('d', 't')['recording'] is True


# ---------------------------------------------------------------- looking inside

def test_known_hashes(tide):
    tide.add_disk('d', 16 * MiB)
    tide.export('d')
    tide.cmd(ADD, node='d', name='b')
    write(tide, (0, 1), (2 * G, 1))
    assert tide.sha256('d', 'b') == hashlib.sha256(b'\x05' + bytes(31)).hexdigest()
    tide.add_disk('e', MiB)
    tide.cmd(ADD, node='e', name='b')
    assert tide.sha256('e', 'b') == hashlib.sha256(bytes(8)).hexdigest()


@pytest.mark.parametrize('n_bits', [1, 7, 8, 9, 63, 64, 65, 127, 128, 32767, 32768, 32769, 100000])
def test_hash_of_every_second_bit(tide, n_bits):
    tide.add_disk('d', n_bits * 512)
    tide.export('d')
    tide.cmd(ADD, node='d', name='b', granularity=512)
    dirty = list(range(0, n_bits, max(2, n_bits // 50 | 1))) + [n_bits - 1]
    write(tide, *[(i * 512, 1) for i in dirty])
    assert tide.sha256('d', 'b') == sha(n_bits, dirty)
    write(tide, *[(i * MiB, min(MiB, n_bits * 512 - i * MiB)) for i in range(-(-n_bits * 512 // MiB))])
    assert tide.sha256('d', 'b') == sha(n_bits, range(n_bits))
    assert tide.bitmap('d', 'b')['count'] == n_bits * 512


def test_huge_disks_cost_nothing(tide):
    for i, size in enumerate([64 * TiB, 2 ** 63 - 1 - 511, 2 ** 63 - 1]):
        node = f'n{i}'
        tide.cmd('blockdev-add', driver='null-co', node_name=node, size=size)
        tide.cmd(ADD, node=node, name='b', granularity=2 ** 31)
        assert tide.ranges(node, 'b') == []
    tide.export('n0')
    write(tide, (64 * TiB - 1, 1), name='n0')
    assert tide.ranges('n0', 'b') == [(64 * TiB - 2 ** 31, 2 ** 31)]


def test_too_fine_names_what_works(tide):
    tide.cmd('blockdev-add', driver='null-co', node_name='n', size=2 ** 63 - 1)
    desc = refused(tide, ADD, node='n', name='b', granularity=512)
    finest = max(int(w) for w in desc.replace(',', ' ').replace(';', ' ').split() if w.isdigit())
    tide.cmd(ADD, node='n', name='b', granularity=finest)
    refused(tide, ADD, node='n', name='c', granularity=finest // 2)


def test_pages_of_ranges(disk):
    disk.cmd(ADD, node='d', name='b', granularity=512)
    want = [(i * 1024, 512) for i in range(2500)]
    h = connect(disk)
    cookies = [h.aio_pwrite(bytearray(512), o) for o, _ in want]
    while not all(h.aio_command_completed(c) for c in cookies[-1:]):
        h.poll(-1)
    while h.aio_in_flight():
        h.poll(-1)
    h.shutdown()
    assert disk.ranges('d', 'b') == want, 'pages of the default length'
    for limit in (1, 7, 999, 2499, 2500, 2501, 2 ** 32 - 1):
        if limit == 1:
            page = disk.cmd('query-dirty-ranges', node='d', name='b', limit=1)
            assert page == {'ranges': [{'offset': 0, 'length': 512}], 'next': 1024}
            continue
        got, offset, pages = [], 0, 0
        while offset is not None:
            page = disk.cmd('query-dirty-ranges', node='d', name='b', offset=offset, limit=limit)
            assert len(page['ranges']) <= limit
            got += [(r['offset'], r['length']) for r in page['ranges']]
            offset = page.get('next')
            pages += 1
        assert got == want and pages == -(-len(want) // limit)


def test_ranges_from_an_offset(disk):
    disk.cmd(ADD, node='d', name='b')
    write(disk, (G, 3 * G), (SIZE - G, G))
    tail = {'offset': SIZE - G, 'length': G}

    def ranges(offset):
        return disk.cmd('query-dirty-ranges', node='d', name='b', offset=offset)['ranges']
    assert ranges(0) == [{'offset': G, 'length': 3 * G}, tail]
    assert ranges(2 * G) == [{'offset': 2 * G, 'length': 2 * G}, tail]
    assert ranges(2 * G + 5)[-1] == tail and sum(r['length'] for r in ranges(2 * G + 5)[:1]) <= 2 * G
    assert ranges(4 * G) == [tail]
    assert ranges(SIZE) == ranges(SIZE + 1) == ranges(2 ** 63 - 1) == []
    assert 'limit' in refused(disk, 'query-dirty-ranges', node='d', name='b', limit=0)
    assert 'limit' in refused(disk, 'query-dirty-ranges', node='d', name='b', limit=2 ** 32)


def test_many_bitmaps(tide):
    """A few hundred on one node: all are marked, all go."""
    tide.add_disk('d', SIZE)
    tide.export('d')
    names = [f'b{i}' for i in range(300)]
    tide.cmd('transaction', actions=[{'type': ADD, 'data': {'node': 'd', 'name': n}} for n in names])
    write(tide, (3 * G, 1))
    assert {b['count'] for b in tide.node('d')['dirty-bitmaps']} == {G}
    tide.cmd('transaction', actions=[{'type': REMOVE, 'data': {'node': 'd', 'name': n}} for n in names])
    assert 'dirty-bitmaps' not in tide.node('d')


def test_bitmaps_change_under_writers(disk):
    """Bitmaps come, go, are switched and cleared while four connections write: nothing breaks, and the
    one that was always there misses nothing."""
    disk.cmd(ADD, node='d', name='all', granularity=4096)
    handles = [connect(disk) for _ in range(4)]
    done = 0
    try:
        for i in range(60):
            for k, h in enumerate(handles):
                for j in range(8):
                    h.aio_pwrite(bytearray(4096), ((i * 8 + j) * 4 + k) * 4096)
            disk.cmd(ADD, node='d', name='x')
            disk.cmd(MERGE, node='d', target='x', bitmaps=['all'])
            disk.cmd(CLEAR, node='d', name='x')
            disk.cmd(DISABLE, node='d', name='x')
            disk.cmd(REMOVE, node='d', name='x')
            for h in handles:
                while h.aio_in_flight():
                    h.poll(-1)
            done = (i + 1) * 32 * 4096
    finally:
        for h in handles:
            h.shutdown()
    assert disk.ranges('d', 'all') == [(0, done)]
