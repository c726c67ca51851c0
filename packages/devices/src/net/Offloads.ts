/** Which offloads a frame needs. */
import { Offload } from "@troupe/core/NetBackend"
import { FRAME_NEEDS_CHECKSUM, GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, type NetFrame } from "@troupe/core/NetFrame"

/** A bit that no {@link Offload} has: of frames that need something that nobody offers. */
export const OFFLOAD_UNKNOWN = 0x100

/** The offload of a type of segmentation: {@link OFFLOAD_UNKNOWN} for one that nobody offers, 0 for none. */
export const segmentationOf = (gsoType: number): number => {
  switch (gsoType) {
    case GSO_NONE:
      return 0
    case GSO_TCPV4:
      return Offload.TSO4
    case GSO_TCPV6:
      return Offload.TSO6
    case GSO_UDP_L4:
      return Offload.USO
    default:
      return OFFLOAD_UNKNOWN
  }
}

/** The offloads that a frame needs, bits of {@link Offload} or {@link OFFLOAD_UNKNOWN}. */
export const offloadsOf = (frame: NetFrame): number =>
  ((frame.flags & FRAME_NEEDS_CHECKSUM) === 0 ? 0 : Offload.CHECKSUM) | segmentationOf(frame.gsoType)
