# SPDX-License-Identifier: Apache-2.0
"""Long reads of cached data, which are sent from the file without passing through the daemon. What
clients see is what they would see otherwise, whatever the client, the file and the monitor do."""
import os
import random
import struct
import subprocess
import time

import pytest

from backup_tools import content, fill
from harness import DEADLINE, Daemon, KiB, MiB
from nbd_raw import READ, WRITE, Raw, request

SIZE = 64 * MiB


@pytest.fixture
def d():
    with Daemon() as daemon:
        fill(daemon.add_disk('disk', SIZE), MiB)
        daemon.export('disk')
        content(daemon.path('disk.raw'))  # now it is cached
        yield daemon


def client(d, mode='simple'):
    c = Raw(d.nbd_path)
    assert c.go('disk', mode=mode)[-1][0] == 1
    return c


def sends_files(d, c):
    """Do long reads use sendfile(2)? Only where the kernel tells what is cached. It may take the cache away at any
    time: one of ten reads is enough."""
    log = d.path('trace')
    t = subprocess.Popen(['strace', '-f', '-e', 'trace=sendfile', '-o', log, '-p', str(d.proc.pid)],
                         stderr=subprocess.PIPE, text=True)
    t.stderr.readline()  # attached
    for _ in range(10):
        content(d.path('disk.raw'))
        c.request(READ, 0, MiB)
    t.terminate()
    t.wait(DEADLINE)
    with open(log) as f:
        return 'sendfile' in f.read()


@pytest.mark.skipif('asan' in os.environ.get('TIDEMARK_BUILD', '') or
                    'tsan' in os.environ.get('TIDEMARK_BUILD', ''), reason='strace and sanitizers do not go together')
def test_it_is_what_is_tested(d):
    kernel = tuple(int(n) for n in os.uname().release.split('.')[:2])
    if kernel < (6, 5):
        pytest.skip('cachestat(2) needs Linux 6.5')
    assert sends_files(d, client(d))


@pytest.mark.parametrize('mode', ['simple', 'structured', 'extended'])
def test_any_range(d, mode):
    data, rng = content(d.path('disk.raw')), random.Random(1)
    c = client(d, mode)
    for _ in range(60):
        length = rng.choice([64 * KiB, 64 * KiB + 1, 128 * KiB, MiB, 3 * MiB + 511, 32 * MiB])
        offset = rng.randrange(SIZE - length + 1)
        assert c.request(READ, offset, length).data == data[offset:offset + length]


def take_replies(c, want):
    """Replies in any order; `want`: cookie to data."""
    while want:
        magic, error, cookie = struct.unpack('>IIQ', c.take(16))
        assert (magic, error) == (0x67446698, 0)
        data = want.pop(cookie)
        assert c.take(len(data)) == data


def test_many_at_once_with_small_ones_and_writes(d):
    data, rng = content(d.path('disk.raw')), random.Random(2)
    c = client(d)
    for _ in range(20):
        want, out = {}, b''
        for cookie in range(30):
            kind = rng.randrange(3)
            length = [4 * KiB, 100 * KiB, MiB][kind]
            if rng.randrange(6) == 0:
                out += request(WRITE, 60 * MiB + cookie * 4096, 4096, cookie=cookie) + bytes(4096)
                want[cookie] = b''
            else:
                offset = rng.randrange(60 * MiB - length)
                out += request(READ, offset, length, cookie=cookie)
                want[cookie] = data[offset:offset + length]
        c.send(out)
        take_replies(c, want)


def test_a_client_that_does_not_read_holds_up_no_transaction(d):
    """Its reads are admitted while they are sent. They give up soon, and at once when a list waits."""
    data, c = content(d.path('disk.raw')), client(d)
    c.send(b''.join(request(READ, i * MiB, MiB, cookie=i) for i in range(40)))
    for i in range(20):
        begin = time.monotonic()
        d.cmd('transaction', actions=[{'type': 'block-dirty-bitmap-add',
                                       'data': {'node': 'disk', 'name': f'b{i}'}}])
        assert time.monotonic() - begin < 15
    take_replies(c, {i: data[i * MiB:(i + 1) * MiB] for i in range(40)})
    assert client(d).request(READ, 5, 70000).data == data[5:70005]


def test_export_is_deleted_under_it(d):
    c = client(d)
    c.send(b''.join(request(READ, i * MiB, MiB, cookie=i) for i in range(60)))
    d.cmd('block-export-del', id='exp-disk', mode='hard')
    d.qmp.event('BLOCK_EXPORT_DELETED', id='exp-disk')
    d.cmd('blockdev-del', node_name='disk')
    with pytest.raises((EOFError, ConnectionResetError)):
        c.take(61 * MiB)


def test_file_is_cut_under_it(d):
    """What is gone reads as zeros, as with short reads; nothing crashes, and the length is right."""
    data, c = content(d.path('disk.raw')), client(d)
    assert c.request(READ, 10 * MiB, 2 * MiB).data == data[10 * MiB:12 * MiB]
    os.truncate(d.path('disk.raw'), 11 * MiB)
    assert c.request(READ, 10 * MiB, 2 * MiB).data == data[10 * MiB:11 * MiB] + bytes(MiB)
    assert c.request(READ, 20 * MiB, MiB).data == bytes(MiB)


def test_not_cached(d):
    data, c = content(d.path('disk.raw')), client(d)
    fd = os.open(d.path('disk.raw'), os.O_RDWR)
    for offset in (0, MiB, MiB + 4096, 3 * MiB):
        os.fsync(fd)
        os.posix_fadvise(fd, offset, 256 * KiB, os.POSIX_FADV_DONTNEED)
        assert c.request(READ, offset - offset % 8192, MiB).data == \
            data[offset - offset % 8192:][:MiB]
    os.close(fd)


def test_what_was_written_is_read(d):
    """By the same client and by another, right after the reply to the write."""
    a, b = client(d), client(d)
    for i in range(100):
        block = bytes([i + 1]) * 128 * KiB
        assert a.request(WRITE, i * 1000, len(block), payload=block).error == 0
        assert b.request(READ, i * 1000, len(block)).data == block
        assert a.request(READ, i * 1000, len(block)).data == block


def test_injected_errors_are_not_passed_by(d):
    """A node that may fail reads has no file to send from."""
    d.cmd('blockdev-add', driver='blkdebug', node_name='bad', image='disk', read_only=True,
          inject_error=[{'event': 'none', 'iotype': 'read', 'errno': 5, 'sector': 100}])
    d.export('bad', writable=False)
    c = Raw(d.nbd_path)
    c.go('bad', structured=True)
    assert c.request(READ, 0, MiB).error == 5
    assert c.request(READ, MiB, MiB).error == 0
