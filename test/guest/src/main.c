/* The guest's course: report what is there, then do what the command line's words say. */
#include "guest.h"

#define DEFAULT_HOLE_PORT 0x5f00
#define DEFAULT_HOLE_ADDR 0xd00f0000ul

struct state {
  bool quiet, user;
  struct bench bench;
  u64 hole_port, hole_addr;
};

void main(void);

void cpuid_report(void) {
  union {
    u32 words[4];
    char text[16];
  } name = {0};
  u32 a, b, c, d;
  cpuid(0, &a, &name.words[0], &name.words[2], &name.words[1]);
  say("cpuid vendor %s", name.text);
  cpuid(1, &a, &b, &c, &d);
  if (c >> 31) {
    name.text[12] = 0;
    cpuid(0x40000000, &a, &name.words[0], &name.words[1], &name.words[2]);
    say("cpuid hypervisor %s", name.text);
  } else
    say("cpuid hypervisor none");
}

/* The drivers' words: each driver takes its own. */
static bool driver(const char *word) {
  heap_reset();
  return hostile(word) || virtio_balloon(word) || virtio_blk(word) || virtio_console(word) || virtio_mem(word) ||
         virtio_net(word) || virtio_rng(word) || virtio_vsock(word);
}

static bool modifier(struct state *state, const char *word) {
  const char *value;
  if (str_equal(word, "quiet"))
    return true;
  else if (str_equal(word, "packed"))
    virtio_packed = true;
  else if (str_equal(word, "split"))
    virtio_packed = false;
  else if (str_equal(word, "user"))
    state->user = true;
  else if (str_equal(word, "kernel"))
    state->user = false;
  else if ((value = after_prefix(word, "port="))) {
    state->bench.port = take_number(&value);
    state->bench.has_port = true;
  } else if ((value = after_prefix(word, "addr="))) {
    state->bench.addr = take_number(&value);
    state->bench.has_addr = true;
  } else if ((value = after_prefix(word, "value=")))
    state->bench.value = (u32)take_number(&value);
  else if ((value = after_prefix(word, "hole=")))
    state->hole_port = take_number(&value);
  else if ((value = after_prefix(word, "mmiohole=")))
    state->hole_addr = take_number(&value);
  else
    return false;
  return true;
}

static bool ending(struct state *state, const char *word) {
  if (str_equal(word, "poweroff")) {
    power_off();
    say("halt");
    halt_forever();
  } else if (str_equal(word, "reset=acpi"))
    power_reset_acpi();
  else if (str_equal(word, "reset=kbd"))
    power_reset_keyboard();
  else if (str_equal(word, "triplefault"))
    power_triple_fault();
  else if (str_equal(word, "halt")) {
    say("halt");
    halt_forever();
  } else if (str_equal(word, "hang"))
    power_hang();
  else if (str_equal(word, "idle"))
    power_idle();
  else if (str_equal(word, "internal-error"))
    power_internal_error(state->hole_addr);
  else if (str_equal(word, "panic-line"))
    power_panic();
  else
    return false;
  return true;
}

static bool doing(struct state *state, const char *word) {
  const char *value;
  if (str_equal(word, "first"))
    return true;
  else if ((value = after_prefix(word, "say=")))
    say("say %s", value);
  else if (str_equal(word, "smp"))
    smp_start();
  else if (str_equal(word, "timer"))
    timer_ticks();
  else if (str_equal(word, "timer=late"))
    timer_late();
  else if (str_equal(word, "pit"))
    pit_ticks();
  else if (str_equal(word, "serial-tx"))
    console_transmit();
  else if (str_equal(word, "echo"))
    console_echo(true);
  else if (str_equal(word, "echo=poll"))
    console_echo(false);
  else if (str_equal(word, "virtio"))
    virtio_list();
  else if (str_equal(word, "unmapped"))
    unmapped_check(state->hole_port, state->hole_addr);
  else if (str_equal(word, "string-io"))
    string_io(state->hole_port);
  else if (str_equal(word, "fill"))
    memory_fill(state->user);
  else if (str_equal(word, "initrd"))
    initrd_sum();
  else if (str_equal(word, "cpuid"))
    cpuid_report();
  else if (str_equal(word, "user-mode"))
    user_mode();
  else if ((value = after_prefix(word, "wait="))) {
    u32 ms = (u32)take_number(&value);
    wait_for(&interrupt_count[VECTOR_SPURIOUS], ~0u, ms);
    say("wait %u", U(ms));
  } else if ((value = after_prefix(word, "bench="))) {
    struct bench bench = state->bench;
    if (!bench_parse(&bench, value)) return false;
    bench_run(&bench, state->user);
  } else
    return driver(word);
  return true;
}

/* The next word of `*text`, ended with a zero in place; NULL at the end. */
static char *next_word(char **text) {
  char *at = *text;
  while (*at == ' ' || *at == '\t' || *at == '\n') at++;
  if (!*at) return NULL;
  char *word = at;
  while (*at && *at != ' ' && *at != '\t' && *at != '\n') at++;
  if (*at) *at++ = 0;
  *text = at;
  return word;
}

static bool has_word(const char *text, const char *word) {
  for (const char *at = text; *at; at++) {
    const char *rest = after_prefix(at, word);
    if ((at == text || at[-1] == ' ') && rest && (*rest == 0 || *rest == ' ')) return true;
  }
  return false;
}

/* From entry.S, on the first processor. */
void main(void) {
  mark(MARK_C);
  struct state state = {.hole_port = DEFAULT_HOLE_PORT, .hole_addr = DEFAULT_HOLE_ADDR};
  serial_init();
  interrupts_init();
  out8(0x21, 0xff); /* the 8259s, where there are any: everything comes through the APICs */
  out8(0xa1, 0xff);
  lapic_init();
  boot_read();
  state.quiet = has_word(boot.cmdline, "quiet");
  if (!state.quiet) boot_report();
  acpi_read(!state.quiet);
  if (!state.quiet) {
    say("cpus %u", U(acpi.cpu_count));
    say("ready");
  }
  mark(MARK_READY);
  char *text = boot.cmdline, *word;
  while ((word = next_word(&text)))
    if (!modifier(&state, word) && !ending(&state, word) && !doing(&state, word) && !state.quiet) say("skipped %s", word);
  ending(&state, "poweroff");
}
