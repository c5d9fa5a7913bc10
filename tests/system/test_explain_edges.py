# SPDX-License-Identifier: Apache-2.0
"""What explain knows beyond the names in a list: who stands beside whom on one disk, which paths lead to one file,
what the list itself says of nodes and exports. Random lists: test_explain_swaps.py."""
import json
import os
import subprocess
import time

import pytest

import harness
from harness import DEADLINE, MiB, Daemon, QmpError
from stalled import Stalled

BITMAP = 'block-dirty-bitmap-'
SIZE = 4 * MiB
BOUND = 15.0  # seconds, for what takes one; 80 clients, one after the other, took 80


def act(kind, **data):
    return {'type': kind, 'data': {k.replace('_', '-'): v for k, v in data.items()}}


def bitmap(kind, node, name='b', **data):
    return act(BITMAP + kind, node=node, name=name, **data)


def serve(node, writable=True, id='new', **data):
    return act('block-export-add', type='nbd', id=id, node_name=node, name=id, writable=writable, **data)


def unserve(id):
    return act('block-export-del', id=id)


def raw(name, file):
    return act('blockdev-add', driver='raw', node_name=name, file=file)


def file(name, path, **data):
    return act('blockdev-add', driver='file', node_name=name, filename=path, **data)


def delete(name):
    return act('blockdev-del', node_name=name)


def backup(device, target, id='j'):
    return act('blockdev-backup', job_id=id, device=device, target=target, sync='full')


def drive_backup(device, target, id='j', **data):
    return act('drive-backup', job_id=id, device=device, target=target, sync='full', **data)


def ask(d, actions, **properties):
    return d.cmd('transaction', actions=actions, properties={k.replace('_', '-'): v for k, v in properties.items()})


def edges(d, actions):
    return {(e['on'], e['action']): e['because'] for e in ask(d, actions, explain=True)['dependencies']}


def tells(d, actions):
    """What a dry run tells of each action, in any order."""
    got = ask(d, actions, dry_run=True)
    return sorted(str({k: v for k, v in row.items() if k != 'action'}) for row in got['actions'])


# ---------------------------------------------------------------- beside

@pytest.fixture
def d():
    """Nodes 'one' and 'two' over one file node 'low'; 'other' over a disk of its own."""
    with Daemon() as daemon:
        for name in ('low', 'far', 'away'):
            daemon.cmd('blockdev-add', driver='null-co', node_name=name, size=SIZE)
        for name, below in (('one', 'low'), ('two', 'low'), ('other', 'far'), ('top', 'one')):
            daemon.cmd('blockdev-add', driver='raw', node_name=name, file=below)
        yield daemon


def prepare(d, has):
    for what in has:
        if what == 'bitmap':
            d.cmd(BITMAP + 'add', node='two', name='b')
        else:
            d.export('one', 'old')


BESIDE = {
    'a bitmap and a writer': ([bitmap('add', 'two'), serve('one')], []),
    'a bitmap and a writer below': ([bitmap('add', 'two'), serve('low')], []),
    'a copy and a writer': ([act(BITMAP + 'copy', node='two', name='c', bitmaps=[{'node': 'far', 'name': 'f'}]),
                             serve('one')], []),
    'the end of a bitmap and a writer': ([bitmap('remove', 'two'), serve('one')], ['bitmap']),
    'the end of a node with a bitmap and a writer': ([delete('two'), serve('one')], ['bitmap']),
    'the end of a writer and a bitmap': ([unserve('exp-old'), bitmap('add', 'two')], ['writer']),
    'a writer that moves away and a bitmap': ([act('block-export-set-node', id='exp-old', node_name='other'),
                                               bitmap('add', 'two')], ['writer']),
    'a bitmap and a writer that moves': ([bitmap('add', 'two'), act('block-export-set-node', id='new', node_name='one')],
                                         []),
    'a source and a writer': ([backup('two', 'away'), serve('one')], []),
    'a target and a bitmap': ([backup('other', 'one'), bitmap('add', 'two')], []),
    'a target and a writer': ([backup('other', 'one'), serve('two')], []),
    'a target and a writer on top': ([backup('other', 'one'), serve('top')], []),
    'a target and a target': ([backup('other', 'one'), backup('away', 'two', 'k')], []),
    'a target and a source': ([backup('other', 'one'), backup('two', 'away', 'k')], []),
    'a target on top and a source': ([backup('other', 'top'), backup('one', 'away', 'k')], []),
}


@pytest.mark.parametrize('case', BESIDE)
def test_who_stands_in_whose_way_on_one_disk(d, case):
    """An edge, and rightly so: in one order or the other the list does, or is told, something else."""
    pair, has = BESIDE[case]
    d.cmd(BITMAP + 'add', node='far', name='f')
    d.export('other', 'new') if 'moves' in case and not has else None
    prepare(d, has)
    if pair[1]['data'].get('id') == 'new' and pair[1]['type'] == 'block-export-set-node':
        pair = [pair[0], {**pair[1], 'data': {**pair[1]['data'], 'id': 'exp-new'}}]
    for order in (pair, pair[::-1]):
        because = edges(d, order).get((0, 1), [])
        assert any('the disk under nodes' in why['name'] for why in because), (order, because)
    assert tells(d, pair) != tells(d, pair[::-1])


@pytest.mark.parametrize('pair', [
    [bitmap('add', 'one'), serve('one')], [bitmap('add', 'low'), serve('one')], [bitmap('add', 'one'), serve('top')],
    [bitmap('add', 'two'), serve('one', writable=False)], [bitmap('add', 'two'), serve('other')],
    [bitmap('add', 'one'), bitmap('add', 'two')], [serve('one'), serve('two', id='more')]],
    ids=lambda p: ', '.join(f"{a['type']} {a['data'].get('node', a['data'].get('node-name', ''))}" for a in p))
def test_who_does_not_stand_in_the_way(d, pair):
    assert edges(d, pair) == {}
    assert tells(d, pair) == tells(d, pair[::-1])


def test_what_stands_beside_is_known_of_nodes_of_the_list_itself(d):
    actions = [raw('three', {'driver': 'raw', 'file': 'low'}), bitmap('add', 'three'), serve('one')]
    assert set(edges(d, actions)) == {(0, 1), (1, 2)}
    actions = [delete('two'), raw('two', 'far'), bitmap('add', 'two'), serve('one')]
    assert (2, 3) not in edges(d, actions)


def test_one_file_is_written_through_one_node(d):
    """Two file nodes over one inode, by a hard link: both cannot be written to, nor one past a bitmap of the other."""
    for name in ('a', 'b'):
        if name == 'a':
            with open(d.path('a'), 'wb') as f:
                f.truncate(SIZE)
        else:
            os.link(d.path('a'), d.path('b'))
        d.cmd('blockdev-add', driver='file', node_name=name, filename=name)
    pair = [serve('a'), serve('b', id='more')]
    assert edges(d, pair)[0, 1] == [{'name': "the file under nodes 'a' and 'b'", 'before': 'writes', 'after': 'writes'}]
    assert tells(d, pair) != tells(d, pair[::-1])
    for pair in ([serve('a'), bitmap('add', 'b')], [bitmap('add', 'b'), serve('a')]):
        [why] = edges(d, pair)[0, 1]
        assert why['name'] == "the file under nodes '{}' and '{}'".format(*(p['data'].get('node', p['data'].get('node-name')) for p in pair))
        assert tells(d, pair) != tells(d, pair[::-1])
    for pair in ([serve('a', False), bitmap('add', 'b')], [serve('a'), serve('b', False, id='more')], [serve('a'), serve('one', id='more')]):
        assert edges(d, pair) == {}
        assert tells(d, pair) == tells(d, pair[::-1])
    pair = [drive_backup('one', 'b', mode='existing', format='raw'), serve('a')]
    assert any("the file under node 'a' and a job's target" == why['name'] for why in edges(d, pair)[0, 1])
    assert tells(d, pair) != tells(d, pair[::-1])


# ---------------------------------------------------------------- files

@pytest.fixture
def files(d):
    """A file 'x' with other names: by path, by a link to it and to its directory, and a second name of its own."""
    with open(d.path('x'), 'wb') as f:
        f.truncate(SIZE)
    os.link(d.path('x'), d.path('hard'))
    os.symlink('x', d.path('soft'))
    os.symlink('.', d.path('here'))
    os.symlink('nothing', d.path('leads-nowhere'))
    os.mkdir(d.path('dir'))
    return d


@pytest.mark.parametrize('path', ['x', './x', 'ABS/x', 'ABS//x', 'dir/../x', 'here/x', 'soft', 'hard'])
def test_a_file_that_exists_is_the_same_by_any_path(files, path):
    path = path.replace('ABS', files.dir)
    pair = [file('n', path), drive_backup('one', 'file:x', mode='existing', format='raw')]
    because = edges(files, pair)[0, 1]
    assert because[0]['name'] == ("file 'x'" if path == 'x' else f"file '{path}', which is file 'x'")
    assert because[0]['before'] == 'reads' and because[0]['after'] == 'writes'
    assert edges(files, [file('n', path), drive_backup('one', 'dir/x')]) == {}


@pytest.mark.parametrize('path', ['new', './new', 'ABS/new', 'dir/../new', 'here/new', 'leads-nowhere'])
def test_a_file_to_come_is_the_same_by_any_path(files, path):
    """In the order of the list the node is over what the backup makes; in the other one there is nothing yet."""
    path = path.replace('ABS', files.dir)
    pair = [drive_backup('one', 'new'), file('n', path)]
    assert (0, 1) in edges(files, pair)
    assert edges(files, [drive_backup('one', 'new'), file('n', 'dir/new'), file('m', 'no-dir/new')]) == {}
    with pytest.raises(QmpError, match='cannot open'):
        ask(files, pair[::-1])
    if path != 'leads-nowhere':
        ask(files, pair)
        assert files.node('n')['image']['virtual-size'] == SIZE


def test_a_node_lets_go_of_its_file(files):
    """A file that a node is over is not replaced; it is known by its inode, whatever it is called by now."""
    files.cmd('blockdev-add', driver='file', node_name='n', filename='soft')
    os.unlink(files.path('hard'))
    os.rename(files.path('x'), files.path('y'))
    pair = [delete('n'), drive_backup('one', 'y')]
    assert edges(files, pair)[0, 1][0]['name'] == "file 'y'"
    assert edges(files, [delete('n'), drive_backup('one', 'x')]) == {}
    made = [file('m', 'here/y'), delete('m'), drive_backup('one', 'y')]
    assert {(0, 1), (0, 2), (1, 2)} <= set(edges(files, made))
    assert ask(files, pair, dry_run=True)['outcome'] == 'would-commit'
    assert ask(files, pair[::-1], dry_run=True)['outcome'] == 'would-fail'


def test_explaining_does_not_wait_for_a_mount_that_hangs(tmp_path):
    """What does not answer may be any file. While a question is open no other is asked, so threads do not run out."""
    with Stalled(str(tmp_path)) as slow, Daemon() as d:
        d.cmd('blockdev-add', driver='null-co', node_name='one', size=SIZE)
        actions = [drive_backup('one', 'new'), file('n', slow.path), file('m', 'elsewhere')]
        assert edges(d, actions) == {}
        slow.stop()
        end = time.monotonic() + DEADLINE
        while not edges(d, actions):  # the kernel may know the answer for a while
            assert time.monotonic() < end
        begin = time.monotonic()
        for i in range(300):
            start = time.monotonic()
            got = edges(d, actions)
            assert time.monotonic() - start < BOUND
            assert time.monotonic() - begin < 20 + i / 10, 'each has waited'
            assert got[0, 1][0]['name'] == f"files 'new' and '{slow.path}', which may be one: a disk does not answer"
        threads = len(os.listdir(f'/proc/{d.proc.pid}/task'))
        slow.go_on()
        assert threads < 64
        end = time.monotonic() + DEADLINE
        while edges(d, actions):  # the late answers come in
            assert time.monotonic() < end


def test_many_clients_that_ask_about_a_mount_that_hangs_do_not_take_all_threads(tmp_path):
    """All at once, while nobody knows yet that it hangs."""
    with Stalled(str(tmp_path)) as slow, Daemon() as d:
        text = json.dumps({'execute': 'transaction', 'arguments': {'properties': {'explain': True}, 'actions': [
            file(f'n{i}', os.path.join(slow.mount, f'x{i}')) for i in range(8)]}}).encode()
        clients = [d.client() for _ in range(80)]
        slow.stop()
        start = time.monotonic()
        for q in clients:
            q.sock.sendall(text)
        d.cmd('blockdev-add', driver='file', node_name='local', filename=d.log_path)
        for q in clients:
            assert 'return' in q.reply()
            q.close()
        assert time.monotonic() - start < BOUND
        threads = len(os.listdir(f'/proc/{d.proc.pid}/task'))
        slow.go_on()
        assert threads < 64


# ---------------------------------------------------------------- what the list itself says

def explain_here(d, actions):
    """By the tool, without a daemon."""
    r = subprocess.run([os.path.join(harness.BIN, 'tidemark'), 'txn', 'explain', '-', '--json'], input=json.dumps(actions),
                       capture_output=True, text=True, timeout=DEADLINE, check=True)
    return {(e['on'], e['action']) for e in json.loads(r.stdout)['dependencies']}


def explain_there(d, actions):
    return set(edges(d, actions))


@pytest.mark.parametrize('explain', [explain_here, explain_there])
def test_an_export_of_the_list_itself_is_known(d, explain):
    first = serve('one', writable=False, bitmaps=[{'node': 'one', 'name': 'a'}])
    assert explain(d, [first, unserve('new'), bitmap('clear', 'one', 'b'), serve('other', id='more')]) == {(0, 1)}
    assert explain(d, [first, unserve('new'), bitmap('disable', 'one', 'a')]) == {(0, 1), (0, 2), (1, 2)}
    assert (1, 2) in explain(d, [first, unserve('new'), {**first, 'data': {**first['data'], 'id': 'more'}}])
    moves = [first, act('block-export-set-node', id='new', node_name='other'), unserve('new')]
    assert explain(d, [*moves, delete('one')]) >= {(0, 1), (1, 2), (1, 3)}
    assert explain == explain_here or (2, 3) not in explain(d, [*moves, delete('one')])  # what is below it?
    assert (2, 3) in explain(d, [*moves, delete('other')])
    assert (2, 3) in explain(d, [*moves, bitmap('disable', 'one', 'a')])


def test_an_export_of_the_daemon_is_known(d):
    d.cmd(BITMAP + 'add', node='low', name='b', disabled=True)
    d.export('one', 'old', writable=False, bitmaps=['b'])
    assert edges(d, [unserve('exp-old'), bitmap('clear', 'other')]) == {}
    assert edges(d, [unserve('exp-old'), serve('one', id='more')]) == {}
    assert edges(d, [unserve('no'), bitmap('enable', 'low')]) == {}
    assert (0, 1) in edges(d, [unserve('exp-old'), bitmap('enable', 'low')])
    assert (0, 1) in edges(d, [unserve('exp-old'), act('block-export-add', type='nbd', id='x', node_name='two', name='old')])


@pytest.mark.parametrize('explain', [explain_here, explain_there])
def test_a_node_of_the_list_itself_is_known(d, explain):
    chain = [act('blockdev-add', driver='null-co', node_name='bottom', size=SIZE),
             raw('n', {'driver': 'raw', 'node-name': 'inner', 'file': 'bottom'})]
    got = explain(d, [*chain, delete('n'), bitmap('add', 'other'), delete('bottom')])
    assert got == {(0, 1), (0, 2), (0, 4), (1, 2), (1, 4), (2, 4)}
    unknown = [raw('n', 'low'), delete('n'), bitmap('add', 'other')]  # what does 'low' stand on?
    assert explain(d, unknown) == ({(0, 1), (1, 2)} if explain == explain_here else {(0, 1)})
    assert (2, 3) in explain(d, [*chain, bitmap('add', 'inner'), serve('n', bitmaps=['b'])])
    assert (2, 3) not in explain(d, [*chain, bitmap('add', 'inner', 'c'), serve('n', bitmaps=['b'])])


@pytest.mark.parametrize('explain', [explain_here, explain_there])
def test_a_node_that_names_itself_is_no_circle(d, explain):
    for node in (raw('a', 'a'), raw('a', {'driver': 'raw', 'node-name': 'b', 'file': 'a'})):
        assert explain(d, [node, bitmap('add', 'a'), delete('a')]) == {(0, 1), (0, 2), (1, 2)}


def test_without_a_daemon_paths_are_what_they_are(d):
    same = [drive_backup('one', './dir//./x'), file('n', 'dir/x')]
    assert explain_here(d, same) == {(0, 1)}
    assert explain_here(d, [drive_backup('one', '/dir/x'), file('n', 'dir/x')]) == set()


# ---------------------------------------------------------------- long lists

N = 30000
FEW = 9000  # an answer has 10000 edges at most
LONG = {  # with the number of edges; None: too many
    'files': ([file(f'n{i}', f'no-dir/{i}') for i in range(N)], 0),
    'nodes over one': ([raw(f'r{i}', 'low') for i in range(FEW)] + [bitmap('add', f'r{i}') for i in range(FEW)], FEW),
    'beside': ([bitmap('add', 'two', f'b{i}') for i in range(N)] + [serve('one', id=f'e{i}') for i in range(N)], None),
    'on one node': ([bitmap('add', 'one', f'b{i}') for i in range(N)] + [serve('one', id=f'e{i}') for i in range(N)] +
                    [bitmap('remove', 'one', 'b5')], 1),
    'come and go': ([a for i in range(FEW) for a in (serve('one', id=f'e{i}'), unserve(f'e{i}'))], FEW),
    'one name': ([a for i in range(N) for a in (raw(f'r{i}', 'low'), delete(f'r{i}'))], None),
}


@pytest.mark.parametrize('case', LONG)
def test_a_long_list_is_explained_or_refused_soon(d, case):
    """Up to 60000 actions. Each second counts for the daemon's other clients, who wait meanwhile."""
    actions, n = LONG[case]
    start = time.monotonic()
    if n is None:
        with pytest.raises(QmpError, match='explain a part of the list'):
            edges(d, actions)
    else:
        assert len(edges(d, actions)) == n
    assert time.monotonic() - start < 15


def test_who_leads_where_is_looked_at_once(d):
    """Bitmaps below thousands of nodes that are written to: none of these is in the way, and no bitmap has to find
    that out anew. They cost what bitmaps on another disk cost, not ten times as much."""
    def seconds(node):
        actions = [raw(f'r{i}', 'low') for i in range(FEW)] + [serve(f'r{i}', id=f'e{i}') for i in range(FEW)]
        start = d.cpu_seconds()
        assert len(edges(d, actions + [bitmap('add', node, f'b{i}') for i in range(2 * N)])) == FEW
        return d.cpu_seconds() - start
    assert seconds('low') < 3 * seconds('away')
