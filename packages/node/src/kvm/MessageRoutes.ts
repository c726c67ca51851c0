/**
 * A machine's message-signalled interrupts on KVM: an eventfd each (`KVM_IRQFD`), and the table that says which message the
 * kernel sends when it is rung (`KVM_SET_GSI_ROUTING`).
 *
 * The kernel takes the table as a whole, and takes its time over it. So the table also has what the kernel had put there for the
 * interrupt controllers' inputs, and it is handed over when the first interrupt needs it, not at each of a guest's changes.
 */
import { HypervisorError, type MessageInterrupt } from "@troupe/core/Hypervisor"
import * as Effect from "effect/Effect"
import * as Queue from "effect/Queue"
import type * as Scope from "effect/Scope"
import { Ffi } from "../Ffi.ts"
import { kvmError, kvmFailure } from "./KvmError.ts"
import { KvmIoctl, KvmValue } from "./KvmIoctl.ts"
import { KvmIrqfd, KvmIrqRouting, KvmIrqRoutingEntry } from "./KvmStructs.ts"
import type { KvmSystem } from "./KvmSystem.ts"

/** Inputs of each of the two 8259. */
const PIC_PINS = 8
/** Entries of the kernel's table at most (`KVM_MAX_IRQ_ROUTES`), which its interrupt numbers stay below. */
const ROUTES_LIMIT = 4096

/** Refusals that wait to be logged, and those of one machine that are: a guest can point its messages anywhere. */
const REFUSALS_WAITING_MAX = 4
const REFUSALS_MAX = 16

interface Message {
  readonly gsi: number
  addressLow: number
  addressHigh: number
  data: number
  routed: boolean
}

/** `struct kvm_irqfd` */
export const encodeIrqfd = (fd: number, gsi: number, flags: number) => {
  const view = KvmIrqfd.make()
  KvmIrqfd.fields.fd.set(view, fd)
  KvmIrqfd.fields.gsi.set(view, gsi)
  KvmIrqfd.fields.flags.set(view, flags)
  return view
}

/** One input of an interrupt controller. */
interface Input {
  readonly gsi: number
  readonly irqchip: number
  readonly pin: number
}

/** What the kernel routes by itself: the lines to the I/O APIC's inputs of their numbers, and the ISA ones to the 8259 as well. */
const inputs: ReadonlyArray<Input> = Array.from({ length: KvmValue.KVM_IOAPIC_NUM_PINS }, (_, gsi) => {
  const ioApic: Input = { gsi, irqchip: KvmValue.KVM_IRQCHIP_IOAPIC, pin: gsi }
  if (gsi >= 2 * PIC_PINS) return [ioApic]
  const irqchip = gsi < PIC_PINS ? KvmValue.KVM_IRQCHIP_PIC_MASTER : KvmValue.KVM_IRQCHIP_PIC_SLAVE
  return [ioApic, { gsi, irqchip, pin: gsi % PIC_PINS }]
}).flat()

/** The whole table: the controllers' inputs, then the messages that there are. */
const encodeRoutes = (messages: ReadonlyArray<Message>) => {
  const view = KvmIrqRouting.make(inputs.length + messages.length)
  const { entries, flags, nr } = KvmIrqRouting.fields
  const { gsi, type, u } = KvmIrqRoutingEntry.fields
  nr.set(view, inputs.length + messages.length)
  flags.set(view, 0)
  let index = 0
  for (const input of inputs) {
    const base = entries.at(index++)
    gsi.set(view, input.gsi, base)
    type.set(view, KvmValue.KVM_IRQ_ROUTING_IRQCHIP, base)
    u.irqchip.irqchip.set(view, input.irqchip, base)
    u.irqchip.pin.set(view, input.pin, base)
  }
  for (const message of messages) {
    const base = entries.at(index++)
    gsi.set(view, message.gsi, base)
    type.set(view, KvmValue.KVM_IRQ_ROUTING_MSI, base)
    u.msi.address_lo.set(view, message.addressLow, base)
    u.msi.address_hi.set(view, message.addressHigh, base)
    u.msi.data.set(view, message.data, base)
  }
  return view
}

const describeMessage = ({ addressHigh, addressLow, data, gsi }: Message): string => {
  const address = addressHigh * 2 ** 32 + addressLow
  return `interrupt ${gsi}, 0x${data.toString(16)} to 0x${address.toString(16)}`
}

/**
 * The message-signalled interrupts of a machine: `make` makes one; the machine has its interrupt controllers by then. A
 * message that the kernel refuses is logged, and nobody gets it. When the kernel does not take the others either, whoever
 * triggers an interrupt gets a defect, a `HypervisorError`.
 */
export const messageRoutes = Effect.fnUntraced(function*(
  vm: number,
  ioctl: KvmSystem["Service"]["ioctl"],
  hasVcpus: () => boolean
) {
  const ffi = yield* Ffi
  const messages = new Set<Message>()
  /** Those whose message the kernel does not know yet. */
  const changed = new Set<Message>()
  const free: Array<number> = []
  let nextGsi: number = KvmValue.KVM_IOAPIC_NUM_PINS
  const refusals = yield* Queue.dropping<string>(REFUSALS_WAITING_MAX)
  yield* Queue.take(refusals).pipe(
    Effect.flatMap((text) => Effect.logWarning(text)),
    Effect.repeat({ times: REFUSALS_MAX - 1 }),
    Effect.forkScoped
  )
  const handOver = (): number =>
    ffi.functions.ioctlBuffer(
      vm,
      KvmIoctl.KVM_SET_GSI_ROUTING.request,
      encodeRoutes(Array.from(messages).filter(({ routed }) => routed))
    )
  const refused = (message: Message, result: number): void => {
    message.routed = false
    const { message: why } = kvmFailure(KvmIoctl.KVM_SET_GSI_ROUTING.name, describeMessage(message), result)
    Queue.offerUnsafe(refusals, `the kernel takes no such interrupt, and nobody will get it: ${why}`)
  }
  const update = (): void => {
    if (handOver() < 0) {
      for (const message of changed) message.routed = false
      const result = handOver()
      if (result < 0) {
        // It is not about a message: with the next interrupt all of them are handed over again.
        for (const message of changed) message.routed = true
        throw kvmFailure(KvmIoctl.KVM_SET_GSI_ROUTING.name, `${messages.size} messages`, result)
      }
      // Some message is not for the kernel. It must not keep the others back.
      for (const message of changed) {
        message.routed = true
        const result = handOver()
        if (result < 0) refused(message, result)
      }
    }
    changed.clear()
  }
  const make: Effect.Effect<MessageInterrupt, HypervisorError, Scope.Scope> = Effect.gen(function*() {
    const message = yield* Effect.acquireRelease(
      Effect.suspend(() => {
        const gsi = free.pop() ?? nextGsi++
        if (gsi + 1 + inputs.length - KvmValue.KVM_IOAPIC_NUM_PINS >= ROUTES_LIMIT) {
          return new HypervisorError({
            operation: KvmIoctl.KVM_SET_GSI_ROUTING.name,
            detail: `a machine has fewer than ${ROUTES_LIMIT} interrupt routes`,
            hint: "Configure fewer devices, or devices with fewer queues"
          })
        }
        const message: Message = { gsi, addressLow: 0, addressHigh: 0, data: 0, routed: false }
        messages.add(message)
        return Effect.succeed(message)
      }),
      (message) =>
        Effect.sync(() => {
          messages.delete(message)
          changed.delete(message)
          free.push(message.gsi)
        })
    )
    const eventFd = yield* Effect.mapError(ffi.eventFd, kvmError)
    const set = (flags: number) => ioctl(vm, KvmIoctl.KVM_IRQFD, encodeIrqfd(eventFd.fd, message.gsi, flags))
    // As for interrupt lines: the kernel takes it away when the eventfd is closed, which may be later than a vCPU runs on.
    yield* Effect.acquireRelease(
      set(0),
      () => hasVcpus() ? Effect.ignore(set(KvmValue.KVM_IRQFD_FLAG_DEASSIGN)) : Effect.void
    )
    return {
      trigger: () => {
        if (changed.size > 0) update()
        eventFd.trigger()
      },
      route: (addressLow, addressHigh, data) => {
        message.addressLow = addressLow
        message.addressHigh = addressHigh
        message.data = data
        message.routed = true
        changed.add(message)
      }
    }
  })
  return { make }
})
