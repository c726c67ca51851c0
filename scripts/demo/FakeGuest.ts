// The demo's guest as a program for the fake hypervisor: it does and prints what test/guest does on KVM.
import { GuestAcpi, GuestBoot, GuestProgram } from "@troupe/core/testing"

const COM1 = 0x3f8
const LINE_STATUS = COM1 + 5
const TRANSMIT_EMPTY = 0x20
const MIB = 2 ** 20

/** Registers of a virtio-mmio device (virtio 1.3, section 4.2.2). */
const Register = {
  MagicValue: 0x00,
  DeviceId: 0x08,
  DriverFeatures: 0x20,
  DriverFeaturesSel: 0x24,
  QueueSel: 0x30,
  QueueNum: 0x38,
  QueueReady: 0x44,
  QueueNotify: 0x50,
  InterruptAck: 0x64,
  Status: 0x70,
  QueueDescLow: 0x80,
  QueueDriverLow: 0x90,
  QueueDeviceLow: 0xa0
} as const

const ACKNOWLEDGE = 1
const DRIVER = 2
const DRIVER_OK = 4
const FEATURES_OK = 8
/** VIRTIO_F_VERSION_1 is bit 32: bit 0 of the second word. */
const VERSION_1_HIGH = 1
const VIRTQ_DESC_F_WRITE = 2

/** Where the driver keeps its queue and its buffer: memory that nothing else uses this early. */
const DESCRIPTORS = 4 * MIB
const AVAILABLE = DESCRIPTORS + 0x1000
const USED = DESCRIPTORS + 0x2000
const BUFFER = DESCRIPTORS + 0x3000
const QUEUE_SIZE = 8
const RANDOM_BYTES = 16
const TICKS = 10

function* say(cpu: GuestProgram.GuestCpu, text: string): GuestProgram.GuestRoutine {
  for (const byte of new TextEncoder().encode(`troupe-guest: ${text}\r\n`)) {
    while (((yield* cpu.in8(LINE_STATUS)) & TRANSMIT_EMPTY) === 0) yield* cpu.yield()
    yield* cpu.out8(COM1, byte)
  }
}

/** Reads random bytes from the entropy device: one request on its queue, one interrupt. */
function* readRandom(
  cpu: GuestProgram.GuestCpu,
  device: GuestAcpi.VirtioMmioDevice
): GuestProgram.GuestRoutine<Uint8Array> {
  const queue = cpu.memory.slice(DESCRIPTORS, 0x4000)
  if (queue === undefined) throw new Error("the machine has too little memory")
  const view = new DataView(queue.buffer, queue.byteOffset, queue.length)
  const write = (register: number, value: number) => cpu.store(device.base + register, 4, value)
  yield* write(Register.Status, 0)
  yield* write(Register.Status, ACKNOWLEDGE)
  yield* write(Register.Status, ACKNOWLEDGE | DRIVER)
  yield* write(Register.DriverFeaturesSel, 1)
  yield* write(Register.DriverFeatures, VERSION_1_HIGH)
  yield* write(Register.Status, ACKNOWLEDGE | DRIVER | FEATURES_OK)
  yield* write(Register.QueueSel, 0)
  yield* write(Register.QueueNum, QUEUE_SIZE)
  yield* write(Register.QueueDescLow, DESCRIPTORS)
  yield* write(Register.QueueDriverLow, AVAILABLE)
  yield* write(Register.QueueDeviceLow, USED)
  yield* write(Register.QueueReady, 1)
  yield* write(Register.Status, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)
  // One descriptor: the buffer, to be written by the device.
  view.setUint32(0, BUFFER, true)
  view.setUint32(8, RANDOM_BYTES, true)
  view.setUint16(12, VIRTQ_DESC_F_WRITE, true)
  view.setUint16(AVAILABLE - DESCRIPTORS + 4, 0, true)
  view.setUint16(AVAILABLE - DESCRIPTORS + 2, 1, true)
  yield* write(Register.QueueNotify, 0)
  yield* cpu.waitForInterrupt(device.gsi)
  yield* write(Register.InterruptAck, 1)
  const written = view.getUint32(USED - DESCRIPTORS + 8, true)
  return queue.slice(BUFFER - DESCRIPTORS, BUFFER - DESCRIPTORS + Math.min(written, RANDOM_BYTES))
}

/** The guest. */
export const fakeGuest = GuestProgram.make(function*(cpu) {
  const boot = GuestBoot.read(cpu)
  const ram = boot.memoryMap.filter((entry) => entry.type === 1)
  yield* say(cpu, `entry ${boot.protocol}`)
  yield* say(cpu, `cmdline ${boot.commandLine}`)
  yield* say(
    cpu,
    `memory ${Math.round(ram.reduce((sum, entry) => sum + entry.size, 0) / MIB)} MiB in ${ram.length} ranges`
  )
  const acpi = GuestAcpi.find(cpu)
  yield* say(cpu, `cpus ${acpi.apicIds.length}`)
  yield* say(cpu, "ready")

  let up = 1
  for (const id of acpi.apicIds.filter((apic) => apic !== cpu.id)) {
    const started = { yet: false }
    yield* cpu.startVcpu(id, function*(other) {
      started.yet = true
      other.enableInterrupts()
      for (;;) yield* other.halt()
    })
    while (!started.yet) yield* cpu.yield()
    up++
    yield* say(cpu, `cpu ${id} up apic ${id}`)
  }
  yield* say(cpu, `smp ${up} of ${acpi.apicIds.length} up`)

  for (let tick = 0; tick < TICKS; tick++) yield* cpu.sleep("10 millis")
  yield* say(cpu, `timer ${TICKS} ticks`)

  for (const device of acpi.virtioMmio) {
    const random = yield* readRandom(cpu, device)
    const hex = Array.from(random, (byte) => byte.toString(16).padStart(2, "0")).join("")
    yield* say(cpu, `rng request 0 ${random.length} bytes 1 interrupts ${hex}`)
    yield* say(cpu, "rng ok")
  }

  yield* say(cpu, "poweroff")
  yield* GuestAcpi.powerOff(cpu, acpi)
})
