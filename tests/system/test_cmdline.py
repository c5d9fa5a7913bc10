# SPDX-License-Identifier: Apache-2.0
"""The command line: every option, their order, mistakes (one line, exit 1, nothing left), --daemonize,
sockets that exist already, standard input as a monitor, a user without rights."""
import json
import os
import shutil
import signal
import socket
import subprocess
import time

import pytest

import harness
from harness import DEADLINE, Daemon, MiB, Qmp, QmpError, on_free_port, qemu_io, which

PROGRAM = os.path.join(harness.BIN, 'tidemarkd')
NULL = ['--blockdev', 'null-co,node-name=n,size=1M']


def run(args, cwd, **options):
    return subprocess.run([PROGRAM, *map(str, args)], cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, timeout=DEADLINE, **options)


def until(what, message):
    deadline = time.monotonic() + DEADLINE
    while not (result := what()):
        assert time.monotonic() < deadline, message
        time.sleep(0.005)  # polling: there is nothing to wait on
    return result


def alive(pid):
    try:
        with open(f'/proc/{pid}/stat') as f:
            return f.read().rsplit(')', 1)[1].split()[0] != 'Z'
    except FileNotFoundError:
        return False


@pytest.fixture
def place(tmp_path):
    """A directory with a disk in it, to start in."""
    with open(tmp_path / 'disk', 'wb') as f:
        f.truncate(MiB)
    return tmp_path


# ---------------------------------------------------------------- all options at work

def test_help_and_version(place):
    r = run(['--help'], place)
    assert r.returncode == 0 and r.stderr == ''
    for option in ('--blockdev', '--chardev', '--monitor', '--nbd-server', '--export', '--object', '--daemonize',
                   '--pidfile', '--engine', '--loops', '--help', '--version'):
        assert option in r.stdout
    for option in ('--version', '-V'):
        r = run([option], place)
        assert r.returncode == 0 and r.stdout.startswith('tidemarkd ') and r.stdout.count('\n') == 1
    assert run(['-h'], place).returncode == 0
    assert os.listdir(place) == ['disk']


def test_everything_from_the_command_line(place):
    args = ['--blockdev', f'driver=file,node-name=f,filename={place}/disk,discard=unmap',
            '--blockdev', 'raw,node-name=r,file=f',
            '--object', 'iothread,id=t0',
            '--export', 'nbd,id=e0,node-name=r,name=disk,writable=on,iothread=t0,description=a,,b',
            '--export', 'type=nbd,id=e1,node-name=f',
            '--pidfile', str(place / 'pid')]
    with Daemon(args) as d:
        assert [n['node-name'] for n in d.cmd('query-named-block-nodes')] == ['r', 'f']
        assert [(e['id'], e['node-name']) for e in d.cmd('query-block-exports')] == [('e1', 'f'), ('e0', 'r')]
        qemu_io(d.uri('disk'), 'write -P 7 4k 4k')
        with open(place / 'disk', 'rb') as f:
            assert f.read()[4096:8192] == b'\7' * 4096
        with open(place / 'pid') as f:
            assert int(f.read()) == d.proc.pid
        info = subprocess.run(['nbdinfo', '--json', d.uri('disk')], capture_output=True, text=True)
        assert json.loads(info.stdout)['exports'][0]['description'] == 'a,b'
    assert os.listdir(place) == ['disk']


@pytest.mark.parametrize('engine', ['auto', 'io_uring', 'portable'])
@pytest.mark.parametrize('loops', [1, 3])
def test_engine_and_loops(engine, loops):
    with Daemon(['--engine', engine, '--loops', str(loops)] + NULL) as d:
        info = d.cmd('query-tidemark')
        assert engine in ('auto', info['engine'])
        d.export('n')
        qemu_io(d.uri('n'), 'write 0 1M', 'read 0 1M')


def test_json_forms(place):
    with Daemon(['--blockdev', json.dumps({'driver': 'raw', 'node-name': 'r', 'read-only': True, 'file': {
                    'driver': 'file', 'filename': f'{place}/disk', 'cache': {'direct': False}}}),
                 '--blockdev', "{'driver':'null-co','node-name':'quoted \"not\"'}".replace(' "not"', ''),
                 '--export', '{"type":"nbd","id":"e","node-name":"r"}',
                 '--object', '{"qom-type":"iothread","id":"t"}']) as d:
        assert d.node('r')['ro'] is True and d.node('quoted')['drv'] == 'null-co'
        assert [e['id'] for e in d.cmd('query-block-exports')] == ['e']


def test_nbd_server_in_json_and_tcp(place):
    def serve(port):
        with Daemon(['--nbd-server', json.dumps({'addr': {'type': 'inet', 'host': '127.0.0.1', 'port': str(port)},
                                                 'max-connections': 3})] + NULL +
                    ['--export', 'nbd,id=e,node-name=n,writable=on'], nbd=False):
            qemu_io(f'nbd://127.0.0.1:{port}/n', 'read 0 64k')
    on_free_port(serve)


def test_old_spelling_of_chardev_flags(place):
    with Daemon(['--chardev', f'socket,server,nowait,id=c2,path={place}/old', '--monitor',
                 'chardev=c2,mode=control,pretty']):
        s = socket.socket(socket.AF_UNIX)
        s.settimeout(DEADLINE)
        s.connect(f'{place}/old')
        greeting = b''
        while greeting.count(b'{') != greeting.count(b'}') or not greeting.endswith(b'\r\n'):
            greeting += s.recv(4096)
        assert greeting.count(b'\n') > 5, 'pretty'
        assert 'QMP' in json.loads(greeting)
        s.sendall(b'{"execute":"qmp_capabilities"}')
        assert json.loads(s.recv(4096)) == {'return': {}}
        s.close()


def test_monitor_over_tcp_and_implied_keys():
    def serve(port):
        with Daemon(['--chardev', f'socket,id=c2,host=127.0.0.1,port={port},server=on,wait=off', '--monitor', 'c2']):
            s = socket.create_connection(('127.0.0.1', port), DEADLINE)
            assert b'QMP' in s.recv(4096)
            s.close()
    on_free_port(serve)


def test_chardev_that_connects(place):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f'{place}/there')
        listener.listen()
        listener.settimeout(DEADLINE)
        with Daemon(['--chardev', f'socket,id=c2,path={place}/there', '--monitor', 'c2']):
            s, _ = listener.accept()
            s.settimeout(DEADLINE)
            assert b'QMP' in s.recv(4096)
            s.close()
    assert os.path.exists(place / 'there'), 'the socket belongs to the other side'


# ---------------------------------------------------------------- order

def test_options_are_carried_out_in_order(place):
    f = f'file,node-name=f,filename={place}/disk'
    for args, culprit in [
            (['--blockdev', 'raw,node-name=r,file=f', '--blockdev', f], "'f'"),
            (['--nbd-server', f'addr.type=unix,addr.path={place}/s', '--export', 'nbd,id=e,node-name=f',
              '--blockdev', f], "'f'"),
            (['--blockdev', f, '--export', 'nbd,id=e,node-name=f',
              '--nbd-server', f'addr.type=unix,addr.path={place}/s'], '--export'),
            (['--monitor', 'chardev=c', '--chardev', f'socket,id=c,path={place}/s,server=on'], "'c'")]:
        r = run(args, place)
        assert r.returncode == 1 and culprit in r.stderr and r.stderr.count('\n') == 1, r.stderr
        assert os.listdir(place) == ['disk']


def test_monitor_first_serves_when_all_is_up(place):
    """The monitor stands before the nodes, but nobody is served before they are there."""
    args = [PROGRAM, '--chardev', f'socket,id=c,path={place}/q,server=on,wait=off', '--monitor', 'c']
    for i in range(60):
        args += ['--blockdev', f'file,node-name=f{i},filename={place}/disk,locking=off']
    p = subprocess.Popen(args)
    try:
        def connect():
            try:
                return Qmp(f'{place}/q')
            except (FileNotFoundError, ConnectionRefusedError):
                return None
        c = until(connect, 'no monitor')
        assert len(c.cmd('query-named-block-nodes')) == 60
        c.cmd('quit')
        assert p.wait(DEADLINE) == 0
        c.close()
    finally:
        p.kill()
        p.wait()


# ---------------------------------------------------------------- mistakes

WRONG = [  # arguments, words of the one line
    (['--nosuch'], ['--nosuch']),
    (['-x'], ['-x']),
    (['extra'], ['extra']),
    (['--'] + ['extra'], ['extra']),
    (['--blockdev'], ['--blockdev']),
    (['--engine', 'steam'], ['steam']),
    (['--engine', ''], ['--engine']),
    (['--loops', '0'], ['--loops']),
    (['--loops', '-1'], ['--loops']),
    (['--loops', '65'], ['--loops']),
    (['--loops', '2x'], ['2x']),
    (['--loops', ''], ['--loops']),
    (['--loops', '99999999999999999999'], ['--loops']),
    (['--blockdev', ''], ['driver']),
    (['--blockdev', ','], ['--blockdev']),
    (['--blockdev', 'null-co'], ['node-name']),
    (['--blockdev', 'null-co,node-name=1x'], ['1x']),
    (['--blockdev', 'null-co,node-name=' + 'x' * 32], ['31']),
    (['--blockdev', 'null-co,node-name=a,foo=1'], ['foo']),
    (['--blockdev', 'null-co,node-name=a,size=12Q'], ['size']),
    (['--blockdev', 'null-co,node-name=a,size=-1'], ['size']),
    (['--blockdev', 'null-co,node-name=a,size=99999999999999999999'], ['size']),
    (['--blockdev', 'null-co,node-name=a,read-only=maybe'], ['read-only', 'maybe']),
    (['--blockdev', 'null-co,node-name=a,node-name=b'], ['node-name']),
    (['--blockdev', 'null-co,node-name=a,node-name.b=c'], ['node-name']),
    (['--blockdev', 'null-co,node-name=a,'], ['comma']),
    (['--blockdev', 'null-co,node-name=a,,b'], ['node-name']),
    (['--blockdev', 'null-co,=x'], ['=x']),
    (['--blockdev', 'null-co,node-name'], ['node-name']),
    (['--blockdev', 'nosuch,node-name=a'], ['nosuch']),
    (['--blockdev', 'null-co,node-name=n'], ["'n'", 'in use']),
    (['--blockdev', 'file,node-name=a,filename=missing'], ['missing', 'No such file']),
    (['--blockdev', 'file,node-name=a,filename=.'], ["'.'"]),
    (['--blockdev', 'file,node-name=a,filename='], ['filename']),
    (['--blockdev', 'file,node-name=a'], ['filename']),
    (['--blockdev', 'raw,node-name=a,file=nosuch'], ['nosuch']),
    (['--blockdev', 'raw,node-name=a,file=a'], ["'a'"]),
    (['--blockdev', 'raw,node-name=a,file.driver=file,file.filename=missing'], ['missing']),
    (['--blockdev', 'raw,node-name=a,file.0=x,file.driver=y'], ['file']),
    (['--blockdev', '{"driver":"null-co"'], ['JSON']),
    (['--blockdev', '{"driver":"null-co","node-name":"a"} x'], ['JSON']),
    (['--blockdev', '{"driver":"null-co","driver":"null-co","node-name":"a"}'], ['JSON']),
    (['--blockdev', '{"driver":"null-co","node-name":"a","size":"1M"}'], ['size']),
    (['--blockdev', '{"a":' + '[' * 5000], ['JSON']),
    (['--export', 'nbd,id=e,node-name=nosuch'], ['nosuch']),
    (['--export', 'nbd,node-name=n'], ['id']),
    (['--export', 'nbd,id=1e,node-name=n'], ['1e']),
    (['--export', 'zzz,id=e,node-name=n'], ['zzz']),
    (['--export', 'nbd,id=e,node-name=n', '--export', 'nbd,id=e,node-name=n,name=x'], ["'e'"]),
    (['--export', 'nbd,id=e,node-name=n', '--export', 'nbd,id=e2,node-name=n'], ["'n'"]),
    (['--export', 'nbd,id=e,node-name=n,bitmaps.0=b'], ["'b'"]),
    (['--export', 'nbd,id=e,node-name=n,bitmaps.1=b'], ['bitmaps']),
    (['--nbd-server', 'addr.type=unix,addr.path=second'], ['--nbd-server']),
    (['--nbd-server', 'addr.type=zz'], ['zz']),
    (['--nbd-server', 'addr.type=unix'], ['addr.path']),
    (['--nbd-server', ''], ['addr']),
    (['--chardev', 'socket,id=c2,server=on'], ['path']),
    (['--chardev', 'socket,path=x,server=on'], ['id']),
    (['--chardev', 'socket,id=c2,path=x,foo=1'], ['foo']),
    (['--chardev', 'socket,id=c2,path=x,server=maybe'], ['maybe']),
    (['--chardev', 'socket,id=c2,path=' + 'x' * 200], ['path']),
    (['--chardev', 'nosuch,id=c2'], ['nosuch']),
    (['--chardev', 'stdio,id=qmp'], ["'qmp'"]),
    (['--chardev', ''], ['--chardev']),
    (['--chardev', 'socket,id=c2,path=not-there', '--monitor', 'c2'], ["'c2'"]),
    (['--chardev', 'socket,id=c2,path=no/such/dir/s,server=on', '--monitor', 'c2'], ['no/such/dir']),
    (['--monitor', 'nosuch'], ["'nosuch'"]),
    (['--monitor', 'chardev=qmp'], ["'qmp'"]),
    (['--monitor', 'chardev=qmp,mode=readline'], ['readline']),
    (['--monitor', ''], ['chardev']),
    (['--object', 'nosuch,id=o'], ['nosuch']),
    (['--object', 'iothread'], ['id']),
    (['--object', 'iothread,id=t', '--object', 'iothread,id=t'], ["'t'"]),
    (['--object', 'iothread,id=1t'], ['1t']),
    (['--pidfile', 'no/such/dir/pid'], ['no/such/dir/pid']),
    (['--pidfile', ''], ['pidfile']),
    (['--chardev', 'stdio,id=s', '--monitor', 's', '--daemonize'], ['daemonize']),
]


@pytest.mark.parametrize('daemonize', [False, True], ids=['foreground', 'daemonize'])
@pytest.mark.parametrize('args,words', WRONG, ids=[' '.join(w[0])[:60] for w in WRONG])
def test_a_mistake_is_one_line_and_nothing_stays(place, args, words, daemonize):
    """It stands behind options that made sockets, a pidfile, a node."""
    good = ['--nbd-server', 'addr.type=unix,addr.path=nbd', '--chardev', 'socket,id=qmp,path=q,server=on,wait=off',
            '--monitor', 'chardev=qmp', *NULL] + (['--daemonize'] if daemonize else [])
    if '--pidfile' not in args:
        good += ['--pidfile', 'pid']
    r = run(good + args, place)
    assert r.returncode == 1
    assert r.stderr.startswith('tidemarkd: ') and r.stderr.count('\n') == 1 and r.stderr.endswith('\n'), r.stderr
    assert r.stdout == ''
    for w in words:
        assert w in r.stderr
    assert os.listdir(place) == ['disk']


def test_control_bytes_in_a_mistake_stay_one_line(place):
    r = run(['--blockdev', 'null-co,node-name=a\nb\x1b[31m'], place)
    assert r.returncode == 1
    assert r.stderr.count('\n') == 1 and '\x1b' not in r.stderr


# ---------------------------------------------------------------- background

def read_pid(path):
    with open(path) as f:
        return int(f.read())


def test_daemonize_returns_when_up(place):
    """Relative names work although the daemon leaves the directory, also when it takes them away."""
    r = run(['--daemonize', '--pidfile', 'pid', '--nbd-server', 'addr.type=unix,addr.path=nbd',
             '--blockdev', 'file,node-name=f,filename=disk', '--export', 'nbd,id=e,node-name=f,writable=on',
             '--chardev', 'socket,id=c,path=q,server=on,wait=off', '--monitor', 'c'], place)
    pid = read_pid(place / 'pid')
    try:
        assert (r.returncode, r.stdout, r.stderr) == (0, '', '')
        with open(f'/proc/{pid}/stat') as f:
            fields = f.read().rsplit(')', 1)[1].split()
        assert int(fields[3]) == pid, 'a session of its own'
        assert os.readlink(f'/proc/{pid}/cwd') == '/'
        for fd in (0, 1, 2):
            assert os.readlink(f'/proc/{pid}/fd/{fd}') == '/dev/null'
        c = Qmp(f'{place}/q')  # at once: it is up
        assert c.cmd('query-named-block-nodes')[0]['node-name'] == 'f'
        qemu_io(f'nbd+unix:///f?socket={place}/nbd', 'read 0 1M')
        c.cmd('quit')
        c.close()
        until(lambda: not alive(pid), 'it did not end')
        assert os.listdir(place) == ['disk']
    finally:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


def test_daemonize_ends_on_sigterm(place):
    r = run(['--daemonize', '--pidfile', 'pid', *NULL], place)
    assert r.returncode == 0
    pid = read_pid(place / 'pid')
    os.kill(pid, signal.SIGTERM)
    until(lambda: not alive(pid), 'it did not end')
    assert os.listdir(place) == ['disk']


def test_pidfile_of_a_running_daemon_is_not_taken(place):
    with Daemon(['--pidfile', f'{place}/pid']) as d:
        r = run(['--pidfile', 'pid', *NULL, '--daemonize'], place)
        assert r.returncode == 1 and 'pid' in r.stderr and r.stderr.count('\n') == 1
        assert read_pid(place / 'pid') == d.proc.pid
    assert os.listdir(place) == ['disk']


def test_long_mistakes_are_cut(place):
    r = run(['--blockdev', 'null-co,node-name=' + '\u20ac' * 5000], place)
    assert r.returncode == 1 and len(r.stderr) < 500 and r.stderr.count('\n') == 1


def test_pidfile_left_by_a_crash_is_taken_over(place):
    (place / 'pid').write_text('12345678901234567890\n')
    with Daemon(['--pidfile', f'{place}/pid']) as d:
        assert read_pid(place / 'pid') == d.proc.pid


# ---------------------------------------------------------------- sockets that exist already

@pytest.mark.parametrize('which_socket', ['nbd', 'q'])
def test_stale_socket_is_replaced(place, which_socket):
    """As a kill -9 leaves it."""
    s = socket.socket(socket.AF_UNIX)
    s.bind(f'{place}/{which_socket}')
    s.close()
    with Daemon(['--chardev', f'socket,id=c2,path={place}/q,server=on,wait=off', '--monitor', 'c2',
                 '--nbd-server', f'addr.type=unix,addr.path={place}/nbd', *NULL,
                 '--export', 'nbd,id=e,node-name=n,writable=on'], nbd=False):
        Qmp(f'{place}/q').close()
        qemu_io(f'nbd+unix:///n?socket={place}/nbd', 'read 0 64k')


def test_stale_sockets_of_a_killed_daemon(place):
    d = Daemon()
    with d:
        d.quit_check = False
        d.proc.kill()
        d.proc.wait()

        def refused():  # with io_uring the kernel lets go of the socket some time after the process
            try:
                socket.socket(socket.AF_UNIX).connect(d.qmp_path)
            except ConnectionRefusedError:
                return True
        until(refused, 'the socket of the dead process')
        with Daemon(['--chardev', f'socket,id=c2,path={d.qmp_path},server=on', '--monitor', 'c2']):
            Qmp(d.qmp_path).close()


def test_live_socket_is_refused(place):
    with Daemon() as d:
        for args in (['--chardev', f'socket,id=c,path={d.qmp_path},server=on,wait=off', '--monitor', 'c'],
                     ['--nbd-server', f'addr.type=unix,addr.path={d.nbd_path}']):
            r = run(args + NULL, place)
            assert r.returncode == 1 and r.stderr.count('\n') == 1 and '.sock' in r.stderr
        Qmp(d.qmp_path).close()
        assert os.path.exists(d.nbd_path)


def test_file_in_the_place_of_a_socket_is_left_alone(place):
    (place / 'q').write_text('precious')
    r = run(['--chardev', 'socket,id=c,path=q,server=on', '--monitor', 'c'], place)
    assert r.returncode == 1 and "q" in r.stderr
    assert (place / 'q').read_text() == 'precious'


def test_tcp_port_in_use_is_refused(place):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        s.listen()
        port = s.getsockname()[1]
        r = run(['--nbd-server', f'addr.type=inet,addr.host=127.0.0.1,addr.port={port}'], place)
    assert r.returncode == 1 and str(port) in r.stderr and r.stderr.count('\n') == 1


# ---------------------------------------------------------------- monitor on standard input

def test_monitor_on_stdio(place):
    p = subprocess.Popen([PROGRAM, *NULL, '--chardev', 'stdio,id=s', '--monitor', 'chardev=s'], cwd=place,
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert 'QMP' in json.loads(p.stdout.readline())
        p.stdin.write(b'{"execute":"qmp_capabilities"}\n{"execute":"query-named-block-nodes","id":1}\n')
        p.stdin.flush()
        assert json.loads(p.stdout.readline()) == {'return': {}}
        assert json.loads(p.stdout.readline())['return'][0]['node-name'] == 'n'
        out, err = p.communicate(b'{"execute":"quit"}\n', DEADLINE)
        assert json.loads(out.splitlines()[0]) == {'return': {}} and err == b''
        assert p.returncode == 0
    finally:
        p.kill()
        p.wait()


def test_script_on_stdin_from_a_file(place):
    (place / 'script').write_text('{"execute":"qmp_capabilities"}{"execute":"query-version"}{"execute":"quit"}')
    with open(place / 'script') as script:
        r = subprocess.run([PROGRAM, '--chardev', 'stdio,id=s', '--monitor', 's'], stdin=script, capture_output=True,
                           text=True, timeout=DEADLINE)
    assert r.returncode == 0 and r.stderr == ''
    lines = [json.loads(x) for x in r.stdout.splitlines()]
    assert 'QMP' in lines[0] and lines[1] == lines[3] == {'return': {}} and 'package' in lines[2]['return']


def test_end_of_stdin_does_not_end_the_daemon(place):
    with Daemon(['--chardev', 'stdio,id=s', '--monitor', 's']) as d:  # its stdin is /dev/null
        assert d.cmd('query-version')
        until(lambda: '"QMP"' in d.log(), 'no greeting')


# ---------------------------------------------------------------- rights

@pytest.mark.skipif(os.geteuid() != 0 or not which('setpriv'), reason='needs root and setpriv')
def test_works_without_rights(place):
    """As nobody: no right to lock memory, raise limits or open other people's files is needed."""
    os.chmod(place, 0o755)
    for parent in place.parents:
        if os.stat(parent).st_mode & 0o777 == 0o700:
            os.chmod(parent, 0o711)
    home = place / 'home'
    home.mkdir()
    program = shutil.copy(PROGRAM, place / 'tidemarkd')
    for name, owner, mode in [('mine', 65534, 0o600), ('readable', 0, 0o644), ('secret', 0, 0o600)]:
        with open(home / name, 'wb') as f:
            f.truncate(MiB)
        os.chown(home / name, owner, owner)
        os.chmod(home / name, mode)
    os.chown(home, 65534, 65534)
    p = subprocess.Popen(['setpriv', '--reuid=65534', '--regid=65534', '--clear-groups', program,
                          '--chardev', 'socket,id=c,path=q,server=on,wait=off', '--monitor', 'c',
                          '--nbd-server', 'addr.type=unix,addr.path=nbd',
                          '--blockdev', 'file,node-name=mine,filename=mine',
                          '--export', 'nbd,id=e,node-name=mine,writable=on'], cwd=home)
    try:
        until(lambda: os.path.exists(home / 'nbd') and os.path.exists(home / 'q') or p.poll() is not None, 'not up')
        c = until(lambda: Qmp(f'{home}/q'), 'no monitor')
        qemu_io(f'nbd+unix:///mine?socket={home}/nbd', 'write -P 1 0 64k')
        raw = {'driver': 'raw', 'node-name': 'r'}
        for name, options, works in [
                ('secret', {}, False), ('secret', {'read-only': True}, False), ('readable', {}, False),
                ('readable', {'read-only': True}, True), ('readable', {'auto-read-only': True}, True)]:
            try:
                c.cmd('blockdev-add', {**raw, **options, 'file': {'driver': 'file', 'filename': name}})
                assert works
                c.cmd('blockdev-del', node_name='r')
            except QmpError as e:
                assert not works and name in e.desc and 'Permission denied' in e.desc
        c.cmd('quit')
        c.close()
        assert p.wait(DEADLINE) == 0
    finally:
        p.kill()
        p.wait()
