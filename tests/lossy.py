# SPDX-License-Identifier: Apache-2.0
"""A relay between a QMP client and its daemon that loses connections at a chosen moment."""
import json
import os
import socket
import threading

from harness import DEADLINE


class Lossy:
    """Listens at `path` and relays to `target`. The first `losses` connections end when the client
    has sent a request with `word` in it: before it is passed on, or, if `after`, when the daemon has
    answered it and before the client sees that."""

    def __init__(self, path, target, word='transaction', after=True, losses=1):
        self.path, self.target, self.word, self.after, self.losses = path, target, word.encode(), after, losses
        self.seen = []  # the requests with `word`, in order
        if os.path.exists(path):
            os.unlink(path)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(8)
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def close(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(DEADLINE)

    def serve(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            with client, socket.socket(socket.AF_UNIX) as daemon:
                client.settimeout(DEADLINE)
                daemon.settimeout(DEADLINE)
                daemon.connect(self.target)
                self.relay(client, daemon)

    def relay(self, client, daemon):
        """QMP takes turns: a greeting, then a line for a line; events may come before an answer."""
        to_client, to_daemon = daemon.makefile('rb'), client.makefile('rb')
        client.sendall(to_client.readline())
        for line in to_daemon:
            lose = self.word in line and self.losses > 0
            if self.word in line:
                self.seen.append(line)
            self.losses -= lose
            if lose and not self.after:
                return
            daemon.sendall(line)
            answer = to_client.readline()
            while answer and 'event' in json.loads(answer):
                client.sendall(answer)
                answer = to_client.readline()
            if lose or not answer:
                return
            client.sendall(answer)
