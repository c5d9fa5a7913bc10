# SPDX-License-Identifier: Apache-2.0
"""What is measured. A case is one entry of CASES: a name, which number counts, and a function that
takes a Setting (one peer, one repetition) and returns its numbers."""
import dataclasses
import json
import os
import random
import subprocess
import time
import typing
from functools import partial

from peers import EXPORT, Daemon

KIB, MIB = 1 << 10, 1 << 20
CLUSTER = 64 * KIB
EXTENT = 8 * MIB  # a half-filled image has data and holes of this length in turn
N_ACTIONS = 1000


class CaseError(Exception):
    """A measurement that gave a wrong result: data, replies or counts."""


@dataclasses.dataclass
class Scratch:
    """The folder of a run and the files in it. Each peer has copies of its own; they are synced
    before use, so that the write-back of making them does not fall into a measurement."""
    folder: object
    nbdload: str
    image_size: int
    backup_size: int

    def _copy_of(self, base, name):
        path = self.folder / name
        subprocess.run(['cp', '--reflink=never', '--sparse=auto', base, path], check=True)
        sync(path)
        return path

    def filled(self, peer, fresh):
        """A file that holds nbdload's initial pattern. fresh: may be changed, else shared by all
        cases that only read."""
        base = self.folder / 'base.raw'
        path = self.folder / f'{peer.name}-{"changed" if fresh else "kept"}.raw'
        if not base.exists():
            subprocess.run([self.nbdload, '--image', base, '--length', str(self.image_size)], check=True)
            sync(base)
        if fresh or not path.exists():
            self._copy_of(base, path.name)
        return path

    def half_filled(self, peer):
        """A file with as much data as holes, for backups. Incremental ones change it a little, which
        does not matter: they come after the full ones."""
        base = self.folder / 'half.raw'
        path = self.folder / f'{peer.name}-half.raw'
        if not base.exists():
            write_half_filled(base, self.backup_size)
        if not path.exists():
            self._copy_of(base, path.name)
        return path

    def target(self):
        """A new, empty, sparse file for a backup."""
        path = self.folder / 'target.raw'
        path.unlink(missing_ok=True)
        with open(path, 'wb') as f:
            f.truncate(self.backup_size)
        return path


@dataclasses.dataclass
class Setting:
    peer: object
    scratch: Scratch
    seconds: float  # for one load

    def daemon(self, image):
        return Daemon(self.peer, self.scratch.folder, image)

    def load(self, daemon, arguments):
        """nbdload on a running daemon. It fails by itself on any error or wrong byte."""
        out = subprocess.run([self.scratch.nbdload, '--socket', daemon.nbd, '--export', EXPORT,
                              '--server-pid', str(daemon.pid), *arguments.split()],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
        if out.returncode != 0:
            raise CaseError(f'nbdload {arguments}: {out.stderr.strip()} {out.stdout.strip()}')
        return json.loads(out.stdout)


def sync(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_half_filled(path, size):
    """Random data, each MiB of it different from all others, and holes in turn."""
    block = bytearray(random.Random(1).randbytes(MIB))
    with open(path, 'wb') as f:
        f.truncate(size)
        for start in range(0, size, 2 * EXTENT):
            f.seek(start)
            for offset in range(start, min(start + EXTENT, size), MIB):
                block[:8] = offset.to_bytes(8, 'little')
                f.write(block)
    sync(path)


# ---- Load over NBD ----

def io_load(arguments):
    writes = '--reads' in arguments

    def measure(s):
        # A file is copied anew if reads must find what is known to be there.
        with s.daemon(s.scratch.filled(s.peer, fresh=writes)) as daemon:
            return io_numbers(s.load(daemon, f'{arguments} --time {s.seconds}'
                                     + (' --recheck' if writes else '')))
    return measure


def io_numbers(report):
    return {'value': report['iops'], 'cpu': report['server_cpu_s'] / report['requests'] * 1e6,
            'p50_us': report['p50_us'], 'p99_us': report['p99_us'], 'mib_s': report['mib_s'],
            'client_cpu_us': report['client_cpu_s'] / report['requests'] * 1e6}


def recording(n_bitmaps):
    """Random writes while bitmaps record them."""
    def measure(s):
        with s.daemon(s.scratch.filled(s.peer, fresh=True)) as daemon:
            qmp = daemon.monitor()
            for i in range(n_bitmaps):
                qmp.execute('block-dirty-bitmap-add', node=EXPORT, name=f'b{i}', granularity=CLUSTER)
            numbers = io_numbers(s.load(daemon, f'--depth 16 --reads 0 --time {s.seconds} --recheck'))
            counts = bitmap_counts(qmp)
            if len(counts) != n_bitmaps or 0 in counts or len(set(counts)) > 1:
                raise CaseError(f'{n_bitmaps} bitmaps recorded {counts}')
            return numbers
    return measure


def bitmap_counts(qmp):
    nodes = {n['node-name']: n for n in qmp.execute('query-named-block-nodes')}
    return [b['count'] for b in nodes[EXPORT].get('dirty-bitmaps', [])]


# ---- Backup ----

def run_backup(daemon, qmp, target, durable=True, **arguments):
    """Seconds of one backup. tidemarkd reports success only after the target was flushed, the QEMU
    family does not flush at all. So a durable backup ends with a sync of the target by us, whoever
    made it; the other kind tells tidemarkd, too, not to flush (cache.no-flush)."""
    cache = {'direct': False, 'no-flush': not durable}
    qmp.execute('blockdev-add', driver='raw', node_name='target', cache=cache,
                file={'driver': 'file', 'filename': str(target), 'aio': daemon.peer.aio,
                      'cache': cache})
    cpu, start = daemon.cpu_seconds(), time.monotonic()
    qmp.execute('blockdev-backup', job_id='backup', device=EXPORT, target='target', **arguments)
    qmp.wait_job('backup')
    if durable:
        with open(target, 'rb') as f:
            os.fsync(f.fileno())
    numbers = {'value': time.monotonic() - start, 'cpu': daemon.cpu_seconds() - cpu}
    qmp.execute('blockdev-del', node_name='target')
    return numbers


def data_extents(f):
    """(offset, length) of the parts of a file that are not holes."""
    end, size = 0, os.fstat(f.fileno()).st_size
    while end < size:
        try:
            start = os.lseek(f.fileno(), end, os.SEEK_DATA)
        except OSError:
            return
        end = os.lseek(f.fileno(), start, os.SEEK_HOLE)
        yield start, end - start


def pieces(f):
    for start, length in data_extents(f):
        for offset in range(start, start + length, MIB):
            yield offset, min(MIB, start + length - offset)


def must_match(one, other):
    """Wherever `one` has data, `other` has the same bytes."""
    for offset, length in pieces(one):
        if os.pread(one.fileno(), length, offset) != os.pread(other.fileno(), length, offset):
            raise CaseError(f'the backup differs from its source near offset {offset}')


def backup_full(s, durable):
    source, target = s.scratch.half_filled(s.peer), s.scratch.target()
    with s.daemon(source) as daemon:
        numbers = run_backup(daemon, daemon.monitor(), target, durable=durable, sync='full')
    with open(source, 'rb') as a, open(target, 'rb') as b:
        must_match(a, b)
        must_match(b, a)
    target.unlink()
    return numbers


def backup_incremental(s, durable):
    """One cluster in a hundred has changed."""
    source, target = s.scratch.half_filled(s.peer), s.scratch.target()
    n = max(1, s.scratch.backup_size // CLUSTER // 100)
    with s.daemon(source) as daemon:
        qmp = daemon.monitor()
        qmp.execute('block-dirty-bitmap-add', node=EXPORT, name='b0', granularity=CLUSTER)
        s.load(daemon, f'--reads 0 --block {CLUSTER} --depth 16 --requests {n}')
        dirty = bitmap_counts(qmp)[0]
        numbers = run_backup(daemon, qmp, target, durable=durable, sync='incremental',
                             bitmap='b0')
        left = bitmap_counts(qmp)[0]
    with open(source, 'rb') as a, open(target, 'rb') as b:
        must_match(b, a)
        copied = sum(length for _, length in data_extents(b))
    if not 0 < dirty == copied or left != 0:
        raise CaseError(f'{dirty} bytes were dirty, {copied} copied, {left} still dirty')
    target.unlink()
    return numbers


# ---- Monitor, start, memory ----

def start_to_greeting(s):
    image = s.scratch.filled(s.peer, fresh=False)
    daemon = s.daemon(image)
    try:
        daemon.connect_qmp()
        return {'value': (time.monotonic() - daemon.started) * 1e3, 'cpu': daemon.cpu_seconds() * 1e3}
    finally:
        daemon.stop()


def idle_memory(s):
    with s.daemon(s.scratch.filled(s.peer, fresh=False)) as daemon:
        if s.peer.has_qmp:
            daemon.monitor().execute('query-version')
        rss, pss = daemon.memory_kib()
        return {'value': rss / 1024, 'cpu': pss / 1024}


def timed_exchange(daemon, qmp, message):
    data = json.dumps(message).encode()
    cpu, start = daemon.cpu_seconds(), time.monotonic()
    reply = qmp.exchange(data)
    numbers = {'value': (time.monotonic() - start) * 1e3, 'cpu': (daemon.cpu_seconds() - cpu) * 1e3,
               'bytes': len(data)}
    if 'return' not in reply or reply.get('id') != message.get('id'):
        raise CaseError(f'wrong reply: {str(reply)[:300]}')
    return numbers


def large_request(s):
    """A request of 1 MiB in many small values; its id comes back in the reply."""
    item = {'number': 12345, 'text': 'some words', 'list': [True, None, 1.5]}
    count = MIB // len(json.dumps([item]))
    with s.daemon(s.scratch.filled(s.peer, fresh=False)) as daemon:
        return timed_exchange(daemon, daemon.monitor(), {'execute': 'query-version', 'id': [item] * count})


def bitmap_actions(kind, **data):
    return [{'type': f'block-dirty-bitmap-{kind}', 'data': {'node': EXPORT, 'name': f'b{i}', **data}}
            for i in range(N_ACTIONS)]


def large_transaction(s):
    """A thousand bitmaps cleared at once."""
    with s.daemon(s.scratch.filled(s.peer, fresh=False)) as daemon:
        qmp = daemon.monitor()
        qmp.execute('transaction', actions=bitmap_actions('add', granularity=CLUSTER))
        return timed_exchange(daemon, qmp, {'execute': 'transaction', 'id': 1,
                                            'arguments': {'actions': bitmap_actions('clear')}})


# ---- The list ----

@dataclasses.dataclass
class Case:
    name: str
    unit: str  # of a cell: what counts / what stands beside it
    measure: typing.Callable
    more_is_better: bool = False
    qmp_only: bool = True


def io_case(name, arguments):
    return Case(name, 'IOPS / CPU us', io_load(arguments), more_is_better=True, qmp_only=False)


CASES = [
    io_case('4k-randread-qd1', '--depth 1'),
    io_case('4k-randread-qd16', '--depth 16'),
    io_case('4k-randread-qd64', '--depth 64'),
    io_case('4k-randread-qd16-c4', '--depth 16 --connections 4'),
    io_case('4k-randwrite-qd1', '--reads 0 --depth 1'),
    io_case('4k-randwrite-qd16', '--reads 0 --depth 16'),
    io_case('4k-randwrite-qd64', '--reads 0 --depth 64'),
    io_case('4k-randwrite-qd16-c4', '--reads 0 --depth 16 --connections 4'),
    io_case('4k-randmixed-qd16', '--reads 70 --depth 16'),
    io_case('64k-randread-qd16', '--depth 16 --block 64k'),
    io_case('1m-seqread-qd16', '--depth 16 --block 1M --sequential'),
    io_case('1m-seqwrite-qd16', '--reads 0 --depth 16 --block 1M --sequential'),
    *[Case(f'recording-{n}-bitmaps', 'IOPS / CPU us', recording(n), more_is_better=True)
      for n in (0, 1, 8, 32)],
    Case('backup-full', 's / CPU s', partial(backup_full, durable=False)),
    Case('backup-full-durable', 's / CPU s', partial(backup_full, durable=True)),
    Case('backup-incremental-1pc', 's / CPU s', partial(backup_incremental, durable=False)),
    Case('backup-incremental-1pc-durable', 's / CPU s', partial(backup_incremental, durable=True)),
    Case('start-to-greeting', 'ms / CPU ms', start_to_greeting),
    Case('idle-memory', 'RSS / PSS MiB', idle_memory, qmp_only=False),
    Case('qmp-request-1m', 'ms / CPU ms', large_request),
    Case(f'qmp-transaction-{N_ACTIONS}', 'ms / CPU ms', large_transaction),
]
