# SPDX-License-Identifier: Apache-2.0
"""Start, memory, and what the monitor takes for its work."""
import json
import statistics
import time

from peers import EXPORT
from scratch import CLUSTER, MIB
from setting import CaseError, Unsupported

N_ACTIONS = 1000
N_ROUND_TRIPS = 300


def kept(s):
    return s.scratch.filled(s.medium, changed=False)


def start_to_greeting(s):
    daemon = s.daemon(kept(s))
    try:
        daemon.connect_qmp()
        return {'value': (time.monotonic() - daemon.started) * 1e3, 'cpu': daemon.cpu_seconds() * 1e3}
    finally:
        daemon.stop()


def idle_memory(s):
    with s.daemon(kept(s)) as daemon:
        if s.peer.has_qmp:
            daemon.monitor().execute('query-version')
        rss, pss = daemon.memory_kib()
        return {'value': rss / 1024, 'cpu': pss / 1024}


def timed_exchange(daemon, qmp, message):
    data = json.dumps(message).encode()
    cpu, start = daemon.cpu_seconds(), time.monotonic()
    reply = qmp.exchange(data)
    numbers = {'value': (time.monotonic() - start) * 1e3, 'cpu': (daemon.cpu_seconds() - cpu) * 1e3,
               'bytes': len(data)}
    if 'return' not in reply or reply.get('id') != message.get('id'):
        raise CaseError(f'wrong reply: {str(reply)[:300]}')
    return numbers


def large_request(s):
    """A request of 1 MiB in many small values; its id comes back in the reply."""
    item = {'number': 12345, 'text': 'some words', 'list': [True, None, 1.5]}
    count = MIB // len(json.dumps([item]))
    with s.daemon(kept(s)) as daemon:
        return timed_exchange(daemon, daemon.monitor(), {'execute': 'query-version', 'id': [item] * count})


def round_trip(s):
    """The smallest request and its reply, one after the other: the median."""
    with s.daemon(kept(s)) as daemon:
        qmp = daemon.monitor()
        runs = [timed_exchange(daemon, qmp, {'execute': 'query-version', 'id': i})
                for i in range(N_ROUND_TRIPS)]
    return {'value': statistics.median(r['value'] for r in runs),
            'cpu': statistics.fmean(r['cpu'] for r in runs)}


# ---- What is dirty, over NBD ----

N_RUNS = 1000
STATUS_DEPTH = 16
WALKS = 5


def block_status(s):
    """A disk of 16 TiB with a thousand dirty blocks: how long a client takes to learn which. The bitmap
    is still, and is shown by an export of its own."""
    place = {'node-name': EXPORT, 'id': 'status', 'name': 'status', 'type': 'nbd', 'bitmaps': ['b0']}
    walks = {'plain': ['--depth', STATUS_DEPTH], 'qd1': [], 'extended': ['--extended']}
    with s.daemon(s.scratch.huge()) as daemon:
        qmp = daemon.monitor()
        qmp.execute('block-dirty-bitmap-add', node=EXPORT, name='b0', granularity=CLUSTER)
        common = ['--socket', daemon.nbd, '--runs', N_RUNS]
        s.run('blockstatus', [*common, '--export', EXPORT, '--mark'])
        qmp.execute('block-dirty-bitmap-disable', node=EXPORT, name='b0')
        qmp.execute('block-export-add', **place)
        rows = {}
        for key, options in walks.items():
            try:
                found = s.run('blockstatus', [*common, '--export', 'status', '--context', 'qemu:dirty-bitmap:b0',
                                              '--granularity', CLUSTER, '--server-pid', daemon.pid,
                                              '--walks', 1 if s.quick else WALKS, *options])
                rows[key] = {'value': found['median_ms'], 'cpu': found['server_cpu_ms'],
                             'requests': found['requests'], 'best_ms': found['best_ms']}
            except Unsupported as e:
                rows[key] = {'skipped': str(e)}
    s.scratch.drop(s.medium, 'huge.raw')
    return rows


def bitmap_action(kind, node, i, **data):
    return {'type': f'block-dirty-bitmap-{kind}', 'data': {'node': node, 'name': f'b{i}', **data}}


def large_transactions(s):
    """A thousand bitmaps added at once, then each merged with its neighbour, then all cleared."""
    steps = {
        'add': [bitmap_action('add', EXPORT, i, granularity=CLUSTER) for i in range(N_ACTIONS)],
        'merge': [{'type': 'block-dirty-bitmap-merge', 'data': {
            'node': EXPORT, 'target': f'b{i}', 'bitmaps': [f'b{(i + 1) % N_ACTIONS}']}}
            for i in range(N_ACTIONS)],
        'clear': [bitmap_action('clear', EXPORT, i) for i in range(N_ACTIONS)]}
    with s.daemon(kept(s)) as daemon:
        qmp = daemon.monitor()
        return {name: timed_exchange(daemon, qmp, {'execute': 'transaction', 'id': name,
                                                   'arguments': {'actions': actions}})
                for name, actions in steps.items()}
