# SPDX-License-Identifier: Apache-2.0
"""What is wanted of tidemarkd, and whether a run has shown it.

A target names a row, a number of it, and a bound for that number divided by the same number of a peer
('qsd', 'nbdkit', 'no-server'), by that of another row of the same turn ('own'), or as it is (None).
What is said of qsd is asked of every variant of it that was measured."""
import dataclasses
import operator
import statistics
import typing

import table
from control_cases import N_ACTIONS

VARIANTS = {'qsd': ['qsd', 'qsd-threads', 'qsd-native', 'qsd-copy-range']}
KEYS = {'value': '', 'cpu': 'CPU ', 'own': '', 'above': 'above a round trip '}


@dataclasses.dataclass
class Target:
    row: str
    key: str
    sense: str
    bound: float
    against: typing.Optional[str]
    noise_row: str = ''  # whose own ratio shows the noise of this one


def at_least(row, qsd=None, nbdkit=None, no_server=None, cpu=None):
    """More is better; `cpu` is the bound of the CPU time per request against qsd."""
    targets = [Target(row, 'value', '>=', bound, name) for name, bound in
               (('qsd', qsd), ('nbdkit', nbdkit), ('no-server', no_server)) if bound is not None]
    return targets + ([Target(row, 'cpu', '<=', cpu, 'qsd')] if cpu is not None else [])


def at_most(row, bound, against):
    return Target(row, 'own' if against == 'own' else 'value', '<=', bound, against)


TRANSACTIONS = [f'qmp-transaction-{N_ACTIONS}{kind}' for kind in ('', '-merge', '-add')]
HUGE_SPARSE = 'txn-256t-64k-0.01pc-clustered'
DENSE = [f'txn-{shape}-50pc-{pattern}-merge' for shape in ('16t-64k', '16t-4k') for pattern in ('random', 'clustered')]
TARGETS = [
    *at_least('4k-randread-qd64', qsd=2.5, cpu=0.3, nbdkit=2),
    *at_least('4k-randread-qd16-c4', qsd=4, cpu=0.35, nbdkit=2.5),
    *at_least('4k-randwrite-qd16', qsd=1.1, cpu=0.65, nbdkit=1.3),
    *at_least('4k-randwrite-qd64', qsd=1.3, cpu=0.65, nbdkit=1.3),
    *at_least('tmpfs:4k-randread-qd64', qsd=5, nbdkit=2),
    *at_least('tmpfs:4k-randwrite-qd64', qsd=5, nbdkit=1.3),
    *at_least('4k-randread-qd1', qsd=2, nbdkit=1),
    *at_least('4k-randwrite-qd1', qsd=1.3, nbdkit=1),
    *at_least('1m-seqread-qd16', qsd=2.5, nbdkit=1.3),
    *at_least('1m-seqwrite-qd16', qsd=1.5, nbdkit=1),
    *at_least('direct:4k-randread-qd64', qsd=1.5, cpu=0.4, no_server=0.9),
    *at_least('direct:4k-randwrite-qd64', qsd=1.5, cpu=0.4, no_server=0.9),
    Target('tmpfs:recording-32-bitmaps', 'own', '>=', 0.95, 'own', 'tmpfs:recording-0-bitmaps'),
    *[at_most(row, 1 / 50, 'qsd') for row in TRANSACTIONS],
    *[at_most(row, 5, None) for row in TRANSACTIONS],
    *[Target(f'{case}-{what}', 'above', '<=', 0.1, None)
      for case in (HUGE_SPARSE, 'txn-16t-4k-50pc-random') for what in ('clear', 'clear-undone')],
    at_most(f'{HUGE_SPARSE}-merge', 3, None),
    at_most(f'{HUGE_SPARSE}-merge', 1 / 100, 'qsd'),
    *[at_most(row, 1 / 4, 'qsd') for row in DENSE],
    *[at_most(f'txn-actions-1000{undone}', bound, against) for undone in ('', '-undone')
      for bound, against in ((5, None), (1 / 50, 'qsd'))],
    at_most('txn-pause-median', 1, None),
    at_most('backup-full', 0.3, 'qsd'),
    at_most('backup-full', 1.3, 'no-server'),
    at_most('backup-incremental-1pc', 0.6, 'qsd'),
    at_most('backup-incremental-1pc', 1.3, 'no-server'),
    at_most('guest-write-during-backup', 0.4, 'qsd'),
    at_most('guest-write-during-backup', 2, 'own'),
    at_most('idle-memory', 0.7, 'qsd'),
    at_most('start-to-greeting', 0.6, 'qsd'),
    at_most('block-status-16t', 0.5, 'qsd'),
    at_most('block-status-16t-extended', 2, None),
]
ROWS = {t.row for t in TARGETS}
PEERS = ['tidemarkd', 'qsd', 'qsd-again', 'nbdkit', 'no-server']


def figure(target, base, results):
    """(the figure, that of each repetition), or (None, [])."""
    value = table.median(results, table.SUBJECT, target.key)
    each = [n[target.key] for n in results.get(table.SUBJECT, []) if target.key in n]
    if target.against not in (None, 'own'):
        other = table.median(results, base, target.key)
        value = value / other if value is not None and other else None
        each = table.singles(results, table.SUBJECT, base, target.key)
    return (value, each) if value is not None else (None, [])


def judge(target, value, each):
    """In words. Repetitions on both sides of the bound make it unsure."""
    if value is None:
        return 'not measured'
    holds = {'>=': operator.ge, '<=': operator.le}[target.sense]
    unsure = ', unsure' if len({holds(v, target.bound) for v in each}) > 1 else ''
    if holds(value, target.bound):
        return 'kept' + unsure
    off = 1 - value / target.bound if target.sense == '>=' else value / target.bound - 1
    return f'missed by {off * 100:.0f} %{unsure}'


def noise(target, base, by_row):
    """What the same measurement says of two things that are equal."""
    if target.noise_row:
        return table.own(by_row.get(target.noise_row, {}))
    results = by_row.get(target.row, {})
    runs = table.singles(results, table.AGAIN, table.REFERENCE, target.key)
    if not runs or base is None or target.key == 'own':
        return '-'
    return f'{statistics.median(runs):.2f} {table.spread(runs)}'.rstrip()


def lines(by_row):
    """A line for each target and each peer that it is about."""
    for t in TARGETS:
        results = by_row.get(t.row, {})
        measured = [n for n in VARIANTS.get(t.against, [t.against]) if n in results]
        for base in measured or [t.against]:
            value, each = figure(t, base, results)
            against = f'x {base}' if base else 'as it is'
            shown = f'{table.number(value)} {table.spread(each)}'.rstrip() if value is not None else '-'
            yield [t.row, f'{KEYS[t.key]}{t.sense} {t.bound:g} {against}', shown, judge(t, value, each),
                   noise(t, base, by_row)]


def print_verdicts(rows):
    """The table, and how many are kept. Missing one is no failure of the run."""
    by_row = {row['name']: row['results'] for row in rows}
    all_lines = list(lines(by_row))
    heads = ['row', 'wanted', 'figure (repetitions)', 'verdict', 'the same of equals (A/A)']
    widths = [max(len(line[i]) for line in [heads, *all_lines]) for i in range(len(heads))]
    print()
    table.print_row(heads, widths)
    table.print_row(['---'] * len(heads), widths)
    for line in all_lines:
        table.print_row(line, widths)
    kept = sum(line[3].startswith('kept') for line in all_lines)
    missed = sum(line[3].startswith('missed') for line in all_lines)
    print(f'\n{kept} kept, {missed} missed, {len(all_lines) - kept - missed} not measured')
