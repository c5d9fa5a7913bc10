#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Makes the static library that others link: one object, in which only what MAP exports is global, so
# that no name inside can meet one of theirs. Usage: static.sh ARCHIVE MAP OUT
set -eu
archive=$1 map=$2 out=$3
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
sed -n 's/^ *\(tide_[a-z_*]*\);$/\1/p' "$map" >"$dir/names"
ld -r --whole-archive "$archive" -o "$dir/all.o"
objcopy --wildcard --keep-global-symbols="$dir/names" "$dir/all.o" "$dir/tidemark.o"
rm -f "$out"
ar rcs "$out" "$dir/tidemark.o"
