/* Waiting, halted, with a limit; and the timer actions. */
#include "guest.h"

#define TICKS 10
#define TICK_MS 10
#define LIMIT_MS 30000
#define LATE_MS 3
#define LATE_SPINS 10000

#define PIT_CHANNEL0 0x40
#define PIT_COMMAND 0x43
#define PIT_RATE_GENERATOR 0x34
#define PIT_HZ 1193182

static u32 ticks_before;

void wait_begin(u32 ms) {
  ticks_before = interrupt_count[VECTOR_TIMER];
  lapic_timer(ms, false);
}

/* A tick that came too late for the wait it belonged to must not end this one, whose timer still runs then. It cannot be taken
 * before: a KVM that emulates kernel mode may keep it until the processor halts. */
bool wait_over(void) { return interrupt_count[VECTOR_TIMER] != ticks_before && lapic_timer_left_ns() == 0; }
void wait_end(void) { lapic_timer(0, false); }
u64 wait_left_ns(void) { return lapic_timer_left_ns(); }

bool wait_for(const volatile u32 *value, u32 wanted, u32 ms) {
  wait_begin(ms);
  while ((i64)*value - (i64)wanted < 0 && !wait_over()) sleep_until_interrupt();
  wait_end();
  return (i64)*value - (i64)wanted >= 0;
}

/* The periodic timer is what is being tested: it is also what wakes the loop, so there is no other limit here than the
 * host's patience. */
void timer_ticks(void) {
  u32 first = interrupt_count[VECTOR_TIMER];
  lapic_timer(TICK_MS, true);
  while (interrupt_count[VECTOR_TIMER] - first < TICKS) sleep_until_interrupt();
  lapic_timer(0, false);
  say("timer %u ticks", U(TICKS));
}

/* Ticks that come when their wait is over: the next wait lasts all the same. */
void timer_late(void) {
  u32 cut = 0;
  for (u32 i = 0; i < TICKS; i++) {
    lapic_timer(1, false);
    while (lapic_timer_left_ns()) pause_cpu();
    for (u32 spins = 0; spins < LATE_SPINS; spins++) pause_cpu(); /* until it is pending in the local APIC */
    wait_begin(LATE_MS);
    while (!wait_over()) sleep_until_interrupt();
    if (lapic_timer_left_ns()) cut++;
    wait_end();
  }
  say("timer %u late ticks cut %u waits", U(TICKS), U(cut));
}

void pit_ticks(void) {
  u32 divisor = PIT_HZ * TICK_MS / 1000, first = interrupt_count[VECTOR_PIT];
  if (!isa_route(0, VECTOR_PIT)) {
    say("pit failed after 0 ticks");
    return;
  }
  out8(PIT_COMMAND, PIT_RATE_GENERATOR);
  out8(PIT_CHANNEL0, (u8)divisor);
  out8(PIT_CHANNEL0, (u8)(divisor >> 8));
  bool done = wait_for(&interrupt_count[VECTOR_PIT], first + TICKS, LIMIT_MS);
  isa_mask(0);
  out8(PIT_COMMAND, 0x30); /* mode 0 without a count: quiet again */
  if (done)
    say("pit %u ticks", U(TICKS));
  else
    say("pit failed after %u ticks", U(interrupt_count[VECTOR_PIT] - first));
}
