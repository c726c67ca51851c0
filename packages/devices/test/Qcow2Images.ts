/** Makes qcow2 images, and checks them without the code under test. */

/** What an image is made with. */
export interface ImageOptions {
  readonly size: number
  readonly clusterBits: number
  readonly version: 2 | 3
  /** Width of reference counts as a power of two; 4 in version 2. */
  readonly refcountOrder: number
  readonly backingName?: string
}

const u64 = (view: DataView, at: number): number => view.getUint32(at) * 2 ** 32 + view.getUint32(at + 4)
const setU64 = (view: DataView, at: number, value: number): void => {
  view.setUint32(at, Math.floor(value / 2 ** 32))
  view.setUint32(at + 4, value % 2 ** 32)
}

const getBits = (bytes: Uint8Array, order: number, index: number): number => {
  const bits = 2 ** order
  if (bits < 8) return ((bytes[(index * bits) >> 3] ?? 0) >> ((index * bits) & 7)) & (2 ** bits - 1)
  let value = 0
  for (let i = 0; i < bits / 8; i++) value = value * 256 + (bytes[index * bits / 8 + i] ?? 0)
  return value
}

const setBits = (bytes: Uint8Array, order: number, index: number, value: number): void => {
  const bits = 2 ** order
  if (bits < 8) bytes[(index * bits) >> 3] = (bytes[(index * bits) >> 3] ?? 0) | value << ((index * bits) & 7)
  else bytes[(index + 1) * bits / 8 - 1] = value
}

/** An empty image. */
export const makeImage = (options: ImageOptions): Uint8Array<ArrayBuffer> => {
  const { backingName, clusterBits, refcountOrder, size, version } = options
  const cluster = 2 ** clusterBits
  const l1 = Math.ceil(size / (cluster * cluster / 8))
  const l1Clusters = Math.max(1, Math.ceil(l1 * 8 / cluster))
  const perBlock = cluster * 8 / 2 ** refcountOrder
  let blocks = 1
  while (blocks * perBlock < 2 + blocks + l1Clusters) blocks++
  const total = 2 + blocks + l1Clusters
  const bytes = new Uint8Array(total * cluster)
  const view = new DataView(bytes.buffer)
  view.setUint32(0, 0x5146_49fb)
  view.setUint32(4, version)
  if (backingName !== undefined) {
    setU64(view, 8, 200)
    view.setUint32(16, backingName.length)
    bytes.set(new TextEncoder().encode(backingName), 200)
  }
  view.setUint32(20, clusterBits)
  setU64(view, 24, size)
  view.setUint32(36, l1)
  setU64(view, 40, (2 + blocks) * cluster)
  setU64(view, 48, cluster)
  view.setUint32(56, 1)
  if (version === 3) {
    view.setUint32(96, refcountOrder)
    view.setUint32(100, 104)
  }
  for (let block = 0; block < blocks; block++) {
    setU64(view, cluster + block * 8, (2 + block) * cluster)
    const part = bytes.subarray((2 + block) * cluster, (3 + block) * cluster)
    for (let i = 0; i < perBlock && block * perBlock + i < total; i++) setBits(part, refcountOrder, i, 1)
  }
  return bytes
}

/** What is wrong with an image, and how many clusters are counted that nothing refers to. */
export interface CheckResult {
  readonly errors: ReadonlyArray<string>
  readonly leaks: number
}

/** Counts all references to clusters of an image without snapshots, and compares them with the reference counts. */
export const checkImage = (bytes: Uint8Array<ArrayBuffer>): CheckResult => {
  const errors: Array<string> = []
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length)
  const version = view.getUint32(4)
  const clusterBits = view.getUint32(20)
  const cluster = 2 ** clusterBits
  const order = version === 3 ? view.getUint32(96) : 4
  const references = new Map<number, number>()
  const refer = (offset: number, what: string): void => {
    if (offset % cluster !== 0 || offset >= bytes.length) return void errors.push(`${what} at ${offset}`)
    references.set(offset / cluster, (references.get(offset / cluster) ?? 0) + 1)
  }
  refer(0, "header")
  const l1Offset = u64(view, 40)
  const l1 = view.getUint32(36)
  for (let at = 0; at < l1 * 8; at += cluster) refer(l1Offset + at, "level 1")
  const table = u64(view, 48)
  const tableClusters = view.getUint32(56)
  for (let i = 0; i < tableClusters; i++) refer(table + i * cluster, "table of counts")
  const perBlock = cluster * 8 / 2 ** order
  const counts = new Map<number, number>()
  for (let i = 0; i < tableClusters * cluster / 8; i++) {
    const offset = u64(view, table + i * 8)
    if (offset === 0) continue
    refer(offset, `block ${i} of counts`)
    const block = bytes.subarray(offset, offset + cluster)
    for (let j = 0; j < perBlock; j++) {
      const count = getBits(block, order, j)
      if (count > 0) counts.set(i * perBlock + j, count)
    }
  }
  const copied: Array<readonly [number, boolean]> = []
  for (let i = 0; i < l1; i++) {
    const l2 = (view.getUint32(l1Offset + i * 8) & 0x00ff_ffff) * 2 ** 32 + view.getUint32(l1Offset + i * 8 + 4)
    if (l2 === 0) continue
    refer(l2, `table ${i} of level 2`)
    if (l2 + cluster > bytes.length) continue
    copied.push([l2 / cluster, (view.getUint8(l1Offset + i * 8) & 0x80) !== 0])
    for (let j = 0; j < cluster / 8; j++) {
      const at = l2 + j * 8
      const high = view.getUint32(at)
      const low = view.getUint32(at + 4)
      if ((high & 0x4000_0000) !== 0) {
        const bits = 62 - (clusterBits - 8)
        const offset = (high & (2 ** (bits - 32) - 1)) * 2 ** 32 + low
        const length = ((high & 0x3fff_ffff) >>> (bits - 32)) * 512 + 512 - offset % 512
        for (let c = Math.floor(offset / cluster); c <= Math.floor((offset + length - 1) / cluster); c++) {
          refer(c * cluster, `compressed ${i}/${j}`)
        }
        continue
      }
      const offset = (high & 0x00ff_ffff) * 2 ** 32 + (low - low % 512)
      if (offset === 0) continue
      refer(offset, `entry ${i}/${j}`)
      copied.push([offset / cluster, (high & 0x8000_0000) !== 0])
    }
  }
  for (const [index, count] of references) {
    const counted = counts.get(index) ?? 0
    if (counted < count) errors.push(`cluster ${index} has ${count} references and the count ${counted}`)
  }
  for (const [index, flag] of copied) {
    if (flag && (references.get(index) ?? 0) > 1) errors.push(`cluster ${index} is shared and said to be not`)
  }
  let leaks = 0
  for (const [index, count] of counts) leaks += Math.max(0, count - (references.get(index) ?? 0))
  return { errors, leaks }
}
