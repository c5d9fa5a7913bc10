# SPDX-License-Identifier: Apache-2.0
# What ./run and ./check share: installing what is missing, and building. Sourced with $root set.

packages_build='gcc libc6-dev meson ninja-build pkg-config python3 libjansson-dev libxxhash-dev
  nettle-dev liburing-dev'
packages_run='e2fsprogs qemu-utils python3-libnbd libnbd-bin'
packages_check='libcmocka-dev libseccomp-dev clang libclang-rt-14-dev clang-format clang-tidy
  gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user qemu-system-common nbdkit fio scdoc
  python3-pytest python3-hypothesis strace procps jq fuse3 nbd-client qemu-system-x86
  linux-image-cloud-amd64 busybox-static syslinux syslinux-common mtools spin'

die() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }

# need PACKAGE... : installs those that are missing, after saying so.
need() {
  missing=''
  for p in "$@"; do
    case $(dpkg-query -W -f '${Status}' "$p" 2>/dev/null) in
      'install ok installed') ;;
      *) missing="$missing $p" ;;
    esac
  done
  [ -z "$missing" ] && return 0
  [ "$(id -u)" = 0 ] || die "these Debian packages are missing and only root can install them:$missing"
  printf 'installing:%s\n' "$missing"
  export DEBIAN_FRONTEND=noninteractive
  log=$(mktemp)
  # shellcheck disable=SC2086
  if ! { apt-get -q -o DPkg::Lock::Timeout=300 update &&
         apt-get -q -y -o DPkg::Lock::Timeout=300 install --no-install-recommends $missing; } \
       >"$log" 2>&1; then
    tail -20 "$log" >&2
    rm -f "$log"
    die "could not install:$missing"
  fi
  rm -f "$log"
}

# build DIR [MESON OPTION]... : configures once, builds, links the programs to DIR/bin.
build() {
  dir=$1
  shift
  log=$dir.log
  if [ ! -f "$dir/build.ninja" ]; then
    # Debian's python3, also where another one comes first on PATH.
    PATH="/usr/bin:/bin:$PATH" meson setup "$dir" "$root" "$@" >"$log" 2>&1 || { cat "$log" >&2; die "cannot configure $dir"; }
  fi
  ninja -C "$dir" >"$log" 2>&1 || { grep -vE '^\[[0-9]+/' "$log" | tail -60 >&2; die "cannot build $dir"; }
  rm -f "$log"
  mkdir -p "$dir/bin"
  for program in tidemarkd/tidemarkd cli/tidemark bench/nbdload; do
    ln -sfn "../$program" "$dir/bin/${program##*/}"
  done
}
