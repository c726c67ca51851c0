/** The constants of the vCPU thread are those of the codecs, which are those of the system's header. */
import { assert, describe, it } from "@effect/vitest"
import { KvmMpState, KvmRegs } from "@troupe/node/kvm/KvmCpuState"
import { KvmIoctl } from "@troupe/node/kvm/KvmIoctl"
import { KvmExit, KvmRun, KvmRunValue } from "@troupe/node/kvm/KvmRun"
import * as RunLayout from "@troupe/node/kvm/thread/RunLayout"
import { constants } from "node:os"

describe("RunLayout", () => {
  it("has the numbers of linux/kvm.h", () => {
    const { exit, exit_reason, immediate_exit } = KvmRun.fields
    assert.strictEqual(KvmMpState.size, 4)
    assert.deepStrictEqual({ ...RunLayout }, {
      KVM_RUN: KvmIoctl.KVM_RUN.request,
      KVM_GET_REGS: KvmIoctl.KVM_GET_REGS.request,
      KVM_GET_MP_STATE: KvmIoctl.KVM_GET_MP_STATE.request,
      KVM_EXIT_IO: KvmExit.KVM_EXIT_IO,
      KVM_EXIT_MMIO: KvmExit.KVM_EXIT_MMIO,
      KVM_EXIT_IO_OUT: KvmRunValue.KVM_EXIT_IO_OUT,
      RUN_IMMEDIATE_EXIT: immediate_exit.offset,
      RUN_EXIT_REASON: exit_reason.offset,
      RUN_IO_DIRECTION: exit.io.direction.offset,
      RUN_IO_SIZE: exit.io.size.offset,
      RUN_IO_PORT: exit.io.port.offset,
      RUN_IO_COUNT: exit.io.count.offset,
      RUN_IO_DATA_OFFSET: exit.io.data_offset.offset,
      RUN_MMIO_PHYS_ADDR: exit.mmio.phys_addr.offset,
      RUN_MMIO_DATA: exit.mmio.data.offset,
      RUN_MMIO_LEN: exit.mmio.len.offset,
      RUN_MMIO_IS_WRITE: exit.mmio.is_write.offset,
      REGS_SIZE: KvmRegs.size,
      REGS_RFLAGS: KvmRegs.fields.rflags.offset,
      RFLAGS_IF: 1 << 9,
      EINTR: constants.errno.EINTR,
      EAGAIN: constants.errno.EAGAIN
    })
  })
})
