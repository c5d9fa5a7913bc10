# SPDX-License-Identifier: Apache-2.0
"""A small QMP client: one UNIX socket, JSON lines, events kept until somebody waits for them."""
import json
import socket
import time


class QmpError(Exception):
    """The server refused a command, or broke the protocol."""


class QmpClosed(QmpError):
    """The server hung up."""


class Qmp:
    def __init__(self, path, timeout=60):
        self.timeout = timeout
        self.events = []
        self._buffer = bytearray()
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(timeout)
            self._socket.connect(path)
            self.greeting = self._read()
            if 'QMP' not in self.greeting:
                raise QmpError(f'no greeting: {self.greeting}')
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self._socket.close()

    def _read(self):
        """The next message. The search for its end goes on where it stopped: replies may be large."""
        seen = 0
        while (end := self._buffer.find(b'\n', seen)) < 0:
            seen = len(self._buffer)
            data = self._socket.recv(1 << 20)
            if not data:
                raise QmpClosed('the server closed the monitor')
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[:end + 1]
        return json.loads(line)

    def exchange(self, data):
        """Send one encoded command, return its whole reply."""
        self._socket.sendall(data)
        while 'event' in (reply := self._read()):
            self.events.append(reply)
        return reply

    def execute(self, command, **arguments):
        """Run a command (underscores in argument names stand for dashes), return its result."""
        arguments = {name.replace('_', '-'): value for name, value in arguments.items()}
        reply = self.exchange(json.dumps({'execute': command, 'arguments': arguments}).encode())
        if 'return' not in reply:
            raise QmpError(f"{command}: {reply.get('error', reply)}")
        return reply['return']

    def negotiate(self):
        self.execute('qmp_capabilities')

    def set_timeout(self, seconds):
        """The longest wait for an answer."""
        self.timeout = seconds
        self._socket.settimeout(seconds)

    def wait_event(self, wanted, what):
        """Wait for the first event, come already or yet to come, of which wanted(event) is true."""
        deadline = time.monotonic() + self.timeout
        while True:
            for event in self.events:
                if wanted(event):
                    self.events.remove(event)
                    return event
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f'no event in {self.timeout} s: {what}')
            self._socket.settimeout(left)
            try:
                self.events.append(self._read())
            finally:
                self._socket.settimeout(self.timeout)

    def wait_job(self, job_id, end='BLOCK_JOB_COMPLETED'):
        """Wait until a block job has ended and is gone, its hold on the nodes with it; an error of the
        job is an error here. `end` may also be BLOCK_JOB_CANCELLED."""
        ended = self.wait_event(lambda e: e['event'] in ('BLOCK_JOB_COMPLETED', 'BLOCK_JOB_CANCELLED') and
                                e['data']['device'] == job_id, f'end of job {job_id}')
        data = ended['data']
        if ended['event'] != end or 'error' in data or \
                (end == 'BLOCK_JOB_COMPLETED' and data['offset'] != data['len']):
            raise QmpError(f"job {job_id}: {ended['event']} {data}")
        self.wait_event(lambda e: e['event'] == 'JOB_STATUS_CHANGE' and
                        e['data'] == {'id': job_id, 'status': 'null'}, f'job {job_id} gone')
        # What the same job announced before is of no use to a later one of that name.
        self.events = [e for e in self.events if e['event'] != 'JOB_STATUS_CHANGE' or e['data']['id'] != job_id]
        return data
