/** The KVM layer on a real /dev/kvm: every kind of access, every way in which a vCPU ends, with guests of a few bytes. */
import { assert, describe, it } from "@effect/vitest"
import { SHADOW_INVALID } from "@troupe/core/Bus"
import type { CallReply } from "@troupe/core/Bus"
import { Hypervisor } from "@troupe/core/Hypervisor"
import { cpuidFeature, HiddenCpuid } from "@troupe/node/kvm/Cpuid"
import { type ExitCounts, ExitObserver } from "@troupe/node/kvm/ExitCounts"
import * as KvmHypervisor from "@troupe/node/kvm/KvmHypervisor"
import { VcpuThreads } from "@troupe/node/kvm/VcpuThreads"
import { type WakeCounts, WakeObserver } from "@troupe/node/kvm/WakeCounts"
import { Cause, Effect, Exit, Fiber, Layer } from "effect"
import { kvmObstacle, onKvm } from "./support.ts"
import {
  asm,
  CONTROL,
  dword,
  END,
  flatMode,
  HALT,
  kvmLayer,
  longMode,
  PORTS,
  range,
  realMode,
  realModeWithVectors,
  SERIAL,
  tinyMachine,
  WINDOW,
  word
} from "./TinyMachine.ts"

describe.skipIf(kvmObstacle !== undefined)(onKvm("KvmHypervisor"), () => {
  it.layer(kvmLayer(), { excludeTestServices: true })((it) => {
    it.effect("delivers posted writes in order and with their size", () =>
      Effect.gen(function*() {
        const machine = yield* tinyMachine({
          code: asm(
            [0xba, ...word(SERIAL)], // mov dx, SERIAL
            [0xb0, 0x48, 0xee], // mov al, 'H'; out dx, al
            [0xb8, ...word(0x1234), 0xef], // mov ax, 0x1234; out dx, ax
            [0x66, 0xb8, ...dword(0xfedc_ba98), 0x66, 0xef], // mov eax, ...; out dx, eax
            [0x42, 0xee], // inc dx; out dx, al
            END
          )
        })
        yield* machine.runToEnd
        assert.deepStrictEqual(machine.events, [
          "posted 0+0/1 0x48",
          "posted 0+0/2 0x1234",
          "posted 0+0/4 0xfedcba98",
          "posted 0+1/1 0x98"
        ])
      }))

    it.effect("answers shadowed reads without a call, and invalid ones with a call", () =>
      Effect.gen(function*() {
        const machine = yield* tinyMachine({
          code: asm(
            [0xba, ...word(SERIAL + 5)], // mov dx, SERIAL + 5
            [0xec, 0xe6, 0x80, 0xbb, 0, 0], // in al, dx; out 0x80, al (nobody); mov bx, 0
            [0x88, 0xc3], // mov bl, al
            [0xed, 0x89, 0xc1], // in ax, dx; mov cx, ax
            [0x4a, 0xec], // dec dx; in al, dx
            HALT
          ),
          handlers: {
            call: (_range, offset, size, isWrite, _value, reply) => {
              assert.deepStrictEqual([offset, size, isWrite], [4, 1, false])
              reply.complete(0x5a)
            }
          }
        })
        const shadow = machine.backings[0]?.shadow
        if (shadow === undefined) return assert.fail("a shadowed range has a shadow table")
        assert.isTrue(shadow.every((entry) => entry === SHADOW_INVALID))
        shadow[5] = 0x60
        shadow[6] = 0xb0
        const exit = yield* machine.vcpu.run
        if (exit._tag !== "Halted") return assert.fail(exit._tag)
        assert.strictEqual(exit.registers["rbx"], "0x60")
        assert.strictEqual(exit.registers["rcx"], "0xb060")
        assert.strictEqual(exit.registers["rax"], "0xb05a")
        assert.isUndefined(machine.backings[1]?.shadow)
      }))

    it.effect("waits for calls, and delivers what was posted before them first", () =>
      Effect.gen(function*() {
        const order: Array<string> = []
        const replies: Array<CallReply> = []
        const machine = yield* tinyMachine({
          code: asm(
            [0xba, ...word(SERIAL), 0xb0, 0x31, 0xee], // out SERIAL, '1'
            [0xba, ...word(CONTROL + 2), 0xed], // in ax, CONTROL + 2
            [0xba, ...word(SERIAL), 0xee], // out SERIAL, al
            [0xba, ...word(CONTROL + 1), 0xee], // out CONTROL + 1, al
            HALT
          ),
          handlers: {
            posted: (_range, _offset, _size, value) => {
              order.push(`posted 0x${value.toString(16)}`)
              return true
            },
            call: (range, offset, size, isWrite, value, reply) => {
              order.push(`${isWrite ? "write" : "read"} ${range}+${offset}/${size} 0x${value.toString(16)}`)
              // Answered later, as a device's fiber does.
              replies.push(reply)
              setTimeout(() => reply.complete(0x1_4142), 2)
            }
          }
        })
        const exit = yield* machine.vcpu.run
        if (exit._tag !== "Halted") return assert.fail(exit._tag)
        assert.deepStrictEqual(order, ["posted 0x31", "read 1+2/2 0x0", "posted 0x42", "write 1+1/1 0x42"])
        assert.strictEqual(exit.registers["rax"], "0x4142")
        assert.strictEqual(replies[0], replies[1], "one reply object serves a vCPU")
      }))

    it.effect("delivers what a guest wrote before it died", () =>
      Effect.gen(function*() {
        let attempts = 0
        const text: Array<number> = []
        const machine = yield* tinyMachine({
          state: flatMode,
          code: asm(
            [0x66, 0xba, ...word(SERIAL), 0xb0, 0x21, 0xee, 0xee], // out SERIAL, '!' twice
            [0x0f, 0x0b] // ud2 without an interrupt table
          ),
          // The device has no room at first.
          handlers: { posted: (_range, _offset, _size, value) => attempts++ >= 3 && text.push(value) > 0 }
        })
        const exit = yield* machine.vcpu.run
        assert.strictEqual(exit._tag, "TripleFault")
        assert.deepStrictEqual(text, [0x21, 0x21])
      }))

    it.effect("holds a guest back while its device has no room, and loses nothing", () =>
      Effect.gen(function*() {
        const count = 5000
        let refusals = 200
        const seen: Array<number> = []
        const machine = yield* tinyMachine({
          code: asm(
            [0xba, ...word(SERIAL), 0xb9, ...word(count)], // mov dx, SERIAL; mov cx, count
            [0x89, 0xc8, 0xef, 0xe2, 0xfb], // again: mov ax, cx; out dx, ax; loop again
            [0xba, ...word(CONTROL), 0xec], // in al, CONTROL
            END
          ),
          handlers: {
            posted: (_range, _offset, _size, value) => {
              // Refuses now and then, most of all at the start.
              if (refusals > 0 && (seen.length === 0 || value % 7 === 0) && refusals-- % 2 === 0) return false
              seen.push(value)
              return true
            },
            call: (_range, _offset, _size, _isWrite, _value, reply) => {
              assert.strictEqual(seen.length, count)
              reply.complete(0)
            }
          }
        })
        yield* machine.runToEnd
        assert.deepStrictEqual(seen, Array.from({ length: count }, (_, i) => count - i))
      }))

    it.effect("repeats string port instructions one element at a time", () =>
      Effect.gen(function*() {
        let next = 0
        const machine = yield* tinyMachine({
          code: asm(
            [0xfc, 0xbe, ...word(0x1000), 0xba, ...word(SERIAL), 0xb9, ...word(4)], // cld; si = ENTRY; dx; cx = 4
            [0xf3, 0x6e], // rep outsb
            [0xbf, ...word(0x2000), 0xba, ...word(CONTROL), 0xb9, ...word(3)], // di = 0x2000; dx; cx = 3
            [0xf3, 0x6d], // rep insw
            END
          ),
          handlers: {
            call: (_range, _offset, size, _isWrite, _value, reply) => {
              assert.strictEqual(size, 2)
              reply.complete(0x1000 + next++)
            }
          }
        })
        yield* machine.runToEnd
        assert.deepStrictEqual(
          machine.events,
          [0xfc, 0xbe, 0x00, 0x10].map((byte) => `posted 0+0/1 0x${byte.toString(16)}`)
        )
        assert.deepStrictEqual(Array.from(machine.memory.words.subarray(0x1000, 0x1004)), [0x1000, 0x1001, 0x1002, 0])
      }))

    it.effect("reads ones and ignores writes where no range is", () =>
      Effect.gen(function*() {
        const machine = yield* tinyMachine({
          state: flatMode,
          code: asm(
            [0x66, 0xba, ...word(0x700), 0xed, 0x89, 0xc3, 0xef], // mov dx, 0x700; in eax, dx; mov ebx, eax; out dx, eax
            [0x66, 0xba, ...word(CONTROL + 6), 0xed], // in eax, CONTROL + 6: begins in a range and leaves it
            [0x8b, 0x0d, ...dword(0xe000_0000)], // mov ecx, [0xe0000000]
            [0x89, 0x0d, ...dword(0xe000_0000)], // mov [0xe0000000], ecx
            HALT
          )
        })
        const exit = yield* machine.vcpu.run
        if (exit._tag !== "Halted") return assert.fail(exit._tag)
        for (const register of ["rax", "rbx", "rcx"]) assert.strictEqual(exit.registers[register], "0xffffffff")
        assert.deepStrictEqual(machine.events, [])
      }))

    it.effect("delivers 8-byte accesses as two of 4 bytes, the lower first", () =>
      Effect.gen(function*() {
        const values = [0x8899_aabb, 0x0123_4567]
        const machine = yield* tinyMachine({
          state: longMode,
          ranges: [
            range({ space: "mmio", base: WINDOW, size: 0x100 }),
            range({ space: "mmio", base: WINDOW + 0x1000, size: 0x100, write: "posted" })
          ],
          code: asm(
            [0xbb, ...dword(WINDOW)], // mov ebx, WINDOW
            [0x48, 0x8b, 0x43, 0x10], // mov rax, [rbx + 0x10]
            [0x48, 0x89, 0x43, 0x20], // mov [rbx + 0x20], rax
            [0x48, 0x89, 0x83, ...dword(0x1008)], // mov [rbx + 0x1008], rax
            HALT
          ),
          handlers: {
            call: (_range, offset, size, isWrite, value, reply) => {
              machine.events.push(`${isWrite ? "write" : "read"} +${offset}/${size} 0x${value.toString(16)}`)
              reply.complete(isWrite ? 0 : values.shift() ?? 0)
            }
          }
        })
        const exit = yield* machine.vcpu.run
        if (exit._tag !== "Halted") return assert.fail(exit._tag)
        assert.strictEqual(exit.registers["rax"], "0x12345678899aabb")
        assert.deepStrictEqual(machine.events, [
          "read +16/4 0x0",
          "read +20/4 0x0",
          "write +32/4 0x8899aabb",
          "write +36/4 0x1234567",
          "posted 1+8/4 0x8899aabb",
          "posted 1+12/4 0x1234567"
        ])
      }))

    it.effect("lets the guest read register pages without an exit, one slot for a run of them", () =>
      Effect.gen(function*() {
        const machine = yield* tinyMachine({
          state: flatMode,
          ranges: [
            range({ space: "mmio", base: WINDOW + 0x1000, size: 0x1000, read: "register-page" }),
            range({ space: "mmio", base: WINDOW, size: 0x1000, read: "register-page" })
          ],
          code: asm(
            [0xa1, ...dword(WINDOW), 0x89, 0xc3], // mov eax, [WINDOW]; mov ebx, eax
            [0xa1, ...dword(WINDOW + 0x1ffc), 0x89, 0xc1], // mov eax, [WINDOW + 0x1ffc]; mov ecx, eax
            [0xa3, ...dword(WINDOW + 0x10)], // mov [WINDOW + 0x10], eax
            [0xa1, ...dword(WINDOW + 0x10)], // mov eax, [WINDOW + 0x10]: the page, not what was written
            HALT
          )
        })
        machine.backings[1]?.page?.setUint32(0, 0x7472_6976, true)
        machine.backings[0]?.page?.setUint32(0xffc, 0xfeed_f00d, true)
        const exit = yield* machine.vcpu.run
        if (exit._tag !== "Halted") return assert.fail(exit._tag)
        assert.strictEqual(exit.registers["rbx"], "0x74726976")
        assert.strictEqual(exit.registers["rcx"], "0xfeedf00d")
        assert.strictEqual(exit.registers["rax"], "0x0")
        assert.deepStrictEqual(machine.events, ["write 1+16/4 0xfeedf00d"])
      }))

    it.effect("absorbs doorbells of the right width and value, and delivers other writes", () =>
      Effect.gen(function*() {
        const machine = yield* tinyMachine({
          state: flatMode,
          ranges: [
            range({
              space: "mmio",
              base: WINDOW,
              size: 0x1000,
              read: "register-page",
              doorbells: [{ offset: 0x50, size: 4, value: 1 }, { offset: 0x64, size: 4 }]
            }),
            range({ base: 0x600, doorbells: [{ offset: 2, size: 2 }] })
          ],
          code: asm(
            [0xb8, ...dword(1), 0xa3, ...dword(WINDOW + 0x50)], // [WINDOW + 0x50] = 1: rings
            [0xb0, 2, 0xa3, ...dword(WINDOW + 0x50)], // [WINDOW + 0x50] = 2: another value
            [0xa2, ...dword(WINDOW + 0x64)], // byte [WINDOW + 0x64] = 2: another width
            [0x66, 0xba, ...word(0x602), 0x66, 0xef], // out 0x602, ax: rings
            [0xa3, ...dword(WINDOW + 0x64)], // [WINDOW + 0x64] = 2: rings
            HALT
          )
        })
        assert.strictEqual((yield* machine.vcpu.run)._tag, "Halted")
        assert.sameMembers(machine.events, [
          "doorbell 0#0",
          "write 0+80/4 0x2",
          "write 0+100/1 0x2",
          "doorbell 1#0",
          "doorbell 0#1"
        ])
      }))

    it.effect("raises interrupts in the kernel's controllers", () =>
      Effect.gen(function*() {
        let ready = () => {}
        const started = new Promise<void>((resolve) => {
          ready = resolve
        })
        const machine = yield* tinyMachine({
          state: realModeWithVectors,
          lines: [4],
          code: asm(
            // 8259: ICW1..4 with vectors from 0x20, then all inputs masked but 4
            [0xb0, 0x11, 0xe6, 0x20, 0xb0, 0x20, 0xe6, 0x21, 0xb0, 0x04, 0xe6, 0x21, 0xb0, 0x01, 0xe6, 0x21],
            [0xb0, 0xef, 0xe6, 0x21],
            [0xba, ...word(SERIAL), 0xb0, 0x72, 0xee], // out SERIAL, 'r'
            [0xb3, 0], // mov bl, 0
            [0xfb, 0xf4, 0x80, 0xfb, 3, 0x75, 0xf9], // wait: sti; hlt; cmp bl, 3; jne wait
            HALT
          ),
          handlers: {
            posted: (_range, _offset, _size, value) => {
              machine.events.push(String.fromCharCode(value))
              ready()
              if (value === 0x69) setImmediate(trigger)
              return true
            }
          }
        })
        // The handler: inc bl; mov al, 'i'; out dx, al; end of interrupt; iret
        machine.memory.bytes.set([0xfe, 0xc3, 0xb0, 0x69, 0xee, 0xb0, 0x20, 0xe6, 0x20, 0xcf], 0x2000)
        machine.memory.view.setUint16(0x24 * 4, 0x2000, true)
        const trigger = () => machine.lines[0]?.trigger()
        const fiber = yield* Effect.forkScoped(machine.vcpu.run)
        yield* Effect.promise(() => started)
        trigger()
        assert.strictEqual((yield* Fiber.join(fiber))._tag, "Halted")
        assert.deepStrictEqual(machine.events, ["r", "i", "i", "i"])
      }))

    it.effect("tells an idle guest from one that has halted for good", () =>
      Effect.gen(function*() {
        // sti; hlt; then again
        const machine = yield* tinyMachine({ code: [0xfb, 0xf4, 0xeb, 0xfd] })
        const idle = yield* Effect.timeoutOption(machine.vcpu.run, "3 seconds")
        assert.strictEqual(idle._tag, "None")
      }))

    it.effect("ends a triple fault with the registers", () =>
      Effect.gen(function*() {
        // ud2 without an interrupt table
        const machine = yield* tinyMachine({ state: flatMode, code: [0xb8, ...dword(0x1234_5678), 0x0f, 0x0b] })
        const exit = yield* machine.vcpu.run
        if (exit._tag !== "TripleFault") return assert.fail(exit._tag)
        assert.property(exit.registers, "rip")
      }))

    it.effect("ends an instruction that KVM cannot emulate with its bytes and the registers", () =>
      Effect.gen(function*() {
        // mov eax, 0x77; fld dword [0xe0000000]: no KVM emulates x87 loads, and nothing but KVM could do this one
        const machine = yield* tinyMachine({
          state: flatMode,
          code: asm([0xb8, ...dword(0x77)], [0xd9, 0x05, ...dword(0xe000_0000)])
        })
        const exit = yield* machine.vcpu.run
        if (exit._tag !== "HypervisorInternalError") return assert.fail(exit._tag)
        assert.strictEqual(exit.suberror, 1)
        assert.match(exit.instructionBytes, /^d9 05 00 00 00 e0/)
        assert.strictEqual(exit.registers["rip"], "0x1005")
        assert.strictEqual(exit.registers["rax"], "0x77")
        for (const name of ["rsp", "rflags", "r15", "cr0", "cr2", "cr3", "cr4", "efer"]) {
          assert.property(exit.registers, name)
        }
      }))

    it.effect("runs two machines in one process; one dies and the other goes on", () =>
      Effect.gen(function*() {
        const dying = yield* tinyMachine({ state: flatMode, code: [0x0f, 0x0b] })
        const living = yield* tinyMachine({
          code: asm(
            [0xba, ...word(CONTROL), 0xec, 0x84, 0xc0, 0x74, 0xfb], // again: in al, CONTROL; test al, al; jz again
            [0xba, ...word(SERIAL), 0xee],
            END
          ),
          handlers: { call: (_range, _offset, _size, _isWrite, _value, reply) => reply.complete(died ? 0x79 : 0) }
        })
        let died = false
        const fiber = yield* Effect.forkScoped(living.runToEnd)
        assert.strictEqual((yield* dying.vcpu.run)._tag, "TripleFault")
        died = true
        yield* Fiber.join(fiber)
        assert.strictEqual(living.text(), "y")
      }))

    it.effect("ends every vCPU with what a handler threw", () =>
      Effect.gen(function*() {
        const defect = new Error("a device's defect")
        const machine = yield* tinyMachine({
          code: [0xba, ...word(CONTROL), 0xec, 0xeb, 0xfe],
          handlers: {
            call: () => {
              throw defect
            }
          }
        })
        const exit = yield* Effect.exit(machine.vcpu.run)
        if (!Exit.isFailure(exit)) return assert.fail("the run must die")
        assert.strictEqual(Cause.squash(exit.cause), defect)
      }))

    it.effect("starts a second vCPU by INIT and SIPI, and keeps the order of what the two post", () =>
      Effect.gen(function*() {
        const icr = (value: number) => [0xc7, 0x05, ...dword(0xfee0_0300), ...dword(value)] // mov dword [ICR], value
        const machine = yield* tinyMachine({
          state: flatMode,
          vcpus: 2,
          code: asm(
            [0x66, 0xba, ...word(SERIAL), 0xb0, 0x30, 0xee], // out SERIAL, '0'
            [0xc7, 0x05, ...dword(0xfee0_0310), ...dword(0x0100_0000)], // ICR high: to APIC ID 1
            [...icr(0x4500), ...icr(0x4602)], // INIT; start-up at 0x2000
            // wait: mov al, [0x3000]; test al, al; jz wait
            [0xa0, ...dword(0x3000), 0x84, 0xc0, 0x74, 0xf7],
            [0xb0, 0x32, 0xee], // out SERIAL, '2'
            HALT
          )
        })
        machine.memory.bytes.set(
          asm(
            [0xba, ...word(SERIAL), 0xb0, 0x31, 0xee], // out SERIAL, '1'
            [0x31, 0xc0, 0x8e, 0xd8, 0xb0, 1, 0xa2, ...word(0x3000)], // ds = 0; byte [0x3000] = 1
            HALT
          ),
          0x2000
        )
        const exits = yield* Effect.all(machine.vcpus.map((vcpu) => vcpu.run), { concurrency: "unbounded" })
        assert.deepStrictEqual(exits.map((exit) => exit._tag), ["Halted", "Halted"])
        assert.strictEqual(machine.text(), "012")
      }))

    it.effect("gives every vCPU its identity, hides what the host hides, and counts exits", () => {
      const seen: Array<() => ExitCounts> = []
      const woken: Array<WakeCounts> = []
      return Effect.gen(function*() {
        const machine = yield* tinyMachine({
          state: flatMode,
          code: asm(
            [0xb8, ...dword(1), 0x0f, 0xa2, 0x89, 0x0d, ...dword(0x3000), 0x89, 0x1d, ...dword(0x3004)], // cpuid 1; store ecx, ebx
            [0x66, 0xba, ...word(SERIAL), 0xee, 0xee, 0x66, 0xba, ...word(0x700), 0xec], // out twice; in from nowhere
            [0x66, 0xba, ...word(CONTROL), 0xec], // in: a call
            END
          )
        })
        yield* machine.runToEnd
        const { cx16 } = cpuidFeature
        assert.strictEqual(machine.memory.view.getUint32(0x3000, true) & cx16.ecx, 0)
        assert.strictEqual(machine.memory.view.getUint32(0x3004, true) >>> 24, 0)
        assert.deepInclude(seen[0]?.(), { exits: 5, posted: 3, shadowed: 0, calls: 1, unclaimed: 1 })
        assert.strictEqual(woken.length, 1)
        assert.strictEqual(woken[0]?.doorbells, 0)
        assert.isAtLeast(woken[0]?.messages ?? 0, 1)
      }).pipe(
        Effect.provide(
          Layer.fresh(KvmHypervisor.layer).pipe(
            Layer.provide(Layer.succeed(HiddenCpuid, [cpuidFeature.cx16])),
            Layer.provide(Layer.succeed(ExitObserver, (_vcpu, counts) => seen.push(counts))),
            Layer.provide(Layer.succeed(WakeObserver, (counts) => woken.push(counts)))
          )
        )
      )
    })

    it.effect("takes a spinning guest out when the run is interrupted, and gives the thread back", () =>
      Effect.gen(function*() {
        const threads = yield* VcpuThreads
        const machine = yield* tinyMachine({ code: [0xeb, 0xfe] })
        const fiber = yield* Effect.forkScoped(machine.vcpu.run)
        yield* Effect.repeat(Effect.sleep("1 millis"), { until: () => threads.counts().held > 0 })
        yield* Effect.sleep("50 millis")
        yield* Fiber.interrupt(fiber)
        assert.strictEqual(threads.counts().held, 0)
        assert.isAbove(threads.counts().idle, 0)
        const again = yield* Effect.flip(machine.vcpu.run)
        assert.strictEqual(again.operation, "KVM_RUN")
      }))

    it.effect("names what is wrong with its arguments", () =>
      Effect.gen(function*() {
        const hypervisor = yield* Hypervisor
        const vm = yield* hypervisor.createVm
        const unaligned = yield* Effect.flip(Effect.scoped(vm.addMemory(0x10, 0x1000)))
        assert.strictEqual(unaligned.operation, "KVM_SET_USER_MEMORY_REGION")
        yield* vm.addMemory(0, 0x2000)
        const overlap = yield* Effect.flip(Effect.scoped(vm.addMemory(0x1000, 0x1000)))
        assert.deepStrictEqual(overlap.errno, { number: 17, name: "EEXIST" })
        yield* vm.createVcpu(0)
        const twice = yield* Effect.flip(Effect.scoped(vm.createVcpu(0)))
        assert.strictEqual(twice.operation, "KVM_CREATE_VCPU")
        const none = yield* Effect.flip(Effect.scoped(vm.createVcpu(100_000)))
        assert.strictEqual(none.errno?.name, "EINVAL")
      }))
  })

  it.layer(kvmLayer("koffi"), { excludeTestServices: true })("on koffi", (it) => {
    it.effect("runs a guest with posted writes, shadowed reads, calls and a doorbell", () =>
      Effect.gen(function*() {
        const machine = yield* tinyMachine({
          state: realMode,
          ranges: [...PORTS, range({ base: 0x600, doorbells: [{ offset: 0, size: 1 }] })],
          code: asm(
            [0xba, ...word(SERIAL + 5), 0xec, 0xba, ...word(SERIAL), 0xee], // in al, SERIAL + 5; out SERIAL, al
            [0xba, ...word(0x600), 0xee], // out 0x600, al
            [0xba, ...word(CONTROL), 0xec], // in al, CONTROL
            END
          )
        })
        machine.backings[0]?.shadow?.fill(0x6b)
        yield* machine.runToEnd
        assert.sameMembers(machine.events, ["posted 0+0/1 0x6b", "doorbell 2#0", "read 1+0/1"])
      }))
  })
})
