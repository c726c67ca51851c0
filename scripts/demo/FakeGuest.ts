// The demo's guest as a program for the fake hypervisor: it does and prints what test/guest does on KVM.
import { GuestAcpi, GuestBoot, GuestProgram, SerialDriver, VirtioMmioDriver } from "@troupe/core/testing"

const MIB = 2 ** 20
/** Where the driver keeps its queue and its buffer: memory that nothing else uses this early. */
const QUEUE = 4 * MIB
const BUFFER = 5 * MIB
const RANDOM_BYTES = 32
const TICKS = 10

const serial = new SerialDriver.SerialDriver()

const say = (cpu: GuestProgram.GuestCpu, text: string): GuestProgram.GuestRoutine =>
  serial.print(cpu, `troupe-guest: ${text}\r\n`)

/** Reads random bytes from the entropy device: one request on its queue, one interrupt. */
function* readRandom(cpu: GuestProgram.GuestCpu, place: GuestAcpi.VirtioMmioDevice): GuestProgram.GuestRoutine {
  const driver = yield* VirtioMmioDriver.startVirtioMmio(cpu, place, { memoryAddress: QUEUE })
  yield* driver.send(cpu, 0, [[{ address: BUFFER, length: RANDOM_BYTES, writable: true }]])
  const { written } = yield* driver.receive(cpu, 0)
  const bytes = Array.from(cpu.memory.slice(BUFFER, written) ?? [])
  const hex = bytes.map((byte) => byte.toString(16).padStart(2, "0")).join("")
  yield* say(cpu, `rng request 0 ${bytes.length} bytes ${driver.interrupts} interrupts ${hex}`)
  yield* say(cpu, "rng ok")
}

/** The guest. */
export const fakeGuest = GuestProgram.make(function*(cpu) {
  const boot = GuestBoot.read(cpu)
  yield* serial.setUp(cpu)
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
  yield* say(cpu, `timer ${TICKS} sleeps`)

  for (const place of acpi.virtioMmio) yield* readRandom(cpu, place)

  yield* say(cpu, "poweroff")
  yield* GuestAcpi.powerOff(cpu, acpi)
})
