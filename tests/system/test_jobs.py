# SPDX-License-Identifier: Apache-2.0
"""Jobs as such: states, verbs, events, errors, groups, the end of the daemon."""
import pytest

from backup_tools import (CANCELLED, GRANULE, OK, ONE_BY_ONE, backup, backup_args, block_job,
                          end_of, faulty, fill, held, job, refused, release, transaction, until,
                          wait_status)
from harness import DEADLINE, Daemon, KiB, MiB, QmpError, qemu_io

SIZE = 1 * MiB


@pytest.fixture
def d():
    with Daemon() as daemon:
        fill(daemon.add_disk('src', SIZE), SIZE)
        daemon.add_disk('dst', SIZE)
        yield daemon


# ---------------------------------------------------------------- event sequences (6.4)

def test_success_path(d):
    backup(d, 'src', 'dst')
    assert end_of(d, 'j') == OK


def test_manual_dismiss(d):
    backup(d, 'src', 'dst', auto_dismiss=False)
    d.qmp.event('BLOCK_JOB_COMPLETED', device='j')
    wait_status(d, 'j', 'concluded')
    assert 'error' not in job(d, 'j')
    d.add_disk('dst2', SIZE)
    with refused('j'):
        backup(d, 'src', 'dst2')  # the id is taken until dismissed
    d.cmd('job-dismiss', id='j')
    d.qmp.event('JOB_STATUS_CHANGE', id='j', status='null')
    assert job(d, 'j') is None
    backup(d, 'src', 'dst2')
    d.qmp.event('JOB_STATUS_CHANGE', id='j', status='null')


def test_manual_finalize(d):
    backup(d, 'src', 'dst', auto_finalize=False)
    pending = d.qmp.event('BLOCK_JOB_PENDING')
    assert pending['data'] == {'type': 'backup', 'id': 'j'}
    assert job(d, 'j')['status'] == 'pending'
    d.cmd('job-finalize', id='j')
    assert end_of(d, 'j') == OK


@pytest.mark.parametrize('command', ['job-finalize', 'block-job-finalize'])
def test_finalize_and_dismiss_by_hand(d, command):
    backup(d, 'src', 'dst', auto_finalize=False, auto_dismiss=False)
    d.qmp.event('BLOCK_JOB_PENDING', id='j')
    d.cmd(command, id='j')
    assert job(d, 'j')['status'] == 'concluded'  # the answer comes after the end
    d.cmd('block-job-dismiss', id='j')
    assert end_of(d, 'j') == [e for e in OK if 'PENDING' not in e]


def test_event_data(d):
    backup(d, 'src', 'dst', speed=1 << 40)
    done = d.qmp.event('BLOCK_JOB_COMPLETED')['data']
    assert done == {'type': 'backup', 'device': 'j', 'len': SIZE, 'offset': SIZE, 'speed': 1 << 40}


def test_cancel_running(d):
    held(d, 'src', 'dst')
    d.cmd('block-job-cancel', device='j')
    assert end_of(d, 'j') == CANCELLED


def test_cancelled_job_tells_its_error(d):
    held(d, 'src', 'dst', auto_dismiss=False)
    d.cmd('job-cancel', id='j')
    wait_status(d, 'j', 'concluded')
    assert job(d, 'j')['error'] == 'Operation canceled'
    d.cmd('job-dismiss', id='j')


def test_cancel_paused(d):
    held(d, 'src', 'dst')
    d.cmd('job-pause', id='j')
    d.qmp.event('JOB_STATUS_CHANGE', id='j', status='paused')
    with refused('j', 'paused'):
        d.cmd('block-job-cancel', device='j')
    d.cmd('block-job-cancel', device='j', force=True)
    events = d.qmp.job_end('j')
    at = events.index('S:aborting')
    assert events[at - 1:] == ['S:running', 'S:aborting', 'BLOCK_JOB_CANCELLED', 'S:concluded', 'S:null']


def test_cancel_pending(d):
    backup(d, 'src', 'dst', auto_finalize=False)
    d.qmp.event('BLOCK_JOB_PENDING')
    d.cmd('job-cancel', id='j')
    assert end_of(d, 'j') == ['S:created', 'S:running', 'S:waiting', 'S:pending', 'S:aborting',
                              'BLOCK_JOB_CANCELLED', 'S:concluded', 'S:null']


def test_refused_job_leaves_no_trace(d):
    for extra in ({'speed': -1}, {'job-id': '1x'}, {'job-id': ''}, {'x-perf': {'max-workers': 0}}):
        with refused():
            d.cmd('blockdev-backup', {**backup_args('src', 'dst'), 'auto-dismiss': False, **extra})
    with refused('job-id'):
        d.cmd('blockdev-backup', {'device': 'src', 'target': 'dst', 'sync': 'full'})
    assert d.cmd('query-jobs') == []
    assert not [e for e in d.qmp.events if e['event'].startswith(('JOB', 'BLOCK_JOB'))]
    backup(d, 'src', 'dst')  # nothing is left in use
    assert end_of(d, 'j') == OK


# ---------------------------------------------------------------- verbs by state (6.2)

VERBS = ['cancel', 'pause', 'resume', 'set-speed', 'complete', 'finalize', 'dismiss']


def try_verb(d, verb, block=False):
    """None, or the error's text."""
    try:
        if verb == 'set-speed':
            d.cmd('block-job-set-speed', device='j', speed=1)
        elif block:
            d.cmd('block-job-' + verb, {'id' if verb in ('finalize', 'dismiss') else 'device': 'j'})
        else:
            d.cmd('job-' + verb, id='j')
    except QmpError as e:
        assert e.cls == 'GenericError'
        return e.desc
    return None


def refuses_exactly(d, state, verbs):
    """These verbs, and with them the message that names state and verb."""
    for block in (False, True):
        for v in verbs:
            text = try_verb(d, v, block)
            if v == 'resume':  # checked before the table, in every state
                assert text and 'not paused' in text, (v, text)
            else:
                assert text and state in text and v in text, (state, v, text)
    assert job(d, 'j')['status'] == state


def test_verbs_running(d):
    held(d, 'src', 'dst')
    refuses_exactly(d, 'running', ['complete', 'finalize', 'dismiss', 'resume'])
    assert try_verb(d, 'set-speed') is None
    assert try_verb(d, 'pause') is None
    wait_status(d, 'j', 'paused')
    assert try_verb(d, 'resume') is None
    wait_status(d, 'j', 'running')
    assert try_verb(d, 'cancel') is None
    d.qmp.job_end('j')


def test_verbs_paused(d):
    held(d, 'src', 'dst')
    d.cmd('job-pause', id='j')
    wait_status(d, 'j', 'paused')
    refuses_exactly(d, 'paused', ['complete', 'finalize', 'dismiss'])
    assert 'paused' in try_verb(d, 'pause')  # already
    assert try_verb(d, 'set-speed') is None
    assert try_verb(d, 'resume', block=True) is None
    wait_status(d, 'j', 'running')
    assert try_verb(d, 'cancel') is None
    d.qmp.job_end('j')


def test_verbs_pending(d):
    backup(d, 'src', 'dst', auto_finalize=False)
    d.qmp.event('BLOCK_JOB_PENDING')
    refuses_exactly(d, 'pending', ['pause', 'resume', 'set-speed', 'complete', 'dismiss'])
    assert try_verb(d, 'finalize') is None
    d.qmp.job_end('j')


def test_verbs_concluded(d):
    backup(d, 'src', 'dst', auto_dismiss=False)
    wait_status(d, 'j', 'concluded')
    refuses_exactly(d, 'concluded', [v for v in VERBS if v != 'dismiss'])
    assert try_verb(d, 'dismiss') is None


def grouped_pair(d, slow=None, **kw):
    """Job j is done and waits for job k, which is held (or hangs in a target of null-co)."""
    fill(d.add_disk('src2', SIZE), SIZE)
    if not slow:
        d.add_disk('dst2', SIZE)
    transaction(d, ('blockdev-backup', backup_args('src', 'dst', **kw)),
                ('blockdev-backup', backup_args('src2', slow or 'dst2', job_id='k', speed=1,
                                                x_perf=ONE_BY_ONE, **kw)), grouped=True)


def test_verbs_waiting(d):
    grouped_pair(d)
    wait_status(d, 'j', 'waiting')
    refuses_exactly(d, 'waiting', [v for v in VERBS if v != 'cancel'])
    assert try_verb(d, 'cancel') is None
    d.qmp.job_end('j')


def test_unknown_jobs(d):
    for verb in ['pause', 'resume', 'cancel', 'complete', 'finalize', 'dismiss']:
        with refused('nope'):
            d.cmd('job-' + verb, id='nope')
        member = 'id' if verb in ('finalize', 'dismiss') else 'device'
        with refused('nope', cls='DeviceNotActive'):
            d.cmd('block-job-' + verb, {member: 'nope'})
    with refused('nope', cls='DeviceNotActive'):
        d.cmd('block-job-set-speed', device='nope', speed=1)


def test_negative_speed(d):
    held(d, 'src', 'dst')
    with refused('speed'):
        d.cmd('block-job-set-speed', device='j', speed=-1)
    assert block_job(d, 'j')['speed'] == 1
    d.cmd('job-cancel', id='j')
    d.qmp.job_end('j')


# ---------------------------------------------------------------- queries

def test_query_rows(d):
    held(d, 'src', 'dst')
    assert job(d, 'j') == {'id': 'j', 'type': 'backup', 'status': 'running',
                           'current-progress': GRANULE, 'total-progress': SIZE}
    row = block_job(d, 'j')
    busy = row.pop('busy')
    assert isinstance(busy, bool)
    assert row == {'type': 'backup', 'device': 'j', 'len': SIZE, 'offset': GRANULE, 'paused': False,
                   'speed': 1, 'io-status': 'ok', 'ready': False, 'status': 'running',
                   'auto-finalize': True, 'auto-dismiss': True}
    d.add_disk('dst2', SIZE)
    held(d, 'src', 'dst2', job_id='k')
    assert [r['id'] for r in d.cmd('query-jobs')] == ['k', 'j']  # newest first
    assert [r['device'] for r in d.cmd('query-block-jobs')] == ['k', 'j']
    for name in 'jk':
        d.cmd('job-cancel', id=name)
        d.qmp.job_end(name)


def test_speed_change_counts_from_now(d):
    """A new speed is not held up by what the old one owes."""
    held(d, 'src', 'dst')
    d.cmd('block-job-set-speed', device='j', speed=1 << 40)
    assert end_of(d, 'j') == OK


def test_speed_limits(d):
    """A limited job takes at least the time that its speed asks for."""
    backup(d, 'src', 'dst', speed=4 * MiB, x_perf={'max-chunk': GRANULE})
    first = d.qmp.event('JOB_STATUS_CHANGE', id='j', status='running')['timestamp']
    last = d.qmp.event('JOB_STATUS_CHANGE', id='j', status='null')['timestamp']
    took = last['seconds'] - first['seconds'] + (last['microseconds'] - first['microseconds']) / 1e6
    assert took >= 0.2, took


def test_pause_stops_and_resume_goes_on(d):
    held(d, 'src', 'dst')
    d.cmd('block-job-pause', device='j')
    d.qmp.event('JOB_STATUS_CHANGE', id='j', status='paused')
    release(d)
    row = block_job(d, 'j')
    assert row['paused'] and row['status'] == 'paused' and row['offset'] == GRANULE
    d.cmd('block-job-resume', device='j')
    events = d.qmp.job_end('j')
    assert events[-5:] == ['S:waiting', 'S:pending', 'BLOCK_JOB_COMPLETED', 'S:concluded', 'S:null']


# ---------------------------------------------------------------- error policies (6.4, 6.5)

SECTOR = 5 * GRANULE // 512


def one_error(d, side, errno=5):
    """The names of source and target; `side` fails once, in the sixth granule."""
    iotype = 'read' if side == 'source' else 'write'
    faulty(d, 'bad', 'src' if side == 'source' else 'dst',
           {'iotype': iotype, 'sector': SECTOR, 'errno': errno, 'once': True})
    return ('bad', 'dst') if side == 'source' else ('src', 'bad')


@pytest.mark.parametrize('side', ['source', 'target'])
@pytest.mark.parametrize('policy,errno,action', [
    (None, 5, 'report'), ('report', 28, 'report'), ('enospc', 5, 'report'), ('auto', 5, 'report')])
def test_error_report(d, side, policy, errno, action):
    src, dst = one_error(d, side, errno)
    kw = {f'on_{side}_error': policy} if policy else {}
    backup(d, src, dst, x_perf=ONE_BY_ONE, **kw)
    e = d.qmp.event('BLOCK_JOB_ERROR')['data']
    assert e == {'device': 'j', 'operation': 'read' if side == 'source' else 'write', 'action': action}
    done = d.qmp.event('BLOCK_JOB_COMPLETED')['data']
    assert done['error'] == ('No space left on device' if errno == 28 else 'Input/output error')
    assert end_of(d, 'j') == ['S:created', 'S:running', 'S:aborting', 'S:concluded', 'S:null']


@pytest.mark.parametrize('side', ['source', 'target'])
def test_error_ignore(d, side):
    src, dst = one_error(d, side)
    backup(d, src, dst, x_perf=ONE_BY_ONE, **{f'on_{side}_error': 'ignore'})
    assert d.qmp.event('BLOCK_JOB_ERROR')['data']['action'] == 'ignore'
    assert end_of(d, 'j') == OK
    assert open(d.path('src.raw'), 'rb').read() == open(d.path('dst.raw'), 'rb').read()


@pytest.mark.parametrize('side', ['source', 'target'])
@pytest.mark.parametrize('policy,errno,status', [
    ('stop', 5, 'failed'), ('stop', 28, 'nospace'), ('enospc', 28, 'nospace'), ('auto', 28, 'nospace')])
def test_error_stop(d, side, policy, errno, status):
    src, dst = one_error(d, side, errno)
    backup(d, src, dst, x_perf=ONE_BY_ONE, **{f'on_{side}_error': policy})
    assert d.qmp.event('BLOCK_JOB_ERROR')['data']['action'] == 'stop'
    d.qmp.event('JOB_STATUS_CHANGE', id='j', status='paused')
    row = block_job(d, 'j')
    assert row['paused'] and row['io-status'] == status and row['offset'] == 5 * GRANULE
    d.cmd('block-job-resume', device='j')
    end_of_it = d.qmp.job_end('j')
    assert end_of_it[-5:] == OK[-5:]
    assert open(d.path('src.raw'), 'rb').read() == open(d.path('dst.raw'), 'rb').read()


def test_stopped_job_can_be_cancelled(d):
    src, dst = one_error(d, 'target')
    backup(d, src, dst, on_target_error='stop')
    d.qmp.event('JOB_STATUS_CHANGE', id='j', status='paused')
    d.cmd('block-job-cancel', device='j', force=True)
    assert 'BLOCK_JOB_CANCELLED' in d.qmp.job_end('j')


def test_flush_error_fails_the_job(d):
    d.cmd('block-dirty-bitmap-add', node='src', name='b')
    qemu_io(d.export('src'), 'write -P 7 0 64k')
    faulty(d, 'bad', 'dst', {'iotype': 'flush'})
    backup(d, 'src', 'bad', 'incremental', bitmap='b')
    done = d.qmp.event('BLOCK_JOB_COMPLETED')['data']
    assert 'Input/output error' in done['error']
    d.qmp.job_end('j')
    assert d.bitmap('src', 'b')['count'] == 64 * KiB


# ---------------------------------------------------------------- groups (9.3)

@pytest.fixture
def pair():
    """Sources a and b with bitmaps and 2 dirty granules each; job ja is quick, jb is held."""
    with Daemon() as daemon:
        for n in 'ab':
            fill(daemon.add_disk(n, SIZE), SIZE)
            daemon.add_disk('t' + n, SIZE)
            daemon.cmd('block-dirty-bitmap-add', node=n, name='m')
            qemu_io(daemon.export(n), 'write -P 9 0 128k')
        yield daemon


def start_pair(d, grouped, target_b='tb', a=None, b=None):
    transaction(d, ('blockdev-backup', {**backup_args('a', 'ta', 'incremental', job_id='ja', bitmap='m'), **(a or {})}),
                ('blockdev-backup', {**backup_args('b', target_b, 'incremental', job_id='jb', bitmap='m',
                                                   speed=1, x_perf=ONE_BY_ONE), **(b or {})}),
                grouped=grouped)


def counts(d):
    return tuple(d.bitmap(n, 'm')['count'] // GRANULE for n in 'ab')


def test_individual_jobs_end_alone(pair):
    start_pair(pair, False)
    assert end_of(pair, 'ja') == OK
    assert counts(pair) == (0, 2) and not pair.bitmap('a', 'm')['busy']
    release(pair, 'jb')
    assert end_of(pair, 'jb') == OK
    assert counts(pair) == (0, 0)


def test_grouped_success(pair):
    start_pair(pair, True)
    pair.qmp.event('JOB_STATUS_CHANGE', id='ja', status='waiting')
    assert pair.bitmap('a', 'm')['busy'] and counts(pair) == (2, 2)
    release(pair, 'jb')
    order = []
    while order.count('null') < 2:
        e = pair.qmp.events.pop(0) if pair.qmp.events else pair.qmp.read()
        if 'event' in e and e['event'] == 'JOB_STATUS_CHANGE' and e['data']['status'] in ('pending', 'null'):
            order.append(e['data']['status'])
        elif e.get('event') == 'BLOCK_JOB_COMPLETED':
            order.append(e['data']['device'])
    assert order == ['pending', 'pending', 'ja', 'jb', 'null', 'null']
    assert counts(pair) == (0, 0) and not pair.bitmap('a', 'm')['busy']


def test_grouped_failure_cancels_the_other(pair):
    faulty(pair, 'bad', 'tb', {'iotype': 'write'})
    start_pair(pair, True, 'bad', {'auto-dismiss': False}, {'auto-dismiss': False})
    wait_status(pair, 'ja', 'concluded')
    wait_status(pair, 'jb', 'concluded')
    assert job(pair, 'ja')['error'] == 'Operation canceled'
    assert job(pair, 'jb')['error'] == 'Input/output error'
    for n in ('ja', 'jb'):
        pair.cmd('job-dismiss', id=n)
    a, b = end_of(pair, 'ja'), end_of(pair, 'jb')
    assert a[-4:] == ['S:aborting', 'BLOCK_JOB_CANCELLED', 'S:concluded', 'S:null']
    assert b == ['S:created', 'S:running', 'BLOCK_JOB_ERROR', 'S:aborting', 'BLOCK_JOB_COMPLETED!',
                 'S:concluded', 'S:null']
    assert counts(pair) == (2, 2)


def test_individual_failure_is_alone(pair):
    faulty(pair, 'bad', 'tb', {'iotype': 'write'})
    start_pair(pair, False, 'bad')
    assert end_of(pair, 'ja') == OK
    pair.qmp.job_end('jb')
    assert counts(pair) == (0, 2)


@pytest.mark.parametrize('victim', ['ja', 'jb'])
def test_grouped_cancel(pair, victim):
    """Of the running one and of the one that waits."""
    start_pair(pair, True)
    pair.qmp.event('JOB_STATUS_CHANGE', id='ja', status='waiting')
    pair.cmd('job-cancel', id=victim)
    for n in ('ja', 'jb'):
        assert pair.qmp.job_end(n)[-3:] == ['BLOCK_JOB_CANCELLED', 'S:concluded', 'S:null']
    assert counts(pair) == (2, 2)
    assert not pair.bitmap('a', 'm')['busy'] and not pair.bitmap('b', 'm')['busy']


@pytest.mark.parametrize('by', ['ja', 'jb'])
def test_grouped_finalize_by_hand(pair, by):
    start_pair(pair, True, a={'auto-finalize': False}, b={'speed': 0})
    pair.qmp.event('BLOCK_JOB_PENDING', id='ja')
    wait_status(pair, 'jb', 'pending')
    assert counts(pair) == (2, 2)
    assert not [e for e in pair.qmp.events if e['event'] == 'BLOCK_JOB_PENDING']
    pair.cmd('job-finalize', id=by)
    assert end_of(pair, 'ja')[-3:] == OK[-3:] and end_of(pair, 'jb')[-3:] == OK[-3:]
    assert counts(pair) == (0, 0)


def test_individual_finalize_by_hand(pair):
    start_pair(pair, False, a={'auto-finalize': False}, b={'speed': 0})
    assert end_of(pair, 'jb') == OK
    wait_status(pair, 'ja', 'pending')
    pair.cmd('job-finalize', id='ja')
    pair.qmp.job_end('ja')


@pytest.mark.parametrize('grouped', [True, False])
def test_cancel_one_of_two_pending(pair, grouped):
    manual = {'auto-finalize': False, 'speed': 0}
    start_pair(pair, grouped, a=manual, b=manual)
    wait_status(pair, 'ja', 'pending')
    wait_status(pair, 'jb', 'pending')
    pair.cmd('job-cancel', id='ja')
    assert 'BLOCK_JOB_CANCELLED' in pair.qmp.job_end('ja')
    if not grouped:
        assert job(pair, 'jb')['status'] == 'pending'
        pair.cmd('job-finalize', id='jb')
    assert ('BLOCK_JOB_CANCELLED' in pair.qmp.job_end('jb')) == grouped
    assert counts(pair) == ((2, 2) if grouped else (2, 0))


@pytest.mark.parametrize('grouped', [True, False])
def test_failed_list_starts_nothing(pair, grouped):
    with refused('nope'):
        start_pair(pair, grouped, b={'bitmap': 'nope'})
    assert pair.cmd('query-jobs') == []
    assert not [e for e in pair.qmp.events if 'JOB' in e['event']]
    assert counts(pair) == (2, 2) and not pair.bitmap('a', 'm')['busy']
    start_pair(pair, grouped, b={'speed': 0})  # all is free again
    assert end_of(pair, 'ja') == OK and end_of(pair, 'jb') == OK


def test_one_bitmap_for_two_jobs_is_refused(pair):
    for mode in ('never', 'on-success'):
        one = backup_args('a', 'ta', 'bitmap', job_id='ja', bitmap='m', bitmap_mode=mode)
        with refused('m', 'in use'):
            transaction(pair, ('blockdev-backup', one), ('blockdev-backup', {**one, 'target': 'tb', 'job-id': 'jb'}))
    assert counts(pair) == (2, 2)


def test_one_job_id_for_two_jobs_is_refused(pair):
    with refused('ja'):
        start_pair(pair, False, b={'job-id': 'ja'})
    assert counts(pair) == (2, 2)


def test_two_backups_of_one_source(pair):
    transaction(pair, ('blockdev-backup', backup_args('a', 'ta', job_id='ja')),
                ('blockdev-backup', backup_args('a', 'tb', job_id='jb')))
    for n in ('ja', 'jb'):
        assert end_of(pair, n) == OK


# ---------------------------------------------------------------- the end of the daemon

@pytest.mark.parametrize('how', ['quit', 'signal'])
def test_quit_cancels_jobs(how):
    with Daemon() as d:
        for i in range(3):
            fill(d.add_disk(f's{i}', SIZE), SIZE)
            d.add_disk(f't{i}', SIZE)
            d.export(f's{i}')
        held(d, 's0', 't0', job_id='running')
        held(d, 's1', 't1', job_id='paused')
        d.cmd('job-pause', id='paused')
        backup(d, 's2', 't2', job_id='pending', auto_finalize=False, auto_dismiss=False)
        d.qmp.event('BLOCK_JOB_PENDING')
        if how == 'quit':
            d.cmd('quit')
        else:
            d.proc.terminate()
        until('all exports gone', lambda: d.qmp.event('BLOCK_EXPORT_DELETED', id='exp-s0'))
        for n in ('running', 'paused', 'pending'):
            assert d.qmp.job_end(n)[-3:] == ['BLOCK_JOB_CANCELLED', 'S:concluded', 'S:null']
        assert d.proc.wait(DEADLINE) == 0
