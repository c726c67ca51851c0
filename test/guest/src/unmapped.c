/* Ports and memory that nobody answers (writes are ignored, reads give all ones), and string instructions on ports. */
#include "guest.h"

static bool verdict(const char *space, u64 at, u32 width, u64 value) {
  u64 ones = width == 8 ? ~0ul : (1ul << (8 * width)) - 1;
  say("unmapped %s %x width %u read %x %s", space, at, U(width), value, value == ones ? "ok" : "bad");
  return value == ones;
}

void unmapped_check(u64 port, u64 addr) {
  u16 p = (u16)port;
  bool ok = true;
  out8(p, 0);
  ok &= verdict("port", port, 1, in8(p));
  out16(p, 0);
  ok &= verdict("port", port, 2, in16(p));
  out32(p, 0);
  ok &= verdict("port", port, 4, in32(p));
  write8(addr, 0);
  ok &= verdict("mmio", addr, 1, read8(addr));
  write16(addr, 0);
  ok &= verdict("mmio", addr, 2, read16(addr));
  write32(addr, 0);
  ok &= verdict("mmio", addr, 4, read32(addr));
  write64(addr, 0);
  ok &= verdict("mmio", addr, 8, read64(addr));
  say("unmapped %s", ok ? "ok" : "bad");
}

#define STRING_BYTES 64

/* One instruction that makes many accesses: a hypervisor may hand them over several at a time. */
void string_io(u64 port) {
  static const char text[] = "troupe-guest: string-io The quick brown fox jumps over the lazy dog\r\n";
  static u8 bytes[STRING_BYTES];
  const char *from = text;
  u64 count = sizeof text - 1;
  asm volatile("rep outsb" : "+S"(from), "+c"(count) : "d"((u16)UART_DATA) : "memory");
  u8 *to = bytes;
  count = STRING_BYTES;
  asm volatile("rep insb" : "+D"(to), "+c"(count) : "d"((u16)port) : "memory");
  bool ok = true;
  for (u32 i = 0; i < STRING_BYTES; i++) ok &= bytes[i] == 0xff;
  say("string-io %u bytes %s", U(STRING_BYTES), ok ? "ok" : "bad");
}
