# SPDX-License-Identifier: Apache-2.0
"""blockdev-add opens its file before the command lock, while the list of another client is under way: what
that one has done and may undo, or does before it, has to count as if they came one after the other."""
import os
import select
import time

import pytest

from file_state import open_files
from harness import DEADLINE, MiB, Daemon, QmpError

SIZE = MiB
ABORT = {'type': 'abort', 'data': {}}


def null(name, size=SIZE):
    return {'type': 'blockdev-add', 'data': {'driver': 'null-co', 'node-name': name, 'size': size}}


def raw_over(name, child):
    return {'type': 'blockdev-add', 'data': {'driver': 'raw', 'node-name': name, 'file': {
        'driver': 'null-co', 'node-name': child, 'size': 2 * SIZE}}}


def delete(name):
    return {'type': 'blockdev-del', 'data': {'node-name': name}}


def backup(path, job):
    return {'type': 'drive-backup', 'data': {'job-id': job, 'device': 'd0', 'target': path, 'sync': 'none'}}


def inode(path):
    return os.stat(path).st_ino if os.path.exists(path) else None


class Slow:
    """A list of a client of its own which has done `first` and a drive-backup to `path`, and goes on."""

    def __init__(self, d, first, then, path):
        idle = [{'type': 'block-dirty-bitmap-disable', 'data': {'node': 'd0', 'name': 'b'}}] * 40000
        before, self.client = inode(path), d.client()
        self.client.send({'execute': 'transaction', 'arguments': {
            'actions': [*first, backup(path, 'slow'), *idle, *then]}})
        end = time.monotonic() + DEADLINE
        while inode(path) == before and not select.select([self.client.sock], [], [], 0)[0]:
            assert time.monotonic() < end

    def end(self):
        reply = self.client.reply()
        self.client.close()
        return reply


@pytest.fixture
def d():
    with Daemon() as one:
        one.add_disk('d0', SIZE)
        one.cmd('block-dirty-bitmap-add', node='d0', name='b')
        one.cmd('blockdev-add', null('n')['data'])
        yield one


def nodes(d):
    return [(n['node-name'], n['image']['virtual-size']) for n in d.cmd('query-named-block-nodes')
            if n['node-name'][0] in 'nmc']


def ask(client, actions, **properties):
    client.send({'execute': 'transaction', 'arguments': {'actions': actions, 'properties': properties}})


@pytest.mark.parametrize('new', [null('n', 2 * SIZE), raw_over('m', 'n')], ids=['own', 'below'])
def test_a_name_whose_deletion_is_undone_is_not_given_away(d, new):
    slow = Slow(d, [delete('n')], [ABORT], d.path('target'))
    with pytest.raises(QmpError, match="'n' is in use already"):
        d.cmd('transaction', actions=[new])
    assert 'error' in slow.end()
    assert nodes(d) == [('n', SIZE)]


def test_a_list_gets_back_the_name_that_it_has_freed(d):
    slow = Slow(d, [delete('n')], [null('n', 2 * SIZE)], d.path('target'))
    with pytest.raises(QmpError, match="'n' is in use already"):
        d.cmd('blockdev-add', null('n', 3 * SIZE)['data'])
    assert 'return' in slow.end()
    assert nodes(d) == [('n', 2 * SIZE)]


@pytest.mark.parametrize('properties', [{}, {'id': 'x'}], ids=['plain', 'id'])
def test_a_name_whose_addition_is_undone_is_not_in_the_way(d, properties):
    slow = Slow(d, [null('m')], [ABORT], d.path('target'))
    ask(d.qmp, [null('m', 2 * SIZE)], **properties)
    assert 'return' in d.qmp.reply()
    assert 'error' in slow.end()
    assert nodes(d) == [('m', 2 * SIZE), ('n', SIZE)]


def shows_what_stands_at(d, path):
    """The node m reads and writes what anybody else finds there."""
    d.cmd('blockdev-add', null('c', os.stat(path).st_size)['data'])
    assert inode(path) in {inode(d.path(f)) for f in open_files(d)}, open_files(d)
    assert not [f for f in open_files(d) if '(deleted)' in f]


@pytest.mark.parametrize('old', [False, True], ids=['new', 'old'])
def test_a_file_that_is_taken_back_is_not_opened(d, old):
    path = d.path('target')
    if old:
        with open(path, 'wb') as f:
            f.truncate(3 * SIZE)
    before = inode(path)
    slow = Slow(d, [], [ABORT], path)
    d.qmp.send({'execute': 'blockdev-add', 'arguments': {'driver': 'file', 'node-name': 'm', 'filename': path}})
    reply = d.qmp.reply()
    assert 'error' in slow.end() and inode(path) == before
    assert ('return' in reply) == old, reply
    assert not [f for f in open_files(d) if '(deleted)' in f]
    if old:
        assert ('m', 3 * SIZE) in nodes(d)
        shows_what_stands_at(d, path)


def test_a_file_that_is_replaced_meanwhile_is_opened_as_it_is_then(d):
    """The first list holds the lock; the second, behind it, replaces the file; the third has opened it."""
    path = d.path('target')
    with open(path, 'wb') as f:
        f.truncate(3 * SIZE)
    slow, second = Slow(d, [], [ABORT], d.path('other')), d.client()
    ask(second, [backup(path, 'j')])
    d.cmd('query-version')
    d.qmp.send({'execute': 'blockdev-add', 'arguments': {'driver': 'file', 'node-name': 'm', 'filename': path}})
    assert 'error' in slow.end()
    assert 'return' in second.reply() and 'return' in d.qmp.reply()
    second.close()
    assert ('m', SIZE) in nodes(d)
    assert not [f for f in open_files(d) if '(deleted)' in f]
    d.cmd('block-job-cancel', device='j')
    d.qmp.job_end('j')
    shows_what_stands_at(d, path)
