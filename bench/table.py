# SPDX-License-Identifier: Apache-2.0
"""What is printed. The results of a row are a list of number sets, one for each repetition, by peer."""
import statistics

SUBJECT, REFERENCE, AGAIN = 'tidemarkd', 'qsd', 'qsd-again'
COMPARED = [REFERENCE, 'qsd-threads', 'nbdkit', 'no-server']


def number(v):
    if v >= 10000:
        return f'{v / 1000:.0f}k'
    return f'{v:.0f}' if v >= 100 else f'{v:.3g}' if v >= 1 else f'{v:.2g}'


def has_wrong(runs):
    return any(n.get('wrong') for n in runs)


def median(results, name, key):
    """Over the repetitions that gave a number; None if there is none, or if one gave a wrong result."""
    runs = results.get(name, [])
    good = [n[key] for n in runs if key in n]
    return statistics.median(good) if good and not has_wrong(runs) else None


def singles(results, name, base, key='value'):
    """The ratio of two peers within each repetition in which both gave a number."""
    return [a[key] / b[key] for a, b in zip(results.get(name, []), results.get(base, []))
            if key in a and b.get(key)]


def cell(results, name, keys=('value', 'cpu')):
    runs = results.get(name, [])
    if all('skipped' in n for n in runs):
        return '-'
    values = [median(results, name, key) for key in keys]
    if None in values:
        return 'FAILED'
    missing = any('error' in n for n in runs)
    return ' / '.join(number(v) for v in values) + (' *' if missing else '')


def ratio(results, name, base):
    """Of the medians: what counts, and what stands beside it."""
    parts = []
    for key in ('value', 'cpu'):
        a, b = (median(results, n, key) for n in (name, base))
        parts.append(f'{a / b:.2f}' if a is not None and b else '-')
    return '-' if parts[0] == '-' else ' / '.join(parts)


def spread(values):
    return f'({min(values):.2f}-{max(values):.2f})' if len(values) > 1 else ''


def noise(results):
    """Ratio of the reference to itself, and the extremes of single repetitions."""
    text = ratio(results, AGAIN, REFERENCE)
    return text if text == '-' else f'{text} {spread(singles(results, AGAIN, REFERENCE))}'.rstrip()


def own(results):
    """Ratio to another row of the same turn: 32 bitmaps to none, with a backup to without."""
    value = median(results, SUBJECT, 'own')
    if value is None:
        return '-'
    cpu = median(results, SUBJECT, 'own_cpu')
    text = f'{value:.3f}' + (f' / {cpu:.2f}' if cpu is not None else '')
    return f"{text} {spread([n['own'] for n in results[SUBJECT] if 'own' in n])}".rstrip()


def foreign(results):
    seen = [n['foreign'] for runs in results.values() for n in runs if 'foreign' in n]
    return number(statistics.median(seen or [0]))


def columns(peers):
    """Heading and function of each column."""
    names = [p.name for p in peers]
    return [*[(n, lambda r, n=n: cell(r, n)) for n in names if n != AGAIN],
            *[(f'{SUBJECT}:{n}', lambda r, n=n: ratio(r, SUBJECT, n)) for n in COMPARED
              if n in names and SUBJECT in names],
            ('own ratio', own),
            ('A/A', noise),
            ('foreign', foreign)]


def print_row(fields, widths):
    print('| ' + ' | '.join(f'{f:<{w}}' for f, w in zip(fields, widths)) + ' |', flush=True)


class Table:
    """One line at a time, as the results come."""

    def __init__(self, peers):
        self._columns = columns(peers)
        heads = ['case', 'unit', *[name for name, _ in self._columns]]
        wide = {'own ratio': 25, 'A/A': 23, 'foreign': 7}
        self._widths = [30, 15, *[wide.get(h, max(15, len(h))) for h in heads[2:]]]
        print_row(heads, self._widths)
        print_row(['---'] * len(heads), self._widths)

    def add(self, name, unit, results):
        print_row([name, unit, *[make(results) for _, make in self._columns]], self._widths)


def print_latency(rows, peers):
    """Another table, of p50 and p99."""
    timed = [row for row in rows
             if any('p99_us' in n for runs in row['results'].values() for n in runs)]
    if not timed:
        return
    names = [p.name for p in peers]
    widths = [30, *[max(15, len(n)) for n in names]]
    print('\nLatency, p50 / p99 us\n')
    print_row(['case', *names], widths)
    print_row(['---'] * len(widths), widths)
    for row in timed:
        results = row['results']
        print_row([row['name'], *[cell(results, n, ('p50_us', 'p99_us')) if n in results else '-'
                                  for n in names]], widths)
