/**
 * The few C functions that a virtual machine monitor needs, as one plain synchronous interface that both FFI back ends
 * implement. Nothing here or in the back ends imports Effect, so that a vCPU thread can load it cheaply.
 *
 * Every function follows the convention of the kernel: a result that is negative is `-errno`. Nothing throws for a failed
 * system call, and the hot functions (`ioctlNumber`, `eventfdWrite`, `eventfdRead`) allocate nothing.
 *
 * An object of this type belongs to the thread that made it.
 */

/** The FFI back ends, by the names under which a thread asks for one. */
export type ForeignFunctionsName = "node:ffi" | "koffi"

/** Bytes of JavaScript memory that the kernel may read and write during one call. */
export type ForeignBuffer = Uint8Array<ArrayBuffer> | DataView<ArrayBuffer> | BigUint64Array<ArrayBuffer>

/** An `ioctl` by name and number. */
export interface Ioctl {
  readonly name: string
  /** The request, an unsigned 32-bit number. */
  readonly request: number
}

/** A descriptor watched on Node's event loop. */
export interface PollHandle {
  /** Lets the watched descriptor keep the process alive (it does so from the start). */
  readonly ref: () => void
  /** Lets the process end although the descriptor is watched. */
  readonly unref: () => void
  /** Watches for other events from now on, for none with 0. */
  readonly watch: (events: number) => void
  /** Stops watching. The callback is not called again. Idempotent. Comes before the descriptor is closed. */
  readonly close: () => void
}

/**
 * Called on the event loop while the descriptor is ready. `status` is 0 or `-errno`; `events` is a set of
 * {@link POLL_READABLE} and its like. Readiness is a level, not an edge: a callback that does not make the descriptor
 * unready is called again at once.
 */
export type PollCallback = (status: number, events: number) => void

/** The foreign functions. Numbers that are negative are `-errno`. */
export interface ForeignFunctions {
  readonly name: ForeignFunctionsName
  /** `open(2)`: a descriptor. `O_CLOEXEC` is always added. */
  readonly open: (path: string, flags: number) => number
  /** `close(2)`. */
  readonly close: (fd: number) => number
  /** `close(2)` on a thread of libuv's pool, for a descriptor whose end keeps the kernel busy; `done` is called afterwards. */
  readonly closeSlowly: (fd: number, done: () => void) => void
  /** `ioctl(2)` whose argument is a number or an address. `request` is 32 bits wide, `argument` 64. */
  readonly ioctlNumber: (fd: number, request: number, argument: bigint) => number
  /** `ioctl(2)` whose argument is a structure in JavaScript memory. */
  readonly ioctlBuffer: (fd: number, request: number, argument: ForeignBuffer) => number
  /** `memfd_create(2)`: a descriptor. `MFD_CLOEXEC` is always added. */
  readonly memfdCreate: (name: string, flags: number) => number
  /** `ftruncate(2)`; `length` in bytes. */
  readonly ftruncate: (fd: number, length: number) => number
  /** `mmap(2)`: the address. `length` and `offset` in bytes; `fd` is -1 for anonymous memory. */
  readonly mmap: (length: number, protection: number, flags: number, fd: number, offset: number) => bigint
  /** `munmap(2)`. Whoever calls it has made every view of the range unusable before; see `MappedMemory`. */
  readonly munmap: (address: bigint, length: number) => number
  /** `madvise(2)`. */
  readonly madvise: (address: bigint, length: number, advice: number) => number
  /** An `ArrayBuffer` over foreign memory, without copying. Only `MappedMemory` should call it. */
  readonly viewAt: (address: bigint, length: number) => ArrayBuffer
  /** The address of JavaScript memory, valid while the buffer lives and is not detached. */
  readonly addressOf: (buffer: ForeignBuffer) => bigint
  /**
   * `preadv2(2)`: the number of bytes. `vectors` is the address of `count` structures `iovec`, together less than 2 GiB; with
   * {@link RWF_NOWAIT} it never waits for a medium. `-ENOSYS` where the C library does not have it.
   */
  readonly preadv2: (fd: number, vectors: bigint, count: number, offset: number, flags: number) => number
  /**
   * `pwritev2(2)`: the number of bytes. `vectors` is the address of `count` structures `iovec`, together less than 2 GiB; with
   * {@link RWF_NOWAIT} it waits for neither a medium nor a journal. `-ENOSYS` where the C library does not have it.
   */
  readonly pwritev2: (fd: number, vectors: bigint, count: number, offset: number, flags: number) => number
  /** `readv(2)`: the number of bytes. `vectors` is the address of `count` structures `iovec`, together less than 2 GiB. */
  readonly readv: (fd: number, vectors: bigint, count: number) => number
  /** `writev(2)`: the number of bytes. `vectors` is the address of `count` structures `iovec`, together less than 2 GiB. */
  readonly writev: (fd: number, vectors: bigint, count: number) => number
  /** `socket(2)`: a descriptor. `SOCK_CLOEXEC` is always added. */
  readonly socket: (domain: number, type: number, protocol: number) => number
  /** `fallocate(2)`; `mode` is a set of {@link FALLOC_FL_KEEP_SIZE} and its like. */
  readonly fallocate: (fd: number, mode: number, offset: number, length: number) => number
  /** `flock(2)`; `operation` is a set of {@link LOCK_EX} and its like. */
  readonly flock: (fd: number, operation: number) => number
  /** `eventfd(2)`: a descriptor. `EFD_CLOEXEC` is always added. */
  readonly eventfd: (initial: number, flags: number) => number
  /** Adds 1 to an eventfd's counter. */
  readonly eventfdWrite: (fd: number) => number
  /** Takes an eventfd's counter, or fails with `-EAGAIN` when it is 0 and the descriptor does not block. */
  readonly eventfdRead: (fd: number) => number
  /** `gettid(2)`: the kernel's number of the calling thread. */
  readonly gettid: () => number
  /** `tgkill(2)`: sends `signal` to one thread of this process. */
  readonly tgkill: (threadId: number, signal: number) => number
  /**
   * Makes `SIGRTMIN+1` interrupt system calls and do nothing else, and returns its number. The handler is the address of
   * libc's `getpid`, which is async-signal-safe and has no effect; there is no `SA_RESTART`. Idempotent, for the whole
   * process. Fails with `-EBUSY` when somebody else handles that signal.
   */
  readonly installKickSignal: () => number
  /**
   * Watches a descriptor on the event loop of the main thread. `events` is a set of {@link POLL_READABLE} and its like. One
   * watcher per descriptor (`-EEXIST`); never on a worker thread (`-ENOTSUP`), because a worker that is terminated with a
   * watched descriptor takes the process with it. The descriptor becomes non-blocking.
   */
  readonly poll: (fd: number, events: number, callback: PollCallback) => PollHandle | number
}

/** `poll` event: there is something to read (`UV_READABLE`). */
export const POLL_READABLE = 1
/** `poll` event: there is room to write (`UV_WRITABLE`). */
export const POLL_WRITABLE = 2
/** `poll` event: the other side hung up (`UV_DISCONNECT`). */
export const POLL_DISCONNECT = 4

/** `open(2)`: for reading only. */
export const O_RDONLY = 0x0
/** `open(2)`: for reading and writing. */
export const O_RDWR = 0x2
/** `open(2)`: do not block. */
export const O_NONBLOCK = 0x800
/** `open(2)`: close on `execve`. */
export const O_CLOEXEC = 0x8_0000

/** `socket(2)`: IPv4. */
export const AF_INET = 2
/** `socket(2)`: datagrams. */
export const SOCK_DGRAM = 2
/** `socket(2)`: close on `execve`. */
export const SOCK_CLOEXEC = 0x8_0000

/** `mmap(2)`: pages may be read. */
export const PROT_READ = 0x1
/** `mmap(2)`: pages may be written. */
export const PROT_WRITE = 0x2
/** `mmap(2)`: changes are seen by every mapping of the same file. */
export const MAP_SHARED = 0x1
/** `mmap(2)`: changes are private. */
export const MAP_PRIVATE = 0x2
/** `mmap(2)`: zeroed memory without a file. */
export const MAP_ANONYMOUS = 0x20
/** `mmap(2)`: reserve no swap space. */
export const MAP_NORESERVE = 0x4000

/** `eventfd(2)`: reads and writes do not block. */
export const EFD_NONBLOCK = 0x800
/** `eventfd(2)`: close on `execve`. */
export const EFD_CLOEXEC = 0x8_0000
/** `memfd_create(2)`: close on `execve`. */
export const MFD_CLOEXEC = 0x1

/** `madvise(2)`: drop the pages; anonymous memory reads as zeros afterwards. */
export const MADV_DONTNEED = 4
/** `madvise(2)`: free the pages and the backing store of shared memory. */
export const MADV_REMOVE = 9
/** `madvise(2)`: merge equal pages (KSM). */
export const MADV_MERGEABLE = 12
/** `madvise(2)`: use huge pages. */
export const MADV_HUGEPAGE = 14
/** `madvise(2)`: leave the range out of core dumps. */
export const MADV_DONTDUMP = 16

/** `preadv2(2)`, `pwritev2(2)`: do only what needs no waiting, `-EAGAIN` when that is nothing. */
export const RWF_NOWAIT = 8
/** `fallocate(2)`: the file keeps its size. */
export const FALLOC_FL_KEEP_SIZE = 1
/** `fallocate(2)`: give the room up; the bytes are zeros afterwards. Only with {@link FALLOC_FL_KEEP_SIZE}. */
export const FALLOC_FL_PUNCH_HOLE = 2
/** `fallocate(2)`: make the bytes zeros and keep the room. */
export const FALLOC_FL_ZERO_RANGE = 16
/** `flock(2)`: others may lock it like this at the same time. */
export const LOCK_SH = 1
/** `flock(2)`: nobody else may lock it. */
export const LOCK_EX = 2
/** `flock(2)`: fail with `-EAGAIN` instead of waiting. */
export const LOCK_NB = 4

/** `errno` values that the module itself names; they are the same on every Linux architecture that Troupe runs on. */
export const ErrnoNumber = {
  EPERM: 1,
  ENOENT: 2,
  EINTR: 4,
  EIO: 5,
  EBADF: 9,
  EAGAIN: 11,
  ENOMEM: 12,
  EACCES: 13,
  EBUSY: 16,
  EEXIST: 17,
  EINVAL: 22,
  ENOSPC: 28,
  ENOSYS: 38,
  ENOTSUP: 95
} as const

/** A path that a C function can take: no NUL byte in it, or the callee would see another path. */
export const isForeignString = (text: string): boolean => !text.includes("\0")

/** The numbers of system calls that older C libraries have no function for, by `process.arch`. */
export const syscallNumbers: { readonly [arch: string]: { readonly gettid: number; readonly tgkill: number } } = {
  x64: { gettid: 186, tgkill: 234 },
  arm64: { gettid: 178, tgkill: 131 }
}

/** Size in bytes of libc's `struct sigaction` on 64-bit Linux: handler, 128-byte mask, flags, restorer. */
export const SIGACTION_SIZE = 152
/** Offset of `sa_handler`. */
export const SIGACTION_HANDLER = 0
/** `SIG_DFL`: the default action. */
export const SIG_DFL = 0n
