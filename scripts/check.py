#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Runs the suites, prints a line for each, counts.

A stage is a command that writes a JUnit file, or one that counts as a single test by its exit status
(77: skipped). Its output goes to build/check/STAGE.log and is shown when the stage fails. Stages run in
lanes, all lanes at once and the stages of a lane one after the other. Tests with daemons keep one
processor busy and wait now and then; there are two lanes of them, and a third, of a lower priority, for
what only computes: it takes what the others leave, and the machine when they are done. What measures
speed comes last, alone.
"""
import concurrent.futures
import os
import random
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OUT = os.path.join(ROOT, 'build', 'check')
PYTHON = '/usr/bin/python3'
LONG = '--long' in sys.argv


class Stage:
    def __init__(self, name, command, env=None, junit=None, limit=1200):
        self.name, self.command, self.env, self.junit, self.limit = name, command, env or {}, junit, limit


def nice(stage):
    """It gets little of the machine while others want it, so it may take long."""
    stage.command = ['nice', '-n', '19', *stage.command]
    stage.limit *= 2
    return stage


def meson(name, build, *args, env=None, limit=1200):
    junit = os.path.join(ROOT, build, 'meson-logs', 'testlog-' + name + '.junit.xml')
    return Stage(name, ['meson', 'test', '-C', build, '--no-rebuild', '--print-errorlogs', '--logbase',
                        'testlog-' + name, '--timeout-multiplier', '0' if LONG else '20', *args], env, junit, limit)


def pytest(name, build, *args, env=None, limit=1200):
    junit = os.path.join(OUT, name + '.xml')
    return Stage(name, [PYTHON, '-m', 'pytest', '-q', '-ra', '-p', 'no:cacheprovider',
                        '--junitxml', junit, *args],
                 {'TIDEMARK_BUILD': os.path.join(ROOT, build), **(env or {})}, junit, limit)


# Emulating a machine takes long under the thread sanitizer, and its load is light: one disk, one client.
NO_GUEST = '--deselect=tests/interop/test_nbd_content.py::test_a_guest_boots_and_is_backed_up_while_it_writes'


# Nodes exchanged under clients who read and write.
UNDER_SWAPS = ['tests/system/test_txn_exports.py::test_' + name for name in (
    'every_write_is_on_one_side_of_the_swap', 'qemu_io_notices_nothing', 'clients_that_are_killed_amid_swaps',
    'reads_that_go_straight_from_the_file')]


# What a client is told does not depend on the engine: one of them is enough, but for --long.
ANY_ENGINE = [] if LONG else ['--ignore=tests/system/test_' + name + '.py' for name in (
    'contract_bitmaps', 'contract_jobs', 'contract_backup', 'contract_lists', 'contract_table', 'diff_qsd',
    'examples', 'explain_swaps', 'library')]


# How much of what chance makes: each test has a variable of its own, as lists of one take as long as a hundred
# of another. docs/HACKING.md says how long all of it takes.
LONG_SEEDS = {'SIM_SEEDS': '20000'}
LONG_LISTS = {'TIDEMARK_FUZZ_LISTS': '100000', 'TIDEMARK_SWAP_LISTS': '3000', 'TIDEMARK_MIXED_LISTS': '2000',
              'TIDEMARK_DIFF_SEEDS': '50', 'TIDEMARK_FUZZ_SEED': str(random.randrange(2 ** 32))}


def lanes():
    seeds = LONG_SEEDS if LONG else {}
    lists = LONG_LISTS if LONG else {}
    hours = 6 * 3600 if LONG else 1200
    return [
        [pytest('system', 'build-asan', 'tests/system', env=lists, limit=hours),
         pytest('interop', 'build-asan', 'tests/interop', limit=hours),
         # Its time is that of the clock: it needs a processor.
         Stage('fuzz', ['scripts/fuzz.sh', '600' if LONG else '10'], limit=hours),
         meson('tool', 'build', '--suite', 'system')],
        [meson('unit', 'build-asan', '--suite', 'unit', env=seeds, limit=hours),
         pytest('portable', 'build', 'tests/system', 'tests/interop', *ANY_ENGINE,
                env={'TIDEMARK_ENGINE': 'portable'}, limit=hours),
         pytest('threads', 'build-tsan', 'tests/interop', 'tests/system/test_cbw.py',
                'tests/system/test_transaction.py', 'tests/system/test_isolation.py',
                'tests/system/test_slow_disk.py', *UNDER_SWAPS,
                'tests/system/test_block_path.py::test_parts_of_a_block_written_at_once', NO_GUEST, limit=hours),
         meson('cross', 'build', '--suite', 'cross')],
        [nice(Stage('tidy', [PYTHON, 'scripts/tidy.py', *(['--deep'] if LONG else [])], limit=hours)),
         nice(Stage('model', ['model/run', *([] if LONG else ['--quick'])], limit=hours)),
         nice(meson('sim', 'build-asan', '--suite', 'sim', env=seeds, limit=hours)),
         nice(meson('unit-tsan', 'build-tsan', '--suite', 'unit', limit=hours))],
    ]


def last():
    return [
        Stage('demo', ['./run']),
        Stage('bench', ['bench/run', '--quick', '--peer', 'tidemarkd,qsd,no-server', '--cases',
                        '^(4k-rand(read|write|mixed)-qd16|1m-seqwrite-qd16|tmpfs:4k-randread-qd64|'
                        'direct:(4k-randwrite-qd64|1m-seqread-qd16))$|recording|backup|guest|'
                        'block-status|greeting|memory|qmp-|txn-(actions-1000$|pause)']),
    ]


def count_junit(path):
    """(passed, [failed names], skipped)"""
    passed, failed, skipped = 0, [], 0
    for case in ET.parse(path).getroot().iter('testcase'):
        if case.find('failure') is not None or case.find('error') is not None:
            failed.append(f"{case.get('classname')}: {case.get('name')}")
        elif case.find('skipped') is not None:
            skipped += 1
        else:
            passed += 1
    return passed, failed, skipped


def execute(command, log, limit, env):
    """Its exit status, and the seconds of processors that it and its children took."""
    p = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **env}, stdout=log, stderr=log,
                         stdin=subprocess.DEVNULL)
    timer = threading.Timer(limit, os.kill, (p.pid, signal.SIGKILL))
    timer.start()
    _, status, used = os.wait4(p.pid, 0)
    p.returncode = os.waitstatus_to_exitcode(status)
    timer.cancel()
    return p.returncode, used.ru_utime + used.ru_stime


def run(stage):
    log = os.path.join(OUT, stage.name + '.log')
    if stage.junit and os.path.exists(stage.junit):
        os.unlink(stage.junit)
    begin = time.monotonic()
    with open(log, 'wb') as f:
        code, cpu = execute(stage.command, f, stage.limit, stage.env)
        seconds = time.monotonic() - begin
        if seconds >= stage.limit:
            f.write(b'\nended: it took too long\n')
    if stage.junit and os.path.exists(stage.junit):
        passed, failed, skipped = count_junit(stage.junit)
        if code not in (0, 77) and not failed:
            failed = [f'{stage.name}: ended with status {code}']
    elif code == 77:
        passed, failed, skipped = 0, [], 1
    else:
        passed, failed, skipped = (1, [], 0) if code == 0 else (0, [stage.name], 0)
    lines = [f'{stage.name:<10} {passed:5} passed {len(failed):3} failed {skipped:3} skipped '
             f'{seconds:7.1f} s {cpu:7.1f} s of processors\n']
    if failed:
        with open(log, errors='replace') as f:
            lines += f.readlines()[-80:]
    print(''.join(lines), end='', flush=True)
    return passed, failed, skipped


def run_lanes(lanes):
    """All at once, the stages of one after the other; what run() said of each stage."""
    with concurrent.futures.ThreadPoolExecutor(len(lanes)) as pool:
        return [r for lane in pool.map(lambda stages: [run(s) for s in stages], lanes) for r in lane]


def main():
    os.makedirs(OUT, exist_ok=True)
    wanted = [a for a in sys.argv[1:] if not a.startswith('--')]
    names = [s.name for lane in [*lanes(), last()] for s in lane]
    if '--list' in sys.argv:
        print('\n'.join(names))
        return 0
    unknown = set(wanted) - set(names)
    if unknown:
        print(f'check: no stage {", ".join(sorted(unknown))}; see ./check --list', file=sys.stderr)
        return 2
    chosen = [[s for s in lane if not wanted or s.name in wanted] for lane in [*lanes(), last()]]
    results = run_lanes(chosen[:-1]) + run_lanes(chosen[-1:])
    failed = [f for r in results for f in r[1]]
    for name in failed:
        print('FAILED', name)
    print(f'{sum(r[0] for r in results)} passed, {len(failed)} failed, {sum(r[2] for r in results)} skipped')
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
