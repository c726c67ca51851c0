/**
 * The ACPI tables of the last machine, for the next one that is described by the same words: hosts make many machines of one
 * kind, and encoding the tables is a good part of making a small one.
 */
import * as Result from "effect/Result"
import type { AcpiError } from "./AcpiError.ts"
import { type AcpiInput, type AcpiPlan, buildAcpi } from "./AcpiTables.ts"

/** Whether two trees of plain data say the same. */
const isSame = (a: unknown, b: unknown): boolean => {
  if (a === b) return true
  if (typeof a !== "object" || typeof b !== "object" || a === null || b === null) return false
  if (Array.isArray(a) !== Array.isArray(b) || a instanceof Uint8Array !== b instanceof Uint8Array) return false
  const keys = Object.keys(a)
  if (keys.length !== Object.keys(b).length) return false
  for (const key of keys) {
    if (!Object.hasOwn(b, key) || !isSame(Reflect.get(a, key), Reflect.get(b, key))) return false
  }
  return true
}

let last: { readonly input: AcpiInput; readonly plan: AcpiPlan } | undefined

/**
 * {@link buildAcpi}, or what it gave the last time for the same input. The description is kept, so nobody may change it
 * afterwards; the tables are to be copied, not changed.
 */
export const provideAcpi = (input: AcpiInput): Result.Result<AcpiPlan, AcpiError> => {
  if (last !== undefined && isSame(last.input, input)) return Result.succeed(last.plan)
  const built = buildAcpi(input)
  if (Result.isSuccess(built)) last = { input, plan: built.success }
  return built
}
