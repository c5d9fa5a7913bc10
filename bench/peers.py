# SPDX-License-Identifier: Apache-2.0
"""The daemons that are compared: how each is started, found ready, measured and ended."""
import pathlib
import shutil
import subprocess
import time

from qmp import Qmp

EXPORT = 'd0'
START_DEADLINE_S = 20
# qemu-nbd may ignore SIGTERM for a minute after a client that left during the handshake.
TERM_DEADLINE_S = 1
POLL_S = 0.0002


def storage_daemon(aio, program):
    """The command line of qemu-storage-daemon, which tidemarkd shares."""
    def command(nbd, image, qmp):
        return [program,
                '--blockdev', f'driver=file,node-name=f0,filename={image},aio={aio}',
                '--blockdev', f'driver=raw,node-name={EXPORT},file=f0',
                '--nbd-server', f'addr.type=unix,addr.path={nbd}',
                '--export', f'type=nbd,id=e0,node-name={EXPORT},name={EXPORT},writable=on',
                '--chardev', f'socket,id=c,path={qmp},server=on,wait=off',
                '--monitor', 'chardev=c']
    return command


def qemu_nbd(program):
    def command(nbd, image, _qmp):
        return [program, '--persistent', '--format=raw', '--aio=io_uring', '--shared=64',
                f'--socket={nbd}', f'--export-name={EXPORT}', str(image)]
    return command


def nbdkit(program):
    def command(nbd, image, _qmp):
        return [program, '--foreground', '--exit-with-parent', f'--unix={nbd}', 'file', str(image)]
    return command


class Peer:
    def __init__(self, name, program, make_command, has_qmp, aio):
        self.name = name
        self.program = shutil.which(program)
        self.wanted = program
        self.has_qmp = has_qmp
        self.aio = aio
        self.command = make_command(self.program)

    def version(self):
        out = subprocess.run([self.program, '--version'], capture_output=True, text=True, check=False)
        return (out.stdout.splitlines() or ['version unknown'])[0]


def all_peers(tidemarkd):
    """Every peer by name. 'qsd-again' is qsd once more: the noise of the comparison (A/A)."""
    qsd = 'qemu-storage-daemon'
    peers = [
        Peer('tidemarkd', tidemarkd, lambda p: storage_daemon('io_uring', p), True, 'io_uring'),
        Peer('qsd', qsd, lambda p: storage_daemon('io_uring', p), True, 'io_uring'),
        Peer('qsd-again', qsd, lambda p: storage_daemon('io_uring', p), True, 'io_uring'),
        Peer('qsd-threads', qsd, lambda p: storage_daemon('threads', p), True, 'threads'),
        Peer('qemu-nbd', 'qemu-nbd', qemu_nbd, False, 'io_uring'),
        Peer('nbdkit', 'nbdkit', nbdkit, False, None),
    ]
    return {p.name: p for p in peers}


def is_listening(path):
    """Does somebody accept connections on this UNIX socket? Asked of the kernel: a client that connects
    only to see and leaves in the handshake upsets some peers."""
    accepts = 0x10000  # __SO_ACCEPTCON in the column of flags
    for line in pathlib.Path('/proc/net/unix').read_text().splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[7] == path and int(fields[3], 16) & accepts:
            return True
    return False


class StartError(Exception):
    """A daemon did not come up."""


class Daemon:
    """A running peer. Leaving the with-block ends it, come what may."""

    def __init__(self, peer, folder, image):
        self.peer = peer
        self.nbd = str(folder / 'nbd.sock')
        self.qmp_path = str(folder / 'qmp.sock')
        self._log = folder / 'daemon.log'
        for path in (self.nbd, self.qmp_path):
            pathlib.Path(path).unlink(missing_ok=True)
        command = peer.command(self.nbd, image, self.qmp_path)
        with open(self._log, 'wb') as log:
            self.started = time.monotonic()
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.pid = self._process.pid
        self.qmp = None

    def __enter__(self):
        try:
            self._wait_socket(self.nbd)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_):
        self.stop()

    def _check_alive(self, what):
        if self._process.poll() is not None:
            log = self._log.read_text(errors='replace').strip()
            raise StartError(f'{self.peer.name} ended with status {self._process.returncode} '
                             f'before {what}: {log or "it said nothing"}')
        if time.monotonic() > self.started + START_DEADLINE_S:
            raise StartError(f'{self.peer.name}: {START_DEADLINE_S} s passed before {what}')

    def _wait_socket(self, path):
        while not is_listening(path):
            self._check_alive(f'it listened on {path}')
            time.sleep(POLL_S)

    def connect_qmp(self):
        """The monitor, greeted but not negotiated, as soon as the daemon answers."""
        while self.qmp is None:
            try:
                self.qmp = Qmp(self.qmp_path)
            except (FileNotFoundError, ConnectionRefusedError):
                self._check_alive('its monitor answered')
                time.sleep(POLL_S)
        return self.qmp

    def monitor(self):
        self.connect_qmp().negotiate()
        return self.qmp

    def cpu_seconds(self):
        """User and system time of all threads, those that have ended included. This is the process's
        CPU clock: the same account as utime + stime in /proc/PID/stat, but in nanoseconds. The
        number is made as clock_getcpuclockid(3) makes it."""
        return time.clock_gettime((~self.pid << 3) | 2)

    def memory_kib(self):
        """VmRSS and Pss."""
        found = {}
        for name in ('status', 'smaps_rollup'):
            for line in pathlib.Path(f'/proc/{self.pid}/{name}').read_text().splitlines():
                key, _, value = line.partition(':')
                if key in ('VmRSS', 'Pss'):
                    found[key] = int(value.split()[0])
        return found['VmRSS'], found['Pss']

    def stop(self):
        if self.qmp:
            self.qmp.close()
        self._process.terminate()
        try:
            self._process.wait(TERM_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
