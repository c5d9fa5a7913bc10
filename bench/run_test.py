#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""What bench/run makes of numbers and of failures. No daemon is needed."""
import contextlib
import io
import pathlib
import sys
import tempfile
import threading
import time
import types
import unittest

sys.dont_write_bytecode = True

import measure
import scratch
import table
import targets
from cases import CASES, Case
from setting import CaseError, NoAnswer, Unsupported


def runs(*values, **more):
    return [{'value': v, 'cpu': v / 2, **more} for v in values]


class Turns(unittest.TestCase):
    """One turn of one peer, and another if it falls silent."""

    def setUp(self):
        self.calls = []
        self.dropped = 0
        self.report = measure.Report()

    def turn(self, peer, *outcomes, rows=None, limit_s=60):
        def run_case(_setting):
            self.calls.append(peer)
            outcome = outcomes[min(len(self.calls), len(outcomes)) - 1]
            if isinstance(outcome, Exception):
                raise outcome
            return outcome() if callable(outcome) else outcome

        def drop(_medium):
            self.dropped += 1
        case = Case('c', 'u', run_case, frozenset(['qmp']), rows=rows, limit_s=limit_s)
        setting = types.SimpleNamespace(peer=types.SimpleNamespace(name=peer), medium=None,
                                        scratch=types.SimpleNamespace(drop=drop))
        return measure.turn_with_retry(case, setting, self.report)

    def test_numbers(self):
        numbers = self.turn('qsd', {'value': 1})['c']
        self.assertEqual((numbers['value'], len(self.calls), self.report.notes), (1, 1, []))
        self.assertIn('foreign', numbers)

    def test_rows(self):
        found = self.turn('qsd', {'a': {'value': 1}, 'b': {'skipped': 'no'}}, rows={'a': 'row-a', 'b': 'row-b'})
        self.assertEqual(found['row-a']['value'], 1)
        self.assertEqual(found['row-b']['skipped'], 'no')

    def test_a_silent_peer_is_asked_again(self):
        for silence in (NoAnswer('x'), TimeoutError('x'), ConnectionResetError('x')):
            self.setUp()
            self.assertEqual(self.turn('qsd', silence, {'value': 2})['c']['value'], 2)
            self.assertEqual(len(self.calls), 2)
            self.assertIn('measured again', self.report.notes[0])

    def test_silent_twice(self):
        numbers = self.turn('qsd', NoAnswer('x'))['c']
        self.assertEqual((len(self.calls), numbers['wrong']), (2, False))

    def test_tidemarkd_has_one_attempt(self):
        self.assertIn('error', self.turn('tidemarkd', NoAnswer('x'), {'value': 1})['c'])
        self.assertEqual(len(self.calls), 1)

    def test_wrong_data_is_final(self):
        numbers = self.turn('qsd', CaseError('bad byte'), {'value': 1})['c']
        self.assertEqual((len(self.calls), numbers['wrong'], self.dropped), (1, True, 1))

    def test_unsupported(self):
        self.assertEqual(self.turn('qsd', Unsupported('old'))['c'], {'skipped': 'old'})

    def test_a_turn_without_end(self):
        begin = time.monotonic()
        numbers = self.turn('tidemarkd', lambda: threading.Event().wait(30), limit_s=0.05)['c']
        self.assertIn('not done after 0.05 s', numbers['error'])
        self.assertLess(time.monotonic() - begin, 10)


class Cells(unittest.TestCase):
    def test_median_of_what_there_is(self):
        results = {'qsd': [*runs(1, 3), {'error': 'silent', 'wrong': False}]}
        self.assertEqual(table.cell(results, 'qsd'), '2 / 1 *')

    def test_wrong_data_has_no_number(self):
        results = {'tidemarkd': [*runs(1, 3), {'error': 'bad', 'wrong': True}], 'qsd': runs(1, 1, 1)}
        self.assertEqual(table.cell(results, 'tidemarkd'), 'FAILED')
        self.assertEqual(table.ratio(results, 'tidemarkd', 'qsd'), '-')

    def test_ratios(self):
        results = {'tidemarkd': runs(2, 4, 6), 'qsd': runs(1, 2, 4), 'qsd-again': runs(2, 2, 2)}
        self.assertEqual(table.ratio(results, 'tidemarkd', 'qsd'), '2.00 / 2.00')
        self.assertEqual(table.noise(results), '1.00 / 1.00 (0.50-2.00)')
        self.assertEqual(table.cell(results, 'nbdkit'), '-')


class Verdicts(unittest.TestCase):
    def lines(self, **by_row):
        return [line for line in targets.lines({k.replace('_', '-'): v for k, v in by_row.items()})
                if line[3] != 'not measured']

    def test_kept_and_missed(self):
        results = {'tidemarkd': runs(40, 40), 'qsd': runs(100, 100)}
        self.assertEqual([line[3] for line in self.lines(start_to_greeting=results)], ['kept'])
        results['qsd'] = runs(50, 50)  # 0.8, at most 0.6
        self.assertEqual([line[3] for line in self.lines(start_to_greeting=results)], ['missed by 33 %'])

    def test_more_is_better_and_every_variant_counts(self):
        results = {'tidemarkd': runs(100, 100), 'qsd': runs(200, 200), 'qsd-threads': runs(25, 25)}
        found = {line[1]: line[3] for line in self.lines(**{'4k-randread-qd1': results})}
        self.assertEqual(found, {'>= 2 x qsd': 'missed by 75 %', '>= 2 x qsd-threads': 'kept'})

    def test_repetitions_on_both_sides(self):
        results = {'tidemarkd': runs(50, 50, 70), 'qsd': runs(100, 100, 100)}
        self.assertEqual(self.lines(start_to_greeting=results)[0][3], 'kept, unsure')

    def test_own_ratio_and_its_noise(self):
        found = self.lines(**{'tmpfs:recording-32-bitmaps': {'tidemarkd': runs(1, own=0.9)},
                              'tmpfs:recording-0-bitmaps': {'tidemarkd': runs(1, own=1.25)}})
        self.assertEqual(found[0][2:], ['0.9', 'missed by 5 %', '1.250'])

    def test_every_target_names_a_row(self):
        rows = {row for c in CASES for row in c.row_names()}
        self.assertEqual(targets.ROWS - rows, set())

    def test_printing(self):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            targets.print_verdicts([{'name': 'idle-memory', 'results': {'tidemarkd': runs(1), 'qsd': runs(4)}}])
        self.assertIn('1 kept, 0 missed', out.getvalue())


class Room(unittest.TestCase):
    def test_free_space(self):
        with tempfile.TemporaryDirectory() as folder:
            self.assertEqual(scratch.lacks_room(pathlib.Path(folder), 1), '')
            self.assertIn('are needed', scratch.lacks_room(pathlib.Path(folder), 1 << 60))


if __name__ == '__main__':
    unittest.main()
