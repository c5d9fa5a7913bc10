# SPDX-License-Identifier: Apache-2.0
"""A file whose every system call hangs for as long as a test likes.

    with Stalled(directory) as slow:      # slow.path: a file of slow.size bytes on a mount of its own
        slow.stop()                       # from here on whoever touches it hangs in the kernel
        slow.go_on()

It is a file in a FUSE mount (nbdfuse over nbdkit) whose server is stopped and continued by signals.
"""
import os
import signal
import subprocess
import time

import pytest

from harness import DEADLINE, MiB, which

NEEDED = ('nbdfuse', 'nbdkit', 'fusermount3')


def skip_without_fuse():
    for tool in NEEDED:
        if not which(tool):
            pytest.skip(f'{tool} is not installed')
    if not os.access('/dev/fuse', os.R_OK | os.W_OK):
        pytest.skip('/dev/fuse is not to be had here')


class Stalled:
    def __init__(self, directory, size=16 * MiB, plugin=('memory', '{size}'), filters=()):
        skip_without_fuse()
        self.size = size
        self.mount = os.path.join(directory, 'stalled')
        self.path = os.path.join(self.mount, 'disk.raw')
        os.mkdir(self.mount)
        nbdkit = [which('nbdkit'), '-s', *[f'--filter={f}' for f in filters],
                  *[p.format(size=size) for p in plugin]]
        self.log = open(os.path.join(directory, 'stalled.log'), 'wb')
        self.proc = subprocess.Popen([which('nbdfuse'), self.path, '--command', *nbdkit], stdin=subprocess.DEVNULL,
                                     stdout=self.log, stderr=self.log)
        try:
            self.wait_for_mount()
        except BaseException:
            self.close()
            raise

    def wait_for_mount(self):
        end = time.monotonic() + DEADLINE
        while not os.path.ismount(self.mount) or not os.path.exists(self.path):
            if self.proc.poll() is not None:
                with open(self.log.name, errors='replace') as f:
                    pytest.skip(f'nbdfuse cannot mount here: {f.read().strip()}')
            assert time.monotonic() < end, 'nbdfuse does not come up'
            time.sleep(0.01)  # the mount is polled: nothing tells when it is there

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def stop(self):
        """SIGSTOP takes effect at once; what the server has answered before is answered."""
        self.proc.send_signal(signal.SIGSTOP)
        end = time.monotonic() + DEADLINE
        while self.state() != 'T':
            assert time.monotonic() < end
            time.sleep(0.001)  # polled: a signal to another process takes its time

    def state(self):
        with open(f'/proc/{self.proc.pid}/stat') as f:
            return f.read().rsplit(')', 1)[1].split()[0]

    def go_on(self):
        self.proc.send_signal(signal.SIGCONT)

    def close(self):
        if self.proc.poll() is None:
            self.go_on()
            subprocess.run([which('fusermount3'), '-u', '-z', self.mount], stderr=subprocess.DEVNULL)
            self.proc.terminate()
            try:
                self.proc.wait(DEADLINE)
            except subprocess.TimeoutExpired:
                self.proc.kill()
                self.proc.wait()
        self.log.close()
