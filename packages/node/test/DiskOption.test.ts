import { assert, describe, it } from "@effect/vitest"
import { decodeGuestConfig } from "@troupe/core/GuestConfig"
import * as Result from "effect/Result"
import * as fc from "fast-check"
import { parseDisk } from "../src/cli/DiskOption.ts"

const shown = (argument: string) => {
  const { backing, client, format, id, mode } = parseDisk(argument)
  return [client.name, id, mode, format, ...(backing === undefined ? [] : [backing.client.name, backing.format])]
}

describe("--disk", () => {
  it("is a path with options behind it", () => {
    assert.deepStrictEqual(shown("a.img"), ["a.img", "a.img", "READ_WRITE", "FILE"])
    assert.deepStrictEqual(shown("a.img,ro"), ["a.img", "a.img", "READ_ONLY", "FILE"])
    assert.deepStrictEqual(shown("a,b.img,volatile,qcow2"), ["a,b.img", "a,b.img", "VOLATILE_WRITE", "QCOW"])
    assert.deepStrictEqual(shown("a.img,id=root,rw,raw"), ["a.img", "root", "READ_WRITE", "FILE"])
    assert.deepStrictEqual(shown("a,qcow2,backing=b"), ["a", "a", "READ_WRITE", "QCOW", "b", "FILE"])
    assert.deepStrictEqual(shown("a,qcow2,backing-qcow2=b"), ["a", "a", "READ_WRITE", "QCOW", "b", "QCOW"])
    assert.deepStrictEqual(shown("ro"), ["ro", "ro", "READ_WRITE", "FILE"])
  })

  it("makes up an id that a guest can be told, of any path", () => {
    fc.assert(
      fc.property(fc.string({ minLength: 1, unit: "binary", size: "medium" }), (path) => {
        const config = decodeGuestConfig({
          kernelType: "LINUX",
          kernel: new Uint8Array(1),
          cpus: 1,
          guestMemory: "2M",
          blockDevices: [parseDisk(`${path},ro`)]
        })
        assert.isTrue(Result.isSuccess(config))
      })
    )
    assert.strictEqual(parseDisk("/var/lib/machines/a-long-name.qcow2").id, "nes/a-long-name.qcow2".slice(-20))
  })
})
