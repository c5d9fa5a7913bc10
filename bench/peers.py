# SPDX-License-Identifier: Apache-2.0
"""The daemons that are compared: how each is started, found ready, measured and ended."""
import dataclasses
import pathlib
import shutil
import subprocess
import time

from qmp import Qmp, QmpError

EXPORT = 'd0'
START_DEADLINE_S = 20
# qemu-nbd may ignore SIGTERM for a minute after a client that left during the handshake.
TERM_DEADLINE_S = 1
POLL_S = 0.0002
NEGOTIATE_DEADLINE_S = 3
QMP_DEADLINE_S = 60


def storage_daemon(aio, program):
    """The command line of qemu-storage-daemon, which tidemarkd shares."""
    def command(nbd, image, qmp, direct):
        cache = ',cache.direct=on' if direct else ''
        return [program,
                '--blockdev', f'driver=file,node-name=f0,filename={image},aio={aio}{cache}',
                '--blockdev', f'driver=raw,node-name={EXPORT},file=f0{cache}',
                '--nbd-server', f'addr.type=unix,addr.path={nbd}',
                '--export', f'type=nbd,id=e0,node-name={EXPORT},name={EXPORT},writable=on',
                '--chardev', f'socket,id=c,path={qmp},server=on,wait=off',
                '--monitor', 'chardev=c']
    return command


def qemu_nbd(program):
    def command(nbd, image, _qmp, direct):
        return [program, '--persistent', '--format=raw', '--aio=io_uring', '--shared=64',
                f'--cache={"none" if direct else "writeback"}',
                f'--socket={nbd}', f'--export-name={EXPORT}', str(image)]
    return command


def nbdkit(program):
    def command(nbd, image, _qmp, _direct):
        return [program, '--foreground', '--exit-with-parent', f'--unix={nbd}', 'file', str(image)]
    return command


@dataclasses.dataclass
class Peer:
    """Whom to measure. `kinds` says by which cases: 'nbd' (loads on a cached file), 'direct' (loads
    with O_DIRECT), 'qmp' (whatever needs a monitor), 'limit' (the same work without any server)."""
    name: str
    wanted: str  # the program
    make_command: object
    kinds: frozenset
    aio: str = ''
    copy_range: bool = False  # backups ask for x-perf.use-copy-range
    hasty_monitor: bool = False  # see Daemon.monitor()

    def __post_init__(self):
        self.program = shutil.which(self.wanted) if self.wanted else None
        self.command = self.make_command(self.program) if self.make_command else None

    @property
    def present(self):
        return self.program is not None or not self.wanted

    @property
    def has_qmp(self):
        return 'qmp' in self.kinds

    def version(self):
        if not self.wanted:
            return 'the same requests or copies, made here, straight on the file'
        out = subprocess.run([self.program, '--version'], capture_output=True, text=True, check=False)
        return (out.stdout.splitlines() or ['version unknown'])[0]


def all_peers(tidemarkd):
    """Every peer by name. 'qsd-again' is qsd once more: the noise of the comparison (A/A)."""
    everything = frozenset(['nbd', 'direct', 'qmp', 'backup'])
    qsd = 'qemu-storage-daemon'
    uring = lambda p: storage_daemon('io_uring', p)  # noqa: E731
    peers = [
        Peer('tidemarkd', tidemarkd, uring, everything, 'io_uring'),
        Peer('qsd', qsd, uring, everything, 'io_uring', hasty_monitor=True),
        Peer('qsd-again', qsd, uring, everything, 'io_uring', hasty_monitor=True),
        Peer('qsd-threads', qsd, lambda p: storage_daemon('threads', p),
             frozenset(['nbd', 'qmp', 'backup']), 'threads', hasty_monitor=True),
        Peer('qsd-native', qsd, lambda p: storage_daemon('native', p), frozenset(['direct']), 'native',
             hasty_monitor=True),
        Peer('qsd-copy-range', qsd, uring, frozenset(['backup']), 'io_uring', copy_range=True,
             hasty_monitor=True),
        Peer('qemu-nbd', 'qemu-nbd', qemu_nbd, frozenset(['nbd', 'direct'])),
        Peer('nbdkit', 'nbdkit', nbdkit, frozenset(['nbd'])),
        Peer('no-server', None, None, frozenset(['limit'])),
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

    def __init__(self, peer, folder, image, direct=False, note=print):
        self.peer = peer
        self.nbd = str(folder / 'nbd.sock')
        self.qmp_path = str(folder / 'qmp.sock')
        self._log = folder / 'daemon.log'
        self._note = note
        for path in (self.nbd, self.qmp_path):
            pathlib.Path(path).unlink(missing_ok=True)
        command = peer.command(self.nbd, image, self.qmp_path, direct)
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

    def connect_qmp(self, timeout=QMP_DEADLINE_S):
        """The monitor, greeted but not negotiated, as soon as the daemon answers."""
        while self.qmp is None:
            try:
                self.qmp = Qmp(self.qmp_path, timeout)
            except (FileNotFoundError, ConnectionRefusedError):
                self._check_alive('its monitor answered')
                time.sleep(POLL_S)
        return self.qmp

    def monitor(self):
        """A monitor that takes commands. QSD 7.2 answers a client wrongly that connects while its
        monitor still moves to its own thread (about one start in a hundred here): it greets twice,
        or greets and never answers. Another connection is fine, so such a peer gets a first one
        that nobody uses and two more attempts; everybody else has to be right at once."""
        if not self.peer.hasty_monitor:
            self.connect_qmp().negotiate()
            return self.qmp
        self.connect_qmp(NEGOTIATE_DEADLINE_S)
        for left in (2, 1, 0):
            self._hang_up()
            try:
                self.connect_qmp(NEGOTIATE_DEADLINE_S).negotiate()
                break
            except (QmpError, OSError) as e:
                if not left:
                    raise
                self._note(f'{self.peer.name}: its monitor did not take a connection ({e}); connected again')
        self.qmp.set_timeout(QMP_DEADLINE_S)
        return self.qmp

    def _hang_up(self):
        if self.qmp:
            self.qmp.close()
        self.qmp = None

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
        self._hang_up()
        self._process.terminate()
        try:
            self._process.wait(TERM_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
