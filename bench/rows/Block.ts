// Disks: the same guest on the same file under our VMM and under QEMU, taking turns.
import { randomBytes } from "node:crypto"
import { closeSync, ftruncateSync, mkdtempSync, openSync, rmSync, writeSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { BenchError, type Effort, type Row } from "../Row.ts"
import { type BenchLine, benchLines, disk, startGuest, type Vmm } from "../SameGuest.ts"
import { median, spread } from "../Statistics.ts"

const ANCHOR = "QEMU microvm, the same guest and file"
const MEBIBYTE = 2 ** 20
const DISK_SIZE = 256 * MEBIBYTE
const ROUNDS = 9
const QUICK_ROUNDS = 2

/** The words of a round: each warms up first. */
const wordsOf = (quick: boolean): string => {
  const few = quick ? 500 : 4000
  const many = quick ? 4000 : 40_000
  const large = quick ? 100 : 400
  return [
    `depth=32 blk=rand-read,${many} blk=rand-write,${many}`,
    `depth=1 blk=rand-read,${few} blk=rand-write,${few}`,
    `depth=32 blk=rand-read,${many} blk=rand-write,${many}`,
    `blk=seq-read,${large} blk=seq-write,${large}`
  ].join(" ")
}

type Measured = { readonly [vmm in Vmm]: Array<ReadonlyMap<string, BenchLine>> }

const measure = async (effort: Effort): Promise<Measured> => {
  const folder = mkdtempSync(join(tmpdir(), "troupe-bench-"))
  const path = join(folder, "disk")
  const measured: Measured = { troupe: [], qemu: [] }
  try {
    const fd = openSync(path, "w")
    ftruncateSync(fd, DISK_SIZE)
    const part = randomBytes(MEBIBYTE)
    for (let at = 0; at < DISK_SIZE; at += MEBIBYTE) writeSync(fd, part, 0, MEBIBYTE, at)
    closeSync(fd)
    for (let round = -1; round < (effort.quick ? QUICK_ROUNDS : ROUNDS); round++) {
      for (const vmm of round % 2 === 0 ? ["troupe", "qemu"] as const : ["qemu", "troupe"] as const) {
        const output = await startGuest(vmm, disk(path), wordsOf(effort.quick)).output
        const lines = benchLines(output)
        if ([...lines.values()].some((line) => line["errors"] !== 0)) throw new BenchError(`${vmm}: ${output}`)
        if (round >= 0) measured[vmm].push(lines)
      }
    }
  } finally {
    rmSync(folder, { recursive: true })
  }
  return measured
}

/** One run for all rows. */
let measurement: Promise<Measured> | undefined
const measureOnce = (effort: Effort): Promise<Measured> => measurement ??= measure(effort)

/** A number of each round's line. */
const each = (rounds: Measured[Vmm], what: string, pick: (line: BenchLine) => number): ReadonlyArray<number> =>
  rounds.map((lines) => {
    const line = lines.get(what)
    if (line === undefined) throw new BenchError(`no round says anything about ${what}`)
    return pick(line)
  })

const per = (name: string) => (line: BenchLine): number => (line[name] ?? Number.NaN) / (line["n"] ?? Number.NaN)
const requestsPerSecond = (line: BenchLine): number => (line["n"] ?? Number.NaN) / ((line["ns"] ?? Number.NaN) / 1e9)
const mebibytesPerSecond = (line: BenchLine): number =>
  requestsPerSecond(line) * (line["bytes"] ?? Number.NaN) / MEBIBYTE

const row = async (
  name: string,
  read: string,
  write: string,
  unit: string,
  pick: (line: BenchLine) => number,
  effort: Effort
): Promise<Row> => {
  const { qemu, troupe } = await measureOnce(effort)
  const ours = each(troupe, read, pick)
  const value = median(ours)
  const anchorValue = median(each(qemu, read, pick))
  const writes = median(each(troupe, write, pick))
  const anchorWrites = median(each(qemu, write, pick))
  return {
    name,
    value,
    unit,
    anchor: ANCHOR,
    anchorValue,
    ratio: value / anchorValue,
    goal: "≥ 1.0× for reads and writes",
    met: value >= anchorValue && writes >= anchorWrites,
    detail: {
      quartiles: spread(ours, 0),
      writes: Math.round(writes),
      "writes of the anchor": Math.round(anchorWrites),
      "ratio of writes": Number((writes / anchorWrites).toFixed(2)),
      "kicks a request": Number(median(each(troupe, read, per("kicks"))).toFixed(4)),
      "interrupts a request": Number(median(each(troupe, read, per("interrupts"))).toFixed(4)),
      "interrupts a request, QEMU": Number(median(each(qemu, read, per("interrupts"))).toFixed(4))
    }
  }
}

/** 4 KiB at random, one request at a time. */
export const randomDepth1 = (effort: Effort): Promise<Row> =>
  row("block-randread-qd1", "rand-read 1", "rand-write 1", "requests/s", requestsPerSecond, effort)

/** 4 KiB at random, 32 requests at a time. */
export const randomDepth32 = (effort: Effort): Promise<Row> =>
  row("block-randread-qd32", "rand-read 32", "rand-write 32", "requests/s", requestsPerSecond, effort)

/** 1 MiB after the other. */
export const sequential = (effort: Effort): Promise<Row> =>
  row("block-seq", "seq-read 32", "seq-write 32", "MiB/s", mebibytesPerSecond, effort)

/** Kicks of the driver for a request under load; interrupts beside them. */
export const kicksPerRequest = async (effort: Effort): Promise<Row> => {
  const { qemu, troupe } = await measureOnce(effort)
  const value = median(each(troupe, "rand-read 32", per("kicks")))
  const anchorValue = median(each(qemu, "rand-read 32", per("kicks")))
  const interrupts = median(each(troupe, "rand-read 32", per("interrupts")))
  return {
    name: "kicks-per-request",
    value,
    unit: "kicks a request",
    anchor: ANCHOR,
    anchorValue,
    ratio: value / anchorValue,
    goal: "≤ 0.1 kicks and interrupts a request under load",
    met: value <= 0.1 && interrupts <= 0.1,
    detail: {
      "interrupts a request": Number(interrupts.toFixed(4)),
      "interrupts a request, QEMU": Number(median(each(qemu, "rand-read 32", per("interrupts"))).toFixed(4)),
      load: "32 random reads of 4 KiB at a time"
    }
  }
}
