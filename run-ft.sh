#!/bin/bash
# Shows a takeover: `./run-ft.sh --help` says how. Installs and builds what is missing; the rest is tests/src/demo.
set -euo pipefail

root=$(cd "$(dirname "$0")" && pwd)
usage=$root/tests/src/demo/usage.txt
arguments=("$@")

refuse() { echo "run-ft.sh: $*" >&2; exit 2; }

# Mistakes are told before anything is installed or built. The options are those of the usage text.
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) cat "$usage"; exit 0 ;;
        -*)
            grep -q -- "^  $1 " "$usage" || refuse "There is no option $1; --help lists them."
            [ $# -gt 1 ] || refuse "$1 needs a value."
            shift 2 ;;
        *)
            [ -f "$1" ] || refuse "There is no file '$1'."
            shift ;;
    esac
done
if [ "$(id -u)" != 0 ] && [[ " ${arguments[*]-} " != *" --hosts "* ]]; then
    echo "run-ft.sh: The demo needs root (it makes network namespaces, bridges and taps); --help tells more." >&2
    exit 1
fi

export PATH=$PATH:/usr/sbin:/sbin
"$root/scripts/setup.sh" run
(
    cd "$root"
    cargo build --release -p vmft --bin vmft
    cargo build --release -p vmft-tests --bin ft-demo
    guest-images/build.sh images >/dev/null
) >&2
exec "${CARGO_TARGET_DIR:-$root/target}/x86_64-unknown-linux-gnu/release/ft-demo" "${arguments[@]}"
