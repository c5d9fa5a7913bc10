#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""The main job on real data: serve two disks, track what changes, back them up together, restore.

Everything below is what a backup program would do: QMP on one side, NBD on the other. The proof at the
end does not trust the daemon: what the disks held at each moment is taken from the image files while
nobody writes, and the restored images are made from the backups and the ranges of the bitmaps alone.
"""
import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time

sys.dont_write_bytecode = True
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [os.path.join(ROOT, 'scripts'), os.path.join(ROOT, 'bench')]

try:
    from nbd import Error as NbdError
except ImportError:
    sys.exit('demo: the Debian package python3-libnbd is missing')

import demo_disks as disks
from demo_disks import BLOCK, GiB, KiB, MiB, Crew, DemoError, Meter, Moment
from demo_screen import Screen, size
from demo_writer import Guest
from qmp import Qmp, QmpError

SIZES = {'disk0': 512 * MiB, 'disk1': 4 * GiB}
DISKS = list(SIZES)
FILES = 432 * MiB        # in both; a file system of 512 MiB needs some room for itself
MORE_BIG_FILES = 4       # in the second disk
SPACE = 4800 * MiB       # at its worst: two disks, their copies, their restored images, the files
REQUESTS = (0, 1600, 1200, 300)  # of the guest on each disk, while and after each moment's copy
DEADLINE_S = 60
MAP_CELLS, MAP_COLUMNS = 128, 64
MOMENTS = (1, 2, 3)


class Daemon:
    """tidemarkd in the current directory, with a monitor for us and one for the bars."""

    def __init__(self, program):
        self._log = open('tidemarkd.log', 'w+b')
        self._process = subprocess.Popen(
            [program, '--nbd-server', 'addr.type=unix,addr.path=nbd.sock',
             '--chardev', 'socket,id=qmp,path=qmp.sock,server=on,wait=off', '--monitor', 'chardev=qmp'],
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, start_new_session=True)
        self.qmp = self._connect()
        self._watch = self._connect()

    def _connect(self):
        end = time.monotonic() + DEADLINE_S
        while True:
            try:
                client = Qmp('qmp.sock', DEADLINE_S)
                client.negotiate()
                return client
            except (FileNotFoundError, ConnectionRefusedError):
                if self._process.poll() is not None or time.monotonic() > end:
                    raise DemoError(f'tidemarkd does not start: {self.last_words()}') from None
                time.sleep(0.005)  # polls for the socket: one that is not there yet has no event

    def last_words(self):
        self._log.seek(0)
        return (self._log.read().decode(errors='replace').strip().splitlines() or ['it said nothing'])[-1]

    def status(self):
        """None: it runs."""
        return self._process.poll()

    def serve(self, disk):
        self.qmp.execute('blockdev-add', driver='raw', node_name=disk, discard='unmap', file={
            'driver': 'file', 'node-name': disk + '-file', 'filename': disk + '.raw', 'discard': 'unmap'})
        self.qmp.execute('block-export-add', type='nbd', id='export-' + disk, node_name=disk, name=disk,
                         writable=True)

    def add_target(self, node, path, length):
        """An empty file for a backup."""
        with open(path, 'xb') as f:
            f.truncate(length)
        self.qmp.execute('blockdev-add', driver='raw', node_name=node, file={
            'driver': 'file', 'node-name': node + '-file', 'filename': path})

    def remove_target(self, node):
        self.qmp.execute('blockdev-del', node_name=node)

    def ranges(self, node, name):
        """All dirty ranges: [(offset, length)]."""
        found, offset = [], 0
        while offset is not None:
            page = self.qmp.execute('query-dirty-ranges', node=node, name=name, offset=offset)
            found += [(r['offset'], r['length']) for r in page['ranges']]
            offset = page.get('next')
        return found

    def progress(self):
        """Of all jobs together."""
        try:
            jobs = self._watch.execute('query-jobs')
        except (OSError, QmpError):  # the step itself will tell
            jobs = []
        total = sum(j['total-progress'] for j in jobs)
        return sum(j['current-progress'] for j in jobs) / total if total else 1.0

    def wait_jobs(self, jobs):
        """{job: the moment it had ended}"""
        ended = {}
        for job in jobs:
            self.qmp.wait_job(job)
            ended[job] = time.monotonic()
        return ended

    def stop(self):
        """End it the way a service manager does, and insist on a clean end."""
        self.qmp.close()
        self._watch.close()
        self._process.terminate()
        try:
            status = self._process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            raise DemoError('tidemarkd does not end') from None
        if status != 0:
            raise DemoError(f'tidemarkd ended with status {status}: {self.last_words()}')

    def kill(self):
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._log.close()


def action(kind, **data):
    return {'type': kind, 'data': {k.replace('_', '-'): v for k, v in data.items()}}


def actions_full(disk):
    """From this moment on `b0` records what changes, and a full copy of this moment begins."""
    return [action('block-dirty-bitmap-add', node=disk, name='b0'),
            action('blockdev-backup', device=disk, target=f'{disk}-copy', sync='full', job_id=f'{disk}-job')]


def actions_incremental(disk):
    """The order that real backup programs use; each action has to see what the one before did."""
    return [action('block-dirty-bitmap-add', node=disk, name='b1'),
            action('block-dirty-bitmap-merge', node=disk, target='b1', bitmaps=['b0']),
            action('blockdev-backup', device=disk, target=f'{disk}-copy', sync='incremental', bitmap='b1',
                   job_id=f'{disk}-job'),
            action('block-dirty-bitmap-clear', node=disk, name='b0')]


class Demo:
    def __init__(self, screen, crew, args):
        self.screen, self.crew, self.args = screen, crew, args
        self.daemon = None
        self.guests = {}
        self.moments = {}   # (disk, moment) -> what the disk held
        self.ranges = {}    # (disk, moment) -> what its bitmap said
        self.stored = {}    # (disk, moment) -> bytes in the copy
        self.seconds = {}   # (disk, moment) -> of the job

    def each(self, work):
        return self.crew.each(work, DISKS)

    def copy_name(self, disk, moment):
        return f'{disk}.full.raw' if moment == 1 else f'{disk}.inc{moment}.raw'

    # ---- 1 and 2: disks, daemon

    def make_disks(self):
        step, seed = self.screen.step, self.args.seed
        with step('collect files') as s:
            meter = Meter(FILES)
            s.fraction = meter.fraction
            os.mkdir('tree')
            os.mkdir('tree/disk0')
            real, big = disks.make_tree('tree/disk0', FILES, f'{seed} files', self.crew, meter)
            disks.add_to_tree('tree/disk0', 'tree/disk1', MORE_BIG_FILES, f'{seed} more')
            s.say(f'{real} files of this system and {big} big ones')
        with step('mkfs.ext4 -d, both disks') as s:
            meter = Meter(2 * FILES)
            s.fraction = lambda: sum(disks.stored(f'{d}.raw') for d in DISKS
                                     if os.path.exists(f'{d}.raw')) / (2 * FILES)
            self.each(lambda d: disks.make_ext4(f'{d}.raw', SIZES[d], f'tree/{d}', self.crew))
            self.places = dict(zip(DISKS, self.each(lambda d: disks.big_file_places(f'{d}.raw', f'tree/{d}', self.crew))))
            shutil.rmtree('tree')
            s.say('mkfs.ext4 -d: ' + ', '.join(
                f'{d} {size(disks.stored(d + ".raw"))} of {size(SIZES[d])}' for d in DISKS))
        with step('set a copy of each disk aside, for the proof') as s:
            meter = Meter(sum(disks.stored(f'{d}.raw') for d in DISKS))
            s.fraction = meter.fraction
            self.each(lambda d: disks.copy_sparse(f'{d}.raw', f'{d}.first.raw', self.crew, meter))
        for d in DISKS:
            self.moments[d, 1] = Moment(f'{d}.first.raw')

    def start(self):
        with self.screen.step('tidemarkd serves both disks over NBD, writable'):
            self.daemon = Daemon(os.path.join(self.args.bin, 'tidemarkd'))
            for d in DISKS:
                self.daemon.serve(d)
            for d in DISKS:
                self.guests[d] = Guest('nbd.sock', d, self.places[d], self.args.seed)

    # ---- 3 to 5: one transaction, then the guest goes on while the copies run

    def note(self, moment):
        """The guest pauses: what do the disks hold now?"""
        with self.screen.step('the guest pauses; note what the disks hold now') as s:
            meter = Meter(sum(disks.stored(f'{d}.raw') for d in DISKS))
            s.fraction = meter.fraction

            def one(d):
                return Moment.take(f'{d}.first.raw', f'{d}.raw', f'{d}.delta{moment}', self.crew, meter)
            for d, taken in zip(DISKS, self.each(one)):
                self.moments[d, moment] = taken

    def transaction(self, moment):
        qmp = self.daemon.qmp
        for d in DISKS:
            self.daemon.add_target(f'{d}-copy', self.copy_name(d, moment), SIZES[d])
        make = actions_full if moment == 1 else actions_incremental
        actions = [a for d in DISKS for a in make(d)]
        with self.screen.step(f'moment {moment}: one transaction') as s:
            begin = time.monotonic()
            qmp.execute('transaction', actions=actions, properties={'completion-mode': 'grouped'})
            s.say(f'moment {moment}: one transaction with {len(actions)} actions, answered in '
                  f'{(time.monotonic() - begin) * 1000:.1f} ms')
            if moment > 1:
                for d in DISKS:
                    self.ranges[d, moment] = self.daemon.ranges(d, 'b1')
        return begin

    def change_and_copy(self, moment, begin):
        """The copies run, and the disks change under them: what is not yet copied is copied first."""
        with self.screen.step('copy' if moment == 1 else 'copy what changed') as s:
            s.fraction = self.daemon.progress
            for g in self.guests.values():
                g.start(REQUESTS[moment])
            if moment == 1:
                self.each(self.run_qemu_io)
            ended = self.daemon.wait_jobs([f'{d}-job' for d in DISKS])
            for d in DISKS:
                self.seconds[d, moment] = ended[f'{d}-job'] - begin
                self.daemon.remove_target(f'{d}-copy')
                self.stored[d, moment] = disks.stored(self.copy_name(d, moment))
                if moment > 1:
                    self.daemon.qmp.execute('block-dirty-bitmap-remove', node=d, name='b1')
            copied = sum(self.stored[d, moment] for d in DISKS)
            s.say(f'{"full" if moment == 1 else "incremental"} copy of both disks: {size(copied)}')
        with self.screen.step('the guest goes on') as s:
            s.fraction = lambda: sum(g.fraction() for g in self.guests.values()) / len(self.guests)
            times = [t for g in self.guests.values() for t in g.wait()]
            early = sum(t < max(ended.values()) for t in times)
            s.say(f'{len(times)} requests over NBD by libnbd, {early} of them during the copy')

    def run_qemu_io(self, disk):
        """A second kind of client, once: it writes and reads back what it wrote."""
        at, length = self.guests[disk].spare
        length = min(length, MiB)
        self.crew.tool('qemu-io', '-f', 'raw', '-c', f'write -P 0x74 {at} {length}', '-c', 'flush',
                       '-c', f'read -P 0x74 {at} {length}', f'nbd+unix:///{disk}?socket=nbd.sock')

    # ---- 6: restore

    def prove(self, moment):
        image = '{}.full.raw' if moment == 1 else '{}.restored.raw'
        if moment > 1:
            with self.screen.step(f'restore moment {moment}') as s:
                copied = sum(length for d in DISKS for _, length in self.ranges[d, moment])
                if moment == 2:
                    copied += sum(self.stored[d, 1] for d in DISKS)
                meter = Meter(copied)
                s.fraction = meter.fraction
                self.each(lambda d: self.restore(d, moment, meter))
                s.say('restore: a copy of the full backup, the increment over it' if moment == 2
                      else 'restore: the next increment over it')
        with self.screen.step(f'compare moment {moment}') as s:
            meter = Meter(sum(disks.stored(image.format(d)) for d in DISKS))
            s.fraction = meter.fraction
            self.each(lambda d: self.moments[d, moment].compare(image.format(d), self.crew, meter))
            self.each(lambda d: disks.check_ext4(image.format(d), self.crew))
            s.say(f'moment {moment}: both disks equal, byte for byte; e2fsck: clean')

    def restore(self, disk, moment, meter):
        target = f'{disk}.restored.raw'
        if moment == 2:
            disks.copy_sparse(f'{disk}.full.raw', target, self.crew, meter)
        disks.overlay(target, self.copy_name(disk, moment), self.ranges[disk, moment], self.crew, meter)

    # ---- 7: what it was good for

    def report(self):
        rows = []
        for m in MOMENTS:
            for d in DISKS:
                dirty = size(sum(n for _, n in self.ranges[d, m])) if m > 1 else 'all'
                rows.append([str(m) if d == DISKS[0] else '', d, size(SIZES[d]), dirty,
                             size(self.stored[d, m]), f'{self.stored[d, m] / self.stored[d, 1]:.1%}',
                             f'{self.seconds[d, m]:.2f}'])
        self.screen.table(['moment', 'disk', 'size', 'dirty', 'copied', 'of full', 'seconds'], rows)
        for d in DISKS:
            self.screen.line()
            self.screen.line(f'  {d}: changed blocks, one cell is {size(SIZES[d] // MAP_CELLS)}')
            for m in MOMENTS[1:]:
                self.screen.map(f'{m - 1} to {m}', self.cells(d, m), MAP_COLUMNS)
        self.screen.line()
        self.screen.line('  ' + self.screen.legend())

    def cells(self, disk, moment):
        cell = SIZES[disk] // MAP_CELLS
        dirty = [0] * MAP_CELLS
        used = set()
        with open(f'{disk}.restored.raw', 'rb') as f:
            for block in disks.blocks_of(f.fileno()):
                used.add(block * BLOCK // cell)
        for at, length in self.ranges[disk, moment]:
            while length > 0:
                part = min(length, cell - at % cell)
                dirty[at // cell] += part
                at, length = at + part, length - part
        return [d / cell if d else 0 if i in used else None for i, d in enumerate(dirty)]

    # ---- the story

    def run(self):
        say = self.screen.heading
        say('1. Two disks', 'Real ext4 file systems in raw images: one well filled, one large and sparse.')
        self.make_disks()
        say('2. A full backup of both, of the same moment',
            'One transaction starts to record changes (a dirty bitmap per disk) and to copy\n'
            'both disks. The guest goes on writing at once: what it is about to change is\n'
            'copied first, so the backup shows the moment, not what came later.')
        self.start()
        self.change_and_copy(1, self.transaction(1))
        say('3. Two incremental backups',
            'Per disk, in one transaction: take over what was recorded, copy only that,\n'
            'record anew. No write is lost between two backups, and none is copied twice.')
        for m in MOMENTS[1:]:
            self.note(m)
            self.change_and_copy(m, self.transaction(m))
        with self.screen.step('tidemarkd has ended, exit status 0'):
            for g in self.guests.values():
                g.close()
            self.daemon.stop()
        say('4. The proof', 'What is restored from the backups must be what the disks held at each moment.')
        for m in MOMENTS:
            self.prove(m)
        say('5. What was copied')
        self.report()

    def why_it_ended(self):
        """What a crashed daemon adds to the error that it caused."""
        if not self.daemon or self.daemon.status() in (None, 0):
            return ''
        return f'; tidemarkd ended with status {self.daemon.status()}: {self.daemon.last_words()}'

    def close(self):
        for g in self.guests.values():
            g.stop()
        if self.daemon:
            self.daemon.kill()


# ---- around it

def working_directory(args):
    """A private directory: the one to keep, or a temporary one. Also says how much room there is."""
    if args.keep:
        path = os.path.abspath(args.keep)
        place, advice = path, 'give --keep a directory with more'
        os.makedirs(path, mode=0o700, exist_ok=True)
        if os.listdir(path):
            raise DemoError(f'{path} is not empty')
    else:
        place, advice = os.path.abspath(os.environ.get('TMPDIR') or '/var/tmp'), 'set TMPDIR to one with more'
    usage = shutil.disk_usage(place)
    if usage.free < SPACE:
        raise DemoError(f'{place} has {size(usage.free)} free, {size(SPACE)} are needed; {advice}')
    return path if args.keep else tempfile.mkdtemp(prefix='tidemark-demo-', dir=place), usage.free


def by_hand(screen, args, folder):
    """How to go on after --keep."""
    screen.heading(f'Kept in {folder}',
                   'DISK.raw: the disks; DISK.full, .inc2, .inc3: the backups of moments 1, 2, 3;\n'
                   'DISK.restored: moment 3; DISK.first, .delta: for the proof. Go on by hand:')
    for line in (f'cd {shlex.quote(folder)}', f'export PATH={shlex.quote(args.bin)}:$PATH',
                 'export TIDEMARK_SOCKET=$PWD/serve/tidemark.sock',
                 'tidemark serve --dir serve disk0.raw disk1.raw',
                 'tidemark status',
                 'tidemark backup --to backups disk0 disk1    # in full',
                 "qemu-io -f raw -c 'write 300M 2M' nbd+unix:///disk0?socket=serve/tidemark-nbd.sock",
                 'tidemark backup --to backups disk0 disk1    # only 2 MiB',
                 'tidemark points backups',
                 'tidemark stop',
                 "/sbin/debugfs -R 'ls -l /00' disk0.restored.raw"):
        screen.line('  ' + line)


def complain(text):
    sys.stdout.flush()
    print(f'demo: {text}', file=sys.stderr)


def interrupted(signum, _frame):
    raise KeyboardInterrupt(signum)


def main():
    parser = argparse.ArgumentParser(description='Shows the main job of tidemark on real data.')
    parser.add_argument('--bin', required=True, help='directory with tidemarkd')
    parser.add_argument('--keep', metavar='DIR', help='keep everything in DIR, which must be empty')
    parser.add_argument('--seed', type=int, default=1, help='of all files and writes (default 1)')
    args = parser.parse_args()
    args.bin = os.path.abspath(args.bin)
    screen, crew = Screen(), Crew()
    folder = demo = None
    status = 1
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupted)
    begin = time.monotonic()
    try:
        folder, free = working_directory(args)
        os.chdir(folder)  # the paths of sockets must be short, whatever TMPDIR is
        screen.line(screen.paint('1', 'tidemark: two disks, one moment, nothing lost'))
        screen.line(f'seed {args.seed}; in {folder}, {size(free)} free')
        demo = Demo(screen, crew, args)
        demo.run()
        status = 0
    except KeyboardInterrupt as stop:
        status = 128 + (stop.args[0] if stop.args else signal.SIGINT)
        complain('interrupted; ' + ('all is kept' if args.keep else 'cleaning up'))
    except (DemoError, QmpError, OSError, NbdError) as error:
        complain(f'{error}{demo.why_it_ended() if demo else ""}')
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        crew.cancel()
        if demo:
            demo.close()
        os.chdir('/')
        if folder and not args.keep:
            if status == 0:
                screen.line()
            with screen.step('everything is removed'):
                disks.remove(folder)
    if status == 0:
        if args.keep:
            by_hand(screen, args, folder)
        screen.line()
        screen.line(f'{screen.good} all equal, in {time.monotonic() - begin:.1f} s'
                    + ('' if args.keep else '; nothing is left behind'))
    return status


if __name__ == '__main__':
    sys.exit(main())
