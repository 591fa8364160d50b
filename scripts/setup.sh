#!/bin/bash
# Installs what is missing to build vmft and run it on test hosts, on Debian 12. Installs nothing if nothing is missing.
#
#   setup.sh run    to build and run
#   setup.sh test   to run `make test` too: formatter and linter, an etcd, and what makes guests of other Debian kernels and disks
#
# Packages are installed as root only; else it says what is missing. A Rust that is there but too old is left alone.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
export PATH=$PATH:/usr/sbin:/sbin

die() { echo "setup.sh: $*" >&2; exit 1; }

# FILE or PROGRAM, and the package that has it.
run_needs="
gcc                                     gcc
/usr/lib/x86_64-linux-gnu/libc.a        libc6-dev
make                                    make
strip                                   binutils
qemu-system-x86_64                      qemu-system-x86
/usr/lib/qemu/virtiofsd                 qemu-system-common
busybox                                 busybox-static
cpio                                    cpio
modprobe                                kmod
mke2fs                                  e2fsprogs
ip                                      iproute2
/etc/ssl/certs/ca-certificates.crt      ca-certificates
cargo                                   cargo-web
rustc                                   rustc-web
"
test_needs="
etcd                                    etcd-server
etcdctl                                 etcd-client
debootstrap                             debootstrap
/usr/share/keyrings/debian-archive-keyring.gpg  debian-archive-keyring
xz                                      xz-utils
zstd                                    zstd
xxd                                     xxd
rustfmt                                 rustfmt-web
clippy-driver                           rust-web-clippy
"

# The packages of what is not there.
missing() {
    local thing package
    while read -r thing package; do
        case $thing in
            "") ;;
            /*) [ -e "$thing" ] || echo "$package" ;;
            *) command -v "$thing" >/dev/null || echo "$package" ;;
        esac
    done <<<"$1" | sort -u
}

install() {
    local packages=$1
    [ "$(id -u)" = 0 ] || die "these Debian packages are missing, and only root can install them: ${packages//$'\n'/ }"
    command -v apt-get >/dev/null || die "this is not Debian; install what these Debian packages have: ${packages//$'\n'/ }"
    echo "setup.sh: installing ${packages//$'\n'/ }" >&2
    # shellcheck disable=SC2086 # packages are words
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $packages </dev/null >&2 ||
        die "apt-get cannot install them"
}

check_rust() {
    local needed found
    needed=$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' "$root/Cargo.toml")
    found=$(rustc --version | cut -d' ' -f2)
    [ "$(printf '%s\n' "$needed" "$found" | sort -V | head -n 1)" = "$needed" ] ||
        die "rustc $found is older than $needed: update it ('rustup update'), or remove it and start again (Debian 12's security archive has a new one in rustc-web)"
}

main() {
    local needs packages
    case "${1:-}" in
        run) needs=$run_needs ;;
        test) needs=$run_needs$test_needs ;;
        *) die "usage: setup.sh run|test" ;;
    esac
    packages=$(missing "$needs")
    # The images are made of packages, which apt must know even if nothing is to be installed.
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null &&
        { [ -n "$packages" ] || [ -z "$(apt-cache show linux-image-cloud-amd64 2>/dev/null)" ]; }; then
        apt-get update -q </dev/null >&2 || die "'apt-get update' failed"
    fi
    [ -z "$packages" ] || install "$packages"
    check_rust
}

main "$@"
