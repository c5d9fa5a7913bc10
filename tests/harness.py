# SPDX-License-Identifier: Apache-2.0
"""Starting daemons and talking QMP to them, for every black-box test.

    with Daemon() as d:                      # tidemarkd of the build under test
        d.add_disk('disk0', 64 * MiB)        # a raw file and a raw node over it
        d.cmd('block-dirty-bitmap-add', node='disk0', name='b0')
    with Daemon(kind='qsd') as d: ...        # qemu-storage-daemon, the oracle

The build under test is $TIDEMARK_BUILD/bin (default: build/bin beside this file). Nothing here
sleeps: everything waits for an event or a reply, with a deadline.
"""
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time

import silence

KiB, MiB, GiB, TiB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BUILD = os.environ.get('TIDEMARK_BUILD', os.path.join(ROOT, 'build'))
BIN = os.path.join(BUILD, 'bin')
DEADLINE = float(os.environ.get('TIDEMARK_TEST_DEADLINE', '30'))


def which(tool):
    return shutil.which(tool, path=os.environ.get('PATH', '') + ':/usr/bin:/usr/sbin:/sbin')


class QmpError(Exception):
    def __init__(self, error):
        super().__init__(error['desc'])
        self.cls = error['class']
        self.desc = error['desc']
        self.data = error.get('data')


class Confused(Exception):
    """A daemon that does not let a client in."""


class Qmp:
    """One QMP client. Events that come in between are kept in .events. When nothing comes for DEADLINE the
    TimeoutError says of a `daemon` what it is doing."""

    def __init__(self, path, negotiate=True, daemon=None, deadline=DEADLINE):
        self.daemon, self.asked = daemon, None
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(deadline)
        self.sock.connect(path)
        self.buf = b''
        self.events = []
        self.greeting = self.read()
        if negotiate:
            answer = self.raw({'execute': 'qmp_capabilities'})
            if 'return' not in answer:
                raise Confused(answer)
        self.sock.settimeout(DEADLINE)

    def read(self):
        """The next message, whatever it is."""
        while b'\n' not in self.buf:
            with self.patience():
                data = self.sock.recv(1 << 20)
            if not data:
                raise EOFError('the daemon closed the connection')
            self.buf += data
        line, self.buf = self.buf.split(b'\n', 1)
        return json.loads(line)

    @contextlib.contextmanager
    def patience(self):
        try:
            yield
        except TimeoutError as e:
            if not self.daemon or self.sock.gettimeout() != DEADLINE:
                raise
            raise TimeoutError(self.daemon.silence(f'last asked: {self.asked}')) from e

    def send(self, obj):
        self.asked = json.dumps(obj)
        with self.patience():
            self.sock.sendall(self.asked.encode() + b'\n')

    def reply(self):
        while True:
            m = self.read()
            if 'event' not in m:
                return m
            self.events.append(m)

    def raw(self, obj):
        """Send any JSON value, return the whole reply."""
        self.send(obj)
        return self.reply()

    def cmd(self, name, arguments=None, /, **kw):
        """Run a command; the return value, or QmpError. Keywords: _ stands for -."""
        args = dict(arguments or {})
        args.update({k.replace('_', '-'): v for k, v in kw.items()})
        m = self.raw({'execute': name, 'arguments': args} if args else {'execute': name})
        if 'error' in m:
            raise QmpError(m['error'])
        return m['return']

    def event(self, name, /, **data):
        """The next event of that name whose data has these members; others stay in .events."""
        def fits(e):
            return e['event'] == name and all(
                e.get('data', {}).get(k.replace('_', '-')) == v for k, v in data.items())
        for i, e in enumerate(self.events):
            if fits(e):
                return self.events.pop(i)
        while True:
            m = self.read()
            assert 'event' in m, m
            if fits(m):
                return m
            self.events.append(m)

    def job_end(self, job):
        """Wait until a job is gone (status null); all its events in order, as short strings."""
        seen = []

        def take(e):
            data = e.get('data', {})
            if data.get('id', data.get('device')) != job:
                return False
            if e['event'] == 'JOB_STATUS_CHANGE':
                seen.append('S:' + data['status'])
            else:
                seen.append(e['event'] + ('!' if 'error' in data else ''))
            return True
        rest = []
        for e in self.events:
            if not take(e):
                rest.append(e)
        self.events = rest
        while 'S:null' not in seen:
            m = self.read()
            assert 'event' in m, m
            if not take(m):
                self.events.append(m)
        return seen

    def close(self):
        self.sock.close()


class Daemon:
    """A running daemon with a QMP client (.qmp), an NBD server and a directory of its own."""

    def __init__(self, args=(), kind='tidemarkd', nbd=True, wrapper=(), env=None, quit_check=True):
        self.kind = kind
        self.quit_check = quit_check
        self.dir = tempfile.mkdtemp(prefix='tidemark-test-')
        self.qmp_path = os.path.join(self.dir, 'qmp.sock')
        self.nbd_path = os.path.join(self.dir, 'nbd.sock')
        self.log_path = os.path.join(self.dir, 'log')
        if kind == 'qsd':
            program = which('qemu-storage-daemon')
        else:
            program = os.path.join(BIN, 'tidemarkd')
        cmd = list(wrapper) + [program]
        if kind == 'tidemarkd' and os.environ.get('TIDEMARK_ENGINE'):
            cmd += ['--engine', os.environ['TIDEMARK_ENGINE']]
        if nbd:
            cmd += ['--nbd-server', f'addr.type=unix,addr.path={self.nbd_path}']
        cmd += list(args)
        cmd += ['--chardev', f'socket,id=qmp,path={self.qmp_path},server=on,wait=off',
                '--monitor', 'chardev=qmp']
        self.cmdline = cmd
        self.env = {**os.environ, **(env or {})}
        self.qmp = None
        self.start()

    def start(self):
        with open(self.log_path, 'wb') as log:
            self.proc = subprocess.Popen(self.cmdline, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                         env=self.env, cwd=self.dir)

    def __enter__(self):
        try:
            self.qmp = self.first_client_of_qsd() if self.kind == 'qsd' else self.client()
        except BaseException:
            self.kill()
            raise
        return self

    def first_client_of_qsd(self):
        """While qemu-storage-daemon 7.2 starts, two of its threads may see one client. Then it says nothing, hangs up or
        greets twice; another daemon is taken in its place."""
        for patience in (DEADLINE / 6, DEADLINE / 3):
            try:
                q = self.client(deadline=patience)
                if 'return' in q.raw({'execute': 'query-version'}):
                    return q
            except (TimeoutError, EOFError, ConnectionError, Confused):
                pass
            self.proc.kill()
            self.proc.wait()
            for path in (self.qmp_path, self.nbd_path):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
            self.start()
        return self.client()

    def client(self, negotiate=True, deadline=DEADLINE):
        """One more QMP client; waits until the daemon listens, and `deadline` s for its greeting."""
        end = time.monotonic() + DEADLINE
        while True:
            try:
                return Qmp(self.qmp_path, negotiate, self, deadline)
            except (FileNotFoundError, ConnectionRefusedError):
                if self.proc.poll() is not None:
                    raise RuntimeError(f'daemon ended with {self.proc.returncode}: {self.log()}')
                if time.monotonic() > end:
                    raise
                time.sleep(0.01)  # the only way to wait for a socket file without inotify

    def cpu_seconds(self):
        """What it has had of the processors: does not grow while others use the machine."""
        return time.clock_gettime(~self.proc.pid << 3 | 2)  # its clock's number, as clock_getcpuclockid(3) makes it

    def log(self):
        with open(self.log_path, errors='replace') as f:
            return f.read()

    def doing(self):
        """What it is doing now, and its log."""
        return f'{silence.describe(self.proc.pid)}--- log of {self.kind}:\n{self.log()[-20000:]}'

    def silence(self, words):
        """What to say when it should have done something, and has not."""
        return f'{self.kind} says nothing for {DEADLINE:g} s; {words[:2000]}\n{self.doing()}'

    def __exit__(self, kind, value, tb):
        died = self.proc.poll() is not None
        try:
            if kind is None and died and self.quit_check:  # also in a fixture, which hears of no failure
                print(f'--- {self.kind} has ended by itself with {self.proc.returncode}:\n{self.log()}')
            if kind is None and not died:
                code = self.stop()
                if self.quit_check:
                    assert code == 0, f'exit code {code}: {self.log()}'
            if kind is None and self.quit_check and self.kind == 'tidemarkd':
                assert 'Sanitizer' not in self.log() and 'runtime error' not in self.log(), self.log()
        finally:
            if kind is not None:
                print(f'--- log of {self.kind}:\n{self.log()}')
            self.kill()

    def stop(self, sig=signal.SIGTERM):
        self.proc.send_signal(sig)
        try:
            return self.proc.wait(DEADLINE)
        except subprocess.TimeoutExpired as e:
            raise TimeoutError(self.silence(f'last sent: signal {sig}')) from e

    def kill(self):
        if self.proc.poll() is None:
            self.proc.kill()
            self.proc.wait()
        if self.qmp:
            self.qmp.close()
        shutil.rmtree(self.dir, ignore_errors=True)

    # ---- short hands

    def cmd(self, name, arguments=None, /, **kw):
        return self.qmp.cmd(name, arguments, **kw)

    def path(self, name):
        return os.path.join(self.dir, name)

    def add_file(self, node, size, **options):
        """A sparse file NODE.raw of `size` bytes and a file node over it."""
        path = self.path(node + '.raw')
        with open(path, 'ab') as f:
            f.truncate(size)
        self.cmd('blockdev-add', {'driver': 'file', 'node-name': node, 'filename': path, **options})
        return path

    def add_disk(self, node, size, **options):
        """A raw node NODE over a file node NODE-file; returns the path."""
        path = self.path(node + '.raw')
        with open(path, 'ab') as f:
            f.truncate(size)
        self.cmd('blockdev-add', {'driver': 'raw', 'node-name': node, **options, 'file': {
            'driver': 'file', 'node-name': node + '-file', 'filename': path,
            **{k: v for k, v in options.items() if k in ('discard', 'read-only', 'cache')}}})
        return path

    def export(self, node, name=None, writable=True, **options):
        """Export over NBD; returns the URI."""
        name = name or node
        self.cmd('block-export-add', {'type': 'nbd', 'id': 'exp-' + name, 'node-name': node,
                                      'name': name, 'writable': writable, **options})
        return self.uri(name)

    def uri(self, name):
        return f'nbd+unix:///{name}?socket={self.nbd_path}'

    def node(self, name):
        return next(n for n in self.cmd('query-named-block-nodes') if n['node-name'] == name)

    def bitmap(self, node, name):
        """The query row of a bitmap, or None."""
        rows = self.node(node).get('dirty-bitmaps', [])
        return next((b for b in rows if b.get('name') == name), None)

    def sha256(self, node, name):
        return self.cmd('x-debug-block-dirty-bitmap-sha256', node=node, name=name)['sha256']

    def ranges(self, node, name):
        """Dirty ranges as [(offset, length)], all pages."""
        out, offset = [], 0
        while offset is not None:
            page = self.cmd('query-dirty-ranges', node=node, name=name, offset=offset)
            out += [(r['offset'], r['length']) for r in page['ranges']]
            offset = page.get('next')
        return out


def on_free_port(listen, family=socket.AF_INET, host='127.0.0.1'):
    """What listen(port) returns, of a port that nobody had a moment ago; of another one if somebody has it now."""
    for last in (False, False, True):
        with socket.socket(family) as s:
            s.bind((host, 0))
            port = s.getsockname()[1]
        try:
            return listen(port)
        except (QmpError, RuntimeError) as e:
            if last or 'in use' not in str(e):
                raise


def qemu_io(uri, *commands):
    """Run qemu-io commands on an NBD URI or file; raises on any failure."""
    args = [which('qemu-io'), '-f', 'raw']
    for c in commands:
        args += ['-c', c]
    r = subprocess.run(args + [uri], capture_output=True, text=True, timeout=DEADLINE)
    bad = r.returncode != 0 or 'failed' in r.stdout or 'failed' in r.stderr
    assert not bad, f'{commands}: {r.stdout}{r.stderr}'
    return r.stdout


def run(*args, code=0):
    """Run a program to its end; its output. Raises unless it ends with this exit code."""
    r = subprocess.run([which(args[0]), *args[1:]], capture_output=True, text=True, timeout=DEADLINE,
                       stdin=subprocess.DEVNULL)
    assert r.returncode == code, f'{args}: {r.returncode}: {r.stdout}{r.stderr}'
    return r.stdout
