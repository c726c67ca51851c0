/** The `ioctl` numbers and constants of `linux/if_tun.h`, `linux/if.h` and `linux/sockios.h`, by the headers' names. */
import type { Ioctl } from "../internal/ForeignFunctions.ts"

const TUN_TYPE = 0x54
const IOC_WRITE = 1
const SIZE_OF_INT = 4

/** `_IOW('T', number, int)`. */
const tun = (name: string, number: number): Ioctl => ({
  name,
  request: ((IOC_WRITE << 30) | (SIZE_OF_INT << 16) | (TUN_TYPE << 8) | number) >>> 0
})

/** What is asked of a TAP interface, and of interfaces in general. */
export const NetIoctl = {
  TUNSETIFF: tun("TUNSETIFF", 202),
  TUNSETOFFLOAD: tun("TUNSETOFFLOAD", 208),
  TUNSETVNETHDRSZ: tun("TUNSETVNETHDRSZ", 216),
  TUNSETVNETLE: tun("TUNSETVNETLE", 220),
  SIOCGIFFLAGS: { name: "SIOCGIFFLAGS", request: 0x8913 },
  SIOCSIFFLAGS: { name: "SIOCSIFFLAGS", request: 0x8914 },
  SIOCGIFMTU: { name: "SIOCGIFMTU", request: 0x8921 },
  SIOCSIFMTU: { name: "SIOCSIFMTU", request: 0x8922 },
  SIOCGIFINDEX: { name: "SIOCGIFINDEX", request: 0x8933 },
  SIOCBRADDIF: { name: "SIOCBRADDIF", request: 0x89a2 }
} as const

/** Flags and sizes. */
export const NetValue = {
  IFF_UP: 0x1,
  IFF_TAP: 0x2,
  IFF_NO_PI: 0x1000,
  IFF_VNET_HDR: 0x4000,
  TUN_F_CSUM: 0x1,
  TUN_F_TSO4: 0x2,
  TUN_F_TSO6: 0x4,
  TUN_F_USO4: 0x20,
  TUN_F_USO6: 0x40,
  /** Bytes of an interface's name with its NUL. */
  IFNAMSIZ: 16
} as const

/** Size of `struct ifreq` in bytes (64-bit Linux): a name, and a union. */
export const IFREQ_SIZE = 40
/** Where in `struct ifreq` the union begins. */
export const IFREQ_VALUE = 16
/** Size of `struct iovec` in bytes: an address, and a length. */
export const IOVEC_SIZE = 16
/** The most `struct iovec` of one call (`UIO_MAXIOV`). */
export const IOVEC_MAX = 1024
