# SPDX-License-Identifier: Apache-2.0
"""What a process that does not answer is doing, as text: the stacks of its threads and, of ours, of its
coroutines, by gdb; without gdb what the kernel knows of each thread.

Under gdb this file is the script that it runs (`gdb -x`). A parked coroutine is shown by giving a thread
its registers for a moment; the process goes on afterwards as it was.
"""
import glob
import shutil
import subprocess

LONGEST_S = 60
LINES = 400  # of gdb's, at most
SAVED = ['r15', 'r14', 'r13', 'r12', 'rbx', 'rbp', 'rip']  # on a parked stack, as co/switch_x86_64.S puts them
MANY = 40  # coroutines shown of a loop


def kernel_view(pid):
    out = []
    for task in sorted(glob.glob(f'/proc/{pid}/task/*')):
        out.append(task)
        for name in ('comm', 'wchan', 'syscall', 'stack'):
            try:
                with open(f'{task}/{name}', errors='replace') as f:
                    out.append(f'  {name}: {f.read().strip()}')
            except OSError as e:
                out.append(f'  {name}: {e.strerror}')
    return '\n'.join(out)


def stacks(pid):
    gdb = shutil.which('gdb')
    if not gdb:
        return ''
    try:
        r = subprocess.run([gdb, '-nx', '-batch', '-p', str(pid), '-x', __file__], capture_output=True, text=True,
                           errors='replace', timeout=LONGEST_S, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return f'gdb took longer than {LONGEST_S} s'
    lines = [line for line in r.stdout.splitlines() if line and not line.startswith('[')]
    return '\n'.join([*lines[:LINES], *(r.stderr.splitlines() if not lines else [])])


def describe(pid):
    return f'--- threads of {pid}:\n{kernel_view(pid)}\n{stacks(pid)}\n'


# ---------------------------------------------------------------- inside gdb

def number(gdb, expression):
    return int(gdb.parse_and_eval(expression).cast(gdb.lookup_type('unsigned long')))


def show_parked(gdb, co):
    """The stack of a coroutine that does not run."""
    sp = int(co['sp'].cast(gdb.lookup_type('unsigned long')))
    for i, register in enumerate(SAVED):
        gdb.execute(f'set ${register} = *(unsigned long *){sp + 8 * i}')
    gdb.execute(f'set $rsp = {sp + 8 * len(SAVED)}')
    gdb.execute('backtrace 24')


def show_coroutines(gdb):
    """Of the loop that the selected thread runs, if it runs one."""
    loop = gdb.parse_and_eval("'loop.c'::current_loop")
    if not loop:
        return
    kept = {r: number(gdb, f'${r}') for r in (*SAVED, 'rsp', 'orig_rax')}
    co, n = loop['sched']['live'], 0
    try:
        while co and n < MANY:
            print(f'coroutine {co} of loop {loop["index"]}{" runs" if co["entered"] else ""}')
            if not co['entered']:
                show_parked(gdb, co)
            co, n = co['live_next'], n + 1
    finally:
        for register, value in kept.items():
            gdb.execute(f'set ${register} = {value}')


def inside_gdb(gdb):
    gdb.execute('set pagination off')
    gdb.execute('set print frame-arguments scalars')
    gdb.execute('thread apply all backtrace 24')
    for thread in gdb.selected_inferior().threads():
        thread.switch()
        try:
            show_coroutines(gdb)
        except gdb.error as e:
            print(f'no coroutines of thread {thread.num}: {e}')
            break


if __name__ == '__main__':
    import gdb as running_gdb
    inside_gdb(running_gdb)
