# SPDX-License-Identifier: Apache-2.0
"""What a case gets to work with, and the ways in which it can fail."""
import dataclasses
import json
import re
import subprocess
import typing

from peers import EXPORT, Daemon
from scratch import Medium, Scratch


class CaseError(Exception):
    """A measurement that gave a wrong result: data, replies or counts."""


class NoAnswer(Exception):
    """A peer that fell silent or hung up. No wrong data: another attempt is allowed."""


class Unsupported(Exception):
    """This peer cannot do it: no number, and no failure either."""


@dataclasses.dataclass
class Setting:
    """One peer, one turn."""
    peer: object
    scratch: Scratch
    medium: Medium
    seconds: float  # for one load
    quick: bool
    tools: dict  # programs by name: nbdload, uringload, blockstatus
    note: typing.Callable = print  # for what the reader of the table should know

    def daemon(self, image):
        return Daemon(self.peer, self.scratch.folder, image, self.medium.direct, self.note)

    def run(self, tool, arguments):
        """One of our programs; it prints a line of JSON, and fails by itself on any error or wrong
        byte."""
        if not self.tools.get(tool):
            raise Unsupported(f'{tool} has not been built')
        out = subprocess.run([self.tools[tool], *map(str, arguments)], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True, check=False)
        if out.returncode == 77:  # it says so itself
            raise Unsupported(out.stderr.strip().removeprefix(f'{tool}: '))
        if out.returncode != 0:
            kind = NoAnswer if re.search('does not answer|hung up', out.stderr) else CaseError
            raise kind(f'{tool} {" ".join(map(str, arguments))}: {out.stderr.strip()} {out.stdout.strip()}')
        return json.loads(out.stdout) if out.stdout else {}

    def load(self, daemon, arguments):
        """nbdload on a running daemon."""
        return self.run('nbdload', ['--socket', daemon.nbd, '--export', EXPORT, '--server-pid',
                                    daemon.pid, *arguments.split()])
