import { assert, describe, it } from "@effect/vitest"
import { REFILL_TIME_MILLIS_MAX, type TokenBucketConfig, TOKENS_MAX } from "@troupe/core/RateLimit"
import * as fc from "fast-check"
import { RateLimiter, TokenBucket } from "../src/TokenBucket.ts"

const configs: fc.Arbitrary<TokenBucketConfig> = fc.record({
  size: fc.oneof(fc.integer({ min: 1, max: 50 }), fc.integer({ min: 1, max: TOKENS_MAX })),
  refillTimeMillis: fc.oneof(fc.integer({ min: 1, max: 50 }), fc.integer({ min: 1, max: REFILL_TIME_MILLIS_MAX })),
  oneTimeBurst: fc.oneof(fc.constant(0), fc.integer({ min: 0, max: 100 }), fc.integer({ min: 0, max: TOKENS_MAX }))
})

/** Requests of parts of the size, up to thrice, after pauses of parts of the refill time. */
const steps = fc.array(
  fc.record({ pause: fc.double({ min: 0, max: 2, noNaN: true }), part: fc.double({ min: 0, max: 3, noNaN: true }) }),
  { size: "max", maxLength: 60 }
)

describe("TokenBucket", () => {
  it("never gives more than its size, its burst and the refill, in any window of time, and each time what it says", () => {
    fc.assert(fc.property(configs, steps, (config, steps) => {
      const bucket = new TokenBucket(config, 0)
      const { oneTimeBurst, refillTimeMillis, size } = config
      let now = 0
      const taken: Array<{ readonly time: number; readonly tokens: bigint }> = []
      for (const { part, pause } of steps) {
        now += Math.floor(pause * refillTimeMillis)
        const tokens = Math.floor(part * size)
        const available = bucket.available(now)
        const given = bucket.take(now, tokens)
        assert.strictEqual(given, tokens <= available)
        if (given) taken.push({ time: now, tokens: BigInt(tokens) })
        const left = bucket.available(now)
        assert.isTrue(
          given && available - tokens > size ? left <= available - tokens : left === available - (given ? tokens : 0)
        )
      }
      for (let first = 0; first < taken.length; first++) {
        let sum = 0n
        let largest = 0n
        for (const { time, tokens } of taken.slice(first)) {
          sum += tokens
          if (tokens > largest) largest = tokens
          const elapsed = BigInt(time - (taken[first]?.time ?? 0))
          const refill = elapsed * BigInt(size) / BigInt(refillTimeMillis) + 1n
          // Whole tokens: a part of one may have been there. What waited may have saved up for itself beyond the size.
          const most = BigInt(size) > largest ? BigInt(size) : largest
          assert.isTrue(sum <= most + BigInt(oneTimeBurst) + refill, `${sum} in ${elapsed} ms`)
        }
      }
    }))
  })

  it("has the same at a time however often it is looked at, to the last part of a token", () => {
    const looks = fc.array(fc.double({ min: 0, max: 1, noNaN: true }), { size: "max", maxLength: 100 })
    fc.assert(fc.property(configs, looks, fc.double({ min: 0, max: 1, noNaN: true }), (config, looks, part) => {
      const end = Math.floor(part * config.refillTimeMillis)
      const seldom = new TokenBucket(config, 0)
      const often = new TokenBucket(config, 0)
      seldom.take(0, config.size + config.oneTimeBurst)
      often.take(0, config.size + config.oneTimeBurst)
      for (const look of looks.map((look) => Math.floor(look * end)).toSorted((a, b) => a - b)) often.available(look)
      const exact = Number(BigInt(end) * BigInt(config.size) / BigInt(config.refillTimeMillis))
      assert.deepStrictEqual([seldom.available(end), often.available(end)], [exact, exact])
    }))
  })

  it("does not drift in a year of steady use", () => {
    const bucket = new TokenBucket({ size: 7, refillTimeMillis: 13, oneTimeBurst: 0 }, 0)
    bucket.take(0, 7)
    let taken = 0
    const millis = 1_000_000
    for (let now = 1; now <= millis; now++) if (bucket.take(now, 1)) taken++
    assert.strictEqual(taken, Math.floor(millis * 7 / 13))
  })

  it("says exactly when there is enough, whatever is asked: nobody starves", () => {
    fc.assert(fc.property(configs, steps, (config, steps) => {
      const bucket = new TokenBucket(config, 0)
      let now = 0
      for (const { part, pause } of steps) {
        const tokens = Math.floor(part * config.size)
        if (!bucket.take(now, tokens)) {
          const wait = bucket.readyIn(now, tokens)
          const needed = Math.ceil(tokens / config.size * config.refillTimeMillis)
          assert.isTrue(wait > 0 && wait <= needed + 1)
          if (pause > 1) assert.isFalse(bucket.has(now + wait - 1, tokens))
          now += wait
          assert.isTrue(bucket.take(now, tokens))
        }
        assert.strictEqual(bucket.readyIn(now, bucket.available(now)), 0)
      }
    }))
  })

  it("uses its burst first, and once", () => {
    const bucket = new TokenBucket({ size: 10, refillTimeMillis: 10, oneTimeBurst: 5 }, 0)
    assert.isTrue(bucket.take(0, 5))
    assert.strictEqual(bucket.available(100), 10)
    assert.isTrue(bucket.take(100, 10))
    assert.strictEqual(bucket.available(1_000_000), 10)
  })

  it("takes no notice of a clock that goes back", () => {
    const bucket = new TokenBucket({ size: 10, refillTimeMillis: 10, oneTimeBurst: 0 }, 50)
    bucket.take(50, 10)
    assert.deepStrictEqual([bucket.available(40), bucket.available(50), bucket.available(51)], [0, 0, 1])
  })

  it("keeps nothing beyond its size for a request that is given up", () => {
    const bucket = new TokenBucket({ size: 10, refillTimeMillis: 10, oneTimeBurst: 0 }, 0)
    assert.isFalse(bucket.take(0, 100))
    assert.strictEqual(bucket.available(50), 60)
    bucket.forget()
    assert.strictEqual(bucket.available(60), 10)
  })
})

describe("RateLimiter", () => {
  const bytes = { size: 100, refillTimeMillis: 100, oneTimeBurst: 0 }
  const operations = { size: 2, refillTimeMillis: 100, oneTimeBurst: 0 }

  it("takes from both buckets or from none", () => {
    const limiter = new RateLimiter({ bytes, operations }, 0)
    assert.deepStrictEqual([limiter.take(0, 10), limiter.take(0, 10), limiter.take(0, 10)], [true, true, false])
    assert.deepStrictEqual([limiter.readyIn(0, 80, 0), limiter.readyIn(0, 81, 0)], [0, 1])
    assert.strictEqual(limiter.readyIn(0, 10), 50)
    assert.isTrue(limiter.take(50, 10))
    assert.isFalse(limiter.take(100, 1000))
    assert.strictEqual(limiter.readyIn(100, 1000), 900)
  })

  it("does not limit what is not named", () => {
    const limiter = new RateLimiter({ operations }, 0)
    assert.isTrue(limiter.take(0, 1e12))
  })
})
