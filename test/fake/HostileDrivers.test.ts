// Every virtio device against hostile drivers, on both transports and both formats of queues: a small part of what `npm run fuzz` plays.
import { assert, describe, it } from "@effect/vitest"
import { Choice } from "@troupe/core/testing/drivers/HostileChoice"
import { entropyProfile } from "@troupe/core/testing/drivers/HostileProfiles"
import { hostileScript } from "@troupe/core/testing/drivers/HostileScript"
import { DescriptorChain } from "@troupe/devices/virtio/DescriptorChain"
import { makeFeatures } from "@troupe/devices/virtio/Features"
import type { VirtioBehaviour } from "@troupe/devices/virtio/VirtioDevice"
import { virtioOn } from "@troupe/devices/virtio/VirtioTransport"
import type { Virtqueue } from "@troupe/devices/virtio/Virtqueue"
import * as Effect from "effect/Effect"
import type { MakeSubject } from "./hostile/HostileDevices.ts"
import { HOSTILE_MEMORY, HostileRig, hostileStatistics } from "./hostile/HostileRig.ts"
import { describeFailure, HOSTILE_DEVICES, playCases, rigOf, scriptOf } from "./hostile/HostileRun.ts"

/** Rigs on both transports, whose correct drivers use both formats of queues. */
const RUNS = [0, 1024, 768, 1792]
const CASES_OF_A_RUN = 100

describe.each(HOSTILE_DEVICES)("Hostile drivers of the device %s", (device) => {
  it("leave it legal, bounded and usable", () => {
    const before = { ...hostileStatistics }
    for (const first of RUNS) {
      const failure = playCases(device, first, CASES_OF_A_RUN)
      if (failure !== undefined) assert.fail(describeFailure(failure))
    }
    // The drivers got far, and not everything that they did was allowed.
    assert.isAbove(hostileStatistics.chains - before.chains, RUNS.length * CASES_OF_A_RUN / 2)
    assert.isAbove(hostileStatistics.needsReset - before.needsReset, 20)
  })
})

describe("Hostile drivers", () => {
  it("do the same with the same number", () => {
    for (const device of HOSTILE_DEVICES) {
      assert.deepStrictEqual(scriptOf(device, 17), scriptOf(device, 17))
      assert.notDeepEqual(scriptOf(device, 17), scriptOf(device, 18))
    }
    assert.deepStrictEqual(RUNS.map((seed) => rigOf(seed).choices), [
      { transport: "mmio", packed: false },
      { transport: "mmio", packed: true },
      { transport: "pci", packed: false },
      { transport: "pci", packed: true }
    ])
  })
})

/** A device with one queue, whose handling of a chain a test gives. */
const brokenDevice = (
  handle: (chain: DescriptorChain, queue: Virtqueue) => void,
  change: Partial<VirtioBehaviour> & { readonly restless?: boolean } = {}
): MakeSubject =>
(choices) =>
  Effect.sync(() => ({
    profile: {
      ...entropyProfile,
      request: (choice) => [
        { length: 8, writable: false, bytes: choice.bytes(8) },
        { length: 1 + choice.below(64), writable: true }
      ]
    },
    device: virtioOn({ virtioTransport: choices.transport, virtioPackedRing: true }, {
      deviceId: 42,
      features: makeFeatures(),
      queueSizes: [16],
      config: new Uint8Array(0),
      start: () =>
        Effect.sync((): VirtioBehaviour => {
          const chain = new DescriptorChain(16)
          let queue: Virtqueue | undefined
          return {
            activate: ({ queues }) => {
              queue = queues[0]
            },
            notify: () => {
              if (queue === undefined) return false
              while (queue.take(chain)) {
                handle(chain, queue)
                if (chain.head >= 0) queue.complete(chain, 0)
              }
              return queue.resumeNotifications() || change.restless === true
            },
            reset: () => {
              queue = undefined
              return true
            },
            ...change
          }
        })
    }, { name: "broken0" }),
    host: () => Effect.void,
    background: Effect.never,
    pluggable: false,
    features: { low: 0xffff_ffff, high: 0 },
    request: (address: number) => ({
      queue: 0,
      bytes: [0, 0, 0, 0, 0, 0, 0, 0],
      buffers: [
        { address, length: 8, writable: false },
        { address: address + 8, length: 1, writable: true }
      ]
    }),
    calm: () => {}
  }))

/** The first thing that is found in a device in so many cases. */
const findings = (make: MakeSubject, cases = 300): ReadonlyArray<string> => {
  const rig = new HostileRig(make, { transport: "mmio", packed: false })
  for (let seed = 0; seed < cases; seed++) {
    const choice = new Choice(seed)
    try {
      rig.play(hostileScript(rig.subject.profile, { memory: HOSTILE_MEMORY }, choice, 30, 0.5))
    } catch (cause) {
      const reasons: Array<string> = []
      for (let error = cause; error instanceof Error; error = error.cause) reasons.push(error.message)
      return [reasons.join(": ")]
    }
  }
  return []
}

describe("A device that", () => {
  const word = new Uint8Array(8)
  const again = new Uint8Array(8)

  it("does nothing wrong is not blamed", () => {
    assert.deepStrictEqual(findings(brokenDevice((chain) => void chain.read(0, word))), [])
  })

  it("trusts that a request is complete is found", () => {
    const found = findings(brokenDevice((chain) => {
      if (chain.read(0, word) < 8) throw new Error("no header")
    }))
    assert.include(found.join("\n"), "no header")
  })

  it("reads a header twice is found", () => {
    const found = findings(brokenDevice((chain) => {
      const first = chain.read(0, word)
      chain.read(0, again)
      if (again.some((byte, i) => i < first && byte !== word[i])) throw new Error("another header")
    }))
    assert.include(found.join("\n"), "another header")
  })

  it("allocates what its guest asks for is found", () => {
    const found = findings(brokenDevice((chain) => void new Uint8Array(Math.max(1, chain.readableBytes) * 64)))
    assert.include(found.join("\n"), "bytes allocated")
  })

  it("works without end is found", () => {
    const found = findings(brokenDevice((chain) => {
      for (let i = 0; i < chain.readableBytes; i++) chain.read(i, word)
    }))
    assert.include(found.join("\n"), "steps")
  })

  it("does not come to rest is found", () => {
    const found = findings(brokenDevice(() => {}, { restless: true }), 20)
    assert.include(found.join("\n"), "does not come to rest")
  })

  it("is stuck after a reset is found", () => {
    let stuck = false
    const found = findings(
      brokenDevice(() => {}, {
        writeConfig: () => {},
        reset: () => {
          stuck = !stuck
          return stuck
        }
      }),
      20
    )
    assert.include(found.join("\n"), "does not come out of its reset")
  })

  it("loses a request is found", () => {
    let count = 0
    const found = findings(
      brokenDevice((chain) => {
        if (++count % 7 === 0) chain.clear()
      }),
      100
    )
    assert.include(found.join("\n"), "does not answer a correct driver")
  })
})
