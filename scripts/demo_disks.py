# SPDX-License-Identifier: Apache-2.0
"""Disk images for the demonstration: made with real files, copied, restored and compared.

Everything knows about holes (SEEK_DATA), because a 4 GiB disk with 512 MiB on it should cost 512 MiB.
What a disk held at a moment is kept as one copy of its beginning and, for each later moment, the blocks
that differ from that copy. They are found by comparing all of the image, so that nothing of the daemon,
least of all its bitmaps, has a say in it.
"""
import os
import random
import re
import shutil
import subprocess
import threading

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
BLOCK = 128 * KiB       # what is compared at a time
BIG_FILE = 16 * MiB
REAL_FOLDERS = ('/usr/bin', '/usr/include', '/usr/share')
REAL_FILES, REAL_BYTES = 500, 32 * MiB  # from each of them, at most
PATH = os.environ.get('PATH', '') + ':/usr/sbin:/sbin'


class DemoError(Exception):
    """Said in one line; ends the demonstration."""


class Crew:
    """Work for all disks at a time, and an end to all of it when somebody presses Ctrl-C."""

    def __init__(self):
        self._cancelled = threading.Event()
        self._lock = threading.Lock()
        self._children = set()

    def check(self):
        if self._cancelled.is_set():
            raise DemoError('interrupted')

    def cancel(self):
        self._cancelled.set()
        with self._lock:
            for child in self._children:
                child.kill()

    def tool(self, *command, fine=(0,)):
        """Run a program to its end, return what it said."""
        program = shutil.which(command[0], path=PATH)
        if not program:
            raise DemoError(f'{command[0]} is not installed')
        with self._lock:
            self.check()
            child = subprocess.Popen([program, *command[1:]], stdin=subprocess.DEVNULL, text=True,
                                     errors='replace', stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            self._children.add(child)
        out = child.communicate()[0]
        with self._lock:
            self._children.discard(child)
        self.check()
        if child.returncode not in fine:
            last = (out.strip().splitlines() or ['it said nothing'])[-1]
            raise DemoError(f'{command[0]} ended with status {child.returncode}: {last}')
        return out

    def each(self, work, items):
        """work(item) for all of them at once; their results in order, or the first error."""
        results, errors = [None] * len(items), []

        def one(i):
            try:
                results[i] = work(items[i])
            except Exception as error:  # handed to the caller below
                errors.append(error)
        threads = [threading.Thread(target=one, args=(i,), daemon=True) for i in range(len(items))]
        try:
            for t in threads:
                t.start()
            for t in threads:
                t.join()
        except BaseException:
            self.cancel()
            for t in threads:
                if t.ident:
                    t.join()
            raise
        if errors:
            raise errors[0]
        return results


class Meter:
    """How far several threads are together."""

    def __init__(self, total):
        self._total = max(1, total)
        self._done = 0
        self._lock = threading.Lock()

    def add(self, n):
        with self._lock:
            self._done += n

    def fraction(self):
        return self._done / self._total


# ---- files

def extents(fd, end=None):
    """[(offset, length)] of what a file stores."""
    end = os.fstat(fd).st_size if end is None else end
    found, at = [], 0
    while at < end:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # ENXIO: only a hole is left
            break
        hole = os.lseek(fd, at, os.SEEK_HOLE)
        found.append((at, hole - at))
        at = hole
    return found


def stored(path):
    """Bytes that a file takes on the disk."""
    return os.stat(path).st_blocks * 512


def remove(folder):
    """All big files at once: what is not on its way to the disk yet is then forgotten, not written."""
    threads = [threading.Thread(target=os.unlink, args=(entry.path,)) for entry in os.scandir(folder)
               if entry.is_file(follow_symlinks=False)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    shutil.rmtree(folder)


def copy_range(src, dst, at, length, crew, meter):
    """In the kernel; on file systems that share blocks this copies nothing at all."""
    while length > 0:
        crew.check()
        part = min(length, 8 * MiB)
        try:
            n = os.copy_file_range(src, dst, part, at, at)
        except OSError:  # not on this file system; a real fault shows up again here
            n = os.pwrite(dst, os.pread(src, min(part, MiB), at), at)
        if n == 0:
            raise DemoError('a file became shorter while it was copied')
        at, length = at + n, length - n
        meter.add(n)


def copy_sparse(source, target, crew, meter):
    with open(source, 'rb') as src, open(target, 'xb') as dst:
        os.ftruncate(dst.fileno(), os.fstat(src.fileno()).st_size)
        for at, length in extents(src.fileno()):
            copy_range(src.fileno(), dst.fileno(), at, length, crew, meter)


def overlay(image, increment, ranges, crew, meter):
    """Put these ranges of an increment over an image: no more and no less than the bitmap named."""
    with open(increment, 'rb') as src, open(image, 'r+b') as dst:
        if os.fstat(src.fileno()).st_size != os.fstat(dst.fileno()).st_size:
            raise DemoError(f'{increment} has not the size of {image}')
        for at, length in ranges:
            copy_range(src.fileno(), dst.fileno(), at, length, crew, meter)


def blocks_of(*fds):
    """The blocks in which at least one of these files stores something."""
    found = set()
    for fd in fds:
        for at, length in extents(fd):
            found.update(range(at // BLOCK, (at + length - 1) // BLOCK + 1))
    return sorted(found)


class Moment:
    """What a disk held at a moment: its first copy, and the blocks that differ from it."""

    def __init__(self, base):
        self.base = base
        self.delta = base + '.none'
        self.changed = {}  # block -> place in the delta

    @classmethod
    def take(cls, base, live, delta, crew, meter):
        """Nobody may write to `live` meanwhile."""
        moment = cls(base)
        moment.delta = delta
        old, new = bytearray(BLOCK), bytearray(BLOCK)
        with open(base, 'rb') as was, open(live, 'rb') as now, open(delta, 'xb') as out:
            for block in blocks_of(was.fileno(), now.fileno()):
                crew.check()
                n = os.preadv(was.fileno(), [old], block * BLOCK)
                if os.preadv(now.fileno(), [new], block * BLOCK) != n or n != BLOCK:
                    raise DemoError(f'{live}: short read')
                if old != new:
                    moment.changed[block] = out.tell()
                    out.write(new)
                meter.add(BLOCK)
        return moment

    def compare(self, image, crew, meter):
        """Every byte; the first one that differs is an error."""
        wanted, got = bytearray(BLOCK), bytearray(BLOCK)
        with open(self.base, 'rb') as base, open(image, 'rb') as file, \
                open(self.delta if self.changed else self.base, 'rb') as delta:
            if os.fstat(base.fileno()).st_size != os.fstat(file.fileno()).st_size:
                raise DemoError(f'{image} has not the size of the disk')
            for block in sorted({*blocks_of(base.fileno(), file.fileno()), *self.changed}):
                crew.check()
                place = self.changed.get(block)
                if place is None:
                    os.preadv(base.fileno(), [wanted], block * BLOCK)
                else:
                    os.preadv(delta.fileno(), [wanted], place)
                os.preadv(file.fileno(), [got], block * BLOCK)
                if wanted != got:
                    at = next(i for i in range(BLOCK) if wanted[i] != got[i])
                    raise DemoError(f'MISMATCH: {image} differs from what the disk held, first at byte '
                                    f'{block * BLOCK + at}')
                meter.add(BLOCK)


# ---- file systems

def real_files():
    """(path, bytes) of ordinary files of this system."""
    for folder in REAL_FOLDERS:
        count = total = 0
        for where, folders, names in os.walk(folder):
            folders.sort()
            for name in sorted(names):
                path = os.path.join(where, name)
                try:
                    st = os.lstat(path)
                except OSError:
                    continue
                if not os.path.isfile(path) or os.path.islink(path) or not os.access(path, os.R_OK) \
                        or path.endswith('.db') or not 0 < st.st_size <= 4 * MiB or total + st.st_size > REAL_BYTES:
                    continue
                count, total = count + 1, total + st.st_size
                yield path, st.st_size
                if count == REAL_FILES:
                    break
            if count == REAL_FILES:
                break


def write_big_file(path, pool, rng):
    """Like a database or a film: no two blocks alike. Pieces of the pool at any offset are quicker than
    fresh random bytes and serve as well."""
    with open(path, 'xb') as f:
        for _ in range(BIG_FILE // (64 * KiB)):
            at = rng.randrange(len(pool) - 64 * KiB)
            f.write(pool[at:at + 64 * KiB])


def make_tree(folder, total, seed, crew, meter):
    """`total` bytes of files: those of this system, and a big one in every second folder, so that they
    lie all over the disk. Returns the number of real ones and of big ones."""
    rng = random.Random(seed)
    pool = rng.randbytes(4 * MiB)
    real = list(real_files())
    big = (total - sum(-(-length // 4096) * 4096 for _, length in real)) // BIG_FILE
    for i, (path, length) in enumerate(real):
        crew.check()
        copy = f'{folder}/{i * 2 * big // len(real):02}{path}'
        os.makedirs(os.path.dirname(copy), exist_ok=True)
        shutil.copyfile(path, copy)
        meter.add(length)
    for i in range(big):
        crew.check()
        os.makedirs(f'{folder}/{2 * i:02}', exist_ok=True)
        write_big_file(f'{folder}/{2 * i:02}/{i:02}.db', pool, rng)
        meter.add(BIG_FILE)
    return len(real), big


def add_to_tree(old, new, count, seed):
    """The same files as in `old` (linked, they cost nothing) and `count` big ones more."""
    rng = random.Random(seed)
    pool = rng.randbytes(4 * MiB)
    shutil.copytree(old, new, copy_function=os.link)
    os.mkdir(f'{new}/more')
    for i in range(count):
        write_big_file(f'{new}/more/{i:02}.db', pool, rng)


def make_ext4(image, length, tree, crew):
    with open(image, 'xb') as f:
        f.truncate(length)
    crew.tool('mkfs.ext4', '-q', '-F', '-b', '4096', '-m', '0', '-d', tree, image)


def check_ext4(image, crew):
    crew.tool('e2fsck', '-fn', image)


def big_file_places(image, tree, crew):
    """Where the big files lie: for each, [(offset, length)] on the disk, pieces of 64 KiB and more."""
    names = sorted(os.path.relpath(os.path.join(where, name), tree)
                   for where, _, found in os.walk(tree) for name in found if name.endswith('.db'))
    script = image + '.debugfs'
    with open(script, 'x', encoding='ascii') as f:
        f.writelines(f'ex /{name}\n' for name in names)
    out = crew.tool('debugfs', '-f', script, image)
    os.unlink(script)
    places = []
    for part in re.split(r'^debugfs: ', out, flags=re.M)[1:]:
        # " 0/ 0   1/  1     0 -  4095   34816 -  38911   4096": level, depth, entry, entries, blocks
        rows = re.findall(r'^\s*(\d+)/\s*(\d+)\s+\d+/\s*\d+\s+\d+\s*-\s*\d+\s+(\d+)\s*-\s*(\d+)', part, re.M)
        runs = [(int(a) * 4096, (int(b) - int(a) + 1) * 4096) for level, depth, a, b in rows if level == depth]
        places.append([(at, length) for at, length in runs if length >= 64 * KiB])
    return [p for p in places if p]
