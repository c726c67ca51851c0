/**
 * C structures as tables: a declaration in C order gives the layout (x86-64 and arm64 Linux: every scalar is aligned to its
 * size, little-endian) and one accessor per member. Accessors allocate nothing and read and write through a `DataView`.
 *
 * ```ts
 * const Point = struct("point", { x: u32, label: bytes(8), y: u64 })
 * const view = Point.make()
 * Point.fields.x.set(view, 7)
 * Point.fields.y.offset // 16
 * ```
 */

/** A `DataView` over memory that a structure lies in. */
export type StructView = DataView<ArrayBuffer>

/** A member of up to 32 bits. `base` is the offset of the structure in the view. */
export interface NumberField {
  readonly type: "u8" | "u16" | "u32" | "s16" | "s32"
  readonly offset: number
  readonly size: number
  readonly get: (view: StructView, base?: number) => number
  /** Stores `value` modulo the member's width. */
  readonly set: (view: StructView, value: number, base?: number) => void
}

/** A member of 64 bits. */
export interface BigField {
  readonly type: "u64" | "s64"
  readonly offset: number
  readonly size: number
  readonly get: (view: StructView, base?: number) => bigint
  /** Stores `value` modulo 2^64. */
  readonly set: (view: StructView, value: bigint, base?: number) => void
  /** The unsigned value as a number, without allocating: exact below 2^53, rounded above. */
  readonly getNumber: (view: StructView, base?: number) => number
  /** Stores an integer from 0 to 2^53 - 1. */
  readonly setNumber: (view: StructView, value: number, base?: number) => void
}

/** A member that is an array of bytes. */
export interface BytesField {
  readonly type: "bytes"
  readonly offset: number
  readonly size: number
  /** The bytes themselves, not a copy. */
  readonly of: (view: StructView, base?: number) => Uint8Array<ArrayBuffer>
}

/** A member that is an array; a flexible array at the end of a structure has length 0 and does not count in its size. */
export interface ArrayField<Element> {
  readonly type: "array"
  readonly offset: number
  readonly size: number
  /** Number of elements that the structure itself has room for. */
  readonly length: number
  /** Distance between elements, in bytes. */
  readonly stride: number
  /** Offset of an element in the structure: the `base` for {@link ArrayField.element}. */
  readonly at: (index: number) => number
  /** The accessors of one element, relative to it. */
  readonly element: Element
}

/** The declaration of a number. */
export interface ScalarSpec<Type extends string> {
  readonly kind: "scalar"
  readonly type: Type
  readonly size: number
}
/** The declaration of an array of bytes. */
export interface BytesSpec {
  readonly kind: "bytes"
  readonly length: number
}
/** The declaration of an array. */
export interface ArraySpec<Element extends Spec> {
  readonly kind: "array"
  readonly element: Element
  readonly length: number
}
/** The declaration of a structure or union inside another. */
export interface GroupSpec<Members extends Shape> {
  readonly kind: "group"
  readonly overlay: boolean
  readonly anonymous: boolean
  readonly members: Members
  /** A macro without which the C header does not have this member. */
  readonly since: string | undefined
}

/** A member's declaration. */
export type Spec =
  | ScalarSpec<NumberField["type"]>
  | ScalarSpec<BigField["type"]>
  | BytesSpec
  | ArraySpec<Spec>
  | GroupSpec<Shape>
/** Declarations of members, in C order. */
export interface Shape {
  readonly [name: string]: Spec
}

/** The accessor that a declaration gives. */
export type Field<S> = S extends ScalarSpec<infer Type> ? Type extends NumberField["type"] ? NumberField : BigField
  : S extends BytesSpec ? BytesField
  : S extends ArraySpec<infer Element> ? ArrayField<Field<Element>>
  : S extends GroupSpec<infer Members> ? { readonly [name in keyof Members]: Field<Members[name]> }
  : never

const scalar = <const Type extends NumberField["type"] | BigField["type"]>(
  type: Type,
  size: number
): ScalarSpec<Type> => ({ kind: "scalar", type, size })

/** `__u8` */
export const u8 = scalar("u8", 1)
/** `__u16` */
export const u16 = scalar("u16", 2)
/** `__u32` */
export const u32 = scalar("u32", 4)
/** `__u64` */
export const u64 = scalar("u64", 8)
/** `__s16` */
export const s16 = scalar("s16", 2)
/** `__s32` */
export const s32 = scalar("s32", 4)
/** `__s64` */
export const s64 = scalar("s64", 8)
/** `__u8 name[length]`; length 0 is a flexible array. */
export const bytes = (length: number): BytesSpec => ({ kind: "bytes", length })
/** `element name[length]` */
export const array = <Element extends Spec>(element: Element, length: number): ArraySpec<Element> => ({
  kind: "array",
  element,
  length
})
/** `element name[]`, the last member of a structure. */
export const flexible = <Element extends Spec>(element: Element): ArraySpec<Element> => array(element, 0)
/** `struct { ... } name`. With `since`, only headers that define that macro have the member. */
export const group = <Members extends Shape>(members: Members, since?: string): GroupSpec<Members> => ({
  kind: "group",
  overlay: false,
  anonymous: false,
  members,
  since
})
/** `union { ... } name` */
export const union = <Members extends Shape>(members: Members): GroupSpec<Members> => ({
  kind: "group",
  overlay: true,
  anonymous: false,
  members,
  since: undefined
})
/** `union { ... };` whose members C reaches without a name. */
export const anonymousUnion = <Members extends Shape>(members: Members): GroupSpec<Members> => ({
  ...union(members),
  anonymous: true
})
/** `struct other name` */
export const embed = <Members extends Shape>(other: Struct<Members>): GroupSpec<Members> => group(other.shape)

/** A leaf of a structure, for comparing with C. */
export interface Leaf {
  /** How C reaches the member, e.g. `io.data_offset`. */
  readonly path: string
  readonly offset: number
  /** Size in bytes, 0 for a flexible array. */
  readonly size: number
  /** A macro without which the C header does not have this member. */
  readonly since: string | undefined
}

/** A structure's layout and accessors. */
export interface Struct<Members extends Shape> {
  /** The C tag, e.g. `kvm_regs`. */
  readonly name: string
  /** `sizeof`. */
  readonly size: number
  readonly fields: { readonly [name in keyof Members]: Field<Members[name]> }
  readonly shape: Members
  readonly leaves: ReadonlyArray<Leaf>
  /** A zeroed structure, with room for `elements` elements of its flexible array. */
  readonly make: (elements?: number) => StructView
}

const alignmentOf = (spec: Spec): number => {
  switch (spec.kind) {
    case "scalar":
      return spec.size
    case "bytes":
      return 1
    case "array":
      return alignmentOf(spec.element)
    case "group":
      return Object.values(spec.members).reduce((alignment, member) => Math.max(alignment, alignmentOf(member)), 1)
  }
}

const alignUp = (offset: number, alignment: number): number => Math.ceil(offset / alignment) * alignment

const membersOf = (
  spec: GroupSpec<Shape>
): { readonly size: number; readonly offsets: ReadonlyMap<string, number> } => {
  const offsets = new Map<string, number>()
  let end = 0
  for (const [name, member] of Object.entries(spec.members)) {
    const offset = spec.overlay ? 0 : alignUp(end, alignmentOf(member))
    offsets.set(name, offset)
    end = Math.max(end, offset + sizeOf(member))
  }
  return { size: alignUp(end, alignmentOf(spec)), offsets }
}

const sizeOf = (spec: Spec): number => {
  switch (spec.kind) {
    case "scalar":
      return spec.size
    case "bytes":
      return spec.length
    case "array":
      return spec.length * sizeOf(spec.element)
    case "group":
      return membersOf(spec).size
  }
}

const numberField = (type: NumberField["type"], offset: number, size: number): NumberField => {
  switch (type) {
    case "u8":
      return {
        type,
        offset,
        size,
        get: (view, base = 0) => view.getUint8(base + offset),
        set: (view, value, base = 0) => view.setUint8(base + offset, value)
      }
    case "u16":
      return {
        type,
        offset,
        size,
        get: (view, base = 0) => view.getUint16(base + offset, true),
        set: (view, value, base = 0) => view.setUint16(base + offset, value, true)
      }
    case "u32":
      return {
        type,
        offset,
        size,
        get: (view, base = 0) => view.getUint32(base + offset, true),
        set: (view, value, base = 0) => view.setUint32(base + offset, value, true)
      }
    case "s16":
      return {
        type,
        offset,
        size,
        get: (view, base = 0) => view.getInt16(base + offset, true),
        set: (view, value, base = 0) => view.setInt16(base + offset, value, true)
      }
    case "s32":
      return {
        type,
        offset,
        size,
        get: (view, base = 0) => view.getInt32(base + offset, true),
        set: (view, value, base = 0) => view.setInt32(base + offset, value, true)
      }
  }
}

const TWO_POW_32 = 0x1_0000_0000

const bigField = (type: BigField["type"], offset: number, size: number): BigField => ({
  type,
  offset,
  size,
  get: type === "u64"
    ? (view, base = 0) => view.getBigUint64(base + offset, true)
    : (view, base = 0) => view.getBigInt64(base + offset, true),
  set: (view, value, base = 0) => view.setBigUint64(base + offset, value, true),
  getNumber: (view, base = 0) =>
    view.getUint32(base + offset, true) + view.getUint32(base + offset + 4, true) * TWO_POW_32,
  setNumber: (view, value, base = 0) => {
    view.setUint32(base + offset, value, true)
    view.setUint32(base + offset + 4, Math.floor(value / TWO_POW_32), true)
  }
})

type AnyField = NumberField | BigField | BytesField | ArrayField<unknown> | { readonly [name: string]: unknown }

/** The accessors of one member, with absolute offsets; its leaves go to `leaves` when given. */
const build = (
  spec: Spec,
  path: string,
  offset: number,
  since: string | undefined,
  leaves: Array<Leaf> | undefined
): AnyField => {
  const size = sizeOf(spec)
  if (spec.kind !== "group") leaves?.push({ path, offset, size, since })
  switch (spec.kind) {
    case "scalar":
      return spec.type === "u64" || spec.type === "s64"
        ? bigField(spec.type, offset, size)
        : numberField(spec.type, offset, size)
    case "bytes":
      return {
        type: "bytes",
        offset,
        size,
        of: (view, base = 0) => new Uint8Array(view.buffer, view.byteOffset + base + offset, size)
      }
    case "array": {
      const stride = sizeOf(spec.element)
      return {
        type: "array",
        offset,
        size,
        length: spec.length,
        stride,
        at: (index) => offset + index * stride,
        element: build(spec.element, path, 0, since, undefined)
      }
    }
    case "group": {
      const fields: { [name: string]: unknown } = {}
      const { offsets } = membersOf(spec)
      const prefix = path === "" || spec.anonymous ? path : `${path}.`
      for (const [name, member] of Object.entries(spec.members)) {
        const memberPath = member.kind === "group" && member.anonymous ? prefix : `${prefix}${name}`
        fields[name] = build(member, memberPath, offset + (offsets.get(name) ?? 0), spec.since ?? since, leaves)
      }
      return fields
    }
  }
}

/** Declares a structure by its C tag and members. */
export const struct = <const Members extends Shape>(name: string, shape: Members): Struct<Members> => {
  const spec = group(shape)
  const leaves: Array<Leaf> = []
  // `build` follows the declaration member by member, as `Field` does in types; the checker cannot connect the two.
  // oxlint-disable-next-line typescript/no-unsafe-type-assertion
  const fields = build(spec, "", 0, undefined, leaves) as Struct<Members>["fields"]
  const size = sizeOf(spec)
  const last = Object.values(shape).at(-1)
  const stride = last?.kind === "array" && last.length === 0 ? sizeOf(last.element) : 0
  return {
    name,
    size,
    fields,
    shape,
    leaves,
    make: (elements = 0) => new DataView(new ArrayBuffer(size + elements * stride))
  }
}
