#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Does nbdload notice what it must? Runs it against a small server that can be told to misbehave.

usage: nbdload_test.py NBDLOAD"""
import json
import pathlib
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import unittest

NBDLOAD = ''
SIZE = 1 << 20
BLOCK = 4096
OPT_GO, OPT_STRUCTURED = 7, 8
REPLY_MAGIC, SIMPLE, CHUNK = 0x0003e889045565a9, 0x67446698, 0x668e33ef
READ, WRITE, DISC = 0, 1, 2
NONE, DATA, HOLE, ERROR = 0, 1, 2, 0x8001
DONE = 1
READ_ONLY, FUA, MULTI_CONN = 1 << 1 | 1, 1 << 3 | 1, 1 << 8 | 1


class Server:
    """Serves a bytearray. `answer` is a method name: how reads and writes are answered."""

    def __init__(self, answer='proper', flags=MULTI_CONN, family=socket.AF_UNIX):
        self.disk = bytearray(SIZE)
        self.answer = getattr(self, answer)
        self.flags = flags
        self.writes = []
        self.fua = 0
        self.folder = tempfile.TemporaryDirectory()
        self.path = f'{self.folder.name}/nbd.sock'
        self.listener = socket.socket(family)
        self.listener.bind(self.path if family == socket.AF_UNIX else ('127.0.0.1', 0))
        self.listener.listen()
        self.acceptor = threading.Thread(target=self.accept, daemon=True)
        self.acceptor.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        # Closed only when nobody is in accept(): the next server may get the same file descriptor, and
        # a thread of this one would take its clients.
        self.listener.shutdown(socket.SHUT_RDWR)
        self.acceptor.join()
        self.listener.close()
        self.folder.cleanup()

    def accept(self):
        while True:
            try:
                client = self.listener.accept()[0]
            except OSError:
                return
            threading.Thread(target=self.serve, args=(client,), daemon=True).start()

    def serve(self, client):
        with client, client.makefile('rb') as stream:
            try:
                structured = self.negotiate(client, stream)
                while self.one_request(client, stream, structured):
                    pass
            except (OSError, struct.error):
                pass  # the client has left

    def negotiate(self, client, stream):
        client.sendall(b'NBDMAGICIHAVEOPT' + struct.pack('>H', 3))
        stream.read(4)
        structured = False
        while True:
            _, option, length = struct.unpack('>8sII', stream.read(16))
            data = stream.read(length)
            if option == OPT_STRUCTURED:
                structured = True
                client.sendall(struct.pack('>QIII', REPLY_MAGIC, option, 1, 0))
            elif data[4:-4] not in (b'', b'disk'):
                client.sendall(struct.pack('>QIII', REPLY_MAGIC, option, 0x80000006, 0))
            elif option == OPT_GO:
                client.sendall(struct.pack('>QIIIHQH', REPLY_MAGIC, option, 3, 12, 0, SIZE, self.flags))
                client.sendall(struct.pack('>QIII', REPLY_MAGIC, option, 1, 0))
                return structured

    def one_request(self, client, stream, structured):
        _, flags, kind, cookie, off, length = struct.unpack('>IHHQQI', stream.read(28))
        if kind == DISC:
            return False
        data = stream.read(length) if kind == WRITE else None
        self.fua += flags & 1
        reply = self.answer(cookie, off, length, data, structured)
        client.sendall(reply or b'')
        return reply is not None

    # Building blocks of replies.

    def store(self, off, data):
        self.writes.append(off)
        self.disk[off:off + len(data)] = data

    def success(self, cookie, off, data, structured):
        """The reply to a read (data) or to a write (data is None)."""
        if not structured:
            return struct.pack('>IIQ', SIMPLE, 0, cookie) + (data or b'')
        if data is None:
            return struct.pack('>IHHQI', CHUNK, DONE, NONE, cookie, 0)
        cut = len(data) // 3  # not a multiple of 8
        return self.data_chunk(cookie, off + cut, data[cut:], 0) + self.data_chunk(cookie, off, data[:cut], DONE)

    @staticmethod
    def data_chunk(cookie, off, data, flags):
        return struct.pack('>IHHQIQ', CHUNK, flags, DATA, cookie, len(data) + 8, off) + data

    @staticmethod
    def failure(cookie, structured, error=5):
        if structured:
            return struct.pack('>IHHQIIH', CHUNK, DONE, ERROR, cookie, 9, error, 3) + b'bad'
        return struct.pack('>IIQ', SIMPLE, error, cookie)

    # Ways to answer.

    def proper(self, cookie, off, length, data, structured):
        if data is not None:
            self.store(off, data)
            return self.success(cookie, off, None, structured)
        return self.success(cookie, off, bytes(self.disk[off:off + length]), structured)

    def flip_last_byte(self, cookie, off, length, data, structured):
        if data is not None:
            return self.proper(cookie, off, length, data, structured)
        wrong = bytearray(self.disk[off:off + length])
        wrong[-1] ^= 1
        return self.success(cookie, off, bytes(wrong), structured)

    def flip_middle_byte(self, cookie, off, length, data, structured):
        if data is not None:
            return self.proper(cookie, off, length, data, structured)
        wrong = bytearray(self.disk[off:off + length])
        wrong[1234] ^= 128
        return self.success(cookie, off, bytes(wrong), structured)

    def lose_small_writes(self, cookie, off, length, data, structured):
        if data is None or length > BLOCK:
            return self.proper(cookie, off, length, data, structured)
        return self.success(cookie, off, None, structured)

    def wrong_place(self, cookie, off, length, data, structured):
        if data is not None:
            return self.proper(cookie, off, length, data, structured)
        wrong = off ^ BLOCK
        return self.success(cookie, off, bytes(self.disk[wrong:wrong + length]), structured)

    def fail_reads(self, cookie, off, length, data, structured):
        if data is not None:
            return self.proper(cookie, off, length, data, structured)
        return self.failure(cookie, structured)

    def fail_small_writes(self, cookie, off, length, data, structured):
        if data is None or length > BLOCK:
            return self.proper(cookie, off, length, data, structured)
        self.store(off, bytes(length // 2))
        return self.failure(cookie, structured, 28)

    def hole(self, cookie, off, length, data, structured):
        if data is not None:
            return self.proper(cookie, off, length, data, structured)
        return struct.pack('>IHHQIQI', CHUNK, DONE, HOLE, cookie, 12, off, length)

    def wrong_cookie(self, cookie, off, length, data, structured):
        return self.proper(cookie + (1 << 16), off, length, data, structured)

    def wrong_magic(self, cookie, off, length, data, structured):
        return b'xxxx' + self.proper(cookie, off, length, data, structured)[4:]

    def cut_reply(self, cookie, off, length, data, structured):
        """Says done before all the data came."""
        part = bytes(self.disk[off:off + length // 2])
        return self.data_chunk(cookie, off, part, DONE)

    def outside(self, cookie, off, length, data, structured):
        return self.data_chunk(cookie, off + 8, bytes(self.disk[off:off + length]), DONE)

    def hang_up(self, cookie, off, length, data, structured):
        return None

    def silence(self, cookie, off, length, data, structured):
        return b''


def run(server, arguments):
    place = ['--tcp', '127.0.0.1:%d' % server.listener.getsockname()[1]] \
        if server.listener.family == socket.AF_INET else ['--socket', server.path]
    return subprocess.run([NBDLOAD, *place, *arguments.split()],
                          capture_output=True, text=True, timeout=60, check=False)


class NbdloadTest(unittest.TestCase):
    def good(self, server, arguments):
        out = run(server, arguments)
        self.assertEqual(out.returncode, 0, out.stderr)
        self.assertEqual(out.stderr, '')
        self.assertEqual(len(out.stdout.splitlines()), 1)
        return json.loads(out.stdout)

    def bad(self, server, arguments, words):
        out = run(server, arguments)
        self.assertEqual(out.returncode, 1, out.stderr)
        self.assertIn(words, out.stderr)
        return json.loads(out.stdout) if out.stdout else None

    def test_mixed_load_of_a_proper_server(self):
        for arguments in ('--depth 8', '--depth 8 --structured', '--depth 4 --connections 3',
                          '--depth 4 --connections 3 --threads 2 --structured', '--depth 7 --verify full',
                          '--depth 16 --block 64k', '--depth 3 --sequential', '--depth 2 --block 512k'):
            for flags in (1, MULTI_CONN):
                with self.subTest(arguments, flags=flags), Server(flags=flags) as server:
                    r = self.good(server, f'--fill --recheck --reads 60 --requests 500 {arguments}')
                    self.assertEqual(r['requests'], 500)
                    self.assertEqual(r['reads'] + r['writes'], 500)
                    self.assertGreater(r['writes'], 0)
                    self.assertGreater(r['rechecked'], 0)
                    self.assertLessEqual(r['p50_us'], r['p90_us'])
                    self.assertLessEqual(r['p90_us'], r['p99_us'])
                    self.assertLessEqual(r['p99_us'], r['max_us'])

    def test_tcp(self):
        with Server(family=socket.AF_INET) as server:
            self.good(server, '--fill --recheck --reads 50 --requests 100 --depth 4 --export disk')

    def test_range_is_kept(self):
        with Server() as server:
            self.good(server, '--fill --reads 0 --requests 200 --depth 4 --offset 8k --length 100k')
            self.assertGreaterEqual(min(server.writes), 8192)
            self.assertEqual(server.disk[:8192], bytes(8192))
            self.assertEqual(server.disk[108 << 10:], bytes(SIZE - (108 << 10)))
            self.assertNotIn(bytes(8), [server.disk[i:i + 8] for i in range(8192, 108 << 10, 8)])

    def test_sequential_visits_each_block_once_in_a_round(self):
        with Server() as server:
            self.good(server, '--reads 0 --sequential --depth 4 --requests 512')
            self.assertEqual(server.writes, list(range(0, SIZE, BLOCK)) * 2)

    def test_time_ends_it(self):
        with Server() as server:
            r = self.good(server, '--fill --time 0.2 --depth 4')
            self.assertGreaterEqual(r['seconds'], 0.2)
            self.assertGreater(r['reads'], 0)

    def test_fua(self):
        with Server(flags=FUA) as server:
            self.good(server, '--reads 0 --requests 20 --fua')
            self.assertEqual(server.fua, 20)
        with Server() as server:
            self.bad(server, '--reads 0 --requests 20 --fua', 'FUA')

    def test_image_and_fill_write_the_same(self):
        with Server() as server:
            self.good(server, '--fill --seed 7')
            image = f'{server.folder.name}/image'
            subprocess.run([NBDLOAD, '--image', image, '--length', str(SIZE), '--seed', '7'], check=True)
            self.assertEqual(pathlib.Path(image).read_bytes(), server.disk)
            self.good(server, '--seed 7 --requests 100 --verify full')
            self.bad(server, '--seed 8 --requests 100', 'never written here')

    def test_wrong_data_is_seen(self):
        for answer, words in (('flip_last_byte', 'mismatch'), ('wrong_place', 'generation 0 of offset')):
            for structured in ('', '--structured'):
                with self.subTest(answer, structured=structured), Server(answer) as server:
                    r = self.bad(server, f'--fill --requests 50 --depth 4 {structured}', words)
                    self.assertEqual(r['mismatches'], 50)
                    self.good(server, f'--verify none --requests 50 {structured}')

    def test_a_byte_in_the_middle(self):
        for structured in ('', '--structured'):
            with Server('flip_middle_byte') as server:
                r = self.bad(server, f'--fill --requests 50 --verify full {structured}', 'mismatch')
                self.assertEqual(r['mismatches'], 50)
                # The sample moves: in 2000 reads it comes by.
                r = self.bad(server, f'--requests 2000 --depth 16 {structured}', 'mismatch')
                self.assertLess(r['mismatches'], 200)

    def test_lost_writes(self):
        with Server('lose_small_writes') as server:
            r = self.bad(server, '--fill --reads 0 --requests 100 --recheck', 'holds generation 0 of offset')
            self.assertEqual(r['mismatches'], r['rechecked'])

    def test_holes_are_zeroes(self):
        with Server('hole') as server:
            self.bad(server, '--fill --structured --requests 5', 'zeroes')
            self.good(server, '--structured --requests 5 --verify none')

    def test_errors_are_counted(self):
        for structured in ('', '--structured'):
            with Server('fail_reads') as server:
                r = self.bad(server, f'--fill --requests 50 --depth 8 {structured}', 'Input/output error')
                self.assertEqual((r['errors'], r['mismatches']), (50, 0))

    def test_a_block_whose_write_failed_is_left_alone(self):
        with Server('fail_small_writes') as server:
            r = self.bad(server, '--fill --reads 50 --requests 300 --depth 4 --recheck', 'error 28')
            self.assertEqual(r['mismatches'], 0)
            small = server.writes[1:]
            self.assertEqual(len(small), len(set(small)))

    def test_broken_protocol(self):
        for answer, arguments, words in (
                ('wrong_cookie', '', 'not in flight'), ('wrong_magic', '', 'magic'),
                ('cut_reply', '--structured', 'does not cover'), ('cut_reply', '', 'not asked for'),
                ('outside', '--structured', 'outside its request'), ('hang_up', '', 'hung up'),
                ('silence', '--stall 1', 'does not answer'),
                ('silence', '--stall 1 --connections 2', 'does not answer')):
            with self.subTest(answer, arguments=arguments), Server(answer) as server:
                r = self.bad(server, f'--requests 10 --depth 2 {arguments}', words)
                self.assertGreater(r['errors'], 0)

    def test_refusals(self):
        with Server(flags=READ_ONLY) as server:
            self.bad(server, '--reads 0 --requests 1', 'read-only')
            self.bad(server, '--requests 1 --offset 2M', 'not inside the export')
            self.bad(server, '--requests 1 --length 4k --connections 2', '1 blocks')
            self.bad(server, '--requests 1 --export other', 'refused')

    def test_usage(self):
        for arguments in ('', '--requests 0', '--requests x', '--requests 1 --block 100', '--time -1',
                          '--requests 1 --threads 2', '--requests 1 surplus', '--requests 99999999T',
                          '--requests 1 --verify much', '--unknown'):
            with self.subTest(arguments):
                out = subprocess.run([NBDLOAD, '--socket', '/nowhere', *arguments.split()],
                                     capture_output=True, text=True, check=False)
                self.assertEqual(out.returncode, 2)
                self.assertNotEqual(out.stderr, '')


if __name__ == '__main__':
    NBDLOAD = sys.argv.pop(1)
    unittest.main()
