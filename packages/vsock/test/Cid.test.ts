import { ANY_CID, DEFAULT_GUEST_CID, GuestCid, HOST_CID, isGuestCid } from "@troupe/vsock"
import * as Schema from "effect/Schema"
import * as fc from "fast-check"
import { assert, describe, it } from "vitest"

describe("Cid", () => {
  it("keeps the reserved context IDs from guests", () => {
    for (const reserved of [-1, 0, 1, HOST_CID, ANY_CID, ANY_CID + 1, 3.5]) assert.isFalse(isGuestCid(reserved))
    assert.isTrue(isGuestCid(DEFAULT_GUEST_CID))
  })

  it("decodes exactly the context IDs that a guest may have", () => {
    fc.assert(
      fc.property(fc.oneof(fc.integer(), fc.double(), fc.integer({ min: ANY_CID - 3, max: ANY_CID + 3 })), (cid) => {
        assert.strictEqual(Schema.is(GuestCid)(cid), isGuestCid(cid))
      })
    )
  })
})
