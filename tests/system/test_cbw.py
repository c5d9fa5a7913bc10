# SPDX-License-Identifier: Apache-2.0
"""Copy before write: a backup holds what the source held at its transaction, byte for byte.

Writers hammer the source over several connections. For the reference they stand still while the
transaction is answered and the source file is copied; then all goes on at once.
"""
import contextlib
import os
import random
import threading

import nbd
import pytest

from backup_tools import (GRANULE, OK, ONE_BY_ONE, assert_same, backup_args, block_job, content, end_of,
                          faulty, fill, held, job, release, transaction, until)
from harness import Daemon, KiB, MiB, qemu_io

SIZE = 24 * MiB + 3 * 512  # neither whole granules nor whole bitmap bits


def wait_all(h, cookies, left=0):
    """Until all but `left` of these commands have succeeded."""
    cookies = list(cookies)
    while len(cookies := [c for c in cookies if not h.aio_command_completed(c)]) > left:
        h.poll(-1)
    return cookies


class Writer(threading.Thread):
    """Keeps a batch of writes, zeroes and trims in flight on a connection of its own."""

    def __init__(self, uri, size, seed, depth=16):
        super().__init__(daemon=True)
        self.uri, self.size, self.depth = uri, size, depth
        self.random = random.Random(seed)
        self.data = self.random.randbytes(512 * KiB)
        self.standing = threading.Lock()  # held by whoever wants the writer to stand still
        self.turnstile = threading.Lock()
        self.done = False
        self.error = None
        self.batches = 0

    def one(self, h):
        r = self.random
        length = min(r.choice([512, 4 * KiB, 64 * KiB, 100 * KiB + 512, 200 * KiB]), self.size)
        offset = r.randrange(0, (self.size - length) // 512 + 1) * 512
        kind = r.randrange(10)
        if kind == 0:
            return h.aio_zero(length, offset)
        if kind == 1:
            return h.aio_zero(length, offset, flags=nbd.CMD_FLAG_NO_HOLE)
        if kind == 2:
            return h.aio_trim(length, offset)
        at = r.randrange(len(self.data) - length)
        return h.aio_pwrite(bytearray(self.data[at:at + length]), offset)

    def run(self):
        try:
            h = nbd.NBD()
            h.connect_uri(self.uri)
            while not self.done:
                with self.turnstile:
                    pass
                with self.standing:
                    wait_all(h, [self.one(h) for _ in range(self.depth)])
                self.batches += 1
            h.shutdown()
        except nbd.Error as e:
            self.error = e


class Writers:
    def __init__(self, uris, size, per_uri=3):
        self.all = [Writer(u, size, 10 * i + k) for i, u in enumerate(uris) for k in range(per_uri)]

    def __enter__(self):
        for w in self.all:
            w.start()
        self.wait_batches(1)
        return self

    def __exit__(self, kind, value, tb):
        for w in self.all:
            w.done = True
        for w in self.all:
            w.join(60)
            assert not w.is_alive()
            assert kind or w.error is None, w.error

    def wait_batches(self, n):
        goal = [w.batches + n for w in self.all]
        until('writers go on', lambda: all(w.batches >= g or w.error for w, g in zip(self.all, goal)))

    @contextlib.contextmanager
    def standing(self):
        with contextlib.ExitStack() as stack:
            for w in self.all:
                stack.enter_context(w.turnstile)
            for w in self.all:
                stack.enter_context(w.standing)
            yield


@pytest.fixture(params=['full', 'empty'])
def d(request):
    """Two disks and targets; sources begin full of data or as one hole."""
    with Daemon() as daemon:
        for n in 'ab':
            path = daemon.add_disk(n, SIZE, discard='unmap')
            if request.param == 'full':
                fill(path, SIZE)
            daemon.add_disk('t' + n, SIZE, discard='unmap')
            daemon.cmd('block-dirty-bitmap-add', node=n, name='m', granularity=32 * KiB)
        yield daemon


def backup_both(d, writers, sync, **kw):
    """One grouped transaction; returns when both jobs have ended well, and compares."""
    args = {'bitmap': 'm', 'bitmap-mode': 'on-success', **kw}
    if sync == 'incremental':
        del args['bitmap-mode']
    with writers.standing():
        transaction(d, *[('blockdev-backup', {**backup_args(n, 't' + n, sync, job_id='j' + n), **args})
                         for n in 'ab'], grouped=True)
        reference = {n: content(d.path(n + '.raw')) for n in 'ab'}
    for n in 'ab':
        assert end_of(d, 'j' + n) == OK
    for n in 'ab':
        assert_same(reference[n], d.path(f't{n}.raw'))


@pytest.mark.parametrize('speed', [0, 48 * MiB])
def test_writers_do_not_reach_the_backup(d, speed):
    with Writers([d.export(n) for n in 'ab'], SIZE) as writers:
        backup_both(d, writers, 'full', speed=speed)
        for _ in range(3):
            writers.wait_batches(1)
            backup_both(d, writers, 'incremental', speed=speed,
                        **{'x-perf': {'max-chunk': random.Random(1).choice([64, 256]) * KiB}})


def test_errors_that_are_tried_again(d):
    """Failed units go back to the work list while writers hit them: nothing of theirs gets out."""
    faulty(d, 'bad', 'ta', *[{'iotype': t, 'sector': s * 1024, 'once': True}
                             for s in range(40) for t in ('write', 'write-zeroes')])
    with Writers([d.export('a')], SIZE) as writers:
        for sync in ('full', 'incremental'):
            mode = {'bitmap-mode': 'on-success'} if sync == 'full' else {}
            with writers.standing():
                transaction(d, ('blockdev-backup', {**backup_args('a', 'bad', sync, bitmap='m'), **mode,
                                                    'on-target-error': 'ignore'}))
                reference = content(d.path('a.raw'))
            assert d.qmp.job_end('j')[-5:] == OK[-5:]
            assert_same(reference, d.path('ta.raw'))
            writers.wait_batches(1)


def test_every_granule_is_hit_before_it_is_copied(d):
    """With the job held, each granule's old data goes through memory to the target."""
    before = content(d.path('a.raw'))
    uri = d.export('a')
    held(d, 'a', 'ta')
    h = nbd.NBD()
    h.connect_uri(uri)
    for off in range(0, SIZE - GRANULE, GRANULE):
        h.pwrite(b'new!' * 128, off + 512)
    h.pwrite(b'new!' * 128, SIZE - 512)
    h.shutdown()
    until('all old data is on the target', lambda: job(d, 'j')['current-progress'] >= SIZE - GRANULE)
    release(d)
    assert end_of(d, 'j') == OK
    assert_same(before, d.path('ta.raw'))


@pytest.mark.parametrize('command', ['zero', 'trim'])
def test_a_long_zero_and_trim_are_copied_first(d, command):
    before = content(d.path('a.raw'))
    h = nbd.NBD()
    h.connect_uri(d.export('a'))
    held(d, 'a', 'ta')
    getattr(h, command)(SIZE, 0)
    h.shutdown()
    release(d)
    assert end_of(d, 'j') == OK
    assert_same(before, d.path('ta.raw'))
    if command == 'zero':
        assert not any(content(d.path('a.raw')))


def test_none_copies_only_what_is_overwritten(d):
    before = content(d.path('a.raw'))
    uri = d.export('a')
    d.cmd('blockdev-backup', backup_args('a', 'ta', 'none'))
    qemu_io(uri, 'write -P 1 70k 1k', 'write -P 2 1M 128k', 'discard 2M 64k')
    until('old data is on the target', lambda: job(d, 'j')['current-progress'] == 4 * GRANULE)
    qemu_io(uri, 'write -P 3 70k 1k')  # the second time the target keeps the first
    d.cmd('job-cancel', id='j')
    assert 'BLOCK_JOB_CANCELLED' in d.qmp.job_end('j')
    expected = bytearray(SIZE)
    for off in (GRANULE, 1 * MiB, 1 * MiB + GRANULE, 2 * MiB):
        expected[off:off + GRANULE] = before[off:off + GRANULE]
    assert_same(bytes(expected), d.path('ta.raw'))


def test_a_stopped_target_does_not_stop_guests(d):
    """on-target-error=stop: guests write on, the job waits with their old data, then ends well."""
    faulty(d, 'bad', 'ta', {'iotype': 'write', 'sector': 0, 'once': True},
           {'iotype': 'write-zeroes', 'sector': 0, 'once': True})
    fill(d.path('a.raw'), GRANULE)
    before = content(d.path('a.raw'))
    uri = d.export('a')
    d.cmd('blockdev-backup', backup_args('a', 'bad', speed=1, x_perf=ONE_BY_ONE, on_target_error='stop'))
    d.qmp.event('BLOCK_JOB_ERROR')
    d.qmp.event('JOB_STATUS_CHANGE', id='j', status='paused')
    qemu_io(uri, 'write -P 7 0 20M')
    row = block_job(d, 'j')
    assert row['paused'] and row['io-status'] == 'failed'
    d.cmd('job-resume', id='j')
    release(d)
    assert d.qmp.job_end('j')[-5:] == OK[-5:]
    assert_same(before, d.path('ta.raw'))


def test_a_failed_job_lets_guests_go_on():
    """And the bitmap has it all."""
    with Daemon() as d:
        fill(d.add_disk('a', SIZE), SIZE)
        d.add_disk('ta', SIZE)
        d.cmd('block-dirty-bitmap-add', node='a', name='m')
        faulty(d, 'bad', 'ta', {'iotype': 'write', 'sector': 200 * GRANULE // 512})
        uri = d.export('a')
        with Writers([uri], SIZE) as writers:
            d.cmd('blockdev-backup', backup_args('a', 'bad', bitmap='m', bitmap_mode='on-success',
                                                 speed=100 * MiB))
            events = d.qmp.job_end('j')
            assert events[-3:] == ['BLOCK_JOB_COMPLETED!', 'S:concluded', 'S:null'], events
            writers.wait_batches(2)
            with writers.standing():
                reference = content(d.path('a.raw'))
                dirty = bytearray(SIZE)
                for off, length in d.ranges('a', 'm'):
                    dirty[off:off + length] = reference[off:off + length]
        # Random data was there first, so what is not dirty is as fill() made it.
        original = random.Random(1).randbytes(SIZE)
        clean = [o for o in range(0, SIZE - GRANULE, GRANULE) if reference[o:o + GRANULE] != original[o:o + GRANULE]]
        for o in clean:
            assert dirty[o:o + GRANULE] == reference[o:o + GRANULE], f'changed but clean at {o}'


def test_a_stalled_target_fails_the_job_not_the_guests():
    """64 MiB of old data fit into memory; then a guest waits 5 s at most, and the job has failed."""
    size, room = 80 * MiB, 64 * MiB
    with Daemon() as d:
        fill(d.add_disk('a', size), size)
        d.cmd('block-dirty-bitmap-add', node='a', name='m')
        d.cmd('blockdev-add', driver='null-co', node_name='slow', size=size, **{'latency-ns': 5_800_000_000})
        h = nbd.NBD()
        h.connect_uri(d.export('a'))
        d.cmd('blockdev-backup', backup_args('a', 'slow', bitmap='m', bitmap_mode='on-success'))
        block = bytearray(b'x' * MiB)
        t0 = os.times().elapsed
        for off in range(0, room, MiB):
            h.pwrite(block, off)
        quick = os.times().elapsed - t0
        assert quick < 5, quick
        assert job(d, 'j')['status'] == 'running'
        t0 = os.times().elapsed
        h.pwrite(block, room)
        waited = os.times().elapsed - t0
        assert waited < 15, waited
        t0 = os.times().elapsed
        for off in range(room + MiB, size, MiB):
            h.pwrite(block, off)
        assert os.times().elapsed - t0 < 10  # each waiting in turn, it were a minute
        h.shutdown()
        done = d.qmp.event('BLOCK_JOB_COMPLETED')['data']
        assert done['error']
        d.qmp.job_end('j')
        assert d.bitmap('a', 'm')['count'] == size
        assert "guest writes waited for memory" in d.log(), 'they are counted'


def seconds_after_cancel():
    """That guests still wait for memory. There is some when the target has answered, which takes 4 s."""
    size = 72 * MiB
    with Daemon() as d:
        fill(d.add_disk('a', size), size)
        d.cmd('blockdev-add', driver='null-co', node_name='slow', size=size, **{'latency-ns': 4_000_000_000})
        h = nbd.NBD()
        h.connect_uri(d.export('a'))
        d.cmd('blockdev-backup', backup_args('a', 'slow'))
        writes = [h.aio_pwrite(bytearray(b'x' * MiB), off) for off in range(0, size, MiB)]
        writes = wait_all(h, writes, left=8)  # memory is full
        d.cmd('job-cancel', id='j')
        t0 = os.times().elapsed
        wait_all(h, writes)
        waited = os.times().elapsed - t0
        assert 'BLOCK_JOB_CANCELLED' in d.qmp.job_end('j')
        return waited


def test_cancel_frees_guests_that_wait_for_memory():
    assert any(seconds_after_cancel() < 1.5 for _ in range(3))  # a busy machine may hold up one, but not all of them
