#!/bin/sh
# Builds the programs for Linux guests. The same compiler and linker give the same bytes. Usage: build.sh [OUT_DIR]
set -eu
LC_ALL=C
export LC_ALL
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$here"
"${CC:-gcc}" -m64 -std=gnu11 -Os -static -nostdlib -ffreestanding -fno-builtin -fno-pic -no-pie -fno-stack-protector \
  -fcf-protection=none -fno-asynchronous-unwind-tables -fno-ident -fno-tree-loop-distribute-patterns -Wall -Wextra -Werror \
  -Wl,--build-id=none,-z,noexecstack -s -o "$out/vsock" vsock.c
