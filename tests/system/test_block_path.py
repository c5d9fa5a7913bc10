# SPDX-License-Identifier: Apache-2.0
"""What lies between an export and the disk: direct I/O, windows, zeroes, holes, files that change
underneath, devices, full disks, errors of real disks. What is written is compared with a model."""
import contextlib
import fcntl
import os
import random
import stat
import struct

import nbd
import pytest

from harness import Daemon, KiB, MiB, QmpError
from mounts import file_system, loop_device
from stalled import Stalled

O_DIRECT = 0o40000
SIZE = 4 * MiB


@contextlib.contextmanager
def connect(d, name):
    h = nbd.NBD()
    h.set_strict_mode(0)
    h.add_meta_context('base:allocation')
    h.connect_uri(d.uri(name))
    yield h
    h.shutdown()


def add_path(d, node, path, **options):
    """A file node over a path, exported."""
    d.cmd('blockdev-add', {'driver': 'file', 'node-name': node, 'filename': path, 'discard': 'unmap', **options})
    d.export(node)


def write_file(path, data):
    with open(path, 'wb') as f:
        f.write(data)


def read_file(path):
    with open(path, 'rb') as f:
        return f.read()


# ---------------------------------------------------------------- direct I/O

@pytest.fixture(params=['here', 'ext4-512', 'ext4-4096', 'tmpfs-512'])
def direct_dir(request, tmp_path):
    """A directory with direct I/O; of another file system and sector size each."""
    with contextlib.ExitStack() as stack:
        path = str(tmp_path)
        if request.param != 'here':
            kind, sector = request.param.split('-')
            path = stack.enter_context(file_system(path, kind, 48 * MiB, int(sector)))
        probe = os.path.join(path, 'probe')
        write_file(probe, bytes(4096))
        try:
            os.close(os.open(probe, os.O_RDWR | O_DIRECT))
        except OSError:
            pytest.skip('no direct I/O on this file system')
        os.unlink(probe)
        yield path


def random_range(rng, size, align):
    """Whole blocks, or not; short mostly; sometimes up to the end."""
    if rng.random() < 0.3:
        begin = rng.randrange(size // align) * align
        return begin, min(align * rng.randint(1, 20), size // align * align - begin)
    begin = rng.randrange(size)
    if rng.random() < 0.1:
        return max(begin, size - 3 * align), size - max(begin, size - 3 * align)
    return begin, min(rng.choice((1, 7, 511, 513, 5000, 70000)), size - begin)


@pytest.mark.parametrize('rest', [0, 1536])
def test_direct_io_against_a_model(direct_dir, rest):
    """Also where the file ends with part of a block (of 4096 bytes)."""
    rng, size = random.Random(rest), 256 * KiB + rest
    path = os.path.join(direct_dir, 'disk')
    model = bytearray(rng.randbytes(size))
    write_file(path, model)
    with Daemon() as d:
        add_path(d, 'f', path, cache={'direct': True})
        with connect(d, 'f') as h:
            assert h.get_size() == size
            for i in range(300):
                off, n = random_range(rng, size, 4096)
                kind, flags = rng.choice(('read', 'write', 'write', 'zero', 'no-hole', 'trim')), rng.choice((0, 0, nbd.CMD_FLAG_FUA))
                if kind == 'read':
                    assert h.pread(n, off) == model[off:off + n], (i, off, n)
                elif kind == 'write':
                    model[off:off + n] = rng.randbytes(n)
                    h.pwrite(model[off:off + n], off, flags)
                elif kind == 'trim':
                    h.trim(n, off, flags)
                    now = h.pread(n, off)
                    assert all(a in (0, b) for a, b in zip(now, model[off:off + n]))
                    model[off:off + n] = now
                else:
                    h.zero(n, off, flags | (nbd.CMD_FLAG_NO_HOLE if kind == 'no-hole' else 0))
                    model[off:off + n] = bytes(n)
            h.flush()
            assert h.pread(size, 0) == model
            assert read_file(path) == model, 'through the page cache it is the same'
    assert read_file(path) == model


def test_nothing_is_cut_off_behind_the_last_block(direct_dir):
    """Somebody has made the file longer. A write to the end of the disk, as it was opened, leaves that alone."""
    path = os.path.join(direct_dir, 'disk')
    write_file(path, b'a' * (64 * KiB + 512))
    with Daemon() as d:
        add_path(d, 'f', path, cache={'direct': True})
        with open(path, 'ab') as f:
            f.write(b'b' * 10000)
        with connect(d, 'f') as h:
            assert h.get_size() == 64 * KiB + 512
            h.pwrite(b'c' * 700, 64 * KiB - 188, nbd.CMD_FLAG_FUA)
            h.pwrite(b'd', 64 * KiB + 511)
            h.zero(100, 64 * KiB + 100)
            h.trim(200, 64 * KiB + 300)
            h.flush()
            assert h.pread(1000, 64 * KiB + 512 - 1000)[-700:] == b'c' * 288 + bytes(100) + b'c' * 311 + b'd'
    assert read_file(path)[:64 * KiB - 188] == b'a' * (64 * KiB - 188)
    assert read_file(path)[64 * KiB + 512:] == b'b' * 10000


class Pieces:
    """Pieces of a disk that lie side by side, most of them smaller than a block. Each has one writer,
    which writes it anew in each round; some are zeroed in every second one."""

    def __init__(self, seed, size, writers):
        rng, at = random.Random(seed), 0
        self.size, self.pieces = size, []
        while at < size:
            kind = rng.choices(('odd', 'whole', 'zero'), (8, 2, 2))[0]
            if kind == 'odd':
                n = rng.randint(1, 511)
            elif kind == 'zero':
                n = rng.randint(1, 3000)
            elif at % 512:
                kind, n = 'odd', 512 - at % 512
            else:
                n = 512 * rng.randint(1, 20)
            n = min(n, size - at)
            self.pieces.append((at, n, kind, rng.randrange(writers)))
            at += n

    def content(self, i, round_):
        _, n, kind, _ = self.pieces[i]
        return bytes(n) if kind == 'zero' and round_ % 2 else bytes([(7 * i + round_) % 255 + 1]) * n

    def write(self, handles, round_):
        """All at once, each by its own writer."""
        errors = []
        order = list(range(len(self.pieces)))
        random.Random(round_).shuffle(order)
        for i in order:
            at, n, kind, writer = self.pieces[i]
            data = self.content(i, round_)

            def end(error, i=i):
                if error.value:
                    errors.append((i, error.value))
                return 1
            if kind == 'zero' and not any(data):
                handles[writer].aio_zero(n, at, completion=end)
            else:
                handles[writer].aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), at, completion=end)
        while any([h.aio_in_flight() for h in handles]):
            for h in handles:
                if h.aio_in_flight():
                    h.poll(10)
        assert errors == []

    def check(self, data, round_):
        for i, (at, n, kind, writer) in enumerate(self.pieces):
            assert data[at:at + n] == self.content(i, round_), f'{kind} {i} [{at}, {at + n}) of writer {writer}, {round_}'


@pytest.mark.parametrize('over', ['file', 'raw', 'blkdebug'])
def test_parts_of_a_block_written_at_once(direct_dir, over):
    """Every byte is in the end what its only writer wrote, though writers share blocks, on several loops."""
    pieces = Pieces(over, 48 * KiB + 512, 4)
    path = os.path.join(direct_dir, 'disk')
    write_file(path, bytes(pieces.size))
    with Daemon(['--loops', '2']) as d, contextlib.ExitStack() as stack:
        add_path(d, 'f', path, cache={'direct': over != 'blkdebug'})
        if over == 'raw':
            d.cmd('blockdev-add', {'driver': 'raw', 'node-name': 'top', 'file': 'f'})
        elif over == 'blkdebug':
            d.cmd('blockdev-add', {'driver': 'blkdebug', 'node-name': 'top', 'image': 'f', 'align': 512})
        if over != 'file':
            d.cmd('block-export-del', id='exp-f')
            d.qmp.event('BLOCK_EXPORT_DELETED', id='exp-f')
            d.export('top', 'f')
        handles = [stack.enter_context(connect(d, 'f')) for _ in range(4)]
        for round_ in range(6):
            pieces.write(handles, round_)
            pieces.check(handles[0].pread(pieces.size, 0), round_)
    pieces.check(read_file(path), 5)


# ---------------------------------------------------------------- windows

def window(d, node, below, offset, size=None, **options):
    d.cmd('blockdev-add', {'driver': 'raw', 'node-name': node, 'file': below, 'offset': offset, 'discard': 'unmap',
                           **({} if size is None else {'size': size}), **options})
    d.export(node)


def test_windows_against_a_model(tide):
    """Beside each other, and two on top of each other, aligned to nothing: each changes its own bytes and no other."""
    rng = random.Random(1)
    model = bytearray(rng.randbytes(SIZE))
    path = tide.path('f.raw')
    write_file(path, model)
    tide.add_file('f', SIZE, discard='unmap')
    window(tide, 'a', 'f', 1001, 100 * 512)
    window(tide, 'b', 'f', 1001 + 100 * 512, 512)
    window(tide, 'c', 'f', 70003)
    tide.cmd('blockdev-add', {'driver': 'raw', 'node-name': 'mid', 'file': 'c', 'offset': 77, 'size': 900000, 'discard': 'unmap'})
    window(tide, 'top', 'mid', 1, 512 * 1000)
    tide.cmd('block-export-del', id='exp-c')
    tide.qmp.event('BLOCK_EXPORT_DELETED', id='exp-c')
    base = {'a': 1001, 'b': 1001 + 100 * 512, 'top': 70003 + 77 + 1}
    size = {'a': 100 * 512, 'b': 512, 'top': 512 * 1000}
    with contextlib.ExitStack() as stack:
        h = {n: stack.enter_context(connect(tide, n)) for n in base}
        assert {n: x.get_size() for n, x in h.items()} == size
        for _ in range(300):
            n = rng.choice(('a', 'b', 'top'))
            off = rng.randrange(size[n])
            length = min(rng.choice((1, 100, 4096, 50000, size[n])), size[n] - off)
            at, kind = base[n] + off, rng.choice(('read', 'write', 'zero', 'trim'))
            if kind == 'read':
                assert h[n].pread(length, off) == model[at:at + length]
            elif kind == 'write':
                model[at:at + length] = rng.randbytes(length)
                h[n].pwrite(model[at:at + length], off)
            else:
                h[n].zero(length, off) if kind == 'zero' else h[n].trim(length, off)
                model[at:at + length] = bytes(length)
        for n, x in h.items():
            for call in (lambda: x.pread(2, size[n] - 1), lambda: x.pwrite(b'xx', size[n] - 1), lambda: x.zero(2, size[n] - 1),
                         lambda: x.trim(2, size[n] - 1), lambda: x.pread(1, size[n]), lambda: x.pread(1, 2 ** 63 - 1)):
                with pytest.raises(nbd.Error):
                    call()
    assert read_file(path) == model


EDGES = [((0, 0), True), ((SIZE, 0), True), ((SIZE, None), True), ((SIZE - 512, 512), True), ((512, None), True),
         ((0, SIZE), True), ((SIZE - 512, 1024), False), ((0, SIZE + 512), False), ((SIZE + 512, None), False),
         ((SIZE + 512, 0), False), ((2 ** 63 - 512, 512), False), ((2 ** 64 - 512, 1024), False), ((512, 2 ** 64 - 512), False),
         ((512, 2 ** 63 - 512), False)]


@pytest.mark.parametrize('kind', ['tidemarkd', 'qsd'])
def test_edges_of_windows(kind):
    """What is too far is refused, as by the reference; nothing of it stays."""
    with Daemon(kind=kind) as d:
        d.add_file('f', SIZE)
        for (offset, size), good in EDGES:
            options = {'driver': 'raw', 'node-name': 'w', 'file': 'f', 'offset': offset, **({} if size is None else {'size': size})}
            if good:
                d.cmd('blockdev-add', options)
                assert d.node('w')['image']['virtual-size'] == (SIZE - offset if size is None else size)
                d.cmd('blockdev-del', node_name='w')
            else:
                with pytest.raises(QmpError):
                    d.cmd('blockdev-add', options)
        d.cmd('blockdev-del', node_name='f')


def extents(h, length=None):
    """Allocation as [(length, flags)]: 3 is a hole, 0 data; neighbours of a kind are joined."""
    out, at, length = [], 0, length or h.get_size()
    while at < length:
        got = []
        h.block_status(length - at, at, lambda context, offset, entries, error: got.extend(entries))
        for n, flags in zip(got[::2], got[1::2]):
            n = min(n, length - at)
            at += n
            if out and out[-1][1] == flags:
                out[-1] = (out[-1][0] + n, flags)
            elif n:
                out.append((n, flags))
    return out


def test_block_status_of_windows(tide):
    """Cut to the window and shifted, through two of them; an empty one has none."""
    path = tide.add_file('f', SIZE)
    with open(path, 'r+b') as f:
        f.seek(MiB)
        f.write(b'x' * MiB)
    window(tide, 'w', 'f', 512 * KiB + 512, 2 * MiB)
    window(tide, 'v', 'w', 512, 768 * KiB)
    window(tide, 'none', 'f', SIZE)
    with connect(tide, 'w') as w, connect(tide, 'v') as v, connect(tide, 'none') as none:
        assert extents(w) == [(512 * KiB - 512, 3), (MiB, 0), (512 * KiB + 512, 3)]
        assert extents(v) == [(512 * KiB - 1024, 3), (256 * KiB + 1024, 0)]
        assert none.get_size() == 0


def test_bitmaps_of_windows(tide):
    """Each window's bitmaps count from its own beginning; what goes through another one is none of its business."""
    tide.add_file('f', SIZE)
    for n, offset in (('a', 1000), ('b', 1000 + MiB)):
        window(tide, n, 'f', offset, MiB)
        tide.cmd('block-dirty-bitmap-add', node=n, name='m', granularity=512)
    with connect(tide, 'a') as a, connect(tide, 'b') as b:
        a.pwrite(b'x', MiB - 1)
        b.pwrite(b'x' * 512, 0)
        b.zero(1024, 4096)
        a.trim(513, 0)
    assert tide.ranges('a', 'm') == [(0, 1024), (MiB - 512, 512)]
    assert tide.ranges('b', 'm') == [(0, 512), (4096, 1024)]


# ---------------------------------------------------------------- zeroes and holes

def allocated(path):
    return os.stat(path).st_blocks * 512


@pytest.mark.parametrize('over', ['file', 'raw', 'blkdebug', 'null-co'])
@pytest.mark.parametrize('mode', ['off', 'on', 'unmap'])
def test_detect_zeroes_on_every_driver(tide, mode, over):
    path = tide.path('f.raw')
    write_file(path, b'\1' * MiB)
    options = {'node-name': 'n', 'detect-zeroes': mode, 'discard': 'unmap'}
    if over in ('raw', 'blkdebug'):
        tide.add_file('f', MiB, discard='unmap')
        tide.cmd('blockdev-add', {'driver': over, 'file' if over == 'raw' else 'image': 'f', **options})
    else:
        tide.cmd('blockdev-add', {'driver': over, **({'filename': path} if over == 'file' else {'size': MiB}), **options})
    tide.export('n')
    tide.cmd('block-dirty-bitmap-add', node='n', name='b')
    with connect(tide, 'n') as h:
        h.pwrite(bytes(256 * KiB), 256 * KiB, nbd.CMD_FLAG_FUA)
        if over == 'null-co':
            return
        assert h.pread(MiB, 0) == b'\1' * 256 * KiB + bytes(256 * KiB) + b'\1' * 512 * KiB
        assert allocated(path) == (768 if mode == 'unmap' else 1024) * KiB
        h.pwrite(bytes(64 * KiB - 1) + b'\1', 768 * KiB)
        assert allocated(path) == (768 if mode == 'unmap' else 1024) * KiB, 'not all of it is zero'
        assert tide.ranges('n', 'b') == [(256 * KiB, 256 * KiB), (768 * KiB, 64 * KiB)]


@pytest.mark.parametrize('kind', ['tidemarkd', 'qsd'])
@pytest.mark.parametrize('driver', ['file', 'raw', 'null-co', 'blkdebug'])
def test_unmapping_zeroes_needs_discard(kind, driver):
    with Daemon(kind=kind) as d:
        path = d.add_file('f', MiB)
        own = {'file': {'filename': path}, 'raw': {'file': 'f'}, 'null-co': {}, 'blkdebug': {'image': 'f'}}[driver]
        for discard in ({}, {'discard': 'ignore'}):
            with pytest.raises(QmpError, match='discard'):
                d.cmd('blockdev-add', {'driver': driver, 'node-name': 'n', 'detect-zeroes': 'unmap', **discard, **own})
        d.cmd('blockdev-add', {'driver': driver, 'node-name': 'n', 'detect-zeroes': 'unmap', 'discard': 'unmap', **own})


def test_detected_zeroes_of_part_of_a_block(direct_dir):
    """With direct I/O, and the neighbours stay."""
    path = os.path.join(direct_dir, 'disk')
    write_file(path, b'\1' * 256 * KiB)
    with Daemon() as d:
        add_path(d, 'f', path, **{'cache': {'direct': True}, 'detect-zeroes': 'unmap'})
        with connect(d, 'f') as h:
            h.pwrite(bytes(100 * KiB), 10001)
            h.pwrite(bytes(100), 200001, nbd.CMD_FLAG_FUA)
    assert read_file(path) == b'\1' * 10001 + bytes(102400) + b'\1' * (200001 - 112401) + bytes(100) + b'\1' * (262144 - 200101)
    assert allocated(path) <= 256 * KiB - 96 * KiB


def test_holes_are_reported_and_filled(tide):
    """At once after the write that fills them, on the same connection and on another; NO_HOLE fills, too."""
    path = tide.add_file('f', SIZE, discard='unmap')
    tide.export('f')
    with connect(tide, 'f') as h, connect(tide, 'f') as other:
        assert extents(h) == extents(other) == [(SIZE, 3)]
        for i in range(16):
            h.pwrite(b'x', i * 128 * KiB)
            assert extents(other, (i + 1) * 128 * KiB)[-1][1] == 3
            got = []
            other.block_status(4096, i * 128 * KiB, lambda c, o, e, err: got.extend(e))
            assert got[1] == 0, 'a hole that has been filled is none'
        h.trim(MiB, 0)
        assert extents(h, MiB) == [(MiB, 3)]
        h.flush()  # or blocks of the file's own come when the kernel likes
        before = allocated(path)
        h.zero(MiB, 0, nbd.CMD_FLAG_NO_HOLE)
        assert allocated(path) >= before + MiB, 'kept for those who asked for it'
        h.zero(MiB, 0)
        assert abs(allocated(path) - before) <= 8 * KiB
        assert h.pread(MiB, 0) == bytes(MiB)


# ---------------------------------------------------------------- files that change underneath

@pytest.mark.parametrize('direct', [False, True], ids=['cached', 'direct'])
def test_a_file_that_is_cut_shorter(tide, direct):
    """The disk keeps its size; what is gone reads as zeroes and is a hole; what is written there comes back."""
    path = tide.path('f.raw')
    write_file(path, b'\1' * SIZE)
    try:
        tide.add_file('f', SIZE, cache={'direct': direct}, discard='unmap')
    except QmpError:
        pytest.skip('no direct I/O here')
    window(tide, 'w', 'f', MiB)
    tide.cmd('block-dirty-bitmap-add', node='w', name='b')
    with connect(tide, 'w') as h:
        os.truncate(path, MiB + 100)
        assert h.get_size() == 3 * MiB and tide.node('w')['image']['virtual-size'] == 3 * MiB
        assert h.pread(3 * MiB, 0) == b'\1' * 100 + bytes(3 * MiB - 100)
        h.zero(MiB, MiB)
        h.trim(MiB, MiB)
        h.zero(MiB, MiB, nbd.CMD_FLAG_NO_HOLE)
        h.cache(MiB, MiB)
        assert extents(h)[-1][1] == 3 and sum(e[0] for e in extents(h)) == 3 * MiB
        h.pwrite(b'\2' * 1000, 2 * MiB + 3, nbd.CMD_FLAG_FUA)
        assert h.pread(2000, 2 * MiB) == bytes(3) + b'\2' * 1000 + bytes(997)
        os.truncate(path, 0)
        assert h.pread(MiB, 0) == bytes(MiB)
        h.flush()
    assert tide.ranges('w', 'b') == [(MiB, MiB + 64 * KiB)]


def test_a_file_that_grows(tide):
    """The disk is as large as when it was opened, and what was appended is not touched."""
    path = tide.add_file('f', MiB, discard='unmap')
    tide.export('f')
    with open(path, 'ab') as f:
        f.write(b'\3' * MiB)
    with connect(tide, 'f') as h:
        assert h.get_size() == MiB
        h.zero(MiB, 0)
        h.trim(MiB, 0)
        h.pwrite(b'\1' * MiB, 0)
        with pytest.raises(nbd.Error):
            h.pread(512, MiB)
        assert extents(h) == [(MiB, 0)]
    assert read_file(path) == b'\1' * MiB + b'\3' * MiB


def test_a_file_that_is_removed(tide):
    """With its directory: it is served as long as it is open, and gone afterwards."""
    os.mkdir(tide.path('dir'))
    path = tide.path('dir/disk')
    write_file(path, b'\1' * MiB)
    add_path(tide, 'f', path)
    os.unlink(path)
    os.rmdir(tide.path('dir'))
    with connect(tide, 'f') as h:
        h.pwrite(b'\2' * 4096, 4096, nbd.CMD_FLAG_FUA)
        h.flush()
        assert h.pread(3 * 4096, 0) == b'\1' * 4096 + b'\2' * 4096 + b'\1' * 4096
        assert extents(h) == [(MiB, 0)]
        assert tide.node('f')['image']['virtual-size'] == MiB
    tide.cmd('block-export-del', id='exp-f')
    tide.qmp.event('BLOCK_EXPORT_DELETED', id='exp-f')
    tide.cmd('blockdev-del', node_name='f')
    with pytest.raises(QmpError, match='dir/disk.*No such file'):
        tide.cmd('blockdev-add', driver='file', node_name='f', filename=path)


# ---------------------------------------------------------------- devices

@pytest.mark.parametrize('sector', [512, 4096])
@pytest.mark.parametrize('direct', [False, True], ids=['cached', 'direct'])
def test_block_device(tmp_path, sector, direct):
    """Size, random requests against a model, discards; it has no holes to tell of."""
    rng, size = random.Random(sector), 256 * KiB
    image = str(tmp_path / 'image')
    model = bytearray(rng.randbytes(size))
    write_file(image, model)
    with loop_device(image, sector) as device, Daemon() as d:
        with pytest.raises(QmpError, match='driver=host_device'):
            d.cmd('blockdev-add', driver='file', node_name='n', filename=device)
        with pytest.raises(QmpError, match='driver=file'):
            d.cmd('blockdev-add', driver='host_device', node_name='n', filename=image)
        d.cmd('blockdev-add', {'driver': 'host_device', 'node-name': 'n', 'filename': device, 'discard': 'unmap',
                               'cache': {'direct': direct}, 'detect-zeroes': 'unmap'})
        d.export('n')
        with connect(d, 'n') as h:
            assert h.get_size() == size
            assert extents(h) == [(size, 0)]
            for i in range(150):
                off, n = random_range(rng, size, 4096)
                kind = rng.choice(('read', 'write', 'zero', 'no-hole', 'trim', 'zeroes'))
                if kind == 'read':
                    assert h.pread(n, off) == model[off:off + n], (i, off, n)
                    continue
                if kind == 'trim':
                    h.trim(n, off)
                    now = h.pread(n, off)
                    assert all(a in (0, b) for a, b in zip(now, model[off:off + n])), (off, n)
                    model[off:off + n] = now
                    continue
                model[off:off + n] = rng.randbytes(n) if kind == 'write' else bytes(n)
                if kind in ('write', 'zeroes'):
                    h.pwrite(model[off:off + n], off, rng.choice((0, nbd.CMD_FLAG_FUA)))
                else:
                    h.zero(n, off, nbd.CMD_FLAG_NO_HOLE if kind == 'no-hole' else 0)
            assert h.pread(size, 0) == model
            h.trim(size, 0)
            h.flush()
        assert allocated(image) < size, 'discards are passed on'


def test_a_block_device_is_one_by_whatever_name(tmp_path):
    """As containers have them: a second special file of the same device is another inode. A writer through it would
    pass the bitmaps of the first."""
    image, other = str(tmp_path / 'image'), str(tmp_path / 'other')
    write_file(image, bytes(SIZE))
    with loop_device(image) as device, Daemon() as d:
        os.mknod(other, 0o600 | stat.S_IFBLK, os.stat(device).st_rdev)
        for node, path in (('a', device), ('b', other)):
            d.cmd('blockdev-add', driver='host_device', node_name=node, filename=path)
        d.cmd('block-dirty-bitmap-add', node='a', name='x')
        with pytest.raises(QmpError, match="node 'a' has bitmaps"):
            d.export('b')
        with pytest.raises(QmpError, match="is the file of source 'a' itself"):
            d.cmd('drive-backup', job_id='j', device='a', target=other, sync='full', mode='existing')
        actions = [{'type': 'block-dirty-bitmap-add', 'data': {'node': 'a', 'name': 'y'}},
                   {'type': 'block-export-add', 'data': {'type': 'nbd', 'id': 'e', 'node-name': 'b', 'writable': True}}]
        told = d.cmd('transaction', actions=actions, properties={'explain': True})
        assert [(e['on'], e['action']) for e in told['dependencies']] == [(0, 1)]
        d.cmd('block-dirty-bitmap-remove', node='a', name='x')
        with open(other, 'rb') as f:  # a lock of another process belongs to its own name
            fcntl.fcntl(f, 37, struct.pack('hhqqi4x', fcntl.F_RDLCK, 0, 200, 1, 0))  # F_OFD_SETLK: nobody may read
            d.export('a')
            with pytest.raises(QmpError, match='cannot get the "consistent read" lock'):
                d.export('b', writable=False)
        d.cmd('block-export-del', id='exp-a')
        d.qmp.event('BLOCK_EXPORT_DELETED')
        d.export('b')
        with pytest.raises(QmpError, match='cannot be tracked'):
            d.cmd('block-dirty-bitmap-add', node='a', name='x')


# ---------------------------------------------------------------- full disks and broken ones

def error_of(call):
    with pytest.raises(nbd.Error) as e:
        call()
    return e.value.errno


@pytest.mark.parametrize('kind', ['tmpfs', 'ext4'])
@pytest.mark.parametrize('direct', [False, True], ids=['cached', 'direct'])
def test_disk_full(tmp_path, kind, direct):
    """ENOSPC on the wire, the bits are set, the connection lives, and works again when there is space."""
    with file_system(str(tmp_path), kind, 8 * MiB) as mount, Daemon() as d:
        path, ballast = os.path.join(mount, 'disk'), os.path.join(mount, 'ballast')
        write_file(ballast, bytes(2 * MiB))
        os.truncate(ballast, 2 * MiB)
        write_file(path, b'')
        os.truncate(path, 16 * MiB)
        add_path(d, 'f', path, cache={'direct': direct})
        d.cmd('block-dirty-bitmap-add', node='f', name='b', granularity=64 * KiB)
        with connect(d, 'f') as h:
            full = next(i for i in range(16) if i and _fails(lambda: h.pwrite(b'\1' * MiB, i * MiB), 'ENOSPC'))
            assert error_of(lambda: h.zero(8 * MiB, 8 * MiB, nbd.CMD_FLAG_NO_HOLE)) == 'ENOSPC'
            assert (MiB, full * MiB) in [(o, min(n, full * MiB)) for o, n in d.ranges('f', 'b')], 'marked before it failed'
            h.flush()
            for i in range(1, full):
                assert h.pread(MiB, i * MiB) == b'\1' * MiB
            os.unlink(ballast)
            h.trim(8 * MiB, 8 * MiB)
            h.pwrite(b'\2' * MiB, full * MiB, nbd.CMD_FLAG_FUA)
            assert h.pread(MiB, full * MiB) == b'\2' * MiB
            assert d.qmp.events == []


def _fails(call, errno):
    try:
        call()
    except nbd.Error as e:
        assert e.errno == errno
        return True
    return False


def broken(tmp_path, trigger):
    """A disk whose reads and writes are errors of the kernel while the file `trigger` is there."""
    return Stalled(str(tmp_path), filters=['error'],
                   plugin=['memory', '{size}', 'error=EIO', 'error-rate=100%', f'error-file={trigger}'])


def test_a_disk_that_fails(tmp_path):
    """EIO from the kernel for each kind of request, and no longer than the disk fails; the connection lives."""
    trigger = str(tmp_path / 'trigger')
    with broken(tmp_path, trigger) as disk, Daemon() as d:
        add_path(d, 'f', disk.path)
        d.cmd('block-dirty-bitmap-add', node='f', name='b')
        with connect(d, 'f') as h:
            h.pwrite(b'a' * 4096, 0)
            write_file(trigger, b'')
            for call in (lambda: h.pread(4096, MiB), lambda: h.pwrite(b'x' * 4096, MiB), lambda: h.zero(4096, 2 * MiB),
                         lambda: h.pwrite(b'x' * 4096, 3 * MiB, nbd.CMD_FLAG_FUA)):
                assert error_of(call) == 'EIO'
            os.unlink(trigger)
            assert d.ranges('f', 'b') == [(i * MiB, 64 * KiB) for i in range(4)]
            h.pwrite(b'b' * 4096, MiB)
            assert h.pread(4096, MiB) == b'b' * 4096
            h.flush()
        assert d.qmp.events == [], 'as with the reference: clients are told, monitors are not'


def test_a_failed_flush_stays(tmp_path):
    """The kernel tells once that written data are lost. Every later flush of the node, and every FUA, says it
    again, on every connection, until the node is opened anew."""
    trigger = str(tmp_path / 'trigger')
    options = {'driver': 'host_device', 'node-name': 'f'}
    with broken(tmp_path, trigger) as disk, loop_device(disk.path) as device, Daemon() as d:
        d.cmd('blockdev-add', {**options, 'filename': device})
        d.export('f')
        with connect(d, 'f') as h, connect(d, 'f') as other:
            write_file(trigger, b'')  # first: the kernel may write the page at any time
            h.pwrite(b'x' * 4096, 0)
            assert error_of(h.flush) == 'EIO'
            os.unlink(trigger)
            for c in (h, other, h):
                assert error_of(c.flush) == 'EIO'
                assert error_of(lambda: c.pwrite(b'y' * 4096, 8192, nbd.CMD_FLAG_FUA)) == 'EIO'
            h.pwrite(b'z' * 4096, 4096)
            assert other.pread(4096, 4096) == b'z' * 4096
        d.cmd('block-export-del', id='exp-f')
        d.qmp.event('BLOCK_EXPORT_DELETED', id='exp-f')
        d.cmd('blockdev-del', node_name='f')
        d.cmd('blockdev-add', {**options, 'filename': device})
        d.export('f')
        with connect(d, 'f') as h:
            h.pwrite(b'x' * 4096, 0, nbd.CMD_FLAG_FUA)
            h.flush()
