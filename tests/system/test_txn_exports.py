# SPDX-License-Identifier: Apache-2.0
"""block-export-add, -del and -set-node: plain, in lists, undone, and with clients who keep at it."""
import fcntl
import itertools
import json
import os
import random
import signal
import struct
import subprocess
import threading
import time

import nbd
import pytest

from backup_tools import again_after_a_rest
from harness import DEADLINE, KiB, MiB, Daemon, QmpError, qemu_io, which
from nbd_raw import READ, WRITE, Raw

SIZE = 4 * MiB
BITMAP = 'block-dirty-bitmap-'


def act(kind, **data):
    return {'type': kind, 'data': {k.replace('_', '-'): v for k, v in data.items()}}


def add(id, node, name=None, **options):
    return act('block-export-add', type='nbd', id=id, node_name=node, name=name or id, **options)


def delete(id, mode='safe'):
    return act('block-export-del', id=id, mode=mode)


def set_node(id, node):
    return act('block-export-set-node', id=id, node_name=node)


ABORT = {'type': 'abort', 'data': {}}


def txn(d, *actions, **properties):
    return d.cmd('transaction', actions=list(actions),
                 properties={k.replace('_', '-'): v for k, v in properties.items()})


def fails(d, *actions):
    return pytest.raises(QmpError, txn, d, *actions).value


@pytest.fixture
def d():
    with Daemon() as daemon:
        for n in 'abc':
            daemon.add_disk(n, SIZE, discard='unmap')
        yield daemon


def client(d, name, *contexts):
    h = nbd.NBD()
    for c in contexts:
        h.add_meta_context(c)
    h.connect_uri(d.uri(name))
    return h


def write(d, name, data, offset):
    h = client(d, name)
    h.pwrite(data, offset)
    h.shutdown()


def start_read(c):
    """A read is in flight: the request behind it, which is refused at once, has been answered."""
    c.ask(READ, 0, 512)
    c.ask(READ, 1 << 40, 512)
    assert c.reply().error


def content(d, node, offset, length):
    with open(d.path(node + '.raw'), 'rb') as f:
        f.seek(offset)
        return f.read(length)


def locks(path):
    """Which bytes of it somebody has locked."""
    taken = []
    with open(path, 'r+b') as f:
        for byte in [*range(100, 104), *range(200, 204)]:
            got = fcntl.fcntl(f, fcntl.F_OFD_GETLK, struct.pack('hhqqi4x', fcntl.F_WRLCK, 0, byte, 1, 0))
            if struct.unpack('hhqqi4x', got)[0] != fcntl.F_UNLCK:
                taken.append(byte)
    return taken


def names(d):
    """What the NBD server lists, in its order."""
    c = Raw(d.nbd_path)
    rows = [data for kind, data in c.option(3) if kind == 2]
    c.close()
    return [r[4:4 + struct.unpack('>I', r[:4])[0]].decode() for r in rows]


def exports(d):
    return [(e['id'], e['node-name'], e['shutting-down']) for e in d.cmd('query-block-exports')]


def state(d, generations=True):
    nodes = d.cmd('query-named-block-nodes')
    for n in nodes:
        n['image'].pop('actual-size', None)
        for b in [] if generations else n.get('dirty-bitmaps', []):
            b.pop('generation')
    return json.dumps([nodes, d.cmd('query-block-exports'),
                       [(b['qdev'], b['inserted']['node-name']) for b in d.cmd('query-block')], names(d),
                       [locks(d.path(n + '.raw')) for n in 'abc']], indent=1, sort_keys=True)


def wait_until(what, cond):
    """The daemon is asked again and again: what is waited for has no event of its own."""
    end = time.monotonic() + DEADLINE
    while not cond():
        assert time.monotonic() < end, what


def deleted(d):
    return [e['data']['id'] for e in d.qmp.events if e['event'] == 'BLOCK_EXPORT_DELETED']


# ---------------------------------------------------------------- add and del

def test_a_list_sets_up_exports_and_takes_them_down(d):
    d.cmd(BITMAP + 'add', node='a', name='m')
    txn(d, act(BITMAP + 'disable', node='a', name='m'), add('e', 'a', bitmaps=['m']), add('f', 'b', writable=True))
    assert exports(d) == [('f', 'b', False), ('e', 'a', False)] and names(d) == ['e', 'f']
    assert d.bitmap('a', 'm')['busy']
    client(d, 'f').pwrite(b'x' * 512, 0)
    txn(d, delete('e'), act(BITMAP + 'remove', node='a', name='m'), delete('f', 'hard'))
    d.qmp.event('BLOCK_EXPORT_DELETED', id='e')
    d.qmp.event('BLOCK_EXPORT_DELETED', id='f')
    assert exports(d) == [] and d.bitmap('a', 'm') is None
    assert locks(d.path('a.raw')) == locks(d.path('b.raw')) == []


def test_deleting_frees_id_name_bitmaps_and_node_for_the_rest_of_the_list(d):
    d.cmd(BITMAP + 'add', node='a', name='m')
    d.export('a', 'e', bitmaps=['m'])
    with pytest.raises(QmpError, match="'m' on node 'a' is in use"):
        d.cmd(BITMAP + 'clear', node='a', name='m')
    txn(d, delete('exp-e'), act(BITMAP + 'clear', node='a', name='m'), add('exp-e', 'b', 'e', writable=True),
        act('blockdev-backup', job_id='j', device='c', target='a', sync='full'))
    assert exports(d) == [('exp-e', 'b', False)] and names(d) == ['e']
    assert 'S:null' in d.qmp.job_end('j')


def test_an_export_that_a_later_action_adds_again_has_new_contents(d):
    d.export('a', 'e')
    client(d, 'e').pwrite(b'a' * 512, 0)
    txn(d, delete('exp-e', 'hard'), add('exp-e', 'b', 'e', writable=True))
    client(d, 'e').pwrite(b'b' * 512, 0)
    assert content(d, 'a', 0, 512) == b'a' * 512 and content(d, 'b', 0, 512) == b'b' * 512
    assert exports(d)[0] == ('exp-e', 'b', False)
    d.qmp.event('BLOCK_EXPORT_DELETED', id='exp-e')
    assert exports(d) == [('exp-e', 'b', False)]


def test_safe_deletion_is_refused_in_a_list_too_and_the_list_undone(d):
    d.export('a', 'e')
    h = client(d, 'e')
    before = state(d)
    e = fails(d, add('f', 'b'), delete('exp-e'))
    assert "export 'exp-e' is in use by 1 connection" in e.desc and "'hard'" in e.desc
    assert e.data == {'action': 1, 'kind': 'block-export-del', 'phase': 'prepare', 'undone': True}
    assert state(d) == before
    h.pwrite(b'x' * 512, 0)


def test_a_deletion_that_is_undone_cuts_nobody_off(d):
    d.export('a', 'e')
    h = client(d, 'e')
    before = state(d)
    for _ in range(5):
        fails(d, delete('exp-e', 'hard'), add('exp-e', 'b', 'e'), ABORT)
        assert state(d) == before
        h.pwrite(b'x' * 512, 0)
        assert h.pread(512, 0) == b'x' * 512
    assert not deleted(d)
    h.shutdown()


def test_a_client_who_leaves_an_export_that_is_about_to_be_deleted(d):
    """Clients come and go all the time while lists delete their exports, for good or not."""
    for i in range(60):
        d.export('a', 'e')
        c = [Raw(d.nbd_path) for _ in range(4)]
        for one in c:
            one.go('e')
        d.qmp.send({'execute': 'transaction', 'arguments': {
            'actions': [delete('exp-e', 'hard'), add('g', 'b')] + [ABORT] * (i % 2)}})
        for one in c[i % 5:]:
            one.close()
        reply = d.qmp.reply()
        if i % 2:
            assert 'error' in reply and exports(d) == [('exp-e', 'a', False)]
            d.cmd('block-export-del', id='exp-e', mode='hard')
        else:
            assert 'return' in reply
            d.cmd('block-export-del', id='g')
        d.qmp.event('BLOCK_EXPORT_DELETED', id='exp-e')
        for one in c:
            one.close()
        assert exports(d) == []
    assert locks(d.path('a.raw')) == []


@pytest.mark.parametrize('as_list', [False, True])
def test_the_id_is_free_while_old_clients_wind_down(as_list):
    """A request of 5 s is in flight when its export is deleted: a new one takes its place."""
    with Daemon() as d:
        d.cmd('blockdev-add', {'driver': 'null-co', 'node-name': 'slow', 'size': MiB, 'latency-ns': 5 * 10**9})
        d.cmd('blockdev-add', {'driver': 'null-co', 'node-name': 'n', 'size': MiB})
        d.cmd(BITMAP + 'add', node='slow', name='m')
        d.export('slow', 'e', bitmaps=['m'])
        c = Raw(d.nbd_path)
        c.go('e')
        start_read(c)
        c.close()  # the read goes on
        new = add('exp-e', 'n', 'e', writable=True)
        if as_list:
            txn(d, delete('exp-e', 'hard'), new)
        else:
            d.cmd('block-export-del', id='exp-e', mode='hard')
            with pytest.raises(QmpError, match="'exp-e' is shutting down already"):
                d.cmd('block-export-del', id='exp-e')
            with pytest.raises(QmpError, match="'exp-e' is shutting down already"):
                d.cmd('block-export-set-node', id='exp-e', node_name='n')
            d.cmd('block-export-add', new['data'])
        assert exports(d) == [('exp-e', 'n', False), ('exp-e', 'slow', True)]
        assert d.bitmap('slow', 'm')['busy']
        with pytest.raises(QmpError, match="node 'slow' is in use by export 'exp-e'"):
            d.cmd('blockdev-del', node_name='slow')
        client(d, 'e').pwrite(b'x' * 512, 0)
        d.qmp.event('BLOCK_EXPORT_DELETED', id='exp-e')
        assert exports(d) == [('exp-e', 'n', False)]
        assert not d.bitmap('slow', 'm')['busy']
        d.cmd('blockdev-del', node_name='slow')
        d.cmd('block-export-del', id='exp-e', mode='hard')
        d.qmp.event('BLOCK_EXPORT_DELETED', id='exp-e')
        assert exports(d) == []


def test_events_of_deletions_leave_in_list_order(d):
    order = list('efgh')
    for e in order:
        d.export('a', e)
    random.Random(1).shuffle(order)
    txn(d, *[delete('exp-' + e) for e in order])
    assert deleted(d) == ['exp-' + e for e in order]  # before the answer


def test_old_commands_still_work_beside_the_actions(d):
    d.cmd('nbd-server-add', device='a', name='old')
    fails(d, delete('old'), ABORT)
    assert names(d) == ['old']
    txn(d, set_node('old', 'b'))
    d.cmd('nbd-server-remove', name='old')
    d.qmp.event('BLOCK_EXPORT_DELETED', id='old')
    txn(d, add('e', 'a'), add('f', 'b'))
    h = client(d, 'e')
    d.cmd('nbd-server-stop')
    assert sorted(deleted(d)) == ['e', 'f'] and exports(d) == []
    with pytest.raises(nbd.Error):
        h.pread(512, 0)
    e = fails(d, act(BITMAP + 'add', node='a', name='m'), add('e', 'a'))
    assert 'nbd-server-start' in e.desc and d.bitmap('a', 'm') is None


def test_exports_of_the_command_line_take_part(tmp_path):
    with Daemon(['--blockdev', 'null-co,node-name=n,size=1M', '--blockdev', 'null-co,node-name=o,size=1M',
                 '--export', 'type=nbd,id=e,node-name=n,writable=on']) as d:
        h = client(d, 'n')
        d.cmd('block-export-set-node', id='e', node_name='o')
        assert exports(d) == [('e', 'o', False)]
        h.pwrite(b'x' * 512, 0)
        txn(d, delete('e', 'hard'))
        d.qmp.event('BLOCK_EXPORT_DELETED', id='e')


# ---------------------------------------------------------------- set-node

@pytest.mark.parametrize('as_list', [False, True])
def test_the_node_is_swapped_under_a_client(d, as_list):
    d.export('a', 'e')
    h = client(d, 'e')
    h.pwrite(b'a' * 4096, 0)
    if as_list:
        assert txn(d, set_node('exp-e', 'b')) == {}
    else:
        assert d.cmd('block-export-set-node', id='exp-e', node_name='b') == {}
    assert h.pread(4096, 0) == bytes(4096)
    h.pwrite(b'b' * 4096, 4096)
    h.zero(4096, 8192)
    h.flush()
    assert exports(d) == [('exp-e', 'b', False)]
    assert [b['inserted']['node-name'] for b in d.cmd('query-block')] == ['b']
    assert content(d, 'a', 0, 8192) == b'a' * 4096 + bytes(4096)
    assert content(d, 'b', 0, 8192) == bytes(4096) + b'b' * 4096
    assert locks(d.path('a.raw')) == [] and locks(d.path('b.raw')) != []
    d.cmd('blockdev-del', node_name='a')
    with pytest.raises(QmpError, match="node 'b' is in use by export 'exp-e'"):
        d.cmd('blockdev-del', node_name='b')
    h.shutdown()


def test_block_status_is_that_of_the_new_node_and_bitmaps_stay(d):
    d.cmd(BITMAP + 'add', node='a', name='m')
    d.cmd(BITMAP + 'add', node='b', name='m')
    d.export('b', 'w')
    write(d, 'w', b'x' * MiB, 2 * MiB)
    d.export('a', 'e', bitmaps=['m'])
    h = client(d, 'e', 'base:allocation', 'qemu:dirty-bitmap:m')
    h.pwrite(b'x' * MiB, 0)

    def status():
        got = {}
        h.block_status(SIZE, 0, lambda name, off, ext, err: got.update({name: ext}))
        return {k: list(zip(v[::2], v[1::2])) for k, v in got.items()}
    old = status()
    assert old['base:allocation'] == [(MiB, 0), (3 * MiB, 3)]
    assert old['qemu:dirty-bitmap:m'] == [(MiB, 1), (3 * MiB, 0)]
    d.cmd('block-export-set-node', id='exp-e', node_name='b')
    new = status()
    assert new['base:allocation'] == [(2 * MiB, 3), (MiB, 0), (MiB, 3)]
    assert new['qemu:dirty-bitmap:m'] == old['qemu:dirty-bitmap:m']
    assert d.bitmap('a', 'm')['busy'] and not d.bitmap('b', 'm')['busy']
    assert h.pread(MiB, 0) == bytes(MiB) and h.pread(MiB, 2 * MiB) == b'x' * MiB
    with pytest.raises(QmpError, match="bitmap 'm' on node 'a' is in use"):
        d.cmd('blockdev-del', node_name='a')


def test_holes_of_the_new_node_travel_as_holes(d):
    """What a session remembers of where data lies is not taken from the old node."""
    d.export('a', 'e')
    c = Raw(d.nbd_path)
    c.go('e', mode='structured')
    for off in range(0, SIZE, MiB):
        assert c.request(WRITE, off, MiB, payload=b'x' * MiB).error == 0
    assert not c.request(READ, 0, MiB).holes
    d.cmd('block-export-set-node', id='exp-e', node_name='b')
    assert c.request(READ, 0, MiB).holes


@pytest.mark.parametrize('node, why', [
    ('zz', "node 'zz' not found"),
    ('big', f"'big' of {SIZE + 512} bytes: node 'a', which it shows, has {SIZE}"),
    ('ro', "node 'ro' is read-only"),
    ('b-file', "node 'b' has bitmaps or a job that would miss the changes"),
    ('c', "'c': it is in use by block job 'j'"),
    ('lk', 'another process')])
def test_set_node_is_refused(d, node, why):
    d.add_file('big', SIZE + 512)
    d.add_disk('ro', SIZE, **{'read-only': True})
    path = d.add_disk('lk', SIZE)
    d.cmd(BITMAP + 'add', node='b', name='m')
    d.cmd('blockdev-add', {'driver': 'null-co', 'node-name': 's', 'size': SIZE, 'latency-ns': 10**8})
    d.cmd('blockdev-backup', job_id='j', device='s', target='c', sync='full', speed=1, auto_dismiss=True)
    d.export('a', 'e')
    h = client(d, 'e')
    with open(path, 'r+b') as f:
        fcntl.fcntl(f, fcntl.F_OFD_SETLK, struct.pack('hhqqi4x', fcntl.F_RDLCK, 0, 201, 1, 0))
        before = state(d)
        with pytest.raises(QmpError, match=why) as plain:
            d.cmd('block-export-set-node', id='exp-e', node_name=node)
        e = fails(d, act(BITMAP + 'add', node='a', name='new'), set_node('exp-e', node), set_node('nope', 'a'))
        assert e.desc == plain.value.desc and e.data['action'] == 1
        assert state(d) == before
    h.pwrite(b'x' * 512, 0)
    assert content(d, 'a', 0, 512) == b'x' * 512


def test_set_node_of_what_is_not_there(d):
    with pytest.raises(QmpError, match="export 'nope' not found"):
        d.cmd('block-export-set-node', id='nope', node_name='a')
    e = fails(d, add('e', 'a'), delete('e'), set_node('e', 'b'))
    assert e.desc == "export 'e' not found" and e.data['action'] == 2
    assert exports(d) == []


def test_a_read_only_export_moves_to_a_read_only_node(d):
    d.add_disk('ro', SIZE, **{'read-only': True})
    d.export('a', 'e', writable=False)
    h = client(d, 'e')
    txn(d, set_node('exp-e', 'ro'), set_node('exp-e', 'ro'))
    assert h.is_read_only() and h.pread(512, 0) == bytes(512)


def test_an_export_that_is_writable_only_since_an_action_before(d):
    """What was taken beforehand, to read, does not do any more; to write is refused here."""
    path = d.add_disk('lk', SIZE)
    d.export('a', 'e', writable=False)
    with open(path, 'r+b') as f:
        fcntl.fcntl(f, fcntl.F_OFD_SETLK, struct.pack('hhqqi4x', fcntl.F_RDLCK, 0, 201, 1, 0))
        actions = [delete('exp-e'), add('exp-e', 'b', 'e', writable=True), set_node('exp-e', 'lk')]
        before = state(d)
        e = fails(d, *actions)
        assert e.data['action'] == 2 and 'another process' in e.desc
        assert state(d) == before and locks(path) == [201]
        txn(d, set_node('exp-e', 'lk'), set_node('exp-e', 'a'))
    txn(d, *actions)
    h = client(d, 'e')
    h.pwrite(b'x' * 512, 0)
    assert content(d, 'lk', 0, 512) == b'x' * 512 and locks(path) == [100, 101, 201, 203]


def test_a_filter_is_put_under_a_client_and_taken_away(d):
    """Both ways the file below is the same, and so are its locks."""
    d.cmd('object-add', {'qom-type': 'throttle-group', 'id': 'tg', 'limits': {'iops-total': 100000}})
    d.cmd('blockdev-add', {'driver': 'throttle', 'node-name': 't', 'throttle-group': 'tg', 'file': 'a'})
    d.export('a', 'e')
    h = client(d, 'e')
    h.pwrite(b'1' * 512, 0)
    txn(d, set_node('exp-e', 't'))
    assert h.pread(512, 0) == b'1' * 512
    h.pwrite(b'2' * 512, 0)
    fails(d, set_node('exp-e', 'a'), set_node('exp-e', 'b'), set_node('exp-e', 't'), ABORT)
    txn(d, set_node('exp-e', 'a'))
    d.cmd('blockdev-del', node_name='t')
    assert h.pread(512, 0) == b'2' * 512
    assert locks(d.path('a.raw')) == [100, 101, 201, 203]


# ---------------------------------------------------------------- undone

CHAINS = [
    [set_node('exp-e', 'b'), set_node('exp-e', 'c')],
    [set_node('exp-e', 'b'), set_node('exp-e', 'a'), set_node('exp-e', 'b')],
    [add('n', 'b', writable=True), set_node('n', 'c'), delete('n')],
    [add('n', 'b', bitmaps=[{'node': 'b', 'name': 'mc'}]), delete('n'), add('n', 'c'), set_node('n', 'b')],
    [delete('exp-e', 'hard'), add('exp-e', 'b', 'e', writable=True), set_node('exp-e', 'c')],
    [delete('exp-f'), delete('exp-e', 'hard'), add('exp-f', 'a', 'f'), add('exp-e', 'a', 'e'), delete('exp-f')],
    [delete('exp-f'), act(BITMAP + 'remove', node='b', name='mb'), act(BITMAP + 'add', node='b', name='mb'),
     add('exp-f', 'b', 'f', bitmaps=[{'node': 'b', 'name': 'mb'}])],
    [delete('exp-f'), act('blockdev-backup', job_id='j', device='c', target='b', sync='full')],
    [set_node('exp-f', 'c'), act('blockdev-backup', job_id='j', device='a', target='b', sync='full')],
]


@pytest.mark.parametrize('client_on', ['nobody', 'client'])
@pytest.mark.parametrize('chain', range(len(CHAINS)))
def test_chains_are_undone_exactly(d, chain, client_on):
    d.cmd(BITMAP + 'add', node='b', name='mb')
    d.cmd(BITMAP + 'add', node='b', name='mc')
    d.export('a', 'z1')
    d.export('a', 'e')
    d.export('b', 'f', bitmaps=['mb'])
    d.export('c', 'z2', writable=False)
    h = client(d, 'e') if client_on == 'client' else None
    before = state(d)
    actions = CHAINS[chain]
    e = fails(d, *actions, ABORT)
    assert e.data['action'] == len(actions) and e.data['kind'] == 'abort', e.desc
    assert state(d) == before
    got = txn(d, *actions, dry_run=True)
    assert got['outcome'] == 'would-commit' and all(r['outcome'] == 'exercised' and r['does'] for r in got['actions'])
    assert state(d) == before
    if h:
        h.pwrite(b'x' * 512, 0)
        assert content(d, 'a', 0, 512) == b'x' * 512
    assert not deleted(d)
    txn(d, *actions)


POOL = [
    add('e', 'a', writable=True), add('e', 'b', bitmaps=[{'node': 'b', 'name': 'm'}]), add('f', 'a', 'e'),
    add('f', 'b', bitmaps=['m'], writable=True), delete('e'), delete('f'), set_node('e', 'a'), set_node('e', 'b'),
    set_node('f', 'b'), set_node('f', 'c'), act(BITMAP + 'clear', node='b', name='m'),
    act(BITMAP + 'remove', node='b', name='m'), act(BITMAP + 'add', node='b', name='m'),
    act(BITMAP + 'rename', node='b', name='m', new_name='k'), act(BITMAP + 'add', node='a-file', name='w')]
SETUP = [add('x', 'a'), add('f', 'c', writable=True)]


def reset(d):
    for e in d.cmd('query-block-exports'):
        d.cmd('block-export-del', id=e['id'])
    for n in ('a', 'a-file', 'b'):
        for b in d.node(n).get('dirty-bitmaps', []):
            d.cmd(BITMAP + 'remove', node=n, name=b['name'])
    d.qmp.events.clear()
    txn(d, *SETUP, act(BITMAP + 'add', node='b', name='m'))


def one_by_one(d, actions):
    for i, a in enumerate(actions):
        try:
            d.cmd(a['type'], a['data'])
        except QmpError as e:
            return i, e.desc
    return None


def as_list(d, actions):
    try:
        txn(d, *actions)
    except QmpError as e:
        return e.data['action'], e.desc
    return None


def compare(d, actions):
    """The list ends as its actions do one by one, all or none; followed by abort it leaves nothing."""
    reset(d)
    before = state(d)
    assert as_list(d, [*actions, ABORT]) is not None
    assert state(d) == before, actions
    got = as_list(d, actions)
    if got:
        assert state(d) == before, actions
    after = state(d, generations=False)
    reset(d)
    assert one_by_one(d, actions) == got, actions
    if not got:
        assert state(d, generations=False) == after, actions
    return got is None


def test_lists_end_as_their_actions_do_one_by_one(d):
    rng = random.Random(4)
    done = sum(compare(d, pair) for pair in itertools.product(POOL, POOL))
    assert done > 20
    done = 0
    for _ in range(250):
        done += compare(d, rng.choices(POOL, k=rng.randint(3, 6)))
    assert done > 10


# ---------------------------------------------------------------- under load

def show(d, *nodes):
    """One after the other at the export `e`, in one list, whatever clients do meanwhile."""
    return again_after_a_rest(lambda: txn(d, *(set_node('exp-e', n) for n in nodes)))


class Writer(threading.Thread):
    """Writes each 64 KiB of a disk once, at some depth, the pattern being the offset; notes what
    was answered before and what was asked for after each mark(). It begins no more than it may: see let()."""
    DEPTH, UNIT, STEP = 16, 64 * KiB, 100

    def __init__(self, uri, size):
        super().__init__()
        self.h = nbd.NBD()
        self.h.connect_uri(uri)
        self.todo = list(range(0, size, self.UNIT))
        random.Random(3).shuffle(self.todo)
        self.total = len(self.todo)
        self.asked, self.answered, self.error = [], [], None
        self.quota, self.more = self.STEP, threading.Condition()

    def let(self):
        """It may begin some more."""
        with self.more:
            self.quota += self.STEP
            self.more.notify()

    def may_ask(self):
        return len(self.asked) < self.quota

    @classmethod
    def data(cls, offset):
        return struct.pack('>Q', offset + 1) * (cls.UNIT // 8)

    def run(self):
        flying = {}
        try:
            while self.todo or flying:
                with self.more:
                    if not flying and not self.more.wait_for(self.may_ask, DEADLINE):
                        return
                while self.todo and len(flying) < self.DEPTH and self.may_ask():
                    off = self.todo.pop()
                    self.asked.append(off)  # before it is sent: what is not here yet will be sent later
                    flying[self.h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(self.data(off))), off)] = off
                self.h.poll(1000)
                for cookie in [c for c in flying if self.h.aio_command_completed(c)]:
                    self.answered.append(flying.pop(cookie))
            self.h.shutdown()
        except nbd.Error as e:
            self.error = e


def test_every_write_is_on_one_side_of_the_swap():
    size = 128 * MiB
    with Daemon() as d:
        for n in 'ab':
            d.add_disk(n, size)
            d.cmd(BITMAP + 'add', node=n, name='m', granularity=64 * KiB)
        d.export('a', 'e')
        w = Writer(d.uri('e'), size)
        marks, node = [], 'a'  # (answered before the command, asked for before its reply, node before)
        w.start()
        while w.is_alive():
            n = len(w.answered)
            wait_until('writes', lambda: len(w.answered) > n + 20 or not w.is_alive())
            other = 'ab'[node == 'a']
            answered = len(w.answered)
            if len(marks) % 3 == 2:
                fails(d, set_node('exp-e', other), set_node('exp-e', node), set_node('exp-e', other), ABORT)
                continue_with = node
            else:
                show(d, other)
                continue_with = other
            marks.append((answered, len(w.asked), node, continue_with))
            w.let()
            node = continue_with
        w.join()
        assert w.error is None and len(w.answered) == w.total
        assert len(marks) > 8
        files = {n: open(d.path(n + '.raw'), 'rb').read() for n in 'ab'}
        where = {}
        for off in w.asked:
            got = {n: files[n][off:off + w.UNIT] for n in 'ab'}
            there = [n for n in 'ab' if got[n] == w.data(off)]
            assert len(there) == 1, f'{off}: {there}'
            assert got['ab'[there[0] == 'a']] == bytes(w.UNIT), f'{off} is partly on the other side'
            where[off] = there[0]
        assert set(where.values()) == {'a', 'b'}
        place = {off: i for i, off in enumerate(w.asked)}
        done_at = {off: i for i, off in enumerate(w.answered)}
        start, before = 0, 0
        for answered, asked, node, then in [*marks, (w.total, w.total, node, node)]:
            # Asked for after the reply to the last swap, answered before the next: no doubt where.
            for off in w.asked[start:]:
                if place[off] >= start and done_at[off] < answered:
                    assert where[off] == node, f'{off} on {where[off]}, not on {node}'
            start = asked
        for n in 'ab':
            assert {off for r, ln in d.ranges(n, 'm') for off in range(r, r + ln, w.UNIT)} == {
                off for off in where if where[off] == n}, f'bitmap of {n}'


def test_qemu_io_notices_nothing(d):
    """Its own pattern, written again and again through both nodes, is read back by it."""
    d.export('a', 'e')
    args = [which('qemu-io'), '-f', 'raw']
    for i in range(300):
        args += ['-c', f'aio_write -q -P {i % 256} 0 1M', '-c', 'aio_write -z -q 1M 512k', '-c', 'aio_flush']
    p = subprocess.Popen([*args, d.uri('e')], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    swaps = 0
    while p.poll() is None:
        show(d, 'ba'[swaps % 2])
        swaps += 1
    out = p.stdout.read()
    assert p.returncode == 0 and 'failed' not in out and 'rror' not in out, out
    assert swaps > 5


def test_clients_that_are_killed_amid_swaps(d):
    d.export('a', 'e')
    rng = random.Random(5)
    for i in range(15):
        p = subprocess.Popen([which('qemu-io'), '-f', 'raw', *['-c', 'aio_write -q 0 3M', '-c', 'aio_read -q 0 3M'] * 100,
                              d.uri('e')], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for k in range(rng.randint(1, 12)):
            show(d, 'ab'[k % 2])
        p.send_signal(signal.SIGKILL)
        show(d, 'c', 'a')
        p.wait()
    d.cmd('block-export-del', id='exp-e', mode='hard')
    d.qmp.event('BLOCK_EXPORT_DELETED', id='exp-e')
    assert [locks(d.path(n + '.raw')) for n in 'abc'] == [[], [], []]


def test_reads_that_go_straight_from_the_file(d):
    """Long reads of cached data are sent from the page cache: of the node that was shown when they were admitted."""
    for n in 'ab':
        d.export(n, 'w' + n)
        write(d, 'w' + n, n.encode() * SIZE, 0)
    d.export('a', 'e')
    stop, wrong, seen = threading.Event(), [], set()

    def reader():
        h = client(d, 'e')
        while not stop.is_set():
            got = h.pread(MiB, MiB)
            seen.add(bytes(got[:1]))
            if got != got[:1] * MiB or got[:1] not in (b'a', b'b'):
                wrong.append(bytes(got[:64]))
        h.shutdown()
    threads = [threading.Thread(target=reader) for _ in range(3)]
    for t in threads:
        t.start()
    for i in range(150):
        show(d, 'ba'[i % 2])
    turn = itertools.count()
    wait_until('both nodes were read', lambda: len(seen) == 2 or show(d, 'ab'[next(turn) % 2]))
    stop.set()
    for t in threads:
        t.join()
    assert not wrong


# ---------------------------------------------------------------- what is told

def test_dry_run_and_explain_tell_about_exports(d):
    d.export('a', 'e')
    h = client(d, 'e')
    got = txn(d, set_node('exp-e', 'b'), add('f', 'a', writable=True), delete('exp-e', 'hard'), dry_run=True)['actions']
    assert got[0]['sees'] == "export 'exp-e' shows node 'a' to 1 connection" and got[0]['does'] == "it shows node 'b'"
    assert got[1]['sees'] == f"node 'a' of {SIZE} bytes"
    assert got[1]['does'] == "export 'f' serves it for writing as 'f'"
    assert got[2]['sees'] == "export 'exp-e' of node 'b' with 1 connection"
    assert got[2]['does'] == 'the export ends, and its clients are cut off'
    h.pwrite(b'x' * 512, 0)
    got = txn(d, delete('exp-e'), add('exp-e', 'b', 'e'), set_node('exp-e', 'c'), act(BITMAP + 'add', node='c', name='m'),
              explain=True)
    assert {'export': 'exp-e', 'requests': 'all'} in got['holds'] and {'node': 'c', 'requests': 'all'} in got['holds']
    why = {(e['action'], e['on']): [b['name'] for b in e['because']] for e in got['dependencies']}
    assert "export 'exp-e'" in why[(1, 0)] and "NBD export name 'e'" in why[(1, 0)]
    assert "export 'exp-e'" in why[(2, 1)]


def test_a_disk_that_hangs_does_not_keep_its_export():
    """Deleting holds nobody: it neither waits for what is in flight nor, as others have to that hold
    a disk, for the second of peace after one that could not be held."""
    with Daemon() as d:
        d.cmd('blockdev-add', {'driver': 'null-co', 'node-name': 'n', 'size': MiB, 'latency-ns': 9 * 10**9})

        def delete_in_that_second(e):
            d.export('n', e)
            c = Raw(d.nbd_path)
            c.go(e)
            start_read(c)
            assert "'n'" in fails(d, act(BITMAP + 'add', node='n', name='m')).desc
            before = time.monotonic()
            txn(d, delete('exp-' + e, 'hard'))
            took = time.monotonic() - before
            d.qmp.event('BLOCK_EXPORT_DELETED', id='exp-' + e)
            return took
        # Whatever else this machine does may hold up one, but not all of them.
        assert any(delete_in_that_second(e) < 0.9 for e in 'efg')


# ---------------------------------------------------------------- nodes that come and go beside

def node_add(name, file):
    return act('blockdev-add', driver='raw', node_name=name, file=file)


NEW_FILE = {'driver': 'null-co', 'node-name': 'n-file', 'size': SIZE}


@pytest.mark.parametrize('how', ['dry', 'abort', 'record'])
@pytest.mark.parametrize('make', [
    [node_add('n', NEW_FILE), add('x', 'n', writable=True)], [node_add('n', NEW_FILE), add('x', 'n-file')],
    [node_add('n', 'c-file'), add('x', 'n', writable=True)], [node_add('n', NEW_FILE), set_node('e', 'n')],
    [node_add('n', NEW_FILE), set_node('e', 'n-file')], [node_add('n', 'c-file'), set_node('e', 'n')]])
def test_a_new_node_and_its_export_are_undone_together(d, make, how):
    """What the export took of the node is given back after the node has gone out of sight."""
    txn(d, add('e', 'a', writable=True))
    before = d.cmd('query-named-block-nodes'), d.cmd('query-block-exports')
    if how == 'dry':
        assert txn(d, *make, dry_run=True)['outcome'] == 'would-commit'
    elif how == 'abort':
        assert fails(d, *make, ABORT).data['action'] == 2
    else:
        txn(d, *make)
        back = set_node('e', 'a') if make[1]['type'].endswith('set-node') else delete('x')
        txn(d, back, act('blockdev-del', node_name='n'))
    assert (d.cmd('query-named-block-nodes'), d.cmd('query-block-exports')) == before
    write(d, 'e', b'\x5a' * 4096, 0)


@pytest.mark.parametrize('take', [delete('e'), set_node('e', 'b')])
def test_an_export_and_its_node_go_in_one_list(d, take):
    txn(d, add('e', 'a', writable=True))
    before = d.cmd('query-named-block-nodes'), d.cmd('query-block-exports')
    gone = [take, act('blockdev-del', node_name='a')]
    assert fails(d, *gone, node_add('n', 'c-file'), add('x', 'n', writable=True), ABORT).data['action'] == 4
    assert (d.cmd('query-named-block-nodes'), d.cmd('query-block-exports')) == before
    write(d, 'e', b'\x5a' * 4096, 0)
    txn(d, *gone)
    assert 'a' not in [n['node-name'] for n in d.cmd('query-named-block-nodes')]
