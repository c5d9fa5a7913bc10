# SPDX-License-Identifier: Apache-2.0
"""The contract's tables about backup: what is refused, and in which order (7.1), what becomes of the
bitmap (7.2). Each row is run as the plain command and as a list of one action, and on
qemu-storage-daemon.
"""
import itertools
import os
import re

import pytest

from backup_tools import (GRANULE, OK, ONE_BY_ONE, backup_args, content, end_of, faulty, fill, job, release,
                          until, wait_copied)
from contract_tools import (BITMAP, FORMS, attempt, bitmaps, bits, refusal, send, write)
from harness import QmpError

N = 64  # granules of a disk
SIZE = N * GRANULE


# ---------------------------------------------------------------- 7.1: what is refused

def cast(d):
    """Disks s and t; small; u, the target of a job; bitmaps on s: b, and one that an export shows."""
    for name in ('s', 't', 'u'):
        d.add_disk(name, SIZE)
    d.add_disk('small', SIZE // 2)
    d.export('s')
    d.cmd(BITMAP + 'add', node='s', name='b')
    d.cmd(BITMAP + 'add', node='s', name='shown', disabled=True)
    d.cmd(BITMAP + 'add', node='t', name='tb')
    write(d, 1, node='s')
    d.export('s', 'hold', writable=False, bitmaps=['shown'])
    d.cmd('blockdev-backup', backup_args('s', 'u', 'none', job_id='other'))


# What is changed in a good request; what the reference says, and what ours says. In the order in which the
# reference finds them out.
FAULTS = {
    'device': ({'device': 'zz'}, r"nor node-name='zz'", r"'zz'"),
    'target': ({'target': 'yy'}, r"nor node-name='yy'", r"'yy'"),
    'incremental-without-bitmap': ({'sync': 'incremental'}, 'must provide a valid bitmap name',
                                   r"sync=\w+ needs 'bitmap'"),
    'bitmap-without-bitmap': ({'sync': 'bitmap', 'bitmap-mode': 'never'}, 'must provide a valid bitmap name',
                              r"sync=\w+ needs 'bitmap'"),
    'incremental-never': ({'sync': 'incremental', 'bitmap': 'b', 'bitmap-mode': 'never'}, "must be 'on-success'",
                          'means bitmap-mode=on-success'),
    'incremental-always': ({'sync': 'incremental', 'bitmap': 'b', 'bitmap-mode': 'always'}, "must be 'on-success'",
                           'means bitmap-mode=on-success'),
    'mode-without-bitmap': ({'bitmap-mode': 'always'}, 'without a bitmap', "'bitmap-mode' needs 'bitmap'"),
    'bitmap-missing': ({'sync': 'bitmap', 'bitmap': 'nope', 'bitmap-mode': 'never'}, 'could not be found', "'nope'"),
    'bitmap-of-target': ({'sync': 'bitmap', 'bitmap': 'tb', 'bitmap-mode': 'never'}, 'could not be found', "'tb'"),
    'mode-missing': ({'sync': 'bitmap', 'bitmap': 'b'}, 'must be given', "'bitmap-mode' is missing"),
    'mode-missing-full': ({'sync': 'full', 'bitmap': 'b'}, 'must be given', "'bitmap-mode' is missing"),
    'bitmap-busy': ({'sync': 'bitmap', 'bitmap': 'shown', 'bitmap-mode': 'never'}, "'shown' is currently in use",
                    "'shown' .*in use"),
    'none-with-bitmap': ({'sync': 'none', 'bitmap': 'b', 'bitmap-mode': 'on-success'}, "sync mode 'none'",
                         'sync=none'),
    'full-never': ({'sync': 'full', 'bitmap': 'b', 'bitmap-mode': 'never'}, "'never' has no meaningful",
                   'bitmap-mode=never means nothing with sync=full'),
    'top-never': ({'sync': 'top', 'bitmap': 'b', 'bitmap-mode': 'never'}, "'never' has no meaningful",
                  'bitmap-mode=never means nothing with sync=top'),
    'same-node': ({'target': 's'}, 'cannot be the same', "both node 's'"),
    'compress': ({'compress': True}, 'Compression is not supported', 'cannot be compressed'),
    'busy-target': ({'target': 'u'}, "'u' is busy", "'u'.*in use|'u' .*'other'"),
    'max-workers': ({'x-perf': {'max-workers': 0}}, 'max-workers must be between', 'max-workers 0'),
    'max-workers-large': ({'x-perf': {'max-workers': 1 << 31}}, 'max-workers must be between',
                          'max-workers 2147483648'),
    'max-chunk-negative': ({'x-perf': {'max-chunk': -1}}, 'max-chunk', 'max-chunk -1'),
    'sizes': ({'target': 'small'}, 'different sizes', "'s' has .*'small'"),
    'max-chunk': ({'x-perf': {'max-chunk': 512}}, r'max-chunk \(512\) is less', 'max-chunk 512 is less'),
    'id': ({'job-id': '1x'}, "Invalid job ID '1x'", "'1x' is not valid"),
    'id-taken': ({'job-id': 'other'}, "'other' already in use", "'other' is in use already"),
    'speed': ({'speed': -1}, "'speed' expects", "'speed' is negative"),
}


def ask(d, form, *changes, kind='blockdev-backup', **good):
    args = {**backup_args('s', 't'), **good}
    for c in changes:
        args.update(c)
    d.cmd(*((kind, args) if form == 'plain' else ('transaction', {'actions': [{'type': kind, 'data': args}]})))


def ask_drive(d, form, *changes):
    """The same of drive-backup, to a file that is not there."""
    ask(d, form, *changes, kind='drive-backup', target=d.path('new.raw'), format='raw')


def says(d, fault, text):
    return re.search(FAULTS[fault][1 if d.kind == 'qsd' else 2], text)


def refused(d, form, fault, how):
    """And then nothing has changed: bitmaps, nodes and jobs are what they were. The class of the error."""
    cast(d)
    before = bitmaps(d, 's'), [j['id'] for j in d.cmd('query-jobs')]
    d.qmp.events.clear()
    with pytest.raises(QmpError) as e:
        how(d, form, FAULTS[fault][0])
    assert says(d, fault, e.value.desc), e.value.desc
    assert d.kind == 'qsd' or d.qmp.events == []
    assert (bitmaps(d, 's'), [j['id'] for j in d.cmd('query-jobs')]) == before
    d.qmp.events.clear()
    return e.value.cls


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('fault', FAULTS)
def test_refused(sides, fault, form):
    """And then nothing has changed: bitmaps, nodes and jobs are what they were."""
    def story(d):
        cls = refused(d, form, fault, ask)
        ask(d, form)  # and nothing is left in use
        assert end_of(d, 'j') == OK
        return cls

    sides.both(story, 'GenericError')


ABOUT_TARGETS = ['target', 'bitmap-of-target', 'same-node', 'busy-target', 'sizes']


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('fault', [f for f in FAULTS if f not in ABOUT_TARGETS])
def test_drive_backup_refused(sides, fault, form):
    """For the same reasons. Ours leaves no file, on purpose; the reference may have made it by then."""
    def story(d):
        cls = refused(d, form, fault, ask_drive)
        assert d.kind == 'qsd' or not os.path.exists(d.path('new.raw'))
        ask_drive(d, form)  # and nothing is left in use
        assert end_of(d, 'j') == OK
        return cls, content(d.path('new.raw')) == content(d.path('s.raw'))

    if fault == 'none-with-bitmap':
        # The reference wants the new file to have a backing file then, and says so of raw ones first.
        assert story(sides.ours) == ('GenericError', True)
    else:
        sides.both(story, ('GenericError', True))


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('fault', ['id', 'id-taken', 'speed', 'sizes', 'max-chunk'])
def test_refused_late_gives_the_bitmap_back(sides, fault, form):
    """What is found out last: the bitmap may have been frozen by then. It is not, and it records."""
    def story(d):
        cast(d)
        with pytest.raises(QmpError) as e:
            ask(d, form, FAULTS[fault][0], {'sync': 'incremental', 'bitmap': 'b'})
        assert says(d, fault, e.value.desc), e.value.desc
        write(d, 30, node='s')
        told = bitmaps(d, 's')
        d.qmp.events.clear()
        ask(d, form, {'sync': 'incremental', 'bitmap': 'b'})
        return told, end_of(d, 'j'), bitmaps(d, 's')

    shown = {'shown': (bits(), ['busy'])}
    sides.both(story, ({'b': (bits(1, 30), ['recording']), **shown}, OK, {'b': (bits(), ['recording']), **shown}))


# Of two faults in one request the reference tells the one that stands first above. Ours differs in the
# last part: what the request alone shows is asked before what the nodes are. Class and effect are the same.
ABOUT_NODES = ['same-node', 'busy-target', 'sizes', 'max-chunk']
BITMAP_ARGS = {'sync', 'bitmap', 'bitmap-mode'}


def first_told(d, a, b):
    if d.kind == 'qsd':
        order = list(FAULTS)
    else:
        last = [f for f in FAULTS if f in ABOUT_NODES]
        order = [f for f in FAULTS if f not in [*last, 'speed']]
        order = [*order[:-5], 'speed', *order[-5:], *last]
    return min(a, b, key=order.index)


def pairs_with(fault):
    """The faults that one request can have as well; of those about the bitmap it can have one."""
    mine = set(FAULTS[fault][0])
    for other, (change, *_) in FAULTS.items():
        if not mine & set(change) and not (mine & BITMAP_ARGS and set(change) & BITMAP_ARGS):
            yield other


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('fault', FAULTS)
def test_order_of_complaints(sides, fault, form):
    def story(d):
        cast(d)
        for other in pairs_with(fault):
            with pytest.raises(QmpError) as e:
                ask(d, form, FAULTS[fault][0], FAULTS[other][0])
            assert says(d, first_told(d, fault, other), e.value.desc), (other, e.value.desc)
        return [j['id'] for j in d.cmd('query-jobs')]

    sides.both(story, ['other'])


BITMAP_FAULTS = ['incremental-without-bitmap', 'incremental-never', 'mode-without-bitmap', 'bitmap-missing',
                 'mode-missing', 'bitmap-busy', 'none-with-bitmap', 'full-never', 'top-never']


def bitmap_fault(sync, bitmap, mode):
    """The first fault of these three arguments, or 'ok'. (b is good, shown is in use, nope is not there.)"""
    if sync in ('incremental', 'bitmap') and not bitmap:
        return 'incremental-without-bitmap'
    if sync == 'incremental' and mode in ('never', 'always'):
        return 'incremental-never'
    if not bitmap:
        return 'mode-without-bitmap' if mode else 'ok'
    if bitmap == 'nope':
        return 'bitmap-missing'
    if sync != 'incremental' and not mode:
        return 'mode-missing'
    useless = 'none-with-bitmap' if sync == 'none' else 'full-never' if mode == 'never' and sync != 'bitmap' else None
    # Useless and in use: ours tells what the request shows by itself, the reference tells of the use.
    return useless or ('bitmap-busy' if bitmap == 'shown' else 'ok')


def is_useless_and_busy(sync, bitmap, mode):
    return bitmap == 'shown' and bitmap_fault(sync, 'b', mode) in ('none-with-bitmap', 'full-never')


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('sync', ['top', 'full', 'none', 'incremental', 'bitmap'])
def test_bitmap_arguments(sides, sync, form):
    """Every combination of sync mode, bitmap and bitmap-mode."""
    def told(d, bitmap, mode):
        more = {k: v for k, v in (('bitmap', bitmap), ('bitmap-mode', mode)) if v}
        try:
            ask(d, form, {'sync': sync, **more})
        except QmpError as e:
            name = next((f for f in BITMAP_FAULTS if says(d, f, e.desc)), e.desc)
            return 'full-never' if name == 'top-never' else name
        if sync == 'none':  # the others end by themselves
            d.cmd('job-cancel', id='j')
        d.qmp.job_end('j')
        return 'ok'

    def story(d):
        cast(d)
        out = {}
        for case in itertools.product([None, 'b', 'nope', 'shown'], [None, 'on-success', 'never', 'always']):
            out[case] = told(d, *case)
            if d.kind == 'qsd' and is_useless_and_busy(sync, *case):
                assert out[case] == 'bitmap-busy'
                out[case] = bitmap_fault(sync, *case)
        return out

    sides.both(story, {case: bitmap_fault(sync, *case) for case in itertools.product(
        [None, 'b', 'nope', 'shown'], [None, 'on-success', 'never', 'always'])})


# ---------------------------------------------------------------- 7.1: how it behaves

def disks(d, targets=('t',)):
    fill(d.add_disk('s', SIZE), SIZE)
    for t in targets:
        d.add_disk(t, SIZE)
    d.export('s')
    d.cmd(BITMAP + 'add', node='s', name='b')


def start(d, form, target='t', sync='full', **more):
    send(d, form, 'blockdev-backup', backup_args('s', target, sync, **{
        'x_perf': {**ONE_BY_ONE, 'use-copy-range': False}, **more}))


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('sync', ['full', 'top'])
def test_point_in_time_is_the_start(sides, sync, form):
    """What guests write afterwards, before or behind the copying, is not in the target. top is full here:
    the disk has no backing file."""
    def story(d):
        disks(d)
        write(d, 5, node='s')
        at_start = content(d.path('s.raw'))
        start(d, form, sync=sync, speed=1)
        wait_copied(d, 'j', GRANULE)
        write(d, 0, 30, N - 1, node='s')
        release(d)
        path = end_of(d, 'j')
        return path, content(d.path('t.raw')) == at_start, content(d.path('s.raw')) != at_start

    sides.both(story, (OK, True, True))


@pytest.mark.parametrize('form', FORMS)
def test_copy_unit(sides, form):
    """One dirty block of 512 bytes is copied as a whole unit of 64 KiB, and nothing else is."""
    def story(d):
        disks(d)
        d.cmd(BITMAP + 'add', node='s', name='fine', granularity=512)
        write(d, 7, node='s')
        assert d.bitmap('s', 'fine')['count'] == 512
        start(d, form, sync='incremental', bitmap='fine')
        path = end_of(d, 'j')
        unit = slice(7 * GRANULE, 8 * GRANULE)
        s, t = content(d.path('s.raw')), content(d.path('t.raw'))
        return path, t[unit] == s[unit], any(t[:unit.start]) or any(t[unit.stop:])

    sides.both(story, (OK, True, False))


@pytest.mark.parametrize('form', FORMS)
def test_several_backups_of_one_source(sides, form):
    """At once, each as the disk was when it began; but no second one into a target."""
    def story(d):
        disks(d, ('t', 'u'))
        first = content(d.path('s.raw'))
        start(d, form, speed=1)
        write(d, 20, node='s')
        second = content(d.path('s.raw'))
        start(d, form, 'u', job_id='k', speed=1)
        refused = attempt(d, form, 'blockdev-backup', backup_args('s', 't', job_id='l'), "'t'")
        write(d, 20, 40, node='s')
        for name in 'kj':
            release(d, name)
        paths = end_of(d, 'j'), end_of(d, 'k')
        return refused, paths, content(d.path('t.raw')) == first, content(d.path('u.raw')) == second

    sides.both(story, (refusal('in use'), (OK, OK), True, True))


@pytest.mark.parametrize('form', FORMS)
def test_sync_none_ends_by_cancel_only(sides, form):
    """It keeps what guests overwrite, for ever, and then is cancelled."""
    def story(d):
        disks(d)
        old = content(d.path('s.raw'))
        start(d, form, sync='none')
        write(d, 3, node='s')
        unit = slice(3 * GRANULE, 4 * GRANULE)
        until('the old data is in the target', lambda: content(d.path('t.raw'))[unit] == old[unit])
        rest = content(d.path('t.raw'))
        assert not any(rest[:unit.start]) and not any(rest[unit.stop:])
        status = job(d, 'j')['status']
        d.cmd('block-job-cancel', device='j')
        return status, [e for e in end_of(d, 'j')]

    sides.both(story, ('running', ['S:created', 'S:running', 'S:aborting', 'BLOCK_JOB_CANCELLED', 'S:concluded',
                                   'S:null']))


PERFS = {'none': {}, 'copy-range': {'use-copy-range': True}, 'one-worker': {'max-workers': 1},
         'workers': {'max-workers': (1 << 31) - 1}, 'chunk': {'max-chunk': GRANULE}, 'any-chunk': {'max-chunk': 0},
         'odd-chunk': {'max-chunk': 3 * GRANULE + 512, 'max-workers': 3}}


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('perf', PERFS)
def test_common_arguments(sides, perf, form):
    """All that a backup may be told, at their limits; the copy is whole whatever it is told."""
    def story(d):
        disks(d)
        send(d, form, 'blockdev-backup', {**backup_args('s', 't'), 'speed': 1 << 40, 'compress': False,
                                          'auto-finalize': True, 'auto-dismiss': True, 'on-source-error': 'ignore',
                                          'on-target-error': 'auto', 'x-perf': PERFS[perf]})
        path = end_of(d, 'j')
        return path, content(d.path('s.raw')) == content(d.path('t.raw'))

    sides.both(story, (OK, True))


@pytest.mark.parametrize('form', FORMS)
def test_filter_node_name(sides, form):
    """Refused: a backup puts no node into the graph here, so there is none to name."""
    d = sides.ours
    disks(d)
    args = backup_args('s', 't', filter_node_name='f')
    outcome = attempt(d, form, 'blockdev-backup', args, "'filter-node-name'")
    assert outcome[0] == 'GenericError' and d.cmd('query-jobs') == []


# ---------------------------------------------------------------- 7.2: what becomes of the bitmap

DIRTY = range(16)  # granules that are dirty at the start
NEW = {40, N - 1}  # and those that a guest writes meanwhile
MIDDLE = {'bitmap': 8, 'disk': N // 2}  # the first one that is not copied, if it does not succeed

MODES = [('incremental', None), ('bitmap', 'on-success'), ('bitmap', 'never'), ('bitmap', 'always'),
         ('full', 'on-success'), ('full', 'always'), ('top', 'on-success'), ('top', 'always')]
ENDS = ['success', 'failure', 'cancel']
FATES = [(*m, end, form, 'recording') for m in MODES for end in ENDS for form in FORMS]
FATES += [(*m, end, 'plain', 'disabled') for m in MODES for end in ENDS]


def middle_of(sync):
    return MIDDLE['disk' if sync in ('full', 'top') else 'bitmap']


def fate(sync, mode, end, recording):
    """The granules that are dirty at the end."""
    new = NEW if recording else set()
    if end == 'success' and mode != 'never':
        return new
    if mode == 'always':  # 2 + not copied; of the whole disk guests' own writes have had copies made, too
        listed = set(range(N)) - NEW if sync in ('full', 'top') else set(DIRTY)
        return new | {g for g in listed if g >= middle_of(sync)}
    return set(DIRTY) | new


def run_to_the_end(d, sync, end):
    """From the middle on. A cancel comes when the target has just failed and the job stands still."""
    release(d)
    if end == 'cancel':
        d.qmp.event('BLOCK_JOB_ERROR')
        until('it stands still', lambda: job(d, 'j')['status'] == 'paused')
        d.cmd('job-cancel', id='j')


@pytest.mark.parametrize('sync,mode,end,form,recording', FATES,
                         ids=['-'.join(filter(None, [f[0], f[1], *f[2:]])) for f in FATES])
def test_fate(sides, sync, mode, end, form, recording):
    def story(d):
        disks(d)
        write(d, *DIRTY, node='s')
        if recording == 'disabled':
            d.cmd(BITMAP + 'disable', node='s', name='b')
        target, more = 't', {'bitmap-mode': mode} if mode else {}
        if end != 'success':
            target = 'bad'
            faulty(d, 'bad', 't', {'iotype': 'write', 'sector': middle_of(sync) * GRANULE // 512})
            more['on-target-error'] = 'report' if end == 'failure' else 'stop'
        start(d, form, target, sync, bitmap='b', speed=1, **more)
        wait_copied(d, 'j', GRANULE)
        write(d, *NEW, node='s')
        during = bitmaps(d, 's')
        run_to_the_end(d, sync, end)
        path = [e for e in end_of(d, 'j') if 'JOB' in e and 'ERROR' not in e]
        after = bitmaps(d, 's')
        write(d, 50, node='s')  # and it records as before
        return during, path, after, bitmaps(d, 's')

    flags = ['recording'] if recording == 'recording' else []
    left = fate(sync, mode, end, bool(flags))
    event = {'success': 'BLOCK_JOB_COMPLETED', 'failure': 'BLOCK_JOB_COMPLETED!', 'cancel': 'BLOCK_JOB_CANCELLED'}
    sides.both(story, ({'b': (bits(*DIRTY), [*flags, 'busy'])}, [event[end]], {'b': (bits(*left), flags)},
                       {'b': (bits(*left, *([50] if flags else [])), flags)}))


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('end', ['success', 'cancel'])
def test_fate_comes_with_the_end(sides, end, form):
    """Not when all is copied: a pending job holds bitmap and successor until it is finalized."""
    def story(d):
        disks(d)
        write(d, *DIRTY, node='s')
        start(d, form, 't', 'incremental', bitmap='b', auto_finalize=False)
        d.qmp.event('BLOCK_JOB_PENDING')
        write(d, *NEW, node='s')
        pending = bitmaps(d, 's')
        used = attempt(d, form, BITMAP + 'clear', {'node': 's', 'name': 'b'}, "'b'")
        d.cmd('job-finalize' if end == 'success' else 'job-cancel', id='j')
        d.qmp.job_end('j')
        return pending, used, bitmaps(d, 's')

    left = NEW if end == 'success' else {*DIRTY, *NEW}
    sides.both(story, ({'b': (bits(*DIRTY), ['recording', 'busy'])}, refusal('in use'),
                       {'b': (bits(*left), ['recording'])}))


@pytest.mark.parametrize('end', ENDS)
def test_fate_comes_with_the_end_of_the_group(sides, end):
    """A job that waits for another one of its group holds its bitmap, and shares its fate."""
    def story(d):
        disks(d, ('t', 'u'))
        fill(d.add_disk('o', SIZE), SIZE)
        write(d, *DIRTY, node='s')
        target = 'u'
        if end == 'failure':
            target = 'bad'
            faulty(d, 'bad', 'u', {'iotype': 'write', 'sector': GRANULE // 512})
        other = backup_args('o', target, job_id='k', speed=1, x_perf=ONE_BY_ONE)
        d.cmd('transaction', {'actions': [
            {'type': 'blockdev-backup', 'data': backup_args('s', 't', 'incremental', bitmap='b')},
            {'type': 'blockdev-backup', 'data': other}], 'properties': {'completion-mode': 'grouped'}})
        until('waiting', lambda: job(d, 'j')['status'] == 'waiting')
        write(d, *NEW, node='s')
        waiting = bitmaps(d, 's')
        if end == 'cancel':
            d.cmd('job-cancel', id='k')
        else:
            release(d, 'k')
        d.qmp.job_end('j')
        return waiting, bitmaps(d, 's')

    left = NEW if end == 'success' else {*DIRTY, *NEW}
    sides.both(story, ({'b': (bits(*DIRTY), ['recording', 'busy'])}, {'b': (bits(*left), ['recording'])}))
