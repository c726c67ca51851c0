import { assert, describe, it } from "@effect/vitest"
import { RESET_PORT, RESET_VALUE } from "@troupe/core/acpi/PowerPorts"
import { HIGH_MEMORY_ADDRESS } from "@troupe/core/boot/MachineLayout"
import { resetVector } from "@troupe/core/boot/ResetVector"

/** What the code writes to ports until it halts, by the few instructions that it may use. */
const portWrites = (code: Uint8Array): ReadonlyArray<readonly [port: number, value: number]> => {
  const writes: Array<readonly [number, number]> = []
  let al = 0
  let dx = 0
  for (let ip = 0; ip < code.length;) {
    switch (code[ip]) {
      case 0xb0:
        al = code[ip + 1]!
        ip += 2
        break
      case 0xba:
        dx = code[ip + 1]! | (code[ip + 2]! << 8)
        ip += 3
        break
      case 0xee:
        writes.push([dx, al])
        ip++
        break
      case 0xf4:
        return writes
      default:
        throw new Error(`unexpected opcode 0x${code[ip]?.toString(16)}`)
    }
  }
  throw new Error("the code does not halt")
}

describe("reset vector", () => {
  it("is where F000:FFF0 points, and ends below 1 MiB", () => {
    assert.strictEqual(resetVector.guestAddress, 0xf000 * 16 + 0xfff0)
    assert.isAtMost(resetVector.guestAddress + resetVector.size, HIGH_MEMORY_ADDRESS)
  })

  it("writes the reset value to the reset register and halts", () => {
    assert.deepStrictEqual(portWrites(resetVector.bytes), [[RESET_PORT, RESET_VALUE]])
    // A processor that is woken after the halt goes back to it.
    assert.deepStrictEqual([...resetVector.bytes.subarray(-3)], [0xf4, 0xeb, 0xfd])
  })
})
