#!/bin/bash
# Builds the images that test hosts and guests boot, from Debian's packages, unpatched.
#
#   build.sh images        kernel, initramfs of hosts and guests, and their programs; prints the directory
#   build.sh small-kernel  vmlinux of a small kernel with built-in drivers (minutes); prints its path
#   build.sh disk FILE MIB a raw disk with a fresh ext4 file system
#   build.sh debian SUITE DISK
#                          DISK becomes a root disk with Debian's SUITE (bookworm, trixie, ...), as root; prints the
#                          paths of its kernel, its initramfs and DISK, each on a line
#   build.sh kernels       lists Debian's kernels, the newest of each series: SERIES FLAVOUR VERSION PACKAGE SUITE
#   build.sh kernel PACKAGE VERSION
#                          one of these; prints the path of its vmlinuz
#   build.sh guest WHICH FLAVOUR
#                          a kernel and an initramfs for it: `newest`, or the newest of a suite (trixie-backports,
#                          sid, ...) or of a series (6.18, ...), of the flavour cloud, default or rt; or a PACKAGE
#                          and its VERSION; prints the directory: vmlinuz, guest.cpio.gz
#
# Their programs are built in release mode, or with VMFT_PROFILE=dev in the development profile, as tests want them.
#
# Everything goes to ${VMFT_CACHE:-$HOME/.cache/vmft}: each output is made in a temporary directory and then
# renamed to a name that contains a digest of its inputs, so an output is complete and never out of date. Only a Debian
# disk may be: it has the packages of the day on which it was first made.
set -euo pipefail
shopt -s inherit_errexit

here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
cache=${VMFT_CACHE:-$HOME/.cache/vmft}
work=
# What apt is told: nothing, or to use other lists than this machine's (kernels.sh).
apt_options=()

# Status 3: something could not be fetched.
out_of_reach() { echo "build.sh: $*" >&2; exit 3; }
die() { echo "build.sh: $*" >&2; exit 1; }
say() { echo "build.sh: $*" >&2; }
cleanup() { [ -z "$work" ] || rm -rf "$work"; }
trap cleanup EXIT

# setting KEY: the value of KEY in the manifest.
setting() { sed -n "s/^$1 = \"\(.*\)\"\$/\1/p" "$here/manifest.toml"; }

need() {
    for tool in "$@"; do
        command -v "$tool" >/dev/null || die "'$tool' is not installed"
    done
}

# Starts a new output: $work is where it is made.
begin() { cleanup; mkdir -p "$cache"; work=$(mktemp -d "$cache/tmp.XXXXXX"); }

# publish NAME: $work becomes $cache/NAME, unless another build was faster.
publish() {
    chmod 755 "$work"
    mv -T "$work" "$cache/$1" 2>/dev/null || [ -d "$cache/$1" ] || die "cannot create $cache/$1"
    cleanup; work=
}

# package_file PACKAGE [VERSION]: downloads PACKAGE once (the newest if no version is given), prints the path of its .deb.
package_file() {
    local version=${2:-} file
    [ -n "$version" ] || version=$(apt-cache "${apt_options[@]}" show --no-all-versions "$1" 2>/dev/null |
        sed -n 's/^Version: //p' | head -n 1)
    [ -n "$version" ] || die "apt knows no package '$1': run 'apt-get update'"
    # apt writes an epoch's colon as %3a.
    for file in "$cache/debs/$1_${version//:/%3a}"_*.deb; do
        [ -f "$file" ] && { echo "$file"; return; }
    done
    begin
    say "downloading $1 $version"
    (cd "$work" && apt-get "${apt_options[@]}" -q download "$1=$version" >&2) ||
        out_of_reach "apt-get cannot download $1=$version"
    mkdir -p "$cache/debs"
    file=$(basename "$work"/*.deb)
    mv "$work/$file" "$cache/debs/$file"
    cleanup
    echo "$cache/debs/$file"
}

# kernel_dir: the directory of the kernel of hosts and default guests, see unpack_kernel.
kernel_dir() {
    local meta package
    meta=$(setting kernel)
    package=$(apt-cache depends --important "$meta" 2>/dev/null | sed -n 's/^ *Depends: //p' | head -n 1)
    [ -n "$package" ] || die "apt knows no package '$meta': run 'apt-get update'"
    unpack_kernel "${package#linux-image-}" "$(package_file "$package")"
}

# copy_module FILE DIRECTORY: busybox loads no compressed modules.
copy_module() {
    case $1 in
        *.xz) xz -dc "$1" >"$2/$(basename "$1" .xz)" ;;
        *.zst) zstd -qdc "$1" >"$2/$(basename "$1" .zst)" ;;
        *.gz) gzip -dc "$1" >"$2/$(basename "$1" .gz)" ;;
        *) cp "$1" "$2/" ;;
    esac
}

# add_modules TREE KERNEL MODULE...: copies modules with their dependencies, but those that are built in;
# TREE/modules.list is the load order.
add_modules() {
    local tree=$1 kernel=$2 path file
    shift 2
    mkdir -p "$tree/modules"
    modprobe -d "$kernel" -S "$(cat "$kernel/release")" --show-depends -a "$@" |
        sed -n 's/^insmod \([^ ]*\).*/\1/p' | awk '!seen[$0]++' |
        while read -r path; do
            copy_module "$path" "$tree/modules"
            file=$(basename "$path")
            echo "${file%.ko*}.ko" >>"$tree/modules.list"
        done
    [ -s "$tree/modules.list" ] || die "no modules found for: $*"
}

# tree_with_busybox TREE INIT: the skeleton of an initramfs.
tree_with_busybox() {
    mkdir -p "$1"/{bin,dev,proc,sys,tmp,etc,data,shared,images}
    cp "$(command -v busybox)" "$1/bin/busybox"
    cp "$2" "$1/init"
    chmod 755 "$1/init"
}

# pack TREE FILE: the same tree gives the same bytes.
pack() {
    find "$1" -exec touch -h -d @0 {} +
    (cd "$1" && find . | LC_ALL=C sort | cpio -o -H newc --reproducible -R 0:0 --quiet | gzip -n -6) >"$2"
}

# build_programs: prints the directory of the programs that go into the images.
build_programs() {
    local built=${CARGO_TARGET_DIR:-$root/target}/x86_64-unknown-linux-gnu
    local what=(--release -p vmft-demo -p vmft-tests --bin vmft-demo --bin vmft-compute --bin vmft-agent)
    # With all that tests build: a part of it would have its dependencies compiled with other features, once more.
    [ "${VMFT_PROFILE:-release}" = release ] || what=(--workspace --bins --examples)
    (cd "$root" && cargo build -q "${what[@]}") >&2 || die "cargo cannot build the programs of the images"
    if [ "${what[0]}" = --release ]; then echo "$built/release"; else echo "$built/debug"; fi
}

# pack_guest DIRECTORY KERNEL PROGRAMS MODULE...: makes DIRECTORY/guest.cpio.gz.
pack_guest() {
    local tree=$1/guest out=$1 kernel=$2 bin=$3 module
    shift 3
    tree_with_busybox "$tree" "$here/init/guest"
    strip -o "$tree/bin/vmft-demo" "$bin/vmft-demo"
    strip -o "$tree/bin/vmft-compute" "$bin/vmft-compute"
    add_modules "$tree" "$kernel" "$@"
    for module in "$tree"/modules/ext4.ko; do
        [ ! -f "$module" ] || rewrite_rdtsc "$module"
    done
    cp "$kernel/release" "$tree/release"
    pack "$tree" "$out/guest.cpio.gz"
    rm -r "$tree"
}

build_images() {
    local kernel bin key name
    need cargo apt-get apt-cache dpkg depmod modprobe busybox cpio gzip strip
    kernel=$(kernel_dir)
    bin=$(build_programs)
    key=$( (basename "$kernel"; cat "$here/build.sh" "$here/kernels.sh" "$here/manifest.toml" "$here"/init/* \
        "$(command -v busybox)" "$bin/vmft-agent" "$bin/vmft-demo" "$bin/vmft-compute") | sha256sum | cut -c1-16)
    name=images-$key
    if [ ! -d "$cache/$name" ]; then
        begin
        say "packing $name"
        tree_with_busybox "$work/host" "$here/init/host"
        strip -o "$work/host/bin/vmft-agent" "$bin/vmft-agent"
        strip -o "$work/vmft-demo" "$bin/vmft-demo"
        cp "$work/host/bin/vmft-agent" "$work/"
        # shellcheck disable=SC2046 # the manifest's lists are words
        add_modules "$work/host" "$kernel" $(setting host)
        pack "$work/host" "$work/host.cpio.gz"
        rm -r "$work/host"
        # shellcheck disable=SC2046
        pack_guest "$work" "$kernel" "$bin" $(setting guest)
        cp "$kernel/vmlinuz" "$work/"
        basename "$kernel" >"$work/versions"
        publish "$name"
        # Yesterday's images: nothing that runs now uses them.
        find "$cache" -maxdepth 1 \( -name 'images-*' -o -name 'guest-*' -o -name 'tmp.*' \) -mtime +1 -exec rm -rf {} +
    fi
    # A fixed name for people; tests use the printed path, which cannot change under them.
    ln -sfn "$name" "$cache/images.$$" && mv -T "$cache/images.$$" "$cache/images"
    echo "$cache/$name"
}

build_small_kernel() {
    local package deb name
    need make gcc flex bison bc xz
    package=$(setting kernel_source)
    deb=$(package_file "$package")
    name=small-$(basename "$deb" .deb)-$( (declare -f build_small_kernel; cat "$here/small-kernel.config") |
        sha256sum | cut -c1-16)
    if [ ! -d "$cache/$name" ]; then
        begin
        say "building the small kernel from $(basename "$deb"): this takes minutes"
        dpkg -x "$deb" "$work/x"
        mkdir "$work/src"
        tar -xf "$work"/x/usr/src/linux-source-*.tar.xz -C "$work/src" --strip-components=1
        (
            cd "$work/src"
            export KBUILD_BUILD_TIMESTAMP=@0 KBUILD_BUILD_USER=vmft KBUILD_BUILD_HOST=vmft
            make -s tinyconfig
            scripts/kconfig/merge_config.sh -m .config "$here/small-kernel.config"
            make -s olddefconfig
            # A symbol that olddefconfig dropped would be missed only when a guest fails.
            grep -E '^CONFIG_[A-Z0-9_]*=y' "$here/small-kernel.config" | while read -r line; do
                grep -qx "$line" .config || die "small-kernel.config: the kernel does not accept $line"
            done
            nice make -s -j"$(nproc)" vmlinux
        ) >&2
        cp "$work/src/vmlinux" "$work/src/.config" "$work/"
        mv "$work/.config" "$work/config"
        strip --strip-debug "$work/vmlinux"
        rm -r "$work/src" "$work/x"
        publish "$name"
    fi
    echo "$cache/$name/vmlinux"
}

make_disk() {
    local file=$1 mib=$2
    need mke2fs truncate
    rm -f "$file.tmp"
    truncate -s "${mib}M" "$file.tmp"
    # No lazy initialisation: the guest's disk writes are then its own only.
    mke2fs -q -t ext4 -b 4096 -E lazy_itable_init=0,lazy_journal_init=0,nodiscard "$file.tmp"
    mv "$file.tmp" "$file"
}

# debootstrap_tree SUITE DIR PACKAGES: installs Debian, with nothing of this machine left in it.
debootstrap_tree() {
    local suite=$1 tree=$2 http_proxy=${http_proxy:-} keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    [ -f "$keyring" ] || die "there is no $keyring: install debian-archive-keyring"
    eval "$(apt-config shell http_proxy Acquire::http::Proxy 2>/dev/null || true)"
    [ -z "$http_proxy" ] || export http_proxy
    # Its mounts end with the namespace, however it ends: nothing of this machine is below $tree when that is removed.
    unshare --mount debootstrap --variant=minbase --include="$3" --keyring="$keyring" "$suite" "$tree" \
        "$(mirror_of Debian http://deb.debian.org/debian)" >"$work/log" 2>&1 ||
        { tail -n 20 "$work/log" >&2; die "debootstrap cannot install Debian's suite '$suite'"; }
    rm -rf "$tree"/var/cache/apt/*.bin "$tree"/var/cache/apt/archives/*.deb "$tree"/var/lib/apt/lists/*
    # systemd makes a machine's own id at the first boot.
    : >"$tree/etc/machine-id"
    : >"$tree/etc/resolv.conf"
    echo "deb http://deb.debian.org/debian $suite main" >"$tree/etc/apt/sources.list"
    echo "$suite" >"$tree/etc/hostname"
    echo "127.0.0.1 localhost $suite" >"$tree/etc/hosts"
}

# A root disk as a user would make it: systemd, networkd at 10.77.0.2/24, sshd, redis; root logs in on the console
# without a password. Kernel and initramfs are copies of those in its /boot.
build_debian() {
    local suite=$1 file=$2 name tree
    local packages=systemd-sysv,udev,dbus,iproute2,openssh-server,redis-server,initramfs-tools,linux-image-cloud-amd64
    [[ $suite =~ ^[a-z][a-z0-9-]*$ ]] || die "'$suite' is no name of a Debian suite"
    [ "$(id -u)" = 0 ] || die "only root can install a Debian into a directory"
    need debootstrap unshare chroot mke2fs truncate
    name=debian-$suite-$( (declare -f debootstrap_tree build_debian) | sha256sum | cut -c1-16)
    if [ ! -d "$cache/$name" ]; then
        begin
        tree=$work/tree
        say "installing Debian $suite into an image: this takes minutes"
        debootstrap_tree "$suite" "$tree" "$packages"
        echo "/dev/vda / ext4 defaults 0 1" >"$tree/etc/fstab"
        printf '[Match]\nType=ether\n[Network]\nAddress=10.77.0.2/24\n' >"$tree/etc/systemd/network/10-lan.network"
        chroot "$tree" systemctl -q enable systemd-networkd >&2 || die "networkd of '$suite' cannot be enabled"
        chroot "$tree" passwd -q -d root >&2
        cp "$tree"/boot/vmlinuz-* "$work/vmlinuz"
        cp "$tree"/boot/initrd.img-* "$work/initrd.img"
        truncate -s 2G "$work/disk.img"
        mke2fs -q -t ext4 -b 4096 -d "$tree" -E lazy_itable_init=0,lazy_journal_init=0,nodiscard "$work/disk.img"
        rm -rf "$tree" "$work/log"
        publish "$name"
    fi
    cp --reflink=auto --sparse=always "$cache/$name/disk.img" "$file.tmp"
    mv "$file.tmp" "$file"
    printf '%s\n' "$cache/$name/vmlinuz" "$cache/$name/initrd.img" "$file"
}

. "$here/kernels.sh"

main() {
    case "${1:-} $#" in
        "images 1") build_images ;;
        "small-kernel 1") build_small_kernel ;;
        "disk 3") make_disk "$2" "$3" ;;
        "debian 3") build_debian "$2" "$3" ;;
        "kernels 1") open_archive && list_kernels | newest_kernels ;;
        "kernel 3") open_archive && kernel_file "$2" "$3" ;;
        "guest 3") build_guest "$2" "$3" ;;
        *) sed -n '2,23s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    esac
}

# One line: a shell reads a script as it goes, and this one may be edited while it runs.
main "$@"; exit
