// Boots the same kernel under our VMM and under QEMU's microvm in the same lab, and puts times and exits side by side.
import type { Lab } from "./Lab.ts"
import { LabError } from "./LabError.ts"
import type { BootRun } from "./measure-boot.ts"
import { labPaths } from "./RootImage.ts"
import { quoted } from "./TroupeCommand.ts"

const MEMORY = 512
const CMDLINE = "console=ttyS0 panic=-1 quiet troupe.action=poweroff troupe_devices=1"
/** The guest's disk, made before each boot. */
const DISK = "/tmp/boot-disk"

const qemu = (machine: string): ReadonlyArray<string> => [
  "qemu-system-x86_64",
  ...`-M ${machine} -m ${MEMORY} -kernel ${labPaths.vmlinux} -initrd ${labPaths.initrd}`.split(" "),
  ..."-accel kvm -cpu host -smp 1 -nodefaults -no-user-config -display none -no-reboot -serial stdio".split(" "),
  ..."-device virtio-rng-device -device virtio-balloon-device,free-page-reporting=on".split(" "),
  ..."-device virtio-serial-device -chardev null,id=hvc0 -device virtconsole,chardev=hvc0".split(" "),
  ...`-drive file=${DISK},if=none,id=disk,format=raw -device virtio-blk-device,drive=disk`.split(" "),
  ..."-netdev user,id=net -device virtio-net-device,netdev=net,mac=02:00:00:00:00:01".split(" "),
  "-append",
  CMDLINE
]

/**
 * What is compared. All boot the ELF kernel through PVH with one vCPU, a serial console, and an entropy device, a balloon, a console, a
 * disk and a network; the drivers of the devices belong to the boot.
 */
export const vmms = {
  troupe: [
    labPaths.node,
    "--disable-warning=ExperimentalWarning",
    `${labPaths.repository}/scripts/lab/boot-devices.ts`,
    labPaths.vmlinux,
    labPaths.initrd,
    String(MEMORY),
    CMDLINE,
    DISK
  ],
  /** With the clock whose absence costs a Linux guest seconds and tens of thousands of exits: QEMU at its best. */
  "qemu-microvm": qemu("microvm,rtc=on"),
  /** As it comes under KVM: without that clock. */
  "qemu-microvm-default": qemu("microvm")
} as const

export type Vmm = keyof typeof vmms

/** The measurements of one VMM. */
export interface BootMeasurement {
  readonly vmm: Vmm
  /** Boots for the times and counters; every exit was recorded in one more. */
  readonly runs: ReadonlyArray<BootRun>
  readonly traced: BootRun
}

/** Measures one boot in the lab. */
export const measureBoot = async (lab: Lab, vmm: Vmm, trace: boolean): Promise<BootRun> => {
  const measure = [labPaths.node, "scripts/lab/measure-boot.ts", ...(trace ? ["--trace"] : []), "--"]
  const script = `truncate -s 64M ${DISK}\n${[...measure, ...vmms[vmm]].map(quoted).join(" ")}`
  const result = await lab.run({ script })
  const text = result.files.get("boot.json")
  if (text === undefined) throw new LabError(`measuring a boot under ${vmm} failed:\n${result.output}`)
  // Written by measure-boot.ts of the same clone.
  // oxlint-disable-next-line typescript/no-unsafe-type-assertion
  const run = JSON.parse(text.toString()) as BootRun
  if (run.init === undefined) {
    throw new LabError(`the guest did not reach its userspace under ${vmm}:\n${run.output}\n${result.output}`)
  }
  return run
}

/** Measures each VMM `runs` times, taking turns, so that whatever else the host does meets all of them. */
export const compareBoots = async (
  lab: Lab,
  names: ReadonlyArray<Vmm>,
  runs: number
): Promise<ReadonlyArray<BootMeasurement>> => {
  const all = new Map<Vmm, Array<BootRun>>(names.map((name) => [name, []]))
  for (let i = 0; i < runs; i++) for (const name of names) all.get(name)!.push(await measureBoot(lab, name, false))
  const measurements: Array<BootMeasurement> = []
  for (const name of names) {
    measurements.push({ vmm: name, runs: all.get(name)!, traced: await measureBoot(lab, name, true) })
  }
  return measurements
}
