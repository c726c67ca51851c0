/**
 * The words that a vCPU thread and its host share: requests to the thread, the call that it waits for, why it stopped, and its
 * counters. Imports nothing, so that a vCPU thread can load it cheaply.
 */

/** Host to thread: changed (and notified) whenever something that the thread may be waiting for has happened. */
export const CONTROL_GATE = 0
/** Host to thread: a set of `REQUEST_*`. */
export const CONTROL_REQUEST = 1
/** Whose turn a call is: `CALL_*`. */
export const CONTROL_CALL = 2
/** The call: index of the range. */
export const CONTROL_CALL_RANGE = 3
/** The call: offset in the range, in bytes. */
export const CONTROL_CALL_OFFSET = 4
/** The call: size in bytes. */
export const CONTROL_CALL_SIZE = 5
/** The call: 1 for a write. */
export const CONTROL_CALL_IS_WRITE = 6
/** The call: the value written; then the value read. */
export const CONTROL_CALL_VALUE = 7
/** The call: the ring's tail when it was made. Entries before it are delivered before the call. */
export const CONTROL_CALL_TAIL = 8
/** Whether the thread is at work: `THREAD_*`. Notified when the thread has stopped. */
export const CONTROL_THREAD = 9
/** Why the thread has stopped: `STOP_*`. */
export const CONTROL_STOP = 10
/** `exit_reason` for {@link STOP_EXIT}, the errno for {@link STOP_FAILED}. */
export const CONTROL_STOP_VALUE = 11
/** How many inspections the thread has answered. */
export const CONTROL_INSPECTIONS = 13
/** The last inspection: `mp_state` of `struct kvm_mp_state`. */
export const CONTROL_MP_STATE = 14
/** The last inspection: 1 when RFLAGS.IF is set. */
export const CONTROL_INTERRUPTS_ENABLED = 15
/** Counter: returns from `KVM_RUN` to the thread. */
export const CONTROL_EXITS = 16
/** Counter: posted writes. */
export const CONTROL_POSTED = 17
/** Counter: reads answered from the shadow table. */
export const CONTROL_SHADOWED = 18
/** Counter: calls. */
export const CONTROL_CALLS = 19
/** Counter: accesses that no range answers. */
export const CONTROL_UNCLAIMED = 20
/** Counter: calls for which the thread went to sleep. */
export const CONTROL_SLEEPS = 21
/** Counter: posted writes that had to wait for room in the ring. */
export const CONTROL_RING_WAITS = 22

/** Length of the block in 32-bit words. */
export const CONTROL_WORDS = 32

/** Request: leave the guest for good. Never taken back. */
export const REQUEST_STOP = 1
/** Request: look at the vCPU's state, publish it, go on. */
export const REQUEST_INSPECT = 2

/** No call. */
export const CALL_NONE = 0
/** The thread has made a call. */
export const CALL_MADE = 1
/** The host has taken the call and will answer. */
export const CALL_TAKEN = 2
/** The host has answered. */
export const CALL_ANSWERED = 3

/** The thread has not begun with this block. */
export const THREAD_IDLE = 0
/** The thread runs the vCPU. */
export const THREAD_RUNNING = 1
/** The thread has left the vCPU and touches nothing of it any more. */
export const THREAD_STOPPED = 2

/** Host to thread, as a message in the place of a job: end. */
export const THREAD_END = "end"

/** Stopped because the host asked for it. */
export const STOP_REQUESTED = 1
/** Stopped at an exit that ends the vCPU. */
export const STOP_EXIT = 2
/** Stopped because `KVM_RUN` failed. */
export const STOP_FAILED = 3
/** Stopped by a defect of the thread's own code. */
export const STOP_CRASHED = 4

/** The host sleeps: whoever has something for it writes the machine's eventfd. */
export const HOST_ASLEEP = 0
/** The host looks at the ring again on its own soon: posted writes need no wake-up, calls do. */
export const HOST_LAZY = 1
/** The host is awake, or has been woken, and will look at everything before it sleeps. */
export const HOST_AWAKE = 2

/** Has whoever waits on the block look again. */
export const openGate = (control: Int32Array<SharedArrayBuffer>): void => {
  Atomics.add(control, CONTROL_GATE, 1)
  Atomics.notify(control, CONTROL_GATE)
}
