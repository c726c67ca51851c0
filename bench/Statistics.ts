// Medians, quartiles and slopes of repeated measurements.

/** The value below which this part (0 to 1) of the values lies. */
export const quantile = (values: ReadonlyArray<number>, part: number): number => {
  const sorted = values.toSorted((a, b) => a - b)
  const at = (sorted.length - 1) * part
  const low = sorted[Math.floor(at)] ?? Number.NaN
  const high = sorted[Math.ceil(at)] ?? Number.NaN
  return low + (high - low) * (at - Math.floor(at))
}

/** The middle of the values. */
export const median = (values: ReadonlyArray<number>): number => quantile(values, 0.5)

/** The first and third quartile, for people. */
export const spread = (values: ReadonlyArray<number>, digits = 2): string =>
  `${quantile(values, 0.25).toFixed(digits)} to ${quantile(values, 0.75).toFixed(digits)}`

/** The slope of the straight line that fits the points best. */
export const slope = (points: ReadonlyArray<readonly [x: number, y: number]>): number => {
  const mean = (pick: (point: readonly [number, number]) => number) =>
    points.reduce((sum, point) => sum + pick(point), 0) / points.length
  const x = mean((point) => point[0])
  const y = mean((point) => point[1])
  let covariance = 0
  let variance = 0
  for (const point of points) {
    covariance += (point[0] - x) * (point[1] - y)
    variance += (point[0] - x) ** 2
  }
  return covariance / variance
}
