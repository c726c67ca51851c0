/**
 * Token buckets: plain data with the time passed in, in whole milliseconds of any clock that does not go back.
 *
 * The arithmetic is exact: what a bucket has at a time does not depend on how often it was looked at, so that nothing is gained
 * or lost by rounding, and a limit holds over a year as it does over a second.
 */
import type { RateLimit, TokenBucketConfig } from "@troupe/core/RateLimit"

/**
 * A bucket that begins full, with its one-time burst on top.
 *
 * All that it ever gives is at most `size + oneTimeBurst + elapsed * size / refillTimeMillis`. A request for more than it holds
 * is not refused for ever: while one waits, the bucket fills beyond its size up to what is wanted.
 */
export class TokenBucket {
  readonly #size: number
  readonly #refillTime: number
  /** Tokens of each millisecond, as a whole number and a rest of {@link #refillTime}: the products below stay exact. */
  readonly #perMilli: number
  readonly #restPerMilli: number
  #burst: number
  /** What it holds: whole tokens, and a part of one in units of `1 / refillTime`. */
  #tokens: number
  #part = 0
  /** Up to where it fills. */
  #limit: number
  #time: number

  constructor(config: TokenBucketConfig, now: number) {
    this.#size = config.size
    this.#refillTime = config.refillTimeMillis
    this.#perMilli = Math.floor(config.size / config.refillTimeMillis)
    this.#restPerMilli = config.size % config.refillTimeMillis
    this.#burst = config.oneTimeBurst
    this.#tokens = config.size
    this.#limit = config.size
    this.#time = now
  }

  /** Whole tokens that there are. */
  available(now: number): number {
    this.#refill(now)
    return this.#burst + this.#tokens
  }

  /** Whether `tokens` can be taken at once. When not, somebody waits for them: the bucket fills as far as they need. */
  has(now: number, tokens: number): boolean {
    if (this.available(now) >= tokens) return true
    this.#limit = Math.max(this.#size, tokens - this.#burst)
    return false
  }

  /** Takes `tokens` if they are there. */
  take(now: number, tokens: number): boolean {
    if (!this.has(now, tokens)) return false
    const fromBurst = Math.min(this.#burst, tokens)
    this.#burst -= fromBurst
    this.#tokens -= tokens - fromBurst
    this.forget()
    return true
  }

  /** Nobody waits any more: what was saved up beyond the size is gone. */
  forget(): void {
    this.#limit = this.#size
    if (this.#tokens >= this.#size) this.#full()
  }

  /** In how many milliseconds there will be `tokens` for one who waits: exactly, neither too early nor too late. */
  readyIn(now: number, tokens: number): number {
    const missing = tokens - this.available(now)
    if (missing <= 0) return 0
    // The quotient is right but for its last bits, and the exact sum says which way it is wrong.
    let time = Math.ceil(missing / this.#size * this.#refillTime)
    while (time > 0 && this.#gained(time - 1) >= missing) time--
    while (this.#gained(time) < missing) time++
    return time
  }

  /** Lets the time pass. A time before the last one changes nothing. */
  #refill(now: number): void {
    const elapsed = now - this.#time
    if (elapsed <= 0) return
    this.#time = now
    const tokens = this.#tokens + this.#gained(elapsed)
    if (tokens < this.#limit) {
      this.#part = (this.#part + (elapsed % this.#refillTime) * this.#restPerMilli) % this.#refillTime
      this.#tokens = tokens
    } else {
      this.#tokens = this.#limit
      this.#part = 0
    }
  }

  #full(): void {
    this.#tokens = this.#size
    this.#part = 0
  }

  /** Whole tokens that a time brings, with the part of one that is there. */
  #gained(elapsed: number): number {
    const rest = elapsed % this.#refillTime
    return (elapsed - rest) / this.#refillTime * this.#size + rest * this.#perMilli +
      Math.floor((this.#part + rest * this.#restPerMilli) / this.#refillTime)
  }
}

/** The buckets of one limit. A request takes from both or from none. */
export class RateLimiter {
  readonly #bytes: TokenBucket | undefined
  readonly #operations: TokenBucket | undefined

  constructor(limit: RateLimit, now: number) {
    this.#bytes = limit.bytes === undefined ? undefined : new TokenBucket(limit.bytes, now)
    this.#operations = limit.operations === undefined ? undefined : new TokenBucket(limit.operations, now)
  }

  /** Takes the tokens of a request if there are enough. */
  take(now: number, bytes: number, operations = 1): boolean {
    const enough = this.#bytes?.has(now, bytes) ?? true
    if (!(this.#operations?.has(now, operations) ?? true) || !enough) return false
    this.#bytes?.take(now, bytes)
    this.#operations?.take(now, operations)
    return true
  }

  /** In how many milliseconds there will be enough for a request that waits. */
  readyIn(now: number, bytes: number, operations = 1): number {
    return Math.max(this.#bytes?.readyIn(now, bytes) ?? 0, this.#operations?.readyIn(now, operations) ?? 0)
  }

  /** Nobody waits any more. */
  forget(): void {
    this.#bytes?.forget()
    this.#operations?.forget()
  }
}
