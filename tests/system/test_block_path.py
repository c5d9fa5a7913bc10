# SPDX-License-Identifier: Apache-2.0
"""What lies between an export and the disk: direct I/O, windows, zeroes, holes, files that change
underneath, devices, full disks, errors of real disks. What is written is compared with a model."""
import contextlib
import os
import random

import nbd
import pytest

from harness import Daemon, KiB, MiB, QmpError
from mounts import file_system

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
