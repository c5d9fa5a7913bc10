# SPDX-License-Identifier: Apache-2.0
"""What a transaction tells beyond yes or no: id, dry-run, explain, query-transactions, error data."""
import os
import threading
import time

import nbd
import pytest

from harness import KiB, MiB, Daemon, Qmp, QmpError

BITMAP = 'block-dirty-bitmap-'


@pytest.fixture
def d():
    with Daemon() as daemon:
        daemon.add_disk('d0', 4 * MiB)
        daemon.add_disk('d1', 4 * MiB)
        yield daemon


def act(kind, **data):
    return {'type': BITMAP + kind, 'data': {k.replace('_', '-'): v for k, v in data.items()}}


def txn(daemon, actions, **properties):
    return daemon.cmd('transaction', actions=actions,
                      properties={k.replace('_', '-'): v for k, v in properties.items()})


def bitmaps(daemon, node):
    return daemon.node(node).get('dirty-bitmaps', [])


def write(daemon, export, offset, length):
    h = nbd.NBD()
    h.connect_uri(daemon.uri(export))
    h.pwrite(b'\x5a' * length, offset)
    h.shutdown()


def names(daemon, node='d0'):
    return [b['name'] for b in bitmaps(daemon, node)]


# ---------------------------------------------------------------- id

def test_the_same_id_and_list_again_runs_nothing(d):
    add = [act('add', node='d0', name='b')]
    assert txn(d, add, id='one') == {'id': 'one', 'outcome': 'committed'}
    d.cmd(BITMAP + 'remove', node='d0', name='b')
    assert txn(d, add, id='one') == {'id': 'one', 'outcome': 'replayed'}
    assert names(d) == []


def test_the_order_of_members_does_not_make_another_list(d):
    a = {'actions': [{'type': BITMAP + 'add', 'data': {'node': 'd0', 'name': 'b'}}], 'properties': {'id': 'x'}}
    b = {'properties': {'id': 'x'}, 'actions': [{'data': {'name': 'b', 'node': 'd0'}, 'type': BITMAP + 'add'}]}
    d.cmd('transaction', a)
    assert d.cmd('transaction', b)['outcome'] == 'replayed'


@pytest.mark.parametrize('other', [
    {'actions': [act('add', node='d0', name='c')]},
    {'actions': [act('add', node='d0', name='b'), act('clear', node='d0', name='b')]},
    {'actions': [act('add', node='d0', name='b')], 'completion_mode': 'grouped'}])
def test_another_list_under_a_known_id_is_refused_and_not_run(d, other):
    txn(d, [act('add', node='d0', name='b')], id='one')
    d.cmd(BITMAP + 'remove', node='d0', name='b')
    with pytest.raises(QmpError, match="transaction 'one' was another list"):
        txn(d, **other, id='one')
    assert names(d) == []


def test_a_failure_is_remembered_too(d):
    remove = [act('add', node='d1', name='x'), act('remove', node='d0', name='b')]
    first = pytest.raises(QmpError, txn, d, remove, id='two').value
    d.cmd(BITMAP + 'add', node='d0', name='b')
    again = pytest.raises(QmpError, txn, d, remove, id='two').value
    assert again.desc == first.desc
    assert again.data == {**first.data, 'replayed': True}
    assert names(d) == ['b'] and names(d, 'd1') == []


MISSING = {'type': 'blockdev-add', 'data': {'driver': 'file', 'node-name': 'n', 'filename': 'not-there'}}
D1_FILE = {'driver': 'file', 'node-name': 'd1-file', 'filename': 'not-there'}
GONE = [{'type': 'blockdev-del', 'data': {'node-name': 'd1'}},
        {'type': 'blockdev-add', 'data': {'driver': 'raw', 'node-name': 'd1', 'file': D1_FILE}}]


@pytest.mark.parametrize('actions, phase', [
    ([MISSING], 'stage'), ([act('add', node='d0', name='b'), MISSING], 'stage'), (GONE, 'prepare')],
    ids=['alone', 'after another', 'opened when its turn comes'])
def test_the_phase_tells_whether_guests_were_held(d, actions, phase):
    """A file that cannot be opened is found out before, unless the list itself makes room for its node. The
    same when it is told again under an id."""
    data = {'action': len(actions) - 1, 'kind': 'blockdev-add', 'phase': phase, 'undone': True}
    first = pytest.raises(QmpError, txn, d, actions).value
    assert first.data == data and 'not-there' in first.desc
    for more in ({}, {'replayed': True}):
        e = pytest.raises(QmpError, txn, d, actions, id='x').value
        assert (e.data, e.desc) == ({**data, **more}, first.desc)
    assert names(d) == [] and [n['node-name'] for n in d.cmd('query-named-block-nodes')] == [
        'd1', 'd1-file', 'd0', 'd0-file']


def told(client, actions, name):
    """'committed', 'failed' or 'replayed', the latter with what it was."""
    try:
        return txn(client, actions, id=name)['outcome']
    except QmpError as e:
        assert e.data['kind'] == 'abort', e.data
        return 'replayed' if e.data.get('replayed') else 'failed'


@pytest.mark.parametrize('end, first', [([], 'committed'), ([{'type': 'abort', 'data': {}}], 'failed')],
                         ids=['done', 'failed'])
def test_one_of_those_who_send_one_id_at_once_runs_it(d, end, first):
    """Opening the file lets the others in before there is an outcome; the list could be run by each."""
    actions = [{'type': 'blockdev-add', 'data': {'driver': 'file', 'node-name': 'n', 'filename': 'd0.raw'}},
               {'type': 'blockdev-del', 'data': {'node-name': 'n'}}, *end]
    for turn in range(30):
        clients = [Qmp(d.qmp_path) for _ in range(2 + turn % 3)]
        start, outcomes = threading.Barrier(len(clients)), []

        def send(client, start=start, outcomes=outcomes, name=f'turn{turn}'):
            start.wait()
            outcomes.append(told(client, actions, name))
        threads = [threading.Thread(target=send, args=(c,)) for c in clients]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        for c in clients:
            c.close()
        assert sorted(outcomes) == sorted([first] + ['replayed'] * (len(clients) - 1))
        logged = [t['outcome'] for t in d.cmd('query-transactions') if t.get('id') == f'turn{turn}']
        assert sorted(logged) == sorted(outcomes)


def test_the_last_1024_outcomes_are_known(d):
    for i in range(1025):
        txn(d, [], id=f'n{i}')
    assert txn(d, [], id='n1')['outcome'] == 'replayed'
    assert txn(d, [], id='n0')['outcome'] == 'committed'


@pytest.mark.parametrize('properties, why', [
    ({'id': ''}, "'id' is empty"), ({'id': 'x' * 256}, 'longer than 255 bytes'),
    ({'id': 'x' + '\u00fc' * 150}, "\u00fc...' is longer than 255 bytes"),
    ({'id': 'x', 'dry_run': True}, "'dry-run' changes nothing"),
    ({'id': 'x', 'explain': True}, "'explain' changes nothing"),
    ({'dry_run': True, 'explain': True}, 'exclude each other')])
def test_properties_that_make_no_sense(d, properties, why):
    with pytest.raises(QmpError, match=why):
        txn(d, [], **properties)


def test_an_id_outlives_the_client_that_lost_its_answer(d):
    q = Qmp(d.qmp_path)
    q.send({'execute': 'transaction', 'arguments': {'actions': [act('add', node='d0', name='b')],
                                                    'properties': {'id': 'lost'}}})
    q.sock.close()
    answer = txn(d, [act('add', node='d0', name='b')], id='lost')
    assert answer['id'] == 'lost' and names(d) == ['b']


# ---------------------------------------------------------------- dry-run

def dump(daemon):
    return (daemon.cmd('query-named-block-nodes'), daemon.cmd('query-jobs'), daemon.cmd('query-block-exports'),
            [daemon.sha256(n, b['name']) for n in ('d0', 'd1') for b in bitmaps(daemon, n)])


def test_a_dry_run_says_what_each_action_sees_and_does_and_changes_nothing(d):
    d.cmd(BITMAP + 'add', node='d0', name='a')
    d.export('d0')
    write(d, 'd0', 0, 64 * KiB)
    before = dump(d)
    got = txn(d, [act('add', node='d0', name='b', disabled=True),
                  act('merge', node='d0', target='b', bitmaps=['a']),
                  {'type': 'blockdev-backup', 'data': {'job-id': 'j', 'device': 'd0', 'target': 'd1', 'bitmap': 'b',
                                                       'sync': 'incremental'}},
                  act('clear', node='d0', name='a')], dry_run=True)
    assert got['outcome'] == 'would-commit'
    rows = got['actions']
    assert [r['outcome'] for r in rows] == ['exercised'] * 4
    assert [r['action'] for r in rows] == [0, 1, 2, 3]
    assert "bitmap 'b' on node 'd0'" in rows[0]['does']
    assert ': 0 dirty bytes' in rows[1]['sees'] and rows[1]['does'] == '65536 dirty bytes'
    assert '65536 dirty bytes' in rows[2]['sees'] and "job 'j'" in rows[2]['does']
    assert '65536 dirty bytes' in rows[3]['sees'] and rows[3]['does'] == '0 dirty bytes'
    assert dump(d) == before
    assert not [e for e in d.qmp.events if e['event'] != 'BLOCK_EXPORT_DELETED']


def test_a_dry_run_of_a_list_that_would_fail_is_an_answer(d):
    before = dump(d)
    got = txn(d, [act('add', node='d0', name='b'), act('clear', node='d0', name='nope'), act('add', node='d1', name='c')],
              dry_run=True)
    assert got['outcome'] == 'would-fail' and got['failed-action'] == 1
    assert "'nope'" in got['error']
    assert [r['outcome'] for r in got['actions']] == ['exercised', 'failed', 'not-run']
    assert got['actions'][1]['error'] == got['error']
    assert dump(d) == before


# ---------------------------------------------------------------- explain

def explained(d, actions):
    got = txn(d, actions, explain=True)
    return {(e['action'], e['on']): e['because'] for e in got['dependencies']}, got['holds']


def test_explain_says_which_actions_depend_on_which_and_why(d):
    edges, holds = explained(d, [act('add', node='d0', name='b'), act('add', node='d1', name='b'),
                                 act('merge', node='d0', target='b', bitmaps=['a']),
                                 act('clear', node='d0', name='a')])
    assert set(edges) == {(2, 0), (3, 2)}
    assert edges[3, 2] == [{'name': "contents of bitmap 'a' on node 'd0'", 'before': 'reads', 'after': 'writes'}]
    assert {'name': "bitmap 'b' on node 'd0'", 'before': 'writes', 'after': 'reads'} in edges[2, 0]
    assert holds == [{'node': 'd0', 'requests': 'writes'}, {'node': 'd1', 'requests': 'writes'}]
    assert names(d) == []


def test_explain_says_of_whom_reads_wait_too(d):
    """There is one pause for a list: a job's disks have theirs held, so all the others have."""
    clear = act('clear', node='d1-file', name='b')
    job = {'type': 'blockdev-backup', 'data': {'job-id': 'j', 'device': 'd0', 'target': 'd1', 'sync': 'full'}}
    assert explained(d, [clear])[1] == [{'node': 'd1-file', 'requests': 'writes'}]
    for actions in ([clear, job], [job, clear]):
        held = explained(d, actions)[1]
        assert {h['node'] for h in held} == {'d0', 'd1', 'd1-file'} and {h['requests'] for h in held} == {'all'}


def test_explain_of_what_only_looks_has_no_edges(d):
    edges, _ = explained(d, [act('merge', node='d0', target='x', bitmaps=['a']),
                             act('merge', node='d0', target='y', bitmaps=['a'])])
    assert edges == {}


def test_explain_of_a_long_list_takes_no_longer_than_running_it_some_times(d):
    """Those who only look at the same thing are not compared with each other, two by two."""
    actions = [act('merge', node='d0', target='t', bitmaps=[f'b{i}' for i in range(30000)])]
    start = d.cpu_seconds()
    with pytest.raises(QmpError, match='not found'):
        txn(d, actions)
    ran = d.cpu_seconds() - start
    start = d.cpu_seconds()
    assert explained(d, actions) == ({}, [{'node': 'd0', 'requests': 'writes'}])
    assert d.cpu_seconds() - start < 20 * ran


def test_independent_neighbours_may_be_swapped(d):
    """What explain calls independent is: both orders end in the same state."""
    lists = [act('add', node='d0', name='p'), act('add', node='d1', name='q')]
    assert explained(d, lists)[0] == {}
    txn(d, lists)
    one = sorted(names(d) + names(d, 'd1'))
    for node, name in (('d0', 'p'), ('d1', 'q')):
        d.cmd(BITMAP + 'remove', node=node, name=name)
    txn(d, lists[::-1])
    assert sorted(names(d) + names(d, 'd1')) == one


# ---------------------------------------------------------------- query-transactions, error data

def test_query_transactions_tells_who_what_when_and_what_became_of_it(d):
    first = len(d.cmd('query-transactions'))
    txn(d, [act('add', node='d0', name='b'), act('clear', node='d0', name='b')], id='t1')
    with pytest.raises(QmpError):
        txn(d, [act('add', node='d1', name='x'), act('add', node='d0', name='b')], completion_mode='grouped')
    d.cmd(BITMAP + 'clear', node='d0', name='b')
    plain, failed, done = d.cmd('query-transactions')[:3]
    assert len(d.cmd('query-transactions')) == first + 3
    assert done['id'] == 't1' and done['outcome'] == 'committed' and done['n-actions'] == 2
    assert done['actions'] == [BITMAP + 'add', BITMAP + 'clear']
    assert 'failed-action' not in done and not done['plain'] and not done['grouped']
    assert failed['outcome'] == 'failed' and failed['failed-action'] == 1 and "'b'" in failed['error']
    assert failed['grouped']
    assert plain['plain'] and plain['actions'] == [BITMAP + 'clear']
    assert plain['number'] == failed['number'] + 1 == done['number'] + 2
    assert f'pid {os.getpid()}' in done['client']
    assert 0 < done['held-ns'] <= done['took-ns']
    assert abs(done['time']['seconds'] - time.time()) < 60
    assert len(d.cmd('query-transactions', limit=1)) == 1


def test_dry_runs_and_replays_are_in_the_log_by_their_name(d):
    txn(d, [], id='r')
    txn(d, [], id='r')
    txn(d, [], dry_run=True)
    txn(d, [{'type': 'abort', 'data': {}}], dry_run=True)
    assert [t['outcome'] for t in d.cmd('query-transactions')[:4]] == ['would-fail', 'would-commit', 'replayed',
                                                                       'committed']


def test_the_log_keeps_256(d):
    for _ in range(260):
        txn(d, [])
    got = d.cmd('query-transactions')
    assert len(got) == 256
    assert [t['number'] for t in got] == list(range(got[0]['number'], got[0]['number'] - 256, -1))


def test_error_data_names_the_action(d):
    e = pytest.raises(QmpError, txn, d, [act('add', node='d0', name='b'), act('enable', node='d0', name='no')]).value
    assert e.data == {'action': 1, 'kind': BITMAP + 'enable', 'phase': 'prepare', 'undone': True}
    assert "'no'" in e.desc


# ---------------------------------------------------------------- rename, copy

def both(d, form, kind, **data):
    if form == 'plain':
        d.cmd(BITMAP + kind, **data)
    else:
        txn(d, [act(kind, **data)])


@pytest.mark.parametrize('form', ['plain', 'list'])
def test_rename_keeps_everything_but_the_name(d, form):
    d.cmd(BITMAP + 'add', node='d0', name='a', granularity=4096)
    d.export('d0')
    write(d, 'd0', 8192, 4096)
    before, bits = bitmaps(d, 'd0')[0], d.sha256('d0', 'a')
    both(d, form, 'rename', node='d0', name='a', new_name='z')
    after = bitmaps(d, 'd0')[0]
    assert {**after, 'name': 'a'} == before and after['name'] == 'z' and d.sha256('d0', 'z') == bits
    write(d, 'd0', 65536, 4096)
    assert bitmaps(d, 'd0')[0]['count'] == 8192
    with pytest.raises(QmpError, match="'a' on node 'd0' not found"):
        d.cmd(BITMAP + 'clear', node='d0', name='a')


@pytest.mark.parametrize('form', ['plain', 'list'])
@pytest.mark.parametrize('data, why', [
    ({'name': 'no', 'new_name': 'z'}, "'no' on node 'd0' not found"), ({'name': 'a', 'new_name': ''}, 'not empty'),
    ({'name': 'a', 'new_name': 'b'}, "'b' on node 'd0' exists"), ({'name': 'a', 'new_name': 'a'}, "'a' on node 'd0' exists"),
    ({'name': 'a', 'new_name': 'x' * 1024}, 'longer than 1023'), ({'name': 'held', 'new_name': 'z'}, 'in use')])
def test_rename_is_refused(d, form, data, why):
    for name in ('a', 'b', 'held'):
        d.cmd(BITMAP + 'add', node='d0', name=name, disabled=True)
    d.export('d0', 'e', writable=False, bitmaps=['held'])
    before = dump(d)
    with pytest.raises(QmpError, match=why):
        both(d, form, 'rename', node='d0', **data)
    assert dump(d) == before


def test_renames_in_a_circle_and_back(d):
    for name in ('a', 'b'):
        d.cmd(BITMAP + 'add', node='d0', name=name)
    d.export('d0')
    write(d, 'd0', 0, 4096)
    d.cmd(BITMAP + 'clear', node='d0', name='b')
    before = dump(d)
    circle = [act('rename', node='d0', name='a', new_name='t'), act('rename', node='d0', name='b', new_name='a'),
              act('rename', node='d0', name='t', new_name='b')]
    with pytest.raises(QmpError):
        txn(d, [*circle, act('add', node='d0', name='t'), {'type': 'abort', 'data': {}}])
    assert dump(d) == before
    txn(d, circle)
    assert {b['name']: b['count'] for b in bitmaps(d, 'd0')} == {'b': 65536, 'a': 0}


@pytest.mark.parametrize('form', ['plain', 'list'])
def test_copy_makes_a_bitmap_out_of_others_across_nodes(d, form):
    d.cmd(BITMAP + 'add', node='d0', name='a', granularity=4096)
    d.cmd(BITMAP + 'add', node='d1', name='b', granularity=MiB)
    for node in ('d0', 'd1'):
        d.export(node)
    write(d, 'd0', 0, 4096)
    write(d, 'd1', 2 * MiB, 4096)
    both(d, form, 'copy', node='d1', name='c', bitmaps=[{'node': 'd0', 'name': 'a'}, 'b'])
    new = bitmaps(d, 'd1')[0]
    assert new['name'] == 'c' and new['granularity'] == 4096 and new['recording'] and new['count'] == 4096 + MiB
    both(d, form, 'copy', node='d0', name='w', bitmaps=['a'], granularity=2 * MiB, disabled=True)
    wide = bitmaps(d, 'd0')[0]
    assert wide['granularity'] == 2 * MiB and not wide['recording'] and wide['count'] == 2 * MiB
    write(d, 'd1', MiB, 4096)
    assert bitmaps(d, 'd1')[0]['count'] == 8192 + MiB


@pytest.mark.parametrize('form', ['plain', 'list'])
@pytest.mark.parametrize('data, why', [
    ({'bitmaps': []}, "'bitmaps' is empty"), ({'bitmaps': ['a', 'no']}, "'no' on node 'd0' not found"),
    ({'bitmaps': ['held']}, 'in use'), ({'bitmaps': ['a'], 'name': 'a'}, "'a' on node 'd0' exists"),
    ({'bitmaps': [{'node': 'small', 'name': 's'}]}, 'does not fit'), ({'bitmaps': ['a'], 'granularity': 511}, '511'),
    ({'bitmaps': ['a'], 'persistent': True}, 'cannot be persistent'), ({'bitmaps': ['a'], 'node': 'zz'}, "'zz' not found"),
    ({'bitmaps': [{'node': 'zz', 'name': 's'}]}, "'zz' not found")])
def test_copy_is_refused(d, form, data, why):
    d.add_disk('small', MiB)
    d.cmd(BITMAP + 'add', node='small', name='s')
    for name in ('a', 'held'):
        d.cmd(BITMAP + 'add', node='d0', name=name, disabled=True)
    d.export('d0', 'e', writable=False, bitmaps=['held'])
    before = dump(d)
    with pytest.raises(QmpError, match=why):
        both(d, form, 'copy', **{'node': 'd0', 'name': 'new', **data})
    assert dump(d) == before


def test_a_copy_is_taken_back(d):
    d.cmd(BITMAP + 'add', node='d0', name='a')
    before = dump(d)
    with pytest.raises(QmpError):
        txn(d, [act('copy', node='d0', name='c', bitmaps=['a']), act('remove', node='d0', name='a'),
                act('rename', node='d0', name='c', new_name='a'), {'type': 'abort', 'data': {}}])
    assert dump(d) == before


def node_add(name, file):
    return {'type': 'blockdev-add', 'data': {'driver': 'raw', 'node-name': name, 'file': file}}


def node_del(name):
    return {'type': 'blockdev-del', 'data': {'node-name': name}}


def test_what_stands_under_a_node_of_the_list_itself_may_be_any(d):
    """Nobody can look at the children of a node that is not there yet, or will be another one: the list says it."""
    export = {'type': 'block-export-add', 'data': {'type': 'nbd', 'id': 'e', 'node-name': 'n', 'writable': True,
                                                   'bitmaps': ['b']}}
    edges, _ = explained(d, [node_add('n', 'd0-file'), act('add', node='d0-file', name='b'), export])
    assert (2, 1) in edges
    null = {'type': 'blockdev-add', 'data': {'driver': 'null-co', 'node-name': 'under', 'size': MiB}}
    edges, _ = explained(d, [null, node_add('n', 'under'), node_del('n'), node_del('under')])
    assert (3, 2) in edges
    edges, _ = explained(d, [node_del('d0'), node_add('d0', 'd1-file'), act('add', node='d1-file', name='b'),
                             {**export, 'data': {**export['data'], 'node-name': 'd0'}}])
    assert (3, 2) in edges
    edges, _ = explained(d, [node_del('d0'), act('add', node='d1', name='b')])
    assert edges == {}


def test_explaining_a_long_list_takes_no_time(d):
    """The daemon answers nobody else meanwhile. Linear; each of these took the processor ten seconds and more."""
    lists = ([act('add', node='d0', name=f'b{i}') for i in range(30000)],
             [act('add', node=f'n{i}', name='b') for i in range(30000)],
             [{'type': 'block-export-add', 'data': {'type': 'nbd', 'id': 'e', 'node-name': 'd0-file',
                                                    'bitmaps': [f'b{i}' for i in range(30000)]}},
              act('merge', node='d0-file', target='t', bitmaps=[f'b{i}' for i in range(30000)])])
    for actions, n_edges, n_holds in zip(lists, (0, 0, 1), (1, 30000, 1)):
        start = d.cpu_seconds()
        edges, holds = explained(d, actions)
        assert d.cpu_seconds() - start < 8
        assert len(edges) == n_edges and len(holds) == n_holds
    assert len(edges[1, 0]) == 30000  # the state of each


def test_explaining_does_not_fill_the_memory(d):
    """Each of 50 exports wants the 400 bitmaps of every other: 1225 pairs, 490000 reasons."""
    adds = [{'type': 'block-export-add', 'data': {'type': 'nbd', 'id': f'e{i}', 'node-name': 'd0', 'name': f'e{i}',
                                                  'bitmaps': [f'b{k}' for k in range(200)]}} for i in range(50)]
    with pytest.raises(QmpError, match='more than 10000 pairs .* or for more than 100000 reasons'):
        txn(d, adds, explain=True)
