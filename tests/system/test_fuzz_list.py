# SPDX-License-Identifier: Apache-2.0
"""Random lists of bitmap actions: a list is the plain commands one by one, all or none (law L10).

Daemon A runs each list as one transaction, daemon B runs its actions as plain commands up to the first
that fails. Both have to agree about the outcome, its text and the failing index; after success about
every bit and flag; after a failure A has to be what it was. qemu-storage-daemon runs the same lists
where it is known to do right. TIDEMARK_FUZZ_LISTS (120) lists; TIDEMARK_FUZZ_SEED repeats a run.
"""
import contextlib
import os
import random

import nbd
import pytest

from harness import KiB, MiB, Daemon, QmpError, which

LISTS = int(os.environ.get('TIDEMARK_FUZZ_LISTS', '120'))
SIZES = {'d': 4 * MiB + 512, 'e': 4 * MiB + 512, 'f': MiB}  # f's bitmaps fit no other node's
NAMES = ['p', 'q', 'r', 's']
GRANULARITIES = [512, 4 * KiB, 64 * KiB, MiB]
BITMAP = 'block-dirty-bitmap-'
OURS = {'generation'}  # members of a query row that qemu-storage-daemon does not have


class Subject:
    """A daemon with the three nodes and a connection to each; `held` on d is always busy."""

    def __init__(self, daemon):
        self.d = daemon
        self.handle = {}
        for node, size in SIZES.items():
            daemon.add_disk(node, size)
            daemon.export(node)
            self.handle[node] = nbd.NBD()
            self.handle[node].connect_uri(daemon.uri(node))
        daemon.cmd(BITMAP + 'add', node='d', name='held', disabled=True)
        daemon.export('d', 'hold', writable=False, bitmaps=['held'])

    def reset(self):
        for n in self.d.cmd('query-named-block-nodes'):
            for b in n.get('dirty-bitmaps', []):
                if (n['node-name'], b['name']) != ('d', 'held'):
                    self.d.cmd(BITMAP + 'remove', node=n['node-name'], name=b['name'])

    def write(self, writes):
        for node, offset, length in writes:
            self.handle[node].pwrite(b'\x5a' * length, offset)

    def dump(self, ours=True):
        """Every bitmap with its bits; not `ours`: only the members that the reference has too."""
        rows = {}
        for n in self.d.cmd('query-named-block-nodes'):
            if n['node-name'] in SIZES:
                rows[n['node-name']] = [{**{k: v for k, v in b.items() if ours or k not in OURS},
                                         'sha256': self.d.sha256(n['node-name'], b['name'])}
                                        for b in n.get('dirty-bitmaps', [])]
        return rows

    def as_list(self, actions):
        """(index, text) of the failure, or None."""
        m = self.d.qmp.raw({'execute': 'transaction', 'arguments': {'actions': actions}})
        if 'return' in m:
            assert m['return'] == {}
            return None
        return m['error'].get('data', {}).get('action'), m['error']['desc']

    def one_by_one(self, actions):
        for i, a in enumerate(actions):
            if a['type'] == 'abort':
                return i, None
            try:
                self.d.cmd(a['type'], a['data'])
            except QmpError as e:
                return i, e.desc
        return None

    def close(self):
        for h in self.handle.values():
            h.shutdown()


# ---------------------------------------------------------------- making lists

def pick_node(r):
    return r.choices(['d', 'e', 'f', 'zz'], [10, 8, 2, 0.3])[0]


def pick_name(r):
    return r.choices([*NAMES, 'none', 'held', ''], [8, 8, 6, 4, 0.5, 0.4, 0.1])[0]


def make_add(r, node, name):
    data = {'node': node, 'name': name}
    if r.random() < 0.7:
        data['granularity'] = r.choice(GRANULARITIES) if r.random() < 0.97 else r.choice([0, 511, 513, 2 ** 31])
    if r.random() < 0.3:
        data['disabled'] = r.random() < 0.7
    return {'type': BITMAP + 'add', 'data': data}


def make_merge(r, node, name):
    sources = []
    for _ in range(r.choices([0, 1, 2, 3], [1, 10, 5, 2])[0]):
        if r.random() < 0.6:
            sources.append(pick_name(r))
        else:
            sources.append({'node': pick_node(r), 'name': pick_name(r)})
    return {'type': BITMAP + 'merge', 'data': {'node': node, 'target': name, 'bitmaps': sources}}


def make_action(r):
    kind = r.choices(['add', 'remove', 'clear', 'enable', 'disable', 'merge', 'old merge', 'old switch', 'abort'],
                     [8, 5, 5, 4, 4, 9, 1, 1, 0.3])[0]
    node, name = pick_node(r), pick_name(r)
    if kind == 'add':
        return make_add(r, node, name)
    if kind == 'merge':
        return make_merge(r, node, name)
    if kind == 'old merge':
        return {'type': 'x-' + BITMAP + 'merge', 'data': {'node': node, 'dst_name': name, 'src_name': pick_name(r)}}
    if kind == 'old switch':
        return {'type': 'x-' + BITMAP + r.choice(['enable', 'disable']), 'data': {'node': node, 'name': name}}
    if kind == 'abort':
        return {'type': 'abort', 'data': {}}
    return {'type': BITMAP + kind, 'data': {'node': node, 'name': name}}


def touched(action):
    data = action['data']
    names = {(data.get('node'), data[k]) for k in ('name', 'target', 'dst_name', 'src_name') if k in data}
    for s in data.get('bitmaps', []):
        names.add((data['node'], s) if isinstance(s, str) else (s['node'], s['name']))
    return names


class World:
    """Which bitmaps there are, roughly: so that most actions of a list succeed."""

    def __init__(self):
        self.names = {('d', 'held')}

    def likes(self, a):
        names = touched(a)
        if a['type'].endswith('-add'):
            return not names & self.names
        return names <= self.names - {('d', 'held')}

    def take(self, a):
        if a['type'].endswith('-add'):
            self.names |= touched(a)
        if a['type'].endswith('-remove'):
            self.names -= touched(a)


def make_list(r, world, length):
    """Mostly actions that succeed; in some lists one that does not care."""
    actions = []
    careless = r.random() < 0.4
    while len(actions) < length:
        a = make_action(r)
        if world.likes(a) or (careless and r.random() < 0.05):
            world.take(a)
            actions.append(a)
    return actions


def make_writes(r):
    out = []
    for _ in range(r.randrange(1, 5)):
        node = r.choice(list(SIZES))
        length = r.choice([1, 512, 5000, 70000, 300000])
        out.append((node, r.randrange(SIZES[node] - length), length))
    return out


def qsd_does_right(actions, outcome):
    """Not where contract 9.5 says that the reference crashes or differs."""
    removed = set()
    for i, a in enumerate(actions):
        if a['type'].startswith('x-') or a['data'].get('bitmaps') == [] or touched(a) & removed:
            return False
        if a['type'].endswith('-remove'):
            removed |= touched(a)
        if outcome and i == outcome[0]:
            return not a['type'].endswith('-enable')
    return True


# ---------------------------------------------------------------- the test

def test_a_list_is_its_commands_one_by_one():
    seed = int(os.environ.get('TIDEMARK_FUZZ_SEED', '1'))
    print(f'TIDEMARK_FUZZ_SEED={seed} TIDEMARK_FUZZ_LISTS={LISTS}')
    r = random.Random(seed)
    with contextlib.ExitStack() as stack:
        def subject(kind='tidemarkd'):
            s = Subject(stack.enter_context(Daemon(kind=kind)))
            stack.callback(s.close)
            return s
        a, b = subject(), subject()
        oracle = subject('qsd') if which('qemu-storage-daemon') else None
        failed = asked = 0
        for number in range(LISTS):
            world = World()
            setup = [x for x in make_list(r, world, r.randrange(3, 9)) if x['type'] == BITMAP + 'add']
            writes, later = make_writes(r), make_writes(r)
            actions = make_list(r, world, r.randrange(1, 12))
            told = f'seed {seed}, list {number}: {setup} {writes} {actions}'
            for s in filter(None, (a, b, oracle)):
                s.reset()
                for x in setup:
                    with contextlib.suppress(QmpError):
                        s.d.cmd(x['type'], x['data'])
                s.write(writes)
            before = a.dump()
            assert b.dump() == before, told
            outcome, plain = a.as_list(actions), b.one_by_one(actions)
            if outcome is None:
                assert plain is None, told
                assert a.dump() == b.dump(), told
                for s in (a, b):
                    s.write(later)  # what records, records
                assert a.dump() == b.dump(), told
            else:
                failed += 1
                assert plain is not None and outcome[0] == plain[0], (told, outcome, plain)
                assert plain[1] is None or outcome[1] == plain[1], told
                assert a.dump() == before, told
                a.write(later)
            if oracle and qsd_does_right(actions, outcome):
                asked += 1
                theirs = oracle.as_list(actions)
                assert (theirs is None) == (outcome is None), (told, outcome, theirs)
                oracle.write(later)
                assert oracle.dump() == a.dump(ours=False), told
        print(f'{LISTS} lists, {failed} failed, {asked} compared with qemu-storage-daemon')
        assert LISTS < 100 or LISTS * 0.1 < failed < LISTS * 0.7
        assert LISTS < 100 or not oracle or asked > LISTS * 0.2


@pytest.mark.parametrize('seed', [1, 2, 3])
def test_list_followed_by_abort_changes_nothing(seed):
    """The same lists with an abort at the end, all on one daemon whose state goes on."""
    r = random.Random(seed)
    with Daemon() as d:
        s = Subject(d)
        world = World()
        for _ in range(LISTS // 5):
            actions = make_list(r, world, r.randrange(1, 8))
            before = s.dump()
            assert s.as_list(actions + [{'type': 'abort', 'data': {}}]) is not None
            assert s.dump() == before, (seed, actions)
            if s.as_list(actions) is not None:
                world = World()
                world.names |= {(n, b['name']) for n, rows in s.dump().items() for b in rows}
            s.write(make_writes(r))
        s.close()
