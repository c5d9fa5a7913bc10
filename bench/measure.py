# SPDX-License-Identifier: Apache-2.0
"""The rotation: every peer has its turn in every repetition, against a clock, and once more if it fell
silent."""
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

from peers import StartError
from qmp import QmpClosed, QmpError
from setting import CaseError, NoAnswer, Setting, Unsupported
from table import SUBJECT


class OutOfTime(Exception):
    """A turn took longer than its case allows."""


SILENT = (NoAnswer, StartError, QmpClosed, OutOfTime, TimeoutError, ConnectionError)
FAULTS = (*SILENT, CaseError, QmpError, OSError, subprocess.CalledProcessError, KeyError, ValueError)


def busy_seconds():
    """CPU time that the whole machine has used, and time stolen from it."""
    fields = pathlib.Path('/proc/stat').read_text().split('\n', 1)[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
    return (user + nice + system + irq + softirq + steal) / os.sysconf('SC_CLK_TCK')


def own_seconds():
    """CPU time of this program and of its children that have ended."""
    both = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(r.ru_utime + r.ru_stime for r in both)


def kill_children():
    """A signal may arrive between the start of a process and the moment somebody owns it."""
    for path in pathlib.Path('/proc/self/task').glob('*/children'):
        for pid in path.read_text().split():
            os.kill(int(pid), signal.SIGKILL)
            os.waitpid(int(pid), 0)


class Limit:
    """Ends what is inside the with-block after so many seconds, wherever it waits."""

    def __init__(self, seconds):
        self._seconds = seconds

    def __enter__(self):
        def expire(_signum, _frame):
            raise OutOfTime(f'not done after {self._seconds} s')
        signal.signal(signal.SIGALRM, expire)
        signal.setitimer(signal.ITIMER_REAL, self._seconds)

    def __exit__(self, *_):
        signal.setitimer(signal.ITIMER_REAL, 0)


def one_turn(case, setting):
    """Numbers by row. 'foreign' is how many CPUs others, the kernel's own threads among them, kept
    busy meanwhile. Instead of numbers there can be 'skipped' or 'error', a reason; 'wrong' is true if
    the error is more than silence."""
    busy, own, start = busy_seconds(), own_seconds(), time.monotonic()
    try:
        with Limit(case.limit_s):
            numbers = case.measure(setting)
    except Unsupported as e:
        return {row: {'skipped': str(e)} for row in case.row_names()}
    except FAULTS as e:
        kill_children()
        setting.scratch.drop(setting.medium)
        wrong = not isinstance(e, SILENT)
        return {row: {'error': f'{type(e).__name__}: {e}', 'wrong': wrong} for row in case.row_names()}
    elapsed = time.monotonic() - start
    others = max(0, (busy_seconds() - busy - own_seconds() + own) / elapsed)
    if case.rows:
        rows = {case.rows[key]: n for key, n in numbers.items()}
    else:
        rows = {case.name: numbers}
    return {row: {**n, 'foreign': others} for row, n in rows.items()}


class Report:
    """Notes for the reader, each once, and a line on a terminal that says what is going on."""

    def __init__(self):
        self.notes = []
        self._terminal = sys.stderr.isatty()

    def note(self, text):
        if text not in self.notes:
            self.notes.append(text)

    def progress(self, text):
        if self._terminal:
            print(f'\r\033[K{text}', end='', file=sys.stderr, flush=True)


def turn_with_retry(case, setting, report):
    """tidemarkd has to answer. So has everybody else, but a peer that falls silent is its authors'
    concern: it gets a new daemon and another attempt, and the reader a note."""
    rows = one_turn(case, setting)
    error = next((n['error'] for n in rows.values() if 'error' in n), None)
    if error and setting.peer.name != SUBJECT and not any(n.get('wrong') for n in rows.values()):
        report.note(f'{case.name}, {setting.peer.name}: {error}; measured again')
        rows = one_turn(case, setting)
    return rows


def measure_case(case, peers, scratch, arguments, tools, medium, report, place):
    """All repetitions: {row: {peer: [number set]}}."""
    able = [p for p in peers if p.kinds & case.kinds]
    results = {row: {p.name: [] for p in able} for row in case.row_names()}
    for rep in range(arguments.reps):
        shift = rep % max(1, len(able))
        for peer in able[shift:] + able[:shift]:
            report.progress(f'{place} {case.name}, repetition {rep + 1} of {arguments.reps}, {peer.name}')
            setting = Setting(peer, scratch, medium, arguments.seconds, arguments.quick, tools, report.note)
            for row, numbers in turn_with_retry(case, setting, report).items():
                results[row][peer.name].append(numbers)
                for key in ('error', 'skipped'):
                    if key in numbers:
                        report.note(f'{row}, {peer.name}: {numbers[key]}')
    report.progress('')
    return results
