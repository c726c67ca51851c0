/**
 * The foreign functions on Node's built-in `node:ffi` (Node 26.1 and later). Imports nothing of Effect.
 */
import type * as NodeFfiModule from "node:ffi"
import { close } from "node:fs"
import process from "node:process"
import {
  EFD_CLOEXEC,
  ErrnoNumber,
  type ForeignFunctions,
  isForeignString,
  MFD_CLOEXEC,
  O_CLOEXEC,
  SIG_DFL,
  SIGACTION_HANDLER,
  SIGACTION_SIZE,
  SOCK_CLOEXEC,
  syscallNumbers
} from "./ForeignFunctions.ts"
import { makePoll, UV_POLL } from "./UvPoll.ts"

/** Functions and callbacks are good while their library is open, so every library is held for the life of the thread. */
const libraries: Array<NodeFfiModule.DynamicLibrary> = []

/**
 * Loads `node:ffi`, or says with `undefined` that this Node does not have it. `quiet` holds back the module's one
 * `ExperimentalWarning` and nothing else: the filter is in place only during the (synchronous) load.
 */
const loadNodeFfi = (quiet: boolean): typeof NodeFfiModule | undefined => {
  if (!quiet) return process.getBuiltinModule("node:ffi")
  const emitWarning: unknown = Reflect.get(process, "emitWarning")
  if (typeof emitWarning !== "function") return process.getBuiltinModule("node:ffi")
  process.emitWarning = (...warning: Array<unknown>) => {
    if (warning[1] === "ExperimentalWarning" && String(warning[0]).includes("FFI")) return
    Reflect.apply(emitWarning, process, warning)
  }
  try {
    return process.getBuiltinModule("node:ffi")
  } finally {
    Reflect.set(process, "emitWarning", emitWarning)
  }
}

/** Reads and writes with flags, where the C library has them. They take pointers alone, see below. */
const loadVectoredFlags = (ffi: typeof NodeFfiModule) => {
  try {
    const { functions, lib } = ffi.dlopen(null, {
      preadv2: { arguments: ["pointer", "pointer", "pointer", "pointer", "pointer"], return: "i32" },
      pwritev2: { arguments: ["pointer", "pointer", "pointer", "pointer", "pointer"], return: "i32" }
    })
    libraries.push(lib)
    return functions
  } catch {
    return undefined
  }
}

/*
 * Functions that are called often take all of their arguments as pointers. Where a signature has integers, Node puts a function
 * of JavaScript before the call that checks their ranges, for 0.1 to 0.3 µs; with several pointers and nothing else the call goes
 * straight to C, for 0.01 µs. In the calling conventions of x64 and arm64 an `int` is the lower half of such an argument.
 */

/** Up to this integer, its pointer is kept. */
const WORDS_MAX = 4096
const words: Array<bigint> = []

/** An integer of at most 32 bits as an argument of the type `pointer`. */
const word = (value: number): bigint => words[value] ?? makeWord(value)

const makeWord = (value: number): bigint => {
  if (!(value >= 0 && value < WORDS_MAX)) return BigInt(value >>> 0)
  while (words.length <= value) words.push(BigInt(words.length))
  return BigInt(value)
}

/** Makes this thread's functions, or says with `undefined` that this Node has no `node:ffi`. */
export const makeNodeFfi = (options: { readonly quiet: boolean }): ForeignFunctions | undefined => {
  const ffi = loadNodeFfi(options.quiet)
  const calls = syscallNumbers[process.arch]
  if (ffi === undefined || calls === undefined) return undefined
  // The process image itself has libc and libuv: no library names, so musl works as glibc does.
  const { functions: c, lib } = ffi.dlopen(null, {
    __errno_location: { arguments: [], return: "u64" },
    __libc_current_sigrtmin: { arguments: [], return: "i32" },
    open: { arguments: ["string", "i32", "u32"], return: "i32" },
    close: { arguments: ["i32"], return: "i32" },
    memfd_create: { arguments: ["string", "u32"], return: "i32" },
    ftruncate: { arguments: ["i32", "i64"], return: "i32" },
    mmap: { arguments: ["u64", "u64", "i32", "i32", "i32", "i64"], return: "i64" },
    munmap: { arguments: ["u64", "u64"], return: "i32" },
    madvise: { arguments: ["u64", "u64", "i32"], return: "i32" },
    socket: { arguments: ["i32", "i32", "i32"], return: "i32" },
    fallocate: { arguments: ["i32", "i32", "i64", "i64"], return: "i32" },
    flock: { arguments: ["i32", "i32"], return: "i32" },
    eventfd: { arguments: ["u32", "i32"], return: "i32" },
    syscall: { arguments: ["i64", "i64", "i64", "i64"], return: "i64" },
    sigaction: { arguments: ["i32", "u64", "u64"], return: "i32" }
  })
  // A second handle on the same symbols, for the pointer form of `ioctl`.
  const { functions: withBuffer, lib: secondLib } = ffi.dlopen(null, {
    ioctl: { arguments: ["i32", "u32", "buffer"], return: "i32" }
  })
  const { functions: hot, lib: hotLib } = ffi.dlopen(null, {
    ioctl: { arguments: ["pointer", "pointer", "pointer"], return: "i32" },
    readv: { arguments: ["pointer", "pointer", "pointer"], return: "i32" },
    writev: { arguments: ["pointer", "pointer", "pointer"], return: "i32" },
    eventfd_write: { arguments: ["pointer", "pointer"], return: "i32" },
    eventfd_read: { arguments: ["pointer", "pointer"], return: "i32" }
  })
  libraries.push(lib, secondLib, hotLib)
  // Younger than some C libraries in use.
  const withFlags = loadVectoredFlags(ffi)

  // `errno` of this thread as a typed array: read at once after the call, before anything can allocate and change it.
  const errno = new Int32Array(ffi.toArrayBuffer(c.__errno_location(), 4, false))
  const failure = (): number => -(errno[0] ?? ErrnoNumber.EINVAL)

  // The last request: a loop that makes the same one again and again, as a vCPU's does, allocates nothing for it.
  let request = 0
  let requestWord = 0n
  const wordOfRequest = (wanted: number): bigint => {
    if (wanted !== request) {
      request = wanted
      requestWord = word(wanted)
    }
    return requestWord
  }

  const counter = new BigUint64Array(new ArrayBuffer(8))
  const counterWords = new Uint32Array(counter.buffer)
  const counterAddress = ffi.getRawPointer(counter)

  const poll = makePoll(({ onClosed, onPoll }) => {
    const { functions: uv, lib } = ffi.dlopen(null, {
      calloc: { arguments: ["u64", "u64"], return: "u64" },
      free: { arguments: ["u64"], return: "void" },
      uv_handle_size: { arguments: ["i32"], return: "u64" },
      uv_poll_init: { arguments: ["u64", "u64", "i32"], return: "i32" },
      uv_poll_start: { arguments: ["pointer", "pointer", "pointer"], return: "i32" },
      uv_poll_stop: { arguments: ["u64"], return: "i32" },
      uv_ref: { arguments: ["u64"], return: "void" },
      uv_unref: { arguments: ["u64"], return: "void" },
      uv_close: { arguments: ["u64", "u64"], return: "void" }
    })
    libraries.push(lib)
    const pollCallback = lib.registerCallback({ arguments: ["u64", "i32", "i32"], return: "void" }, onPoll)
    const closeCallback = lib.registerCallback({ arguments: ["u64"], return: "void" }, onClosed)
    const size = uv.uv_handle_size(UV_POLL)
    const loop = ffi.getCurrentEventLoop()
    return {
      allocate: () => uv.calloc(1n, size),
      free: (handle) => uv.free(handle),
      init: (handle, fd) => uv.uv_poll_init(loop, handle, fd),
      start: (handle, events) => uv.uv_poll_start(handle, word(events), pollCallback),
      stop: (handle) => uv.uv_poll_stop(handle),
      ref: (handle) => uv.uv_ref(handle),
      unref: (handle) => uv.uv_unref(handle),
      close: (handle) => uv.uv_close(handle, closeCallback)
    }
  })

  const installKickSignal = (): number => {
    const signal = c.__libc_current_sigrtmin() + 1
    const handler = lib.getSymbol("getpid")
    const action = new DataView(new ArrayBuffer(SIGACTION_SIZE))
    if (c.sigaction(signal, 0n, ffi.getRawPointer(action)) < 0) return failure()
    const current = action.getBigUint64(SIGACTION_HANDLER, true)
    if (current === handler) return signal
    if (current !== SIG_DFL) return -ErrnoNumber.EBUSY
    const wanted = new DataView(new ArrayBuffer(SIGACTION_SIZE))
    wanted.setBigUint64(SIGACTION_HANDLER, handler, true)
    return c.sigaction(signal, ffi.getRawPointer(wanted), 0n) < 0 ? failure() : signal
  }

  return {
    name: "node:ffi",
    open: (path, flags) => {
      if (!isForeignString(path)) return -ErrnoNumber.EINVAL
      const result = c.open(path, flags | O_CLOEXEC, 0)
      return result < 0 ? failure() : result
    },
    close: (fd) => c.close(fd) < 0 ? failure() : 0,
    closeSlowly: (fd, done) => close(fd, () => done()),
    ioctlNumber: (fd, request, argument) => {
      const result = hot.ioctl(word(fd), wordOfRequest(request), argument)
      return result < 0 ? failure() : result
    },
    ioctlBuffer: (fd, request, argument) => {
      const result = withBuffer.ioctl(fd, request, argument)
      return result < 0 ? failure() : result
    },
    memfdCreate: (name, flags) => {
      if (!isForeignString(name)) return -ErrnoNumber.EINVAL
      const result = c.memfd_create(name, flags | MFD_CLOEXEC)
      return result < 0 ? failure() : result
    },
    ftruncate: (fd, length) => c.ftruncate(fd, BigInt(length)) < 0 ? failure() : 0,
    mmap: (length, protection, flags, fd, offset) => {
      const address = c.mmap(0n, BigInt(length), protection, flags, fd, BigInt(offset))
      return address === -1n ? BigInt(failure()) : address
    },
    munmap: (address, length) => c.munmap(address, BigInt(length)) < 0 ? failure() : 0,
    madvise: (address, length, advice) => c.madvise(address, BigInt(length), advice) < 0 ? failure() : 0,
    viewAt: (address, length) => ffi.toArrayBuffer(address, length, false),
    addressOf: (buffer) => ffi.getRawPointer(buffer),
    preadv2: (fd, vectors, count, offset, flags) => {
      if (withFlags === undefined) return -ErrnoNumber.ENOSYS
      const result = withFlags.preadv2(word(fd), vectors, word(count), BigInt(offset), word(flags))
      return result < 0 ? failure() : result
    },
    pwritev2: (fd, vectors, count, offset, flags) => {
      if (withFlags === undefined) return -ErrnoNumber.ENOSYS
      const result = withFlags.pwritev2(word(fd), vectors, word(count), BigInt(offset), word(flags))
      return result < 0 ? failure() : result
    },
    fallocate: (fd, mode, offset, length) => c.fallocate(fd, mode, BigInt(offset), BigInt(length)) < 0 ? failure() : 0,
    flock: (fd, operation) => c.flock(fd, operation) < 0 ? failure() : 0,
    readv: (fd, vectors, count) => {
      const result = hot.readv(word(fd), vectors, word(count))
      return result < 0 ? failure() : result
    },
    writev: (fd, vectors, count) => {
      const result = hot.writev(word(fd), vectors, word(count))
      return result < 0 ? failure() : result
    },
    socket: (domain, type, protocol) => {
      const result = c.socket(domain, type | SOCK_CLOEXEC, protocol)
      return result < 0 ? failure() : result
    },
    eventfd: (initial, flags) => {
      const result = c.eventfd(initial, flags | EFD_CLOEXEC)
      return result < 0 ? failure() : result
    },
    eventfdWrite: (fd) => hot.eventfd_write(word(fd), 1n) < 0 ? failure() : 0,
    eventfdRead: (fd) => {
      if (hot.eventfd_read(word(fd), counterAddress) < 0) return failure()
      return (counterWords[0] ?? 0) + (counterWords[1] ?? 0) * 0x1_0000_0000
    },
    gettid: () => Number(c.syscall(BigInt(calls.gettid), 0n, 0n, 0n)),
    tgkill: (threadId, signal) =>
      c.syscall(BigInt(calls.tgkill), BigInt(process.pid), BigInt(threadId), BigInt(signal)) < 0n ? failure() : 0,
    installKickSignal,
    poll
  }
}
