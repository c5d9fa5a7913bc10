#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Does uringload notice what it must? It shares a pattern with nbdload, which makes its files.

usage: uringload_test.py URINGLOAD NBDLOAD"""
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

PROGRAMS = []
SIZE = 4 << 20


class Uringload(unittest.TestCase):
    def setUp(self):
        # Not /tmp: where that is a tmpfs it may refuse O_DIRECT.
        self.folder = tempfile.TemporaryDirectory(dir=os.getcwd())
        self.addCleanup(self.folder.cleanup)
        self.file = pathlib.Path(self.folder.name) / 'disk'
        subprocess.run([PROGRAMS[1], '--image', self.file, '--length', str(SIZE)], check=True)

    def run_it(self, *arguments):
        out = subprocess.run([PROGRAMS[0], '--file', self.file, *arguments], capture_output=True, text=True,
                             timeout=60, check=False)
        if out.returncode == 77:
            self.skipTest(out.stderr.strip())
        return out.returncode, json.loads(out.stdout) if out.stdout else {}, out.stderr

    def test_right_data(self):
        code, report, _ = self.run_it('--requests', '500', '--depth', '8')
        self.assertEqual((code, report['requests'], report['mismatches']), (0, 500, 0))
        self.assertGreater(report['iops'], 0)
        self.assertGreater(report['server_cpu_s'], 0)

    def test_a_wrong_word_is_seen(self):
        with open(self.file, 'r+b') as f:
            f.seek(SIZE // 2)
            f.write(b'12345678')
        code, report, errors = self.run_it('--requests', str(SIZE // 4096), '--sequential')
        self.assertEqual((code, report['mismatches']), (1, 1))
        self.assertIn(f'mismatch in the block at {SIZE // 2}', errors)

    def test_writes_are_read_back(self):
        code, report, _ = self.run_it('--requests', '300', '--depth', '16', '--reads', '0', '--recheck',
                                      '--seed', '5')
        self.assertEqual(code, 0)
        self.assertTrue(0 < report['rechecked'] <= 300)
        # They are on the file: what it held at first is gone.
        self.assertEqual(self.run_it('--requests', str(SIZE // 4096), '--sequential')[1]['mismatches'],
                         report['rechecked'])

    def test_what_it_refuses(self):
        for arguments in (['--requests', '1', '--reads', '50'], ['--requests', '1', '--depth', '0'],
                          ['--requests', '1', '--block', '1000'], []):
            self.assertEqual(self.run_it(*arguments)[0], 2, arguments)


if __name__ == '__main__':
    PROGRAMS[:] = sys.argv[1:3]
    unittest.main(argv=sys.argv[:1])
