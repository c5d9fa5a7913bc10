# SPDX-License-Identifier: Apache-2.0
"""The contract's tables about bitmaps: what may be done in which state (5.3), what a merge is (5.4).

Each row is run as a plain command and as a list of one action, and on qemu-storage-daemon.
"""
import itertools

import pytest

from backup_tools import GRANULE, OK, end_of, held
from contract_tools import (BITMAP, FORMS, SIZE, attempt, bitmaps, bits, refusal, send,
                            write)
from harness import KiB, MiB

REC, BUSY = ['recording'], ['busy']
IN_USE, EXISTS, MISSING, TYPE, SIZES = map(refusal, ('in use', 'exists', 'missing', 'type', 'sizes'))


# ---------------------------------------------------------------- 5.3: operations by state

def in_state(d, state):
    """Node d, exported; bitmap b in this state with granules 0 and 3; other, disabled, with 7."""
    for node in ('d', 't', 't2'):
        d.add_disk(node, SIZE)
    d.export('d')
    d.cmd(BITMAP + 'add', node='d', name='other')
    write(d, 7)
    d.cmd(BITMAP + 'disable', node='d', name='other')
    d.cmd(BITMAP + 'add', node='d', name='b')
    write(d, 0, 3)
    if state == 'disabled':
        d.cmd(BITMAP + 'disable', node='d', name='b')
    elif state == 'busy-job':
        held(d, 'd', 't', 'incremental', bitmap='b')
    elif state == 'busy-export':
        d.export('d', 'hold', bitmaps=['b'])  # writable: it may carry a bitmap that records


def let_go(d, state):
    """End what makes b busy: the job without success, so that all bits come back."""
    if state == 'busy-job':
        d.cmd('job-cancel', id='j')
        d.qmp.job_end('j')
    elif state == 'busy-export':
        d.cmd('block-export-del', id='exp-hold')
        d.qmp.event('BLOCK_EXPORT_DELETED', id='exp-hold')


def bitmap_op(verb, **more):
    def op(d, form):
        return attempt(d, form, BITMAP + verb, {'node': 'd', 'name': 'b', **more}, "'b'")
    return op


def merge_op(target, source):
    def op(d, form):
        return attempt(d, form, BITMAP + 'merge', {'node': 'd', 'target': target, 'bitmaps': [source]}, "'b'")
    return op


def backup_op(sync, mode):
    def op(d, form):
        args = {'job-id': 'k', 'device': 'd', 'target': 't2', 'sync': sync, 'bitmap': 'b'}
        if mode:
            args['bitmap-mode'] = mode
        outcome = attempt(d, form, 'blockdev-backup', args, "'b'")
        if outcome == 'ok':
            assert end_of(d, 'k') == OK
        return outcome
    return op


def export_op(bitmap):
    def op(d, form):
        return attempt(d, form, 'block-export-add', {'type': 'nbd', 'id': 'e', 'node-name': 'd', 'name': 'e',
                                                     'writable': False, 'bitmaps': [bitmap]}, "'b'")
    return op


def hash_op(d, form):
    return attempt(d, form, 'x-debug-block-dirty-bitmap-sha256', {'node': 'd', 'name': 'b'})


def write_op(d, form):
    write(d, 9)
    return 'ok'


OPS = {
    'clear': bitmap_op('clear'),
    'enable': bitmap_op('enable'),
    'disable': bitmap_op('disable'),
    'merge-source': merge_op('other', 'b'),
    'merge-target': merge_op('b', 'other'),
    'remove': bitmap_op('remove'),
    'add': bitmap_op('add', granularity=4096, disabled=True),
    'backup-never': backup_op('bitmap', 'never'),
    'backup-on-success': backup_op('bitmap', 'on-success'),
    'backup-always': backup_op('bitmap', 'always'),
    'backup-incremental': backup_op('incremental', None),
    'export-name': export_op('b'),
    'export-object': export_op({'node': 'd', 'name': 'b'}),
    'sha256': hash_op,
    'write': write_op,
}
NO_ACTIONS = ['sha256', 'write']
OURS_ALONE = ['export-name', 'export-object']  # as actions: the reference does not have them
STATES = ['enabled', 'disabled', 'busy-job', 'busy-export']
CELLS = [(op, s, f) for op, s, f in itertools.product(OPS, STATES, FORMS)
         if f == 'plain' or op not in NO_ACTIONS]


def outcome_of(op, state):
    if op == 'add':
        return EXISTS
    if op == 'export-name' and state == 'enabled':
        return refusal('enabled')
    if state.startswith('busy') and op not in ('sha256', 'write'):
        return IN_USE
    return 'ok'


def after(op, state):
    """The two bitmaps after an operation that succeeds (idle)."""
    b, b_flags, other = {0, 3}, REC if state == 'enabled' else [], {7}
    if op == 'remove':
        return {'other': (bits(7), [])}
    if op in ('clear', 'backup-on-success', 'backup-always', 'backup-incremental'):
        b = set()
    elif op == 'enable':
        b_flags = REC
    elif op == 'disable':
        b_flags = []
    elif op == 'merge-source':
        other = {0, 3, 7}
    elif op == 'merge-target':
        b = {0, 3, 7}
    elif op == 'write' and state == 'enabled':
        b = {0, 3, 9}
    elif op.startswith('export'):
        b_flags = b_flags + BUSY
    return {'b': (bits(*b), b_flags), 'other': (bits(*other), [])}


def expected(op, state):
    """Outcome, the bitmaps after it, and once nobody uses b any more."""
    idle = state if not state.startswith('busy') else 'enabled'
    outcome = outcome_of(op, state)
    later = after(op if outcome == 'ok' else 'sha256', idle)
    now = dict(later)
    if state.startswith('busy'):  # of a job it shows what is frozen, "recording" for its successor
        frozen = later['b'][0] if state == 'busy-export' else bits(0, 3)
        now['b'] = (frozen, REC + BUSY)
    return outcome, now, later


@pytest.mark.parametrize('op,state,form', CELLS, ids=['-'.join(c) for c in CELLS])
def test_state(sides, op, state, form):
    def story(d):
        in_state(d, state)
        outcome = OPS[op](d, form)
        now = bitmaps(d)
        let_go(d, state)
        return outcome, now, bitmaps(d)

    def ours_all_theirs_class(d):
        told = story(d)
        assert d.kind == 'qsd' or told == expected(op, state)
        return told[0][0]

    if op in OURS_ALONE and form == 'list':
        assert story(sides.ours) == expected(op, state)
    elif op == 'enable' and state.startswith('busy') and form == 'list':
        # Undoing the failed enable, the reference switches recording off (9.5). Ours leaves it on.
        sides.both(ours_all_theirs_class, 'GenericError')
    elif (op, state) == ('export-name', 'busy-export'):
        # In use and recording below a read-only export: two faults, and either may be told.
        sides.both(ours_all_theirs_class, 'GenericError')
    else:
        sides.both(story, expected(op, state))


# ---------------------------------------------------------------- 5.4: merge

def merging(d):
    """d: a {0}, b {1}, disabled; t {5}, recording. e: c {2}. small: s, half the size."""
    for node in ('d', 'e'):
        d.add_disk(node, SIZE)
        d.export(node)
    d.add_disk('small', SIZE // 2)
    for node, name, granule in (('d', 'a', 0), ('d', 'b', 1), ('e', 'c', 2)):
        d.cmd(BITMAP + 'add', node=node, name=name)
        write(d, granule, node=node)
        d.cmd(BITMAP + 'disable', node=node, name=name)
    d.cmd(BITMAP + 'add', node='small', name='s')
    d.cmd(BITMAP + 'add', node='d', name='t')
    write(d, 5)


# what is merged into t; the outcome, t's granules afterwards, what our text names
MERGES = {
    'strings-and-objects': (['a', {'node': 'd', 'name': 'b'}, {'node': 'e', 'name': 'c'}], 'ok', {0, 1, 2, 5}),
    'itself': (['t'], 'ok', {5}),
    'itself-and-others': (['t', 'a', 't', 'a'], 'ok', {0, 5}),
    'missing-string': (['nope'], MISSING, {5}, "'nope'", "'d'"),
    'missing-object': ([{'node': 'e', 'name': 'nope'}], MISSING, {5}, "'nope'", "'e'"),
    'missing-node': ([{'node': 'zz', 'name': 'a'}], MISSING, {5}, "'zz'"),
    'missing-last': (['a', {'node': 'e', 'name': 'c'}, 'nope'], MISSING, {5}, "'nope'"),
    'missing-first': (['nope', 'a'], MISSING, {5}, "'nope'"),
    'other-size': ([{'node': 'small', 'name': 's'}], SIZES, {5}, "'s'", "'t'", str(SIZE), str(SIZE // 2)),
    'other-size-last': (['a', {'node': 'small', 'name': 's'}], SIZES, {5}, "'s'"),
    'number': ([5], TYPE, {5}, 'bitmaps[0]'),
    'number-last': (['a', 5], TYPE, {5}, 'bitmaps[1]'),
    'object-without-name': ([{'node': 'd'}], TYPE, {5}, 'bitmaps[0].name'),
    'object-with-bitmap': ([{'node': 'd', 'bitmap': 'a'}], TYPE, {5}, 'bitmaps[0]'),
}


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('case', MERGES)
def test_merge(sides, case, form):
    sources, outcome, granules, *names = MERGES[case]

    def story(d):
        merging(d)
        told = attempt(d, form, BITMAP + 'merge', {'node': 'd', 'target': 't', 'bitmaps': sources}, *names)
        write(d, 11)  # t records, the others do not
        return told, bitmaps(d), bitmaps(d, 'e')

    sides.both(story, (outcome, {'a': (bits(0), []), 'b': (bits(1), []), 't': (bits(*granules, 11), REC)},
                       {'c': (bits(2), [])}))


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('target', [True, False], ids=['into-enabled', 'into-disabled'])
@pytest.mark.parametrize('source', [True, False], ids=['from-enabled', 'from-disabled'])
def test_merge_of_enabled_and_disabled(sides, source, target, form):
    def story(d):
        d.add_disk('d', SIZE)
        d.export('d')
        for name, enabled in (('s', source), ('t', target)):
            d.cmd(BITMAP + 'add', node='d', name=name)
            write(d, 3)
            if not enabled:
                d.cmd(BITMAP + 'disable', node='d', name=name)
        d.cmd(BITMAP + 'clear', node='d', name='t')
        send(d, form, BITMAP + 'merge', {'node': 'd', 'target': 't', 'bitmaps': ['s']})
        write(d, 8)
        return bitmaps(d)

    sides.both(story, {'s': (bits(3, 8) if source else bits(3), REC if source else []),
                       't': (bits(3, 8) if target else bits(3), REC if target else [])})


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('source,target', [(MiB, 4 * KiB), (4 * KiB, MiB), (64 * KiB, 512), (512, 64 * KiB),
                                           (64 * KiB, 64 * KiB)])
def test_merge_of_granularities(sides, source, target, form):
    """A set bit of the source sets every bit of the target that it touches."""
    def story(d):
        d.add_disk('d', SIZE)
        d.export('d')
        d.cmd(BITMAP + 'add', node='d', name='s', granularity=source)
        d.cmd(BITMAP + 'add', node='d', name='t', granularity=target, disabled=True)
        write(d, 20)
        send(d, form, BITMAP + 'merge', {'node': 'd', 'target': 't', 'bitmaps': ['s']})
        row = d.bitmap('d', 't')
        return row['count'], row['granularity'], d.sha256('d', 't')

    at = 20 * GRANULE + 512
    first, last = at // source * source, at // source * source + source
    dirty = range(first // target, -(-last // target))
    sides.both(story, (len(dirty) * target, target, bits(*dirty, n=SIZE // target)))


@pytest.mark.parametrize('form', FORMS)
def test_merge_of_nothing(sides, form):
    """Succeeds without a change; the target is checked. The reference dies of it (9.5): ours alone."""
    d = sides.ours
    merging(d)
    before = bitmaps(d)
    for target in ('t', 'a'):
        send(d, form, BITMAP + 'merge', {'node': 'd', 'target': target, 'bitmaps': []})
    for target, node in (('zz', 'd'), ('t', 'zz')):
        assert attempt(d, form, BITMAP + 'merge', {'node': node, 'target': target, 'bitmaps': []}, "'zz'") == MISSING
    assert bitmaps(d) == before
    d.export('d', 'hold', writable=False, bitmaps=['a'])
    assert attempt(d, form, BITMAP + 'merge', {'node': 'd', 'target': 'a', 'bitmaps': []}, "'a'") == IN_USE
