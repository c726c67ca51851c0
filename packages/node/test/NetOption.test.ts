import { assert, describe, it } from "@effect/vitest"
import { decodeGuestConfig } from "@troupe/core/GuestConfig"
import * as Result from "effect/Result"
import { type NetChoice, parseNet } from "../src/cli/NetOption.ts"

const chosen = (argument: string, index = 0): NetChoice => {
  const choice = parseNet(argument, index)
  return typeof choice === "string" ? assert.fail(choice) : choice
}

describe("--net", () => {
  it("is a user-mode network or a TAP interface with options", () => {
    assert.deepStrictEqual(chosen("user,mac=02:00:00:00:00:01"), {
      spec: { macAddress: "02:00:00:00:00:01", enableBridge: false },
      backend: { kind: "user" }
    })
    assert.deepStrictEqual(chosen("tap=tap3,bridge=br0,mtu=9000,mac=02:00:00:00:00:02"), {
      spec: { macAddress: "02:00:00:00:00:02", enableBridge: true },
      backend: { kind: "tap", options: { name: "tap3", bridge: "br0", mtu: 9000 } }
    })
    assert.deepStrictEqual(chosen("tap").backend, { kind: "tap", options: {} })
  })

  it("makes up an address for each interface that is legal and always the same", () => {
    const choices = [chosen("user", 0), chosen("user", 1), chosen("tap", 2), chosen("tap=a", 3)]
    const config = {
      kernelType: "LINUX",
      kernel: new Uint8Array(1),
      cpus: 1,
      guestMemory: "16M",
      netDevices: choices.map(({ spec }) => spec)
    }
    assert.isTrue(Result.isSuccess(decodeGuestConfig(config)))
    assert.deepStrictEqual(chosen("tap", 2), choices[2])
  })

  it.each(["", "tup", "user=eth0", "user,mtu=9000", "tap,mtu=big", "tap,up", "mac=02:00:00:00:00:01"])(
    "says what is wrong with %j",
    (argument) => {
      const problem = parseNet(argument, 0)
      assert.include(problem, `--net ${argument}: `)
    }
  )
})
