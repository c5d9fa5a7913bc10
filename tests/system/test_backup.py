# SPDX-License-Identifier: Apache-2.0
"""blockdev-backup: what is refused, what is copied, what becomes of the bitmap."""
import os

import pytest

from backup_tools import (GRANULE, OK, assert_same, backup, backup_args, block_job, content,
                          end_of, faulty, fill, held, job, refused, release, transaction, until,
                          wait_copied)
from harness import Daemon, KiB, MiB, qemu_io

SIZE = 16 * MiB


@pytest.fixture
def d():
    with Daemon() as daemon:
        fill(daemon.add_disk('src', SIZE), SIZE)
        daemon.add_disk('dst', SIZE)
        yield daemon


def add_bitmap(d, **kw):
    d.cmd('block-dirty-bitmap-add', {'node': 'src', 'name': 'b', **kw})


# ---------------------------------------------------------------- what is refused (7.1)

REFUSALS = [
    ({'device': 'zz'}, ['zz']),
    ({'target': 'zz'}, ['zz']),
    ({'sync': 'incremental'}, ['bitmap', 'incremental']),
    ({'sync': 'bitmap'}, ['bitmap']),
    ({'sync': 'bitmap', 'bitmap-mode': 'never'}, ['bitmap']),
    ({'sync': 'incremental', 'bitmap': 'b', 'bitmap-mode': 'never'}, ['on-success', 'incremental']),
    ({'sync': 'incremental', 'bitmap': 'b', 'bitmap-mode': 'always'}, ['on-success', 'incremental']),
    ({'sync': 'incremental', 'bitmap': 'zz'}, ['zz']),
    ({'sync': 'bitmap', 'bitmap': 'zz', 'bitmap-mode': 'always'}, ['zz']),
    ({'sync': 'bitmap', 'bitmap': 'b'}, ['bitmap-mode']),
    ({'sync': 'full', 'bitmap': 'b'}, ['bitmap-mode']),
    ({'sync': 'none', 'bitmap': 'b', 'bitmap-mode': 'on-success'}, ['none']),
    ({'sync': 'full', 'bitmap': 'b', 'bitmap-mode': 'never'}, ['never', 'full']),
    ({'sync': 'top', 'bitmap': 'b', 'bitmap-mode': 'never'}, ['never', 'top']),
    ({'bitmap-mode': 'always'}, ['bitmap']),
    ({'target': 'src'}, ['src']),
    ({'target': 'src-file'}, ['src-file']),
    ({'compress': True}, ['dst']),
    ({'x-perf': {'max-workers': 0}}, ['max-workers', '2147483647']),
    ({'x-perf': {'max-workers': 1 << 31}}, ['max-workers', '2147483647']),
    ({'x-perf': {'max-chunk': 512}}, ['max-chunk', '512', '65536']),
    ({'x-perf': {'max-chunk': -1}}, ['max-chunk']),
    ({'target': 'small'}, ['size']),
    ({'job-id': '1x'}, ['1x']),
    ({'job-id': 'a b'}, ['a b']),
    ({'speed': -1}, ['speed']),
    ({'sync': 'fool'}, ['sync', 'fool']),
    ({'on-target-error': 'fool'}, ['on-target-error', 'fool']),
]


def test_refusals(d):
    d.add_disk('small', SIZE - 512)
    add_bitmap(d)
    uri = d.export('src')
    qemu_io(uri, 'write -P 1 0 64k')
    before = d.node('src')
    for change, words in REFUSALS:
        with refused(*words):
            d.cmd('blockdev-backup', {**backup_args('src', 'dst'), **change})
        assert d.cmd('query-jobs') == [], change
    assert d.node('src') == before  # the bitmap is neither busy nor changed
    qemu_io(uri, 'write -P 1 64k 64k')
    backup(d, 'src', 'dst', 'incremental', bitmap='b')
    assert end_of(d, 'j') == OK


def test_argument_checks_come_in_the_contracts_order(d):
    """Node before bitmap arguments before the bitmap's state before x-perf before sizes before id."""
    d.add_disk('small', SIZE - 512)
    bad = {'job-id': '1x', 'device': 'zz', 'target': 'small', 'sync': 'incremental',
           'x-perf': {'max-workers': 0}}
    with refused('zz'):
        d.cmd('blockdev-backup', bad)
    bad['device'] = 'src'
    with refused('bitmap', 'incremental'):
        d.cmd('blockdev-backup', bad)
    bad['bitmap'] = 'nope'
    with refused('nope'):
        d.cmd('blockdev-backup', bad)
    add_bitmap(d)
    bad['bitmap'] = 'b'
    with refused('max-workers'):
        d.cmd('blockdev-backup', bad)


def test_busy_bitmap_is_refused(d):
    add_bitmap(d)
    d.cmd('block-dirty-bitmap-disable', node='src', name='b')
    d.export('src', bitmaps=['b'])
    for sync, mode in (('incremental', None), ('bitmap', 'never'), ('full', 'always')):
        with refused("'b'", 'in use'):
            backup(d, 'src', 'dst', sync, bitmap='b', **({'bitmap_mode': mode} if mode else {}))


def test_busy_target_is_refused(d):
    d.add_disk('src2', SIZE)
    held(d, 'src', 'dst')
    with refused('dst', "'j'"):
        backup(d, 'src2', 'dst', job_id='k')
    with refused('dst'):
        d.export('dst')  # a guest must not write into a target
    with refused('dst'):
        d.cmd('blockdev-del', {'node-name': 'dst'})
    with refused('src'):
        d.cmd('blockdev-del', {'node-name': 'src'})
    release(d)
    assert end_of(d, 'j') == OK
    backup(d, 'src2', 'dst', job_id='k')
    assert end_of(d, 'k') == OK


def test_read_only_target_is_refused(d):
    d.add_disk('ro', SIZE, **{'read-only': True})
    with refused('ro'):
        backup(d, 'src', 'ro')


# ---------------------------------------------------------------- what is copied

@pytest.mark.parametrize('sync', ['full', 'top'])
@pytest.mark.parametrize('perf', [{}, {'use-copy-range': False}, {'max-workers': 1},
                                  {'max-chunk': 64 * KiB, 'max-workers': 3},
                                  {'max-chunk': 200 * KiB, 'use-copy-range': True}])
def test_whole_disk(d, sync, perf):
    backup(d, 'src', 'dst', sync, x_perf=perf)
    assert end_of(d, 'j') == OK
    assert_same(d.path('src.raw'), d.path('dst.raw'))


@pytest.mark.parametrize('size', [512, 4096, 64 * KiB - 512, 64 * KiB, 64 * KiB + 512,
                                  MiB + 512, 3 * MiB + 100 * KiB + 1024])
@pytest.mark.parametrize('sync', ['full', 'incremental'])
def test_odd_sizes(size, sync):
    with Daemon() as d:
        fill(d.add_disk('src', size), size)
        d.add_disk('dst', size)
        d.cmd('block-dirty-bitmap-add', node='src', name='b', granularity=1024)
        mode = {} if sync == 'incremental' else {'bitmap_mode': 'on-success'}
        length = min(size, 3 * 512)
        qemu_io(d.export('src'), f'write -P 5 {size - length} {length}')
        backup(d, 'src', 'dst', sync, bitmap='b', **mode)
        done = d.qmp.event('BLOCK_JOB_COMPLETED')['data']
        assert done['len'] == done['offset'] and done['len'] <= size
        assert 'S:null' in d.qmp.job_end('j')
        start = 0 if sync == 'full' else (size - length) // GRANULE * GRANULE
        expected = bytes(start) + content(d.path('src.raw'))[start:]
        assert_same(expected, d.path('dst.raw'))
        assert d.bitmap('src', 'b')['count'] == 0


def test_incremental_chain(d):
    """Full, then three increments onto one target; each brings it up to date, and copies no more."""
    uri = d.export('src')
    add_bitmap(d)
    backup(d, 'src', 'dst', bitmap='b', bitmap_mode='on-success')
    assert end_of(d, 'j') == OK
    for i in range(1, 4):
        qemu_io(uri, f'write -P {i} {i}M 100k', f'write -z {i + 4}M 64k', f'write -P {i} 15M 512')
        backup(d, 'src', 'dst', 'incremental', bitmap='b')
        done = d.qmp.event('BLOCK_JOB_COMPLETED')['data']
        assert done['len'] == done['offset'] == 4 * GRANULE
        assert 'S:null' in d.qmp.job_end('j')
        assert_same(d.path('src.raw'), d.path('dst.raw'))


@pytest.mark.parametrize('granularity', [512, 4096, 64 * KiB, MiB])
def test_bitmap_granularities(d, granularity):
    add_bitmap(d, granularity=granularity)
    qemu_io(d.export('src'), 'write -P 1 1M 512', 'write -P 2 3000k 64k')
    backup(d, 'src', 'dst', 'bitmap', bitmap='b', bitmap_mode='never')
    assert end_of(d, 'j') == OK
    src, expected = content(d.path('src.raw')), bytearray(SIZE)
    for off, length in d.ranges('src', 'b'):
        start, end = off // GRANULE * GRANULE, -(-(off + length) // GRANULE) * GRANULE
        expected[start:end] = src[start:end]
    assert_same(bytes(expected), d.path('dst.raw'))


def test_none_never_ends_by_itself(d):
    backup(d, 'src', 'dst', 'none')
    qemu_io(d.export('src'), 'write -P 1 0 64k')
    until('the old data is there', lambda: job(d, 'j')['current-progress'] == GRANULE)
    assert job(d, 'j')['status'] == 'running'
    d.cmd('block-job-cancel', device='j')
    assert 'BLOCK_JOB_CANCELLED' in d.qmp.job_end('j')


@pytest.mark.parametrize('perf', [{}, {'use-copy-range': False}])
def test_holes_stay_holes(d, perf):
    """And where the data passes through us, data that is zero becomes a hole, too."""
    size = 32 * MiB
    path = d.add_disk('sparse', size)
    d.add_disk('t', size)
    with open(path, 'r+b') as f:
        f.seek(8 * MiB)
        f.write(b'data' * (GRANULE // 4))
        f.seek(20 * MiB)
        f.write(bytes(4 * MiB))
    backup(d, 'sparse', 't', x_perf=perf)
    assert end_of(d, 'j') == OK
    assert_same(path, d.path('t.raw'))
    allocated = os.stat(d.path('t.raw')).st_blocks * 512
    assert allocated < (MiB if perf else 5 * MiB)


@pytest.mark.parametrize('zeroes', ['hole', 'data'])
def test_zeroes_overwrite_what_the_target_has(d, zeroes):
    path = d.add_disk('z', SIZE)
    if zeroes == 'data':
        with open(path, 'r+b') as f:
            f.write(bytes(SIZE))
    fill(d.path('dst.raw'), SIZE, seed=2)
    backup(d, 'z', 'dst')
    assert end_of(d, 'j') == OK
    assert not any(content(d.path('dst.raw')))


def test_target_of_another_granularity(d):
    """The target's alignment makes the copy unit larger, not the copy wrong."""
    d.cmd('blockdev-add', {'driver': 'blkdebug', 'node-name': 'al', 'image': 'dst', 'align': 4096})
    add_bitmap(d, granularity=512)
    qemu_io(d.export('src'), 'write -P 1 512 512')
    backup(d, 'src', 'al', 'incremental', bitmap='b')
    assert end_of(d, 'j') == OK
    assert content(d.path('dst.raw'))[:GRANULE] == content(d.path('src.raw'))[:GRANULE]


def test_point_in_time_of_plain_and_listed_backup(d):
    """[clear, backup] copies nothing; [backup, clear] is refused, and so is every second owner."""
    add_bitmap(d)
    qemu_io(d.export('src'), 'write -P 1 0 1M')
    inc = backup_args('src', 'dst', 'incremental', bitmap='b')
    with refused("'b'", 'in use'):
        transaction(d, ('blockdev-backup', inc), ('block-dirty-bitmap-clear', {'node': 'src', 'name': 'b'}))
    assert d.bitmap('src', 'b')['count'] == MiB and not d.bitmap('src', 'b')['busy']
    transaction(d, ('block-dirty-bitmap-clear', {'node': 'src', 'name': 'b'}), ('blockdev-backup', inc))
    assert end_of(d, 'j') == OK
    assert not any(content(d.path('dst.raw')))


def test_aborted_list_gives_back_bitmap_and_target(d):
    add_bitmap(d)
    uri = d.export('src')
    qemu_io(uri, 'write -P 1 0 1M')
    hash_before = d.sha256('src', 'b')
    with refused():
        transaction(d, ('blockdev-backup', backup_args('src', 'dst', 'incremental', bitmap='b')), ('abort', {}))
    row = d.bitmap('src', 'b')
    assert not row['busy'] and row['recording'] and d.sha256('src', 'b') == hash_before
    qemu_io(uri, 'write -P 2 2M 64k')
    assert d.bitmap('src', 'b')['count'] == MiB + GRANULE
    assert not any(content(d.path('dst.raw')))
    backup(d, 'src', 'dst', 'incremental', bitmap='b')
    assert end_of(d, 'j') == OK


# ---------------------------------------------------------------- the bitmap's fate (7.2)

DIRTY, NEW, FAILS_AT = 16, 2, 5  # granules: before the job, during it, the first that fails
N = SIZE // GRANULE

# sync, mode, and the dirty granules at the end after success, failure, cancel.
FATES = [
    ('incremental', None, NEW, DIRTY + NEW, DIRTY + NEW),
    ('bitmap', 'on-success', NEW, DIRTY + NEW, DIRTY + NEW),
    ('bitmap', 'never', DIRTY + NEW, DIRTY + NEW, DIRTY + NEW),
    ('bitmap', 'always', NEW, NEW + DIRTY - FAILS_AT, NEW + DIRTY - 1),
    ('full', 'on-success', NEW, DIRTY + NEW, DIRTY + NEW),
    ('full', 'always', NEW, NEW + N - FAILS_AT - NEW, NEW + N - 1 - NEW),
    ('top', 'on-success', NEW, DIRTY + NEW, DIRTY + NEW),
    ('top', 'always', NEW, NEW + N - FAILS_AT - NEW, NEW + N - 1 - NEW),
]
CASES = [(s, m, end, fate) for s, m, *fates in FATES
         for end, fate in zip(('success', 'failure', 'cancel'), fates)]


@pytest.mark.parametrize('enabled', [True, False], ids=['enabled', 'disabled'])
@pytest.mark.parametrize('sync,mode,end,fate', CASES)
def test_fate_of_the_bitmap(d, sync, mode, end, fate, enabled):
    add_bitmap(d)
    uri = d.export('src')
    qemu_io(uri, f'write -P 1 0 {DIRTY * GRANULE}')
    if not enabled:
        d.cmd('block-dirty-bitmap-disable', node='src', name='b')
    target = 'dst'
    if end == 'failure':
        faulty(d, 'bad', 'dst', {'iotype': 'write', 'sector': FAILS_AT * GRANULE // 512})
        target = 'bad'
    at_start = content(d.path('src.raw'))
    held(d, 'src', target, sync, bitmap='b', **({'bitmap_mode': mode} if mode else {}))

    # While it runs: busy, its contents frozen, "recording" as before.
    frozen = d.bitmap('src', 'b')
    assert frozen['busy'] and frozen['count'] == DIRTY * GRANULE and frozen['recording'] == enabled
    qemu_io(uri, 'write -P 2 8M 64k', f'write -P 2 {SIZE - GRANULE + 512} 1k')
    assert d.bitmap('src', 'b')['count'] == DIRTY * GRANULE
    copied_by_writes = NEW if sync in ('full', 'top') else 0
    wait_copied(d, 'j', (1 + copied_by_writes) * GRANULE)

    if end == 'cancel':
        d.cmd('job-cancel', id='j')
    else:
        release(d)
    events = d.qmp.job_end('j')
    word = {'success': 'BLOCK_JOB_COMPLETED', 'failure': 'BLOCK_JOB_COMPLETED!', 'cancel': 'BLOCK_JOB_CANCELLED'}
    assert word[end] in events

    after = d.bitmap('src', 'b')
    new = NEW if enabled else 0
    assert after['count'] == (fate - NEW + new) * GRANULE
    assert not after['busy'] and after['recording'] == enabled
    if end == 'success':  # exactly: what was dirty at the start has gone, the new is there
        ranges = [(8 * MiB, GRANULE), (SIZE - GRANULE, GRANULE)] if enabled else []
        assert d.ranges('src', 'b') == ([(0, DIRTY * GRANULE)] if mode == 'never' else []) + ranges
        length = SIZE if sync in ('full', 'top') else DIRTY * GRANULE
        assert_same(at_start[:length] + bytes(SIZE - length), d.path('dst.raw'))
    check_still_records(d, uri, enabled)


def check_still_records(d, uri, enabled):
    count = d.bitmap('src', 'b')['count']
    d.cmd('block-dirty-bitmap-clear', node='src', name='b')
    qemu_io(uri, 'write -P 3 4M 64k')
    assert d.bitmap('src', 'b')['count'] == (GRANULE if enabled else 0), count


def test_after_a_failed_always_the_next_increment_completes_the_target(d):
    """What mode always is for: the target is partly filled, the bitmap says what is missing."""
    add_bitmap(d)
    uri = d.export('src')
    faulty(d, 'bad', 'dst', {'iotype': 'write', 'sector': 100 * GRANULE // 512, 'once': True})
    backup(d, 'src', 'bad', 'full', bitmap='b', bitmap_mode='always', x_perf={'max-chunk': GRANULE})
    qemu_io(uri, 'write -P 9 1M 3M')
    d.qmp.event('BLOCK_JOB_ERROR')
    assert 'S:null' in d.qmp.job_end('j')
    assert 0 < d.bitmap('src', 'b')['count'] < SIZE
    backup(d, 'src', 'bad', 'bitmap', bitmap='b', bitmap_mode='always')
    assert end_of(d, 'j') == OK
    assert_same(d.path('src.raw'), d.path('dst.raw'))
    assert d.bitmap('src', 'b')['count'] == 0


def test_pending_job_holds_the_bitmap(d):
    add_bitmap(d)
    uri = d.export('src')
    qemu_io(uri, 'write -P 1 0 1M')
    backup(d, 'src', 'dst', 'incremental', bitmap='b', auto_finalize=False)
    d.qmp.event('BLOCK_JOB_PENDING')
    qemu_io(uri, 'write -P 2 2M 64k')
    assert d.bitmap('src', 'b')['busy'] and d.bitmap('src', 'b')['count'] == MiB
    for verb in ('clear', 'enable', 'disable', 'remove'):
        with refused("'b'", 'in use'):
            d.cmd(f'block-dirty-bitmap-{verb}', node='src', name='b')
    d.cmd('job-finalize', id='j')
    assert d.bitmap('src', 'b')['count'] == GRANULE and not d.bitmap('src', 'b')['busy']
    assert 'S:null' in d.qmp.job_end('j')


def test_length_of_a_job_is_what_it_has_to_copy(d):
    add_bitmap(d)
    qemu_io(d.export('src'), 'write -P 1 1M 1', f'write -P 1 {SIZE - 512} 512')
    held(d, 'src', 'dst', 'incremental', bitmap='b')
    assert block_job(d, 'j')['len'] == 2 * GRANULE
    release(d)
    assert end_of(d, 'j') == OK


def test_many_jobs_at_once():
    """Ten disks in one grouped list, all with bitmaps, twice."""
    names = [f'd{i}' for i in range(10)]
    with Daemon() as d:
        for i, n in enumerate(names):
            fill(d.add_disk(n, 2 * MiB), 2 * MiB, seed=i)
            d.add_disk('t' + n, 2 * MiB)
            d.cmd('block-dirty-bitmap-add', node=n, name='b')
            d.export(n)
        for sync in ('full', 'incremental'):
            extra = {'bitmap-mode': 'on-success'} if sync == 'full' else {}
            transaction(d, *[('blockdev-backup', {**backup_args(n, 't' + n, sync, job_id='j' + n, bitmap='b'), **extra})
                             for n in names], grouped=True)
            for n in names:
                assert end_of(d, 'j' + n) == OK
                assert_same(d.path(n + '.raw'), d.path(f't{n}.raw'))
                qemu_io(d.uri(n), 'write -P 7 1M 5k')


# ---------------------------------------------------------------- around a running job

def test_nobody_writes_below_a_job(d):
    """A write that the filter would not see is refused, and so is one into the target."""
    held(d, 'src', 'dst')
    for node in ('src-file', 'dst-file', 'dst'):
        with refused(node):
            d.export(node)
    d.export('src')
    release(d)
    assert end_of(d, 'j') == OK


def test_a_job_marks_the_bitmaps_of_its_target(d):
    d.cmd('block-dirty-bitmap-add', node='dst', name='t')
    add_bitmap(d)
    qemu_io(d.export('src'), 'write -P 1 1M 64k')
    backup(d, 'src', 'dst', 'incremental', bitmap='b')
    assert end_of(d, 'j') == OK
    assert d.ranges('dst', 't') == [(MiB, GRANULE)]
