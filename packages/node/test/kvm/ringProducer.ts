/** A producer of `PostedRing.test.ts`: posts alone as fast as it can, then in turn with the others. */
import { parentPort, workerData } from "node:worker_threads"
import { PostedRing } from "../../src/kvm/thread/PostedRing.ts"

const data: unknown = workerData
const isJob = (
  value: unknown
): value is { ring: SharedArrayBuffer; baton: SharedArrayBuffer; id: number; producers: number; count: number } =>
  typeof value === "object" && value !== null && "ring" in value
if (!isJob(data)) throw new Error("not a job")
const ring = new PostedRing(data.ring)
const baton = new Int32Array(data.baton)

const post = (value: number): void => {
  while (!ring.post(data.id, 4, value, value)) Atomics.wait(baton, 1, 0, 1)
}
for (let i = 0; i < data.count; i++) post(i)
for (let i = 0; i < data.count; i++) {
  const turn = i * data.producers + data.id
  for (let now = Atomics.load(baton, 0); now !== turn; now = Atomics.load(baton, 0)) Atomics.wait(baton, 0, now, 10)
  post(data.count + turn)
  Atomics.store(baton, 0, turn + 1)
  Atomics.notify(baton, 0)
}
parentPort?.postMessage("done")
