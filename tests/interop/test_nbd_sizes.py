# SPDX-License-Identifier: Apache-2.0
"""Exports whose size is a multiple of nothing: every byte is served and none beyond (8.3, size; block size
info)."""
import errno
import json
import os
import subprocess

import nbd
import pytest

from backup_tools import assert_same, content
from harness import DEADLINE, Daemon, KiB, MiB, qemu_io, which
from nbd_raw import CACHE, MODES, READ, STATUS, TRIM, WRITE, ZERO, Raw

SIZES = [1, 511, 1000, 4097, MiB + 1, 3 * MiB + 777]
needs = {t: pytest.mark.skipif(not which(t), reason=f'{t} is not installed')
         for t in ('nbdinfo', 'nbdcopy', 'qemu-img', 'qemu-io')}


def run(*args):
    r = subprocess.run([which(args[0]), *args[1:]], capture_output=True, text=True, timeout=DEADLINE)
    assert r.returncode == 0, f'{args}: {r.stdout}{r.stderr}'
    return r.stdout


@pytest.fixture(params=['file', 'window', 'direct'])
def odd(request):
    """odd(size): a daemon that exports so many random bytes by the name 'odd' (and no other such export);
    .bytes() is what is there now."""
    with Daemon() as d:
        def make(size):
            for e in d.cmd('query-block-exports'):
                d.cmd('block-export-del', id=e['id'], mode='hard')
                d.qmp.event('BLOCK_EXPORT_DELETED')
            start = 700 if request.param == 'window' else 0
            path = d.path(f'{size}.raw')
            with open(path, 'wb') as f:
                f.write(os.urandom(start + size + (300 if start else 0)))
            node = {'driver': 'file', 'node-name': f'f{size}', 'filename': path, 'discard': 'unmap'}
            if request.param == 'direct':
                node['cache'] = {'direct': True}
            d.cmd('blockdev-add', node)
            window = {'offset': start, 'size': size} if start else {}
            d.cmd('blockdev-add', {'driver': 'raw', 'node-name': f'n{size}', 'file': f'f{size}', 'discard': 'unmap',
                                   **window})
            d.export(f'n{size}', 'odd')
            d.bytes = lambda: content(path)[start:start + size]
            d.around = lambda: (content(path)[:start], content(path)[start + size:])
            return d
        yield make


def test_every_byte_and_none_beyond(odd):
    for size in SIZES:
        every_byte_and_none_beyond(odd(size), size)


def every_byte_and_none_beyond(d, size):
    around = d.around()
    for mode in MODES:
        c = Raw(d.nbd_path)
        c.go('odd', mode=mode, contexts=[] if mode == 'simple' else ['base:allocation'])
        assert c.size == size
        assert c.request(READ, 0, size).data == d.bytes()
        assert c.request(WRITE, size - 1, 1, payload=mode[:1].encode()).error == 0
        assert d.bytes()[-1:] == mode[:1].encode()
        for cmd, code in ((READ, errno.EINVAL), (WRITE, errno.ENOSPC), (ZERO, errno.ENOSPC), (TRIM, errno.EINVAL),
                          (CACHE, errno.EINVAL)) + (((STATUS, errno.EINVAL),) if mode != 'simple' else ()):
            payload = b'xx' if cmd == WRITE else b''
            assert c.request(cmd, size, 1, payload=payload[:1]).error == code
            assert c.request(cmd, size - 1, 2, payload=payload).error == code
        if mode != 'simple':
            rows = c.request(STATUS, 0, size).extents['base:allocation']
            assert sum(n for n, _ in rows) == size
        assert c.request(CACHE, 0, size).error == 0
        tail = min(size, 300)
        assert c.request(ZERO, size - tail, tail).error == 0
        assert d.bytes()[-tail:] == bytes(tail)
        assert c.request(TRIM, 0, size).error == 0
        assert c.request(ZERO, 0, size).error == 0
        assert d.bytes() == bytes(size)
        data = os.urandom(size)
        assert c.request(WRITE, 0, size, payload=data).error == 0
        assert d.bytes() == data
    assert d.around() == around


@needs['nbdinfo']
@needs['nbdcopy']
@needs['qemu-img']
@needs['qemu-io']
def test_odd_sizes_and_real_clients(odd):
    for size in (1000, MiB + 4097):
        real_clients(odd(size), size)


def real_clients(d, size):
    uri, copy = d.uri('odd'), d.path('copy')
    h = nbd.NBD()
    h.connect_uri(uri)
    assert [h.get_size(), h.get_block_size(nbd.SIZE_MINIMUM), h.get_block_size(nbd.SIZE_MAXIMUM)] == [size, 1, 32 * MiB]
    assert h.pread(size, 0) == d.bytes()
    h.pwrite(b'last', size - 4)
    rows = json.loads(run('nbdinfo', '--map', '--json', uri))
    assert rows[-1]['offset'] + rows[-1]['length'] == size
    run('nbdcopy', uri, copy)
    assert_same(d.bytes(), copy)
    with open(copy, 'wb') as f:
        f.write(os.urandom(size))
    run('nbdcopy', copy, uri)
    assert_same(d.bytes(), copy)
    # These see a disk of whole sectors, the rest of the last one reading as zeroes.
    run('qemu-img', 'compare', '-f', 'raw', '-F', 'raw', uri, copy)
    run('qemu-img', 'convert', '-f', 'raw', '-O', 'raw', uri, copy)
    assert content(copy) == d.bytes() + bytes(-size % 512)
    qemu_io(uri, f'write -P 9 {size - 1} 1', f'read -P 9 {size - 1} 1', f'read -P 0 {size} {-size % 512}')
    assert d.bytes()[-1:] == b'\x09'


def test_a_bitmap_of_an_odd_size(odd):
    d = odd(MiB + 4097)
    d.cmd('block-dirty-bitmap-add', {'node': f'n{MiB + 4097}', 'name': 'b', 'granularity': 64 * KiB})
    d.export(f'n{MiB + 4097}', 'marked', bitmaps=['b'])
    c = Raw(d.nbd_path)
    c.go('marked', mode='extended', contexts=['qemu:dirty-bitmap:b'])
    assert c.request(WRITE, MiB + 4096, 1, payload=b'x').error == 0
    assert c.request(STATUS, 0, MiB + 4097).extents['qemu:dirty-bitmap:b'] == [(MiB, 0), (4097, 1)]
