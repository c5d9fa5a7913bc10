# SPDX-License-Identifier: Apache-2.0
"""What `explain` calls independent is: neighbours without an edge between them may be swapped.

Random lists of all kinds over a few names, so that most actions meet another. Wherever explain shows no
edge between two neighbours, both orders are run dry: each action has to see and do the same, and to fail
with the same words (but for the names in them: of several that stand in the way, an error names one).
Lists that would be carried out are, in the one order on one daemon and in the other on another, and the
daemons have to agree about everything. TIDEMARK_SWAP_LISTS (100) lists; TIDEMARK_SWAP_SEED repeats a run.
"""
import os
import random
import re

import nbd

from harness import KiB, MiB, Daemon

LISTS = int(os.environ.get('TIDEMARK_SWAP_LISTS', '100'))
SIZE = 4 * MiB
NODES = ['f0', 'f1', 'r0', 'r1', 'r3', 's0', 's1']  # r3 beside r0; s0 and s1 over one file
PATHS = ['disk', './disk', 'hard', 'soft', 'here/disk', 'else', 'dir/../else', 'no/such']
BITMAP = 'block-dirty-bitmap-'
NEWEST_FIRST = {'generation'}  # members whose value says in which order things were made


class World:
    """A daemon that is brought to the same beginning before each list."""

    def __init__(self, daemon):
        self.d = daemon
        for name in ('disk', 'else'):
            with open(daemon.path(name), 'wb') as f:
                f.truncate(SIZE)
        os.link(daemon.path('disk'), daemon.path('hard'))
        os.symlink('disk', daemon.path('soft'))
        os.symlink('.', daemon.path('here'))
        os.mkdir(daemon.path('dir'))
        self.reset()

    def reset(self):
        for e in self.d.cmd('query-block-exports'):
            self.d.cmd('block-export-del', id=e['id'], mode='hard')
        while nodes := [n['node-name'] for n in self.d.cmd('query-named-block-nodes')]:
            self.d.cmd('blockdev-del', node_name=max(nodes))  # r* stand on f* and s*
        for name in ('f0', 'f1'):
            self.d.cmd('blockdev-add', driver='null-co', node_name=name, size=SIZE)
        for name, path in (('f8', 'disk'), ('f9', 'hard')):
            self.d.cmd('blockdev-add', driver='file', node_name=name, filename=path)
        for name, below in (('r0', 'f0'), ('r1', 'f1'), ('r3', 'f0'), ('s0', 'f8'), ('s1', 'f9')):
            self.d.cmd('blockdev-add', driver='raw', node_name=name, file=below)
        for node, name in (('r0', 'a'), ('r1', 'b'), ('f0', 'c')):
            self.d.cmd(BITMAP + 'add', node=node, name=name)
        for node, at in (('r0', 0), ('r1', MiB)):
            self.d.export(node)
            h = nbd.NBD()
            h.connect_uri(self.d.uri(node))
            h.pwrite(b'\x5a' * 64 * KiB, at)
            h.shutdown()
            self.d.cmd('block-export-del', id='exp-' + node, mode='hard')
        self.d.cmd('block-export-add', type='nbd', id='e0', node_name='r0', name='x')

    def run(self, actions, **properties):
        return self.d.qmp.raw({'execute': 'transaction',
                               'arguments': {'actions': actions, 'properties': properties}})

    def dump(self):
        nodes = {}
        for n in self.d.cmd('query-named-block-nodes'):
            bitmaps = {b['name']: {**{k: v for k, v in b.items() if k not in NEWEST_FIRST},
                                   'bits': self.d.sha256(n['node-name'], b['name'])}
                       for b in n.pop('dirty-bitmaps', [])}
            nodes[n['node-name']] = n, bitmaps
        exports = {e['id']: e for e in self.d.cmd('query-block-exports')}
        return nodes, exports


# ---------------------------------------------------------------- making lists

def pick_node(r):
    return r.choices([*NODES, 'f2', 'r2'], [3, 2, 6, 3, 4, 2, 2, 1, 2])[0]


def pick_source(r):
    name = r.choice('abc')
    return name if r.random() < 0.5 else {'node': pick_node(r), 'name': name}


def make_bitmap_action(r):
    kind = r.choice(['add', 'remove', 'clear', 'enable', 'disable', 'merge', 'rename', 'copy'])
    data = {'node': pick_node(r), 'target' if kind == 'merge' else 'name': r.choice('abc')}
    if kind in ('merge', 'copy'):
        data['bitmaps'] = [pick_source(r) for _ in range(r.randrange(1, 3))]
    if kind == 'rename':
        data['new-name'] = r.choice('abc')
    return {'type': BITMAP + kind, 'data': data}


def make_node_action(r):
    kind = r.choice(['add f', 'add r', 'add r', 'del', 'del', 'add both', 'add file'])
    n = r.choice('0122')
    if kind == 'del':
        return {'type': 'blockdev-del', 'data': {'node-name': pick_node(r)}}
    if kind == 'add f':
        data = {'driver': 'null-co', 'node-name': 'f' + n, 'size': SIZE}
    elif kind == 'add r':
        data = {'driver': 'raw', 'node-name': 'r' + n, 'file': r.choice(['f0', 'f1', 'f2'])}
    elif kind == 'add file':
        data = {'driver': 'file', 'node-name': 'f' + n, 'filename': r.choice(PATHS)}
    else:
        data = {'driver': 'raw', 'node-name': 'r' + n,
                'file': {'driver': 'null-co', 'node-name': 'f2', 'size': SIZE}}
    return {'type': 'blockdev-add', 'data': data}


def make_export_action(r):
    kind, e = r.choice(['add', 'add', 'del', 'set-node']), 'e' + r.choice('012')
    data = {'id': e}
    if kind == 'add':
        data.update({'type': 'nbd', 'node-name': pick_node(r), 'name': r.choice('xyz'), 'writable': r.random() < 0.5})
        if r.random() < 0.7:
            data['bitmaps'] = [pick_source(r)]
    elif kind == 'set-node':
        data['node-name'] = pick_node(r)
    return {'type': 'block-export-' + kind, 'data': data}


def make_job_action(r):
    data = {'job-id': r.choice('jk'), 'device': pick_node(r), 'target': pick_node(r), 'sync': 'full'}
    if r.random() < 0.6:
        data.update(sync='incremental', bitmap=r.choice('abc'))
    if r.random() < 0.3:
        data.update(target=r.choice(PATHS), mode='existing', format='raw')
        return {'type': 'drive-backup', 'data': data}
    return {'type': 'blockdev-backup', 'data': data}


def make_action(r):
    return r.choices([make_bitmap_action, make_node_action, make_export_action, make_job_action], [8, 5, 5, 4])[0](r)


def make_list(r, world):
    """Mostly actions that work after those before them."""
    actions = []
    for _ in range(60):
        a = make_action(r)
        got = world.run([*actions, a], **{'dry-run': True})
        if got['return']['outcome'] == 'would-commit' or r.random() < 0.01:
            actions.append(a)
        if len(actions) == 6 or got['return'].get('failed-action', 99) < len(actions):
            break
    return actions


# ---------------------------------------------------------------- the test

def reports(world, actions):
    """What a dry run tells of each action, in the order of the list; only up to the first that fails."""
    got = world.run(actions, **{'dry-run': True})['return']
    rows = [{k: v for k, v in row.items() if k != 'action'} for row in got['actions'] if row['outcome'] != 'not-run']
    if 'error' in rows[-1]:
        rows[-1]['error'] = re.sub("'[^']*'", "''", rows[-1]['error'])
    return rows


def check_dry(world, actions, i):
    """Actions i and i + 1 change places."""
    other = [*actions[:i], actions[i + 1], actions[i], *actions[i + 2:]]
    one, two = reports(world, actions), reports(world, other)
    if len(one) <= i + 1 or len(two) <= i + 1:  # one of the two fails: in the other order it does, too
        failed = {str(rows[-1]) for rows in (one, two)}
        both = len(one) == len(two) == i + 1  # each fails when its turn comes first
        assert both or len(failed) == 1 and len(one) + len(two) == 2 * i + 3, (i, actions, one, two)
        return None
    assert one == [*two[:i], two[i + 1], two[i], *two[i + 2:]], (i, actions, one, two)
    return other if len(one) == len(actions) and one[-1]['outcome'] != 'failed' else None


def check_real(a, b, actions, other):
    if any(x['type'].endswith('-backup') for x in actions):
        return  # how far a job is, is another matter
    for world, x in ((a, actions), (b, other)):
        assert 'return' in world.run(x), x
    assert a.dump() == b.dump(), (actions, other)
    a.reset()
    b.reset()


def test_neighbours_without_an_edge_may_be_swapped():
    seed = int(os.environ.get('TIDEMARK_SWAP_SEED', '1'))
    print(f'TIDEMARK_SWAP_SEED={seed} TIDEMARK_SWAP_LISTS={LISTS}')
    r = random.Random(seed)
    n_swaps = n_real = 0
    with Daemon() as da, Daemon() as db:
        a, b = World(da), World(db)
        for _ in range(LISTS):
            actions = make_list(r, a)
            edges = a.run(actions, explain=True)['return']['dependencies']
            tied = {(e['on'], e['action']) for e in edges}
            for i in range(len(actions) - 1):
                if (i, i + 1) in tied:
                    continue
                n_swaps += 1
                other = check_dry(a, actions, i)
                if other and n_real < LISTS:
                    n_real += 1
                    check_real(a, b, actions, other)
    assert n_swaps >= LISTS // 2 and n_real >= LISTS // 8, (n_swaps, n_real)
