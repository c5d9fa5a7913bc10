# SPDX-License-Identifier: Apache-2.0
"""Random sequences of commands, lists and writes on tidemarkd and on qemu-storage-daemon.

After each step both have to agree: success or the class of the error, every bitmap with its flags and
bits, exports, jobs with their states, and for each job its events (without the pairs of paused and
running that QEMU inserts while it drains). What differs on purpose is not run on either; REASONS says
what and why. TIDEMARK_DIFF_SEEDS (2) runs of TIDEMARK_DIFF_STEPS (400) steps; TIDEMARK_DIFF_SEED=N runs
seed N alone.
"""
import collections
import itertools
import os
import random
import time

import nbd
import pytest

from backup_tools import ONE_BY_ONE, faulty
from harness import DEADLINE, KiB, MiB, Daemon, which

STEPS = int(os.environ.get('TIDEMARK_DIFF_STEPS', '400'))
SEEDS = range(int(os.environ.get('TIDEMARK_DIFF_SEEDS', '2')))
if 'TIDEMARK_DIFF_SEED' in os.environ:
    SEEDS = [int(os.environ['TIDEMARK_DIFF_SEED'])]
BITMAP = 'block-dirty-bitmap-'
SIZES = {'d': 4 * MiB, 'e': 4 * MiB, 'f': MiB, 't0': 4 * MiB, 't1': 4 * MiB, 't2': 4 * MiB, 'u': MiB,
         'below': 4 * MiB}
FILES = {'old0': 4 * MiB, 'old1': 4 * MiB, 'old2': MiB}  # targets of drive-backup that are there
BACKUPS = ['blockdev-backup', 'drive-backup']
SOURCES = ['d', 'e', 'f']
NAMES = ['p', 'q', 'r']
JOBS = ['j0', 'j1', 'j2']
ROW = ['name', 'count', 'granularity', 'recording', 'busy', 'persistent']
STEADY = {'pending', 'concluded', 'paused', 'null'}

REASONS = {
    'removed name': 'a removed bitmap frees its name at once; QEMU keeps it until commit (L1, L10)',
    'removed and used': 'QEMU lets a list go on using a bitmap that it has removed',
    'empty merge': 'qemu-storage-daemon 7.2 crashes on it; here it changes nothing',
    'failed switch': 'a refused enable or disable in a list crashes qemu-storage-daemon 7.2 or switches it off',
    'grouped bitmaps': 'grouped completion concerns jobs; any action may stand in such a list (L7)',
    'always in a list': 'a failed list with bitmap-mode=always leaves its bitmap all dirty in QEMU; here as it was (L2)',
    'grouped and failed': 'a grouped list that fails when two of its jobs are made hangs qemu-storage-daemon 7.2',
    'drive-backup with sync=none': 'QEMU puts the source below the target as its backing file, which a raw one cannot have',
    'write over a broken target': 'where old data cannot be kept QEMU fails the write of the guest; here the job fails',
    'second backup of a target': 'a job wants its target for itself; QEMU checks it by its own rules of sharing',
}


# ---------------------------------------------------------------- a daemon under comparison

class Subject:
    def __init__(self, daemon):
        self.d = daemon
        self.handle, self.forever, self.group_of = {}, set(), {}
        self.failed_at = 0
        for node, size in SIZES.items():
            daemon.add_disk(node, size)
        for name, size in FILES.items():
            with open(daemon.path(name), 'wb') as f:
                f.truncate(size)
        faulty(daemon, 'bad', 'below', {'iotype': 'write'})
        for node in SOURCES:
            daemon.export(node)
            self.handle[node] = nbd.NBD()
            self.handle[node].connect_uri(daemon.uri(node))

    def run(self, step):
        """None, or the class of the error."""
        if step['execute'] == 'write':
            for node, offset, length in step['writes']:
                self.handle[node].pwrite(b'\x5a' * length, offset)
            return None
        m = self.d.qmp.raw(step)
        self.failed_at = m.get('error', {}).get('data', {}).get('action', 0)
        if 'cancel' in step['execute'] and 'return' in m:  # also who would run for ever ends now
            job = step['arguments'].get('id', step['arguments'].get('device'))
            self.forever -= {job, *self.group_of.get(job, ())}
        self.settle()
        return m.get('error', {}).get('class')

    def settle(self):
        """Until no job moves by itself."""
        end = time.monotonic() + DEADLINE
        while True:
            jobs = self.d.cmd('query-jobs')
            if all(j['status'] in STEADY or j['status'] == 'waiting' and self.others_wait(j, jobs) or
                   j['status'] == 'running' and j['id'] in self.forever for j in jobs):
                return
            assert time.monotonic() < end, f'{jobs}: {self.d.silence("jobs do not come to rest")}'

    def others_wait(self, job, jobs):
        """A member of a group waits for one that never ends by itself, or for the user."""
        return any(j['status'] in ('running', 'paused') and j['id'] in self.forever for j in jobs)

    def job_events(self):
        """By job, what came since the last call."""
        out = {}
        for e in self.d.qmp.events:
            data = e.get('data', {})
            job = data.get('id', data.get('device'))
            word = 'S:' + data['status'] if e['event'] == 'JOB_STATUS_CHANGE' else e['event']
            if job in JOBS:
                out.setdefault(job, []).append(word + ('!' if 'error' in data else ''))
        self.d.qmp.events = []
        return {job: without_pairs(words) for job, words in out.items() if without_pairs(words)}

    def dump(self):
        nodes = {}
        for n in self.d.cmd('query-named-block-nodes'):
            if n['node-name'] not in SIZES:
                continue
            # By name: a successor that took the place of its bitmap is a new one in QEMU's order.
            nodes[n['node-name']] = {
                b['name']: {**{k: b[k] for k in ROW}, 'sha256': self.d.sha256(n['node-name'], b['name'])}
                for b in n.get('dirty-bitmaps', []) if b.get('name')}
        jobs = {j['id']: (j['status'], j['type'], 'error' in j) for j in self.d.cmd('query-jobs')}
        # QEMU puts a filter between an export and the source of a backup.
        exports = [e['id'] for e in self.d.cmd('query-block-exports')]
        return nodes, jobs, exports

    def close(self):
        for h in self.handle.values():
            h.shutdown()


def compare(context, what, a, b):
    """As == , but says where."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for k in a:
            compare(context, f'{what}/{k}', a[k], b[k])
    else:
        assert a == b, f'{context}\n{what}:\n  tidemarkd {a}\n  QSD       {b}'


def without_pairs(words):
    """QEMU pauses a job for a moment whenever it drains. A pair says nothing to a client."""
    out = []
    for w in words:
        if w == 'S:running' and out and out[-1] == 'S:paused' and 'S:running' in out[:-1]:
            out.pop()
        elif not (w == 'S:running' and out == ['S:paused']):
            out.append(w)
        else:
            out = []
    return out


# ---------------------------------------------------------------- making steps

def full_backup(job, kind, **more):
    return {'type': kind, 'data': {'job-id': job, 'device': 'd', 'sync': 'full', **more}}


def plain(a):
    return {'execute': a['type'], 'arguments': a['data']}


NEW, OLD = {'target': 'new0', 'format': 'raw'}, {'target': 'old0', 'mode': 'existing', 'format': 'raw'}
# What chance brings seldom begins each sequence.
BEGIN = [{'execute': 'write', 'writes': [('d', 64 * KiB, 4 * KiB)]}, plain(full_backup('j0', 'blockdev-backup', target='bad')),
         plain(full_backup('j0', 'drive-backup', **NEW)),
         {'execute': 'transaction', 'arguments': {'actions': [full_backup('j1', 'drive-backup', **OLD)]}}]


class Maker:
    def __init__(self, rng):
        self.r = rng
        self.forever = set()
        self.n_files = 0

    def bitmap_action(self):
        r = self.r
        kind = r.choices(['add', 'remove', 'clear', 'enable', 'disable', 'merge'], [9, 4, 5, 4, 4, 9])[0]
        node, name = r.choices(SOURCES, [6, 5, 2])[0], r.choice(NAMES)
        if kind == 'add':
            data = {'node': node, 'name': name, 'granularity': r.choice([512, 4 * KiB, 64 * KiB, MiB])}
            if r.random() < 0.3:
                data['disabled'] = True
        elif kind == 'merge':
            sources = [r.choice(NAMES) if r.random() < 0.6 else
                       {'node': r.choices(SOURCES, [6, 6, 1])[0], 'name': r.choice(NAMES)}
                       for _ in range(r.choices([0, 1, 2, 3], [1, 12, 6, 2])[0])]
            data = {'node': node, 'target': name, 'bitmaps': sources}
        else:
            data = {'node': node, 'name': name}
        return {'type': BITMAP + kind, 'data': data}

    def backup(self, target=None):
        r = self.r
        device = r.choices(SOURCES, [6, 5, 1])[0]
        sync = r.choices(['full', 'top', 'none', 'incremental', 'bitmap'], [4, 1, 3, 8, 4])[0]
        target = target or r.choice(['t0', 't1', 't2'] if device != 'f' or r.random() < 0.1 else ['u'])
        data = {'job-id': r.choice(JOBS), 'device': device, 'target': target, 'sync': sync}
        if sync in ('incremental', 'bitmap') or r.random() < 0.1:
            data['bitmap'] = r.choice(NAMES)
        if sync == 'bitmap' or data.get('bitmap') and sync != 'incremental' and r.random() < 0.7:
            data['bitmap-mode'] = r.choice(['on-success', 'never', 'always'])
        for member in ('auto-finalize', 'auto-dismiss'):
            if r.random() < 0.3:
                data[member] = False
        if r.random() < 0.25:
            return {'type': 'drive-backup', 'data': {**data, **self.file()}}
        if r.random() < 0.3:
            # A target that fails; one at a time. (A job that ignores what always fails tries it for ever.)
            data.update({'target': 'bad', 'on-target-error': r.choice(['report', 'stop', 'enospc']), 'x-perf': ONE_BY_ONE})
        return {'type': 'blockdev-backup', 'data': data}

    def file(self):
        """Where a drive-backup goes to: a file that is there, or one that has never been."""
        if self.r.random() < 0.5:
            return {'target': self.r.choice(list(FILES)), 'mode': 'existing', 'format': 'raw'}
        self.n_files += 1
        return {'target': f'new{self.n_files}', 'mode': 'absolute-paths', 'format': 'raw'}

    def job_verb(self):
        r = self.r
        verb = r.choice(['job-cancel', 'job-pause', 'job-resume', 'job-finalize', 'job-dismiss', 'job-complete',
                         'block-job-cancel', 'block-job-set-speed', 'block-job-pause', 'block-job-finalize',
                         'block-job-dismiss', 'block-job-resume'])
        member = 'device' if verb.startswith('block') and verb[10:] not in ('finalize', 'dismiss') else 'id'
        data = {member: r.choice([*JOBS, 'none'])}
        if verb == 'block-job-set-speed':
            data['speed'] = r.choice([0, 1 << 40, -1])
        if verb == 'block-job-cancel' and r.random() < 0.5:
            data['force'] = True
        return {'execute': verb, 'arguments': data}

    def export(self):
        r = self.r
        if r.random() < 0.45:
            return {'execute': 'block-export-del', 'arguments': {'id': r.choice(['x0', 'x1'])}}
        node = r.choice(SOURCES)
        data = {'type': 'nbd', 'id': r.choice(['x0', 'x1']), 'node-name': node, 'name': r.choice(['nx', 'ny'])}
        if r.random() < 0.7:
            data['bitmaps'] = [r.choice(NAMES) if r.random() < 0.7 else {'node': node, 'name': r.choice(NAMES)}]
        return {'execute': 'block-export-add', 'arguments': data}

    def step(self):
        r = self.r
        what = r.choices(['write', 'plain', 'list', 'backup', 'verb', 'export'], [10, 14, 12, 7, 12, 5])[0]
        if what == 'write':
            return {'execute': 'write', 'writes': [
                (n, r.randrange(0, SIZES[n] - 64 * KiB, 512), r.choice([512, 4 * KiB, 64 * KiB]))
                for n in r.choices(SOURCES, k=3)]}
        if what == 'verb':
            return self.job_verb()
        if what == 'export':
            return self.export()
        if what in ('plain', 'backup'):
            a = self.backup() if what == 'backup' else self.bitmap_action()
            return plain(a)
        actions = [self.bitmap_action() if r.random() < 0.75 else self.backup() for _ in range(r.randrange(1, 7))]
        if r.random() < 0.1:
            node, name = r.choice(SOURCES), r.choice(NAMES)
            actions += [{'type': BITMAP + kind, 'data': {'node': node, 'name': name}} for kind in ('remove', 'add')]
        if r.random() < 0.15:
            actions.insert(r.randrange(len(actions) + 1), {'type': 'abort', 'data': {}})
        arguments = {'actions': actions}
        if r.random() < 0.2:
            arguments['properties'] = {'completion-mode': 'grouped'}
            if r.random() < 0.8:
                arguments['actions'] = [a for a in actions if a['type'] in BACKUPS] or [self.backup()]
        return {'execute': 'transaction', 'arguments': arguments}


def actions_of(step):
    if step['execute'] == 'transaction':
        return step['arguments']['actions']
    return [{'type': step['execute'], 'data': step.get('arguments', {})}]


def names_of(a):
    """(node, name) of every bitmap that an action speaks of."""
    data, out = a['data'], []
    node = data.get('node', data.get('device'))
    for member in ('name', 'target', 'bitmap'):
        if member in data and (member != 'target' or a['type'] == BITMAP + 'merge'):
            out.append((node, data[member]))
    out += [(node, s) if isinstance(s, str) else (s['node'], s['name']) for s in data.get('bitmaps', [])]
    return out


def differs_on_purpose(step, exists):
    """A key of REASONS, or None. `exists` says which bitmaps there are, and whether they are busy."""
    actions, a_list = actions_of(step), step['execute'] == 'transaction'
    removed, targets = set(), set()
    if a_list and step['arguments'].get('properties') and \
            any(a['type'] not in BACKUPS for a in actions):
        return 'grouped bitmaps'
    for a in actions:
        if a['type'] == BITMAP + 'merge' and not a['data']['bitmaps']:
            return 'empty merge'
        if removed.intersection(names_of(a)):
            return 'removed name' if a['type'] == BITMAP + 'add' else 'removed and used'
        if a['type'] == BITMAP + 'remove':
            removed.update(names_of(a))
        if a['type'] == BITMAP + 'add':
            exists.setdefault(names_of(a)[0], False)
        if a_list and a['type'] in (BITMAP + 'enable', BITMAP + 'disable') and exists.get(names_of(a)[0], True):
            return 'failed switch'
        if a['type'] in BACKUPS:
            exists.update({name: True for name in names_of(a) if name in exists})
            if len(actions) > 1 and a['data'].get('bitmap-mode') == 'always':
                return 'always in a list'
            if a['type'] == 'drive-backup' and a['data']['sync'] == 'none':
                return 'drive-backup with sync=none'
            if a['data']['target'] in targets:
                return 'second backup of a target'
            targets.add(a['data']['target'])
    return None


def reached(step, error, events):
    """What has been tried with success, and how jobs fared."""
    kinds = [a['type'] for a in actions_of(step)] if error is None else []
    return [*kinds, *(word for words in events.values() for word in words)]


# ---------------------------------------------------------------- the test

@pytest.mark.skipif(not which('qemu-storage-daemon'), reason='no qemu-storage-daemon')
@pytest.mark.parametrize('seed', SEEDS)
def test_random_sequences(seed):
    rng = random.Random(seed)
    seen = dict.fromkeys(REASONS, 0)
    maker = Maker(rng)
    log, succeeded, happened = [], 0, collections.Counter()
    with Daemon() as ours, Daemon(kind='qsd', quit_check=False) as theirs:
        subjects = [Subject(ours), Subject(theirs)]
        target_of = {}
        before = subjects[0].dump()
        for step in itertools.chain(BEGIN, (maker.step() for _ in range(STEPS))):
            nodes, jobs, _exports = before
            exists = {(n, name): row['busy'] for n, rows in nodes.items() for name, row in rows.items()}
            why = differs_on_purpose(step, exists)
            in_use = {target_of[j] for j in jobs if j in target_of and jobs[j][0] != 'concluded'}
            if why is None and any(a['type'] in BACKUPS and a['data']['target'] in in_use
                                   for a in actions_of(step)):
                why = 'second backup of a target'
            if step['execute'] == 'write' and 'bad' in in_use:
                why = 'write over a broken target'
            if why:
                seen[why] += 1
                continue
            log.append(step)
            for a in actions_of(step):
                if a['type'] in BACKUPS and a['data']['job-id'] not in jobs:
                    (maker.forever.add if a['data']['sync'] == 'none' else maker.forever.discard)(a['data']['job-id'])
                    target_of[a['data']['job-id']] = a['data']['target']
            made = [a['data']['job-id'] for a in actions_of(step) if a['type'] in BACKUPS]
            grouped = step.get('arguments', {}).get('properties') is not None
            for s in subjects:
                s.forever = set(maker.forever)
                s.group_of.update({j: made if grouped else () for j in made if j not in jobs})
            results = [subjects[0].run(step)]
            if grouped and subjects[0].failed_at >= 2:  # it has changed nothing here, and is not tried there
                seen['grouped and failed'] += 1
                log.pop()
                continue
            results.append(subjects[1].run(step))
            dumps = [s.dump() for s in subjects]
            events = [s.job_events() for s in subjects]
            context = f'seed {seed}, step {len(log)}: {step}\nbefore: {log[-4:-1]}'
            compare(context, 'result', *results)
            for what, *both in zip(('bitmaps', 'jobs', 'exports'), *dumps):
                compare(context, what, *both)
            if results[0] is None:  # the events of what failed are not sent here (L5)
                compare(context, 'events', *events)
            before = dumps[0]
            succeeded += results[0] is None
            happened.update(reached(step, results[0], events[0]))
        for s in subjects:
            s.close()
    assert len(log) > STEPS / 2, seen
    assert succeeded > len(log) / 4
    assert happened['drive-backup'] >= 2 and {'BLOCK_JOB_ERROR', 'BLOCK_JOB_COMPLETED!'} <= happened.keys(), happened
