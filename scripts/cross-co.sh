#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Build the coroutine test for AArch64 and run it under an emulator; natively with the ucontext
# backend too, which no common machine uses otherwise. Exit 77 and the name of the tool if one is
# missing. Usage: scripts/cross-co.sh [optimisation flags]
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
opt=${*:--O2}
cross=${CROSS_CC:-aarch64-linux-gnu-gcc}
emulator=${EMULATOR:-qemu-aarch64}
native=${CC:-cc}

for tool in "$native" "$cross" "$emulator"; do
    if ! command -v "$tool" >/dev/null 2>&1; then
        echo "skipped: $tool is not installed"
        exit 77
    fi
done

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$root"
# build COMPILER BACKEND NAME: words in $opt are separate flags
build() {
    # shellcheck disable=SC2086
    "$1" -std=gnu17 -D_GNU_SOURCE -fno-strict-aliasing -Wall -Wextra -Wno-unused-parameter $opt -static -I. \
        base/log.c base/mem.c co/co.c co/sync.c "co/$2" co/co_cross_test.c -o "$dir/$3"
}
build "$cross" switch_aarch64.S aarch64
"$emulator" "$dir/aarch64"
build "$cross" switch_ucontext.c aarch64-ucontext
"$emulator" "$dir/aarch64-ucontext"
build "$native" switch_ucontext.c ucontext
"$dir/ucontext"
