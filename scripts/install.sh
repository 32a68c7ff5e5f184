#!/bin/bash
# Install for this machine: commands, man pages, shell completion, the systemd unit.
#
#   scripts/install.sh [PREFIX]      default: /usr/local
#
# The Python part is a virtual environment of its own, PREFIX/lib/erofs-ondemand, because Debian and others let pip
# install nothing beside their own packages. A second run updates it. To undo: scripts/install.sh --remove [PREFIX].
set -euo pipefail
cd "$(dirname "$0")/.."

remove=
[ "${1:-}" = --remove ] && remove=yes && shift
prefix=${1:-/usr/local}
tree=$prefix/lib/erofs-ondemand
unit=$prefix/lib/systemd/system/erofs-loader.service
commands="erofs-builder erofs-loader"

log() { echo "install: $*" >&2; }

if [ -n "$remove" ]; then
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
header=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"] + "/Python.h")')
if ! command -v "${CC:-gcc}" >/dev/null || [ ! -e "$header" ] || ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    log "the extensions are compiled here: apt-get install --no-install-recommends gcc libc6-dev python3-dev python3-venv"
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
log "$prefix/bin/erofs-loader, and its unit: systemctl daemon-reload; systemctl enable --now erofs-loader"
