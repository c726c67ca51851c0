/* What the C loops share: a machine with interrupt controllers, one vCPU, and a failure that names the call. */
#ifndef BENCH_KVM_H
#define BENCH_KVM_H
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static inline int checked(int result, const char *call) {
  if (result < 0) {
    fprintf(stderr, "%s: %s\n", call, strerror(errno));
    exit(1);
  }
  return result;
}

static inline double now_ns(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1e9 + time.tv_nsec;
}

struct machine {
  int kvm, vm, vcpu;
  uint8_t *memory;
  size_t size, run_size;
  struct kvm_run *run;
};

/*
 * The same machine as the library makes: memory from address 0, in-kernel interrupt controllers and timer. In this order, as
 * a memory slot that comes after the timer waits for milliseconds.
 */
static inline void make_machine(struct machine *machine, int kvm, size_t size) {
  machine->kvm = kvm;
  machine->size = size;
  machine->vm = checked(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
  checked(ioctl(machine->vm, KVM_SET_TSS_ADDR, 0xfffbd000), "KVM_SET_TSS_ADDR");
  machine->memory = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (machine->memory == MAP_FAILED) checked(-1, "mmap");
  struct kvm_userspace_memory_region slot = {.memory_size = size, .userspace_addr = (uintptr_t)machine->memory};
  checked(ioctl(machine->vm, KVM_SET_USER_MEMORY_REGION, &slot), "KVM_SET_USER_MEMORY_REGION");
  checked(ioctl(machine->vm, KVM_CREATE_IRQCHIP, 0), "KVM_CREATE_IRQCHIP");
  struct kvm_pit_config pit = {.flags = KVM_PIT_SPEAKER_DUMMY};
  checked(ioctl(machine->vm, KVM_CREATE_PIT2, &pit), "KVM_CREATE_PIT2");
}

static inline void make_vcpu(struct machine *machine) {
  machine->vcpu = checked(ioctl(machine->vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
  machine->run_size = checked(ioctl(machine->kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
  machine->run = mmap(0, machine->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, machine->vcpu, 0);
  if (machine->run == MAP_FAILED) checked(-1, "mmap of the vCPU");
  static struct {
    struct kvm_cpuid2 head;
    struct kvm_cpuid_entry2 entries[256];
  } cpuid;
  cpuid.head.nent = 256;
  checked(ioctl(machine->kvm, KVM_GET_SUPPORTED_CPUID, &cpuid), "KVM_GET_SUPPORTED_CPUID");
  checked(ioctl(machine->vcpu, KVM_SET_CPUID2, &cpuid), "KVM_SET_CPUID2");
}

static inline void end_machine(struct machine *machine) {
  munmap(machine->run, machine->run_size);
  close(machine->vcpu);
  close(machine->vm);
  munmap(machine->memory, machine->size);
}
#endif
