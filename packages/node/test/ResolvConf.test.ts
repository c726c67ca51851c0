import { assert, describe, it } from "@effect/vitest"
import { mkdtempSync, rmSync, utimesSync, writeFileSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { makeResolvConf, parseResolvConf } from "../src/net/ResolvConf.ts"

describe("ResolvConf", () => {
  it("lists the first three name servers, and nothing else", () => {
    const text = [
      "# nameserver 192.0.2.9",
      "search example.org",
      "nameserver 127.0.0.53",
      "  nameserver\t2001:db8::1 ",
      "nameserver fe80::1%eth0",
      "nameserver name.example",
      "nameserver",
      "nameserver 192.0.2.1",
      "nameserver 192.0.2.2",
      "options edns0"
    ].join("\n")
    assert.deepStrictEqual(parseResolvConf(text), [
      { address: "127.0.0.53", port: 53 },
      { address: "2001:db8::1", port: 53 },
      { address: "fe80::1%eth0", port: 53 }
    ])
  })

  it("reads the file again when it has changed, and does without it", () => {
    const folder = mkdtempSync(join(tmpdir(), "resolv-"))
    const path = join(folder, "resolv.conf")
    const servers = makeResolvConf(path)
    assert.deepStrictEqual(servers(), [])
    writeFileSync(path, "nameserver 192.0.2.1\n")
    assert.deepStrictEqual(servers().map(({ address }) => address), ["192.0.2.1"])
    writeFileSync(path, "nameserver 192.0.2.2\n")
    utimesSync(path, 1, 1)
    assert.deepStrictEqual(servers().map(({ address }) => address), ["192.0.2.2"])
    rmSync(folder, { recursive: true })
    assert.deepStrictEqual(servers(), [])
  })
})
