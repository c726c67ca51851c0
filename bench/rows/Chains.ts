// Chains a second through a queue and through a device's loop, beside the rust-vmm crate virtio-queue on the same shapes.
import { spawn } from "node:child_process"
import { existsSync, statSync } from "node:fs"
import { cp, mkdir } from "node:fs/promises"
import { join } from "node:path"
import { BENCH_CACHE, startAnchor } from "../Anchor.ts"
import { CHAIN_SHAPES, type ChainShape, type ChainsWorkload, makeChainsWorkload } from "../ChainsWorkload.ts"
import { BenchSkipped, type Effort, root, type Row } from "../Row.ts"
import { median, spread } from "../Statistics.ts"

const GOAL = 0.5
/** Chains of a batch: some 20 ms. */
const BATCH_CHAINS = 200_000
/** Names a folder of crates, as Debian's packages and `cargo vendor` make one. */
const CRATES_VARIABLE = "TROUPE_CRATES"
const DEBIAN_CRATES = "/usr/share/cargo/registry"

const cargo = (args: ReadonlyArray<string>): Promise<string | undefined> =>
  new Promise((resolve) => {
    let output = ""
    const child = spawn("cargo", args, { stdio: ["ignore", "ignore", "pipe"] })
    child.stderr.on("data", (chunk: Buffer) => {
      output += chunk.toString()
    })
    child.on("error", (cause) => resolve(cause.message))
    child.on("close", (code) => resolve(code === 0 ? undefined : output.trim().split("\n").slice(-6).join("\n")))
  })

/** Builds the anchor out of a folder of crates, or with those of crates.io. Returns its path, or why there is none. */
const buildCrate = async (): Promise<{ readonly program: string } | { readonly missing: string }> => {
  const folder = join(BENCH_CACHE, "chains")
  const program = join(folder, "target", "release", "chains")
  const built = existsSync(program) ? statSync(program).mtimeMs : 0
  const source = join(root, "bench", "anchor", "chains")
  if ([join(source, "Cargo.toml"), join(source, "src", "main.rs")].every((file) => statSync(file).mtimeMs < built)) {
    return { program }
  }
  await mkdir(folder, { recursive: true })
  await cp(source, folder, { recursive: true })
  const build = ["build", "--release", "--manifest-path", join(folder, "Cargo.toml")]
  const crates = process.env[CRATES_VARIABLE] ??
    (existsSync(join(DEBIAN_CRATES, "virtio-queue-0.14.0")) ? DEBIAN_CRATES : undefined)
  const from = crates === undefined ? [] : [
    "--offline",
    "--config",
    "source.crates-io.replace-with=\"folder\"",
    "--config",
    `source.folder.directory=${JSON.stringify(crates)}`
  ]
  const problem = await cargo([...build, ...from])
  return problem === undefined
    ? { program }
    : {
      missing: `the crate virtio-queue could not be built (${problem}). It takes cargo, and the crates of crates.io, ` +
        `of Debian's librust-virtio-queue-dev, or of the folder that ${CRATES_VARIABLE} names`
    }
}

/** Nanoseconds of the device's part for each chain of a batch. */
const timed = ({ chains, fill, serve }: ChainsWorkload, count: number): number => {
  const rounds = Math.ceil(count / chains)
  let spent = 0
  for (let round = 0; round < rounds; round++) {
    fill()
    const begun = performance.now()
    serve()
    spent += performance.now() - begun
  }
  return spent * 1e6 / (rounds * chains)
}

interface Kind {
  readonly name: string
  readonly packed: boolean
  readonly device: boolean
}

const KINDS: ReadonlyArray<Kind> = [
  { name: "chains", packed: false, device: false },
  { name: "chains-packed", packed: true, device: false },
  { name: "chains-device", packed: false, device: true }
]

/** Chains a second, of the shape `three`; the other shapes are in the details. */
export const chains = async (effort: Effort): Promise<ReadonlyArray<Row>> => {
  const built = await buildCrate()
  if ("missing" in built) throw new BenchSkipped(built.missing)
  await using anchor = startAnchor(built.program, [])
  await anchor.next()
  const batches = effort.quick ? 5 : 31
  const count = effort.quick ? BATCH_CHAINS / 10 : BATCH_CHAINS
  const ours = new Map<string, Array<number>>()
  const theirs = new Map<ChainShape, Array<number>>()
  const note = <K>(map: Map<K, Array<number>>, key: K, value: number) => {
    const values = map.get(key) ?? []
    values.push(value)
    map.set(key, values)
  }
  const workloads = KINDS.flatMap((kind) =>
    CHAIN_SHAPES.map((shape) => ({ key: `${kind.name} ${shape}`, workload: makeChainsWorkload(shape, kind) }))
  )
  for (let batch = -3; batch < batches; batch++) {
    const kept = batch >= 0
    for (const shape of CHAIN_SHAPES) {
      const rounds = Math.ceil(count / (shape === "three" ? 85 : 256))
      const nanoseconds = await anchor.ask(`${shape} ${rounds}`)
      if (kept) note(theirs, shape, nanoseconds)
      for (const { key, workload } of workloads) {
        if (!key.endsWith(` ${shape}`)) continue
        const own = timed(workload, count)
        if (kept) note(ours, key, own)
      }
    }
  }
  return KINDS.map(({ name }): Row => {
    const perChain = (shape: ChainShape) => median(ours.get(`${name} ${shape}`) ?? [])
    const anchors = (shape: ChainShape) => median(theirs.get(shape) ?? [])
    const value = 1e9 / perChain("three")
    const anchorValue = 1e9 / anchors("three")
    const ratio = value / anchorValue
    return {
      name,
      value,
      unit: "chains/s",
      anchor: "the crate virtio-queue 0.14, split",
      anchorValue,
      ratio,
      goal: `≥ ${GOAL} × the crate`,
      met: ratio >= GOAL,
      detail: {
        batches,
        "chains a batch": count,
        ...Object.fromEntries(CHAIN_SHAPES.flatMap((shape) => [
          [`${shape}: quartiles, ns`, spread(ours.get(`${name} ${shape}`) ?? [], 1)],
          [`${shape}: anchor's quartiles, ns`, spread(theirs.get(shape) ?? [], 1)],
          [`${shape}: ratio`, Number((anchors(shape) / perChain(shape)).toFixed(2))]
        ]))
      }
    }
  })
}
