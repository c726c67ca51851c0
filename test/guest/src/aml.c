/* Finds in AML, without interpreting it, the few things this guest wants: \_S5_, serial ports and virtio-mmio devices. */
#include "guest.h"

/* How far behind a device's _HID its _CRS is looked for. */
#define CRS_REACH 256

#define AML_NAME_OP 0x08
#define AML_BYTE_PREFIX 0x0a
#define AML_WORD_PREFIX 0x0b
#define AML_DWORD_PREFIX 0x0c
#define AML_STRING_PREFIX 0x0d
#define AML_BUFFER_OP 0x11
#define AML_PACKAGE_OP 0x12

struct resources {
  u64 base, size;
  bool has_irq, level, active_low;
  u32 irq;
};

/* Behind PkgLength: its first byte's top two bits count the bytes that follow it. */
static const u8 *skip_length(const u8 *at) { return at + 1 + (*at >> 6); }

/* An integer constant; `*at` is left behind it. */
static u64 take_integer(const u8 **at) {
  const u8 *p = *at;
  u32 bytes = 0;
  switch (*p++) {
    case 0x00:
      *at = p;
      return 0;
    case 0x01:
      *at = p;
      return 1;
    case AML_BYTE_PREFIX:
      bytes = 1;
      break;
    case AML_WORD_PREFIX:
      bytes = 2;
      break;
    case AML_DWORD_PREFIX:
      bytes = 4;
      break;
  }
  u64 value = 0;
  for (u32 i = 0; i < bytes; i++) value |= U(p[i]) << (8 * i);
  *at = p + bytes;
  return value;
}

/* Resource descriptors (ACPI 6.5, section 6.4): the first of each kind counts. */
static void read_resources(const u8 *at, const u8 *end, struct resources *found) {
  while (at < end) {
    u8 tag = *at;
    u32 length = tag & 0x80 ? at[1] | (u32)at[2] << 8 : tag & 7;
    const u8 *body = at + (tag & 0x80 ? 3 : 1);
    if (body + length > end || tag == 0x79) return;
    if (tag == 0x86 && !found->size) { /* 32-bit fixed memory */
      found->base = read32((u64)body + 1);
      found->size = read32((u64)body + 5);
    } else if (tag == 0x8a && !found->size) { /* QWord address space */
      found->base = read64((u64)body + 11);
      found->size = read64((u64)body + 35);
    } else if ((tag & 0xf8) == 0x40 && !found->size) { /* I/O ports */
      found->base = read16((u64)body + 1);
      found->size = body[6];
    } else if (tag == 0x89 && !found->has_irq) { /* extended interrupt */
      found->has_irq = true;
      found->level = !(body[0] & 2);
      found->active_low = body[0] & 4;
      found->irq = read32((u64)body + 2);
    } else if ((tag & 0xf8) == 0x20 && !found->has_irq) { /* IRQ by mask */
      u16 mask = read16((u64)body);
      found->has_irq = mask != 0;
      while (mask && !(mask & 1)) mask >>= 1, found->irq++;
    }
    at = body + length;
  }
}

/* The _CRS that follows a device's _HID: Name (_CRS, Buffer (size) {bytes}). */
static bool find_resources(const u8 *at, const u8 *end, struct resources *found) {
  if (end - at > CRS_REACH) end = at + CRS_REACH;
  for (at++; at + 12 < end; at++) {
    if (!memcmp(at, "_HID", 4)) return false; /* the next device already */
    if (at[0] != AML_NAME_OP || memcmp(at + 1, "_CRS", 4) || at[5] != AML_BUFFER_OP) continue;
    const u8 *bytes = skip_length(at + 6);
    u64 size = take_integer(&bytes);
    read_resources(bytes, bytes + size, found);
    return true;
  }
  return false;
}

static void found_serial(const u8 *at, const u8 *end, bool report) {
  struct resources found = {0};
  if (find_resources(at, end, &found) && report) say("acpi serial %x irq %u", found.base, U(found.irq));
}

static void found_virtio(const u8 *at, const u8 *end, bool report) {
  struct resources found = {0};
  if (!find_resources(at, end, &found) || acpi.virtio_count == MAX_VIRTIO) return;
  acpi.virtio[acpi.virtio_count++] =
      (struct virtio_place){found.base, found.size, found.irq, found.level, found.active_low};
  if (report)
    say("acpi virtio-mmio %x %u bytes irq %u %s", found.base, found.size, U(found.irq), found.level ? "level" : "edge");
}

/* Name (\_S5, Package (n) {SLP_TYPa, ..}) */
static void found_s5(const u8 *at, bool report) {
  if (*at != AML_PACKAGE_OP || acpi.has_s5) return;
  at = skip_length(at + 1) + 1;
  acpi.has_s5 = true;
  acpi.s5 = (u8)take_integer(&at);
  if (report) say("acpi s5 %u", U(acpi.s5));
}

/* Name (_HID, EisaId ("PNP0501")): the integer 0x0105D041. */
static const u8 serial_hid[] = {AML_DWORD_PREFIX, 0x41, 0xd0, 0x05, 0x01};
/* Name (_HID, "LNRO0005") */
static const u8 virtio_hid[] = {AML_STRING_PREFIX, 'L', 'N', 'R', 'O', '0', '0', '0', '5', 0};

/* Looks only where a name's last characters end, for an emulated processor takes its time over every byte. */
void aml_scan(const u8 *aml, u64 size, bool report) {
  const u8 *end = aml + size;
  for (const u8 *at = aml; at + 8 <= end; at++) {
    if (at[0] != '_') continue;
    if (!memcmp(at, "_S5_", 4))
      found_s5(at + 4, report);
    else if (!memcmp(at, "_HID", 4)) {
      if (!memcmp(at + 4, serial_hid, sizeof serial_hid)) found_serial(at + 4, end, report);
      if (!memcmp(at + 4, virtio_hid, sizeof virtio_hid)) found_virtio(at + 4, end, report);
    }
  }
}
