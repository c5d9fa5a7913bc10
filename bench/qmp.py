# SPDX-License-Identifier: Apache-2.0
"""A small QMP client: one UNIX socket, JSON lines, events kept until somebody waits for them."""
import json
import socket
import time


class QmpError(Exception):
    """The server refused a command, or broke the protocol."""


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
                raise QmpError('the server closed the monitor')
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

    def wait_job(self, job_id):
        """Wait until a block job has completed; an error of the job is an error here."""
        deadline = time.monotonic() + self.timeout
        while True:
            for event in self.events:
                data = event.get('data', {})
                if event['event'] == 'BLOCK_JOB_COMPLETED' and data.get('device') == job_id:
                    self.events.remove(event)
                    if 'error' in data or data['offset'] != data['len']:
                        raise QmpError(f'job {job_id}: {data}')
                    return data
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            self.events.append(self._read())
            self._socket.settimeout(self.timeout)
