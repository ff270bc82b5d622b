#!/usr/bin/env bash
# Runs the tests of the plugin boundary (the host's side, the SDK, every plugin) under AddressSanitizer, which also
# finds leaks: what the C header allows is passed to and fro, misuse included, by the in-process test host.
#
# The toolchain of the repository is enough: the sanitizer's runtime is part of it, and only its switch is not stable.
set -euo pipefail
cd "$(dirname "$0")/.."
target=$(rustc -vV | sed -n 's/^host: //p')
packages=(-p lorasmith-abi -p lorasmith-sdk)
for folder in plugins/*/; do
    name=$(sed -n 's/^name = "\(.*\)"/\1/p' "$folder/Cargo.toml" 2>/dev/null | head -n 1 || true)
    case $name in "" | lorasmith-abi | lorasmith-sdk) ;; *) packages+=(-p "$name") ;; esac
done
# Descriptors live as long as the process, and are leaked for that.
export LSAN_OPTIONS="suppressions=$PWD/tests/sanitize.supp:print_suppressions=0"
export ASAN_OPTIONS="detect_stack_use_after_return=1:strict_string_checks=1"
export RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=address -Cforce-frame-pointers=yes" RUSTDOCFLAGS="-Zsanitizer=address"
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/lorasmith-target}/sanitized"
exec cargo test --target "$target" "${packages[@]}" --lib --tests "$@"
