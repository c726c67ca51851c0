/** The table language of C structures: every accessor reads back what was written and touches its own bytes only. */
import { assert, describe, it } from "@effect/vitest"
import * as fc from "fast-check"
import * as KvmCpuState from "../src/kvm/KvmCpuState.ts"
import { KvmRun } from "../src/kvm/KvmRun.ts"
import * as KvmStructs from "../src/kvm/KvmStructs.ts"
import {
  anonymousUnion,
  array,
  type ArrayField,
  type BigField,
  bytes,
  type BytesField,
  embed,
  flexible,
  group,
  type NumberField,
  s16,
  struct,
  type StructView,
  u16,
  u32,
  u64,
  u8,
  union
} from "../src/kvm/Struct.ts"

type Leaf = NumberField | BigField | BytesField

/** All members of a structure that are not structures or arrays, at any depth. */
const leavesOf = (fields: object): ReadonlyArray<Leaf> =>
  Object.values(fields).flatMap((field: Leaf | ArrayField<unknown> | { readonly type?: object }) => {
    if (typeof field.type !== "string") return leavesOf(field)
    return field.type === "array" ? [] : [field]
  })

const structs = [...Object.values(KvmCpuState), ...Object.values(KvmStructs), KvmRun]
const members = structs.flatMap((struct) =>
  leavesOf(struct.fields).filter((field) => field.size > 0).map((field) => ({ struct, field }))
)

/** Writes `value` cut to the member's width; gives what must be read back. */
const write = (field: Leaf, view: StructView, value: bigint, base: number): string => {
  switch (field.type) {
    case "u64":
      field.set(view, value, base)
      return `${BigInt.asUintN(64, value)}`
    case "s64":
      field.set(view, value, base)
      return `${BigInt.asIntN(64, value)}`
    case "bytes":
      field.of(view, base).fill(Number(value & 0xffn))
      return `${Number(value & 0xffn)}`
    case "s16":
    case "s32":
      field.set(view, Number(BigInt.asIntN(field.size * 8, value)), base)
      return `${BigInt.asIntN(field.size * 8, value)}`
    default:
      field.set(view, Number(BigInt.asUintN(field.size * 8, value)), base)
      return `${BigInt.asUintN(field.size * 8, value)}`
  }
}

const read = (field: Leaf, view: StructView, base: number): string => {
  if (field.type !== "bytes") return `${field.get(view, base)}`
  const bytes = field.of(view, base)
  assert.isTrue(bytes.every((byte) => byte === bytes[0]))
  return `${bytes[0]}`
}

describe("struct", () => {
  it("gives accessors that read back what was written and touch their own bytes only", () => {
    fc.assert(
      fc.property(
        fc.constantFrom(...members),
        fc.bigInt(-(2n ** 63n), 2n ** 64n - 1n),
        fc.nat(24),
        fc.nat(255),
        ({ field, struct }, value, base, background) => {
          const view = new DataView(new ArrayBuffer(struct.size + 32), 8, struct.size + 24)
          new Uint8Array(view.buffer).fill(background)
          const expected = write(field, view, value, base)
          assert.strictEqual(read(field, view, base), expected)
          const start = 8 + base + field.offset
          const around = new Uint8Array(view.buffer).filter((_, at) => at < start || at >= start + field.size)
          assert.isTrue(around.every((byte) => byte === background))
        }
      ),
      { numRuns: 3000 }
    )
  })

  it("reads and writes 64-bit members as numbers, exactly to 2^53 - 1", () => {
    const { fields, make } = struct("numbers", { a: u64, b: u64 })
    fc.assert(
      fc.property(fc.maxSafeNat(), (value) => {
        const view = make()
        fields.b.setNumber(view, value)
        assert.strictEqual(fields.b.getNumber(view), value)
        assert.strictEqual(fields.b.get(view), BigInt(value))
        assert.strictEqual(fields.a.get(view), 0n)
      })
    )
  })

  it("lays members out as C does", () => {
    const inner = struct("inner", { tag: u8, value: u64 })
    const outer = struct("outer", {
      first: u8,
      half: u16,
      nested: group({ a: u8, b: u32 }),
      either: union({ small: u16, large: u64 }),
      hidden: anonymousUnion({ x: group({ y: u16, z: u32 }), raw: bytes(3) }),
      inner: embed(inner),
      list: array(u16, 3),
      signed: s16,
      tail: flexible(embed(inner))
    })
    assert.strictEqual(inner.size, 16)
    assert.deepStrictEqual(outer.leaves.map(({ offset, path, size }) => `${path} ${offset} ${size}`), [
      "first 0 1",
      "half 2 2",
      "nested.a 4 1",
      "nested.b 8 4",
      "either.small 16 2",
      "either.large 16 8",
      "x.y 24 2",
      "x.z 28 4",
      "raw 24 3",
      "inner.tag 32 1",
      "inner.value 40 8",
      "list 48 6",
      "signed 54 2",
      "tail 56 0"
    ])
    assert.strictEqual(outer.size, 56)
    const view = outer.make(2)
    assert.strictEqual(view.byteLength, 56 + 2 * 16)
    const { tail } = outer.fields
    assert.strictEqual(tail.at(1), 72)
    tail.element.value.set(view, 5n, tail.at(1))
    assert.strictEqual(view.getBigUint64(80, true), 5n)
    outer.fields.signed.set(view, -2)
    assert.strictEqual(outer.fields.signed.get(view), -2)
  })
})
