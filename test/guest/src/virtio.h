/*
 * What every virtio driver of this guest stands on: finding a device, its start and reset, and split virtqueues
 * (virtio 1.3, sections 2, 3 and 4), behind virtio-mmio or virtio-pci. A driver is one file; its course is
 *
 *   virtio_find, virtio_start, virtq_setup for each queue, virtio_ready;
 *   virtq_add, virtq_kick, virtq_wait, virtq_take, as often as wanted;
 *   virtio_stop.
 *
 * Functions that can fail return NULL or the reason, which the driver prints.
 */
#pragma once
#include "guest.h"

/* Device types (section 5). */
#define VIRTIO_NET 1
#define VIRTIO_BLOCK 2
#define VIRTIO_CONSOLE 3
#define VIRTIO_ENTROPY 4
#define VIRTIO_BALLOON 5
#define VIRTIO_VSOCK 19
#define VIRTIO_MEM 24

/* Feature bits of transports and queues (section 6). The first two are asked for without the driver's doing. */
#define VIRTIO_F_INDIRECT_DESC (1ul << 28)
#define VIRTIO_F_EVENT_IDX (1ul << 29)
#define VIRTIO_F_VERSION_1 (1ul << 32)
#define VIRTIO_F_RING_PACKED (1ul << 34)

/* Device status (section 2.1). */
#define STATUS_ACKNOWLEDGE 1
#define STATUS_DRIVER 2
#define STATUS_DRIVER_OK 4
#define STATUS_FEATURES_OK 8
#define STATUS_NEEDS_RESET 64
#define STATUS_FAILED 128

/* How long a device may take for an answer. */
#define VIRTIO_ANSWER_MS 30000

/* The most queues of a device that a driver can set up, and the most buffers of a chain that go into a table. */
#define VIRTIO_QUEUES 8
#define VIRTQ_TABLE 16

/* The parts of a split queue (section 2.7). */
#define DESC_NEXT 1
#define DESC_WRITE 2
#define DESC_INDIRECT 4
#define RING_QUIET 1 /* flags of both rings: no interrupt, or no kick, is wanted */

struct virtq_desc {
  u64 addr;
  u32 len;
  u16 flags, next;
};
struct virtq_avail {
  u16 flags, idx, ring[]; /* used_event behind it */
};
struct virtq_used_elem {
  u32 id, len;
};
struct virtq_used {
  u16 flags, idx;
  struct virtq_used_elem ring[]; /* avail_event behind it */
};

/* A buffer of a chain: the device reads it, or writes to it. Those it reads come first. */
struct buffer {
  const volatile void *at;
  u32 size;
  bool writable;
};

struct virtio;

/* What is different between virtio_mmio.c and virtio_pci.c. */
struct virtio_transport {
  u32 (*status)(const struct virtio *device);
  void (*set_status)(const struct virtio *device, u32 status);
  u64 (*offered)(const struct virtio *device);
  /* 32 of the features that the driver accepts. */
  void (*accept)(const struct virtio *device, u32 word, u32 bits);
  /* The largest size of a queue; 0: there is none. */
  u32 (*queue_max)(const struct virtio *device, u32 queue);
  bool (*queue_ready)(const struct virtio *device, u32 queue);
  /* Places a queue and enables it. False: the device refuses. */
  bool (*queue_set)(const struct virtio *device, u32 queue, u32 size, u64 desc, u64 avail, u64 used);
  void (*queue_stop)(const struct virtio *device, u32 queue);
  void (*kick)(const struct virtio *device, u32 queue);
  u32 (*generation)(const struct virtio *device);
  /* Has the device interrupt this processor by the device's vectors. False: there is no way to. */
  bool (*connect)(struct virtio *device);
  void (*disconnect)(const struct virtio *device);
  /* Why it interrupts, which is acknowledged: bit 0 used buffers, bit 1 the configuration. */
  u32 (*cause)(const struct virtio *device, u32 vector);
};
extern const struct virtio_transport virtio_mmio, virtio_pci;

/* The `nth` device of a type on one transport; the number that is left when there are fewer is `*nth`. */
bool virtio_mmio_find(struct virtio *device, u32 id, u32 *nth);
bool virtio_pci_find(struct virtio *device, u32 id, u32 *nth);
void virtio_mmio_list(void);
void virtio_pci_list(void);

struct virtq {
  struct virtio *device;
  u16 index, size;
  volatile struct virtq_desc *desc;
  volatile struct virtq_avail *avail;
  volatile struct virtq_used *used;
  /* For each descriptor: the token of the chain that begins there, and how many descriptors the chain has (0: none). */
  u64 *tokens;
  u16 *lengths;
  struct virtq_desc *tables; /* VIRTQ_TABLE for each descriptor, where indirect descriptors were negotiated */
  struct packed *packed; /* virtq_packed.c; NULL: the queue is split */
  u16 free, free_count;
  u16 next_avail, kicked, last_used;
  bool event_index;
  u32 kicks;
};

struct virtio {
  const struct virtio_transport *transport;
  u64 base;   /* registers: those of virtio-mmio, or the function's configuration page */
  u64 config; /* configuration space */
  u32 id;     /* device type */
  u32 vector; /* interrupt vector, 0 when there is none; virtio-pci has another one for the configuration */
  u32 config_vector;
  u32 irq; /* virtio-mmio */
  bool level, active_low;
  u64 common, notify, msix; /* virtio-pci */
  u32 notify_multiplier, msix_control;
  u16 notify_offset[VIRTIO_QUEUES];
  u64 offered, features;
  struct virtq queues[VIRTIO_QUEUES];
  volatile u32 interrupts, config_changes; /* so far */
};

/* The `nth` device (from 0) of a type: those that ACPI announces, then those on PCI. */
bool virtio_find(struct virtio *device, u32 id, u32 nth);
/* Resets the device and negotiates: `wanted` and the features of queues and transport, as far as they are offered. */
const char *virtio_start(struct virtio *device, u64 wanted);
/* Sets a queue up, `size_max` entries (a power of two) or as many as the device can. */
const char *virtq_setup(struct virtio *device, u32 queue, u32 size_max);
/* Routes the interrupt and says DRIVER_OK. */
const char *virtio_ready(struct virtio *device);
/* Resets the device, waits until that is done, and takes its interrupt away. False: the device does not get done. */
bool virtio_stop(struct virtio *device);
/* Tells the device that its driver has given up, and takes its interrupt away. */
void virtio_fail(struct virtio *device);

u32 virtio_status(const struct virtio *device);
bool virtio_needs_reset(const struct virtio *device);

/* The configuration space; a value of 8 bytes is read until no change came in between. */
u8 virtio_config8(const struct virtio *device, u32 offset);
u16 virtio_config16(const struct virtio *device, u32 offset);
u32 virtio_config32(const struct virtio *device, u32 offset);
u64 virtio_config64(const struct virtio *device, u32 offset);
void virtio_config_write32(const struct virtio *device, u32 offset, u32 value);

/* Makes a chain available, in a table where that was negotiated. False: no descriptors are free. */
bool virtq_add(struct virtq *queue, const struct buffer *buffers, u32 count, u64 token);
/* Tells the device of what was added, if it wants to know. */
void virtq_kick(struct virtq *queue);
/* Takes a chain that the device is done with: its token, and how many bytes were written. False: there is none. */
bool virtq_take(struct virtq *queue, u64 *token, u32 *written);
/* The same, but the chain stays as it is, and its head can be made available again. For loops that must be short. */
bool virtq_take_kept(struct virtq *queue, u64 *token, u32 *head);
void virtq_add_kept(struct virtq *queue, u32 head);
/* Asks for an interrupt at the next chain. What came before has to be looked for. (`virtq_take` does it by itself.) */
void virtq_arm(struct virtq *queue);
bool virtq_pending(const struct virtq *queue);
/* Halts until there is a chain to take. */
const char *virtq_wait(struct virtq *queue, u32 ms);
/* One chain there and back: added, kicked, waited for and taken. */
const char *virtq_call(struct virtq *queue, const struct buffer *buffers, u32 count, u32 *written);
/* The event indices behind the rings. */
volatile u16 *virtq_used_event(const struct virtq *queue);
volatile u16 *virtq_avail_event(const struct virtq *queue);

/* The same for packed queues (virtq_packed.c); virtio.c calls them. */
const char *packed_setup(struct virtio *device, struct virtq *queue);
bool packed_add(struct virtq *queue, const struct buffer *buffers, u32 count, u64 token);
bool packed_wants_kick(struct virtq *queue);
bool packed_pending(const struct virtq *queue);
/* The identifier of the chain that is to be taken next. */
u32 packed_next(const struct virtq *queue);
void packed_take(struct virtq *queue, u64 *token, u32 *written);
void packed_arm(struct virtq *queue);
void packed_take_kept(struct virtq *queue);
void packed_add_kept(struct virtq *queue, u32 id);
/* For a driver that breaks the rules: writes a descriptor without making it available, and makes all those of a chain available
 * whose first one is at the queue's first entry, as the first thing that is done with the queue. */
void packed_put(struct virtq *queue, u32 index, u64 addr, u32 len, u16 flags);
void packed_offer(struct virtq *queue, u32 count);

/* ---- virtio_other.c --------------------------------------------------------------------------------------------- */

/* The features of devices themselves: those of queues and transport are negotiated by virtio.c. */
#define ALL_FEATURES 0xfffffful

/* Starts a driver with all queues up to `last`, so that any device is content. */
const char *correct_start(struct virtio *device, u32 last);
/* One piece of work, for devices that answer of themselves. For the others it is enough that they started. */
const char *correct_work(struct virtio *device);

/* A device that nothing happens to, beside one of type `id`. False: there is none. */
bool other_start(u32 id);
u32 other_id(void);
const char *other_work(void);
void other_stop(void);

/* ---- virtio_endure.c -------------------------------------------------------------------------------------------- */

/* What requests carry whose bytes come back, or are looked at elsewhere. */
#define NOTE_MAGIC 0x65746f6eu
#define NOTE_SIZE 64
struct note {
  u32 magic;
  u32 done;    /* requests that were completed before it */
  u32 attempt; /* no two notes have the same number */
  u32 sum;
  u8 rest[NOTE_SIZE - 16];
};
void note_write(struct note *note, u32 done, u32 attempt);
bool note_good(const struct note *note);

/* The work of one device. */
struct endurance {
  struct virtio *device;
  const char *(*start)(void);                      /* from the reset to DRIVER_OK, with memory of its own */
  const char *(*request)(u32 done, u32 attempt); /* one at a time, until it is completed or has failed */
};
/* Does all requests, each again until it is completed, and drives another device whenever this one needs a reset. */
const char *virtio_endure(const char *name, const struct endurance *subject, u32 requests);
const char *endure_wrong(const char *why);
/* How many requests: ",N" */
u32 endure_requests(const char *text);

/* Memory for rings and buffers: RAM behind the image, not cleared. NULL when there is no more. It is all given back before each
 * word of the command line. */
void *heap_take(u64 size, u64 alignment);
u64 heap_left(void);
/* How far the heap is taken, and back to there. */
u64 heap_mark(void);
void heap_back(u64 mark);
