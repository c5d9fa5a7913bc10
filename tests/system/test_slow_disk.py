# SPDX-License-Identifier: Apache-2.0
"""One disk hangs in real system calls, for as long as a test likes: others' clients and queries go on.

All connections are on one loop, so whatever blocks it holds up the other disk's client, too. The disk
goes on by itself after a while, so that what hangs is a figure and a failure, not a test for ever.
"""
import contextlib
import ctypes
import os
import tempfile
import threading
import time

import nbd
import pytest

from backup_tools import until
from harness import DEADLINE, Daemon, KiB, MiB
from mounts import loop_device, mounted, need_root, partitions, run
from stalled import Stalled

PATIENCE = DEADLINE / 2  # then the disk goes on
BOUND = 3.0              # seconds, on a busy machine under a sanitizer; the manual says 5 ms without
KINDS = ('write', 'write-fua', 'read', 'flush', 'zero', 'trim', 'extents')


@pytest.fixture(autouse=True)
def in_memory(monkeypatch, tmp_path_factory):
    """The daemon's directory, and with it the disk that does not hang: this machine's own may be slow, too."""
    tmp_path_factory.getbasetemp()  # stays where it is
    with contextlib.suppress(OSError):
        room = os.statvfs('/dev/shm')
        if room.f_bavail * room.f_frsize >= 256 * MiB:
            monkeypatch.setattr(tempfile, 'tempdir', '/dev/shm')


@pytest.fixture
def stalled(tmp_path):
    with Stalled(str(tmp_path)) as s:
        yield s


class Hanging:
    """From here to the end of the block the disk hangs, at most for PATIENCE."""

    def __init__(self, stalled):
        self.stalled = stalled
        self.timer = threading.Timer(PATIENCE, stalled.go_on)

    def __enter__(self):
        self.stalled.stop()
        self.begin = time.monotonic()
        self.timer.start()

    def __exit__(self, *exc):
        hung = self.stalled.state() == 'T'
        self.timer.cancel()
        self.stalled.go_on()
        self.timer.join()
        assert hung or exc[0], 'the disk has not hung all the time'


def connect(d, name):
    h = nbd.NBD()
    h.add_meta_context('base:allocation')
    h.connect_uri(d.uri(name))
    return h


def add(d, stalled, name='slow', **options):
    d.cmd('blockdev-add', {'driver': 'file', 'node-name': name, 'filename': stalled.path, 'discard': 'unmap', **options})
    d.export(name)


def start(h, kind, i, done):
    """One request to the disk that hangs; its error number goes to `done`."""
    def end(error):
        done.append(error.value)
        return 1
    at = i * 64 * KiB
    if kind.startswith('write'):
        h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray([i + 1] * 4096)), at, completion=end,
                     flags=nbd.CMD_FLAG_FUA if kind == 'write-fua' else 0)
    elif kind == 'read':
        h.aio_pread(nbd.Buffer(4096), at, completion=end)
    elif kind == 'flush':
        h.aio_flush(completion=end)
    elif kind == 'zero':
        h.aio_zero(4096, at, completion=end)
    elif kind == 'trim':
        h.aio_trim(4096, at, completion=end)
    else:
        h.aio_block_status(4096, at, lambda *a: 0, completion=end)


def push_out(h):
    """All requests are with the daemon."""
    while h.aio_get_direction() & nbd.AIO_DIRECTION_WRITE:
        h.poll(100)


def finish(h, done, n):
    end = time.monotonic() + DEADLINE
    while len(done) < n:
        assert h.poll(1000) >= 0 and time.monotonic() < end


def worst_latency(h, rounds=20):
    """Of requests of every kind, one after the other."""
    calls = (lambda: h.pread(64 * KiB, 0), lambda: h.pwrite(b'x' * 4096, MiB), h.flush, lambda: h.zero(4096, 2 * MiB),
             lambda: h.trim(4096, 3 * MiB), lambda: h.block_status(MiB, 0, lambda *a: 0))
    worst = 0
    for _ in range(rounds):
        for call in calls:
            begin = time.monotonic()
            call()
            worst = max(worst, time.monotonic() - begin)
    return worst


@pytest.mark.parametrize('direct', [False, True], ids=['cached', 'direct'])
def test_requests_of_every_kind(stalled, direct):
    """Also the very first write, before anything is known of the disk."""
    with Daemon(['--loops', '1']) as d:
        add(d, stalled, cache={'direct': direct})
        d.add_file('fast', 16 * MiB, discard='unmap')
        d.export('fast')
        d.cmd('block-dirty-bitmap-add', node='slow', name='b')
        fast = connect(d, 'fast')
        for kind in KINDS:
            slow, done = connect(d, 'slow'), []
            with Hanging(stalled):
                for i in range(4):
                    start(slow, kind, i, done)
                push_out(slow)
                assert worst_latency(fast) < BOUND, kind
                slow.poll(0)
                assert done == [] or kind == 'extents', 'a mount may answer where data lies without asking'
            finish(slow, done, 4)
            assert done == [0] * 4
            if kind == 'write':
                for i in range(4):
                    assert slow.pread(4096, i * 64 * KiB) == bytes([i + 1] * 4096)
                assert d.ranges('slow', 'b') == [(0, 4 * 64 * KiB)]
            slow.shutdown()
        fast.shutdown()


def timed(call):
    begin = time.monotonic()
    result = call()
    return time.monotonic() - begin, result


def test_queries_and_other_disks_commands_go_on(stalled):
    """Sizes are those of the last answer; lists that touch other disks work."""
    with Daemon(['--loops', '1']) as d:
        add(d, stalled)
        d.add_file('fast', 16 * MiB)
        d.export('fast')
        size = d.node('slow')['image']['actual-size']
        slow, done = connect(d, 'slow'), []
        with Hanging(stalled):
            for i in range(4):
                start(slow, 'write', i, done)
            push_out(slow)
            for query in ('query-named-block-nodes', 'query-block', 'query-block-exports', 'query-jobs', 'query-tidemark'):
                for _ in range(3):
                    seconds, rows = timed(lambda: d.cmd(query))
                    assert seconds < BOUND, query
            assert next(r for r in d.cmd('query-block') if r['qdev'].endswith('exp-slow'))['inserted']['image'][
                'actual-size'] == size
            for name in ('a', 'b'):
                assert timed(lambda: d.cmd('block-dirty-bitmap-add', node='fast', name=name))[0] < BOUND
            assert timed(lambda: d.cmd('transaction', actions=[
                {'type': 'block-dirty-bitmap-clear', 'data': {'node': 'fast', 'name': n}} for n in ('a', 'b')]))[0] < BOUND
            assert done == []
        finish(slow, done, 4)
        assert done == [0] * 4
        slow.shutdown()
        d.cmd('block-export-del', id='exp-slow')
        d.qmp.event('BLOCK_EXPORT_DELETED', id='exp-slow')
        d.cmd('blockdev-del', node_name='slow')


@pytest.mark.parametrize('form', ['plain', 'list'])
def test_opening_on_a_mount_that_hangs(stalled, form):
    """blockdev-add waits, and commands behind it; queries and clients do not."""
    with Daemon(['--loops', '1']) as d:
        d.add_file('fast', 16 * MiB, discard='unmap')
        d.export('fast')
        fast, other = connect(d, 'fast'), d.client()
        slow = {'driver': 'file', 'node-name': 'slow', 'filename': stalled.path}
        before = [{'type': 'block-dirty-bitmap-add', 'data': {'node': 'fast', 'name': 'first'}}]
        with Hanging(stalled):
            d.qmp.send({'execute': 'blockdev-add', 'arguments': slow} if form == 'plain' else {
                'execute': 'transaction', 'arguments': {'actions': [*before, {'type': 'blockdev-add', 'data': slow}]}})
            for query in ('query-named-block-nodes', 'query-block-exports'):
                assert timed(lambda: other.cmd(query))[0] < BOUND
            assert worst_latency(fast) < BOUND
            assert [n['node-name'] for n in other.cmd('query-named-block-nodes')] == ['fast']
        assert 'return' in d.qmp.reply()
        assert (d.bitmap('fast', 'first') is not None) == (form == 'list')
        assert d.node('slow')['image']['virtual-size'] == stalled.size
        other.close()
        fast.shutdown()


def test_ending_while_an_opening_hangs(stalled):
    with Daemon(['--loops', '1']) as d:
        other = d.client()
        with Hanging(stalled):
            d.qmp.send({'execute': 'blockdev-add', 'arguments': {
                'driver': 'file', 'node-name': 'slow', 'filename': stalled.path}})
            other.cmd('query-version')
            other.cmd('quit')
        other.close()
        d.quit_check = False
        assert d.proc.wait(60) == 0 and 'Sanitizer' not in d.log(), d.log()


def test_closing_what_hangs(stalled):
    """The question for a size that nobody waits for any more ends before the file is closed; queries
    do not wait for that, and the name is free only afterwards."""
    with Daemon(['--loops', '1']) as d:
        d.add_file('fast', MiB)
        d.cmd('blockdev-add', {'driver': 'raw', 'node-name': 'slow', 'read-only': True, 'file': {
            'driver': 'file', 'node-name': 'below', 'filename': stalled.path}})
        other = d.client()

        def hangs():
            """The kernel answers from its cache for a second."""
            stalled.stop()
            if timed(lambda: other.cmd('query-named-block-nodes'))[0] > 0.08:
                return True
            stalled.go_on()
            return False
        until('the kernel asks for the size', hangs)
        with Hanging(stalled):
            d.qmp.send({'execute': 'blockdev-del', 'arguments': {'node-name': 'slow'}})
            until('it is being deleted', lambda: len(other.cmd('query-named-block-nodes')) == 1)
            seconds, rows = timed(lambda: other.cmd('query-named-block-nodes'))
            assert seconds < BOUND and [n['node-name'] for n in rows] == ['fast']
            other.send({'execute': 'blockdev-add', 'arguments': {'driver': 'null-co', 'node-name': 'slow'}})
        assert d.qmp.reply() == {'return': {}} and other.reply() == {'return': {}}
        assert {n['node-name'] for n in d.cmd('query-named-block-nodes')} == {'slow', 'fast'}
        other.close()


def test_each_of_three_loops_serves_both_disks(stalled):
    with Daemon(['--loops', '3']) as d:
        add(d, stalled)
        d.add_file('fast', 16 * MiB, discard='unmap')
        d.export('fast')
        slow = [connect(d, 'slow') for _ in range(3)]
        fast = [connect(d, 'fast') for _ in range(3)]
        done = [[] for _ in slow]
        with Hanging(stalled):
            for i, h in enumerate(slow):
                start(h, 'write', i, done[i])
                push_out(h)
            assert all(worst_latency(h, 5) < BOUND for h in fast)
            assert done == [[], [], []]
        for h, results in zip(slow, done):
            finish(h, results, 1)
            h.shutdown()
        assert done == [[0]] * 3
        for h in fast:
            h.shutdown()


@pytest.mark.parametrize('direct', [False, True], ids=['cached', 'direct'])
def test_a_local_file_system_whose_device_hangs(tmp_path, direct):
    """With more requests than the device queues: bringing it one more would hang, too."""
    mount = str(tmp_path / 'mount')
    os.mkdir(mount)
    with Stalled(str(tmp_path), size=32 * MiB) as disk, loop_device(disk.path) as device:
        need_root('mkfs.ext4', 'mount')
        assert run('mkfs.ext4', '-q', device).returncode == 0
        with mounted('ext4', device, mount), Daemon(['--loops', '1']) as d:
            path = os.path.join(mount, 'disk')
            with open(path, 'wb') as f:
                f.write(bytes(range(1, 129)) * (16 * MiB // 128))
                f.flush()
                os.fsync(f.fileno())
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            d.cmd('blockdev-add', {'driver': 'file', 'node-name': 'slow', 'filename': path, 'cache': {'direct': direct}})
            d.export('slow')
            d.add_file('fast', 16 * MiB, discard='unmap')
            d.export('fast')
            fast, slow, done = connect(d, 'fast'), [connect(d, 'slow') for _ in range(8)], []
            with Hanging(disk):
                for i in range(256):
                    start(slow[i % 8], 'read', i * 37 % 256, done)
                for h in slow:
                    push_out(h)
                assert worst_latency(fast) < BOUND
                assert len(done) < 128
            for h in slow:
                while h.aio_in_flight():
                    h.poll(1000)
                h.shutdown()
            assert done == [0] * 256
            fast.shutdown()


CACHESTAT = 451


def pages_cached(path, offset, length):
    """None: this kernel does not tell."""
    answer = (ctypes.c_uint64 * 5)()
    with open(path, 'rb') as f:
        r = ctypes.CDLL(None).syscall(CACHESTAT, f.fileno(), (ctypes.c_uint64 * 2)(offset, length), answer, 0)
    return answer[0] if r == 0 else None


@pytest.mark.parametrize('at', [0, 4096, 60 * KiB])
def test_a_page_that_is_on_its_way_for_ever(tmp_path, at):
    """A long read over a page that another read waits for: the cache has the page, but not its data."""
    mount = str(tmp_path / 'mount')
    os.mkdir(mount)
    with Stalled(str(tmp_path), size=32 * MiB) as disk, loop_device(disk.path) as device:
        need_root('mkfs.ext4', 'mount')
        assert run('mkfs.ext4', '-q', device).returncode == 0
        with mounted('ext4', device, mount), Daemon(['--loops', '1']) as d:
            path, missing = os.path.join(mount, 'disk'), 256 * KiB + at
            with open(path, 'w+b') as f:
                f.write(bytes(range(1, 129)) * (16 * MiB // 128))
                f.flush()
                os.fsync(f.fileno())
                assert ctypes.CDLL(None).syncfs(f.fileno()) == 0
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
                for page in range(0, MiB, 4096):
                    if page != missing:
                        os.pread(f.fileno(), 4096, page)
            with open(disk.path, 'r+b') as f:
                os.fsync(f.fileno())
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if pages_cached(path, 0, 512 * KiB) != 127:
                pytest.skip('the page cache of this kernel does as it likes')
            d.cmd('blockdev-add', {'driver': 'file', 'node-name': 'slow', 'filename': path})
            d.export('slow')
            d.add_file('fast', 16 * MiB, discard='unmap')
            d.export('fast')
            fast, a, b, done = connect(d, 'fast'), connect(d, 'slow'), connect(d, 'slow'), []
            with Hanging(disk):
                a.aio_pread(nbd.Buffer(4096), missing, completion=lambda e: done.append(e.value) or 1)
                push_out(a)
                until('the page is on its way', lambda: pages_cached(path, 0, 512 * KiB) != 127)
                if pages_cached(path, 0, 512 * KiB) != 128:
                    pytest.skip('the machine wants the memory of its cache for something else')
                b.aio_pread(nbd.Buffer(512 * KiB), 0, completion=lambda e: done.append(e.value) or 1)
                push_out(b)
                assert worst_latency(fast) < BOUND
                assert not done
            for h in (a, b):
                while h.aio_in_flight():
                    h.poll(1000)
                h.shutdown()
            assert done == [0, 0]
            fast.shutdown()


def test_long_requests_count_as_what_the_device_makes_of_them(tmp_path):
    """Few of them fill its queue: the next would hang with the loop."""
    mount = str(tmp_path / 'mount')
    os.mkdir(mount)
    with Stalled(str(tmp_path), size=32 * MiB) as disk, loop_device(disk.path) as device:
        need_root('mkfs.ext4', 'mount')
        assert run('mkfs.ext4', '-q', device).returncode == 0
        with mounted('ext4', device, mount), Daemon(['--loops', '1']) as d:
            path = os.path.join(mount, 'disk')
            with open(path, 'wb') as f:
                f.write(bytes(range(1, 129)) * (16 * MiB // 128))
                f.flush()
                os.fsync(f.fileno())
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            with open(disk.path, 'r+b') as f:
                os.fsync(f.fileno())
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            d.cmd('blockdev-add', {'driver': 'file', 'node-name': 'slow', 'filename': path, 'cache': {'direct': True}})
            d.export('slow')
            d.add_file('fast', 16 * MiB, discard='unmap')
            d.export('fast')
            fast, slow, done = connect(d, 'fast'), [connect(d, 'slow') for _ in range(10)], []
            with Hanging(disk):
                for i in range(60):
                    slow[i % 10].aio_pread(nbd.Buffer(4 * MiB), i % 4 * 4 * MiB,
                                           completion=lambda e: done.append(e.value) or 1)
                for h in slow:
                    push_out(h)
                assert worst_latency(fast) < BOUND
            for h in slow:
                while h.aio_in_flight():
                    h.poll(1000)
                h.shutdown()
            assert done == [0] * 60
            fast.shutdown()


def test_partitions_share_the_queue_of_their_device(tmp_path):
    """Half of it for each of three would be more than there is."""
    with Stalled(str(tmp_path), size=32 * MiB) as disk, loop_device(disk.path) as device, \
            partitions(device, 3, 8 * MiB) as parts, Daemon(['--loops', '1']) as d:
        d.add_file('fast', 16 * MiB, discard='unmap')
        d.export('fast')
        queue = '/sys/block/' + os.path.basename(device)
        fast, slow, done = connect(d, 'fast'), [], []
        for i, part in enumerate(parts):
            d.cmd('blockdev-add', {'driver': 'host_device', 'node-name': f'p{i}', 'filename': part,
                                   'cache': {'direct': True}})
            d.export(f'p{i}')
            slow.append(connect(d, f'p{i}'))
        with Hanging(disk):
            for i in range(3 * 100):
                start(slow[i % 3], 'read', i // 3, done)
            for h in slow:
                push_out(h)
            assert worst_latency(fast) < BOUND
            with open(f'{queue}/inflight') as inflight, open(f'{queue}/queue/nr_requests') as depth:
                assert 0 < int(inflight.read().split()[0]) <= int(depth.read()) / 2
        for h in slow:
            while h.aio_in_flight():
                h.poll(1000)
            h.shutdown()
        assert done == [0] * 300
        fast.shutdown()
