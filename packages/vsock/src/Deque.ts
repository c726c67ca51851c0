const FIRST_PLACES = 4
const NONE: Array<never> = []

/** A queue of references that grows as it must and allocates nothing else: first in, first out. */
export class Deque<T> {
  /** A power of two of places, or none: most queues of idle connections never have an item. */
  #items: Array<T | undefined> = NONE
  #first = 0
  /** The number of items. */
  length = 0

  /** Adds an item at the end. */
  push(item: T): void {
    if (this.length === this.#items.length) this.#grow()
    this.#items[(this.#first + this.length) & (this.#items.length - 1)] = item
    this.length++
  }

  /** The first item. */
  peek(): T | undefined {
    return this.#items[this.#first]
  }

  /** Removes and returns the first item. */
  shift(): T | undefined {
    if (this.length === 0) return undefined
    const item = this.#items[this.#first]
    this.#items[this.#first] = undefined
    this.#first = (this.#first + 1) & (this.#items.length - 1)
    this.length--
    return item
  }

  /** Removes one item, wherever it is. Takes time in proportion to the length. */
  remove(item: T): boolean {
    let found = false
    this.keep((next) => {
      if (found || next !== item) return true
      found = true
      return false
    })
    return found
  }

  /** Keeps the items that `predicate` holds for, in their order. */
  keep(predicate: (item: T) => boolean): void {
    for (let left = this.length; left > 0; left--) {
      const item = this.shift()
      if (item !== undefined && predicate(item)) this.push(item)
    }
  }

  #grow(): void {
    const items: Array<T | undefined> = [...this.#items.slice(this.#first), ...this.#items.slice(0, this.#first)]
    for (let more = Math.max(items.length, FIRST_PLACES); more > 0; more--) items.push(undefined)
    this.#items = items
    this.#first = 0
  }
}
