# SPDX-License-Identifier: Apache-2.0
"""Transactions over bitmaps: what a list costs, undone or not, and how long a guest is held meanwhile."""
import array
import bisect
import json
import statistics
import subprocess
import time

from control_cases import kept, timed_exchange
from peers import EXPORT
from scratch import KIB, MIB
from setting import CaseError, NoAnswer, Unsupported

TIB = 1 << 40
N_ROUND_TRIPS = 100
N_CLUSTERS = 64
REQUESTS = 400_000  # to make a bitmap dirty: what takes QSD some seconds
QUICK_REQUESTS = 20_000
REPEATS, QUICK_REPEATS = 7, 3

SHAPES = {'1t-64k': (TIB, 64 * KIB), '1t-4k': (TIB, 4 * KIB), '16t-64k': (16 * TIB, 64 * KIB),
          '16t-4k': (16 * TIB, 4 * KIB), '256t-64k': (256 * TIB, 64 * KIB)}
SHARES = {'0.01pc': 1e-4, '1pc': 0.01, '50pc': 0.5}
PATTERNS = ['random', 'clustered']


def action(kind, name, node='disk', **data):
    return {'type': f'block-dirty-bitmap-{kind}', 'data': {'node': node, 'name': name, **data}}


def merge(target, *sources, node='disk'):
    return {'type': 'block-dirty-bitmap-merge',
            'data': {'node': node, 'target': target, 'bitmaps': list(sources)}}


ABORT = {'type': 'abort', 'data': {}}


def timed_list(daemon, qmp, *actions):
    """Milliseconds, and of CPU time. A list that ends in an abort has to fail, others have not."""
    message = {'execute': 'transaction', 'arguments': {'actions': list(actions)}}
    if actions[-1] is not ABORT:
        return timed_exchange(daemon, qmp, {**message, 'id': 0})
    data = json.dumps(message).encode()
    cpu, start = daemon.cpu_seconds(), time.monotonic()
    reply = qmp.exchange(data)
    numbers = {'value': (time.monotonic() - start) * 1e3, 'cpu': (daemon.cpu_seconds() - cpu) * 1e3}
    if 'error' not in reply:
        raise CaseError(f'a list with an abort succeeded: {str(reply)[:300]}')
    return numbers


def round_trip(daemon, qmp):
    return timed_exchange(daemon, qmp, {'execute': 'query-version', 'id': 0})


def round_trip_ms(daemon, qmp):
    return statistics.median(round_trip(daemon, qmp)['value'] for _ in range(N_ROUND_TRIPS))


def median_numbers(runs, round_trip):
    numbers = {key: statistics.median(r[key] for r in runs) for key in ('value', 'cpu')}
    return {**numbers, 'above': numbers['value'] - round_trip, 'max': max(r['value'] for r in runs)}


def dirty_bytes(qmp, name, node='disk'):
    nodes = {n['node-name']: n for n in qmp.execute('query-named-block-nodes')}
    return next(b['count'] for b in nodes[node]['dirty-bitmaps'] if b['name'] == name)


# ---- Contents: sizes, granularities, shares, patterns ----

def add_disk(s, daemon, qmp, size):
    """A disk of any size that takes no room, and an export of it. To trim what is not there costs next to
    nothing; without a file (null-co) QSD would mark nothing."""
    qmp.execute('blockdev-add', driver='file', node_name='disk', aio=daemon.peer.aio, discard='unmap',
                filename=str(s.scratch.sparse(s.medium, size)))
    qmp.execute('block-export-add', type='nbd', id='disk', node_name='disk', name='disk', writable=True)


def runs_of(size, granularity, share, pattern, limit):
    """(how many, how long): as many runs of one block as it takes, but at most `limit`, else longer ones;
    or 64 long ones."""
    blocks = max(1, int(size / granularity * share))
    count = min(blocks, N_CLUSTERS if pattern == 'clustered' else limit)
    return count, blocks // count * granularity


def record(s, daemon, qmp, name, runs, granularity):
    """A bitmap that knows these runs, and records no longer."""
    count, length = runs
    qmp.execute('block-dirty-bitmap-add', node='disk', name=name, granularity=granularity)
    s.run('nbdmark', ['--socket', daemon.nbd, '--export', 'disk', '--runs', count, '--run', length,
                      '--align', granularity, '--depth', 256, '--seed', s.scratch.seed()])
    qmp.execute('block-dirty-bitmap-disable', node='disk', name=name)
    if dirty_bytes(qmp, name) != count * length:
        raise CaseError(f'{dirty_bytes(qmp, name)} bytes are dirty, {count * length} were trimmed')


def merge_and_clear(daemon, qmp, granularity, results):
    """Into a bitmap of its own, as before an incremental backup, which is then cleared. Looking at a large bitmap
    pushes everything else out of the processor's caches, so a round trip is measured right after that, too."""
    qmp.execute('block-dirty-bitmap-add', node='disk', name='sum', granularity=granularity, disabled=True)
    qmp.execute('block-dirty-bitmap-merge', node='disk', target='sum', bitmaps=['target'])
    dirty_bytes(qmp, 'sum')
    results['merge'].append(timed_list(daemon, qmp, merge('sum', 'source')))
    both = [dirty_bytes(qmp, name) for name in ('source', 'target')]
    if not max(both) <= dirty_bytes(qmp, 'sum') <= sum(both):
        raise CaseError(f'{both} merged are {dirty_bytes(qmp, "sum")} bytes')
    results['round-trip'].append(round_trip(daemon, qmp))
    dirty_bytes(qmp, 'sum')
    results['clear'].append(timed_list(daemon, qmp, action('clear', 'sum')))
    if dirty_bytes(qmp, 'sum'):
        raise CaseError('a cleared bitmap is dirty')
    qmp.execute('block-dirty-bitmap-remove', node='disk', name='sum')


def undone(daemon, qmp, results):
    before = dirty_bytes(qmp, 'target')
    results['merge-undone'].append(timed_list(daemon, qmp, merge('target', 'source'), ABORT))
    dirty_bytes(qmp, 'target')
    results['clear-undone'].append(timed_list(daemon, qmp, action('clear', 'target'), ABORT))
    if dirty_bytes(qmp, 'target') != before:
        raise CaseError('an undone list changed a bitmap')


CONTENTS_ROWS = ('merge', 'merge-undone', 'clear', 'clear-undone')


def contents(shape, share, pattern):
    size, granularity = SHAPES[shape]

    def measure(s):
        runs = runs_of(size, granularity, SHARES[share], pattern, QUICK_REQUESTS if s.quick else REQUESTS)
        results = {name: [] for name in (*CONTENTS_ROWS, 'round-trip')}
        with s.daemon(kept(s)) as daemon:
            qmp = daemon.monitor()
            add_disk(s, daemon, qmp, size)
            record(s, daemon, qmp, 'source', runs, granularity)
            record(s, daemon, qmp, 'target', runs, granularity)
            for _ in range(QUICK_REPEATS if s.quick else REPEATS):
                merge_and_clear(daemon, qmp, granularity, results)
                undone(daemon, qmp, results)
        s.scratch.drop(s.medium, 'sparse.raw')
        cold = statistics.median(r['value'] for r in results.pop('round-trip'))
        return {name: median_numbers(r, cold) for name, r in results.items()}
    return measure


# ---- Long lists ----

N_BITMAPS = 250


def mixed_list(n):
    """Clear, merge, disable and enable in turn, over some hundred bitmaps."""
    for i in range(n):
        name, other = f'b{i // 4 % N_BITMAPS}', f'b{(i // 4 + 1) % N_BITMAPS}'
        yield (action('clear', name, EXPORT), merge(name, other, node=EXPORT),
               action('disable', name, EXPORT), action('enable', name, EXPORT))[i % 4]


def actions(n):
    """The list is right either way, and what the last action did is seen, or is not."""
    def measure(s):
        results = {'done': [], 'undone': []}
        with s.daemon(kept(s)) as daemon:
            qmp = daemon.monitor()
            timed_list(daemon, qmp, *[action('add', f'b{i}', EXPORT, granularity=64 * KIB)
                                      for i in range(N_BITMAPS)])
            s.load(daemon, '--depth 16 --reads 100 --requests 1000')
            warm = round_trip_ms(daemon, qmp)
            todo = list(mixed_list(n))
            for _ in range(QUICK_REPEATS if s.quick else REPEATS):
                results['undone'].append(timed_list(daemon, qmp, *todo, ABORT))
                results['done'].append(timed_list(daemon, qmp, *todo))
        return {name: median_numbers(r, warm) for name, r in results.items()}
    return measure


# ---- What guests see of it ----

PAUSE_DEPTH = 16
PAUSE_EVERY_S = 0.02


class Writer:
    """nbdmark on one export: writes until its time is over, and says when each reply came."""

    def __init__(self, s, daemon, export, seconds):
        if not s.tools.get('nbdmark'):
            raise Unsupported('nbdmark has not been built')
        self._times = s.scratch.folder / f'{export}.times'
        self._process = subprocess.Popen(
            [s.tools['nbdmark'], '--socket', daemon.nbd, '--export', export, '--seconds', str(seconds),
             '--times', self._times, '--depth', str(PAUSE_DEPTH), '--seed', str(s.scratch.seed())],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def ends_within(self, seconds):
        try:
            self._process.wait(seconds)
            return True
        except subprocess.TimeoutExpired:
            return False

    def end(self):
        """Seconds on time.monotonic(), ascending."""
        _, stderr = self._process.communicate()
        if self._process.returncode != 0:
            raise (NoAnswer if 'does not answer' in stderr or 'hung up' in stderr else CaseError)(stderr.strip())
        times = array.array('Q')
        times.frombytes(self._times.read_bytes())
        self._times.unlink()
        return [t / 1e9 for t in times]


def longest_gap(times, begin, end):
    """The longest time without a reply of which a part lies between the two moments."""
    first, last = bisect.bisect_right(times, begin), bisect.bisect_left(times, end)
    around = times[max(0, first - 1):last + 1]
    return max((b - a for a, b in zip(around, around[1:])), default=0)


def hand_over():
    """What a backup of two disks begins with: the changes go to a second bitmap and are counted anew."""
    return [a for node in (EXPORT, 'other')
            for a in (merge('sum', 'changes', node=node), action('clear', 'changes', node))]


def pause(s):
    """Writers keep 16 requests in flight on each of two disks. For each list of four actions: how long at
    most a disk was without a reply; and the same for as long a time in which nothing was done. The
    difference is what the list adds to draining."""
    seconds = s.seconds if s.quick else s.seconds * 4
    marks = []
    with s.daemon(s.scratch.filled(s.medium, changed=True)) as daemon:
        qmp = daemon.monitor()
        qmp.execute('blockdev-add', driver='file', node_name='other', aio=daemon.peer.aio,
                    filename=str(s.scratch.target(128 * MIB)))
        qmp.execute('block-export-add', type='nbd', id='other', node_name='other', name='other', writable=True)
        for node in (EXPORT, 'other'):
            for name in ('sum', 'changes'):
                qmp.execute('block-dirty-bitmap-add', node=node, name=name, granularity=64 * KIB)
        writers = [Writer(s, daemon, export, seconds) for export in (EXPORT, 'other')]
        while not any(w.ends_within(PAUSE_EVERY_S / 2) for w in writers):
            begin = time.monotonic()
            timed_list(daemon, qmp, *hand_over())
            marks.append((begin, time.monotonic()))
        times = [w.end() for w in writers]
    s.scratch.drop(s.medium, 'target.raw')
    marks = [m for m in marks if m[1] + PAUSE_EVERY_S < min(t[-1] for t in times)]
    if not marks:
        raise CaseError('no list ended while the writers ran')
    held = [max(longest_gap(t, begin, end) for t in times) for begin, end in marks]
    quiet = [max(longest_gap(t, begin, end) for t in times) for begin, end in
             [(end + PAUSE_EVERY_S / 2, end + PAUSE_EVERY_S / 2 + (end - begin)) for begin, end in marks]]
    rows = {'p50': statistics.median, 'max': max}
    return {key: {'value': (f(held) - f(quiet)) * 1e3, 'cpu': f(quiet) * 1e3, 'gap': f(held) * 1e3,
                  'lists': len(marks)} for key, f in rows.items()}
