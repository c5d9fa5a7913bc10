# SPDX-License-Identifier: Apache-2.0
"""Loads over NBD, and the same requests by io_uring on the file itself."""
import random
import statistics

from peers import EXPORT
from scratch import CLUSTER
from setting import CaseError


def io_numbers(report):
    return {'value': report['iops'], 'cpu': report['server_cpu_s'] / report['requests'] * 1e6,
            'p50_us': report['p50_us'], 'p99_us': report['p99_us'], 'mib_s': report['mib_s'],
            'client_cpu_us': report['client_cpu_s'] / report['requests'] * 1e6}


def io_load(arguments):
    """arguments: nbdload's, and uringload's, which are the same. Whoever also reads needs a file in
    its first state. A load of writes alone leaves it in any state and reads back what it wrote."""
    writes = '--reads' in arguments
    mixed = writes and '--reads 0' not in arguments

    def measure(s):
        if mixed:
            s.scratch.drop(s.medium, 'changed.raw')
        image = s.scratch.filled(s.medium, changed=writes)
        wanted = f'{arguments} --time {s.seconds}' + (' --recheck' if writes else '')
        if writes and not mixed:
            wanted += f' --seed {s.scratch.seed()}'
        if 'limit' in s.peer.kinds:
            return io_numbers(s.run('uringload', ['--file', image, *wanted.split()]))
        with s.daemon(image) as daemon:
            return io_numbers(s.load(daemon, wanted))
    return measure


# ---- While bitmaps record ----

COUNTS = {'0': 0, '0-again': 0, '1': 1, '8': 8, '32': 32}
ROUNDS = 6


def bitmap_counts(qmp):
    nodes = {n['node-name']: n for n in qmp.execute('query-named-block-nodes')}
    return [b['count'] for b in nodes[EXPORT].get('dirty-bitmaps', [])]


def record(s, daemon, qmp, n, seconds):
    """A short load of random writes with n bitmaps, which are new and gone afterwards."""
    for i in range(n):
        qmp.execute('block-dirty-bitmap-add', node=EXPORT, name=f'b{i}', granularity=CLUSTER)
    numbers = io_numbers(s.load(daemon, f'--depth 64 --reads 0 --time {seconds} --recheck '
                                        f'--seed {s.scratch.seed()}'))
    counts = bitmap_counts(qmp)
    if len(counts) != n or 0 in counts or len(set(counts)) > 1:
        raise CaseError(f'{n} bitmaps recorded {counts}')
    for i in range(n):
        qmp.execute('block-dirty-bitmap-remove', node=EXPORT, name=f'b{i}')
    return numbers


def recording(s):
    """All counts of bitmaps in one daemon, in short slices in turn, since what they cost is less than
    what two daemons or two moments differ by. 'own' is the ratio to no bitmap of the same round,
    for no bitmap itself that of two slices without any."""
    order, rounds = list(COUNTS), 1 if s.quick else ROUNDS
    slices = {name: [] for name in order}
    with s.daemon(s.scratch.filled(s.medium, changed=True)) as daemon:
        qmp = daemon.monitor()
        s.load(daemon, f'--depth 64 --reads 0 --time {s.seconds / 8}')  # warm
        for i in range(rounds):
            # Each comes after each other one: the slice before leaves dirty pages and caches behind.
            random.Random(i).shuffle(order)
            for name in order:
                slices[name].append(record(s, daemon, qmp, COUNTS[name], s.seconds / 4))
    rows = {}
    for name, runs in slices.items():
        base = slices['0-again' if name == '0' else '0']
        numbers = {key: statistics.median(r[key] for r in runs) for key in runs[0]}
        for key in ('value', 'cpu'):
            numbers['own' if key == 'value' else 'own_cpu'] = statistics.median(
                r[key] / b[key] for r, b in zip(runs, base))
        rows[name] = numbers
    del rows['0-again']
    return rows
