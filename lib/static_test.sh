#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Does the static library have the names of the shared one, and no other? Usage: ARCHIVE SHARED
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
nm -g --defined-only "$1" | awk 'NF == 3 { print $3 }' | sort >"$dir/static"
nm -D --defined-only "$2" | awk '$2 != "A" { sub(/@.*/, "", $3); print $3 }' | sort >"$dir/shared"
grep -q tide_conn_open "$dir/static"
diff "$dir/static" "$dir/shared"
