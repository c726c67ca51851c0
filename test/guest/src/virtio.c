/* Virtio devices and split virtqueues, from the driver's side (virtio.h says how it is used). */
#include "virtio.h"

#define RESET_TRIES 100000
#define CONFIG_TRIES 1000

static struct virtio *by_vector[VECTORS];
bool virtio_packed;

/* ---- the device ------------------------------------------------------------------------------------------------- */

u32 virtio_status(const struct virtio *device) { return device->transport->status(device); }

bool virtio_needs_reset(const struct virtio *device) { return virtio_status(device) & STATUS_NEEDS_RESET; }

/* A shown cause may well stay shown, on a page of memory: the queues themselves say what is new. */
void virtio_interrupt(u32 vector) {
  struct virtio *device = by_vector[vector];
  if (!device) return;
  if (device->transport->cause(device, vector) & 2) device->config_changes++;
  device->interrupts++;
}

bool virtio_find(struct virtio *device, u32 id, u32 nth) {
  memset(device, 0, sizeof *device);
  device->id = id;
  return virtio_mmio_find(device, id, &nth) || virtio_pci_find(device, id, &nth);
}

static u32 take_vector(struct virtio *device) {
  for (u32 vector = VECTOR_VIRTIO; vector < VECTOR_SPURIOUS; vector++)
    if (!by_vector[vector]) {
      by_vector[vector] = device;
      return vector;
    }
  return 0;
}

static void release_interrupt(struct virtio *device) {
  if (!device->vector) return;
  device->transport->disconnect(device);
  by_vector[device->vector] = by_vector[device->config_vector] = NULL;
  device->vector = device->config_vector = 0;
}

static const char *take_interrupt(struct virtio *device) {
  device->interrupts = device->config_changes = 0;
  device->vector = take_vector(device);
  device->config_vector = device->transport == &virtio_pci ? take_vector(device) : device->vector;
  if (!device->vector || !device->config_vector) return "no vector";
  if (device->transport->connect(device)) return NULL;
  release_interrupt(device);
  return "no interrupt line";
}

static bool reset(const struct virtio *device) {
  device->transport->set_status(device, 0);
  for (u32 tries = 0; virtio_status(device) != 0; tries++)
    if (tries == RESET_TRIES) return false;
  return true;
}

const char *virtio_start(struct virtio *device, u64 wanted) {
  const struct virtio_transport *transport = device->transport;
  release_interrupt(device);
  memset(device->queues, 0, sizeof device->queues);
  if (!reset(device)) return "reset";
  transport->set_status(device, STATUS_ACKNOWLEDGE);
  transport->set_status(device, STATUS_ACKNOWLEDGE | STATUS_DRIVER);
  device->offered = transport->offered(device);
  if (!(device->offered & VIRTIO_F_VERSION_1)) return "no VIRTIO_F_VERSION_1";
  wanted |= VIRTIO_F_VERSION_1 | VIRTIO_F_EVENT_IDX | VIRTIO_F_INDIRECT_DESC;
  /* virtio_net.c has its hands on the rings of split queues. */
  if (virtio_packed && device->id != VIRTIO_NET) wanted |= VIRTIO_F_RING_PACKED;
  device->features = device->offered & wanted;
  transport->accept(device, 0, (u32)device->features);
  transport->accept(device, 1, (u32)(device->features >> 32));
  transport->set_status(device, STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK);
  if (!(virtio_status(device) & STATUS_FEATURES_OK)) return "features refused";
  /* Before the queues, which virtio-pci tells their vector. */
  return take_interrupt(device);
}

const char *virtq_setup(struct virtio *device, u32 index, u32 size_max) {
  struct virtq *queue = &device->queues[index];
  u32 size = device->transport->queue_max(device, index);
  if (device->transport->queue_ready(device, index)) return "queue in use";
  if (!size) return "no such queue";
  while (size > size_max) size >>= 1;
  *queue = (struct virtq){.device = device, .index = (u16)index, .size = (u16)size};
  queue->event_index = device->features & VIRTIO_F_EVENT_IDX;
  if (device->features & VIRTIO_F_RING_PACKED) return packed_setup(device, queue);
  queue->desc = heap_take(sizeof(struct virtq_desc) * size, PAGE);
  queue->avail = heap_take(6 + 2 * U(size), 64);
  queue->used = heap_take(6 + sizeof(struct virtq_used_elem) * size, 64);
  queue->tokens = heap_take(sizeof(u64) * size, 64);
  queue->lengths = heap_take(sizeof(u16) * size, 64);
  if (device->features & VIRTIO_F_INDIRECT_DESC)
    queue->tables = heap_take(sizeof(struct virtq_desc) * VIRTQ_TABLE * size, PAGE);
  if (!queue->lengths || ((device->features & VIRTIO_F_INDIRECT_DESC) && !queue->tables)) return "no memory for a queue";
  for (u32 i = 0; i < size; i++) {
    queue->desc[i].next = (u16)(i + 1);
    queue->lengths[i] = 0;
  }
  queue->free_count = (u16)size;
  queue->avail->flags = queue->avail->idx = queue->used->flags = queue->used->idx = 0;
  *virtq_used_event(queue) = 0;
  *virtq_avail_event(queue) = 0;
  return device->transport->queue_set(device, index, size, (u64)queue->desc, (u64)queue->avail, (u64)queue->used)
             ? NULL
             : "queue refused";
}

const char *virtio_ready(struct virtio *device) {
  device->transport->set_status(device, STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK | STATUS_DRIVER_OK);
  return virtio_status(device) & STATUS_DRIVER_OK ? NULL : "not made ready";
}

bool virtio_stop(struct virtio *device) {
  release_interrupt(device);
  return reset(device);
}

void virtio_fail(struct virtio *device) {
  release_interrupt(device);
  device->transport->set_status(device, STATUS_FAILED);
}

u8 virtio_config8(const struct virtio *device, u32 offset) { return read8(device->config + offset); }
u16 virtio_config16(const struct virtio *device, u32 offset) { return read16(device->config + offset); }
u32 virtio_config32(const struct virtio *device, u32 offset) { return read32(device->config + offset); }

u64 virtio_config64(const struct virtio *device, u32 offset) {
  u64 value = 0;
  for (u32 tries = 0; tries < CONFIG_TRIES; tries++) {
    u32 generation = device->transport->generation(device);
    value = virtio_config32(device, offset) | U(virtio_config32(device, offset + 4)) << 32;
    if (device->transport->generation(device) == generation) break;
  }
  return value;
}

void virtio_config_write32(const struct virtio *device, u32 offset, u32 value) {
  write32(device->config + offset, value);
}

/* ---- queues ----------------------------------------------------------------------------------------------------- */

volatile u16 *virtq_used_event(const struct virtq *queue) { return &queue->avail->ring[queue->size]; }
volatile u16 *virtq_avail_event(const struct virtq *queue) { return (volatile u16 *)&queue->used->ring[queue->size]; }

static u16 flags_of(const struct buffer *buffers, u32 count, u32 i) {
  return (u16)((buffers[i].writable ? DESC_WRITE : 0) | (i + 1 < count ? DESC_NEXT : 0));
}

bool virtq_add(struct virtq *queue, const struct buffer *buffers, u32 count, u64 token) {
  if (queue->packed) return packed_add(queue, buffers, count, token);
  bool in_table = queue->tables && count > 1 && count <= VIRTQ_TABLE;
  u16 wanted = in_table ? 1 : (u16)count, head = queue->free;
  if (queue->free_count < wanted) return false;
  if (in_table) {
    struct virtq_desc *table = queue->tables + U(head) * VIRTQ_TABLE;
    for (u32 i = 0; i < count; i++)
      table[i] = (struct virtq_desc){(u64)buffers[i].at, buffers[i].size, flags_of(buffers, count, i), (u16)(i + 1)};
    volatile struct virtq_desc *desc = &queue->desc[head];
    desc->addr = (u64)table;
    desc->len = count * sizeof *table;
    desc->flags = DESC_INDIRECT;
    queue->free = desc->next;
  } else
    for (u32 i = 0; i < count; i++) {
      volatile struct virtq_desc *desc = &queue->desc[queue->free];
      desc->addr = (u64)buffers[i].at;
      desc->len = buffers[i].size;
      desc->flags = flags_of(buffers, count, i);
      queue->free = desc->next;
    }
  queue->free_count -= wanted;
  queue->lengths[head] = wanted;
  queue->tokens[head] = token;
  queue->avail->ring[queue->next_avail & (queue->size - 1)] = head;
  barrier();
  queue->avail->idx = ++queue->next_avail;
  return true;
}

void virtq_kick(struct virtq *queue) {
  barrier();
  u16 now = queue->next_avail, before = queue->kicked;
  queue->kicked = now;
  bool wanted = queue->packed        ? packed_wants_kick(queue)
                : queue->event_index ? (u16)(now - *virtq_avail_event(queue) - 1) < (u16)(now - before)
                                     : !(queue->used->flags & RING_QUIET);
  if (!wanted) return;
  queue->kicks++;
  queue->device->transport->kick(queue->device, queue->index);
}

bool virtq_pending(const struct virtq *queue) {
  return queue->packed ? packed_pending(queue) : queue->used->idx != queue->last_used;
}

/* The head of the chain that is to be taken next. */
static u32 next_used(const struct virtq *queue) {
  return queue->packed ? packed_next(queue) : queue->used->ring[queue->last_used & (queue->size - 1)].id;
}

/* A chain that is not ours is left there: `virtq_wait` says so. */
static bool is_ours(const struct virtq *queue, u32 id) { return id < queue->size && queue->lengths[id] != 0; }

bool virtq_take(struct virtq *queue, u64 *token, u32 *written) {
  if (!virtq_pending(queue)) return false;
  barrier();
  u32 id = next_used(queue);
  if (!is_ours(queue, id)) return false;
  if (queue->packed) {
    packed_take(queue, token, written);
    return true;
  }
  if (token) *token = queue->tokens[id];
  if (written) *written = queue->used->ring[queue->last_used & (queue->size - 1)].len;
  u16 last = (u16)id, length = queue->lengths[id];
  for (u16 i = 1; i < length; i++) last = queue->desc[last].next;
  queue->desc[last].next = queue->free;
  queue->free = (u16)id;
  queue->free_count += length;
  queue->lengths[id] = 0;
  queue->last_used++;
  virtq_arm(queue);
  return true;
}

void virtq_arm(struct virtq *queue) {
  if (queue->packed) return packed_arm(queue);
  if (queue->event_index) *virtq_used_event(queue) = queue->last_used;
  barrier();
}

bool virtq_take_kept(struct virtq *queue, u64 *token, u32 *head) {
  if (!virtq_pending(queue)) return false;
  u32 id = next_used(queue);
  if (!is_ours(queue, id)) return false;
  *token = queue->tokens[id];
  *head = id;
  if (queue->packed)
    packed_take_kept(queue);
  else
    queue->last_used++;
  return true;
}

void virtq_add_kept(struct virtq *queue, u32 head) {
  if (queue->packed) return packed_add_kept(queue, head);
  queue->avail->ring[queue->next_avail & (queue->size - 1)] = (u16)head;
  queue->avail->idx = ++queue->next_avail; /* this processor's stores are seen in their order */
}

const char *virtq_wait(struct virtq *queue, u32 ms) {
  struct virtio *device = queue->device;
  wait_begin(ms);
  while (!virtq_pending(queue) && !wait_over() && !(device->config_changes && virtio_needs_reset(device)))
    sleep_until_interrupt();
  bool late = wait_over();
  wait_end();
  if (!virtq_pending(queue)) return virtio_needs_reset(device) ? "needs a reset" : "no answer";
  if (late) return "no interrupt";
  return is_ours(queue, next_used(queue)) ? NULL : "wrong descriptor returned";
}

const char *virtq_call(struct virtq *queue, const struct buffer *buffers, u32 count, u32 *written) {
  if (!virtq_add(queue, buffers, count, 0)) return "queue full";
  virtq_kick(queue);
  const char *error = virtq_wait(queue, VIRTIO_ANSWER_MS);
  if (!error) virtq_take(queue, NULL, written);
  return error;
}

/* ---- the action ------------------------------------------------------------------------------------------------- */

void virtio_list(void) {
  virtio_mmio_list();
  virtio_pci_list();
}
