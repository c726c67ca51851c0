/**
 * The foreign functions that a virtual machine monitor needs, as an Effect service with typed errors and scoped resources.
 *
 * Two back ends: Node's built-in `node:ffi` ({@link layerNodeFfi}) and the package koffi ({@link layerKoffi}). {@link layer}
 * takes the first that works. Hot paths and vCPU threads use `functions`, the plain synchronous face.
 */
import * as Context from "effect/Context"
import * as Effect from "effect/Effect"
import * as Layer from "effect/Layer"
import type * as Scope from "effect/Scope"
import { type FfiError, ffiError, FfiUnavailable } from "./FfiError.ts"
import {
  EFD_NONBLOCK,
  ErrnoNumber,
  type ForeignBuffer,
  type ForeignFunctions,
  type ForeignFunctionsName,
  type Ioctl,
  MAP_ANONYMOUS,
  MAP_NORESERVE,
  MAP_PRIVATE,
  MAP_SHARED,
  POLL_READABLE,
  type PollCallback,
  type PollHandle,
  PROT_READ,
  PROT_WRITE
} from "./internal/ForeignFunctions.ts"
import { loadForeignFunctions } from "./internal/loadForeignFunctions.ts"
import { map, type Mapping } from "./internal/Mapping.ts"

export type { ForeignBuffer, ForeignFunctions, ForeignFunctionsName, Ioctl, PollCallback, PollHandle }
export {
  MADV_DONTNEED,
  MADV_HUGEPAGE,
  MADV_REMOVE,
  O_NONBLOCK,
  O_RDONLY,
  O_RDWR,
  POLL_DISCONNECT,
  POLL_READABLE,
  POLL_WRITABLE
} from "./internal/ForeignFunctions.ts"
export { ForeignView, Mapping, UseAfterUnmap } from "./internal/Mapping.ts"

/** An eventfd: a counter in the kernel that one side adds to and the other takes. */
export interface EventFd {
  readonly fd: number
  /** Adds 1. Synchronous, allocates nothing, does nothing once the scope of the eventfd is closed. */
  readonly trigger: () => void
  /** Takes the counter: its value, 0 when nothing was added. */
  readonly drain: () => number
  /**
   * Calls `callback` on the event loop with the counter, taken, whenever it was added to, until the scope closes. One
   * callback per eventfd. The callback is plain code and may resume fibers.
   */
  readonly onSignal: (callback: (count: number) => void) => Effect.Effect<void, FfiError, Scope.Scope>
}

/** Size of a huge page of x86-64, and of arm64 with pages of 4 KiB, in bytes. */
export const HUGE_PAGE_SIZE = 0x20_0000

/** The foreign functions. */
export class Ffi extends Context.Service<Ffi, {
  /** The synchronous face, for this thread only. Results that are negative are `-errno`. */
  readonly functions: ForeignFunctions
  /** Opens a file; `flags` are `O_*`. */
  readonly open: (path: string, flags: number) => Effect.Effect<number, FfiError, Scope.Scope>
  /** An `ioctl` whose argument is a number, an address, or a structure. */
  readonly ioctl: (
    fd: number,
    ioctl: Ioctl,
    argument?: number | bigint | ForeignBuffer
  ) => Effect.Effect<number, FfiError>
  /** Takes ownership of a descriptor that an `ioctl` returned: it is closed with the scope. */
  readonly own: (fd: Effect.Effect<number, FfiError>) => Effect.Effect<number, FfiError, Scope.Scope>
  /**
   * As `own`, for a descriptor whose end keeps the kernel busy for long: it is closed on a thread of libuv's pool, so that the
   * event loop goes on. The scope waits for it.
   */
  readonly ownSlow: (fd: Effect.Effect<number, FfiError>) => Effect.Effect<number, FfiError, Scope.Scope>
  /** Memory in a file without a name, `size` bytes long. */
  readonly memfd: (name: string, size: number) => Effect.Effect<number, FfiError, Scope.Scope>
  /**
   * Maps `length` bytes of zeroed private memory, without reserving swap. From {@link HUGE_PAGE_SIZE} on it begins at a multiple
   * of that, so that the kernel can back it, and a guest that has it as RAM, with huge pages.
   */
  readonly mapAnonymous: (length: number) => Effect.Effect<Mapping, FfiError, Scope.Scope>
  /** Maps `length` bytes of a descriptor, shared, for reading and writing. */
  readonly mapShared: (fd: number, length: number, offset?: number) => Effect.Effect<Mapping, FfiError, Scope.Scope>
  /** `madvise(2)` for part of a mapping; `advice` is `MADV_*`, offset and length are multiples of the page size. */
  readonly madvise: (
    mapping: Mapping,
    offset: number,
    length: number,
    advice: number
  ) => Effect.Effect<void, FfiError>
  /** An eventfd with its counter at 0. */
  readonly eventFd: Effect.Effect<EventFd, FfiError, Scope.Scope>
  /**
   * Calls `callback` on the event loop while the descriptor is ready, until the scope closes. Main thread only, one watcher
   * per descriptor. The callback must make the descriptor unready (read it empty).
   */
  readonly poll: (
    fd: number,
    events: number,
    callback: PollCallback
  ) => Effect.Effect<PollHandle, FfiError, Scope.Scope>
  /** The signal that takes a vCPU thread out of `KVM_RUN`; installs its handler at the first use. */
  readonly kickSignal: Effect.Effect<number, FfiError>
}>()("@troupe/node/Ffi") {}

const check = (operation: string, args: string, call: () => number): Effect.Effect<number, FfiError> =>
  Effect.suspend(() => {
    const result = call()
    return result < 0 ? Effect.fail(ffiError(operation, args, result)) : Effect.succeed(result)
  })

/** `size` bytes as C can count them, or -1, which the kernel refuses. */
const byteCount = (size: number): number => Number.isSafeInteger(size) && size >= 0 ? size : -1

const formatArgument = (argument: number | bigint | ForeignBuffer): string =>
  typeof argument === "object" ? `${argument.byteLength} bytes` : `0x${argument.toString(16)}`

const mapOwned = (operation: string, args: string, acquire: () => Mapping | number) =>
  Effect.acquireRelease(
    Effect.suspend(() => {
      const mapping = acquire()
      return typeof mapping === "number"
        ? Effect.fail(ffiError(operation, args, mapping))
        : Effect.succeed(mapping)
    }),
    (mapping) => Effect.sync(() => mapping.unmap())
  )

/** The service over the given synchronous functions. */
export const make = (functions: ForeignFunctions): Ffi["Service"] => {
  const own: Ffi["Service"]["own"] = (fd) => Effect.acquireRelease(fd, (fd) => Effect.sync(() => functions.close(fd)))
  const ownSlow: Ffi["Service"]["own"] = (fd) =>
    Effect.acquireRelease(
      fd,
      (fd) => Effect.callback<void>((resume) => functions.closeSlowly(fd, () => resume(Effect.void)))
    )

  const poll: Ffi["Service"]["poll"] = (fd, events, callback) =>
    Effect.acquireRelease(
      Effect.suspend(() => {
        const handle = functions.poll(fd, events, callback)
        if (typeof handle !== "number") return Effect.succeed(handle)
        const hint = handle === -ErrnoNumber.ENOTSUP
          ? "Descriptors are watched on the main thread only"
          : handle === -ErrnoNumber.EEXIST
          ? "The descriptor is being watched already"
          : undefined
        return Effect.fail(ffiError("uv_poll", `${fd}, ${events}`, handle, hint))
      }),
      (handle) => Effect.sync(() => handle.close())
    )

  const eventFd = Effect.gen(function*() {
    const fd = yield* own(check("eventfd", "0, EFD_NONBLOCK", () => functions.eventfd(0, EFD_NONBLOCK)))
    // A descriptor number is used again as soon as it is closed, so a late trigger must not reach it.
    let open = true
    yield* Effect.addFinalizer(() =>
      Effect.sync(() => {
        open = false
      })
    )
    const drain = () => open ? Math.max(0, functions.eventfdRead(fd)) : 0
    return {
      fd,
      trigger: () => {
        if (open) functions.eventfdWrite(fd)
      },
      drain,
      onSignal: (callback) =>
        Effect.asVoid(poll(fd, POLL_READABLE, () => {
          const count = drain()
          if (count > 0) callback(count)
        }))
    } satisfies EventFd
  })

  return Ffi.of({
    functions,
    open: (path, flags) =>
      own(check("open", `${JSON.stringify(path)}, 0x${flags.toString(16)}`, () => functions.open(path, flags))),
    ioctl: (fd, ioctl, argument = 0) =>
      check(ioctl.name, `${fd}, ${formatArgument(argument)}`, () =>
        typeof argument === "object"
          ? functions.ioctlBuffer(fd, ioctl.request, argument)
          : functions.ioctlNumber(fd, ioctl.request, BigInt(argument))),
    own,
    ownSlow,
    memfd: (name, size) =>
      own(check("memfd_create", JSON.stringify(name), () => functions.memfdCreate(name, 0))).pipe(
        Effect.tap((fd) => check("ftruncate", `${fd}, ${size}`, () => functions.ftruncate(fd, byteCount(size))))
      ),
    mapAnonymous: (length) =>
      mapOwned("mmap", `${length} bytes, anonymous`, () =>
        map(functions, {
          length,
          protection: PROT_READ | PROT_WRITE,
          flags: MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
          fd: -1,
          offset: 0,
          ...(length >= HUGE_PAGE_SIZE ? { alignment: HUGE_PAGE_SIZE } : {})
        })),
    mapShared: (fd, length, offset = 0) =>
      mapOwned(
        "mmap",
        `${length} bytes, descriptor ${fd}, offset ${offset}`,
        () => map(functions, { length, protection: PROT_READ | PROT_WRITE, flags: MAP_SHARED, fd, offset })
      ),
    madvise: (mapping, offset, length, advice) =>
      Effect.asVoid(
        check("madvise", `offset ${offset}, ${length} bytes, advice ${advice}`, () =>
          mapping.released || offset < 0 || length < 0 || offset + length > mapping.length
            ? -ErrnoNumber.EINVAL
            : functions.madvise(mapping.address + BigInt(offset), length, advice))
      ),
    eventFd,
    poll,
    kickSignal: check("sigaction", "SIGRTMIN+1", () => functions.installKickSignal())
  })
}

/** Choices for {@link layerWith}. */
export interface FfiOptions {
  /** The back ends to try, in this order. Default: `node:ffi`, then koffi. */
  readonly backEnds?: ReadonlyArray<ForeignFunctionsName>
  /** Hold back the `ExperimentalWarning` that Node prints when `node:ffi` is loaded, and only that. Default: `false`. */
  readonly quiet?: boolean
}

/** The service on the first of the back ends that works here. */
export const layerWith = (options: FfiOptions): Layer.Layer<Ffi, FfiUnavailable> =>
  Layer.effect(
    Ffi,
    Effect.suspend(() => {
      const attempts: Array<{ readonly backEnd: string; readonly problem: string }> = []
      for (const backEnd of options.backEnds ?? ["node:ffi", "koffi"]) {
        const loaded = loadForeignFunctions(backEnd, { quiet: options.quiet ?? false })
        if (typeof loaded !== "string") return Effect.succeed(make(loaded))
        attempts.push({ backEnd, problem: loaded })
      }
      return Effect.fail(new FfiUnavailable({ attempts }))
    })
  )

/** The service on Node's built-in `node:ffi`: Node 26.1 and later, nothing to install. */
export const layerNodeFfi: Layer.Layer<Ffi, FfiUnavailable> = layerWith({ backEnds: ["node:ffi"] })

/** The service on the package koffi, an optional peer dependency: Node 22 and later. */
export const layerKoffi: Layer.Layer<Ffi, FfiUnavailable> = layerWith({ backEnds: ["koffi"] })

/** The service on `node:ffi` where this Node has it, otherwise on koffi. */
export const layer: Layer.Layer<Ffi, FfiUnavailable> = layerWith({})
