#!/usr/bin/env bash
# Cross-compiles kernels_test and the core for AArch64, runs the test in an emulator as three kinds of CPU, and compares the
# digests with that of this machine: the same outputs, bit for bit. D2MOE_SEED chooses the inputs.
# D2MOE_CMAKE_ARGS goes to CMake for this machine's build, D2MOE_ARM_TARGETS (default "kernels_test core") is what is built for ARM.
set -euo pipefail
cd "$(dirname "$0")/../.."
missing=
command -v aarch64-linux-gnu-g++ >/dev/null || missing="g++-aarch64-linux-gnu"
command -v qemu-aarch64 >/dev/null || missing="$missing qemu-user"
if [ -n "$missing" ]; then
  echo "NOT TESTED: the AArch64 kernels. Install g++-aarch64-linux-gnu qemu-user (missing: $missing)" >&2
  exit 77
fi

seed=${D2MOE_SEED:-$(od -An -N4 -tu4 /dev/urandom | tr -d ' ')}
build() { # directory, targets, CMake arguments
  local directory=$1 targets=$2 log=$1.log
  shift 2
  mkdir -p build
  if ! { cmake -S . -B "$directory" -DD2MOE_TESTS_ONLY=ON -DCMAKE_CXX_FLAGS=-Werror "$@" &&
         cmake --build "$directory" --parallel 2 --target $targets; } >"$log" 2>&1; then
    cat "$log"
    echo "FAILED: the build of $targets in $directory" >&2
    exit 1
  fi
}
build build/tests kernels_test ${D2MOE_CMAKE_ARGS:-}
build build/tests-arm "${D2MOE_ARM_TARGETS:-kernels_test core}" -DCMAKE_TOOLCHAIN_FILE="$PWD/cmake/aarch64.cmake"

digests=
run() { # what it is, tables it must have, a way of matmul it must take, command
  local what=$1 tables=$2 way=$3 out status=0
  shift 3
  out=$("$@" "$seed") || status=$?
  printf -- '-- %s\n%s\n' "$what" "$out"
  if [ "$status" != 0 ]; then
    echo "FAILED: $what, exit status $status, D2MOE_SEED=$seed" >&2
    exit 1
  fi
  if [ -n "$tables" ] && [ "$(sed -n 's/: .* digest .*//p' <<<"$out" | xargs)" != "$tables" ]; then
    echo "FAILED: $what has other tables than $tables" >&2
    exit 1
  fi
  if ! grep -qF "matmul: $way" <<<"$out"; then
    echo "FAILED: $what does not take the way \"$way\"" >&2
    exit 1
  fi
  digests+=$(grep -o "digest [0-9a-f]*" <<<"$out")$'\n'
}
arm() { qemu-aarch64 -L /usr/aarch64-linux-gnu -cpu "$1" build/tests-arm/kernels_test "$2"; }
run "this machine" "" "plain loops" build/tests/kernels_test
run "AArch64 without dot products" "scalar" "plain loops" arm cortex-a72
run "AArch64 with dot products" "scalar neon" "dot, codes unpacked to L1" arm neoverse-n1
run "AArch64 with dot products and int8 matrices" "scalar neon" "i8mm 2x2 matrices, codes unpacked to L1" arm max
digests=${digests%$'\n'}
if [ "$(sort -u <<<"$digests" | wc -l)" != 1 ]; then
  echo "FAILED: the digests differ, D2MOE_SEED=$seed" >&2
  exit 1
fi
echo "$(wc -l <<<"$digests") digests agree"
