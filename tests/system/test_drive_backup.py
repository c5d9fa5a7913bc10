# SPDX-License-Identifier: Apache-2.0
"""drive-backup: the file it makes or finds, the job's own node over it, and what is left when it fails."""
import contextlib
import os
import stat
import threading

import nbd
import pytest

from file_state import files, whole_state
from harness import MiB, Daemon, QmpError, which
from mounts import file_system, need_root, run

SIZE = MiB


def backup(target, device='d0', job='j', sync='full', **options):
    return {'type': 'drive-backup', 'data': {'job-id': job, 'device': device, 'target': target, 'sync': sync,
                                             **{k.replace('_', '-'): v for k, v in options.items()}}}


def bitmap(kind, node, name):
    return {'type': 'block-dirty-bitmap-' + kind, 'data': {'node': node, 'name': name}}


ABORT = {'type': 'abort', 'data': {}}


def txn(d, actions, **properties):
    return d.cmd('transaction', actions=actions, properties={k.replace('_', '-'): v for k, v in properties.items()})


def fill(path, size=SIZE):
    with open(path, 'wb') as f:
        f.write(os.urandom(size))


def read(path):
    with open(path, 'rb') as f:
        return f.read()


@contextlib.contextmanager
def daemon(kind='tidemarkd', **options):
    """Two disks with something on them, and a file 'old' of another size."""
    with Daemon(kind=kind, **options) as d:
        for node in ('d0', 'd1'):
            fill(d.path(node + '.raw'))
            d.add_disk(node, SIZE)
        fill(d.path('old'), 1000)
        os.chmod(d.path('old'), 0o640)
        yield d


@pytest.fixture
def d():
    with daemon() as one:
        yield one


def write(d, node, offset, data):
    d.export(node)
    h = nbd.NBD()
    h.connect_uri(d.uri(node))
    h.pwrite(data, offset)
    h.shutdown()
    d.cmd('block-export-del', id='exp-' + node)
    d.qmp.event('BLOCK_EXPORT_DELETED')


def run_job(d, form, **options):
    one = backup(**options)
    if form == 'plain':
        d.cmd('drive-backup', one['data'])
    else:
        txn(d, [one])


def refused(d, form='plain', **options):
    """It leaves nothing; the text."""
    before = whole_state(d)
    with pytest.raises(QmpError) as e:
        run_job(d, form, **options)
    assert e.value.cls == 'GenericError' and whole_state(d) == before
    return e.value.desc


# ---------------------------------------------------------------- both modes

@pytest.mark.parametrize('form', ['plain', 'list'])
@pytest.mark.parametrize('target, mode', [('new', {}), ('new', {'format': 'raw'}), ('old', {'mode': 'absolute-paths'}),
                                          ('file:new', {}), ('x' * 255, {}), ('ä' * 127, {}), ('d/../new', {}),
                                          ('same', {'mode': 'existing'}), ('link', {'mode': 'existing'}),
                                          ('twice', {'mode': 'existing', 'format': 'raw'})])
def test_copies_to_a_file(d, form, target, mode):
    os.mkdir(d.path('d'))
    fill(d.path('same'))
    os.link(d.path('same'), d.path('twice'))
    os.symlink('same', d.path('link'))
    before = files(d.dir)
    run_job(d, form, target=target, **mode)
    assert d.qmp.job_end('j') == ['S:created', 'S:running', 'S:waiting', 'S:pending', 'BLOCK_JOB_COMPLETED',
                                  'S:concluded', 'S:null']
    path = d.path(target.removeprefix('file:'))
    assert read(path) == read(d.path('d0.raw'))
    assert [n['node-name'] for n in d.cmd('query-named-block-nodes')] == ['d1', 'd1-file', 'd0', 'd0-file']
    after = files(d.dir)
    written = {os.path.basename(path)} | ({'same', 'twice'} if mode.get('mode') == 'existing' else set())
    assert set(after) == set(before) | written  # and no temporary one
    assert {n: after[n] for n in before if n not in written} == {n: before[n] for n in before if n not in written}
    if mode.get('mode') == 'existing':
        assert after['same'][:3] == before['same'][:3]
    else:
        assert after[os.path.basename(path)][1] == (before[target][1] if target in before else oct(0o100644))


def test_the_node_over_the_file_is_as_the_reference_has_it():
    def seen(kind, **mode):
        with daemon(kind) as d:
            fill(d.path('old'))
            run_job(d, 'plain', target='old', auto_finalize=False, **mode)
            d.qmp.event('BLOCK_JOB_PENDING')
            rows = [(n['drv'], n['file'].replace(d.dir, ''), n['ro'], n['detect_zeroes'], n['cache'], n['image']['format'],
                     n['image']['virtual-size'], n['node-name'].startswith('#block'))
                    for n in d.cmd('query-named-block-nodes') if n['drv'] != 'copy-before-write']
            d.cmd('job-finalize', id='j')
            d.qmp.job_end('j')
            assert len(d.cmd('query-named-block-nodes')) == 4
            return rows
    for mode in ({}, {'mode': 'existing', 'format': 'raw'}):
        assert seen('tidemarkd', **mode) == seen('qsd', **mode)


def test_two_disks_grouped_with_their_bitmaps(d):
    for node in ('d0', 'd1'):
        d.cmd('block-dirty-bitmap-add', node=node, name='b')
    write(d, 'd0', 65536, b'a' * 65536)
    write(d, 'd1', 131072, b'b' * 65536)
    txn(d, [backup('new0', job='j0', sync='incremental', bitmap='b'),
            backup('old', 'd1', 'j1', sync='bitmap', bitmap='b', bitmap_mode='on-success')], completion_mode='grouped')
    d.qmp.job_end('j0')
    d.qmp.job_end('j1')
    for node, name, offset, letter in (('d0', 'new0', 65536, b'a'), ('d1', 'old', 131072, b'b')):
        want = bytearray(SIZE)
        want[offset:offset + 65536] = letter * 65536
        assert read(d.path(name)) == bytes(want)
        assert d.bitmap(node, 'b')['count'] == 0 and not d.bitmap(node, 'b')['busy']


def test_point_in_time_is_the_place_in_the_list(d):
    before = read(d.path('d0.raw'))
    d.cmd('block-dirty-bitmap-add', node='d0', name='b')
    run_job(d, 'list', target='new', auto_finalize=False, speed=1)
    write(d, 'd0', SIZE - 65536, b'z' * 65536)
    d.cmd('block-job-set-speed', device='j', speed=0)
    d.qmp.event('BLOCK_JOB_PENDING')
    d.cmd('job-finalize', id='j')
    d.qmp.job_end('j')
    assert read(d.path('new')) == before


def test_an_empty_disk(d):
    d.add_disk('empty', 0)
    run_job(d, 'plain', device='empty', target='new')
    d.qmp.job_end('j')
    assert os.stat(d.path('new')).st_size == 0


# ---------------------------------------------------------------- nothing is left of a list that failed

LISTS = {
    'new': [backup('new')],
    'old': [backup('old')],
    'existing': [backup('same', mode='existing')],
    'several': [backup('new', job='j0'), backup('old', 'd1', 'j1'), backup('same', job='j2', mode='existing')],
    'with bitmaps': [bitmap('add', 'd0', 'c'), backup('old', sync='incremental', bitmap='b'), bitmap('remove', 'd0', 'c')],
    'a node of its own': [{'type': 'blockdev-add', 'data': {'driver': 'file', 'node-name': 'n', 'filename': 'same'}},
                          backup('new', 'n')],
    'file of a node that goes': [{'type': 'blockdev-del', 'data': {'node-name': 'd1'}}, backup('d1.raw')],
    'used at once': [backup('old'), {'type': 'blockdev-add', 'data': {
        'driver': 'file', 'node-name': 'n', 'filename': './old'}}],
    'first in a directory': [backup('d/new')],
}


@pytest.mark.parametrize('name', LISTS)
@pytest.mark.parametrize('mode', ['individual', 'grouped'])
def test_undone_to_the_last_inode(d, name, mode):
    fill(d.path('same'))
    os.mkdir(d.path('d'))
    d.cmd('block-dirty-bitmap-add', node='d0', name='b')
    write(d, 'd0', 0, b'q' * 65536)
    before, below = whole_state(d), files(d.path('d'))
    with pytest.raises(QmpError, match='abort'):
        txn(d, LISTS[name] + [ABORT], completion_mode=mode)
    assert whole_state(d) == before and files(d.path('d')) == below
    assert not d.qmp.events
    if name != 'used at once':  # the same list again, without the abort
        txn(d, LISTS[name], completion_mode=mode)
        for action in LISTS[name]:
            if action['type'] == 'drive-backup':
                assert 'BLOCK_JOB_COMPLETED' in d.qmp.job_end(action['data']['job-id'])
        assert not any(n.endswith('.tmp') for n in files(d.dir))


def test_the_reference_leaves_files_behind():
    """What is not copied from it: an aborted list leaves a new file, and has emptied an old one."""
    def after(kind):
        with daemon(kind) as d:
            before = files(d.dir)
            with pytest.raises(QmpError):
                txn(d, [backup('new', format='raw', job='j0'), backup('old', 'd1', 'j1', format='raw'), ABORT])
            return before, files(d.dir)
    before, now = after('tidemarkd')
    assert now == before
    before, now = after('qsd')
    assert 'new' in now and now['old'][3] == SIZE and before['old'][3] == 1000


class Intruder(threading.Thread):
    """Puts a file of its own where the list made one, as soon as that is there."""

    def __init__(self, path):
        super().__init__()
        self.path, self.own, self.stop = path, path + '.intruder', False
        self.before = os.stat(path).st_ino if os.path.exists(path) else None
        fill(self.own, 100)
        self.ino = os.stat(self.own).st_ino

    def run(self):
        while not self.stop:
            with contextlib.suppress(FileNotFoundError):
                if os.stat(self.path).st_ino != self.before:
                    os.rename(self.own, self.path)
                    return

    def came_in(self):
        self.stop = True
        self.join()
        return not os.path.exists(self.own)


@pytest.mark.parametrize('old', [False, True], ids=['new', 'old'])
def test_what_cannot_be_undone_is_told(d, old):
    """Another process replaces the file while the list goes on: its file stays, the rest is undone."""
    d.cmd('block-dirty-bitmap-add', node='d0', name='b')
    idle = [bitmap('disable', 'd0', 'b')] * 20000
    for turn in range(50):
        path = d.path(f'target{turn}')
        if old:
            fill(path, 200)
        content = read(path) if old else None
        intruder = Intruder(path)
        intruder.start()
        with pytest.raises(QmpError) as e:
            txn(d, [backup(path)] + idle + [{'type': 'abort', 'data': {}}], id=f'turn{turn}')
        if intruder.came_in() and not e.value.data['undone']:  # else it came too late
            break
        assert e.value.data['undone'] is True and 'pending' not in e.value.data
    else:
        pytest.fail('nobody came in between')
    assert e.value.data['undone'] is False and e.value.data['action'] == len(idle) + 1
    [left] = e.value.data['pending']
    assert path in left and f'; not undone: {left}' in e.value.desc
    assert os.stat(path).st_ino == intruder.ino
    leftover = [f for f in os.listdir(d.dir) if f.startswith(f'target{turn}.') and f.endswith('.tmp')]
    if old:  # what stood there is not lost
        assert [d.path(f) for f in leftover] == [left.rsplit("'", 2)[1]] and read(d.path(leftover[0])) == content
    else:
        assert leftover == []
    assert d.bitmap('d0', 'b')['recording'] and d.cmd('query-jobs') == []
    with pytest.raises(QmpError) as again:
        txn(d, [backup(path)] + idle + [{'type': 'abort', 'data': {}}], id=f'turn{turn}')
    assert again.value.data['replayed'] and again.value.data['undone'] is False and left in again.value.desc


def test_all_that_cannot_be_undone_is_told(d):
    """Two files, each replaced by another process while the list goes on."""
    d.cmd('block-dirty-bitmap-add', node='d0', name='b')
    idle = [bitmap('disable', 'd0', 'b')] * 20000
    for turn in range(50):
        paths = [d.path(f'{n}{turn}') for n in ('one', 'two')]
        for path in paths:
            fill(path, 200)
        intruders = [Intruder(path) for path in paths]
        for i in intruders:
            i.start()
        with pytest.raises(QmpError) as e:
            txn(d, [{'type': 'drive-backup', 'data': {**backup(p)['data'], 'job-id': f'j{k}'}}
                    for k, p in enumerate(paths)] + idle + [{'type': 'abort', 'data': {}}])
        came = [i.came_in() for i in intruders]
        if all(came) and len(e.value.data.get('pending', [])) == 2:  # else one came too late
            break
    else:
        pytest.fail('nobody came in between')
    for path, left in zip(reversed(paths), e.value.data['pending']):
        assert path in left and os.path.exists(left.rsplit("'", 2)[1])
    assert f"; not undone: {e.value.data['pending'][0]}; and 1 more" in e.value.desc


@pytest.mark.skipif(not which('strace'), reason='strace is not installed')
def test_what_cannot_be_synced_is_found_before_guests_are_held(sanitized):
    if sanitized:
        pytest.skip('a leak checker and strace want the same place')
    with daemon(args=['--engine', 'portable'], wrapper=[  # strace does not see rings
            'strace', '-D', '-f', '-qq', '-o', 'calls', '-e', 'trace=fsync', '-e', 'inject=fsync:error=EIO']) as d:
        before = files(d.dir)
        with pytest.raises(QmpError, match='old.*Input/output error') as e:
            txn(d, [backup('old')])
        assert e.value.data == {'action': 0, 'kind': 'drive-backup', 'phase': 'stage', 'undone': True}
        assert {n: f for n, f in files(d.dir).items() if n != 'calls'} == {n: f for n, f in before.items() if n != 'calls'}


def test_an_old_file_is_there_until_the_list_has_happened(d):
    content = read(d.path('old'))
    with open(d.path('old'), 'rb') as still:
        run_job(d, 'plain', target='old')
        d.qmp.job_end('j')
        assert still.read() == content and os.fstat(still.fileno()).st_nlink == 0
    assert read(d.path('old')) == read(d.path('d0.raw'))


def test_a_list_sees_the_file_that_it_made(d):
    """By whatever path: nothing that reads a file is opened before."""
    txn(d, [backup('old'), {'type': 'blockdev-add', 'data': {
        'driver': 'file', 'node-name': 'n', 'filename': os.path.join(d.dir, 'old'), 'read-only': True}}])
    d.qmp.job_end('j')
    assert d.node('n')['image']['virtual-size'] == SIZE
    assert refused(d, target='old') == "file 'old' is in use by node 'n'"


# ---------------------------------------------------------------- what is refused

def test_names_that_are_refused(d):
    os.mkdir(d.path('dir'))
    os.mkfifo(d.path('pipe'))
    os.symlink('old', d.path('link'))
    os.symlink('nothing', d.path('dangling'))
    os.link(d.path('old'), d.path('other-name'))
    for form in ('plain', 'list'):
        for target, words in (
                ('', 'does not name a file'), ('.', 'does not name a file'), ('dir/..', 'does not name a file'),
                ('dir/', 'does not name a file'), ('dir', 'is a directory'), ('x' * 256, 'longer than 255'),
                ('ä' * 128, 'longer than 255'), ('d/' * 3000 + 'x', 'name too long'), ('no/new', 'No such file'),
                ('old/new', 'Not a directory'), ('pipe', 'not a regular file'), ('/dev/null', 'not a regular file'),
                ('link', 'symbolic link'), ('dangling', 'symbolic link'), ('old', '2 names (hard links)'),
                ('d0.raw', "in use by node 'd0-file'"), ('./d1.raw', "in use by node 'd1-file'"),
                ('nbd:localhost:1', 'is no file'), ('json:{}', 'is no file'), ('nbd+unix:///x?socket=y', 'is no file')):
            assert words.lower() in refused(d, form, target=target).lower(), target
        for target, words in (
                ('new', 'No such file'), ('old', 'sizes differ'), ('pipe', 'neither'), ('dir', 'neither'),
                ('d0.raw', 'source'), ('dangling', 'No such file')):
            assert words in refused(d, form, target=target, mode='existing'), target
    assert os.listdir(d.path('dir')) == []


def test_advice_names_the_way_out(d):
    os.symlink('old', d.path('link'))
    assert 'mode=existing' in refused(d, target='link') and 'mode=existing' in refused(d, target='no/new')


def test_formats(d):
    fill(d.path('same'))
    for name in ('qcow2', 'vmdk', 'file', 'zz', ''):
        assert f"'{name}' is not built" in refused(d, target='new', format=name)
    for magic, at, name in ((b'QFI\xfb', 0, 'qcow2'), (b'KDMV', 0, 'vmdk'), (b'conectix', 0, 'vpc'),
                            (b'vhdxfile', 0, 'vhdx'), (b'LUKS\xba\xbe', 0, 'luks'), (b'\x7f\x10\xda\xbe', 64, 'vdi')):
        with open(d.path('same'), 'r+b') as f:
            f.write(bytes(512))
            f.seek(at)
            f.write(magic)
        assert f"'{name}'" in refused(d, target='same', mode='existing')
    run_job(d, 'plain', target='same', mode='existing', format='raw')
    d.qmp.job_end('j')
    assert read(d.path('same')) == read(d.path('d0.raw'))


@pytest.mark.parametrize('form', ['plain', 'list'])
def test_other_arguments_as_blockdev_backup(d, form):
    """Same rules, same words; no file is left however late it is refused."""
    d.cmd('block-dirty-bitmap-add', node='d0', name='b')
    d.cmd('blockdev-add', driver='null-co', node_name='t', size=SIZE)
    for options in ({'device': 'zz'}, {'sync': 'incremental'}, {'sync': 'bitmap', 'bitmap': 'zz', 'bitmap_mode': 'never'},
                    {'sync': 'full', 'bitmap': 'b'}, {'sync': 'none', 'bitmap': 'b', 'bitmap_mode': 'always'},
                    {'bitmap_mode': 'always'}, {'speed': -1}, {'job': ''}, {'job': '1x'}, {'x_perf': {'max-workers': 0}},
                    {'x_perf': {'max-chunk': 512}}, {'filter_node_name': 'f'}):
        mine = refused(d, form, target='new', **options)
        other = backup('t', **options)['data']
        with pytest.raises(QmpError) as e:
            d.cmd('blockdev-backup', other)
        assert e.value.desc == mine, options
    assert "'new' cannot be compressed" in refused(d, form, target='new', compress=True)


def test_job_ids_of_one_list(d):
    before = whole_state(d)
    with pytest.raises(QmpError) as e:
        txn(d, [backup('new'), backup('old', 'd1')])
    assert e.value.data['action'] == 1 and whole_state(d) == before


def test_two_jobs_to_one_file(d):
    before = whole_state(d)
    for second in ('new', './new', os.path.join(d.dir, 'new')):
        with pytest.raises(QmpError, match="in use by node '#block"):
            txn(d, [backup('new', job='j0'), backup(second, 'd1', 'j1')])
        assert whole_state(d) == before


def test_a_file_that_another_process_uses(d):
    with Daemon() as other:
        other.cmd('blockdev-add', driver='file', node_name='n', filename=d.path('old'))
        other.export('n')
        assert 'another process' in refused(d, target='old')
        fill(d.path('same'))
        other.cmd('blockdev-add', driver='file', node_name='m', filename=d.path('same'))
        other.export('m')
        assert 'lock on' in refused(d, target='same', mode='existing')


def test_a_directory_in_which_nothing_can_be_made():
    need_root('setpriv')
    with daemon(wrapper=('setpriv', '--bounding-set=-dac_override,-dac_read_search')) as d:
        os.mkdir(d.path('shut'))
        fill(d.path('shut/there'))
        os.chmod(d.path('shut'), 0o555)
        below = files(d.path('shut'))
        for form in ('plain', 'list'):
            for target in ('shut/new', 'shut/there'):
                assert 'Permission denied' in (text := refused(d, form, target=target)) and 'mode=existing' in text
        told = txn(d, [backup('shut/new')], dry_run=True)
        assert told['outcome'] == 'would-fail' and 'Permission denied' in told['error']
        run_job(d, 'plain', target='shut/there', mode='existing')
        d.qmp.job_end('j')
        assert read(d.path('shut/there')) == read(d.path('d0.raw')) and set(files(d.path('shut'))) == set(below)
        os.chmod(d.path('old'), 0o400)  # protected: not replaced either
        assert 'Permission denied' in refused(d, target='old')


@pytest.mark.parametrize('full', ['read-only', 'no room for a name'])
def test_a_disk_that_takes_no_file(full):
    with daemon() as d, file_system(d.dir, 'tmpfs', 2 * MiB) as mount:
        fill(os.path.join(mount, 'there'), 100)
        options = 'remount,ro' if full == 'read-only' else 'remount,nr_inodes=2'
        r = run('mount', '-o', options, mount)
        assert r.returncode == 0, r.stderr
        below = files(mount)
        words = 'Read-only file system' if full == 'read-only' else 'No space left'
        for target in ('new', 'there'):
            assert words in refused(d, target=os.path.join(mount, target))
            assert words in txn(d, [backup(os.path.join(mount, target))], dry_run=True)['error']
        assert files(mount) == below


def test_a_disk_that_fills_up_while_the_job_runs():
    """The job fails; the file stays, as the reference leaves it, and the bitmap keeps its bits."""
    with daemon() as d, file_system(d.dir, 'tmpfs', 256 * 1024) as mount:
        d.cmd('block-dirty-bitmap-add', node='d0', name='b')
        write(d, 'd0', 0, os.urandom(SIZE))
        run_job(d, 'plain', target=os.path.join(mount, 'new'), sync='incremental', bitmap='b')
        assert 'BLOCK_JOB_COMPLETED!' in d.qmp.job_end('j')
        assert os.listdir(mount) == ['new'] and d.bitmap('d0', 'b')['count'] == SIZE
        assert len(d.cmd('query-named-block-nodes')) == 4


# ---------------------------------------------------------------- the end of the job

@pytest.mark.parametrize('kind', ['tidemarkd', 'qsd'])
def test_cancelled_jobs_leave_their_file(kind):
    with daemon(kind) as d:
        run_job(d, 'plain', target='new', format='raw', auto_finalize=False)
        d.qmp.event('BLOCK_JOB_PENDING')
        d.cmd('block-job-cancel', device='j')
        assert 'BLOCK_JOB_CANCELLED' in d.qmp.job_end('j')
        assert os.stat(d.path('new')).st_size == SIZE and len(d.cmd('query-named-block-nodes')) == 4
        run_job(d, 'plain', target='new', format='raw')  # nobody holds it any more
        d.qmp.job_end('j')
        assert read(d.path('new')) == read(d.path('d0.raw'))


def test_the_node_is_the_jobs_own(d):
    run_job(d, 'plain', target='new', auto_finalize=False)
    d.qmp.event('BLOCK_JOB_PENDING')
    top, below = [n['node-name'] for n in d.cmd('query-named-block-nodes')][:2]
    for node, words in ((top, "in use by block job 'j'"), (below, 'goes with it')):
        with pytest.raises(QmpError, match=words):
            d.cmd('blockdev-del', node_name=node)
    with pytest.raises(QmpError, match="'new'|in use"):
        d.cmd('drive-backup', backup('new', 'd1', 'k')['data'])
    d.cmd('job-finalize', id='j')
    d.qmp.job_end('j')
    with pytest.raises(QmpError, match='not found'):
        d.cmd('blockdev-del', node_name=top)


def test_a_node_that_others_use_by_then_stays(d):
    run_job(d, 'plain', target='new', auto_finalize=False)
    d.qmp.event('BLOCK_JOB_PENDING')
    top = d.cmd('query-named-block-nodes')[0]['node-name']
    d.export(top, 'look', writable=False)
    d.cmd('job-finalize', id='j')
    d.qmp.job_end('j')
    h = nbd.NBD()
    h.connect_uri(d.uri('look'))
    assert h.pread(SIZE, 0) == read(d.path('d0.raw'))
    h.shutdown()
    d.cmd('block-export-del', id='exp-look')
    d.qmp.event('BLOCK_EXPORT_DELETED')
    d.cmd('blockdev-del', node_name=top)
    assert len(d.cmd('query-named-block-nodes')) == 4


def test_quit_while_it_runs():
    with daemon() as d:
        run_job(d, 'plain', target='new', speed=1)
        run_job(d, 'plain', target='old', device='d1', job='k', speed=1)
        assert d.stop() == 0
        assert set(files(d.dir)) == {'d0.raw', 'd1.raw', 'new', 'old'}


# ---------------------------------------------------------------- dry runs

def test_a_dry_run_makes_no_file_at_any_time(d):
    """The directory's time of change says so; what is not the file is exercised."""
    d.cmd('block-dirty-bitmap-add', node='d0', name='b')
    before, when = whole_state(d), os.stat(d.dir).st_mtime_ns
    told = txn(d, [backup('new', job='j0', sync='incremental', bitmap='b'), backup('old', 'd1', 'j1'),
                   bitmap('clear', 'd0', 'b')], dry_run=True)
    assert told['outcome'] == 'would-fail' and told['failed-action'] == 2 and "'b'" in told['error']
    assert [a['outcome'] for a in told['actions']] == ['checked', 'checked', 'failed']
    assert "'new'" in told['actions'][0]['does'] and "bitmap 'b'" in told['actions'][0]['sees']
    assert os.stat(d.dir).st_mtime_ns == when and whole_state(d) == before
    for target in ('no/new', 'd0.raw', '', 'x' * 256):
        with pytest.raises(QmpError) as e:
            d.cmd('drive-backup', backup(target)['data'])
        assert txn(d, [backup(target)], dry_run=True)['error'] == e.value.desc


def test_mode_of_the_new_file(d):
    run_job(d, 'plain', target='old')
    d.qmp.job_end('j')
    assert stat.S_IMODE(os.stat(d.path('old')).st_mode) == 0o640
