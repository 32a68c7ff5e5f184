#!/bin/bash
# Build the programs that the benches compare with, from package sources, into the cache. About 12 minutes, once.
#
#   scripts/build-peers.sh [DEST]     DEST: ${XDG_CACHE_HOME:-$HOME/.cache}/erofs-ondemand/peers
#
# Needs cargo. A bench whose peer is missing says so in its row.
set -euo pipefail

dest=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/erofs-ondemand/peers}
version=2.2.0

if ! command -v cargo >/dev/null; then
    echo "build-peers: no cargo here; install a Rust toolchain" >&2
    exit 1
fi
if [ ! -x "$dest/nydus-$version/bin/nydusd" ]; then
    nice -n 10 cargo install nydus-rs --version "$version" --locked --root "$dest/nydus-$version"
fi
echo "$dest/nydus-$version/bin"
"$(dirname "$0")/build-erofs-utils.sh" --oci "$dest"
