/**
 * The contract that every FFI back end keeps, as plain checks: they run in Vitest and as a script under any Node.
 * Imports nothing but Node and the back ends, as a vCPU thread does.
 */
import type * as Koffi from "koffi"
import assert from "node:assert/strict"
import { readFileSync, readSync, writeSync } from "node:fs"
import { createRequire } from "node:module"
import { Worker } from "node:worker_threads"
import {
  EFD_NONBLOCK,
  ErrnoNumber,
  FALLOC_FL_KEEP_SIZE,
  FALLOC_FL_PUNCH_HOLE,
  type ForeignFunctions,
  type ForeignFunctionsName,
  LOCK_EX,
  LOCK_NB,
  LOCK_SH,
  MADV_DONTNEED,
  MAP_ANONYMOUS,
  MAP_PRIVATE,
  MAP_SHARED,
  O_NONBLOCK,
  O_RDONLY,
  O_RDWR,
  POLL_DISCONNECT,
  POLL_READABLE,
  POLL_WRITABLE,
  type PollHandle,
  PROT_READ,
  PROT_WRITE,
  RWF_NOWAIT
} from "../../src/internal/ForeignFunctions.ts"
import { loadForeignFunctions } from "../../src/internal/loadForeignFunctions.ts"
import { ForeignView, map, Mapping, UseAfterUnmap } from "../../src/internal/Mapping.ts"
import type { WorkerRequest } from "./contract-worker.ts"

/** One check of the contract. */
export interface Check {
  readonly name: string
  readonly run: (c: ForeignFunctions) => void | Promise<void>
}

/** `FIONBIO`: sets or clears `O_NONBLOCK`, from an `int` that the kernel reads. */
const FIONBIO = 0x5421
/** `FIOCLEX`, `FIONCLEX`: set and clear close-on-exec; no argument. */
const FIOCLEX = 0x5451
const FIONCLEX = 0x5450
/** `FIONREAD`: how much of a file there is to read, into an `int` that the kernel writes. */
const FIONREAD = 0x541b
const PAGE = 4096
/** No process has so many. */
const NO_DESCRIPTOR = 5_000_000
const ESRCH = 3
const EPERM = 1
const EFAULT = 14
const ENOTTY = 25

/** A result that is not `-errno`. */
const ok = (result: number): number => {
  assert.ok(result >= 0, `failed with errno ${-result}`)
  return result
}

const fileFlags = (fd: number): number =>
  Number.parseInt(/^flags:\s*(\d+)/m.exec(readFileSync(`/proc/self/fdinfo/${fd}`, "utf8"))?.[1] ?? "", 8)
const CLOEXEC_FLAG = 0o2000000

const withEventfd = (c: ForeignFunctions, use: (fd: number) => void): void => {
  const fd = ok(c.eventfd(0, EFD_NONBLOCK))
  try {
    use(fd)
  } finally {
    ok(c.close(fd))
  }
}

const withEventfdAsync = async (c: ForeignFunctions, use: (fd: number) => Promise<void>): Promise<void> => {
  const fd = ok(c.eventfd(0, EFD_NONBLOCK))
  try {
    await use(fd)
  } finally {
    ok(c.close(fd))
  }
}

const anonymous = (c: ForeignFunctions, length: number): Mapping => {
  const mapping = map(c, {
    length,
    protection: PROT_READ | PROT_WRITE,
    flags: MAP_PRIVATE | MAP_ANONYMOUS,
    fd: -1,
    offset: 0
  })
  assert.ok(mapping instanceof Mapping)
  return mapping
}

const isMapped = (address: bigint): boolean =>
  readFileSync("/proc/self/maps", "utf8").split("\n").some((line) => {
    const [from, to] = line.slice(0, line.indexOf(" ")).split("-")
    return from !== undefined && to !== undefined && BigInt(`0x${from}`) <= address && address < BigInt(`0x${to}`)
  })

const watch = (c: ForeignFunctions, fd: number, events: number, callback: (events: number) => void): PollHandle => {
  const handle = c.poll(fd, events, (_status, ready) => callback(ready))
  assert.ok(typeof handle !== "number", `poll failed: ${typeof handle === "number" ? handle : ""}`)
  return handle
}

/** Runs `request` on a worker thread; `during` is given the thread's number when the thread is ready. */
const onWorker = (c: ForeignFunctions, request: WorkerRequest["task"], during?: (threadId: number) => void) =>
  new Promise<number>((resolve, reject) => {
    const worker = new Worker(new URL("contract-worker.ts", import.meta.url), {
      workerData: { backEnd: c.name, task: request } satisfies WorkerRequest
    })
    let result: number | undefined
    worker.on("message", (message: { readonly ready: number } | { readonly result: number }) => {
      if ("ready" in message) during?.(message.ready)
      else result = message.result
    })
    worker.on("error", reject)
    // It ends by itself: one that is stopped while a native module of its is at work may take the process with it.
    worker.on("exit", (code) => {
      if (result === undefined) reject(new Error(`the worker ended with code ${code} and without a result`))
      else resolve(result)
    })
  })

/** Every check. */
export const contract: ReadonlyArray<Check> = [
  {
    name: "open and close give descriptors that programs started later do not inherit",
    run: (c) => {
      const fd = ok(c.open("/dev/null", O_RDWR))
      assert.ok((fileFlags(fd) & CLOEXEC_FLAG) !== 0)
      assert.equal(c.close(fd), 0)
      // Not the same number again: another thread of this process may have been given it.
      assert.equal(c.close(NO_DESCRIPTOR), -ErrnoNumber.EBADF)
      assert.equal(c.open("/nowhere/at/all", O_RDONLY), -ErrnoNumber.ENOENT)
    }
  },
  {
    name: "a name with a NUL byte is refused, not cut short",
    run: (c) => {
      assert.equal(c.open("/dev/null\0/etc", O_RDONLY), -ErrnoNumber.EINVAL)
      assert.equal(c.memfdCreate("a\0b", 0), -ErrnoNumber.EINVAL)
    }
  },
  {
    name: "ioctl without an argument",
    run: (c) =>
      withEventfd(c, (fd) => {
        assert.equal(c.ioctlNumber(fd, FIONCLEX, 0n), 0)
        assert.equal(fileFlags(fd) & CLOEXEC_FLAG, 0)
        assert.equal(c.ioctlNumber(fd, FIOCLEX, 0n), 0)
        assert.notEqual(fileFlags(fd) & CLOEXEC_FLAG, 0)
      })
  },
  {
    name: "ioctl with a structure that the kernel reads, and one that it writes",
    run: (c) => {
      withEventfd(c, (fd) => {
        const off = new DataView(new ArrayBuffer(4))
        assert.notEqual(fileFlags(fd) & O_NONBLOCK, 0)
        assert.equal(c.ioctlBuffer(fd, FIONBIO, off), 0)
        assert.equal(fileFlags(fd) & O_NONBLOCK, 0)
      })
      const fd = ok(c.memfdCreate("contract", 0))
      assert.equal(c.ftruncate(fd, 3 * PAGE), 0)
      // A view in the middle of a buffer, and one on the JavaScript heap: the kernel gets their own addresses.
      const inside = new DataView(new ArrayBuffer(24), 8, 8)
      assert.equal(c.ioctlBuffer(fd, FIONREAD, inside), 0)
      assert.equal(inside.getUint32(0, true), 3 * PAGE)
      assert.equal(new DataView(inside.buffer).getBigUint64(0, true), 0n)
      const small = new BigUint64Array(1)
      assert.equal(c.ioctlBuffer(fd, FIONREAD, small), 0)
      assert.equal(small[0], BigInt(3 * PAGE))
      // The same by address.
      small[0] = 0n
      assert.equal(c.ioctlNumber(fd, FIONREAD, c.addressOf(small)), 0)
      assert.equal(small[0], BigInt(3 * PAGE))
      ok(c.close(fd))
    }
  },
  {
    name: "ioctl reports errno",
    run: (c) => {
      withEventfd(c, (fd) => {
        assert.equal(c.ioctlNumber(fd, 0xae00, 0n), -ENOTTY)
        assert.equal(c.ioctlNumber(fd, FIONBIO, 1n), -EFAULT)
      })
      assert.equal(c.ioctlNumber(-1, 0xae00, 0n), -ErrnoNumber.EBADF)
    }
  },
  {
    name: "a request with its highest bit set reaches the kernel",
    run: (c) => {
      // TUNGETIFF is _IOR('T', 210, unsigned int): an eventfd does not know it.
      withEventfd(c, (fd) => assert.equal(c.ioctlNumber(fd, 0x8004_54d2, 0n), -ENOTTY))
    }
  },
  {
    name: "two mappings of one file see each other's writes; offset and length are those asked for",
    run: (c) => {
      const fd = ok(c.memfdCreate("contract", 0))
      assert.equal(c.ftruncate(fd, 4 * PAGE), 0)
      const options = { protection: PROT_READ | PROT_WRITE, flags: MAP_SHARED, fd }
      const whole = map(c, { ...options, length: 4 * PAGE, offset: 0 })
      const third = map(c, { ...options, length: PAGE, offset: 2 * PAGE })
      assert.ok(whole instanceof Mapping && third instanceof Mapping)
      new Uint8Array(whole.buffer)[2 * PAGE + 7] = 42
      assert.equal(new Uint8Array(third.buffer)[7], 42)
      assert.equal(third.buffer.byteLength, PAGE)
      assert.equal(whole.unmap(), 0)
      assert.equal(new Uint8Array(third.buffer)[7], 42)
      assert.equal(third.unmap(), 0)
      ok(c.close(fd))
    }
  },
  {
    name: "mmap reports errno",
    run: (c) => {
      const flags = MAP_PRIVATE | MAP_ANONYMOUS
      assert.equal(c.mmap(0, PROT_READ, flags, -1, 0), BigInt(-ErrnoNumber.EINVAL))
      assert.equal(c.mmap(PAGE, PROT_READ, MAP_SHARED, -1, 0), BigInt(-ErrnoNumber.EBADF))
      assert.equal(map(c, { length: 2 ** 52, protection: PROT_READ, flags, fd: -1, offset: 0 }), -ErrnoNumber.ENOMEM)
    }
  },
  {
    name: "anonymous memory is zero, keeps what is written, and is given back by madvise",
    run: (c) => {
      const mapping = anonymous(c, 2 * PAGE)
      const bytes = new Uint8Array(mapping.buffer)
      assert.ok(bytes.every((byte) => byte === 0))
      bytes.fill(0xa5)
      assert.equal(c.madvise(mapping.address + BigInt(PAGE), PAGE, MADV_DONTNEED), 0)
      assert.ok(bytes.subarray(0, PAGE).every((byte) => byte === 0xa5))
      assert.ok(bytes.subarray(PAGE).every((byte) => byte === 0))
      assert.equal(c.madvise(mapping.address + 1n, PAGE, MADV_DONTNEED), -ErrnoNumber.EINVAL)
      assert.equal(mapping.unmap(), 0)
    }
  },
  {
    name: "nothing made from a mapping reaches memory after unmap",
    run: (c) => {
      const mapping = anonymous(c, PAGE)
      const buffer = mapping.buffer
      const bytes = new Uint8Array(buffer)
      const part = bytes.subarray(16, 32)
      const view = new DataView(buffer, 8)
      bytes[16] = 1
      assert.ok(isMapped(mapping.address))
      assert.equal(mapping.unmap(), 0)
      assert.ok(!isMapped(mapping.address))
      assert.equal(mapping.released, true)
      assert.throws(() => mapping.buffer, UseAfterUnmap)
      assert.equal(bytes.length, 0)
      assert.equal(part[0], undefined)
      assert.throws(() => view.getUint8(0), TypeError)
      assert.throws(() => Atomics.load(bytes, 0), TypeError)
      assert.equal(buffer.byteLength, 0)
      // Writing to it does nothing either.
      bytes[0] = 1
      assert.equal(mapping.unmap(), 0)
    }
  },
  {
    name: "a mapping that was never looked at is unmapped too",
    run: (c) => {
      const mapping = anonymous(c, PAGE)
      assert.equal(mapping.unmap(), 0)
      assert.ok(!isMapped(mapping.address))
    }
  },
  {
    name: "memory whose buffer was transferred away stays mapped",
    run: (c) => {
      const mapping = anonymous(c, PAGE)
      const stolen = mapping.buffer.transfer()
      assert.equal(mapping.unmap(), -ErrnoNumber.EBUSY)
      new Uint8Array(stolen)[0] = 1
      stolen.transfer(0)
      assert.equal(c.munmap(mapping.address, PAGE), 0)
    }
  },
  {
    name: "a view of somebody else's memory can be released on its own",
    run: (c) => {
      const mapping = anonymous(c, PAGE)
      const view = new ForeignView(c, mapping.address, PAGE)
      new Uint8Array(view.buffer)[3] = 9
      assert.equal(view.release(), true)
      assert.throws(() => view.buffer, UseAfterUnmap)
      assert.equal(new Uint8Array(mapping.buffer)[3], 9)
      assert.equal(mapping.unmap(), 0)
    }
  },
  {
    name: "a worker's own view of the same address is the same memory, for Atomics too",
    run: async (c) => {
      const mapping = anonymous(c, PAGE)
      const words = new Int32Array(mapping.buffer)
      const rounds = 20_000
      const worker = onWorker(c, { kind: "add", address: mapping.address, length: PAGE, rounds })
      for (let i = 0; i < rounds; i++) Atomics.add(words, 0, 1)
      assert.equal(await worker, 0)
      assert.equal(words[0], 2 * rounds)
      assert.equal(mapping.unmap(), 0)
    }
  },
  {
    name: "a vectored read gets what there is, at its offset, or says that it would have to wait",
    run: (c) => {
      const fd = ok(c.memfdCreate("contract", 0))
      assert.equal(c.ftruncate(fd, PAGE), 0)
      writeSync(fd, Uint8Array.of(1, 2, 3, 4, 5, 6, 7, 8), 0, 8, 0)
      const target = new Uint8Array(new ArrayBuffer(16)).fill(9)
      const vectors = new BigUint64Array(new ArrayBuffer(32))
      const address = c.addressOf(target)
      vectors.set([address, 2n, address + 8n, 3n])
      assert.equal(c.preadv2(fd, c.addressOf(vectors), 2, 1, 0), 5)
      assert.deepEqual([...target], [2, 3, 9, 9, 9, 9, 9, 9, 4, 5, 6, 9, 9, 9, 9, 9])
      // A file in memory may not know the wish not to wait.
      const now = c.preadv2(fd, c.addressOf(vectors), 2, 0, RWF_NOWAIT)
      assert.ok(now === 5 || now === -ErrnoNumber.ENOTSUP || now === -ErrnoNumber.EAGAIN, String(now))
      assert.equal(c.preadv2(fd, c.addressOf(vectors), 2, PAGE, 0), 0)
      assert.equal(c.close(fd), 0)
      assert.equal(c.preadv2(NO_DESCRIPTOR, c.addressOf(vectors), 2, 0, 0), -ErrnoNumber.EBADF)
    }
  },
  {
    name: "a vectored write puts all pieces at its offset, or says that it would have to wait",
    run: (c) => {
      const fd = ok(c.memfdCreate("contract", 0))
      const source = Uint8Array.of(1, 2, 9, 9, 9, 9, 9, 9, 3, 4, 5)
      const vectors = new BigUint64Array(new ArrayBuffer(32))
      const address = c.addressOf(source)
      vectors.set([address, 2n, address + 8n, 3n])
      assert.equal(c.pwritev2(fd, c.addressOf(vectors), 2, PAGE + 1, 0), 5)
      const written = new Uint8Array(7)
      assert.equal(readSync(fd, written, 0, 7, PAGE), 6)
      assert.deepEqual([...written], [0, 1, 2, 3, 4, 5, 0])
      // Whether it may be done without waiting is the file system's choice.
      const now = c.pwritev2(fd, c.addressOf(vectors), 2, 0, RWF_NOWAIT)
      assert.ok(now === 5 || now === -ErrnoNumber.ENOTSUP || now === -ErrnoNumber.EAGAIN, String(now))
      assert.equal(c.close(fd), 0)
      assert.equal(c.pwritev2(NO_DESCRIPTOR, c.addressOf(vectors), 2, 0, 0), -ErrnoNumber.EBADF)
    }
  },
  {
    name: "room of a file is given up, and a file is locked for one descriptor",
    run: (c) => {
      const fd = ok(c.memfdCreate("contract", 0))
      assert.equal(c.ftruncate(fd, 2 * PAGE), 0)
      writeSync(fd, new Uint8Array(2 * PAGE).fill(1), 0, 2 * PAGE, 0)
      assert.equal(c.fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, PAGE, PAGE), 0)
      const bytes = new Uint8Array(2 * PAGE)
      assert.equal(readSync(fd, bytes, 0, 2 * PAGE, 0), 2 * PAGE)
      assert.deepEqual([bytes[PAGE - 1], bytes[PAGE]], [1, 0])
      assert.equal(c.fallocate(fd, FALLOC_FL_PUNCH_HOLE, 0, PAGE), -ErrnoNumber.ENOTSUP)
      assert.equal(c.flock(fd, LOCK_EX | LOCK_NB), 0)
      const other = ok(c.open(`/proc/self/fd/${fd}`, O_RDWR))
      assert.equal(c.flock(other, LOCK_SH | LOCK_NB), -ErrnoNumber.EAGAIN)
      assert.equal(c.close(fd), 0)
      assert.equal(c.flock(other, LOCK_SH | LOCK_NB), 0)
      assert.equal(c.close(other), 0)
    }
  },
  {
    name: "an eventfd counts, is taken as a whole, and is empty afterwards",
    run: (c) =>
      withEventfd(c, (fd) => {
        assert.equal(c.eventfdRead(fd), -ErrnoNumber.EAGAIN)
        for (let i = 0; i < 5; i++) assert.equal(c.eventfdWrite(fd), 0)
        assert.equal(c.eventfdRead(fd), 5)
        assert.equal(c.eventfdRead(fd), -ErrnoNumber.EAGAIN)
        assert.notEqual(fileFlags(fd) & CLOEXEC_FLAG, 0)
      })
  },
  {
    name: "an eventfd's counter is more than 32 bits wide",
    run: (c) => {
      const fd = ok(c.eventfd(0xffff_ffff, EFD_NONBLOCK))
      assert.equal(c.eventfdWrite(fd), 0)
      assert.equal(c.eventfdRead(fd), 0x1_0000_0000)
      ok(c.close(fd))
      assert.equal(c.eventfdWrite(NO_DESCRIPTOR), -ErrnoNumber.EBADF)
    }
  },
  {
    // A function that is called often is compiled, and may then reach C by another way, with other checks of its arguments.
    name: "what is called thousands of times gives the same results as at first",
    run: (c) => {
      const fd = ok(c.eventfd(0, EFD_NONBLOCK))
      const value = new BigUint64Array(new ArrayBuffer(8))
      const vectors = new BigUint64Array(new ArrayBuffer(16))
      vectors.set([c.addressOf(value), 8n])
      const address = c.addressOf(vectors)
      const fine = [0, -ErrnoNumber.EBADF, -ErrnoNumber.EBADF, -ErrnoNumber.EBADF, -ErrnoNumber.EBADF, 8, 8, 1]
      const call = (): ReadonlyArray<number> => {
        const results = [
          c.eventfdWrite(fd),
          c.eventfdWrite(-1),
          c.ioctlNumber(-1, 0xffff_ffff, 0n),
          c.readv(0x7fff_ffff, address, 1),
          c.writev(NO_DESCRIPTOR, address, 1),
          c.readv(fd, address, 1)
        ]
        assert.equal(value[0], 1n)
        results.push(c.writev(fd, address, 1), c.eventfdRead(fd))
        return results
      }
      for (let i = 0; i < 20_000; i++) {
        const results = call()
        if (results.some((result, index) => result !== fine[index])) assert.deepEqual(results, fine, `call ${i}`)
      }
      assert.equal(c.readv(fd, address, 1), -ErrnoNumber.EAGAIN)
      assert.equal(c.readv(fd, address, 5000), -ErrnoNumber.EINVAL)
      // Until here it must not be collected.
      assert.equal(vectors[1], 8n)
      assert.equal(c.close(fd), 0)
    }
  },
  {
    name: "poll calls back while a descriptor is ready, and never after close",
    run: (c) =>
      withEventfdAsync(c, async (fd) => {
        const counts: Array<number> = []
        let next: (() => void) | undefined
        const handle = watch(c, fd, POLL_READABLE, () => {
          counts.push(c.eventfdRead(fd))
          next?.()
        })
        const signalled = () =>
          new Promise<void>((resolve) => {
            next = resolve
          })
        c.eventfdWrite(fd)
        c.eventfdWrite(fd)
        // Also shows that promises which the callback resolves are carried on with: nothing else happens on the loop.
        await signalled()
        assert.deepEqual(counts, [2])
        const again = signalled()
        c.eventfdWrite(fd)
        await again
        assert.deepEqual(counts, [2, 1])
        handle.close()
        handle.close()
        c.eventfdWrite(fd)
        await turnOfTheLoop()
        await turnOfTheLoop()
        assert.deepEqual(counts, [2, 1])
        assert.equal(c.eventfdRead(fd), 1)
      })
  },
  {
    name: "a watcher may close itself in its callback, and the descriptor can be watched anew",
    run: (c) =>
      withEventfdAsync(c, async (fd) => {
        for (let round = 0; round < 3; round++) {
          c.eventfdWrite(fd)
          await new Promise<void>((resolve) => {
            const handle = watch(c, fd, POLL_READABLE, () => {
              handle.close()
              resolve()
            })
          })
        }
        assert.equal(c.eventfdRead(fd), 3)
      })
  },
  {
    name: "poll tells readiness to write, and that the other side hung up",
    run: (c) =>
      withEventfdAsync(c, async (fd) => {
        const events = await new Promise<number>((resolve) => {
          const handle = watch(c, fd, POLL_READABLE | POLL_WRITABLE | POLL_DISCONNECT, (ready) => {
            handle.close()
            resolve(ready)
          })
        })
        assert.equal(events, POLL_WRITABLE)
      })
  },
  {
    name: "many watchers at once do not mix up",
    run: async (c) => {
      const seen = new Set<number>()
      const fds = Array.from({ length: 64 }, () => ok(c.eventfd(0, EFD_NONBLOCK)))
      await new Promise<void>((resolve) => {
        const handles = fds.map((fd, index) =>
          watch(c, fd, POLL_READABLE, () => {
            assert.equal(c.eventfdRead(fd), 1)
            seen.add(index)
            if (seen.size === fds.length) {
              for (const handle of handles) handle.close()
              resolve()
            }
          })
        )
        for (const fd of fds) c.eventfdWrite(fd)
      })
      for (const fd of fds) ok(c.close(fd))
      assert.equal(seen.size, fds.length)
    }
  },
  {
    name: "poll refuses what it cannot watch, and a second watcher, with errno",
    run: (c) => {
      const fd = ok(c.memfdCreate("contract", 0))
      assert.equal(c.poll(fd, POLL_READABLE, () => {}), -EPERM)
      ok(c.close(fd))
      assert.equal(c.poll(NO_DESCRIPTOR, POLL_READABLE, () => {}), -ErrnoNumber.EBADF)
      withEventfd(c, (fd) => {
        const handle = watch(c, fd, POLL_READABLE, () => {})
        assert.equal(c.poll(fd, POLL_READABLE, () => {}), -ErrnoNumber.EEXIST)
        handle.close()
      })
    }
  },
  {
    name: "poll refuses on a worker thread",
    run: async (c) => {
      assert.equal(await onWorker(c, { kind: "poll" }), -ErrnoNumber.ENOTSUP)
    }
  },
  {
    name: "the main thread's number is the process's; signals reach one thread or report errno",
    run: (c) => {
      assert.equal(c.gettid(), process.pid)
      assert.equal(c.tgkill(c.gettid(), 0), 0)
      assert.equal(c.tgkill(0x3fff_ffff, 0), -ESRCH)
    }
  },
  {
    name: "the kick signal takes a worker out of a blocking call",
    run: async (c) => {
      const signal = ok(c.installKickSignal())
      assert.equal(c.installKickSignal(), signal)
      let kicks: NodeJS.Timeout | undefined
      try {
        // A kick that comes before the thread blocks is lost (KVM has `immediate_exit` for that), so it is repeated.
        const result = await onWorker(c, { kind: "block" }, (threadId) => {
          kicks = setInterval(() => c.tgkill(threadId, signal), 1)
        })
        assert.equal(result, -ErrnoNumber.EINTR)
      } finally {
        // Also when it has failed: the next check takes the signal's handler away for a moment, and a kick would be the end.
        clearInterval(kicks)
      }
    }
  },
  {
    name: "the kick signal is not taken from somebody else",
    run: (c) => {
      const signal = ok(c.installKickSignal())
      const koffi: typeof Koffi = createRequire(import.meta.url)("koffi")
      const libc = koffi.load(null)
      const setHandler: (signal: number, handler: bigint) => number | bigint = libc.func(
        "uint64_t signal(int signal, uint64_t handler)"
      )
      setHandler(signal, BigInt(libc.symbol("getppid")))
      try {
        assert.equal(c.installKickSignal(), -ErrnoNumber.EBUSY)
      } finally {
        setHandler(signal, 0n)
      }
      assert.equal(c.installKickSignal(), signal)
    }
  }
]

const turnOfTheLoop = () => new Promise<void>((resolve) => void setImmediate(resolve))

/** The back end for these checks. */
export const load = (name: ForeignFunctionsName): ForeignFunctions => {
  const functions = loadForeignFunctions(name, { quiet: true })
  if (typeof functions === "string") throw new Error(functions)
  return functions
}
