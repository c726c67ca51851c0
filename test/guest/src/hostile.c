/* A driver that breaks the rules: one attack after the other on a device, and after each of them a correct driver's turn. */
#include "virtio.h"

#define QUEUE_SIZE 8
#define DATA_SIZE 4096
#define VERDICT_MS 30000
#define STORM_KICKS 20000
#define RANDOM_WRITES 2000
#define RESETS 64
#define CHANGE_ROUNDS 300
#define REGISTER_PAGE 0x1000
#define REGISTERS 0x100 /* the configuration space is behind them, on either transport of this project */
#define MMIO_NOTIFY 0x50

static u32 target_id = VIRTIO_ENTROPY, target_queue;
static struct virtio target;
static bool has_other;
static struct virtq *queue;
static u8 *data;

static void set_status(u32 status) { target.transport->set_status(&target, status); }
static bool is_pci(void) { return target.transport == &virtio_pci; }

/* ---- chains ----------------------------------------------------------------------------------------------------- */

static u32 put_count; /* descriptors of a packed chain */

static void put(u32 index, u64 addr, u32 len, u32 flags, u32 next) {
  if (queue->packed) {
    packed_put(queue, index, addr, len, (u16)flags);
    if (index >= put_count) put_count = index + 1;
    return;
  }
  volatile struct virtq_desc *desc = &queue->desc[index];
  desc->addr = addr;
  desc->len = len;
  desc->flags = (u16)flags;
  desc->next = (u16)next;
}

static void offer(u32 head) {
  if (queue->packed) {
    packed_offer(queue, put_count);
    put_count = 0;
    return;
  }
  queue->avail->ring[queue->next_avail & (queue->size - 1)] = (u16)head;
  barrier();
  queue->avail->idx = ++queue->next_avail;
}

static void kick(void) { target.transport->kick(&target, target_queue); }

/* What the device makes of it: `count` chains are served, or it wants a reset. */
static const char *verdict(u32 count) {
  kick();
  for (u32 ms = 0; ms < VERDICT_MS; ms++) {
    if (virtio_needs_reset(&target)) return "needs-reset";
    if (queue->packed ? packed_pending(queue) : queue->used->idx == (u16)count) return "served";
    wait_for(&interrupt_count[VECTOR_SPURIOUS], ~0u, 1);
  }
  return "ignored";
}

static const char *chain_verdict(void) {
  offer(0);
  return verdict(1);
}

/* The end of the RAM that this guest lies in. */
static u64 ram_end(void) {
  for (u32 i = 0; i < boot.range_count; i++) {
    const struct range *range = &boot.ranges[i];
    if (range->type == RANGE_RAM && range->base <= (u64)data && range->base + range->size > (u64)data)
      return range->base + range->size;
  }
  return 0;
}

static const char *loop(void) {
  put(0, (u64)data, 16, DESC_WRITE | DESC_NEXT, 1);
  put(1, (u64)data, 16, DESC_WRITE | DESC_NEXT, 0);
  return chain_verdict();
}

static const char *self(void) {
  put(0, (u64)data, 16, DESC_WRITE | DESC_NEXT, 0);
  return chain_verdict();
}

static const char *wrap(void) {
  put(0, -4096ul, 8192, DESC_WRITE, 0);
  return chain_verdict();
}

static const char *cross(void) {
  put(0, ram_end() - 16, 32, DESC_WRITE, 0);
  return chain_verdict();
}

static const char *outside(void) {
  put(0, 1ul << 51, 16, DESC_WRITE, 0);
  return chain_verdict();
}

static const char *mmio(void) {
  put(0, target.base, 16, DESC_WRITE, 0);
  return chain_verdict();
}

static const char *length(void) {
  put(0, (u64)data, ~0u, DESC_WRITE, 0);
  return chain_verdict();
}

static const char *direction(void) {
  put(0, (u64)data, 16, DESC_WRITE | DESC_NEXT, 1);
  put(1, (u64)data + 16, 16, 0, 0);
  return chain_verdict();
}

static const char *next(void) {
  put(0, (u64)data, 16, DESC_WRITE | DESC_NEXT, 0xffff);
  return chain_verdict();
}

static const char *head(void) {
  offer(queue->size);
  return verdict(1);
}

static const char *jump(void) {
  put(0, (u64)data, 16, DESC_WRITE, 0);
  queue->avail->idx = queue->next_avail = (u16)(queue->size + 1);
  return verdict(0xffff);
}

static const char *back(void) {
  queue->avail->idx = queue->next_avail = 0xffff;
  return verdict(0xffff);
}

/* ---- tables of descriptors -------------------------------------------------------------------------------------- */

/* Each entry writes one byte. In a packed table the last two fields change places, and there are no links. */
static struct virtq_desc *table(u32 entries) {
  struct virtq_desc *at = heap_take(sizeof *at * entries, PAGE);
  for (u32 i = 0; at && i < entries; i++)
    at[i] = queue->packed
                ? (struct virtq_desc){(u64)data, 1, 0, DESC_WRITE}
                : (struct virtq_desc){(u64)data, 1, DESC_WRITE | (i + 1 < entries ? DESC_NEXT : 0), (u16)(i + 1)};
  return at;
}

static const char *table_verdict(const void *at, u32 size, u32 flags) {
  put(0, (u64)at, size, flags, 1);
  if (flags & DESC_NEXT) put(1, (u64)data, 16, DESC_WRITE, 0);
  return chain_verdict();
}

static const char *nested(void) {
  struct virtq_desc *at = table(1);
  at[0] = (struct virtq_desc){(u64)at, sizeof *at, DESC_INDIRECT, 0};
  return table_verdict(at, sizeof *at, DESC_INDIRECT);
}

static const char *table_next(void) { return table_verdict(table(1), 16, DESC_INDIRECT | DESC_NEXT); }
static const char *table_size(void) { return table_verdict(table(2), 17, DESC_INDIRECT); }
static const char *table_empty(void) { return table_verdict(table(1), 0, DESC_INDIRECT); }
static const char *table_huge(void) { return table_verdict(table(QUEUE_SIZE * 64), 16 * QUEUE_SIZE * 64, DESC_INDIRECT); }
static const char *table_outside(void) { return table_verdict((void *)(ram_end() - 16), 32, DESC_INDIRECT); }

static const char *table_loop(void) {
  struct virtq_desc *at = table(2);
  at[1].flags |= DESC_NEXT;
  at[1].next = 0;
  return table_verdict(at, 2 * sizeof *at, DESC_INDIRECT);
}

/* ---- registers -------------------------------------------------------------------------------------------------- */

/* The registers of a queue, from nothing to ready. */
static bool set_queue(u64 desc, u64 avail, u64 used, u32 size) {
  target.transport->queue_stop(&target, target_queue);
  return target.transport->queue_set(&target, target_queue, size, desc, avail, used);
}

static const char *rings_outside(void) {
  u64 at = (u64)data, end = ram_end();
  if (virtio_start(&target, ALL_FEATURES)) return "not started";
  const u64 bad[] = {end, end - 16, target.base, 1ul << 52, -4096ul, at + 1};
  for (u32 i = 0; i < sizeof bad / sizeof *bad; i++)
    if (set_queue(bad[i], at, at + 1024, QUEUE_SIZE) || set_queue(at, bad[i], at + 1024, QUEUE_SIZE) ||
        set_queue(at, at + 1024, bad[i], QUEUE_SIZE))
      return "accepted";
  const u32 sizes[] = {0, 3, 0x8000, 0xffff};
  /* virtio-pci keeps the size that it had. */
  for (u32 i = 0; i < sizeof sizes / sizeof *sizes && !is_pci(); i++)
    if (set_queue(at, at + 1024, at + 2048, sizes[i])) return "accepted";
  return "refused";
}

/* All of it on one page, and the used ring over the descriptors: it is the guest's own memory that suffers. */
static const char *rings_overlap(void) {
  if (virtio_start(&target, ALL_FEATURES)) return "not started";
  for (u32 i = 0; i < DATA_SIZE / 4; i++) ((volatile u32 *)data)[i] = i * 0x01010101u;
  if (!set_queue((u64)data, (u64)data, (u64)data, QUEUE_SIZE)) return "survived";
  virtio_ready(&target);
  for (u32 i = 0; i < 64 && !virtio_needs_reset(&target); i++) {
    ((volatile u16 *)data)[1]++;
    kick();
  }
  return "survived";
}

static const char *late_queue(void) {
  if (is_pci()) return "does not apply";
  return set_queue((u64)data, (u64)data + 1024, (u64)data + 2048, QUEUE_SIZE) ? "accepted" : "refused";
}

static const char *features(void) {
  if (virtio_start(&target, ALL_FEATURES)) return "not started";
  for (u32 bit = 0; bit < 128; bit++) {
    if (bit < 64 && (target.offered >> bit & 1)) continue;
    set_status(0);
    set_status(STATUS_ACKNOWLEDGE);
    set_status(STATUS_ACKNOWLEDGE | STATUS_DRIVER);
    for (u32 word = 0; word < 4; word++)
      target.transport->accept(&target, word, (word == 1) | (word == bit / 32 ? 1u << bit % 32 : 0));
    set_status(STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK);
    if (virtio_status(&target) & STATUS_FEATURES_OK) return "accepted";
  }
  return "refused";
}

/* Ready without the steps before it, and back without a reset. */
static const char *status(void) {
  set_status(STATUS_ACKNOWLEDGE);
  if (!(virtio_status(&target) & STATUS_DRIVER_OK)) return "went back";
  set_status(0xffffffff & ~STATUS_FAILED);
  if (virtio_needs_reset(&target)) return "accepted";
  set_status(0);
  set_status(STATUS_DRIVER_OK);
  set_status(STATUS_ACKNOWLEDGE | STATUS_DRIVER_OK | STATUS_NEEDS_RESET);
  return virtio_status(&target) & (STATUS_DRIVER_OK | STATUS_NEEDS_RESET) ? "accepted" : "refused";
}

static u32 random_state = 0x2545f491;
static u32 random(void) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 17;
  random_state ^= random_state << 5;
  return random_state;
}

static void random_write(u32 offset) {
  u64 at = (is_pci() ? target.common : target.base) + offset;
  u32 value = random() & (random() & 1 ? ~0u : 15);
  switch (random() & 3) {
    case 0:
      return write8(at, (u8)value);
    case 1:
      return write16(at & -2ul, (u16)value);
    case 2:
      return write32(at & -4ul, value);
    case 3:
      return write64(at & -8ul, value | U(random()) << 32);
  }
}

/* Any register in any order, width and value; half of them where registers are. */
static const char *registers(void) {
  for (u32 i = 0; i < RANDOM_WRITES; i++) random_write(random() % (random() & 1 ? REGISTERS : REGISTER_PAGE));
  return "survived";
}

static const char *config(void) {
  for (u32 i = 0; i < RANDOM_WRITES / 4; i++) random_write(REGISTERS + random() % (REGISTER_PAGE - REGISTERS));
  return "survived";
}

static const char *notify(void) {
  const u32 values[] = {VIRTIO_QUEUES, 99, 0xffff, 0x10000, ~0u};
  u64 bell = is_pci() ? target.notify : target.base + MMIO_NOTIFY;
  for (u32 i = 0; i < sizeof values / sizeof *values; i++) write32(bell, values[i]);
  if (is_pci()) write16(bell + U(VIRTIO_QUEUES) * target.notify_multiplier, 0);
  write8(bell, 0);
  write16(bell, 0);
  write16(bell + 2, 0);
  return virtio_needs_reset(&target) ? "needs-reset" : "ignored";
}

/* ---- in flight -------------------------------------------------------------------------------------------------- */

/* Kicks without end, and without anything to do. */
static const char *storm(void) {
  for (u32 i = 0; i < STORM_KICKS; i++) kick();
  return virtio_needs_reset(&target) ? "needs-reset" : "ignored";
}

/* As many correct requests as the queue takes. */
static void offer_requests(void) {
  static struct {
    u32 type, reserved;
    u64 sector;
  } header;
  static u8 status;
  for (u32 i = 0; i + 3 <= queue->size; i += 3) {
    if (target.id == VIRTIO_BLOCK) {
      put(i, (u64)&header, sizeof header, DESC_NEXT, i + 1);
      put(i + 1, (u64)data, 512, DESC_WRITE | DESC_NEXT, i + 2);
      put(i + 2, (u64)&status, 1, DESC_WRITE, 0);
    } else
      put(i, (u64)data, 512, DESC_WRITE, 0);
    offer(i);
  }
  kick();
}

/* A reset right behind a kick. Once it is done, the device writes nothing any more. */
static const char *reset(void) {
  for (u32 round = 0; round < RESETS; round++) {
    u64 mark = heap_mark();
    if (correct_start(&target, target_queue)) return "not started";
    queue = &target.queues[target_queue];
    offer_requests();
    if (!virtio_stop(&target)) return "not reset";
    u16 used = queue->used->idx;
    for (u32 i = 0; i < 512 / 8; i++) ((volatile u64 *)data)[i] = 0;
    wait_for(&interrupt_count[VECTOR_SPURIOUS], ~0u, 1);
    if (queue->used->idx != used || *(volatile u64 *)data) return "written to after its reset";
    heap_back(mark);
  }
  return "survived";
}

static const char *stop_queue(void) {
  offer_requests();
  target.transport->queue_stop(&target, target_queue);
  if (is_pci()) return "does not apply";
  if (target.transport->queue_ready(&target, target_queue)) return "goes on";
  kick();
  return "stopped";
}

static volatile bool changing;
static u32 change_resets;
static u64 last_bytes; /* data at the very end of RAM, so that no length reaches anything else */

/* On another processor: descriptors and rings change all the time. */
static void change(void *argument) {
  struct virtq *own = argument;
  for (u32 value = 0x1234567; changing;) {
    value = value * 1664525 + 1013904223;
    volatile struct virtq_desc *desc = &own->desc[value >> 8 & (QUEUE_SIZE - 1)];
    desc->len = value & 1 ? 64 : value;
    desc->flags = (u16)(value >> 16 & 7);
    desc->next = (u16)(value >> 20 & QUEUE_SIZE);
    desc->addr = value & 2 ? last_bytes : 1ul << (value >> 26);
    own->avail->ring[value >> 12 & (QUEUE_SIZE - 1)] = (u16)(value >> 24 & (QUEUE_SIZE - 1));
  }
}

/* Chains change while the device reads them. */
static const char *change_in_flight(void) {
  struct virtq own = *queue;
  last_bytes = ram_end() - 64;
  change_resets = 0;
  for (u32 i = 0; i < QUEUE_SIZE; i++) put(i, last_bytes, 64, DESC_WRITE, 0);
  changing = true;
  if (!cpu_run(change, &own)) return "no second processor";
  /* Where processors are few, neither the device nor the other processor may have had its turn by then. */
  for (u32 round = 0; round < CHANGE_ROUNDS || (!change_resets && round < CHANGE_ROUNDS + VERDICT_MS); round++) {
    if (round >= CHANGE_ROUNDS) wait_for(&interrupt_count[VECTOR_SPURIOUS], ~0u, 1);
    offer(round & (QUEUE_SIZE - 1));
    kick();
    if (!virtio_needs_reset(&target)) continue;
    change_resets++;
    /* From the start, on the same rings: the other processor still writes to them. */
    if (virtio_start(&target, ALL_FEATURES)) break;
    own.avail->idx = own.used->idx = 0;
    queue->next_avail = 0;
    target.queues[target_queue] = own;
    set_queue((u64)own.desc, (u64)own.avail, (u64)own.used, own.size);
    if (virtio_ready(&target)) break;
  }
  changing = false;
  cpu_wait();
  return "survived";
}

/* ---- words ------------------------------------------------------------------------------------------------------ */

static const struct attack {
  const char *name;
  const char *(*run)(void);
  bool packed; /* also on a packed queue: it has no links and indices, and its tables no flags */
} attacks[] = {
    {"loop", loop, false},
    {"self", self, false},
    {"wrap", wrap, true},
    {"cross", cross, true},
    {"outside", outside, true},
    {"mmio", mmio, true},
    {"length", length, true},
    {"direction", direction, true},
    {"next", next, false},
    {"head", head, false},
    {"jump", jump, false},
    {"back", back, false},
    {"nested", nested, false},
    {"table-next", table_next, true},
    {"table-size", table_size, true},
    {"table-empty", table_empty, true},
    {"table-huge", table_huge, true},
    {"table-outside", table_outside, true},
    {"table-loop", table_loop, false},
    {"rings-outside", rings_outside, false},
    {"rings-overlap", rings_overlap, false},
    {"late-queue", late_queue, true},
    {"features", features, true},
    {"status", status, true},
    {"registers", registers, true},
    {"config", config, true},
    {"notify", notify, true},
    {"storm", storm, true},
    {"reset", reset, false},
    {"stop-queue", stop_queue, false},
    {"change", change_in_flight, false},
};
#define ATTACKS (sizeof attacks / sizeof *attacks)

static void attack(const struct attack *attack) {
  u64 mark = heap_mark();
  const char *error = correct_start(&target, target_queue), *seen = "not started";
  if (!error) {
    queue = &target.queues[target_queue];
    seen = attack->run();
    /* Who says that it needs a reset says so by an interrupt too. */
    if (str_equal(seen, "needs-reset") && !wait_for(&target.config_changes, 1, VERDICT_MS)) seen = "needs-reset silently";
  }
  heap_back(mark);
  error = correct_start(&target, target_queue);
  if (!error) error = correct_work(&target);
  print("troupe-guest: hostile %s %s", attack->name, seen);
  if (attack->run == change_in_flight) print(" %u resets", U(change_resets));
  print(error ? ", not recovered: %s" : ", recovered", error);
  if (has_other) {
    error = other_work();
    print(error ? ", other device failed: %s" : ", other device works", error);
  }
  print("\r\n");
  virtio_stop(&target);
  heap_back(mark);
}

static void run(const char *name) {
  data = heap_take(DATA_SIZE, PAGE);
  if (!data || !virtio_find(&target, target_id, 0)) {
    say("hostile none");
    return;
  }
  say("hostile device %u at %x", U(target_id), target.base);
  /* It is not attacked, and must not notice. */
  has_other = other_start(target_id);
  if (has_other) say("hostile other device %u", U(other_id()));
  bool found = false;
  for (u32 i = 0; i < ATTACKS; i++) {
    if (name ? !str_equal(name, attacks[i].name) : virtio_packed && !attacks[i].packed) continue;
    attack(&attacks[i]);
    found = true;
  }
  if (has_other) other_stop();
  say(found ? "hostile done" : "hostile unknown");
}

bool hostile(const char *word) {
  const char *value = after_prefix(word, "target=");
  if (value) {
    target_id = (u32)take_number(&value);
    if (*value == ',') {
      value++;
      target_queue = (u32)take_number(&value);
    } else
      target_queue = 0;
    return true;
  }
  value = after_prefix(word, "hostile");
  if (!value || (*value && *value != '=')) return false;
  run(*value ? value + 1 : NULL);
  return true;
}
