# SPDX-License-Identifier: Apache-2.0
"""Backups: how long they take, beside the kernel's own copying, and what a guest feels of them."""
import mmap
import os
import random
import resource
import statistics
import time

from io_cases import bitmap_counts, io_numbers
from peers import EXPORT
from qmp import QmpError
from scratch import CLUSTER, MIB, data_extents, pieces, sync
from setting import CaseError, Unsupported

COPY = 8 * MIB  # one copy_file_range
SPEED = 64 * MIB  # per second, of the job that a guest has to live with


def add_target(daemon, qmp, target, durable):
    cache = {'direct': False, 'no-flush': not durable}
    qmp.execute('blockdev-add', driver='raw', node_name='target', cache=cache,
                file={'driver': 'file', 'filename': str(target), 'aio': daemon.peer.aio,
                      'cache': cache})


def run_backup(daemon, qmp, target, durable=True, **arguments):
    """Seconds of one backup. tidemarkd reports success only after the target was flushed, the QEMU
    family does not flush at all. So a durable backup ends with a sync of the target by us, whoever
    made it; the other kind tells tidemarkd, too, not to flush (cache.no-flush)."""
    if daemon.peer.copy_range:
        arguments['x_perf'] = {'use-copy-range': True}
    add_target(daemon, qmp, target, durable)
    cpu, start = daemon.cpu_seconds(), time.monotonic()
    try:
        qmp.execute('blockdev-backup', job_id='backup', device=EXPORT, target='target', **arguments)
    except QmpError as e:
        if daemon.peer.copy_range and 'x-perf' in str(e):
            raise Unsupported(str(e)) from None
        raise
    qmp.wait_job('backup')
    if durable:
        with open(target, 'rb') as f:
            os.fsync(f.fileno())
    numbers = {'value': time.monotonic() - start, 'cpu': daemon.cpu_seconds() - cpu}
    qmp.execute('blockdev-del', node_name='target')
    return numbers


def must_match(one, other):
    """Wherever `one` has data, `other` has the same bytes."""
    mine, its = bytearray(MIB), bytearray(MIB)
    for offset, length in pieces(data_extents(one), MIB):
        if length != len(mine):
            mine, its = bytearray(length), bytearray(length)
        # Past the end of the other file there is nothing that could be equal.
        if os.preadv(one.fileno(), [mine], offset) != os.preadv(other.fileno(), [its], offset) or mine != its:
            raise CaseError(f'the backup differs from its source near offset {offset}')


def must_be_equal(one, other):
    must_match(one, other)
    if list(data_extents(one)) != list(data_extents(other)):
        must_match(other, one)


# ---- Without a server ----

def copy_ranges(source, target):
    for offset, length in pieces(data_extents(source), COPY):
        while length:
            n = os.copy_file_range(source.fileno(), target.fileno(), length, offset, offset)
            if n == 0:
                raise CaseError(f'copy_file_range met the end of the file at {offset}')
            offset, length = offset + n, length - n


def copy_clusters(source, target, offsets):
    buffer = mmap.mmap(-1, CLUSTER)
    for offset in offsets:
        if os.preadv(source.fileno(), [buffer], offset) != CLUSTER or \
                os.pwritev(target.fileno(), [buffer], offset) != CLUSTER:
            raise CaseError(f'a short copy at {offset}')


def timed_copy(source, target, durable, copy, *arguments):
    """The same as run_backup() by the kernel alone."""
    def cpu_seconds():
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime
    with open(source, 'rb') as a, open(target, 'r+b') as b:
        cpu, start = cpu_seconds(), time.monotonic()
        copy(a, b, *arguments)
        if durable:
            os.fsync(b.fileno())
        return {'value': time.monotonic() - start, 'cpu': cpu_seconds() - cpu}


# ---- The time of a backup ----

def touch_memory(size):
    """Memory that a virtual machine has not used yet, or has given back, costs a fault in the host for
    each page: several times the copy that then goes there. Whoever came first would pay for all."""
    available = next(int(line.split()[1]) for line in open('/proc/meminfo', encoding='ascii')
                     if line.startswith('MemAvailable')) * 1024
    size = min(size, available // 2)
    mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()


def prepared(s):
    """Source and target; nothing else on this machine is dirty, and there is memory for the copy."""
    source, target = s.scratch.half_filled(), s.scratch.target(s.scratch.backup_size)
    touch_memory(s.scratch.backup_size * 5 // 8)
    os.sync()
    return source, target


def backup_full(s, durable):
    source, target = prepared(s)
    if 'limit' in s.peer.kinds:
        numbers = timed_copy(source, target, durable, copy_ranges)
    else:
        with s.daemon(source) as daemon:
            numbers = run_backup(daemon, daemon.monitor(), target, durable=durable, sync='full')
    with open(source, 'rb') as a, open(target, 'rb') as b:
        must_be_equal(a, b)
    target.unlink()
    return numbers


def backup_incremental(s, durable):
    """One cluster in a hundred has changed. Copying them without a server takes as many, at random."""
    source, target = prepared(s)
    n_clusters = s.scratch.backup_size // CLUSTER
    n = max(1, n_clusters // 100)
    if 'limit' in s.peer.kinds:
        chosen = [i * CLUSTER for i in sorted(random.Random(1).sample(range(n_clusters), n))]
        numbers = timed_copy(source, target, durable, copy_clusters, chosen)
        dirty, left = n * CLUSTER, 0
    else:
        with s.daemon(source) as daemon:
            qmp = daemon.monitor()
            qmp.execute('block-dirty-bitmap-add', node=EXPORT, name='b0', granularity=CLUSTER)
            s.load(daemon, f'--reads 0 --block {CLUSTER} --depth 16 --requests {n} '
                           f'--seed {s.scratch.seed()}')
            sync(source)
            dirty = bitmap_counts(qmp)[0]
            numbers = run_backup(daemon, qmp, target, durable=durable, sync='incremental', bitmap='b0')
            left = bitmap_counts(qmp)[0]
    with open(source, 'rb') as a, open(target, 'rb') as b:
        must_match(b, a)
        copied = sum(length for _, length in data_extents(b))
    if not 0 < dirty == copied or left != 0:
        raise CaseError(f'{dirty} bytes were dirty, {copied} copied, {left} still dirty')
    target.unlink()
    return numbers


# ---- A guest meanwhile ----

GUEST_ROUNDS = 3


def guest_load(s, daemon):
    """A number of writes, not a time: of them the same share meets blocks that are not yet saved,
    however fast the server is."""
    granules = s.scratch.guest_size // CLUSTER
    numbers = io_numbers(s.load(daemon, f'--depth 16 --reads 0 --requests {max(1000, granules * 3 // 10)} '
                                        f'--recheck --seed {s.scratch.seed()}'))
    return {'value': numbers['p99_us'], 'cpu': numbers['cpu'], 'p50_us': numbers['p50_us'],
            'p99_us': numbers['p99_us'], 'iops': numbers['value']}


def guest_during_backup(s, daemon, qmp):
    """The job must last longer than the load, and is then given up."""
    target = s.scratch.target(s.scratch.guest_size)
    add_target(daemon, qmp, target, durable=True)
    qmp.execute('blockdev-backup', job_id='backup', device=EXPORT, target='target', sync='full', speed=SPEED)
    numbers = guest_load(s, daemon)
    jobs = qmp.execute('query-block-jobs')
    if [j['device'] for j in jobs] != ['backup']:
        raise CaseError('the backup ended before the load of the guest: use a larger --backup-size')
    qmp.execute('block-job-cancel', device='backup', force=True)
    qmp.wait_job('backup', end='BLOCK_JOB_CANCELLED')
    qmp.execute('blockdev-del', node_name='target')
    target.unlink()
    return numbers


def guest_latency(s):
    """99 of 100 writes of a guest are faster than this. 'own': during the backup : without."""
    rounds = []
    guest = s.scratch.guest()
    with s.daemon(guest) as daemon:
        qmp = daemon.monitor()
        for _ in range(1 if s.quick else GUEST_ROUNDS):
            sync(guest)
            alone = guest_load(s, daemon)
            sync(guest)
            rounds.append((alone, guest_during_backup(s, daemon, qmp)))
    rows = {}
    for i, name in enumerate(('alone', 'backup')):
        rows[name] = {key: statistics.median(r[i][key] for r in rounds) for key in rounds[0][i]}
    rows['backup']['own'] = statistics.median(b['value'] / a['value'] for a, b in rounds)
    return rows
