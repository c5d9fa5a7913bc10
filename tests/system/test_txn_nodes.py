# SPDX-License-Identifier: Apache-2.0
"""blockdev-add and blockdev-del as plain commands, in lists, and undone."""
import os
import time

import nbd
import pytest

from file_state import whole_state
from harness import DEADLINE, KiB, MiB, Daemon, QmpError

SIZE = MiB


def add(driver, name, **options):
    return {'type': 'blockdev-add', 'data': {'driver': driver, 'node-name': name,
                                             **{k.replace('_', '-'): v for k, v in options.items()}}}


def delete(name):
    return {'type': 'blockdev-del', 'data': {'node-name': name}}


def bitmap(kind, node, name):
    return {'type': 'block-dirty-bitmap-' + kind, 'data': {'node': node, 'name': name}}


ABORT = {'type': 'abort', 'data': {}}


def file_below(name, path):
    return {'driver': 'file', 'node-name': name, 'filename': path}


def txn(d, actions, **properties):
    return d.cmd('transaction', actions=actions, properties={k.replace('_', '-'): v for k, v in properties.items()})


def names(d):
    return [n['node-name'] for n in d.cmd('query-named-block-nodes')]


def stand(d):
    """Nodes of every kind: first, over (on base), base, thr (in tg0), inline (with inline-file), last."""
    d.cmd('object-add', {'qom-type': 'throttle-group', 'id': 'tg0'})
    d.cmd('object-add', {'qom-type': 'throttle-group', 'id': 'tg1'})
    d.add_file('first', SIZE)
    d.add_file('base', SIZE)
    d.cmd('blockdev-add', driver='raw', node_name='over', file='base')
    d.cmd('blockdev-add', driver='throttle', node_name='thr', throttle_group='tg0', file='first')
    d.add_disk('inline', SIZE)
    d.cmd('blockdev-add', driver='raw', node_name='unnamed', file={'driver': 'null-co', 'size': SIZE})
    d.add_file('last', SIZE)
    for node in ('over', 'inline', 'inline-file'):
        d.cmd('block-dirty-bitmap-add', node=node, name='old')
        d.cmd('block-dirty-bitmap-add', node=node, name='new', granularity=4096)
    d.export('inline')
    h = nbd.NBD()
    h.connect_uri(d.uri('inline'))
    h.pwrite(b'x' * 8192, 65536)
    h.shutdown()
    d.cmd('block-export-del', id='exp-inline')
    d.qmp.event('BLOCK_EXPORT_DELETED')


@pytest.fixture
def d():
    with Daemon() as daemon:
        stand(daemon)
        yield daemon


LISTS = {
    'below after above': [delete('over'), delete('base')],
    'the middle': [delete('thr')],
    'with its child': [delete('inline')],
    'same name and file again': [delete('inline'), add('raw', 'inline', file=file_below('inline-file', 'inline.raw'))],
    'same name, other driver': [delete('last'), add('null-co', 'last', size=SIZE)],
    'twice away': [delete('last'), add('null-co', 'last', size=SIZE), delete('last')],
    'there and away': [add('null-co', 'a', size=SIZE), delete('a')],
    'a tower': [add('null-co', 'a', size=SIZE), add('raw', 'b', file='a'), add('raw', 'c', file='b'),
                delete('c'), delete('b'), delete('a')],
    'names of its own': [add('raw', 'a', file={'driver': 'raw', 'file': {'driver': 'null-co', 'size': SIZE}}),
                         add('raw', 'b', file={'driver': 'null-co', 'size': SIZE})],
    'from group to group': [delete('thr'), add('throttle', 'thr', throttle_group='tg1', file='first')],
    'all of them': [delete('last'), delete('unnamed'), delete('inline'), delete('thr'), delete('over'), delete('base'),
                    delete('first')],
    'bitmaps come and go': [bitmap('clear', 'inline', 'old'), bitmap('remove', 'inline', 'new'), delete('inline'),
                            add('file', 'inline', filename='inline.raw'), bitmap('add', 'inline', 'new')],
    'a child that lost its parent': [add('raw', 'also', file='inline-file'), delete('inline'), delete('also')],
    'a new target': [add('file', 't', filename='last.raw'), bitmap('add', 't', 'b'), bitmap('add', 'over', 'b'),
                     {'type': 'blockdev-backup', 'data': {'job-id': 'j', 'device': 'over', 'target': 't',
                                                          'sync': 'full'}}],
}


@pytest.mark.parametrize('name', LISTS)
def test_undone_to_the_last_byte(d, name):
    before = whole_state(d)
    assert before['bits']['inline', 'old'] != before['bits']['over', 'old']
    with pytest.raises(QmpError) as e:
        txn(d, LISTS[name] + [ABORT])
    assert e.value.data == {'action': len(LISTS[name]), 'kind': 'abort', 'phase': 'prepare', 'undone': True}
    assert whole_state(d) == before
    for group, members in (('tg0', True), ('tg1', False)):
        try:
            d.cmd('object-del', id=group)
            assert not members
        except QmpError as e:
            assert members and e.desc == "throttle-group 'tg0' is in use by node 'thr'"
    d.cmd('blockdev-add', driver='raw', node_name='next', file={'driver': 'null-co'})
    assert names(d)[:2] == ['next', '#block001']  # as if the list had used up no number


@pytest.mark.parametrize('name', LISTS)
def test_a_dry_run_changes_nothing(d, name):
    before = whole_state(d)
    told = txn(d, LISTS[name], dry_run=True)
    assert told['outcome'] == 'would-commit' and whole_state(d) == before
    for row, action in zip(told['actions'], LISTS[name]):
        assert row['outcome'] == 'exercised'
        if action['type'].startswith('blockdev'):
            assert f"'{action['data'].get('node-name', 'j')}'" in row.get('sees', '') + row['does']


@pytest.mark.parametrize('name', [n for n in LISTS if n != 'a new target'])
def test_a_list_is_its_actions_one_by_one(d, name):
    with Daemon() as other:
        stand(other)
        txn(d, LISTS[name])
        for action in LISTS[name]:
            other.cmd(action['type'], action['data'])
        mine, theirs = whole_state(d), whole_state(other)
        for state, daemon in ((mine, d), (theirs, other)):
            for n in state['nodes']:
                n['file'] = n['file'].replace(daemon.dir + '/', '')
                n['image']['filename'] = n['image']['filename'].replace(daemon.dir + '/', '')
                for b in n.get('dirty-bitmaps', []):
                    del b['generation']
        for what in ('nodes', 'bits', 'open'):
            assert mine[what] == theirs[what]


def test_plain_add_and_del(d):
    before = names(d)
    d.cmd('blockdev-add', driver='raw', node_name='a', file=file_below('a-file', 'last.raw'))
    assert names(d) == ['a', 'a-file'] + before
    d.cmd('blockdev-del', node_name='a')
    assert names(d) == before
    log = d.cmd('query-transactions', limit=2)
    assert [(t['actions'], t['plain'], t['outcome']) for t in log] == [
        (['blockdev-del'], True, 'committed'), (['blockdev-add'], True, 'committed')]


REFUSED = {
    'name taken': [add('null-co', 'last')],
    'taken by an earlier one': [add('null-co', 'a'), add('null-co', 'a')],
    'taken by a child': [add('raw', 'a', file={'driver': 'null-co', 'node-name': 'c'}), add('null-co', 'c')],
    'no file': [add('file', 'a', filename='missing')],
    'no child': [add('raw', 'a', file='zz')],
    'child is gone': [delete('unnamed'), delete('over'), delete('base'), add('raw', 'a', file='base')],
    'not there': [delete('zz')],
    'gone already': [delete('last'), delete('last')],
    'below another': [delete('base')],
    'made with its parent': [delete('inline-file')],
    'below a new one': [add('raw', 'a', file='last'), delete('last')],
    'group is missing': [add('throttle', 'a', throttle_group='zz', file='last')],
    'name missing': [{'type': 'blockdev-add', 'data': {'driver': 'null-co'}}],
    'bitmap of a gone node': [delete('over'), bitmap('clear', 'over', 'old')],
}


@pytest.mark.parametrize('name', REFUSED)
def test_refused_as_one_by_one(d, name):
    """Same text, same action; before it everything undone."""
    actions = REFUSED[name]
    before = whole_state(d)
    with pytest.raises(QmpError) as e:
        txn(d, actions)
    assert e.value.data['action'] == len(actions) - 1 and whole_state(d) == before
    for action in actions[:-1]:
        d.cmd(action['type'], action['data'])
    with pytest.raises(QmpError) as plain:
        d.cmd(actions[-1]['type'], actions[-1]['data'])
    assert (plain.value.cls, plain.value.desc) == (e.value.cls, e.value.desc)


def test_in_use_by_export_job_and_bitmap(d):
    d.export('last')
    for actions, words in (([delete('last')], "in use by export"),
                           ([bitmap('add', 'over', 'b'),
                             {'type': 'blockdev-backup', 'data': {'job-id': 'j', 'device': 'over', 'target': 'first',
                                                                  'sync': 'full'}}, delete('over')], "in use by")):
        before = whole_state(d)
        with pytest.raises(QmpError, match=words):
            txn(d, actions)
        assert whole_state(d) == before


def test_parents_keep_their_order(d):
    """Of several, a refusal names the oldest."""
    for node in ('o1', 'o2'):
        d.cmd('blockdev-add', driver='raw', node_name=node, file='base')
    for gone in (['over'], ['o1'], ['o2', 'over'], ['over', 'o1', 'o2']):
        with pytest.raises(QmpError, match='abort'):
            txn(d, [delete(n) for n in gone] + [ABORT])
        with pytest.raises(QmpError, match="in use by node 'over'"):
            d.cmd('blockdev-del', node_name='base')
    txn(d, [delete('over')])
    with pytest.raises(QmpError, match="in use by node 'o1'"):
        d.cmd('blockdev-del', node_name='base')


def test_an_export_goes_on_while_nodes_come_and_go(d):
    """Neither holds anybody: an NBD client keeps its connection, and no request waits for long."""
    d.export('base', writable=False)
    h = nbd.NBD()
    h.connect_uri(d.uri('base'))
    for _ in range(20):
        txn(d, [delete('over'), add('raw', 'over', file='base')])
        assert h.pread(512, 0) == bytes(512)
    h.shutdown()


def test_what_holds_nobody_does_not_wait_after_a_disk_that_did_not_come_to_rest(d):
    """After such a failure guests get a second of peace; a list that holds no node takes nothing from them."""
    d.cmd('blockdev-add', driver='null-co', node_name='slow', size=SIZE, latency_ns=8 * 10**9)
    d.export('slow')
    d.cmd('block-dirty-bitmap-add', node='slow', name='b')
    h = nbd.NBD()
    h.connect_uri(d.uri('slow'))

    def add_in_that_second(turn):
        h.aio_pwrite(nbd.Buffer(512), turn * 128 * KiB)
        end = time.monotonic() + DEADLINE
        while len(d.ranges('slow', 'b')) == turn:  # until the write has come to the node
            h.poll(0)
            assert time.monotonic() < end
        with pytest.raises(QmpError, match='did not come to rest'):
            d.cmd('block-dirty-bitmap-clear', node='slow', name='b')
        d.cmd('blockdev-add', driver='null-co', node_name=f'a{turn}')
        took = d.cmd('query-transactions', limit=1)[0]
        assert took['actions'] == ['blockdev-add']
        return took['took-ns']
    # Whatever else this machine does may hold up one, but not all of them.
    assert any(add_in_that_second(turn) < 900_000_000 for turn in range(3))


def test_explain_knows_children_and_files(d):
    told = txn(d, [delete('inline'), add('raw', 'x', file='inline-file'), add('null-co', 'y'), delete('over'),
                   delete('base')], explain=True)
    pairs = {(e['action'], e['on']): [c['name'] for c in e['because']] for e in told['dependencies']}
    assert pairs[1, 0] == ["node 'inline-file'"] and pairs[4, 3] == ["node 'base'"]
    assert not any(2 in p for p in pairs) and told['holds'] == []


def test_a_new_node_is_used_by_its_list(d):
    """Target, bitmap and backup in one list, as a backup client wants it."""
    d.export('inline')
    txn(d, [add('file', 't', filename='last.raw'), bitmap('add', 'inline', 'since'),
            {'type': 'blockdev-backup', 'data': {'job-id': 'j', 'device': 'inline', 'target': 't', 'sync': 'full'}}],
        completion_mode='grouped')
    assert 'BLOCK_JOB_COMPLETED' in d.qmp.job_end('j')
    with open(d.path('last.raw'), 'rb') as t, open(d.path('inline.raw'), 'rb') as s:
        copy = t.read()
        assert copy == s.read() and copy.count(b'x') == 8 * KiB
    txn(d, [bitmap('remove', 'inline', 'since'), delete('t')])
    assert 't' not in names(d)


def test_a_file_that_fails_to_open_again_keeps_the_node(d):
    """The old one is closed only when the list has happened."""
    os.rename(d.path('last.raw'), d.path('away'))
    before = whole_state(d)
    with pytest.raises(QmpError, match='No such file'):
        txn(d, [delete('last'), add('file', 'last', filename=d.path('last.raw'))])
    assert whole_state(d) == before
    d.export('last')
    h = nbd.NBD()
    h.connect_uri(d.uri('last'))
    h.pwrite(b'y' * 512, 0)
    h.shutdown()
    with open(d.path('away'), 'rb') as f:
        assert f.read(512) == b'y' * 512


@pytest.mark.parametrize('fails', [{}, {'dry_run': True}])
def test_a_child_that_has_lost_its_parent_survives_another_that_is_undone(d, fails):
    """Made with a parent that went while an export used the child; nobody owns it, and only a node that had brought it
    may take it along."""
    d.export('inline-file', writable=False)
    d.cmd('blockdev-del', node_name='inline')
    d.cmd('block-export-del', id='exp-inline-file')
    d.qmp.event('BLOCK_EXPORT_DELETED')
    before = whole_state(d)
    assert 'inline-file' in names(d)
    actions = [add('raw', 'n', file='inline-file'), add('raw', 'm', file='inline-file')]
    if fails:
        assert txn(d, actions, **fails)['outcome'] == 'would-commit'
    else:
        pytest.raises(QmpError, txn, d, [*actions, ABORT])
    assert whole_state(d) == before


# ---------------------------------------------------------------- lists that cannot be

def raw(name, file):
    return add('raw', name, file=file)


SELF = {'itself': raw('a', 'a'), 'itself, further down': raw('a', {'driver': 'raw', 'node-name': 'b', 'file': 'a'})}
USES = {'del': delete('a'), 'add': bitmap('add', 'a', 'x'),
        'export': {'type': 'block-export-add', 'data': {'type': 'nbd', 'id': 'e', 'node-name': 'a', 'writable': True,
                                                        'bitmaps': ['x']}}}


@pytest.mark.parametrize('node', SELF)
@pytest.mark.parametrize('use', USES)
def test_a_node_that_stands_on_itself_is_refused(d, node, use):
    """Whatever comes after it in the list: who looks for what is below must not go round in a circle."""
    actions = [SELF[node], USES[use]]
    e = pytest.raises(QmpError, txn, d, actions).value
    assert e.desc == "node 'a' not found" and e.data['action'] == 0
    assert txn(d, actions, dry_run=True)['failed-action'] == 0
    assert txn(d, actions, explain=True)['dependencies'][0]['because'][0]['name'] == "node 'a'"


def test_a_list_that_piles_up_too_many_nodes_is_refused(d, sanitized):
    """How deep nodes may stand is known when the list is run; what it would take to delete them is looked at before.
    A megabyte of these took three gigabytes."""
    n = 8000
    d.cmd('blockdev-add', driver='null-co', node_name='n0', size=SIZE)
    pile = [raw(f'n{i}', f'n{i - 1}') for i in range(1, n)]
    e = pytest.raises(QmpError, txn, d, [*pile, *(delete(f'n{i}') for i in range(n - 1, 0, -1))]).value
    assert e.desc == "node 'n65' would stand on more than 64 others" and e.data['action'] == 64
    with open(f'/proc/{d.proc.pid}/status') as f:
        peak = next(int(line.split()[1]) for line in f if line.startswith('VmHWM'))
    assert sanitized or peak < 200 * 1024
    assert names(d)[0] == 'n0'
