# SPDX-License-Identifier: Apache-2.0
"""The contract's tables about jobs: which verb is taken in which state (6.2), which events come (6.4).

Each job is made by the plain command and by a list of one action, and on qemu-storage-daemon.
"""
import pytest

from backup_tools import (GRANULE, ONE_BY_ONE, backup_args, block_job, faulty, fill, job, until, wait_copied,
                          wait_status)
from contract_tools import FORMS, add_slow, attempt, in_time, job_events, refusal, send, wipe
from harness import QmpError

SIZE = 4 * GRANULE


def disks(d):
    fill(d.add_disk('d', SIZE), SIZE)
    d.add_disk('t', SIZE)


def start(d, form, target='t', **more):
    send(d, form, 'blockdev-backup', backup_args('d', target, **{'x_perf': ONE_BY_ONE, **more}))


def held(d, form, **more):
    """A job that has copied one granule of four, and copies no more."""
    start(d, form, speed=1, **more)
    wait_copied(d, 'j', GRANULE)


# ---------------------------------------------------------------- 6.2: verbs by state

def running(d, form):
    held(d, form)


def paused(d, form):
    held(d, form)
    d.cmd('job-pause', id='j')
    wait_status(d, 'j', 'paused')


def waiting(d, form):
    """Done, but the other one of its group is not. One plain command or action cannot make this."""
    fill(d.add_disk('d2', SIZE), SIZE)
    d.add_disk('t2', SIZE)
    slow = backup_args('d2', 't2', job_id='k', speed=1, x_perf=ONE_BY_ONE)
    d.cmd('transaction', {'actions': [{'type': 'blockdev-backup', 'data': a} for a in (backup_args('d', 't'), slow)],
                          'properties': {'completion-mode': 'grouped'}})
    wait_status(d, 'j', 'waiting')


def pending(d, form):
    start(d, form, auto_finalize=False)
    wait_status(d, 'j', 'pending')


def concluded(d, form):
    start(d, form, auto_dismiss=False)
    wait_status(d, 'j', 'concluded')


STATES = {'running': running, 'paused': paused, 'waiting': waiting, 'pending': pending, 'concluded': concluded}
VERBS = ['cancel', 'pause', 'resume', 'set-speed', 'complete', 'finalize', 'dismiss']
CANCELLED = ['S:aborting', 'BLOCK_JOB_CANCELLED', 'S:concluded', 'S:null']
COMPLETED = ['BLOCK_JOB_COMPLETED', 'S:concluded', 'S:null']

# What is accepted, and the end of the path that it leads to, or what is shown then: status, speed.
ACCEPTED = {
    ('cancel', 'running'): CANCELLED,
    ('pause', 'running'): ('paused', 1),
    ('set-speed', 'running'): ('running', 2),
    ('cancel', 'paused'): CANCELLED,
    ('resume', 'paused'): ('running', 1),
    ('set-speed', 'paused'): ('paused', 2),
    ('cancel', 'waiting'): CANCELLED,
    ('cancel', 'pending'): CANCELLED,
    ('finalize', 'pending'): COMPLETED,
    ('dismiss', 'concluded'): ['S:concluded', 'S:null'],
}


def commands(verb, state):
    """The verb as job-* and as block-job-*."""
    args = {'speed': 2} if verb == 'set-speed' else {}
    if verb == 'cancel' and state == 'paused':
        args = {'force': True}  # without it this is refused in both daemons
    member = 'id' if verb in ('finalize', 'dismiss') else 'device'
    out = [('block-job-' + verb, {member: 'j', **args})]
    return out if verb == 'set-speed' else [('job-' + verb, {'id': 'j'}), *out]


def refused(verb, state):
    if verb == 'resume':  # this comes before the table, in every state (6.2, extra rules)
        return refusal('not paused')
    if (verb, state) == ('pause', 'paused'):
        return refusal('paused')
    return refusal(('verb', 'j', state, verb))


def shown(d, state, wanted):
    """The end of the job's path if it has to end, else what queries say."""
    if isinstance(wanted, list):
        path = [e if isinstance(e, str) else e[0] + ('!' if 'error' in e[1] else '') for e in job_events(d, 'j')]
        return path[-len(wanted):]
    status, _ = wanted
    wait_status(d, 'j', status)
    return status, block_job(d, 'j')['speed']


CELLS = [(v, s, f) for v in VERBS for s in STATES for f in FORMS if s != 'waiting' or f == 'list']


@pytest.mark.parametrize('verb,state,form', CELLS, ids=['-'.join(c) for c in CELLS])
def test_verb(sides, verb, state, form):
    wanted = ACCEPTED.get((verb, state))
    n = len(commands(verb, state))

    def story(d):
        told = []
        for command, args in commands(verb, state):
            disks(d)
            STATES[state](d, form)
            outcome = attempt(d, 'plain', command, args, "'j'")
            told.append((outcome, shown(d, state, wanted) if wanted else job(d, 'j')['status']))
            wipe(d)
        return told

    sides.both(story, [('ok', wanted) if wanted else (refused(verb, state), state)] * n)


def in_request(d, name):
    """A job that copies to `slow` one by one has just written one granule, and so is writing the next."""
    until(name + ' writes', lambda: job(d, name)['current-progress'])


@pytest.mark.parametrize('form', FORMS)
def test_resume_before_the_pause_has_come(sides, form):
    """A job cannot pause while it stands in a request: then resume finds it running."""
    def story(d, seconds):
        disks(d)
        add_slow(d, seconds, SIZE)
        start(d, form, 'slow')
        in_request(d, 'j')
        told = [attempt(d, 'plain', 'job-pause', {'id': 'j'}), block_job(d, 'j')['status'],
                attempt(d, 'plain', 'job-pause', {'id': 'j'}, "'j'"), attempt(d, 'plain', 'job-resume', {'id': 'j'}),
                attempt(d, 'plain', 'job-resume', {'id': 'j'}, "'j'"), job(d, 'j')['status']]
        d.cmd('job-cancel', id='j')
        paused = [e for e in d.qmp.events if e.get('data', {}).get('status') == 'paused']
        return not paused or d.kind == 'qsd' and told[1] == 'running', told

    sides.both(lambda d: in_time(d, lambda seconds: story(d, seconds)),
               ['ok', 'running', refusal('paused'), 'ok', refusal('not paused'), 'running'])


def test_verbs_while_aborting(sides):
    """j has failed; the group cannot end before k's request has come back. No verb is taken meanwhile.

    Ours alone: the reference does not answer while it waits for k."""
    d = sides.ours

    def story(seconds):
        disks(d)
        fill(d.add_disk('d2', SIZE), SIZE)
        add_slow(d, seconds, SIZE)
        faulty(d, 'bad', 't', {'iotype': 'write', 'sector': GRANULE // 512})
        jobs = [backup_args('d2', 'slow', job_id='k', x_perf=ONE_BY_ONE),
                backup_args('d', 'bad', x_perf=ONE_BY_ONE, speed=1, auto_dismiss=False)]
        d.cmd('transaction', {'actions': [{'type': 'blockdev-backup', 'data': a} for a in jobs],
                              'properties': {'completion-mode': 'grouped'}})
        in_request(d, 'k')
        d.cmd('block-job-set-speed', device='j', speed=0)
        d.qmp.event('JOB_STATUS_CHANGE', id='j', status='aborting')
        told = {(verb, command): attempt(d, 'plain', command, args, "'j'")
                for verb in VERBS for command, args in commands(verb, 'aborting')}
        return job(d, 'j')['status'] == 'aborting', told

    told = in_time(d, story)
    assert told == {(v, c): refused(v, 'aborting') for v in VERBS for c, _ in commands(v, 'aborting')}
    assert job_events(d, 'j', 'concluded')[-1] == 'S:concluded'


@pytest.mark.parametrize('form', FORMS)
def test_stopped_by_an_error_counts_as_paused(sides, form):
    """By on-target-error=stop: resume is taken, pause is not, a soft cancel is not."""
    def story(d):
        disks(d)
        faulty(d, 'bad', 't', {'iotype': 'write', 'sector': GRANULE // 512, 'once': True})
        start(d, form, 'bad', on_target_error='stop')
        wait_status(d, 'j', 'paused')
        told = [attempt(d, 'plain', 'job-pause', {'id': 'j'}, "'j'"),
                attempt(d, 'plain', 'block-job-cancel', {'device': 'j'}, "'j'"),
                attempt(d, 'plain', 'block-job-resume', {'device': 'j'})]
        return told, [e if isinstance(e, str) else e[0] for e in job_events(d, 'j')]

    sides.both(story, ([refusal('paused'), refusal('paused'), 'ok'],
                       ['S:created', 'S:running', 'BLOCK_JOB_ERROR', 'S:waiting', 'S:pending', *COMPLETED]))


@pytest.mark.parametrize('form', FORMS)
def test_concluded_job_keeps_its_id(sides, form):
    def story(d):
        disks(d)
        d.add_disk('t2', SIZE)
        concluded(d, form)
        told = [attempt(d, f, 'blockdev-backup', backup_args('d', 't2'), "'j'") for f in FORMS]
        d.cmd('job-dismiss', id='j')
        start(d, form, 't2')
        return told, job_events(d, 'j')[-1]

    sides.both(story, ([refusal('exists')] * 2, 'S:null'))


# ---------------------------------------------------------------- 6.4: events

def data(offset, length=SIZE, speed=0, **more):
    return {'type': 'backup', 'device': 'j', 'len': length, 'offset': offset, 'speed': speed, **more}


MADE = ['S:created', 'S:running']
DONE = [*MADE, 'S:waiting', 'S:pending']
ERROR = {'device': 'j', 'operation': 'write'}


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('sync', ['full', 'top', 'incremental'])
def test_events_of_success(sides, sync, form):
    """An incremental one of an empty bitmap has nothing to copy, and the same path."""
    def story(d):
        disks(d)
        d.cmd('block-dirty-bitmap-add', node='d', name='b')
        start(d, form, sync=sync, **({'bitmap': 'b'} if sync == 'incremental' else {}))
        return job_events(d, 'j')

    n = 0 if sync == 'incremental' else SIZE
    sides.both(story, [*DONE, ('BLOCK_JOB_COMPLETED', data(n, n)), 'S:concluded', 'S:null'])


@pytest.mark.parametrize('form', FORMS)
def test_no_artificial_pauses(sides, form):
    """The reference shows a job paused and running again whenever its nodes are drained. Ours does not."""
    d = sides.ours
    disks(d)
    start(d, form)
    assert d.qmp.job_end('j') == [*DONE, 'BLOCK_JOB_COMPLETED', 'S:concluded', 'S:null']
    held(d, form)
    fill(d.add_disk('o', SIZE), SIZE)
    d.cmd('block-dirty-bitmap-add', node='d', name='b')
    d.cmd('job-cancel', id='j')
    assert d.qmp.job_end('j') == [*MADE, *CANCELLED]


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('family', ['job-', 'block-job-'])
def test_events_with_dismiss_by_hand(sides, family, form):
    def story(d):
        disks(d)
        start(d, form, auto_dismiss=False)
        before = job_events(d, 'j', 'concluded')
        row = job(d, 'j')
        d.cmd(family + 'dismiss', id='j')
        return before, row, job_events(d, 'j'), job(d, 'j')

    row = {'id': 'j', 'type': 'backup', 'status': 'concluded', 'current-progress': SIZE, 'total-progress': SIZE}
    sides.both(story, ([*DONE, ('BLOCK_JOB_COMPLETED', data(SIZE)), 'S:concluded'], row, ['S:null'], None))


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('family', ['job-', 'block-job-'])
def test_events_with_finalize_by_hand(sides, family, form):
    def story(d):
        disks(d)
        start(d, form, auto_finalize=False)
        pend = d.qmp.event('BLOCK_JOB_PENDING')['data']
        before = job_events(d, 'j', 'pending')
        d.cmd(family + 'finalize', id='j')
        return before, pend, job_events(d, 'j')

    sides.both(story, (DONE, {'type': 'backup', 'id': 'j'},
                       [('BLOCK_JOB_COMPLETED', data(SIZE)), 'S:concluded', 'S:null']))


def one_error(d, side, errno=5, once=True):
    """disks() where `side` fails once, in the third granule: names of source and target."""
    disks(d)
    faulty(d, 'bad', 'd' if side == 'source' else 't',
           {'iotype': 'read' if side == 'source' else 'write', 'sector': 2 * GRANULE // 512, 'errno': errno,
            'once': once})
    return ('bad', 't') if side == 'source' else ('d', 'bad')


def failing(d, form, side, policy, errno=5, **more):
    source, target = one_error(d, side, errno)
    args = backup_args(source, target, x_perf={**ONE_BY_ONE, 'use-copy-range': False}, **more)
    send(d, form, 'blockdev-backup', {**args, f'on-{side}-error': policy})


SIDES = ['source', 'target']
OPERATION = {'source': 'read', 'target': 'write'}


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('side', SIDES)
@pytest.mark.parametrize('policy,errno,text', [('report', 5, 'Input/output error'),
                                               ('report', 28, 'No space left on device'),
                                               ('enospc', 5, 'Input/output error'), ('auto', 5, 'Input/output error')])
def test_events_of_a_reported_error(sides, policy, errno, text, side, form):
    def story(d):
        failing(d, form, side, policy, errno)
        return job_events(d, 'j')

    error = {'device': 'j', 'operation': OPERATION[side], 'action': 'report'}
    sides.both(story, [*MADE, ('BLOCK_JOB_ERROR', error), 'S:aborting',
                       ('BLOCK_JOB_COMPLETED', data(2 * GRANULE, error=text)), 'S:concluded', 'S:null'])


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('side', SIDES)
@pytest.mark.parametrize('policy,errno,io_status', [('stop', 5, 'failed'), ('stop', 28, 'nospace'),
                                                    ('enospc', 28, 'nospace'), ('auto', 28, 'nospace')])
def test_events_of_an_error_that_stops(sides, policy, errno, io_status, side, form):
    """It shows why it stands; resume forgets the error and tries again."""
    def story(d):
        failing(d, form, side, policy, errno, auto_dismiss=False)
        error = d.qmp.event('BLOCK_JOB_ERROR')['data']
        wait_status(d, 'j', 'paused')
        row = block_job(d, 'j')
        d.cmd('block-job-resume', device='j')
        rest = job_events(d, 'j', 'concluded')
        after = block_job(d, 'j')
        return error, {k: row[k] for k in ('paused', 'io-status', 'offset', 'status')}, rest, after['io-status']

    error = {'device': 'j', 'operation': OPERATION[side], 'action': 'stop'}
    row = {'paused': True, 'io-status': io_status, 'offset': 2 * GRANULE, 'status': 'paused'}
    sides.both(story, (error, row, [*DONE, ('BLOCK_JOB_COMPLETED', data(SIZE)), 'S:concluded'], 'ok'))


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('side', SIDES)
def test_events_of_an_ignored_error(sides, side, form):
    """One event for each try; then it goes on, and the copy is whole."""
    def story(d):
        failing(d, form, side, 'ignore')
        return job_events(d, 'j'), same_files(d)

    error = {'device': 'j', 'operation': OPERATION[side], 'action': 'ignore'}
    sides.both(story, ([*MADE, ('BLOCK_JOB_ERROR', error), 'S:waiting', 'S:pending',
                        ('BLOCK_JOB_COMPLETED', data(SIZE)), 'S:concluded', 'S:null'], True))


def same_files(d):
    with open(d.path('d.raw'), 'rb') as a, open(d.path('t.raw'), 'rb') as b:
        return a.read() == b.read()


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('command', ['job-cancel', 'block-job-cancel'])
@pytest.mark.parametrize('state', ['running', 'pending'])
def test_events_of_a_cancelled_job(sides, state, command, form):
    """CANCELLED without an error; what query-jobs says until it is dismissed is one."""
    def story(d):
        disks(d)
        more = {'speed': 1} if state == 'running' else {'auto_finalize': False}
        start(d, form, auto_dismiss=False, **more)
        until(state, lambda: job(d, 'j')['status'] == state and job(d, 'j')['current-progress'])
        d.cmd(command, {'id' if command == 'job-cancel' else 'device': 'j'})
        path = [e for e in job_events(d, 'j', 'concluded') if e[0] != 'BLOCK_JOB_PENDING']
        return path, job(d, 'j')['error']

    begin, n, speed = (MADE, GRANULE, 1) if state == 'running' else (DONE, SIZE, 0)
    sides.both(story, ([*begin, 'S:aborting', ('BLOCK_JOB_CANCELLED', data(n, speed=speed)), 'S:concluded'],
                       'Operation canceled'))


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('bad', [{'speed': -1}, {'target': 'small'}, {'x-perf': {'max-workers': 0}}, {'job-id': '1j'}],
                         ids=['speed', 'sizes', 'workers', 'id'])
def test_events_of_a_job_that_never_starts(sides, bad, form):
    """No BLOCK_JOB_* event, and nothing to dismiss. On purpose ours sends no event at all: the job was never
    there for anybody else. The reference may show it created and null."""
    def story(d):
        disks(d)
        d.add_disk('small', SIZE // 2)
        args = {**backup_args('d', 't', auto_dismiss=False), **bad}
        outcome = attempt(d, form, 'blockdev-backup', args)
        told = [e['event'] for e in d.qmp.events], d.cmd('query-jobs')
        allowed = [] if d.kind == 'tidemarkd' else ['JOB_STATUS_CHANGE']
        return outcome[0], [e for e in told[0] if e not in allowed], told[1]

    sides.both(story, ('GenericError', [], []))


@pytest.mark.parametrize('mode', ['individual', 'grouped'])
def test_events_of_a_job_whose_list_fails(sides, mode):
    """The same, where a later action of the list fails."""
    def story(d):
        disks(d)
        good, bad = backup_args('d', 't', auto_dismiss=False), backup_args('zz', 't', job_id='k')
        with pytest.raises(QmpError) as e:
            d.cmd('transaction', {'actions': [{'type': 'blockdev-backup', 'data': a} for a in (good, bad)],
                                  'properties': {'completion-mode': mode}})
        path = [v['data']['status'] if v['event'] == 'JOB_STATUS_CHANGE' else v['event'] for v in d.qmp.events]
        assert d.kind == 'qsd' or path == []
        assert path in ([], ['created', 'null'], ['created', 'aborting', 'concluded', 'null'])
        return e.value.cls, d.cmd('query-jobs')

    sides.both(story, ('GenericError', []))
