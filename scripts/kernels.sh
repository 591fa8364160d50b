#!/bin/bash
# Shows which of Debian's kernels the monitor takes: a Markdown table of the newest of each series and flavour.
#
#   kernels.sh [--static] [--only PATTERN]   loads each, without KVM and without root
#   kernels.sh --boot [--only PATTERN]       also boots each to the demo service on a test host, records that, and replays
#                                            it on another: as root, some minutes for each kernel
#
# PATTERN is a shell pattern of releases, such as '7.*' or '*cloud*'. Packages are fetched with apt, apart from this
# machine's packages and sources, and kept in ${VMFT_CACHE:-$HOME/.cache/vmft}.
#
# Status 0: all that were tried are taken (and replay equal); 1: some are not; 2: wrong usage; 3: Debian cannot be reached.
set -euo pipefail
shopt -s inherit_errexit

root=$(cd "$(dirname "$0")/.." && pwd)
build=$root/guest-images/build.sh
boot=
only='*'

usage() { sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2; }
while [ $# -gt 0 ]; do
    case $1 in
        --static) boot=; shift ;;
        --boot) boot=yes; shift ;;
        --only) [ $# -gt 1 ] || usage; only=$2; shift 2 ;;
        *) usage ;;
    esac
done
[ -z "$boot" ] || [ "$(id -u)" = 0 ] || { echo "kernels.sh: --boot needs root: it boots test hosts" >&2; exit 1; }

(cd "$root" && cargo build -q --release -p vmft --bin vmft) >&2
vmft=${CARGO_TARGET_DIR:-$root/target}/x86_64-unknown-linux-gnu/release/vmft

# check PACKAGE VERSION: "loads, packed with P | REWRITTEN | warned of", or why not.
check() {
    local file report
    # The lists may name what the archive no longer has.
    file=$("$build" kernel "$1" "$2") || { echo "not tried: it cannot be fetched | - | -"; return; }
    if report=$("$vmft" check-kernel "$file" 2>&1); then
        awk -F ': ' '$1 == "packing" { packing = $2 } $1 == "rewritten" { rewritten = $2 }
            $1 == "warning" { warned = warned (warned ? ", " : "") ($2 ~ /^ext4/ ? "ext4" : $2) }
            END { print "yes (" packing ") | " rewritten " | " (warned ? warned : "-") }' <<<"$report"
    else
        echo "no: $(tail -n 1 <<<"$report" | sed 's/^vmft: //') | - | -"
    fi
}

# boot_and_replay PACKAGE VERSION: whether its recording replays equal.
boot_and_replay() {
    local guest said
    guest=$("$build" guest "$1" "$2") || { echo "not tried: its modules are in no suite any more"; return; }
    said=$(cd "$root" && VMFT_KERNELS=$guest cargo test -q -p vmft-tests --test e2e -- --nocapture kernels:: 2>&1) || true
    case $said in
        *"$guest: replays equal"*) sed -n 's/.*replay equal: \([0-9]* [a-z]*\).*/yes, \1/p' <<<"$said" | head -n 1 ;;
        *"$guest: FAILED: "*) sed -n "s,^$guest: FAILED: ,no: ,p" <<<"$said" | head -n 1 ;;
        *) echo "not tried: $(grep '^SKIPPED\|^error' <<<"$said" | head -n 1)" ;;
    esac
}

list=$("$build" kernels)
echo "| Release | Flavour | Version | Suite | Loads (packing) | RDTSCs rewritten | Warned of |${boot:+ Replays equal |}"
echo "| --- | --- | --- | --- | --- | --- | --- |${boot:+ --- |}"
tried=0 refused=0
while read -r _ flavour version package suite; do
    release=${package#linux-image-}
    # shellcheck disable=SC2254 # it is a pattern
    case $release in $only) ;; *) continue ;; esac
    result=$(check "$package" "$version")
    replays=
    [ -z "$boot" ] || [[ $result != yes* ]] || replays=$(boot_and_replay "$package" "$version" </dev/null)
    [[ $result == "not tried"* ]] || tried=$((tried + 1))
    [[ $result != no:* && $replays != no:* ]] || refused=$((refused + 1))
    echo "| $release | $flavour | $version | $suite | $result |${boot:+ $replays |}"
done <<<"$list"
echo "kernels.sh: $tried kernels, $refused of them refused or failed" >&2
[ "$tried" != 0 ] && [ "$refused" = 0 ]
