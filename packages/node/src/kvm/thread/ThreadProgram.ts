/**
 * The source of a vCPU thread's program as one script.
 *
 * A built package has the program as JavaScript modules and a thread loads them. A checkout has TypeScript: letting every
 * thread strip types itself costs it 9 MiB and 90 ms, so the main thread does that once and joins the few modules into a script.
 */
import { readFileSync } from "node:fs"
import { stripTypeScriptTypes } from "node:module"
import process from "node:process"

/** What `new Worker` takes: a file, or a script to evaluate. */
export interface ThreadProgram {
  readonly source: URL | string
  readonly isScript: boolean
}

interface Joined {
  /** Function bodies of modules, in the order in which they must run, by URL. */
  readonly modules: Map<string, string>
}

const IMPORT = /^import\s+(\{[^}]*\}|\* as \w+|\w+)\s+from\s+"([^"]+)"\s*$/gm
const EXPORT = /^export (const|let|function|class) (\w+)/gm

/** `stripTypeScriptTypes` without its `ExperimentalWarning`, which says nothing to people who run a checkout. */
const strip = (source: string): string => {
  const emitWarning: unknown = Reflect.get(process, "emitWarning")
  if (typeof emitWarning !== "function") return stripTypeScriptTypes(source)
  process.emitWarning = (...warning: Array<unknown>) => {
    if (warning[1] !== "ExperimentalWarning") Reflect.apply(emitWarning, process, warning)
  }
  try {
    return stripTypeScriptTypes(source)
  } finally {
    Reflect.set(process, "emitWarning", emitWarning)
  }
}

/** Turns one module of this code base (named exports, imports on top) into the body of a function, after its imports. */
const join = (url: URL, joined: Joined): void => {
  if (joined.modules.has(url.href)) return
  joined.modules.set(url.href, "")
  const exported: Array<string> = []
  const source = strip(readFileSync(url, "utf8"))
  const body = source
    .replaceAll(IMPORT, (_, what: string, specifier: string) => {
      const isLocal = specifier.startsWith(".")
      const target = isLocal ? new URL(specifier, url) : undefined
      if (target !== undefined) join(target, joined)
      const module = target === undefined
        ? `require(${JSON.stringify(specifier)})`
        : `modules[${JSON.stringify(target.href)}]`
      const names = what.startsWith("* as ") ? what.slice(5) : what.replaceAll(" as ", ": ")
      return `const ${names} = ${module};`
    })
    .replaceAll(EXPORT, (_, kind: string, name: string) => {
      exported.push(name)
      return `${kind} ${name}`
    })
    .replaceAll("import.meta.url", JSON.stringify(url.href))
  // Map keeps the order of the first insertion; a module must come after those that it imports.
  joined.modules.delete(url.href)
  joined.modules.set(url.href, `${body}\nreturn { ${exported.join(", ")} };`)
}

/** Made once a process: stripping types is the dearest part of a first machine. */
const scripts = new Map<string, ThreadProgram>()

/** The program that `url` (a TypeScript or a JavaScript module) is. */
export const threadProgram = (url: URL): ThreadProgram => {
  if (!url.pathname.endsWith(".ts")) return { source: url, isScript: false }
  const known = scripts.get(url.href)
  if (known !== undefined) return known
  const joined: Joined = { modules: new Map() }
  join(url, joined)
  const modules = Array.from(
    joined.modules,
    ([href, body]) => `modules[${JSON.stringify(href)}] = (() => {\n${body}\n})();`
  )
  const program = { source: `"use strict";\nconst modules = {};\n${modules.join("\n")}`, isScript: true }
  scripts.set(url.href, program)
  return program
}
