# SPDX-License-Identifier: Apache-2.0
"""Loop devices and file systems of a test's own; whoever cannot have them is skipped, by name.

    with loop_device(image, sector=4096) as device: ...
    with file_system(directory, 'ext4', 32 * MiB, sector=4096) as mount: ...

The daemon that uses them has to end inside the block, or unmounting fails (and the test with it).
"""
import contextlib
import os
import subprocess
import time

import pytest

from harness import DEADLINE, which


def run(*args):
    return subprocess.run([which(args[0]) or args[0], *args[1:]], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          timeout=DEADLINE)


def need_root(*tools):
    if os.geteuid() != 0:
        pytest.skip('needs root')
    for tool in tools:
        if not which(tool):
            pytest.skip(f'{tool} is not installed')


@contextlib.contextmanager
def loop_device(image, sector=512):
    need_root('losetup')
    r = run('losetup', '-f', '--show', '-b', str(sector), image)
    if r.returncode:
        pytest.skip(f'no loop devices of {sector} bytes here: {r.stderr.strip()}')
    device = r.stdout.strip()
    try:
        yield device
    finally:
        r = run('losetup', '-d', device)
        assert r.returncode == 0, r.stderr


@contextlib.contextmanager
def partitions(device, n, size):
    """The paths of n partitions of `size` bytes, made without a table."""
    need_root('addpart', 'delpart')
    made = []
    try:
        for i in range(n):
            r = run('addpart', device, str(i + 1), str(i * size // 512), str(size // 512))
            if r.returncode:
                pytest.skip(f'no partitions of {device} here: {r.stderr.strip()}')
            made.append(f'{device}p{i + 1}')
        if not all(map(os.path.exists, made)):
            pytest.skip(f'partitions of {device} have no nodes here')
        yield made
    finally:
        for i in range(len(made)):
            run('delpart', device, str(i + 1))


@contextlib.contextmanager
def mounted(kind, source, directory, options='defaults'):
    r = run('mount', '-t', kind, '-o', options, source, directory)
    if r.returncode:
        pytest.skip(f'cannot mount {kind} here: {r.stderr.strip()}')
    try:
        yield directory
    finally:
        r, end = run('umount', directory), time.monotonic() + DEADLINE
        while 'busy' in r.stderr and time.monotonic() < end:
            time.sleep(0.05)  # polled: rings of a killed process close its files after it has gone
            r = run('umount', directory)
        if r.returncode:
            run('umount', '-l', directory)
        assert r.returncode == 0, r.stderr


@contextlib.contextmanager
def file_system(directory, kind, size, sector=512):
    """An empty one in directory/KIND-SECTOR."""
    need_root('mount', 'umount')
    mount = os.path.join(directory, f'{kind}-{sector}')
    os.mkdir(mount)
    if kind == 'tmpfs':
        with mounted('tmpfs', 'tmpfs', mount, f'size={size}'):
            yield mount
        return
    need_root(f'mkfs.{kind}')
    image = mount + '.image'
    with open(image, 'wb') as f:
        f.truncate(size)
    with loop_device(image, sector) as device:
        r = run(f'mkfs.{kind}', '-q', device)
        assert r.returncode == 0, r.stderr
        with mounted(kind, device, mount):
            yield mount
