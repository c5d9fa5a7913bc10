# SPDX-License-Identifier: Apache-2.0
"""Lists that mix bitmaps, nodes, exports and jobs: one by one and as a list, undone, and as a dry run.

Each random list is run with an `abort` behind it (nothing may have changed), as a dry run, and for good; another
daemon runs its actions one by one. TIDEMARK_MIXED_LISTS (60) lists; TIDEMARK_MIXED_SEED repeats a run.
"""
import contextlib
import os
import random

import nbd
import pytest

from file_state import whole_state
from harness import MiB, Daemon, QmpError

LISTS = int(os.environ.get('TIDEMARK_MIXED_LISTS', '60'))
SIZE = MiB
FILES = 'abcde'
ABORT = {'type': 'abort', 'data': {}}


def act(kind, /, **data):
    return {'type': kind, 'data': {k.replace('_', '-'): v for k, v in data.items()}}


def bitmap(kind, node, name, **more):
    return act('block-dirty-bitmap-' + kind, node=node, name=name, **more)


def add(name, **options):
    return act('blockdev-add', node_name=name, **options)


def disk(name, file):
    return add(name, driver='raw', file={'driver': 'file', 'node-name': name + '-file', 'filename': file + '.raw'})


def over(name, node):
    return add(name, driver='raw', file=node)


def delete(name):
    return act('blockdev-del', node_name=name)


def export(id, node, **options):
    return act('block-export-add', type='nbd', id=id, node_name=node, name=id, **options)


def unexport(id, mode='safe'):
    return act('block-export-del', id=id, mode=mode)


def set_node(id, node):
    return act('block-export-set-node', id=id, node_name=node)


def backup(device, target, job='j', sync='full', **options):
    return act('blockdev-backup', job_id=job, device=device, target=target, sync=sync, auto_finalize=False, **options)


def drive_backup(device, target, job='j', sync='full', **options):
    return act('drive-backup', job_id=job, device=device, target=target, sync=sync, auto_finalize=False, **options)


class Stand:
    """Disks a, b, c (and x over b), of which e (writable) shows a and f (with bitmap m) shows c; files a to e."""

    def __init__(self, d):
        self.d = d
        for file in FILES:
            with open(d.path(file + '.raw'), 'wb') as f:
                f.write(file.encode() * SIZE)
        for a in (disk('a', 'a'), disk('b', 'b'), disk('c', 'c'), over('x', 'b'), bitmap('add', 'a', 'm'),
                  bitmap('add', 'b', 'm', granularity=4096), bitmap('add', 'c', 'm', disabled=True),
                  export('e', 'a', writable=True), export('f', 'c', bitmaps=['m'])):
            d.cmd(a['type'], a['data'])
        h = nbd.NBD()
        h.connect_uri(d.uri('e'))
        h.pwrite(b'\x5a' * 100000, 200000)
        h.shutdown()

    def as_list(self, actions, **properties):
        m = self.d.qmp.raw({'execute': 'transaction', 'arguments': {'actions': actions, 'properties': properties}})
        if 'return' in m:
            return None
        assert m['error']['data']['undone'] is True
        return m['error']['data']['action'], m['error']['desc']

    def dry(self, actions):
        told = self.d.cmd('transaction', actions=actions, properties={'dry-run': True})
        return None if told['outcome'] == 'would-commit' else (told['failed-action'], told['error'])

    def one_by_one(self, actions):
        for i, a in enumerate(actions):
            try:
                self.d.cmd(a['type'], a['data'])
            except QmpError as e:
                return i, e.desc
        return None

    def end_jobs(self):
        for j in self.d.cmd('query-jobs'):
            self.d.cmd('job-cancel', id=j['id'])
            self.d.qmp.job_end(j['id'])

    def comparable(self, with_jobs):
        """What two daemons have to agree about. Jobs run at their own speed, and of those made one by one some have
        run before the next command: what they mark is not compared."""
        state = whole_state(self.d)
        for n in state['nodes']:
            n['file'] = n['file'].replace(self.d.dir + '/', '')
            n['image']['filename'] = n['image']['filename'].replace(self.d.dir + '/', '')
            for b in n.get('dirty-bitmaps', []):
                del b['generation']
                if with_jobs:
                    del b['count']
        jobs = [(j['id'], j['type']) for j in state['jobs']]
        inode = {i[0]: name for name, i in state['files'].items()}
        locks = sorted((inode[i], *what) for i, *what in state['locks'])
        files = {name: i[1:4] for name, i in state['files'].items()}
        return [state['nodes'], {} if with_jobs else state['bits'], jobs, state['exports'], files, state['open'], locks]


@contextlib.contextmanager
def stand():
    with Daemon() as d:
        yield Stand(d)


# ---------------------------------------------------------------- lists that somebody will write

KNOWN = {
    'an export and its node go': [unexport('e'), delete('a')],
    'to another node, the old one goes': [set_node('e', 'b'), delete('a')],
    'to another node and on': [set_node('e', 'b'), delete('a'), disk('a', 'd'), set_node('e', 'a'), delete('x')],
    'to a new node': [disk('n', 'd'), set_node('e', 'n'), delete('a'), bitmap('add', 'n', 'm')],
    'the same names over another file': [unexport('e'), delete('a'), disk('a', 'd'), export('e', 'a', writable=True)],
    'an export of what an export stood on': [unexport('e'), delete('a'), over('y', 'b'), export('e', 'y'), delete('x')],
    'a new disk with its export': [disk('n', 'd'), export('n', 'n', writable=True), bitmap('add', 'n', 'm'), backup('n', 'x')],
    'to a new target': [disk('n', 'd'), bitmap('add', 'a', 'since'), backup('a', 'n')],
    'away, clear, remove': [unexport('f'), bitmap('clear', 'c', 'm'), bitmap('remove', 'c', 'm'), delete('c')],
    'the target was exported': [unexport('e'), backup('b', 'a'), bitmap('clear', 'b', 'm')],
    'a file under a node that goes': [unexport('f'), delete('c'), drive_backup('a', 'c.raw'), disk('c', 'd')],
    'the same file again': [unexport('e'), delete('a'), disk('a', 'a'), export('e', 'a', writable=True)],
    'the same file by another node': [set_node('e', 'b'), bitmap('remove', 'a', 'm'), disk('n', 'a'),
                                      export('n', 'n', writable=True), delete('a')],
    'a backup to the file that was shown': [unexport('e'), bitmap('remove', 'a', 'm'),
                                           drive_backup('c', 'a.raw', mode='existing')],
    'a backup in place of the file that was shown': [unexport('e'), delete('a'), drive_backup('c', 'a.raw')],
    'made, exported, moved away': [disk('n', 'd'), export('n', 'n'), set_node('n', 'b'), delete('n')],
    'there and away': [disk('n', 'd'), export('n', 'n', writable=True), unexport('n'), delete('n')],
}


@pytest.mark.parametrize('name', KNOWN)
def test_known_lists(name):
    with stand() as s, stand() as other:
        assert check(s, other, KNOWN[name], name) is None


def check(s, other, actions, told):
    """What became of the list: None, or the failure."""
    before = whole_state(s.d)
    failed = s.as_list(actions + [ABORT])
    assert whole_state(s.d) == before, told
    dry = s.dry(actions)
    assert whole_state(s.d) == before, told
    outcome, plain = s.as_list(actions), other.one_by_one(actions)
    assert failed[0] == (outcome[0] if outcome else len(actions)), told
    assert outcome == plain, (told, outcome, plain)
    if not any(a['type'] == 'drive-backup' for a in actions):  # of a new file it checks only what can be told
        assert dry == outcome, (told, dry, outcome)
    if outcome:
        assert whole_state(s.d) == before, told
    else:
        with_jobs = any('job-id' in a['data'] for a in actions)
        assert s.comparable(with_jobs) == other.comparable(with_jobs), told
    return outcome


# ---------------------------------------------------------------- random ones

class World:
    """What there may be, roughly: so that most actions find what they name."""

    def __init__(self, r):
        self.r = r
        self.nodes = ['a', 'b', 'c', 'x']
        self.exports = ['e', 'f']
        self.unused = list('de')
        self.n_jobs = 0

    def node(self):
        return self.r.choice(self.nodes + ['zz'] * (self.r.random() < 0.02) or ['zz'])

    def export(self):
        return self.r.choice(self.exports + ['zz'] * (self.r.random() < 0.02) or ['zz'])

    def new(self, taken, names):
        free = [n for n in names if n not in taken]
        return self.r.choice(free) if free and self.r.random() < 0.98 else self.r.choice(names)

    def action(self):
        kind = self.r.choices(['bitmap', 'add', 'delete', 'export', 'unexport', 'set-node', 'backup', 'drive-backup'],
                              [6, 4, 5, 5, 4, 5, 2, 1])[0]
        return getattr(self, 'make_' + kind.replace('-', '_'))()

    def make_bitmap(self):
        kind, name, node = self.r.choice(['add', 'remove', 'clear', 'enable', 'disable', 'rename', 'copy']), \
            self.r.choice('mpq'), self.node()
        more = {'rename': {'new_name': self.r.choice('mpq')}, 'copy': {'bitmaps': [{'node': self.node(), 'name': 'm'}]}}
        return bitmap(kind, node, name, **more.get(kind, {}))

    def make_add(self):
        name = self.new(self.nodes, 'abcnxy')
        if self.unused and self.r.random() < 0.6:
            made = disk(name, self.unused.pop(self.r.randrange(len(self.unused))))
        elif self.nodes and self.r.random() < 0.6:
            made = over(name, self.node())
        else:
            made = add(name, driver='null-co', size=SIZE)
        self.nodes.append(name)
        return made

    def make_delete(self):
        name = self.node()
        if name in self.nodes:
            self.nodes.remove(name)
        return delete(name)

    def make_export(self):
        id = self.new(self.exports, 'efgh')
        self.exports.append(id)
        bitmaps = {'bitmaps': ['m']} if self.r.random() < 0.3 else {}
        return export(id, self.node(), writable=self.r.random() < 0.6, **bitmaps)

    def make_unexport(self):
        id = self.export()
        if id in self.exports:
            self.exports.remove(id)
        return unexport(id, self.r.choice(['safe', 'hard']))

    def make_set_node(self):
        return set_node(self.export(), self.node())

    def job(self):
        self.n_jobs += 1
        return f'j{self.n_jobs}'

    def make_backup(self):
        return backup(self.node(), self.node(), self.job())

    def make_drive_backup(self):
        return drive_backup(self.node(), self.r.choice(['new', './new', 'e.raw', 'd.raw']), self.job())


def make_list(r, s):
    """Actions each of which has been seen to succeed behind those before it, save perhaps the last one."""
    world, actions = World(r), []
    careless = r.random() < 0.4
    for _ in range(r.randrange(4, 20)):
        kept = (list(world.nodes), list(world.exports), list(world.unused))
        one = world.action()
        failed = s.as_list(actions + [one, ABORT])
        if failed[0] == len(actions) + 1:
            actions.append(one)
        elif careless and r.random() < 0.1:
            return actions + [one]
        else:
            world.nodes, world.exports, world.unused = kept
    return actions


def test_random_lists():
    seed = int(os.environ.get('TIDEMARK_MIXED_SEED', '1'))
    print(f'TIDEMARK_MIXED_SEED={seed} TIDEMARK_MIXED_LISTS={LISTS}')
    r = random.Random(seed)
    n_failed = 0
    for number in range(LISTS):
        with stand() as s, stand() as other:
            actions = make_list(r, s)
            n_failed += check(s, other, actions, f'seed {seed}, list {number}: {actions}') is not None
            for one in (s, other):
                one.end_jobs()
    assert LISTS < 50 or LISTS * 0.02 < n_failed < LISTS * 0.7
