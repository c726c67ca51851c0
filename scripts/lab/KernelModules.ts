// The modules of a kernel package: found by name, ordered so that each comes after what it depends on.
import { readdir, readFile } from "node:fs/promises"
import { basename, join } from "node:path"
import { runOk } from "./Command.ts"
import { LabError } from "./LabError.ts"

/** A module, ready for `insmod`. */
export interface KernelModule {
  readonly name: string
  readonly data: Buffer
}

// Module names treat `-` and `_` as the same letter; files use either.
const canonical = (name: string): string => name.replaceAll("-", "_")

const nameOfFile = (file: string): string => canonical(basename(file).replace(/\.ko(\.(xz|gz|zst))?$/, ""))

/** The modules below one `lib/modules/RELEASE` folder. */
export class KernelModules {
  readonly folder: string
  /** The list of what is built in, one path a line. */
  readonly builtin: string
  readonly #paths: ReadonlyMap<string, string>
  readonly #builtin: ReadonlySet<string>
  readonly #busybox: string

  private constructor(
    folder: string,
    paths: ReadonlyMap<string, string>,
    builtin: string,
    busybox: string
  ) {
    this.folder = folder
    this.builtin = builtin
    this.#paths = paths
    this.#builtin = new Set(builtin.split("\n").filter(Boolean).map(nameOfFile))
    this.#busybox = busybox
  }

  /** Lists `folder`; `busybox` unpacks modules that the distribution compresses with xz. */
  static async open(folder: string, busybox: string): Promise<KernelModules> {
    const paths = new Map<string, string>()
    for (const file of await readdir(folder, { recursive: true })) {
      if (/\.ko(\.xz)?$/.test(file)) paths.set(nameOfFile(file), join(folder, file))
    }
    const builtin = await readFile(join(folder, "modules.builtin"), "utf8").catch(() => "")
    return new KernelModules(folder, paths, builtin, busybox)
  }

  /** Whether the kernel has this module, as a file or built in. */
  has(name: string): boolean {
    return this.#paths.has(canonical(name)) || this.#builtin.has(canonical(name))
  }

  /** `names` and all that they depend on, in an order in which each can be inserted. Built-in ones are left out. */
  async load(names: Iterable<string>): Promise<ReadonlyArray<KernelModule>> {
    const ordered = new Map<string, KernelModule>()
    const visit = async (wanted: string): Promise<void> => {
      const name = canonical(wanted)
      if (ordered.has(name) || this.#builtin.has(name)) return
      const path = this.#paths.get(name)
      if (path === undefined) throw new LabError(`the kernel has no module ${wanted} (${this.folder})`)
      const data = path.endsWith(".xz")
        ? (await runOk(this.#busybox, ["unxz", "-c"], { input: await readFile(path) })).stdout
        : await readFile(path)
      for (const dependency of dependenciesOf(data)) await visit(dependency)
      ordered.set(name, { name, data })
    }
    for (const name of names) await visit(name)
    return [...ordered.values()]
  }
}

/** The names in the `depends=` entry of a module's `.modinfo` section. */
export const dependenciesOf = (module: Buffer): ReadonlyArray<string> => {
  const key = "\0depends="
  const at = module.indexOf(key, 0, "latin1")
  if (at < 0) return []
  const start = at + key.length
  return module.toString("latin1", start, module.indexOf(0, start)).split(",").filter(Boolean)
}
