/*
 * A program for Linux guests that uses vsock connections in every way that a test wants. It needs no library: it is small, static, and
 * runs in an initramfs that has nothing else.
 *
 *   vsock send CID PORT BYTES    sends the pattern, ends sending, prints what the host answers
 *   vsock take CID PORT          ends sending, takes the pattern until the host ends, says how much it was and whether it was right
 *   vsock short CID PORT COUNT   makes connections one after the other, each of a few bytes both ways
 *   vsock hold CID PORT          sends until it is killed
 *   vsock echo PORT COUNT        accepts connections one after the other, and sends back what comes
 *   vsock messages CID PORT      sends messages of 1, 10, .. bytes on a seqpacket connection, and expects each back
 */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;
typedef long i64;

#define SYS_READ 0
#define SYS_WRITE 1
#define SYS_CLOSE 3
#define SYS_SOCKET 41
#define SYS_CONNECT 42
#define SYS_ACCEPT 43
#define SYS_SHUTDOWN 48
#define SYS_BIND 49
#define SYS_LISTEN 50
#define SYS_SETSOCKOPT 54
#define SYS_EXIT 60

#define AF_VSOCK 40
#define SOCK_STREAM 1
#define SOCK_SEQPACKET 5
#define SHUT_WR 1
#define CID_ANY 0xffffffffu
/* struct timeval: how long connect waits. Two seconds unless said otherwise, which a busy host may need for an answer. */
#define SO_VM_SOCKETS_CONNECT_TIMEOUT 6
#define CONNECT_SECONDS 600

/* The pattern repeats after this. */
#define PERIOD 0x10000u
#define TEN "0123456789"

struct sockaddr_vm {
  u16 family, reserved;
  u32 port, cid;
  u8 flags, zero[3];
};

static i64 call(i64 number, i64 a, i64 b, i64 c) {
  i64 result;
  asm volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
  return result;
}

static i64 call5(i64 number, i64 a, i64 b, i64 c, i64 d, i64 e) {
  i64 result;
  register i64 r10 asm("r10") = d;
  register i64 r8 asm("r8") = e;
  asm volatile("syscall"
               : "=a"(result)
               : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8)
               : "rcx", "r11", "memory");
  return result;
}

static u8 pattern[2 * PERIOD], buffer[PERIOD];

void *memset(void *to, int value, u64 size) {
  for (u8 *at = to; size--;) *at++ = (u8)value;
  return to;
}

static u64 length(const char *text) {
  u64 size = 0;
  while (text[size]) size++;
  return size;
}

static void print(const char *text) { call(SYS_WRITE, 1, (i64)text, (i64)length(text)); }

static void print_number(u64 value) {
  char text[24], *at = text + sizeof text;
  *--at = 0;
  do *--at = (char)('0' + value % 10);
  while (value /= 10);
  print(at);
}

static void die(const char *what, i64 error) {
  print("vsock: ");
  print(what);
  print(" failed with ");
  print_number((u64)-error);
  print("\n");
  call(SYS_EXIT, 1, 0, 0);
}

static u64 number(const char *text) {
  u64 value = 0;
  while (*text >= '0' && *text <= '9') value = value * 10 + (u64)(*text++ - '0');
  return value;
}

static i64 connect(u32 type, u32 cid, u32 port) {
  struct sockaddr_vm address = {.family = AF_VSOCK, .port = port, .cid = cid};
  i64 fd = call(SYS_SOCKET, AF_VSOCK, type, 0);
  if (fd < 0) die("socket", fd);
  i64 patience[2] = {CONNECT_SECONDS, 0};
  i64 error = call5(SYS_SETSOCKOPT, fd, AF_VSOCK, SO_VM_SOCKETS_CONNECT_TIMEOUT, (i64)patience, sizeof patience);
  if (error < 0) die("setsockopt", error);
  error = call(SYS_CONNECT, fd, (i64)&address, sizeof address);
  if (error < 0) die("connect", error);
  return fd;
}

static void write_all(i64 fd, const u8 *bytes, u64 size) {
  while (size) {
    i64 done = call(SYS_WRITE, fd, (i64)bytes, (i64)size);
    if (done < 0) die("write", done);
    bytes += done;
    size -= (u64)done;
  }
}

/* Eight bytes at a time, wherever they begin. */
static int differs(const u8 *a, const u8 *b, u64 size) {
  typedef u64 __attribute__((aligned(1), may_alias)) word;
  u64 i = 0;
  for (; i + 8 <= size; i += 8)
    if (*(const word *)(a + i) != *(const word *)(b + i)) return 1;
  for (; i < size; i++)
    if (a[i] != b[i]) return 1;
  return 0;
}

/* Reads until the other side ends, and says what it was when that is text. */
static u64 read_all(i64 fd, int show, int *wrong) {
  u64 total = 0;
  for (;;) {
    i64 done = call(SYS_READ, fd, (i64)buffer, sizeof buffer);
    if (done < 0) die("read", done);
    if (!done) return total;
    if (show) call(SYS_WRITE, 1, (i64)buffer, done);
    if (wrong && differs(buffer, pattern + total % PERIOD, (u64)done)) *wrong = 1;
    total += (u64)done;
  }
}

static void send(u32 cid, u32 port, u64 bytes) {
  i64 fd = connect(SOCK_STREAM, cid, port);
  for (u64 sent = 0; sent < bytes;) {
    u64 size = bytes - sent < PERIOD ? bytes - sent : PERIOD;
    write_all(fd, pattern + sent % PERIOD, size);
    sent += size;
  }
  i64 error = call(SYS_SHUTDOWN, fd, SHUT_WR, 0);
  if (error < 0) die("shutdown", error);
  read_all(fd, 1, 0);
}

static void take(u32 cid, u32 port) {
  int wrong = 0;
  i64 fd = connect(SOCK_STREAM, cid, port);
  i64 error = call(SYS_SHUTDOWN, fd, SHUT_WR, 0);
  if (error < 0) die("shutdown", error);
  print("took ");
  print_number(read_all(fd, 0, &wrong));
  print(wrong ? " wrong\n" : " right\n");
}

static void make_short(u32 cid, u32 port, u64 count) {
  u64 done = 0;
  for (u64 i = 0; i < count; i++) {
    i64 fd = connect(SOCK_STREAM, cid, port);
    write_all(fd, (const u8 *)TEN, 10);
    i64 error = call(SYS_SHUTDOWN, fd, SHUT_WR, 0);
    if (error < 0) die("shutdown", error);
    if (read_all(fd, 0, 0) == 10) done++;
    call(SYS_CLOSE, fd, 0, 0);
  }
  print("made ");
  print_number(done);
  print("\n");
}

static void hold(u32 cid, u32 port) {
  i64 fd = connect(SOCK_STREAM, cid, port);
  for (;;) write_all(fd, pattern, PERIOD);
}

static void echo(u32 port, u64 count) {
  struct sockaddr_vm address = {.family = AF_VSOCK, .port = port, .cid = CID_ANY};
  i64 fd = call(SYS_SOCKET, AF_VSOCK, SOCK_STREAM, 0), error;
  if (fd < 0) die("socket", fd);
  if ((error = call(SYS_BIND, fd, (i64)&address, sizeof address)) < 0) die("bind", error);
  if ((error = call(SYS_LISTEN, fd, 16, 0)) < 0) die("listen", error);
  print("listening\n");
  u64 total = 0;
  for (u64 i = 0; i < count; i++) {
    i64 peer = call(SYS_ACCEPT, fd, 0, 0);
    if (peer < 0) die("accept", peer);
    for (;;) {
      i64 done = call(SYS_READ, peer, (i64)buffer, sizeof buffer);
      if (done < 0) die("read", done);
      if (!done) break;
      write_all(peer, buffer, (u64)done);
      total += (u64)done;
    }
    call(SYS_CLOSE, peer, 0, 0);
  }
  print("echoed ");
  print_number(total);
  print("\n");
}

static void messages(u32 cid, u32 port) {
  i64 fd = connect(SOCK_SEQPACKET, cid, port);
  u64 right = 0;
  for (u64 size = 1; size <= 10000; size *= 10) {
    i64 done = call(SYS_WRITE, fd, (i64)pattern, (i64)size);
    if (done < 0) die("write", done);
    done = call(SYS_READ, fd, (i64)buffer, sizeof buffer);
    if (done < 0) die("read", done);
    u64 same = 0;
    while (same < size && (i64)size == done && buffer[same] == pattern[same]) same++;
    if (same == size) right++;
  }
  print("messages ");
  print_number(right);
  print("\n");
}

static int is(const char *a, const char *b) {
  while (*a && *a == *b) a++, b++;
  return *a == *b;
}

__attribute__((used)) static void run(u64 *stack) {
  u64 count = stack[0];
  char **words = (char **)(stack + 1);
  u64 a = count > 2 ? number(words[2]) : 0, b = count > 3 ? number(words[3]) : 0, c = count > 4 ? number(words[4]) : 0;
  const char *what = count > 2 ? words[1] : "";
  for (u64 i = 0; i < sizeof pattern; i++) {
    u64 place = i % PERIOD;
    pattern[i] = (u8)(place * 7 + (place >> 8));
  }
  if (is(what, "send"))
    send((u32)a, (u32)b, c);
  else if (is(what, "take"))
    take((u32)a, (u32)b);
  else if (is(what, "short"))
    make_short((u32)a, (u32)b, c);
  else if (is(what, "hold"))
    hold((u32)a, (u32)b);
  else if (is(what, "echo"))
    echo((u32)a, b);
  else if (is(what, "messages"))
    messages((u32)a, (u32)b);
  else {
    print("vsock: send, take, short, hold, echo or messages?\n");
    call(SYS_EXIT, 2, 0, 0);
  }
  call(SYS_EXIT, 0, 0, 0);
}

asm(".globl _start\n_start: mov %rsp, %rdi\n and $-16, %rsp\n call run\n");
