/**
 * The one operation that a vCPU does at a time: what its program asks for, and how the answer gets back into the generator.
 *
 * Nothing is allocated for an operation: the slot, its operation and its iterators live as long as their vCPU.
 */
import type { GuestOperation, GuestProgram, GuestReply, GuestRequest } from "./GuestCpu.ts"

/** What a program can ask of its vCPU. */
export type OperationKind =
  | "none"
  | "pio-read"
  | "pio-write"
  | "mmio-read"
  | "mmio-write"
  | "wait"
  | "halt"
  | "triple-fault"
  | "internal-error"
  | "sleep"
  | "yield"
  | "start-vcpu"

/** An operation with its operands; which of them count depends on its kind. */
export class Operation {
  kind: OperationKind = "none"
  /** Address or port of an access, number of a vCPU to start. */
  address = 0
  /** Width of an access in bytes. */
  size = 0
  value = 0
  /** Line of a wait, or -1 for any. */
  gsi = -1
  /** Virtual time at which a wait or a sleep ends. */
  deadline = Number.POSITIVE_INFINITY
  bytes: Uint8Array | undefined
  program: GuestProgram | undefined
}

const REQUEST: IteratorYieldResult<GuestRequest> = { done: false, value: undefined }

/** What a slot needs of its vCPU. */
export interface OperationOwner {
  readonly id: number
  /** Does an operation that needs nobody else at once, and leaves its reply in the slot. Returns whether it did. */
  readonly immediate: (operation: Operation) => boolean
  /** The defect of a program that breaks the rules. */
  readonly violation: (message: string) => Error
}

/** The operation of a vCPU. */
export class OperationSlot {
  /** The operation that the program asked for last. */
  operation = new Operation()
  /** Its result, once it is done. */
  reply: GuestReply
  /** Operations of each type of result. A program delegates to them with `yield*`. */
  readonly ofNumber: GuestOperation<number>
  readonly ofOptional: GuestOperation<number | undefined>
  readonly ofVoid: GuestOperation<void>
  readonly ofEnd: GuestOperation<never>
  readonly #owner: OperationOwner
  /** An operation was made, and the program has not delegated to it yet. */
  #armed = false
  /** The program has handed the operation over and waits for its result. */
  #handedOver = false

  constructor(owner: OperationOwner) {
    this.#owner = owner
    this.ofNumber = this.#make((reply) => reply ?? 0)
    this.ofOptional = this.#make((reply) => reply)
    this.ofVoid = this.#make(() => undefined)
    this.ofEnd = this.#make(() => {
      throw owner.violation(`vCPU ${owner.id} went on after it had stopped for good`)
    })
  }

  #make<A>(result: (reply: GuestReply) => A): GuestOperation<A> {
    const iterator: Iterator<GuestRequest, A, GuestReply> = {
      next: (reply) => {
        if (this.#handedOver) return { done: true, value: result(reply) }
        this.#handedOver = true
        if (!this.#owner.immediate(this.operation)) return REQUEST
        return { done: true, value: result(this.reply) }
      }
    }
    return {
      [Symbol.iterator]: () => {
        this.#armed = false
        this.#handedOver = false
        return iterator
      }
    }
  }

  /** Makes an operation; the caller adds the operands that only its kind has. */
  arm(kind: OperationKind, address = 0, size = 0, value = 0): Operation {
    this.checkDone()
    this.#armed = true
    const { operation } = this
    operation.kind = kind
    operation.address = address
    operation.size = size
    operation.value = value
    operation.gsi = -1
    operation.deadline = Number.POSITIVE_INFINITY
    operation.bytes = undefined
    operation.program = undefined
    return operation
  }

  /** Throws when the program made an operation and forgot to do it. */
  checkDone(): void {
    if (!this.#armed) return
    throw this.#owner.violation(
      `vCPU ${this.#owner.id}: the guest program made a ${this.operation.kind} operation and did not do it; ` +
        "write yield* before it"
    )
  }

  /** Goes back to an operation that an interrupt handler came between. */
  restore(operation: Operation, reply: GuestReply): void {
    this.operation = operation
    this.reply = reply
    this.#handedOver = true
  }

  /** Begins the operations of an interrupt handler. */
  nest(): void {
    this.operation = new Operation()
    this.reply = undefined
  }
}
