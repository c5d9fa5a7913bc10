#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Builds the libFuzzer harnesses of tests/fuzz/ and runs each for SECONDS (default 10) on its corpus.
set -eu
cd "$(dirname "$0")/.."
command -v clang >/dev/null || { echo 'clang is missing'; exit 77; }
out=build/fuzz
mkdir -p "$out"
for f in tests/fuzz/fuzz_*.c; do
  name=$(basename "$f" .c)
  # The head of each harness says what it is built with: "sources: a.c b.c" and "libs: -lx".
  sources=$(sed -n 's/^.*sources: //p' "$f")
  libs=$(sed -n 's/^.*libs: //p' "$f")
  # shellcheck disable=SC2086
  clang -std=gnu17 -D_GNU_SOURCE -g -O1 -fsanitize=fuzzer,address,undefined -I. -Ibuild "$f" $sources $libs -o "$out/$name"
  mkdir -p "$out/$name.corpus"
  corpus="tests/fuzz/corpus/$name"
  [ -d "$corpus" ] || corpus=''
  # shellcheck disable=SC2086
  "$out/$name" -max_total_time="${1:-10}" -artifact_prefix="$out/$name-" "$out/$name.corpus" $corpus 2>&1 | tail -5
done
