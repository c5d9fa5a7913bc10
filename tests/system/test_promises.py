# SPDX-License-Identifier: Apache-2.0
"""Promises of docs/promises.md that belong to no other file: the two commands and the demonstration,
the portable engine where io_uring is forbidden, loops, very large disks, what the manuals contain."""
import glob
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import time

import nbd
import pytest

from backup_tools import GRANULE, OK, assert_same, backup, content, end_of, fill, until
from harness import BIN, BUILD, DEADLINE, ROOT, Daemon, GiB, KiB, MiB, QmpError, TiB, qemu_io, which

O_DIRECT = 0o40000
SIZE = 4 * MiB


def run(*args, code=0, **kw):
    kw.setdefault('cwd', ROOT)
    r = subprocess.run(args, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=2 * DEADLINE, **kw)
    assert r.returncode == code, f'{args}: {r.returncode}: {r.stdout}{r.stderr}'
    return r


def connect(uri):
    h = nbd.NBD()
    h.connect_uri(uri)
    return h


def own_memory(d):
    with open(f'/proc/{d.proc.pid}/status') as f:
        return next(int(line.split()[1]) for line in f if line.startswith('RssAnon')) * KiB


# ---------------------------------------------------------------- ./run, ./check, make

def test_run_and_check_explain_themselves():
    for program, words in (('./run', ['--build-only', '--keep DIR']), ('./check', ['--long', 'passed', 'skipped'])):
        r = run(program, '--help')
        assert r.stderr == '' and all(w in r.stdout for w in words)
    for wrong in (['--nosuch'], ['--keep']):
        r = run('./run', *wrong, code=1)
        assert r.stdout == '' and r.stderr.startswith('run: ') and r.stderr.count('\n') == 1


@pytest.mark.skipif(not which('make'), reason='make is not installed')
def test_make_forwards():
    for goal, words in (([], './run --build-only'), (['check'], './check'), (['install'], 'meson install -C build')):
        assert words in run('make', '-n', *goal).stdout.splitlines()


def test_ci_runs_check(tmp_path):
    os.mkdir(tmp_path / '.ci')
    shutil.copy(os.path.join(ROOT, '.ci/run'), tmp_path / '.ci/run')
    (tmp_path / 'check').write_text('#!/bin/sh\necho checked\nexit 3\n')
    os.chmod(tmp_path / 'check', 0o755)
    assert run(str(tmp_path / '.ci/run'), code=3, cwd='/').stdout == 'checked\n'


def test_each_number_of_the_long_check_is_of_one_test():
    """Lists of one test take as long as a hundred of another: none shares its number, and none is misspelled."""
    with open(os.path.join(ROOT, 'scripts/check.py')) as f:
        names = re.findall(r"'(TIDEMARK_\w+)': '\d+'", f.read())
    assert len(names) >= 4
    readers = {n: [] for n in names}
    for path in glob.glob(os.path.join(ROOT, 'tests/system/test_*.py')):
        with open(path) as f:
            asked = set(re.findall(r"environ\.get\('(TIDEMARK_\w+)'", f.read()))
        for n in asked.intersection(names):
            readers[n].append(path)
    assert {n: len(paths) for n, paths in readers.items()} == dict.fromkeys(names, 1), readers


def with_fakes(tmp_path, uid, packages, apt='exit 0'):
    """Call need() of scripts/common.sh where these are the user and the package manager."""
    fakes = {'id': f'echo {uid}', 'dpkg-query': 'case "$*" in *there*) echo "install ok installed" ;; *) exit 1 ;; esac',
             'apt-get': f'echo "$DEBIAN_FRONTEND $*" >>{tmp_path}/calls\n{apt}'}
    for name, text in fakes.items():
        (tmp_path / name).write_text(f'#!/bin/sh\n{text}\n')
        os.chmod(tmp_path / name, 0o755)
    r = subprocess.run(['sh', '-euc', 'root=$1; shift; . "$root/scripts/common.sh"; need "$@"', 'setup', ROOT, *packages],
                       capture_output=True, text=True, env={**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}'})
    calls = tmp_path / 'calls'
    return r, calls.read_text().splitlines() if calls.exists() else []


def test_missing_packages_without_root_are_one_sentence(tmp_path):
    r, calls = with_fakes(tmp_path, 1000, ['there', 'nosuch-a', 'there-too', 'nosuch-b'])
    assert r.returncode == 1 and r.stdout == '' and calls == []
    assert r.stderr.count('\n') == 1 and r.stderr.endswith(': nosuch-a nosuch-b\n') and 'root' in r.stderr


def test_missing_packages_are_announced_and_installed(tmp_path):
    r, calls = with_fakes(tmp_path, 0, ['there', 'nosuch-a', 'nosuch-b'])
    assert r.returncode == 0 and r.stdout == 'installing: nosuch-a nosuch-b\n'
    update, install = calls
    assert update.startswith('noninteractive ') and update.endswith(' update') and 'Lock::Timeout' in update
    assert install.startswith('noninteractive ') and install.endswith(' nosuch-a nosuch-b')
    assert '--no-install-recommends' in install and 'Lock::Timeout' in install
    assert with_fakes(tmp_path, 1000, ['there'])[0].stdout == ''


def test_a_failed_installation_is_told(tmp_path):
    r, _ = with_fakes(tmp_path, 0, ['nosuch-a'], apt='echo "E: no network" >&2; exit 100')
    assert r.returncode == 1 and 'no network' in r.stderr and r.stderr.endswith('could not install: nosuch-a\n')


# ---------------------------------------------------------------- the demonstration (whole: stage `demo` of ./check)

def demo(text, tmp_path, code=0, **env):
    """Run lines of Python that know the demonstration."""
    begin = ('import sys, os; sys.dont_write_bytecode = True\n'
             f'sys.path.insert(0, {os.path.join(ROOT, "scripts")!r}); import demo, demo_disks, demo_screen\n'
             f'sys.argv[1:] = ["--bin", {BIN!r}]\n')
    return run(sys.executable, '-c', begin + text, code=code, cwd=tmp_path, env={
        **os.environ, 'TMPDIR': str(tmp_path), **env})


def test_demo_looks_for_space_where_tmpdir_says(tmp_path):
    r = demo('import collections, shutil; asked = []\n'
             'shutil.disk_usage = lambda p: asked.append(p) or collections.namedtuple("U", "free")(7 << 20)\n'
             'status = demo.main(); print(asked); sys.exit(status)', tmp_path, code=1)
    assert r.stdout == f'[{str(tmp_path)!r}]\n'
    assert r.stderr.startswith(f'demo: {tmp_path} has 7 MiB free') and 'TMPDIR' in r.stderr
    assert os.listdir(tmp_path) == []


def test_demo_fails_on_one_wrong_byte_and_cleans_up(tmp_path):
    """As restored images are compared, with one byte of a megabyte changed."""
    text = ('def story(self):\n'
            '    data = bytes(range(256)) * 4096\n'
            '    for name in ("first", "live", "good", "bad"): open(name, "wb").write(data)\n'
            '    open("live", "r+b").write(b"new")\n'
            '    meter = demo.Meter(1)\n'
            '    moment = demo.Moment.take("first", "live", "delta", self.crew, meter)\n'
            '    open("good", "r+b").write(b"new"); moment.compare("good", self.crew, meter); print("good")\n'
            '    open("bad", "r+b").write(b"new"); f = open("bad", "r+b"); f.seek(777777); f.write(b"!"); f.close()\n'
            '    moment.compare("bad", self.crew, meter)\n'
            'demo.Demo.run = story; sys.exit(demo.main())')
    r = demo(text, tmp_path, code=1)
    assert 'good' in r.stdout and 'MISMATCH' in r.stderr and '777777' in r.stderr
    assert os.listdir(tmp_path) == []


def test_demo_shows_a_bar_on_a_terminal(tmp_path):
    """While a step runs, and a line with its time when it has ended."""
    text = ('import threading; screen = demo_screen.Screen(); asked = threading.Event()\n'
            'with screen.step("long work") as s:\n'
            '    s.fraction = lambda: asked.set() or 0.25\n'
            f'    assert asked.wait({DEADLINE})\n')
    out = on_a_terminal(text, tmp_path)
    assert re.search(r'long work .*25%', out) and re.search(r'long work +\d+\.\d s', out), out


def on_a_terminal(text, tmp_path):
    pid, fd = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        code = f'import sys; sys.path.insert(0, {os.path.join(ROOT, "scripts")!r}); import demo_screen\n' + text
        os.execve(sys.executable, [sys.executable, '-B', '-c', code], {**os.environ, 'TERM': 'xterm'})
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
    return out.decode(errors='replace')


@pytest.mark.skipif(not which('mkfs.ext4') or not which('qemu-io'), reason='e2fsprogs or qemu-utils is not installed')
def test_demo_prints_commands_that_work(tmp_path):
    """What --keep says how to go on by hand, on empty disks of the same sizes."""
    os.makedirs(tmp_path / 'tree/00')
    (tmp_path / 'tree/00/a-file').write_text('x')
    for name, size in (('disk0', 512 * MiB), ('disk1', 4 * GiB)):
        with open(tmp_path / f'{name}.raw', 'wb') as f:
            f.truncate(size)
    with open(tmp_path / 'disk0.restored.raw', 'wb') as f:
        f.truncate(16 * MiB)
    run(which('mkfs.ext4'), '-q', '-d', 'tree', 'disk0.restored.raw', cwd=tmp_path)
    out = demo(f'import argparse; demo.by_hand(demo_screen.Screen(), argparse.Namespace(bin={BIN!r}), {str(tmp_path)!r})',
               tmp_path).stdout
    lines = out.splitlines()
    lines = lines[next(i for i, line in enumerate(lines) if line.strip().startswith('cd ')):]
    for step in ('tidemark serve', 'tidemark backup', 'tidemark points', 'tidemark stop'):
        assert any(line.strip().startswith(step) for line in lines)
    r = run('bash', '-euxc', '\n'.join(lines))
    assert 'a-file' in r.stdout and len(re.findall(r'disk0 +incremental', r.stdout)) >= 1


# ---------------------------------------------------------------- engines and loops

def nouring():
    path = os.path.join(BUILD, 'io', 'nouring')
    if not os.access(path, os.X_OK):
        pytest.skip('no launcher: libseccomp-dev is not installed')
    return path


def round_trip(d):
    """Full backup, writes, incremental backup; by real clients. The target is the source in the end."""
    fill(d.add_disk('src', SIZE, discard='unmap'), SIZE)
    d.add_disk('dst', SIZE)
    d.cmd('block-dirty-bitmap-add', node='src', name='b')
    uri = d.export('src')
    backup(d, 'src', 'dst', bitmap='b', bitmap_mode='on-success')
    assert end_of(d, 'j') == OK
    qemu_io(uri, 'write -P 1 64k 64k', 'write -z 1M 64k', 'discard 2M 64k', 'flush', 'read -P 1 64k 64k')
    assert d.bitmap('src', 'b')['count'] == 3 * GRANULE
    backup(d, 'src', 'dst', 'incremental', bitmap='b')
    assert end_of(d, 'j') == OK
    assert_same(d.path('src.raw'), d.path('dst.raw'))


@pytest.mark.skipif('TIDEMARK_ENGINE' in os.environ, reason='this run chooses the engine')
def test_portable_is_chosen_where_io_uring_is_forbidden():
    """Nobody says so on the command line: a seccomp filter denies io_uring_setup, as containers do."""
    with Daemon(wrapper=[nouring()]) as d:
        assert d.cmd('query-tidemark')['engine'] == 'portable'
        round_trip(d)


def test_portable_by_option():
    with Daemon(['--engine', 'portable']) as d:
        assert d.cmd('query-tidemark')['engine'] == 'portable'
        round_trip(d)


def test_io_uring_by_option_is_no_wish(tmp_path):
    """Asked for by name where it is forbidden: one line, exit 1."""
    r = run(nouring(), os.path.join(BIN, 'tidemarkd'), '--engine', 'io_uring', '--blockdev', 'null-co,node-name=n', code=1,
            cwd=tmp_path)
    assert 'ring' in r.stderr and r.stderr.count('\n') == 1


def cpu_of_threads(d):
    """{thread: nanoseconds on a CPU}"""
    out = {}
    for t in os.listdir(f'/proc/{d.proc.pid}/task'):
        with open(f'/proc/{d.proc.pid}/task/{t}/schedstat') as f:
            out[t] = int(f.read().split()[0])
    return out


def busiest_thread(d, handle):
    """Which thread serves this connection? A null disk: nothing but its loop has work."""
    before = cpu_of_threads(d)
    for _ in range(300):
        handle.pread(64 * KiB, 0)
    return max((cpu - before.get(t, 0), t) for t, cpu in cpu_of_threads(d).items())[1]


@pytest.mark.skipif(not os.path.exists('/proc/self/schedstat'), reason='this kernel does not count threads')
def test_connections_are_spread_over_loops():
    with Daemon(['--loops', '3', '--blockdev', 'null-co,node-name=n', '--object', 'iothread,id=t0']) as d:
        assert d.cmd('query-tidemark')['loops'] == 4, 'three for exports, one for control'
        handles = [connect(d.export('n'))] + [connect(d.uri('n')) for _ in range(5)]
        control = str(d.proc.pid)
        served = [busiest_thread(d, h) for h in handles]
        assert len(set(served)) == 3 and control not in served and sorted(map(served.count, served)) == [2] * 6
        pinned = d.export('n', 'pinned', iothread='t0')
        handles += [connect(pinned) for _ in range(3)]
        assert len({busiest_thread(d, h) for h in handles[6:]}) == 1
        for h in handles:
            h.shutdown()


# ---------------------------------------------------------------- commands, drivers, options

COMMANDS = """qmp_capabilities query-version query-commands query-qmp-schema query-status query-tidemark query-dirty-ranges
quit blockdev-add blockdev-del query-named-block-nodes query-block x-debug-block-dirty-bitmap-sha256
block-dirty-bitmap-add block-dirty-bitmap-remove block-dirty-bitmap-clear block-dirty-bitmap-enable
block-dirty-bitmap-disable block-dirty-bitmap-merge x-block-dirty-bitmap-enable x-block-dirty-bitmap-disable
x-block-dirty-bitmap-merge blockdev-backup transaction query-jobs query-block-jobs job-pause job-resume job-cancel
job-finalize job-dismiss job-complete block-job-pause block-job-resume block-job-cancel block-job-set-speed
block-job-finalize block-job-dismiss block-job-complete nbd-server-start nbd-server-stop nbd-server-add
nbd-server-remove block-export-add block-export-del query-block-exports object-add object-del""".split()
EVENTS = """JOB_STATUS_CHANGE BLOCK_JOB_COMPLETED BLOCK_JOB_CANCELLED BLOCK_JOB_ERROR BLOCK_JOB_PENDING BLOCK_JOB_READY
BLOCK_EXPORT_DELETED""".split()


def test_all_commands_and_events_are_there(tide):
    assert set(COMMANDS) <= {c['name'] for c in tide.cmd('query-commands')}
    schema = {e['name']: e['meta-type'] for e in tide.cmd('query-qmp-schema')}
    assert all(schema.get(e) == 'event' for e in EVENTS)


def test_query_tidemark(tide):
    info = tide.cmd('query-tidemark')
    assert set(info) == {'version', 'engine', 'loops', 'libraries'}
    assert run(os.path.join(BIN, 'tidemarkd'), '--version').stdout.split()[1] == info['version']
    assert any(re.fullmatch(r'jansson \d+\.\d+(\.\d+)?', lib) for lib in info['libraries'])


@pytest.mark.parametrize('kind', ['secret', 'tls-creds-x509', 'authz-list', 'rng-random', 'nosuch'])
def test_other_objects_are_refused_by_name(tide, kind):
    with pytest.raises(QmpError, match=kind):
        tide.cmd('object-add', {'qom-type': kind, 'id': 'o'})
    with pytest.raises(QmpError, match="'o'"):
        tide.cmd('object-del', id='o')


@pytest.mark.parametrize('members', [{'aio': 'threads'}, {'aio': 'io_uring'}, {'aio-max-batch': 8}, {'locking': 'on'},
                                     {'locking': 'off'}, {'locking': 'auto'}, {'drop-cache': False}], ids=str)
def test_members_of_file_are_taken(tide, members):
    tide.add_file('f', SIZE, **members)
    qemu_io(tide.export('f'), 'write -P 3 4k 4k', 'read -P 3 4k 4k', 'read -P 0 8k 4k')


def flags_of(d, path):
    """Flags with which the daemon has this file open."""
    fds = f'/proc/{d.proc.pid}/fd'
    for fd in os.listdir(fds):
        if os.path.realpath(os.path.join(fds, fd)) == os.path.realpath(path):
            with open(f'/proc/{d.proc.pid}/fdinfo/{fd}') as f:
                return int(re.search(r'^flags:\s*(\d+)', f.read(), re.M).group(1), 8)
    raise AssertionError(f'{path} is not open')


@pytest.mark.parametrize('direct', [False, True])
def test_cache_direct_is_what_the_kernel_is_told(tide, direct):
    path = tide.path('f.raw')
    with open(path, 'wb') as f:
        f.truncate(SIZE)
    try:
        os.close(os.open(path, os.O_RDONLY | O_DIRECT))
    except OSError:
        pytest.skip('no direct I/O on this file system')
    tide.add_file('f', SIZE, cache={'direct': direct}, **({'aio': 'native'} if direct else {}))
    assert bool(flags_of(tide, path) & O_DIRECT) == direct


def test_no_flush_tries_none(tide):
    """A flush that would fail below is not even tried."""
    tide.add_file('f', SIZE)
    tide.cmd('blockdev-add', {'driver': 'blkdebug', 'node-name': 'bad', 'image': 'f',
                              'inject-error': [{'event': 'none', 'iotype': 'flush'}]})
    tide.cmd('blockdev-add', driver='raw', node_name='safe', file='bad')
    tide.cmd('blockdev-add', driver='raw', node_name='fast', file='bad', cache={'no-flush': True})
    h = connect(tide.export('fast'))
    h.flush()
    h.shutdown()
    h = connect(tide.export('safe'))
    with pytest.raises(nbd.Error, match='Input/output'):
        h.flush()
    h.shutdown()


@pytest.mark.skipif(os.geteuid() != 0 or not which('losetup'), reason='needs root and losetup')
def test_host_device(tide):
    path = tide.path('under')
    with open(path, 'wb') as f:
        f.truncate(SIZE)
    r = subprocess.run([which('losetup'), '-f', '--show', path], capture_output=True, text=True)
    if r.returncode:
        pytest.skip('no loop devices here')
    device = r.stdout.strip()
    try:
        with pytest.raises(QmpError, match='host_device'):
            tide.cmd('blockdev-add', driver='file', node_name='d', filename=device)
        tide.cmd('blockdev-add', driver='host_device', node_name='d', filename=device, discard='unmap')
        assert tide.node('d')['image']['virtual-size'] == SIZE
        tide.cmd('block-dirty-bitmap-add', node='d', name='b')
        qemu_io(tide.export('d'), 'write -P 6 64k 64k', 'write -z 1M 64k', 'discard 2M 64k', 'flush', 'read -P 6 64k 64k')
        assert content(path)[64 * KiB:128 * KiB] == b'\6' * 64 * KiB
        assert tide.bitmap('d', 'b')['count'] == 3 * GRANULE
    finally:
        tide.proc.terminate()
        tide.proc.wait(DEADLINE)
        subprocess.run([which('losetup'), '-d', device], check=True)


# ---------------------------------------------------------------- very large disks

def test_a_disk_of_8_eib(tide):
    """The largest there is; its last sector is written, marked and found again."""
    size, shifts = 2 ** 63 - 512, (16, 21, 31)
    tide.cmd('blockdev-add', driver='null-co', node_name='n', size=size)
    for s in shifts:
        tide.cmd('block-dirty-bitmap-add', node='n', name=f'b{s}', granularity=1 << s)
    h = connect(tide.export('n'))
    assert h.get_size() == size
    h.pwrite(b'x' * 512, 0)
    h.pwrite(b'x' * 512, size - 512)
    h.shutdown()
    for s in shifts:
        tail = size >> s << s
        assert tide.ranges('n', f'b{s}') == [(0, 1 << s), (tail, size - tail)]
        assert tide.bitmap('n', f'b{s}')['count'] == 2 << s


def test_an_empty_bitmap_of_256_tib_costs_less_than_a_mebibyte(tide, sanitized):
    """Flat it were 512 MiB. Resident memory of the daemon, not what it says about itself."""
    tide.cmd('blockdev-add', driver='null-co', node_name='n', size=256 * TiB)
    h = connect(tide.export('n'))
    before, n = own_memory(tide), 32
    for i in range(n):
        tide.cmd('block-dirty-bitmap-add', node='n', name=f'b{i}', granularity=64 * KiB)
    assert tide.bitmap('n', 'b0')['count'] == 0
    assert sanitized or own_memory(tide) - before < n * MiB // 4
    h.pwrite(b'x' * 512, 255 * TiB)
    h.shutdown()
    tide.cmd('block-dirty-bitmap-merge', node='n', target='b0', bitmaps=[f'b{i}' for i in range(1, n)])
    assert tide.ranges('n', 'b0') == [(255 * TiB, 64 * KiB)]
    assert sanitized or own_memory(tide) - before < n * MiB // 2


# ---------------------------------------------------------------- how a backup copies

def seconds_with(d, workers):
    """Of a backup whose target takes 20 ms for each of 32 writes."""
    begin = time.monotonic()
    backup(d, 'src', 'slow', x_perf={'max-workers': workers, 'max-chunk': GRANULE, 'use-copy-range': False})
    assert end_of(d, 'j') == OK
    return time.monotonic() - begin


def test_workers_copy_in_parallel(tide):
    size = 32 * GRANULE
    fill(tide.add_disk('src', size), size)
    tide.cmd('blockdev-add', {'driver': 'null-co', 'node-name': 'slow', 'size': size, 'latency-ns': 20_000_000})
    one = seconds_with(tide, 1)
    assert one >= 32 * 0.02
    assert any(seconds_with(tide, 16) < one / 2 for _ in range(5))  # a busy machine may disturb some


@pytest.mark.skipif(not which('strace'), reason='strace is not installed')
@pytest.mark.parametrize('offload', [True, False])
def test_copy_offload(offload, sanitized):
    """The kernel is asked to copy, unless the client says no."""
    if sanitized:
        pytest.skip('a leak checker and strace want the same place')
    with Daemon(wrapper=['strace', '-D', '-f', '-qq', '-o', 'calls', '-e', 'trace=copy_file_range']) as d:
        fill(d.add_disk('src', SIZE), SIZE)
        d.add_disk('dst', SIZE)
        backup(d, 'src', 'dst', x_perf={'use-copy-range': offload})
        assert end_of(d, 'j') == OK
        assert_same(d.path('src.raw'), d.path('dst.raw'))
        assert ('copy_file_range' in content(d.path('calls')).decode()) == offload


@pytest.mark.skipif(not which('strace'), reason='strace is not installed')
@pytest.mark.parametrize('how', ['quit', 'signal'])
def test_the_end_flushes(how, sanitized):
    """What a guest wrote and never flushed is synced before the daemon is gone."""
    if sanitized:
        pytest.skip('a leak checker and strace want the same place')
    engine = [] if 'TIDEMARK_ENGINE' in os.environ else ['--engine', 'portable']  # strace does not see rings
    with Daemon(engine, wrapper=['strace', '-D', '-f', '-qq', '-y', '-o', 'calls', '-e', 'trace=fdatasync,fsync']) as d:
        d.add_disk('disk', SIZE)
        h = connect(d.export('disk'))
        h.pwrite(b'x' * 4096, 0)
        assert not os.path.getsize(d.path('calls')), 'not before'
        if how == 'quit':
            d.cmd('quit')
            assert d.proc.wait(DEADLINE) == 0
        else:
            assert d.stop() == 0
        until('strace has written it', lambda: re.search(
            r'sync\(\d+<[^>]*/disk.raw>\) += 0', content(d.path('calls')).decode()))


# ---------------------------------------------------------------- what is written about it

def manual(name):
    """The page as text without roff, or skip."""
    path = os.path.join(BUILD, name)
    if not os.path.exists(path):
        pytest.skip(f'{name} was not built: scdoc is not installed')
    with open(path) as f:
        return re.sub(r'\\f[BIRP]|\\&', '', f.read()).replace('\\-', '-')


def test_manual_of_the_daemon_has_every_option():
    page = manual('docs/tidemarkd.8')
    options = set(re.findall(r'--[a-z-]+', run(os.path.join(BIN, 'tidemarkd'), '--help').stdout))
    assert len(options) >= 12
    for option in options:
        assert option in page


def test_manual_of_the_tool_has_every_command_option_and_exit_code():
    page, tool = manual('cli/tidemark.1'), os.path.join(BIN, 'tidemark')
    names = re.findall(r'^  ((?:\w+ )?\w+)  +\w', run(tool, '--help').stdout, re.M)
    assert len(names) > 20
    for name in names:
        noun, *verb = name.split()
        assert name in page or re.search(rf'^.*\b{noun} [\w|]*\b{verb[0]}\b', page, re.M), name
        for option in set(re.findall(r'^  (--[a-z-]+)', run(tool, *name.split(), '--help').stdout, re.M)):
            assert option in page, (name, option)
    assert 'EXIT CODES' in page


def test_manual_of_qmp_and_words_have_every_command(tide):
    names = [c['name'] for c in tide.cmd('query-commands')]
    with open(os.path.join(BUILD, 'schema', 'qmp.md')) as f:
        headings = set(re.findall(r'^### (\S+)', f.read(), re.M))
    with open(os.path.join(BUILD, 'schema', 'words.txt')) as f:
        words = set(f.read().split())
    assert set(names) <= headings and set(names) <= words


def test_a_backup_directory_is_as_the_document_says(tide):
    """docs/backup-format.md prints a manifest: all that it shows is written, and all that is written is told."""
    with open(os.path.join(ROOT, 'docs/backup-format.md')) as f:
        text = f.read()
    tide.add_disk('disk1', SIZE)
    run(os.path.join(BIN, 'tidemark'), '--socket', tide.qmp_path, 'backup', '--to', tide.path('bk'), 'disk1')
    with open(tide.path('bk/manifest.json')) as f:
        made = json.load(f)
    example = json.loads(re.search(r'```json\n(.*?)```', text, re.S).group(1))

    def members(m):
        return set(m) | set(m['points'][0]) | set(m['points'][0]['disks'][0])
    assert members(made) >= members(example)
    assert not [m for m in members(made) if f'`{m}`' not in text and f'"{m}"' not in text]
