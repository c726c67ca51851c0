/* Text for the serial port. */
#include "guest.h"

static void put_text(const char *text) {
  while (*text) serial_put(*text++);
}

static void put_hex(u64 value, u32 digits) {
  while (digits--) serial_put("0123456789abcdef"[(value >> (digits * 4)) & 15]);
}

static void put_decimal(u64 value) {
  char text[20];
  u32 length = 0;
  do {
    text[length++] = (char)('0' + value % 10);
    value /= 10;
  } while (value);
  while (length) serial_put(text[--length]);
}

static u32 hex_digits(u64 value) {
  u32 digits = 1;
  while (value >>= 4) digits++;
  return digits;
}

static void format(const char *at, __builtin_va_list arguments) {
  for (; *at; at++) {
    if (*at != '%') {
      serial_put(*at);
      continue;
    }
    at++;
    if (*at == 's')
      put_text(__builtin_va_arg(arguments, const char *));
    else {
      u64 value = __builtin_va_arg(arguments, u64);
      if (*at == 'c')
        serial_put((char)value);
      else if (*at == 'u')
        put_decimal(value);
      else if (*at == 'b')
        put_hex(value, 2);
      else {
        put_text("0x");
        put_hex(value, *at == 'p' ? 16 : hex_digits(value));
      }
    }
  }
}

void print(const char *text, ...) {
  __builtin_va_list arguments;
  __builtin_va_start(arguments, text);
  format(text, arguments);
  __builtin_va_end(arguments);
}

void say(const char *text, ...) {
  __builtin_va_list arguments;
  __builtin_va_start(arguments, text);
  put_text("troupe-guest: ");
  format(text, arguments);
  put_text("\r\n");
  __builtin_va_end(arguments);
}
