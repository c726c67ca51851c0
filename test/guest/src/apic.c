/* The local APIC (memory-mapped mode) and the IO-APIC. */
#include "guest.h"

#define LAPIC_ID 0x20
#define LAPIC_TPR 0x80
#define LAPIC_EOI 0xb0
#define LAPIC_SPURIOUS 0xf0
#define LAPIC_ICR_LOW 0x300
#define LAPIC_ICR_HIGH 0x310
#define LAPIC_LVT_TIMER 0x320
#define LAPIC_LVT_LINT0 0x350
#define LAPIC_TIMER_INITIAL 0x380
#define LAPIC_TIMER_CURRENT 0x390
#define LAPIC_TIMER_DIVIDE 0x3e0
#define LAPIC_ENABLED 0x100
#define LVT_MASKED 0x10000
#define LVT_PERIODIC 0x20000
#define ICR_PENDING 0x1000

#define DIVIDE_BY_16 3
/* KVM's and QEMU's local APIC timer counts nanoseconds, divided. */
#define COUNTS_PER_MS (1000000 / 16)

#define IOAPIC_SELECT 0x00
#define IOAPIC_WINDOW 0x10
#define IOAPIC_VERSION 1
#define IOAPIC_REDIRECTION 0x10
#define REDIRECT_LOW 0x2000
#define REDIRECT_LEVEL 0x8000
#define REDIRECT_MASKED 0x10000

#define MPS_POLARITY_LOW 3
#define MPS_TRIGGER_LEVEL 3

static u64 lapic(u32 offset) { return (acpi.lapic ? acpi.lapic : 0xfee00000) + offset; }

u32 lapic_id(void) { return read32(lapic(LAPIC_ID)) >> 24; }
void lapic_eoi(void) { write32(lapic(LAPIC_EOI), 0); }

void lapic_init(void) {
  write32(lapic(LAPIC_SPURIOUS), LAPIC_ENABLED | VECTOR_SPURIOUS);
  write32(lapic(LAPIC_TPR), 0);
  write32(lapic(LAPIC_LVT_LINT0), LVT_MASKED);
}

void lapic_ipi(u32 apic, u32 low) {
  write32(lapic(LAPIC_ICR_HIGH), apic << 24);
  write32(lapic(LAPIC_ICR_LOW), low);
  for (u32 tries = 0; tries < 1000 && (read32(lapic(LAPIC_ICR_LOW)) & ICR_PENDING); tries++) pause_cpu();
}

void lapic_timer(u32 ms, bool periodic) {
  write32(lapic(LAPIC_TIMER_DIVIDE), DIVIDE_BY_16);
  write32(lapic(LAPIC_LVT_TIMER), ms ? VECTOR_TIMER | (periodic ? LVT_PERIODIC : 0) : LVT_MASKED);
  write32(lapic(LAPIC_TIMER_INITIAL), ms * COUNTS_PER_MS);
}

u64 lapic_timer_left_ns(void) { return U(read32(lapic(LAPIC_TIMER_CURRENT))) * (1000000 / COUNTS_PER_MS); }

static u32 ioapic_read(u64 base, u32 index) {
  write32(base + IOAPIC_SELECT, index);
  return read32(base + IOAPIC_WINDOW);
}

static void ioapic_write(u64 base, u32 index, u32 value) {
  write32(base + IOAPIC_SELECT, index);
  write32(base + IOAPIC_WINDOW, value);
}

/* The IO-APIC that has an interrupt, and the interrupt's register in it; 0 when none has it. */
static u32 ioapic_pin(u32 gsi, u64 *base) {
  for (u32 i = 0; i < acpi.ioapic_count; i++) {
    u32 pin = gsi - acpi.ioapic[i].gsi;
    *base = acpi.ioapic[i].base;
    if (gsi >= acpi.ioapic[i].gsi && pin <= (ioapic_read(*base, IOAPIC_VERSION) >> 16 & 0xff))
      return IOAPIC_REDIRECTION + pin * 2;
  }
  return 0;
}

bool ioapic_route(u32 gsi, u32 vector, bool level, bool active_low) {
  u64 base;
  u32 pin = ioapic_pin(gsi, &base);
  if (!pin) return false;
  ioapic_write(base, pin + 1, lapic_id() << 24);
  ioapic_write(base, pin, vector | (level ? REDIRECT_LEVEL : 0) | (active_low ? REDIRECT_LOW : 0));
  return true;
}

void ioapic_mask(u32 gsi) {
  u64 base;
  u32 pin = ioapic_pin(gsi, &base);
  if (pin) ioapic_write(base, pin, REDIRECT_MASKED);
}

bool isa_route(u32 irq, u32 vector) {
  u32 flags = acpi.isa[irq].flags;
  return ioapic_route(acpi.isa[irq].gsi, vector, (flags >> 2 & 3) == MPS_TRIGGER_LEVEL,
                      (flags & 3) == MPS_POLARITY_LOW);
}

void isa_mask(u32 irq) { ioapic_mask(acpi.isa[irq].gsi); }
