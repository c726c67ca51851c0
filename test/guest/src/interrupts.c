/* The interrupt descriptor table, the task state segment, and what happens when an interrupt or exception comes. */
#include "guest.h"

#define IO_PORTS 65536
#define ALLOWED_BYTES (IO_PORTS / 8 + 8) /* a byte more than the ports have is read */

struct frame {
  u64 r15, r14, r13, r12, r11, r10, r9, r8, rdi, rsi, rbp, rbx, rdx, rcx, rax;
  u64 vector, error, rip, cs, rflags, rsp, ss;
};

struct gate {
  u16 offset_low, selector;
  u8 stack, type;
  u16 offset_middle;
  u32 offset_high, reserved;
};

struct __attribute__((packed)) tss {
  u32 reserved0;
  u64 rsp0;
  u8 rest[92 - 4];
  u16 reserved1, io_map;
};

struct __attribute__((packed)) pointer {
  u16 limit;
  u64 base;
};

#define SELECTOR_CODE 0x08
#define SELECTOR_TSS 0x28
#define GATE_INTERRUPT 0x8e
#define STUB_SIZE 16
#define UNDEFINED_INSTRUCTION 6

extern u64 gdt[];
extern u8 vector_stubs[];
extern u8 user_done[];
void user_enter(void (*run)(void *), void *argument);
_Noreturn void user_return(void);
void interrupt(struct frame *frame);

volatile u32 interrupt_count[VECTORS];
static handler handlers[VECTORS];
static struct gate idt[VECTORS] __attribute__((aligned(16)));
/* Not cleared at start: clearing takes long where kernel mode is emulated, and only CPL 3 needs the permissions. */
static struct {
  struct tss tss;
  u64 io_allowed[ALLOWED_BYTES / 8];
} task __attribute__((aligned(16), section(".stacks,\"aw\",@nobits#")));
static bool ports_allowed;
static u8 tss_stack[1024] __attribute__((aligned(16)));

static void set_gate(u32 vector, u64 to) {
  idt[vector] = (struct gate){(u16)to, SELECTOR_CODE, 0, GATE_INTERRUPT, (u16)(to >> 16), (u32)(to >> 32), 0};
}

static void clear(void *at, u64 words) { asm volatile("rep stosq" : "+D"(at), "+c"(words) : "a"(0ul) : "memory"); }

void interrupts_load(void) {
  struct pointer pointer = {sizeof idt - 1, (u64)idt};
  asm volatile("lidt %0" ::"m"(pointer) : "memory");
}

void interrupts_init(void) {
  for (u32 vector = 0; vector < VECTORS; vector++)
    set_gate(vector, (u64)vector_stubs + vector * STUB_SIZE);
  interrupts_load();

  clear(&task.tss, sizeof task.tss / 8);
  task.tss.rsp0 = (u64)(tss_stack + sizeof tss_stack);
  task.tss.io_map = sizeof task.tss;
  u64 base = (u64)&task, limit = sizeof task - 1;
  gdt[SELECTOR_TSS / 8] = limit | (base & 0xffffff) << 16 | 0x89ul << 40 | (base >> 24 & 0xff) << 56;
  gdt[SELECTOR_TSS / 8 + 1] = base >> 32;
  asm volatile("ltr %w0" ::"r"(SELECTOR_TSS) : "memory");
}

/* IOPL 3 is not enough: a KVM that emulates kernel mode loses it at `iretq`. So the task state permits every port. */
void user_call(void (*run)(void *), void *argument) {
  if (!ports_allowed) clear(task.io_allowed, ALLOWED_BYTES / 8);
  ports_allowed = true;
  user_enter(run, argument);
}

void interrupt_handler(u32 vector, handler run) { handlers[vector] = run; }

/* From vectors.S. */
void interrupt(struct frame *frame) {
  u32 vector = (u32)frame->vector;
  if (vector == UNDEFINED_INSTRUCTION && frame->rip == (u64)user_done) user_return();
  if (vector < 32) {
    u64 cr2;
    asm volatile("mov %%cr2, %0" : "=r"(cr2));
    say("exception %u error %x rip %x cr2 %x cpl %u", U(vector), frame->error, frame->rip, cr2, frame->cs & 3);
    halt_forever();
  }
  if (handlers[vector])
    handlers[vector]();
  else if (vector >= VECTOR_VIRTIO)
    virtio_interrupt(vector);
  interrupt_count[vector]++;
  if (vector != VECTOR_SPURIOUS) lapic_eoi();
}
