/* Starts the further processors that the MADT names, one after the other. */
#include "guest.h"

#define TRAMPOLINE 0x8000ul
#define STACK_SIZE 2048
#define INCREMENTS 1000
#define START_MS 10000

#define ICR_INIT 0x4500    /* INIT, assert */
#define ICR_STARTUP 0x4600 /* SIPI; the page number goes below */
#define ICR_FIXED 0x4000

extern const u8 trampoline[], trampoline_end[];
extern u64 ap_stack;
extern u32 ap_index;
void ap_main(u32 index);

static u8 stacks[MAX_CPUS][STACK_SIZE] __attribute__((section(".stacks,\"aw\",@nobits#"), aligned(16)));
static volatile u32 up[MAX_CPUS];
static volatile u32 ipis[MAX_CPUS];
static volatile u32 done;
static u32 counter;
static u32 apic_index[256];
static u32 runner, runner_apic; /* the processor that runs jobs: its index, 0 when there is none yet */
static void (*volatile job)(void *);
static void *volatile job_argument;

static void count(void) {
  for (u32 i = 0; i < INCREMENTS; i++) asm volatile("lock incl %0" : "+m"(counter)::"memory");
}

static void on_ipi(void) { ipis[apic_index[lapic_id() & 0xff]]++; }

/* A further processor, on its own stack (entry.S). */
void ap_main(u32 index) {
  interrupts_load();
  lapic_init();
  up[index] = 1;
  count();
  asm volatile("lock incl %0" : "+m"(done)::"memory");
  for (;;) {
    if (job && index == runner) {
      job(job_argument);
      job = NULL;
    }
    sleep_until_interrupt();
  }
}

/* The first processor spins with short naps: a start is announced by memory, not by an interrupt. */
static bool poll(const volatile u32 *value, u32 wanted, u32 ms) {
  for (u32 waited = 0; *value < wanted && waited < ms; waited++) {
    for (u32 spins = 0; spins < 1000 && *value < wanted; spins++) pause_cpu();
    if (*value < wanted) wait_for(&interrupt_count[VECTOR_SPURIOUS], ~0u, 1);
  }
  return *value >= wanted;
}

static bool start(u32 index, u32 apic) {
  ap_index = index;
  ap_stack = (u64)stacks[index] + STACK_SIZE;
  apic_index[apic & 0xff] = index;
  lapic_ipi(apic, ICR_INIT);
  wait_for(&interrupt_count[VECTOR_SPURIOUS], ~0u, 1);
  lapic_ipi(apic, ICR_STARTUP | TRAMPOLINE >> 12);
  if (poll(&up[index], 1, 20)) return true;
  lapic_ipi(apic, ICR_STARTUP | TRAMPOLINE >> 12); /* the second one that the specification asks for */
  return poll(&up[index], 1, START_MS);
}

/* The first processor but this one, started if it is not up yet. */
static bool find_runner(void) {
  u32 index = 0;
  for (u32 i = 0; i < acpi.cpu_count && !runner; i++) {
    if (acpi.cpu_apic[i] == lapic_id()) continue;
    index++;
    memcpy((void *)TRAMPOLINE, trampoline, (u64)(trampoline_end - trampoline));
    interrupt_handler(VECTOR_IPI, on_ipi);
    if (!up[index] && !start(index, acpi.cpu_apic[i])) return false;
    runner = index;
    runner_apic = acpi.cpu_apic[i];
  }
  return runner != 0;
}

bool cpu_run(void (*run)(void *), void *argument) {
  if (job || !find_runner()) return false;
  job_argument = argument;
  job = run;
  lapic_ipi(runner_apic, ICR_FIXED | VECTOR_IPI);
  return true;
}

void cpu_wait(void) {
  while (job) pause_cpu();
}

void smp_start(void) {
  u32 self = lapic_id(), started = 1;
  memcpy((void *)TRAMPOLINE, trampoline, (u64)(trampoline_end - trampoline));
  interrupt_handler(VECTOR_IPI, on_ipi);
  counter = 0;
  done = 0;
  u32 index = 0;
  for (u32 i = 0; i < acpi.cpu_count; i++) {
    u32 apic = acpi.cpu_apic[i];
    if (apic == self) continue;
    index++;
    up[index] = 0;
    if (!start(index, apic)) {
      say("cpu %u failed", U(index));
      continue;
    }
    started++;
    poll(&done, started - 1, START_MS);
    u32 before = ipis[index];
    lapic_ipi(apic, ICR_FIXED | VECTOR_IPI);
    bool arrived = poll(&ipis[index], before + 1, START_MS);
    say("cpu %u up apic %u ipi %s", U(index), U(apic), arrived ? "ok" : "failed");
  }
  count();
  say("smp %u of %u up", U(started), U(acpi.cpu_count));
  say("smp counter %u %s", U(counter), counter == started * INCREMENTS ? "ok" : "bad");
}
