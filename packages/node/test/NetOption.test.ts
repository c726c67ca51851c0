import { assert, describe, it } from "@effect/vitest"
import { decodeGuestConfig } from "@troupe/core/GuestConfig"
import { allowPublic } from "@troupe/devices/net/user/NetPolicy"
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
      backend: { kind: "user", options: {} }
    })
    assert.deepStrictEqual(chosen("user,allow=public,forward=8080:80,forward=udp:0.0.0.0:0:53").backend, {
      kind: "user",
      options: {
        policy: allowPublic,
        forwards: [
          { protocol: "tcp", host: { address: "127.0.0.1", port: 8080 }, guestPort: 80 },
          { protocol: "udp", host: { address: "0.0.0.0", port: 0 }, guestPort: 53 }
        ]
      }
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

  const wrong = [
    ...["", "tup", "user=eth0", "user,mtu=9000", "tap,mtu=big", "tap,up", "mac=02:00:00:00:00:01", "user,allow=all"],
    ...["80", "80:0", "70000:80", "tcp:localhost:80:80", "1.2.3.4:5.6.7.8:80:80", ":80:80", "sctp:80:80", "80:"].map(
      (forward) => `user,forward=${forward}`
    )
  ]
  it.each(wrong)(
    "says what is wrong with %j",
    (argument) => {
      const problem = parseNet(argument, 0)
      assert.include(problem, `--net ${argument}: `)
    }
  )
})
