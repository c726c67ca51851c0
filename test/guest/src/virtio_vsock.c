/* The socket device (virtio 1.3, section 5.10): stream connections that send, take or echo bytes. */
#include "virtio.h"

#define RECEIVE 0
#define TRANSMIT 1
#define EVENT 2

#define HEADER 44u
#define DATA_MAX 0x10000u
#define STRIDE 0x11000u /* a packet in whole pages */
#define SLOTS 32u       /* packets in each direction */
#define CONNECTIONS 16u
#define FIRST_PORT 1024u
#define HOST_CID 2u
#define ALLOC 0x100000u /* bytes that a connection may be sent before it has read them */
#define ECHO_ALLOC 0x10000u
#define LIMIT_MS 60000

#define TYPE_STREAM 1
#define OP_REQUEST 1
#define OP_RESPONSE 2
#define OP_RST 3
#define OP_SHUTDOWN 4
#define OP_RW 5
#define OP_CREDIT_UPDATE 6
#define OP_CREDIT_REQUEST 7
#define SHUT_RECEIVE 1
#define SHUT_SEND 2
#define SHUT_BOTH 3

struct header {
  u64 src_cid, dst_cid;
  u32 src_port, dst_port, len;
  u16 type, op;
  u32 flags, buf_alloc, fwd_cnt;
} __attribute__((packed));

enum mode { SEND, TAKE, ECHO, SHORT };
enum state { UNUSED, ASKING, OPEN, CLOSING, CLOSED };

/* What a connection has to say, beside its data. */
#define WANT_REQUEST 1u
#define WANT_RESPONSE 2u
#define WANT_CREDIT 4u
#define WANT_RST 8u
#define WANT_SHUTDOWN 16u

struct connection {
  enum state state;
  u32 port, host_port, wants, peer_shut;
  u64 sent, received, reported;
  u32 host_alloc, host_fwd;
  u8 *ring; /* of ECHO_ALLOC bytes: what is to be echoed */
};

static struct virtio device;
static struct virtq *rx, *tx;
static u8 *rx_packets, *tx_packets;
static u16 free_slots[SLOTS];
static u32 free_count, credit_waits;
static struct connection connections[CONNECTIONS];
static u8 *pattern; /* twice DATA_MAX bytes: what a stream has at each place */

static enum mode mode;
static u32 cid;
static u32 host_port, guest_port, wanted_connections, begun, ended, refused, resets, next_port;
static u64 wanted_bytes;
static bool raw, broken;

static u32 alloc_of(void) { return mode == ECHO ? ECHO_ALLOC : ALLOC; }

static u8 pattern_at(u64 place) { return (u8)(place * 7 + (place >> 8)); }

/* ---- packets ---------------------------------------------------------------------------------------------------- */

static bool send(struct connection *c, u16 op, u32 flags, const u8 *data, u32 size) {
  if (!free_count) return false;
  u32 slot = free_slots[--free_count];
  u8 *at = tx_packets + slot * STRIDE;
  u64 consumed = mode == ECHO ? c->sent : c->received;
  *(struct header *)at = (struct header){
      .src_cid = cid,
      .dst_cid = HOST_CID,
      .src_port = c->port,
      .dst_port = c->host_port,
      .len = size,
      .type = TYPE_STREAM,
      .op = op,
      .flags = flags,
      .buf_alloc = alloc_of(),
      .fwd_cnt = (u32)consumed,
  };
  c->reported = consumed;
  if (data) memcpy(at + HEADER, data, size);
  tx->desc[slot].len = HEADER + size;
  virtq_add_kept(tx, slot);
  return true;
}

static struct connection *find(u32 port, u32 from) {
  for (u32 i = 0; i < CONNECTIONS; i++)
    if (connections[i].state != UNUSED && connections[i].port == port && connections[i].host_port == from)
      return &connections[i];
  return NULL;
}

static struct connection *open(enum state state, u32 port, u32 to, u32 wants) {
  for (u32 i = 0; i < CONNECTIONS; i++) {
    struct connection *c = &connections[i];
    if (c->state != UNUSED) continue;
    u8 *ring = c->ring;
    *c = (struct connection){.state = state, .port = port, .host_port = to, .wants = wants, .ring = ring};
    if (state != CLOSED) begun++;
    return c;
  }
  return NULL;
}

static void close(struct connection *c) {
  c->state = UNUSED;
  ended++;
}

static void take_data(struct connection *c, const u8 *data, u32 size) {
  if (mode == ECHO)
    for (u32 i = 0; i < size; i++) c->ring[(c->received + i) % ECHO_ALLOC] = data[i];
  else if (!raw && memcmp(data, pattern + c->received % DATA_MAX, size))
    broken = true;
  c->received += size;
}

/* A packet of the host. */
static void take(const struct header *header, u32 written) {
  struct connection *c = find(header->dst_port, header->src_port);
  if (written < HEADER || written != HEADER + header->len || header->dst_cid != cid) {
    broken = true;
    return;
  }
  if (!c) {
    if (header->op == OP_RST) return;
    if (header->op != OP_REQUEST || mode != ECHO || header->dst_port != guest_port || begun == wanted_connections)
      c = open(CLOSED, header->dst_port, header->src_port, WANT_RST);
    else if ((c = open(OPEN, header->dst_port, header->src_port, WANT_RESPONSE))) {
      c->host_alloc = header->buf_alloc;
      c->host_fwd = header->fwd_cnt;
    }
    return;
  }
  if (header->op == OP_RST) {
    if (c->state == ASKING)
      refused++;
    else if (c->state == OPEN)
      resets++;
    return close(c);
  }
  c->host_alloc = header->buf_alloc;
  c->host_fwd = header->fwd_cnt;
  switch (header->op) {
  case OP_RESPONSE:
    c->state = OPEN;
    break;
  case OP_RW:
    take_data(c, (const u8 *)header + HEADER, header->len);
    break;
  case OP_SHUTDOWN:
    c->peer_shut |= header->flags;
    break;
  case OP_CREDIT_REQUEST:
    c->wants |= WANT_CREDIT;
    break;
  }
}

/* ---- connections ------------------------------------------------------------------------------------------------ */

static bool say_wants(struct connection *c) {
  static const struct {
    u32 want;
    u16 op;
  } packets[] = {{WANT_REQUEST, OP_REQUEST},
                 {WANT_RESPONSE, OP_RESPONSE},
                 {WANT_CREDIT, OP_CREDIT_UPDATE},
                 {WANT_SHUTDOWN, OP_SHUTDOWN},
                 {WANT_RST, OP_RST}};
  for (u32 i = 0; i < sizeof packets / sizeof *packets; i++) {
    if (!(c->wants & packets[i].want)) continue;
    if (!send(c, packets[i].op, packets[i].op == OP_SHUTDOWN ? SHUT_BOTH : 0, NULL, 0)) return false;
    c->wants &= ~packets[i].want;
    if (packets[i].op == OP_RST) {
      /* One that was refused was never there. */
      if (c->state == CLOSED)
        c->state = UNUSED;
      else
        close(c);
      return false;
    }
  }
  return true;
}

/* Sends what there is credit for. */
static void send_data(struct connection *c) {
  u64 end = mode == ECHO ? c->received : mode == TAKE ? 0 : wanted_bytes;
  while (c->sent < end && free_count) {
    u32 room = c->host_alloc - ((u32)c->sent - c->host_fwd), size = DATA_MAX;
    if (room == 0 || room > 1u << 31) {
      credit_waits++;
      return;
    }
    if (size > room) size = room;
    if (size > end - c->sent) size = (u32)(end - c->sent);
    u32 at = (u32)(c->sent % DATA_MAX);
    const u8 *data = mode == ECHO ? c->ring + at : raw ? NULL : pattern + at;
    if (mode == ECHO && size > ECHO_ALLOC - at) size = ECHO_ALLOC - at;
    /* The bytes count as sent before the packet tells of the room that they leave. */
    c->sent += size;
    if (!send(c, OP_RW, 0, data, size)) return;
  }
}

static bool is_done(const struct connection *c) {
  if (mode == TAKE) return c->received >= wanted_bytes || c->peer_shut & SHUT_SEND;
  if (mode == ECHO) return c->peer_shut & SHUT_SEND && c->sent == c->received;
  return c->sent >= wanted_bytes;
}

static void serve(struct connection *c) {
  if (c->state == UNUSED || !say_wants(c)) return;
  if (c->peer_shut == SHUT_BOTH && (mode != ECHO || c->sent == c->received)) {
    c->wants |= WANT_RST;
    say_wants(c);
    return;
  }
  if (c->state != OPEN) return;
  send_data(c);
  u64 consumed = mode == ECHO ? c->sent : c->received;
  if ((consumed - c->reported) * 2 >= alloc_of()) c->wants |= WANT_CREDIT;
  if (is_done(c)) {
    c->state = CLOSING;
    c->wants |= WANT_SHUTDOWN;
  }
  say_wants(c);
}

/* All that can be done without the device's doing. Runs at CPL 3. */
static void turn(void *argument) {
  (void)argument;
  u64 token;
  u32 head;
  while (virtq_take_kept(rx, &token, &head)) {
    take((struct header *)(rx_packets + token * STRIDE), rx->used->ring[(u16)(rx->last_used - 1) & (rx->size - 1)].len);
    virtq_add_kept(rx, head);
  }
  while (virtq_take_kept(tx, &token, &head)) free_slots[free_count++] = (u16)head;
  u32 together = mode == SHORT ? 1 : CONNECTIONS;
  while (mode != ECHO && begun < wanted_connections && begun - ended < together &&
         open(ASKING, next_port, host_port, WANT_REQUEST))
    next_port++;
  for (u32 i = 0; i < CONNECTIONS; i++) serve(&connections[i]);
}

/* ---- start ------------------------------------------------------------------------------------------------------ */

static const char *start(void) {
  const char *error = virtio_start(&device, 0);
  cid = virtio_config32(&device, 0);
  if (!error) error = virtq_setup(&device, RECEIVE, SLOTS);
  if (!error) error = virtq_setup(&device, TRANSMIT, SLOTS);
  if (!error) error = virtq_setup(&device, EVENT, 4);
  rx = &device.queues[RECEIVE];
  tx = &device.queues[TRANSMIT];
  if (error) return error;
  rx_packets = heap_take(U(rx->size) * STRIDE, PAGE);
  tx_packets = heap_take(U(tx->size) * STRIDE, PAGE);
  pattern = heap_take(2 * DATA_MAX, PAGE);
  if (!rx_packets || !tx_packets || !pattern) return "no memory";
  for (u32 i = 0; i < 2 * DATA_MAX; i++) pattern[i] = pattern_at(i % DATA_MAX);
  for (u32 i = 0; i < CONNECTIONS; i++) {
    connections[i] = (struct connection){0};
    if (mode == ECHO && !(connections[i].ring = heap_take(ECHO_ALLOC, PAGE))) return "no memory";
  }
  for (u32 i = 0; i < rx->size; i++)
    if (!virtq_add(rx, &(struct buffer){rx_packets + i * STRIDE, HEADER + DATA_MAX, true}, 1, i)) return "queue full";
  free_count = 0;
  for (u32 i = 0; i < tx->size; i++) {
    tx->desc[i].addr = (u64)tx_packets + i * STRIDE;
    tx->desc[i].flags = 0;
    tx->lengths[i] = 1;
    tx->tokens[i] = i;
    free_slots[free_count++] = (u16)i;
  }
  error = virtio_ready(&device);
  if (!error) virtq_kick(rx);
  return error;
}

static bool stopped(void) { return device.config_changes && virtio_needs_reset(&device); }

static const char *work(void) {
  begun = ended = refused = resets = credit_waits = 0;
  next_port = FIRST_PORT;
  broken = false;
  u32 interrupts = device.interrupts;
  if (mode == ECHO) say("vsock ready");
  wait_begin(LIMIT_MS);
  u64 begin = read_tsc(), clock = wait_left_ns();
  for (;;) {
    user_call(turn, NULL);
    virtq_kick(tx);
    virtq_kick(rx);
    if ((ended == wanted_connections && tx->last_used == tx->next_avail) || wait_over() || stopped() || broken) break;
    virtq_arm(rx);
    /* Sent packets are of interest only where there is no room for more, and at the end. */
    if (free_count == 0 || ended == wanted_connections) virtq_arm(tx);
    while (!virtq_pending(rx) && !((free_count == 0 || ended == wanted_connections) && virtq_pending(tx)) && !wait_over() &&
           !stopped())
      sleep_until_interrupt();
  }
  u64 tsc = read_tsc() - begin, ns = clock - wait_left_ns();
  bool late = wait_over();
  wait_end();
  if (stopped()) return "needs a reset";
  if (broken) return "wrong bytes";
  say("vsock connections %u refused %u reset %u tsc=%u ns=%u kicks=%u interrupts=%u waits=%u", U(ended), U(refused),
      U(resets), tsc, ns, U(tx->kicks + rx->kicks), U(device.interrupts - interrupts), U(credit_waits));
  return late ? "late" : NULL;
}

/* ---- a device that fails ---------------------------------------------------------------------------------------- */

#define ENDURED 8 /* buffers for packets to come */
#define ENDURED_SIZE 0x1000u

struct note_packet {
  struct header header;
  struct note note; /* right behind it: a header is a multiple of four bytes long */
};

static struct note_packet *note_packet;

static const char *start_again(void) {
  const char *error = virtio_start(&device, 0);
  for (u32 queue = RECEIVE; queue <= EVENT && !error; queue++) error = virtq_setup(&device, queue, ENDURED);
  rx = &device.queues[RECEIVE];
  tx = &device.queues[TRANSMIT];
  cid = virtio_config32(&device, 0);
  if (!error) error = virtio_ready(&device);
  if (error) return error;
  rx_packets = heap_take(ENDURED * ENDURED_SIZE, PAGE);
  note_packet = heap_take(sizeof *note_packet, 64);
  if (!rx_packets || !note_packet) return "no memory";
  for (u32 i = 0; i < ENDURED; i++)
    if (!virtq_add(rx, &(struct buffer){rx_packets + i * ENDURED_SIZE, ENDURED_SIZE, true}, 1, i)) return "queue full";
  virtq_kick(rx);
  return NULL;
}

static const char *note_send(u32 port, u16 op, u32 flags, u32 size, u32 received) {
  note_packet->header = (struct header){
      .src_cid = cid,
      .dst_cid = HOST_CID,
      .src_port = port,
      .dst_port = host_port,
      .len = size,
      .type = TYPE_STREAM,
      .op = op,
      .flags = flags,
      .buf_alloc = ECHO_ALLOC,
      .fwd_cnt = received,
  };
  return virtq_call(tx, &(struct buffer){note_packet, HEADER + size, false}, 1, NULL);
}

/* Waits for a packet to the port, which is of this kind, or says that the host's buffers are empty. */
static const char *note_receive(u32 port, u16 op, struct note *note, u32 *received) {
  for (;;) {
    u64 token;
    u32 written;
    const char *error = virtq_wait(rx, VIRTIO_ANSWER_MS);
    if (error) return error;
    if (!virtq_take(rx, &token, &written)) return "no answer";
    struct header header = *(struct header *)(rx_packets + token * ENDURED_SIZE);
    if (written < HEADER || written != HEADER + header.len || header.dst_cid != cid || header.src_port != host_port)
      return endure_wrong("a wrong packet");
    /* A connection of a driver before this one is no more, and its port is used once. */
    if (header.dst_port != port) return endure_wrong("another connection's packet");
    if (header.op == OP_RW) {
      if (!note || *received + header.len > NOTE_SIZE) return endure_wrong("too many bytes");
      memcpy((u8 *)note + *received, rx_packets + token * ENDURED_SIZE + HEADER, header.len);
      *received += header.len;
    }
    if (!virtq_add(rx, &(struct buffer){rx_packets + token * ENDURED_SIZE, ENDURED_SIZE, true}, 1, token))
      return "queue full";
    virtq_kick(rx);
    if (header.op == op && (op != OP_RW || *received == NOTE_SIZE)) return NULL;
    if (header.op == OP_RST) return endure_wrong("reset");
  }
}

/* A connection of its own for each note, there and back. */
static const char *converse(u32 done, u32 attempt) {
  static struct note note;
  u32 port = FIRST_PORT + attempt, received = 0;
  const char *error = note_send(port, OP_REQUEST, 0, 0, 0);
  if (!error) error = note_receive(port, OP_RESPONSE, NULL, &received);
  if (error) return error;
  note_write(&note_packet->note, done, attempt);
  error = note_send(port, OP_RW, 0, NOTE_SIZE, 0);
  if (!error) error = note_receive(port, OP_RW, &note, &received);
  if (error) return error;
  if (!note_good(&note) || note.attempt != attempt || note.done != done) return endure_wrong("wrong bytes");
  error = note_send(port, OP_SHUTDOWN, SHUT_BOTH, 0, received);
  return error ? error : note_receive(port, OP_RST, NULL, &received);
}

/* ---- words ------------------------------------------------------------------------------------------------------ */

static u64 take_argument(const char **text, u64 otherwise) {
  if (**text != ',') return otherwise;
  (*text)++;
  return take_number(text);
}

/* "send,PORT,BYTES[,CONNECTIONS]", "take,..", "short,PORT,BYTES[,CONNECTIONS]" or "echo,PORT[,CONNECTIONS]" */
static const char *run(const char *what) {
  const char *rest;
  if ((rest = after_prefix(what, "endure"))) {
    /* "PORT[,REQUESTS]" */
    host_port = (u32)take_argument(&rest, 1);
    return virtio_endure("vsock", &(struct endurance){&device, start_again, converse}, endure_requests(rest));
  }
  if ((rest = after_prefix(what, "raw-"))) what = rest;
  raw = rest;
  if ((rest = after_prefix(what, "send")))
    mode = SEND;
  else if ((rest = after_prefix(what, "take")))
    mode = TAKE;
  else if ((rest = after_prefix(what, "short")))
    mode = SHORT;
  else if ((rest = after_prefix(what, "echo")))
    mode = ECHO;
  else if (*what)
    return "what?";
  else
    return start();
  host_port = guest_port = (u32)take_argument(&rest, 1);
  wanted_bytes = mode == ECHO ? 0 : take_argument(&rest, 1);
  wanted_connections = (u32)take_argument(&rest, 1);
  const char *error = start();
  return error ? error : work();
}

bool virtio_vsock(const char *word) {
  const char *value = after_prefix(word, "vsock");
  if (!value || (*value && *value != '=')) return false;
  if (!virtio_find(&device, VIRTIO_VSOCK, 0)) {
    say("vsock none");
    return true;
  }
  if (!*value) say("vsock device %x irq %u cid %u", device.base, U(device.irq), U(virtio_config32(&device, 0)));
  const char *error = run(*value ? value + 1 : value);
  if (error) {
    virtio_fail(&device);
    say("vsock failed %s", error);
  } else if (!virtio_stop(&device))
    say("vsock failed reset");
  else
    say("vsock ok");
  return true;
}
