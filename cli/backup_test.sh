#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# The tool against a real daemon: points are made, put back and compared with the disks as they were;
# then runs are killed at every step, and every next one still has to be incremental and right.
#
#   backup_test.sh TIDEMARK TIDEMARKD KILLAT.so
#
# Ends with 77 (skipped) if a program is missing. Nothing here sleeps or guesses a moment: runs are
# killed at their n-th call of the system (killat.c).
set -u
tool=$(realpath "$1")
daemon=$(realpath "$2")
killat=$(realpath "$3")
for program in qemu-io cmp "$tool" "$daemon"; do
    command -v "$program" >/dev/null || { echo "skipped: no $program"; exit 77; }
done

dir=$(mktemp -d)
cd "$dir" || exit 1
mkdir bin
ln -s "$tool" bin/tidemark
ln -s "$daemon" bin/tidemarkd
export PATH="$dir/bin:$PATH" TIDEMARK_SOCKET="$dir/run/tidemark.sock"
export ASAN_OPTIONS=verify_asan_link_order=0

end() {
    tidemark stop >/dev/null 2>&1
    cd / && rm -rf "$dir"
}
trap end EXIT

fail() {
    echo "FAILED: $*"
    cat out.txt err.txt 2>/dev/null
    exit 1
}

# run CODE COMMAND...: the tool has to end with CODE
run() {
    local want=$1
    shift
    tidemark "$@" >out.txt 2>err.txt
    local code=$?
    [ $code = "$want" ] || fail "tidemark $* ended with $code, not $want"
}

says() {
    grep -q -- "$1" out.txt err.txt || fail "'$1' was not said"
}

write() { # NODE QEMU-IO-COMMAND
    qemu-io -f raw -c "$2" "nbd+unix:///$1?socket=$dir/run/tidemark-nbd.sock" >/dev/null ||
        fail "cannot write to $1"
}

same() { # POINT FILE1 FILE2
    run 0 restore bk "$1" --to out --force
    cmp out/one.raw "$2" || fail "point $1 of disk one differs"
    cmp out/two.raw "$3" || fail "point $1 of disk two differs"
}

truncate -s 16M one.img
truncate -s 8M two.img
run 0 serve --dir run one=one.img two=two.img
run 0 status
says two

# A chain of three points, each as the disks were.
write one "write -P 1 2M 3M"
write two "write -P 2 7M 1M"
run 2 backup one
run 0 backup --to bk one two
says "copied in full"
cp one.img one.1
cp two.img two.1
write one "write -P 9 5M 200k"
write one "write -z -u 2M 128k"
write one "discard 3M 64k"
write two "write -P 4 0 4k"
cp one.img one.2
cp two.img two.2
run 0 backup --to bk --incremental one two
write one "write -P 10 14M 1M"
run 0 backup --to bk --incremental two one
same 1 one.1 two.1
same 2 one.2 two.2
same latest one.img two.img
run 0 verify bk
run 1 restore bk --to out
says "is there already"
echo "ok - a chain of three points"

# A disk that the last point lacks is full, the others stay incremental.
run 0 backup --to bk one
run 1 backup --to bk --incremental one two
says "does not have it"
run 0 backup --to bk one two
says "disk 'two' is copied in full"
grep -q "one .*incremental" out.txt || fail "disk one was not copied incrementally"
same latest one.img two.img
echo "ok - disks fall back one by one"

# Two directories do not disturb each other; nor does a copy of one.
cp -a bk copy
write one "write -P 11 8M 1M"
run 0 backup --to other one
run 0 backup --to bk --incremental one two
same latest one.img two.img
run 0 backup --to other --incremental one
run 1 backup --to copy --incremental one
says "is gone"
run 0 backup --to copy one
run 0 restore copy --disk one=copy.raw
cmp copy.raw one.img || fail "the copied directory restores something else"
run 0 backup --to bk one two # the copy went on with the chain, so this one has to begin anew
says "is gone"
same latest one.img two.img
echo "ok - directories are independent"

# Killed before every n-th call that changes a file or talks to the daemon.
for n in $(seq 1 100); do
    write one "write -P $n $((n * 96))k 70k"
    write two "write -P $n $((n * 64))k 70k"
    KILL_AT=$n LD_PRELOAD=$killat tidemark backup --to bk one two >/dev/null 2>&1
    code=$?
    write one "write -P $((n + 1)) $((n * 96 + 40))k 70k"
    run 0 backup --to bk --incremental one two
    same latest one.img two.img
    ls bk | grep -q tmp && fail "files were left behind"
    [ $code = 0 ] && break
done 2>/dev/null
[ "$n" -gt 10 ] && [ "$n" -lt 100 ] || fail "the run made $n calls"
run 0 verify bk
tidemark job ls | grep -q "no jobs" || fail "jobs were left behind"
tidemark node ls | grep -q tm- && fail "target nodes were left behind"
echo "ok - killed at $((n - 1)) places, every next run was incremental and right"

# The daemon is killed: its bitmaps are gone, the next point is full, and right.
kill -9 "$(cat run/tidemark.pid)"
tail --pid="$(cat run/tidemark.pid)" -f /dev/null
run 5 status
run 0 serve --dir run one=one.img two=two.img
run 0 backup --to bk one two
says "copied in full"
same latest one.img two.img
echo "ok - after the daemon was killed"

# Damage is found, and nothing damaged is restored.
printf X | dd of=bk/one.full.raw bs=1 seek=2M conv=notrunc 2>/dev/null
run 3 verify bk
says "one.full.raw' is damaged"
run 1 restore bk 1 --to damaged
[ -z "$(ls damaged)" ] || fail "a damaged disk was restored"
run 0 stop
run 5 status
echo "ok - damage is found"
