# SPDX-License-Identifier: Apache-2.0
"""The tool `tidemark` as a person or a script uses it: every command once, its exit code, its errors.
Points and what becomes of them when a run is killed: cli/backup_test.sh."""
import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import termios

import pytest

import harness
from backup_tools import GRANULE, backup, content, fill, held, job, release
from harness import DEADLINE, Daemon, KiB, MiB, qemu_io, which

TOOL = os.path.join(harness.BIN, 'tidemark')
SIZE = 4 * MiB


class Tool:
    def __init__(self, d):
        self.d = d
        self.env = {**os.environ, 'TIDEMARK_SOCKET': d.qmp_path, 'LC_ALL': 'C.UTF-8'}

    def __call__(self, *args, code=0, stdin=''):
        r = subprocess.run([TOOL, *args], input=stdin, capture_output=True, text=True, env=self.env, cwd=self.d.dir,
                           timeout=DEADLINE)
        assert r.returncode == code, f'{args}: {r.returncode}: {r.stdout}{r.stderr}'
        self.err = r.stderr
        return r.stdout

    def json(self, *args, **kw):
        return json.loads(self(*args, '--json', **kw))

    def fails(self, *args, code=1, **kw):
        """Nothing on standard output; what went wrong, and perhaps a hint, on standard error."""
        assert self(*args, code=code, **kw) == ''
        lines = self.err.splitlines()
        assert lines[0].startswith('tidemark: ') and len(lines) <= 2
        assert len(lines) == 1 or lines[1].startswith('hint: ')
        return lines


@pytest.fixture
def tool():
    with Daemon() as d:
        for name in ('disk1', 'disk2'):
            fill(d.add_disk(name, SIZE, discard='unmap'), MiB)
            d.export(name)
        yield Tool(d)


def test_serve_status_stop(tmp_path):
    """From nothing: the lines that `serve` prints are true."""
    image = tmp_path / 'a disk.raw'
    with open(image, 'wb') as f:
        f.truncate(SIZE)

    def run(*args, code=0):
        r = subprocess.run([TOOL, *args], capture_output=True, text=True, cwd=tmp_path, timeout=DEADLINE,
                           env={**os.environ, 'TIDEMARK_SOCKET': str(tmp_path / 'run/tidemark.sock')})
        assert r.returncode == code, r.stdout + r.stderr
        return r.stdout
    out = run('serve', '--dir', 'run', 'a disk.raw', f'other={image}', code=1)
    out = run('serve', '--dir', 'run', 'one=a disk.raw')
    try:
        uri = re.search(r'nbd\+unix://\S+', out).group()
        qemu_io(uri, 'write -P 9 0 4k')
        assert content(image)[:4096] == b'\x09' * 4096
        assert 'one' in run('status') and 'one' in run('export', 'ls') and 'one' in run('node', 'ls')
        assert {n['node']: n['size'] for n in json.loads(run('node', 'ls', '--json'))}['one'] == SIZE
    finally:
        run('stop')
    run('status', code=5)
    for _ in range(10):  # what `stop` waits for is the end of the process, which takes its files away
        assert os.listdir(tmp_path / 'run') == []
        run('serve', '--dir', 'run', 'one=a disk.raw')
        run('stop')


def test_bitmap_commands(tool):
    d = tool.d
    tool('bitmap', 'add', 'disk1', 'b0')
    tool('bitmap', 'add', 'disk1', 'b1', '--granularity', '4K', '--disabled')
    assert d.bitmap('disk1', 'b1')['granularity'] == 4096 and not d.bitmap('disk1', 'b1')['recording']
    qemu_io(d.uri('disk1'), 'write 1M 64k')
    rows = {r['name']: r for r in tool.json('bitmap', 'ls', 'disk1')}
    assert (rows['b0']['state'], rows['b0']['dirty'], rows['b1']['state']) == ('on', GRANULE, 'off')
    assert 'b0' in tool('bitmap', 'ls')
    tool('bitmap', 'merge', 'disk1', 'b1', 'b0')
    assert d.ranges('disk1', 'b1') == [(MiB, GRANULE)]
    tool('bitmap', 'add', 'disk2', 'c')
    tool('bitmap', 'merge', 'disk2', 'c', 'disk1/b0')
    assert d.ranges('disk2', 'c') == [(MiB, GRANULE)]
    assert tool.json('bitmap', 'map', 'disk1', 'b0')['ranges'] == [{'offset': MiB, 'length': GRANULE}]
    picture = tool('bitmap', 'map', 'disk1', 'b0')
    assert re.search('[\u2580-\u259f]', picture) and '64 KiB of 4 MiB dirty' in picture
    tool('bitmap', 'disable', 'disk1', 'b0')
    tool('bitmap', 'enable', 'disk1', 'b1')
    assert not d.bitmap('disk1', 'b0')['recording'] and d.bitmap('disk1', 'b1')['recording']
    tool('bitmap', 'clear', 'disk1', 'b0')
    assert d.bitmap('disk1', 'b0')['count'] == 0
    tool('bitmap', 'rm', 'disk1', 'b0')
    assert d.bitmap('disk1', 'b0') is None


def test_errors_name_what_was_typed(tool):
    lines = tool.fails('bitmap', 'clear', 'disk1', 'b0')
    assert lines[0] == "tidemark: bitmap 'b0' on node 'disk1' not found" and lines[1].startswith('hint: ')
    assert "'disk9'" in tool.fails('bitmap', 'add', 'disk9', 'b0')[0]
    assert "'nope'" in tool.fails('job', 'cancel', 'nope')[0]
    for wrong in (['bitmap'], ['bitmap', 'nosuch'], ['nosuch'], ['status', '--nosuch'], ['bitmap', 'add', 'disk1'],
                  ['backup', 'disk1'], ['bitmap', 'add', 'disk1', 'x', '--granularity', '4Q']):
        tool(*wrong, code=2)
        assert tool.err
    tool.env['TIDEMARK_SOCKET'] = tool.d.path('nobody')
    assert 'nobody' in tool.fails('status', code=5)[0]


def test_jobs(tool):
    d = tool.d
    d.add_disk('dst', SIZE)
    held(d, 'disk1', 'dst')
    row, = tool.json('job', 'ls')
    assert row['job'] == 'j' and row['status'] == 'running'
    assert 'backup' in tool('job', 'ls')
    tool('job', 'cancel', 'j')
    d.qmp.job_end('j')
    held(d, 'disk1', 'dst')
    waiter = subprocess.Popen([TOOL, 'job', 'wait', 'j'], env=tool.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    release(d)
    assert waiter.wait(DEADLINE) in (0, 1)  # 1: the job had gone before anybody asked for it
    waiter.communicate()
    backup(d, 'disk1', 'dst', auto_dismiss=False, job_id='k')
    d.qmp.event('JOB_STATUS_CHANGE', id='k', status='concluded')
    tool('job', 'wait', 'k')
    tool('job', 'wait', 'nosuch', code=1)
    assert not job(d, 'j')


def test_transaction_from_a_file_and_from_a_pipe(tool):
    add = [{'type': 'block-dirty-bitmap-add', 'data': {'node': n, 'name': 'b'}} for n in ('disk1', 'disk2')]
    with open(tool.d.path('list'), 'w') as f:
        json.dump({'actions': add, 'properties': {'completion-mode': 'grouped'}}, f)
    tool('txn', 'run', 'list')
    assert tool.d.bitmap('disk1', 'b') and tool.d.bitmap('disk2', 'b')
    remove = [{'type': 'block-dirty-bitmap-remove', 'data': {'node': 'disk1', 'name': n}} for n in ('b', 'zz')]
    assert "'zz'" in tool.fails('txn', 'run', '-', stdin=json.dumps(remove))[0]
    assert tool.d.bitmap('disk1', 'b')


def test_any_qmp_command(tool):
    assert json.loads(tool('qmp', 'query-version'))['qemu']['major'] == 7
    assert json.loads(tool('qmp', '{"execute": "query-jobs"}')) == []
    tool('qmp', 'block-dirty-bitmap-add', '{"node": "disk1", "name": "b"}')
    assert tool.d.bitmap('disk1', 'b')
    assert 'nosuch' in tool.fails('qmp', 'nosuch')[0]


# ---------------------------------------------------------------- backup directories

def test_manifest_says_what_is_there(tool):
    """Two disks, two points: names of files, chain of uuids, sizes, ranges; holes stay holes."""
    d, bk = tool.d, tool.d.path('bk')
    tool('backup', '--to', 'bk', 'disk1', 'disk2')
    qemu_io(d.uri('disk1'), 'write -P 7 2M 64k', 'write -z -u 0 64k')
    tool('backup', '--to', 'bk', '--incremental', 'disk1', 'disk2')
    assert sorted(os.listdir(bk)) == ['disk1.full.raw', 'disk1.inc-2.raw', 'disk2.full.raw', 'disk2.inc-2.raw',
                                      'manifest.json']
    with open(os.path.join(bk, 'manifest.json')) as f:
        first, second = json.load(f)['points']
    assert first['parent'] is None and second['parent'] == first['uuid'] != second['uuid']
    disk = {p['name']: p for p in second['disks']}['disk1']
    assert (disk['size'], disk['granularity'], disk['kind'], disk['file']) == (SIZE, 65536, 'incremental', 'disk1.inc-2.raw')
    zero, data = disk['ranges']
    assert zero == [0, GRANULE, 'zero'] and data[:3] == [2 * MiB, GRANULE, 'data']
    if which('xxhsum'):
        got = subprocess.run(['xxhsum', '-H3', '-'], input=b'\7' * GRANULE, capture_output=True).stdout
        assert data[3] in got.decode()
    assert disk['bitmap'] in [b['name'] for b in d.node('disk1')['dirty-bitmaps']]
    for name, most in (('disk1.full.raw', MiB), ('disk1.inc-2.raw', GRANULE)):
        assert os.stat(os.path.join(bk, name)).st_blocks * 512 <= most + 8 * KiB, name


def test_a_broken_chain_is_refused(tool):
    d, bk = tool.d, tool.d.path('bk')
    for i in range(3):
        qemu_io(d.uri('disk1'), f'write -P {i + 1} {i}M 64k')
        tool('backup', '--to', 'bk', 'disk1')
    manifest = os.path.join(bk, 'manifest.json')
    shutil.move(os.path.join(bk, 'disk1.inc-2.raw'), d.path('aside'))
    assert 'disk1.inc-2.raw' in tool.fails('restore', 'bk', '3', '--to', 'out')[0]
    assert not os.listdir(d.path('out'))
    tool('restore', 'bk', '1', '--to', 'out')  # what does not need it is still there
    shutil.move(d.path('aside'), os.path.join(bk, 'disk1.inc-2.raw'))
    text = content(manifest)
    whole = json.loads(text)
    for parent in (whole['points'][0]['uuid'], whole['id'], None):
        whole['points'][2]['parent'] = parent
        with open(manifest, 'w') as f:
            json.dump(whole, f)
        tool.fails('restore', 'bk', '3', '--to', 'out2')
        assert not os.path.exists(d.path('out2/disk1.raw'))
    with open(manifest, 'wb') as f:
        f.write(text)
    assert 'force' in tool.fails('restore', 'bk', '3', '--to', 'out')[1]
    tool('restore', 'bk', '3', '--to', 'out', '--force')
    assert content(d.path('out/disk1.raw')) == content(d.path('disk1.raw'))


@pytest.mark.skipif(not which('strace'), reason='strace is not installed')
def test_the_manifest_comes_last_and_all_is_synced_before(tool, sanitized):
    """In the order of system calls of tool and daemon; what a killed run leaves is in cli/backup_test.sh."""
    if sanitized:
        pytest.skip('a leak checker and strace want the same place')
    tool('backup', '--to', 'bk', 'disk1')  # makes directory and first manifest
    log = tool.d.path('calls')
    subprocess.run(['strace', '-f', '-y', '-s', '9999', '-o', log, '-e',
                    'trace=fsync,fdatasync,rename,renameat,renameat2,sendto,sendmsg,write',
                    TOOL, 'backup', '--to', 'bk', 'disk1', 'disk2'], env=tool.env, cwd=tool.d.dir, check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=DEADLINE)
    with open(log) as f:
        lines = f.read().splitlines()
    lists = [line for line in lines if 'blockdev-backup' in line]
    assert len(lists) == 1 and lists[0].count('"blockdev-backup') == 2 and 'grouped' in lists[0], 'one list for both disks'
    calls = [line.split(None, 1)[1] for line in lines if re.search(r'= 0$', line)]
    last = max(i for i, c in enumerate(calls) if c.startswith('rename') and 'manifest.json"' in c)
    before, after = calls[:last], calls[last + 1:]
    for name in ('disk1.inc-2.raw', 'disk2.full-2.raw'):
        synced = [i for i, c in enumerate(before) if 'sync' in c.split('(')[0] and f'/{name}.tmp>' in c]
        renamed = [i for i, c in enumerate(before) if c.startswith('rename') and f'{name}"' in c]
        assert synced and renamed and synced[0] < renamed[0], calls
    assert any('sync' in c.split('(')[0] and 'manifest.json.tmp>' in c for c in before), calls
    folder = [i for i, c in enumerate(calls) if 'sync' in c.split('(')[0] and c.rstrip().endswith('/bk>) = 0')]
    assert any(i < last for i in folder) and any(i > last for i in folder), calls
    assert not [c for c in after if c.startswith('rename') and '.raw' in c]


# ---------------------------------------------------------------- for people

def on_a_terminal(command, env, cwd):
    """What a program says on a terminal of 80 columns."""
    pid, fd = pty.fork()
    if pid == 0:
        os.chdir(cwd)
        os.execve(command[0], command, env)
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 80, 0, 0))
    out = b''
    while True:
        try:
            data = os.read(fd, 65536)
        except OSError:  # the other side has been closed
            break
        if not data:
            break
        out += data
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, out
    return out.decode()


def test_progress_bars_on_a_terminal_only(tool):
    fill(tool.d.path('disk1.raw'), SIZE)
    args = ['--speed', '8M', 'disk1']
    out = on_a_terminal([TOOL, 'backup', '--to', tool.d.path('seen'), *args], tool.env, tool.d.dir)
    assert re.search(r'disk1 .*\[#+-+\]', out), out
    for extra in (['--no-progress'], ['--json']):
        quiet = on_a_terminal([TOOL, 'backup', '--to', tool.d.path('quiet' + extra[0]), *args, *extra], tool.env,
                              tool.d.dir)
        assert '[#' not in quiet and '[-' not in quiet
    tool('backup', '--to', 'piped', *args)
    assert '[' not in tool.err
