#!/bin/bash
# Install for this machine: commands, man pages, shell completion, the systemd unit.
#
#   scripts/install.sh [PREFIX]      default: /usr/local
#
# The Python part is a virtual environment of its own, PREFIX/lib/erofs-ondemand, because Debian and others let pip
# install nothing beside their own packages. A second run updates it. To undo: scripts/install.sh --remove [PREFIX], once
# the unit is stopped.
set -euo pipefail
cd "$(dirname "$0")/.."

remove=
[ "${1:-}" = --remove ] && remove=yes && shift
prefix=${1:-/usr/local}
prefix=${prefix%/}
tree=$prefix/lib/erofs-ondemand
unit=$prefix/lib/systemd/system/erofs-loader.service
commands="erofs-builder erofs-loader"

log() { echo "install: $*" >&2; }

can_write() {
    local place=$prefix
    while [ -n "$place" ] && [ ! -e "$place" ]; do place=${place%/*}; done
    [ -d "${place:-/}" ] && [ -w "${place:-/}" ]
}

python_is_complete() {
    "$python" - 2>/dev/null <<'EOF'
import ensurepip, os, sys, sysconfig, venv
sys.exit(sys.version_info < (3, 11) or not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))
EOF
}

compiler_is_complete() {
    echo '#include <zstd.h>' | "${CC:-gcc}" -E - >/dev/null 2>&1
}

# Another prefix's unit may go on.
unit_runs() {
    case $(systemctl is-active erofs-loader 2>/dev/null) in
        active | activating | reloading | deactivating) ;;
        *) return 1 ;;
    esac
    systemctl show --property ExecStart erofs-loader | grep -qF "path=$prefix/bin/erofs-loader "
}

if ! can_write; then
    log "nothing can be written in $prefix: run it as root, or choose another PREFIX"
    exit 1
fi

if [ -n "$remove" ]; then
    if unit_runs; then
        log "the daemon runs from $prefix; stop it first: systemctl disable --now erofs-loader"
        exit 1
    fi
    for command in $commands; do
        rm -f "$prefix/bin/$command" "$prefix/share/man/man1/$command.1" \
            "$prefix/share/bash-completion/completions/$command" \
            "$prefix/share/zsh/site-functions/_$command" \
            "$prefix/share/fish/vendor_completions.d/$command.fish"
    done
    rm -f "$prefix/share/man/man5/erofs-loader.toml.5" "$unit" "$prefix/lib/tmpfiles.d/erofs-loader.conf"
    rm -rf "$tree"
    exit 0
fi

python=${PYTHON:-python3}
if ! command -v "$python" >/dev/null || ! compiler_is_complete || ! python_is_complete; then
    log "this takes Python 3.11 or later with its headers, and a compiler with those of libzstd, as the extensions are"
    log "compiled here:"
    log "apt-get install --no-install-recommends gcc libc6-dev libzstd-dev python3 python3-dev python3-venv"
    exit 1
fi

"$python" -m venv "$tree"
"$tree/bin/pip" install -q --upgrade . </dev/null >&2
install -d "$prefix/bin" "$prefix/share/bash-completion/completions" "$prefix/share/zsh/site-functions" \
    "$prefix/share/fish/vendor_completions.d"
for command in $commands; do
    ln -sfn "$tree/bin/$command" "$prefix/bin/$command"
    variable=_$(echo "$command" | tr a-z- A-Z_)_COMPLETE
    env "$variable=bash_source" "$prefix/bin/$command" >"$prefix/share/bash-completion/completions/$command"
    env "$variable=zsh_source" "$prefix/bin/$command" >"$prefix/share/zsh/site-functions/_$command"
    env "$variable=fish_source" "$prefix/bin/$command" >"$prefix/share/fish/vendor_completions.d/$command.fish"
done
install -D -m 644 -t "$prefix/share/man/man1" docs/man/*.1
install -D -m 644 -t "$prefix/share/man/man5" docs/man/*.5
install -D -m 644 -t "$prefix/lib/tmpfiles.d" systemd/erofs-loader.conf
install -d "$(dirname "$unit")"
sed "s,/usr/bin/,$prefix/bin/," systemd/erofs-loader.service >"$unit"
chmod 644 "$unit"
if systemd-analyze unit-paths 2>/dev/null | grep -qxF "$(dirname "$unit")"; then
    log "$prefix/bin/erofs-loader, and its unit: systemctl daemon-reload; systemctl enable --now erofs-loader"
else
    log "$prefix/bin/erofs-loader, and its unit: systemctl enable --now $unit"
    log "completion is found only below /usr/local and /usr (docs/completion.md), man pages also where PATH has $prefix/bin"
fi
