// The userspace of the guests in demo and lab: busybox, a few modules, and an init that reports and does as told.
import { readFile } from "node:fs/promises"
import { gzipSync } from "node:zlib"
import { type CpioEntry, encodeCpio } from "./Cpio.ts"
import type { KernelModule } from "./KernelModules.ts"
import type { LinuxKernel } from "./LinuxKernel.ts"

/** What the guest's init does after its report, chosen by `troupe.action=` on the kernel command line. */
export type GuestAction = "poweroff" | "reboot" | "panic" | "halt" | "shell" | "rng"

/** Every line of the report starts with this, so that it can be told from the kernel's own messages. */
export const REPORT = "TROUPE "

/** Modules for virtio-mmio with the entropy device, and for a device that tells the host of a panic. */
export const GUEST_MODULES: ReadonlyArray<string> = ["virtio_mmio", "virtio_rng", "pvpanic_mmio"]

/** The modules for all virtio devices on both transports; the file systems and network protocols are in Debian's kernel itself. */
export const DEVICE_MODULES: ReadonlyArray<string> = [
  "virtio_mmio",
  "virtio_pci",
  "virtio_rng",
  "virtio_console",
  "virtio_balloon",
  "virtio_mem",
  "virtio_blk",
  "virtio_net",
  "vmw_vsock_virtio_transport"
]

// No waits anywhere: everything the guest's time is spent on is the kernel's or busybox's own work.
const initOf = (modules: ReadonlyArray<KernelModule>): string =>
  `#!/bin/busybox sh
# The kernel hands words that it does not know to init: with troupe_devices=1 the drivers of all devices belong to the boot.
[ -z "$troupe_devices" ] || for module in ${modules.map(({ name }) => name).join(" ")}; do
  insmod "/lib/modules/$module.ko"
done
# This line is what measurements take for the end of the kernel's boot, so it comes before everything else.
echo "${REPORT}init"
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
read -r up rest < /proc/uptime
echo "${REPORT}uptime $up"
echo "${REPORT}uname $(uname -a)"
cpus=0
while read -r key rest; do case "$key" in processor) cpus=$((cpus + 1)) ;; esac; done < /proc/cpuinfo
echo "${REPORT}cpus $cpus"
while read -r key value unit; do case "$key" in MemTotal:) echo "${REPORT}memory $value $unit" ;; esac; done < /proc/meminfo
read -r cmdline < /proc/cmdline
echo "${REPORT}cmdline $cmdline"
action=poweroff
for word in $cmdline; do case "$word" in troupe.action=*) action="\${word#troupe.action=}" ;; esac; done

# insert NAME... where the kernel came without modules, the actions that need one say so by failing.
insert() { for module; do insmod "/lib/modules/$module.ko" || echo "${REPORT}failed insmod $module"; done; }

rng() {
  insert virtio_ring virtio virtio_mmio virtio_rng
  for device in /sys/bus/virtio/devices/*; do
    [ -e "$device/device" ] || continue
    read -r id < "$device/device"
    read -r status < "$device/status"
    echo "${REPORT}virtio \${device##*/} $id $status"
  done
  read -r current < /sys/class/misc/hw_random/rng_current
  echo "${REPORT}rng-current $current"
  echo "${REPORT}hwrng $(dd if=/dev/hwrng bs=16 count=1 2>/dev/null | od -An -v -tx1 | tr -d ' \\n')"
  while read -r line; do case "$line" in *virtio*) echo "${REPORT}interrupts $line" ;; esac; done < /proc/interrupts
}

case "$action" in
  rng) rng; poweroff -f ;;
  poweroff) poweroff -f ;;
  reboot)
    read -r type < /sys/kernel/reboot/type && echo "${REPORT}reboot-type $type"
    reboot -f ;;
  halt) halt -f ;;
  panic)
    [ -e /lib/modules/pvpanic_mmio.ko ] && insert pvpanic pvpanic_mmio
    echo c > /proc/sysrq-trigger ;;
  shell)
    echo "Type poweroff -f to end the machine."
    exec setsid cttyhack sh ;;
  *) echo "${REPORT}failed unknown action $action"; poweroff -f ;;
esac
`

/** The guest's initramfs, compressed; the same inputs give the same bytes. */
export const buildGuestInitramfs = async (kernel: LinuxKernel): Promise<Buffer> => {
  const wanted = [...new Set([...GUEST_MODULES, ...DEVICE_MODULES])].filter((name) =>
    kernel.modules?.has(name) === true
  )
  const modules: ReadonlyArray<KernelModule> = await kernel.modules?.load(wanted) ?? []
  return gzipSync(encodeCpio(initramfsEntries(await readFile(kernel.busybox), initOf(modules), modules)), { level: 6 })
}

/** Entries of an initramfs whose `/init` is a busybox shell script. */
export const initramfsEntries = (
  busybox: Uint8Array,
  init: string,
  modules: ReadonlyArray<KernelModule>
): ReadonlyArray<CpioEntry> => [
  ...["bin", "dev", "proc", "sys", "lib", "lib/modules"].map((path) => ({ type: "directory" as const, path })),
  // The kernel opens it for init before devtmpfs is mounted.
  { type: "device", path: "dev/console", major: 5, minor: 1 },
  { type: "file", path: "bin/busybox", data: busybox, mode: 0o755 },
  ...APPLETS.map((applet) => ({ type: "link" as const, path: `bin/${applet}`, target: "busybox" })),
  { type: "file", path: "init", data: Buffer.from(init), mode: 0o755 },
  ...modules.map(({ data, name }) => ({ type: "file" as const, path: `lib/modules/${name}.ko`, data }))
]

// What the init scripts of guest and lab call, and what a person at the guest's shell would miss first.
const APPLETS: ReadonlyArray<string> = [
  ..."sh mount umount uname cat dd od tr ls ps top dmesg free grep head tail vi".split(" "),
  ..."insmod lsmod rmmod poweroff reboot halt setsid cttyhack clear sleep mkdir mknod".split(" "),
  ..."ln cp mv rm echo chroot cpio hexdump date wc kill".split(" ")
]
