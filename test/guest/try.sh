#!/bin/sh
# Boots troupe-guest.elf on QEMU's microvm machine with two processors and an entropy device: ./try.sh WORDS
# QEMU_FLAGS adds flags, GUEST names another image.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck disable=SC2086
exec qemu-system-x86_64 -M microvm,rtc=off,auto-kernel-cmdline=off -accel tcg -cpu max -smp 2 -m 128 -nodefaults \
  -no-user-config -nographic -serial stdio -no-reboot -global virtio-mmio.force-legacy=false -device virtio-rng-device \
  ${QEMU_FLAGS:-} -kernel "${GUEST:-$here/troupe-guest.elf}" -append "$*"
