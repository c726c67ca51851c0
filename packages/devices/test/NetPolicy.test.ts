import { assert, describe, it } from "@effect/vitest"
import * as Effect from "effect/Effect"
import {
  allowNetworks,
  allowNothing,
  allowPublic,
  type NetConnection,
  type NetPolicy,
  redirect
} from "../src/net/user/NetPolicy.ts"

const connection = (address: string, more: Partial<NetConnection> = {}): NetConnection => ({
  protocol: "tcp",
  direction: "outgoing",
  source: { address: "10.0.2.15", port: 1 },
  destination: { address, port: 80 },
  ...more
})

const decisions = (policy: NetPolicy, connections: ReadonlyArray<NetConnection>) =>
  Effect.map(Effect.forEach(connections, policy), (decisions) => decisions.map(({ _tag }) => _tag))

const HOST_ONLY = [
  "127.0.0.1",
  "127.255.255.255",
  "0.0.0.0",
  "0.1.2.3",
  "169.254.169.254",
  "224.0.0.1",
  "255.255.255.255"
]
const PRIVATE = ["10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.1.1", "100.64.0.1", "198.18.0.1"]
const PUBLIC = ["192.0.2.1", "8.8.8.8", "172.32.0.1", "126.255.255.255", "128.0.0.0", "169.253.1.1", "223.255.255.255"]

describe("NetPolicy", () => {
  it.effect("keeps guests from what trusts the host alone, by default", () =>
    Effect.gen(function*() {
      const all = (addresses: ReadonlyArray<string>) => decisions(allowNetworks, addresses.map((at) => connection(at)))
      assert.deepStrictEqual(new Set(yield* all(HOST_ONLY)), new Set(["reset"]))
      assert.deepStrictEqual(new Set(yield* all([...PRIVATE, ...PUBLIC])), new Set(["allow"]))
      assert.deepStrictEqual(new Set(yield* all(["::1", "localhost", ""])), new Set(["reset"]))
    }))

  it.effect("keeps guests from the host's networks with allowPublic, and from everything with allowNothing", () =>
    Effect.gen(function*() {
      const ask = (policy: NetPolicy, addresses: ReadonlyArray<string>) =>
        decisions(policy, addresses.map((at) => connection(at)))
      assert.deepStrictEqual(new Set(yield* ask(allowPublic, [...HOST_ONLY, ...PRIVATE])), new Set(["reset"]))
      assert.deepStrictEqual(new Set(yield* ask(allowPublic, PUBLIC)), new Set(["allow"]))
      assert.deepStrictEqual(new Set(yield* ask(allowNothing, PUBLIC)), new Set(["reset"]))
      const granted = [
        connection("10.0.2.3", { service: "dns" }),
        connection("10.0.2.15", { direction: "incoming" })
      ]
      assert.deepStrictEqual(yield* decisions(allowNetworks, granted), ["allow", "allow"])
      assert.deepStrictEqual(yield* decisions(allowPublic, granted), ["allow", "allow"])
      assert.deepStrictEqual(yield* decisions(allowNothing, granted), ["reset", "allow"])
    }))

  it("names where a connection goes instead", () => {
    assert.deepStrictEqual(redirect("127.0.0.1", 80), { _tag: "redirect", to: { address: "127.0.0.1", port: 80 } })
  })
})
