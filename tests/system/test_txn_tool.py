# SPDX-License-Identifier: Apache-2.0
"""`tidemark txn run|check|explain|log`: lists as text and as JSON, what is printed, exit codes. What
each line of text means: cli/txn_test.c."""
import json
import os
import re
import shutil
import subprocess
import time

import pytest

import harness
from harness import DEADLINE, MiB, Daemon, qemu_io
from lossy import Lossy

TOOL = os.path.join(harness.BIN, 'tidemark')


class Tool:
    def __init__(self, d):
        self.d, self.socket = d, d.qmp_path

    def __call__(self, *args, code=0, stdin=''):
        env = {**os.environ, 'TIDEMARK_SOCKET': self.socket, 'LC_ALL': 'C.UTF-8', 'TZ': 'UTC'}
        r = subprocess.run([TOOL, 'txn', *args], input=stdin, capture_output=True, text=True, env=env, cwd=self.d.dir,
                           timeout=DEADLINE)
        assert r.returncode == code, f'{args}: {r.returncode}: {r.stdout}{r.stderr}'
        self.err = r.stderr
        return r.stdout

    def fails(self, *args, code=1, **kw):
        """Nothing on standard output; one line of what went wrong, and perhaps a hint."""
        assert self(*args, code=code, **kw) == ''
        lines = self.err.splitlines()
        assert lines[0].startswith('tidemark: ') and len(lines) <= 2, lines
        assert len(lines) == 1 or lines[1].startswith('hint: ')
        return lines

    def file(self, name, text):
        with open(self.d.path(name), 'w') as f:
            f.write(text)
        return name


@pytest.fixture
def tool():
    with Daemon() as d:
        for name in ('disk0', 'disk1', 't0'):
            d.add_disk(name, 4 * MiB)
        yield Tool(d)


def names(tool, node='disk0'):
    return [b['name'] for b in tool.d.node(node).get('dirty-bitmaps', [])]


# ---------------------------------------------------------------- run

def test_a_list_as_text(tool):
    d = tool.d
    d.export('disk0')
    tool('run', '-', stdin='add disk0/b0')
    qemu_io(d.uri('disk0'), 'write 1M 64k')
    tool.file('list', '# tonight\nadd disk0/b1 disabled\nmerge disk0/b1 <- b0\n\n'
                      'backup disk0 to t0 job=j0 sync=incremental bitmap=b1\nclear disk0/b0\n')
    assert tool('run', 'list', '--grouped') == '4 actions done\n'
    d.qmp.event('BLOCK_JOB_COMPLETED', device='j0')
    assert d.bitmap('disk0', 'b0')['count'] == 0
    done = [t for t in d.cmd('query-transactions') if not t['plain']][0]
    assert done['grouped'] and done['n-actions'] == 4


def test_a_failure_names_the_line_and_says_that_all_was_undone(tool):
    list_ = tool.file('list', 'add disk0/b1\n# nothing\nclear disk0/zz\nadd disk0/b2\n')
    first, hint = tool.fails('run', list_)
    assert re.match(r"tidemark: 'list', line 3, action 1 \(clear disk0/zz\): .*'zz'.* not found$", first)
    assert 'undone' in hint and names(tool) == []
    remove = [{'type': 'block-dirty-bitmap-clear', 'data': {'node': 'disk0', 'name': 'z z'}}]
    first, _ = tool.fails('run', '-', stdin=json.dumps(remove))
    assert first.startswith("tidemark: '-', action 0 (clear disk0/\"z z\"): ")


def test_wrong_text_never_reaches_the_daemon(tool):
    before = len(tool.d.cmd('query-transactions'))
    assert "'-', line 2, word 'claer'" in tool.fails('run', '-', stdin='add disk0/b\nclaer disk0/b')[0]
    assert "did you mean 'clear'?" in tool.err
    assert "'nosuch'" in tool.fails('run', 'nosuch')[0]
    tool.fails('run', '-', '--retry', 'soon', stdin='abort', code=2)
    assert len(tool.d.cmd('query-transactions')) == before and names(tool) == []


def test_json_that_the_daemon_refuses(tool):
    assert 'no-such-kind' in tool.fails('run', '-', stdin='[{"type": "no-such-kind", "data": {}}]')[0]


def test_properties_of_the_file_and_of_options(tool):
    text = json.dumps({'actions': [{'type': 'block-dirty-bitmap-add', 'data': {'node': 'disk0', 'name': 'b'}}],
                       'properties': {'id': 'of-the-file'}})
    got = json.loads(tool('run', '-', '--json', stdin=text))
    assert got == {'actions': 1, 'id': 'of-the-file', 'outcome': 'committed'}
    assert tool('run', '-', stdin=text) == '1 action done before, under the same id\n'
    assert 'exists' in tool.fails('run', '-', '--id', 'mine', stdin=text)[0]
    assert json.loads(tool('run', '-', '--json', stdin='add disk0/c')) == {'actions': 1}


def test_a_remembered_failure_says_so(tool):
    tool.fails('run', '-', '--id', 'x', stdin='clear disk0/b')
    tool('run', '-', stdin='add disk0/b')
    assert 'nothing was run now' in tool.fails('run', '-', '--id', 'x', stdin='clear disk0/b')[1]


@pytest.mark.parametrize('after', [True, False], ids=['answer lost', 'request lost'])
def test_a_lost_connection_and_retry(tool, after):
    relay = Lossy(tool.d.path('relay'), tool.d.qmp_path, after=after, losses=2)
    tool.socket = relay.path
    out = tool('run', '-', '--retry', '30', stdin='add disk0/b')
    relay.close()
    assert out == ('1 action done before, under the same id\n' if after else '1 action done\n')
    assert names(tool) == ['b']
    ids = {json.loads(r)['arguments']['properties']['id'] for r in relay.seen}
    assert len(relay.seen) == 3 and len(ids) == 1
    outcomes = [t['outcome'] for t in tool.d.cmd('query-transactions') if t.get('id') in ids]
    assert outcomes == (['replayed', 'replayed', 'committed'] if after else ['committed'])


def test_a_lost_connection_without_retry(tool):
    relay = Lossy(tool.d.path('relay'), tool.d.qmp_path)
    tool.socket = relay.path
    assert 'not known' in tool.fails('run', '-', code=5, stdin='add disk0/b')[1]
    relay.close()
    relay = Lossy(tool.d.path('relay'), tool.d.qmp_path)
    assert "--id 'x'" in tool.fails('run', '-', '--id', 'x', code=5, stdin='add disk0/c')[1]
    relay.close()


def test_each_chosen_id_is_another(tool):
    for name in ('a', 'b'):
        tool('run', '-', '--retry', '5', stdin=f'add disk0/{name}')
    ids = [t['id'] for t in tool.d.cmd('query-transactions') if 'id' in t]
    assert len(ids) == len(set(ids)) == 2 and sorted(names(tool)) == ['a', 'b']


def test_without_a_daemon(tool):
    tool.socket = tool.d.path('nobody')
    for command in ('run', 'check'):
        tool.fails(command, '-', code=5, stdin='abort')
    tool.fails('log', code=5)


# ---------------------------------------------------------------- check

def test_check_tells_what_each_action_sees_and_does(tool):
    tool('run', '-', stdin='add disk0/b0')
    text = 'add disk0/b1 disabled\nmerge disk0/b1 from b0\nclear disk0/b0\n'
    out = tool('check', '-', stdin=text)
    rows = out.splitlines()
    assert rows[0].split() == ['#', 'ACTION', 'OUTCOME', 'SEES', 'DOES']
    assert re.match(r'0 +add disk0/b1 disabled +exercised ', rows[1]) and "bitmap 'b1'" in rows[1]
    assert re.match(r'2 +clear disk0/b0 +exercised .*0 dirty bytes', rows[3])
    assert 'would be carried out' in out
    assert names(tool) == ['b0']
    got = json.loads(tool('check', '-', '--json', stdin=text))
    assert got['outcome'] == 'would-commit' and len(got['actions']) == 3


def test_check_of_a_list_that_would_fail(tool):
    text = 'add disk0/b1\n\nclear disk0/zz\nabort\n'
    out = tool('check', '-', stdin=text, code=1)
    assert [r.split()[3 if 'disk' in r else 2] for r in out.splitlines()[1:]] == ['exercised', 'failed', 'not-run']
    assert tool.err.startswith("tidemark: '-', line 3, action 1 (clear disk0/zz) would fail: ") and "'zz'" in tool.err
    got = json.loads(tool('check', '-', '--json', stdin=text, code=1))
    assert got['outcome'] == 'would-fail' and got['failed-action'] == 1
    assert names(tool) == []


def test_check_leaves_an_id_alone(tool):
    text = json.dumps({'actions': [{'type': 'block-dirty-bitmap-add', 'data': {'node': 'disk0', 'name': 'b'}}],
                       'properties': {'id': 'once'}})
    tool('check', '-', stdin=text)
    assert tool('run', '-', stdin=text) == '1 action done\n'


# ---------------------------------------------------------------- explain

LIST = ('add disk0/b1 disabled\nadd disk1/b1\nmerge disk0/b1 from b0\n'
        'backup disk0 to t0 job=j0 sync=incremental bitmap=b1\nclear disk0/b0\n')


def test_explain_needs_no_daemon(tool):
    tool.socket = '/nonexistent'
    out = tool('explain', '-', stdin=LIST)
    lines = out.splitlines()
    assert '  0  add disk0/b1 disabled' in lines and '  2  merge disk0/b1 from b0' in lines
    after = {(int(m[2]), int(m[1])) for m in re.finditer(r'^     after (\d+): .*, (\d+) (?:reads|writes)$', out, re.M)}
    assert (2, 0) in after and (3, 2) in after and (4, 2) in after and not any(1 in pair for pair in after)
    assert "     after 2: contents of bitmap 'b0' on node 'disk0': 2 reads, 4 writes" in lines
    assert 'neighbours that may be swapped: 0 and 1, 1 and 2' in lines
    held = lines[-1]
    assert held.startswith('held meanwhile: ') and "node 'disk0' (all requests)" in held and "node 'disk1' (all requests)" in held


def test_explain_without_a_daemon_of_what_a_list_does_not_say(tool):
    """An export or a node that the list does not make may be any; of 30000 bitmaps, without taking ten seconds."""
    merge = {'type': 'block-dirty-bitmap-merge', 'data': {'node': 'd', 'target': 't', 'bitmaps': [f'b{i}' for i in range(30000)]}}
    text = json.dumps([{'type': 'block-export-del', 'data': {'id': 'e'}}, merge, {'type': 'blockdev-del', 'data': {'node-name': 'n'}}])
    start = time.monotonic()
    edges = json.loads(tool('explain', '-', '--json', stdin=text))['dependencies']
    assert time.monotonic() - start < 8
    assert [(e['on'], e['action']) for e in edges] == [(0, 1), (0, 2), (1, 2)]
    assert len(edges[0]['because']) == 30001  # the state of each
    assert edges[1]['because'][0]['name'] == "node 'n'"


def test_explain_with_and_without_a_daemon_agree(tool):
    here = json.loads(tool('explain', '-', '--json', stdin=LIST))
    there = json.loads(tool('explain', '-', '--json', '--socket', tool.d.qmp_path, stdin=LIST))
    # The daemon also knows what is below a node; all that the arguments say is in its answer.
    edges = {(e['action'], e['on']) for e in there['dependencies']}
    assert {(e['action'], e['on']) for e in here['dependencies']} <= edges
    assert {h['node'] for h in here['holds']} <= {h.get('node') for h in there['holds']}
    assert names(tool) == []
    tool.fails('explain', '-', '--socket', tool.d.path('nobody'), code=5, stdin=LIST)


def test_explain_refuses_what_the_schema_does_not_know(tool):
    text = json.dumps([{'type': 'abort', 'data': {}}, {'type': 'block-dirty-bitmap-add', 'data': {'nod': 'x'}}])
    assert "'-', action 1 (" in tool.fails('explain', '-', stdin=text)[0]
    tool.fails('explain', '-', '--dot', '--json', stdin=LIST, code=2)


DOT_WORD = re.compile(r'\s*("(?:[^"\\]|\\.)*"|\w+|->|[][{};=])', re.S)


def parse_dot(text):
    """A graph in as much of the language as is used here: ({node: label}, {(from, to): label})."""
    words, at = [], 0
    text = text.rstrip()
    while at < len(text):
        m = DOT_WORD.match(text, at)
        assert m, text[at:]
        words.append(m[1])
        at = m.end()
    assert words[:3] == ['digraph', 'transaction', '{'] and words[-1] == '}', words
    nodes, edges = {}, {}
    rest = words[3:-1]
    while rest:
        end = rest.index(';')
        statement, rest = rest[:end], rest[end + 1:]
        assert statement[-5:][::2] == ['[', '=', ']'], statement
        key, value = statement[-4], statement[-2]
        if statement[:-5] == ['node']:
            continue
        assert key == 'label' and value[0] == '"', statement
        label = re.sub(r'\\(.)', lambda m: '\n' if m[1] == 'n' else m[1], value[1:-1])
        if len(statement) == 6:
            nodes[statement[0]] = label
        else:
            a, arrow, b = statement[:-5]
            assert arrow == '->' and a in nodes and b in nodes, statement
            edges[a, b] = label
    return nodes, edges


def test_explain_as_a_graph(tool):
    """Read by a small grammar, and by Graphviz where it is installed: what is in the JSON is in the graph."""
    text = 'add disk0/"a\\"b"\nclear disk0/"a\\"b"\nadd disk1/"x\\\\"\nadd disk1/"a\\nb"\nclear disk1/"x\\\\"\n'
    out = tool('explain', '-', '--dot', stdin=text)
    assert out.startswith('digraph transaction {') and out.endswith('}\n')
    nodes, edges = parse_dot(out)
    assert list(nodes) == [f'a{i}' for i in range(5)] and nodes['a0'] == '0: add disk0/"a\\"b"'
    told = json.loads(tool('explain', '-', '--json', stdin=text))['dependencies']
    assert edges == {(f"a{e['on']}", f"a{e['action']}"): '\n'.join(c['name'] for c in e['because']) for e in told}
    assert list(edges) == [('a0', 'a1'), ('a2', 'a4')]
    if shutil.which('dot'):
        subprocess.run(['dot', '-Tsvg'], input=out, text=True, check=True, stdout=subprocess.DEVNULL)


def test_an_empty_list(tool):
    assert tool('run', '-') == '0 actions done\n'
    assert 'no actions' in tool('check', '-')
    assert 'held meanwhile: nothing' in tool('explain', '-')


# ---------------------------------------------------------------- log

def test_the_log_ends_with_what_is_new(tool):
    tool('run', '-', '--id', 'first', stdin='add disk0/b0\nclear disk0/b0\n')
    tool.fails('run', '-', stdin='add disk0/b1\nclear disk0/zz\n')
    tool.d.cmd('block-dirty-bitmap-clear', node='disk0', name='b0')
    rows = tool('log').splitlines()
    assert rows[0].split() == ['#', 'TIME', 'CLIENT', 'ID', 'HELD', 'ACTIONS', 'OUTCOME']
    assert 'first' in rows[-3] and '2: add, clear' in rows[-3] and rows[-3].endswith('committed')
    assert re.search(r"2: add, clear +failed, action 1: .*'zz'", rows[-2])
    assert re.search(r'command, 1: clear +committed$', rows[-1])
    assert re.match(r' *\d+  20\d\d-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}  ', rows[-1])
    last = tool('log', '--limit', '1').splitlines()
    assert len(last) == 2 and last[1].split()[0] == rows[-1].split()[0]
    numbers = [t['number'] for t in json.loads(tool('log', '--json'))]
    assert numbers == sorted(numbers) and len(numbers) == len(rows) - 1
    tool.fails('log', '--limit', '0', code=2)


def test_a_log_without_entries(tool):
    with Daemon() as d:
        tool.socket = d.qmp_path
        assert d.cmd('query-transactions') == [] and tool('log') == 'no transactions yet\n'


def test_a_list_without_end_is_refused():
    r = subprocess.run([TOOL, 'txn', 'explain', '/dev/zero'], capture_output=True, text=True,
                       timeout=DEADLINE)
    assert r.returncode == 1 and "'/dev/zero' is longer than 64 MiB" in r.stderr, r
