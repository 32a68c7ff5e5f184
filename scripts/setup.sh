#!/bin/bash
# Prepare a checkout: Debian packages, the virtual environment .venv with the project in it, erofs-utils 1.9.
#
#   scripts/setup.sh [--no-oracles]
#
# Package sources, proxies and indexes are the machine's own. Without root or apt-get it names what to install.
# A second run finds everything in place and takes about a second.
set -euo pipefail
cd "$(dirname "$0")/.."

log() { echo "setup: $*" >&2; }

wanted_packages() { sed -e 's/#.*//' scripts/packages.txt | xargs -n1; }

missing_packages() {
    local package
    for package in $(wanted_packages); do
        # nginx comes in flavours; any of them serves.
        [ "$package" = nginx-light ] && command -v nginx >/dev/null && continue
        # A Python of one's own brings headers and venv along.
        case $package in
            python3 | python3-dev | python3-venv) python_is_complete && continue ;;
        esac
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || echo "$package"
    done
}

python_is_complete() {
    "${PYTHON:-python3}" - 2>/dev/null <<'EOF'
import ensurepip, os, sys, sysconfig, venv
sys.exit(sys.version_info < (3, 11) or not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))
EOF
}

install_packages() {
    local missing
    missing=$(missing_packages | xargs)
    [ -z "$missing" ] && return 0
    if ! command -v apt-get >/dev/null; then
        log "this is no Debian; install what these Debian packages hold: $missing"
        exit 1
    fi
    if [ "$(id -u)" != 0 ]; then
        log "packages are missing; install them with: sudo apt-get install --no-install-recommends $missing"
        exit 1
    fi
    log "installing $missing"
    export DEBIAN_FRONTEND=noninteractive
    local quiet
    quiet=$(mktemp)
    for command in "update" "install -y --no-install-recommends $missing"; do
        # shellcheck disable=SC2086 # words on purpose
        if ! apt-get -q -o Dpkg::Use-Pty=0 $command >"$quiet" 2>&1 </dev/null; then
            cat "$quiet" >&2
            [ "$command" = update ] && continue # one broken third-party source need not matter
            log "apt-get $command failed"
            exit 1
        fi
    done
    rm -f "$quiet"
}

make_venv() {
    local stamp=.venv/.setup-stamp
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
    # Sources of the extensions too: an editable install compiles them in place.
    local state
    state=$(find . -path ./.venv -prune -o \( -name '_*_build.py' -o -path '*/csrc/*.[ch]' \) -print | sort |
        xargs cat pyproject.toml setup.py | sha256sum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$state" ] || ! .venv/bin/python -c 'import erofs_builder._hot' 2>/dev/null; then
        log "installing the project into .venv"
        .venv/bin/python -m pip install -q -e '.[dev]' </dev/null >&2
        echo "$state" >"$stamp"
    fi
}

install_packages
make_venv
if [ "${1:-}" != --no-oracles ]; then
    sh scripts/build-erofs-utils.sh >/dev/null </dev/null
fi
