#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Checks of the tree that a compiler does not make. One line for each finding, FILE:LINE: TEXT.

    scripts/tidy.py            all but clang-tidy; quick; a stage of ./check
    scripts/tidy.py --deep     clang-tidy too, by .clang-tidy and build/compile_commands.json
    scripts/tidy.py NAME...    only these checks; --list names them

Exit status 0: nothing found, 1: something was. What needs a build (generated headers, archives)
takes it from build/, or from $TIDEMARK_BUILD.
"""
import ast
import concurrent.futures
import fnmatch
import glob
import json
import os
import re
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BUILD = os.environ.get('TIDEMARK_BUILD', os.path.join(ROOT, 'build'))
JOBS = os.cpu_count() or 1
MAX_FUNCTION = 120  # lines; more is a finding
LONG_FILE = 900  # lines; more is only shown

# ---------------------------------------------------------------------- the tree

SKIP_DIRS = {'.git', '__pycache__', '.hypothesis', '.pytest_cache'}


def all_files():
    found = []
    for here, dirs, names in os.walk(ROOT):
        top = here == ROOT
        dirs[:] = sorted(d for d in dirs if d not in SKIP_DIRS and
                         not (top and (d == 'build' or d.startswith('build-'))))
        found += [os.path.relpath(os.path.join(here, n), ROOT) for n in sorted(names)]
    return [f for f in found if not f.endswith('.pyc') and not os.path.islink(os.path.join(ROOT, f))]


FILES = all_files()
C_FILES = [f for f in FILES if f.endswith(('.c', '.h'))]
HEADERS = [f for f in FILES if f.endswith('.h')]
TOP_FOLDERS = sorted({f.split('/')[0] for f in FILES if '/' in f and not f.startswith('.')})


def read(path):
    with open(os.path.join(ROOT, path), errors='replace') as f:
        return f.read()


def folder(path):
    return path.split('/')[0]


def is_test(path):
    return path.endswith(('_test.c', '_test.h')) or folder(path) == 'tests'


def is_python(path):
    return path.endswith('.py') or read(path)[:40].startswith('#!/usr/bin/python3')


def blank(match):
    """The text's line breaks: what is cut out keeps its height."""
    return re.sub(r'[^\n]', ' ', match.group())


COMMENT = re.compile(r'/\*.*?\*/|//[^\n]*', re.S)
COMMENT_OR_TEXT = re.compile(r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', re.S)


def code_of(text):
    """C without comments, strings and characters."""
    return COMMENT_OR_TEXT.sub(blank, text)


def line_of(text, at):
    return text.count('\n', 0, at) + 1


# ---------------------------------------------------------------------- includes

# From the bottom up; each folder and what it may include besides itself. meson.build files link
# along the same lines. schema/ is for block/ and above; bitmap/ and schema/ know base/ only.
MAY_INCLUDE = {
    'base': '',
    'co': 'base',
    'io': 'base co',
    'schema': 'base',
    'event': 'base co io',
    'bitmap': 'base',
    'block': 'base co io schema event bitmap',
    'drivers': 'base co io schema event bitmap block',
    'job': 'base co io schema event bitmap block store',
    'export': 'base co io schema event bitmap block',
    'store': 'base co',
    'txn': 'base co io schema event bitmap block job export store',
    'qmp': 'base co io schema event bitmap block job export store txn',
    'tidemarkd': 'base co io schema event bitmap block job export store txn qmp',
    'lib': 'base schema',
    'cli': 'base schema lib',
    'examples': '',
    'bench': '',
}
ALSO = {('bench', 'base/bytes.h'),  # the load generator measures from outside
        ('cli', 'txn/footprint.h')}  # a list is explained without a daemon

# Doors within a folder: who may include what is inside.
PRIVATE = {
    'co/switch.h': 'co',
    'io/loop.h': 'io',
    'io/real.h': 'io',
    'io/real_file.h': 'io',
    'io/sim_*.h': 'io',
    'bitmap/kernels.h': 'bitmap',
    'bitmap/pages.h': 'bitmap',
    'schema/tables.h': 'schema',
    'block/driver.h': 'block drivers job',  # a job puts its hook into the node it copies
    'drivers/*.h': 'drivers',
    'job/backup_int.h': 'job',
    'export/nbd/*.h': 'export',
    'txn/actions.h': 'txn',
    'qmp/scan.h': 'qmp tidemarkd',  # JSON comes in options too
}
# What tests reach into although it is private: fuzzers of one parser, the simulator's helpers.
FOR_TESTS = ['io/sim_test.h', 'export/nbd/*.h', 'qmp/scan.h']


def include_fault(path, name):
    mine, other = folder(path), folder(name)
    if '/' not in name:
        return None  # beside the file, or made by it
    if any(fnmatch.fnmatch(name, p) for p in FOR_TESTS) and is_test(path):
        return None
    for pattern, users in PRIVATE.items():
        if fnmatch.fnmatch(name, pattern) and mine not in users.split():
            return f'{name} is private to {" ".join(u + "/" for u in users.split())}'
    if name == 'io/sim.h' and mine != 'io' and not is_test(path):
        return 'io/sim.h: the simulator is for tests'
    if name == 'base/check.h' and not is_test(path):
        return 'base/check.h: the checks are of tests'
    if is_test(path) or mine == other or (mine, name) in ALSO:
        return None  # a test may include what it links
    if mine not in MAY_INCLUDE:
        return f'folder {mine}/ has no place in the order of scripts/tidy.py'
    if other not in MAY_INCLUDE[mine].split():
        return f'{mine}/ must not include {name}: {other}/ is not below it'
    return None


def check_includes():
    """Includes go down the list of folders; private headers stay where they belong."""
    for path in C_FILES:
        text = COMMENT.sub(blank, read(path))
        for m in re.finditer(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"', text, re.M):
            fault = include_fault(path, m.group(1))
            if fault:
                yield path, line_of(text, m.start()), fault


# ---------------------------------------------------------------------- headers by themselves

def compile_header(path):
    source = f'#include "{os.path.relpath(os.path.join(ROOT, path), ROOT)}"\n'
    r = subprocess.run(['gcc', '-std=gnu17', '-D_GNU_SOURCE', '-fsyntax-only', '-I' + ROOT, '-I' + BUILD,
                        '-I' + os.path.join(ROOT, 'lib'), '-I' + os.path.join(BUILD, 'lib'),
                        '-Wall', '-Wextra', '-Wno-unused-parameter', '-Wno-sign-compare', '-Wno-unused',
                        '-x', 'c', '-'],
                       input=source, capture_output=True, text=True, cwd=ROOT)
    m = re.search(r'^([^\n:]+):(\d+):\d+: (?:fatal )?(?:error|warning): ([^\n]*)', r.stderr, re.M)
    if m:
        return [(os.path.relpath(os.path.join(ROOT, m.group(1)), ROOT), int(m.group(2)),
                 f'{path} does not compile by itself: {m.group(3)}')]
    return [(path, 1, 'does not compile by itself: ' + r.stderr.strip()[-200:])] if r.returncode else []


def check_headers():
    """Every header compiles by itself."""
    if not os.path.exists(os.path.join(BUILD, 'schema', 'types.h')):
        yield 'build', 1, 'no generated headers: run ./run --build-only first'
        return
    generated = [os.path.join(BUILD, 'schema', n) for n in ('types.h', 'handlers.h')]
    with concurrent.futures.ThreadPoolExecutor(JOBS) as pool:
        for found in pool.map(compile_header, HEADERS + generated):
            yield from found


# ---------------------------------------------------------------------- licence

SPDX = 'SPDX-License-Identifier: Apache-2.0'


def check_spdx():
    """Every source file says its licence in one of its first three lines."""
    for path in FILES:
        name = os.path.basename(path)
        source = path.endswith(('.c', '.h', '.S', '.py', '.sh', '.toml', '.scd', '.pml')) or \
            name in ('meson.build', 'meson_options.txt', 'Makefile', '.clang-tidy')
        if (source or read(path).startswith('#!')) and SPDX not in '\n'.join(
                read(path).split('\n')[:3]):
            yield path, 1, f'the line "{SPDX}" is missing'


# ---------------------------------------------------------------------- calls

# name: (what to do instead, where it is allowed)
BUILDING = ('*_test.c',)  # tests build short texts, and run with sanitizers
BANNED = {
    'strcat': ('snprintf', BUILDING),
    'strncpy': ('snprintf or memcpy', ()),
    'sprintf': ('snprintf', BUILDING),
    'vsprintf': ('vsnprintf', ()),
    'gets': ('a bounded read', ()),
    'atoi': ('strtol with checks', BUILDING),
    'atol': ('strtol with checks', BUILDING + ('cli/killat.c',)),  # loaded by a test
    'alloca': ('mem_alloc', ()),
    'strtok': ('strtok_r', ()),
    # The load generator has no base/error.c; tests print what a person reads once.
    'strerror': ('tide_strerror', BUILDING + ('bench/*', 'tests/*')),
    'rand': ('io_random', ()),
    'srand': ('io_random', ()),
    'random': ('io_random', ()),
    'system': ('posix_spawn or fork', ()),
    'sleep': ('an event with a deadline', ()),
    'usleep': ('an event with a deadline', ()),
}
BANNED_CALL = re.compile(r'(?<![\w.>])(' + '|'.join(BANNED) + r')\s*\(')
STRCPY = re.compile(r'(?<![\w.>])strcpy\s*\(\s*([^,]+),\s*(.+?)\);')
CHECKED_WITHIN = 12  # lines


def check_strcpy(path, text):
    """strcpy is fine where the length of the same text was looked at a few lines before."""
    lines = text.split('\n')
    for i, line in enumerate(lines):
        m = STRCPY.search(line)
        if not m or fnmatch.fnmatch(path, '*_test.c'):
            continue
        before = '\n'.join(lines[max(0, i - CHECKED_WITHIN):i])
        if f'strlen({m.group(2)})' not in before:
            yield path, i + 1, f'strcpy without a look at strlen({m.group(2)}) before: use snprintf'


def check_sleep(path, text):
    """A loop that polls what no event announces may sleep, if it says so there."""
    lines = text.split('\n')
    for i, line in enumerate(lines):
        if re.search(r'\btime\.sleep\(|^\s*sleep [\d.$]', line) and \
                not re.search(r'poll|only way', '\n'.join(lines[max(0, i - 9):i + 1]), re.I):
            yield path, i + 1, 'sleeps: wait for an event, or say here what is polled and why'


def check_calls():
    """Calls that have a better form; sleeping."""
    for path in C_FILES:
        text = read(path)
        code = code_of(text)
        for m in BANNED_CALL.finditer(code):
            instead, allowed = BANNED[m.group(1)]
            if not any(fnmatch.fnmatch(path, p) for p in allowed):
                yield path, line_of(code, m.start()), f'{m.group(1)}: use {instead}'
        yield from check_strcpy(path, COMMENT.sub(blank, text))
    for path in FILES:
        if path != 'scripts/tidy.py' and path.endswith(('.py', '.sh')):
            yield from check_sleep(path, read(path))


# ---------------------------------------------------------------------- mutable globals

# The simulator runs several daemons in one process, so their state hangs on `struct instance`. What
# is writable all the same, and why that does no harm:
WRITABLE = {
    ('base', 'log_most'): 'set once, before the first thread',
    ('base', 'log_program'): 'set once, before the first thread',
    ('base', 'fail_in'): 'of a thread; fault injection of tests',
    ('base', 'n_allocs'): 'of a thread; fault injection of tests',
    ('co', 'current'): 'of a thread: the coroutine that runs',
    ('co', 'deepest'): 'of a thread; measured only when a test asks',
    ('co', 'measuring'): 'of a thread; switched on by a test',
    ('io', 'current_loop'): 'of a thread, set by the engine: what loop_self() says',
    ('cli', 'was_interrupted'): 'set by a signal handler; the tool is no daemon',
}


def check_globals():
    """No archive of build/ has a writable variable that is not on the list."""
    archives = sorted(glob.glob(os.path.join(BUILD, '*', 'lib*.a')))
    archives = [a for a in archives if not a.endswith('/libtidemark.a')]  # one object of others' parts
    if not archives:
        yield 'build', 1, 'no archives: run ./run --build-only first'
        return
    r = subprocess.run(['nm', '-A', '--format=sysv', '--defined-only', *archives],
                       capture_output=True, text=True)
    seen = set()
    for line in r.stdout.split('\n'):
        cells = [c.strip() for c in line.split('|')]
        # Relocated constants are of class D too, in a section that is read-only at run time.
        if len(cells) < 7 or cells[2] not in tuple('DdBbC') or '.data.rel.ro' in cells[6]:
            continue
        member, name = re.match(r'.*?/([^/]+/lib[^/]+\.a\.p/[^:]+):(.*)', cells[0]).groups()
        name = re.sub(r'\.\d+$', '', name)  # a static of a function
        key = folder(member), name
        if key in WRITABLE or key in seen or name.startswith('__'):
            continue
        seen.add(key)
        where = f'{key[0]}/{os.path.basename(member)[:-2]}'
        yield where, global_line(where, name), f"'{name}' is a writable global (section {cells[6]})"


def global_line(path, name):
    try:
        m = re.search(r'^.*\b' + re.escape(name) + r'\b', code_of(read(path)), re.M)
    except OSError:
        return 1
    return line_of(read(path), m.start()) if m else 1


# ---------------------------------------------------------------------- documents

DOCUMENTS = [f for f in FILES if f == 'README.md' or fnmatch.fnmatch(f, 'docs/*.md') or
             f in ('bench/README.md', 'model/README.md')]
TOP = set(TOP_FOLDERS) | {f for f in FILES if '/' not in f}
MADE = re.compile(r'^(?:\./)?build(-\w+)?(/|$)')  # by the build: not there in a fresh checkout


def exists(path):
    full = os.path.join(ROOT, path)
    return bool(glob.glob(full)) or bool(glob.glob(os.path.join(BUILD, path)))


def paths_in(text):
    """(offset, path) of each word between backticks that looks like a path of this tree."""
    fence = re.sub(r'```.*?```', blank, text, flags=re.S)
    for m in re.finditer(r'`([^`\n]+)`', fence):
        for word in re.finditer(r'[^\s,;()\'"]+', m.group(1)):
            path = re.sub(r'(::.*|:\d*|\.)$', '', word.group())
            path = re.sub(r'\bNAME\b', '*', re.sub(r'^\./', '', path))
            if ('/' in path and path.split('/')[0] in TOP or path in TOP) and not MADE.match(path):
                yield m.start(1) + word.start(), path
            elif word.group().startswith('./') and not MADE.match(path):
                yield m.start(1) + word.start(), path


def check_docs():
    """Paths that the documents name exist, and ARCHITECTURE.md knows every folder."""
    for path in DOCUMENTS:
        text = read(path)
        for at, name in paths_in(text):
            if not exists(name):
                yield path, line_of(text, at), f'`{name}` does not exist'
    name = 'docs/ARCHITECTURE.md'
    if name not in FILES:
        yield name, 1, 'is missing'
        return
    text = read(name)
    for d in TOP_FOLDERS:
        if f'`{d}/' not in text:
            yield name, 1, f'does not mention the folder `{d}/`'


def reference_fault(ref):
    """What is wrong with `FILE::TEST`, `FILE: NAME` or `FILE`; None if it exists."""
    m = re.match(r'([\w./*-]+?)(?:(::|: ?)(.+))?$', ref)
    if not m or not exists(m.group(1)):
        return f'`{ref}`: no such file'
    path, colon, name = m.groups()
    if not colon:
        return None
    text = read(path)
    if colon == '::':
        parts = re.sub(r'\[.*', '', name).split('::')
        ok = all(re.search(r'^\s*(?:async )?(?:def|class) ' + re.escape(p) + r'\b', text, re.M)
                 for p in parts)
    else:
        ok = re.search(r'(?<![\w-])' + re.escape(name.strip()) + r'(?![\w-])', text)
    return None if ok else f'`{ref}`: {path} has no such test'


def check_promises():
    """Every test that docs/promises.md refers to in the last column of a table exists."""
    name = 'docs/promises.md'
    if name not in FILES:
        return
    for i, line in enumerate(read(name).split('\n')):
        if not line.startswith('|') or re.match(r'^\|[\s|:-]+$', line):
            continue
        last = line.rstrip().rstrip('|').split('|')[-1]
        for ref in re.findall(r'`([^`]+)`', last):
            if '/' not in ref and '::' not in ref:
                continue  # a word, no reference
            fault = reference_fault(ref)
            if fault:
                yield name, i + 1, fault


# ---------------------------------------------------------------------- layout

def format_file(path):
    r = subprocess.run(['clang-format', '--dry-run', '-Werror', path], capture_output=True, text=True,
                       cwd=ROOT)
    m = re.search(r'^[^\n:]+:(\d+):\d+: ', r.stderr, re.M)
    return [(path, int(m.group(1)), f'not formatted: clang-format -i {path}')] if m else []


def check_format():
    """clang-format would change nothing."""
    if not shutil.which('clang-format'):
        note('clang-format is not installed: layout was not checked')
        return
    with concurrent.futures.ThreadPoolExecutor(JOBS) as pool:
        for found in pool.map(format_file, C_FILES):
            yield from found


# ---------------------------------------------------------------------- places

# Paths that exist on one machine only, and hosts: every address in the tree is on purpose.
MACHINE = re.compile(r'(?<![\w./-])/(?:work|root|home|Users)/[\w.-]*')
TEMPORARY = re.compile(r'/tmp/[\w.-]+')
TEMPORARY_OK = re.compile(r'XXXXXX|^/tmp/(restored|tidemark[\w.-]*)$')
URL = re.compile(r'\b(?:https?|git|ssh)://([\w.-]*\w)')
HOSTS = {'www.apache.org', 'github.com', 'www.qemu.org', 'json.schemastore.org'}


def check_places():
    """No path of a developer's machine, and no host but those listed."""
    for path in FILES:
        if path == 'scripts/tidy.py':
            continue
        for i, line in enumerate(read(path).split('\n')):
            for m in MACHINE.finditer(line):
                yield path, i + 1, f'{m.group()} is a path of one machine'
            for m in TEMPORARY.finditer(line):
                if not TEMPORARY_OK.search(m.group()):
                    yield path, i + 1, f'{m.group()}: make a directory of your own (mkdtemp)'
            for m in URL.finditer(line):
                if m.group(1) not in HOSTS:
                    yield path, i + 1, f'host {m.group(1)} is not on the list of scripts/tidy.py'


# ---------------------------------------------------------------------- sizes

def c_functions(path):
    """(name, first line, number of lines). Relies on the layout: braces of functions in column 0."""
    lines = code_of(read(path)).split('\n')
    begin = None
    for i, line in enumerate(lines):
        if line == '{':
            begin = i
            while begin > 0 and lines[begin - 1].strip() and lines[begin - 1][0] not in '#}':
                begin -= 1
        elif line.startswith('}') and begin is not None:
            m = re.search(r'(\w+)\s*\(', '\n'.join(lines[begin:i]))
            yield (m.group(1) if m else '?'), begin + 1, i - begin + 1
            begin = None


def python_functions(path):
    for node in ast.walk(ast.parse(read(path))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, node.lineno, node.end_lineno - node.lineno + 1


def check_sizes():
    """No function is longer than MAX_FUNCTION lines; shows the longest, and long files."""
    found = []
    for path in FILES:
        if path.endswith('.c') or path.endswith('.h'):
            found += [(n, path, line, name) for name, line, n in c_functions(path)]
        elif is_python(path):
            found += [(n, path, line, name) for name, line, n in python_functions(path)]
    found.sort(key=lambda f: (-f[0], f[1:]))
    for n, path, line, name in found[:10]:
        note(f'long function: {path}:{line}: {name}, {n} lines')
    for path in FILES:
        n = read(path).count('\n')
        if n > LONG_FILE and (path.endswith(('.c', '.h')) or is_python(path)):
            note(f'long file: {path}, {n} lines')
    for n, path, line, name in found:
        if n > MAX_FUNCTION:
            yield path, line, f'{name} is {n} lines long; {MAX_FUNCTION} are allowed'


# ---------------------------------------------------------------------- clang-tidy

# What was looked at and is not so. The analyzer sees one file at a time: it does not know that a
# function elsewhere fills what it is given when it returns 0. (file, part of the text): why.
FALSE = {
    ('cli/backup_daemon.c', 'uninitialized value'): 'view_nodes fills `nodes` unless it fails',
    ('cli/cmd_restore.c', 'garbage value'): 'manifest_load fills the manifest unless it fails',
    ('cli/cmd_restore.c', "field 'point'"): 'manifest_choose gives a point unless it fails',
    ('cli/manifest.c', 'Null pointer passed'): 'a point has a uuid',
    ('cli/ranges.c', "field 'list'"): 'cli_grow does not return without memory',
    ('io/io_test.c', 'Null pointer passed'): 'skip() does not return',
    ('io/real_sock.c', 'garbage value'): 'getpeername has filled it',
    ('txn/action_backup.c', 'garbage or undefined'): 'backup_new makes a job unless it fails',
}


def tidy_file(path):
    r = subprocess.run(['clang-tidy', '--quiet', '-p', BUILD, path], capture_output=True, text=True,
                       cwd=ROOT)
    found = set()
    for m in re.finditer(r'^(/[^\n:]+):(\d+):\d+: (?:warning|error): ([^\n]*)$', r.stdout, re.M):
        where = os.path.relpath(m.group(1), ROOT)
        known = any(where == path and part in m.group(3) for path, part in FALSE)
        if not where.startswith('..') and not MADE.match(where) and not known:
            found.add((where, int(m.group(2)), m.group(3)))
    if r.returncode and not found:
        found.add((path, 1, 'clang-tidy failed: ' + r.stderr.strip()[-200:].replace('\n', ' ')))
    return found


def check_deep():
    """clang-tidy, with the checks of .clang-tidy. Only with --deep: a minute or two."""
    if not shutil.which('clang-tidy'):
        note('clang-tidy is not installed: its checks were not made')
        return
    with open(os.path.join(BUILD, 'compile_commands.json')) as f:
        sources = {os.path.relpath(os.path.join(e['directory'], e['file']), ROOT) for e in json.load(f)}
    sources = sorted(s for s in sources if s.endswith('.c') and s in FILES)
    seen = set()
    with concurrent.futures.ThreadPoolExecutor(JOBS) as pool:
        for found in pool.map(tidy_file, sources):
            yield from sorted(found - seen)
            seen |= found


# ---------------------------------------------------------------------- the whole

CHECKS = {
    'includes': check_includes,
    'headers': check_headers,
    'spdx': check_spdx,
    'calls': check_calls,
    'globals': check_globals,
    'docs': check_docs,
    'promises': check_promises,
    'format': check_format,
    'places': check_places,
    'sizes': check_sizes,
    'deep': check_deep,
}
notes = []


def note(text):
    notes.append(text)


def main():
    names = [a for a in sys.argv[1:] if not a.startswith('-')]
    flags = {a for a in sys.argv[1:] if a.startswith('-')}
    if flags & {'-h', '--help'}:
        print(__doc__.strip())
        return 0
    if '--list' in flags:
        for name, check in CHECKS.items():
            print(f'{name:<10}{check.__doc__}')
        return 0
    if flags - {'--deep'} or set(names) - set(CHECKS):
        print('tidy: unknown argument; see scripts/tidy.py --help', file=sys.stderr)
        return 2
    if not names:
        names = [n for n in CHECKS if n != 'deep' or '--deep' in flags]
    n = 0
    for name in names:
        for path, line, text in CHECKS[name]():
            print(f'{path}:{line}: {text}', flush=True)
            n += 1
    for text in notes:
        print(text)
    print(f'tidy: {n} findings in {", ".join(names)}')
    return 1 if n else 0


if __name__ == '__main__':
    sys.exit(main())
