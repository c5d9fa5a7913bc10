# SPDX-License-Identifier: Apache-2.0
"""The examples of the documents are true: lists are lists that would be carried out, commands do what the
words around them say. A block that is not understood is a fault, so none is passed over."""
import glob
import json
import os
import re
import shutil
import subprocess
import tempfile

import pytest

import harness
from backup_tools import until
from harness import DEADLINE, ROOT, MiB, Daemon

TOOL = os.path.join(harness.BIN, 'tidemark')
TRANSACTIONS, MAN7, MAN1 = 'docs/transactions.md', 'docs/man/tidemark-transactions.7.scd', 'docs/man/tidemark.1.scd'
# What the lists of all the documents name.
NODES = ['disk0', 'disk1', 'disk2', 't0', 't1', 'target0']
BITMAPS = {'disk0': ['b0', 'mon', 'monday'], 'disk1': ['b0', 'mon', 'tuesday'], 'disk2': ['b0']}


def read(name):
    with open(os.path.join(ROOT, name)) as f:
        return f.read()


def blocks(name):
    """What stands between lines of three backticks. A manual page has backslashes twice."""
    for text in re.findall(r'^```\w*\n(.*?)^```$', read(name), re.M | re.S):
        yield re.sub(r'\\(.)', r'\1', text, flags=re.S) if name.endswith('.scd') else text


def is_shell(text):
    return re.match(r'tidemark |cat ', text)


def lists(name):
    """Each list as the tool takes it: of a request its arguments, of commands what they write into a file."""
    for text in blocks(name):
        if text.startswith('{"execute"'):
            request = json.loads(text)
            assert request['execute'] == 'transaction'
            yield json.dumps(request['arguments'])
        elif is_shell(text):
            yield from re.findall(r'<<END\n(.*?)^END$', text, re.M | re.S)
        else:
            yield text


LISTS = [(name, i, text) for name in (TRANSACTIONS, MAN7, MAN1) for i, text in enumerate(lists(name))]


def n_actions(text):
    if text.startswith('{'):
        return len(json.loads(text)['actions'])
    return sum(1 for line in text.splitlines() if line and not line.startswith('#'))


def txn(command, text, **env):
    """The answer of a list that is right."""
    r = subprocess.run([TOOL, 'txn', command, '-', '--json'], input=text, capture_output=True, text=True, timeout=DEADLINE,
                       env={**os.environ, 'LC_ALL': 'C.UTF-8', **env})
    assert r.returncode == 0, r.stdout + r.stderr
    return json.loads(r.stdout)


@pytest.fixture(scope='module')
def documented():
    """A daemon with all that the lists name."""
    with Daemon() as d:
        for node in NODES:
            d.add_disk(node, 4 * MiB)
        for node, bitmaps in BITMAPS.items():
            for b in bitmaps:
                d.cmd('block-dirty-bitmap-add', node=node, name=b)
        yield d


def test_the_documents_have_lists():
    assert [name for name, _, _ in LISTS] == [TRANSACTIONS, MAN7, MAN1, MAN1]


@pytest.mark.parametrize('name, i, text', LISTS, ids=[f'{os.path.basename(n)}-{i}' for n, i, _ in LISTS])
def test_a_list_is_one_that_would_be_carried_out(documented, name, i, text):
    assert n_actions(text) >= 2
    assert isinstance(txn('explain', text)['dependencies'], list)  # all words are in the schema; no daemon is asked
    told = txn('check', text, TIDEMARK_SOCKET=documented.qmp_path)
    assert [a['outcome'] for a in told['actions']] == ['exercised'] * n_actions(text)


def test_what_the_first_example_says_of_itself(documented):
    """The merge finds what the add made, the backup what the merge put there; the clear touches another one."""
    edges = {(e['action'], e['on']) for e in txn('explain', LISTS[0][2])['dependencies']}
    assert {(1, 0), (2, 1), (3, 1)} <= edges


# ---------------------------------------------------------------- commands

class Place:
    """A directory in which commands are run; the daemons that they leave are ended."""

    def __init__(self):
        self.dir = tempfile.mkdtemp(prefix='tidemark-test-')  # a short name: sockets are made below
        self.env = {**os.environ, 'TMPDIR': self.dir, 'XDG_RUNTIME_DIR': self.dir, 'LC_ALL': 'C.UTF-8',
                    'PATH': f'{harness.BIN}:{os.environ["PATH"]}:/usr/bin:/bin'}
        self.env.pop('TIDEMARK_SOCKET', None)

    def sh(self, text):
        """All of the lines succeed; what they print."""
        r = subprocess.run(['sh', '-eu'], input=text, capture_output=True, text=True, cwd=self.dir, env=self.env,
                           timeout=4 * DEADLINE)
        assert r.returncode == 0, f'{r.stdout}{r.stderr}'
        return r.stdout

    def __enter__(self):
        return self

    def __exit__(self, *failure):
        for s in glob.glob(self.dir + '/**/*.sock', recursive=True):
            if 'nbd' not in os.path.basename(s):
                subprocess.run([TOOL, '--socket', s, 'stop'], capture_output=True, check=False, timeout=DEADLINE)
        shutil.rmtree(self.dir)


def indented(name, heading):
    """The commands under a heading of a document: what is indented, all of it."""
    part = re.search(rf'^## {heading}.*?\n(.*?)^## ', read(name), re.M | re.S)[1]
    return ''.join(line[4:] for line in part.splitlines(True) if line.startswith('    '))


def test_the_first_five_minutes():
    """As they stand, but for the building, which has been done."""
    with Place() as p:
        os.mkdir(p.dir + '/build')
        os.symlink(harness.BIN, p.dir + '/build/bin')
        with open(p.dir + '/run', 'w') as f:
            f.write('#!/bin/sh\n[ "$*" = --build-only ] && echo built\n')
        os.chmod(p.dir + '/run', 0o755)
        del p.env['XDG_RUNTIME_DIR']
        commands = indented('README.md', 'The first five minutes')
        assert commands.startswith('./run --build-only\n') and commands.count('tidemark ') >= 10
        out = p.sh(commands)
        assert out.startswith('built\n') and 'export-size: 67108864' in out  # of nbdinfo
        assert '64 KiB of 64 MiB dirty' in out  # of bitmap map
        assert '\nsame\n' in out
        until('both daemons are gone', lambda: not glob.glob(p.dir + '/*/*.sock'))


def test_examples_of_the_manual_page():
    """In their order, with directories that need no root."""
    shell = [text for text in blocks(MAN1) if is_shell(text)]
    assert len(shell) == 3
    with Place() as p:
        p.sh('truncate -s 64M disk1.raw disk2.raw')
        p.sh(re.sub('/(backups|tmp)/', p.dir + '/', shell[0]))
        with open(p.dir + '/disk1.raw', 'rb') as one, open(p.dir + '/restored/disk1.raw', 'rb') as two:
            data = one.read()
            assert data[MiB:MiB + 65536] == b'\x07' * 65536 and two.read() == data
        assert '0 B of 64 MiB dirty' in p.sh(shell[1])
        p.sh('tidemark bitmap add disk2 b0')
        assert '2 actions done' in p.sh(shell[2])
