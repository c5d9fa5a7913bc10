# SPDX-License-Identifier: Apache-2.0
"""What the demonstration looks like: steps with their times, bars, tables and maps.

A step is one line. On a terminal it shows a bar while it runs; elsewhere the line appears when the
step has ended. Nothing is wider than 80 columns. Colours and bars need a terminal (and no NO_COLOR),
block characters need a UTF-8 locale.
"""
import os
import sys
import threading
import time

WIDTH = 78
BAR_WIDTH = 24
BAR_AFTER_S = 0.3  # a bar that only flashes up is noise
TICK_S = 0.1


def locale_is_utf8():
    """Asked of the environment that we were started with: Python itself turns the C locale to UTF-8."""
    try:
        with open('/proc/self/environ', 'rb') as f:
            pairs = dict(v.split(b'=', 1) for v in f.read().split(b'\0') if b'=' in v)
    except OSError:
        return False
    name = next((pairs[k] for k in (b'LC_ALL', b'LC_CTYPE', b'LANG') if pairs.get(k)), b'')
    return name.upper().replace(b'-', b'').endswith(b'UTF8')


def size(n):
    """Bytes for people, in binary units."""
    units = ['B', 'KiB', 'MiB', 'GiB']
    while n >= 1024 and len(units) > 1:
        n, units = n / 1024, units[1:]
    return f'{n:.1f} {units[0]}' if n < 100 and n % 1 else f'{n:.0f} {units[0]}'


class Step:
    """One line. `with screen.step('what') as s`: s.fraction moves the bar, s.say() tells how it went."""

    def __init__(self, screen, text):
        self.screen = screen
        self.text = text
        self.fraction = None  # a function that tells how far we are, 0 to 1
        self.seconds = 0.0
        self._begin = 0.0
        self._ended = threading.Event()
        self._ticker = None

    def say(self, text):
        self.text = text

    def __enter__(self):
        self._begin = time.monotonic()
        if self.screen.terminal:
            self._ticker = threading.Thread(target=self._tick, daemon=True)
            self._ticker.start()
        return self

    def __exit__(self, kind, value, trace):
        self._ended.set()
        if self._ticker:
            self._ticker.join()
        self.seconds = time.monotonic() - self._begin
        mark = self.screen.good if kind is None else self.screen.bad
        self.screen.line(f'  {mark} {self.text:<{WIDTH - 12}} {self.seconds:5.1f} s')

    def _tick(self):
        wait = BAR_AFTER_S
        while not self._ended.wait(wait):
            self.screen.draw(f'    {self.text:.40} ', self.fraction() if self.fraction else None)
            wait = TICK_S


class Screen:
    def __init__(self):
        self.terminal = sys.stdout.isatty() and os.environ.get('TERM') != 'dumb'
        self.colour = self.terminal and not os.environ.get('NO_COLOR')
        self.utf8 = locale_is_utf8()
        sys.stdout.reconfigure(encoding='utf-8' if self.utf8 else 'ascii', errors='replace',
                               line_buffering=True)
        self.shades = '·░▒▓█' if self.utf8 else '.-+*#'
        self.edge = '│' if self.utf8 else '|'
        self.good = self.paint('32', '✓' if self.utf8 else '+')
        self.bad = self.paint('31', '✗' if self.utf8 else 'x')

    def paint(self, code, text):
        return f'\033[{code}m{text}\033[0m' if self.colour else text

    def line(self, text=''):
        sys.stdout.write(('\r\033[K' if self.terminal else '') + text.rstrip() + '\n')

    def draw(self, text, fraction):
        """The unfinished line of a step."""
        bar = ''
        if fraction is not None:
            fraction = min(1.0, max(0.0, fraction))
            n = round(fraction * BAR_WIDTH)
            full, rest = ('━', '─') if self.utf8 else ('=', '-')
            bar = self.paint('36', full * n) + self.paint('2', rest * (BAR_WIDTH - n)) + f' {fraction:4.0%}'
        sys.stdout.write('\r\033[K' + text + bar)
        sys.stdout.flush()

    def step(self, text):
        return Step(self, text)

    def heading(self, text, why=''):
        """What comes next, and why anybody should care."""
        self.line()
        self.line(self.paint('1', text))
        for part in why.splitlines():
            self.line(self.paint('2', part))

    def table(self, head, rows):
        """Columns are as wide as they must be; all but the first two are numbers, to the right."""
        widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]

        def line(cells):
            return '  ' + '   '.join(c.ljust(w) if i < 2 else c.rjust(w)
                                     for i, (c, w) in enumerate(zip(cells, widths)))
        self.line(self.paint('1', line(head)))
        for row in rows:
            self.line(line(row))

    def map(self, label, cells, columns):
        """Cells are None (nothing stored), 0 (clean) or the dirty share, up to 1. As `tidemark bitmap
        map` draws it: the fullest shade only if all is dirty, the emptiest only if nothing is."""
        shades = [' ', self.shades[0], *(self.paint('33', s) for s in self.shades[1:])]

        def shade(cell):
            if cell is None:
                return shades[0]
            if cell == 0:
                return shades[1]
            return shades[5] if cell == 1 else shades[2 + min(2, int(cell * 3))]
        for row in range(0, len(cells), columns):
            text = ''.join(shade(c) for c in cells[row:row + columns])
            self.line(f'  {label if row == 0 else "":<8}{self.edge}{text}{self.edge}')

    def legend(self):
        s = self.shades
        return (f'{self.paint("33", s[1] + s[2] + s[3])} partly changed   {self.paint("33", s[4])} all '
                f'changed   {s[0]} unchanged   blank: never written')
