#!/usr/bin/env bash
# Builds the workspace for AArch64 Linux on an x86-64 Debian and runs tests of it in an emulator: correctness only, an emulator's times mean
# nothing.
#
#     tools/aarch64.sh                                      what has to pass: the library's tests and `lawson check`
#     tools/aarch64.sh -p lawson-cpu --test rows            what `cargo test` is given
#
# The standard library comes from RUSTC (or rustc) where that has it for the target, as after `rustup target add aarch64-unknown-linux-gnu`, else
# from Debian packages, which are unpacked into LAWSON_AARCH64 (target/aarch64-rust) and come with a compiler of their own. The C linker and the
# emulator are installed where they are missing, for which root is needed. Commands that start programs of their own are left out: an emulated
# process cannot start another without binfmt.
set -euo pipefail
cd "$(dirname "$0")/.."
target=aarch64-unknown-linux-gnu
toolchain=$(realpath -m "${LAWSON_AARCH64:-target/aarch64-rust}")

if ! command -v aarch64-linux-gnu-gcc >/dev/null || ! command -v qemu-aarch64 >/dev/null; then
    apt-get update -qq
    apt-get install -y -qq gcc-aarch64-linux-gnu qemu-user >/dev/null
fi

# Unpacks a compiler for this machine with the standard library for the target.
unpack() {
    mkdir -p "$toolchain/debs" "$toolchain/lists/partial"
    (
        cd "$toolchain/debs"
        # What the compiler is linked with: its driver, whose package has the version in its name, and LLVM.
        driver=$(apt-cache depends libstd-rust-web-dev | sed -n 's/^ *Depends: \(libstd-rust-web-[0-9.]*\)$/\1/p' | head -n 1)
        llvm=$(apt-cache depends "$driver" | sed -n 's/^ *Depends: \(libllvm[0-9]*\)$/\1/p' | head -n 1)
        apt-get download rustc-web libstd-rust-web-dev "$driver" "$llvm" >/dev/null
        arm=(-oAPT::Architecture=arm64 -oAPT::Architectures=arm64 -oDir::State::Lists="$toolchain/lists")
        apt-get "${arm[@]}" update -qq
        apt-get "${arm[@]}" download libstd-rust-web-dev >/dev/null
        for package in *.deb; do dpkg -x "$package" "$toolchain/root"; done
    )
    cat >"$toolchain/rustc" <<EOF
#!/bin/sh
LD_LIBRARY_PATH=$toolchain/root/usr/lib/x86_64-linux-gnu:$toolchain/root/usr/lib exec $toolchain/root/usr/bin/rustc --sysroot $toolchain/root/usr "\$@"
EOF
    chmod +x "$toolchain/rustc"
}

if [ ! -d "$("${RUSTC:-rustc}" --print target-libdir --target $target)" ]; then
    [ -x "$toolchain/rustc" ] || unpack
    export RUSTC=$toolchain/rustc
fi
emulator="qemu-aarch64 -cpu max -L /usr/aarch64-linux-gnu"
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER=$emulator
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target/aarch64}

"${RUSTC:-rustc}" --version
if [ $# -gt 0 ]; then
    exec cargo test --target $target "$@"
fi
cargo build --workspace --all-targets --target $target
cargo test --target $target -p lawson-core -p lawson-compiler -p lawson-cpu -p lawson-testkit -p lawson
lawson=$CARGO_TARGET_DIR/$target/debug/lawson
$emulator "$lawson" devices
$emulator "$lawson" check --quick
