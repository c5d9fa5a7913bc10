#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Does nbdmark make dirty what it says, and notice what it must? Against a small server of ours.

usage: nbdmark_test.py NBDMARK"""
import array
import json
import pathlib
import struct
import subprocess
import sys
import time
import unittest

sys.dont_write_bytecode = True

import blockstatus_test

PROGRAM = ''
SIZE = blockstatus_test.SIZE
ALIGN = 65536
WRITE, DISC, TRIM = 1, 2, 4
SIMPLE_MAGIC = 0x67446698


class Server(blockstatus_test.Server):
    """Remembers what was asked of it. `spoil` turns a reply into another, or None: hangs up."""

    def __init__(self, spoil=None):
        super().__init__(spoil=spoil)
        self.requests = []

    def one_request(self, client, stream, _wide):
        head = stream.read(28)
        if len(head) < 28:
            return False
        _, _, command, cookie, off, length = struct.unpack('>IHHQQI', head)
        if command == DISC:
            return False
        if command == WRITE:
            stream.read(length)
        self.requests.append((command, off, length))
        reply = struct.pack('>IIQ', SIMPLE_MAGIC, 0, cookie)
        if self.spoil:
            reply = self.spoil(len(self.requests), reply)
        if reply is None:
            return False
        client.sendall(reply)
        return True


class Nbdmark(unittest.TestCase):
    def run_it(self, server, *arguments):
        out = subprocess.run([PROGRAM, '--socket', server.path, *map(str, arguments)], capture_output=True,
                             text=True, timeout=60, check=False)
        return out.returncode, json.loads(out.stdout) if out.stdout else {}, out.stderr

    def trim(self, server, runs, length, *more):
        return self.run_it(server, '--runs', runs, '--run', length, '--align', ALIGN, *more)

    def test_runs_are_apart_and_aligned(self):
        for runs, length in ((1, ALIGN), (1000, ALIGN), (777, 5 * ALIGN), (8192, SIZE // 8192 // 2)):
            with Server() as server:
                code, report, _ = self.trim(server, runs, length)
                self.assertEqual((code, report['requests']), (0, runs))
                self.assertEqual({r[0] for r in server.requests}, {TRIM})
                at = sorted((off, n) for _, off, n in server.requests)
                self.assertEqual({n for _, n in at}, {length})
                self.assertFalse([off for off, _ in at if off % ALIGN])
                self.assertTrue(all(a + n <= b for (a, n), (b, _) in zip(at, at[1:])))
                self.assertLessEqual(at[-1][0] + length, SIZE)

    def test_seeds_differ(self):
        places = []
        for seed in (1, 1, 2):
            with Server() as server:
                self.trim(server, 100, ALIGN, '--seed', seed)
                places.append(sorted(server.requests))
        self.assertEqual(places[0], places[1])
        self.assertNotEqual(places[0], places[2])

    def test_a_long_run_goes_in_pieces(self):
        with Server() as server:
            code, _, _ = self.trim(server, 2, 5 << 30)
            self.assertEqual(code, 0)
            self.assertEqual(sorted(n for _, _, n in server.requests), [1 << 30] * 10)
            self.assertEqual(len({off for _, off, _ in server.requests}), 10)

    def test_what_does_not_fit(self):
        with Server() as server:
            code, _, stderr = self.trim(server, 100, SIZE // 100)
            self.assertEqual((code, server.requests), (2, []))
            self.assertIn('do not fit', stderr)

    def test_an_error_is_one(self):
        def refuse(n, reply):
            return reply[:4] + struct.pack('>I', 5) + reply[8:] if n == 70 else reply
        with Server(refuse) as server:
            code, report, stderr = self.trim(server, 100, ALIGN)
            self.assertEqual((code, report), (1, {}))
            self.assertIn('refused', stderr)

    def test_a_reply_to_nothing(self):
        with Server(lambda n, reply: reply[:8] + struct.pack('>Q', 10**6) if n == 3 else reply) as server:
            self.assertEqual(self.trim(server, 100, ALIGN)[0], 1)

    def test_silence(self):
        with Server(lambda n, reply: None if n == 50 else reply) as server:
            code, _, stderr = self.trim(server, 100, ALIGN)
            self.assertEqual(code, 1)
            self.assertIn('hung up', stderr)

    def test_times_of_replies(self):
        with Server() as server:
            path = pathlib.Path(server.folder.name) / 'times'
            begin = time.monotonic_ns()
            code, report, _ = self.run_it(server, '--seconds', 2, '--times', path, '--depth', 4)
            times = array.array('Q', path.read_bytes())
            self.assertEqual((code, len(times)), (0, report['requests']))
            self.assertEqual(len(server.requests), report['requests'])
            self.assertEqual({(c, n) for c, _, n in server.requests}, {(WRITE, 4096)})
            self.assertEqual(list(times), sorted(times))
            self.assertTrue(begin < times[0] and times[-1] < time.monotonic_ns())
            self.assertGreater(times[-1] - times[0], 150e6)  # not only the first few


if __name__ == '__main__':
    PROGRAM = sys.argv.pop(1)
    unittest.main()
