# SPDX-License-Identifier: Apache-2.0
"""The files of a run: where they lie, how they are made, that there is room for them."""
import dataclasses
import os
import pathlib
import random
import shutil
import subprocess
import typing

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
CLUSTER = 64 * KIB
EXTENT = 8 * MIB  # a half-filled image has data and holes of this length in turn
STATUS_SIZE = 16384 * GIB - MIB  # about as large as a file may be on ext4


@dataclasses.dataclass
class Medium:
    """Where the file of a case lies and how it is opened. `fault`: why it cannot be used here."""
    name: str  # stands before the names of its cases; the usual one has none
    folder: typing.Optional[pathlib.Path]
    direct: bool = False
    fault: str = ''


def sync(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


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


def pieces(extents, size):
    for start, length in extents:
        for offset in range(start, start + length, size):
            yield offset, min(size, start + length - offset)


def warm(path):
    """The page cache holds the file from now on, if there is memory for it."""
    buffer = bytearray(MIB)
    with open(path, 'rb') as f:
        for offset, _ in pieces(data_extents(f), MIB):
            os.preadv(f.fileno(), [buffer], offset)


def forget_pages(path):
    """What the page cache holds of a file is dropped, so that direct I/O meets nothing there."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
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


class Scratch:
    """All peers use the same files in turn, so that no difference between two files (layout, size of
    the pages that cache it) can look like one between two servers. What a file holds is written out
    before it is used: the write-back of one measurement must not fall into the next."""

    def __init__(self, folder, nbdload, image_size, backup_size):
        self.folder, self.nbdload = folder, nbdload
        self.image_size, self.backup_size = image_size, backup_size
        self.guest_size = backup_size // 2
        self._seed = 1

    def seed(self):
        """Another number each time: what is written now differs from all that was written before, so
        data of an earlier turn cannot pass for data of this one."""
        self._seed += 1
        return self._seed

    def _pattern(self, path, size):
        if not path.exists():
            subprocess.run([self.nbdload, '--image', path, '--length', str(size)], check=True)
        return path

    def filled(self, medium, changed):
        """A file that holds nbdload's initial pattern of seed 1, or (changed) has held it once."""
        name = f'{"changed" if changed else "kept"}{"-direct" if medium.direct else ""}.raw'
        path = self._pattern(medium.folder / name, self.image_size)
        sync(path)
        if medium.direct:
            forget_pages(path)
        else:
            warm(path)
        return path

    def half_filled(self):
        """A file with as much data as holes, for backups, in the page cache. Incremental ones change it a little, which
        does not matter: they come after the full ones."""
        path = self.folder / 'half.raw'
        if not path.exists():
            write_half_filled(path, self.backup_size)
        sync(path)
        warm(path)
        return path

    def guest(self):
        """A file of half the size of a backup, all data, for a guest that writes during one."""
        path = self._pattern(self.folder / 'guest.raw', self.guest_size)
        sync(path)
        warm(path)
        return path

    def target(self, size):
        """A new, empty, sparse file for a backup."""
        path = self.folder / 'target.raw'
        path.unlink(missing_ok=True)
        with open(path, 'wb') as f:
            f.truncate(size)
        return path

    def huge(self):
        """A new file of about 16 TiB without data."""
        path = self.folder / 'huge.raw'
        path.unlink(missing_ok=True)
        with open(path, 'wb') as f:
            f.truncate(STATUS_SIZE)
        return path

    def sparse(self, medium, size):
        """A new file of any size without data; only a memory file system takes the largest."""
        path = medium.folder / 'sparse.raw'
        path.unlink(missing_ok=True)
        with open(path, 'wb') as f:
            f.truncate(size)
        return path

    def drop(self, medium, *names):
        """Files that are not needed any more, or that may have been damaged."""
        for name in names or [p.name for p in medium.folder.glob('*.raw')]:
            (medium.folder / name).unlink(missing_ok=True)


def file_system(folder):
    best = ('', 'unknown')
    for line in pathlib.Path('/proc/self/mountinfo').read_text().splitlines():
        left, _, right = line.partition(' - ')
        point = left.split()[4]
        if os.path.commonpath([point, folder]) == point and len(point) >= len(best[0]):
            best = (point, right.split()[0])
    return best[1]


def lacks_room(folder, needed):
    """Why so many bytes do not fit into a folder, or ''."""
    free = shutil.disk_usage(folder).free
    if free >= needed:
        return ''
    return f'{folder} has {free // MIB} MiB free, {needed // MIB} are needed'


def refuses_direct(folder):
    """Why files of this folder cannot be opened with O_DIRECT, or ''."""
    path = folder / 'direct.probe'
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT))
    except OSError as e:
        return f'{folder} does not take O_DIRECT: {e.strerror}'
    finally:
        path.unlink(missing_ok=True)
    return ''
