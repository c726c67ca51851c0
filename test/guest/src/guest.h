/* Everything that the guest's files share: types, port and memory access, and the functions of each file. */
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;
typedef long i64;
typedef _Bool bool;
#define true ((bool)1)
#define false ((bool)0)
#define NULL ((void *)0)

#define MAX_CPUS 64
#define MAX_RANGES 64
#define MAX_VIRTIO 32
#define MAX_IOAPICS 4
#define PAGE 4096ul

/* ---- port and memory access ------------------------------------------------------------------------------------- */

static inline void out8(u16 port, u8 value) { asm volatile("outb %0, %1" ::"a"(value), "Nd"(port) : "memory"); }
static inline void out16(u16 port, u16 value) { asm volatile("outw %0, %1" ::"a"(value), "Nd"(port) : "memory"); }
static inline void out32(u16 port, u32 value) { asm volatile("outl %0, %1" ::"a"(value), "Nd"(port) : "memory"); }
static inline u8 in8(u16 port) { u8 v; asm volatile("inb %1, %0" : "=a"(v) : "Nd"(port) : "memory"); return v; }
static inline u16 in16(u16 port) { u16 v; asm volatile("inw %1, %0" : "=a"(v) : "Nd"(port) : "memory"); return v; }
static inline u32 in32(u16 port) { u32 v; asm volatile("inl %1, %0" : "=a"(v) : "Nd"(port) : "memory"); return v; }

/* Accesses to device memory are one plain `mov` of the right width each: the compiler must not choose the instruction,
 * for a KVM's emulator decodes it. */
static inline void write8(u64 at, u8 v) { asm volatile("movb %0, (%1)" ::"q"(v), "r"(at) : "memory"); }
static inline void write16(u64 at, u16 v) { asm volatile("movw %0, (%1)" ::"r"(v), "r"(at) : "memory"); }
static inline void write32(u64 at, u32 v) { asm volatile("movl %0, (%1)" ::"r"(v), "r"(at) : "memory"); }
static inline void write64(u64 at, u64 v) { asm volatile("movq %0, (%1)" ::"r"(v), "r"(at) : "memory"); }
static inline u8 read8(u64 at) { u8 v; asm volatile("movb (%1), %0" : "=q"(v) : "r"(at) : "memory"); return v; }
static inline u16 read16(u64 at) { u16 v; asm volatile("movw (%1), %0" : "=r"(v) : "r"(at) : "memory"); return v; }
static inline u32 read32(u64 at) { u32 v; asm volatile("movl (%1), %0" : "=r"(v) : "r"(at) : "memory"); return v; }
static inline u64 read64(u64 at) { u64 v; asm volatile("movq (%1), %0" : "=r"(v) : "r"(at) : "memory"); return v; }

static inline void interrupts_on(void) { asm volatile("sti" ::: "memory"); }
static inline void interrupts_off(void) { asm volatile("cli" ::: "memory"); }
/* `sti` holds interrupts back for one more instruction, so none can slip in between and be slept over. */
static inline void sleep_until_interrupt(void) { asm volatile("sti\n\thlt\n\tcli" ::: "memory"); }
static inline void pause_cpu(void) { asm volatile("pause" ::: "memory"); }
static inline void barrier(void) { asm volatile("mfence" ::: "memory"); }

static inline u64 read_tsc(void) {
  u32 low, high;
  asm volatile("rdtsc" : "=a"(low), "=d"(high)::"memory");
  return ((u64)high << 32) | low;
}

static inline void cpuid(u32 leaf, u32 *a, u32 *b, u32 *c, u32 *d) {
  asm volatile("cpuid" : "=a"(*a), "=b"(*b), "=c"(*c), "=d"(*d) : "a"(leaf), "c"(0));
}

/* Marks on port 0x80: how far the guest is, for whoever measures outside. */
#define MARK_C 0x02
#define MARK_READY 0x03
#define MARK_BENCH_BEGIN 0xb0
#define MARK_BENCH_END 0xb1
static inline void mark(u8 value) { out8(0x80, value); }

_Noreturn void halt_forever(void);

/* ---- string.c --------------------------------------------------------------------------------------------------- */

void *memcpy(void *to, const void *from, u64 size);
void *memset(void *to, int value, u64 size);
int memcmp(const void *a, const void *b, u64 size);
bool str_equal(const char *a, const char *b);
/* The rest of `text` behind `prefix`, or NULL when it does not begin with it. */
const char *after_prefix(const char *text, const char *prefix);
/* Reads a decimal or 0x number; `*text` is left behind it. */
u64 take_number(const char **text);

/* ---- serial.c, print.c, console.c ------------------------------------------------------------------------------- */

#define COM1 0x3f8
#define UART_DATA (COM1 + 0)
#define UART_IER (COM1 + 1)
#define UART_IIR (COM1 + 2)
#define UART_LCR (COM1 + 3)
#define UART_MCR (COM1 + 4)
#define UART_LSR (COM1 + 5)
#define IER_RECEIVE 0x01
#define IER_TRANSMIT 0x02
#define LSR_DATA_READY 0x01
#define LSR_TRANSMIT_EMPTY 0x20

void serial_init(void);
void serial_put(char c);

/* Formats %s %c %u (u64, decimal), %x (u64, 0x and no leading zeros), %p (u64, 0x and 16 digits), %b (u64, one byte as
 * two digits). `print` writes as is, `say` puts the prefix before and CR LF behind. */
void print(const char *format, ...);
void say(const char *format, ...);

void console_transmit(void);
void console_echo(bool by_interrupt);

/* ---- boot.c ----------------------------------------------------------------------------------------------------- */

struct range {
  u64 base, size;
  u32 type;
};
#define RANGE_RAM 1

struct boot {
  const char *entry;
  char cmdline[4096];
  struct range ranges[MAX_RANGES];
  u32 range_count;
  u64 initrd, initrd_size;
  u64 rsdp;
  const char *rsdp_from;
};
extern struct boot boot;

/* Which entry was taken, and the physical address of its boot information (entry.S). */
extern u32 entry_kind;
extern u64 entry_info;
#define ENTRY_PVH 1
#define ENTRY_LINUX64 2

void boot_read(void);
void boot_report(void);

/* ---- acpi.c, aml.c ---------------------------------------------------------------------------------------------- */

/* A generic address structure, as far as this guest goes: a byte register in port or memory space. */
struct reg {
  bool present, in_ports;
  u64 address;
};

struct virtio_place {
  u64 base, size;
  u32 irq;
  bool level, active_low;
};

struct acpi {
  bool found;
  struct reg sleep_control, sleep_status, reset;
  u8 reset_value;
  bool has_s5;
  u8 s5;
  u32 cpu_count;
  u32 cpu_apic[MAX_CPUS];
  u64 lapic;
  struct {
    u64 base;
    u32 gsi;
  } ioapic[MAX_IOAPICS];
  u32 ioapic_count;
  struct {
    u32 gsi;
    u16 flags;
  } isa[16];
  struct virtio_place virtio[MAX_VIRTIO];
  u32 virtio_count;
  u64 ecam; /* configuration pages of PCI bus 0; 0: none */
};
extern struct acpi acpi;

void acpi_read(bool report);
void reg_write(const struct reg *reg, u8 value);
void aml_scan(const u8 *aml, u64 size, bool report);

/* ---- interrupts.c, apic.c, timer.c ------------------------------------------------------------------------------ */

#define VECTOR_TIMER 0x20
#define VECTOR_IPI 0x21
#define VECTOR_PIT 0x22
#define VECTOR_SERIAL 0x24
#define VECTOR_VIRTIO 0x25 /* the first of those for virtio devices, up to the spurious one */
#define VECTOR_SPURIOUS 0x3f
#define VECTORS 64

typedef void (*handler)(void);
extern volatile u32 interrupt_count[VECTORS];
void interrupts_init(void);
void interrupts_load(void);
void interrupt_handler(u32 vector, handler run);

void lapic_init(void);
u32 lapic_id(void);
void lapic_ipi(u32 apic, u32 low);
/* Runs the local APIC's timer: `every` ms for ever, or once. 0 stops it. */
void lapic_timer(u32 ms, bool periodic);
u64 lapic_timer_left_ns(void);
void lapic_eoi(void);
/* Sends interrupt `gsi` to this processor as `vector`. False without an IO-APIC that has it. */
bool ioapic_route(u32 gsi, u32 vector, bool level, bool active_low);
void ioapic_mask(u32 gsi);
/* The same for an ISA interrupt, by way of the MADT's overrides. */
bool isa_route(u32 irq, u32 vector);
void isa_mask(u32 irq);

/* Halts until `*value` has reached `wanted` (true) or `ms` have passed (false). Interrupts are off before and after. */
bool wait_for(const volatile u32 *value, u32 wanted, u32 ms);
/* The same for any condition: begin, halt while it does not hold and the time is not over, end. */
void wait_begin(u32 ms);
bool wait_over(void);
void wait_end(void);
/* What is left of the time, in nanoseconds: a clock on every hypervisor, as long as the wait lasts. */
u64 wait_left_ns(void);
void timer_ticks(void);
void timer_late(void);
void pit_ticks(void);

/* ---- the actions ------------------------------------------------------------------------------------------------ */

void smp_start(void);
/* Has another processor do it, beside this one. False: there is none, or it is at something. */
bool cpu_run(void (*run)(void *), void *argument);
/* Waits until it is done. */
void cpu_wait(void);

struct bench {
  u32 kind;
  u32 value;
  u64 count, port, addr;
  bool has_port, has_addr;
  u64 tsc;
};
bool bench_parse(struct bench *bench, const char *text);
void bench_run(struct bench *bench, bool user);

/* Calls `run(argument)` at CPL 3, with every port permitted and interrupts off, and comes back (interrupts.c, user.S). */
void user_call(void (*run)(void *), void *argument);
void user_mode(void);

void memory_fill(bool user);
void initrd_sum(void);
void unmapped_check(u64 port, u64 addr);
void string_io(u64 port);

/* heap.c, virtio.c (virtio.h has the rest), and the drivers: one file each, one function that takes its words. */
void heap_reset(void);
void virtio_interrupt(u32 vector);
void virtio_list(void);
extern bool virtio_packed;
bool hostile(const char *word);
bool virtio_balloon(const char *word);
bool virtio_blk(const char *word);
bool virtio_console(const char *word);
bool virtio_mem(const char *word);
bool virtio_net(const char *word);
bool virtio_vsock(const char *word);
bool virtio_rng(const char *word);
void cpuid_report(void);

void power_off(void);
void power_reset_acpi(void);
void power_reset_keyboard(void);
_Noreturn void power_triple_fault(void);
_Noreturn void power_hang(void);
_Noreturn void power_idle(void);
void power_internal_error(u64 addr);
void power_panic(void);

/* Numbers go to print() and say() as u64: a narrower argument leaves the upper half of its register undefined. */
#define U(x) ((u64)(x))
