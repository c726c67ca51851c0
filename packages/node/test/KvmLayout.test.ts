/** Compares every KVM structure, `ioctl` number and constant with the system's `linux/kvm.h`. */
import { assert, describe, it } from "@effect/vitest"
import { execFileSync, spawnSync } from "node:child_process"
import { mkdtempSync, rmSync, writeFileSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { fileURLToPath } from "node:url"
import * as KvmCpuState from "../src/kvm/KvmCpuState.ts"
import { KvmCap, KvmIoctl, KvmValue } from "../src/kvm/KvmIoctl.ts"
import { KvmExit, KvmRun, KvmRunValue } from "../src/kvm/KvmRun.ts"
import * as KvmStructs from "../src/kvm/KvmStructs.ts"

const structs = [...Object.values(KvmCpuState), ...Object.values(KvmStructs), KvmRun]
const constants = new Map<string, number>([
  ...Object.entries(KvmIoctl).map(([key, { request }]) => [key, request] as const),
  ...[KvmCap, KvmExit, KvmRunValue, KvmValue].flatMap((constants) => Object.entries<number>(constants))
])

/** Why the comparison cannot be made here, or `undefined`. */
const obstacle = (): string | undefined => {
  if (process.platform !== "linux" || process.arch !== "x64") {
    return `the tables are for x86-64 Linux, not ${process.arch} ${process.platform}`
  }
  const compiler = spawnSync("gcc", ["-fsyntax-only", "-x", "c", "-"], { input: "#include <linux/kvm.h>\n" })
  if (compiler.error !== undefined) return "there is no gcc"
  return compiler.status === 0 ? undefined : "there is no linux/kvm.h (package linux-libc-dev)"
}
const reason = obstacle()

/** What the header says: the sizes, offsets and values by name, and the names that it does not define. */
const readHeader = (): { readonly facts: ReadonlyMap<string, string>; readonly missing: ReadonlySet<string> } => {
  const directory = mkdtempSync(join(tmpdir(), "troupe-layout-"))
  try {
    const table: Array<string> = []
    for (const { leaves, name } of structs) {
      table.push(`STRUCT(${name})`)
      for (const { path, since, size } of leaves) {
        const line = `${size === 0 ? "FLEXIBLE" : "FIELD"}(${name}, ${path})`
        table.push(since === undefined ? line : `#ifdef ${since}\n${line}\n#else\nMISSING(${name}.${path})\n#endif`)
      }
    }
    for (const name of constants.keys()) {
      table.push(`#ifdef ${name}\nCONSTANT(${name})\n#else\nMISSING(${name})\n#endif`)
    }
    writeFileSync(join(directory, "table.h"), `${table.join("\n")}\n`)
    const program = join(directory, "kvm-layout")
    const source = fileURLToPath(new URL("kvm-layout.c", import.meta.url))
    execFileSync("gcc", ["-std=gnu11", "-Wall", "-Werror", "-I", directory, "-o", program, source])
    const facts = new Map<string, string>()
    const missing = new Set<string>()
    for (const line of execFileSync(program, { encoding: "utf8" }).trimEnd().split("\n")) {
      const [kind, name, ...values] = line.split(" ")
      if (kind === "missing") missing.add(name!)
      else facts.set(`${kind} ${name}`, values.join(" "))
    }
    return { facts, missing }
  } finally {
    rmSync(directory, { recursive: true })
  }
}

/** Names newer than Linux 6.1, the oldest header that we compile against. Anything else that is missing is a misspelling. */
const NEWER = new Set([
  "KVM_EXIT_MEMORY_FAULT",
  "KVM_CAP_MEMORY_FAULT_INFO",
  "KVM_CAP_GUEST_MEMFD",
  "kvm_run.memory_fault.flags",
  "kvm_run.memory_fault.gpa",
  "kvm_run.memory_fault.size"
])

describe("KVM tables", () => {
  it.skipIf(reason !== undefined)(
    `agree with linux/kvm.h${reason === undefined ? "" : ` (skipped: ${reason})`}`,
    () => {
      const { facts, missing } = readHeader()
      const ours = new Map<string, string>()
      for (const { leaves, name, size } of structs) {
        ours.set(`struct ${name}`, `${size}`)
        for (const { offset, path, size } of leaves) {
          if (!missing.has(`${name}.${path}`)) ours.set(`field ${name}.${path}`, `${offset} ${size}`)
        }
      }
      for (const [name, value] of constants) if (!missing.has(name)) ours.set(`constant ${name}`, `${value}`)
      assert.deepStrictEqual(Object.fromEntries(ours), Object.fromEntries(facts))
      assert.deepStrictEqual([...missing].filter((name) => !NEWER.has(name)), [])
      assert.isAbove(facts.size, 700)
    }
  )

  it("carry their own names", () => {
    for (const [key, { name }] of Object.entries(KvmIoctl)) assert.strictEqual(name, key)
  })
})
