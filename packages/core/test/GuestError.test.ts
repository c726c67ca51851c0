import { assert, describe, it } from "@effect/vitest"
import { GuestError, GuestErrorCode, GuestErrorReason } from "@troupe/core/GuestError"
import * as Effect from "effect/Effect"
import * as Schema from "effect/Schema"
import { readFileSync } from "node:fs"

const json = Schema.toCodecJson(GuestError)

describe("GuestError", () => {
  it("has the 15 values of the protocol file with their numbers", () => {
    const protocol = readFileSync(new URL("./protocol/guest.fidl.txt", import.meta.url), "utf8")
    const values = Object.fromEntries(
      Array.from(protocol.matchAll(/^([A-Z_]+) = (\d+);$/gm), ([, name, number]) => [name ?? "", Number(number)])
    )
    assert.strictEqual(Object.keys(values).length, 15)
    assert.deepStrictEqual<unknown>({ ...GuestErrorCode }, values)
  })

  it.effect.prop(
    "survives JSON with all of its context, and says what was done",
    { reason: GuestErrorReason },
    ({ reason }) =>
      Effect.sync(() => {
        const error = new GuestError({ reason })
        const back = Schema.decodeUnknownSync(json)(JSON.parse(JSON.stringify(Schema.encodeSync(json)(error))))
        assert.instanceOf(back, GuestError)
        assert.deepStrictEqual(Schema.encodeSync(json)(back), Schema.encodeSync(json)(error))
        assert.strictEqual(back.code, GuestErrorCode[reason._tag])
        assert.include(error.message, reason._tag)
        assert.include(error.message, reason.operation)
        assert.include(error.message, reason.detail)
      })
  )
})
