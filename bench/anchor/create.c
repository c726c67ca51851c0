/*
 * What creating a machine costs without a library: the same ioctls, the kernel copied in, and KVM_RUN to the guest's first
 * instruction, which is a write to port 0x80.
 *
 *   create KERNEL.elf MEMORY_BYTES
 *
 * Each line on standard input makes one machine; the answer is the time of it in nanoseconds. The first line of output is the
 * first machine's time from the start of the process.
 */
#include <elf.h>

#include "kvm.h"

#define MARK_PORT 0x80

static uint8_t *file;
static size_t file_size;

static uint64_t load(struct machine *machine) {
  Elf64_Ehdr *head = (Elf64_Ehdr *)file;
  Elf64_Phdr *programs = (Elf64_Phdr *)(file + head->e_phoff);
  for (int i = 0; i < head->e_phnum; i++) {
    Elf64_Phdr *program = programs + i;
    if (program->p_type == PT_LOAD && program->p_paddr + program->p_memsz <= machine->size) {
      memcpy(machine->memory + program->p_paddr, file + program->p_offset, program->p_filesz);
    }
  }
  return head->e_entry;
}

/* 64-bit mode over an identity mapping of the first GiB: what the Linux 64-bit boot protocol asks for. */
static void set_registers(struct machine *machine, uint64_t entry) {
  uint64_t *pml4 = (uint64_t *)(machine->memory + 0x9000);
  uint64_t *pdpt = (uint64_t *)(machine->memory + 0xa000);
  uint64_t *pd = (uint64_t *)(machine->memory + 0xb000);
  pml4[0] = 0xa003;
  pdpt[0] = 0xb003;
  for (uint64_t i = 0; i < 512; i++) pd[i] = i << 21 | 0x83;
  struct kvm_sregs sregs;
  checked(ioctl(machine->vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
  struct kvm_segment code = {.limit = ~0u, .selector = 0x10, .type = 0xb, .present = 1, .s = 1, .l = 1, .g = 1};
  struct kvm_segment data = {.limit = ~0u, .selector = 0x18, .type = 0x3, .present = 1, .s = 1, .db = 1, .g = 1};
  struct kvm_segment tss = {.limit = 0x67, .selector = 0x20, .type = 0xb, .present = 1};
  sregs.cs = code;
  sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
  sregs.tr = tss;
  sregs.cr0 = 0x80000011;
  sregs.cr3 = 0x9000;
  sregs.cr4 = 0x20;
  sregs.efer = 0x500;
  checked(ioctl(machine->vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
  struct kvm_regs regs = {.rip = entry, .rsp = 0x8000, .rsi = 0x7000, .rflags = 2};
  checked(ioctl(machine->vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
}

static void set_msrs_and_lapic(struct machine *machine) {
  struct {
    struct kvm_msrs head;
    struct kvm_msr_entry entry;
  } msrs = {.head = {.nmsrs = 1}, .entry = {.index = 0x1a0, .data = 1}};
  checked(ioctl(machine->vcpu, KVM_SET_MSRS, &msrs), "KVM_SET_MSRS");
  struct kvm_fpu fpu = {.fcw = 0x37f, .mxcsr = 0x1f80};
  checked(ioctl(machine->vcpu, KVM_SET_FPU, &fpu), "KVM_SET_FPU");
  struct kvm_lapic_state lapic;
  checked(ioctl(machine->vcpu, KVM_GET_LAPIC, &lapic), "KVM_GET_LAPIC");
  checked(ioctl(machine->vcpu, KVM_SET_LAPIC, &lapic), "KVM_SET_LAPIC");
}

static double create(int kvm, size_t size) {
  double begin = now_ns();
  struct machine machine;
  make_machine(&machine, kvm, size);
  uint64_t entry = load(&machine);
  make_vcpu(&machine);
  set_msrs_and_lapic(&machine);
  set_registers(&machine, entry);
  for (;;) {
    if (ioctl(machine.vcpu, KVM_RUN, 0) < 0) {
      if (errno == EINTR || errno == EAGAIN) continue;
      checked(-1, "KVM_RUN");
    }
    if (machine.run->exit_reason == KVM_EXIT_IO && machine.run->io.port == MARK_PORT) break;
    fprintf(stderr, "unexpected exit %u\n", machine.run->exit_reason);
    exit(1);
  }
  double end = now_ns();
  end_machine(&machine);
  return end - begin;
}

int main(int argc, char **argv) {
  double started = now_ns();
  if (argc != 3) {
    fprintf(stderr, "usage: create KERNEL.elf MEMORY_BYTES\n");
    return 2;
  }
  int kernel = checked(open(argv[1], O_RDONLY), argv[1]);
  file_size = checked(lseek(kernel, 0, SEEK_END), "lseek");
  file = malloc(file_size);
  if (!file || pread(kernel, file, file_size, 0) != (ssize_t)file_size) checked(-1, "read of the kernel");
  size_t size = strtoull(argv[2], 0, 10);
  int kvm = checked(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
  double before = now_ns() - started;
  printf("%.0f\n", before + create(kvm, size));
  fflush(stdout);
  char line[32];
  while (fgets(line, sizeof line, stdin)) {
    printf("%.0f\n", create(kvm, size));
    fflush(stdout);
  }
  return 0;
}
