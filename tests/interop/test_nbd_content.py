# SPDX-License-Identifier: Apache-2.0
"""Whole workloads through clients that people use: fio, nbdfuse, nbdkit, QEMU's tools and a guest.

Each looks at contents: what was written is what is read, what is in the image file, and what the
bitmaps say. Single requests and answers are in test_nbd_clients.py.
"""
import contextlib
import hashlib
import json
import os
import random
import re
import socket
import subprocess
import time

import nbd
import pytest

import nbd_guest
from backup_tools import again_after_a_rest, assert_same, content, end_of, fill, release, transaction, until
from harness import DEADLINE, Daemon, KiB, MiB, QmpError, qemu_io, run, which

SIZE = 8 * MiB
GRANULE = 64 * KiB
needs = {t: pytest.mark.skipif(not which(t), reason=f'{t} is not installed')
         for t in ('fio', 'nbdcopy', 'nbdfuse', 'fusermount3', 'nbdkit', 'nbd-client', 'nbdsh', 'mke2fs',
                   'qemu-img', 'qemu-io', 'qemu-nbd')}


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


def changed(before, after, granule=GRANULE):
    """Numbers of the granules that differ."""
    assert len(before) == len(after)
    return {i // granule for i in range(0, len(after), granule) if before[i:i + granule] != after[i:i + granule]}


def dirty(d, node, name, granule=GRANULE):
    """Numbers of the granules that a bitmap has recorded."""
    return {i for off, n in d.ranges(node, name) for i in range(off // granule, (off + n) // granule)}


def listens(path):
    """A socket is there from bind() on, and refuses connections until listen()."""
    with open('/proc/net/unix') as f:
        return any(words[3] == '00010000' for words in map(str.split, f) if words[-1] == path)


@contextlib.contextmanager
def server(*command, path):
    """A program that serves on the UNIX socket `path` until it is ended."""
    with subprocess.Popen([which(command[0]), *command[1:]], stdin=subprocess.DEVNULL) as proc:
        try:
            until(f'{command[0]} listens', lambda: listens(path) or proc.poll() is not None)
            assert proc.poll() is None, f'{command[0]} ended with {proc.returncode}'
            yield f'nbd+unix:///?socket={path}'
        finally:
            proc.terminate()


# ---------------------------------------------------------------- fio

def fio(d, uri, jobs):
    """Run these jobs at once, each on a connection of its own; all that they verified was right.

    `jobs` is {name: {option: value}}. Returns fio's row of each job.
    """
    common = {'ioengine': 'nbd', 'uri': uri, 'thread': 1, 'iodepth': 16, 'do_verify': 1, 'verify_fatal': 1,
              'verify_state_save': 0}
    with open(d.path('jobs.fio'), 'w') as f:
        for name, options in {'global': common, **jobs}.items():
            f.write(f'[{name}]\n' + ''.join(f'{k}={v}\n' for k, v in options.items()))
    run('fio', '--output-format=json', '--output=' + d.path('fio.json'), d.path('jobs.fio'))
    rows = json.loads(re.sub(r'\A[^{]*', '', content(d.path('fio.json')).decode()))['jobs']
    assert all(r['error'] == 0 for r in rows), rows
    return rows


def add_recorded_disk(d, size, **options):
    """A disk full of random data that has two bitmaps; returns path and contents."""
    path = d.path('disk.raw')
    with open(path, 'wb') as f:
        f.truncate(size)
    fill(path, size)
    try:
        d.add_disk('disk', size, discard='unmap', **options)
    except QmpError as e:
        assert 'direct' in e.desc
        pytest.skip('no direct I/O here')
    for granularity in (GRANULE, 4 * KiB):
        d.cmd('block-dirty-bitmap-add', node='disk', name=str(granularity), granularity=granularity)
    return path, content(path)


@needs['fio']
@pytest.mark.parametrize('direct', [False, True], ids=['cached', 'direct'])
def test_fio_verifies_mixed_loads(d, direct):
    """Five connections at once; whole sectors, odd bytes, trims and flushes; bitmaps know exactly."""
    path, before = add_recorded_disk(d, 48 * MiB, cache={'direct': direct})
    rows = fio(d, d.export('disk'), {
        'mixed': {'rw': 'randrw', 'bssplit': '512/20:1536/10:4k/40:12k/10:64k/20', 'blockalign': 512, 'size': '8m',
                  'offset_increment': '8m', 'numjobs': 2, 'fsync': 64, 'verify': 'crc32c'},
        'bytes': {'rw': 'randwrite', 'bsrange': '512-20000', 'bs_unaligned': 1, 'offset': '16m', 'size': '8m',
                  'verify': 'xxhash'},
        'rewritten': {'rw': 'randtrimwrite', 'bs': '16k', 'offset': '24m', 'size': '8m', 'fdatasync': 32,
                      'verify': 'crc32c'},
        'trimmed': {'rw': 'randtrim', 'bs': '64k', 'offset': '32m', 'size': '8m'}})
    counts = {kind: sum(r[kind]['total_ios'] for r in rows) for kind in ('read', 'write', 'trim', 'sync')}
    assert len(rows) == 5 and min(counts.values()) > 50, counts
    after = content(path)
    assert after[32 * MiB:40 * MiB] == bytes(8 * MiB)
    assert after[40 * MiB:] == before[40 * MiB:]
    assert dirty(d, 'disk', str(GRANULE)) == changed(before, after)
    assert dirty(d, 'disk', '4096', 4096) >= changed(before, after, 4096)
    assert max(dirty(d, 'disk', '4096', 4096)) < 40 * MiB // 4096


@needs['fio']
def test_fio_neighbours_in_one_block(d):
    """Eight connections write every eighth sector of the same aligned blocks; none undoes another's."""
    path, before = add_recorded_disk(d, 2 * MiB)
    d.cmd('blockdev-add', {'driver': 'blkdebug', 'node-name': 'aligned', 'image': 'disk', 'align': 4096})
    fio(d, d.export('aligned'), {
        f'w{i}': {'rw': f'write:{7 * 512}', 'bs': 512, 'offset': 512 * i, 'io_size': '256k', 'size': 2 * MiB - 512 * i,
                  'verify': 'crc32c', 'iodepth': 4} for i in range(8)})
    assert len(changed(before, content(path), 512)) == 2 * MiB // 512  # each of them
    assert dirty(d, 'disk', '4096', 4096) == set(range(2 * MiB // 4096))


# ---------------------------------------------------------------- nbdfuse

@pytest.fixture
def mounted(disk):
    """An empty export of 32 MiB as a file; its name."""
    try:
        os.close(os.open('/dev/fuse', os.O_RDWR))
    except OSError as e:
        pytest.skip(f'no FUSE here: /dev/fuse: {e.strerror}')
    disk.add_disk('fused', 32 * MiB, discard='unmap')
    uri = disk.export('fused')
    os.mkdir(disk.path('mnt'))
    with subprocess.Popen([which('nbdfuse'), '-C', '4', disk.path('mnt'), uri], stdin=subprocess.DEVNULL) as proc:
        name = disk.path('mnt/nbd')
        try:
            until('nbdfuse has mounted', lambda: os.path.exists(name) or proc.poll() is not None)
            assert proc.poll() is None, f'nbdfuse ended with {proc.returncode}'
            yield disk, name
        finally:
            if os.path.ismount(disk.path('mnt')):
                run('fusermount3', '-u', disk.path('mnt'))
            assert proc.wait(DEADLINE) == 0


def unmount(d):
    run('fusermount3', '-u', d.path('mnt'))


@needs['nbdfuse']
@needs['fusermount3']
def test_nbdfuse_is_a_file(mounted):
    """Reads and writes of any size and place, holes, fsync: the image is what a file would be."""
    d, name = mounted
    model, r = bytearray(32 * MiB), random.Random(5)
    assert os.stat(name).st_size == len(model)
    with open(name, 'r+b', buffering=0) as f:
        for i in range(300):
            length = r.choice([1, 511, 4096, 65536, 200_000])
            offset = r.randrange(len(model) - length)
            f.seek(offset)
            if i % 3:
                data = r.randbytes(length)
                assert f.write(data) == length
                model[offset:offset + length] = data
            else:
                assert f.read(length) == model[offset:offset + length]
        os.fsync(f.fileno())
    run('dd', 'if=/dev/zero', 'of=' + name, 'bs=1M', 'count=4', 'seek=8', 'conv=notrunc,fsync')
    model[8 * MiB:12 * MiB] = bytes(4 * MiB)
    run('fallocate', '--punch-hole', '--offset', str(20 * MiB), '--length', str(MiB), name)
    model[20 * MiB:21 * MiB] = bytes(MiB)
    assert content(name) == model
    unmount(d)
    assert_same(bytes(model), d.path('fused.raw'))
    with open(d.path('fused.raw'), 'rb') as f:
        assert os.lseek(f.fileno(), 20 * MiB, os.SEEK_DATA) >= 21 * MiB


@needs['nbdfuse']
@needs['fusermount3']
@needs['mke2fs']
def test_nbdfuse_holds_a_file_system(mounted):
    d, name = mounted
    fill(d.path('disk.raw'), 3 * MiB)
    run('mke2fs', '-q', '-F', '-t', 'ext4', name)
    d.cmd('block-dirty-bitmap-add', node='fused', name='b')
    empty = content(name)
    run('debugfs', '-w', '-R', f'write {d.path("disk.raw")} some', name)
    run('e2fsck', '-fn', name)
    seen = content(name)
    unmount(d)
    assert_same(seen, d.path('fused.raw'))
    run('e2fsck', '-fn', d.path('fused.raw'))
    run('debugfs', '-R', f'dump some {d.path("some")}', d.path('fused.raw'))
    assert_same(d.path('some'), d.path('disk.raw'))
    assert dirty(d, 'fused', 'b') >= changed(empty, seen)
    assert len(dirty(d, 'fused', 'b')) * GRANULE < 2 * len(content(d.path('some')))


# ---------------------------------------------------------------- nbdkit

def nbdkit(d, uri, *filters, settings=()):
    """nbdkit as a client of `uri` and, behind these filters, a server."""
    path = d.path('nbdkit.sock')
    return server('nbdkit', '-f', '-U', path, *[f'--filter={f}' for f in filters], 'nbd', 'uri=' + uri, *settings,
                  path=path)


@needs['nbdkit']
@needs['nbdcopy']
def test_nbdkit_hands_on_what_it_gets(disk):
    """A second server in between changes nothing: flags, holes, contents both ways."""
    uri = disk.export('disk')
    with nbdkit(disk, uri) as far:
        def looks(u):
            info = json.loads(run('nbdinfo', '--json', u))['exports'][0]
            rows = json.loads(run('nbdinfo', '--map', '--json', u))
            return [{k: v for k, v in info.items() if k.startswith(('can_', 'is_', 'block_')) or 'size' in k}, rows]
        assert looks(far) == looks(uri)
        run('nbdcopy', '--connections=4', far, disk.path('copy'))
        assert_same(disk.path('disk.raw'), disk.path('copy'))
        assert os.stat(disk.path('copy')).st_blocks * 512 < 2 * MiB
        fill(disk.path('copy'), 5 * MiB, seed=7)
        run('nbdcopy', '--connections=4', '--flush', disk.path('copy'), far)
    assert_same(disk.path('disk.raw'), disk.path('copy'))


@needs['nbdkit']
@needs['qemu-io']
def test_nbdkit_cow_keeps_the_disk_as_it_was(disk):
    uri, before = disk.export('disk', writable=False), content(disk.path('disk.raw'))
    with nbdkit(disk, uri, 'cow') as far:
        qemu_io(far, 'write -P 5 512k 3M', 'write -P 6 100 10', 'read -P 5 512k 3M', 'read -P 6 100 10')
        run('nbdcopy', far, disk.path('copy'))
    want = bytearray(before)
    want[512 * KiB:512 * KiB + 3 * MiB], want[100:110] = b'\5' * (3 * MiB), b'\6' * 10
    assert_same(bytes(want), disk.path('copy'))
    assert_same(before, disk.path('disk.raw'))


@needs['nbdkit']
@needs['qemu-io']
def test_nbdkit_partition_writes_its_partition_only(d):
    path = d.add_disk('disk', nbd_guest.SIZE)
    with open(path, 'r+b') as f:
        f.write(nbd_guest.partition_table())
    before = content(path)
    off, length = nbd_guest.FS
    with nbdkit(d, d.export('disk'), 'partition', settings=['partition=2']) as far:
        assert run('nbdinfo', '--size', far).strip() == str(length)
        qemu_io(far, f'write -P 7 0 {length}')
    after = content(path)
    assert after[off:off + length] == b'\7' * length
    assert after[:off] == before[:off] and after[off + length:] == before[off + length:]


@needs['nbdkit']
@needs['nbdcopy']
def test_nbdkit_checks_every_write_of_a_copy(disk):
    """Here nbdkit is where nbdcopy copies to; it refuses what is not equal to the image file."""
    uri, path = disk.export('disk'), disk.path('check.sock')
    check = ('nbdkit', '-f', '-U', path, '--filter=checkwrite', 'file')
    with server(*check, disk.path('disk.raw'), path=path) as far:
        run('nbdcopy', '--connections=4', uri, far)


@needs['nbdkit']
def test_nbdkit_comes_back_after_the_export_was_gone(disk):
    """A client that retries goes on where an export of that name is again."""
    uri = disk.export('disk')
    with nbdkit(disk, uri, 'retry', settings=['retry-delay=1', 'retry-exponential=no']) as far:
        h = nbd.NBD()
        h.connect_uri(far)
        h.pwrite(b'1' * 4096, 0)
        disk.cmd('block-export-del', id='exp-disk', mode='hard')
        disk.qmp.event('BLOCK_EXPORT_DELETED', id='exp-disk')
        disk.export('disk')
        h.pwrite(b'2' * 4096, 4096)
        assert h.pread(8192, 0) == b'1' * 4096 + b'2' * 4096
        h.shutdown()
    assert content(disk.path('disk.raw'))[:8192] == b'1' * 4096 + b'2' * 4096


# ---------------------------------------------------------------- libnbd

def test_many_requests_in_flight(disk):
    """Three connections with 100 requests each on the way, against a model in memory."""
    slot, conns = 8 * KiB, []
    n_slots = SIZE // slot
    model = bytearray(content(disk.path('disk.raw')))
    for _ in range(3):
        h = nbd.NBD()
        h.connect_uri(disk.uri('disk') if conns else disk.export('disk'))
        conns.append(h)
    r, results = random.Random(11), []

    def done(error):
        results.append(error.value)
        return 1  # nobody else asks for it

    for _ in range(10):  # of each turn every slot has one request at most, so that any order is right
        reads = []
        for i, n in enumerate(r.sample(range(n_slots), n_slots * 3 // 4)):
            h, off, kind, length = conns[i % 3], n * slot, r.randrange(5), r.choice([1, 512, 5000, slot])
            while h.aio_in_flight() >= 100:
                h.poll(-1)
            if kind <= 1:
                model[off:off + length] = data = bytearray(r.randbytes(length))
                h.aio_pwrite(nbd.Buffer.from_bytearray(data), off, done, r.choice([0, nbd.CMD_FLAG_FUA]))
            elif kind == 2:
                model[off:off + length] = bytes(length)
                h.aio_zero(length, off, done)
            else:
                buf = nbd.Buffer(length)
                reads.append((buf, model[off:off + length]))
                h.aio_pread(buf, off, done)
            if i % 100 == 0:
                h.aio_flush(done)
        for h in conns:
            while h.aio_in_flight():
                h.poll(-1)
        assert len(reads) > n_slots // 8
        for buf, want in reads:
            assert buf.to_bytearray() == want
    assert set(results) == {0} and len(results) > 2 * n_slots
    for h in conns:
        h.shutdown()
    assert_same(bytes(model), disk.path('disk.raw'))


@needs['nbdsh']
def test_nbdsh(disk):
    uri = disk.export('disk')
    out = run('env', 'PATH=/usr/bin:/bin', 'nbdsh', '-u', uri, '-c', 'h.pwrite(b"shell", 77)', '-c', 'h.flush()',
              '-c', 'print(h.get_size(), h.pread(5, 77))')
    assert out == f"{SIZE} {bytearray(b'shell')!r}\n"
    assert content(disk.path('disk.raw'))[77:82] == b'shell'


def test_a_pull_client_reads_only_what_changed_and_is_data(disk):
    """What was written and then trimmed is told as changed and as a hole: an increment is not bigger for it."""
    path = disk.path('disk.raw')
    before = content(path)
    disk.cmd('block-dirty-bitmap-add', node='disk', name='b')
    uri = disk.export('disk')
    qemu_io(uri, 'write -P 1 1M 6M', 'discard 1M 5M', 'write -P 2 2M 64k')
    disk.cmd('block-dirty-bitmap-disable', node='disk', name='b')
    disk.cmd('block-export-add', {'type': 'nbd', 'id': 'pull', 'node-name': 'disk', 'name': 'pull', 'bitmaps': ['b']})
    h, bitmap = nbd.NBD(), 'qemu:dirty-bitmap:b'
    h.add_meta_context('base:allocation')
    h.add_meta_context(bitmap)
    h.connect_uri(disk.uri('pull'))
    told = {'base:allocation': [], bitmap: []}

    def take(context, offset, entries, err):
        for length, flags in zip(entries[::2], entries[1::2]):
            told[context] += [flags] * (length // GRANULE)
    h.block_status(SIZE, 0, take)
    image, n_read = bytearray(before), 0
    for i, (alloc, is_dirty) in enumerate(zip(told['base:allocation'], told[bitmap], strict=True)):
        off = i * GRANULE
        if is_dirty and alloc & nbd.STATE_ZERO:
            image[off:off + GRANULE] = bytes(GRANULE)
        elif is_dirty:
            image[off:off + GRANULE] = h.pread(GRANULE, off)
            n_read += GRANULE
    assert_same(bytes(image), path)
    assert n_read == MiB + GRANULE


# ---------------------------------------------------------------- QEMU's tools

@needs['qemu-img']
def test_qemu_img_map_of_a_bitmap(disk):
    """Here dirty is shown as no data: that is how tools for pull backups read it."""
    disk.cmd('block-dirty-bitmap-add', node='disk', name='b')
    qemu_io(disk.export('disk'), 'write -P 1 2M 64k')
    disk.cmd('block-dirty-bitmap-disable', node='disk', name='b')
    disk.cmd('block-export-add', {'type': 'nbd', 'id': 'pull', 'node-name': 'disk', 'name': 'pull', 'bitmaps': ['b']})
    rows = json.loads(run('qemu-img', 'map', '--output=json', '--image-opts',
                          f'driver=nbd,export=pull,server.type=unix,server.path={disk.nbd_path},'
                          'x-dirty-bitmap=qemu:dirty-bitmap:b'))
    assert [(r['start'], r['length']) for r in rows if not r['data']] == [(2 * MiB, GRANULE)]


@needs['qemu-img']
def test_qemu_img_dd_measure_bench(disk):
    uri, path = disk.export('disk'), disk.path('disk.raw')
    run('qemu-img', 'dd', '-f', 'raw', '-O', 'raw', 'bs=64k', 'skip=3', 'if=' + uri, 'of=' + disk.path('part'))
    assert_same(content(path)[3 * 65536:], disk.path('part'))
    size = json.loads(run('qemu-img', 'measure', '--output=json', '-O', 'qcow2', uri))
    assert MiB < size['required'] < 2 * MiB and size['fully-allocated'] > SIZE  # holes were told
    for kind in ([], ['-w', '--pattern=90', '--flush-interval=64']):
        run('qemu-img', 'bench', '-f', 'raw', '-t', 'none', '-d', '64', '-s', '4k', '-S', '8k', '-c', '1024', *kind, uri)
    want = (b'\x5a' * 4096 + bytes(4096)) * 1024
    assert content(path)[1::8192] == want[1::8192] and content(path)[2 * MiB:3 * MiB] == want[2 * MiB:3 * MiB]


@needs['qemu-img']
@needs['qemu-io']
def test_an_export_as_a_backing_file(disk):
    """An overlay on a read-only export; then committed into a writable one."""
    uri, top = disk.export('disk', writable=False), disk.path('top.qcow2')
    run('qemu-img', 'create', '-q', '-f', 'qcow2', '-F', 'raw', '-b', uri, top)
    run('qemu-io', '-c', 'write -P 9 512k 1M', '-c', 'write -z 4M 32k', top)
    want = bytearray(content(disk.path('disk.raw')))
    want[512 * KiB:512 * KiB + MiB], want[4 * MiB:4 * MiB + 32 * KiB] = b'\x09' * MiB, bytes(32 * KiB)
    run('qemu-img', 'convert', '-O', 'raw', top, disk.path('flat'))
    assert_same(bytes(want), disk.path('flat'))
    writable = disk.export('disk', 'w')
    run('qemu-img', 'rebase', '-u', '-F', 'raw', '-b', writable, top)
    run('qemu-img', 'commit', '-q', top)
    assert_same(bytes(want), disk.path('disk.raw'))


@needs['qemu-nbd']
@needs['qemu-img']
def test_qemu_nbd_in_between(disk):
    uri, path = disk.export('disk'), disk.path('qemu.sock')
    with server('qemu-nbd', '-t', '-f', 'raw', '--discard=unmap', '-e', '4', '-k', path, uri, path=path) as far:
        run('qemu-img', 'compare', '-f', 'raw', '-F', 'raw', far, disk.path('disk.raw'))
        qemu_io(far, 'write -P 3 1M 1M', 'discard 0 512k', 'write -z 600k 100k', 'flush')
    after = content(disk.path('disk.raw'))
    assert after[MiB:2 * MiB] == b'\3' * MiB and after[:512 * KiB] == bytes(512 * KiB)
    assert after[600 * KiB:700 * KiB] == bytes(100 * KiB)


@needs['qemu-nbd']
@needs['nbd-client']
def test_lists_of_old_and_new_tools(disk):
    disk.add_disk('other', MiB)
    disk.export('disk', description='first')
    disk.export('other', writable=False)
    assert run('nbd-client', '-l', '-unix', disk.nbd_path).split('\n')[1:3] == ['disk: first', 'other']
    text = run('qemu-nbd', '--list', '-k', disk.nbd_path)
    assert 'exports available: 2' in text and "export: 'disk'" in text and f'size:  {SIZE}' in text
    assert 'description: first' in text


@needs['nbdcopy']
def test_nbdcopy_tells_how_far_it_is(disk):
    uri = disk.export('disk')
    with open(disk.path('progress'), 'wb') as f:
        subprocess.run([which('nbdcopy'), f'--progress={f.fileno()}', uri, disk.path('copy')], check=True,
                       pass_fds=[f.fileno()], timeout=DEADLINE)
    assert content(disk.path('progress')).decode().splitlines()[-1] == '100/100'
    assert_same(disk.path('disk.raw'), disk.path('copy'))


# ---------------------------------------------------------------- a guest

def rounds(data):
    """Which round each block of the data partition is from; each is whole."""
    out = []
    for i in range(nbd_guest.N_BLOCKS):
        block = data[i * nbd_guest.BLOCK:(i + 1) * nbd_guest.BLOCK]
        n = int(block.split()[1])
        assert block == nbd_guest.block(n, i)
        out.append(n)
    return out


def earlier(n):
    """The rounds whose files are whole while round n is written."""
    return range(max(1, n - nbd_guest.N_FILES + 1), n)


def check_files(d, image, numbers):
    """The file system in `image` needs its journal at most, and holds the files of these rounds."""
    path, (off, length) = d.path('fs'), nbd_guest.FS
    with open(path, 'wb') as f:
        f.write(image[off:off + length])
    run('e2fsck', '-y', '-E', 'journal_only', path)
    run('e2fsck', '-fn', path)
    for n in numbers:
        run('debugfs', '-R', f'dump {n % nbd_guest.N_FILES} {d.path("file")}', path)
        assert_same(nbd_guest.pattern(n)[:nbd_guest.FILE_SIZE], d.path('file'))


@pytest.mark.skipif(bool(nbd_guest.missing()), reason=f'a guest needs {nbd_guest.missing()}')
def test_a_guest_boots_and_is_backed_up_while_it_writes(d):
    """Firmware, boot loader, kernel and all data come from one export; see nbd_guest.py."""
    path = d.path('disk.raw')
    nbd_guest.make_disk(path, d.dir)
    before = content(path)
    d.add_disk('disk', len(before), discard='unmap')
    target = d.add_disk('target', len(before))
    d.cmd('block-dirty-bitmap-add', node='disk', name='all')
    one_round = {(nbd_guest.DATA[0] + i * nbd_guest.BLOCK) // GRANULE for i in range(nbd_guest.N_BLOCKS)}
    data = slice(nbd_guest.DATA[0], sum(nbd_guest.DATA))
    with nbd_guest.Guest(d, d.export('disk')) as guest:
        assert guest.line('cache') == 'write back'  # so it will flush
        while int(guest.line('round')) < 3:
            pass
        again_after_a_rest(lambda: transaction(
            d, ('block-dirty-bitmap-add', {'node': 'disk', 'name': 'since'}),
            ('blockdev-backup', {'job-id': 'j', 'device': 'disk', 'target': 'target', 'sync': 'full', 'speed': 1})))
        until('a whole round is written during the copy', lambda: dirty(d, 'disk', 'since') >= one_round,
              nbd_guest.SLOW)
        at_release = rounds(content(path)[data])
        release(d)
        assert 'BLOCK_JOB_COMPLETED' in end_of(d, 'j')
        guest.stop()
        digest = guest.line('data').split()[0]
        guest.line('end')
        assert guest.proc.wait(DEADLINE) == 0
    after, copy = content(path), content(target)
    assert hashlib.sha256(after[data]).hexdigest() == digest
    # The disk at the end.
    last = rounds(after[data])
    assert len(set(last)) == 1
    check_files(d, after, earlier(last[0]))
    old = after[data][nbd_guest.OLD[0]:][:nbd_guest.OLD[1]]
    trimmed, length = nbd_guest.TRIMMED[0] - nbd_guest.OLD[0], nbd_guest.TRIMMED[1]
    assert old == b'T' * trimmed + bytes(length) + b'T' * (len(old) - trimmed - length)
    with open(path, 'rb') as f:
        hole = nbd_guest.DATA[0] + nbd_guest.TRIMMED[0]
        assert os.lseek(f.fileno(), hole, os.SEEK_DATA) >= hole + length
    # The copy: one moment, in the middle of the writes, before nearly all blocks were written once more.
    order = rounds(copy[data])
    assert order == sorted(order, reverse=True) and order[0] - order[-1] <= 1
    assert 3 <= order[0] < last[0]
    assert sum(a < b for a, b in zip(order, at_release)) >= nbd_guest.N_BLOCKS - GRANULE // nbd_guest.BLOCK
    check_files(d, copy, earlier(order[0]))
    # The bitmaps.
    assert changed(before, after) <= dirty(d, 'disk', 'all')
    boot = range(nbd_guest.BOOT[0] // GRANULE, sum(nbd_guest.BOOT) // GRANULE)
    assert not dirty(d, 'disk', 'all').intersection(boot)
    assert changed(copy, after) <= dirty(d, 'disk', 'since') <= dirty(d, 'disk', 'all')
