/** What a hostile driver knows of each type of device: what its requests look like (virtio 1.3, chapter 5). */
import { type Choice, fields } from "./HostileChoice.ts"
import {
  HOSTILE_MEM_ADDRESS,
  HOSTILE_MEM_BLOCK,
  HOSTILE_MEM_BLOCKS,
  type HostileBuffer,
  type HostileProfile
} from "./HostileScript.ts"

const readable = (bytes: ReadonlyArray<number>, length = bytes.length): HostileBuffer => ({
  length,
  writable: false,
  bytes
})
const writable = (length: number): HostileBuffer => ({ length, writable: true })

const some = (choice: Choice, most: number, make: () => HostileBuffer): ReadonlyArray<HostileBuffer> =>
  Array.from({ length: 1 + choice.below(most) }, make)

/** The entropy device: buffers to fill. */
export const entropyProfile: HostileProfile = {
  name: "entropy",
  queues: 1,
  configSize: 0,
  request: (choice) => some(choice, 4, () => writable(choice.of([1, 7, 64, 4096, 0x1_0000])))
}

/** The balloon: page numbers, statistics, free pages. */
export const balloonProfile: HostileProfile = {
  name: "balloon",
  queues: 5,
  configSize: 16,
  request: (choice, queue) => {
    switch (queue) {
      case 0:
      case 1: {
        const first = choice.below(0x120)
        const numbers = Array.from(
          { length: 1 + choice.below(24) },
          (_, i) => choice.chance(0.9) ? (first + i) & 0xff : choice.number()
        )
        return [readable(fields(...numbers.map((page) => [4, page] as const)))]
      }
      case 2:
        return [
          readable(
            Array.from({ length: 1 + choice.below(5) }, () => fields([2, choice.below(16)], [8, choice.any32()])).flat()
          )
        ]
      default:
        return some(choice, 4, () => ({ length: 4096 * (1 + choice.below(8)), writable: true, page: true }))
    }
  }
}

/** The memory device: plug, unplug, unplug all, state. */
export const memProfile: HostileProfile = {
  name: "mem",
  queues: 1,
  configSize: 56,
  request: (choice) => {
    const address = choice.chance(0.9)
      ? HOSTILE_MEM_ADDRESS + choice.below(HOSTILE_MEM_BLOCKS + 1) * HOSTILE_MEM_BLOCK
      : HOSTILE_MEM_ADDRESS + choice.number()
    const count = choice.chance(0.9) ? 1 + choice.below(4) : choice.number()
    const type = choice.chance(0.95) ? choice.below(4) : choice.number()
    return [readable(fields([2, type], [6, 0], [8, address], [2, count], [6, 0])), writable(10)]
  }
}

/** The block device. */
export const blockProfile: HostileProfile = {
  name: "block",
  queues: 1,
  configSize: 60,
  request: (choice) => {
    const type = choice.of([0, 0, 1, 1, 4, 8, 11, 13, choice.number()])
    const sector = choice.chance(0.85) ? choice.below(0x80) : choice.number() * choice.of([1, 2 ** 20, 2 ** 31])
    const header = readable(fields([4, type], [4, 0], [8, sector]))
    const status = writable(1)
    const sectors = () => 512 * choice.of([1, 2, 8, 32])
    switch (type) {
      case 0:
        return [header, ...some(choice, 3, () => writable(sectors())), status]
      case 1:
        return [header, ...some(choice, 3, () => readable(choice.bytes(8), sectors())), status]
      case 8:
        return [header, writable(20), status]
      case 11:
      case 13:
        return [
          header,
          ...some(
            choice,
            3,
            () =>
              readable(
                fields([8, choice.below(0x90)], [4, choice.chance(0.9) ? choice.below(0x20) : choice.number()], [
                  4,
                  choice.below(3)
                ])
              )
          ),
          status
        ]
      default:
        return [header, status]
    }
  }
}

const mac = (choice: Choice): Array<number> =>
  choice.of([[0xff, 0xff, 0xff, 0xff, 0xff, 0xff], [2, 0, 0, 0, 0, 1], choice.bytes(6)])

/** An Ethernet frame that may well be IPv4, IPv6 or ARP, with lengths that may be wrong. */
const frame = (choice: Choice): Array<number> => {
  const payload = choice.below(40)
  const kind = choice.below(5)
  const type = kind === 0 ? [0x08, 0x06] : kind === 1 ? [0x86, 0xdd] : kind === 2 ? choice.bytes(2) : [0x08, 0x00]
  const ip = type[0] === 0x08 && type[1] === 0x00
    ? [
      choice.of([0x45, 0x45, 0x4f, 0x40, choice.below(0x100)]),
      0,
      ...(choice.chance(0.8) ? [0, 20 + 20 + payload] : choice.bytes(2)),
      ...choice.bytes(2),
      choice.of([0x40, 0, 0x20, 0x3f]),
      0,
      64,
      choice.of([1, 6, 17, choice.below(0x100)]),
      0,
      0,
      10,
      0,
      0,
      choice.below(20),
      10,
      0,
      choice.below(3),
      choice.below(4)
    ]
    : choice.bytes(40)
  const layer4 = [...choice.bytes(2), ...choice.of([[0, 53], [0, 67], [0, 80], choice.bytes(2)]), ...choice.bytes(16)]
  return [...mac(choice), ...mac(choice), ...type, ...ip, ...layer4, ...choice.bytes(payload)]
}

/** The network device: frames in both directions, and commands. */
export const netProfile: HostileProfile = {
  name: "net",
  queues: 3,
  configSize: 12,
  request: (choice, queue) => {
    if (queue === 0) return some(choice, 2, () => writable(choice.of([12, 60, 1526, 4096, 0x1_0000])))
    if (queue === 2) {
      const [kind, command] = choice.of([[0, choice.below(7)], [1, 0], [1, 1], [2, 0], [4, 0], [5, 0], [
        choice.below(8),
        choice.below(8)
      ]])
      const body = kind === 1 && command === 0
        ? [...fields([4, choice.below(4)]), ...choice.bytes(6 * choice.below(4)), ...fields([4, choice.number()])]
        : choice.bytes(choice.of([1, 2, 6, 8]))
      return [readable([kind, command]), readable(body), writable(1)]
    }
    const content = frame(choice)
    const header = choice.chance(0.5)
      ? fields([12, 0])
      : [
        choice.below(4),
        choice.of([0, 1, 3, 4, 5, 0x81, choice.below(0x100)]),
        ...fields([2, choice.of([0, 14, 34, 54, 66, choice.number()])], [
          2,
          choice.of([0, 1, 100, 1448, choice.number()])
        ]),
        ...fields([2, choice.of([0, 14, 34, choice.number()])], [2, choice.of([0, 6, 16, choice.number()])], [2, 0])
      ]
    const length = choice.chance(0.7) ? content.length : content.length + choice.of([100, 1400, 9000, 0x1_0000])
    return choice.chance(0.5)
      ? [readable([...header, ...content], 12 + length)]
      : [readable(header), readable(content, length)]
  }
}

/** The console: terminals and messages about them. */
export const consoleProfile: HostileProfile = {
  name: "console",
  queues: 6,
  configSize: 12,
  request: (choice, queue) => {
    if (queue === 3) {
      return [
        readable(fields(
          [4, choice.chance(0.8) ? choice.below(4) : choice.number()],
          [2, choice.chance(0.9) ? choice.below(9) : choice.number()],
          [2, choice.below(3)]
        ))
      ]
    }
    if (queue % 2 === 0) return some(choice, 3, () => writable(choice.of([1, 8, 64, 4096])))
    return some(choice, 3, () => readable(choice.bytes(choice.below(20)), choice.of([0, 1, 20, 4096, 0x1_0000])))
  }
}

/** The socket device. */
export const vsockProfile: HostileProfile = {
  name: "vsock",
  queues: 3,
  configSize: 8,
  request: (choice, queue) => {
    if (queue === 0) return [writable(44), writable(choice.of([0, 1, 64, 4096, 0x1_0000]))]
    if (queue === 2) return [writable(8)]
    const length = choice.of([0, 0, 1, 64, 4096, choice.number()])
    const port = () => choice.chance(0.8) ? 1024 + choice.below(4) : choice.number()
    const header = fields(
      [8, choice.chance(0.9) ? 3 : choice.number()],
      [8, choice.chance(0.9) ? 2 : choice.number()],
      [4, port()],
      [4, port()],
      [4, length],
      [2, choice.chance(0.9) ? 1 : choice.below(4)],
      [2, choice.chance(0.95) ? 1 + choice.below(7) : choice.number()],
      [4, choice.of([0, 1, 2, 3, choice.number()])],
      [4, choice.of([0, 0x1000, 0x4_0000, choice.number()])],
      [4, choice.of([0, 1, 64, choice.number()])]
    )
    return length === 0 ? [readable(header)] : [readable(header), readable(choice.bytes(8), Math.min(length, 0x1_0000))]
  }
}

/** All of them. */
export const HOSTILE_PROFILES: ReadonlyArray<HostileProfile> = [
  entropyProfile,
  balloonProfile,
  memProfile,
  blockProfile,
  netProfile,
  consoleProfile,
  vsockProfile
]
