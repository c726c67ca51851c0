/** The flag `--disk`: a path and how the guest gets it, as one argument. */
import { type GuestConfigInput, MAX_BLOCK_DEVICE_ID } from "@troupe/core/GuestConfig"
import * as BlockFile from "../BlockFile.ts"

/** A disk of a configuration. */
export type DiskSpec = NonNullable<GuestConfigInput["blockDevices"]>[number]

/** How the argument is written, for help texts. */
export const diskSyntax = "path[,ro][,volatile][,qcow2][,id=NAME][,backing=PATH][,backing-qcow2=PATH]"

/** What is not a path, from the end of the argument on: a comma may be part of a path. */
const OPTION = /^(?:(?:ro|rw|volatile|raw|qcow2)$|(?:id|backing|backing-qcow2)=)/

/** The default `id`: the end of the path, as far as it has room and can be told to a guest. */
const idOfPath = (path: string): string => path.replaceAll(/[^ -~]/g, "_").slice(-MAX_BLOCK_DEVICE_ID)

/** The disk that the argument describes. */
export const parseDisk = (argument: string): DiskSpec => {
  const pieces = argument.split(",")
  const options: Array<string> = []
  while (pieces.length > 1 && OPTION.test(pieces.at(-1) ?? "")) options.unshift(pieces.pop() ?? "")
  const path = pieces.join(",")
  const valueOf = (name: string): string | undefined =>
    options.findLast((option) => option.startsWith(`${name}=`))?.slice(name.length + 1)
  const mode = options.findLast((option) => option === "ro" || option === "rw" || option === "volatile")
  const format = options.findLast((option) => option === "raw" || option === "qcow2")
  const raw = valueOf("backing")
  const qcow2 = valueOf("backing-qcow2")
  const backing = raw === undefined ? qcow2 : raw
  return {
    id: valueOf("id") ?? idOfPath(path),
    mode: mode === "ro" ? "READ_ONLY" : mode === "volatile" ? "VOLATILE_WRITE" : "READ_WRITE",
    format: format === "qcow2" ? "QCOW" : "FILE",
    client: BlockFile.fromPath(path),
    ...(backing === undefined ? {} : {
      backing: { client: BlockFile.fromPath(backing), format: raw === undefined ? "QCOW" as const : "FILE" as const }
    })
  }
}
