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
for program in qemu-io cmp jq flock "$tool" "$daemon"; do
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
    timeout 60 tidemark "$@" >out.txt 2>err.txt
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

mode() { # MODE FILE
    [ "$(stat -c %a "$2")" = "$1" ] || fail "$2 has mode $(stat -c %a "$2"), not $1"
}

newest() { # NODE: the bitmap that the directory's last point counts on
    jq -r ".points[-1].disks[] | select(.name == \"$1\").bitmap" bk/manifest.json
}

ask() { # COMMAND BITMAP: past the tool's guard, as any client can
    run 0 qmp "block-dirty-bitmap-$1" "{\"node\": \"one\", \"name\": \"$2\"}"
}

same() { # POINT FILE1 FILE2
    run 0 restore bk "$1" --to out --force
    cmp out/one.raw "$2" || fail "point $1 of disk one differs"
    cmp out/two.raw "$3" || fail "point $1 of disk two differs"
}

# Help fits a terminal, and every command has an example; completion knows every word of it.
tidemark --help >help.txt
tidemark completion bash >completion.sh
while read -r words; do
    # shellcheck disable=SC2086
    tidemark $words --help >>help.txt
    # shellcheck disable=SC2086
    tidemark $words --help | grep -q "^Example" || fail "'$words' has no example"
    (
        # shellcheck disable=SC2086,SC2206
        COMP_WORDS=(tidemark $words --) COMP_CWORD=$(($(wc -w <<<"$words") + 1))
        source ./completion.sh
        _tidemark
        # shellcheck disable=SC2086
        tidemark $words --help | grep -o '^  --[a-z-]*' | sort -u >want.txt
        printf '  %s\n' "${COMPREPLY[@]}" | sort -u | cmp -s - want.txt
    ) || fail "completion does not know the options of '$words'"
done < <(tidemark --help | grep -o '^  [a-z]\+\( [a-z]\+\)\?')
[ "$(grep -c ^usage: help.txt)" -gt 20 ] || fail "there are fewer commands than there were"
awk 'length > 80 { print; wide = 1 } END { exit !wide }' help.txt && fail "help is too wide"
(
    source ./completion.sh
    COMP_WORDS=(tidemark completion "") COMP_CWORD=2
    _tidemark
    [ "${COMPREPLY[*]}" = bash ]
) || fail "completion does not know its own word"
echo "ok - help and completion"

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

# A bitmap that somebody cleared, or stopped for a while, looks as before: its generation tells.
for how in clear "disable enable" "remove add"; do
    write one "write -P 21 4M 64k"
    bitmap=$(newest one)
    for command in $how; do
        ask "$command" "$bitmap"
        write one "write -P 22 6M 64k"
    done
    run 1 backup --to bk --incremental one two
    says "was cleared, disabled or made anew"
    run 0 backup --to bk one two
    says "'one' is copied in full"
    grep -q "two .*incremental" out.txt || fail "disk two was not copied incrementally"
    same latest one.img two.img
    run 0 backup --to bk --incremental one two
done
echo "ok - no increment from a bitmap that lost sight"

# The tool itself does so only if it is told twice.
bitmap=$(newest one)
run 0 bitmap add one mine
for command in "rm one $bitmap" "clear one $bitmap" "disable one $bitmap" "merge one $bitmap mine"; do
    # shellcheck disable=SC2086
    run 1 bitmap $command
    says "belongs to a backup directory"
done
run 0 backup --to bk --incremental one two
run 0 bitmap merge one "$(newest one)" mine --force
run 0 bitmap clear one "$(newest one)" --force
run 1 backup --to bk --incremental one two
run 0 bitmap disable one mine
run 0 bitmap clear one mine
run 0 bitmap rm one "$(newest one)" --force
run 0 bitmap rm one mine
run 0 backup --to bk one two
echo "ok - bitmaps of a directory are guarded"

# What is made is for its owner only; what is replaced keeps its mode.
umask 022
run 0 backup --to secret/ one
mode 700 secret
for file in secret/*; do
    mode 600 "$file"
done
run 0 restore secret --to restored
mode 700 restored
mode 600 restored/one.raw
chmod 640 restored/one.raw
run 0 restore secret --to restored --force
mode 640 restored/one.raw
echo "ok - modes"

# Nothing in a directory of somebody else's makes a run hang.
cp -a secret hostile
rm hostile/one.full.raw
mkfifo hostile/one.full.raw
run 3 verify hostile
says "no regular file"
run 1 restore hostile --to nothing
rm hostile/manifest.json
mkfifo hostile/manifest.json
run 3 verify hostile
run 1 points hostile
run 1 backup --to hostile one
echo "ok - FIFOs are refused"

# Readers and backups keep each other out; readers do not.
exec 9<secret
flock -x 9
run 1 verify secret
says "a backup into it is running"
run 1 restore secret --to restored --force
run 0 points secret
flock -u 9
flock -s 9
run 0 verify secret
run 1 backup --to secret one
says "in use by another run"
exec 9<&-
echo "ok - locks"

# A name that may not last is a failure, and said to be that one.
export FAIL_SYNC=restored
LD_PRELOAD=$killat run 4 restore secret --to restored --force
says "'restored/one.raw' is restored and in place, but its name may not outlast a power cut"
FAIL_SYNC=.
LD_PRELOAD=$killat run 4 restore secret --to fresh
says "in place, but 'fresh' itself may not outlast"
cmp fresh/one.raw one.img || fail "what was put in place is wrong"
LD_PRELOAD=$killat run 1 backup --to newer one
says "cannot sync the directory of 'newer'"
unset FAIL_SYNC
echo "ok - syncs that fail"

# Waiting for a job that stands ends, and says what the job needs.
truncate -s 16M held.img
run 0 qmp blockdev-add "{\"driver\": \"file\", \"node-name\": \"held\", \"filename\": \"$dir/held.img\"}"
run 0 qmp blockdev-backup '{"job-id": "held", "device": "one", "target": "held", "sync": "full",
    "auto-finalize": false, "auto-dismiss": false}'
run 4 job wait held
says "'held' is pending"
says "job-finalize"
run 0 qmp job-finalize '{"id": "held"}'
run 0 job wait held
run 0 qmp job-dismiss '{"id": "held"}'
run 0 qmp blockdev-del '{"node-name": "held"}'
echo "ok - waiting for a job that stands"

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
