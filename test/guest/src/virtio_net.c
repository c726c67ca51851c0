/* The network device (virtio 1.3, section 5.1): a station that answers ARP, ICMP echo and UDP echo; a source and a sink of frames. */
#include "virtio.h"

#define F_CSUM (1ul << 0)
#define F_GUEST_CSUM (1ul << 1)
#define F_MTU (1ul << 3)
#define F_MAC (1ul << 5)
#define F_GUEST_TSO4 (1ul << 7)
#define F_HOST_TSO4 (1ul << 11)
#define F_MRG_RXBUF (1ul << 15)
#define F_STATUS (1ul << 16)

#define CONFIG_MAC 0
#define CONFIG_STATUS 6
#define CONFIG_MTU 10

#define RECEIVE 0
#define TRANSMIT 1
#define QUEUE_MAX 256
#define BUFFER 2048u
#define HEADER 12u
#define ECHO_LIMIT_MS 60000
#define BENCH_LIMIT_MS 60000
#define FRAME_MAX 65535u
#define USER_DEPTH 8 /* from so many frames on it pays to go to CPL 3 and back for a batch */

#define NEEDS_CSUM 1
#define GSO_TCPV4 1

struct net_header {
  u8 flags, gso_type;
  u16 hdr_len, gso_size, csum_start, csum_offset, num_buffers;
};

struct ethernet {
  u8 to[6], from[6];
  u16 type; /* the network's order of bytes, here and below */
};
struct arp {
  u16 hardware, protocol;
  u8 sizes[2];
  u16 operation;
  u8 sender_mac[6], sender_ip[4], target_mac[6], target_ip[4];
};
struct ipv4 {
  u8 version, tos;
  u16 length, id, fragment;
  u8 ttl, protocol;
  u16 checksum;
  u8 from[4], to[4];
};
struct tcp {
  u16 from, to;
  u32 sequence, acknowledged;
  u8 offset, flags;
  u16 window, checksum, urgent;
};

#define TYPE_IPV4 0x0008
#define TYPE_ARP 0x0608
#define TYPE_TEST 0xb588 /* for local experiments */

static struct virtio nic;
static struct virtq *rx, *tx;
static u8 *buffers; /* BUFFER bytes for each entry of the receive queue */
static u32 number;
static u64 without;
static u8 mac[6], ip[4];

/* What the station has done. */
static u32 arps, pings, datagrams, others;

/* ---- start ------------------------------------------------------------------------------------------------------ */

/* The descriptors of both queues stay as they are made here: one buffer each, of which only the length changes. */
static const char *make_chains(void) {
  buffers = heap_take(U(rx->size) * BUFFER, PAGE);
  if (!buffers) return "no memory";
  for (u32 i = 0; i < rx->size; i++)
    if (!virtq_add(rx, &(struct buffer){buffers + i * BUFFER, BUFFER, true}, 1, i)) return "queue full";
  for (u32 i = 0; i < tx->size; i++) {
    tx->desc[i].addr = (u64)buffers + (i % rx->size) * BUFFER;
    tx->desc[i].flags = 0;
    tx->lengths[i] = 1;
    tx->tokens[i] = i;
  }
  return NULL;
}

static const char *start(void) {
  u64 wanted = F_CSUM | F_GUEST_CSUM | F_MTU | F_MAC | F_GUEST_TSO4 | F_HOST_TSO4 | F_MRG_RXBUF | F_STATUS;
  /* Large frames only in buffers that can be merged. */
  if (without & F_MRG_RXBUF) wanted &= ~F_GUEST_TSO4;
  if (without & F_CSUM) wanted &= ~F_HOST_TSO4;
  if (without & F_GUEST_CSUM) wanted &= ~F_GUEST_TSO4;
  const char *error = virtio_start(&nic, wanted & ~without);
  if (!error) error = virtq_setup(&nic, RECEIVE, QUEUE_MAX);
  if (!error) error = virtq_setup(&nic, TRANSMIT, QUEUE_MAX);
  rx = &nic.queues[RECEIVE];
  tx = &nic.queues[TRANSMIT];
  if (!error) error = make_chains();
  if (!error) error = virtio_ready(&nic);
  for (u32 i = 0; i < 6; i++) mac[i] = virtio_config8(&nic, CONFIG_MAC + i);
  if (!error) virtq_kick(rx);
  return error;
}

static const char *about(void) {
  say("net features %x", nic.offered);
  print("troupe-guest: net mac ");
  for (u32 i = 0; i < 6; i++) print(i ? ":%b" : "%b", U(mac[i]));
  print("\r\n");
  if (nic.features & F_STATUS) say("net link %s", virtio_config16(&nic, CONFIG_STATUS) & 1 ? "up" : "down");
  if (nic.features & F_MTU) say("net mtu %u", U(virtio_config16(&nic, CONFIG_MTU)));
  return NULL;
}

/* ---- the station ------------------------------------------------------------------------------------------------ */

static void swap(u8 *a, u8 *b, u32 size) {
  while (size--) {
    u8 was = *a;
    *a++ = *b;
    *b++ = was;
  }
}

static bool same(const u8 *a, const u8 *b, u32 size) { return !memcmp(a, b, size); }

static bool answer_arp(struct ethernet *ethernet, u32 size) {
  struct arp *arp = (struct arp *)(ethernet + 1);
  if (size < sizeof *ethernet + sizeof *arp || arp->operation != 0x0100 || !same(arp->target_ip, ip, 4)) return false;
  arp->operation = 0x0200;
  memcpy(arp->target_mac, arp->sender_mac, 6);
  memcpy(arp->sender_mac, mac, 6);
  swap(arp->sender_ip, arp->target_ip, 4);
  arps++;
  return true;
}

/* Both addresses change places, so sums over them stay right, whoever is to finish them. */
static bool answer_ip(struct ethernet *ethernet, u32 size) {
  struct ipv4 *packet = (struct ipv4 *)(ethernet + 1);
  u8 *inner = (u8 *)(packet + 1);
  if (size < sizeof *ethernet + sizeof *packet + 8 || packet->version != 0x45 || !same(packet->to, ip, 4)) return false;
  if (packet->fragment & 0xff3f) return false;
  if (packet->protocol == 17) {
    swap(inner, inner + 2, 2);
    datagrams++;
  } else if (packet->protocol == 1 && inner[0] == 8) {
    u16 *sum = (u16 *)(inner + 2);
    u32 changed = (u32)*sum + 8; /* the type is the first byte of a word, and goes from 8 to 0 */
    *sum = (u16)(changed + (changed >> 16));
    inner[0] = 0;
    pings++;
  } else
    return false;
  swap(packet->from, packet->to, 4);
  return true;
}

/* Makes the answer in the place of a frame. False: there is none. */
static bool answer(u8 *at, u32 size) {
  struct ethernet *ethernet = (struct ethernet *)(at + HEADER);
  bool answered = size >= sizeof *ethernet && (ethernet->type == TYPE_ARP    ? answer_arp(ethernet, size)
                                               : ethernet->type == TYPE_IPV4 ? answer_ip(ethernet, size)
                                                                             : false);
  if (!answered) {
    others++;
    return false;
  }
  memcpy(ethernet->to, ethernet->from, 6);
  memcpy(ethernet->from, mac, 6);
  struct net_header *header = (struct net_header *)at;
  header->flags &= NEEDS_CSUM;
  header->num_buffers = 0;
  return true;
}

/* What waits in both queues: frames are answered in their own buffers, which receive again when the answer is sent. */
static void serve(void *argument) {
  (void)argument;
  u64 token;
  u32 head;
  while (virtq_take_kept(rx, &token, &head)) {
    u8 *at = buffers + token * BUFFER;
    struct net_header *header = (struct net_header *)at;
    u32 written = rx->used->ring[(u16)(rx->last_used - 1) & (rx->size - 1)].len;
    if (nic.features & F_MRG_RXBUF && header->num_buffers > 1) {
      u16 more = header->num_buffers;
      virtq_add_kept(rx, head);
      while (--more && virtq_take_kept(rx, &token, &head)) virtq_add_kept(rx, head);
      others++;
    } else if (answer(at, written - HEADER)) {
      tx->desc[head].len = written;
      virtq_add_kept(tx, head);
    } else
      virtq_add_kept(rx, head);
  }
  while (virtq_take_kept(tx, &token, &head)) virtq_add_kept(rx, head);
}

static bool stopped(void) { return nic.config_changes && virtio_needs_reset(&nic); }

static const char *echo(u32 count) {
  arps = pings = datagrams = others = 0;
  say("net ready");
  wait_begin(ECHO_LIMIT_MS);
  for (;;) {
    serve(NULL);
    virtq_kick(tx);
    virtq_kick(rx);
    bool enough = datagrams >= count;
    /* Until the last answer is sent, too. */
    if ((enough && tx->last_used == tx->next_avail) || wait_over() || stopped()) break;
    virtq_arm(rx);
    if (enough) virtq_arm(tx);
    while (!virtq_pending(rx) && !virtq_pending(tx) && !wait_over() && !stopped()) sleep_until_interrupt();
  }
  bool late = wait_over();
  wait_end();
  if (virtio_needs_reset(&nic)) return "needs a reset";
  say("net echo %u udp %u icmp %u arp", U(datagrams), U(pings), U(arps));
  return late ? "late" : NULL;
}

/* ---- a device that fails ---------------------------------------------------------------------------------------- */

static u8 *note_frame;
static u32 heard_attempt; /* one more than that of the last frame that came */

static const char *start_again(void) {
  note_frame = heap_take(HEADER + sizeof(struct ethernet) + NOTE_SIZE, PAGE);
  return note_frame ? start() : "no memory";
}

/* A frame with a note is sent back by the host. One whose device has failed meanwhile may come later, or never. */
static void hear(void) {
  u64 token;
  u32 head;
  while (virtq_take_kept(rx, &token, &head)) {
    const struct note *note = (struct note *)(buffers + token * BUFFER + HEADER + sizeof(struct ethernet));
    if (rx->used->ring[(u16)(rx->last_used - 1) & (rx->size - 1)].len != HEADER + sizeof(struct ethernet) + NOTE_SIZE ||
        !note_good(note) || note->attempt < heard_attempt)
      endure_wrong("a wrong frame");
    heard_attempt = note->attempt + 1;
    virtq_add_kept(rx, head);
  }
  virtq_kick(rx);
}

static const char *there_and_back(u32 done, u32 attempt) {
  static const u8 nobody[6] = {2, 0xff, 0xff, 0xff, 0xff, 0xfe};
  struct ethernet *ethernet = (struct ethernet *)(note_frame + HEADER);
  u64 token;
  u32 head;
  memset(note_frame, 0, HEADER);
  memcpy(ethernet->to, nobody, 6);
  memcpy(ethernet->from, mac, 6);
  ethernet->type = TYPE_TEST;
  note_write((struct note *)(ethernet + 1), done, attempt);
  tx->desc[0].addr = (u64)note_frame;
  tx->desc[0].len = HEADER + sizeof *ethernet + NOTE_SIZE;
  virtq_arm(tx);
  virtq_arm(rx);
  virtq_add_kept(tx, 0);
  virtq_kick(tx);
  const char *error = virtq_wait(tx, VIRTIO_ANSWER_MS);
  if (!error && !virtq_take_kept(tx, &token, &head)) error = "no answer";
  while (!error && heard_attempt <= attempt) {
    virtq_arm(rx);
    if (!(error = virtq_wait(rx, VIRTIO_ANSWER_MS))) hear();
  }
  return error;
}

/* ---- bench ------------------------------------------------------------------------------------------------------ */

struct bench_state {
  u64 count, begun, done, bytes;
};

static void put16(u16 *at, u32 value) { *at = (u16)(value << 8 | (value >> 8 & 0xff)); }

/* A frame to a station that nobody is: one of a protocol that nobody has, or TCP to be cut into segments. */
static u32 make_frame(u8 *at, u32 size, u32 segment) {
  struct net_header *header = (struct net_header *)at;
  struct ethernet *ethernet = (struct ethernet *)(at + HEADER);
  static const u8 nobody[6] = {2, 0xff, 0xff, 0xff, 0xff, 0xfe};
  *header = (struct net_header){0};
  memcpy(ethernet->to, nobody, 6);
  memcpy(ethernet->from, mac, 6);
  ethernet->type = segment ? TYPE_IPV4 : TYPE_TEST;
  if (segment) {
    struct ipv4 *packet = (struct ipv4 *)(ethernet + 1);
    struct tcp *tcp = (struct tcp *)(packet + 1);
    *packet = (struct ipv4){.version = 0x45, .ttl = 64, .protocol = 6, .from = {10, 0, 0, 1}, .to = {10, 0, 0, 2}};
    put16(&packet->length, size - sizeof *ethernet);
    *tcp = (struct tcp){.offset = 0x50, .flags = 0x10};
    *header = (struct net_header){NEEDS_CSUM, GSO_TCPV4, 54, (u16)segment, 34, 16, 0};
  }
  return HEADER + size;
}

/* Takes what is sent and sends as much again. */
static void refill(void *argument) {
  struct bench_state *state = argument;
  u64 token;
  u32 head;
  while (virtq_take_kept(tx, &token, &head)) {
    state->done++;
    if (state->begun == state->count) continue;
    state->begun++;
    virtq_add_kept(tx, head);
  }
}

/* Takes what has come, and gives the buffers again. */
static void swallow(void *argument) {
  struct bench_state *state = argument;
  u64 token;
  u32 head;
  while (virtq_take_kept(rx, &token, &head)) {
    struct net_header *header = (struct net_header *)(buffers + token * BUFFER);
    u16 more = header->num_buffers;
    state->done++;
    state->bytes += rx->used->ring[(u16)(rx->last_used - 1) & (rx->size - 1)].len - HEADER;
    virtq_add_kept(rx, head);
    while (more-- > 1 && virtq_take_kept(rx, &token, &head)) {
      state->bytes += rx->used->ring[(u16)(rx->last_used - 1) & (rx->size - 1)].len;
      virtq_add_kept(rx, head);
    }
  }
}

/* Halts until `part` chains of the queue can be taken. */
static const char *wait_part(struct virtq *queue, u16 part) {
  if (queue->event_index) *virtq_used_event(queue) = (u16)(queue->last_used + part - 1);
  barrier();
  while ((u16)(queue->used->idx - queue->last_used) < part) {
    if (wait_over()) return "no answer";
    if (stopped()) return "needs a reset";
    sleep_until_interrupt();
  }
  return NULL;
}

static const char *send_loop(struct bench_state *state) {
  for (u32 i = 0; i < tx->size && state->begun < state->count; i++, state->begun++) virtq_add_kept(tx, i);
  virtq_kick(tx);
  const char *error = NULL;
  while (state->done < state->count && !error) {
    u64 left = state->begun - state->done;
    /* An interrupt when half of what is under way is sent, as drivers of the world do it. */
    error = wait_part(tx, (u16)(state->begun == state->count ? left : (left + 1) / 2));
    if (error) break;
    user_call(refill, state);
    virtq_kick(tx);
  }
  return error;
}

static const char *sink_loop(struct bench_state *state) {
  const char *error = NULL;
  while (state->done < state->count && !error) {
    error = wait_part(rx, 1);
    if (error) break;
    if (virtq_pending(rx)) user_call(swallow, state);
    virtq_kick(rx);
  }
  return error;
}

static const char *bench(const char *what, u64 count, u32 size, u32 segment) {
  bool sends = str_equal(what, "send");
  struct bench_state state = {.count = count};
  if (sends) {
    u8 *frame = heap_take(HEADER + FRAME_MAX, PAGE);
    if (!frame || size > FRAME_MAX) return frame ? "wrong size" : "no memory";
    u32 length = make_frame(frame, size, segment);
    for (u32 i = 0; i < tx->size; i++) {
      tx->desc[i].addr = (u64)frame;
      tx->desc[i].len = length;
    }
  } else {
    say("net ready");
    wait_begin(ECHO_LIMIT_MS);
    const char *error = wait_part(rx, 1); /* the clock runs from the first frame on */
    wait_end();
    if (error) return error;
  }
  u32 interrupts = nic.interrupts;
  rx->kicks = tx->kicks = 0;
  wait_begin(BENCH_LIMIT_MS);
  u64 begin = read_tsc(), clock = wait_left_ns();
  mark(MARK_BENCH_BEGIN);
  const char *error = sends ? send_loop(&state) : sink_loop(&state);
  mark(MARK_BENCH_END);
  u64 tsc = read_tsc() - begin, ns = clock - wait_left_ns();
  wait_end();
  if (sends) state.bytes = state.done * size;
  if (!error || state.done)
    say("net bench %s n=%u bytes=%u tsc=%u ns=%u kicks=%u interrupts=%u", what, state.done, state.bytes, tsc, ns,
        U(sends ? tx->kicks : rx->kicks), U(nic.interrupts - interrupts));
  return error;
}

/* ---- words ------------------------------------------------------------------------------------------------------ */

static u64 take_argument(const char **text, u64 otherwise) {
  if (**text != ',') return otherwise;
  (*text)++;
  return take_number(text);
}

static const char *run(const char *what) {
  const char *rest;
  if ((rest = after_prefix(what, "endure"))) {
    heard_attempt = 0;
    return virtio_endure("net", &(struct endurance){&nic, start_again, there_and_back}, endure_requests(rest));
  }
  const char *error = start();
  if (error || !*what) return error ? error : about();
  if ((rest = after_prefix(what, "echo"))) return echo((u32)take_argument(&rest, 1));
  if ((rest = after_prefix(what, "sink"))) return bench("sink", take_argument(&rest, 1000), 0, 0);
  if ((rest = after_prefix(what, "send"))) {
    u64 count = take_argument(&rest, 1000), size = take_argument(&rest, 1514);
    return bench("send", count, (u32)size, (u32)take_argument(&rest, 0));
  }
  return "what?";
}

/* The modifiers, each of which holds for the words after it. */
static bool modifier(const char *word) {
  const char *value;
  if ((value = after_prefix(word, "nic=")))
    number = (u32)take_number(&value);
  else if ((value = after_prefix(word, "net-without=")))
    without = take_number(&value);
  else if ((value = after_prefix(word, "ip=")))
    for (u32 i = 0; i < 4; i++) {
      ip[i] = (u8)take_number(&value);
      if (*value == '.') value++;
    }
  else
    return false;
  return true;
}

bool virtio_net(const char *word) {
  if (modifier(word)) return true;
  const char *value = after_prefix(word, "net");
  if (!value || (*value && *value != '=')) return false;
  if (!virtio_find(&nic, VIRTIO_NET, number)) {
    say("net none");
    return true;
  }
  if (!*value) say("net device %x irq %u", nic.base, U(nic.irq));
  const char *error = run(*value ? value + 1 : value);
  if (error) {
    virtio_fail(&nic);
    say("net failed %s", error);
  } else if (!virtio_stop(&nic))
    say("net failed reset");
  else
    say("net ok");
  return true;
}
