/**
 * The foreign functions on koffi (https://koffi.dev), an optional peer dependency, for Node 22 and 24 which have no
 * `node:ffi`. Imports nothing of Effect, and koffi itself only when asked to.
 */
import type * as KoffiModule from "koffi"
import { close } from "node:fs"
import { createRequire } from "node:module"
import process from "node:process"
import {
  EFD_CLOEXEC,
  ErrnoNumber,
  type ForeignBuffer,
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

/** koffi returns a 64-bit result as a number where that is exact. */
type Integer64 = number | bigint

/** Loads koffi, or says with `undefined` that it is not installed. */
const loadKoffi = (): typeof KoffiModule | undefined => {
  try {
    return createRequire(import.meta.url)("koffi")
  } catch {
    return undefined
  }
}

/** Younger than some C libraries in use. */
const loadVectoredFlags = (
  lib: KoffiModule.LibraryHandle,
  name: "preadv2" | "pwritev2"
): ((fd: number, vectors: bigint, count: number, offset: number, flags: number) => Integer64) | undefined => {
  try {
    return lib.func(`int64_t ${name}(int fd, uint64_t vectors, int count, int64_t offset, int flags)`)
  } catch {
    return undefined
  }
}

/** Makes this thread's functions, or says with `undefined` that koffi is not installed. */
export const makeKoffiFfi = (): ForeignFunctions | undefined => {
  const koffi = loadKoffi()
  const calls = syscallNumbers[process.arch]
  if (koffi === undefined || calls === undefined) return undefined
  // The process image itself has libc: no library name, so musl works as glibc does.
  const lib = koffi.load(null)
  const cErrnoLocation: () => Integer64 = lib.func("uint64_t __errno_location()")
  const cSigrtmin: () => number = lib.func("int __libc_current_sigrtmin()")
  const cOpen: (path: string, flags: number, mode: number) => number = lib.func(
    "int open(const char *path, int flags, uint32_t mode)"
  )
  const cClose: (fd: number) => number = lib.func("int close(int fd)")
  const cIoctl: (fd: number, request: number, argument: bigint) => number = lib.func(
    "int ioctl(int fd, uint32_t request, uint64_t argument)"
  )
  const cIoctlBuffer: (fd: number, request: number, argument: ForeignBuffer) => number = lib.func(
    "int ioctl(int fd, uint32_t request, void *argument)"
  )
  const cMemfdCreate: (name: string, flags: number) => number = lib.func(
    "int memfd_create(const char *name, uint32_t flags)"
  )
  const cFtruncate: (fd: number, length: number) => number = lib.func("int ftruncate(int fd, int64_t length)")
  const cMmap: (
    address: number,
    length: number,
    protection: number,
    flags: number,
    fd: number,
    offset: number
  ) => Integer64 = lib.func(
    "int64_t mmap(uint64_t address, uint64_t length, int protection, int flags, int fd, int64_t offset)"
  )
  const cMunmap: (address: bigint, length: number) => number = lib.func("int munmap(uint64_t address, uint64_t length)")
  const cMadvise: (address: bigint, length: number, advice: number) => number = lib.func(
    "int madvise(uint64_t address, uint64_t length, int advice)"
  )
  const cReadv: (fd: number, vectors: bigint, count: number) => number = lib.func(
    "int readv(int fd, uint64_t vectors, int count)"
  )
  const cWritev: (fd: number, vectors: bigint, count: number) => number = lib.func(
    "int writev(int fd, uint64_t vectors, int count)"
  )
  const cSocket: (domain: number, type: number, protocol: number) => number = lib.func(
    "int socket(int domain, int type, int protocol)"
  )
  const cFallocate: (fd: number, mode: number, offset: number, length: number) => number = lib.func(
    "int fallocate(int fd, int mode, int64_t offset, int64_t length)"
  )
  const cFlock: (fd: number, operation: number) => number = lib.func("int flock(int fd, int operation)")
  const cPreadv2 = loadVectoredFlags(lib, "preadv2")
  const cPwritev2 = loadVectoredFlags(lib, "pwritev2")
  const cEventfd: (initial: number, flags: number) => number = lib.func("int eventfd(uint32_t initial, int flags)")
  const cEventfdWrite: (fd: number, value: number) => number = lib.func("int eventfd_write(int fd, uint64_t value)")
  const cEventfdRead: (fd: number, value: bigint) => number = lib.func("int eventfd_read(int fd, uint64_t value)")
  const cSyscall: (number: number, a: number, b: number, c: number) => Integer64 = lib.func(
    "int64_t syscall(int64_t number, int64_t a, int64_t b, int64_t c)"
  )
  const cSigaction: (signal: number, action: bigint, old: bigint) => number = lib.func(
    "int sigaction(int signal, uint64_t action, uint64_t old)"
  )

  // `errno` of this thread as a typed array: read at once after the call, before anything can allocate and change it.
  const errno = new Int32Array(koffi.view(BigInt(cErrnoLocation()), 4))
  const failure = (): number => -(errno[0] ?? ErrnoNumber.EINVAL)

  const counter = new Uint32Array(new ArrayBuffer(8))
  const counterAddress = koffi.address(counter)

  // Not `koffi.node.poll`: it aborts the process when libuv refuses the descriptor.
  const poll = makePoll(({ onClosed, onPoll }) => {
    const calloc: (count: number, size: number) => Integer64 = lib.func("uint64_t calloc(size_t count, size_t size)")
    const free: (address: bigint) => void = lib.func("void free(uint64_t address)")
    const handleSize: (type: number) => number = lib.func("size_t uv_handle_size(int type)")
    const getLoop: (env: typeof KoffiModule.node.env, loop: BigUint64Array) => number = lib.func(
      "int napi_get_uv_event_loop(void *env, void *loop)"
    )
    const init: (loop: bigint, handle: bigint, fd: number) => number = lib.func(
      "int uv_poll_init(uint64_t loop, uint64_t handle, int fd)"
    )
    const start: (handle: bigint, events: number, callback: bigint) => number = lib.func(
      "int uv_poll_start(uint64_t handle, int events, uint64_t callback)"
    )
    const stop: (handle: bigint) => void = lib.func("int uv_poll_stop(uint64_t handle)")
    const ref: (handle: bigint) => void = lib.func("void uv_ref(uint64_t handle)")
    const unref: (handle: bigint) => void = lib.func("void uv_unref(uint64_t handle)")
    const close: (handle: bigint, callback: bigint) => void = lib.func(
      "void uv_close(uint64_t handle, uint64_t callback)"
    )
    const pollCallback = koffi.register(
      (handle: Integer64, status: number, events: number) => onPoll(BigInt(handle), status, events),
      koffi.pointer(koffi.proto("void", ["uint64_t", "int", "int"]))
    )
    const closeCallback = koffi.register(
      (handle: Integer64) => onClosed(BigInt(handle)),
      koffi.pointer(koffi.proto("void", ["uint64_t"]))
    )
    const size = handleSize(UV_POLL)
    const loop = new BigUint64Array(new ArrayBuffer(8))
    getLoop(koffi.node.env, loop)
    return {
      allocate: () => BigInt(calloc(1, size)),
      free,
      init: (handle, fd) => init(loop[0] ?? 0n, handle, fd),
      start: (handle, events) => start(handle, events, pollCallback),
      stop,
      ref,
      unref,
      close: (handle) => close(handle, closeCallback)
    }
  })

  const installKickSignal = (): number => {
    const signal = cSigrtmin() + 1
    const handler = BigInt(lib.symbol("getpid"))
    const action = new DataView(new ArrayBuffer(SIGACTION_SIZE))
    if (cSigaction(signal, 0n, koffi.address(action)) < 0) return failure()
    const current = action.getBigUint64(SIGACTION_HANDLER, true)
    if (current === handler) return signal
    if (current !== SIG_DFL) return -ErrnoNumber.EBUSY
    const wanted = new DataView(new ArrayBuffer(SIGACTION_SIZE))
    wanted.setBigUint64(SIGACTION_HANDLER, handler, true)
    return cSigaction(signal, koffi.address(wanted), 0n) < 0 ? failure() : signal
  }

  return {
    name: "koffi",
    open: (path, flags) => {
      if (!isForeignString(path)) return -ErrnoNumber.EINVAL
      const result = cOpen(path, flags | O_CLOEXEC, 0)
      return result < 0 ? failure() : result
    },
    close: (fd) => cClose(fd) < 0 ? failure() : 0,
    closeSlowly: (fd, done) => close(fd, () => done()),
    ioctlNumber: (fd, request, argument) => {
      const result = cIoctl(fd, request, argument)
      return result < 0 ? failure() : result
    },
    ioctlBuffer: (fd, request, argument) => {
      const result = cIoctlBuffer(fd, request, argument)
      return result < 0 ? failure() : result
    },
    memfdCreate: (name, flags) => {
      if (!isForeignString(name)) return -ErrnoNumber.EINVAL
      const result = cMemfdCreate(name, flags | MFD_CLOEXEC)
      return result < 0 ? failure() : result
    },
    ftruncate: (fd, length) => cFtruncate(fd, length) < 0 ? failure() : 0,
    mmap: (length, protection, flags, fd, offset) => {
      const address = cMmap(0, length, protection, flags, fd, offset)
      return BigInt(address) === -1n ? BigInt(failure()) : BigInt(address)
    },
    munmap: (address, length) => cMunmap(address, length) < 0 ? failure() : 0,
    madvise: (address, length, advice) => cMadvise(address, length, advice) < 0 ? failure() : 0,
    viewAt: (address, length) => koffi.view(address, length),
    addressOf: (buffer) => koffi.address(buffer),
    preadv2: (fd, vectors, count, offset, flags) => {
      if (cPreadv2 === undefined) return -ErrnoNumber.ENOSYS
      const result = Number(cPreadv2(fd, vectors, count, offset, flags))
      return result < 0 ? failure() : result
    },
    pwritev2: (fd, vectors, count, offset, flags) => {
      if (cPwritev2 === undefined) return -ErrnoNumber.ENOSYS
      const result = Number(cPwritev2(fd, vectors, count, offset, flags))
      return result < 0 ? failure() : result
    },
    fallocate: (fd, mode, offset, length) => cFallocate(fd, mode, offset, length) < 0 ? failure() : 0,
    flock: (fd, operation) => cFlock(fd, operation) < 0 ? failure() : 0,
    readv: (fd, vectors, count) => {
      const result = cReadv(fd, vectors, count)
      return result < 0 ? failure() : result
    },
    writev: (fd, vectors, count) => {
      const result = cWritev(fd, vectors, count)
      return result < 0 ? failure() : result
    },
    socket: (domain, type, protocol) => {
      const result = cSocket(domain, type | SOCK_CLOEXEC, protocol)
      return result < 0 ? failure() : result
    },
    eventfd: (initial, flags) => {
      const result = cEventfd(initial, flags | EFD_CLOEXEC)
      return result < 0 ? failure() : result
    },
    eventfdWrite: (fd) => cEventfdWrite(fd, 1) < 0 ? failure() : 0,
    eventfdRead: (fd) => {
      if (cEventfdRead(fd, counterAddress) < 0) return failure()
      return (counter[0] ?? 0) + (counter[1] ?? 0) * 0x1_0000_0000
    },
    gettid: () => Number(cSyscall(calls.gettid, 0, 0, 0)),
    tgkill: (threadId, signal) => Number(cSyscall(calls.tgkill, process.pid, threadId, signal)) < 0 ? failure() : 0,
    installKickSignal,
    poll
  }
}
