# SPDX-License-Identifier: Apache-2.0
"""What nobody should send: a clear error or a right result, the daemon up, the state untouched."""
import contextlib
import json
import os
import re
import socket
import threading

import nbd
import pytest

from harness import DEADLINE, KiB, MiB, Daemon, Qmp, QmpError

BITMAP = 'block-dirty-bitmap-'
FORMS = ['plain', 'list']
# Characters of one to four bytes, controls, both directions, a combining one, a name of many bytes.
WORDS = ['a', ' ', '.', '/', '..', '\n', '\t', "'", '"', '\\', '%s%n', '\u00e9', '\u20ac', '\U0001f4be', 'e\u0301',
         '\u202eabc', '\u0000', '\x7f', '\ufeff', 'x' * 1022 + 'y', '\u20ac' * 341, '\U0001f4be' * 255 + 'abc']

# Each bitmap and where it is dirty: no two in one place, or a merge would not show.
BITS = {('d0', 'a'): MiB, ('d0', 't'): 3 * MiB, ('d1', 'b'): 2 * MiB, ('small', 's'): 512 * KiB}


@pytest.fixture(scope='module')
def daemon():
    with Daemon() as d:
        d.add_disk('d0', 4 * MiB)
        d.add_disk('d1', 4 * MiB)
        d.add_disk('small', MiB)
        for (node, name), at in BITS.items():
            d.cmd(BITMAP + 'add', node=node, name=name, **({'granularity': 4096} if name == 't' else {}))
            write(d, node, at)
            d.cmd(BITMAP + 'disable', node=node, name=name)
        for node, name in BITS:
            d.cmd(BITMAP + 'enable', node=node, name=name)
            assert d.ranges(node, name) == [(BITS[node, name], 64 * KiB)]
        yield d


def write(d, node, at):
    """Of a guest; nothing of its export is left."""
    d.export(node)
    h = nbd.NBD()
    h.connect_uri(d.uri(node))
    h.pwrite(b'\x5a' * 64 * KiB, at)
    h.shutdown()
    d.cmd('block-export-del', id='exp-' + node)
    d.qmp.event('BLOCK_EXPORT_DELETED')


def act(kind, **data):
    return {'type': BITMAP + kind, 'data': {k.replace('_', '-'): v for k, v in data.items()}}


def send(d, form, kind, **data):
    data = {k.replace('_', '-'): v for k, v in data.items()}
    if form == 'plain':
        return d.cmd(BITMAP + kind, data)
    return d.cmd('transaction', actions=[{'type': BITMAP + kind, 'data': data}])


def dump(d):
    nodes = d.cmd('query-named-block-nodes')
    return nodes, d.cmd('query-jobs'), d.cmd('query-block-exports'), [
        d.sha256(n['node-name'], b['name']) for n in nodes for b in n.get('dirty-bitmaps', [])]


@pytest.fixture
def d(daemon):
    """The state has to be afterwards what it was before."""
    before = dump(daemon)
    yield daemon
    assert dump(daemon) == before


# ---------------------------------------------------------------- merge

@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('source', ['no', {'node': 'd1', 'name': 'no'}, {'node': 'zz', 'name': 'a'}])
@pytest.mark.parametrize('place', ['alone', 'first', 'middle', 'last'])
def test_a_missing_source_is_an_error_wherever_it_stands(d, form, source, place):
    good = ['a', {'node': 'd1', 'name': 'b'}]
    sources = {'alone': [source], 'first': [source, *good], 'middle': [good[0], source, good[1]],
               'last': [*good, source]}[place]
    with pytest.raises(QmpError, match="'(no|zz)'.* not found"):
        send(d, form, 'merge', node='d0', target='t', bitmaps=sources)


@pytest.mark.parametrize('position', range(3))
def test_a_failing_merge_takes_the_list_with_it(d, position):
    actions = [act('add', node='d1', name='n1'), act('add', node='d1', name='n2')]
    actions.insert(position, act('merge', node='d0', target='t', bitmaps=['a', 'no']))
    e = pytest.raises(QmpError, d.cmd, 'transaction', actions=actions).value
    assert e.data == {'action': position, 'kind': BITMAP + 'merge', 'phase': 'prepare', 'undone': True}


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('data, why', [
    ({'target': 'no', 'bitmaps': ['a']}, "'no' on node 'd0' not found"),
    ({'target': 'no', 'bitmaps': []}, "'no' on node 'd0' not found"),
    ({'target': 't', 'bitmaps': [{'node': 'small', 'name': 's'}]}, '1048576 bytes.* does not fit .*4194304 bytes'),
    ({'target': 't', 'bitmaps': ['a'], 'node': 'zz'}, "node 'zz' not found")])
def test_targets_and_sizes(d, form, data, why):
    with pytest.raises(QmpError, match=why):
        send(d, form, 'merge', **{'node': 'd0', **data})


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('sources', [[], ['t'], ['t', 't', 't'], ['a'] * 5000, [{'node': 'd1', 'name': 'b'}, 'a'] * 2500])
def test_nothing_oneself_and_thousands_are_fine(d, form, sources):
    """Into a copy that stands for t: then t itself, its generation too, is what it was."""
    d.cmd(BITMAP + 'rename', node='d0', name='t', new_name='kept')
    d.cmd(BITMAP + 'copy', node='d0', name='t', bitmaps=['kept'])
    send(d, form, 'merge', node='d0', target='t', bitmaps=sources)
    of = {'t'} | {s if isinstance(s, str) else s['name'] for s in sources}
    assert d.ranges('d0', 't') == sorted((at, 64 * KiB) for (_, name), at in BITS.items() if name in of)
    assert d.ranges('d0', 'a') == [(MiB, 64 * KiB)] and d.ranges('d1', 'b') == [(2 * MiB, 64 * KiB)]
    d.cmd(BITMAP + 'remove', node='d0', name='t')
    d.cmd(BITMAP + 'rename', node='d0', name='kept', new_name='t')


# ---------------------------------------------------------------- names and numbers

@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('word', WORDS, ids=lambda w: ascii(w)[1:13] + str(len(w.encode())))
def test_any_name_of_up_to_1023_bytes(d, form, word):
    if '\0' in word:  # a name ends at its first zero byte in every C library
        with pytest.raises(QmpError):
            send(d, form, 'add', node='d1', name=word)
        return
    send(d, form, 'add', node='d1', name=word)
    assert d.bitmap('d1', word)['count'] == 0
    send(d, form, 'rename', node='d1', name=word, new_name='plain')
    send(d, form, 'rename', node='d1', name='plain', new_name=word)
    send(d, form, 'copy', node='d1', name='copy', bitmaps=[word])
    for name in ('copy', word):
        send(d, form, 'remove', node='d1', name=name)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('kind, data', [
    ('add', {'name': ''}), ('add', {'name': 'x' * 1024}), ('add', {'name': '\u20ac' * 342}),
    ('rename', {'name': 'b', 'new_name': ''}), ('rename', {'name': 'b', 'new_name': '\U0001f4be' * 256}),
    ('copy', {'name': '', 'bitmaps': ['b']}), ('copy', {'name': 'x' * 1024, 'bitmaps': ['b']}),
    ('clear', {'name': ''}), ('remove', {'name': 'x' * 100000})])
def test_names_that_are_none(d, form, kind, data):
    e = pytest.raises(QmpError, send, d, form, kind, node='d1', **data).value
    assert 'd1' in e.desc or 'longer than 1023 bytes' in e.desc
    assert len(e.desc) < 400


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('kind', ['add', 'copy'])
@pytest.mark.parametrize('granularity, fine', [(0, 0), (511, 0), (512, 1), (2 ** 31, 1), (2 ** 32, 0), (-1, 0), (1.5, 0)])
def test_granularities(d, form, kind, granularity, fine):
    data = {'node': 'd1', 'name': 'g', 'granularity': granularity, **({'bitmaps': ['b']} if kind == 'copy' else {})}
    if fine:
        send(d, form, kind, **data)
        assert d.bitmap('d1', 'g')['granularity'] == granularity
        send(d, form, 'remove', node='d1', name='g')
    else:
        with pytest.raises(QmpError, match='granularity'):
            send(d, form, kind, **data)


# ---------------------------------------------------------------- shapes

GOOD = act('add', node='d1', name='never')


@pytest.mark.parametrize('bad, path', [
    ({'type': 'nosuch', 'data': {}}, r'actions\[1\].type'), ({'type': 5, 'data': {}}, r'actions\[1\].type'),
    ({'type': BITMAP + 'add'}, r'actions\[1\].data'), ({'data': {}}, r'actions\[1\].type'),
    ({**GOOD, 'more': 1}, r'actions\[1\].more'), (act('add', node='d1', name=5), r'actions\[1\].data.name'),
    (act('add', node='d1', name='x', disabled='yes'), r'actions\[1\].data.disabled'),
    (act('add', node='d1', name='x', nosuch=1), r'actions\[1\].data.nosuch'), (act('add', node='d1'), r'actions\[1\].data.name'),
    (act('merge', node='d1', target='x', bitmaps=[{'node': 'd1'}]), r'actions\[1\].data.bitmaps\[0\].name'),
    (act('merge', node='d1', target='x', bitmaps=['b', [], 'b']), r'actions\[1\].data.bitmaps\[1\]'),
    (act('copy', node='d1', name='x', bitmaps='b'), r'actions\[1\].data.bitmaps'),
    ({'type': 'blockdev-backup', 'data': {'job-id': 'j', 'device': 'd0', 'target': 'd1', 'sync': 'full',
                                          'x-perf': {'max-workers': {}}}}, r'actions\[1\].data.x-perf.max-workers'),
    ({'type': 'abort', 'data': {'now': True}}, r'actions\[1\].data.now'),
    ('abort', r'actions\[1\]'), (None, r'actions\[1\]'), ([], r'actions\[1\]')])
def test_a_wrong_type_deep_inside_is_named_by_its_path(d, bad, path):
    e = pytest.raises(QmpError, d.cmd, 'transaction', actions=[GOOD, bad]).value
    assert re.search(path, e.desc), e.desc
    assert e.data is None


@pytest.mark.parametrize('properties, path', [
    ({'completion-mode': 'both'}, 'properties.completion-mode'), ({'id': 5}, 'properties.id'),
    ({'dry-run': 'on'}, 'properties.dry-run'), ({'nosuch': 1}, 'properties.nosuch'), ([], 'properties')])
def test_wrong_properties(d, properties, path):
    with pytest.raises(QmpError, match=path):
        d.cmd('transaction', {'actions': [GOOD], 'properties': properties})


# ---------------------------------------------------------------- long, slow, dying

def test_a_list_of_100_000_actions(d):
    adds = [act('add', node='d1', name=f'n{i}') for i in range(100_000)]
    with pytest.raises(QmpError, match='aborted') as e:
        d.cmd('transaction', actions=[*adds[:-1], {'type': 'abort', 'data': {}}])
    assert e.value.data['action'] == 99_999
    assert [b['name'] for b in d.node('d1')['dirty-bitmaps']] == ['b']


def answers(path, stop, out):
    """How often a client that asks all the time was answered."""
    other = Qmp(path)
    while not stop.is_set():
        other.cmd('query-version')
        out.append(True)
    other.close()


def test_a_list_of_100_000_actions_that_is_carried_out(d):
    """And others are answered meanwhile."""
    text = json.dumps({'execute': 'transaction', 'arguments': {'actions': [
        act('add', node='d1', name='x'), act('remove', node='d1', name='x')] * 50_000}}).encode()
    stop, out, q = threading.Event(), [], Qmp(d.qmp_path)
    q.sock.settimeout(10 * DEADLINE)  # a sanitizer on a busy machine needs half a minute
    watcher = threading.Thread(target=answers, args=(d.qmp_path, stop, out))
    watcher.start()
    try:
        q.sock.sendall(text)  # as one piece: making it here would keep the watcher from asking
        before = len(out)
        assert q.reply() == {'return': {}}
        meanwhile = len(out) - before
    finally:
        stop.set()
        watcher.join()
    q.close()
    done = d.cmd('query-transactions')[0]
    assert (done['n-actions'], done['outcome']) == (100_000, 'committed')
    assert meanwhile >= 10, meanwhile


def longest_silence(d, stop, out):
    """Seconds of the daemon's own that a client which asks all the time had to wait, at most."""
    other, longest = Qmp(d.qmp_path), 0
    while not stop.is_set():
        began = d.cpu_seconds()
        other.cmd('query-version')
        longest = max(longest, d.cpu_seconds() - began)
    out.append(longest)
    other.close()


@pytest.mark.parametrize('properties', [{}, {'id': ''}, {'explain': True}, {'dry-run': True}], ids=str)
def test_others_are_answered_while_a_long_list_is_read_run_and_forgotten(d, properties):
    """Reading 10 MB of JSON at one go, or hashing it for its id, takes longer than carrying it out."""
    actions = [act('enable', node='d0', name='a')] * 30_000
    if 'explain' in properties:  # of names that have nothing to do with each other
        actions = [act('enable', node='d0', name=f'n{i}') for i in range(30_000)]
    for turn in range(20):
        if 'id' in properties:
            properties = {'id': f'long{turn}'}
        text = json.dumps({'execute': 'transaction', 'arguments': {
            'actions': actions, 'properties': properties}}).encode()
        stop, out = threading.Event(), []
        watcher = threading.Thread(target=longest_silence, args=(d, stop, out))
        watcher.start()
        began = d.cpu_seconds()
        d.qmp.sock.sendall(text)
        while not d.qmp.buf.endswith(b'\n'):
            d.qmp.buf += d.qmp.sock.recv(1 << 16)
        took = d.cpu_seconds() - began
        stop.set()
        watcher.join()
        assert 'return' in d.qmp.read()  # parsing it here would keep the watcher from asking
        if out[0] < took / 6:
            return
    pytest.fail(f'another client waited {out[0]:.3f} s of the {took:.3f} s that the list took')


@pytest.mark.parametrize('turns', range(1, 80, 6))
def test_quit_at_any_point_of_a_long_list(turns):
    """While it is read, hashed, run or answered: it happens as a whole or is refused, and the daemon ends."""
    with Daemon() as d:
        actions = [{'type': 'blockdev-add', 'data': {'driver': 'null-co', 'node-name': 'n', 'size': MiB}},
                   *(act('add', node='n', name=f'n{i}') for i in range(20_000))]
        text = json.dumps({'execute': 'transaction', 'arguments': {'actions': actions, 'properties': {'id': 'x'}}})
        other = Qmp(d.qmp_path)

        def send():
            with contextlib.suppress(OSError):  # the daemon need not read all of it
                d.qmp.sock.sendall(text.encode())
        sender = threading.Thread(target=send)
        sender.start()
        for _ in range(turns):
            other.cmd('query-version')
        other.cmd('quit')
        other.close()
        sender.join()
        d.quit_check = False
        assert d.proc.wait(60) == 0 and 'Sanitizer' not in d.log() and 'assert' not in d.log(), d.log()


def over(name, below):
    return {'type': 'blockdev-add', 'data': {'driver': 'raw', 'node-name': name, 'file': below}}


DELETE_N = {'type': 'blockdev-del', 'data': {'node-name': 'n'}}
CIRCLES = {
    'itself': [over('n', 'n'), DELETE_N],
    'inside': [over('n', {'driver': 'raw', 'node-name': 'm', 'file': 'n'}), DELETE_N],
    'inside, by the inner': [over('n', {'driver': 'raw', 'node-name': 'm', 'file': 'n'}), over('o', 'm'), over('m', 'o'),
                             {'type': 'blockdev-del', 'data': {'node-name': 'm'}}],
    'what stands on it': [over('below', 'above'), {'type': 'blockdev-del', 'data': {'node-name': 'above'}}],
    'exported': [over('n', 'n'), {'type': 'block-export-add', 'data': {
        'type': 'nbd', 'id': 'e', 'node-name': 'n', 'name': 'e', 'writable': True, 'bitmaps': ['b']}}],
    'tracked': [over('n', 'n'), act('add', node='n', name='b'), act('add', node='d0', name='b'), DELETE_N],
}


@pytest.mark.parametrize('properties', [{}, {'dry-run': True}, {'explain': True}], ids=str)
@pytest.mark.parametrize('actions', CIRCLES.values(), ids=CIRCLES)
def test_nodes_that_would_stand_on_themselves(d, actions, properties):
    d.cmd('blockdev-add', driver='null-co', node_name='below')
    d.cmd('blockdev-add', driver='raw', node_name='above', file='below')
    before = [n['node-name'] for n in d.cmd('query-named-block-nodes')]
    reply = d.qmp.raw({'execute': 'transaction', 'arguments': {'actions': actions, 'properties': properties}})
    assert ('return' in reply) == bool(properties), reply
    if 'dry-run' in properties:
        assert reply['return']['outcome'] == 'would-fail' and reply['return']['failed-action'] == 0
    assert [n['node-name'] for n in d.cmd('query-named-block-nodes')] == before
    d.cmd('blockdev-del', node_name='above')
    d.cmd('blockdev-del', node_name='below')


def test_a_list_too_long_for_the_monitor_is_an_error(d):
    """The limit of one message is QEMU's: 2,097,152 tokens."""
    more = [act('merge', node='d0', target='t', bitmaps=['a', 'a', 'a', 'a']) for _ in range(100_000)]
    with pytest.raises(QmpError, match='more than 2097152 parts'):
        d.cmd('transaction', actions=more)


def test_a_list_that_arrives_a_byte_at_a_time(d):
    q = Qmp(d.qmp_path)
    q.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    text = json.dumps({'execute': 'transaction', 'id': 7, 'arguments': {'actions': [
        act('add', node='d1', name='\u20ac'), act('remove', node='d1', name='\u20ac')]}}, ensure_ascii=False).encode()
    for i in range(len(text)):
        q.sock.send(text[i:i + 1])
        if i % 50 == 0:  # others are served meanwhile
            d.cmd('query-version')
    assert q.reply() == {'return': {}, 'id': 7}
    q.close()


@pytest.mark.parametrize('cut', [0.2, 0.9, 0.999])
def test_half_a_list_does_nothing(d, cut):
    q = Qmp(d.qmp_path)
    text = json.dumps({'execute': 'transaction', 'arguments': {'actions': [act('add', node='d1', name='half')] * 20}})
    q.sock.sendall(text[:int(len(text) * cut)].encode())
    q.close()
    d.cmd('query-version')
    assert d.bitmap('d1', 'half') is None


def test_a_client_that_dies_between_request_and_answer(d):
    """Its list happens, whole, or not at all."""
    n = 2000
    for _ in range(10):
        q = Qmp(d.qmp_path)
        q.send({'execute': 'transaction', 'arguments': {'actions': [act('add', node='d1', name=f'x{i}') for i in range(n)]}})
        os.close(q.sock.detach())
        assert len(d.node('d1')['dirty-bitmaps']) in (1, n + 1)
        try:  # it may not have been its turn yet; then this list fails, whole
            d.cmd('transaction', actions=[act('remove', node='d1', name=f'x{i}') for i in range(n)])
        except QmpError as e:
            assert e.data['action'] == 0
        assert len(d.node('d1')['dirty-bitmaps']) in (1, n + 1)
    for name in [b['name'] for b in d.node('d1')['dirty-bitmaps'] if b['name'] != 'b']:
        d.cmd(BITMAP + 'remove', node='d1', name=name)


def test_two_clients_with_lists_that_exclude_each_other(d):
    """All of one or all of the other, every time; who comes second hears why."""
    clients = [Qmp(d.qmp_path) for _ in range(2)]
    outcome = [None, None]
    start = threading.Barrier(2)

    def run(i, order):
        start.wait()
        try:
            clients[i].cmd('transaction', actions=[act('add', node='d1', name=name) for name in order])
            outcome[i] = True
        except QmpError as e:
            assert e.data['undone'] and 'exists already' in e.desc
            outcome[i] = False
    for _ in range(50):
        names = [f'c{i}' for i in range(20)]
        threads = [threading.Thread(target=run, args=(i, names[::1 - 2 * i])) for i in range(2)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert sorted(outcome) == [False, True]
        rows = [b['name'] for b in d.node('d1')['dirty-bitmaps'] if b['name'] != 'b']
        assert rows == (names[::-1] if outcome[0] else names)
        d.cmd('transaction', actions=[act('remove', node='d1', name=n) for n in names])
    for q in clients:
        q.close()
