# SPDX-License-Identifier: Apache-2.0
"""Lists of actions: each sees what the ones before it did, all or nothing stays, nobody sees between.

The laws L1 to L10 that the names below mention are those of docs/transactions.md.
"""
import itertools
import threading
import time

import nbd
import pytest

from harness import DEADLINE, GiB, KiB, MiB, QmpError

SIZE = 16 * MiB
G = 64 * KiB
BITMAP = 'block-dirty-bitmap-'


# ---------------------------------------------------------------- tools

def act(kind, /, **data):
    return {'type': kind, 'data': {k.replace('_', '-'): v for k, v in data.items()}}


def add(node, name, **more):
    return act(BITMAP + 'add', node=node, name=name, **more)


def remove(node, name):
    return act(BITMAP + 'remove', node=node, name=name)


def clear(node, name):
    return act(BITMAP + 'clear', node=node, name=name)


def enable(node, name):
    return act(BITMAP + 'enable', node=node, name=name)


def disable(node, name):
    return act(BITMAP + 'disable', node=node, name=name)


def merge(node, target, *bitmaps):
    return act(BITMAP + 'merge', node=node, target=target, bitmaps=list(bitmaps))


ABORT = act('abort')


def run(d, *actions, **properties):
    args = {'actions': list(actions)}
    if properties:
        args['properties'] = {k.replace('_', '-'): v for k, v in properties.items()}
    return d.cmd('transaction', args)


def fails(d, *actions, at=None, **properties):
    """The list fails at action `at`, and everything is as it was. The error."""
    before = dump(d)
    with pytest.raises(QmpError) as e:
        run(d, *actions, **properties)
    assert dump(d) == before
    assert e.value.cls == 'GenericError'
    if at is not None:
        assert e.value.data == {'action': at, 'kind': actions[at]['type'], 'phase': 'prepare', 'undone': True}
    return e.value


def dump(d):
    """All that a client can see, bits included."""
    nodes = d.cmd('query-named-block-nodes')
    for n in nodes:
        n['image'].pop('actual-size', None)
        for b in n.get('dirty-bitmaps', []):
            b['sha256'] = d.sha256(n['node-name'], b['name'])
    return nodes, d.cmd('query-block-exports'), d.cmd('query-jobs')


def write(d, offset, length=1, name='d'):
    h = nbd.NBD()
    h.connect_uri(d.uri(name))
    h.pwrite(b'\x5a' * length, offset)
    h.shutdown()


@pytest.fixture
def pair(tide):
    """Nodes d and e; d has p (recording), q (not), both with bits; e has r; `held` is busy."""
    for node in ('d', 'e'):
        tide.add_disk(node, SIZE)
        tide.export(node)
    tide.cmd(BITMAP + 'add', node='d', name='q')
    tide.cmd(BITMAP + 'add', node='e', name='r', granularity=4096)
    write(tide, 0)
    write(tide, 2 * G, name='e')
    tide.cmd(BITMAP + 'disable', node='d', name='q')
    tide.cmd(BITMAP + 'add', node='d', name='p')
    write(tide, G)
    tide.cmd(BITMAP + 'add', node='d', name='held', disabled=True)
    tide.export('d', 'hold', writable=False, bitmaps=['held'])
    return tide


# ---------------------------------------------------------------- the command

@pytest.mark.parametrize('mode', [{}, {'completion_mode': 'individual'}, {'completion_mode': 'grouped'}])
def test_empty_list_succeeds(tide, mode):
    assert run(tide, **mode) == {}
    assert tide.cmd('transaction', actions=[], properties={}) == {}


def test_abort_alone(pair):
    for mode in ({}, {'completion_mode': 'grouped'}):
        assert 'abort' in fails(pair, ABORT, at=0, **mode).desc


@pytest.mark.parametrize('mode', [{}, {'completion_mode': 'grouped'}])
def test_any_kind_may_stand_in_a_grouped_list(pair, mode):
    run(pair, add('d', 'n'), merge('d', 'n', 'p', 'q', {'node': 'e', 'name': 'r'}), disable('d', 'n'), clear('d', 'p'),
        enable('d', 'q'), remove('e', 'r'), **mode)
    assert pair.ranges('d', 'n') == [(0, 3 * G)] and pair.bitmap('d', 'n')['recording'] is False
    assert pair.ranges('d', 'p') == [] and pair.bitmap('d', 'q')['recording'] is True
    assert pair.bitmap('e', 'r') is None


@pytest.mark.parametrize('actions', [
    None, {}, 'x', [None], [{}], [{'type': 'abort'}], [{'type': 'nosuch', 'data': {}}], [{'data': {}}],
    [{'type': 'abort', 'data': {}, 'x': 1}], [{'type': 'abort', 'data': []}], [{'type': 'block_resize', 'data': {}}],
    [add('d', 'n'), {'type': 'abort', 'data': {'x': 1}}], [add('d', 'n'), add('d', 'm', granularity='x')],
    [add('d', 'n'), {'type': 'quit', 'data': {}}]])
def test_a_list_that_does_not_parse_does_nothing(pair, actions):
    before = dump(pair)
    with pytest.raises(QmpError) as e:
        pair.cmd('transaction', {'actions': actions})
    assert e.value.data is None and dump(pair) == before


def test_long_list(tide):
    tide.add_file('f', MiB)
    n = 2000
    run(tide, *[add('f', f'b{i}') for i in range(n // 2)], *[remove('f', f'b{i}') for i in range(n // 2)])
    assert 'dirty-bitmaps' not in tide.node('f')
    fails(tide, *[add('f', f'b{i}') for i in range(n)], ABORT, at=n)


# ---------------------------------------------------------------- L1: each sees the ones before

def test_later_actions_see_earlier_ones(pair):
    run(pair, add('d', 'c'), merge('d', 'c', 'p'), disable('d', 'p'))
    assert pair.ranges('d', 'c') == [(G, G)] and pair.bitmap('d', 'p')['recording'] is False
    fails(pair, remove('d', 'p'), merge('d', 'c', 'p'), at=1)
    fails(pair, add('d', 'n'), add('d', 'n'), at=1)
    fails(pair, remove('d', 'p'), remove('d', 'p'), at=1)
    fails(pair, remove('d', 'p'), clear('d', 'p'), at=1)


def test_order_of_clear_and_merge_matters(pair):
    run(pair, merge('d', 'p', 'q'), clear('d', 'q'))
    assert pair.ranges('d', 'p') == [(0, 2 * G)] and pair.ranges('d', 'q') == []
    run(pair, clear('d', 'p'), merge('d', 'q', 'p'))
    assert pair.ranges('d', 'p') == pair.ranges('d', 'q') == []


def test_remove_then_add_makes_a_new_one(pair):
    run(pair, remove('d', 'p'), add('d', 'p', granularity=4096))
    b = pair.bitmap('d', 'p')
    assert (b['granularity'], b['count']) == (4096, 0)
    assert pair.node('d')['dirty-bitmaps'][0]['name'] == 'p', 'the newest'
    run(pair, *[x for _ in range(50) for x in (remove('d', 'p'), add('d', 'p'))])
    fails(pair, remove('d', 'p'), add('d', 'p', granularity=512), ABORT, at=2)


def test_add_then_remove_leaves_nothing(pair):
    before = dump(pair)
    run(pair, add('d', 'z'), remove('d', 'z'))
    assert dump(pair) == before
    run(pair, add('d', 'z'), merge('d', 'z', 'p'), clear('d', 'z'), disable('d', 'z'), enable('d', 'z'), remove('d', 'z'))
    assert dump(pair) == before
    fails(pair, add('d', 'z'), merge('d', 'z', 'p'), remove('d', 'z'), ABORT, at=3)


def test_contents_changed_and_removed_in_one_list(pair):
    """What clear and merge kept for an undo outlives the bitmap that they changed."""
    for i in range(20):
        run(pair, add('d', f'x{i}'), merge('d', f'x{i}', 'p', 'q'), clear('d', f'x{i}'), merge('d', f'x{i}', 'q'),
            remove('d', f'x{i}'), clear('d', 'p'), merge('d', 'p', 'q'))
    run(pair, clear('d', 'p'), remove('d', 'p'), merge('d', 'q', {'node': 'e', 'name': 'r'}), remove('d', 'q'))
    assert [b['name'] for b in pair.node('d')['dirty-bitmaps']] == ['held']


def test_merge_moves_between_nodes_in_one_list(pair):
    run(pair, add('e', 't'), merge('e', 't', {'node': 'd', 'name': 'p'}, {'node': 'd', 'name': 'q'}, 'r'),
        merge('d', 'p', {'node': 'e', 'name': 't'}), remove('e', 't'))
    assert pair.ranges('d', 'p') == [(0, 3 * G)] and pair.bitmap('e', 't') is None


# ---------------------------------------------------------------- what the reference does wrong

def test_enable_of_a_missing_bitmap(pair):
    for a in (enable('d', 'zz'), enable('zz', 'p'), disable('d', 'zz'), act('x-block-dirty-bitmap-enable', node='d', name='zz')):
        fails(pair, a, at=0)
        fails(pair, disable('d', 'p'), a, at=1)


def test_failed_enable_switches_nothing_off(pair):
    pair.cmd(BITMAP + 'add', node='d', name='rec')
    pair.export('d', 'hold2', bitmaps=['rec'])  # a writable export may carry a recording bitmap
    assert pair.bitmap('d', 'rec')['recording'] is True
    fails(pair, enable('d', 'rec'), at=0)
    fails(pair, enable('d', 'q'), enable('d', 'rec'), at=1)
    assert pair.bitmap('d', 'rec')['recording'] is True


def test_enable_that_changes_nothing_is_undone_to_nothing(pair):
    fails(pair, enable('d', 'p'), ABORT, at=1)
    assert pair.bitmap('d', 'p')['recording'] is True
    fails(pair, disable('d', 'q'), ABORT, at=1)
    fails(pair, disable('d', 'p'), enable('d', 'p'), disable('d', 'p'), ABORT, at=3)


def test_merge_of_nothing(pair):
    before = dump(pair)
    run(pair, merge('d', 'p'))
    run(pair, merge('d', 'q'), merge('e', 'r'))
    assert dump(pair) == before
    fails(pair, merge('d', 'zz'), at=0)
    fails(pair, merge('d', 'held'), at=0)
    fails(pair, merge('d', 'p'), ABORT, at=1)


def test_missing_merge_source_is_an_error(pair):
    """Alone and in a list, by every name of the action."""
    for a in (merge('d', 'p', 'zz'), merge('d', 'p', 'q', {'node': 'e', 'name': 'zz'}),
              act('x-block-dirty-bitmap-merge', node='d', **{'dst_name': 'p', 'src_name': 'zz'})):
        a['data'] = {k.replace('dst-name', 'dst_name').replace('src-name', 'src_name'): v for k, v in a['data'].items()}
        assert "'zz'" in fails(pair, a, at=0).desc
        fails(pair, clear('d', 'p'), a, at=1)
        with pytest.raises(QmpError, match="'zz'"):
            pair.cmd(a['type'], a['data'])


# ---------------------------------------------------------------- L2, L3: undone in reverse, exactly

KINDS = [add('d', 'n'), add('e', 'p'), remove('d', 'p'), remove('d', 'q'), remove('e', 'r'), add('d', 'p'),
         clear('d', 'p'), clear('e', 'r'), enable('d', 'q'), disable('d', 'p'), merge('d', 'p', 'q'),
         merge('d', 'q', 'p', {'node': 'e', 'name': 'r'}), merge('d', 'n', 'p'), clear('d', 'n'), remove('d', 'n')]


@pytest.mark.parametrize('first', KINDS, ids=[f"{i}-{k['type'][19:]}" for i, k in enumerate(KINDS)])
def test_every_pair_and_triple_then_abort(pair, first):
    """Also where an action of the list fails by itself: the state is that before, to the bit."""
    before = dump(pair)
    for rest in itertools.chain(([a] for a in KINDS), itertools.product(KINDS, repeat=2)):
        actions = [first, *rest, ABORT]
        with pytest.raises(QmpError) as e:
            run(pair, *actions)
        at = e.value.data['action']
        assert e.value.data == {'action': at, 'kind': actions[at]['type'], 'phase': 'prepare', 'undone': True}
        assert dump(pair) == before, actions
    write(pair, 5 * G)  # and recording goes on where it was on
    assert pair.ranges('d', 'p') == [(G, G), (5 * G, G)] and pair.ranges('d', 'q') == [(0, G)]


BAD = [add('d', 'p'), add('d', ''), add('d', 'x' * 1024), add('d', 'm', granularity=513), add('zz', 'm'),
       add('d', 'm', persistent=True), remove('d', 'zz'), remove('d', 'held'), clear('d', 'held'), enable('d', 'held'),
       disable('d', 'held'), merge('d', 'held', 'p'), merge('d', 'q', 'held'), merge('d', 'q', 'p', 'zz'), ABORT,
       act('blockdev-backup', device='d', target='zz', sync='full', job_id='j'),
       act('blockdev-backup', device='d', target='t', sync='incremental', bitmap='held', job_id='j'),
       act('blockdev-backup', device='d', target='t', sync='full', job_id='1j')]


@pytest.mark.parametrize('bad', BAD, ids=[f"{i}-{b['type']}" for i, b in enumerate(BAD)])
def test_failing_action_in_each_position(pair, bad):
    pair.add_disk('t', SIZE)
    good = [add('d', 'n'), merge('d', 'n', 'p', 'q'), disable('d', 'p'), clear('e', 'r'),
            act('blockdev-backup', device='e', target='t', sync='full', job_id='jj'), enable('d', 'q')]
    for at in range(len(good) + 1):
        assert fails(pair, *good[:at], bad, *good[at:], at=at).desc
    assert pair.qmp.events == [], 'no event of a list that failed'


def test_error_class_and_text_are_those_of_the_plain_command(pair):
    for bad in BAD:
        if bad is not ABORT:
            with pytest.raises(QmpError) as plain:
                pair.cmd(bad['type'], bad['data'])
            assert plain.value.data is None
            assert fails(pair, disable('d', 'q'), bad, at=1).desc == plain.value.desc


# ---------------------------------------------------------------- jobs in lists

def backup(bitmap=None, job='j', device='d', target='t', **more):
    if bitmap:
        more = {'sync': 'incremental', 'bitmap': bitmap, **more}
    return act('blockdev-backup', job_id=job, device=device, target=target, **{'sync': 'full', **more})


@pytest.fixture
def targets(pair):
    for t in ('t', 't2'):
        pair.add_disk(t, SIZE)
    return pair


def test_job_owns_its_bitmap_from_its_place_on(targets):
    for a in (clear('d', 'p'), disable('d', 'p'), enable('d', 'p'), remove('d', 'p'), merge('d', 'p', 'q'),
              merge('d', 'q', 'p'), backup('p', 'j2', target='t2')):
        assert "'p'" in fails(targets, backup('p'), a, at=1).desc
    assert targets.qmp.events == []


def test_cleared_bitmap_gives_an_empty_backup(targets):
    run(targets, clear('d', 'p'), backup('p', auto_dismiss=False))
    targets.qmp.event('JOB_STATUS_CHANGE', status='concluded')
    job = targets.cmd('query-jobs')[0]
    assert (job['current-progress'], job['total-progress']) == (0, 0) and 'error' not in job
    targets.cmd('job-dismiss', id='j')


def test_bitmap_added_with_a_backup_sees_what_the_backup_does_not(targets):
    run(targets, add('d', 'next'), remove('d', 'p'), backup(auto_finalize=False))
    write(targets, 9 * G)
    targets.qmp.event('JOB_STATUS_CHANGE', status='pending')
    assert targets.ranges('d', 'next') == [(9 * G, G)]
    targets.cmd('job-finalize', id='j')
    targets.qmp.job_end('j')
    with open(targets.path('t.raw'), 'rb') as f:
        f.seek(9 * G)
        assert f.read(1) == b'\0'


def test_job_ids_and_targets_of_one_list(targets):
    fails(targets, backup(), backup(target='t2'), at=1)
    fails(targets, backup(), backup(job='j2'), at=1)
    fails(targets, backup('p'), backup('p', 'j2', target='t2'), at=1)
    fails(targets, backup('p'), ABORT, at=1)
    fails(targets, backup('p'), ABORT, at=1, completion_mode='grouped')
    run(targets, backup('p'), backup(job='j2', target='t2', device='e'))
    for j in ('j', 'j2'):
        targets.qmp.job_end(j)
    assert targets.ranges('d', 'p') == []


def test_jobs_start_in_list_order(targets):
    run(targets, backup(job='zz'), backup(job='aa', device='e', target='t2'))
    for j in ('zz', 'aa'):
        targets.qmp.job_end(j)
    # job_end keeps what belongs to others, in order: ask the log of all events instead
    run(targets, backup(job='zz', auto_finalize=False), backup(job='aa', device='e', target='t2', auto_finalize=False))
    seen = []
    while len(seen) < 2:
        e = targets.qmp.read() if not targets.qmp.events else targets.qmp.events.pop(0)
        if e['event'] == 'JOB_STATUS_CHANGE' and e['data']['status'] == 'created':
            seen.append(e['data']['id'])
    assert seen == ['zz', 'aa']
    for j in seen:
        targets.qmp.event('JOB_STATUS_CHANGE', id=j, status='pending')
        targets.cmd('job-finalize', id=j)
        targets.qmp.job_end(j)


# ---------------------------------------------------------------- L5: nobody sees between

class Writer(threading.Thread):
    """Writes every granule of 4 KiB once, in rising order, several at a time; stops when told."""

    def __init__(self, uri, depth=8):
        super().__init__(daemon=True)
        self.uri, self.depth, self.stop, self.done, self.error = uri, depth, threading.Event(), 0, None

    def run(self):
        try:
            h = nbd.NBD()
            h.connect_uri(self.uri)
            data = nbd.Buffer.from_bytearray(bytearray(4096))
            while not self.stop.is_set():
                while h.aio_in_flight() < self.depth:
                    h.aio_pwrite(data, self.done * 4096)
                    self.done += 1
                h.poll(-1)
            while h.aio_in_flight():
                h.poll(-1)
            h.shutdown()
        except BaseException as e:
            self.error = e


@pytest.fixture
def written(tide):
    """A large disk and a writer at work on it."""
    tide.cmd('blockdev-add', driver='null-co', node_name='d', size=64 * GiB)
    tide.export('d')
    tide.cmd(BITMAP + 'add', node='d', name='all', granularity=4096)
    w = Writer(tide.uri('d'))
    w.start()
    yield tide, w
    w.stop.set()
    w.join(DEADLINE)


def finish(w):
    w.stop.set()
    w.join(DEADLINE)
    assert w.error is None


def test_each_write_is_in_exactly_one_bitmap(written):
    """[disable the old one, add a new one], again and again: no write falls between."""
    d, w = written
    d.cmd(BITMAP + 'add', node='d', name='b0', granularity=4096)
    since = w.done
    n = 150
    for i in range(n):
        run(d, disable('d', f'b{i}'), add('d', f'b{i + 1}', granularity=4096), add('d', 'x'), remove('d', 'x'))
    finish(w)
    assert w.done > since + n
    assert d.ranges('d', 'all') == [(0, w.done * 4096)]
    rows = {b['name']: b['count'] for b in d.node('d')['dirty-bitmaps']}
    first = min(d.ranges('d', 'b0') or [(0, 0)])[0]
    total = sum(c for name, c in rows.items() if name != 'all')
    d.cmd(BITMAP + 'add', node='d', name='sum', granularity=4096, disabled=True)
    d.cmd(BITMAP + 'merge', node='d', target='sum', bitmaps=[f'b{i}' for i in range(n + 1)])
    assert d.bitmap('d', 'sum')['count'] == total, 'none is in two'
    assert d.ranges('d', 'sum')[-1] == (d.ranges('d', 'sum')[0][0], w.done * 4096 - d.ranges('d', 'sum')[0][0])
    assert first <= since * 4096 + 16 * 4096


def test_aborted_lists_lose_no_write(written):
    """[clear, ..., abort] again and again beside writes: nothing is missing afterwards."""
    d, w = written
    for i in range(150):
        with pytest.raises(QmpError):
            run(d, clear('d', 'all'), disable('d', 'all'), remove('d', 'all'), add('d', 'all'), ABORT)
    finish(w)
    assert d.ranges('d', 'all') == [(0, w.done * 4096)]


def test_queries_never_see_half_a_list(pair):
    stop, failures = threading.Event(), []

    def look():
        try:
            c = pair.client()
            while not stop.is_set():
                rows = [n for n in c.cmd('query-named-block-nodes') if n['node-name'] == 'd'][0]['dirty-bitmaps']
                names = {b['name'] for b in rows}
                assert ('u' in names) == ('v' in names) and 'never' not in names
                assert len({b['recording'] for b in rows if b['name'] in 'uv'}) <= 1
            c.close()
        except BaseException as e:
            failures.append(e)
    threads = [threading.Thread(target=look) for _ in range(2)]
    for t in threads:
        t.start()
    try:
        for _ in range(100):
            run(pair, add('d', 'u'), add('d', 'v'))
            run(pair, disable('d', 'u'), disable('d', 'v'))
            with pytest.raises(QmpError):
                run(pair, add('d', 'never'), enable('d', 'u'), remove('d', 'v'), ABORT)
            run(pair, remove('d', 'v'), remove('d', 'u'))
    finally:
        stop.set()
        for t in threads:
            t.join(DEADLINE)
    assert failures == []


def test_lists_of_several_clients_do_not_mix(tide):
    tide.add_file('f', MiB)
    failures = []

    def work(k):
        try:
            c = tide.client()
            for i in range(50):
                c.cmd('transaction', actions=[add('f', 'shared'), add('f', f'c{k}'), remove('f', 'shared')])
                with pytest.raises(QmpError, match='abort'):
                    c.cmd('transaction', actions=[remove('f', f'c{k}'), add('f', 'shared'), ABORT])
                c.cmd('transaction', actions=[add('f', 'shared'), remove('f', f'c{k}'), remove('f', 'shared')])
            c.close()
        except BaseException as e:
            failures.append(e)
    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(DEADLINE)
    assert failures == [] and 'dirty-bitmaps' not in tide.node('f')


def test_list_waits_for_writes_under_way(tide):
    """A bitmap added while a write is in flight does not miss it half: it is before or after."""
    tide.cmd('blockdev-add', driver='null-co', node_name='d', size=GiB, latency_ns=300000000)
    tide.export('d')
    h = nbd.NBD()
    h.connect_uri(tide.uri('d'))
    tide.cmd(BITMAP + 'add', node='d', name='before')
    cookie = h.aio_pwrite(bytearray(512), 0)
    until_marked(tide, h, 'd', 'before')
    run(tide, disable('d', 'before'), add('d', 'after'))
    completed = tide.ranges('d', 'before'), tide.ranges('d', 'after')
    finish_command(h, cookie)
    assert completed == ([(0, G)], [])
    h.shutdown()


def until_marked(d, h, node, bitmap):
    """The write is on its way to the disk: its mark is set."""
    deadline = time.monotonic() + DEADLINE
    while not d.ranges(node, bitmap):
        h.poll(0)
        assert time.monotonic() < deadline


def finish_command(h, cookie):
    deadline = time.monotonic() + DEADLINE
    while not h.aio_command_completed(cookie):
        h.poll(100)
        assert time.monotonic() < deadline


def test_disk_that_does_not_come_to_rest(tide):
    """After the limit the list fails, says where it hangs, and writes go on."""
    tide.cmd('blockdev-add', driver='null-co', node_name='slow', size=GiB, latency_ns=8000000000)
    tide.export('slow')
    tide.cmd(BITMAP + 'add', node='slow', name='b')
    h = nbd.NBD()
    h.connect_uri(tide.uri('slow'))
    cookie = h.aio_pwrite(bytearray(512), 0)
    until_marked(tide, h, 'slow', 'b')
    with pytest.raises(QmpError) as e:
        run(tide, disable('slow', 'b'), clear('slow', 'b'))
    assert "'slow'" in e.value.desc and 'flight' in e.value.desc
    last = tide.cmd('query-transactions')[0]
    assert last['outcome'] == 'failed' and 2900000000 < last['held-ns'] <= last['took-ns']
    assert tide.ranges('slow', 'b') == [(0, G)] and tide.bitmap('slow', 'b')['recording'] is True
    finish_command(h, cookie)
    run(tide, disable('slow', 'b'), clear('slow', 'b'))
    assert tide.ranges('slow', 'b') == []
    h.shutdown()
