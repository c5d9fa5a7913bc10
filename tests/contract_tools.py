# SPDX-License-Identifier: Apache-2.0
"""What the tests of the contract's tables share (tests/contract.toml says which row is which test).

A *story* is a function of a daemon that returns what it saw: outcomes, bitmaps, events. both() tells it to
tidemarkd and to qemu-storage-daemon and compares. Error texts are ours, so an outcome is 'ok' or the class
and the reason of an error; that our text names what the client typed is checked on the way.
"""
import contextlib
import glob
import hashlib
import os
import re

import pytest

from backup_tools import GRANULE, until, without_pauses
from harness import Daemon, MiB, QmpError, which

FORMS = ['plain', 'list']
SIZE = 4 * MiB
BITMAP = 'block-dirty-bitmap-'

# What both daemons say in words of their own. The first that fits counts.
REASONS = [
    ('exists', r'already exists|exists already|already in use|in use already'),
    ('not paused', r'was not paused'),
    ('paused', r'is paused already|already paused|currently paused|is paused: '),
    ('in use', r'in use|is busy'),
    ('missing', r'not found|annot find|could not be found'),
    ('sizes', r'different sizes|does not fit|sizes differ'),
    ('type', r'Invalid parameter type|expected: |is missing|is unexpected|must be a '),
    ('enabled', r'incompatible with readonly|is enabled and'),
]
VERB = re.compile(r"[Jj]ob '(\S+)' in state '(\w+)' cannot accept (?:command|the) verb '([\w-]+)'")


def reason_of(text):
    m = VERB.search(text)
    if m:
        return ('verb', *m.groups())
    return next((name for name, words in REASONS if re.search(words, text)), text)


def attempt(d, form, kind, data, *names):
    """'ok', or class and reason of the error. Ours names these things, and is told where in a list it failed."""
    try:
        if form == 'plain':
            d.cmd(kind, data)
        else:
            d.cmd('transaction', {'actions': [{'type': kind, 'data': data}]})
    except QmpError as e:
        if d.kind == 'tidemarkd':
            for n in names:
                assert n in e.desc, e.desc
            at = {'action': 0, 'kind': kind, 'phase': 'prepare', 'undone': True}
            assert e.data == (at if form == 'list' else None) or reason_of(e.desc) == 'type', e.data
        return e.cls, reason_of(e.desc)
    return 'ok'


def job_events(d, name, status='null'):
    """The job's path until this status, without the pauses that a drain may insert: statuses as 'S:x',
    other events with their data."""
    path = []

    def take(e):
        data = e.get('data', {})
        if name not in (data.get('id'), data.get('device')):
            return False
        path.append('S:' + data['status'] if e['event'] == 'JOB_STATUS_CHANGE' else (e['event'], data))
        return True
    waiting, d.qmp.events = d.qmp.events, []
    while f'S:{status}' not in path:
        e = waiting.pop(0) if waiting else d.qmp.read()
        assert 'event' in e, e
        if not take(e):
            d.qmp.events.append(e)
    d.qmp.events += waiting
    return without_pauses(path)


def send(d, form, kind, data):
    assert attempt(d, form, kind, data) == 'ok'


def refusal(reason):
    return 'GenericError', reason


def bits(*granules, n=SIZE // GRANULE):
    """The hash of a bitmap in which these are set."""
    packed = bytearray((n + 63) // 64 * 8)
    for g in granules:
        packed[g // 8] |= 1 << g % 8
    return hashlib.sha256(packed).hexdigest()


def bitmaps(d, node='d'):
    """{name: (hash of the bits, flags)} of a node. (The reference shows nameless ones, too.)"""
    rows = [b for b in d.node(node).get('dirty-bitmaps', []) if 'name' in b]
    flags = ('recording', 'busy', 'persistent', 'inconsistent')
    return {b['name']: (d.sha256(node, b['name']), [f for f in flags if b.get(f)]) for b in rows}


def write(d, *granules, node='d'):
    """Guest writes to these granules, through the node's export."""
    nbd = pytest.importorskip('nbd', reason='python3-libnbd')
    h = nbd.NBD()
    h.connect_uri(d.uri(node))
    for g in granules:
        h.pwrite(b'\x5a' * 512, g * GRANULE + 512)
    h.shutdown()


def in_time(d, story):
    """What a story(seconds) tells that has to be over within these: (whether it was, what it tells). A machine
    that is busy gets more time; nothing waits for it."""
    for seconds in (0.2, 0.8, 2.4):  # our daemon lets no list wait for 3
        ok, told = story(seconds)
        if ok:
            break
        wipe(d)
    return told


def add_slow(d, seconds, size):
    """A node `slow` that takes so long for each request."""
    d.cmd('blockdev-add', {'driver': 'null-co', 'node-name': 'slow', 'size': size, 'latency-ns': int(seconds * 1e9)})


class Sides:
    """Our daemon, and the reference where it is installed (else None). They serve one test after another."""

    def __init__(self):
        with contextlib.ExitStack() as stack:
            self.ours = stack.enter_context(Daemon())
            self.theirs = stack.enter_context(Daemon(kind='qsd')) if which('qemu-storage-daemon') else None
            self.stack = stack.pop_all()

    def both(self, story, expected=None):
        """What our daemon's story is; the reference's has to be the same."""
        told = story(self.ours)
        if expected is not None:
            assert told == expected, 'tidemarkd'
        if self.theirs is None:
            pytest.skip('qemu-storage-daemon is not installed; tidemarkd alone did right')
        assert story(self.theirs) == told, 'qemu-storage-daemon'
        return told

    def wipe(self):
        for d in filter(None, (self.ours, self.theirs)):
            wipe(d)

    def end(self):
        """The daemons end well, and ours says so."""
        self.stack.close()

    def kill(self):
        """After a failure: what they said, and away with them."""
        failure = AssertionError()
        self.stack.__exit__(AssertionError, failure, failure.__traceback__)


def wipe(d):
    """Exports, jobs, nodes, objects, files, events: nothing is left for the next test."""
    for e in d.cmd('query-block-exports'):
        d.cmd('block-export-del', id=e['id'], mode='hard')
    until('no export', lambda: not d.cmd('query-block-exports'))

    def no_job():
        for j in d.cmd('query-jobs'):
            with contextlib.suppress(QmpError):
                d.cmd('job-dismiss' if j['status'] == 'concluded' else 'job-cancel', id=j['id'])
        return not d.cmd('query-jobs')
    until('no job', no_job)

    def no_node():
        names = [n['node-name'] for n in d.cmd('query-named-block-nodes')]
        for n in names:
            with contextlib.suppress(QmpError):
                d.cmd('blockdev-del', {'node-name': n})
        return not names
    until('no node', no_node)
    for path in glob.glob(os.path.join(d.dir, '*.raw')):
        os.unlink(path)
    d.cmd('query-jobs')
    d.qmp.events.clear()
