# SPDX-License-Identifier: Apache-2.0
"""What is measured: the list. A case is a function that takes a Setting (one peer, one turn) and
returns its numbers, or those of several rows of the table by their keys. 'value' is what counts,
'cpu' what stands beside it; 'own' is a ratio to another row of the same turn. What else there is
goes to --json."""
import dataclasses
import typing
from functools import partial

import backup_cases as backup
import control_cases as control
import io_cases as io
import txn_cases as txn
from control_cases import N_ACTIONS

IOPS, SECONDS, MS = 'IOPS / CPU us', 's / CPU s', 'ms / CPU ms'


@dataclasses.dataclass
class Case:
    name: str
    unit: str  # of a cell: what counts / what stands beside it
    measure: typing.Callable
    kinds: frozenset  # peers that are of one of these kinds are measured
    medium: str = ''  # 'tmpfs', 'direct' or, for --dir through the page cache, ''
    rows: typing.Optional[dict] = None  # name of a row by key of the numbers; None: one row, the case's
    limit_s: int = 120  # a turn that takes longer has failed

    def row_names(self):
        return list(self.rows.values()) if self.rows else [self.name]


def io_case(name, arguments):
    """What stands before a colon in the name is the medium."""
    medium = name.partition(':')[0] if ':' in name else ''
    kinds = {'direct', 'limit'} if medium == 'direct' else {'nbd'}
    return Case(name, IOPS, io.io_load(arguments), frozenset(kinds), medium)


def qmp_case(name, measure, unit=MS, **more):
    return Case(name, unit, measure, frozenset(['qmp']), **more)


def contents_case(*what):
    name = 'txn-' + '-'.join(what)
    return qmp_case(name, txn.contents(*what), medium='tmpfs', limit_s=600,
                    rows={row: f'{name}-{row}' for row in txn.CONTENTS_ROWS})


def backup_case(name, measure, durable):
    return Case(name + ('-durable' if durable else ''), SECONDS, partial(measure, durable=durable),
                frozenset(['backup', 'limit']), limit_s=600)


CASES = [
    io_case('4k-randread-qd1', '--depth 1'),
    io_case('4k-randwrite-qd1', '--reads 0 --depth 1'),
    io_case('4k-randread-qd16', '--depth 16'),
    io_case('4k-randwrite-qd16', '--reads 0 --depth 16'),
    io_case('4k-randread-qd64', '--depth 64'),
    io_case('4k-randwrite-qd64', '--reads 0 --depth 64'),
    io_case('4k-randread-qd1-c4', '--depth 1 --connections 4'),
    io_case('4k-randwrite-qd1-c4', '--reads 0 --depth 1 --connections 4'),
    io_case('4k-randread-qd16-c4', '--depth 16 --connections 4'),
    io_case('4k-randwrite-qd16-c4', '--reads 0 --depth 16 --connections 4'),
    io_case('4k-randread-qd64-c4', '--depth 64 --connections 4'),
    io_case('4k-randwrite-qd64-c4', '--reads 0 --depth 64 --connections 4'),
    io_case('4k-randmixed-qd16', '--reads 70 --depth 16'),
    io_case('64k-randread-qd16', '--depth 16 --block 64k'),
    io_case('64k-randwrite-qd16', '--reads 0 --depth 16 --block 64k'),
    io_case('1m-seqread-qd16', '--depth 16 --block 1M --sequential'),
    io_case('1m-seqwrite-qd16', '--reads 0 --depth 16 --block 1M --sequential'),
    io_case('tmpfs:4k-randread-qd1', '--depth 1'),
    io_case('tmpfs:4k-randwrite-qd1', '--reads 0 --depth 1'),
    io_case('tmpfs:4k-randread-qd64', '--depth 64'),
    io_case('tmpfs:4k-randwrite-qd64', '--reads 0 --depth 64'),
    io_case('direct:4k-randread-qd1', '--depth 1'),
    io_case('direct:4k-randwrite-qd1', '--reads 0 --depth 1'),
    io_case('direct:4k-randread-qd16', '--depth 16'),
    io_case('direct:4k-randwrite-qd16', '--reads 0 --depth 16'),
    io_case('direct:4k-randread-qd64', '--depth 64'),
    io_case('direct:4k-randwrite-qd64', '--reads 0 --depth 64'),
    io_case('direct:1m-seqread-qd16', '--depth 16 --block 1M --sequential'),
    io_case('direct:1m-seqwrite-qd16', '--reads 0 --depth 16 --block 1M --sequential'),
    qmp_case('tmpfs:recording-bitmaps', io.recording, IOPS, medium='tmpfs', limit_s=300, rows={
        str(n): f'tmpfs:recording-{n}-bitmaps' for n in (0, 1, 8, 32)}),
    *[backup_case('backup-full', backup.backup_full, durable) for durable in (False, True)],
    *[backup_case('backup-incremental-1pc', backup.backup_incremental, durable)
      for durable in (False, True)],
    qmp_case('guest', backup.guest_latency, 'p99 us / CPU us', limit_s=600, rows={
        'alone': 'guest-write-alone', 'backup': 'guest-write-during-backup'}),
    qmp_case('block-status', control.block_status, rows={
        'plain': 'block-status-16t', 'qd1': 'block-status-16t-qd1', 'extended': 'block-status-16t-extended'}),
    qmp_case('start-to-greeting', control.start_to_greeting),
    Case('idle-memory', 'RSS / PSS MiB', control.idle_memory, frozenset(['nbd', 'qmp'])),
    qmp_case('qmp-round-trip', control.round_trip),
    qmp_case('qmp-request-1m', control.large_request),
    qmp_case('qmp-transaction', control.large_transactions, rows={
        'clear': f'qmp-transaction-{N_ACTIONS}', 'merge': f'qmp-transaction-{N_ACTIONS}-merge',
        'add': f'qmp-transaction-{N_ACTIONS}-add'}),
    *[qmp_case(f'txn-actions-{n}', txn.actions(n), rows={
        'done': f'txn-actions-{n}', 'undone': f'txn-actions-{n}-undone'}) for n in (10, 100, 1000, 10000)],
    *[contents_case(shape, share, pattern)
      for shape in txn.SHAPES for share in txn.SHARES for pattern in txn.PATTERNS],
    qmp_case('txn-pause', txn.pause, 'more / quiet ms', rows={
        'p50': 'txn-pause-median', 'max': 'txn-pause-longest'}),
]
