# SPDX-License-Identifier: Apache-2.0
"""The contract's tables about transactions: the order of things (9.2), grouped jobs (9.3), and what the
reference does wrong (9.5). What can be compared is compared with qemu-storage-daemon; where ours differs on
purpose (docs/transactions.md, last section), the test says so.
"""
import itertools
import time

import pytest

from backup_tools import GRANULE, OK, ONE_BY_ONE, backup_args, content, faulty, fill, job, until, wait_copied, wait_status
from contract_tools import BITMAP, FORMS, add_slow, attempt, bitmaps, bits, in_time, job_events, refusal, write
from harness import DEADLINE, MiB, QmpError

SIZE = 4 * MiB
REC = ['recording']


# ---------------------------------------------------------------- lists

def act(kind, /, **data):
    return {'type': kind, 'data': {k.replace('_', '-'): v for k, v in data.items()}}


def bitmap(verb, name, node='a', **more):
    return act(BITMAP + verb, node=node, name=name, **more)


def merge(target, *sources, node='a'):
    return act(BITMAP + 'merge', node=node, target=target, bitmaps=list(sources))


def backup(name, node, target, **more):
    return act('blockdev-backup', **backup_args(node, target, job_id=name, x_perf=ONE_BY_ONE, **more))


ABORT = act('abort')


def run(d, *actions, mode=None):
    """'ok', or where it failed (the reference does not say), the class, the reason."""
    properties = {'properties': {'completion-mode': mode}} if mode else {}
    try:
        d.cmd('transaction', {'actions': list(actions), **properties})
    except QmpError as e:
        return e
    return 'ok'


def outcome(told):
    return told if told == 'ok' else told.cls


def two_disks(d):
    """Disks a and b with targets ta and tb, each with a bitmap m of granules 0 and 1; a also has n {2} and
    off {3}, which does not record."""
    for node in 'ab':
        fill(d.add_disk(node, SIZE), 16 * GRANULE)
        d.add_disk('t' + node, SIZE)
        d.export(node)
        d.cmd(BITMAP + 'add', node=node, name='m')
        write(d, 0, 1, node=node)
    for name, granule in (('n', 2), ('off', 3)):
        d.cmd(BITMAP + 'disable', node='a', name='m')
        d.cmd(BITMAP + 'add', node='a', name=name)
        write(d, granule, node='a')
        d.cmd(BITMAP + 'disable', node='a', name=name)
    for name in 'mn':
        d.cmd(BITMAP + 'enable', node='a', name=name)


ALL = {'m': (bits(0, 1), REC), 'n': (bits(2), REC), 'off': (bits(3), [])}  # of node a


# ---------------------------------------------------------------- 9.2: order

@pytest.mark.parametrize('mode', [None, 'individual', 'grouped'])
def test_empty_list(sides, mode):
    sides.both(lambda d: run(d, mode=mode), 'ok')


@pytest.mark.parametrize('kind', ['add', 'remove', 'clear', 'enable', 'disable', 'merge'])
def test_grouped_list_of_other_kinds(sides, kind):
    """Ours takes any kind: grouped completion is about jobs. The reference refuses all but backups, in the
    action's turn: what came before it is undone."""
    other = {'add': bitmap('add', 'x'), 'remove': bitmap('remove', 'off'), 'clear': bitmap('clear', 'off'),
             'enable': bitmap('enable', 'off'), 'disable': bitmap('disable', 'n'), 'merge': merge('n', 'off')}[kind]

    def story(d):
        if d.kind == 'qsd' and kind == 'enable':
            return  # refusing it ends it: see 9.5
        two_disks(d)
        told = run(d, backup('j', 'a', 'ta', sync='incremental', bitmap='m'), other, mode='grouped')
        if d.kind == 'qsd':
            assert told.cls == 'GenericError' and 'completion-mode = grouped' in told.desc
            assert bitmaps(d, 'a') == ALL
            return
        assert told == 'ok'
        assert [e if isinstance(e, str) else e[0] for e in job_events(d, 'j')] == OK
        after = bitmaps(d, 'a')
        assert after['m'] == (bits(), REC)
        assert {k: v for k, v in after.items() if k != 'm'} == {
            'add': {'x': (bits(), REC), 'n': ALL['n'], 'off': ALL['off']}, 'remove': {'n': ALL['n']},
            'clear': {'n': ALL['n'], 'off': (bits(), [])}, 'enable': {'n': ALL['n'], 'off': (bits(3), REC)},
            'disable': {'n': (bits(2), []), 'off': ALL['off']},
            'merge': {'n': (bits(2, 3), REC), 'off': ALL['off']}}[kind]
        d.qmp.events.clear()

    sides.both(story)


def test_grouped_list_with_abort(sides):
    def story(d):
        two_disks(d)
        told = run(d, backup('j', 'a', 'ta', sync='incremental', bitmap='m'), ABORT, mode='grouped')
        assert d.kind == 'qsd' or told.data['action'] == 1
        return outcome(told), bitmaps(d, 'a'), d.cmd('query-jobs')

    sides.both(story, ('GenericError', ALL, []))


def test_all_nodes_are_drained_before_the_first_action(sides):
    """A write to the last action's disk is under way: until it has come back, nobody sees the first action's
    effect. Then both bitmaps are there, and neither has the write. Ours alone: the reference answers nobody
    while it drains."""
    nbd = pytest.importorskip('nbd', reason='python3-libnbd')
    d = sides.ours

    def story(seconds):
        d.add_disk('a', SIZE)
        add_slow(d, seconds, SIZE)
        d.export('slow')
        d.cmd(BITMAP + 'add', node='slow', name='old')
        h = nbd.NBD()
        h.connect_uri(d.uri('slow'))
        other = d.client()
        began = time.monotonic()
        cookie = h.aio_pwrite(bytearray(512), 0)
        until('the write is under way', lambda: h.poll(0) >= 0 and d.bitmap('slow', 'old')['count'])
        actions = [bitmap('add', 'x'), bitmap('add', 'y', 'slow')]
        d.qmp.send({'execute': 'transaction', 'arguments': {'actions': actions}})
        seen = [n for n in other.cmd('query-named-block-nodes') if n['node-name'] == 'a'][0]
        before_its_end = time.monotonic() - began < seconds
        assert d.qmp.reply() == {'return': {}}
        while not h.aio_command_completed(cookie):
            assert h.poll(int(DEADLINE * 1000)) > 0
        h.shutdown()
        other.close()
        return before_its_end, ('dirty-bitmaps' in seen, bitmaps(d, 'a'), bitmaps(d, 'slow'))

    assert in_time(d, story) == (False, {'x': (bits(), REC)}, {'y': (bits(), REC), 'old': (bits(0), REC)})


BAD = {'node': bitmap('clear', 'm', 'zz'), 'bitmap': bitmap('clear', 'yy'), 'source': merge('m', 'xx'),
       'job': backup('1j', 'a', 'ta'), 'abort': ABORT}


@pytest.mark.parametrize('first,second', itertools.permutations(BAD, 2))
def test_first_error_stops_and_is_told(sides, first, second):
    """In list order: the later bad action is never looked at, and the one before is undone."""
    words = {'node': 'zz', 'bitmap': 'yy', 'source': 'xx', 'job': '1j', 'abort': 'bort'}

    def story(d):
        two_disks(d)
        told = run(d, bitmap('clear', 'm'), BAD[first], BAD[second], bitmap('clear', 'n'))
        assert words[first] in told.desc and words[second] not in told.desc
        if d.kind == 'tidemarkd':
            assert told.data == {'action': 1, 'kind': BAD[first]['type'], 'phase': 'prepare', 'undone': True}
        return told.cls, bitmaps(d, 'a'), d.cmd('query-jobs')

    sides.both(story, ('GenericError', ALL, []))


# Each leaves the state as it was only if what was done last is undone first.
UNDONE = {
    'merge-remove': [merge('m', 'off'), bitmap('remove', 'm')],
    'clear-merge': [bitmap('clear', 'm'), merge('m', 'off'), bitmap('clear', 'm')],
    'merge-merge': [merge('m', 'off'), merge('m', 'n'), bitmap('clear', 'off'), merge('off', 'm')],
    'add-merge-remove': [bitmap('add', 'x'), merge('x', 'm'), bitmap('remove', 'x')],
    'flags': [bitmap('disable', 'm'), bitmap('enable', 'm'), bitmap('disable', 'm'), bitmap('enable', 'off'),
              bitmap('disable', 'off')],
    'clear-backup': [bitmap('clear', 'm'), backup('j', 'a', 'ta', sync='incremental', bitmap='m')],
    'merge-backup': [merge('m', 'off'), backup('j', 'a', 'ta', sync='bitmap', bitmap_mode='on-success', bitmap='m')],
    'two-disks': [bitmap('clear', 'm'), bitmap('clear', 'm', 'b'), merge('m', {'node': 'b', 'name': 'm'}),
                  backup('j', 'b', 'tb', sync='incremental', bitmap='m')],
}


@pytest.mark.parametrize('how', ['abort', 'missing', 'taken'])
@pytest.mark.parametrize('case', UNDONE)
def test_undone_last_first(sides, case, how):
    """By an action that fails for another reason as well; its own part of the undoing does no harm."""
    bad = {'abort': ABORT, 'missing': bitmap('clear', 'zz'), 'taken': bitmap('add', 'n')}[how]

    def story(d):
        two_disks(d)
        told = run(d, *UNDONE[case], bad)
        state = bitmaps(d, 'a'), bitmaps(d, 'b'), d.cmd('query-jobs')
        write(d, 20, node='a')  # what records, records again
        return told.cls, state, bitmaps(d, 'a')

    sides.both(story, ('GenericError', (ALL, {'m': (bits(0, 1), REC)}, []),
                       {'m': (bits(0, 1, 20), REC), 'n': (bits(2, 20), REC), 'off': (bits(3), [])}))


def order_of(d, status, n):
    """The first n jobs that reach this status, in this order; the list's answer comes before or after."""
    out, answer = [], None
    while len(out) < n or not answer:
        e = d.qmp.read()
        if 'event' not in e:
            answer = e
            assert answer == {'return': {}}
        elif e.get('event') == 'JOB_STATUS_CHANGE' and e['data']['status'] == status and e['data']['id'] not in out:
            out.append(e['data']['id'])
    return out


@pytest.mark.parametrize('mode', ['individual', 'grouped'])
@pytest.mark.parametrize('names', [('zz', 'aa'), ('aa', 'zz')], ids='-'.join)
@pytest.mark.parametrize('status', ['created', 'running'])
def test_jobs_start_in_list_order(sides, status, names, mode):
    """Commit in list order shows in nothing else. (Newer versions of the reference start the last one first.)"""
    def story(d):
        two_disks(d)
        d.qmp.send({'execute': 'transaction', 'arguments': {'actions': [
            backup(names[0], 'a', 'ta', speed=1), backup(names[1], 'b', 'tb', speed=1)],
            'properties': {'completion-mode': mode}}})
        return order_of(d, status, 2)

    sides.both(story, list(names))


def test_later_actions_see_earlier_ones(sides):
    def story(d):
        two_disks(d)
        told = run(d, bitmap('add', 'c'), merge('c', 'm'), bitmap('disable', 'm'))
        write(d, 20, node='a')
        return told, bitmaps(d, 'a')

    sides.both(story, ('ok', {**ALL, 'c': (bits(0, 1, 20), REC), 'm': (bits(0, 1), []), 'n': (bits(2, 20), REC)}))


def test_backup_after_clear_copies_nothing(sides):
    def story(d):
        two_disks(d)
        told = run(d, bitmap('clear', 'm'), backup('j', 'a', 'ta', sync='incremental', bitmap='m'))
        done = [e for e in job_events(d, 'j') if e[0] == 'BLOCK_JOB_COMPLETED']
        return told, done[0][1]['len'], bitmaps(d, 'a')

    sides.both(story, ('ok', 0, {**ALL, 'm': (bits(), REC)}))


def granules(path):
    """Those in which there is anything."""
    data = content(path)
    return {g for g in range(len(data) // GRANULE) if any(data[g * GRANULE:(g + 1) * GRANULE])}


def test_backup_after_merge_copies_what_either_held(sides):
    """And nothing else."""
    def story(d):
        two_disks(d)
        told = run(d, merge('m', 'off'), backup('j', 'a', 'ta', sync='incremental', bitmap='m'))
        done = [e for e in job_events(d, 'j') if e[0] == 'BLOCK_JOB_COMPLETED']
        source, target = content(d.path('a.raw')), content(d.path('ta.raw'))
        same = all(source[g * GRANULE:(g + 1) * GRANULE] == target[g * GRANULE:(g + 1) * GRANULE] for g in (0, 1, 3))
        return told, done[0][1]['len'], granules(d.path('ta.raw')), same, bitmaps(d, 'a')

    sides.both(story, ('ok', 3 * GRANULE, {0, 1, 3}, True, {**ALL, 'm': (bits(), REC)}))


@pytest.mark.parametrize('then', ['clear', 'enable', 'disable', 'remove', 'merge-from', 'merge-into', 'backup'])
def test_job_owns_its_bitmap_for_the_actions_after_it(sides, then):
    other = {'merge-from': merge('n', 'm'), 'merge-into': merge('m', 'n'),
             'backup': backup('k', 'a', 'tb', sync='bitmap', bitmap='m', bitmap_mode='never')}

    def story(d):
        two_disks(d)
        told = run(d, backup('j', 'a', 'ta', sync='incremental', bitmap='m'), other.get(then) or bitmap(then, 'm'))
        assert 'in use' in told.desc and "'m'" in told.desc
        return told.cls, bitmaps(d, 'a'), d.cmd('query-jobs')

    sides.both(story, ('GenericError', ALL, []))


def test_remove_then_add(sides):
    """Works here, as it does one by one; in the reference a removed bitmap keeps its name until commit."""
    def story(d):
        two_disks(d)
        told = run(d, bitmap('remove', 'm'), bitmap('add', 'm', disabled=True))
        if d.kind == 'qsd':
            assert 'already exists' in told.desc and bitmaps(d, 'a') == ALL
        else:
            assert told == 'ok' and bitmaps(d, 'a') == {**ALL, 'm': (bits(), [])}

    sides.both(story)


@pytest.mark.parametrize('end', ['commit', 'abort'])
def test_add_then_remove(sides, end):
    def story(d):
        two_disks(d)
        told = run(d, bitmap('add', 'z'), bitmap('remove', 'z'), *([ABORT] if end == 'abort' else []))
        return outcome(told), bitmaps(d, 'a')

    sides.both(story, ('ok' if end == 'commit' else 'GenericError', ALL))


# ---------------------------------------------------------------- 9.3: individual and grouped

MODES = ['individual', 'grouped']
DONE, CANCELLED = OK[-3:], ['S:aborting', 'BLOCK_JOB_CANCELLED', 'S:concluded', 'S:null']
FAILED = ['BLOCK_JOB_ERROR', 'S:aborting', 'BLOCK_JOB_COMPLETED!', 'S:concluded', 'S:null']
CLEAN, KEPT = {'m': (bits(9), REC)}, {'m': (bits(0, 1, 9), REC)}
BUSY = {'m': (bits(0, 1), [*REC, 'busy'])}


def start_pair(d, mode, target_b='tb', a=None, b=None, both=None):
    """Incremental jobs ja, quick, and jb, held after its first granule; then a guest writes granule 9."""
    d.cmd(BITMAP + 'remove', node='a', name='n')
    d.cmd(BITMAP + 'remove', node='a', name='off')
    how = {'sync': 'incremental', 'bitmap': 'm', **(both or {})}
    told = run(d, backup('ja', 'a', 'ta', **how, **(a or {})),
               backup('jb', 'b', target_b, **how, **{'speed': 1, **(b or {})}), mode=mode)
    if told == 'ok':
        for node in 'ab':
            write(d, 9, node=node)
    return told


def ends(d, *names):
    """How each job's path ended."""
    out = {}
    for n in names:
        path = [e if isinstance(e, str) else e[0] + ('!' if 'error' in e[1] else '') for e in job_events(d, n)]
        out[n] = next(path[-len(e):] for e in (FAILED, CANCELLED, DONE) if path[-len(e):] == e)
    return out


def maps(d):
    return bitmaps(d, 'a'), bitmaps(d, 'b')


def let_go(d):
    wait_copied(d, 'jb', GRANULE)
    d.cmd('block-job-set-speed', device='jb', speed=0)


def ja_is_through(d, mode):
    """ja has done its part: it has ended, or waits."""
    if mode == 'individual':
        assert ends(d, 'ja') == {'ja': DONE}
    else:
        wait_status(d, 'ja', 'waiting')


@pytest.mark.parametrize('mode', MODES)
def test_quick_job_waits_only_in_a_group(sides, mode):
    def story(d):
        two_disks(d)
        assert start_pair(d, mode) == 'ok'
        ja_is_through(d, mode)
        return maps(d)

    sides.both(story, (CLEAN if mode == 'individual' else BUSY, BUSY))


@pytest.mark.parametrize('mode', MODES)
def test_both_succeed(sides, mode):
    def story(d):
        two_disks(d)
        assert start_pair(d, mode) == 'ok'
        ja_is_through(d, mode)
        let_go(d)
        told = ends(d, 'jb') if mode == 'individual' else ends(d, 'ja', 'jb')
        return told, maps(d)

    sides.both(story, ({n: DONE for n in (['jb'] if mode == 'individual' else ['ja', 'jb'])}, (CLEAN, CLEAN)))


@pytest.mark.parametrize('end', ['success', 'cancel'])
def test_order_in_which_a_group_ends(sides, end):
    """Pending are the newest first. Ours ends jobs in order of creation, on purpose; the reference ends the
    newest first."""
    def story(d):
        two_disks(d)
        assert start_pair(d, 'grouped') == 'ok'
        wait_status(d, 'ja', 'waiting')
        let_go(d) if end == 'success' else d.cmd('job-cancel', id='jb')
        pending, ended = [], []
        while len(ended) < 2:
            e = d.qmp.events.pop(0) if d.qmp.events else d.qmp.read()
            if e['event'] == 'JOB_STATUS_CHANGE' and e['data']['status'] == 'pending':
                pending.append(e['data']['id'])
            elif e['event'] in ('BLOCK_JOB_COMPLETED', 'BLOCK_JOB_CANCELLED'):
                ended.append(e['data']['device'])
        return pending, ended if d.kind == 'tidemarkd' else ended[::-1]

    sides.both(story, (['jb', 'ja'] if end == 'success' else [], ['ja', 'jb']))


@pytest.mark.parametrize('mode', MODES)
def test_one_fails(sides, mode):
    """jb fails: ja's success stays, or in a group ja is cancelled."""
    def story(d):
        two_disks(d)
        faulty(d, 'bad', 'tb', {'iotype': 'write', 'sector': GRANULE // 512})
        assert start_pair(d, mode, 'bad') == 'ok'
        let_go(d)
        return ends(d, 'ja', 'jb'), maps(d)

    if mode == 'individual':
        sides.both(story, ({'ja': DONE, 'jb': FAILED}, (CLEAN, KEPT)))
    else:
        sides.both(story, ({'ja': CANCELLED, 'jb': FAILED}, (KEPT, KEPT)))


@pytest.mark.parametrize('mode', MODES)
def test_one_fails_and_both_stay_to_tell(sides, mode):
    """With auto-dismiss=false query-jobs tells which one was to blame."""
    def story(d):
        two_disks(d)
        faulty(d, 'bad', 'tb', {'iotype': 'write', 'sector': GRANULE // 512})
        assert start_pair(d, mode, 'bad', both={'auto_dismiss': False}) == 'ok'
        let_go(d)
        for n in ('ja', 'jb'):
            wait_status(d, n, 'concluded')
        return {j['id']: (j['status'], j.get('error')) for j in d.cmd('query-jobs')}

    sides.both(story, {'ja': ('concluded', 'Operation canceled' if mode == 'grouped' else None),
                       'jb': ('concluded', 'Input/output error')})


@pytest.mark.parametrize('mode', MODES)
def test_running_one_is_cancelled(sides, mode):
    def story(d):
        two_disks(d)
        assert start_pair(d, mode) == 'ok'
        ja_is_through(d, mode)
        d.cmd('job-cancel', id='jb')
        return ends(d, 'jb') if mode == 'individual' else ends(d, 'ja', 'jb'), maps(d)

    if mode == 'individual':
        sides.both(story, ({'jb': CANCELLED}, (CLEAN, KEPT)))
    else:
        sides.both(story, ({'ja': CANCELLED, 'jb': CANCELLED}, (KEPT, KEPT)))


@pytest.mark.parametrize('mode', MODES)
def test_quick_one_is_cancelled_while_it_waits(sides, mode):
    """Alone it does not wait: it is gone, and the other one stays."""
    def story(d):
        two_disks(d)
        assert start_pair(d, mode) == 'ok'
        ja_is_through(d, mode)
        told = attempt(d, 'plain', 'job-cancel', {'id': 'ja'})
        if mode == 'individual':
            return told, job(d, 'jb')['status'], maps(d)
        return told, ends(d, 'ja', 'jb'), maps(d)

    if mode == 'individual':
        sides.both(story, (refusal('missing'), 'running', (CLEAN, BUSY)))
    else:
        sides.both(story, ('ok', {'ja': CANCELLED, 'jb': CANCELLED}, (KEPT, KEPT)))


@pytest.mark.parametrize('mode,by', [('individual', 'ja'), ('grouped', 'ja'), ('grouped', 'jb')])
def test_one_is_finalized_by_hand(sides, mode, by):
    """Only ja has auto-finalize=false. In a group both wait, and either of them may be named."""
    def story(d):
        two_disks(d)
        assert start_pair(d, mode, a={'auto_finalize': False}, b={'speed': 0}) == 'ok'
        told = ends(d, 'jb') if mode == 'individual' else {}
        for n in ('ja', 'jb'):
            if n not in told:
                wait_status(d, n, 'pending')
        pending = [e['data']['id'] for e in d.qmp.events if e['event'] == 'BLOCK_JOB_PENDING']
        before = maps(d)
        d.cmd('job-finalize', id=by)
        return pending, before, {**told, **ends(d, *{'ja', 'jb'} - set(told))}, maps(d)

    sides.both(story, (['ja'], (BUSY, CLEAN if mode == 'individual' else BUSY), {'ja': DONE, 'jb': DONE},
                       (CLEAN, CLEAN)))


@pytest.mark.parametrize('mode', MODES)
def test_one_of_two_pending_is_cancelled(sides, mode):
    def story(d):
        two_disks(d)
        assert start_pair(d, mode, b={'speed': 0}, both={'auto_finalize': False}) == 'ok'
        for n in ('ja', 'jb'):
            wait_status(d, n, 'pending')
        d.cmd('job-cancel', id='ja')
        told = ends(d, 'ja') if mode == 'individual' else ends(d, 'ja', 'jb')
        left = job(d, 'jb')
        return told, left and left['status'], maps(d)

    if mode == 'individual':
        sides.both(story, ({'ja': CANCELLED}, 'pending', (KEPT, BUSY)))
    else:
        sides.both(story, ({'ja': CANCELLED, 'jb': CANCELLED}, None, (KEPT, KEPT)))


@pytest.mark.parametrize('mode', MODES)
def test_one_cannot_be_made(sides, mode):
    """Nothing starts. The events of jobs that were made and dropped are not sent here, on purpose; the
    reference shows them created and gone."""
    def story(d):
        two_disks(d)
        told = start_pair(d, mode, b={'speed': -1})
        path = [e['data']['status'] for e in d.qmp.events]
        assert d.kind == 'qsd' or path == []
        return told.cls, [e for e in d.qmp.events if e['event'].startswith('BLOCK_JOB')], d.cmd('query-jobs'), maps(d)

    untouched = {'m': (bits(0, 1), REC)}
    sides.both(story, ('GenericError', [], [], (untouched, untouched)))


@pytest.mark.parametrize('mode', MODES)
def test_job_ids_do_not_repeat(sides, mode):
    def story(d):
        two_disks(d)
        told = run(d, backup('j', 'a', 'ta'), backup('j', 'b', 'tb'), mode=mode)
        assert "'j'" in told.desc and (d.kind == 'qsd' or told.data['action'] == 1)
        return told.cls, d.cmd('query-jobs')

    sides.both(story, ('GenericError', []))


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('first,second', itertools.product(['never', 'on-success'], repeat=2))
def test_two_backups_do_not_share_a_bitmap(sides, first, second, mode):
    def story(d):
        two_disks(d)
        told = run(d, backup('ja', 'a', 'ta', sync='bitmap', bitmap='m', bitmap_mode=first),
                   backup('jb', 'a', 'tb', sync='bitmap', bitmap='m', bitmap_mode=second), mode=mode)
        assert "'m'" in told.desc and 'in use' in told.desc
        return told.cls, bitmaps(d, 'a'), d.cmd('query-jobs')

    sides.both(story, ('GenericError', ALL, []))


@pytest.mark.parametrize('mode', MODES)
def test_two_full_backups_of_one_source(sides, mode):
    def story(d):
        two_disks(d)
        told = run(d, backup('ja', 'a', 'ta'), backup('jb', 'a', 'tb'), mode=mode)
        return told, ends(d, 'ja', 'jb'), same(d, 'a', 'ta'), same(d, 'a', 'tb')

    sides.both(story, ('ok', {'ja': DONE, 'jb': DONE}, True, True))


def same(d, one, two):
    with open(d.path(one + '.raw'), 'rb') as a, open(d.path(two + '.raw'), 'rb') as b:
        return a.read() == b.read()


# ---------------------------------------------------------------- 9.5: what the reference does wrong

@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('verb', ['enable', 'disable'])
@pytest.mark.parametrize('node,name', [('a', 'zz'), ('zz', 'm')], ids=['bitmap', 'node'])
def test_enable_of_what_is_not_there(sides, verb, node, name, form):
    """An error, and all is as it was. Ours alone: as an action this ends the reference by a crash."""
    d = sides.ours
    two_disks(d)
    assert attempt(d, form, BITMAP + verb, {'node': node, 'name': name}, "'zz'") == refusal('missing')
    told = run(d, bitmap('clear', 'm'), bitmap('disable', 'n'), bitmap(verb, name, node), bitmap('clear', 'n'))
    assert told.cls == 'GenericError' and told.data['action'] == 2
    assert bitmaps(d, 'a') == ALL


@pytest.mark.parametrize('before', [False, True], ids=['alone', 'after-others'])
@pytest.mark.parametrize('verb', ['enable', 'disable'])
@pytest.mark.parametrize('user', ['export', 'job'])
def test_failed_enable_leaves_recording_on(sides, user, verb, before):
    """Of a bitmap in use. The reference undoes what it has not done, and switches it off: ours alone."""
    d = sides.ours
    two_disks(d)
    if user == 'export':
        d.export('a', 'hold', bitmaps=['m'])
    else:
        d.cmd('blockdev-backup', backup_args('a', 'ta', 'incremental', bitmap='m', speed=1, x_perf=ONE_BY_ONE))
    state = bitmaps(d, 'a')
    assert state['m'] == (bits(0, 1), [*REC, 'busy'])
    told = run(d, *([bitmap('enable', 'off'), bitmap('clear', 'n')] if before else []), bitmap(verb, 'm'))
    assert told.cls == 'GenericError' and 'in use' in told.desc and told.data['action'] == 2 * before
    assert bitmaps(d, 'a') == state
    write(d, 20, node='a')
    d.cmd('block-export-del', id='exp-hold') if user == 'export' else d.cmd('job-cancel', id='j')
    d.qmp.event('BLOCK_EXPORT_DELETED') if user == 'export' else d.qmp.job_end('j')
    assert bitmaps(d, 'a')['m'] == (bits(0, 1, 20), REC)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('end', ['commit', 'abort'])
def test_merge_of_nothing_is_nothing(sides, end, form):
    """Alone and in a list, and when it is undone. The reference crashes: ours alone."""
    d = sides.ours
    two_disks(d)
    if form == 'plain':
        assert attempt(d, 'plain', BITMAP + 'merge', merge('m')['data']) == 'ok'
        assert bitmaps(d, 'a') == ALL
    told = run(d, merge('m'), merge('off'), *([ABORT] if end == 'abort' else []))
    assert outcome(told) == ('ok' if end == 'commit' else 'GenericError')
    assert bitmaps(d, 'a') == ALL


@pytest.mark.parametrize('before', [False, True], ids=['alone', 'after-merge'])
@pytest.mark.parametrize('sync', ['bitmap', 'full', 'top'])
def test_aborted_backup_of_mode_always_changes_nothing(sides, sync, before):
    """The job never was, so nothing is left uncopied. In the reference the bitmap then holds the whole disk, and
    after a merge in the same list it crashes: ours alone."""
    d = sides.ours
    two_disks(d)
    told = run(d, *([merge('m', 'off')] if before else []),
               backup('j', 'a', 'ta', sync=sync, bitmap='m', bitmap_mode='always'), ABORT)
    assert told.data['action'] == 1 + before
    assert bitmaps(d, 'a') == ALL and d.cmd('query-jobs') == []
