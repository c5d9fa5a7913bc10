#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Does blockstatus find what is there, and say so when it is not? Against a small server of ours.

usage: blockstatus_test.py BLOCKSTATUS"""
import json
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import unittest

PROGRAM = ''
SIZE = 64 << 30
GRANULARITY = 65536
RUNS = 50
OPT_GO, OPT_STRUCTURED, OPT_CONTEXT, OPT_EXTENDED = 7, 8, 10, 11
REPLY_MAGIC = 0x0003e889045565a9
WRITE, DISC, STATUS = 1, 2, 7
CONTEXT = 'qemu:dirty-bitmap:b0'


class Server:
    """Remembers which blocks were written, and describes at most `most` extents in a reply."""

    def __init__(self, extended=True, most=10, spoil=None):
        self.extended, self.most, self.spoil = extended, most, spoil
        self.dirty = set()
        self.statuses = 0
        self.folder = tempfile.TemporaryDirectory()
        self.path = f'{self.folder.name}/nbd.sock'
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
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
                wide = self.negotiate(client, stream)
                while self.one_request(client, stream, wide):
                    pass
            except (OSError, struct.error):
                pass  # the client has left

    def negotiate(self, client, stream):
        client.sendall(b'NBDMAGICIHAVEOPT' + struct.pack('>H', 3))
        stream.read(4)
        wide = False
        while True:
            _, option, length = struct.unpack('>8sII', stream.read(16))
            stream.read(length)
            head = struct.pack('>QI', REPLY_MAGIC, option)
            if option == OPT_EXTENDED and not self.extended:
                client.sendall(head + struct.pack('>II', 0x80000001, 0))
                continue
            wide = wide or option == OPT_EXTENDED
            if option == OPT_CONTEXT:
                client.sendall(head + struct.pack('>III', 4, 4 + len(CONTEXT), 77) + CONTEXT.encode())
            if option == OPT_GO:
                client.sendall(head + struct.pack('>IIHQH', 3, 12, 0, SIZE, 1))
            client.sendall(head + struct.pack('>II', 1, 0))
            if option == OPT_GO:
                return wide

    def extents(self, off, length):
        """What lies there, in blocks, neighbours of a kind put together."""
        found, at, end = [], off, off + length
        for block in sorted(b for b in self.dirty if off <= b * GRANULARITY < end):
            start = block * GRANULARITY
            if start > at:
                found.append((start - at, 0))
            found.append((GRANULARITY, 1))
            at = start + GRANULARITY
        if at < end:
            found.append((end - at, 0))
        return found[:self.most]

    def one_request(self, client, stream, wide):
        if wide:
            magic, _, kind, cookie, off, length = struct.unpack('>IHHQQQ', stream.read(32))
            assert magic == 0x21e41c71
        else:
            magic, _, kind, cookie, off, length = struct.unpack('>IHHQQI', stream.read(28))
            assert magic == 0x25609513
        if kind == DISC:
            return False
        if kind == WRITE:
            stream.read(length)
            self.dirty.add(off // GRANULARITY)
            client.sendall(struct.pack('>IIQ', 0x67446698, 0, cookie))
            return True
        assert kind == STATUS
        self.statuses += 1
        found = self.extents(off, length)
        if self.spoil:
            found = self.spoil(found)
        if wide:
            data = struct.pack('>II', 77, len(found)) + b''.join(struct.pack('>QQ', *e) for e in found)
            client.sendall(struct.pack('>IHHQQQ', 0x6e8a278c, 1, 6, cookie, off, len(data)) + data)
        else:
            data = struct.pack('>I', 77) + b''.join(struct.pack('>II', *e) for e in found)
            client.sendall(struct.pack('>IHHQI', 0x668e33ef, 1, 5, cookie, len(data)) + data)
        return True


def run_it(server, *arguments):
    out = subprocess.run([PROGRAM, '--socket', server.path, '--runs', str(RUNS), *arguments],
                         capture_output=True, text=True, timeout=60, check=False)
    return out.returncode, json.loads(out.stdout) if out.stdout else {}, out.stderr


class BlockStatus(unittest.TestCase):
    def marked(self, **options):
        server = Server(**options)
        self.addCleanup(server.__exit__)
        self.assertEqual(run_it(server, '--mark')[0], 0)
        self.assertEqual(len(server.dirty), RUNS)
        return server

    def walk(self, server, *arguments):
        return run_it(server, '--context', CONTEXT, *arguments)

    def test_all_runs_are_found(self):
        for arguments in ([], ['--depth', '16'], ['--extended'], ['--extended', '--depth', '4', '--piece', '8000000000']):
            with self.subTest(arguments=arguments):
                server = self.marked()
                code, report, errors = self.walk(server, '--walks', '3', *arguments)
                self.assertEqual((code, errors), (0, ''))
                self.assertEqual((report['runs'], report['requests'] * 3), (RUNS, server.statuses))

    def test_one_request_when_all_is_told_at_once(self):
        server = self.marked(most=10000)
        self.assertEqual(self.walk(server, '--extended')[1]['requests'], 1)

    def test_a_run_missing_or_too_many(self):
        for extended in (True, False):
            server = self.marked(extended=extended)
            options = ['--extended'] if extended else []
            lost = server.dirty.pop()
            code, _, errors = self.walk(server, *options)
            self.assertEqual(code, 1)
            self.assertIn(f'{RUNS - 1} dirty runs found, there are {RUNS}', errors)
            server.dirty.add(lost + 1 if lost + 1 not in server.dirty else lost - 1)
            code, _, errors = self.walk(server, *options)
            self.assertEqual(code, 1)
            self.assertIn('ought to be at', errors)

    def test_no_extended_headers(self):
        server = self.marked(extended=False)
        code, _, errors = self.walk(server, '--extended')
        self.assertEqual(code, 77)
        self.assertIn('does not know extended headers', errors)

    def test_malformed_extents(self):
        for spoil in (lambda found: [], lambda found: [(0, 0), *found]):
            server = self.marked(spoil=spoil)
            self.assertEqual(self.walk(server)[0], 1)
            self.assertEqual(self.walk(server, '--extended')[0], 1)


if __name__ == '__main__':
    PROGRAM = sys.argv[1]
    unittest.main(argv=sys.argv[:1])
