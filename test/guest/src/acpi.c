/* ACPI's static tables: RSDP, XSDT, FADT, MADT; the DSDT's bytes go to aml.c. */
#include "guest.h"

struct acpi acpi;

struct __attribute__((packed)) rsdp {
  char signature[8];
  u8 checksum;
  char oem[6];
  u8 revision;
  u32 rsdt;
  u32 length;
  u64 xsdt;
  u8 extended_checksum, reserved[3];
};

struct __attribute__((packed)) table {
  char signature[4];
  u32 length;
  u8 revision, checksum;
  char oem[6], oem_table[8];
  u32 oem_revision;
  char creator[4];
  u32 creator_revision;
};

/* Offsets in the FADT (ACPI 6.5, section 5.2.9). */
#define FADT_DSDT 40
#define FADT_FLAGS 112
#define FADT_RESET_REG 116
#define FADT_RESET_VALUE 128
#define FADT_X_DSDT 140
#define FADT_SLEEP_CONTROL 244
#define FADT_SLEEP_STATUS 256
#define FADT_RESET_REG_SUP (1u << 10)
#define FADT_HW_REDUCED (1u << 20)

/* MADT entries (section 5.2.12). */
#define MCFG_ENTRIES 44
#define MADT_ENTRIES 44
#define MADT_LAPIC 0
#define MADT_IOAPIC 1
#define MADT_OVERRIDE 2
#define MADT_LAPIC_ADDRESS 5
#define MADT_X2APIC 9
#define CPU_ENABLED 1

static bool sums_to_zero(const u8 *bytes, u64 size) {
  u8 sum = 0;
  while (size--) sum = (u8)(sum + *bytes++);
  return sum == 0;
}

/* Generic address structure: space, bit width, bit offset, access size, 64-bit address. */
static struct reg read_reg(u64 at) {
  struct reg reg = {false, false, read64(at + 4)};
  u8 space = read8(at);
  reg.present = reg.address != 0 && space <= 1;
  reg.in_ports = space == 1;
  return reg;
}

static const char *reg_space(const struct reg *reg) { return reg->in_ports ? "io" : "mmio"; }

void reg_write(const struct reg *reg, u8 value) {
  if (reg->in_ports)
    out8((u16)reg->address, value);
  else
    write8(reg->address, value);
}

static u64 scan_rsdp(void) {
  for (u64 at = 0xe0000; at < 0x100000; at += 16)
    if (!memcmp((const void *)at, "RSD PTR ", 8) && sums_to_zero((const u8 *)at, 20)) return at;
  return 0;
}

static void say_table(const struct table *table, bool report) {
  if (!report) return;
  const char *name = table->signature;
  say("acpi table %c%c%c%c %x %u bytes checksum %s", U(name[0]), U(name[1]), U(name[2]), U(name[3]), (u64)table,
      U(table->length), sums_to_zero((const u8 *)table, table->length) ? "ok" : "bad");
}

static void read_fadt(const struct table *fadt, bool report) {
  u64 at = (u64)fadt;
  u32 flags = read32(at + FADT_FLAGS);
  if (fadt->length >= FADT_SLEEP_STATUS + 12) {
    acpi.sleep_control = read_reg(at + FADT_SLEEP_CONTROL);
    acpi.sleep_status = read_reg(at + FADT_SLEEP_STATUS);
  }
  if (flags & FADT_RESET_REG_SUP) {
    acpi.reset = read_reg(at + FADT_RESET_REG);
    acpi.reset_value = read8(at + FADT_RESET_VALUE);
  }
  if (!report) return;
  say("acpi hw-reduced %s", flags & FADT_HW_REDUCED ? "yes" : "no");
  if (acpi.sleep_control.present)
    say("acpi sleep-control %s %x", reg_space(&acpi.sleep_control), acpi.sleep_control.address);
  if (acpi.sleep_status.present)
    say("acpi sleep-status %s %x", reg_space(&acpi.sleep_status), acpi.sleep_status.address);
  if (acpi.reset.present)
    say("acpi reset %s %x value %x", reg_space(&acpi.reset), acpi.reset.address, U(acpi.reset_value));
}

static void add_cpu(u32 apic, u32 flags) {
  if ((flags & CPU_ENABLED) && acpi.cpu_count < MAX_CPUS) acpi.cpu_apic[acpi.cpu_count++] = apic;
}

static void read_madt(const struct table *madt, bool report) {
  u64 at = (u64)madt, end = at + madt->length;
  acpi.lapic = read32(at + 36);
  acpi.cpu_count = 0;
  for (at += MADT_ENTRIES; at + 2 <= end && read8(at + 1) >= 2; at += read8(at + 1)) {
    switch (read8(at)) {
      case MADT_LAPIC:
        add_cpu(read8(at + 3), read32(at + 4));
        break;
      case MADT_X2APIC:
        add_cpu(read32(at + 4), read32(at + 8));
        break;
      case MADT_LAPIC_ADDRESS:
        acpi.lapic = read64(at + 4);
        break;
      case MADT_IOAPIC:
        if (report)
          say("acpi ioapic %x id %u gsi %u", U(read32(at + 4)), U(read8(at + 2)), U(read32(at + 8)));
        if (acpi.ioapic_count < MAX_IOAPICS) {
          acpi.ioapic[acpi.ioapic_count].base = read32(at + 4);
          acpi.ioapic[acpi.ioapic_count++].gsi = read32(at + 8);
        }
        break;
      case MADT_OVERRIDE: {
        u8 irq = read8(at + 3);
        if (report)
          say("acpi override irq %u gsi %u flags %x", U(irq), U(read32(at + 4)), U(read16(at + 8)));
        if (irq < 16) {
          acpi.isa[irq].gsi = read32(at + 4);
          acpi.isa[irq].flags = read16(at + 8);
        }
        break;
      }
    }
  }
}

/* The first entry that has bus 0 (PCI Firmware Specification 3.3, section 4.1.2). */
static void read_mcfg(const struct table *mcfg, bool report) {
  for (u64 at = (u64)mcfg + MCFG_ENTRIES; at + 16 <= (u64)mcfg + mcfg->length && !acpi.ecam; at += 16) {
    if (read8(at + 10) != 0) continue;
    acpi.ecam = read64(at);
    if (report) say("acpi ecam %x buses 0-%u", acpi.ecam, U(read8(at + 11)));
  }
}

static bool is(const struct table *table, const char *name) { return !memcmp(table->signature, name, 4); }

/* The tables' bytes are read where they lie: this guest trusts its host, it is there to exercise it. */
void acpi_read(bool report) {
  acpi.lapic = 0xfee00000;
  acpi.cpu_count = 1;
  acpi.cpu_apic[0] = lapic_id();
  for (u32 irq = 0; irq < 16; irq++) acpi.isa[irq].gsi = irq;
  u64 at = boot.rsdp;
  if (!at) {
    at = scan_rsdp();
    boot.rsdp_from = "scan";
  }
  const struct rsdp *rsdp = (const void *)at;
  if (!at || memcmp(rsdp->signature, "RSD PTR ", 8)) {
    if (report) say("acpi none");
    return;
  }
  acpi.found = true;
  if (report) say("acpi rsdp %x revision %u from %s", at, U(rsdp->revision), boot.rsdp_from);
  bool wide = rsdp->revision >= 2 && rsdp->xsdt;
  const struct table *root = (const void *)(wide ? rsdp->xsdt : U(rsdp->rsdt));
  say_table(root, report);
  u32 entry = wide ? 8 : 4;
  u64 dsdt = 0;
  for (u64 offset = sizeof(struct table); offset + entry <= root->length; offset += entry) {
    u64 place = (u64)root + offset;
    const struct table *table = (const void *)(wide ? read64(place) : U(read32(place)));
    say_table(table, report);
    if (is(table, "FACP")) {
      read_fadt(table, report);
      if (table->length >= FADT_X_DSDT + 8) dsdt = read64((u64)table + FADT_X_DSDT);
      if (!dsdt) dsdt = read32((u64)table + FADT_DSDT);
    } else if (is(table, "APIC"))
      read_madt(table, report);
    else if (is(table, "MCFG"))
      read_mcfg(table, report);
    else if (is(table, "SSDT"))
      aml_scan((const u8 *)table + sizeof *table, table->length - sizeof *table, report);
  }
  if (dsdt) {
    const struct table *table = (const void *)dsdt;
    say_table(table, report);
    aml_scan((const u8 *)table + sizeof *table, table->length - sizeof *table, report);
  }
}
