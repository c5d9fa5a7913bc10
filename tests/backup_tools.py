# SPDX-License-Identifier: Apache-2.0
"""What tests of jobs and backups share: disks with contents, jobs held in the middle, event paths.

A job with speed=1 copies one unit and then waits for days: that is how tests stop it in the middle.
With max-workers=1 and max-chunk=64 KiB the unit is one granule, and the order is that of the disk.
"""
import contextlib
import functools
import random
import time

from harness import DEADLINE, KiB, QmpError

GRANULE = 64 * KiB
ONE_BY_ONE = {'max-workers': 1, 'max-chunk': GRANULE}

# Contract 6.1: what may follow what.
NEXT = {
    None: {'created'},
    'created': {'running', 'aborting', 'null'},
    'running': {'paused', 'ready', 'waiting', 'aborting'},
    'paused': {'running'},
    'ready': {'standby', 'waiting', 'aborting'},
    'standby': {'ready'},
    'waiting': {'pending', 'aborting'},
    'pending': {'aborting', 'concluded'},
    'aborting': {'concluded'},
    'concluded': {'null'},
}
OK = ['S:created', 'S:running', 'S:waiting', 'S:pending', 'BLOCK_JOB_COMPLETED', 'S:concluded',
      'S:null']
CANCELLED = ['S:created', 'S:running', 'S:aborting', 'BLOCK_JOB_CANCELLED', 'S:concluded', 'S:null']


def path_is_legal(events):
    state = None
    for e in events:
        if e.startswith('S:'):
            if e[2:] not in NEXT[state]:
                return False
            state = e[2:]
    return True


def without_pauses(events):
    """The path without pairs of paused and running, which a drain may insert."""
    out = []
    for e in events:
        if e == 'S:running' and out and out[-1] == 'S:paused':
            out.pop()
        elif out[-1:] != [e] or not str(e).startswith('S:'):
            out.append(e)
    return out


def end_of(d, job):
    """Wait for the job's last event; its path, checked against the table."""
    events = d.qmp.job_end(job)
    assert path_is_legal(events), events
    return without_pauses(events)


def until(what, condition, seconds=DEADLINE):
    """Poll for a condition that no event announces."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f'in vain: {what}'
        time.sleep(0.005)


@functools.lru_cache(4)
def random_bytes(size, seed):
    return random.Random(seed).randbytes(size)


def fill(path, size, seed=1, offset=0):
    """Random bytes without a zero granule."""
    with open(path, 'r+b') as f:
        f.seek(offset)
        f.write(random_bytes(size, seed))


def content(path):
    with open(path, 'rb') as f:
        return f.read()


def first_difference(a, b, step=GRANULE):
    if len(a) != len(b):
        return f'lengths {len(a)} and {len(b)}'
    for i in range(0, len(a), step):
        if a[i:i + step] != b[i:i + step]:
            return next(i + k for k in range(step) if a[i + k] != b[i + k])
    return None


def assert_same(a, b):
    """Two files (or bytes) are equal; a failure names the first byte that differs."""
    a, b = (x if isinstance(x, bytes) else content(x) for x in (a, b))
    assert first_difference(a, b) is None, f'differ at {first_difference(a, b)}'


def job(d, name):
    return next((j for j in d.cmd('query-jobs') if j['id'] == name), None)


def block_job(d, name):
    return next((j for j in d.cmd('query-block-jobs') if j['device'] == name), None)


def wait_status(d, name, status):
    until(f'{name} {status}', lambda: job(d, name)['status'] == status)


def wait_copied(d, name, n_bytes):
    until(f'{name} has copied {n_bytes}', lambda: job(d, name)['current-progress'] >= n_bytes)
    assert job(d, name)['current-progress'] == n_bytes


def backup(d, source, target, sync='full', **kw):
    d.cmd('blockdev-backup', backup_args(source, target, sync, **kw))


def backup_args(source, target, sync='full', **kw):
    args = {'job-id': 'j', 'device': source, 'target': target, 'sync': sync}
    args.update({k.replace('_', '-'): v for k, v in kw.items()})
    return args


def held(d, source, target, sync='full', copied=GRANULE, **kw):
    """Start a job one granule at a time and stop it after the first (or after `copied` bytes)."""
    kw.setdefault('x_perf', ONE_BY_ONE)
    backup(d, source, target, sync, speed=1, **kw)
    wait_copied(d, kw.get('job_id', 'j'), copied)


def release(d, name='j'):
    d.cmd('block-job-set-speed', device=name, speed=0)


def transaction(d, *actions, grouped=False):
    args = {'actions': [{'type': t, 'data': data} for t, data in actions]}
    if grouped:
        args['properties'] = {'completion-mode': 'grouped'}
    d.cmd('transaction', args)


def again_after_a_rest(run_list, tries=4):
    """What run_list() returns. Guests write to a real disk, and a list waits 3 s for it: it may want another try."""
    for last in [False] * (tries - 1) + [True]:
        try:
            return run_list()
        except QmpError as e:
            if last or 'did not come to rest' not in e.desc:
                raise


def faulty(d, node, image, *rules):
    """A blkdebug node over `image`; each rule is a dict of inject-error members."""
    d.cmd('blockdev-add', {'driver': 'blkdebug', 'node-name': node, 'image': image,
                           'inject-error': [{'event': 'none', **r} for r in rules]})


@contextlib.contextmanager
def refused(*words, cls='GenericError'):
    """The body's command fails with this class and a text with these words."""
    try:
        yield
    except QmpError as e:
        assert e.cls == cls, (e.cls, e.desc)
        for w in words:
            assert w in e.desc, e.desc
    else:
        raise AssertionError(f'accepted; expected an error about {words}')


def connect(uri):
    """A libnbd handle with metadata contexts allowed; the caller may add more before connecting."""
    import nbd
    h = nbd.NBD()
    h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    h.connect_uri(uri)
    return h
