#!/bin/sh
# Builds troupe-guest.elf, troupe-guest.bzimage and toolchain.txt into OUT_DIR (default: beside this script).
# The same gcc and binutils give the same bytes. CC, LD, OBJCOPY, NM choose other ones.
set -eu
LC_ALL=C
export LC_ALL
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here}
mkdir -p "$out"
out=$(cd "$out" && pwd)
CC=${CC:-gcc}
LD=${LD:-ld}
OBJCOPY=${OBJCOPY:-objcopy}
NM=${NM:-nm}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

flags="-m64 -std=gnu11 -Os -ffreestanding -nostdinc -fno-builtin -fno-pic -fno-pie -mno-red-zone -mgeneral-regs-only
  -mcmodel=small -fcf-protection=none -fno-stack-protector -fno-asynchronous-unwind-tables -fno-ident -fno-common
  -fno-jump-tables -fno-tree-loop-distribute-patterns -fno-strict-aliasing -Wall -Wextra -Werror"

# Everything is named by its path from here, so that no other path can get in.
cd "$here/src"
objects=
for source in entry.S vectors.S user.S trampoline.S acpi.c aml.c apic.c bench.c boot.c console.c heap.c hostile.c interrupts.c main.c \
  memory.c power.c print.c serial.c smp.c string.c timer.c unmapped.c \
  virtio*.c virtq*.c; do
  # shellcheck disable=SC2086
  "$CC" $flags -c "$source" -o "$work/$source.o"
  objects="$objects $work/$source.o"
done
# shellcheck disable=SC2086
"$LD" -m elf_x86_64 -static -nostdlib -z noexecstack -z max-page-size=512 --no-warn-rwx-segments --build-id=none \
  -T guest.ld -o "$work/guest" $objects
"$OBJCOPY" --strip-all "$work/guest" "$out/troupe-guest.elf"
chmod 644 "$out/troupe-guest.elf"

symbol() { echo $((0x$("$NM" "$work/guest" | sed -n "s/^\([0-9a-f]*\) . $1\$/\1/p"))); }
start=$(symbol image_start)
image=$(($(symbol bss_start) - start))
sectors=$(((image + 15) / 16))
"$CC" -m64 -DSYSSIZE=$sectors -DINIT_SIZE=$(($(symbol image_end) - start)) -c setup.S -o "$work/setup.o"
"$OBJCOPY" -O binary -j .text "$work/setup.o" "$work/setup.bin"
"$OBJCOPY" -O binary "$work/guest" "$work/image.bin"
head -c 1024 "$work/setup.bin" >"$out/troupe-guest.bzimage"
{
  cat "$work/image.bin"
  head -c 32 /dev/zero
} | head -c $((sectors * 16)) >>"$out/troupe-guest.bzimage"

{
  "$CC" --version | head -n 1
  "$LD" --version | head -n 1
} >"$out/toolchain.txt"
