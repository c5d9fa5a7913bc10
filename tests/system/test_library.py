# SPDX-License-Identifier: Apache-2.0
"""libtidemark as others get it: installed, found by pkg-config, built against with nothing but its
headers, on a real daemon. What it sends and how it takes each answer: lib/lib_test.c."""
import json
import os
import re
import shutil
import subprocess

import pytest

import harness
from harness import DEADLINE, MiB, Daemon, qemu_io
from lossy import Lossy

EXAMPLES = os.path.join(harness.ROOT, 'examples')


def build_option(name):
    options = json.loads(subprocess.check_output(['meson', 'introspect', '--buildoptions', harness.BUILD]))
    return next(o['value'] for o in options if o['name'] == name)


class Installed:
    def __init__(self, dest):
        subprocess.run(['meson', 'install', '-C', harness.BUILD, '--no-rebuild', '--destdir', dest], check=True,
                       stdout=subprocess.DEVNULL)
        self.dest = str(dest)
        self.libdir = dest + os.path.join(build_option('prefix'), build_option('libdir'))
        self.env = {**os.environ, 'PKG_CONFIG_PATH': self.libdir + '/pkgconfig', 'PKG_CONFIG_SYSROOT_DIR': self.dest,
                    'LD_LIBRARY_PATH': self.libdir}
        sanitize = build_option('b_sanitize')
        self.flags = [] if sanitize == 'none' else ['-fsanitize=' + sanitize]

    def pkg_config(self, *args):
        return subprocess.check_output(['pkg-config', *args, 'libtidemark'], env=self.env, text=True).split()

    def compile(self, source, to, compiler=('cc', '-std=c11')):
        subprocess.run([*compiler, '-Wall', '-Wextra', '-Wpedantic', '-Werror', *self.flags, source, '-o', to,
                        *self.pkg_config('--cflags', '--libs')], check=True, cwd=self.dest, env=self.env)

    def run(self, *argv, code=0):
        r = subprocess.run(argv, env=self.env, capture_output=True, text=True, timeout=DEADLINE)
        assert r.returncode == code, f'{r.returncode}: {r.stdout}{r.stderr}'
        return r.stdout, r.stderr


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    if not shutil.which('pkg-config') or not shutil.which('cc'):
        pytest.skip('pkg-config or cc is not installed')
    return Installed(str(tmp_path_factory.mktemp('dest')))


@pytest.fixture
def d():
    with Daemon() as daemon:
        for name in ('disk1', 'disk2', 't1', 't2'):
            daemon.add_disk(name, 4 * MiB)
        for disk in ('disk1', 'disk2'):
            daemon.cmd('block-dirty-bitmap-add', node=disk, name='old')
            daemon.export(disk)
        yield daemon


def test_what_is_installed(installed):
    found = {os.path.relpath(os.path.join(here, f), installed.dest)
             for here, _, files in os.walk(installed.dest) for f in files}
    assert {f for f in found if '/include/' in f} == {f for f in found if re.search(r'/include/tidemark/(tidemark|actions)\.h$', f)}
    assert sum('/include/' in f for f in found) == 2
    assert [os.path.basename(f) for f in found if f.endswith('.a')] == ['libtidemark.a']
    assert [f for f in found if f.endswith('/share/doc/tidemark/qmp.md')]
    out = subprocess.check_output(['readelf', '-d', installed.libdir + '/libtidemark.so'], text=True)
    assert 'Library soname: [libtidemark.so.0]' in out
    assert installed.pkg_config('--modversion') == ['0.1.0']
    assert set(installed.pkg_config('--libs')) >= {'-ltidemark'} and len(installed.pkg_config('--libs')) <= 2


def test_only_public_symbols_are_exported(installed):
    with open(os.path.join(harness.ROOT, 'lib/tidemark/tidemark.h')) as f, \
            open(installed.dest + os.path.join(build_option('prefix'), 'include/tidemark/actions.h')) as g:
        declared = set(re.findall(r'\b(tide_\w+)\(', re.sub(r'/\*.*?\*/', '', f.read() + g.read(), flags=re.S)))
    out = subprocess.check_output(['nm', '-D', '--defined-only', installed.libdir + '/libtidemark.so'], text=True)
    exported = {line.split()[2].split('@')[0] for line in out.splitlines() if line.split()[1] != 'A'}
    assert exported == declared


def test_the_headers_are_c_and_cpp(installed, tmp_path):
    source = tmp_path / 'x.c'
    source.write_text('#include <tidemark/tidemark.h>\nint main(void) { return tide_version() == 0; }\n')
    installed.compile(str(source), str(tmp_path / 'x'))
    installed.run(str(tmp_path / 'x'))
    if shutil.which('g++'):
        shutil.copy(source, tmp_path / 'x.cc')
        installed.compile(str(tmp_path / 'x.cc'), str(tmp_path / 'y'), ('g++', '-std=c++17'))


@pytest.fixture(scope='module')
def example(installed, tmp_path_factory):
    """Built outside of the tree; that the tree builds it too is part of the build."""
    source = os.path.join(EXAMPLES, 'group_backup.c')
    with open(source) as f:
        assert len(f.readlines()) < 60
    to = str(tmp_path_factory.mktemp('example') / 'group_backup')
    installed.compile(source, to)
    assert os.path.exists(os.path.join(harness.BUILD, 'examples', 'group-backup'))
    return to


def names(d, node):
    return sorted(b['name'] for b in d.node(node).get('dirty-bitmaps', []))


def test_the_example_backs_up_two_disks(installed, example, d):
    for disk in ('disk1', 'disk2'):
        qemu_io(d.uri(disk), 'write -P 7 1M 64k')
    installed.run(example, d.qmp_path, 'old', 'new', 'disk1', 't1', 'disk2', 't2')
    for disk in ('disk1', 'disk2'):
        d.qmp.event('BLOCK_JOB_COMPLETED', device=disk)
        assert names(d, disk) == ['new', 'old'] and d.bitmap(disk, 'old')['count'] == 0
    for target in ('t1', 't2'):
        d.export(target)
        qemu_io(d.uri(target), 'read -P 7 1M 64k')
    done = [t for t in d.cmd('query-transactions') if not t['plain']][0]
    assert done['grouped'] and done['id'].startswith('tidemark-') and done['n-actions'] == 4


def test_the_example_prints_the_failing_action(installed, example, d):
    d.cmd('block-dirty-bitmap-remove', node='disk2', name='old')
    out, err = installed.run(example, d.qmp_path, 'old', 'new', 'disk1', 't1', 'disk2', 't2', code=1)
    assert out == '' and re.match(r"action 3 \(blockdev-backup\) failed, all is undone: .*'old'", err)
    assert names(d, 'disk1') == ['old'] and d.cmd('query-jobs') == []
    _, err = installed.run(example, d.path('nobody'), 'old', 'new', 'disk1', 't1', 'disk2', 't2', code=1)
    assert 'nobody' in err


@pytest.mark.parametrize('after', [True, False], ids=['answer lost', 'request lost'])
def test_the_example_survives_a_lost_connection(installed, example, d, after):
    relay = Lossy(d.path('relay'), d.qmp_path, after=after, losses=2)
    installed.run(example, relay.path, 'old', 'new', 'disk1', 't1', 'disk2', 't2')
    relay.close()
    assert len(relay.seen) == 3 and len(set(relay.seen)) == 1
    assert names(d, 'disk1') == ['new', 'old'] == names(d, 'disk2')
    outcomes = [t['outcome'] for t in d.cmd('query-transactions') if 'id' in t]
    assert outcomes == (['replayed', 'replayed', 'committed'] if after else ['committed'])


DRY_RUN = r'''
#include <stdio.h>
#include <tidemark/tidemark.h>
int main(int argc, char **argv)
{
    struct tide_conn *conn = tide_conn_new();
    struct tide_txn *txn = tide_txn_new();
    struct tide_block_dirty_bitmap b = {.node = "disk1", .name = "old"};
    char *reply;
    (void)argc;
    tide_conn_set_timeout(conn, 20000);
    tide_txn_set_dry_run(txn, true);
    tide_txn_block_dirty_bitmap_remove(txn, &b);
    tide_txn_json(txn, argv[2]);
    if (tide_conn_open(conn, argv[1]) < 0 || tide_txn_run(txn, conn) < 0)
        return 2;
    for (size_t i = 0; i < tide_txn_length(txn); i++)
        printf("%s|%s\n", tide_txn_report_outcome(txn, i),
               tide_txn_report_does(txn, i) ? tide_txn_report_does(txn, i) : "");
    printf("%d %d %s\n", tide_txn_would_commit(txn), tide_txn_failed_action(txn), tide_txn_error(txn));
    if (tide_conn_call(conn, "query-block-jobs", "{}", &reply) == 0)
        printf("%s\n", reply);
    tide_free(reply);
    tide_txn_free(txn);
    tide_conn_free(conn);
    return 0;
}
'''


def test_a_dry_run_from_c(installed, d, tmp_path):
    (tmp_path / 'dry.c').write_text(DRY_RUN)
    installed.compile(str(tmp_path / 'dry.c'), str(tmp_path / 'dry'))
    add = json.dumps({'type': 'block-dirty-bitmap-add', 'data': {'node': 'disk1', 'name': 'old'}})
    out, _ = installed.run(str(tmp_path / 'dry'), d.qmp_path, add)
    lines = out.splitlines()
    assert [ln.split('|')[0] for ln in lines[:2]] == ['exercised', 'exercised'] and "'old'" in lines[1]
    assert lines[2:] == ['1 -1 ', '[]']
    out, _ = installed.run(str(tmp_path / 'dry'), d.qmp_path, '[{"type": "abort", "data": {}}]')
    lines = out.splitlines()
    assert lines[1] == 'failed|' and lines[2].startswith('0 1 ') and len(lines[2]) > 4
    assert names(d, 'disk1') == ['old']
