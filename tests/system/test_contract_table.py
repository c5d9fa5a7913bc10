# SPDX-License-Identifier: Apache-2.0
"""tests/contract.toml is whole: each row of the contract's tables has tests that exist, or waits for something
that is not there yet, and each contract test belongs to a row."""
import copy
import functools
import itertools
import os
import re
import subprocess
import sys
import tomllib

import pytest

from harness import DEADLINE, ROOT

SECTIONS = {'5.3', '5.4', '6.2', '6.4', '7.1', '7.2', '9.2', '9.3', '9.5'}
MEMBERS = {'says', 'test', 'waits', 'why', 'differs'}


@functools.cache
def load():
    with open(os.path.join(ROOT, 'tests/contract.toml'), 'rb') as f:
        return tomllib.load(f)


def sections(table):
    return {k: v for k, v in table.items() if k != 'waits'}


def rows(table):
    """(id, row, the section's file)"""
    for name, section in sections(table).items():
        for key, row in section['row'].items():
            yield f'{name}/{key}', row, section['file']


def expand(text):
    """{a,b} as in a shell."""
    parts = [p[1:-1].split(',') if p.startswith('{') else [p] for p in re.split(r'(\{[^{}]*\})', text)]
    return [''.join(p) for p in itertools.product(*parts)]


def references(row, file):
    tests = row.get('test', [])
    for text in [tests] if isinstance(tests, str) else tests:
        for t in expand(text):
            yield t if '::' in t else f'{file}::{t}'


def cases_of(ref, collected):
    """The collected tests that a reference stands for."""
    if ref in collected:
        return {ref}
    return set() if ref.endswith(']') else {c for c in collected if c.startswith(ref + '[')}


def contract_files():
    folder = os.path.join(ROOT, 'tests/system')
    return {f'tests/system/{f}' for f in os.listdir(folder)
            if re.fullmatch(r'test_contract_(?!table)\w+\.py', f)}


@functools.cache
def collect(paths):
    """All tests of these files: of Python by asking pytest, of C those on the list at the end."""
    python = [p for p in paths if p.endswith('.py')]
    out = subprocess.run([sys.executable, '-m', 'pytest', '--collect-only', '-q', '-p', 'no:cacheprovider', *python],
                         cwd=ROOT, capture_output=True, text=True, timeout=2 * DEADLINE).stdout
    found = {line for line in out.split('\n') if '::' in line}
    for p in paths - set(python):
        with open(os.path.join(ROOT, p)) as f:
            found |= {f'{p}::{name}' for name in re.findall(r'cmocka_unit_test\((\w+)\)', f.read())}
    return found


def collected_for(table):
    paths = {r.split('::')[0] for _, row, file in rows(table) for r in references(row, file)} | contract_files()
    return collect(frozenset(p for p in paths if os.path.exists(os.path.join(ROOT, p))))


def shape_faults(table):
    """What is wrong with the table by itself."""
    if set(sections(table)) != SECTIONS:
        yield f'sections are {sorted(sections(table))}'
    for name, section in sections(table).items():
        if len(section['row']) != section['rows']:
            yield f'{name} has {len(section["row"])} rows, not {section["rows"]}'
    for id, row, _ in rows(table):
        if not re.fullmatch(r'\d\.\d/[a-z0-9/-]+', id) or not row.get('says') or set(row) - MEMBERS:
            yield f'{id}: no good row'
        if ('test' in row) == ('waits' in row):
            yield f'{id}: has to have a test, or else to wait for something'
        if ('waits' in row) != ('why' in row) or 'differs' in row and 'test' not in row:
            yield f'{id}: a reason without what it is for, or the other way round'
        if 'waits' in row and row['waits'] not in table['waits']:
            yield f'{id}: waits for {row["waits"]!r}, which is nothing'


def test_faults(table, collected):
    """Rows whose tests are not there, and tests that have no row."""
    named = set()
    for id, row, file in rows(table):
        for ref in references(row, file):
            cases = cases_of(ref, collected)
            if not cases:
                yield f'{id}: no test {ref}'
            named |= cases
    for c in sorted(collected - named):
        if c.split('::')[0] in contract_files():
            yield f'{c}: no row names it'


def arrived(table, commands, drivers):
    """Rows that wait for what is there."""
    for id, row, _ in rows(table):
        thing = table['waits'].get(row.get('waits'), {})
        if thing.get('command') in commands or thing.get('driver') in drivers:
            yield f'{id}: waits for {row["waits"]!r}, which is there'


test_faults.__test__ = False  # its name is not a test's


def offered(d):
    """Names of commands and of drivers."""
    schema = {e['name']: e for e in d.cmd('query-qmp-schema')}
    options = schema[schema['blockdev-add']['arg-type']]
    tag = next(m for m in options['members'] if m['name'] == options['tag'])
    return {n for n, e in schema.items() if e['meta-type'] == 'command'}, set(schema[tag['type']]['values'])


# ---------------------------------------------------------------- the table

def test_every_row_has_a_test_or_waits():
    assert list(shape_faults(load())) == []


def test_every_test_is_there_and_has_a_row():
    assert list(test_faults(load(), collected_for(load()))) == []


def test_nothing_waits_for_what_is_there(common):
    commands, drivers = offered(common)
    assert 'blockdev-backup' in commands and 'null-co' in drivers
    assert list(arrived(load(), commands, drivers)) == []


# ---------------------------------------------------------------- its checks

def lose_row(t):
    del t['9.5']['row']['merge-nothing']


def lose_section(t):
    del t['6.4']


def lose_test(t):
    del t['5.4']['row']['itself']['test']


def wait_and_test(t):
    t['5.4']['row']['itself'].update(waits='images', why='so')


def wait_without_reason(t):
    del t['5.3']['row']['clear/readonly']['why']


def wait_for_nothing(t):
    t['5.3']['row']['clear/readonly']['waits'] = 'better times'


def misspell(t):
    t['5.4']['row']['itself']['tests'] = 'test_merge'


def lose_words(t):
    t['5.4']['row']['itself']['says'] = ''


@pytest.mark.parametrize('change,told', [
    (lose_row, '9.5 has'), (lose_section, 'sections'), (lose_test, '5.4/itself'), (wait_and_test, '5.4/itself'),
    (wait_without_reason, '5.3/clear/readonly'), (wait_for_nothing, 'better times'), (misspell, '5.4/itself'),
    (lose_words, '5.4/itself')])
def test_a_fault_of_the_table_is_found(change, told):
    table = copy.deepcopy(load())
    change(table)
    faults = list(shape_faults(table))
    assert len(faults) == 1 and told in faults[0]


@pytest.mark.parametrize('change,told', [
    ('test_merge[itself-{plain,lisp}]', 'no test tests/system/test_contract_bitmaps.py::test_merge[itself-lisp]'),
    ('test_nothing', 'no test'), ('tests/system/test_nothing.py::test_x', 'no test'),
    ('job/job_test.c::created_job_sings', 'no test'), ('test_merge[itself-plain]', 'test_merge[itself-list]: no row')])
def test_a_missing_test_is_found(change, told):
    table = copy.deepcopy(load())
    table['5.4']['row']['itself']['test'] = change
    assert any(told in f for f in test_faults(table, collected_for(load())))


def test_a_row_that_need_not_wait_is_found():
    assert any(f.startswith('5.3/resize/enabled') for f in arrived(load(), {'block_resize'}, set()))
    assert any(f.startswith('5.3/clear/readonly') for f in arrived(load(), set(), {'qcow2'}))
