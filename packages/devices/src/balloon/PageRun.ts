/** A run of neighbouring pages that grows at either end: balloons fill upwards or downwards, mostly page by page. */
export class PageRun {
  /** Number of the first page. */
  first = 0
  /** How many pages; 0 is no run. */
  count = 0

  /** Adds a page, if it is the next one above or below, or the first of a run. Returns whether it was added. */
  add(page: number): boolean {
    if (this.count === 0) this.first = page
    else if (page === this.first - 1) this.first = page
    else if (page !== this.first + this.count) return false
    this.count++
    return true
  }

  /** No run. */
  clear(): void {
    this.count = 0
  }
}
