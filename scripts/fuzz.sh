#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Builds the libFuzzer harnesses of tests/fuzz/ and runs each for SECONDS (default 10), beginning with
# its corpus in tests/fuzz/corpus/ where there is one, and with the words of tests/fuzz/NAME.dict. Needs
# build/ (./run --build-only).
set -eu
cd "$(dirname "$0")/.."
command -v clang >/dev/null || { echo 'clang is missing'; exit 77; }
seconds=${1:-10}
out=build/fuzz
mkdir -p "$out"

io="$(ls io/real*.c) io/loop.c io/io.c io/event.c io/buf.c io/pool.c io/engine_portable.c"
co='co/co.c co/sync.c co/switch_x86_64.S'
[ "$(uname -m)" = x86_64 ] || co='co/co.c co/sync.c co/switch_ucontext.c'
base='base/error.c base/log.c base/mem.c'
below=$(ls block/*.c drivers/*.c | grep -v '_test\.c$')
bits=$(ls bitmap/*.c | grep -vE '_(test|bench|stress)\.c$')
core="$base $co $io $bits $below
  schema/parse.c schema/keyval.c build/schema/tables.c build/schema/introspect.c event/event.c"

# fuzz NAME SOURCE...
fuzz() {
  name=$1
  shift
  # shellcheck disable=SC2086,SC2068
  clang -std=gnu17 -D_GNU_SOURCE -g -O1 -fsanitize=fuzzer,address,undefined -I. -Ibuild \
    "tests/fuzz/$name.c" $@ -ljansson -lpthread -o "$out/$name"
  mkdir -p "$out/$name.corpus"
  corpus="tests/fuzz/corpus/$name"
  [ -d "$corpus" ] || corpus=''
  dict="tests/fuzz/$name.dict"
  if [ -f "$dict" ]; then dict="-dict=$dict"; else dict=''; fi
  echo "$name:"
  # shellcheck disable=SC2086
  "$out/$name" -max_total_time="$seconds" -artifact_prefix="$out/$name-" $dict "$out/$name.corpus" $corpus \
    >"$out/$name.log" 2>&1 || { tail -60 "$out/$name.log"; exit 1; }
  tail -2 "$out/$name.log"
}

fuzz fuzz_scan $base qmp/scan.c
fuzz fuzz_nbd "$core" 'export/export.c' 'export/nbd/*.c'
