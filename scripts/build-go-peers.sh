#!/bin/bash
# Build containerd 2 and the snapshotters of stargz and SOCI, which the benches compare with, into the cache. About 10
# minutes, once.
#
#   scripts/build-go-peers.sh [DEST]     DEST: ${XDG_CACHE_HOME:-$HOME/.cache}/erofs-ondemand/peers
#
# Needs go and git. The snapshotters' commands are in no module: they are built from their repositories, or from the
# checkouts that STARGZ_SOURCE and SOCI_SOURCE name. A bench whose peer is missing says so in its row.
set -euo pipefail

dest=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/erofs-ondemand/peers}
containerd=2.2.3
stargz=7cf47cba499264f61bc4adac00e05edd599ca48f
soci=77fb4266a671d3905ca95fbcaac5a556853b7733

for program in go git; do
    if ! command -v "$program" >/dev/null; then
        echo "build-go-peers: no $program here; install it" >&2
        exit 1
    fi
done

# checkout REPOSITORY COMMIT DIR: a checkout of one commit
checkout() {
    git init -q "$3"
    git -C "$3" fetch -q --depth 1 "$1" "$2"
    git -C "$3" checkout -q FETCH_HEAD
}

# build DIR OUT PACKAGE...: commands of the module in DIR, all of them or none
build() {
    local directory=$1 out=$2
    shift 2
    (cd "$directory" && nice -n 10 go build -o "$work/bin/" "$@")
    mkdir "$(dirname "$out")"
    mv "$work/bin" "$out"
}

mkdir -p "$dest"
work=$(mktemp -d "$dest/build.XXXXXX") # on the same file system: a move is at once
trap 'rm -rf "$work"' EXIT
if [ ! -d "$dest/containerd-$containerd/bin" ]; then
    mkdir -p "$work/containerd"
    (cd "$work/containerd" && go mod init peers && go get "github.com/containerd/containerd/v2@v$containerd")
    GOFLAGS=-mod=mod build "$work/containerd" "$dest/containerd-$containerd/bin" github.com/containerd/containerd/v2/cmd/{containerd,ctr}
fi
if [ ! -d "$dest/stargz-${stargz:0:8}/bin" ]; then
    [ -n "${STARGZ_SOURCE:-}" ] || checkout https://github.com/containerd/stargz-snapshotter "$stargz" "$work/stargz"
    build "${STARGZ_SOURCE:-$work/stargz}/cmd" "$dest/stargz-${stargz:0:8}/bin" ./containerd-stargz-grpc ./ctr-remote
fi
if [ ! -d "$dest/soci-${soci:0:8}/bin" ]; then
    [ -n "${SOCI_SOURCE:-}" ] || checkout https://github.com/awslabs/soci-snapshotter "$soci" "$work/soci"
    build "${SOCI_SOURCE:-$work/soci}/cmd" "$dest/soci-${soci:0:8}/bin" ./soci ./soci-snapshotter-grpc
fi
echo "$dest"
