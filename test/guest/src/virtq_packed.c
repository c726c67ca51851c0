/* Packed virtqueues from the driver's side (virtio 1.3, section 2.8). Chains of several buffers are in tables where those were
 * negotiated; only such chains can be kept. */
#include "virtio.h"

#define DESC_AVAIL 0x80
#define DESC_USED 0x8000
#define EVENTS_ON 0
#define EVENTS_OFF 1
#define EVENTS_AT 2
#define EVENT_WRAP 0x8000

struct packed_desc {
  u64 addr;
  u32 len;
  u16 id, flags;
};

struct events {
  u16 desc, flags;
};

struct packed {
  volatile struct packed_desc *ring;
  volatile struct events *driver, *device;
  u16 *next_free, *sizes; /* for each identifier: the one that is free after it; entries of its table */
  u16 used;               /* position of the next used descriptor */
  u16 added;              /* descriptors since the last kick */
  bool avail_wrap, used_wrap;
};

const char *packed_setup(struct virtio *device, struct virtq *queue) {
  u32 size = queue->size;
  struct packed *packed = heap_take(sizeof *packed, 64);
  if (!packed) return "no memory for a queue";
  memset(packed, 0, sizeof *packed);
  packed->ring = heap_take(sizeof(struct packed_desc) * size, PAGE);
  packed->driver = heap_take(2 * sizeof(struct events), 64);
  packed->next_free = heap_take(sizeof(u16) * size, 64);
  packed->sizes = heap_take(sizeof(u16) * size, 64);
  queue->tokens = heap_take(sizeof(u64) * size, 64);
  queue->lengths = heap_take(sizeof(u16) * size, 64);
  if (device->features & VIRTIO_F_INDIRECT_DESC)
    queue->tables = heap_take(sizeof(struct packed_desc) * VIRTQ_TABLE * size, PAGE);
  if (!queue->lengths || ((device->features & VIRTIO_F_INDIRECT_DESC) && !queue->tables)) return "no memory for a queue";
  packed->device = packed->driver + 1;
  packed->driver->desc = EVENT_WRAP;
  packed->driver->flags = queue->event_index ? EVENTS_AT : EVENTS_ON;
  packed->device->desc = packed->device->flags = 0;
  packed->avail_wrap = packed->used_wrap = true;
  for (u32 i = 0; i < size; i++) {
    packed->ring[i].flags = 0;
    packed->next_free[i] = (u16)(i + 1);
    queue->lengths[i] = 0;
  }
  queue->free_count = (u16)size;
  queue->packed = packed;
  return device->transport->queue_set(device, queue->index, size, (u64)packed->ring, (u64)packed->driver,
                                      (u64)packed->device)
             ? NULL
             : "queue refused";
}

/* The flags of a descriptor that is made available now. */
static u16 available(const struct packed *packed) { return packed->avail_wrap ? DESC_AVAIL : DESC_USED; }

static void advance(struct virtq *queue) {
  queue->packed->added++;
  if (++queue->next_avail < queue->size) return;
  queue->next_avail = 0;
  queue->packed->avail_wrap = !queue->packed->avail_wrap;
}

/* One descriptor, whose flags are what the device looks at. */
static void put_table(struct virtq *queue, u16 id) {
  struct packed *packed = queue->packed;
  volatile struct packed_desc *desc = &packed->ring[queue->next_avail];
  desc->addr = (u64)((struct packed_desc *)queue->tables + U(id) * VIRTQ_TABLE);
  desc->len = packed->sizes[id] * sizeof *desc;
  desc->id = id;
  barrier();
  desc->flags = DESC_INDIRECT | available(packed);
  advance(queue);
}

bool packed_add(struct virtq *queue, const struct buffer *buffers, u32 count, u64 token) {
  struct packed *packed = queue->packed;
  bool in_table = queue->tables && count > 1 && count <= VIRTQ_TABLE;
  u16 wanted = in_table ? 1 : (u16)count, id = queue->free;
  if (queue->free_count < wanted) return false;
  queue->free = packed->next_free[id];
  queue->free_count -= wanted;
  queue->lengths[id] = wanted;
  queue->tokens[id] = token;
  if (in_table) {
    struct packed_desc *table = (struct packed_desc *)queue->tables + U(id) * VIRTQ_TABLE;
    for (u32 i = 0; i < count; i++)
      table[i] = (struct packed_desc){(u64)buffers[i].at, buffers[i].size, 0, buffers[i].writable ? DESC_WRITE : 0};
    packed->sizes[id] = (u16)count;
    put_table(queue, id);
    return true;
  }
  /* The first one's flags come last: they make the whole chain available. */
  volatile struct packed_desc *first = &packed->ring[queue->next_avail];
  u16 first_flags = 0;
  for (u32 i = 0; i < count; i++) {
    volatile struct packed_desc *desc = &packed->ring[queue->next_avail];
    u16 flags = (u16)((buffers[i].writable ? DESC_WRITE : 0) | (i + 1 < count ? DESC_NEXT : 0) | available(packed));
    desc->addr = (u64)buffers[i].at;
    desc->len = buffers[i].size;
    desc->id = id;
    if (i == 0)
      first_flags = flags;
    else
      desc->flags = flags;
    advance(queue);
  }
  barrier();
  first->flags = first_flags;
  return true;
}

bool packed_wants_kick(struct virtq *queue) {
  struct packed *packed = queue->packed;
  u16 added = packed->added, now = queue->next_avail, flags = packed->device->flags & 3;
  packed->added = 0;
  if (flags != EVENTS_AT) return flags == EVENTS_ON;
  u16 desc = packed->device->desc, event = desc & ~EVENT_WRAP;
  if (!!(desc & EVENT_WRAP) != packed->avail_wrap) event -= queue->size;
  return (u16)(now - event - 1) < added;
}

bool packed_pending(const struct virtq *queue) {
  const struct packed *packed = queue->packed;
  u16 flags = packed->ring[packed->used].flags;
  bool avail = flags & DESC_AVAIL, used = flags & DESC_USED;
  return avail == used && used == packed->used_wrap;
}

u32 packed_next(const struct virtq *queue) { return queue->packed->ring[queue->packed->used].id; }

void packed_take_kept(struct virtq *queue) {
  struct packed *packed = queue->packed;
  packed->used += queue->lengths[packed_next(queue)];
  queue->last_used++;
  if (packed->used < queue->size) return;
  packed->used -= queue->size;
  packed->used_wrap = !packed->used_wrap;
}

void packed_take(struct virtq *queue, u64 *token, u32 *written) {
  struct packed *packed = queue->packed;
  u16 id = (u16)packed_next(queue), length = queue->lengths[id];
  if (token) *token = queue->tokens[id];
  if (written) *written = packed->ring[packed->used].len;
  packed_take_kept(queue);
  queue->lengths[id] = 0;
  packed->next_free[id] = queue->free;
  queue->free = id;
  queue->free_count += length;
  packed_arm(queue);
}

void packed_add_kept(struct virtq *queue, u32 id) { put_table(queue, (u16)id); }

void packed_arm(struct virtq *queue) {
  struct packed *packed = queue->packed;
  if (queue->event_index) packed->driver->desc = (u16)(packed->used | (packed->used_wrap ? EVENT_WRAP : 0));
  barrier();
}

void packed_put(struct virtq *queue, u32 index, u64 addr, u32 len, u16 flags) {
  volatile struct packed_desc *desc = &queue->packed->ring[index];
  desc->addr = addr;
  desc->len = len;
  desc->id = 0;
  desc->flags = flags;
}

void packed_offer(struct virtq *queue, u32 count) {
  while (count--) {
    barrier();
    queue->packed->ring[count].flags |= DESC_AVAIL;
  }
}
