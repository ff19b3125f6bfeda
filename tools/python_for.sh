#!/usr/bin/env bash
# usage: tools/python_for.sh MODULE[==] ...
#
# Prints the Python to run a make target with: $PYTHON where that is set, else python3 as it is
# where it has every MODULE (with a trailing ==, in the version of requirements-dev.txt), else
# .venv/bin/python, made here if need be. What it does goes to stderr.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
pins=requirements-dev.txt

# has PYTHON MODULE[==] ...: whether that Python has them all; prints what it lacks.
has() {
    "$1" - "$pins" "${@:2}" <<'EOF'
import importlib.metadata, importlib.util, re, sys

pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", open(sys.argv[1]).read(), re.M))
lacking = []
for need in sys.argv[2:]:
    name = need.rstrip("=")
    if need != name:
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = None
        if found != pins[name]:
            lacking.append(f"{name}=={pins[name]}")
    elif importlib.util.find_spec(name) is None:
        lacking.append(name)
print(*lacking)
sys.exit(bool(lacking))
EOF
}

if [[ -n ${PYTHON:-} ]]; then
    if ! lacking=$(has "$PYTHON" "$@"); then
        echo "PYTHON=$PYTHON lacks: $lacking" >&2
        exit 1
    fi
    command -v "$PYTHON"
    exit
fi

if has python3 "$@" >/dev/null 2>&1; then
    command -v python3
    exit
fi

venv=.venv/bin/python
if ! cmp -s "$pins" .venv/installed.txt; then
    if [[ ! -x $venv ]]; then
        for base in python3 python3.13 python3.12 python3.11 none; do
            if "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
                break
            fi
        done
        if [[ $base == none ]]; then
            echo "the versions in $pins need Python 3.11 or newer; found no such python3" >&2
            exit 1
        fi
        # A torch that is installed already suits the device: keep it in sight.
        sight=()
        if has "$base" torch >/dev/null; then
            sight=(--system-site-packages)
        fi
        echo "making .venv with $("$base" --version)" >&2
        "$base" -m venv "${sight[@]}" .venv
    fi
    pip=("$venv" -m pip install --quiet --disable-pip-version-check)
    for name in torch triton; do
        if ! has "$venv" "$name" >/dev/null; then
            pin=$(grep "^$name==" "$pins")
            echo "installing $pin into .venv (large: this takes a while)" >&2
            "${pip[@]}" "$pin" >&2
        fi
    done
    echo "installing the rest of $pins into .venv" >&2
    "${pip[@]}" -r <(grep -v -E '^(torch|triton)==' "$pins") >&2
    cp "$pins" .venv/installed.txt
fi
echo "$PWD/$venv"
