/** Context IDs: the addresses of hosts and guests among vsock peers (`vsock.fidl`; virtio 1.3, section 5.10.4). */
import * as Schema from "effect/Schema"

/** The context ID of the host. */
export const HOST_CID = 2
/** The first context ID that a guest is given. */
export const DEFAULT_GUEST_CID = 3
/** The context ID that means any, and is nobody's. */
export const ANY_CID = 0xffff_ffff

/** Context IDs below this are reserved: the hypervisor, loopback and the host have them. */
const FIRST_GUEST_CID = DEFAULT_GUEST_CID

/** Whether a guest may have this context ID: a 32-bit number that is not reserved. */
export const isGuestCid = (cid: number): boolean => Number.isInteger(cid) && cid >= FIRST_GUEST_CID && cid < ANY_CID

/** The context ID of a guest. */
export const GuestCid = Schema.Int.check(Schema.isBetween({ minimum: FIRST_GUEST_CID, maximum: ANY_CID - 1 }))
  .pipe(Schema.brand("GuestCid"))
/** The context ID of a guest. */
export type GuestCid = typeof GuestCid.Type
