# SPDX-License-Identifier: Apache-2.0
"""Throttling: groups, the nodes that wait for them, and what must not wait. How many requests a rate
lets through is counted to the request by drivers/throttle_test.c, with a made-up clock; here it is a
whole daemon, and qemu-storage-daemon beside it says what is taken and what is shown."""
import json
import os
import signal
import subprocess
import time

import pytest


from harness import BIN, DEADLINE, Daemon, KiB, MiB, QmpError, qemu_io, which

nbd = pytest.importorskip('nbd', reason='python3-libnbd')
needs_oracle = pytest.mark.skipif(not which('qemu-storage-daemon'), reason='qemu-storage-daemon')
MOST = 10**15
FIELDS = [f'{kind}-{side}{rest}' for kind in ('bps', 'iops') for side in ('total', 'read', 'write')
          for rest in ('', '-max', '-max-length')] + ['iops-size']


@pytest.fixture(scope='module')
def oracle():
    if not which('qemu-storage-daemon'):
        pytest.skip('qemu-storage-daemon')
    with Daemon(kind='qsd') as d:
        yield d


def add_group(d, name='tg', **limits):
    d.cmd('object-add', {'qom-type': 'throttle-group', 'id': name,
                         'limits': {k.replace('_', '-'): v for k, v in limits.items()}})


def set_limits(d, name='tg', **limits):
    d.cmd('qom-set', path='/objects/' + name, property='limits',
          value={k.replace('_', '-'): v for k, v in limits.items()})


def add_throttled(d, node='t0', group='tg', size=64 * MiB, file=None, **options):
    d.cmd('blockdev-add', {'driver': 'throttle', 'node-name': node, 'throttle-group': group, **options,
                           'file': file or {'driver': 'null-co', 'size': size}})


class Client:
    """An NBD client that sends without waiting for replies."""

    def __init__(self, uri):
        self.h = nbd.NBD()
        self.h.connect_uri(uri)
        self.waiting = []
        self.began = None  # the first request since all were answered: before the daemon can have seen it

    def send(self, n, length=4 * KiB, write=False):
        data = bytearray(b'w' * length)
        if self.began is None:
            self.began = time.monotonic()
        for i in range(n):
            if write:
                self.waiting.append(self.h.aio_pwrite(data, i * length))
            else:
                self.waiting.append(self.h.aio_pread(nbd.Buffer(length), i * length))

    def settle(self):
        """All that was sent has arrived: a flush is free and is read after it."""
        self.h.flush()

    def poll(self):
        self.waiting = [c for c in self.waiting if not self.h.aio_command_completed(c)]
        return len(self.waiting)

    def finish(self, deadline=DEADLINE):
        """Wait for all replies; seconds since the first of these requests was sent, never less than the
        daemon took, however long the system let this client wait for a processor."""
        end = time.monotonic() + deadline
        while self.poll():
            left = end - time.monotonic()
            assert left > 0, f'{len(self.waiting)} requests still wait'
            self.h.poll(int(left * 1000) + 1)
        began, self.began = self.began, None
        return time.monotonic() - began


def took(fn, *args, **kw):
    began = time.monotonic()
    fn(*args, **kw)
    return time.monotonic() - began


# ---------------------------------------------------------------- what is taken

LIMITS = [
    {}, {'iops-total': 0}, {'iops-total': 1}, {'iops-total': MOST}, {'iops-total': MOST + 1}, {'bps-total': -1},
    {'iops-total': 1, 'iops-read': 1}, {'iops-total': 1, 'iops-write': 1}, {'iops-total': 1, 'bps-read': 1},
    {'bps-total': 1, 'bps-read': 1}, {'iops-read': 1, 'iops-write': 2}, {'iops-total-max': 1},
    {'iops-total': 10, 'iops-total-max': 9}, {'iops-total': 10, 'iops-total-max': 10},
    {'iops-total': 10, 'iops-total-max': MOST + 1}, {'iops-total': 10, 'iops-read-max': 20},
    {'iops-read': 10, 'iops-total-max': 20}, {'iops-read': 10, 'iops-read-max': 20, 'iops-total-max': 20},
    {'iops-total': 10, 'iops-total-max-length': 1}, {'iops-total': 10, 'iops-total-max-length': 2},
    {'iops-total-max-length': 2}, {'iops-total-max-length': 0},
    {'iops-total': 10, 'iops-total-max': 20, 'iops-total-max-length': -1},
    {'iops-total': 10, 'iops-total-max': 20, 'iops-total-max-length': 5},
    {'iops-total': 10, 'iops-total-max': MOST, 'iops-total-max-length': 2},
    {'iops-total': 10, 'iops-total-max': 10**6, 'iops-total-max-length': 10**9},
    {'iops-total': 10, 'iops-total-max': 10**6, 'iops-total-max-length': 10**9 + 1},
    {'iops-total': 10, 'iops-total-max': 20, 'iops-total-max-length': 2**32 - 1},
    {'iops-total': 10, 'iops-total-max': 20, 'iops-total-max-length': 2**32},
    {'iops-size': -1}, {'iops-size': 4096}, {'iops-size': 4096, 'iops-total': 1},
    {'iops-size': 4096, 'iops-read': 1}, {'iops-size': 4096, 'bps-total': 1},
    {'iops-size': 2**63 - 1, 'iops-total': 1}, {'iops-total': '5'}, {'iops-total': 1.5}, {'iops-total': 2**63},
    {'iops-total': True}, {'iops-total': None}, {'bps_total': 1},
    {'bps-total': 10, 'bps-total-max': 20, 'bps-total-max-length': 5, 'bps-read-max-length': 3},
]


def try_group(d, members):
    """What is shown of a group with these members, or the class of the error."""
    try:
        d.cmd('object-add', {'qom-type': 'throttle-group', 'id': 'x', **members})
    except QmpError as e:
        if d.kind == 'tidemarkd' and not e.desc.startswith('member'):
            assert "'x'" in e.desc, e.desc
        return e.cls
    shown = d.cmd('qom-get', path='/objects/x', property='limits')
    d.cmd('object-del', id='x')
    return shown


@needs_oracle
@pytest.mark.parametrize('limits', LIMITS, ids=json.dumps)
def test_limits_are_taken_and_refused_as_by_the_oracle(common, oracle, limits):
    for members in {'limits': limits}, {'x-' + k: v for k, v in limits.items()}:
        assert try_group(common, members) == try_group(oracle, members)


@needs_oracle
@pytest.mark.parametrize('members', [
    {'x-iops-total': 5, 'limits': {'iops-read': 3}}, {'x-iops-total-max': 5, 'limits': {'iops-total': 3}},
    {'x-iops-total': 5, 'limits': {'iops-total': 7}}, {'x-iops-total': 5, 'limits': {}}, {'limits': None},
    {'limits': 5}, {'iops-total': 5}], ids=json.dumps)
def test_both_forms_together(common, oracle, members):
    assert try_group(common, members) == try_group(oracle, members)


def test_faults_are_named(common):
    for limits, words in [({'iops-total': 1, 'iops-read': 1}, ["'iops-total'", "'iops-read'"]),
                          ({'bps-total': -1}, ["'bps-total'", '-1']),
                          ({'iops-total': 10, 'iops-total-max': 9}, ["'iops-total-max'", 'lower']),
                          ({'iops-size': 1}, ["'iops-size'"])]:
        with pytest.raises(QmpError) as e:
            common.cmd('object-add', {'qom-type': 'throttle-group', 'id': 'x', 'limits': limits})
        assert e.value.cls == 'GenericError'
        assert all(w in e.value.desc for w in ["'x'", *words]), e.value.desc


@pytest.mark.parametrize('text, good', [
    ('throttle-group,id=tg,limits.iops-total=100', True), ('throttle-group,id=tg,x-iops-total=100', True),
    ('qom-type=throttle-group,id=tg,x-bps-total=1000,x-bps-total-max=2000,x-bps-total-max-length=9', True),
    ('{"qom-type":"throttle-group","id":"tg","limits":{"iops-total":3}}', True),
    ('throttle-group,id=tg,limits.iops-total=-1', False), ('throttle-group,id=tg,limits.iops-total=1M', False),
    ('throttle-group,id=tg,iops-total=5', False), ('throttle-group,limits.iops-total=5', False),
    ('throttle-group,id=1x', False)])
def test_command_line(text, good):
    for kind in ('tidemarkd', 'qsd'):
        if kind == 'qsd' and not which('qemu-storage-daemon'):
            continue
        args = ['--object', text, '--blockdev', 'throttle,node-name=t0,throttle-group=tg,file.driver=null-co']
        if good:
            with Daemon(args, kind=kind) as d:
                assert d.cmd('qom-list', path='/objects')[1:] == [{'name': 'tg', 'type': 'child<throttle-group>'}]
                assert d.node('t0')['drv'] == 'throttle'
        else:
            program = os.path.join(BIN, 'tidemarkd') if kind == 'tidemarkd' else which('qemu-storage-daemon')
            r = subprocess.run([program, '--object', text], capture_output=True, text=True, timeout=DEADLINE)
            assert r.returncode == 1
            if kind == 'tidemarkd':
                assert r.stderr.startswith('tidemarkd: --object') and r.stderr.count('\n') == 1


def test_ids(tide):
    add_group(tide, 'a')
    for members in {'qom-type': 'throttle-group', 'id': 'a'}, {'qom-type': 'iothread', 'id': 'a'}, \
            {'qom-type': 'throttle-group', 'id': '1a'}, {'qom-type': 'throttle-group', 'id': ''}, \
            {'qom-type': 'throttle-group', 'id': 'x' * 5000 + '!'}:
        with pytest.raises(QmpError) as e:
            tide.cmd('object-add', members)
        assert e.value.cls == 'GenericError' and members['id'][:20] in e.value.desc
    add_group(tide, 'x' * 5000)
    tide.cmd('object-del', id='x' * 5000)


# ---------------------------------------------------------------- what is shown and changed

QOM = [
    ('qom-list', {'path': '/objects'}), ('qom-list', {'path': 'tg'}), ('qom-list', {'path': 'objects/tg'}),
    ('qom-list', {'path': '/objects/io'}), ('qom-list', {'path': '//objects/'}), ('qom-list', {'path': '/objects/no'}),
    ('qom-list', {'path': 'no'}), ('qom-list', {'path': ''}), ('qom-list', {'path': '/tg'}),
    ('qom-list', {'path': '/objects/tg/limits'}),
    ('qom-list-properties', {'typename': 'throttle-group'}), ('qom-list-properties', {'typename': 'iothread'}),
    ('qom-list-properties', {'typename': 'container'}), ('qom-list-properties', {'typename': 'no'}),
    ('qom-list-types', {'implements': 'throttle-group'}), ('qom-list-types', {'implements': 'no'}),
    *[('qom-get', {'path': '/objects/tg', 'property': p}) for p in ['type', 'limits', 'no', *['x-' + f for f in FIELDS]]],
    ('qom-get', {'path': '/objects/no', 'property': 'limits'}), ('qom-get', {'path': '/', 'property': 'type'}),
    ('qom-get', {'path': '/objects', 'property': 'type'}), ('qom-get', {'path': '/objects', 'property': 'tg'}),
    ('qom-get', {'path': '/objects', 'property': 'no'}), ('qom-get', {'path': '/', 'property': 'objects'}),
    *[('qom-set', {'path': '/objects/tg', 'property': 'limits', 'value': v}) for v in
      [{'iops-total': 50}, {}, {'iops-total-max': 60}, {'iops-read': 3}, {'iops-total': 0, 'iops-read': 3}, {'no': 1},
       {'iops-total': -1}, {'iops-total': 'x'}, 5, None, [], {'iops-total-max': 0, 'iops-total': 0, 'iops-read': 3}]],
    ('qom-set', {'path': '/objects/tg', 'property': 'x-iops-total', 'value': 5}),
    ('qom-set', {'path': '/objects/tg', 'property': 'type', 'value': 'x'}),
    ('qom-set', {'path': '/objects/tg', 'property': 'no', 'value': 5}),
    ('qom-set', {'path': '/objects/no', 'property': 'limits', 'value': {}}),
    ('qom-set', {'path': '/objects', 'property': 'tg', 'value': 5}),
    *[('qom-set', {'path': 'io', 'property': p, 'value': v}) for p, v in
      [('poll-max-ns', 7), ('thread-pool-min', 3), ('aio-max-batch', 2**62)]],
    *[('qom-get', {'path': 'io', 'property': p}) for p in
      ['poll-max-ns', 'poll-grow', 'poll-shrink', 'thread-pool-min', 'thread-pool-max', 'aio-max-batch']],
    # Last: the oracle refuses some of these and keeps the value all the same.
    *[('qom-set', {'path': 'io', 'property': p, 'value': v}) for p, v in
      [('poll-max-ns', -1), ('poll-max-ns', 'x'), ('poll-max-ns', None), ('thread-pool-max', 0), ('thread-pool-min', 65)]],
]


def answer(d, command, args):
    m = d.qmp.raw({'execute': command, 'arguments': args})
    if 'error' in m:
        return m['error']['class']
    rows = m['return']
    if isinstance(rows, list):
        for r in rows:
            if r.get('name') == 'iothread':
                r.pop('parent', None)
        return sorted(rows, key=lambda r: r['name'])
    return rows


@needs_oracle
def test_objects_are_shown_and_changed_as_by_the_oracle():
    with Daemon() as ours, Daemon(kind='qsd') as theirs:
        for d in (ours, theirs):
            d.cmd('object-add', {'qom-type': 'iothread', 'id': 'io'})
            add_group(d, iops_total=100, bps_read=5000, bps_read_max=6000, bps_read_max_length=7)
        for command, args in QOM:
            a, b = (answer(d, command, args) for d in (ours, theirs))
            assert a == b, (command, args)
            a, b = (answer(d, 'qom-get', {'path': 'tg', 'property': 'limits'}) for d in (ours, theirs))
            assert a == b, (command, args)


def test_refused_changes_change_nothing(tide):
    add_group(tide, iops_total=100)
    before = tide.cmd('qom-get', path='tg', property='limits')
    for value, word in (({'iops-read': 5}, 'iops-read'), ({'iops-total': 5, 'bps-total': -1}, 'bps-total'),
                        ({'iops-total': 5, 'nosuch': 1}, 'nosuch')):
        with pytest.raises(QmpError, match=word) as e:
            tide.cmd('qom-set', path='tg', property='limits', value=value)
        assert "'tg'" in e.value.desc
        assert tide.cmd('qom-get', path='tg', property='limits') == before
    with pytest.raises(QmpError, match="'limits'"):
        tide.cmd('qom-set', path='tg', property='x-iops-total', value=5)


@needs_oracle
def test_a_query_of_nodes_shows_what_the_oracle_shows():
    seen = []
    for kind in ('tidemarkd', 'qsd'):
        with Daemon(kind=kind) as d:
            add_group(d, iops_total=100, bps_total=5000)
            add_throttled(d)
            row = d.node('t0')
            seen.append({k: v for k, v in row.items() if k.startswith(('iops', 'bps', 'group', 'drv', 'ro'))})
    assert seen[0] == seen[1]


# ---------------------------------------------------------------- nodes and groups

def test_a_node_needs_its_group(tide):
    tide.cmd('object-add', {'qom-type': 'iothread', 'id': 'io'})
    for group in ('nosuch', 'io', ''):
        with pytest.raises(QmpError, match=f"'{group}'") as e:
            add_throttled(tide, group=group)
        assert e.value.cls == 'GenericError'
    assert tide.cmd('query-named-block-nodes') == []
    add_group(tide)
    with pytest.raises(QmpError, match="'nosuch'"):
        add_throttled(tide, file='nosuch')
    tide.cmd('object-del', id='tg')


def test_a_group_in_use_stays(tide):
    add_group(tide)
    for i in range(6):
        add_throttled(tide, f't{i}')
    with pytest.raises(QmpError, match="'tg'.*'t0', 't1'.*2 others") as e:
        tide.cmd('object-del', id='tg')
    assert e.value.cls == 'GenericError'
    for i in range(5):
        tide.cmd('blockdev-del', node_name=f't{i}')
    with pytest.raises(QmpError, match="'tg' is in use by node 't5'$"):
        tide.cmd('object-del', id='tg')
    tide.cmd('blockdev-del', node_name='t5')
    tide.cmd('object-del', id='tg')
    with pytest.raises(QmpError, match="'tg'"):
        tide.cmd('object-del', id='tg')
    with pytest.raises(QmpError, match="'tg'"):
        add_throttled(tide)


def test_bytes_go_through_unchanged(tide):
    path = tide.add_file('f', 4 * MiB, discard='unmap')
    add_group(tide, iops_total=10000)
    add_throttled(tide, file='f', discard='unmap')
    uri = tide.export('t0')
    qemu_io(uri, 'write -P 17 64k 192k', 'read -P 17 64k 192k', 'read -P 0 0 64k', 'write -z 100k 10k',
            'read -P 0 100k 10k', 'discard 128k 64k', 'write -f -P 5 3M 512', 'flush', 'read -P 5 3M 512')
    with open(path, 'rb') as f:
        f.seek(64 * KiB)
        assert f.read(36 * KiB) == b'\x11' * 36 * KiB


def test_bitmaps_above_and_below(tide):
    tide.add_disk('d', MiB)
    add_group(tide)
    add_throttled(tide, file='d')
    for node in ('d', 't0'):
        tide.cmd('block-dirty-bitmap-add', node=node, name='b-' + node, granularity=64 * KiB)
    with pytest.raises(QmpError, match="'t0'"):
        tide.export('d')  # would write past the bitmap of t0
    uri = tide.export('t0', bitmaps=['b-d', 'b-t0'])  # found through the filter, as through raw
    qemu_io(uri, 'write 128k 4k')
    assert tide.ranges('d', 'b-d') == tide.ranges('t0', 'b-t0') == [(128 * KiB, 64 * KiB)]


# ---------------------------------------------------------------- rates

def test_rates_are_kept(tide):
    """That they are used up, too: drivers/throttle_test.c, on a clock of its own."""
    add_group(tide, iops_total=100)
    add_group(tide, 'bytes', bps_write=1000000)
    add_throttled(tide)
    add_throttled(tide, 't1', 'bytes')
    c = Client(tide.export('t0'))
    c.send(51)  # 11 at once, then one in 10 ms
    assert c.finish() >= 0.399
    c = Client(tide.export('t1'))
    c.send(60, 10000, write=True)  # 11 at once
    c.send(1000)  # reads are free
    assert c.finish() >= 0.489


def test_long_reads_of_cached_data_are_counted(tide):
    """There is no way past the throttle into the page cache of the file below."""
    tide.add_disk('d', 8 * MiB)
    add_group(tide, bps_read=10 * MiB)
    add_throttled(tide, file='d')
    uri = tide.export('t0')
    qemu_io(uri, 'write -P 3 0 8M')
    c = Client(uri)
    c.send(8, MiB)  # 2 at once
    assert c.finish() >= 0.599


def test_a_change_frees_those_who_wait(tide):
    add_group(tide, iops_total=1)
    add_throttled(tide)
    c = Client(tide.export('t0'))
    c.send(40)
    c.settle()
    assert c.poll() >= 35
    set_limits(tide, iops_total=0)
    assert c.finish() < 5
    set_limits(tide, bps_read=1)
    c.send(40)
    c.settle()
    assert c.poll() >= 35
    set_limits(tide, bps_read=1000000000)
    assert c.finish() < 5


def test_nodes_on_different_loops_share_a_group():
    with Daemon(['--loops', '3']) as d:
        add_group(d, iops_total=200)
        clients = []
        for i in range(4):
            d.cmd('object-add', {'qom-type': 'iothread', 'id': f'io{i}'})
            add_throttled(d, f't{i}')
            clients.append(Client(d.export(f't{i}', iothread=f'io{i}')))
        began = time.monotonic()
        for c in clients:
            c.send(40)
        for c in clients:
            c.finish()
        assert time.monotonic() - began >= (160 - 21) / 200 - 0.001


# ---------------------------------------------------------------- what does not wait

@pytest.fixture
def stuck(tide):
    """A disk at a byte per second, with a client whose requests wait: for weeks."""
    tide.add_disk('d', 64 * MiB)
    add_group(tide, bps_total=1)
    add_throttled(tide, file='d')
    c = Client(tide.export('t0'))
    c.send(20, 64 * KiB, write=True)
    c.send(20)
    c.settle()
    assert c.poll() >= 39
    tide.c = c
    return tide


def test_a_transaction_does_not_wait_for_the_queue(stuck):
    actions = [{'type': 'block-dirty-bitmap-add', 'data': {'node': n, 'name': 'b'}} for n in ('t0', 'd')]
    assert took(stuck.cmd, 'transaction', actions=actions) < 5
    assert stuck.c.finish() < 5  # they went, and are charged:
    stuck.c.send(3)
    stuck.c.settle()
    assert stuck.c.poll() == 3
    for i in range(10):
        assert took(stuck.cmd, 'block-dirty-bitmap-clear', node='t0', name='b') < 5
    assert stuck.c.finish() < 5


def test_export_del_does_not_wait_for_the_queue(stuck):
    stuck.cmd('block-export-del', id='exp-t0', mode='hard')
    assert took(stuck.qmp.event, 'BLOCK_EXPORT_DELETED', id='exp-t0') < 5
    stuck.cmd('blockdev-del', node_name='t0')
    stuck.cmd('object-del', id='tg')


def test_the_end_of_one_export_frees_no_other(stuck):
    other = Client(stuck.export('t0', 'other', writable=False))
    stuck.cmd('block-export-del', id='exp-t0', mode='hard')
    stuck.qmp.event('BLOCK_EXPORT_DELETED', id='exp-t0')
    other.send(5)
    other.settle()
    assert other.poll() == 5


def test_the_server_stops_without_waiting(stuck):
    assert took(stuck.cmd, 'nbd-server-stop') < 5


@pytest.mark.parametrize('how', ['quit', signal.SIGTERM])
def test_the_end_of_the_daemon_does_not_wait(stuck, how):
    start_stuck_backup(stuck, 'source')
    began = time.monotonic()
    if how == 'quit':
        stuck.cmd('quit')
        assert stuck.proc.wait(DEADLINE) == 0
    else:
        assert stuck.stop(how) == 0
    assert time.monotonic() - began < DEADLINE


def test_a_client_that_is_gone_holds_up_nobody(stuck):
    stuck.c = None  # closes its socket; its requests wait on
    assert took(stuck.cmd, 'block-dirty-bitmap-add', node='t0', name='b') < 5
    stuck.cmd('block-export-del', id='exp-t0', mode='hard')
    assert took(stuck.qmp.event, 'BLOCK_EXPORT_DELETED', id='exp-t0') < 5


# ---------------------------------------------------------------- jobs

def start_backup(d, source, size=64 * MiB, target=None, **options):
    if not target:
        d.add_disk('target', size)
    d.cmd('blockdev-backup', job_id='j', device=source, target=target or 'target', sync='full', **options)


@pytest.mark.parametrize('side', ['source', 'target'])
def test_a_backup_goes_at_the_rate(tide, side):
    """Copies inside the kernel would not be counted: the time shows that there were none."""
    size = 8 * MiB
    source, target = tide.add_disk('s', size), tide.add_disk('t', size)
    with open(source, 'r+b') as f:
        f.write(os.urandom(size))
    add_group(tide, bps_total=10 * MiB)
    add_throttled(tide, file='s' if side == 'source' else 't')
    names = ('t0', 't') if side == 'source' else ('s', 't0')
    began = time.monotonic()
    start_backup(tide, names[0], target=names[1])
    events = tide.qmp.job_end('j')
    assert 'BLOCK_JOB_COMPLETED' in events
    assert time.monotonic() - began >= 0.5  # 1 MiB and what fills up go at once
    with open(source, 'rb') as a, open(target, 'rb') as b:
        assert a.read() == b.read()


def start_stuck_backup(d, side):
    """A job whose first piece has gone and whose others wait, at a byte per second."""
    d.add_disk('s', 64 * MiB)
    d.add_disk('t', 64 * MiB)
    qemu_io(d.path('s.raw'), 'write -P 1 0 64M')
    add_group(d, 'tj', bps_total=1)
    add_throttled(d, 'tn', 'tj', file='s' if side == 'source' else 't')
    names = ('tn', 't') if side == 'source' else ('s', 'tn')
    start_backup(d, names[0], target=names[1])
    end = time.monotonic() + DEADLINE
    while not d.cmd('query-jobs')[0]['current-progress']:
        assert time.monotonic() < end


@pytest.mark.parametrize('side', ['source', 'target'])
def test_cancel_does_not_wait_for_the_queue(tide, side):
    start_stuck_backup(tide, side)
    assert tide.cmd('query-jobs')[0]['status'] == 'running'
    tide.cmd('job-cancel', id='j')
    assert took(tide.qmp.job_end, 'j') < 5


def test_a_failed_job_does_not_wait_for_the_queue(tide):
    """One piece cannot be read; those that could wait for a target at a byte per second."""
    tide.add_disk('s', 64 * MiB)
    tide.add_disk('t', 64 * MiB)
    qemu_io(tide.path('s.raw'), 'write -P 1 0 64M')
    tide.cmd('blockdev-add', {'driver': 'blkdebug', 'node-name': 'bad', 'image': 's', 'inject-error': [
        {'event': 'read_aio', 'sector': 3 * MiB // 512, 'errno': 5}]})
    add_group(tide, bps_total=1)
    add_throttled(tide, file='t')
    start_backup(tide, 'bad', target='t0')
    tide.qmp.event('BLOCK_JOB_ERROR', device='j')
    assert took(tide.qmp.job_end, 'j') < 5


def test_the_end_of_a_job_does_not_wait_for_guests(tide):
    """Its last step holds the disk's writes, while a guest's wait in the throttle above it."""
    tide.add_disk('d', 2 * MiB)
    add_group(tide, bps_total=1)
    add_throttled(tide, file='d')
    c = Client(tide.export('t0'))
    c.send(20, 64 * KiB, write=True)
    c.settle()
    start_backup(tide, 'd', 2 * MiB)
    assert took(tide.qmp.job_end, 'j') < 5
    assert c.finish() < 5


def test_limits_change_while_a_job_runs(tide):
    tide.add_disk('s', 8 * MiB)
    qemu_io(tide.path('s.raw'), 'write -P 1 0 8M')
    add_group(tide, bps_total=1000)
    add_throttled(tide, file='s')
    start_backup(tide, 't0', 8 * MiB)
    tide.qmp.event('JOB_STATUS_CHANGE', id='j', status='running')
    set_limits(tide, bps_total=0)
    assert 'BLOCK_JOB_COMPLETED' in tide.qmp.job_end('j')
