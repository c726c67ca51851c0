/**
 * The few numbers of `linux/kvm.h` that a vCPU thread needs, as plain constants: its hot loop reads them as immediates, and the
 * thread need not load the codecs. A test compares each with the codecs.
 */

/** `KVM_RUN`. */
export const KVM_RUN = 0xae80
/** `KVM_GET_REGS`. */
export const KVM_GET_REGS = 0x8090_ae81
/** `KVM_GET_MP_STATE`. */
export const KVM_GET_MP_STATE = 0x8004_ae98

/** `KVM_EXIT_IO`. */
export const KVM_EXIT_IO = 2
/** `KVM_EXIT_MMIO`. */
export const KVM_EXIT_MMIO = 6
/** `KVM_EXIT_IO_OUT`. */
export const KVM_EXIT_IO_OUT = 1

/** Offsets in `struct kvm_run`. */
export const RUN_IMMEDIATE_EXIT = 1
export const RUN_EXIT_REASON = 8
export const RUN_IO_DIRECTION = 32
export const RUN_IO_SIZE = 33
export const RUN_IO_PORT = 34
export const RUN_IO_COUNT = 36
export const RUN_IO_DATA_OFFSET = 40
export const RUN_MMIO_PHYS_ADDR = 32
export const RUN_MMIO_DATA = 40
export const RUN_MMIO_LEN = 48
export const RUN_MMIO_IS_WRITE = 52

/** Size of `struct kvm_regs`. */
export const REGS_SIZE = 144
/** Offset of `rflags` in `struct kvm_regs`. */
export const REGS_RFLAGS = 136
/** RFLAGS.IF: interrupts are enabled (Intel SDM volume 1, section 3.4.3.3). */
export const RFLAGS_IF = 0x200

/** `EINTR`. */
export const EINTR = 4
/** `EAGAIN`. */
export const EAGAIN = 11
