/**
 * Hot-pluggable guest memory on KVM: one mapping for the whole region, and a memory slot for each plugged block.
 *
 * KVM cannot grow or shrink a slot: it would have to be taken away and added again, and a vCPU that accesses it in between
 * finds no memory. So a block's slot is its own, and is there exactly while the block is plugged. Adding a slot costs a grace
 * period of the kernel and removing one costs two, some hundred microseconds each while vCPUs run, for which the event loop
 * stands still; between two blocks it goes on.
 */
import { BlockMap, PLUGGABLE_BLOCKS_MAX } from "@troupe/core/BlockMap"
import { formatAddress } from "@troupe/core/GuestAddress"
import { MemoryRegion, PAGE_SIZE } from "@troupe/core/GuestMemory"
import { HypervisorError, type PluggableMemory } from "@troupe/core/Hypervisor"
import * as Cause from "effect/Cause"
import * as Effect from "effect/Effect"
import * as Exit from "effect/Exit"
import type * as Scope from "effect/Scope"
import { Ffi, MADV_DONTNEED, type Mapping } from "../Ffi.ts"
import { kvmError } from "./KvmError.ts"

/** Runs of unplugged blocks that are looked after at each change: a microsecond each. */
const SWEEP_RUNS_MAX = 64

/** What the machine's slots offer: `count` slots whose numbers belong to the caller. */
export interface SlotRange {
  /** Has slot `index` show `size` bytes of the process at `hostAddress`, or nothing when `size` is 0. */
  readonly set: (
    index: number,
    guestAddress: number,
    size: number,
    hostAddress: bigint
  ) => Effect.Effect<void, HypervisorError>
  /** The same for slots that are to go with the scope: at once where it matters, later where nobody can use them. */
  readonly drop: (
    index: number,
    guestAddress: number,
    hostAddress: bigint
  ) => Effect.Effect<void>
}

/** How the pages of a mapping go back to the host: they read as zero afterwards. Nothing happens once the mapping is gone. */
export const giveBackOf = (functions: Ffi["Service"]["functions"], mapping: Mapping) =>
(
  offset: number,
  length: number
): void => {
  // Its addresses may be anybody's by now.
  if (mapping.released) return
  const result = functions.madvise(mapping.address + BigInt(offset), length, MADV_DONTNEED)
  // Private memory that is not locked has no reason to be refused; what reads as zero must be zero all the same.
  if (result < 0) new Uint8Array(mapping.buffer, offset, length).fill(0)
}

const refuse = (what: string, detail: string): HypervisorError =>
  new HypervisorError({ operation: "addPluggableMemory", arguments: what, detail })

/** Maps a region of which nothing is plugged. `reserve` gives it its slots. */
export const pluggableSlots = (
  reserve: (count: number) => SlotRange
): (
  guestAddress: number,
  size: number,
  blockSize: number
) => Effect.Effect<PluggableMemory, HypervisorError, Ffi | Scope.Scope> =>
  Effect.fnUntraced(function*(guestAddress, size, blockSize) {
    const ffi = yield* Ffi
    const what = `${formatAddress(guestAddress)}, ${size} bytes in blocks of ${blockSize}`
    const count = size / blockSize
    if (
      !Number.isInteger(Math.log2(blockSize)) || blockSize < PAGE_SIZE || guestAddress % blockSize !== 0 ||
      !Number.isInteger(count) || count < 1
    ) {
      return yield* refuse(what, `a block is a power of two of at least ${PAGE_SIZE} bytes, and a region whole blocks`)
    }
    if (count > PLUGGABLE_BLOCKS_MAX) {
      return yield* refuse(what, `${count} blocks are more than ${PLUGGABLE_BLOCKS_MAX}: choose larger ones`)
    }
    const mapping = yield* Effect.mapError(ffi.mapAnonymous(size), kvmError)
    const blocks = new BlockMap(count, blockSize)
    const giveBack = giveBackOf(ffi.functions, mapping)
    const region = new MemoryRegion(guestAddress, mapping.buffer, giveBack, blocks)
    const slots = reserve(count)
    const addressOf = (block: number) => guestAddress + block * blockSize
    const hostAddressOf = (block: number) => mapping.address + BigInt(block * blockSize)
    yield* Effect.addFinalizer(() =>
      Effect.gen(function*() {
        for (let block = 0; block < count; block++) {
          if (blocks.isPlugged(block)) yield* slots.drop(block, addressOf(block), hostAddressOf(block))
        }
      })
    )

    /**
     * The slot and its note in the map are one: nothing sees the one without the other. A slot must not be set once the memory
     * is gone: it would show the guest what lies there then.
     */
    const change = (block: number, plugged: boolean) =>
      Effect.uninterruptible(
        mapping.released
          ? refuse(what, "the region is gone: the scope in which it was added has closed")
          : plugged
          ? Effect.tap(
            slots.set(block, addressOf(block), blockSize, hostAddressOf(block)),
            () => Effect.sync(() => blocks.set(block, true))
          )
          : Effect.suspend(() => {
            // First the host's own devices stop using it, then the guest.
            blocks.set(block, false)
            return Effect.onError(
              slots.set(block, addressOf(block), 0, hostAddressOf(block)),
              () => Effect.sync(() => blocks.set(block, true))
            )
          })
      )

    let swept = 0
    /**
     * Gives back once more what is not plugged, a part of the region at a time: requests of the host's devices that had begun
     * before a block was unplugged may have written there since. So a guest cannot have more memory than it has plugged, and
     * what such requests hold.
     */
    const sweep = (): void => {
      for (let runs = 0, looked = 0; runs < SWEEP_RUNS_MAX && looked < count; runs++) {
        let end = swept
        while (end < count && !blocks.isPlugged(end)) end++
        if (end > swept) giveBack(swept * blockSize, (end - swept) * blockSize)
        while (end < count && blocks.isPlugged(end)) end++
        looked += end - swept
        swept = end === count ? 0 : end
      }
    }

    const changeAll = (plugged: boolean) =>
      Effect.fnUntraced(function*(first: number, length: number) {
        if (!Number.isInteger(first) || first < 0 || !(length >= 0) || first + length > count) {
          return yield* refuse(what, `the region has no ${length} blocks from ${first} on`)
        }
        const changed: Array<number> = []
        // A run that grows from its end, and shrinks from its beginning, costs the map one step for each block.
        const order = (i: number) => plugged ? first + length - 1 - i : first + i
        // Bytes that the host's devices wrote to the block after it was unplugged, in requests that had begun before.
        if (plugged) forRuns(blocks, first, length, false, giveBack)
        const work = Effect.gen(function*() {
          for (let i = 0; i < length; i++) {
            const block = order(i)
            if (blocks.isPlugged(block) === plugged) continue
            yield* change(block, plugged)
            changed.push(block)
            yield* Effect.yieldNow
          }
        })
        // What can neither be done nor undone leaves a machine that is not what its guest was told: a defect.
        const undo = Effect.suspend(() => Effect.forEach(changed.toReversed(), (block) => change(block, !plugged)))
        yield* Effect.onExit(work, (exit) =>
          Exit.isFailure(exit) && !Cause.hasInterrupts(exit.cause) && !mapping.released ?
            Effect.orDie(undo) :
            Effect.sync(() => {
              if (!plugged) {
                forRuns(blocks, first, length, false, giveBack)
              }
              sweep()
            }))
      })

    return { region, blocks, plug: changeAll(true), unplug: changeAll(false) }
  })

/** Calls `use` with offset and length in bytes of each run of blocks in this state. */
const forRuns = (
  blocks: BlockMap,
  first: number,
  length: number,
  plugged: boolean,
  use: (offset: number, length: number) => void
): void => {
  let begin = first
  for (let block = first; block <= first + length; block++) {
    if (block < first + length && blocks.isPlugged(block) === plugged) continue
    if (block > begin) use(begin * blocks.blockSize, (block - begin) * blocks.blockSize)
    begin = block + 1
  }
}
