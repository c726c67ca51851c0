/* The few string functions that the guest and the compiler itself need. */
#include "guest.h"

void *memcpy(void *to, const void *from, u64 size) {
  u8 *d = to;
  const u8 *s = from;
  while (size--) *d++ = *s++;
  return to;
}

void *memset(void *to, int value, u64 size) {
  u8 *d = to;
  while (size--) *d++ = (u8)value;
  return to;
}

int memcmp(const void *a, const void *b, u64 size) {
  const u8 *x = a, *y = b;
  for (; size--; x++, y++)
    if (*x != *y) return *x - *y;
  return 0;
}

bool str_equal(const char *a, const char *b) {
  while (*a && *a == *b) a++, b++;
  return *a == *b;
}

const char *after_prefix(const char *text, const char *prefix) {
  while (*prefix)
    if (*text++ != *prefix++) return NULL;
  return text;
}

u64 take_number(const char **text) {
  const char *at = *text;
  u64 value = 0;
  if (at[0] == '0' && (at[1] | 0x20) == 'x') {
    for (at += 2;; at++) {
      u8 c = (u8)*at | 0x20;
      if (*at >= '0' && *at <= '9')
        value = value * 16 + (u64)(*at - '0');
      else if (c >= 'a' && c <= 'f')
        value = value * 16 + (u64)(c - 'a' + 10);
      else
        break;
    }
  } else {
    for (; *at >= '0' && *at <= '9'; at++) value = value * 10 + (u64)(*at - '0');
  }
  *text = at;
  return value;
}
