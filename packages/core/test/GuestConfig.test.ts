import { blockClientFromBytes } from "@troupe/core/BlockClient"
import {
  BLOCK_BACKING_MAX,
  CPUS_MAX,
  decodeGuestConfig,
  DEFAULT_NET,
  GUEST_MEMORY_MAX,
  GUEST_MEMORY_MIN,
  netSpecs,
  parseBytes
} from "@troupe/core/GuestConfig"
import { PAGE_SIZE } from "@troupe/core/GuestMemory"
import * as Result from "effect/Result"
import * as fc from "fast-check"
import { assert, describe, it } from "vitest"

const kernel = Uint8Array.of(1)
const minimal = { kernelType: "LINUX", kernel, cpus: 1, guestMemory: "16M" }

const issuesOf = (input: unknown) => {
  const result = decodeGuestConfig(input)
  assert.isTrue(Result.isFailure(result), "the configuration should be refused")
  return Result.isFailure(result) ? result.failure.issues : []
}
const decoded = (input: unknown) => {
  const result = decodeGuestConfig(input)
  if (Result.isFailure(result)) assert.fail(JSON.stringify(result.failure.issues))
  return result.success
}

describe("GuestConfig", () => {
  it("gives every optional field its documented default", () => {
    const expected: Record<string, unknown> = {
      kernelType: "LINUX",
      kernel,
      cpus: 1,
      guestMemory: 16 * 2 ** 20,
      cmdline: "",
      cmdlineAdd: [],
      blockDevices: [],
      netDevices: [],
      defaultNet: false,
      virtioBalloon: false,
      virtioConsole: false,
      consolePorts: [],
      virtioGpu: false,
      virtioRng: false,
      virtioVsock: false,
      virtioSound: false,
      virtioSoundInput: false,
      vsockListeners: [],
      virtioMem: false,
      virtioTransport: "mmio",
      virtioPackedRing: false,
      bootProtocol: "auto"
    }
    assert.deepStrictEqual<unknown>(decoded(minimal), expected)
  })

  it("limits the console's ports, which differ in their names", () => {
    const fields = (input: object) => issuesOf({ ...minimal, ...input }).map((issue) => issue.field)
    assert.deepStrictEqual(fields({ consolePorts: ["a", "b", "a"] }), ["consolePorts[2]"])
    assert.deepStrictEqual(fields({ consolePorts: ["a", "b"], consolePortsMax: 2 }), ["consolePortsMax"])
    assert.deepStrictEqual(fields({ consolePorts: Array.from({ length: 31 }, (_, i) => `${i}`) }), ["consolePortsMax"])
    assert.strictEqual(decoded({ ...minimal, consolePorts: ["a"], consolePortsMax: 31 }).consolePortsMax, 31)
  })

  it("rounds memory up to whole pages, within its limits", () => {
    fc.assert(fc.property(fc.integer({ min: 0, max: 2 * GUEST_MEMORY_MAX }), (bytes) => {
      const result = decodeGuestConfig({ ...minimal, guestMemory: bytes })
      assert.strictEqual(Result.isSuccess(result), bytes >= GUEST_MEMORY_MIN && bytes <= GUEST_MEMORY_MAX)
      if (Result.isFailure(result)) return
      const memory = result.success.guestMemory
      assert.isTrue(memory % PAGE_SIZE === 0 && memory >= bytes && memory - bytes < PAGE_SIZE)
    }))
  })

  it("reads sizes with the suffixes of guest.cfg, and nothing else", () => {
    fc.assert(fc.property(fc.nat({ max: 1_000_000 }), fc.constantFrom("", "b", "k", "K", "M", "G"), (n, suffix) => {
      const shift = { "": 0, b: 0, k: 10, K: 10, M: 20, G: 30 }[suffix] ?? 0
      assert.strictEqual(parseBytes(`${n}${suffix}`), n * 2 ** shift)
    }))
    for (const text of ["", "M", "-1M", "1.5G", "1T", "1 M", "0x10", "999999999999999G"]) {
      assert.isUndefined(parseBytes(text), text)
    }
  })

  it("allows 1 to 255 processors", () => {
    fc.assert(fc.property(fc.oneof(fc.integer(), fc.double(), fc.integer({ min: -2, max: 300 })), (cpus) => {
      const legal = Number.isInteger(cpus) && cpus >= 1 && cpus <= CPUS_MAX
      assert.strictEqual(Result.isSuccess(decodeGuestConfig({ ...minimal, cpus })), legal)
    }))
  })

  it("names the field, the rule and the value of everything that is wrong at once", () => {
    const issues = issuesOf({ ...minimal, cpus: 0, guestMemory: -1, virtioRng: "yes" })
    assert.deepStrictEqual(issues.map((issue) => issue.field).toSorted(), ["cpus", "guestMemory", "virtioRng"])
    for (const issue of issues) assert.isNotEmpty(issue.rule)
    assert.strictEqual(issues.find((issue) => issue.field === "cpus")?.value, "0")
    const texts = issuesOf({ ...minimal, cpus: 0, guestMemory: "1K" })
    assert.deepStrictEqual(texts.map((issue) => issue.field), ["cpus", "guestMemory"])
  })

  it.each(["kernelType", "kernel", "cpus", "guestMemory"])("requires %s", (field) => {
    const rest = Object.fromEntries(Object.entries(minimal).filter(([name]) => name !== field))
    assert.deepStrictEqual(issuesOf(rest).map((issue) => issue.field), [field])
  })

  it("refuses a field that it does not know", () => {
    assert.deepStrictEqual(issuesOf({ ...minimal, memory: "1G" }).map((issue) => issue.field), ["memory"])
  })

  it.each([
    ["kernelType", { kernelType: "ZIRCON" }],
    ["dtbOverlay", { dtbOverlay: kernel }],
    ["virtioGpu", { virtioGpu: true }],
    ["virtioSound", { virtioSound: true }],
    ["virtioSoundInput", { virtioSoundInput: true }]
  ])("decodes %s and refuses it, because it does not exist yet", (field, fields) => {
    const issues = issuesOf({ ...minimal, ...fields })
    assert.deepStrictEqual(issues.map((issue) => issue.field), [field])
    assert.include(issues[0]?.rule, "not exist yet")
  })

  it("refuses two listeners on one port", () => {
    const issues = issuesOf({ ...minimal, virtioVsock: true, vsockListeners: [{ port: 1 }, { port: 2 }, { port: 1 }] })
    assert.deepStrictEqual(issues, [{
      field: "vsockListeners[2].port",
      rule: "must differ from vsockListeners[0].port",
      value: "1"
    }])
  })

  it("refuses interfaces whose address is no station's, or another one's", () => {
    const net = (macAddress: string) => ({ macAddress, enableBridge: false })
    const issues = issuesOf({
      ...minimal,
      defaultNet: true,
      netDevices: [
        net("02:00:00:00:00:0a"),
        net("01:00:5e:00:00:01"),
        net("00:00:00:00:00:00"),
        net("02:00:00:00:00:0A"),
        net(DEFAULT_NET.macAddress)
      ]
    })
    assert.deepStrictEqual(issues.map(({ field }) => field), [
      "netDevices[1].macAddress",
      "netDevices[2].macAddress",
      "netDevices[3].macAddress",
      "defaultNet"
    ])
    assert.deepStrictEqual(issues.slice(2).map(({ rule }) => rule), [
      "must differ from netDevices[0].macAddress",
      "must differ from netDevices[4].macAddress"
    ])
    assert.deepStrictEqual(issuesOf({ ...minimal, netDevices: [net("02-00-00-00-00-0a")] }).map(({ field }) => field), [
      "netDevices[0].macAddress"
    ])
    const many = Array.from({ length: 32 }, (_, i) => net(`02:00:00:00:00:${(i + 16).toString(16)}`))
    assert.strictEqual(netSpecs(decoded({ ...minimal, netDevices: many })).length, 32)
    assert.deepStrictEqual(issuesOf({ ...minimal, netDevices: many, defaultNet: true }).map(({ field }) => field), [
      "defaultNet"
    ])
    assert.deepStrictEqual(netSpecs(decoded({ ...minimal, defaultNet: true })), [DEFAULT_NET])
  })

  it("checks disks: names, what goes with what, how deep images are", () => {
    const client = blockClientFromBytes("memory", new Uint8Array(512))
    const disk = (more: object = {}) => ({ id: "disk", mode: "READ_WRITE", format: "FILE", client, ...more })
    const fields = (...disks: ReadonlyArray<object>) =>
      issuesOf({ ...minimal, blockDevices: disks }).map(({ field }) => field)
    assert.strictEqual(decoded({ ...minimal, blockDevices: [disk()] }).blockDevices.length, 1)
    assert.deepStrictEqual(fields(disk(), disk(), disk({ id: "other" })), ["blockDevices[1].id"])
    assert.deepStrictEqual(fields(disk({ id: "" }), disk({ id: "x".repeat(21) }), disk({ id: "\u00e9" })), [
      "blockDevices[0].id",
      "blockDevices[1].id",
      "blockDevices[2].id"
    ])
    assert.deepStrictEqual(fields(disk({ client: "disk.img" })), ["blockDevices[0].client"])
    assert.deepStrictEqual(fields(disk({ volatileLimit: 1 })), ["blockDevices[0].volatileLimit"])
    const backing = (depth: number): object =>
      depth === 0 ? { client, format: "FILE" } : { client, format: "QCOW", backing: backing(depth - 1) }
    assert.deepStrictEqual(fields(disk({ backing: backing(0) })), ["blockDevices[0].backing"])
    assert.deepStrictEqual(fields(disk({ format: "QCOW", backing: { client, format: "FILE", backing: backing(0) } })), [
      "blockDevices[0].backing.backing"
    ])
    const deep = (depth: number) => ({ ...minimal, blockDevices: [disk({ format: "QCOW", backing: backing(depth) })] })
    assert.strictEqual(decoded(deep(BLOCK_BACKING_MAX - 1)).blockDevices.length, 1)
    assert.deepStrictEqual(issuesOf(deep(BLOCK_BACKING_MAX)).map(({ field }) => field), ["blockDevices[0].backing"])
  })

  it("never throws, whatever it is given", () => {
    fc.assert(fc.property(fc.anything(), (input) => {
      assert.isTrue(Result.isFailure(decodeGuestConfig(input)))
    }))
  })
})
