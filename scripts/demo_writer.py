# SPDX-License-Identifier: Apache-2.0
"""A guest that changes a disk: libnbd clients that write, zero and trim parts of it.

It works in rounds. A round is a list of requests that follows from the seed alone; between two rounds
nothing is in flight and all is flushed, so that what the disk holds then is beyond doubt. It stays
inside the big files: their contents change and the file system around them remains sound, which e2fsck
can prove later. Each connection has files of its own, so that the order of two connections is no matter.
"""
import random
import threading
import time

import nbd

KiB, MiB = 1 << 10, 1 << 20
CONNECTIONS = 2
PAUSE_S = 0.0003  # between requests: a busy guest, not a flood that is over before the copy has begun


class Connection:
    """One NBD client with its own part of the disk."""

    def __init__(self, socket, export, places, seed):
        self.times = []  # when each request was answered
        self.error = None
        self._rng = random.Random(seed)
        self._pool = self._rng.randbytes(MiB)
        self._runs = [run for file in places for run in file]
        hot = self._rng.sample(self._runs, max(1, len(self._runs) // 3))
        self._hot = hot
        self._stream = self._rng.choice(self._runs)
        self._cursor = 0
        self._nbd = nbd.NBD()
        self._nbd.set_export_name(export)
        self._nbd.connect_unix(socket)

    def _place(self):
        """4 to 64 KiB somewhere; three of four go to the files that are in use most."""
        at, length = self._rng.choice(self._hot if self._rng.random() < 0.75 else self._runs)
        n = 4 * KiB * self._rng.randint(1, 16)
        return at + 4 * KiB * self._rng.randint(0, (length - n) // (4 * KiB)), n

    def _bytes(self, n):
        at = self._rng.randrange(len(self._pool) - n)
        return self._pool[at:at + n]

    def _request(self):
        kind = self._rng.random()
        if kind < 0.55:
            at, n = self._place()
            self._nbd.pwrite(self._bytes(n), at)
        elif kind < 0.85:  # a file that is written from its beginning to its end
            begin, length = self._stream
            n = min(64 * KiB, length - self._cursor)
            self._nbd.pwrite(self._bytes(n), begin + self._cursor)
            self._cursor = (self._cursor + n) % length
        else:
            at, n = self._place()
            (self._nbd.zero if kind < 0.93 else self._nbd.trim)(n, at)

    def round(self, requests, stop):
        try:
            for _ in range(requests):
                if stop.wait(PAUSE_S):
                    return
                self._request()
                self.times.append(time.monotonic())
            self._nbd.flush()
        except Exception as error:  # told by Guest.wait()
            self.error = error

    def close(self):
        self._nbd.shutdown()


class Guest:
    """All connections to one disk."""

    def __init__(self, socket, export, places, seed):
        # The last share of the files is nobody's; a second kind of client writes there (see spare).
        shares = [places[i::CONNECTIONS + 1] for i in range(CONNECTIONS + 1)]
        self.spare = shares[-1][0][0]
        self._stop = threading.Event()
        self._threads = []
        self._planned = 0
        self.connections = [Connection(socket, export, share, f'{seed} {export} {i}')
                            for i, share in enumerate(shares[:-1])]

    def start(self, requests):
        """Begin a round. Returns at once."""
        for c in self.connections:
            c.times.clear()
        self._planned = requests
        part = requests // len(self.connections)
        self._threads = [threading.Thread(target=c.round, args=(part, self._stop), daemon=True)
                         for c in self.connections]
        for t in self._threads:
            t.start()

    def wait(self):
        """The end of the round: all answered and flushed. Returns when each request was answered."""
        for t in self._threads:
            t.join()
        self._threads = []
        for c in self.connections:
            if c.error:
                raise c.error
        return [t for c in self.connections for t in c.times]

    def fraction(self):
        return sum(len(c.times) for c in self.connections) / max(1, self._planned)

    def stop(self):
        """In the middle of a round, come what may."""
        self._stop.set()
        for t in self._threads:
            t.join(5)

    def close(self):
        for c in self.connections:
            c.close()
