# SPDX-License-Identifier: Apache-2.0
"""Clients that lie, stall, flood and vanish. Whatever they do, others are served, memory stays
bounded, and the daemon ends with 0 (the fixture checks all three after each test)."""
import os
import random
import re
import socket
import struct
import time

import pytest

from backup_tools import content, fill, until
from harness import DEADLINE, Daemon, KiB, MiB
from nbd_raw import (CACHE, FLUSH, READ, STATUS, TRIM, WRITE, ZERO, Raw, request)

SIZE = 64 * MiB
HELLO = b'IHAVEOPT'


def memory(d):
    """Resident bytes that are the daemon's own (not pages of files); 0 where a sanitizer adds its."""
    with open(f'/proc/{d.proc.pid}/maps') as f:
        if re.search('lib[at]san', f.read()):
            return 0
    with open(f'/proc/{d.proc.pid}/status') as f:
        return next(int(line.split()[1]) for line in f if line.startswith('RssAnon')) * KiB


def descriptors(d):
    return len(os.listdir(f'/proc/{d.proc.pid}/fd'))


@pytest.fixture(scope='module', autouse=True)
def silent():
    """A client that says nothing more, from the beginning of this file to its last test."""
    with Daemon() as daemon:
        fill(daemon.add_disk('disk', SIZE), MiB)
        daemon.export('disk')
        c = Raw(daemon.nbd_path)
        c.send(HELLO)
        yield daemon, c


@pytest.fixture
def d():
    args = ['--nbd-server', 'addr.type=unix,addr.path=nbd.sock,max-connections=0']
    with Daemon(args=args, nbd=False) as daemon:
        daemon.nbd_path = daemon.path('nbd.sock')
        fill(daemon.add_disk('disk', SIZE), MiB)
        daemon.export('disk')
        normal_client(daemon)
        before = descriptors(daemon)
        yield daemon
        normal_client(daemon)
        until('all connections are closed', lambda: descriptors(daemon) <= before)
        assert memory(daemon) < 64 * MiB


def normal_client(d):
    c = Raw(d.nbd_path)
    c.go('disk', structured=True)
    assert c.request(READ, 0, 4096).data == content(d.path('disk.raw'))[:4096]
    assert c.request(WRITE, 2 * MiB, 512, payload=b'n' * 512).error == 0
    c.s.close()


def option(opt, data=b'', length=None):
    return HELLO + struct.pack('>II', opt, len(data) if length is None else length) + data


def string(s):
    return struct.pack('>I', len(s)) + s


# ---------------------------------------------------------------- handshake

def all_ones(n):
    return b'\xff' * n


HANDSHAKES = {
    'nothing': b'',
    'flags nobody knows': all_ones(4),
    'half flags': b'\0\0',
    'no option magic': b'\0\0\0\3' + b'GARBAGE!' + bytes(8),
    'http': b'GET / HTTP/1.1\r\nHost: x\r\n\r\n',
    'length 2^32-1': b'\0\0\0\3' + HELLO + all_ones(8),
    'GO of 2^32-1': b'\0\0\0\3' + option(7, length=0xffffffff),
    'EXPORT_NAME of 2^32-1': b'\0\0\0\3' + option(1, length=0xffffffff),
    'EXPORT_NAME too long': b'\0\0\0\3' + option(1, b'x' * 5000),
    'not fixed and asks': b'\0\0\0\0' + option(3),
    'cut in an option header': b'\0\0\0\3' + HELLO + b'\0\0',
    'cut in option data': b'\0\0\0\3' + option(7, b'abc', length=100),
}


@pytest.mark.parametrize('name', HANDSHAKES)
def test_broken_handshakes(d, name):
    """Cut off, or left hanging by us: both end."""
    for leave in (True, False):
        c = Raw(d.nbd_path, flags=None)
        c.send(HANDSHAKES[name])
        if leave:
            c.s.close()
        else:
            c.s.shutdown(socket.SHUT_WR)
            while True:
                try:
                    if not c.s.recv(65536):
                        break
                except ConnectionResetError:
                    break


MALFORMED = {
    'GO, name longer than the option': (7, all_ones(4) + b'disk'),
    'GO, name length overflows': (7, struct.pack('>I', 0xfffffffe) + b'disk\0\0'),
    'GO, empty': (7, b''),
    'GO, no info count': (7, string(b'disk')),
    'GO, more infos than data': (7, string(b'disk') + b'\xff\xff'),
    'GO, data left over': (7, string(b'disk') + b'\0\0xx'),
    'INFO, name of 5000': (6, string(b'x' * 5000) + b'\0\0'),
    'LIST with data': (3, b'data'),
    'STRUCTURED_REPLY with data': (8, b'd'),
    'LIST_META, empty': (9, b''),
    'LIST_META, no count': (9, string(b'disk')),
    'LIST_META, count 2^32-1': (9, string(b'disk') + all_ones(4)),
    'LIST_META, query overflows': (9, string(b'disk') + struct.pack('>II', 1, 0xffffffff) + b'base:'),
    'LIST_META, data left over': (9, string(b'disk') + struct.pack('>I', 0) + b'x'),
    'SET_META before structured': (10, string(b'disk') + struct.pack('>I', 0)),
    'unknown': (0x7fffffff, b'abc'),
    'too big': (7, bytes(300 * KiB)),
}


@pytest.mark.parametrize('name', MALFORMED)
def test_malformed_options_are_refused_by_name(d, name):
    """An error reply, and the same connection can still GO."""
    opt, data = MALFORMED[name]
    c = Raw(d.nbd_path)
    assert c.option(opt, data)[-1][0] >> 31
    assert c.go('disk')[-1][0] == 1
    assert c.request(READ, 0, 512).data == content(d.path('disk.raw'))[:512]


def test_random_handshakes(d):
    r = random.Random(5)
    for _ in range(300):
        c = Raw(d.nbd_path, flags=None)
        data = b'\0\0\0\3' if r.randrange(4) else r.randbytes(4)
        for _ in range(r.randrange(4)):
            body = string(b'disk') + struct.pack('>I', r.randrange(3)) + r.randbytes(r.randrange(40))
            data += option(r.choice([1, 2, 3, 5, 6, 7, 8, 9, 10, r.randrange(1 << 32)]), body,
                           r.choice([len(body), len(body), len(body) + 1, r.randrange(1 << 32)]))
        try:
            c.send(data)
        except (BrokenPipeError, ConnectionResetError):
            pass
        c.s.close()


def test_endless_haggling_ends(d):
    """A client that only ever asks is cut off some time."""
    c = Raw(d.nbd_path)
    with pytest.raises((EOFError, BrokenPipeError, ConnectionResetError)):
        for _ in range(1_000_000):
            c.option(3)


def test_options_too_long_without_end(d):
    """Read past politely, but only some MiB of them."""
    crowd = [Raw(d.nbd_path) for _ in range(3)]
    for c in crowd:
        sent = 0
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            while True:
                c.send(option(7, length=4 * MiB))
                for _ in range(64):
                    c.send(bytes(64 * KiB))
                    sent += 64 * KiB
        assert sent < 16 * MiB


# ---------------------------------------------------------------- transmission

def test_garbage_instead_of_a_request(d):
    for garbage in (bytes(28), all_ones(28), random.Random(1).randbytes(4096), b'\x25\x60\x95'):
        c = Raw(d.nbd_path)
        c.go('disk')
        c.send(garbage)
        c.s.shutdown(socket.SHUT_WR)
        assert c.at_end()


def test_offsets_and_lengths_that_overflow(d):
    values = [0, 1, 511, SIZE - 1, SIZE, SIZE + 1, (1 << 32) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
    c = Raw(d.nbd_path)
    c.go('disk', structured=True)
    for cmd in (READ, TRIM, CACHE, ZERO, STATUS):
        for offset in values:
            for length in (1, 512, 32 * MiB, 32 * MiB + 1, (1 << 32) - 1):
                r = c.request(cmd, offset, length)
                fits = offset + length <= SIZE and (cmd != READ or length <= 32 * MiB)
                assert bool(r.error) != (fits and cmd != STATUS), (cmd, offset, length, r.error)
    for offset in values:
        r = c.request(WRITE, offset, 512, payload=bytes(512))
        assert bool(r.error) != (offset + 512 <= SIZE), offset


def test_random_requests(d):
    """Every field random; the framing is right, so the connection must answer all of them."""
    r = random.Random(9)
    c = Raw(d.nbd_path)
    c.go('disk', structured=True)
    for _ in range(500):
        cmd = r.choice([READ, WRITE, FLUSH, TRIM, CACHE, ZERO, STATUS, r.randrange(8, 65536)])
        length = r.choice([0, 1, 512, r.randrange(100_000)])
        c.request(cmd, r.choice([0, r.randrange(SIZE), r.getrandbits(64)]), length,
                  r.choice([0, 0, 1, 2, 4, 8, 16, r.getrandbits(16)]), r.randbytes(length) if cmd == WRITE else b'')


@pytest.mark.parametrize('length', [512, 100 * KiB, 8 * MiB])
def test_disconnect_in_the_middle_of_a_payload(d, length):
    """The write that never arrived whole never happens."""
    for share in (0, 1, length // 2, length - 1):
        c = Raw(d.nbd_path)
        c.go('disk')
        c.send(request(WRITE, 16 * MiB, length) + b'!' * share)
        c.s.close()
    normal_client(d)
    assert not any(content(d.path('disk.raw'))[16 * MiB:16 * MiB + length])


def test_disconnect_with_requests_in_flight(d):
    for _ in range(20):
        c = Raw(d.nbd_path)
        c.go('disk')
        c.send(b''.join(request(READ, i * MiB, MiB, cookie=i) for i in range(60)))
        c.s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        c.s.close()


def test_a_client_that_never_reads(d):
    """It asks for 100 GiB; only some MiB of that are ever made, and others go on at speed."""
    lazy = []
    for _ in range(4):
        c = Raw(d.nbd_path)
        c.go('disk')
        c.s.setblocking(False)
        batch = b''.join(request(READ, i % 2 * 32 * MiB, 32 * MiB, cookie=i) for i in range(100))
        sent = 0
        try:
            while sent < 8 * len(batch):
                sent += c.s.send(batch[sent % len(batch):])
        except BlockingIOError:
            pass
        lazy.append(c)
    c = Raw(d.nbd_path)
    c.go('disk')
    start = time.monotonic()
    for i in range(500):
        assert len(c.request(READ, i * 4096, 4096).data) == 4096
    assert time.monotonic() - start < 3
    assert memory(d) < 4 * 64 * MiB + 100 * MiB
    for c in lazy:
        c.s.close()


def test_a_client_that_writes_and_never_reads_replies(d):
    """It is not read from for ever either."""
    c = Raw(d.nbd_path)
    c.go('disk')
    c.s.settimeout(1)
    one = request(WRITE, 0, 65536) + b'w' * 65536
    try:
        for _ in range(2000):
            c.s.sendall(one)
    except TimeoutError:
        pass
    normal_client(d)
    assert memory(d) < 200 * MiB


def test_block_status_that_nobody_reads(d):
    """Long replies to short questions count as well."""
    d.cmd('block-dirty-bitmap-add', node='disk', name='b', granularity=512)
    d.export('disk', 'marked', bitmaps=['b'])
    context = string(b'marked') + struct.pack('>I', 1) + string(b'qemu:dirty-bitmap:b')
    c = Raw(d.nbd_path)
    assert c.option(8)[-1][0] == c.option(10, context)[-1][0] == 1
    c.mode = 'structured'
    c.option(7, string(b'marked') + b'\0\0')
    for i in range(SIZE // 4096 // 64):
        c.send(b''.join(request(WRITE, (64 * i + k) * 4096, 512) + bytes(512) for k in range(64)))
        for k in range(64):
            assert c.reply().error == 0
    ask = b''.join(request(STATUS, 0, SIZE) for _ in range(1000))
    c.s.settimeout(1)
    with pytest.raises(TimeoutError):
        for _ in range(1000):
            c.s.sendall(ask)
    normal_client(d)
    assert memory(d) < 2 * 64 * MiB
    c.s.settimeout(DEADLINE)
    for _ in range(3):
        assert c.reply().error == 0
    c.s.close()


def test_one_byte_at_a_time(d):
    c = Raw(d.nbd_path, flags=None)
    c.s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    name = string(b'disk') + b'\0\0'
    talk = b'\0\0\0\3' + option(7, name) + request(WRITE, 4096, 600) + b'b' * 600 + request(READ, 4096, 600)
    for i in range(len(talk)):
        c.s.send(talk[i:i + 1])
    while True:
        _, _, kind, length = struct.unpack('>QIII', c.take(20))
        c.take(length)
        if kind == 1:
            break
    assert c.take(16) == struct.pack('>IIQ', 0x67446698, 0, 7)
    assert c.take(16 + 600) == struct.pack('>IIQ', 0x67446698, 0, 7) + b'b' * 600


# ---------------------------------------------------------------- crowds

def test_256_connections(d):
    conns = [Raw(d.nbd_path) for _ in range(256)]
    for c in conns:
        c.go('disk')
    for i, c in enumerate(conns):
        c.send(request(WRITE, 8 * MiB + i * 4096, 4096) + bytes([i]) * 4096)
    for c in conns:
        assert c.reply().error == 0
    for i, c in enumerate(conns):
        assert c.request(READ, 8 * MiB + i * 4096, 4096).data == bytes([i]) * 4096
        c.s.close()


def test_connect_storm(d):
    for i in range(2000):
        s = socket.socket(socket.AF_UNIX)
        s.connect(d.nbd_path)  # blocks while the backlog is full
        if i % 3 == 0:
            s.send(b'\0\0\0\3' + option(3))
        s.close()


def test_the_limit_on_connections():
    """Beyond it clients wait, and are served when others leave."""
    with Daemon(nbd=False) as d:
        fill(d.add_disk('disk', SIZE), MiB)
        d.cmd('nbd-server-start', {'addr': {'type': 'unix', 'data': {'path': d.nbd_path}}, 'max-connections': 2})
        d.export('disk')
        a, b = Raw(d.nbd_path), Raw(d.nbd_path)
        c = socket.socket(socket.AF_UNIX)
        c.connect(d.nbd_path)
        c.settimeout(0.2)
        with pytest.raises(TimeoutError):
            c.recv(1)
        a.s.close()
        c.settimeout(DEADLINE)
        assert c.recv(18) == b'NBDMAGICIHAVEOPT\0\3'
        b.s.close()
        c.close()
        normal_client(d)


def test_1000_exports(d):
    for i in range(1000):
        d.export('disk', f'e{i}', writable=i % 2 == 0, description='d' * (i % 100))
    c = Raw(d.nbd_path)
    replies = c.option(3)
    assert len(replies) == 1002
    assert {r[1][4:4 + struct.unpack('>I', r[1][:4])[0]].decode() for r in replies[:-1]} == \
        {'disk'} | {f'e{i}' for i in range(1000)}
    c.go('e999')
    assert c.request(READ, 0, 512).data == content(d.path('disk.raw'))[:512]
    assert len(d.cmd('query-block-exports')) == 1001


def test_exports_come_and_go_under_load(d):
    """Hard deletes and a server stop while clients have reads and writes in flight."""
    for i in range(30):
        d.export('disk', 'tmp')
        conns = [Raw(d.nbd_path) for _ in range(3)]
        for c in conns:
            c.go('tmp')
            c.send(b''.join(request(WRITE, 9 * MiB, 65536) + bytes(65536) + request(READ, 0, MiB) for _ in range(3)))
        d.cmd('block-export-del', id='exp-tmp', mode='hard')
        d.qmp.event('BLOCK_EXPORT_DELETED', id='exp-tmp')
        for c in conns:
            c.s.close()


def test_quit_with_hostile_clients_connected():
    with Daemon() as d:
        fill(d.add_disk('disk', SIZE), MiB)
        d.export('disk')
        conns = [Raw(d.nbd_path, flags=None)]
        half = Raw(d.nbd_path)
        half.send(HELLO)
        lazy = Raw(d.nbd_path)
        lazy.go('disk')
        lazy.send(b''.join(request(READ, 0, 32 * MiB) for _ in range(50)))
        writer = Raw(d.nbd_path)
        writer.go('disk')
        writer.send(request(WRITE, 0, MiB) + b'x')
        conns += [half, lazy, writer]
        d.cmd('quit')
        assert d.proc.wait(10) == 0


def test_a_silent_client_is_cut_off_in_the_handshake(silent):
    """Within the handshake's 10 s, most of which have passed by now; others go on meanwhile."""
    d, c = silent
    normal_client(d)
    c.s.settimeout(15)
    assert c.at_end()
