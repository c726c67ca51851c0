/**
 * How fast a guest may use a device: token buckets for bytes and for operations, as a host writes them in `GuestConfig`.
 *
 * ```ts
 * // 10 MB each second, the first 50 MB at once; 1000 operations each second
 * const limit = {
 *   bytes: { size: 1_000_000, refillTimeMillis: 100, oneTimeBurst: 50_000_000 },
 *   operations: { size: 100, refillTimeMillis: 100 }
 * }
 * ```
 */
import * as Effect from "effect/Effect"
import * as Schema from "effect/Schema"

/** The most tokens of a bucket, and of its burst: 2^40, which is 1 TiB. */
export const TOKENS_MAX = 2 ** 40
/** The longest refill time: one day, in milliseconds. */
export const REFILL_TIME_MILLIS_MAX = 86_400_000

/** A bucket that begins full and gets `size` tokens in each `refillTimeMillis`, evenly, up to `size`. */
export const TokenBucketConfig = Schema.Struct({
  /** How many tokens the bucket holds: what may be used at once, 1 to {@link TOKENS_MAX}. */
  size: Schema.Int.check(Schema.isBetween({ minimum: 1, maximum: TOKENS_MAX })),
  /** In which time an empty bucket fills, 1 to {@link REFILL_TIME_MILLIS_MAX} milliseconds. */
  refillTimeMillis: Schema.Int.check(Schema.isBetween({ minimum: 1, maximum: REFILL_TIME_MILLIS_MAX })),
  /** Tokens on top that are there once, used first and never again. Default: none. */
  oneTimeBurst: Schema.Int.check(Schema.isBetween({ minimum: 0, maximum: TOKENS_MAX }))
    .pipe(Schema.withDecodingDefaultKey(Effect.succeed(0)))
})
/** A bucket of tokens. */
export type TokenBucketConfig = typeof TokenBucketConfig.Type

/** A limit by bytes, by operations, or by both. What is absent is not limited. */
export const RateLimit = Schema.Struct({
  /** A token is a byte of data. */
  bytes: Schema.optionalKey(TokenBucketConfig),
  /** A token is a request or a packet. */
  operations: Schema.optionalKey(TokenBucketConfig)
})
/** A limit by bytes, by operations, or by both. */
export type RateLimit = typeof RateLimit.Type
