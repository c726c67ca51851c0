/* The serial port by interrupts: a line sent by transmit interrupts, lines received and echoed. */
#include "guest.h"

#define SERIAL_IRQ 4
#define TRANSMIT_MS 30000
#define LINE_MAX 1024
#define RING 256 /* a power of two: indices are free-running u8 */

static const char *volatile sending;

static void on_transmit(void) {
  in8(UART_IIR); /* reading it takes the transmit interrupt back */
  if (*sending && (in8(UART_LSR) & LSR_TRANSMIT_EMPTY)) out8(UART_DATA, (u8)*sending++);
  if (!*sending) out8(UART_IER, 0);
}

void console_transmit(void) {
  static const char text[] = "troupe-guest: serial-tx The quick brown fox jumps over the lazy dog\r\n";
  u32 first = interrupt_count[VECTOR_SERIAL], length = sizeof text - 1;
  interrupt_handler(VECTOR_SERIAL, on_transmit);
  sending = text;
  bool sent = false;
  if (isa_route(SERIAL_IRQ, VECTOR_SERIAL)) {
    out8(UART_IER, IER_TRANSMIT);
    sent = wait_for(&interrupt_count[VECTOR_SERIAL], first + length, TRANSMIT_MS);
    out8(UART_IER, 0);
    isa_mask(SERIAL_IRQ);
  }
  if (sent)
    say("serial-tx %u interrupts", U(interrupt_count[VECTOR_SERIAL] - first));
  else
    say("serial-tx failed");
}

static volatile u8 ring[RING];
static volatile u8 ring_in, ring_out;

/* Edge-triggered: everything there is must be taken, or no further interrupt comes. */
static void on_receive(void) {
  in8(UART_IIR);
  while (in8(UART_LSR) & LSR_DATA_READY) {
    u8 byte = in8(UART_DATA);
    if ((u8)(ring_in + 1) != ring_out) ring[ring_in++] = byte;
  }
}

static char take_byte(bool by_interrupt) {
  if (!by_interrupt) {
    while (!(in8(UART_LSR) & LSR_DATA_READY)) pause_cpu();
    return (char)in8(UART_DATA);
  }
  while (ring_in == ring_out) sleep_until_interrupt();
  return (char)ring[ring_out++];
}

void console_echo(bool by_interrupt) {
  static char line[LINE_MAX];
  if (by_interrupt) {
    ring_in = ring_out = 0;
    interrupt_handler(VECTOR_SERIAL, on_receive);
    isa_route(SERIAL_IRQ, VECTOR_SERIAL);
    out8(UART_IER, IER_RECEIVE);
  }
  say("echo ready");
  u32 length = 0;
  for (;;) {
    char c = take_byte(by_interrupt);
    if (c != '\n' && c != '\r') {
      if (length < LINE_MAX - 1) line[length++] = c;
      continue;
    }
    if (!length) continue; /* the second half of CR LF */
    line[length] = 0;
    length = 0;
    say("echo %s", line);
    if (str_equal(line, "quit")) break;
  }
  out8(UART_IER, 0);
  if (by_interrupt) isa_mask(SERIAL_IRQ);
}
