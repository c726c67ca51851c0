/* Loops of one kind of access each, for measuring what it costs. */
#include "guest.h"

enum { EMPTY, POSTED, SHADOW, CALL, REGPAGE, DOORBELL, KINDS };
static const char names[KINDS][12] = {"empty", "posted", "shadow", "call", "regpage", "doorbell"};

#define QUEUE_NOTIFY 0x50
#define NO_DEVICE_ADDR 0xd0000000
#define HOLE_PORT 0x5f00

/* "KIND,N" */
bool bench_parse(struct bench *bench, const char *text) {
  for (u32 kind = 0; kind < KINDS; kind++) {
    const char *rest = after_prefix(text, names[kind]);
    if (!rest || *rest != ',') continue;
    rest++;
    bench->kind = kind;
    bench->count = take_number(&rest);
    return *rest == 0 && bench->count > 0;
  }
  return false;
}

/* Nothing but the access and the count is in a loop: on a KVM that emulates kernel mode each instruction costs. */
#define LOOP(access, ...) asm volatile("1:\t" access "\n\tdec %0\n\tjnz 1b" : "+&r"(n) : __VA_ARGS__ : "memory", "cc")

static void measure(void *argument) {
  struct bench *bench = argument;
  u64 n = bench->count, addr = bench->addr;
  u32 value = bench->value;
  u16 port = (u16)bench->port;
  mark(MARK_BENCH_BEGIN);
  u64 begin = read_tsc();
  switch (bench->kind) {
    case EMPTY:
      LOOP("", "r"(value));
      break;
    case POSTED:
      LOOP("outb %%al, %%dx", "a"(value), "d"(port));
      break;
    case CALL:
      if (bench->has_addr) goto memory;
      /* fall through */
    case SHADOW:
      asm volatile("1:\tinb %%dx, %%al\n\tdec %0\n\tjnz 1b" : "+&r"(n) : "d"(port) : "rax", "memory", "cc");
      break;
    case REGPAGE:
    memory:
      asm volatile("1:\tmovl (%1), %%eax\n\tdec %0\n\tjnz 1b" : "+&r"(n) : "r"(addr) : "rax", "memory", "cc");
      break;
    case DOORBELL:
      LOOP("movl %1, (%2)", "r"(value), "r"(addr));
      break;
  }
  bench->tsc = read_tsc() - begin;
  mark(MARK_BENCH_END);
}

void bench_run(struct bench *bench, bool user) {
  static const u16 ports[KINDS] = {0, UART_DATA, UART_LSR, HOLE_PORT, 0, 0};
  if (!bench->has_port) bench->port = ports[bench->kind];
  if (!bench->has_addr) {
    bench->addr = acpi.virtio_count ? acpi.virtio[0].base : NO_DEVICE_ADDR;
    if (bench->kind == DOORBELL) bench->addr += QUEUE_NOTIFY;
  }
  if (user)
    user_call(measure, bench);
  else
    measure(bench);
  if (bench->kind == POSTED && bench->port == UART_DATA) print("\r\n");
  say("bench %s n=%u tsc=%u cpl=%u", names[bench->kind], bench->count, bench->tsc, U(user ? 3 : 0));
}

static void read_cs(void *argument) {
  u64 cs;
  asm volatile("mov %%cs, %0" : "=r"(cs));
  *(u64 *)argument = cs & 3;
}

void user_mode(void) {
  u64 cpl = 9;
  user_call(read_cs, &cpl);
  say("user-mode cpl %u returned", cpl);
}
