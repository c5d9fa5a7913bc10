# SPDX-License-Identifier: Apache-2.0
"""An NBD client made of bytes: it says what a decent client never would."""
import socket
import struct

from harness import DEADLINE

REQUEST, REPLY, CHUNK = 0x25609513, 0x67446698, 0x668e33ef
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZERO, STATUS = range(8)


def request(cmd, offset=0, length=0, flags=0, cookie=7):
    return struct.pack('>IHHQQI', REQUEST, flags, cmd, cookie, offset, length)


class Raw:
    """A client that says exactly what it is told to."""

    def __init__(self, path, flags=3):
        self.s = socket.socket(socket.AF_UNIX)
        self.s.connect(path)  # blocks while the backlog is full
        self.s.settimeout(DEADLINE)
        hello = self.take(18)
        assert hello[:16] == b'NBDMAGICIHAVEOPT'
        self.server_flags = struct.unpack('>H', hello[16:])[0]
        if flags is not None:
            self.send(struct.pack('>I', flags))

    def send(self, data):
        self.s.sendall(data)

    def take(self, n):
        out = b''
        while len(out) < n:
            data = self.s.recv(n - len(out))
            if not data:
                raise EOFError
            out += data
        return out

    def at_end(self):
        try:
            return self.s.recv(1) == b''
        except ConnectionResetError:
            return True

    def option(self, opt, data=b''):
        """Send one; all its replies as (type, data)."""
        self.send(b'IHAVEOPT' + struct.pack('>II', opt, len(data)) + data)
        out = []
        while True:
            magic, o, kind, length = struct.unpack('>QIII', self.take(20))
            assert magic == 0x3e889045565a9 and o == opt
            out.append((kind, self.take(length)))
            if kind == 1 or kind >> 31:
                return out

    def go(self, name, structured=False, opt=7):
        self.structured = structured
        if structured:
            assert self.option(8) == [(1, b'')]
        name = name.encode()
        return self.option(opt, struct.pack('>I', len(name)) + name + b'\0\0')

    def request(self, cmd, offset=0, length=0, flags=0, payload=b''):
        self.send(request(cmd, offset, length, flags) + payload)
        return self.reply(length if cmd == READ else 0)

    def reply(self, length=0):
        class Reply:
            error, data = 0, b''
        r = Reply()
        if not self.structured:
            magic, r.error, cookie = struct.unpack('>IIQ', self.take(16))
            assert magic == REPLY and cookie == 7
            if not r.error:
                r.data = self.take(length)
            return r
        done = False
        while not done:
            magic, flags, kind, cookie, n = struct.unpack('>IHHQI', self.take(20))
            assert magic == CHUNK and cookie == 7
            body, done = self.take(n), flags & 1
            if kind >> 15:
                r.error = struct.unpack('>I', body[:4])[0]
            elif kind == 1:
                r.data += body[8:]
            elif kind == 2:
                r.data += bytes(struct.unpack('>QI', body)[1])
        return r
