/* The ways in which this guest ends, and a panic's last line. */
#include "guest.h"

#define SLEEP_ENABLE 0x20
#define KEYBOARD_COMMAND 0x64
#define KEYBOARD_PULSE_RESET 0xfe
#define PVPANIC 0x505
#define PVPANIC_PANICKED 1
#define END_MS 10000

/* A host that stops the machine does so at the access itself or soon after: time for it to take effect. */
static void give_time(void) { wait_for(&interrupt_count[VECTOR_SPURIOUS], ~0u, END_MS); }

void power_off(void) {
  say("poweroff");
  if (acpi.sleep_control.present && acpi.has_s5) {
    if (acpi.sleep_status.present) reg_write(&acpi.sleep_status, 0x80); /* WAK_STS: written to clear, as Linux does */
    reg_write(&acpi.sleep_control, (u8)(acpi.s5 << 2 | SLEEP_ENABLE));
    give_time();
  }
  say("poweroff failed");
}

void power_reset_acpi(void) {
  say("reset acpi");
  if (acpi.reset.present) {
    reg_write(&acpi.reset, acpi.reset_value);
    give_time();
  }
  say("reset acpi failed");
}

void power_reset_keyboard(void) {
  say("reset kbd");
  out8(KEYBOARD_COMMAND, KEYBOARD_PULSE_RESET);
  give_time();
  say("reset kbd failed");
}

/* A division by zero, for an undefined instruction is something else to a KVM that emulates kernel mode. */
void power_triple_fault(void) {
  say("triplefault");
  struct __attribute__((packed)) {
    u16 limit;
    u64 base;
  } empty = {0, 0};
  asm volatile("lidt %0\n\txor %%edx, %%edx\n\txor %%ecx, %%ecx\n\tdiv %%ecx" ::"m"(empty) : "eax", "ecx", "edx", "memory");
  halt_forever();
}

void power_hang(void) {
  say("hang");
  asm volatile("cli\n1:\tjmp 1b");
  __builtin_unreachable();
}

void power_idle(void) {
  say("idle");
  for (;;) sleep_until_interrupt();
}

/* On a KVM with hardware support the access leaves the guest, and KVM's emulator has no popcnt; where kernel mode is
 * emulated the instruction itself is enough. */
void power_internal_error(u64 addr) {
  say("internal-error");
  u32 bits;
  asm volatile("popcntl (%1), %0" : "=r"(bits) : "r"(addr) : "memory", "cc");
  say("internal-error did not happen");
}

void power_panic(void) {
  say("panic-line");
  print("Kernel panic - not syncing: troupe-guest was asked to\r\n");
  out8(PVPANIC, PVPANIC_PANICKED);
}
