/* The 16550 at 0x3f8, polled: every line the guest prints goes out here. */
#include "guest.h"

/* A port that never becomes ready must not stop the guest. */
#define READY_TRIES 100000

void serial_init(void) {
  out8(UART_IER, 0);
  out8(UART_LCR, 0x80); /* DLAB: the divisor latch */
  out8(UART_DATA, 1);   /* 115200 baud */
  out8(UART_IER, 0);
  out8(UART_LCR, 0x03); /* 8 bits, no parity, 1 stop bit */
  out8(UART_IIR, 0x07); /* FIFOs on and empty, an interrupt for each byte received */
  out8(UART_MCR, 0x0b); /* DTR, RTS, OUT2: interrupts reach the line */
}

void serial_put(char c) {
  for (u32 tries = 0; tries < READY_TRIES && !(in8(UART_LSR) & LSR_TRANSMIT_EMPTY); tries++) pause_cpu();
  out8(UART_DATA, (u8)c);
}
