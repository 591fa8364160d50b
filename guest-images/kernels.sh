# Debian's kernels of every suite that manifest.toml names. Sourced by build.sh, whose functions it uses.
#
# Their package lists are kept apart from this machine's: apt runs with lists, sources and cache in $cache/archive, and
# with Debian's own keyring. Nothing of this machine's apt is changed, and no signature goes unchecked.
#
# What a kernel's packages hold:
#   to 6.18        linux-image-*: /boot/vmlinuz-RELEASE, /boot/config-RELEASE, modules
#   6.19 to 7.1    linux-binary-*: /boot/vmlinuz-RELEASE; linux-modules-*: modules; linux-base-*: config, modules.builtin
#   from 7.2 on    the same, all in /usr/lib/modules/RELEASE: vmlinuz, config
# linux-modules-* and linux-base-* are kept only for the newest of each suite, linux-image-* and linux-binary-* for longer.

keyring=/usr/share/keyrings/debian-archive-keyring.gpg

# mirror_of LABEL DEFAULT: where apt of this machine has Debian's packages of this label from.
mirror_of() {
    local found
    found=$(apt-get indextargets --format '$(ORIGIN)|$(LABEL)|$(REPO_URI)' 'Created-By: Packages' 2>/dev/null |
        sed -n "s#^Debian|$1|\(https\{0,1\}://.*[^/]\)/*\$#\1#p" | head -n 1) || true
    echo "${found:-$2}"
}

# open_archive: makes apt use the lists of all suites from now on; they are fetched again after a day.
open_archive() {
    local dir=$cache/archive suite suites mirror security
    suites=$(setting suites)
    need apt-get apt-cache flock
    [ -f "$keyring" ] || die "there is no $keyring: install debian-archive-keyring"
    mirror=$(mirror_of Debian http://deb.debian.org/debian)
    security=$(mirror_of Debian-Security http://deb.debian.org/debian-security)
    mkdir -p "$dir/lists/partial" "$dir/archives/partial"
    : >>"$dir/status"
    apt_options=(
        -o "Dir::Etc::sourcelist=$dir/sources.list" -o Dir::Etc::sourceparts=/dev/null
        -o "Dir::State=$dir" -o "Dir::State::lists=$dir/lists" -o "Dir::State::status=$dir/status" -o "Dir::Cache=$dir"
        -o "Dir::Cache::pkgcache=$dir/pkgcache.bin" -o "Dir::Cache::srcpkgcache=$dir/srcpkgcache.bin"
        -o Acquire::Languages=none -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false
        -o Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled=false
    )
    exec {archive_lock}>"$dir/lock"
    flock "$archive_lock"
    if [ -z "$(find "$dir/updated" -mmin -1440 2>/dev/null)" ]; then
        say "fetching the package lists of $(wc -w <<<"$suites") suites"
        for suite in $suites; do
            case $suite in *-security) set -- "$security" ;; *) set -- "$mirror" ;; esac
            echo "deb [arch=amd64 signed-by=$keyring] $1 $suite main"
        done >"$dir/sources.list"
        # A suite's name means another release after the next one came out.
        if apt-get "${apt_options[@]}" -q update --error-on=any --allow-releaseinfo-change >"$dir/update.log" 2>&1; then
            touch "$dir/updated"
        else
            grep '^[EW]:' "$dir/update.log" >&2 || true
            [ -f "$dir/updated" ] || out_of_reach "Debian's archive cannot be reached"
            say "the package lists are those of $(date -r "$dir/updated" +%F)"
        fi
    fi
    exec {archive_lock}>&-
}

# dependencies PACKAGE=VERSION: what it needs, a name on each line.
dependencies() {
    apt-cache "${apt_options[@]}" show "$1" | sed -n 's/^Depends: //p' | tr ',' '\n' | sed 's/^ *//; s/ .*//'
}

# list_kernels: a line "SERIES FLAVOUR VERSION PACKAGE SUITE" for each kernel package of the archive, oldest first.
list_kernels() {
    local series flavour version package suite
    apt-cache "${apt_options[@]}" pkgnames linux-image- | grep -E '^linux-image-[0-9].*-amd64$' |
        xargs apt-cache "${apt_options[@]}" madison | awk -F ' *[|] *' '
            { sub(/^ */, "", $1); sub(/^[^ ]* /, "", $3); sub(/\/.*/, "", $3); match($1, /[0-9]+\.[0-9]+/)
              flavour = $1 ~ /-cloud-amd64$/ ? "cloud" : $1 ~ /-rt-amd64$/ ? "rt" : "default"
              print substr($1, RSTART, RLENGTH), flavour, $2, $1, $3 }' | sort -u -V |
        while read -r series flavour version package suite; do
            # `linux-image-6.12-amd64` may be a kernel, or only depend on the newest of 6.12.
            case $package in "linux-image-$series-amd64" | "linux-image-$series-cloud-amd64" | "linux-image-$series-rt-amd64")
                ! dependencies "$package=$version" | grep -q '^linux-image-' || continue ;;
            esac
            echo "$series $flavour $version $package $suite"
        done
}

# newest_kernels: of these lines, the newest of each series, flavour and Debian release (`+deb13`).
newest_kernels() {
    awk '{ release = match($4, /deb1[0-9]/) ? substr($4, RSTART, RLENGTH) : ""
           if (!(($1, $2, release) in newest)) order[++n] = $1 SUBSEP $2 SUBSEP release
           newest[$1, $2, release] = $0 }
         END { for (i = 1; i <= n; i++) print newest[order[i]] }'
}

# find_kernel WHICH FLAVOUR: "PACKAGE VERSION" of the newest kernel of all, of a suite, or of a series such as 6.18; or
# of a package and its version these again.
find_kernel() {
    local found suite
    case $1 in linux-image-*) echo "$1 $2"; return ;; esac
    case $2 in cloud | default | rt) ;; *) die "'$2' is no flavour: there are cloud, default and rt" ;; esac
    suite=$(apt-get "${apt_options[@]}" indextargets --format '$(RELEASE) $(CODENAME)' 'Created-By: Packages' |
        awk -v which="$1" '$2 == which { print $1 }')
    found=$(list_kernels | awk -v which="${suite:-$1}" -v flavour="$2" \
        '$2 == flavour && ($1 == which || $5 == which || which == "newest") { print $4, $3 }' | tail -n 1)
    [ -n "$found" ] || die "Debian has no kernel '$1' of flavour '$2' (newest, a suite, or a series such as 6.18)"
    echo "$found"
}

# kernel_packages PACKAGE VERSION: the packages that hold its parts, the one with vmlinuz first.
kernel_packages() {
    local all part
    all=$(dependencies "$1=$2")
    grep '^linux-binary-' <<<"$all" || echo "$1"
    for part in $(grep -E '^linux-(modules|base)-[0-9]' <<<"$all"); do
        [ -z "$(apt-cache "${apt_options[@]}" show "$part=$2" 2>/dev/null)" ] || echo "$part"
    done
}

# kernel_file PACKAGE VERSION: prints the path of its vmlinuz; what else is in the package is left out.
kernel_file() {
    local package deb name release
    package=$(kernel_packages "$1" "$2" | head -n 1)
    release=${1#linux-image-}
    deb=$(package_file "$package" "$2")
    name=vmlinuz-$(basename "$deb" .deb)
    if [ ! -d "$cache/$name" ]; then
        begin
        dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$work" --wildcards --no-anchored "vmlinuz*" "config-$release" \
            2>/dev/null || true
        # They lie below boot, lib or usr.
        find "$work" -mindepth 2 -name "config-$release" -exec mv {} "$work/" \;
        find "$work" -mindepth 2 -name 'vmlinuz*' -exec mv {} "$work/vmlinuz-$release" \;
        [ -f "$work/vmlinuz-$release" ] || die "$package $2 holds no kernel"
        rm -rf "$work/boot" "$work/usr" "$work/lib"
        publish "$name"
    fi
    echo "$cache/$name/vmlinuz-$release"
}

# unpack_kernel RELEASE DEB...: unpacks a kernel once, prints the directory: vmlinuz, release, config, lib/modules/RELEASE.
unpack_kernel() {
    local release=$1 name file
    shift
    name=kernel-$(basename "$1" .deb)
    if [ ! -d "$cache/$name" ]; then
        begin
        for file in "$@"; do
            say "unpacking $(basename "$file")"
            dpkg -x "$file" "$work/x"
        done
        mkdir -p "$work/lib/modules"
        for file in "$work/x/lib/modules/$release" "$work/x/usr/lib/modules/$release"; do
            [ ! -d "$file" ] || mv "$file" "$work/lib/modules/"
        done
        [ -d "$work/lib/modules/$release/kernel" ] || die "$release comes without its modules"
        for file in "$work/x/boot/config-$release" "$work/lib/modules/$release/config"; do
            [ ! -f "$file" ] || cp "$file" "$work/config"
        done
        for file in "$work/x/boot/vmlinuz-$release" "$work/lib/modules/$release/vmlinuz"; do
            [ ! -f "$file" ] || cp "$file" "$work/vmlinuz"
        done
        [ -f "$work/vmlinuz" ] || die "$release comes without vmlinuz"
        rm -r "$work/x"
        echo "$release" >"$work/release"
        depmod -b "$work" "$release"
        publish "$name"
    fi
    echo "$cache/$name"
}

# rewrite_rdtsc MODULE: makes its RDTSCs the port reads that the monitor makes of the kernel's own at load
# (docs/determinism.md): it does not see modules. The signature goes, which Debian's kernels allow.
rewrite_rdtsc() {
    local module=$1 section start address offset
    strip --strip-debug "$module"
    objdump -h "$module" | awk '$2 ~ /text/ { print $2, $6 }' | while read -r section start; do
        objdump -d --no-show-raw-insn -j "$section" "$module" |
            sed -n 's/^ *\([0-9a-f]*\):[[:space:]]*rdtsc *$/\1/p' | while read -r address; do
                offset=$((16#$start + 16#$address))
                [ "$(xxd -p -s "$offset" -l 2 "$module")" = 0f31 ] || die "no RDTSC at $offset of $(basename "$module")"
                printf '\xe5\xf1' | dd of="$module" bs=1 seek="$offset" conv=notrunc status=none
            done
    done
}

# build_guest WHICH FLAVOUR (or PACKAGE VERSION): kernel and initramfs of a guest with the demo service; prints the directory.
build_guest() {
    local kernel release bin key name found deb debs=()
    need cargo dpkg depmod modprobe busybox cpio gzip xz zstd strip objdump xxd
    open_archive
    found=$(find_kernel "$1" "$2")
    release=${found%% *}
    release=${release#linux-image-}
    # shellcheck disable=SC2086 # package and version are two words
    for deb in $(kernel_packages $found); do
        debs+=("$(package_file "$deb" "${found##* }")")
    done
    kernel=$(unpack_kernel "$release" "${debs[@]}")
    bin=$(build_programs)
    key=$( (basename "$kernel"; cat "$here/build.sh" "$here/kernels.sh" "$here/manifest.toml" "$here/init/guest" \
        "$(command -v busybox)" "$bin/vmft-demo" "$bin/vmft-compute") | sha256sum | cut -c1-16)
    name=guest-$release-$key
    if [ ! -d "$cache/$name" ]; then
        begin
        say "packing $name"
        # shellcheck disable=SC2046 # the manifest's list is words
        pack_guest "$work" "$kernel" "$bin" $(setting guest) ext4
        cp "$kernel/vmlinuz" "$work/vmlinuz"
        # Where the monitor looks for it.
        [ ! -f "$kernel/config" ] || cp "$kernel/config" "$work/config-$release"
        publish "$name"
    fi
    echo "$cache/$name"
}
