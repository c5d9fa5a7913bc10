# SPDX-License-Identifier: Apache-2.0
"""An NBD client made of bytes. It speaks simple replies, structured replies and extended headers, and
says what a decent client never would.

    c = Raw(path)                                   # UNIX socket, or (host, port)
    c.go('disk', mode='extended', contexts=['base:allocation'])
    c.request(READ, 0, 4096).data                   # one request and its reply
    c.ask(ZERO, 0, 1 << 40); c.reply().error        # the same in two steps
    c.request(STATUS, 0, 1 << 40, ids=[0]).extents['base:allocation']
"""
import socket
import struct

from harness import DEADLINE

REQUEST, REPLY, CHUNK = 0x25609513, 0x67446698, 0x668e33ef
EXT_REQUEST, EXT_CHUNK = 0x21e41c71, 0x6e8a278c
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZERO, STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (1 << i for i in range(6))
OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, _, OPT_STARTTLS, OPT_INFO, OPT_GO, OPT_STRUCTURED, OPT_LIST_META, OPT_SET_META, \
    OPT_EXTENDED = range(1, 12)
ACK, SERVER, INFO, META = 1, 2, 3, 4
ERR_UNSUP, ERR_POLICY, ERR_INVALID, ERR_UNKNOWN, ERR_TOO_BIG, ERR_EXT_HEADER_REQD = (
    0x80000000 + i for i in (1, 2, 3, 6, 9, 10))
MODES = ('simple', 'structured', 'extended')


def request(cmd, offset=0, length=0, flags=0, cookie=7):
    """A compact request."""
    return struct.pack('>IHHQQI', REQUEST, flags, cmd, cookie, offset, length)


def ext_request(cmd, offset=0, length=0, flags=0, cookie=7):
    """One with extended headers, exactly as told."""
    return struct.pack('>IHHQQQ', EXT_REQUEST, flags, cmd, cookie, offset, length)


def option(opt, data=b'', length=None):
    return b'IHAVEOPT' + struct.pack('>II', opt, len(data) if length is None else length) + data


def string(s):
    s = s.encode() if isinstance(s, str) else s
    return struct.pack('>I', len(s)) + s


def meta(export, queries):
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    return string(export) + struct.pack('>I', len(queries)) + b''.join(map(string, queries))


class Reply:
    """error is the protocol's number; chunks are (type, flags, body) as they came."""

    def __init__(self, cookie):
        self.cookie, self.error, self.text, self.data = cookie, 0, '', b''
        self.chunks, self.holes, self.extents = [], [], {}


class Raw:
    """A client that says exactly what it is told to."""

    def __init__(self, address, flags=3):
        if isinstance(address, tuple):
            self.s = socket.create_connection(address, DEADLINE)
            self.s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:
            self.s = socket.socket(socket.AF_UNIX)
            self.s.connect(address)  # blocks while the backlog is full
        self.s.settimeout(DEADLINE)
        self.mode = 'simple'
        self.contexts = {}  # id: name
        self.asked = {}     # cookie: (offset, bytes that come back when all is well)
        hello = self.take(18)
        assert hello[:16] == b'NBDMAGICIHAVEOPT'
        self.server_flags = struct.unpack('>H', hello[16:])[0]
        if flags is not None:
            self.send(struct.pack('>I', flags))

    def send(self, data):
        self.s.sendall(data)

    def take(self, n):
        out = bytearray()
        while len(out) < n:
            data = self.s.recv(n - len(out))
            if not data:
                raise EOFError
            out += data
        return bytes(out)

    def at_end(self):
        try:
            return self.s.recv(1) == b''
        except ConnectionResetError:
            return True

    def close(self):
        self.s.close()

    # ---- handshake

    def option(self, opt, data=b''):
        """Send one; all its replies as (type, data)."""
        self.send(option(opt, data))
        return self.replies(opt)

    def replies(self, opt):
        out = []
        while True:
            magic, o, kind, length = struct.unpack('>QIII', self.take(20))
            assert magic == 0x3e889045565a9 and o == opt
            out.append((kind, self.take(length)))
            if kind == ACK or kind >> 31:
                return out

    def set_contexts(self, name, queries):
        """SET_META_CONTEXT; {id: name} of what was chosen."""
        replies = self.option(OPT_SET_META, meta(name, queries))
        assert replies[-1][0] == ACK, replies
        self.contexts = {struct.unpack('>I', d[:4])[0]: d[4:].decode() for _, d in replies[:-1]}
        return self.contexts

    def go(self, name, structured=False, opt=OPT_GO, mode=None, contexts=()):
        """Agree on a form of replies, on contexts, on the export; the replies to GO (or to `opt`)."""
        self.mode = mode or ('structured' if structured else 'simple')
        if self.mode != 'simple':
            assert self.option(OPT_EXTENDED if self.mode == 'extended' else OPT_STRUCTURED) == [(ACK, b'')]
        if contexts:
            self.set_contexts(name, contexts)
        replies = self.option(opt, string(name) + b'\0\0')
        for kind, data in replies:
            if kind == INFO and data[:2] == b'\0\0':
                self.size, self.flags = struct.unpack('>QH', data[2:])
        return replies

    # ---- transmission

    def ask(self, cmd, offset=0, length=0, flags=0, payload=b'', cookie=None, ids=None):
        """Send a request; its cookie. `ids`: BLOCK_STATUS of these contexts only."""
        cookie = max(self.asked, default=99) + 1 if cookie is None else cookie
        self.asked[cookie] = (offset, length if cmd == READ else 0)
        if self.mode == 'extended':
            if ids is not None:
                payload = struct.pack(f'>Q{len(ids)}I', length, *ids)
            if cmd == WRITE or ids is not None:
                flags, length = flags | PAYLOAD_LEN, len(payload)
            self.send(ext_request(cmd, offset, length, flags, cookie) + payload)
        else:
            self.send(request(cmd, offset, length, flags, cookie) + payload)
        return cookie

    def request(self, cmd, offset=0, length=0, flags=0, payload=b'', ids=None):
        self.ask(cmd, offset, length, flags, payload, 7, ids)
        return self.reply()

    def reply(self, length=None):
        """The next whole reply (replies that mix their chunks are not understood). `length`: what a read
        brings whose request was sent by other means than ask()."""
        if self.mode == 'simple':
            magic, error, cookie = struct.unpack('>IIQ', self.take(16))
            assert magic == REPLY, hex(magic)
            r = Reply(cookie)
            _, want = self.asked.pop(cookie, (0, length or 0))
            r.error = error
            r.data = b'' if error else self.take(want)
            return r
        r, done = None, False
        while not done:
            if self.mode == 'extended':
                magic, flags, kind, cookie, offset, n = struct.unpack('>IHHQQQ', self.take(32))
                assert magic == EXT_CHUNK, hex(magic)
                assert cookie not in self.asked or self.asked[cookie][0] == offset
            else:
                magic, flags, kind, cookie, n = struct.unpack('>IHHQI', self.take(20))
                assert magic == CHUNK, hex(magic)
            r = r or Reply(cookie)
            assert cookie == r.cookie
            done = flags & 1
            self.chunk(r, kind, flags, self.take(n))
        offset, want = self.asked.pop(r.cookie, (0, None))
        if not r.error and want is not None:
            assert len(r.data) == want
        return r

    def chunk(self, r, kind, flags, body):
        r.chunks.append((kind, flags, body))
        known = r.cookie in self.asked  # else the request was sent by other means
        next_offset = known and self.asked[r.cookie][0] + len(r.data)
        if kind >> 15:
            r.error, n = struct.unpack('>IH', body[:6])
            r.text = body[6:6 + n].decode()
        elif kind == 1:
            assert not known or struct.unpack('>Q', body[:8])[0] == next_offset
            r.data += body[8:]
        elif kind == 2:
            offset, n = struct.unpack('>QI', body)
            assert not known or offset == next_offset
            r.holes.append((offset, n))
            r.data += bytes(n)
        elif kind == 5:
            assert self.mode == 'structured'
            v = struct.unpack(f'>{len(body) // 4}I', body)
            r.extents[self.contexts.get(v[0], v[0])] = list(zip(v[1::2], v[2::2]))
        elif kind == 6:
            assert self.mode == 'extended'
            ident, count = struct.unpack('>II', body[:8])
            v = struct.unpack(f'>{(len(body) - 8) // 8}Q', body[8:])
            assert count == len(v) // 2 > 0
            r.extents[self.contexts.get(ident, ident)] = list(zip(v[::2], v[1::2]))
        else:
            assert kind == 0 and not body, (kind, body)
