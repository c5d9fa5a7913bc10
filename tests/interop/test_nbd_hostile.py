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

from backup_tools import content, fill, refused, until
from harness import DEADLINE, Daemon, KiB, MiB
from nbd_raw import (CACHE, EXT_CHUNK, FLUSH, MODES, PAYLOAD_LEN, READ, STATUS, TRIM, WRITE, ZERO, Raw, ext_request,
                     option, request, string)

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
    yield from served()


@pytest.fixture(scope='module')
def shared():
    """The same for many short tests that leave nothing behind."""
    yield from served()


def served():
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
        until('the memory has come back', lambda: memory(daemon) < 64 * MiB)


def normal_client(d):
    c = Raw(d.nbd_path)
    c.go('disk', structured=True)
    assert c.request(READ, 0, 4096).data == content(d.path('disk.raw'))[:4096]
    assert c.request(WRITE, 2 * MiB, 512, payload=b'n' * 512).error == 0
    c.s.close()


def maker(mode):
    """How a request of this form is made; a write with the flag that it needs."""
    def extended(cmd, offset=0, length=0, flags=0, cookie=7):
        return ext_request(cmd, offset, length, flags | (PAYLOAD_LEN if cmd == WRITE else 0), cookie)
    return extended if mode == 'extended' else request


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
def test_broken_handshakes(shared, name):
    """Cut off, or left hanging by us: both end."""
    d = shared
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
    normal_client(d)


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
    'EXTENDED_HEADERS with data': (11, b'd'),
    'SET_META before structured': (10, string(b'disk') + struct.pack('>I', 0)),
    'unknown': (0x7fffffff, b'abc'),
    'too big': (7, bytes(300 * KiB)),
}


@pytest.mark.parametrize('name', MALFORMED)
def test_malformed_options_are_refused_by_name(shared, name):
    """An error reply, and the same connection can still GO."""
    d = shared
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
            data += option(r.choice([1, 2, 3, 5, 6, 7, 8, 9, 10, 11, r.randrange(1 << 32)]), body,
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

@pytest.mark.parametrize('mode', MODES)
def test_garbage_instead_of_a_request(d, mode):
    for garbage in (bytes(32), all_ones(32), random.Random(1).randbytes(4096), b'\x25\x60\x95', b'\x21\xe4\x1c\x71'):
        c = Raw(d.nbd_path)
        c.go('disk', mode=mode)
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


@pytest.mark.parametrize('mode', MODES)
def test_random_requests(d, mode):
    """Every field random; the framing is right, so the connection must answer all of them."""
    r = random.Random(9)
    c = Raw(d.nbd_path)
    c.go('disk', mode=mode, contexts=['base:allocation'] if mode == 'extended' else [])
    for i in range(500):
        cmd = r.choice([READ, WRITE, FLUSH, TRIM, CACHE, ZERO, STATUS, r.randrange(8, 65536)])
        length = r.choice([0, 1, 512, r.randrange(100_000)])
        flags = r.choice([0, 0, 1, 2, 4, 8, 16, r.getrandbits(16)])
        offset = r.choice([0, r.randrange(SIZE), r.getrandbits(64)])
        if mode == 'extended' and cmd != WRITE and (flags & PAYLOAD_LEN or i % 7 == 0):
            flags |= PAYLOAD_LEN  # with a payload that it does not take, or that is no list of contexts
            c.send(ext_request(cmd, offset, length, flags) + r.randbytes(length))
            c.asked[7] = (offset, 0)
            c.reply()
        elif mode == 'extended' and r.randrange(4) == 0:
            c.request(READ if cmd == WRITE else cmd, offset, r.getrandbits(64), flags & ~PAYLOAD_LEN)
        else:
            c.request(cmd, offset, length, flags, r.randbytes(length) if cmd == WRITE else b'')


@pytest.mark.parametrize('mode', ['simple', 'extended'])
@pytest.mark.parametrize('length', [512, 100 * KiB, 8 * MiB])
def test_disconnect_in_the_middle_of_a_payload(d, length, mode):
    """The write that never arrived whole never happens."""
    head = maker(mode)(WRITE, 16 * MiB, length)
    for share in (-len(head) + 1, -5, 0, 1, length // 2, length - 1):  # below 0: within the header
        c = Raw(d.nbd_path)
        c.go('disk', mode=mode)
        c.send(head[:len(head) + min(share, 0)] + b'!' * share)
        c.s.close()
    normal_client(d)
    assert not any(content(d.path('disk.raw'))[16 * MiB:16 * MiB + length])


def test_disconnect_in_the_middle_of_other_payloads(d):
    """One that names contexts, and one that nobody wants."""
    for cmd, length in ((STATUS, 16), (TRIM, 32 * MiB), (STATUS, 31 * MiB)):
        for share in (0, 1, 12):
            c = Raw(d.nbd_path)
            c.go('disk', mode='extended', contexts=['base:allocation'])
            c.send(ext_request(cmd, 0, length, PAYLOAD_LEN) + bytes(share))
            c.s.close()


def test_payloads_without_end_that_nobody_wants(d):
    """Each is read past and refused; others are served meanwhile, nothing piles up."""
    c = Raw(d.nbd_path)
    c.go('disk', mode='extended')
    waste = ext_request(TRIM, 0, 32 * MiB, PAYLOAD_LEN) + bytes(32 * MiB)
    for _ in range(10):
        c.send(waste)
        normal_client(d)
    for _ in range(10):
        assert c.reply().error
    assert memory(d) < 32 * MiB


def test_disconnect_with_requests_in_flight(d):
    for _ in range(20):
        c = Raw(d.nbd_path)
        c.go('disk')
        c.send(b''.join(request(READ, i * MiB, MiB, cookie=i) for i in range(60)))
        c.s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        c.s.close()


def requests_in(c, seconds):
    """How many small reads a well-behaved client gets in so long."""
    end, n = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        assert len(c.request(READ, n % 1000 * 4096, 4096).data) == 4096
        n += 1
    return n


@pytest.mark.parametrize('mode', ['simple', 'extended'])
def test_a_client_that_never_reads(d, shared, mode):
    """It asks for 100 GiB; only some MiB of that are ever made, and others go on at full speed: that of a
    daemon without such a client, looked at in the same moments."""
    good, alone = Raw(d.nbd_path), Raw(shared.nbd_path)
    for c in (good, alone):
        c.go('disk', mode=mode)
    lazy = []
    for _ in range(4):
        c = Raw(d.nbd_path)
        c.go('disk', mode=mode)
        c.s.setblocking(False)
        batch = b''.join(maker(mode)(READ, i % 2 * 32 * MiB, 32 * MiB, cookie=i) for i in range(100))
        sent = 0
        try:
            while sent < 8 * len(batch):
                sent += c.s.send(batch[sent % len(batch):])
        except BlockingIOError:
            pass
        lazy.append(c)
    beside = [Raw(d.nbd_path) for _ in range(3)]
    for c in [good, *beside]:  # whichever loop serves it
        if c is not good:
            c.go('disk', mode=mode)
        # Whatever else this machine does may disturb a look, but not all of them.
        assert any(requests_in(c, 0.1) > requests_in(alone, 0.1) / 2 for _ in range(20))
    assert memory(d) < 4 * 64 * MiB + 100 * MiB
    for c in lazy:  # and a transaction does not wait for them
        start = time.monotonic()
        d.cmd('transaction', actions=[])
        d.cmd('block-dirty-bitmap-add', node='disk', name='b')
        d.cmd('block-dirty-bitmap-remove', node='disk', name='b')
        assert time.monotonic() - start < 15
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


def test_deleting_an_export_whose_replies_nobody_reads(d):
    """Safe: refused with the reason. Hard: at once, and the node can go too."""
    for mode in MODES:
        d.add_disk('other', SIZE)
        d.export('other')
        c = Raw(d.nbd_path)
        c.go('other', mode=mode)
        c.send(b''.join(maker(mode)(READ, 0, 32 * MiB, cookie=i) for i in range(50)))
        c.take(100)  # they have begun to come
        with refused("'exp-other' is in use by 1 connection", "'hard'"):
            d.cmd('block-export-del', id='exp-other')
        with refused('other', 'export'):
            d.cmd('blockdev-del', {'node-name': 'other'})
        start = time.monotonic()
        d.cmd('block-export-del', id='exp-other', mode='hard')
        d.qmp.event('BLOCK_EXPORT_DELETED', id='exp-other')
        d.cmd('blockdev-del', {'node-name': 'other'})
        assert time.monotonic() - start < 15
        c.s.close()


def test_one_byte_at_a_time(d):
    one_byte_at_a_time(d, option(7, string('disk') + b'\0\0'), request, struct.pack('>IIQ', 0x67446698, 0, 7))
    end = struct.pack('>IHHQQQ', EXT_CHUNK, 1, 0, 7, 4096, 0)
    data = struct.pack('>IHHQQQQ', EXT_CHUNK, 1, 1, 7, 4096, 608, 4096)
    one_byte_at_a_time(d, option(11) + option(7, string('disk') + b'\0\0'), maker('extended'), end, data)


def one_byte_at_a_time(d, options, make, end, data=None):
    c = Raw(d.nbd_path, flags=None)
    c.s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    talk = b'\0\0\0\3' + options + make(WRITE, 4096, 600) + b'b' * 600 + make(READ, 4096, 600)
    for i in range(len(talk)):
        c.s.send(talk[i:i + 1])
    while True:
        _, opt, kind, length = struct.unpack('>QIII', c.take(20))
        c.take(length)
        if (opt, kind) == (7, 1):
            break
    data = data or end
    assert c.take(len(end)) == end
    assert c.take(len(data) + 600) == data + b'b' * 600


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
    """Of all kinds: silent ones, half a handshake, a whole one with requests. Nothing is left of them."""
    before = memory(d)
    go = b'\0\0\0\3' + option(11) + option(7, string('disk') + b'\0\0')
    for i in range(2000):
        s = socket.socket(socket.AF_UNIX)
        s.connect(d.nbd_path)  # blocks while the backlog is full
        if i % 3 == 0:
            s.send(b'\0\0\0\3' + option(3))
        elif i % 3 == 1:
            s.send(go + ext_request(READ, 0, MiB) * 3)
        s.close()
    until('memory is given back', lambda: memory(d) < before + 32 * MiB)


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
        assert d.proc.wait(DEADLINE) == 0


def test_a_silent_client_is_cut_off_in_the_handshake(silent):
    """Within the handshake's 10 s, most of which have passed by now; others go on meanwhile."""
    d, c = silent
    normal_client(d)
    c.s.settimeout(DEADLINE)
    assert c.at_end()
