/* Ports and memory that nobody answers: writes are ignored, reads give all ones. */
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
