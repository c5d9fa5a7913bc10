# SPDX-License-Identifier: Apache-2.0
"""Engines and loops: the portable engine chosen by itself, for each reason and said once; engines asked
for by name; iothread objects."""
import os
import subprocess

import nbd
import pytest

from harness import BIN, BUILD, DEADLINE, Daemon, KiB, MiB, QmpError, qemu_io


def nouring():
    path = os.path.join(BUILD, 'io', 'nouring')
    if not os.access(path, os.X_OK):
        pytest.skip('no launcher: libseccomp-dev is not installed')
    return path


def has_io_uring():
    r = subprocess.run([os.path.join(BIN, 'tidemarkd'), '--engine', 'io_uring', '--blockdev', 'null-co,node-name=n',
                        '--blockdev', 'null-co,node-name=n'], capture_output=True, text=True, timeout=DEADLINE)
    return 'io_uring' not in r.stderr


FORBIDDEN = [([], 'Operation not permitted'), (['--enosys'], 'not implemented')]


@pytest.mark.parametrize('how,reason', FORBIDDEN, ids=['EPERM', 'ENOSYS'])
@pytest.mark.parametrize('by_name', [False, True], ids=['default', 'auto'])
@pytest.mark.skipif('TIDEMARK_ENGINE' in os.environ, reason='this run chooses the engine')
def test_portable_is_taken_and_said_once(how, reason, by_name):
    with Daemon(['--engine', 'auto'] if by_name else [], wrapper=[nouring(), *how]) as d:
        assert d.cmd('query-tidemark')['engine'] == 'portable'
        lines = [line for line in d.log().splitlines() if 'io_uring' in line]
        assert len(lines) == 1 and reason in lines[0], d.log()
        d.add_file('f', MiB, discard='unmap')
        qemu_io(d.export('f'), 'write -P 3 4k 4k', 'write -z 64k 4k', 'discard 128k 4k', 'flush', 'read -P 3 4k 4k')
        assert len([line for line in d.log().splitlines() if 'io_uring' in line]) == 1
    assert d.proc.returncode == 0


@pytest.mark.parametrize('how,reason', FORBIDDEN, ids=['EPERM', 'ENOSYS'])
def test_io_uring_by_name_is_refused_where_forbidden(how, reason):
    r = subprocess.run([nouring(), *how, os.path.join(BIN, 'tidemarkd'), '--engine', 'io_uring'], stdin=subprocess.DEVNULL,
                       capture_output=True, text=True, timeout=DEADLINE)
    assert r.returncode == 1 and r.stdout == ''
    assert r.stderr.count('\n') == 1 and reason in r.stderr and "'portable'" in r.stderr


@pytest.mark.parametrize('engine', ['portable', 'io_uring', 'auto'])
def test_engines_by_name(engine):
    if engine == 'io_uring' and not has_io_uring():
        pytest.skip('no io_uring here')
    if 'TIDEMARK_ENGINE' in os.environ:
        pytest.skip('this run chooses the engine')
    with Daemon(['--engine', engine]) as d:
        got = d.cmd('query-tidemark')['engine']
        assert got == engine if engine != 'auto' else got in ('portable', 'io_uring')


@pytest.mark.parametrize('value', ['', 'epoll', 'IO_URING', 'io_uring,x'])
def test_other_engines_are_refused_by_name(value):
    r = subprocess.run([os.path.join(BIN, 'tidemarkd'), '--engine', value], capture_output=True, text=True, timeout=DEADLINE)
    assert r.returncode == 1 and r.stderr.count('\n') == 1 and f"'{value}'" in r.stderr and 'portable' in r.stderr


# ---------------------------------------------------------------- iothreads

def refused(d, command, **args):
    with pytest.raises(QmpError) as e:
        d.cmd(command, **args)
    return e.value.desc


def test_an_iothread_in_use_is_kept(tide):
    for name in ('t0', 't1'):
        tide.cmd('object-add', qom_type='iothread', id=name)
    tide.cmd('blockdev-add', driver='null-co', node_name='n')
    tide.export('n', 'a', iothread='t0')
    assert "'t0' is in use" in refused(tide, 'object-del', id='t0')
    tide.cmd('object-del', id='t1')
    assert "'t1'" in refused(tide, 'block-export-add', type='nbd', id='x', node_name='n', name='x', iothread='t1')
    tide.cmd('block-export-del', id='exp-a')
    tide.qmp.event('BLOCK_EXPORT_DELETED', id='exp-a')
    tide.cmd('object-del', id='t0')


@pytest.mark.parametrize('fixed', [False, True])
def test_two_exports_of_a_node_with_different_iothreads(tide, fixed):
    """A node is served on any loops at once, so no iothread stands against another; fixed or not."""
    for name in ('t0', 't1'):
        tide.cmd('object-add', qom_type='iothread', id=name)
    tide.add_file('f', MiB)
    for i in range(2):
        tide.export('f', f'e{i}', iothread=f't{i}', **{'fixed-iothread': fixed})
    handles = []
    for i in range(2):
        h = nbd.NBD()
        h.connect_uri(tide.uri(f'e{i}'))
        handles.append(h)
    handles[0].pwrite(b'x' * 4 * KiB, 0)
    assert handles[1].pread(4 * KiB, 0) == b'x' * 4 * KiB
    for h in handles:
        h.shutdown()
