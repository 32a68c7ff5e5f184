#!/bin/sh
# Build erofs-utils 1.9 or later from Debian's source package and print the directory of its programs.
#
#   build-erofs-utils.sh [--oci] [DEST]     DEST: ${XDG_CACHE_HOME:-$HOME/.cache}/erofs-ondemand
#
# With --oci, mount.erofs mounts from registries too (fanotify): what benches compare with.
# Debian 12 ships 1.5, which knows neither zstd nor fragments, so the oracles of the test suite need a newer one.
# apt runs with lists and configuration of its own: the system's sources stay as they are. A second run prints at once.
set -eu

oci=
if [ "${1:-}" = --oci ]; then
    oci="--enable-oci --enable-fanotify"
    shift
fi
suite=${EROFS_UTILS_SUITE:-forky}
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
dest=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/erofs-ondemand}
needed="autoconf automake dpkg-dev gcc libfuse3-dev liblz4-dev liblzma-dev libtool libzstd-dev make pkg-config uuid-dev zlib1g-dev"
[ -z "$oci" ] || needed="$needed libcurl4-openssl-dev libjson-c-dev libssl-dev"

log() { echo "build-erofs-utils: $*" >&2; }

finished() {
    for bin in "$dest"/erofs-utils-*/bin; do
        if [ -x "$bin/fsck.erofs" ] && [ -x "$bin/mkfs.erofs" ]; then
            echo "$bin"
            return 0
        fi
    done
    return 1
}

check_packages() {
    missing=""
    for package in $needed; do
        status=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
        [ "$status" = installed ] || missing="$missing $package"
    done
    [ -z "$missing" ] && return 0
    log "missing packages; install them with: apt-get install -y$missing"
    exit 1
}

private_apt() {
    # A mirror may be a snapshot: how fresh its list is does not matter for one source package.
    apt-get -q -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts=- \
        -o Acquire::Check-Valid-Until=false \
        -o Dir::State::lists="$work/lists" -o Dir::Cache="$work/cache" -o APT::Sandbox::User=root "$@" >&2
}

finished && exit 0
check_packages
mkdir -p "$dest"
exec 9>"$dest/.lock"
flock 9
finished && exit 0

work=$(mktemp -d "$dest/build.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
echo "deb-src [signed-by=$keyring] $mirror $suite main" >"$work/sources.list"
log "fetching the source package from $mirror $suite"
private_apt update
(cd "$work" && private_apt source erofs-utils)
source=$(find "$work" -maxdepth 1 -type d -name 'erofs-utils-*' | head -n 1)
version=$(basename "$source")
prefix=$dest/$version
log "building $version"
(
    cd "$source"
    [ -x configure ] || ./autogen.sh
    ./configure --prefix="$work/prefix" --bindir="$work/prefix/bin" --disable-shared --enable-fuse --enable-lz4 \
        --enable-lzma --with-libzstd --with-zlib --without-libdeflate --without-selinux $oci
    make -j2
    make install
) >"$work/log" 2>&1 || {
    tail -n 40 "$work/log" >&2
    exit 1
}
rm -rf "$prefix"
mv "$work/prefix" "$prefix"
finished
