/*
 * The plain loop that an exit is measured against: KVM_RUN on /dev/kvm, each exit finished here, on the vCPU's thread.
 *
 *   exits IMAGE RIP RSP CR3 CR4 GDT IDT TSS
 *
 * IMAGE is the guest's memory, the numbers are hexadecimal. The guest stops at a write to MARK_PORT. Each line "N" on
 * standard input has it do a batch of N accesses; the answer is the batch in ticks of the guest's time-stamp counter,
 * as the guest stored it. The first line of output is the counter's frequency in kHz.
 */
#include "kvm.h"

#define MARK_PORT 0x80
/* Where guest and host exchange numbers; BatchGuest.ts has the same. */
#define COUNT_ADDRESS 0xa000
#define BEGIN_ADDRESS 0xa008
#define END_ADDRESS 0xa010

/* Posted writes are kept, reads come from a table: what a device model in C does at the least. */
#define RING_SIZE 2048
static struct {
  uint64_t address;
  uint32_t size, value;
} ring[RING_SIZE];
static uint32_t ring_tail;
static uint8_t shadow[0x10000];

static void set_registers(int vcpu, char **state) {
  uint64_t value[7];
  for (int i = 0; i < 7; i++) value[i] = strtoull(state[i], 0, 16);
  struct kvm_sregs sregs;
  checked(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
  struct kvm_segment code = {.limit = ~0u, .selector = 0x10, .type = 0xb, .present = 1, .s = 1, .l = 1, .g = 1};
  struct kvm_segment data = {.limit = ~0u, .selector = 0x18, .type = 0x3, .present = 1, .s = 1, .db = 1, .g = 1};
  struct kvm_segment tss = {.base = value[6], .limit = 0x67, .selector = 0x20, .type = 0xb, .present = 1};
  sregs.cs = code;
  sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
  sregs.tr = tss;
  sregs.cr0 = 0x80000011;
  sregs.cr3 = value[2];
  sregs.cr4 = value[3];
  sregs.efer = 0x500;
  sregs.gdt.base = value[4];
  sregs.gdt.limit = 0x3f;
  sregs.idt.base = value[5];
  sregs.idt.limit = 0x40f;
  checked(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
  struct kvm_regs regs = {.rip = value[0], .rsp = value[1], .rflags = 2};
  checked(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
}

static void access_register(uint64_t address, uint32_t size, int is_write, uint8_t *data) {
  if (is_write) {
    uint32_t slot = ring_tail++ % RING_SIZE;
    ring[slot].address = address;
    ring[slot].size = size;
    ring[slot].value = 0;
    memcpy(&ring[slot].value, data, size > 4 ? 4 : size);
  } else {
    for (uint32_t i = 0; i < size; i++) data[i] = shadow[(address + i) & 0xffff];
  }
}

/* Runs the guest to its next mark. */
static void run_to_mark(struct machine *machine) {
  struct kvm_run *run = machine->run;
  for (;;) {
    if (ioctl(machine->vcpu, KVM_RUN, 0) < 0) {
      if (errno == EINTR || errno == EAGAIN) continue;
      checked(-1, "KVM_RUN");
    }
    if (run->exit_reason == KVM_EXIT_IO) {
      if (run->io.port == MARK_PORT) return;
      uint8_t *data = (uint8_t *)run + run->io.data_offset;
      for (uint32_t i = 0; i < run->io.count; i++) {
        access_register(run->io.port, run->io.size, run->io.direction == KVM_EXIT_IO_OUT, data + i * run->io.size);
      }
    } else if (run->exit_reason == KVM_EXIT_MMIO) {
      access_register(run->mmio.phys_addr, run->mmio.len, run->mmio.is_write, run->mmio.data);
    } else {
      fprintf(stderr, "unexpected exit %u\n", run->exit_reason);
      exit(1);
    }
  }
}

int main(int argc, char **argv) {
  if (argc != 9) {
    fprintf(stderr, "usage: exits IMAGE RIP RSP CR3 CR4 GDT IDT TSS\n");
    return 2;
  }
  struct machine machine;
  int image = checked(open(argv[1], O_RDONLY), argv[1]);
  size_t size = checked(lseek(image, 0, SEEK_END), "lseek");
  make_machine(&machine, checked(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm"), size);
  if (pread(image, machine.memory, size, 0) != (ssize_t)size) checked(-1, "read of the image");
  make_vcpu(&machine);
  set_registers(machine.vcpu, argv + 2);
  printf("%d\n", checked(ioctl(machine.vcpu, KVM_GET_TSC_KHZ, 0), "KVM_GET_TSC_KHZ"));
  fflush(stdout);
  run_to_mark(&machine);
  char line[32];
  while (fgets(line, sizeof line, stdin)) {
    *(volatile uint32_t *)(machine.memory + COUNT_ADDRESS) = strtoul(line, 0, 10);
    run_to_mark(&machine);
    uint64_t begin, end;
    memcpy(&begin, machine.memory + BEGIN_ADDRESS, 8);
    memcpy(&end, machine.memory + END_ADDRESS, 8);
    printf("%llu\n", (unsigned long long)(end - begin));
    fflush(stdout);
  }
  end_machine(&machine);
  return 0;
}
